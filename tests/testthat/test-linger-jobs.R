# Clusters of agents that dial back and that wait for another session (`linger`): launchers of batch engines, with and
# without a login node. The engines are stubs, whose jobs are real processes that become real agents.

skip_on_cran()
skip_unless_proc()
watch_processes()

records <- own_records()
record_env <- records$env

# Starts a session with a cluster of two jobs of two workers each, which lingers and has some state. `more`: code that
# runs then. Returns the child, once it has said "ready".
lingering_child <- function(launcher, linger = 60, more = quote(Sys.sleep(300)), ..., .frame = parent.frame()) {
  child <- start_child({
    cl <- do.call(makeRustCluster, c(list(launcher, linger = linger), options))
    clusterSetRNGStream(cl, 42)
    shared <- 17
    clusterExport(cl, "shared")
    say("draws", paste(unlist(clusterCall(cl, rnorm, 1)), collapse = " "))
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    say("id", clusterId(cl))
    eval(more)
  }, env = record_env, values = list(
    launcher = launcher, linger = linger, options = list(...), more = call("quote", more)
  ), .frame = .frame)
  child_wait_for(child, "id", 60)
  note_pids(c(child_pids(child, "workers"), child_pids(child, "agents")))
  child
}

kill_child <- function(child) {
  child_signal(child, tools::SIGKILL)
  child_wait_end(child)
}

draws <- psock_draws(4, 42, 2)

guards_of <- function(stub) {
  pids <- all_pids()
  pids[vapply(pids, function(pid) {
    command <- process_command(pid)
    grepl("^sh .*guard[.]sh", command) && grepl(file.path(stub$home, "shared"), command, fixed = TRUE)
  }, NA)]
}

# The children of agents that look for another session. Other tests run meanwhile: those of this engine have its PATH.
relays <- function(stub) {
  pids <- all_pids()
  pids[vapply(pids, function(pid) {
    if (!startsWith(process_command(pid, "comm"), "rustcluster-rly")) return(FALSE)
    environ <- tryCatch(
      suppressWarnings(readBin(sprintf("/proc/%d/environ", pid), "raw", 1e5)), error = function(e) raw()
    )
    length(grepRaw(file.path(stub$home, "bin"), environ, fixed = TRUE)) > 0L
  }, NA)]
}

expect_jobs_gone <- function(stub, within = 1) {
  gone <- function() {
    !length(stub$jobs()) && !length(list.files(file.path(stub$home, "shared"))) && !length(guards_of(stub))
  }
  wait_until(gone, within + slack())
  expect_identical(stub$jobs(), character())
  expect_identical(list.files(file.path(stub$home, "shared")), character())
  expect_gone(stub$pids(), within)
  expect_gone(guards_of(stub), within)
  expect_true(wait_until(function() !length(relays(stub)), within + slack()))
}

expect_same_cluster <- function(cl, child) {
  expect_identical(clusterPids(cl), child_pids(child, "workers"))
  expect_identical(agentPids(cl), child_pids(child, "agents"))
  expect_identical(unlist(clusterCall(cl, function() shared)), rep(17, 4))
  expect_equal(as.numeric(strsplit(child_said(child, "draws"), " ")[[1L]]), draws[[1L]], tolerance = 1e-5)
  expect_identical(unlist(parallel::clusterCall(cl, stats::rnorm, 1)), draws[[2L]])
  expect_identical(parallel::parSapply(cl, 1:9, function(i) i^2), (1:9)^2)
}

