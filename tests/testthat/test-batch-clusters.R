# Clusters over batch engines. The engines are stubs, whose jobs are real processes that become real agents.

watch_processes()

expect_nothing_left <- function(stub) {
  expect_identical(stub$jobs(), character())
  expect_identical(list.files(file.path(stub$home, "shared")), character())
  expect_gone(stub$pids())
}

# The states of the jobs of a cluster once the engine has answered.
job_states <- function(cl) {
  wait_until(function() !anyNA(clusterHosts(cl)$job_state))
  clusterHosts(cl)$job_state
}

for (kind in c("slurm", "htcondor", "gridEngine", "pbs", "lsf", "template")) {
  test_that(paste("a cluster runs over", kind), {
    stub <- local_stub_engine(kind)
    cl <- local_cluster(batch_launcher(kind, stub))
    expect_length(cl, 4L)
    expect_identical(parLapply(cl, 1:20, function(i) i^2), lapply(1:20, function(i) i^2))
    expect_identical(parLapplyLB(cl, 1:20, sqrt), lapply(1:20, sqrt))
    expect_length(unique(clusterCall(cl, Sys.getpid)), 4L)
    # The agents are the jobs themselves.
    expect_setequal(agentPids(cl), stub$pids())
    hosts <- clusterHosts(cl)
    expect_equal(hosts$state, c("up", "up"))
    expect_match(hosts$job, "90000010")
    stopCluster(cl)
    expect_nothing_left(stub)
  })
}

test_that("workers of jobs have the variables of the cluster, which are set before R starts", {
  stub <- local_stub_engine("slurm")
  profile <- tempfile("profile-")
  writeLines("options(rc.profile = Sys.getenv('RC_ODD'))", profile)
  on.exit(unlink(profile), add = TRUE, after = FALSE)
  odd <- "it's \"q\" $HOME\n\u00e4"
  cl <- local_cluster(batch_launcher("slurm", stub, 1L), rscript_envs = c(
    RC_ODD = odd, R_PROFILE_USER = profile, RC_GONE = NA
  ))
  found <- clusterCall(cl, function() list(Sys.getenv("RC_ODD"), getOption("rc.profile"), Sys.getenv("RC_GONE", NA)))
  expect_identical(found, rep(list(list(odd, odd, NA_character_)), 2L))
  stopCluster(cl)
  expect_nothing_left(stub)
  expect_error(makeRustCluster(batch_launcher("slurm", stub), rscript_envs = c(a.b = "1")), "a.b",
               class = "rustcluster_bad_argument")
  expect_nothing_left(stub)
})

test_that("launchers and other hosts make one cluster, and equal launchers are two", {
  stub <- local_stub_engine("slurm")
  launcher <- batch_launcher("slurm", stub, nodes = 1L, cores = 1L)
  cl <- local_cluster(list(launcher, list(host = "localhost", ncore = 2), launcher))
  expect_length(cl, 4L)
  expect_identical(clusterApply(cl, 1:8, function(i) i), as.list(1:8))
  expect_equal(vapply(cl[c(1, 4)], `[[`, "", "host"), c("stub", "stub"))
  expect_length(unique(clusterCall(cl, Sys.getpid)), 4L)
})

test_that("a cluster begins with the jobs that run, and takes on the others", {
  stub <- local_stub_engine("slurm")
  stub$set("pending", "Resources")
  launcher <- batch_launcher("slurm", stub)
  cl <- local_cluster(list(list(host = "localhost", ncore = 1), launcher), wait = "first")
  expect_length(cl, 5L)
  wait_until(function() !anyNA(clusterHosts(cl)$job_state[2:3]))
  hosts <- clusterHosts(cl)
  expect_equal(hosts$state, c("up", "waiting", "waiting"))
  expect_equal(hosts$job_state[2:3], rep("PENDING (Resources)", 2))
  global(offset <- 5)
  clusterExport(cl, "offset", globalenv())
  expect_identical(clusterLapply(cl, 1:9, function(i) i + offset), lapply(1:9, function(i) i + 5))
  stopCluster(cl)
  expect_nothing_left(stub)
})

test_that("the error of a start says what the engine says", {
  stub <- local_stub_engine("slurm")
  local_fast_queries()
  stub$set("refuse", "sbatch: error: invalid partition specified: nowhere")
  failed <- caught(makeRustCluster(batch_launcher("slurm", stub)))
  expect_s3_class(failed, "rustcluster_start_failed")
  expect_match(conditionMessage(failed), "invalid partition specified: nowhere")
  expect_match(conditionMessage(failed), "#SBATCH --cpus-per-task=2")
  expect_nothing_left(stub)
  # A job that does not start.
  stub$set("refuse", NULL)
  stub$set("pending", "QOSMaxCpuPerUserLimit")
  failed <- caught(makeRustCluster(batch_launcher("slurm", stub), setup_timeout = 3))
  expect_s3_class(failed, "rustcluster_start_failed")
  expect_match(conditionMessage(failed), "no agent has connected within 3 s.*PENDING \\(QOSMaxCpuPerUserLimit\\)")
  expect_nothing_left(stub)
  # A job that ends before its agent has connected: the end of its log is in the error.
  stub$set("pending", NULL)
  failed <- caught(makeRustCluster(batch_launcher("slurm", stub, setup = "echo no such module >&2; exit 3")))
  expect_s3_class(failed, "rustcluster_start_failed")
  expect_match(conditionMessage(failed), "ended before its agent had connected \\(FAILED.*no such module")
  expect_nothing_left(stub)
  # A job that runs, and does not reach this machine.
  failed <- caught(makeRustCluster(
    batch_launcher("slurm", stub, setup = "echo begun; exec sleep 600"), setup_timeout = 3
  ))
  expect_match(
    conditionMessage(failed),
    "is RUNNING; check that the node can connect to this machine \\(`address`, `port`\\).*\n  begun"
  )
  expect_nothing_left(stub)
})

