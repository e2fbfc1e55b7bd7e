# Runs a cluster under random faults for a given time and checks every answer: workers and agents are killed,
# hosts are lost and reconnected, calls are interrupted.
#
#   Rscript soak.R [seconds=1200] [workers=320] [seed=1] [every=2] [ssh="ssh -F file"] [rlibs=folder]
#                  [cut="command"] [mend="command"] [host1 host2 ...]
#
# Without hosts, five groups of workers on this machine, each with an agent of its own, stand for five hosts. On
# average there is a fault every `every` seconds. `cut` and `mend` are commands that break and mend the link to
# a host; %d in them is the number of the host. In a checkout, `Rscript tools/lab.R soak` runs this script with
# five hosts in network namespaces.
#
# No answer may be wrong, none may be missing, and no process may be left.

here <- sub("^--file=", "", grep("^--file=", commandArgs(), value = TRUE))
here <- if (length(here)) dirname(here[1L]) else system.file("bench", package = "rustcluster")
source(file.path(here, "helpers.R"))

hosts <- positional()
duration <- as.numeric(option("seconds", "1200"))
many <- as.integer(option("workers", "320"))
every <- as.numeric(option("every", "2"))
cut <- option("cut")
mend <- option("mend")
set.seed(as.integer(option("seed", "1")))

library(parallel)
library(rustcluster)

## The cluster -------------------------------------------------------------------------------------

# Divides n in the proportions 2 : 64 : 64 : 64 : 125.
shares <- function(n) {
  share <- pmax(1, round(n * c(2, 64, 64, 64, 125) / 319))
  share[5L] <- max(1, n - sum(share[1:4]))
  share
}
spec <- if (length(hosts)) {
  counts <- shares(many)[seq_along(hosts)]
  Map(function(host, ncore) list(host = host, ncore = ncore), hosts, counts)
} else {
  # The entries differ in a setting that has no effect here, and are therefore separate hosts.
  Map(function(i, ncore) list(host = "localhost", ncore = ncore, threads = i), 1:5, shares(many))
}
# R collects garbage after 64 MB of new vectors, which for each of hundreds of workers may exceed the memory of
# this machine.
options <- list(
  spec = unname(spec), reconnect = TRUE, retries = 50, heartbeat_timeout = 10, rscript_args = "--min-vsize=4M"
)
if (length(hosts)) options <- c(options, list(rshcmd = option("ssh", "ssh"), rlibs = option("rlibs")))
cl <- do.call(makeRustCluster, options)
local <- !length(hosts)

## The faults --------------------------------------------------------------------------------------

# Another process causes the faults, at times that are independent of this session.
dir <- tempfile("soak-")
dir.create(dir)
targets <- file.path(dir, "targets")
log <- file.path(dir, "faults")
file.create(log)
aim <- function() {
  # The agents run on this machine, or in network namespaces of it.
  pids <- c(workers = list(clusterPids(cl)), agents = list(agentPids(cl)))
  saveRDS(pids, paste0(targets, ".new"))
  file.rename(paste0(targets, ".new"), targets)
}
injector <- file.path(dir, "injector.R")
writeLines(deparse(bquote({
  cat(Sys.getpid(), file = .(file.path(dir, "injector")))
  set.seed(.(sample.int(1e6, 1)))
  note <- function(...) cat(..., "\n", file = .(log), append = TRUE)
  one <- function(x) x[[sample.int(length(x), 1L)]]
  until <- Sys.time() + .(duration)
  while (Sys.time() < until && file.exists(.(targets))) {
    Sys.sleep(stats::rexp(1, 1 / .(every)))
    # The head has ended.
    if (!file.exists(paste0("/proc/", .(Sys.getpid())))) break
    pids <- tryCatch(readRDS(.(targets)), error = function(e) NULL)
    workers <- pids$workers[!is.na(pids$workers)]
    if (!length(workers)) next
    kind <- sample(c("worker", "workers", "agent", "interrupt", "cut"), 1, prob = c(50, 8, 2, 38, 2))
    switch(kind,
      worker = {
        pid <- one(workers)
        tools::pskill(pid, tools::SIGKILL)
        note("worker", pid)
      },
      workers = {
        some <- sample(workers, min(length(workers), 10L))
        for (pid in some) tools::pskill(pid, one(c(tools::SIGKILL, tools::SIGTERM, 11L)))
        note("workers", some)
      },
      agent = if (length(pids$agents)) {
        pid <- one(pids$agents)
        tools::pskill(pid, tools::SIGKILL)
        note("agent", pid)
      },
      interrupt = {
        tools::pskill(.(Sys.getpid()), tools::SIGINT)
        note("interrupt")
      },
      cut = if (!is.null(.(cut))) {
        i <- sample.int(.(length(hosts)), 1L)
        system(sprintf(.(cut), i))
        Sys.sleep(stats::runif(1, 0.1, 20))
        system(sprintf(.(mend), i))
        note("cut", i)
      }
    )
  }
})), injector)

