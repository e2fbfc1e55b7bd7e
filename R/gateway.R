# A head outside of a cluster: one ssh connection to a login node, over which commands run there, and a gateway there to
# which agents connect. Nothing listens on this machine but a socket in a directory of the user alone.
#
# The link to a login node consists of background processes, all of them ssh:
#   master    holds the connection. Its own session creates the directory `remote` there and removes it.
#   gateway   the session of gatewayMain(): it gets heartbeats on its stdin, and cancels the jobs when they end.
#   guards    the sessions of the guards of jobs (engineGuard()).
# If this session ends, so does the stdin of all of them. If the gateway ends, the stdin of the others ends.

# Connects to a login node, `"user@host"` or a host as of hostAddress(). Returns the engine host there; endLink() ends
# it. `rshcmd` and `rshopts` as in makeRustCluster(); `env`: variables for commands there.
openLink <- function(login, rshcmd = NULL, rshopts = NULL, env = character(), timeout = 60, heartbeat_timeout = 20) {
  host <- c(if (is.list(login)) login else hostAddress(login, "login"), list(rshcmd = rshcmd, rshopts = rshopts))
  host <- host[lengths(host) > 0L]
  link <- new.env(parent = emptyenv())
  link$host <- host
  link$guards <- list()
  link$heartbeat_timeout <- heartbeat_timeout
  link$local <- privateDir()
  link$control <- file.path(link$local, "ssh")
  link$socket <- file.path(link$local, "head")
  link$remote <- paste0("/tmp/rustcluster-", randomText(8L))
  opened <- FALSE
  on.exit(if (!opened) endLink(link, 0))
  # The shell removes the local directory when ssh has ended, also after this session. It gets SIGTERM when this session
  # ends, since forks of the session keep stdin open.
  wrapper <- paste0(
    "exec 3<&0; \"$@\" <&3 3<&- & ssh=$!; trap 'kill $ssh' TERM; wait $ssh; status=$?; wait $ssh 2> /dev/null; ",
    "rm -rf -- \"$RUSTCLUSTER_LINK\"; exit $status"
  )
  command <- c("sh", "-c", wrapper, "sh", sshWith(host, c(
    "-M", "-S", link$control, "-o", "ControlPersist=no", "-o", "ExitOnForwardFailure=no",
    # What agents send was encrypted, and does not get smaller.
    "-o", "Compression=no"
  )), loginShellCommand(masterScript(link$remote)))
  link$master <- background_start(command, c(RUSTCLUSTER_LINK = link$local), raw(), TRUE, 0, 0, FALSE)
  if (is.character(link$master)) loginFailed(link, paste0("ssh cannot be run: ", link$master))
  awaitLine(link, link$master, "^rustcluster-ready$", timeout, masterRemedy)
  if (!file.exists(link$control)) {
    loginFailed(link, paste0(
      "the command of `rshcmd` does not share its connection among sessions: use OpenSSH's ssh, with ",
      "ControlMaster allowed"
    ))
  }
  opened <- TRUE
  engineHost(env, link)
}

