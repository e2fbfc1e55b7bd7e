#' rustcluster: drive hundreds of R workers from stock R
#'
#' [makeRustCluster()] is a drop-in for [parallel::makeCluster()]: the functions of \pkg{parallel} work on its value as
#' on a PSOCK cluster. An event loop in Rust does all socket I/O. R's table of 128 connections, which limits a PSOCK
#' cluster to 125 workers, is not used.
#'
#' `demo("rustcluster")` is a tour of a few seconds on two workers. `vignette("cheatsheet", "rustcluster")` lists tasks
#' with their calls on one page, and `vignette("rustcluster")` is the introduction.
#'
#' | Task | Functions |
#' |---|---|
#' | make and end a cluster | [makeRustCluster()], `stopCluster()`, [addWorkers()], [removeWorkers()] |
#' | use other hosts | `makeRustCluster(c(node1 = 64, node2 = 64))`, [installOnHosts()], [clusterHosts()] |
#' | use batch engines | [slurm()], [htcondor()], [gridEngine()], [pbs()], [lsf()], [allocation()] |
#' | run | `parLapply()` and the other [verbs] of \pkg{parallel}, [clusterLapply()], [clusterSubmit()] |
#' | survive the session | [clusterLapply()] with `.store`, [startRun()], [openRun()], [reattachCluster()] |
#' | watch | [clusterDashboard()], [clusterTop()], [clusterStatus()], [clusterTimeline()] |
#' | use other packages | [registerDoRustCluster()], [cluster_rust()] |
#'
#' @section Masked functions:
#' `library(rustcluster)` attaches \pkg{parallel}, and then functions with the names of 13 functions of \pkg{parallel},
#' such as `parLapply()`, which mask those. They take the same arguments and return the same results, for any cluster:
#' see [verbs]. They are therefore not listed when the package is attached. R lists all masked functions if there is
#' any other conflict, such as a function `clusterTop()` of your own. Packages that are attached later, such as
#' \pkg{snow}, may mask functions of this package, and R lists those. Write `rustcluster::parLapply()` or
#' `parallel::parLapply()` then; both work.
#'
#' With `options(conflicts.policy = "strict")`, a package may mask nothing without permission. Give it before
#' `library(rustcluster)`: `conflictRules("rustcluster", mask.ok = list(parallel = TRUE))`. Policy `"depends.ok"` needs
#' no permission, and lists the functions.
#' @seealso [makeRustCluster()], [rustcluster_conditions]
#'
#' @keywords internal
#' @useDynLib rustcluster, .registration = TRUE
"_PACKAGE"
