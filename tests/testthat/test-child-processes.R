# What workers start themselves: it ends with its worker, or somebody hears of it.

skip_on_cran()
watch_processes()

# Has each node start two children that outlive the task, one of them through mclapply. Returns
# the pids of all. Not by clusterCall(), whose effects last: a replaced worker would have its own.
start_children <- function(cl) {
  pids <- unlist(clusterApply(cl, seq_along(cl), function(i) {
    sleeper <- system("sleep 300 >/dev/null 2>&1 & echo $!", intern = TRUE)
    fork <- parallel::mcparallel(repeat NULL)
    as.integer(c(sleeper, fork$pid))
  }))
  note_pids(pids)
  pids
}

skip_unless_setsid <- function() {
  skip_unless_proc()
  skip_if_not(nzchar(Sys.which("setsid")), "needs setsid")
}

guard_of <- function(cl) {
  children <- descendants(agentPids(cl))
  # Others may end meanwhile.
  name <- function(pid) tryCatch(readLines(sprintf("/proc/%d/comm", pid)), error = function(e) "")
  names <- vapply(children, function(pid) suppressWarnings(name(pid)), "")
  children[names == "rc-guard"]
}

test_that("child processes of workers end with a killed agent", {
  skip_unless_proc()
  for (start in c("fork", "spawn")) {
    cl <- local_cluster(2, start_method = start)
    pids <- start_children(cl)
    expect_length(pids, 4L)
    guard <- guard_of(cl)
    expect_length(guard, 1L)
    expect_alive(c(pids, guard))
    workers <- clusterPids(cl)
    # One busy, with a child that it waits for.
    parallel:::sendCall(cl[[1L]], function() system("sleep 300"), list())
    expect_true(wait_until(function() {
      length(setdiff(descendants(workers[[1L]]), pids)) > 0L
    }))
    waited <- note_pids(setdiff(descendants(workers[[1L]]), pids))
    tools::pskill(agentPids(cl), tools::SIGKILL)
    expect_gone(c(pids, waited, workers, guard))
    expect_warning(stopCluster(cl), class = "rustcluster_host_failed")
  }
})

test_that("child processes of workers end with a killed head", {
  skip_unless_proc()
  child <- start_child({
    cl <- makeRustCluster(2)
    pids <- clusterCall(cl, function() {
      sleeper <- system("sleep 300 >/dev/null 2>&1 & echo $!", intern = TRUE)
      c(sleeper, parallel::mcparallel(repeat NULL)$pid)
    })
    for (node in cl) parallel:::sendCall(node, function() repeat NULL, list())
    say("pids", paste(c(agentPids(cl), clusterPids(cl), unlist(pids)), collapse = " "))
    Sys.sleep(60)
  })
  child_wait_for(child, "pids")
  pids <- child_pids(child, "pids")
  expect_length(pids, 7L)
  guard <- note_pids(setdiff(descendants(pids[[1L]]), pids))
  expect_length(guard, 1L)
  expect_alive(pids)
  child_signal(child, tools::SIGKILL)
  expect_gone(c(pids, guard))
})

test_that("an agent that is killed while it starts workers leaves no process", {
  skip_unless_proc()
  for (wait in c(0, 0.02, 0.1)) {
    child <- start_child({
      options(warn = -1)
      cl <- makeRustCluster(40, start_method = "spawn")
      say("up")
      Sys.sleep(60)
    })
    # R itself, and not the shell that starts it, whose own children come and go.
    agent <- function() {
      Filter(function(pid) {
        stat <- proc_stat(pid)
        !is.null(stat) && stat[[2L]] == child$pid && grepl("/exec/R ", process_command(pid), fixed = TRUE)
      }, descendants(child$pid))
    }
    # From its first worker on: the guard is there before that.
    has_worker <- function() any(vapply(agent(), function(pid) length(descendants(pid)) > 1L, NA))
    expect_true(wait_until(has_worker, interval = 0.001))
    Sys.sleep(wait)
    pids <- note_pids(descendants(child$pid))
    tools::pskill(agent(), tools::SIGKILL)
    # Those that were made meanwhile have the same parents.
    pids <- note_pids(union(pids, descendants(child$pid)))
    child_wait_end(child)
    expect_gone(pids)
  }
})

