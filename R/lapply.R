#' Parallel lapply() with progress, reproducible seeds, timeouts and streaming results
#'
#' Works as [base::lapply()], on the workers of a cluster made by [makeRustCluster()]. Elements are started in order,
#' each on the first idle worker. Short elements are sent in batches. The output, messages and warnings of `FUN` stay on
#' the workers (see `outfile` of [makeRustCluster()]); those of futures are relayed ([cluster_rust]).
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one. `NULL`: the default cluster of \pkg{parallel}, as
#'   `setDefaultCluster()` sets it.
#' @param X A vector or list. Other objects are converted by [base::as.list()].
#' @param FUN (function) The function to call with each element, or its name. Each element gets its own copy. The
#'   environment of a function that was made in another function is shared by the elements of a batch: an assignment of
#'   `FUN` in that environment may be visible to the next element.
#' @param ... Further arguments of `FUN`, the same for all elements. Each element gets its own copy. The copy is cheap
#'   for short arguments and for long numeric vectors. A large list or a data frame with text is unserialized for each
#'   element: short tasks are faster if such data is in the environment of `FUN`, or exported.
#' @param .progress (logical) Whether to show a progress bar with the number of finished elements, their rate, the
#'   number of busy workers and the remaining time: see section Progress of [verbs]. Default: option
#'   `rustcluster.progress`; without it, `TRUE` where \pkg{progressr} shows progress.
#' @param .seed (logical or integer) Seed of the random numbers. With a number, each element has its own stream of
#'   random numbers of the L'Ecuyer-CMRG generator ([parallel::nextRNGStream()], starting at `set.seed(.seed)`). The
#'   results then do not depend on the workers, their number, retries or `.order`. `TRUE` draws the number from the
#'   generator of this session. The random numbers of the workers themselves do not change. `FALSE`, the default: each
#'   element uses the random numbers of its worker.
#' @param .timeout (number) Time limit (seconds) of an element, measured from when its worker has received all of its
#'   message; default `Inf`. With a limit, elements are sent one by one. An element that exceeds the limit is
#'   interrupted, and an error of class `rustcluster_timeout` replaces its result. A worker that does not respond to the
#'   interrupt is killed and replaced. The shorter of `.timeout` and `timeout` of the cluster counts. Nodes of several
#'   clusters do not support the limit.
#' @param .retries (integer) How often an element is retried after its worker has failed; default: `retries` of the
#'   cluster. With `0`, the first failure is an error at once, unless `.errors` is `"return"`.
#' @param .order (integer) The order in which the elements are started, a permutation of their indices; default: the
#'   order of `X`. Start the longest elements first to finish all workers at about the same time. Results are in the
#'   order of `X` in any case.
#' @param .onResult (function) A function of the index and the result of an element, called in this session as soon as
#'   the result arrives. It is called for failed elements only if `.errors` is `"return"`, and not for results that
#'   `.store` has from an earlier call.
#' @param .errors (character) What to do if an element fails. `"finish"`: raise its error when all other elements have
#'   finished, as in \pkg{parallel}. `"stop"`: raise its error at once and cancel all other elements. `"return"`: return
#'   the error as the result of the element. Such a result has class `"try-error"` and contains the text of the error;
#'   its attribute `"condition"` is the condition. The condition is the one that `FUN` raised, or only its text if it
#'   takes 100 kB or more. After a worker failure or a timeout it is a condition of this package.
#' @param .store (character) A directory that keeps the results, or `NULL`, the default. It is created if it does not
#'   exist. Each result is durable there, with a checksum, before `.onResult` gets it. A later call with the same `X`,
#'   `FUN`, arguments and `.seed` computes only what is missing: see section Stored results.
#'   One below [tempdir()] is removed when this session ends.
#' @param .collect (logical) Whether to return a list of all results. `FALSE`, with `.store` only: return a view, which
#'   reads results from the directory when they are used (class `rustcluster_results`; see [rustcluster_results]).
#' @param .reuse (character) Which results in `.store` count. `"all"`, the default: those of a call with the same `X`;
#'   another `X` is an error. `"same"`: those of the elements with the same content, so that `X` may grow or change.
#'   With `.seed`, only elements at the same index are the same, because their random numbers depend on it. Results of
#'   elements that `X` does not have now are kept for a later call. The type counts: `c(1:9, 10)` is double, and its
#'   elements are others than those of `1:9`.
#' @param .retry_errors (logical) Whether to compute elements again whose result in `.store` is an error. Default:
#'   `TRUE`.
#' @param .sync (number) The least time (seconds) between two calls of `fdatasync()`, which make all results durable
#'   that have come meanwhile. Default: 0.1. Use a longer time for many short elements on a slow disk.
#' @param .save (character) Where a result is saved first. `"head"`, the default: in `.store`, by this session, or by
#'   the worker if it sees the directory and its results take 1 MB or more.
#'   `"hosts"`: on the host of the worker, before the worker reports it: see section Stored results.
#' @param .save_dir (character) With `.save = "hosts"`: the directory on the hosts. Default: `rustcluster/results` in
#'   the user's cache, `~/.cache` or `XDG_CACHE_HOME`.
#' @return A list with the results, named as `X`. With `.collect = FALSE`, a view of them.
#' @section Stored results:
#' With `.store`, results survive this session, its machine and the workers. One process at a time writes to a
#' directory (`rustcluster_run_locked`); any number of sessions may read it. An element that failed, timed out, or was
#' lost with its worker is stored with its error. Results that arrive while the disk is slow wait on the workers.
#'
#' The arguments that decide what is computed must be the same in each call: `X` (see `.reuse`), `FUN`, `...` and
#' `.seed`. Otherwise the error `rustcluster_run_differs` names what differs, and nothing changes. `FUN` is the same if
#' its code is the same, and the values of the variables that the code uses: those of the functions in which `FUN` was
#' made, and those of the global environment of this session. Code that computes names, as `get(paste0("p", i))`, uses
#' all of these variables. Functions of packages, and variables that exist on the workers only, are not compared. A
#' function that keeps state, such as a cache, is another one after each call. A run without any result is begun anew
#' by a call that differs. `.seed = TRUE` continues with the stored seed. A resumed call with `.seed` gives what
#' an undisturbed one gives.
#'
#' With `.save = "hosts"`, a result survives the loss of this session, of its machine and of the connection as soon as a
#' worker has computed it. A worker that sees the directory of `.store` writes its results there, and sends long ones
#' only if `.onResult` needs them. Any other worker saves its results in `.save_dir`; they are fetched, checked and
#' removed there. If this session cannot write results, for example because its disk is full, it tries again and results
#' wait on the hosts. A later call first fetches what the hosts have; [collectRun()] does only that. Workers of a
#' cluster with `linger` save their results in any case, but not durably, so that a call on the reattached cluster
#' ([reattachCluster()]) does not compute them again.
#'
#' The vignette "Long runs" describes the files, which base R can read.
#' @section Errors:
#' `rustcluster_run_differs`, `rustcluster_run_locked`, `rustcluster_run_write_failed`, `rustcluster_run_unreadable`:
#' the directory of `.store` belongs to another call, is in use, or cannot be written or read. Results that were saved
#' before stay.
#'
#' `rustcluster_element_failed`: `FUN` raised an error. The fields are `index` (of the first failed element), `indices`
#' (of all failed elements), `results` (a list; `NULL` for failed elements) and `parent` (the first error itself).
#' `rustcluster_task_failed`, `rustcluster_worker_lost` (with `.retries = 0`), `rustcluster_timeout`,
#' `rustcluster_host_failed`, `rustcluster_busy`, `rustcluster_bad_argument`: see [rustcluster_conditions].
#' @examples
#' cl <- makeRustCluster(2)
#' clusterLapply(cl, 1:3, function(i) rnorm(1, i), .seed = 42)
#' seen <- 0
#' clusterLapply(cl, 1:4, sqrt, .onResult = function(i, value) seen <<- seen + 1)
#' seen
#' parallel::stopCluster(cl)
#' @importFrom parallel getDefaultCluster
#' @export
clusterLapply <- function(cl = NULL, X, FUN, ..., .progress,
                          .seed = FALSE, .timeout = Inf, .retries = NULL, .order = NULL,
                          .onResult = NULL, .errors = c("finish", "stop", "return"), .store = NULL, .collect = TRUE,
                          .reuse = c("all", "same"), .retry_errors = TRUE, .sync = 0.1, .save = c("head", "hosts"),
                          .save_dir = NULL) {
  if (!missing(X)) refuseSwapped(cl, X)
  cl <- theCluster(cl)
  parts <- clustersOf(cl)
  FUN <- theFunction(FUN)
  if (missing(X)) badArgument("X", "is missing")
  refuseUnknown(clusterLapply, "clusterLapply", ...names(), args(FUN))
  if (!is.vector(X) || is.object(X) || !isPlain(X)) X <- as.list(X)
  n <- length(X)
  for (name in c(".timeout", ".retries", ".order", ".seed", ".errors")) assign(name, plain(get(name)))
  progress <- if (missing(.progress)) wantedProgress() else askedProgress(.progress, ".progress")
  between(.timeout, ".timeout", "a number of seconds", 0.001, 1e9, infinite = TRUE)
  if (length(parts) > 1L && !identical(.timeout, Inf)) {
    badArgument(".timeout", "needs nodes of one cluster; for several clusters, use `timeout` of makeRustCluster()")
  }
  .retries <- checkRetries(.retries)
  if (!is.null(.onResult) && !is.function(.onResult)) badArgument(".onResult", "must be a function")
  .errors <- tryCatch(match.arg(.errors), error = function(e) {
    badArgument(".errors", "must be \"finish\", \"stop\" or \"return\"")
  })
  .order <- checkOrder(.order, n)
  checkStoring(.store, .collect, .retry_errors, .sync)
  .reuse <- tryCatch(match.arg(.reuse), error = function(e) badArgument(".reuse", "must be \"all\" or \"same\""))
  .save <- tryCatch(match.arg(.save), error = function(e) badArgument(".save", "must be \"head\" or \"hosts\""))
  if (is.null(.store) && .reuse == "same") badArgument(".reuse", "can be \"same\" only with `.store`")
  checkSaving(.save, .save_dir, .store)
  if (!n && is.null(.store)) return(structure(list(), names = names(X)))
  store <- NULL
  if (!is.null(.store)) {
    store <- beginStore(.store, X, FUN, list(...), checkSeed(.seed), .reuse, .retry_errors, .sync, .save == "hosts")
    on.exit(closeStore(store), add = TRUE)
    .seed <- if (is.null(store$info$seed)) FALSE else store$info$seed
    lingers <- any(vapply(parts, function(part) !is.null(part$handle$linger), NA))
    if (.save == "hosts" || lingers) {
      beginSaving(store, cl, .save_dir, values = !is.null(.onResult), durable = .save == "hosts")
    } else if (is.null(.onResult)) {
      askToSave(store, "session", least = longAnswer)
    }
    if (!is.null(runner$opened)) runner$opened(store)
    saved <- if (.collect) savedResults(store)
    store$keep <- if (.collect) "always" else if (is.null(.onResult) && .errors != "stop") "never" else "until_reported"
  }
  seed <- streamsOf(.seed, n)
  onResults <- if (!is.null(.onResult) || .errors == "stop") {
    function(finished, values, failures) {
      for (i in finished) {
        failed <- i %in% failures
        if (!is.null(.onResult) && (!failed || .errors == "return")) .onResult(i, values[[i]])
        if (failed && .errors == "stop") return(FALSE)
      }
    }
  }
  job <- if (is.null(store) || length(store$todo) && !endsAtOnce(store, .errors)) runFree(
    cl, n, FUN, list(...), X, reuse = "function", seed = seed, order = orderOf(.order, store), retries = .retries,
    timeout = .timeout, returns = .errors == "return", onResults = onResults, progress = progress, what = "element",
    store = store
  )
  if (!is.null(store)) {
    if (!is.null(store$save)) endSaving(store, cl)
    return(storedResults(store, job, if (.collect) saved, names(X), .errors))
  }
  if (.errors != "return" && length(job$failed)) raiseFailed(job)
  values <- job$values
  names(values) <- names(X)
  values
}

