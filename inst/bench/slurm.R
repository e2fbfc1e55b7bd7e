# Times the start of a cluster over Slurm beside what Slurm and R take themselves, and counts the transfers of an
# export. PSOCK cannot start workers in jobs.
#
#   Rscript slurm.R [nodes=4] [cores=16] [dir=~/.rustcluster] [rounds=3] [megabytes=50]
#
# `dir` must be on a file system that the nodes share. The partition must be idle.

suppressPackageStartupMessages({
  library(parallel)
  library(rustcluster)
})
arguments <- commandArgs(TRUE)
option <- function(name, default) {
  found <- grep(paste0("^", name, "="), arguments, value = TRUE)
  if (length(found)) sub("^[^=]*=", "", found[[1L]]) else default
}
nodes <- as.integer(option("nodes", "4"))
cores <- as.integer(option("cores", "16"))
dir <- path.expand(option("dir", "~/.rustcluster"))
seconds <- function(expr) system.time(expr)[["elapsed"]]

# Returns the seconds until an array of the same jobs has run a trivial command on each node.
engine_itself <- function() {
  base <- tempfile("bench-", dir)
  dir.create(base, recursive = TRUE)
  on.exit(unlink(base, recursive = TRUE))
  job <- sprintf("touch %s/$SLURM_ARRAY_TASK_ID", base)
  seconds({
    command <- c("--parsable", "-o", "/dev/null", paste0("--array=1-", nodes), "-c", cores, "--wrap", shQuote(job))
    system2("sbatch", command, stdout = FALSE)
    while (length(list.files(base)) < nodes) Sys.sleep(0.005)
  })
}

start_of_r <- function() seconds(system2(file.path(R.home("bin"), "Rscript"), c("-e", "1"), stdout = FALSE))

start_of_cluster <- function() {
  cl <- NULL
  took <- seconds({
    cl <- makeRustCluster(slurm(nodes = nodes, cores = cores, dir = dir))
    clusterCall(cl, Sys.getpid)
  })
  before <- summary(cl)$bytes_in
  big <- as.raw(sample.int(255L, 1e6 * as.numeric(option("megabytes", "50")), replace = TRUE))
  clusterExport(cl, "big", environment())
  stopifnot(unlist(clusterEvalQ(cl, length(big))) == length(big))
  transfers <- sum(summary(cl)$bytes_in - before) / length(big)
  stopCluster(cl)
  c(cluster = took, transfers = transfers)
}

for (round in seq_len(as.integer(option("rounds", "3")))) {
  own <- engine_itself()
  r <- start_of_r()
  cluster <- start_of_cluster()
  cat(sprintf(
    "%d x %d workers: %.2f s; Slurm itself %.2f s, R %.2f s: %.2f s more (goal: at most 1 s)\n",
    nodes, cores, cluster[["cluster"]], own, r, cluster[["cluster"]] - own - r
  ))
  cat(sprintf("an export to them: %.2f transfers\n", cluster[["transfers"]]))
}
