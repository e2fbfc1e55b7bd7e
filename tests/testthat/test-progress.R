watch_processes()

# Runs R code in a session of its own. Returns its output, in which lines of progress are mixed with the rest.
output_of <- function(code, terminal = FALSE) {
  script <- tempfile(fileext = ".R")
  on.exit(unlink(script), add = TRUE, after = FALSE)
  setup <- c(
    "suppressPackageStartupMessages({library(parallel); library(rustcluster)})",
    "slow <- function(i) { Sys.sleep(0.1); i }",
    "cl <- makeRustCluster(2, progress = FALSE)"
  )
  writeLines(c(setup, code, "stopCluster(cl)", "cat('all done\\n')", "quit('no')"), script)
  r <- shQuote(file.path(R.home("bin"), "R"))
  out <- if (terminal) {
    command <- paste(r, "--vanilla --no-echo --interactive <", shQuote(script))
    system2("script", c("-qec", shQuote(command), "/dev/null"), stdout = TRUE, stderr = TRUE)
  } else {
    system2(file.path(R.home("bin"), "Rscript"), c("--vanilla", script), stdout = TRUE, stderr = TRUE)
  }
  text <- paste(out, collapse = "\n")
  expect_match(text, "all done", fixed = TRUE)
  text
}

# Evaluates the expression with a handler of progressr. Returns the steps that it has seen and their maximum.
steps_of <- function(expr, enabled = TRUE) {
  seen <- list(steps = 0, max = 0)
  handler <- progressr::make_progression_handler("counting", reporter = list(
    initiate = function(config, state, progression, ...) seen$max <<- config$max_steps,
    update = function(config, state, progression, ...) seen$steps <<- max(seen$steps, state$step)
  ), intrusiveness = 0, enable = enabled)
  progressr::with_progress(expr, handlers = handler, enable = if (enabled) TRUE, interval = 0, delay_stdout = FALSE)
  seen
}

local_progress <- function(value, ..., .frame = parent.frame()) {
  old <- options(rustcluster.progress = value, ...)
  do.call(on.exit, list(substitute(options(old), list(old = old)), add = TRUE, after = FALSE), envir = .frame)
}

test_that("an invalid option is an error that names it", {
  cl <- local_cluster(1)
  for (value in list(NA, "yes", c(TRUE, TRUE))) {
    local_progress(value)
    error <- caught(clusterLapply(cl, 1:2, identity))
    expect_rust_error(error, "bad_argument")
    expect_identical(error$argument, "rustcluster.progress")
  }
})

test_that("a script prints a line now and then, for all functions that run tasks", {
  text <- output_of(c(
    "options(rustcluster.progress = TRUE, cli.progress_show_after = 0)",
    "stopifnot(identical(clusterApplyLB(cl, 1:12, slow), as.list(1:12)))",
    "stopifnot(identical(parallel::parSapply(cl, 1:14, slow), 1:14))",
    "stopifnot(identical(clusterMap(cl, slow, 1:15), as.list(1:15)))",
    "options(rustcluster.progress = FALSE)",
    "stopifnot(identical(clusterLapply(cl, 1:11, slow, .progress = TRUE), as.list(1:11)))",
    "invisible(clusterLapply(cl, 1:13, slow))",
    "try(clusterLapply(cl, 1:16, function(i) { Sys.sleep(0.1); if (i == 10) stop('ten') }, .progress = TRUE, .errors = 'stop'))"
  ))
  for (n in c("12 tasks", "14 elements", "15 tasks", "11 elements")) {
    expect_match(text, sprintf("[0-9]+/%s [|] [0-9.]+/s [|] [012] busy [|] ETA [0-9?]", n))
    expect_match(text, sprintf("(^|\n)%s in [0-9.]+ s [(][0-9.]+/s[)]", n))
  }
  expect_no_match(text, "/13 ")
  expect_no_match(text, "16 elements in")
  expect_match(text, "failed: ten")
})