checkRetries <- function(retries) {
  if (is.null(retries)) return(NULL)
  between(retries, ".retries", "a whole number", 0, 1e6)
  if (retries != trunc(retries)) badArgument(".retries", "must be a whole number")
  retries
}

checkOrder <- function(order, n) {
  if (is.null(order)) return(NULL)
  whole <- is.numeric(order) && length(order) == n && isTRUE(all(sort(order, na.last = TRUE) == seq_len(n)))
  if (!whole) badArgument(".order", "must contain each number from 1 to ", n, " once")
  as.integer(order)
}

checkStoring <- function(store, collect, retryErrors, sync, names = c(".retry_errors", ".sync")) {
  flag <- function(value, argument) {
    if (!isTRUE(value) && !isFALSE(value)) badArgument(argument, "must be TRUE or FALSE")
  }
  flag(collect, ".collect")
  flag(retryErrors, names[[1L]])
  between(sync, names[[2L]], "a number of seconds", 0, 3600)
  if (is.null(store) && !collect) badArgument(".collect", "can be FALSE only with `.store`")
}

# Returns the order in which the missing elements of a store are computed.
orderOf <- function(order, store) {
  if (is.null(store)) return(order)
  if (is.null(order)) store$todo else order[order %in% store$todo]
}

# Returns the results that the store has already. Damaged ones are computed again.
savedResults <- function(store) {
  values <- storeValues(store, tolerant = TRUE)
  store$todo <- union(store$todo, storeWhich(store, TRUE, FALSE))
  store$kept <- setdiff(seq_along(values), store$todo)
  values
}

