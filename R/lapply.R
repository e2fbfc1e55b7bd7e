#' Apply a function over a list on a cluster, with more to be had
#'
#' As [base::lapply()], on the workers of a cluster made by [makeRustCluster()]: elements are begun in
#' order by whoever is free, short ones cross together. What `FUN` prints, and its messages and warnings, stay on
#' the workers (see `outfile` of [makeRustCluster()]); those of futures are relayed ([cluster_rust]).
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one; `NULL`: the one that
#'   \pkg{parallel}'s `setDefaultCluster()` has set.
#' @param X A vector or list; other objects are taken apart by [base::as.list()].
#' @param FUN (function) What to call with each element, or the name of it. Each element gets its own copy. If
#'   `FUN` was made in another function, its environment is shared by the elements that are sent together:
#'   what `FUN` assigns there may be seen by the next of them.
#' @param ... Further arguments of `FUN`, the same for all. Each element gets its own copy. That costs little
#'   for short arguments and for long vectors of numbers, but a large list, or a data frame with text, is read
#'   anew for each element. Short tasks are faster if such data is in the environment of `FUN`, or exported.
#' @param .progress (logical) Whether to show a bar with the elements done, their rate, the workers that
#'   are busy and the time that is left, if it takes longer than two seconds or so. Default: option
#'   `rustcluster.progress`.
#' @param .seed (logical or integer) With a number, each element has a stream of random numbers of its
#'   own, of L'Ecuyer's generator ([parallel::nextRNGStream()], from `set.seed(.seed)` on), so that
#'   the results do not depend on the workers, their number, retries or `.order`. `TRUE` takes the number
#'   from this session's generator. Workers' own random numbers stay as they are. `FALSE`, the default:
#'   elements use their worker's.
#' @param .timeout (number) Seconds that an element may take, from when its worker has all of its message;
#'   default `Inf`. Elements are then sent one by one. An element that takes longer is interrupted, and an
#'   error of class `rustcluster_timeout` takes the place of its result. A worker that does not respond to the
#'   interrupt is killed and replaced. If `timeout` of the cluster is shorter, it counts. Not with nodes of
#'   several clusters.
#' @param .retries (integer) How often an element is tried again that was lost with its worker, if not
#'   as often as `retries` of the cluster. `0`: a loss is an error at once, unless `.errors` is `"return"`.
#' @param .order (integer) In which order the elements are begun, all their numbers; default: their own.
#'   With the longest first, the end is even. Results are in the order of `X` all the same.
#' @param .onResult (function) Is called here with an element's number and result as soon as it is known. For
#'   elements that have failed only if `.errors` is `"return"`.
#' @param .errors (character) `"finish"`: an error of an element's is raised when all others are done,
#'   as with \pkg{parallel}; `"stop"`: at once, and what has not ended is cancelled; `"return"`: it is
#'   the element's result, of class `"try-error"`, whose text it is, with the condition as its attribute
#'   `"condition"`: as `FUN` raised it, but only its text if it takes 100 kB or more, and one of ours if the
#'   element was lost or took too long.
#' @return A list with the results, named as `X`.
#' @section Errors:
#' `rustcluster_element_failed`: errors of `FUN`'s. It has the fields `index` (of the first), `indices` (of
#' all), `results` (a list; `NULL` for those) and `parent` (the first error itself). `rustcluster_task_failed`,
#' `rustcluster_worker_lost` (with `.retries = 0`), `rustcluster_timeout`, `rustcluster_host_failed`,
#' `rustcluster_busy`, `rustcluster_bad_argument`: see [rustcluster_conditions].
#' @examples
#' cl <- makeRustCluster(2)
#' clusterLapply(cl, 1:3, function(i) rnorm(1, i), .seed = 42)
#' seen <- 0
#' clusterLapply(cl, 1:4, sqrt, .onResult = function(i, value) seen <<- seen + 1)
#' seen
#' parallel::stopCluster(cl)
#' @importFrom parallel getDefaultCluster
#' @export
clusterLapply <- function(cl = NULL, X, FUN, ..., .progress = wantsProgress(),
                          .seed = FALSE, .timeout = Inf, .retries = NULL, .order = NULL,
                          .onResult = NULL, .errors = c("finish", "stop", "return")) {
  cl <- theCluster(cl)
  parts <- clustersOf(cl)
  FUN <- theFunction(FUN)
  if (missing(X)) badArgument("X", "is missing")
  refuseUnknown("clusterLapply", ...names(), names(formals(args(FUN))))
  if (!is.vector(X) || is.object(X) || !isPlain(X)) X <- as.list(X)
  n <- length(X)
  for (name in c(".timeout", ".retries", ".order", ".seed", ".errors")) assign(name, plain(get(name)))
  if (!isTRUE(.progress) && !isFALSE(.progress)) badArgument(".progress", "must be TRUE or FALSE")
  if (!identical(.timeout, Inf)) between(.timeout, ".timeout", "of seconds", 0.001, 1e9)
  if (length(parts) > 1L && !identical(.timeout, Inf)) {
    badArgument(".timeout", "is for nodes of one cluster: with those of several, `timeout` of makeRustCluster() counts")
  }
  if (!is.null(.retries)) {
    between(.retries, ".retries", "", 0, 1e6)
    if (.retries != trunc(.retries)) badArgument(".retries", "must be a whole number")
  }
  if (!is.null(.onResult) && !is.function(.onResult)) badArgument(".onResult", "must be a function")
  .errors <- tryCatch(match.arg(.errors), error = function(e) {
    badArgument(".errors", "must be \"finish\", \"stop\" or \"return\"")
  })
  if (!is.null(.order)) {
    whole <- is.numeric(.order) && length(.order) == n && isTRUE(all(sort(.order, na.last = TRUE) == seq_len(n)))
    if (!whole) badArgument(".order", "must have each number from 1 to ", n, " once")
    .order <- as.integer(.order)
  }
  if (!n) return(structure(list(), names = names(X)))
  seed <- streamsOf(.seed, n)
  each <- if (!is.null(.onResult) || .errors == "stop") {
    function(fresh, values) {
      for (i in fresh) {
        failed <- inherits(values[[i]], "snow-try-error")
        if (!is.null(.onResult) && (!failed || .errors == "return")) .onResult(i, values[[i]])
        if (failed && .errors == "stop") return(FALSE)
      }
    }
  }
  job <- runFree(
    cl, n, FUN, list(...), X, shares = "function", seed = seed, order = .order, retries = .retries,
    timeout = .timeout, returns = .errors == "return", each = each, progress = .progress, what = "element"
  )
  if (.errors != "return" && length(job$failed)) raiseFailed(job)
  values <- job$values
  names(values) <- names(X)
  values
}

