# Package BiocParallel gives with as(cl, "SnowParam") of one of our clusters what it gives with that of a PSOCK cluster.

skip_on_cran()
skip_unless_long()
skip_if_not_installed("BiocParallel")
watch_processes()
suppressPackageStartupMessages(library(BiocParallel))

as_param <- function(cl, ...) {
  param <- methods::as(cl, "SnowParam")
  settings <- list(...)
  for (name in names(settings)) {
    set <- get(paste0(name, "<-"), asNamespace("BiocParallel"))
    param <- set(param, value = settings[[name]])
  }
  param
}

# Returns the results of BiocParallel without what differs from call to call: the calls on the worker that led to an
# error, the state for BPREDO, and environments in the calls of errors.
plainly <- function(x) {
  attr(x, "traceback") <- NULL
  attr(x, "REDOENV") <- NULL
  for (name in intersect(names(attributes(x)), c("errors", "result"))) attr(x, name) <- plainly(attr(x, name))
  if (inherits(x, "condition")) x["call"] <- list(deparse(x$call))
  if (is.list(x)) x[] <- lapply(x, plainly)
  x
}

# Evaluates the expression with a `param` of a PSOCK cluster, and of ours, and compares all that can be seen of it. The
# results of an error of BiocParallel are a part of it.
expect_same_bioc <- function(expr, ..., values = list()) {
  expr <- bquote(tryCatch(.(strip_srcref(substitute(expr))), bplist_error = function(e) list(e, bpresult(e))))
  outcomes <- lapply(cluster_pair(2L)[c("psock", "rust")], function(cl) {
    set.seed(5)
    got <- outcome(expr, cl, c(list(param = as_param(cl, ...)), values))
    got$result$value <- plainly(got$result$value)
    c(got, list(after = stats::runif(1)))
  })
  expect_equal(outcomes$rust, outcomes$psock)
  # A mistake in the test itself.
  expect_null(outcomes$rust$result$message)
  invisible(outcomes$rust$result$value)
}

test_that("its functions return the same", {
  got <- expect_same_bioc(bplapply(c(a = 1, b = 2, c = 3, d = 4, e = 5), function(x, y) x + y, y = 10, BPPARAM = param))
  expect_identical(got, list(a = 11, b = 12, c = 13, d = 14, e = 15))
  expect_same_bioc(bplapply(1:7, function(i) i, BPPARAM = param), bptasks = 7L)
  expect_same_bioc(bplapply(list(), identity, BPPARAM = param))
  got <- expect_same_bioc(bpmapply(function(a, b, c) a * b + c, 1:5, 5:1, MoreArgs = list(c = 2), BPPARAM = param))
  expect_identical(got, c(7, 10, 11, 10, 7))
  expect_same_bioc(bpmapply(rep, 1:3, 3:1, SIMPLIFY = FALSE, BPPARAM = param))
  got <- expect_same_bioc(bpvec(1:10, sqrt, BPPARAM = param))
  expect_identical(got, sqrt(1:10))
  expect_same_bioc(bpvec(1:10, function(x) 2 * x, AGGREGATE = rbind, BPPARAM = param))
  expect_same_bioc(bptry(bpvec(1:10, sum, BPPARAM = param), error = identity))
  expect_same_bioc(bpvectorize(sqrt, BPPARAM = param)(1:6))
  expect_same_bioc(bpaggregate(mpg ~ cyl, data = mtcars, FUN = mean, BPPARAM = param))
  expect_same_bioc(bplapply(1:3, function(i) { message("m", i); cat("c", i); warning("w", i); i }, BPPARAM = param))
})

