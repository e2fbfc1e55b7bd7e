# A package whose tests make clusters, in testthat's parallel mode: several test processes make clusters at once.

skip_on_cran()
skip_unless_long()
skip_if_not_installed("callr")
watch_processes()

test_that("test files that run at the same time have clusters of their own, of which nothing is left", {
  skip_unless_proc()
  root <- tempfile()
  tests <- file.path(root, "minipkg", "tests", "testthat")
  dir.create(tests, recursive = TRUE)
  dir.create(file.path(root, "minipkg", "R"))
  dir.create(file.path(root, "lib"))
  dir.create(file.path(root, "pids"))
  writeLines(c(
    "Package: minipkg", "Title: A Package", "Version: 0.0.1", "Description: Tests that make clusters.", "License: MIT",
    "Author: A", "Maintainer: A <a@example.org>", "Imports: parallel", "Config/testthat/edition: 3",
    "Config/testthat/parallel: true"
  ), file.path(root, "minipkg", "DESCRIPTION"))
  writeLines("export(sums)", file.path(root, "minipkg", "NAMESPACE"))
  writeLines(
    "sums <- function(cl, n) Reduce(`+`, parallel::parLapply(cl, seq_len(n), identity))",
    file.path(root, "minipkg", "R", "sums.R")
  )
  for (i in 1:4) {
    writeLines(c(
      "test_that(\"sums\", {",
      "  cl <- rustcluster::makeRustCluster(2)",
      "  pids <- c(rustcluster::clusterPids(cl), rustcluster::agentPids(cl))",
      sprintf("  file <- file.path(Sys.getenv(\"MINIPKG_PIDS\"), \"%d\")", i),
      "  writeLines(as.character(pids), file)",
      # One file does not stop its cluster.
      if (i != 4) "  on.exit(parallel::stopCluster(cl))",
      "  expect_identical(sums(cl, 10), 55L)",
      "  expect_error(parallel::clusterCall(cl, stop, \"no\"), \"no\")",
      "  expect_identical(rustcluster::clusterSubmit(cl, 40 + 2)$value(), 42)",
      "  parallel::clusterSetRNGStream(cl, 1)",
      "  numbers <- unlist(parallel::clusterCall(cl, stats::runif, 1))",
      "  expect_identical(anyDuplicated(numbers), 0L)",
      # Some versions of testthat count no successes of files that run at the same time.
      "  stopifnot(identical(sums(cl, 10), 55L), length(numbers) == 2L)",
      "  file.create(paste0(file, \"-done\"))",
      "})"
    ), file.path(tests, sprintf("test-%d.R", i)))
  }
  child <- start_child({
    utils::install.packages(
      file.path(root, "minipkg"), file.path(root, "lib"), repos = NULL, type = "source", quiet = TRUE
    )
    .libPaths(c(file.path(root, "lib"), .libPaths()))
    Sys.setenv(R_LIBS = paste(.libPaths(), collapse = ":"))
    results <- testthat::test_dir(
      tests, package = "minipkg", load_package = "installed", reporter = "silent", stop_on_failure = FALSE
    )
    results <- as.data.frame(results)
    say("results", nrow(results), sum(results$failed), sum(results$error), sum(results$skipped))
  }, values = list(root = root, tests = tests), env = c(
    "TESTTHAT_PARALLEL=TRUE", "TESTTHAT_CPUS=3", paste0("MINIPKG_PIDS=", file.path(root, "pids"))
  ))
  expect_child_ends_well(child, timeout = 180)
  pids <- as.integer(unlist(lapply(list.files(file.path(root, "pids"), "^[0-9]$", full.names = TRUE), readLines)))
  note_pids(pids)
  expect_identical(child_said(child, "results"), "4 0 0 0")
  expect_length(list.files(file.path(root, "pids"), "-done$"), 4)
  expect_identical(anyDuplicated(pids), 0L)
  expect_length(pids, 12)
  expect_gone(pids)
})

test_that("no process is left", {
  expect_no_leftovers()
})
