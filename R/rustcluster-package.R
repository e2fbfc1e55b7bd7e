#' rustcluster: drive hundreds of R workers from stock R
#'
#' [makeRustCluster()] is a drop-in for [parallel::makeCluster()]: the functions of \pkg{parallel} work on its value as
#' on a PSOCK cluster. An event loop in Rust does all socket I/O. R's table of 128 connections, which limits a PSOCK
#' cluster to 125 workers, is not used.
#'
#' @seealso [makeRustCluster()], [rustcluster_conditions]
#'
#' @keywords internal
#' @useDynLib rustcluster, .registration = TRUE
"_PACKAGE"
