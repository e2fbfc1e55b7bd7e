# Single calls for whoever is free.

watch_processes()

calls_of <- function(cl) rustcluster:::recordsOf(cl[[1L]]$handle)

test_that("a call returns its value, and its object its state", {
  cl <- local_cluster(2)
  call <- clusterSubmit(cl, {
    while (!file.exists(flag)) Sys.sleep(0.01)
    list(pid = Sys.getpid(), sum = 1 + 1)
  }, flag = flag <- tempfile())
  expect_s3_class(call, "RustCall")
  expect_equal(call$status(), "running")
  expect_match(format(call), "^<call .*: running on worker [12] on host .localhost., [0-9.]+ s>$")
  file.create(flag)
  value <- call$value()
  expect_equal(value$sum, 2)
  expect_true(value$pid %in% clusterPids(cl))
  expect_identical(call$value(), value)
  expect_equal(call$status(), "done")
  expect_output(print(call), "done")
  expect_null(clusterSubmit(cl, NULL)$value())
  expect_identical(clusterSubmit(cl, invisible(3))$value(), 3)
})

test_that("future's value() and resolved() work on calls", {
  skip_if_not_installed("future")
  cl <- local_cluster(2)
  held <- function(flag, value) {
    while (!file.exists(flag)) Sys.sleep(0.01)
    value
  }
  flag <- tempfile()
  call <- clusterSubmit(cl, held(flag, list(1, "a")))
  all <- clusterLapplyAsync(cl, c(a = 1, b = 2, c = 3), function(x, held, flag) held(flag, -x), held, flag)
  expect_false(future::resolved(call))
  expect_false(future::resolved(all))
  file.create(flag)
  expect_identical(future::value(call), list(1, "a"))
  expect_identical(future::value(future = call), call$value())
  expect_identical(future::value(all, signal = FALSE), list(a = -1, b = -2, c = -3))
  expect_true(future::resolved(call))
  expect_true(future::resolved(all))
  expect_null(future::value(clusterSubmit(cl, NULL)))

  calls <- lapply(1:6, function(i) clusterSubmit(cl, i * 10))
  expect_identical(vapply(calls, future::value, 0), 1:6 * 10)
  expect_true(all(vapply(calls, future::resolved, NA)))
  # future's method for lists leaves them as they are.
  expect_identical(future::value(calls), calls)

  failed <- clusterSubmit(cl, stop("no such luck"))
  error <- caught(future::value(failed))
  expect_identical(error, caught(failed$value()))
  expect_identical(future::value(failed, signal = FALSE), error)
  expect_true(future::resolved(failed))
  failed <- clusterLapplyAsync(cl, 1:3, function(i) if (i == 2) stop("two") else i)
  error <- caught(future::value(failed))
  expect_rust_error(error, "element_failed")
  expect_identical(future::value(failed, signal = FALSE), error)
  expect_identical(error$results, list(1L, NULL, 3L))

  slow <- clusterSubmit(cl, Sys.sleep(60))
  expect_false(future::resolved(slow))
  slow$cancel()
  expect_true(future::resolved(slow))
  expect_rust_error(caught(future::value(slow)), "cancelled")
  expect_s3_class(future::value(slow, signal = FALSE), "rustcluster_cancelled")
  expect_rust_error(caught(future::value(call, signal = NA)), "bad_argument")
})

test_that("calls do not load future, and its generics work when it is loaded", {
  skip_if_not_installed("future")
  run <- function(code) {
    script <- tempfile(fileext = ".R")
    writeLines(code, script)
    system2(file.path(R.home("bin"), "Rscript"), script, stdout = TRUE, stderr = TRUE)
  }
  use <- c("cl <- rustcluster::makeRustCluster(1)", "call <- rustcluster::clusterSubmit(cl, 6 * 7)")
  expect_identical(run(c(
    use, "loaded <- isNamespaceLoaded('future')", "cat(loaded, future::value(call), future::resolved(call))",
    "parallel::stopCluster(cl)"
  )), "FALSE 42 TRUE")
  expect_identical(run(c(
    "library(future)", use, "cat(value(call), resolved(call))", "parallel::stopCluster(cl)"
  )), "42 TRUE")
})

