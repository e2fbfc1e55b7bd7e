# The runner: the detached process that computes a run. It is the head of a cluster of its own.

# The runner of this process. `tick`: the function that raiseInterrupt() calls while R waits; NULL in other processes.
runner <- new.env(parent = emptyenv())
runner$tick <- NULL
# The function that clusterLapply() calls when it has opened the run.
runner$opened <- NULL

# The main function. startExpression() calls it, with the directory of the run as the argument of the script.
runnerMain <- function() {
  dir <- commandArgs(trailingOnly = TRUE)[[1L]]
  problem <- detached_keep_lock()
  if (!is.null(problem)) stop(problem)
  runner$lock <- paste0("/proc/self/fd/", Sys.getenv("RUSTCLUSTER_RUN_LOCK"))
  runner$locked <- Sys.readlink(runner$lock)
  Sys.unsetenv(c("RUSTCLUSTER_RUN_LOCK", "RUSTCLUSTER_LIB"))
  options(warn = 1L, rustcluster.progress = FALSE)
  runner$dir <- dir
  runner$state <- readState(dir)
  runner$cancelled <- FALSE
  removeStale(dir)
  dir.create(askedDirectory(dir, runner$state), FALSE, mode = "0700")
  updateState(pid = Sys.getpid(), started = Sys.time())
  say("runner started: process ", Sys.getpid(), " on ", thisHost(), ", ", R.version.string, ", rustcluster ",
      packageVersionText())
  end <- tryCatch(
    computeRun(dir),
    interrupt = function(i) list(state = "cancelled"),
    error = function(e) {
      saveError(e, dir)
      list(state = "failed", message = conditionMessage(e))
    }
  )
  runner$tick <- NULL
  say(end$state, if (!is.null(end$message)) ": ", end$message)
  updateState(state = end$state, message = end$message, ended = Sys.time(), busy = 0L)
  unlink(askedDirectory(dir, runner$state), recursive = TRUE)
  quit(save = "no", status = as.integer(end$state != "done"), runLast = FALSE)
}

# Writes a line into the log.
say <- function(...) {
  cat(format(Sys.time(), "%Y-%m-%d %H:%M:%S "), printable(paste0(...)), "\n", sep = "", file = stderr())
}

# Computes what is missing of the run. Returns the final state and its message.
computeRun <- function(dir) {
  settings <- readRDS(runnerFile(dir, "settings.rds"))
  task <- readRDS(file.path(dir, "task.rds"))
  options(settings$options)
  options(rustcluster.progress = FALSE)
  list2env(task$export, globalenv())
  startTicking()
  cl <- waitingCluster(runner$state$cluster)
  why <- if (is.null(cl)) {
    NULL
  } else if (isTRUE(runner$state$renews)) {
    "`spec` or `cluster` have changed: this cluster ends, and another one is made"
  } else if (!length(leftNodes(cl))) {
    "none of its workers is left: another cluster is made"
  }
  if (!is.null(why)) {
    say(why)
    endWaitingCluster(cl, dir, task$options$.save_dir)
    cl <- NULL
  }
  # After the workers of the last runner, which may write there.
  if (isTRUE(runner$state$replaces)) {
    removeOldRun(dir)
    updateState(replaces = FALSE)
  }
  waited <- !is.null(cl)
  if (!waited) {
    updateState(cluster = NULL, renews = FALSE)
    cl <- clusterOfRun(settings)
  }
  on.exit({
    # The tasks of a run that is cancelled are cancelled by this.
    runner$tick <- NULL
    tryCatch(saveTimeline(), error = function(e) say("the timeline could not be saved: ", conditionMessage(e)))
    runner$cluster <- NULL
    parallel::stopCluster(whole)
    runner$state$cluster <- NULL
  })
  whole <- cl
  if (waited) {
    cl <- leftNodes(whole)
    lost <- length(whole) - length(cl)
    if (lost) say(counted(lost, "worker"), " of it ", ngettext(lost, "is", "are"), " lost; the others go on")
    if (length(settings$packages)) {
      failed <- unlist(parallel::clusterCall(cl, attachPackages, settings$packages))
      if (length(failed)) abort("start_failed", failed[[1L]])
    }
  }
  runner$cluster <- cl
  runner$timeline <- readTimeline(dir)
  say("cluster of ", counted(length(cl), "worker"))
  if (length(task$export)) parallel::clusterExport(cl, names(task$export), globalenv())
  retries <- task$options$.retry_errors
  # The elements that a shorter or other `X` shares with the run are known when the call has opened it.
  runner$opened <- function(store) {
    runner$opened <- NULL
    counts <- storeCounts(store)
    todo <- length(store$todo)
    before <- counts[["n"]] - todo
    say("computing ", counted(todo, "element"), if (before) paste0(", ", before, " are there already"))
    updateState(
      state = "running", n = counts[["n"]], workers = length(cl), before = before,
      failed = if (retries) counts[["failed"]] else 0, began = Sys.time()
    )
  }
  options <- task$options
  compute <- function(...) {
    clusterLapply(
      cl = cl, X = task$X, FUN = task$fun, ..., .progress = FALSE, .seed = options$.seed, .timeout = options$.timeout,
      .retries = options$.retries, .order = options$.order, .errors = "return", .store = dir, .collect = FALSE,
      .reuse = options$.reuse, .retry_errors = options$.retry_errors, .sync = options$.sync, .save = options$.save,
      .save_dir = options$.save_dir
    )
  }
  # clusterLapply() would make the directory again.
  runner$cancelDue <- 0
  runnerTick()
  do.call(compute, task$arguments, quote = TRUE)
  counts <- runCounts(newRun(dir))
  list(
    state = "done",
    message = if (counts[["failed"]]) paste0(counted(counts[["failed"]], "element"), " failed; see errors()")
  )
}

