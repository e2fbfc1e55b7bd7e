# Workers and hosts are lost, and tasks take too long: answers are those of a run without faults, and
# what cannot be answered is told.

skip_on_cran()
watch_processes()
sendCall <- parallel:::sendCall
recvResult <- parallel:::recvResult
recvOneResult <- parallel:::recvOneResult

# The call gives the same on PSOCK, without faults, and with as many losses as there are traps.
# `before` brings the workers to a state of which no try may lose anything.
expect_unharmed <- function(expr, before = NULL, traps = 1, cl = cluster_pair(3)$rust, ...) {
  expr <- strip_srcref(substitute(expr))
  before <- strip_srcref(substitute(before))
  values <- list(..., spring = spring)
  run <- function(cl, trap) {
    env <- list2env(c(list(cl = cl, trap = trap), values), parent = globalenv())
    eval(before, env)
    with_losses(eval(expr, env))
  }
  want <- run(cluster_pair(3)$psock[seq_along(cl)], character())
  whole <- run(cl, character())
  what <- paste(deparse(expr), collapse = "\n")
  expect(identical(whole$value, want$value), paste("without a fault", what, "is not PSOCK's"))
  got <- run(cl, trap(traps))
  expect(identical(got$value, want$value), paste0(
    what, " differs\nPSOCK:\n", describe_outcome(want$value), "\nwith a loss:\n",
    describe_outcome(got$value)
  ))
  expect(
    length(got$losses) == traps,
    paste(what, "told of", length(got$losses), "losses, and not of", traps)
  )
  note_processes(cl)
  # The workers left behind are those that are known, and as they were.
  expect_equal(unlist(clusterCall(cl, Sys.getpid)), as.integer(clusterPids(cl)))
  expect_false(anyNA(clusterPids(cl)))
  invisible(got$value)
}

streams <- quote(clusterSetRNGStream(cl, 42))

# Draws before its end and after it, so that a second try has to begin where the first one did.
draws <- global(function(i, spring, trap, at = 5) {
  first <- stats::rnorm(2)
  if (i %in% at) spring(trap)
  list(i, first, stats::runif(1), sample.int(1000L, 2L))
})

test_that("a worker that is killed during a verb changes neither results nor random numbers", {
  for (n in 1:2) {
    expect_unharmed(
      list(
        clusterApply(cl, 1:10, draws, spring, trap, 5:6),
        clusterCall(cl, stats::rnorm, 1)
      ),
      clusterSetRNGStream(cl, 42), traps = n, draws = draws
    )
  }
  expect_unharmed(
    list(
      parLapply(cl, 1:10, draws, spring, trap), parLapply(cl, 1:4, draws, spring, trap),
      clusterEvalQ(cl, .Random.seed)
    ),
    clusterSetRNGStream(cl, 1), draws = draws
  )
  expect_unharmed(
    parSapply(cl, 1:10, function(i, draws, ...) unlist(draws(i, ...)), draws, spring, trap),
    clusterSetRNGStream(cl, 2), draws = draws
  )
  expect_unharmed(
    clusterMap(cl, function(i, j, draws, ...) c(draws(i, ...), j), 1:7, 7:1, MoreArgs = list(draws, spring, trap)),
    clusterSetRNGStream(cl, 3), draws = draws
  )
  expect_unharmed(
    list(clusterCall(cl, draws, 5, spring, trap), clusterCall(cl, draws, 1, spring, trap)),
    clusterSetRNGStream(cl, 4), draws = draws
  )
  # Which worker gets which task is chance, what it draws from is not.
  expect_unharmed(
    clusterApplyLB(cl, 1:20, function(i, draws, ...) {
      set.seed(i)
      draws(i, ...)
    }, draws, spring, trap),
    draws = draws
  )
  expect_unharmed(
    parLapplyLB(cl, 1:20, function(i, draws, ...) {
      set.seed(i)
      draws(i, ...)
    }, draws, spring, trap),
    draws = draws
  )
})

test_that("random number generators of all kinds continue after a worker failure", {
  for (kind in c("Mersenne-Twister", "Wichmann-Hill", "Marsaglia-Multicarry", "Knuth-TAOCP-2002")) {
    expect_unharmed(
      list(
        clusterApply(cl, 1:10, draws, spring, trap), clusterCall(cl, stats::runif, 2),
        clusterEvalQ(cl, RNGkind())
      ),
      {
        clusterCall(cl, function(kind) {
          RNGkind(kind, "Ahrens-Dieter")
          set.seed(1)
        }, kind)
        # Not by a call that lasts: the state is that which the last task of whatever kind has left.
        clusterApply(cl, seq_along(cl), function(i) {
          set.seed(i)
          stats::runif(7)
        })
      },
      draws = draws, kind = kind
    )
  }
  # As is the choice of the default.
  clusterCall(cluster_pair(3)$rust, RNGkind, "default", "default", "default")
  clusterCall(cluster_pair(3)$psock, RNGkind, "default", "default", "default")
})

test_that("a replacement has exports, calls, options and packages in the order in which they were set", {
  for (start in c("fork", "spawn")) {
    cl <- local_cluster(3, start_method = start)
    expect_unharmed(
      list(
        clusterApply(cl, 1:6, function(i, spring, trap) {
          if (i == 2) spring(trap)
          list(
            x, y, shared$at, f(10), getOption("digits"), "package:splines" %in% search(),
            dim(bs(1:10, df = 4)), environmentName(topenv())
          )
        }, spring, trap),
        clusterEvalQ(cl, sort(ls())), clusterCall(cl, function() count)
      ),
      {
        x <- 1
        shared <- new.env()
        shared$at <- "export"
        clusterExport(cl, c("x", "shared"), environment())
        # What the head does with it later was not exported.
        shared$at <- "later"
        clusterEvalQ(cl, y <- x + 1)
        x <- 2
        clusterExport(cl, "x", environment())
        clusterEvalQ(cl, {
          library(splines)
          options(digits = 5)
          count <- 0
          f <- function(k) k * y
        })
        for (i in 1:3) clusterCall(cl, function() count <<- count + 1)
        clusterExport(cl, "spring", environment())
        clusterEvalQ(cl, rm(spring))
      },
      cl = cl
    )
    stopCluster(cl)
  }
})

