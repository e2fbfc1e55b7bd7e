# Random faults under a running call over a real Slurm: a controller that runs, and at least six nodes of two cores.
# RUSTCLUSTER_FAULTS: the number of faults, default 200; RUSTCLUSTER_FAULT_SEED: the seed; RUSTCLUSTER_FAULT_LOG: a file
# for the log of the faults. 200 faults take about ten minutes.

watch_processes()

setting <- function(name, default) {
  value <- Sys.getenv(name)
  if (nzchar(value)) as.numeric(value) else default
}

fault_log <- function() Sys.getenv("RUSTCLUSTER_FAULT_LOG", tempfile("faults-", fileext = ".log"))

# The task of the call.
checked_task <- function(i) {
  Sys.sleep(0.03)
  c(i, (i * 7919) %% 104729)
}
environment(checked_task) <- globalenv()

test_that("no result is wrong or missing under random faults of Slurm, and nothing is left", {
  engine <- local_engine("slurm")
  name <- basename(engine$dir)
  nodes <- unique(engine_lines("sinfo", c("-h", "-N", "-o", "%N")))
  skip_if_not(length(nodes) >= 6L, "needs six nodes")
  on.exit(
    for (node in nodes) engine_lines("scontrol", c("update", paste0("nodename=", node), "state=resume")), add = TRUE, after = FALSE
  )
  seed <- setting("RUSTCLUSTER_FAULT_SEED", 1)
  log <- fault_log()
  # Another session makes the faults, whatever this one does.
  faults <- start_child({
    set.seed(seed)
    run <- function(command, ...) suppressWarnings(system2(command, c(...), stdout = TRUE, stderr = FALSE, timeout = 60))
    pick <- function(x) if (length(x)) x[[sample.int(length(x), 1L)]]
    command_of <- function(pid) {
      bytes <- tryCatch(
        suppressWarnings(readBin(file.path("/proc", pid, "cmdline"), "raw", 4096L)), error = function(e) raw()
      )
      rawToChar(bytes[bytes != 0L])
    }
    environ_of <- function(pid) {
      bytes <- tryCatch(
        suppressWarnings(readBin(file.path("/proc", pid, "environ"), "raw", 65536L)), error = function(e) raw()
      )
      rawToChar(bytes[bytes != 0L])
    }
    parent_of <- function(pid) {
      line <- tryCatch(suppressWarnings(readLines(file.path("/proc", pid, "stat"), n = 1L)), error = function(e) "")
      strsplit(sub("^.*\\) ", "", line), " ", fixed = TRUE)[[1L]][2L]
    }
    pids <- function() grep("^[0-9]+$", list.files("/proc"), value = TRUE)
    # The steps of Slurm, and the agents: the direct processes of the steps.
    jobs <- function(format = "%i") {
      lines <- run("squeue", "-h", "-o", shQuote(paste0("%j|", format)))
      sub("^[^|]*\\|", "", grep(paste0("^", name, "-"), lines, value = TRUE))
    }
    steps <- function() {
      all <- pids()
      commands <- vapply(all, command_of, "")
      ids <- jobs("%A")
      mine <- vapply(commands, function(text) {
        startsWith(text, "slurmstepd: ") &&
          any(vapply(ids, function(id) grepl(paste0("[", id, "."), text, fixed = TRUE), NA))
      }, NA)
      all[mine]
    }
    agents <- function() {
      all <- pids()
      parents <- vapply(all, parent_of, "")
      of_step <- all[vapply(parents, function(pid) !is.na(pid) && startsWith(command_of(pid), "slurmstepd: "), NA)]
      of_step[vapply(of_step, function(pid) grepl(paste0("/", name, "/"), environ_of(pid), fixed = TRUE), NA)]
    }
    kill <- function(pid) if (!is.null(pid)) tools::pskill(as.integer(pid), tools::SIGKILL)
    drained <- character()
    resume <- function() {
      for (node in drained) run("scontrol", "update", paste0("nodename=", node), "state=resume")
      drained <<- character()
    }
    make <- function(kind) {
      switch(kind,
        scancel = if (!is.null(target <- pick(jobs()))) run("scancel", target),
        step = kill(target <- pick(steps())),
        agent = kill(target <- pick(agents())),
        drain = {
          target <- pick(nodes)
          run("scontrol", "update", paste0("nodename=", target), "state=drain", "reason=test")
          drained <<- c(drained, target)
        },
        # Slurm ends jobs at their limit every 30 s.
        limit = if (!is.null(target <- pick(jobs()))) run("scontrol", "update", paste0("jobid=", target), "TimeLimit=1")
      )
      target
    }
    done <- 0L
    while (done < count && !file.exists(file.path(dir, "stop"))) {
      Sys.sleep(stats::runif(1, 1.2, 4))
      if (length(drained) && stats::runif(1) < 0.7) resume()
      kind <- sample(c("scancel", "step", "agent", "drain", "limit"), 1L, prob = c(3, 2, 3, 1, 1))
      target <- make(kind)
      if (is.null(target)) next
      done <- done + 1L
      line <- paste(done, format(Sys.time(), "%H:%M:%S"), kind, target)
      cat(line, "\n", sep = "", file = log, append = TRUE)
      say(line)
    }
    resume()
    say("over")
  }, values = list(
    seed = seed, name = name, nodes = nodes, count = setting("RUSTCLUSTER_FAULTS", 200), log = log
  ))
  launcher <- slurm(
    max = 6, cores = 2, idle = 20, backlog = 3, time = 2, name = name, dir = engine$dir, rlibs = .libPaths()
  )
  cl <- local_engine_cluster(launcher, heartbeat_timeout = 10)
  global(checked_export <- 5)
  clusterExport(cl, "checked_export", globalenv())
  events <- character()
  noted <- function(expr) {
    note <- function(condition, restart) {
      events <<- c(events, class(condition)[[1L]])
      invokeRestart(restart)
    }
    withCallingHandlers(
      expr, warning = function(w) note(w, "muffleWarning"), message = function(m) note(m, "muffleMessage")
    )
  }
  expected <- lapply(1:20000, function(i) c(i, (i * 7919) %% 104729))
  calls <- 0L
  over <- function() !is.null(child_said(faults, "over")) || !is.na(child_status(faults))
  repeat {
    values <- noted(clusterLapply(cl, 1:20000, checked_task))
    calls <- calls + 1L
    wrong <- sum(!mapply(identical, values, expected))
    expect_identical(wrong, 0L)
    cat("call", calls, "wrong", wrong, format(Sys.time(), "%H:%M:%S"), "\n", file = log, append = TRUE)
    if (over()) break
  }
  # Workers of jobs that came late have the exports, too.
  expect_identical(noted(clusterLapply(cl, 1:20, function(i) checked_export)), rep(list(5), 20))
  lines <- grep("^[0-9]+ ", child_lines(faults), value = TRUE)
  kinds <- table(sub("^[0-9]+ [^ ]+ ([a-z]+) .*$", "\\1", lines))
  expect_identical(sum(kinds), as.integer(setting("RUSTCLUSTER_FAULTS", 200)))
  cat(
    "faults:", paste(names(kinds), kinds), "calls:", calls, "events:", paste(names(table(events)), table(events)), "\n",
    file = log, append = TRUE
  )
  expect_false("rustcluster_growth_stopped" %in% events)
  expect_length(setdiff(events, c(
    "rustcluster_host_failed", "rustcluster_host_draining", "rustcluster_worker_lost", "rustcluster_host_back",
    "rustcluster_left_behind"
  )), 0L)
  noted(stopCluster(cl))
  expect_engine_clean(engine, within = 90)
})

