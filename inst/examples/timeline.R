# When the workers of a cluster are busy, as a picture: the same uneven tasks twice, first in chunks of
# equal numbers (parLapply), then one by one with the longest first (clusterLapply); one worker is
# killed.
#
#   Rscript timeline.R [workers] [plot.png]

library(parallel)
library(rustcluster)

arguments <- commandArgs(trailingOnly = TRUE)
workers <- if (length(arguments)) as.integer(arguments[[1L]]) else 320L
file <- if (length(arguments) > 1L) arguments[[2L]] else "timeline.png"

# Tasks that wait, so that a few cores are enough for hundreds of workers. As in many a sweep over
# parameters, the later ones take longer.
set.seed(1)
tasks <- 6L * workers
seconds <- 0.1 + 1.8 * (seq_len(tasks) / tasks)^2 + rexp(tasks, 4)
task <- function(seconds) Sys.sleep(seconds)
# What a function takes along is what it was made in: here nothing.
environment(task) <- globalenv()

cl <- makeRustCluster(workers)
invisible(parLapply(cl, seconds, task))
Sys.sleep(0.5)
done <- 0
invisible(withCallingHandlers(
  clusterLapply(cl, seconds, task,
    .order = order(seconds, decreasing = TRUE),
    .onResult = function(i, value) {
      done <<- done + 1
      if (done == 3 * workers) tools::pskill(clusterPids(cl)[[workers %/% 2L]], tools::SIGKILL)
    }
  ),
  rustcluster_worker_lost = function(w) {
    message(conditionMessage(w))
    invokeRestart("muffleWarning")
  }
))
print(summary(cl))
stopCluster(cl)

png(file, 900, 480, type = "cairo", antialias = "none")
plot(clusterTimeline(cl), main = paste(workers, "workers: parLapply(), then clusterLapply() with the longest first"))
invisible(dev.off())
cat(file, "\n")
