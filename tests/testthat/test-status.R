# clusterStatus(), summary(), clusterTimeline() and its picture: against what is known to have been done.

skip_on_cran()
watch_processes()

columns <- c("host", "rank", "pid", "state", "task", "batch", "done", "seconds", "memory", "rss", "bytes_in",
             "bytes_out", "losses", "error")

# A timeline as a cluster of these hosts would have it.
simulated_timeline <- function(hosts) {
  workers <- data.frame(host = rep(names(hosts), hosts), rank = seq_len(sum(hosts)))
  starts <- seq(0, 9)
  rows <- workers[rep(seq_len(nrow(workers)), each = length(starts)), ]
  rows$start <- starts + rows$rank %% 7 / 10
  rows$end <- rows$start + 0.7
  rows$kind <- rep(c("busy", "busy", "transfer", "busy", "lost"), length.out = nrow(rows))
  rows$busy <- ifelse(rows$kind == "busy", 0.5, 0)
  rows$tasks <- 1
  structure(rows, class = c("rustcluster_timeline", "data.frame"), workers = workers, now = 11)
}

test_that("workers of a new cluster are idle and have memory", {
  cl <- local_cluster(3)
  status <- clusterStatus(cl)
  expect_s3_class(status, c("rustcluster_status", "data.frame"), exact = TRUE)
  expect_named(status, columns)
  expect_identical(status$rank, 1:3)
  expect_identical(status$pid, as.integer(clusterPids(cl)))
  expect_identical(status$state, rep("idle", 3))
  expect_identical(status$done, c(0, 0, 0))
  expect_true(all(status$seconds == 0 & is.na(status$task) & is.na(status$error) & status$losses == 0L))
  skip_unless_proc()
  expect_true(all(status$rss > 5e6 & status$memory > 1e5 & status$memory <= status$rss))
  expect_true(all(is.na(clusterStatus(cl, memory = FALSE)$memory)))
})

test_that("finished tasks count for their worker, for all verbs", {
  cl <- local_cluster(3)
  done <- function() clusterStatus(cl, memory = FALSE)$done
  clusterApply(cl[1:2], 1:7, identity)
  expect_identical(done(), c(4, 3, 0))
  parallel::clusterApply(cl[2:3], 1:4, identity)
  expect_identical(done(), c(4, 5, 2))
  clusterCall(cl, function() 1)
  expect_identical(done(), c(5, 6, 3))
  # In units, and singly, with what is sent besides.
  clusterLapply(cl, 1:1000, identity)
  expect_identical(sum(done()), 14 + 1000)
  clusterLapply(cl, 1:10, identity, .timeout = 60)
  expect_identical(sum(done()), 14 + 1010)
  parallel::clusterApplyLB(cl, 1:10, function(i) new.env())
  expect_identical(sum(done()), 14 + 1020)
})

test_that("column `seconds` is the time of tasks", {
  cl <- local_cluster(2)
  seconds <- function() clusterStatus(cl, memory = FALSE)$seconds
  clusterApply(cl[1], 1:3, function(i) Sys.sleep(0.1))
  first <- seconds()
  expect_gte(first[[1]], 0.3)
  expect_lt(first[[1]], 3)
  expect_identical(first[[2]], 0)
  # Answers that do not say how long they took.
  parallel::clusterCall(cl[2], function() {
    Sys.sleep(0.3)
    new.env()
  })
  expect_gte(seconds()[[2]], 0.29)
  expect_lt(seconds()[[2]], 3)
  expect_identical(seconds()[[1]], first[[1]])
})

