# Nodes of several clusters, and nodes beside PSOCK's. A PSOCK cluster with as many nodes is the oracle.

skip_on_cran()
watch_processes()

cluster_of <- function(nodes, class = c("RustCluster", "cluster")) structure(nodes, class = class)

# The nodes of a PSOCK cluster of four, and of clusters of the same size from several: interleaved, and beside
# PSOCK's nodes in both orders.
several <- new.env()

mixtures <- function() {
  if (is.null(several$all)) {
    several$a <- note_processes(makeRustCluster(2))
    several$b <- note_processes(makeRustCluster(3))
    several$psock <- parallel::makePSOCKcluster(2)
    a <- unclass(several$a)
    b <- unclass(several$b)
    psock <- unclass(several$psock)
    several$all <- list(
      two = cluster_of(c(a[1], b[2], a[2], b[1])), ours_first = cluster_of(c(a, psock), "cluster"),
      theirs_first = cluster_of(c(psock[1], b[3], psock[2], b[1]), "cluster"),
      of_our_class = cluster_of(c(a[1], psock, b[1]))
    )
  }
  several$all
}

two_clusters <- function() mixtures()$two

oracle <- function() {
  if (is.null(several$oracle)) several$oracle <- parallel::makePSOCKcluster(4)
  several$oracle
}

expect_same_on_all <- function(expr, ...) {
  expr <- strip_srcref(substitute(expr))
  want <- outcome(expr, oracle(), c(list(...), verbs_of("parallel")))
  for (name in names(mixtures())) {
    for (package in c("parallel", "rustcluster")) {
      got <- outcome(expr, mixtures()[[name]], c(list(...), verbs_of(package)))
      same <- identical(got, want)
      expect(same, if (same) "" else {
        paste0(
          paste(deparse(expr), collapse = "\n"), " of ", package, " differs on ", name, "\nPSOCK:\n",
          describe_outcome(want), "\ngot:\n", describe_outcome(got)
        )
      })
    }
  }
  invisible(want$result)
}

test_that("every verb returns the same as PSOCK on nodes of several clusters", {
  expect_same_on_all(clusterCall(cl, function(x) x + 1, 2))
  expect_same_on_all(clusterApply(cl, c(a = 1, b = 2, c = 3, d = 4, e = 5, f = 6), function(i) i * 2))
  expect_same_on_all(clusterApply(cl, 1:2, identity))
  expect_same_on_all(clusterApply(cl, list(), identity))
  expect_same_on_all(clusterApplyLB(cl, as.list(letters), toupper))
  expect_same_on_all(clusterApplyLB(cl, 1:40, function(i, x) c(i, x), x = 3))
  expect_same_on_all(clusterMap(cl, function(x, y, z) x + y + z, c(a = 1, b = 2, c = 3), 4:6, MoreArgs = list(z = 1)))
  expect_same_on_all(clusterMap(cl, `+`, 1:11, 1:11, .scheduling = "dynamic"))
  expect_same_on_all(parLapply(cl, list(a = 1, b = 2, c = 3, d = 4, e = 5), function(i) i + 1))
  expect_same_on_all(parLapplyLB(cl, 1:11, function(i) i + 1))
  expect_same_on_all(parLapplyLB(cl, 1:11, function(i) i + 1, chunk.size = 2))
  expect_same_on_all(parSapply(cl, c("x", "y", "z"), nchar))
  expect_same_on_all(parSapplyLB(cl, 1:7, function(i) c(i, i^2)))
  expect_same_on_all(parApply(cl, matrix(1:12, 3, dimnames = list(letters[1:3], NULL)), 1, sum))
  expect_same_on_all(parRapply(cl, matrix(1:12, 3), sum))
  expect_same_on_all(parCapply(cl, matrix(1:12, 3), sum))
  expect_same_on_all({
    exported <- 42
    clusterExport(cl, "exported", environment())
    list(clusterEvalQ(cl, exported + 1), clusterEvalQ(rev(cl), exported))
  })
  expect_same_on_all(clusterSplit(cl, 1:10))
})

