# The generics of parallel that a cluster lives by: with these methods all its verbs work.
#
# A verb of parallel sends its tasks and receives their answers from one frame. When that frame
# is left before all answers are in (an interrupt, an error, a lost worker), the rest must be
# cancelled, or the next verb would take old answers for its own. So the first send from a verb's
# frame opens a job and hangs its end on the frame's exit: while a job is open, its verb runs.

#' @exportS3Method parallel::sendData
sendData.RustNode <- function(node, data) {
  # Not `[[`, which looks for a method first: this is done once a task.
  handle <- .subset2(node, "handle")
  # What the task is made of may be the result of another call.
  force(data)
  frames <- sys.nframe()
  if (handle$job != noJob) closeStale(handle, frames)
  if (handle$job == noJob) {
    verb <- verbOf(frames)
    if (!is.null(verb)) {
      job <- openJob(handle, verb$depth, frames, settingOf(verb$name, data$data))
      do.call(on.exit, list(as.call(list(closeJob, handle, job)), TRUE), envir = sys.frame(verb$depth))
    }
  } else if (handle$frames != frames) {
    # A verb within a verb, as in a handler of the other's warning, would get the other's answers.
    raiseFailure(c(kind = "busy"), handle)
  }
  sendTask(handle, .subset2(node, "rank"), data)
}

sendTask <- function(handle, rank, message) {
  result <- hub_send(handle$pointer, rank, handle$job, message, handle$lasts)
  if (is.null(result)) return(invisible())
  if (typeof(result) == "character") handleFailed(result, handle)
  unwound(result)
}

# What closes a job is R code, too, and may have been interrupted.
closeStale <- function(handle, frames) {
  over <- !identical(sys.frame(min(handle$depth, frames)), openFrames[[handle$id]])
  if (over) closeJob(handle, handle$job)
}

# The frame of each cluster's open job, by the cluster's name here. Not in the handle: whoever sends a
# function that was made where there is a cluster sends the handle along, and would send the verb's
# frame with all its tasks and results.
openFrames <- new.env(parent = emptyenv())

# Stands for no job: what is sent from outside of any verb is nobody's to cancel.
noJob <- 0

# `depth`: the number of the verb's frame; `frames`: that of the method by which it sends, or 0 if it
# sends by none; `lasts`: see settingOf(). Returns the job's number. Its end is for the verb's frame to
# close it.
openJob <- function(handle, depth, frames, lasts) {
  handle$jobs <- handle$jobs + 1
  handle$frames <- frames
  handle$depth <- depth
  openFrames[[handle$id]] <- sys.frame(depth)
  handle$lasts <- lasts
  handle$job <- handle$jobs
}

# The same for a verb of ours, whose frame has this number.
beginJob <- function(handle, depth, lasts) {
  if (handle$job != noJob) closeStale(handle, sys.nframe())
  if (handle$job != noJob) raiseFailure(c(kind = "busy"), handle)
  openJob(handle, depth, 0L, lasts)
}

closeJob <- function(handle, job) {
  # First: who is interrupted before it is noted here does it once more.
  events <- hub_close_job(handle$pointer, job)
  if (handle$job == job) {
    handle$job <- noJob
    handle$lasts <- NULL
    assign(handle$id, NULL, openFrames)
  }
  if (length(handle$losses)) handle$losses <- list()
  show(events, handle)
}

# What clusterCall() does on a worker lasts, and so does what clusterExport() and clusterEvalQ(), which
# call it, and clusterSetRNGStream() do: the name of the variable that is set, or "". NULL for others.
settingOf <- function(verb, call) {
  switch(verb,
    clusterSetRNGStream = ".Random.seed",
    clusterCall = if (identical(call$fun, parallels$gets)) call$args[[1L]] else loopOf(call)
  )
}

# The functions of parallel that send tasks and receive the answers from one frame, and others that we
# need to know. Filled when the package is loaded.
parallels <- new.env(parent = emptyenv())

findParallels <- function() {
  names <- c("clusterCall", "clusterSetRNGStream", "staticClusterApply", "dynamicClusterApply",
             "checkForRemoteErrors", "defaultCluster")
  namespace <- environment(parallel::clusterCall)
  for (name in names) assign(name, get(name, namespace), parallels)
  parallels$gets <- get("gets", environment(parallel::clusterExport))
}

