# allocation() in jobs of a real Slurm: a controller that runs, with at least three nodes that are idle.

skip_without_slurm <- function() {
  skip_unless_long()
  skip_if_not(nzchar(Sys.which("sbatch")) && nzchar(Sys.which("srun")), "there is no Slurm")
  idle <- suppressWarnings(system2("sinfo", c("-h", "-N", "-t", "idle", "-o", "%N"), stdout = TRUE, stderr = FALSE))
  skip_if_not(length(unique(idle)) >= 3L, "no controller of Slurm with three idle nodes")
}

# Runs R code as the script of a job on three nodes, and returns the lines that it printed. Variables for a further srun
# are set as users set them.
in_job <- function(options, code, step = "", .frame = parent.frame()) {
  dir <- withr::local_tempdir(.local_envir = .frame)
  path <- function(name) file.path(dir, name)
  writeLines(c(sprintf("library(rustcluster, lib.loc = %s)", deparse(dirname(getNamespaceInfo("rustcluster", "path")))), code), path("code.R"))
  libraries <- paste(.libPaths(), collapse = ":")
  writeLines(c(
    "#!/bin/bash", paste0("export SLURM_LABELIO=1 R_LIBS=", shQuote(libraries)),
    paste("exec", step, shQuote(file.path(R.home("bin"), "Rscript")), path("code.R"))
  ), path("job.sh"))
  files <- c("-o", path("out"), "-e", path("err"))
  status <- system2("sbatch", c("--wait", options, files, path("job.sh")), stdout = FALSE, stderr = FALSE, timeout = 120)
  out <- readLines(path("out"))
  expect(identical(status, 0L), paste(c("the job failed:", out, readLines(path("err"))), collapse = "\n"))
  out
}

code <- c(
  "cl <- makeRustCluster(allocation())",
  "host <- vapply(cl, `[[`, '', 'host')",
  "node <- unlist(clusterCall(cl, Sys.getenv, 'SLURMD_NODENAME'))",
  "stopifnot(identical(host, node))",
  "bytes <- as.raw(rep(0:255, 4000))",
  "stopifnot(vapply(clusterApply(cl, seq_along(cl), function(i, x) rev(x), bytes), identical, NA, rev(bytes)))",
  "cat(table(factor(node, unique(node))), '\\n')",
  "cat(vapply(unique(node), function(n) rustcluster:::isLocalhostNode.RustNode(cl[[match(n, node)]]), NA), '\\n')",
  "parallel::stopCluster(cl)"
)

test_that("each node of a job has its workers, and the script's node needs no srun", {
  skip_without_slurm()
  expect_identical(in_job(c("-N3", "-n5", "-c2"), code), c("6 2 2 ", "TRUE FALSE FALSE "))
})

test_that("a job without the submitter's environment has all nodes", {
  skip_without_slurm()
  expect_identical(in_job(c("-N3", "--ntasks-per-node=1", "-c2", "--export=NONE"), code), c("2 2 2 ", "TRUE FALSE FALSE "))
})

test_that("a narrow step uses all cores of the job", {
  skip_without_slurm()
  out <- in_job(c("-N3", "--ntasks-per-node=1", "-c4"), code, step = "env -u SLURM_LABELIO srun --nodes=1 --ntasks=1 --cpus-per-task=1 --exact")
  expect_identical(out, c("4 4 4 ", "FALSE FALSE FALSE "))
})

