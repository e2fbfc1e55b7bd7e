# The generics of parallel that a cluster lives by: with these methods all its verbs work.
#
# A verb of parallel sends its tasks and receives their answers from one frame. When that frame
# is left before all answers are in (an interrupt, an error, a lost worker), the rest must be
# cancelled, or the next verb would take old answers for its own. So the first send from a verb's
# frame opens a job and hangs its end on the frame's exit: while a job is open, its verb runs.

#' @exportS3Method parallel::sendData
sendData.RustNode <- function(node, data) {
  handle <- node[["handle"]]
  if (handle$job == noJob) openJob(handle, sys.nframe())
  result <- hub_send(handle$pointer, node[["rank"]], handle$job, data)
  if (is.null(result)) return(invisible())
  if (typeof(result) == "character") handleFailed(result, handle)
  unwound(result)
}

# Stands for no job: what is sent from outside of any verb is nobody's to cancel.
noJob <- 0

# `frames`: the number of the method's own frame.
openJob <- function(handle, frames) {
  depth <- verbDepth(frames)
  if (is.null(depth)) return()
  handle$jobs <- handle$jobs + 1
  handle$job <- handle$jobs
  end <- as.call(list(closeJob, handle, handle$job))
  do.call(on.exit, list(end, TRUE), envir = sys.frame(depth))
}

closeJob <- function(handle, job) {
  if (handle$job == job) handle$job <- noJob
  show(hub_close_job(handle$pointer, job), handle)
}

# The functions of parallel between a task and our method, and those that send tasks and receive
# the answers from one frame. Filled when the package is loaded.
parallels <- new.env(parent = emptyenv())

findParallels <- function() {
  names <- c("sendData", "postNode", "sendCall", "clusterCall", "staticClusterApply",
             "dynamicClusterApply")
  namespace <- environment(parallel::clusterCall)
  for (name in names) assign(name, get(name, namespace), parallels)
}

# The number of the frame of the verb that sends, or NULL: what is sent by other code, or by hand,
# is received by it as it likes.
verbDepth <- function(frames) {
  if (
    frames < 5L || !identical(sys.function(frames - 3L), parallels$sendCall) ||
      !identical(sys.function(frames - 2L), parallels$postNode) ||
      !identical(sys.function(frames - 1L), parallels$sendData)
  ) {
    return(NULL)
  }
  verb <- sys.function(frames - 4L)
  if (identical(verb, parallels$clusterCall) || identical(verb, parallels$staticClusterApply)) {
    return(frames - 4L)
  }
  # It sends from a function of its own.
  if (frames > 5L && identical(sys.function(frames - 5L), parallels$dynamicClusterApply)) {
    return(frames - 5L)
  }
  NULL
}

handleFailed <- function(failure, handle) {
  if (handle$stopped) failure <- c(kind = "stopped")
  raiseFailure(failure, handle)
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
  reading <- is.call(call) && is.symbol(call[[1L]]) &&
    as.character(call[[1L]]) %in% c("hub_receive", "hub_receive_any")
  if (!reading || inherits(e, "rustcluster_error")) return()
  abort("protocol", "an answer could not be read: ", conditionMessage(e), fields = list(parent = e))
}

# What workers printed, if that is wanted, and which of them were replaced.
showEvents <- function(handle) {
  show(hub_events(handle$pointer), handle)
}

show <- function(events, handle) {
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
  for (process in events$left) warning(leftBehind(process, handle))
  invisible()
}

leftBehind <- function(process, handle) {
  host <- handle$agents[[process$agent]]$host
  who <- if (is.na(process$rank)) "a worker" else paste("worker", process$rank)
  rustclusterCondition(
    "left_behind",
    paste0(
      who, " on host ", sQuote(host), " has left process ", process$pid, " behind (",
      process$command, "): it made itself independent of its worker and goes on. End it with `kill ",
      process$pid, "` on that host"
    ),
    host = host, rank = process$rank, pid = process$pid, command = process$command,
    type = "warning"
  )
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
