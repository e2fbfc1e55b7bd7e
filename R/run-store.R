# The store of a run: a directory with the results of clusterLapply(). The format is described in the vignette "Long
# runs" and in src/rust/core/src/store.

runFormat <- 1L

# Files that a directory may have before it has a run.
ownFiles <- c(
  "lock", "probe", "session", "results", "run.rds.new", "elements.rds", "elements.rds.new", "task.rds", "log", "runner"
)

# Returns a path, if it is one.
checkPath <- function(dir, argument) {
  if (!is.character(dir) || length(dir) != 1L || !isText(dir) || !nzchar(dir)) {
    badArgument(argument, "must be the path of a directory")
  }
  dir
}

# Checks the path of a run. Returns it as an absolute path, if its parent exists.
checkDir <- function(dir, argument) {
  checkPath(dir, argument)
  if (file.exists(dir) && !dir.exists(dir)) badArgument(argument, "is a file, not a directory: ", dir)
  # The directory may not exist yet.
  dir <- sub("(.)/+$", "\\1", dir)
  file.path(normalizePath(dirname(dir), mustWork = FALSE), basename(dir))
}

# Saves an object: the file has either its old content or all of the new one. `durable`: whether it survives a crash of
# the machine.
saveDurably <- function(object, path, durable = TRUE) {
  checkedStore(write_durably(serialize(object, NULL, xdr = FALSE), path, durable), dirname(path))
}

# Returns what a run is: the list in `run.rds`, or NULL if the directory has no run.
readRunInfo <- function(dir) {
  path <- file.path(dir, "run.rds")
  if (!file.exists(path)) return(NULL)
  # The file may be removed, when the run is begun anew, or, on NFS, replaced while it is read.
  again <- function(e) {
    if (!file.exists(path)) return(NULL)
    tryCatch(readRDS(path), error = function(e) {
      abort("run_unreadable", path, " cannot be read: ", conditionMessage(e), fields = list(dir = dir))
    })
  }
  info <- tryCatch(suppressWarnings(readRDS(path)), error = again)
  if (is.null(info) && !file.exists(path)) return(NULL)
  if (!is.list(info) || !is.numeric(info$format)) {
    abort("run_unreadable", path, " is not the description of a run", fields = list(dir = dir))
  }
  if (info$format > runFormat) {
    abort(
      "run_unreadable", "the run in ", dir, " was made by version ", info$package, " of rustcluster, whose format ",
      "this version cannot read; update the package", fields = list(dir = dir)
    )
  }
  if (!identical(info$endian, .Platform$endian)) {
    abort("run_unreadable", "the run in ", dir, " was made on a machine with another byte order",
          fields = list(dir = dir))
  }
  info
}

# As checked(), for functions of a store.
checkedStore <- function(result, dir) {
  if (isFailure(result)) {
    result <- unclass(result)
    reason <- result$reason
    switch(result$kind,
      run_locked = abort(
        "run_locked", "the run in ", dir, " is being computed by another process",
        if (!is.null(result$pid) && !is.na(result$pid)) paste0(
          " (pid ", result$pid, if (!is.null(result$host)) paste(" on", result$host), ")"
        ), "; wait for its end, or open it with openRun()",
        fields = list(dir = dir, pid = result$pid, host = result$host)
      ),
      run_damaged = abort(
        "run_damaged", "a result in ", if (is.null(result$file)) dir else result$file, " is damaged: ", reason,
        "; compute it again by the same call, or by resume()",
        fields = list(dir = dir, file = result$file)
      ),
      run_write_failed = abort(
        "run_write_failed", "results cannot be written to ", dir, ": ", reason,
        "; all that were reported before are saved", fields = list(dir = dir, reason = reason)
      ),
      abort("run_unreadable", "the run in ", dir, " cannot be read: ", reason, fields = list(dir = dir))
    )
  }
  checked(result)
}

lockText <- function() paste0(Sys.getpid(), " ", thisHost(), "\n")

