# Progress: how jobs show theirs (a bar, lines, or the handlers of progressr), and what tasks report while they run.

# Returns who shows the progress of a job, by the option: "nobody", "anybody", or, without the option, "progressr" if
# its handlers would show it.
wantedProgress <- function() {
  wanted <- getOption("rustcluster.progress")
  if (is.null(wanted)) return(if (progressrListens()) "progressr" else "nobody")
  if (!isTRUE(wanted) && !isFALSE(wanted)) {
    badArgument("rustcluster.progress", "must be TRUE or FALSE; it is set by options()")
  }
  if (wanted) "anybody" else "nobody"
}

# Returns the same for an argument of this name, which has precedence over the option.
askedProgress <- function(asked, argument) {
  if (!isTRUE(asked) && !isFALSE(asked)) badArgument(argument, "must be TRUE or FALSE")
  if (asked) "anybody" else "nobody"
}

# Returns whether this code is run by progressr::with_progress(), or progressr::handlers(global = TRUE) is set.
progressrListens <- function() {
  if (!isNamespaceLoaded("progressr")) return(FALSE)
  if (length(withProgressFrames())) return(TRUE)
  # The question takes progressr long, and most sessions have no such handlers.
  length(globalCallingHandlers()) > 0L && isTRUE(progressr::handlers(global = NA))
}

# Returns the frames of progressr::with_progress() in which this code is run.
withProgressFrames <- function() {
  depths <- seq_len(sys.nframe())
  lapply(Filter(function(depth) identical(sys.function(depth), progressr::with_progress), depths), sys.frame)
}

# Returns whether with_progress() shows the steps of a progressor that has not finished. progressr has no function that
# answers this. The handlers keep it in `active`, a variable of their environments; without the variable, this is FALSE.
progressorShown <- function() {
  isShown <- function(handler) isTRUE(environment(handler)$active)
  any(unlist(lapply(withProgressFrames(), function(frame) vapply(as.list(frame$handlers), isShown, NA))))
}

# Returns a function that updates what is shown. It ends with the frame of the caller. `progress`: returns the numbers
# of finished tasks and of busy workers. `by`: "progressr" or "anybody". progressr's handlers have precedence. In a
# script that has not enabled them they show nothing, and a line is printed instead.
showProgress <- function(progress, n, what, by, envir = parent.frame()) {
  steps <- if (progressrListens()) progressrSteps(progress, n, envir)
  enabled <- isTRUE(getOption("progressr.enable", interactive()))
  if (by == "progressr" || (!is.null(steps) && enabled)) return(steps)
  own <- if (showsBars()) progressBar(progress, n, what, envir)$update else progressLines(progress, n, what)
  function() {
    if (!is.null(steps)) steps()
    own()
  }
}

# Returns whether a bar can be drawn: not in documents of knitr and in scripts, whose output is kept.
showsBars <- function() {
  interactive() && !isTRUE(getOption("knitr.in.progress")) && hasCli() && cli::is_dynamic_tty()
}

# Returns functions that update and end a bar, which ends with the frame `envir` at the latest. `n`: the number of
# tasks, or a function that returns it.
progressBar <- function(progress, n, what, envir = NULL) {
  total <- if (is.function(n)) n else function() n
  whats <- paste0(what, if (!identical(n, 1L) && !identical(n, 1)) "s")
  bar <- cli::cli_progress_bar(
    # The bar is updated once more after the last task has ended.
    total = total(), clear = FALSE, auto_terminate = FALSE, .envir = if (is.null(envir)) globalenv() else envir,
    .auto_close = !is.null(envir),
    format = paste0(
      "{cli::pb_bar} {cli::pb_current}/{cli::pb_total} ", whats, " | {cli::pb_rate} | ",
      "{cli::pb_extra$busy} busy | ETA {cli::pb_eta}"
    ),
    format_done = paste("{cli::pb_total}", whats, "in {cli::pb_elapsed} ({cli::pb_rate})"),
    extra = list(busy = 0)
  )
  update <- function() {
    at <- progress()
    cli::cli_progress_update(
      set = at[[1L]], total = total(), id = bar, extra = list(busy = at[[2L]]), .envir = environment()
    )
  }
  end <- function(result) cli::cli_progress_done(bar, .envir = environment(), result = result)
  list(update = update, end = end)
}

# Prints a line now and then: after a second, then each time that a fifth more time has passed, at least 5 seconds and
# at most 10 minutes, and at the end. `grows`: returns whether there may be more tasks than `n` says now.
progressLines <- function(progress, n, what, grows = function() FALSE) {
  total <- if (is.function(n)) n else function() n
  began <- proc.time()[["elapsed"]]
  before <- progress()[[1L]]
  shortest <- getOption("cli.progress_show_after", 1)
  due <- shortest
  ended <- FALSE
  function() {
    elapsed <- proc.time()[["elapsed"]] - began
    if (ended || elapsed < shortest) return(invisible())
    at <- progress()
    done <- at[[1L]]
    n <- total()
    whats <- paste0(what, if (n != 1) "s")
    rate <- (done - before) / max(elapsed, 0.001)
    speed <- paste0(format(signif(rate, 2L)), "/s")
    if (done >= n && !grows()) {
      ended <<- TRUE
      message(n, " ", whats, " in ", formatSeconds(elapsed), " (", speed, ")")
    } else if (elapsed >= due) {
      due <<- elapsed + min(600, max(5, elapsed / 5))
      left <- if (rate > 0) formatSeconds((n - done) / rate) else "?"
      message(done, "/", n, " ", whats, " | ", speed, " | ", at[[2L]], " busy | ETA ", left)
    }
  }
}

