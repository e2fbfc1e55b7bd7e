# Clusters that wait for another session (`linger`), with real sessions, processes and an sshd. Which processes are
# left is checked by pid. A PSOCK cluster says which random numbers come next.

skip_on_cran()
skip_unless_proc()
watch_processes()

records <- own_records()
record_env <- records$env

# Returns the pids that the child has said as "workers" and "agents".
lingering_pids <- function(child) note_pids(c(child_pids(child, "workers"), child_pids(child, "agents")))

socket_directories <- function(id) Sys.glob(file.path("/tmp", paste0("rustcluster-", id, "-*")))

test_that("a session that is killed leaves its cluster to the next one", {
  first <- start_child({
    cl <- makeRustCluster(3, linger = 60)
    clusterSetRNGStream(cl, 42)
    shared <- 17
    clusterExport(cl, "shared")
    invisible(clusterEvalQ(cl, library(stats4)))
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    say("draws", paste(unlist(clusterCall(cl, rnorm, 1)), collapse = " "))
    say("id", clusterId(cl))
    say("ready")
    Sys.sleep(100)
  }, env = record_env)
  child_wait_for(first, "ready")
  pids <- lingering_pids(first)
  workers <- child_pids(first, "workers")
  id <- child_said(first, "id")
  # Another session cannot have the cluster meanwhile.
  expect_identical(listClusters()$state, "in use")
  expect_error(reattachCluster(id), class = "rustcluster_in_use")
  child_signal(first, tools::SIGKILL)
  child_wait_end(first)
  expect_alive(pids)
  listed <- listClusters()
  expect_identical(listed$id, id)
  expect_identical(listed$state, "lingering")
  expect_identical(listed$workers, 3L)

  cl <- reattachCluster(id)
  expect_identical(clusterPids(cl), workers)
  expect_length(cl, 3L)
  expect_identical(clusterId(cl), id)
  oracle <- psock_draws(3, 42, 2)
  expect_equal(as.numeric(strsplit(child_said(first, "draws"), " ")[[1L]]), oracle[[1L]], tolerance = 1e-5)
  expect_identical(unlist(parallel::clusterCall(cl, stats::rnorm, 1)), oracle[[2L]])
  expect_identical(unlist(clusterCall(cl, function() shared)), rep(17, 3))
  expect_true("stats4" %in% clusterCall(cl, function() .packages())[[2L]])
  expect_identical(parallel::parSapply(cl, 1:9, function(i) i^2), (1:9)^2)
  big <- clusterCall(cl[1], function() runif(2e6))[[1L]]
  expect_length(big, 2e6)
  # A worker that dies is restored as before.
  tools::pskill(clusterPids(cl)[[2L]], tools::SIGKILL)
  wait_until(function() !identical(clusterPids(cl)[[2L]], workers[[2L]]))
  expect_identical(suppressWarnings(unlist(clusterCall(cl, function() shared))), rep(17, 3))
  note_processes(cl)
  parallel::stopCluster(cl)
  expect_gone(pids)
  expect_identical(nrow(listClusters()), 0L)
  expect_length(socket_directories(id), 0L)
  expect_error(reattachCluster(id), class = "rustcluster_no_cluster")
})

test_that("nothing is left when nobody comes back", {
  first <- start_child({
    cl <- makeRustCluster(2, linger = 2)
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    say("id", clusterId(cl))
    # The end of a script without stopCluster().
  }, env = record_env)
  expect_child_ends_well(first)
  pids <- lingering_pids(first)
  expect_alive(pids)
  expect_gone(pids, within = 3)
  id <- child_said(first, "id")
  expect_true(wait_until(function() !length(socket_directories(id)), 5))
  expect_true(wait_until(function() nrow(listClusters()) == 0L, 10))
  expect_error(reattachCluster(id), class = "rustcluster_no_cluster")
})

test_that("SIGTERM ends an agent that waits, and an agent that is killed leaves nothing", {
  for (signal in c(tools::SIGTERM, tools::SIGKILL)) {
    first <- start_child({
      cl <- makeRustCluster(2, linger = 60)
      say("workers", paste(clusterPids(cl), collapse = " "))
      say("agents", paste(agentPids(cl), collapse = " "))
      say("id", clusterId(cl))
    }, env = record_env)
    expect_child_ends_well(first)
    pids <- lingering_pids(first)
    id <- child_said(first, "id")
    expect_alive(pids)
    tools::pskill(child_pids(first, "agents"), signal)
    expect_gone(pids)
    expect_true(wait_until(function() !length(socket_directories(id)), 5))
    expect_error(reattachCluster(id), class = "rustcluster_no_cluster")
    expect_identical(nrow(listClusters()), 0L)
  }
})