test_that("each replacement has the state of its own worker, set through any part of the cluster", {
  cl <- local_cluster(3)
  for (i in 1:3) {
    mine <- letters[[i]]
    clusterExport(cl[i], "mine", environment())
  }
  clusterEvalQ(cl[2:3], both <- paste0(mine, mine))
  clusterCall(rev(cl)[1], function() last <<- TRUE)
  clusterSetRNGStream(cl[c(3, 1)], 5)
  told <- global(function(i, spring, trap) {
    spring(trap)
    c(mine, get0("both", ifnotfound = ""), exists("last"))
  })
  want <- list(c("a", "", FALSE), c("b", "bb", FALSE), c("c", "cc", TRUE))
  for (part in list(2:3, 3:1, 1, c(3, 1))) {
    got <- with_losses(clusterApply(cl[part], part, told, spring, trap(length(part))))
    expect_identical(got$value, want[part])
    expect_gte(length(got$losses), 1)
  }
  sendCall(cl[[2]], told, list(1, spring, trap()))
  got <- with_losses(recvResult(cl[[2]]))
  expect_identical(got$value, want[[2]])
  expect_length(got$losses, 1)
  note_processes(cl)
})

# In place of R.utils::withTimeout().
setting_time_limit <- function(expr, seconds = 0.3) {
  on.exit(setTimeLimit(), add = TRUE, after = FALSE)
  setTimeLimit(elapsed = seconds, transient = TRUE)
  expr
}

test_that("interrupted calls and calls that killed their worker are not in the set-up log", {
  cl <- local_cluster(2)
  here <- environment()
  x <- 1
  clusterExport(cl, "x", here)
  expect_error(setting_time_limit(clusterCall(cl, function() {
    x <<- "half"
    Sys.sleep(60)
  })), "time limit")
  x <- 3
  # An error is the end of a call like any other: what it did before lasts.
  expect_error(clusterCall(cl, function() {
    z <<- 1
    stop("so")
  }), "so")
  bad <- caught(with_losses(clusterCall(cl[1], function() {
    x <<- "lost"
    tools::pskill(Sys.getpid(), tools::SIGKILL)
    Sys.sleep(60)
  })))
  expect_rust_error(bad, "task_failed")
  expect_identical(clusterEvalQ(cl[1], c(x, z)), list(c(1, 1)))
  note_processes(cl)
})

test_that("several, or all, workers may be killed at the same time, busy or idle", {
  cl <- local_cluster(3)
  x <- 7
  clusterExport(cl, "x", environment())
  clusterSetRNGStream(cl, 3)
  want <- parallel::clusterApply(cl, 1:3, function(i) stats::rnorm(2))
  for (victims in list(1:2, 1:3)) {
    clusterSetRNGStream(cl, 3)
    # All of them wait for the last, and are killed by it.
    mark <- tempfile()
    killed <- clusterPids(cl[victims])
    got <- with_losses(clusterApply(cl, 1:3, function(i, pids, mark) {
      drawn <- stats::rnorm(2)
      if (!file.exists(mark)) {
        if (i == 3) {
          file.create(mark)
          tools::pskill(pids, tools::SIGKILL)
        }
        if (i <= length(pids)) Sys.sleep(60)
      }
      stopifnot(x == 7)
      drawn
    }, killed, mark))
    expect_identical(got$value, want)
    expect_length(got$losses, length(victims))
    # Nobody works. Another worker may have had the task of one that is not back yet.
    expect_true(wait_until(function() !any(clusterPids(cl) %in% c(NA, killed)), 30))
    note_processes(cl)
    tools::pskill(clusterPids(cl)[victims], tools::SIGKILL)
    got <- with_losses(clusterEvalQ(cl, x))
    expect_identical(got$value, list(7, 7, 7))
    expect_length(got$losses, length(victims))
    note_processes(cl)
    expect_silent(clusterEvalQ(cl, x))
  }
})

test_that("a worker failure between calls is reported at the next call", {
  cl <- local_cluster(2)
  x <- 7
  clusterExport(cl, "x", environment())
  pid <- clusterPids(cl)[[1L]]
  tools::pskill(pid, tools::SIGKILL)
  expect_gone(pid)
  # The agent, and the hub's thread, see to it meanwhile.
  expect_true(wait_until(function() !clusterPids(cl)[[1L]] %in% c(NA, pid)))
  got <- with_losses(clusterEvalQ(cl, x))
  expect_identical(got$value, list(7, 7))
  expect_length(got$losses, 1)
  loss <- got$losses[[1L]]
  expect_s3_class(loss, c("rustcluster_worker_lost", "rustcluster_warning", "warning"), exact = FALSE)
  expect_identical(loss[c("rank", "pid", "signal", "host", "replaced")], list(
    rank = 1L, pid = pid, signal = 9L, host = "localhost", replaced = TRUE
  ))
  expect_gt(loss$memory_available, 0)
  expect_silent(clusterEvalQ(cl, x))
  note_processes(cl)
})

