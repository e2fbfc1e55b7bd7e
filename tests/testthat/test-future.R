# Futures on our clusters; multisession is the oracle.

watch_processes()
skip_if_not_installed("future")

local_plan <- function(..., .frame = parent.frame()) {
  old <- future::plan(...)
  do.call("on.exit", list(bquote(future::plan(.(old))), add = TRUE, after = FALSE), envir = .frame)
}

# The same on multisession and on ours.
expect_same_future <- function(fun) {
  future::plan(future::multisession, workers = 2)
  want <- outcome(quote(fun()), NULL, list(fun = fun))
  cl <- note_processes(makeRustCluster(2))
  on.exit({
    future::plan(future::sequential)
    stop_quietly(cl)
  })
  future::plan(cluster_rust, workers = cl)
  got <- outcome(quote(fun()), NULL, list(fun = fun))
  expect_identical(got, want)
  invisible(got$result)
}

test_that("values, errors, output and conditions are those of multisession", {
  y <- 5
  expect_same_future(function() {
    add <- function(x) x + y
    fs <- lapply(1:5, function(i) future::future(add(i)))
    future::value(fs)
  })
  expect_same_future(function() future::value(future::future({
    cat("out\n")
    message("told")
    warning("warned")
    3
  })))
  expect_same_future(function() tryCatch(
    future::value(future::future(stop("100%s wrong"))), error = function(e) list(class(e), conditionMessage(e))
  ))
  expect_same_future(function() {
    set.seed(1)
    future::value(lapply(1:3, function(i) future::future(rnorm(2), seed = TRUE)))
  })
  expect_same_future(function() future::value(future::future(toTitleCase("a b"), packages = "tools")))
  expect_same_future(function() future::value(future::future(class(future::plan())[1:2])))
  # The message has the worker's pid in it.
  kind <- expect_same_future(function() tryCatch(
    future::value(future::future(1, packages = "notThere")), error = function(e) class(e)
  ))
  expect_true("error" %in% kind$value)
})

test_that("creating waits only when all workers are busy, and resolved() never", {
  cl <- local_cluster(2)
  local_plan(cluster_rust, workers = cl)
  expect_equal(future::nbrOfWorkers(), 2L)
  expect_equal(future::nbrOfFreeWorkers(), 2L)
  flag <- tempfile()
  fs <- lapply(1:2, function(i) future::future({
    while (!file.exists(flag)) Sys.sleep(0.01)
    i
  }))
  expect_equal(future::nbrOfFreeWorkers(), 0L)
  expect_false(any(future::resolved(fs)))
  file.create(flag)
  third <- future::future("third")
  expect_equal(future::value(third), "third")
  expect_equal(future::value(fs), list(1L, 2L))
  expect_true(all(future::resolved(fs)))
  expect_equal(future::nbrOfFreeWorkers(), 2L)
  # Nothing is left, and what was exported stays.
  clusterExport(cl, "flag", environment())
  leftover <- 1
  future::value(future::future(leftover))
  expect_equal(unlist(clusterCall(cl, exists, "leftover")), c(FALSE, FALSE))
  expect_equal(unlist(clusterCall(cl, exists, "flag")), c(TRUE, TRUE))
})

test_that("immediate conditions come while the future runs", {
  cl <- local_cluster(1)
  local_plan(cluster_rust, workers = cl)
  flag <- tempfile()
  seen <- 0
  withCallingHandlers({
    f <- future::future({
      withRestarts(
        signalCondition(structure(class = c("note", "immediateCondition", "condition"), list(message = "now", call = NULL))),
        muffleNote = function() NULL
      )
      while (!file.exists(flag)) Sys.sleep(0.01)
      "done"
    })
    expect_true(wait_until(function() {
      future::resolved(f)
      seen > 0
    }))
    expect_false(future::resolved(f))
    file.create(flag)
    expect_equal(future::value(f), "done")
  }, note = function(c) seen <<- seen + 1)
  expect_equal(seen, 1)
})

test_that("progressr's bars go on", {
  skip_if_not_installed("progressr")
  cl <- local_cluster(2)
  local_plan(cluster_rust, workers = cl)
  steps <- 0
  flag <- tempfile()
  counting <- function(...) {
    progressr::make_progression_handler("counting", reporter = list(
      update = function(config, state, progression, ...) steps <<- max(steps, state$step)
    ), intrusiveness = 0, enable = TRUE, ...)
  }
  early <- value <- NULL
  progressr::with_progress({
    p <- progressr::progressor(6)
    f <- future::future({
      for (i in 1:3) p()
      while (!file.exists(flag)) Sys.sleep(0.01)
      for (i in 1:3) p()
      "done"
    })
    early <- wait_until(function() {
      future::resolved(f)
      steps >= 3
    })
    file.create(flag)
    value <- future::value(f)
  }, handlers = counting(), enable = TRUE, interval = 0, delay_stdout = FALSE)
  expect_true(early)
  expect_equal(value, "done")
  expect_gte(steps, 5)
})