test_that("a session that is killed leaves its jobs to the next one", {
  stub <- local_stub_engine("slurm")
  first <- lingering_child(batch_launcher("slurm", stub))
  id <- child_said(first, "id")
  jobs <- stub$jobs()
  expect_length(jobs, 2L)
  # Another session cannot have the cluster meanwhile.
  expect_error(reattachCluster(id), class = "rustcluster_in_use")
  kill_child(first)
  expect_alive(c(child_pids(first, "workers"), child_pids(first, "agents")))
  expect_identical(listClusters()$state, "lingering")
  cl <- reattachCluster(id)
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_same_cluster(cl, first)
  expect_identical(stub$jobs(), jobs)
  expect_true(wait_until(function() length(guards_of(stub)) == 1L))
  expect_identical(clusterHosts(cl)$state, c("up", "up"))
  expect_true(wait_until(function() identical(clusterHosts(cl)$job_state, c("RUNNING", "RUNNING"))))
  # A large result crosses the new connection.
  expect_length(clusterCall(cl[1], function() runif(2e6))[[1L]], 2e6)
  cl <- removeWorkers(cl, 1:2)
  expect_true(wait_until(function() length(stub$jobs()) == 1L))
  expect_identical(clusterPids(cl), child_pids(first, "workers")[3:4])
  parallel::stopCluster(cl)
  expect_jobs_gone(stub)
  expect_identical(nrow(listClusters()), 0L)
  expect_error(reattachCluster(id), class = "rustcluster_no_cluster")
})

test_that("jobs, agents and guard are gone when nobody comes back", {
  stub <- local_stub_engine("slurm")
  first <- lingering_child(batch_launcher("slurm", stub), linger = 3)
  kill_child(first)
  expect_alive(c(child_pids(first, "workers"), child_pids(first, "agents"), guards_of(stub)))
  expect_length(stub$jobs(), 2L)
  expect_gone(c(child_pids(first, "workers"), child_pids(first, "agents")), within = 4)
  expect_jobs_gone(stub, within = 3)
  expect_true(wait_until(function() nrow(listClusters()) == 0L, 10))
})

test_that("killCluster() cancels jobs, also those that wait in the queue", {
  stub <- local_stub_engine("slurm")
  first <- lingering_child(batch_launcher("slurm", stub))
  kill_child(first)
  killCluster(child_said(first, "id"))
  expect_gone(c(child_pids(first, "workers"), child_pids(first, "agents")))
  expect_jobs_gone(stub)
  stub$set("pending", "Resources")
  second <- start_child({
    cl <- makeRustCluster(launcher, linger = 60, wait = 0)
    say("id", clusterId(cl))
    Sys.sleep(300)
  }, env = record_env, values = list(launcher = batch_launcher("slurm", stub)))
  child_wait_for(second, "id", 60)
  kill_child(second)
  expect_length(stub$jobs(), 2L)
  local_function("redialPatience", function(...) c(1, 1))
  killCluster(child_said(second, "id"))
  expect_jobs_gone(stub)
  expect_identical(nrow(listClusters()), 0L)
})

test_that("the results of calls are kept, and a saved cluster reattaches at its first use", {
  stub <- local_stub_engine("slurm")
  workspace <- tempfile(fileext = ".RData")
  first <- lingering_child(batch_launcher("slurm", stub), more = bquote({
    calls <- list(
      clusterSubmit(cl, { Sys.sleep(1); "kept" }), clusterSubmit(cl, { Sys.sleep(1); stop("failed there") })
    )
    while (!all(vapply(calls, function(call) call$status(), "") == "running")) Sys.sleep(0.02)
    save(cl, file = .(workspace))
    say("saved")
    Sys.sleep(300)
  }))
  child_wait_for(first, "saved")
  kill_child(first)
  # Whoever reads the workspace does not learn the keys.
  restored <- new.env()
  load(workspace, restored)
  record <- readRDS(list.files(records$dir, "[.]rds$", recursive = TRUE, full.names = TRUE))
  expect_match(record$launcherKeys, "^[0-9a-f]{64}$")
  text <- paste(deparse(mget(ls(restored$cl[[1L]]$handle), envir = restored$cl[[1L]]$handle)), collapse = "")
  for (key in c(record$key, record$launcherKeys)) {
    expect_false(grepl(key, text, fixed = TRUE))
    expect_false(any(grepl(key, vapply(all_pids(), process_command, ""), fixed = TRUE)))
  }
  expect_message(got <- clusterCall(restored$cl, function() shared), class = "rustcluster_reattached")
  expect_identical(got, rep(list(17), 4))
  expect_identical(clusterPids(restored$cl), child_pids(first, "workers"))
  kept <- keptResults(restored$cl)
  texts <- vapply(kept, function(x) if (is.null(x$error)) x$value else conditionMessage(x$error), "")
  expect_setequal(texts, c("kept", "failed there"))
  # A job that ends is still given up, and the others go on.
  stub$end(stub$jobs()[[1L]], "FAILED")
  expect_true(wait_until(function() {
    suppressWarnings(tryCatch(clusterCall(clusterAlive(restored$cl), identity, 1), error = function(e) NULL))
    length(clusterAlive(restored$cl)) == 2L
  }))
  suppressWarnings(parallel::stopCluster(restored$cl))
  expect_jobs_gone(stub)
})

