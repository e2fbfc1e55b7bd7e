# Calls of clusterSubmit() and clusterLapplyAsync(): their records in the session, their results and their retries.

# The records of open calls, by the ids of their clusters and their numbers. The records are not in the handle, which
# is sent along with nodes.
#
# The garbage collector runs finalizers between any two lines of R code. So a cluster's table lives as long as
# its handle (newHandle(), forgetCluster()), a record is in the table before its call is sent, and the
# finalizer of a call, dropCall(), removes its own record and changes nothing else.
openCalls <- new.env(parent = emptyenv())

recordsOf <- function(handle) openCalls[[handle$id]]

# Returns the cluster that gets the next call: the one with the most idle workers, or, without any idle worker, with the
# fewest open calls for each worker.
freest <- function(parts) {
  if (length(parts) == 1L) return(parts[[1L]])
  usable <- Filter(function(part) !part$handle$stopped, parts)
  if (!length(usable)) return(parts[[1L]])
  load <- vapply(usable, function(part) {
    states <- checked(hub_status(part$handle$pointer), part$handle)$state[part$ranks]
    idle <- sum(states == "idle")
    if (idle) -idle else length(recordsOf(part$handle)) / length(part$ranks)
  }, 0)
  usable[[which.min(load)]]
}

keyOf <- function(task) format(task, scientific = FALSE)

# Removes a record. A finalizer may have removed it before.
forgetRecord <- function(record) {
  suppressWarnings(rm(list = keyOf(record$task), envir = recordsOf(record$handle)))
}

# Runs a function with these arguments on the next idle worker. `label`: the printed name of the call. `what`: what
# error messages call it. `reportsProgress`: whether the caller relays the conditions that the call reports.
submit <- function(cl, fun, args, label, what = "the call", reportsProgress = FALSE) {
  sendCall(newRecord(cl, fun, args, label, what, reportsProgress))
}

# Returns the record of a call, which has not been sent yet.
newRecord <- function(cl, fun, args, label, what = "the call", reportsProgress = FALSE) {
  part <- freest(clustersOf(cl))
  handle <- part$handle
  if (handle$stopped) raiseFailure(rustFailure("stopped"))
  ranks <- unique(part$ranks)
  if (handle$job != noJob) closeStale(handle, sys.nframe())
  record <- new.env(parent = emptyenv())
  record$handle <- handle
  record$session <- session
  record$ranks <- ranks
  record$label <- label
  record$what <- what
  record$began <- proc.time()[["elapsed"]]
  # If this session ends before the call, the agent keeps the answer, which repeats the tag: see keptResults().
  keep <- !is.null(handle$linger) && (identical(fun, evaluateCall) || identical(fun, applyGroup))
  data <- list(fun = fun, args = args, return = TRUE, tag = if (keep) label)
  record$message <- list(type = "EXEC", data = data, tag = NULL)
  record$state <- "open"
  record$waiters <- list()
  record$reportsProgress <- reportsProgress
  task <- call_number(handle$pointer, keep)
  if (isFailure(task)) handleFailed(task, handle)
  record$task <- task
  record
}

sendCall <- function(record) {
  handle <- record$handle
  sent <- FALSE
  on.exit(if (!sent) forgetRecord(record))
  assign(keyOf(record$task), record, recordsOf(handle))
  result <- call_submit(handle$pointer, record$ranks, record$task, record$what, record$message)
  if (isFailure(result)) handleFailed(result, handle)
  checked(result)
  sent <- TRUE
  # Rust has it, for as long as the call may have to be sent again.
  record$message <- NULL
  callMade(handle)
  record
}

# Ends a call: `state` is "done", "failed" or "cancelled", `result` its value or condition. The hub removes the call at
# the same time, without interrupts in between: a call that the hub has removed must not be open here.
endCall <- function(record, state, result) {
  suspendInterrupts({
    record$result <- result
    record$state <- state
    record$took <- proc.time()[["elapsed"]] - record$began
    call_forget(record$handle$pointer, record$task)
    forgetRecord(record)
    callWaiters(record)
  })
}

# Removes each waiter before it is called: it may run any code.
callWaiters <- function(record) {
  while (length(record$waiters)) {
    waiter <- record$waiters[[1L]]
    record$waiters <- record$waiters[-1L]
    waiter(record$state, record$result)
  }
}

# Whether this session has made the call. Otherwise the call was saved with a workspace, or sent to another process.
isOwnCall <- function(record) identical(record$session, session)

# Ends a call of a session that has ended, whose cluster lingers: nobody answers it here.
endForeignCall <- function(record) {
  if (record$state != "open" || is.null(record$handle$linger) || isOwnCall(record)) return(invisible())
  record$result <- rustclusterCondition("restored", paste0(
    record$what, " was made by another session; if the cluster has kept the result, keptResults() returns it once the ",
    "cluster is connected"
  ))
  record$state <- "failed"
}

# Checks whether a call has ended, and handles its result or its failure.
checkCall <- function(record) {
  endForeignCall(record)
  if (record$state != "open") return(invisible())
  handle <- record$handle
  end <- takeCall(record)
  if (is.null(end)) return(acknowledgeLosses(handle))
  if (!isFailure(end)) {
    answered(record, end)
  } else if (is.null(end[["task"]])) {
    handleFailed(end, handle)
  } else {
    callEnded(record, end)
  }
  invisible()
}

# Returns the answer to a call, or its failure, or NULL if the call has not ended. An answer that cannot be read is a
# failure of the call. After an interrupt the answer is read again.
takeCall <- function(record) {
  tryCatch(
    withCallingHandlers(
      {
        end <- call_take(record$handle$pointer, record$task)
        if (typeof(end) == "pairlist") unwound(end)
        end
      },
      error = function(e) if (!isTimeLimit(e)) signalUnread(e)
    ),
    rustcluster_unread = function(unread) {
      endCall(record, "failed", notRead(unread))
      NULL
    }
  )
}

