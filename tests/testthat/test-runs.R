# Runs: a detached process computes them. What happens when the runner, its session, or both are killed.

watch_processes()
skip_unless_proc()

lists <- tempfile("lists-")
Sys.setenv(R_USER_DATA_DIR = lists)

# Returns the directory of a run, not below tempdir(). When the test ends, its runner is killed, if it is still there.
local_run_dir <- function(.frame = parent.frame()) {
  dir <- tempfile("run-", dirname(tempdir()))
  do.call("on.exit", list(bquote(.(end_run)(.(dir))), add = TRUE, after = FALSE), envir = .frame)
  dir
}

end_run <- function(dir) {
  pid <- tryCatch(openRun(dir)$status()$pid, error = function(e) NA)
  if (!is.na(pid) && alive(pid) && any(grepl(dir, process_command(pid), fixed = TRUE))) {
    pids <- c(pid, descendants(pid))
    for (p in pids) tools::pskill(p, tools::SIGKILL)
    expect_gone(pids)
  }
  unlink(dir, recursive = TRUE)
}

# A function whose elements leave a line in `said` when they begin and wait for `gate` from element `n` on. A batch is
# answered as a whole; with a time limit, elements are sent one by one.
gated <- function(gate, said, n) {
  function(i) {
    # One write for each line: the workers share the file.
    cat(paste0(i, " ", Sys.getpid(), "\n"), file = said, append = TRUE)
    if (i >= n) while (!file.exists(gate)) Sys.sleep(0.02)
    i^2
  }
}

# The elements that have begun, in order.
begun <- function(said) if (file.exists(said)) as.integer(sub(" .*", "", readLines(said))) else integer()

processes_of <- function(run) {
  pid <- run$status()$pid
  c(pid, descendants(pid))
}

expect_state <- function(run, state, within = 30) {
  expect_true(wait_until(function() run$status()$state == state, within))
  expect_identical(run$status()$state, state)
}

test_that("a run returns what lapply() returns", {
  dir <- local_run_dir()
  scale <- 10
  X <- stats::setNames(as.list(1:30), paste0("e", 1:30))
  fun <- function(x, offset) x * scale + offset
  # The function of a script: it finds in the workers what has been exported.
  environment(fun) <- globalenv()
  run <- startRun(dir, X, fun, offset = 0.5, spec = 2, export = "scale")
  expect_s3_class(run, "rustcluster_run")
  expect_identical(run$wait(60), "done")
  expect_identical(as.list(run$results()), lapply(X, function(x) x * scale + 0.5))
  expect_identical(run$results()[["e3"]], 30.5)
  status <- run$status()
  expect_identical(c(status$done, status$failed, status$total), c(30L, 0L, 30L))
  expect_identical(c(status$workers, status$busy, status$attempt), c(2L, 0L, 1L))
  expect_s3_class(status$ended, "POSIXct")
  expect_gone(status$pid)
  expect_match(format(run)[[1L]], "done at")
  expect_match(format(run)[[2L]], "30 of 30 elements done (100 %)", fixed = TRUE)
  expect_identical(nrow(run$errors()), 0L)
  expect_match(tail(run$log(), 1L), "done")
  # There is nothing to resume or to cancel.
  expect_false(run$resume())
  expect_true(run$cancel())
  expect_identical(run$status()$state, "done")
})

test_that("packages are attached, and random numbers are those of clusterLapply()", {
  dir <- local_run_dir()
  run <- startRun(dir, 1:6, function(i) c(rnorm(1), "package:tools" %in% search()), spec = 2, packages = "tools",
                  .seed = 7, cluster = list(threads = 2))
  run$wait(60)
  cl <- local_cluster(2)
  expect_identical(as.list(run$results()), clusterLapply(cl, 1:6, function(i) c(rnorm(1), 1), .seed = 7))
})

test_that("a runner is detached, and outlives the end and the death of its session", {
  for (end in c("q", "kill")) {
    dir <- local_run_dir()
    gate <- tempfile("gate-")
    said <- tempfile("said-")
    child <- start_child({
      run <- startRun(run_dir, 1:8, gated(gate, said, 3), spec = 2, .timeout = 1e5)
      say("started", run$status()$pid)
      if (end == "q") q()
      Sys.sleep(600)
    }, values = list(run_dir = dir, gate = gate, said = said, end = end, gated = gated))
    pid <- as.integer(child_wait_for(child, "started"))
    expect_false(pid %in% descendants(child$pid))
    if (end == "kill") child_signal(child, tools::SIGKILL)
    child_wait_end(child)
    run <- openRun(dir)
    # It leads a session of its own without a terminal, and ignores the end of one.
    expect_identical(c(proc_group(pid), proc_session(pid)), c(pid, pid))
    expect_identical(proc_stat(pid)[[5L]], "0")
    tools::pskill(pid, tools::SIGHUP)
    expect_true(wait_until(function() run$status()$done == 2L))
    expect_identical(run$status()$state, "running")
    expect_identical(run$status()$pid, pid)
    pids <- processes_of(run)
    expect_gt(length(pids), 3L)
    file.create(gate)
    expect_identical(run$wait(60), "done")
    expect_identical(as.list(run$results()), lapply(1:8, function(i) i^2))
    expect_gone(pids)
    expect_identical(sort(begun(said)), 1:8)
    unlink(c(gate, said))
  }
})

test_that("a killed runner is seen at once, leaves nothing, and the run resumes where it was", {
  for (group in c(FALSE, TRUE)) {
    dir <- local_run_dir()
    gate <- tempfile("gate-")
    said <- tempfile("said-")
    run <- startRun(dir, 1:12, gated(gate, said, 7), spec = 2, .timeout = 1e5)
    expect_true(wait_until(function() run$status()$done == 6L && length(begun(said)) == 8L))
    pids <- processes_of(run)
    if (group) {
      system2("bash", c("-c", shQuote(paste0("kill -9 -- -", pids[[1L]]))))
    } else {
      tools::pskill(pids[[1L]], tools::SIGKILL)
    }
    expect_state(run, "interrupted")
    expect_gone(pids)
    expect_match(paste(format(run), collapse = "\n"), "was killed")
    incomplete <- caught(run$results())
    expect_s3_class(incomplete, "rustcluster_run_incomplete")
    expect_identical(incomplete$missing, 6L)
    expect_identical(run$results(partial = TRUE)[1:7], c(lapply(1:6, function(i) i^2), list(NULL)))
    file.create(gate)
    expect_true(run$resume())
    expect_identical(run$wait(60), "done")
    expect_identical(run$status()$attempt, 2L)
    expect_identical(as.list(run$results()), lapply(1:12, function(i) i^2))
    # Only what had begun was computed twice.
    expect_identical(as.vector(table(begun(said))), rep(c(1L, 2L, 1L), c(6L, 2L, 4L)))
    unlink(c(gate, said))
  }
})

