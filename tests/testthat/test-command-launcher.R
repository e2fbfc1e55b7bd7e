# Hosts that a command starts, whose stdin and stdout is the stream.

watch_processes()

# The agents find the package in the library of this session.
by_command <- function(command, ..., rlibs = .libPaths()) commandLauncher(command, ..., rlibs = rlibs)

# A program, of these lines of sh.
program <- function(..., .frame = parent.frame()) {
  file <- withr::local_tempfile(pattern = "program-", .local_envir = .frame)
  writeLines(c("#!/bin/sh", ...), file)
  Sys.chmod(file, "0755")
  file
}

host_of <- function(...) rustcluster:::specHosts(commandLauncher(...))$hosts[[1L]]

command_of <- function(...) rustcluster:::launcherCommand(host_of(...)$launcher, "a 'b' \\1 $c")

test_that("a command line is words, and the agent's command comes last or in its place", {
  run <- c("sh", "-c", "a 'b' \\1 $c")
  expect_identical(command_of(c("docker", "run", "-i", "an image")), c("docker", "run", "-i", "an image", run))
  expect_identical(command_of("docker run -i 'an image'"), c("docker", "run", "-i", "an image", run))
  expect_identical(command_of(c("x", "{{ command }}", "y")), c("x", run, "y"))
  expect_identical(command_of("x {{ command }} y"), c("x", run, "y"))
  expect_identical(command_of(c("x", "{{command}}")), c("x", run))
  # Within a text it is quoted for a shell.
  shell <- command_of(c("su", "-c", "exec {{ command }}; true"))
  expect_identical(shell[1:2], c("su", "-c"))
  script <- "printf '<%s>' \"$@\""
  told <- system2("sh", c("-c", shQuote(paste0("set -- ", sub("^exec (.*); true$", "\\1", shell[[3L]]), "; ", script))), stdout = TRUE)
  expect_identical(told, paste0("<", run, ">", collapse = ""))
})

test_that("a host is named after the last plain word of its command", {
  want <- list(
    image = c("docker", "run", "-i", "--rm", "image"), pod = c("kubectl", "exec", "-i", "pod", "--"),
    nsenter = c("nsenter", "-t", "123", "-n"), env = c("env", "A=1"), r.sif = c("singularity", "exec", "/data/r.sif"),
    x = c("/opt/x", "{{ command }}"), "r:4.2" = c("podman", "run", "-i", "registry.example/r:4.2")
  )
  for (name in names(want)) expect_identical(host_of(want[[name]])$host, name)
  expect_identical(host_of("env", host = "box")$host, "box")
})

test_that("launchers and hosts make one spec", {
  first <- commandLauncher("env A=1", workers = 2, host = "a", threads = 3)
  second <- commandLauncher("env A=2", host = "b")
  asked <- rustcluster:::specHosts(list(first, list(host = "n1", ncore = 4), second, first), list(threads = 1L, user = "u"))
  expect_identical(vapply(asked$hosts, `[[`, "", "host"), c("a", "n1", "b"))
  # Equal launchers share an agent.
  expect_identical(asked$owner, c(1L, 2L, 3L, 1L))
  expect_identical(asked$workers, c(2L, 4L, NA, 2L))
  expect_identical(lapply(asked$hosts, `[[`, "threads"), list(3L, 1L, 1L))
  expect_identical(vapply(asked$hosts, `[[`, NA, "local"), c(FALSE, FALSE, FALSE))
  # The user of ssh is none of a command.
  expect_identical(lapply(asked$hosts, `[[`, "user"), list(NULL, "u", NULL))
  # Equal names beside a launcher stand for a worker each, as without it.
  expect_identical(rustcluster:::specHosts(list("n1", "n1", second))$workers, c(1L, 1L, NA))
})

