# `%dopar%` gives with our backend what it gives with doParallel on PSOCK, and so does doParallel on one of
# our clusters.

skip_on_cran()
skip_if_not_installed("foreach")
skip_if_not_installed("doParallel")
watch_processes()
suppressPackageStartupMessages(library(foreach))

with_backend <- function(register, code) {
  register()
  on.exit(registerDoSEQ(), add = TRUE, after = FALSE)
  code
}

# Evaluates the call with each backend and compares all that it gives. Returns the outcome of ours.
expect_same_loop <- function(expr, ..., fails = FALSE) {
  expr <- strip_srcref(substitute(expr))
  values <- list(...)
  pair <- cluster_pair(3L)
  with_values <- function(register) with_backend(register, outcome(expr, NULL, values))
  want <- with_values(function() doParallel::registerDoParallel(pair$psock))
  got <- list(
    ours = with_values(function() registerDoRustCluster(pair$ours)),
    doParallel = with_values(function() doParallel::registerDoParallel(pair$rust))
  )
  for (name in names(got)) {
    same <- identical(got[[name]], want)
    expect(same, if (!same) {
      paste0(
        paste(deparse(expr), collapse = "\n"), " differs\nPSOCK:\n", describe_outcome(want),
        "\n", name, ":\n", describe_outcome(got[[name]])
      )
    } else "")
  }
  failed <- !is.null(want$result$message)
  expect(failed == fails, paste0(deparse(expr)[[1L]], if (failed) " failed: " else " did not fail", want$result$message))
  invisible(got$ours)
}

test_that("results and how they are combined", {
  expect_same_loop(foreach(i = 1:10) %dopar% i^2)
  expect_same_loop(foreach(i = 1:10, .combine = c) %dopar% i^2)
  expect_same_loop(foreach(i = 1:10, .combine = "+") %dopar% i)
  expect_same_loop(foreach(i = 1:5, .combine = rbind) %dopar% c(a = i, b = -i))
  expect_same_loop(foreach(i = 1:5, .combine = cbind, .init = 0) %dopar% i)
  expect_same_loop(foreach(i = 1:5, .combine = c, .init = quote(x)) %dopar% i)
  expect_same_loop(foreach(i = 1:6, .final = function(x) rev(x)) %dopar% i)
  expect_same_loop(foreach(i = 1:3, j = 4:6, .combine = rbind) %dopar% c(i, j))
  expect_same_loop(foreach(i = 1:3, j = 1:10) %dopar% (i * j))
  expect_same_loop(foreach(x = list(1, NULL, "a")) %dopar% x)
  expect_same_loop(foreach(x = data.frame(a = 1:3, b = 4:6)) %dopar% sum(x))
  expect_same_loop(foreach(icount(5)) %dopar% 7, icount = iterators::icount)
  expect_same_loop(foreach(1:3) %dopar% 7)
  expect_same_loop(times(4) %dopar% 1L)
  expect_same_loop(foreach(i = integer()) %dopar% i)
  expect_same_loop(foreach(i = integer(), .combine = c) %dopar% i)
  expect_same_loop(foreach(i = 1:3) %dopar% NULL)
  expect_same_loop(foreach(i = 1:3, .combine = c) %dopar% if (i == 2) NULL else i)
  expect_same_loop(foreach(i = 1:3) %dopar% invisible(i))
  expect_same_loop(foreach(i = 1:3) %dopar% try(log(-1:i)))
  expect_same_loop(foreach(i = 1:3) %dopar% class(try(stop("x"), silent = TRUE)))
  expect_same_loop(foreach(i = 1:3) %dopar% {
    warning("not shown")
    i
  })
  expect_same_loop({
    got <- foreach(i = 1:3) %do% i
    got
  })
})

test_that("`.combine` with `.multicombine`", {
  together <- function(...) list(...)
  for (most in c(2, 3, 5, 100)) {
    for (in_order in c(TRUE, FALSE)) {
      got <- expect_same_loop(
        foreach(i = 1:17, .combine = f, .multicombine = TRUE, .maxcombine = most, .inorder = TRUE) %dopar% {
          Sys.sleep((17 - i) / 1000)
          i
        },
        f = together, most = most, in_order = in_order
      )
    }
  }
  expect_equal(unlist(got$result$value), 1:17)
  expect_same_loop(foreach(i = 1:7, .combine = function(a, b) paste0("(", a, b, ")")) %dopar% i)
  expect_same_loop(foreach(i = 1:7, .combine = f, .multicombine = FALSE) %dopar% i, f = together)
  expect_same_loop(sort(foreach(i = 1:50, .combine = c, .inorder = FALSE) %dopar% i))
})

