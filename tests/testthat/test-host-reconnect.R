# Hosts that are lost and come back (`reconnect = TRUE`): agents of this machine, killed.

watch_processes()

hosts_back <- function(..., .frame = parent.frame()) {
  hosts <- lapply(1:2, function(threads) list(host = "localhost", ncore = 2L, threads = threads))
  local_cluster(hosts, reconnect = TRUE, ..., .frame = .frame)
}

agents_of <- function(cl) {
  vapply(c(1L, 3L), function(rank) proc_parent(clusterPids(cl)[[rank]]), 0L)
}

all_there <- function(cl) function() !anyNA(clusterPids(cl))

# Kills the agents, and waits for them to be back.
lose <- function(cl, agents = agents_of(cl)) {
  tools::pskill(agents, tools::SIGKILL)
  wait_until(function() anyNA(clusterPids(cl)))
  expect_true(wait_until(all_there(cl)))
  note_processes(cl)
}

told <- function(expr) {
  seen <- list()
  value <- withCallingHandlers(expr, warning = function(w) {
    seen <<- c(seen, list(w))
    invokeRestart("muffleWarning")
  }, message = function(m) {
    seen <<- c(seen, list(m))
    invokeRestart("muffleMessage")
  })
  list(value = value, kinds = vapply(seen, function(x) class(x)[[1L]], ""))
}

test_that("set-up calls are repeated as often as they were made when a host is reconnected", {
  cl <- hosts_back()
  clusterEvalQ(cl, count <- 0)
  for (i in 1:3) clusterEvalQ(cl, count <- count + 1)
  lose(cl)
  got <- told(clusterEvalQ(cl, count))
  expect_identical(got$value, list(3, 3, 3, 3))
  expect_identical(
    sort(got$kinds), rep(c("rustcluster_host_back", "rustcluster_host_failed"), each = 2)
  )
})

test_that("random numbers continue after reconnection, also if the host or a worker fails again before a draw", {
  cl <- hosts_back()
  clusterSetRNGStream(cl, 3)
  clusterApply(cl, 1:4, function(i) runif(i))
  want <- clusterEvalQ(cl, .Random.seed)
  for (i in 1:3) {
    lose(cl)
    expect_identical(told(clusterEvalQ(cl, .Random.seed))$value, want)
  }
  before <- clusterPids(cl)
  tools::pskill(before, tools::SIGKILL)
  expect_true(wait_until(function() !any(before %in% clusterPids(cl)) && !anyNA(clusterPids(cl))))
  expect_identical(told(clusterEvalQ(cl, .Random.seed))$value, want)
})

test_that("nodes that were stopped while their host was lost stay stopped after reconnection", {
  cl <- hosts_back()
  pids <- clusterPids(cl)
  tools::pskill(agents_of(cl), tools::SIGKILL)
  expect_true(wait_until(function() all(is.na(clusterPids(cl)))))
  # The first to talk to the cluster says which hosts are lost.
  kinds <- told(stopCluster(cl[2:3]))$kinds
  expect_identical(kinds[kinds != "rustcluster_host_back"], rep("rustcluster_host_failed", 2))
  expect_true(wait_until(function() !anyNA(clusterPids(cl[c(1, 4)]))))
  expect_identical(is.na(clusterPids(cl)), c(FALSE, TRUE, TRUE, FALSE))
  expect_identical(told(clusterCall(cl[c(1, 4)], identity, 5))$value, list(5, 5))
  note_processes(cl)
  expect_rust_error(caught(clusterCall(cl[2], identity, 5)), "stopped")
  # Nor does the end of all others end those that are lost.
  tools::pskill(proc_parent(clusterPids(cl)[[1]]), tools::SIGKILL)
  expect_true(wait_until(function() is.na(clusterPids(cl)[[1]])))
  kinds <- told(stopCluster(cl[4]))$kinds
  expect_identical(kinds[kinds != "rustcluster_host_back"], "rustcluster_host_failed")
  expect_true(wait_until(function() !anyNA(clusterPids(cl[1]))))
  expect_identical(told(clusterCall(cl[1], identity, 5))$value, list(5))
  note_processes(cl)
})

test_that("a host whose nodes were all stopped is not reconnected", {
  cl <- hosts_back()
  pids <- clusterPids(cl)[3:4]
  stopCluster(cl[3:4])
  expect_gone(pids)
  before <- descendants()
  Sys.sleep(3)
  expect_identical(setdiff(descendants(), before), integer())
  expect_identical(clusterCall(cl[1:2], identity, 5), list(5, 5))
})

