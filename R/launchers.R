# The launchers of batch engines: what makeRustCluster() needs to run agents as jobs. A launcher is checked when it is
# made; it starts nothing.

#' Launchers for batch engines
#'
#' A launcher describes jobs of a batch engine. It is used as `spec` of [makeRustCluster()], or as an element of `spec`
#' beside hosts. Each node of its jobs has one agent, which forks the workers of that node. Printing a launcher shows
#' the exact script and the submit command, and submits nothing.
#'
#' The directory `dir` must be on a file system that this session and the nodes share. Each cluster has a directory of
#' its own in it, with the scripts, the logs of the jobs, the key of the cluster and the variables of `rscript_envs`.
#' The directory is readable by the user alone and is removed when the cluster stops. The package puts no secrets into
#' scripts, since engines show these to administrators.
#'
#' @param nodes (integer) The number of nodes; default 1.
#' @param cores (integer) The number of cores that each node gives, and of workers on each node. Required.
#' @param memory (number of bytes, or character such as `"4GB"`) Memory of each node. `"4GB"`, `"4G"` and `"4GiB"` are
#'   `4 * 2^30` bytes, as in the engines. Other text is passed on as it is. Default: the engine's default.
#' @param time (number of minutes, `difftime`, or character) The time limit of a job: `90`, `"1:30:00"`, or
#'   `"1-12:00:00"` with days. Other text is passed on as it is. The agent of a job whose limit is known stops taking
#'   tasks before the limit. Default: the engine's default.
#' @param partition,queue (character) The partition or queue. Default: the engine's default.
#' @param account (character) The account (Slurm, PBS), accounting group (HTCondor) or project (Grid Engine, LSF) that
#'   is charged. Default: the engine's default.
#' @param gpus (integer) GPUs of each node; default none.
#' @param constraint (character) Required properties of the nodes, in the engine's own form: `--constraint` of Slurm,
#'   `requirements` of HTCondor, a resource of `-l` of Grid Engine, a resource of the chunk of PBS, `select[]` of LSF.
#' @param extra (character) Further lines for the script, verbatim: directives with the engine's prefix, such as
#'   `"#SBATCH --exclusive"`, or the option alone, `"--exclusive"`. For HTCondor: lines of the submit description.
#' @param setup (character) Lines of shell that run before R starts, such as `"module load R"`. With `setup`, the
#'   script runs in a login shell of bash, in which `module` and `conda` are usually defined.
#' @param array (logical) `TRUE`: one array of jobs with one node each, which start and end independently. `FALSE`: for
#'   Slurm one job of `nodes` nodes, which start together, with an agent on each by `srun`; the other nodes go on if one
#'   fails. For the other engines a job of its own for each node.
#' @param max_array (integer) The number of elements that an array may have at this site; default 1000. More nodes are
#'   submitted as several arrays.
#' @param name (character) Jobs are called by this name, a hyphen and the number of the cluster; default
#'   `"rustcluster"`. Letters, digits, `_`, `.` and `-`.
#' @param dir (character) The directory for scripts, logs and keys; default `"~/.rustcluster"`. It is created if it
#'   does not exist.
#' @param rscript (character) The `Rscript` command on the nodes. Default: the full path of the `Rscript` of this
#'   session; with `setup` or `login`, the `Rscript` in the PATH of the job.
#' @param rlibs (character) Library paths of the agent and its workers (`R_LIBS`). Default: the paths of the node.
#' @param address (character) Names or addresses of this machine that nodes connect to, tried in turn. Default: the
#'   addresses of this machine, in the order of its network interfaces.
#' @param port (integer) The TCP port that the nodes connect to: a number, a range `c(from, to)`, or `0`, the default,
#'   for any free port.
#' @param login (character) `"user@host"`: the login node of a cluster whose nodes cannot connect to this machine. The
#'   jobs are submitted there, over one ssh connection with `rshcmd` and `rshopts` of [makeRustCluster()]. The nodes
#'   connect to a gateway that runs there: `dir`, `address` and `port` are then those of the login node, which needs
#'   this version of the package. Default: this machine submits the jobs itself.
#' @param template (character) A file, or the text of a script with keys `{{ key }}`, instead of the built-in template
#'   of the engine: see section Templates.
#' @param max (integer) The maximum number of nodes of an adaptive cluster, instead of `nodes`: jobs are submitted while
#'   tasks wait, and end when their workers have nothing to do. See section Adaptive clusters. Default: the number of
#'   nodes is fixed.
#' @param min (integer) The number of nodes of an adaptive cluster that are submitted at the start and never given back;
#'   default 0.
#' @param idle (number of seconds) A node of an adaptive cluster is given back when its workers have had nothing to do
#'   for this time; at least 0.01; default 60. `Inf`: never.
#' @param backlog (integer) The maximum number of jobs of this launcher that wait in the queue of the engine, or whose
#'   workers have not started yet; default 5. An adaptive cluster submits further jobs only when some of these have
#'   started.
#' @param ... Values for further keys of `template`, by name.
#' @param pe (character) The parallel environment of Grid Engine that gives several cores of one host; default `"smp"`.
#'   It is used if `cores` is above 1.
#' @param dialect (character) `"openpbs"` (also PBS Pro): `select=` and `-J`. `"torque"`: `nodes=` and `-t`.
#' @param submit (character) The command line that submits a script. `{{ file }}` stands for the file of the script,
#'   which is appended if the key is missing.
#' @param cancel (character) The command line that cancels jobs. `{{ jobs }}` stands for the job ids, separated by
#'   spaces, which are appended if the key is missing.
#' @param status (character) The command line that prints a line for each job: the id, its state, and optionally a
#'   reason. `{{ jobs }}` as for `cancel`. Default: states are not shown.
#' @param pattern (character) A regular expression for the id of the job in the output of `submit`. Default: the first
#'   number that is not next to a letter, a digit, `/`, `_` or `-`.
#'
#' @section Adaptive clusters:
#' With `max`, the cluster has `max` nodes, of which those without a job are `"waiting"` in [clusterHosts()].
#' `length(cl)` counts the workers of all of them. Each job has one node.
#'
#' Jobs are submitted while this session waits for the cluster and when a call is made by [clusterSubmit()] or as a
#' future: as many as the waiting tasks need, one worker for each task, within `max` and `backlog`. Functions that give
#' a task to any idle worker (`parLapplyLB()`, [clusterLapply()], foreach, futures) begin with the first worker that
#' starts. Functions that give each node its own task (`clusterCall()`, `clusterEvalQ()`, `clusterApply()`,
#' `parLapply()`) submit jobs for all nodes that they are called with, and wait for these. `clusterExport()` and
#' `clusterSetRNGStream()` neither wait nor submit: a new worker gets exports, set-up calls and random numbers before
#' its first task.
#'
#' A node is given back after `idle` seconds without work, also while this session is at the prompt or busy with other
#' things: its workers and its agent end, and the job with them. A job that has ended, or was cancelled, is replaced
#' while tasks wait. Tasks that were cut off by the end of their job run again, which does not count as a retry.
#'
#' `makeRustCluster()` waits for the first `min` nodes of an adaptive launcher, and for all other hosts. If three jobs
#' in a row fail to be submitted, or end before their workers have started, no more jobs are submitted: a warning
#' (`rustcluster_growth_stopped`) says why, and calls that no worker can run any more fail. A waiting job that was
#' cancelled counts a third of a failure.
#'
#' @section Templates:
#' The keys of a template have the form that \pkg{clustermq} uses: `{{ key }}` must have a value, and
#' `{{ key | default }}` has a default. A line with `{{ key | }}` is left out if the key has no value. Unknown keys are
#' an error. Keys with the value of an argument: `nodes`, `cores`, `memory`, `time`, `queue`, `account`, `gpus`,
#' `constraint`, `extra`, `setup`. Further keys:
#' \describe{
#'   \item{`command`}{the command that becomes the agent. Run it with `exec`, so that signals of the engine reach R.}
#'   \item{`environment`}{lines of sh that set the environment of the agent. They must run before `command`.}
#'   \item{`script`}{the path of a shell script with `setup`, `environment` and `command`, for engines whose job
#'     description is no shell script.}
#'   \item{`job_name`}{the name of the jobs.}
#'   \item{`tasks`}{the range of an array, such as `1-4`; no value for a single job. With [jobTemplate()], a template
#'     that has this key is submitted as arrays; otherwise a template with the key `nodes` is submitted as one job,
#'     and any other template once for each node.}
#'   \item{`directory`, `log_file`}{the directory of the cluster, and a file in it for the output of the job.}
#'   \item{`shell`, `shell_path`}{the shell for the first line of a script, with and without arguments.}
#' }
#' The built-in templates are the files in `system.file("templates", package = "rustcluster")`.
#'
#' @return An object of class `"rustcluster_launcher"`.
#' @section Errors:
#' `rustcluster_bad_argument`.
#' @examples
#' slurm(nodes = 4, cores = 64, time = "2:00:00", partition = "long")
#' htcondor(nodes = 10, cores = 8, memory = "16GB")
#' jobTemplate(
#'   "#!/bin/sh\n#QUEUE {{ queue | all }}\n{{ environment }}\nexec {{ command }}",
#'   cores = 8, submit = "mysubmit", cancel = "mycancel"
#' )
#' \dontrun{
#' cl <- makeRustCluster(slurm(nodes = 4, cores = 64, setup = "module load R"))
#' }
#' @seealso [makeRustCluster()]
#' @name launchers
NULL

