# Whatever ends first, nothing is left behind, and the head says what happened.

watch_processes()

busy <- function(cl) {
  for (node in cl) parallel:::sendCall(node, function() repeat NULL, list())
  Sys.sleep(0.3)
}

cluster_processes <- function(cl) c(agentPids(cl), clusterPids(cl))

test_that("stopCluster() leaves no process of idle or busy workers, also when it is called twice", {
  for (start in c("fork", "spawn")) {
    cl <- makeRustCluster(3, start_method = start)
    pids <- cluster_processes(cl)
    stopCluster(cl)
    expect_gone(pids)
    expect_no_error(stopCluster(cl))
    expect_rust_error(caught(clusterCall(cl, identity, 1)), "stopped")

    cl <- makeRustCluster(3, start_method = start)
    pids <- cluster_processes(cl)
    busy(cl)
    stopCluster(cl)
    expect_gone(pids)
  }
})

# On each worker, something that takes so many seconds at its end, and then makes a file.
end_slowly <- function(cl, seconds, dir, prefix = "") {
  parallel::clusterApply(cl, seconds, global(function(seconds, dir, prefix) {
    note <- function(what) file.create(file.path(dir, paste0(prefix, what, "-", seconds)))
    holder <- new.env()
    assign("holder", holder, globalenv())
    reg.finalizer(holder, function(e) {
      Sys.sleep(seconds)
      note("finalizer")
    }, onexit = TRUE)
    assign(".Last", function() note("Last"), globalenv())
    NULL
  }), dir, prefix)
}

test_that("idle workers finish their exit handlers, as those of a PSOCK cluster do", {
  dir <- tempfile("ends-")
  dir.create(dir)
  on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
  psock <- parallel::makePSOCKcluster(2)
  end_slowly(psock, c(0.8, 1), dir, "PSOCK-")
  stopCluster(psock)
  expect_true(wait_until(function() length(list.files(dir)) == 4L))
  for (start in c("fork", "spawn")) {
    cl <- makeRustCluster(2, start_method = start, stop_timeout = 60)
    end_slowly(cl, c(0.8, 1), dir, paste0(start, "-"))
    pids <- cluster_processes(cl)
    expect_no_warning(stopCluster(cl))
    # When this returns, nothing is left, and all has been done.
    expect_false(any(alive(pids)))
    expect_setequal(
      sub("^[^-]*-", "", list.files(dir, paste0("^", start))), sub("^[^-]*-", "", list.files(dir, "^PSOCK"))
    )
  }
})

test_that("a warning names workers whose exit handlers exceed `stop_timeout`, and other workers are not affected", {
  dir <- tempfile("ends-")
  dir.create(dir)
  on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
  cl <- makeRustCluster(4, stop_timeout = 1.5)
  end_slowly(cl[c(1, 2, 4)], c(0.1, 60, 61), dir)
  pids <- cluster_processes(cl)
  # This one is busy: it is killed at once.
  parallel:::sendCall(cl[[3L]], function() repeat NULL, list())
  warnings <- list()
  withCallingHandlers(stopCluster(cl), warning = function(w) {
    warnings <<- c(warnings, list(w))
    invokeRestart("muffleWarning")
  })
  expect_false(any(alive(pids)))
  expect_length(warnings, 1L)
  expect_s3_class(warnings[[1L]], c("rustcluster_stop_timeout", "rustcluster_warning"))
  expect_identical(warnings[[1L]]$rank, c(2L, 4L))
  expect_identical(warnings[[1L]]$host, "localhost")
  expect_match(conditionMessage(warnings[[1L]]), "workers 2, 4 on host .localhost. did not end within 1.5 s")
  expect_true("finalizer-0.1" %in% list.files(dir))
  expect_setequal(list.files(dir, "^Last"), c("Last-0.1", "Last-60", "Last-61"))
})

test_that("stopCluster() of a part waits for exit handlers, and returns when these workers have ended", {
  dir <- tempfile("ends-")
  dir.create(dir)
  on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
  cl <- local_cluster(3, stop_timeout = 2)
  end_slowly(cl, c(0.7, 60, 0), dir)
  pids <- clusterPids(cl)
  expect_warning(stopCluster(cl[1:2]), class = "rustcluster_stop_timeout")
  expect_equal(alive(pids), c(FALSE, FALSE, TRUE))
  expect_true("finalizer-0.7" %in% list.files(dir))
  expect_equal(clusterCall(cl[3], identity, 1), list(1))
  # What is gone already is not waited for.
  tools::pskill(agentPids(cl), tools::SIGKILL)
  expect_gone(pids)
  suppressWarnings(stopCluster(cl))
})

