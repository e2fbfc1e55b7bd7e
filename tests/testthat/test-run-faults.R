# Random cuts in runs of 2,000 elements: every finished run is identical to an undisturbed one, and no element is computed
# again after its result was reported, or was found to be durable. RUSTCLUSTER_FAULTS: the number of cuts, default 30;
# RUSTCLUSTER_FAULT_SEED: the seed. A cut takes about two seconds.

watch_processes()

setting <- function(name, default) {
  value <- Sys.getenv(name)
  if (nzchar(value)) as.numeric(value) else default
}

elements <- 2000L

# Damages what the last file has behind the results that were reported: cuts it off, or overwrites it.
tear <- function(dir, reported) {
  files <- sort(list.files(file.path(dir, "results"), "[.]rcr$", full.names = TRUE))
  if (!length(files)) return("no file")
  file <- files[[length(files)]]
  bytes <- readBin(file, "raw", file.size(file))
  at <- safe <- min(32L, length(bytes))
  while (at + 64L <= length(bytes) && identical(bytes[at + 1:4], charToRaw("RCR1"))) {
    count <- readBin(bytes[at + 9:12], "integer")
    if (at + 64L + 4L * count > length(bytes)) break
    numbers <- readBin(bytes[at + 64L + seq_len(4L * count)], "integer", count)
    at <- at + 64 + 4 * count + readBin(bytes[at + 17:24], "double")
    if (any(numbers %in% reported)) safe <- at
  }
  behind <- length(bytes) - safe
  if (behind < 1) return("no tail")
  from <- safe + sample.int(behind, 1L) - 1L
  if (stats::runif(1) < 0.5) {
    writeBin(bytes[seq_len(from)], file)
    return(paste("cut", length(bytes) - from, "bytes off"))
  }
  some <- from + seq_len(min(length(bytes) - from, 1L + sample.int(200L, 1L)))
  bytes[some] <- as.raw(sample.int(256L, length(some), TRUE) - 1L)
  writeBin(bytes, file)
  paste("overwrote", length(some), "bytes")
}

# The element of a run, whose computing is logged.
work <- function(i, log) {
  cat(paste0("c ", i, "\n"), file = log, append = TRUE)
  Sys.sleep(0.003)
  c(i, (i * 7919) %% 104729, stats::runif(100))
}
environment(work) <- globalenv()

# How a run is computed: by sessions with local workers, with workers over ssh, or with workers that save results:
# their host does not see the directory of the run, or does; or by runners.
ways <- function(ssh) {
  separate <- system("unshare -rm true 2>/dev/null") == 0
  c("local", if (!is.null(ssh)) "ssh", if (separate) "hosts", "seen", "runner")
}

# The kinds of cuts that a way to compute allows.
cuts_of <- function(way) {
  disk <- if (nzchar(Sys.which("prlimit"))) "disk"
  switch(way,
    local = c("head", "tail", "worker", "agent", disk),
    ssh = c("head", "tail", "worker", "agent", disk, "link"),
    hosts = , seen = c("head", "worker", "agent", disk),
    runner = c("runner", "worker", disk)
  )
}

