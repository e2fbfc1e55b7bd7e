# The generics of parallel that a cluster lives by: with these methods all its verbs work.
#
# A verb of parallel sends its tasks and receives their answers from one frame. When that frame
# is left before all answers are in (an interrupt, an error, a lost worker), the rest must be
# cancelled, or the next verb would take old answers for its own. So the first send from a verb's
# frame opens a job and hangs its end on the frame's exit.

#' @exportS3Method parallel::sendData
sendData.RustNode <- function(node, data) {
  handle <- node[["handle"]]
  depth <- handle$depth
  verb <- handle$verb
  if (is.null(verb) || sys.nframe() <= depth || !identical(sys.frame(depth), verb)) {
    openJob(handle, sys.nframe())
  }
  result <- hub_send(handle$pointer, node[["rank"]], handle$job, data)
  if (!is.null(result)) sendFailed(result, handle)
  invisible()
}

# 0 stands for no job: a send from outside of any verb, which is nobody's to cancel.
noJob <- 0

openJob <- function(handle, frames) {
  depth <- verbDepth(frames)
  if (is.null(depth)) {
    handle$verb <- NULL
    handle$job <- noJob
    return()
  }
  verb <- sys.frame(depth)
  handle$job <- checked(hub_new_job(handle$pointer))
  handle$depth <- depth
  handle$verb <- verb
  do.call(on.exit, list(bquote(.(closeJob)(.(handle), .(handle$job))), add = TRUE), envir = verb)
}

closeJob <- function(handle, job) {
  handle$verb <- NULL
  hub_cancel_job(handle$pointer, job)
  if (!handle$quiet) showEvents(handle)
}

# The frame that calls parallel's sendCall(): that of a verb, if its function is one of parallel's
# or ours. `frames`: the number of the method's own frame.
verbDepth <- function(frames) {
  plumbing <- plumbing()
  for (depth in rev(seq_len(frames - 1L))) {
    fun <- sys.function(depth)
    if (any(vapply(plumbing, identical, NA, fun))) next
    env <- topenv(environment(fun))
    # dynamicClusterApply() sends from a closure of its own.
    frame <- parent.env(sys.frame(depth))
    if (!identical(frame, env)) {
      for (outer in rev(seq_len(depth - 1L))) {
        if (identical(sys.frame(outer), frame)) {
          depth <- outer
          break
        }
      }
    }
    if (identical(env, parallelNamespace())) return(depth)
    return(NULL)
  }
  NULL
}

parallelNamespace <- function() asNamespace("parallel")

# What lies between a verb and a method.
plumbing <- function() {
  names <- c("sendData", "postNode", "sendCall")
  c(list(sendData.RustNode), mget(names, parallelNamespace(), mode = "function"))
}

sendFailed <- function(result, handle) {
  if (typeof(result) == "character") handleFailed(result, handle)
  unwound(result)
}

handleFailed <- function(failure, handle) {
  if (isTRUE(handle$stopped)) failure <- c(kind = "stopped")
  raiseFailure(failure, handle$hosts)
}

#' @exportS3Method parallel::recvData
recvData.RustNode <- function(node) {
  handle <- node[["handle"]]
  receive(handle, function() hub_receive(handle$pointer, node[["rank"]]))
}

#' @exportS3Method parallel::recvOneData
recvOneData.RustCluster <- function(cl) {
  if (!length(cl)) badArgument("cl", "has no nodes")
  handle <- cl[[1L]][["handle"]]
  receive(handle, function() hub_receive_any(handle$pointer, cl))
}

# Rust waits in slices; in between R looks for interrupts, time limits and its front end's events,
# which is what Sys.sleep(0) does.
receive <- function(handle, poll) {
  repeat {
    # The only errors in here are those of reading an answer.
    result <- tryCatch(
      {
        result <- poll()
        if (typeof(result) == "pairlist") unwound(result)
        result
      },
      error = unreadable
    )
    switch(typeof(result),
      list = return(result),
      character = handleFailed(result, handle)
    )
    if (!handle$quiet) showEvents(handle)
    Sys.sleep(0)
  }
}

unreadable <- function(e) {
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
  invisible()
}
