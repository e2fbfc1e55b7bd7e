# Commands and files on a login node over one ssh connection, the gateway there, and what is left when any of its
# processes is killed.

watch_processes()

internal <- function(name) get(name, asNamespace("rustcluster"))
engineHost <- internal("engineHost")
engineRun <- internal("engineRun")
engineRunAside <- internal("engineRunAside")
engineAsideResult <- internal("engineAsideResult")
engineAsideEnd <- internal("engineAsideEnd")
engineReadTail <- internal("engineReadTail")
engineGuard <- internal("engineGuard")
engineGuardRelease <- internal("engineGuardRelease")
engineGuardAlive <- internal("engineGuardAlive")
openLink <- internal("openLink")
startGateway <- internal("startGateway")
endLink <- internal("endLink")
linkProblem <- internal("linkProblem")

# Returns an open link to this test's sshd, which ends with the calling frame.
local_link <- function(ssh, ..., .frame = parent.frame()) {
  host <- openLink("127.0.0.2", rshcmd = ssh$rshcmd, ...)
  do.call("on.exit", list(bquote(.(endLink)(.(host$link), 10)), add = TRUE, after = FALSE), envir = .frame)
  host
}

# Returns the pids of all processes whose command contains a text.
pids_with <- function(text) {
  pids <- setdiff(all_pids(), Sys.getpid())
  pids[vapply(pids, function(pid) grepl(text, process_command(pid), fixed = TRUE), NA) & alive(pids)]
}

# Everything of a link that must not be left: paths, and processes by their commands.
link_traces <- function(link) c(link$local, link$remote)

expect_link_gone <- function(traces, within = 10) {
  # The test's own head has the path of its socket among its arguments.
  left <- function() {
    commands <- unlist(lapply(traces, function(text) vapply(pids_with(text), process_command, "")))
    c(traces[file.exists(traces)], grep("^[^ ]*python3 -c", commands, value = TRUE, invert = TRUE))
  }
  wait_until(function() length(left()) == 0L, within + slack())
  remains <- left()
  expect(length(remains) == 0L, paste("left:", paste(remains, collapse = "\n")))
}

# A script that cancels "jobs": processes whose pids are in a file. It removes its directory.
cancel_script <- function(dir) {
  c(
    sprintf("for p in `cat %s/jobs`; do kill -9 $p; done 2> /dev/null", dir), sprintf("echo cancelled >> %s.log", dir),
    sprintf("rm -rf %s", dir)
  )
}

# Writes files on a host, and returns the status.
write_files <- function(host, texts, modes = rep("0600", length(texts))) {
  engineRun(host, "sh", paste0(internal("writeFilesScript")(texts, modes), "\n", collapse = ""))$status
}

# Returns a directory with a job, a guard script and a cancel script.
local_jobs <- function(host, .frame = parent.frame()) {
  base <- tempfile("engine-")
  dir <- file.path(base, "run1")
  dir.create(dir, recursive = TRUE, mode = "0700")
  job <- as.integer(system("sleep 600 > /dev/null 2>&1 & echo $!", intern = TRUE))
  note_pids(job)
  texts <- list(
    paste0(job, "\n"), cancel_script(dir), c("while read -r x; do :; done", cancel_script(dir))
  )
  names(texts) <- file.path(dir, c("jobs", "cancel.sh", "guard.sh"))
  stopifnot(write_files(host, texts) == 0L)
  do.call("on.exit", list(bquote(unlink(.(base), recursive = TRUE)), add = TRUE, after = TRUE), envir = .frame)
  list(dir = dir, job = job, guard = file.path(dir, "guard.sh"), cancel = file.path(dir, "cancel.sh"))
}