test_that("tasks that had begun are ended, and the next head waits for them", {
  file <- tempfile()
  first <- start_child({
    cl <- makeRustCluster(2, linger = 60)
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    say("id", clusterId(cl))
    code <- function(file) {
      cat("begun\n", file = file, append = TRUE)
      Sys.sleep(2)
      cat("ended\n", file = file, append = TRUE)
      assign("left", 5, envir = globalenv())
    }
    for (i in 1:4) clusterSubmit(cl[1], code(file))
    while (!file.exists(file)) Sys.sleep(0.02)
    tools::pskill(Sys.getpid(), tools::SIGKILL)
  }, env = record_env, values = list(file = file))
  child_wait_end(first)
  lingering_pids(first)
  cl <- reattachCluster(child_said(first, "id"))
  expect_identical(clusterPids(cl), child_pids(first, "workers"))
  expect_identical(clusterCall(cl, function() exists("left", globalenv())), list(TRUE, FALSE))
  # The calls that had not begun were dropped.
  expect_identical(readLines(file), c("begun", "ended"))
  parallel::stopCluster(cl)
  expect_gone(child_pids(first, "workers"))
})

test_that("the results of calls that nobody waited for are kept", {
  first <- start_child({
    cl <- makeRustCluster(5, linger = 60, setup_log_limit = 2^20)
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    say("id", clusterId(cl))
    calls <- list(
      clusterSubmit(cl, { Sys.sleep(1.5); seq_len(1e6) + 0 }),
      clusterSubmit(cl, { Sys.sleep(0.9); "short" }),
      clusterSubmit(cl, { Sys.sleep(1.2); stop("failed there") }),
      clusterSubmit(cl, { Sys.sleep(6); "late" }),
      clusterLapplyAsync(cl, 7, function(i) { Sys.sleep(0.6); i })
    )
    while (!all(vapply(calls, function(call) call$status(), "") == "running")) Sys.sleep(0.02)
    tools::pskill(Sys.getpid(), tools::SIGKILL)
  }, env = record_env)
  child_wait_end(first)
  lingering_pids(first)
  directory <- socket_directories(child_said(first, "id"))
  # The large result is beyond the limit of the memory.
  expect_true(wait_until(function() any(startsWith(list.files(directory), "answer-")), 20))
  cl <- reattachCluster(child_said(first, "id"))
  kept <- keptResults(cl)
  expect_length(kept, 4L)
  expect_identical(kept[[1L]][c("label", "value")], list(label = "element 1", value = list(list(value = 7))))
  kept <- kept[-1L]
  expect_identical(kept[[1L]]$value, "short")
  expect_match(kept[[1L]]$label, "Sys.sleep(0.9)", fixed = TRUE)
  expect_identical(conditionMessage(kept[[2L]]$error), "failed there")
  expect_identical(kept[[3L]]$value, seq_len(1e6) + 0)
  expect_s3_class(kept[[3L]]$ended, "POSIXct")
  # A later call gets what ends later, and each result once.
  expect_identical(suppressWarnings(clusterCall(cl, function() 1)), rep(list(1), 5))
  late <- keptResults(cl)
  expect_identical(lapply(late, `[[`, "value"), list("late"))
  expect_identical(keptResults(cl), list())
  expect_identical(list.files(directory), "socket")
  # Calls of this session are as always.
  expect_identical(clusterSubmit(cl, 1 + 1)$value(), 2)
  parallel::stopCluster(cl)
  expect_gone(child_pids(first, "workers"))
  expect_error(keptResults(cl), class = "rustcluster_stopped")
})

test_that("killCluster() ends a cluster that waits", {
  first <- start_child({
    cl <- makeRustCluster(2, linger = 60)
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    say("id", clusterId(cl))
  }, env = record_env)
  expect_child_ends_well(first)
  pids <- lingering_pids(first)
  killCluster(child_said(first, "id"))
  expect_gone(pids)
  expect_identical(nrow(listClusters()), 0L)
  expect_error(killCluster("0123456789abcdef"), class = "rustcluster_no_cluster")
  expect_error(killCluster(3), class = "rustcluster_bad_argument")
})

