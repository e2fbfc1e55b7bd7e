# A backend of foreach: `%dopar%` on a cluster. What all iterations need is set up on its nodes by one
# call; then the iterations are a job.

#' foreach on a cluster
#'
#' Registers a cluster for `%dopar%` of package \pkg{foreach}. Results, messages and errors are those of
#' `doParallel::registerDoParallel()` with a PSOCK cluster, for all of `foreach()`'s arguments, nested
#' loops (`%:%`) and `%dorng%` of \pkg{doRNG}. In addition:
#'
#' * the whole loop is handed over at once: short iterations cross together, and what they have in
#'   common crosses to each host once;
#' * results are combined as they come, with `.inorder = FALSE` in whatever order. So what combines cannot
#'   use the same cluster (`rustcluster_busy`): let it use another, or none;
#' * an iteration whose worker is lost is tried again, as said in [makeRustCluster()]; one that is
#'   lost too often, or takes longer than the cluster's `timeout`, is an error of that iteration for
#'   `.errorhandling`. With `"stop"` it is raised as the condition that it is;
#' * `options(rustcluster.progress = TRUE)` shows a bar.
#'
#' `.options.snow` has doParallel's `attachExportEnv`, and its `preschedule`, which has no effect: iterations are
#' always sent together. Other options in it are ignored with a warning, as by doParallel.
#'
#' `doParallel::registerDoParallel(cl)` takes a cluster made by [makeRustCluster()], too, and is as fast.
#' `doSNOW::registerDoSNOW(cl)` sends one message an iteration, as with other clusters.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one; `NULL`: the one that
#'   \pkg{parallel}'s `setDefaultCluster()` has set.
#' @return `NULL`, invisibly. From then on `foreach::getDoParName()` is `"doRustCluster"`, and
#'   `foreach::getDoParWorkers()` the number of nodes of `cl`.
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_stopped`, `rustcluster_restored`, `rustcluster_forked`. Of
#' `%dopar%` those, `rustcluster_task_failed`, `rustcluster_timeout` and others of the cluster: see
#' [makeRustCluster()].
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

# What `%dopar%` calls: with the loop, the expression, where that is, and the cluster.
doRustCluster <- function(obj, expr, envir, data) {
  if (!inherits(obj, "foreach")) stop("obj must be a foreach object")
  iterator <- iterators::iter(obj)
  say <- if (obj$verbose) function(...) cat(sprintf(...)) else function(...) NULL
  attached <- attachAsked(obj$options$snow, length(data), say)
  exports <- foreachExports(obj, expr, envir, say)
  say("explicitly exporting package(s): %s\n", paste(obj$packages, collapse = ", "))
  # Once here, and not in each worker.
  compile <- get("compile", asNamespace("compiler"))
  compiled <- compile(expr, envir, options = list(suppressUndefined = TRUE))
  for (problem in callNodes(data, beginLoop, compiled, exports, obj$packages, utils::packageName(envir), attached)) {
    if (!is.null(problem)) stop("worker initialization failed: ", printable(problem))
  }
  iterations <- as.list(iterator)
  n <- length(iterations)
  values <- list()
  if (n) {
    each <- foreachCombiner(iterator, n, !isFALSE(obj$combineInfo$in.order))
    values <- runFree(data, n, runIteration, list(), iterations, each = each)$values
  }
  # A loop without anything, for which nothing is attached.
  if (attached) callNodes(data, beginLoop, NULL, new.env(parent = emptyenv()), obj$packages, NULL, FALSE)
  failure <- foreach::getErrorValue(iterator)
  if (is.null(failure) || obj$errorHandling != "stop") return(foreach::getResult(iterator))
  ours <- function(value) inherits(value, "rustcluster_failure") && identical(attr(value, "condition"), failure)
  lost <- Find(ours, values)
  if (!is.null(lost)) raiseTaskFailure(lost, values)
  text <- sprintf("task %d failed - \"%s\"", foreach::getErrorIndex(iterator), conditionMessage(failure))
  stop(simpleError(text, expr))
}

# Whether doParallel's options for PSOCK clusters ask for the exports to be attached on the workers.
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

# An environment with all that the expression needs besides the iterations' own variables: what is
# found in it, `...`, and what is asked for.
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
    # What it calls is exported with it.
    if (is.function(value) && (identical(environment(value), globalenv()) ||
                                 identical(environment(value), envir))) {
      environment(value) <- exports
    }
    assign(name, value, exports)
  }
  exports
}

# An environment in which `...` is what it is in this one.
dotsOf <- function(envir) {
  holder <- function(...) {
    list(...)
    environment()
  }
  # Not above the frame of whoever asks: that is not to be sent.
  environment(holder) <- topenv()
  do.call(holder, eval(quote(list(...)), envir))
}

# For runJob(): gives the results to foreach, in the order of the iterations, or as they come. When its
# combining fails, what has been combined by then is the result.
foreachCombiner <- function(iterator, n, in_order) {
  accumulate <- foreach::makeAccum(iterator)
  arrived <- logical(n)
  done <- 0L
  broken <- FALSE
  take <- function(i, value) {
    if (inherits(value, "snow-try-error")) value <- foreachError(value)
    accumulate(list(value), i)
  }
  function(fresh, values) {
    if (in_order) {
      arrived[fresh] <<- TRUE
      waiting <- arrived[seq.int(done + 1L, length.out = n - done)]
      fresh <- done + seq_len(match(FALSE, waiting, length(waiting) + 1L) - 1L)
      done <<- done + length(fresh)
    }
    if (broken) return()
    tryCatch(
      for (i in fresh) take(i, values[[i]]),
      error = function(e) {
        broken <<- TRUE
        cat("error calling combine function:\n")
        print(e)
      }
    )
  }
}

# Of an iteration that has not come to its end: lost, too late, or with a value that cannot be sent.
foreachError <- function(value) {
  if (inherits(value, "rustcluster_failure")) attr(value, "condition") else simpleError(as.vector(unclass(value)))
}

# In a worker ------------------------------------------------------------------------------------

# The loop under way there: its expression and where that is evaluated.
loop <- new.env(parent = emptyenv())

# Returns NULL, or what went wrong. `attached`: functions of other environments find the exports, too.
beginLoop <- function(expr, exports, packages, caller, attached) {
  if ("exportEnv" %in% search()) detach("exportEnv", character.only = TRUE)
  # What a package does sees what that package sees.
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
  tryCatch(eval(loop$expr, loop$variables), error = identity)
}

# The name of what beginLoop() and its like of other backends set on a worker, so that the exports of a
# loop are not kept after the next. What its packages do stays, and so they are part of the name.
loopOf <- function(call) {
  # Nearly all other calls have fewer.
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