# Echoes what agents send, in a process that listens on a Unix socket as a head would.
local_echo <- function(path, .frame = parent.frame()) {
  skip_if(!nzchar(Sys.which("python3")), "needs python3")
  code <- paste0(
    "import socket,sys,threading\n",
    "s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(9)\n",
    "def serve(c):\n",
    "  while True:\n",
    "    b=c.recv(1<<16)\n",
    "    if not b: break\n",
    "    c.sendall(b)\n",
    "  c.close()\n",
    "while True:\n",
    "  c,_=s.accept(); threading.Thread(target=serve,args=(c,),daemon=True).start()\n"
  )
  pid <- as.integer(system(paste(
    "python3 -c", shQuote(code), shQuote(path), "> /dev/null 2>&1 & echo $!"
  ), intern = TRUE))
  note_pids(pid)
  do.call("on.exit", list(bquote(tools::pskill(.(pid), tools::SIGKILL)), add = TRUE, after = FALSE), envir = .frame)
  if (!wait_until(function() file.exists(path))) stop("no socket")
  pid
}

ping <- function(port, text) {
  socket <- socketConnection(port = port, open = "r+b", blocking = TRUE, timeout = 30)
  on.exit(close(socket), add = TRUE, after = FALSE)
  # The echo of a large text needs room: read a part before the next one is written.
  starts <- seq(1, nchar(text), 3e5)
  parts <- lapply(starts, function(start) {
    part <- charToRaw(substr(text, start, start + 3e5 - 1))
    writeBin(part, socket)
    readBin(socket, "raw", length(part))
  })
  rawToChar(do.call(c, parts))
}

# Returns a login node with jobs, a guard and a gateway.
local_gateway <- function(ssh, heartbeat_timeout = 20, .frame = parent.frame()) {
  host <- local_link(ssh, heartbeat_timeout = heartbeat_timeout, .frame = .frame)
  jobs <- local_jobs(host, .frame)
  guard <- engineGuard(host, jobs$guard)
  local_echo(host$link$socket, .frame)
  port <- startGateway(host, jobs$cancel, address = "127.0.0.1", rscript = file.path(R.home("bin"), "Rscript"),
                       rlibs = .libPaths())
  gateway <- as.integer(readLines(file.path(host$link$remote, "gateway")))
  c(jobs, list(host = host, link = host$link, guard_process = guard, port = port, gateway = gateway))
}

expect_jobs_gone <- function(at, within = 10) {
  expect_gone(at$job, within)
  expect_true(wait_until(function() !file.exists(at$dir), within + slack()))
}

# Returns the pid of the ssh that holds the connection, without the shell that waits for it.
master_ssh <- function(at) {
  pids <- pids_with(paste("-M -S", at$link$control))
  pids[vapply(pids, function(pid) startsWith(process_command(pid), "ssh"), NA)]
}

# Runs a test here and on a login node.
on_both <- function(test, .frame = parent.frame()) {
  force(.frame)
  test(engineHost())
  host <- local_link(local_sshd(.frame), .frame = .frame)
  test(host)
}

test_that("commands give status, output and errors, here and on a login node", {
  skip_without_sshd()
  on_both(function(host) {
    result <- engineRun(host, c("sh", "-c", "cat; echo \"$0 it's\" >&2; exit 7", "a 'b' \"c\" $HOME !x"), "in\nput")
    expect_identical(result, list(
      status = 7L, stdout = "in\nput", stderr = "a 'b' \"c\" $HOME !x it's\n", timed_out = FALSE
    ))
    large <- as.raw(sample(1:255, 3e6, TRUE))
    echoed <- engineRun(host, "cksum", large)
    expect_match(echoed$stdout, "^[0-9]+ 3000000\n$")
    expect_identical(engineRun(host, "no_such_program_here")$status, 127L)
    expect_identical(engineRun(host, c("printf", "\u00e4\\000b"))$stdout, "\u00e4b")
  })
})

