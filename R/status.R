# clusterStatus(): worker status. The session knows all of it except the memory, for which it asks the hosts.

#' Worker status
#'
#' Returns what each worker is doing and has done. The session knows all of this except the memory, so that the status
#' is available at any time: between two calls, after an interrupted call, and during a call, for example in `.onResult`
#' of [clusterLapply()].
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one: then the result has these workers only.
#' @param memory (logical) Whether to ask the hosts for the memory of their workers.
#' @param timeout (number) Seconds to wait for the memory, at least 0; default 2. The memory on hosts that do not
#'   respond in time is `NA`.
#' @return `clusterStatus()`: a data frame of class `"rustcluster_status"`, with a row for each node:
#'   \describe{
#'     \item{host, rank, pid}{(character, integer, integer) the worker; `pid` is `NA` if the worker has died or was
#'       stopped.}
#'     \item{state}{(character) `"idle"`; `"busy"`: has a task, or a task is being sent to it; `"ending"`: still runs a
#'       task that was cancelled or timed out; `"draining"`: gets no new tasks and then ends; `"restoring"`: replaces a
#'       failed worker and is not ready yet; `"waiting"`: its host has not joined yet; `"lost"`;
#'       `"stopped"`; `"starting"`.}
#'     \item{task, batch}{(integer) the index, in its job, of the current task, and the number of tasks in its batch;
#'       for a batch of several tasks, `task` is the first. `NA` for a call of [clusterSubmit()].}
#'     \item{done}{(numeric) finished tasks, with a value or an error. Each message of `clusterExport()` and
#'       `clusterCall()` counts as one. Tasks that timed out, were cancelled or failed with the worker do not count. The
#'       sum of `tasks` in [clusterTimeline()] is the same.}
#'     \item{seconds}{(numeric) total time of its tasks, including the current one.}
#'     \item{memory, rss}{(numeric) bytes in memory: `memory` counts a page that several processes share, as forks do,
#'       in part (PSS), and `rss` counts it in full (RSS). `NA` if not known.}
#'     \item{bytes_in, bytes_out}{(numeric) bytes that were sent to this worker alone, and that it sent. Data for all
#'       workers of a host is sent to the host once, and counts in `summary()` only.}
#'     \item{losses}{(integer) how often the worker has failed. A worker that was killed because it did not respond to
#'       an interrupt does not count.}
#'     \item{error}{(character) the last error of its tasks, the last timeout, or the reason of its last failure; `NA`
#'       if there was none.}
#'   }
#'   `summary()`, which waits up to 2 seconds for the memory: a data frame with a row for each host. The columns
#'   `workers` (integer), `busy` (integer), `done`, `seconds`, `memory` and `losses` are totals of the nodes in
#'   `object`. `bytes_in` and `bytes_out` are all bytes on the connection to the host.
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_forked`, `rustcluster_restored`.
#' @seealso [clusterTimeline()], [clusterHosts()].
#' @examples
#' cl <- makeRustCluster(2)
#' clusterApply(cl, 1:4, function(i) sum(rnorm(1e5)))
#' clusterStatus(cl)
#' summary(cl)
#' parallel::stopCluster(cl)
#' @export
clusterStatus <- function(cl, memory = TRUE, timeout = 2) {
  parts <- clustersOf(cl)
  if (!isTRUE(memory) && !isFALSE(memory)) badArgument("memory", "must be TRUE or FALSE")
  timeout <- plain(timeout)
  between(timeout, "timeout", "a number of seconds", 0, 1e6)
  deadline <- proc.time()[["elapsed"]] + timeout
  questions <- lapply(parts, function(part) {
    if (memory) checked(hub_ask_usage(part$handle$pointer, part$ranks), part$handle)
  })
  rows <- do.call(rbind, Map(function(part, question) {
    statusOf(part$handle, part$ranks, if (memory) workersMemory(part$handle, question, deadline) else list())
  }, parts, questions))
  rows <- rows[order(unlist(lapply(parts, `[[`, "indices"))), ]
  rownames(rows) <- NULL
  structure(rows, class = c("rustcluster_status", "data.frame"))
}

# Returns the status of these workers as a data frame. `taken`: the memory of the workers, or an empty list.
statusOf <- function(handle, ranks, taken) {
  status <- checked(hub_status(handle$pointer))
  of <- function(values) if (is.null(values)) rep(NA_real_, length(ranks)) else as.numeric(values[ranks])
  data.frame(
    host = handle$hosts[ranks], rank = ranks, pid = as.integer(status$pid[ranks]),
    state = status$state[ranks], task = as.integer(status$task[ranks]),
    batch = as.integer(status$batch[ranks]), done = status$done[ranks], seconds = status$seconds[ranks],
    # RSS, where a host does not know PSS.
    memory = ifelse(is.na(of(taken$proportional)), of(taken$resident), of(taken$proportional)),
    rss = of(taken$resident), bytes_in = status$bytes_in[ranks], bytes_out = status$bytes_out[ranks],
    losses = as.integer(status$losses[ranks]), error = as.character(status$error[ranks]),
    stringsAsFactors = FALSE
  )
}

# Returns the memory of all workers. Workers of hosts that do not respond in time have NA.
workersMemory <- function(handle, question, deadline) {
  repeat {
    left <- deadline - proc.time()[["elapsed"]]
    usage <- checked(hub_usage(handle$pointer, question, max(left, 0), left <= 0), handle)
    if (!is.null(usage)) return(usage)
    raiseInterrupt()
  }
}

#' @rdname clusterStatus
#' @param object As `cl`.
#' @param ... Not used.
#' @export
summary.RustCluster <- function(object, ...) {
  status <- clusterStatus(object)
  hosts <- unique(status$host)
  of <- factor(status$host, hosts)
  total <- function(values) as.numeric(rowsum(as.numeric(values), of))
  traffic <- do.call(rbind, lapply(clustersOf(object), function(part) {
    handle <- part$handle
    agents <- unique(handle$owner[part$ranks])
    bytes <- checked(hub_bytes(handle$pointer))
    data.frame(
      host = vapply(handle$agents[agents], `[[`, "", "host"), bytes_in = bytes$bytes_in[agents],
      bytes_out = bytes$bytes_out[agents], stringsAsFactors = FALSE
    )
  }))
  byHost <- function(values) as.numeric(tapply(values, factor(traffic$host, hosts), sum))
  known <- ifelse(is.na(status$memory), 0, status$memory)
  rows <- data.frame(
    host = hosts, workers = as.integer(table(of)), busy = as.integer(total(status$state == "busy")),
    done = total(status$done), seconds = total(status$seconds),
    memory = ifelse(total(!is.na(status$memory)) > 0, total(known), NA_real_),
    bytes_in = byHost(traffic$bytes_in), bytes_out = byHost(traffic$bytes_out),
    losses = as.integer(total(status$losses)), stringsAsFactors = FALSE
  )
  structure(rows, class = c("rustcluster_summary", "data.frame"))
}

# Printing -------------------------------------------------------------------------------------

#' @rdname clusterStatus
#' @param x A data frame that `clusterStatus()` has returned.
#' @param n (integer) The maximum number of workers to print one by one. If there are more, `print()` prints a summary
#'   by host, the workers that are neither idle nor busy, and the last errors. `Inf`: print all workers.
#' @export
print.rustcluster_status <- function(x, n = 24L, ...) {
  needed <- c("host", "rank", "pid", "state", "task", "batch", "done", "seconds", "memory", "bytes_in",
              "bytes_out", "losses", "error")
  numbers <- setdiff(needed, c("host", "state", "error"))
  if (!hasColumns(x, needed, numbers)) return(invisible(print(as.data.frame(x), ...)))
  n <- plain(n)
  between(n, "n", "a number of workers", 0, Inf)
  hosts <- unique(x$host)
  states <- table(factor(x$state, unique(x$state)))
  cat(
    counted(nrow(x), "worker"), " on ", counted(length(hosts), "host"),
    if (nrow(x)) paste0(": ", toString(paste(states, names(states)))), "; ",
    counted(sum(x$done), "task"), " done in ", formatSeconds(sum(x$seconds)), " of work\n",
    sep = ""
  )
  if (nrow(x) <= n) {
    if (nrow(x)) printTable(workersTable(x))
    showErrors(x)
    return(invisible(x))
  }
  of <- factor(x$host, hosts)
  count <- function(which) as.integer(rowsum(as.integer(which), of))
  memory <- as.numeric(rowsum(ifelse(is.na(x$memory), 0, x$memory), of))
  printTable(data.frame(
    host = hosts, workers = count(rep(1L, nrow(x))), busy = count(x$state == "busy"),
    idle = count(x$state == "idle"), other = count(!x$state %in% c("busy", "idle")),
    done = formatCount(as.numeric(rowsum(x$done, of))),
    worked = formatSeconds(as.numeric(rowsum(x$seconds, of))),
    memory = ifelse(memory > 0, formatBytes(memory), "?"), losses = count(x$losses)
  ))
  odd <- which(!x$state %in% c("busy", "idle", "stopped"))
  if (length(odd)) {
    cat("\n")
    printTable(workersTable(x[utils::head(odd, 10L), ]))
    if (length(odd) > 10L) cat("and", length(odd) - 10L, "others that are neither idle nor busy\n")
  }
  showErrors(x)
  cat("(print(x, n = Inf) shows all workers)\n")
  invisible(x)
}

workersTable <- function(x) {
  others <- ifelse(x$batch > 1L, paste0("+", x$batch - 1L), "")
  shown <- data.frame(
    host = x$host, rank = x$rank, pid = ifelse(is.na(x$pid), "-", x$pid), state = x$state,
    task = ifelse(is.na(x$task), "-", paste0(x$task, others)),
    done = formatCount(x$done), worked = formatSeconds(x$seconds),
    memory = ifelse(is.na(x$memory), "?", formatBytes(x$memory)),
    `in` = formatBytes(x$bytes_in), out = formatBytes(x$bytes_out), check.names = FALSE
  )
  if (any(x$losses > 0L)) shown$losses <- x$losses
  shown
}

# Prints the last errors of the workers under their table.
showErrors <- function(x) {
  x <- x[!is.na(x$error), ]
  shown <- utils::head(x, 10L)
  if (!nrow(shown)) return(invisible())
  cat("\nLast errors:\n")
  cat(paste0("  worker ", shown$rank, " on ", shown$host, ": ", oneLine(printable(shown$error), 90L), "\n"), sep = "")
  if (nrow(x) > nrow(shown)) cat("  and", nrow(x) - nrow(shown), "others\n")
}

#' @export
print.rustcluster_summary <- function(x, ...) {
  needed <- c("host", "workers", "busy", "done", "seconds", "memory", "bytes_in", "bytes_out", "losses")
  if (!hasColumns(x, needed, setdiff(needed, "host"))) return(invisible(print(as.data.frame(x), ...)))
  printTable(data.frame(
    host = x$host, workers = x$workers, busy = x$busy, done = formatCount(x$done),
    worked = formatSeconds(x$seconds), memory = ifelse(is.na(x$memory), "?", formatBytes(x$memory)),
    `in` = formatBytes(x$bytes_in), out = formatBytes(x$bytes_out), losses = x$losses, check.names = FALSE
  ))
  invisible(x)
}

# Returns whether a data frame has the columns that a print method needs: users may have changed it.
hasColumns <- function(x, names, numbers) {
  all(names %in% names(x)) && all(vapply(unclass(x)[numbers], is.numeric, NA))
}

printTable <- function(table) {
  print(table, row.names = FALSE)
}

# Returns the first line of each text, cut to `width` characters; "" for NA.
oneLine <- function(text, width) {
  text <- ifelse(is.na(text), "", sub("\n.*", "", trimws(text)))
  ifelse(nchar(text) > width, paste0(substr(text, 1L, width - 3L), "..."), text)
}

counted <- function(count, what) paste0(formatCount(count), " ", what, if (!isTRUE(count == 1)) "s")

formatCount <- function(count) {
  format(round(count), big.mark = ",", scientific = FALSE, trim = TRUE)
}

formatSeconds <- function(seconds) {
  ifelse(
    seconds < 100, sprintf("%.1f s", seconds),
    ifelse(seconds < 6000, sprintf("%.1f min", seconds / 60), sprintf("%.1f h", seconds / 3600))
  )
}
