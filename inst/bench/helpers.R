# Helpers of the benches: arguments, measuring, reporting, and clusters that are always stopped.

## Arguments --------------------------------------------------------------------------------------

# Returns the value of an argument name=value, or the other arguments.
option <- function(name, default = NULL, arguments = commandArgs(trailingOnly = TRUE)) {
  given <- arguments[startsWith(arguments, paste0(name, "="))]
  if (length(given)) sub("^[^=]*=", "", given[[1L]]) else default
}

positional <- function(arguments = commandArgs(trailingOnly = TRUE)) {
  arguments[!grepl("=", arguments, fixed = TRUE)]
}

## Reporting --------------------------------------------------------------------------------------

results <- new.env()
results$goals <- character()           # "met", "not met", "not measured"
results$errors <- 0L
results$figures <- NULL
results$section <- ""

section <- function(title) {
  results$section <- title
  cat("\n", title, "\n", sep = "")
}

# Adds one figure. `goal` is a list(text, met), from at_least() or at_most(), or NULL.
report <- function(what, psock = NULL, ours = NULL, ratio = NULL, goal = NULL) {
  cat(sprintf("  %-34s %14s %14s %9s   %s\n", what,
              if (is.null(psock)) "" else psock, if (is.null(ours)) "" else ours,
              if (is.null(ratio)) "" else sprintf("%.2f", ratio),
              if (is.null(goal)) "" else sprintf("%s: %s", goal$text, goal$state)))
  if (!is.null(goal)) results$goals <- c(results$goals, goal$state)
  text <- function(x) if (is.null(x)) "" else trimws(x)
  results$figures <- rbind(results$figures, data.frame(
    section = results$section, what = trimws(what), PSOCK = text(psock), rustcluster = text(ours),
    ratio = if (is.null(ratio)) NA else round(ratio, 2), goal = text(goal$text), met = text(goal$state)
  ))
}

# Writes a table and a plot of all figures into a folder.
leave_results <- function(folder) {
  figures <- results$figures
  utils::write.csv(figures, file.path(folder, "performance.csv"), row.names = FALSE)
  writeLines(results$machine, file.path(folder, "performance.txt"))
  shown <- figures[!is.na(figures$ratio) & startsWith(figures$goal, "at "), ]
  if (!nrow(shown)) return(invisible())
  # A ratio that has to be small is the time of rustcluster divided by that of PSOCK.
  times <- ifelse(startsWith(shown$goal, "at most"), 1 / shown$ratio, shown$ratio)
  grDevices::png(file.path(folder, "performance.png"), 1200, 100 + 60 * nrow(shown), res = 130)
  on.exit(grDevices::dev.off())
  graphics::par(mar = c(4, 22, 1, 3), las = 1)
  labels <- shown$what
  short <- grepl("^[0-9]+ workers$", labels)
  labels[short] <- sub(", until.*", "", paste0(shown$section, ": ", labels)[short])
  at <- rev(seq_along(times))
  graphics::plot(
    times, at, log = "x", type = "n", xlim = range(0.8, 2 * times), ylim = c(0.5, max(at) + 0.5),
    yaxt = "n", bty = "n", xlab = "times as fast as PSOCK", ylab = ""
  )
  graphics::abline(v = 1, lty = 3)
  graphics::segments(1, at, times, at, lwd = 12, lend = "butt", col = "#4477aa")
  graphics::axis(2, at, labels, tick = FALSE, cex.axis = 0.8)
  graphics::text(times, at, sprintf("%.1f", times), pos = 4, cex = 0.8, xpd = NA)
}

report_head <- function(ratio = "ratio") {
  cat(sprintf("  %-34s %14s %14s %9s   %s\n", "", "PSOCK", "rustcluster", ratio, "goal"))
}

goal <- function(text, met) {
  list(text = text, state = if (is.na(met)) "not measured" else if (met) "met" else "NOT MET")
}
at_least <- function(value, limit, unit = "") {
  goal(sprintf("at least %g%s", limit, unit), value >= limit)
}
at_most <- function(value, limit, unit = "") {
  goal(sprintf("at most %g%s", limit, unit), value <= limit)
}