test_that("with .inorder = FALSE results are combined in the order of arrival", {
  cl <- local_cluster(2)
  with_backend(function() registerDoRustCluster(cl), {
    mark <- tempfile()
    got <- foreach(i = 1:2, .combine = function(a, b) {
      file.create(mark)
      c(a, b)
    }, .init = 0, .inorder = FALSE) %dopar% {
      if (i == 1) while (!file.exists(mark)) Sys.sleep(0.01)
      i
    }
    expect_equal(got, c(0, 2, 1))
  })
})

test_that("errors of iterations", {
  for (how in c("stop", "remove", "pass")) {
    fails <- how == "stop"
    expect_same_loop(lapply(foreach(i = 1:6, .errorhandling = how) %dopar% {
      if (i %in% c(2, 5)) stop("no ", i, " 100%s")
      i
    }, function(x) if (inherits(x, "error")) list(class(x), conditionMessage(x)) else x), how = how, fails = fails)
    expect_same_loop(foreach(i = 1:6, .errorhandling = how, .combine = function(...) {
      length(list(...))
    }, .multicombine = TRUE) %dopar% {
      if (i == 1) stop(structure(class = c("mine", "error", "condition"), list(message = "m", call = NULL, data = 7)))
      i
    }, how = how, fails = fails)
    expect_same_loop(foreach(i = 1:3, .errorhandling = how, .combine = c) %dopar% f(i), how = how, f = function(i) {
      g <- function(x) stop("deep")
      if (i > 1) g(i) else i
    }, fails = fails)
    # All of them.
    expect_same_loop(length(foreach(i = 1:3, .errorhandling = how) %dopar% stop("each")), how = how, fails = fails)
  }
  expect_same_loop(foreach(i = 1:3) %dopar% noSuchVariable, fails = TRUE)
  expect_same_loop(foreach(i = 1:3, .packages = "noSuchPackage") %dopar% i, fails = TRUE)
  expect_same_loop(foreach(i = 1:3, .export = "noSuchVariable") %dopar% i, fails = TRUE)
  # An error that is the value counts as one that was raised.
  expect_same_loop(foreach(i = 1:3) %dopar% simpleError("as value"), fails = TRUE)
})

test_that("errors in `.combine`", {
  expect_same_loop(foreach(i = 1:6, .combine = function(a, b) if (b == 4) stop("not four") else a + b) %dopar% i)
  expect_same_loop(foreach(i = 1:2, .final = function(x) stop("final")) %dopar% i, fails = TRUE)
})

test_that("variables are found, exported and copied", {
  offset <- 10
  twice <- function(x) 2 * helper(x)
  helper <- function(x) x + offset
  expect_same_loop(foreach(i = 1:3) %dopar% (i + offset), offset = offset)
  expect_same_loop({
    f <- function(i) i + local
    local <- 5
    foreach(i = 1:3) %dopar% f(i)
  })
  expect_same_loop({
    f <- function(i) i + local
    local <- 5
    foreach(i = 1:3, .noexport = "f") %dopar% f(i)
  }, fails = TRUE)
  expect_same_loop(local({
    f <- function(i) g(i)
    g <- function(i) i + 1
    foreach(i = 1:3, .export = "g") %dopar% f(i)
  }))
  expect_same_loop(foreach(i = 1:3, .export = "offset") %dopar% (i + offset), offset = offset)
  expect_same_loop((function(...) foreach(i = 1:3) %dopar% sum(i, ...))(10, 20))
  expect_same_loop((function(x) foreach(i = 1:3) %dopar% (x + i))(10))
  # What an iteration leaves is there for the next of the same worker.
  expect_same_loop({
    left <- foreach(i = 1:30) %dopar% {
      left <- i
      exists("left")
    }
    unique(left)
  })
  expect_same_loop(foreach(i = 1:3, .packages = "stats4") %dopar% ("package:stats4" %in% search()))
  expect_same_loop(foreach(i = 1:3) %dopar% (parent.env(environment())))
  big <- matrix(stats::rnorm(1e6), 1000)
  expect_same_loop(foreach(j = 1:8, .combine = c) %dopar% sum(big[, j]), big = big)
})

test_that("a loop in a package finds the functions of that package", {
  code <- quote(foreach(i = 1:3) %dopar% exists("comp", inherits = TRUE))
  caller <- eval(call("function", NULL, code), asNamespace("doRNG"))
  expect_same_loop(environmentName(environment(f)), f = caller)
  body(caller) <- quote(foreach::`%dopar%`(foreach::foreach(i = 1:3), exists("doRNGversion")))
  got <- expect_same_loop(f(), f = caller)
  expect_identical(unique(got$result$value), list(TRUE))
})

