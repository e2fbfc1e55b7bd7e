# Whatever ends first, nothing is left behind, and the head says what happened.

watch_processes()

busy <- function(cl) {
  for (node in cl) parallel:::sendCall(node, function() repeat NULL, list())
  Sys.sleep(0.3)
}

cluster_processes <- function(cl) c(agentPids(cl), clusterPids(cl))

test_that("stopCluster leaves nothing, idle, busy or called twice", {
  for (start in c("fork", "spawn")) {
    cl <- makeRustCluster(3, start = start)
    pids <- cluster_processes(cl)
    stopCluster(cl)
    expect_gone(pids)
    expect_no_error(stopCluster(cl))
    expect_rust_error(caught(clusterCall(cl, identity, 1)), "stopped")

    cl <- makeRustCluster(3, start = start)
    pids <- cluster_processes(cl)
    busy(cl)
    stopCluster(cl)
    expect_gone(pids)
  }
})

test_that("a cluster that is collected ends, whatever was done on it", {
  uses <- list(
    identity,
    function(cl) clusterCall(cl, identity, 1),
    function(cl) clusterApply(cl, 1:5, identity),
    function(cl) clusterApplyLB(cl, 1:5, function(i) i),
    function(cl) parallel::clusterApplyLB(cl, 1:5, function(i) i),
    function(cl) clusterExport(cl, "pids", list2env(list(pids = 1))),
    function(cl) clusterLapply(cl, 1:5, identity, .seed = 1, .onResult = function(i, value) NULL),
    function(cl) try(clusterApply(cl, 1:5, stop), silent = TRUE)
  )
  for (use in uses) {
    cl <- makeRustCluster(2)
    pids <- cluster_processes(cl)
    use(cl)
    rm(cl)
    gc()
    expect_gone(pids)
  }
})

for (how in c("q()", "stop('as it happens')", "SIGTERM", "SIGKILL")) {
  test_that(paste("nothing outlives a head with busy workers that ends by", how), {
    skip_unless_proc()
    child <- start_child({
      cl <- makeRustCluster(3)
      for (node in cl) parallel:::sendCall(node, function() repeat NULL, list())
      Sys.sleep(0.3)
      say(paste(c(agentPids(cl), clusterPids(cl)), collapse = " "))
      if (how == "q()") q("no")
      if (how == "stop('as it happens')") stop("as it happens")
      Sys.sleep(60)
    }, values = list(how = how))
    expect_true(wait_until(function() length(child_lines(child)) > 0, 20))
    pids <- as.integer(strsplit(trimws(child_lines(child)[[1L]]), " +")[[1L]])
    expect_length(pids, 4L)
    if (startsWith(how, "SIG")) {
      tools::pskill(child$pid, if (how == "SIGTERM") tools::SIGTERM else tools::SIGKILL)
    }
    expect_gone(pids)
  })
}

test_that("a worker that is killed is named at once, and the others go on", {
  cl <- local_cluster(3, retries = 0)
  pids <- clusterPids(cl)
  began <- proc.time()[[3L]]
  error <- caught(clusterApply(cl, 1:3, function(i) {
    if (i == 2) {
      message("last words: 100%s")
      tools::pskill(Sys.getpid(), tools::SIGKILL)
    }
    Sys.sleep(30)
  }))
  expect_lt(proc.time()[[3L]] - began, 15)
  expect_rust_error(error, "worker_lost")
  expect_equal(error$rank, 2L)
  expect_equal(error$host, "localhost")
  expect_equal(error$pid, pids[[2L]])
  expect_equal(error$signal, 9L)
  expect_match(error$stderr, "last words: 100%s", fixed = TRUE)
  expect_match(conditionMessage(error), "SIGKILL")
  # The others' tasks were cancelled; they are the same processes, and answer. Another process has
  # taken the lost one's place.
  now <- unlist(clusterCall(cl, Sys.getpid))
  expect_equal(now, as.integer(clusterPids(cl)))
  expect_equal(now[-2L], as.integer(pids[-2L]))
  expect_false(now[[2L]] %in% pids)
  note_pids(now)
  expect_no_error(stopCluster(cl))
  expect_gone(c(pids, now))
})

test_that("a worker that is killed while it is idle comes back", {
  cl <- local_cluster(2)
  pids <- clusterPids(cl)
  tools::pskill(pids[[1L]], tools::SIGKILL)
  expect_warning(got <- unlist(clusterCall(cl, Sys.getpid)), class = "rustcluster_worker_lost")
  expect_equal(got, as.integer(clusterPids(cl)))
  expect_equal(got[[2L]], pids[[2L]])
  expect_false(got[[1L]] == pids[[1L]])
  note_pids(got)
})

test_that("a worker that quits tells its status", {
  cl <- local_cluster(2, retries = 0)
  error <- caught(clusterCall(cl[1], function() quit(status = 3)))
  expect_rust_error(error, "worker_lost")
  expect_equal(error$status, 3L)
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
})

test_that("a killed agent takes its workers along and is reported", {
  cl <- local_cluster(3)
  pids <- cluster_processes(cl)
  tools::pskill(agentPids(cl), tools::SIGKILL)
  expect_rust_error(caught(clusterCall(cl, Sys.sleep, 30)), "host_failed")
  expect_gone(pids)
  expect_no_error(stopCluster(cl))
})

test_that("an agent that is asked to end, by SIGTERM, ends in good order", {
  cl <- local_cluster(2)
  pids <- cluster_processes(cl)
  tools::pskill(agentPids(cl), tools::SIGTERM)
  expect_rust_error(caught(clusterCall(cl, Sys.sleep, 30)), "host_failed")
  expect_gone(pids)
})

test_that("a forked child can neither use nor end the cluster", {
  cl <- local_cluster(2)
  got <- parallel::mccollect(parallel::mcparallel({
    error <- tryCatch(clusterCall(cl, identity, 1), error = identity)
    stopped <- tryCatch(stopCluster(cl), error = identity)
    rm(cl)
    gc()
    list(class(error), class(stopped))
  }))[[1L]]
  expect_true("rustcluster_forked" %in% got[[1L]])
  expect_true("rustcluster_forked" %in% got[[2L]])
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
})

test_that("an agent that is stopped by SIGSTOP is killed in the end", {
  # After 10 s.
  skip_unless_long()
  cl <- local_cluster(2)
  pids <- c(agentPids(cl), clusterPids(cl))
  tools::pskill(agentPids(cl), tools::SIGSTOP)
  stopCluster(cl)
  expect_gone(pids)
})

test_that("a forked child that lives on does not keep the workers of a killed head", {
  skip_unless_proc()
  child <- start_child({
    cl <- makeRustCluster(2)
    fork <- parallel::mcparallel(Sys.sleep(20))
    say("fork", fork$pid)
    say("pids", paste(c(agentPids(cl), clusterPids(cl)), collapse = " "))
    Sys.sleep(60)
  })
  child_wait_for(child, "pids")
  pids <- child_pids(child, "pids")
  expect_length(pids, 3L)
  fork <- child_pids(child, "fork")
  expect_alive(c(pids, fork))
  tools::pskill(child$pid, tools::SIGKILL)
  expect_gone(pids)
  expect_alive(fork)
  tools::pskill(fork, tools::SIGKILL)
})