test_that("calls wait first in, first out, and start while the session is busy", {
  cl <- local_cluster(1)
  log <- tempfile()
  note <- function(i) cat(i, "\n", file = log, append = TRUE)
  calls <- lapply(1:20, function(i) clusterSubmit(cl, note(i)))
  # No function of ours is called in the meantime.
  expect_true(wait_until(function() file.exists(log) && length(readLines(log)) == 20L))
  expect_identical(as.integer(readLines(log)), 1:20)
  for (call in calls) expect_null(call$value())
})

test_that("variables are sent, of the function, of the global environment and of functions that use them", {
  cl <- local_cluster(2)
  global({
    calls_offset <- 100
    calls_add <- function(x) x + calls_offset
  })
  on.exit(rm(list = c("calls_offset", "calls_add"), envir = globalenv()), add = TRUE, after = FALSE)
  local <- 5
  twice <- function(x) 2 * calls_add(x)
  unused <- function() stop("not to be looked at")
  delayedAssign("lazy", stop("not to be evaluated"))
  # parallel's workers have none of it, before and after.
  expect_false(any(unlist(clusterCall(cl, exists, "calls_offset"))))
  expect_equal(clusterSubmit(cl, twice(local))$value(), 210)
  expect_equal(clusterSubmit(cl, sapply(1:3, function(local) calls_add(local)))$value(), 101:103)
  expect_false(any(unlist(clusterCall(cl, exists, "calls_offset"))))
  # What is there for good is there again.
  clusterEvalQ(cl, calls_offset <- -1)
  expect_equal(clusterSubmit(cl, calls_add(1))$value(), 101)
  expect_equal(unlist(clusterEvalQ(cl, calls_offset)), c(-1, -1))
  expect_equal(clusterSubmit(cl, given + local, given = 1)$value(), 6)
  missing_one <- function(cl, x) clusterSubmit(cl, if (FALSE) x else 9)
  expect_equal(missing_one(cl)$value(), 9)
  expect_equal(do.call(clusterSubmit, list(cl, quote(1 + 2)))$value(), 3)
  env <- list2env(list(hidden = 8))
  expect_equal(clusterSubmit(cl, hidden, .envir = env)$value(), 8)
  # A package's own function is known where the package is not attached.
  inside <- function(cl) clusterSubmit(cl, formatBytes(2e6))
  environment(inside) <- asNamespace("rustcluster")
  expect_equal(inside(cl)$value(), "2.0 MB")
})

test_that("packages that are attached here, or named, are attached there", {
  cl <- local_cluster(1)
  expect_false("package:tools" %in% clusterEvalQ(cl, search())[[1L]])
  expect_equal(clusterSubmit(cl, toTitleCase("an example"), .packages = "tools")$value(), "An Example")
  cl2 <- local_cluster(1)
  attached <- "package:tools" %in% search()
  library(tools)
  if (!attached) on.exit(detach("package:tools"), add = TRUE, after = FALSE)
  expect_equal(clusterSubmit(cl2, toTitleCase("an example"))$value(), "An Example")
  failed <- caught(clusterSubmit(cl, 1, .packages = "no.such.package")$value())
  expect_match(conditionMessage(failed), "no.such.package")
})

test_that("an error is that of the expression, with its class, call and data", {
  cl <- local_cluster(1)
  plain <- clusterSubmit(cl, stop("100%s of it"))
  error <- caught(plain$value())
  expect_identical(class(error), c("simpleError", "error", "condition"))
  expect_identical(conditionMessage(error), "100%s of it")
  expect_null(conditionCall(error))
  expect_equal(plain$status(), "failed")
  expect_identical(caught(plain$value()), error)
  own <- caught(clusterSubmit(cl, stop(structure(
    class = c("mine", "error", "condition"), list(message = "m", call = quote(f(x)), data = 1:3)
  )))$value())
  expect_identical(class(own), c("mine", "error", "condition"))
  expect_identical(conditionCall(own), quote(f(x)))
  expect_identical(own$data, 1:3)
  f <- function(x) log(x)
  expect_identical(conditionCall(caught(clusterSubmit(cl, f("a"))$value())), quote(log(x)))
  # The worker goes on.
  expect_equal(clusterSubmit(cl, 1)$value(), 1)
})

