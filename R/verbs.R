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
#' `fun` and what is in `...` are serialized once a job. A worker reads them once if nothing in them can
#' change, and otherwise, for a function that was made in another function, anew for each task, as with
#' \pkg{parallel}.
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
#' their rate, the time that is left and the workers that are busy.
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

#' @rdname verbs
#' @export
clusterCall <- function(cl = NULL, fun, ...) {
  cl <- given(cl)
  ranks <- nativeRanks(cl)
  if (is.null(ranks)) return(parallel::clusterCall(cl, fun, ...))
  callNodes(cl, ranks, fun, list(...), "")
}

#' @rdname verbs
#' @export
clusterEvalQ <- function(cl = NULL, expr) {
  expr <- substitute(expr)
  clusterCall(cl, eval, expr, envir = .GlobalEnv)
}

#' @rdname verbs
#' @export
clusterExport <- function(cl = NULL, varlist, envir = .GlobalEnv) {
  cl <- given(cl)
  ranks <- nativeRanks(cl)
  if (is.null(ranks)) return(parallel::clusterExport(cl, varlist, envir))
  for (name in varlist) {
    callNodes(cl, ranks, parallels$gets, list(name, get(name, envir = envir)), name)
  }
}

#' @rdname verbs
#' @export
clusterApply <- function(cl = NULL, x, fun, ...) {
  cl <- given(cl)
  ranks <- nativeRanks(cl)
  if (is.null(ranks)) return(parallel::clusterApply(cl, x, fun, ...))
  applyTasks(cl, ranks, x, fun, list(...), round = TRUE)
}

#' @rdname verbs
#' @export
clusterApplyLB <- function(cl = NULL, x, fun, ...) {
  cl <- given(cl)
  ranks <- nativeRanks(cl)
  if (is.null(ranks)) return(parallel::clusterApplyLB(cl, x, fun, ...))
  applyTasks(cl, ranks, x, fun, list(...), round = FALSE)
}

#' @rdname verbs
#' @export
clusterMap <- function(cl = NULL, fun, ..., MoreArgs = NULL, RECYCLE = TRUE, SIMPLIFY = FALSE,
                       USE.NAMES = TRUE, .scheduling = c("static", "dynamic")) {
  over$clusterMap(
    given(cl), fun, ..., MoreArgs = MoreArgs, RECYCLE = RECYCLE, SIMPLIFY = SIMPLIFY,
    USE.NAMES = USE.NAMES, .scheduling = .scheduling
  )
}

#' @rdname verbs
#' @export
parLapply <- function(cl = NULL, X, fun, ..., chunk.size = NULL) {
  over$parLapply(given(cl), X, fun, ..., chunk.size = chunk.size)
}

#' @rdname verbs
#' @export
parLapplyLB <- function(cl = NULL, X, fun, ..., chunk.size = NULL) {
  cl <- given(cl)
  ranks <- if (is.null(chunk.size)) nativeRanks(cl)
  n <- length(X)
  # How a vector with a class is taken apart is known to its class alone.
  if (is.null(ranks) || !n || is.object(X) || !isPlain(X)) {
    return(over$parLapplyLB(cl, X, fun, ..., chunk.size = chunk.size))
  }
  job <- runJob(cl, ranks, n, match.fun(fun), list(...), X)
  val <- if (length(job$failed)) {
    # parallel makes twice as many chunks as there are nodes, and counts those that fail.
    chunks <- parallel::splitIndices(n, 2L * length(cl))
    checkedResults(job, rep(seq_along(chunks), lengths(chunks)))
  } else {
    job$values
  }
  names(val) <- names(X)
  val
}

#' @rdname verbs
#' @export
parSapply <- function(cl = NULL, X, FUN, ..., simplify = TRUE, USE.NAMES = TRUE, chunk.size = NULL) {
  over$parSapply(
    given(cl), X, FUN, ..., simplify = simplify, USE.NAMES = USE.NAMES, chunk.size = chunk.size
  )
}