test_that("a worker is killed while 50 MB are sent to it or from it", {
  cl <- local_cluster(2)
  x <- numeric(50e6 / 8) + 1
  # It reads nothing more, and the head is stuck in the middle of sending.
  for (verb in 1:2) {
    pid <- clusterPids(cl)[[1L]]
    tools::pskill(pid, tools::SIGSTOP)
    system(sprintf("(sleep 0.4; kill -KILL %d) &", pid))
    got <- with_losses(switch(verb,
      clusterApply(cl, 1:2, function(i, x) sum(x) + i, x),
      {
        clusterExport(cl, "x", environment())
        clusterApply(cl, 1:2, function(i) sum(x) + i)
      }
    ))
    expect_identical(got$value, list(sum(x) + 1, sum(x) + 2))
    expect_length(got$losses, 1)
  }
  # The head takes no more of an answer than it has room for, so that it is still being sent: with a
  # limit, answers do not come whole in shared memory.
  cl <- local_cluster(2, buffer_limit = 2^20, memory_limit = 2^31)
  clusterExport(cl, "x", environment())
  mark <- tempfile()
  sendCall(cl[[2]], global(function(mark) {
    file.create(mark)
    x
  }), list(mark))
  sendCall(cl[[2]], global(function() "next"), list())
  pid <- clusterPids(cl)[[2L]]
  expect_true(wait_until(function() file.exists(mark) && proc_state(pid) == "S"))
  tools::pskill(pid, tools::SIGKILL)
  got <- with_losses(recvResult(cl[[2]]))
  expect_identical(got$value, x)
  expect_length(got$losses, 1)
  expect_identical(recvResult(cl[[2]]), "next")
  note_processes(cl)
})

test_that("sendCall() and recvResult(): each node answers in order, also after a worker failure", {
  cl <- local_cluster(2)
  clusterEvalQ(cl, count <- 100)
  traps <- trap(4)
  for (k in 1:4) for (i in 1:2) {
    sendCall(cl[[i]], function(k, i, spring, trap) {
      if ((k + i) %% 2) spring(trap)
      c(k, i, count)
    }, list(k, i, spring, traps[[k]]), tag = k)
  }
  got <- with_losses(lapply(1:4, function(k) lapply(cl, recvResult)))
  expect_identical(got$value, lapply(1:4, function(k) list(c(k, 1, 100), c(k, 2, 100))))
  expect_length(got$losses, 4)
  for (i in 1:2) sendCall(cl[[i]], function(i, spring, trap) {
    spring(trap)
    i
  }, list(i * 10, spring, trap()), tag = letters[[i]])
  got <- with_losses(list(recvOneResult(cl), recvOneResult(cl)))
  answers <- got$value[order(vapply(got$value, `[[`, 0L, "node"))]
  expect_identical(answers, list(
    list(value = 10, node = 1L, tag = "a"), list(value = 20, node = 2L, tag = "b")
  ))
  note_processes(cl)
})

test_that("a session that sends many large tasks goes on when a worker is killed", {
  cl <- local_cluster(2)
  bytes <- as.raw(rep(1:8, 4e5))
  traps <- trap(4)
  for (k in 1:4) for (i in 1:2) {
    sendCall(cl[[i]], function(k, bytes, spring, trap) {
      if (k == 1) spring(trap)
      length(bytes) + k
    }, list(k, bytes, spring, traps[[i]]))
  }
  got <- with_losses(lapply(1:4, function(k) lapply(cl, recvResult)))
  expect_identical(got$value, lapply(1:4, function(k) rep(list(length(bytes) + k), 2)))
  expect_length(got$losses, 2)
})

test_that("a replacement that is killed while it is restored is replaced", {
  cl <- local_cluster(2)
  x <- 5
  clusterExport(cl, "x", environment())
  # Done again: the first time with no trap there, the second with one.
  files <- tempfile(rep("trap-", 2))
  clusterCall(cl[1], spring, files)
  clusterEvalQ(cl[1], y <- x + 1)
  file.create(files)
  tools::pskill(clusterPids(cl)[[1L]], tools::SIGKILL)
  expect_identical(with_losses(clusterEvalQ(cl[1], c(x, y)))$value, list(c(5, 6)))
  expect_false(any(file.exists(files)))
  # Every time: there is an end to that, and others go on.
  deadly <- tempfile()
  clusterCall(cl[1], function(file) if (file.exists(file)) quit("no", 3), deadly)
  clusterSetRNGStream(cl, 7)
  seeds <- clusterEvalQ(cl, .Random.seed)
  file.create(deadly)
  before <- clusterPids(cl)[[1L]]
  tools::pskill(before, tools::SIGKILL)
  error <- caught(with_losses(clusterEvalQ(cl[1], x)))
  expect_rust_error(error, "worker_lost")
  expect_false(error$replaced)
  expect_identical(error$retry, 1)
  expect_match(conditionMessage(error), "exited with status 3 while it was being restored, 3 times in a row")
  expect_match(conditionMessage(error), "the restart is retried in 1 s")
  expect_identical(clusterEvalQ(cl[2], x), list(5))
  expect_identical(is.na(clusterPids(cl)), c(TRUE, FALSE))
  expect_identical(clusterEvalQ(clusterAlive(cl), x), list(5))
  expect_identical(clusterStatus(cl, memory = FALSE)$state, c("lost", "idle"))
  # It is as it was when what was wrong is over, also if that takes some tries.
  Sys.sleep(1.5)
  expect_identical(is.na(clusterPids(cl)), c(TRUE, FALSE))
  unlink(deadly)
  expect_true(wait_until(function() !anyNA(clusterPids(cl))))
  expect_false(clusterPids(cl)[[1L]] == before)
  note_processes(cl)
  expect_message(got <- clusterEvalQ(cl, x), "is back", class = "rustcluster_worker_back")
  expect_identical(got, list(5, 5))
  expect_silent(expect_identical(clusterEvalQ(cl[1], y), list(6)))
  expect_identical(clusterEvalQ(cl, .Random.seed), seeds)
  # All starts anew: it is replaced at once.
  tools::pskill(clusterPids(cl)[[1L]], tools::SIGKILL)
  expect_identical(with_losses(clusterEvalQ(cl[1], c(x, y)))$value, list(c(5, 6)))
})

