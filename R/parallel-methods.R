# The generics of parallel that a cluster lives by: with these methods all its verbs work.
#
# A verb of parallel sends its tasks and receives their answers from one frame. At its first send the whole
# job is run here, and the verb returns with the results: see parallel-internals.R. What cannot be run so
# (nodes of several clusters, a verb of snow's, a version of parallel that looks different) goes on task by
# task. When the verb's frame is left before all answers are in (an interrupt, an error, a lost worker), the
# rest must be cancelled, or the next verb would take old answers for its own. So the first send from a
# verb's frame opens a job and hangs its end on the frame's exit: while a job is open, its verb runs.

#' @exportS3Method parallel::sendData
#' @exportS3Method snow::sendData
sendData.RustNode <- function(node, data) {
  # Not `[[`, which looks for a method first: this is done once a task.
  handle <- .subset2(node, "handle")
  # What the task is made of may be the result of another call. Errors of that name this function, as with PSOCK.
  serialize <- function(data, con) data
  data <- serialize(data, node$con)
  # stopNode() sends this. A node that has been stopped is stopped again without an error.
  if (typeof(data) == "list" && identical(data$type, "DONE")) return(stopNodes(list(node)))
  frames <- sys.nframe()
  if (handle$job != noJob) closeStale(handle, frames)
  if (handle$job == noJob) {
    verb <- sendingVerb(frames)
    if (!is.null(verb)) {
      # Returns from the verb if its job can be run as a whole.
      runWhole(verb, data)
      job <- openJob(handle, verb$depth, frames, settingOf(verb$name, data$data))
      do.call(on.exit, list(as.call(list(closeJob, handle, job)), TRUE), envir = sys.frame(verb$depth))
    }
  } else if (handle$frames != frames) {
    # A verb within a verb, as in a handler of the other's warning, would get the other's answers.
    raiseFailure(rustFailure("busy"), handle)
  }
  sendTask(handle, .subset2(node, "rank"), data)
}

sendTask <- function(handle, rank, message) {
  result <- hub_send(handle$pointer, rank, handle$job, message, handle$lasts)
  if (is.null(result)) return(invisible())
  if (isFromStale(result, handle)) return(sendTask(handle, rank, message))
  if (isFailure(result)) handleFailed(result, handle)
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
  continueJob(handle, handle$jobs, depth, frames, lasts)
}

# The same for a job with a number, of which something has been sent.
continueJob <- function(handle, job, depth, frames, lasts) {
  # Of a call that one of its warnings has ended: they must not end this one.
  if (length(handle$untold)) {
    untold <- handle$untold
    handle$untold <- list()
    for (condition in untold) message(conditionMessage(condition))
  }
  handle$frames <- frames
  handle$depth <- depth
  openFrames[[handle$id]] <- sys.frame(depth)
  handle$lasts <- lasts
  handle$job <- job
}

# An error if another verb is under way, for a verb of ours, which asks from the frame with this number.
refuseIfBusy <- function(handle, frames) {
  if (handle$job != noJob) closeStale(handle, frames)
  if (handle$job != noJob) raiseFailure(rustFailure("busy"), handle)
}

# A verb that may end before R has to note that it is under way is noted in Rust alone: see callAll() and runJob(). Its
# end may have been interrupted, too. Whether `result` refuses a verb for such a one, which is closed then.
isFromStale <- function(result, handle) {
  job <- if (isFailure(result)) result[["begun"]]
  if (is.null(job)) return(FALSE)
  for (depth in seq_len(sys.nframe())) {
    fun <- sys.function(depth)
    if (!identical(fun, callAll) && !identical(fun, runJob)) next
    frame <- sys.frame(depth)
    if (identical(frame$handle, handle) && identical(frame$job, job)) return(FALSE)
  }
  closeJob(handle, job)
  TRUE
}

closeJob <- function(handle, job) {
  suspendInterrupts({
    events <- hub_close_job(handle$pointer, job)
    if (handle$job == job) {
      handle$job <- noJob
      handle$lasts <- NULL
      openFrames[[handle$id]] <- NULL
    }
    if (!is.null(events)) show(events, handle)
  })
  if (length(handle$untold)) tell(handle)
}

# What clusterCall() does on a worker lasts, and so does what clusterExport() and clusterEvalQ(), which
# call it, and clusterSetRNGStream() do: the name of the variable that is set, or "". NULL for others.
settingOf <- function(verb, call) {
  switch(verb,
    clusterSetRNGStream = ".Random.seed",
    clusterCall = if (length(call$args) < 2L) "" else if (isGets(call$fun)) call$args[[1L]] else loopOf(call)
  )
}

handleFailed <- function(failure, handle) {
  if (handle$stopped) failure <- rustFailure("stopped")
  condition <- failureCondition(failure, handle)
  # What is raised is not warned of as well.
  showEvents(handle, except = condition)
  stop(condition)
}