## The work ----------------------------------------------------------------------------------------

count <- new.env()
for (name in c("calls", "tasks", "interrupted", "wrong", "missing", "refused")) count[[name]] <- 0
warned <- new.env()

# Returns the numbers of the streams of clusterSetRNGStream(seed) if each of n nodes draws k times.
streams <- function(seed, n, k) {
  before <- get0(".Random.seed", globalenv(), inherits = FALSE)
  kind <- RNGkind("L'Ecuyer-CMRG")
  on.exit({
    RNGkind(kind[[1L]])
    if (!is.null(before)) assign(".Random.seed", before, globalenv())
  })
  set.seed(seed)
  stream <- get(".Random.seed", globalenv())
  lapply(seq_len(n), function(i) {
    assign(".Random.seed", stream, globalenv())
    stream <<- nextRNGStream(stream)
    stats::runif(k)
  })
}

# Each call is a function of the nodes and of a unique number, and returns the actual and the expected value.
calls <- list(
  clusterApply = function(cl, id) {
    x <- as.list(id + seq_len(3L * length(cl)))
    list(clusterApply(cl, x, function(x) x + 0.5), lapply(x, `+`, 0.5))
  },
  clusterApplyLB = function(cl, id) {
    x <- as.list(id + seq_len(5L * length(cl)))
    list(clusterApplyLB(cl, x, function(x) {
      Sys.sleep(stats::runif(1, 0, 0.01))
      -x
    }), lapply(x, `-`))
  },
  parLapply = function(cl, id) {
    x <- id + seq_len(20L * length(cl))
    list(parLapply(cl, x, function(x) x * 2), lapply(x, `*`, 2))
  },
  parSapplyLB = function(cl, id) {
    x <- id + seq_len(10L * length(cl))
    list(parSapplyLB(cl, x, function(x) x - 1), x - 1)
  },
  clusterMap = function(cl, id) {
    x <- id + seq_along(cl)
    list(clusterMap(cl, function(a, b) a + b, x, rev(x)), as.list(x + rev(x)))
  },
  large = function(cl, id) {
    x <- seq_along(cl)
    list(clusterApply(cl, x, function(x, id) rep(id + x, 5e4), id)[[length(cl)]], rep(id + length(cl), 5e4))
  },
  state = function(cl, id) {
    value <- id
    clusterExport(cl, "value", environment())
    clusterCall(cl, function() other <<- value + 1)
    got <- clusterApply(cl, seq_len(2L * length(cl)), function(i) c(value, other))
    list(got, rep(list(c(id, id + 1)), 2L * length(cl)))
  },
  random = function(cl, id) {
    # A seed must be an integer.
    seed <- id %% 1e9
    clusterSetRNGStream(cl, seed)
    got <- clusterApply(cl, seq_len(3L * length(cl)), function(i) stats::runif(1))
    n <- length(cl)
    list(matrix(unlist(got), n, 3), do.call(rbind, streams(seed, n, 3L)))
  }
)

try_call <- function(name, id) {
  nodes <- clusterAlive(cl)
  if (!length(nodes)) {
    # All workers are being replaced, or reconnected with their hosts.
    Sys.sleep(0.1)
    return()
  }
  if (name %in% c("large", "random")) nodes <- nodes[seq_len(min(length(nodes), 40L))]
  count$calls <- count$calls + 1
  got <- tryCatch(
    withCallingHandlers(
      allowInterrupts(calls[[name]](nodes, id)),
      warning = function(w) {
        class <- class(w)[[1L]]
        warned[[class]] <- c(0, warned[[class]])[[length(c(0, warned[[class]]))]] + 1
        tryInvokeRestart("muffleWarning")
      },
      message = function(m) tryInvokeRestart("muffleMessage")
    ),
    interrupt = function(e) "interrupted",
    # A host was lost with the workers to which the call is bound, or since the last check.
    rustcluster_host_failed = function(e) "refused",
    rustcluster_worker_lost = function(e) "refused"
  )
  if (identical(got, "interrupted")) {
    count$interrupted <- count$interrupted + 1
  } else if (identical(got, "refused")) {
    count$refused <- count$refused + 1
  } else {
    count$tasks <- count$tasks + if (name == "large") length(nodes) else length(got[[2L]])
    if (length(got[[1L]]) != length(got[[2L]])) count$missing <- count$missing + 1
    if (!identical(got[[1L]], got[[2L]])) {
      count$wrong <- count$wrong + 1
      cat("WRONG:", name, id, "\n")
      utils::str(got)
    }
  }
}

