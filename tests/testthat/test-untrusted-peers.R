# What is no agent is told from one, and nobody else can take part in a cluster.

watch_processes()

# A command in the place of Rscript.
stranger <- function(...) {
  path <- tempfile("stranger-", fileext = ".sh")
  writeLines(c("#!/bin/sh", ...), path)
  Sys.chmod(path, "755")
  path
}

# Children that are there now and were not before.
children <- function() setdiff(descendants(), leftovers$before)

magic <- "printf '\\n<rustcluster stream 1>\\n'"

test_that("any program in place of an agent is one error and leaves no process", {
  skip_unless_proc()
  strangers <- list(
    "status 0" = "exit 0",
    "status 9.*last words" = c("echo last words >&2", "exit 9"),
    "signal 9" = "kill -9 $$",
    "prints without end" = "exec yes",
    # Bytes that no string of R's can hold, and what printf would take for more than text.
    "100%s%n" = c("printf 'a\\000b\\377\\033[31m100%%s%%n'", "exit 1"),
    "unknown frame kind" = c(magic, "printf '\\356%0999d' 0", "exec sleep 100"),
    # A control frame of 2^32 - 1 bytes.
    "announces a body" = c(
      magic, "printf '\\001\\003%0.s' 1", "printf '\\000%.0s' 1 2 3 4 5 6 7 8 9 10 11 12 13 14",
      "printf '\\377\\377\\377\\377'", "exec sleep 100"
    ),
    # The head's own words, sent back to it.
    "did not greet|bad control message" = "exec cat",
    "no response within" = "exec sleep 100",
    "no response within" = c(magic, "exec sleep 100"),
    "no response within" = c("trap '' TERM INT HUP", "while :; do sleep 1; done")
  )
  for (i in seq_along(strangers)) {
    silent <- names(strangers)[[i]] == "no response within"
    error <- caught(makeRustCluster(
      2, rscript = do.call(stranger, as.list(strangers[[i]])), setup_timeout = if (silent) 1 else 30
    ))
    expect_rust_error(error, "start_failed")
    expect_match(conditionMessage(error), names(strangers)[[i]])
    expect_gone(children())
  }
})

test_that("an untrusted peer among the hosts does not affect the other hosts", {
  skip_unless_proc()
  spec <- list(
    list(host = "localhost", ncore = 2),
    list(host = "localhost", ncore = 1, rscript = stranger(magic, "exec head -c 9999 /dev/urandom"))
  )
  expect_warning(
    cl <- note_processes(makeRustCluster(spec, on_failure = "warn")),
    class = "rustcluster_host_left_out"
  )
  expect_length(cl, 2)
  expect_equal(unlist(clusterApply(cl, 1:4, function(i) i^2)), (1:4)^2)
  stopCluster(cl)
  expect_gone(children())
})

# ---- other users ----

# The inodes of the sockets that a process holds.
sockets_of <- function(pid) {
  fds <- list.files(sprintf("/proc/%d/fd", pid), full.names = TRUE)
  links <- suppressWarnings(Sys.readlink(fds))
  sub("^socket:\\[([0-9]+)\\]$", "\\1", grep("^socket:", links, value = TRUE))
}

# Of a table of /proc/net, the inodes of the sockets that somebody else could reach.
reachable <- function(table) {
  file <- file.path("/proc/net", table)
  if (!file.exists(file)) return(character())
  rows <- strsplit(trimws(readLines(file)[-1]), "[ \t]+")
  if (table == "unix") {
    # With a name, in the file system or not.
    rows <- Filter(function(row) length(row) > 7L, rows)
    return(vapply(rows, `[[`, "", 7L))
  }
  # In state 0A they listen; one of UDP has no such state.
  if (startsWith(table, "tcp")) rows <- Filter(function(row) row[[4L]] == "0A", rows)
  vapply(rows, `[[`, "", 10L)
}

