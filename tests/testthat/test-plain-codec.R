# Small plain values and functions travel in a form of their own: what arrives must be what R's
# serialization would have brought.

watch_processes()
cl <- note_processes(makeRustCluster(2))

there <- function(value) clusterCall(cl[1], identity, value)[[1]]

same <- function(value) {
  expect_true(identical(
    there(value), unserialize(serialize(value, NULL)),
    num.eq = FALSE, single.NA = FALSE, attrib.as.set = FALSE
  ))
}

test_that("values of all kinds arrive unchanged", {
  latin <- "caf\xe9"
  Encoding(latin) <- "latin1"
  bytes <- "caf\xe9"
  Encoding(bytes) <- "bytes"
  values <- list(
    NULL, TRUE, NA, logical(), 1L, NA_integer_, integer(), 1, -0, NaN, NA_real_, Inf, double(),
    1i, complex(), "a", "", NA_character_, character(), raw(), as.raw(0:255), list(), list(NULL),
    list(1, "a", list(TRUE, NULL)), c(a = 1, b = 2), list(a = 1, 2), c(a = "x", "y"),
    structure(1:2, names = c("a", NA)), structure(list(), names = character()),
    "caf\u00e9", latin, bytes, c("\u4e2d", "x", NA), 1:10, 1:1e5, runif(1e4), factor("a"),
    data.frame(x = 1:2), matrix(1:4, 2), structure(1, class = "foo"), quote(x + y), quote(x),
    as.formula("y ~ x", globalenv()), expression(a, b), as.POSIXct(0, origin = "1970-01-01", tz = "UTC"), strrep("x", 1e5), as.list(1:5000),
    globalenv(), baseenv(), sum, `if`, pairlist(a = 1), getClass("numeric"), .leap.seconds
  )
  for (value in values) same(value)
})

test_that("encodings arrive", {
  for (value in c("caf\u00e9", iconv("caf\u00e9", "UTF-8", "latin1"))) {
    expect_identical(Encoding(there(value)), Encoding(value))
  }
})

test_that("deep and wide lists arrive", {
  deep <- 1
  for (i in 1:40) {
    deep <- list(a = deep)
    same(deep)
  }
  for (n in c(4090, 4095:4100, 8189:8195, 32760:32775)) same(raw(n))
})

test_that("random values arrive", {
  set.seed(7)
  value <- function(depth) {
    n <- sample(0:4, 1)
    kind <- sample(if (depth) 7 else 6, 1)
    it <- switch(kind,
      sample(c(TRUE, FALSE, NA), n, TRUE),
      sample(c(-5L, 0L, NA, .Machine$integer.max), n, TRUE),
      sample(c(rnorm(3), NA, NaN, -Inf), n, TRUE),
      sample(c("a", "", NA, "\u00fc", "long enough"), n, TRUE),
      as.raw(sample(0:255, n)),
      NULL,
      lapply(seq_len(n), function(i) value(depth - 1))
    )
    if (!is.null(it) && runif(1) < 0.3) names(it) <- sample(c("a", "b", "", "\u00fc"), n, TRUE)
    it
  }
  values <- lapply(1:300, function(i) value(4))
  answers <- clusterApplyLB(cl, values, identity)
  expect_identical(answers, values)
})

test_that("values arrive while memory is collected at every allocation", {
  value <- list(a = 1:3, b = c(x = "y", z = NA), c = list(NULL, c(TRUE, NA), list(f = 2.5)))
  expect_identical(
    clusterCall(cl[1], function(x) {
      gctorture(TRUE)
      on.exit(gctorture(FALSE), add = TRUE, after = FALSE)
      x
    }, value)[[1]],
    value
  )
  gctorture(TRUE)
  answer <- clusterCall(cl[1], identity, value)
  gctorture(FALSE)
  expect_identical(answer[[1]], value)
})

test_that("a function that has been changed arrives changed", {
  f <- function() 1
  environment(f) <- globalenv()
  answers <- function() unlist(clusterCall(cl, f))
  expect_equal(answers(), c(1, 1))
  expect_equal(answers(), c(1, 1))
  body(f) <- quote(2)
  expect_equal(answers(), c(2, 2))
  formals(f) <- alist(x = 3)
  body(f) <- quote(x)
  expect_equal(answers(), c(3, 3))
  attr(f, "note") <- "a"
  expect_identical(clusterCall(cl[1], attributes, f)[[1]]$note, "a")
  attr(f, "note") <- "b"
  expect_identical(clusterCall(cl[1], attributes, f)[[1]]$note, "b")
  environment(f) <- asNamespace("stats")
  expect_identical(clusterCall(cl[1], environment, f)[[1]], asNamespace("stats"))
  e <- new.env()
  e$x <- 5
  environment(f) <- e
  expect_identical(clusterCall(cl[1], function(f) environment(f)$x, f)[[1]], 5)
  e$x <- 6
  expect_identical(clusterCall(cl[1], function(f) environment(f)$x, f)[[1]], 6)
})

