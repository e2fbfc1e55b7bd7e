# A backend for package 'future'. A future is a call for whoever is free, of which there are never more than
# there are workers: creating another waits, as future's own backends do. Versions of future before 1.40
# make futures by calling the backend's function; later ones have an object of class "FutureBackend".

#' Futures on a cluster
#'
#' A backend for package \pkg{future}: `plan(rustcluster::cluster_rust, workers = cl)`. Futures are resolved on
#' whichever worker is free; with as many futures as there are workers under way, making another waits.
#' `resolved()` does not wait: a lazy future is begun by it if a worker is free. Output and conditions are relayed as by
#' future's own `cluster` backend, those of class `"immediateCondition"`, as those of \pkg{progressr}, while the future
#' runs or another waits for a worker. An error of that class cannot be relayed, and is a `FutureError`.
#' Option `future.wait.timeout` bounds the waiting for a worker. `nbrOfFreeWorkers()` counts workers whose future has
#' ended as free, also before its value was asked for. A plan may be set by the environment variable `R_FUTURE_PLAN`,
#' set aside and restored, nested and tweaked. What futures leave behind on
#' their workers is as with [clusterSubmit()]; what `clusterExport()` has put there stays. One that nobody
#' holds any more runs to its end all the same. Nested futures are sequential, unless the plan says
#' otherwise. A future that is lost with its worker is tried again, as often as `retries` of the cluster
#' says; then it is a `FutureError` that tells how its workers ended.
#' \pkg{future.apply}, \pkg{furrr} and \pkg{doFuture}, the last with `%dopar%` and `%dofuture%`, work over it.
#'
#' `plan(cluster, workers = cl)` with a cluster made by [makeRustCluster()] works, too. That backend does not
#' relay immediate conditions, such as the progress of \pkg{progressr}. Its `resolved()` uses one of R's connections for
#' each cluster, and waits if none is left.
#'
#' @param ... Further arguments of \pkg{future}'s.
#' @param workers A cluster made by [makeRustCluster()]. Or what that takes as its `spec`, such as a number:
#'   then the plan makes a cluster of its own, which is stopped when the plan is changed, and made anew when the plan
#'   is set again. Or a function that returns one of these. `NULL`, as by default: as many workers as there are usable
#'   cores.
#' @return Not called by itself: see [future::plan()].
#' @section Errors:
#' Errors of a future's expression are raised by `value()` as they were raised. A `FutureError` has a field
#' `parent`, the condition of ours: see [clusterSubmit()]. From version 1.40 of \pkg{future} on it is a
#' `FutureInterruptError` if the future was lost with its worker, and a `FutureCanceledError`, as far as the version has
#' that class, if it was cancelled, also by a change of the plan. `resolved()` and `value()` of a future without a value
#' are a `FutureError` in any session but the one that made it. `rustcluster_bad_argument` (field `argument`:
#' `"workers"`) is raised by `plan()`.
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
  function(..., workers = base::asNamespace("rustcluster")$usableCores()) legacyFuture(..., workers = workers),
  class = c("cluster_rust", "multiprocess", "future", "function"),
  init = TRUE,
  tweakable = "workers",
  factory = function(workers = NULL, ...) futureBackend(workers, ...),
  # The end of a plan. From 1.40 on, stopWorkers() is told of it, and knows whose cluster it is.
  cleanup = function() if (!exists("launchFuture", asNamespace("future"))) stopPlanned()
)

# The cluster that the current plan has made for itself, and of what.
planned <- new.env(parent = emptyenv())

stopPlanned <- function() {
  cl <- planned$cl
  planned$cl <- NULL
  planned$spec <- NULL
  if (!is.null(cl)) stopCluster.RustCluster(cl)
  invisible()
}

# What a plan's `workers` stand for: a cluster, or what makeRustCluster() makes one of.
workersAsked <- function(workers) {
  if (is.function(workers)) workers <- workers()
  if (is.null(workers)) usableCores() else workers
}

