# The verbs of parallel, under their own names. Given one of our clusters they hand over all tasks at
# once; given anything else they call parallel's.

#' The verbs of parallel
#'
#' Drop-ins for the functions of the same names in \pkg{parallel}, with the same arguments and
#' results. With a cluster made by [makeRustCluster()] they hand the whole job over at once; with any
#' other cluster they call \pkg{parallel}'s. Code that calls `parallel::parLapply()` and so on, also in
#' packages, is as fast with a cluster made by [makeRustCluster()], and all of this page holds for it as
#' well. What these functions add is that they divide very long vectors into chunks faster.
#'
#' Tasks are sent one by one, at about the speed of PSOCK clusters, to nodes of several clusters, to nodes that
#' are in `cl` twice, and if a package's own `[[` method makes the elements.
#'
#' What is the same: values, their order and names, errors, what the tasks find and leave on their
#' node, and, for `clusterApply()`, `clusterMap()`, `parLapply()`, `parSapply()`, `parApply()`,
#' `parRapply()` and `parCapply()`, which node has which task, and so the random numbers. Where
#' \pkg{parallel} leaves it open which node gets a task (`clusterApplyLB()`, `parLapplyLB()`,
#' `parSapplyLB()`, `clusterMap(.scheduling = "dynamic")`), short tasks are sent in batches sized so that
#' messaging costs little; batches shrink towards the end, and on slow links the next batch is prefetched. If
#' there are no more tasks than nodes, the first goes to the first node, and so on. `parLapplyLB()` and
#' `parSapplyLB()` without a `chunk.size` send batches of elements.
#'
#' `fun` and the arguments in `...` are serialized once a job and sent once to each host. Each task gets its
#' own copy of them, as with \pkg{parallel}, so that nothing a task changes, not even C code in place, is seen
#' by another. For `parLapply()` and the functions built on it, a task is a chunk of elements. `parLapplyLB()`
#' and `parSapplyLB()` without a `chunk.size` choose the chunks while they run: the elements that are sent
#' together are a chunk, and share `fun`, the environment it was made in, and `...`. So a function with state
#' of its own, such as a counter, may give other values than with \pkg{parallel}, which cuts the chunks
#' beforehand.
#'
#' @param cl A cluster made by [makeRustCluster()], a part of one, or any cluster of
#'   \pkg{parallel}; `NULL`: the one that \pkg{parallel}'s `setDefaultCluster()` has set.
#' @param fun,FUN (function) What to call, or the name of it.
#' @param expr An expression to evaluate.
#' @param varlist (character) Names of what to export.
#' @param envir (environment) Where it is.
#' @param x,X For `clusterApply()`, `clusterApplyLB()`, `parLapply()` and `parSapply()`: a vector or
#'   list. For `parApply()` an array, for `parRapply()` and `parCapply()` a matrix.
#' @param ... Further arguments of `fun`. For `clusterMap()`: vectors or lists, of which each task has
#'   an element.
#' @param MoreArgs,RECYCLE,SIMPLIFY,USE.NAMES,simplify,.scheduling As in \pkg{parallel}:
#'   [parallel::clusterMap()], [parallel::parSapply()].
#' @param MARGIN (integer or character) As in [base::apply()].
#' @param chunk.size (integer) Elements in a task of \pkg{parallel}'s.
#' @return As of \pkg{parallel}'s functions: [parallel::clusterApply()].
#' @section Errors:
#' As of \pkg{parallel}'s functions, and those of clusters made by [makeRustCluster()]: see there.
#' @section Progress:
#' With `options(rustcluster.progress = TRUE)` those that hand out tasks show a bar with the tasks done,
#' their rate, the time that is left and the workers that are busy. A task of `parLapply()`, `parSapply()`
#' and `par*apply()` is all that a worker gets, so there it moves late; with a `chunk.size`, and with
#' `parLapplyLB()` and `parSapplyLB()`, sooner.
#' @seealso [clusterLapply()], which can do more.
#' @examples
#' cl <- makeRustCluster(2)
#' offset <- 10
#' clusterExport(cl, "offset", environment())
#' parSapply(cl, 1:4, function(i) i + offset)
#' clusterApplyLB(cl, c(0.1, 0, 0), function(s) { Sys.sleep(s); Sys.getpid() })
#' parallel::stopCluster(cl)
#' @name verbs
NULL

# All but clusterCall() and parLapplyLB() are parallel's own, as this version of R has them, over functions of
# ours: see findVerbs().

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

# The same as parallel's splitIndices() gives, whose cut() and split() look at each index: a tenth of
# the time of a parLapply() over 1e5 short elements.
cutIndices <- function(nx, ncl) {
  if (ncl < 2L || nx < 2L) return(parallel::splitIndices(nx, ncl))
  fuzz <- min((nx - 1L) / 1000, 0.4 * nx / ncl)
  breaks <- floor(seq(1 - fuzz, nx + fuzz, length.out = ncl + 1L))
  breaks <- as.integer(pmin(pmax(breaks, 0), nx))
  lapply(seq_along(breaks)[-1L], function(k) breaks[[k - 1L]] + seq_len(breaks[[k]] - breaks[[k - 1L]]))
}

# In the place of parLapplyLB(), whose arguments it gets.
freeElements <- function(cl, X, fun, ..., chunk.size) {
  defaultCluster <- parallels$defaultCluster
  chunked <- parallels$chunked
  cl <- defaultCluster(cl)
  ranks <- if (is.null(chunk.size)) nativeRanks(cl)
  if (is.null(ranks) || !isFree(X, fun)) return(chunked(cl, X, fun, ..., chunk.size = chunk.size))
  applyFree(cl, ranks, X, fun, list(...))
}

