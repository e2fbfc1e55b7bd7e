# Hosts that fail, each at another point of its life, beside one that does not: no host costs another, and each is
# named with its reason.

watch_processes()

# A command in the place of Rscript: lines of sh.
command <- function(...) {
  file <- tempfile("command-")
  writeLines(c("#!/bin/sh", ...), file)
  Sys.chmod(file, "0755")
  file
}

# R's Rscript, with R code before ours, in which `put(name, fun)` replaces a function of the package.
before <- function(...) {
  code <- tempfile("before-")
  writeLines(c(
    "ns <- loadNamespace('rustcluster', lib.loc = c(Sys.getenv('RUSTCLUSTER_LIB'), .libPaths()))",
    "put <- function(name, fun) { unlockBinding(name, ns); assign(name, fun, ns) }", ...
  ), code)
  command(
    "for last; do :; done", paste0("code=$(cat ", code, ")"), "n=$#; i=1",
    "while [ $i -lt $n ]; do a=$1; shift; set -- \"$@\" \"$a\"; i=$((i+1)); done; shift",
    "exec Rscript \"$@\" \"$code", "$last\""
  )
}

# A cluster of a host that works and of these. Its warnings are in attribute "warnings".
beside_good <- function(commands, ..., start_method = "fork", ncore = 1, .frame = parent.frame()) {
  bad <- lapply(unname(commands), function(command) {
    list(host = "127.0.0.1", ncore = ncore, rscript = command, start_method = start_method)
  })
  warnings <- list()
  cl <- withCallingHandlers(
    local_cluster(c(list(list(host = "localhost", ncore = 2)), bad), on_failure = "warn", ..., .frame = .frame),
    warning = function(w) {
      warnings <<- c(warnings, list(w))
      invokeRestart("muffleWarning")
    }
  )
  structure(cl, warnings = warnings)
}

# Each host has the problem that its name says, and the two workers of the other one work.
expect_left_out <- function(cl, commands) {
  hosts <- clusterHosts(cl)
  expect_identical(hosts$up, c(2L, rep(0L, length(commands))))
  for (i in seq_along(commands)) expect_match(hosts$problem[[i + 1L]], names(commands)[[i]])
  told <- paste(vapply(attr(cl, "warnings"), conditionMessage, ""), collapse = "\n")
  for (reason in sub("^\\^", "", names(commands))) expect_match(told, reason)
  for (w in attr(cl, "warnings")) {
    expect_s3_class(w, "rustcluster_host_left_out")
    expect_true(all(w$host == "127.0.0.1"))
  }
  expect_length(cl, 2L)
  expect_identical(clusterApply(cl, 1:4, function(i) i), as.list(1:4))
  began <- proc.time()[[3L]]
  expect_silent(parallel::stopCluster(cl))
  proc.time()[[3L]] - began
}

test_that("only a host whose command fails is left out", {
  not_executable <- tempfile("command-")
  writeLines("#!/bin/sh", not_executable)
  commands <- c(
    "exited with status 3" = command("exit 3"),
    "temporary directory .*is full" = command("exit 0"),
    "prints without end" = command("yes"),
    "exited with status 7.*its stderr:.*x" = command("head -c 300 /dev/urandom; echo x >&2; exit 7"),
    "killed by signal 9" = command("kill -9 $$"),
    "closed its stream, did not end and was killed" = command("exec >&- <&-; exec sleep 100"),
    "Rscript cannot be run on this machine.*Permission denied" = not_executable,
    "Rscript cannot be run on this machine.*No such file" = "/nowhere/Rscript",
    # Not ssh's words: nothing here goes through ssh.
    "^the agent's process exited with status 255 *\nits stderr:\n.*Permission denied" =
      command("echo 'u@h: Permission denied (publickey).' >&2; exit 255")
  )
  cl <- beside_good(commands)
  expect_lt(expect_left_out(cl, commands), 5)
  told <- paste(vapply(attr(cl, "warnings"), conditionMessage, ""), collapse = "\n")
  expect_no_match(told, "the host accepts none of your keys")
  expect_no_leftovers()
})