# Keeps the records of clusters in a directory of the test's own.
local_cache <- function(.frame = parent.frame()) {
  cache <- tempfile("cache-")
  dir.create(cache)
  before <- Sys.getenv("R_USER_CACHE_DIR", NA)
  Sys.setenv(R_USER_CACHE_DIR = cache)
  restore <- function() {
    if (is.na(before)) Sys.unsetenv("R_USER_CACHE_DIR") else Sys.setenv(R_USER_CACHE_DIR = before)
    unlink(cache, recursive = TRUE)
  }
  do.call("on.exit", list(bquote(.(restore)()), add = TRUE, after = FALSE), envir = .frame)
}

test_that("the workers of a run that is killed wait for its next runner", {
  local_cache()
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  said <- tempfile("said-")
  run <- startRun(dir, 1:12, gated(gate, said, 7), spec = 2, .timeout = 1e5, cluster = list(linger = 60))
  expect_true(wait_until(function() run$status()$done == 6L && length(begun(said)) == 8L))
  pids <- processes_of(run)
  tools::pskill(pids[[1L]], tools::SIGKILL)
  expect_state(run, "interrupted")
  expect_gone(pids[[1L]])
  expect_gte(sum(vapply(pids[-1L], alive, NA)), 2L)
  # The two workers end what they have begun.
  file.create(gate)
  expect_true(run$resume())
  expect_identical(run$wait(60), "done")
  expect_identical(as.list(run$results()), lapply(1:12, function(i) i^2))
  expect_identical(sort(begun(said)), 1:12)
  expect_match(paste(readLines(file.path(dir, "log")), collapse = "\n"), "reattached the cluster")
  expect_gone(pids, within = 5)
  unlink(c(gate, said))
})

test_that("workers that wait get packages of the next runner, and end for another `spec` or when it is cancelled", {
  local_cache()
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  fun <- function(i) {
    if (i > 1) while (!file.exists(paste0(gate, i))) Sys.sleep(0.02)
    c("package:tools" %in% search(), as.integer(Sys.getenv("RUN_MARK", 0)))
  }
  interrupt <- function(done) {
    expect_true(wait_until(function() run$status()$done == done))
    tools::pskill(run$status()$pid, tools::SIGKILL)
    expect_state(run, "interrupted")
    listClusters()
  }
  run <- startRun(dir, 1:6, fun, spec = 1, .timeout = 1e5, cluster = list(linger = 60))
  pids <- processes_of(run)
  first <- interrupt(1)
  file.create(paste0(gate, 2:3))
  expect_true(run$resume(packages = "tools", .wait = 30))
  second <- interrupt(3)
  expect_identical(second$id, first$id)
  expect_true(run$resume(spec = 2, cluster = list(linger = 60, rscript_envs = c(RUN_MARK = "7")), .wait = 30))
  expect_gone(pids, within = 5)
  file.create(paste0(gate, 4))
  pids <- processes_of(run)
  third <- interrupt(4)
  expect_false(third$id == first$id)
  expect_identical(third$workers, 2L)
  expect_true(run$cancel())
  expect_gone(pids, within = 5)
  expect_identical(nrow(listClusters()), 0L)
  expect_identical(run$results(partial = TRUE)[c(1, 3, 4)], list(c(0L, 0L), c(1L, 0L), c(1L, 7L)))
  unlink(paste0(gate, 2:4))
})

test_that("everything is killed, and another session resumes", {
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  said <- tempfile("said-")
  child <- start_child({
    run <- startRun(run_dir, 1:10, gated(gate, said, 5), spec = 2, .timeout = 1e5, .seed = TRUE)
    say("started", run$status()$pid)
    Sys.sleep(600)
  }, values = list(run_dir = dir, gate = gate, said = said, gated = gated))
  child_wait_for(child, "started")
  run <- openRun(dir)
  expect_true(wait_until(function() run$status()$done == 4L))
  pids <- c(processes_of(run), child$pid)
  for (pid in pids) tools::pskill(pid, tools::SIGKILL)
  expect_state(run, "interrupted")
  expect_gone(pids)
  file.create(gate)
  # Of two sessions that resume, one starts a runner.
  resume <- function() {
    start_child({
      run <- openRun(run_dir)
      say("resumed", run$resume())
      run$wait(60)
    }, values = list(run_dir = dir), .frame = parent.frame(2L))
  }
  children <- list(resume(), resume(), resume())
  for (child in children) expect_child_ends_well(child)
  resumed <- vapply(children, child_said, "", "resumed")
  expect_identical(sum(resumed == "TRUE"), 1L)
  expect_identical(run$status()$state, "done")
  expect_identical(run$status()$attempt, 2L)
  expect_identical(as.list(run$results()), lapply(1:10, function(i) i^2))
  unlink(c(gate, said))
})

test_that("a run is cancelled from another session, and resumed", {
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  said <- tempfile("said-")
  run <- startRun(dir, 1:6, gated(gate, said, 3), spec = 2, .timeout = 1e5)
  expect_true(wait_until(function() run$status()$done == 2L && length(begun(said)) == 4L))
  pids <- processes_of(run)
  child <- start_child(say("cancelled", openRun(run_dir)$cancel()), values = list(run_dir = dir))
  expect_child_ends_well(child)
  expect_identical(child_said(child, "cancelled"), "TRUE")
  expect_gone(pids)
  expect_identical(run$status()$state, "cancelled")
  expect_identical(run$status()$done, 2L)
  expect_identical(run$wait(60), "cancelled")
  expect_match(tail(run$log(), 1L), "cancelled")
  file.create(gate)
  expect_true(run$resume())
  expect_identical(run$wait(60), "done")
  expect_identical(as.list(run$results()), lapply(1:6, function(i) i^2))
  unlink(c(gate, said))
})

