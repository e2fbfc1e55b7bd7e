# Agents that dial back, as those of batch engines do.

test_that("a cluster of agents that dial back gives the values of lapply() and leaves nothing", {
  skip_on_cran()
  head <- dial_head(hosts = 2L)
  agents <- list(dial_agent(head), dial_agent(head))
  cl <- dial_cluster(head)
  stopped <- FALSE
  on.exit(if (!stopped) stopCluster(cl), add = TRUE, after = FALSE)
  expect_length(cl, 4L)
  expect_identical(parLapply(cl, 1:100, function(i) i^2), lapply(1:100, function(i) i^2))
  # Several messages of the connection, and more than its buffers hold.
  value <- clusterEvalQ(cl[1], seq_len(5e6) + 0)[[1L]]
  expect_identical(value, seq_len(5e6) + 0)
  expect_true(all(unlist(clusterEvalQ(cl, !nzchar(Sys.getenv("RUSTCLUSTER_DIAL"))))))
  facts <- rustcluster:::checked(rustcluster:::hub_hosts(head$handle$pointer))
  expect_identical(facts$node, rep(Sys.info()[["nodename"]], 2L))
  expect_identical(facts$peer, rep("127.0.0.1", 2L))
  pids <- clusterPids(cl)
  relays <- unlist(lapply(agents, dial_relays))
  expect_length(relays, 2L)
  stopCluster(cl)
  stopped <- TRUE
  for (agent in agents) expect_identical(dial_ended(agent)$status, 0L)
  expect_true(wait_until(function() !any(alive(c(pids, relays))), timeout = 20))
})

test_that("packages with state of their own restart an agent over the same connection", {
  skip_on_cran()
  skip_if_not_installed("RcppParallel")
  head <- dial_head()
  agent <- dial_agent(head)
  cl <- dial_cluster(head, packages = "RcppParallel")
  on.exit(stopCluster(cl), add = TRUE, after = FALSE)
  expect_identical(unlist(clusterApply(cl, 1:4, function(i) -i)), -(1:4))
})

test_that("an agent that is not needed ends with status 0 and says why", {
  skip_on_cran()
  head <- dial_head()
  dial_agent(head)
  cl <- dial_cluster(head)
  on.exit(stopCluster(cl), add = TRUE, after = FALSE)
  end <- dial_ended(dial_agent(head))
  expect_identical(end$status, 0L)
  expect_match(end$log, "no free slot")
})

test_that("an agent without a connection says what was tried, and the remedy", {
  skip_on_cran()
  skip_unless_long()
  head <- dial_head()
  on.exit(rustcluster:::abandon(head$handle), add = TRUE, after = FALSE)
  agents <- list(dial_agent(head, port = 1L), dial_agent(head, key = strrep("ab", 32)))
  ends <- lapply(agents, dial_ended, timeout = 120)
  for (end in ends) {
    expect_identical(end$status, 1L)
    expect_match(end$log, "`address =`.*`port =`.*`login =`")
  }
  expect_match(ends[[1L]]$log, "127.0.0.1 port 1 .*refused")
  expect_match(ends[[2L]]$log, "another key")
})

test_that("a file that others may read is refused", {
  skip_on_cran()
  head <- dial_head()
  on.exit(rustcluster:::abandon(head$handle), add = TRUE, after = FALSE)
  end <- dial_ended(dial_agent(head, mode = "0644"))
  expect_identical(end$status, 1L)
  expect_match(end$log, "mode 644")
})

test_that("the death of an agent or of its relay is noticed and leaves nothing", {
  skip_on_cran()
  for (victim in c("agent", "relay")) {
    head <- dial_head(hosts = 2L)
    agents <- list(dial_agent(head), dial_agent(head))
    cl <- dial_cluster(head)
    pids <- clusterPids(cl)
    relays <- lapply(agents, dial_relays)
    agent <- as.integer(readLines(agents[[1L]]$pid))
    tools::pskill(if (victim == "agent") agent else relays[[1L]], tools::SIGKILL)
    dial_ended(agents[[1L]])
    lost <- wait_until(function() sum(alive(pids)) == 2L, timeout = 20)
    expect_true(lost, label = victim)
    expect_true(wait_until(function() !alive(relays[[1L]]), timeout = 20), label = victim)
    left <- which(alive(pids))
    # One says that the host is lost, and another one that no agent takes its place.
    warnings <- character()
    values <- withCallingHandlers(clusterApply(cl[left], 1:2, function(i) -i), rustcluster_host_failed = function(w) {
      warnings <<- c(warnings, conditionMessage(w))
      invokeRestart("muffleWarning")
    })
    expect_identical(unlist(values), c(-1L, -2L))
    expect_match(warnings[[1L]], "is lost")
    expect_false(any(grepl("could not join", warnings)))
    expect_match(warnings, "connection (was closed|ended without notice)")
    suppressWarnings(stopCluster(cl))
    expect_true(wait_until(function() !any(alive(c(pids, unlist(relays)))), timeout = 20), label = victim)
  }
})

test_that("nothing is left of a cluster whose head is killed", {
  skip_on_cran()
  dir <- tempfile("head-")
  dir.create(dir)
  path <- function(name) file.path(dir, name)
  writeLines(c(
    "library(parallel); library(rustcluster)",
    sprintf("source(%s)", deparse(normalizePath("helper-dial-back.R"))),
    "head <- dial_head()",
    "agent <- dial_agent(head)",
    "cl <- dial_cluster(head)",
    sprintf("saveRDS(list(head = Sys.getpid(), agent = agent, pids = clusterPids(cl)), %s)", deparse(path("part"))),
    sprintf("file.rename(%s, %s)", deparse(path("part")), deparse(path("facts"))),
    "invisible(clusterCall(cl, Sys.sleep, 1000))"
  ), path("head.R"))
  system2(file.path(R.home("bin"), "Rscript"), path("head.R"), wait = FALSE, stdout = FALSE, stderr = path("log"))
  expect_true(wait_until(function() file.exists(path("facts")), timeout = 60))
  facts <- readRDS(path("facts"))
  pids <- c(facts$pids, dial_relays(facts$agent), as.integer(readLines(facts$agent$pid)))
  expect_length(pids, 4L)
  tools::pskill(facts$head, tools::SIGKILL)
  expect_true(wait_until(function() !any(alive(pids)), timeout = 20))
})

test_that("signals that engines send do not end the relay", {
  skip_on_cran()
  head <- dial_head()
  agent <- dial_agent(head)
  cl <- dial_cluster(head)
  on.exit(stopCluster(cl), add = TRUE, after = FALSE)
  for (signal in c(tools::SIGTERM, tools::SIGUSR1, tools::SIGUSR2, tools::SIGINT, tools::SIGHUP)) {
    tools::pskill(dial_relays(agent), signal)
  }
  expect_identical(unlist(clusterApply(cl, 1:4, function(i) -i)), -(1:4))
  expect_length(dial_relays(agent), 1L)
})