test_that("only a host that fails in greeting, loading or forking is left out", {
  commands <- c(
    "installed on this machine: restart this R session" = before("put('packageVersionText', function() '9.9')"),
    "exited with status 1.*cannot go on" = before("put('loadBeforeFork', function(packages, after) stop('cannot go on'))"),
    "cannot be attached" = before("put('loadBeforeFork', function(packages, after) 'x cannot be attached')"),
    "exited with status 4" = before("put('loadBeforeFork', function(packages, after) quit('no', 4))"),
    "signal 11.*segfault" = before("put('loadBeforeFork', function(packages, after) tools::pskill(Sys.getpid(), 11))"),
    "no worker started: worker [0-9]+ exited with status 5 before it was ready" =
      before("put('serveTasks', function() quit('no', 5))"),
    "no worker started: worker [0-9]+ was killed by signal 9 .SIGKILL. before it was ready" =
      before("put('serveTasks', function() { tools::pskill(Sys.getpid(), 9); Sys.sleep(9) })")
  )
  cl <- beside_good(commands)
  expect_left_out(cl, commands)
  expect_no_leftovers()
})

test_that("only a host whose spawned workers all fail is left out", {
  commands <- c(
    "no worker started: worker [0-9]+ exited with status 4 before it was ready" =
      before("put('attachPackages', function(p) quit('no', 4))"),
    "no worker started: .*x cannot be attached" = before("put('attachPackages', function(p) 'x cannot be attached')")
  )
  cl <- beside_good(commands, start_method = "spawn")
  expect_left_out(cl, commands)
  mark <- tempfile()
  # The first of the two ends. It is not started again, since it has not been up.
  once <- before(
    "serve <- ns$serveTasks",
    sprintf("put('serveTasks', function() if (suppressWarnings(dir.create('%s'))) quit('no', 6) else serve())", mark)
  )
  cl <- beside_good(once, ncore = 2)
  expect_identical(clusterHosts(cl)$up, c(2L, 1L))
  expect_match(
    conditionMessage(attr(cl, "warnings")[[1L]]),
    "127.0.0.1.*only 1 of 2 workers started: worker [34] exited with status 6 before it was ready"
  )
  expect_length(cl, 3L)
  expect_identical(clusterApply(cl, 1:6, function(i) i), as.list(1:6))
})

test_that("only a host that hangs at any point of its start is left out", {
  skip_unless_long()
  commands <- c(
    "no response within 8 s" = command("exec sleep 100"),
    "no response within 8 s" = command("kill -STOP $$"),
    "not ready within 8 s" = before("put('loadBeforeFork', function(packages, after) Sys.sleep(100))"),
    "not ready within 8 s" = before("put('serveTasks', function() Sys.sleep(100))")
  )
  began <- proc.time()[[3L]]
  cl <- beside_good(commands, setup_timeout = 8)
  expect_lt(proc.time()[[3L]] - began, 16 + slack())
  # An agent that loads packages cannot be asked to end, and has some time for it.
  expect_lt(expect_left_out(cl, commands), 11 + slack())
  expect_no_leftovers()
})

test_that("a head that is killed while an agent loads packages leaves no process", {
  skip_unless_proc()
  told <- tempfile()
  slow <- before(sprintf(
    "put('loadBeforeFork', function(packages, after) { cat(Sys.getpid(), tempdir(), '\\n', file = '%s'); repeat NULL })", told
  ))
  child <- start_child({
    makeRustCluster(list(list(host = "127.0.0.1", ncore = 1, rscript = slow)))
  }, values = list(slow = slow))
  expect_true(wait_until(function() file.exists(told) && grepl("\n", readChar(told, 1e4), fixed = TRUE), 30))
  said <- scan(told, "", quiet = TRUE)
  pids <- c(as.integer(said[[1L]]), descendants(as.integer(said[[1L]])))
  expect_alive(pids)
  expect_true(dir.exists(said[[2L]]))
  tools::pskill(child$pid, tools::SIGKILL)
  expect_gone(pids)
  expect_true(wait_until(function() !dir.exists(said[[2L]]), 5))
})

test_that("a host that exceeds setup_timeout is an error that names it, and no process is left", {
  late <- list(host = "127.0.0.1", ncore = 1, rscript = before("put('serveTasks', function() Sys.sleep(100))"))
  error <- caught(makeRustCluster(list(list(host = "localhost", ncore = 1), late), setup_timeout = 4))
  expect_rust_error(error, "start_failed")
  expect_identical(error$host, "127.0.0.1")
  expect_match(conditionMessage(error), "only 1 of 2 workers were ready after 4 s; some workers are missing on host .127.0.0.1.")
  expect_no_leftovers()
})

