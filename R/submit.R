# Single calls: each runs on whichever worker is free first, and this session goes on. They wait in the
# hub, which gives them out without R. What is left to R is to read answers, and to decide what becomes of
# a call that was lost with its worker.

#' Run a call on whichever worker is free
#'
#' Sends an expression to the cluster and returns at once. It is evaluated by the first worker that has
#' nothing else to do; calls wait in the order in which they were made, and are begun by themselves,
#' whatever this session does in the meantime. While a verb (such as [parLapply()]) is under way, its
#' workers are given no calls.
#'
#' The variables that `expr` uses are sent with it: those of the function that calls, and those of the
#' global environment, also as far as functions use them that are sent. They are found by their names in
#' the code: what it finds by `get("x")` is to be given in `...`. A `...` of the function that calls is not
#' sent: `args <- list(...)` is. Variables of the global environment are put into the worker's for as long as
#' the call takes, the others into an environment of its own: nothing of what was sent is left behind; what
#' the expression itself assigns elsewhere is. Packages of which `expr` uses something and that are attached
#' here are attached there.
#' An expression has the workers' random numbers. What it prints, and its messages and warnings, stay on the
#' worker (see `outfile` of [makeRustCluster()]); those of futures are relayed ([cluster_rust]).
#'
#' What a call sends is held here, serialized, until a worker has it, for each call anew: what is large and
#' used by many calls is better put on the workers once, by [clusterExport()], and found there by `get("x")`.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one; `NULL`: the one that
#'   \pkg{parallel}'s `setDefaultCluster()` has set.
#' @param expr An expression, such as `f(x)`.
#' @param ... Variables for the expression, by their names.
#' @param .packages (character) Further packages to attach before it is evaluated.
#' @param .envir (environment) Where its variables are.
#' @return An object of class `"RustCall"`, a list of functions:
#' \describe{
#'   \item{`status()`}{character: `"waiting"` for a worker, `"running"`, `"done"`, `"failed"` or
#'     `"cancelled"`.}
#'   \item{`value()`}{waits for the value and returns it, or raises what went wrong, as often as it is
#'     called. An interrupt ends the waiting and nothing else.}
#'   \item{`cancel()`}{ends the call: one that runs is interrupted, and its worker killed and replaced if
#'     it does not heed that for 2 s. Returns, invisibly, whether it had not ended before.}
#' }
#' A call of which nobody has the object any more is cancelled. [promises::as.promise()] works on it: the
#' session need not wait, and is woken when the call has ended. So do `value()` and `resolved()` of
#' \pkg{future} ([future_generics]).
#' @section Errors:
#' `value()` raises the error of `expr` as it was raised there. `rustcluster_task_failed` (fields
#' `losses`): the call was lost with its worker more often than `retries` of the cluster allows.
#' `rustcluster_worker_lost`, `rustcluster_host_failed`: it was lost, and is not to be tried again or
#' nobody is left to try it. `rustcluster_timeout`: it took longer than `timeout` of the cluster.
#' `rustcluster_aborted`: it jumped to R's top level, as by `invokeRestart("abort")`.
#' `rustcluster_cancelled`: it was cancelled. `rustcluster_stopped`, `rustcluster_forked`,
#' `rustcluster_restored`: see [rustcluster_conditions].
#'
#' Of each loss after which a call is tried again a warning tells, at the next look at any call. Where
#' `options(warn = 2)` makes that an error, the call goes on all the same: ask once more.
#' @seealso [clusterLapplyAsync()], [promises], [future_generics]
#' @examples
#' cl <- makeRustCluster(2)
#' x <- 20
#' call <- clusterSubmit(cl, {
#'   Sys.sleep(0.1)
#'   x + 1
#' })
#' call$status()
#' call$value()
#' calls <- lapply(1:4, function(i) clusterSubmit(cl, i^2))
#' vapply(calls, function(call) call$value(), 0)
#'
#' slow <- clusterSubmit(cl, Sys.sleep(60))
#' slow$cancel()
#' slow
#'
#' if (requireNamespace("promises", quietly = TRUE)) {
#'   there <- FALSE
#'   promises::then(promises::as.promise(clusterSubmit(cl, x + 2)), function(value) {
#'     print(value)
#'     there <<- TRUE
#'   })
#'   # As Shiny and the console do by themselves.
#'   while (!there) later::run_now(1)
#' }
#' parallel::stopCluster(cl)
#' @export
clusterSubmit <- function(cl = NULL, expr, ..., .packages = NULL, .envir = parent.frame()) {
  if (missing(expr)) badArgument("expr", "is missing")
  expr <- substitute(expr)
  given <- list(...)
  if (length(given) && (is.null(names(given)) || !all(nzchar(names(given))))) {
    badArgument("...", "must be named: these are variables for `expr`")
  }
  .packages <- plain(.packages)
  if (!is.null(.packages) && !(is.character(.packages) && all(isText(.packages)) && all(nzchar(.packages)))) {
    badArgument(".packages", "must be a character vector of packages' names")
  }
  if (!is.environment(.envir)) badArgument(".envir", "must be an environment")
  cl <- theCluster(cl)
  unused <- setdiff(grep("^[.]", names(given), value = TRUE), all.names(expr))
  if (length(unused)) badArgument(unused[[1L]], "is an argument of clusterSubmit() no more than a name in `expr`")
  used <- variablesOf(expr, .envir, names(given))
  args <- list(
    expr = expr, variables = c(given, used$variables), globals = used$globals,
    packages = unique(c(.packages, used$packages))
  )
  record <- newRecord(cl, evaluateCall, args, labelOf(expr))
  # Before it is sent: whoever is interrupted from then on drops it.
  call <- newCall(record)
  sendCall(record)
  call
}