test_that("columns `bytes_in` and `bytes_out` grow with data that is sent and received", {
  cl <- local_cluster(2)
  before <- clusterStatus(cl, memory = FALSE)
  assign("status_data", rnorm(1e5), globalenv())
  on.exit(rm("status_data", envir = globalenv()), add = TRUE, after = FALSE)
  clusterExport(cl[1], "status_data")
  after <- clusterStatus(cl, memory = FALSE)
  grown <- after$bytes_in - before$bytes_in
  expect_gte(grown[[1]], 8e5)
  expect_lt(grown[[1]], 9e5)
  expect_identical(grown[[2]], 0)
  clusterEvalQ(cl[1], status_data)
  expect_gte(clusterStatus(cl, memory = FALSE)$bytes_out[[1]] - after$bytes_out[[1]], 8e5)
  # To many it crosses once, and is their host's.
  host <- summary(cl)$bytes_in
  clusterExport(cl, "status_data")
  now <- summary(cl)$bytes_in
  expect_gte(now - host, 8e5)
  expect_lt(now - host, 9e5)
  expect_lt(sum(clusterStatus(cl, memory = FALSE)$bytes_in), 1e6)
})

test_that("column `error` contains the last error, of all verbs", {
  cl <- local_cluster(4)
  expect_error(clusterApply(cl[1], 1, function(i) stop("a 100% bad one")))
  expect_error(parallel::clusterApply(cl[2], 1, function(i) stop("spelled out")))
  expect_error(parallel::clusterCall(cl[3], function(i) stop("earlier")))
  clusterLapply(cl[3], 1:3, function(i) if (i == 2) stop("later\nwith a second line"), .errors = "return")
  error <- clusterStatus(cl, memory = FALSE)$error
  expect_match(error[[1]], "a 100% bad one", fixed = TRUE)
  expect_match(error[[2]], "spelled out", fixed = TRUE)
  expect_match(error[[3]], "later\nwith", fixed = TRUE)
  expect_identical(error[[4]], NA_character_)
})

test_that("tasks that time out count neither as done nor as worker failures", {
  cl <- local_cluster(2)
  clusterLapply(cl, 1:6, function(i) if (i == 2) repeat NULL, .timeout = 0.3, .errors = "return")
  # Its worker is killed, since it does not heed the interrupt.
  clusterLapply(cl[1], 1, function(i) system("trap '' INT; sleep 60; true"), .timeout = 0.3, .errors = "return")
  expect_true(wait_until(function() all(clusterStatus(cl, memory = FALSE)$state == "idle")))
  status <- clusterStatus(cl, memory = FALSE)
  timeline <- clusterTimeline(cl)
  expect_equal(sum(status$done), 5)
  expect_equal(vapply(1:2, function(rank) sum(timeline$tasks[timeline$rank == rank]), 0), status$done)
  expect_equal(status$losses, c(0L, 0L))
  expect_match(status$error[[1L]], "exceeded its time limit", fixed = TRUE)
  expect_warning(clusterCall(cl, identity, 1), class = "rustcluster_worker_replaced")
  short <- local_cluster(1, timeout = 0.3)
  expect_rust_error(caught(clusterApply(short, 1:2, function(i) if (i == 1) repeat NULL)), "timeout")
  expect_match(clusterStatus(short, memory = FALSE)$error, "exceeded its time limit", fixed = TRUE)
  expect_equal(clusterStatus(short, memory = FALSE)$done, 1)
  expect_equal(sum(clusterTimeline(short)$tasks), 1)
})

test_that("clusterStatus() works in .onResult during a call", {
  cl <- local_cluster(2)
  seen <- list()
  clusterLapply(cl, 1:4, function(i) Sys.sleep(if (i == 1) 1 else 0.05), .onResult = function(i, value) {
    seen[[i]] <<- clusterStatus(cl)
  })
  # The second was first to come: the other worker was at task 1.
  status <- seen[[2]]
  at <- which(status$task %in% 1L)
  expect_length(at, 1L)
  expect_identical(status$state[[at]], "busy")
  expect_identical(status$batch[[at]], 1L)
  expect_true(all(status$seconds[at] > 0))
  skip_unless_proc()
  expect_true(all(status$memory > 1e5))
})

test_that("after an interrupted call, workers are first ending, then idle", {
  cl <- local_cluster(2)
  handler <- function(i, value) stop("enough")
  expect_error(clusterLapply(cl, 1:3, function(i) if (i > 1) Sys.sleep(30), .onResult = handler), "enough")
  status <- clusterStatus(cl, memory = FALSE)
  expect_true(all(status$state %in% c("ending", "idle")))
  wait_until(function() all(clusterStatus(cl, memory = FALSE)$state == "idle"))
  expect_identical(clusterApply(cl, 1:2, identity), list(1L, 2L))
})