test_that("the random numbers of a restored worker continue after its reassigned tasks", {
  run <- function(disturbed) {
    cl <- local_cluster(2)
    deadly <- tempfile()
    once <- trap()
    clusterCall(cl[1], function(file) if (file.exists(file)) quit("no", 3), deadly)
    clusterSetRNGStream(cl, 7)
    before <- clusterApply(cl, 1:4, function(i) runif(1))
    if (disturbed) file.create(deadly) else unlink(once)
    got <- with_losses(clusterApply(cl, 1:6, function(i, spring, trap) {
      drawn <- runif(1)
      if (i == 1) spring(trap)
      drawn
    }, spring, once))$value
    if (disturbed) {
      expect_identical(is.na(clusterPids(cl)), c(TRUE, FALSE))
      unlink(deadly)
      expect_true(wait_until(function() !anyNA(clusterPids(cl))))
      note_processes(cl)
      expect_message(clusterEvalQ(cl[2], 1), class = "rustcluster_worker_back")
    }
    list(before, got, clusterApply(cl, 1:4, function(i) runif(1)), clusterEvalQ(cl, .Random.seed))
  }
  expect_identical(run(TRUE), run(FALSE))
})

test_that("a restore without progress is ended after setup_timeout and retried", {
  cl <- local_cluster(3, setup_timeout = 3)
  x <- 5
  clusterExport(cl, "x", environment())
  hangs <- tempfile()
  clusterCall(cl[1], function(file) while (file.exists(file)) Sys.sleep(0.05), hangs)
  clusterSetRNGStream(cl, 7)
  streams <- clusterApply(cl, 1:3, function(i) runif(2))
  file.create(hangs)
  tools::pskill(clusterPids(cl)[[1L]], tools::SIGKILL)
  took <- system.time(error <- caught(with_losses(clusterEvalQ(cl[1], x))))[["elapsed"]]
  expect_rust_error(error, "worker_lost")
  expect_match(conditionMessage(error), "repeated to restore it made no progress for 3[.0-9]* s")
  expect_match(conditionMessage(error), "setup_timeout")
  expect_lt(took, 3 + 5 + slack())
  # Others go on, and take over what can be taken over.
  expect_identical(clusterEvalQ(cl[-1], x), list(5, 5))
  unlink(hangs)
  expect_true(wait_until(function() !anyNA(clusterPids(cl))))
  note_processes(cl)
  expect_message(got <- clusterApply(cl, 1:3, function(i) runif(1)), class = "rustcluster_worker_back")
  clusterSetRNGStream(cl, 7)
  expect_identical(clusterApply(cl, 1:3, function(i) runif(2)), streams)
  # A verb whose worker cannot be restored in the middle of it goes on with the others.
  file.create(hangs)
  losses <- with_losses(clusterApply(cl, 1:6, function(i, spring, trap) {
    if (i == 4) spring(trap)
    i
  }, spring, trap()))
  expect_identical(losses$value, as.list(1:6))
  unlink(hangs)
  expect_true(wait_until(function() !anyNA(clusterPids(cl))))
  note_processes(cl)
})

test_that("an answer that cannot be read is an error of its task only", {
  cl <- local_cluster(3)
  # A function of a package that is missing here: reading it warns, which is made an error.
  odd <- global(function(i, bad) {
    if (!i %in% bad) return(i)
    namespace <- new.env(parent = baseenv())
    info <- new.env(parent = baseenv())
    info$spec <- c(name = "nosuchpackage", version = "1.0")
    assign(".__NAMESPACE__.", info, namespace)
    list(namespace)
  })
  old <- options(warn = 2)
  Sys.setenv("_R_NO_REPORT_MISSING_NAMESPACES_" = "false")
  on.exit({
    options(old)
    Sys.unsetenv("_R_NO_REPORT_MISSING_NAMESPACES_")
  }, add = TRUE, after = FALSE)
  verbs <- alist(
    clusterApply(cl, 1:6, odd, c(2, 5)), clusterApplyLB(cl, 1:6, odd, c(2, 5)),
    parallel::clusterApply(cl, 1:6, odd, c(2, 5)), parallel::clusterApplyLB(cl, 1:6, odd, c(2, 5)),
    clusterMap(cl, odd, 1:6, MoreArgs = list(c(2, 5)))
  )
  for (verb in verbs) {
    error <- caught(eval(verb))
    expect_rust_error(error, "protocol")
    expect_match(conditionMessage(error), "could not be read.*nosuchpackage", info = deparse(verb))
    expect_identical(error$results, list(1L, NULL, 3L, 4L, NULL, 6L), info = deparse(verb))
    expect_length(error$failures, 2)
    expect_s3_class(error$parent, "simpleError")
    expect_identical(clusterCall(cl, identity, 7), list(7, 7, 7))
  }
  # Of short ones that are sent together, too.
  error <- caught(clusterApplyLB(cl, 1:200, odd, 150))
  expect_identical(error$results[-150], as.list(1:200)[-150])
  got <- clusterLapply(cl, 1:9, odd, 4, .errors = "return")
  expect_identical(got[-4], as.list(1:9)[-4])
  expect_identical(vapply(got, inherits, NA, "try-error"), 1:9 == 4)
  expect_rust_error(caught(clusterCall(cl, odd, 1, 1)), "protocol")
  expect_rust_error(caught(parallel::clusterCall(cl, odd, 1, 1)), "protocol")
  for (i in 1:3) sendCall(cl[[i]], odd, list(i, 2), tag = i)
  got <- lapply(1:3, function(i) recvOneResult(cl))
  got <- got[order(vapply(got, `[[`, 0L, "node"))]
  expect_identical(lapply(got, `[[`, "tag"), list(1L, 2L, 3L))
  expect_identical(lapply(got[-2], `[[`, "value"), list(1L, 3L))
  expect_s3_class(got[[2]]$value, "rustcluster_failure")
  expect_identical(clusterApply(cl, 1:3, odd, 0), list(1L, 2L, 3L))
})

