# Results that are saved on the hosts before they are reported (`.save = "hosts"`): how workers are asked for that, and
# how the head fetches what hosts have. The workers' part is src/rust/core/src/store/save.rs.

# Bytes of a file that are fetched with one message.
savedPiece <- 2^25

checkSaving <- function(save, dir, store) {
  if (is.null(store) && save != "head") badArgument(".save", "needs `.store`")
  if (is.null(dir)) return(invisible())
  if (save != "hosts") badArgument(".save_dir", "needs .save = \"hosts\"")
  checkSaveDir(dir, ".save_dir")
}

checkSaveDir <- function(dir, argument) {
  valid <- is.character(dir) && length(dir) == 1L && isText(dir) && grepl("^(/|~/).", dir)
  if (!valid) badArgument(argument, "must be an absolute path, or one that starts with \"~/\"")
}

# Answers of this size are written by workers that see the directory of the run, instead of by this session: the workers
# write at the same time, and the bytes are not copied between processes.
longAnswer <- 2^20

# Fetches what the hosts have, and asks the workers to save. `values`: whether this session needs all results as they
# arrive. `durable`: whether results have to survive a crash of the host.
beginSaving <- function(store, cl, dir, values, durable) {
  dir <- if (is.null(dir)) "" else dir
  fetched <- sum(vapply(foldersOf(store$info), function(folder) fetchSaved(store, cl, dir, folder), 0L))
  if (fetched) findMissing(store)
  askToSave(store, "probe", dir, values, durable)
}

# Asks the workers to save answers of at least `least` bytes. `probe`: the file by which they find that they see the
# directory of the run.
askToSave <- function(store, probe, dir = "", values = FALSE, durable = TRUE, least = 0) {
  nonce <- randomText(16L)
  path <- file.path(store$dir, probe)
  written <- tryCatch({
    # No line end: workers compare the whole file.
    cat(nonce, file = path)
    TRUE
  }, error = function(e) FALSE, warning = function(w) FALSE)
  if (!written) abort("run_write_failed", "cannot write ", path, fields = list(dir = store$dir))
  store$trouble <- ""
  store$save <- list(
    run = store$info$id, folder = currentFolder(store$info), host_dir = dir, run_dir = normalizePath(store$dir),
    probe = probe, nonce = nonce, r_version = rVersionNumber(), durable = durable, values = values, least = least
  )
}

# Whether workers save nothing but what this session would write.
savesForHead <- function(store) isTRUE(store$save$least > 0)

# Returns the names of the folders of hosts that may have results of a run.
foldersOf <- function(info) if (is.null(info$folders)) info$id else info$folders

currentFolder <- function(info) foldersOf(info)[[length(foldersOf(info))]]

# Removes what the hosts have, if all results are durable here. A call that ended early leaves results that it has not
# taken: the next call fetches them.
endSaving <- function(store, cl) {
  if (savesForHead(store)) return(invisible())
  flushStore(store)
  refreshStore(store)
  if (length(storeWhich(store, TRUE, FALSE))) return(invisible())
  unlink(file.path(store$dir, "probe"))
  for (folder in foldersOf(store$info)) {
    forEachHost(cl, function(node) onNodes(node, removeSaved, store$save$host_dir, folder))
  }
  invisible()
}

# How many workers of a host are tried, one after the other, when they are lost.
hostAttempts <- 5L

# Calls a function with one node of each host that is up. If the worker of the node is lost meanwhile, the function is
# called again with another node of the host. Nothing happens for a host that is lost.
forEachHost <- function(cl, fun) {
  for (host in hostKeysOf(hostNodes(cl))) {
    for (attempt in seq_len(hostAttempts)) {
      nodes <- hostNodes(cl)
      node <- nodes[hostKeysOf(nodes) == host]
      if (!length(node)) break
      # Warnings have these classes, too: about workers that are replaced.
      lost <- tryCatch({
        fun(node)
        FALSE
      }, error = function(e) {
        if (!inherits(e, c("rustcluster_host_failed", "rustcluster_worker_lost"))) stop(e)
        inherits(e, "rustcluster_worker_lost")
      })
      if (!lost) break
    }
  }
}

# Calls a function once on each node. Unlike a call of clusterCall(), it is not repeated when a worker is replaced. It
# shows no progress: this is not the job of the user.
onNodes <- function(nodes, fun, ...) {
  old <- options(rustcluster.progress = FALSE)
  on.exit(options(old))
  parallel::clusterApply(nodes, seq_along(nodes), callWith, fun, ...)
}

# Returns one node of each host that is up: an idle one, if there is any.
hostNodes <- function(cl) {
  up <- clusterAlive(cl)
  if (!length(up)) return(up)
  up <- up[order(clusterStatus(up, memory = FALSE)$state != "idle")]
  up[!duplicated(hostKeysOf(up))]
}

# Returns a text for the host of each node.
hostKeysOf <- function(nodes) {
  vapply(nodes, function(node) paste(node$handle$id, node$handle$owner[[node$rank]]), "")
}

# Fetches the files of a run from the hosts, and removes them there. Files with elements that the run has are not
# fetched. Returns the number of fetched files.
fetchSaved <- function(store, cl, dir, folder) {
  count <- 0L
  dir.create(file.path(store$dir, "results"), showWarnings = FALSE)
  states <- checkedStore(store_states(storePointer(store)), store$dir)
  forEachHost(cl, function(node) {
    for (file in onNodes(node, listSaved, dir, folder, store$info$id)[[1L]]) {
      to <- file.path(store$dir, "results", file$name)
      if (!file.exists(to) && any(states[file$elements] != 1L, na.rm = TRUE)) {
        fetchFile(store, node, dir, folder, file, to)
        count <<- count + 1L
      }
      onNodes(node, removeSaved, dir, folder, file$name)
    }
  })
  if (count) {
    checkedStore(store_refresh(store$pointer, as.double(store$info$elements), TRUE), store$dir)
  }
  count
}

