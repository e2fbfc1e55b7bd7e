# The planned end of nodes: the other nodes go on undisturbed, and no process is left of those that were removed.

skip_on_cran()
watch_processes()

# Returns a spec of two hosts on this machine, which are two agents.
two_hosts <- function(first = 2L, second = 2L, ...) {
  list(
    list(host = "localhost", ncore = first, ...),
    list(host = "localhost", ncore = second, rscript_envs = c(SECOND_HOST = "1"))
  )
}

# A call that ends when the test creates the file.
held <- function(cl, flag, value) {
  clusterSubmit(cl, {
    while (!file.exists(flag)) Sys.sleep(0.01)
    list(value = value, pid = Sys.getpid())
  }, flag = flag, value = value)
}

running <- function(call) wait_until(function() call$status() == "running")

test_that("the rest of a cluster without some nodes works as parallel's does", {
  cl <- local_cluster(4)
  psock <- parallel::makePSOCKcluster(2)
  on.exit(parallel::stopCluster(psock), add = TRUE, after = FALSE)
  pids <- clusterPids(cl)
  rest <- removeWorkers(cl, c(2, 4))
  expect_s3_class(rest, c("RustCluster", "cluster"), exact = TRUE)
  expect_false(withVisible(removeWorkers(rest, integer()))$visible)
  expect_gone(pids[c(2, 4)])
  expect_identical(clusterPids(rest), pids[c(1, 3)])
  expect_true(all(alive(c(pids[c(1, 3)], agentPids(rest)))))
  for (apply in list(parallel::parLapply, parallel::parLapplyLB, parallel::clusterApply)) {
    expect_identical(apply(rest, 1:9, function(x) x^2), apply(psock, 1:9, function(x) x^2))
  }
  expect_identical(clusterLapply(rest, 1:9, function(x) -x), lapply(1:9, function(x) -x))
  expect_rust_error(caught(parallel::clusterCall(cl[2], identity, 1)), "stopped")
  expect_identical(clusterStatus(cl)$state, c("idle", "stopped", "idle", "stopped"))
})

test_that("a node that is in the cluster twice is removed twice", {
  cl <- local_cluster(3)
  rest <- removeWorkers(cl[c(1, 2, 1, 3)], 1)
  expect_identical(clusterPids(rest), clusterPids(cl)[2:3])
  expect_length(rest, 2)
})

test_that("the agent of a host ends with its last worker, and the cluster with its last host", {
  cl <- local_cluster(two_hosts())
  agents <- agentPids(cl)
  pids <- clusterPids(cl)
  expect_length(agents, 2)
  rest <- removeWorkers(cl, 3)
  expect_true(all(alive(agents)))
  rest <- removeWorkers(rest, 3)
  expect_gone(c(pids[3:4], agents[[2L]]), within = 0)
  expect_identical(agentPids(rest), agents[[1L]])
  expect_identical(parallel::parLapply(rest, 1:5, sqrt), lapply(1:5, sqrt))
  none <- removeWorkers(rest, "localhost")
  expect_length(none, 0)
  expect_gone(c(pids, agents), within = 0)
  expect_rust_error(caught(parallel::clusterCall(cl, identity, 1)), "stopped")
  expect_rust_error(caught(removeWorkers(cl, 1)), "stopped")
})

test_that("a call that runs on the node ends first, and waiting calls run elsewhere", {
  cl <- local_cluster(2)
  pids <- clusterPids(cl)
  first <- held(cl, flag <- tempfile(), 1)
  second <- held(cl, other <- tempfile(), 2)
  expect_true(running(first) && running(second))
  waiting <- lapply(1:5, function(i) clusterSubmit(cl, list(i, Sys.getpid()), i = i))
  # The session waits for the end, so another process creates the file.
  system2("sh", c("-c", shQuote(paste("sleep 1; touch", flag, other))), wait = FALSE)
  rest <- removeWorkers(cl, 1)
  expect_gone(pids[[1L]], within = 0)
  expect_identical(c(first$value()$value, second$value()$value), c(1, 2))
  expect_setequal(c(first$value()$pid, second$value()$pid), pids)
  values <- lapply(waiting, function(call) call$value())
  expect_identical(lapply(values, `[[`, 1L), as.list(1:5))
  expect_true(all(vapply(values[-1L], `[[`, 0L, 2L) == clusterPids(rest)))
})

