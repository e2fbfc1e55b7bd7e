# openRun(): runs as objects. Everything that is known of a run is in its directory (start-run.R), so that any session
# on any machine that sees the directory can use it.

#' Open a run
#'
#' Opens a run that [startRun()], or [clusterLapply()] with `.store`, has made: from any session, on any machine that
#' sees the directory. Printing a run shows how it goes.
#'
#' @param dir (character) The directory of the run.
#' @return An object of class `"rustcluster_run"`: a list with `dir`, the absolute path, and functions.
#'   \describe{
#'     \item{status()}{Returns a list: see section Status.}
#'     \item{results(partial = FALSE)}{Returns the results as [clusterLapply()] with `.collect = FALSE` does: an object
#'       that reads an element when it is used. `as.list()` reads all. It is an error if elements are missing or failed.
#'       With `partial = TRUE` it is not: failed elements are of class `"try-error"`, as with `.errors = "return"`, and
#'       missing ones are `NULL`.}
#'     \item{errors()}{Returns a data frame with a row for each failed element: `index`, `name` (`NA` without names),
#'       `message`, `class` (the first class of the condition). It prints the first line of each message, shortened.}
#'     \item{wait(timeout = Inf, progress)}{Waits until nobody computes the run any more. Shows its progress, by default
#'       if the session is interactive or the progress of jobs is shown: see section Progress of [verbs]. Returns the
#'       state, invisibly: `"running"` or `"starting"` after `timeout` seconds.}
#'     \item{cancel(timeout = 30)}{Ends the runner, on whatever machine it is. Results are kept, and `resume()`
#'       continues. Waits until the runner has ended, at most `timeout` seconds. Returns whether it has, invisibly. An
#'       interrupted run becomes a cancelled one. Workers that wait for the next runner (`linger`) end, too.}
#'     \item{resume(spec, packages, cluster, .wait = 10)}{Starts a runner, on this machine, for what is missing and for
#'       what has failed, also if the run is done. Failed elements of a run with `.retry_errors = FALSE` keep their
#'       errors. Does nothing if the run is being computed or has nothing left to compute. The arguments are those of
#'       [startRun()]; they replace the former ones from now on. Workers that wait for the next runner (`linger`) are
#'       used, with `packages` attached; another `spec` or `cluster` ends them. Returns whether a runner was started,
#'       invisibly.}
#'     \item{timeline()}{Returns when the workers were busy, as [clusterTimeline()] does, from the first runner on.
#'       `plot(run)` plots it. A run of [clusterLapply()] has no runner and no timeline, which is an error of class
#'       `rustcluster_run_incomplete`.}
#'     \item{log(n = 20)}{Returns the last lines of the log.}
#'   }
#'   [promises::as.promise()] works on the object: the promise is fulfilled with the results, or rejected if the run
#'   ends without all of them.
#'
#'   Functions of the object, instead of generics such as `cancel()` and `results()`, mask none of the functions with
#'   these names that other packages have (future, mirai, DESeq2 and others).
#'
#' @section Status:
#' `status()` returns a list.
#'   \describe{
#'     \item{state}{`"starting"`: the runner makes its cluster. `"running"`. `"done"`: all elements have been computed,
#'       some of which may have failed. `"failed"`: the runner has ended with an error. `"cancelled"`.
#'       `"interrupted"`: the runner was killed, or its machine died. This is seen at once: the runner holds a lock.}
#'     \item{done, failed, total}{(numeric) the numbers of elements with a value, with an error, and of all.}
#'     \item{left}{(numeric) the number of elements without a result. While a runner computes failed elements again,
#'       these count until they have a value.}
#'     \item{busy, workers}{(integer) busy workers, and workers that can be used, at `updated`.}
#'     \item{rate}{(numeric) elements a second of the current runner. `NA` if unknown.}
#'     \item{started, ended, updated}{(POSIXct) when the last runner started and ended, and when it last wrote its
#'       state: every second at first, then more rarely, up to every 30 s. `NA` if unknown.}
#'     \item{host, pid}{(character, integer) where the last runner runs or ran.}
#'     \item{attempt}{(integer) the number of runners so far.}
#'     \item{message}{(character) the error of a failed run; `NA` if there is nothing to say.}
#'   }
#'
#' @section Errors:
#' `rustcluster_run_unreadable`: the directory holds no run, or you may not read it. `rustcluster_run_incomplete`:
#' `results()` of a run with missing elements; fields `dir`, `state`, `missing` (their number).
#' `rustcluster_element_failed`: `results()` of a run with failed elements; fields as in [clusterLapply()].
#' `rustcluster_run_failed`: the runner of `resume()` could not be started. `rustcluster_run_locked`: `cancel()` of a
#' run that a call of [clusterLapply()] computes. `rustcluster_run_write_failed`: `cancel()` may not write to the
#' directory. `rustcluster_bad_argument`. A warning of class `rustcluster_run_workers_left`: `cancel()` could not end
#' workers that wait for the next runner; fields `dir`, `id` (of their cluster).
#' @seealso [startRun()], [listRuns()], [runs()]; [clusterDashboard()] and [clusterTop()] show the cluster of a run
#' @examples
#' # Not in tempdir(), which is removed when the session ends.
#' dir <- tempfile("run", dirname(tempdir()))
#' startRun(dir, 1:10, function(i) if (i == 7) stop("no") else i^2, spec = 2)
#' run <- openRun(dir)
#' run$wait()
#' run$status()$state
#' run$errors()
#' run$results(partial = TRUE)[[3]]
#' unlink(dir, recursive = TRUE)
#' @export
openRun <- function(dir) {
  if (missing(dir)) badArgument("dir", "is missing")
  dir <- checkPath(plain(dir), "dir")
  if (!isRun(path.expand(dir))) noRun(dir)
  newRun(normalizePath(dir))
}

