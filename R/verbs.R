# parallel's verbs under their own names. With a cluster of this package they send all tasks of a job at once; with any
# other cluster they call parallel's function.

#' Drop-ins for the functions of parallel
#'
#' Drop-ins for the functions of the same names in \pkg{parallel}, with the same arguments and results. With a cluster
#' made by [makeRustCluster()] they run the whole job at once; with any other cluster they call the function of
#' \pkg{parallel}. Code that calls `parallel::parLapply()` and so on, in packages too, is as fast with a cluster made by
#' [makeRustCluster()], and this page applies to it as well. The functions of this package only divide very long vectors
#' into chunks faster.
#'
#' Tasks are sent one by one, at about the speed of PSOCK clusters, to nodes of several clusters, to nodes that are in
#' `cl` twice, and if a package's own `[[` method extracts the elements.
#'
#' These properties are the same as in \pkg{parallel}: values, their order and names, errors, what the tasks find and
#' leave on their node, and, for `clusterApply()`, `clusterMap()`, `parLapply()`, `parSapply()`, `parApply()`,
#' `parRapply()` and `parCapply()`, which node runs which task, and therefore the random numbers. Other functions do not
#' assign tasks to nodes in advance: `clusterApplyLB()`, `parLapplyLB()`, `parSapplyLB()`,
#' `clusterMap(.scheduling = "dynamic")`. They send short tasks in batches sized so that messaging costs little; batches
#' shrink towards the end, and on slow links the next batch is prefetched. Short tasks that only compute use no more
#' workers of a host than it has cores. If there are no more tasks than nodes, the
#' first task goes to the first node, and so on. `parLapplyLB()` and `parSapplyLB()` without a `chunk.size` send batches
#' of elements.
#'
#' `fun` and the arguments in `...` are serialized once for each job and sent once to each host. Each task gets its own
#' copy of them, as in \pkg{parallel}: no task sees a change that another task made, even if C code made it in place.
#' For `parLapply()` and the functions that use it, a task is a chunk of elements. `parLapplyLB()` and `parSapplyLB()`
#' without a `chunk.size` choose the chunks while they run: a batch of elements is a chunk, and its elements share
#' `fun`, the environment it was made in, and `...`. A function with state, such as a counter, may therefore return
#' other values than in \pkg{parallel}, which divides the elements into chunks in advance.
#'
#' @param cl A cluster made by [makeRustCluster()], a part of one, or any cluster of \pkg{parallel}. `NULL`: the default
#'   cluster of \pkg{parallel}, as `setDefaultCluster()` sets it.
#' @param fun,FUN (function) The function to call, or its name.
#' @param expr An expression to evaluate.
#' @param varlist (character) The names of the variables to export.
#' @param envir (environment) The environment of these variables.
#' @param x,X For `clusterApply()`, `clusterApplyLB()`, `parLapply()` and `parSapply()`: a vector or list. For
#'   `parApply()` an array, for `parRapply()` and `parCapply()` a matrix.
#' @param ... Further arguments of `fun`. For `clusterMap()`: vectors or lists, of which each task gets one element.
#' @param MoreArgs,RECYCLE,SIMPLIFY,USE.NAMES,simplify,.scheduling As in \pkg{parallel}:
#'   [parallel::clusterMap()], [parallel::parSapply()].
#' @param MARGIN (integer or character) As in [base::apply()].
#' @param chunk.size (integer) The number of elements in a chunk.
#' @return The value of the function of \pkg{parallel}: see [parallel::clusterApply()].
#' @section Errors:
#' `rustcluster_bad_argument` for a cluster of [makeRustCluster()] without nodes, which [clusterAlive()] may return.
#' The errors of the function of \pkg{parallel}, and those of clusters made by [makeRustCluster()]: see there.
#' @section Progress:
#' With `options(rustcluster.progress = TRUE)`, functions that run several tasks show a bar with the number of finished
#' tasks, their rate, the number of busy workers and the remaining time. `parLapply()`, `parSapply()` and `parApply()`
#' send chunks of elements: the bar counts elements. `parRapply()` and `parCapply()` count chunks. The option applies to
#' [clusterLapply()], foreach, runs ([startRun()]) and futures, too. Futures are counted as they are launched, with
#' `plan(cluster_rust)`. On nodes of several clusters, parallel's functions show no progress; [clusterLapply()] does.
#'
#' In scripts, in documents of \pkg{knitr} and wherever no bar can be drawn, a message is printed now and then instead:
#' after a second, then at growing intervals of 5 seconds to 10 minutes, and at the end. Jobs of less than a second
#' print nothing. `options(cli.progress_show_after = )` sets another number of seconds, also for the bar.
#'
#' \pkg{progressr} needs no option. Within `progressr::with_progress()`, or after `progressr::handlers(global = TRUE)`,
#' its handlers show the same progress instead of the bar, unless the option is `FALSE`. In a script they show nothing
#' without `options(progressr.enable = TRUE)`. Tasks may also call a progressor of the session, whose handlers then show
#' that: `p <- progressr::progressor(100)`, and `p()` in `fun`, with `p` as an argument. \pkg{progressr} shows the
#' progress of futures only if these call a progressor, as with all plans.
#' @seealso [clusterLapply()] for seeds, timeouts and streaming results.
#' @examples
#' cl <- makeRustCluster(2)
#' offset <- 10
#' clusterExport(cl, "offset", environment())
#' parSapply(cl, 1:4, function(i) i + offset)
#' clusterApplyLB(cl, c(0.1, 0, 0), function(s) { Sys.sleep(s); Sys.getpid() })
#' parallel::stopCluster(cl)
#' @name verbs
NULL