test_that("a runner that makes its cluster is cancelled, and an interrupted run is", {
  dir <- local_run_dir()
  hosts <- gates()
  run <- startRun(dir, 1:3, sqrt, spec = list(list(host = "h1", ncore = 1)), cluster = list(rshcmd = hosts$ssh),
                  .wait = 0)
  expect_identical(run$status()$state, "starting")
  expect_true(wait_until(function() length(descendants(run$status()$pid)) > 0L))
  pids <- processes_of(run)
  expect_identical(run$status()$total, 3)
  # The same call attaches, another one is refused.
  expect_identical(startRun(dir, 1:3, sqrt, .wait = 0)$status()$pid, pids[[1L]])
  expect_error(startRun(dir, 1:4, sqrt), "had 3 elements", class = "rustcluster_run_differs")
  expect_identical(as.list(run$results(partial = TRUE)), vector("list", 3L))
  expect_true(run$cancel())
  expect_identical(run$status()$state, "cancelled")
  expect_gone(pids)
  # Other workers from now on.
  expect_true(run$resume(spec = 1, cluster = list()))
  run$wait(60)
  expect_identical(as.list(run$results()), lapply(1:3, sqrt))

  other <- local_run_dir()
  gate <- tempfile("gate-")
  run <- startRun(other, 1:3, gated(gate, tempfile("said-"), 2), spec = 1, .timeout = 1e5)
  pids <- processes_of(run)
  tools::pskill(pids[[1L]], tools::SIGKILL)
  expect_state(run, "interrupted")
  run$cancel()
  expect_identical(run$status()$state, "cancelled")
  expect_gone(pids)
})

test_that("batch jobs of a runner are cancelled when it is killed, and submitted again when the run resumes", {
  stub <- local_stub_engine("slurm")
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  said <- tempfile("said-")
  run <- startRun(dir, 1:6, gated(gate, said, 3), spec = batch_launcher("slurm", stub), .timeout = 1e5, .wait = 60)
  expect_true(wait_until(function() run$status()$done == 2L))
  pids <- c(processes_of(run), stub$pids())
  expect_length(stub$pids(), 2L)
  tools::pskill(pids[[1L]], tools::SIGKILL)
  expect_state(run, "interrupted")
  expect_true(wait_until(function() !length(stub$jobs())))
  expect_gone(pids, 5)
  file.create(gate)
  expect_true(run$resume())
  expect_identical(run$wait(60), "done")
  expect_identical(as.list(run$results()), lapply(1:6, function(i) i^2))
  expect_true(wait_until(function() !length(stub$jobs())))
  expect_gone(c(run$status()$pid, stub$pids()))
  unlink(c(gate, said))
})

test_that("results that workers saved survive their runner", {
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  said <- tempfile("said-")
  run <- startRun(dir, 1:8, gated(gate, said, 5), spec = 2, .timeout = 1e5, .save = "hosts")
  expect_true(wait_until(function() run$status()$done == 4L && length(begun(said)) == 6L))
  pids <- processes_of(run)
  tools::pskill(pids[[1L]], tools::SIGKILL)
  expect_state(run, "interrupted")
  expect_gone(pids)
  file.create(gate)
  expect_true(run$resume())
  expect_identical(run$wait(60), "done")
  expect_identical(as.list(run$results()), lapply(1:8, function(i) i^2))
  expect_identical(as.vector(table(begun(said))), rep(c(1L, 2L, 1L), c(4L, 2L, 2L)))
  unlink(c(gate, said))
})

test_that("a runner whose directory is moved ends, and the run resumes in the new place", {
  dir <- local_run_dir()
  moved <- local_run_dir()
  gate <- tempfile("gate-")
  said <- tempfile("said-")
  run <- startRun(dir, 1:4, gated(gate, said, 3), spec = 1, .timeout = 1e5)
  expect_true(wait_until(function() run$status()$done == 2L))
  pids <- processes_of(run)
  file.rename(dir, moved)
  expect_match(format(run), "not there")
  expect_error(run$status(), class = "rustcluster_run_unreadable")
  expect_gone(pids, 30)
  file.create(gate)
  run <- openRun(moved)
  expect_identical(run$status()$state, "interrupted")
  run$resume()
  expect_identical(run$wait(60), "done")
  expect_identical(as.list(run$results()), lapply(1:4, function(i) i^2))
  unlink(c(gate, said))
})

test_that("failed elements are listed, and computed again when the run resumes", {
  dir <- local_run_dir()
  marker <- tempfile("marker-")
  fun <- function(i) {
    if (i == 2) stop("no two")
    if (i == 4 && !file.exists(marker)) stop(structure(class = c("special", "error", "condition"),
                                                       list(message = "no four", call = NULL)))
    i
  }
  run <- startRun(dir, c(a = 1, b = 2, c = 3, d = 4), fun, spec = 2)
  expect_identical(run$wait(60), "done")
  errors <- run$errors()
  expect_identical(errors$index, c(2L, 4L))
  expect_identical(errors$name, c("b", "d"))
  expect_identical(errors$message, c("no two", "no four"))
  expect_identical(errors$class, c("simpleError", "special"))
  failed <- caught(run$results())
  expect_s3_class(failed, "rustcluster_element_failed")
  expect_identical(failed$indices, c(2L, 4L))
  expect_match(conditionMessage(failed), "element 2 failed: no two")
  expect_s3_class(run$results(partial = TRUE)[["d"]], "try-error")
  # The text of a worker failure names the element.
  worker_failed <- rustcluster:::elementFailed("element 2 failed: the worker died", 2L, list(NULL))
  expect_identical(conditionMessage(worker_failed), "element 2 failed: the worker died")
  file.create(marker)
  expect_true(run$resume())
  run$wait(60)
  expect_identical(run$errors()$name, "b")
  expect_identical(run$results(partial = TRUE)[["d"]], 4)
  unlink(marker)
})