# Opens a store: an environment with `dir`, `info` and the pointer to the index. `write`: whether to take the lock.
openStore <- function(dir, write = FALSE, info = readRunInfo(dir)) {
  if (is.null(info)) {
    abort("run_unreadable", "there is no run in ", dir, fields = list(dir = dir))
  }
  store <- new.env(parent = emptyenv())
  store$dir <- dir
  store$info <- info
  store$pointer <- checkedStore(
    store_open(dir, info$id, as.double(info$elements), if (write) lockText() else ""), dir
  )
  class(store) <- "rustcluster_store"
  checkDamaged(store)
  store
}

# Returns the pointer of a store. A store that was saved and loaded is opened again.
storePointer <- function(store) {
  if (!store_is_open(store$pointer)) {
    opened <- openStore(store$dir)
    if (opened$info$id != store$info$id) storeReplaced(store)
    store$pointer <- opened$pointer
  }
  store$pointer
}

storeReplaced <- function(store) {
  abort("run_unreadable", "the run in ", store$dir, " was replaced by another one", fields = list(dir = store$dir))
}

# Reads what has been written since. A store without any value follows a run that was begun anew.
refreshStore <- function(store) {
  if (isPending(store)) return(invisible(store))
  info <- readRunInfo(store$dir)
  if (is.null(info)) {
    abort("run_unreadable", "there is no run in ", store$dir, " any more", fields = list(dir = store$dir))
  }
  if (!identical(info$id, store$info$id)) {
    if (!store_is_open(store$pointer) || any(storeStates(store) == 1L)) storeReplaced(store)
    store$pointer <- openStore(store$dir, info = info)$pointer
  }
  store$info <- info
  checkedStore(store_refresh(storePointer(store), as.double(info$elements), FALSE), store$dir)
  invisible(store)
}

# Returns a store for a run whose runner has not made one yet. It becomes the one of the run as soon as that is there.
pendingStore <- function(dir, n, names) {
  store <- new.env(parent = emptyenv())
  store$dir <- dir
  store$info <- list(n = n, names = names, elements = n, ids = NULL)
  class(store) <- "rustcluster_store"
  store
}

# Returns whether a run has no store yet.
isPending <- function(store) {
  if (!is.null(store$info$id)) return(FALSE)
  opened <- storeOf(store$dir, new.env(parent = emptyenv()))
  if (is.null(opened)) return(TRUE)
  store$info <- opened$info
  store$pointer <- opened$pointer
  FALSE
}

# Returns the state of each element of `X`: 0 without a result, 1 with a result, 2 with an error.
storeStates <- function(store) {
  if (isPending(store)) return(integer(store$info$n))
  states <- checkedStore(store_states(storePointer(store)), store$dir)
  ids <- store$info$ids
  if (is.null(ids)) states[seq_len(store$info$n)] else states[ids]
}

# Returns the numbers of elements, of results and of errors.
storeCounts <- function(store) {
  states <- storeStates(store)
  c(n = length(states), done = sum(states == 1L), failed = sum(states == 2L))
}

storeFailed <- function(store) storeWhich(store, FALSE, TRUE)

# Returns the indices of elements without a result (`missing`) or with an error (`failed`).
storeWhich <- function(store, missing, failed) {
  if (isPending(store)) return(if (missing) seq_len(store$info$n) else integer())
  info <- store$info
  checkedStore(store_which(storePointer(store), info$ids, as.double(info$n), missing, failed), store$dir)
}

# Returns the number of an element in the run.
storeId <- function(store, i) if (is.null(store$info$ids)) i else store$info$ids[[i]]

# Returns the result of an element, or its error as clusterLapply(.errors = "return") returns it.
storeValue <- function(store, i) {
  # The run may be another one, with fewer elements.
  read <- function() if (i <= store$info$n) store_read(storePointer(store), as.double(storeId(store, i)))
  found <- if (!isPending(store)) read()
  if (is.null(found)) {
    # The run may go on.
    refreshStore(store)
    found <- if (!isPending(store)) read()
  }
  if (isFailure(found) && found[["kind"]] == "run_damaged") noteDamaged(store, storeId(store, i))
  checkedStore(found, store$dir)
  if (is.null(found)) {
    abort("not_computed", "element ", i, " has no result yet", fields = list(dir = store$dir, index = i))
  }
  found[[1L]]
}

