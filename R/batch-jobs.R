# Submits, cancels and ends the jobs of a launcher. All commands of the engine are run by a guard (inst/guard.sh), a
# process beside this session that outlives it: R never waits for the engine in a call that cannot be interrupted, and
# no death of this session leaves an unknown job. Commands and answers are files in the directory of the jobs.

# Returns random bytes in hexadecimal.
randomText <- function(count) {
  bytes <- tryCatch({
    source <- file("/dev/urandom", "rb", raw = TRUE)
    on.exit(close(source))
    readBin(source, "raw", count)
  }, error = function(e) abort("start_failed", "no random numbers: ", conditionMessage(e)))
  paste(as.character(bytes), collapse = "")
}

# Submits the jobs of a launcher and waits until the engine has taken them. Returns an environment, a batch: its
# `directory`, `guard`, and `jobs`, a data frame with a row for each submission (`job`, an id in the engine's form;
# `tasks`, the number of its nodes; `array`, logical). `key`: the lines of the file that only agents read. `env`:
# variables of the agents; NA removes one. `arguments`: as for jobScripts(). `host`: where the engine's commands run
# (engine-host.R). A failure is an error, and leaves no job and no file.
submitJobs <- function(launcher, id, key = character(), env = character(),
                       arguments = rscriptArguments(list(methods = TRUE)), timeout = 70, host = engineHost()) {
  batch <- prepareJobs(launcher, id, env, arguments, host)
  started <- FALSE
  on.exit(if (!started) discardJobs(batch))
  startWithKey(batch, key)
  sendSubmissions(batch)
  awaitSubmissions(batch, timeout)
  started <- TRUE
  batch
}

# Makes the directory of the jobs, with their scripts but without secrets: see startWithKey().
prepareJobs <- function(launcher, id, env, arguments, host) {
  launcher$dir <- jobsDirThere(launcher, host)
  variables <- variablesLines(env)
  made <- jobScripts(launcher, id, arguments)
  batch <- new.env(parent = emptyenv())
  batch$launcher <- launcher
  batch$host <- host
  # The answers that are being read on a login node, by their names.
  batch$reading <- list()
  # The files that have yet to be written there, by their paths.
  batch$unwritten <- list()
  batch$id <- id
  batch$directory <- jobDirectoryOf(launcher, id)
  batch$files <- made$files
  batch$variables <- variables
  batch$submissions <- made$submissions
  batch$jobs <- NULL
  batch$guard <- NULL
  batch$orders <- 0L
  batch$query <- NULL
  batch$states <- NULL
  batch$queried <- -Inf
  # Seconds for which the jobs outlive this session, as the guard knows; NULL if they do not.
  batch$linger <- NULL
  if (!isThere(batch)) makeDirectory(batch)
  written <- FALSE
  on.exit(if (!written) removeJobsDir(batch))
  # The guard removes only a directory with this file.
  writeJobFile(batch, file.path(batch$directory, "jobs-of"), jobNameOf(launcher, id))
  for (path in names(made$files)) writeJobFile(batch, path, made$files[[path]], "0700")
  for (i in seq_len(nrow(made$submissions))) {
    writeJobFile(batch, file.path(batch$directory, paste0("submit-", i)), made$submissions$command[[i]])
  }
  if (isThere(batch)) writeGuardThere(batch)
  written <- TRUE
  batch
}

makeDirectory <- function(batch) {
  parent <- batch$launcher$dir
  failed <- function(path, why) {
    abort("start_failed", "the directory ", sQuote(path), " for scripts, keys and logs of jobs ", why,
          "; choose another with `dir`, on a file system that the nodes share", fields = list(host = NULL))
  }
  if (!dir.exists(parent)) dir.create(parent, showWarnings = FALSE, recursive = TRUE, mode = "0700")
  if (!dir.exists(parent)) failed(parent, "could not be created")
  # dir.create() is FALSE for a directory that exists, which may be another user's.
  if (!dir.create(batch$directory, showWarnings = FALSE, mode = "0700")) {
    failed(batch$directory, if (file.exists(batch$directory)) "already exists" else "could not be created")
  }
  Sys.chmod(batch$directory, "0700", use_umask = FALSE)
}

