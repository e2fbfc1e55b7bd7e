# clusterLapply() with `.store`. The oracle is lapply(), and PSOCK for values that workers make.

watch_processes()

# Returns a path for a run, which is removed at the end of the calling frame.
local_run <- function(.frame = parent.frame()) {
  dir <- tempfile("run-")
  do.call("on.exit", list(bquote(unlink(.(dir), recursive = TRUE)), add = TRUE, after = FALSE), envir = .frame)
  dir
}

# Returns a function that notes its element in a file, and the elements that were noted since the last call.
counted <- function(fun, .frame = parent.frame()) {
  file <- tempfile("computed-")
  file.create(file)
  do.call("on.exit", list(bquote(unlink(.(file))), add = TRUE, after = FALSE), envir = .frame)
  list(
    fun = eval(bquote(function(x) {
      cat(paste0(format(x), "\n"), file = .(file), append = TRUE)
      (.(fun))(x)
    }), globalenv()),
    computed = function() {
      lines <- readLines(file)
      file.create(file)
      sort(as.numeric(lines))
    }
  )
}

result_files <- function(dir) list.files(file.path(dir, "results"), full.names = TRUE)

# The reader of the vignette "Long runs", which needs base R only.
read_run <- function(dir) {
  info <- readRDS(file.path(dir, "run.rds"))
  results <- vector("list", info$elements)
  done <- logical(info$elements)
  for (path in sort(list.files(file.path(dir, "results"), "[.]rcr$", full.names = TRUE))) {
    bytes <- readBin(path, "raw", file.size(path))
    at <- 32L
    while (at + 64L <= length(bytes)) {
      ints <- readBin(bytes[at + 1:16], "integer", 4L)
      if (!identical(ints[[1L]], readBin(charToRaw("RCR1"), "integer"))) break
      length <- readBin(bytes[at + 17:24], "double")
      elements <- readBin(bytes[at + 64L + seq_len(4L * ints[[3L]])], "integer", ints[[3L]])
      at <- at + 64L + 4L * ints[[3L]]
      if (at + length > length(bytes)) break
      value <- unserialize(bytes[at + seq_len(length)])
      at <- at + length
      if (ints[[4L]] == 1L && all(done[elements])) next
      results[elements] <- if (ints[[2L]] == 1L) value else list(value)
      done[elements] <- ints[[4L]] == 0L
    }
  }
  if (is.null(info$ids)) results[seq_len(info$n)] else results[info$ids]
}

cl <- local_cluster(2)

test_that("a run gives what lapply() gives, from the workers, from the disk and in part", {
  dir <- local_run()
  square <- global(function(x, by = 1) x^2 * by)
  expected <- lapply(1:200, square, by = 3)
  expect_identical(clusterLapply(cl, 1:200, square, by = 3, .store = dir), expected)
  expect_identical(clusterLapply(cl, 1:200, square, by = 3, .store = dir), expected)
  view <- clusterLapply(cl, 1:200, square, by = 3, .store = dir, .collect = FALSE)
  expect_s3_class(view, "rustcluster_results")
  expect_length(view, 200L)
  expect_identical(as.list(view), expected)
  expect_identical(view[c(3, 200, 3)], expected[c(3, 200, 3)])
  expect_identical(view[-(1:195)], expected[-(1:195)])
  expect_identical(view[], expected)
  expect_identical(view[[7]], expected[[7]])
  expect_identical(lapply(view, identity), expected)
  expect_null(names(view))
  expect_error(view[[201]], class = "rustcluster_bad_argument")
  expect_error(view[[0]], class = "rustcluster_bad_argument")
  expect_error(view[["a"]], class = "rustcluster_bad_argument")
  expect_output(print(view), "200 elements")
  expect_identical(read_run(dir), expected)
})

test_that("all kinds of X are those of lapply()", {
  inputs <- list(
    empty = list(), none = integer(), null = NULL, list = list(1, "a", NULL, list(2)), frame = data.frame(a = 1:3, b = letters[1:3]),
    named = c(x = 1, y = 2), text = c("a", NA, "\u00e9"), factor = factor(c("u", "v", "u")), date = as.Date("2024-02-29") + 0:2,
    time = as.POSIXct("2024-02-29", tz = "UTC") + 0:1, raw = as.raw(1:3), complex = c(1i, 2), logical = c(TRUE, NA),
    functions = list(mean, function(x) x), environments = list(emptyenv(), list2env(list(a = 1), parent = emptyenv())),
    expressions = expression(a + b, c), duplicates = c(1, 1, 2), partly = c(a = 1, 2), nan = c(NA, NaN, Inf, -0)
  )
  shape <- global(function(x) list(class(x), length(x), typeof(x)))
  for (name in names(inputs)) {
    dir <- local_run()
    expected <- lapply(inputs[[name]], shape)
    expect_identical(clusterLapply(cl, inputs[[name]], shape, .store = dir), expected, info = name)
    view <- clusterLapply(cl, inputs[[name]], shape, .store = dir, .collect = FALSE)
    expect_identical(as.list(view), expected, info = name)
    expect_identical(names(view), names(expected), info = name)
    expect_identical(clusterLapply(cl, inputs[[name]], shape, .store = dir), expected, info = name)
  }
})

