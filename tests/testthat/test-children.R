# What workers start themselves: it ends with its worker, or somebody hears of it.

skip_on_cran()
watch_processes()

# Has each node start two children that outlive the task, one of them through mclapply. Returns
# the pids of all.
start_children <- function(cl) {
  pids <- unlist(clusterCall(cl, function() {
    sleeper <- system("sleep 300 >/dev/null 2>&1 & echo $!", intern = TRUE)
    fork <- parallel::mcparallel(repeat NULL)
    as.integer(c(sleeper, fork$pid))
  }))
  note_pids(pids)
  pids
}

guard_of <- function(cl) {
  children <- descendants(agentPids(cl))
  names <- vapply(children, function(pid) readLines(sprintf("/proc/%d/comm", pid)), "")
  children[names == "rc-guard"]
}

test_that("what workers have started ends with a killed agent", {
  skip_unless_proc()
  for (start in c("fork", "spawn")) {
    cl <- local_cluster(2, start = start)
    pids <- start_children(cl)
    expect_length(pids, 4L)
    guard <- guard_of(cl)
    expect_length(guard, 1L)
    expect_alive(c(pids, guard))
    workers <- clusterPids(cl)
    # One busy, with a child that it waits for.
    parallel:::sendCall(cl[[1L]], function() system("sleep 300"), list())
    expect_true(wait_until(function() {
      length(setdiff(descendants(workers[[1L]]), pids)) > 0L
    }))
    waited <- note_pids(setdiff(descendants(workers[[1L]]), pids))
    tools::pskill(agentPids(cl), tools::SIGKILL)
    expect_gone(c(pids, waited, workers, guard))
    expect_no_error(stopCluster(cl))
  }
})

test_that("what workers have started ends with a killed head", {
  skip_unless_proc()
  child <- start_child({
    cl <- makeRustCluster(2)
    pids <- clusterCall(cl, function() {
      sleeper <- system("sleep 300 >/dev/null 2>&1 & echo $!", intern = TRUE)
      c(sleeper, parallel::mcparallel(repeat NULL)$pid)
    })
    for (node in cl) parallel:::sendCall(node, function() repeat NULL, list())
    say("pids", paste(c(agentPids(cl), clusterPids(cl), unlist(pids)), collapse = " "))
    Sys.sleep(60)
  })
  child_wait_for(child, "pids")
  pids <- child_pids(child, "pids")
  expect_length(pids, 7L)
  guard <- note_pids(setdiff(descendants(pids[[1L]]), pids))
  expect_length(guard, 1L)
  expect_alive(pids)
  child_signal(child, tools::SIGKILL)
  expect_gone(c(pids, guard))
})

test_that("an agent that is killed while it makes workers leaves nothing", {
  skip_unless_proc()
  for (wait in c(0, 0.02, 0.1)) {
    child <- start_child({
      options(warn = -1)
      cl <- makeRustCluster(40, start = "spawn")
      say("up")
      Sys.sleep(60)
    })
    # From its first worker on: the guard is there before that.
    agent <- function() {
      below <- descendants(child$pid)
      below[vapply(below, function(pid) proc_parent_or(pid) == child$pid, NA)]
    }
    proc_parent_or <- function(pid) {
      stat <- proc_stat(pid)
      if (is.null(stat)) 0L else as.integer(stat[[2L]])
    }
    expect_true(wait_until(function() length(descendants(child$pid)) > 3L, interval = 0.001))
    Sys.sleep(wait)
    pids <- note_pids(descendants(child$pid))
    tools::pskill(agent(), tools::SIGKILL)
    # Those that were made meanwhile have the same parents.
    pids <- note_pids(union(pids, descendants(child$pid)))
    child_wait_end(child)
    expect_gone(pids)
  }
})

test_that("the guard holds nothing of the agent's and takes little memory", {
  skip_unless_proc()
  cl <- local_cluster(2)
  guard <- guard_of(cl)
  expect_equal(proc_session(guard), guard)
  expect_equal(proc_group(guard), guard)
  fds <- list.files(sprintf("/proc/%d/fd", guard), full.names = TRUE)
  targets <- Sys.readlink(fds)
  expect_equal(sum(targets == "/dev/null"), 3L)
  expect_equal(sum(startsWith(targets, "pipe:")), 1L)
  expect_length(targets, 4L)
  expect_equal(normalizePath(sprintf("/proc/%d/cwd", guard)), "/")
  status <- readLines(sprintf("/proc/%d/status", guard))
  resident <- as.numeric(sub("[^0-9]*([0-9]+) kB", "\\1", grep("^VmRSS", status, value = TRUE)))
  expect_lt(resident, 16000)
  for (signal in c(tools::SIGTERM, tools::SIGINT, tools::SIGHUP, 13L)) tools::pskill(guard, signal)
  expect_alive(guard)
  stopCluster(cl)
  expect_gone(guard)
})

test_that("the end of the guard is nothing to the cluster", {
  skip_unless_proc()
  cl <- local_cluster(2)
  guard <- guard_of(cl)
  tools::pskill(guard, tools::SIGKILL)
  expect_gone(guard)
  # Not even a zombie is left of it.
  expect_true(wait_until(function() is.na(proc_state(guard))))
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
  error <- caught(clusterCall(cl[1], function() tools::pskill(Sys.getpid(), tools::SIGKILL)))
  expect_rust_error(error, "worker_lost")
  expect_equal(clusterCall(cl[2], identity, 1), list(1))
  pids <- c(agentPids(cl), clusterPids(cl)[[2L]])
  stopCluster(cl)
  expect_gone(pids)
})

test_that("a worker that ends takes along what it started", {
  skip_unless_proc()
  cl <- local_cluster(3)
  pids <- start_children(cl)
  of <- function(i) pids[2 * i - 1:0]
  # Killed from outside.
  tools::pskill(clusterPids(cl)[[1L]], tools::SIGKILL)
  expect_gone(of(1))
  # By itself.
  expect_rust_error(caught(clusterCall(cl[2], quit)), "worker_lost")
  expect_gone(of(2))
  # Asked to.
  expect_alive(of(3))
  stopCluster(cl)
  expect_gone(of(3))
})

test_that("busy workers that ignore SIGTERM, and their children, end with the cluster", {
  skip_unless_proc()
  cl <- local_cluster(2)
  pids <- start_children(cl)
  workers <- clusterPids(cl)
  for (node in cl) {
    parallel:::sendCall(node, function() {
      # A shell that heeds nothing, and waits for another one.
      system("trap '' TERM INT HUP; sh -c \"trap '' TERM INT HUP; sleep 300; sleep 300\"; true")
      repeat NULL
    }, list())
  }
  expect_true(wait_until(function() {
    all(vapply(workers, function(pid) length(descendants(pid)) >= 3L, NA))
  }))
  below <- note_pids(unlist(lapply(workers, descendants)))
  for (pid in workers) tools::pskill(pid, tools::SIGTERM)
  stopCluster(cl)
  expect_gone(c(pids, below, workers))
})

test_that("nothing is left", {
  expect_no_leftovers()
})