# Begins or continues a run. Returns the process that reports results (`pid`), all processes (`pids`), the pids of the
# workers and agents, and how to wait until the process has ended (`wait`), which returns the class of its error.
start_session <- function(way, paths, spec, options, .frame) {
  child <- start_child({
    cl <- do.call(makeRustCluster, spec)
    say("pids", paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    note <- function(i, value) cat(paste0("r ", i, "\n"), file = paths$log, append = TRUE)
    got <- tryCatch(
      suppressWarnings(do.call(clusterLapply, c(list(
        cl, seq_len(n), work, log = paths$log, .store = paths$run, .seed = 5, .sync = 0.02, .retries = 100,
        .onResult = note
      ), options))),
      error = function(e) {
        say("error", class(e)[[1L]])
        NULL
      }
    )
    if (!is.null(got)) {
      # The session may be killed while it writes.
      saveRDS(got, paste0(paths$out, ".part"))
      file.rename(paste0(paths$out, ".part"), paths$out)
    }
    suppressWarnings(stopCluster(cl))
  }, values = list(paths = paths, n = elements, work = work, spec = spec, options = options), .frame = .frame)
  child_wait_for(child, "agents")
  list(
    pid = child$pid, pids = child_pids(child, "pids"), workers = child_pids(child, "workers"),
    agents = child_pids(child, "agents"), ended = function() !is.na(child_status(child)),
    wait = function() {
      child_wait_end(child, 120)
      on.exit(end_child(child), add = TRUE, after = FALSE)
      child_said(child, "error")
    }
  )
}

start_runner <- function(paths, .frame) {
  if (!dir.exists(paths$run)) {
    startRun(paths$run, seq_len(elements), work, log = paths$log, spec = 4, .seed = 5, .sync = 0.02, .retries = 100)
  } else {
    openRun(paths$run)$resume()
  }
  run <- openRun(paths$run)
  pid <- run$status()$pid
  others <- setdiff(descendants(pid), pid)
  # A process without children that R runs is a worker, or was not forked yet.
  workers <- Filter(function(p) !length(setdiff(descendants(p), p)) && grepl("exec/R", process_command(p)), others)
  list(
    pid = pid, pids = c(pid, others), workers = workers, agents = integer(), ended = function() !alive(pid),
    wait = function() {
      expect_true(wait_until(function() !alive(pid), 120))
      status <- run$status()
      if (status$state == "done") {
        got <- as.list(run$results())
        if (length(got) == elements) saveRDS(got, paths$out)
      }
      if (status$state == "failed") class(readRDS(file.path(paths$run, "runner", "error.rds")))[[1L]]
    }
  )
}

# Adds to the log what is durable in these files.
note_durable <- function(paths, files) {
  info <- file.path(paths$run, "run.rds")
  if (!length(files) || !file.exists(info)) return(invisible())
  there <- unlist(lapply(files, rustcluster:::file_elements, readRDS(info)$id))
  if (length(there)) cat(paste0("r ", there, "\n"), file = paths$log, append = TRUE, sep = "")
}

test_that("no cut loses, changes or repeats a result that was durable", {
  skip_unless_long()
  skip_unless_proc()
  set.seed(setting("RUSTCLUSTER_FAULT_SEED", 1))
  left <- setting("RUSTCLUSTER_FAULTS", 30)
  Sys.setenv(R_USER_DATA_DIR = tempfile("lists-"))
  on.exit(Sys.unsetenv("R_USER_DATA_DIR"), add = TRUE, after = FALSE)
  ssh <- if (nzchar(sshd_path())) local_sshd()
  ways <- ways(ssh)
  counts <- NULL
  for (way in ways) counts[unique(c(names(counts), cuts_of(way)))] <- 0L
  cl <- local_cluster(2)
  expected <- clusterLapply(
    cl, seq_len(elements), global(function(i) c(i, (i * 7919) %% 104729, stats::runif(100))), .seed = 5
  )
  stopCluster(cl)
  frame <- environment()
  # Computes until the end or a cut.
  cut_run <- function(way, paths) {
    spec <- switch(way,
      ssh = list(
        list(list(host = "127.0.0.2", ncore = 2), list(host = "127.0.0.3", ncore = 2)), rshcmd = ssh$rshcmd,
        rlibs = .libPaths()
      ),
      hosts = list(hides(paths$hidden, 4L)),
      list(4)
    )
    options <- if (way %in% c("hosts", "seen")) list(.save = "hosts", .save_dir = paths$saved)
    process <- if (way == "runner") start_runner(paths, frame) else start_session(way, paths, spec, options, frame)
    note_pids(process$pids)
    possible <- cuts_of(way)
    fewest <- possible[counts[possible] == min(counts[possible])]
    kind <- if (left > 0) fewest[[sample.int(length(fewest), 1L)]] else "none"
    Sys.sleep(stats::runif(1, 0, 1.5))
    is_ours <- function(pid) grepl("rustcluster|exec/R", process_command(pid))
    kill_one <- function(pids) {
      pids <- Filter(is_ours, pids)
      if (length(pids)) tools::pskill(pids[[sample.int(length(pids), 1L)]], tools::SIGKILL)
    }
    limit_files <- function(bytes) system2("prlimit", c("--pid", process$pid, paste0("--fsize=", bytes)), stderr = FALSE)
    if (kind != "none" && !process$ended()) {
      switch(kind,
        head = , runner = , tail = tools::pskill(process$pid, tools::SIGKILL),
        worker = kill_one(process$workers),
        agent = kill_one(process$agents),
        disk = {
          limit_files(sprintf("%.0f:", 3e5 + sample.int(3e5, 1L)))
          # Results wait on the hosts until the disk takes them again.
          if (way %in% c("hosts", "seen")) {
            Sys.sleep(0.5)
            limit_files("unlimited")
          }
        },
        link = {
          links <- Filter(function(pid) startsWith(process_command(pid), "ssh "), descendants(process$pid))
          if (length(links)) tools::pskill(links[[sample.int(length(links), 1L)]], tools::SIGKILL)
        }
      )
      counts[[kind]] <<- counts[[kind]] + 1L
      left <<- left - 1
    }
    error <- process$wait()
    # A cut of the disk or of all hosts ends the call, by an error of the right class.
    if (!is.null(error)) expect_true(error %in% paste0("rustcluster_", c("run_write_failed", "host_failed")), info = error)
    expect_gone(process$pids, within = 10)
    if (kind == "tail") {
      lines <- readLines(paths$log)
      tear(paths$run, as.integer(sub("r ", "", grep("^r", lines, value = TRUE))))
    }
    if (way %in% c("runner", "seen")) note_durable(paths, list.files(file.path(paths$run, "results"), "[.]rcr$", full.names = TRUE))
    if (way == "hosts") note_durable(paths, list.files(paths$saved, "[.]rcr$", full.names = TRUE, recursive = TRUE))
  }
  runs <- 0L
  while (left > 0) {
    way <- ways[[1L + runs %% length(ways)]]
    base <- tempfile("run-")
    paths <- lapply(c(hidden = "hidden", saved = "saved", log = "log", out = "out.rds"), function(name) file.path(base, name))
    paths$run <- file.path(paths$hidden, "run")
    for (dir in paths[c("hidden", "saved")]) dir.create(dir, recursive = TRUE)
    file.create(paths$log)
    sessions <- 0L
    while (!file.exists(paths$out)) {
      cut_run(way, paths)
      sessions <- sessions + 1L
      if (sessions > 50L) stop("the run does not end")
    }
    expect_true(identical(readRDS(paths$out), expected), info = way)
    expect_identical(list.files(paths$saved, recursive = TRUE), character())
    lines <- strsplit(readLines(paths$log), " ", fixed = TRUE)
    what <- vapply(lines, `[[`, "", 1L)
    element <- as.integer(vapply(lines, `[[`, "", 2L))
    first <- match(seq_len(elements), ifelse(what == "r", element, NA))
    last <- vapply(split(seq_along(what)[what == "c"], factor(element[what == "c"], seq_len(elements))), max, 0)
    expect_identical(which(last > first), stats::setNames(integer(), character()), info = way)
    runs <- runs + 1L
    unlink(base, recursive = TRUE)
  }
  message("cuts: ", paste(names(counts), counts, collapse = ", "), "; runs: ", runs)
})

test_that("nothing is left", {
  expect_no_leftovers()
})
