# An interrupt, or an error in the head, at any moment of a verb: it returns soon, and the next
# call is right.

watch_processes()

test_that("each kind of call returns within a second of an interrupt, and the next call works", {
  cl <- local_cluster(3)
  pids <- clusterPids(cl)
  local_big(2e7)
  for (call in list(
    quote(clusterCall(cl, Sys.sleep, 60)),
    quote(clusterCall(cl, function() repeat NULL)),
    quote(parLapply(cl, 1:9, function(i) Sys.sleep(60))),
    quote(clusterApplyLB(cl, 1:9, function(i) repeat NULL)),
    quote(for (i in 1:1000) clusterExport(cl, "big"))
  )) {
    expect_lt(interrupted(eval(call), 0.5), 1.5)
    expect_equal(clusterApply(cl, 1:3, function(i) i), as.list(1:3))
    expect_equal(clusterApplyLB(cl, 1:10, identity), as.list(1:10))
  }
  # All could be interrupted: they are still the same processes.
  expect_equal(clusterPids(cl), pids)
})

test_that("workers respond to interrupts, however they and their head were started", {
  skip_unless_proc()
  # Without env, SIGINT is ignored, as in what a script starts in the background: from 4.6 on, R leaves it
  # at that.
  for (prefix in c("exec env --default-signal=INT", "exec")) {
    child <- start_child({
      for (start in c("fork", "spawn")) {
        cl <- makeRustCluster(2, start_method = start)
        pids <- clusterPids(cl)
        # A time limit interrupts as Ctrl-C does, and reaches a head that ignores that.
        setTimeLimit(elapsed = 1, transient = TRUE)
        tryCatch(clusterCall(cl, function() repeat NULL), error = function(e) say(start, conditionMessage(e)))
        setTimeLimit()
        clusterCall(cl, identity, 1)
        say(start, if (identical(clusterPids(cl), pids)) "the same" else "others")
        stopCluster(cl)
      }
    }, prefix = prefix)
    expect_child_ends_well(child)
    expect_equal(child_lines(child), paste(
      rep(c("fork", "spawn"), each = 2), c("reached elapsed time limit", "the same")
    ))
  }
})

test_that("answers of an interrupted call are not used by the next call", {
  cl <- local_cluster(2)
  set.seed(1)
  wrong <- 0L
  for (i in seq_len(if (long_tests()) 300 else 30)) {
    felt <- until_interrupted(clusterApplyLB(cl, 1:20, function(x) "stale"), runif(1, 0, 0.03))
    if (!felt) wrong <- wrong + 1L
    expected <- as.list(i + 1:4)
    if (!identical(clusterApplyLB(cl, expected, identity), expected)) wrong <- wrong + 1L
  }
  expect_equal(wrong, 0L)
})

test_that("setTimeLimit() ends a call, and the next call works", {
  cl <- local_cluster(2)
  for (call in list(
    quote(clusterCall(cl, Sys.sleep, 60)), quote(parLapply(cl, 1:2, function(i) Sys.sleep(60))),
    quote(clusterApplyLB(cl, c(60, 60), Sys.sleep)), quote(clusterLapply(cl, c(60, 60), Sys.sleep)),
    quote(parallel::clusterApply(cl[c(1, 1)], c(60, 60), Sys.sleep)),
    # The limit ends the wait and not the call, for whose end the last call here waits.
    quote(clusterSubmit(cl, Sys.sleep(4))$value())
  )) {
    # Long enough to be exceeded while the verb waits, and not before: R's own error has the call.
    setTimeLimit(elapsed = 2, transient = TRUE)
    error <- caught(eval(call))
    setTimeLimit()
    expect_match(conditionMessage(error), "time limit", info = deparse(call))
    # Nor is it that of a function inside.
    expect_null(conditionCall(error), info = deparse(call))
  }
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
})

test_that("an error of the head during a verb leaves no task", {
  cl <- local_cluster(3)
  x <- structure(list(1, 2, 3), class = "trap")
  registerS3method("[[", "trap", function(x, i) if (i == 3) stop("trapped") else i, environment())
  expect_error(clusterApply(cl, x, function(i) "stale"), "trapped")
  expect_equal(clusterCall(cl, identity, "fresh"), as.list(rep("fresh", 3)))
})

test_that("a worker that does not respond to an interrupt is replaced, with a warning", {
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
    got <- clusterCall(cl, Sys.getpid), paste0("pid ", pids[[1L]], "\\) was restarted: its task was cancelled"),
    class = "rustcluster_worker_replaced"
  )
  expect_equal(unlist(got), as.integer(clusterPids(cl)))
  expect_false(clusterPids(cl)[[1L]] == pids[[1L]])
  expect_equal(clusterPids(cl)[[2L]], pids[[2L]])
  expect_gone(pids[[1L]])
})

