# What makes a stored run another one. Without a cluster: hashes are compared.

hashes <- function(fun) rustcluster:::functionHashes(fun)
of_value <- function(value) unname(rustcluster:::argumentHashes(list(value)))

# Expects that a change of global variables is noticed, and that the same definitions have the same hashes.
expect_noticed <- function(setup, fun, change) {
  run <- function(text) suppressMessages(eval(parse(text = text, keep.source = FALSE), globalenv()))
  before <- ls(globalenv(), all.names = TRUE)
  on.exit(
    rm(list = setdiff(ls(globalenv(), all.names = TRUE), before), envir = globalenv()), add = TRUE, after = FALSE
  )
  run(setup)
  fun <- run(fun)
  first <- hashes(fun)
  run(setup)
  expect_identical(hashes(fun), first, info = setup)
  run(change)
  expect_false(identical(hashes(fun), first), info = change)
}

test_that("what an enclosing function has is noticed", {
  expect_differ <- function(make) {
    expect_identical(hashes(make(1)), hashes(make(1)))
    expect_false(identical(hashes(make(1)), hashes(make(2))))
  }
  outer <- function(...) function(x) sum(x, ...)
  expect_differ(function(k) outer(k))
  outer <- function(...) function(x) ..1
  expect_differ(function(k) outer(k))
  expect_differ(function(k) structure(function(x) x, k = k))
  expect_differ(function(k) {
    f <- function(x) x
    copies <- list(structure(f, k = 0), structure(f, k = k))
    function(x) copies
  })
  expect_differ(function(k) {
    groups <- structure(list(k), class = "cluster")
    function(x) groups
  })
  expect_differ(function(k) {
    e <- local(new.env(), list2env(list(k = k)))
    function(x) get("k", envir = e)
  })
})

test_that("functions that code does not call by their names are noticed", {
  expect_noticed("`foo<-` <- function(x, value) 1", "function(x) { names(foo(x)) <- 1; x }", "`foo<-` <- function(x, value) 2")
  expect_noticed("`[.sq` <- function(x, i) 1", "function(x) x[1]", "`[.sq` <- function(x, i) 2")
  expect_noticed("`[<-.sq` <- function(x, i, value) 1", "function(x) { x[1] <- 2; x }", "`[<-.sq` <- function(x, i, value) 2")
  expect_noticed("`$.sq` <- function(x, i) 1", "function(x) x$a", "`$.sq` <- function(x, i) 2")
  expect_noticed("Ops.sq <- function(e1, e2) 1", "function(x) x + 1", "Ops.sq <- function(e1, e2) 2")
  expect_noticed("print.sq <- function(x, ...) 1", "function(x) print(x)", "print.sq <- function(x, ...) 2")
  expect_noticed("format.sq <- function(x, ...) 1", "function(x) sapply(x, format)", "format.sq <- function(x, ...) 2")
  expect_noticed("f1 <- function(x) 1", "function(x) do.call(paste0('f', x), list(x))", "f1 <- function(x) 2")
  expect_noticed("f1 <- function(x) 1", "function(x) match.fun(paste0('f', x))(x)", "f1 <- function(x) 2")
  expect_noticed("f1 <- function(x) 1", "function(x) { nm <- paste0('f', x); sapply(x, nm) }", "f1 <- function(x) 2")
  expect_noticed("f1 <- function(x) 1; nm <- 'f1'", "function(x) sapply(x, nm)", "f1 <- function(x) 2")
  expect_noticed("wt <- function(x) x", "function(x, wt = 5) wt(wt)", "wt <- function(x) -x")
  expect_noticed("wt <- function(x) x", "function(x) { wt <- 5; wt(wt) }", "wt <- function(x) -x")
})

test_that("variables that code names in another way are noticed", {
  for (code in c(
    "get(paste0('p', x))", "get('p1')", "base::get('p1')", "base::get(paste0('p', x))", "dynGet('p1')", ".GlobalEnv$p1",
    "globalenv()[['p1']]", "globalenv()[[paste0('p', x)]]", "eval(parse(text = 'p1 + 1'))",
    "eval(parse(text = paste0('p', x)), globalenv())", "glue::glue('{p1} of {x}')"
  )) {
    expect_noticed("p1 <- 1", paste("function(x)", code), "p1 <- 2")
  }
  expect_noticed("p1 <- 1; helper <- function(x) get(paste0('p', x))", "function(x) helper(x)", "p1 <- 2")
  expect_noticed("k <- 1; model <- y ~ x * k", "function(x) lm(model)", "k <- 2")
})

test_that("variables of formulas are noticed, also of those that use themselves", {
  expect_noticed("k <- 1; z <- y ~ z + k", "function(i) z", "k <- 2")
  expect_noticed("k <- 1; a <- y ~ b; b <- y ~ a + k", "function(i) list(a, b)", "k <- 2")
  expect_noticed("z <- y ~ z", "function(i) z", "z <- y ~ z + 1")
})

