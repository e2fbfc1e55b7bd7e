# A backend for package 'future'. A future is a call for whoever is free, of which there are never more than
# there are workers: creating another waits, as future's own backends do. Versions of future before 1.40
# make futures by calling the backend's function; later ones have an object of class "FutureBackend".

#' Futures on a cluster
#'
#' A backend for package \pkg{future}: `plan(rustcluster::cluster_rust, workers = cl)`. Futures are resolved on
#' whichever worker is free; with as many futures as there are workers under way, making another waits.
#' `resolved()` does not wait. Output and conditions are relayed as by `multisession`, those of class
#' `"immediateCondition"`, as those of \pkg{progressr}, while the future runs. What futures leave behind on
#' their workers is as with [clusterSubmit()]; what `clusterExport()` has put there stays. One that nobody
#' holds any more runs to its end all the same. Nested futures are sequential, unless the plan says
#' otherwise. A future that is lost with its worker is tried again, as often as `retries` of the cluster
#' says; then it is a `FutureError` that tells how its workers ended.
#' \pkg{future.apply}, \pkg{furrr} and \pkg{doFuture}, the last with `%dopar%` and `%dofuture%`, work over it.
#'
#' `plan(cluster, workers = cl)` with a cluster made by [makeRustCluster()] works too, but `resolved()` waits
#' there, which versions of future before 1.40 warn of, and progress comes at the end.
#'
#' @param ... Further arguments of \pkg{future}'s.
#' @param workers A cluster made by [makeRustCluster()]. Or what that takes as its `spec`, such as a number:
#'   then the plan makes a cluster of its own, which is stopped when the plan is changed.
#'   `NULL`: as many workers as there are usable cores.
#' @return Not called by itself: see [future::plan()].
#' @section Errors:
#' Errors of a future's expression are raised by `value()` as they were raised. A `FutureError` has a field
#' `parent`, the condition of ours: see [clusterSubmit()].
#' @examplesIf requireNamespace("future", quietly = TRUE)
#' cl <- makeRustCluster(2)
#' old <- future::plan(cluster_rust, workers = cl)
#' x <- 20
#' f <- future::future(x + 1)
#' future::resolved(f)
#' future::value(f)
#' future::plan(old)
#' parallel::stopCluster(cl)
#' @export
cluster_rust <- structure(
  function(..., workers = NULL) legacyFuture(..., workers = workers),
  class = c("cluster_rust", "multiprocess", "future", "function"),
  init = TRUE,
  tweakable = "workers",
  factory = function(workers = NULL, ...) futureBackend(workers, ...),
  # The end of a plan. From 1.40 on, stopWorkers() is told of it, and knows whose cluster it is.
  cleanup = function() if (!exists("launchFuture", asNamespace("future"))) stopPlanned()
)

# For future's own plan(cluster, workers = cl). It knows clusters by their names, which it makes of what is in
# them if they have none: of ours, that changes.
#' @exportS3Method parallelly::as.cluster
as.cluster.RustCluster <- function(x, ...) {
  ranks <- vapply(x, .subset2, 0L, "rank")
  attr(x, "name") <- paste(c(clusterHandle(x)$id, ranks), collapse = "-")
  x
}

# The cluster that a plan has made for itself, and of what.
planned <- new.env(parent = emptyenv())

stopPlanned <- function() {
  cl <- planned$cl
  planned$cl <- NULL
  planned$spec <- NULL
  if (!is.null(cl)) stopCluster.RustCluster(cl)
  invisible()
}

plannedCluster <- function(workers) {
  if (is.function(workers)) workers <- workers()
  if (inherits(workers, "RustCluster")) return(workers)
  if (is.null(workers)) workers <- usableCores()
  alive <- !is.null(planned$cl) && !planned$cl[[1L]][["handle"]]$stopped
  if (!alive || !identical(planned$spec, workers)) {
    stopPlanned()
    planned$cl <- clusterFor(workers)
    planned$spec <- workers
    # Versions before 1.34 end with a plan what is registered here, and nothing else.
    registry <- get0("ClusterRegistry", asNamespace("future"))
    if (!is.null(registry)) assign("cluster", planned$cl, environment(registry))
  }
  planned$cl
}

