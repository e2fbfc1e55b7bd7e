# The time limit of jobs of a real Slurm. This takes some minutes.

watch_processes()

test_that("jobs of Slurm with a time limit are followed by others, and no task is lost", {
  engine <- local_engine("slurm")
  cl <- local_engine_cluster(engine$launcher(time = 1), setup_timeout = 60, retries = 0)
  kinds <- character()
  values <- withCallingHandlers(
    clusterLapply(cl, 1:360, slow_square, seconds = 2),
    message = function(m) {
      kinds <<- c(kinds, class(m)[[1L]])
      invokeRestart("muffleMessage")
    },
    warning = function(w) {
      kinds <<- c(kinds, class(w)[[1L]])
      invokeRestart("muffleWarning")
    }
  )
  expect_identical(values, lapply(1:360, function(i) i^2))
  expect_true(all(c("rustcluster_host_draining", "rustcluster_job_renewed") %in% kinds))
  expect_false("rustcluster_worker_lost" %in% kinds)
  stopCluster(cl)
  expect_engine_clean(engine)
})

test_that("nothing is left", {
  expect_no_leftovers()
})