test_that("a saved cluster reattaches at its first use", {
  workspace <- tempfile(fileext = ".RData")
  first <- start_child({
    cl <- makeRustCluster(2, linger = 60)
    half <- cl[2]
    clusterExport(cl, "half", envir = list2env(list(half = 3)))
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    call <- clusterSubmit(cl, {
      Sys.sleep(1)
      7
    })
    calls <- clusterLapplyAsync(cl, 1:4, function(i) Sys.sleep(i))
    while (call$status() != "running") Sys.sleep(0.01)
    save(cl, half, call, calls, file = workspace)
  }, env = record_env, values = list(workspace = workspace))
  expect_child_ends_well(first)
  lingering_pids(first)
  restored <- new.env()
  load(workspace, restored)
  expect_output(print(restored$cl), "waits for its session")
  # Nobody answers calls of the session that has ended.
  expect_identical(restored$call$status(), "failed")
  expect_error(restored$calls$value(), "keptResults()", fixed = TRUE, class = "rustcluster_restored")
  expect_message(got <- clusterCall(restored$half, function() half), class = "rustcluster_reattached")
  expect_identical(got, list(3))
  expect_error(restored$call$value(), class = "rustcluster_restored")
  expect_output(print(restored$call), "^<call [{].*: failed>")
  expect_false(restored$call$cancel())
  expect_identical(clusterPids(restored$cl), child_pids(first, "workers"))
  expect_identical(parallel::parSapply(restored$cl, 1:4, sqrt), sqrt(1:4))
  # The call may not have ended yet.
  expect_true(wait_until(function() list(7) %in% lapply(keptResults(restored$cl), `[[`, "value"), 10))
  parallel::stopCluster(restored$cl)
  expect_gone(child_pids(first, "workers"))
  # The same workspace, later.
  again <- new.env()
  load(workspace, again)
  expect_error(clusterCall(again$cl, Sys.getpid), class = "rustcluster_restored")
})

test_that("the functions of parallel reattach a saved cluster, too, and stopCluster() stops it", {
  workspace <- tempfile(fileext = ".RData")
  for (use in list(
    function(cl) parallel::clusterApply(cl, 1:2, identity), function(cl) parallel::stopCluster(cl)
  )) {
    first <- start_child({
      cl <- makeRustCluster(2, linger = 60)
      say("workers", paste(clusterPids(cl), collapse = " "))
      say("agents", paste(agentPids(cl), collapse = " "))
      save(cl, file = workspace)
    }, env = record_env, values = list(workspace = workspace))
    expect_child_ends_well(first)
    lingering_pids(first)
    load(workspace)
    expect_message(use(cl), class = "rustcluster_reattached")
    parallel::stopCluster(cl)
    expect_gone(lingering_pids(first))
  }
})

test_that("a cluster over ssh lingers when its session or its ssh is killed", {
  skip_without_sshd()
  ssh <- local_sshd()
  for (kill_ssh in if (long_tests()) c(FALSE, TRUE) else TRUE) {
    first <- start_child({
      cl <- makeRustCluster(c("127.0.0.2" = 2, "127.0.0.3" = 1), rshcmd = rshcmd, rlibs = .libPaths(), linger = 60)
      clusterSetRNGStream(cl, 7)
      clusterExport(cl, "rshcmd")
      say("workers", paste(clusterPids(cl), collapse = " "))
      say("agents", paste(agentPids(cl), collapse = " "))
      say("id", clusterId(cl))
      say("draws", paste(unlist(clusterCall(cl, rnorm, 1)), collapse = " "))
      say("ready")
      Sys.sleep(100)
    }, env = record_env, values = list(rshcmd = ssh$rshcmd))
    child_wait_for(first, "ready")
    pids <- lingering_pids(first)
    clients <- descendants(first$pid)
    clients <- clients[basename(vapply(clients, function(p) strsplit(process_command(p), " ")[[1L]][[1L]], "")) == "ssh"]
    expect_length(clients, 2L)
    note_pids(clients)
    if (kill_ssh) for (p in clients) tools::pskill(p, tools::SIGKILL)
    child_signal(first, tools::SIGKILL)
    child_wait_end(first)
    # The connections end, although the agents go on.
    expect_gone(clients)
    expect_alive(pids)
    cl <- reattachCluster(child_said(first, "id"))
    expect_identical(clusterPids(cl), child_pids(first, "workers"))
    expect_identical(vapply(unclass(cl), `[[`, "", "host"), c("127.0.0.2", "127.0.0.2", "127.0.0.3"))
    expect_identical(unlist(parallel::clusterCall(cl, stats::rnorm, 1)), psock_draws(3, 7, 2)[[2L]])
    expect_identical(clusterCall(cl, function() rshcmd)[[3L]], ssh$rshcmd)
    big <- clusterCall(cl[3], function() rep(1.5, 3e6))[[1L]]
    expect_identical(sum(big), 4.5e6)
    parallel::stopCluster(cl)
    expect_gone(pids)
  }
})