plannedCluster <- function(workers) {
  workers <- workersAsked(workers)
  if (inherits(workers, "RustCluster")) {
    clusterHandle(workers, "workers")
    return(workers)
  }
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

# What is wrong with the argument of one of our functions is wrong with the plan's.
asWorkers <- function(code) {
  tryCatch(code, rustcluster_bad_argument = function(e) {
    if (!e$argument %in% c("spec", "cl")) stop(e)
    badArgument("workers", sub("`(spec|cl)` ", "", conditionMessage(e)))
  })
}

clusterFor <- function(workers) {
  if (inherits(workers, "cluster")) {
    badArgument("workers", "is a cluster of another kind: plan(cluster, workers = ...) takes that")
  }
  if (is.numeric(workers) && is.null(names(workers)) && length(workers) != 1L) {
    badArgument("workers", "must be a single number of workers, or numbers named by their hosts")
  }
  # A plan for this session is none for its workers.
  plan <- Sys.getenv("R_FUTURE_PLAN", NA)
  Sys.unsetenv("R_FUTURE_PLAN")
  on.exit(if (!is.na(plan)) Sys.setenv(R_FUTURE_PLAN = plan))
  asWorkers(makeRustCluster(workers, progress = FALSE))
}

# Futures under way, by their clusters' names: lists of `record` and `future`. A future that was cancelled may have
# been reset since, and its call is still under way.
openFutures <- new.env(parent = emptyenv())

# Futures under way on any of these nodes. Those that have ended get their results.
futuresOf <- function(cl) {
  id <- cl[[1L]][["handle"]]$id
  for (open in openFutures[[id]]) if (!isOpen(open$record)) {
    if (identical(open$future[["record"]], open$record)) collect(open$future) else dropFuture(open$record)
  }
  ranks <- checked(cluster_ranks(cl))
  Filter(function(open) any(open$record$ranks %in% ranks), openFutures[[id]])
}

isOpen <- function(record) record$state == "open"

dropFuture <- function(record) {
  id <- record$handle$id
  futures <- Filter(function(open) !identical(open$record, record), openFutures[[id]])
  if (length(futures)) {
    assign(id, futures, openFutures)
  } else {
    rm(list = intersect(id, ls(openFutures)), envir = openFutures)
  }
}

clusterOf <- function(future) {
  backend <- future[["backend"]]
  if (is.null(backend)) future$workers else backend[["workers"]]
}

freeWorkers <- function(cl) {
  lookAtCalls(cl[[1L]][["handle"]])
  for (open in futuresOf(cl)) {
    lookAt(open$record)
    takeAsides(open$record)
    if (identical(open$future[["record"]], open$record)) relayAsides(open$future)
  }
  max(0L, length(cl) - length(futuresOf(cl)))
}

# Ends when a worker is free. `limit`: seconds to wait at most.
awaitFree <- function(cl, limit) {
  handle <- cl[[1L]][["handle"]]
  began <- proc.time()[["elapsed"]]
  while (!freeWorkers(cl)) {
    waited <- proc.time()[["elapsed"]] - began
    if (waited > limit) {
      stop(future::FutureError(sprintf(
        "TIMEOUT: All %d cluster nodes are still occupied after %s (option future.wait.timeout)",
        length(cl), format(as.difftime(round(waited, 2L), units = "secs"))
      )))
    }
    checked(call_wait(handle$pointer, futuresOf(cl)[[1L]]$record$task), handle)
    showEvents(handle)
    Sys.sleep(0)
  }
}

# A lazy future that only resolved() begins is left as it is while all workers are taken: resolved() of it is FALSE.
leaveForLater <- function(future, cl) {
  if (freeWorkers(cl)) return()
  asked <- get("resolved.Future", asNamespace("future"))
  for (i in rev(seq_len(sys.nframe() - 1L))) {
    frame <- sys.frame(i)
    # `return()` there: the frames above it end as by any other jump.
    if (identical(sys.function(i), asked) && identical(frame$x, future)) do.call("return", list(FALSE), envir = frame)
  }
}

launch <- function(future, cl, args) {
  leaveForLater(future, cl)
  limit <- future[["backend"]][["wait.timeout"]]
  awaitFree(cl, if (is.null(limit)) getOption("future.wait.timeout", Inf) else limit)
  label <- if (is.null(future$label)) "a future" else future$label
  # As future itself: R warns of packages' environments in what is sent, which future attaches there.
  record <- suppressWarnings(submit(cl, evaluateCall, args, label, tells = TRUE))
  # Whoever waits for any of them is told of its end.
  call_watch(record$handle$pointer, record$task)
  future$record <- record
  future$state <- "running"
  countFuture(future, "launched")
  id <- record$handle$id
  assign(id, c(openFutures[[id]], list(list(record = record, future = future))), openFutures)
  invisible(future)
}

# For those who print a backend.
countFuture <- function(future, what) {
  backend <- future[["backend"]]
  counters <- backend[["counters"]]
  if (!what %in% names(counters)) return()
  counters[[what]] <- counters[[what]] + 1L
  backend[["counters"]] <- counters
}

# Errors about a future name it as future itself does.
labelOfFuture <- function(future) if (is.null(future$label)) "<none>" else future$label

# A future that has no result yet belongs to the session that made it.
assertOwner <- function(future) get("assertOwner", asNamespace("future"))(future)

# Before 1.40 ----------------------------------------------------------------------------------------

legacyFuture <- function(..., lazy = FALSE, workers) {
  ensureFutureMethods()
  cl <- plannedCluster(workers)
  make <- get("MultiprocessFuture", asNamespace("future"))
  future <- make(..., lazy = lazy)
  future$workers <- cl
  class(future) <- c("RustFuture", class(future))
  if (!lazy) future <- future::run(future)
  invisible(future)
}

# Conditions are captured as by future's cluster backend, so that the worker muffles what it records.
run.RustFuture <- function(future, ...) {
  namespace <- asNamespace("future")
  if (future$state != "created") {
    text <- sprintf("A future ('%s') can only be launched once.", labelOfFuture(future))
    stop(future::FutureError(text, future = future))
  }
  assertOwner(future)
  expr <- future$expr
  conditions <- future$conditions
  if (isTRUE(getOption("future.psock.relay.immediate", TRUE))) {
    immediate <- getOption("future.relay.immediate", "immediateCondition")
    excluded <- attr(conditions, "exclude", exact = TRUE)
    conditions <- unique(c(conditions, immediate))
    attr(conditions, "exclude") <- excluded
    if (length(immediate)) expr <- relayed(expr, immediate)
  }
  expr <- get("getExpression", namespace)(
    future, expr = expr, immediateConditions = TRUE, conditionClasses = conditions
  )
  globals <- as.list(future$globals)
  packages <- future$packages
  launch(future, future$workers, list(
    expr = expr, variables = list(), globals = globals[as.character(names(globals))], packages = as.character(packages)
  ))
}

# From 1.40 on ---------------------------------------------------------------------------------------

futureBackend <- function(workers, ...) {
  loading <- ensureFutureMethods()
  workers <- workersAsked(workers)
  # Workers load future as well: it must not start clusters there.
  cl <- if (!loading || !isCount(workers)) plannedCluster(workers)
  make <- get("MultiprocessFutureBackend", asNamespace("future"))
  backend <- make(workers = cl, reg = registryOf(cl), ...)
  # What the plan makes a cluster of its own of.
  if (!inherits(workers, "RustCluster")) backend[["spec"]] <- list(workers)
  backend[["futureClasses"]] <- c("RustFuture", backend[["futureClasses"]])
  structure(backend, class = c("RustFutureBackend", class(backend)))
}

registryOf <- function(cl) paste0("workers-", if (is.null(cl)) "planned" else cl[[1L]][["handle"]]$id)

# The cluster of the current plan. A plan that was set aside has stopped its own cluster, and may come back, even in
# another session: its first future makes the cluster anew.
currentCluster <- function(backend) {
  spec <- backend[["spec"]]
  if (!is.null(spec)) {
    backend[["workers"]] <- plannedCluster(spec[[1L]])
    backend[["reg"]] <- registryOf(backend[["workers"]])
  }
  backend[["workers"]]
}

launchFuture.RustFutureBackend <- function(backend, future, ...) {
  cl <- currentCluster(backend)
  data <- get("getFutureData", asNamespace("future"))(future, mc.cores = 1L)
  launch(future, cl, list(
    expr = quote(base::asNamespace("future")$evalFuture(data)), variables = list(data = data),
    globals = list(), packages = character()
  ))
}

getFutureBackendConfigs.RustFuture <- function(future, ...) {
  conditions <- future[["conditions"]]
  if (is.null(conditions) || isFALSE(getOption("future.psock.relay.immediate"))) return(list())
  classes <- attr(conditions, "immediateConditionClasses", exact = TRUE)
  if (!is.null(classes) && !length(classes)) return(list())
  # One class, as future's cluster backend has it: evalFuture() fails at more.
  list(capture = list(immediateConditionHandlers = list(immediateCondition = relayToHead)))
}

interruptFuture.RustFutureBackend <- function(backend, future, ...) {
  if (isTRUE(backend[["interrupts"]])) {
    assertOwner(future)
    if (!is.null(future$record)) cancelCall(future$record)
    future[["state"]] <- "interrupted"
  }
  future
}

stopWorkers.RustFutureBackend <- function(backend, interrupt = TRUE, ...) {
  if (!isCurrent(backend)) return(invisible(TRUE))
  cl <- backend[["workers"]]
  if (interrupt) for (open in futuresOf(cl)) {
    if (open$future[["state"]] == "running") open$future[["state"]] <- "canceled"
    cancelCall(open$record)
  }
  if (!is.null(backend[["spec"]])) stopPlanned()
  invisible(TRUE)
}

listFutures.RustFutureBackend <- function(backend, ...) {
  futures <- lapply(if (isCurrent(backend)) futuresOf(backend[["workers"]]), `[[`, "future")
  rows <- lapply(futures, function(future) data.frame(
    counter = as.integer(future[["uuid"]][2L]), start = future[["start"]],
    label = if (is.null(future[["label"]])) NA_character_ else future[["label"]], resolved = future::resolved(future)
  ))
  none <- data.frame(counter = integer(), start = numeric(), label = character(), resolved = logical())
  data <- do.call(rbind, c(list(none), rows))
  data[["future"]] <- lapply(futures, list)
  data
}

# Whether the backend's cluster is there: that of a plan which was set aside is not.
isCurrent <- function(backend) {
  cl <- backend[["workers"]]
  !is.null(cl) && (is.null(backend[["spec"]]) || identical(cl, planned$cl))
}

nbrOfWorkers.RustFutureBackend <- function(evaluator) {
  cl <- evaluator[["workers"]]
  if (is.null(cl)) as.integer(evaluator[["spec"]][[1L]]) else length(cl)
}

nbrOfFreeWorkers.RustFutureBackend <- function(evaluator, background = FALSE, ...) {
  if (isCurrent(evaluator)) freeWorkers(evaluator[["workers"]]) else nbrOfWorkers.RustFutureBackend(evaluator)
}

# Of both --------------------------------------------------------------------------------------------

# What is asked of a plan before it has made its cluster does not make it: workers, too, are told the plan
# of the session.
workersOf <- function(evaluator) {
  workers <- workersAsked(eval(formals(evaluator)$workers, baseenv()))
  if (isCount(workers) && !identical(planned$spec, workers)) as.integer(workers) else plannedCluster(workers)
}

isCount <- function(workers) is.numeric(workers) && length(workers) == 1L && is.null(names(workers))

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
    assertOwner(x)
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
  if (is.null(future$result)) assertOwner(future)
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
  relayAsides(future)
  if (!is.null(future$result)) return(future)
  record <- future$record
  result <- record$result
  countFuture(future, "finished")
  raised <- record$raised
  if (!is.null(raised)) {
    # Nobody could go on after it: as with future's cluster backend.
    future$result <- future::FutureError(paste0(
      "Future (", labelOfFuture(future), ") signaled an error of class ", class(raised)[[1L]],
      " that is to be relayed immediately, which cannot be done with errors: ", conditionMessage(raised)
    ), future = future)
    future$result$parent <- raised
    future$state <- "failed"
  } else if (record$state == "done" && inherits(result, "FutureResult")) {
    result$conditions <- c(future$.signaledConditions, result$conditions)
    future$.signaledConditions <- NULL
    future$result <- result
    future$state <- "finished"
  } else if (inherits(result, "FutureLaunchError")) {
    # Newer versions say so themselves if a worker could not begin, as without a package.
    future$result <- result
    future$state <- "failed"
  } else {
    why <- if (inherits(result, "condition")) {
      conditionMessage(result)
    } else {
      "its worker sent something else than a result"
    }
    kind <- errorClassOf(future, result)
    error <- get(kind, asNamespace("future"))(
      paste0("Future (", labelOfFuture(future), ") could not be resolved: ", why), future = future
    )
    error$parent <- result
    future$result <- error
    if (!future$state %in% c("canceled", "interrupted")) {
      future$state <- if (kind == "FutureError") "failed" else "interrupted"
    }
  }
  dropFuture(record)
  future
}