test_that("commands end at their time limit and when they are interrupted", {
  skip_without_sshd()
  on_both(function(host) {
    mark <- paste0("77", sample(1e6, 1))
    result <- engineRun(host, c("sleep", mark), timeout = 1)
    expect_true(result$timed_out)
    expect_true(wait_until(function() !length(pids_with(paste0("sleep ", mark)))))
    aside <- engineRunAside(host, c("sh", "-c", "sleep 0.3; echo done"))
    expect_null(engineAsideResult(aside))
    expect_true(wait_until(function() !is.null(engineAsideResult(aside))))
    expect_identical(engineAsideResult(aside)$stdout, "done\n")
    ended <- engineRunAside(host, c("sleep", "600"))
    engineAsideEnd(ended)
    expect_identical(engineAsideResult(ended)$status, NA_integer_)
  })
  local_function("raiseInterrupt", function() stop("interrupted"))
  mark <- paste0("78", sample(1e6, 1))
  expect_error(engineRun(engineHost(), c("sleep", mark)), "interrupted")
  expect_true(wait_until(function() !length(pids_with(paste0("sleep ", mark)))))
})

test_that("files arrive whole and for the user alone", {
  skip_without_sshd()
  on_both(function(host) {
    dir <- tempfile("engine-")
    dir.create(dir)
    on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
    texts <- list(c("it's $HOME `x` \\n", "end"), "#!/bin/sh\nexit 3\n")
    names(texts) <- file.path(dir, c("a key's file", "script"))
    expect_identical(write_files(host, texts, c("0600", "0700")), 0L)
    expect_identical(readLines(names(texts)[[1L]]), texts[[1L]])
    expect_identical(system(shQuote(names(texts)[[2L]])), 3L)
    expect_identical(format(file.mode(names(texts))), c("600", "700"))
    expect_setequal(list.files(dir), basename(names(texts)))
    expect_identical(engineReadTail(host, names(texts)[[2L]], 3), " 3\n")
    expect_identical(engineReadTail(host, file.path(dir, "none")), "")
    names(texts)[[2L]] <- file.path(dir, "none", "script")
    expect_identical(write_files(host, texts, c("0600", "0700")), 1L)
  })
})

test_that("the session of a guard writes its files first, and only if all lines have arrived", {
  skip_without_sshd()
  host <- local_link(local_sshd())
  dir <- tempfile("engine-")
  dir.create(dir)
  on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
  path <- function(name) file.path(dir, name)
  texts <- list(c("while read -r x; do", paste0("  printf '%s\\n' \"$x\" >> ", path("said")), "done"))
  names(texts) <- path("guard.sh")
  before <- internal("writeFilesScript")(texts, "0600")
  guard <- engineGuard(host, path("guard.sh"), before)
  # What follows at once is for the guard.
  expect_true(internal("background_send")(guard, "an order \\n\n  another"))
  expect_true(engineGuardRelease(guard, 20))
  expect_identical(readLines(path("said")), c("an order \\n", "another"))
  unlink(c(path("said"), path("guard.sh")))
  # The last line is missing.
  local_function("engineInput", function(input) charToRaw(paste0(utils::head(input, -2L), "\n", collapse = "")))
  guard <- engineGuard(host, path("guard.sh"), before)
  expect_true(engineGuardRelease(guard, 20))
  expect_identical(list.files(dir), character())
})

test_that("the guard cancels when it is released, here and on a login node", {
  skip_without_sshd()
  on_both(function(host) {
    jobs <- local_jobs(host)
    guard <- engineGuard(host, jobs$guard)
    expect_true(engineGuardAlive(guard))
    expect_alive(jobs$job)
    expect_true(engineGuardRelease(guard, 20))
    expect_gone(jobs$job)
    expect_false(file.exists(jobs$dir))
    expect_false(engineGuardAlive(guard))
  })
})

