# Each task has a function and arguments of its own, as with parallel: none sees what another task, or
# code on the head, has changed in place, and what a function refers to by name is looked up anew.

skip_on_cran()
watch_processes()
library <- compiled()
pair <- cluster_pair(2)
for (cl in pair) parallel::clusterCall(cl, dyn.load, library)

# Also in place, but only in their own copies: the elements of a chunk share function and arguments.
each <- list(
  clusterApply = quote(clusterApply(cl, 1:6, f, d)),
  clusterApplyLB = quote(clusterApplyLB(cl, 1:6, f, d)),
  clusterMap = quote(clusterMap(cl, f, 1:6, MoreArgs = list(d))),
  dynamic = quote(clusterMap(cl, f, 1:6, MoreArgs = list(d), .scheduling = "dynamic")),
  clusterCall = quote(c(clusterCall(cl, f, 1, d), clusterCall(cl, f, 2, d))),
  parLapply = quote(parLapply(cl, 1:6, f, d)),
  parSapply = quote(parSapply(cl, 1:6, f, d)),
  chunks = quote(parLapplyLB(cl, 1:6, f, d, chunk.size = 2)),
  again = quote(list(clusterApply(cl, 1:3, f, d), clusterApply(cl, 1:3, f, d)))
)

expect_same_for_each <- function(f, d, calls = each, alone = f(1, unserialize(serialize(d, NULL)))) {
  # What this changes in place must not be what is sent.
  sent <- unserialize(serialize(f, NULL))
  force(alone)
  f <- sent
  for (call in calls) {
    eval(bquote(expect_same_value(.(call), f = f, d = d, n = 2)))
  }
  # Ours alone.
  for (values in list(
    clusterLapply(pair$ours, 1:6, f, d),
    clusterLapplyAsync(pair$ours, 1:100, f, d)$value(),
    clusterLapply(pair$ours, 1:6, f, d, .seed = 1)
  )) {
    expect_identical(values, rep(list(alone), length(values)))
  }
}

test_that("changes in place by C code are not visible to other tasks", {
  numbers <- global(function(i, d) .Call("bump", d$a, PACKAGE = "helpers"))
  small <- list(a = c(3, 1, 2))
  large <- list(a = as.numeric(1:20000))
  frame <- data.frame(a = c(3, 1, 2))
  nested <- list(a = 1, b = list(large, small))
  for (d in list(small, large, frame, nested)) expect_same_for_each(numbers, d)
  attributes <- global(function(i, d) .Call("mark", d, i, PACKAGE = "helpers"))
  for (d in list(small, large$a, quote(a + b), "a")) expect_same_for_each(attributes, d, each[-5L])
})

test_that("changes of a function by C code are not visible to other tasks", {
  # A constant in its body, an argument's default and an attribute.
  constant <- global(function(i, d) {
    value <- 10
    .Call("bump", value, PACKAGE = "helpers")
  })
  default <- global(function(i, d, value = 10) .Call("bump", value, PACKAGE = "helpers"))
  itself <- global(function(i, d) is.null(.Call("mark", sys.function(), TRUE, PACKAGE = "helpers")))
  for (f in list(constant, default, itself, compiler::cmpfun(constant))) expect_same_for_each(f, 0)
})

test_that("an object that a task has stored is not changed by other tasks", {
  # A later task changes it in place.
  keep <- global(function(i, d) {
    if (!exists("kept", globalenv())) assign("kept", d, globalenv())
    .Call("bump", get("kept", globalenv())$a, PACKAGE = "helpers")
    d$a[[1L]]
  })
  for (d in list(list(a = 1), list(a = as.numeric(1:20000)))) {
    expect_same_for_each(keep, d, each[1:4], alone = 1)
    for (cl in pair) parallel::clusterEvalQ(cl, rm(kept, envir = globalenv()))
  }
})