answered <- function(record, answer) {
  value <- answer$value
  takeProgressEvents(record)
  if (inherits(value, "rustcluster_raised")) return(endCall(record, "failed", value$error))
  if (isTRUE(answer$success)) return(endCall(record, "done", value$value))
  # The error is not of the code of the call: for example, its value could not be sent.
  endCall(record, "failed", rustclusterCondition("call_failed", as.character(unclass(value))))
}

callEnded <- function(record, failure) {
  handle <- record$handle
  failure$tasks <- record$what
  if (handle$stopped && failure[["kind"]] != "timeout") failure <- rustFailure("stopped")
  condition <- if (failure[["kind"]] == "task_failed") {
    callLost(record$what, lapply(failure[["losses"]], failureCondition, handle))
  } else {
    failureCondition(failure, handle)
  }
  endCall(record, "failed", condition)
}

callLost <- function(what, losses) {
  rustclusterCondition("task_failed", lostText(what, losses), losses = losses)
}

# Receives what a call has reported while it runs (see report()). raisePending() raises the conditions, unless the
# caller relays them.
takeProgressEvents <- function(record) {
  handle <- record$handle
  suspendInterrupts({
    events <- call_progress_events(handle$pointer, record$task)
    if (!isFailure(events)) {
      conditions <- readReports(events)
      if (isTRUE(record$reportsProgress)) {
        record$progressEvents <- c(record$progressEvents, conditions)
      } else {
        addReports(handle, conditions)
      }
    }
  })
  invisible()
}

# Handles all calls of a cluster that have ended or failed.
checkCalls <- function(handle) {
  tasks <- calls_to_check(handle$pointer)
  if (typeof(tasks) != "double") return(invisible())
  records <- recordsOf(handle)
  complete <- FALSE
  # After an interrupt, handle the other calls as soon as possible, and not when another call ends.
  on.exit(if (!complete && length(handle$loops)) calls_wake(handle$pointer, handle$number, handle$loops))
  for (task in tasks) {
    record <- records[[keyOf(task)]]
    # A dropped call has no record.
    if (is.null(record)) call_forget(handle$pointer, task) else checkCall(record)
  }
  complete <- TRUE
  if (length(handle$adaptive)) tendBatches(handle)
  raisePending(handle)
  invisible()
}

# The accessors ------------------------------------------------------------------------------------

newCall <- function(record) {
  force(record)
  call <- list(
    status = function() callStatus(record),
    value = function() callValue(record),
    cancel = function() invisible(cancelCall(record))
  )
  # The object consists of this environment.
  reg.finalizer(environment(), dropCall)
  structure(call, class = "RustCall")
}

recordOf <- function(call) get("record", environment(call$status))

callStatus <- function(record) {
  if (record$state != "open") return(record$state)
  checkCalls(record$handle)
  checkCall(record)
  if (length(record$handle$adaptive)) tendBatches(record$handle)
  raisePending(record$handle)
  if (record$state != "open") return(record$state)
  rank <- checked(call_location(record$handle$pointer, record$task), record$handle)
  record$rank <- rank
  # Rank 0 means that the call waits for a worker.
  if (identical(rank, 0L)) "waiting" else "running"
}

# Waits for the value. `signal`: whether to raise an error, or to return it as a condition.
callValue <- function(record, signal = TRUE) {
  force(signal)
  awaitCall(record)
  if (record$state != "done" && signal) stop(record$result)
  record$result
}

awaitCall <- function(record) {
  handle <- record$handle
  withoutCallOfTimeLimit(while (record$state == "open") {
    checkCalls(handle)
    takeProgressEvents(record)
    if (length(record$progressEvents)) break
    checkCall(record)
    raisePending(handle)
    if (record$state != "open") break
    waited <- call_wait(handle$pointer, record$task)
    if (isFailure(waited)) handleFailed(waited, handle)
    showEvents(handle)
    showFutures(handle$id)
    raiseInterrupt()
  })
  invisible()
}

cancelCall <- function(record) {
  if (record$state != "open") return(FALSE)
  checkCall(record)
  if (record$state != "open") return(FALSE)
  # This fails in a fork, where the call belongs to another process.
  suspendInterrupts({
    checked(call_forget(record$handle$pointer, record$task), record$handle)
    endCall(record, "cancelled", rustclusterCondition("cancelled", "the call was cancelled"))
  })
  TRUE
}

# Cancels a call whose object is garbage-collected. This is a finalizer: see `openCalls`.
dropCall <- function(envir) {
  record <- envir$record
  if (record$state != "open" || length(record$waiters)) return()
  # This fails in a fork, where the call belongs to another process.
  if (!is.null(call_drop(record$handle$pointer, record$task))) return()
  record$state <- "cancelled"
  forgetRecord(record)
}

#' @export
format.RustCall <- function(x, ...) {
  record <- recordOf(x)
  state <- tryCatch(callStatus(record), error = function(e) "unusable")
  label <- record$label
  if (nchar(label) > 60L) label <- paste0(substr(label, 1L, 57L), "...")
  took <- if (!is.null(record$took)) record$took else if (isOwnCall(record)) proc.time()[["elapsed"]] - record$began
  where <- if (state == "running" && isTRUE(record$rank > 0L)) {
    paste0(" on worker ", record$rank, " on host ", sQuote(record$handle$hosts[[record$rank]]))
  }
  paste0("<call ", label, ": ", state, where, if (!is.null(took)) sprintf(", %.1f s", took), ">")
}

#' @export
print.RustCall <- function(x, ...) {
  cat(format(x), "\n", sep = "")
  invisible(x)
}