test_that("worker failures are in status and timeline", {
  skip_unless_proc()
  cl <- local_cluster(3)
  pid <- clusterPids(cl)[[2]]
  tools::pskill(pid, tools::SIGKILL)
  wait_until(function() !alive(pid))
  wait_until(function() clusterStatus(cl, memory = FALSE)$losses[[2]] == 1L)
  wait_until(function() clusterStatus(cl, memory = FALSE)$state[[2]] == "idle")
  status <- clusterStatus(cl)
  expect_identical(status$losses, c(0L, 1L, 0L))
  expect_match(status$error[[2]], paste0("lost: pid ", pid, " was killed by signal 9"), fixed = TRUE)
  expect_false(status$pid[[2]] == pid)
  expect_identical(summary(cl)$losses, 1L)
  lost <- subset(as.data.frame(clusterTimeline(cl)), kind == "lost")
  expect_identical(lost$rank, 2L)
  # The head may hear of the failure and of the replacement at once.
  expect_gte(lost$end, lost$start)
  suppressWarnings(clusterCall(cl, function() 1))
})

test_that("a worker that dies in a task was busy until then", {
  cl <- local_cluster(2, retries = 0)
  expect_error(clusterApply(cl[1], 1, function(i) {
    Sys.sleep(0.2)
    tools::pskill(Sys.getpid(), tools::SIGKILL)
    Sys.sleep(30)
  }))
  status <- clusterStatus(cl, memory = FALSE)
  expect_gte(status$seconds[[1]], 0.19)
  expect_identical(status$done[[1]], 0)
  expect_identical(status$losses, c(1L, 0L))
})

test_that("hosts that do not respond have memory NA after `timeout`", {
  skip_unless_proc()
  cl <- local_cluster(c("localhost", "localhost"))
  agent <- agentPids(cl)
  tools::pskill(agent, tools::SIGSTOP)
  on.exit(tools::pskill(agent, tools::SIGCONT), add = TRUE, after = FALSE)
  took <- system.time(status <- clusterStatus(cl, timeout = 0.3))[["elapsed"]]
  expect_true(all(is.na(status$memory) & is.na(status$rss)))
  expect_identical(status$state, rep("idle", 2))
  expect_lt(took, 10)
  expect_gte(took, 0.29)
  tools::pskill(agent, tools::SIGCONT)
  # That answer comes too late, and is not taken for the next one.
  expect_true(all(clusterStatus(cl, timeout = 30)$memory > 1e5))
})

test_that("parts of a cluster, stopped nodes and stopped clusters", {
  cl <- local_cluster(4)
  expect_identical(clusterStatus(cl[c(3, 1)])$rank, c(3L, 1L))
  expect_identical(clusterStatus(rev(cl))$rank, 4:1)
  clusterApply(cl, 1:4, identity)
  expect_identical(summary(cl[2:3])[c("workers", "done")], data.frame(workers = 2L, done = 2), ignore_attr = "class")
  expect_identical(attr(clusterTimeline(cl[2:3]), "workers")$rank, 2:3)
  parallel::stopCluster(cl[4])
  wait_until(function() identical(clusterStatus(cl)$state, c("idle", "idle", "idle", "stopped")))
  parallel::stopCluster(cl)
  status <- clusterStatus(cl)
  expect_identical(status$state, rep("stopped", 4))
  expect_true(all(is.na(status$pid) & is.na(status$memory)))
  expect_identical(status$done, rep(1, 4))
  expect_identical(summary(cl)$done, 4)
  expect_s3_class(clusterTimeline(cl), "rustcluster_timeline")
})