test_that("the gateway passes bytes on, and nothing is left when it is closed", {
  skip_without_sshd()
  ssh <- local_sshd()
  at <- local_gateway(ssh)
  expect_identical(ping(at$port, "hello there"), "hello there")
  expect_identical(ping(at$port, strrep("x", 3e5)), strrep("x", 3e5))
  expect_null(linkProblem(at$link))
  # Neither keys nor scripts are on a command line, and nobody else can connect to the sockets.
  expect_identical(format(file.mode(at$link$remote)), "700")
  expect_identical(format(file.mode(at$link$local)), "700")
  traces <- link_traces(at$link)
  endLink(at$link, 20)
  expect_link_gone(traces)
  expect_jobs_gone(at)
  expect_gone(at$gateway)
})

test_that("nothing is left when the head is killed", {
  skip_without_sshd()
  ssh <- local_sshd()
  jobs <- local_jobs(engineHost())
  child <- start_child({
    get <- function(name) getFromNamespace(name, "rustcluster")
    host <- get("openLink")("127.0.0.2", rshcmd = rshcmd)
    guard <- get("engineGuard")(host, jobs$guard)
    port <- get("startGateway")(host, jobs$cancel, address = "127.0.0.1", rscript = rscript, rlibs = .libPaths())
    say("traces", host$link$local, host$link$remote)
    # A fork of the head keeps descriptors of the head open.
    fork <- parallel::mcparallel(Sys.sleep(600))
    say("fork", fork$pid)
    say("gateway", readLines(file.path(host$link$remote, "gateway")))
    Sys.sleep(600)
  }, values = list(rshcmd = ssh$rshcmd, jobs = jobs, rscript = file.path(R.home("bin"), "Rscript")))
  gateway <- as.integer(child_wait_for(child, "gateway"))
  traces <- strsplit(child_said(child, "traces"), " ")[[1L]]
  fork <- note_pids(child_pids(child, "fork"))
  on.exit(tools::pskill(fork, tools::SIGKILL), add = TRUE, after = FALSE)
  expect_true(all(file.exists(traces)))
  expect_alive(c(gateway, jobs$job))
  child_signal(child, tools::SIGKILL)
  expect_jobs_gone(jobs)
  expect_gone(gateway, 5)
  expect_link_gone(traces)
  expect_alive(fork)
})

test_that("nothing is left when the ssh connection is killed, and the reason is known", {
  skip_without_sshd()
  ssh <- local_sshd()
  at <- local_gateway(ssh)
  tools::pskill(master_ssh(at), tools::SIGKILL)
  expect_jobs_gone(at)
  expect_gone(at$gateway, 5)
  expect_link_gone(link_traces(at$link))
  expect_match(linkProblem(at$link), "ssh connection to login node .*127.0.0.2.* ended")
  expect_match(engineRun(at$host, "true")$stderr, "ssh connection")
  # ssh does not open another connection.
  expect_false(engineRun(at$host, "true")$status %in% 0L)
})

test_that("nothing is left when the gateway is killed", {
  skip_without_sshd()
  ssh <- local_sshd()
  at <- local_gateway(ssh)
  tools::pskill(at$gateway, tools::SIGKILL)
  expect_jobs_gone(at)
  expect_link_gone(link_traces(at$link))
  expect_match(linkProblem(at$link), "127.0.0.2")
})

test_that("the gateway cancels the jobs if the guard is killed before the head ends", {
  skip_without_sshd()
  ssh <- local_sshd()
  at <- local_gateway(ssh)
  tools::pskill(pids_with(paste("sh", at$guard)), tools::SIGKILL)
  expect_true(wait_until(function() !engineGuardAlive(at$guard_process)))
  expect_identical(ping(at$port, "still there"), "still there")
  expect_alive(at$job)
  traces <- link_traces(at$link)
  endLink(at$link, 20)
  expect_jobs_gone(at)
  expect_link_gone(traces)
})

test_that("nothing is left when the link freezes", {
  skip_without_sshd()
  ssh <- local_sshd()
  at <- local_gateway(ssh, heartbeat_timeout = 2)
  tools::pskill(master_ssh(at), tools::SIGSTOP)
  expect_jobs_gone(at, 12)
  expect_gone(at$gateway, 12)
  expect_true(wait_until(function() !is.null(linkProblem(at$link)), 12))
  expect_match(linkProblem(at$link), "silent for 2 s")
  endLink(at$link, 5)
  expect_link_gone(link_traces(at$link))
})

