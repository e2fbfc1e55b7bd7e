# A stochastic SIR epidemic, swept over its parameters with parLapply() on a cluster of R workers.
#
#   Rscript sir.R [workers] [plot.png]
#
# 320 workers by default, on one machine, in a stock R. (With parallel::makeCluster() it ends at
# about 125 workers: R has 128 connections, three of them taken, and each worker needs one.)

library(parallel)
library(rustcluster)

## The computation --------------------------------------------------------------------------------

# One epidemic, event by event (Gillespie's algorithm): `beta` is the rate at which an infected
# person infects others, `gamma` the rate at which they recover. Returns what became of it.
epidemic <- function(job, population = 1000L, infected = 5L) {
  susceptible <- population - infected
  start <- susceptible
  peak <- infected
  time <- 0
  while (infected > 0L) {
    infection <- job$beta * infected * susceptible / population
    recovery <- job$gamma * infected
    time <- time + rexp(1L, infection + recovery)
    if (runif(1L) * (infection + recovery) < infection) {
      susceptible <- susceptible - 1L
      infected <- infected + 1L
      if (infected > peak) peak <- infected
    } else {
      infected <- infected - 1L
    }
  }
  c(attack = (start - susceptible) / start, peak = peak / population, days = time)
}

# Every combination of the parameters, `replicates` times.
sweep_jobs <- function(replicates = 50L) {
  grid <- expand.grid(beta = c(0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8),
                      gamma = c(0.1, 0.15, 0.2, 0.25, 0.3))
  grid <- grid[rep(seq_len(nrow(grid)), each = replicates), ]
  split(grid, seq_len(nrow(grid)))
}

# The part of the population a large epidemic reaches in the limit: z = 1 - exp(-R0 z).
final_size <- function(r0) {
  if (r0 <= 1) return(0)
  uniroot(function(z) z - 1 + exp(-r0 * z), c(1e-6, 1))$root
}

## How it went ------------------------------------------------------------------------------------

say <- function(label, ...) cat(sprintf("%-22s", label), ..., "\n", sep = "")

# How many connections this R can open: 125 when it is stock. (They are closed again at once.)
connections_possible <- function(most = 500L) {
  opened <- list()
  on.exit(lapply(opened, close))
  while (length(opened) < most) {
    connection <- tryCatch(rawConnection(raw()), error = function(e) NULL)
    if (is.null(connection)) break
    opened[[length(opened) + 1L]] <- connection
  }
  connections_used()
}

connections_used <- function() nrow(showConnections(all = FALSE))

# Memory that can still be had, in MB; NA where the system does not tell.
memory_available <- function() {
  if (!file.exists("/proc/meminfo")) return(NA_real_)
  line <- grep("^MemAvailable:", readLines("/proc/meminfo"), value = TRUE)
  if (length(line)) as.numeric(gsub("[^0-9]", "", line)) / 1024 else NA_real_
}

# Memory of some processes in MB, pages they share being counted once (PSS).
memory_used <- function(pids) {
  sum(vapply(pids, function(pid) {
    lines <- tryCatch(suppressWarnings(readLines(sprintf("/proc/%d/smaps_rollup", pid))),
                      error = function(e) character())
    kB <- as.numeric(gsub("[^0-9]", "", grep("^Pss:", lines, value = TRUE)))
    if (length(kB)) kB / 1024 else NA_real_
  }, 0))
}

# As many of the workers asked for as there is memory for.
affordable <- function(workers, per_worker = 8, reserve = 512) {
  available <- memory_available()
  if (is.na(available)) return(workers)
  fit <- max(2L, as.integer((available - reserve) / per_worker))
  if (fit < workers) {
    cat(sprintf("Only %d workers instead of %d: one takes about %d MB, and %.0f MB are available.\n",
                fit, workers, per_worker, available))
  }
  min(workers, fit)
}

# Those of the processes that still run. One that has ended but that its parent, whichever has
# inherited it, has not asked about yet (a zombie) does not.
still_there <- function(pids) {
  pids <- pids[tools::pskill(pids, 0L)]
  zombie <- vapply(pids, function(pid) {
    stat <- tryCatch(suppressWarnings(readLines(sprintf("/proc/%d/stat", pid))),
                     error = function(e) "")
    any(grepl("\\) Z ", stat))
  }, NA)
  pids[!zombie]
}

