# Why a host could not be started or was lost, and the remedy.

# Returns the problem of a host: what to do, if that is known, the reason, and the end of the output. `status`: the exit
# status of the agent's command, or NA. `up`: whether the agent has greeted, so that the command has worked.
hostProblem <- function(host, reason, stderr, stdout, status = NA, up = FALSE) {
  remedy <- if (up || !is.null(host$dial)) NULL else commandRemedy(host, reason, stderr, stdout, status)
  if (grepl("cannot talk to rustcluster|bad control message", reason)) remedy <- versionRemedy(host)
  paste0(
    if (is.null(remedy)) reason else paste0(remedy, " (", reason, ")"),
    tailText("its stderr", stderr), tailText("its output", stdout)
  )
}

# Returns what to do if the command of a host has ended before its agent greeted, or NULL. The exit status tells which
# program failed. Its messages are searched only then, because any program may print "Permission denied".
commandRemedy <- function(host, reason, stderr, stdout, status) {
  if (!is.null(host$launcher)) {
    remedy <- launcherRemedy(host, reason, stderr, stdout, status)
    if (!is.null(remedy)) return(remedy)
  }
  ssh <- !isTRUE(host$local) && is.null(host$launcher)
  if (grepl("^the (agent|installation) could not be started: ", reason)) {
    if (!ssh) return("Rscript cannot be run on this machine: check `rscript`")
    return("the command that connects to the host cannot be run on this machine: install ssh, or check `rshcmd`")
  }
  # ssh's own failure.
  if (ssh && status %in% 255L) return(sshRemedy(host, stderr))
  rscript <- if (is.null(host[["rscript"]])) "Rscript" else host[["rscript"]]
  if (ssh && status %in% 126L) {
    return(paste0("Rscript cannot be executed on the host (", rscript, "): check its permissions, or `rscript`"))
  }
  if (ssh && status %in% 127L) {
    return(paste0("Rscript was not found on the host (", rscript, "): install R, or set its path by `rscript`"))
  }
  if (status %in% 1L && grepl("no package called .rustcluster", stderr)) {
    return(paste0(
      "rustcluster is not installed on the host: ",
      if (ssh) paste0("run `installOnHosts(\"", writtenHost(host), "\")`, start with `install = TRUE`, or "),
      "set its library by `rlibs`"
    ))
  }
  if (grepl("^Fatal error: (creating temporary file|cannot create 'R_TempDir')", paste0(stderr, stdout))) {
    return(paste0(
      "R ended before it ran any code: the disk of its temporary directory (TMPDIR, or /tmp) is full or not ",
      "writable"
    ))
  }
  if (status %in% 0L) endedEarly(host, rscript, !nzchar(paste0(stderr, stdout)))
}

addressOf <- function(host) paste0(if (!is.null(host$user)) paste0(host$user, "@"), host$host)

# On this machine an agent loads the installed version, and this session the version that was installed when it began.
versionRemedy <- function(host) {
  if (isTRUE(host$local)) {
    return("another build of rustcluster has been installed on this machine: restart this R session")
  }
  if (!is.null(host$dial)) return("install the same build of rustcluster on the nodes of the batch engine")
  if (!is.null(host$launcher)) {
    return(paste0("install the same build of rustcluster where ", launcherProgram(host$launcher), " runs R"))
  }
  paste0(
    "install the same build of rustcluster on the host, with `installOnHosts(\"", writtenHost(host), "\")`, or ",
    "start with `install = TRUE`"
  )
}

