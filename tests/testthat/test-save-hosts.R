# Results that are saved on the hosts before they are reported: clusterLapply(.save = "hosts"), collectRun().

files_of <- function(dir) list.files(dir, recursive = TRUE)

skip_without_namespaces <- function() {
  skip_if(system("unshare -rm true 2>/dev/null") != 0, "no mount namespaces")
}

# A folder with runs that a host does not see, a folder for the results that it saves, and a log of what is computed.
local_folders <- function(.frame = parent.frame()) {
  base <- tempfile("save-")
  dirs <- list(hidden = file.path(base, "hidden"), saved = file.path(base, "saved"), log = file.path(base, "log"))
  for (dir in dirs[1:2]) dir.create(dir, recursive = TRUE)
  do.call("on.exit", list(bquote(unlink(.(base), recursive = TRUE)), add = TRUE, after = FALSE), envir = .frame)
  c(dirs, run = file.path(dirs$hidden, "run"))
}

mixed <- strip_srcref(function(i) {
  switch(1L + i %% 5L, i, list(a = i, b = letters), data.frame(x = seq_len(i)), numeric(2e4) + i, NULL)
})
environment(mixed) <- globalenv()

logged <- strip_srcref(function(i, log) {
  cat(paste0(i, "\n"), file = log, append = TRUE)
  Sys.sleep(0.02)
  if (i %% 3L == 0L) numeric(2e4) + i else list(i, "text")
})
environment(logged) <- globalenv()

computed <- function(log) if (file.exists(log)) as.integer(readLines(log)) else integer()

test_that("workers that see the directory write their results there", {
  cl <- local_cluster(3)
  dir <- tempfile("run")
  want <- lapply(1:60, mixed)
  seen <- list()
  expect_identical(clusterLapply(cl, 1:60, mixed, .store = dir, .save = "hosts"), want)
  expect_match(files_of(file.path(dir, "results")), "^w")
  expect_false(file.exists(file.path(dir, "probe")))
  # Nothing is computed again.
  view <- clusterLapply(cl, 1:60, mixed, .store = dir, .collect = FALSE)
  expect_identical(as.list(view), want)
  other <- tempfile("run")
  values <- clusterLapply(
    cl, 1:60, mixed, .store = other, .save = "hosts", .onResult = function(i, value) seen[[i]] <<- list(value)
  )
  expect_identical(values, want)
  expect_identical(lapply(seen, `[[`, 1L), want)
})

test_that("long results are written by workers that see the directory, without being asked", {
  cl <- local_cluster(3)
  dir <- tempfile("run")
  long <- function(i) if (i %% 3L == 0L) numeric(2e5) + i else i
  environment(long) <- globalenv()
  want <- lapply(1:20, long)
  values <- clusterLapply(cl, 1:20, long, .store = dir, .timeout = 60)
  expect_identical(values, want)
  files <- files_of(file.path(dir, "results"))
  expect_true(any(startsWith(files, "w")) && any(startsWith(files, "0")))
  expect_false(any(c("session", "probe") %in% files_of(dir)))
  expect_identical(as.list(clusterLapply(cl, 1:20, long, .store = dir, .collect = FALSE)), want)
  # A session that needs the results as they arrive writes them itself.
  other <- tempfile("run")
  seen <- list()
  values <- clusterLapply(cl, 1:20, long, .store = other, .onResult = function(i, value) seen[[i]] <<- value)
  expect_identical(list(values, seen), list(want, want))
  expect_identical(files_of(file.path(other, "results")), "000001.rcr")
  # A call that fails leaves its other results.
  failing <- tempfile("run")
  broken <- function(i) if (i == 20L) stop("no") else numeric(2e5) + i
  expect_error(clusterLapply(cl, 1:20, broken, .store = failing), "no", class = "rustcluster_element_failed")
  expect_false("session" %in% files_of(failing))
  view <- suppressWarnings(clusterLapply(cl, 1:20, broken, .store = failing, .errors = "return"))
  expect_identical(view[1:19], lapply(1:19, function(i) numeric(2e5) + i))
})

test_that("errors and lost workers are saved, too, and tried again", {
  cl <- local_cluster(2)
  dir <- tempfile("run")
  broken <- tempfile()
  fun <- strip_srcref(function(i, broken) {
    if (i == 2L && !file.exists(broken)) stop("not yet")
    if (i == 3L && !file.exists(broken)) tools::pskill(Sys.getpid(), 9L)
    i
  })
  environment(fun) <- globalenv()
  first <- suppressWarnings(clusterLapply(
    cl, 1:6, fun, broken = broken, .store = dir, .save = "hosts", .errors = "return", .retries = 0
  ))
  expect_match(first[[2L]], "not yet")
  expect_s3_class(attr(first[[3L]], "condition"), "rustcluster_error")
  expect_identical(first[c(1, 4:6)], as.list(c(1L, 4:6)))
  file.create(broken)
  expect_identical(
    clusterLapply(cl, 1:6, fun, broken = broken, .store = dir, .save = "hosts", .errors = "return"), as.list(1:6)
  )
  unlink(broken)
})