bar <- function(part, width = 40L) {
  strrep(if (l10n_info()[["UTF-8"]]) "\u2588" else "#", round(part * width))
}

save_plot <- function(runs, file) {
  png(file, width = 900, height = 600)
  on.exit(dev.off())
  plot(jitter(runs$r0, amount = 0.04), runs$attack, pch = 16, cex = 0.7, col = "#3070b040", ylim = c(0, 1),
       xlab = expression(R[0] == beta / gamma), ylab = "part of the population infected",
       main = sprintf("%d stochastic SIR epidemics", nrow(runs)))
  r0 <- seq(min(runs$r0), max(runs$r0), length.out = 200)
  lines(r0, vapply(r0, final_size, 0), col = "#d04020", lwd = 2)
  legend("bottomright", c("one epidemic", "final size in theory"), col = c("#3070b0", "#d04020"),
         pch = c(16, NA), lwd = c(NA, 2), bty = "n")
}

main <- function(workers = 320L, file = NULL) {
  say("R", R.version.string)
  possible <- connections_possible()
  say("", if (possible <= 125L) "stock" else "not stock", ": it can open ", possible, " connections")

  workers <- affordable(workers)
  before <- connections_used()

  elapsed <- system.time({
    cl <- makeRustCluster(workers)
    on.exit(stopCluster(cl))
    answers <- clusterCall(cl, Sys.getpid)
  })[["elapsed"]]
  print(cl)
  say("start-up", sprintf("%.2f s until all had answered a clusterCall", elapsed))
  say("workers up", length(unique(unlist(answers))), " of ", workers)
  say("connections used", connections_used() - before)
  pids <- c(agentPids(cl), clusterPids(cl))
  rest <- memory_used(pids)
  if (!is.na(rest)) say("memory at rest", sprintf("%.0f MB, %.1f MB a worker", rest, rest / workers))

  # From here on it is plain parallel.
  jobs <- sweep_jobs()
  clusterSetRNGStream(cl, 2024)        # the same epidemics again with the same number of workers
  elapsed <- system.time(ends <- parLapply(cl, jobs, epidemic))[["elapsed"]]

  runs <- cbind(do.call(rbind, jobs), do.call(rbind, ends))
  runs$r0 <- runs$beta / runs$gamma
  say("epidemics", sprintf("%d in %.1f s", nrow(runs), elapsed))
  busy <- memory_used(pids)
  if (!is.na(busy)) say("memory after work", sprintf("%.0f MB, %.1f MB a worker", busy, busy / workers))

  cat("\nPart of the population infected, mean of the replicates:\n\n")
  print(round(tapply(runs$attack, runs[c("beta", "gamma")], mean), 2))

  cat("\nThe same by R0 = beta / gamma, for the epidemics that took off (theory: the final size):\n\n")
  runs$group <- cut(runs$r0, c(0, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 8), include.lowest = TRUE)
  cat(sprintf("%-11s %5s %6s %8s\n", "R0", "runs", "mean", "theory"))
  for (one in split(runs, runs$group, drop = TRUE)) {
    took_off <- if (all(one$r0 <= 1)) one else one[one$attack > 0.1, ]
    if (!nrow(took_off)) next
    size <- mean(took_off$attack)
    theory <- mean(vapply(took_off$r0, final_size, 0))
    cat(sprintf("%-11s %5d %6.2f %8.2f  %s\n", one$group[1], nrow(took_off), size, theory, bar(size)))
  }
  cat("\n")
  if (capabilities("png")) {
    if (is.null(file)) file <- tempfile("sir-", dirname(tempdir()), ".png")
    save_plot(runs, file)
    say("plot", file)
  }

  on.exit()
  elapsed <- system.time(stopCluster(cl))[["elapsed"]]
  say("stop", sprintf("%.2f s", elapsed))
  end <- Sys.time() + 1                # nothing may be left a second later
  while (length(left <- still_there(pids)) && Sys.time() < end) Sys.sleep(0.02)
  say("processes left", length(left))
  invisible(runs)
}

if (!interactive()) {
  arguments <- commandArgs(trailingOnly = TRUE)
  number <- grepl("^[0-9]+$", arguments)
  main(if (any(number)) as.integer(arguments[number][1L]) else 320L,
       if (any(!number)) arguments[!number][1L])
}
