# A backend of foreach: `%dopar%` on a cluster. One call sets up the nodes for all iterations. The iterations are a job.

#' foreach on a cluster
#'
#' Registers a cluster for `%dopar%` of package \pkg{foreach}. Results, messages and errors are those of
#' `doParallel::registerDoParallel()` with a PSOCK cluster, for all of `foreach()`'s arguments, nested
#' loops (`%:%`) and `%dorng%` of \pkg{doRNG}. These features are additional:
#'
#' * The whole loop is one job: short iterations are sent in batches, and common data is sent to each host once.
#' * Results are combined as they arrive, with `.inorder = FALSE` in any order. A `.combine` function can therefore not
#'   use the same cluster (`rustcluster_busy`).
#' * An iteration is retried after a worker failure: see [rustcluster_faults]. If its worker died on all attempts, or if
#'   it exceeded `timeout` of the cluster, the iteration has an error, which `.errorhandling` handles. With `"stop"`,
#'   the error is raised with its condition class.
#' * `options(rustcluster.progress = TRUE)` and \pkg{progressr} show progress: see section Progress of [verbs].
#'
#' `.options.rustcluster = list(store = "dir")` keeps the results of the iterations in a directory. The same loop, run
#' again, computes only what is missing, and combines all: see section Stored results of [clusterLapply()]. The
#' elements are the values of the loop's variables. The function is the expression of the loop, with the variables that
#' it uses. The options `reuse`, `retry_errors` and `sync` are the arguments `.reuse`, `.retry_errors` and `.sync` of
#' [clusterLapply()]. An iteration that raised an error counts as failed, with any `.errorhandling`. With `%dorng%`,
#' give the same seed again (`.options.RNG`, or `registerDoRNG()`): the random streams are a part of the elements.
#'
#' `.options.snow` supports the options `attachExportEnv` and `preschedule` of doParallel. `preschedule` has no effect,
#' because iterations are always sent in batches. Other options are ignored with a warning, as in doParallel.
#'
#' `doParallel::registerDoParallel(cl)` accepts a cluster made by [makeRustCluster()], too, and is as fast.
#' `doSNOW::registerDoSNOW(cl)` sends one message for each iteration, as with other clusters.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one. `NULL`: the default cluster of \pkg{parallel}, as
#'   `setDefaultCluster()` sets it.
#' @return `NULL`, invisibly. Afterwards `foreach::getDoParName()` is `"doRustCluster"`, and
#'   `foreach::getDoParWorkers()` the number of nodes of `cl`.
#' @section Errors:
#' `rustcluster_bad_argument` (also for an unknown option in `.options.rustcluster`), `rustcluster_stopped`,
#' `rustcluster_restored`, `rustcluster_forked`. `%dopar%` raises these errors, `rustcluster_task_failed`,
#' `rustcluster_timeout`, and the other errors of the cluster: see
#' [rustcluster_conditions].
#' @examplesIf requireNamespace("foreach", quietly = TRUE)
#' library(foreach)
#' cl <- makeRustCluster(2)
#' registerDoRustCluster(cl)
#' foreach(i = 1:4, .combine = c) %dopar% i^2
#' registerDoSEQ()
#' parallel::stopCluster(cl)
#' @export
registerDoRustCluster <- function(cl = NULL) {
  cl <- theCluster(cl)
  for (part in clustersOf(cl)) {
    if (part$handle$stopped) raiseFailure(rustFailure("stopped"), part$handle)
    checked(hub_pids(part$handle$pointer), part$handle)
  }
  foreach::setDoPar(doRustCluster, cl, foreachInfo)
  invisible()
}

foreachInfo <- function(data, item) {
  switch(item, workers = length(data), name = "doRustCluster", version = packageVersionText())
}

# `%dopar%` calls this function with the loop, the expression, its environment and the cluster.
doRustCluster <- function(obj, expr, envir, data) {
  if (!inherits(obj, "foreach")) stop("obj must be a foreach object")
  iterator <- iterators::iter(obj)
  options <- foreachOptions(obj$options$rustcluster)
  say <- if (obj$verbose) function(...) cat(sprintf(...)) else function(...) NULL
  attached <- attachAsked(obj$options$snow, length(data), say)
  exports <- foreachExports(obj, expr, envir, say)
  say("explicitly exporting package(s): %s\n", paste(obj$packages, collapse = ", "))
  # Compile once, instead of in each worker.
  compile <- get("compile", asNamespace("compiler"))
  compiled <- compile(expr, envir, options = list(suppressUndefined = TRUE))
  for (problem in callNodes(data, beginLoop, compiled, exports, obj$packages, utils::packageName(envir), attached)) {
    if (!is.null(problem)) stop("worker initialization failed: ", printable(problem))
  }
  iterations <- as.list(iterator)
  n <- length(iterations)
  in_order <- !isFALSE(obj$combineInfo$in.order)
  values <- list()
  if (!is.null(options$store)) {
    fun <- loopFunction(expr, exports, obj$argnames)
    values <- runStored(data, iterator, iterations, fun, in_order, options)
  } else if (n) {
    onResults <- foreachCombiner(iterator, n, in_order)
    values <- runFree(data, n, runIteration, list(), iterations, onResults = onResults)$values
  }
  # Detach the exports: an empty loop attaches nothing.
  if (attached) callNodes(data, beginLoop, NULL, new.env(parent = emptyenv()), obj$packages, NULL, FALSE)
  failure <- foreach::getErrorValue(iterator)
  if (is.null(failure) || obj$errorHandling != "stop") return(foreach::getResult(iterator))
  ours <- function(value) inherits(value, "rustcluster_failure") && identical(attr(value, "condition"), failure)
  lost <- Find(ours, values)
  if (!is.null(lost)) raiseTaskFailure(lost, values)
  text <- sprintf("task %d failed - \"%s\"", foreach::getErrorIndex(iterator), conditionMessage(failure))
  stop(simpleError(text, expr))
}