# Starts the gateway on the login node, when the head listens on `link$socket`. `cancel`: the path of the script there
# that cancels all jobs. `ports`: a port or a range; 0 for any. Returns the port on which the gateway listens.
startGateway <- function(host, cancel = "", address = "0.0.0.0", ports = 0L, rscript = NULL, rlibs = NULL,
                         max_connections = 4096L, timeout = 60) {
  link <- host$link
  forward <- sshWith(link$host, c(
    "-S", link$control, "-o", "ProxyCommand=false", "-O", "forward",
    "-R", paste0(link$remote, "/head:", link$socket)
  ))
  result <- engineRun(engineHost(), forward, timeout = timeout)
  if (!result$status %in% 0L) {
    loginFailed(link, paste0(
      "its sshd does not forward sockets: it needs `AllowStreamLocalForwarding yes` (the default) and no ",
      "`DisableForwarding`, or an OpenSSH of version 6.7 or newer"
    ), result$stderr)
  }
  ports <- rep_len(as.integer(ports), 2L)
  arguments <- c(
    if (is.null(rscript)) "Rscript" else rscript, "--default-packages=NULL", "-e", startExpression("gatewayMain"),
    paste0(link$remote, "/head"), address, ports, link$heartbeat_timeout, max_connections, link$remote,
    if (nzchar(cancel)) cancel
  )
  env <- c(if (length(rlibs)) c(R_LIBS = paste(rlibs, collapse = ":")), logVariables())
  script <- paste0(
    "echo $$ > ", link$remote, "/gateway; echo $$ >> ", link$remote, "/pids; ", exportEnv(host$env),
    remoteScript(arguments, env)
  )
  interval <- link$heartbeat_timeout / 4
  link$gateway <- background_start(
    sessionCommand(link, script), character(), raw(), TRUE, interval, link$heartbeat_timeout, FALSE
  )
  if (is.character(link$gateway)) loginFailed(link, paste0("ssh cannot be run: ", link$gateway))
  line <- awaitLine(link, link$gateway, "^port [0-9]+$", timeout, gatewayRemedy)
  for (other in c(link$guards, list(link$master))) background_on_end(link$gateway, other, FALSE)
  link$port <- as.integer(sub("port ", "", line))
  link$port
}

# Ends the gateway, which cancels the jobs, the guards, and the connection. Waits at most `timeout` seconds, and then
# kills what is left here.
closeGateway <- function(host, timeout = engineTimeout) endLink(host$link, timeout)

endLink <- function(link, timeout) {
  processes <- c(list(link$gateway), link$guards, list(link$master))
  processes <- processes[vapply(processes, typeof, "") == "externalptr"]
  for (process in processes) background_end_input(process)
  on.exit({
    for (process in processes) background_kill(process)
    # unlink() does not remove sockets.
    file.remove(list.files(link$local, all.files = TRUE, no.. = TRUE, full.names = TRUE))
    unlink(link$local, recursive = TRUE)
  })
  deadline <- proc.time()[["elapsed"]] + timeout
  for (process in processes) awaitBackground(process, deadline - proc.time()[["elapsed"]])
  invisible()
}

# Returns why commands on a login node can no longer run, and agents no longer connect, or NULL.
linkProblem <- function(link) {
  gateway <- if (!is.null(link$gateway)) background_report(link$gateway)
  master <- background_report(link$master)
  name <- sQuote(link$host$host)
  if (isTRUE(gateway$silent)) {
    return(paste0("the connection to login node ", name, " was silent for ", link$heartbeat_timeout, " s"))
  }
  if (!is.null(master$status)) {
    return(paste0(
      "the ssh connection to login node ", name, " ended", endedText(master),
      tailText("its stderr", bytesText(master$stderr))
    ))
  }
  if (!is.null(gateway$status)) {
    return(paste0(
      "the gateway on login node ", name, " ended", endedText(gateway),
      tailText("its stderr", bytesText(gateway$stderr))
    ))
  }
  NULL
}

endedText <- function(report) {
  if (!is.na(report$status)) return(paste0(" with status ", report$status))
  if (report$signal > 0L) paste0(": signal ", report$signal, signalName(report$signal)) else ""
}

# The main function of the gateway's process. Its arguments are those of startGateway().
gatewayMain <- function() {
  arguments <- commandArgs(TRUE)
  # A killed process leaves nothing behind.
  unlink(tempdir(), recursive = TRUE)
  checked(gateway_run(
    arguments[[1L]], arguments[[2L]], as.integer(arguments[3:4]), as.numeric(arguments[[5L]]),
    as.integer(arguments[[6L]]), if (length(arguments) > 7L) arguments[[8L]] else "", arguments[[7L]]
  ))
  invisible()
}