test_that("a host that is gone is a lost host of the reattached cluster", {
  skip_without_sshd()
  ssh <- local_sshd()
  first <- start_child({
    cl <- makeRustCluster(c("127.0.0.2" = 1, "127.0.0.3" = 1), rshcmd = rshcmd, rlibs = .libPaths(), linger = 60)
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    say("id", clusterId(cl))
  }, env = record_env, values = list(rshcmd = ssh$rshcmd))
  expect_child_ends_well(first)
  pids <- lingering_pids(first)
  tools::pskill(child_pids(first, "agents")[[1L]], tools::SIGKILL)
  expect_gone(child_pids(first, "workers")[[1L]])
  expect_warning(cl <- reattachCluster(child_said(first, "id")), class = "rustcluster_host_failed")
  expect_length(cl, 2L)
  expect_identical(is.na(clusterPids(cl)), c(TRUE, FALSE))
  expect_identical(parallel::parSapply(clusterAlive(cl), 1:3, sqrt), sqrt(1:3))
  suppressWarnings(parallel::stopCluster(cl))
  expect_gone(pids)
})

test_that("a reattached cluster can grow and get lost hosts back, with the set-up calls of the session before", {
  skip_without_sshd()
  ssh <- local_sshd()
  first <- start_child({
    cl <- makeRustCluster(
      c("127.0.0.2" = 2, "127.0.0.3" = 1), rshcmd = rshcmd, rlibs = .libPaths(), linger = 60, reconnect = TRUE
    )
    clusterSetRNGStream(cl, 11)
    small <- 3
    large <- as.numeric(seq_len(3e5))
    clusterExport(cl, c("small", "large"))
    invisible(clusterEvalQ(cl, small <- small + 1))
    invisible(clusterEvalQ(cl[1], only <- "first"))
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    say("id", clusterId(cl))
  }, env = record_env, values = list(rshcmd = ssh$rshcmd))
  expect_child_ends_well(first)
  pids <- lingering_pids(first)
  cl <- reattachCluster(child_said(first, "id"))
  grown <- addWorkers(cl, list(host = "127.0.0.4", ncore = 1))
  note_processes(grown)
  seen <- function() c(small, sum(large), length(large))
  expect_identical(clusterCall(grown, seen), rep(list(c(4, sum(as.numeric(1:3e5)), 3e5)), 4))
  expect_identical(unlist(clusterCall(grown, function() exists("only"))), c(TRUE, FALSE, FALSE, FALSE))
  # The fourth stream, and the states of the others.
  oracle <- psock_draws(4, 11, 1)[[1L]]
  expect_identical(unlist(clusterCall(grown, function() stats::rnorm(1))), oracle)
  # A host that is lost comes back with its state.
  tools::pskill(child_pids(first, "agents")[[1L]], tools::SIGKILL)
  expect_true(wait_until(function() {
    suppressMessages(suppressWarnings(tryCatch(clusterCall(grown[1:2], seen), error = function(e) NULL)))
    pids <- clusterPids(grown)[1:2]
    !anyNA(pids) && !any(pids %in% child_pids(first, "workers"))
  }, 30))
  note_processes(grown)
  expect_identical(clusterCall(grown, seen), rep(list(c(4, sum(as.numeric(1:3e5)), 3e5)), 4))
  expect_identical(unlist(clusterCall(grown, function() exists("only"))), c(TRUE, FALSE, FALSE, FALSE))
  parallel::stopCluster(grown)
  expect_gone(c(pids, leftovers$pids))
})

test_that("a host that is gone when the cluster is reattached is reconnected with the state of the others", {
  skip_without_sshd()
  ssh <- local_sshd()
  first <- start_child({
    cl <- makeRustCluster(
      c("127.0.0.2" = 1, "127.0.0.3" = 1), rshcmd = rshcmd, rlibs = .libPaths(), linger = 60, reconnect = TRUE
    )
    value <- 5
    clusterExport(cl, "value")
    clusterSetRNGStream(cl, 3)
    clusterCall(cl[2], rnorm, 1)
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    say("id", clusterId(cl))
  }, env = record_env, values = list(rshcmd = ssh$rshcmd))
  expect_child_ends_well(first)
  pids <- lingering_pids(first)
  tools::pskill(child_pids(first, "agents")[[2L]], tools::SIGKILL)
  expect_gone(child_pids(first, "workers")[[2L]])
  expect_warning(cl <- reattachCluster(child_said(first, "id")), class = "rustcluster_host_failed")
  expect_true(wait_until(function() !anyNA(clusterPids(cl)), 30))
  note_processes(cl)
  got <- suppressMessages(suppressWarnings(clusterCall(cl, function() value)))
  expect_identical(got, list(5, 5))
  # Each worker goes on with its own stream.
  streams <- psock_draws(2, 3, 2)
  expect_identical(unlist(clusterCall(cl, stats::rnorm, 1)), c(streams[[1L]][[1L]], streams[[2L]][[2L]]))
  parallel::stopCluster(cl)
  expect_gone(c(pids, leftovers$pids))
})

