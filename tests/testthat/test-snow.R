# Package snow has generics of its own. With our clusters its functions give what they give with snow's.

skip_on_cran()
skip_if_not_installed("snow")
watch_processes()

pair <- new.env()

snow_pair <- function() {
  if (is.null(pair$snow)) {
    pair$snow <- snow::makeSOCKcluster(2)
    pair$rust <- note_processes(makeRustCluster(2))
  }
  list(snow = pair$snow, rust = pair$rust)
}

expect_same_as_snow <- function(expr) {
  expr <- strip_srcref(substitute(expr))
  verbs <- mget(getNamespaceExports("snow"), asNamespace("snow"))
  want <- outcome(expr, snow_pair()$snow, verbs)
  got <- outcome(expr, snow_pair()$rust, verbs)
  expect_identical(got, want)
  invisible(got$result)
}

test_that("snow's functions return the same as with a cluster of snow", {
  expect_same_as_snow(clusterCall(cl, function(x) x + 1, 2))
  expect_same_as_snow(clusterApply(cl, 1:5, function(i) i * 2))
  expect_same_as_snow(clusterApplyLB(cl, 1:5, function(i) i * 2))
  expect_same_as_snow(clusterMap(cl, function(a, b) a + b, 1:5, 5:1))
  expect_same_as_snow(parLapply(cl, 1:5, function(i) i * 2))
  expect_same_as_snow(parSapply(cl, c(a = 1, b = 2), function(i) i * 2))
  expect_same_as_snow(parApply(cl, matrix(1:6, 2), 1, sum))
  expect_same_as_snow(parRapply(cl, matrix(1:6, 2), sum))
  expect_same_as_snow(parCapply(cl, matrix(1:6, 2), sum))
  expect_same_as_snow(parMM(cl, matrix(1:4, 2), matrix(1:4, 2)))
  expect_same_as_snow({
    exported <- 4
    clusterExport(cl, "exported", environment())
    clusterEvalQ(cl, exported + 1)
  })
  expect_same_as_snow(clusterApplyLB(cl, 1:5, function(i) if (i > 3) stop("no ", i) else i))
  expect_same_as_snow(clusterCall(cl, stop, "all"))
  expect_same_as_snow(class(snow.time(clusterApply(cl, 1:4, sqrt))))
  expect_same_as_snow({
    for (i in 1:2) sendCall(cl[[i]], identity, list(i), tag = i)
    list(recvResult(cl[[2]]), recvResult(cl[[1]]))
  })
})

test_that("snow's other functions return the same, too", {
  skip_unless_long()
  expect_same_as_snow(clusterSplit(cl, 1:5))
  expect_same_as_snow(clusterApply(cl, clusterSplit(cl, 1:5), sum))
  expect_same_as_snow(checkForRemoteErrors(clusterCall(cl, identity, 1)))
  expect_same_as_snow(checkForRemoteErrors(list(1, structure("no\n", class = "try-error"))))
  expect_same_as_snow(checkCluster(cl))
  expect_same_as_snow(clusterExport(cl, "not.there", environment()))
  expect_same_as_snow(clusterMap(cl, function(a, b) stop(a), 1:2, MoreArgs = list(b = 1)))
  expect_same_as_snow(clusterMap(cl, rep, 1:3, 3:1))
  expect_same_as_snow(parSapply(cl, 1:6, function(i) if (i == 5) stop("five") else i))
  expect_same_as_snow(parLapply(cl, list(), identity))
  # Without package rlecuyer, also an error.
  expect_same_as_snow({
    clusterSetupRNG(cl, seed = 1:6)
    clusterCall(cl, stats::runif, 2)
  })
  expect_same_as_snow(clusterSetupRNG(cl, type = "SPRNG"))
  expect_same_as_snow(clusterSetupRNG(cl, type = "none"))
  expect_same_as_snow({
    for (i in 1:2) sendCall(cl[[i]], function(x) x * 2, list(i), tag = i)
    got <- list(recvOneResult(cl), recvOneResult(cl))
    lapply(got[order(vapply(got, `[[`, 0L, "tag"))], `[`, c("value", "node", "tag"))
  })
  expect_same_as_snow({
    postNode(cl[[1]], "EXEC", list(fun = identity, args = list(3), return = TRUE, tag = 1))
    recvData(cl[[1]])[c("type", "value", "success", "tag")]
  })
})

test_that("snow's functions work on nodes of several clusters, and beside snow's", {
  other <- local_cluster(1)
  for (nodes in list(c(unclass(snow_pair()$rust), unclass(other)), c(unclass(snow_pair()$snow), unclass(other)))) {
    cl <- structure(nodes, class = "cluster")
    expect_identical(snow::clusterApplyLB(cl, 1:20, identity), as.list(1:20))
    expect_identical(snow::clusterApply(cl, 1:20, identity), as.list(1:20))
  }
})

test_that("exports by snow are restored, and its tasks are retried", {
  skip_unless_proc()
  cl <- local_cluster(2)
  exported <- 1
  for (exported in 1:2) snow::clusterExport(cl, "exported", environment())
  once <- function(i, mark) {
    if (i == 3 && !file.exists(mark)) {
      file.create(mark)
      tools::pskill(Sys.getpid(), 9)
    }
    i + exported
  }
  environment(once) <- globalenv()
  for (verb in list(snow::clusterApply, snow::clusterApplyLB)) {
    expect_warning(got <- verb(cl, 1:6, once, tempfile()), "task 3 is retried")
    expect_identical(got, as.list(1:6 + 2L))
  }
  always <- function(i) if (i == 2) tools::pskill(Sys.getpid(), 9) else i
  error <- suppressWarnings(caught(snow::clusterApply(cl, 1:4, always)))
  expect_rust_error(error, "task_failed")
  expect_identical(error$results, list(1L, NULL, 3L, 4L))
})