test_that("objects that are changed in place between two messages are sent with their current value", {
  f <- global(function(d) d[[1L]])
  bump <- function(x) .Call("bump", x, PACKAGE = "helpers")
  results <- lapply(pair, function(cl) {
    # Numbers of their own for each cluster.
    d <- as.numeric(1:10)
    constant <- as.function(c(alist(i = ), list(as.numeric("20"))), globalenv())
    sent <- list()
    for (i in 1:3) {
      bump(d)
      parallel:::sendCall(cl[[1L + i %% 2L]], f, list(d))
      sent <- c(sent, list(parallel:::recvResult(cl[[1L + i %% 2L]])))
    }
    by_hand <- for (i in 1:2) {
      bump(d)
      parallel:::sendCall(cl[[i]], f, list(d))
    }
    by_hand <- lapply(cl, parallel:::recvResult)
    jobs <- lapply(1:3, function(i) {
      bump(body(constant))
      c(clusterApply(cl, 1:2, constant), parallel::clusterCall(cl[1L], constant, 1), clusterCall(cl, constant, 1))
    })
    # An element that changes when it is asked for.
    elements <- structure(list(1, 2, 3, 4), class = "bumps")
    registerS3method("[[", "bumps", function(x, i) {
      bump(d)
      d
    }, envir = baseenv())
    list(sent, by_hand, jobs, clusterApply(cl, elements, f), parallel::clusterApply(cl, elements, f))
  })
  expect_identical(results$rust, results$psock)
  expect_identical(results$ours, results$psock)
})

test_that("S4 objects without a class arrive as such", {
  expect_true(expect_same_value(isS4(clusterApply(cl, list(asS4(c(1, 2))), identity)[[1L]]), n = 2))
  expect_same_value(clusterApply(cl, list(asS4(list(1)), asS4("a"), asS4(1L)), isS4), n = 2)
})

# A package whose function `f` calls `g`, which gives `value`; installed into `library`.
install_version <- function(library, value) {
  source <- file.path(tempfile("source-"), "changing")
  dir.create(file.path(source, "R"), recursive = TRUE)
  on.exit(unlink(dirname(source), recursive = TRUE), add = TRUE, after = FALSE)
  writeLines(c("Package: changing", "Version: 1.0", "Title: T", "Description: D.", "License: GPL-2"),
             file.path(source, "DESCRIPTION"))
  writeLines("export(f)", file.path(source, "NAMESPACE"))
  writeLines(c("f <- function(i) g()", sprintf("g <- function() %d", value)), file.path(source, "R", "a.R"))
  output <- system2(file.path(R.home("bin"), "R"),
                    c("CMD", "INSTALL", "--no-docs", "--no-test-load", paste0("--library=", shQuote(library)),
                      shQuote(source)), stdout = TRUE, stderr = TRUE)
  if (!is.null(attr(output, "status"))) stop(paste(output, collapse = "\n"))
}

test_that("the next task uses a package that was reloaded", {
  dir <- tempfile("library-")
  dir.create(dir)
  paths <- .libPaths()
  on.exit({
    .libPaths(paths)
    unlink(dir, recursive = TRUE)
  }, add = TRUE, after = FALSE)
  here_and_there <- function(fun, ...) {
    fun(...)
    for (cl in pair) parallel::clusterCall(cl, fun, ...)
  }
  here_and_there(global(function(paths) .libPaths(paths)), c(dir, paths))
  calls <- list(
    quote(clusterApply(cl, 1:3, f)), quote(clusterApplyLB(cl, 1:3, f)), quote(parLapply(cl, 1:3, f)),
    quote(parLapplyLB(cl, 1:3, f)), quote(clusterMap(cl, f, 1:3)), quote(clusterCall(cl, f, 1)),
    quote(clusterApply(cl, 1:3, g)), quote(parSapply(cl, 1:3, g)), quote(clusterApply(cl, 1:3, call, f)),
    quote(clusterApply(cl, 1:3, h))
  )
  # Functions that call it.
  g <- global(function(i) changing::f(i))
  call <- global(function(i, f) f(i))
  for (value in 1:2) {
    here_and_there(global(function() if (isNamespaceLoaded("changing")) unloadNamespace("changing")))
    install_version(dir, value)
    here_and_there(global(function() invisible(loadNamespace("changing"))))
    f <- changing::f
    h <- local(function(i) changing::f(i) + f(i), list2env(list(f = f)))
    for (expr in calls) {
      got <- eval(bquote(expect_same_value(.(expr), f = f, g = g, call = call, h = h, n = 2)))
      expect_true(all(unlist(got) %in% c(value, 2 * value)))
    }
    expect_identical(clusterLapply(pair$ours, 1:3, f), rep(list(as.numeric(value)), 3))
    expect_identical(clusterLapply(pair$ours, 1:3, call, f), rep(list(as.numeric(value)), 3))
    expect_identical(clusterLapply(pair$ours, 1:3, h), rep(list(2 * value), 3))
  }
})