test_that("a call fails clearly with its gateway, and nothing is left", {
  engine <- local_engine("slurm")
  skip_without_sshd()
  variables <- Sys.getenv(c("PATH", "SLURM_CONF"))
  variables <- variables[nzchar(variables)]
  ssh <- local_sshd(config = paste("SetEnv", paste0(names(variables), "=", variables, collapse = " ")))
  set.seed(setting("RUSTCLUSTER_FAULT_SEED", 1))
  log <- fault_log()
  for (run in 1:10) {
    launcher <- slurm(
      max = 3, min = run %% 2L, cores = 2, idle = 20, name = basename(engine$dir), dir = engine$dir, rlibs = .libPaths(),
      login = "127.0.0.2", address = "127.0.0.1", rscript = file.path(R.home("bin"), "Rscript")
    )
    cl <- local_engine_cluster(launcher, rshcmd = ssh$rshcmd)
    gateway <- as.integer(readLines(file.path(cl[[1L]]$handle$logins[[1L]]$link$remote, "gateway")))
    after <- stats::runif(1, 0, 6)
    system(sprintf("(sleep %.2f; kill -KILL %d) >/dev/null 2>&1", after, gateway), wait = FALSE)
    failed <- suppressWarnings(suppressMessages(caught(clusterLapply(cl, 1:20000, checked_task))))
    expect_s3_class(failed, "rustcluster_error")
    cat("gateway", run, sprintf("%.2f", after), class(failed)[[1L]], "\n", file = log, append = TRUE)
    suppressWarnings(suppressMessages(stopCluster(cl)))
    expect_engine_clean(engine, within = 60)
  }
})

test_that("nothing is left", {
  expect_no_leftovers()
})
