# Calls as promises of package 'promises'. Nobody asks again and again whether one has ended: the hub's
# thread has package 'later' call callsWoken() here.

#' Calls as promises
#'
#' [promises::as.promise()] on what [clusterSubmit()] and [clusterLapplyAsync()] return. The session does
#' not wait for it, and does not look for it either: it is woken when the call has ended, at the console,
#' in Shiny, and in [later::run_now()]. A promise keeps its call and its cluster alive.
#'
#' @param x An object made by [clusterSubmit()] or [clusterLapplyAsync()].
#' @return A promise, which is fulfilled with the call's value, or rejected with its error: see
#'   [clusterSubmit()].
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

# `start` gets a function that takes the state and the result at the end. A value fulfils the promise at once:
# an interrupt would lose a handler between the two, and with it the promise. An error is raised in a handler that is
# made here, because Shiny notes the stack where an error is raised and fails at showing one that has none.
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

# Of clusters, by their numbers, the names by which their records are found. How many there have been: `count`.
awaited <- new.env(parent = emptyenv())
awaited$count <- 0

# Calls `waiter` with the state and the result of a call as soon as that has ended.
whenEnded <- function(record, waiter) {
  # Before anything is looked at: whatever ends the call from here on tells it.
  record$waiters <- c(record$waiters, list(waiter))
  lookAt(record)
  if (record$state != "open") return(tellWaiters(record))
  handle <- record$handle
  loops <- union(handle$loops, as.integer(later::current_loop()$id))
  if (!identical(loops, handle$loops)) {
    checked(calls_wake(handle$pointer, handle$number, loops), handle)
    handle$loops <- loops
  }
  checked(call_watch(handle$pointer, record$task), handle)
  invisible()
}

# Package 'later' calls this, by way of the hub.
callsWoken <- function(number) {
  id <- awaited[[as.character(number)]]
  # A copy: a finalizer may remove any of them.
  records <- if (!is.null(id)) as.list(openCalls[[id]])
  if (!length(records)) return()
  handle <- records[[1L]]$handle
  lookAtCalls(handle)
  showEvents(handle)
}