#' @rdname launchers
#' @export
slurm <- function(nodes = 1L, cores, memory = NULL, time = NULL, partition = NULL, account = NULL, gpus = NULL,
                  constraint = NULL, extra = NULL, setup = NULL, array = TRUE, max_array = 1000L,
                  name = "rustcluster", dir = "~/.rustcluster", rscript = NULL, rlibs = NULL, address = NULL, port = 0L,
                  login = NULL, template = NULL, max = NULL, min = 0L, idle = 60, backlog = 5L, ...) {
  newLauncher("slurm", given(), list(...))
}

#' @rdname launchers
#' @export
htcondor <- function(nodes = 1L, cores, memory = NULL, time = NULL, account = NULL, gpus = NULL, constraint = NULL,
                     extra = NULL, setup = NULL, name = "rustcluster", dir = "~/.rustcluster", rscript = NULL,
                     rlibs = NULL, address = NULL, port = 0L, login = NULL, template = NULL, max = NULL, min = 0L,
                     idle = 60, backlog = 5L, ...) {
  newLauncher("htcondor", given(), list(...))
}

#' @rdname launchers
#' @export
gridEngine <- function(nodes = 1L, cores, memory = NULL, time = NULL, queue = NULL, account = NULL, gpus = NULL,
                       constraint = NULL, extra = NULL, setup = NULL, pe = "smp", array = TRUE, max_array = 1000L,
                       name = "rustcluster", dir = "~/.rustcluster", rscript = NULL, rlibs = NULL, address = NULL,
                       port = 0L, login = NULL, template = NULL, max = NULL, min = 0L, idle = 60, backlog = 5L, ...) {
  newLauncher("gridEngine", given(), list(...))
}