test_that("bpiterate() returns the same", {
  numbers <- function(n) {
    i <- 0
    function() if (i < n) i <<- i + 1
  }
  got <- expect_same_bioc(bpiterate(numbers(9), function(x) x^2, BPPARAM = param), values = list(numbers = numbers))
  expect_identical(got, as.list((1:9)^2))
  got <- expect_same_bioc(
    bpiterate(numbers(9), function(x) x^2, REDUCE = `+`, init = 100, BPPARAM = param), values = list(numbers = numbers)
  )
  expect_identical(got, 385)
  expect_same_bioc(
    bpiterate(numbers(9), function(x) letters[x], REDUCE = paste0, reduce.in.order = TRUE, BPPARAM = param),
    values = list(numbers = numbers)
  )
  expect_same_bioc(
    bpiterate(numbers(4), function(x) if (x == 3) stop("three") else x, BPPARAM = param),
    values = list(numbers = numbers)
  )
})

test_that("errors are the same, with all settings, and BPREDO computes what is missing", {
  fails <- function(i) if (i %in% c(3, 5)) stop("no ", i) else i
  values <- list(fails = fails)
  for (stop in c(TRUE, FALSE)) for (tasks in c(0L, 6L)) {
    expect_same_bioc(bplapply(1:6, fails, BPPARAM = param), bpstopOnError = stop, bptasks = tasks, values = values)
    expect_same_bioc(bptry(bplapply(1:6, fails, BPPARAM = param)), bpstopOnError = stop, bptasks = tasks,
                     values = values)
  }
  got <- expect_same_bioc({
    first <- bptry(bplapply(1:6, fails, BPPARAM = param))
    list(bpok(first), bplapply(1:6, function(i) 10 * i, BPREDO = first, BPPARAM = param))
  }, bpstopOnError = FALSE, bptasks = 6L, values = values)
  expect_identical(got, list(!1:6 %in% c(3, 5), list(1L, 2L, 30, 4L, 50, 6L)))
  expect_same_bioc(bpmapply(function(i, j) if (j == 2) stop("two") else i, 1:4, 1:4, BPPARAM = param))
  expect_same_bioc(bpvec(1:4, function(x) if (2 %in% x) stop("two") else x, BPPARAM = param))
  expect_same_bioc(vapply(bptry(bplapply(1:2, function(i) if (i == 1) Sys.sleep(30), BPPARAM = param)), inherits, NA,
                          "bperror"), bptimeout = 1L, bpstopOnError = FALSE)
})

test_that("random numbers are the same", {
  got <- expect_same_bioc(bplapply(1:5, function(i) stats::runif(1), BPPARAM = param), bpRNGseed = 7)
  again <- bplapply(1:5, function(i) stats::runif(1), BPPARAM = SerialParam(RNGseed = 7))
  expect_identical(got, again)
  expect_same_bioc({
    list(bplapply(1:5, function(i) stats::rnorm(2), BPPARAM = param),
         bpvec(1:4, function(x) stats::rnorm(length(x)), BPPARAM = param))
  }, bpRNGseed = 3, bptasks = 5L)
})

test_that("globals, options, logs, results and progress are the same", {
  assign("bioc_global", 5, globalenv())
  on.exit(rm("bioc_global", envir = globalenv()), add = TRUE, after = FALSE)
  uses <- function(i) i + bioc_global
  environment(uses) <- globalenv()
  got <- expect_same_bioc(bplapply(1:3, uses, BPPARAM = param), values = list(uses = uses))
  expect_identical(got, list(6, 7, 8))
  expect_same_bioc(bptry(bplapply(1:3, uses, BPPARAM = param)), bpexportvariables = FALSE, values = list(uses = uses))
  old <- options(bioc_option = 3)
  on.exit(options(old), add = TRUE, after = FALSE)
  for (export in c(TRUE, FALSE)) {
    expect_same_bioc(bplapply(1:3, function(i) getOption("bioc_option"), BPPARAM = param), bpexportglobals = export)
  }
  expect_same_bioc(bplapply(1:4, sqrt, BPPARAM = param), bpprogressbar = TRUE, bptasks = 4L)
  expect_same_bioc(bplapply(1:4, sqrt, BPPARAM = param, BPOPTIONS = bpoptions(tasks = 2L, progressbar = TRUE)))
  # Only a parameter that has not been started takes these.
  expect_same_bioc(tryCatch(bplog(param) <- TRUE, error = conditionMessage))
  expect_same_bioc(tryCatch(bpresultdir(param) <- tempdir(), error = conditionMessage))
})

