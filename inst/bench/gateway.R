# Compares agents behind the gateway of a login node with agents that dial back directly, and with what ssh itself
# allows: the rate of `ssh login cat`. The three are measured in turns, since the load of a machine changes.
#
#   Rscript gateway.R [ssh="ssh -F file"] [login=127.0.0.2] [tasks=5000] [megabytes=100] [rounds=7]
#
# The login node must be this machine, and must be reachable by ssh without a password. Without `ssh`, the bench starts
# an sshd of its own. Everything runs on the cores of this machine, which is what limits a machine with few cores: the
# bench prints the CPU time of each process. `ssh="ssh -c aes128-gcm@openssh.com"` measures another cipher.

suppressPackageStartupMessages({
  library(parallel)
  library(rustcluster)
})
arguments <- commandArgs(TRUE)
option <- function(name, default = NULL) {
  found <- grep(paste0("^", name, "="), arguments, value = TRUE)
  if (length(found)) sub("^[^=]*=", "", found[[1L]]) else default
}
here <- dirname(normalizePath(sub("^--file=", "", grep("^--file=", commandArgs(FALSE), value = TRUE)[[1L]])))
helpers <- option("helpers", file.path(here, "..", "..", "tests", "testthat"))
for (name in c("oracle", "process", "ssh", "dial-back")) source(file.path(helpers, paste0("helper-", name, ".R")))
internal <- function(name) get(name, asNamespace("rustcluster"))

tasks <- as.integer(option("tasks", "5000"))
rounds <- as.integer(option("rounds", "7"))
bytes <- 1e6 * as.numeric(option("megabytes", "100"))
login <- option("login", "127.0.0.2")
elapsed <- function(expr) system.time(expr)[["elapsed"]]

# Returns the CPU time of a process with all its threads, in seconds.
cpu_seconds <- function(pid) {
  files <- Sys.glob(sprintf("/proc/%d/task/*/schedstat", pid))
  sum(vapply(files, function(file) as.numeric(strsplit(readLines(file), " ")[[1L]][[1L]]), 0)) / 1e9
}

parent_of <- function(pid) {
  line <- sub("^.*\\) ", "", readLines(sprintf("/proc/%d/stat", pid)))
  as.integer(strsplit(line, " ")[[1L]][[2L]])
}

# Returns a cluster with one worker, whose agent dials `port(head)`, and the pids that its streams pass.
dialled <- function(port) {
  head <- dial_head(workers = 1L)
  agent <- dial_agent(head, port = port(head))
  cl <- dial_cluster(head)
  clusterCall(cl, function(n) {
    assign("result", rep(as.raw(1:250), length.out = n), globalenv())
    NULL
  }, bytes)
  pids <- c(head = Sys.getpid(), relay = dial_relays(agent)[[1L]], agent = agentPids(cl)[[1L]],
            worker = clusterPids(cl)[[1L]])
  list(cl = cl, pids = pids)
}

# Returns the engine host of a gateway for `head`, and the pids of the gateway and of both sides of ssh.
gateway_of <- function(head, rshcmd) {
  host <- internal("openLink")(login, rshcmd = rshcmd)
  internal("checked")(internal("hub_listen_unix")(head$handle$pointer, host$link$socket))
  internal("startGateway")(
    host, address = "127.0.0.1", rscript = file.path(R.home("bin"), "Rscript"), rlibs = .libPaths()
  )
  gateway <- as.integer(readLines(file.path(host$link$remote, "gateway")))
  masters <- Filter(function(pid) {
    command <- process_command(pid)
    grepl(paste("-M -S", host$link$control), command, fixed = TRUE) && !startsWith(command, "sh ")
  }, all_pids())
  list(host = host, pids = c(gateway = gateway, ssh = masters[[1L]], sshd = parent_of(gateway)))
}

large <- function(cl) {
  gc()
  bytes / 1e6 / elapsed(stopifnot(length(clusterEvalQ(cl, result)[[1L]]) == bytes))
}

# Returns the rate of a plain copy over ssh, from the login node to this session's side. Connecting is not counted.
plain_ssh <- function(rshcmd, file) {
  copy <- function(file) {
    command <- paste(c(shQuote(rshcmd), login, shQuote(paste("cat", file)), "| cat > /dev/null"), collapse = " ")
    elapsed(stopifnot(system(command) == 0L))
  }
  bytes / 1e6 / max(copy(file) - copy("/dev/null"), 0.001)
}

short <- function(name, cl) {
  invisible(clusterLapply(cl, 1:1000, identity))
  many <- min(vapply(1:3, function(i) elapsed(clusterLapply(cl, seq_len(tasks), identity)), 0))
  rtt <- median(vapply(1:200, function(i) elapsed(clusterCall(cl, function() NULL)), 0))
  cat(sprintf("%-10s %9.0f tasks/s %8.0f us a call\n", name, tasks / many, 1e6 * rtt))
}

main <- function() {
  rshcmd <- option("ssh")
  rshcmd <- if (is.null(rshcmd)) "ssh" else scan(text = rshcmd, what = "", quiet = TRUE)
  if (!"-F" %in% rshcmd && identical(login, "127.0.0.2")) {
    rshcmd <- c(local_sshd()$rshcmd, rshcmd[-1L])
  }
  file <- tempfile()
  link <- NULL
  direct <- dialled(function(head) head$port)
  through <- NULL
  on.exit({
    unlink(file)
    stopCluster(direct$cl)
    if (!is.null(through)) stopCluster(through$cl)
    if (!is.null(link)) internal("closeGateway")(link$host, 20)
  })
  writeBin(rep(as.raw(1:250), length.out = bytes), file)
  through <- dialled(function(head) {
    link <<- gateway_of(head, rshcmd)
    link$host$link$port
  })
  pids <- c(through$pids, link$pids)
  rates <- NULL
  cpu <- 0 * pids
  for (round in seq_len(rounds + 1L)) {
    one <- c(direct = large(direct$cl), ssh = plain_ssh(rshcmd, file))
    before <- vapply(pids, cpu_seconds, 0)
    one <- c(one, gateway = large(through$cl))
    # The first round only warms up.
    if (round > 1L) {
      rates <- rbind(rates, one)
      cpu <- cpu + vapply(pids, cpu_seconds, 0) - before
    }
  }
  middle <- apply(rates, 2L, median)
  cat(sprintf("%-10s %7.0f MB/s\n", c("dial-back", "plain ssh", "gateway"), middle), sep = "")
  cpu <- cpu / rounds / (bytes / 1e6)
  cores <- detectCores()
  cat("CPU time in ms/MB: ", paste(sprintf("%s %.2f", names(cpu), 1e3 * cpu), collapse = ", "), "\n", sep = "")
  cat(sprintf("%d cores allow at most %.0f MB/s; the gateway's own process takes %.0f %% of the CPU time\n", cores,
              cores / sum(cpu), 100 * cpu[["gateway"]] / sum(cpu)))
  short("dial-back", direct$cl)
  short("gateway", through$cl)
  # Rates of one round met the same load.
  ratio <- function(to) median(rates[, "gateway"] / to)
  cat(sprintf(
    "gateway / plain ssh %.2f (goal: 0.8), gateway / dial-back %.2f\n", ratio(rates[, "ssh"]), ratio(rates[, "direct"])
  ))
  # On busy cores the work of dial-back and that of ssh follow each other.
  both <- 1 / (1 / rates[, "direct"] + 1 / rates[, "ssh"])
  cat(sprintf("gateway / (dial-back and plain ssh, one after the other) %.2f (1: it costs nothing)\n", ratio(both)))
}
main()
