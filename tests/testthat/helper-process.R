# Processes: which are alive, which descend from which, and R scripts run as children of the test session. All
# facts are read from /proc, because a test has to see what the kernel knows, and not what the package assumes.

skip_unless_proc <- function() {
  skip_if_not(dir.exists("/proc/self/task"), "needs /proc")
}

# Emulators of other processors accept such a limit and ignore it.
skip_unless_memory_limits <- function() {
  kept <- system2("sh", c("-c", shQuote("ulimit -d 4000000; ulimit -d")), stdout = TRUE)
  skip_if_not(identical(kept, "4000000"), "limits of memory are not kept here")
}

long_tests <- function() {
  nzchar(Sys.getenv("RUSTCLUSTER_LONG_TESTS"))
}

skip_unless_long <- function() {
  skip_if_not(long_tests(), "set RUSTCLUSTER_LONG_TESTS=1 to run the long tests")
}

# Returns the fields after the name in /proc/<pid>/stat: state, ppid, pgrp, session, ... The name ends with a
# parenthesis, and may itself contain parentheses and blanks: hence the greedy match.
proc_stat <- function(pid) {
  file <- sprintf("/proc/%d/stat", as.integer(pid))
  line <- tryCatch(
    suppressWarnings(readLines(file, n = 1L)),
    error = function(e) character()
  )
  if (length(line) == 0L) {
    return(NULL)
  }
  strsplit(sub("^.*\\) ", "", line), " ", fixed = TRUE)[[1L]]
}

proc_state <- function(pid) {
  stat <- proc_stat(pid)
  if (is.null(stat)) NA_character_ else stat[[1L]]
}

proc_parent <- function(pid) as.integer(proc_stat(pid)[[2L]])
proc_group <- function(pid) as.integer(proc_stat(pid)[[3L]])
proc_session <- function(pid) as.integer(proc_stat(pid)[[4L]])
proc_nice <- function(pid) as.integer(proc_stat(pid)[[17L]])

# A zombie has ended. Which process has to reap it (often pid 1) does not matter.
alive <- function(pids) {
  vapply(as.integer(pids), function(pid) {
    state <- proc_state(pid)
    !is.na(state) && !state %in% c("Z", "X")
  }, logical(1))
}

all_pids <- function() {
  as.integer(grep("^[0-9]+$", list.files("/proc"), value = TRUE))
}

# Returns children, grandchildren, ... of `pid`, with zombies: a zombie child of the head is a process that the
# package forgot to reap.
descendants <- function(pid = Sys.getpid()) {
  pids <- all_pids()
  parents <- vapply(pids, function(p) {
    stat <- proc_stat(p)
    if (is.null(stat)) NA_integer_ else as.integer(stat[[2L]])
  }, integer(1))
  found <- integer()
  layer <- as.integer(pid)
  repeat {
    # Those of processes that have just ended are NA, as is the pid of a runner that has not started yet.
    layer <- setdiff(pids[!is.na(parents) & parents %in% layer], found)
    if (length(layer) == 0L) {
      return(sort(found))
    }
    found <- c(found, layer)
  }
}

# Returns the matching lines of smaps_rollup, such as "^Pss:", in MB, for each of these processes.
memory_of <- function(pids, pattern) {
  vapply(pids, function(pid) {
    lines <- grep(pattern, readLines(sprintf("/proc/%d/smaps_rollup", pid)), value = TRUE)
    as.numeric(gsub("[^0-9]", "", lines)) / 1024
  }, 0)
}

skip_unless_smaps <- function(pid) {
  skip_if_not(file.exists(sprintf("/proc/%d/smaps_rollup", pid)))
}

# Returns the maximum growth of this process while it evaluates an expression, in MB.
growth_here <- function(expr) {
  skip_if_not(file.exists("/proc/self/clear_refs"))
  memory <- function(what) {
    line <- grep(paste0("^", what), readLines("/proc/self/status"), value = TRUE)
    as.numeric(gsub("[^0-9]", "", line)) / 1024
  }
  gc()
  reset <- tryCatch({
    writeLines("5", "/proc/self/clear_refs")
    TRUE
  }, error = function(e) FALSE, warning = function(w) FALSE)
  skip_if_not(reset)
  before <- memory("VmRSS")
  expr
  memory("VmHWM") - before
}

open_fds <- function(pid = "self") length(list.files(sprintf("/proc/%s/fd", pid)))
threads_of <- function(pid = "self") length(list.files(sprintf("/proc/%s/task", pid)))