test_that("a task that kills its worker on all attempts fails, with the results of all others", {
  cl <- local_cluster(3)
  x <- 5
  clusterExport(cl, "x", environment())
  pids <- clusterPids(cl)
  got <- with_losses(caught(clusterApply(cl, 1:9, poison, 5)))
  error <- got$value
  expect_rust_error(error, "task_failed")
  expect_length(got$losses, 2)
  expect_identical(error$index, 5L)
  expect_identical(error$results, replace(as.list(1:9 * 10), 5, list(NULL)))
  expect_length(error$failures, 1)
  expect_length(error$losses, 3)
  for (loss in error$losses) {
    expect_s3_class(loss, "rustcluster_worker_lost")
    expect_identical(loss[c("rank", "host", "signal")], list(rank = 2L, host = "localhost", signal = 9L))
    expect_identical(loss$stderr, "task 5: 100%s\n")
    expect_gt(loss$memory_available, 0)
  }
  expect_identical(error$losses[[1]]$pid, pids[[2]])
  expect_length(unique(vapply(error$losses, `[[`, 0L, "pid")), 3)
  expect_match(conditionMessage(error), "task 5 failed: the worker died on all 3 attempts", fixed = TRUE)
  expect_match(conditionMessage(error), "SIGKILL")
  # Here all workers have their state, and those that lost nothing are the same.
  expect_identical(clusterEvalQ(cl, x), list(5, 5, 5))
  expect_identical(clusterPids(cl)[-2], pids[-2])

  for (verb in list(clusterApplyLB, parLapplyLB)) {
    error <- with_losses(caught(verb(cl, 1:9, poison, 9)))$value
    expect_rust_error(error, "task_failed")
    expect_identical(sum(lengths(error$losses) > 0), 3L)
  }
  # The part of parLapply() that held it.
  error <- with_losses(caught(parLapply(cl, 1:9, poison, 5)))$value
  expect_rust_error(error, "task_failed")
  expect_identical(error$index, 2L)
  expect_identical(error$results, list(list(10, 20, 30), NULL, list(70, 80, 90)))
  expect_rust_error(with_losses(caught(parSapply(cl, 1:9, poison, 5)))$value, "task_failed")
  expect_rust_error(with_losses(caught(clusterMap(cl, poison, 1:9, 5)))$value, "task_failed")
  expect_identical(clusterApply(cl, 1:9, poison, 0), as.list(1:9 * 10))
  note_processes(cl)
})

test_that("a cluster on one host survives tasks that all kill their workers", {
  cl <- local_cluster(4)
  x <- 5
  clusterExport(cl, "x", environment())
  error <- with_losses(caught(clusterApply(cl, 1:8, poison, 1:8)))$value
  expect_rust_error(error, "task_failed")
  expect_length(error$failures, 8)
  expect_identical(error$results, vector("list", 8))
  expect_identical(clusterEvalQ(cl, x), rep(list(5), 4))
  note_processes(cl)
})

test_that("several tasks that kill their workers, together with errors of R code", {
  cl <- local_cluster(3)
  error <- with_losses(caught(clusterApply(cl, 1:9, poison, c(2, 6))))$value
  expect_rust_error(error, "task_failed")
  expect_identical(error$index, 2L)
  expect_identical(vapply(error$failures, `[[`, 0L, "index"), c(2L, 6L))
  expect_identical(error$results, replace(as.list(1:9 * 10), c(2, 6), list(NULL)))
  expect_match(conditionMessage(error), "and 1 other failed")
  mixed <- global(function(i, poison) if (i == 4) stop("of R's") else poison(i, 2))
  error <- with_losses(caught(clusterApply(cl, 1:6, mixed, poison)))$value
  expect_rust_error(error, "task_failed")
  expect_s3_class(error$results[[4]], "try-error")
  expect_identical(error$results[-c(2, 4)], list(10, 30, 50, 60))
  expect_match(conditionMessage(error), "and 1 other failed)\nThe results of the others are in", fixed = TRUE)
  # parallel raises the first.
  mixed <- global(function(i, poison) if (i == 1) stop("of R's") else poison(i, 2))
  error <- with_losses(caught(clusterApply(cl, 1:6, mixed, poison)))$value
  expect_match(conditionMessage(error), "2 nodes produced errors; first error: of R's", fixed = TRUE)
  # By hand it is a value that try() would give.
  sendCall(cl[[2]], poison, list(2, 2))
  sendCall(cl[[2]], poison, list(3, 2))
  value <- with_losses(recvResult(cl[[2]]))$value
  expect_s3_class(value, "try-error")
  expect_s3_class(attr(value, "condition"), "rustcluster_task_failed")
  expect_identical(recvResult(cl[[2]]), 30)
  note_processes(cl)
})

