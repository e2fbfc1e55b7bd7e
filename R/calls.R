# Calls of clusterSubmit() and clusterLapplyAsync(): what the session knows of each, and what becomes of it.

# What is known here of a call. The records of those that have not ended, by their clusters' names and
# their numbers: whoever decides on a call that was lost finds its message here. Not in the handle, which
# goes wherever a node goes.
#
# The garbage collector runs finalizers between any two lines of R code. So a cluster's table lives as long as
# its handle (newHandle(), forgetCluster()), a record is in the table before its call is sent, and the
# finalizer of a call, dropCall(), removes its own record and changes nothing else.
openCalls <- new.env(parent = emptyenv())

recordsOf <- function(handle) openCalls[[handle$id]]

# Of the clusters that nodes are of, the one that gets the next call: with the most idle workers, or else the
# fewest calls that have not ended.
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

# Without a warning if it is not there: a finalizer may have removed it.
forgetRecord <- function(record) {
  suppressWarnings(rm(list = keyOf(record$task), envir = recordsOf(record$handle)))
}

# Has a function called with these arguments by whoever is free. `label`: what the call is, for people.
# `what`: what errors call it.
# `tells`: what it tells before its end is wanted.
submit <- function(cl, fun, args, label, what = "the call", tells = FALSE) {
  sendCall(newRecord(cl, fun, args, label, what, tells))
}

# The record of a call that is still to be sent.
newRecord <- function(cl, fun, args, label, what = "the call", tells = FALSE) {
  part <- freest(clustersOf(cl))
  handle <- part$handle
  if (handle$stopped) raiseFailure(c(kind = "stopped"))
  ranks <- unique(part$ranks)
  if (handle$job != noJob) closeStale(handle, sys.nframe())
  record <- new.env(parent = emptyenv())
  record$handle <- handle
  record$ranks <- ranks
  record$label <- label
  record$what <- what
  record$began <- proc.time()[["elapsed"]]
  data <- list(fun = fun, args = args, return = TRUE, tag = NULL)
  record$message <- list(type = "EXEC", data = data, tag = NULL)
  record$losses <- list()
  record$state <- "open"
  record$waiters <- list()
  record$tells <- tells
  task <- call_number(handle$pointer)
  if (typeof(task) == "character") handleFailed(task, handle)
  record$task <- task
  record
}

sendCall <- function(record) {
  handle <- record$handle
  sent <- FALSE
  on.exit(if (!sent) forgetRecord(record))
  assign(keyOf(record$task), record, recordsOf(handle))
  result <- call_submit(handle$pointer, record$ranks, record$task, FALSE, record$message)
  if (typeof(result) == "character") handleFailed(result, handle)
  checked(result)
  sent <- TRUE
  record
}

# The call has ended: `state` is "done", "failed" or "cancelled", `result` its value or condition. The hub
# forgets it, all or nothing of which is done: what the hub has forgotten must not be open here.
endCall <- function(record, state, result) {
  suspendInterrupts({
    record$result <- result
    record$state <- state
    record$took <- proc.time()[["elapsed"]] - record$began
    record$message <- NULL
    call_forget(record$handle$pointer, record$task)
    forgetRecord(record)
    tellWaiters(record)
  })
}

# One at a time: each may run any code.
tellWaiters <- function(record) {
  while (length(record$waiters)) {
    waiter <- record$waiters[[1L]]
    record$waiters <- record$waiters[-1L]
    waiter(record$state, record$result)
  }
}

# Looks whether the call has ended, and decides on it if it was lost.
lookAt <- function(record) {
  if (record$state != "open") return(invisible())
  handle <- record$handle
  end <- takeCall(record)
  switch(typeof(end),
    list = answered(record, end),
    character = if ("task" %in% names(end)) callEnded(record, end) else handleFailed(end, handle)
  )
  invisible()
}

# The answer to a call, or a failure; NULL if it has not ended. An answer that cannot be read is the call's
# failure. What is interrupted is read anew.
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
  takeAsides(record)
  if (inherits(value, "rustcluster_raised")) return(endCall(record, "failed", value$error))
  if (isTRUE(answer$success)) return(endCall(record, "done", value$value))
  # It was not R code of the call's own: its value could not be sent, say.
  endCall(record, "failed", rustclusterCondition("call_failed", as.character(unclass(value))))
}