test_that("workers on other hosts", {
  skip_without_sshd()
  ssh <- local_sshd()
  cl <- over_ssh(ssh, c("127.0.0.2", "127.0.0.3", "127.0.0.3"))
  clusterApply(cl, 1:6, function(i) Sys.sleep(0.05))
  status <- clusterStatus(cl, timeout = 30)
  expect_identical(status$host, c("127.0.0.2", "127.0.0.3", "127.0.0.3"))
  expect_identical(status$done, c(2, 2, 2))
  expect_true(all(status$memory > 1e5))
  by_host <- summary(cl)
  expect_identical(by_host$host, c("127.0.0.2", "127.0.0.3"))
  expect_identical(by_host$workers, 1:2)
  expect_identical(by_host$done, c(2, 4))
  expect_true(all(by_host$bytes_in > 0 & by_host$bytes_out > 0))
  timeline <- clusterTimeline(cl)
  expect_identical(unique(timeline$host), c("127.0.0.2", "127.0.0.3"))
  agent <- agentPids(cl)[[1]]
  tools::pskill(agent, tools::SIGKILL)
  wait_until(function() clusterStatus(cl, memory = FALSE)$state[[1]] == "lost")
  status <- clusterStatus(cl, timeout = 30)
  expect_identical(is.na(status$memory), c(TRUE, FALSE, FALSE))
  expect_match(status$error[[1]], "lost with its host")
  expect_true(any(clusterTimeline(cl)$kind == "lost"))
  suppressWarnings(clusterCall(cl[2:3], function() 1))
  # What is stopped is not lost any longer.
  parallel::stopCluster(cl)
  lost <- function() subset(as.data.frame(clusterTimeline(cl)), kind == "lost")$end
  expect_identical(lost(), lost())
})

test_that("columns have the documented types in all states of a cluster", {
  types <- function(x) vapply(as.data.frame(x), typeof, "")
  of_all <- function(cl) {
    timeline <- clusterTimeline(cl)
    dump <- clusterDump(cl, timeout = 30)$clusters[[1L]]
    list(
      types(clusterStatus(cl, timeout = 30)), types(clusterStatus(cl, memory = FALSE)), types(summary(cl)),
      types(clusterHosts(cl)), types(timeline), types(attr(timeline, "workers")), types(dump$events),
      types(dump$hosts[c("host", "answered")]), types(dump$workers[c("host", "rank", "state")])
    )
  }
  cl <- local_cluster(c("localhost", "localhost"))
  expected <- of_all(cl)
  number <- "double"
  expect_identical(unname(expected[[1L]]), c(
    "character", "integer", "integer", "character", "integer", "integer", number, number, number, number, number,
    number, "integer", "character"
  ))
  expect_identical(unname(expected[[3L]]), c(
    "character", "integer", "integer", number, number, number, number, number, "integer"
  ))
  expect_identical(unname(expected[[4L]]), c(
    rep("character", 5), "integer", "integer", "character", "character", "integer", number, number, number,
    "character"
  ))
  expect_identical(unname(expected[[5L]]), c("character", "integer", number, number, "character", number, number))
  expect_same_types <- function(cl) {
    expect_identical(of_all(cl), expected)
    # The methods of the package print, and not that of data frames.
    expect_match(capture.output(print(summary(cl))), "worked", all = FALSE, fixed = TRUE)
    expect_match(capture.output(print(clusterStatus(cl))), "of work", all = FALSE, fixed = TRUE)
  }
  tools::pskill(agentPids(cl), tools::SIGKILL)
  try(suppressWarnings(clusterCall(cl, identity, 1)), silent = TRUE)
  expect_true(wait_until(function() all(clusterStatus(cl, memory = FALSE)$state == "lost")))
  expect_same_types(cl)
  expect_identical(summary(cl)$memory, NA_real_)
  stopCluster(cl)
  expect_same_types(cl)
  expect_warning(
    left <- local_cluster(c("localhost", "no-such-host.invalid"), on_failure = "warn"),
    class = "rustcluster_host_left_out"
  )
  expect_same_types(left)
})

