# clusterLapply() as calls, so that the session goes on.

#' Apply a function over a list on a cluster, without waiting
#'
#' As [clusterLapply()], but returns at once. Elements cross in groups, each of which is a call such as
#' [clusterSubmit()] makes.
#'
#' @inheritParams clusterLapply
#' @param .seed (logical or integer) As of [clusterLapply()], with the same streams.
#' @details The groups, eight for each worker, are fixed when they are sent. So elements that take longer
#' are not divided as by `clusterLapply()`, and those of a group are lost, or take too long, together.
#' Each element gets copies of `FUN` and `...`; what refers to an environment is shared within the group.
#' Each group takes all of `...` along: export large data instead.
#' There is no progress bar.
#' @return An object of class `"RustCalls"`, a list of functions `status()`, `value()` and `cancel()`, as
#'   that of [clusterSubmit()]; `value()` is a list with the results, named as `X`. It is `"waiting"`
#'   until its first group has been begun. [promises::as.promise()] works on it, and so do
#'   `value()` and `resolved()` of \pkg{future} ([future_generics]).
#' @section Errors:
#' `value()` raises, when all have ended, `rustcluster_element_failed` for errors of `FUN`'s, with the
#' fields of [clusterLapply()] and `parent`, the error itself; for what was lost, took too long or was
#' cancelled those of [clusterSubmit()], with fields `results`, `indices` (of all elements without a
#' result) and `errors` (those of `FUN`'s, named by index).
#' @examples
#' cl <- makeRustCluster(2)
#' squares <- clusterLapplyAsync(cl, 1:10, function(i) i^2)
#' squares$status()
#' str(squares$value())
#' parallel::stopCluster(cl)
#' @export
clusterLapplyAsync <- function(cl = NULL, X, FUN, ..., .seed = FALSE) {
  cl <- theCluster(cl)
  FUN <- theFunction(FUN)
  if (missing(X)) badArgument("X", "is missing")
  refuseUnknown("clusterLapplyAsync", ...names(), names(formals(args(FUN))))
  if (!is.vector(X) || is.object(X) || !isPlain(X)) X <- as.list(X)
  n <- length(X)
  seed <- streamsOf(plain(.seed), n)
  groups <- if (n) parallel::splitIndices(n, min(n, perWorker * length(cl)))
  common <- list(...)
  records <- list()
  made <- FALSE
  on.exit(if (!made) lapply(records, cancelCall))
  for (group in groups) {
    seeds <- if (is.null(seed)) vector("list", length(group)) else lapply(group, seed)
    args <- list(fun = FUN, elements = unname(X[group]), common = common, seeds = seeds)
    label <- spanText(group, "element")
    record <- newRecord(cl, applyGroup, args, label, label)
    # Before it is sent: whoever is interrupted from then on cancels it.
    records <- c(records, list(record))
    sendCall(record)
  }
  calls <- newCalls(records, groups, names(X), n)
  made <- TRUE
  calls
}

# Groups that each worker gets, if their elements take the same time.
perWorker <- 8L

# In a worker. For each element a list with its `value` or its `error`.
applyGroup <- function(fun, elements, common, seeds) {
  own <- ownCopies(fun, common)
  one <- function(element, seed) {
    mine <- own()
    fun <- mine[[1L]]
    args <- c(list(element), mine[[2L]])
    caught(
      list(value = if (is.null(seed)) do.call(fun, args, quote = TRUE) else runSeeded(fun, args, seed)),
      failed = function(e) list(error = e)
    )
  }
  list(value = Map(one, elements, seeds))
}

# A function that gives the function and the arguments of an element in a list: copies, because C code may
# change them in place. What shares an environment cannot be copied apart and is the same each time.
ownCopies <- function(fun, common) {
  both <- fixedBytes(list(fun, common))
  if (!is.null(both)) return(function() unserialize(both))
  arguments <- fixedBytes(common)
  if (is.null(arguments)) return(function() list(fun, common))
  function() list(fun, unserialize(arguments))
}

# The value in R's serialization; NULL if it refers to an environment or an external pointer.
fixedBytes <- function(value) {
  fixed <- TRUE
  refers <- function(object) {
    if (!inherits(object, "srcfile")) fixed <<- FALSE
    NULL
  }
  bytes <- serialize(value, NULL, xdr = FALSE, refhook = refers)
  if (fixed) bytes
}

newCalls <- function(records, groups, names, n) {
  force(list(records, groups, names, n))
  calls <- list(
    status = function() callsStatus(records),
    value = function() callsValue(records, groups, names, n),
    cancel = function() invisible(any(vapply(records, cancelCall, NA)))
  )
  reg.finalizer(environment(), dropCalls)
  structure(calls, class = "RustCalls")
}

dropCalls <- function(envir) {
  for (record in envir$records) dropCall(list(record = record))
}

callsStatus <- function(records) {
  states <- vapply(records, callStatus, "")
  if (all(states == "waiting") && length(states)) return("waiting")
  if (any(states %in% c("waiting", "running"))) return("running")
  bad <- setdiff(states, "done")
  if (!length(bad)) {
    failed <- function(record) any(vapply(record$result, function(one) "error" %in% names(one), NA))
    return(if (any(vapply(records, failed, NA))) "failed" else "done")
  }
  if ("cancelled" %in% bad) "cancelled" else "failed"
}

callsValue <- function(records, groups, names, n, signal = TRUE) {
  force(signal)
  for (record in records) awaitCall(record)
  state <- callsResult(records, groups, names, n)
  if (state$state != "done" && signal) stop(state$result)
  state$result
}

# All have ended: the state and the result of the whole.
callsResult <- function(records, groups, names, n) {
  results <- structure(vector("list", n), names = names)
  errors <- list()
  broken <- NULL
  without <- integer()
  for (at in seq_along(records)) {
    record <- records[[at]]
    if (record$state != "done") {
      if (is.null(broken)) broken <- record
      without <- c(without, groups[[at]])
      next
    }
    for (k in seq_along(groups[[at]])) {
      i <- groups[[at]][[k]]
      one <- record$result[[k]]
      if ("error" %in% names(one)) errors[[as.character(i)]] <- one$error else results[i] <- one["value"]
    }
  }
  if (!is.null(broken)) {
    broken$result$results <- results
    broken$result$indices <- sort(c(without, as.integer(names(errors))))
    broken$result$errors <- errors
    return(list(state = broken$state, result = broken$result))
  }
  if (!length(errors)) return(list(state = "done", result = results))
  text <- conditionMessage(errors[[1L]])
  failed <- elementFailed(text, as.integer(names(errors)), unname(results), parent = errors[[1L]])
  list(state = "failed", result = failed)
}

#' @export
format.RustCalls <- function(x, ...) {
  records <- environment(x$status)$records
  state <- tryCatch(callsStatus(records), error = function(e) "unusable")
  ended <- sum(vapply(records, function(record) record$state != "open", NA))
  paste0("<", length(records), " calls for ", environment(x$status)$n, " elements: ", state, ", ", ended, " ended>")
}

#' @export
print.RustCalls <- function(x, ...) {
  cat(format(x), "\n", sep = "")
  invisible(x)
}
