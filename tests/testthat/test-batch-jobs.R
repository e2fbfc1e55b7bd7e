# Jobs of batch engines: submitted, queried, cancelled, and never left behind. The engines are stubs, whose jobs are
# real processes; in place of an agent each runs a script that says who it is and sleeps.

watch_processes()

internal <- function(name) get(name, asNamespace("rustcluster"))
submitJobs <- function(...) internal("submitJobs")(...)
stopJobs <- function(...) internal("stopJobs")(...)
queryJobs <- function(...) internal("queryJobs")(...)
awaitStates <- function(...) internal("awaitStates")(...)
cancelJobs <- function(...) internal("cancelJobs")(...)
jobLog <- function(...) internal("jobLog")(...)

stub_kinds <- c("slurm", "htcondor", "gridEngine", "pbs", "lsf", "template")

# Returns a launcher whose jobs sleep, and the directory for its files.
sleeping <- function(kind, stub, nodes = 3L, ...) {
  agent <- file.path(stub$home, "agent")
  writeLines(c("#!/bin/sh", "echo \"agent of $RUSTCLUSTER_JOB\"", "exec sleep 600"), agent)
  Sys.chmod(agent, "0755")
  batch_launcher(kind, stub, nodes, rscript = agent, ...)
}

running <- c(
  slurm = "RUNNING", htcondor = "RUNNING", gridEngine = "r", pbs = "R", lsf = "RUN", template = "RUNNING"
)

# Waits until the engine says that all jobs of a batch are in this state.
expect_states <- function(batch, state) {
  reached <- function() {
    states <- awaitStates(batch)$state
    !anyNA(states) && all(states == state)
  }
  wait_until(reached)
  expect_identical(unique(batch$states$state), state)
}

expect_ended <- function(stub, batch) {
  expect_identical(stub$jobs(), character())
  expect_false(file.exists(batch$directory))
  wait_until(function() !any(alive(stub$pids())))
  expect_false(any(alive(stub$pids())))
}

for (kind in stub_kinds) {
  test_that(paste("jobs of", kind, "start, are seen, and end"), {
    stub <- local_stub_engine(kind)
    batch <- submitJobs(sleeping(kind, stub), "id1")
    on.exit(stopJobs(batch), add = TRUE, after = FALSE)
    expect_match(batch$jobs$job, "^90000010")
    expect_identical(batch$jobs$tasks, 3L)
    expect_identical(length(stub$jobs()), 3L)
    expect_states(batch, running[[kind]])
    first <- if (kind == "htcondor") 0L else 1L
    expect_identical(batch$states$task, first + 0:2)
    # The job becomes the agent itself, and knows who it is.
    wait_until(function() length(stub$pids()) == 3L && all(grepl("sleep", vapply(stub$pids(), process_command, ""))))
    expect_true(all(startsWith(vapply(stub$pids(), process_command, ""), "sleep 600")))
    if (kind != "template") {
      seen <- function() jobLog(batch, batch$jobs$job, first + 1L)
      if (kind == "pbs") seen <- function() jobLog(batch, batch$jobs$job)
      wait_until(function() nzchar(seen()))
      expect_match(seen(), "^agent of 900000100.*/[0-9]")
    }
    # One element ends, and the others stay.
    if (kind != "template") {
      expect_true(cancelJobs(batch, batch$jobs$job, first + 1L))
      wait_until(function() length(stub$jobs()) == 2L)
      expect_identical(stub$jobs(), paste0("900000100_", first + c(0L, 2L)))
      awaitStates(batch)
      expect_true(internal("isFinalState")(kind, batch$states$state[[2L]]))
      expect_identical(batch$states$state[c(1L, 3L)], rep(running[[kind]], 2L))
    }
    expect_true(stopJobs(batch))
    expect_ended(stub, batch)
  })

  test_that(paste("a single job of", kind, "has no array"), {
    skip_if(kind == "template")
    stub <- local_stub_engine(kind)
    batch <- submitJobs(sleeping(kind, stub, nodes = 1L), "id1")
    on.exit(stopJobs(batch), add = TRUE, after = FALSE)
    expect_states(batch, running[[kind]])
    expect_identical(batch$states$task, if (kind == "htcondor") 0L else NA_integer_)
    expect_true(stopJobs(batch))
    expect_ended(stub, batch)
  })

  test_that(paste("a refusal of", kind, "is an error with the command, its output and the script"), {
    stub <- local_stub_engine(kind)
    stub$set("refuse", "error: invalid partition specified: nowhere")
    error <- tryCatch(submitJobs(sleeping(kind, stub), "id1"), error = identity)
    expect_s3_class(error, "rustcluster_start_failed")
    expect_match(conditionMessage(error), "invalid partition specified: nowhere", fixed = TRUE)
    expect_match(conditionMessage(error), "exit status 1", fixed = TRUE)
    expect_match(error$command, "sub|sbatch")
    expect_match(conditionMessage(error), if (kind == "htcondor") "request_cpus = 2" else "exec ", fixed = TRUE)
    expect_identical(list.files(file.path(stub$home, "shared")), character())
    expect_identical(stub$jobs(), character())
  })

  test_that(paste("a job of", kind, "that never starts has a state and a reason, and is cancelled"), {
    stub <- local_stub_engine(kind)
    stub$set("pending", "Resources")
    batch <- submitJobs(sleeping(kind, stub), "id1")
    on.exit(stopJobs(batch), add = TRUE, after = FALSE)
    waiting <- c(slurm = "PENDING", htcondor = "IDLE", gridEngine = "qw", pbs = "Q", lsf = "PEND", template = "PENDING")
    expect_states(batch, waiting[[kind]])
    if (kind != "gridEngine") {
      expect_identical(batch$states$reason, rep("Resources", 3L))
      expect_identical(internal("stateText")(batch$states$state, batch$states$reason)[[1L]],
                       paste0(waiting[[kind]], " (Resources)"))
    }
    expect_true(stopJobs(batch))
    expect_ended(stub, batch)
  })
}

