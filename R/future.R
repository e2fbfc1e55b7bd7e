# A backend for package 'future'. A future is a call of clusterSubmit(). There are never more open futures than workers:
# creating another one waits, as in future's own backends. Versions of future before 1.40 create futures by calling the
# backend function; later versions have an object of class "FutureBackend".

#' Futures on a cluster
#'
#' A backend for package \pkg{future}: `plan(rustcluster::cluster_rust, workers = cl)`. An idle worker resolves each
#' future. Creating a future waits while all workers are busy. `resolved()` never waits; it starts a lazy future if a
#' worker is idle. Output and conditions are relayed as by future's own `cluster` backend. Conditions of class
#' `"immediateCondition"`, which \pkg{progressr} uses, are relayed while the future runs or another one waits for a
#' worker. An error of that class cannot be relayed, and is a `FutureError`.
#' Option `future.wait.timeout` limits the waiting time for a worker. `nbrOfFreeWorkers()` counts a worker as free when
#' its future has ended, also before the value is read. A plan may be set by the environment variable `R_FUTURE_PLAN`,
#' replaced and restored, nested and tweaked. Futures leave the same state on their workers as calls of
#' [clusterSubmit()]; variables that `clusterExport()` has assigned stay. A future that is garbage-collected runs to its
#' end, and so may the running futures of an interrupted `future_lapply()`, whose workers are busy until then. Nested
#' futures are sequential, unless the plan says otherwise. A future is retried after a worker failure, as often as
#' `retries` of the cluster says. If its worker died on all attempts, the future has a `FutureError` with all reasons.
#' \pkg{future.apply}, \pkg{furrr} and \pkg{doFuture} (`%dopar%` and `%dofuture%`) work with this backend.
#' `options(rustcluster.progress = TRUE)` shows how many futures have ended, of those that a function such as
#' `future_lapply()` has launched: see section Progress of [verbs].
#'
#' `plan(cluster, workers = cl)` with a cluster made by [makeRustCluster()] works, too. That backend does not
#' relay immediate conditions, such as the progress of \pkg{progressr}. Its `resolved()` uses one of R's connections for
#' each cluster, and waits if none is left.
#'
#' @param ... Further arguments of a backend of \pkg{future}.
#' @param workers A cluster made by [makeRustCluster()]. Or a `spec` of [makeRustCluster()], such as a number: the plan
#'   then creates a cluster of its own. That cluster is stopped when the plan is changed, and created again when the
#'   plan is restored. Or a function that returns one of these. `NULL`, the default: as many workers as there are usable
#'   cores.
#' @return This function is not called directly: see [future::plan()].
#' @section Errors:
#' `value()` raises errors of a future's expression as they were raised. A `FutureError` has a field `parent`, the
#' condition of this package: see [clusterSubmit()]. In version 1.40 of \pkg{future} and later it is a
#' `FutureInterruptError` if the worker failed, and a `FutureCanceledError` if the future was cancelled, also by a
#' change of the plan (in versions that have this class). `resolved()` and `value()` of a future without a value are a
#' `FutureError` in any session but the one that created it. `plan()` raises `rustcluster_bad_argument` (field
#' `argument`: `"workers"`).
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
  # Ends a plan. From future 1.40 on, stopWorkers() ends it instead.
  cleanup = function() if (!exists("launchFuture", asNamespace("future"))) stopPlanned()
)

# The cluster that the current plan has created (`cl`), and its `spec`.
planned <- new.env(parent = emptyenv())

stopPlanned <- function() {
  cl <- planned$cl
  planned$cl <- NULL
  planned$spec <- NULL
  if (!is.null(cl)) stopCluster.RustCluster(cl)
  invisible()
}

# Returns the value of a plan's `workers`: a cluster, or a `spec` of makeRustCluster().
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
    # Versions of future before 1.34 stop only a cluster that is registered here.
    registry <- get0("ClusterRegistry", asNamespace("future"))
    if (!is.null(registry)) assign("cluster", planned$cl, environment(registry))
  }
  planned$cl
}

clusterFor <- function(workers) {
  if (inherits(workers, "cluster")) {
    badArgument("workers", "is not a cluster made by makeRustCluster(); use plan(cluster, workers = ...)")
  }
  if (is.numeric(workers) && is.null(names(workers)) && length(workers) != 1L) {
    badArgument("workers", "must be a single number of workers, or numbers named by their hosts")
  }
  # Workers must not inherit the plan of this session.
  plan <- Sys.getenv("R_FUTURE_PLAN", NA)
  Sys.unsetenv("R_FUTURE_PLAN")
  on.exit(if (!is.na(plan)) Sys.setenv(R_FUTURE_PLAN = plan))
  asArgument("workers", makeRustCluster(workers, progress = FALSE))
}