test_that("messages for retries are not held longer than needed", {
  cl <- local_cluster(2)
  held <- 3
  for (i in 1:3) local({
    e <- new.env()
    reg.finalizer(e, function(e) held <<- held - 1)
    sendCall(cl[[1]], function(e) Sys.sleep(60), list(e))
  })
  # The next call cancels what was sent by hand and not received.
  expect_identical(clusterCall(cl, identity, 1), list(1, 1))
  invisible(gc())
  expect_identical(held, 0)
})

test_that("retries = 0 and 1", {
  cl <- local_cluster(2, retries = 0)
  x <- 5
  clusterExport(cl, "x", environment())
  got <- with_losses(caught(clusterApply(cl, 1:4, poison, 3)))
  expect_rust_error(got$value, "worker_lost")
  expect_length(got$losses, 0)
  expect_identical(got$value$rank, 1L)
  expect_identical(clusterEvalQ(cl, x), list(5, 5))
  note_processes(cl)
  cl <- local_cluster(2, retries = 1)
  got <- with_losses(caught(clusterApply(cl, 1:4, poison, 3)))
  expect_rust_error(got$value, "task_failed")
  expect_length(got$value$losses, 2)
  expect_length(got$losses, 1)
  note_processes(cl)
})

test_that("a handler may jump out of any warning of a worker failure", {
  cl <- local_cluster(2)
  x <- 5
  clusterExport(cl, "x", environment())
  right <- function() {
    expect_identical(with_losses(clusterApply(cl, 1:5, function(i) c(x, i)))$value, lapply(1:5, function(i) c(5, i)))
    expect_identical(clusterApplyLB(cl, 1:5, sqrt), lapply(1:5, sqrt))
    expect_length(unique(note_processes(cl)), 2)
  }
  verbs <- list(
    quote(clusterApply(cl, 1:6, function(i, spring, trap) spring(trap), spring, trap())),
    quote(clusterApplyLB(cl, 1:6, function(i, spring, trap) spring(trap), spring, trap())),
    quote(clusterCall(cl, spring, trap())),
    quote({
      tools::pskill(clusterPids(cl)[[1L]], tools::SIGKILL)
      clusterCall(cl, Sys.sleep, 1)
    })
  )
  for (verb in verbs) {
    old <- options(warn = 2)
    expect_error(eval(verb), "converted from warning", info = deparse(verb))
    options(old)
    right()
    expect_s3_class(tryCatch(eval(verb), warning = identity), "rustcluster_worker_lost")
    right()
    expect_error(
      withCallingHandlers(eval(verb), warning = function(w) stop("of the handler's")),
      "of the handler's"
    )
    right()
  }
  # A handler that uses the cluster itself, in the middle of the call.
  inner <- NULL
  got <- withCallingHandlers(
    clusterApply(cl, 1:6, function(i, spring, trap) {
      spring(trap)
      i
    }, spring, trap()),
    rustcluster_worker_lost = function(w) {
      inner <<- caught(clusterCall(cl, identity, "inner"))
      invokeRestart("muffleWarning")
    }
  )
  expect_rust_error(inner, "busy")
  expect_identical(got, as.list(1:6))
  right()
})

test_that("workers beyond setup_log_limit are not replaced, with a warning", {
  cl <- local_cluster(3, setup_log_limit = 1e6)
  here <- environment()
  small <- 1
  clusterExport(cl, "small", here)
  big <- floor(runif(2e5) * 1e6)
  expect_warning(clusterExport(cl, "big", here), class = "rustcluster_state_not_kept")
  expect_silent(clusterExport(cl, "big", here))
  expect_silent(clusterEvalQ(cl, small))
  tools::pskill(clusterPids(cl)[[2]], tools::SIGKILL)
  error <- caught(clusterEvalQ(cl, sum(big)))
  expect_rust_error(error, "worker_lost")
  expect_false(error$replaced)
  expect_identical(error$rank, 2L)
  expect_match(conditionMessage(error), "it is not replaced")
  expect_rust_error(caught(clusterEvalQ(cl[2], 1)), "worker_lost")
  expect_identical(clusterEvalQ(cl[-2], sum(big)), list(sum(big), sum(big)))
  expect_identical(clusterPids(cl)[[2]], NA_integer_)
  # In the middle of a verb, its task goes to another, which has the same state.
  got <- with_losses(clusterApply(cl[-2], 1:4, function(i, spring, trap) {
    if (i == 2) spring(trap)
    i + small
  }, spring, trap()))
  expect_identical(got$value, list(2, 3, 4, 5))
  expect_length(got$losses, 1)
  expect_false(got$losses[[1]]$replaced)
  expect_identical(sum(is.na(clusterPids(cl))), 2L)
  expect_identical(clusterEvalQ(clusterAlive(cl), small), list(1))
})