# Whether it may be left to the job which elements are sent together. How a vector with a class is taken apart is
# known to its class alone, and what a name stands for to the workers.
isFree <- function(X, fun) {
  length(X) && !is.object(X) && isPlain(X) && is.function(fun)
}

# parLapplyLB() without `chunk.size`.
applyFree <- function(cl, ranks, X, fun, common) {
  n <- length(X)
  asLapply <- seesCall(fun) || "FUN" %in% names(common)
  if (asLapply) common <- c(list(FUN = fun), common)
  job <- runJob(cl, ranks, n, if (asLapply) applyOne else fun, common, X, shares = "all")
  # parallel makes twice as many chunks as there are nodes, and counts those that fail.
  chunks <- if (length(job$failed)) lengths(parallel::splitIndices(n, 2L * length(cl)))
  val <- checkedResults(job, rep(seq_along(chunks), chunks))
  names(val) <- names(X)
  val
}

# In a worker: an element of a chunk, whose function sees the call that lapply() makes there.
applyOne <- function(X, ...) lapply(list(X), ...)[[1L]]

# Whether the function may look at the call that it is called by, or at its caller's frame. For others the detour
# through lapply() would take several times as long as a short element.
seesCall <- function(fun) {
  looks <- c("substitute", "match.call", "sys.call", "sys.calls", "sys.function", "sys.frame", "sys.frames",
             "sys.parent", "sys.nframe", "parent.frame", "UseMethod", "standardGeneric", "Recall", "enquo", "enquos",
             "enexpr", "enexprs", "ensym", "ensyms", "caller_env", "caller_call")
  typeof(fun) == "special" || (typeof(fun) == "closure" && any(all.names(body(fun)) %in% looks))
}

isPlain <- function(x) {
  typeof(x) %in% c("list", "character", "double", "integer", "logical")
}

# What takes the place of parallel's function of this name, with its arguments.
handsOut <- function(name, round) {
  force(round)
  theirs <- parallels[[name]]
  function(cl = NULL, fun, n, argfun) {
    defaultCluster <- parallels$defaultCluster
    cl <- defaultCluster(cl)
    ranks <- nativeRanks(cl)
    if (is.null(ranks)) return(theirs(receivable(cl), fun, n, argfun))
    if (n <= 0L) return(invisible())
    # An error here, as with parallel.
    fun
    # Errors name the same calls.
    start <- i <- job <- 1L
    first <- if (round) argfun(start + i - 1L) else argfun(job)
    tasks <- tasksOf(argfun, n, first)
    if (is.null(tasks)) return(theirs(cl, fun, n, asked(argfun, first)))
    runTasks(cl, ranks, fun, n, tasks, round)
  }
}

# The same function of a task's number, which does not make what is there of the first task once more.
asked <- function(argfun, first) {
  force(first)
  function(i) if (i == 1) first else argfun(i)
}

# Runs the tasks of staticClusterApply() (`round`) or dynamicClusterApply(), and returns their results. `tasks`: as
# tasksOf() gives them. As many tasks as nodes, or fewer: the first goes to the first node, and so on, as with parallel.
runTasks <- function(cl, ranks, fun, n, tasks, round) {
  round <- round || n <= length(cl)
  checkedResults(runJob(cl, ranks, n, fun, tasks$common, tasks$elements, round, spread = tasks$spread))
}

# PSOCK's method of recvOneData() fails at nodes of ours that a user has put among PSOCK's.
receivable <- function(cl) {
  if (!inherits(cl, "RustCluster") && any(areOurs(cl))) class(cl) <- "cluster"
  cl
}

# In the place of clusterCall(): the same call on all nodes.
callNodes <- function(cl = NULL, fun, ...) {
  defaultCluster <- parallels$defaultCluster
  cl <- defaultCluster(cl)
  message <- list(type = "EXEC", data = list(fun = fun, args = list(...), return = TRUE, tag = NULL), tag = NULL)
  values <- callAll(cl, message)
  if (is.null(values)) parallels$clusterCall(cl, fun, ...) else values
}

# Sends the same message to all nodes and returns their values. NULL, and nothing has been done: they are not nodes of
# one cluster of ours, or one is there twice. `lasts`: see settingOf().
callAll <- function(cl, message, lasts = settingOf("clusterCall", message$data)) {
  # Not `[[`, which looks for methods first.
  handle <- if (length(cl)) .subset2(.subset2(cl, 1L), "handle")
  if (is.null(handle)) return(NULL)
  refuseIfBusy(handle, sys.nframe())
  job <- handle$jobs <- handle$jobs + 1
  force(lasts)
  done <- FALSE
  on.exit(if (!done) closeJob(handle, job))
  repeat {
    answers <- hub_call(handle$pointer, cl, job, message, lasts)
    if (!isFromStale(answers, handle)) break
  }
  if (is.null(answers) || (typeof(answers) == "list" && !isFailure(answers))) {
    done <- TRUE
    return(answers)
  }
  continueJob(handle, job, sys.nframe(), 0L, lasts)
  if (isFailure(answers)) handleFailed(answers, handle)
  checked(answers)
  called <- hub_called(handle$pointer)
  answers <- called[[1L]]
  # As they come: what waits for its turn would go through memory twice.
  result <- called[[3L]]
  for (i in seq_len(sum(!called[[2L]]))) {
    if (is.null(result)) result <- hub_receive_any(handle$pointer, cl)
    answer <- nextAnswer(cl, handle, result)
    answers[answer$node] <- list(answer$value$value)
    result <- NULL
  }
  checkForRemoteErrors <- parallels$checkForRemoteErrors
  recvResult <- identity
  cl <- answers
  checkForRemoteErrors(lapply(cl, recvResult))
}