# Open futures, by the ids of their clusters: lists of `record` and `future`. A cancelled future may have been reset
# while its call still runs.
openFutures <- new.env(parent = emptyenv())

# Returns the open futures on any of these nodes. Collects the results of futures that have ended.
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
    suppressWarnings(rm(list = id, envir = openFutures))
  }
  shown <- record$shown
  record$shown <- NULL
  if (!is.null(shown)) {
    shown$ended <- shown$ended + 1
    showFutures(id)
  }
}

# The progress of the open futures of each cluster, by the ids of the clusters: the numbers of futures that were
# launched and that have ended, how they are shown, and whether a function is running that launches futures.
shownFutures <- new.env(parent = emptyenv())

# Shows how many futures have ended. All futures of a function such as future_lapply() count together, until it returns.
# Other futures count together from the first one until none is open. `launched`: the record of a future that has just
# been launched.
showFutures <- function(id, launched = NULL) {
  shown <- shownFutures[[id]]
  if (!is.null(launched)) {
    launcher <- if ((is.null(shown) || !shown$launching) && isTRUE(getOption("rustcluster.progress"))) launchingFrame()
    # Futures that nobody has collected do not count as those of this function.
    if (!is.null(shown) && !is.null(launcher)) shown <- endShown(id, shown)
    if (is.null(shown) && isTRUE(getOption("rustcluster.progress"))) shown <- beginShown(id, launcher)
    if (!is.null(shown)) shown$launched <- shown$launched + 1
    launched$shown <- shown
  }
  if (is.null(shown)) return(invisible())
  if (is.null(shown$view)) shown$view <- viewOf(shown)
  shown$view$update()
  if (!shown$launching && shown$ended == shown$launched) endShown(id, shown)
  invisible()
}

# Returns the record of what is shown from now on. `launcher`: the frame of the function that launches the futures, or
# NULL.
beginShown <- function(id, launcher) {
  shown <- list2env(list(launched = 0, ended = 0, launching = !is.null(launcher)), parent = emptyenv())
  if (shown$launching) {
    end <- function() {
      shown$launching <- FALSE
      if (!identical(shownFutures[[id]], shown)) return()
      showFutures(id)
      # After an error or interrupt, futures may be open.
      if (identical(shownFutures[[id]], shown)) endShown(id, shown)
    }
    do.call(on.exit, list(as.call(list(end)), TRUE), envir = launcher)
  }
  assign(id, shown, shownFutures)
  shown
}

# Ends what is shown. Returns NULL.
endShown <- function(id, shown) {
  rm(list = id, envir = shownFutures)
  if (!is.null(shown$view)) shown$view$end(if (shown$ended == shown$launched) "done" else "failed")
  NULL
}

viewOf <- function(shown) {
  progress <- function() c(shown$ended, shown$launched - shown$ended)
  total <- function() shown$launched
  if (showsBars()) return(progressBar(progress, total, "future"))
  grows <- function() shown$launching
  list(update = progressLines(progress, total, "future", grows), end = function(result) NULL)
}

# Returns the frame of the function of a package that launches futures, such as future_lapply(), or NULL if other code
# has called future(). Frames of base R are passed over: since version 1.20, future.apply launches within tryCatch().
launchingFrame <- function() {
  frame <- NULL
  for (depth in rev(seq_len(sys.nframe()))) {
    home <- topenv(environment(sys.function(depth)))
    if (identical(home, .BaseNamespaceEnv) || identical(home, baseenv()) || identical(home, topenv())) next
    if (!isNamespace(home)) break
    if (getNamespaceName(home) == "future") next
    if (!"future" %in% names(getNamespaceImports(home))) break
    frame <- sys.frame(depth)
  }
  frame
}

clusterOf <- function(future) {
  backend <- future[["backend"]]
  if (is.null(backend)) future$workers else backend[["workers"]]
}

freeWorkers <- function(cl) {
  checkCalls(cl[[1L]][["handle"]])
  for (open in futuresOf(cl)) {
    checkCall(open$record)
    takeProgressEvents(open$record)
    if (identical(open$future[["record"]], open$record)) relayProgressEvents(open$future)
  }
  max(0L, length(cl) - length(futuresOf(cl)))
}

# Waits until a worker is free. `limit`: the maximum number of seconds.
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
    showFutures(handle$id)
    raiseInterrupt()
  }
}

