# foreach with `.options.rustcluster = list(store = )`, scripts that are run again, and exportRun().

watch_processes()
skip_if_not_installed("foreach")
`%dopar%` <- foreach::`%dopar%`
`%:%` <- foreach::`%:%`
foreach <- foreach::foreach

cl <- local_cluster(2)
registerDoRustCluster(cl)

local_run <- function(.frame = parent.frame()) {
  dir <- tempfile("run-")
  do.call("on.exit", list(bquote(unlink(.(dir), recursive = TRUE)), add = TRUE, after = FALSE), envir = .frame)
  dir
}

# Returns the path of a file in which iterations note themselves.
local_notes <- function(.frame = parent.frame()) {
  file <- tempfile("computed-")
  file.create(file)
  do.call("on.exit", list(bquote(unlink(.(file))), add = TRUE, after = FALSE), envir = .frame)
  file
}

noted <- function(file) {
  lines <- readLines(file)
  file.create(file)
  sort(as.numeric(lines))
}

test_that("a loop that is run again computes what is missing, and combines all", {
  dir <- local_run()
  notes <- local_notes()
  heal <- tempfile("heal-")
  on.exit(unlink(heal), add = TRUE, after = FALSE)
  scale <- 2
  loop <- function(handling = "pass", order = TRUE, options = list(store = dir), combine = "c") {
    # foreach exports the variables of the calling function.
    notes <- notes
    heal <- heal
    scale <- scale
    foreach(
      i = 1:10, k = 10:1, .combine = combine, .errorhandling = handling, .inorder = order, .options.rustcluster = options
    ) %dopar% {
      cat(paste0(i, "\n"), file = notes, append = TRUE)
      if (i == 4 && !file.exists(heal)) stop("four")
      i * scale + k / 100
    }
  }
  expected <- 1:10 * 2 + 10:1 / 100
  got <- loop("remove")
  expect_identical(got, expected[-4])
  expect_identical(noted(notes), as.numeric(1:10))
  expect_error(loop("stop"), "task 4 failed - \"four\"")
  expect_identical(noted(notes), 4)
  kept <- loop("pass", combine = "list", options = list(store = dir, retry_errors = FALSE))
  expect_identical(noted(notes), numeric())
  expect_error(loop("stop", options = list(store = dir, retry_errors = FALSE)), "four")
  expect_identical(noted(notes), numeric())
  file.create(heal)
  expect_identical(loop("stop"), expected)
  expect_identical(noted(notes), 4)
  expect_identical(sort(loop("stop", order = FALSE)), sort(expected))
  expect_identical(loop("stop"), expected)
  expect_identical(noted(notes), numeric())
  scale <- 3
  error <- tryCatch(loop(), rustcluster_run_differs = identity)
  expect_identical(error$differs, "`scale`, which the loop uses, changed")
  scale <- 2
  expect_identical(loop("stop"), expected)
  expect_error(loop(options = list(stor = dir)), "stor.*store", class = "rustcluster_bad_argument")
  expect_error(loop(options = list(dir)), "names", class = "rustcluster_bad_argument")
  expect_error(loop(options = list(store = 1)), class = "rustcluster_bad_argument")
  expect_error(loop(options = list(store = dir, sync = -1)), "sync", class = "rustcluster_bad_argument")
  expect_error(loop(options = list(store = dir, reuse = 1)), "reuse", class = "rustcluster_bad_argument")
})

test_that("the expression, exports and functions of a loop are compared", {
  dir <- local_run()
  helper <- function(x) x + 1
  run <- function(n = 3) {
    helper <- helper
    foreach(i = seq_len(n), .options.rustcluster = list(store = dir)) %dopar% helper(i)
  }
  expect_identical(run(), list(2, 3, 4))
  expect_identical(run(), list(2, 3, 4))
  differs <- function(expr) tryCatch(expr, rustcluster_run_differs = function(e) e$differs)
  expect_identical(differs(run(4)), "`X` had 3 elements and has 4")
  helper <- function(x) x + 2
  expect_identical(differs(run()), "`helper`, which the loop uses, changed")
  expect_identical(
    differs(foreach(i = 1:3, .options.rustcluster = list(store = dir)) %dopar% (i + 1)),
    c("the body of the loop changed", "`helper`, which the loop uses, is missing")
  )
  dir <- local_run()
  grow <- function(x) foreach(x = x, .combine = c, .options.rustcluster = list(store = dir, reuse = "same")) %dopar% x^2
  expect_identical(grow(c(1, 2)), c(1, 4))
  expect_identical(grow(c(3, 1, 2)), c(9, 1, 4))
  expect_identical(grow(numeric()), NULL)
})

