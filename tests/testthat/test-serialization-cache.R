# The same large message, sent node by node: each host gets it once, and each node what its message was when it
# was sent.

skip_on_cran()
skip_unless_proc()
watch_processes()

recv_all <- function(cl) lapply(cl, parallel:::recvResult)

# `fun` on each of these nodes, with these arguments, by hand.
send_each <- function(cl, fun, ...) for (i in seq_along(cl)) parallel:::sendCall(cl[[i]], fun, list(...))

by_hand <- function(cl, fun, ...) {
  send_each(cl, fun, ...)
  recv_all(cl)
}

agents_of <- function(cl) unique(vapply(clusterPids(cl), proc_parent, 0L))

# Whether x is mapped.
is_mapped <- global(function(x) any(grepl("mapped", utils::capture.output(.Internal(inspect(x))))))

# How many megabytes processes have in their own memory.
private <- function(pids) memory_of(pids, "^Private_Dirty:")

expect_nothing_held <- function(cl) {
  expect_true(wait_until(function() all(shared_memory(agents_of(cl)) == 0L)))
}

test_that("20 MB that are sent to 8 workers one by one are held once, and freed", {
  cl <- local_cluster(8)
  skip_unless_smaps(clusterPids(cl)[[1L]])
  big <- runif(2.5e6)
  keep <- global(function(x) {
    assign("kept", x, globalenv())
    sum(x)
  })
  clusterCall(cl, gc)
  ways <- list(
    by_hand = quote(by_hand(cl, keep, big)),
    again = quote(by_hand(cl, keep, big)),
    twice = quote(by_hand(cl[c(1:8, 1:8)], keep, big))
  )
  for (way in names(ways)) {
    before <- private(clusterPids(cl))
    grown <- growth_here(got <- eval(ways[[way]]))
    expect_lt(grown, 16, label = paste("growth of the head,", way))
    expect_true(all(unlist(got) == sum(big)))
    # The first to get it has a copy.
    expect_lt(sort(private(clusterPids(cl)) - before)[[7L]], 8, label = paste("growth of a worker,", way))
    # Held by nobody but the workers' own variables.
    expect_nothing_held(cl)
  }
  clusterEvalQ(cl, rm(kept))
  expect_true(only_mapped(cl, 0L))
})

test_that("an export by snow is held once, is restored, and is freed when it is replaced", {
  skip_if_not_installed("snow")
  cl <- local_cluster(4)
  skip_unless_smaps(clusterPids(cl)[[1L]])
  big <- runif(2.5e6)
  tell <- global(function() sum(big))
  clusterCall(cl, gc)
  before <- private(clusterPids(cl))
  expect_lt(growth_here(snow::clusterExport(cl, "big", environment())), 16)
  expect_lt(sort(private(clusterPids(cl)) - before)[[3L]], 8)
  # What lasts is held, in case a worker has to be replaced.
  expect_equal(shared_memory(agents_of(cl))[["open", 1]], 1L)
  tools::pskill(clusterPids(cl)[2:3], tools::SIGKILL)
  got <- with_losses(by_hand(cl, tell))
  note_processes(cl)
  expect_identical(got$value, rep(list(sum(big)), 4))
  big <- 1
  snow::clusterExport(cl, "big", environment())
  expect_identical(by_hand(cl, tell), rep(list(1), 4))
  expect_nothing_held(cl)
})

test_that("nodes of several clusters and duplicate nodes get a repeated message once for each host", {
  one <- local_cluster(2)
  two <- local_cluster(2)
  cl <- c(one[1], two[1], one[2], two[2])
  big <- runif(1e5)
  look <- global(function(x) list(sum(x), any(grepl("mapped", utils::capture.output(.Internal(inspect(x)))))))
  want <- rep(list(sum(big)), 4)
  verbs <- list(parallel::clusterCall, clusterCall)
  if (requireNamespace("snow", quietly = TRUE)) verbs <- c(verbs, list(snow::clusterCall))
  for (verb in verbs) {
    got <- verb(cl, look, big)
    expect_identical(lapply(got, `[[`, 1), want)
    expect_identical(vapply(got, `[[`, NA, 2), c(FALSE, FALSE, TRUE, TRUE))
    got <- verb(one[c(1, 2, 1, 2)], look, big)
    expect_identical(lapply(got, `[[`, 1), want)
    expect_identical(vapply(got, `[[`, NA, 2), c(FALSE, TRUE, TRUE, TRUE))
  }
  parallel::clusterExport(cl, "big", environment())
  expect_identical(clusterEvalQ(cl, sum(big)), want)
})