test_that("short jobs of a script print nothing", {
  text <- output_of(c(
    "options(rustcluster.progress = TRUE)",
    "invisible(parLapply(cl, 1:4, identity))",
    "suppressMessages(invisible(clusterApplyLB(cl, 1:24, slow)))"
  ))
  expect_identical(text, "all done")
})

test_that("a terminal shows a bar", {
  skip_if(!nzchar(Sys.which("script")), "there is no script")
  text <- output_of(terminal = TRUE, c(
    "options(rustcluster.progress = TRUE, cli.progress_show_after = 0)",
    "invisible(parLapply(cl, 1:22, slow))",
    "if (requireNamespace('future.apply', quietly = TRUE)) {",
    "  future::plan(rustcluster::cluster_rust, workers = cl)",
    "  invisible(future.apply::future_lapply(1:20, slow, future.chunk.size = 4))",
    "  future::plan('sequential')",
    "}"
  ))
  expect_match(text, "[0-9]+/22 elements | [0-9.]+/s | 2 busy")
  expect_match(text, "22 elements in [0-9]")
  skip_if_not_installed("future.apply")
  expect_match(text, "[0-9]+/[2-5] futures")
  expect_match(text, "5 futures in [0-9]")
})

test_that("a document of knitr contains a line now and then", {
  skip_if_not_installed("knitr")
  cl <- local_cluster(2)
  local_progress(TRUE, cli.progress_show_after = 0, cli.dynamic = TRUE)
  chunk <- "x <- clusterApplyLB(cl, 1:8, function(i) Sys.sleep(0.1))"
  doc <- knitr::knit(text = c("```{r}", chunk, "```"), envir = list2env(list(cl = cl), parent = globalenv()), quiet = TRUE)
  expect_match(doc, "## [0-9]/8 tasks | ")
  expect_match(doc, "## 8 tasks in ")
})

test_that("futures and runs print lines, too", {
  cl <- local_cluster(2)
  local_progress(TRUE, cli.progress_show_after = 0)
  messages_of <- function(expr) vapply(testthat::capture_messages(expr), identity, "", USE.NAMES = FALSE)
  # A run outlives the temporary directory of its session.
  dir <- tempfile("run-", dirname(tempdir()))
  on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
  run <- startRun(dir, 1:12, global(function(i) Sys.sleep(0.2)), spec = 2)
  said <- messages_of(run$wait())
  expect_match(said, "^12 elements in", all = FALSE)
  skip_if_not_installed("future.apply")
  old <- future::plan(rustcluster::cluster_rust, workers = cl)
  on.exit(future::plan(old), add = TRUE, after = FALSE)
  said <- messages_of(future.apply::future_lapply(1:6, function(i) Sys.sleep(0.1), future.chunk.size = 1))
  expect_match(said, "^6 futures in ", all = FALSE)
  # The next futures are counted anew.
  said <- messages_of(future::value(future::future(Sys.sleep(0.1))))
  expect_match(said, "^1 future in ", all = FALSE)
  # So are those of a function after futures that nobody has collected, because a function has ended with an error or
  # because nobody has asked for their value.
  failing <- function(i) if (i == 2) stop("two") else Sys.sleep(0.3)
  # Newer versions of future.apply warn that they cancel the other futures.
  messages_of(suppressWarnings(caught(future.apply::future_lapply(1:4, failing, future.chunk.size = 1))))
  expect_length(ls(rustcluster:::shownFutures), 0)
  expect_silent(future::future(NULL, lazy = TRUE))
  messages_of(future::future(NULL))
  said <- messages_of(future.apply::future_lapply(1:3, function(i) Sys.sleep(0.1), future.chunk.size = 1))
  expect_match(said, "^3 futures in ", all = FALSE)
  expect_length(ls(rustcluster:::shownFutures), 0)
  # The futures of a function count together although it launches them within tryCatch(), one after the other.
  launching <- function() for (i in 1:3) tryCatch(future::value(future::future(NULL)), error = stop)
  environment(launching) <- asNamespace("future.apply")
  expect_match(messages_of(launching()), "^3 futures in ", all = FALSE)
})

