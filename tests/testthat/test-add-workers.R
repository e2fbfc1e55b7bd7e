# addWorkers(): workers that are added to a running cluster.

watch_processes()

alive <- function(cl) which(!is.na(clusterPids(cl)))

pids_of <- function(cl) c(clusterPids(cl), agentPids(cl))

test_that("workers are added to a local cluster, which goes on", {
  cl <- local_cluster(2)
  before <- clusterPids(cl)
  Sys.sleep(1.5)
  began <- proc.time()[["elapsed"]]
  grown <- withVisible(addWorkers(cl, 2))
  expect_false(grown$visible)
  grown <- grown$value
  expect_s3_class(grown, "RustCluster")
  expect_length(grown, 4L)
  expect_equal(vapply(unclass(grown), `[[`, 0L, "rank"), 1:4)
  expect_equal(clusterPids(grown)[1:2], before)
  expect_equal(unlist(clusterCall(grown, Sys.getpid)), clusterPids(grown))
  # The old object has its nodes.
  expect_length(cl, 2L)
  expect_equal(unlist(clusterCall(cl, Sys.getpid)), before)
  expect_equal(clusterHosts(grown)$state, c("up", "up"))
  expect_equal(clusterHosts(grown)$workers, c(2L, 2L))
  # A host that is added later starts later.
  expect_lte(clusterHosts(grown)$seconds[[2L]], proc.time()[["elapsed"]] - began)
  expect_equal(clusterStatus(grown)$state, rep("idle", 4))
  expect_identical(parLapply(grown, 1:30, sqrt), lapply(1:30, sqrt))
  expect_identical(parLapplyLB(grown, 1:30, sqrt), lapply(1:30, sqrt))
  expect_identical(clusterLapply(grown, 1:30, sqrt), lapply(1:30, sqrt))
  grown <- addWorkers(grown, c(localhost = 1))
  expect_length(unique(unlist(clusterCall(grown, Sys.getpid))), 5L)
})

test_that("new workers have what all workers were set up with", {
  cl <- local_cluster(3, packages = "tools")
  global(added_value <- 17)
  big <- as.numeric(seq_len(1e6))
  clusterExport(cl, "added_value", globalenv())
  parallel::clusterExport(cl, "big", environment())
  clusterEvalQ(cl, made <- added_value + 1)
  global(added_value <- 18)
  clusterExport(cl, "added_value", globalenv())
  clusterEvalQ(cl, counter <- 1)
  clusterEvalQ(cl, counter <- counter + 1)
  # Not all workers have these.
  clusterEvalQ(cl[1:2], of_part <- 1)
  clusterEvalQ(cl[2], made <- 0)
  cl <- addWorkers(cl, 2)
  state <- function() {
    list(added_value, made, counter, sum(big), exists("of_part"), "package:tools" %in% search())
  }
  values <- clusterCall(cl, state)
  expect_equal(values[[4]], list(18, 18, 2, sum(big), FALSE, TRUE))
  expect_identical(values[[5]], values[[4]])
  # New workers are replaced with that state, too.
  suppressWarnings({
    expect_error(clusterCall(cl[4], function() tools::pskill(Sys.getpid(), 9)), class = "rustcluster_error")
    expect_identical(clusterCall(cl[4], state)[[1]], values[[5]])
  })
  # A part gets workers, too, and the calls from now on go to all nodes.
  part <- addWorkers(cl[2:3], 1)
  expect_equal(vapply(unclass(part), `[[`, 0L, "rank"), c(2L, 3L, 6L))
  expect_identical(clusterCall(part[3], state)[[1]], values[[5]])
})

test_that("workers that are gone do not keep set-up calls from new ones", {
  cl <- local_cluster(3)
  stopCluster(cl[3])
  rest <- cl[1:2]
  clusterEvalQ(rest, gone_value <- 5)
  rest <- addWorkers(rest, 1)
  expect_identical(clusterEvalQ(rest, gone_value), list(5, 5, 5))
})

