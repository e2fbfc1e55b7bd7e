# The log behind RUSTCLUSTER_LOG: who writes what where, and what nobody may write.

skip_on_cran()
watch_processes()

# Until the end of the calling test, clusters log this to a directory, whose path is returned.
local_log <- function(directives, dir = tempfile("log"), .frame = parent.frame()) {
  before <- Sys.getenv(c("RUSTCLUSTER_LOG", "RUSTCLUSTER_LOG_DIR"))
  Sys.setenv(RUSTCLUSTER_LOG = directives, RUSTCLUSTER_LOG_DIR = dir)
  # An empty variable is none. The last call of a test is undone first.
  restore <- bquote(do.call(Sys.setenv, .(as.list(before))))
  do.call("on.exit", list(restore, add = TRUE, after = FALSE), envir = .frame)
  dir
}

# The lines of the log files in a directory, named by whose they are.
logged <- function(dir, pattern = "") {
  files <- list.files(dir, full.names = TRUE)
  names(files) <- sub(".*-(head|agent|worker[0-9]+)-[0-9]+[.]log$", "\\1", files)
  files <- files[order(names(files))]
  lapply(files, function(file) grep(pattern, readLines(file), value = TRUE))
}

test_that("by default nothing is logged", {
  dir <- local_log("")
  cl <- local_cluster(1)
  clusterApply(cl, 1, identity)
  expect_identical(list.files(dir), character())
})

test_that("a task can be followed through head, agent and worker", {
  for (start in c("fork", "spawn")) {
    dir <- local_log("debug")
    cl <- local_cluster(2, start_method = start)
    expect_identical(clusterApply(cl[2], "marzipan", toupper), list("MARZIPAN"))
    clusterExport(cl, "dir", environment())
    stopCluster(cl)
    log <- logged(dir)
    expect_named(log, c("agent", "head", "worker1", "worker2"))
    for (line in unlist(log)) expect_match(line, "^20[0-9-]{8}T[0-9:]{8}[.][0-9]{6}Z +(INFO|DEBUG|WARN) ")
    of_first <- logged(dir, "task=1\\b")
    expect_match(of_first$head, "task submitted task=1 rank=2 ", all = FALSE)
    expect_match(of_first$head, "task sent task=1 rank=2$", all = FALSE)
    expect_match(of_first$agent, "message to worker task=1 rank=2 ", all = FALSE)
    expect_match(of_first$worker2, "task answered task=1$", all = FALSE)
    expect_length(of_first$worker1, 0L)
    expect_match(of_first$head, "task answered task=1 rank=2 ", all = FALSE)
    # Neither what tasks hold nor what they give.
    expect_false(any(grepl("marzipan|toupper", unlist(log), ignore.case = TRUE)))
    expect_true(all(file.mode(list.files(dir, full.names = TRUE)) == as.octmode("600")))
  }
})

test_that("attempts are counted", {
  dir <- local_log("info")
  cl <- local_cluster(2, retries = 1)
  lost <- function(x) if (x == 1) tools::pskill(Sys.getpid(), 9)
  suppressWarnings(try(clusterApply(cl, 1:2, lost), silent = TRUE))
  suppressWarnings(try(clusterLapply(cl, 1:2, lost), silent = TRUE))
  call <- clusterSubmit(cl, tools::pskill(Sys.getpid(), 9))
  suppressWarnings(try(call$value(), silent = TRUE))
  attempts <- logged(dir, "attempt failed")$head
  expect_identical(sub(".*(attempt=[0-9]+ again=[a-z]+)$", "\\1", attempts),
                   rep(c("attempt=1 again=true", "attempt=2 again=false"), 3))
})

test_that("directives choose parts and levels, for each cluster anew", {
  dir <- local_log("rustcluster::worker=debug")
  cl <- local_cluster(1)
  clusterApply(cl, 1, identity)
  lines <- function() lengths(logged(dir))
  expect_identical(unname(lines()[c("head", "agent")]), c(0L, 0L))
  expect_gt(lines()[["worker1"]], 1L)
  local_log("info", dir)
  other <- local_cluster(1)
  with_head <- lines()[["head"]]
  expect_gt(with_head, 1L)
  local_log("", dir)
  third <- local_cluster(1)
  clusterApply(cl, 1, identity)
  expect_identical(lines()[["head"]], with_head)
})

test_that("settings that are no good are errors that name the variable, and nothing is started", {
  dir <- local_log("verbose")
  error <- expect_error(makeRustCluster(1), "RUSTCLUSTER_LOG.*verbose", class = "rustcluster_bad_argument")
  expect_identical(error$argument, "RUSTCLUSTER_LOG")
  expect_false(dir.exists(dir))
  for (number in c("0", "1", "2", "10", "rustcluster::head=3")) {
    local_log(number, dir)
    expect_error(makeRustCluster(1), "number for a level; use a level (error", fixed = TRUE, class = "rustcluster_bad_argument")
  }
  local_log("rustcluster::haed=debug", dir)
  expect_error(makeRustCluster(1), "RUSTCLUSTER_LOG.*haed", class = "rustcluster_bad_argument")
  local_log("debug", "~/logs")
  error <- expect_error(makeRustCluster(1), "absolute path", class = "rustcluster_bad_argument")
  expect_identical(error$argument, "RUSTCLUSTER_LOG_DIR")
  file <- tempfile("file")
  writeLines("", file)
  local_log("debug", file.path(file, "below"))
  expect_error(makeRustCluster(1), "RUSTCLUSTER_LOG_DIR.*cannot be written", class = "rustcluster_bad_argument")
  # An agent's own settings cost nobody the cluster.
  local_log("debug", dir)
  cl <- local_cluster(1, rscript_envs = c(RUSTCLUSTER_LOG = "verbose"))
  expect_identical(clusterApply(cl, 1, identity), list(1))
  expect_named(logged(dir), "head")
})

test_that("agents on other hosts log as this session does", {
  skip_without_sshd()
  dir <- local_log("info")
  cl <- over_ssh(local_sshd(), c("127.0.0.2", "127.0.0.3"))
  expect_named(logged(dir), c("agent", "agent", "head", "worker1", "worker2"))
})