memory <- function() {
  rss <- function(pid, field) {
    lines <- tryCatch(suppressWarnings(readLines(sprintf("/proc/%d/%s", pid, field))), error = function(e) "")
    line <- grep(if (field == "status") "^VmRSS" else "^Pss:", lines, value = TRUE)[1L]
    as.numeric(sub("[^0-9]*([0-9]+).*", "\\1", line)) / 1024
  }
  pss <- function(pids) sum(vapply(pids, rss, 0, "smaps_rollup"), na.rm = TRUE)
  c(head = rss(Sys.getpid(), "status"), agents = pss(agentPids(cl)),
    workers = pss(stats::na.omit(clusterPids(cl))))
}

## The run -----------------------------------------------------------------------------------------

describe_machine()
cat(length(cl), "workers on", length(spec), "hosts,", duration, "seconds, a fault every", every, "seconds\n")
# A first round: the first figure must not be that of a fresh cluster.
for (name in names(calls)) try_call(name, 1)
first <- memory()
aim()
system2("Rscript", c("--vanilla", shQuote(injector)), wait = FALSE, stdout = FALSE, stderr = FALSE)
began <- proc.time()[["elapsed"]]
ended <- function() proc.time()[["elapsed"]] - began > duration
id <- 1000
said <- 0
suspendInterrupts(while (!ended()) {
  # The values of any two calls differ.
  id <- id + 100000
  try_call(sample(names(calls), 1L), id)
  # Update the targets: killed workers have been replaced.
  aim()
  minute <- (proc.time()[["elapsed"]] - began) %/% 60
  if (minute > said) {
    said <- minute
    cat(sprintf("  %3d min: %.0f tasks, %.0f faults, %.0f wrong, head %.0f MB\n", minute, count$tasks,
                length(readLines(log)), count$wrong, memory()[["head"]]))
  }
})
# The injector sleeps, or is about to end; an interrupt may be pending, or a link cut.
tools::pskill(scan(file.path(dir, "injector"), quiet = TRUE), tools::SIGKILL)
tryCatch(Sys.sleep(1), interrupt = function(e) NULL)
if (!is.null(mend)) for (i in seq_along(hosts)) system(sprintf(mend, i))
deadline <- proc.time()[["elapsed"]] + 60
while (anyNA(clusterPids(cl)) && proc.time()[["elapsed"]] < deadline) Sys.sleep(0.1)
cat(sum(is.na(clusterPids(cl))), "workers gone\n")
for (name in names(calls)) try_call(name, id <- id + 100000)
last <- memory()

## The report --------------------------------------------------------------------------------------

pids <- c(clusterPids(cl), agentPids(cl))
stopCluster(cl)
# Returns the descendants of this process that are not zombies.
children <- function() {
  lines <- system2("ps", c("-e", "-o", "pid=,ppid=,stat=,args="), stdout = TRUE)
  own <- grepl(paste0("^ *[0-9]+ +", Sys.getpid(), " "), lines) & !grepl("ps'? -e|injector", lines)
  lines[own]
}
there <- function() {
  alive <- stats::na.omit(pids)[file.exists(paste0("/proc/", stats::na.omit(pids)))]
  c(if (local) as.character(alive), children())
}
deadline <- proc.time()[["elapsed"]] + 5
while (length(there()) && proc.time()[["elapsed"]] < deadline) Sys.sleep(0.1)
left <- there()
if (length(left)) cat("left over:", left, sep = "\n")
faults <- table(sub(" .*", "", readLines(log)))
section("Soak")
cat(sprintf("  %.0f calls, %.0f tasks checked; %.0f calls interrupted, %.0f refused because of a lost host\n",
            count$calls, count$tasks, count$interrupted, count$refused))
cat("  faults:", if (length(faults)) paste(names(faults), faults, collapse = ", ") else "none", "\n")
cat("  warnings:", paste(ls(warned), unlist(mget(ls(warned), warned)), collapse = ", "), "\n")
cat(sprintf("  wrong %.0f, missing %.0f, left over %d\n", count$wrong, count$missing, length(left)))
cat(sprintf("  memory (MB), first and last: head %.0f and %.0f, agents %.0f and %.0f, workers %.0f and %.0f\n",
            first[["head"]], last[["head"]], first[["agents"]], last[["agents"]], first[["workers"]],
            last[["workers"]]))
unlink(dir, recursive = TRUE)
quit(status = as.integer(count$wrong > 0 || count$missing > 0 || length(left) > 0))