# Returns the script of the master's own session. It owns the directory there, and removes it when its stdin has ended
# and the gateway has cancelled the jobs. A gateway that takes too long, because it was stopped, is killed.
masterScript <- function(remote) {
  paste0(
    "d=", remote, "; umask 077; mkdir -m 700 $d || exit 1; echo $$ > $d/pids; echo rustcluster-ready; ",
    "while read -r x; do :; done; g=`cat $d/gateway 2> /dev/null`; i=0; ",
    "while [ \"$g\" ] && kill -0 $g 2> /dev/null && [ $i -lt 350 ]; do sleep 0.2; i=$((i+1)); done; ",
    "for p in $g; do grep -q $d /proc/$p/cmdline && kill -9 $p; done 2> /dev/null; rm -rf $d"
  )
}

# Returns ssh's command with further options, up to the name of the host.
sshWith <- function(host, options) {
  command <- sshCommand(host, "")
  n <- length(command)
  c(command[seq_len(n - 2L)], options, command[[n - 1L]])
}

# Returns the command of a session over the connection of a link. Without the connection it fails: ssh would open
# another one.
sessionCommand <- function(link, script) {
  c(
    sshWith(link$host, c("-S", link$control, "-o", "ControlMaster=no", "-o", "ProxyCommand=false")),
    loginShellCommand(script)
  )
}

# Waits until a process has printed a line that matches, and returns the line.
awaitLine <- function(link, process, pattern, timeout, remedy) {
  deadline <- proc.time()[["elapsed"]] + timeout
  repeat {
    ended <- background_wait(process, 0.1, TRUE)
    report <- background_report(process)
    lines <- sub("\r$", "", strsplit(bytesText(report$stdout), "\n", fixed = TRUE, useBytes = TRUE)[[1L]])
    found <- grep(pattern, lines, value = TRUE, useBytes = TRUE)
    if (length(found)) return(found[[1L]])
    stderr <- bytesText(report$stderr)
    if (ended) loginFailed(link, remedy(link, report$status, stderr), stderr, bytesText(report$stdout))
    if (proc.time()[["elapsed"]] > deadline) {
      reason <- paste0("no response within ", timeout, " s; check the login node or increase `setup_timeout`")
      loginFailed(link, reason, stderr, bytesText(report$stdout))
    }
    raiseInterrupt()
  }
}

loginFailed <- function(link, reason, stderr = "", stdout = "") {
  abort(
    "start_failed", "login node ", sQuote(link$host$host), " cannot be used: ", reason,
    tailText("its stderr", stderr), tailText("its output", stdout),
    fields = list(host = link$host$host, stderr = stderr)
  )
}

masterRemedy <- function(link, status, stderr) {
  remedy <- if (status %in% 255L) sshRemedy(link$host, stderr)
  if (!is.null(remedy)) return(remedy)
  if (status %in% 127L) return("ssh was not found on this machine: install it, or check `rshcmd`")
  paste0(
    "the command that connects to it ended with status ", status, ": make `ssh ", addressOf(link$host),
    " true` work without a password; `rshcmd` must be OpenSSH's ssh"
  )
}

# Returns what to do if a session over the connection could not be opened, or NULL.
sessionRemedy <- function(link, stderr) {
  if (grepl("Session open refused by peer|session request failed|administratively prohibited", stderr)) {
    return("its sshd allows too few sessions on one connection: set `MaxSessions` of its sshd to 5 or more")
  }
  linkProblem(link)
}

gatewayRemedy <- function(link, status, stderr) {
  remedy <- if (status %in% 255L) sessionRemedy(link, stderr)
  if (is.null(remedy)) remedy <- commandRemedy(link$host, "", stderr, "", status)
  if (is.null(remedy) && grepl("gatewayMain|gateway_run", stderr)) remedy <- versionRemedy(link$host)
  if (is.null(remedy)) "the gateway there did not start" else remedy
}

# Creates a directory that the user alone can read, with a short path: the path of a socket has at most 107 bytes.
privateDir <- function() {
  base <- if (nchar(tempdir(), "bytes") <= 50L) tempdir() else "/tmp"
  dir <- file.path(base, paste0("rc-", randomText(8L)))
  if (!dir.create(dir, showWarnings = FALSE, mode = "0700")) {
    abort("start_failed", "no directory for the sockets of ssh could be created in ", base)
  }
  dir
}