test_that("a host that was lost and has missed exports is not used with its old variables", {
  skip_without_sshd()
  ssh <- local_sshd()
  dir <- tempfile("ssh-")
  dir.create(dir)
  on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
  # While the file is there, no connection can be made.
  blocked <- file.path(dir, "blocked")
  script <- file.path(dir, "ssh")
  command <- paste(shQuote(ssh$rshcmd), collapse = " ")
  writeLines(c("#!/bin/sh", paste("test -e", shQuote(blocked), "&& exit 255"), paste("exec", command, "\"$@\"")), script)
  Sys.chmod(script, "0755")
  for (case in c("nothing missed", if (long_tests()) "left out", "reconnected")) {
    first <- start_child({
      cl <- makeRustCluster(
        c("127.0.0.2" = 1, "127.0.0.3" = 1), rshcmd = rshcmd, rlibs = .libPaths(), linger = 60,
        reconnect = case == "reconnected"
      )
      value <- 1
      clusterExport(cl, "value")
      say("workers", paste(clusterPids(cl), collapse = " "))
      say("agents", paste(agentPids(cl), collapse = " "))
      say("id", clusterId(cl))
      while (length(suppressWarnings(clusterAlive(cl))) > 1L) Sys.sleep(0.05)
      value <- 2
      if (case != "nothing missed") clusterExport(cl[1], "value")
      say("ready")
      Sys.sleep(100)
    }, env = record_env, values = list(rshcmd = script, case = case))
    child_wait_for(first, "id")
    file.create(blocked)
    clients <- descendants(first$pid)
    of_host <- grepl("/?ssh .*127[.]0[.]0[.]3", vapply(clients, process_command, ""))
    expect_true(any(of_host))
    for (p in clients[of_host]) tools::pskill(p, tools::SIGKILL)
    child_wait_for(first, "ready")
    pids <- lingering_pids(first)
    expect_alive(pids)
    child_signal(first, tools::SIGKILL)
    child_wait_end(first)
    file.remove(blocked)
    before <- child_pids(first, "workers")
    if (case == "nothing missed") {
      cl <- reattachCluster(child_said(first, "id"))
      expect_identical(clusterPids(cl), before)
      expect_identical(clusterCall(cl, function() value), list(1, 1))
    } else {
      expect_warning(cl <- reattachCluster(child_said(first, "id")), "missed", class = "rustcluster_host_failed")
      # Its agent was ended.
      expect_gone(before[[2L]])
      if (case == "reconnected") {
        expect_true(wait_until(function() !anyNA(clusterPids(cl)), 30))
        note_processes(cl)
        got <- suppressMessages(suppressWarnings(clusterCall(cl, function() value)))
        expect_identical(got, list(2, 2))
      } else {
        expect_identical(clusterPids(cl), c(before[[1L]], NA))
        expect_identical(clusterCall(cl[1], function() value), list(2))
      }
    }
    suppressWarnings(parallel::stopCluster(cl))
    expect_gone(c(pids, leftovers$pids))
  }
})

test_that("a session that has lost all hosts during a call leaves all to the next one", {
  skip_without_sshd()
  ssh <- local_sshd()
  first <- start_child({
    cl <- makeRustCluster(c("127.0.0.2" = 1, "127.0.0.3" = 1), rshcmd = rshcmd, rlibs = .libPaths(), linger = 60)
    say("workers", paste(clusterPids(cl), collapse = " "))
    say("agents", paste(agentPids(cl), collapse = " "))
    say("id", clusterId(cl))
    call <- tryCatch(clusterCall(cl, function(dir) {
      file.create(file.path(dir, Sys.getpid()))
      Sys.sleep(2)
      value <<- 3
    }, dir), error = function(e) NULL)
    try(clusterExport(cl, "call"), silent = TRUE)
    # The call ends with the first host that is lost.
    while (length(suppressWarnings(clusterAlive(cl)))) Sys.sleep(0.05)
    say("lost")
    Sys.sleep(100)
  }, env = record_env, values = list(rshcmd = ssh$rshcmd))
  child_wait_for(first, "id")
  pids <- lingering_pids(first)
  begun <- file.path(first$dir, child_pids(first, "workers"))
  expect_true(wait_until(function() all(file.exists(begun)), 10))
  clients <- descendants(first$pid)
  clients <- clients[startsWith(vapply(clients, process_command, ""), "ssh ")]
  for (p in clients) tools::pskill(p, tools::SIGKILL)
  child_wait_for(first, "lost")
  child_signal(first, tools::SIGKILL)
  child_wait_end(first)
  expect_silent(cl <- reattachCluster(child_said(first, "id")))
  # The call has ended.
  expect_identical(clusterCall(cl, function() value), list(3, 3))
  expect_identical(clusterPids(cl), child_pids(first, "workers"))
  parallel::stopCluster(cl)
  expect_gone(pids)
})