test_that("classes and methods are noticed", {
  on.exit(suppressWarnings(methods::removeClass("ContentP", where = globalenv())), add = TRUE, after = FALSE)
  expect_noticed(
    "methods::setClass('ContentP', representation(x = 'numeric'), prototype(x = 1))", "function(x) methods::new('ContentP')",
    "methods::setClass('ContentP', representation(x = 'numeric'), prototype(x = 2))"
  )
  expect_noticed(
    "methods::setGeneric('contentArea', function(o) standardGeneric('contentArea'))
    methods::setMethod('contentArea', 'numeric', function(o) 1)", "function(x) contentArea(x)",
    "methods::setMethod('contentArea', 'numeric', function(o) 2)"
  )
  skip_if_not_installed("R6")
  expect_noticed(
    "B <- R6::R6Class('B', public = list(go = function() 1)); A <- R6::R6Class('A', inherit = B)",
    "function(x) A$new()$go()", "B <- R6::R6Class('B', public = list(go = function() 2))"
  )
})

test_that("a frame with other values, and a cluster, makes no difference", {
  make <- function(cl, unused) {
    started <- runif(1)
    cl <- list(structure(list(host = unused), class = "SOCKnode"))
    class(cl) <- c("SOCKcluster", "cluster")
    model <- y ~ x
    function(x, k = 1) {
      tmp <- list(cl, model)
      sapply(x, function(started) started + k)
    }
  }
  expect_identical(hashes(make(1, "a")), hashes(make(2, "b")))
})

test_that("values of classes that overwrite length() and `[[`, and deep ones, can be compared", {
  times <- as.POSIXlt(c(0, 1), origin = "1970-01-01", tz = "UTC")
  expect_identical(of_value(times), of_value(unserialize(serialize(times, NULL))))
  expect_false(identical(of_value(times), of_value(as.POSIXlt(times + 1))))
  expect_false(identical(of_value(numeric_version("1.2")), of_value(numeric_version("1.3"))))
  expect_length(rustcluster:::elementHashes(list(times, numeric_version("1.2"), list(R.version))), 48L)
  deep <- 1
  call <- quote(x)
  for (i in 1:2000) {
    deep <- list(deep)
    call <- base::call("-", call)
  }
  for (value in list(deep, call)) {
    tryCatch(expect_match(of_value(value), "^[0-9a-f]{32}$"), error = function(e) {
      expect_s3_class(e, "rustcluster_bad_argument")
    })
  }
})

test_that("elements that are NULL or contain it count", {
  hashes <- function(...) rustcluster:::elementHashes(list(...))
  expect_length(hashes(1, NULL, mean, NULL), 64L)
  expect_identical(hashes(NULL, 1)[17:32], hashes(1))
  expect_false(identical(hashes(list(1, NULL)), hashes(list(1))))
  expect_false(identical(of_value(list(1, NULL)), of_value(list(1))))
})

test_that("identical values are equal in all their forms", {
  utf8 <- "\u00e9"
  native <- `Encoding<-`(utf8, "unknown")
  latin1 <- iconv(utf8, "UTF-8", "latin1")
  expect_identical(of_value(latin1), of_value(utf8))
  expect_identical(rustcluster:::elementHashes(list(a = utf8)), rustcluster:::elementHashes(list(latin1)))
  if (l10n_info()$`UTF-8`) expect_identical(rustcluster:::elementHashes(native), rustcluster:::elementHashes(utf8))
  expect_false(identical(of_value(utf8), of_value("e")))
  expect_identical(of_value(0), of_value(-0))
  expect_identical(rustcluster:::elementHashes(c(0, NaN)), rustcluster:::elementHashes(list(-0, 0 / 0)))
  expect_false(identical(of_value(NA_real_), of_value(NaN)))
  expect_identical(of_value(data.frame(a = 1:3)), of_value(data.frame(a = 1:4)[1:3, , drop = FALSE]))
  expect_identical(of_value(structure(1, a = 1, b = 2)), of_value(structure(1, b = 2, a = 1)))
})

test_that("elements are numbered in a short time, also those that are equal", {
  info <- list(seed = NULL, ids = NULL, n = 5L, elements = 5L)
  X <- c(1, 2, 2, 3, 2)
  store <- list2env(list(info = info, dir = tempfile("run-")))
  dir.create(store$dir)
  on.exit(unlink(store$dir, recursive = TRUE), add = TRUE, after = FALSE)
  now <- list(hashes = rustcluster:::elementHashes(c(2, 9, 2, 1, 2, 2, 9)))
  rustcluster:::regroup(store, rustcluster:::elementHashes(X), now, X)
  expect_identical(store$info$ids, c(2L, 6L, 3L, 1L, 5L, 7L, 8L))
  expect_identical(store$info$elements, 8L)
})
