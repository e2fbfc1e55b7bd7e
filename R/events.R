# Events: output of workers, and the warnings and messages that the session raises besides results.

# Prints the output of workers and raises warnings and messages. `except`: a condition that the caller raises as an
# error, and that is not raised again.
showEvents <- function(handle, except = NULL) {
  acknowledgeLosses(handle)
  if (length(handle$batches)) {
    tendBatches(handle)
    reportJobs(handle)
  }
  # The hub reports each event once.
  suspendInterrupts({
    show(hub_events(handle$pointer), handle, except)
    if (handle$receivesReports) takeReports(handle)
  })
  raisePending(handle)
}

# Prints output, and adds conditions to those that raisePending() raises.
show <- function(events, handle, except = NULL) {
  if (is.null(events) || isFailure(events)) return(invisible())
  conditions <- slowToEnd(events, handle)
  for (event in events) {
    if (event[["kind"]] == "stop_timeout") next
    if (event[["kind"]] == "output") {
      showOutput(handle, event[["rank"]], event[["text"]])
    } else {
      type <- if (event[["kind"]] %in% names(conditionClasses$message)) "message" else "warning"
      conditions <- c(conditions, list(failureCondition(event, handle, type)))
    }
  }
  for (condition in conditions) {
    raised <- class(condition)[[1L]] == class(except)[[1L]] && identical(condition$host, except$host) &&
      (is.null(condition$rank) || identical(condition$rank, except$rank))
    if (!raised) handle$pending <- c(handle$pending, list(condition))
  }
  invisible()
}

# Raises pending warnings and messages, and conditions that tasks have reported. Removes each one before it is raised:
# its handler may run any code, or jump, and the others are then still pending.
raisePending <- function(handle) {
  while (length(handle$pending)) {
    condition <- handle$pending[[1L]]
    if (is.environment(condition)) {
      report <- nextReport(condition)
      if (!is.null(report)) {
        signalReport(report)
        next
      }
    }
    handle$pending <- handle$pending[-1L]
    if (inherits(condition, "message")) {
      message(condition)
    } else if (inherits(condition, "warning")) {
      warning(condition)
    }
  }
  invisible()
}

# Returns a warning for each host with workers that were killed because they did not end in time.
slowToEnd <- function(events, handle) {
  slow <- Filter(function(event) event[["kind"]] == "stop_timeout", events)
  ranks <- sort(vapply(slow, `[[`, 0L, "rank"))
  lapply(unname(split(ranks, handle$owner[ranks])), function(ranks) {
    one <- length(ranks) == 1L
    # R cuts the message of a warning that nobody handles.
    named <- if (length(ranks) > 20L) paste0(length(ranks), " workers") else {
      paste(if (one) "worker" else "workers", paste(ranks, collapse = ", "))
    }
    host <- handle$hosts[[ranks[[1L]]]]
    rustclusterCondition(
      "stop_timeout", paste0(
        named, " on host ", sQuote(host), " did not end within ", format(handle$stopTimeout),
        " s of `stopCluster()` and ", if (one) "was" else "were", " killed before exit handlers (`.Last()`, ",
        "`reg.finalizer(onexit = TRUE)`) had finished; ",
        "increase `stop_timeout`"
      ),
      rank = ranks, host = host, type = "warning"
    )
  })
}

# Prints complete lines, and keeps an incomplete line until its end arrives.
showOutput <- function(handle, rank, text) {
  key <- as.character(rank)
  text <- paste0(handle$incompleteOutput[[key]], text)
  lines <- strsplit(text, "\n", fixed = TRUE)[[1L]]
  whole <- endsWith(text, "\n")
  handle$incompleteOutput[[key]] <- if (whole) "" else utils::tail(lines, 1L)
  if (!whole) lines <- utils::head(lines, -1L)
  if (length(lines)) {
    cat(paste0("[", handle$hosts[[rank]], " ", rank, "] ", lines, "\n"), sep = "")
  }
}