test_that("an invalid launcher is refused when it is made", {
  argument <- function(expr) {
    error <- caught(expr)
    expect_rust_error(error, "bad_argument")
    error$argument
  }
  expect_identical(argument(commandLauncher()), "command")
  for (command in list(NULL, 1, character(), NA, "", " ", c("x", NA), "{{ command }} x", c("x", "{{ command }}", "{{ command }}"))) {
    expect_identical(argument(commandLauncher(command)), "command")
  }
  expect_identical(argument(commandLauncher("x", workers = 0)), "workers")
  expect_identical(argument(commandLauncher("x", workers = 1:2)), "workers")
  expect_identical(argument(commandLauncher("x", host = "a b")), "host")
  expect_identical(argument(commandLauncher("x", rscript = c("a", "b"))), "rscript")
  expect_identical(argument(commandLauncher("x", rlibs = 1)), "rlibs")
  expect_identical(argument(commandLauncher("x", rscript_envs = c("1x" = "a"))), "rscript_envs")
  expect_identical(argument(commandLauncher("x", threads = 0)), "threads")
  expect_identical(argument(commandLauncher("x", renice = 99)), "renice")
  expect_identical(argument(commandLauncher("x", start_method = "no")), "start_method")
  expect_identical(argument(installOnHosts(commandLauncher("x"))), "hosts")
})

test_that("a cluster of commands and hosts works as any cluster", {
  skip_on_cran()
  launcher <- by_command(c("env", "RC_TEST_PLACE=box"), workers = 2, host = "box", rscript_envs = c(RC_TEST_OWN = "a 'b' \\ \"c\""))
  spawned <- by_command("env RC_TEST_PLACE=second", workers = 1, start_method = "spawn", host = "second")
  cl <- local_cluster(list(launcher, list(host = "localhost", ncore = 1), spawned))
  expect_identical(vapply(cl, `[[`, "", "host"), c("box", "box", "localhost", "second"))
  places <- clusterCall(cl, function() Sys.getenv(c("RC_TEST_PLACE", "RC_TEST_OWN"), names = FALSE))
  box <- c("box", "a 'b' \\ \"c\"")
  expect_identical(places, list(box, box, c("", ""), c("second", "")))
  bytes <- as.raw(rep(0:255, 2000))
  expect_identical(clusterApply(cl, 1:4, function(i, bytes) rev(bytes), bytes), rep(list(rev(bytes)), 4))
  hosts <- clusterHosts(cl)
  expect_identical(hosts$up, c(2L, 1L, 1L))
  expect_identical(hosts$problem, rep(NA_character_, 3))
  # A worker that dies is replaced.
  pid <- clusterPids(cl)[[1L]]
  tools::pskill(pid, tools::SIGKILL)
  expect_gone(pid)
  expect_identical(suppressWarnings(clusterCall(cl, identity, 1)), list(1, 1, 1, 1))
})