test_that("a session whose link was frozen finds out that it has lost its cluster", {
  skip_without_sshd()
  ssh <- local_sshd()
  for (reconnect in if (long_tests()) c(FALSE, TRUE) else TRUE) {
    first <- start_child({
      cl <- makeRustCluster(
        c("127.0.0.2" = 1), rshcmd = rshcmd, rlibs = .libPaths(), linger = 60, heartbeat_timeout = 2,
        reconnect = reconnect
      )
      say("workers", paste(clusterPids(cl), collapse = " "))
      say("agents", paste(agentPids(cl), collapse = " "))
      say("id", clusterId(cl))
      while (!file.exists(file.path(dir, "go"))) Sys.sleep(0.05)
      error <- tryCatch({
        clusterCall(cl, Sys.getpid)
        "none"
      }, error = function(e) class(e)[[1L]])
      say("error", error)
      # It does not come back.
      say("alive", length(suppressWarnings(clusterAlive(cl))))
      stopCluster(cl)
      say("stopped")
    }, env = record_env, values = list(rshcmd = ssh$rshcmd, reconnect = reconnect))
    id <- child_wait_for(first, "id")
    pids <- lingering_pids(first)
    child_signal(first, tools::SIGSTOP)
    cl <- NULL
    # Until the agent has missed the heartbeats, it belongs to the first session.
    expect_true(wait_until(function() {
      cl <<- tryCatch(reattachCluster(id), rustcluster_in_use = function(e) NULL)
      !is.null(cl)
    }, 30))
    child_signal(first, tools::SIGCONT)
    file.create(file.path(first$dir, "go"))
    child_wait_for(first, "stopped")
    expect_identical(child_said(first, "error"), "rustcluster_host_failed")
    expect_identical(child_said(first, "alive"), "0")
    expect_child_ends_well(first)
    # The first session has not ended the cluster, and has left its record alone.
    expect_identical(clusterCall(cl, Sys.getpid), as.list(child_pids(first, "workers")))
    expect_identical(listClusters()$state, "in use")
    parallel::stopCluster(cl)
    expect_gone(pids)
  }
})

test_that("files that are no records of clusters are left out", {
  cl <- note_processes(makeRustCluster(1, linger = 60))
  path <- list.files(records$dir, "[.]rds$", recursive = TRUE, full.names = TRUE)
  foreign <- file.path(dirname(path), paste0(c("0123456789abcdef", "0123456789abcde0"), ".rds"))
  saveRDS(list(format = 1L), foreign[[1L]])
  writeBin(as.raw(1:9), foreign[[2L]])
  expect_identical(listClusters()$id, clusterId(cl))
  expect_error(reattachCluster("0123456789abcdef"), class = "rustcluster_no_cluster")
  expect_true(all(file.exists(foreign)))
  unlink(foreign)
  parallel::stopCluster(cl)
})

test_that("the record of a cluster of another machine is left alone", {
  cl <- note_processes(makeRustCluster(1, linger = 1))
  path <- list.files(records$dir, "[.]rds$", recursive = TRUE, full.names = TRUE)
  record <- readRDS(path)
  change <- function(...) saveRDS(utils::modifyList(record, list(head = list(...))), path)
  # Only the name of this machine has changed.
  change(machine = "other")
  expect_identical(listClusters()$state, "in use")
  change(machine = "other", boot = "other")
  expect_identical(listClusters()$state, "elsewhere")
  expect_identical(listClusters()$left, NA_real_)
  # Another container.
  change(pids = "pid:[1]")
  expect_identical(listClusters()$state, "elsewhere")
  saveRDS(record, path)
  # Once its time is over beyond doubt, it is removed.
  change(machine = "other", boot = "other")
  Sys.setFileTime(path, Sys.time() - 400 * 86400)
  expect_identical(nrow(listClusters()), 0L)
  expect_false(file.exists(path))
  # After a restart of this machine, its clusters are over.
  change(boot = "other")
  expect_identical(nrow(listClusters()), 0L)
  expect_false(file.exists(path))
  parallel::stopCluster(cl)
})

