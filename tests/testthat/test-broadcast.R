# The same message to many workers: it crosses to each host once and reaches them through shared memory.

skip_on_cran()
skip_unless_proc()
watch_processes()

agent_of <- function(cl) proc_parent(clusterPids(cl)[[1L]])

# In the global environment of each worker, and of no test.
digest_of <- eval(quote(function() list(sum(big), length(big), big[c(1, 77, length(big))])), globalenv())
# With the source of this file, the function itself would be large, and a blob.
digest_of <- utils::removeSource(digest_of)

digest_here <- function(big) list(sum(big), length(big), big[c(1, 77, length(big))])

# Checks that the agent has `n` blobs. After the call, the head reports to it which blobs it may release.
expect_held <- function(agent, n) {
  expect_true(wait_until(function() shared_memory(agent)[["open", 1]] == n, 5), info = paste(n, "held"))
}

test_that("a blob of 50 MB arrives at 8 workers unchanged, and its memory is freed", {
  cl <- local_cluster(8)
  clusterCall(cl, identity, 1)
  pids <- clusterPids(cl)
  agent <- agent_of(cl)
  files <- c(open_fds(agent), vapply(pids, open_fds, 0L))
  big <- rnorm(6.5e6)
  want <- rep(list(digest_here(big)), 8)
  for (i in 1:3) {
    expect_identical(broadcast_export(cl, "big", big), rep(list(NULL), 8))
    # Held open by the agent alone, in case a worker has to be replaced.
    expect_true(only_mapped(cl, 1L))
    expect_held(agent, 1L)
  }
  expect_identical(clusterCall(cl, digest_of), want)
  expect_equal(c(open_fds(agent) - 1L, vapply(pids, open_fds, 0L)), files)
  # What lasts for no longer than its call is not held at all.
  expect_identical(unlist(broadcast(cl, function(x) sum(x), big)), rep(sum(big), 8))
  expect_held(agent, 1L)
  expect_equal(shared_memory(agent)[["mapped", 1]], 0L)
  # Nor what another value has taken the place of.
  cl2 <- local_cluster(2)
  broadcast_export(cl2, "big", big)
  expect_held(agent_of(cl2), 1L)
  broadcast_export(cl2, "big", 1)
  expect_held(agent_of(cl2), 0L)
  expect_identical(clusterEvalQ(cl2, big), list(1, 1))
})

test_that("values of all kinds and sizes are the same as with PSOCK", {
  pair <- cluster_pair(3)
  values <- list(
    NULL, 1L, letters, "\u00fc", 1:10, 1:1e6, as.list(1:20000), mtcars, digest_of,
    new.env(), quote(a + b), raw(64 * 1024), raw(64 * 1024 - 100), numeric(8192), runif(1e5),
    list(a = 1, b = list(2, "x")), factor(c("u", "v")), Sys.Date()
  )
  look <- eval(quote(function(x) list(class(x), length(x), if (!is.environment(x)) x)), globalenv())
  for (value in values) {
    want <- clusterCall(pair$psock, look, value)
    expect_equal(broadcast(pair$rust, look, value), want)
    expect_equal(broadcast(pair$rust[2:1], look, value), want[1:2])
    expect_equal(broadcast(pair$rust[1], look, value), want[1])
  }
})

test_that("errors and warnings in calls with a blob are the same as in other calls", {
  cl <- local_cluster(3)
  big <- runif(1e5)
  expect_error(broadcast(cl, function(x) stop("no ", length(x)), big), "3 nodes produced errors; first error: no 100000")
  expect_identical(clusterCall(cl, identity, 2), list(2, 2, 2))
  expect_identical(broadcast(cl, function(x) x[[3]], big), rep(list(big[[3]]), 3))
})