test_that("tasks that exceed `timeout` are ended, whatever they do", {
  cl <- local_cluster(3, timeout = 1)
  x <- 5
  clusterExport(cl, "x", environment())
  pids <- clusterPids(cl)
  late <- global(function(i, bad, how) {
    if (i %in% bad) {
      repeat switch(how, R = sum(1:10), sleep = Sys.sleep(60), deaf = {
        tryCatch(Sys.sleep(60), interrupt = function(e) NULL)
      })
    }
    i + x
  })
  for (how in c("R", "sleep", "deaf")) {
    error <- caught(clusterApply(cl, 1:7, late, 5, how))
    expect_rust_error(error, "timeout")
    expect_identical(error[c("index", "rank", "host")], list(index = 5L, rank = 2L, host = "localhost"))
    expect_identical(error$results, replace(as.list(1:7 + 5), 5, list(NULL)))
    expect_match(conditionMessage(error), "task 5 exceeded its time limit of 1 s")
    # A worker that does not heed the interrupt is killed after a while, of which the next call tells.
    warning <- tryCatch(expect_identical(clusterEvalQ(cl, x), list(5, 5, 5)), warning = identity)
    if (how == "deaf") {
      expect_s3_class(warning, "rustcluster_worker_replaced")
      expect_identical(warning[c("rank", "host", "pid")], list(rank = 2L, host = "localhost", pid = pids[[2]]))
      expect_match(conditionMessage(warning), paste0("pid ", pids[[2]], ") was restarted: its task had exceeded its time limit"), fixed = TRUE)
      expect_identical(clusterEvalQ(cl, x), list(5, 5, 5))
    } else {
      expect_identical(warning, list(5, 5, 5))
    }
    expect_identical(clusterPids(cl) == pids, c(TRUE, how != "deaf", TRUE))
  }
  error <- caught(clusterApplyLB(cl, 1:7, late, c(2, 7), "sleep"))
  expect_rust_error(error, "timeout")
  expect_identical(vapply(error$failures, `[[`, 0L, "index"), c(2L, 7L))
  expect_identical(error$results[-c(2, 7)], as.list(c(1, 3, 4, 5, 6) + 5))
  # Not tried again: it has had its time.
  expect_rust_error(caught(clusterCall(cl[1], Sys.sleep, 60)), "timeout")
  expect_identical(clusterEvalQ(cl, x), list(5, 5, 5))
  note_processes(cl)
})

# Two agents on this machine, with two workers each.
two_hosts <- function(..., .frame = parent.frame()) {
  local_cluster(list(
    list(host = "localhost", ncore = 2), list(host = "localhost", ncore = 2, threads = 2)
  ), ..., .frame = .frame)
}

test_that("the tasks of a lost host are reassigned with their random numbers", {
  agent <- function(cl) proc_parent(clusterPids(cl)[[3]])
  work <- global(function(i, kill, mark) {
    drawn <- stats::rnorm(2)
    if (!is.na(kill) && i == 7 && !file.exists(mark)) {
      file.create(mark)
      tools::pskill(kill, tools::SIGKILL)
      Sys.sleep(60)
    }
    list(i, drawn, x)
  })
  run <- function(cl, kill = NA) {
    x <- "exported"
    clusterExport(cl, "x", environment())
    clusterSetRNGStream(cl, 11)
    clusterApply(cl, 1:14, work, kill, tempfile())
  }
  want <- run(two_hosts())
  cl <- two_hosts()
  expect_length(agentPids(cl), 2)
  told <- list()
  got <- withCallingHandlers(run(cl, agent(cl)), warning = function(w) {
    told <<- c(told, list(w))
    invokeRestart("muffleWarning")
  })
  expect_identical(got, want)
  expect_length(told, 1)
  expect_s3_class(told[[1]], "rustcluster_host_failed")
  # Whoever addresses its nodes now is told so, and the others are as they were.
  error <- caught(clusterEvalQ(cl, x))
  expect_rust_error(error, "host_failed")
  expect_match(conditionMessage(error), "clusterAlive(cl)", fixed = TRUE)
  expect_rust_error(caught(clusterApply(cl, 1:4, identity)), "host_failed")
  expect_rust_error(caught(clusterApply(cl[3], 1:4, identity)), "host_failed")
  rest <- clusterAlive(cl)
  expect_length(rest, 2)
  expect_identical(clusterEvalQ(rest, x), list("exported", "exported"))
  expect_identical(parSapply(rest, 1:9, sqrt), sqrt(1:9))
  stopCluster(cl)

  for (verb in list(clusterApplyLB, parLapply, parLapplyLB)) {
    cl <- two_hosts()
    x <- "exported"
    clusterExport(cl, "x", environment())
    got <- suppressWarnings(verb(cl, 1:14, function(i, kill, mark) {
      if (i == 12 && !file.exists(mark)) {
        file.create(mark)
        tools::pskill(kill, tools::SIGKILL)
        Sys.sleep(1)
      }
      list(i, x)
    }, agent(cl), tempfile()), classes = "rustcluster_host_failed")
    expect_identical(got, lapply(1:14, function(i) list(i, "exported")))
    stopCluster(cl)
  }
})

test_that("clusterCall() is bound to its nodes and is not reassigned", {
  cl <- two_hosts()
  agents <- agentPids(cl)
  system(sprintf("(sleep 0.3; kill -KILL %d) &", agents[[2]]))
  expect_rust_error(caught(clusterCall(cl, Sys.sleep, 60)), "host_failed")
  expect_identical(clusterCall(cl[1:2], identity, 1), list(1, 1))
  # By hand neither: only the job that saw the loss goes on.
  expect_rust_error(caught(sendCall(cl[[3]], identity, list(1))), "host_failed")
})

test_that("a host whose workers fail repeatedly is left out", {
  # One worker on the second, so that each loss is told before there is another.
  cl <- local_cluster(
    list(list(host = "localhost", ncore = 2), list(host = "localhost", ncore = 1, threads = 2)),
    retries = 1000
  )
  there <- clusterPids(cl)[[3L]]
  bad <- global(function(i, host) {
    if (Sys.getenv("OMP_NUM_THREADS") == host) quit("no", 9)
    i * 10
  })
  expect_warning(
    got <- with_losses(clusterApply(cl, 1:8, bad, "2")), "left out", class = "rustcluster_host_failed"
  )
  expect_identical(got$value, as.list(1:8 * 10))
  # With the tenth of them the host is lost, which is told in its stead.
  expect_length(got$losses, 9L)
  expect_gone(there)
  expect_rust_error(caught(clusterCall(cl, identity, 1)), "host_failed")
  expect_identical(clusterCall(clusterAlive(cl), identity, 1), list(1, 1))
})

