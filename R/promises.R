# Calls as promises of package 'promises', without polling: when a call ends, the hub's thread makes package 'later'
# call callsWoken().

#' Calls as promises
#'
#' [promises::as.promise()] works on the objects that [clusterSubmit()] and [clusterLapplyAsync()] return. The session
#' neither waits nor polls: it is woken when the call has ended, at the console, in Shiny, and in [later::run_now()]. A
#' promise keeps its call and its cluster alive.
#'
#' @param x An object made by [clusterSubmit()] or [clusterLapplyAsync()].
#' @return A promise. It is fulfilled with the value of the call, or rejected with its error: see [clusterSubmit()].
#' @name promises
#' @examplesIf requireNamespace("promises", quietly = TRUE)
#' cl <- makeRustCluster(2)
#' there <- FALSE
#' promises::then(promises::as.promise(clusterSubmit(cl, 6 * 7)), function(value) {
#'   print(value)
#'   there <<- TRUE
#' })
#' while (!there) later::run_now(1)
#' parallel::stopCluster(cl)
#' @exportS3Method promises::as.promise
as.promise.RustCall <- function(x) {
  record <- recordOf(x)
  promiseOf(function(ended) whenEnded(record, ended))
}

#' @rdname promises
#' @exportS3Method promises::as.promise
as.promise.RustCalls <- function(x) {
  of <- environment(x$status)
  promiseOf(function(ended) {
    left <- length(of$records)
    oneEnded <- function(...) {
      left <<- left - 1L
      if (left > 0L) return()
      all <- callsResult(of$records, of$groups, of$names, of$n)
      ended(all$state, all$result)
    }
    if (left) for (record in of$records) whenEnded(record, oneEnded) else oneEnded()
  })
}

# `start` is called with a function that takes the final state and the result. A value fulfils the promise at once:
# with a handler in between, an interrupt would lose the handler and with it the promise. An error is raised in a
# handler that is made here, because Shiny records the stack where the error is raised, and cannot print an error
# without one.
promiseOf <- function(start) {
  fail <- NULL
  failed <- promises::promise(function(resolve, reject) fail <<- resolve)
  raised <- promises::then(failed, function(error) stop(error))
  promises::promise(function(resolve, reject) {
    start(function(state, result) {
      if (state == "done") return(resolve(result))
      resolve(raised)
      fail(result)
    })
  })
}

#' @rdname promises
#' @exportS3Method promises::is.promising
is.promising.RustCall <- function(x) TRUE

#' @rdname promises
#' @exportS3Method promises::is.promising
is.promising.RustCalls <- function(x) TRUE

# The ids of clusters (the keys of `openCalls`), by the numbers by which the hub's thread names the clusters. `count`:
# the last number.
awaited <- new.env(parent = emptyenv())
awaited$count <- 0

# Calls `waiter` with the state and the result of a call as soon as the call has ended.
whenEnded <- function(record, waiter) {
  # Add the waiter first: it is called whatever ends the call from here on.
  record$waiters <- c(record$waiters, list(waiter))
  checkCall(record)
  if (record$state != "open") return(callWaiters(record))
  handle <- record$handle
  loops <- union(handle$loops, as.integer(later::current_loop()$id))
  if (!identical(loops, handle$loops)) {
    checked(calls_wake(handle$pointer, handle$number, loops), handle)
    handle$loops <- loops
  }
  checked(call_notify(handle$pointer, record$task), handle)
  invisible()
}

# Package 'later' calls this when the hub's thread has asked for it.
callsWoken <- function(number) {
  id <- awaited[[as.character(number)]]
  # Copy the records, because a finalizer may remove any of them.
  records <- if (!is.null(id)) as.list(openCalls[[id]])
  if (!length(records)) return()
  handle <- records[[1L]]$handle
  checkCalls(handle)
  showEvents(handle)
}