test_that("after an interrupt of a function of snow the next call works", {
  cl <- local_cluster(2)
  for (verb in list(snow::clusterApply, snow::clusterApplyLB, snow::parLapply)) {
    expect_lt(interrupted(verb(cl, 1:9, function(i) Sys.sleep(60)), 0.3), 1.5)
    expect_identical(snow::clusterApplyLB(cl, 1:5, identity), as.list(1:5))
    expect_identical(parallel::clusterApplyLB(cl, 1:5, identity), as.list(1:5))
  }
})

test_that("loops of doSNOW show their progress", {
  skip_if_not_installed("doSNOW")
  on.exit(foreach::registerDoSEQ(), add = TRUE, after = FALSE)
  `%dopar%` <- foreach::`%dopar%`
  loops <- function(cl) {
    y <- 2
    doSNOW::registerDoSNOW(cl)
    seen <- list()
    progress <- function(n, tag) seen[[length(seen) + 1L]] <<- n
    list(
      foreach::foreach(i = 1:6, .combine = c, .options.snow = list(progress = progress)) %dopar% (i + y), seen,
      foreach::foreach(i = 1:6, .combine = c, .options.snow = list(preschedule = TRUE)) %dopar% (i + y),
      foreach::foreach(i = 1:6, .combine = c, .options.snow = list(attachExportEnv = TRUE)) %dopar% (i + y),
      caught(foreach::foreach(i = 1:6) %dopar% if (i == 4) stop("four") else i),
      foreach::foreach(i = 1:6, .errorhandling = "pass") %dopar% if (i == 4) stop("four") else i,
      foreach::getDoParWorkers()
    )
  }
  pair <- snow_pair()
  got <- loops(pair$rust)
  expect_equal(got, loops(pair$snow))
  expect_identical(got[[2]], as.list(as.numeric(1:6)))
})

test_that("stopCluster() ends a cluster while snow is attached", {
  skip_unless_proc()
  child <- start_child({
    suppressPackageStartupMessages(library(snow))
    one <- rustcluster::makeRustCluster(2)
    two <- rustcluster::makeRustCluster(1)
    say("pids", paste(rustcluster::clusterPids(c(one, two)), collapse = " "))
    say("value", sum(unlist(parLapply(one, 1:4, identity))))
    stopNode(one[[1]])
    say("left", sum(!is.na(rustcluster::clusterPids(one))))
    stopCluster(one[2])
    stopCluster(c(one, two))
    say("left", sum(!is.na(rustcluster::clusterPids(c(one, two)))))
  })
  pids <- as.integer(strsplit(child_wait_for(child, "pids"), " ")[[1]])
  note_pids(pids)
  expect_child_ends_well(child)
  expect_identical(child_lines(child)[-1], c("value 10", "left 1", "left 0"))
  expect_gone(pids)
})

test_that("snow and this package may be attached in any order", {
  skip_unless_long()
  skip_unless_proc()
  run <- function(packages) {
    child <- start_child({
      for (package in packages) suppressPackageStartupMessages(library(package, character.only = TRUE))
      say("first", environmentName(environment(clusterSplit)), environmentName(environment(stopCluster)))
      cl <- rustcluster::makeRustCluster(2)
      say("pids", paste(rustcluster::clusterPids(cl), collapse = " "))
      y <- 3
      clusterExport(cl, "y")
      say("value", sum(unlist(parLapply(cl, 1:4, function(i) i + y))))
      say("call", sum(unlist(clusterCall(cl, function(x) x + y, 1))))
      say("apply", sum(unlist(clusterApply(cl, 1:4, sqrt))), sum(unlist(clusterApplyLB(cl, 1:4, sqrt))))
      say("map", sum(unlist(clusterMap(cl, `+`, 1:4, 4:1))), sum(parSapply(cl, 1:4, identity)))
      say("error", conditionMessage(tryCatch(clusterCall(cl, stop, "no"), error = identity)))
      stopCluster(cl)
      say("left", sum(!is.na(rustcluster::clusterPids(cl))))
    }, values = list(packages = packages), attach = FALSE)
    pids <- child_wait_for(child, "pids")
    note_pids(child_pids(child, "pids"))
    expect_child_ends_well(child)
    expect_gone(child_pids(child, "pids"))
    lines <- child_lines(child)
    expect_identical(lines[c(3, 4, 6, 8)], c("value 22", "call 8", "map 20 10", "left 0"))
    expect_match(lines[[7]], "^error 2 nodes produced errors; first error: no")
    lines[[1]]
  }
  expect_identical(run(c("snow", "rustcluster")), "first parallel parallel")
  expect_identical(run(c("rustcluster", "snow")), "first snow snow")
  expect_identical(run(c("parallel", "snow", "rustcluster")), "first snow snow")
  expect_identical(run(c("snow", "parallel", "rustcluster")), "first parallel parallel")
})

test_that("no process is left", {
  if (!is.null(pair$snow)) {
    snow::stopCluster(pair$snow)
    snow::stopCluster(pair$rust)
  }
  expect_no_leftovers()
})