# Writes a file that only this user can read, from its first byte on.
writePrivate <- function(path, lines, mode = "0600") {
  mask <- Sys.umask("0077")
  on.exit(Sys.umask(mask))
  tryCatch({
    connection <- file(path, "wb")
    tryCatch(writeLines(enc2utf8(lines), connection, useBytes = TRUE), finally = close(connection))
    Sys.chmod(path, mode, use_umask = FALSE)
  }, error = function(e) cannotWrite(path, e), warning = function(w) cannotWrite(path, w))
}

cannotWrite <- function(path, condition) {
  abort("start_failed", "could not write ", sQuote(path), ": ", conditionMessage(condition),
        fields = list(host = NULL))
}

# Writes the file with the key, which agents find by RUSTCLUSTER_DIAL. The file is complete when it appears.
writeKey <- function(batch, lines) {
  path <- keyFileOf(batch$launcher, batch$id)
  if (isThere(batch)) return(writeJobFile(batch, path, lines))
  temporary <- paste0(path, ".tmp")
  writePrivate(temporary, lines)
  if (!file.rename(temporary, path)) cannotWrite(path, simpleCondition("it could not be renamed"))
}

# Starts the first guard of the jobs, and writes the key and the variables of the user, which are secrets: if this
# session is killed, the guard removes them. On a login node, the session of the guard writes all files.
startWithKey <- function(batch, key) {
  if (!isThere(batch)) startGuard(batch)
  writeJobFile(batch, variablesFileOf(batch$launcher, batch$id), batch$variables)
  writeKey(batch, key)
  if (isThere(batch)) startGuard(batch)
}

startGuard <- function(batch) {
  if (isThere(batch)) startGuardThere(batch) else batch$guard <- checked(guard_start(guardArguments(batch)))
}

# Returns the command of the guard.
guardArguments <- function(batch) {
  launcher <- batch$launcher
  ids <- function(command) if (is.null(command)) "" else gsub(keyPattern, "\"$@\"", command, perl = TRUE)
  script <- if (isThere(batch)) {
    file.path(batch$directory, "guard.sh")
  } else {
    system.file("guard.sh", package = "rustcluster")
  }
  c(
    "sh", script, batch$directory, launcher$kind,
    jobNameOf(launcher, batch$id), c(launcher$pattern, "")[[1L]], ids(launcher$cancel), ids(launcher$status)
  )
}

# Sends an order to the guard, and starts another guard if it was killed. Returns whether the order was sent.
tellGuard <- function(batch, ...) {
  text <- paste(...)
  if (is.null(batch$guard)) return(FALSE)
  if (isTRUE(sendGuard(batch, text))) return(TRUE)
  # The new guard learns the ids from the files.
  if (!isTRUE(guardEnded(batch, 0)) || !jobsDirExists(batch)) return(FALSE)
  startGuard(batch)
  isTRUE(sendGuard(batch, text))
}

# Tells the guard that jobs outlive this session by so many seconds.
lingerJobs <- function(batch, seconds) {
  seconds <- ceiling(seconds)
  if (tellGuard(batch, "linger", format(seconds, scientific = FALSE))) batch$linger <- seconds
}

# The jobs end with the input of their guard again.
endLinger <- function(batch) {
  if (!is.null(batch$linger)) tellGuard(batch, "linger", 0L)
  batch$linger <- NULL
}

sendSubmissions <- function(batch) {
  if (!tellGuard(batch, "submit", 1L, nrow(batch$submissions))) {
    abort("start_failed", "the guard of the jobs could not be started", fields = list(host = NULL))
  }
}