test_that("new workers continue the streams of random numbers, as in a PSOCK cluster of the final size", {
  skip_on_cran()
  psock <- parallel::makeCluster(6)
  on.exit(parallel::stopCluster(psock), add = TRUE, after = FALSE)
  parallel::clusterSetRNGStream(psock, 7)
  cl <- local_cluster(2)
  clusterSetRNGStream(cl, 7)
  # The streams begin where the initial seeds say, not where the workers are.
  first <- clusterCall(cl, runif, 2)
  cl <- addWorkers(cl, 2)
  cl <- addWorkers(cl, c(localhost = 2))
  expected <- parallel::clusterCall(psock, runif, 2)
  expect_identical(first, expected[1:2])
  expect_identical(clusterCall(cl[3:6], runif, 2), expected[3:6])
  expect_identical(clusterCall(cl, rnorm, 3), parallel::clusterCall(psock, rnorm, 3))
  expect_identical(parLapply(cl, 1:13, function(i) runif(1)), parallel::parLapply(psock, 1:13, function(i) runif(1)))
})

test_that("new workers of joined clusters have streams of their own", {
  skip_on_cran()
  psock <- parallel::makeCluster(5)
  on.exit(parallel::stopCluster(psock), add = TRUE, after = FALSE)
  parallel::clusterSetRNGStream(psock, 7)
  one <- local_cluster(1)
  other <- local_cluster(1)
  clusterSetRNGStream(c(one, other), 7)
  one <- addWorkers(one, 1)
  other <- addWorkers(other, 1)
  one <- addWorkers(one, 1)
  expected <- parallel::clusterCall(psock, runif, 2)
  # In the order in which they were added.
  expect_identical(clusterCall(c(one[1], other[1], one[2], other[2], one[3]), runif, 2), expected)
  clusterSetRNGStream(one, 7)
  expect_identical(clusterCall(addWorkers(one, 1), runif, 2), {
    parallel::clusterSetRNGStream(psock, 7)
    parallel::clusterCall(psock[1:4], runif, 2)
  })
})

test_that("futures and submitted calls use the new workers", {
  skip_on_cran()
  cl <- local_cluster(1)
  file <- tempfile()
  on.exit(unlink(file), add = TRUE, after = FALSE)
  busy <- clusterSubmit(cl, {
    while (!file.exists(file)) Sys.sleep(0.02)
    Sys.getpid()
  }, file = file)
  grown <- addWorkers(cl, 1)
  # The first worker is busy.
  expect_equal(clusterSubmit(grown, Sys.getpid())$value(), clusterPids(grown)[[2]])
  file.create(file)
  expect_equal(busy$value(), clusterPids(cl))
  skip_if_not_installed("future")
  oplan <- future::plan(cluster_rust, workers = grown)
  on.exit(future::plan(oplan), add = TRUE, after = FALSE)
  expect_equal(future::nbrOfWorkers(), 2L)
  futures <- lapply(1:2, function(i) future::future({
    Sys.sleep(0.5)
    Sys.getpid()
  }))
  expect_setequal(vapply(futures, future::value, 0L), clusterPids(grown))
})

test_that("new workers have the settings of the cluster", {
  skip_on_cran()
  out <- tempfile()
  on.exit(unlink(out), add = TRUE, after = FALSE)
  cl <- local_cluster(1, outfile = out, rscript_envs = c(ADDED_VARIABLE = "yes"), threads = 3, timeout = 1, retries = 0)
  cl <- addWorkers(cl, list(list(host = "localhost", ncore = 1), list(host = "localhost", ncore = 1, threads = 2)))
  settings <- function() {
    cat("from a new worker\n")
    Sys.getenv(c("ADDED_VARIABLE", "OMP_NUM_THREADS"), names = FALSE)
  }
  expect_equal(clusterCall(cl[2:3], settings), list(c("yes", "3"), c("yes", "2")))
  wait_until(function() sum(readLines(out) == "from a new worker") == 2L)
  expect_error(clusterCall(cl[2], Sys.sleep, 30), class = "rustcluster_timeout")
  expect_error(clusterCall(cl[3], function() tools::pskill(Sys.getpid(), 9)), class = "rustcluster_error")
})