test_that("a host that cannot restore its workers does not affect others", {
  cl <- local_cluster(list(list(host = "localhost", ncore = 1), list(host = "127.0.0.1", ncore = 2)))
  flag <- tempfile()
  on.exit(unlink(flag), add = TRUE, after = FALSE)
  x <- 1
  clusterExport(cl, c("flag", "x"), environment())
  clusterEvalQ(cl, if (file.exists(flag)) quit("no", 3))
  file.create(flag)
  tools::pskill(clusterPids(cl)[2:3], tools::SIGKILL)
  f <- function(i) {
    Sys.sleep(0.02)
    i + x
  }
  environment(f) <- globalenv()
  expect_identical(suppressWarnings(unlist(clusterApplyLB(cl, 1:30, f))), 1:30 + 1)
})

# ---- hosts that are up ------------------------------------------------------------

# A host with two workers that work, and one with two of which the first to call fail() runs `code`, once.
# Attributes: `mark`, a file that exists from then on; `pids` of all processes; `tmp`, where their temporary
# directories are.
two_hosts <- function(code, ..., .frame = parent.frame()) {
  tmp <- tempfile("tmp-")
  dir.create(tmp)
  spec <- list(list(host = "localhost", ncore = 2), list(host = "127.0.0.1", ncore = 2))
  cl <- local_cluster(spec, on_failure = "warn", rscript_envs = c(TMPDIR = tmp), ..., .frame = .frame)
  stopifnot(length(list.files(tmp)) > 0L)
  mark <- tempfile("mark-")
  fail <- eval(bquote(function() if (suppressWarnings(dir.create(.(mark)))) .(code)), globalenv())
  clusterCall(cl[3:4], assign, "fail", fail, globalenv())
  clusterCall(cl[1:2], assign, "fail", global(function() NULL), globalenv())
  clusterCall(cl, assign, "agent", agentPids(cl)[[2L]], globalenv())
  clusterCall(cl, dyn.load, compiled(.frame))
  structure(cl, mark = mark, pids = c(agentPids(cl), clusterPids(cl)), tmp = tmp)
}

# Stops the cluster. Nothing is left of processes, files and directories.
expect_ends_well <- function(cl) {
  began <- proc.time()[[3L]]
  expect_no_error(suppressWarnings(parallel::stopCluster(cl)))
  expect_lt(proc.time()[[3L]] - began, 20 + slack())
  expect_gone(attr(cl, "pids"))
  expect_no_leftovers()
  left <- function() list.files(attr(cl, "tmp"))
  wait_until(function() !length(left()), 1 + slack())
  expect_identical(left(), character())
}

# The value of the call, and the texts of the conditions that told of losses.
with_reports <- function(expr) {
  told <- ""
  note <- function(condition) {
    told <<- paste0(told, conditionMessage(condition), "\n")
    tryInvokeRestart(if (inherits(condition, "message")) "muffleMessage" else "muffleWarning")
  }
  value <- withCallingHandlers(expr, rustcluster_warning = note, rustcluster_message = note)
  list(value = value, told = told)
}

# How a worker, or its agent, ends. The names: what is told of that.
failures <- alist(
  "worker [34] .*signal 9" = tools::pskill(Sys.getpid(), 9),
  "worker [34] .*signal 11" = tools::pskill(Sys.getpid(), 11),
  "worker [34] .*signal 15" = tools::pskill(Sys.getpid(), 15),
  "worker [34] .*status 7" = quit("no", 7),
  "worker [34] " = .C("scribble"),
  "worker [34] " = .C("hang_up"),
  "worker [34] " = .C("shut_down"),
  "127.0.0.1.*signal 9" = tools::pskill(agent, 9),
  "127.0.0.1" = tools::pskill(agent, 15),
  "127.0.0.1.*signal 6" = tools::pskill(agent, 6)
)

test_that("a host that fails during tasks loses no task", {
  work <- global(function(i) {
    fail()
    Sys.sleep(0.01)
    i * 10
  })
  verbs <- alist(
    clusterApply(cl, 1:40, work), clusterApplyLB(cl, 1:40, work), clusterLapply(cl, 1:40, work),
    parallel::clusterApply(cl, 1:40, work), parallel::clusterApplyLB(cl, 1:40, work)
  )
  for (i in seq_along(failures)) {
    # Each verb meets some of the failures, and with the long tests all.
    for (verb in if (long_tests()) verbs else verbs[i %% length(verbs) + 1L]) {
      cl <- two_hosts(failures[[i]])
      got <- with_reports(eval(verb))
      expect_identical(got$value, as.list(1:40 * 10), info = deparse(c(verb, failures[[i]])))
      expect_true(dir.exists(attr(cl, "mark")))
      expect_match(got$told, names(failures)[[i]], info = deparse(failures[[i]]))
      # The good host has lost nothing.
      expect_identical(clusterPids(cl)[1:2], attr(cl, "pids")[3:4])
      expect_ends_well(cl)
    }
  }
})