test_that("nested loops, conditions and iterators", {
  expect_same_loop(foreach(i = 1:3, .combine = rbind) %:% foreach(j = 1:4, .combine = c) %dopar% (10 * i + j))
  expect_same_loop(foreach(i = 1:3) %:% foreach(j = seq_len(i)) %dopar% c(i, j))
  expect_same_loop(foreach(i = 1:10, .combine = c) %:% when(i %% 2 == 0) %dopar% i)
  expect_same_loop(foreach(i = 1:3, .combine = c) %:% foreach(j = 1:3, .combine = c) %:% when(i != j) %dopar% (10 * i + j))
  expect_same_loop(
    foreach(i = 1:3, .combine = c) %:% foreach(j = 1:3, .combine = "+") %dopar% if (i == 2) stop("two") else i,
    fails = TRUE
  )
  expect_same_loop(foreach(i = 1:3) %dopar% {
    foreach::`%do%`(foreach::foreach(j = 1:3, .combine = "+"), i * j)
  })
  expect_same_loop({
    it <- iterators::iter(function() {
      left <<- left - 1
      if (left < 0) stop("StopIteration")
      left
    })
    foreach(x = it, .combine = c) %dopar% x
  }, left = 23)
  expect_same_loop(foreach(row = iterators::iter(m, by = "row"), .combine = c) %dopar% sum(row), m = matrix(1:12, 4))
  expect_same_loop(foreach(x = iterators::isplit(1:9, rep(1:3, 3))) %dopar% x)
  expect_same_loop(foreach(x = iterators::iter(function() stop("iterator"))) %dopar% x, fails = TRUE)
})

test_that(".verbose prints the same as doParallel", {
  lines <- function(outcome) length(outcome$output)
  got <- expect_same_loop(foreach(i = 1:5, .combine = c, .verbose = TRUE, .export = "b") %dopar% (i + a), a = 1, b = 2)
  expect_gt(lines(got), 10)
  expect_same_loop(foreach(i = 1:3, .verbose = TRUE, .errorhandling = "remove") %dopar% if (i == 2) stop("x") else i)
  expect_same_loop(foreach(i = 1:2, .verbose = TRUE) %:% foreach(j = 1:2) %dopar% j)
})

test_that(".options.snow has the same effect as in doParallel", {
  expect_same_loop(foreach(i = 1:3, .options.snow = list(progress = identity, other = 1)) %dopar% i)
  expect_same_loop(foreach(i = 1:3, .options.snow = list(preschedule = TRUE), .verbose = TRUE) %dopar% i)
  expect_same_loop(foreach(i = 1:3, .options.snow = list(preschedule = "a", attachExportEnv = 1:2)) %dopar% i)
  for (attached in c(TRUE, FALSE)) {
    got <- expect_same_loop(foreach(i = 1:3, .export = "asked", .options.snow = list(attachExportEnv = attached)) %dopar% {
      c(exists("asked", globalenv()), "exportEnv" %in% search(), i)
    }, asked = 7, attached = attached)
    expect_equal(got$result$value[[1L]], c(attached, attached, 1))
  }
  # Afterwards nothing is attached any more.
  expect_false(any(unlist(clusterCall(cluster_pair(3L)$ours, function() "exportEnv" %in% search()))))
})

test_that("doRNG draws the same random numbers", {
  skip_if_not_installed("doRNG")
  suppressPackageStartupMessages(library(doRNG))
  expect_same_loop({
    set.seed(1)
    foreach(i = 1:5, .combine = c) %dorng% rnorm(1)
  })
  expect_same_loop(foreach(i = 1:5, .options.RNG = 42) %dorng% runif(2))
  expect_same_loop({
    registerDoRNG(7)
    a <- foreach(i = 1:4, .combine = c) %dopar% rnorm(1)
    b <- foreach(i = 1:4, .combine = c) %dopar% rnorm(1)
    list(a, b, getDoParWorkers())
  })
})

test_that("getDoParName() and getDoParWorkers() after registration", {
  cl <- local_cluster(3)
  on.exit(registerDoSEQ(), add = TRUE, after = FALSE)
  expect_invisible(registerDoRustCluster(cl))
  expect_true(getDoParRegistered())
  expect_identical(getDoParName(), "doRustCluster")
  expect_identical(getDoParVersion(), as.character(utils::packageVersion("rustcluster")))
  expect_identical(getDoParWorkers(), 3L)
  registerDoRustCluster(cl[2])
  expect_identical(getDoParWorkers(), 1L)
  pids <- foreach(i = 1:5, .combine = c) %dopar% Sys.getpid()
  expect_identical(unique(pids), clusterPids(cl)[[2]])
  setDefaultCluster(cl)
  registerDoRustCluster()
  setDefaultCluster(NULL)
  expect_identical(getDoParWorkers(), 3L)
  expect_identical(foreach(i = 1:3) %dopar% i, list(1L, 2L, 3L))
  registerDoRustCluster(cl[c(1, 1)])
  expect_identical(foreach(i = 1:3) %dopar% i, list(1L, 2L, 3L))
  for (bad in list(NULL, 3, list(), cl[0], structure(list(1), class = c("SOCKcluster", "cluster")))) {
    expect_rust_error(caught(registerDoRustCluster(bad)), "bad_argument")
  }
  stopCluster(cl)
  expect_rust_error(caught(foreach(i = 1:3) %dopar% i), "stopped")
  expect_rust_error(caught(registerDoRustCluster(cl)), "stopped")
})

