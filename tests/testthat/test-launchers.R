# What launchers of batch engines ask for, without any engine: scripts, commands, and refused arguments.

script_of <- function(launcher) {
  lines <- format(launcher)
  lines[seq_along(lines) > 3L]
}

jobs_of <- function(launcher) asNamespace("rustcluster")$jobScripts(launcher, "ID")

script_file <- function(lines) {
  file <- tempfile(fileext = ".sh")
  writeLines(lines, file)
  file
}

test_that("a script of Slurm has a directive for each argument that is given, and no other", {
  lines <- script_of(slurm(cores = 3))
  expect_true("#SBATCH --cpus-per-task=3" %in% lines)
  expect_false(any(grepl("--(mem|time|signal|partition|account|gpus|constraint|array)", lines)))
  lines <- script_of(slurm(
    nodes = 4, cores = 64, memory = "4GB", time = "2:00:00", partition = "long", account = "a1", gpus = 2,
    constraint = "intel&gpu", extra = c("--exclusive", "#SBATCH --qos=q"), setup = "module load R"
  ))
  expected <- c(
    "#!/bin/bash -l", "#SBATCH --array=1-4", "#SBATCH --mem=4096M", "#SBATCH --time=02:00:00",
    "#SBATCH --signal=B:USR1@60", "#SBATCH --partition=long", "#SBATCH --account=a1", "#SBATCH --gpus-per-node=2",
    "#SBATCH --constraint=\"intel&gpu\"", "#SBATCH --exclusive", "#SBATCH --qos=q", "module load R"
  )
  expect_identical(setdiff(expected, lines), character())
  # All directives precede the first command: Slurm reads no others.
  expect_lt(max(grep("^#SBATCH", lines)), match("module load R", lines))
})

test_that("the direct task of a job becomes the agent, and the key is only a path", {
  launchers <- list(
    slurm(cores = 1), gridEngine(cores = 1), pbs(cores = 1), pbs(cores = 1, dialect = "torque"), lsf(cores = 1),
    htcondor(cores = 1), slurm(nodes = 2, cores = 1, array = FALSE)
  )
  for (launcher in launchers) {
    lines <- format(launcher)
    expect_match(utils::tail(lines, 1L), "^exec .*Rscript.*dialMain")
    expect_true(any(grepl("RUSTCLUSTER_DIAL='/.*/ID/key'", lines)))
  }
})

test_that("one job of several nodes goes on without a node that failed", {
  lines <- script_of(slurm(nodes = 4, cores = 2, time = 60, array = FALSE))
  expect_match(utils::tail(lines, 1L), "--no-kill --kill-on-bad-exit=0 --wait=0", fixed = TRUE)
  expect_true(all(c("#SBATCH --nodes=4", "#SBATCH --no-kill", "#SBATCH --signal=USR1@60") %in% lines))
  expect_false(any(grepl("--array", lines)))
})

test_that("Slurm warns a short job when a quarter of its time is left", {
  expect_true("#SBATCH --signal=B:USR1@15" %in% script_of(slurm(cores = 1, time = 1)))
  expect_true("#SBATCH --signal=B:USR1@60" %in% script_of(slurm(cores = 1, time = 5)))
})

test_that("errors of arguments name the argument that was meant", {
  expect_error(slurm(ncore = 2, cores = 1), "`ncore`; did you mean `cores`", class = "rustcluster_bad_argument")
  expect_error(slurm(ncore = 2), "`ncore`; did you mean `cores`", class = "rustcluster_bad_argument")
  expect_error(slurm(cores = 1, gpus = "a100:2"), "`gpus`.*`extra`", class = "rustcluster_bad_argument")
  expect_error(
    slurm(cores = 1, template = "{{ qos }}\n{{ command }}"), "unknown keys: `qos`.*defines that key",
    class = "rustcluster_bad_argument"
  )
})

test_that("a launcher beside a single host is an error that shows the list of a host", {
  expect_error(makeRustCluster(list(slurm(cores = 2), host = "x")), "launcher beside `host`.*list\\(host = \"x\"\\)",
               class = "rustcluster_bad_argument")
})

test_that("arrays are cut at the limit of the site", {
  made <- jobs_of(slurm(nodes = 25, cores = 1, max_array = 10))$submissions
  expect_identical(made$tasks, c(10L, 10L, 5L))
  expect_identical(made$array, c(TRUE, TRUE, TRUE))
  expect_identical(made$file[[1L]], made$file[[2L]])
  # PBS refuses an array of one element.
  made <- jobs_of(pbs(nodes = 11, cores = 1, max_array = 10))
  expect_identical(made$submissions$array, c(TRUE, FALSE))
  expect_false(any(grepl("#PBS -J", made$files[[2L]])))
  expect_identical(jobs_of(lsf(nodes = 3, cores = 1, array = FALSE))$submissions$tasks, c(1L, 1L, 1L))
})