test_that("the cluster belongs to its session, as a PSOCK cluster", {
  expect_same_bioc(list(bpisup(param), bpnworkers(param), bpworkers(param), bptasks(param)))
  expect_same_bioc(tryCatch(bpstart(param), error = conditionMessage))
  expect_same_bioc(tryCatch(bpstop(param), warning = conditionMessage))
  expect_same_bioc(bpisup(param))
  shown <- lapply(cluster_pair(2L)[c("psock", "rust")], function(cl) utils::capture.output(show(as_param(cl))))
  expect_identical(shown$rust, sub("SOCK", "RUST", shown$psock))
})

test_that("it is the default of BiocParallel after register(), and nests", {
  cl <- cluster_pair(2L)$rust
  before <- registered()
  on.exit(for (param in rev(before)) register(param), add = TRUE, after = FALSE)
  register(as_param(cl))
  expect_identical(bpnworkers(bpparam()), 2L)
  pids <- unique(unlist(bplapply(1:4, function(i) Sys.getpid())))
  expect_setequal(pids, clusterPids(cl))
  nested <- function(i) {
    sum(unlist(BiocParallel::bplapply(seq_len(i), identity, BPPARAM = BiocParallel::SerialParam())))
  }
  expect_identical(bplapply(1:4, nested), list(1L, 3L, 6L, 10L))
  # A function beside which the cluster and the parameter are.
  beside <- local({
    own <- cl
    param <- as_param(cl)
    function(i) i + 1
  })
  expect_identical(bplapply(1:3, beside), list(2, 3, 4))
})

test_that("parts of clusters and joined clusters work, and foreach's backend", {
  cl <- cluster_pair(2L)$rust
  other <- local_cluster(1)
  pids <- function(cl) {
    param <- as_param(cl, bptasks = 30L)
    unique(unlist(bplapply(1:30, function(i) {
      Sys.sleep(0.02)
      Sys.getpid()
    }, BPPARAM = param)))
  }
  expect_identical(pids(cl[2]), clusterPids(cl)[2])
  expect_setequal(pids(c(cl, other)), clusterPids(c(cl, other)))
  skip_if_not_installed("foreach")
  on.exit(foreach::registerDoSEQ(), add = TRUE, after = FALSE)
  registerDoRustCluster(cl)
  expect_identical(bplapply(1:5, sqrt, BPPARAM = DoparParam()), lapply(1:5, sqrt))
  expect_identical(bpmapply(`+`, 1:5, 5:1, BPPARAM = DoparParam()), rep(6L, 5))
})

test_that("after an interrupt, and after an error of the session, the next call has its own results", {
  cl <- local_cluster(2)
  param <- as_param(cl)
  sleeps <- function(i) {
    Sys.sleep(60)
    "late"
  }
  expect_lt(interrupted(bplapply(1:4, sleeps, BPPARAM = param), 0.5), 1.5 + slack())
  expect_identical(bplapply(1:4, function(i) 10 * i, BPPARAM = param), list(10, 20, 30, 40))
  expect_identical(unlist(clusterCall(cl, function() 1)), c(1, 1))
  fails <- local({
    i <- 0
    function() {
      i <<- i + 1
      if (i > 2) stop("no more")
      i
    }
  })
  expect_error(bpiterate(fails, sleeps, BPPARAM = param), "no more")
  expect_identical(bplapply(1:4, function(i) 10 * i, BPPARAM = param), list(10, 20, 30, 40))
  # A loop within the loop would take the results of the other.
  within <- function(x, y) bplapply(1:2, identity, BPPARAM = param)
  numbers <- bpiterateAlong(1:4)
  expect_rust_error(caught(bpiterate(numbers, identity, REDUCE = within, BPPARAM = param)), "busy")
  expect_identical(bplapply(1:4, function(i) 10 * i, BPPARAM = param), list(10, 20, 30, 40))
})