test_that("only the user can read the files of the jobs, and the key is in no script", {
  stub <- local_stub_engine("slurm")
  key <- c("address localhost 1234", "key 00ff00ff", "launcher 1")
  batch <- submitJobs(sleeping("slurm", stub), "id1", key = key)
  on.exit(stopJobs(batch), add = TRUE, after = FALSE)
  path <- file.path(batch$directory, "key")
  expect_identical(readLines(path), key)
  expect_identical(format(file.mode(path)), "600")
  expect_identical(format(file.mode(batch$directory)), "700")
  others <- setdiff(list.files(batch$directory, full.names = TRUE), path)
  expect_false(any(grepl("00ff00ff", unlist(lapply(others, readLines)))))
  expect_false(any(grepl("00ff00ff", stub$log())))
  # A directory that is there may be another user's, or another cluster's.
  expect_error(submitJobs(batch$launcher, "id1"), "already exists", class = "rustcluster_start_failed")
  expect_true(dir.exists(batch$directory))
})

test_that("secrets are written when the guard is there to remove them", {
  stub <- local_stub_engine("slurm")
  start <- internal("startGuard")
  seen <- NULL
  local_function("startGuard", function(batch) {
    seen <<- list.files(batch$directory)
    start(batch)
  })
  batch <- submitJobs(sleeping("slurm", stub), "id1", key = "key 00", env = c(RC_SECRET = "top-secret"))
  expect_true("jobs-of" %in% seen)
  expect_identical(intersect(seen, c("key", "key.tmp", "variables")), character())
  expect_true(all(c("key", "variables") %in% list.files(batch$directory)))
  expect_true(stopJobs(batch))
  # A session that is killed then leaves nothing.
  file <- file.path(stub$home, "launcher.rds")
  saveRDS(batch$launcher, file)
  head <- start_child({
    write <- rustcluster:::writeKey
    namespace <- asNamespace("rustcluster")
    unlockBinding("writeKey", namespace)
    assign("writeKey", function(...) {
      write(...)
      tools::pskill(Sys.getpid(), tools::SIGKILL)
    }, namespace)
    rustcluster:::submitJobs(readRDS(file), "id2", key = "key 00")
  }, values = list(file = file))
  child_wait_end(head)
  wait_until(function() !length(list.files(file.path(stub$home, "shared"))))
  expect_identical(list.files(file.path(stub$home, "shared")), character())
})