test_that("errors at the start are raised, and the directory can be used again", {
  dir <- local_run_dir()
  failed <- caught(startRun(dir, 1:3, sqrt, spec = list(list(host = "h1", ncore = 1)),
                            cluster = list(rshcmd = "/bin/false"), .wait = 60))
  expect_s3_class(failed, "rustcluster_run_failed")
  expect_s3_class(failed$parent, "rustcluster_start_failed")
  expect_match(conditionMessage(failed), "host.*h1")
  run <- openRun(dir)
  expect_identical(run$status()$state, "failed")
  expect_match(run$status()$message, "h1")
  expect_match(paste(format(run), collapse = "\n"), "end of its log")
  expect_gone(run$status()$pid)
  run <- startRun(dir, 1:4, sqrt, spec = 1)
  expect_identical(run$wait(60), "done")
  expect_identical(as.list(run$results()), lapply(1:4, sqrt))
  expect_identical(run$status()$attempt, 1L)

  other <- local_run_dir()
  expect_error(startRun(other, 1:3, sqrt, .retires = 2), class = "rustcluster_bad_argument")
  for (wrong in list(
    list(.order = c(1, 1, 2)), list(.sync = -1), list(.retries = -1), list(.retries = 0.5),
    list(.save = "hosts", .save_dir = "rel"), list(.save_dir = tempdir())
  )) {
    expect_error(do.call(startRun, c(list(other, 1:3, sqrt), wrong)), names(wrong)[[length(wrong)]],
                 class = "rustcluster_bad_argument")
  }
  expect_error(startRun(other, 1:3, sqrt, cl = 2), "use `spec`", class = "rustcluster_bad_argument")
  cl <- local_cluster(1)
  expect_error(startRun(other, 1:3, function(i, ...) i, cl = cl), "use `spec`", class = "rustcluster_bad_argument")
  expect_error(startRun(other, cl, 1:3, sqrt), "`X` is a cluster.*use `spec`", class = "rustcluster_bad_argument")
  expect_error(startRun(other, 1:3, sqrt, cl), "contains a cluster.*use `spec`", class = "rustcluster_bad_argument")
  expect_error(startRun(other, 1:3, sqrt, specs = 2), "did you mean `spec`", class = "rustcluster_bad_argument")
  expect_error(startRun(other, 1:3, sqrt, cluster = list(thread = 2)), "threads", class = "rustcluster_bad_argument")
  expect_error(startRun(other, 1:3, sqrt, cluster = list(spec = 2)), class = "rustcluster_bad_argument")
  expect_error(startRun(other, 1:3, sqrt, export = "unheard_of"), class = "rustcluster_bad_argument")
  expect_error(startRun(other, 1:3, sqrt, spec = cl), "makes its own cluster", class = "rustcluster_bad_argument")
  expect_error(startRun(other, 1:3, sqrt, spec = "a b"), "must name a host", class = "rustcluster_bad_argument")
  expect_error(startRun(other, 1:3, sqrt, .seed = "a"), class = "rustcluster_bad_argument")
  expect_false(file.exists(other))
  expect_error(openRun(other), "no such directory", class = "rustcluster_run_unreadable")
  expect_error(openRun(), "missing", class = "rustcluster_bad_argument")
  dir.create(other)
  writeLines("mine", file.path(other, "notes.txt"))
  expect_error(startRun(other, 1:3, sqrt), "other files.*empty one", class = "rustcluster_bad_argument")
  expect_error(startRun(file.path(other, "notes.txt", "b"), 1:3, sqrt), "is a file", class = "rustcluster_bad_argument")
})

test_that("directories above that of a run are created, and the files of a run stay alone", {
  above <- local_run_dir()
  dir <- file.path(above, "b", "c")
  run <- startRun(dir, 1:3, sqrt, spec = 1)
  expect_identical(run$wait(60), "done")
  expect_identical(run$dir, normalizePath(dir))
  for (to in c(dir, file.path(dir, "results"), file.path(dir, "new"))) {
    expect_error(exportRun(dir, to), "directory of a run", class = "rustcluster_bad_argument")
  }
  expect_identical(readRDS(exportRun(dir, file.path(above, "b", "files"))[[2L]]), sqrt(2))
  expect_length(list.files(file.path(dir, "results"), "rds$"), 0L)
  # Arguments are checked also if there is nothing to do.
  expect_error(run$resume(packages = 3), class = "rustcluster_bad_argument")
  expect_error(run$resume(spec = "a b"), class = "rustcluster_bad_argument")
})

test_that("a run that could not start says how it can", {
  dir <- local_run_dir()
  expect_error(startRun(dir, 1:3, sqrt, spec = 1, packages = "rustclusterNone", .wait = 60),
               class = "rustcluster_run_failed")
  run <- openRun(dir)
  expect_match(paste(format(run), collapse = "\n"), "resume(spec = , packages = )", fixed = TRUE)
  expect_error(run$results(), "resume() continues", fixed = TRUE, class = "rustcluster_run_incomplete")
  expect_true(run$resume(packages = "tools"))
  expect_identical(run$wait(60), "done")
})

test_that("a session that computes a run is not taken for its runner", {
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  on.exit(unlink(gate), add = TRUE, after = FALSE)
  fun <- function(i, gate) {
    while (!file.exists(gate)) Sys.sleep(0.02)
    i
  }
  child <- start_child({
    cl <- makeRustCluster(1)
    invisible(clusterLapply(cl, 1:2, fun, gate = gate, .store = dir))
    stopCluster(cl)
  }, values = list(dir = dir, gate = gate, fun = fun))
  expect_true(wait_until(function() dir.exists(dir) && tryCatch(openRun(dir)$status()$state == "running",
                                                                error = function(e) FALSE)))
  error <- expect_error(startRun(dir, 1:2, fun, gate = gate, spec = 1), "clusterLapply",
                        class = "rustcluster_run_locked")
  expect_identical(error$pid, openRun(dir)$status()$pid)
  file.create(gate)
  expect_child_ends_well(child)
})

