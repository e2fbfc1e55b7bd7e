# Wrong arguments are errors that name the argument; right ones of
# makePSOCKcluster are accepted.

watch_processes()

expect_bad_argument <- function(expr, argument) {
  before <- if (dir.exists("/proc")) descendants() else integer()
  error <- caught(expr)
  expect_rust_error(error, "bad_argument")
  expect_identical(error$argument, argument)
  expect_match(conditionMessage(error), argument, fixed = TRUE)
  if (dir.exists("/proc")) expect_identical(descendants(), before)
  invisible(error)
}

test_that("spec must say how many workers, and that must be possible", {
  for (spec in list(
    0, 0L, -1, NA, NA_integer_, NaN, Inf, 1e9, 2^31, 0.5, list(), character(), integer(), NULL,
    TRUE, "", NA_character_, c("localhost", NA), c("localhost", ""), "2", quote(x), sum, 2i
  )) {
    expect_bad_argument(makeRustCluster(spec), "spec")
  }
})

test_that("the messages about spec", {
  expect_snapshot({
    show_error(makeRustCluster(0))
    show_error(makeRustCluster(-1))
    show_error(makeRustCluster(NA))
    show_error(makeRustCluster(1e9))
    show_error(makeRustCluster(list()))
    show_error(makeRustCluster(character()))
    show_error(makeRustCluster(NULL))
    show_error(makeRustCluster(TRUE))
  })
})

test_that("an unknown argument is named", {
  error <- caught(makeRustCluster(2, noSuchArgument = 1))
  expect_rust_error(error, "bad_argument")
  expect_match(conditionMessage(error), "noSuchArgument", fixed = TRUE)
  error <- caught(makeRustCluster(2, first = 1, second = 2))
  expect_match(conditionMessage(error), "first", fixed = TRUE)
  expect_match(conditionMessage(error), "second", fixed = TRUE)
  expect_rust_error(caught(makeRustCluster(2, NULL, NULL, "fork", 1L, 99, 98, 97)), "bad_argument")
  expect_snapshot({
    show_error(makeRustCluster(2, noSuchArgument = 1))
    show_error(makeRustCluster(2, first = 1, second = 2))
  })
})

test_that("other wrong arguments are named", {
  expect_bad_argument(makeRustCluster(2, start = "thread"), "start")
  expect_bad_argument(makeRustCluster(2, start = NA), "start")
  expect_bad_argument(makeRustCluster(2, threads = 0), "threads")
  expect_bad_argument(makeRustCluster(2, threads = NA), "threads")
  expect_bad_argument(makeRustCluster(2, threads = "two"), "threads")
  expect_bad_argument(makeRustCluster(2, threads = c(1, 2)), "threads")
  expect_bad_argument(makeRustCluster(2, packages = 1), "packages")
  expect_bad_argument(makeRustCluster(2, packages = NA_character_), "packages")
  expect_bad_argument(makeRustCluster(2, rscript_envs = 1), "rscript_envs")
  expect_bad_argument(makeRustCluster(2, outfile = 1), "outfile")
  expect_bad_argument(makeRustCluster(2, outfile = c("a", "b")), "outfile")
  expect_bad_argument(makeRustCluster(2, outfile = NA_character_), "outfile")
  expect_bad_argument(makeRustCluster(2, setup_timeout = "soon"), "setup_timeout")
  expect_bad_argument(makeRustCluster(2, setup_timeout = -1), "setup_timeout")
  expect_bad_argument(makeRustCluster(2, setup_timeout = NA), "setup_timeout")
  expect_bad_argument(makeRustCluster(2, methods = NA), "methods")
  expect_bad_argument(makeRustCluster(2, methods = "no"), "methods")
  expect_bad_argument(makeRustCluster(2, renice = "very"), "renice")
  expect_bad_argument(makeRustCluster(2, rscript_args = 1), "rscript_args")
  expect_snapshot({
    show_error(makeRustCluster(2, start = "thread"))
    show_error(makeRustCluster(2, threads = 0))
    show_error(makeRustCluster(2, packages = 1))
    show_error(makeRustCluster(2, rscript_envs = 1))
    show_error(makeRustCluster(2, outfile = 1))
    show_error(makeRustCluster(2, setup_timeout = "soon"))
  })
})

