# Nothing that a worker, a peer or a user does takes the session down.

watch_processes()

test_that("messages may contain any text", {
  pair <- cluster_pair()
  for (text in c("%s%n%d%%", strrep("x%s", 4e5), "Z\u00fcrich \u2018%n\u2019")) {
    get <- function(cl) {
      conditionMessage(tryCatch(clusterCall(cl[1], stop, text), error = identity))
    }
    expect_identical(get(pair$rust), get(pair$psock))
  }
})

test_that("a value or an argument that cannot be serialized is an error, and the next call works", {
  cl <- local_cluster(2)
  # R jumps out of its serialization through our frames, again and again.
  cut <- function() stop("cut")
  for (i in 1:25) {
    expect_error(clusterCall(cl, identity, {
      cut()
      1
    }), "cut")
    expect_error(rustcluster:::hub_receive_any(cl[[1]]$handle$pointer, quote(x)) |>
      rustcluster:::checked(), class = "rustcluster_error")
  }
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
})

test_that("a call survives gctorture", {
  cl <- local_cluster(1)
  gctorture(TRUE)
  on.exit(gctorture(FALSE), add = TRUE, after = FALSE)
  got <- clusterCall(cl, identity, list(1, "a"))
  error <- tryCatch(clusterCall(cl, stop, "x"), error = conditionMessage)
  gctorture(FALSE)
  expect_equal(got, list(list(1, "a")))
  expect_match(error, "one node produced an error: x")
})

test_that("a cluster that was saved and loaded is an error of its own class", {
  cl <- local_cluster(2)
  file <- tempfile()
  saveRDS(cl, file)
  old <- readRDS(file)
  expect_rust_error(caught(clusterCall(old, identity, 1)), "restored")
  expect_rust_error(caught(stopCluster(old)), "restored")
  expect_rust_error(caught(clusterPids(old)), "restored")
  expect_output(print(old[[1]]), "saved and loaded")
  expect_output(print(old), "socket cluster with 2 nodes.* saved and loaded")
  # Also inside of what is sent to a worker.
  expect_rust_error(clusterCall(cl, function(cl) {
    tryCatch(parallel::clusterCall(cl, identity, 1), error = identity)
  }, cl)[[1L]], "restored")
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
})

test_that("receiving without an outstanding task is an error", {
  cl <- local_cluster(2)
  expect_rust_error(caught(parallel:::recvResult(cl[[1]])), "no_task")
  expect_rust_error(caught(parallel:::recvOneResult(cl)), "no_task")
})

test_that("a program that is no agent is an error with its output", {
  fake <- function(lines) {
    path <- tempfile(fileext = ".sh")
    writeLines(c("#!/bin/sh", lines), path)
    Sys.chmod(path, "755")
    path
  }
  start <- function(lines) {
    caught(makeRustCluster(2, rscript = fake(lines), setup_timeout = 10))
  }
  error <- start(c("echo on the way >&2", "exit 7"))
  expect_rust_error(error, "start_failed")
  expect_match(conditionMessage(error), "status 7")
  expect_match(conditionMessage(error), "on the way")
  expect_rust_error(start("head -c 300000 /dev/urandom"), "start_failed")
  expect_rust_error(start("yes"), "start_failed")
  # The magic, and then bytes that are no frames.
  expect_rust_error(
    start(c("printf '\\n<rustcluster stream 1>\\n'", "head -c 1000 /dev/urandom", "sleep 5")),
    "start_failed"
  )
  expect_rust_error(
    caught(makeRustCluster(2, rscript = "/nowhere/Rscript")), "start_failed"
  )
  expect_rust_error(
    caught(makeRustCluster(2, rscript = fake("sleep 60"), setup_timeout = 1)), "start_failed"
  )
})

test_that("consecutive clusters leave no descriptor and no thread", {
  skip_unless_proc()
  count <- function() {
    c(length(list.files("/proc/self/fd")), length(list.files("/proc/self/task")))
  }
  stopCluster(makeRustCluster(1))
  before <- count()
  for (i in 1:8) {
    cl <- makeRustCluster(2)
    clusterCall(cl, identity, 1)
    stopCluster(cl)
  }
  rm(cl)
  gc()
  expect_true(wait_until(function() all(count() <= before), 5))
})