test_that("a value that cannot be sent or read is an error of its call only", {
  cl <- local_cluster(1, packages = character())
  suppressWarnings(expect_rust_error(caught(clusterSubmit(cl, quit("no", 3))$value()), "task_failed"))
  expect_equal(clusterSubmit(cl, "on it goes")$value(), "on it goes")
})

test_that("bad arguments are refused", {
  cl <- local_cluster(1)
  expect_rust_error(caught(clusterSubmit(1, 2)), "bad_argument")
  expect_rust_error(caught(clusterSubmit(cl)), "bad_argument")
  expect_rust_error(caught(clusterSubmit(cl, 1, 2)), "bad_argument")
  # R completes the names of arguments.
  error <- caught(clusterSubmit(cl, stop(e), e = 1))
  expect_rust_error(error, "bad_argument")
  expect_match(conditionMessage(error), "`e` cannot be the name of a variable: R takes it for `expr`", fixed = TRUE)
  expect_match(conditionMessage(caught(clusterSubmit(cl, sum(c), c = 1))), "takes it for `cl`", fixed = TRUE)
  expect_rust_error(caught(clusterSubmit(cl, 1, .packages = NA)), "bad_argument")
  expect_rust_error(caught(clusterSubmit(cl, 1, .envir = 3)), "bad_argument")
  expect_rust_error(caught(clusterSubmit(NULL, 1)), "bad_argument")
  error <- caught(clusterSubmit(cl, 1, .timeout = 2))
  expect_rust_error(error, "bad_argument")
  expect_identical(error$argument, ".timeout")
  expect_equal(clusterSubmit(cl, .x + 1, .x = 2)$value(), 3)
  error <- caught(clusterLapplyAsync(cl, 1, sqrt, .timeout = 2))
  expect_match(conditionMessage(error), "neither an argument of clusterLapplyAsync()", fixed = TRUE)
  expect_match(conditionMessage(caught(clusterSubmit(cl[0], 1))), "`cl` has no nodes", fixed = TRUE)
  parallel::setDefaultCluster(cl)
  on.exit(parallel::setDefaultCluster(NULL), add = TRUE, after = FALSE)
  expect_equal(clusterSubmit(expr = 5)$value(), 5)
})

test_that("verbs and calls do not affect each other", {
  cl <- local_cluster(2)
  global(calls_slow <- function(s, x) {
    Sys.sleep(s)
    x
  })
  on.exit(rm("calls_slow", envir = globalenv()), add = TRUE, after = FALSE)
  calls <- lapply(1:8, function(i) clusterSubmit(cl, calls_slow(0.05, i)))
  # Verbs of ours and of parallel's, static and dynamic, while calls run and wait.
  expect_equal(parSapply(cl, 1:10, function(i) i), 1:10)
  expect_equal(parallel::parSapply(cl, 1:10, function(i) i), 1:10)
  expect_equal(unlist(clusterApplyLB(cl, 1:10, function(i) i)), 1:10)
  expect_equal(unlist(parallel::clusterApplyLB(cl, 1:10, function(i) i)), 1:10)
  expect_equal(clusterLapply(cl, 1:10, function(i) i), as.list(1:10))
  expect_length(unique(unlist(clusterCall(cl, Sys.getpid))), 2L)
  # By hand.
  calls <- c(calls, lapply(9:12, function(i) clusterSubmit(cl, calls_slow(0.05, i))))
  parallel:::sendCall(cl[[1]], identity, list("by hand"))
  parallel:::sendCall(cl[[1]], identity, list("second"))
  expect_equal(parallel:::recvResult(cl[[1]]), "by hand")
  expect_equal(parallel:::recvOneResult(cl)$value, "second")
  expect_rust_error(caught(parallel:::recvResult(cl[[1]])), "no_task")
  expect_equal(vapply(calls, function(call) call$value(), 0), 1:12)
  # An interrupted verb cancels its own.
  call <- clusterSubmit(cl[1], calls_slow(1, "not hit"))
  interrupted(clusterApply(cl, c(60, 60), Sys.sleep), 0.2)
  expect_equal(clusterApply(cl, 1:2, identity), list(1L, 2L))
  expect_equal(call$value(), "not hit")
})