# Polls a condition, because the event happens in another process. The time limit only guards against waiting
# forever, and is not tested.
wait_until <- function(cond, timeout = 30, interval = 0.02) {
  deadline <- proc.time()[[3L]] + timeout
  repeat {
    if (isTRUE(cond())) {
      return(TRUE)
    }
    if (proc.time()[[3L]] > deadline) {
      return(FALSE)
    }
    Sys.sleep(interval)
  }
}

# The documented limit is one second. The slack is for a busy machine; RUSTCLUSTER_TEST_SLACK=0 tests the
# documented limit.
slack <- function() as.numeric(Sys.getenv("RUSTCLUSTER_TEST_SLACK", "4"))

expect_gone <- function(pids, within = 1) {
  pids <- as.integer(pids)
  gone <- wait_until(function() !any(alive(pids)), timeout = within + slack())
  left <- pids[alive(pids)]
  what <- vapply(left, function(p) {
    paste0(p, " (", gsub("\\s+", " ", process_command(p)), "), state ", proc_state(p))
  }, "")
  expect(gone, paste("still there:", paste(what, collapse = ", ")))
  # Leftovers would disturb the tests that follow.
  for (p in left) tools::pskill(p, tools::SIGKILL)
  invisible(gone)
}

expect_alive <- function(pids) {
  dead <- as.integer(pids)[!alive(pids)]
  expect(length(dead) == 0L, paste("gone:", paste(dead, collapse = ", ")))
  invisible(pids)
}

process_command <- function(pid, what = "cmdline") {
  file <- sprintf("/proc/%d/%s", as.integer(pid), what)
  bytes <- tryCatch(
    suppressWarnings(readBin(file, "raw", 4096L)),
    error = function(e) raw()
  )
  bytes[bytes == as.raw(0L)] <- as.raw(32L)
  rawToChar(bytes)
}

# Replaces the package's function of this name until the calling frame ends.
local_function <- function(name, fun, .frame = parent.frame()) {
  namespace <- asNamespace("rustcluster")
  put <- function(fun) {
    unlockBinding(name, namespace)
    assign(name, fun, namespace)
    lockBinding(name, namespace)
  }
  do.call("on.exit", list(bquote(.(put)(.(get(name, namespace)))), add = TRUE, after = FALSE), envir = .frame)
  put(fun)
}

# ---- nothing may be left at the end of a file --------------------------------

leftovers <- new.env(parent = emptyenv())

# Called at the top of a file.
watch_processes <- function() {
  leftovers$before <- if (dir.exists("/proc")) descendants() else integer()
  leftovers$pids <- integer()
}

# Records the processes of a cluster. A replacement is unknown here, but is a descendant of the head while it
# lives.
note_processes <- function(cl) {
  leftovers$pids <- unique(c(
    leftovers$pids,
    as.integer(clusterPids(cl)), as.integer(agentPids(cl))
  ))
  cl
}

note_pids <- function(pids) {
  leftovers$pids <- unique(c(leftovers$pids, as.integer(pids)))
  invisible(pids)
}

# Called as the last test of a file, when its clusters have been stopped.
expect_no_leftovers <- function() {
  # Clusters that no test holds any more end when they are garbage-collected, which may be late in a short session.
  gc()
  expect_gone(leftovers$pids)
  wait_until(
    function() length(setdiff(descendants(), leftovers$before)) == 0L,
    timeout = 1 + slack()
  )
  left <- setdiff(descendants(), leftovers$before)
  expect(
    length(left) == 0L,
    paste("children left:", paste(left, vapply(left, process_command, ""), collapse = "; "))
  )
}

# ---- clusters that end with the test -----------------------------------------

# Returns a cluster of this package that is stopped when the calling test (or function) ends: by on.exit() of
# that frame, so that no package is needed.
local_cluster <- function(..., .frame = parent.frame()) {
  cl <- note_processes(makeRustCluster(...))
  do.call(
    "on.exit",
    list(bquote(.(stop_quietly)(.(cl))), add = TRUE, after = FALSE),
    envir = .frame
  )
  cl
}

stop_quietly <- function(cl) {
  tryCatch(
    suppressWarnings(parallel::stopCluster(cl)),
    error = function(e) NULL
  )
  invisible()
}

# ---- R scripts as children ---------------------------------------------------

