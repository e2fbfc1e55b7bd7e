# Many workers on one machine. Long: RUSTCLUSTER_LONG_TESTS=1.

skip_on_cran()
skip_unless_long()
skip_unless_proc()
watch_processes()

# Proportional set size in bytes: what k processes share counts as 1/k in each.
pss <- function(pids) sum(memory_of(pids, "^Pss:")) * 1024^2

# Functions of the global environment, as a script's are: those of a test would take its frame along
# to every worker, the cluster included.
square <- eval(quote(function(i) i^2), globalenv())
filled <- eval(quote(function(i) {
  x <- numeric(32e6)
  x[] <- i
  x
}), globalenv())

expect_verbs <- function(cl) {
  n <- length(cl)
  seq <- seq_len(n)
  expect_length(unique(unlist(clusterCall(cl, Sys.getpid))), n)
  expect_equal(clusterEvalQ(cl, 1 + 1), rep(list(2), n))
  expect_equal(clusterApply(cl, seq, identity), as.list(seq))
  expect_equal(clusterApplyLB(cl, seq_len(2 * n), square), as.list(seq_len(2 * n)^2))
  expect_equal(clusterMap(cl, `+`, seq, 2), as.list(seq + 2))
  x <- 42
  clusterExport(cl, "x", environment())
  expect_equal(clusterEvalQ(cl, x), rep(list(42), n))
  expect_equal(parLapply(cl, seq, sqrt), lapply(seq, sqrt))
  expect_equal(parLapplyLB(cl, seq, sqrt), lapply(seq, sqrt))
  expect_equal(parSapply(cl, seq, sqrt), sqrt(seq))
  expect_equal(parSapplyLB(cl, seq, sqrt), sqrt(seq))
  m <- matrix(seq_len(2 * n), n)
  expect_equal(parApply(cl, m, 1, sum), apply(m, 1, sum))
  expect_equal(parRapply(cl, m, sum), apply(m, 1, sum))
  expect_equal(parCapply(cl, m, sum), apply(m, 2, sum))
  clusterSetRNGStream(cl, 7)
  drawn <- unlist(clusterCall(cl, stats::runif, 1))
  # The streams are parallel's own: each is the next of the one before.
  RNGkind("L\'Ecuyer-CMRG")
  set.seed(7)
  stream <- .Random.seed
  want <- numeric(n)
  for (i in seq) {
    assign(".Random.seed", stream, globalenv())
    want[[i]] <- stats::runif(1)
    stream <- nextRNGStream(stream)
  }
  RNGkind("default")
  expect_equal(drawn, want)
}

for (n in c(320L, 1000L)) {
  test_that(paste(n, "workers: every verb, in limited memory, and no process left"), {
    connections <- nrow(showConnections(all = TRUE))
    began <- proc.time()[["elapsed"]]
    cl <- local_cluster(n)
    clusterCall(cl, identity, 1L)
    expect_lt(proc.time()[["elapsed"]] - began, 20 + 10 * slack())
    pids <- c(clusterPids(cl), agentPids(cl))
    expect_length(unique(pids), n + 1L)
    expect_lt(pss(pids), n * 8e6)
    expect_verbs(cl)
    expect_lt(pss(pids), 8e9)
    expect_equal(nrow(showConnections(all = TRUE)), connections)
    stopCluster(cl)
    expect_gone(pids)
  })
}

test_that("results of 4 GB in total pass through a buffer of 512 MB", {
  cl <- local_cluster(16)
  peak <- function() {
    line <- grep("^VmHWM:", readLines("/proc/self/status"), value = TRUE)
    as.numeric(gsub("[^0-9]", "", line)) * 1024
  }
  before <- peak()
  # Each is dropped as it comes: what the head holds is what it buffers, and what R has not
  # collected yet.
  for (i in seq_along(cl)) {
    parallel:::sendCall(cl[[i]], filled, list(i))
  }
  Sys.sleep(5)
  seen <- integer()
  for (k in seq_along(cl)) {
    got <- parallel:::recvOneData(cl)
    expect_length(got$value$value, 32e6)
    expect_equal(range(got$value$value), rep(got$node, 2))
    seen <- c(seen, got$node)
    rm(got)
    gc()
  }
  expect_setequal(seen, seq_along(cl))
  expect_lt(peak() - before, 512e6 + 4 * 256e6)
})

test_that("2 GB are sent to one worker in limited memory, while others go on", {
  cl <- local_cluster(2)
  x <- numeric(256e6)
  x[length(x)] <- 1
  expect_equal(clusterCall(cl[1], function(x) c(length(x), x[length(x)]), x), list(c(256e6, 1)))
  expect_equal(clusterCall(cl, identity, 2), list(2, 2))
})

test_that("exporting 1 GB takes the head little memory of its own", {
  # Of a session of its own: this one's has been larger.
  child <- start_child({
    cl <- makeRustCluster(4, setup_log_limit = 2^33)
    status <- function(name) {
      line <- grep(paste0("^", name, ":"), readLines("/proc/self/status"), value = TRUE)
      1024 * as.numeric(gsub("[^0-9]", "", line))
    }
    x <- stats::runif(1e9 / 8)
    clusterCall(cl, identity, 1)
    for (verb in c("export", "call", "apply", "by hand")) {
      gc()
      # The peak is what is resident now.
      cat("5", file = "/proc/self/clear_refs")
      before <- status("VmRSS")
      switch(verb,
        export = clusterExport(cl, "x"),
        call = clusterCall(cl, length, x),
        apply = clusterApply(cl, 1:4, function(i, x) length(x), x),
        `by hand` = for (node in cl) parallel:::sendCall(node, length, list(x))
      )
      if (verb == "by hand") for (node in cl) stopifnot(parallel:::recvResult(node) == length(x))
      say(gsub(" ", "_", verb), (status("VmHWM") - before) / 2^20)
    }
    say("same", identical(unique(unlist(clusterEvalQ(cl, sum(x)))), sum(x)))
    stopCluster(cl)
  })
  expect_child_ends_well(child, 300)
  for (verb in c("export", "call", "apply", "by_hand")) {
    expect_lt(as.numeric(child_said(child, verb)), 64, label = paste("MB that", verb, "took"))
  }
  expect_identical(child_said(child, "same"), "TRUE")
})

test_that("no process is left", {
  expect_no_leftovers()
})