test_that(".timeout of an element does not include the time of a call", {
  cl <- local_cluster(1)
  calls <- lapply(1:4, function(i) clusterSubmit(cl, Sys.sleep(0.4)))
  expect_equal(clusterLapply(cl, 1:3, function(i) i, .timeout = 0.3), list(1L, 2L, 3L))
  for (call in calls) expect_null(call$value())
})

test_that("waiting for a call during a verb ends", {
  cl <- local_cluster(2)
  got <- list()
  clusterLapply(cl, 1:3, identity, .onResult = function(i, value) {
    got[[i]] <<- clusterSubmit(cl, value * 10)$value()
  })
  expect_equal(got, list(10, 20, 30))
})

test_that("a call that waits, and one that runs, can be cancelled", {
  cl <- local_cluster(1)
  first <- clusterSubmit(cl, Sys.sleep(60))
  second <- clusterSubmit(cl, "second")
  third <- clusterSubmit(cl, "third")
  expect_equal(second$status(), "waiting")
  expect_true(second$cancel())
  expect_equal(second$status(), "cancelled")
  expect_true(first$cancel())
  expect_equal(third$value(), "third")
  expect_false(first$cancel())
  expect_false(third$cancel())
  expect_rust_error(caught(first$value()), "cancelled")
  expect_rust_error(caught(second$value()), "cancelled")
})

test_that("an interrupt in value() does not affect the call", {
  cl <- local_cluster(1)
  go <- withr::local_tempfile()
  call <- clusterSubmit(cl, {
    while (!file.exists(go)) Sys.sleep(0.01)
    "there"
  })
  interrupted(call$value(), 0.2)
  expect_equal(call$status(), "running")
  file.create(go)
  expect_equal(call$value(), "there")
  # In the middle of reading it.
  call <- clusterSubmit(cl, lapply(1:5e5, as.character))
  for (after in c(0.3, 0.5, 0.8)) {
    interrupt_after(after)
    tryCatch({
      call$value()
      Sys.sleep(10)
    }, interrupt = function(e) NULL)
  }
  expect_equal(length(call$value()), 5e5)
})

test_that("an interrupt while many calls are read or cancelled leaves none open for ever", {
  cl <- local_cluster(2)
  for (way in c("value", "cancel")) {
    for (k in 1:4) {
      calls <- lapply(1:500, function(i) clusterSubmit(cl, i, i = i))
      # All have ended, so that what is interrupted is what follows.
      calls[[500]]$value()
      interrupted(for (call in calls) call[[way]](), after = 0.01 * k)
      states <- vapply(calls, function(call) {
        tryCatch(call$value(), rustcluster_cancelled = function(e) NULL)
        call$status()
      }, "")
      expect_true(all(states %in% c("done", "cancelled")))
    }
  }
})

test_that("a call is retried after worker failures, and fails after the last attempt", {
  cl <- local_cluster(2)
  traps <- trap(1)
  call <- clusterSubmit(cl, {
    spring(traps)
    "at last"
  })
  got <- with_losses(call$value())
  expect_equal(got$value, "at last")
  expect_length(got$losses, 1L)
  expect_match(conditionMessage(got$losses[[1L]]), "SIGKILL.*the call is retried")
  bad <- clusterSubmit(cl, poison(1, 1))
  good <- clusterSubmit(cl, poison(2, 1))
  error <- suppressWarnings(caught(bad$value()))
  expect_rust_error(error, "task_failed")
  expect_length(error$losses, 3L)
  expect_match(conditionMessage(error), "task 1: 100%s", fixed = TRUE)
  expect_equal(good$value(), 20)
  once <- local_cluster(1, retries = 0)
  error <- suppressWarnings(caught(clusterSubmit(once, poison(1, 1))$value()))
  expect_rust_error(error, "worker_lost")
  expect_identical(error$signal, 9L)
})

