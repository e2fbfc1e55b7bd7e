# Large answers of workers on this machine: they come in memory that is shared with this session.

skip_on_cran()
skip_unless_proc()
watch_processes()

made <- eval(quote(function(i) {
  set.seed(i)
  list(
    real = structure(runif(4e5), class = "kept", note = list(i, "x")), int = sample.int(3e5),
    logical = rep(c(TRUE, NA), 1e5), complex = complex(real = runif(1e5), imaginary = i),
    raw = as.raw(rep(i, 1e5)), matrix = matrix(runif(2e5), 1000, dimnames = list(NULL, 1:200)),
    frame = data.frame(x = runif(2e5), y = rep(c("u", "v"), 1e5)), sequence = 1:1e6,
    deep = list(list(list(runif(3e5), letters))), call = quote(a + b), none = NULL
  )
}), globalenv())

# Of all processes of a cluster: what is shared between them.
shared_of <- function(cl) {
  pids <- c(agent_pid(cl), clusterPids(cl))
  shared_memory(pids)
}
agent_pid <- function(cl) proc_parent(clusterPids(cl)[[1L]])
here <- function() shared_memory(Sys.getpid())[, 1L]
is_mapped <- function(x) any(grepl("mapped", utils::capture.output(.Internal(inspect(x)))))

# Once what is not used any more has been collected.
expect_nothing_shared <- function(cl) {
  expect_true(wait_until(function() {
    gc()
    gc()
    all(shared_of(cl) == 0L) && all(here() == 0L)
  }, timeout = 10))
}

test_that("results in shared memory are the same as with PSOCK", {
  skip_if(Sys.info()[["sysname"]] != "Linux")
  pair <- cluster_pair(2)
  want <- parallel::clusterApply(pair$psock, 1:5, made)
  got <- parallel::clusterApply(pair$rust, 1:5, made)
  expect_true(is_mapped(got[[1L]]$real))
  expect_identical(got, want)
  expect_identical(clusterApply(pair$rust, 1:5, made), want)
  # Units, with small results before the large one.
  mixed <- eval(quote(function(i) if (i %% 4) i else numeric(5e5) + i), globalenv())
  expect_identical(
    parLapply(pair$rust, 1:40, mixed, chunk.size = 10), lapply(1:40, mixed)
  )
  expect_identical(parLapplyLB(pair$rust, 1:40, mixed), lapply(1:40, mixed))
  got <- clusterMap(pair$rust, function(x, y) rep(x, y), 1:2, 6e5)
  expect_identical(got, list(rep(1L, 6e5), rep(2L, 6e5)))
  error <- caught(clusterCall(pair$rust, function(x) stop("large"), runif(1e6)))
  expect_match(conditionMessage(error), "large")
})

test_that("results in shared memory can be changed, saved and sent like any vector", {
  cl <- local_cluster(2)
  got <- clusterCall(cl, rep, 1.5, 1e6)
  first <- got[[1L]]
  got[[1L]][[3L]] <- -1
  expect_identical(first, rep(1.5, 1e6))
  expect_identical(got[[2L]], rep(1.5, 1e6))
  expect_identical(got[[1L]][1:4], c(1.5, 1.5, -1, 1.5))
  file <- tempfile()
  on.exit(unlink(file), add = TRUE, after = FALSE)
  saveRDS(got, file)
  again <- readRDS(file)
  expect_identical(again, got)
  expect_false(is_mapped(again[[2L]]))
  expect_identical(unserialize(serialize(got, NULL)), got)
  # And goes to workers again.
  expect_identical(clusterCall(cl, identity, got[[1L]]), rep(got[1L], 2))
  expect_identical(unlist(clusterApply(cl, got, sum)), vapply(got, sum, 0))
  # A fork has it as well.
  sums <- parallel::mclapply(got, sum, mc.cores = 2L)
  expect_identical(unlist(sums), vapply(got, sum, 0))
  expect_identical(order(-got[[1L]])[[1e6]], 3L)
})

test_that("shared memory of results is freed", {
  for (start in c("fork", "spawn")) {
    cl <- local_cluster(4, start_method = start)
    clusterCall(cl, numeric, 1e6)
    expect_nothing_shared(cl)
    files <- c(open_fds(), open_fds(agent_pid(cl)), vapply(clusterPids(cl), open_fds, 0L))
    for (i in 1:30) {
      got <- clusterCall(cl, rep, i, 1e6)
      expect_identical(vapply(got, `[`, 0L, 1e6), rep(i, 4))
    }
    rm(got)
    expect_nothing_shared(cl)
    expect_equal(c(open_fds(), open_fds(agent_pid(cl)), vapply(clusterPids(cl), open_fds, 0L)), files)
    stopCluster(cl)
  }
})