# Functions that make values of all kinds in a worker.
makers <- global(list(
  null = function() NULL, true = function() TRUE, na = function() NA, int = function() 1:3, int_na = function() NA_integer_,
  double = function() c(1.5, NA, NaN, Inf, -Inf, -0), complex = function() complex(real = 1, imaginary = NaN),
  raw = function() as.raw(0:255), text = function() c("a", NA, ""), utf8 = function() "\u00e9\u4e2d",
  latin1 = function() { x <- "\xe9"; Encoding(x) <- "latin1"; x },
  bytes = function() { x <- "\xff\xfe"; Encoding(x) <- "bytes"; x },
  native = function() "\xe9",
  named = function() c(a = 1, b = 2), empty_name = function() c(a = 1, 2), na_name = function() structure(1:2, names = c("a", NA)),
  nested = function() list(a = list(b = list(c = 1:3, d = NULL)), list("x")),
  names_twice = function() list(c(names = 1), c(a = 2), list(names = "names")),
  zero = function() list(integer(), character(), double(), list(), raw(), NULL, data.frame()),
  attributes = function() structure(1:4, dim = c(2L, 2L), dimnames = list(c("a", "b"), NULL), note = "x"),
  classed = function() structure(list(1), class = c("a", "b")), factor = function() factor(c("u", NA, "v"), levels = c("v", "u")),
  frame = function() data.frame(x = 1:3, y = c("a", "b", NA), z = I(list(1, 2, 3))),
  date = function() as.Date("2024-02-29"), time = function() as.POSIXct(1e9, origin = "1970-01-01", tz = "UTC"),
  time_lt = function() as.POSIXlt(1e9, origin = "1970-01-01", tz = "UTC"), diff = function() as.difftime(3, units = "mins"),
  s4 = function() methods::new("numeric_version"), symbol = function() quote(a), call = function() quote(f(x, y = 2)[, 1]),
  formula = function() stats::as.formula(quote(y ~ x + z), globalenv()), expression = function() expression(a, b + c), pairlist = function() pairlist(a = 1, 2),
  builtin = function() sum, special = function() quote, fun = function() base::lapply, global = function() globalenv(),
  base = function() baseenv(), missing = function() formals(function(a, b = 2) NULL),
  altrep = function() 1:1000000, altrep_text = function() as.character(1:1000), sorted = function() sort(c(3, 1, 2)),
  big = function() as.double(seq_len(5e5)), long_text = function() strrep("ab", 1e6), wide = function() as.list(1:2000),
  deep = function() { x <- 1; for (i in 1:200) x <- list(a = x); x }, table = function() table(c("a", "b", "a")),
  error_value = function() simpleError("not raised"), try_error = function() try(stop("caught"), silent = TRUE),
  matrix = function() matrix(rep(c(1, 2), 5e4), 2), large_names = function() stats::setNames(1:1000, paste0("n", 1:1000))
))

test_that("values of all kinds come back as from PSOCK and lapply()", {
  psock <- parallel::makePSOCKcluster(1)
  on.exit(parallel::stopCluster(psock), add = TRUE, after = FALSE)
  make <- global(function(f) f())
  environment(make) <- globalenv()
  makers$s4 <- global(function() methods::getGenerics)
  for (f in names(makers)) environment(makers[[f]]) <- globalenv()
  expected <- parallel::parLapply(psock, makers, make)
  dir <- local_run()
  expect_true(identical(clusterLapply(cl, makers, make, .store = dir), expected))
  view <- clusterLapply(cl, makers, make, .store = dir, .collect = FALSE)
  all <- as.list(view)
  for (name in names(makers)) {
    expect_true(identical(view[[name]], expected[[name]]), info = name)
    expect_true(identical(all[[name]], expected[[name]]), info = name)
    # identical() does not compare encodings.
    if (is.character(expected[[name]])) expect_identical(Encoding(view[[name]]), Encoding(expected[[name]]), info = name)
  }
  expect_identical(view$nested, expected$nested)
  expect_null(view$no_such_element)
  expect_identical(names(view), names(makers))
  expect_identical(view[c("frame", "no")], c(list(frame = expected$frame), stats::setNames(list(NULL), NA)))
  expect_true(identical(read_run(dir), unname(expected)))
  # A part of the list, of elements that were computed one by one.
  expect_true(identical(clusterLapply(cl, makers, make, .store = local_run(), .timeout = 60), expected))
  expect_true(identical(clusterLapply(cl, makers, make, .store = local_run(), .collect = FALSE)[], expected))
})

test_that("values with environments, functions and S4 objects come back", {
  dir <- local_run()
  make <- global(function(i) {
    methods::setClass("StoredPoint", representation(x = "numeric"), where = globalenv())
    e <- new.env()
    e$self <- e
    e$i <- i
    list(point = methods::new("StoredPoint", x = i), env = e, fun = local({
      k <- i
      function(x) x + k
    }))
  })
  clusterLapply(cl, 1:3, make, .store = dir)
  view <- clusterLapply(cl, 1:3, make, .store = dir, .collect = FALSE)
  for (i in 1:3) {
    value <- view[[i]]
    expect_identical(attr(value$point, "x"), i)
    expect_identical(value$env$self, value$env)
    expect_identical(value$env$i, i)
    expect_equal(value$fun(1), i + 1)
  }
})

test_that("only what is missing is computed", {
  dir <- local_run()
  marker <- tempfile("heal-")
  on.exit(unlink(marker), add = TRUE, after = FALSE)
  g <- counted(bquote(function(x) if (x %in% c(3, 8) && !file.exists(.(marker))) stop("no ", x) else x * 2))
  got <- clusterLapply(cl, 1:10, g$fun, .store = dir, .errors = "return")
  expect_identical(g$computed(), as.numeric(1:10))
  expect_s3_class(got[[3]], "try-error")
  expect_identical(conditionMessage(attr(got[[8]], "condition")), "no 8")
  # Errors are tried again, or kept.
  expect_identical(clusterLapply(cl, 1:10, g$fun, .store = dir, .errors = "return"), got)
  expect_identical(g$computed(), c(3, 8))
  expect_identical(clusterLapply(cl, 1:10, g$fun, .store = dir, .errors = "return", .retry_errors = FALSE), got)
  expect_identical(g$computed(), numeric())
  error <- expect_error(
    clusterLapply(cl, 1:10, g$fun, .store = dir, .retry_errors = FALSE), class = "rustcluster_element_failed"
  )
  expect_identical(error$indices, c(3L, 8L))
  expect_identical(error$results[c(1:2, 4:7, 9:10)], as.list(2 * c(1:2, 4:7, 9:10)))
  expect_identical(conditionMessage(error$parent), "no 3")
  error <- expect_error(
    clusterLapply(cl, 1:10, g$fun, .store = dir, .retry_errors = FALSE, .collect = FALSE),
    class = "rustcluster_element_failed"
  )
  expect_s3_class(error$results, "rustcluster_results")
  expect_identical(error$results[[4]], 8)
  expect_s3_class(error$results[[3]], "try-error")
  expect_identical(g$computed(), numeric())
  # "stop" raises the error that it met, and at once if it is kept.
  error <- expect_error(
    clusterLapply(cl, 1:10, g$fun, .store = dir, .errors = "stop", .order = 10:1), class = "rustcluster_element_failed"
  )
  expect_match(conditionMessage(error), "no [38]")
  g$computed()
  expect_error(
    clusterLapply(cl, 1:10, g$fun, .store = dir, .errors = "stop", .retry_errors = FALSE),
    class = "rustcluster_element_failed"
  )
  expect_identical(g$computed(), numeric())
  file.create(marker)
  expect_identical(clusterLapply(cl, 1:10, g$fun, .store = dir), as.list(2 * 1:10))
  expect_identical(g$computed(), c(3, 8))
  expect_identical(clusterLapply(cl, 1:10, g$fun, .store = dir), as.list(2 * 1:10))
  expect_identical(g$computed(), numeric())
})