# Makes the cluster of a run.
clusterOfRun <- function(settings) {
  arguments <- list(packages = settings$packages, progress = FALSE)
  arguments[names(settings$cluster)] <- settings$cluster
  spec <- if (is.null(settings$spec)) usableCores() else settings$spec
  cl <- do.call(makeRustCluster, c(list(spec), arguments), quote = TRUE)
  if (isTRUE(settings$cluster$linger > 0)) updateState(cluster = clusterId(cl))
  cl
}

# Returns the cluster that the last runner has left, if it waits for its head, or NULL.
waitingCluster <- function(id) {
  if (is.null(id)) return(NULL)
  tryCatch(
    {
      cl <- reattachCluster(id)
      say("reattached the cluster ", id)
      cl
    },
    rustcluster_error = function(e) {
      say("the cluster ", id, " of the last runner cannot be used: ", conditionMessage(e))
      NULL
    }
  )
}

# Ends the cluster of the last runner. What its workers have saved is fetched first, where one of them is idle: others
# may compute for long. The files of other hosts stay there for a later call.
endWaitingCluster <- function(cl, dir, save_dir) {
  on.exit(parallel::stopCluster(cl))
  idle <- cl[clusterStatus(cl, memory = FALSE)$state == "idle"]
  if (!length(idle) || !hasStore(dir)) return(invisible())
  tryCatch(collectRun(dir, idle, save_dir), rustcluster_error = function(e) {
    say("its results could not be fetched: ", conditionMessage(e))
  })
}

# Returns whether the directory of the run is still the one whose lock this process has: it may have been removed,
# moved, or replaced by that of another run.
hasDirectory <- function() {
  # Where there is no /proc, a directory that is replaced is not seen.
  if (nzchar(runner$locked)) Sys.readlink(runner$lock) == runner$locked else file.exists(runnerFile(runner$dir, "lock"))
}

# Changes fields of the state and saves it. A disk that is full must not end the run: its results say more.
updateState <- function(...) {
  changes <- list(...)
  for (name in names(changes)) runner$state[[name]] <- changes[[name]]
  runner$state$updated <- Sys.time()
  if (!hasDirectory()) return(invisible())
  new <- runnerFile(runner$dir, "state.new")
  tryCatch(
    {
      # Not durable: after a crash of the machine there is no runner.
      saveRDS(runner$state, new, compress = FALSE)
      file.rename(new, runnerFile(runner$dir, "state.rds"))
    },
    error = function(e) say("the state could not be saved: ", conditionMessage(e)),
    warning = function(w) say("the state could not be saved: ", conditionMessage(w))
  )
  invisible()
}