test_that("the agents of a session that is killed end while the job goes on", {
  skip_without_slurm()
  killed <- c(
    "if (!nzchar(Sys.getenv('RC_TEST_INNER'))) {",
    "  args <- commandArgs(); file <- sub('--file=', '', grep('^--file=', args, value = TRUE))",
    "  Sys.setenv(RC_TEST_INNER = '1', RC_TEST_PIDS = tempfile())",
    "  system2(file.path(R.home('bin'), 'Rscript'), file)",
    "  pids <- scan(Sys.getenv('RC_TEST_PIDS'), quiet = TRUE)",
    "  there <- function() sum(file.exists(sprintf('/proc/%d/maps', pids)) & nzchar(vapply(sprintf('/proc/%d/cmdline', pids),",
    "    function(f) paste(tryCatch(suppressWarnings(readBin(f, 'raw', 1)), error = function(e) ''), collapse = ''), '')))",
    "  for (i in 1:200) { if (!there()) break; Sys.sleep(0.1) }",
    "  cat(length(pids), 'workers,', there(), 'left\\n')",
    "} else {",
    "  cl <- makeRustCluster(allocation())",
    "  cat(clusterPids(cl), file = Sys.getenv('RC_TEST_PIDS'))",
    "  tools::pskill(Sys.getpid(), tools::SIGKILL)",
    "}"
  )
  # All nodes are this machine, where the pids can be looked up.
  skip_if_not(length(unique(system2("sinfo", c("-h", "-N", "-o", "%o"), stdout = TRUE))) == 1L, "the nodes are several machines")
  expect_identical(in_job(c("-N3", "--ntasks-per-node=1", "-c2"), killed), "6 workers, 0 left")
})

test_that("the agents that ssh has started in a job wait for another session of the job", {
  skip_without_slurm()
  skip_without_sshd()
  machines <- unique(system2("sinfo", c("-h", "-N", "-o", "%o"), stdout = TRUE))
  skip_if_not(length(machines) == 1L, "the nodes are several machines")
  ssh <- local_sshd()
  # The last line of the section of all hosts.
  cat(" HostName 127.0.0.1\n", file = file.path(ssh$dir, "ssh_config"), append = TRUE)
  waiting <- c(
    paste("rshcmd <-", paste(deparse(ssh$rshcmd), collapse = " ")),
    "if (!nzchar(Sys.getenv('RC_TEST_INNER'))) {",
    "  file <- sub('--file=', '', grep('^--file=', commandArgs(), value = TRUE))",
    "  Sys.setenv(RC_TEST_INNER = tempfile(), R_USER_CACHE_DIR = tempfile())",
    "  there <- function(pids) {",
    "    sum(vapply(pids, function(pid) !is.na(rustcluster:::startOfProcess(pid)), NA))",
    "  }",
    "  gone <- function(pids) for (i in 1:200) if (there(pids)) Sys.sleep(0.1) else break",
    "  for (end in c('stop', 'kill', 'wait')) {",
    "    Sys.setenv(RC_TEST_LINGER = if (end == 'wait') 5 else 60)",
    "    system2(file.path(R.home('bin'), 'Rscript'), file)",
    "    child <- readRDS(Sys.getenv('RC_TEST_INNER'))",
    "    cat(end, there(child$pids), '')",
    "    if (end == 'stop') {",
    "      cl <- reattachCluster(child$id)",
    "      same <- identical(clusterPids(cl), child$pids)",
    "      cat(same, unique(vapply(cl, `[[`, '', 'host')), unique(unlist(clusterCall(cl, function() shift))), '')",
    "      parallel::stopCluster(cl)",
    "    }",
    "    if (end == 'kill') killCluster(child$id)",
    "    gone(child$pids)",
    "    cat(there(child$pids), nrow(listClusters()), '\\n')",
    "  }",
    "} else {",
    "  linger <- as.numeric(Sys.getenv('RC_TEST_LINGER'))",
    "  cl <- makeRustCluster(allocation(launcher = 'ssh'), rshcmd = rshcmd, linger = linger)",
    "  shift <- 42",
    "  clusterExport(cl, 'shift')",
    "  saveRDS(list(pids = clusterPids(cl), id = clusterId(cl)), Sys.getenv('RC_TEST_INNER'))",
    "  tools::pskill(Sys.getpid(), tools::SIGKILL)",
    "}"
  )
  out <- in_job(c("-N3", "--ntasks-per-node=1", "-c2"), waiting)
  expect_length(out, 3L)
  expect_match(out[[1L]], "^stop 6 TRUE [^ ]+ [^ ]+ [^ ]+ 42 0 0 $")
  expect_identical(out[[2L]], "kill 6 0 0 ")
  # The record of agents on other hosts is kept for a while.
  expect_match(out[[3L]], "^wait 6 0 [01] $")
})