callEnded <- function(record, failure) {
  handle <- record$handle
  condition <- failureCondition(c(failure, tasks = record$what, index = NA), handle)
  condition$index <- NULL
  failed <- function(condition) endCall(record, "failed", condition)
  if (failure[["kind"]] == "timeout") return(failed(condition))
  if (handle$stopped || failure[["kind"]] == "stopped" || handle$retries == 0) {
    if (handle$stopped) condition <- failureCondition(c(kind = "stopped"), handle)
    return(failed(condition))
  }
  losses <- c(record$losses, list(condition))
  logAttempt(failure, length(losses), length(losses) <= handle$retries)
  if (length(losses) > handle$retries) return(failed(callLost(record$what, losses)))
  pids <- hub_pids(handle$pointer)
  if (typeof(pids) != "integer" || all(is.na(pids[record$ranks]))) return(failed(condition))
  # If this jumps, the call has ended as it had before.
  sent <- call_submit(handle$pointer, record$ranks, record$task, TRUE, record$message)
  if (typeof(sent) == "character") return(failed(failureCondition(sent, handle)))
  checked(sent)
  record$losses <- losses
  # Dropped while it was sent.
  if (record$state != "open") return(call_forget(handle$pointer, record$task))
  # Told when all is done that is to be done: a warning may be turned into a jump.
  if (isTRUE(condition$replaced)) {
    loss <- failureCondition(c(failure, again = TRUE, tasks = record$what), handle, "warning")
    handle$untold <- c(handle$untold, list(loss))
  }
}

callLost <- function(what, losses) {
  rustclusterCondition("task_failed", lostText(what, losses), losses = losses)
}

# What the call has told before its end (see tellHead()), for those who want to know.
takeAsides <- function(record) {
  if (!isTRUE(record$tells)) return(invisible())
  suspendInterrupts({
    asides <- call_asides(record$handle$pointer, record$task)
    if (is.list(asides)) record$asides <- c(record$asides, lapply(asides, unserialize))
  })
  invisible()
}

# In a worker: tells the head something before the end of the call under way.
tellHead <- function(value) {
  checked(worker_tell(serialize(value, NULL, xdr = FALSE)))
}

# Does what is to be done about all calls of a cluster.
lookAtCalls <- function(handle) {
  tasks <- calls_to_look_at(handle$pointer)
  if (typeof(tasks) != "double") return(invisible())
  records <- recordsOf(handle)
  looked <- FALSE
  # An interrupt, or an answer that cannot be read: the others are not to wait until another call ends.
  on.exit(if (!looked && length(handle$loops)) calls_wake(handle$pointer, handle$number, handle$loops))
  for (task in tasks) {
    record <- records[[keyOf(task)]]
    # Of one that was dropped there is no record.
    if (is.null(record)) call_forget(handle$pointer, task) else lookAt(record)
  }
  looked <- TRUE
  tell(handle)
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
  # The functions' environment is all that the object is.
  reg.finalizer(environment(), dropCall)
  structure(call, class = "RustCall")
}

recordOf <- function(call) get("record", environment(call$status))

callStatus <- function(record) {
  if (record$state != "open") return(record$state)
  lookAtCalls(record$handle)
  lookAt(record)
  tell(record$handle)
  if (record$state != "open") return(record$state)
  place <- checked(call_place(record$handle$pointer, record$task), record$handle)
  record$place <- place
  # It may just have ended.
  if (identical(place, 0L)) "waiting" else "running"
}

# `signal`: whether an error is raised, or returned as a condition.
callValue <- function(record, signal = TRUE) {
  force(signal)
  awaitCall(record)
  if (record$state != "done" && signal) stop(record$result)
  record$result
}

awaitCall <- function(record) {
  handle <- record$handle
  while (record$state == "open") {
    lookAtCalls(handle)
    takeAsides(record)
    if (length(record$asides)) return(invisible())
    lookAt(record)
    tell(handle)
    if (record$state != "open") break
    waited <- call_wait(handle$pointer, record$task)
    if (typeof(waited) == "character") handleFailed(waited, handle)
    showEvents(handle)
    Sys.sleep(0)
  }
}

cancelCall <- function(record) {
  if (record$state != "open") return(FALSE)
  lookAt(record)
  if (record$state != "open") return(FALSE)
  # Not where it would be another process's call.
  suspendInterrupts({
    checked(call_forget(record$handle$pointer, record$task), record$handle)
    endCall(record, "cancelled", rustclusterCondition("cancelled", "the call was cancelled"))
  })
  TRUE
}

# Nobody has the object any more. This is a finalizer: see `openCalls`.
dropCall <- function(envir) {
  record <- envir$record
  if (record$state != "open" || length(record$waiters)) return()
  # Not where it would be another process's call.
  if (!is.null(call_drop(record$handle$pointer, record$task))) return()
  record$state <- "cancelled"
  record$message <- NULL
  forgetRecord(record)
}

#' @export
format.RustCall <- function(x, ...) {
  record <- recordOf(x)
  state <- tryCatch(callStatus(record), error = function(e) "unusable")
  label <- record$label
  if (nchar(label) > 60L) label <- paste0(substr(label, 1L, 57L), "...")
  took <- if (is.null(record$took)) proc.time()[["elapsed"]] - record$began else record$took
  place <- if (state == "running" && isTRUE(record$place > 0L)) {
    paste0(" on worker ", record$place, " on host ", sQuote(record$handle$hosts[[record$place]]))
  }
  paste0("<call ", label, ": ", state, place, ", ", format(round(took, 1), nsmall = 1), " s>")
}

#' @export
print.RustCall <- function(x, ...) {
  cat(format(x), "\n", sep = "")
  invisible(x)
}
