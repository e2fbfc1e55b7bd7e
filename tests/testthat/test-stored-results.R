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
      cat(format(x), "\n", sep = "", file = .(file), append = TRUE)
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
    functions = list(mean, function(x) x), environments = list(globalenv(), list2env(list(a = 1), parent = emptyenv())),
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
  formula = function() y ~ x + z, expression = function() expression(a, b + c), pairlist = function() pairlist(a = 1, 2),
  builtin = function() sum, special = function() quote, fun = function() base::lapply, global = function() globalenv(),
  base = function() baseenv(), missing = function() formals(function(a, b = 2) NULL),
  altrep = function() 1:1000000, altrep_text = function() as.character(1:1000), sorted = function() sort(c(3, 1, 2)),
  big = function() as.double(seq_len(5e5)), long_text = function() strrep("ab", 1e6), wide = function() as.list(1:20000),
  deep = function() { x <- 1; for (i in 1:200) x <- list(a = x); x }, table = function() table(c("a", "b", "a")),
  error_value = function() simpleError("not raised"), try_error = function() try(stop("caught"), silent = TRUE),
  matrix = function() matrix(rep(c(1, 2), 5e4), 2), large_names = function() stats::setNames(1:1000, paste0("n", 1:1000))
))

test_that("values of all kinds come back as from PSOCK and lapply()", {
  psock <- parallel::makePSOCKcluster(1)
  on.exit(parallel::stopCluster(psock))
  make <- global(function(f) f())
  environment(make) <- globalenv()
  makers$s4 <- global(function() methods::getGenerics)
  for (f in names(makers)) environment(makers[[f]]) <- globalenv()
  expected <- parallel::parLapply(psock, makers, make)
  dir <- local_run()
  expect_identical(clusterLapply(cl, makers, make, .store = dir), expected)
  view <- clusterLapply(cl, makers, make, .store = dir, .collect = FALSE)
  all <- as.list(view)
  for (name in names(makers)) {
    expect_identical(view[[name]], expected[[name]], info = name)
    expect_identical(all[[name]], expected[[name]], info = name)
    # identical() does not compare encodings.
    if (is.character(expected[[name]])) expect_identical(Encoding(view[[name]]), Encoding(expected[[name]]), info = name)
  }
  expect_identical(view$nested, expected$nested)
  expect_null(view$no_such_element)
  expect_identical(names(view), names(makers))
  expect_identical(view[c("frame", "no")], c(list(frame = expected$frame), stats::setNames(list(NULL), NA)))
  expect_identical(read_run(dir), unname(expected))
  # A part of the list, of elements that were computed one by one.
  expect_identical(clusterLapply(cl, makers, make, .store = local_run(), .timeout = 60), expected)
  expect_identical(clusterLapply(cl, makers, make, .store = local_run(), .collect = FALSE)[], expected)
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
  on.exit(unlink(marker))
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
    say("pids", clusterPids(cl), agentPids(cl))
    clusterLapply(cl, 1:3, function(x) {
      if (x == 3) Sys.sleep(600)
      x
    }, .store = run, .sync = 0, .onResult = function(i, value) if (i == 2) say("two"))
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
  # In one session.
  expect_error(
    clusterLapply(cl, 1:3, fun, .store = dir, .timeout = 0.5, .errors = "return", .onResult = function(i, value) {
      clusterLapply(NULL, 1:3, fun, .store = dir)
    }),
    "."
  )
})