test_that("a worker failure is retried, and is an error of its elements if it goes on", {
  skip_unless_proc()
  cl <- local_cluster(2)
  once <- function(i, mark) {
    if (i == 3 && !file.exists(mark)) {
      file.create(mark)
      tools::pskill(Sys.getpid(), 9)
    }
    i
  }
  param <- as_param(cl)
  expect_warning(got <- bplapply(1:6, once, tempfile(), BPPARAM = param), "task 1 is retried")
  expect_identical(got, as.list(1:6))
  always <- function(i) if (i == 2) tools::pskill(Sys.getpid(), 9) else i
  for (stop in c(TRUE, FALSE)) {
    param <- as_param(cl, bpstopOnError = stop)
    error <- suppressWarnings(caught(bplapply(1:6, always, BPPARAM = param)))
    expect_s3_class(error, "bplist_error")
    expect_match(conditionMessage(error), "3 remote errors, element index: 1, 2, 3\n.*task 1 failed: the worker died")
    expect_identical(bpresult(error)[4:6], list(4L, 5L, 6L))
    for (of in bpresult(error)[1:3]) expect_rust_error(of, "task_failed")
  }
  param <- as_param(cl, bpstopOnError = FALSE, bptasks = 6L)
  got <- suppressWarnings(bptry(bplapply(1:6, always, BPPARAM = param)))
  expect_identical(bpok(got), !1:6 %in% 2)
  expect_identical(bplapply(1:6, identity, BPREDO = got, BPPARAM = param), as.list(1:6))
})

test_that("tasks that fail as a whole are errors of their elements", {
  cl <- local_cluster(2)
  # As on a host without BiocParallel.
  hidden <- tempfile()
  dir.create(hidden)
  clusterCall(cl, function(lib) {
    .libPaths(lib, include.site = FALSE)
    assign(".lib.loc", lib, environment(.libPaths))
    NULL
  }, hidden)
  error <- caught(bplapply(1:6, sqrt, BPPARAM = as_param(cl, bpstopOnError = FALSE)))
  expect_match(conditionMessage(error), "6 remote errors.*there is no package called .BiocParallel.")
  limited <- local_cluster(1, timeout = 0.5)
  error <- caught(bplapply(1:2, function(i) Sys.sleep(60), BPPARAM = as_param(limited)))
  for (of in bpresult(error)) expect_rust_error(of, "timeout")
  expect_identical(bplapply(1:2, identity, BPPARAM = as_param(limited)), list(1L, 2L))
})

test_that("a stopped cluster is an error of ours", {
  cl <- local_cluster(1)
  param <- as_param(cl)
  parallel::stopCluster(cl)
  expect_rust_error(caught(bplapply(1:2, identity, BPPARAM = param)), "stopped")
})

test_that("BiocParallel and rustcluster may be loaded in any order, and again", {
  child <- start_child({
    loadNamespace("BiocParallel")
    loadNamespace("rustcluster")
    cl <- rustcluster::makeRustCluster(2, packages = "BiocParallel")
    say("first", sum(unlist(BiocParallel::bplapply(1:4, identity, BPPARAM = methods::as(cl, "SnowParam")))))
    unloadNamespace("BiocParallel")
    say("plain", sum(unlist(parallel::clusterApply(cl, 1:4, identity))))
    loadNamespace("BiocParallel")
    say("again", sum(unlist(BiocParallel::bplapply(1:5, identity, BPPARAM = methods::as(cl, "SnowParam")))))
    parallel::stopCluster(cl)
  }, attach = FALSE)
  expect_child_ends_well(child)
  expect_identical(child_lines(child), c("first 10", "plain 10", "again 15"))
})

test_that("no process is left", {
  stop_cluster_pairs()
  expect_no_leftovers()
})
