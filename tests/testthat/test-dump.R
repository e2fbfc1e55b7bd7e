# clusterDump(): what it says, that it always answers, and what it may not hold.

skip_on_cran()
watch_processes()

one <- function(cl, ...) clusterDump(cl, ...)$clusters[[1L]]

test_that("a dump of an idle cluster has all parts, is printed and saved", {
  cl <- local_cluster(3)
  dump <- clusterDump(cl)
  expect_s3_class(dump, "rustcluster_dump", exact = TRUE)
  expect_identical(dump$versions[["R"]], as.character(getRversion()))
  parts <- dump$clusters[[1L]]
  expect_named(parts, c("cluster", "hosts", "workers", "agents", "agent_workers", "events"))
  expect_identical(parts$hosts$answered, TRUE)
  expect_identical(parts$hosts$connection, "connected")
  expect_identical(parts$workers$rank, 1:3)
  expect_identical(parts$workers$state, rep("idle", 3))
  expect_identical(parts$agent_workers$state, rep("idle", 3))
  expect_identical(parts$workers$pid, as.integer(clusterPids(cl)))
  expect_identical(parts$agent_workers$pid, parts$workers$pid)
  expect_identical(parts$agents$workers, 3L)
  expect_identical(parts$cluster$retries, 2)
  file <- tempfile()
  saveRDS(dump, file)
  expect_identical(readRDS(file), dump)
  printed <- capture.output(expect_invisible(print(dump)))
  expect_match(printed, "worker 3: ", all = FALSE, fixed = TRUE)
  expect_match(capture.output(print(dump, n = 1)), "and 2 others", all = FALSE, fixed = TRUE)
  expect_error(print(dump, n = "a"), class = "rustcluster_bad_argument")
  expect_error(clusterDump(cl, -1), class = "rustcluster_bad_argument")
  expect_error(clusterDump(1), class = "rustcluster_bad_argument")
})

test_that("head and agent say who has which task, in the middle of a call", {
  cl <- local_cluster(2)
  call <- clusterSubmit(cl[2], Sys.sleep(60))
  wait_until(function() identical(one(cl)$agent_workers$state, c("idle", "busy")))
  parts <- one(cl)
  expect_identical(parts$workers$state, c("idle", "busy"))
  expect_identical(parts$workers$job[[2L]], "call")
  expect_identical(parts$workers$task, parts$agent_workers$task)
  expect_true(parts$agent_workers$message_complete[[2L]])
  call$cancel()
  dumps <- list()
  clusterLapply(cl, 1:4, function(i) i, .onResult = function(...) dumps <<- c(dumps, list(one(cl))))
  expect_length(dumps, 4L)
  for (dump in dumps) expect_true(dump$hosts$answered)
})

test_that("failures are among the events, and nothing that tasks hold or print is in it", {
  cl <- local_cluster(2, outfile = "")
  Sys.setenv(RUSTCLUSTER_TEST_SECRET = "marzipan")
  on.exit(Sys.unsetenv("RUSTCLUSTER_TEST_SECRET"), add = TRUE, after = FALSE)
  secret <- "marzipan"
  clusterExport(cl, "secret", environment())
  suppressWarnings(try(capture.output(clusterApply(cl, 1:2, function(i) {
    message("marzipan")
    if (i == 1) tools::pskill(Sys.getpid(), 9)
    stop("marzipan")
  })), silent = TRUE))
  dump <- clusterDump(cl)
  events <- dump$clusters[[1L]]$events
  expect_true(all(c("task lost", "worker lost", "worker replaced") %in% events$what))
  expect_identical(unique(events$host), "localhost")
  expect_match(events$why[events$what == "worker lost"], "was killed by signal 9")
  expect_identical(dump$clusters[[1L]]$agent_workers$setup_calls, c(1L, 1L))
  expect_false(any(grepl("marzipan", c(capture.output(print(dump)), capture.output(str(unclass(dump)))))))
  expect_false(grepl("marzipan", rawToChar(serialize(dump, NULL, ascii = TRUE)), fixed = TRUE))
})

test_that("what an agent says of many workers comes in several messages", {
  cl <- local_cluster(20)
  parts <- one(cl)
  expect_identical(parts$hosts$answered, TRUE)
  expect_identical(parts$agent_workers$rank, 1:20)
  expect_identical(parts$agent_workers$pid, as.integer(clusterPids(cl)))
})

test_that("an agent that does not answer costs the time that is given, and no more", {
  cl <- local_cluster(1)
  agent <- one(cl)$hosts$agent_pid
  tools::pskill(agent, tools::SIGSTOP)
  took <- system.time(parts <- one(cl, timeout = 0.5))[["elapsed"]]
  tools::pskill(agent, tools::SIGCONT)
  expect_identical(parts$hosts$answered, FALSE)
  expect_identical(nrow(parts$agents), 0L)
  expect_identical(parts$workers$state, "idle")
  expect_gte(took, 0.5)
  expect_lt(took, 0.5 + slack())
  # Late answers are those to an old question.
  expect_identical(one(cl)$hosts$answered, TRUE)
})

test_that("lost hosts and stopped clusters are told as such", {
  cl <- local_cluster(c("localhost", "localhost"))
  tools::pskill(one(cl)$hosts$agent_pid, 9)
  try(suppressWarnings(clusterApply(cl, 1:2, identity)), silent = TRUE)
  parts <- one(cl)
  expect_identical(parts$hosts$connection, "ended")
  expect_identical(parts$hosts$answered, FALSE)
  expect_match(parts$hosts$failure, "signal 9")
  expect_identical(parts$workers$state, c("terminated", "terminated"))
  other <- local_cluster(1)
  stopCluster(other)
  parts <- one(other)
  expect_true(parts$cluster$stopped)
  expect_identical(parts$workers$state, "terminated")
  expect_match(capture.output(print(clusterDump(other))), "stopped=TRUE", all = FALSE)
  saved <- unserialize(serialize(other, NULL))
  expect_error(clusterDump(saved), class = "rustcluster_restored")
})

test_that("a dump of a part of a cluster has the workers of this part only", {
  cl <- local_cluster(3)
  parts <- one(cl[3:2])
  expect_identical(parts$workers$rank, 2:3)
  expect_identical(parts$agent_workers$rank, 2:3)
  expect_identical(parts$agent_workers$pid, as.integer(clusterPids(cl[2:3])))
  expect_identical(parts$agents$workers, 3L)
  printed <- capture.output(print(clusterDump(cl[3])))
  expect_identical(grep("worker [12]: ", printed), integer())
  stopCluster(cl)
  expect_identical(one(cl[2])$workers$rank, 2L)
})

test_that("joined clusters are dumped one after the other", {
  cl <- c(local_cluster(1), local_cluster(2))
  dump <- clusterDump(cl)
  expect_identical(lapply(dump$clusters, function(parts) parts$workers$rank), list(1L, 1:2))
})
