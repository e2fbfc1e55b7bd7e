# A limit of a worker's memory, and what is said of a host that has run out of it.

skip_on_cran()
watch_processes()

test_that("an invalid memory_limit is an error", {
  for (bad in list("1 GB", NA_real_, NULL, c(1e9, 2e9), TRUE, 0, -1, 99e6)) {
    error <- caught(makeRustCluster(1, memory_limit = bad))
    expect_rust_error(error, "bad_argument")
    expect_equal(error$argument, "memory_limit")
  }
})

test_that("a task over the limit ends with R's error, and its worker goes on", {
  skip_unless_memory_limits()
  for (start in c("fork", "spawn")) {
    cl <- local_cluster(2, start_method = start, memory_limit = 512e6)
    pids <- clusterPids(cl)
    error <- caught(clusterCall(cl, function() length(numeric(1e8))))
    expect_match(conditionMessage(error), "cannot allocate vector of size 762.9 Mb", fixed = TRUE)
    expect_match(conditionMessage(error), "(this worker's memory_limit is 512 MB)", fixed = TRUE)
    # As a value, too, and only that error.
    node <- cl[[1L]]
    parallel:::sendCall(node, function() length(numeric(1e8)), list())
    value <- parallel:::recvResult(node)
    expect_s3_class(value, "try-error")
    expect_match(value, "memory_limit is 512 MB", fixed = TRUE)
    error <- caught(clusterCall(cl, function() stop("of another kind")))
    expect_false(grepl("memory_limit", conditionMessage(error)))
    # The task may deal with it itself.
    expect_equal(
      clusterCall(cl, function() tryCatch(numeric(1e8), error = function(e) "small")),
      list("small", "small")
    )
    # Below the limit there is room, for one task after the other.
    for (i in 1:5) expect_equal(clusterCall(cl, function() length(numeric(2e7))), list(2e7, 2e7))
    expect_equal(clusterCall(cl, identity, 1), list(1, 1))
    expect_equal(clusterPids(cl), pids)
    stopCluster(cl)
  }
})

test_that("a worker that crashes at its memory limit is replaced", {
  skip_unless_memory_limits()
  cl <- local_cluster(2, memory_limit = 200e6)
  # R itself may not: it is out of its smallest pieces when it is to make the error.
  error <- caught(suppressWarnings(clusterCall(cl[1], function() {
    x <- NULL
    repeat x <- list(x, 1:10 + 0)
  }), classes = "rustcluster_worker_lost"))
  expect_s3_class(error, "error")
  # It is lost again whenever it is tried.
  if (inherits(error, "rustcluster_error")) {
    expect_rust_error(error, "task_failed")
    for (loss in error$losses) expect_s3_class(loss, "rustcluster_worker_lost")
  }
  expect_equal(clusterCall(cl[2], identity, 1), list(1))
})

test_that("the error names the limit in other languages, too", {
  worker <- asNamespace("rustcluster")
  local_function("worker_memory_limit", function() 1.5e9)
  text <- "cannot allocate vector of size 8.0 Gb"
  expect_equal(worker$withMemoryLimit(text), paste(text, "(this worker's memory_limit is 1.5 GB)"))
  translated <- sprintf(gettext("cannot allocate vector of size %0.1f Gb", domain = "R"), 8)
  expect_match(worker$withMemoryLimit(translated), "memory_limit", fixed = TRUE)
  for (other in c("", "no", "cannot open the connection")) {
    expect_identical(worker$withMemoryLimit(other), other)
  }
})

test_that("memory_limit = Inf sets no limit", {
  skip_unless_proc()
  limits <- function() grep("data size", readLines("/proc/self/limits"), value = TRUE)
  cl <- local_cluster(1)
  expect_equal(clusterCall(cl, limits)[[1L]], limits())
})

# The folder of a control group whose processes may have `bytes` together, until the calling frame
# ends; NULL where none can be made.
memory_group <- function(bytes, .frame = parent.frame()) {
  name <- paste0("rustcluster-test-", Sys.getpid())
  v1 <- file.path("/sys/fs/cgroup/memory", name)
  v2 <- file.path("/sys/fs/cgroup", name)
  limit <- "memory.limit_in_bytes"
  group <- v1
  if (!dir.exists("/sys/fs/cgroup/memory")) {
    limit <- "memory.max"
    group <- v2
  }
  made <- suppressWarnings(dir.create(group))
  if (!made || !file.exists(file.path(group, limit))) {
    if (made) system(paste("rmdir", group))
    return(NULL)
  }
  remove <- function() wait_until(function() system(paste("rmdir", group, "2>/dev/null")) == 0L, 10)
  do.call("on.exit", list(bquote(.(remove)()), add = TRUE, after = FALSE), envir = .frame)
  writeLines(format(bytes, scientific = FALSE), file.path(group, limit))
  # Swap would only put it off.
  swap <- file.path(group, c("memory.memsw.limit_in_bytes", "memory.swap.max"))
  if (file.exists(swap[[1L]])) {
    try(writeLines(format(bytes, scientific = FALSE), swap[[1L]]), silent = TRUE)
  } else if (file.exists(swap[[2L]])) {
    try(writeLines("0", swap[[2L]]), silent = TRUE)
  }
  group
}

test_that("a worker that the out-of-memory killer has killed is reported as such", {
  skip_unless_proc()
  group <- memory_group(400e6)
  skip_if(is.null(group), "needs a memory control group that can be made")
  child <- start_child({
    cl <- makeRustCluster(2, retries = 0)
    error <- tryCatch(clusterCall(cl[1], function() {
      x <- list()
      for (i in 1:100) x[[i]] <- rep(1, 1e7)
    }), error = identity)
    say("class", class(error)[[1L]])
    say("oom", error$oom)
    say("signal", error$signal)
    say("left", error$memory_available > 0)
    say("message", gsub("\n", " ", conditionMessage(error)))
    # The next one is killed by somebody else.
    error <- tryCatch(clusterCall(cl[2], function() {
      tools::pskill(Sys.getpid(), tools::SIGKILL)
    }), error = identity)
    say("other", error$oom)
    stopCluster(cl)
  }, prefix = sprintf("echo $(exec sh -c 'echo $PPID') >%s/cgroup.procs; exec", group))
  expect_child_ends_well(child)
  expect_equal(child_said(child, "class"), "rustcluster_worker_lost")
  expect_equal(child_said(child, "oom"), "TRUE")
  expect_equal(child_said(child, "signal"), "9")
  expect_equal(child_said(child, "left"), "TRUE")
  expect_match(child_said(child, "message"), "probably killed by the out-of-memory killer (", fixed = TRUE)
  expect_equal(child_said(child, "other"), "FALSE")
})

test_that("other worker failures are not reported as out of memory", {
  cl <- local_cluster(2, retries = 0)
  error <- caught(clusterCall(cl[1], function() tools::pskill(Sys.getpid(), tools::SIGKILL)))
  expect_identical(error$oom, FALSE)
  expect_gt(error$memory_available, 0)
  expect_false(grepl("memory", conditionMessage(error)))
  expect_identical(caught(clusterCall(cl[2], quit))$oom, FALSE)
})

test_that("no process is left", {
  expect_no_leftovers()
})