test_that("a command that prints no id is an error, and its jobs are cancelled by name", {
  stub <- local_stub_engine("slurm")
  sbatch <- file.path(stub$home, "bin", "sbatch")
  writeLines(sub("^echo \"[$]id\"$", "echo Submitted", readLines(sbatch)), sbatch)
  error <- tryCatch(submitJobs(sleeping("slurm", stub), "id1"), error = identity)
  expect_s3_class(error, "rustcluster_start_failed")
  expect_match(conditionMessage(error), "contains no job id.*Submitted")
  expect_gt(length(stub$log()), 1L)
  expect_identical(stub$jobs(), character())
})

test_that("the id of a job is a number that stands alone", {
  stub <- local_stub_engine("template")
  outputs <- c(
    "123", "Job <123>", "123.server", "id=123", "job 123.", "/tmp/4ab/job.sh 123", "/tmp/4/5 a-6 b_7 123", "4ab 123 8"
  )
  for (output in outputs) {
    launcher <- jobTemplate(
      "{{ environment }}\nexec {{ command }}", cores = 1, dir = file.path(stub$home, "shared"),
      submit = paste0("echo \"", output, "\" #"), cancel = "true"
    )
    batch <- submitJobs(launcher, "id1")
    expect_identical(batch$jobs$job, "123", info = output)
    expect_true(stopJobs(batch))
  }
})

test_that("two submissions with the same id are an error", {
  stub <- local_stub_engine("template")
  launcher <- jobTemplate(
    "{{ environment }}\nexec {{ command }}", nodes = 2, cores = 1, dir = file.path(stub$home, "shared"),
    submit = "echo job 900000001 of", cancel = "true"
  )
  error <- tryCatch(submitJobs(launcher, "id1"), error = identity)
  expect_s3_class(error, "rustcluster_start_failed")
  expect_match(conditionMessage(error), "`echo job .*did not submit the jobs .*the same job id as before")
  expect_identical(list.files(file.path(stub$home, "shared")), character())
})

test_that("the error of a submit command that is missing says what to do", {
  stub <- local_stub_engine("template")
  launcher <- jobTemplate(
    "{{ environment }}\nexec {{ command }}", cores = 1, dir = file.path(stub$home, "shared"),
    submit = "no-such-submit {{ file }}", cancel = "true"
  )
  error <- tryCatch(submitJobs(launcher, "id1"), error = identity)
  expect_s3_class(error, "rustcluster_start_failed")
  expect_match(conditionMessage(error), "^the command `no-such-submit` was not found: is this a machine.*`login`")
  expect_match(conditionMessage(error), "exit status 127", fixed = TRUE)
  expect_identical(list.files(file.path(stub$home, "shared")), character())
})

test_that("several arrays are submitted one after the other, and each is known", {
  stub <- local_stub_engine("slurm")
  batch <- submitJobs(sleeping("slurm", stub, nodes = 5L, max_array = 2L), "id1")
  on.exit(stopJobs(batch), add = TRUE, after = FALSE)
  expect_identical(batch$jobs$job, c("900000100", "900000101", "900000102"))
  expect_identical(batch$jobs$array, c(TRUE, TRUE, FALSE))
  expect_states(batch, "RUNNING")
  expect_identical(nrow(batch$states), 5L)
  expect_true(stopJobs(batch))
  expect_ended(stub, batch)
})