test_that("new hosts may join late", {
  skip_on_cran()
  gate <- gates()
  cl <- local_cluster(1, rshcmd = gate$ssh, rlibs = .libPaths())
  clusterEvalQ(cl, late_value <- 3)
  clusterSetRNGStream(cl, 11)
  gate$open("early")
  expect_no_message(cl <- addWorkers(cl, c(early = 1, late = 2), wait = "first"))
  expect_length(cl, 4L)
  expect_equal(clusterStatus(cl)$state != "waiting", c(TRUE, TRUE, FALSE, FALSE))
  expect_equal(clusterHosts(cl)$state, c("up", "up", "waiting"))
  expect_equal(clusterLapply(cl, 1:10, identity), as.list(1:10))
  clusterExport(cl, "gate", environment())
  gate$open("late")
  expect_message(
    values <- clusterCall(cl, function() c(late_value, length(gate))), class = "rustcluster_host_joined"
  )
  expect_equal(values, rep(list(c(3, 3)), 4))
  psock <- parallel::makeCluster(4)
  on.exit(parallel::stopCluster(psock), add = TRUE, after = FALSE)
  parallel::clusterSetRNGStream(psock, 11)
  expect_identical(clusterCall(cl, runif, 2), parallel::clusterCall(psock, runif, 2))
})

test_that("a batch job is added to a cluster", {
  stub <- local_stub_engine("slurm")
  launcher <- slurm(nodes = 1L, cores = 1L, dir = file.path(stub$home, "shared"))
  cl <- local_cluster(1)
  clusterEvalQ(cl, job_value <- 9)
  cl <- addWorkers(cl, launcher)
  expect_identical(clusterEvalQ(cl, job_value), list(9, 9))
  cl <- addWorkers(cl, launcher)
  expect_identical(clusterEvalQ(cl, job_value), list(9, 9, 9))
  expect_setequal(agentPids(cl)[-1], stub$pids())
  expect_length(stub$jobs(), 2L)
  # A job that does not start is cancelled, and the others go on.
  stub$set("pending", "Resources")
  expect_error(addWorkers(cl, launcher, setup_timeout = 2), "Resources", class = "rustcluster_start_failed")
  expect_length(stub$jobs(), 2L)
  expect_length(list.files(file.path(stub$home, "shared")), 2L)
  stub$set("pending", NULL)
  stub$set("delay", 2)
  waiting <- addWorkers(cl, launcher, wait = 0)
  expect_equal(clusterHosts(waiting)$state, c("up", "up", "up", "waiting"))
  expect_identical(suppressMessages(clusterEvalQ(waiting, job_value)), list(9, 9, 9, 9))
  stopCluster(cl)
  expect_identical(stub$jobs(), character())
  expect_identical(list.files(file.path(stub$home, "shared")), character())
  expect_gone(stub$pids())
})

test_that("a host that cannot be added is named, and the cluster is as before", {
  skip_on_cran()
  gate <- gates()
  cl <- local_cluster(2, rshcmd = gate$ssh, rlibs = .libPaths())
  before <- pids_of(cl)
  gate$open("good")
  gate$fail("bad", "no such machine")
  expect_error(addWorkers(cl, c(good = 1, bad = 1)), "bad.*no such machine", class = "rustcluster_start_failed")
  expect_error(
    addWorkers(cl, c(good = 1, never = 1), setup_timeout = 1.5), "never", class = "rustcluster_start_failed"
  )
  expect_equal(pids_of(cl), before)
  expect_equal(clusterHosts(cl)$host, "localhost")
  expect_equal(unlist(clusterCall(cl, Sys.getpid)), clusterPids(cl))
  expect_no_condition(cl <- addWorkers(cl, c(good = 1)))
  expect_length(unique(unlist(clusterCall(cl, Sys.getpid))), 3L)
  expect_equal(clusterHosts(cl)$host, c("localhost", "good"))
})

test_that("workers that fail at their start are not added", {
  skip_on_cran()
  cl <- local_cluster(1)
  before <- pids_of(cl)
  expect_error(
    addWorkers(cl, list(list(host = "localhost", ncore = 1, rscript = "/nonexistent/Rscript"))), "Rscript",
    class = "rustcluster_start_failed"
  )
  # The set-up of a new worker fails.
  clusterEvalQ(cl, if (identical(Sys.getenv("ADDED_FAILS"), "yes")) tools::pskill(Sys.getpid(), 9))
  fails <- list(list(host = "localhost", ncore = 1, rscript_envs = c(ADDED_FAILS = "yes")))
  expect_error(addWorkers(cl, fails), class = "rustcluster_start_failed")
  expect_equal(pids_of(cl), before)
  expect_length(addWorkers(cl, 1), 2L)
})