test_that("the verbs of this package accept nodes of this package in a PSOCK cluster", {
  mixtures()
  cl <- cluster_of(c(unclass(several$psock), unclass(several$a)), class(several$psock))
  expect_identical(clusterApplyLB(cl, 1:20, identity), as.list(1:20))
  expect_identical(parLapplyLB(cl, 1:20, identity), as.list(1:20))
  expect_identical(clusterApply(cl, 1:20, identity), as.list(1:20))
})

test_that("nodes run the same tasks, with the same random numbers, as with PSOCK", {
  expect_same_on_all({
    parallel::clusterSetRNGStream(cl, 5)
    list(clusterCall(cl, runif, 2), clusterApply(cl, 1:9, function(i) runif(1)), parSapply(cl, 1:9, rnorm))
  })
  expect_same_on_all({
    clusterApply(cl, 1:4, function(i) assign("rank", i, envir = .GlobalEnv))
    list(clusterEvalQ(cl, rank), clusterEvalQ(cl[c(4, 2)], rank), clusterApply(cl[-1], 1:7, function(i) rank))
  })
})

test_that("errors of tasks on nodes of several clusters are the same as with PSOCK", {
  for (fun in list(function(i) stop("no ", i), function(i) if (i == 3) stop("three") else i)) {
    expect_same_on_all(clusterApply(cl, 1:6, fun), fun = fun)
    expect_same_on_all(clusterApplyLB(cl, c(3, 3, 3, 3), fun), fun = fun)
    expect_same_on_all(parLapply(cl, 1:6, fun), fun = fun)
  }
  result <- expect_same_on_all(clusterCall(cl, stop, "all"))
  expect_match(result$message, "4 nodes produced errors")
  # The next call is right.
  expect_same_on_all(clusterApplyLB(cl, 1:9, identity))
})

test_that("duplicate nodes work, also beside nodes of another cluster", {
  two <- two_clusters()
  psock <- oracle()
  verbs <- verbs_of("rustcluster")
  for (places in list(c(1, 1, 2), c(2, 1, 2, 4, 4))) {
    for (package in c("parallel", "rustcluster")) {
      of <- function(expr, cl) outcome(expr, cl[places], verbs_of(package))
      for (expr in expression(
        clusterApply(cl, 1:7, identity), clusterApplyLB(cl, 1:7, identity), clusterCall(cl, identity, 1),
        parSapply(cl, 1:7, sqrt), parLapplyLB(cl, 1:7, sqrt)
      )) {
        expect_identical(of(expr, two), of(expr, psock))
      }
    }
    expect_identical(clusterLapply(two[places], 1:5, sqrt), lapply(1:5, sqrt))
  }
  one <- several$a[c(1, 2, 1)]
  expect_identical(clusterLapply(one, 1:5, sqrt), lapply(1:5, sqrt))
  expect_identical(clusterLapply(unique(one), 1:5, sqrt), lapply(1:5, sqrt))
  expect_identical(clusterPids(unique(one)), clusterPids(several$a))
})

test_that("the verbs of this package take nodes of several clusters", {
  two <- two_clusters()
  x <- c(a = 1, b = 2, c = 3, d = 4, e = 5)
  expect_identical(clusterLapply(two, x, function(i) i^2), lapply(x, function(i) i^2))
  expect_identical(clusterLapply(two, list(), sqrt), list())
  expect_identical(
    clusterLapply(two, 1:9, function(i) rnorm(2), .seed = 3), clusterLapply(several$a, 1:9, function(i) rnorm(2), .seed = 3)
  )
  seen <- integer()
  clusterLapply(two, 1:5, sqrt, .order = 5:1, .onResult = function(i, value) {
    expect_identical(value, sqrt(i))
    seen <<- c(seen, i)
  })
  expect_setequal(seen, 1:5)
  # The bar is a matter of terminals; that it does not get in the way is to be seen.
  suppressMessages(expect_identical(clusterLapply(two, 1:5, sqrt, .progress = TRUE), lapply(1:5, sqrt)))
  error <- caught(clusterLapply(two, 1:6, function(i) if (i %in% c(2, 5)) stop("no ", i) else i))
  expect_rust_error(error, "element_failed")
  expect_identical(error$indices, c(2L, 5L))
  expect_identical(error$results, list(1L, NULL, 3L, 4L, NULL, 6L))
  expect_identical(conditionMessage(error$parent), "no 2")
  got <- clusterLapply(two, 1:2, function(i) if (i == 2) stop("no") else i, .errors = "return")
  expect_s3_class(got[[2]], "try-error")
  expect_identical(conditionMessage(attr(got[[2]], "condition")), "no")
  expect_rust_error(caught(clusterLapply(two, 1:99, function(i) stop("first"), .errors = "stop")), "element_failed")
  expect_identical(clusterLapply(two, 1:3, sqrt), lapply(1:3, sqrt))
  error <- caught(clusterLapply(two, 1:3, sqrt, .timeout = 1))
  expect_identical(error$argument, ".timeout")
  expect_identical(clusterLapplyAsync(two, x, sqrt)$value(), lapply(x, sqrt))
  # Calls go to whichever cluster has idle workers.
  gate <- tempfile()
  calls <- lapply(1:4, function(i) clusterSubmit(two, {
    while (!file.exists(gate)) Sys.sleep(0.01)
    Sys.getpid()
  }))
  expect_true(wait_until(function() all(vapply(calls, function(call) call$status(), "") == "running")))
  file.create(gate)
  expect_setequal(vapply(calls, function(call) call$value(), 0L), clusterPids(two))
})