test_that("a query never makes R wait, and a failed query ends no job", {
  stub <- local_stub_engine("slurm")
  batch <- submitJobs(sleeping("slurm", stub), "id1")
  on.exit(stopJobs(batch), add = TRUE, after = FALSE)
  expect_states(batch, "RUNNING")
  stub$set("no_query", "yes")
  awaitStates(batch)
  expect_identical(unique(batch$states$state), "RUNNING")
  expect_match(batch$problem, "Unable to contact the controller")
  stub$set("no_query", NULL)
  stub$set("hang", 3)
  queries <- function() sum(startsWith(stub$log(), "squeue"))
  before <- queries()
  seconds <- system.time(for (i in 1:20) queryJobs(batch, force = TRUE))[["elapsed"]]
  expect_lt(seconds, 2)
  stub$set("hang", NULL)
  # One query is under way at a time.
  wait_until(function() queries() > before)
  expect_identical(queries(), before + 1L)
  awaitStates(batch)
  expect_null(batch$problem)
  # Nor are there many in a short time.
  before <- queries()
  for (i in 1:20) queryJobs(batch)
  expect_lte(queries(), before + 1L)
})

test_that("output that is no text, or cannot be read, ends no query", {
  stub <- local_stub_engine("slurm")
  squeue <- file.path(stub$home, "bin", "squeue")
  well <- readLines(squeue)
  batch <- submitJobs(sleeping("slurm", stub, nodes = 1L), "id1")
  on.exit(stopJobs(batch), add = TRUE, after = FALSE)
  writeLines(c("#!/bin/sh", "printf '900000100|N/A|RUNNING|\\367\\211\\273\\202|n\\n'"), squeue)
  states <- awaitStates(batch)
  expect_identical(states$reason, "<f7><89><bb><82>")
  expect_null(batch$query)
  answer <- internal("answerTo")
  local({
    local_function("answerTo", function(batch, name) if (!is.null(answer(batch, name))) stop("not readable"))
    expect_identical(awaitStates(batch)$state, "RUNNING")
    expect_match(batch$problem, "not readable")
    expect_null(batch$query)
  })
  writeLines(well, squeue)
  stub$end("900000100_none", "NODE_FAIL")
  expect_states(batch, "NODE_FAIL")
  expect_null(batch$problem)
})

test_that("a job that the engine ended keeps the engine's last words", {
  stub <- local_stub_engine("slurm")
  batch <- submitJobs(sleeping("slurm", stub), "id1")
  on.exit(stopJobs(batch), add = TRUE, after = FALSE)
  expect_states(batch, "RUNNING")
  stub$end("900000100_2", "NODE_FAIL")
  awaitStates(batch)
  expect_identical(batch$states$state, c("RUNNING", "NODE_FAIL", "RUNNING"))
  # The engine forgets it after a while.
  unlink(file.path(stub$home, "jobs", "900000100_2"), recursive = TRUE)
  unlink(file.path(stub$home, "jobs", "900000100_3"), recursive = TRUE)
  awaitStates(batch)
  expect_identical(batch$states$state, c("RUNNING", "NODE_FAIL", "ENDED"))
})

test_that("cancelling is repeated until the engine confirms it", {
  for (kind in c("slurm", "template")) {
    stub <- local_stub_engine(kind)
    batch <- submitJobs(sleeping(kind, stub), "id1")
    stub$set("no_cancel", 3)
    expect_true(stopJobs(batch, limit = 60))
    expect_ended(stub, batch)
    stub$set("no_cancel", NULL)
  }
})

# ---- when the session ends ----------------------------------------------------

# Starts an R session that submits jobs, says "submitted", may fork a child that outlives it, and sleeps.
head_session <- function(stub, kind, forks = FALSE, .frame = parent.frame()) {
  file <- file.path(stub$home, "launcher.rds")
  saveRDS(sleeping(kind, stub), file)
  child <- start_child({
    batch <- rustcluster:::submitJobs(readRDS(file), "id1")
    if (forks) {
      forked <- parallel::mcparallel(Sys.sleep(600))
      say("forked", forked$pid)
    }
    say("submitted")
    Sys.sleep(600)
  }, values = list(file = file, forks = forks), .frame = .frame)
  note_pids(child$pid)
  child
}

shared <- function(stub) list.files(file.path(stub$home, "shared"))

expect_all_gone <- function(stub) {
  wait_until(function() !length(stub$jobs()) && !length(shared(stub)))
  expect_identical(stub$jobs(), character())
  expect_identical(shared(stub), character())
  wait_until(function() !any(alive(stub$pids())))
  expect_false(any(alive(stub$pids())))
}