test_that("calls that no other node may run end first", {
  cl <- local_cluster(2)
  first <- held(cl[1], flag <- tempfile(), 1)
  expect_true(running(first))
  second <- clusterSubmit(cl[1], Sys.getpid())
  pid <- clusterPids(cl)[[1L]]
  system2("sh", c("-c", shQuote(paste("sleep 1; touch", flag))), wait = FALSE)
  removeWorkers(cl, 1)
  expect_identical(first$value()$value, 1)
  expect_identical(second$value(), pid)
  expect_gone(pid, within = 0)
})

test_that("without a drain, calls are repeated on other nodes, and that is no retry", {
  cl <- local_cluster(2, retries = 0)
  first <- held(cl, flag <- tempfile(), "value")
  expect_true(running(first))
  busy <- which(clusterStatus(cl)$state == "busy")
  pids <- clusterPids(cl)
  expect_no_warning(rest <- removeWorkers(cl, busy, drain = FALSE))
  expect_gone(pids[[busy]], within = 0)
  file.create(flag)
  expect_identical(first$value(), list(value = "value", pid = pids[[3L - busy]]))
  expect_identical(clusterPids(rest), pids[[3L - busy]])
})

test_that("after `timeout` seconds, the workers are stopped", {
  cl <- local_cluster(2)
  first <- held(cl, flag <- tempfile(), 7)
  expect_true(running(first))
  busy <- which(clusterStatus(cl)$state == "busy")
  pids <- clusterPids(cl)
  rest <- removeWorkers(cl, busy, timeout = 0.3)
  expect_gone(pids[[busy]], within = 0)
  file.create(flag)
  expect_identical(first$value(), list(value = 7, pid = pids[[3L - busy]]))
})

test_that("bad arguments are refused, and nothing is removed", {
  cl <- local_cluster(2)
  for (which in list(0, 3, -1, 1.5, NA, TRUE, "nowhere", NA_character_, list(1), NULL)) {
    expect_rust_error(caught(removeWorkers(cl, which)), "bad_argument")
  }
  expect_rust_error(caught(removeWorkers(cl)), "bad_argument")
  expect_rust_error(caught(removeWorkers(cl, 1, drain = NA)), "bad_argument")
  expect_rust_error(caught(removeWorkers(cl, 1, timeout = -1)), "bad_argument")
  expect_rust_error(caught(removeWorkers(1, 1)), "bad_argument")
  expect_match(conditionMessage(caught(removeWorkers(cl, "nowhere"))), "its hosts are .localhost.")
  expect_identical(clusterStatus(cl)$state, c("idle", "idle"))
})

test_that("a host over ssh is removed with its agent, and is not reconnected", {
  skip_without_sshd()
  ssh <- local_sshd()
  cl <- over_ssh(ssh, c("127.0.0.2" = 2, localhost = 1), reconnect = TRUE)
  pids <- clusterPids(cl)
  agents <- agentPids(cl)
  rest <- removeWorkers(cl, "127.0.0.2")
  expect_gone(c(pids[1:2], agents[[1L]]))
  expect_identical(clusterPids(rest), pids[[3L]])
  expect_identical(parallel::parSapply(rest, 1:3, function(i) i * 2), 1:3 * 2)
  # The first reconnection would be attempted after 1 s.
  Sys.sleep(2)
  expect_identical(agentPids(cl), agents[[2L]])
  expect_identical(clusterPids(cl), c(NA, NA, pids[[3L]]))
})

# Agents in batch jobs ------------------------------------------------------------------------------

in_job <- function(...) two_hosts(rscript_envs = c(RUSTCLUSTER_JOB = "1", ...))

# Returns the value and the classes of the messages and warnings.
told <- function(expr) {
  raised <- character()
  value <- withCallingHandlers(expr, message = function(m) {
    raised <<- c(raised, class(m)[[1L]])
    invokeRestart("muffleMessage")
  }, warning = function(w) {
    raised <<- c(raised, class(w)[[1L]])
    invokeRestart("muffleWarning")
  })
  list(value = value, raised = raised)
}

