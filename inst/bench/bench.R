# rustcluster beside parallel's PSOCK clusters, measured in one run on one machine.
#
#   Rscript bench.R [--quick] [only=startup,memory,roundtrip,throughput,idle,thousand]
#
# Repetitions of the two are interleaved and their medians compared. Every figure has its goal
# beside it. Takes some minutes, most of them PSOCK's start-ups; --quick takes fewer repetitions
# and leaves the large PSOCK clusters out. Ends with status 1 if anything failed to run.

arguments <- commandArgs(trailingOnly = TRUE)
quick <- "--quick" %in% arguments
is_only <- startsWith(arguments, "only=")
only <- unlist(strsplit(sub("^only=", "", arguments[is_only]), ","))
sections <- c("startup", "memory", "roundtrip", "throughput", "idle", "thousand")
unknown <- c(setdiff(only, sections), setdiff(arguments[!is_only], "--quick"))
if (length(unknown)) {
  stop("unknown: ", toString(unknown), "; the sections are ", toString(sections))
}
wanted <- function(name) !length(only) || name %in% only

here <- sub("^--file=", "", grep("^--file=", commandArgs(), value = TRUE))
here <- if (length(here)) dirname(here[1L]) else system.file("bench", package = "rustcluster")
source(file.path(here, "helpers.R"))
source(file.path(here, "verbs.R"))

library(parallel)
invisible(loadNamespace("rustcluster"))

describe_machine()
# The first start of anything pays for reading it from disk.
for (backend in names(backends)) attempt(time_to_up(backend, 2L))

if (wanted("startup")) {
  section("Start-up, until all workers have answered a clusterCall")
  report_head("PSOCK/rc")
  for (n in if (quick) 32L else c(32L, 100L)) attempt({
    what <- sprintf("%d workers", n)
    if (affordable(what, n, each[["psock"]])) {
      time <- interleaved(if (quick) 1L else 3L, function(backend) time_to_up(backend, n))
      ratio <- time$psock / time$ours
      report(what, seconds(time$psock), seconds(time$ours), ratio, at_least(ratio, 10))
    }
  })
  for (n in c(320L, 1000L)) attempt({
    what <- sprintf("%d workers", n)
    if (affordable(what, n, each[["ours"]])) {
      time <- median(replicate(if (quick) 1L else 3L, time_to_up("ours", n)))
      report(what, ours = seconds(time), goal = if (n == 1000L) at_most(time, 20, " s"))
    }
  })
}

if (wanted("memory")) {
  section("Memory at rest: PSS, pages that are shared counted in parts")
  report_head("PSOCK/rc")
  at_rest <- function(cl) {
    parallel::clusterCall(cl, identity, 1L)
    Sys.sleep(1)
    mean(pss(workers(cl)))
  }
  attempt(if (affordable("32 workers", 32L, sum(each))) {
    # One after the other: together they would share pages, and each look smaller.
    psock <- with_clusters(32L, function(clusters) at_rest(clusters$psock), "psock")
    with_clusters(32L, function(clusters) {
      ours <- at_rest(clusters$ours)
      report("a worker, of 32", megabytes(psock), megabytes(ours), psock / ours,
             at_most(ours, 8, " MB"))
      report("the agent, with 32", ours = megabytes(sum(pss(agents(clusters$ours)))))
    }, "ours")
  })
  attempt(if (affordable("320 workers", 320L, each[["ours"]])) {
    with_clusters(320L, function(clusters) {
      ours <- at_rest(clusters$ours)
      report("a worker, of 320", ours = megabytes(ours), goal = at_most(ours, 8, " MB"))
      report("the agent, with 320", ours = megabytes(sum(pss(agents(clusters$ours)))))
    }, "ours")
  })
}

if (wanted("roundtrip")) {
  section("Round trip of clusterCall(cl[1], identity, 1L), median")
  report_head("rc/PSOCK")
  attempt(with_clusters(2L, function(clusters) {
    calls <- if (quick) 200L else 500L
    times <- lapply(clusters, function(cl) numeric())
    for (i in 1:10) for (name in names(clusters)) {
      cl <- clusters[[name]]
      time <- vapply(seq_len(calls), function(i) {
        start <- Sys.time()
        parallel::clusterCall(cl[1], identity, 1L)
        as.numeric(Sys.time()) - as.numeric(start)
      }, 0)
      times[[name]] <- c(times[[name]], time)
    }
    time <- lapply(times, median)
    ratio <- time$ours / time$psock
    report(sprintf("%d calls", 10L * calls), micros(time$psock), micros(time$ours), ratio,
           at_most(ratio, 0.7))
    slow <- lapply(times, quantile, 0.99, names = FALSE)
    report("their 99th percentile", micros(slow$psock), micros(slow$ours), slow$ours / slow$psock)
  }))
}