newRun <- function(dir) {
  force(dir)
  opened <- new.env(parent = emptyenv())
  run <- list(
    dir = dir,
    status = function() runStatus(dir, opened),
    results = function(partial = FALSE) runResults(dir, opened, partial),
    errors = function() runErrors(dir, opened),
    wait = function(timeout = Inf, progress) {
      runWait(dir, opened, timeout, if (missing(progress)) wantedOfRun() else askedProgress(progress, "progress"))
    },
    cancel = function(timeout = 30) runCancel(dir, opened, timeout),
    resume = function(spec = NULL, packages = NULL, cluster = NULL, .wait = 10) {
      invisible(runResume(dir, opened, spec, packages, cluster, .wait, !missing(spec)))
    },
    timeline = function() runTimeline(dir),
    log = function(n = 20) runLog(dir, n)
  )
  structure(run, class = "rustcluster_run")
}

# Returns the store of a run as it is now, or NULL if there is none yet. `opened` keeps it open.
storeOf <- function(dir, opened) {
  repeat {
    if (!isRunOrBegins(dir)) noRun(dir, " any more")
    replaced <- isTRUE(readState(dir)$replaces)
    info <- readRunInfo(dir)
    store <- if (!is.null(info)) tryCatch(
      if (identical(opened$store$info$id, info$id)) refreshStore(opened$store) else openStore(dir, info = info),
      rustcluster_run_unreadable = identity
    )
    failed <- inherits(store, "condition")
    # What a run without any value has left is not the run that replaces it.
    if (is.null(info) || replaced && (failed || !any(storeStates(store) == 1L))) {
      opened$store <- NULL
      return(NULL)
    }
    if (!failed) break
    # The files may have been removed because the run is begun anew.
    if (identical(readRunInfo(dir)$id, info$id)) stop(store)
  }
  opened$store <- store
  store
}

# Returns whether a directory holds a run, or a call of clusterLapply() begins one.
isRunOrBegins <- function(dir) isRun(dir) || file.access(dir, 1L) == 0L && !is.null(storeLocked(dir))

# `more`: what follows "holds no run".
noRun <- function(dir, more = "") {
  closed <- closedDirectory(dir)
  if (length(closed)) {
    abort(
      "run_unreadable", sQuote(dir), " cannot be read: you have no permission",
      if (closed != dir) paste(" for", sQuote(closed)), fields = list(dir = dir)
    )
  }
  abort("run_unreadable", sQuote(dir), " holds no run", more, if (!dir.exists(dir)) ": there is no such directory",
        fields = list(dir = dir))
}