test_that("worker failures and timeouts are stored", {
  dir <- local_run()
  die <- global(function(x) switch(x, "a", quit("no", 3L), Sys.sleep(600), "d"))
  for (collect in c(TRUE, FALSE)) {
    got <- suppressWarnings(clusterLapply(
      cl, 1:4, die, .store = dir, .errors = "return", .timeout = 1, .retries = 0, .collect = collect, .retry_errors = collect
    ))
    expect_identical(got[c(1, 4)], list("a", "d"))
    expect_s3_class(attr(got[[2]], "condition"), "rustcluster_task_failed")
    expect_s3_class(attr(got[[3]], "condition"), "rustcluster_timeout")
    for (again in c(TRUE, FALSE)) expect_error(
      suppressWarnings(clusterLapply(
        cl, 1:4, die, .store = dir, .timeout = 1, .retries = 0, .collect = collect, .retry_errors = FALSE
      )),
      class = "rustcluster_task_failed"
    )
  }
})

test_that(".onResult gets results that are durable", {
  for (collect in c(TRUE, FALSE)) {
    dir <- local_run()
    seen <- list()
    early <- 0L
    look <- function(i, value) {
      seen[[i]] <<- value
      # As another process sees the files.
      if (length(seen) %% 20L == 1L && !identical(read_run(dir)[[i]], value)) early <<- early + 1L
    }
    got <- clusterLapply(cl, 1:100, global(function(x) c(x, 1)), .store = dir, .onResult = look, .collect = collect)
    expect_identical(early, 0L)
    expect_identical(seen, lapply(1:100, function(x) c(x, 1)))
    expect_identical(as.list(got), seen)
    calls <- 0L
    clusterLapply(cl, 1:100, global(function(x) c(x, 1)), .store = dir, .onResult = function(i, value) calls <<- calls + 1L)
    expect_identical(calls, 0L)
  }
})

test_that("a resumed run with a seed is an undisturbed one", {
  draw <- global(function(x) c(x, rnorm(2)))
  undisturbed <- clusterLapply(cl, 1:30, draw, .seed = 7)
  dir <- local_run()
  expect_error(clusterLapply(
    cl, 1:30, draw, .seed = 7, .store = dir, .order = 30:1, .sync = 0, .onResult = function(i, value) if (i == 15) stop("enough")
  ), "enough")
  done <- sum(lengths(read_run(dir)) > 0L)
  expect_true(done >= 1L)
  expect_identical(clusterLapply(cl, 1:30, draw, .seed = 7, .store = dir), undisturbed)
  error <- expect_error(clusterLapply(cl, 1:30, draw, .seed = 8, .store = dir), class = "rustcluster_run_differs")
  expect_identical(error$differs, "`.seed` was 7 and is 8")
  expect_error(clusterLapply(cl, 1:30, draw, .store = dir), "`.seed` was 7 and is FALSE", class = "rustcluster_run_differs")
  # TRUE goes on with the stored seed, and does not touch the generator of this session then.
  expect_identical(clusterLapply(cl, 1:30, draw, .seed = TRUE, .store = dir), undisturbed)
  drawn <- local_run()
  set.seed(5)
  first <- clusterLapply(cl, 1:10, draw, .seed = TRUE, .store = drawn)
  set.seed(5)
  expect_identical(clusterLapply(cl, 1:10, draw, .seed = TRUE), first)
  unlink(result_files(drawn))
  expect_identical(clusterLapply(cl, 1:10, draw, .seed = TRUE, .store = drawn), first)
})

test_that("an interrupt loses nothing that was reported", {
  dir <- local_run()
  f <- counted(quote(function(x) {
    Sys.sleep(0.02)
    -x
  }))
  reported <- integer()
  interrupted(
    clusterLapply(cl, 1:400, f$fun, .store = dir, .sync = 0, .onResult = function(i, value) reported <<- c(reported, i)), 1
  )
  # A worker may begin an element at the moment of the interrupt.
  expect_true(wait_until(function() all(clusterStatus(cl, memory = FALSE)$state == "idle")))
  first <- f$computed()
  saved <- which(lengths(read_run(dir)) > 0L)
  expect_true(length(reported) > 0L && all(reported %in% saved))
  expect_identical(clusterLapply(cl, 1:400, f$fun, .store = dir), lapply(1:400, function(x) -x))
  expect_identical(f$computed(), as.numeric(setdiff(1:400, saved)))
})

test_that("nodes of two clusters store as those of one", {
  other <- local_cluster(2)
  dir <- local_run()
  f <- counted(quote(function(x) if (x == 5) stop("five") else c(x, stats::runif(1))))
  both <- c(cl, other)
  expected <- clusterLapply(cl, 1:20, f$fun, .seed = 3, .errors = "return")
  f$computed()
  got <- clusterLapply(both, 1:20, f$fun, .seed = 3, .store = dir, .errors = "return")
  expect_identical(got[-5], expected[-5])
  expect_s3_class(got[[5]], "try-error")
  expect_identical(f$computed(), as.numeric(1:20))
  view <- clusterLapply(both, 1:20, f$fun, .seed = 3, .store = dir, .errors = "return", .collect = FALSE)
  expect_identical(f$computed(), 5)
  expect_identical(view[-5], expected[-5])
})

