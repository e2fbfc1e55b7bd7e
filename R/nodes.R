# Nodes: those of several clusters, those beside other packages', and how clusters and nodes are looked at. Whatever
# takes a cluster takes any nodes of ours, or refuses others by name.

# Of each node, whether it is one of ours.
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

# The clusters that the nodes in these places are of: a list with, for each, its `handle`, the `places` of its
# nodes among all, and their `ranks`.
clustersAmong <- function(nodes, places = seq_along(nodes)) {
  nodes <- unclass(nodes)
  parts <- list()
  while (length(places)) {
    handle <- .subset2(nodes[[places[[1L]]]], "handle")
    own <- vapply(nodes[places], function(node) identical(.subset2(node, "handle"), handle), NA)
    ranks <- vapply(nodes[places[own]], function(node) as.integer(.subset2(node, "rank")), 0L)
    parts <- c(parts, list(list(handle = handle, places = places[own], ranks = ranks)))
    places <- places[!own]
  }
  parts
}

# The same of a cluster that a user has given.
clustersOf <- function(cl, argument = "cl") {
  if (missing(cl)) badArgument(argument, "is missing")
  if (inherits(cl, "RustCluster") && length(cl)) {
    # Nearly always they are of one cluster, which Rust finds out in less time.
    ranks <- cluster_ranks(cl)
    if (typeof(ranks) == "integer" && isNode(cl[[1L]])) {
      handle <- cl[[1L]][["handle"]]
      known <- range(ranks)
      if (known[[1L]] >= 1L && known[[2L]] <= length(handle$hosts)) {
        return(list(list(handle = handle, places = seq_along(ranks), ranks = ranks)))
      }
    }
  }
  if (!inherits(cl, "cluster") || !is.list(cl)) badArgument(argument, "must be a cluster made by makeRustCluster()")
  if (!length(cl)) {
    badArgument(argument, "has no nodes: if all workers are gone, make another by makeRustCluster()")
  }
  ours <- areOurs(cl)
  if (!any(ours)) badArgument(argument, "must be a cluster made by makeRustCluster()")
  if (!all(ours)) {
    badArgument(
      argument, "has nodes that were not made by makeRustCluster(): ", spanText(which(!ours), "node")
    )
  }
  clustersAmong(cl)
}

# The handle of the one cluster that all nodes are of.
clusterHandle <- function(cl, argument = "cl") {
  parts <- clustersOf(cl, argument)
  if (length(parts) > 1L) {
    badArgument(argument, "has nodes of ", length(parts), " clusters, and must have those of one")
  }
  parts[[1L]]$handle
}

# The cluster that is meant: without one, parallel's default.
theCluster <- function(cl) {
  if (is.null(cl)) cl <- getDefaultCluster()
  if (is.null(cl)) badArgument("cl", "is missing, and no default is registered: see setDefaultCluster()")
  clustersOf(cl)
  cl
}

# One value for each node, in the order of the nodes. `of`: gives those of the nodes of one cluster.
byNode <- function(parts, of) {
  values <- lapply(parts, function(part) of(part$handle, part$ranks))
  unlist(values)[order(unlist(lapply(parts, `[[`, "places")))]
}

# Each node once.
distinctNodes <- function(cl) {
  parts <- clustersOf(cl)
  cl[sort(unlist(lapply(parts, function(part) part$places[!duplicated(part$ranks)])))]
}

#' @export
c.RustCluster <- function(..., recursive = FALSE) {
  nodesOf <- function(x) {
    if (inherits(x, "RustNode")) return(list(x))
    # Nodes of all packages are lists with a class.
    nodes <- is.list(x) && all(vapply(unclass(x), function(node) is.list(node) && is.object(node), NA))
    if (!nodes) badArgument("...", "must be clusters, or nodes of clusters")
    attributes(x) <- NULL
    x
  }
  nodes <- do.call(c, lapply(list(...), nodesOf))
  # As parallelly has it: the class that they have in common.
  named(structure(nodes, class = c(if (all(areOurs(nodes))) "RustCluster", "cluster")))
}

#' @export
unique.RustCluster <- function(x, incomparables = FALSE, ...) {
  if (length(x)) distinctNodes(x) else x
}

# Methods for package parallelly ---------------------------------------------------------------------

#' @exportS3Method parallelly::as.cluster
as.cluster.RustCluster <- function(x, ...) named(x)

# For future's own plan(cluster, workers = cl). It knows clusters by their names, which it makes of what is in
# them if they have none: of ours, that changes.
named <- function(cl) {
  nameOf <- function(node) paste(c(node$handle$id, as.integer(node$con), node$rank), collapse = "-")
  attr(cl, "name") <- paste(vapply(unclass(cl), nameOf, ""), collapse = " ")
  cl
}

#' @exportS3Method parallelly::as.cluster
as.cluster.RustNode <- function(x, ...) {
  named(structure(list(x), class = c("RustCluster", "cluster")))
}

# NA for a node of a cluster that cannot be used here, as one that was loaded from a file.
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

isLocalhostNode.RustNode <- function(node, ...) isTRUE(nodeHost(node)$here)

