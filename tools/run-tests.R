# Runs the tests of the installed package and writes the counts of each file and of all into the file of the
# first argument. Further arguments: the test files to run ("nodes" for test-nodes.R); default: all.
library(testthat)
library(rustcluster)
arguments <- commandArgs(TRUE)
only <- if (length(arguments) > 1L) paste0("^(", paste(arguments[-1L], collapse = "|"), ")$")
options(testthat.summary.max_reports = Inf)
results <- as.data.frame(test_dir("tests/testthat", filter = only, reporter = "summary", stop_on_failure = FALSE,
                                  load_package = "none"))
counts <- function(results) {
  failed <- sum(results$failed) + sum(results$error)
  sprintf("%d passed, %d failed, %d skipped", sum(results$passed), failed, sum(results$skipped))
}
files <- split(results, sub("^test-(.*)[.]R$", "\\1", results$file))
took <- vapply(files, function(results) sum(results$real), 0)
lines <- sprintf("%s: %s (%.0f s)", names(files), vapply(files, counts, ""), took)
writeLines(c(lines, counts(results)), arguments[1L])
quit(status = as.integer(any(results$failed > 0, results$error) || sum(results$passed) == 0))