# Returns the directory in which this user may not look for the files of a run, or NULL.
closedDirectory <- function(dir) {
  path <- path.expand(dir)
  repeat {
    # A directory below one that is closed seems not to exist.
    if (dir.exists(path)) return(if (file.access(path, 1L) != 0L) if (path == path.expand(dir)) dir else path)
    if (path == dirname(path)) return(NULL)
    path <- dirname(path)
  }
}

# Returns the numbers of elements: all (`n`), with a value (`done`), and with an error (`failed`).
runCounts <- function(run, opened = new.env(parent = emptyenv())) {
  dir <- if (is.character(run)) run else run$dir
  store <- storeOf(dir, opened)
  if (!is.null(store)) return(storeCounts(store))
  state <- readState(dir)
  c(n = if (is.null(state)) NA_real_ else as.numeric(state$n), done = 0, failed = 0)
}

# The states in which nobody computes a run.
finalStates <- c("done", "failed", "cancelled", "interrupted")

# Returns the state of a run without looking at its results: a list of at least `state`, `pid` and `host`.
runnerState <- function(dir) {
  if (!isRun(dir) && !is.null(closedDirectory(dir))) noRun(dir)
  # Look at the lock first: a runner writes its final state before it loses the lock.
  locked <- isLocked(dir)
  state <- readState(dir)
  if (locked && !is.null(state)) return(state)
  writer <- storeLocked(dir)
  if (!is.null(writer)) {
    # A call of clusterLapply() in a session.
    return(list(
      # A process does not see its own lock, nor what it has written into it.
      state = "running", session = TRUE, pid = writer$pid, attempt = state$attempt,
      host = if (nzchar(writer$host) || !identical(as.integer(writer$pid), Sys.getpid())) writer$host else thisHost(),
      message = "a call of clusterLapply() computes it"
    ))
  }
  if (is.null(state)) return(list(state = "interrupted", pid = NA_integer_, host = NA_character_))
  if (!state$state %in% finalStates) {
    state$state <- if (file.exists(cancelFile(dir, state))) "cancelled" else "interrupted"
  }
  state
}

runStatus <- function(dir, opened) {
  state <- runnerState(dir)
  counts <- runCounts(dir, opened)
  of <- function(name, missing) if (is.null(state[[name]])) missing else state[[name]]
  never <- as.POSIXct(NA)
  # The runner, or the call of clusterLapply(), ended after its last result.
  complete <- isTRUE(counts[["done"]] + counts[["failed"]] >= counts[["n"]])
  if (complete && state$state == "interrupted") state$state <- "done"
  began <- of("began", never)
  until <- if (state$state == "running") Sys.time() else of("ended", never)
  seconds <- as.numeric(difftime(until, began, units = "secs"))
  # Elements that had failed before this runner may be computed again. Those that fail again are not seen as new.
  failed <- if (state$state == "running") max(0, counts[["failed"]] - of("failed", 0)) else counts[["failed"]]
  new <- counts[["done"]] + failed - of("before", 0)
  left <- counts[["n"]] - counts[["done"]] - failed
  list(
    state = state$state, done = counts[["done"]], failed = counts[["failed"]], total = counts[["n"]],
    left = as.numeric(left),
    busy = of("busy", NA_integer_), workers = of("workers", NA_integer_),
    rate = if (isTRUE(seconds > 0) && new > 0) new / seconds else NA_real_,
    started = of("started", never), ended = of("ended", never), updated = of("updated", never),
    host = of("host", NA_character_), pid = as.integer(of("pid", NA_integer_)), attempt = of("attempt", 0L),
    message = of("message", NA_character_)
  )
}