for (kind in stub_kinds) {
  test_that(paste("no job of", kind, "is left when the session is killed"), {
    stub <- local_stub_engine(kind)
    head <- head_session(stub, kind)
    child_wait_for(head, "submitted")
    wait_until(function() length(stub$pids()) == 3L)
    expect_identical(length(stub$jobs()), 3L)
    child_signal(head, tools::SIGKILL)
    expect_all_gone(stub)
  })
}

test_that("no job is left when the session is killed while a submission is under way", {
  stub <- local_stub_engine("slurm")
  stub$set("hang", 2)
  head <- head_session(stub, "slurm")
  wait_until(function() any(startsWith(stub$log(), "sbatch")))
  expect_identical(stub$jobs(), character())
  child_signal(head, tools::SIGKILL)
  # The command goes on, the job is submitted, and is cancelled then.
  wait_until(function() any(startsWith(stub$log(), "scancel")))
  stub$set("hang", NULL)
  expect_all_gone(stub)
  expect_true(dir.exists(file.path(stub$home, "jobs", "900000100_1")))
})

test_that("an interrupt while a submission is under way leaves nothing", {
  stub <- local_stub_engine("slurm")
  stub$set("hang", 1)
  head <- head_session(stub, "slurm")
  wait_until(function() any(startsWith(stub$log(), "sbatch")))
  child_signal(head, tools::SIGINT)
  wait_until(function() any(startsWith(stub$log(), "scancel")))
  expect_all_gone(stub)
  child_wait_end(head)
  expect_null(child_said(head, "submitted"))
})

test_that("a process that was forked from the session and outlives it keeps no job alive", {
  stub <- local_stub_engine("slurm")
  head <- head_session(stub, "slurm", forks = TRUE)
  child_wait_for(head, "submitted")
  child <- note_pids(child_pids(head, "forked"))
  on.exit(tools::pskill(child, tools::SIGKILL), add = TRUE, after = FALSE)
  child_signal(head, tools::SIGKILL)
  expect_all_gone(stub)
  expect_true(alive(child))
  tools::pskill(child, tools::SIGKILL)
})

test_that("a guard that was killed is replaced when the cluster stops", {
  stub <- local_stub_engine("slurm")
  batch <- submitJobs(sleeping("slurm", stub), "id1")
  expect_states(batch, "RUNNING")
  guard <- internal("guard_pid")(batch$guard)
  tools::pskill(guard, tools::SIGKILL)
  wait_until(function() internal("guard_ended")(batch$guard, 0))
  # Queries go on, too.
  expect_identical(unique(awaitStates(batch)$state), "RUNNING")
  expect_false(internal("guard_pid")(batch$guard) == guard)
  tools::pskill(internal("guard_pid")(batch$guard), tools::SIGKILL)
  wait_until(function() internal("guard_ended")(batch$guard, 0))
  expect_true(stopJobs(batch))
  expect_ended(stub, batch)
})

test_that("jobs whose directory was removed are cancelled by their name", {
  for (kind in setdiff(stub_kinds, "template")) {
    stub <- local_stub_engine(kind)
    stub$set("pending", "Resources")
    batch <- submitJobs(sleeping(kind, stub), "id1")
    expect_length(stub$jobs(), 3L)
    unlink(batch$directory, recursive = TRUE)
    # An order whose files cannot be written leaves the guard alive.
    expect_true(internal("tellGuard")(batch, "submit", 1L, 1L))
    expect_true(internal("tellGuard")(batch, "query", 1L))
    expect_false(internal("guardEnded")(batch, 0.3))
    expect_true(stopJobs(batch))
    expect_ended(stub, batch)
  }
})

