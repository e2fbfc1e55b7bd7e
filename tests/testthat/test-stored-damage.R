# Stored results that are damaged, interrupted, or copied with their directory.

spaced <- strip_srcref(function(i) {
  Sys.sleep(0.03)
  rep(i, 1e4)
})
environment(spaced) <- globalenv()

# Overwrites some bytes in the payload of the first record of a run.
damage <- function(dir) {
  file <- list.files(file.path(dir, "results"), full.names = TRUE)[[1L]]
  con <- file(file, "r+b")
  on.exit(close(con), add = TRUE, after = FALSE)
  seek(con, 1000L, rw = "write")
  writeBin(as.raw(rep(255L, 9L)), con)
}

test_that("a damaged result counts as missing once it was noticed, in all sessions", {
  cl <- local_cluster(2)
  dir <- tempfile("run")
  # Elements become durable one after the other.
  clusterLapply(cl, 1:20, spaced, .store = dir, .sync = 0, .timeout = 100)
  damage(dir)
  view <- clusterLapply(cl, 1:20, spaced, .store = dir, .collect = FALSE)
  errors <- vapply(1:20, function(i) {
    tryCatch({
      view[[i]]
      ""
    }, error = function(e) class(e)[[1L]])
  }, "")
  expect_identical(sum(errors == "rustcluster_run_damaged"), 1L)
  expect_identical(openRun(dir)$status()$done, 19L)
  expect_match(paste(utils::capture.output(print(view)), collapse = " "), "missing: 1")
  view <- clusterLapply(cl, 1:20, spaced, .store = dir, .collect = FALSE)
  expect_identical(as.list(view), lapply(1:20, spaced))
  expect_identical(clusterLapply(cl, 1:20, spaced, .store = dir), lapply(1:20, spaced))
})

test_that("as.list() of a view does not hide a damaged result, and collecting computes it again", {
  cl <- local_cluster(2)
  dir <- tempfile("run")
  view <- clusterLapply(cl, 1:20, spaced, .store = dir, .sync = 0, .timeout = 100, .collect = FALSE)
  damage(dir)
  expect_error(as.list(view), class = "rustcluster_run_damaged")
  other <- tempfile("run")
  clusterLapply(cl, 1:20, spaced, .store = other, .sync = 0, .timeout = 100)
  damage(other)
  expect_warning(
    values <- clusterLapply(cl, 1:20, spaced, .store = other), class = "rustcluster_run_damaged"
  )
  expect_identical(values, lapply(1:20, spaced))
})

test_that("an element that is cut off is missing, and not an error", {
  cl <- local_cluster(2)
  for (save in c("head", "hosts")) {
    dir <- tempfile("run")
    begun <- tempfile("begun")
    fun <- strip_srcref(function(i, begun) {
      if (i > 4L) {
        cat("begun\n", file = begun, append = TRUE)
        Sys.sleep(if (file.exists(paste0(begun, ".again"))) 0 else 20)
      }
      i
    })
    environment(fun) <- globalenv()
    stopped <- tryCatch(
      clusterLapply(cl, 1:8, fun, begun = begun, .store = dir, .save = save, .timeout = 100, .onResult = function(i, v) {
        wait_until(function() file.exists(begun) && length(readLines(begun)) == 2L, 20)
        if (i == 4L) stop("enough")
      }),
      error = conditionMessage
    )
    expect_identical(stopped, "enough")
    file.create(paste0(begun, ".again"))
    # The workers have been interrupted: nothing was saved of that.
    values <- clusterLapply(cl, 1:8, fun, begun = begun, .store = dir, .save = save, .retry_errors = FALSE)
    expect_identical(values, as.list(1:8))
  }
})

test_that("a call that stops at an error leaves on hosts what it has not taken", {
  cl <- local_cluster(2)
  saved <- tempfile("saved")
  namespace <- asNamespace("rustcluster")
  suppressMessages(trace("beginSaving", where = namespace, exit = quote(store$save$nonce <- "other"), print = FALSE))
  on.exit(suppressMessages(untrace("beginSaving", where = namespace)), add = TRUE, after = FALSE)
  gate <- tempfile("gate")
  log <- tempfile("log")
  fun <- strip_srcref(function(i, gate, log) {
    if (!file.exists(gate)) {
      if (i == 1L) {
        # The other worker has saved its result by then.
        Sys.sleep(0.5)
        stop("first")
      }
      Sys.sleep(if (i == 2L) 0 else 20)
    }
    cat(paste0(i, "\n"), file = log, append = TRUE)
    i
  })
  environment(fun) <- globalenv()
  run <- tempfile("run")
  call <- function(...) {
    clusterLapply(cl, 1:4, fun, gate = gate, log = log, .store = run, .save = "hosts", .save_dir = saved,
                  .timeout = 100, ...)
  }
  expect_error(call(.errors = "stop"), class = "rustcluster_element_failed")
  expect_true(file.exists(file.path(run, "probe")))
  file.create(gate)
  expect_identical(call(), as.list(1:4))
  expect_identical(sort(as.integer(readLines(log))), 1:4)
  expect_length(list.files(saved, recursive = TRUE), 0L)
})

test_that("a view cannot be changed, and sees what has been computed since", {
  cl <- local_cluster(2)
  dir <- tempfile("run")
  view <- clusterLapply(cl, c(a = 1, b = 4), sqrt, .store = dir, .collect = FALSE)
  expect_error(view[[1]] <- 3, class = "rustcluster_bad_argument")
  expect_error(view[1] <- 3, class = "rustcluster_bad_argument")
  expect_error(view$a <- 3, class = "rustcluster_bad_argument")
  expect_identical(view$b, 2)
  # A view that was made when the first result was there.
  other <- tempfile("run")
  partial <- NULL
  clusterLapply(cl, 1:4, identity, .store = other, .sync = 0, .timeout = 100, .onResult = function(i, value) {
    if (is.null(partial)) partial <<- openRun(other)$results(partial = TRUE)
  })
  expect_identical(lapply(1:4, function(i) partial[[i]]), as.list(1:4))
})

test_that("results on hosts of a copied run are not confused with those of the original", {
  cl <- local_cluster(1)
  saved <- tempfile("saved")
  # Workers that do not see the directory.
  namespace <- asNamespace("rustcluster")
  suppressMessages(trace("beginSaving", where = namespace, exit = quote(store$save$nonce <- "other"), print = FALSE))
  on.exit(suppressMessages(untrace("beginSaving", where = namespace)), add = TRUE, after = FALSE)
  one <- tempfile("one")
  call <- function(dir, X, ...) {
    clusterLapply(cl, X, strip_srcref(function(x) x), .store = dir, .save = "hosts", .save_dir = saved, .reuse = "same",
                  ...)
  }
  call(one, 1:4)
  two <- tempfile("two")
  dir.create(two)
  file.copy(list.files(one, full.names = TRUE), two, recursive = TRUE)
  try(call(one, c(1:4, 101:103), .timeout = 100, .onResult = function(i, value) if (i == 6L) stop("cut")), silent = TRUE)
  expect_identical(call(two, c(1:4, 201:203)), as.list(c(1:4, 201:203)))
  expect_identical(call(one, c(1:4, 101:103)), as.list(c(1:4, 101:103)))
})
