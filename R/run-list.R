# listRuns(): the runs that this user has started on this machine. Each has a small file in the user's data directory.

#' List runs
#'
#' Returns the runs that you have started with [startRun()], from any session on this machine, and whose directories
#' still exist.
#'
#' The list is kept in `tools::R_user_dir("rustcluster", "data")`, a small file for each run. Files of runs whose
#' directories are gone are removed. If that directory is shared with other machines, the list has their runs, too, if
#' this machine sees them.
#'
#' @return A data frame of class `"rustcluster_runs"` with a row for each run, the newest first: `dir`, and `state`,
#'   `done`, `failed`, `total`, `host`, `pid`, `started`, `ended` of the status of [openRun()]. A run whose directory
#'   cannot be read has the state `"unreadable"`.
#' @seealso [startRun()], [runs()]
#' @examples
#' listRuns()
#' @export
listRuns <- function() {
  dirs <- notedRuns()
  rows <- lapply(dirs, function(dir) {
    status <- tryCatch(newRun(dir)$status(), error = function(e) {
      never <- as.POSIXct(NA)
      list(state = "unreadable", done = NA_real_, failed = NA_real_, total = NA_real_, host = NA_character_,
           pid = NA_integer_, started = never, ended = never)
    })
    as.data.frame(c(list(dir = dir), status[statusColumns]), stringsAsFactors = FALSE)
  })
  none <- data.frame(
    dir = character(), state = character(), done = numeric(), failed = numeric(), total = numeric(), host = character(),
    pid = integer(), started = as.POSIXct(character()), ended = as.POSIXct(character()), stringsAsFactors = FALSE
  )
  list <- do.call(rbind, c(list(none), rows))
  list <- list[order(list$started, decreasing = TRUE), ]
  rownames(list) <- NULL
  structure(list, class = c("rustcluster_runs", "data.frame"))
}

statusColumns <- c("state", "done", "failed", "total", "host", "pid", "started", "ended")

#' @rdname listRuns
#' @param x A data frame that `listRuns()` has returned.
#' @param ... Not used.
#' @export
print.rustcluster_runs <- function(x, ...) {
  if (!hasColumns(x, c("dir", statusColumns), c("done", "failed", "total"))) return(invisible(print(as.data.frame(x))))
  if (!nrow(x)) {
    cat("no runs\n")
    return(invisible(x))
  }
  time <- function(time) ifelse(is.na(time), "-", format(time, "%Y-%m-%d %H:%M"))
  table <- data.frame(
    state = x$state, done = paste0(formatCount(x$done), "/", formatCount(x$total)), failed = x$failed,
    started = time(x$started), host = ifelse(is.na(x$host), "-", shortened(printable(x$host), 12L)),
    dir = printable(x$dir), stringsAsFactors = FALSE
  )
  # One line for each run: the directory gets the rest of the line.
  taken <- vapply(names(table)[-6L], function(name) max(nchar(c(name, table[[name]]))) + 1L, 1)
  table$dir <- shortened(table$dir, max(getOption("width", 80L) - sum(taken) - 2, 20))
  printTable(table)
  invisible(x)
}

# Replaces the middle of texts that are longer than `width`.
shortened <- function(text, width) {
  long <- nchar(text) > width
  head <- (width - 3) %/% 3
  short <- paste0(substr(text, 1L, head), "...", substring(text, nchar(text) - (width - 3 - head) + 1))
  ifelse(long, short, text)
}

# Returns the directory of the list.
notesDirectory <- function() file.path(tools::R_user_dir("rustcluster", "data"), "runs")

# Adds a run to the list. The run itself does not depend on that.
noteRun <- function(dir) {
  problem <- tryCatch(
    {
      notes <- notesDirectory()
      dir.create(notes, showWarnings = FALSE, recursive = TRUE, mode = "0700")
      note <- list(dir = dir, host = thisHost())
      new <- tempfile("new-", notes)
      saveRDS(note, new)
      file.rename(new, file.path(notes, paste0(randomText(8L), ".rds")))
      NULL
    },
    error = conditionMessage, warning = conditionMessage
  )
  if (is.null(problem)) return(invisible())
  message(rustclusterCondition(
    "run_not_listed", paste0("listRuns() will not show ", sQuote(dir), ": ", problem, "\n"), dir = dir, type = "message"
  ))
}

# Returns the directories of the runs, without those that are gone.
notedRuns <- function() {
  files <- list.files(notesDirectory(), "[.]rds$", full.names = TRUE)
  notes <- lapply(files, function(file) tryCatch(readRDS(file), error = function(e) NULL, warning = function(w) NULL))
  dirs <- vapply(notes, function(note) if (is.character(note$dir)) note$dir else NA_character_, "")
  hosts <- vapply(notes, function(note) if (is.character(note$host)) note$host else NA_character_, "")
  there <- !is.na(dirs) & vapply(dirs, isRun, NA)
  # A directory that this machine does not see may be on a disk of another one.
  unlink(files[!there & (hosts %in% thisHost() | is.na(dirs)) | duplicated(paste(dirs, hosts))])
  unique(dirs[there])
}