#' @exportS3Method parallel::recvData
#' @exportS3Method snow::recvData
recvData.RustNode <- function(node) {
  handle <- .subset2(node, "handle")
  rank <- .subset2(node, "rank")
  repeat {
    raiseInterrupt()
    result <- hub_receive(handle$pointer, rank)
    if (typeof(result) == "list" && !(is.object(result) && isFailure(result))) return(result)
    result <- noAnswer(orStopped(result, handle, rank), handle)
    if (!is.null(result)) return(result)
  }
}

# Raises an interrupt that is pending. R itself does so only now and then, and an interrupt that is raised just after an
# answer was taken loses the answer.
# Also raises the error of a time limit (setTimeLimit()), without its call, Sys.sleep(0), which is not the user's.
raiseInterrupt <- function() {
  withCallingHandlers(Sys.sleep(0), error = function(e) if (isTimeLimit(e)) stop(conditionMessage(e), call. = FALSE))
}

#' @exportS3Method parallel::recvOneData
#' @exportS3Method snow::recvOneData
recvOneData.RustCluster <- function(cl) {
  if (!length(cl)) badArgument("cl", "has no nodes")
  handle <- cl[[1L]][["handle"]]
  if (is.null(handle)) return(receiveOfAny(cl))
  nextAnswer(cl, handle, hub_receive_any(handle$pointer, cl))
}

# `result`: the first that was received.
nextAnswer <- function(cl, handle, result) {
  repeat {
    failed <- is.object(result) && isFailure(result)
    if (typeof(result) == "list" && !failed) return(result)
    if (failed && result[["kind"]] == "several_clusters") return(receiveOfAny(cl))
    answer <- noAnswer(orStopped(result, handle, cluster_ranks(cl)), handle)
    if (typeof(result) == "logical") return(answer)
    if (!is.null(answer)) return(list(node = result[["place"]], value = answer))
    result <- hub_receive_any(handle$pointer, cl)
  }
}

# What was outstanding on nodes that have been stopped, as in the middle of a verb, is forgotten.
orStopped <- function(result, handle, ranks) {
  if (!isFailure(result) || result[["kind"]] != "no_task") return(result)
  gone <- setdiff(ranks, handle$alive)
  if (length(gone)) rustFailure("stopped", rank = gone[[1L]]) else result
}

# Our nodes beside others have this class alone: parallelly's c() gives it to them.
#' @rawNamespace S3method(parallel::recvOneData,cluster)
#' @rawNamespace S3method(snow::recvOneData,cluster)
recvOneData.cluster <- function(cl) {
  if (!any(areOurs(cl))) {
    class <- paste0("c('", paste(class(cl), collapse = "', '"), "')")
    if (length(class(cl)) == 1L) class <- dQuote(class(cl), FALSE)
    stop(simpleError(
      paste0("no applicable method for 'recvOneData' applied to an object of class ", class),
      quote(UseMethod("recvOneData"))
    ))
  }
  receiveOfAny(cl)
}

# How often receiveOfAny() has been asked.
turns <- new.env(parent = emptyenv())
turns$count <- 0

# As recvOneData(), for nodes of several clusters, and for those of others that have a connection, as PSOCK's
# have. Each cluster, and the connections, are looked at first in turn: none is to be left unheard.
# `read`: reads an answer.
receiveOfAny <- function(cl, read = readAnswer) {
  nodes <- unclass(cl)
  ours <- areOurs(nodes)
  others <- which(!ours)
  connections <- lapply(nodes[others], function(node) node$con)
  mute <- others[!vapply(connections, inherits, NA, "connection")]
  if (length(mute)) {
    text <- "has nodes that cannot be waited for beside others, since they have no connection: "
    badArgument("cl", text, spanText(mute, "node"))
  }
  sources <- clustersAmong(nodes, which(ours))
  if (length(others)) sources <- c(sources, list(NULL))
  turns$count <- turns$count + 1
  from <- turns$count %% length(sources)
  sources <- sources[(seq_along(sources) + from - 1) %% length(sources) + 1]
  repeat {
    waiting <- list()
    for (source in sources) {
      answer <- if (is.null(source)) receiveByConnection(connections, others, 0) else lookFor(source, read)
      if (is.list(answer)) return(answer)
      if (isTRUE(answer)) waiting <- c(waiting, list(source$handle$pointer))
    }
    if (length(others)) {
      # What R's sockets wait for, Rust does not know, and the other way round.
      answer <- receiveByConnection(connections, others, if (length(waiting)) 0.005)
      if (!is.null(answer)) return(answer)
    } else if (length(waiting)) {
      checked(hubs_wait(waiting))
    } else {
      handleFailed(rustFailure("no_task"), sources[[1L]]$handle)
    }
  }
}

# The answer of a node of one of several clusters, if there is one; TRUE: there may be one later.
lookFor <- function(part, read) {
  handle <- part$handle
  result <- hub_poll(handle$pointer, part$ranks, part$places)
  failed <- is.object(result) && isFailure(result)
  if (typeof(result) == "list" && !failed) return(result)
  nothing <- failed && result[["kind"]] == "no_task"
  if (nothing && !handle$stopped) return(FALSE)
  answer <- noAnswer(result, handle, read)
  if (typeof(result) == "logical") return(answer)
  if (!is.null(answer)) return(list(node = result[["place"]], value = answer))
  TRUE
}