# findVerbs() assigns the functions. All but clusterCall() and parLapplyLB() are copies of parallel's functions of the
# running R, which call functions of this package.

#' @rdname verbs
#' @export
clusterCall <- NULL

#' @rdname verbs
#' @export
clusterEvalQ <- NULL

#' @rdname verbs
#' @export
clusterExport <- NULL

#' @rdname verbs
#' @export
clusterApply <- NULL

#' @rdname verbs
#' @export
clusterApplyLB <- NULL

#' @rdname verbs
#' @export
clusterMap <- NULL

#' @rdname verbs
#' @export
parLapply <- NULL

#' @rdname verbs
#' @export
parLapplyLB <- NULL

#' @rdname verbs
#' @export
parSapply <- NULL

#' @rdname verbs
#' @export
parSapplyLB <- NULL

#' @rdname verbs
#' @export
parApply <- NULL

#' @rdname verbs
#' @export
parRapply <- NULL

#' @rdname verbs
#' @export
parCapply <- NULL

# Returns the same as parallel's splitIndices(), whose cut() and split() look at each index: that is a tenth of the time
# of a parLapply() over 1e5 short elements.
cutIndices <- function(nx, ncl) {
  if (ncl < 2L || nx < 2L) return(parallel::splitIndices(nx, ncl))
  fuzz <- min((nx - 1L) / 1000, 0.4 * nx / ncl)
  breaks <- floor(seq(1 - fuzz, nx + fuzz, length.out = ncl + 1L))
  breaks <- as.integer(pmin(pmax(breaks, 0), nx))
  lapply(seq_along(breaks)[-1L], function(k) breaks[[k - 1L]] + seq_len(breaks[[k]] - breaks[[k - 1L]]))
}

# Works as parallel's defaultCluster(), and refuses a cluster without nodes, for which parallel's functions return
# nothing or raise an error about something else.
usableCluster <- function(cl = NULL) {
  defaultCluster <- parallels$defaultCluster
  cl <- defaultCluster(cl)
  if (inherits(cl, "RustCluster")) refuseEmpty(cl)
  cl
}

# Replaces parLapplyLB(), with its arguments.
freeElements <- function(cl, X, fun, ..., chunk.size) {
  defaultCluster <- usableCluster
  chunked <- parallels$chunked
  cl <- defaultCluster(cl)
  ranks <- if (is.null(chunk.size)) nativeRanks(cl)
  if (is.null(ranks) || !isFree(X, fun)) return(chunked(cl, X, fun, ..., chunk.size = chunk.size))
  applyFree(cl, ranks, X, fun, list(...))
}

# Returns whether the job may choose batches of elements. It may not for a vector with a class, whose methods extract
# the elements, nor for the name of a function, which the workers look up.
isFree <- function(X, fun) {
  length(X) && !is.object(X) && isPlain(X) && is.function(fun)
}

# parLapplyLB() without `chunk.size`.
applyFree <- function(cl, ranks, X, fun, common) {
  n <- length(X)
  asLapply <- seesCall(fun) || "FUN" %in% names(common)
  if (asLapply) common <- c(list(FUN = fun), common)
  job <- runJob(cl, ranks, n, if (asLapply) applyOne else fun, common, X, reuse = "all", what = "element")
  # parallel makes twice as many chunks as there are nodes, and counts those that fail.
  chunks <- if (length(job$failed)) lengths(parallel::splitIndices(n, 2L * length(cl)))
  val <- checkedResults(job, rep(seq_along(chunks), chunks))
  names(val) <- names(X)
  val
}

# Runs in a worker, for an element of a chunk. The function sees the same call as in lapply().
applyOne <- function(X, ...) lapply(list(X), ...)[[1L]]

# Returns whether the function may inspect its own call or the frame of its caller. For other functions, calling
# lapply() would take several times as long as a short element.
seesCall <- function(fun) {
  looks <- c("substitute", "match.call", "sys.call", "sys.calls", "sys.function", "sys.frame", "sys.frames",
             "sys.parent", "sys.nframe", "parent.frame", "UseMethod", "standardGeneric", "Recall", "enquo", "enquos",
             "enexpr", "enexprs", "ensym", "ensyms", "caller_env", "caller_call")
  typeof(fun) == "special" || (typeof(fun) == "closure" && any(all.names(body(fun)) %in% looks))
}

