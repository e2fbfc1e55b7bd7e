# The view of the results of a run, which reads them when they are used.

#' Results in a directory
#'
#' [clusterLapply()] with `.store` and `.collect = FALSE` returns a view of the results in the directory. A result is
#' read when it is used, and only the results of one file record are kept in memory. A view of a run that goes on has
#' the results that are there when it is used. A view can be saved and loaded; it then reads the same directory.
#'
#' `length()` and `names()` are those of `X`. `view[[i]]` reads a result, by its index or its name. An element that
#' failed has the value that `.errors = "return"` gives it. `view[i]` and `as.list()` return lists, with `NULL` for
#' elements without a result.
#'
#' `lapply()`, `vapply()`, `Map()`, `Filter()`, `Reduce()` and the functions of \pkg{parallel} and of this package work
#' on a view, and so do `head()`, `tail()`, `rev()`, `unlist()`, `c()`, `lengths()` and `is.na()`: they return what they
#' return for the list. All but `head()`, `tail()` and `Map()` read all results at once. Functions that need a real
#' list, such as `for`, `do.call()` and `purrr::map()`, raise an error: use `as.list()`. A view cannot be changed.
#' @param x A view.
#' @param i The index of an element, or its name. For `[`: any index of a vector.
#' @param ... Ignored.
#' @return `[[`: the result of an element. `[` and `as.list()`: a list, named as `X`.
#' @section Errors:
#' `rustcluster_not_computed`, `rustcluster_run_damaged`, `rustcluster_run_unreadable`, `rustcluster_bad_argument`.
#' @examples
#' cl <- makeRustCluster(2)
#' dir <- tempfile("run")
#' roots <- clusterLapply(cl, c(a = 1, b = 4, c = 9), sqrt, .store = dir, .collect = FALSE)
#' roots
#' roots[["b"]]
#' for (i in seq_along(roots)) print(roots[[i]])
#' parallel::stopCluster(cl)
#' @name rustcluster_results
#' @seealso [clusterLapply()]
NULL

# Not a list: functions that use the elements of a list without methods would use those of the view.
resultsView <- function(store) {
  view <- new.env(parent = emptyenv())
  view$store <- store
  class(view) <- "rustcluster_results"
  view
}

# Views that earlier versions have saved are lists.
storeOfView <- function(x) .subset2(x, "store")

# Returns the store of a view with what has been written since, if something is missing.
currentStore <- function(x) {
  store <- storeOfView(x)
  if (any(storeStates(store) != 1L) && hasStore(store$dir)) refreshStore(store)
  store
}

#' @export
length.rustcluster_results <- function(x) as.integer(storeOfView(x)$info$n)

#' @export
names.rustcluster_results <- function(x) storeOfView(x)$info$names

#' @rdname rustcluster_results
#' @export
`[[.rustcluster_results` <- function(x, i, ...) {
  if (length(i) != 1L || !(is.numeric(i) || is.character(i)) || is.na(i)) {
    badArgument("i", "must be the index or the name of one element")
  }
  at <- if (is.character(i)) match(i, names(x)) else if (i >= 1 && i < length(x) + 1) as.integer(i) else NA_integer_
  if (is.na(at)) badArgument("i", "is not an element: ", format(i, scientific = FALSE))
  storeValue(storeOfView(x), at)
}

#' @export
`$.rustcluster_results` <- function(x, name) if (name %in% names(x)) x[[name]]

#' @export
c.rustcluster_results <- function(...) {
  parts <- lapply(list(...), function(part) if (inherits(part, "rustcluster_results")) as.list(part) else part)
  do.call(c, parts, quote = TRUE)
}

#' @method unlist rustcluster_results
#' @export
unlist.rustcluster_results <- function(x, recursive = TRUE, use.names = TRUE) unlist(as.list(x), recursive, use.names)

#' @method lengths rustcluster_results
#' @export
lengths.rustcluster_results <- function(x, use.names = TRUE) lengths(as.list(x), use.names)

#' @export
is.na.rustcluster_results <- function(x) is.na(as.list(x))

#' @export
anyNA.rustcluster_results <- function(x, recursive = FALSE) anyNA(as.list(x), recursive)

#' @export
as.vector.rustcluster_results <- function(x, mode = "any") as.vector(as.list(x), mode)

#' @export
as.character.rustcluster_results <- function(x, ...) as.character(as.list(x))

#' @export
as.double.rustcluster_results <- function(x, ...) as.double(as.list(x))

#' @export
as.integer.rustcluster_results <- function(x, ...) as.integer(as.list(x))

#' @export
as.logical.rustcluster_results <- function(x, ...) as.logical(as.list(x))

# A view can only be read.
readOnly <- function() {
  abort("bad_argument", "a view of saved results cannot be changed; as.list() returns a list",
        fields = list(argument = "x"))
}

#' @export
`[[<-.rustcluster_results` <- function(x, i, value) readOnly()

