# Compares rustcluster with parallel's PSOCK clusters, over ssh.
#
#   Rscript hosts.R [ssh="ssh -F file"] [master=address] [rlibs=folder] [workers=319] host1 host2 ...
#
# The hosts must be reachable by ssh without a password, must reach this machine at `master` (for PSOCK only;
# default: its name), and must have rustcluster installed, in `rlibs` if their R does not search that library.
# In a checkout, tools/lab.R runs this script with five hosts in network namespaces.

here <- sub("^--file=", "", grep("^--file=", commandArgs(), value = TRUE))
here <- if (length(here)) dirname(here[1L]) else system.file("bench", package = "rustcluster")
source(file.path(here, "helpers.R"))

hosts <- positional()
if (!length(hosts)) stop("usage: Rscript hosts.R [ssh=...] [master=...] [workers=...] host1 host2 ...")
ssh <- option("ssh", "ssh")
master <- option("master", Sys.info()[["nodename"]])
rlibs <- option("rlibs")
many <- as.integer(option("workers", "319"))

library(parallel)
invisible(loadNamespace("rustcluster"))

spread <- function(n) rep(hosts, length.out = n)
backends <- list(
  psock = function(n) parallel::makePSOCKcluster(spread(n), rshcmd = ssh, master = master),
  ours = function(n) rustcluster::makeRustCluster(spread(n), rshcmd = ssh, rlibs = rlibs)
)
# The processes of other machines are not visible here.
processes <- function(cl) integer()

describe_machine()
cat(length(hosts), "hosts:", hosts, "\n")
for (backend in names(backends)) attempt(time_to_up(backend, length(hosts)))

section("Start-up, until all workers have answered a clusterCall")
report_head("PSOCK/rc")
attempt({
  time <- interleaved(3L, function(backend) time_to_up(backend, 20L))
  ratio <- time$psock / time$ours
  report("20 workers", seconds(time$psock), seconds(time$ours), ratio, at_least(ratio, 5))
})
attempt({
  time <- median(replicate(3L, time_to_up("ours", many)))
  report(sprintf("%d workers", many), ours = seconds(time), goal = at_most(time, 5, " s"))
})

section(sprintf("The head, with %d workers", many))
report_head()
attempt(with_clusters(many, function(clusters) {
  cl <- clusters$ours
  me <- Sys.getpid()
  clusterCall(cl, identity, 1L)
  report("memory: PSS", ours = megabytes(pss(me)))
  clients <- system2("pgrep", c("-P", me), stdout = TRUE)
  report("memory of its ssh processes", ours = megabytes(sum(pss(as.integer(clients)), na.rm = TRUE)))
  cpu <- function(seconds) {
    before <- cpu_seconds(me)
    Sys.sleep(seconds)
    (cpu_seconds(me) - before) / seconds * 1000
  }
  # The R session without a cluster sleeps in the same way.
  report("CPU while nothing is asked", ours = sprintf("%.2f ms/s", cpu(20)))
  wait <- function() {
    end <- Sys.time() + 10
    while (Sys.time() < end) Sys.sleep(0.1)
    1L
  }
  # As in a script: the function is sent without the variables of this call.
  environment(wait) <- globalenv()
  before <- cpu_seconds(me)
  time <- system.time(r <- clusterCall(cl, wait))[["elapsed"]]
  stopifnot(identical(r, rep(list(1L), many)))
  spent <- (cpu_seconds(me) - before) / time * 1000
  report("CPU while it waits for all of them", ours = sprintf("%.2f ms/s", spent))
  tasks_a_second <- function(verb, n) {
    time <- system.time(r <- verb(cl, seq_len(n), identity))[["elapsed"]]
    stopifnot(identical(r, as.list(seq_len(n))))
    n / time
  }
  report("parallel::clusterApplyLB(), empty tasks", ours = rate(tasks_a_second(parallel::clusterApplyLB, 20000)))
  fast <- median(replicate(5L, tasks_a_second(rustcluster::clusterApplyLB, 200000)))
  report("clusterApplyLB(), empty tasks", ours = rate(fast), goal = at_least(fast, 10000, " /s"))
}, "ours"))

finish()