test_that("a warning of a worker failure that is turned into an error loses no result", {
  cl <- local_cluster(2)
  old <- options(warn = 2)
  on.exit(options(old), add = TRUE, after = FALSE)
  insist <- function(call) {
    repeat {
      value <- tryCatch(call$value(), error = identity)
      if (!inherits(value, "error")) return(value)
      expect_match(conditionMessage(value), "converted from warning.*the call is retried")
    }
  }
  traps <- list(trap(1), trap(1))
  calls <- lapply(traps, function(traps) {
    clusterSubmit(cl, {
      spring(traps)
      "at last"
    })
  })
  expect_equal(vapply(calls, insist, ""), c("at last", "at last"))
  # It is cancelled all the same.
  pids <- clusterPids(cl)
  traps <- trap(1)
  call <- clusterSubmit(cl, {
    spring(traps)
    Sys.sleep(60)
  })
  expect_true(wait_until(function() !identical(clusterPids(cl), pids)))
  expect_true(call$cancel())
  expect_equal(call$status(), "cancelled")
  # It is told of later.
  expect_error(clusterSubmit(cl, 1)$value(), "the call is retried")
})

test_that("calls fail when no worker is left", {
  cl <- local_cluster(2)
  calls <- lapply(1:4, function(i) clusterSubmit(cl, Sys.sleep(60)))
  tools::pskill(agentPids(cl), tools::SIGKILL)
  for (call in calls) {
    error <- suppressWarnings(caught(call$value()))
    expect_rust_error(error, "host_failed")
  }
  error <- suppressWarnings(caught(clusterSubmit(cl, 1)$value()))
  expect_rust_error(error, "host_failed")
})

test_that("a call that exceeds `timeout` is an error", {
  cl <- local_cluster(1, timeout = 0.3)
  slow <- clusterSubmit(cl, Sys.sleep(60))
  expect_rust_error(caught(slow$value()), "timeout")
  expect_equal(slow$status(), "failed")
  expect_equal(clusterSubmit(cl, 1)$value(), 1)
})

test_that("a part of a cluster gets its calls, and a stopped node none", {
  cl <- local_cluster(3)
  pids <- clusterPids(cl)
  calls <- lapply(1:6, function(i) clusterSubmit(cl[2:3], Sys.getpid()))
  expect_true(all(vapply(calls, function(call) call$value(), 0L) %in% pids[2:3]))
  parallel::stopCluster(cl[2])
  expect_equal(clusterSubmit(cl[2:3], Sys.getpid())$value(), pids[[3L]])
  expect_rust_error(caught(clusterSubmit(cl[2], 1)$value()), "stopped")
})

test_that("a call whose object is garbage-collected is cancelled", {
  cl <- local_cluster(1)
  (function() clusterSubmit(cl, Sys.sleep(60)))()
  kept <- clusterSubmit(cl, "kept")
  invisible(gc())
  expect_equal(kept$value(), "kept")
  expect_length(calls_of(cl), 0L)
})

test_that("a garbage collection at any point cancels only calls without an object", {
  cl <- local_cluster(1)
  drop <- function() {
    clusterSubmit(cl, NULL)
    NULL
  }
  # Collects once, after so many allocations: the finalizer of a dropped call runs there.
  on.exit(gctorture2(0), add = TRUE, after = FALSE)
  anywhere <- function(f, to, by) {
    for (after in seq(10, to, by)) {
      gc(FALSE)
      drop()
      gctorture2(1e7, after)
      value <- f()
      gctorture2(0)
      expect_identical(value, 7)
    }
  }
  anywhere(function() clusterSubmit(cl, 7)$value(), 900, if (long_tests()) 3 else 71)
  anywhere(function() clusterLapplyAsync(cl, 7, identity)$value()[[1L]], 900, if (long_tests()) 3 else 149)
  anywhere(function() {
    clusterSubmit(cl, 8)$cancel()
    7
  }, 900, if (long_tests()) 3 else 149)
  for (i in 1:2) gc()
  expect_length(calls_of(cl), 0L)
  expect_true(wait_until(function() all(clusterStatus(cl, memory = FALSE)$state == "idle")))
  # The table goes with the cluster.
  id <- cl[[1L]]$handle$id
  expect_true(exists(id, rustcluster:::openCalls))
  other <- rustcluster:::newHandle(NULL, list())
  id <- other$id
  rm(other)
  gc()
  expect_false(exists(id, rustcluster:::openCalls))
})

