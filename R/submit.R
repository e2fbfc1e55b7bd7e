# clusterSubmit(): single calls that run in the background. Calls wait in a queue of the hub, which sends each to the
# next idle worker without R. R reads the results, and serializes a call once more that is retried.

#' Run a call on the next idle worker
#'
#' Sends an expression to the cluster and returns at once. The first idle worker evaluates the expression. Calls wait in
#' a queue, first in, first out. They start while this session does something else. Workers that run a verb (such as
#' [parLapply()]) get no calls until the verb has finished.
#'
#' The variables that `expr` uses are sent with it: variables of the calling function, and variables of the global
#' environment, including those that sent functions use. They are found by their names in the code. Pass a variable that
#' the code finds by `get("x")` in `...`. A `...` of the calling function is not sent: use `args <- list(...)`. Global
#' variables are assigned in the global environment of the worker while the call runs, and all other variables in an
#' environment of the call. None of them is left on the worker afterwards. Other assignments of the expression stay.
#' Attached packages of which `expr` uses something are attached on the worker.
#' An expression uses the random numbers of the worker. Its output, messages and warnings stay on the worker (see
#' `outfile` of [makeRustCluster()]); those of futures are relayed ([cluster_rust]).
#'
#' This session holds the serialized variables of each call until a worker has received them. If many calls use large
#' data, export the data once by [clusterExport()], and use `get("x")` in `expr`.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one. `NULL`: the default cluster of \pkg{parallel}, as
#'   `setDefaultCluster()` sets it.
#' @param expr An expression, such as `f(x)`.
#' @param ... Variables for the expression, by name: any but `c`, `e`, `ex` and `exp`, which R completes to `cl` and
#'   `expr`.
#' @param .packages (character) Further packages to attach before the expression is evaluated.
#' @param .envir (environment) The environment in which the variables of `expr` are found.
#' @return An object of class `"RustCall"`, a list of functions:
#' \describe{
#'   \item{`status()`}{character: `"waiting"` (for a worker), `"running"`, `"done"`, `"failed"` or
#'     `"cancelled"`.}
#'   \item{`value()`}{waits for the value and returns it, or raises the error of the call. It may be called several
#'     times. An interrupt ends the waiting and does not affect the call.}
#'   \item{`cancel()`}{cancels the call. A running call is interrupted; a worker that does not respond to the interrupt
#'     within 2 s is killed and replaced. Returns, invisibly, whether the call was still waiting or running.}
#' }
#' A call is cancelled when its object is garbage-collected. [promises::as.promise()] works on the object: the promise
#' wakes the session when the call has ended. `value()` and `resolved()` of \pkg{future} work on the object, too
#' ([future_generics]).
#' @section Errors:
#' `value()` raises the error of `expr` as it was raised on the worker.
#' `rustcluster_task_failed` (field `losses`): the worker died on all attempts, `retries + 1` of them.
#' `rustcluster_worker_lost`, `rustcluster_host_failed`: the worker or host failed, and the call is not retried
#' (`retries = 0`) or no worker is left to retry it. `rustcluster_timeout`: the call exceeded `timeout` of the cluster.
#' `rustcluster_aborted`: the call jumped to R's top level, as `invokeRestart("abort")` does.
#' `rustcluster_cancelled`: the call was cancelled. `rustcluster_stopped`, `rustcluster_forked`,
#' `rustcluster_restored`: see [rustcluster_conditions]. The latter is also the error of a call in a saved workspace,
#' whose result [keptResults()] returns if the cluster was made with `linger`.
#'
#' A warning reports each worker failure after which a call is retried. It is raised when `status()` or `value()` of any
#' call is used next. With `options(warn = 2)` the warning is an error, and the call goes on: ask once more.
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
#'   # Shiny and the console run this loop themselves.
#'   while (!there) later::run_now(1)
#' }
#' parallel::stopCluster(cl)
#' @export
clusterSubmit <- function(cl = NULL, expr, ..., .packages = NULL, .envir = parent.frame()) {
  taken <- intersect(names(sys.call()), c("c", "e", "ex", "exp"))
  if (length(taken)) {
    badArgument(
      taken[[1L]], "cannot be the name of a variable: R takes it for `", if (taken[[1L]] == "c") "cl" else "expr",
      "`; rename the variable"
    )
  }
  if (missing(expr)) badArgument("expr", "is missing")
  expr <- substitute(expr)
  given <- list(...)
  if (length(given) && (is.null(names(given)) || !all(nzchar(names(given))))) {
    badArgument(
      "...", "must be named: these are variables for `expr`; for a call of a function, write clusterSubmit(cl, f(x))"
    )
  }
  .packages <- plain(.packages)
  if (!is.null(.packages) && !(is.character(.packages) && all(isText(.packages)) && all(nzchar(.packages)))) {
    badArgument(".packages", "must be a character vector of package names")
  }
  if (!is.environment(.envir)) badArgument(".envir", "must be an environment")
  cl <- theCluster(cl)
  unused <- setdiff(grep("^[.]", names(given), value = TRUE), all.names(expr))
  if (length(unused)) {
    hint <- didYouMean(unused[[1L]], c(".packages", ".envir"))
    badArgument(unused[[1L]], "is neither an argument of clusterSubmit() nor a name in `expr`", hint)
  }
  used <- variablesOf(expr, .envir, names(given))
  args <- list(
    expr = expr, variables = c(given, used$variables), globals = used$globals,
    packages = unique(c(.packages, used$packages))
  )
  record <- newRecord(cl, evaluateCall, args, labelOf(expr))
  # Make the object before the call is sent: from then on an interrupt drops the call.
  call <- newCall(record)
  sendCall(record)
  call
}

# Returns the beginning of the text of an expression, in one line.
labelOf <- function(expr) {
  lines <- deparse(expr, width.cutoff = 500L, nlines = 10L)
  # The next line may be another statement, or may continue this one.
  ends <- !grepl("[{ ]$", lines) & !grepl("^ *([}]|else )", c(lines[-1L], "}"))
  substr(paste0(trimws(lines), ifelse(ends, ";", ""), collapse = " "), 1L, 200L)
}

# Runs in a worker.
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
      result <- list(value = eval(expr, envir))
      tellFutureError(result)
      result
    },
    failed = function(e) {
      # This call is internal: users have not made it.
      if (identical(e$call, quote(eval(expr, envir)))) e["call"] <- list(NULL)
      tellError(e)
      structure(list(error = e), class = "rustcluster_raised")
    }
  )
}