test_that("an agent in a job drains at SIGTERM, SIGUSR1 and SIGUSR2: no task fails, and nothing is left", {
  for (signal in c(tools::SIGTERM, tools::SIGUSR1, tools::SIGUSR2)) {
    cl <- local_cluster(in_job(), retries = 0)
    agents <- agentPids(cl)
    pids <- clusterPids(cl)
    started <- tempfile()
    system2("sh", c("-c", shQuote(sprintf(
      "while ! test -e %s; do sleep 0.05; done; kill -%d %d", started, signal, agents[[1L]]
    ))), wait = FALSE)
    job <- told(parLapplyLB(cl, 1:60, function(i, started) {
      if (i == 5) file.create(started)
      Sys.sleep(0.05)
      list(i, Sys.getpid())
    }, started, chunk.size = 1))
    expect_identical(lapply(job$value, `[[`, 1L), as.list(1:60))
    on <- vapply(job$value, `[[`, 0L, 2L)
    expect_true(all(utils::tail(on, 20) %in% pids[3:4]))
    expect_gone(c(pids[1:2], agents[[1L]]))
    after <- told(parSapply(clusterAlive(cl), 1:4, identity))
    expect_identical(after$value, 1:4)
    expect_identical(c(job$raised, after$raised), "rustcluster_host_draining")
    expect_identical(clusterPids(cl), c(NA, NA, pids[3:4]))
    parallel::stopCluster(cl)
  }
})

test_that("the known end of a job makes its agent drain before", {
  cl <- local_cluster(in_job(RUSTCLUSTER_JOB_END = format(as.integer(Sys.time()) + 12L)))
  pids <- clusterPids(cl)
  expect_true(wait_until(function() is.na(clusterPids(cl)[[1L]]), timeout = 40))
  expect_gone(pids[1:2])
  message <- tryCatch(parLapply(cl[3:4], 1:2, identity), message = identity)
  expect_s3_class(message, "rustcluster_host_draining")
  expect_match(conditionMessage(message), "is draining because its job ends in [1-4] s \\(time limit\\)")
})

test_that("calls that end with their job are repeated, which counts as no attempt", {
  cl <- local_cluster(in_job(), retries = 0)
  flag <- tempfile()
  calls <- lapply(1:4, function(i) held(cl, flag, i))
  for (call in calls) expect_true(running(call))
  agents <- agentPids(cl)
  pids <- clusterPids(cl)
  tools::pskill(agents[[1L]], tools::SIGTERM)
  expect_true(wait_until(function() all(clusterStatus(cl)$state == c("draining", "draining", "busy", "busy"))))
  # The time that the batch engine grants is over.
  tools::pskill(agents[[1L]], tools::SIGKILL)
  expect_gone(c(pids[1:2], agents[[1L]]))
  file.create(flag)
  values <- told({
    values <- lapply(calls, function(call) call$value())
    # The calls may have ended before anybody asks.
    rustcluster:::showEvents(cl[[1L]]$handle)
    values
  })
  expect_identical(vapply(values$value, `[[`, 0L, "value"), 1:4)
  expect_true(all(vapply(values$value, `[[`, 0L, "pid") %in% pids[3:4]))
  expect_identical(values$raised, "rustcluster_host_draining")
})

test_that("the error names the job, the worker and the host if no worker is left", {
  cl <- local_cluster(in_job(), retries = 0)
  call <- held(cl[1], tempfile(), 1)
  expect_true(running(call))
  agent <- agentPids(cl)[[1L]]
  tools::pskill(agent, tools::SIGTERM)
  expect_true(wait_until(function() clusterStatus(cl)$state[[1L]] == "draining"))
  tools::pskill(agent, tools::SIGKILL)
  expect_gone(agent)
  error <- told(caught(call$value()))$value
  expect_rust_error(error, "job_ended")
  expect_match(conditionMessage(error), "worker 1 on host .localhost.: its job ended \\(cancelled or preempted\\)")
})

test_that("outside of a job, SIGTERM ends an agent and its workers", {
  cl <- local_cluster(two_hosts())
  pids <- clusterPids(cl)
  tools::pskill(agentPids(cl)[[1L]], tools::SIGTERM)
  expect_gone(pids[1:2])
  expect_true(wait_until(function() is.na(clusterPids(cl)[[1L]])))
  warning <- tryCatch(parLapply(cl[3:4], 1:2, identity), warning = identity)
  expect_s3_class(warning, "rustcluster_host_failed")
})

