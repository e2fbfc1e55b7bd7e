# Lints the R code by .lintr, and the tests by tests/.lintr. Prints the findings, and fails if there are any.
# Usage is checked in R/ only: lintr does not know the definitions of other files (the helpers of tests and
# benches).
folders <- c("R", "tests", "tools", "demo", "inst/bench")
files <- list.files(folders, "[.][Rr]$", recursive = TRUE, full.names = TRUE)
lint <- function(file) {
  found <- lintr::lint(file)
  Filter(function(lint) startsWith(file, "R/") || lint$linter != "object_usage_linter", found)
}
found <- parallel::mclapply(files, lint, mc.cores = parallel::detectCores())
# The error of a file would be lost.
for (error in Filter(function(found) inherits(found, "try-error"), found)) stop(error)
found <- unlist(found, recursive = FALSE)
for (lint in found) {
  file <- sub(paste0(getwd(), "/"), "", lint$filename, fixed = TRUE)
  cat(sprintf("%s:%d:%d: %s [%s]\n", file, lint$line_number, lint$column_number, lint$message, lint$linter))
}

# A second definition of a name replaces the first one without a word.
assigned <- unlist(lapply(list.files("R", "[.]R$", full.names = TRUE), function(file) {
  unlist(lapply(parse(file, keep.source = FALSE), function(expr) {
    if (is.call(expr) && identical(expr[[1L]], quote(`<-`)) && is.symbol(expr[[2L]])) as.character(expr[[2L]])
  }))
}))
twice <- unique(assigned[duplicated(assigned)])
if (length(twice)) cat("defined more than once in R/:", twice, "\n")

# on.exit() without `add` cancels what local_cluster() and other helpers have registered in the frame of the test, and
# without `after = FALSE` an engine or a host would end before the clusters that use it.
replacing <- unlist(lapply(list.files("tests/testthat", "[.]R$", full.names = TRUE), function(file) {
  parts <- utils::getParseData(parse(file, keep.source = TRUE))
  calls <- parts$parent[parts$token == "SYMBOL_FUNCTION_CALL" & parts$text == "on.exit"]
  calls <- parts[parts$id %in% parts$parent[parts$id %in% calls], ]
  last <- parts$parent[parts$token == "SYMBOL_SUB" & parts$text == "after"]
  sprintf("%s:%d: on.exit() without `add = TRUE, after = FALSE`\n", file, calls$line1[!calls$id %in% last])
}))
cat(replacing, sep = "")

quit(status = as.integer(length(found) + length(twice) + length(replacing) > 0L))
