# Methods of parallel's generics for clusters and nodes of this package. With them all verbs of parallel work.
#
# A verb of parallel sends its tasks and receives their answers from one frame. At its first send the whole job is run
# here, and the verb returns with the results: see parallel-internals.R. A job that cannot be run in this way (nodes of
# several clusters, a verb of snow, a version of parallel with other code) goes on task by task. If the verb's frame is
# left before all answers have arrived (an interrupt, an error, a worker failure), the remaining tasks must be
# cancelled: the next verb would take old answers for its own. Therefore the first send from a verb's frame opens a job,
# and an exit handler of the frame closes it. While a job is open, its verb runs.

#' @exportS3Method parallel::sendData
#' @exportS3Method snow::sendData
sendData.RustNode <- function(node, data) {
  # `.subset2()` is faster than `[[`, which looks for methods: this runs once for each task.
  handle <- .subset2(node, "handle")
  # The parts of the task may be results of other calls. Errors in them show this function, as with PSOCK.
  serialize <- function(data, con) data
  data <- serialize(data, node$con)
  # stopNode() sends this. It is no error to stop a stopped node again.
  if (typeof(data) == "list" && identical(data$type, "DONE")) return(stopNodes(list(node)))
  if (!is.null(handle$linger)) revive(handle)
  frames <- sys.nframe()
  if (handle$job != noJob) closeStale(handle, frames)
  if (handle$job == noJob) {
    verb <- sendingVerb(frames)
    if (!is.null(verb)) {
      # This returns from the verb if its job can be run as a whole.
      runWhole(verb, data)
      job <- openJob(handle, verb$depth, frames, setupKeyOf(verb$name, data$data))
      do.call(on.exit, list(as.call(list(closeJob, handle, job)), TRUE), envir = sys.frame(verb$depth))
    }
  } else if (handle$frames != frames) {
    # A verb within a verb, for example in a handler of a warning, would get the answers of the other.
    raiseFailure(rustFailure("busy"), handle)
  }
  sendTask(handle, .subset2(node, "rank"), data)
}

sendTask <- function(handle, rank, message) {
  if (!handle$receivesReports && isNamespaceLoaded("progressr")) receiveReports(handle)
  if (identical(handle$setupKey, ".Random.seed")) {
    # The seed of a worker that has not joined yet is logged.
    noteStreams(handle)
  } else if (handle$awaits) {
    awaitNodes(handle, rank)
  }
  result <- hub_send(handle$pointer, rank, handle$job, message, handle$setupKey)
  if (handle$job == noJob) releaseNodes(handle)
  if (is.null(result)) return(invisible())
  if (isTRUE(result)) {
    handle$onlyLogged <- c(handle$onlyLogged, rank)
    return(invisible())
  }
  if (isFromStale(result, handle)) return(sendTask(handle, rank, message))
  if (isFailure(result)) handleFailed(result, handle)
  unwound(result)
}

# Closes a job whose verb has ended. The R code that closes jobs may have been interrupted.
closeStale <- function(handle, frames) {
  over <- !identical(sys.frame(min(handle$depth, frames)), openFrames[[handle$id]])
  if (over) closeJob(handle, handle$job)
}

# The frame of the open job of each cluster, by the id of the cluster. The frame is not in the handle, because a
# function that was made beside a cluster is sent with the handle: the frame with all its tasks and results would be
# sent, too.
openFrames <- new.env(parent = emptyenv())

# Stands for no job. Tasks that are sent from outside of any verb have this job, and are not cancelled.
noJob <- 0

# Opens a job and returns its number. The frame of the verb has to close it. `depth`: the number of the verb's frame.
# `frames`: the number of the frame of the method that sends the tasks, or 0 without such a method. `setupKey`: see
# setupKeyOf().
openJob <- function(handle, depth, frames, setupKey) {
  handle$jobs <- handle$jobs + 1
  continueJob(handle, handle$jobs, depth, frames, setupKey)
}