test_that("a run without permission cannot be read, and the runner is told to end by a signal", {
  skip_if(Sys.info()[["effective_user"]] == "root", "root may do everything")
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  on.exit(unlink(gate), add = TRUE, after = FALSE)
  run <- startRun(dir, 1:2, function(i, gate) while (!file.exists(gate)) Sys.sleep(0.02), gate = gate, spec = 1)
  on.exit(Sys.chmod(c(dir, file.path(dir, "runner")), "700"), add = TRUE, after = FALSE)
  Sys.chmod(dir, "000")
  for (look in list(function() openRun(dir), run$status, run$errors, run$resume, run$cancel)) {
    expect_error(look(), "permission", class = "rustcluster_run_unreadable")
  }
  expect_match(paste(format(run), collapse = " "), "permission")
  Sys.chmod(dir, "700")
  # This user may signal the runner; for another one, cancel() is an error at once.
  Sys.chmod(file.path(dir, "runner"), "500")
  expect_true(run$cancel())
  expect_gone(run$status()$pid)
})

test_that("the same call again attaches to a run, continues it, or names what differs", {
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  said <- tempfile("said-")
  scale <- 2
  fun <- gated(gate, said, 3)
  run <- startRun(dir, 1:4, fun, spec = 2, .timeout = 1e5, export = "scale")
  expect_true(wait_until(function() run$status()$done == 2L))
  pid <- run$status()$pid
  expect_identical(startRun(dir, 1:4, gated(gate, said, 3), export = "scale")$status()$pid, pid)
  differs <- caught(startRun(dir, 1:4, gated(gate, said, 4), export = "scale"))
  expect_s3_class(differs, "rustcluster_run_differs")
  scale <- 3
  expect_error(startRun(dir, 1:4, fun, export = "scale"), "the exported `scale` changed", class = "rustcluster_run_differs")
  expect_error(startRun(dir, 1:5, fun), class = "rustcluster_run_differs")
  scale <- 2
  expect_error(startRun(dir, 1:5, fun, export = "scale", .reuse = "same"), class = "rustcluster_run_locked")
  tools::pskill(pid, tools::SIGKILL)
  expect_state(run, "interrupted")
  file.create(gate)
  again <- startRun(dir, 1:4, fun, spec = 1, export = "scale")
  expect_identical(again$wait(60), "done")
  expect_identical(run$status()$attempt, 2L)
  # It is done: nothing is started.
  expect_identical(startRun(dir, 1:4, fun, export = "scale")$status()$attempt, 2L)
  more <- startRun(dir, 1:6, fun, spec = 1, export = "scale", .reuse = "same")
  expect_identical(more$wait(60), "done")
  expect_identical(as.list(more$results()), lapply(1:6, function(i) i^2))
  expect_identical(sum(begun(said) <= 2), 2L)
  unlink(c(gate, said))
})

test_that("sessions that start the same run at once get one run", {
  dir <- local_run_dir()
  start <- function() {
    start_child({
      run <- startRun(run_dir, 1:5, sqrt, spec = 1)
      say("pid", run$status()$pid)
      run$wait(60)
    }, values = list(run_dir = dir), .frame = parent.frame(2L))
  }
  children <- list(start(), start(), start())
  for (child in children) expect_child_ends_well(child)
  expect_length(unique(vapply(children, child_said, "", "pid")), 1L)
  run <- openRun(dir)
  expect_identical(run$status()$attempt, 1L)
  expect_identical(as.list(run$results()), lapply(1:5, sqrt))
})

test_that("what a killed session has left does not block a run, and is removed", {
  dir <- local_run_dir()
  dir.create(file.path(dir, "runner"), recursive = TRUE)
  left <- file.path(dir, c("task.rds.1.new", "runner/state.rds.1.new", "runner/settings.rds.2.new"))
  file.create(left)
  Sys.setFileTime(left[[2L]], Sys.time() - 86400)
  run <- startRun(dir, 1:2, sqrt, spec = 1)
  expect_identical(run$wait(60), "done")
  # The last one may be of a session that is about to start a runner.
  expect_identical(file.exists(left[2:3]), c(FALSE, TRUE))
})

test_that("a run of which nothing was computed is replaced under its lock", {
  dir <- local_run_dir()
  broken <- function(dir) {
    startRun(dir, 1:3, sqrt, spec = list(list(host = "h1", ncore = 1)), cluster = list(rshcmd = "/bin/false"),
             .wait = 60)
  }
  expect_error(broken(dir), class = "rustcluster_run_failed")
  inode <- function() system2("stat", c("-c", "%i", file.path(dir, "runner", "lock")), stdout = TRUE)
  before <- inode()
  run <- startRun(dir, 1:4, abs, spec = 1)
  expect_identical(run$wait(60), "done")
  expect_identical(inode(), before)
  expect_false(any(grepl("failed", run$log())))
  # The results of another run stay, whatever a runner is told.
  expect_true(rustcluster:::startRunner(dir, readRDS(file.path(dir, "runner", "settings.rds")), 4, replaces = TRUE))
  expect_identical(run$wait(60), "done")
  expect_identical(as.list(run$results()), lapply(1:4, abs))
  # Errors alone are not worth keeping for another call.
  failing <- local_run_dir()
  cl <- local_cluster(1)
  clusterLapply(cl, 1:2, function(i) stop("no"), .store = failing, .errors = "return")
  for (fun in list(function(i) stop("no again"), function(i) i)) {
    run <- startRun(failing, 1:2, fun, spec = 1)
    expect_identical(run$wait(60), "done")
  }
  expect_identical(as.list(run$results()), list(1L, 2L))
  expect_error(startRun(failing, 1:2, sqrt), class = "rustcluster_run_differs")
})

test_that("an object and its views follow a run that is begun anew", {
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  on.exit(unlink(gate), add = TRUE, after = FALSE)
  run <- startRun(dir, c(a = 1, b = 2), function(i) stop("wrong"), spec = 1)
  run$wait(60)
  view <- run$results(partial = TRUE)
  wait <- function(i, gate) {
    while (!file.exists(gate)) Sys.sleep(0.02)
    i
  }
  again <- startRun(dir, c(a = 1, b = 2), wait, gate = gate, spec = 1)
  # The run is being replaced, or was: the old errors are not those of the new run.
  for (i in 1:20) {
    status <- run$status()
    expect_identical(as.numeric(c(status$done, status$failed, status$total)), c(0, 0, 2))
    expect_match(format(run)[[2L]], "0 of 2 elements done")
    expect_identical(nrow(run$errors()), 0L)
    Sys.sleep(0.02)
  }
  early <- run$results(partial = TRUE)
  expect_s3_class(early, "rustcluster_results")
  expect_identical(early[1:2], list(a = NULL, b = NULL))
  file.create(gate)
  expect_identical(again$wait(60), "done")
  for (results in list(run$results(), early, view)) expect_identical(as.list(results), list(a = 1, b = 2))
  expect_output(print(early), "^<results of 2 elements in [^>]*>$")
})

