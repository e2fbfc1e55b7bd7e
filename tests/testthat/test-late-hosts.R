# Hosts that join after makeRustCluster() has returned (`wait`).

late_cluster <- function(gate, spec, ..., .frame = parent.frame()) {
  local_cluster(spec, rshcmd = gate$ssh, rlibs = .libPaths(), ..., .frame = .frame)
}

is_there <- function(cl) clusterStatus(cl)$state != "waiting"

test_that("a cluster begins with the workers that are there", {
  skip_on_cran()
  gate <- gates()
  gate$open("early")
  cl <- late_cluster(gate, c(early = 2, late = 3), wait = "first")
  expect_length(cl, 5L)
  expect_equal(is_there(cl), rep(c(TRUE, FALSE), 2:3))
  expect_equal(clusterHosts(cl)$state, c("up", "waiting"))
  expect_equal(clusterHosts(cl)$workers, 2:3)
  # Jobs without an assignment use them.
  expect_equal(parLapplyLB(cl, 1:20, function(i) i^2), lapply(1:20, function(i) i^2))
  expect_equal(clusterLapply(cl, 1:20, function(i) i^2), lapply(1:20, function(i) i^2))
  expect_equal(clusterSubmit(cl, 6 * 7)$value(), 42)
  expect_equal(sum(is_there(cl)), 2L)
  expect_equal(clusterCall(cl[1:2], function() 1), list(1, 1))
})

test_that("exports and seeds do not wait, and reach workers that join", {
  skip_on_cran()
  gate <- gates()
  gate$open("early")
  cl <- late_cluster(gate, c(early = 1, late = 2), wait = 1)
  global(late_value <- 17)
  big <- numeric(1e6)
  clusterExport(cl, "late_value", globalenv())
  parallel::clusterExport(cl, "big", environment())
  clusterSetRNGStream(cl, 5)
  parallel::clusterExport(cl[2:3], "late_value", globalenv())
  expect_equal(sum(is_there(cl)), 1L)
  gate$open("late")
  expect_message(values <- clusterCall(cl, function() c(late_value, length(big))), class = "rustcluster_host_joined")
  expect_equal(values, rep(list(c(17, 1e6)), 3))
  expect_equal(clusterHosts(cl)$state, c("up", "up"))
  expect_false(anyNA(clusterHosts(cl)$r_version))
  psock <- parallel::makeCluster(3)
  on.exit(parallel::stopCluster(psock), add = TRUE, after = FALSE)
  clusterSetRNGStream(psock, 5)
  expect_equal(clusterCall(cl, rnorm, 3), clusterCall(psock, rnorm, 3))
  expect_equal(parLapply(cl, 1:7, function(i) runif(1)), parLapply(psock, 1:7, function(i) runif(1)))
})

test_that("workers that join take part in the job that is running", {
  skip_on_cran()
  gate <- gates()
  gate$open("early")
  cl <- late_cluster(gate, c(early = 1, late = 2), wait = 1)
  opened <- FALSE
  open <- function(i, value) if (!opened) opened <<- all(gate$open("late"), TRUE)
  pids <- suppressMessages(clusterLapply(cl, 1:400, function(i) {
    Sys.sleep(0.02)
    Sys.getpid()
  }, .onResult = open))
  expect_length(unique(unlist(pids)), 3L)
  # The same with parallel's own name.
  gate2 <- gates()
  gate2$open("early")
  cl <- late_cluster(gate2, c(early = 1, late = 2), wait = 1)
  opener <- clusterSubmit(cl, NULL)
  pids <- suppressMessages(parallel::clusterApplyLB(cl, 1:300, function(i, file) {
    file.create(file)
    Sys.sleep(0.02)
    Sys.getpid()
  }, file.path(dirname(gate2$ssh), "late")))
  expect_length(unique(unlist(pids)), 3L)
})

