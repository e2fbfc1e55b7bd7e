# What the dashboard costs: many short tasks with an open page, compared with the same without one, in turn; and the CPU
# time of an idle session with and without a page.
#
#   Rscript dashboard.R [workers=320] [tasks=100000] [calls=10] [rounds=25] [seconds=20]
#
# The page is a process that asks for figures as the page of a browser does: a browser's own work is not measured.

here <- sub("^--file=", "", grep("^--file=", commandArgs(), value = TRUE))
here <- if (length(here)) dirname(here[1L]) else system.file("bench", package = "rustcluster")
source(file.path(here, "helpers.R"))
suppressPackageStartupMessages(library(rustcluster))

workers <- as.integer(option("workers", "320"))
tasks <- as.integer(option("tasks", "100000"))
# The calls of a run, which must take more than a second: a page asks once a second. Many short pairs are compared,
# because other processes disturb long ones more.
calls <- as.integer(option("calls", "10"))
rounds <- as.integer(option("rounds", "25"))
seconds <- as.numeric(option("seconds", "20"))

# Asks for figures until the file exists, as the page does: the bins of the timeline that are new, once a second.
page <- '
args <- commandArgs(TRUE)
parts <- regmatches(args[[1]], regexec("^http://([^/]*):([0-9]+)(/.*)$", args[[1]]))[[1]]
first <- 0
while (!file.exists(args[[2]])) {
  connection <- socketConnection(parts[[2]], as.integer(parts[[3]]), open = "r+b", blocking = TRUE, timeout = 60)
  path <- sprintf("%sfigures?wait=1000&seen=1000000&exports=1000000&step=250&first=%d", parts[[4]], first)
  writeBin(charToRaw(sprintf("GET %s HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n", path)), connection)
  text <- paste(readLines(connection, warn = FALSE), collapse = "")
  close(connection)
  now <- as.numeric(sub(".*\\"now\\":([0-9.]+).*", "\\\\1", text))
  first <- max(0, floor(now * 4) - 3)
  if (!file.exists(args[[3]])) writeLines(as.character(Sys.getpid()), args[[3]])
}
'
script <- tempfile(fileext = ".R")
writeLines(page, script)

open_page <- function(address) {
  files <- tempfile(c("end-", "asked-"))
  rscript <- file.path(R.home("bin"), "Rscript")
  system2(rscript, c("--vanilla", script, shQuote(address), files), wait = FALSE)
  while (!isTRUE(file.size(files[[2L]]) > 1)) Sys.sleep(0.05)
  list(end = files[[1L]], pid = as.integer(readLines(files[[2L]])))
}

# The page ends with its next answer.
close_page <- function(page) {
  file.create(page$end)
  Sys.sleep(1.5)
}

cpu <- function() sum(proc.time()[c("user.self", "sys.self")])

cl <- makeRustCluster(workers)
address <- clusterDashboard(cl, browse = FALSE)
run <- function() {
  took <- system.time(for (call in seq_len(calls)) parallel::clusterApplyLB(cl, seq_len(tasks), identity))
  c(elapsed = took[["elapsed"]], cpu = took[["user.self"]] + took[["sys.self"]])
}
run()

page <- open_page(address)
ratios <- vapply(seq_len(rounds), function(round) {
  # Which of the two comes first changes in each round. A page that is stopped asks for nothing.
  with_page <- function() {
    tools::pskill(page$pid, tools::SIGCONT)
    on.exit(tools::pskill(page$pid, tools::SIGSTOP))
    run()
  }
  if (round %% 2) {
    without <- run()
    with <- with_page()
  } else {
    with <- with_page()
    without <- run()
  }
  c(with / without, without)
}, numeric(4L))
tools::pskill(page$pid, tools::SIGCONT)
close_page(page)
quartiles <- stats::quantile(ratios[1L, ], c(0.25, 0.5, 0.75), names = FALSE)
cat(sprintf(
  "%d times %d tasks on %d workers, %.1f s: with a page %.3f times as long (%d pairs; quartiles %.3f and %.3f)\n",
  calls, tasks, workers, stats::median(ratios[3L, ]), quartiles[[2L]], rounds, quartiles[[1L]], quartiles[[3L]]
))
cat(sprintf("CPU time of R: %.3f times as much (median)\n", stats::median(ratios[2L, ])))

idle <- function() {
  before <- cpu()
  Sys.sleep(seconds)
  1000 * (cpu() - before) / seconds
}
cat(sprintf("idle, without a page: %.2f ms of CPU time per second\n", idle()))
page <- open_page(address)
cat(sprintf("idle, with a page:    %.2f ms of CPU time per second\n", idle()))
close_page(page)
cat(sprintf("idle, page closed:    %.2f ms of CPU time per second\n", idle()))
parallel::stopCluster(cl)
