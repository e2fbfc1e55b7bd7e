# Random cuts in runs of 2,000 elements: every finished run is identical to an undisturbed one, and no element is computed
# again after its result was reported as durable. RUSTCLUSTER_FAULTS: the number of cuts, default 30;
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

test_that("no cut loses, changes or repeats a result that was durable", {
  skip_unless_long()
  skip_unless_proc()
  set.seed(setting("RUSTCLUSTER_FAULT_SEED", 1))
  left <- setting("RUSTCLUSTER_FAULTS", 30)
  ssh <- if (nzchar(sshd_path())) local_sshd()
  kinds <- c("head", "tail", "worker", "agent", if (nzchar(Sys.which("prlimit"))) "disk", if (!is.null(ssh)) "link")
  counts <- stats::setNames(integer(length(kinds)), kinds)
  expected <- NULL
  session <- function(dir, log, out, over) {
    start_child({
      rshcmd <- unlist(over)
      cl <- if (is.null(rshcmd)) makeRustCluster(4) else {
        spec <- list(list(host = "127.0.0.2", ncore = 2), list(host = "127.0.0.3", ncore = 2))
        makeRustCluster(spec, rshcmd = rshcmd, rlibs = .libPaths())
      }
      say("pids", paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
      say("workers", paste(clusterPids(cl), collapse = " "))
      say("agents", paste(agentPids(cl), collapse = " "))
      note <- function(i, value) cat(paste0("r ", i, "\n"), file = log, append = TRUE)
      work <- function(i, log) {
        cat(paste0("c ", i, "\n"), file = log, append = TRUE)
        Sys.sleep(0.003)
        c(i, (i * 7919) %% 104729, runif(100))
      }
      got <- tryCatch(
        suppressWarnings(clusterLapply(
          cl, seq_len(n), work, log = log, .store = run, .seed = 5, .sync = 0.02, .retries = 100, .onResult = note
        )),
        error = function(e) {
          say("error", class(e)[[1L]])
          NULL
        }
      )
      if (!is.null(got)) saveRDS(got, out)
      suppressWarnings(stopCluster(cl))
    }, values = list(run = dir, log = log, out = out, n = elements, over = over), .frame = parent.frame())
  }
  # Returns whether a session is over that had this cut.
  cut_run <- function(dir, log, out) {
    over <- if (!is.null(ssh) && stats::runif(1) < 0.5) as.list(ssh$rshcmd)
    child <- session(dir, log, out, over)
    child_wait_for(child, "agents")
    pids <- child_pids(child, "pids")
    note_pids(pids)
    possible <- setdiff(kinds, if (is.null(over)) "link")
    fewest <- possible[counts[possible] == min(counts[possible])]
    kind <- if (left > 0) fewest[[sample.int(length(fewest), 1L)]] else "none"
    Sys.sleep(stats::runif(1, 0, 1.5))
    is_ours <- function(pid) grepl("rustcluster|exec/R", process_command(pid))
    kill_one <- function(pids) {
      pids <- Filter(is_ours, pids)
      if (length(pids)) tools::pskill(pids[[sample.int(length(pids), 1L)]], tools::SIGKILL)
    }
    if (kind != "none" && is.na(child_status(child))) {
      switch(kind,
        head = , tail = child_signal(child, tools::SIGKILL),
        worker = kill_one(child_pids(child, "workers")),
        agent = kill_one(child_pids(child, "agents")),
        disk = system2("prlimit", c("--pid", child$pid, paste0("--fsize=", 3e5 + sample.int(3e5, 1L)))),
        link = {
          links <- Filter(function(pid) grepl("^ssh ", process_command(pid)), descendants(child$pid))
          if (length(links)) tools::pskill(links[[sample.int(length(links), 1L)]], tools::SIGKILL)
        }
      )
      counts[[kind]] <<- counts[[kind]] + 1L
      left <<- left - 1
    }
    child_wait_end(child, 120)
    error <- child_said(child, "error")
    # A cut of the disk or of all hosts ends the call, by an error of the right class.
    if (!is.null(error)) expect_true(error %in% paste0("rustcluster_", c("run_write_failed", "host_failed")), info = error)
    expect_gone(pids, within = 10)
    if (kind == "tail") {
      lines <- readLines(log)
      tear(dir, as.integer(sub("r ", "", grep("^r", lines, value = TRUE))))
    }
    end_child(child)
  }
  runs <- 0L
  while (left > 0) {
    dir <- tempfile("run-")
    log <- tempfile("log-")
    out <- tempfile("out-", fileext = ".rds")
    file.create(log)
    sessions <- 0L
    while (!file.exists(out)) {
      cut_run(dir, log, out)
      sessions <- sessions + 1L
      if (sessions > 50L) stop("the run does not end")
    }
    got <- readRDS(out)
    if (is.null(expected)) {
      cl <- local_cluster(2)
      expected <- clusterLapply(cl, seq_len(elements), global(function(i) c(i, (i * 7919) %% 104729, runif(100))), .seed = 5)
    }
    expect_true(identical(got, expected))
    lines <- strsplit(readLines(log), " ", fixed = TRUE)
    what <- vapply(lines, `[[`, "", 1L)
    element <- as.integer(vapply(lines, `[[`, "", 2L))
    first <- match(seq_len(elements), ifelse(what == "r", element, NA))
    last <- vapply(split(seq_along(what)[what == "c"], factor(element[what == "c"], seq_len(elements))), max, 0)
    expect_identical(which(last > first), stats::setNames(integer(), character()))
    runs <- runs + 1L
    unlink(c(dir, log, out), recursive = TRUE)
  }
  message("cuts: ", paste(kinds, counts, collapse = ", "), "; runs: ", runs)
})

test_that("nothing is left", {
  expect_no_leftovers()
})