# Checks the options of `.options.rustcluster`. Returns all of them, with their defaults.
foreachOptions <- function(options) {
  refuse <- function(...) badArgument(".options.rustcluster", ...)
  known <- list(store = NULL, reuse = "all", retry_errors = TRUE, sync = 0.1)
  if (is.null(options)) return(known)
  names <- names(options)
  if (!is.list(options) || length(options) && (is.null(names) || !all(nzchar(names)))) {
    refuse("must be a list with names")
  }
  unknown <- setdiff(names, names(known))
  if (length(unknown)) {
    refuse("contains the unknown option `", unknown[[1L]], "`", didYouMean(unknown[[1L]], names(known)))
  }
  known[names] <- options
  if (!is.character(known$reuse) || length(known$reuse) != 1L || !known$reuse %in% c("all", "same")) {
    refuse("`reuse` must be \"all\" or \"same\"")
  }
  if (is.null(known$store) && known$reuse == "same") refuse("`reuse` can be \"same\" only with `store`")
  checkStoring(known$store, TRUE, known$retry_errors, known$sync, c("retry_errors", "sync"))
  known
}

# Returns the loop as a function of its variables, for the hashes of a run.
loopFunction <- function(expr, exports, variables) {
  fun <- function() NULL
  formals(fun) <- stats::setNames(rep(alist(x = ), length(variables)), variables)
  body(fun) <- expr
  environment(fun) <- list2env(as.list(exports, all.names = TRUE), parent = globalenv())
  fun
}

# Runs a loop whose results are stored. Returns the list of results.
runStored <- function(cl, iterator, iterations, fun, in_order, options) {
  store <- beginStore(
    options$store, iterations, fun, list(), FALSE, options$reuse, options$retry_errors, options$sync,
    what = "the loop"
  )
  on.exit(closeStore(store))
  saved <- savedResults(store)
  store$keep <- "always"
  n <- length(iterations)
  if (!n) return(list())
  keptFailed <- intersect(storeFailed(store), store$kept)
  onResults <- foreachCombiner(iterator, n, in_order, saved, store$kept, keptFailed)
  onResults(store$kept, saved, keptFailed)
  if (!length(store$todo)) return(saved)
  values <- runFree(
    cl, n, runStoredIteration, list(), iterations, order = store$todo, returns = TRUE, onResults = onResults,
    store = store
  )$values
  values[store$kept] <- saved[store$kept]
  values
}

# Returns whether the options ask for the exports to be attached on the workers, as in doParallel.
attachAsked <- function(options, workers, say) {
  complain <- function(...) warning(..., call. = FALSE)
  unknown <- setdiff(names(options), c("preschedule", "attachExportEnv"))
  if (length(unknown)) {
    complain(sprintf("ignoring unrecognized snow option(s): %s", paste(unknown, collapse = ", ")))
  }
  given <- function(name, text) {
    value <- options[[name]]
    if (is.null(value)) return(FALSE)
    if (!is.logical(value) || length(value) != 1L) {
      complain(name, " must be logical value")
      return(FALSE)
    }
    say(text)
    isTRUE(value)
  }
  given("preschedule", sprintf("bundling all tasks into %d chunks\n", workers))
  given("attachExportEnv", "attaching export environment\n")
}