test_that("a run without a store gives a view, which follows it", {
  dir <- local_run_dir()
  run <- startRun(dir, c(a = 1, b = 4), sqrt, spec = 1)
  run$wait(60)
  hidden <- paste0(dir, "-hidden")
  on.exit(unlink(hidden), add = TRUE, after = FALSE)
  file.rename(file.path(dir, "run.rds"), hidden)
  view <- run$results(partial = TRUE)
  expect_s3_class(view, "rustcluster_results")
  expect_identical(names(view), c("a", "b"))
  expect_identical(as.list(view), list(a = NULL, b = NULL))
  expect_error(view[["b"]], class = "rustcluster_not_computed")
  expect_output(print(view), "missing: 2")
  expect_equal(run$status()$done, 0)
  expect_identical(nrow(run$errors()), 0L)
  file.rename(hidden, file.path(dir, "run.rds"))
  expect_identical(view[["b"]], 2)
  expect_identical(as.list(view), list(a = 1, b = 2))
})

test_that("a start that is too late does not lose that a run is to be cancelled", {
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  run <- startRun(dir, 1:3, gated(gate, tempfile("said-"), 2), spec = 1, .timeout = 1e5)
  pids <- processes_of(run)
  tools::pskill(pids[[1L]], tools::SIGSTOP)
  file.create(rustcluster:::cancelFile(dir, rustcluster:::readState(dir)))
  expect_false(rustcluster:::startRunner(dir, readRDS(file.path(dir, "runner", "settings.rds")), 3))
  tools::pskill(pids[[1L]], tools::SIGCONT)
  expect_state(run, "cancelled")
  expect_gone(pids)
})

test_that("a runner whose directory is removed and used again ends, and does not touch the new run", {
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  run <- startRun(dir, 1:3, gated(gate, tempfile("said-"), 2), spec = 1, .timeout = 1e5)
  expect_true(wait_until(function() run$status()$done == 1L))
  pids <- processes_of(run)
  unlink(dir, recursive = TRUE)
  run <- startRun(dir, 1:4, gated(gate, tempfile("said-"), 5), spec = 1, .timeout = 1e5)
  expect_gone(pids, 30)
  expect_identical(run$wait(60), "done")
  status <- run$status()
  expect_identical(c(status$total, status$attempt), c(4L, 1L))
  expect_false(status$pid %in% pids)
  expect_identical(as.list(run$results()), lapply(1:4, function(i) i^2))
})

test_that("a variable of a closure counts, even if there is a global one of this name", {
  dir <- local_run_dir()
  assign("factor_of_run", 5, globalenv())
  on.exit(rm("factor_of_run", envir = globalenv()), add = TRUE, after = FALSE)
  made <- function(factor_of_run) function(i) factor_of_run * i
  startRun(dir, 1:3, made(2), spec = 1)$wait(60)
  expect_error(startRun(dir, 1:3, made(3)), "`factor_of_run`", class = "rustcluster_run_differs")
  # The global one does not exist in the workers.
  fun <- function(i) factor_of_run * i
  environment(fun) <- globalenv()
  other <- local_run_dir()
  expect_warning(run <- startRun(other, 1, fun, spec = 1), "`factor_of_run`", class = "rustcluster_not_exported")
  run$wait(60)
  expect_match(run$errors()$message, "factor_of_run")
  unlink(other, recursive = TRUE)
  expect_no_warning(startRun(other, 1, fun, spec = 1, export = "factor_of_run"))
})

test_that("functions that are sent with `FUN` are searched for variables that are not exported", {
  needs <- function(code) {
    fun <- eval(code)
    environment(fun) <- globalenv()
    fun
  }
  assign("run_helper", needs(quote(function(i) run_inner(i) + run_offset)), globalenv())
  assign("run_inner", needs(quote(function(i) i * run_factor)), globalenv())
  assign("run_offset", 1, globalenv())
  on.exit(rm("run_helper", "run_inner", "run_offset", envir = globalenv()), add = TRUE, after = FALSE)
  warned <- function(FUN, exported, arguments = list()) {
    exported <- mget(as.character(exported), globalenv())
    caught <- tryCatch(rustcluster:::warnNotExported(FUN, exported, arguments), warning = identity)
    if (is.null(caught)) "" else conditionMessage(caught)
  }
  fun <- needs(quote(function(i) run_helper(i)))
  expect_match(warned(fun, "run_helper"), "^`run_helper` uses `run_inner`, `run_offset` of the global environment")
  expect_match(warned(fun, "run_inner"), "^`FUN` uses `run_helper` of")
  expect_identical(warned(fun, c("run_helper", "run_inner", "run_offset")), "")
  expect_match(warned(sqrt, NULL, list(g = fun)), "^`g` uses `run_helper`")
  # A helper in the environment of `FUN` is sent, but not what it finds in the global environment.
  global <- new.env(parent = globalenv())
  assign("helper", needs(quote(function(i) run_offset + i)), global)
  made <- eval(quote(function(i) helper(i)), global)
  expect_match(warned(made, NULL), "^`FUN` uses `run_offset` of")
})

test_that("a directory below tempdir() is warned of", {
  dir <- tempfile("run-")
  expect_warning(run <- startRun(dir, 1, sqrt, spec = 1), "tempdir", class = "rustcluster_run_temporary")
  run$wait(60)
  expect_no_warning(startRun(dir, 1, sqrt, spec = 1))
  unlink(dir, recursive = TRUE)
})

test_that("a run that is done gets more elements at once", {
  dir <- local_run_dir()
  for (n in 1:4) {
    run <- startRun(dir, seq_len(n), sqrt, spec = 1, .reuse = "same")
    expect_identical(run$wait(60), "done")
  }
  expect_identical(as.list(run$results()), lapply(1:4, sqrt))
})