test_that("chunks that report elements have the values, calls and random numbers of lapply()", {
  reporting <- rustcluster:::lapplyReporting
  same <- function(...) {
    outcome <- function(apply) tryCatch(apply(...), error = function(e) list(conditionMessage(e), conditionCall(e)))
    expect_identical(outcome(reporting), outcome(lapply))
  }
  same(list(a = 1, b = NULL, 3), identity)
  same(1:3, function(i) if (i == 2) NULL else i)
  same(c(x = 1.5, y = NA), function(v) v)
  same(as.Date("2020-01-01") + 0:2, class)
  same(factor(c("u", "v")), as.character)
  same(expression(a + b, c), all.names)
  same(list2env(list(only = 1)), function(v) v)
  same(character(), nchar)
  same(NULL, identity)
  same(1:2, "sqrt")
  same(list(1:3, 4:6), `[`, 2)
  same(1:2, quote)
  same(1:3, function(x, ...) list(sys.call(), match.call(), substitute(x), nargs(), list(...)), k = 2)
  same(1:3, function(x) if (x == 2) stop("two") else x)
  same(1:2, "no such function")
  same(1:2, function(x) missing(x))
  same(alist(a = , b = 1), identity)
  # A function that is made for an element keeps it.
  made <- function(apply) lapply(apply(1:3, function(i) function() i), function(f) f())
  expect_identical(made(reporting), made(lapply))

  cl <- local_cluster(3)
  psock <- parallel::makeCluster(3)
  on.exit(parallel::stopCluster(psock), add = TRUE, after = FALSE)
  drawn <- function(cl, apply = parallel::parLapply) {
    parallel::clusterSetRNGStream(cl, 5)
    apply(cl, c(a = 1, b = 2, c = 3, d = 4, e = 5), function(i) list(i, stats::runif(2), sys.call()))
  }
  local_progress(TRUE)
  expect_identical(drawn(cl), drawn(psock))
  expect_identical(drawn(cl, parLapply), drawn(psock))
  failing <- function(cl) caught(parallel::parSapply(cl, 1:7, function(i) if (i == 4) stop("four") else i))
  expect_identical(conditionMessage(failing(cl)), conditionMessage(failing(psock)))
})

test_that("elements of a chunk count while it runs", {
  cl <- local_cluster(2)
  local_progress(TRUE, cli.progress_show_after = 0)
  seen <- integer()
  local_function("showProgress", function(progress, n, what, ...) {
    expect_identical(c(n, what), c("20", "element"))
    function() seen <<- c(seen, progress()[[1L]])
  })
  parallel::parLapply(cl, 1:20, function(i) Sys.sleep(0.15))
  expect_false(is.unsorted(seen))
  expect_true(any(seen > 0 & seen < 10))
  expect_identical(seen[[length(seen)]], 20)
})

test_that("progressr shows the progress of all functions that run tasks", {
  skip_if_not_installed("progressr")
  cl <- local_cluster(2)
  two <- c(cl, local_cluster(1))
  expect_steps <- function(n, expr) expect_equal(steps_of(expr), list(steps = n, max = n))
  expect_steps(9, parallel::parLapply(cl, 1:9, sqrt))
  expect_steps(8, parLapplyLB(cl, 1:8, sqrt))
  expect_steps(7, clusterMap(cl, `+`, 1:7, 1))
  expect_steps(6, clusterLapply(cl, 1:6, sqrt))
  expect_steps(5, clusterLapply(two, 1:5, sqrt))
  expect_equal(steps_of(clusterLapply(cl, 1:6, sqrt, .progress = FALSE))$max, 0)
  local({
    local_progress(FALSE)
    expect_equal(steps_of(parLapply(cl, 1:9, sqrt))$max, 0)
  })
  # What progressr shows is not shown twice. It shows nothing in a script that has not enabled it.
  local_progress(TRUE, cli.progress_show_after = 0, progressr.enable = TRUE)
  slow <- function(i) Sys.sleep(0.1)
  expect_silent(expect_steps(8, clusterApplyLB(cl, 1:8, slow)))
  local_progress(TRUE, progressr.enable = FALSE)
  expect_message(steps_of(clusterApplyLB(cl, 1:8, slow), enabled = FALSE), "8 tasks in")
  local_progress(NULL)
  expect_message(steps_of(clusterLapply(cl, 1:8, slow, .progress = TRUE), enabled = FALSE), "8 elements in")
  expect_silent(steps_of(clusterLapply(cl, 1:8, slow), enabled = FALSE))
  local_progress(NULL, progressr.enable = NULL)
  skip_if_not_installed("foreach")
  registerDoRustCluster(cl)
  on.exit(foreach::registerDoSEQ(), add = TRUE, after = FALSE)
  expect_steps(4, foreach::`%dopar%`(foreach::foreach(i = 1:4), i))
})