# Returns the list of the results of these elements, given by their numbers in the run; NULL for elements without a
# result. `tolerant`: whether damaged results are forgotten with a warning, instead of being an error.
storeValues <- function(store, ids = store$info$ids, tolerant = FALSE) {
  if (isPending(store)) return(vector("list", if (is.null(ids)) store$info$n else length(ids)))
  read <- checkedStore(store_values(storePointer(store), ids), store$dir)
  damaged <- sort(read[[2L]])
  if (length(damaged)) {
    noteDamaged(store, if (is.null(ids)) damaged else ids[damaged])
    text <- paste0("the saved result of ", spanText(damaged, "element"), " in ", store$dir, " is damaged")
    if (!tolerant) {
      abort("run_damaged", text, "; compute it again by the same call, or by resume()",
            fields = list(dir = store$dir, indices = damaged))
    }
    warning(rustclusterCondition(
      "run_damaged", paste(text, "and is computed again"), type = "warning", dir = store$dir, indices = damaged
    ))
  }
  values <- read[[1L]]
  if (is.null(ids)) values[seq_len(store$info$n)] else values
}

# Notes elements, by their numbers in the run, whose results are damaged: they count as missing from now on, in every
# session, until they have been computed again.
noteDamaged <- function(store, ids) {
  try(suppressWarnings(cat(ids, sep = "\n", file = file.path(store$dir, "damaged"), append = TRUE)), silent = TRUE)
  checkDamaged(store)
}

# Forgets the results that are noted as damaged and still are.
checkDamaged <- function(store) {
  path <- file.path(store$dir, "damaged")
  if (!file.exists(path)) return(invisible())
  # The file may be removed meanwhile.
  lines <- tryCatch(readLines(path, warn = FALSE), error = function(e) NULL, warning = function(w) NULL)
  ids <- suppressWarnings(as.integer(lines))
  checkedStore(store_check(store$pointer, ids[!is.na(ids)]), store$dir)
  invisible()
}

# Returns the process that computes the run, or NULL.
storeLocked <- function(dir) checkedStore(store_owner(dir), dir)

# Ends writing and releases the lock.
closeStore <- function(store) {
  if (savesForHead(store)) unlink(file.path(store$dir, store$save$probe))
  store_close(store$pointer)
  invisible()
}

# Waits until all results are durable.
flushStore <- function(store) {
  while (!checkedStore(store_flush(store$pointer), store$dir)) raiseInterrupt()
}

# Opens the store of a call of clusterLapply() for writing, or makes it. Refuses a run of something else. `store$todo`
# has the indices of the elements to compute. `waits`: whether to wait while results cannot be written. `what`: what
# messages call the function.
beginStore <- function(dir, X, FUN, common, seed, reuse, retryErrors, sync, waits = FALSE, what = "`FUN`") {
  given <- dir
  dir <- checkDir(dir, ".store")
  if (!dir.exists(dir) && !dir.create(dir, showWarnings = FALSE, recursive = TRUE) && !dir.exists(dir)) {
    abort(
      "run_write_failed", "cannot create the directory ", dir, fields = list(dir = dir, reason = "cannot be created")
    )
  }
  hashing$dir <- given
  hashing$strings <- c(textsIn(X), textsIn(common))
  on.exit(hashing$dir <- hashing$strings <- NULL)
  dir <- normalizePath(dir)
  now <- NULL
  opened <- FALSE
  store <- NULL
  on.exit(if (!opened && !is.null(store)) closeStore(store), add = TRUE)
  repeat {
    info <- readRunInfo(dir)
    new <- is.null(info)
    if (new) {
      others <- setdiff(list.files(dir, all.files = TRUE, no.. = TRUE), ownFiles)
      if (length(others) || length(list.files(file.path(dir, "results")))) {
        badArgument(".store", "is a directory with other files than those of a run; use a new or an empty one: ", dir)
      }
      info <- newRunInfo(X)
    }
    store <- openStore(dir, write = TRUE, info = info)
    # Another process may have made the run in the meantime.
    if (identical(readRunInfo(dir), if (!new) info)) {
      if (is.null(now)) {
        now <- list(
          names = names(X), functions = functionHashes(FUN, what), arguments = argumentHashes(common), seed = seed
        )
      }
      if (new) break
      differs <- tryCatch({
        compareRun(store, now, X, reuse)
        NULL
      }, rustcluster_run_differs = identity)
      if (is.null(differs)) break
      if (!isWithoutResults(store)) stop(differs)
      # Nothing is lost: begin anew.
      unlink(c(file.path(dir, c("run.rds", "elements.rds")), list.files(file.path(dir, "results"), full.names = TRUE)))
    }
    closeStore(store)
    store <- NULL
  }
  if (new) {
    store$info <- c(info, now[c("names", "functions", "arguments")], list(
      seed = drawnSeed(seed), fun = paste(deparse(FUN), collapse = "\n")
    ))
    saveDurably(storedElements(X), file.path(dir, "elements.rds"))
    saveDurably(store$info, file.path(dir, "run.rds"))
  }
  store$retryErrors <- retryErrors
  findMissing(store)
  checkedStore(store_write(store$pointer, rVersionNumber(), sync, waits), dir)
  opened <- TRUE
  store
}

