# What becomes of tasks whose worker, host or time is gone, and what the user is told of losses.

# A task has ended without its worker's answer. Returns what stands for its answer, or NULL if that
# is still to come.
taskEnded <- function(failure, handle) {
  task <- failure[["task"]]
  failure <- amongAll(failure, handle)
  switch(failure[["kind"]],
    timeout = failedAnswer(task, failureCondition(failure, handle), handle),
    task_failed = failedAnswer(task, taskFailed(failure, handle), handle),
    taskLost(task, failure, handle)
  )
}

# Each cluster counts the tasks that it was sent. The failure with the task's number among all tasks of a verb
# that has sent them to nodes of several clusters.
amongAll <- function(failure, handle) {
  frame <- openFrames[[handle$id]]
  cl <- if (!is.null(frame)) frame[["cl"]]
  if (!is.list(cl) || typeof(cluster_ranks(cl)) == "integer") return(failure)
  tag <- checked(hub_message(handle$pointer, as.numeric(failure[["task"]]), FALSE), handle)$data$tag
  if (is.null(tag)) {
    # The verbs without tags give the nodes a task each, in order, until there are no more tasks.
    own <- Filter(function(part) identical(part$handle, handle), clustersAmong(cl, which(areOurs(cl))))
    if (!length(own)) return(failure)
    places <- own[[1L]]$places
    before <- as.integer(failure[["index"]]) - 1L
    tag <- before %/% length(places) * length(cl) + places[[before %% length(places) + 1L]]
  }
  failure[["index"]] <- tag
  failure
}

taskLost <- function(task, failure, handle) {
  retries <- if (is.null(handle$policy)) handle$retries else handle$policy$retries
  none <- if (is.null(handle$policy)) retries == 0 else handle$policy$lossEnds
  loss <- failureCondition(c(failure, again = if (none) FALSE), handle)
  losses <- c(handle$losses[[task]], list(loss))
  number <- as.numeric(task)
  if (inherits(loss, "rustcluster_stopped") || none) return(giveUp(number, loss, handle))
  again <- length(losses) <= retries
  logAttempt(failure, length(losses), again)
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
  attempts <- if (length(losses) == 1L) "its only attempt" else paste("all", length(losses), "attempts")
  paste0(
    what, " failed: its worker died on ", attempts, ":\n",
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
  message <- checked(hub_message(handle$pointer, as.numeric(task), TRUE), handle)
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
  results <- resultsChecked()
  if (!is.null(results)) raiseTaskFailure(x, results)
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