# What is wrong with it is wrong with the plan's argument.
clusterFor <- function(workers) {
  if (inherits(workers, "cluster")) {
    badArgument("workers", "is a cluster of another kind: plan(cluster, workers = ...) takes that")
  }
  tryCatch(makeRustCluster(workers, progress = FALSE), rustcluster_bad_argument = function(e) {
    if (e$argument != "spec") stop(e)
    badArgument("workers", sub("`spec` ", "", conditionMessage(e), fixed = TRUE))
  })
}

# Futures under way, by their clusters' names.
openFutures <- new.env(parent = emptyenv())

futuresOf <- function(cl) {
  id <- cl[[1L]][["handle"]]$id
  futures <- Filter(function(future) isOpen(future$record), openFutures[[id]])
  if (length(futures)) assign(id, futures, openFutures) else rm(list = intersect(id, ls(openFutures)), envir = openFutures)
  futures
}

isOpen <- function(record) record$state == "open"

clusterOf <- function(future) {
  backend <- future[["backend"]]
  if (is.null(backend)) future$workers else backend[["workers"]]
}

freeWorkers <- function(cl) {
  handle <- cl[[1L]][["handle"]]
  lookAtCalls(handle)
  for (future in futuresOf(cl)) lookAt(future$record)
  max(0L, length(cl) - length(futuresOf(cl)))
}

# Ends when a worker is free.
awaitFree <- function(cl) {
  handle <- cl[[1L]][["handle"]]
  while (!freeWorkers(cl)) {
    record <- futuresOf(cl)[[1L]]$record
    checked(call_wait(handle$pointer, record$task), handle)
    takeAsides(record)
    showEvents(handle)
    Sys.sleep(0)
  }
}

launch <- function(future, cl, args) {
  awaitFree(cl)
  label <- future$label
  if (is.null(label)) label <- "a future"
  record <- submit(cl, evaluateCall, args, label, tells = TRUE)
  # Whoever waits for any of them is told of its end.
  call_watch(record$handle$pointer, record$task)
  future$record <- record
  future$state <- "running"
  id <- cl[[1L]][["handle"]]$id
  assign(id, c(openFutures[[id]], list(future)), openFutures)
  invisible(future)
}

# Before 1.40 ----------------------------------------------------------------------------------------

legacyFuture <- function(..., lazy = FALSE, workers) {
  cl <- plannedCluster(workers)
  make <- get("MultiprocessFuture", asNamespace("future"))
  future <- make(..., lazy = lazy)
  future$workers <- cl
  class(future) <- c("RustFuture", class(future))
  if (!lazy) future <- future::run(future)
  invisible(future)
}

run.RustFuture <- function(future, ...) {
  namespace <- asNamespace("future")
  if (future$state != "created") {
    stop(future::FutureError("A future can only be launched once.", future = future))
  }
  get("assertOwner", namespace)(future)
  immediate <- getOption("future.relay.immediate", "immediateCondition")
  conditions <- future$conditions
  if (length(conditions)) {
    excluded <- attr(conditions, "exclude", exact = TRUE)
    conditions <- unique(c(conditions, immediate))
    attr(conditions, "exclude") <- excluded
  }
  expr <- future$expr
  if (length(conditions)) expr <- relayed(expr, immediate)
  expr <- get("getExpression", namespace)(future, expr = expr, conditionClasses = conditions)
  globals <- as.list(future$globals)
  packages <- future$packages
  launch(future, future$workers, list(
    expr = expr, variables = list(), globals = globals[as.character(names(globals))], packages = as.character(packages)
  ))
}