if (wanted("throughput")) {
  section("Tasks a second of clusterApplyLB(cl, 1:5000, identity)")
  report_head("rc/PSOCK")
  goals <- c(`2` = 1.3, `32` = 2, `100` = 4)
  tasks_a_second <- function(cl) {
    time <- system.time(answers <- parallel::clusterApplyLB(cl, 1:5000, identity))[["elapsed"]]
    stopifnot(identical(answers, as.list(1:5000)))
    5000 / time
  }
  for (n in if (quick) c(2L, 32L) else c(2L, 32L, 100L)) attempt({
    what <- sprintf("%d workers", n)
    if (affordable(what, n, max(each))) {
      # One cluster at a time, as a user has; the other's workers would take memory and caches. The
      # first run is not timed: R is still compiling then, and the workers' memory is new.
      tasks <- interleaved(if (quick) 1L else 3L, function(backend) {
        with_clusters(n, function(clusters) {
          tasks_a_second(clusters[[backend]])
          median(replicate(3L, tasks_a_second(clusters[[backend]])))
        }, backend)
      })
      ratio <- tasks$ours / tasks$psock
      report(what, rate(tasks$psock), rate(tasks$ours), ratio,
             at_least(ratio, goals[[as.character(n)]]))
    }
  })
}

if (wanted("idle")) {
  section("CPU while nothing is asked of 320 workers")
  report_head("")
  show <- function(x) sprintf("%.3f ms/s", x)
  spent <- function(pids) sum(vapply(pids, cpu_seconds, 0))
  # Of this session, of agents and of workers, in ms a second.
  idle_cpu <- function(agents, workers, period = if (quick) 5 else 20) {
    for (i in 1:5) spent(Sys.getpid())  # until R has compiled it: that is work, too
    Sys.sleep(2)
    # The head last before and first after: reading the others is not idling.
    before <- c(workers = spent(workers), agent = spent(agents), head = spent(Sys.getpid()))
    start <- proc.time()[["elapsed"]]
    Sys.sleep(period)
    after <- c(head = spent(Sys.getpid()))
    elapsed <- proc.time()[["elapsed"]] - start
    after <- c(after, agent = spent(agents), workers = spent(workers))
    (after - before[names(after)]) / elapsed * 1000
  }
  attempt(if (affordable("320 workers", 320L, each[["ours"]])) {
    alone <- idle_cpu(integer(), integer())
    with_clusters(320L, function(clusters) {
      cl <- clusters$ours
      parallel::clusterCall(cl, identity, 1L)
      used <- idle_cpu(agents(cl), workers(cl))
      report("the head", ours = show(used[["head"]]), goal = at_most(used[["head"]], 0.5, " ms/s"))
      report("  an R without a cluster", ours = show(alone[["head"]]))
      report("the agent", ours = show(used[["agent"]]))
      report("all workers together", ours = show(used[["workers"]]))
    }, "ours")
  })
}

if (wanted("thousand")) {
  section("1,000 workers")
  report_head("")
  attempt(if (affordable("1000 workers", 1000L, each[["ours"]])) {
    n <- 1000L
    cl <- NULL
    pids <- integer()
    tryCatch({
      time <- system.time({
        cl <- backends$ours(n)
        answers <- parallel::clusterCall(cl, Sys.getpid)
      })[["elapsed"]]
      pids <- processes(cl)
      up <- length(unique(unlist(answers)))
      report("workers up", ours = up, goal = goal("1000", up == n))
      report("until they had answered", ours = seconds(time), goal = at_most(time, 20, " s"))
      memory <- sum(pss(pids)) / 1024
      report("memory of them and the agent", ours = sprintf("%.2f GB", memory),
             goal = at_most(memory, 8, " GB"))
      time <- system.time(wrong <- wrong_verbs(cl))[["elapsed"]]
      report(sprintf("verbs right, of %d", length(verbs)), ours = length(verbs) - length(wrong),
             goal = goal("all", !length(wrong)))
      for (name in names(wrong)) cat("    ", name, ": ", wrong[[name]], "\n", sep = "")
      report("time for these", ours = seconds(time))
      memory <- sum(pss(pids)) / 1024
      report("memory after them",
        ours = sprintf("%.2f GB", memory), goal = at_most(memory, 8, " GB")
      )
      time <- system.time({
        parallel::stopCluster(cl)
        cl <- NULL
        left <- wait_gone(pids)
      })[["elapsed"]]
      report("stop, until all are gone", ours = seconds(time))
      report("processes left", ours = left, goal = goal("0", left == 0L))
    }, finally = if (!is.null(cl)) try(parallel::stopCluster(cl)))
  })
}

finish()