#' @rdname verbs
#' @export
parSapplyLB <- function(cl = NULL, X, FUN, ..., simplify = TRUE, USE.NAMES = TRUE, chunk.size = NULL) {
  over$parSapplyLB(
    given(cl), X, FUN, ..., simplify = simplify, USE.NAMES = USE.NAMES, chunk.size = chunk.size
  )
}

#' @rdname verbs
#' @export
parApply <- function(cl = NULL, X, MARGIN, FUN, ..., chunk.size = NULL) {
  over$parApply(given(cl), X, MARGIN, FUN, ..., chunk.size = chunk.size)
}

#' @rdname verbs
#' @export
parRapply <- function(cl = NULL, x, FUN, ..., chunk.size = NULL) {
  over$parRapply(given(cl), x, FUN, ..., chunk.size = chunk.size)
}

#' @rdname verbs
#' @export
parCapply <- function(cl = NULL, x, FUN, ..., chunk.size = NULL) {
  over$parCapply(given(cl), x, FUN, ..., chunk.size = chunk.size)
}

# parallel's own functions above those that hand out tasks, over ours: what they split and put together,
# and how, is what this version of R does. Filled when the package is loaded.
over <- new.env(parent = emptyenv())

findVerbs <- function() {
  namespace <- environment(parallel::clusterApply)
  ours <- new.env(parent = namespace)
  for (name in c("clusterApply", "clusterApplyLB", "parLapplyLB")) {
    assign(name, get(name, topenv()), ours)
  }
  ours$staticClusterApply <- function(cl = NULL, fun, n, argfun) {
    applyCalls(parallels$staticClusterApply, cl, fun, n, argfun, round = TRUE)
  }
  ours$dynamicClusterApply <- function(cl = NULL, fun, n, argfun) {
    applyCalls(parallels$dynamicClusterApply, cl, fun, n, argfun, round = FALSE)
  }
  names <- c("clusterMap", "parLapply", "parLapplyLB", "parSapply", "parSapplyLB", "parApply",
             "parRapply", "parCapply")
  for (name in names) {
    verb <- get(name, namespace)
    environment(verb) <- ours
    assign(name, verb, over)
    if (!exists(name, ours, inherits = FALSE)) assign(name, verb, ours)
  }
}

# The default cluster where none is given. parallel says it if there is none.
given <- function(cl) {
  if (is.null(cl)) parallel::getDefaultCluster() else cl
}

isPlain <- function(x) {
  typeof(x) %in% c("list", "character", "double", "integer", "logical")
}

applyTasks <- function(cl, ranks, x, fun, common, round) {
  n <- length(x)
  if (!n) return(invisible())
  elements <- if (!is.object(x) && isPlain(x)) x else function(i) x[[i]]
  checkedResults(runJob(cl, ranks, n, fun, common, elements, round))
}

# What parallel's clusterMap() calls: `argfun` gives all arguments of a task. Those that are the same
# for all are found where it was made.
applyCalls <- function(parallels, cl, fun, n, argfun, round) {
  ranks <- nativeRanks(cl)
  if (is.null(ranks)) return(parallels(cl, fun, n, argfun))
  if (!n) return(invisible())
  made <- environment(argfun)
  more <- made[["MoreArgs"]]
  args <- made[["args"]]
  if (is.list(args) && (is.null(more) || is.list(more))) {
    elements <- function(i) lapply(args, function(x) x[[i]])
  } else {
    elements <- argfun
    more <- NULL
  }
  checkedResults(runJob(cl, ranks, n, fun, as.list(more), elements, round, spread = TRUE))
}

# The same call on all nodes. `lasts`: the name of what it sets there, or "".
callNodes <- function(cl, ranks, fun, args, lasts) {
  handle <- cl[[1L]][["handle"]]
  job <- beginJob(handle, sys.nframe(), lasts)
  on.exit(closeJob(handle, job))
  message <- list(type = "EXEC", data = list(fun = fun, args = args, return = TRUE, tag = NULL), tag = NULL)
  for (node in cl) sendTask(handle, node[["rank"]], message)
  checkForRemoteErrors <- parallels$checkForRemoteErrors
  val <- lapply(cl, function(node) recvData.RustNode(node)$value)
  checkForRemoteErrors(val)
}
