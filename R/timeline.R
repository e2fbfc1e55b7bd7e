# clusterTimeline(): when workers were busy, as data. timeline-plot.R draws it.

#' Timeline of the workers of a cluster
#'
#' Returns when each worker was busy since the cluster was made. The session knows this already: it asks no worker, and
#' nothing has to be enabled in advance. The timeline of a stopped cluster is available, too.
#'
#' The history of a worker has a fixed maximum size (some 30 KB): 500 intervals and 50 worker failures. An interval of
#' less than 1 ms is merged into the next one if that follows within 1 ms. Whenever a worker has more than 500
#' intervals, this limit is doubled. Intervals that take more than a hundredth of the whole history are therefore never
#' merged, and `busy` and `tasks` are always exact.
#'
#' Workers measure how long their tasks take, for all tasks of a batch together. For large or complex results of
#' `clusterCall()` and of the functions of \pkg{parallel}, the measured time is that from sending the message until
#' the first byte of the result arrives.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one: then the result has these workers only.
#' @return A data frame of class `"rustcluster_timeline"`, with a row for each interval, in the order of nodes and
#'   times. A worker was idle between its intervals.
#'   \describe{
#'     \item{host, rank}{(character, integer) the node; if the nodes are of several clusters, `rank` is the index of
#'       the node in `cl`.}
#'     \item{start, end}{(numeric) seconds since the (first) cluster was made; attribute `"origin"` is that time, a
#'       date-time (POSIXct).}
#'     \item{kind}{(character) `"busy"`; `"transfer"`: the worker had a task whose message or result was being
#'       transferred; `"lost"`: from a worker failure until the worker was replaced.}
#'     \item{busy}{(numeric) busy seconds in the interval: less than its length if several intervals were merged.}
#'     \item{tasks}{(numeric) tasks that finished in the interval.}
#'   }
#'   Attribute `"workers"` is a data frame of `host` and `rank` of all nodes. Attribute `"now"` (numeric) is the time of
#'   the call in seconds.
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_forked`, `rustcluster_restored`.
#' @seealso [clusterStatus()].
#' @examples
#' cl <- makeRustCluster(4)
#' clusterApplyLB(cl, 1:20, function(i) Sys.sleep(i / 200))
#' timeline <- clusterTimeline(cl)
#' parallel::stopCluster(cl)
#' plot(timeline)
#' @order 1
#' @export
clusterTimeline <- function(cl) {
  parts <- clustersOf(cl)
  now <- Sys.time()
  rows <- lapply(parts, function(part) checked(hub_timeline(part$handle$pointer, unique(part$ranks))))
  ages <- vapply(rows, `[[`, 0, "now")
  timelines <- Map(timelineOf, parts, rows, max(ages) - ages, length(parts) > 1L)
  timeline <- do.call(rbind, lapply(timelines, `[[`, "intervals"))
  workers <- do.call(rbind, lapply(timelines, `[[`, "workers"))
  indices <- unlist(lapply(parts, function(part) part$indices[!duplicated(part$ranks)]))
  workers <- workers[order(indices), ]
  timeline <- timeline[order(match(paste(timeline$host, timeline$rank), paste(workers$host, workers$rank))), ]
  rownames(timeline) <- rownames(workers) <- NULL
  structure(
    timeline, class = c("rustcluster_timeline", "data.frame"), origin = now - max(ages), now = max(ages),
    workers = workers
  )
}

# Returns the workers of one cluster and their intervals, as data frames. `later`: seconds from the start of the oldest
# cluster to the start of this one. `several`: the nodes are of several clusters, and indices of nodes replace ranks.
timelineOf <- function(part, rows, later, several) {
  hosts <- part$handle$hosts
  distinct <- !duplicated(part$ranks)
  ranks <- part$ranks[distinct]
  known <- if (several) part$indices[distinct] else ranks
  list(
    intervals = data.frame(
      host = hosts[rows$rank], rank = as.integer(known[match(rows$rank, ranks)]),
      start = as.numeric(rows$start) + later, end = as.numeric(rows$end) + later,
      kind = as.character(rows$kind), busy = as.numeric(rows$busy), tasks = as.numeric(rows$tasks),
      stringsAsFactors = FALSE
    ),
    workers = data.frame(host = hosts[ranks], rank = as.integer(known), stringsAsFactors = FALSE)
  )
}

#' @rdname clusterTimeline
#' @order 3
#' @param n (integer) The maximum number of rows to print.
#' @export
print.rustcluster_timeline <- function(x, n = 10L, ...) {
  n <- plain(n)
  between(n, "n", "a number of rows", 0, Inf)
  plain <- as.data.frame(x)
  cat(counted(nrow(plain), "interval"), if (nrow(plain) > n) paste(", of which the first", n), "\n", sep = "")
  if (nrow(plain)) print(utils::head(plain, n), row.names = FALSE)
  invisible(x)
}
