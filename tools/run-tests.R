# Runs the tests of the installed package and writes their summary into the file that is named. Further
# arguments: the test files to run ("nodes" for test-nodes.R); default: all.
library(testthat)
library(rustcluster)
arguments <- commandArgs(TRUE)
only <- if (length(arguments) > 1L) paste0("^(", paste(arguments[-1L], collapse = "|"), ")$")
results <- as.data.frame(test_dir("tests/testthat", filter = only, reporter = "summary", stop_on_failure = FALSE,
                                  load_package = "none"))
failed <- sum(results$failed) + sum(results$error)
passed <- sum(results$passed)
skipped <- sum(results$skipped)
writeLines(sprintf("%d passed, %d failed, %d skipped", passed, failed, skipped), arguments[1L])
quit(status = as.integer(failed > 0 || passed == 0))
