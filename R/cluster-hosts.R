# clusterHosts(): how the start went on each host.

#' Hosts of a cluster
#'
#' Returns how the start of the cluster went on each host, and how many workers of the host run.
#'
#' @param cl A cluster made by [makeRustCluster()].
#' @return A data frame of class `"rustcluster_hosts"`, with a row for each host, or for each group of
#'   equal entries of `spec`:
#'   \describe{
#'     \item{host, user}{(character) as in `spec`; `user` is `NA` without a user. For a job of a batch engine, `host` is
#'       the name of the node once the agent has joined. Two jobs on one node have the same name.}
#'     \item{state}{(character) `"up"`; `"waiting"`: has not joined yet (see `wait` of [makeRustCluster()]), or has no
#'       job because no task needs it (see `max` of [slurm()]); `"lost"`;
#'       `"failed"`: was left out at the start; `"stopped"`: all of its workers have been stopped or removed.}
#'     \item{job, job_state}{(character) the job of a batch engine, and its state in the engine's words, such as
#'       `"PENDING (Resources)"`; `NA` for other hosts. The state is that of the last query, a few seconds ago.}
#'     \item{workers}{(integer) workers that `spec` asked for.}
#'     \item{up}{(integer) workers that run now.}
#'     \item{r_version, platform}{(character) of R on the host.}
#'     \item{cores}{(integer) usable cores of the host.}
#'     \item{memory, available}{(numeric) bytes of memory: in all, and available when the agent started.}
#'     \item{seconds}{(numeric) from the call of `makeRustCluster()` or `addWorkers()` until the last worker was ready.}
#'     \item{problem}{(character) why the host or some of its workers failed, or `NA`.}
#'   }
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_forked`, `rustcluster_restored`.
#' @examples
#' cl <- makeRustCluster(2)
#' clusterHosts(cl)
#' parallel::stopCluster(cl)
#' @export
clusterHosts <- function(cl) {
  reports <- lapply(clustersOf(cl), function(part) hostsOf(part$handle))
  rows <- do.call(rbind, reports)
  first <- c("host", "user", "state", "job", "job_state")
  structure(rows[c(first, setdiff(names(rows), first))], class = c("rustcluster_hosts", "data.frame"))
}

#' @rdname clusterHosts
#' @param x A data frame that `clusterHosts()` has returned, or some of its rows or columns. `print()` prints the
#'   columns `memory` and `available` with units, such as "7.6 GB"; in `x` they are numbers of bytes.
#' @param ... Passed on to `print()` for data frames.
#' @export
print.rustcluster_hosts <- function(x, ...) {
  shown <- as.data.frame(x)
  for (name in intersect(c("memory", "available"), names(shown))) {
    bytes <- shown[[name]]
    if (is.numeric(bytes)) shown[[name]] <- ifelse(is.na(bytes), "?", formatBytes(bytes))
  }
  print(shown, ...)
  invisible(x)
}

hostsOf <- function(handle) {
  report <- handle$report
  report$job <- report$job_state <- NA_character_
  report$state <- ifelse(is.na(report$problem), "up", "failed")
  if (handle$stopped) report$state[] <- "stopped"
  pids <- if (handle$stopped) NA else checked(hub_pids(handle$pointer), handle)
  up <- handle$owner[!is.na(pids)]
  report$up <- if (handle$stopped) 0L else tabulate(up, nrow(report))
  if (!handle$stopped) {
    known <- checked(hub_hosts(handle$pointer))
    report$state[is.na(report$problem) & !is.na(known$reason)] <- "lost"
    report$state[known$awaited == 1] <- "waiting"
    # All workers of the host have been stopped or removed.
    removed <- !seq_along(handle$agents) %in% handle$owner[handle$alive] & is.na(report$problem)
    report$state[removed] <- "stopped"
    # A host that was given back has not failed.
    given <- areAdaptive(handle) & known$awaited == 1
    report$problem <- ifelse(is.na(report$problem) & !given & !removed, known$reason, report$problem)
    # What hosts have said that have joined since the start.
    nameNodes(handle, known)
    report$host <- handle$report$host
    askEngines(handle$batches, which(known$awaited != 1))
    jobs <- jobsOfHosts(handle, known)
    report$job <- jobs$job
    report$job_state <- jobs$state
    joined <- is.na(report$r_version)
    report$state[!is.na(known$draining) & known$awaited != 1 & report$state == "up"] <- "draining"
    for (name in c("r_version", "platform", "memory", "available")) report[[name]][joined] <- known[[name]][joined]
    report$cores[joined] <- as.integer(known$cores[joined])
    report$seconds[joined] <- round(known$up[joined], 2)
  }
  if (length(handle$hidden)) report <- report[-handle$hidden, ]
  rownames(report) <- NULL
  report
}

# Returns what is known of these hosts. `asked`: the numbers of workers of each.
hostReport <- function(handle, asked, hosts = seq_along(handle$agents)) {
  known <- lapply(checked(hub_hosts(handle$pointer)), `[`, hosts)
  agents <- handle$agents[hosts]
  text <- function(name) vapply(agents, function(agent) as.character(c(agent[[name]], NA)[[1L]]), "")
  for (name in c("stderr", "stdout")) known[[name]][is.na(known[[name]])] <- ""
  problems <- rep(NA_character_, length(agents))
  for (i in which(!is.na(known$reason))) {
    problems[[i]] <- hostProblem(
      agents[[i]], known$reason[[i]], known$stderr[[i]], known$stdout[[i]], known$status[[i]],
      !is.na(known$r_version[[i]])
    )
  }
  data.frame(
    host = text("host"), user = text("user"), state = NA_character_, workers = as.integer(asked), up = 0L,
    r_version = known$r_version, platform = known$platform, cores = as.integer(known$cores),
    memory = known$memory, available = known$available,
    seconds = round(ifelse(is.na(known$up), known$greeted, known$up), 2), problem = problems,
    stringsAsFactors = FALSE
  )
}

# Prints a line for a host when it has started or failed.
showHost <- function(report, i) {
  row <- report[i, ]
  if (is.na(row$problem)) {
    showDone(sprintf("%s: R %s, %d cores, %.1f s", row$host, row$r_version, row$cores, row$seconds))
  } else {
    showProblem(row)
  }
}

# A package that was built elsewhere can be installed without the packages that it imports.
hasCli <- function() requireNamespace("cli", quietly = TRUE)

# cli evaluates text in braces: the text of a host must be a value.
showDone <- function(text) {
  text <- printable(text)
  if (hasCli()) cli::cli_alert_success("{text}") else message(text)
}
