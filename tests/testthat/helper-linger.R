# Clusters that wait for another session (`linger`).

# Makes a directory for the records of the clusters of a test file, which no other session uses. `env`: the variable that
# says so to child processes. expect_no_records() removes the directory.
own_records <- function() {
  dir <- tempfile("records-")
  dir.create(dir)
  before <- Sys.getenv("R_USER_CACHE_DIR", NA)
  Sys.setenv(R_USER_CACHE_DIR = dir)
  list(dir = dir, before = before, env = paste0("R_USER_CACHE_DIR=", shQuote(dir)))
}

expect_no_records <- function(records) {
  expect_length(list.files(records$dir, "[.](rds|seen|missed|seeds)$", recursive = TRUE), 0L)
  remove_records(records)
}

remove_records <- function(records) {
  if (is.na(records$before)) Sys.unsetenv("R_USER_CACHE_DIR") else Sys.setenv(R_USER_CACHE_DIR = records$before)
  unlink(records$dir, recursive = TRUE)
}

# As own_records(), until the calling frame ends.
local_records <- function(.frame = parent.frame()) {
  records <- own_records()
  do.call("on.exit", list(bquote(.(remove_records)(.(records))), add = TRUE, after = FALSE), envir = .frame)
  records
}

# The random numbers that each of `n` PSOCK workers draws, `times` times in a row.
psock_draws <- function(n, seed, times) {
  cl <- parallel::makePSOCKcluster(n)
  on.exit(parallel::stopCluster(cl), add = TRUE, after = FALSE)
  parallel::clusterSetRNGStream(cl, seed)
  lapply(seq_len(times), function(i) unlist(parallel::clusterCall(cl, stats::rnorm, 1)))
}