# Returns what clusterLapply() returns with a store, or raises its error. `job`: what was computed, or NULL. `saved`:
# the results that the store had before, or NULL to return a view.
storedResults <- function(store, job, saved, names, errors) {
  closeStore(store)
  refreshStore(store)
  # With "stop", elements that failed in an earlier call may not have been tried again.
  failed <- if (errors == "stop" && length(job$failed)) sort(job$failed) else storeFailed(store)
  if (is.null(saved)) {
    results <- resultsView(store)
    if (errors != "return" && length(failed)) {
      first <- storeValue(store, failed[[1L]])
      if (inherits(first, "rustcluster_failure")) raiseTaskFailure(first, results)
      raiseElementFailed(first, failed, results, store$dir)
    }
    return(results)
  }
  values <- if (is.null(job)) saved else job$values
  values[store$kept] <- saved[store$kept]
  if (!is.null(store$save) && length(list.files(file.path(store$dir, "results"), "^w"))) {
    # Workers that have saved a large result in the directory did not send it. A worker may have saved it while this
    # session gave up waiting for it.
    absent <- union(which(vapply(values, is.null, NA)), setdiff(job$failed, storeFailed(store)))
    absent <- setdiff(absent, store$kept)
    ids <- if (is.null(store$info$ids)) absent else store$info$ids[absent]
    if (length(absent)) values[absent] <- storeValues(store, as.integer(ids))
  }
  if (errors != "return" && length(failed)) raiseFailed(list(values = values, failed = failed), store$dir)
  names(values) <- names
  values
}