test_that("an agent whose connection is lost waits for another session, while this one goes on", {
  stub <- local_stub_engine("slurm")
  first <- lingering_child(batch_launcher("slurm", stub), more = quote({
    say("up")
    while (!file.exists(file.path(dir, "check"))) Sys.sleep(0.05)
    warned <- character()
    values <- withCallingHandlers(clusterLapply(cl, 1:4, function(i) -i), warning = function(w) {
      warned <<- c(warned, conditionMessage(w))
      invokeRestart("muffleWarning")
    })
    while (length(clusterAlive(cl)) > 2L) Sys.sleep(0.05)
    # Nothing waits for the lost host.
    values <- suppressWarnings(parLapply(clusterAlive(cl), 1:2, function(i) i))
    say("warned", gsub("\n", " ", paste(warned, collapse = "; ")))
    say("checked", length(values))
    Sys.sleep(300)
  }))
  child_wait_for(first, "up")
  pid <- relays(stub)[[1L]]
  tools::pskill(pid, tools::SIGKILL)
  file.create(file.path(first$dir, "check"))
  child_wait_for(first, "checked", 60)
  expect_identical(child_said(first, "checked"), "2")
  expect_alive(c(child_pids(first, "workers"), child_pids(first, "agents")))
  kill_child(first)
  cl <- reattachCluster(child_said(first, "id"))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_identical(clusterPids(cl), child_pids(first, "workers"))
  expect_identical(unlist(clusterCall(cl, function() shared)), rep(17, 4))
  parallel::stopCluster(cl)
  expect_jobs_gone(stub)
})

test_that("an agent that was lost ends with its job once the others have newer variables", {
  stub <- local_stub_engine("slurm")
  first <- lingering_child(batch_launcher("slurm", stub), more = quote({
    say("up")
    while (length(suppressWarnings(clusterAlive(cl))) > 2L) Sys.sleep(0.05)
    shared <- 18
    suppressWarnings(clusterExport(clusterAlive(cl), "shared"))
    say("exported")
    Sys.sleep(300)
  }))
  child_wait_for(first, "up")
  tools::pskill(relays(stub)[[1L]], tools::SIGKILL)
  child_wait_for(first, "exported", 60)
  # The agent dials its session again and again.
  expect_true(wait_until(function() length(stub$jobs()) == 1L, 30))
  kill_child(first)
  local_function("redialPatience", function(...) c(3, 3))
  suppressWarnings(cl <- reattachCluster(child_said(first, "id")))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_identical(sum(clusterPids(cl) %in% child_pids(first, "workers")), 2L)
  expect_identical(unlist(clusterCall(clusterAlive(cl), function() shared)), c(18, 18))
  parallel::stopCluster(cl)
  expect_jobs_gone(stub)
})

