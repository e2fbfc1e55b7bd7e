# clusterTop(): the figures of the dashboard as text.

#' What a cluster is doing, as text in a terminal
#'
#' Shows what [clusterDashboard()] shows, as text: the state of the cluster, the last call with its progress, rate and
#' remaining time, workers, hosts, memory, data sent, and the last failures. In a terminal, the text is refreshed until
#' a key is pressed. Elsewhere it is printed once.
#'
#' This function occupies the session: use it for runs ([startRun()]) and while calls of [clusterSubmit()] or
#' [clusterLapplyAsync()] run, and [clusterDashboard()] to watch `parLapply()` and other functions that wait for their
#' results.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one: the text shows the whole cluster. Or a run that is
#'   being computed, as [startRun()] and [openRun()] return it: the text shows the cluster of its runner, and is
#'   refreshed until the run ends.
#' @param interval (number) Seconds between two refreshes, at least 0.1.
#' @return `cl`, invisibly.
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_stopped`, `rustcluster_forked`, `rustcluster_restored`.
#' @seealso [clusterDashboard()], [clusterStatus()]
#' @examples
#' cl <- makeRustCluster(2)
#' parallel::parLapply(cl, 1:4, sqrt)
#' clusterTop(cl)
#' parallel::stopCluster(cl)
#' @export
clusterTop <- function(cl, interval = 1) {
  handle <- if (!isRunObject(cl)) clusterHandle(cl)
  between(interval, "interval", "a number of seconds", 0.1, 1e6)
  if (isTRUE(handle$stopped)) raiseFailure(rustFailure("stopped"), handle)
  figures <- function() if (is.null(handle)) askRunner(cl, list(what = "figures")) else topFigures(handle)
  if (!interactive() || !isatty(stdout()) || sink.number() || !cli::has_keypress_support()) {
    cat(topLines(figures()), sep = "\n")
    return(invisible(cl))
  }
  lines <- refreshTop(figures, plain(interval))
  # What was shown last stays on the terminal.
  cat(lines, sep = "\n")
  invisible(cl)
}

topFigures <- function(handle) checked(hub_figures(handle$pointer), handle)

# Shows the figures on the terminal's other screen until a key is pressed, or the run ends. Returns the last lines.
refreshTop <- function(ask, interval) {
  figures <- ask()
  cat("\033[?1049h\033[?25l")
  on.exit(cat("\033[?25h\033[?1049l"))
  before <- NULL
  repeat {
    lines <- topLines(figures, before)
    height <- as.integer(Sys.getenv("LINES", "0"))
    if (is.na(height) || height < 10L) height <- 40L
    shown <- utils::head(c(lines, "", cli::style_dim("press any key to leave")), height)
    # Rewriting lines in place does not flicker.
    cat("\033[H", paste0(shown, "\033[K", collapse = "\r\n"), "\033[J", sep = "")
    utils::flush.console()
    until <- proc.time()[["elapsed"]] + interval
    while (proc.time()[["elapsed"]] < until) {
      if (keyPressed()) return(lines)
      Sys.sleep(0.05)
    }
    before <- figures
    figures <- tryCatch(ask(), rustcluster_stopped = function(e) e)
    if (inherits(figures, "error")) return(c(lines, "", conditionMessage(figures)))
  }
}

keyPressed <- function() !is.na(cli::keypress(block = FALSE))

# Returns the lines to show. `before`: the figures of the last time, for rates, or NULL.
topLines <- function(figures, before = NULL, width = cli::console_width()) {
  width <- max(width, 40L)
  text <- c(topStatus(figures), topJob(figures, before, width), topTotals(figures, before))
  c(cli::ansi_strtrim(text, width), "", topHosts(figures, width), topFailures(figures, width))
}

# Returns the numbers of workers in each state, by the letters of the states.
topStates <- function(figures) {
  letters <- strsplit(figures$states, "", fixed = TRUE)[[1L]]
  function(which) sum(letters %in% strsplit(which, "", fixed = TRUE)[[1L]])
}

topStatus <- function(figures) {
  count <- topStates(figures)
  hosts <- figures$hosts
  gone <- hosts$state %in% c("lost", "failed")
  up <- hosts$state %in% c("up", "draining")
  # Workers of a host that is up and has not replaced them.
  lost <- max(0, count("l") - sum((hosts$workers - hosts$up)[gone]))
  bad <- c(
    if (any(gone)) {
      paste0("host ", paste(sQuote(printable(hosts$host[gone])), collapse = ", "), " is lost or has failed")
    },
    if (lost > 0 && any(up)) paste(counted(lost, "worker"), "lost and not replaced")
  )
  job <- figures$job
  warn <- c(
    if (!is.null(job) && job$failed > 0) {
      paste(counted(job$failed, job$failed_noun), "of", if (job$ended) "the last" else "this", "call failed")
    },
    # A worker failure that is not retried is an error of the whole call.
    if (!is.null(job) && job$ended && job$done < job$tasks) "this call ended early",
    if (count("rs")) paste(counted(count("rs"), "worker"), "starting or being restored"),
    if (any(hosts$state == "waiting")) paste(counted(sum(hosts$state == "waiting"), "host"), "not joined yet"),
    if (any(hosts$state == "draining")) paste(counted(sum(hosts$state == "draining"), "host"), "draining")
  )
  if (length(bad)) return(cli::col_red(paste(cli::symbol$cross, paste(c(bad, warn), collapse = "; "))))
  if (length(warn)) return(cli::col_yellow(paste(cli::symbol$warning, paste(warn, collapse = "; "))))
  workers <- counted(nchar(figures$states), "worker")
  cli::col_green(paste0(cli::symbol$tick, " all is well, ", count("bed"), " of ", workers, " busy"))
}

topJob <- function(figures, before, width) {
  job <- figures$job
  if (is.null(job) || job$ended) {
    calls <- topCalls(figures, before)
    if (!is.null(calls)) return(calls)
  }
  if (is.null(job)) return(if (figures$done == 0) "nothing has run yet")
  rate <- if (job$seconds > 0) job$done / job$seconds else 0
  last <- before$job
  if (!is.null(last) && !job$ended && job$seconds > last$seconds && job$done > last$done &&
        last$tasks == job$tasks) {
    # Half of the rate is that of the last interval, so that the time left does not jump.
    rate <- (rate + (job$done - last$done) / (job$seconds - last$seconds)) / 2
  }
  part <- if (job$tasks) job$done / job$tasks else 1
  left <- if (job$ended) {
    paste(if (job$done < job$tasks) "ended early after" else "done in", formatSeconds(job$seconds))
  } else if (rate > 0) paste(formatSeconds((job$tasks - job$done) / rate), "left") else "time left not known yet"
  cells <- max(10L, min(40L, width - 60L))
  full <- floor(cells * part)
  c(
    paste0(
      if (job$ended) "last call: ", "[", strrep("#", full), strrep("-", cells - full), "] ", formatCount(job$done),
      " of ", counted(job$tasks, job$noun), sprintf(" (%.0f %%)", floor(100 * part)), ", ",
      if (rate > 0) paste0(format(rate, digits = 3L), "/s, "), left
    ),
    if (!is.null(job$store) && !is.na(job$store)) paste0("stored in ", printable(job$store))
  )
}

# Returns the progress of the calls of clusterSubmit(), clusterLapplyAsync() and futures, or NULL. How many will follow
# is not known.
topCalls <- function(figures, before) {
  if (figures$waiting + figures$running == 0) return(NULL)
  seconds <- if (!is.null(before)) figures$now - before$now
  rate <- if (isTRUE(seconds > 0)) (figures$done - before$done) / seconds
  left <- if (isTRUE(rate > 0)) {
    paste0(", ", format(rate, digits = 3L), "/s, ", formatSeconds((figures$waiting + figures$running) / rate), " left")
  }
  waiting <- if (figures$waiting) paste0(", ", formatCount(figures$waiting), " waiting for a worker")
  paste0(counted(figures$running, "call"), " running", waiting, left)
}

topTotals <- function(figures, before) {
  hosts <- figures$hosts
  count <- topStates(figures)
  seconds <- if (!is.null(before)) figures$now - before$now
  rate <- function(name) {
    if (is.null(seconds) || seconds <= 0 || length(before$hosts[[name]]) != length(hosts[[name]])) return("")
    paste0(" (", formatBytes(max(0, sum(hosts[[name]]) - sum(before$hosts[[name]])) / seconds), "/s)")
  }
  known <- function(bytes) if (length(bytes) && !all(is.na(bytes))) formatBytes(sum(bytes, na.rm = TRUE)) else "?"
  c(
    paste0(
      "workers: ", count("bed"), " busy, ", count("i"), " idle, ", count("rsw"), " starting, ", count("l"), " lost; ",
      "hosts: ", sum(hosts$state == "up"), " of ", length(hosts$host), " up"
    ),
    paste0(
      "tasks done: ", formatCount(figures$done), " in ", formatSeconds(figures$busy), " of work; calls: ",
      figures$waiting, " waiting, ", figures$running, " running"
    ),
    paste0(
      "sent: ", formatBytes(sum(hosts$bytes_in)), rate("bytes_in"), ", received: ", formatBytes(sum(hosts$bytes_out)),
      rate("bytes_out"), "; memory: ", known(figures$memory), " here, ", known(hosts$memory), " on workers"
    )
  )
}

topHosts <- function(figures, width) {
  hosts <- figures$hosts
  icon <- c(up = "o", starting = ".", waiting = ".", draining = "v", lost = "x", failed = "x", stopped = "-")
  table <- data.frame(
    host = printable(hosts$host), state = paste(icon[hosts$state], hosts$state), busy = formatCount(hosts$busy),
    up = formatCount(hosts$up), workers = formatCount(hosts$workers), done = formatCount(hosts$done),
    memory = ifelse(is.na(hosts$memory), "?", formatBytes(hosts$memory)), sent = formatBytes(hosts$bytes_in),
    received = formatBytes(hosts$bytes_out), losses = formatCount(hosts$losses)
  )
  old <- options(width = max(width, 100L))
  on.exit(options(old))
  cli::ansi_strtrim(utils::capture.output(printTable(utils::head(table, 30L))), width)
}

topFailures <- function(figures, width) {
  failures <- utils::head(rev(figures$failures), 5L)
  if (!length(failures)) return(NULL)
  lines <- unlist(lapply(failures, function(failure) {
    where <- if (!is.null(failure$rank) && !is.na(failure$rank)) {
      paste("worker", failure$rank)
    } else {
      paste("host", printable(figures$hosts$host[failure$host]))
    }
    output <- utils::tail(strsplit(printable(failure$output), "\n", fixed = TRUE)[[1L]], 2L)
    ago <- formatSeconds(max(0, figures$now - failure$at))
    text <- gsub("[[:space:]]*\n[[:space:]]*", " ", trimws(printable(failure$text)))
    c(
      paste0(
        failure$kind, ", ", where, ", ", ago, " ago",
        if (failure$count > 1) paste0(" (x", formatCount(failure$count), ")"), ": ", text
      ),
      if (length(output)) paste0("    ", output)
    )
  }))
  c("", paste0("Failures (", formatCount(sum(figures$counts)), "):"), cli::ansi_strtrim(lines, width))
}