seconds <- function(x) sprintf("%.2f s", x)
micros <- function(x) sprintf("%.0f us", x * 1e6)
megabytes <- function(x) sprintf("%.2f MB", x)
rate <- function(x) sprintf("%.0f /s", x)

# Prints the last line of a bench, and exits with its status.
finish <- function() {
  cat(sprintf("\n%d goals met, %d not met, %d not measured, %d errors\n", sum(results$goals == "met"),
              sum(results$goals == "NOT MET"), sum(results$goals == "not measured"), results$errors))
  if (results$errors) quit(status = 1L)
}

# Runs a section. An error in it is reported, and the next section runs.
attempt <- function(code) {
  tryCatch(code, error = function(e) {
    results$errors <- results$errors + 1L
    cat("  ERROR: ", conditionMessage(e), "\n", sep = "")
  })
  invisible(gc())
}

## Clusters ---------------------------------------------------------------------------------------

backends <- list(
  psock = function(n) parallel::makePSOCKcluster(n),
  ours = function(n) rustcluster::makeRustCluster(n)
)

# Returns the processes of a cluster's workers, and the other processes that it has started on this machine.
workers <- function(cl) {
  if (inherits(cl, "RustCluster")) rustcluster::clusterPids(cl)
  else unlist(parallel::clusterCall(cl, Sys.getpid))
}
agents <- function(cl) {
  if (inherits(cl, "RustCluster")) rustcluster::agentPids(cl) else integer()
}
processes <- function(cl) c(agents(cl), workers(cl))

# Evaluates fun(clusters) with one cluster of n workers of each backend. The clusters are always stopped, and
# their processes have ended, when this returns: leftovers of one measurement would disturb the next.
with_clusters <- function(n, fun, which = names(backends)) {
  clusters <- list()
  pids <- integer()
  on.exit({
    for (cl in clusters) try(parallel::stopCluster(cl))
    wait_gone(pids)
  })
  for (name in which) {
    cl <- backends[[name]](n)
    clusters[[name]] <- cl
    pids <- c(pids, processes(cl))
  }
  fun(clusters)
}

running <- function(pids) {
  pids <- pids[tools::pskill(pids, 0L)]
  # Zombies do not run; the process that inherited them has to reap them.
  zombie <- function(pid) any(grepl("\\) Z ", read(sprintf("/proc/%d/stat", pid))))
  pids[!vapply(pids, zombie, NA)]
}

wait_gone <- function(pids, timeout = 30) {
  end <- Sys.time() + timeout
  while (length(running(pids)) && Sys.time() < end) Sys.sleep(0.05)
  length(running(pids))
}

# Returns the time until all n workers have answered a clusterCall().
time_to_up <- function(backend, n) {
  cl <- NULL
  pids <- integer()
  on.exit({
    if (!is.null(cl)) try(parallel::stopCluster(cl))
    wait_gone(pids)
  })
  elapsed <- system.time({
    cl <- backends[[backend]](n)
    answers <- parallel::clusterCall(cl, identity, 1L)
  })[["elapsed"]]
  stopifnot(identical(answers, rep(list(1L), n)))
  pids <- processes(cl)
  elapsed
}

# Measures both backends (or other alternatives) in turns, and alternates which is first, so that none profits
# from the other load of the machine. Medians depend less on that load than means.
interleaved <- function(times, measure, ways = names(backends)) {
  values <- sapply(ways, function(way) numeric(), simplify = FALSE)
  for (i in seq_len(times)) {
    for (way in if (i %% 2L) ways else rev(ways)) {
      values[[way]] <- c(values[[way]], measure(way))
    }
  }
  lapply(values, median)
}

## The system -------------------------------------------------------------------------------------

read <- function(file) {
  tryCatch(suppressWarnings(readLines(file)), error = function(e) character())
}

# Returns the sum of the matching lines of smaps_rollup, in MB.
mapped <- function(pids, pattern) {
  vapply(pids, function(pid) {
    lines <- grep(pattern, read(sprintf("/proc/%d/smaps_rollup", pid)), value = TRUE)
    if (length(lines)) sum(as.numeric(gsub("[^0-9]", "", lines))) / 1024 else NA_real_
  }, 0)
}