# From 1.40 on ---------------------------------------------------------------------------------------

futureBackend <- function(workers, ...) {
  cl <- plannedCluster(workers)
  make <- get("MultiprocessFutureBackend", asNamespace("future"))
  backend <- make(workers = cl, reg = paste0("workers-", cl[[1L]][["handle"]]$id), ...)
  backend[["futureClasses"]] <- c("RustFuture", backend[["futureClasses"]])
  structure(backend, class = c("RustFutureBackend", class(backend)))
}

launchFuture.RustFutureBackend <- function(backend, future, ...) {
  data <- get("getFutureData", asNamespace("future"))(future, mc.cores = 1L)
  launch(future, backend[["workers"]], list(
    expr = quote(base::asNamespace("future")$evalFuture(data)), variables = list(data = data),
    globals = list(), packages = character()
  ))
}

getFutureBackendConfigs.RustFuture <- function(future, ...) {
  conditions <- future[["conditions"]]
  if (is.null(conditions)) return(list())
  classes <- attr(conditions, "immediateConditionClasses", exact = TRUE)
  if (is.null(classes)) classes <- "immediateCondition"
  if (!length(classes)) return(list())
  handlers <- rep(list(relayToHead), length(classes))
  list(capture = list(immediateConditionHandlers = structure(handlers, names = classes)))
}

interruptFuture.RustFutureBackend <- function(backend, future, ...) {
  if (isTRUE(backend[["interrupts"]])) {
    if (!is.null(future$record)) cancelCall(future$record)
    future[["state"]] <- "interrupted"
  }
  future
}

stopWorkers.RustFutureBackend <- function(backend, interrupt = TRUE, ...) {
  cl <- backend[["workers"]]
  if (interrupt) for (future in futuresOf(cl)) cancelCall(future$record)
  if (identical(cl, planned$cl)) stopPlanned()
  invisible(TRUE)
}

nbrOfWorkers.RustFutureBackend <- function(evaluator) length(evaluator[["workers"]])

nbrOfFreeWorkers.RustFutureBackend <- function(evaluator, background = FALSE, ...) {
  freeWorkers(evaluator[["workers"]])
}

# Of both --------------------------------------------------------------------------------------------

# What is asked of a plan before it has made its cluster does not make it: workers, too, are told the plan
# of the session.
workersOf <- function(evaluator) {
  workers <- eval(formals(evaluator)$workers, baseenv())
  if (is.function(workers)) workers <- workers()
  if (is.null(workers)) workers <- usableCores()
  is_count <- is.numeric(workers) && is.null(names(workers)) && !identical(planned$spec, workers)
  if (is_count) as.integer(workers) else plannedCluster(workers)
}

nbrOfWorkers.cluster_rust <- function(evaluator) {
  workers <- workersOf(evaluator)
  if (is.integer(workers)) workers else length(workers)
}

nbrOfFreeWorkers.cluster_rust <- function(evaluator, background = FALSE, ...) {
  workers <- workersOf(evaluator)
  if (is.integer(workers)) workers else freeWorkers(workers)
}

resolved.RustFuture <- function(x, ...) {
  if (x$state == "created") {
    # Who only wants to know does not wait for a worker.
    cl <- clusterOf(x)
    if (!is.null(cl) && !freeWorkers(cl)) return(FALSE)
    return(NextMethod())
  }
  if (is.null(x$result) && !is.null(x$record)) {
    lookAtCalls(x$record$handle)
    lookAt(x$record)
    takeAsides(x$record)
    relayAsides(x)
    if (isOpen(x$record)) return(FALSE)
    collect(x)
  }
  if (inherits(x$result, "FutureError")) return(TRUE)
  NextMethod()
}

result.RustFuture <- function(future, ...) {
  if (future$state == "created") future <- future::run(future)
  while (is.null(future$result)) {
    awaitCall(future$record)
    relayAsides(future)
    if (!isOpen(future$record)) collect(future)
  }
  if (inherits(future$result, "FutureError")) stop(future$result)
  future$result
}

