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
