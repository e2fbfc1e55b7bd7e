# Tasks that ended without an answer, and what the user is told of losses. Whether a task that was lost is retried is
# decided in Rust (core/src/head/retry.rs), by the policy that it was told of beforehand.

# A task has ended without its worker's answer. Returns what stands for its answer.
taskEnded <- function(failure, handle) {
  task <- failure[["task"]]
  failure <- amongAll(failure, handle)
  switch(failure[["kind"]],
    timeout = failedAnswer(task, failureCondition(failure, handle), handle),
    task_failed = failedAnswer(task, taskFailed(failure, handle), handle),
    giveUp(task, failureCondition(failure, handle), handle)
  )
}

# Notes the losses that were dealt with: tell() warns of those that are retried. Those of a task that is not retried are
# in its error. Whoever is interrupted before that is told once more.
noteLosses <- function(handle) {
  losses <- hub_losses(handle$pointer)
  if (is.null(losses) || isFailure(losses)) return(invisible())
  retried <- Filter(function(loss) loss[["again"]], losses)
  conditions <- lapply(retried, function(loss) {
    failureCondition(withTasks(amongAll(loss, handle)), handle, "warning")
  })
  suspendInterrupts({
    handle$untold <- c(handle$untold, conditions)
    hub_losses_noted(handle$pointer, length(losses))
  })
  invisible()
}

# Each cluster counts the tasks that it was sent. The failure with the task's number among all tasks of a verb
# that has sent them to nodes of several clusters.
amongAll <- function(failure, handle) {
  if (is.null(failure[["index"]])) return(failure)
  frame <- openFrames[[handle$id]]
  cl <- if (!is.null(frame)) frame[["cl"]]
  if (!is.list(cl) || typeof(cluster_ranks(cl)) == "integer") return(failure)
  tag <- checked(hub_message(handle$pointer, failure[["task"]], FALSE), handle)$data$tag
  if (is.null(tag)) {
    # The verbs without tags give the nodes a task each, in order, until there are no more tasks.
    own <- Filter(function(part) identical(part$handle, handle), clustersAmong(cl, which(areOurs(cl))))
    if (!length(own)) return(failure)
    places <- own[[1L]]$places
    before <- failure[["index"]] - 1L
    tag <- before %/% length(places) * length(cl) + places[[before %% length(places) + 1L]]
  }
  failure$index <- tag
  failure
}

# The loss of a task is an error of the verb that it belongs to.
giveUp <- function(task, loss, handle) {
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

# Of what has failed with these losses.
lostText <- function(what, losses) {
  attempts <- if (length(losses) == 1L) "the only attempt" else paste("all", length(losses), "attempts")
  paste0(
    what, " failed: the worker died on ", attempts, ":\n",
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
  # Which may need the message, too.
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

# parallel's checkForRemoteErrors() raises an error with the text of the first task that failed. It is
# the one place where all results of a verb and what failed among them meet.
#' @export
as.character.rustcluster_failure <- function(x, ...) {
  # A value of a task may have the class, too.
  results <- if (inherits(attr(x, "condition"), "rustcluster_error")) resultsChecked()
  if (!is.null(results)) raiseTaskFailure(x, results, byChunk = !is.null(partOfChunks(sys.nframe())))
  as.vector(unclass(x))
}

# `byChunk`: whether a value is that of a chunk of elements.
raiseTaskFailure <- function(first, values, byChunk = FALSE) {
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
    if (!all(failed)) whereResults(class(condition)[[1L]], byChunk)
  )
  stop(condition)
}

whereResults <- function(class, byChunk = FALSE) {
  paste0(
    "\nThe results of the others are in the condition, as `results`", if (byChunk) ", by chunk", ": tryCatch(..., ",
    class, " = function(e) e$results)"
  )
}