test_that("an agent in a process namespace of its own works", {
  skip_on_cran()
  skip_if_not(nzchar(Sys.which("unshare")), "there is no unshare")
  unshare <- c("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
  skip_if_not(system2(unshare[[1L]], c(unshare[-1L], "true"), stderr = FALSE) == 0L, "namespaces are not allowed")
  before <- descendants()
  # Not local_cluster(), which notes the pids of workers: those of a namespace belong to other processes here.
  cl <- makeRustCluster(by_command(unshare, workers = 2))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_identical(clusterApply(cl, 1:4, function(i) i), as.list(1:4))
  # The pids are those of the namespace.
  expect_true(all(clusterPids(cl) < 1000))
  started <- setdiff(descendants(), before)
  parallel::stopCluster(cl)
  expect_gone(started)
})

test_that("a command with the agent's command in the middle, or in a text for a shell, starts it", {
  skip_on_cran()
  middle <- program("shift; last=; n=$#; while [ $n -gt 1 ]; do a=$1; shift; set -- \"$@\" \"$a\"; n=$((n-1)); done; shift", "exec \"$@\"")
  cl <- local_cluster(list(
    by_command(c(middle, "first", "{{ command }}", "last"), workers = 1, host = "middle"),
    by_command(c("sh", "-c", "RC_TEST_PLACE='in a shell' exec {{ command }}"), workers = 1, host = "shell")
  ))
  expect_identical(clusterCall(cl, Sys.getenv, "RC_TEST_PLACE"), list("", "in a shell"))
})

test_that("the error of a command that fails says what to do, without a word on ssh", {
  skip_on_cran()
  not_executable <- withr::local_tempfile()
  writeLines("x", not_executable)
  problem <- function(launcher) {
    error <- caught(makeRustCluster(launcher))
    expect_rust_error(error, "start_failed")
    text <- conditionMessage(error)
    expect_no_match(text, "ssh|rshcmd|sshd|installOnHosts")
    text
  }
  expect_match(problem(by_command("/nowhere/docker run image")), "host .image.: the program .docker. cannot be run on this machine: install it")
  expect_match(problem(by_command("env /nowhere/x")), ".env. did not find the program that it was to run: check the command")
  expect_match(problem(by_command(c("env", not_executable))), ".env. could not execute the program")
  expect_match(problem(by_command("env", rscript = "/nowhere/Rscript")), "Rscript was not found where .env. runs it .*set its path by `rscript`")
  expect_match(problem(by_command("env", rscript = not_executable)), "Rscript cannot be executed where .env. runs it")
  expect_match(problem(by_command("true")), ".true. ended without starting an agent and printed nothing: .*need -i")
  failing <- program("echo cannot connect to the daemon >&2", "exit 125")
  expect_match(problem(by_command(failing)), "exited with status 125.*its stderr:.*cannot connect to the daemon")
  empty <- withr::local_tempdir()
  missing <- program("echo \"Error: there is no package called 'rustcluster'\" >&2", "exit 1")
  expect_match(problem(by_command(missing)), "rustcluster is not installed where .program-.* runs R: install it there, as in the image")
  expect_match(problem(by_command("env", rscript_envs = c(R_LIBS_SITE = empty, R_LIBS_USER = empty), rlibs = empty, rscript = program(
    "exec Rscript -e 'loadNamespace(\"rustcluster\", lib.loc = Sys.getenv(\"R_LIBS\"))'"
  ))), "rustcluster is not installed where .env. runs R")
  expect_no_leftovers()
})

test_that("a command that fails is left out beside hosts that work", {
  skip_on_cran()
  expect_warning(
    cl <- local_cluster(list(by_command("env", workers = 1), by_command("false", workers = 2)), on_failure = "warn"),
    "host .false.: the agent's process exited with status 1", class = "rustcluster_host_left_out"
  )
  expect_identical(clusterCall(cl, identity, 2), list(2))
})

test_that("a command that is killed is a lost host, and leaves nothing", {
  skip_on_cran()
  before <- descendants()
  # The program stays the parent of the agent, as docker does.
  parent <- program("\"$@\"", "exit $?")
  cl <- local_cluster(list(by_command("env", workers = 1), by_command(parent, workers = 2, host = "lost")))
  pids <- clusterPids(cl)
  started <- setdiff(descendants(), before)
  command <- Filter(function(pid) proc_parent(pid) == Sys.getpid() && grepl("program-", process_command(pid)), started)
  expect_length(command, 1L)
  lost <- setdiff(c(descendants(command), command, pids[2:3]), 0L)
  system2("kill", c("-KILL", paste0("-", proc_group(command))))
  expect_gone(lost)
  error <- caught(clusterApplyLB(cl, 1:6, function(i) i))
  expect_rust_error(error, "host_failed")
  expect_match(conditionMessage(error), "host .lost. of worker 2 is lost: the agent's process was killed by signal 9")
  expect_identical(clusterApplyLB(clusterAlive(cl), 1:6, function(i) i), as.list(1:6))
  expect_identical(clusterPids(cl)[[1L]], pids[[1L]])
})

test_that("print() shows the command that starts the agent", {
  launcher <- commandLauncher(c("docker", "run", "-i", "an image"), workers = 2, host = "box", rscript = "/opt/Rscript")
  shown <- capture.output(value <- withVisible(print(launcher)))
  expect_identical(value, list(value = launcher, visible = FALSE))
  expect_match(shown[[2L]], "^box: 2 workers$")
  expect_match(shown[[3L]], "^  docker run -i 'an image' sh -c .*/opt/Rscript.*agentMain")
  # What is shown is what is run.
  options <- rustcluster:::clusterOptions(list())
  asked <- rustcluster:::specHosts(launcher, list(rscript_envs = character(), threads = 1L))
  words <- paste("set --", trimws(shown[[3L]]), "; printf '%s\\n' \"$@\"")
  expect_identical(system2("sh", c("-c", shQuote(words)), stdout = TRUE), rustcluster:::hostLaunch(asked$hosts[[1L]], options)$command)
})