test_that("a progressor that tasks call is that of the session", {
  skip_if_not_installed("progressr")
  cl <- local_cluster(2)
  two <- c(cl, local_cluster(1))
  # The progressor of the session is older than that of the function.
  expect_calls <- function(n, run) {
    seen <- steps_of({
      p <- progressr::progressor(n)
      run(p)
    })
    expect_equal(seen, list(steps = n, max = n))
  }
  task <- function(i, p) {
    p(sprintf("element %d", i))
    i
  }
  expect_calls(9, function(p) stopifnot(identical(parallel::parLapply(cl, 1:9, task, p), as.list(1:9))))
  expect_calls(2, function(p) parallel::clusterApply(cl, 1:2, task, p))
  expect_calls(9, function(p) parallel::clusterApplyLB(cl, 1:9, task, p))
  expect_calls(9, function(p) parLapplyLB(cl, 1:9, task, p))
  expect_calls(2, function(p) parallel::clusterCall(cl, task, 1, p))
  expect_calls(7, function(p) stopifnot(identical(clusterLapply(cl, 1:7, task, p), as.list(1:7))))
  expect_calls(7, function(p) clusterLapply(two, 1:7, task, p))
  expect_calls(6, function(p) clusterSubmit(cl, for (i in 1:6) p())$value())
  # Larger than a frame.
  expect_calls(1, function(p) parallel::clusterApply(cl, 1, function(i, p) p(strrep("x", 3e6)), p))
  failed <- NULL
  # A task that ends with an error has reported before.
  expect_calls(1, function(p) {
    failed <<- caught(parallel::clusterApply(cl, 1:2, function(i, p) {
      if (i == 2) return(2)
      p()
      stop("no")
    }, p))
  })
  expect_match(conditionMessage(failed), "no$")
  # A handler of the task sees the condition as in any R process.
  caught_there <- parallel::clusterCall(cl, function(p) {
    tryCatch(p(), progression = function(c) "caught")
  }, progressr::progressor(1, initiate = FALSE, on_exit = FALSE, enable = TRUE))
  expect_identical(caught_there, list("caught", "caught"))
  if (requireNamespace("snow", quietly = TRUE)) {
    expect_calls(8, function(p) stopifnot(identical(snow::clusterApplyLB(cl, 1:8, task, p), as.list(1:8))))
  }
  skip_if_not_installed("foreach")
  registerDoRustCluster(cl)
  on.exit(foreach::registerDoSEQ(), add = TRUE, after = FALSE)
  expect_calls(5, function(p) foreach::`%dopar%`(foreach::foreach(i = 1:5), p()))
})

test_that("calls between the steps of a progressor do not end it", {
  skip_if_not_installed("progressr")
  cl <- local_cluster(2)
  expect_silent(seen <- steps_of({
    p <- progressr::progressor(3)
    for (i in 1:3) {
      parallel::parLapply(cl, 1:9, sqrt)
      p()
    }
  }))
  expect_equal(seen, list(steps = 3, max = 3))
  # A call after the end of a progressor has its own.
  expect_silent(seen <- steps_of({
    p <- progressr::progressor(2)
    p(amount = 2)
    parallel::parLapply(cl, 1:9, sqrt)
  }))
  expect_equal(seen, list(steps = 9, max = 9))
})

