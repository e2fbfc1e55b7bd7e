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
#'   \item{`rustcluster_start_failed`}{the cluster could not be started, and nothing of it is left; fields `host`,
#'     `stderr`.}
#'   \item{`rustcluster_install_failed`}{[installOnHosts()] failed on some hosts; fields `host`, `report`.}
#'   \item{`rustcluster_worker_lost`}{a worker ended in the middle of a task, or before one, and the task is not to
#'     be tried again (`retries = 0`), or nobody takes the worker's place now; fields `host`, `rank`, `pid`, `signal`
#'     or `status`, `stderr`, `memory_available` (bytes), `oom` (logical, whether the host seems to have run out of
#'     memory), `replaced` (logical), `retry` (number, seconds until the worker is tried again; only if it is).}
#'   \item{`rustcluster_element_failed`}{the function raised an error for an element of [clusterLapply()]; fields
#'     `index`, `indices`, `results`, `parent`.}
#'   \item{`rustcluster_aborted`}{a call or an element jumped to R's top level, by `stop()` with a condition that is
#'     no error (field `parent`) or `invokeRestart("abort")`.}
#'   \item{`rustcluster_task_failed`}{a task was lost with its worker too often; fields `index`, `losses`, `results`,
#'     `failures`: see [makeRustCluster()].}
#'   \item{`rustcluster_cancelled`}{a call of [clusterSubmit()] was cancelled.}
#'   \item{`rustcluster_call_failed`}{a call's value could not be sent, or it was interrupted.}
#'   \item{`rustcluster_timeout`}{a task took longer than `timeout`; fields `host`, `rank`, `index`, `results`,
#'     `failures`.}
#'   \item{`rustcluster_host_failed`}{a host's agent, or the way to it, was lost; fields `host`, `rank`.}
#'   \item{`rustcluster_protocol`}{an answer could not be read: it is damaged, or needs a package or memory that is
#'     not there; fields `parent`, and of a verb `results`, `failures`.}
#'   \item{`rustcluster_no_task`}{an answer was asked for, and nothing had been sent.}
#'   \item{`rustcluster_stopped`}{the cluster, or this node, has been stopped.}
#'   \item{`rustcluster_forked`}{the cluster belongs to the process that this one was forked from.}
#'   \item{`rustcluster_restored`}{the cluster was saved and loaded: it belongs to a session that has ended.}
#' }
#' Warnings are of class `"rustcluster_warning"` and one of
#' \describe{
#'   \item{`rustcluster_worker_lost`}{a worker ended and is being replaced (field `replaced`), or could not be
#'     restored (`retry`); its task, if it had one, is tried again. Fields as above.}
#'   \item{`rustcluster_worker_replaced`}{a worker did not heed an interrupt, was killed, and has been replaced;
#'     fields `rank`, `host`.}
#'   \item{`rustcluster_host_failed`}{a host was lost, or is left out because its workers were lost again and again;
#'     fields `host`, `reason`.}
#'   \item{`rustcluster_state_not_kept`}{what lasts on a host's workers is more than is kept: they will not be
#'     replaced; field `host`.}
#'   \item{`rustcluster_left_behind`}{what a worker started has made itself independent and goes on; fields `host`,
#'     `rank`, `pid`, `command`.}
#'   \item{`rustcluster_stop_timeout`}{idle workers did not end within `stop_timeout` seconds when they were stopped,
#'     and were killed; fields `rank` (integer, of all of them), `host`.}
#'   \item{`rustcluster_host_left_out`}{a host could not be started, and `onFailure = "warn"`; fields `host`, `report`.}
#'   \item{`rustcluster_versions`}{R is another version there; field `host`.}
#' }
#' Messages of class `"rustcluster_host_back"` and `"rustcluster_worker_back"` tell that a lost host, or a
#' worker that could not be restored at first, is back.
#'
#' @keywords internal
#' @useDynLib rustcluster, .registration = TRUE
"_PACKAGE"
