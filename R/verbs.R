# The verbs of parallel, under their own names. Given one of our clusters they hand over all tasks at
# once; given anything else they call parallel's.

#' The verbs of parallel
#'
#' Drop-ins for the functions of the same names in \pkg{parallel}, with the same arguments and
#' results. With a cluster made by [makeRustCluster()] they hand the whole job over at once; with any
#' other cluster they call \pkg{parallel}'s. Code that calls `parallel::parLapply()` and so on works
#' with both kinds of cluster too, at the speed of one message a task.
#'
#' What is the same: values, their order and names, errors, what the tasks find and leave on their
#' node, and, for `clusterApply()`, `clusterMap()`, `parLapply()`, `parSapply()`, `parApply()`,
#' `parRapply()` and `parCapply()`, which node has which task, and so the random numbers. Where
#' \pkg{parallel} leaves it open which node gets a task (`clusterApplyLB()`, `parLapplyLB()`,
#' `parSapplyLB()`, `clusterMap(.scheduling = "dynamic")`), short tasks cross together, as many as take
#' about as long as the message for them, fewer towards the end, and one is sent ahead where the way is
#' long. `parLapplyLB()` and `parSapplyLB()` without a `chunk.size` choose it so.
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

# Those above what hands out tasks are parallel's own, as this version of R has them, over ours: see
# findVerbs().

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

# Puts the verbs in their place, when the package is loaded. What they split and put together, and how,
# is what this version of R does; below them are the functions here.
findVerbs <- function(namespace = topenv()) {
  theirs <- environment(parallel::clusterApply)
  below <- new.env(parent = theirs)
  below$clusterCall <- callNodes
  below$staticClusterApply <- handsOut("staticClusterApply", round = TRUE)
  below$dynamicClusterApply <- handsOut("dynamicClusterApply", round = FALSE)
  below$gets <- parallels$gets
  below$splitIndices <- cutIndices
  below$splitList <- rebound("splitList", below)
  names <- c("clusterApply", "clusterApplyLB", "clusterEvalQ", "clusterExport", "clusterMap", "parLapply",
             "parLapplyLB", "parSapply", "parSapplyLB", "parApply", "parRapply", "parCapply")
  for (name in names) {
    verb <- rebound(name, below)
    assign(name, verb, below)
    assign(name, verb, namespace)
  }
  assign("clusterCall", callNodes, namespace)
  # Their parLapplyLB() cuts elements into chunks before it knows how long they take.
  parallels$chunked <- below$parLapplyLB
  free <- freeElements
  formals(free) <- formals(parallels$chunked)
  below$parLapplyLB <- free
  assign("parLapplyLB", free, namespace)
}

# parallel's function of this name, which finds ours before parallel's.
rebound <- function(name, below) {
  theirs <- get(name, parent.env(below))
  environment(theirs) <- below
  theirs
}

# The same as parallel's splitIndices() gives, whose cut() and split() look at each index: a tenth of
# the time of a parLapply() over 1e5 short elements.
cutIndices <- function(nx, ncl) {
  if (ncl < 2L || nx < 2L) return(parallel::splitIndices(nx, ncl))
  fuzz <- min((nx - 1L) / 1000, 0.4 * nx / ncl)
  breaks <- floor(seq(1 - fuzz, nx + fuzz, length.out = ncl + 1L))
  breaks <- as.integer(pmin(pmax(breaks, 0), nx))
  lapply(seq_along(breaks)[-1L], function(k) breaks[[k - 1L]] + seq_len(breaks[[k]] - breaks[[k - 1L]]))
}

# The body of parLapplyLB(), with its arguments.
freeElements <- function(cl, X, fun, ..., chunk.size) {
  defaultCluster <- parallels$defaultCluster
  chunked <- parallels$chunked
  cl <- defaultCluster(cl)
  ranks <- if (is.null(chunk.size)) nativeRanks(cl)
  n <- length(X)
  # How a vector with a class is taken apart is known to its class alone, and what a name stands for to
  # the workers.
  if (is.null(ranks) || !n || is.object(X) || !isPlain(X) || !is.function(fun)) {
    return(chunked(cl, X, fun, ..., chunk.size = chunk.size))
  }
  job <- runJob(cl, ranks, n, fun, list(...), X, shares = "all")
  # parallel makes twice as many chunks as there are nodes, and counts those that fail.
  chunks <- if (length(job$failed)) lengths(parallel::splitIndices(n, 2L * length(cl)))
  val <- checkedResults(job, rep(seq_along(chunks), chunks))
  names(val) <- names(X)
  val
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
    # Missing, it is missing here, as with parallel.
    fun
    checkedResults(runTasks(cl, ranks, fun, n, argfun, round))
  }
}

# PSOCK's method of recvOneData() fails at nodes of ours that a user has put among PSOCK's.
receivable <- function(cl) {
  if (!inherits(cl, "RustCluster") && any(areOurs(cl))) class(cl) <- "cluster"
  cl
}

# `argfun` gives all arguments of a task by its number. Those that are the same for all tasks are
# found where the verb has made it, if it is one of those that are known.
runTasks <- function(cl, ranks, fun, n, argfun, round) {
  made <- environment(argfun)
  of_apply <- quote(c(list(x[[i]]), list(...)))
  of_map <- quote(c(lapply(args, function(x) x[[i]]), MoreArgs))
  if (identical(body(argfun), of_apply)) {
    x <- made[["x"]]
    elements <- if (!is.object(x) && isPlain(x)) x else function(i) x[[i]]
    common <- eval(quote(list(...)), made)
    runJob(cl, ranks, n, fun, common, elements, round)
  } else if (identical(body(argfun), of_map) && (is.null(made$MoreArgs) || is.list(made$MoreArgs))) {
    args <- made$args
    elements <- function(i) lapply(args, function(x) x[[i]])
    runJob(cl, ranks, n, fun, as.list(made$MoreArgs), elements, round, spread = TRUE)
  } else {
    runJob(cl, ranks, n, fun, list(), argfun, round, spread = TRUE)
  }
}

# In the place of clusterCall(): the same call on all nodes.
callNodes <- function(cl = NULL, fun, ...) {
  defaultCluster <- parallels$defaultCluster
  cl <- defaultCluster(cl)
  ranks <- nativeRanks(cl)
  if (is.null(ranks)) return(parallels$clusterCall(cl, fun, ...))
  handle <- cl[[1L]][["handle"]]
  data <- list(fun = fun, args = list(...), return = TRUE, tag = NULL)
  job <- beginJob(handle, sys.nframe(), settingOf("clusterCall", data))
  on.exit(closeJob(handle, job))
  sent <- hub_broadcast(
    handle$pointer, ranks, job, list(type = "EXEC", data = data, tag = NULL), handle$lasts
  )
  if (is.character(sent)) handleFailed(sent, handle)
  checked(sent)
  # As they come: what waits for its turn would go through memory twice.
  answers <- vector("list", length(cl))
  for (i in seq_along(cl)) {
    answer <- recvOneData.RustCluster(cl)
    answers[answer$node] <- list(answer$value$value)
  }
  checkForRemoteErrors <- parallels$checkForRemoteErrors
  recvResult <- identity
  cl <- answers
  checkForRemoteErrors(lapply(cl, recvResult))
}