test_that("a loop of foreach runs on nodes of several clusters", {
  skip_if_not_installed("foreach")
  on.exit(foreach::registerDoSEQ(), add = TRUE, after = FALSE)
  `%dopar%` <- foreach::`%dopar%`
  y <- 3
  registerDoRustCluster(two_clusters())
  expect_identical(foreach::getDoParWorkers(), 4L)
  expect_identical(foreach::foreach(i = 1:9, .combine = c) %dopar% (i + y), 1:9 + y)
  error <- caught(foreach::foreach(i = 1:9) %dopar% if (i == 4) stop("four") else i)
  expect_match(conditionMessage(error), "task 4 failed - \"four\"", fixed = TRUE)
  skip_if_not_installed("doParallel")
  for (cl in mixtures()) {
    doParallel::registerDoParallel(cl)
    expect_identical(foreach::foreach(i = 1:9, .combine = c) %dopar% (i + y), 1:9 + y)
  }
})

test_that("a task is retried after a worker failure, and is named by its index among all tasks", {
  two <- two_clusters()
  once <- function(i, at, mark) {
    if (i == at && !file.exists(mark)) {
      file.create(mark)
      tools::pskill(Sys.getpid(), 9)
    }
    i
  }
  always <- function(i, at) if (i == at) tools::pskill(Sys.getpid(), 9) else i
  verbs <- list(
    parallel::clusterApply, parallel::clusterApplyLB, clusterApply, clusterApplyLB, clusterLapply
  )
  for (verb in verbs) {
    losses <- character()
    noting <- function(expr) withCallingHandlers(expr, rustcluster_worker_lost = function(w) {
      losses <<- c(losses, sub(".*, and (task|element) ", "", conditionMessage(w)))
      tryInvokeRestart("muffleWarning")
    })
    expect_identical(noting(verb(two, 1:9, once, 6, tempfile())), as.list(1:9))
    expect_identical(losses, "6 is retried")
    error <- noting(caught(verb(two, 1:9, always, 7)))
    expect_rust_error(error, "task_failed")
    expect_identical(as.integer(error$index), 7L)
    expect_identical(error$results[-7], as.list(c(1:6, 8:9)))
  }
  got <- suppressWarnings(clusterLapply(two, 1:4, always, 3, .errors = "return", .retries = 0))
  expect_s3_class(attr(got[[3]], "condition"), "rustcluster_task_failed")
  expect_match(got[[3]], "element 3")
  expect_rust_error(caught(clusterLapply(two, 1:4, always, 3, .retries = 0)), "worker_lost")
  expect_identical(clusterApplyLB(two, 1:9, identity), as.list(1:9))
})