# A directory in which all temporary directories are, and which is the only place for them.
local_tmpdir <- function(.frame = parent.frame()) {
  dir <- tempfile("tmp-")
  dir.create(dir)
  before <- Sys.getenv("TMPDIR", NA)
  restore <- function() {
    if (is.na(before)) Sys.unsetenv("TMPDIR") else Sys.setenv(TMPDIR = before)
    unlink(dir, recursive = TRUE)
  }
  do.call("on.exit", list(bquote(.(restore)()), add = TRUE, after = FALSE), envir = .frame)
  Sys.setenv(TMPDIR = dir)
  dir
}

expect_empty <- function(dir) {
  wait_until(function() length(list.files(dir)) == 0L, 1 + slack())
  expect_identical(list.files(dir), character())
}

test_that("no temporary directory outlives a killed agent or worker", {
  skip_unless_proc()
  dir <- local_tmpdir()
  write <- global(function() repeat writeLines("x", tempfile()))
  for (start in c("fork", "spawn")) {
    cl <- local_cluster(3, start_method = start)
    clusterEvalQ(cl, writeLines("x", tempfile()))
    expect_gte(length(list.files(dir)), 3L)
    tools::pskill(clusterPids(cl)[[1L]], tools::SIGKILL)
    suppressWarnings(clusterCall(cl, function() 1))
    expect_length(list.files(dir), if (start == "fork") 3L else 4L)
    parallel:::sendCall(cl[[1L]], write, list())
    tools::pskill(agentPids(cl), tools::SIGKILL)
    expect_empty(dir)
    stop_quietly(cl)
  }
})

test_that("processes that are killed during their start leave no temporary directory", {
  skip_unless_proc()
  dir <- local_tmpdir()
  profile <- tempfile("profile-", tmpdir = "/tmp")
  on.exit(unlink(profile), add = TRUE, after = FALSE)
  starts <- list(
    # The agent hangs before it greets.
    list("Sys.sleep(60)", "fork"),
    # Workers hang, in R's own start.
    list("if (any(grepl('workerMain', commandArgs()))) Sys.sleep(60)", "spawn")
  )
  for (way in starts) {
    writeLines(way[[1L]], profile)
    error <- caught(makeRustCluster(
      2, setup_timeout = 2, start_method = way[[2L]], rscript_envs = c(R_PROFILE_USER = profile)
    ))
    expect_rust_error(error, "start_failed")
    expect_empty(dir)
  }
})

test_that("no temporary directory of the package outlives a killed head", {
  skip_unless_proc()
  dir <- local_tmpdir()
  for (start in c("fork", "spawn")) {
    child <- start_child({
      cl <- makeRustCluster(2, start_method = start)
      parallel:::sendCall(cl[[1L]], function() repeat writeLines("x", tempfile()), list())
      Sys.sleep(0.3)
      say("own", basename(tempdir()))
      say("pids", paste(c(agentPids(cl), clusterPids(cl)), collapse = " "))
      Sys.sleep(60)
    }, values = list(start = start))
    child_wait_for(child, "pids")
    tools::pskill(child$pid, tools::SIGKILL)
    expect_gone(child_pids(child, "pids"))
    # R leaves its own.
    unlink(file.path(dir, child_said(child, "own")), recursive = TRUE)
    expect_empty(dir)
  }
})

test_that("the guard holds no descriptor of the agent and takes little memory", {
  skip_unless_proc()
  cl <- local_cluster(2)
  guard <- guard_of(cl)
  expect_equal(proc_session(guard), guard)
  expect_equal(proc_group(guard), guard)
  fds <- list.files(sprintf("/proc/%d/fd", guard), full.names = TRUE)
  targets <- Sys.readlink(fds)
  expect_equal(sum(targets == "/dev/null"), 3L)
  expect_equal(sum(startsWith(targets, "pipe:")), 1L)
  expect_length(targets, 4L)
  expect_equal(normalizePath(sprintf("/proc/%d/cwd", guard)), "/")
  status <- readLines(sprintf("/proc/%d/status", guard))
  resident <- as.numeric(sub("[^0-9]*([0-9]+) kB", "\\1", grep("^VmRSS", status, value = TRUE)))
  expect_lt(resident, 16000)
  for (signal in c(tools::SIGTERM, tools::SIGINT, tools::SIGHUP, 13L)) tools::pskill(guard, signal)
  expect_alive(guard)
  stopCluster(cl)
  expect_gone(guard)
})

