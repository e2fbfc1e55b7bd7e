# Calls as promises: the session is woken when one has ended.

watch_processes()

skip_if_not_installed("promises")
skip_if_not_installed("later")

# Runs the event loop until something is there, without looking for it.
run_until <- function(there, most = 20) {
  deadline <- proc.time()[[3L]] + most
  while (!there() && proc.time()[[3L]] < deadline) later::run_now(deadline - proc.time()[[3L]])
  there()
}

then_note <- function(call, seen, name) {
  promises::then(
    promises::as.promise(call),
    function(value) seen[[name]] <- value,
    function(error) seen[[name]] <- error
  )
}

test_that("a promise is fulfilled, or rejected with the error", {
  cl <- local_cluster(2)
  seen <- new.env()
  call <- clusterSubmit(cl, {
    Sys.sleep(0.2)
    6 * 7
  })
  expect_true(promises::is.promising(call))
  then_note(call, seen, "value")
  then_note(clusterSubmit(cl, stop("no")), seen, "error")
  ended <- clusterSubmit(cl, "before")
  ended$value()
  then_note(ended, seen, "before")
  expect_true(run_until(function() length(ls(seen)) == 3L))
  expect_equal(seen$value, 42)
  expect_identical(conditionMessage(seen$error), "no")
  expect_equal(seen$before, "before")
  expect_equal(call$value(), 42)
})

test_that("nobody looks until there is something to look at", {
  cl <- local_cluster(1)
  seen <- new.env()
  looks <- 0L
  looking <- rustcluster:::lookAtCalls
  local_function("lookAtCalls", function(handle) {
    looks <<- looks + 1L
    looking(handle)
  })
  then_note(clusterSubmit(cl, Sys.sleep(1)), seen, "value")
  expect_true(run_until(function() exists("value", seen)))
  expect_lte(looks, 2L)
})

test_that("many more than there are workers, in their order, and other things go on", {
  cl <- local_cluster(2)
  seen <- new.env()
  ticks <- 0
  tick <- function() {
    ticks <<- ticks + 1
    if (length(ls(seen)) < 30L) later::later(tick, 0.02)
  }
  later::later(tick, 0)
  for (i in 1:30) local({
    i <- i
    then_note(clusterSubmit(cl, {
      Sys.sleep(0.03)
      i
    }), seen, format(100 + i))
  })
  expect_true(run_until(function() length(ls(seen)) == 30L))
  expect_equal(unname(unlist(mget(ls(seen), seen))), 1:30)
  expect_gt(ticks, 5)
})

test_that("a promise keeps its call and its cluster", {
  seen <- new.env()
  pid <- local({
    cl <- makeRustCluster(1)
    note_processes(cl)
    then_note(clusterSubmit(cl, {
      Sys.sleep(0.5)
      "kept"
    }), seen, "value")
    clusterPids(cl)
  })
  for (i in 1:3) gc()
  expect_alive(pid)
  expect_true(run_until(function() exists("value", seen)))
  expect_equal(seen$value, "kept")
  for (i in 1:3) gc()
  expect_gone(pid)
})

test_that("losses are dealt with while the session is idle", {
  cl <- local_cluster(2)
  seen <- new.env()
  traps <- trap(1)
  then_note(clusterSubmit(cl, {
    spring(traps)
    "at last"
  }), seen, "again")
  then_note(clusterSubmit(cl, poison(1, 1)), seen, "lost")
  # Warnings in the event loop are nobody's to catch.
  suppressWarnings(run_until(function() length(ls(seen)) == 2L))
  expect_equal(seen$again, "at last")
  expect_rust_error(seen$lost, "task_failed")
  expect_length(seen$lost$losses, 3L)
})

test_that("cancelled and stopped calls are rejected", {
  cl <- makeRustCluster(1)
  note_processes(cl)
  seen <- new.env()
  calls <- lapply(1:2, function(i) clusterSubmit(cl, Sys.sleep(60)))
  then_note(calls[[1L]], seen, "cancelled")
  then_note(calls[[2L]], seen, "stopped")
  calls[[1L]]$cancel()
  parallel::stopCluster(cl)
  expect_true(run_until(function() length(ls(seen)) == 2L))
  expect_rust_error(seen$cancelled, "cancelled")
  expect_rust_error(seen$stopped, "stopped")
})

test_that("clusterLapplyAsync() is a promise of a list", {
  cl <- local_cluster(2)
  seen <- new.env()
  then_note(clusterLapplyAsync(cl, c(a = 1, b = 2), function(x) x^2), seen, "list")
  then_note(clusterLapplyAsync(cl, 1:4, function(x) if (x == 2) stop("two") else x), seen, "error")
  then_note(clusterLapplyAsync(cl, list(), identity), seen, "empty")
  expect_true(run_until(function() length(ls(seen)) == 3L))
  expect_identical(seen$list, list(a = 1, b = 4))
  expect_rust_error(seen$error, "element_failed")
  expect_identical(seen$error$index, 2L)
  expect_identical(seen$empty, list())
})

test_that("a loop of its own is woken, too", {
  cl <- local_cluster(1)
  seen <- new.env()
  loop <- later::create_loop()
  later::with_loop(loop, then_note(clusterSubmit(cl, {
    Sys.sleep(0.2)
    1
  }), seen, "value"))
  for (i in 1:20) {
    if (exists("value", seen)) break
    later::run_now(1, loop = loop)
  }
  expect_equal(seen$value, 1)
})

test_that("results larger than what is buffered come", {
  cl <- local_cluster(2, buffer_limit = 2^20)
  seen <- new.env()
  held <- lapply(1:2, function(i) clusterSubmit(cl, numeric(1e6)))
  for (i in 1:4) then_note(clusterSubmit(cl, numeric(1e6)), seen, as.character(i))
  held[[1L]]$value()
  held[[2L]]$value()
  expect_true(run_until(function() length(ls(seen)) == 4L))
})

test_that("nothing is left", {
  expect_no_leftovers()
})