test_that("iterations are retried after worker failures, and fail after the last attempt", {
  cl <- local_cluster(2)
  with_backend(function() registerDoRustCluster(cl), {
    traps <- trap(2)
    offset <- 100
    big <- stats::rnorm(2e5)
    # Again and again: the loop before is not what is restored.
    for (k in 1:3) foreach(i = 1:4) %dopar% c(i, k)
    got <- with_losses(foreach(i = 1:8, .combine = c, .export = "spring") %dopar% {
      if (i %in% 3:4) spring(traps[i - 2])
      i + offset + length(big)
    })
    expect_equal(got$value, 1:8 + 100 + 2e5)
    expect_length(got$losses, 2)

    run <- function(how) {
      suppressWarnings(foreach(i = 1:4, .errorhandling = how, .export = "poison") %dopar% poison(i, 3))
    }
    error <- caught(run("stop"))
    expect_rust_error(error, "task_failed")
    expect_identical(error$index, 3L)
    expect_identical(error$results, list(10, 20, NULL, 40))
    expect_equal(run("remove"), list(10, 20, 40))
    passed <- run("pass")
    expect_rust_error(passed[[3]], "task_failed")
    expect_equal(passed[-3], list(10, 20, 40))
    expect_equal(foreach(i = 1:3, .combine = c) %dopar% (i + offset), 101:103)
  })
})

test_that("the set-up log drops the exports of earlier loops", {
  # Each exports 2 MB, and 8 MB may be kept.
  cl <- local_cluster(2, setup_log_limit = 8e6)
  for (register in list(
    function() registerDoRustCluster(cl), function() doParallel::registerDoParallel(cl)
  )) {
    with_backend(register, expect_silent(for (k in 1:10) {
      big <- stats::rnorm(2.5e5)
      got <- foreach(i = 1:2, .combine = c) %dopar% sum(big)
      expect_equal(got, rep(sum(big), 2))
    }))
  }
})

test_that("a timeout is an error of the iteration", {
  cl <- local_cluster(2, timeout = 0.3)
  with_backend(function() registerDoRustCluster(cl), {
    run <- function(how) {
      foreach(i = 1:3, .errorhandling = how) %dopar% {
        if (i == 2) Sys.sleep(30)
        i
      }
    }
    expect_rust_error(caught(run("stop")), "timeout")
    expect_identical(run("remove"), list(1L, 3L))
    expect_rust_error(run("pass")[[2]], "timeout")
  })
})

test_that("a progress bar", {
  cl <- local_cluster(2)
  before <- options(rustcluster.progress = TRUE, cli.progress_show_after = 0, cli.dynamic = FALSE)
  on.exit(options(before), add = TRUE, after = FALSE)
  with_backend(function() registerDoRustCluster(cl), {
    shown <- utils::capture.output(
      got <- foreach(i = 1:4, .combine = c) %dopar% {
        Sys.sleep(0.3)
        i
      },
      type = "message"
    )
    expect_identical(got, 1:4)
    expect_match(paste(shown, collapse = "\n"), "4/4 tasks|4 tasks in")
  })
})

test_that("an interrupted loop leaves the cluster usable", {
  skip_unless_proc()
  child <- start_child({
    suppressPackageStartupMessages(library(foreach))
    cl <- makeRustCluster(2)
    registerDoRustCluster(cl)
    say(paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
    tryCatch(
      {
        foreach(i = 1:4) %dopar% {
          file.create(file.path(dir, paste0("begun", i)))
          Sys.sleep(60)
        }
        say("not interrupted")
      },
      interrupt = function(e) say("interrupted")
    )
    say(foreach(i = 1:3, .combine = "+") %dopar% i^2)
    stopCluster(cl)
  })
  expect_true(wait_until(function() all(file.exists(file.path(child$dir, c("begun1", "begun2"))))))
  tools::pskill(child$pid, tools::SIGINT)
  expect_true(wait_until(function() !alive(child$pid)))
  said <- child_lines(child)
  expect_identical(said[-1], c("interrupted", "14"))
  expect_gone(as.integer(strsplit(said[[1]], " ")[[1]]))
})

test_that("no process is left", {
  stop_cluster_pairs()
  expect_no_leftovers()
})