test_that("the next task uses new definitions on the workers", {
  redefine <- function(value) {
    for (cl in pair) {
      parallel::clusterCall(cl, global(function(value) {
        setGeneric("described", function(x) standardGeneric("described"), where = globalenv())
        eval(bquote(setMethod("described", "numeric", function(x) .(value), where = globalenv())))
        assign("helper", eval(bquote(function() .(value))), globalenv())
        NULL
      }), value)
    }
  }
  f <- global(function(i) list(described(1), helper()))
  for (value in 1:2) {
    redefine(value)
    expect_same_value(clusterApply(cl, 1:3, f), f = f, n = 2)
    expect_same_value(parLapplyLB(cl, 1:3, f), f = f, n = 2)
    expect_same_value(clusterCall(cl, f, 1), f = f, n = 2)
  }
})

test_that("a function with a large frame gives the same", {
  make <- function(big) {
    force(big)
    count <- 0
    function(i) {
      count <<- count + 1
      c(length(big) + i, if (is.numeric(big)) sum(big))
    }
  }
  for (big in list(as.list(1:50000), data.frame(a = runif(1e5), b = 1:1e5), runif(1e5), letters)) {
    f <- make(big)
    for (call in each[c(1:6, 8L)]) {
      call <- eval(bquote(substitute(.(call), list(d = quote(expr = )))))
      call <- as.call(Filter(function(x) !identical(x, quote(expr = )), as.list(call)))
      if (!is.null(call$MoreArgs)) call$MoreArgs <- NULL
      if (identical(call[[1L]], quote(c))) call <- quote(clusterCall(cl, f, 1))
      eval(bquote(expect_same_value(.(call), f = f, n = 2)))
    }
    expect_identical(parLapplyLB(pair$ours, 1:40, f), lapply(1:40, f))
    expect_identical(parSapplyLB(pair$ours, 1:40, f), sapply(1:40, f))
    expect_identical(clusterLapply(pair$ours, 1:40, f), lapply(1:40, f))
    expect_identical(clusterLapply(pair$ours, 1:40, function(i, k) f(i) + k, k = 1), lapply(1:40, function(i) f(i) + 1))
  }
})

test_that("clusterLapply() shares a function's frame in a batch, and arguments never", {
  f <- local({
    env <- environment()
    function(i, d) {
      .Call("bump", d, PACKAGE = "helpers")
    }
  })
  expect_identical(unlist(clusterLapply(pair$ours, 1:200, f, 1)), rep(2, 200))
  # One environment in function and arguments stays one.
  env <- new.env()
  g <- with(env, function(i, e) identical(e, parent.env(environment())))
  expect_true(all(unlist(clusterLapply(pair$ours, 1:50, g, env))))
})

test_that("vectors in environments are mapped", {
  skip_if(Sys.info()[["sysname"]] != "Linux")
  f <- local({
    big <- runif(1e5)
    function(i) any(grepl("mapped", utils::capture.output(.Internal(inspect(big)))))
  }, new.env(parent = globalenv()))
  expect_true(all(unlist(clusterApply(pair$ours, 1:4, f))))
  # And are one's own to write to.
  g <- local({
    big <- numeric(1e5)
    function(i) {
      before <- big[[1L]]
      big[[1L]] <<- i
      before
    }
  }, new.env(parent = globalenv()))
  expect_identical(unlist(clusterApply(pair$ours, 1:6, g)), numeric(6))
})

stop_cluster_pairs()
expect_no_leftovers()