# Fetches a file of a host, as listSaved() returns it. The file is in the run only once it is complete there: what a
# full disk has cut off is an error, and the host keeps its file.
fetchFile <- function(store, node, dir, folder, file, to) {
  part <- paste0(to, ".part")
  on.exit(unlink(part))
  failed <- function(...) {
    abort("run_write_failed", "cannot write ", part, ": ", ..., fields = list(dir = store$dir))
  }
  complain <- function(e) failed(conditionMessage(e))
  write <- function(expr) tryCatch(expr, error = complain, warning = complain)
  download <- function() {
    out <- write(file(part, "wb"))
    on.exit(close(out))
    from <- 0
    while (from < file$size) {
      bytes <- onNodes(node, readSaved, dir, folder, file$name, from, min(savedPiece, file$size - from))[[1L]]
      if (!length(bytes)) break
      write(writeBin(bytes, out))
      from <- from + length(bytes)
    }
  }
  download()
  if (!identical(file_elements(part, store$info$id), file$elements)) {
    failed("it differs from the file of the host; is the disk full?")
  }
  checkedStore(replace_durably(part, to), store$dir)
}

# Says once why results cannot be written, and again when they can.
showTrouble <- function(store) {
  trouble <- store_trouble(store$pointer)
  if (identical(trouble, store$trouble)) return(invisible())
  store$trouble <- trouble
  message(rustclusterCondition(
    "run_waiting",
    if (nzchar(trouble)) {
      paste0("results cannot be written to ", store$dir, " (", trouble, "); they wait on the hosts\n")
    } else {
      paste0("results are written to ", store$dir, " again\n")
    },
    type = "message", dir = store$dir, reason = trouble
  ))
}

showUnsaved <- function(unsaved, handle) {
  for (i in seq_along(unsaved[[1L]])) {
    host <- handle$agents[[unsaved[[1L]][[i]]]]$host
    reason <- unsaved[[2L]][[i]]
    warning(rustclusterCondition(
      "not_saved", paste0("host ", sQuote(host), " could not save results: ", reason), type = "warning",
      host = host, reason = reason
    ))
  }
}

#' Fetch results of a run from its hosts
#'
#' Fetches the results that the hosts of a run have saved ([clusterLapply()] with `.save = "hosts"`), after the session
#' that computed the run, or its connection, was lost. Nothing is computed. Each file is checked, and removed on the
#' host once it is durable in the directory of the run. A later call of `clusterLapply()` does the same before it
#' computes what is missing.
#' @param dir (character) The directory of the run.
#' @param from The hosts: a cluster made by [makeRustCluster()], or a `spec` for it, of which one worker of each host is
#'   started.
#' @param save_dir (character) The directory on the hosts: `.save_dir` of the call. Default: the user's cache.
#' @return A named integer vector, invisibly: `files`, the number of files that were fetched, and `results`, the number
#'   of elements that have a result now and had none before.
#' @section Errors:
#' `rustcluster_run_unreadable`, `rustcluster_run_locked`, `rustcluster_run_write_failed`, `rustcluster_bad_argument`,
#' and the errors of [makeRustCluster()].
#' @examples
#' cl <- makeRustCluster(2)
#' dir <- tempfile("run")
#' squares <- clusterLapply(cl, 1:4, function(i) i^2, .store = dir, .save = "hosts")
#' print(collectRun(dir, cl))
#' parallel::stopCluster(cl)
#' @export
collectRun <- function(dir, from, save_dir = NULL) {
  dir <- checkDir(dir, "dir")
  if (!is.null(save_dir)) checkSaveDir(save_dir, "save_dir")
  if (missing(from)) badArgument("from", "is missing")
  store <- openStore(dir, write = TRUE)
  on.exit(closeStore(store))
  if (!inherits(from, "cluster")) {
    cl <- asArgument("from", makeRustCluster(from))
    on.exit(parallel::stopCluster(cl), add = TRUE, after = FALSE)
  } else {
    cl <- from
    clustersOf(cl)
  }
  before <- storeStates(store)
  save_dir <- if (is.null(save_dir)) "" else save_dir
  files <- sum(vapply(foldersOf(store$info), function(folder) fetchSaved(store, cl, save_dir, folder), 0L))
  invisible(c(files = files, results = sum(before != 1L & storeStates(store) == 1L)))
}

# In a worker ------------------------------------------------------------------------------------

callWith <- function(i, fun, ...) fun(...)

listSaved <- function(dir, folder, run) {
  folder <- saved_folder(dir, folder)
  lapply(list.files(folder, "[.]rcr$"), function(name) {
    path <- file.path(folder, name)
    list(name = name, size = file.size(path), elements = file_elements(path, run))
  })
}

readSaved <- function(dir, folder, name, from, count) {
  file <- file(file.path(saved_folder(dir, folder), name), "rb")
  on.exit(close(file))
  seek(file, from)
  readBin(file, "raw", count)
}

# Removes these files, and the folder if nothing is left in it.
removeSaved <- function(dir, folder, names = NULL) {
  folder <- saved_folder(dir, folder)
  if (is.null(names)) {
    unlink(folder, recursive = TRUE)
  } else {
    unlink(file.path(folder, names))
    # Removes only empty folders: another worker may be writing.
    suppressWarnings(file.remove(file.path(folder, "incomplete"), folder))
  }
  NULL
}