# Opens a job that has a number, and of which tasks have been sent.
continueJob <- function(handle, job, depth, frames, setupKey) {
  # These are warnings of an earlier call, which one of its warnings has ended. They must not end this call.
  if (length(handle$pending)) {
    pending <- handle$pending
    handle$pending <- list()
    for (condition in pending) {
      if (inherits(condition, c("message", "warning"))) message(conditionMessage(condition))
    }
  }
  handle$frames <- frames
  handle$depth <- depth
  openFrames[[handle$id]] <- sys.frame(depth)
  handle$setupKey <- setupKey
  handle$job <- job
}

# Raises an error if another verb is running. A verb of this package calls this from the frame with this number.
refuseIfBusy <- function(handle, frames) {
  if (handle$job != noJob) closeStale(handle, frames)
  if (handle$job != noJob) raiseFailure(rustFailure("busy"), handle)
}

# Returns whether `result` refuses a verb because of a job whose verb has ended, and closes that job. callAll() and
# runJob() start jobs that may end before R records them: only Rust knows such a job. The end of a job may have been
# interrupted.
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
      handle$setupKey <- NULL
      handle$onlyLogged <- NULL
      openFrames[[handle$id]] <- NULL
    }
    if (!is.null(events)) show(events, handle)
  })
  if (length(handle$pending)) raisePending(handle)
}

# Returns the key of a set-up call in the set-up log: the name of the variable that the call sets, or "". Set-up calls
# are those of clusterCall(), with clusterExport() and clusterEvalQ(), which call it, and of clusterSetRNGStream().
# Returns NULL for other calls.
setupKeyOf <- function(verb, call) {
  switch(verb,
    clusterSetRNGStream = ".Random.seed",
    clusterCall = if (length(call$args) < 2L) "" else if (isGets(call$fun)) call$args[[1L]] else loopKeyOf(call)
  )
}

# Returns whether a call sets up a worker and has no value that anybody needs, so that the call is only logged for a
# worker that has not joined yet: it is made by clusterExport(), or by foreach.
isOnlyLogged <- function(call) isGets(call$fun) || identical(call$fun, beginLoop)

handleFailed <- function(failure, handle) {
  if (handle$stopped) failure <- rustFailure("stopped")
  condition <- failureCondition(failure, handle)
  # The condition is raised as an error, and must not be a warning, too.
  showEvents(handle, except = condition)
  stop(condition)
}

#' @exportS3Method parallel::recvData
#' @exportS3Method snow::recvData
recvData.RustNode <- function(node) {
  handle <- .subset2(node, "handle")
  rank <- .subset2(node, "rank")
  if (rank %in% handle$onlyLogged) {
    handle$onlyLogged <- setdiff(handle$onlyLogged, rank)
    return(list(type = "VALUE", value = NULL, success = TRUE, time = 0, tag = NULL))
  }
  receive <- function() {
    raiseInterrupt()
    hub_receive(handle$pointer, rank)
  }
  isAnswer <- function() typeof(result) == "list" && !(is.object(result) && isFailure(result))
  result <- receive()
  # Fast path: most answers arrive soon.
  if (isAnswer()) return(withReports(result, handle))
  withoutCallOfTimeLimit(repeat {
    result <- noAnswer(orStopped(result, handle, rank), handle)
    if (!is.null(result)) return(result)
    result <- receive()
    if (isAnswer()) return(withReports(result, handle))
  })
}

# Raises a pending interrupt. R itself does so only at times, and an interrupt that is raised right after an answer was
# taken would lose the answer. Also raises the error of a time limit (setTimeLimit()).
raiseInterrupt <- function() {
  withoutCallOfTimeLimit(Sys.sleep(0))
  if (!is.null(runner$tick)) runner$tick()
}

