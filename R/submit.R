# Single calls: each runs on whichever worker is free first, and this session goes on. They wait in the
# hub, which gives them out without R. What is left to R is to read answers, and to serialize once more what was
# lost with its worker and is retried.

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