# Returns whether a run has no result, also on no host, and was not made by startRun().
isWithoutResults <- function(store) {
  !file.exists(file.path(store$dir, "task.rds")) && !mayBeOnHosts(store$dir) && !any(storeStates(store) == 1L)
}

# Sets the indices of the elements to compute.
findMissing <- function(store) {
  store$todo <- storeWhich(store, TRUE, store$retryErrors)
}

rVersionNumber <- function() {
  parts <- as.integer(unlist(strsplit(as.character(getRversion()), ".", fixed = TRUE)))
  sum(parts * c(65536L, 256L, 1L))
}

newRunInfo <- function(X) {
  list(
    format = runFormat, id = randomText(8L), package = packageVersionText(),
    r_version = rVersionText(), endian = .Platform$endian, created = Sys.time(), n = length(X), elements = length(X),
    ids = NULL
  )
}

# What `elements.rds` has: short vectors of numbers themselves, otherwise hashes of the elements.
storedElements <- function(X) {
  if (typeof(X) %in% c("logical", "integer", "double")) unname(X) else elementHashes(X)
}

# `elements`: what `elements.rds` has, or a store.
storedHashes <- function(elements) {
  if (is.environment(elements)) elements <- readElements(elements)
  if (is.raw(elements)) elements else elementHashes(elements)
}

# Returns the seed to be stored. With TRUE the session's generator draws it.
drawnSeed <- function(seed) {
  if (isTRUE(seed)) sample.int(.Machine$integer.max, 1L) else if (isFALSE(seed)) NULL else seed
}

# Compares the call with the run. An error names what differs. With `reuse = "same"`, the elements may differ: those
# that the run has keep their results.
compareRun <- function(store, now, X, reuse) {
  info <- store$info
  differs <- NULL
  elements <- readElements(store)
  # Fast path: hashes of many numbers take time and memory.
  same <- is.null(info$ids) && !is.raw(elements) && same_numbers(elements, X)
  if (!same) {
    before <- storedHashes(elements)
    now$hashes <- elementHashes(X)
    ids <- if (is.null(info$ids)) seq_len(info$n) else info$ids
    same <- identical(pickHashes(before, ids), now$hashes)
    if (!same && reuse == "all") differs <- changedElements(pickHashes(before, ids), now$hashes)
  }
  refuseOther(store$dir, info, now, differs)
  if (!same) regroup(store, before, now, X)
  if (!same || !identical(info$names, now$names)) {
    store$info["names"] <- list(now$names)
    saveDurably(store$info, file.path(store$dir, "run.rds"))
  }
  if (!same) checkedStore(store_refresh(store$pointer, as.double(store$info$elements), FALSE), store$dir)
}

# Refuses a call that differs from that of a run. `info`: the run. `now`: the hashes of the call's function and of its
# arguments, and its seed. `elements`: how its elements differ, or NULL.
refuseOther <- function(dir, info, now, elements) {
  seed <- if (!isFALSE(now$seed)) now$seed
  sameSeed <- if (isTRUE(seed)) !is.null(info$seed) else identical(as.double(seed), as.double(info$seed))
  shown <- function(seed) if (is.null(seed)) "FALSE" else format(seed, scientific = FALSE)
  differs <- c(
    changedParts(info$functions, now$functions), changedParts(info$arguments, now$arguments),
    if (!sameSeed) paste0("`.seed` was ", shown(info$seed), " and is ", shown(seed)),
    elements
  )
  if (!length(differs)) return(invisible())
  abort(
    "run_differs", "the run in ", dir, " was made by another call: ", paste(differs, collapse = "; "),
    "; use another directory",
    if (length(elements)) ", or .reuse = \"same\" to keep the results of the elements that are the same",
    fields = list(dir = dir, differs = differs)
  )
}