# Saves the error without what may be large, such as the results of other elements.
saveError <- function(error, dir) {
  if (!hasDirectory()) return(invisible())
  error[c("results", "failures", "trace")] <- NULL
  tryCatch(saveRDS(error, runnerFile(dir, "error.rds")), error = function(e) {
    say("the error could not be saved: ", conditionMessage(e))
  })
}

# Makes raiseInterrupt() call runnerTick().
startTicking <- function() {
  now <- proc.time()[["elapsed"]]
  runner$began <- now
  runner$stateDue <- runner$timelineDue <- now + 1
  runner$cancelDue <- now
  runner$tick <- runnerTick
}

# Called whenever R has waited for a moment: sees whether the run is to be cancelled, and says how it goes.
runnerTick <- function() {
  now <- proc.time()[["elapsed"]]
  if (now < runner$cancelDue) return(invisible())
  runner$cancelDue <- now + 0.2
  # Nobody could cancel a run whose directory was removed or moved. What is left of it may be resumed there, and another
  # run may be in its place.
  gone <- !hasDirectory()
  if (gone) say("the directory of the run is gone")
  if (gone || file.exists(cancelFile(runner$dir, runner$state))) {
    runner$tick <- NULL
    # As Ctrl-C in a session: the cluster cancels its tasks.
    signalCondition(structure(class = c("interrupt", "condition"), list(message = "cancelled", call = NULL)))
  }
  cl <- runner$cluster
  if (is.null(cl)) return(invisible())
  # The state and the timeline cost a file each. They are saved more rarely the longer the run takes.
  age <- now - runner$began
  tick <- runner$tick
  runner$tick <- NULL
  on.exit(runner$tick <- tick)
  answerQuestions(cl)
  if (now >= runner$stateDue) {
    runner$stateDue <- now + min(30, max(1, age / 50))
    states <- clusterStatus(cl, memory = FALSE)$state
    updateState(busy = sum(states == "busy"), workers = sum(states %in% c("busy", "idle")))
  }
  if (now >= runner$timelineDue) {
    runner$timelineDue <- now + min(300, max(2, age / 20))
    tryCatch(saveTimeline(), error = function(e) say("the timeline could not be saved: ", conditionMessage(e)))
  }
}

# Saves the timeline of this runner after those of earlier ones.
saveTimeline <- function() {
  if (!hasDirectory()) return(invisible())
  timeline <- joinTimelines(runner$timeline, clusterTimeline(runner$cluster))
  new <- runnerFile(runner$dir, "timeline.new")
  saveRDS(timeline, new)
  file.rename(new, runnerFile(runner$dir, "timeline.rds"))
}

readTimeline <- function(dir) {
  file <- runnerFile(dir, "timeline.rds")
  # A crash of the machine may have left an incomplete file.
  if (file.exists(file)) tryCatch(readRDS(file), error = function(e) NULL)
}

# Returns one timeline of two clusters of the same run, of which the second was made later. Its seconds count from the
# start of the first. Workers with the same host and rank share a line.
joinTimelines <- function(first, second) {
  if (is.null(first)) return(second)
  later <- as.numeric(difftime(attr(second, "origin"), attr(first, "origin"), units = "secs"))
  moved <- as.data.frame(second)
  moved$start <- moved$start + later
  moved$end <- moved$end + later
  intervals <- rbind(as.data.frame(first), moved)
  workers <- unique(rbind(attr(first, "workers"), attr(second, "workers")))
  key <- match(paste(intervals$host, intervals$rank), paste(workers$host, workers$rank))
  intervals <- intervals[order(key, intervals$start), ]
  rownames(intervals) <- rownames(workers) <- NULL
  structure(
    intervals, class = c("rustcluster_timeline", "data.frame"), origin = attr(first, "origin"),
    now = attr(second, "now") + later, workers = workers
  )
}