# Names with a dot are those of our function's arguments or `FUN`'s: others are mistyped.
refuseUnknown <- function(ours, given, known) {
  unknown <- setdiff(grep("^[.]", given, value = TRUE), known)
  # What `FUN` passes on may have any name but ours.
  if ("..." %in% known) unknown <- unknown[tolower(unknown) %in% tolower(names(formals(clusterLapply)))]
  if (length(unknown)) badArgument(unknown[[1L]], "is an argument neither of ", ours, "() nor of `FUN`")
}

raiseFailed <- function(job) {
  first <- job$values[[job$failed[[1L]]]]
  if (inherits(first, "rustcluster_failure")) raiseTaskFailure(first, job$values)
  job$values[job$failed] <- list(NULL)
  stop(elementFailed(first, job$failed, job$values, parent = attr(first, "condition")))
}

# `text`: what went wrong with the first of the elements with these numbers.
elementFailed <- function(text, indices, results, ...) {
  others <- length(indices) - 1L
  rustclusterCondition(
    "element_failed",
    paste0(
      "element ", indices[[1L]], " failed: ", text,
      if (others) paste0("\n(and ", others, ngettext(others, " other)", " others)")),
      if (length(results) > length(indices)) whereResults("rustcluster_element_failed")
    ),
    index = indices[[1L]], indices = indices, results = results, ...
  )
}

# A function that gives the seed of an element by its number, or NULL.
streamsOf <- function(seed, n) {
  if (isFALSE(seed) || is.null(seed)) return(NULL)
  if (isTRUE(seed)) {
    seed <- sample.int(.Machine$integer.max, 1L)
  } else if (!is.numeric(seed) || length(seed) != 1L || is.na(seed) || abs(seed) > .Machine$integer.max ||
               seed != trunc(seed)) {
    badArgument(".seed", "must be TRUE, FALSE or one whole number")
  }
  # The session's generator is left as it is.
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
  # Made when they are needed, mostly one after the other, and kept for those that are tried again.
  streams <- list(first)
  function(i) {
    while (length(streams) < i) {
      streams[[length(streams) + 1L]] <<- parallel::nextRNGStream(streams[[length(streams)]])
    }
    streams[[i]]
  }
}