test_that("with a limit of memory or file sizes, results are sent through the stream", {
  cl <- local_cluster(2, memory_limit = 2^30)
  got <- clusterCall(cl, rep, 1.5, 1e6)
  expect_identical(got, list(rep(1.5, 1e6), rep(1.5, 1e6)))
  expect_false(is_mapped(got[[1L]]))
})

test_that("an interrupted gather leaves no shared memory, and the next one works", {
  cl <- local_cluster(4)
  files <- NULL
  for (i in 1:6) {
    slow <- eval(quote(function(i) {
      Sys.sleep(i / 50)
      numeric(2e6) + i
    }), globalenv())
    setTimeLimit(elapsed = 0.1 + i / 20, transient = TRUE)
    got <- tryCatch(parLapply(cl, 1:40, slow), error = identity)
    setTimeLimit()
    expect_s3_class(got, "error")
    expect_identical(clusterCall(cl, rep, i, 1e6), rep(list(rep(i, 1e6)), 4))
    rm(got)
    expect_nothing_shared(cl)
    now <- c(open_fds(), open_fds(agent_pid(cl)), vapply(clusterPids(cl), open_fds, 0L))
    if (is.null(files)) files <- now
    expect_equal(now, files)
  }
})

test_that("workers that are killed with a large result are replaced, and its shared memory is freed", {
  cl <- local_cluster(3, retries = 8)
  clusterCall(cl, numeric, 1e6)
  expect_nothing_shared(cl)
  files <- c(open_fds(), open_fds(agent_pid(cl)))
  marks <- tempfile()
  dir.create(marks)
  on.exit(unlink(marks, recursive = TRUE), add = TRUE, after = FALSE)
  # Something else ends the worker at about the time at which it answers: which of its tasks that meets
  # is left to chance.
  late <- eval(quote(function(i, marks) {
    mark <- file.path(marks, i)
    if (i %% 3 == 0 && !file.exists(mark)) {
      file.create(mark)
      system(sprintf("(sleep 0.0%d; kill -9 %d) &", i %% 10, Sys.getpid()))
    }
    numeric(3e6) + i
  }), globalenv())
  got <- with_losses(clusterApplyLB(cl, 1:24, late, marks))
  expect_gt(length(got$losses), 0L)
  got <- got$value
  expect_identical(vapply(got, `[`, 0, 3e6), as.numeric(1:24))
  rm(got)
  Sys.sleep(0.3)
  expect_identical(clusterCall(cl, identity, 1), list(1, 1, 1))
  expect_nothing_shared(cl)
  expect_equal(c(open_fds(), open_fds(agent_pid(cl))), files)
})

test_that("the memory of unread results is limited", {
  cl <- local_cluster(4, buffer_limit = 40e6)
  # Each of 16 MB, and nobody asks for them: no more than the limit comes.
  node <- function(i) cl[[i]]
  for (i in 1:4) parallel:::postNode(node(i), "EXEC", list(fun = numeric, args = list(2e6), return = TRUE, tag = NULL))
  Sys.sleep(1)
  expect_lte(here()[["open"]], 2L)
  # The one that is asked for comes first, and others then.
  got <- lapply(4:1, function(i) parallel:::recvData(cl[[i]])$value)
  expect_identical(got, rep(list(numeric(2e6)), 4))
  # One that is beyond the limit by itself.
  expect_identical(clusterCall(cl, numeric, 6e6), rep(list(numeric(6e6)), 4))
  expect_identical(parLapply(cl, 1:12, function(i) numeric(6e6) + i)[[12]], numeric(6e6) + 12)
})

test_that("a session with few free descriptors receives results through the stream", {
  child <- start_child(
    {
      cl <- makeRustCluster(2)
      got <- clusterCall(cl, rep, 1.5, 1e6)
      said <- any(grepl("mapped", utils::capture.output(.Internal(inspect(got[[1L]])))))
      say("mapped", said, "right", identical(got, list(rep(1.5, 1e6), rep(1.5, 1e6))))
      stopCluster(cl)
    },
    prelude = "ulimit -n 260"
  )
  expect_child_ends_well(child)
  expect_equal(child_said(child, "mapped"), "FALSE right TRUE")
})