test_that("repeated exports of a variable take the space of one in the set-up log", {
  cl <- hosts_back(setup_log_limit = 3e6)
  big <- runif(1e5)
  for (i in 1:10) {
    big[[1]] <- i
    clusterExport(cl, "big", environment())
  }
  lose(cl)
  expect_identical(told(clusterEvalQ(cl, big))$value, rep(list(big), 4))
})

test_that("a set-up log beyond its limit is a warning, and hosts are no longer reconnected", {
  cl <- hosts_back(setup_log_limit = 1e5)
  big <- runif(1e5)
  got <- told(clusterExport(cl, "big", environment()))
  expect_identical(got$kinds, rep("rustcluster_state_not_kept", 3))
  agents <- agents_of(cl)
  tools::pskill(agents[[2]], tools::SIGKILL)
  expect_true(wait_until(function() anyNA(clusterPids(cl))))
  Sys.sleep(3)
  expect_identical(is.na(clusterPids(cl)), c(FALSE, FALSE, TRUE, TRUE))
})

test_that("a host that is lost during an export is reconnected with its state", {
  cl <- hosts_back()
  clusterEvalQ(cl, x <- 1)
  big <- runif(5e6)
  for (i in 1:3) {
    agents <- agents_of(cl)
    # So that the export cannot end before.
    tools::pskill(clusterPids(cl)[[4]], tools::SIGSTOP)
    system(sprintf("(sleep %g; kill -KILL %d) &", 0.2 * i, agents[[2]]))
    got <- told(caught(clusterExport(cl, "big", environment())))
    expect_rust_error(got$value, "host_failed")
    expect_true(wait_until(all_there(cl)))
    note_processes(cl)
  }
  got <- told(clusterEvalQ(cl, c(x, exists("big"))))
  expect_identical(got$value[[4]], c(1, 0))
})

test_that("workers that are killed during the restore of their host are restored", {
  cl <- hosts_back()
  clusterEvalQ(cl, x <- 1)
  clusterEvalQ(cl, {
    Sys.sleep(0.5)
    x <- x + 1
  })
  clusterEvalQ(cl, x <- x + 1)
  agents <- agents_of(cl)
  before <- descendants()
  tools::pskill(agents[[2]], tools::SIGKILL)
  fresh <- function() {
    found <- setdiff(descendants(), before)
    # The agent has a guard and two workers.
    Filter(function(pid) identical(proc_group(pid), pid) && proc_parent(pid) != Sys.getpid(), found)
  }
  expect_true(wait_until(function() length(fresh()) >= 2L))
  Sys.sleep(0.3)
  tools::pskill(utils::head(fresh(), 2L), tools::SIGKILL)
  expect_true(wait_until(all_there(cl)))
  note_processes(cl)
  expect_identical(told(clusterEvalQ(cl, x))$value, rep(list(3), 4))
})

test_that("a host that hangs during reconnection is tried again", {
  mark <- tempfile()
  script <- tempfile(fileext = ".sh")
  writeLines(c(
    "#!/bin/sh", sprintf("if [ -e '%s' ]; then rm '%s'; exec sleep 100; fi", mark, mark),
    sprintf("exec '%s' \"$@\"", file.path(R.home("bin"), "Rscript"))
  ), script)
  Sys.chmod(script, "0755")
  cl <- hosts_back(rscript = script, setup_timeout = 4)
  file.create(mark)
  lose(cl, agents_of(cl)[[2]])
  expect_false(file.exists(mark))
  expect_identical(told(clusterCall(cl, identity, 5))$value, rep(list(5), 4))
})

test_that("tasks draw the same random numbers if a host is lost and reconnected during a verb", {
  cl <- hosts_back()
  run <- function(kill = NULL) {
    clusterSetRNGStream(cl, 7)
    if (length(kill)) system(sprintf("(sleep 0.4; kill -KILL %d) &", kill))
    told(clusterApply(cl, 1:80, function(i) {
      Sys.sleep(0.15)
      c(i, runif(1))
    }))$value
  }
  want <- run()
  for (i in 1:2) {
    expect_identical(run(agents_of(cl)[[i]]), want)
    expect_true(wait_until(all_there(cl)))
    note_processes(cl)
  }
})

test_that("no process is left", {
  expect_no_leftovers()
})
