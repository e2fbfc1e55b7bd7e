# Every signal that ends a process, for every process there is: nothing is left, and the head says what
# happened. See the table in makeRustCluster()'s section Ends; children of workers are in
# test-child-processes.R, links in test-network.R.

skip_on_cran()
skip_unless_proc()
watch_processes()

signals <- c(SIGTERM = tools::SIGTERM, SIGHUP = tools::SIGHUP, SIGKILL = tools::SIGKILL)

# A head with an idle and a busy worker; what it has started is said.
start_head <- function(.frame = parent.frame()) {
  child <- start_child({
    cl <- makeRustCluster(2)
    parallel:::sendCall(cl[[1L]], function() repeat NULL, list())
    say("pids", paste(c(agentPids(cl), clusterPids(cl)), collapse = " "))
    Sys.sleep(300)
  }, .frame = .frame)
  child_wait_for(child, "pids")
  child
}

for (name in names(signals)) {
  test_that(paste("a head that gets", name), {
    child <- start_head()
    pids <- note_pids(child_pids(child, "pids"))
    expect_alive(pids)
    child_signal(child, signals[[name]])
    expect_gone(pids)
    child_wait_end(child)
  })
}

test_that("a head whose terminal is closed", {
  skip_if_not(nzchar(Sys.which("script")), "needs script")
  # script makes a terminal for what it runs, and its end closes that.
  dir <- tempfile("terminal")
  dir.create(dir)
  said <- file.path(dir, "pids")
  code <- file.path(dir, "head.R")
  writeLines(c(
    "library(rustcluster)",
    "cl <- makeRustCluster(2)",
    "parallel:::sendCall(cl[[1L]], function() repeat NULL, list())",
    sprintf("cat(Sys.getpid(), agentPids(cl), clusterPids(cl), file = '%s.new')", said),
    sprintf("invisible(file.rename('%s.new', '%s'))", said, said),
    "Sys.sleep(300)"
  ), code)
  run <- paste0("R_LIBS=", shQuote(paste(.libPaths(), collapse = ":")), " exec ",
                shQuote(file.path(R.home("bin"), "Rscript")), " --vanilla ", code)
  pidfile <- file.path(dir, "script.pid")
  start <- file.path(dir, "start.sh")
  writeLines(sprintf("echo $$ >%s; exec script -q -c %s /dev/null", pidfile, shQuote(run)), start)
  system(sprintf("sh %s </dev/null >/dev/null 2>&1", start), wait = FALSE)
  if (!wait_until(function() file.exists(said), 30)) skip("script made no terminal")
  pids <- note_pids(scan(said, quiet = TRUE))
  expect_length(pids, 4L)
  tools::pskill(scan(pidfile, quiet = TRUE), tools::SIGKILL)
  expect_gone(pids)
})

for (name in names(signals)) {
  test_that(paste("an agent that gets", name, "ends its workers, and the other host goes on"), {
    cl <- local_cluster(list(list(host = "localhost", ncore = 2), list(host = "localhost", ncore = 2, threads = 2)))
    pids <- c(agentPids(cl)[[2L]], clusterPids(cl)[3:4])
    for (node in cl[3:4]) parallel:::sendCall(node, function() repeat NULL, list())
    tools::pskill(pids[[1L]], signals[[name]])
    expect_gone(pids)
    # What is asked of the lost host is refused, or moves if that is not known yet.
    got <- suppressWarnings(tryCatch(
      clusterApply(cl, 1:4, identity), rustcluster_host_failed = function(e) "refused"
    ))
    expect_true(identical(got, "refused") || identical(got, as.list(1:4)))
    rest <- clusterAlive(cl)
    expect_length(rest, 2L)
    expect_equal(clusterCall(rest, identity, 1), list(1, 1))
  })

  test_that(paste("a worker that gets", name, "is replaced, idle or busy"), {
    cl <- local_cluster(2)
    mark <- 5
    clusterExport(cl, "mark", environment())
    pids <- clusterPids(cl)
    tools::pskill(pids[[1L]], signals[[name]])
    expect_gone(pids[[1L]])
    expect_true(wait_until(function() !is.na(clusterPids(cl)[[1L]]) && clusterPids(cl)[[1L]] != pids[[1L]]))
    expect_warning(got <- clusterCall(cl, function() mark), class = "rustcluster_worker_lost")
    expect_equal(got, list(5, 5))
    tries <- tempfile()
    expect_warning(
      got <- clusterApply(cl, 1:2, function(i, tries, signal) {
        if (i == 2 && !file.exists(tries)) {
          file.create(tries)
          tools::pskill(Sys.getpid(), signal)
          Sys.sleep(60)
        }
        mark + i
      }, tries, signals[[name]]),
      class = "rustcluster_worker_lost"
    )
    expect_equal(got, list(6, 7))
    note_processes(cl)
  })
}

test_that("stopCluster() during a call on the same cluster", {
  cl <- local_cluster(2)
  pids <- c(agentPids(cl), clusterPids(cl))
  # A handler of a loss's warning is a place where that can happen.
  error <- caught(withCallingHandlers(
    clusterApply(cl, 1:6, function(i) if (i == 3) quit(status = 1) else Sys.sleep(0.1)),
    rustcluster_worker_lost = function(w) {
      stopCluster(cl)
      tryInvokeRestart("muffleWarning")
    }
  ))
  expect_rust_error(error, "stopped")
  expect_gone(pids)
  expect_no_error(stopCluster(cl))
})

test_that("stopCluster() that is itself interrupted can be called again", {
  cl <- local_cluster(2)
  pids <- c(agentPids(cl), clusterPids(cl))
  # The agent does not heed it for now.
  tools::pskill(pids[[1L]], tools::SIGSTOP)
  expect_error(
    {
      setTimeLimit(elapsed = 0.3, transient = TRUE)
      stopCluster(cl)
    },
    "time limit"
  )
  setTimeLimit()
  tools::pskill(pids[[1L]], tools::SIGCONT)
  expect_no_error(stopCluster(cl))
  expect_gone(pids)
})

test_that("a full disk on a host: its tasks fail, and the cluster goes on", {
  if (Sys.info()[["effective_user"]] != "root") skip("to mount takes root")
  disk <- tempfile("disk")
  dir.create(disk)
  mounted <- system(sprintf("mount -t tmpfs -o size=256k tmpfs %s 2>/dev/null", disk))
  if (mounted != 0L) skip("nothing can be mounted")
  on.exit(system(sprintf("umount -l %s", disk)), add = TRUE, after = FALSE)
  out <- file.path(disk, "out")
  cl <- local_cluster(2, outfile = out, rscript_envs = c(TMPDIR = disk))
  fill <- function(i) {
    cat(strrep("printed ", 1e4), "\n")
    file <- tempfile()
    tryCatch({
      con <- file(file, "wb")
      writeBin(raw(1e6), con)
      close(con)
    }, error = function(e) NULL, warning = function(w) NULL)
    file.size(file) < 1e6
  }
  # However often.
  for (i in 1:3) expect_equal(clusterApply(cl, 1:2, fill), list(TRUE, TRUE))
  # A worker that has to be replaced meanwhile finds no room for its folder, and is none: or it has
  # just found some.
  tools::pskill(clusterPids(cl)[[1L]], tools::SIGKILL)
  got <- suppressWarnings(tryCatch(clusterApply(cl, 1:4, identity), rustcluster_error = identity))
  expect_true(identical(got, as.list(1:4)) || inherits(got, "rustcluster_worker_lost"))
  stopCluster(cl)
})

test_that("no process is left", {
  expect_no_leftovers()
})