test_that("invalid arguments of clusterStatus() and clusterTimeline() are errors", {
  cl <- local_cluster(1)
  bad <- function(argument, call) {
    error <- caught(call)
    expect_rust_error(error, "bad_argument")
    expect_identical(error$argument, argument)
  }
  for (memory in list(NA, 1, "yes", c(TRUE, TRUE), NULL)) bad("memory", clusterStatus(cl, memory = memory))
  for (timeout in list(-1, NA, "1", 1:2, NULL, Inf)) bad("timeout", clusterStatus(cl, timeout = timeout))
  for (other in list(NULL, 1, list(), cl[0], structure(list(1), class = "cluster"))) {
    bad("cl", clusterStatus(other))
    bad("cl", clusterTimeline(other))
  }
  bad("n", print(clusterStatus(cl), n = "all"))
  bad("n", print(clusterTimeline(cl), n = NA))
  timeline <- simulated_timeline(c(a = 2))
  grDevices::pdf(NULL)
  on.exit(grDevices::dev.off(), add = TRUE, after = FALSE)
  for (xlim in list(1, c(2, 1), c(NA, 1), "a", c(1, 1))) bad("xlim", plot(timeline, xlim = xlim))
  bad("legend", plot(timeline, legend = NA))
  bad("col", plot(timeline, col = "red"))
  broken <- timeline
  broken$start <- NULL
  bad("x", plot(broken))
  broken <- timeline
  broken$end <- as.character(broken$end)
  bad("x", plot(broken))
  restored <- unserialize(serialize(cl, NULL))
  expect_rust_error(caught(clusterStatus(restored)), "restored")
  expect_rust_error(caught(clusterTimeline(restored)), "restored")
})

test_that("intervals of a timeline do not overlap, and cover all tasks", {
  cl <- local_cluster(2)
  clusterApply(cl[1], 1, function(i) Sys.sleep(0.3))
  clusterApply(cl, 1:6, function(i) Sys.sleep(0.02 * i))
  clusterLapply(cl, 1:5000, sqrt)
  pid <- clusterPids(cl)[[1]]
  tools::pskill(pid, tools::SIGKILL)
  wait_until(function() clusterStatus(cl, memory = FALSE)$losses[[1]] == 1L)
  suppressWarnings(clusterLapply(cl, 1:5000, sqrt))
  timeline <- clusterTimeline(cl)
  expect_named(timeline, c("host", "rank", "start", "end", "kind", "busy", "tasks"))
  expect_true(all(timeline$kind %in% c("busy", "transfer", "lost")))
  expect_true(all(timeline$start >= 0 & timeline$end <= attr(timeline, "now")))
  expect_true(all(timeline$busy <= timeline$end - timeline$start + 1e-6))
  for (rank in 1:2) {
    of <- as.data.frame(timeline)[timeline$rank == rank, ]
    expect_true(all(diff(of$start) >= 0))
    expect_true(all(of$end[-nrow(of)] <= of$start[-1] + 1e-9))
  }
  long <- timeline[timeline$rank == 1 & timeline$kind == "busy" & timeline$end - timeline$start >= 0.3, ]
  expect_gte(nrow(long), 1L)
  expect_gte(long$busy[[1]], 0.3)
  status <- clusterStatus(cl, memory = FALSE)
  expect_equal(sum(timeline$tasks), sum(status$done))
  expect_equal(sum(timeline$busy), sum(status$seconds), tolerance = 1e-3)
  since <- as.numeric(difftime(Sys.time(), attr(timeline, "origin"), units = "secs"))
  expect_gte(since, attr(timeline, "now") - 0.1)
  expect_lt(since, attr(timeline, "now") + 60)
})

test_that("the history of a worker has a maximum size", {
  cl <- local_cluster(1)
  for (i in 1:1200) parallel::clusterCall(cl, Sys.sleep, 0.0015)
  timeline <- clusterTimeline(cl)
  expect_lte(nrow(timeline), 500L)
  expect_gte(nrow(timeline), 20L)
  expect_identical(sum(timeline$tasks), 1200)
  # R's clock counts milliseconds.
  expect_gte(sum(timeline$busy), 1.2)
})

test_that("plot() of a cluster is an error with a remedy", {
  expect_rust_error(error <- caught(plot(local_cluster(1))), "bad_argument")
  expect_match(conditionMessage(error), "plot(clusterTimeline(x))", fixed = TRUE)
})

