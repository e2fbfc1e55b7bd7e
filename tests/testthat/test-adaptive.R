# Adaptive launchers: jobs are submitted while tasks wait, and end when their hosts rest. The engine is a stub, whose
# jobs are real processes that become real agents.

watch_processes()

expect_nothing_left <- function(stub) {
  wait_until(function() !length(stub$jobs()) && !length(list.files(file.path(stub$home, "shared"))))
  expect_identical(stub$jobs(), character())
  expect_identical(list.files(file.path(stub$home, "shared")), character())
  expect_gone(stub$pids())
}

# The number of jobs that were submitted.
submitted <- function(stub) length(grep("^sbatch ", stub$log()))

# Whether the hosts have no job.
rests <- function(cl, stub, up = 0L) {
  wait_until(function() sum(clusterHosts(cl)$state == "up") == up && length(stub$jobs()) == up)
}

adaptive_cluster <- function(stub, max, ..., cores = 1L, wait = "all", kind = "slurm", .frame = parent.frame()) {
  local_cluster(batch_launcher(kind, stub, cores = cores, max = max, ...), wait = wait, .frame = .frame)
}

for (kind in c("slurm", "htcondor", "gridEngine", "pbs", "lsf", "template")) {
  test_that(paste("jobs come with the tasks and go without them, over", kind), {
    # The engines differ in their commands, which test-batch-jobs.R tests for all of them.
    if (kind != "slurm") skip_unless_long()
    stub <- local_stub_engine(kind)
    cl <- adaptive_cluster(stub, 2, cores = 2, idle = 0.1, kind = kind)
    expect_length(cl, 4L)
    expect_identical(stub$jobs(), character())
    expect_equal(clusterHosts(cl)$state, rep("waiting", 2))
    expect_true(all(is.na(clusterHosts(cl)$problem)))
    for (round in 1:3) {
      expect_identical(clusterLapply(cl, 1:20, function(i) i^2), lapply(1:20, function(i) i^2))
      expect_true(rests(cl, stub))
      expect_equal(clusterHosts(cl)$state, rep("waiting", 2))
      expect_true(all(is.na(clusterHosts(cl)$problem)))
      expect_equal(clusterStatus(cl)$losses, rep(0L, 4))
    }
    stopCluster(cl)
    expect_nothing_left(stub)
    # With `backlog = 1`, the next job is submitted only if the one before is known to have arrived.
    cl <- adaptive_cluster(stub, 3, idle = 60, backlog = 1, kind = kind)
    expect_length(unique(clusterCall(cl[1], Sys.getpid)), 1L)
    expect_length(unique(clusterCall(cl, Sys.getpid)), 3L)
    stopCluster(cl)
    expect_nothing_left(stub)
  })
}

test_that("many calls with rests in between have the values of lapply(), with exports and random numbers", {
  stub <- local_stub_engine("slurm")
  cl <- adaptive_cluster(stub, 3, idle = 0.1)
  global(offset <- 100)
  clusterExport(cl, "offset", globalenv())
  expect_identical(submitted(stub), 0L)
  for (round in 1:12) {
    n <- c(1L, 7L, 40L)[[round %% 3L + 1L]]
    expect_identical(parLapplyLB(cl, seq_len(n), function(i) i + offset), lapply(seq_len(n), function(i) i + 100))
    Sys.sleep(c(0, 0.05, 0.3, 0.6)[[round %% 4L + 1L]])
  }
  # What is known of jobs does not accumulate.
  state <- cl[[1L]]$handle$adaptive[[1L]]
  expect_true(rests(cl, stub))
  forgotten <- function() {
    clusterLapply(cl, 1, identity)
    nrow(state$jobs) <= 5L
  }
  expect_true(wait_until(forgotten, interval = 0.5))
  expect_length(list.files(file.path(stub$home, "shared")), 1L)
})

test_that("never more than `backlog` jobs wait, and one call grows to `max`", {
  stub <- local_stub_engine("slurm")
  stub$set("delay", 1)
  cl <- adaptive_cluster(stub, 5, idle = 60, backlog = 2)
  most <- 0L
  pids <- list()
  waiting <- function() {
    states <- Sys.glob(file.path(stub$home, "jobs", "*", "state"))
    sum(vapply(states, readLines, "") == "PENDING")
  }
  values <- clusterLapply(cl, 1:400, function(i) {
    Sys.sleep(0.05)
    Sys.getpid()
  }, .onResult = function(i, value) most <<- max(most, waiting()))
  expect_length(unique(unlist(values)), 5L)
  expect_lte(most, 2L)
  expect_identical(submitted(stub), 5L)
})

