# Tests over real batch engines: the engine that the environment names, with at least three idle nodes of two cores.
# RUSTCLUSTER_ENGINE_DIR: a directory that the nodes share with this session; default: this session's.
# RUSTCLUSTER_ENGINE_NODES: the number of nodes, with two cores each, if the engine has no others. Jobs that wait in the
# queue are tested with that.

engine_user <- function() Sys.info()[["effective_user"]]

engine_lines <- function(command, args = character()) {
  out <- suppressWarnings(system2(command, shQuote(args), stdout = TRUE, stderr = FALSE, timeout = 60))
  structure(as.character(out), status = c(attr(out, "status"), 0L)[[1L]])
}

# Returns, for each engine, the commands it must have, a query that its controller answers, and the lines of the jobs
# of this user that have not ended.
real_engines <- list(
  slurm = list(
    needs = c("sbatch", "squeue", "scancel"), probe = list("sinfo", "-h"), cancel = "scancel",
    jobs = function() engine_lines("squeue", c("-h", "-u", engine_user(), "-t", "PD,R,S,CF", "-o", "%i %j %T"))
  ),
  htcondor = list(
    needs = c("condor_submit", "condor_q", "condor_rm"), probe = list("condor_q", "-totals"), cancel = "condor_rm",
    jobs = function() {
      constraint <- sprintf("Owner == \"%s\" && JobStatus != 3 && JobStatus != 4", engine_user())
      engine_lines("condor_q", c("-constraint", constraint, "-af", "ClusterId", "JobBatchName", "JobStatus"))
    }
  ),
  gridEngine = list(
    needs = c("qsub", "qstat", "qdel", "qconf"), probe = list("qconf", "-sh"), cancel = "qdel",
    jobs = function() engine_lines("qstat", c("-u", engine_user()))
  ),
  pbs = list(
    needs = c("qsub", "qstat", "qdel", "pbsnodes"), probe = list("pbsnodes", "-a"), cancel = "qdel",
    # OpenPBS lists the elements of arrays only by -t, which Slurm's commands do not know. Without the time that a job
    # has used.
    jobs = function() {
      all <- unique(c(engine_lines("qstat"), engine_lines("qstat", "-t")))
      lines <- grep(" [CEFX] ", all, value = TRUE, invert = TRUE)
      sub(" [0-9:]+ +([A-Z]) ", " \\1 ", lines)
    }
  )
)

skip_without_engine <- function(kind) {
  skip_unless_long()
  skip_unless_proc()
  engine <- real_engines[[kind]]
  skip_if_not(all(nzchar(Sys.which(engine$needs))), paste("no commands of", kind))
  # HTCondor accepts no jobs of root.
  skip_if(kind == "htcondor" && engine_user() == "root", "root cannot submit jobs to HTCondor")
  answer <- engine_lines(engine$probe[[1L]], engine$probe[[2L]])
  skip_if_not(attr(answer, "status") == 0L, paste("the controller of", kind, "does not answer"))
}

# Returns functions for a directory of its own, which is empty in the end: `launcher()`, the unended `jobs()`, the
# processes of agents, workers and guards.
local_engine <- function(kind, .frame = parent.frame()) {
  skip_without_engine(kind)
  name <- paste0("t", paste(sample(c(letters, 0:9), 5, replace = TRUE), collapse = ""))
  dir <- file.path(Sys.getenv("RUSTCLUSTER_ENGINE_DIR", tempdir()), name)
  do.call("on.exit", list(bquote(unlink(.(dir), recursive = TRUE)), add = TRUE, after = FALSE), envir = .frame)
  given <- list(name = name, dir = dir, rlibs = .libPaths())
  list(
    kind = kind, given = given, dir = dir,
    launcher = function(nodes = 3L, cores = 2L, ...) {
      do.call(kind, utils::modifyList(c(given, list(nodes = nodes, cores = cores)), list(...)))
    },
    jobs = function() as.character(grep(name, real_engines[[kind]]$jobs(), value = TRUE, fixed = TRUE)),
    # Jobs of Grid Engine have pids of their own in some nodes: a process is known by its environment or command.
    pids = function() {
      pids <- setdiff(all_pids(), Sys.getpid())
      of_test <- vapply(pids, function(pid) any(grepl(paste0("/", name, "/"), fixed = TRUE, c(
        process_environ(pid), process_command(pid)
      ))), NA)
      pids[of_test & alive(pids)]
    },
    # The processes of a job, whose id is as in clusterHosts().
    job_pids = function(job) {
      id <- regmatches(job, regexec("^([0-9]+)(?:[[_.]([0-9]+))?", job, perl = TRUE))[[1L]]
      variable <- paste0("RUSTCLUSTER_JOB=", id[[2L]], if (nzchar(id[[3L]])) paste0("[^/]*/", id[[3L]]), "([^0-9]|$)")
      pids <- all_pids()
      pids[grepl(variable, vapply(pids, process_environ, "")) & alive(pids)]
    },
    # The jobs whose agents run, as the agents know them.
    agents = function() {
      environ <- vapply(all_pids(), process_environ, "")
      mine <- grep(paste0("/", name, "/"), environ, value = TRUE, fixed = TRUE)
      unique(sub("^.*RUSTCLUSTER_JOB=([^/]*/[0-9]*).*$", "\\1", grep("RUSTCLUSTER_JOB=", mine, value = TRUE)))
    },
    cancel = function(job) system2(real_engines[[kind]]$cancel, shQuote(job), stdout = FALSE, stderr = FALSE)
  )
}