isPlain <- function(x) {
  typeof(x) %in% c("list", "character", "double", "integer", "logical")
}

# Returns a replacement for parallel's function of this name, with its arguments.
handsOut <- function(name, round) {
  force(round)
  theirs <- parallels[[name]]
  function(cl = NULL, fun, n, argfun) {
    defaultCluster <- usableCluster
    cl <- defaultCluster(cl)
    ranks <- nativeRanks(cl)
    if (is.null(ranks)) return(theirs(receivable(cl), fun, n, argfun))
    if (n <= 0L) return(invisible())
    # Evaluate `fun` here, so that errors are raised as in parallel.
    fun
    # Use the same calls as parallel, which error messages contain.
    start <- i <- job <- 1L
    first <- if (round) argfun(start + i - 1L) else argfun(job)
    tasks <- tasksOf(argfun, n, first)
    if (is.null(tasks)) return(theirs(cl, fun, n, asked(argfun, first)))
    runTasks(cl, ranks, fun, n, tasks, round)
  }
}

# Returns `argfun` with the arguments of the first task, which are known, instead of computing them again.
asked <- function(argfun, first) {
  force(first)
  function(i) if (i == 1) first else argfun(i)
}

# Runs the tasks of staticClusterApply() (`round`) or dynamicClusterApply(), and returns their results. `tasks`: the
# result of tasksOf(). If there are no more tasks than nodes, the first task goes to the first node, and so on, as in
# parallel.
runTasks <- function(cl, ranks, fun, n, tasks, round) {
  round <- round || n <= length(cl)
  checkedResults(runJob(cl, ranks, n, fun, tasks$common, tasks$elements, round, spread = tasks$spread))
}

# PSOCK's method of recvOneData() fails for PSOCK clusters that contain nodes of this package.
receivable <- function(cl) {
  if (!inherits(cl, "RustCluster") && any(areOurs(cl))) class(cl) <- "cluster"
  cl
}

# Replaces clusterCall(): runs the same call on all nodes.
callNodes <- function(cl = NULL, fun, ...) {
  defaultCluster <- usableCluster
  cl <- defaultCluster(cl)
  message <- list(type = "EXEC", data = list(fun = fun, args = list(...), return = TRUE, tag = NULL), tag = NULL)
  values <- callAll(cl, message)
  if (is.null(values)) parallels$clusterCall(cl, fun, ...) else values
}

# Sends the same message to all nodes and returns their values. Returns NULL and does nothing if `cl` contains nodes of
# several clusters, nodes of other packages, or the same node twice. `setupKey`: see setupKeyOf().
callAll <- function(cl, message, setupKey = setupKeyOf("clusterCall", message$data)) {
  # `.subset2()` is faster than `[[`, which looks for methods.
  handle <- if (length(cl)) .subset2(.subset2(cl, 1L), "handle")
  if (is.null(handle)) return(NULL)
  if (!is.null(handle$linger)) revive(handle)
  refuseIfBusy(handle, sys.nframe())
  if (handle$awaits && !isOnlyLogged(message$data)) awaitNodes(handle, cluster_ranks(cl))
  job <- handle$jobs <- handle$jobs + 1
  force(setupKey)
  if (isNamespaceLoaded("progressr")) receiveReports(handle)
  done <- FALSE
  on.exit(if (!done) closeJob(handle, job))
  repeat {
    answers <- hub_call(handle$pointer, cl, job, message, setupKey)
    if (!isFromStale(answers, handle)) break
  }
  if (is.null(answers) || (typeof(answers) == "list" && !isFailure(answers))) {
    done <- TRUE
    return(answers)
  }
  continueJob(handle, job, sys.nframe(), 0L, setupKey)
  if (isFailure(answers)) handleFailed(answers, handle)
  checked(answers)
  called <- hub_called(handle$pointer)
  answers <- called[[1L]]
  # Receive answers in the order of arrival: an answer that waited for its turn would be copied twice.
  result <- called[[3L]]
  withoutCallOfTimeLimit(for (i in seq_len(sum(!called[[2L]]))) {
    if (is.null(result)) result <- hub_receive_any(handle$pointer, cl)
    answer <- nextAnswer(cl, handle, result)
    answers[answer$node] <- list(answer$value$value)
    result <- NULL
  })
  if (handle$receivesReports) showEvents(handle)
  hintAt(answers)
  checkForRemoteErrors <- parallels$checkForRemoteErrors
  recvResult <- identity
  cl <- answers
  checkForRemoteErrors(lapply(cl, recvResult))
}