# Returns an environment with all exports of the loop: variables that are found in the expression, `...`, and variables
# that `.export` names.
foreachExports <- function(obj, expr, envir, say) {
  exports <- tryCatch(dotsOf(envir), error = function(e) new.env(parent = emptyenv()))
  packages <- foreach::getexports(expr, exports, envir, bad = union(obj$noexport, obj$argnames))
  say("discovered package(s): %s\n", paste(packages, collapse = ", "))
  found <- ls(exports)
  if (length(found)) {
    say("automatically exporting the following variables from the local environment:\n")
    say("  %s \n", paste(found, collapse = ", "))
  } else {
    say("no variables are automatically exported\n")
  }
  asked <- unique(obj$export)
  twice <- intersect(asked, found)
  if (length(twice)) {
    warning(simpleWarning(
      sprintf("already exporting variable(s): %s", paste(twice, collapse = ", ")), sys.call(-1L)
    ))
  }
  asked <- setdiff(asked, twice)
  if (length(asked)) say("explicitly exporting variables(s): %s\n", paste(asked, collapse = ", "))
  for (name in asked) {
    if (!exists(name, envir)) {
      stop(simpleError(sprintf("unable to find variable \"%s\"", name), sys.call(-1L)))
    }
    value <- get(name, envir)
    # The functions that it calls are exported, too.
    if (is.function(value) && (identical(environment(value), globalenv()) ||
                                 identical(environment(value), envir))) {
      environment(value) <- exports
    }
    assign(name, value, exports)
  }
  exports
}

# Returns an environment with the `...` of another one.
dotsOf <- function(envir) {
  holder <- function(...) {
    list(...)
    environment()
  }
  # The parent must not be the frame of the caller, which would be sent, too.
  environment(holder) <- topenv()
  do.call(holder, eval(quote(list(...)), envir))
}

# Returns `onResults` for runJob(): passes the results to foreach, in the order of the iterations or of their arrival.
# If `.combine` fails, the results that were combined before are the result of the loop.
# `kept`: the indices of the results that a store had before, which are in `saved`; `keptFailed`: those that are errors.
foreachCombiner <- function(iterator, n, in_order, saved = NULL, kept = integer(), keptFailed = integer()) {
  accumulate <- foreach::makeAccum(iterator)
  arrived <- logical(n)
  done <- 0L
  broken <- FALSE
  isKept <- logical(n)
  isKept[kept] <- TRUE
  take <- function(i, value, failed) {
    if (failed) value <- foreachError(value)
    accumulate(list(value), i)
  }
  function(finished, values, failures) {
    if (in_order) {
      arrived[finished] <<- TRUE
      waiting <- arrived[seq.int(done + 1L, length.out = n - done)]
      finished <- done + seq_len(match(FALSE, waiting, length(waiting) + 1L) - 1L)
      done <<- done + length(finished)
    }
    if (broken) return()
    tryCatch(
      for (i in finished) {
        if (isKept[[i]]) take(i, saved[[i]], i %in% keptFailed) else take(i, values[[i]], i %in% failures)
      },
      error = function(e) {
        broken <<- TRUE
        cat("error calling combine function:\n")
        print(e)
      }
    )
  }
}

# Returns the error of an iteration without a result: its worker failed, it timed out, or its value could not be sent.
foreachError <- function(value) {
  condition <- attr(value, "condition")
  if (is.null(condition)) simpleError(as.vector(unclass(value))) else condition
}

# In a worker ------------------------------------------------------------------------------------

# The current loop of the worker: its expression, and the environment in which it is evaluated.
loop <- new.env(parent = emptyenv())

# Returns NULL, or an error message. `attached`: whether functions of other environments find the exports, too.
beginLoop <- function(expr, exports, packages, caller, attached) {
  if ("exportEnv" %in% search()) detach("exportEnv", character.only = TRUE)
  # A loop in a package finds the functions of that package.
  found <- !is.null(caller) && suppressWarnings(require(caller, character.only = TRUE, quietly = TRUE))
  parent.env(exports) <- if (found) asNamespace(caller) else globalenv()
  loop$expr <- expr
  loop$variables <- exports
  if (attached) do.call("attach", list(exports, name = "exportEnv"))
  tryCatch(
    {
      for (package in packages) library(package, character.only = TRUE)
      NULL
    },
    error = conditionMessage
  )
}

runIteration <- function(args) {
  for (name in names(args)) assign(name, args[[name]], loop$variables)
  tryCatch(eval(loop$expr, loop$variables), error = function(e) {
    tellError(e)
    e
  })
}

# As runIteration(), but an error is that of the task, so that the store knows it.
runStoredIteration <- function(args) {
  for (name in names(args)) assign(name, args[[name]], loop$variables)
  eval(loop$expr, loop$variables)
}

# Returns the key of a set-up call in the set-up log, for beginLoop() and the functions of other backends that do the
# same. A later call with the same key replaces an earlier one, so that the log drops the exports of earlier loops. The
# effect of loaded packages stays, so that their names are part of the key.
loopKeyOf <- function(call) {
  # Fast path: most other calls have fewer arguments.
  if (length(call$args) < 3L) return("")
  theirs <- function(package) {
    if (isNamespaceLoaded(package)) get0("workerInit", asNamespace(package), inherits = FALSE)
  }
  packages <- if (identical(call$fun, beginLoop)) {
    call$args[3L]
  } else if (identical(call$fun, theirs("doParallel")) || identical(call$fun, theirs("doSNOW"))) {
    call$args[4L]
  } else {
    return("")
  }
  paste(c("foreach()", unlist(packages)), collapse = " ")
}