test_that("nested loops and loops with random streams are resumed", {
  dir <- local_run()
  notes <- local_notes()
  nested <- function() {
    notes <- notes
    foreach(a = 1:3, .combine = rbind, .options.rustcluster = list(store = dir)) %:%
      foreach(b = 1:2, .combine = c, .options.rustcluster = list(store = dir)) %dopar% {
        cat("1\n", file = notes, append = TRUE)
        a * 10 + b
      }
  }
  expected <- unname(outer(1:3 * 10, 1:2, "+"))
  expect_identical(unname(nested()), expected)
  expect_length(noted(notes), 6L)
  expect_identical(unname(nested()), expected)
  expect_length(noted(notes), 0L)
  skip_if_not_installed("doRNG")
  `%dorng%` <- doRNG::`%dorng%`
  dir <- local_run()
  draw <- function(...) {
    notes <- notes
    as.numeric(foreach(i = 1:6, .combine = c, .options.RNG = 42, ...) %dorng% {
      cat("1\n", file = notes, append = TRUE)
      rnorm(1)
    })
  }
  expected <- draw()
  noted(notes)
  expect_identical(draw(.options.rustcluster = list(store = dir)), expected)
  expect_length(noted(notes), 6L)
  expect_identical(draw(.options.rustcluster = list(store = dir)), expected)
  expect_length(noted(notes), 0L)
})

test_that("a script that is killed and run again goes on", {
  dir <- local_run()
  notes <- local_notes()
  for (round in 1:2) {
    child <- start_child({
      cl <- makeRustCluster(2)
      registerDoRustCluster(cl)
      library(foreach)
      say("pids", paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
      squares <- clusterLapply(cl, 1:60, function(x, notes) {
        Sys.sleep(0.05)
        cat(paste0(x, "\n"), file = notes, append = TRUE)
        x^2
      }, notes = notes, .store = file.path(run, "squares"), .sync = 0, .onResult = function(i, value) say("done", i))
      total <- foreach(x = squares, .combine = "+", .options.rustcluster = list(store = file.path(run, "sum"))) %dopar% x
      say("total", total)
      stopCluster(cl)
    }, values = list(run = dir, notes = notes))
    if (round == 1L) {
      child_wait_for(child, "done")
      pids <- child_pids(child, "pids")
      child_signal(child, tools::SIGKILL)
      child_wait_end(child)
      expect_gone(pids, within = 5)
      reported <- as.integer(sub("done ", "", grep("^done", child_lines(child), value = TRUE)))
      noted(notes)
    } else {
      expect_child_ends_well(child)
      expect_identical(child_said(child, "total"), as.character(sum((1:60)^2)))
      expect_length(intersect(noted(notes), reported), 0L)
    }
  }
})

test_that("a run is exported to a file for each element", {
  dir <- local_run()
  to <- tempfile("export-")
  on.exit(unlink(to, recursive = TRUE), add = TRUE, after = FALSE)
  f <- global(function(x) if (x == 3) stop("three") else list(x, letters[[x]]))
  clusterLapply(cl, 1:12, f, .store = dir, .errors = "return")
  files <- exportRun(dir, to)
  expect_identical(basename(files), sprintf("%02d.rds", 1:12))
  expect_identical(list.files(to), sprintf("%02d.rds", 1:12))
  expect_identical(lapply(files[-3], readRDS), lapply((1:12)[-3], f))
  expect_s3_class(readRDS(files[[3]]), "try-error")
  expect_identical(exportRun(dir, paste0(to, "/")), files)
  unlink(to, recursive = TRUE)
  dir <- local_run()
  clusterLapply(cl, c(a = 1, `b c` = 2), f, .store = dir)
  files <- exportRun(dir, to)
  expect_identical(list.files(to), c("a.rds", "b c.rds"))
  expect_identical(lapply(files, readRDS), list(a = f(1), `b c` = f(2)))
  unlink(to, recursive = TRUE)
  dir <- local_run()
  clusterLapply(cl, c(`../a` = 1, b = 2), f, .store = dir)
  expect_identical(basename(exportRun(dir, to)), c("1.rds", "2.rds"))
  expect_error(exportRun(tempfile(), to), class = "rustcluster_run_unreadable")
  expect_error(exportRun(dir, 1), class = "rustcluster_bad_argument")
  expect_error(exportRun(dir, "/proc/no"), class = "rustcluster_run_write_failed")
})

test_that("nothing is left", {
  foreach::registerDoSEQ()
  stop_quietly(cl)
  expect_no_leftovers()
})