test_that("workers of an agent in a job have the usual signal handlers, and the variables are not theirs", {
  cl <- local_cluster(in_job())
  values <- parallel::clusterEvalQ(cl[1:2], Sys.getenv(c("RUSTCLUSTER_JOB", "RUSTCLUSTER_JOB_END")))
  expect_identical(unlist(values, use.names = FALSE), rep("", 4))
  pid <- clusterPids(cl)[[1L]]
  caught_signals <- function(pid) {
    line <- grep("^SigCgt:", readLines(sprintf("/proc/%d/status", pid)), value = TRUE)
    bits <- rev(utf8ToInt(sub("^SigCgt:\\s*", "", line)))
    digits <- match(chartr("ABCDEF", "abcdef", intToUtf8(bits, TRUE)), c(0:9, letters[1:6])) - 1L
    vapply(c(15L, 10L, 12L), function(signal) {
      bit <- signal - 1L
      bitwAnd(digits[[bit %/% 4L + 1L]], bitwShiftL(1L, bit %% 4L)) != 0L
    }, NA)
  }
  # As in this session: R handles SIGUSR1 and SIGUSR2 itself.
  expect_identical(caught_signals(pid), caught_signals(Sys.getpid()))
  expect_identical(caught_signals(agentPids(cl)[[1L]]), c(TRUE, TRUE, TRUE))
})

test_that("workers that have not joined are removed at once", {
  skip_on_cran()
  for (drain in c(TRUE, FALSE)) {
    gate <- gates()
    gate$open("early")
    cl <- local_cluster(c(early = 2, late = 2, later = 2), rshcmd = gate$ssh, rlibs = .libPaths(), wait = "first")
    expect_match(format(cl), "nodes 3 to 6 waiting$")
    # One worker of a host, and all of another one.
    rest <- removeWorkers(cl, c(4, 5, 6), drain = drain)
    expect_length(rest, 3L)
    expect_identical(clusterHosts(cl)$state, c("up", "waiting", "stopped"))
    expect_identical(clusterLapply(rest, 1:5, identity), as.list(1:5))
    gate$open("late", "later")
    suppressMessages(expect_length(unique(clusterCall(rest, Sys.getpid)), 3L))
    expect_identical(clusterStatus(rest)$host, c("early", "early", "late"))
    parallel::stopCluster(cl[3])
    expect_identical(clusterHosts(cl)$state, c("up", "stopped", "stopped"))
    stopCluster(cl)
  }
})

test_that("workers that have not joined are stopped at once, and the last of them end the cluster", {
  skip_on_cran()
  gate <- gates()
  gate$open("early")
  cl <- local_cluster(c(early = 1, late = 2), rshcmd = gate$ssh, rlibs = .libPaths(), wait = "first")
  parallel::stopCluster(cl[2])
  parallel::stopCluster(cl[3])
  expect_identical(clusterHosts(cl)$state, c("up", "stopped"))
  parallel::stopCluster(cl[1])
  expect_rust_error(caught(clusterCall(cl, Sys.getpid)), "stopped")
})

test_that("jobs that only removed workers wait for are cancelled", {
  skip_on_cran()
  stub <- local_stub_engine("slurm")
  stub$set("pending", "Resources")
  cl <- local_cluster(list(list(host = "localhost", ncore = 1), batch_launcher("slurm", stub, nodes = 3L)), wait = 1)
  expect_length(stub$jobs(), 3L)
  rest <- removeWorkers(cl, 2:3)
  expect_true(wait_until(function() length(stub$jobs()) == 2L))
  # A host that keeps a worker keeps its job.
  rest <- removeWorkers(rest, 2)
  expect_identical(clusterHosts(cl)$state, c("up", "stopped", "waiting", "waiting"))
  expect_identical(clusterLapply(rest, 1:3, identity), as.list(1:3))
  expect_length(stub$jobs(), 2L)
  stopCluster(cl)
  expect_true(wait_until(function() !length(stub$jobs())))
})

test_that("no process is left", {
  expect_no_leftovers()
})