# Reports to progressr, unless with_progress() already shows a progressor, such as one that the tasks use: since version
# 0.18, progressr shows only the newest progressor and warns of the further steps of the older one. Global handlers show
# the older one, but warn of steps of this one after the end of the older one: this progressor makes no step once tasks
# have reported with a progressor of the session.
progressrSteps <- function(progress, n, envir) {
  if (progressorShown()) return(function() invisible())
  step <- progressr::progressor(steps = n, envir = envir)
  fromTasks$owner <- ownerOf(step(amount = 0))
  before <- fromTasks$count
  reported <- 0
  function() {
    if (fromTasks$count > before) return(invisible())
    done <- progress()[[1L]]
    if (done > reported) step(amount = done - reported)
    reported <<- max(done, reported)
  }
}

# `owner`: how progressr names this session. `count`: how many conditions of progressors of this session have been
# signaled for tasks.
fromTasks <- new.env(parent = emptyenv())
fromTasks$count <- 0

# Returns the session that has made the progressor of a condition, or NULL.
ownerOf <- function(condition) if (is.list(condition)) as.vector(unclass(condition)[["owner_session_uuid"]])

# What tasks report ----------------------------------------------------------------------------------

# Receives what tasks report from now on, and drops what tasks of earlier jobs have reported. A job wants reports if its
# tasks are chunks whose progress is shown, and if package progressr is loaded here: without it there is no progressor.
receiveReports <- function(handle) {
  handle$receivesReports <- TRUE
  handle$elements <- 0
  hub_take_progress(handle$pointer)
  invisible()
}

# Returns an answer after the reports that have arrived before it.
withReports <- function(answer, handle) {
  if (handle$receivesReports) showEvents(handle)
  answer
}

# Takes what tasks have reported. Conditions are raised by raisePending().
takeReports <- function(handle) {
  events <- hub_take_progress(handle$pointer)
  if (isFailure(events) || !length(events)) return(invisible())
  reports <- readReports(events)
  counts <- vapply(reports, inherits, NA, "rustcluster_elements")
  for (report in reports[counts]) handle$elements <- handle$elements + report$count
  addReports(handle, reports[!counts])
  invisible()
}

# Returns the conditions that tasks have reported. One that cannot be read here, because it contains what only the
# packages of the worker can read, is left out: progress is no reason for an error.
readReports <- function(events) {
  reports <- tryCatch(lapply(events, unserialize), error = function(e) {
    lapply(events, function(event) tryCatch(unserialize(event), error = function(e) NULL))
  })
  reports[vapply(reports, inherits, NA, c("condition", "rustcluster_elements"))]
}

# Adds conditions to what raisePending() raises. They wait in an environment: a task may report very many, and removing
# the first one of a list copies the list.
addReports <- function(handle, conditions) {
  if (!length(conditions)) return(invisible())
  waiting <- list2env(list(conditions = conditions, raised = 0L), parent = emptyenv())
  handle$pending <- c(handle$pending, list(waiting))
  invisible()
}

# Returns the next one of conditions that wait together, or NULL.
nextReport <- function(waiting) {
  if (waiting$raised == length(waiting$conditions)) return(NULL)
  waiting$raised <- waiting$raised + 1L
  waiting$conditions[[waiting$raised]]
}

# Signals a condition of a task, as the task has done.
signalReport <- function(condition) {
  owner <- ownerOf(condition)
  if (!is.null(owner) && identical(owner, fromTasks$owner)) fromTasks$count <- fromTasks$count + 1
  withRestarts(signalCondition(condition), muffleProgression = function(...) NULL)
}

# Returns a function that returns the progress of a job whose tasks are chunks: the numbers of finished elements and of
# busy workers. Elements of a worker that has died count although they are computed again.
elementsProgress <- function(handle, sizes, progress) {
  total <- sum(sizes)
  function() {
    at <- progress()
    open <- length(sizes) - at[[1L]]
    finished <- if (open == 0) total else floor(at[[1L]] * total / length(sizes))
    c(min(max(finished, handle$elements), total - open), at[[2L]])
  }
}

# In a worker ----------------------------------------------------------------------------------------

# Sends a progress event of the current task to the head.
report <- function(value) {
  checked(worker_report(serialize(value, NULL, xdr = FALSE)))
}

# Sends a condition of progressr to the head. Nothing that fails here is an error of the task.
reportProgression <- function(condition) {
  tryCatch(report(condition), error = function(e) NULL)
}

# Works as lapply() and reports how many elements are finished, five times a second at most. The calls of FUN are those
# of lapply(), in whose frame a FUN may look or write: the variables that lapply() does not have are hidden.
lapplyReporting <- function(X, FUN, ...) {
  FUN <- match.fun(FUN)
  if (!is.vector(X) || is.object(X)) X <- as.list(X)
  .values <- vector("list", length(X))
  .reported <- .looked <- 0L
  .pause <- 1L
  .due <- proc.time()[["elapsed"]] + 0.2
  for (i in seq_along(X)) {
    # No variable holds the value, which may be a missing argument.
    .values[i] <- list(forceAndCall(1L, FUN, X[[i]], ...))
    if (i - .looked < .pause) next
    .now <- proc.time()[["elapsed"]]
    # Looking at the clock takes longer than a short element: look after a few of them.
    .pause <- if (.now < .due - 0.1) min(2L * .pause, 16L) else 1L
    .looked <- i
    if (.now < .due) next
    reportProgression(structure(list(count = i - .reported), class = "rustcluster_elements"))
    .reported <- i
    .due <- .now + 0.2
  }
  names(.values) <- names(X)
  .values
}
