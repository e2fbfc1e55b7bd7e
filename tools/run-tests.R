# Runs the tests of the installed package and writes their summary into the file that is named.
library(testthat)
library(rustcluster)
results <- as.data.frame(test_dir("tests/testthat", reporter = "summary", stop_on_failure = FALSE,
                                  load_package = "none"))
failed <- sum(results$failed) + sum(results$error)
passed <- sum(results$passed)
skipped <- sum(results$skipped)
writeLines(sprintf("%d passed, %d failed, %d skipped", passed, failed, skipped), commandArgs(TRUE))
quit(status = as.integer(failed > 0 || passed == 0))