test_that("a host that does not see the directory saves results, which are fetched and removed", {
  skip_without_namespaces()
  dirs <- local_folders()
  cl <- local_cluster(hides(dirs$hidden))
  want <- lapply(1:60, mixed)
  values <- clusterLapply(cl, 1:60, mixed, .store = dirs$run, .save = "hosts", .save_dir = dirs$saved)
  expect_identical(values, want)
  expect_identical(files_of(dirs$saved), character())
  expect_identical(files_of(file.path(dirs$run, "results")), "000001.rcr")
  # While the call runs, only results that are not durable yet are there.
  waiting <- integer()
  dir <- file.path(dirs$hidden, "other")
  clusterLapply(cl, 1:60, function(i) {
    Sys.sleep(0.02)
    numeric(2e4)
  }, .store = dir, .save = "hosts", .save_dir = dirs$saved, .sync = 0, .onResult = function(i, value) {
    waiting <<- c(waiting, length(files_of(dirs$saved)))
  })
  expect_gt(max(waiting), 0L)
  expect_lt(max(waiting), 40L)
})

test_that("a host that cannot save results sends them, with a warning", {
  skip_without_namespaces()
  dirs <- local_folders()
  cl <- local_cluster(hides(dirs$hidden))
  file <- file.path(dirs$saved, "file")
  writeLines("no directory", file)
  expect_warning(
    values <- clusterLapply(cl, 1:20, mixed, .store = dirs$run, .save = "hosts", .save_dir = file),
    class = "rustcluster_not_saved"
  )
  expect_identical(values, lapply(1:20, mixed))
})

test_that("results survive the head that did not get them", {
  skip_without_namespaces()
  dirs <- local_folders()
  child <- start_child({
    cl <- makeRustCluster(launcher)
    say("pids", paste(c(agentPids(cl), clusterPids(cl)), collapse = " "))
    clusterLapply(cl, 1:200, logged, log = dirs$log, .store = dirs$run, .save = "hosts", .save_dir = dirs$saved)
  }, values = list(launcher = hides(dirs$hidden), dirs = dirs, logged = logged))
  child_wait_for(child, "pids")
  pids <- child_pids(child, "pids")
  expect_true(wait_until(function() length(computed(dirs$log)) > 5L, 30))
  # A head that is stopped gets no result. Files that are there by then may hold only results that it has got before.
  child_signal(child, 19L)
  id <- readRDS(file.path(dirs$run, "run.rds"))$id
  elements_in <- function(dir) unlist(lapply(file.path(dir, files_of(dir)), rustcluster:::file_elements, id))
  expect_true(wait_until(function() {
    length(setdiff(elements_in(dirs$saved), elements_in(file.path(dirs$run, "results")))) > 0L
  }, 30))
  child_signal(child, tools::SIGKILL)
  expect_gone(pids)
  done <- computed(dirs$log)
  cl <- local_cluster(hides(dirs$hidden))
  count <- collectRun(dirs$run, cl, dirs$saved)
  expect_gt(count[["results"]], 0L)
  expect_identical(files_of(dirs$saved), character())
  values <- clusterLapply(cl, 1:200, logged, log = dirs$log, .store = dirs$run, .save = "hosts",
                          .save_dir = dirs$saved)
  expect_identical(values, lapply(1:200, logged, log = tempfile()))
  # Only what was being computed when the head died is computed twice: a batch of each worker.
  twice <- computed(dirs$log)
  twice <- unique(twice[duplicated(twice)])
  expect_lte(length(setdiff(twice, utils::tail(done, 40L))), 0L)
  expect_lt(length(twice), 40L)
})