test_that("what tasks of a call that was interrupted have reported is not part of the next call", {
  skip_if_not_installed("progressr")
  cl <- local_cluster(2)
  seen <- character()
  conditions <- function(expr) {
    withCallingHandlers(expr, progression = function(p) seen <<- c(seen, p$message))
  }
  task <- function(text) {
    for (i in 1:50) signalCondition(structure(list(message = text), class = c("progression", "condition")))
    Sys.sleep(if (text == "old") 60 else 0)
  }
  tryCatch(
    interrupted(conditions(parallel::clusterApply(cl, c("old", "old"), task)), 1),
    interrupt = function(e) NULL
  )
  seen <- character()
  conditions(parallel::clusterApply(cl, c("new", "new"), task))
  expect_identical(unique(seen), "new")
  expect_length(seen, 100)
})

test_that("a stored run is continued with another progressor, and its own calls of workers show no progress", {
  skip_if_not_installed("progressr")
  cl <- local_cluster(2)
  dir <- tempfile("run-")
  on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
  shown <- character()
  run <- function(n, save, FUN, ...) {
    withCallingHandlers(
      clusterLapply(cl, 1:n, FUN, ..., .store = dir, .save = save, .reuse = "same"),
      progression = function(p) if (p$type == "initiate") shown <<- c(shown, p$progressor_uuid)
    )
  }
  reporting <- function(n, save) {
    steps_of({
      # The call computes the elements from the fifth on.
      p <- progressr::progressor(if (n > 4) n - 4 else n)
      run(n, save, global(function(i, p) p()), p)
    })
  }
  expect_equal(reporting(4, "head"), list(steps = 4, max = 4))
  expect_equal(reporting(7, "hosts"), list(steps = 3, max = 3))
  expect_length(shown, 0)
  # Without a progressor of the session, there is one of the call.
  dir <- tempfile("run-")
  on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
  expect_equal(steps_of(run(6, "hosts", global(function(i) i))), list(steps = 6, max = 6))
  expect_length(shown, 1)
})

test_that("global handlers of progressr show the progressor of tasks, without a warning", {
  skip_if_not_installed("progressr")
  text <- output_of(c(
    "options(warn = 2, progressr.enable = TRUE)",
    "library(progressr)",
    "handler <- make_progression_handler('printing', reporter = list(",
    "  update = function(config, state, progression, ...) cat(state$step, '/', config$max_steps, '\n', sep = '')",
    "), intrusiveness = 0, enable = TRUE)",
    "handlers(global = TRUE)",
    "handlers(handler)",
    "f <- function() {",
    "  p <- progressor(11)",
    "  invisible(parLapply(cl, 1:11, function(i, p) p(), p))",
    "  invisible(parLapply(cl, 1:7, identity))",
    "}",
    "f()",
    "f()"
  ))
  expect_match(text, "1/11\n.*11/11\n.*7/7\n.*1/11\n.*11/11\n.*7/7\n")
})

test_that("very many reports of a task are raised in order, and none is lost", {
  skip_if_not_installed("progressr")
  cl <- local_cluster(1)
  seen <- integer()
  signals <- function(n) {
    for (i in seq_len(n)) signalCondition(structure(list(message = i), class = c("progression", "condition")))
  }
  count <- function(expr) withCallingHandlers(expr, progression = function(p) seen[[length(seen) + 1L]] <<- p$message)
  count(parallel::clusterApply(cl, 2e4, signals))
  expect_identical(seen, 1:20000)
  # After a jump, what the next call reports is complete.
  tryCatch(parallel::clusterApply(cl, 100, signals), progression = function(p) NULL)
  seen <- integer()
  count(parallel::clusterApply(cl, 100, signals))
  expect_identical(seen, 1:100)
})

test_that("a report that cannot be read is left out", {
  whole <- serialize(structure(list(message = "a"), class = c("progression", "condition")), NULL)
  reports <- rustcluster:::readReports(list(whole, whole[1:40], serialize("no condition", NULL), whole))
  expect_identical(reports, rep(list(unserialize(whole)), 2))
})

test_that("no process is left", {
  expect_no_leftovers()
})