# Makes resolved() of a lazy future return FALSE, instead of starting the future, while all workers are busy.
leaveForLater <- function(future, cl) {
  if (freeWorkers(cl)) return()
  asked <- get("resolved.Future", asNamespace("future"))
  for (i in rev(seq_len(sys.nframe() - 1L))) {
    frame <- sys.frame(i)
    # Call `return()` in that frame: the frames above it end as by any other jump.
    if (identical(sys.function(i), asked) && identical(frame$x, future)) do.call("return", list(FALSE), envir = frame)
  }
}

launch <- function(future, cl, args) {
  leaveForLater(future, cl)
  limit <- future[["backend"]][["wait.timeout"]]
  awaitFree(cl, if (is.null(limit)) getOption("future.wait.timeout", Inf) else limit)
  label <- if (is.null(future$label)) "a future" else future$label
  # Suppress R's warnings of package environments in sent data, as future does: future attaches the packages.
  record <- suppressWarnings(submit(cl, evaluateCall, args, label, reportsProgress = TRUE))
  # Wake waiting code when this call ends.
  call_notify(record$handle$pointer, record$task)
  future$record <- record
  future$state <- "running"
  countFuture(future, "launched")
  id <- record$handle$id
  assign(id, c(openFutures[[id]], list(list(record = record, future = future))), openFutures)
  showFutures(id, record)
  invisible(future)
}

# Updates the counters that are printed with a backend.
countFuture <- function(future, what) {
  backend <- future[["backend"]]
  counters <- backend[["counters"]]
  if (!what %in% names(counters)) return()
  counters[[what]] <- counters[[what]] + 1L
  backend[["counters"]] <- counters
}

# Returns the label of a future for error messages, as in future.
labelOfFuture <- function(future) if (is.null(future$label)) "<none>" else future$label

# Raises an error in any session but the one that made the future.
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

# Captures conditions as future's cluster backend does: the worker muffles the conditions that it records.
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
  # Workers load future as well, where it must not start clusters.
  cl <- if (!loading || !isWorkerCount(workers)) plannedCluster(workers)
  make <- get("MultiprocessFutureBackend", asNamespace("future"))
  backend <- make(workers = cl, reg = registryOf(cl), ...)
  # The plan creates its own cluster from this.
  if (!inherits(workers, "RustCluster")) backend[["spec"]] <- list(workers)
  backend[["futureClasses"]] <- c("RustFuture", backend[["futureClasses"]])
  structure(backend, class = c("RustFutureBackend", class(backend)))
}

registryOf <- function(cl) paste0("workers-", if (is.null(cl)) "planned" else cl[[1L]][["handle"]]$id)

# Returns the cluster of the current plan. A replaced plan has stopped its own cluster. If the plan is restored, even in
# another session, its first future creates the cluster again.
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
  # One class, as in future's cluster backend: evalFuture() fails with several.
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

# Returns whether the cluster of the backend exists. The own cluster of a replaced plan does not.
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

# All versions ---------------------------------------------------------------------------------------

# Queries of a plan do not create its cluster: workers get the plan of the session, too.
workersOf <- function(evaluator) {
  workers <- workersAsked(eval(formals(evaluator)$workers, baseenv()))
  if (isWorkerCount(workers) && !identical(planned$spec, workers)) as.integer(workers) else plannedCluster(workers)
}

isWorkerCount <- function(workers) is.numeric(workers) && length(workers) == 1L && is.null(names(workers))

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
    # resolved() does not wait for a worker.
    cl <- clusterOf(x)
    if (!is.null(cl) && !freeWorkers(cl)) return(FALSE)
    return(NextMethod())
  }
  if (is.null(x$result) && !is.null(x$record)) {
    assertOwner(x)
    checkCalls(x$record$handle)
    checkCall(x$record)
    takeProgressEvents(x$record)
    relayProgressEvents(x)
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
    relayProgressEvents(future)
    if (!isOpen(future$record)) collect(future)
  }
  if (inherits(future$result, "FutureError")) stop(future$result)
  future$result
}