test_that("as many jobs are submitted as tasks wait", {
  stub <- local_stub_engine("slurm")
  cl <- adaptive_cluster(stub, 8, cores = 2, idle = 60, backlog = 8)
  clusterLapply(cl, 1:3, function(i) Sys.sleep(0.5))
  expect_identical(submitted(stub), 2L)
})

test_that("hosts are given back while R sleeps, and `min` of them are kept", {
  stub <- local_stub_engine("slurm")
  cl <- adaptive_cluster(stub, 3, min = 1, idle = 0.2)
  expect_equal(sum(clusterHosts(cl)$state == "up"), 1L)
  clusterCall(cl, function() NULL)
  expect_length(stub$jobs(), 3L)
  # No function of the package is called meanwhile.
  expect_true(wait_until(function() length(stub$jobs()) == 1L))
  Sys.sleep(0.5)
  expect_length(stub$jobs(), 1L)
  expect_equal(sum(clusterHosts(cl)$state == "up"), 1L)
  expect_identical(clusterLapply(cl, 1:3, identity), as.list(1:3))
  # A job that was cancelled is replaced.
  before <- submitted(stub)
  system2("scancel", stub$jobs())
  expect_true(wait_until(function() !length(stub$jobs())))
  expect_identical(suppressMessages(suppressWarnings(clusterLapply(cl, 1:3, identity))), as.list(1:3))
  expect_gt(submitted(stub), before)
})

test_that("functions that need their nodes wait for jobs, and exports do not", {
  stub <- local_stub_engine("slurm")
  cl <- adaptive_cluster(stub, 3, idle = 0.1, backlog = 1)
  for (round in 1:3) {
    expect_length(unique(clusterCall(cl, Sys.getpid)), 3L)
    expect_identical(parLapply(cl, 1:7, function(i) i + 1), lapply(1:7, function(i) i + 1))
    expect_identical(parallel::clusterApply(cl, 1:6, function(i) i), as.list(1:6))
    expect_true(rests(cl, stub))
  }
  clusterSetRNGStream(cl, 5)
  global(exported <- 3)
  clusterExport(cl, "exported", globalenv())
  expect_identical(stub$jobs(), character())
  # Two tasks need two nodes.
  before <- submitted(stub)
  expect_identical(parallel::clusterApply(cl, 1:2, function(i) i), list(1L, 2L))
  expect_identical(submitted(stub), before + 2L)
  expect_true(rests(cl, stub))
  # One node of three needs one job.
  before <- submitted(stub)
  expect_identical(clusterCall(cl[3], function() exported), list(3))
  expect_identical(submitted(stub), before + 1L)
  psock <- parallel::makeCluster(3)
  on.exit(parallel::stopCluster(psock), add = TRUE, after = FALSE)
  clusterSetRNGStream(psock, 5)
  expect_equal(clusterCall(cl, rnorm, 3), clusterCall(psock, rnorm, 3))
})

test_that("calls are waiting work, also while R does something else", {
  stub <- local_stub_engine("slurm")
  cl <- adaptive_cluster(stub, 4, idle = 0.2, backlog = 4)
  calls <- lapply(1:4, function(i) clusterSubmit(cl, {
    Sys.sleep(1)
    i
  }))
  expect_true(wait_until(function() submitted(stub) == 4L))
  Sys.sleep(0.5)
  expect_identical(lapply(calls, function(call) call$value()), as.list(1:4))
  expect_true(rests(cl, stub))
  expect_identical(clusterLapplyAsync(cl, 1:9, sqrt)$value(), lapply(1:9, sqrt))
})

test_that("futures and foreach run on adaptive clusters", {
  skip_if_not_installed("future")
  stub <- local_stub_engine("slurm")
  cl <- adaptive_cluster(stub, 2, idle = 0.2)
  old <- future::plan(cluster_rust, workers = cl)
  on.exit(future::plan(old), add = TRUE, after = FALSE)
  futures <- lapply(1:4, function(i) future::future(i * 2))
  expect_equal(lapply(futures, future::value), list(2, 4, 6, 8))
  expect_true(rests(cl, stub))
  expect_equal(future::value(future::future(7)), 7)
  skip_if_not_installed("foreach")
  registerDoRustCluster(cl)
  on.exit(foreach::registerDoSEQ(), add = TRUE, after = FALSE)
  `%dopar%` <- foreach::`%dopar%`
  expect_true(rests(cl, stub))
  expect_equal(foreach::foreach(i = 1:6) %dopar% sqrt(i), lapply(1:6, sqrt))
})

