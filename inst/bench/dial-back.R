# Compares agents that dial back, over an encrypted connection of this package, with agents over ssh to this machine.
#
#   Rscript dial-back.R [ssh="ssh -F file"] [host=localhost] [tasks=20000] [workers=2] [megabytes=1000]
#
# The host must be this machine, and must be reachable by ssh without a password. Without ssh only the rows of
# dial-back and of a plain TCP connection are measured.

suppressPackageStartupMessages({
  library(parallel)
  library(rustcluster)
})
arguments <- commandArgs(TRUE)
option <- function(name, default) {
  found <- grep(paste0("^", name, "="), arguments, value = TRUE)
  if (length(found)) sub("^[^=]*=", "", found[[1L]]) else default
}
tasks <- as.integer(option("tasks", "20000"))
workers <- as.integer(option("workers", "2"))
bytes <- 1e6 * as.numeric(option("megabytes", "1000"))
ssh <- option("ssh", NULL)

here <- dirname(normalizePath(sub("^--file=", "", grep("^--file=", commandArgs(FALSE), value = TRUE)[[1L]])))
helpers <- option("helpers", file.path(here, "..", "..", "tests", "testthat"))
source(file.path(helpers, "helper-dial-back.R"))

seconds <- function(expr) system.time(expr)[["elapsed"]]

measure <- function(name, cl) {
  clusterCall(cl, function(n) {
    assign("result", rep(as.raw(1:250), length.out = n), globalenv())
    NULL
  }, bytes)
  invisible(clusterLapply(cl, 1:2000, identity))
  many <- min(vapply(1:3, function(i) seconds(clusterLapply(cl, seq_len(tasks), identity)), 0))
  rtt <- median(vapply(1:200, function(i) seconds(clusterCall(cl[1], function() NULL)), 0))
  large <- min(vapply(1:3, function(i) {
    gc()
    seconds(stopifnot(length(clusterEvalQ(cl[1], result)[[1L]]) == bytes))
  }, 0))
  cat(sprintf(
    "%-10s %9.0f tasks/s %8.0f us a call %7.0f MB/s\n", name, tasks / many, 1e6 * rtt, bytes / 1e6 / large
  ))
}

# The rate of a copy over a plain TCP connection between two R sessions on this machine.
plain <- function() {
  port <- 20000L + sample.int(20000L, 1L)
  code <- sprintf(
    "x <- rep(as.raw(1:250), length.out = 1e8); s <- socketConnection(port = %dL, server = TRUE, open = 'r+b', blocking = TRUE); for (i in 1:%d) writeBin(x, s); readBin(s, 'raw', 1)", # nolint: line_length_linter.
    port, ceiling(bytes / 1e8)
  )
  system2(file.path(R.home("bin"), "Rscript"), c("-e", shQuote(code)), wait = FALSE)
  socket <- NULL
  while (is.null(socket)) {
    Sys.sleep(0.1)
    socket <- tryCatch(
      suppressWarnings(socketConnection(port = port, open = "r+b", blocking = TRUE)), error = function(e) NULL
    )
  }
  got <- 0
  took <- seconds(while (got < bytes) got <- got + length(readBin(socket, "raw", 1e7)))
  writeBin(as.raw(0), socket)
  close(socket)
  cat(sprintf("%-10s %45.0f MB/s\n", "plain TCP", bytes / 1e6 / took))
}

plain()
head <- dial_head(workers = workers)
agent <- dial_agent(head)
cl <- dial_cluster(head)
measure("dial-back", cl)
stopCluster(cl)
if (!is.null(ssh)) {
  cl <- makeRustCluster(
    list(list(host = option("host", "localhost"), ncore = workers)), rshcmd = ssh, rlibs = .libPaths()[[1L]]
  )
  measure("ssh", cl)
  stopCluster(cl)
}
