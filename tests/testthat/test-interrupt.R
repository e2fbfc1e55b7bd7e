# An interrupt, or an error in the head, at any moment of a verb: it returns soon, and the next
# call is right.

watch_processes()

# Sends SIGINT to this process after a while, from outside.
interrupt_after <- function(seconds) {
  system(sprintf("(sleep %.4f; kill -INT %d)", seconds, Sys.getpid()), wait = FALSE)
}

interrupted <- function(expr, after) {
  began <- proc.time()[[3L]]
  interrupt_after(after)
  got <- tryCatch(
    {
      expr
      # It may have ended just before.
      Sys.sleep(10)
      "not interrupted"
    },
    interrupt = function(e) "interrupted"
  )
  expect_equal(got, "interrupted")
  proc.time()[[3L]] - began - after
}

test_that("each kind of call returns within a second, and the next one is right", {
  cl <- local_cluster(3)
  pids <- clusterPids(cl)
  big <- numeric(2e7)
  for (call in list(
    quote(clusterCall(cl, Sys.sleep, 60)),
    quote(clusterCall(cl, function() repeat NULL)),
    quote(parLapply(cl, 1:9, function(i) Sys.sleep(60))),
    quote(clusterApplyLB(cl, 1:9, function(i) repeat NULL)),
    quote(for (i in 1:1000) clusterExport(cl, "big", environment()))
  )) {
    expect_lt(interrupted(eval(call), 0.5), 1.5)
    expect_equal(clusterApply(cl, 1:3, function(i) i), as.list(1:3))
    expect_equal(clusterApplyLB(cl, 1:10, identity), as.list(1:10))
  }
  # All could be interrupted: they are still the same processes.
  expect_equal(clusterPids(cl), pids)
})

test_that("no answer of an interrupted call is taken for one of the next", {
  cl <- local_cluster(2)
  set.seed(1)
  wrong <- 0L
  for (i in seq_len(if (long_tests()) 300 else 30)) {
    interrupt_after(runif(1, 0, 0.03))
    tryCatch(
      {
        repeat clusterApplyLB(cl, 1:20, function(x) "stale")
      },
      interrupt = function(e) NULL
    )
    expected <- as.list(i + 1:4)
    if (!identical(clusterApplyLB(cl, expected, identity), expected)) wrong <- wrong + 1L
  }
  expect_equal(wrong, 0L)
})

test_that("a time limit ends a call, and the next one is right", {
  cl <- local_cluster(2)
  expect_error(
    {
      setTimeLimit(elapsed = 0.5, transient = TRUE)
      clusterCall(cl, Sys.sleep, 60)
    },
    "time limit"
  )
  setTimeLimit()
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
})

test_that("an error of the head's in the middle of a verb leaves nothing behind", {
  cl <- local_cluster(3)
  x <- structure(list(1, 2, 3), class = "trap")
  registerS3method("[[", "trap", function(x, i) if (i == 3) stop("trapped") else i, environment())
  expect_error(clusterApply(cl, x, function(i) "stale"), "trapped")
  expect_equal(clusterCall(cl, identity, "fresh"), as.list(rep("fresh", 3)))
})

test_that("a worker that does not heed an interrupt is replaced, with a warning", {
  cl <- local_cluster(2)
  pids <- clusterPids(cl)
  # R's code for sorting does not look for interrupts; neither does a shell that ignores them.
  deaf <- function() {
    suppressWarnings(tryCatch(
      repeat system("trap '' INT; sleep 30", ignore.stdout = TRUE),
      interrupt = function(e) repeat NULL
    ))
    repeat tryCatch(Sys.sleep(60), interrupt = function(e) NULL)
  }
  interrupted(clusterCall(cl[1], deaf), 0.5)
  expect_equal(clusterCall(cl[2], identity, 1), list(1))
  expect_warning(
    got <- clusterCall(cl, Sys.getpid),
    class = "rustcluster_worker_replaced"
  )
  expect_equal(unlist(got), as.integer(clusterPids(cl)))
  expect_false(clusterPids(cl)[[1L]] == pids[[1L]])
  expect_equal(clusterPids(cl)[[2L]], pids[[2L]])
  expect_gone(pids[[1L]])
})

test_that("Ctrl-C at a terminal does not reach agents or workers", {
  skip_unless_proc()
  cl <- local_cluster(2)
  session <- function(pid) {
    as.integer(strsplit(sub(".*\\) ", "", readLines(sprintf("/proc/%d/stat", pid))), " ")[[1L]][4L])
  }
  own <- session(Sys.getpid())
  for (pid in c(agentPids(cl), clusterPids(cl))) expect_false(session(pid) == own)
})