test_that("a host that fails while it sends results does not affect other results", {
  # The answer is larger than what the head takes before it is asked for: a process that fails then has sent a
  # part of it.
  work <- global(function(i) {
    if (i > 2) file.create(paste0(mark, i))
    seq_len(2e6) + i
  })
  for (whose in c("worker", "agent")) {
    cl <- two_hosts(quote(NULL), buffer_limit = 2^20, memory_limit = 2^31)
    environment(work) <- list2env(list(mark = attr(cl, "mark")), parent = globalenv())
    for (i in 1:4) parallel:::sendCall(cl[[i]], work, list(i))
    expect_true(wait_until(function() all(file.exists(paste0(attr(cl, "mark"), 3:4)))))
    pids <- attr(cl, "pids")[-(1:2)]
    expect_true(wait_until(function() all(vapply(pids, proc_state, "") == "S")))
    tools::pskill(if (whose == "worker") pids[[3L]] else agentPids(cl)[[2L]], 9)
    receive <- function(i) tryCatch(parallel:::recvResult(cl[[i]]), rustcluster_host_failed = conditionMessage)
    got <- with_reports(lapply(1:4, receive))
    if (whose == "worker") {
      expect_identical(got$value, lapply(1:4, work))
      expect_match(got$told, "worker 3 .*signal 9")
    } else {
      # What is sent by hand is bound to its node.
      expect_identical(got$value[1:2], lapply(1:2, work))
      expect_match(unlist(got$value[3:4]), "127.0.0.1.*signal 9")
    }
    expect_ends_well(cl)
  }
})

test_that("a host that fails during stopCluster() does not affect others", {
  # The exit handlers of the good host run to their end.
  for (i in seq_along(failures)) {
    cl <- two_hosts(failures[[i]])
    done <- tempfile(c("done-", "done-"))
    clusterApply(cl[1:2], done, function(done) {
      assign(".Last", eval(bquote(function() {
        Sys.sleep(0.3)
        file.create(.(done))
      })), globalenv())
      NULL
    })
    clusterEvalQ(cl[3:4], {
      .Last <- function() fail()
    })
    expect_ends_well(cl)
    expect_identical(file.exists(done), c(TRUE, TRUE), info = deparse(failures[[i]]))
    expect_true(dir.exists(attr(cl, "mark")))
  }
  for (pid in c("worker", if (long_tests()) "agent")) {
    cl <- two_hosts(quote(NULL))
    tools::pskill(attr(cl, "pids")[[if (pid == "worker") 5L else 2L]], tools::SIGSTOP)
    expect_ends_well(cl)
  }
})

# ---- what is told -----------------------------------------------------------------

test_that("a full temporary directory is reported as such", {
  if (Sys.info()[["effective_user"]] != "root") skip("only root can mount")
  dir <- tempfile("full-")
  dir.create(dir)
  mounted <- system2("mount", c("-t", "tmpfs", "-o", "size=64k,nr_inodes=12", "tmpfs", dir), stderr = FALSE)
  if (mounted != 0L) skip("nothing can be mounted here")
  on.exit({
    system2("umount", c("-l", dir))
    unlink(dir, recursive = TRUE)
  }, add = TRUE, after = FALSE)
  expect_full <- function() {
    spec <- list(host = "localhost", ncore = 1, rscript_envs = c(TMPDIR = dir))
    error <- caught(makeRustCluster(list(spec)))
    expect_rust_error(error, "start_failed")
    expect_match(conditionMessage(error), "temporary directory (TMPDIR, or /tmp) is full", fixed = TRUE)
  }
  # No room for what is written, and then none for another file.
  system2("dd", c("if=/dev/zero", paste0("of=", dir, "/fill"), "bs=1k", "count=100"), stdout = FALSE, stderr = FALSE)
  expect_full()
  suppressWarnings(file.create(file.path(dir, 1:20)))
  expect_full()
})

