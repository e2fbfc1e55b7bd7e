# Makes all conditions of the package. The class says what happened, the fields contain the data, and the message says
# what to do.

rustclusterCondition <- function(kind, message, ..., type = "error", call = NULL) {
  stopifnot(kind %in% names(conditionClasses[[type]]))
  class <- c(paste0("rustcluster_", kind), paste0("rustcluster_", type), type, "condition")
  structure(class = class, list(message = printable(message), call = call, ...))
}

# Returns text that is safe to print. Control characters, which could move the cursor of a terminal, change its title or
# hide text, become escapes, and bytes that are no text become <hex>. All text of hosts and workers goes through this
# function before it is printed or becomes a message. Output of user code with `outfile = ""` is printed unchanged.
printable <- function(text) {
  bytes <- Encoding(text) == "bytes" | !validUTF8(text)
  text <- enc2utf8(text)
  text[bytes] <- iconv(text[bytes], "UTF-8", "UTF-8", sub = "byte")
  # iconv() takes code points above U+10FFFF, which no other function does.
  beyond <- !validUTF8(text)
  text[beyond] <- iconv(text[beyond], "ASCII", "ASCII", sub = "byte")
  text <- gsub("\r\n", "\n", text, fixed = TRUE)
  # This includes characters that change the direction of text, and line ends of other systems.
  controls <- "[\\x01-\\x08\\x0b-\\x1f\\x7f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
  found <- which(grepl(controls, text, perl = TRUE))
  if (!length(found)) return(text)
  at <- gregexpr(controls, text[found], perl = TRUE)
  escape <- function(characters) {
    code <- vapply(characters, utf8ToInt, 0L)
    ifelse(code < 256L, sprintf("\\x%02x", code), sprintf("\\u%04x", code))
  }
  regmatches(text[found], at) <- lapply(regmatches(text[found], at), escape)
  text
}

abort <- function(kind, ..., fields = list()) {
  # The text of a worker must never be used as a format.
  message <- paste0(...)
  stop(do.call(rustclusterCondition, c(list(kind, message), fields)))
}

badArgument <- function(argument, ...) {
  abort("bad_argument", "`", argument, "` ", ..., fields = list(argument = argument))
}

# Evaluates the code. Its errors about `spec` and `cl` become errors about the argument that the user has given.
asArgument <- function(argument, code) {
  tryCatch(code, rustcluster_bad_argument = function(e) {
    part <- sub("^(spec|cl)\\b", "", e$argument)
    if (part == e$argument) stop(e)
    badArgument(paste0(argument, part), sub("^`[^`]*` ", "", conditionMessage(e)))
  })
}

# Returns the end of the output of a process, indented under its heading.
tailText <- function(heading, text) {
  text <- sub("[[:space:]]+$", "", if (is.null(text)) "" else text)
  if (!nzchar(text)) return("")
  lines <- strsplit(text, "\n", fixed = TRUE)[[1L]]
  crash <- grep("^ \\*\\*\\* caught ", lines)
  if (length(crash)) {
    # A traceback starts with the innermost calls and ends with those of this package.
    lines <- lines[-seq_len(max(crash) - 1L)]
    ours <- grep("^ *[0-9]+: (tryCatch\\(|do[.]call\\(fun, args|eval\\(expr, envir\\)|worker_serve\\()", lines)
    lines <- utils::head(if (length(ours)) lines[seq_len(ours[[1L]] - 1L)] else lines, 20L)
  } else {
    lines <- utils::tail(lines, 20L)
  }
  lines <- substr(lines, 1L, 500L)
  paste0("\n", heading, ":\n", paste0("  ", lines, collapse = "\n"))
}

signalName <- function(signal) {
  names <- c("1" = "SIGHUP", "2" = "SIGINT", "3" = "SIGQUIT", "4" = "SIGILL", "6" = "SIGABRT",
             "7" = "SIGBUS", "8" = "SIGFPE", "9" = "SIGKILL", "11" = "SIGSEGV",
             "13" = "SIGPIPE", "15" = "SIGTERM")
  name <- names[as.character(signal)]
  if (is.na(name)) "" else paste0(" (", name, ")")
}

outOfMemory <- function(left) {
  paste0(
    "; probably killed by the out-of-memory killer",
    # 0 stands for an unknown amount.
    if (left > 0) paste0(" (", formatBytes(left), " were available after its end)"),
    ": start fewer workers there, or limit the memory of each (`memory_limit`)"
  )
}