# The same of connections, which are of the nodes in these places; `timeout`: NULL for none.
receiveByConnection <- function(connections, places, timeout) {
  ready <- socketSelect(connections, FALSE, timeout)
  if (!any(ready)) return(NULL)
  n <- which.max(ready)
  list(node = places[[n]], value = unserialize(connections[[n]]))
}

# Rust waits in slices; in between R looks for interrupts, time limits and its front end's events,
# which is what raiseInterrupt() does. Returns an answer if it has to be read or made here.
noAnswer <- function(result, handle, read = readAnswer) {
  if (typeof(result) == "logical") return(read(handle))
  answer <- if (isFailure(result)) {
    if (is.null(result[["task"]])) handleFailed(result, handle)
    taskEnded(result, handle)
  } else if (!is.null(result)) {
    unwound(result)
  }
  showEvents(handle)
  if (is.null(answer)) raiseInterrupt()
  answer
}

readAnswer <- function(handle) {
  answer <- readWithConditions(handle)
  if (is.null(answer$node)) return(asParallels(answer))
  answer$value <- asParallels(answer$value)
  answer
}

# An answer as it came. One that cannot be read is the failure of its task.
readWithConditions <- function(handle) {
  answer <- answersRead(handle, {
    raiseInterrupt()
    checked(hub_read(handle$pointer), handle)
  })
  if (!inherits(answer, "rustcluster_unread")) return(answer)
  value <- failedAnswer(answer$task, notRead(answer), handle)
  if (answer$place == 0) value else list(node = as.integer(answer$place), value = value)
}

# An error is its text alone there. Ours come with the condition.
asParallels <- function(answer) {
  if (isFALSE(answer$success) && !inherits(answer$value, "rustcluster_failure")) attr(answer$value, "condition") <- NULL
  answer
}

# Evaluates what reads answers. If one cannot be read (it is damaged, needs a package that is missing here, or
# more memory than there is), that costs its own task alone: the value is of class "rustcluster_unread".
answersRead <- function(handle, expr) {
  tryCatch(
    withCallingHandlers(expr, error = function(e) {
      reading <- hub_reading(handle$pointer)
      if (is.double(reading) && !isTimeLimit(e)) signalUnread(e, task = reading[[1L]], place = reading[[2L]])
    }),
    rustcluster_unread = identity
  )
}

# Jumps to whoever reads an answer, out of the error of doing so.
signalUnread <- function(e, ...) {
  signalCondition(structure(
    class = c("rustcluster_unread", "condition"),
    list(message = conditionMessage(e), call = NULL, parent = e, ...)
  ))
}

# Of setTimeLimit(): it is the session's, and has nothing to do with what is being read.
isTimeLimit <- function(e) {
  texts <- c("reached elapsed time limit", "reached CPU time limit", "reached session elapsed time limit",
             "reached session CPU time limit")
  any(startsWith(conditionMessage(e), gettext(texts, domain = "R")))
}

notRead <- function(unread, index = NULL) {
  rustclusterCondition(
    "protocol", paste0("an answer could not be read: ", conditionMessage(unread)), parent = unread$parent,
    index = index
  )
}

#' @exportS3Method parallel::closeNode
#' @exportS3Method snow::closeNode
closeNode.RustNode <- function(node) {
  stopNodes(list(node))
}

#' @exportS3Method parallel::stopCluster
#' @exportS3Method snow::stopCluster
stopCluster.RustCluster <- function(cl) {
  stopNodes(cl)
}

# Stops all of them before it raises what went wrong with any.
stopNodes <- function(nodes) {
  nodes <- unclass(nodes)
  ours <- areOurs(nodes)
  failures <- list()
  trying <- function(expr) tryCatch(expr, error = function(e) failures <<- c(failures, list(e)))
  parts <- clustersAmong(nodes, which(ours))
  for (part in parts) trying(endNodes(part$handle, part$ranks))
  for (node in nodes[!ours]) {
    changed <- inherits(node, "RustNode")
    trying(if (changed) badArgument("cl", "has a node that was changed") else parallels$stopNode(node))
  }
  for (part in parts) trying(awaitEnd(part$handle, part$ranks))
  if (length(failures)) stop(failures[[1L]])
  invisible()
}

endNodes <- function(handle, ranks) {
  if (isTRUE(handle$stopped)) return()
  checked(hub_stop_nodes(handle$pointer, ranks))
  handle$alive <- setdiff(handle$alive, ranks)
  if (!length(handle$alive)) {
    handle$stopped <- TRUE
    closeReadiness(handle)
    handle$ending <- TRUE
  }
}

# Returns when nothing is left of these nodes, which the agents' own time limits bound.
awaitEnd <- function(handle, ranks) {
  if (isTRUE(handle$ending)) {
    while (!checked(hub_closed(handle$pointer))) raiseInterrupt()
    handle$ending <- NULL
    lookAtCalls(handle)
  } else if (!isTRUE(handle$stopped)) {
    while (!checked(hub_ended(handle$pointer, ranks))) raiseInterrupt()
  }
  showEvents(handle)
}