#' @rdname launchers
#' @export
pbs <- function(nodes = 1L, cores, memory = NULL, time = NULL, queue = NULL, account = NULL, gpus = NULL,
                constraint = NULL, extra = NULL, setup = NULL, dialect = c("openpbs", "torque"), array = TRUE,
                max_array = 1000L, name = "rustcluster", dir = "~/.rustcluster", rscript = NULL, rlibs = NULL,
                address = NULL, port = 0L, login = NULL, template = NULL, max = NULL, min = 0L, idle = 60,
                backlog = 5L, ...) {
  newLauncher("pbs", given(), list(...))
}

#' @rdname launchers
#' @export
lsf <- function(nodes = 1L, cores, memory = NULL, time = NULL, queue = NULL, account = NULL, gpus = NULL,
                constraint = NULL, extra = NULL, setup = NULL, array = TRUE, max_array = 1000L, name = "rustcluster",
                dir = "~/.rustcluster", rscript = NULL, rlibs = NULL, address = NULL, port = 0L, login = NULL,
                template = NULL, max = NULL, min = 0L, idle = 60, backlog = 5L, ...) {
  newLauncher("lsf", given(), list(...))
}

#' @rdname launchers
#' @export
jobTemplate <- function(template, submit, cancel, status = NULL, nodes = 1L, cores, memory = NULL, time = NULL,
                        queue = NULL, account = NULL, gpus = NULL, constraint = NULL, extra = NULL, setup = NULL,
                        pattern = NULL, max_array = 1000L, name = "rustcluster", dir = "~/.rustcluster",
                        rscript = NULL, rlibs = NULL, address = NULL, port = 0L, login = NULL, max = NULL, min = 0L,
                        idle = 60, backlog = 5L, ...) {
  newLauncher("template", given(), list(...))
}