# Returns what separates a hint from the reason before it: a reason with the output of a command has several lines.
ownLine <- function(reason) if (isTRUE(grepl("\n", reason, fixed = TRUE))) "\n" else "; "

# Returns a time limit and the argument that set it: `timeout` of the cluster or, if that is longer, `.timeout`.
limitText <- function(limit, timeout) {
  own <- !is.null(limit) && limit < timeout
  paste0(format(if (own) limit else timeout), " s (", if (own) "`.timeout`" else "`timeout` of the cluster", ")")
}

# Returns the reason for the failure of a worker that ended before it was ready for tasks.
setbackText <- function(count, restoring, stalled) {
  if (stalled > 0) {
    paste0(
      ": it was killed because ", if (restoring) "a call that was repeated to restore it" else "its start",
      " made no progress for ", format(stalled), " s (see `setup_timeout`)"
    )
  } else if (count > 1L) {
    paste0(" while it was being ", if (restoring) "restored" else "started", ", ", count, " times in a row")
  }
}

formatBytes <- function(bytes) {
  ifelse(
    bytes < 1e5, sprintf("%.1f kB", bytes / 1e3),
    ifelse(bytes < 1e9, sprintf("%.1f MB", bytes / 1e6), sprintf("%.1f GB", bytes / 1e9))
  )
}

# Raises a failure that a Rust function has returned (boundary.R).
raiseFailure <- function(failure, handle = NULL) {
  stop(failureCondition(failure, handle))
}

# The fields of failures that conditions have, too.
conditionFields <- c(
  "reason", "stderr", "stdout", "what", "argument", "command", "rank", "pid", "signal", "status", "index", "needed",
  "available", "memory_available", "oom", "replaced", "seconds"
)