# Starts `code` (an expression in braces) as a script of a new Rscript, with
# both packages attached, and returns at once. In the script,
#   say(...)  appends a line to a file that child_lines() reads,
# and `dir` is a folder shared with the test. `values` are put before the code.
#
# A shell starts the child, outlives it and writes its exit status: R cannot start a process in the background
# and ask for its status later. The shell makes the child ignore SIGINT, and R keeps that from 4.6 on: hence
# env.
start_child <- function(code, values = list(), prefix = "exec env --default-signal=INT",
                        env = character(), args = character(),
                        attach = TRUE, prelude = "", public = FALSE,
                        .frame = parent.frame()) {
  dir <- tempfile("child-", tmpdir = if (public) "/tmp" else tempdir())
  dir.create(dir)
  if (public) Sys.chmod(dir, "1777", use_umask = FALSE)
  code <- strip_srcref(substitute(code))
  script <- file.path(dir, "script.R")
  head <- c(
    sprintf("dir <- %s", deparse(dir)),
    "say <- function(...) cat(paste(...), '\\n', sep = '', file = file.path(dir, 'said'), append = TRUE)",
    "seconds <- function() proc.time()[[3L]]",
    if (attach) {
      c(
        "suppressPackageStartupMessages(library(parallel))",
        "suppressPackageStartupMessages(library(rustcluster))"
      )
    }
  )
  for (name in names(values)) {
    head <- c(head, paste(name, "<-", paste(deparse(values[[name]]), collapse = "\n")))
  }
  body <- if (is.call(code) && identical(code[[1L]], as.name("{"))) as.list(code)[-1L] else list(code)
  text <- unlist(lapply(body, deparse, width.cutoff = 100L))
  writeLines(c(head, text), script)
  env <- c(paste0("R_LIBS=", shQuote(paste(.libPaths(), collapse = ":"))), "R_TESTS=", env)
  rscript <- file.path(R.home("bin"), "Rscript")
  run <- paste(prefix, shQuote(rscript), paste(args, collapse = " "), shQuote(script))
  shell <- c(
    "#!/bin/sh",
    paste("export", env),
    prelude,
    sprintf(
      "( %s ) >%s 2>%s </dev/null &", run,
      shQuote(file.path(dir, "out")), shQuote(file.path(dir, "err"))
    ),
    sprintf("echo $! >%s", shQuote(file.path(dir, "pid"))),
    "wait $!",
    # Rename the file, so that a reader sees all of it or nothing.
    sprintf("echo $? >%s", shQuote(file.path(dir, "status.new"))),
    sprintf("mv %s %s", shQuote(file.path(dir, "status.new")), shQuote(file.path(dir, "status")))
  )
  start <- file.path(dir, "start.sh")
  writeLines(shell, start)
  system(paste("sh", shQuote(start), ">/dev/null 2>&1"), wait = FALSE)
  pidfile <- file.path(dir, "pid")
  if (!wait_until(function() isTRUE(file.size(pidfile) > 0), 20)) {
    stop("the child R session did not start")
  }
  child <- list(dir = dir, pid = as.integer(readLines(pidfile)))
  do.call(
    "on.exit",
    list(bquote(.(end_child)(.(child))), add = TRUE, after = FALSE),
    envir = .frame
  )
  child
}

end_child <- function(child) {
  if (is.na(child_status(child))) tools::pskill(child$pid, tools::SIGKILL)
  unlink(child$dir, recursive = TRUE)
}

child_read <- function(child, what) {
  file <- file.path(child$dir, what)
  if (file.exists(file)) readLines(file, warn = FALSE) else character()
}

# Returns the lines that the child has written by say(). A value written by `say("name", ...)` is found by its
# name.
child_lines <- function(child) child_read(child, "said")

child_said <- function(child, name) {
  lines <- child_lines(child)
  hit <- lines[startsWith(lines, paste0(name, " ")) | lines == name]
  if (length(hit) == 0L) NULL else trimws(substring(hit[[length(hit)]], nchar(name) + 2L))
}

child_pids <- function(child, name) {
  as.integer(strsplit(child_said(child, name), " +")[[1L]])
}

child_status <- function(child) {
  status <- child_read(child, "status")
  if (length(status) == 0L) NA_integer_ else as.integer(status)
}

child_report <- function(child) {
  paste(c(
    "said:", child_lines(child), "out:", utils::tail(child_read(child, "out"), 30),
    "err:", utils::tail(child_read(child, "err"), 30)
  ), collapse = "\n")
}

