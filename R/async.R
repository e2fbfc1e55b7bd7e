# clusterLapplyAsync(): clusterLapply() as calls that run in the background.

#' Apply a function over a list asynchronously
#'
#' Works as [clusterLapply()], but returns at once. Elements are sent in groups. Each
#' group is a call, as [clusterSubmit()] makes it.
#'
#' @inheritParams clusterLapply
#' @param .seed (logical or integer) As in [clusterLapply()]. The streams of random numbers are the same.
#' @details There are eight groups for each worker, which are fixed when they are sent. Slow elements are therefore
#' not balanced as well as by `clusterLapply()`. A worker failure or a timeout affects all elements of a group.
#' Each element gets its own copies of `FUN` and `...`; an object that refers to an environment is shared within its
#' group. Each group contains all of `...`: export large data instead.
#' There is no progress bar.
#'
#' If the session ends and the cluster was made with `linger`, [keptResults()] returns an element for each group that
#' had begun: its `label` is that of the elements, such as `"elements 5 to 8"`, and its `value` a list with a list for
#' each element, which contains its `value` or its `error`.
#' @return An object of class `"RustCalls"`, a list of functions `status()`, `value()` and `cancel()`, like the
#'   object that [clusterSubmit()] returns. `value()` returns a list with the results, named as `X`. `status()` is
#'   `"waiting"` until the first group has started. [promises::as.promise()] works on the object, and so do
#'   `value()` and `resolved()` of \pkg{future} ([future_generics]).
#' @section Errors:
#' `value()` waits for all groups before it raises an error. `rustcluster_element_failed`: `FUN` raised errors. The
#' condition has the fields of [clusterLapply()]; `parent` is the first error itself. If a group failed, timed out or
#' was cancelled, the error is one of those of [clusterSubmit()], with fields `results`, `indices` (of all elements
#' without a result) and `errors` (the errors that `FUN` raised, named by index).
#' @examples
#' cl <- makeRustCluster(2)
#' squares <- clusterLapplyAsync(cl, 1:10, function(i) i^2)
#' squares$status()
#' str(squares$value())
#' parallel::stopCluster(cl)
#' @export
clusterLapplyAsync <- function(cl = NULL, X, FUN, ..., .seed = FALSE) {
  if (!missing(X)) refuseSwapped(cl, X)
  cl <- theCluster(cl)
  FUN <- theFunction(FUN)
  if (missing(X)) badArgument("X", "is missing")
  refuseUnknown(clusterLapplyAsync, "clusterLapplyAsync", ...names(), args(FUN))
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
    # Add the record before it is sent: from then on an interrupt cancels the call.
    records <- c(records, list(record))
    sendCall(record)
  }
  calls <- newCalls(records, groups, names(X), n)
  made <- TRUE
  calls
}

# The number of groups for each worker.
perWorker <- 8L

# Runs in a worker. Returns a list for each element, with its `value` or its `error`.
applyGroup <- function(fun, elements, common, seeds) {
  own <- ownCopies(fun, common)
  one <- function(element, seed) {
    mine <- own()
    fun <- mine[[1L]]
    args <- c(list(element), mine[[2L]])
    caught(
      list(value = if (is.null(seed)) do.call(fun, args, quote = TRUE) else runSeeded(fun, args, seed)),
      failed = function(e) {
        tellError(e)
        list(error = e)
      }
    )
  }
  list(value = Map(one, elements, seeds))
}

# Returns a function that returns a list of the function and the arguments of an element. Both are copies, because C
# code may change them in place. An object that refers to an environment cannot be copied, and is the same each time.
ownCopies <- function(fun, common) {
  both <- fixedBytes(list(fun, common))
  if (!is.null(both)) return(function() unserialize(both))
  arguments <- fixedBytes(common)
  if (is.null(arguments)) return(function() list(fun, common))
  function() list(fun, unserialize(arguments))
}

# Returns the serialized value, or NULL if the value refers to an environment or an external pointer.
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

# Returns the state and the result of all calls, which must have ended.
callsResult <- function(records, groups, names, n) {
  results <- structure(vector("list", n), names = names)
  # The errors at their indices: adding to a list copies it.
  errors <- vector("list", n)
  failed <- logical(n)
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
      if ("error" %in% names(one)) {
        errors[i] <- one["error"]
        failed[[i]] <- TRUE
      } else {
        results[i] <- one["value"]
      }
    }
  }
  indices <- which(failed)
  errors <- errors[indices]
  if (length(indices)) names(errors) <- indices
  if (!is.null(broken)) {
    broken$result$results <- results
    broken$result$indices <- sort(c(without, indices))
    broken$result$errors <- errors
    return(list(state = broken$state, result = broken$result))
  }
  if (!length(errors)) return(list(state = "done", result = results))
  text <- conditionMessage(errors[[1L]])
  list(state = "failed", result = elementFailed(text, indices, unname(results), parent = errors[[1L]]))
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
