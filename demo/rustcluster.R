# rustcluster in ten seconds, on two workers of this machine.
library(rustcluster)

# 1. Make a cluster. An agent loads R once and forks the workers, so that
#    this takes a fraction of a second.
system.time(demo_cl <- makeRustCluster(2))[["elapsed"]]
demo_cl

# 2. All functions of parallel work on it, as on a PSOCK cluster.
demo_power <- 3
clusterExport(demo_cl, "demo_power", globalenv())
parSapply(demo_cl, 1:6, function(i) i^demo_power)

# 3. Messages cost little. This is the number of tasks in a second, each of
#    which calls a function on a worker.
demo_seconds <- system.time(clusterApplyLB(demo_cl, 1:100000, identity))[["elapsed"]]
format(round(100000 / demo_seconds), big.mark = ",")

# 4. clusterLapply() can show the progress and the remaining time, and give
#    each element random numbers of its own.
demo_draw <- function(i) {
  Sys.sleep(0.1)
  mean(rnorm(1000))
}
demo_draws <- clusterLapply(demo_cl, 1:40, demo_draw, .seed = 42, .progress = TRUE)

# 5. The random numbers do not depend on the number of workers. One worker
#    draws the same.
identical(demo_draws[1:4], clusterLapply(demo_cl[1], 1:4, demo_draw, .seed = 42))

# 6. Kill a worker in the middle of a task. A new worker takes its place, with
#    the exported variable, and the task runs again. A warning says so, which
#    is printed here at once.
demo_pids <- clusterPids(demo_cl)
demo_marker <- tempfile()
demo_deadly <- function(i, marker) {
  if (i == 3 && !file.exists(marker)) {
    file.create(marker)
    cat("the third task kills its worker\n")
    tools::pskill(Sys.getpid(), tools::SIGKILL)
  }
  i^demo_power
}
withCallingHandlers(
  unlist(clusterApply(demo_cl, 1:4, demo_deadly, demo_marker)),
  rustcluster_worker_lost = function(w) {
    message(conditionMessage(w))
    invokeRestart("muffleWarning")
  }
)
rbind(before = demo_pids, after = clusterPids(demo_cl))

# 7. Store the results as they arrive. The call stops after ten elements, as
#    if the power had failed ...
demo_store <- tempfile()
demo_slow <- function(i) {
  Sys.sleep(0.1)
  sqrt(i)
}
try(clusterLapply(demo_cl, 1:20, demo_slow, .store = demo_store, .onResult = function(i, value) {
  if (i == 10) stop("the power has failed")
}))
openRun(demo_store)

# ... and the same call, made again, computes only what is missing.
demo_roots <- clusterLapply(demo_cl, 1:20, demo_slow, .store = demo_store)
identical(unlist(demo_roots), sqrt(1:20))

# 8. See what the workers have done. clusterDashboard(cl) opens a page that
#    shows it live, and clusterTop(cl) a table.
clusterStatus(demo_cl)

# 9. Stop the cluster: nothing is left. Go on with
#    vignette("cheatsheet", "rustcluster") and vignette("rustcluster").
stopCluster(demo_cl)
unlink(c(demo_store, demo_marker), recursive = TRUE)
rm(demo_cl, demo_power, demo_seconds, demo_draw, demo_draws, demo_pids, demo_marker, demo_deadly, demo_store, demo_slow)
rm(demo_roots)