test_that("a cluster that is being stopped ends at once with its session", {
  skip_unless_proc()
  child <- start_child({
    cl <- makeRustCluster(2, stop_timeout = 60)
    clusterCall(cl, function() {
      assign(".Last", function() Sys.sleep(60), globalenv())
      NULL
    })
    say(paste(c(agentPids(cl), clusterPids(cl)), collapse = " "))
    stopCluster(cl)
  })
  expect_true(wait_until(function() length(child_lines(child)) > 0, 20))
  pids <- as.integer(strsplit(trimws(child_lines(child)[[1L]]), " +")[[1L]])
  # The workers are at their end by then.
  Sys.sleep(0.5)
  expect_alive(pids)
  tools::pskill(child$pid, tools::SIGKILL)
  expect_gone(pids)
})

test_that("finalizers can read mapped vectors, also those that they resurrect", {
  cl <- local_cluster(2)
  big <- as.numeric(1:1e6) + 0.5
  is_mapped <- global(function(x) any(grepl("mapped", utils::capture.output(.Internal(inspect(x))))))
  expect_equal(unlist(clusterCall(cl, is_mapped, big)), rep(Sys.info()[["sysname"]] == "Linux", 2))
  clusterCall(cl, global(function(x) {
    finalized <<- list()
    holder <- new.env(parent = emptyenv())
    holder$x <- x
    reg.finalizer(holder, function(e) {
      finalized <<- c(finalized, tryCatch(sum(e$x), error = conditionMessage))
      back <<- e
    }, onexit = TRUE)
    NULL
  }), big)
  for (i in 1:3) clusterEvalQ(cl, gc())
  seen <- clusterEvalQ(cl, c(finalized, sum(back$x)))
  expect_identical(seen, rep(list(as.list(rep(sum(big), 2L))), 2L))
  # On the head, too.
  holder <- new.env()
  holder$x <- clusterCall(cl, function() as.numeric(1:1e6))[[1L]]
  sum_at_end <- NULL
  reg.finalizer(holder, function(e) sum_at_end <<- sum(e$x))
  rm(holder)
  for (i in 1:3) gc()
  expect_identical(sum_at_end, sum(as.numeric(1:1e6)))
})

test_that("a finalizer may read large results while another result is read", {
  cl <- local_cluster(1)
  other <- local_cluster(1)
  count <- 0
  right <- logical()
  often <- function() {
    reg.finalizer(new.env(), function(e) {
      count <<- count + 1
      right[[count]] <<- identical(clusterCall(other, function() rep(7, 4e5))[[1L]], rep(7, 4e5))
      if (count < 50) often()
    })
    NULL
  }
  often()
  on.exit(gctorture2(0), add = TRUE, after = FALSE)
  gctorture2(300)
  got <- clusterCall(cl, function() lapply(1:40, function(i) rep(as.numeric(i), 1e4)))[[1L]]
  gctorture2(0)
  expect_gt(count, 0)
  expect_true(all(right))
  expect_identical(got, lapply(1:40, function(i) rep(as.numeric(i), 1e4)))
})

test_that("a cluster that is garbage-collected ends", {
  uses <- list(
    identity,
    function(cl) clusterCall(cl, identity, 1),
    function(cl) clusterApply(cl, 1:5, identity),
    function(cl) clusterApplyLB(cl, 1:5, function(i) i),
    function(cl) parallel::clusterApplyLB(cl, 1:5, function(i) i),
    function(cl) clusterExport(cl, "pids", list2env(list(pids = 1))),
    function(cl) clusterLapply(cl, 1:5, identity, .seed = 1, .onResult = function(i, value) NULL),
    function(cl) try(clusterApply(cl, 1:5, stop), silent = TRUE)
  )
  for (use in uses) {
    cl <- makeRustCluster(2)
    pids <- cluster_processes(cl)
    use(cl)
    rm(cl)
    gc()
    expect_gone(pids)
  }
})

for (how in c("q()", "stop('as it happens')", "SIGTERM", "SIGKILL")) {
  test_that(paste("no process outlives a head with busy workers that ends by", how), {
    skip_unless_proc()
    child <- start_child({
      cl <- makeRustCluster(3)
      for (node in cl) parallel:::sendCall(node, function() repeat NULL, list())
      Sys.sleep(0.3)
      say(paste(c(agentPids(cl), clusterPids(cl)), collapse = " "))
      if (how == "q()") q("no")
      if (how == "stop('as it happens')") stop("as it happens")
      Sys.sleep(60)
    }, values = list(how = how))
    expect_true(wait_until(function() length(child_lines(child)) > 0, 20))
    pids <- as.integer(strsplit(trimws(child_lines(child)[[1L]]), " +")[[1L]])
    expect_length(pids, 4L)
    if (startsWith(how, "SIG")) {
      tools::pskill(child$pid, if (how == "SIGTERM") tools::SIGTERM else tools::SIGKILL)
    }
    expect_gone(pids)
  })
}

