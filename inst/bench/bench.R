# Compares rustcluster with parallel's PSOCK clusters, in one run on one machine.
#
#   Rscript bench.R [--quick] [only=startup,roundtrip,...] [out=folder]
#
# Repetitions of both are interleaved, and their medians compared. Every figure has its goal beside it. Takes
# some minutes, most of them for starts of PSOCK clusters; --quick takes fewer repetitions and leaves out the
# large PSOCK clusters. With a folder, writes performance.csv and performance.png into it, which
# vignette("performance") shows. Exits with status 1 if a section has failed.

arguments <- commandArgs(trailingOnly = TRUE)
quick <- "--quick" %in% arguments
is_only <- startsWith(arguments, "only=")
only <- unlist(strsplit(sub("^only=", "", arguments[is_only]), ","))
sections <- c("startup", "roundtrip", "throughput", "apply", "compute", "frames", "export", "gather", "balance",
              "names", "latency", "memory", "idle", "thousand")
is_out <- startsWith(arguments, "out=")
out <- sub("^out=", "", arguments[is_out])
unknown <- c(setdiff(only, sections), setdiff(arguments[!is_only & !is_out], "--quick"))
if (length(unknown)) {
  stop("unknown: ", toString(unknown), "; the sections are ", toString(sections))
}
# These sections measure functions of parallel, too.
if ("names" %in% only) only <- c(only, "roundtrip", "throughput", "export")
wanted <- function(name) !length(only) || name %in% only

here <- sub("^--file=", "", grep("^--file=", commandArgs(), value = TRUE))
here <- if (length(here)) dirname(here[1L]) else system.file("bench", package = "rustcluster")
source(file.path(here, "helpers.R"))
source(file.path(here, "verbs.R"))

library(parallel)
invisible(loadNamespace("rustcluster"))
times <- if (quick) 1L else 5L

describe_machine()
# The first start reads files from disk: do not measure it.
for (backend in names(backends)) attempt(time_to_up(backend, 2L))