test_that("each node gets the value at the time of sending", {
  library <- compiled()
  pair <- list(rust = local_cluster(3), psock = parallel::makePSOCKcluster(3))
  on.exit(parallel::stopCluster(pair$psock), add = TRUE, after = FALSE)
  bump <- function(x) .Call("bump", x, PACKAGE = "helpers")
  first <- global(function(x) c(x[[1L]], length(x), x[[length(x)]]))
  of_env <- global(function(e) c(e$x[[1L]], length(e$x), e$y))
  # Which sends come after a change, in one row.
  changes <- list(
    c(0, 1, 1, 1, 1, 1, 1, 1), c(0, 0, 1, 0, 0, 1, 1, 0, 0, 0), c(0, 0, 0, 0, 1, 0, 1, 0, 1, 0), c(0, 1, 0, 0)
  )
  send_all <- function(cl, changes, change, fun, ...) {
    for (k in seq_along(changes)) {
      if (changes[[k]]) change()
      parallel:::sendCall(cl[[(k - 1L) %% 3L + 1L]], fun, list(...))
    }
    lapply(seq_along(changes), function(k) parallel:::recvResult(cl[[(k - 1L) %% 3L + 1L]]))
  }
  results <- lapply(pair, function(cl) {
    lapply(changes, function(changes) {
      x <- 1:20000 + 0
      e <- list2env(list(x = runif(1e4), y = 0, z = as.list(1:20000)), parent = globalenv())
      e$x[[1L]] <- 5
      # Of two values in turn: what was sent before the last one is not what is sent now.
      turning <- new.env(parent = globalenv())
      turning$x <- 1:20000 + 0
      turning$y <- 1
      constant <- as.function(c(alist(x = ), list(quote(x[[1L]] + 0))), globalenv())
      body(constant)[[3L]] <- as.numeric("20")
      counted <- as.function(list(quote({
        count <<- count + 1
        count
      })), list2env(list(count = 0, ballast = as.list(1:20000)), parent = globalenv()))
      list(
        send_all(cl, changes, function() bump(x), first, x),
        send_all(cl, changes, function() e$y <- e$y + 1, of_env, e),
        send_all(cl, changes, function() turning$y <- -turning$y, of_env, turning),
        send_all(cl, changes, function() bump(body(constant)[[3L]]), constant, 1:20000 + 0),
        send_all(cl, changes, function() environment(counted)$count <- environment(counted)$count + 10, counted)
      )
    })
  })
  expect_identical(results$rust, results$psock)
  expect_nothing_held(pair$rust)
})

test_that("messages that differ in anything are not deduplicated", {
  pair <- list(rust = local_cluster(2), psock = parallel::makePSOCKcluster(2))
  on.exit(parallel::stopCluster(pair$psock), add = TRUE, after = FALSE)
  x <- 1:20000 + 0
  y <- x
  y[[7L]] <- 0
  f <- global(function(...) list(names(list(...)), sum(...)))
  g <- global(function(...) list(nargs(), sum(...)))
  attr(g, "some") <- "thing"
  h <- g
  attr(h, "some") <- "other"
  told <- global(function(...) attr(sys.function(), "some"))
  told_too <- told
  attr(told, "some") <- 1
  attr(told_too, "some") <- 2
  calls <- list(
    list(f, list(x)), list(f, list(x)), list(f, list(y)), list(f, list(a = x)), list(f, list(b = x)),
    list(f, list(x, x)), list(g, list(x)), list(h, list(x)), list(g, list(x)), list(told, list(x)),
    list(told_too, list(x)), list(told, list(x)), list(f, list(x)), list(f, list(x), TRUE, "a tag"),
    list(f, list(x), TRUE, "another"), list(f, list(x), FALSE), list(f, list(x))
  )
  results <- lapply(pair, function(cl) {
    lapply(list(1, 1:2, 2:1), function(nodes) {
      nodes <- rep_len(nodes, length(calls))
      for (k in seq_along(calls)) do.call(parallel:::sendCall, c(list(cl[[nodes[[k]]]]), calls[[k]]))
      answers <- lapply(nodes, function(node) parallel:::recvData(cl[[node]]))
      lapply(answers, `[`, c("type", "value", "success", "tag"))
    })
  })
  expect_identical(results$rust, results$psock)
  # Functions that a loop makes anew are the same.
  code <- quote(function(x, is_mapped) is_mapped(x))
  for (i in c(1, 2, 1)) parallel:::sendCall(pair$rust[[i]], eval(code, globalenv()), list(x, is_mapped))
  got <- lapply(c(1, 2, 1), function(i) parallel:::recvResult(pair$rust[[i]]))
  expect_identical(got, list(FALSE, TRUE, TRUE))
  expect_nothing_held(pair$rust)
})

