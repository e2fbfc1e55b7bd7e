# addWorkers(): more workers for a running cluster. Their hosts start as at first, and join as late hosts do.

#' Add workers to a cluster
#'
#' Starts workers on further hosts, or more of them on the same hosts, while the cluster goes on. They get what the
#' cluster was set up with, before their first task: `packages`, and the effects of the calls of `clusterExport()`,
#' `clusterEvalQ()` and `clusterCall()` that all workers of the cluster have completed. Calls on a part of the cluster
#' are not repeated. After `clusterSetRNGStream()`, the new workers continue its streams as if they had been part of the
#' cluster then.
#'
#' The new workers have the settings of the cluster, such as `packages`, `outfile`, `threads`, `rscript_envs`,
#' `memory_limit`, `timeout`, `retries`, `heartbeat_timeout`, `on_failure`, `reconnect` and `install`, except where
#' `spec` has others for a host. They are in agents of their own.
#'
#' Calls of [clusterSubmit()] that were made before do not move to the new workers.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one.
#' @param spec The workers to add, and their hosts: as for [makeRustCluster()].
#' @param wait How long to wait for the new workers: as for [makeRustCluster()]. Workers that are not waited for join
#'   later.
#' @param setup_timeout (number) Maximum number of seconds to wait.
#' @return The cluster with the new nodes at the end, invisibly. Other variables with the cluster still have the nodes
#'   that they had. `stopCluster()` stops all workers, also if it is given the cluster as it was before, but only the
#'   nodes of a part such as `cl[1:2]`.
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_start_failed`, `rustcluster_install_failed`, `rustcluster_limits`,
#' `rustcluster_busy` within a call that
#' uses the cluster, `rustcluster_stopped`, `rustcluster_forked`, `rustcluster_restored`. After an error or an interrupt
#' nothing of the new hosts is left, and the cluster is as before. It is an error to add workers when the set-up log
#' has reached `setup_log_limit` of [makeRustCluster()].
#' @seealso [removeWorkers()]
#' @examples
#' cl <- makeRustCluster(1)
#' x <- 17
#' parallel::clusterExport(cl, "x")
#' cl <- addWorkers(cl, 2)
#' parallel::clusterEvalQ(cl, x)
#' parallel::stopCluster(cl)
#' @export
addWorkers <- function(cl, spec, wait = "all", setup_timeout = 120) {
  parts <- clustersOf(cl)
  if (length(parts) > 1L) badArgument("cl", "must be of one cluster; add workers to each of them")
  if (missing(spec)) badArgument("spec", "is missing")
  between(setup_timeout, "setup_timeout", "a number of seconds", 0.001, 1e9, infinite = TRUE)
  handle <- parts[[1L]]$handle
  if (isTRUE(handle$stopped)) raiseFailure(list(kind = "stopped"), handle)
  refuseIfBusy(handle, sys.nframe())
  # What has happened before is reported before.
  showEvents(handle)
  settings <- handle$settings
  asked <- specHosts(spec, settings$defaults, length(handle$dial$launchers))
  local <- vapply(asked$hosts, `[[`, NA, "local")
  short <- limits_check(sum(asked$workers[local[asked$owner]], na.rm = TRUE))
  if (!is.null(short)) raiseFailure(short)
  spare <- isSpare(asked$hosts, asked$launchers, length(handle$dial$launchers))[asked$owner]
  needed <- neededWorkers(wait, asked$workers, spare)
  if (!is.null(handle$linger)) checkLinger(asked, length(handle$dial$launchers), "spec")

  if (isTRUE(settings$install)) {
    asked$problems <- installMissing(
      asked$hosts, setup_timeout, settings$progress, settings$tolerant, is.infinite(needed)
    )
  }

  launches <- lapply(asked$hosts, hostLaunch, settings$options)
  deadline <- proc.time()[["elapsed"]] + setup_timeout
  base <- list(hosts = length(handle$agents), workers = length(handle$hosts))
  handle$base <- base
  batches <- vapply(handle$batches, `[[`, "", "id")
  started <- FALSE
  on.exit(if (!started) removeAdded(handle, batches))
  suspendInterrupts({
    checked(hub_add_hosts(handle$pointer, launches), handle)
    handle$agents <- c(handle$agents, asked$hosts)
    workers <- vapply(seq_along(asked$hosts), function(i) sum(asked$workers[asked$owner == i]), 0L)
    setReport(handle, hostReport(handle, workers, base$hosts + seq_along(workers)))
  })
  startBatches(handle, asked, settings$options, settings$heartbeat_timeout)
  deadline <- greetHosts(handle, asked, deadline, setup_timeout, settings$tolerant, settings$progress, needed)
  refuseByteOrder(handle)
  suspendInterrupts({
    plans <- hostPlans(handle, asked, launches, settings)
    checked(hub_go_more(handle$pointer, plans), handle)
  })
  ranks <- awaitStart(handle, deadline, setup_timeout, settings$tolerant)
  awaitWorkers(handle, min(needed, length(ranks)), deadline, setup_timeout)
  continueStreams(handle, ranks)
  suspendInterrupts({
    checked(hub_added(handle$pointer), handle)
    handle$alive <- c(handle$alive, ranks)
    started <- TRUE
    recordChange(handle)
  })
  invisible(appended(cl, newCluster(handle, ranks), handle))
}

# Ends what has been started of hosts that could not be added. `batches`: the ids of the batches that there were.
removeAdded <- function(handle, batches) {
  new <- setdiff(seq_along(handle$agents), seq_len(handle$base$hosts))
  # The first step has failed.
  if (!length(new) || all(new %in% handle$hidden)) return(invisible())
  for (i in new) checked(hub_leave_out(handle$pointer, i, "addWorkers() has failed"))
  on.exit(stopBatches(handle, Filter(function(batch) !batch$id %in% batches, handle$batches)))
  handle$hidden <- c(handle$hidden, new)
  # The ranks that the hub has given to workers remain theirs.
  known <- seq_along(checked(hub_pids(handle$pointer), handle))
  handle$hosts <- handle$hosts[known]
  handle$owner <- handle$owner[known]
  while (!checked(hub_are_over(handle$pointer, handle$base$hosts), handle)) raiseInterrupt()
  checked(hub_added(handle$pointer), handle)
}

# The set-up calls of the cluster are logged in the form that this machine reads.
refuseByteOrder <- function(handle) {
  other <- otherByteOrder(handle)
  other[seq_len(handle$base$hosts)] <- FALSE
  if (!any(other)) return(invisible())
  hosts <- vapply(handle$agents[other], `[[`, "", "host")
  abort(
    "start_failed", "the workers could not be added: a host that joins after the start must have the byte order of ",
    "this machine: ", paste(sQuote(hosts), collapse = ", "), fields = list(host = hosts)
  )
}

# Records the streams that clusterSetRNGStream() gives to the workers. `seeds` is a variable of its frame. Clusters that
# are joined with c() share `last`, so that the new workers of each get other streams.
noteStreams <- function(handle) {
  frame <- openFrames[[handle$id]]
  if (!is.list(frame$seeds) || !length(frame$seeds)) return(invisible())
  if (is.null(frame$rustclusterStreams)) {
    frame$rustclusterStreams <- new.env(parent = emptyenv())
    frame$rustclusterStreams$last <- frame$seeds[[length(frame$seeds)]]
  }
  if (identical(handle$streams, frame$rustclusterStreams)) return(invisible())
  handle$streams <- frame$rustclusterStreams
  recordChange(handle)
  # continueStreams() has no `cl`, and records those of its workers itself.
  if (is.null(handle$linger) || is.null(frame$cl)) return(invisible())
  nodes <- unclass(frame$cl)
  own <- vapply(nodes, function(node) inherits(node, "RustNode") && identical(.subset2(node, "handle"), handle), NA)
  recordFirstSeeds(handle, vapply(nodes[own], .subset2, 0L, "rank"), frame$seeds[own])
}

# Gives new workers the streams of random numbers that follow the last one.
continueStreams <- function(handle, ranks) {
  streams <- handle$streams
  if (is.null(streams) || !length(ranks)) return(invisible())
  seeds <- Reduce(function(seed, rank) parallel::nextRNGStream(seed), ranks, streams$last, accumulate = TRUE)[-1L]
  job <- openJob(handle, sys.nframe(), 0L, ".Random.seed")
  on.exit(closeJob(handle, job))
  # noteStreams() finds it here, beside `seeds`.
  rustclusterStreams <- streams # nolint: object_usage_linter.
  for (i in seq_along(ranks)) {
    call <- substitute(assign(".Random.seed", seed, envir = .GlobalEnv), list(seed = seeds[[i]]))
    data <- list(fun = eval, args = list(call), return = TRUE, tag = NULL)
    sendTask(handle, ranks[[i]], list(type = "EXEC", data = data, tag = NULL))
  }
  for (node in unclass(newCluster(handle, ranks))) recvData.RustNode(node)
  recordFirstSeeds(handle, ranks, seeds)
  streams$last <- seeds[[length(seeds)]]
}

# Returns the cluster with further nodes. Its attribute `added`: whether it is the whole cluster, with which
# stopCluster() stops all workers, or a part.
appended <- function(cl, nodes, handle) {
  result <- c(cl, nodes)
  attr(result, "added") <- !isFALSE(attr(cl, "added")) && hasAllMade(cl, handle)
  result
}

# Whether nodes contain all workers of the cluster that makeRustCluster() has made and that have not been stopped.
hasAllMade <- function(cl, handle) {
  ranks <- vapply(unclass(cl), function(node) as.integer(.subset2(node, "rank")), 0L)
  length(ranks) > 0L && all(intersect(handle$made, handle$alive) %in% ranks) && any(ranks %in% handle$made)
}

# Returns the nodes that stopCluster() is to stop: with a whole cluster also those that were added to it.
withAdded <- function(cl) {
  if (isFALSE(attr(cl, "added")) || !length(cl) || !all(areOurs(cl))) return(cl)
  handles <- unique(lapply(unclass(cl), `[[`, "handle"))
  handle <- handles[[1L]]
  if (length(handles) > 1L || isTRUE(handle$stopped) || !hasAllMade(cl, handle)) return(cl)
  rest <- setdiff(handle$alive, vapply(unclass(cl), function(node) as.integer(.subset2(node, "rank")), 0L))
  if (length(rest)) c(cl, newCluster(handle, rest)) else cl
}