test_that("with on_failure = \"warn\" the other hosts are added", {
  skip_on_cran()
  gate <- gates()
  cl <- local_cluster(1, rshcmd = gate$ssh, rlibs = .libPaths(), on_failure = "warn")
  gate$open("good")
  gate$fail("bad", "no such machine")
  expect_warning(cl <- addWorkers(cl, c(bad = 1, good = 1)), "bad", class = "rustcluster_host_left_out")
  expect_length(cl, 2L)
  expect_equal(clusterCall(cl, function() 1), list(1, 1))
})

test_that("an interrupt ends what was started", {
  skip_on_cran()
  gate <- gates()
  cl <- local_cluster(1, rshcmd = gate$ssh, rlibs = .libPaths())
  before <- pids_of(cl)
  gate$open("early")
  expect_lt(interrupted(addWorkers(cl, c(early = 1, never = 1)), after = 1), 10)
  expect_equal(pids_of(cl), before)
  expect_equal(clusterCall(cl, function() 1), list(1))
  expect_length(addWorkers(cl, 1), 2L)
})

test_that("a cluster that is in use is busy", {
  cl <- local_cluster(1)
  added <- NULL
  add <- function(i, value) if (is.null(added)) added <<- tryCatch(addWorkers(cl, 1), error = identity)
  expect_equal(clusterLapply(cl, 1:3, identity, .onResult = add), as.list(1:3))
  expect_s3_class(added, "rustcluster_busy")
  expect_length(addWorkers(cl, 1), 2L)
})

test_that("stopCluster() of the old and of the new object ends everything, and of a part only that", {
  cl <- local_cluster(1)
  grown <- addWorkers(addWorkers(cl, 1), 1)
  pids <- pids_of(grown)
  stopCluster(grown[1:2])
  expect_equal(alive(grown), 3L)
  expect_equal(clusterCall(grown[3], function() 1), list(1))
  stopCluster(grown)
  expect_gone(pids)
  expect_error(addWorkers(grown, 1), class = "rustcluster_stopped")
  cl <- local_cluster(2)
  grown <- addWorkers(cl, 1)
  pids <- pids_of(grown)
  stopCluster(cl)
  expect_gone(pids)
  stopCluster(grown)
  # A part with new nodes is a part.
  cl <- local_cluster(2)
  part <- addWorkers(cl[1], 1)
  stopCluster(part)
  expect_equal(alive(cl), 2L)
})

test_that("removed workers can be replaced by new ones", {
  cl <- local_cluster(2)
  cl <- addWorkers(removeWorkers(cl, 1), 2)
  expect_equal(vapply(unclass(cl), `[[`, 0L, "rank"), 2:4)
  expect_length(unique(unlist(clusterCall(cl, Sys.getpid))), 3L)
})

test_that("bad arguments are refused", {
  cl <- local_cluster(1)
  bad <- function(expr, text) expect_error(expr, text, class = "rustcluster_bad_argument")
  bad(addWorkers(1, 1), "cl")
  bad(addWorkers(cl), "spec")
  bad(addWorkers(cl, "x y"), "spec")
  bad(addWorkers(cl, 1, wait = 2), "wait")
  bad(addWorkers(cl, 1, setup_timeout = "a"), "setup_timeout")
  other <- local_cluster(1)
  bad(addWorkers(c(cl, other), 1), "one cluster")
  small <- local_cluster(1, setup_log_limit = 1000)
  small <- addWorkers(small, 1)
  suppressWarnings(clusterCall(small, function(x) NULL, numeric(1e4)))
  expect_error(addWorkers(small, 1), "setup_log_limit", class = "rustcluster_start_failed")
  expect_equal(suppressWarnings(clusterCall(small, function() 1)), list(1, 1))
})