test_that("with wait = 0, jobs and calls wait for the first worker, and bound verbs for their nodes", {
  skip_on_cran()
  gate <- gates()
  cl <- late_cluster(gate, c(a = 1, b = 1), wait = 0)
  expect_equal(is_there(cl), c(FALSE, FALSE))
  call <- clusterSubmit(cl, Sys.getpid())
  expect_equal(call$status(), "waiting")
  system2("sh", c("-c", shQuote(sprintf("sleep 0.5; touch %s/b", dirname(gate$ssh)))), wait = FALSE)
  expect_equal(suppressMessages(clusterLapply(cl, 1:5, identity)), as.list(1:5))
  expect_true(is.integer(call$value()))
  system2("sh", c("-c", shQuote(sprintf("sleep 0.5; touch %s/a", dirname(gate$ssh)))), wait = FALSE)
  pids <- suppressMessages(parallel::clusterApply(cl, 1:4, function(i) Sys.getpid()))
  expect_equal(unlist(pids), rep(clusterPids(cl), 2))
})

test_that("a wait for a host can be interrupted, and the cluster works on", {
  skip_on_cran()
  gate <- gates()
  gate$open("early")
  cl <- late_cluster(gate, c(early = 1, late = 1), wait = "first")
  expect_lt(interrupted(clusterCall(cl, Sys.getpid), after = 0.5), 10)
  expect_equal(clusterLapply(cl, 1:3, identity), as.list(1:3))
  gate$open("late")
  suppressMessages(expect_length(unique(clusterCall(cl, Sys.getpid)), 2L))
})

test_that("a host that fails to join is named, and the cluster goes on without it", {
  skip_on_cran()
  gate <- gates()
  gate$open("early")
  cl <- late_cluster(gate, c(early = 1, late = 1), wait = "first")
  call <- clusterSubmit(cl[2], 1)
  gate$fail("late", "ssh: connect to host late port 22: Connection refused")
  warned <- tryCatch(
    wait_until(function() {
      # In this order: the host may be lost in between.
      lost <- clusterHosts(cl)$state[[2L]] == "lost"
      rustcluster:::showEvents(cl[[1L]]$handle)
      lost
    }),
    warning = identity
  )
  expect_s3_class(warned, "rustcluster_host_failed")
  expect_match(conditionMessage(warned), "no sshd listens on that port")
  expect_error(call$value(), class = "rustcluster_host_failed")
  expect_error(clusterCall(cl, Sys.getpid), class = "rustcluster_host_failed")
  expect_equal(clusterLapply(cl, 1:3, identity), as.list(1:3))
})

test_that("a host that is slower than setup_timeout is given up", {
  skip_on_cran()
  gate <- gates()
  gate$open("early")
  cl <- late_cluster(gate, c(early = 1, late = 1), wait = "first", setup_timeout = 5)
  pid <- rustcluster:::hub_agent_pids(cl[[1L]]$handle$pointer)
  expect_warning(failed <- caught(clusterCall(cl, Sys.getpid)), "within 5 seconds", class = "rustcluster_host_failed")
  expect_s3_class(failed, "rustcluster_host_failed")
})

test_that("an interrupted start and a stopped cluster leave nothing of late hosts", {
  skip_on_cran()
  gate <- gates()
  gate$open("early")
  cl <- makeRustCluster(c(early = 1, late = 2), rshcmd = gate$ssh, rlibs = .libPaths(), wait = "first")
  # Clusters of other tests, too, which end when they are garbage-collected.
  gc()
  before <- descendants()
  expect_true(length(before) > 2L)
  stopCluster(cl)
  expect_gone(before)
})

test_that("`wait` is checked", {
  for (wait in list("some", -1, 1.5, NA, NULL, 9, c(1, 2))) {
    expect_error(makeRustCluster(2, wait = wait), class = "rustcluster_bad_argument", info = deparse(wait))
  }
  expect_error(
    makeRustCluster(list(list(host = "a"), list(host = "b")), wait = "first"), "ncore",
    class = "rustcluster_bad_argument"
  )
})