test_that("a task whose worker is killed is retried with its own message", {
  cl <- local_cluster(3)
  x <- runif(1e5)
  y <- runif(1e5)
  # Waits for the file, so that all tasks are sent before one ends.
  once <- global(function(x, spring, trap, go) {
    while (!file.exists(go)) Sys.sleep(0.01)
    spring(trap)
    c(sum(x), x[[77L]])
  })
  of <- global(function(x) c(sum(x), x[[77L]]))
  # While the agent has the blob, and after another one has replaced it.
  for (others in list(list(), list(y, y, y))) {
    go <- tempfile()
    traps <- trap(2)
    for (i in 1:3) parallel:::sendCall(cl[[i]], once, list(x, spring, traps, go))
    for (i in seq_along(others)) parallel:::sendCall(cl[[i]], sum, list(others[[i]]))
    file.create(go)
    got <- with_losses(lapply(1:3, function(i) parallel:::recvResult(cl[[i]])))
    expect_identical(got$value, rep(list(of(x)), 3))
    expect_gte(length(got$losses), 1)
    if (length(others)) expect_identical(recv_all(cl), rep(list(sum(y)), 3))
    note_processes(cl)
    expect_nothing_held(cl)
  }
  # Killed before it has come to the task.
  stopped <- clusterPids(cl)
  for (pid in stopped) tools::pskill(pid, tools::SIGSTOP)
  send_each(cl, of, x)
  tools::pskill(stopped[c(1, 3)], tools::SIGKILL)
  tools::pskill(stopped[[2L]], tools::SIGCONT)
  got <- with_losses(recv_all(cl))
  note_processes(cl)
  expect_identical(got$value, rep(list(of(x)), 3))
  expect_length(got$losses, 2)
  expect_nothing_held(cl)
})

test_that("each host gets a repeated message in its byte order, and again after reconnection", {
  hosts <- lapply(1:2, function(threads) list(host = "localhost", ncore = 2L, threads = threads))
  x <- runif(1e5)
  want <- rep(list(c(sum(x), x[[77L]])), 4)
  of <- global(function(x) c(sum(x), x[[77L]]))
  local({
    local_function("otherByteOrder", function(handle) c(FALSE, TRUE))
    cl <- local_cluster(hosts)
    for (order in list(1:4, c(1, 3, 2, 4), c(3, 1, 4, 2), c(3, 4, 1, 2))) {
      expect_identical(by_hand(cl[order], of, x), want)
      expect_nothing_held(cl)
    }
  })
  cl <- local_cluster(hosts, reconnect = TRUE)
  for (order in list(1:4, c(1, 3, 2, 4))) {
    expect_identical(by_hand(cl[order], of, x), want)
    expect_nothing_held(cl)
  }
  skip_if_not_installed("snow")
  snow::clusterExport(cl[c(1, 3, 2, 4)], "x", environment())
  tools::pskill(proc_parent(clusterPids(cl)[[3L]]), tools::SIGKILL)
  wait_until(function() anyNA(clusterPids(cl)))
  expect_true(wait_until(function() !anyNA(clusterPids(cl))))
  note_processes(cl)
  again <- global(function() c(sum(x), x[[77L]]))
  expect_identical(suppressMessages(suppressWarnings(clusterCall(cl, again))), want)
  # One that has lost what it had is sent it anew.
  send_each(cl[1:3], of, x)
  tools::pskill(proc_parent(clusterPids(cl)[[3L]]), tools::SIGKILL)
  wait_until(function() anyNA(clusterPids(cl)))
  expect_true(wait_until(function() !anyNA(clusterPids(cl))))
  note_processes(cl)
  suppressMessages(suppressWarnings({
    send_each(cl[4], of, x)
    got <- lapply(c(1, 2, 4), function(i) parallel:::recvResult(cl[[i]]))
    parallel::stopCluster(cl)
  }))
  expect_identical(got, want[1:3])
})

test_that("spawned workers and workers with a memory limit get repeated messages", {
  x <- numeric(1e6)
  clusters <- list(local_cluster(2, start_method = "spawn"))
  if (!inherits(try(skip_unless_memory_limits(), silent = TRUE), "skip")) {
    clusters <- c(clusters, list(local_cluster(2, memory_limit = 500e6)))
  }
  for (cl in clusters) {
    for (k in 1:20) expect_identical(by_hand(cl[c(1, 2, 1)], length, x), rep(list(1e6L), 3))
    expect_nothing_held(cl)
  }
})

test_that("after an interrupt at any moment the next call works, and no memory is held", {
  cl <- local_cluster(4)
  pids <- clusterPids(cl)
  x <- runif(2e6)
  want <- rep(list(sum(x)), 4)
  total <- global(function(x) sum(x))
  calls <- list(quote(by_hand(cl, total, x)))
  if (requireNamespace("snow", quietly = TRUE)) {
    calls <- c(calls, list(quote(snow::clusterApply(cl, list(x, x, x, x), total))))
  }
  for (call in calls) {
    for (after in seq(0.05, 0.4, length.out = if (long_tests()) 40 else 6)) {
      # No expectation in there: testthat's handlers of those are outside of the one for interrupts.
      expect_true(until_interrupted(stopifnot(identical(eval(call), want)), after))
      # A verb cancels what was sent by hand and not received.
      expect_identical(clusterApply(cl, 1:4, function(i, x) sum(x), x), want)
      expect_nothing_held(cl)
      expect_identical(by_hand(cl, total, x), want)
      expect_nothing_held(cl)
    }
  }
  expect_identical(clusterPids(cl), pids)
})