process_environ <- function(pid) {
  bytes <- tryCatch(suppressWarnings(readBin(sprintf("/proc/%d/environ", pid), "raw", 65536L)), error = function(e) raw())
  rawToChar(bytes[bytes != as.raw(0L)])
}

expect_engine_clean <- function(engine, within = 30) {
  wait_until(function() !length(engine$jobs()) && !length(engine$pids()) && !length(list.files(engine$dir)), within, 0.2)
  expect_identical(engine$jobs(), character())
  expect_identical(list.files(engine$dir, all.files = TRUE, no.. = TRUE), character())
  pids <- engine$pids()
  expect(!length(pids), paste(c("left:", vapply(pids, process_command, "")), collapse = "\n"))
}

# As local_cluster(), which records pids: those of other nodes are pids of unrelated processes here, and must never be
# looked up or ended.
local_engine_cluster <- function(..., .frame = parent.frame()) {
  cl <- makeRustCluster(...)
  do.call("on.exit", list(bquote(.(stop_quietly)(.(cl))), add = TRUE, after = FALSE), envir = .frame)
  cl
}

# Waits until the hosts of a cluster have these states, while the events of the cluster are shown.
wait_for_states <- function(cl, states, timeout = 60) {
  suppressWarnings(suppressMessages(wait_until(function() {
    rustcluster:::showEvents(cl[[1L]]$handle)
    identical(sort(clusterHosts(cl)$state), sort(states))
  }, timeout, 0.2)))
}

# Not sent with the frame of a test.
slow_square <- function(i, seconds = 0.2) {
  Sys.sleep(seconds)
  i^2
}
environment(slow_square) <- globalenv()

# Returns a session (a child) that is to be killed, with a cluster that lingers, has some state and runs a call.
lingering_session <- function(launcher, records, linger = 60, wait = "all", .frame = parent.frame()) {
  child <- start_child({
    cl <- makeRustCluster(launcher, setup_timeout = 120, linger = linger, wait = wait)
    clusterSetRNGStream(cl, 42)
    shift <- 42
    clusterExport(cl, "shift")
    up <- clusterAlive(cl)
    say("workers", paste(clusterPids(up), collapse = " "))
    say("draws", paste(unlist(clusterCall(up, rnorm, 1)), collapse = " "))
    repeat {
      hosts <- clusterHosts(cl)
      jobs <- hosts$job[hosts$state == "up"]
      if (!anyNA(jobs)) break
      Sys.sleep(0.1)
    }
    say("jobs", paste(jobs, collapse = " "))
    call <- clusterSubmit(up, { Sys.sleep(2); "kept" })
    while (call$status() != "running") Sys.sleep(0.02)
    say("id", clusterId(cl))
    Sys.sleep(300)
  }, env = records$env, values = list(launcher = launcher, linger = linger, wait = wait), .frame = .frame)
  child_wait_for(child, "id", 150)
  child
}