test_that("a guard removes nothing but a directory that was made for its jobs", {
  skip_on_cran()
  guard <- system.file("guard.sh", package = "rustcluster")
  home <- tempfile("odd-")
  dir.create(file.path(home, "id1"), recursive = TRUE)
  file <- file.path(home, "id1", "precious")
  writeLines("x", file)
  run <- function(dir, name = "rustcluster-id1") {
    suppressWarnings(system2("sh", c(guard, shQuote(dir), "slurm", name), stdin = "/dev/null", stdout = FALSE,
                             stderr = FALSE))
  }
  # It is not marked.
  expect_identical(run(file.path(home, "id1")), 2L)
  writeLines("rustcluster-other", file.path(home, "id1", "jobs-of"))
  expect_identical(run(file.path(home, "id1")), 2L)
  writeLines("rustcluster-id1", file.path(home, "id1", "jobs-of"))
  for (dir in c("/", "", "id1", ".", file.path(home, "id1", ""), file.path(home, "x", "..", "id1"),
                paste0(home, "/id1 "), paste0(home, "//id1"), home, "/tmp/$HOME")) {
    expect_identical(run(dir), 2L)
  }
  expect_identical(run(file.path(home, "id1"), "rustcluster-id2"), 2L)
  file.symlink(file.path(home, "id1"), file.path(home, "id3"))
  expect_identical(run(file.path(home, "id3"), "rustcluster-id3"), 2L)
  expect_true(file.exists(file))
  expect_identical(run(file.path(home, "id1")), 0L)
  expect_false(file.exists(file.path(home, "id1")))
  expect_true(file.exists(home))
})

# ---- what engines print -------------------------------------------------------

test_that("states of real engines are read", {
  parse <- function(kind, ...) internal("parseStates")(kind, c(...))
  row <- function(job, task, state, reason = NA_character_, node = NA_character_) {
    data.frame(job = job, task = as.integer(task), state = state, reason = reason, node = node)
  }
  expect_identical(parse("slurm", "12|3|PENDING|Resources|", "12|N/A|RUNNING|None|n[1-4]"),
                   rbind(row("12", 3, "PENDING", "Resources"), row("12", NA, "RUNNING", NA, "n[1-4]")))
  expect_identical(
    parse("htcondor", "14\t0\t2\tslot1@n1\tundefined\tundefined", "14\t1\t5\tundefined\tno | disk\tundefined"),
    rbind(row("14", 0, "RUNNING", NA, "n1"), row("14", 1, "HELD", "no | disk"))
  )
  expect_identical(
    parse(
      "gridEngine",
      "job-ID  prior   name       user         state submit/start at     queue                slots ja-task-ID",
      "---------------------------------------------------------------------------------------------------------",
      "      7 0.55500 rustcluste engtest      r     11/29/2026 10:00:00 all.q@n1.local           1 1",
      "      7 0.55500 rustcluste engtest      Eqw   11/29/2026 10:00:00                          1 2",
      "      8 0.00000 rustcluste engtest      qw    11/29/2026 10:00:00                          4",
      "error 7 2 can't create directory"
    ),
    rbind(row("7", 1, "r", NA, "n1.local"), row("7", 2, "Eqw", "can't create directory"), row("8", NA, "qw"))
  )
  expect_no_warning(parse(
    "gridEngine", "7 0.5 rustcluste me Eqw 11/29/2026 10:00:00 1 1", "error 7 99999999999 too large for an integer"
  ))
  expect_identical(
    parse("pbs", "Job Id: 12[3].srv", "    job_state = Q", "    comment = Not Running: Insufficient amount of",
          "\tresource", "Job Id: 13.srv", "    job_state = R", "    exec_host = n1/0*2+n2/0"),
    rbind(row("12[].srv", 3, "Q", "Not Running: Insufficient amount ofresource"), row("13.srv", NA, "R", NA, "n1"))
  )
  expect_identical(parse("pbs", "Job Id:\t2", "\tJob_Name = x", "\tjob_state = C", "\texec_host = n1/2"),
                   row("2", NA, "C", NA_character_, "n1"))
  expect_identical(parse("lsf", "12|3|PEND|-|-|New job is waiting", "12|0|EXIT|2*n1:n2|TERM_RUNLIMIT|-"),
                   rbind(row("12", 3, "PEND", "New job is waiting"), row("12", NA, "EXIT", "TERM_RUNLIMIT", "n1")))
  expect_identical(parse("template", "12_3 R", " 13[4] PD no nodes", "x14 X"),
                   rbind(row("12", 3, "R"), row("13", 4, "PD", "no nodes"), row("x14", NA, "X")))
  for (kind in stub_kinds) expect_identical(nrow(parse(kind, "", " ")), 0L)
})