# Returns the answer to an order, a list of `status`, `out` and `err`, or NULL if it is not there yet.
answerTo <- function(batch, name) {
  if (isThere(batch)) return(answerThere(batch, name))
  path <- file.path(batch$directory, name)
  if (!file.exists(paste0(path, ".rc"))) return(NULL)
  read <- function(extension) {
    file <- paste0(path, extension)
    if (!file.exists(file)) return(character())
    linesOf(file)
  }
  list(status = suppressWarnings(as.integer(c(read(".rc"), NA)[[1L]])), out = read(".out"), err = read(".err"))
}

linesOf <- function(file) {
  lines <- tryCatch(suppressWarnings(readLines(file, warn = FALSE, skipNul = TRUE)), error = function(e) character())
  printable(lines)
}

forgetAnswer <- function(batch, name) {
  if (isThere(batch)) return(forgetThere(batch, name))
  unlink(file.path(batch$directory, paste0(name, c(".rc", ".out", ".err", ".id"))))
}

# Waits until the engine has taken all jobs. `timeout`: seconds for each submission, which has a limit of its own.
awaitSubmissions <- function(batch, timeout) {
  count <- nrow(batch$submissions)
  jobs <- character(count)
  for (i in seq_len(count)) {
    name <- paste0("submit-", i)
    deadline <- proc.time()[["elapsed"]] + timeout
    while (is.null(answer <- answerTo(batch, name))) {
      if (isTRUE(guardEnded(batch, 0.02))) {
        # It may have answered just before.
        answer <- answerTo(batch, name)
        if (is.null(answer) && isThere(batch)) checkGuardThere(batch)
        if (is.null(answer)) submissionFailed(batch, i, NULL, "the process that runs it has ended")
        break
      }
      if (proc.time()[["elapsed"]] > deadline) {
        submissionFailed(batch, i, NULL, paste("no answer within", timeout, "s"))
      }
      raiseInterrupt()
    }
    if (!isTRUE(answer$status == 0L) && isThere(batch)) checkLinkThere(batch, "submit the jobs")
    id <- submittedId(batch, name, answer)
    why <- submissionProblem(answer, id)
    if (!is.null(why)) submissionFailed(batch, i, answer, why)
    if (id %in% jobs) submissionFailed(batch, i, answer, "its output has the same job id as before")
    jobs[[i]] <- id
  }
  batch$jobs <- data.frame(
    job = jobs, tasks = batch$submissions$tasks, array = batch$submissions$array, stringsAsFactors = FALSE
  )
}

# Returns the id in the answer to a submission, or "".
submittedId <- function(batch, name, answer) {
  id <- if (isThere(batch)) answer$id else linesOf(file.path(batch$directory, paste0(name, ".id")))
  c(id, "")[[1L]]
}

# Returns why an answer is that of a submission that has failed, or NULL.
submissionProblem <- function(answer, id) {
  if (!isTRUE(answer$status == 0L)) {
    # timeout(1) exits with 124, or 137 after SIGKILL.
    if (answer$status %in% c(124L, 137L)) "no answer within 60 s" else paste("exit status", answer$status)
  } else if (!nzchar(id)) {
    "its output contains no job id"
  }
}

submissionFailed <- function(batch, i, answer, why) {
  submission <- batch$submissions[i, ]
  output <- paste(c(answer$out, answer$err), collapse = "\n")
  script <- paste(batch$files[[submission$file]], collapse = "\n")
  kind <- batch$launcher$kind
  # The shell has not found the command.
  absent <- isTRUE(answer$status == 127L)
  abort(
    "start_failed",
    if (absent) notFoundText(submission$command, isThere(batch)),
    if (kind == "template" || absent) {
      paste0("`", submission$command, "` did not submit the jobs (")
    } else paste0(engines[[kind]]$title, " did not accept the jobs: `", submission$command, "` failed ("),
    why, ")", tailText("output of the command", output),
    "\nthe script:\n", paste0("  ", strsplit(script, "\n", fixed = TRUE)[[1L]], collapse = "\n"),
    fields = list(host = NULL, command = submission$command, output = output, script = script)
  )
}

