# How the start went on each host.

#' The hosts of a cluster
#'
#' @param cl A cluster made by [makeRustCluster()].
#' @return A data frame with a row for each host, or for each group of equal
#'   entries of the spec:
#'   \describe{
#'     \item{host, user}{(character) as they were given; `user` is `NA` where none was.}
#'     \item{workers}{(integer) workers asked for.}
#'     \item{up}{(integer) workers there are now.}
#'     \item{r_version, platform}{(character) of R there.}
#'     \item{cores}{(integer) cores that may be used there.}
#'     \item{memory, available}{(numeric) bytes of memory in all, and when it was started.}
#'     \item{seconds}{(numeric) from the call to the last worker's answer.}
#'     \item{problem}{(character) what went wrong, or `NA`.}
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
  do.call(rbind, reports)
}

hostsOf <- function(handle) {
  report <- handle$report
  pids <- if (handle$stopped) NA else checked(hub_pids(handle$pointer), handle)
  up <- handle$owner[!is.na(pids)]
  report$up <- if (handle$stopped) 0L else tabulate(up, nrow(report))
  if (!handle$stopped) {
    lost <- checked(hub_hosts(handle$pointer))$reason
    report$problem <- ifelse(is.na(report$problem), lost, report$problem)
  }
  report
}

hostReport <- function(handle, asked) {
  known <- checked(hub_hosts(handle$pointer))
  agents <- handle$agents
  text <- function(name) vapply(agents, function(agent) as.character(c(agent[[name]], NA)[[1L]]), "")
  for (name in c("stderr", "stdout")) known[[name]][is.na(known[[name]])] <- ""
  problems <- rep(NA_character_, length(agents))
  for (i in which(!is.na(known$reason))) {
    problems[[i]] <- hostProblem(agents[[i]], known$reason[[i]], known$stderr[[i]], known$stdout[[i]])
  }
  data.frame(
    host = text("host"), user = text("user"), workers = as.integer(asked), up = 0L,
    r_version = known$r_version, platform = known$platform, cores = as.integer(known$cores),
    memory = known$memory, available = known$available,
    seconds = ifelse(is.na(known$up), known$greeted, known$up), problem = problems,
    stringsAsFactors = FALSE
  )
}

# What went wrong on a host, with what to do about it where that is known, and its last words.
hostProblem <- function(host, reason, stderr, stdout) {
  said <- paste(reason, stderr, stdout)
  here <- paste0(if (!is.null(host$user)) paste0(host$user, "@"), host$host)
  ssh <- paste0("ssh ", if (!is.null(host$port)) paste0("-p ", host$port, " "), here)
  remedies <- c(
    "REMOTE HOST IDENTIFICATION HAS CHANGED" = paste0(
      "its host key is another than the one known: if that is right, remove the old one with ",
      "`ssh-keygen -R ", host$host, "`"
    ),
    "Host key verification failed" = paste0(
      "its host key is not known: connect once by hand with `", ssh, "`"
    ),
    "Could not resolve hostname" = paste0(
      "its name cannot be resolved: check it, or give an address, or a Host entry in ~/.ssh/config"
    ),
    "Connection refused" = paste0(
      "no sshd listens there: start it, or give the right `port`"
    ),
    "timed out|No route to host|Network is unreachable" = paste0(
      "it cannot be reached: is it on, and in this network?"
    ),
    "Permission denied|Too many authentication failures" = paste0(
      "no key of yours is accepted there: see that `", ssh, "` works without a password, with ",
      "`ssh-copy-id` and `ssh-add`"
    ),
    "no package called .rustcluster" = paste0(
      "rustcluster is not installed there: run `installOnHosts(\"", writtenHost(host), "\")`, or give the ",
      "library that has it as `rlibs`"
    ),
    "cannot talk to rustcluster|bad control message" = paste0(
      "install the same version of rustcluster there, with `installOnHosts(\"", writtenHost(host), "\")`"
    ),
    "Rscript: not found|Rscript: command not found|Rscript.?: No such file" = paste0(
      "Rscript is not found there: install R, or give its path as `rscript`"
    )
  )
  for (pattern in names(remedies)) {
    if (grepl(pattern, said)) {
      reason <- paste0(remedies[[pattern]], " (", reason, ")")
      break
    }
  }
  paste0(
    reason, tailText("its stderr", stderr), tailText("its output", stdout)
  )
}

# One line a host as it comes up.
showHost <- function(report, i) {
  row <- report[i, ]
  if (is.na(row$problem)) {
    cli::cli_alert_success(sprintf(
      "%s: R %s, %d cores, %.1f s", row$host, row$r_version, row$cores, row$seconds
    ))
  } else {
    showProblem(row)
  }
}

showProblem <- function(row) {
  cli::cli_alert_danger(cli::format_inline("{row$host}: {strsplit(row$problem, '\n')[[1]][[1]]}"))
}

failedHosts <- function(report, failed) {
  lines <- sprintf("host %s: %s", sQuote(report$host[failed]), report$problem[failed])
  paste0(
    if (length(lines) > 1L) paste0(length(lines), " hosts failed\n"), paste(lines, collapse = "\n")
  )
}