test_that("an agent that dials too late ends with its job, and nothing waits for it", {
  skip_unless_long()
  stub <- local_stub_engine("slurm")
  first <- lingering_child(batch_launcher("slurm", stub), heartbeat_timeout = 1, more = quote(Sys.sleep(300)))
  agents <- child_pids(first, "agents")
  tools::pskill(agents[[2L]], tools::SIGSTOP)
  kill_child(first)
  local_function("redialPatience", function(...) c(1, 1))
  cl <- reattachCluster(child_said(first, "id"))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_length(clusterAlive(cl), 2L)
  local_fast_queries()
  tools::pskill(agents[[2L]], tools::SIGCONT)
  expect_gone(agents[[2L]], within = 10)
  expect_error(suppressWarnings(clusterCall(cl, identity, 1)), class = "rustcluster_host_failed")
  expect_length(stub$jobs(), 1L)
  suppressWarnings(parallel::stopCluster(cl))
  expect_jobs_gone(stub)
})

test_that("a full disk of the jobs does not end jobs that the next session has taken over", {
  skip_unless_long()
  stub <- local_stub_engine("slurm")
  disk <- file.path(stub$home, "shared")
  dir.create(disk)
  mounted <- suppressWarnings(system2("mount", c("-t", "tmpfs", "-o", "size=1m", "tmpfs", disk), stderr = FALSE))
  skip_if(mounted != 0, "a file system cannot be mounted")
  on.exit(system2("umount", c("-l", disk)), add = TRUE, after = FALSE)
  first <- lingering_child(batch_launcher("slurm", stub), linger = 4)
  kill_child(first)
  fill <- file.path(disk, "fill")
  suppressWarnings(system2("dd", c("if=/dev/zero", paste0("of=", fill), "bs=4k"), stdout = FALSE, stderr = FALSE))
  cl <- reattachCluster(child_said(first, "id"))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_true(wait_until(function() length(guards_of(stub)) == 1L, 3))
  # Longer than the guard of the first session would wait.
  Sys.sleep(6)
  expect_length(stub$jobs(), 2L)
  expect_identical(clusterPids(cl), child_pids(first, "workers"))
  unlink(fill)
  parallel::stopCluster(cl)
  expect_jobs_gone(stub)
})

test_that("a job that begins after the session has ended has its own stream of random numbers", {
  stub <- local_stub_engine("slurm")
  stub$set("delay", 5)
  first <- start_child({
    cl <- makeRustCluster(1, linger = 60)
    cl <- addWorkers(cl, launcher, wait = 0)
    clusterSetRNGStream(cl, 5)
    say("workers", clusterPids(cl)[[1L]])
    say("agents", agentPids(cl)[[1L]])
    say("id", clusterId(cl))
  }, env = record_env, values = list(launcher = batch_launcher("slurm", stub, nodes = 1L)))
  expect_child_ends_well(first)
  note_pids(c(child_pids(first, "workers"), child_pids(first, "agents")))
  local_function("redialPatience", function(...) c(1, 1))
  cl <- reattachCluster(child_said(first, "id"))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  got <- suppressMessages(unlist(clusterCall(cl, stats::rnorm, 1)))
  expect_identical(got, psock_draws(3, 5, 1)[[1L]])
  parallel::stopCluster(cl)
  expect_jobs_gone(stub)
})

test_that("a host that was removed is not waited for", {
  stub <- local_stub_engine("slurm")
  first <- lingering_child(batch_launcher("slurm", stub), more = quote(removeWorkers(cl, 3:4)))
  expect_child_ends_well(first)
  left <- length(readRDS(list.files(records$dir, "[.]rds$", recursive = TRUE, full.names = TRUE))$handle$alive)
  expect_identical(left, 2L)
  began <- proc.time()[["elapsed"]]
  expect_silent(cl <- reattachCluster(child_said(first, "id")))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_lt(proc.time()[["elapsed"]] - began, 20)
  expect_length(cl, 2L)
  # The set-up calls are known.
  grown <- addWorkers(cl, list(host = "localhost", ncore = 1))
  note_processes(grown)
  expect_identical(unlist(clusterCall(grown, function() shared)), rep(17, 3))
  parallel::stopCluster(grown)
  expect_jobs_gone(stub)
})

