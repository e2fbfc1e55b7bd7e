# Nodes of one or several clusters, beside nodes of other packages, and methods that print clusters and nodes. Functions
# that take a cluster accept all nodes of this package, and refuse other nodes by their indices.

# Returns for each node whether it is a node of this package.
areOurs <- function(nodes) {
  vapply(unclass(nodes), isNode, NA)
}

isNode <- function(node) {
  if (!inherits(node, "RustNode") || !is.list(node)) return(FALSE)
  handle <- .subset2(node, "handle")
  rank <- plain(.subset2(node, "rank"))
  is.environment(handle) && is.character(handle$id) && is.numeric(rank) && length(rank) == 1L &&
    isTRUE(rank >= 1 && rank <= length(handle$hosts))
}

# Returns the clusters of the nodes with these indices: a list with, for each cluster, its `handle`, the indices of its
# nodes among all (`indices`), and their `ranks`.
clustersAmong <- function(nodes, indices = seq_along(nodes)) {
  nodes <- unclass(nodes)
  parts <- list()
  while (length(indices)) {
    handle <- .subset2(nodes[[indices[[1L]]]], "handle")
    own <- vapply(nodes[indices], function(node) identical(.subset2(node, "handle"), handle), NA)
    ranks <- vapply(nodes[indices[own]], function(node) as.integer(.subset2(node, "rank")), 0L)
    parts <- c(parts, list(list(handle = handle, indices = indices[own], ranks = ranks)))
    indices <- indices[!own]
  }
  parts
}

# Returns the same for a cluster that is an argument of a user's call, or raises an error.
clustersOf <- function(cl, argument = "cl") {
  if (missing(cl)) badArgument(argument, "is missing")
  if (inherits(cl, "RustCluster") && length(cl)) {
    # Fast path: Rust checks in less time that all nodes are of one cluster.
    ranks <- cluster_ranks(cl)
    if (typeof(ranks) == "integer" && isNode(cl[[1L]])) {
      handle <- cl[[1L]][["handle"]]
      known <- range(ranks)
      if (known[[1L]] >= 1L && known[[2L]] <= length(handle$hosts)) {
        if (!is.null(handle$linger)) revive(handle)
        return(list(list(handle = handle, indices = seq_along(ranks), ranks = ranks)))
      }
    }
  }
  if (!inherits(cl, "cluster") || !is.list(cl)) {
    badArgument(argument, "must be a cluster made by makeRustCluster()", notThis(cl))
  }
  refuseEmpty(cl, argument)
  ours <- areOurs(cl)
  if (!any(ours)) badArgument(argument, "must be a cluster made by makeRustCluster()", notThis(cl))
  if (!all(ours)) {
    badArgument(
      argument, "contains nodes that were not made by makeRustCluster(): ", spanText(which(!ours), "node")
    )
  }
  parts <- clustersAmong(cl)
  for (part in parts) revive(part$handle)
  parts
}

refuseEmpty <- function(cl, argument = "cl") {
  if (!length(cl)) badArgument(argument, "has no nodes; create a new cluster with makeRustCluster()")
}

# Returns the handle of the cluster. Nodes of several clusters are an error.
clusterHandle <- function(cl, argument = "cl") {
  parts <- clustersOf(cl, argument)
  if (length(parts) > 1L) {
    badArgument(argument, "contains nodes of ", length(parts), " clusters; all nodes must be of one cluster")
  }
  parts[[1L]]$handle
}

# Returns the cluster, or parallel's default cluster for NULL.
theCluster <- function(cl) {
  if (is.null(cl)) cl <- getDefaultCluster()
  if (is.null(cl)) badArgument("cl", "is missing, and no default cluster is registered; see setDefaultCluster()")
  clustersOf(cl)
  cl
}

# Returns one value for each node, in the order of the nodes. `of`: returns the values of the nodes of one cluster.
byNode <- function(parts, of) {
  values <- lapply(parts, function(part) of(part$handle, part$ranks))
  unlist(values)[order(unlist(lapply(parts, `[[`, "indices")))]
}

# Returns the cluster without duplicate nodes.
distinctNodes <- function(cl) {
  parts <- clustersOf(cl)
  cl[sort(unlist(lapply(parts, function(part) part$indices[!duplicated(part$ranks)])))]
}