test_that("three failures stop the growth, and nothing hangs", {
  stub <- local_stub_engine("slurm")
  cl <- adaptive_cluster(stub, 3, idle = 60)
  stub$set("refuse", "sbatch: error: Batch job submission failed: no partition")
  warned <- list()
  failed <- withCallingHandlers(caught(clusterLapply(cl, 1:5, identity)), warning = function(w) {
    warned <<- c(warned, list(w))
    invokeRestart("muffleWarning")
  })
  expect_s3_class(failed, "rustcluster_host_failed")
  expect_match(conditionMessage(failed), "no partition")
  expect_length(warned, 1L)
  expect_s3_class(warned[[1L]], "rustcluster_growth_stopped")
  expect_identical(submitted(stub), 3L)
  expect_match(clusterHosts(cl)$problem, "no more jobs are submitted", all = TRUE)
  stopCluster(cl)
  expect_nothing_left(stub)
  # Jobs that end before their agents have connected. What is there works on.
  stub$set("refuse", NULL)
  marker <- file.path(stub$home, "fail")
  cl <- adaptive_cluster(stub, 3, min = 1, idle = 0.1, backlog = 3,
                         setup = sprintf("if [ -e %s ]; then echo no such module >&2; exit 3; fi", marker))
  file.create(marker)
  warned <- list()
  values <- withCallingHandlers(clusterLapply(cl, 1:60, function(i) {
    Sys.sleep(0.2)
    i
  }), warning = function(w) {
    warned <<- c(warned, list(w))
    invokeRestart("muffleWarning")
  })
  expect_identical(values, as.list(1:60))
  expect_length(warned, 1L)
  expect_match(conditionMessage(warned[[1L]]), "no such module")
  expect_error(clusterCall(cl, Sys.getpid), class = "rustcluster_host_failed")
  expect_identical(clusterLapply(cl, 1:3, identity), as.list(1:3))
})

# Has the guard fail to write the answers to submissions.
lose_answers <- function(state, submissions) {
  for (i in submissions) dir.create(file.path(state$batch$directory, paste0("submit-", i, ".tmp")))
}

test_that("a submission whose answer is never written is a failure, and blocks nothing", {
  local_function("answerLimit", 0.5)
  stub <- local_stub_engine("slurm")
  cl <- adaptive_cluster(stub, 2, idle = 60, backlog = 1)
  state <- cl[[1L]]$handle$adaptive[[1L]]
  lose_answers(state, 1L)
  stub$set("refuse", "sbatch: error: Batch job submission failed: no partition")
  call <- clusterSubmit(cl, 7)
  expect_true(wait_until(function() submitted(stub) == 1L))
  stub$set("refuse", NULL)
  expect_identical(call$value(), 7)
  expect_identical(submitted(stub), 2L)
  expect_length(unique(clusterCall(cl, Sys.getpid)), 2L)
  expect_equal(state$jobs$submission, 2:3)
  stopCluster(cl)
  expect_nothing_left(stub)
  # All answers are lost.
  stub$set("refuse", "sbatch: error: Batch job submission failed: no partition")
  cl <- adaptive_cluster(stub, 2, idle = 60)
  lose_answers(cl[[1L]]$handle$adaptive[[1L]], 1:10)
  before <- submitted(stub)
  failed <- suppressWarnings(caught(clusterLapply(cl, 1:2, identity)))
  expect_s3_class(failed, "rustcluster_host_failed")
  expect_match(conditionMessage(failed), "its answer is missing")
  expect_lte(submitted(stub) - before, 4L)
  stopCluster(cl)
  expect_nothing_left(stub)
})

test_that("a job that arrives and whose submission has no answer is no failure", {
  local_function("answerLimit", 3)
  stub <- local_stub_engine("slurm")
  cl <- adaptive_cluster(stub, 3, idle = 60, backlog = 1)
  state <- cl[[1L]]$handle$adaptive[[1L]]
  lose_answers(state, 1L)
  expect_length(unique(clusterCall(cl, Sys.getpid)), 3L)
  expect_identical(submitted(stub), 3L)
  forgotten <- function() {
    rustcluster:::tendBatches(cl[[1L]]$handle, now = TRUE)
    rustcluster:::takeAccepted(state)
    identical(as.integer(state$jobs$submission), 2:3)
  }
  expect_true(wait_until(forgotten))
  expect_identical(state$failures, 0L)
  expect_identical(state$early, character())
  expect_length(unique(clusterCall(cl, Sys.getpid)), 3L)
  expect_identical(submitted(stub), 3L)
})

