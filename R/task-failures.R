# Tasks that ended without an answer, and the errors and warnings for worker failures. Rust decides whether a task is
# retried (core/src/head/retry.rs), by a policy that was set before the first task.

# Returns the value that stands for the answer of a task that has ended without one, or raises an error.
taskEnded <- function(failure, handle) {
  task <- failure[["task"]]
  failure <- amongAll(failure, handle)
  switch(failure[["kind"]],
    timeout = failedAnswer(task, failureCondition(failure, handle), handle),
    task_failed = failedAnswer(task, taskFailed(failure, handle), handle),
    failTask(task, failureCondition(failure, handle), handle)
  )
}

# Acknowledges worker failures that were handled. raisePending() warns of those after which a task is retried; the
# others are part of the error of their task. A worker failure that was not acknowledged because of an interrupt is
# reported again.
acknowledgeLosses <- function(handle) {
  losses <- hub_losses(handle$pointer)
  if (is.null(losses) || isFailure(losses)) return(invisible())
  retried <- Filter(function(loss) loss[["again"]], losses)
  conditions <- lapply(retried, function(loss) {
    failureCondition(withTasks(amongAll(loss, handle)), handle, "warning")
  })
  suspendInterrupts({
    handle$pending <- c(handle$pending, conditions)
    hub_losses_acknowledge(handle$pointer, length(losses))
  })
  invisible()
}

# Returns the failure with the index of its task among all tasks of a verb on nodes of several clusters. Each cluster
# counts only its own tasks.
amongAll <- function(failure, handle) {
  if (is.null(failure[["index"]])) return(failure)
  frame <- openFrames[[handle$id]]
  cl <- if (!is.null(frame)) frame[["cl"]]
  if (!is.list(cl) || typeof(cluster_ranks(cl)) == "integer") return(failure)
  tag <- checked(hub_message(handle$pointer, failure[["task"]], FALSE), handle)$data$tag
  if (is.null(tag)) {
    # Verbs without tags send one task to each node, in order, until no more tasks are left.
    own <- Filter(function(part) identical(part$handle, handle), clustersAmong(cl, which(areOurs(cl))))
    if (!length(own)) return(failure)
    indices <- own[[1L]]$indices
    before <- failure[["index"]] - 1L
    tag <- before %/% length(indices) * length(cl) + indices[[before %% length(indices) + 1L]]
  }
  failure$index <- tag
  failure
}

# Raises the error of a task that is not retried.
failTask <- function(task, loss, handle) {
  checked(hub_forget(handle$pointer, task), handle)
  showEvents(handle, except = loss)
  stop(loss)
}

taskFailed <- function(failure, handle) {
  losses <- lapply(failure[["losses"]], function(loss) failureCondition(amongAll(loss, handle), handle))
  quarantined(failure[["index"]], losses)
}

quarantined <- function(index, losses, what = "task") {
  rustclusterCondition("task_failed", lostText(spanText(index, what), losses), index = index, losses = losses)
}

# Returns the text for a task or call that failed because of these worker failures.
lostText <- function(what, losses) {
  attempts <- if (length(losses) == 1L) "the only attempt" else paste("all", length(losses), "attempts")
  paste0(
    what, " failed: the worker died on ", attempts, ":\n",
    paste0("- ", vapply(losses, conditionMessage, ""), collapse = "\n")
  )
}

# Returns a value that stands for the answer of a failed task. parallel treats it as an error of the task. When parallel
# raises the error, the method of as.character() below raises the condition of this package.
failureValue <- function(condition) {
  structure(
    conditionMessage(condition), class = c("rustcluster_failure", "snow-try-error", "try-error"),
    condition = condition
  )
}

failedAnswer <- function(task, condition, handle) {
  # Evaluate the condition first: it may need the message, too.
  force(condition)
  message <- checked(hub_message(handle$pointer, task, TRUE), handle)
  list(
    type = "VALUE", value = failureValue(condition), success = FALSE, time = noTime,
    tag = message$data$tag
  )
}

noTime <- structure(
  c(user.self = 0, sys.self = 0, elapsed = 0, user.child = 0, sys.child = 0), class = "proc_time"
)

# parallel's checkForRemoteErrors() converts the value of the first failed task to text and raises it as an error. It is
# the only function of parallel that has all results of a verb.
#' @export
as.character.rustcluster_failure <- function(x, ...) {
  # A user's value may have this class, too.
  results <- if (inherits(attr(x, "condition"), "rustcluster_error")) resultsChecked()
  if (!is.null(results)) raiseTaskFailure(x, results, byChunk = !is.null(partOfChunks(sys.nframe())))
  as.vector(unclass(x))
}

# `byChunk`: whether a value is that of a chunk of elements. `dir`: a directory that has the results of the others.
raiseTaskFailure <- function(first, values, byChunk = FALSE, dir = NULL) {
  if (inherits(values, "rustcluster_results")) {
    condition <- attr(first, "condition")
    condition["results"] <- list(values)
    stop(condition)
  }
  ours <- vapply(values, inherits, NA, "rustcluster_failure")
  # Other failed tasks have an error of their own, which is their result.
  failed <- vapply(values, inherits, NA, "snow-try-error")
  condition <- attr(first, "condition")
  condition$failures <- lapply(values[ours], attr, "condition")
  condition$results <- values
  condition$results[ours] <- list(NULL)
  others <- sum(failed) - 1L
  condition$message <- paste0(
    condition$message,
    if (others) paste0("\n(and ", others, ngettext(others, " other", " others"), " failed)"),
    if (!all(failed)) whereResults(class(condition)[[1L]], byChunk, dir)
  )
  stop(condition)
}

# `dir`: the directory with the results of a call of clusterLapply() with `.store`.
whereResults <- function(class, byChunk = FALSE, dir = NULL) {
  if (!is.null(dir)) {
    return(paste0("\nThe results of the others are in ", sQuote(dir), ": openRun(dir)$results(partial = TRUE)"))
  }
  paste0(
    "\nThe results of the others are in the condition, as `results`", if (byChunk) ", by chunk", ": tryCatch(..., ",
    class, " = function(e) e$results)"
  )
}