test_that("after an interrupt, or a warning that jumps, all clusters are usable", {
  two <- two_clusters()
  right <- function() {
    for (cl in list(two, several$a, several$b)) {
      expect_identical(clusterApplyLB(cl, 1:9, identity), as.list(1:9))
      expect_identical(parallel::clusterApply(cl, 1:9, identity), as.list(1:9))
    }
  }
  nap <- function(i) Sys.sleep(60)
  for (call in list(
    quote(clusterCall(two, Sys.sleep, 60)), quote(parLapply(two, 1:9, nap)), quote(clusterApplyLB(two, 1:9, nap)),
    quote(parallel::clusterApplyLB(two, 1:9, nap)), quote(clusterLapply(two, 1:9, nap))
  )) {
    expect_lt(interrupted(eval(call), 0.3), 1.5)
    right()
  }
  wrong <- 0L
  set.seed(2)
  for (i in seq_len(if (long_tests()) 300 else 10)) {
    if (!until_interrupted(clusterApplyLB(two, 1:20, function(x) "stale"), runif(1, 0, 0.03))) wrong <- wrong + 1L
    expected <- as.list(i + 1:5)
    if (!identical(clusterApplyLB(two, expected, identity), expected)) wrong <- wrong + 1L
  }
  expect_identical(wrong, 0L)
  old <- options(warn = 2)
  on.exit(options(old), add = TRUE, after = FALSE)
  kill <- function(i) if (i == 3) tools::pskill(Sys.getpid(), 9) else i
  for (verb in list(clusterApply, clusterApplyLB, parallel::clusterApplyLB, clusterLapply)) {
    expect_match(conditionMessage(caught(verb(two, 1:9, kill))), "converted from warning")
    # The task had been sent to another worker before the warning, which tells of its loss now.
    suppressWarnings(right())
  }
  # A call in a handler finds the clusters busy, whichever it uses.
  for (cl in list(two, several$b)) {
    error <- caught(clusterLapply(two, 1:9, identity, .onResult = function(...) clusterCall(cl, identity, 1)))
    expect_rust_error(error, "busy")
  }
  right()
})

test_that("each cluster is served, and waiting takes no CPU time", {
  for (cl in mixtures()) {
    who <- unlist(clusterApplyLB(cl, 1:80, function(i) {
      Sys.sleep(0.01)
      Sys.getpid()
    }))
    expect_identical(length(unique(who)), 4L)
    expect_gt(min(table(who)), 5)
  }
  for (cl in mixtures()) {
    before <- proc.time()
    clusterApplyLB(cl, 1:4, function(i) Sys.sleep(0.5))
    took <- proc.time() - before
    expect_lt(took[["user.self"]] + took[["sys.self"]], 0.25)
  }
})

test_that("waiting for a stopped, restored or silent cluster is an error", {
  a <- local_cluster(1)
  b <- local_cluster(2)
  both <- c(a, b)
  expect_rust_error(caught(parallel:::recvOneResult(both)), "no_task")
  file <- tempfile()
  saveRDS(a, file)
  expect_rust_error(caught(clusterApplyLB(c(b, readRDS(file)), 1:9, identity)), "restored")
  stopCluster(a)
  for (verb in list(clusterApplyLB, parallel::clusterApplyLB, clusterCall, clusterLapply)) {
    expect_rust_error(caught(verb(both, 1:9, identity)), "stopped")
  }
  expect_identical(clusterApplyLB(b, 1:9, identity), as.list(1:9))
})

test_that("functions that report on a cluster accept nodes of several clusters", {
  two <- two_clusters()
  clusterCall(two, identity, 1)
  pids <- unlist(clusterCall(two, Sys.getpid))
  expect_identical(clusterPids(two), pids)
  expect_setequal(agentPids(two), c(agentPids(several$a), agentPids(several$b)))
  expect_identical(clusterHosts(two)$workers, 2:3)
  expect_identical(clusterHosts(two)$up, 2:3)
  status <- clusterStatus(two)
  expect_identical(status$pid, pids)
  expect_identical(status$rank, c(1L, 2L, 2L, 1L))
  expect_false(anyNA(status$memory))
  expect_output(print(status), "4 workers on 1 host")
  total <- summary(two)
  expect_identical(total$workers, 4L)
  expect_equal(total$done, sum(clusterStatus(two)$done))
  timeline <- clusterTimeline(two)
  expect_identical(attr(timeline, "workers")$rank, 1:4)
  expect_equal(sum(timeline$tasks), sum(status$done))
  expect_true(all(timeline$end <= attr(timeline, "now") + 1e-6 & timeline$start >= 0))
  grDevices::pdf(NULL)
  on.exit(grDevices::dev.off(), add = TRUE, after = FALSE)
  expect_s3_class(plot(timeline), "rustcluster_timeline")
  expect_identical(utils::capture.output(print(two)), utils::capture.output(print(oracle())))
})