# Returns the arguments of the calling function but `...`, as a list. A missing argument without a default is left out.
# The attribute `absent` has the names of all missing arguments.
given <- function() {
  frame <- parent.frame()
  defaults <- formals(sys.function(sys.parent()))
  names <- setdiff(names(defaults), "...")
  required <- vapply(defaults[names], identical, NA, quote(expr = ))
  absent <- vapply(names, function(name) eval(call("missing", as.name(name)), frame), NA)
  structure(mget(names[!(required & absent)], envir = frame), absent = names[absent])
}

# What differs between engines. `prefix`: of directives. `template`: the built-in one. `time`, `memory`: the forms of
# seconds and of MiB. `job`, `task`: shell words with the id of the job and the index in its array; `task` is empty for
# a job that is no array. `log`: the names of the logs of a single job and of an element of an array.
engines <- list(
  slurm = list(
    title = "Slurm", prefix = "#SBATCH", template = "slurm",
    time = function(seconds) clock(seconds, days = TRUE), memory = function(mib) paste0(mib, "M"),
    job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}", task = "$SLURM_ARRAY_TASK_ID", log = c("%j.log", "%A_%a.log")
  ),
  htcondor = list(
    title = "HTCondor", prefix = NULL, template = "htcondor",
    time = function(seconds) format(seconds, scientific = FALSE), memory = function(mib) paste0(mib, "MB"),
    job = "$1", task = "$2", log = rep("$(Cluster)_$(Process).log", 2L)
  ),
  gridEngine = list(
    title = "Grid Engine", prefix = "#$", template = "grid-engine",
    time = function(seconds) clock(seconds), memory = function(mib) paste0(mib, "M"),
    job = "$JOB_ID", task = "$SGE_TASK_ID", log = c("$JOB_ID.log", "$JOB_ID.$TASK_ID.log")
  ),
  pbs = list(
    title = "PBS", prefix = "#PBS", template = "pbs",
    time = function(seconds) clock(seconds), memory = function(mib) paste0(mib, "mb"),
    # Slurm's commands for users of PBS set its own variables.
    job = "${PBS_JOBID:-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}",
    task = "${PBS_ARRAY_INDEX:-${PBS_ARRAYID:-$SLURM_ARRAY_TASK_ID}}", log = c("", "")
  ),
  lsf = list(
    title = "LSF", prefix = "#BSUB", template = "lsf",
    time = function(seconds) as.character(ceiling(seconds / 60)), memory = function(mib) paste0(mib, "MB"),
    # The index is 0 in a job that is no array.
    job = "$LSB_JOBID", task = "${LSB_JOBINDEX#0}", log = c("%J.log", "%J_%I.log")
  ),
  template = list(
    title = "template", prefix = NULL, template = NULL,
    time = function(seconds) clock(seconds), memory = function(mib) paste0(mib, "M"),
    job = "", task = "", log = rep("job.log", 2L)
  )
)