test_that("no socket of a cluster accepts connections", {
  skip_unless_proc()
  # In a session of its own: this one may have sockets for other reasons.
  child <- start_child({
    cl <- makeRustCluster(2, start_method = start)
    parallel::clusterCall(cl, identity, 1)
    say("pids", paste(c(Sys.getpid(), agentPids(cl), clusterPids(cl)), collapse = " "))
    Sys.sleep(60)
  }, values = list(start = "spawn"))
  child_wait_for(child, "pids")
  pids <- child_pids(child, "pids")
  expect_length(pids, 4L)
  held <- unlist(lapply(pids, sockets_of))
  expect_gt(length(held), 0L)
  for (table in c("tcp", "tcp6", "udp", "udp6", "unix")) {
    expect_identical(intersect(held, reachable(table)), character())
  }
})

test_that("files of a cluster are accessible to their user only", {
  skip_unless_proc()
  # Whatever the session's umask is.
  old <- Sys.umask("0")
  on.exit(Sys.umask(old), add = TRUE, after = FALSE)
  for (start in c("fork", "spawn")) {
    before <- list.files(dirname(tempdir()), full.names = TRUE)
    cl <- local_cluster(2, start_method = start)
    dirs <- unlist(clusterCall(cl, tempdir))
    expect_length(unique(dirs), 2L)
    made <- setdiff(list.files(dirname(tempdir()), full.names = TRUE), before)
    # Other tests' sessions may have made some, too.
    made <- unique(c(dirs, made[grepl("rustcluster", basename(made))]))
    known <- file.info(made)
    expect_true(all(as.character(known$mode) == "700"))
    expect_true(all(known$uname == Sys.info()[["effective_user"]]))
    # No process maps a file of it, or shared memory with a name, that others can read.
    mapped <- unlist(lapply(c(agentPids(cl), clusterPids(cl)), function(pid) {
      lines <- readLines(sprintf("/proc/%d/maps", pid))
      unique(sub("^([^ ]+ +){5}", "", grep("/dev/shm/|/tmp/", lines, value = TRUE)))
    }))
    installed <- vapply(mapped, function(file) any(startsWith(file, .libPaths())), NA)
    mapped <- mapped[file.exists(mapped) & !as.logical(installed)]
    expect_true(all(bitwAnd(as.integer(file.info(mapped)$mode), 63L) == 0L))
    stopCluster(cl)
    expect_false(any(dir.exists(dirs)))
  }
})

test_that("another user can neither inspect nor stop a cluster", {
  skip_unless_proc()
  skip_if_not(Sys.info()[["effective_user"]] == "root", "takes root")
  skip_if_not(nzchar(Sys.which("setpriv")), "there is no setpriv")
  cl <- local_cluster(2)
  clusterEvalQ(cl, writeLines("secret", file.path(tempdir(), "secret")))
  dirs <- unlist(clusterCall(cl, tempdir))
  as_nobody <- function(command) {
    suppressWarnings(system2("setpriv", c(
      "--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c", shQuote(command)
    ), stdout = FALSE, stderr = FALSE))
  }
  # It is able to do what it may.
  expect_identical(as_nobody("kill -0 $$ && ls / && ls /proc/$$/fd"), 0L)
  for (dir in dirs) {
    expect_true(as_nobody(paste("ls", dir)) != 0L)
    expect_true(as_nobody(paste("cat", file.path(dir, "secret"))) != 0L)
    expect_true(as_nobody(paste("touch", file.path(dir, "new"))) != 0L)
  }
  pids <- c(agentPids(cl), clusterPids(cl))
  for (pid in pids) {
    expect_true(as_nobody(paste0("ls /proc/", pid, "/fd")) != 0L)
    expect_true(as_nobody(paste0("head -c 1 /proc/", pid, "/fd/0")) != 0L)
    expect_true(as_nobody(paste0("head -c 1 /proc/", pid, "/environ")) != 0L)
    expect_true(as_nobody(paste0("head -c 1 /proc/", pid, "/mem")) != 0L)
    expect_true(as_nobody(paste("kill -0", pid)) != 0L)
    expect_true(as_nobody(paste("kill -9", pid)) != 0L)
  }
  expect_alive(pids)
  expect_equal(unlist(clusterCall(cl, Sys.getpid)), as.integer(clusterPids(cl)))
})

test_that("no process is left", {
  expect_no_leftovers()
})