runResults <- function(dir, opened, partial) {
  partial <- plain(partial)
  if (!isTRUE(partial) && !isFALSE(partial)) badArgument("partial", "must be TRUE or FALSE")
  store <- storeOf(dir, opened)
  counts <- runCounts(dir, opened)
  missing <- counts[["n"]] - counts[["done"]] - counts[["failed"]]
  if (is.null(store) && partial) return(resultsView(emptyStore(dir, counts[["n"]])))
  if (is.null(store) || (!partial && !isTRUE(missing == 0))) {
    state <- runnerState(dir)$state
    abort(
      "run_incomplete", "the run in ", sQuote(dir), " is ", state, ": ",
      if (is.na(missing)) "its elements" else paste(missing, "of", counted(counts[["n"]], "element")),
      if (isTRUE(counts[["n"]] == 1)) " has" else " have", " no result yet",
      if (!is.null(store)) "; results(partial = TRUE) returns those that are there",
      if (state %in% setdiff(finalStates, "done") && file.exists(file.path(dir, "task.rds"))) {
        "; resume() continues the run"
      },
      fields = list(dir = dir, state = state, missing = missing)
    )
  }
  view <- resultsView(store)
  failed <- if (!partial) storeFailed(store)
  if (length(failed)) {
    first <- storeValue(store, failed[[1L]])
    lacks <- !is.null(nameNotFound(trimws(first)))
    stop(elementFailed(
      trimws(first), failed, view, parent = attr(first, "condition"),
      where = "\nerrors() lists all of them; results(partial = TRUE) returns the others",
      hint = if (lacks) list(text = "name what the workers lack in `export` or `packages` of startRun()")
    ))
  }
  view
}

# Returns the store of a run that has none yet. `n`: the number of elements; NA if it is not known.
emptyStore <- function(dir, n) {
  task <- tryCatch(readRDS(file.path(dir, "task.rds")), error = function(e) NULL, warning = function(w) NULL)
  if (!is.null(task)) n <- length(task$X)
  pendingStore(dir, if (is.na(n)) 0L else as.integer(n), names(task$X))
}

runErrors <- function(dir, opened) {
  store <- storeOf(dir, opened)
  failed <- if (is.null(store)) integer() else storeFailed(store)
  names <- if (length(failed)) names(resultsView(store))
  conditions <- lapply(failed, function(i) {
    value <- storeValue(store, i)
    condition <- attr(value, "condition")
    if (is.null(condition)) simpleError(trimws(as.character(value)[[1L]])) else condition
  })
  errors <- data.frame(
    index = as.integer(failed), name = if (is.null(names)) rep(NA_character_, length(failed)) else names[failed],
    message = vapply(conditions, messageOf, ""),
    class = vapply(conditions, function(condition) class(condition)[[1L]], ""), stringsAsFactors = FALSE
  )
  class(errors) <- c("rustcluster_run_errors", class(errors))
  errors
}

#' @export
print.rustcluster_run_errors <- function(x, ...) {
  shown <- as.data.frame(x)
  class(shown) <- "data.frame"
  if (is.character(shown$message)) {
    unnamed <- is.null(shown$name) || all(is.na(shown$name))
    names <- if (unnamed) 0L else max(nchar(printable(shown$name)), 4L, na.rm = TRUE)
    classes <- if (is.null(shown$class)) 0L else max(nchar(shown$class), 5L)
    width <- getOption("width", 80L) - names - classes - max(nchar(shown$index), 5L) - 4L
    shown$message <- oneLine(printable(shown$message), max(width, 20L))
  }
  if (is.character(shown$name)) shown$name <- if (!all(is.na(shown$name))) printable(shown$name)
  if (nrow(shown)) print(shown, row.names = FALSE) else cat("no errors\n")
  invisible(x)
}

# Returns the message of a condition, which code of users may have made.
messageOf <- function(condition) {
  text <- tryCatch(paste(conditionMessage(condition), collapse = "\n"), error = function(e) "")
  if (nzchar(text)) text else class(condition)[[1L]]
}

# Returns who shows the progress of a run unless the caller says otherwise.
wantedOfRun <- function() {
  if (interactive() && is.null(getOption("rustcluster.progress"))) "anybody" else wantedProgress()
}