# What all engines must do. `...`: arguments of the launcher.
test_engine <- function(kind, running, ...) {
  args <- list(...)
  launch <- function(engine, ...) do.call(engine$launcher, utils::modifyList(args, list(...)))

  test_that(paste("a cluster runs over", kind, "and leaves nothing"), {
    engine <- local_engine(kind)
    cl <- local_engine_cluster(launch(engine), setup_timeout = 120)
    expect_length(cl, 6L)
    expect_identical(parLapply(cl, 1:100, function(i) i^2), lapply(1:100, function(i) i^2))
    expect_identical(parLapplyLB(cl, 1:100, sqrt), lapply(1:100, sqrt))
    expect_identical(clusterApplyLB(cl, 1:50, sqrt), lapply(1:50, sqrt))
    wait_until(function() all(grepl(running, clusterHosts(cl)$job_state)))
    hosts <- clusterHosts(cl)
    expect_equal(hosts$state, rep("up", 3))
    expect_match(hosts$job, "^[0-9]+")
    expect_length(unique(hosts$job), 3L)
    expect_match(hosts$job_state, running)
    expect_true(length(engine$jobs()) > 0L && length(engine$pids()) > 6L)
    stopCluster(cl)
    expect_engine_clean(engine)
  })

  test_that(paste("the tasks of a cancelled job of", kind, "run elsewhere"), {
    engine <- local_engine(kind)
    cl <- local_engine_cluster(launch(engine), setup_timeout = 120, retries = 0)
    wait_until(function() !anyNA(clusterHosts(cl)$job))
    jobs <- clusterHosts(cl)$job
    cancelled <- FALSE
    values <- suppressWarnings(suppressMessages(clusterLapply(cl, 1:90, slow_square, .onResult = function(i, value) {
      if (!cancelled) engine$cancel(jobs[[1L]])
      cancelled <<- TRUE
    })))
    expect_true(cancelled)
    expect_identical(values, lapply(1:90, function(i) i^2))
    expect_true(wait_for_states(cl, c("lost", "up", "up")))
    # parLapply() sends a chunk to each worker, and needs nodes that are there.
    alive <- clusterAlive(cl)
    expect_length(alive, 4L)
    system(sprintf("(sleep 1; exec %s %s) >/dev/null 2>&1", real_engines[[kind]]$cancel, shQuote(jobs[[2L]])), wait = FALSE)
    values <- suppressWarnings(suppressMessages(parLapply(alive, 1:60, slow_square)))
    expect_identical(values, lapply(1:60, function(i) i^2))
    expect_true(wait_for_states(cl, c("lost", "lost", "up")))
    expect_identical(clusterLapply(cl, 1:6, identity), as.list(1:6))
    stopCluster(cl)
    expect_engine_clean(engine)
  })

  test_that(paste("nothing of", kind, "is left of a killed session"), {
    engine <- local_engine(kind)
    child <- start_child({
      cl <- makeRustCluster(do.call(kind, given), setup_timeout = 120)
      say("up", length(cl))
      clusterApply(cl, 1:6, function(i) Sys.sleep(600))
    }, values = list(kind = kind, given = utils::modifyList(c(engine$given, list(nodes = 3, cores = 2)), args)))
    expect_identical(child_wait_for(child, "up", 120), "6")
    expect_true(length(engine$jobs()) > 0L)
    child_signal(child, tools::SIGKILL)
    expect_engine_clean(engine)
  })

  waiting <- function(child) {
    child_signal(child, tools::SIGKILL)
    child_wait_end(child)
    child
  }

  test_that(paste("jobs of", kind, "wait for the next session"), {
    engine <- local_engine(kind)
    records <- local_records()
    draws <- psock_draws(6, 42, 2)
    # As an array, and otherwise.
    forms <- if (kind == "htcondor" || "array" %in% names(args)) list(list()) else list(list(), list(array = FALSE))
    for (form in forms) {
      child <- waiting(lingering_session(do.call(launch, c(list(engine), form)), records))
      jobs <- engine$jobs()
      cl <- reattachCluster(child_said(child, "id"))
      on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
      expect_identical(clusterPids(cl), child_pids(child, "workers"))
      expect_identical(unlist(clusterCall(cl, function() shift)), rep(42, 6))
      expect_equal(as.numeric(strsplit(child_said(child, "draws"), " ")[[1L]]), draws[[1L]], tolerance = 1e-5)
      expect_identical(unlist(parallel::clusterCall(cl, stats::rnorm, 1)), draws[[2L]])
      expect_identical(vapply(keptResults(cl), function(kept) kept$value, ""), "kept")
      expect_identical(engine$jobs(), jobs)
      expect_true(wait_until(function() all(grepl(running, clusterHosts(cl)$job_state))))
      expect_identical(clusterHosts(cl)$state, rep("up", 3))
      stopCluster(cl)
      expect_engine_clean(engine)
      # Of those that nobody reattaches.
      child <- waiting(lingering_session(do.call(launch, c(list(engine), form)), records))
      killCluster(child_said(child, "id"))
      expect_engine_clean(engine)
    }
    expect_no_records(records)
  })

  test_that(paste("jobs of", kind, "end when no session comes"), {
    engine <- local_engine(kind)
    records <- local_records()
    child <- waiting(lingering_session(launch(engine), records, linger = 10))
    expect_true(length(engine$jobs()) > 0L)
    expect_engine_clean(engine, within = 10 + 30)
    # No session has looked before.
    expect_true(wait_until(function() nrow(listClusters()) == 0L))
    expect_no_records(records)
  })

  test_that(paste("a job of", kind, "that is cancelled while no session is connected ends"), {
    engine <- local_engine(kind)
    records <- local_records()
    child <- waiting(lingering_session(launch(engine), records))
    jobs <- strsplit(child_said(child, "jobs"), " ")[[1L]]
    expect_true(all(lengths(lapply(jobs, engine$job_pids)) > 0L))
    listed <- length(engine$jobs())
    engine$cancel(jobs[[1L]])
    expect_true(wait_until(function() {
      !length(engine$job_pids(jobs[[1L]])) && length(engine$jobs()) == listed - 1L
    }, 30, 0.2))
    # The others go on.
    cl <- suppressWarnings(suppressMessages(reattachCluster(child_said(child, "id"))))
    on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
    expect_true(wait_for_states(cl, c("lost", "up", "up")))
    rest <- clusterAlive(cl)
    expect_identical(clusterPids(rest), child_pids(child, "workers")[3:6])
    expect_identical(unlist(clusterCall(rest, function() shift)), rep(42, 4))
    stopCluster(cl)
    expect_engine_clean(engine)
    # All of them.
    child <- waiting(lingering_session(launch(engine), records))
    jobs <- strsplit(child_said(child, "jobs"), " ")[[1L]]
    for (job in jobs) engine$cancel(job)
    expect_true(wait_until(function() !length(engine$jobs()) && !any(lengths(lapply(jobs, engine$job_pids))), 30, 0.2))
    suppressWarnings(killCluster(child_said(child, "id")))
    expect_engine_clean(engine)
    expect_no_records(records)
  })

  test_that(paste("jobs of", kind, "in the queue join the session that reattaches their cluster"), {
    engine <- local_engine(kind)
    nodes <- as.integer(Sys.getenv("RUSTCLUSTER_ENGINE_NODES", NA))
    skip_if(is.na(nodes), "set RUSTCLUSTER_ENGINE_NODES")
    records <- local_records()
    half <- function(.frame = parent.frame()) {
      waiting(lingering_session(launch(engine, nodes = 2L * nodes), records, wait = 2L * nodes, .frame = .frame))
    }
    states <- function(lost) c(rep("lost", lost), rep("up", nodes), rep("waiting", nodes - lost))
    child <- half()
    jobs <- engine$jobs()
    first <- strsplit(child_said(child, "jobs"), " ")[[1L]]
    expect_length(first, nodes)
    cl <- reattachCluster(child_said(child, "id"))
    on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
    expect_identical(clusterPids(clusterAlive(cl)), child_pids(child, "workers"))
    expect_true(wait_for_states(cl, states(0L)))
    expect_identical(engine$jobs(), jobs)
    # A job that ends gives its node to one of those that wait.
    engine$cancel(first[[1L]])
    expect_true(wait_for_states(cl, states(1L)))
    expect_identical(unlist(clusterCall(clusterAlive(cl), function() shift)), rep(42, 2L * nodes))
    stopCluster(cl)
    expect_engine_clean(engine)
    # While no session is connected.
    child <- half()
    first <- strsplit(child_said(child, "jobs"), " ")[[1L]]
    known <- engine$agents()
    expect_length(known, nodes)
    engine$cancel(first[[1L]])
    expect_true(wait_until(function() length(setdiff(engine$agents(), known)) == 1L, 60, 0.2))
    cl <- suppressWarnings(suppressMessages(reattachCluster(child_said(child, "id"))))
    on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
    expect_true(wait_for_states(cl, states(1L)))
    expect_identical(unlist(clusterCall(clusterAlive(cl), function() shift)), rep(42, 2L * nodes))
    stopCluster(cl)
    expect_engine_clean(engine)
    # Of those that nobody reattaches.
    child <- half()
    suppressWarnings(killCluster(child_said(child, "id")))
    expect_engine_clean(engine)
    expect_no_records(records)
  })
}