# The call has ended: the future's result is what that gave, or why there is none.
collect <- function(future) {
  record <- future$record
  result <- record$result
  if (record$state == "done" && inherits(result, "FutureResult")) {
    result$conditions <- c(future$.signaledConditions, result$conditions)
    future$.signaledConditions <- NULL
    future$result <- result
    future$state <- "finished"
  } else if (inherits(result, "FutureLaunchError")) {
    # Newer versions say so themselves if a worker could not begin, as without a package.
    future$result <- result
    future$state <- "failed"
  } else {
    why <- if (inherits(result, "condition")) conditionMessage(result) else "its worker sent something else than a result"
    label <- if (is.null(future$label)) "<none>" else future$label
    kind <- "FutureError"
    interrupted <- inherits(result, "rustcluster_error") || record$state == "cancelled"
    # Newer versions tell what was interrupted from what was wrong.
    if (interrupted && exists("FutureInterruptError", asNamespace("future"))) kind <- "FutureInterruptError"
    error <- get(kind, asNamespace("future"))(
      paste0("Future (", label, ") could not be resolved: ", why), future = future
    )
    error$parent <- result
    future$result <- error
    if (!future$state %in% c("canceled", "interrupted")) future$state <- if (kind == "FutureError") "failed" else "interrupted"
  }
  futuresOf(clusterOf(future))
  future
}

# Conditions that a future has signaled while it runs, as future itself relays them.
relayAsides <- function(future) {
  # One at a time: each may be turned into a jump.
  record <- future$record
  while (length(record$asides)) {
    condition <- record$asides[[1L]]
    record$asides <- record$asides[-1L]
    condition$signaled <- 1L
    entry <- list(condition = condition, signaled = 1L)
    future$.signaledConditions <- c(future$.signaledConditions, list(entry))
    if (inherits(condition, "message")) message(condition)
    else if (inherits(condition, "warning")) warning(condition)
    else if (!inherits(condition, "error")) signalCondition(condition)
  }
}

# In a worker: tells the head of a condition. FALSE: it is not to be recorded there as well.
relayToHead <- function(condition) {
  base::asNamespace("rustcluster")$tellHead(condition)
  FALSE
}

# The expression, with conditions of these classes told to the head as they are signaled, and nobody else.
relayed <- function(expr, classes) {
  handlers <- rep(list(quote(base::asNamespace("rustcluster")$relayAndMuffle)), length(classes))
  names(handlers) <- classes
  as.call(c(list(quote(base::withCallingHandlers), expr), handlers))
}

relayAndMuffle <- function(condition) {
  relayToHead(condition)
  for (restart in computeRestarts(condition)) {
    if (startsWith(restart$name, "muffle")) invokeRestart(restart)
  }
}

# Generics of future, as far as its version has them.
registerFutureMethods <- function(...) {
  namespace <- asNamespace("future")
  methods <- c(
    run = "RustFuture", resolved = "RustFuture", result = "RustFuture", getFutureBackendConfigs = "RustFuture",
    launchFuture = "RustFutureBackend", interruptFuture = "RustFutureBackend",
    stopWorkers = "RustFutureBackend", nbrOfWorkers = "RustFutureBackend",
    nbrOfFreeWorkers = "RustFutureBackend", nbrOfWorkers = "cluster_rust", nbrOfFreeWorkers = "cluster_rust"
  )
  for (i in seq_along(methods)) {
    generic <- names(methods)[[i]]
    # Later versions run futures by launchFuture().
    if (generic == "run" && exists("launchFuture", namespace)) next
    if (!exists(generic, namespace, inherits = FALSE)) next
    method <- get(paste0(generic, ".", methods[[i]]), topenv())
    registerS3method(generic, methods[[i]], method, envir = namespace)
  }
}