test_that("a port that another process holds is named, and the cluster can be taken over later", {
  stub <- local_stub_engine("template")
  port <- free_port()
  first <- lingering_child(batch_launcher("template", stub, port = port))
  kill_child(first)
  id <- child_said(first, "id")
  holder <- serverSocket(port)
  error <- expect_error(reattachCluster(id), class = "rustcluster_start_failed")
  expect_match(conditionMessage(error), paste("port", port))
  close(holder)
  cl <- reattachCluster(id)
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_same_cluster(cl, first)
  parallel::stopCluster(cl)
  expect_jobs_gone(stub)
})

test_that("a reattached cluster lingers again, without a host whose job has ended meanwhile", {
  stub <- local_stub_engine("slurm")
  first <- lingering_child(batch_launcher("slurm", stub, cores = 1L), more = quote(Sys.sleep(300)))
  kill_child(first)
  second <- start_child({
    cl <- reattachCluster(id)
    clusterExport(cl, "id")
    say("pids", paste(clusterPids(cl), collapse = " "))
    Sys.sleep(300)
  }, env = record_env, values = list(id = child_said(first, "id")))
  child_wait_for(second, "pids", 60)
  kill_child(second)
  stub$end(stub$jobs()[[1L]], "FAILED")
  local_function("redialPatience", function(...) c(2, 2))
  cl <- reattachCluster(child_said(first, "id"))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  alive <- clusterAlive(cl)
  expect_length(alive, 1L)
  expect_true(clusterPids(alive) %in% child_pids(first, "workers"))
  expect_identical(clusterCall(alive, function() id), list(child_said(first, "id")))
  # Functions that need all nodes wait until the engine says that no job comes.
  local_fast_queries()
  expect_error(suppressWarnings(clusterCall(cl, identity, 1)), class = "rustcluster_host_failed")
  expect_setequal(clusterHosts(cl)$state, c("lost", "up"))
  suppressWarnings(parallel::stopCluster(cl))
  expect_jobs_gone(stub)
})

test_that("a cluster behind a login node lingers, and its gateway is started again at the same port", {
  skip_without_sshd()
  stub <- local_stub_engine("slurm")
  ssh <- local_sshd(config = paste0("SetEnv PATH=", Sys.getenv("PATH")))
  launcher <- slurm(
    nodes = 2, cores = 2, login = "127.0.0.2", dir = file.path(stub$home, "shared"), address = "127.0.0.1",
    rscript = file.path(R.home("bin"), "Rscript"), rlibs = .libPaths()
  )
  first <- lingering_child(launcher, rshcmd = ssh$rshcmd)
  kill_child(first)
  expect_alive(c(child_pids(first, "workers"), child_pids(first, "agents")))
  cl <- reattachCluster(child_said(first, "id"))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_same_cluster(cl, first)
  expect_true(wait_until(function() length(guards_of(stub)) == 1L, 10))
  link <- cl[[1L]]$handle$logins[[1L]]$link
  parallel::stopCluster(cl)
  expect_jobs_gone(stub)
  expect_false(any(file.exists(c(link$local, link$remote))))
  if (!long_tests()) return()
  # Nobody comes back.
  second <- lingering_child(launcher, rshcmd = ssh$rshcmd, linger = 3)
  kill_child(second)
  expect_length(stub$jobs(), 2L)
  expect_gone(c(child_pids(second, "workers"), child_pids(second, "agents")), within = 4)
  expect_jobs_gone(stub, within = 4)
  expect_identical(list.files("/tmp", paste0("^rustcluster-", child_said(second, "id"))), character())
  # This machine counts the time from when it first sees that the session has ended, and keeps the record for a while.
  expect_true(wait_until(function() !nrow(listClusters()), 10))
  unlink(list.files(records$dir, child_said(second, "id"), recursive = TRUE, full.names = TRUE))
})