test_that("a killed worker is reported at once, and the others go on", {
  cl <- local_cluster(3, retries = 0)
  pids <- clusterPids(cl)
  began <- proc.time()[[3L]]
  error <- caught(clusterApply(cl, 1:3, function(i) {
    if (i == 2) {
      message("last words: 100%s")
      tools::pskill(Sys.getpid(), tools::SIGKILL)
    }
    Sys.sleep(30)
  }))
  expect_lt(proc.time()[[3L]] - began, 15)
  expect_rust_error(error, "worker_lost")
  expect_equal(error$rank, 2L)
  expect_equal(error$host, "localhost")
  expect_equal(error$pid, pids[[2L]])
  expect_equal(error$signal, 9L)
  expect_match(error$stderr, "last words: 100%s", fixed = TRUE)
  expect_match(conditionMessage(error), "SIGKILL")
  # The others' tasks were cancelled; they are the same processes, and answer. Another process has
  # taken the lost one's place.
  now <- unlist(clusterCall(cl, Sys.getpid))
  expect_equal(now, as.integer(clusterPids(cl)))
  expect_equal(now[-2L], as.integer(pids[-2L]))
  expect_false(now[[2L]] %in% pids)
  note_pids(now)
  expect_no_error(stopCluster(cl))
  expect_gone(c(pids, now))
})

test_that("a worker that is killed while it is idle is replaced", {
  cl <- local_cluster(2)
  pids <- clusterPids(cl)
  tools::pskill(pids[[1L]], tools::SIGKILL)
  expect_warning(got <- unlist(clusterCall(cl, Sys.getpid)), class = "rustcluster_worker_lost")
  expect_equal(got, as.integer(clusterPids(cl)))
  expect_equal(got[[2L]], pids[[2L]])
  expect_false(got[[1L]] == pids[[1L]])
  note_pids(got)
})

test_that("the error of a worker that quits contains its exit status", {
  cl <- local_cluster(2, retries = 0)
  error <- caught(clusterCall(cl[1], function() quit(status = 3)))
  expect_rust_error(error, "worker_lost")
  expect_equal(error$status, 3L)
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
})

test_that("the workers of a killed agent end, and the host is reported as lost", {
  cl <- local_cluster(3)
  pids <- cluster_processes(cl)
  tools::pskill(agentPids(cl), tools::SIGKILL)
  expect_rust_error(caught(clusterCall(cl, Sys.sleep, 30)), "host_failed")
  expect_gone(pids)
  expect_no_error(stopCluster(cl))
})

test_that("an agent that gets SIGTERM stops its workers and ends", {
  cl <- local_cluster(2)
  pids <- cluster_processes(cl)
  tools::pskill(agentPids(cl), tools::SIGTERM)
  expect_rust_error(caught(clusterCall(cl, Sys.sleep, 30)), "host_failed")
  expect_gone(pids)
})

test_that("a forked child can neither use nor end the cluster", {
  cl <- local_cluster(2)
  got <- parallel::mccollect(parallel::mcparallel({
    error <- tryCatch(clusterCall(cl, identity, 1), error = identity)
    stopped <- tryCatch(stopCluster(cl), error = identity)
    rm(cl)
    gc()
    list(class(error), class(stopped))
  }))[[1L]]
  expect_true("rustcluster_forked" %in% got[[1L]])
  expect_true("rustcluster_forked" %in% got[[2L]])
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
})

test_that("stopCluster() kills an agent that is stopped by SIGSTOP", {
  # After 10 s.
  skip_unless_long()
  cl <- local_cluster(2)
  pids <- c(agentPids(cl), clusterPids(cl))
  tools::pskill(agentPids(cl), tools::SIGSTOP)
  stopCluster(cl)
  expect_gone(pids)
})

test_that("a forked child that lives on does not keep the workers of a killed head", {
  skip_unless_proc()
  child <- start_child({
    cl <- makeRustCluster(2)
    fork <- parallel::mcparallel(Sys.sleep(20))
    say("fork", fork$pid)
    say("pids", paste(c(agentPids(cl), clusterPids(cl)), collapse = " "))
    Sys.sleep(60)
  })
  child_wait_for(child, "pids")
  pids <- child_pids(child, "pids")
  expect_length(pids, 3L)
  fork <- child_pids(child, "fork")
  expect_alive(c(pids, fork))
  tools::pskill(child$pid, tools::SIGKILL)
  expect_gone(pids)
  expect_alive(fork)
  tools::pskill(fork, tools::SIGKILL)
})