# Returns the proportional set size in MB: pages shared by k processes count as 1/k in each.
pss <- function(pids) mapped(pids, "^Pss:")

# Returns the unique set size in MB: pages that no other process shares.
uss <- function(pids) mapped(pids, "^Private_(Clean|Dirty):")

# Returns utime + stime of a process with all its threads, in seconds: by the scheduler's own counters, in
# nanoseconds, if the kernel has them, and otherwise in clock ticks of stat, which are 10 ms.
cpu_seconds <- function(pid) {
  files <- Sys.glob(sprintf("/proc/%s/task/*/schedstat", pid))
  spent <- vapply(files, function(file) as.numeric(strsplit(c(read(file), "0"), " ")[[1L]][1L]), 0)
  if (length(spent) && sum(spent) > 0) return(sum(spent) / 1e9)
  stat <- read(sprintf("/proc/%s/stat", pid))
  if (!length(stat)) return(NA_real_)
  # Count fields after the name, which may contain blanks: utime and stime are fields 14 and 15.
  fields <- strsplit(sub("^.*\\) ", "", stat), " ")[[1L]]
  sum(as.numeric(fields[12:13])) / 100
}

# Returns the CPU time of several processes together.
cpu_of <- function(pids) sum(vapply(pids, cpu_seconds, 0))

memory_available <- function() {
  line <- grep("^MemAvailable:", read("/proc/meminfo"), value = TRUE)
  if (length(line)) as.numeric(gsub("[^0-9]", "", line)) / 1024 else NA_real_
}

# Returns whether there is memory for n workers of a kind; prints a line if not.
affordable <- function(what, n, each) {
  needed <- n * each + 512
  there <- memory_available()
  fits <- is.na(there) || there >= needed
  if (!fits) {
    cat(sprintf("  %-34s skipped: %.0f MB of memory needed, %.0f MB available\n",
                what, needed, there))
  }
  fits
}
each <- c(psock = 45, ours = 8)        # MB a worker, for affordable() only

describe_machine <- function() {
  cpu <- grep("^(model name|Model|Hardware)\\s*:", read("/proc/cpuinfo"), value = TRUE)
  cpu <- if (length(cpu)) sub("^[^:]*:\\s*", "", cpu[1L]) else Sys.info()[["machine"]]
  total <- grep("^MemTotal:", read("/proc/meminfo"), value = TRUE)
  total <- if (length(total)) as.numeric(gsub("[^0-9]", "", total)) / 1024^2 else NA
  results$machine <- c(
    sprintf(
      "%s, %d cores, %.1f GB, %s %s, %s", cpu, parallel::detectCores(), total, Sys.info()[["sysname"]],
      Sys.info()[["release"]], Sys.info()[["machine"]]
    ),
    sprintf("%s, rustcluster %s", R.version.string, format(utils::packageVersion("rustcluster")))
  )
  cat(results$machine, format(Sys.time(), "%Y-%m-%d %H:%M"), sep = "\n")
}

# Calls a function of a script in a new R session that has the helpers. In this session, memory that was freed
# but not returned would hide growth.
in_new_session <- function(fun, ...) {
  session <- parallel::makePSOCKcluster(1L)
  on.exit(parallel::stopCluster(session))
  parallel::clusterCall(session, .libPaths, .libPaths())
  parallel::clusterCall(session, source, normalizePath(file.path(here, "helpers.R")))
  parallel::clusterCall(session, fun, ...)[[1L]]
}

# Returns the maximum growth of this process while the code runs, in MB.
peak_growth <- function(code) {
  memory <- function(what) {
    line <- grep(paste0("^", what, ":"), read("/proc/self/status"), value = TRUE)
    as.numeric(gsub("[^0-9]", "", line)) / 1024
  }
  # Reset the peak.
  cat("5", file = "/proc/self/clear_refs")
  before <- memory("VmRSS")
  force(code)
  memory("VmHWM") - before
}
