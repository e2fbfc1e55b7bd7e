# Clusters over a real Slurm: a controller that runs, with three idle nodes of two cores.

watch_processes()

test_engine("slurm", "RUNNING")

test_that("one job of Slurm has several nodes", {
  engine <- local_engine("slurm")
  cl <- local_engine_cluster(engine$launcher(array = FALSE), setup_timeout = 60)
  expect_length(cl, 6L)
  expect_identical(parLapply(cl, 1:60, sqrt), lapply(1:60, sqrt))
  expect_length(engine$jobs(), 1L)
  expect_length(unique(vapply(cl, `[[`, "", "host")), 3L)
  stopCluster(cl)
  expect_engine_clean(engine)
})

test_that("the reason why Slurm does not start a job is in the error", {
  engine <- local_engine("slurm")
  nodes <- length(unique(engine_lines("sinfo", c("-h", "-N", "-o", "%N"))))
  failed <- caught(makeRustCluster(engine$launcher(nodes = nodes + 1L, array = FALSE), setup_timeout = 5))
  expect_s3_class(failed, "rustcluster_start_failed")
  expect_match(conditionMessage(failed), "within 5 s.*PENDING \\(PartitionNodeLimit|PENDING \\([A-Z][A-Za-z]+")
  expect_engine_clean(engine)
})

test_that("a requeued job of Slurm takes its place again", {
  engine <- local_engine("slurm")
  cl <- local_engine_cluster(engine$launcher(), setup_timeout = 60)
  global(shift <- 42)
  clusterExport(cl, "shift", globalenv())
  wait_until(function() !anyNA(clusterHosts(cl)$job))
  job <- clusterHosts(cl)$job[[1L]]
  first <- agentPids(cl)
  expect_identical(attr(engine_lines("scontrol", c("requeue", job)), "status"), 0L)
  expect_true(wait_until(function() any(grepl(paste0("^", job, " .*PENDING"), engine$jobs())), 30, 0.2))
  expect_identical(attr(engine_lines("scontrol", c("update", paste0("jobid=", job), "StartTime=now")), "status"), 0L)
  expect_true(wait_for_states(cl, rep("up", 3)))
  expect_true(wait_until(function() length(setdiff(agentPids(cl), first)) == 1L, 30))
  expect_identical(
    suppressWarnings(suppressMessages(unlist(clusterCall(cl, function() shift)))), rep(42, 6)
  )
  stopCluster(cl)
  expect_engine_clean(engine)
})

test_that("jobs of Slurm wait for the next session, and end when none comes", {
  engine <- local_engine("slurm")
  records <- tempfile("records-")
  dir.create(records)
  old <- Sys.getenv("R_USER_CACHE_DIR", NA)
  Sys.setenv(R_USER_CACHE_DIR = records)
  on.exit({
    if (is.na(old)) Sys.unsetenv("R_USER_CACHE_DIR") else Sys.setenv(R_USER_CACHE_DIR = old)
    unlink(records, recursive = TRUE)
  }, add = TRUE, after = FALSE)
  # A session that is killed once its cluster has some state and a call.
  killed <- function(linger, array, .frame = parent.frame()) {
    child <- start_child({
      cl <- makeRustCluster(do.call(slurm, given), setup_timeout = 120, linger = linger)
      clusterSetRNGStream(cl, 42)
      shift <- 42
      clusterExport(cl, "shift")
      say("workers", paste(clusterPids(cl), collapse = " "))
      say("draws", paste(unlist(clusterCall(cl, rnorm, 1)), collapse = " "))
      call <- clusterSubmit(cl, { Sys.sleep(2); "kept" })
      while (call$status() != "running") Sys.sleep(0.02)
      say("id", clusterId(cl))
      Sys.sleep(300)
    }, env = paste0("R_USER_CACHE_DIR=", shQuote(records)), values = list(
      given = c(engine$given, list(nodes = 3, cores = 2, array = array)), linger = linger
    ), .frame = .frame)
    child_wait_for(child, "id", 120)
    child_signal(child, tools::SIGKILL)
    child_wait_end(child)
    child
  }
  psock <- parallel::makePSOCKcluster(6)
  parallel::clusterSetRNGStream(psock, 42)
  draws <- lapply(1:2, function(i) unlist(parallel::clusterCall(psock, stats::rnorm, 1)))
  parallel::stopCluster(psock)
  for (array in c(TRUE, FALSE)) {
    child <- killed(60, array)
    jobs <- engine$jobs()
    cl <- reattachCluster(child_said(child, "id"))
    on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
    expect_identical(clusterPids(cl), child_pids(child, "workers"))
    expect_identical(unlist(clusterCall(cl, function() shift)), rep(42, 6))
    expect_equal(as.numeric(strsplit(child_said(child, "draws"), " ")[[1L]]), draws[[1L]], tolerance = 1e-5)
    expect_identical(unlist(parallel::clusterCall(cl, stats::rnorm, 1)), draws[[2L]])
    expect_identical(vapply(keptResults(cl), function(kept) kept$value, ""), "kept")
    expect_identical(engine$jobs(), jobs)
    stopCluster(cl)
    expect_engine_clean(engine)
  }
  child <- killed(60, TRUE)
  killCluster(child_said(child, "id"))
  expect_engine_clean(engine)
  child <- killed(4, FALSE)
  expect_true(length(engine$jobs()) > 0L)
  # Slurm ends steps a while after their processes.
  expect_engine_clean(engine, within = 15)
  # A job that is cancelled by hand ends, although no session is connected.
  child <- killed(60, FALSE)
  engine$cancel(sub(" .*$", "", engine$jobs()[[1L]]))
  expect_true(wait_until(function() !length(engine$jobs()) && !any(alive(child_pids(child, "workers"))), 30))
  suppressWarnings(killCluster(child_said(child, "id")))
  expect_engine_clean(engine)
})

# RUSTCLUSTER_SLURM_SCRIPT: a command that ends a node and all its processes by `node-crash NODE`, and takes it up again
# by `node-up NODE`.
test_that("tasks of a node of Slurm that crashes run elsewhere", {
  engine <- local_engine("slurm")
  script <- Sys.getenv("RUSTCLUSTER_SLURM_SCRIPT")
  skip_if_not(nzchar(script), "set RUSTCLUSTER_SLURM_SCRIPT")
  cl <- local_engine_cluster(engine$launcher(extra = "--exclusive"), setup_timeout = 60, retries = 0)
  node <- vapply(cl, `[[`, "", "host")[[1L]]
  up <- function() system2(script, c("node-up", node), stdout = FALSE, stderr = FALSE)
  on.exit(suppressWarnings(up()), add = TRUE, after = FALSE)
  crashed <- FALSE
  values <- suppressWarnings(suppressMessages(clusterLapply(cl, 1:90, slow_square, .onResult = function(i, value) {
    if (!crashed) system2(script, c("node-crash", node), stdout = FALSE, stderr = FALSE)
    crashed <<- TRUE
  })))
  expect_identical(values, lapply(1:90, function(i) i^2))
  stopCluster(cl)
  suppressWarnings(up())
  expect_engine_clean(engine, within = 60)
})

test_that("nothing is left", {
  expect_no_leftovers()
})