test_that("plots are drawn for any number of workers", {
  file <- tempfile(fileext = ".pdf")
  grDevices::pdf(file, 9, 6)
  on.exit(unlink(file), add = TRUE, after = FALSE)
  before <- graphics::par("mar")
  for (hosts in list(c(a = 1), c(a = 3, b = 5), c(pi = 2, a = 64, b = 64, c = 64, d = 126))) {
    timeline <- simulated_timeline(hosts)
    expect_invisible(plot(timeline))
    part <- withVisible(plot(timeline, xlim = c(2, 3), main = "part", xlab = "s", legend = FALSE))
    expect_identical(part$value, timeline)
  }
  many <- stats::setNames(rep(1, 100), paste0("a-rather-long-host-name-", 1:100, ".example.org"))
  expect_invisible(plot(simulated_timeline(many)))
  # Some rows, which do not know of the other workers, and none.
  expect_invisible(plot(timeline[timeline$kind == "lost", ]))
  expect_invisible(plot(timeline[0, ]))
  expect_identical(graphics::par("mar"), before)
  grDevices::dev.off()
  expect_gt(file.size(file), 10000)
  cl <- local_cluster(2)
  grDevices::pdf(NULL)
  expect_invisible(plot(clusterTimeline(cl)))
  grDevices::dev.off()
})

test_that("clusterHosts() prints sizes with units, and contains numbers", {
  cl <- local_cluster(1)
  hosts <- clusterHosts(cl)
  expect_s3_class(hosts, c("rustcluster_hosts", "data.frame"), exact = TRUE)
  expect_type(hosts$memory, "double")
  expect_type(hosts$available, "double")
  expect_gt(hosts$memory, 1e8)
  printed <- function(x) utils::capture.output(print(x))
  hosts <- hosts[c(1, 1), c("host", "memory", "available", "problem")]
  hosts$memory <- c(7.6e9, NA)
  hosts$available <- c(512e6, 1.5e12)
  hosts$problem <- c(NA, "lost")
  rownames(hosts) <- NULL
  expect_identical(printed(hosts), c(
    "       host memory available problem", "1 localhost 7.6 GB  512.0 MB    <NA>",
    "2 localhost      ? 1500.0 GB    lost"
  ))
  expect_identical(hosts$memory, c(7.6e9, NA))
  # Columns and rows of it, and columns that a user has changed.
  expect_identical(printed(hosts["host"]), printed(as.data.frame(hosts)["host"]))
  expect_match(printed(hosts[0, ]), "0 rows", all = FALSE)
  hosts$memory <- c("much", "little")
  expect_match(printed(hosts), "little 1500.0 GB", all = FALSE)
  utils::capture.output(expect_invisible(print(hosts)))
})

test_that("print() of clusterStatus() and clusterTimeline()", {
  status <- data.frame(
    host = rep(c("pi", "node1"), c(2, 6)), rank = 1:8, pid = c(NA, 1002:1008),
    state = c("lost", rep("busy", 5), "idle", "restoring"), task = c(NA, 11:15, NA, NA),
    batch = c(NA, 1L, 30L, 1L, 1L, 1L, NA, NA), done = c(3, 1234567, 5:10), seconds = c(0.04, 7300, 61:66 * 10),
    memory = c(NA, 3e6, 2.5e9, 4:8 * 1e7), rss = 8:1 * 1e7, bytes_in = 10^(1:8), bytes_out = 10^(8:1),
    losses = c(1L, rep(0L, 6), 2L),
    error = c("lost with its host: it was silent", rep(NA, 5), "not\nso good", strrep("long ", 50))
  )
  class(status) <- c("rustcluster_status", "data.frame")
  expect_snapshot(print(status))
  expect_snapshot(print(status, n = 5))
  expect_snapshot(print(status[0, ]))
  expect_snapshot(print(status[2, c("host", "done")]))
  cl <- local_cluster(2)
  expect_output(print(summary(cl)), "localhost")
  expect_output(print(clusterTimeline(cl)), "0 intervals")
  expect_output(print(simulated_timeline(c(a = 4))), "40 intervals, of which the first 10")
})