test_that("a replacement gets the blob, and a retried task uses it", {
  cl <- local_cluster(3)
  big <- rnorm(1e6)
  broadcast_export(cl, "big", big)
  broadcast_export(cl, "small", 1:3 + 0.5)
  agent <- agent_of(cl)
  files <- open_fds(agent)
  want <- list(digest_here(big), c(1.5, 2.5, 3.5))
  for (rank in c(2, 2, 1)) {
    pid <- clusterPids(cl)[[rank]]
    tools::pskill(pid, tools::SIGKILL)
    expect_true(wait_until(function() !clusterPids(cl)[[rank]] %in% c(NA, pid)))
    note_processes(cl)
    look <- function(digest_of) list(digest_of(), small)
    look <- utils::removeSource(look)
    environment(look) <- globalenv()
    expect_identical(suppressWarnings(clusterCall(cl, look, digest_of)), rep(list(want), 3))
    expect_true(only_mapped(cl, 1L))
  }
  expect_equal(open_fds(agent), files)
  # One ends in the middle of such a task.
  trap <- tempfile()
  file.create(trap)
  die <- function(x, trap) {
    if (file.exists(trap) && suppressWarnings(file.remove(trap))) {
      tools::pskill(Sys.getpid(), tools::SIGKILL)
      Sys.sleep(60)
    }
    sum(x)
  }
  environment(die) <- globalenv()
  losses <- 0
  got <- withCallingHandlers(broadcast(cl, die, big, trap), rustcluster_worker_lost = function(w) {
    losses <<- losses + 1
    invokeRestart("muffleWarning")
  })
  expect_identical(got, rep(list(sum(big)), 3))
  expect_equal(losses, 1)
  note_processes(cl)
  expect_identical(clusterCall(cl, digest_of), rep(list(digest_here(big)), 3))
  expect_equal(open_fds(agent), files)
})

test_that("an interrupt at any moment leaves no shared memory", {
  cl <- local_cluster(4)
  big <- runif(1e7)
  clusterCall(cl, identity, 1)
  agent <- agent_of(cl)
  slow <- function(x) Sys.sleep(5)
  environment(slow) <- globalenv()
  files <- open_fds(agent)
  for (after in c(0.005, 0.02, 0.05, 0.1, 0.5)) {
    pid <- Sys.getpid()
    got <- tryCatch({
      system(sprintf("(sleep %.3f; kill -INT %d)", 0.1 + after, pid), wait = FALSE)
      Sys.sleep(0.1)
      repeat broadcast(cl, slow, big)
    }, interrupt = function(e) "interrupted")
    expect_identical(got, "interrupted")
    expect_identical(clusterCall(cl, sum, 1, 2), rep(list(3), 4))
    expect_true(only_mapped(cl, 0L))
    expect_true(wait_until(function() all(shared_memory(agent) == 0L)))
  }
  note_processes(cl)
  expect_equal(open_fds(agent), files)
  expect_identical(broadcast(cl, length, big), rep(list(1e7L), 4))
})

test_that("a worker cannot change shared memory of others", {
  cl <- local_cluster(2)
  path <- broadcast(cl, function(x) {
    maps <- grep("memfd:rustcluster", readLines("/proc/self/maps"), value = TRUE)
    maps
  }, runif(1e5))
  for (maps in path) {
    # That of the message, and a private one of its vectors.
    expect_length(maps, 2L)
    expect_match(maps, "^[0-9a-f]+-[0-9a-f]+ r[w-]-p ")
  }
})

test_that("reconnected hosts get blobs of set-up calls", {
  hosts <- lapply(1:2, function(threads) list(host = "localhost", ncore = 2L, threads = threads))
  cl <- local_cluster(hosts, reconnect = TRUE)
  big <- runif(1e6)
  broadcast_export(cl, "big", big)
  many <- list(a = matrix(big[1:1e4], 100), b = data.frame(x = big, y = seq_along(big) * 2L), c = "d")
  broadcast_export(cl, "many", many)
  agents <- vapply(c(1L, 3L), function(rank) proc_parent(clusterPids(cl)[[rank]]), 0L)
  tools::pskill(agents[[1L]], tools::SIGKILL)
  wait_until(function() anyNA(clusterPids(cl)))
  expect_true(wait_until(function() !anyNA(clusterPids(cl))))
  note_processes(cl)
  got <- suppressMessages(suppressWarnings(clusterCall(cl, digest_of)))
  expect_identical(got, rep(list(digest_here(big)), 4))
  expect_identical(clusterEvalQ(cl, many), rep(list(many), 4))
  # And it can be sent what others have.
  expect_identical(broadcast(cl, function(x) sum(x), big), rep(list(sum(big)), 4))
})

test_that("spawned workers get blobs", {
  cl <- local_cluster(2, start_method = "spawn")
  big <- runif(1e6)
  broadcast_export(cl, "big", big)
  expect_identical(clusterCall(cl, digest_of), rep(list(digest_here(big)), 2))
})

