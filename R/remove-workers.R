# removeWorkers(): the planned end of some nodes, while the rest of the cluster goes on.

#' Remove workers from a cluster
#'
#' Stops some workers after their tasks, or at once. The other workers go on undisturbed. The agent of a host ends with
#' the host's last worker.
#'
#' Workers that are removed get no new tasks. Calls of [clusterSubmit()] that no other worker may run are run before the
#' end.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one.
#' @param which The nodes to remove: numbers of nodes of `cl`, or (character) names of hosts, as [clusterHosts()] has
#'   them: all nodes of `cl` on these hosts. The workers of two jobs of a batch engine on one host are all removed.
#' @param drain (logical) Whether the workers complete their tasks first. `FALSE`: stop the workers at once, whatever
#'   they do; calls of [clusterSubmit()] that run there are repeated on other workers, which does not count as a retry.
#' @param timeout (numeric) Maximum number of seconds to wait for the tasks. Then the workers are stopped as with
#'   `drain = FALSE`.
#' @return The cluster without these nodes, invisibly, once their processes have ended. Its length is 0 if no node is
#'   left: the cluster is then stopped. Other variables with the cluster still have the nodes, which fail with
#'   `rustcluster_stopped`. An interrupt ends the waiting, and not the removal.
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_stopped`, `rustcluster_forked`, `rustcluster_restored`.
#' @seealso [clusterAlive()], [clusterStatus()]: a worker that completes its tasks has the state `"draining"`.
#' @examples
#' cl <- makeRustCluster(3)
#' cl <- removeWorkers(cl, 2:3)
#' length(cl)
#' parallel::clusterCall(cl, function() "still here")
#' parallel::stopCluster(cl)
#' @export
removeWorkers <- function(cl, which, drain = TRUE, timeout = Inf) {
  parts <- clustersOf(cl)
  if (missing(which)) badArgument("which", "is missing")
  indices <- nodesToRemove(cl, plain(which))
  if (!isTRUE(drain) && !isFALSE(drain)) badArgument("drain", "must be TRUE or FALSE")
  between(timeout, "timeout", "a number of seconds", 0, Inf, infinite = TRUE)
  parts <- lapply(parts, function(part) {
    list(handle = part$handle, ranks = unique(part$ranks[part$indices %in% indices]))
  })
  parts <- Filter(function(part) length(part$ranks), parts)
  removed <- rep(FALSE, length(cl))
  for (part in parts) {
    if (isTRUE(part$handle$stopped)) raiseFailure(list(kind = "stopped"), part$handle)
    # A node may be in the cluster more than once.
    removed <- removed | vapply(unclass(cl), function(node) {
      identical(.subset2(node, "handle"), part$handle) && .subset2(node, "rank") %in% part$ranks
    }, NA)
  }
  for (part in parts) {
    waiting <- waitingJobs(part$handle, part$ranks)
    if (drain) checked(hub_drain(part$handle$pointer, part$ranks), part$handle)
    for (job in waiting) cancelJobs(job$batch, job$job, job$task)
  }
  deadline <- proc.time()[["elapsed"]] + timeout
  for (part in parts) endDrained(part$handle, part$ranks, if (drain) deadline else -Inf)
  rest <- cl[!removed]
  if (!is.null(attr(cl, "name")) && length(rest)) rest <- named(rest)
  invisible(rest)
}

# Returns the indices of the nodes to be removed.
nodesToRemove <- function(cl, which) {
  if (is.character(which)) {
    hosts <- vapply(unclass(cl), function(node) node$host, "")
    unknown <- setdiff(which, hosts)
    if (anyNA(which) || length(unknown)) {
      badArgument(
        "which", "contains ", paste(sQuote(unknown), collapse = ", "), ", which is no host of the cluster; ",
        "its hosts are ", paste(sQuote(unique(hosts)), collapse = ", ")
      )
    }
    return(base::which(hosts %in% which))
  }
  if (is.logical(which) || !is.numeric(which) || anyNA(which) || any(which != round(which))) {
    badArgument("which", "must be numbers of nodes, or names of hosts")
  }
  if (any(which < 1 | which > length(cl))) {
    badArgument("which", "must be numbers of nodes, from 1 to ", length(cl))
  }
  unique(as.integer(which))
}

# Waits until the processes of these workers have ended. Stops the workers at the deadline.
endDrained <- function(handle, ranks, deadline) {
  pointer <- handle$pointer
  while (proc.time()[["elapsed"]] < deadline && !checked(hub_ended(pointer, ranks), handle)) {
    raiseInterrupt()
    # A call whose worker has died has to be sent again, which may need one of these workers.
    checkCalls(handle)
  }
  handle$alive <- setdiff(handle$alive, ranks)
  last <- !length(handle$alive)
  if (!last) recordChange(handle)
  if (!checked(hub_ended(pointer, ranks), handle)) checked(hub_remove(pointer, ranks), handle)
  if (last) endNodes(handle, ranks)
  awaitEnd(handle, ranks)
}