test_that("the end of a job is read from HTCondor's event log", {
  stub <- local_stub_engine("htcondor")
  batch <- submitJobs(sleeping("htcondor", stub), "id1")
  on.exit(stopJobs(batch), add = TRUE, after = FALSE)
  expect_states(batch, "RUNNING")
  number <- as.integer(batch$jobs$job)
  writeLines(c(
    sprintf("000 (%d.000.000) 2026-11-29 10:00:00 Job submitted from host: <1>", number), "...",
    sprintf("005 (%d.000.000) 2026-11-29 10:00:05 Job terminated.", number),
    "\t(1) Normal termination (return value 3)", "...",
    sprintf("009 (%d.001.000) 2026-11-29 10:00:06 Job was aborted.", number), "\tvia condor_rm (by user me)", "...",
    # The engine is right if it still lists the job.
    sprintf("005 (%d.002.000) 2026-11-29 10:00:07 Job terminated.", number)
  ), file.path(batch$directory, "events.log"))
  stub$end(paste0(number, "_0"), "COMPLETED")
  stub$end(paste0(number, "_1"), "CANCELLED")
  states <- awaitStates(batch)
  expect_identical(states$state, c("COMPLETED", "REMOVED", "RUNNING"))
  expect_identical(states$reason, c("Normal termination (return value 3)", "via condor_rm (by user me)", NA))
})

test_that("variables are set for the jobs, and are in a file that the user alone can read", {
  odd <- c(RC_ODD = "it's \"q\" $HOME `x` \\n %s\n\nend-\u00e4 ", RC_EMPTY = "", RC_LATIN = "\xe4", RC_GONE = NA)
  Encoding(odd[["RC_LATIN"]]) <- "latin1"
  for (kind in c("slurm", "htcondor")) {
    stub <- local_stub_engine(kind)
    agent <- file.path(stub$home, "agent")
    writeLines(c(
      "#!/bin/sh", paste0("printf '%s|%s|%s|%s' \"$RC_ODD\" \"${RC_EMPTY-no}\" \"$RC_LATIN\" \"${RC_GONE-gone}\" > ",
                          stub$home, "/new; mv ", stub$home, "/new ", stub$home, "/said"), "exec sleep 600"
    ), agent)
    Sys.chmod(agent, "0755")
    env <- c(odd, RC_SECRET = "top-secret")
    batch <- submitJobs(batch_launcher(kind, stub, 1L, rscript = agent), "id1", key = "key 00", env = env)
    wait_until(function() file.exists(file.path(stub$home, "said")))
    said <- file.path(stub$home, "said")
    expect_identical(readChar(said, file.size(said), useBytes = TRUE) == enc2utf8(
      paste0(odd[["RC_ODD"]], "||\u00e4|gone")
    ), TRUE)
    holds <- function(path) any(grepl("top-secret", readLines(path, warn = FALSE), useBytes = TRUE))
    files <- list.files(batch$directory, full.names = TRUE)
    expect_identical(basename(files[vapply(files, holds, NA)]), "variables")
    expect_identical(format(file.mode(file.path(batch$directory, "variables"))), "600")
    expect_false(any(grepl("top-secret", stub$log())))
    expect_true(stopJobs(batch))
    expect_ended(stub, batch)
  }
  expect_error(submitJobs(batch$launcher, "id2", env = c(a.b = "x")), "a.b", class = "rustcluster_bad_argument")
  expect_false(file.exists(file.path(stub$home, "shared", "id2")))
})

test_that("no process is left", {
  expect_no_leftovers()
})

test_that("elements of arrays of PBS have ids of their own", {
  id <- rustcluster:::taskId
  expect_identical(id("pbs", c("1", "1"), 1:2), c("1[1]", "1[2]"))
  expect_identical(id("pbs", c("1[].server", "12[]", "3.server"), c(1L, 2L, NA)), c("1[1].server", "12[2]", "3.server"))
})
