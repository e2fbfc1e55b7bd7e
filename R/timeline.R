# When workers were busy, as data. The picture is in timeline-plot.R.

#' When the workers of a cluster were busy
#'
#' What each worker has been at since the cluster was made. It is known here already: no worker is asked,
#' and nothing is to be switched on before. Also of clusters that have been stopped.
#'
#' The history of a worker takes a bounded number of intervals, 500 and 50 losses, however long it is
#' (some 30 KB). From the beginning on, an interval of less than 1 ms becomes a part of the next one if that
#' follows within 1 ms; whenever there are too many, the same is done with twice that time. So intervals of
#' more than a hundredth of the time that all of them span stay as they are, and `busy` and `tasks` are
#' exact in any case.
#'
#' How long tasks take is measured by workers, together with those that cross with them; large or complex
#' results of `clusterCall()` and of \pkg{parallel}'s own verbs do not tell it, and for those it is the
#' time from when a message was sent to when the answer began to come.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one: then only of those workers.
#' @return A data frame of class `"rustcluster_timeline"`, with a row for each interval, in the order of
#'   nodes and times. What is in no interval was idle.
#'   \describe{
#'     \item{host, rank}{(character, integer) of the node; if the nodes are of several clusters, `rank` is the
#'       node's place in `cl`.}
#'     \item{start, end}{(numeric) in seconds since the (first) cluster was made: attribute `"origin"`, a
#'       date-time (POSIXct).}
#'     \item{kind}{(character) `"busy"`; `"transfer"`: it had a task, but message or answer were on their
#'       way; `"lost"`: from a loss until another has taken its place.}
#'     \item{busy}{(numeric) seconds of the interval in which it was busy: fewer than the interval has if
#'       it has been put together from several.}
#'     \item{tasks}{(numeric) tasks that were answered in it.}
#'   }
#'   Attribute `"workers"` is a data frame of `host` and `rank` of all nodes, `"now"` (numeric) is when it
#'   was made, in seconds.
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
  places <- unlist(lapply(parts, function(part) part$places[!duplicated(part$ranks)]))
  workers <- workers[order(places), ]
  timeline <- timeline[order(match(paste(timeline$host, timeline$rank), paste(workers$host, workers$rank))), ]
  rownames(timeline) <- rownames(workers) <- NULL
  structure(
    timeline, class = c("rustcluster_timeline", "data.frame"), origin = now - max(ages), now = max(ages),
    workers = workers
  )
}

# The workers of one cluster and their intervals, as data frames. `later`: seconds by which it is younger than
# the others. `several`: a rank does not tell which worker it is, and a node's place stands for it.
timelineOf <- function(part, rows, later, several) {
  hosts <- part$handle$hosts
  distinct <- !duplicated(part$ranks)
  ranks <- part$ranks[distinct]
  known <- if (several) part$places[distinct] else ranks
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
#' @param n (integer) Rows to show.
#' @export
print.rustcluster_timeline <- function(x, n = 10L, ...) {
  n <- plain(n)
  between(n, "n", "of rows", 0, Inf)
  plain <- as.data.frame(x)
  cat(counted(nrow(plain), "interval"), if (nrow(plain) > n) paste(", of which the first", n), "\n", sep = "")
  if (nrow(plain)) print(utils::head(plain, n), row.names = FALSE)
  invisible(x)
}