test_that("jobs that arrive before the answers to their submissions are told apart", {
  stub <- local_stub_engine("slurm")
  sbatch <- file.path(stub$home, "bin", "sbatch")
  # The first job arrives long before its command ends, the others after that.
  writeLines(c(readLines(sbatch), "[ \"$id\" != 900000100 ] || sleep 3"), sbatch)
  cl <- adaptive_cluster(stub, 3, idle = 60, backlog = 1)
  expect_length(unique(clusterCall(cl, Sys.getpid)), 3L)
  expect_identical(submitted(stub), 3L)
  state <- cl[[1L]]$handle$adaptive[[1L]]
  known <- function() {
    rustcluster:::takeAccepted(state)
    rustcluster:::takeArrivals(cl[[1L]]$handle)
    !anyNA(state$jobs$name)
  }
  expect_true(wait_until(known))
  expect_identical(state$jobs$name, paste0(900000100:900000102, "/"))
  expect_identical(state$jobs$arrived, rep(TRUE, 3))
})

test_that("a start whose first jobs fail is an error, and leaves nothing", {
  stub <- local_stub_engine("slurm")
  launcher <- batch_launcher("slurm", stub, max = 3, min = 2, setup = "exit 3")
  failed <- caught(makeRustCluster(launcher))
  expect_s3_class(failed, "rustcluster_start_failed")
  expect_match(conditionMessage(failed), "ended before its agent had connected")
  expect_nothing_left(stub)
  stub$set("pending", "Resources")
  launcher <- batch_launcher("slurm", stub, max = 3, min = 2)
  failed <- caught(makeRustCluster(launcher, setup_timeout = 2))
  expect_s3_class(failed, "rustcluster_start_failed")
  expect_match(conditionMessage(failed), "no agent has connected within 2 s")
  expect_nothing_left(stub)
  # Without waiting.
  cl <- local_cluster(launcher, wait = 0)
  expect_length(cl, 6L)
})

test_that("stopCluster() while jobs come or go leaves nothing", {
  stub <- local_stub_engine("slurm")
  for (delay in c(0, 0.3)) {
    stub$set("delay", delay)
    for (pause in c(0, 0.1, 0.3, 0.6)) {
      cl <- adaptive_cluster(stub, 3, idle = 0.05)
      call <- clusterSubmit(cl, 1)
      Sys.sleep(pause)
      stopCluster(cl)
      expect_nothing_left(stub)
    }
  }
  stub$set("delay", 0)
  for (pause in c(0, 0.05, 0.1, 0.15)) {
    cl <- adaptive_cluster(stub, 2, idle = 0.05)
    clusterLapply(cl, 1:2, identity)
    Sys.sleep(pause)
    stopCluster(cl)
    expect_nothing_left(stub)
  }
})

test_that("an interrupt of a wait for nodes leaves a cluster that works", {
  stub <- local_stub_engine("slurm")
  stub$set("pending", "Resources")
  cl <- adaptive_cluster(stub, 2, idle = 0.1)
  expect_lt(interrupted(clusterCall(cl, Sys.getpid), after = 1), 10)
  stub$set("pending", NULL)
  system2("scancel", stub$jobs())
  expect_identical(suppressWarnings(clusterLapply(cl, 1:3, identity)), as.list(1:3))
  expect_true(rests(cl, stub))
})

test_that("adaptive launchers join other hosts, and clusters that grow", {
  stub <- local_stub_engine("slurm")
  launcher <- batch_launcher("slurm", stub, max = 2, cores = 1, idle = 0.2)
  cl <- local_cluster(list(list(host = "localhost", ncore = 1), launcher))
  expect_length(cl, 3L)
  expect_identical(clusterLapply(cl, 1:9, identity), as.list(1:9))
  cl <- addWorkers(cl, launcher)
  expect_length(cl, 5L)
  expect_identical(clusterLapply(cl, 1:9, identity), as.list(1:9))
  expect_length(unique(clusterCall(cl, Sys.getpid)), 5L)
  expect_true(wait_until(function() !length(stub$jobs())))
  cl <- removeWorkers(cl, 4:5)
  expect_length(unique(clusterCall(cl, Sys.getpid)), 3L)
  stopCluster(cl)
  expect_nothing_left(stub)
})