test_that("memory and time are in the form of each engine", {
  forms <- function(make, pattern) {
    grep(pattern, format(make(cores = 2, memory = "1.5GB", time = "1-01:30:00")), value = TRUE)
  }
  expect_identical(forms(slurm, "--mem=|--time="), c("#SBATCH --mem=1536M", "#SBATCH --time=1-01:30:00"))
  expect_identical(forms(gridEngine, "-l "), c("#$ -l mem_free=1536M", "#$ -l h_rt=25:30:00"))
  expect_identical(forms(pbs, "-l "), c("#PBS -l select=1:ncpus=2:mem=1536mb", "#PBS -l walltime=25:30:00"))
  expect_identical(forms(lsf, "mem=|-W"), c("#BSUB -R \"rusage[mem=1536MB]\"", "#BSUB -W 1530"))
  condor <- forms(htcondor, "request_memory|periodic_remove")
  expect_identical(condor[[1L]], "request_memory = 1536MB")
  expect_match(condor[[2L]], "> 91800)", fixed = TRUE)
  # The agent learns its time limit from its script, since most engines do not tell it.
  expect_true(any(grepl("RUSTCLUSTER_JOB_END=.*91800", format(htcondor(cores = 1, time = "1-01:30:00")))))
  expect_true("#SBATCH --time=01:30:00" %in% format(slurm(cores = 1, time = 90)))
  expect_true("#SBATCH --time=01:30:00" %in% format(slurm(cores = 1, time = as.difftime(1.5, units = "hours"))))
  # What this package does not know is the engine's.
  expect_true("#SBATCH --time=90:00" %in% format(slurm(cores = 1, time = "90:00")))
  expect_true("#$ -l mem_free=big" %in% format(gridEngine(cores = 1, memory = "big")))
  expect_true("#SBATCH --mem=954M" %in% format(slurm(cores = 1, memory = 1e9)))
})

test_that("values that would change a script are refused, by the name of their argument", {
  refused <- function(argument, ...) {
    error <- tryCatch(slurm(...), rustcluster_bad_argument = identity)
    expect_s3_class(error, "rustcluster_bad_argument")
    expect_identical(error$argument, argument)
  }
  refused("cores", nodes = 1)
  for (cores in list(0, 1.5, NA, "4", c(1, 2), Inf)) refused("cores", cores = cores)
  for (nodes in list(0, -1, NULL, NA, 1e6)) refused("nodes", cores = 1, nodes = nodes)
  for (text in c("a;b", "a b", "$(id)", "`id`", "a\nb", "-x", "a'b", "", "a\"b")) {
    refused("partition", cores = 1, partition = text)
    refused("account", cores = 1, account = text)
    refused("name", cores = 1, name = text)
    refused("memory", cores = 1, memory = text)
    refused("time", cores = 1, time = text)
  }
  refused("constraint", cores = 1, constraint = "a\" --x")
  refused("constraint", cores = 1, constraint = "a\nb")
  refused("gpus", cores = 1, gpus = 0.5)
  for (memory in list(5, -1, Inf, c(1e9, 1e9))) refused("memory", cores = 1, memory = memory)
  for (time in list(0, -1, "0:00:00", c(1, 2), TRUE)) refused("time", cores = 1, time = time)
  for (dir in list("", "/a b", "/a/../b", "/", "/a%j", "/a\nb", 3)) refused("dir", cores = 1, dir = dir)
  for (port in list(-1, 70000, c(5, 3), c(0, 5), "80", NA, 1:3)) refused("port", cores = 1, port = port)
  for (address in list("a b", "a;b", "-x", 3, "a@b")) refused("address", cores = 1, address = address)
  for (login in list("a b", 3, c("a", "b"), "u:pw@h")) refused("login", cores = 1, login = login)
  refused("extra", cores = 1, extra = "rm -rf x")
  refused("setup", cores = 1, setup = "#SBATCH --mem=1")
  refused("array", cores = 1, array = NA)
  refused("max_array", cores = 1, max_array = 0)
  refused("rscript", cores = 1, rscript = "a\nb")
  refused("walltime", cores = 1, walltime = 5)
  expect_error(slurm(cores = 1, walltime = 5), "did you mean `time`", class = "rustcluster_bad_argument")
  expect_error(pbs(cores = 1, dialect = "x"), "openpbs", class = "rustcluster_bad_argument")
  expect_error(jobTemplate("{{ command }}", cores = 1, submit = "a {{ x }}", cancel = "b"), "unknown key `x`",
               class = "rustcluster_bad_argument")
  expect_error(jobTemplate("{{ command }}", cores = 1, cancel = "b"), "`submit` is missing",
               class = "rustcluster_bad_argument")
})