test_that("the cluster works without its guard", {
  skip_unless_proc()
  cl <- local_cluster(2, retries = 0)
  guard <- guard_of(cl)
  tools::pskill(guard, tools::SIGKILL)
  expect_gone(guard)
  # Not even a zombie is left of it.
  expect_true(wait_until(function() is.na(proc_state(guard))))
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
  error <- caught(clusterCall(cl[1], function() tools::pskill(Sys.getpid(), tools::SIGKILL)))
  expect_rust_error(error, "worker_lost")
  expect_equal(clusterCall(cl[2], identity, 1), list(1))
  pids <- c(agentPids(cl), clusterPids(cl)[[2L]])
  stopCluster(cl)
  expect_gone(pids)
})

test_that("child processes end with their worker", {
  skip_unless_proc()
  cl <- local_cluster(3, retries = 0)
  pids <- start_children(cl)
  of <- function(i) pids[2 * i - 1:0]
  # Killed from outside.
  tools::pskill(clusterPids(cl)[[1L]], tools::SIGKILL)
  expect_gone(of(1))
  expect_warning(clusterCall(cl, identity, 1), class = "rustcluster_worker_lost")
  # By itself.
  expect_rust_error(caught(clusterCall(cl[2], quit)), "worker_lost")
  expect_gone(of(2))
  # Asked to.
  expect_alive(of(3))
  stopCluster(cl)
  expect_gone(of(3))
})

test_that("busy workers that ignore SIGTERM, and their children, end with the cluster", {
  skip_unless_proc()
  cl <- local_cluster(2)
  pids <- start_children(cl)
  workers <- clusterPids(cl)
  for (node in cl) {
    parallel:::sendCall(node, function() {
      # A shell that heeds nothing, and waits for another one.
      system("trap '' TERM INT HUP; sh -c \"trap '' TERM INT HUP; sleep 300; sleep 300\"; true")
      repeat NULL
    }, list())
  }
  expect_true(wait_until(function() {
    all(vapply(workers, function(pid) length(descendants(pid)) >= 3L, NA))
  }))
  below <- note_pids(unlist(lapply(workers, descendants)))
  for (pid in workers) tools::pskill(pid, tools::SIGTERM)
  stopCluster(cl)
  expect_gone(c(pids, below, workers))
})

# What `code` warns of, and its value.
warned <- function(code) {
  warnings <- list()
  value <- withCallingHandlers(code, warning = function(w) {
    warnings[[length(warnings) + 1L]] <<- w
    invokeRestart("muffleWarning")
  })
  list(value = value, warnings = warnings)
}

# A shell command that starts a process that lives on by itself, and prints its pid.
daemon <- function(command = "sleep 300") {
  sprintf("setsid sh -c 'echo $$; exec %s >/dev/null 2>&1' &", command)
}

start_daemon <- function(node, command = daemon()) {
  start <- function(command) {
    # Not intern = TRUE, which would wait for the end of the pipe.
    file <- tempfile()
    system(paste0("{ ", command, " } >", file))
    while (!isTRUE(file.size(file) > 0)) Sys.sleep(0.01)
    as.integer(readLines(file))
  }
  pid <- clusterApply(node, command, start)[[1L]]
  note_pids(pid)
  pid
}

expect_left_behind <- function(warnings, pids, ranks, command = "sleep 300", host = "localhost") {
  expect_length(warnings, length(pids))
  expect_setequal(vapply(warnings, `[[`, 1L, "pid"), pids)
  for (w in warnings) {
    expect_s3_class(w, c("rustcluster_left_behind", "rustcluster_warning", "warning"))
    expect_equal(w$host, host)
    expect_identical(w$rank, ranks[[match(w$pid, pids)]])
    expect_equal(w$command, command)
    expect_match(conditionMessage(w), paste0("kill ", w$pid), fixed = TRUE)
    expect_match(conditionMessage(w), host, fixed = TRUE)
    expect_match(conditionMessage(w), command, fixed = TRUE)
  }
}

end_processes <- function(pids) {
  expect_alive(pids)
  for (pid in pids) tools::pskill(pid, tools::SIGKILL)
  expect_gone(pids)
}

test_that("a detached process is reported by stopCluster() and keeps running", {
  skip_unless_setsid()
  for (start in c("fork", "spawn")) {
    cl <- local_cluster(3, start_method = start)
    pids <- c(start_daemon(cl[3]), start_daemon(cl[1]))
    # Neither while its worker is there, nor with what ends with its worker.
    start_children(cl[2])
    got <- warned(clusterCall(cl, identity, 1))
    expect_length(got$warnings, 0L)
    got <- warned(stopCluster(cl))
    expect_left_behind(got$warnings, pids, c(3L, 1L))
    end_processes(pids)
  }
})