#' @export
c.RustCluster <- function(..., recursive = FALSE) {
  nodesOf <- function(x) {
    if (inherits(x, "RustNode")) return(list(x))
    # Nodes are lists with a class, in all packages.
    nodes <- is.list(x) && all(vapply(unclass(x), function(node) is.list(node) && is.object(node), NA))
    if (!nodes) badArgument("...", "must be clusters, or nodes of clusters")
    attributes(x) <- NULL
    x
  }
  nodes <- do.call(c, lapply(list(...), nodesOf))
  # As in parallelly: the common class of the nodes.
  named(structure(nodes, class = c(if (all(areOurs(nodes))) "RustCluster", "cluster")))
}

#' @export
unique.RustCluster <- function(x, incomparables = FALSE, ...) {
  if (length(x)) distinctNodes(x) else x
}

# Methods for package parallelly ---------------------------------------------------------------------

#' @exportS3Method parallelly::as.cluster
as.cluster.RustCluster <- function(x, ...) named(x)

# Names a cluster for future's own plan(cluster, workers = cl), which identifies clusters by name. Without a name,
# future makes one from the contents of the nodes, which change for nodes of this package.
named <- function(cl) {
  nameOf <- function(node) paste(c(node$handle$id, as.integer(node$con), node$rank), collapse = "-")
  attr(cl, "name") <- paste(vapply(unclass(cl), nameOf, ""), collapse = " ")
  cl
}

#' @exportS3Method parallelly::as.cluster
as.cluster.RustNode <- function(x, ...) {
  named(structure(list(x), class = c("RustCluster", "cluster")))
}

# Returns NA for a node of a cluster that cannot be used here, such as one that was loaded from a file.
nodePid <- function(node) {
  handle <- node[["handle"]]
  if (handle$stopped) return(NA_integer_)
  pids <- hub_pids(handle$pointer)
  if (is.integer(pids)) pids[[node[["rank"]]]] else NA_integer_
}

nodeHost <- function(node) {
  handle <- node[["handle"]]
  handle$agents[[handle$owner[[node[["rank"]]]]]]
}

isLocalhostNode.RustNode <- function(node, ...) isTRUE(nodeHost(node)$local)

# Workers are forks of their agent, and not of this session.
isForkedNode.RustNode <- function(node, ...) FALSE

isNodeAlive.RustNode <- function(x, ...) {
  handle <- x[["handle"]]
  if (handle$stopped) return(FALSE)
  pids <- hub_pids(handle$pointer)
  if (is.integer(pids)) !is.na(pids[[x[["rank"]]]]) else NA
}

# A worker that is killed by a signal is replaced, as after any other worker failure.
killNode.RustNode <- function(x, signal = tools::SIGTERM, ...) {
  pid <- nodePid(x)
  if (is.na(pid)) return(FALSE)
  host <- nodeHost(x)
  if (isTRUE(host$local)) return(tools::pskill(pid, signal))
  command <- onHost(host, paste0("kill -", as.integer(signal), " ", pid))
  status <- system2(command[[1L]], shQuote(command[-1L]), stdout = FALSE, stderr = FALSE, timeout = 30)
  identical(as.integer(status), 0L)
}

# Starts another worker on the host of this node, in the same cluster. `cl[2] <- cloneNode(cl[2])` is the way to replace
# a node that was stopped.
cloneNode.RustNode <- function(x, ...) {
  cl <- structure(list(x), class = c("RustCluster", "cluster"))
  clustersOf(cl, "x")
  host <- nodeHost(x)
  if (!is.null(host$launcher) || !is.null(host$dial)) {
    badArgument("x", "is a node of a launcher and cannot be cloned; add workers with addWorkers()")
  }
  settings <- host[intersect(names(host), hostSettings)]
  settings$ncore <- 1L
  more <- addWorkers(cl, list(settings))
  more[[length(more)]]
}

# Registers methods for the generics that the installed version of parallelly has.
registerParallellyMethods <- function(...) {
  namespace <- asNamespace("parallelly")
  for (generic in c("isLocalhostNode", "isForkedNode", "isNodeAlive", "killNode", "cloneNode")) {
    if (!exists(generic, namespace, inherits = FALSE)) next
    registerS3method(generic, "RustNode", get(paste0(generic, ".RustNode"), topenv()), envir = namespace)
  }
}