test_that("a gateway of a frozen link leaves jobs alone that the next session has taken over", {
  skip_without_sshd()
  skip_unless_long()
  stub <- local_stub_engine("slurm")
  ssh <- local_sshd(config = paste0("SetEnv PATH=", Sys.getenv("PATH")))
  launcher <- slurm(
    nodes = 2, cores = 2, login = "127.0.0.2", dir = file.path(stub$home, "shared"), address = "127.0.0.1",
    rscript = file.path(R.home("bin"), "Rscript"), rlibs = .libPaths()
  )
  first <- lingering_child(launcher, rshcmd = ssh$rshcmd, heartbeat_timeout = 3, linger = 5)
  clients <- descendants(first$pid)
  clients <- clients[vapply(clients, function(p) startsWith(process_command(p), "ssh "), NA)]
  for (p in clients) tools::pskill(p, tools::SIGSTOP)
  kill_child(first)
  # The gateway of the session before has the port until it has missed heartbeats.
  cl <- reattachCluster(child_said(first, "id"))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_same_cluster(cl, first)
  for (p in clients) tools::pskill(p, tools::SIGKILL)
  # That gateway has ended, and `linger` seconds are over.
  Sys.sleep(9)
  expect_identical(unlist(clusterCall(cl, function() shared)), rep(17, 4))
  expect_length(stub$jobs(), 2L)
  expect_length(guards_of(stub), 1L)
  parallel::stopCluster(cl)
  expect_jobs_gone(stub)
})

test_that("a session that ends before its cluster has started leaves no jobs", {
  stub <- local_stub_engine("slurm")
  stub$set("pending", "Resources")
  child <- start_child(makeRustCluster(launcher, linger = 60), env = record_env, values = list(
    launcher = batch_launcher("slurm", stub)
  ))
  expect_true(wait_until(function() length(stub$jobs()) == 2L))
  kill_child(child)
  expect_jobs_gone(stub)
  expect_identical(nrow(listClusters()), 0L)
})

test_that("a handle that is garbage-collected leaves its cluster to the next handle of the session", {
  stub <- local_stub_engine("slurm")
  cl <- note_processes(makeRustCluster(batch_launcher("slurm", stub, nodes = 1L), linger = 60))
  id <- clusterId(cl)
  pids <- clusterPids(cl)
  expect_error(reattachCluster(id), "this session", class = "rustcluster_in_use")
  rm(cl)
  gc()
  cl <- reattachCluster(id)
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_identical(clusterPids(cl), pids)
  parallel::stopCluster(cl)
  expect_jobs_gone(stub)
})

test_that("hosts that no other session could find cannot linger", {
  stub <- local_stub_engine("slurm")
  error <- expect_error(makeRustCluster(commandLauncher("sh", workers = 1), linger = 1),
                        class = "rustcluster_bad_argument")
  expect_match(conditionMessage(error), "slurm\\(\\)")
  expect_identical(error$argument, "linger")
  error <- expect_error(makeRustCluster(batch_launcher("slurm", stub, max = 2), linger = 1),
                        class = "rustcluster_bad_argument")
  expect_match(conditionMessage(error), "`max`")
  cl <- local_cluster(1, linger = 60)
  expect_error(addWorkers(cl, commandLauncher("sh", workers = 1)), class = "rustcluster_bad_argument")
  # Jobs that are added later linger, too.
  cl <- addWorkers(cl, batch_launcher("slurm", stub, nodes = 1L, cores = 1L))
  expect_identical(readLines(file.path(cl[[1L]]$handle$batches[[1L]]$directory, "linger")), "60")
  parallel::stopCluster(cl)
  expect_jobs_gone(stub)
})

test_that("nothing is left", {
  expect_no_leftovers()
  expect_no_records(records)
})