# Returns whether a result that the store keeps is an error that ends the call.
endsAtOnce <- function(store, errors) errors == "stop" && length(setdiff(storeFailed(store), store$todo)) > 0L

# Refuses arguments whose names start with a dot and are arguments neither of the verb nor of `FUN`, and arguments of
# the verb without their dot: they are typing errors. `name`: the name of the verb. `fun`: a function with the arguments
# of `FUN`, or NULL if these are unknown, as of a primitive function without any.
refuseUnknown <- function(verb, name, given, fun) {
  known <- if (!is.null(fun)) names(formals(fun))
  unknown <- setdiff(grep("^[.]", given, value = TRUE), known)
  # A `FUN` with `...` passes on arguments of any other name.
  open <- "..." %in% known
  if (open) unknown <- unknown[tolower(unknown) %in% tolower(names(formals(clusterLapply)))]
  if (length(unknown)) {
    hint <- didYouMean(unknown[[1L]], setdiff(names(formals(verb)), "..."))
    badArgument(unknown[[1L]], "is neither an argument of ", name, "() nor of `FUN`", hint)
  }
  if (open || is.null(fun)) return(invisible())
  dotted <- grep("^[.][^.]", names(formals(verb)), value = TRUE)
  for (forgotten in given[tolower(paste0(".", given)) %in% tolower(dotted)]) {
    # R takes the beginning of a name for the name.
    if (any(startsWith(known, forgotten))) next
    meant <- dotted[match(tolower(paste0(".", forgotten)), tolower(dotted))]
    badArgument(forgotten, "is not an argument of `FUN`; did you mean `", meant, "`, the argument of ", name, "()?")
  }
}