# Evaluates code that waits. R may notice anywhere in it that a time limit is exceeded, so that the call of this error
# is not the user's.
withoutCallOfTimeLimit <- function(expr) {
  withCallingHandlers(expr, error = function(e) if (isTimeLimit(e)) stop(conditionMessage(e), call. = FALSE))
}

#' @exportS3Method parallel::recvOneData
#' @exportS3Method snow::recvOneData
recvOneData.RustCluster <- function(cl) {
  if (!length(cl)) badArgument("cl", "has no nodes")
  handle <- cl[[1L]][["handle"]]
  if (is.null(handle)) return(receiveOfAny(cl))
  nextAnswer(cl, handle, hub_receive_any(handle$pointer, cl))
}

# Returns the next answer. `result`: the first result that was received.
nextAnswer <- function(cl, handle, result) {
  failed <- is.object(result) && isFailure(result)
  # Fast path: most answers arrive soon.
  if (typeof(result) == "list" && !failed) return(withReports(result, handle))
  withoutCallOfTimeLimit(repeat {
    if (failed && result[["kind"]] == "several_clusters") return(receiveOfAny(cl))
    answer <- noAnswer(orStopped(result, handle, cluster_ranks(cl)), handle)
    if (typeof(result) == "logical") return(answer)
    if (!is.null(answer)) return(list(node = result[["node_index"]], value = answer))
    result <- hub_receive_any(handle$pointer, cl)
    failed <- is.object(result) && isFailure(result)
    if (typeof(result) == "list" && !failed) return(withReports(result, handle))
  })
}

# Returns a failure if nodes without a task have been stopped, for example during a verb: their tasks are forgotten.
orStopped <- function(result, handle, ranks) {
  if (!isFailure(result) || result[["kind"]] != "no_task") return(result)
  stoppedRanks <- setdiff(ranks, handle$alive)
  if (length(stoppedRanks)) rustFailure("stopped", rank = stoppedRanks[[1L]]) else result
}

# Nodes of this package that were joined with others, as by parallelly's c(), have class "cluster" only.
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

# The number of calls of receiveOfAny().
turns <- new.env(parent = emptyenv())
turns$count <- 0

# Works as recvOneData(), for nodes of several clusters, and for nodes of other packages that have a connection, as
# PSOCK's have. The clusters and the connections take turns at being polled first, so that none is starved.
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
  # A verb has an open job in each cluster to which it has sent tasks. Answers of other clusters are not its own.
  open <- vapply(sources, function(source) source$handle$job != noJob, NA)
  if (any(open)) sources <- sources[open]
  if (length(others)) sources <- c(sources, list(NULL))
  turns$count <- turns$count + 1
  from <- turns$count %% length(sources)
  sources <- sources[(seq_along(sources) + from - 1) %% length(sources) + 1]
  repeat {
    waiting <- list()
    for (source in sources) {
      answer <- if (is.null(source)) receiveByConnection(connections, others, 0) else pollCluster(source, read)
      if (is.list(answer)) return(answer)
      if (isTRUE(answer)) waiting <- c(waiting, list(source$handle$pointer))
    }
    if (length(others)) {
      # R's sockets and Rust cannot wait for each other, so that both are polled.
      answer <- receiveByConnection(connections, others, if (length(waiting)) 0.005)
      if (!is.null(answer)) return(answer)
    } else if (length(waiting)) {
      checked(hubs_wait(waiting))
    } else {
      handleFailed(rustFailure("no_task"), sources[[1L]]$handle)
    }
  }
}

# Polls a cluster among several for an answer. Returns the answer, TRUE if one may arrive later, or FALSE.
pollCluster <- function(part, read) {
  handle <- part$handle
  result <- hub_poll(handle$pointer, part$ranks, part$indices)
  failed <- is.object(result) && isFailure(result)
  if (typeof(result) == "list" && !failed) return(withReports(result, handle))
  nothing <- failed && result[["kind"]] == "no_task"
  if (nothing && !handle$stopped) return(FALSE)
  answer <- noAnswer(result, handle, read)
  if (typeof(result) == "logical") return(answer)
  if (!is.null(answer)) return(list(node = result[["node_index"]], value = answer))
  TRUE
}