test_that("the log of a run that gets fewer elements counts those that are there", {
  dir <- local_run_dir()
  startRun(dir, 1:6, sqrt, spec = 1, .seed = 1)$wait(60)
  startRun(dir, 1:2, sqrt, spec = 1, .seed = 1, .reuse = "same")$wait(60)
  run <- startRun(dir, 1:7, sqrt, spec = 1, .seed = 1, .reuse = "same")
  run$wait(60)
  said <- grep("computing", run$log(), value = TRUE)
  expect_length(said, 3L)
  expect_match(said[[2L]], "computing 0 elements, 2 are there already")
  expect_match(said[[3L]], "computing 1 element, 6 are there already")
})

test_that("elements that failed before do not count for the rate", {
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  fun <- function(i) {
    if (i > 2 && !file.exists(gate)) stop("not yet")
    if (i > 3) while (!file.exists(paste0(gate, "2"))) Sys.sleep(0.02)
    i
  }
  run <- startRun(dir, 1:5, fun, spec = 1, .timeout = 1e5)
  expect_identical(run$wait(60), "done")
  expect_identical(run$status()$left, 0)
  file.create(gate)
  run$resume()
  expect_true(wait_until(function() run$status()$done == 3L))
  status <- run$status()
  expect_identical(status$left, 2)
  expect_gt(status$rate, 0)
  file.create(paste0(gate, "2"))
  expect_identical(run$wait(60), "done")
  unlink(paste0(gate, c("", "2")))
})

test_that("errors and runs are printed in a line each", {
  dir <- file.path(tempfile("long-", dirname(tempdir())), strrep("directory", 10))
  dir.create(dirname(dir))
  on.exit(unlink(dirname(dir), recursive = TRUE), add = TRUE, after = FALSE)
  run <- startRun(dir, 1:2, function(i) stop(strrep("long ", 50), "\nsecond line"), spec = 1)
  run$wait(60)
  expect_match(run$errors()$message[[1L]], "second line")
  for (value in list(run$errors(), listRuns())) {
    lines <- utils::capture.output(print(value))
    expect_length(lines, nrow(value) + 1L)
    expect_lte(max(nchar(lines)), 80L)
  }
  expect_identical(rustcluster:::shortened("abcdefghijklmnop", 9), "ab...mnop")
})

test_that("listRuns() lists the runs that are still there", {
  unlink(lists, recursive = TRUE)
  expect_identical(nrow(listRuns()), 0L)
  expect_output(print(listRuns()), "no runs")
  first <- local_run_dir()
  second <- local_run_dir()
  startRun(first, 1:3, sqrt, spec = 1)$wait(60)
  startRun(second, 1:2, function(i) stop("no"), spec = 1)$wait(60)
  list <- listRuns()
  expect_s3_class(list, "rustcluster_runs")
  expect_setequal(basename(list$dir), basename(c(first, second)))
  expect_identical(list$state, c("done", "done"))
  expect_identical(list$failed[match(basename(second), basename(list$dir))], 2L)
  expect_output(print(list), "3/3")
  unlink(first, recursive = TRUE)
  expect_identical(basename(listRuns()$dir), basename(second))
  expect_length(list.files(file.path(lists, "R"), recursive = TRUE), 1L)
})

# Runs a command at the command line. Returns its output, with the exit status as an attribute.
command <- function(...) {
  output <- tempfile("output-")
  on.exit(unlink(output), add = TRUE, after = FALSE)
  status <- system2(
    file.path(R.home("bin"), "Rscript"), c("-e", shQuote("rustcluster::runs()"), shQuote(c(...))),
    stdout = output, stderr = output, env = c(paste0("R_LIBS=", paste(.libPaths(), collapse = ":")), "R_TESTS=")
  )
  structure(paste(readLines(output), collapse = "\n"), status = status)
}

expect_command <- function(args, status, text) {
  got <- do.call(command, as.list(args))
  expect_identical(attr(got, "status"), as.integer(status), label = paste(c(args, ":", got), collapse = " "))
  expect_match(got, text)
}

test_that("runs at the command line", {
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  run <- startRun(dir, 1:4, gated(gate, tempfile("said-"), 2), spec = 1, .timeout = 1e5)
  pids <- processes_of(run)
  expect_command(character(), 0, basename(dir))
  expect_command(c("status", dir), 0, "running on")
  expect_command(c("resume", dir), 0, "nothing was started: the run is being computed.*running on")
  expect_identical(run$status()$attempt, 1L)
  expect_command(c("wait", dir, "0.1"), 1, "running on")
  expect_command(c("cancel", dir), 0, "cancelled.*`resume --cancelled DIR` continues the run")
  expect_gone(pids)
  expect_command(c("status", dir), 1, "cancelled")
  # As at a restart of the machine, by cron.
  expect_command(c("resume", dir), 0, "was cancelled")
  expect_identical(run$status()$state, "cancelled")
  expect_command(c("resume", "--cancelled", dir), 0, "a runner was started.*running on")
  pids <- processes_of(run)
  tools::pskill(pids[[1L]], tools::SIGKILL)
  expect_gone(pids)
  expect_command(c("status", dir), 1, "interrupted.*`resume DIR` continues")
  file.create(gate)
  expect_command(c("resume", dir), 0, "run")
  expect_command(c("wait", dir), 0, "4 of 4 elements done")
  expect_command(c("resume", dir), 0, "done")
  expect_identical(run$status()$attempt, 3L)
  expect_command(c("errors", dir), 0, "^$")
  expect_command(c("log", dir, "1"), 0, "done")
  expect_command(c("status", tempfile()), 1, "holds no run")
  expect_command(c("unheard", dir), 2, "usage")
  expect_command("wait", 2, "usage")
  unlink(gate)

  failing <- local_run_dir()
  startRun(failing, 1:2, function(i) if (i == 2) stop("no two") else i, spec = 1)
  expect_command(c("wait", failing), 1, "1 failed: see `errors DIR`")
  expect_command(c("errors", failing), 1, "no two")
  # What fails again and again is not computed again by cron.
  expect_command(c("resume", failing), 0, "resume --failed")
  expect_identical(openRun(failing)$status()$attempt, 1L)
  expect_command(c("resume", "--failed", failing), 0, "runner 2")
  expect_identical(openRun(failing)$wait(60), "done")
  expect_identical(openRun(failing)$status()$attempt, 2L)
})

