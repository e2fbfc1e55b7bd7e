# The state of a cluster for a bug report.

#' The state of a cluster, for a bug report
#'
#' Versions, hosts, workers, the queues of this session, and what each agent knows of itself and its workers. Works at
#' any time: between calls, during a call (as in `.onResult` of [clusterLapply()]), after lost hosts, and after
#' `stopCluster()`, then without agents. An agent that does not answer within `timeout` is left out.
#'
#' To report a problem, attach the file of `saveRDS(clusterDump(cl), "dump.rds")`, or what [print()] shows. The object
#' contains numbers, states, versions, host names, the reasons why hosts and workers were lost, and two kinds of paths:
#' of log files, and of a program that could not be started. It contains nothing of tasks, results, variables or files,
#' nothing that workers or agents have printed, and no environment variables, user names, ports or arguments of
#' commands. (A path may contain the name of a user.)
#'
#' The elements of its tables are named as in the code, and change with it.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one: then `workers` and `agent_workers` have these
#'   workers only. The other tables are always of the whole cluster.
#' @param timeout (number) Seconds to wait for the answers of agents, at least 0; default 2.
#' @return A list of class `"rustcluster_dump"`:
#'   \describe{
#'     \item{time}{(POSIXct) when it was made.}
#'     \item{versions}{(character) of rustcluster, R, the platform and the operating system.}
#'     \item{clusters}{(list) for each cluster of which `cl` has nodes, a list of
#'       `cluster` (list), the state as a whole;
#'       `hosts` (data frame), what this session knows of each host, and `answered` (logical), whether its agent
#'       has answered;
#'       `workers` (data frame), what this session knows of each worker;
#'       `agents` and `agent_workers` (data frames), what agents know of themselves and of their workers;
#'       `events` (data frame), the last failures and replacements, at most 200, `at` in seconds since the start.}
#'   }
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_forked`, `rustcluster_restored`.
#' @seealso [rustcluster_log], [clusterStatus()], [clusterTimeline()].
#' @examples
#' cl <- makeRustCluster(2)
#' dump <- clusterDump(cl)
#' dump
#' parallel::stopCluster(cl)
#' @export
clusterDump <- function(cl, timeout = 2) {
  parts <- clustersOf(cl)
  timeout <- plain(timeout)
  between(timeout, "timeout", "a number of seconds", 0, 1e6)
  deadline <- proc.time()[["elapsed"]] + timeout
  questions <- lapply(parts, function(part) checked(hub_ask_dump(part$handle$pointer), part$handle))
  structure(
    list(
      time = Sys.time(),
      versions = c(
        rustcluster = packageVersionText(), R = rVersionText(), platform = R.version$platform,
        system = paste(Sys.info()[c("sysname", "release")], collapse = " ")
      ),
      clusters = Map(dumpOf, parts, questions, deadline)
    ),
    class = "rustcluster_dump"
  )
}

dumpOf <- function(part, question, deadline) {
  handle <- part$handle
  repeat {
    left <- deadline - proc.time()[["elapsed"]]
    dump <- checked(hub_dump(handle$pointer, question, max(left, 0), left <= 0), handle)
    if (!is.null(dump)) break
    raiseInterrupt()
  }
  own <- list(
    workers = length(handle$hosts), stopped = handle$stopped, retries = handle$retries, timeout = handle$timeout,
    reconnect = handle$reconnect, memory_limit = handle$memoryLimit, stop_timeout = handle$stopTimeout
  )
  hostNames <- vapply(handle$agents, `[[`, "", "host")
  ofAgents <- function(which) {
    facts <- lapply(dump$agents, function(of) of[which(names(of))])
    counts <- lengths(facts)
    of <- data.frame(
      host = rep(hostNames, counts), rank = as.integer(unlist(lapply(facts, names))), stringsAsFactors = FALSE
    )
    cbind(of, factsTable(do.call(c, unname(facts))))
  }
  agents <- ofAgents(function(rank) rank == "0")
  hosts <- data.frame(host = hostNames, answered = lengths(dump$agents) > 0L, stringsAsFactors = FALSE)
  workers <- factsTable(dump$workers)
  workers$host <- hostNames[workers$host]
  workers <- cbind(rank = seq_along(dump$workers), workers)
  of_part <- function(rows) {
    rows <- rows[rows$rank %in% part$ranks, ]
    rownames(rows) <- NULL
    rows
  }
  events <- as.data.frame(dump$events, stringsAsFactors = FALSE)
  events$at <- round(events$at, 6L)
  events$host <- hostNames[ifelse(is.na(events$host), handle$owner[events$rank], events$host)]
  list(
    cluster = c(own, as.list(factsTable(list(dump$cluster)))),
    hosts = cbind(hosts, factsTable(dump$hosts)),
    workers = of_part(workers),
    agents = agents[names(agents) != "rank"],
    agent_workers = of_part(ofAgents(function(rank) rank != "0")),
    events = events
  )
}

# Returns a data frame with a row for each named character vector. A name that a vector lacks is NA.
factsTable <- function(facts) {
  columns <- unique(unlist(lapply(facts, names)))
  of <- function(column) {
    values <- vapply(facts, function(row) if (column %in% names(row)) row[[column]] else NA_character_, "")
    values[values %in% c("true", "false")] <- toupper(values[values %in% c("true", "false")])
    utils::type.convert(unname(values), as.is = TRUE)
  }
  table <- lapply(columns, of)
  structure(table, names = as.character(columns), row.names = seq_along(facts), class = "data.frame")
}

#' @rdname clusterDump
#' @param x What `clusterDump()` has returned.
#' @param n (integer) Workers that are shown, at most; those that are not idle come first. `Inf`: all.
#' @param ... Not used.
#' @export
print.rustcluster_dump <- function(x, n = 24L, ...) {
  n <- plain(n)
  between(n, "n", "a number of workers", 0, Inf)
  cat("State of a rustcluster, ", format(x$time, "%Y-%m-%d %H:%M:%S %Z"), "\n", sep = "")
  showFacts("", as.list(x$versions))
  for (cluster in x$clusters) {
    cat("\nCluster\n")
    showFacts("", cluster$cluster)
    showRows("Hosts, as this session sees them", cluster$hosts, "host", Inf)
    showRows("Agents, as they see themselves", cluster$agents, "host", Inf)
    showRows("Workers, as this session sees them", busyFirst(cluster$workers), "rank", n)
    showRows("Workers, as their agents see them", busyFirst(cluster$agent_workers), "rank", n)
    showRows("Last events", cluster$events, "what", Inf)
  }
  invisible(x)
}

busyFirst <- function(workers) workers[order(workers$state %in% c("idle", "terminated"), workers$rank), ]

# Prints a paragraph for each row. Values that are unknown, FALSE or empty are left out.
showRows <- function(heading, rows, key, n) {
  if (!NROW(rows)) return(invisible())
  cat("\n", heading, "\n", sep = "")
  for (i in seq_len(min(n, nrow(rows)))) {
    title <- if (key == "rank") paste("worker", rows$rank[[i]]) else rows[[key]][[i]]
    showFacts(paste0(title, ": "), as.list(rows[i, names(rows) != key]))
  }
  if (nrow(rows) > n) cat("  and", nrow(rows) - n, "others (print(x, n = Inf) shows all)\n")
}

showFacts <- function(title, facts) {
  shown <- vapply(facts, function(value) !is.na(value) && !identical(value, FALSE) && nzchar(value), NA)
  values <- vapply(facts[shown], function(value) format(value, digits = 15L), "")
  text <- paste0(title, paste0(names(values), "=", values, collapse = " "))
  cat(strwrap(printable(text), 100L, indent = 2L, exdent = 6L), sep = "\n")
}