# `dir`: the directory that has the results of the others, if there is one.
raiseFailed <- function(job, dir = NULL) {
  first <- job$values[[job$failed[[1L]]]]
  if (inherits(first, "rustcluster_failure")) raiseTaskFailure(first, job$values, dir = dir)
  job$values[job$failed] <- list(NULL)
  raiseElementFailed(first, job$failed, job$values, dir)
}

# `first`: the error of the first of these elements.
raiseElementFailed <- function(first, failed, results, dir = NULL) {
  where <- whereResults("rustcluster_element_failed", dir = dir)
  stop(elementFailed(first, failed, results, parent = attr(first, "condition"), where = where))
}

# Returns the error of failed elements. `text`: the error of the first of them. `indices`: their indices.
# `where`: where the results of the others are. `hint`: the result of hintFor(), or NULL.
elementFailed <- function(text, indices, results, ..., where = whereResults("rustcluster_element_failed"),
                          hint = hintFor(text)) {
  others <- length(indices) - 1L
  # The text of a worker failure or of a timeout names the element.
  element <- paste0("element ", indices[[1L]], " ")
  rustclusterCondition(
    "element_failed",
    paste0(
      if (!startsWith(text, element)) paste0(element, "failed: "), text,
      if (others) paste0("\n(and ", others, ngettext(others, " other)", " others)")),
      if (length(results) > length(indices)) where, if (!is.null(hint)) paste0("\n", hint$text)
    ),
    index = indices[[1L]], indices = indices, results = results, ...
  )
}

# Returns FALSE, TRUE or a number.
checkSeed <- function(seed) {
  if (is.null(seed) || isFALSE(seed)) return(FALSE)
  if (!isTRUE(seed) && (!is.numeric(seed) || length(seed) != 1L || is.na(seed) || abs(seed) > .Machine$integer.max ||
                          seed != trunc(seed))) {
    badArgument(".seed", "must be TRUE, FALSE or one whole number")
  }
  seed
}

# Returns a function that returns the seed of an element by its index, or NULL without seeds.
streamsOf <- function(seed, n) {
  seed <- checkSeed(seed)
  if (isFALSE(seed)) return(NULL)
  if (isTRUE(seed)) seed <- sample.int(.Machine$integer.max, 1L)
  # Restore the generator of the session at the end.
  kind <- RNGkind()
  before <- get0(".Random.seed", globalenv(), inherits = FALSE)
  on.exit({
    RNGkind(kind[[1L]], kind[[2L]], kind[[3L]])
    if (is.null(before)) {
      rm(list = ".Random.seed", envir = globalenv())
    } else {
      assign(".Random.seed", before, globalenv())
    }
  })
  set.seed(as.integer(seed), "L'Ecuyer-CMRG", "Inversion", "Rejection")
  first <- get(".Random.seed", globalenv())
  # Make streams on demand, mostly one after the other, and keep them for retries.
  streams <- list(first)
  function(i) {
    while (length(streams) < i) {
      streams[[length(streams) + 1L]] <<- parallel::nextRNGStream(streams[[length(streams)]])
    }
    streams[[i]]
  }
}