test_that("a finalizer that makes a call does not affect other calls", {
  cl <- local_cluster(1)
  made <- 0
  leave <- function() {
    e <- new.env()
    reg.finalizer(e, function(e) made <<- made + inherits(clusterSubmit(cl, 1), "RustCall"))
    NULL
  }
  on.exit(gctorture2(0), add = TRUE, after = FALSE)
  for (after in seq(10, 700, if (long_tests()) 7 else 69)) {
    gc(FALSE)
    leave()
    gctorture2(1e7, after)
    # In the middle of writing a message it is refused, which is a warning of R's.
    value <- suppressWarnings(clusterSubmit(cl, x + 1, x = 6)$value())
    gctorture2(0)
    expect_identical(value, 7)
  }
  expect_gt(made, 0)
})

test_that("each of several worker failures is reported, although the first handler jumps", {
  cl <- local_cluster(3)
  tools::pskill(clusterPids(cl)[1:2], tools::SIGKILL)
  expect_true(wait_until(function() sum(clusterStatus(cl, memory = FALSE)$losses) == 2L))
  told <- list()
  for (i in 1:3) {
    told <- c(told, list(tryCatch({
      rustcluster:::showEvents(cl[[1L]]$handle)
      NULL
    }, warning = identity)))
  }
  expect_setequal(vapply(told[1:2], `[[`, 0L, "rank"), 1:2)
  expect_null(told[[3L]])
})

test_that("stopCluster() ends calls, and a fork refuses", {
  cl <- makeRustCluster(1)
  note_processes(cl)
  calls <- lapply(1:3, function(i) clusterSubmit(cl, Sys.sleep(60)))
  done <- clusterSubmit(cl[1], 1)
  forked <- parallel::mccollect(parallel::mcparallel({
    list(caught(calls[[1]]$value()), caught(calls[[1]]$status()), caught(calls[[1]]$cancel()),
         caught(clusterSubmit(cl, 1)))
  }))[[1L]]
  for (error in forked) expect_rust_error(error, "forked")
  expect_equal(calls[[1L]]$status(), "running")
  parallel::stopCluster(cl)
  for (call in calls) {
    expect_rust_error(caught(call$value()), "stopped")
    expect_equal(call$status(), "failed")
    expect_false(call$cancel())
  }
  expect_rust_error(caught(clusterSubmit(cl, 1)), "stopped")
  expect_length(calls_of(cl), 0L)
})

test_that("large arguments and results are sent, also beyond `buffer_limit`", {
  cl <- local_cluster(2, buffer_limit = 2^20)
  x <- as.numeric(1:1e6)
  calls <- lapply(1:6, function(i) clusterSubmit(cl, x + i))
  # The last first: the others are in its way.
  for (i in 6:1) expect_identical(calls[[i]]$value()[c(1, 1e6)], c(1, 1e6) + i)
})

test_that("clusterLapplyAsync() returns the same as clusterLapply()", {
  cl <- local_cluster(2)
  f <- function(i, by) i * by
  x <- setNames(1:50, paste0("n", 1:50))
  expect_identical(clusterLapplyAsync(cl, x, f, by = 2)$value(), clusterLapply(cl, x, f, by = 2))
  expect_identical(clusterLapplyAsync(cl, list(), f)$value(), list())
  expect_identical(
    clusterLapplyAsync(cl, 1:5, function(i) rnorm(1), .seed = 7)$value(),
    clusterLapply(cl, 1:5, function(i) rnorm(1), .seed = 7)
  )
  failed <- clusterLapplyAsync(cl, 1:10, function(i) if (i %in% c(3, 9)) stop("bad ", i) else i)
  error <- caught(failed$value())
  expect_rust_error(error, "element_failed")
  expect_identical(error$indices, c(3L, 9L))
  expect_identical(error$results[c(1, 3)], list(1L, NULL))
  expect_identical(conditionMessage(error$parent), "bad 3")
  expect_equal(failed$status(), "failed")
  slow <- clusterLapplyAsync(cl, 1:100, function(i) Sys.sleep(60))
  expect_equal(slow$status(), "running")
  expect_true(slow$cancel())
  expect_equal(slow$status(), "cancelled")
  expect_rust_error(error <- caught(slow$value()), "cancelled")
  expect_identical(error$indices, 1:100)
  expect_output(print(slow), "cancelled")
  lost <- clusterLapplyAsync(cl, 1:2, function(i) if (i == 2) tools::pskill(Sys.getpid(), 9) else i)
  expect_rust_error(error <- suppressWarnings(caught(lost$value())), "task_failed")
  expect_identical(error$indices, 2L)
  expect_identical(error$results, list(1L, NULL))
  both <- clusterLapplyAsync(cl, 1:3, function(i) {
    if (i == 2) tools::pskill(Sys.getpid(), 9)
    if (i == 3) stop("bad")
    i
  })
  expect_rust_error(error <- suppressWarnings(caught(both$value())), "task_failed")
  expect_identical(error$indices, 2:3)
  expect_identical(lapply(error$errors, conditionMessage), list(`3` = "bad"))
  # What looks like the package's own is a value.
  raised <- global(function(i) structure(list(error = simpleError("no")), class = "rustcluster_raised"))
  expect_identical(clusterLapplyAsync(cl, 1:2, raised)$value(), lapply(1:2, raised))
  expect_identical(clusterSubmit(cl, raised(1))$value(), raised(1))
  expect_rust_error(caught(clusterLapplyAsync(cl, 1:3, function(i) i, .sede = 1)), "bad_argument")
})