# Newer versions tell what was cancelled, and what was interrupted, from what was wrong.
errorClassOf <- function(future, result) {
  interrupted <- inherits(result, "rustcluster_error") || future$record$state == "cancelled"
  kind <- if (future$state == "canceled") "FutureCanceledError" else if (interrupted) "FutureInterruptError"
  if (!is.null(kind) && exists(kind, asNamespace("future"))) kind else "FutureError"
}

# Conditions that a future has signaled while it runs, as future itself relays them. A handler may jump out of it: the
# others are relayed at the next look.
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
    else if (inherits(condition, "error")) future$record$raised <- condition
    else signalCondition(condition)
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
    # Restarts may be without a name.
    if (any(startsWith(as.character(restart$name), "muffle"))) invokeRestart(restart)
  }
}

# future sets the plan that R_FUTURE_PLAN names while it is loaded itself, before anybody is told of that. Returns
# whether it is being loaded.
ensureFutureMethods <- function() {
  table <- get(".__S3MethodsTable__.", asNamespace("future"))
  loading <- !exists("resolved.RustFuture", table, inherits = FALSE)
  if (loading) registerFutureMethods()
  loading
}

# Generics of future, as far as its version has them.
registerFutureMethods <- function(...) {
  namespace <- asNamespace("future")
  methods <- c(
    run = "RustFuture", resolved = "RustFuture", result = "RustFuture", getFutureBackendConfigs = "RustFuture",
    launchFuture = "RustFutureBackend", interruptFuture = "RustFutureBackend",
    listFutures = "RustFutureBackend",
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

# Calls by the generics of future ----------------------------------------------------------------------

#' Calls by the generics of package future
#'
#' Methods of [future::value()] and [future::resolved()] for the objects that [clusterSubmit()] and
#' [clusterLapplyAsync()] return. `value(call)` is `call$value()`. `resolved(call)` returns, without
#' waiting, whether the call has ended: with a value, with an error, or because it was cancelled.
#'
#' The methods of \pkg{future} for lists and environments handle futures alone: a call in a list is
#' returned as it is, and counts as resolved. Use `lapply(calls, value)` and
#' `vapply(calls, resolved, NA)`.
#'
#' @param future,x An object made by [clusterSubmit()] or [clusterLapplyAsync()].
#' @param stdout Accepted as an argument of \pkg{future}'s, and not used: output stays on the worker.
#' @param signal (logical) Whether the error of a failed call is raised (`TRUE`, the default) or returned
#'   as a condition object.
#' @param ... Not used.
#' @return `value()`: the value of the call, or its error if `signal` is `FALSE`. `resolved()`: `TRUE` or
#'   `FALSE`.
#' @section Errors:
#' As of `value()` and `status()` in [clusterSubmit()] and [clusterLapplyAsync()].
#' @seealso [cluster_rust] for futures on a cluster.
#' @name future_generics
#' @examplesIf requireNamespace("future", quietly = TRUE)
#' cl <- makeRustCluster(2)
#' calls <- lapply(1:4, function(i) clusterSubmit(cl, i^2))
#' vapply(calls, future::value, 0)
#' all(vapply(calls, future::resolved, NA))
#' failed <- clusterSubmit(cl, stop("no"))
#' future::value(failed, signal = FALSE)
#' parallel::stopCluster(cl)
#' @exportS3Method future::value
value.RustCall <- function(future, stdout = TRUE, signal = TRUE, ...) {
  callValue(recordOf(future), checkedSignal(signal))
}

#' @rdname future_generics
#' @exportS3Method future::value
value.RustCalls <- function(future, stdout = TRUE, signal = TRUE, ...) {
  of <- environment(future$status)
  callsValue(of$records, of$groups, of$names, of$n, checkedSignal(signal))
}

checkedSignal <- function(signal) {
  if (!isTRUE(signal) && !isFALSE(signal)) badArgument("signal", "must be TRUE or FALSE")
  signal
}

#' @rdname future_generics
#' @exportS3Method future::resolved
resolved.RustCall <- function(x, ...) !x$status() %in% c("waiting", "running")

#' @rdname future_generics
#' @exportS3Method future::resolved
resolved.RustCalls <- resolved.RustCall
