# Clusters whose hosts are jobs of a batch engine. The engines are stubs, which start real agents.

skip_on_cran()
skip_unless_proc()
watch_processes()

stub_kinds <- c("slurm", "htcondor", "gridEngine", "pbs", "lsf")

stub_launcher <- function(kind, stub, nodes = 2L, ...) {
  do.call(kind, list(nodes = nodes, cores = 2, dir = file.path(stub$home, "shared"), ...))
}

expect_nothing_left <- function(stub) {
  gone <- function() !length(stub$jobs()) && !length(list.files(file.path(stub$home, "shared")))
  wait_until(gone)
  expect_identical(stub$jobs(), character())
  expect_identical(list.files(file.path(stub$home, "shared")), character())
  wait_until(function() !any(alive(stub$pids())))
  expect_false(any(alive(stub$pids())))
}

for (kind in stub_kinds) {
  test_that(paste("jobs of", kind, "are the hosts of a cluster"), {
    stub <- local_stub_engine(kind)
    cl <- local_cluster(stub_launcher(kind, stub))
    expect_length(cl, 4L)
    expect_identical(parLapply(cl, 1:100, function(i) i^2), lapply(1:100, function(i) i^2))
    expect_identical(sort(unique(agentPids(cl))), sort(stub$pids()))
    expect_identical(clusterHosts(cl)$workers, c(2L, 2L))
    # Tasks see neither the key nor the engine's job as their own.
    expect_true(all(unlist(clusterEvalQ(cl, Sys.getenv("RUSTCLUSTER_DIAL") == "" && Sys.getenv("RUSTCLUSTER_JOB") == ""))))
    stopCluster(cl)
    expect_nothing_left(stub)
  })
}

test_that("launchers and hosts are one cluster", {
  stub <- local_stub_engine("slurm")
  launcher <- stub_launcher("slurm", stub, nodes = 1L)
  cl <- local_cluster(list(launcher, list(host = "localhost", ncore = 1), launcher))
  expect_length(cl, 5L)
  expect_identical(nrow(clusterHosts(cl)), 3L)
  expect_length(unique(agentPids(cl)), 3L)
  expect_identical(parSapply(cl, 1:50, function(i) i + 1), 1:50 + 1)
  stopCluster(cl)
  expect_nothing_left(stub)
})

test_that("a job that waits is said, with its state and reason", {
  stub <- local_stub_engine("slurm")
  stub$set("pending", "Resources")
  error <- tryCatch(makeRustCluster(stub_launcher("slurm", stub), setup_timeout = 3), error = identity)
  expect_s3_class(error, "rustcluster_start_failed")
  expect_match(conditionMessage(error), "job 900000100_1 is in state PENDING (Resources)", fixed = TRUE)
  expect_nothing_left(stub)
})

test_that("the log of a job that ended before its agent greeted is in the error", {
  stub <- local_stub_engine("slurm")
  launcher <- stub_launcher("slurm", stub, setup = "echo the disk is full; exit 7")
  seconds <- system.time(error <- tryCatch(makeRustCluster(launcher), error = identity))[["elapsed"]]
  expect_s3_class(error, "rustcluster_start_failed")
  expect_match(conditionMessage(error), "FAILED.*the disk is full")
  # Nobody waits for `setup_timeout`.
  expect_lt(seconds, 60)
  expect_nothing_left(stub)
})

test_that("a refused job is an error with the engine's words, and leaves nothing", {
  stub <- local_stub_engine("slurm")
  stub$set("refuse", "error: invalid partition specified: nowhere")
  error <- tryCatch(makeRustCluster(stub_launcher("slurm", stub)), error = identity)
  expect_s3_class(error, "rustcluster_start_failed")
  expect_match(conditionMessage(error), "invalid partition specified: nowhere")
  expect_nothing_left(stub)
})

test_that("a cluster begins with the jobs that run, and takes on the others", {
  stub <- local_stub_engine("slurm")
  stub$set("delay", 4)
  cl <- local_cluster(stub_launcher("slurm", stub), wait = 0)
  expect_length(cl, 4L)
  expect_identical(parLapply(cl, 1:20, function(i) i^2), lapply(1:20, function(i) i^2))
  wait_until(function() identical(sum(clusterHosts(cl)$up), 4L))
  expect_identical(sum(clusterHosts(cl)$up), 4L)
  stopCluster(cl)
  expect_nothing_left(stub)
})

test_that("a cluster whose session is killed leaves no job and no agent", {
  stub <- local_stub_engine("slurm")
  file <- file.path(stub$home, "launcher.rds")
  saveRDS(stub_launcher("slurm", stub), file)
  head <- start_child({
    cl <- makeRustCluster(readRDS(file))
    say("pids", paste(c(agentPids(cl), clusterPids(cl)), collapse = " "))
    Sys.sleep(600)
  }, values = list(file = file))
  child_wait_for(head, "pids")
  pids <- note_pids(child_pids(head, "pids"))
  expect_alive(pids)
  child_signal(head, tools::SIGKILL)
  expect_nothing_left(stub)
  expect_gone(pids)
})

test_that("no process is left", {
  expect_no_leftovers()
})
