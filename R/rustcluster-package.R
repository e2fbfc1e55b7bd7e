#' rustcluster: drive hundreds of R workers from stock R
#'
#' [makeRustCluster()] is a drop-in for [parallel::makeCluster()]: the functions
#' of \pkg{parallel} work on what it returns as they do on a PSOCK cluster. An
#' event loop in Rust does all the socket work, so that R's table of 128
#' connections, and with it the limit of 125 workers, does not matter.
#'
#' @seealso [makeRustCluster()], [rustcluster_conditions]
#'
#' @keywords internal
#' @useDynLib rustcluster, .registration = TRUE
"_PACKAGE"