test_that("clusterAlive() leaves out the stopped nodes of each cluster", {
  a <- local_cluster(2)
  b <- local_cluster(3)
  both <- cluster_of(c(unclass(b)[c(3, 1)], unclass(a)[2:1], unclass(b)[c(3, 2)]))
  pids <- clusterPids(both)
  expect_identical(clusterAlive(both), both)
  stopCluster(b[3])
  stopCluster(a[2])
  rest <- clusterAlive(both)
  expect_identical(class(rest), class(both))
  expect_identical(unlist(clusterCall(rest, Sys.getpid)), pids[c(2, 4, 6)])
  # Nodes of ours that have kept PSOCK's class.
  expect_identical(clusterAlive(cluster_of(unclass(both), "cluster")), cluster_of(unclass(rest), "cluster"))
  stopCluster(b)
  expect_identical(clusterPids(clusterAlive(both)), pids[[4]])
  file <- tempfile()
  saveRDS(a, file)
  expect_rust_error(caught(clusterAlive(c(a, readRDS(file)))), "restored")
})

test_that("functions that refuse PSOCK nodes name them", {
  skip_if_not_installed("foreach")
  for (name in c("ours_first", "theirs_first", "of_our_class")) {
    cl <- mixtures()[[name]]
    foreign <- which(!vapply(unclass(cl), inherits, NA, "RustNode"))
    nodes <- rustcluster:::spanText(foreign, "node")
    for (fun in list(
      clusterPids, agentPids, clusterAlive, clusterHosts, clusterStatus, clusterTimeline, registerDoRustCluster,
      function(cl) clusterLapply(cl, 1:2, identity), function(cl) clusterLapplyAsync(cl, 1:2, identity),
      function(cl) clusterSubmit(cl, 1)
    )) {
      error <- caught(fun(cl))
      expect_rust_error(error, "bad_argument")
      expect_identical(error$argument, "cl")
      expect_match(conditionMessage(error), nodes, fixed = TRUE)
    }
    # Without them it is one of ours, whatever its class has become.
    expect_identical(clusterLapply(cl[-foreign], 1:3, sqrt), lapply(1:3, sqrt))
    expect_identical(clusterPids(cl[-foreign]), unlist(clusterCall(cl[-foreign], Sys.getpid)))
  }
})

test_that("c() joins clusters and nodes", {
  two <- c(several$a, several$b)
  expect_s3_class(two, c("RustCluster", "cluster"), exact = TRUE)
  expect_identical(clusterPids(two), c(clusterPids(several$a), clusterPids(several$b)))
  expect_identical(clusterPids(c(several$a, several$b[[2]], list(several$b[[1]])))[3:4], clusterPids(several$b)[2:1])
  expect_s3_class(c(several$a, several$psock), "cluster", exact = TRUE)
  expect_rust_error(caught(c(several$a, 1)), "bad_argument")
  expect_rust_error(caught(c(several$a, list(1))), "bad_argument")
})

test_that("stopCluster() of joined clusters stops all of them", {
  skip_unless_proc()
  a <- local_cluster(2)
  b <- local_cluster(2)
  pids <- c(clusterPids(a), clusterPids(b), agentPids(c(a, b)))
  # A part ends, and its clusters go on.
  stopCluster(c(a[1], b[2]))
  expect_gone(pids[c(1, 4)])
  expect_identical(clusterApplyLB(c(a[2], b[1]), 1:9, identity), as.list(1:9))
  stopCluster(c(a, b))
  expect_match(format(c(a, b)), "^socket cluster .*, node.* of a cluster that has been stopped, node.* of a cluster that")
  expect_length(format(c(a, b)), 1L)
  expect_gone(pids)
  # What is wrong with one does not keep the others from their end.
  a <- local_cluster(1)
  b <- local_cluster(1)
  file <- tempfile()
  saveRDS(a, file)
  expect_rust_error(caught(stopCluster(c(a, readRDS(file), b))), "restored")
  expect_gone(c(clusterPids(a), clusterPids(b)))
  a <- local_cluster(2)
  pids <- clusterPids(a)
  psock <- parallel::makePSOCKcluster(1)
  theirs <- unlist(clusterCall(psock, Sys.getpid))
  stopCluster(a[2])
  stopCluster(c(a, psock))
  expect_gone(c(pids, theirs))
})