#' @export
`[<-.rustcluster_results` <- function(x, i, value) readOnly()

#' @export
`$<-.rustcluster_results` <- function(x, name, value) readOnly()

#' @export
`names<-.rustcluster_results` <- function(x, value) readOnly()

#' @export
`length<-.rustcluster_results` <- function(x, value) readOnly()

#' @export
`dim<-.rustcluster_results` <- function(x, value) readOnly()

#' @rdname rustcluster_results
#' @export
`[.rustcluster_results` <- function(x, i, ...) {
  store <- currentStore(x)
  at <- stats::setNames(seq_along(x), names(x))
  at <- if (missing(i)) at else at[i]
  ids <- store$info$ids
  known <- which(!is.na(at))
  wanted <- if (is.null(ids)) unname(at[known]) else ids[at[known]]
  values <- vector("list", length(at))
  different <- unique(wanted)
  if (length(wanted)) values[known] <- storeValues(store, as.integer(different))[match(wanted, different)]
  stats::setNames(values, names(at))
}

#' @rdname rustcluster_results
#' @export
as.list.rustcluster_results <- function(x, ...) {
  values <- storeValues(currentStore(x))
  names(values) <- names(x)
  values
}

#' @export
print.rustcluster_results <- function(x, ...) {
  store <- currentStore(x)
  counts <- storeCounts(store)
  cat(
    "<results of ", counts[["n"]], " elements in ", store$dir, ">\n",
    if (counts[["failed"]]) paste0("errors: ", counts[["failed"]], "\n"),
    if (missing <- counts[["n"]] - counts[["done"]] - counts[["failed"]]) paste0("missing: ", missing, "\n"),
    sep = ""
  )
  invisible(x)
}

#' @importFrom utils str
#' @export
str.rustcluster_results <- function(object, ...) print(object)

#' Export the results of a run to files
#'
#' Writes each result in a directory of [clusterLapply()] (`.store`) to an `.rds` file of its own, which [readRDS()]
#' reads on any machine. Elements without a result are left out.
#'
#' @param dir (character) The directory of the run. It may be in use.
#' @param to (character) The directory for the files, which cannot be that of a run. It is created if it does not exist.
#'   Files with the same names are replaced.
#' @return The paths of the files, by element, invisibly; `NA` for elements without a result. An element is named by its
#'   index, with leading zeros, or by its name, if all elements have names that are different and can be names of files.
#'   An element that failed has the value that `.errors = "return"` of [clusterLapply()] gives it.
#' @section Errors:
#' `rustcluster_run_unreadable`: `dir` has no run. `rustcluster_run_damaged`: a result is damaged.
#' `rustcluster_run_write_failed`: a file cannot be written; files that were written before stay.
#' `rustcluster_bad_argument`.
#' @examples
#' cl <- makeRustCluster(2)
#' dir <- tempfile("run")
#' roots <- clusterLapply(cl, c(a = 1, b = 4, c = 9), sqrt, .store = dir)
#' files <- exportRun(dir, tempfile("roots"))
#' readRDS(files[["b"]])
#' parallel::stopCluster(cl)
#' @seealso [clusterLapply()], [rustcluster_results]
#' @export
exportRun <- function(dir, to) {
  dir <- checkDir(dir, "dir")
  to <- checkDir(to, "to")
  if (!isRun(dir)) noRun(dir)
  # Also where the directory does not exist yet.
  if (startsWith(paste0(to, "/"), paste0(normalizePath(dir), "/")) || isRun(to)) {
    badArgument("to", "is the directory of a run, or is in it; the files of a run must stay alone: ", to)
  }
  store <- storeOf(dir, new.env(parent = emptyenv()))
  if (is.null(store)) store <- emptyStore(dir, NA_integer_)
  if (!dir.exists(to) && !dir.create(to, showWarnings = FALSE, recursive = TRUE) && !dir.exists(to)) {
    abort(
      "run_write_failed", "cannot create the directory ", to, fields = list(dir = to, reason = "cannot be created")
    )
  }
  to <- normalizePath(to)
  paths <- rep(NA_character_, store$info$n)
  names <- fileNames(store$info$names, store$info$n)
  for (i in which(storeStates(store) != 0L)) {
    paths[[i]] <- file.path(to, paste0(names[[i]], ".rds"))
    saveDurably(storeValue(store, i), paths[[i]], durable = FALSE)
    raiseInterrupt()
  }
  invisible(stats::setNames(paths, store$info$names))
}

# Returns the names of the files of elements, without their extension.
fileNames <- function(names, n) {
  good <- !is.null(names) && !anyNA(names) && !anyDuplicated(tolower(names)) && all(
    nzchar(names) & !startsWith(names, ".") & !grepl("[/\\\\[:cntrl:]]", names) & nchar(names, "bytes") <= 200L
  )
  if (good) names else sprintf("%0*d", nchar(format(n, scientific = FALSE)), seq_len(n))
}