test_that("thousands of open calls work", {
  cl <- local_cluster(2)
  calls <- lapply(1:3000, function(i) clusterSubmit(cl, i * 2))
  expect_identical(vapply(calls, function(call) call$value(), 0), 1:3000 * 2)
  slow <- lapply(1:3000, function(i) clusterSubmit(cl, Sys.sleep(60)))
  expect_true(all(vapply(slow, function(call) call$cancel(), NA)))
  expect_identical(clusterSubmit(cl, 1)$value(), 1)
})

test_that("a call is printed in one line", {
  cl <- local_cluster(1)
  shown <- function(call) sub("<call (.*): [a-z]+.*", "\\1", format(call))
  expect_equal(shown(clusterSubmit(cl, { a <- 1; a + 2 })), "{ a <- 1; a + 2 }")
  expect_equal(shown(clusterSubmit(cl, if (TRUE) { 1; 2 } else 3)), "if (TRUE) { 1; 2 } else 3")
  expect_equal(shown(clusterSubmit(cl, { if (TRUE) 1 else 2; 3 })), "{ if (TRUE) 1 else 2; 3 }")
  expect_equal(shown(clusterSubmit(cl, sum(1, 2))), "sum(1, 2)")
})

test_that("a call that the session waits for passes results and retries of other tasks", {
  cl <- local_cluster(2, buffer_limit = 2^20)
  # Each is larger than the limit, and nobody reads it yet.
  for (node in cl) parallel:::sendCall(node, numeric, list(1e6))
  running <- function() any(clusterStatus(cl)$state == "running")
  wait_until(function() !running(), timeout = 20)
  expect_identical(clusterSubmit(cl, 6 * 7)$value(), 42)
  expect_identical(clusterSubmit(cl[1], 6 * 7)$value(), 42)
  for (node in cl) expect_identical(parallel:::recvData(node)$value, numeric(1e6))
  got <- clusterLapply(cl, 1:6, function(i) numeric(1e6), .onResult = function(i, value) {
    expect_identical(clusterSubmit(cl, i)$value(), i)
  })
  expect_identical(got, rep(list(numeric(1e6)), 6))
  # The session decides on the retry of a lost task when it waits for that task.
  single <- local_cluster(1, retries = 1)
  parallel:::sendCall(single[[1]], poison, list(1, 1))
  expect_identical(clusterSubmit(single, 6 * 7)$value(), 42)
  got <- with_losses(parallel:::recvData(single[[1]]))
  expect_s3_class(got$value$value, "rustcluster_failure")
  seen <- NULL
  marks <- tempfile()
  once <- eval(quote(function(i, marks) {
    if (i == 1 && !file.exists(marks)) {
      file.create(marks)
      tools::pskill(Sys.getpid(), 9)
      Sys.sleep(60)
    }
    i
  }), globalenv())
  got <- withCallingHandlers(
    clusterApply(single, 1:3, once, marks),
    rustcluster_worker_lost = function(w) {
      seen <<- clusterSubmit(single, 6 * 7)$value()
      invokeRestart("muffleWarning")
    }
  )
  unlink(marks)
  expect_identical(got, list(1L, 2L, 3L))
  expect_identical(seen, 42)
})

test_that("no process is left", {
  expect_no_leftovers()
})
