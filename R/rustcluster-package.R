#' rustcluster: drive hundreds of R workers from stock R
#'
#' [makeRustCluster()] is a drop-in for [parallel::makeCluster()]: the functions
#' of \pkg{parallel} work on what it returns as they do on a PSOCK cluster. An
#' event loop in Rust does all the socket work, so that R's table of 128
#' connections, and with it the limit of 125 workers, does not matter.
#'
#' @section Conditions:
#' Every error of this package has class `"rustcluster_error"` and, before it,
#' one of
#' \describe{
#'   \item{`rustcluster_bad_argument`}{an argument is not what it should be; field `argument`.}
#'   \item{`rustcluster_not_yet`}{asked for is what this version cannot do.}
#'   \item{`rustcluster_limits`}{the system's limits are too low; fields `what`, `needed`, `available`.}
#'   \item{`rustcluster_start_failed`}{the cluster could not be started, and nothing of it is left; fields `host`, `stderr`.}
#'   \item{`rustcluster_install_failed`}{[installOnHosts()] failed on some hosts; fields `host`, `report`.}
#'   \item{`rustcluster_worker_lost`}{a worker ended in the middle of a task, or before one; fields `host`, `rank`, `pid`, `signal` or `status`, `stderr`, `memory_available` (bytes), `oom` (logical: it looks as if its host ran out of memory).}
#'   \item{`rustcluster_host_failed`}{a host's agent, or the way to it, was lost; fields `host`, `rank`.}
#'   \item{`rustcluster_protocol`}{an answer could not be read.}
#'   \item{`rustcluster_no_task`}{an answer was asked for, and nothing had been sent.}
#'   \item{`rustcluster_stopped`}{the cluster, or this node, has been stopped.}
#'   \item{`rustcluster_forked`}{the cluster belongs to the process that this one was forked from.}
#'   \item{`rustcluster_restored`}{the cluster was saved and loaded: it belongs to a session that has ended.}
#' }
#' Warnings are of class `"rustcluster_warning"` and one of
#' `rustcluster_host_left_out` (a host could not be started, and
#' `onFailure = "warn"`; fields `host`, `report`), `rustcluster_versions` (R is
#' another version there; field `host`), `rustcluster_worker_replaced` (a
#' worker did not heed an interrupt, was killed, and has been replaced by a
#' fresh one; fields `rank`, `host`) and `rustcluster_left_behind` (a process
#' that a worker had started, and that made itself independent of it, goes on
#' after its worker's end; fields `host`, `rank`, or `NA` if it is not known,
#' `pid`, `command`).
#'
#' @keywords internal
#' @useDynLib rustcluster, .registration = TRUE
"_PACKAGE"
