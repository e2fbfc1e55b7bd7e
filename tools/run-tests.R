# Runs the tests of the installed package and writes the counts of each file and of all into a file.
#
#   Rscript tools/run-tests.R SUMMARY [FILE ...]   runs these test files ("nodes" for test-nodes.R), or all
#
# Most tests wait most of the time. Three files run at a time, each in a session of its own, and those whose limits of
# time leave no room for other load run alone, at the end. RUSTCLUSTER_TEST_JOBS sets how many run at a time. The
# long tests use batch engines and the memory of the machine: they run one at a time.
alone <- c("interrupt", "joined-clusters", "snow")

counts <- function(results) {
  failed <- sum(results$failed) + sum(results$error)
  sprintf("%d passed, %d failed, %d skipped", sum(results$passed), failed, sum(results$skipped))
}

# In a session of its own: runs one file, writes its results, and says how it went.
run_file <- function(name, results) {
  suppressPackageStartupMessages({
    library(parallel)
    library(testthat)
    library(rustcluster)
  })
  # testthat keeps the source of tests, and R the parse data with it: a function of a test is sent to workers with its
  # environment, and all of that, which would be most of the work of many tests.
  options(testthat.summary.max_reports = Inf, keep.parse.data = FALSE)
  began <- proc.time()[["elapsed"]]
  found <- as.data.frame(test_file(
    file.path("tests", "testthat", paste0("test-", name, ".R")), reporter = "summary", stop_on_failure = FALSE,
    load_package = "none"
  ))
  found <- found[c("test", "passed", "failed", "error", "skipped")]
  line <- sprintf("%s: %s (%.0f s)", name, counts(found), proc.time()[["elapsed"]] - began)
  saveRDS(list(line = line, found = found), results)
}

run_all <- function(names, summary) {
  dir <- tempfile("results-")
  dir.create(dir)
  on.exit(unlink(dir, recursive = TRUE))
  # The session of a file may be killed: then there are no results, and its output says why. One line for each file
  # shows how far the tests are.
  script <- paste(
    "\"$0\" tools/run-tests.R --file \"$2\" \"$1/$2.rds\" >\"$1/$2.log\" 2>&1 </dev/null ||",
    "echo \"test-$2.R ended with status $?\" >>\"$1/$2.log\"; echo \"test-$2.R is done\""
  )
  run <- function(names, jobs) {
    if (!length(names)) return()
    rscript <- file.path(R.home("bin"), "Rscript")
    # Each takes time from the other.
    slack <- if (jobs != "1" && !nzchar(Sys.getenv("RUSTCLUSTER_TEST_SLACK"))) "RUSTCLUSTER_TEST_SLACK=8"
    command <- c("-P", jobs, "-n", "1", "sh", "-c", shQuote(script), shQuote(rscript), shQuote(dir))
    status <- system2("xargs", command, input = names, env = as.character(slack))
    if (status != 0L) stop("xargs ended with status ", status)
  }
  # Large files take long: they begin first.
  names <- names[order(-file.size(file.path("tests", "testthat", paste0("test-", names, ".R"))))]
  jobs <- Sys.getenv("RUSTCLUSTER_TEST_JOBS", if (nzchar(Sys.getenv("RUSTCLUSTER_LONG_TESTS"))) "1" else "3")
  run(setdiff(names, alone), jobs)
  run(intersect(names, alone), "1")

  names <- sort(names)
  results <- lapply(file.path(dir, paste0(names, ".rds")), function(file) if (file.exists(file)) readRDS(file))
  for (name in names) writeLines(c(paste("== test of", name), readLines(file.path(dir, paste0(name, ".log")))))
  ended <- lengths(results) > 0L
  lost <- sprintf("%s: its session ended, 0 passed, 1 failed, 0 skipped", names[!ended])
  found <- do.call(rbind, lapply(results, `[[`, "found"))
  if (length(lost)) {
    found <- rbind(found, data.frame(test = lost, passed = 0L, failed = 1L, error = FALSE, skipped = FALSE))
  }
  writeLines(c(vapply(results[ended], `[[`, "", "line"), lost, counts(found)), summary)
  any(found$failed > 0, found$error) || sum(found$passed) == 0
}

arguments <- commandArgs(TRUE)
if (arguments[[1L]] == "--file") {
  run_file(arguments[[2L]], arguments[[3L]])
} else {
  names <- sub("^test-(.*)[.]R$", "\\1", list.files(file.path("tests", "testthat"), "^test-.*[.]R$"))
  unknown <- setdiff(arguments[-1L], names)
  if (length(unknown)) stop("there is no test-", unknown[[1L]], ".R")
  bad <- run_all(if (length(arguments) > 1L) arguments[-1L] else names, arguments[[1L]])
  quit(status = as.integer(bad))
}