test_that("a session that is a zombie does not use its cluster, and a slow agent is waited for", {
  script <- tempfile(fileext = ".R")
  said <- tempfile()
  writeLines(c(
    "library(rustcluster)", "cl <- makeRustCluster(1, linger = 8)",
    sprintf("writeLines(paste(c(clusterId(cl), agentPids(cl), clusterPids(cl), Sys.getpid())), %s)", deparse(said))
  ), script)
  # exec makes a process of the shell that does not wait for its child.
  rscript <- file.path(R.home("bin"), "Rscript")
  env <- paste0("R_LIBS=", shQuote(paste(.libPaths(), collapse = ":")), " R_TESTS= ", record_env)
  line <- sprintf("%s %s %s >/dev/null 2>&1 & exec sleep 60", env, rscript, script)
  start <- sprintf("sh -c %s >/dev/null 2>&1 & echo $!", shQuote(line))
  parent <- as.integer(system(start, intern = TRUE))
  note_pids(parent)
  expect_true(wait_until(function() file.exists(said) && length(readLines(said)) == 4L, 60))
  said <- readLines(said)
  pids <- as.integer(said[2:3])
  note_pids(pids)
  is_zombie <- function() grepl(") Z ", readLines(file.path("/proc", said[[4L]], "stat")), fixed = TRUE)
  expect_true(wait_until(is_zombie, 20))
  expect_true(wait_until(function() file.exists(file.path(socket_directories(said[[1L]]), "lost")), 10))
  listed <- listClusters()
  expect_identical(listed$state, "lingering")
  # The time counts from the end of the session.
  Sys.sleep(1)
  left <- listClusters()$left
  expect_true(left <= 7 && left > 0)
  # The agent is slow beyond its time.
  tools::pskill(pids[[1L]], tools::SIGSTOP)
  record <- rustcluster:::theRecordOf(said[[1L]])
  record$handle$settings$setup <- 0.5
  error <- expect_error(rustcluster:::takeUp(record), class = "rustcluster_no_cluster")
  expect_match(conditionMessage(error), "does not answer", fixed = TRUE)
  expect_identical(listClusters()$id, said[[1L]])
  tools::pskill(pids[[1L]], tools::SIGCONT)
  killCluster(said[[1L]])
  expect_gone(pids)
  expect_identical(nrow(listClusters()), 0L)
  tools::pskill(parent, tools::SIGKILL)
})

test_that("a copy of a cluster says who uses the cluster, and that it is over", {
  file <- tempfile()
  cl <- note_processes(makeRustCluster(1, linger = 60))
  saveRDS(cl, file)
  copy <- readRDS(file)
  expect_output(print(copy), "a copy of one that this session uses")
  error <- expect_error(clusterCall(copy, Sys.getpid), class = "rustcluster_in_use")
  expect_match(conditionMessage(error), "this session")
  expect_error(parallel::stopCluster(copy), class = "rustcluster_in_use")
  expect_identical(clusterCall(cl, function() 1), list(1))
  parallel::stopCluster(cl)
  expect_output(print(copy), "has been stopped, or whose `linger` time is over", fixed = TRUE)
  error <- expect_error(clusterCall(copy, Sys.getpid), class = "rustcluster_restored")
  expect_match(conditionMessage(error), "has been stopped, or whose `linger` time is over", fixed = TRUE)
  expect_silent(parallel::stopCluster(copy))
})

test_that("a peer without the key is not heard, and a head that has lost its cluster knows", {
  cl <- makeRustCluster(1, linger = 60)
  note_processes(cl)
  record <- readRDS(list.files(records$dir, "[.]rds$", recursive = TRUE, full.names = TRUE))
  expect_identical(as.integer(file.info(list.files(
    records$dir, "[.]rds$", recursive = TRUE, full.names = TRUE
  ))$mode), strtoi("600", 8L))
  handle <- cl[[1L]]$handle
  expect_false(grepl(record$key, paste(deparse(as.list(handle)), collapse = ""), fixed = TRUE))
  # The key is in no command line.
  expect_false(any(grepl(record$key, vapply(all_pids(), process_command, ""), fixed = TRUE)))
  record$key <- paste(rep("ab", 32L), collapse = "")
  key <- get(record$linger$id, rustcluster:::lingerKeys)
  expect_error(rustcluster:::takeUp(record), class = "rustcluster_no_cluster")
  assign(record$linger$id, key, rustcluster:::lingerKeys)
  expect_identical(clusterCall(cl, function() 1), list(1))
  parallel::stopCluster(cl)
})

test_that("invalid values of `linger` are errors", {
  expect_error(makeRustCluster(1, linger = -1), class = "rustcluster_bad_argument")
  expect_error(makeRustCluster(1, linger = "a"), class = "rustcluster_bad_argument")
  expect_error(makeRustCluster(commandLauncher("sh", hosts = "a"), linger = 1), "linger|hosts")
  cl <- local_cluster(1)
  expect_identical(clusterId(cl), NA_character_)
})