clock <- function(seconds, days = FALSE) {
  seconds <- ceiling(seconds)
  whole <- if (days) seconds %/% 86400 else 0
  rest <- seconds - whole * 86400
  paste0(if (whole > 0) sprintf("%.0f-", whole), sprintf("%02.0f:%02.0f:%02.0f", rest %/% 3600, rest %/% 60 %% 60,
                                                         rest %% 60))
}

newLauncher <- function(kind, given, values) {
  engine <- engines[[kind]]
  missing <- attr(given, "absent")
  given <- lapply(given, plain)
  absent <- setdiff(c("cores", if (kind == "template") c("template", "submit", "cancel")), names(given))
  # The value of the missing argument may have been given by another name.
  meant <- names(values)[argumentsOfEngines[names(values)] %in% absent]
  if (length(meant)) unknownArguments(kind, meant)
  if (length(absent)) badArgument(absent[[1L]], "is missing; ", switch(absent[[1L]],
    cores = "give the number of cores, and of workers, of each node",
    template = "give the text or the file of a job script",
    "give a command line of the engine"
  ))
  adaptive <- adaptiveOf(given, missing)
  if (!is.null(adaptive)) given$nodes <- adaptive$max
  launcher <- list(
    kind = kind, adaptive = adaptive,
    nodes = wholeCount(given$nodes, "nodes", "a number of nodes", 1, maxWorkers),
    cores = wholeCount(given$cores, "cores", "a number of cores of each node", 1, 4096),
    memory = memoryOf(given$memory), time = timeOf(given$time),
    queue = engineName(if (kind == "slurm") given$partition else given$queue,
                       if (kind == "slurm") "partition" else "queue"),
    account = engineName(given$account, "account"),
    gpus = gpuCount(given$gpus),
    constraint = constraintOf(given$constraint, kind), extra = extraLines(given$extra, engine$prefix),
    setup = shellLines(given$setup), array = given$array,
    max_array = if (!is.null(given$max_array)) {
      wholeCount(given$max_array, "max_array", "a number of elements of an array", 1, 1e6)
    },
    name = jobName(given$name), dir = jobDirectory(given$dir, !isUnset(given$login)),
    rscript = if (!isUnset(given$rscript)) texts(given$rscript, "rscript", 1L),
    rlibs = if (!isUnset(given$rlibs)) texts(given$rlibs, "rlibs"),
    address = if (!isUnset(given$address)) addressNames(given$address), port = portRange(given$port),
    login = if (!isUnset(given$login)) loginHost(given$login), values = values
  )
  if (length(launcher$rscript)) refuseControls(launcher$rscript, "rscript")
  for (path in launcher$rlibs) refuseControls(path, "rlibs")
  if (launcher$nodes * launcher$cores > maxWorkers) {
    badArgument(if (is.null(adaptive)) "nodes" else "max", "times `cores` must be at most ",
                format(maxWorkers, scientific = FALSE), " workers")
  }
  if (isTRUE(launcher$gpus == 0L)) launcher["gpus"] <- list(NULL)
  if (!is.null(given$array) && !isTRUE(given$array) && !isFALSE(given$array)) {
    badArgument("array", "must be TRUE or FALSE")
  }
  if (kind == "gridEngine") launcher$pe <- engineName(given$pe, "pe")
  if (kind == "pbs") launcher$dialect <- dialectOf(given$dialect)
  if (kind == "template") launcher[c("submit", "cancel", "status", "pattern")] <- list(
    engineCommand(given$submit, "submit", "file"), engineCommand(given$cancel, "cancel", "jobs"),
    if (!is.null(given$status)) engineCommand(given$status, "status", "jobs"),
    if (!is.null(given$pattern)) regularExpression(given$pattern)
  )
  named <- names(values)
  if (length(values) && (is.null(named) || !all(nzchar(named)))) {
    badArgument("...", "all further arguments must be named")
  }
  launcher$lines <- launcherTemplate(launcher, given$template)
  launcher <- structure(launcher, class = c(paste0("rustcluster_", kind), "rustcluster_batch", "rustcluster_launcher"))
  # A key without a value is an error now, and not when a job is submitted.
  jobScripts(if (is.null(adaptive)) launcher else singleJob(launcher), "id")
  launcher
}