test_that("a worker failure is reported again if an interrupt came before its task was retried", {
  cl <- local_cluster(2)
  original <- get("failureCondition", asNamespace("rustcluster"))
  calls <- 0
  local_function("failureCondition", function(...) {
    calls <<- calls + 1
    if (calls == 1) stop("interrupted")
    original(...)
  })
  work <- global(function(trap, spring, value) {
    spring(trap)
    value
  })
  sendCall(cl[[1]], work, list(trap(), spring, 5))
  sendCall(cl[[1]], identity, list(6))
  sendCall(cl[[2]], work, list(trap(), spring, 7))
  expect_identical(conditionMessage(caught(recvResult(cl[[1]]))), "interrupted")
  got <- with_losses(list(recvResult(cl[[1]]), recvResult(cl[[1]]), recvResult(cl[[2]])))
  expect_identical(got$value, list(5, 6, 7))
  expect_length(got$losses, 2)
  calls <- 0
  sendCall(cl[[2]], work, list(trap(), spring, 8))
  expect_identical(conditionMessage(caught(recvOneResult(cl))), "interrupted")
  got <- with_losses(recvOneResult(cl))
  expect_identical(got$value$value, 8)
  expect_length(got$losses, 1)
  note_processes(cl)
})

test_that("a task that finished in time does not time out while the head is stopped", {
  skip_unless_proc()
  script <- tempfile(fileext = ".R")
  writeLines(c(
    "library(parallel)", "library(rustcluster)",
    "cl <- makeRustCluster(2, timeout = 2, outfile = '', progress = FALSE)",
    "line <- strrep('x', 1e6)",
    "print_much <- function(line) {",
    "  for (i in 1:10) cat(line, '\\n')",
    "  1",
    "}",
    "parallel:::sendCall(cl[[1]], print_much, list(line))",
    "parallel:::sendCall(cl[[2]], function() {",
    "  Sys.sleep(1)",
    "  2",
    "}, list())",
    "system(sprintf('(sleep 4; kill -CONT %d) &', Sys.getpid()))",
    "tools::pskill(Sys.getpid(), tools::SIGSTOP)",
    "got <- parallel:::recvResult(cl[[2]])",
    "cat('\\ngot', if (is.numeric(got)) got else class(got), '\\n')",
    "stopCluster(cl)"
  ), script)
  out <- system2(file.path(R.home("bin"), "Rscript"), script, stdout = TRUE, stderr = TRUE)
  expect_identical(grep("^got", out, value = TRUE), "got 2 ")
})

test_that("tasks of a lost node are reassigned only to nodes of the same call", {
  agents <- lapply(1:3, function(i) list(host = "localhost", ncore = 2, threads = i))
  cl <- local_cluster(agents)
  value <- "old"
  clusterExport(cl, "value", environment())
  value <- "new"
  clusterExport(cl[1:4], "value", environment())
  tries <- tempfile()
  lost <- agentPids(cl)[[2L]]
  # Those of the third host have nothing to do, and would be the first choice.
  got <- suppressWarnings(clusterApply(cl[1:4], 1:12, function(i, tries, lost) {
    if (i == 3 && !file.exists(tries)) {
      file.create(tries)
      tools::pskill(lost, tools::SIGKILL)
      Sys.sleep(60)
    }
    value
  }, tries, lost))
  expect_equal(got, rep(list("new"), 12))
})

test_that("a set-up log larger than the send window is restored", {
  cl <- local_cluster(2)
  large <- numeric(2e6)
  clusterExport(cl, "large", environment())
  clusterSetRNGStream(cl, 1)
  first <- clusterCall(cl, stats::runif, 1)
  agent <- agentPids(cl)
  pid <- clusterPids(cl)[[1L]]
  for (i in 1:3) {
    tools::pskill(clusterPids(cl)[[1L]], tools::SIGKILL)
    expect_true(wait_until(function() clusterPids(cl)[[1L]] != pid))
    pid <- clusterPids(cl)[[1L]]
    expect_warning(got <- clusterCall(cl, function() sum(large)), class = "rustcluster_worker_lost")
    expect_equal(got, list(0, 0))
  }
  expect_equal(agentPids(cl), agent)
  second <- clusterCall(cl, stats::runif, 1)
  clusterSetRNGStream(cl, 1)
  expect_identical(list(first, second), list(clusterCall(cl, stats::runif, 1), clusterCall(cl, stats::runif, 1)))
})

test_that("the error contains the output of the task whose worker died", {
  cl <- local_cluster(1, retries = 0)
  last <- function(i) {
    cat("last words\n")
    tools::pskill(Sys.getpid(), tools::SIGKILL)
    Sys.sleep(60)
  }
  for (verb in list(clusterApply, parallel::clusterApply)) {
    verb(cl, 1:3, function(i) cat("of an earlier task\n"))
    expect_identical(caught(verb(cl, 1, last))$stderr, "last words\n")
  }
})

test_that("the error of a crash contains the R calls", {
  cl <- local_cluster(1, retries = 0)
  crash <- function(i) {
    inner <- function() tools::pskill(Sys.getpid(), 11L)
    inner()
    Sys.sleep(60)
  }
  text <- conditionMessage(caught(clusterLapply(cl, 1, crash)))
  expect_match(text, "it is being replaced, and element 1 is not retried\nlast output of the worker:\n   *** caught segfault ***", fixed = TRUE)
  expect_match(text, "inner()", fixed = TRUE)
  expect_no_match(text, "worker_serve|tryCatch")
})

test_that("no process is left", {
  stop_cluster_pairs()
  expect_no_leftovers()
})