failureCondition <- function(failure, handle = NULL, type = "error") {
  # `$` would match a part of a name.
  field <- function(name) failure[[name]]
  kind <- field("kind")
  rank <- field("rank")
  agent <- field("agent")
  owner <- if (is.null(rank)) agent else handle$owner[rank]
  settings <- if (is.null(owner)) list(host = "localhost") else handle$agents[[owner]]
  host <- settings$host
  reason <- field("reason")
  # All tasks of a batch are lost together.
  tasks <- if (is.null(field("tasks"))) paste("task", field("index")) else field("tasks")
  several <- grepl("^[a-z]+s [0-9]", tasks)
  node <- paste0("worker ", rank, " on host ", sQuote(host))
  message <- switch(kind,
    worker_lost = paste0(
      node, if (field("pid") != 0L) paste0(" (pid ", field("pid"), ")"), " ", reason,
      if (!is.null(field("signal"))) signalName(field("signal")),
      # R and Rust raise these signals if they get no more memory.
      if (any(field("signal") %in% c(6L, 11L)) && isTRUE(is.finite(handle$memoryLimit))) {
        paste0("; it may have met its `memory_limit` of ", formatBytes(handle$memoryLimit))
      },
      if (isTRUE(field("oom"))) outOfMemory(field("memory_available")),
      setbackText(field("setbacks"), field("restoring"), field("stalled")),
      if (isFALSE(field("replaced"))) paste0(
        if (field("retry") > 0) {
          paste0(
            ownLine(reason), "the restart is retried in ", field("retry"), " s, and then at growing intervals; ",
            "until the worker is back, "
          )
        } else paste0(ownLine(reason), "it is not replaced: "),
        "`clusterAlive(cl)` leaves it out, if others are left"
      ),
      if (isTRUE(field("replaced")) && (is.null(field("task")) || !is.null(field("again")))) "; it is being replaced",
      if (!is.null(field("again"))) {
        paste0(
          if (isTRUE(field("replaced"))) ", and " else "; ", tasks, if (several) " are" else " is",
          if (!field("again")) " not", " retried"
        )
      },
      tailText("last output of the worker", field("stderr"))
    ),
    host_failed = if (isTRUE(field("given_up"))) paste0(
      "host ", sQuote(host), if (isTRUE(field("joined"))) " will not come back to" else " could not join",
      " the cluster, which goes on without it: ",
      if (!is.null(settings$dial)) reason else {
        hostProblem(settings, reason, field("stderr"), field("stdout"), c(field("status"), NA)[[1L]])
      }
    ) else paste0(
      "host ", sQuote(host), if (is.null(rank)) " is lost: " else paste0(" of worker ", rank, " is lost: "),
      reason,
      if (isTRUE(hub_reconnects(handle$pointer, owner))) {
        paste0(ownLine(reason), "it will be reconnected when it is back; until then ")
      } else {
        ownLine(reason)
      },
      "`clusterAlive(cl)` leaves its nodes out, if others are left"
    ),
    job_ended = paste0(
      node, if (identical(reason, "removed")) " was removed" else paste0(": its job ended (", reason, ")")
    ),
    host_draining = paste0(
      "host ", sQuote(host), " is draining because its job ends",
      if (!is.null(field("seconds"))) paste0(" in ", format(field("seconds")), " s"), " (", reason, "); ",
      "its workers get no new tasks\n"
    ),
    timeout = paste0(
      tasks, " exceeded ", if (several) "their" else "its", " time limit of ",
      limitText(field("limit"), handle$timeout), " on ", node, " and ", if (several) "were" else "was", " ended",
      # With a time limit, tasks are sent one by one: these elements are one task.
      if (several) {
        "; the time limit applies to the whole chunk of elements, and clusterLapply(.timeout = ) limits each element"
      }
    ),
    worker_replaced = paste0(
      node, " (pid ", field("pid"), ") was restarted: ", reason, ", and the worker ended or did not respond to the ",
      "interrupt (C code and system() do not respond); its state was restored"
    ),
    left_behind = paste0(
      "process ", field("pid"), " (", field("command"), "), started by ",
      if (is.null(rank)) "a worker" else paste("worker", rank), " on host ", sQuote(host),
      ", detached and is still running; stop it with `kill ", field("pid"), "` on that host"
    ),
    worker_back = paste0(node, " is back; its state was restored\n"),
    host_back = paste0(
      "host ", sQuote(host), " is back; the state of its workers was restored\n"
    ),
    host_joined = paste0(
      "host ", sQuote(host), " has joined the cluster (", sum(handle$owner == owner), " workers)\n"
    ),
    not_recorded = paste0(
      "a host that has missed exports or set-up calls could not be recorded (", field("reason"), "); a session that ",
      "reattaches the cluster may use old variables there"
    ),
    state_not_kept = if (is.null(owner)) paste0(
      "exports and set-up calls exceed `setup_log_limit` (", format(handle$headLogLimit / 1e6, digits = 3L),
      " MB), or the disk of tempdir() is full; hosts can no longer join the cluster or be reconnected"
    ) else paste0(
      "exports and set-up calls on host ", sQuote(host), " exceed `setup_log_limit` (",
      format(handle$setupLogLimits[[owner]] / 1e6, digits = 3L), " MB, or 100,000 calls on a worker); ",
      "lost workers there can no longer be replaced"
    ),
    stopped = if (is.null(rank)) {
      "the cluster has been stopped; create a new one with makeRustCluster()"
    } else {
      paste0(node, " has been stopped")
    },
    restored = if (!is.null(handle$linger)) paste0(
      "cluster ", handle$linger$id, " is one", lingerFate(handle$linger$id),
      if (is.null(theRecordOf(handle$linger$id))) "; create a new one with makeRustCluster()"
    ) else paste0(
      "this cluster was saved and loaded, or copied to another process: its workers belong to ",
      "the session that made them; create a new one with makeRustCluster()"
    ),
    forked = paste0(
      "this process was forked from the one that made the cluster (by mclapply() and the like) and cannot use ",
      "it; create a cluster here, or call it from the parent"
    ),
    busy = paste0(
      "the cluster is busy with another call from this session; wait for it to finish or create a second cluster"
    ),
    no_task = paste0(
      "these nodes have no outstanding task whose result could be received; a call of a function such as parLapply() ",
      "cancels tasks that were sent to its nodes before, such as futures of plan(cluster)"
    ),
    limits = paste0(
      "not enough ", field("what"), " for so many workers: ", field("needed"), " needed, ",
      field("available"), " available; ", reason
    ),
    start_failed = paste0(
      "the cluster could not be started on host ", sQuote(host), ": ",
      hostProblem(
        settings, reason, c(field("stderr"), "")[[1L]], c(field("stdout"), "")[[1L]], c(field("status"), NA)[[1L]],
        isTRUE(owner <= NROW(handle$report)) && !is.na(handle$report$r_version[[owner]])
      )
    ),
    bad_argument = paste0("`", field("argument"), "`: ", reason),
    reason
  )
  fields <- unclass(failure)[intersect(conditionFields, names(failure))]
  if (isTRUE(field("retry") > 0)) fields$retry <- field("retry")
  if (kind == "left_behind" && is.null(rank)) fields$rank <- NA_integer_
  if (!is.null(rank) || !is.null(agent) || kind == "start_failed") fields$host <- host
  do.call(rustclusterCondition, c(list(kind, message, type = type), fields))
}