# Returns what to do if ssh itself has failed, or NULL.
sshRemedy <- function(host, stderr) {
  command <- paste0("ssh ", if (!is.null(host$port)) paste0("-p ", host$port, " "), addressOf(host))
  remedies <- c(
    "REMOTE HOST IDENTIFICATION HAS CHANGED" = paste0(
      "its host key has changed: if that was intended, remove the old key with ",
      "`ssh-keygen -R ", host$host, "`"
    ),
    "^Host key verification failed" = paste0("its host key is unknown: connect once by hand with `", command, "`"),
    "^ssh: Could not resolve hostname" = paste0(
      "its name cannot be resolved: check the name, use an address, or add a Host entry to ~/.ssh/config"
    ),
    "^(ssh|channel [0-9]+): .*Connection refused" = "no sshd listens on that port: start sshd, or correct `port`",
    "^(ssh|channel [0-9]+): .*(timed out|No route to host|Network is unreachable)|^Connection timed out" = paste0(
      "the host cannot be reached: check that it is on and in this network"
    ),
    "Permission denied \\([a-z,-]+\\)|Too many authentication failures" = paste0(
      "the host accepts none of your keys: make `", command, "` work without a password, with ",
      "`ssh-copy-id` and `ssh-add`"
    )
  )
  lines <- sub("\r$", "", strsplit(stderr, "\n", fixed = TRUE)[[1L]])
  for (pattern in names(remedies)) if (any(grepl(pattern, lines))) return(remedies[[pattern]])
  NULL
}

showProblem <- function(row) {
  # cli finds this variable by its name.
  text <- printable(paste0(row$host, ": ", sub("\n.*", "", row$problem)))
  if (hasCli()) cli::cli_alert_danger("{text}") else message(text)
}

# Returns the text of an error about hosts that failed. Hosts with the same problem share a line.
failedHosts <- function(report, failed) {
  problems <- report$problem[failed]
  names <- report$host[failed]
  # Elements of an array have the same problem, each with its job.
  job <- "\\bits job ([^ ]+) (is|ended before its agent)\\b"
  same <- sub(job, "\\2", problems, perl = TRUE)
  same <- mapply(function(name, text) gsub(name, "\r", text, fixed = TRUE), names, same)
  groups <- split(seq_along(failed), factor(same, unique(same)))
  lines <- vapply(groups, function(group) {
    hosts <- sQuote(names[group])
    problem <- problems[[group[[1L]]]]
    others <- length(group) - 1L
    if (!others) return(paste0("host ", hosts, ": ", problem))
    if (!grepl(job, problem, perl = TRUE)) return(paste0("hosts ", someOf(hosts, 50L), ": ", problem))
    jobs <- paste0("its job \\1 (and ", others, " other", if (others > 1L) "s", ") \\2")
    problem <- sub(job, jobs, problem, perl = TRUE)
    paste0("hosts ", someOf(hosts), ": ", problem)
  }, "")
  lines <- paste(lines, collapse = "\n")
  if (length(failed) == 1L) return(lines)
  first <- paste(length(failed), "hosts failed")
  # R cuts the message of an error that nobody catches.
  if (length(groups) > 1L && nchar(lines) > getOption("warning.length", 1000L) - 200L) {
    first <- paste0(
      first, ": ", toString(unique(names)), " (options(warning.length = 8000) lets R print all of a long message)"
    )
  }
  paste0(first, "\n", lines)
}

# Returns names as text: all of them, up to `max`, or the first ones and the number of the others.
someOf <- function(names, max = 3L) {
  count <- length(names)
  if (count < 2L) return(names)
  shown <- if (count > max) c(names[seq_len(max - 1L)], paste(count - max + 1L, "others")) else names
  last <- length(shown)
  paste(paste(shown[-last], collapse = ", "), "and", shown[[last]])
}

# Returns what to say of a command that has ended without an error and without an agent. `silent`: it printed nothing.
endedEarly <- function(host, rscript, silent) {
  command <- if (is.null(host[["rshcmd"]])) rscript else paste(host[["rshcmd"]], collapse = " ")
  paste0(
    "the command ", sQuote(command), " ended without starting an agent", if (silent) " and printed nothing",
    if (!is.null(host[["rshcmd"]])) {
      ": check `rshcmd`"
    } else if (silent) {
      # R writes the code to a temporary file first, and does not notice if nothing was written.
      paste0(
        "; perhaps the disk of its temporary directory (TMPDIR, or /tmp) is full or not writable, or it is not R's ",
        "Rscript"
      )
    } else {
      ": check `rscript`"
    }
  )
}