test_that("the stop button of a front end, which sends no signal, ends any call", {
  compiled()
  cl <- local_cluster(3)
  pids <- clusterPids(cl)
  local_big(2e7)
  # Not C code: R itself would lose sight of it.
  for (call in list(
    quote(clusterCall(cl, Sys.sleep, 60)),
    quote(clusterApply(cl, 1:9, function(i) repeat NULL)),
    quote(clusterApplyLB(cl, 1:9, function(i) Sys.sleep(60))),
    quote(repeat clusterExport(cl, "big")),
    quote(repeat clusterCall(cl, function(n) numeric(n), 1e7))
  )) {
    began <- proc.time()[[3L]]
    got <- tryCatch(
      {
        .C("stop_button", 300000L)
        eval(call)
      },
      interrupt = function(e) "interrupted"
    )
    expect_identical(got, "interrupted")
    expect_lt(proc.time()[[3L]] - began, 10)
    expect_equal(clusterApply(cl, 1:3, function(i) i), as.list(1:3))
  }
  expect_equal(clusterPids(cl), pids)
})

test_that("a worker whose C code does not respond to interrupts is replaced with its state", {
  library <- compiled()
  cl <- local_cluster(2)
  pids <- clusterPids(cl)
  x <- "exported"
  clusterExport(cl, "x", environment())
  # It has to be loaded again where the worker is replaced.
  clusterCall(cl, dyn.load, library)
  clusterSetRNGStream(cl, 5)
  drawn <- clusterCall(cl, stats::runif, 1)
  clusterSetRNGStream(cl, 5)
  interrupted(clusterCall(cl[1], function() .C("deaf")), 0.5)
  expect_identical(clusterEvalQ(cl[2], x), list(x))
  expect_warning(
    got <- clusterEvalQ(cl, list(x, is.loaded("deaf"))),
    class = "rustcluster_worker_replaced"
  )
  expect_identical(got, rep(list(list(x, TRUE)), 2))
  expect_identical(clusterCall(cl, stats::runif, 1), drawn)
  expect_identical(clusterPids(cl) == pids, c(FALSE, TRUE))
  expect_gone(pids[[1L]])
})

test_that("setTimeLimit() ends each kind of call at any point", {
  cl <- local_cluster(3)
  pids <- clusterPids(cl)
  local_big(2e7)
  # As R.utils::withTimeout() does it.
  limited <- function(expr, seconds) {
    on.exit(setTimeLimit(), add = TRUE, after = FALSE)
    tryCatch(
      {
        setTimeLimit(elapsed = seconds, transient = TRUE)
        expr
      },
      error = function(e) if (grepl("time limit", conditionMessage(e))) "too late" else stop(e)
    )
  }
  for (call in list(
    quote(clusterCall(cl, function() repeat NULL)),
    quote(parLapply(cl, 1:9, function(i) Sys.sleep(60))),
    quote(clusterApplyLB(cl, 1:9, function(i) Sys.sleep(60))),
    quote(repeat clusterExport(cl, "big")),
    quote(repeat clusterCall(cl, function(n) numeric(n), 1e7))
  )) {
    expect_identical(limited(eval(call), 0.5), "too late")
    expect_equal(clusterApply(cl, 1:3, function(i) i), as.list(1:3))
  }
  expect_equal(clusterPids(cl), pids)
})

test_that("an error in a handler of a message or warning during a verb", {
  cl <- local_cluster(3)
  pids <- clusterPids(cl)
  for (tell in list(message, warning)) {
    x <- structure(as.list(1:9), class = "chatty")
    registerS3method("[[", "chatty", function(x, i) {
      if (i == 5) tell("at five")
      i
    }, environment())
    handler <- function(w) stop("of the handler's")
    for (verb in list(clusterApply, clusterApplyLB)) {
      expect_error(
        withCallingHandlers(
          verb(cl, x, function(i) "stale"), message = handler, warning = handler
        ),
        "of the handler's"
      )
      expect_equal(clusterApply(cl, 1:6, identity), as.list(1:6))
      # Without one, or where it goes on, it changes nothing.
      expect_identical(
        suppressMessages(suppressWarnings(verb(cl, x, function(i) i))), as.list(1:9)
      )
    }
  }
  expect_equal(clusterPids(cl), pids)
})