# Returns the lines of the template of a launcher, whose keys are checked. A further argument must be a key of it.
launcherTemplate <- function(launcher, template) {
  further <- names(launcher$values)
  for (name in further) {
    value <- plain(launcher$values[[name]])
    ok <- is.atomic(value) && length(value) == 1L && !is.na(value) && isText(as.character(value)) &&
      !grepl("[\n\r]", value)
    if (!ok) badArgument(name, "must be one value on one line, for a key of the template")
  }
  known <- union(templateValueNames, further)
  if (is.null(template)) {
    name <- engines[[launcher$kind]]$template
    if (identical(launcher$dialect, "torque")) name <- "torque"
    lines <- builtInTemplate(name)
  } else {
    lines <- templateLines(template)
    checkTemplate(lines, known)
  }
  unknown <- setdiff(further, templateKeys(lines))
  if (length(unknown)) unknownArguments(launcher$kind, unknown)
  lines
}

unknownArguments <- function(kind, unknown) {
  arguments <- names(formals(get(if (kind == "template") "jobTemplate" else kind)))
  abort(
    "bad_argument", "unknown argument", if (length(unknown) > 1L) "s", " ",
    paste0("`", unknown, "`", collapse = ", "), didYouMean(unknown, setdiff(arguments, "..."), argumentsOfEngines),
    fields = list(argument = unknown)
  )
}

dialectOf <- function(value) {
  tryCatch(match.arg(value, c("openpbs", "torque")), error = function(e) {
    badArgument("dialect", "must be \"openpbs\" or \"torque\"")
  })
}

# What other packages and the engines call the arguments of launchers.
argumentsOfEngines <- c(
  walltime = "time", mem = "memory", ncore = "cores", ncores = "cores", cpus = "cores", workers = "cores",
  n = "nodes", hosts = "nodes", project = "account", host = "address", ports = "port", modules = "setup",
  options = "extra"
)

wholeCount <- function(value, argument, what, min, max) {
  if (!is.numeric(value) || length(value) != 1L || !isTRUE(value >= min) || !isTRUE(value == round(value))) {
    badArgument(argument, "must be ", what, ", a whole number of at least ", min)
  }
  if (value > max) badArgument(argument, "must be at most ", shownNumber(max))
  as.integer(value)
}

gpuCount <- function(value) {
  if (isUnset(value)) return(NULL)
  if (is.character(value)) {
    badArgument("gpus", "must be a number of GPUs of each node; a type of GPU goes into `extra`, as a directive of ",
                "the engine")
  }
  wholeCount(value, "gpus", "a number of GPUs of each node", 0, 4096)
}

refuseControls <- function(value, argument) {
  if (grepl("[[:cntrl:]]", value)) badArgument(argument, "must not contain line ends or control characters")
  value
}