test_that("text that goes into a script is quoted for the shell", {
  odd <- "/opt/my R's $dir/`x`"
  launcher <- slurm(cores = 1, rscript = odd, rlibs = c(odd, "/b"))
  lines <- utils::tail(format(launcher), 4L)
  # The file with the variables exists only while the jobs do.
  lines <- grep("^[.] /.*/variables$", lines, value = TRUE, invert = TRUE)
  expect_length(lines, 3L)
  shown <- c(lines, "printf '%s\\n' \"$R_LIBS\"")
  file <- script_file(sub("^exec ", "printf '%s\\\\n' ", shown))
  out <- system2("sh", file, stdout = TRUE)
  expect_identical(out[[1L]], odd)
  expect_identical(utils::tail(out, 1L), paste0(odd, ":/b"))
})

test_that("templates have keys, defaults and lines that are left out", {
  text <- paste(
    "#!/bin/sh", "#Q {{ queue | all }}", "#M {{ memory | }} x", "#C {{ cores }}{{mine}}", "{{ environment }}",
    "exec {{ command }}", sep = "\n"
  )
  make <- function(template = text, ..., nodes = 1) {
    jobTemplate(template, cores = 2, submit = "sub", cancel = "del", nodes = nodes, mine = "!", ...)
  }
  lines <- jobs_of(make())$files[[1L]]
  expect_identical(lines[1:3], c("#!/bin/sh", "#Q all", "#C 2!"))
  lines <- jobs_of(make(queue = "q", memory = "1GB"))$files[[1L]]
  expect_identical(lines[2:4], c("#Q q", "#M 1024M x", "#C 2!"))
  file <- script_file(text)
  expect_identical(jobs_of(make(file))$files, jobs_of(make())$files)
  # A value is never read as a template.
  made <- jobTemplate(text, cores = 1, submit = "s", cancel = "c", mine = "{{ nothing }}")
  expect_true("#C 1{{ nothing }}" %in% jobs_of(made)$files[[1L]])
})

test_that("wrong templates are refused with the key and the known keys", {
  make <- function(template, ...) jobTemplate(template, cores = 2, submit = "sub", cancel = "del", ...)
  expect_error(make("{{ command }} {{ zork }}"), "unknown keys: `zork`.*known keys are.*`cores`",
               class = "rustcluster_bad_argument")
  expect_error(make("{{ command }} {{ walltime }}"), "did you mean `time`", class = "rustcluster_bad_argument")
  expect_error(make("{{ command }}\n{{ memory }}"), "value for the key `memory`", class = "rustcluster_bad_argument")
  expect_error(make("{{ command }}\n{{ mem"), "malformed key in line 2", class = "rustcluster_bad_argument")
  expect_error(make("{{ cores }}"), "key `command` or `script`", class = "rustcluster_bad_argument")
  expect_error(make("/no/such/file"), "no file", class = "rustcluster_bad_argument")
  expect_error(make("{{ command }}", other = 1), "unknown argument `other`", class = "rustcluster_bad_argument")
  expect_error(make("{{ command }}{{ other }}", other = "a\nb"), "one line", class = "rustcluster_bad_argument")
  expect_error(slurm(nodes = 2, cores = 1, template = "{{ command }}"), "key `tasks`",
               class = "rustcluster_bad_argument")
})

test_that("a template decides whether nodes are an array, one job, or jobs of their own", {
  tasks <- function(template) {
    made <- jobTemplate(template, nodes = 3, cores = 2, submit = "sub {{ file }} -x", cancel = "del")
    jobs_of(made)$submissions
  }
  expect_identical(tasks("#A {{ tasks }}\n{{ command }}")$tasks, 3L)
  expect_true(tasks("#A {{ tasks }}\n{{ command }}")$array)
  expect_identical(tasks("#A {{ nodes }}\n{{ command }}")$tasks, 3L)
  expect_false(tasks("#A {{ nodes }}\n{{ command }}")$array)
  expect_identical(tasks("{{ command }}")$tasks, c(1L, 1L, 1L))
  expect_match(tasks("{{ command }}")$command, "^sub /.*/ID/job[.]sh -x$")
})

test_that("print() shows the script and the submit command, and changes nothing", {
  dir <- tempfile("never-")
  launcher <- slurm(nodes = 2, cores = 3, dir = dir)
  out <- capture.output(shown <- print(launcher))
  expect_identical(shown, launcher)
  expect_identical(out, format(launcher))
  expect_match(out[[1L]], "Slurm: 2 nodes with 3 workers each")
  expect_identical(out[[2L]], paste0("$ sbatch --parsable ", dir, "/ID/job.sh"))
  expect_false(file.exists(dir))
})