# Waits until the child has written `name`. Otherwise the test fails with all lines of the child, instead of
# waiting forever.
child_wait_for <- function(child, name, timeout = 60) {
  said <- wait_until(
    function() !is.null(child_said(child, name)) || !is.na(child_status(child)),
    timeout
  )
  ok <- said && !is.null(child_said(child, name))
  if (!ok) stop("the child never said '", name, "'\n", child_report(child), call. = FALSE)
  child_said(child, name)
}

child_wait_end <- function(child, timeout = 60) {
  ended <- wait_until(function() !is.na(child_status(child)), timeout)
  if (!ended) stop("the child did not end\n", child_report(child), call. = FALSE)
  child_status(child)
}

child_signal <- function(child, signal) tools::pskill(child$pid, signal)

expect_child_ends_well <- function(child, timeout = 60) {
  status <- child_wait_end(child, timeout)
  expect(identical(status, 0L), paste0("status ", status, "\n", child_report(child)))
  invisible(status)
}

# ---- interrupts ---------------------------------------------------------------

# Sends SIGINT to this process from outside, after some time. While system() waits for the shell to start that,
# this process ignores the signal, which would be lost.
interrupt_after <- function(seconds) {
  pid <- Sys.getpid()
  ignored <- sprintf("grep -q '^SigIgn:.*[2367abef]$' /proc/%d/status 2>/dev/null", pid)
  system(
    sprintf("(sleep %.4f; while %s; do :; done; kill -INT %d)", seconds, ignored, pid), wait = FALSE
  )
}

interrupted <- function(expr, after) {
  began <- proc.time()[[3L]]
  interrupt_after(after)
  got <- tryCatch(
    {
      expr
      # The call may have ended before the interrupt.
      Sys.sleep(10)
      "not interrupted"
    },
    interrupt = function(e) "interrupted"
  )
  expect_equal(got, "interrupted")
  proc.time()[[3L]] - began - after
}

# In the global environment, so that functions of a test are not sent with the variable.
local_big <- function(n, .frame = parent.frame()) {
  assign("big", numeric(n), globalenv())
  do.call("on.exit", list(quote(rm("big", envir = globalenv())), add = TRUE, after = FALSE), envir = .frame)
}

# Repeats an expression until the interrupt that is sent after some time is raised. Returns FALSE if it is not
# raised in a long time.
until_interrupted <- function(expr, after) {
  code <- substitute(expr)
  env <- parent.frame()
  deadline <- proc.time()[[3L]] + 20
  tryCatch(
    {
      # The interrupt may be raised at once, and must be handled here.
      interrupt_after(after)
      while (proc.time()[[3L]] < deadline) eval(code, env)
      FALSE
    },
    interrupt = function(e) TRUE
  )
}

# C code that is loaded here until the calling frame ends; returns its file. It is compiled once in a session: a copy is
# as good as new.
# `stop_button`: after so many microseconds, sets the flag that R checks, as the stop button of a front end
# does, from another thread and without a signal.
# `deaf`: does not respond to interrupts.
# `bump`: adds 1 to a number in place, whatever else refers to it.
# `mark`: sets an attribute in place.
# `scribble`: writes invalid messages into all sockets of this process.
# `hang_up`: closes all files except the first three.
# `serialized_by`: a number that calls a function whenever it is serialized. Its value after reading is the
# value of the function, if the reader has loaded this code.
compiled <- function(.frame = parent.frame()) {
  skip_on_cran()
  if (is.null(helpers$library)) helpers$library <- compile_helpers()
  if (is.na(helpers$library)) skip("there is no compiler")
  dir <- tempfile("c-")
  dir.create(dir)
  library <- file.path(dir, "helpers.so")
  file.copy(helpers$library, library)
  dyn.load(library)
  do.call("on.exit", list(bquote(dyn.unload(.(library))), add = TRUE, after = FALSE), envir = .frame)
  library
}

helpers <- new.env(parent = emptyenv())

