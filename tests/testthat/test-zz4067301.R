skip_on_cran()
skip_unless_proc()
watch_processes()
records <- own_records()
record_env <- records$env
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
test_that("a job that begins after the session has ended has its own stream of random numbers", {
  stub <- local_stub_engine("slurm")
  first <- start_child({
    cl <- makeRustCluster(1, linger = 60)
    system2("touch", file.path(stub$home, "switch", "pending"))
    cl <- addWorkers(cl, launcher, wait = 0)
    clusterSetRNGStream(cl, 5)
    say("workers", clusterPids(cl)[[1L]])
    say("agents", agentPids(cl)[[1L]])
    say("id", clusterId(cl))
  }, env = record_env, values = list(launcher = batch_launcher("slurm", stub, nodes = 1L), stub = stub["home"]))
  expect_child_ends_well(first)
  note_pids(c(child_pids(first, "workers"), child_pids(first, "agents")))
  local_function("redialPatience", c(1, 1))
  cl <- reattachCluster(child_said(first, "id"))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  stub$set("pending", NULL)
  got <- suppressMessages(unlist(clusterCall(cl, stats::rnorm, 1)))
  expect_identical(got, psock_draws(3, 5, 1)[[1L]])
  parallel::stopCluster(cl)
  expect_jobs_gone(stub)
})