test_that("only failures of ssh itself are reported as failures of ssh", {
  ours <- list(host = "h1", local = FALSE)
  problem <- function(stderr, status, up = FALSE, reason = "the agent's process exited") {
    rustcluster:::hostProblem(ours, reason, stderr, "", status, up)
  }
  denied <- "u@h1: Permission denied (publickey,password)."
  expect_match(problem(denied, 255L), "^the host accepts none of your keys")
  expect_match(problem(paste0("banner\n", denied, "\r"), 255L), "^the host accepts none of your keys")
  expect_match(problem("ssh: connect to host h1 port 22: Connection refused", 255L), "^no sshd listens")
  expect_match(problem("ssh: connect to host h1 port 22: Connection timed out", 255L), "^the host cannot be reached")
  # The same words of others.
  expect_match(problem(denied, 1L), "^the agent's process exited")
  expect_match(problem(denied, 255L, up = TRUE), "^the agent's process exited")
  expect_match(problem("cannot open file '/x': Permission denied", 255L), "^the agent's process exited")
  expect_match(problem("Error: connection to db: Connection refused", 255L), "^the agent's process exited")
  expect_match(problem("", NA, TRUE, "its `outfile` /x cannot be opened: Permission denied"), "^its `outfile`")
  expect_match(problem("sh: 1: exec: /x/Rscript: Permission denied", 126L), "^Rscript cannot be executed on the host")
  expect_match(problem("sh: 1: exec: Rscript: not found", 127L), "^Rscript was not found on the host")
})

test_that("an `outfile` that is not writable is reported as such, also over ssh", {
  skip_without_sshd()
  ssh <- local_sshd()
  outfile <- file.path(tempfile("no-such-"), "out")
  error <- caught(over_ssh(ssh, c("127.0.0.2" = 1), outfile = outfile))
  expect_rust_error(error, "start_failed")
  expect_match(conditionMessage(error), "`outfile`", fixed = TRUE)
  expect_no_match(conditionMessage(error), "the host accepts none of your keys")
  not_executable <- file.path(ssh$dir, "Rscript")
  writeLines("#!/bin/sh", not_executable)
  error <- caught(over_ssh(ssh, list(list(host = "127.0.0.2", ncore = 1, rscript = not_executable))))
  expect_match(conditionMessage(error), "Rscript cannot be executed on the host")
})

test_that("control characters in text of hosts and workers are escaped", {
  printable <- rustcluster:::printable
  expect_identical(printable(c("a\033]0;t\007b\r\nc\td\re", NA, "")), c("a\\x1b]0;t\\x07b\nc\td\\x0de", NA, ""))
  expect_identical(printable("\u00fc\u202ex\u009b"), "\u00fc\\u202ex\\x9b")
  expect_identical(printable("bad\xff"), "bad<ff>")
  # A code point above U+10FFFF.
  expect_identical(printable(c("\u00fc", "a\xf7\x89\xbb\x82\033")), c("\u00fc", "a<f7><89><bb><82>\\x1b"))
  expect_identical(printable("\xf4\x90\x80\x80"), "<f4><90><80><80>")
  expect_identical(printable(character()), character())
  error <- caught(makeRustCluster(list(list(
    host = "localhost", ncore = 1, rscript = command("printf '\\033[2Jhello\\a\\n' >&2; exit 7")
  ))))
  expect_match(conditionMessage(error), "\\x1b[2Jhello\\x07", fixed = TRUE)
  expect_no_match(conditionMessage(error), "\033")
  # cli evaluates what is in braces.
  row <- data.frame(host = "h", r_version = "{stop(1)}\033", cores = 1L, seconds = 1, problem = NA_character_)
  expect_message(rustcluster:::showHost(row, 1L), "h: R {stop(1)}\\x1b, 1 cores", fixed = TRUE)
  row$problem <- "{stop(1)}\033\nmore"
  expect_message(rustcluster:::showHost(row, 1L), "h: {stop(1)}\\x1b", fixed = TRUE)
  cl <- local_cluster(1)
  error <- suppressWarnings(caught(clusterCall(cl, function() {
    cat("\033[2Jlast words\n")
    tools::pskill(Sys.getpid(), 9)
    Sys.sleep(9)
  })))
  expect_match(conditionMessage(error), "\\x1b[2Jlast words", fixed = TRUE)
  expect_no_match(conditionMessage(error), "\033")
  try(clusterCall(cl, function() stop("\033[31mred")), silent = TRUE)
  expect_no_match(paste(capture.output(print(clusterStatus(cl))), collapse = "\n"), "\033")
})

test_that("no process is left", {
  expect_no_leftovers()
})