# Checks a name of the engine, which goes into a directive: no shell and no engine reads anything else into it.
engineName <- function(value, argument) {
  if (isUnset(value)) return(NULL)
  value <- texts(value, argument, 1L)
  if (!grepl("^[A-Za-z0-9_@%+./][A-Za-z0-9_.,:@%+/=-]*$", value)) {
    badArgument(argument, "must be a name of letters, digits and _.,:@%+/=-; other directives go into `extra`")
  }
  value
}

jobName <- function(value) {
  value <- texts(value, "name", 1L)
  if (!grepl("^[A-Za-z][A-Za-z0-9_.-]{0,99}$", value)) {
    badArgument("name", "must begin with a letter and contain only letters, digits, _, . and - (at most 100)")
  }
  value
}

# The path goes into directives, in which some engines know no quotes and others expand some characters.
jobDirectory <- function(value, there) {
  given <- texts(value, "dir", 1L)
  value <- path.expand(given)
  if (!startsWith(value, "/")) value <- file.path(getwd(), value)
  value <- sub("(.)/+$", "\\1", value)
  if (!grepl("^/[A-Za-z0-9_./+@=,-]*[A-Za-z0-9_+@=,-]$", value) || grepl("(^|/)[.][.]?(/|$)", value)) {
    badArgument("dir", "must be a directory whose path has only letters, digits and _./+@=,-, without . and .. (",
                sQuote(value), "); choose another on a file system that the nodes share")
  }
  # The home directory of the login node is known once it is reached.
  if (there && startsWith(given, "~/")) sub("/+$", "", given) else value
}

constraintOf <- function(value, kind) {
  if (isUnset(value)) return(NULL)
  value <- refuseControls(texts(value, "constraint", 1L), "constraint")
  # A submit description of HTCondor has no quotes around the expression.
  wrong <- if (kind != "htcondor") "[\"'`$\\\\]" else "[`$\\\\]"
  if (grepl(wrong, value)) badArgument("constraint", "must not contain quotes, backslashes or $; use `extra`")
  value
}

extraLines <- function(value, prefix) {
  if (is.null(value)) return(NULL)
  lines <- unlist(strsplit(texts(value, "extra"), "\r?\n"))
  lines <- lines[nzchar(trimws(lines))]
  for (line in lines) refuseControls(line, "extra")
  if (is.null(prefix)) return(lines)
  bare <- startsWith(lines, "-")
  lines[bare] <- paste(prefix, lines[bare])
  wrong <- which(!startsWith(lines, "#"))
  if (length(wrong)) {
    badArgument("extra", "must contain directives, such as \"", prefix, " ...\"; ", sQuote(lines[[wrong[[1L]]]]),
                " is none. Commands of the shell go into `setup`")
  }
  lines
}

shellLines <- function(value) {
  if (is.null(value)) return(NULL)
  lines <- unlist(strsplit(texts(value, "setup"), "\r?\n"))
  if (any(grepl("[\\x01-\\x08\\x0b-\\x1f\\x7f]", lines, perl = TRUE))) {
    badArgument("setup", "must not contain control characters")
  }
  # A directive among the commands would be read by the engine.
  if (any(grepl("^#(SBATCH|PBS|BSUB|[$])", lines))) badArgument("setup", "contains directives; they go into `extra`")
  lines
}

addressNames <- function(value) vapply(texts(value, "address"), function(text) {
  text <- hostName(text, "address")
  if (grepl("[]['`\"$\\\\;&<>|(){}/,#?@]", text)) {
    badArgument("address", "contains an invalid character, ", sQuote(text))
  }
  text
}, "", USE.NAMES = FALSE)

portRange <- function(value) {
  ok <- is.numeric(value) && length(value) %in% 1:2 && !anyNA(value) && all(value == round(value)) &&
    all(value >= 0 & value <= 65535) && (length(value) == 1L || value[[1L]] >= 1 && value[[1L]] <= value[[2L]])
  if (!ok) badArgument("port", "must be 0 for any free port, a port from 1 to 65535, or a range c(from, to)")
  as.integer(c(value, value)[1:2])
}