test_that("files of hosts are fetched whatever happens to workers meanwhile", {
  use <- function(cl, kill) {
    done <- 0L
    attempts <- 0L
    warned <- FALSE
    withCallingHandlers(rustcluster:::forEachHost(cl, function(node) {
      attempts <<- attempts + 1L
      if (attempts == 1L) kill(cl, node)
      until <- proc.time()[[3L]] + 30
      while (!warned && proc.time()[[3L]] < until) rustcluster:::onNodes(node, Sys.sleep, 0.01)
      done <<- done + 1L
    }), rustcluster_worker_lost = function(e) {
      warned <<- TRUE
      if (inherits(e, "warning")) invokeRestart("muffleWarning")
    })
    c(attempts, done)
  }
  other <- function(cl, node) tools::pskill(setdiff(clusterPids(cl), clusterPids(node))[[1L]], tools::SIGKILL)
  own <- function(cl, node) tools::pskill(clusterPids(node), tools::SIGKILL)
  cl <- local_cluster(2)
  # The worker of the node itself is replaced, and the task repeated.
  for (kill in list(other, own)) expect_identical(use(cl, kill), c(1L, 1L))
  cl <- local_cluster(2, retries = 0)
  expect_identical(use(cl, other), c(1L, 1L))
  # A worker that is killed between two tasks may be replaced before the next one.
  die <- global(function() {
    tools::pskill(Sys.getpid(), tools::SIGKILL)
    Sys.sleep(60)
  })
  during <- function(cl, node) rustcluster:::onNodes(node, die)
  expect_identical(use(cl, during), c(2L, 1L))
})

test_that("results wait on the hosts while the disk of the head is full", {
  skip_without_namespaces()
  dirs <- local_folders()
  # The child has a small disk for the run; its workers do not see that.
  prefix <- paste0(
    "exec unshare -rm sh -c 'mount -t tmpfs -o size=3m none ", dirs$hidden, " && exec env --default-signal=INT \"$@\"' sh"
  )
  child <- start_child({
    ballast <- file.path(dirs$hidden, "ballast")
    writeBin(raw(2.5e6), ballast)
    cl <- makeRustCluster(launcher)
    values <- withCallingHandlers(
      clusterLapply(cl, 1:10, function(i) rep(i, 2e4), .store = dirs$run, .save = "hosts", .save_dir = dirs$saved),
      rustcluster_run_waiting = function(m) {
        say("waiting", nzchar(m$reason), length(list.files(dirs$saved, recursive = TRUE)))
        unlink(ballast)
      }
    )
    say("same", identical(values, lapply(1:10, function(i) rep(i, 2e4))))
    say("left", length(list.files(dirs$saved, recursive = TRUE)))
    stopCluster(cl)
    # Without room, and without hosts to wait on.
    writeBin(raw(2e6), ballast)
    cl <- makeRustCluster(2)
    error <- tryCatch(
      clusterLapply(cl, 1:30, function(i) rep(i, 2e4), .store = file.path(dirs$hidden, "two")),
      error = identity
    )
    say("error", class(error)[[1L]])
    unlink(ballast)
    unlink(dirs$run, recursive = TRUE)
    values <- clusterLapply(cl, 1:10, function(i) rep(i, 2e4), .store = file.path(dirs$hidden, "three"))
    say("again", identical(values, lapply(1:10, function(i) rep(i, 2e4))))
    stopCluster(cl)
  }, values = list(launcher = hides(dirs$hidden), dirs = dirs), prefix = prefix)
  expect_child_ends_well(child)
  lines <- child_lines(child)
  expect_match(grep("^waiting TRUE", lines, value = TRUE)[[1L]], "^waiting TRUE [1-9]")
  expect_identical(child_said(child, "waiting"), "FALSE 10")
  expect_identical(child_said(child, "same"), "TRUE")
  expect_identical(child_said(child, "left"), "0")
  expect_identical(child_said(child, "error"), "rustcluster_run_write_failed")
  expect_identical(child_said(child, "again"), "TRUE")
})

test_that("bad arguments are refused", {
  cl <- local_cluster(1)
  fails <- function(expr, argument) {
    expect_identical(tryCatch(expr, rustcluster_bad_argument = function(e) e$argument), argument)
  }
  fails(clusterLapply(cl, 1:2, identity, .save = "hosts"), ".save")
  fails(clusterLapply(cl, 1:2, identity, .save = "nowhere", .store = tempfile()), ".save")
  fails(clusterLapply(cl, 1:2, identity, .save_dir = "/tmp", .store = tempfile()), ".save_dir")
  fails(clusterLapply(cl, 1:2, identity, .save = "hosts", .save_dir = "here", .store = tempfile()), ".save_dir")
  fails(collectRun(1, cl), "dir")
  fails(collectRun(tempfile()), "from")
  run <- tempfile()
  on.exit(unlink(run, recursive = TRUE), add = TRUE, after = FALSE)
  clusterLapply(cl, 1:2, identity, .store = run)
  fails(collectRun(run, list()), "from")
  expect_error(collectRun(tempdir(), cl), class = "rustcluster_run_unreadable")
})