test_that("a run on a cluster that waits computes nothing again", {
  slow <- strip_srcref(function(i, log) {
    Sys.sleep(0.3)
    cat(paste0(i, "\n"), file = log, append = TRUE)
    list(i, letters)
  })
  environment(slow) <- globalenv()
  # Workers that see the directory of the run write there. The others, here by another probe, save on their host.
  for (seen in c(TRUE, FALSE)) {
    base <- tempfile("linger-run-")
    dir.create(base)
    on.exit(unlink(base, recursive = TRUE), add = TRUE, after = FALSE)
    log <- file.path(base, "log")
    run <- file.path(base, "run")
    first <- start_child({
      if (!seen) {
        namespace <- asNamespace("rustcluster")
        trace("beginSaving", where = namespace, exit = quote(store$save$nonce <- "another"), print = FALSE)
      }
      cl <- makeRustCluster(2, linger = 60)
      say("workers", paste(clusterPids(cl), collapse = " "))
      say("agents", paste(agentPids(cl), collapse = " "))
      say("id", clusterId(cl))
      clusterLapply(cl, 1:16, slow, log = log, .store = run)
    }, values = list(seen = seen, log = log, run = run, slow = slow), env = c(
      record_env, paste0("XDG_CACHE_HOME=", shQuote(base))
    ))
    child_wait_for(first, "id")
    pids <- lingering_pids(first)
    expect_true(wait_until(function() file.exists(log) && length(readLines(log)) >= 3L, 30))
    child_signal(first, tools::SIGKILL)
    child_wait_end(first)
    before <- length(readLines(log))
    # Both workers end the tasks that they have begun.
    expect_true(wait_until(function() length(readLines(log)) >= before + 1L, 30))
    cl <- note_processes(reattachCluster(child_said(first, "id")))
    values <- clusterLapply(cl, 1:16, slow, log = log, .store = run)
    expect_identical(values, lapply(1:16, function(i) list(i, letters)))
    expect_identical(sort(as.integer(readLines(log))), 1:16)
    stop_quietly(cl)
    expect_gone(pids)
    expect_length(list.files(file.path(base, "rustcluster", "results"), recursive = TRUE), 0L)
  }
})

test_that("a run goes on with the workers that are left", {
  skip_without_sshd()
  ssh <- local_sshd()
  base <- tempfile("linger-run-", dirname(tempdir()))
  dir.create(base)
  on.exit(unlink(base, recursive = TRUE), add = TRUE, after = FALSE)
  # Each worker leaves the pid of its agent.
  fun <- strip_srcref(function(i, base) {
    stat <- sub("^.*[)] ", "", readLines("/proc/self/stat"))
    file.create(file.path(base, "agents", strsplit(stat, " ")[[1L]][[2L]]))
    if (i > 4) while (!file.exists(file.path(base, "gate"))) Sys.sleep(0.02)
    i + 1
  })
  environment(fun) <- globalenv()
  for (gone in list(2, 1:2)) {
    dir <- tempfile("run-", base)
    unlink(file.path(base, c("gate", "agents")), recursive = TRUE)
    dir.create(file.path(base, "agents"))
    run <- startRun(
      dir, 1:10, fun, base = base, spec = c("127.0.0.2" = 1, "127.0.0.3" = 1), .wait = 40,
      cluster = list(linger = 60, rshcmd = ssh$rshcmd, rlibs = .libPaths())
    )
    agents <- function() as.integer(list.files(file.path(base, "agents")))
    expect_true(wait_until(function() run$status()$done == 4 && length(agents()) == 2L, 30))
    runner <- run$status()$pid
    agents <- agents()
    note_pids(c(agents, unlist(lapply(agents, descendants))))
    tools::pskill(runner, tools::SIGKILL)
    expect_gone(runner)
    # The system releases its lock a moment later.
    expect_true(wait_until(function() run$status()$state == "interrupted", 10))
    for (pid in agents[gone]) tools::pskill(pid, tools::SIGKILL)
    expect_gone(agents[gone])
    file.create(file.path(base, "gate"))
    expect_true(run$resume(.wait = 40))
    expect_identical(run$wait(60), "done")
    expect_identical(unlist(run$results()), 1:10 + 1)
    expect_gone(agents)
  }
  # The record of a cluster whose agents could not be reached is kept until its time is over.
  unlink(list.files(file.path(records$dir, "R"), recursive = TRUE, full.names = TRUE))
})

test_that("no process is left", {
  expect_no_leftovers()
  expect_no_records(records)
})