# Checks the address of the login node. Returns it as a host of `spec`.
loginHost <- function(value) {
  if (!is.character(value)) badArgument("login", "must be one address of a login node, such as \"user@host\"")
  hostAddress(value, "login")
}

engineCommand <- function(value, argument, key) {
  value <- refuseControls(texts(value, argument, 1L), argument)
  keys <- templateKeys(value)
  wrong <- setdiff(keys, key)
  if (length(wrong)) {
    badArgument(argument, "has the unknown key `", wrong[[1L]], "`; the only key is {{ ", key, " }}")
  }
  if (!length(keys)) value <- paste0(value, " {{ ", key, " }}")
  value
}

regularExpression <- function(value) {
  value <- texts(value, "pattern", 1L)
  tryCatch(suppressWarnings(grepl(value, "")), error = function(e) {
    badArgument("pattern", "must be a regular expression")
  })
  value
}

# Returns a list of the `text` of a time limit, if it is for the engine, or its `seconds`.
timeOf <- function(value) {
  if (isUnset(value)) return(NULL)
  if (inherits(value, "difftime")) value <- as.numeric(value, units = "mins")
  if (is.numeric(value)) {
    if (length(value) != 1L || !isTRUE(value > 0) || value > 1e7) {
      badArgument("time", "must be a number of minutes above 0")
    }
    return(list(seconds = ceiling(60 * value)))
  }
  value <- refuseControls(texts(value, "time", 1L), "time")
  if (grepl("^[0-9]{1,7}$", value)) return(timeOf(as.numeric(value)))
  pattern <- "^(?:([0-9]{1,4})-)?([0-9]{1,4})(?::([0-5]?[0-9]))?(?::([0-5]?[0-9]))?$"
  parts <- regmatches(value, regexec(pattern, value, perl = TRUE))[[1L]]
  # Without days, two numbers may be hours and minutes or minutes and seconds: the engine decides.
  if (length(parts) && (nzchar(parts[[2L]]) || nzchar(parts[[5L]]))) {
    numbers <- suppressWarnings(as.numeric(parts[-1L]))
    numbers[is.na(numbers)] <- 0
    seconds <- sum(numbers * c(86400, 3600, 60, 1))
    if (seconds <= 0) badArgument("time", "must be above 0")
    return(list(seconds = seconds))
  }
  if (!grepl("^[A-Za-z0-9_.][A-Za-z0-9_.:+-]*$", value)) {
    badArgument("time", "must be a number of minutes, or text such as \"1:30:00\" or \"1-12:00:00\"")
  }
  list(text = value)
}

# Returns a list of the `text` of an amount of memory, if it is for the engine, or of its `mib`.
memoryOf <- function(value) {
  if (isUnset(value)) return(NULL)
  if (is.numeric(value)) {
    if (length(value) != 1L || !isTRUE(value >= 2^20) || value > 2^50) {
      badArgument("memory", "must be a number of bytes, at least ", shownNumber(2^20), ", or text such as \"4GB\"")
    }
    return(list(mib = format(ceiling(value / 2^20), scientific = FALSE)))
  }
  value <- refuseControls(texts(value, "memory", 1L), "memory")
  parts <- regmatches(value, regexec("^([0-9]+(?:[.][0-9]+)?) ?([KMGT])i?B?$", value, ignore.case = TRUE,
                                     perl = TRUE))[[1L]]
  if (length(parts)) {
    bytes <- as.numeric(parts[[2L]]) * 1024^match(toupper(parts[[3L]]), c("K", "M", "G", "T"))
    return(memoryOf(bytes))
  }
  if (!grepl("^[A-Za-z0-9_.][A-Za-z0-9_.,:=+-]*$", value)) {
    badArgument("memory", "must be a number of bytes, or text such as \"4GB\"")
  }
  list(text = value)
}