# Returns the file of the compiled code, or NA.
compile_helpers <- function() {
  dir <- tempfile("c-")
  dir.create(dir)
  source <- file.path(dir, "helpers.c")
  writeLines(c(
    "#include <pthread.h>",
    "#include <sys/socket.h>",
    "#include <unistd.h>",
    "#include <Rinternals.h>",
    "#include <R_ext/Altrep.h>",
    "#include <R_ext/Rdynload.h>",
    "static R_altrep_class_t by_call;",
    "static SEXP state(SEXP x) {",
    "  SEXP call = PROTECT(lang1(R_altrep_data1(x)));",
    "  SEXP value = eval(call, R_GlobalEnv);",
    "  UNPROTECT(1);",
    "  return value;",
    "}",
    "static SEXP from_state(SEXP class, SEXP state) { return state; }",
    "static R_xlen_t one(SEXP x) { return 1; }",
    "void R_init_helpers(DllInfo *info) {",
    "  by_call = R_make_altreal_class(\"by_call\", \"helpers\", info);",
    "  R_set_altrep_Serialized_state_method(by_call, state);",
    "  R_set_altrep_Unserialize_method(by_call, from_state);",
    "  R_set_altrep_Length_method(by_call, one);",
    "}",
    "SEXP serialized_by(SEXP fun) { return R_new_altrep(by_call, fun, R_NilValue); }",
    "SEXP bump(SEXP x) {",
    "  REAL(x)[0] += 1;",
    "  return ScalarReal(REAL(x)[0]);",
    "}",
    "SEXP mark(SEXP x, SEXP value) {",
    "  SEXP before = getAttrib(x, install(\"mark\"));",
    "  setAttrib(x, install(\"mark\"), value);",
    "  return before;",
    "}",
    "extern int R_interrupts_pending;",
    "static int delay;",
    "static void *press(void *unused) {",
    "  usleep(delay);",
    "  R_interrupts_pending = 1;",
    "  return unused;",
    "}",
    "void stop_button(int *microseconds) {",
    "  pthread_t thread;",
    "  delay = *microseconds;",
    "  if (pthread_create(&thread, 0, press, 0) == 0) pthread_detach(thread);",
    "}",
    "void scribble(void) {",
    "  for (int fd = 3; fd < 256; fd++) send(fd, \"no message at all, by any reading of it\", 39, 0);",
    "}",
    "void hang_up(void) {",
    "  for (int fd = 3; fd < 256; fd++) close(fd);",
    "}",
    "void shut_down(void) {",
    "  for (int fd = 3; fd < 256; fd++) shutdown(fd, SHUT_RDWR);",
    "}",
    "void deaf(void) {",
    "  for (;;) sleep(60);",
    "}"
  ), source)
  status <- suppressWarnings(system2(
    file.path(R.home("bin"), "R"), c("CMD", "SHLIB", "-o", shQuote(file.path(dir, "helpers.so")), shQuote(source)),
    stdout = FALSE, stderr = FALSE
  ))
  if (status == 0L) file.path(dir, "helpers.so") else NA_character_
}

# ---- faults --------------------------------------------------------------------

# Functions in the global environment, as those of a script: functions of a test would be sent with its frame.
global <- function(expr) eval(strip_srcref(substitute(expr)), globalenv())

# Makes files, each of which ends one process: the one that removes it.
trap <- function(n = 1) {
  files <- tempfile(rep("trap-", n))
  file.create(files)
  files
}

spring <- global(function(trap) {
  for (file in trap) {
    if (file.exists(file) && suppressWarnings(file.remove(file))) {
      tools::pskill(Sys.getpid(), tools::SIGKILL)
      Sys.sleep(60)
    }
  }
})

# Returns the value of the call and the worker failures of which it warned. Other warnings pass.
with_losses <- function(expr) {
  losses <- list()
  value <- withCallingHandlers(expr, rustcluster_worker_lost = function(w) {
    if (!inherits(w, "warning")) return()
    losses <<- c(losses, list(w))
    invokeRestart("muffleWarning")
  })
  list(value = value, losses = losses)
}

# Ends the worker that calls it.
poison <- global(function(i, bad) {
  if (i %in% bad) {
    message("task ", i, ": 100%s")
    tools::pskill(Sys.getpid(), tools::SIGKILL)
    Sys.sleep(60)
  }
  i * 10
})

# A host that does not see the folder `hidden`: an empty file system is mounted there in a namespace of its own.
hides <- function(hidden, workers = 2L) {
  script <- paste0("mount -t tmpfs none '", hidden, "' && exec \"$@\"")
  commandLauncher(c("unshare", "-rm", "sh", "-c", script, "sh"), workers = workers, host = "apart",
                  rscript = file.path(R.home("bin"), "Rscript"))
}