test_that("a lost future is an error that tells why", {
  cl <- local_cluster(1, retries = 0)
  local_plan(cluster_rust, workers = cl)
  f <- future::future(tools::pskill(Sys.getpid(), 9))
  error <- suppressWarnings(caught(future::value(f)))
  expect_s3_class(error, "FutureError")
  expect_match(conditionMessage(error), "pid [0-9]+\\) was killed by signal 9 \\(SIGKILL\\)")
  expect_rust_error(error$parent, "worker_lost")
  expect_equal(future::value(future::future(1)), 1)
})

test_that("a plan may have a cluster of its own", {
  local_plan(cluster_rust, workers = 2)
  expect_equal(future::nbrOfWorkers(), 2L)
  pids <- future::value(lapply(1:2, function(i) future::future(Sys.getpid())))
  note_pids(unlist(pids))
  future::plan(future::sequential)
  expect_gone(unlist(pids))
})

test_that("what is wrong with workers is wrong with the plan", {
  on.exit(future::plan(future::sequential))
  wrong <- list(structure(list(), class = c("SOCKcluster", "cluster")), "a b", -1, list(1))
  for (workers in wrong) {
    error <- caught(future::plan(cluster_rust, workers = workers))
    expect_rust_error(error, "bad_argument")
    expect_identical(error$argument, "workers")
    expect_match(conditionMessage(error), "^`workers` ")
    expect_no_match(conditionMessage(error), "spec", fixed = TRUE)
  }
})

test_that("future.apply and furrr work over it", {
  cl <- local_cluster(2)
  local_plan(cluster_rust, workers = cl)
  if (requireNamespace("future.apply", quietly = TRUE)) {
    expect_equal(future.apply::future_lapply(1:7, function(i) i^2), lapply(1:7, function(i) i^2))
    a <- future.apply::future_sapply(1:4, function(i) rnorm(1), future.seed = 42)
    future::plan(future::sequential)
    expect_identical(a, future.apply::future_sapply(1:4, function(i) rnorm(1), future.seed = 42))
    future::plan(cluster_rust, workers = cl)
  }
  if (requireNamespace("furrr", quietly = TRUE)) {
    expect_equal(furrr::future_map_dbl(1:5, function(i) i * 2), 1:5 * 2)
  }
})

test_that("doFuture's loops are those of multisession, also when a worker is lost", {
  skip_if_not_installed("foreach")
  skip_if_not_installed("doFuture")
  foreach <- foreach::foreach
  `%dopar%` <- foreach::`%dopar%`
  `%:%` <- foreach::`%:%`
  # Called by its name, it would have to be in Suggests, and Debian does not have it.
  getExportedValue("doFuture", "registerDoFuture")()
  on.exit(foreach::registerDoSEQ())
  y <- 5
  expect_same_future(function() {
    add <- function(x) x + y
    foreach(i = 1:7, .combine = c) %dopar% add(i)
  })
  expect_same_future(function() foreach(i = 1:3, .combine = rbind) %:% foreach(j = 1:2, .combine = c) %dopar% (10 * i + j))
  expect_same_future(function() foreach(x = c("a b", "c d"), .packages = "tools") %dopar% toTitleCase(x))
  expect_same_future(function() foreach(i = 1:4) %dopar% {
    cat("out", i, "\n")
    warning("warned ", i)
    if (i == 3) stop("wrong")
    i
  })
  expect_same_future(function() foreach(i = 1:4, .combine = c, .errorhandling = "remove") %dopar% {
    if (i == 3) stop("wrong")
    i
  })
  if (requireNamespace("doRNG", quietly = TRUE)) {
    `%dorng%` <- doRNG::`%dorng%`
    expect_same_future(function() {
      RNGkind("default", "default", "default")
      foreach(i = 1:4, .options.RNG = 1) %dorng% stats::runif(2)
    })
  }
  cl <- local_cluster(2)
  local_plan(cluster_rust, workers = cl)
  flag <- tempfile()
  expect_warning(
    squares <- foreach(i = 1:6, .combine = c) %dopar% {
      if (i == 5 && dir.create(flag, showWarnings = FALSE)) tools::pskill(Sys.getpid(), 9)
      i^2
    },
    "killed by signal 9 \\(SIGKILL\\); the call is tried again"
  )
  expect_equal(squares, (1:6)^2)
})

test_that("future's own cluster plan gives right answers with our nodes, and with a part of them", {
  cl <- local_cluster(3)
  pids <- unlist(clusterCall(cl, Sys.getpid))
  old <- future::plan()
  on.exit(future::plan(old), add = TRUE, after = FALSE)
  for (nodes in list(1:3, 1:2, 3L, 2:1)) {
    future::plan(future::cluster, workers = cl[nodes])
    expect_equal(future::nbrOfWorkers(), length(nodes))
    # Where it says that it waits: our nodes have no connections.
    suppressWarnings({
      fs <- lapply(1:5, function(i) future::future(list(i^2, Sys.getpid())))
      values <- future::value(fs)
    })
    expect_equal(lapply(values, `[[`, 1), as.list((1:5)^2))
    expect_setequal(vapply(values, `[[`, 0L, 2), pids[nodes])
    expect_equal(future::nbrOfFreeWorkers(), length(nodes))
  }
  # What future has made of it leaves the cluster itself as it was.
  expect_equal(unlist(clusterCall(cl, Sys.getpid)), pids)
})

test_that("nothing is left", {
  future::plan(future::sequential)
  expect_no_leftovers()
})