test_that("a wrong command says what is wrong", {
  run <- function(...) {
    code <- sprintf("rustcluster::runs(c(%s))", toString(dQuote(c(...), FALSE)))
    out <- suppressWarnings(system2(file.path(R.home("bin"), "Rscript"), c("-e", shQuote(code)), stdout = TRUE,
                                    stderr = TRUE))
    list(status = c(attr(out, "status"), 0L)[[1L]], said = out)
  }
  help <- run("--help")
  expect_identical(help$status, 0L)
  expect_match(help$said[[1L]], "^usage")
  for (case in list(
    list("statu", "did you mean `status`"), list("status", "needs the directory"),
    list(c("status", "--failed", "a"), "only for `resume`"), list(c("wait", "a", "b"), "not a number of seconds"),
    list(c("status", "a", "b"), "too many")
  )) {
    wrong <- run(case[[1L]])
    expect_identical(wrong$status, 2L)
    expect_match(wrong$said[[1L]], case[[2L]])
    expect_match(wrong$said[[2L]], "^usage")
  }
})

test_that("a promise of a run is fulfilled or rejected", {
  skip_if_not_installed("promises")
  skip_if_not_installed("later")
  seen <- new.env()
  note <- function(run, name) {
    promises::then(
      promises::as.promise(run), function(value) seen[[name]] <- value, function(error) seen[[name]] <- error
    )
  }
  good <- local_run_dir()
  bad <- local_run_dir()
  note(startRun(good, 1:3, sqrt, spec = 1), "good")
  note(startRun(bad, 1:3, function(i) stop("no"), spec = 1), "bad")
  deadline <- proc.time()[[3L]] + 60
  while (length(ls(seen)) < 2L && proc.time()[[3L]] < deadline) later::run_now(1)
  expect_identical(as.list(seen$good), lapply(1:3, sqrt))
  expect_s3_class(seen$bad, "rustcluster_element_failed")
})

test_that("a run of clusterLapply() can be opened", {
  dir <- local_run_dir()
  gate <- tempfile("gate-")
  said <- tempfile("said-")
  child <- start_child({
    cl <- makeRustCluster(2)
    say("pids", paste(c(Sys.getpid(), clusterPids(cl)), collapse = " "))
    clusterLapply(cl, 1:6, gated(gate, said, 3), .store = run_dir, .timeout = 1e5)
  }, values = list(run_dir = dir, gate = gate, said = said, gated = gated))
  child_wait_for(child, "pids")
  pids <- child_pids(child, "pids")
  expect_true(wait_until(function() file.exists(file.path(dir, "run.rds"))))
  run <- openRun(dir)
  expect_true(wait_until(function() run$status()$done == 2L))
  expect_identical(run$status()$state, "running")
  expect_identical(run$status()$pid, pids[[1L]])
  locked <- caught(run$cancel())
  expect_s3_class(locked, "rustcluster_run_locked")
  expect_identical(locked$pid, pids[[1L]])
  child_signal(child, tools::SIGKILL)
  expect_state(run, "interrupted")
  expect_gone(pids)
  expect_error(run$resume(), "clusterLapply", class = "rustcluster_run_failed")
  expect_error(run$timeline(), "only runners", class = "rustcluster_run_incomplete")
  expect_identical(run$results(partial = TRUE)[[2L]], 4)
  # startRun() continues it.
  file.create(gate)
  expect_identical(startRun(dir, 1:6, gated(gate, said, 3), spec = 1, .timeout = 1e5)$wait(60), "done")
  expect_identical(as.list(run$results()), lapply(1:6, function(i) i^2))
  unlink(c(gate, said))
})

test_that("a run can be opened in the session that computes it", {
  dir <- local_run_dir()
  cl <- local_cluster(1)
  seen <- NULL
  clusterLapply(cl, 1:2, sqrt, .store = dir, .onResult = function(i, value) seen <<- openRun(dir)$status())
  expect_identical(seen[c("state", "pid", "host")],
                   list(state = "running", pid = Sys.getpid(), host = Sys.info()[["nodename"]]))
  expect_output(expect_identical(rustcluster:::runCommand(c("resume", dir)), 0L), "2 of 2 elements done")
})

test_that("the timeline of a run goes over all its runners", {
  first <- structure(
    data.frame(host = "a", rank = 1L, start = 0, end = 5, kind = "busy", busy = 5, tasks = 2),
    class = c("rustcluster_timeline", "data.frame"), origin = as.POSIXct(1000, origin = "1970-01-01"), now = 6,
    workers = data.frame(host = c("a", "a"), rank = 1:2)
  )
  second <- first
  attr(second, "origin") <- attr(first, "origin") + 60
  attr(second, "workers") <- data.frame(host = c("a", "b"), rank = c(1L, 1L))
  joined <- rustcluster:::joinTimelines(first, second)
  expect_identical(joined$start, c(0, 60))
  expect_identical(joined$end, c(5, 65))
  expect_identical(attr(joined, "now"), 66)
  expect_identical(attr(joined, "workers"), data.frame(host = c("a", "a", "b"), rank = c(1L, 2L, 1L)))

  dir <- local_run_dir()
  run <- startRun(dir, 1:4, function(i) Sys.sleep(0.05), spec = 2)
  run$wait(60)
  timeline <- run$timeline()
  expect_s3_class(timeline, "rustcluster_timeline")
  expect_identical(sum(timeline$tasks), 4)
  file <- tempfile(fileext = ".pdf")
  grDevices::pdf(file)
  plot(run)
  grDevices::dev.off()
  expect_gt(file.size(file), 1000)
  unlink(file)
})

test_that("a saved run object works in another session", {
  dir <- local_run_dir()
  run <- startRun(dir, 1:3, sqrt, spec = 1)
  run$wait(60)
  file <- tempfile(fileext = ".rds")
  saveRDS(run, file)
  child <- start_child({
    run <- readRDS(file)
    say("sum", sum(unlist(as.list(run$results()))))
    say("state", run$status()$state)
  }, values = list(file = file))
  expect_child_ends_well(child)
  expect_equal(as.numeric(child_said(child, "sum")), sum(sqrt(1:3)))
  expect_identical(child_said(child, "state"), "done")
  unlink(file)
})

test_that("nothing is left", {
  unlink(lists, recursive = TRUE)
  Sys.unsetenv("R_USER_DATA_DIR")
  expect_no_leftovers()
})