readElements <- function(store) {
  path <- file.path(store$dir, "elements.rds")
  unreadable <- function(...) abort("run_unreadable", path, " cannot be read: ", ..., fields = list(dir = store$dir))
  elements <- tryCatch(suppressWarnings(readRDS(path)), error = function(e) {
    unreadable(if (file.exists(path)) conditionMessage(e) else "it is missing")
  })
  size <- if (is.raw(elements)) 16L else 1L
  n <- store$info$elements * size
  if (!is.atomic(elements) || length(elements) < n) unreadable("it does not have the elements of the run")
  # A crash may have left elements that `run.rds` does not know of.
  if (length(elements) > n) elements[seq_len(n)] else elements
}

pickHashes <- function(hashes, ids) {
  if (identical(ids, seq_len(length(hashes) %/% 16L))) return(hashes)
  as.vector(matrix(hashes, 16L)[, ids])
}

# Returns which parts of a function or of its arguments have changed.
changedParts <- function(before, now) {
  # A primitive function has neither arguments nor a body: it is one part, with the name of the whole.
  whole <- grep("^(`FUN`|the loop)$", c(names(before), names(now)), value = TRUE)
  if (length(whole) == 1L) {
    others <- function(parts) parts[!endsWith(sub(" uses$", "", names(parts)), whole)]
    return(c(paste(whole, "changed"), changedParts(others(before), others(now))))
  }
  both <- intersect(names(before), names(now))
  changed <- both[before[both] != now[both]]
  that <- function(parts, verb) if (length(parts)) paste(sub("(, which .* uses)$", "\\1,", parts), verb)
  c(
    that(changed, "changed"), that(setdiff(names(before), both), "is missing"),
    that(setdiff(names(now), both), "is new")
  )
}

changedElements <- function(before, now) {
  n <- c(length(before), length(now)) %/% 16L
  if (n[[1L]] != n[[2L]]) return(sprintf("`X` had %d elements and has %d", n[[1L]], n[[2L]]))
  changed <- which(colSums(matrix(before, 16L) != matrix(now, 16L)) > 0)
  paste(spanText(changed, "element"), "of `X` changed")
}

# Gives each element of `X` its number in the run: that of an element with the same content, or a new one. The random
# numbers of an element depend on its index, so that with a seed only elements at the same index are the same. `places`
# of a run with a seed has the index of each number, also of those that `X` does not have now.
regroup <- function(store, before, now, X) {
  info <- store$info
  old <- hexOf(before)
  new <- hexOf(now$hashes)
  keys <- unique(old)
  # Equal elements are taken one after the other.
  numbered <- function(hashes) {
    key <- match(hashes, keys)
    sorted <- order(key)
    key <- key[sorted]
    first <- which(!duplicated(key))
    rank <- seq_along(key) - rep(first, diff(c(first, length(key) + 1L)))
    key[sorted] <- key + rank * (length(keys) + 1)
    key
  }
  if (is.null(info$seed)) {
    ids <- match(numbered(new), numbered(old), incomparables = NA)
  } else {
    places <- as.integer(info$places)
    # Runs of earlier versions have none.
    length(places) <- length(old)
    places[if (is.null(info$ids)) seq_len(info$n) else info$ids] <- seq_len(info$n)
    ids <- match(paste(seq_along(new), new), paste(places, old))
  }
  fresh <- which(is.na(ids))
  ids[fresh] <- length(old) + seq_along(fresh)
  store$info$ids <- as.integer(ids)
  if (!is.null(info$seed)) store$info$places <- as.integer(c(places, fresh))
  # A copy of the directory gives the same numbers to other elements: their results must not be confused on hosts.
  store$info$folders <- c(foldersOf(store$info), randomText(8L))
  store$info$n <- length(new)
  store$info$elements <- length(old) + length(fresh)
  hashes <- c(before, pickHashes(now$hashes, fresh))
  saveDurably(hashes, file.path(store$dir, "elements.rds"))
}