# Sets the result of a future whose call has ended: the value, or the reason why there is none.
collect <- function(future) {
  relayProgressEvents(future)
  if (!is.null(future$result)) return(future)
  record <- future$record
  result <- record$result
  countFuture(future, "finished")
  raised <- record$raised
  if (!is.null(raised)) {
    # An error cannot be continued after its handler, as in future's cluster backend.
    future$result <- future::FutureError(paste0(
      "Future (", labelOfFuture(future), ") signaled an error of class ", class(raised)[[1L]],
      ", which cannot be relayed immediately: ", conditionMessage(raised)
    ), future = future)
    future$result$parent <- raised
    future$state <- "failed"
  } else if (record$state == "done" && inherits(result, "FutureResult")) {
    result$conditions <- c(future$.signaledConditions, result$conditions)
    future$.signaledConditions <- NULL
    future$result <- result
    future$state <- "finished"
  } else if (inherits(result, "FutureLaunchError")) {
    # Newer versions have an error class for a worker that could not start the future, for example without a package.
    future$result <- result
    future$state <- "failed"
  } else {
    why <- if (inherits(result, "condition")) {
      conditionMessage(result)
    } else {
      "its worker sent an invalid result"
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

# Returns the error class. Newer versions have classes for cancelled and for interrupted futures.
errorClassOf <- function(future, result) {
  interrupted <- inherits(result, "rustcluster_error") || future$record$state == "cancelled"
  kind <- if (future$state == "canceled") "FutureCanceledError" else if (interrupted) "FutureInterruptError"
  if (!is.null(kind) && exists(kind, asNamespace("future"))) kind else "FutureError"
}

# Relays the conditions that a future has signaled while it runs, as future itself does. If a handler jumps, the other
# conditions are relayed next time.
relayProgressEvents <- function(future) {
  # Remove each condition before it is signaled: its handler may jump.
  record <- future$record
  while (length(record$progressEvents)) {
    condition <- record$progressEvents[[1L]]
    record$progressEvents <- record$progressEvents[-1L]
    condition$signaled <- 1L
    entry <- list(condition = condition, signaled = 1L)
    future$.signaledConditions <- c(future$.signaledConditions, list(entry))
    if (inherits(condition, "message")) message(condition)
    else if (inherits(condition, "warning")) warning(condition)
    else if (inherits(condition, "error")) future$record$raised <- condition
    else signalCondition(condition)
  }
}

# Runs in a worker: tells the head of the error of a future, which future has caught. `result`: a list with the value,
# which may be the empty symbol.
tellFutureError <- function(result) {
  if (!"FutureResult" %in% oldClass(result[[1L]])) return()
  isError <- function(one) inherits(one$condition, "error")
  found <- tryCatch(Find(isError, .subset2(result[[1L]], "conditions")), error = function(e) NULL)
  if (!is.null(found)) tellError(found$condition)
}

# Runs in a worker: sends a condition to the head. Returns FALSE, so that future does not record the condition.
relayToHead <- function(condition) {
  base::asNamespace("rustcluster")$report(condition)
  FALSE
}

# Returns the expression with handlers that send conditions of these classes to the head and muffle them. Errors of the
# expression show this call, which therefore begins as the one that future's own backends make.
relayed <- function(expr, classes) {
  handler <- quote(function(cond) base::asNamespace("rustcluster")$relayAndMuffle(cond))
  handlers <- rep(list(handler), length(classes))
  names(handlers) <- classes
  as.call(c(list(quote(withCallingHandlers), call("{", expr)), handlers))
}

relayAndMuffle <- function(condition) {
  relayToHead(condition)
  for (restart in computeRestarts(condition)) {
    # A restart may have no name.
    if (any(startsWith(as.character(restart$name), "muffle"))) invokeRestart(restart)
  }
}

# Registers the methods if the load hook of future has not run yet: future sets the plan of R_FUTURE_PLAN while it is
# being loaded. Returns whether future is being loaded.
ensureFutureMethods <- function() {
  table <- get(".__S3MethodsTable__.", asNamespace("future"))
  loading <- !exists("resolved.RustFuture", table, inherits = FALSE)
  if (loading) registerFutureMethods()
  loading
}

# Registers methods for the generics that the installed version of future has.
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
    # Later versions launch futures by launchFuture().
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
#' [clusterLapplyAsync()] return. `value(call)` is `call$value()`. `resolved(call)` does not wait. It returns whether
#' the call has ended: with a value, with an error, or because it was cancelled.
#'
#' The methods of \pkg{future} for lists and environments handle futures alone: a call in a list is
#' returned as it is, and counts as resolved. Use `lapply(calls, value)` and
#' `vapply(calls, resolved, NA)`.
#'
#' @param future,x An object made by [clusterSubmit()] or [clusterLapplyAsync()].
#' @param stdout Ignored: output stays on the worker.
#' @param signal (logical) Whether the error of a failed call is raised (`TRUE`, the default) or returned
#'   as a condition object.
#' @param ... Not used.
#' @return `value()`: the value of the call, or its error if `signal` is `FALSE`. `resolved()`: `TRUE` or
#'   `FALSE`.
#' @section Errors:
#' The errors of `value()` and `status()` in [clusterSubmit()] and [clusterLapplyAsync()].
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