# The verb that sends, by the number of its frame and its name; NULL for other code: what is sent by
# that, or by hand, is received by it as it likes. Between a verb and the method are three functions of
# parallel's. To look at a function copies it, so that no more are looked at than need be.
verbOf <- function(frames) {
  if (frames < 5L) return(NULL)
  verb <- sys.function(frames - 4L)
  for (name in c("clusterCall", "staticClusterApply", "clusterSetRNGStream")) {
    if (identical(verb, parallels[[name]])) return(list(depth = frames - 4L, name = name))
  }
  # It sends from a function of its own.
  if (frames > 5L && identical(sys.function(frames - 5L), parallels$dynamicClusterApply)) {
    return(list(depth = frames - 5L, name = "dynamicClusterApply"))
  }
  NULL
}

handleFailed <- function(failure, handle) {
  if (handle$stopped) failure <- c(kind = "stopped")
  condition <- failureCondition(failure, handle)
  # What is raised is not warned of as well.
  showEvents(handle, except = condition)
  stop(condition)
}

#' @exportS3Method parallel::recvData
recvData.RustNode <- function(node) {
  handle <- .subset2(node, "handle")
  rank <- .subset2(node, "rank")
  repeat {
    result <- hub_receive(handle$pointer, rank)
    if (typeof(result) == "list") return(result)
    result <- noAnswer(result, handle)
    if (!is.null(result)) return(result)
  }
}

#' @exportS3Method parallel::recvOneData
recvOneData.RustCluster <- function(cl) {
  if (!length(cl)) badArgument("cl", "has no nodes")
  handle <- cl[[1L]][["handle"]]
  repeat {
    result <- hub_receive_any(handle$pointer, cl)
    if (typeof(result) == "list") return(result)
    answer <- noAnswer(result, handle)
    if (typeof(result) == "logical") return(answer)
    if (!is.null(answer)) return(list(node = as.integer(result[["place"]]), value = answer))
  }
}

# Rust waits in slices; in between R looks for interrupts, time limits and its front end's events,
# which is what Sys.sleep(0) does. Returns an answer if it has to be read or made here.
noAnswer <- function(result, handle) {
  if (typeof(result) == "logical") return(readAnswer(handle))
  answer <- switch(typeof(result),
    character = if ("task" %in% names(result)) taskEnded(result, handle) else handleFailed(result, handle),
    pairlist = unwound(result)
  )
  showEvents(handle)
  if (is.null(answer)) Sys.sleep(0)
  answer
}

readAnswer <- function(handle) {
  answer <- answersRead(handle, checked(hub_read(handle$pointer), handle))
  if (inherits(answer, "rustcluster_unread")) {
    value <- failedAnswer(as.character(answer$task), notRead(answer), handle)
    return(if (answer$place == 0) value else list(node = as.integer(answer$place), value = value))
  }
  if (is.null(answer$node)) return(asParallels(answer))
  answer$value <- asParallels(answer$value)
  answer
}

# An error is its text alone there. Ours come with the condition.
asParallels <- function(answer) {
  if (isFALSE(answer$success)) attr(answer$value, "condition") <- NULL
  answer
}

# Evaluates what reads answers. If one cannot be read (it is damaged, needs a package that is missing here, or
# more memory than there is), that costs its own task alone: the value is of class "rustcluster_unread".
answersRead <- function(handle, expr) {
  tryCatch(
    withCallingHandlers(expr, error = function(e) {
      reading <- hub_reading(handle$pointer)
      if (!is.double(reading)) return()
      signalCondition(structure(
        class = c("rustcluster_unread", "condition"),
        list(message = conditionMessage(e), call = NULL, task = reading[[1L]], place = reading[[2L]], parent = e)
      ))
    }),
    rustcluster_unread = identity
  )
}

notRead <- function(unread, index = NULL) {
  rustclusterCondition(
    "protocol", paste0("an answer could not be read: ", conditionMessage(unread)), parent = unread$parent,
    index = index
  )
}

#' @exportS3Method parallel::closeNode
closeNode.RustNode <- function(node) {
  stopNodes(list(node))
}

#' @exportS3Method parallel::stopCluster
stopCluster.RustCluster <- function(cl) {
  stopNodes(cl)
}

stopNodes <- function(nodes) {
  if (!length(nodes)) return(invisible())
  handle <- nodes[[1L]][["handle"]]
  if (isTRUE(handle$stopped)) return(invisible())
  ranks <- vapply(nodes, function(node) as.integer(node[["rank"]]), 0L)
  checked(hub_stop_nodes(handle$pointer, ranks))
  handle$alive <- setdiff(handle$alive, ranks)
  if (length(handle$alive)) return(invisible())
  handle$stopped <- TRUE
  # Returns when nothing is left, which the agents' own time limits bound.
  while (!checked(hub_closed(handle$pointer))) Sys.sleep(0)
  lookAtCalls(handle)
  showEvents(handle)
  invisible()
}