test_that("tasks of a job that is cancelled run elsewhere, and it is no attempt of theirs", {
  stub <- local_stub_engine("slurm")
  local_fast_queries()
  cl <- local_cluster(batch_launcher("slurm", stub), retries = 0)
  cancelled <- FALSE
  cancel <- function(i, value) {
    if (cancelled) return()
    cancelled <<- TRUE
    system2("scancel", "900000100_1")
  }
  values <- suppressWarnings(suppressMessages(clusterLapply(cl, 1:60, function(i) {
    Sys.sleep(0.05)
    i
  }, .onResult = cancel)))
  expect_identical(values, as.list(1:60))
  expect_true(cancelled)
  # The cluster goes on without that host.
  wait_until(function() {
    suppressWarnings(suppressMessages(rustcluster:::showEvents(cl[[1L]]$handle)))
    sum(clusterHosts(cl)$state == "lost") == 1L
  })
  expect_identical(clusterLapply(cl, 1:6, identity), as.list(1:6))
})

test_that("a job that the engine starts again takes its place", {
  stub <- local_stub_engine("slurm")
  cl <- local_cluster(batch_launcher("slurm", stub, nodes = 1L, cores = 2L))
  global(state <- 42)
  clusterExport(cl, "state", globalenv())
  first <- agentPids(cl)
  # The job has been requeued: it is PENDING, and then starts again under its number.
  stub$requeue("900000100_none")
  expect_gone(first)
  values <- suppressWarnings(suppressMessages(clusterLapply(cl, 1:10, function(i) i + state)))
  expect_identical(values, lapply(1:10, function(i) i + 42))
  expect_false(any(agentPids(cl) %in% first))
  # The second worker may still be starting.
  expect_true(wait_until(function() clusterHosts(cl)$state == "up"))
})

test_that("a job that its time limit has ended is followed by another while there is work", {
  stub <- local_stub_engine("slurm")
  local_fast_queries()
  cl <- local_cluster(batch_launcher("slurm", stub, nodes = 1L, cores = 1L), retries = 0)
  ended <- FALSE
  end <- function(i, value) {
    if (ended) return()
    ended <<- TRUE
    stub$end("900000100_none", "TIMEOUT")
  }
  messages <- character()
  values <- withCallingHandlers(
    suppressWarnings(clusterLapply(cl, 1:20, function(i) {
      Sys.sleep(0.05)
      i
    }, .onResult = end)),
    message = function(m) {
      messages <<- c(messages, class(m)[[1L]])
      invokeRestart("muffleMessage")
    }
  )
  expect_identical(values, as.list(1:20))
  expect_true("rustcluster_job_renewed" %in% messages)
  expect_true("900000101_none" %in% stub$jobs())
  stopCluster(cl)
  expect_nothing_left(stub)
})

test_that("a call goes on with further jobs when all jobs drain at once", {
  stub <- local_stub_engine("slurm")
  local_fast_queries()
  cl <- local_cluster(batch_launcher("slurm", stub, nodes = 2L, cores = 1L), retries = 0)
  agents <- agentPids(cl)
  warned <- FALSE
  warn <- function(i, value) {
    if (!warned) tools::pskill(agents, tools::SIGUSR1)
    warned <<- TRUE
  }
  classes <- character()
  values <- withCallingHandlers(
    clusterLapply(cl, 1:20, function(i) {
      Sys.sleep(0.05)
      i
    }, .onResult = warn),
    message = function(m) {
      classes <<- c(classes, class(m)[[1L]])
      invokeRestart("muffleMessage")
    }
  )
  expect_identical(values, as.list(1:20))
  expect_true(all(c("rustcluster_host_draining", "rustcluster_job_renewed") %in% classes))
  stopCluster(cl)
  expect_nothing_left(stub)
})

test_that("nothing is left of a killed session, an interrupted start, or a killed guard", {
  stub <- local_stub_engine("slurm")
  child <- start_child({
    cl <- makeRustCluster(slurm(nodes = 2, cores = 1, dir = shared))
    say("up")
    Sys.sleep(600)
  }, values = list(shared = file.path(stub$home, "shared")))
  child_wait_for(child, "up")
  expect_length(stub$jobs(), 2L)
  child_signal(child, tools::SIGKILL)
  wait_until(function() !length(stub$jobs()) && !length(list.files(file.path(stub$home, "shared"))))
  expect_nothing_left(stub)
})