if (wanted("startup")) {
  section("Start-up, until all workers have answered a clusterCall")
  report_head("PSOCK/rc")
  for (n in if (quick) 32L else c(32L, 100L)) attempt({
    what <- sprintf("%d workers", n)
    if (affordable(what, n, each[["psock"]])) {
      time <- interleaved(if (n > 32L) min(times, 3L) else times, function(backend) time_to_up(backend, n))
      ratio <- time$psock / time$ours
      report(what, seconds(time$psock), seconds(time$ours), ratio, if (n == 100L) at_least(ratio, 15))
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

if (wanted("roundtrip")) {
  section("Round trip of clusterCall(cl, identity, 1L), median")
  report_head("rc/PSOCK")
  # Returns the time of each call on these nodes: parallel's function with both backends, and the function of
  # this package (`native`).
  call_times <- function(clusters, nodes, calls) {
    ways <- list(
      psock = function() parallel::clusterCall(clusters$psock[nodes], identity, 1L),
      ours = function() parallel::clusterCall(clusters$ours[nodes], identity, 1L),
      native = function() rustcluster::clusterCall(clusters$ours[nodes], identity, 1L)
    )
    spent <- lapply(ways, function(way) numeric())
    for (i in 1:10) for (name in names(ways)) {
      way <- ways[[name]]
      spent[[name]] <- c(spent[[name]], vapply(seq_len(calls), function(i) {
        start <- Sys.time()
        way()
        as.numeric(Sys.time()) - as.numeric(start)
      }, 0))
    }
    spent
  }
  attempt(with_clusters(2L, function(clusters) {
    spent <- call_times(clusters, 1L, if (quick) 200L else 500L)
    time <- lapply(spent, median)
    ratio <- time$ours / time$psock
    report("parallel::clusterCall(), a node", micros(time$psock), micros(time$ours), ratio, at_most(ratio, 0.5))
    slow <- lapply(spent, quantile, 0.99, names = FALSE)
    report("  its 99th percentile", micros(slow$psock), micros(slow$ours), slow$ours / slow$psock)
    report("clusterCall(), a node", micros(time$psock), micros(time$native), time$native / time$psock)
  }))
  attempt(if (affordable("32 nodes", 32L, sum(each))) with_clusters(32L, function(clusters) {
    time <- lapply(call_times(clusters, 1:32, if (quick) 20L else 50L), median)
    ratio <- time$ours / time$psock
    report("parallel::clusterCall(), 32 nodes", micros(time$psock), micros(time$ours), ratio, at_most(ratio, 0.5))
    report("clusterCall(), 32 nodes", micros(time$psock), micros(time$native), time$native / time$psock)
  }))
}

# Measures both backends with n workers in turns.
compare <- function(n, measure) {
  with_clusters(n, function(clusters) {
    lapply(clusters, measure)
    interleaved(times, function(backend) measure(clusters[[backend]]))
  })
}

# Measures a verb in turns: parallel's function with both backends, as packages call it, and the function of
# this package (`native`). `measure` gets the verb and the cluster.
compare_names <- function(n, verb, measure, times) {
  theirs <- getExportedValue("parallel", verb)
  own <- getExportedValue("rustcluster", verb)
  with_clusters(n, function(clusters) {
    ways <- list(
      psock = function() measure(theirs, clusters$psock),
      ours = function() measure(theirs, clusters$ours),
      native = function() measure(own, clusters$ours)
    )
    for (way in ways) way()
    interleaved(times, function(way) ways[[way]](), names(ways))
  })
}
elapsed <- function(code) system.time(code)[["elapsed"]]

# Returns the median of at least three measurements, and of as many as take 0.3 seconds together. In one call of
# several, all workers collect garbage: a single call is no measure.
several <- function(measure) {
  spent <- numeric()
  while (sum(spent) < 0.3 || length(spent) < 3L) spent <- c(spent, measure())
  median(spent)
}

if (wanted("throughput")) {
  section("Tasks a second of clusterApplyLB(cl, 1:n, identity)")
  report_head("rc/PSOCK")
  goals <- list(spelled = c(`2` = 1.5, `100` = 4), native = c(`2` = 3, `100` = 10))
  tasks_a_second <- function(verb, cl, tasks) {
    time <- system.time(answers <- verb(cl, seq_len(tasks), identity))[["elapsed"]]
    stopifnot(identical(answers, as.list(seq_len(tasks))))
    tasks / time
  }
  # Start one cluster at a time, as users do: the other's workers would take memory and caches. The first run is
  # not timed, because R still compiles and the memory of the workers is new.
  measure <- function(verb, backend, n, tasks) {
    with_clusters(n, function(clusters) {
      cl <- clusters[[backend]]
      tasks_a_second(verb, cl, tasks)
      median(replicate(times, tasks_a_second(verb, cl, tasks)))
    }, backend)
  }
  native <- NULL
  for (n in c(2L, 100L)) attempt(if (affordable(sprintf("%d workers", n), n, max(each))) {
    key <- as.character(n)
    psock <- measure(parallel::clusterApplyLB, "psock", n, 5000L)
    spelled <- measure(parallel::clusterApplyLB, "ours", n, 5000L)
    native[[key]] <- measure(rustcluster::clusterApplyLB, "ours", n, 2000000L)
    ratio <- spelled / psock
    report(sprintf("parallel::clusterApplyLB(), %d workers", n), rate(psock), rate(spelled), ratio,
           at_least(ratio, goals$spelled[[key]]))
    ratio <- native[[key]] / psock
    report(sprintf("clusterApplyLB(), %d workers", n), rate(psock), rate(native[[key]]), ratio,
           at_least(ratio, goals$native[[key]]))
  })
  attempt(if (affordable("32 workers", 32L, sum(each))) {
    tasks <- 30000L
    time <- compare_names(32L, "clusterApplyLB", function(verb, cl) {
      several(function() tasks / tasks_a_second(verb, cl, tasks))
    }, min(times, 3L))
    per <- lapply(time, function(time) tasks / time)
    ratio <- per$ours / per$psock
    report("parallel::clusterApplyLB(), 32 workers", rate(per$psock), rate(per$ours), ratio, at_least(ratio, 50))
    part <- per$ours / per$native
    report("  of the rate of clusterApplyLB()", ours = sprintf("%.2f", part), goal = at_least(part, 0.9))
    report("clusterApplyLB(), 32 workers", rate(per$psock), rate(per$native), per$native / per$psock)
  })
  # Workers that have run some thousands of tasks have collected garbage, and then share little memory.
  attempt(for (n in c(320L, 1000L)) if (affordable(sprintf("%d workers", n), n, 26)) {
    many <- measure(rustcluster::clusterApplyLB, "ours", n, 2000000L)
    report(sprintf("clusterApplyLB(), %d workers", n), ours = rate(many))
    if ("2" %in% names(native)) {
      part <- many / native[["2"]]
      report("  of the rate with 2", ours = sprintf("%.2f", part), goal = at_least(part, 0.75))
    }
  })
}

# The verbs of this package take any cluster: parallel's functions do the work for PSOCK.
if (wanted("apply")) {
  section("parLapply(cl, 1:1e5, function(i) i), 32 workers")
  report_head("PSOCK/rc")
  attempt(if (affordable("32 workers", 32L, sum(each))) {
    trivial <- eval(quote(function(i) i), globalenv())
    time <- compare(32L, function(cl) elapsed(rustcluster::parLapply(cl, 1:1e5, trivial)))
    ratio <- time$psock / time$ours
    report("parLapply()", seconds(time$psock), seconds(time$ours), ratio, at_least(ratio, 3))
    # Lower bound for both: almost all of it is R, which calls the function.
    spent <- compare(32L, function(cl) {
      pids <- workers(cl)
      before <- cpu_of(pids)
      rustcluster::parLapply(cl, 1:1e5, trivial)
      (cpu_of(pids) - before) / parallel::detectCores()
    })
    report("  CPU of its workers, by the cores", seconds(spent$psock), seconds(spent$ours))
  })
}

# Realistic tasks of some tenths of a millisecond: shows the overhead of a cluster beside them.
if (wanted("compute")) {
  section("4,000 bootstrap samples of 500 rows, lm() of each")
  report_head("PSOCK/rc")
  data <- local({
    x <- seq(0, 1, length.out = 500)
    data.frame(x, z = sin(50 * x), y = 2 * x + cos(80 * x))
  })
  this <- environment()
  fit <- global(function(i) {
    coef(lm(y ~ x + z, data[sample(nrow(data), replace = TRUE), ]))
  })
  for (n in c(2L, 40L)) attempt(if (affordable(paste(n, "workers"), n, sum(each))) {
    for (verb in c("parLapply", "parLapplyLB")) {
      run <- getExportedValue("rustcluster", verb)
      time <- compare(n, function(cl) {
        clusterExport(cl, "data", this)
        clusterSetRNGStream(cl, 1)
        elapsed(run(cl, 1:4000, fit))
      })
      report(sprintf("%s(), %d workers", verb, n), seconds(time$psock), seconds(time$ours),
             time$psock / time$ours)
    }
  })
}

# A function that was made in another function is sent with the variables of that.
if (wanted("frames")) {
  section("200 elements (40 tasks) of a function with a large frame")
  report_head("PSOCK/rc")
  with_frame <- function(big) {
    force(big)
    function(i) length(big) + i
  }
  frames <- list(
    `3e5 numbers in a list` = as.list(1:3e5), `1e6 rows of data` = data.frame(a = runif(1e6), b = runif(1e6)),
    `40 MB of numbers` = runif(5e6)
  )
  for (n in c(2L, 32L)) attempt(if (affordable(paste(n, "workers"), n, sum(each))) {
    for (name in names(frames)) {
      f <- with_frame(frames[[name]])
      for (verb in c("parLapply", "parLapplyLB", "parSapplyLB", "clusterApply", "clusterApplyLB", "clusterMap")) {
        run <- getExportedValue("rustcluster", verb)
        measure <- switch(verb,
          clusterApply = , clusterApplyLB = function(cl) elapsed(run(cl, 1:40, f)),
          clusterMap = function(cl) elapsed(run(cl, f, 1:40)),
          function(cl) elapsed(run(cl, 1:200, f))
        )
        time <- compare(n, measure)
        ratio <- time$psock / time$ours
        report(sprintf("%s(), %d, %s", verb, n, name), seconds(time$psock), seconds(time$ours), ratio,
               at_least(ratio, 1))
      }
    }
  })
}

if (wanted("export")) {
  section("clusterExport() of 50 MB to 32 workers")
  report_head("PSOCK/rc")
  attempt(if (affordable("32 workers", 32L, sum(each) + 200)) {
    big <- stats::runif(50e6 / 8)
    this <- environment()
    time <- compare_names(32L, "clusterExport", function(verb, cl) {
      several(function() elapsed(verb(cl, "big", this)))
    }, times)
    # The maximum growth of the head, and of a worker that has read the variable, in MB.
    growth <- global(function(package) {
      export <- getExportedValue(package, "clusterExport")
      with_clusters(32L, function(clusters) {
        this <- environment()
        small <- 1
        export(clusters$ours, "small", this)
        big <- stats::runif(50e6 / 8)
        pids <- workers(clusters$ours)
        before <- mean(uss(pids))
        invisible(gc())
        head <- peak_growth(export(clusters$ours, "big", this))
        parallel::clusterEvalQ(clusters$ours, sum(big))
        c(head = head, worker = mean(uss(pids)) - before)
      }, "ours")
    })
    show <- function(what, package, ours, limit) {
      ratio <- time$psock / ours
      report(what, seconds(time$psock), seconds(ours), ratio, at_least(ratio, limit))
      grown <- in_new_session(growth, package)
      report("  the head's peak above the object", ours = megabytes(grown[["head"]]),
             goal = at_most(grown[["head"]], 16, " MB"))
      report("  private memory a worker grows by", ours = megabytes(grown[["worker"]]),
             goal = at_most(grown[["worker"]], 2, " MB"))
    }
    show("parallel::clusterExport()", "parallel", time$ours, 15)
    show("clusterExport()", "rustcluster", time$native, 5)
  })
}

if (wanted("gather")) {
  section("Results of 10 MB from each of 32 workers")
  report_head("PSOCK/rc")
  attempt(if (affordable("32 workers", 32L, sum(each) + 100)) {
    time <- compare(32L, function(cl) {
      invisible(gc())
      elapsed(r <- rustcluster::clusterCall(cl, numeric, 10e6 / 8))
    })
    ratio <- time$psock / time$ours
    report("clusterCall(cl, numeric, 1.25e6)", seconds(time$psock), seconds(time$ours), ratio,
           at_least(ratio, 2))
  })
}

if (wanted("balance")) {
  section("parLapplyLB() of 400 uneven sleeps (mean 50 ms), 32 workers, against a greedy assignment")
  report_head("")
  attempt(if (affordable("32 workers", 32L, sum(each))) {
    set.seed(1)
    sleeps <- pmin(stats::rexp(400, 20), 0.5)
    free <- numeric(32)
    for (sleep in sleeps) {
      at <- which.min(free)
      free[[at]] <- free[[at]] + sleep
    }
    time <- compare(32L, function(cl) elapsed(rustcluster::parLapplyLB(cl, sleeps, Sys.sleep)))
    ratio <- lapply(time, `/`, max(free))
    report("time by that of the greedy one", sprintf("%.3f", ratio$psock), sprintf("%.3f", ratio$ours),
           goal = at_most(ratio$ours, 1.05))
  })
}

# Code that was written for parallel calls functions of parallel, directly or through packages. "roundtrip",
# "throughput" and "export" have the other cases.
if (wanted("names")) {
  section("parLapply() of 32 elements with a common argument of 16 MB, 32 workers")
  report_head("PSOCK/rc")
  attempt(if (affordable("32 workers", 32L, sum(each) + 32)) {
    common <- stats::runif(16e6 / 8)
    fun <- global(function(i, common) length(common) + i)
    time <- compare_names(32L, "parLapply", function(verb, cl) {
      several(function() elapsed(verb(cl, 1:32, fun, common)))
    }, min(times, 3L))
    ratio <- time$psock / time$ours
    report("parallel::parLapply()", seconds(time$psock), seconds(time$ours), ratio, at_least(ratio, 8))
    report("parLapply()", seconds(time$psock), seconds(time$native), time$psock / time$native)
  })
  section("Packages that call parallel, 8 workers")
  report_head("PSOCK/rc")
  packages <- list(
    boot = function(cl) {
      ratio <- global(function(d, w) sum(d$x * w) / sum(d$u * w))
      boot::boot(boot::city, ratio, R = 2000, stype = "w", parallel = "snow", ncpus = length(cl), cl = cl)
    },
    # An interactive session has a progress bar, for which pbapply calls parLapply() a hundred times.
    pbapply = function(cl) {
      before <- pbapply::pboptions(type = "timer")
      on.exit(pbapply::pboptions(before))
      # Print the bar, and not the result.
      utils::capture.output(invisible(pbapply::pblapply(1:2000, sqrt, cl = cl)))
    }
  )
  calls <- c(boot = "boot::boot(), R = 2000", pbapply = "pbapply::pblapply(), 2000 elements")
  for (package in names(packages)) attempt({
    if (!requireNamespace(package, quietly = TRUE)) {
      cat(sprintf("  %-34s skipped: %s is not installed\n", calls[[package]], package))
    } else if (affordable("8 workers", 8L, sum(each))) {
      run <- packages[[package]]
      time <- compare(8L, function(cl) several(function() elapsed(run(cl))))
      ratio <- time$psock / time$ours
      report(calls[[package]], seconds(time$psock), seconds(time$ours), ratio, at_least(ratio, 1.5))
    }
  })
}

if (wanted("latency")) {
  section("A host 25 ms away: 100 tasks of 10 ms for each of 64 workers")
  report_head("")
  attempt(if (!nzchar(Sys.which("perl"))) cat("  skipped: there is no perl\n") else {
    far <- rustcluster::makeRustCluster(
      c(far = 64), rshcmd = c("perl", file.path(here, "delay.pl"), "0.025"),
      rscript = file.path(R.home("bin"), "Rscript"), rlibs = .libPaths()
    )
    tryCatch({
      task <- eval(quote(function(i) Sys.sleep(0.01)), globalenv())
      rustcluster::clusterApplyLB(far, 1:64, task)
      time <- median(replicate(times, elapsed(rustcluster::clusterApplyLB(far, 1:6400, task))))
      report("clusterApplyLB(), by the work itself", ours = sprintf("%.3f", time), goal = at_most(time, 1.2))
      time <- median(replicate(times, elapsed(rustcluster::clusterApply(far, 1:6400, task))))
      report("clusterApply(), by the work itself", ours = sprintf("%.3f", time), goal = at_most(time, 1.2))
    }, finally = parallel::stopCluster(far))
  })
}

if (wanted("memory")) {
  section("Memory: PSS, pages that are shared counted in parts")
  report_head("PSOCK/rc")
  at_rest <- function(cl, task = identity) {
    parallel::clusterCall(cl, task, 1L)
    Sys.sleep(1)
    mean(pss(workers(cl)))
  }
  # Without any garbage collection the whole heap is still shared.
  collected <- function(cl) at_rest(cl, function(...) gc())
  attempt(if (affordable("32 workers", 32L, sum(each))) {
    # Measure one after the other: together they would share pages, and each would look smaller.
    psock <- with_clusters(32L, function(clusters) {
      c(at_rest(clusters$psock), collected(clusters$psock))
    }, "psock")
    with_clusters(32L, function(clusters) {
      ours <- at_rest(clusters$ours)
      report("a worker, of 32, at rest", megabytes(psock[[1L]]), megabytes(ours),
             psock[[1L]] / ours, at_most(ours, 8, " MB"))
      after <- collected(clusters$ours)
      report("the same after gc()", megabytes(psock[[2L]]), megabytes(after), psock[[2L]] / after)
      report("the agent, with 32", ours = megabytes(sum(pss(agents(clusters$ours)))))
    }, "ours")
  })
  attempt(if (affordable("320 workers", 320L, each[["ours"]])) {
    with_clusters(320L, function(clusters) {
      ours <- at_rest(clusters$ours)
      report("a worker, of 320, at rest", ours = megabytes(ours), goal = at_most(ours, 8, " MB"))
      report("the agent, with 320", ours = megabytes(sum(pss(agents(clusters$ours)))))
    }, "ours")
  })
}

if (wanted("idle")) {
  section("CPU while nothing is asked of 320 workers")
  report_head("")
  show <- function(x) sprintf("%.3f ms/s", x)
  # Returns the CPU time of this session, of agents and of workers, in ms for each second.
  idle_cpu <- function(agents, workers, period = if (quick) 5 else 20) {
    for (i in 1:5) cpu_of(Sys.getpid())  # until R has compiled it: that is work, too
    Sys.sleep(2)
    # Read the head last before and first after: reading the others is not idling.
    before <- c(workers = cpu_of(workers), agent = cpu_of(agents), head = cpu_of(Sys.getpid()))
    start <- proc.time()[["elapsed"]]
    Sys.sleep(period)
    after <- c(head = cpu_of(Sys.getpid()))
    elapsed <- proc.time()[["elapsed"]] - start
    after <- c(after, agent = cpu_of(agents), workers = cpu_of(workers))
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

if (length(out)) leave_results(out)
finish()