runWait <- function(dir, opened, timeout, progress) {
  timeout <- plain(timeout)
  between(timeout, "timeout", "a number of seconds", 0, 1e9, infinite = TRUE)
  shows <- progress != "nobody"
  status <- runStatus(dir, opened)
  deadline <- proc.time()[["elapsed"]] + timeout
  finished <- function() c(status$done + status$failed, c(status$busy[!is.na(status$busy)], 0)[[1L]])
  shown <- NULL
  pause <- 0.05
  while (!status$state %in% finalStates) {
    left <- deadline - proc.time()[["elapsed"]]
    if (left <= 0) break
    Sys.sleep(min(pause, left))
    # A short run is seen to end at once, and a long one costs little.
    pause <- min(pause * 1.2, 1)
    status <- if (shows) runStatus(dir, opened) else runnerState(dir)
    # A run that has just been started does not know yet what it has to compute.
    if (shows && is.null(shown) && isTRUE(status$total > 0)) {
      shown <- showProgress(finished, status$total, "element", progress)
    }
    if (!is.null(shown)) shown()
  }
  invisible(runStatus(dir, opened)$state)
}

runCancel <- function(dir, opened, timeout) {
  timeout <- plain(timeout)
  between(timeout, "timeout", "a number of seconds", 0, 1e6, infinite = TRUE)
  status <- runStatus(dir, opened)
  if (status$state %in% c("done", "failed", "cancelled")) {
    endLingering(dir)
    return(invisible(TRUE))
  }
  if (status$state == "running" && !isLocked(dir)) {
    abort(
      "run_locked", "a call of clusterLapply() computes the run", whereText(status), "; interrupt it there",
      fields = list(pid = status$pid, host = status$host, dir = dir)
    )
  }
  cancel <- cancelFile(dir, readState(dir))
  asked <- dir.exists(runnerFile(dir, "")) && suppressWarnings(file.create(cancel))
  if (status$state == "interrupted") {
    if (!asked) {
      abort("run_write_failed", "cannot write ", sQuote(cancel), fields = list(dir = dir))
    }
    endLingering(dir)
    return(invisible(TRUE))
  }
  signalled <- !asked && isRunnerHere(status, dir) && tools::pskill(status$pid, tools::SIGINT)
  if (!asked && !signalled && isLocked(dir)) {
    abort(
      "run_write_failed", "the runner of ", sQuote(dir), runPlace(status), " cannot be told to end: ",
      if (file.access(dirname(cancel), 2L) != 0L) "you have no permission to write to " else "cannot write to ",
      sQuote(dirname(cancel)), fields = list(dir = dir)
    )
  }
  began <- proc.time()[["elapsed"]]
  repeat {
    state <- runnerState(dir)
    if (state$state %in% finalStates && !isLocked(dir)) {
      # The runner may have been killed.
      endLingering(dir)
      return(invisible(TRUE))
    }
    elapsed <- proc.time()[["elapsed"]] - began
    if (elapsed >= timeout) return(invisible(FALSE))
    # The runner may be in code that looks at no file.
    if (!signalled && elapsed > 5 && isRunnerHere(state, dir)) {
      signalled <- tools::pskill(state$pid, tools::SIGINT)
    }
    Sys.sleep(0.05)
  }
}

# Ends the workers that the last runner has left to the next one.
endLingering <- function(dir) {
  id <- readState(dir)$cluster
  if (is.null(id) || is.null(theRecordOf(id))) return(invisible())
  tryCatch(killCluster(id), error = function(e) {
    # Somebody has reattached it, or its time is over.
    if (inherits(e, c("rustcluster_in_use", "rustcluster_no_cluster"))) return(invisible())
    warning(rustclusterCondition(
      "run_workers_left", paste0(
        "the workers of the run in ", sQuote(dir), " wait for the next runner, and could not be ended: ",
        conditionMessage(e), ownLine(conditionMessage(e)), "killCluster(\"", id, "\") ends them"
      ), type = "warning", dir = dir, id = id
    ))
  })
}

# Returns whether a runner is a process of this machine. Containers may have the same name and other processes.
isRunnerHere <- function(state, dir) {
  if (!identical(state$host, thisHost()) || is.na(state$pid)) return(FALSE)
  file <- sprintf("/proc/%d/cmdline", as.integer(state$pid))
  command <- tryCatch(readBin(file, "raw", 65536L), error = function(e) raw(), warning = function(w) raw())
  command[command == as.raw(0L)] <- as.raw(10L)
  dir %in% strsplit(rawToChar(command), "\n", fixed = TRUE)[[1L]]
}