# The beginning of an expression's text, in one line.
labelOf <- function(expr) {
  lines <- deparse(expr, width.cutoff = 500L, nlines = 10L)
  # What follows on the next line is another statement, or belongs to this one.
  ends <- !grepl("[{ ]$", lines) & !grepl("^ *([}]|else )", c(lines[-1L], "}"))
  substr(paste0(trimws(lines), ifelse(ends, ";", ""), collapse = " "), 1L, 200L)
}

# In a worker.
evaluateCall <- function(expr, variables, globals, packages) {
  names <- as.character(names(globals))
  there <- intersect(names, ls(globalenv(), all.names = TRUE))
  before <- mget(there, globalenv())
  on.exit({
    rm(list = intersect(names, ls(globalenv(), all.names = TRUE)), envir = globalenv())
    list2env(before, globalenv())
  })
  caught(
    {
      for (package in packages) library(package, character.only = TRUE)
      list2env(globals, globalenv())
      envir <- list2env(variables, parent = globalenv())
      list(value = eval(expr, envir))
    },
    failed = function(e) {
      # Nobody there has made that call.
      if (identical(e$call, quote(eval(expr, envir)))) e["call"] <- list(NULL)
      structure(list(error = e), class = "rustcluster_raised")
    }
  )
}

# What an expression uses --------------------------------------------------------------------------

# A list of `variables` and `globals`, by their names, and of `packages`. Those that are given are not
# looked for.
variablesOf <- function(expr, envir, given) {
  found <- new.env(parent = emptyenv())
  found$variables <- list()
  found$globals <- list()
  found$packages <- character()
  found$seen <- list()
  findVariables(setdiff(namesIn(expr), given), envir, found, TRUE)
  as.list(found)[c("variables", "globals", "packages")]
}

# `ours`: what is found below the global environment is to be sent, and is not part of a function's
# environment, which is sent with it.
findVariables <- function(names, envir, found, ours) {
  for (name in names) {
    where <- envir
    while (!identical(where, emptyenv()) && !exists(name, where, inherits = FALSE)) where <- parent.env(where)
    if (any(vapply(list(emptyenv(), baseenv(), .BaseNamespaceEnv), identical, NA, where))) next
    global <- identical(where, globalenv())
    attached <- attr(where, "name")
    if (!global && is.character(attached) && startsWith(attached, "package:")) {
      addPackage(sub("^package:", "", attached), found)
      next
    }
    # An argument that is missing is nothing that could be sent.
    value <- tryCatch(list(get(name, where, inherits = FALSE)), error = function(e) NULL)
    if (is.null(value) || identical(value[[1L]], quote(expr = )) || name == "...") next
    if (global) {
      if (name %in% names(found$globals)) next
      found$globals[name] <- value
    } else if (ours) {
      found$variables[name] <- value
    }
    lookInto(value[[1L]], found)
  }
}

# What a function uses of the global environment.
lookInto <- function(fun, found) {
  if (typeof(fun) != "closure" || isNamespace(topenv(environment(fun)))) return()
  for (seen in found$seen) if (identical(seen, fun)) return()
  found$seen <- c(found$seen, list(fun))
  names <- setdiff(namesIn(list(formals(fun), body(fun))), names(formals(fun)))
  findVariables(names, environment(fun), found, FALSE)
}

addPackage <- function(package, found) {
  default <- c("methods", "datasets", "utils", "grDevices", "graphics", "stats", "rustcluster")
  if (!package %in% default) found$packages <- union(found$packages, package)
}

# The names that some code may look up, but for what is not looked up by its name.
namesIn <- function(code) {
  if (is.symbol(code)) {
    name <- as.character(code)
    return(if (nzchar(name)) name)
  }
  if (is.call(code)) {
    fun <- code[[1L]]
    if (is.symbol(fun)) {
      name <- as.character(fun)
      if (name %in% c("::", ":::", "quote")) return(NULL)
      if (name %in% c("$", "@")) code <- code[1:2]
      if (name == "function") {
        names <- namesIn(list(code[[2L]], code[[3L]]))
        return(setdiff(names, names(code[[2L]])))
      }
    }
  } else if (!is.list(code) && !is.pairlist(code) && !is.expression(code)) {
    return(NULL)
  }
  # Missing arguments, as in x[, 1], are symbols, too.
  unique(unlist(lapply(as.list(code), namesIn)))
}

# Records ------------------------------------------------------------------------------------------

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