test_that("a call in the arguments of another, and after one whose end was interrupted", {
  cl <- local_cluster(2)
  got <- clusterCall(cl, identity, sum(unlist(clusterCall(cl, identity, 3))))
  expect_identical(got, list(6, 6))
  # What closes a call's job is R code: here it has been interrupted before it did anything.
  registerS3method("[[", "trap", function(x, i) if (i == 2) stop("trapped") else i, environment())
  left_open <- function() {
    local_function("closeJob", function(handle, job) NULL)
    clusterApply(cl, structure(list(1, 2), class = "trap"), function(i) "stale")
  }
  for (i in 1:2) {
    expect_error(left_open(), "trapped")
    expect_identical(clusterCall(cl, identity, "fresh"), list("fresh", "fresh"))
    expect_error(left_open(), "trapped")
    expect_identical(identity(clusterApplyLB(cl, 1:3, identity)), list(1L, 2L, 3L))
    expect_error(left_open(), "trapped")
    parallel:::sendCall(cl[[2]], identity, list("by hand"))
    expect_identical(parallel:::recvResult(cl[[2]]), "by hand")
  }
})

test_that("interrupts at random moments of all kinds of calls", {
  base <- "of the beginning"
  here <- environment()
  some <- numeric(3e5)
  # Each ends one worker, once.
  mortal <- eval(quote(function(i, traps) {
    for (file in traps) {
      if (i > 2 && file.exists(file) && suppressWarnings(file.remove(file))) {
        tools::pskill(Sys.getpid(), tools::SIGKILL)
      }
    }
    "stale"
  }), globalenv())
  stale <- eval(quote(function(...) "stale"), globalenv())
  calls <- list(
    quote(clusterApply(cl, 1:20, stale)),
    quote(clusterApplyLB(cl, 1:20, stale)),
    quote(parLapply(cl, 1:20, stale)),
    quote(parSapplyLB(cl, 1:20, stale)),
    quote(clusterMap(cl, stale, 1:7, 1:7)),
    quote(clusterCall(cl, stale)),
    quote(clusterCall(cl, Sys.sleep, 1)),
    quote(clusterEvalQ(cl, other <- "stale")),
    quote(clusterExport(cl, "some", here)),
    quote(clusterApply(cl, 1:6, function(i) numeric(3e5))),
    quote(clusterSetRNGStream(cl, 1)),
    quote(parLapply(cl, 1:6, mortal, traps)),
    quote(clusterApplyLB(cl, 1:9, mortal, traps)),
    quote(clusterCall(cl, mortal, 3, traps))
  )
  set.seed(as.integer(Sys.getpid()))
  rounds <- if (long_tests()) 1000 else 60
  for (round in seq_len(rounds)) {
    # What calls leave in the workers is done again in each that replaces one: it grows with them.
    if (round %% 100 == 1) {
      if (round > 1) stopCluster(cl)
      cl <- local_cluster(3)
      clusterExport(cl, "base", here)
    }
    call <- calls[[sample.int(length(calls), 1L)]]
    deadly <- "traps" %in% all.names(call)
    traps <- if (deadly) tempfile(rep("trap-", 2)) else character()
    file.create(traps)
    before <- clusterPids(cl)
    what <- paste0("round ", round, ": ", paste(deparse(call), collapse = " "))
    # Losses may be told in the middle or at the end, by the interrupted call or by the next.
    suppressWarnings(
      {
        felt <- until_interrupted(eval(call), stats::runif(1, 0, 0.05))
        got <- clusterCall(cl, function(unique) c(base, unique), what)
        more <- clusterApplyLB(cl, round + 1:4, identity)
      },
      classes = c("rustcluster_worker_lost", if (deadly) "rustcluster_worker_replaced")
    )
    right <- felt && identical(got, rep(list(c(base, what)), 3)) && identical(more, as.list(round + 1:4))
    if (!right) break
    if (!deadly && !identical(clusterPids(cl), before)) break
    right <- NA
  }
  expect(is.na(right), paste(what, "-", if (isFALSE(right)) "wrong answers" else "workers were replaced"))
  note_processes(cl)
})

test_that("the transfer of 1 GB to or from a worker is interrupted at once", {
  skip_unless_long()
  cl <- local_cluster(2)
  pids <- clusterPids(cl)
  local_big(1e9 / 8)
  for (after in c(0.1, 0.5, 1)) {
    interrupted(repeat clusterCall(cl, length, big), after)
    expect_identical(clusterCall(cl, identity, after), list(after, after))
    interrupted(repeat clusterCall(cl[1], function(n) numeric(n), 1e9 / 8), after)
    expect_identical(clusterCall(cl, identity, after), list(after, after))
  }
  expect_equal(clusterPids(cl), pids)
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

test_that("no process is left", {
  skip_unless_proc()
  expect_no_leftovers()
})