runResume <- function(dir, opened, spec, packages, cluster, wait, has_spec) {
  wait <- plain(wait)
  between(wait, ".wait", "a number of seconds", 0, 1e6)
  checked <- runnerSettings(spec, packages, if (is.null(cluster)) list() else cluster)
  if (!isRunOrBegins(dir)) noRun(dir, " any more")
  if (!file.exists(file.path(dir, "task.rds"))) {
    abort(
      "run_failed", sQuote(dir), " does not say how to compute its elements: it was made by ",
      "clusterLapply(.store = ); call that again, with the same X and FUN, to continue",
      fields = list(dir = dir)
    )
  }
  status <- runStatus(dir, opened)
  if (!status$state %in% finalStates) return(FALSE)
  if (status$state == "done" && (!status$failed || !retriesErrors(dir))) return(FALSE)
  settings <- tryCatch(readRDS(runnerFile(dir, "settings.rds")), error = function(e) NULL, warning = function(w) NULL)
  # A crash of the machine at the start of the run has left none.
  if (is.null(settings)) settings <- runnerSettings(NULL, NULL, list())
  if (has_spec) settings["spec"] <- list(spec)
  if (!is.null(packages)) settings$packages <- checked$packages
  if (!is.null(cluster)) settings$cluster <- checked$cluster
  awaitUnlocked(dir)
  # Another session may have started a runner in the meantime.
  if (!startRunner(dir, settings, status$total)) return(FALSE)
  awaitRunner(newRun(dir), wait)
  TRUE
}

# Returns whether elements that have failed are computed again by a resumed run.
retriesErrors <- function(dir) !isFALSE(readRDS(file.path(dir, "task.rds"))$options$.retry_errors)

# Waits for a runner that has said its last word to end.
awaitUnlocked <- function(dir) {
  deadline <- proc.time()[["elapsed"]] + 30
  while (isLocked(dir) && readState(dir)$state %in% finalStates && proc.time()[["elapsed"]] < deadline) Sys.sleep(0.02)
}

runTimeline <- function(dir) {
  timeline <- readTimeline(dir)
  if (is.null(timeline)) {
    if (!file.exists(runnerFile(dir, "state.rds"))) {
      abort(
        "run_incomplete", "the run in ", sQuote(dir), " has no timeline: only runners, which startRun() starts, save ",
        "one; clusterTimeline() returns that of the cluster of a call of clusterLapply()",
        fields = list(dir = dir, state = runnerState(dir)$state, missing = NA_real_)
      )
    }
    abort("run_incomplete", "the run in ", sQuote(dir), " has no timeline yet: its runner saves one after some seconds",
          fields = list(dir = dir, state = runnerState(dir)$state, missing = NA_real_))
  }
  # For the label of the time axis.
  attr(timeline, "since") <- "the run was started"
  timeline
}

# Returns the last lines of the log.
runLog <- function(dir, n) {
  n <- plain(n)
  between(n, "n", "a number of lines", 0, Inf)
  file <- file.path(dir, "log")
  if (!file.exists(file)) return(character())
  size <- file.size(file)
  connection <- file(file, "rb")
  on.exit(close(connection))
  # A log may be long, and its end is what is needed.
  from <- if (is.finite(n)) max(0, size - 500 * n - 1000) else 0
  seek(connection, from)
  lines <- readLines(connection, warn = FALSE, skipNul = TRUE)
  if (from > 0) lines <- lines[-1L]
  printable(utils::tail(lines, if (is.finite(n)) n else length(lines)))
}

# Printing -------------------------------------------------------------------------------------

#' @rdname openRun
#' @param x A run.
#' @param ... Not used. For `plot()`: further arguments of the plot of [clusterTimeline()].
#' @export
print.rustcluster_run <- function(x, ...) {
  cat(format(x, ...), sep = "\n")
  invisible(x)
}