# Returns what to do if the shell has not found a submit command. `there`: on a login node.
notFoundText <- function(command, there) {
  paste0(
    "the command `", sub("[[:space:]].*$", "", trimws(command)), "` was not found",
    if (there) {
      " on the login node: check the PATH of commands that ssh runs there\n"
    } else ": is this a machine where jobs are submitted? `login` submits them on another\n"
  )
}

# Returns the ids of single elements of arrays, as the engine's commands write them. `job`: of a submission. `task`: the
# index of the element, or NA for the whole job.
taskId <- function(kind, job, task) {
  element <- switch(kind,
    slurm = paste0(job, "_", task),
    htcondor = , gridEngine = paste0(job, ".", task),
    # A bare number, if the server's name and the brackets are missing.
    pbs = paste0(sub("^([0-9]+).*$", "\\1", job), "[", task, "]", sub("^[0-9]+(\\[\\])?", "", job), recycle0 = TRUE),
    lsf = paste0(job, "[", task, "]"),
    job
  )
  ifelse(is.na(task), job, element)
}

# Asks the engine to cancel jobs, or elements of arrays, and does not wait for it. `job`, `task`: as for taskId(). A job
# without `job` is every job of the batch. Returns whether the order was sent.
cancelJobs <- function(batch, job = batch$jobs$job, task = rep(NA_integer_, length(job))) {
  if (!length(job)) return(TRUE)
  batch$orders <- batch$orders + 1L
  ids <- taskId(batch$launcher$kind, job, task)
  # A line longer than a pipe's page may be cut.
  for (part in split(ids, (seq_along(ids) - 1L) %/% 100L)) {
    if (!tellGuard(batch, "cancel", batch$orders, paste(part, collapse = " "))) return(FALSE)
    batch$orders <- batch$orders + 1L
  }
  TRUE
}

# Ends all jobs and removes their directory. Returns whether that was done within `limit` seconds; the guard goes on
# after that.
stopJobs <- function(batch, limit = 15) {
  guard <- batch$guard
  if (is.null(guard)) return(TRUE)
  # A guard that was killed is replaced, since nothing else ends the jobs.
  if (isTRUE(guardEnded(batch, 0)) && jobsDirExists(batch)) {
    startGuard(batch)
    guard <- batch$guard
  }
  endLinger(batch)
  releaseGuard(batch)
  deadline <- proc.time()[["elapsed"]] + limit
  while (!isTRUE(guardEnded(batch, 0.1))) {
    if (proc.time()[["elapsed"]] > deadline) return(FALSE)
    raiseInterrupt()
  }
  batch$guard <- NULL
  TRUE
}

# Stops jobs whose start has failed. An interrupt leaves the rest to the guard.
discardJobs <- function(batch) {
  if (is.null(batch$guard)) removeJobsDir(batch) else stopJobs(batch)
}

# Returns which files are the logs of a job. `task`: as for jobLog().
logsOf <- function(files, job, task = NA_integer_) {
  number <- sub("^([0-9]+).*$", "\\1", job)
  logs <- grep("[.]log$", files, value = TRUE)
  parts <- regmatches(logs, gregexpr("[0-9]+", logs))
  ofJob <- vapply(parts, function(part) any(part == number), NA)
  ofTask <- vapply(parts, function(part) is.na(task) || any(part[-1L] == task), NA)
  logs[ofJob & ofTask & !startsWith(logs, "events")]
}

# Returns the end of the log of a job, or "" without one. `task`: the index in its array, or NA.
jobLog <- function(batch, job, task = NA_integer_, lines = 30L) {
  if (is.na(job)) return("")
  all <- if (isThere(batch)) filesThere(batch) else list.files(batch$directory)
  file <- logsOf(all, job, task)
  if (!length(file)) file <- intersect(c("job.log", "pbs.out"), all)
  if (!length(file)) return("")
  path <- file.path(batch$directory, file[[1L]])
  text <- if (isThere(batch)) textLines(engineReadTail(batch$host, path, 200 * lines, 20)) else linesOf(path)
  paste(utils::tail(text, lines), collapse = "\n")
}
