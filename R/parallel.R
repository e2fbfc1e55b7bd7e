# The generics of parallel that a cluster lives by: with these methods all its verbs work.
#
# A verb of parallel sends its tasks and receives their answers from one frame. When that frame
# is left before all answers are in (an interrupt, an error, a lost worker), the rest must be
# cancelled, or the next verb would take old answers for its own. So the first send from a verb's
# frame opens a job and hangs its end on the frame's exit.

#' @exportS3Method parallel::sendData
sendData.RustNode <- function(node, data) {
  handle <- node[["handle"]]
  if (sys.nframe() <= handle$depth || !identical(sys.frame(handle$depth), handle$verb)) {
    openJob(handle, sys.nframe())
  }
  result <- hub_send(handle$pointer, node[["rank"]], handle$job, data)
  if (is.null(result)) return(invisible())
  if (typeof(result) == "character") handleFailed(result, handle)
  unwound(result)
}

# 0 stands for no job: a send from outside of any verb, which is nobody's to cancel.
noJob <- 0
# Deeper than any frame: no verb.
noDepth <- .Machine$integer.max

openJob <- function(handle, frames) {
  depth <- verbDepth(frames)
  handle$depth <- noDepth
  handle$job <- noJob
  if (is.null(depth)) return()
  verb <- sys.frame(depth)
  handle$job <- checked(hub_new_job(handle$pointer))
  handle$verb <- verb
  handle$depth <- depth
  do.call(on.exit, list(as.call(list(closeJob, handle, handle$job)), TRUE), envir = verb)
}

closeJob <- function(handle, job) {
  if (identical(handle$job, job)) {
    handle$verb <- NULL
    handle$depth <- noDepth
    handle$job <- noJob
  }
  hub_cancel_job(handle$pointer, job)
  showEvents(handle)
}

# The functions of parallel that send tasks and receive the answers, from one frame each.
# dynamicClusterApply() sends from a closure of its own, submit().
verbs <- c("clusterCall", "staticClusterApply", "dynamicClusterApply")

# The number of the frame of the verb that sends, or NULL: what is sent by other code, or by hand,
# is received by it as it likes. `frames`: the number of the method's own frame.
verbDepth <- function(frames) {
  depth <- frames - 1L
  while (depth > 0L) {
    name <- calledName(sys.call(depth))
    if (name %in% verbs) {
      ours <- identical(topenv(environment(sys.function(depth))), parallelNamespace())
      return(if (ours) depth)
    }
    # Between the verb and the method.
    if (!name %in% c("sendData", "postNode", "sendCall", "submit")) return(NULL)
    depth <- depth - 1L
  }
  NULL
}

# "f" of f(x) and of p::f(x).
calledName <- function(call) {
  head <- call[[1L]]
  if (is.call(head) && length(head) == 3L) head <- head[[3L]]
  if (is.symbol(head)) as.character(head) else ""
}

parallelNamespace <- function() environment(parallel::clusterCall)

handleFailed <- function(failure, handle) {
  if (handle$stopped) failure <- c(kind = "stopped")
  raiseFailure(failure, handle$hosts)
}

#' @exportS3Method parallel::recvData
recvData.RustNode <- function(node) {
  handle <- node[["handle"]]
  rank <- node[["rank"]]
  withCallingHandlers(
    repeat {
      result <- hub_receive(handle$pointer, rank)
      if (typeof(result) == "list") return(result)
      noAnswer(result, handle)
    },
    error = unreadable
  )
}

#' @exportS3Method parallel::recvOneData
recvOneData.RustCluster <- function(cl) {
  if (!length(cl)) badArgument("cl", "has no nodes")
  handle <- cl[[1L]][["handle"]]
  withCallingHandlers(
    repeat {
      result <- hub_receive_any(handle$pointer, cl)
      if (typeof(result) == "list") return(result)
      noAnswer(result, handle)
    },
    error = unreadable
  )
}

# Rust waits in slices; in between R looks for interrupts, time limits and its front end's events,
# which is what Sys.sleep(0) does.
noAnswer <- function(result, handle) {
  switch(typeof(result),
    character = handleFailed(result, handle),
    pairlist = unwound(result)
  )
  showEvents(handle)
  Sys.sleep(0)
}

# The errors that are raised while an answer is received, other than our own, are those of reading
# it, and those of R itself (a time limit).
unreadable <- function(e) {
  call <- conditionCall(e)
  reading <- is.call(call) && calledName(call) %in% c("hub_receive", "hub_receive_any")
  if (!reading || inherits(e, "rustcluster_error")) return()
  abort("protocol", "an answer could not be read: ", conditionMessage(e), fields = list(parent = e))
}

# What workers printed, if that is wanted, and which of them were replaced.
showEvents <- function(handle) {
  events <- hub_events(handle$pointer)
  if (is.null(events) || is.character(events)) return(invisible())
  for (i in seq_along(events$ranks)) {
    rank <- events$ranks[[i]]
    showOutput(handle, rank, events$texts[[i]])
  }
  for (rank in events$replaced) {
    warning(rustclusterCondition(
      "worker_replaced",
      paste0(
        "worker ", rank, " on host ", sQuote(handle$hosts[[rank]]), " did not heed an interrupt ",
        "and was killed; a fresh one has taken its place, without what had been exported to it"
      ),
      rank = rank, host = handle$hosts[[rank]], type = "warning"
    ))
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
  showEvents(handle)
  invisible()
}