#' @export
format.rustcluster_run <- function(x, ..., command = FALSE) {
  if (!isRunOrBegins(x$dir) && is.null(closedDirectory(x$dir))) return(paste0("<run ", x$dir, ": not there>"))
  status <- tryCatch(x$status(), rustcluster_error = identity)
  if (inherits(status, "condition")) return(c(paste0("<run ", x$dir, ">"), conditionMessage(status)))
  printable(c(
    paste0("<run ", x$dir, ": ", status$state, runStateText(status), ">"), elementsText(status, command),
    workText(status), endText(x, status, command)
  ))
}

# Returns where and since when a run is in its state.
runPlace <- function(status) {
  if (is.na(status$host)) return("")
  paste0(" on ", status$host, if (!is.na(status$pid)) paste0(" (pid ", status$pid, ")"))
}

runStateText <- function(status) {
  time <- function(time) format(time, "%Y-%m-%d %H:%M:%S")
  if (!status$state %in% finalStates) {
    return(paste0(runPlace(status), if (!is.na(status$started)) paste0(" since ", time(status$started))))
  }
  if (!is.na(status$ended)) paste0(" at ", time(status$ended))
}

# `command`: whether the text is for the command line (runs()).
elementsText <- function(status, command) {
  if (is.na(status$total)) return(NULL)
  paste0(
    formatCount(status$done), " of ", counted(status$total, "element"), " done",
    if (status$total > 0) sprintf(" (%.0f %%)", floor(100 * status$done / status$total)),
    if (status$failed) {
      paste0(", ", formatCount(status$failed), " failed: see ", if (command) "`errors DIR`" else "errors()")
    },
    if (status$attempt > 1L) paste0("; runner ", status$attempt)
  )
}

workText <- function(status) {
  if (status$state != "running") return(NULL)
  left <- status$left
  text <- c(
    if (!is.na(status$busy)) paste0(status$busy, " of ", counted(status$workers, "worker"), " busy"),
    if (!is.na(status$rate)) {
      c(paste(format(signif(status$rate, 3)), "elements a second"),
        if (left > 0) paste("about", formatSeconds(left / status$rate), "left"))
    }
  )
  if (length(text)) paste(text, collapse = "; ")
}

# Returns what to know and to do about a run that has not ended well.
endText <- function(run, status, command) {
  resume <- if (!command) {
    # The cluster could not be made.
    if (status$state == "failed" && !status$done) {
      "resume() tries again, and resume(spec = , packages = ) with other workers or packages"
    } else {
      "resume() continues the run"
    }
  } else {
    paste0("`resume ", if (status$state == "cancelled") "--cancelled ", "DIR` continues the run")
  }
  log <- function() sub("^\n", "", tailText("end of its log", paste(run$log(10L), collapse = "\n")))
  switch(status$state,
    failed = c(paste("error:", status$message), log(), resume),
    cancelled = resume,
    interrupted = if (status$attempt) c(
      paste0(
        "the runner", runPlace(status), " was killed, or its machine was restarted, after ",
        format(status$updated, "%Y-%m-%d %H:%M:%S")
      ),
      resume
    ) else "call clusterLapply(.store = ) again, with the same X and FUN, to continue the run"
  )
}

#' @rdname openRun
#' @export
plot.rustcluster_run <- function(x, ...) {
  plot(x$timeline(), ...)
  invisible(x)
}

# Promises -------------------------------------------------------------------------------------

#' @rdname promises
#' @exportS3Method promises::as.promise
as.promise.rustcluster_run <- function(x) {
  promiseOf(function(ended) {
    pause <- 0.1
    look <- function() {
      state <- tryCatch(x$status()$state, error = identity)
      if (inherits(state, "error")) return(ended("failed", state))
      if (!state %in% finalStates) {
        # The runner is another process, maybe on another machine, and cannot wake this session.
        pause <<- min(pause * 1.5, 2)
        return(later::later(look, pause))
      }
      result <- tryCatch(x$results(), error = identity)
      ended(if (inherits(result, "error")) "failed" else "done", result)
    }
    look()
  })
}

#' @rdname promises
#' @exportS3Method promises::is.promising
is.promising.rustcluster_run <- function(x) TRUE