test_that("the environment of a function arrives with its values at the time of sending", {
  # The environment is in the body, and in an attribute.
  e <- new.env()
  f <- eval(bquote(function() .(e)$x), globalenv())
  g <- structure(function() attr(sys.function(), "e")$x, e = e)
  environment(g) <- globalenv()
  for (x in 1:3) {
    e$x <- x
    expect_identical(clusterCall(cl[1], f)[[1]], x)
    expect_identical(clusterCall(cl[1], g)[[1]], x)
  }
  counter <- local({
    n <- 0
    function() n <<- n + 1
  })
  expect_identical(unlist(clusterCall(cl[c(1, 1, 1)], counter)), c(1, 1, 1))
  counter()
  expect_identical(clusterCall(cl[1], counter)[[1]], 2)
})

test_that("a worker's copy of a function does not contain changes by tasks", {
  f <- eval(quote(function(x) x), globalenv())
  marked <- function(f) {
    before <- isdebugged(f)
    debug(f)
    before
  }
  environment(marked) <- globalenv()
  for (i in 1:3) expect_identical(clusterCall(cl[1], marked, f), list(FALSE))
})

test_that("more functions than the cache holds arrive", {
  functions <- lapply(1:30, function(i) eval(bquote(function(x) x + .(i)), globalenv()))
  for (round in 1:2) {
    expect_equal(unlist(lapply(functions, function(f) clusterCall(cl[1], f, 0))), 1:30 + 0)
  }
  sourced <- eval(parse(text = "function(x) {\n  x # a comment\n}", keep.source = TRUE), globalenv())
  for (round in 1:2) {
    expect_identical(clusterCall(cl[1], deparse, sourced)[[1]], deparse(sourced))
  }
})

test_that("an answer has the same fields as in parallel", {
  node <- cl[[1]]
  parallel:::sendCall(node, Sys.sleep, list(0.05), tag = 7L)
  answer <- parallel:::recvData(node)
  expect_named(answer, c("type", "value", "success", "time", "tag"))
  expect_identical(answer[c("type", "value", "success", "tag")],
                   list(type = "VALUE", value = NULL, success = TRUE, tag = 7L))
  expect_s3_class(answer$time, "proc_time")
  expect_named(answer$time, names(proc.time()))
  expect_gt(answer$time[["elapsed"]], 0.04)
  expect_lt(answer$time[["elapsed"]], 30)
})

test_that("messages and answers of any size reach another machine and return", {
  ssh <- local_sshd()
  far <- over_ssh(ssh, c("127.0.0.2" = 2))
  both <- c(far, cl)
  same <- eval(parse(text = "function(x) x", keep.source = FALSE), globalenv())
  sizes <- c(1, 500, 1000 * c(1:8, 12, 16, 24, 31, 32, 33, 40, 64, 65, 200))
  values <- list(
    text = function(n) paste(sample(letters, n, TRUE), collapse = ""), texts = function(n) sample(letters, n / 8 + 1, TRUE),
    double = function(n) runif(n / 8 + 1), integer = function(n) sample.int(1e6, n / 4 + 1),
    raw = function(n) as.raw(sample.int(255, n, TRUE)), list = function(n) as.list(runif(n / 40 + 1))
  )
  for (kind in names(values)) for (n in sizes) {
    # Each value is new: the host has a cache of what it was sent before.
    info <- paste(kind, n)
    x <- values[[kind]](n)
    expect_identical(clusterCall(far[1], same, x), list(x), info = info)
    x <- values[[kind]](n)
    expect_identical(clusterCall(far, same, x), list(x, x), info = info)
    x <- values[[kind]](n)
    parallel:::sendCall(far[[1]], same, list(x), tag = 7L)
    expect_identical(parallel:::recvData(far[[1]])[c("value", "tag")], list(value = x, tag = 7L), info = info)
  }
  for (n in c(2000, 8000, 31000)) {
    fresh <- function() list(values$text(n), 2, values$text(n))
    x <- fresh()
    expect_identical(clusterLapplyAsync(far, x, same)$value(), x, info = n)
    x <- fresh()
    expect_identical(parLapply(both, x, same), x, info = n)
    x <- fresh()
    expect_identical(clusterLapply(both, x, same), x, info = n)
    x <- fresh()
    expect_identical(clusterApply(far[c(1, 1)], x, same), x, info = n)
    x <- values$text(n)
    expect_identical(clusterSubmit(far, nchar(x), x = x)$value(), nchar(x), info = n)
  }
  note_processes(far)
})

test_that("no process is left", {
  stopCluster(cl)
  expect_no_leftovers()
})