test_that("a link is kept while this session is busy, and while large streams fill it", {
  skip_without_sshd()
  ssh <- local_sshd()
  at <- local_gateway(ssh, heartbeat_timeout = 2)
  Sys.sleep(5)
  expect_null(linkProblem(at$link))
  for (i in 1:5) expect_identical(nchar(ping(at$port, strrep("x", 2e6))), 2000000L)
  expect_alive(c(at$gateway, at$job))
})

test_that("a gateway that is stopped is killed in the end", {
  skip_without_sshd()
  skip_unless_long()
  ssh <- local_sshd()
  at <- local_gateway(ssh, heartbeat_timeout = 2)
  tools::pskill(at$gateway, tools::SIGSTOP)
  expect_jobs_gone(at, 12)
  expect_gone(at$gateway, 90)
})

test_that("problems of a login node name the host and the remedy", {
  skip_without_sshd()
  ssh <- local_sshd()
  failure <- function(expr) tryCatch(expr, rustcluster_start_failed = function(e) e)
  e <- failure(openLink("127.0.0.2", rshcmd = "ssh", rshopts = c("-p", free_port())))
  expect_match(conditionMessage(e), "127.0.0.2.*no sshd listens")
  expect_identical(e$host, "127.0.0.2")
  unknown <- c("-o", "StrictHostKeyChecking=yes", "-o", paste0("UserKnownHostsFile=", tempfile()))
  expect_match(conditionMessage(failure(openLink("127.0.0.3", rshcmd = ssh$rshcmd, rshopts = unknown))),
               "127.0.0.3.*host key is unknown")
  fake <- tempfile("ssh-")
  writeLines(c("#!/bin/sh", "echo rustcluster-ready", "exec cat"), fake)
  Sys.chmod(fake, "755")
  expect_match(conditionMessage(failure(openLink("127.0.0.2", rshcmd = fake))), "use OpenSSH's ssh")
  expect_match(conditionMessage(failure(openLink("127.0.0.2", rshcmd = tempfile()))), "127.0.0.2.*check `rshcmd`")
  host <- local_link(ssh)
  rscript <- file.path(R.home("bin"), "Rscript")
  # An empty library, and no other: not even that of R itself.
  profile <- tempfile("profile-")
  writeLines(paste0("assign(\".lib.loc\", \"", tempdir(), "\", envir = environment(.libPaths))"), profile)
  e <- failure(startGateway(host, rscript = c("env", paste0("R_PROFILE_USER=", profile), rscript)))
  expect_s3_class(e, "rustcluster_start_failed")
  expect_match(conditionMessage(e), "127.0.0.2.*rustcluster is not installed")
  expect_match(conditionMessage(failure(startGateway(local_link(ssh), rscript = "/does/not/exist"))),
               "Rscript was not found")
  expect_match(conditionMessage(failure(startGateway(
    local_link(ssh), address = "192.0.2.1", rscript = rscript, rlibs = .libPaths()
  ))), "cannot listen on 192.0.2.1")
})

test_that("an sshd that forwards no sockets is reported", {
  skip_without_sshd()
  ssh <- local_sshd(config = "AllowStreamLocalForwarding no")
  host <- local_link(ssh)
  expect_error(startGateway(host), "AllowStreamLocalForwarding", class = "rustcluster_start_failed")
})

test_that("an sshd that allows too few sessions is reported", {
  skip_without_sshd()
  ssh <- local_sshd(config = "MaxSessions 1")
  host <- local_link(ssh)
  expect_error(internal("jobsDirThere")(slurm(cores = 1, login = "127.0.0.2"), host), "MaxSessions",
               class = "rustcluster_start_failed")
})

test_that("nothing is left", {
  expect_no_leftovers()
})