test_that("wrong arguments about faults and limits are named", {
  wrong <- list(
    retries = list(-1, NA, NaN, Inf, "two", 1:2, NULL, TRUE, list(1), 1e7),
    timeout = list(0, -1, NA, NaN, -Inf, "soon", 1:2, NULL, 1e10, 1e-9),
    keep_limit = list(-1, NA, "much", 1:2, Inf, FALSE),
    stop_timeout = list(-1, NA, "long", 1:2, Inf, FALSE),
    buffer_limit = list(0, 1, -1, NA, "much", c(2^20, 2^20), NULL, Inf),
    reconnect = list(NA, 1, "yes", NULL, c(TRUE, FALSE))
  )
  for (argument in names(wrong)) {
    for (value in wrong[[argument]]) {
      arguments <- c(list(2), setNames(list(value), argument))
      expect_bad_argument(do.call(makeRustCluster, arguments), argument)
    }
  }
  expect_snapshot({
    show_error(makeRustCluster(2, retries = -1))
    show_error(makeRustCluster(2, timeout = 0))
    show_error(makeRustCluster(2, keep_limit = -1))
    show_error(makeRustCluster(2, buffer_limit = 1))
    show_error(makeRustCluster(2, reconnect = NA))
  })
})

test_that("an rscript that is not there, or is not R, is an error with the reason", {
  skip_on_cran()
  error <- caught(makeRustCluster(2, rscript = "/no/such/Rscript"))
  expect_s3_class(error, "rustcluster_error")
  expect_match(conditionMessage(error), "/no/such/Rscript", fixed = TRUE)
  # Ends at once, and its own words are in the message.
  failing <- tempfile()
  writeLines(c("#!/bin/sh", "echo 'licence has expired: 100%s' >&2", "exit 3"), failing)
  Sys.chmod(failing, "755")
  error <- caught(makeRustCluster(2, rscript = failing))
  expect_s3_class(error, "rustcluster_error")
  expect_match(conditionMessage(error), "licence has expired: 100%s", fixed = TRUE)
  # Says nothing for ever: setup_timeout ends it, and it is not left behind.
  silent <- tempfile()
  mark <- tempfile()
  writeLines(c("#!/bin/sh", sprintf("echo $$ >%s", mark), "exec sleep 300"), silent)
  Sys.chmod(silent, "755")
  error <- caught(makeRustCluster(2, rscript = silent, setup_timeout = 1))
  expect_s3_class(error, "rustcluster_error")
  if (dir.exists("/proc")) expect_gone(as.integer(readLines(mark)))
  # Talks, but not our language.
  chatty <- tempfile()
  writeLines(c("#!/bin/sh", "head -c 200000 /dev/urandom; sleep 300"), chatty)
  Sys.chmod(chatty, "755")
  error <- caught(makeRustCluster(2, rscript = chatty, setup_timeout = 2))
  expect_s3_class(error, "rustcluster_error")
})

test_that("every argument of makePSOCKcluster is accepted", {
  skip_on_cran()
  cl <- local_cluster(
    2,
    port = 11234, setup_timeout = 60, timeout = 3600, setup_strategy = "parallel",
    master = "localhost", homogeneous = TRUE, type = "PSOCK", outfile = "/dev/null",
    rscript = file.path(R.home("bin"), "Rscript"), rscript_args = character(),
    user = NULL, rshcmd = "ssh", manual = FALSE, methods = TRUE, renice = NA_integer_,
    rhome = R.home(), rlibs = "", scriptdir = "", rprog = "R", snowlib = .libPaths()[1],
    useRscript = TRUE, useXDR = FALSE
  )
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
  # All of those that this R knows, with R's own defaults.
  options <- as.list(get("defaultClusterOptions", asNamespace("parallel")))
  stopCluster(cl)
  cl <- do.call(local_cluster, c(list(2), options, list(.frame = environment())))
  expect_equal(clusterCall(cl, identity, 2), list(2, 2))
})

test_that("spec in all its forms", {
  skip_on_cran()
  expect_length(local_cluster(1), 1L)
  expect_length(local_cluster(2L), 2L)
  # As with PSOCK: the first of several numbers, and the whole part of it.
  expect_length(local_cluster(c(2, 3)), 2L)
  expect_length(local_cluster(2.9), 2L)
  expect_length(local_cluster("localhost"), 1L)
  expect_length(local_cluster(rep("localhost", 3)), 3L)
  expect_length(local_cluster(spec = 2), 2L)
  expect_length(local_cluster(2, type = "RUST"), 2L)
})

test_that("the default is the number of usable cores", {
  skip_on_cran()
  skip_if(parallel::detectCores() > 64L)
  cl <- local_cluster()
  expect_gte(length(cl), 1L)
  expect_lte(length(cl), parallel::detectCores())
  skip_if_not(requireNamespace("parallelly", quietly = TRUE))
  expect_length(cl, as.integer(parallelly::availableCores()))
})

test_that("clusterPids() and agentPids() want a rust cluster", {
  for (x in list(NULL, 1, list(), structure(list(), class = c("SOCKcluster", "cluster")))) {
    expect_rust_error(caught(clusterPids(x)), "bad_argument")
    expect_rust_error(caught(agentPids(x)), "bad_argument")
  }
})

test_that("nothing is left", {
  skip_unless_proc()
  expect_no_leftovers()
})