# Workers are forks of their agent, and not of this session.
isForkedNode.RustNode <- function(node, ...) FALSE

isNodeAlive.RustNode <- function(x, ...) {
  handle <- x[["handle"]]
  if (handle$stopped) return(FALSE)
  pids <- hub_pids(handle$pointer)
  if (is.integer(pids)) !is.na(pids[[x[["rank"]]]]) else NA
}

# A worker that ends by a signal is replaced, as after any other loss.
killNode.RustNode <- function(x, signal = tools::SIGTERM, ...) {
  pid <- nodePid(x)
  if (is.na(pid)) return(FALSE)
  host <- nodeHost(x)
  if (isTRUE(host$here)) return(tools::pskill(pid, signal))
  command <- sshCommand(host, paste0("kill -", as.integer(signal), " ", pid))
  status <- system2(command[[1L]], shQuote(command[-1L]), stdout = FALSE, stderr = FALSE, timeout = 30)
  identical(as.integer(status), 0L)
}

# A node is a process of its cluster's agent, which starts no others.
cloneNode.RustNode <- function(x, ...) {
  abort(
    "not_yet", "a node of a cluster made by makeRustCluster() cannot be cloned: make another cluster, and `c()` both"
  )
}

# As far as the version of parallelly has the generics.
registerParallellyMethods <- function(...) {
  namespace <- asNamespace("parallelly")
  for (generic in c("isLocalhostNode", "isForkedNode", "isNodeAlive", "killNode", "cloneNode")) {
    if (!exists(generic, namespace, inherits = FALSE)) next
    registerS3method(generic, "RustNode", get(paste0(generic, ".RustNode"), topenv()), envir = namespace)
  }
}

# Looking at clusters --------------------------------------------------------------------------

#' Process numbers of a cluster
#'
#' Known here already: no worker is asked.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one.
#' @return `clusterPids()`: integer, the pid of each node's worker, on its host;
#'   `NA` for one that is gone. `agentPids()`: integer, the pid of the agent on
#'   each host, without those that are gone.
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
  # The rest of a cluster of which nothing is left.
  if (!missing(cl) && inherits(cl, "RustCluster") && !length(cl)) return(cl)
  alive <- !is.na(clusterPids(cl))
  cl[alive]
}

# What is to be said of a cluster that cannot be used; "" of one that can.
fate <- function(handle) {
  pids <- if (!handle$stopped) hub_pids(handle$pointer)
  kind <- if (handle$stopped) "stopped" else if (isFailure(pids)) pids[["kind"]] else ""
  switch(kind,
    stopped = " that has been stopped",
    restored = paste0(
      " that was saved and loaded, or copied to another process: its workers belong to the session that ",
      "made them"
    ),
    forked = " of the process that this one was forked from",
    ""
  )
}

#' @export
print.RustCluster <- function(x, ...) {
  cat(format(x), "\n", sep = "")
  handles <- lapply(clustersAmong(x, which(areOurs(x))), `[[`, "handle")
  unusable <- vapply(handles, function(handle) !handle$stopped && nzchar(fate(handle)), NA)
  if (any(unusable)) cat("Make a new one with makeRustCluster()\n")
  invisible(x)
}

#' @export
format.RustCluster <- function(x, ...) {
  hosts <- unique(vapply(x, `[[`, "", "host"))
  text <- sprintf(
    ngettext(
      length(hosts), "socket cluster with %d nodes on host %s",
      "socket cluster with %d nodes on hosts %s"
    ),
    length(x), paste(sQuote(hosts), collapse = ", ")
  )
  parts <- clustersAmong(x, which(areOurs(x)))
  fates <- vapply(parts, function(part) fate(part$handle), "")
  if (length(parts) < 2L) return(paste0(text, fates))
  of <- vapply(parts, function(part) spanText(part$places, "node"), "")
  paste(c(text, paste0(", ", of, " of a cluster", fates)[nzchar(fates)]), collapse = "")
}

#' @export
`[.RustCluster` <- function(x, i) {
  if (!missing(i)) i <- plain(i)
  # Most calls ask for nodes that there are, by their numbers, which cannot fail and takes a fraction of the time.
  there <- !missing(i) && is.numeric(i) && !is.object(i) && isTRUE(all(i >= 1 & i <= length(x)))
  part <- if (there) .subset(x, i) else tryCatch(.subset(x, i), error = function(e) {
    badArgument("i", "must be numbers of nodes, or TRUE and FALSE")
  })
  if (!there && !all(lengths(part, FALSE))) {
    badArgument("cl", "has ", length(x), ngettext(length(x), " node", " nodes"), ", and others are asked for")
  }
  class(part) <- oldClass(x)
  part
}

#' @export
print.RustNode <- function(x, ...) {
  handle <- x[["handle"]]
  fate <- fate(handle)
  if (!nzchar(fate)) {
    pid <- checked(hub_pids(handle$pointer), handle)[[x[["rank"]]]]
    fate <- if (is.na(pid)) " whose worker is gone" else paste(" with pid", pid)
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