# Printing clusters and nodes ------------------------------------------------------------------

#' Process ids of workers and agents
#'
#' The session knows the process ids, and asks no worker.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one.
#' @return `clusterPids()`: integer, the pid of the worker of each node, on its host; `NA` if the worker has died or was
#'   stopped. `agentPids()`: integer, the pids of the agents that run, one for each host.
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_forked`, `rustcluster_restored`.
#' @seealso [clusterAlive()] for the part of a cluster whose workers are alive.
#' @examples
#' cl <- makeRustCluster(2)
#' clusterPids(cl)
#' parallel::stopCluster(cl)
#' @export
clusterPids <- function(cl) {
  byNode(clustersOf(cl), function(handle, ranks) {
    if (handle$stopped) return(rep(NA_integer_, length(ranks)))
    checked(hub_pids(handle$pointer), handle)[ranks]
  })
}

#' @rdname clusterPids
#' @export
agentPids <- function(cl) {
  unlist(lapply(clustersOf(cl), function(part) {
    if (part$handle$stopped) return(integer())
    checked(hub_agent_pids(part$handle$pointer), part$handle)
  }))
}

#' The part of a cluster whose workers are alive
#'
#' Returns the nodes of a cluster whose workers are alive, as a cluster, in the order of `cl`. Use it to
#' go on without a lost host or worker: calls that are bound to the nodes of a lost host fail until the
#' host is back (see [rustcluster_faults]). The session knows which workers are alive and asks none.
#'
#' @param cl A cluster made by [makeRustCluster()], a part of one, or nodes of several; a node may be in
#'   it more than once.
#' @return A cluster of the same class as `cl`, of length 0 if no worker is alive, as after
#'   `stopCluster()`. A worker that is being replaced counts as alive. A worker that could not be
#'   restored, or whose host is lost, does not count until it is back.
#' @section Errors:
#' `rustcluster_bad_argument`, also if `cl` has nodes of other packages, such as those of a PSOCK
#' cluster; `rustcluster_forked`, `rustcluster_restored`.
#' @seealso [clusterPids()], [clusterStatus()]
#' @examples
#' cl <- makeRustCluster(3)
#' parallel::stopCluster(cl[2])
#' rest <- clusterAlive(cl)
#' length(rest)
#' parallel::clusterCall(rest, function() "alive")
#' parallel::stopCluster(cl)
#' @export
clusterAlive <- function(cl) {
  # A cluster without any node is valid here.
  if (!missing(cl) && inherits(cl, "RustCluster") && !length(cl)) return(cl)
  alive <- !is.na(clusterPids(cl))
  cl[alive]
}

# Returns the nodes of a cluster whose workers are alive, or may still join with their hosts.
leftNodes <- function(cl) {
  handle <- clusterHandle(cl)
  ranks <- vapply(unclass(cl), .subset2, 0L, "rank")
  cl[!is.na(clusterPids(cl)) | ranks %in% checked(hub_awaited(handle$pointer, FALSE), handle)]
}

# Returns why a cluster cannot be used, as part of a sentence; "" for a usable one.
fate <- function(handle) {
  pids <- if (!handle$stopped) hub_pids(handle$pointer)
  if (isFailure(pids) && identical(pids[["kind"]], "restored") && !is.null(handle$linger)) {
    return(lingerFate(handle$linger$id))
  }
  kind <- if (handle$stopped) "stopped" else if (isFailure(pids)) pids[["kind"]] else ""
  switch(kind,
    stopped = " that has been stopped",
    restored = paste0(
      " that was saved and loaded, or copied to another process: its workers belong to the session that ",
      "made them"
    ),
    forked = " that belongs to the process that this one was forked from",
    ""
  )
}

#' @export
print.RustCluster <- function(x, ...) {
  cat(format(x), "\n", sep = "")
  handles <- lapply(clustersAmong(x, which(areOurs(x))), `[[`, "handle")
  unusable <- vapply(handles, function(handle) {
    fate <- fate(handle)
    !handle$stopped && nzchar(fate) && !grepl("waits for its session|session uses", fate)
  }, NA)
  if (any(unusable)) cat("Create a new one with makeRustCluster()\n")
  invisible(x)
}

#' @export
format.RustCluster <- function(x, ...) {
  if (!length(x)) return("socket cluster without nodes")
  for (part in clustersAmong(x, which(areOurs(x)))) nameStarted(part$handle)
  hosts <- unique(vapply(x, `[[`, "", "host"))
  text <- sprintf(
    ngettext(
      length(hosts), "socket cluster with %d nodes on host %s",
      "socket cluster with %d nodes on hosts %s"
    ),
    length(x), paste(sQuote(hosts), collapse = ", ")
  )
  parts <- clustersAmong(x, which(areOurs(x)))
  of <- vapply(parts, function(part) {
    stopped <- part$indices[!part$ranks %in% part$handle$alive]
    fate <- fate(part$handle)
    if (length(stopped) == length(x)) fate <- fate(list(stopped = TRUE))
    if (nzchar(fate) && length(part$indices) == length(x)) return(fate)
    if (nzchar(fate)) return(paste0(", ", spanText(part$indices, "node"), " of a cluster", fate))
    paste0(
      if (length(stopped)) paste0(", ", spanText(stopped, "node"), " stopped"), lostNodes(part, stopped)
    )
  }, "")
  paste(c(text, of), collapse = "")
}

# Returns which nodes wait for their hosts and which are lost, apart from those that were stopped, as part of a
# sentence; "" for none.
lostNodes <- function(part, stopped) {
  handle <- part$handle
  pids <- if (!handle$stopped) hub_pids(handle$pointer)
  if (!is.integer(pids)) return("")
  lost <- is.na(pids[part$ranks]) & !part$indices %in% stopped
  if (!any(lost)) return("")
  owner <- handle$owner[part$ranks]
  known <- checked(hub_hosts(handle$pointer))
  waits <- lost & known$awaited[owner] == 1
  lost <- lost & !waits
  hosts <- which(!is.na(known$reason))
  texts <- if (any(waits)) paste(spanText(part$indices[waits], "node"), "waiting")
  texts <- c(texts, vapply(intersect(owner[lost], hosts), function(host) {
    indices <- part$indices[lost & owner == host]
    paste0(spanText(indices, "node"), " lost with host ", sQuote(handle$agents[[host]]$host))
  }, ""))
  dead <- part$indices[lost & !owner %in% hosts]
  if (length(dead)) {
    whose <- if (length(dead) > 1L) "whose workers have died" else "whose worker has died"
    texts <- c(texts, paste(spanText(dead, "node"), whose))
  }
  paste0(", ", texts, collapse = "")
}

#' @export
`[.RustCluster` <- function(x, i) {
  if (!missing(i)) i <- plain(i)
  # Fast path for valid indices, which most calls have.
  there <- !missing(i) && is.numeric(i) && !is.object(i) && isTRUE(all(i >= 1 & i <= length(x)))
  part <- if (there) .subset(x, i) else tryCatch(.subset(x, i), error = function(e) {
    badArgument("i", "must be indices of nodes, or a logical vector")
  })
  if (!there && !all(lengths(part, FALSE))) {
    badArgument("cl", "has ", length(x), ngettext(length(x), " node", " nodes"), "; an index is out of range")
  }
  class(part) <- oldClass(x)
  # stopCluster() of a cluster stops the workers that were added to it, too, but not of a part: see withAdded().
  if (!is.null(attr(x, "added")) && length(part) < length(x)) attr(part, "added") <- FALSE
  part
}

#' @export
print.RustNode <- function(x, ...) {
  handle <- x[["handle"]]
  fate <- fate(handle)
  if (!nzchar(fate)) {
    pid <- checked(hub_pids(handle$pointer), handle)[[x[["rank"]]]]
    fate <- if (is.na(pid)) " whose worker has died or was stopped" else paste(" with pid", pid)
  }
  cat(format(x), fate, "\n", sep = "")
  invisible(x)
}

#' @export
format.RustNode <- function(x, ...) {
  sprintf("node of a socket cluster on host %s", sQuote(x[["host"]]))
}

#' @importFrom utils str
#' @export
str.RustCluster <- function(object, ...) {
  cat(" ", format(object), "\n", sep = "")
}

#' @export
str.RustNode <- function(object, ...) {
  cat(" ", format(object), ", rank ", object[["rank"]], fate(object[["handle"]]), "\n", sep = "")
}