test_that("a second writer gets an error, and a killed one leaves no lock", {
  dir <- local_run()
  child <- start_child({
    cl <- makeRustCluster(1)
    say("pids", paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
    clusterLapply(cl, 1:3, function(x) {
      if (x == 3) Sys.sleep(600)
      x
    }, .store = run, .sync = 0, .timeout = 1e5, .onResult = function(i, value) if (i == 2) say("two"))
  }, values = list(run = dir))
  child_wait_for(child, "two")
  fun <- global(function(x) {
    if (x == 3) Sys.sleep(600)
    x
  })
  error <- expect_error(clusterLapply(cl, 1:3, fun, .store = dir), class = "rustcluster_run_locked")
  expect_identical(error$pid, child$pid)
  expect_identical(error$host, Sys.info()[["nodename"]])
  expect_identical(error$dir, normalizePath(dir))
  pids <- child_pids(child, "pids")
  child_signal(child, tools::SIGKILL)
  child_wait_end(child)
  expect_gone(pids, within = 5)
  results <- clusterLapply(cl, 1:3, fun, .store = dir, .timeout = 0.5, .errors = "return")
  expect_identical(results[1:2], list(1L, 2L))
  expect_s3_class(attr(results[[3]], "condition"), "rustcluster_timeout")
  # In one session, too.
  other <- local_cluster(1)
  error <- NULL
  clusterLapply(cl, 1:2, fun, .store = local_run(), .onResult = function(i, value) {
    same <- list.files(dirname(dir), "^run-", full.names = TRUE)
    error <<- tryCatch(clusterLapply(other, 1:2, fun, .store = same[[which.max(file.mtime(same))]]), error = identity)
  })
  expect_s3_class(error, "rustcluster_run_locked")
  expect_identical(error$pid, Sys.getpid())
})

# What is the same call, and what is another one -----------------------------------------------------------------------

# Returns the fields `differs` of the error of another call, or NULL.
differs <- function(...) {
  tryCatch(
    {
      clusterLapply(cl, ...)
      NULL
    },
    rustcluster_run_differs = function(e) e$differs
  )
}

test_that("what differs is named, and nothing is changed by that", {
  dir <- local_run()
  helper <- function(x) x + offset
  offset <- 1
  f <- function(x, by = 1) helper(x) * by * scale
  scale <- 2
  assign("stored_global", 5, globalenv())
  on.exit(rm("stored_global", envir = globalenv()), add = TRUE, after = FALSE)
  g <- eval(quote(function(x) x + stored_global), globalenv())
  clusterExport(cl, "stored_global", globalenv())
  expected <- clusterLapply(cl, 1:5, f, by = 3, .store = dir)
  expect_null(differs(1:5, f, by = 3, .store = dir))
  before <- tools::md5sum(list.files(dir, full.names = TRUE, recursive = TRUE))
  expect_identical(differs(1:5, f, by = 4, .store = dir), "the argument `by` changed")
  expect_identical(differs(1:5, f, .store = dir), "the argument `by` is missing")
  expect_identical(differs(1:5, f, 3, .store = dir), c("the argument `by` is missing", "argument 1 in `...` is new"))
  expect_identical(differs(1:6, f, by = 3, .store = dir), "`X` had 5 elements and has 6")
  expect_identical(differs(1:4, f, by = 3, .store = dir), "`X` had 5 elements and has 4")
  expect_identical(differs(c(1L, 2L, 9L, 8L, 5L), f, by = 3, .store = dir), "elements 3 to 4 of `X` changed")
  expect_identical(differs(as.double(1:5), f, by = 3, .store = dir), "elements 1 to 5 of `X` changed")
  scale <- 3
  expect_identical(differs(1:5, f, by = 3, .store = dir), "`scale`, which `FUN` uses, changed")
  scale <- 2
  offset <- 2
  expect_identical(differs(1:5, f, by = 3, .store = dir), "`helper`, which `FUN` uses, changed")
  offset <- 1
  helper <- function(x) x + offset + 0
  expect_identical(differs(1:5, f, by = 3, .store = dir), "`helper`, which `FUN` uses, changed")
  helper <- function(x) x + offset
  f <- function(x, by = 1) helper(x) * by * scale + 0
  expect_identical(differs(1:5, f, by = 3, .store = dir), "the body of `FUN` changed")
  f <- function(x, by = 2) helper(x) * by * scale
  expect_identical(differs(1:5, f, by = 3, .store = dir), "the arguments of `FUN` changed")
  f <- function(x, by = 1) helper(x) * by * scale
  expect_identical(tools::md5sum(list.files(dir, full.names = TRUE, recursive = TRUE)), before)
  expect_identical(clusterLapply(cl, 1:5, f, by = 3, .store = dir), expected)
  # Variables of the global environment.
  dir <- local_run()
  clusterLapply(cl, 1:3, g, .store = dir)
  expect_null(differs(1:3, g, .store = dir))
  assign("stored_global", 6, globalenv())
  expect_identical(differs(1:3, g, .store = dir), "`stored_global`, which `FUN` uses, changed")
  # Names that the code does not show.
  dir <- local_run()
  hidden <- 1
  h <- function(x) get(paste0("hid", "den")) + x
  clusterLapply(cl, 1:3, h, .store = dir)
  hidden <- 2
  expect_identical(differs(1:3, h, .store = dir), "`hidden`, which `FUN` uses, changed")
})

test_that("state in environments counts, also of objects like those of R6", {
  dir <- local_run()
  new_counter <- function(n) {
    self <- new.env()
    self$n <- n
    self$add <- function(k) self$n + k
    self$self <- self
    class(self) <- "Counter"
    self
  }
  counter <- new_counter(1)
  f <- function(x) counter$add(x)
  expected <- clusterLapply(cl, 1:3, f, .store = dir)
  counter <- new_counter(1)
  expect_identical(clusterLapply(cl, 1:3, f, .store = dir), expected)
  counter$n <- 2
  expect_identical(differs(1:3, f, .store = dir), "`counter`, which `FUN` uses, changed")
  counter$n <- 1
  class(counter) <- "Other"
  expect_identical(differs(1:3, f, .store = dir), "`counter`, which `FUN` uses, changed")
  skip_if_not_installed("R6")
  class <- R6::R6Class("Adder", public = list(k = 1, initialize = function(k) self$k <- k, add = function(x) self$k + x))
  dir <- local_run()
  adder <- class$new(4)
  f <- function(x) adder$add(x)
  expected <- clusterLapply(cl, 1:3, f, .store = dir)
  adder <- class$new(4)
  expect_identical(clusterLapply(cl, 1:3, f, .store = dir), expected)
  adder$k <- 5
  expect_identical(differs(1:3, f, .store = dir), "`adder`, which `FUN` uses, changed")
  # S4 slots.
  methods::setClass("StoredSlot", representation(x = "numeric"), where = globalenv())
  on.exit(methods::removeClass("StoredSlot", where = globalenv()), add = TRUE, after = FALSE)
  dir <- local_run()
  point <- methods::new("StoredSlot", x = 1)
  f <- function(x) attr(point, "x") + x
  expected <- clusterLapply(cl, 1:3, f, .store = dir)
  point@x <- 2
  expect_identical(differs(1:3, f, .store = dir), "`point`, which `FUN` uses, changed")
  # Elements with functions and environments.
  dir <- local_run()
  elements <- list(function(x) x, new_counter(1), quote(a + b))
  clusterLapply(cl, elements, typeof, .store = dir)
  elements <- list(function(x) x, new_counter(1), quote(a + b))
  expect_null(differs(elements, typeof, .store = dir))
  elements[[2]]$n <- 3
  expect_identical(differs(elements, typeof, .store = dir), "element 2 of `X` changed")
  expect_identical(
    differs(list(function(x) -x, new_counter(1), quote(a + b)), typeof, .store = dir), "element 1 of `X` changed"
  )
})

test_that("functions that call each other, and themselves, are compared", {
  dir <- local_run()
  even <- function(n) if (n == 0) TRUE else odd(n - 1)
  odd <- function(n) if (n == 0) FALSE else even(n - 1)
  expected <- clusterLapply(cl, 0:5, even, .store = dir)
  expect_identical(expected, as.list(0:5 %% 2 == 0))
  expect_null(differs(0:5, even, .store = dir))
  odd <- function(n) if (n == 0) NA else even(n - 1)
  expect_identical(differs(0:5, even, .store = dir), "`odd`, which `FUN` uses, changed")
  dir <- local_run()
  factorial <- function(n) if (n < 2) 1 else n * factorial(n - 1)
  clusterLapply(cl, 1:5, factorial, .store = dir)
  expect_null(differs(1:5, factorial, .store = dir))
  # Many functions, each of which uses those before it.
  dir <- local_run()
  chain <- new.env(parent = globalenv())
  chain$f0 <- function(x) x
  for (i in 1:40) {
    body <- as.call(c(as.name("+"), lapply(paste0("f", pmax(0, i - 1:2)), function(f) call(f, quote(x)))))
    chain[[paste0("f", i)]] <- eval(call("function", as.pairlist(alist(x = )), body))
    environment(chain[[paste0("f", i)]]) <- chain
  }
  short <- chain$f3
  clusterLapply(cl, 1:2, short, .store = dir)
  expect_null(differs(1:2, short, .store = dir))
  expect_length(rustcluster:::functionHashes(chain$f40), 4L)
})

test_that("what makes no difference to the results is not a difference", {
  dir <- local_run()
  # As a script that is run again: all in one function, with the cluster, the directory and other variables in its frame.
  script <- function(run, cl, unused, kept = TRUE) {
    started <- Sys.time()
    t <- i <- x <- tmp <- runif(1)
    c <- 3
    force(unused)
    lookup <- list(a = 1)
    old <- options(keep.source = kept)
    on.exit(options(old), add = TRUE, after = FALSE)
    f <- eval(parse(text = "function(x, ...) {
      # A comment.
      tmp <- x + 1
      for (i in 1:2) tmp <- tmp + i
      if (length(n <- c(1, 2)) == 2) tmp[1] <- tmp[1] + lookup$a
      g <- function(t) t * 2
      with(list(q = 1), local(g(tmp)))
    }", keep.source = kept))
    clusterLapply(cl, 1:4, f, .store = run)
  }
  expected <- script(dir, cl, 1)
  files <- result_files(dir)
  expect_identical(script(dir, cl, 2), expected)
  expect_identical(script(dir, cl, 3, kept = FALSE), expected)
  level <- compiler::enableJIT(0)
  expect_identical(script(dir, cl, 4), expected)
  compiler::enableJIT(level)
  f <- function(x) x * k
  k <- 2
  e <- environment()
  dir <- local_run()
  clusterLapply(cl, 1:4, f, .store = dir)
  expect_null(differs(1:4, compiler::cmpfun(f), .store = dir))
  for (i in 1:5) f(i)
  expect_null(differs(1:4, f, .store = dir))
  bare <- utils::removeSource(f)
  expect_null(differs(1:4, bare, .store = dir))
  # ALTREP, or made otherwise.
  dir <- local_run()
  table <- 1:100
  f <- function(x) table[[x]]
  clusterLapply(cl, 1:4, f, .store = dir)
  table <- c(1L, 2:100)
  expect_null(differs(c(1L, 2L, 3L, 4L), f, .store = dir))
  table <- integer()
  for (i in 1:100) table[[i]] <- i
  expect_null(differs(1:4, f, .store = dir))
  table <- rev(rev(table))
  expect_null(differs(1:4, f, .store = dir))
  dir <- local_run()
  words <- as.character(1:50)
  f <- function(x) words[[x]]
  clusterLapply(cl, as.list(words), nchar, .store = dir)
  grown <- list()
  for (i in 1:50) grown[[i]] <- paste0("", i)
  expect_null(differs(grown, nchar, .store = dir))
  # The frame itself, of a function that looks up variables by name.
  dir <- local_run()
  look <- function(run, cl) {
    value <- 3
    f <- function(x) get("value") + eval(parse(text = "value"))
    clusterLapply(cl, 1:3, f, .store = run)
  }
  environment(look) <- globalenv()
  expected <- look(dir, cl)
  other <- local_cluster(1)
  old <- setwd(dirname(dir))
  on.exit(setwd(old), add = TRUE, after = FALSE)
  expect_identical(look(basename(dir), other), expected)
  expect_identical(look(paste0(dir, "/"), cl), expected)
})

test_that("another session makes the same call", {
  dir <- local_run()
  file <- tempfile("computed-")
  on.exit(unlink(file), add = TRUE, after = FALSE)
  for (i in 1:2) {
    child <- start_child({
      cl <- makeRustCluster(2)
      offset <- list(a = 1:3, f = function(x) x + 1)
      helper <- function(x) offset$f(x) + sum(offset$a)
      work <- function(x) {
        cat(paste0(x, "\n"), file = file, append = TRUE)
        helper(x)
      }
      clusterExport(cl, c("offset", "helper", "file"))
      saveRDS(clusterLapply(cl, 1:20, work, .store = run), file.path(dir, "results.rds"))
      stopCluster(cl)
    }, values = list(run = dir, file = file), args = if (i == 2L) "--vanilla")
    expect_child_ends_well(child)
    expect_equal(readRDS(file.path(child$dir, "results.rds")), as.list(1:20 + 7))
    expect_identical(sort(as.numeric(readLines(file))), as.numeric(1:20))
  }
})

# `.reuse = "same"` ----------------------------------------------------------------------------------------------------

test_that("elements with the same content keep their results", {
  f <- counted(quote(function(x) x * 10))
  call <- function(X, ...) {
    got <- clusterLapply(cl, X, f$fun, .store = dir, .reuse = "same", ...)
    expect_identical(got, lapply(X, function(x) x * 10))
    view <- clusterLapply(cl, X, f$fun, .store = dir, .collect = FALSE)
    expect_identical(as.list(view), got)
    expect_identical(unname(got), read_run(dir))
    expect_identical(view[rev(seq_along(X))], rev(got))
    f$computed()
  }
  dir <- local_run()
  expect_identical(call(c(1, 2, 3)), c(1, 2, 3))
  expect_identical(call(c(1, 2, 3, 4)), 4)
  expect_identical(call(c(1, 9, 2, 3, 4)), 9)
  expect_identical(call(c(4, 3)), numeric())
  expect_identical(call(c(1, 2, 2, 3, 2)), c(2, 2))
  expect_identical(call(c(2, 2, 2, 1)), numeric())
  expect_identical(call(c(a = 2, b = 1, c = 7)), 7)
  expect_identical(call(numeric()), numeric())
  expect_identical(call(c(1, 2, 3, 4, 9, 7)), numeric())
  expect_identical(differs(c(1, 2), f$fun, .store = dir), "`X` had 6 elements and has 2")
  # Lists, and text.
  dir <- local_run()
  words <- counted(quote(function(x) toupper(x)))
  expect_identical(clusterLapply(cl, c("a", "b"), words$fun, .store = dir, .reuse = "same"), list("A", "B"))
  expect_identical(clusterLapply(cl, list("b", "c", "a"), words$fun, .store = dir, .reuse = "same"), list("B", "C", "A"))
})

test_that("with a seed, elements keep their results at the same index", {
  dir <- local_run()
  f <- counted(quote(function(x) c(x, rnorm(1))))
  call <- function(X) {
    expected <- clusterLapply(cl, X, f$fun, .seed = 11)
    f$computed()
    expect_identical(clusterLapply(cl, X, f$fun, .seed = 11, .store = dir, .reuse = "same"), expected)
    f$computed()
  }
  expect_identical(call(c(1, 2, 3)), c(1, 2, 3))
  expect_identical(call(c(1, 2, 3, 4)), 4)
  expect_identical(call(c(1, 9, 2, 3, 4)), c(2, 3, 4, 9))
  expect_identical(call(c(1, 9, 2)), numeric())
  # Results beyond a shorter `X` are kept, and those that another element has replaced for a while.
  expect_identical(call(c(1, 9, 2, 3, 4)), numeric())
  expect_identical(call(c(1, 2, 3, 4)), numeric())
  expect_identical(call(c(4, 2)), 4)
  expect_identical(call(c(1, 9, 2, 3, 4, 5)), 5)
})

test_that("a function that becomes a primitive one has changed", {
  dir <- local_run()
  clusterLapply(cl, 1:2, function(x) x, .store = dir)
  error <- expect_error(clusterLapply(cl, 1:2, sqrt, .store = dir), class = "rustcluster_run_differs")
  expect_identical(error$differs, "`FUN` changed")
})

test_that("the error of an element says where the others are", {
  dir <- local_run()
  for (collect in c(TRUE, FALSE)) {
    error <- expect_error(
      clusterLapply(cl, 1:2, function(x) if (x > 1) stop("two") else x, .store = dir, .collect = collect),
      class = "rustcluster_element_failed"
    )
    expect_match(conditionMessage(error), "openRun(dir)$results(partial = TRUE)", fixed = TRUE)
    expect_match(conditionMessage(error), basename(dir), fixed = TRUE)
  }
})

test_that("`.reuse` needs a directory", {
  error <- expect_error(clusterLapply(cl, 1:2, sqrt, .reuse = "same"), class = "rustcluster_bad_argument")
  expect_identical(error$argument, ".reuse")
})

# Disks and directories ------------------------------------------------------------------------------------------------

test_that("a full disk is an error, and the run goes on when there is room", {
  skip_if(Sys.which("unshare") == "" || suppressWarnings(system("unshare -rm true 2>/dev/null")) != 0L, "needs unshare")
  mount <- tempfile("full-")
  dir.create(mount)
  on.exit(unlink(mount, recursive = TRUE), add = TRUE, after = FALSE)
  for (collect in c(TRUE, FALSE)) {
    child <- start_child({
      system2("mount", c("-t", "tmpfs", "-o", "size=2m", "tmpfs", mount))
      run <- file.path(mount, "run")
      cl <- makeRustCluster(2)
      make <- function(i) {
        # Results come one after the other.
        Sys.sleep(0.01)
        set.seed(i)
        as.raw(sample.int(256L, 5e4, TRUE) - 1L)
      }
      reported <- integer()
      note <- function(i, value) reported <<- c(reported, i)
      error <- tryCatch(
        clusterLapply(cl, 1:100, make, .store = run, .sync = 0, .onResult = note, .collect = collect), error = identity
      )
      say("class", class(error)[[1L]])
      say("text", conditionMessage(error))
      say("reported", length(reported))
      # Full from the start.
      fill <- file.path(mount, "fill")
      suppressWarnings(system2("dd", c("if=/dev/zero", paste0("of=", fill), "bs=1024"), stderr = FALSE))
      error <- tryCatch(clusterLapply(cl, 1:3, make, .store = file.path(mount, "other")), error = identity)
      say("other", class(error)[[1L]])
      error <- tryCatch(clusterLapply(cl, 1:100, make, .store = run), error = identity)
      say("again", class(error)[[1L]])
      unlink(fill)
      system2("mount", c("-o", "remount,size=20m", "tmpfs", mount))
      computed <- integer()
      got <- clusterLapply(cl, 1:100, make, .store = run, .onResult = function(i, value) computed <<- c(computed, i))
      say("right", identical(got, lapply(1:100, make)))
      say("twice", length(intersect(computed, reported)))
      stopCluster(cl)
    }, values = list(mount = mount, collect = collect), prefix = "exec unshare -rm")
    expect_child_ends_well(child)
    expect_identical(child_said(child, "class"), "rustcluster_run_write_failed")
    expect_match(child_said(child, "text"), "No space left on device")
    expect_gt(as.integer(child_said(child, "reported")), 0L)
    expect_identical(child_said(child, "other"), "rustcluster_run_write_failed")
    expect_identical(child_said(child, "again"), "rustcluster_run_write_failed")
    expect_identical(child_said(child, "right"), "TRUE")
    expect_identical(child_said(child, "twice"), "0")
  }
})

test_that("a limit of the size of files is an error of writing", {
  dir <- local_run()
  child <- start_child({
    cl <- makeRustCluster(2)
    error <- tryCatch(clusterLapply(cl, 1:100, function(i) rep(as.raw(i), 5e4), .store = run), error = identity)
    say("class", class(error)[[1L]])
    say("text", conditionMessage(error))
    stopCluster(cl)
  }, values = list(run = dir), prelude = "ulimit -f 1024")
  expect_child_ends_well(child)
  expect_identical(child_said(child, "class"), "rustcluster_run_write_failed")
  expect_match(child_said(child, "text"), "File too large")
  got <- clusterLapply(cl, 1:100, global(function(i) rep(as.raw(i), 5e4)), .store = dir)
  expect_identical(got, lapply(1:100, function(i) rep(as.raw(i), 5e4)))
})

test_that("directories that cannot be used are errors that say why", {
  f <- global(function(x) x)
  file <- tempfile()
  on.exit(unlink(file), add = TRUE, after = FALSE)
  writeLines("x", file)
  for (bad in list(1, c("a", "b"), NA_character_, "", character())) {
    expect_error(clusterLapply(cl, 1, f, .store = bad), class = "rustcluster_bad_argument")
  }
  expect_error(clusterLapply(cl, 1, f, .store = file), "is a file", class = "rustcluster_bad_argument")
  dir <- local_run()
  dir.create(dir)
  writeLines("x", file.path(dir, "mine.txt"))
  expect_error(clusterLapply(cl, 1, f, .store = dir), "other files", class = "rustcluster_bad_argument")
  expect_identical(setdiff(list.files(dir, all.files = TRUE, no.. = TRUE), "lock"), "mine.txt")
  # An empty directory will do, and one whose run was never begun.
  dir <- local_run()
  dir.create(file.path(dir, "results"), recursive = TRUE)
  writeLines("1 host", file.path(dir, "lock"))
  expect_identical(clusterLapply(cl, 1, f, .store = dir), list(1))
  # Files of others beside the run do no harm.
  writeLines("x", file.path(dir, "notes.txt"))
  writeBin(as.raw(1:100), file.path(dir, "results", "000099.rcr"))
  file.create(file.path(dir, "results", "readme.txt"))
  expect_identical(clusterLapply(cl, 1, f, .store = dir), list(1))
  # A newer format, and files that are none.
  info <- readRDS(file.path(dir, "run.rds"))
  info$format <- 99L
  info$package <- "9.9.9"
  saveRDS(info, file.path(dir, "run.rds"))
  expect_error(clusterLapply(cl, 1, f, .store = dir), "9.9.9", class = "rustcluster_run_unreadable")
  writeLines("no", file.path(dir, "run.rds"))
  expect_error(clusterLapply(cl, 1, f, .store = dir), "run.rds", class = "rustcluster_run_unreadable")
  saveRDS(3, file.path(dir, "run.rds"))
  expect_error(clusterLapply(cl, 1, f, .store = dir), "run.rds", class = "rustcluster_run_unreadable")
  expect_error(clusterLapply(cl, 1, f, .store = "/proc/no/run"), class = "rustcluster_run_write_failed")
  expect_error(clusterLapply(cl, 1, f, .collect = FALSE), class = "rustcluster_bad_argument")
  expect_error(clusterLapply(cl, 1, f, .store = dir, .reuse = "some"), class = "rustcluster_bad_argument")
  expect_error(clusterLapply(cl, 1, f, .store = dir, .sync = -1), class = "rustcluster_bad_argument")
  expect_error(clusterLapply(cl, 1, f, .store = dir, .retry_errors = NA), class = "rustcluster_bad_argument")
})

test_that("a directory that cannot be written is an error, and can be read", {
  skip_if(Sys.which("unshare") == "" || suppressWarnings(system("unshare -rm true 2>/dev/null")) != 0L, "needs unshare")
  dir <- local_run()
  view <- clusterLapply(cl, 1:3, sqrt, .store = dir, .collect = FALSE)
  saved <- tempfile(fileext = ".rds")
  on.exit(unlink(saved), add = TRUE, after = FALSE)
  saveRDS(view, saved)
  child <- start_child({
    system2("mount", c("--bind", run, run))
    system2("mount", c("-o", "remount,ro,bind", run, run))
    cl <- makeRustCluster(1)
    error <- tryCatch(clusterLapply(cl, 1:3, sqrt, .store = run), error = identity)
    say("class", class(error)[[1L]])
    say("text", conditionMessage(error))
    view <- readRDS(saved)
    say("read", identical(as.list(view), lapply(1:3, sqrt)), length(view), view[[3]])
    stopCluster(cl)
  }, values = list(run = dir, saved = saved), prefix = "exec unshare -rm")
  expect_child_ends_well(child)
  expect_identical(child_said(child, "class"), "rustcluster_run_write_failed")
  expect_match(child_said(child, "text"), "Read-only file system")
  expect_identical(child_said(child, "read"), paste("TRUE 3", sqrt(3)))
})

test_that("all names of a directory are one", {
  dir <- local_run()
  f <- counted(quote(function(x) -x))
  old <- setwd(dirname(dir))
  on.exit(setwd(old), add = TRUE, after = FALSE)
  name <- basename(dir)
  expect_identical(clusterLapply(cl, 1:3, f$fun, .store = name), list(-1L, -2L, -3L))
  link <- tempfile("link-")
  file.symlink(dir, link)
  on.exit(unlink(link), add = TRUE, after = FALSE)
  home <- Sys.getenv("HOME")
  Sys.setenv(HOME = dirname(dir))
  on.exit(Sys.setenv(HOME = home), add = TRUE, after = FALSE)
  expect_identical(f$computed(), as.numeric(1:3))
  names <- c(name, paste0(name, "/"), paste0(name, "//"), file.path(".", name), file.path(dir, "."), link, paste0(link, "/"))
  if (path.expand("~") == dirname(dir)) names <- c(names, file.path("~", name))
  for (path in names) {
    expect_identical(clusterLapply(cl, 1:3, f$fun, .store = path), list(-1L, -2L, -3L), info = path)
    expect_identical(f$computed(), numeric(), info = path)
  }
  view <- clusterLapply(cl, 1:3, f$fun, .store = name, .collect = FALSE)
  expect_identical(f$computed(), numeric())
  nested <- clusterLapply(cl, 1:3, f$fun, .store = file.path(name, "sub", "run"), .collect = FALSE)
  setwd("/")
  expect_identical(view[[2]], -2L)
  expect_identical(unserialize(serialize(view, NULL))[[2]], -2L)
  expect_identical(unserialize(serialize(nested, NULL))[[3]], -3L)
})

test_that("a damaged result is noticed, and computed again", {
  dir <- local_run()
  f <- counted(quote(function(x) rep(x, 1000)))
  expected <- lapply(1:20, function(x) rep(x, 1000))
  expect_identical(clusterLapply(cl, 1:20, f$fun, .store = dir, .sync = 0, .timeout = 60), expected)
  f$computed()
  # Only bytes that the file says are durable are not checked when the run is opened.
  file <- result_files(dir)
  bytes <- readBin(file, "raw", file.size(file))
  heads <- grepRaw("RCR1", bytes, fixed = TRUE, all = TRUE)
  expect_gt(length(heads), 2L)
  # Elements of which a worker computes several in a short time share a record.
  integers <- function(after, n) readBin(bytes[heads[[1]] + after + seq_len(4 * n) - 1], "integer", n)
  elements <- integers(64, integers(8, 1))
  bytes[heads[[1]] + 64 + 2000] <- xor(bytes[heads[[1]] + 64 + 2000], as.raw(4))
  writeBin(bytes, file)
  view <- clusterLapply(cl, 1:20, f$fun, .store = dir, .collect = FALSE)
  error <- expect_error(view[[elements[[1]]]], class = "rustcluster_run_damaged")
  expect_identical(error$file, normalizePath(file))
  # From now on the elements of the record count as ones without a result.
  all <- as.list(view)
  expect_identical(all[elements], rep(list(NULL), length(elements)))
  expect_identical(all[-elements], expected[-elements])
  got <- clusterLapply(cl, 1:20, f$fun, .store = dir)
  expect_identical(got, expected)
  expect_identical(f$computed(), sort(as.numeric(elements)))
  expect_identical(clusterLapply(cl, 1:20, f$fun, .store = dir), expected)
  expect_identical(f$computed(), numeric())
  view <- clusterLapply(cl, 1:20, f$fun, .store = dir, .collect = FALSE)
  expect_identical(as.list(view), expected)
})

test_that("a saved view reads the same run in another session, and no other run", {
  dir <- local_run()
  view <- clusterLapply(cl, c(a = 1, b = 4), sqrt, .store = dir, .collect = FALSE)
  saved <- tempfile(fileext = ".rds")
  on.exit(unlink(saved), add = TRUE, after = FALSE)
  saveRDS(view, saved)
  child <- start_child({
    view <- readRDS(saved)
    say("got", view[["b"]], view$a, length(view), toString(names(view)))
    say("all", identical(as.list(view), list(a = 1, b = 2)))
  }, values = list(saved = saved))
  expect_child_ends_well(child)
  expect_identical(child_said(child, "got"), "2 1 2 a, b")
  expect_identical(child_said(child, "all"), "TRUE")
  unlink(dir, recursive = TRUE)
  expect_error(readRDS(saved)[[1]], class = "rustcluster_run_unreadable")
  clusterLapply(cl, c(a = 1, b = 9), sqrt, .store = dir)
  expect_error(readRDS(saved)[[1]], "another", class = "rustcluster_run_unreadable")
})

test_that("a view tells what is missing", {
  dir <- local_run()
  f <- global(function(x) if (x == 2) stop("two") else x)
  expect_error(
    clusterLapply(cl, 1:3, f, .store = dir, .errors = "stop", .timeout = 60, .order = c(2, 1, 3)),
    class = "rustcluster_element_failed"
  )
  view <- rustcluster:::resultsView(rustcluster:::openStore(dir))
  counts <- rustcluster:::storeCounts(rustcluster:::openStore(dir))
  expect_identical(counts[["failed"]], 1L)
  missing <- which(rustcluster:::storeStates(rustcluster:::openStore(dir)) == 0L)
  for (i in missing) {
    error <- expect_error(view[[i]], class = "rustcluster_not_computed")
    expect_identical(error$index, i)
  }
  expect_output(print(view), "errors: 1")
})

test_that("functions for lists work on a view, or raise an error", {
  cl <- local_cluster(1)
  dir <- tempfile("run-")
  on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
  view <- clusterLapply(cl, c(a = 1, b = NA, c = 9), identity, .store = dir, .collect = FALSE)
  list <- as.list(view)
  functions <- list(
    unlist, c, is.na, anyNA, lengths, as.vector, as.numeric, as.integer, as.logical, as.character, rev, names, length,
    seq_along, function(x) head(x, 2), function(x) tail(x, 2), function(x) c(x, list(5)), function(x) lapply(x, identity),
    function(x) vapply(x, identity, 0), function(x) Map(`+`, x, 1), function(x) Filter(is.na, x),
    function(x) Reduce(`+`, x), function(x) unlist(x, use.names = FALSE)
  )
  for (fun in functions) expect_identical(fun(view), fun(list))
  expect_identical(clusterLapply(cl, view, identity), list)
  expect_error(names(view) <- 1:3, "as.list", class = "rustcluster_bad_argument")
  expect_error(length(view) <- 1L, "as.list", class = "rustcluster_bad_argument")
  expect_error(for (x in view) NULL, "invalid")
  expect_error(do.call(sum, view), "must be a list")
  # Those that earlier versions have saved are lists.
  expect_identical(unlist(structure(list(store = get("store", view)), class = class(view))), unlist(list))
})

test_that("large results are stored, as they are", {
  dir <- local_run()
  make <- global(function(i) {
    # The kind that a task with a seed has left behind may be another one.
    set.seed(i, "Mersenne-Twister", "Inversion", "Rejection")
    if (i %% 2) stats::runif(2e6) else as.list(stats::runif(1e5))
  })
  expected <- lapply(1:6, make)
  view <- clusterLapply(cl, 1:6, make, .store = dir, .collect = FALSE)
  for (i in 1:6) expect_true(identical(view[[i]], expected[[i]]))
  expect_true(identical(clusterLapply(cl, 1:6, make, .store = dir), expected))
})

test_that("nothing is left", {
  stop_quietly(cl)
  expect_no_leftovers()
})