test_that("a worker failure reports each of its own detached processes once", {
  skip_unless_setsid()
  cl <- local_cluster(3, retries = 0)
  pids <- vapply(1:3, function(i) start_daemon(cl[i]), 1L)
  got <- warned(caught(clusterCall(cl[1], function() tools::pskill(Sys.getpid(), tools::SIGKILL))))
  expect_rust_error(got$value, "worker_lost")
  expect_left_behind(got$warnings, pids[[1L]], 1L)
  warnings <- list()
  got <- warned(stopCluster(cl[2]))
  expect_true(wait_until(function() {
    warnings <<- c(warnings, got$warnings, warned(clusterCall(cl[3], identity, 1))$warnings)
    got$warnings <<- list()
    length(warnings) > 0L
  }))
  expect_left_behind(warnings, pids[[2L]], 2L)
  # One that has ended is nothing to tell of.
  end_processes(pids[[3L]])
  expect_true(wait_until(function() is.na(proc_state(pids[[3L]]))))
  expect_length(warned(stopCluster(cl))$warnings, 0L)
  end_processes(pids[1:2])
})

test_that("detached processes of detached processes and of busy workers are reported", {
  skip_unless_setsid()
  cl <- local_cluster(2)
  twice <- start_daemon(cl[1], "setsid sh -c \"setsid sh -c 'echo \\$\\$; exec sleep 300 >/dev/null 2>&1' &\" &")
  # The shells above it are the worker's and end with it.
  file <- tempfile()
  parallel:::sendCall(cl[[2L]], function(file) {
    system(paste0("setsid sh -c 'echo $$ >", file, "; exec sleep 300'; true"))
  }, list(file))
  expect_true(wait_until(function() isTRUE(file.size(file) > 0)))
  below <- as.integer(readLines(file))
  note_pids(below)
  expect_true(wait_until(function() process_command(below) == "sleep 300 "))
  got <- warned(stopCluster(cl))
  expect_left_behind(got$warnings, c(twice, below), c(1L, 2L))
  end_processes(c(twice, below))
})

test_that("a detached process without R_SESSION_TMPDIR is reported without a rank", {
  skip_unless_setsid()
  cl <- local_cluster(2)
  pid <- start_daemon(cl[1], "env -i setsid /bin/sh -c 'echo $$; exec sleep 300 >/dev/null 2>&1' &")
  got <- warned(stopCluster(cl))
  expect_left_behind(got$warnings, pid, NA_integer_)
  end_processes(pid)
})

test_that("child processes that end leave no zombie and are not reported", {
  skip_unless_setsid()
  cl <- local_cluster(2)
  for (i in 1:20) clusterCall(cl, function() system("sleep 0.01 >/dev/null 2>&1 & setsid true &"))
  known <- c(clusterPids(cl), guard_of(cl))
  agent <- agentPids(cl)
  expect_true(wait_until(function() setequal(descendants(agent), known)))
  expect_length(warned(stopCluster(cl))$warnings, 0L)
})

test_that("child processes of packages of the agent are not reaped", {
  skip_unless_setsid()
  # A package that starts a process, and one that has ended and not been waited for.
  lib <- tempfile("lib")
  source <- file.path(tempfile("src"), "rcStarter")
  dir.create(lib)
  dir.create(file.path(source, "R"), recursive = TRUE)
  writeLines(c("Package: rcStarter", "Version: 1.0", "Title: T", "License: MIT",
               "Imports: parallel"), file.path(source, "DESCRIPTION"))
  writeLines("", file.path(source, "NAMESPACE"))
  writeLines(c(
    ".onLoad <- function(lib, pkg) {",
    "  own <- parallel::mcparallel(Sys.sleep(300), detached = TRUE)",
    "  ended <<- pipe('echo $$')",
    "  open(ended)",
    "  Sys.setenv(RC_OWN = paste(own$pid, readLines(ended, 1)))",
    "}",
    "ended <- NULL"
  ), file.path(source, "R", "a.R"))
  install <- c("CMD", "INSTALL", "--no-test-load", paste0("--library=", lib), source)
  expect_equal(system2(file.path(R.home("bin"), "R"), install, stdout = FALSE, stderr = FALSE), 0L)
  libs <- paste(c(lib, .libPaths()), collapse = ":")
  cl <- local_cluster(2, packages = "rcStarter", rscript_envs = c(R_LIBS = libs))
  own <- as.integer(strsplit(clusterCall(cl[1], Sys.getenv, "RC_OWN")[[1L]], " ")[[1L]])
  note_pids(own)
  # Others are waited for nevertheless.
  ended <- clusterCall(cl, function() as.integer(system("setsid true & echo $!", intern = TRUE)))
  expect_true(wait_until(function() all(is.na(vapply(unlist(ended), proc_state, "")))))
  expect_equal(proc_state(own[[2L]]), "Z")
  left <- start_daemon(cl[1])
  got <- warned(stopCluster(cl))
  expect_left_behind(got$warnings, left, 1L)
  end_processes(left)
  if (alive(own[[1L]])) tools::pskill(own[[1L]], tools::SIGKILL)
})