test_that("code that R runs during serialization may change values and fail, but not send", {
  library <- compiled()
  cl <- local_cluster(lapply(1:2, function(threads) list(host = "localhost", ncore = 2L, threads = threads)))
  clusterCall(cl, dyn.load, library)
  serialized_by <- function(fun) .Call("serialized_by", fun, PACKAGE = "helpers")
  span <- global(function(x) c(range(x), length(x)))
  # Of two values, at random each time: a node may get those alone that there were while its message was sent.
  set.seed(1)
  given <- list()
  x <- serialized_by(function() {
    value <- sample(c(7, 7, 7, 9), 1L)
    given[[now]] <<- c(given[[now]], value)
    rep(value, 20000)
  })
  for (k in 1:40) {
    nodes <- sample(4L, 12L, replace = TRUE)
    given <- rep(list(NULL), 12L)
    for (now in seq_along(nodes)) parallel:::sendCall(cl[[nodes[[now]]]], span, list(x))
    got <- lapply(nodes, function(i) parallel:::recvResult(cl[[i]]))
    right <- function(got, given) identical(got, c(got[[1L]], got[[1L]], 20000)) && got[[1L]] %in% given
    expect_true(all(mapply(right, got, given)))
  }
  # At any of the six times: for the first node, for the blob, to compare it for each of three nodes, and for
  # the other host.
  for (at in 1:6) {
    count <- 0
    x <- serialized_by(function() {
      count <<- count + 1
      if (count == at) stop("no more of it")
      rep(7, 20000)
    })
    nodes <- c(1, 2, 3, 4, 1)
    sent <- vapply(nodes, function(i) {
      tryCatch({
        parallel:::sendCall(cl[[i]], span, list(x))
        TRUE
      }, error = function(e) !grepl("no more of it", conditionMessage(e)))
    }, NA)
    expect_equal(sum(sent), 4)
    for (i in nodes[sent]) expect_identical(parallel:::recvResult(cl[[i]]), c(7, 7, 20000))
    expect_identical(by_hand(cl, span, x), rep(list(c(7, 7, 20000)), 4))
    expect_nothing_held(cl)
  }
  # A message within a message would end that.
  for (kind in list(quote(parallel:::sendCall(cl[[3]], identity, list(1))), quote(clusterCall(cl, identity, 1)),
                    quote(clusterApply(cl, 1:4, identity)), quote(clusterSubmit(cl, 1)$value()))) {
    inner <- list()
    x <- serialized_by(function() {
      inner <<- c(inner, list(caught(eval(kind))))
      rep(7, 20000)
    })
    by_hand <- function(nodes) {
      for (i in nodes) parallel:::sendCall(cl[[i]], span, list(x))
      lapply(nodes, function(i) parallel:::recvResult(cl[[i]]))
    }
    # Never while it is compared.
    expect_identical(by_hand(c(1, 2)), rep(list(c(7, 7, 20000)), 2))
    expect_length(inner, 2L)
    for (error in inner) expect_rust_error(error, "busy")
    expect_identical(clusterCall(cl, identity, 1), rep(list(1), 4))
  }
  expect_nothing_held(cl)
})

test_that("the head holds a message until all of its tasks are answered", {
  cl <- local_cluster(3)
  freed <- 0
  of <- global(function(e) length(e$x))
  send <- function(nodes) {
    e <- list2env(list(x = runif(1e5)), parent = globalenv())
    reg.finalizer(e, function(e) freed <<- freed + 1)
    send_each(cl[nodes], of, e)
  }
  collect <- function() for (i in 1:2) gc()
  send(1:3)
  collect()
  expect_equal(freed, 0)
  for (i in 1:3) expect_identical(parallel:::recvResult(cl[[i]]), 1e5L)
  collect()
  expect_equal(freed, 1)
  send(1:3)
  send(1:3)
  expect_identical(recv_all(cl), rep(list(1e5L), 3))
  collect()
  expect_equal(freed, 2)
  expect_identical(recv_all(cl), rep(list(1e5L), 3))
  collect()
  expect_equal(freed, 3)
  # Stopped before it has answered.
  send(1:2)
  parallel::stopCluster(cl[1:2])
  collect()
  expect_equal(freed, 4)
  expect_nothing_held(cl[3])
})

test_that("no process is left", {
  expect_no_leftovers()
})