test_that("jobs of one launcher that do not start leave the tasks to another", {
  local_function("coverLimit", 1)
  busy <- local_stub_engine("slurm")
  free <- local_stub_engine("lsf")
  busy$set("pending", "Resources")
  cl <- local_cluster(list(
    batch_launcher("slurm", busy, cores = 1, max = 2), batch_launcher("lsf", free, cores = 1, max = 2)
  ))
  values <- function() clusterLapply(cl, 1:2, sqrt, .timeout = 60)
  expect_identical(values(), lapply(1:2, sqrt))
  expect_identical(submitted(busy), 2L)
  expect_length(free$pids(), 2L)
  # Jobs that have just been ordered suffice.
  busy$set("pending", NULL)
  stopCluster(cl)
  expect_nothing_left(busy)
  expect_nothing_left(free)
  local_function("coverLimit", 60)
  before <- length(free$log())
  cl <- local_cluster(list(
    batch_launcher("slurm", busy, cores = 1, max = 2), batch_launcher("lsf", free, cores = 1, max = 2)
  ))
  expect_identical(values(), lapply(1:2, sqrt))
  expect_identical(sum(startsWith(free$log()[-seq_len(before)], "bsub")), 0L)
})

test_that("adaptive launchers work behind a login node", {
  skip_without_sshd()
  stub <- local_stub_engine("slurm")
  # The commands of the engine are in the PATH of the login node.
  ssh <- local_sshd(config = paste0("SetEnv PATH=", Sys.getenv("PATH")))
  launcher <- slurm(
    max = 2, cores = 1, idle = 0.3, login = "127.0.0.2", dir = file.path(stub$home, "shared"), address = "127.0.0.1",
    rscript = file.path(R.home("bin"), "Rscript"), rlibs = .libPaths()
  )
  cl <- local_cluster(launcher, rshcmd = ssh$rshcmd)
  for (round in 1:2) {
    expect_identical(clusterLapply(cl, 1:9, sqrt), lapply(1:9, sqrt))
    expect_true(rests(cl, stub))
  }
  # The engine refuses jobs there.
  stub$set("refuse", "sbatch: error: no partition")
  failed <- suppressWarnings(caught(clusterLapply(cl, 1:9, sqrt)))
  expect_s3_class(failed, "rustcluster_host_failed")
  expect_match(conditionMessage(failed), "no partition")
  link <- cl[[1L]]$handle$logins[[1L]]$link
  stopCluster(cl)
  expect_nothing_left(stub)
  expect_false(any(file.exists(c(link$local, link$remote))))
})

test_that("arguments of adaptive launchers are checked, and printed", {
  bad <- function(...) expect_error(slurm(cores = 1, ...), class = "rustcluster_bad_argument")
  bad(max = 0)
  bad(max = 1.5)
  bad(max = "many")
  bad(max = NA)
  bad(max = NaN)
  bad(max = 2, nodes = 2)
  bad(max = 2, min = 3)
  bad(max = 2, min = -1)
  bad(max = 2, idle = -1)
  bad(max = 2, idle = NA)
  bad(max = 2, backlog = 0)
  expect_error(slurm(cores = 1, min = 1), "needs `max`", class = "rustcluster_bad_argument")
  expect_error(slurm(cores = 1, idle = 1), "needs `max`", class = "rustcluster_bad_argument")
  expect_error(slurm(cores = 1, backlog = 1), "needs `max`", class = "rustcluster_bad_argument")
  expect_match(format(slurm(max = 4, cores = 2))[[1L]], "0 to 4 nodes with 2 workers each; given back after 60 s")
  expect_match(format(slurm(max = 4, cores = 2, idle = Inf))[[1L]], "given back never; at most 5 waiting jobs")
  expect_false(any(grepl("--array", format(slurm(max = 4, cores = 2)))))
  for (launcher in list(
    htcondor(max = 2, cores = 1), gridEngine(max = 2, cores = 1), pbs(max = 2, cores = 1), lsf(max = 2, cores = 1),
    slurm(max = 2, cores = 1, array = FALSE),
    jobTemplate("exec {{ command }}\n{{ environment }}", "sub", "del", max = 2, cores = 1)
  )) expect_equal(launcher$nodes, 2L)
  expect_error(
    makeRustCluster(slurm(max = 2, min = 1, cores = 2), wait = 3), "at most 2", class = "rustcluster_bad_argument"
  )
})

test_that("nothing is left", {
  expect_no_leftovers()
})