test_that("detached processes on other hosts are reported", {
  skip_unless_setsid()
  # A stand-in for ssh, which runs the command here.
  ssh <- tempfile()
  writeLines(c("#!/bin/sh", "while [ $# -gt 1 ]; do shift; done", "exec sh -c \"$1\""), ssh)
  Sys.chmod(ssh, "755")
  cl <- local_cluster(list(list(host = "elsewhere", ncore = 2)), rshcmd = ssh,
                      rscript = file.path(R.home("bin"), "Rscript"), rlibs = .libPaths())
  pid <- start_daemon(cl[2])
  got <- warned(stopCluster(cl))
  expect_left_behind(got$warnings, pid, 2L, host = "elsewhere")
  end_processes(pid)
})

test_that("a worker that closes all its descriptors is killed and reported", {
  skip_unless_proc()
  skip_if_not(nzchar(Sys.which(strsplit(system2(file.path(R.home("bin"), "R"),
    c("CMD", "config", "CC"), stdout = TRUE), " ")[[1L]][[1L]])), "needs a C compiler")
  folder <- tempfile("c")
  dir.create(folder)
  writeLines(c(
    "#include <unistd.h>",
    "void close_all(void) { for (int fd = 0; fd < 1024; fd++) close(fd); }"
  ), file.path(folder, "closes.c"))
  built <- system(paste("cd", folder, "&&", file.path(R.home("bin"), "R"),
                        "CMD SHLIB closes.c >log 2>&1"))
  skip_if_not(built == 0L, "the C code could not be compiled")
  library <- file.path(folder, paste0("closes", .Platform$dynlib.ext))
  cl <- local_cluster(2, retries = 0)
  # Not a fork of the worker, which has copies of all.
  sleeper <- note_pids(clusterApply(cl[1], 1, function(i) {
    as.integer(system("sleep 300 >/dev/null 2>&1 & echo $!", intern = TRUE))
  })[[1L]])
  worker <- clusterPids(cl)[[1L]]
  error <- caught(clusterApply(cl[1], library, function(library) {
    dyn.load(library)
    .C("close_all")
    repeat NULL
  }))
  expect_rust_error(error, "worker_lost")
  expect_equal(error$pid, worker)
  expect_equal(error$rank, 1L)
  expect_gone(c(worker, sleeper))
  expect_equal(clusterCall(cl[2], identity, 1), list(1))
  stopCluster(cl)
})

test_that("a cluster that a worker has made ends with that worker and is not reported", {
  skip_unless_setsid()
  cl <- local_cluster(2, retries = 0)
  inner <- clusterApply(cl, 1:2, function(i) {
    inner <- rustcluster::makeRustCluster(2)
    assign("inner", inner, globalenv())
    c(rustcluster::agentPids(inner), rustcluster::clusterPids(inner))
  })
  note_pids(unlist(inner))
  left <- c(start_daemon(cl[1]), start_daemon(cl[2]))
  got <- warned(caught(clusterCall(cl[1], function() tools::pskill(Sys.getpid(), tools::SIGKILL))))
  expect_rust_error(got$value, "worker_lost")
  expect_left_behind(got$warnings, left[[1L]], 1L)
  expect_gone(inner[[1L]])
  expect_alive(inner[[2L]])
  got <- warned(stopCluster(cl))
  expect_left_behind(got$warnings, left[[2L]], 2L)
  expect_gone(inner[[2L]])
  end_processes(left)
})

test_that("no process is left", {
  expect_no_leftovers()
})
