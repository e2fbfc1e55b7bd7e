# What becomes of tasks whose worker, host or time is gone, and what the user is told of losses.

# A task has ended without its worker's answer. Returns what stands for its answer, or NULL if that
# is still to come.
taskEnded <- function(failure, handle) {
  task <- failure[["task"]]
  switch(failure[["kind"]],
    timeout = failedAnswer(task, failureCondition(failure, handle), handle),
    task_failed = failedAnswer(task, taskFailed(failure, handle), handle),
    taskLost(task, failure, handle)
  )
}

taskLost <- function(task, failure, handle) {
  none <- handle$retries == 0
  loss <- failureCondition(c(failure, again = if (none) FALSE), handle)
  losses <- c(handle$losses[[task]], list(loss))
  number <- as.numeric(task)
  if (inherits(loss, "rustcluster_stopped") || none) return(giveUp(number, loss, handle))
  again <- length(losses) <= handle$retries
  if (again) {
    sent <- hub_try_again(handle$pointer, number)
    # Nobody can take it, or it is bound to what is lost: there is no use in going on.
    if (typeof(sent) == "character") {
      return(giveUp(number, failureCondition(sent, handle), handle))
    }
    checked(sent)
    # Not before: whoever is interrupted is told of the loss once more.
    handle$losses[[task]] <- losses
  } else {
    handle$losses[[task]] <- losses
    checked(hub_give_up(handle$pointer, number), handle)
  }
  # The task is safe before the warning, which may be turned into a jump. That a host is lost, or a
  # worker for good, is an event of its own.
  if (isTRUE(loss$replaced)) {
    warning(failureCondition(c(failure, again = again), handle, "warning"))
  }
  NULL
}

giveUp <- function(number, loss, handle) {
  checked(hub_forget(handle$pointer, number), handle)
  showEvents(handle, except = loss)
  stop(loss)
}

taskFailed <- function(failure, handle) {
  quarantined(as.integer(failure[["index"]]), handle$losses[[failure[["task"]]]])
}

quarantined <- function(index, losses, what = "task") {
  rustclusterCondition("task_failed", lostText(paste(what, index), losses), index = index, losses = losses)
}

# Of what is given up, after these losses.
lostText <- function(what, losses) {
  times <- if (length(losses) == 1L) "once" else paste(length(losses), "times")
  paste0(
    what, ": lost with the worker ", times, " and not tried again. The losses:\n",
    paste0("- ", vapply(losses, conditionMessage, ""), collapse = "\n")
  )
}

# A value in the place of the answer of a task that has none. parallel takes it for an error of the
# task's, and when it comes to raise that, our condition is raised: see as.character() below.
failureValue <- function(condition) {
  structure(
    conditionMessage(condition), class = c("rustcluster_failure", "snow-try-error", "try-error"),
    condition = condition
  )
}

failedAnswer <- function(task, condition, handle) {
  message <- checked(hub_message(handle$pointer, as.numeric(task)), handle)
  list(
    type = "VALUE", value = failureValue(condition), success = FALSE, time = noTime,
    tag = message$data$tag
  )
}

noTime <- structure(
  c(user.self = 0, sys.self = 0, elapsed = 0, user.child = 0, sys.child = 0), class = "proc_time"
)

# parallel's checkForRemoteErrors() raises an error with the text of the first task that failed. It is
# the one place where all results of a verb and what failed among them meet.
#' @export
as.character.rustcluster_failure <- function(x, ...) {
  frames <- sys.nframe()
  for (frame in rev(seq_len(frames))) {
    if (identical(sys.function(frame), parallels$checkForRemoteErrors)) {
      raiseTaskFailure(x, get("val", sys.frame(frame)))
    }
  }
  as.vector(unclass(x))
}

raiseTaskFailure <- function(first, values) {
  ours <- vapply(values, inherits, NA, "rustcluster_failure")
  # Others have an error of their own, which is their result.
  failed <- vapply(values, inherits, NA, "snow-try-error")
  condition <- attr(first, "condition")
  condition$failures <- lapply(values[ours], attr, "condition")
  condition$results <- values
  condition$results[ours] <- list(NULL)
  others <- sum(failed) - 1L
  condition$message <- paste0(
    condition$message,
    if (others) paste0("\n(and ", others, ngettext(others, " other", " others"), " failed)"),
    if (!all(failed)) whereResults(class(condition)[[1L]])
  )
  stop(condition)
}

whereResults <- function(class) {
  paste0(
    "\nThe results of the others are in the condition, as `results`: tryCatch(..., ", class,
    " = function(e) e$results)"
  )
}

# What workers printed, if that is wanted, and what was lost. `except`: is raised as an error by whoever
# asks.
showEvents <- function(handle, except = NULL) {
  show(hub_events(handle$pointer), handle, except)
}

show <- function(events, handle, except = NULL) {
  if (is.null(events) || is.character(events)) return(invisible())
  conditions <- list()
  for (event in events) {
    if (event[["kind"]] == "output") {
      showOutput(handle, as.integer(event[["rank"]]), event[["text"]])
    } else {
      type <- if (event[["kind"]] %in% c("host_back", "worker_back")) "message" else "warning"
      conditions <- c(conditions, list(failureCondition(event, handle, type)))
    }
  }
  # Last, because a warning may be turned into a jump.
  for (condition in conditions) {
    told <- class(condition)[[1L]] == class(except)[[1L]] && identical(condition$host, except$host) &&
      (is.null(condition$rank) || identical(condition$rank, except$rank))
    if (told) next
    if (inherits(condition, "message")) message(condition) else warning(condition)
  }
  invisible()
}

# Whole lines only; the rest waits for its end.
showOutput <- function(handle, rank, text) {
  key <- as.character(rank)
  text <- paste0(handle$partial[[key]], text)
  lines <- strsplit(text, "\n", fixed = TRUE)[[1L]]
  whole <- endsWith(text, "\n")
  handle$partial[[key]] <- if (whole) "" else utils::tail(lines, 1L)
  if (!whole) lines <- utils::head(lines, -1L)
  if (length(lines)) {
    cat(paste0("[", handle$hosts[[rank]], " ", rank, "] ", lines, "\n"), sep = "")
  }
}