test_that("the head does not hold blobs that it sends", {
  cl <- local_cluster(8)
  clusterCall(cl, identity, 1)
  big <- runif(1e7)
  expect_lt(growth_here(broadcast_export(cl, "big", big)), 16)
})

test_that("hosts of another byte order get blobs in their byte order", {
  hosts <- lapply(1:2, function(threads) list(host = "localhost", ncore = 2L, threads = threads))
  local_function("otherByteOrder", function(handle) c(FALSE, TRUE))
  cl <- local_cluster(hosts)
  big <- runif(1e5)
  first <- eval(quote(function(x) list(sum(x), environmentName(environment(sys.function())))), globalenv())
  want <- list(sum(big), "R_GlobalEnv")
  expect_identical(broadcast(cl, first, big), rep(list(want), 4))
  expect_identical(broadcast(cl[c(1, 3)], first, big), rep(list(want), 2))
  expect_identical(broadcast(cl[c(3, 1, 2)], first, big), rep(list(want), 3))
  expect_identical(broadcast(cl, sum, 1, 2), rep(list(3), 4))
})

test_that("shared memory does not count for memory_limit", {
  skip_unless_memory_limits()
  cl <- local_cluster(2, memory_limit = 300e6)
  big <- numeric(2e7)
  expect_identical(broadcast(cl, length, big), list(2e7L, 2e7L))
  pids <- clusterPids(cl)
  expect_error(broadcast(cl, length, numeric(5e7)), "2 nodes produced errors; first error: cannot allocate vector")
  expect_identical(clusterPids(cl), pids)
  # What is not used any more is not in the way.
  for (i in 1:6) expect_identical(broadcast(cl, length, big), list(2e7L, 2e7L))
  make <- eval(quote(function(n) length(numeric(n))), globalenv())
  expect_identical(clusterCall(cl, make, 2e7), list(2e7L, 2e7L))
  expect_true(wait_until(function() all(shared_memory(pids) == 0L)))
})

test_that("a stopped node is an error and leaves no shared memory", {
  cl <- local_cluster(3)
  agent <- agent_of(cl)
  stopCluster(cl[2])
  expect_rust_error(caught(broadcast(cl, length, runif(1e5))), "stopped")
  expect_identical(clusterCall(cl[c(1, 3)], sum, 1, 2), list(3, 3))
  expect_true(wait_until(function() all(shared_memory(agent) == 0L)))
})

# What a worker says about x: whether it is mapped, and a copy through R's serialization.
look_at <- eval(quote(function() {
  path <- tempfile()
  saveRDS(x, path)
  on.exit(unlink(path), add = TRUE, after = FALSE)
  list(x, readRDS(path), identical(readRDS(path), x), identical(unserialize(serialize(x, NULL)), x))
}), globalenv())

test_that("large vectors are mapped, and are the same as with PSOCK", {
  cl <- local_cluster(2)
  real <- rnorm(2e4)
  real[7] <- NA
  values <- list(
    real, sample(2e4L), rep(c(TRUE, NA), 1e4), complex(real = real, imaginary = 1),
    as.raw(rep(0:255, 300)), matrix(real, 100), array(1:24000 * 3L, c(20, 30, 40)),
    stats::setNames(real, paste0("n", seq_along(real))), factor(sample(letters, 2e4, TRUE)),
    data.frame(a = real, b = sample(2e4L), c = "x"), as.Date("2020-01-01") + real,
    list(1, list(real, "b", list(c = real))), structure(list(real), class = "some"),
    list(real, real), real[order(real)], ts(real, start = 2000, frequency = 12), -real
  )
  for (x in values) {
    broadcast_export(cl, "x", x)
    expect_true(any(shared_memory(clusterPids(cl)[[1L]])["mapped", ] > 0L))
    for (got in clusterCall(cl, look_at)) expect_identical(got, list(x, x, TRUE, TRUE))
  }
  # What is no vector of numbers, or has no data, is as it was.
  for (x in list(1:1e6, letters, rep(letters, 1e4), list(environment, quote(x)), numeric(100))) {
    broadcast_export(cl, "x", x)
    for (got in clusterCall(cl, look_at)) expect_equal(got, list(x, x, TRUE, TRUE))
  }
  expect_true(only_mapped(cl, 0L))
})