test_that("parallelly's functions work on nodes of this package", {
  skip_if_not_installed("parallelly")
  a <- local_cluster(2)
  b <- local_cluster(1)
  one <- parallelly::as.cluster(a[[2]])
  expect_s3_class(one, c("RustCluster", "cluster"), exact = TRUE)
  expect_identical(clusterPids(one), clusterPids(a)[2])
  both <- parallelly::as.cluster(list(a[[1]], b[[1]]))
  expect_identical(clusterApplyLB(both, 1:5, identity), as.list(1:5))
  expect_identical(parallelly::isLocalhostNode(a[[1]]), TRUE)
  expect_identical(parallelly::isLocalhostNode(c(a, b)), rep(TRUE, 3))
  expect_identical(parallelly::isForkedNode(a[[1]]), FALSE)
  skip_if_not(exists("killNode", asNamespace("parallelly")), "this parallelly has fewer functions")
  expect_identical(parallelly::isNodeAlive(c(a, b)), rep(TRUE, 3))
  pid <- clusterPids(b)
  expect_identical(parallelly::killNode(b[[1]], tools::SIGKILL), TRUE)
  expect_gone(pid)
  # Another has taken its place.
  expect_identical(suppressWarnings(clusterCall(b, identity, 1)), list(1))
  stopCluster(b)
  expect_identical(parallelly::isNodeAlive(b[[1]]), FALSE)
  expect_identical(parallelly::killNode(b[[1]]), FALSE)
  c <- makeRustCluster(1)
  pids <- note_processes(c(a, c))
  pids <- clusterPids(pids)
  both <- parallelly::autoStopCluster(c(a, c))
  expect_identical(clusterApplyLB(both, 1:5, identity), as.list(1:5))
  rm(both)
  gc()
  expect_gone(pids)
})

test_that("futures run on nodes of several clusters, or are refused", {
  skip_if_not_installed("future")
  old <- future::plan(future::cluster, workers = c(several$a, several$b[1]))
  on.exit(future::plan(old), add = TRUE, after = FALSE)
  expect_identical(future::nbrOfWorkers(), 3L)
  # Before 1.40 a warning says that resolved() waits.
  got <- suppressWarnings(future::value(lapply(1:5, function(i) future::future(i^2))))
  expect_identical(unlist(got), (1:5)^2)
  error <- caught({
    future::plan(cluster_rust, workers = c(several$a, several$b))
    future::value(future::future(1))
  })
  expect_rust_error(error, "bad_argument")
  expect_identical(error$argument, "workers")
})

test_that("tasks of others on nodes that a verb does not use keep their answers", {
  a <- local_cluster(2)
  b <- local_cluster(2)
  hand <- function(cl) for (node in cl) parallel:::sendCall(node, identity, list("by hand"), tag = 1)
  answers <- function(cl) lapply(cl, function(node) parallel:::recvData(node)$value)
  twice <- eval(quote(function(i) i * 2), globalenv())
  verbs <- list(
    function(cl) clusterLapply(cl, 1:2, twice), function(cl) clusterApplyLB(cl, 1:2, twice),
    function(cl) parLapplyLB(cl, 1:2, twice, chunk.size = 1), function(cl) parallel::clusterApplyLB(cl, 1:2, twice),
    function(cl) clusterMap(cl, twice, 1:2, .scheduling = "dynamic")
  )
  for (verb in verbs) for (used in list(a, b)) {
    other <- if (identical(used, a)) b else a
    hand(other)
    Sys.sleep(0.05)
    expect_identical(verb(c(used, other)), list(2, 4))
    expect_identical(answers(other), list("by hand", "by hand"))
  }
})

test_that("no process is left", {
  for (name in c("a", "b", "psock", "oracle")) if (!is.null(several[[name]])) stop_quietly(several[[name]])
  expect_no_leftovers()
})