# Polls connections for an answer. `indices`: the indices of their nodes. `timeout`: NULL for no time limit.
receiveByConnection <- function(connections, indices, timeout) {
  ready <- socketSelect(connections, FALSE, timeout)
  if (!any(ready)) return(NULL)
  n <- which.max(ready)
  list(node = indices[[n]], value = unserialize(connections[[n]]))
}

# Handles a result that is no answer. Rust waits in slices. In between, raiseInterrupt() lets R handle interrupts, time
# limits and events of its front end. Returns an answer if R has to read or make it.
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

# Reads an answer, with the conditions of this package. An answer that cannot be read is a failure of its task.
readWithConditions <- function(handle) {
  answer <- answersRead(handle, {
    raiseInterrupt()
    checked(hub_read(handle$pointer), handle)
  })
  if (!inherits(answer, "rustcluster_unread")) return(answer)
  value <- failedAnswer(answer$task, notRead(answer), handle)
  if (answer$nodeIndex == 0) value else list(node = as.integer(answer$nodeIndex), value = value)
}

# Returns an answer as parallel has it: an error is only its text. Failures of this package keep their condition.
asParallels <- function(answer) {
  if (isFALSE(answer$success) && !inherits(answer$value, "rustcluster_failure")) attr(answer$value, "condition") <- NULL
  answer
}

# Evaluates code that reads answers. An answer may be unreadable: it is damaged, needs a package that is missing here,
# or needs more memory than there is. Only its own task fails then: the value is of class "rustcluster_unread".
answersRead <- function(handle, expr) {
  tryCatch(
    withCallingHandlers(expr, error = function(e) {
      # R may notice that a time limit is exceeded in any function of this package: see raiseInterrupt().
      if (isTimeLimit(e)) stop(conditionMessage(e), call. = FALSE)
      reading <- hub_reading(handle$pointer)
      if (is.double(reading)) signalUnread(e, task = reading[[1L]], nodeIndex = reading[[2L]])
    }),
    rustcluster_unread = identity
  )
}

# Jumps from an error in reading an answer to answersRead().
signalUnread <- function(e, ...) {
  signalCondition(structure(
    class = c("rustcluster_unread", "condition"),
    list(message = conditionMessage(e), call = NULL, parent = e, ...)
  ))
}

# Returns whether an error is that of setTimeLimit(), which belongs to the session, and not to the answer.
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
  stopNodes(withAdded(cl))
}

# Stops all nodes, and then raises the first error.
stopNodes <- function(nodes) {
  nodes <- unclass(nodes)
  ours <- areOurs(nodes)
  failures <- list()
  trying <- function(expr) tryCatch(expr, error = function(e) failures <<- c(failures, list(e)))
  parts <- clustersAmong(nodes, which(ours))
  # A copy of a cluster that another session has stopped.
  parts <- Filter(function(part) !lingersNoMore(part$handle), parts)
  for (part in parts) trying(revive(part$handle))
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
  if (length(handle$alive)) recordChange(handle)
  if (!length(handle$alive)) {
    handle$stopped <- TRUE
    removeRecord(handle)
    closeReadiness(handle)
    handle$ending <- TRUE
  }
}

# Returns when the processes of these nodes have ended. The agents limit the time for that.
awaitEnd <- function(handle, ranks) {
  if (isTRUE(handle$ending)) {
    # The engine need not cancel jobs whose agents end by themselves, so that most jobs end well.
    on.exit(stopBatches(handle))
    while (!checked(hub_closed(handle$pointer))) raiseInterrupt()
    handle$ending <- NULL
    checkCalls(handle)
  } else if (!isTRUE(handle$stopped)) {
    while (!checked(hub_ended(handle$pointer, ranks))) raiseInterrupt()
  }
  showEvents(handle)
}