test_that("changes in place of mapped vectors are not visible to other workers", {
  cl <- local_cluster(3)
  x <- rnorm(1e5)
  broadcast_export(cl, "x", x)
  change <- eval(quote(function() {
    evalq({
      x[1] <- 0
      for (i in 2:10) x[[i]] <- i
    }, globalenv())
    x[1:11]
  }), globalenv())
  first <- eval(quote(function() x[1:11]), globalenv())
  shown <- c(0, 2:10, x[[11]])
  expect_identical(parallel::clusterCall(cl[1], change), list(shown))
  expect_identical(clusterCall(cl, first), list(shown, x[1:11], x[1:11]))
  # In a worker that takes the place of another, too.
  pid <- clusterPids(cl)[[2L]]
  tools::pskill(pid, tools::SIGKILL)
  expect_true(wait_until(function() !clusterPids(cl)[[2L]] %in% c(NA, pid)))
  note_processes(cl)
  got <- suppressWarnings(clusterCall(cl, first))
  expect_identical(got, list(shown, x[1:11], x[1:11]))
  broadcast_export(cl, "x", x)
  expect_identical(clusterCall(cl, first), rep(list(x[1:11]), 3))
  # Each task of a job has what is sent with all of them.
  spoil <- eval(quote(function(i, x) {
    was <- x[1:3]
    x[1:3] <- i
    list(was, x[1:4])
  }), globalenv())
  got <- parLapply(cl, 1:30, spoil, x)
  want <- lapply(1:30, function(i) list(x[1:3], c(i, i, i, x[[4L]])))
  expect_equal(got, want)
})

test_that("mapped vectors take memory once, which is freed with them", {
  cl <- local_cluster(8)
  x <- rnorm(6.25e6)
  clusterCall(cl, gc)
  pids <- clusterPids(cl)
  skip_unless_smaps(pids[[1L]])
  before <- memory_of(pids, "^Pss:")
  broadcast_export(cl, "x", x)
  read <- eval(quote(function() c(sum(x), mean(x), x[7], (x %*% x)[1])), globalenv())
  want <- c(sum(x), mean(x), x[7], (x %*% x)[1])
  expect_equal(clusterCall(cl, read), rep(list(want), 8))
  expect_lt(sum(memory_of(pids, "^Pss:") - before), 150)
  small <- x[1:20000]
  for (i in 1:50) broadcast_export(cl, "x", small)
  expect_true(only_mapped(cl, 1L))
  clusterEvalQ(cl, rm(x))
  expect_true(only_mapped(cl, 0L))
})

test_that("a finalizer may read a mapped vector", {
  cl <- local_cluster(2)
  pids <- clusterPids(cl)
  clusterEvalQ(cl, {
    early <- new.env()
    see <- function(e) seen <<- c(seen, tryCatch(sum(e$x), error = conditionMessage))
    seen <- NULL
    reg.finalizer(early, see)
    NULL
  })
  x <- runif(1e5)
  broadcast_export(cl, "x", x)
  clusterEvalQ(cl, {
    late <- new.env()
    reg.finalizer(late, see)
    early$x <- late$x <- x
    rm(early, late, x)
    NULL
  })
  broadcast(cl, gc)
  for (seen in clusterEvalQ(cl, seen)) {
    expect_length(seen, 2L)
    expect_true(as.character(sum(x)) %in% seen || sum(x) %in% seen)
  }
  expect_identical(clusterPids(cl), pids)
  # From R 4.6 on, what a finalizer has read takes one more collection.
  broadcast(cl, gc)
  expect_true(only_mapped(cl, 0L))
})

test_that("invalid bytes instead of a message are an error", {
  cl <- local_cluster(1)
  damaged <- eval(quote(function(bytes) {
    tryCatch(unserialize(bytes), error = conditionMessage)
  }), globalenv())
  # What a placeholder looks like: its class, an offset and a length.
  info <- as.pairlist(list(as.name("mapped_real"), as.name("rustcluster"), 14L))
  head <- serialize(NULL, NULL, xdr = FALSE)
  head <- head[seq_len(length(head) - 4L)]
  n <- length(head)
  part <- function(value) serialize(value, NULL, xdr = FALSE)[-seq_len(n)]
  bytes <- c(head, as.raw(c(238, 0, 0, 0)), part(info), part(c(0, 20000)), part(NULL))
  expect_identical(clusterCall(cl, damaged, bytes), list("a vector without its message"))
  expect_identical(clusterCall(cl, sum, 1), list(1))
})
