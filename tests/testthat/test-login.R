# Clusters whose jobs are submitted on a login node, and whose agents reach this session through the gateway there. The
# engine is a stub; ssh, the gateway and the agents are real.

watch_processes()

internal <- function(name) get(name, asNamespace("rustcluster"))

login_launcher <- function(stub, kind = "slurm", nodes = 2, cores = 2, ...) {
  get(kind)(
    nodes = nodes, cores = cores, login = "127.0.0.2", dir = file.path(stub$home, "shared"), address = "127.0.0.1",
    rscript = file.path(R.home("bin"), "Rscript"), rlibs = .libPaths(), ...
  )
}

# Returns a launcher of two nodes behind a login node, the engine host there, the batch of jobs and the head.
local_login <- function(kind = "slurm", heartbeat_timeout = 20, .frame = parent.frame()) {
  stub <- local_stub_engine(kind, .frame)
  ssh <- local_sshd(.frame)
  launcher <- login_launcher(stub, kind)
  head <- dial_head(hosts = 2L)
  host <- internal("openLogin")(
    launcher, function(path) internal("checked")(internal("hub_listen_unix")(head$handle$pointer, path)),
    rshcmd = ssh$rshcmd, env = c(PATH = Sys.getenv("PATH")), heartbeat_timeout = heartbeat_timeout
  )
  do.call("on.exit", list(bquote(.(internal("closeGateway"))(.(host), 20)), add = TRUE, after = FALSE), envir = .frame)
  key <- c(paste("address", host$link$addresses, host$link$port), "launcher 1", paste("key", dial_key))
  batch <- internal("submitJobs")(launcher, "id1", key, host = host)
  gateway <- as.integer(readLines(file.path(host$link$remote, "gateway")))
  list(stub = stub, head = head, host = host, batch = batch, gateway = gateway)
}

expect_login_gone <- function(at, within = 20) {
  traces <- c(at$batch$directory, at$host$link$remote, at$host$link$local)
  gone <- function() {
    !length(at$stub$jobs()) && !any(file.exists(traces)) && !any(alive(c(at$gateway, at$stub$pids())))
  }
  wait_until(gone, within + slack())
  expect_identical(at$stub$jobs(), character())
  expect_identical(traces[file.exists(traces)], character())
  expect_gone(c(at$gateway, at$stub$pids()))
}

test_that("a cluster works behind a login node, and nothing is left when it is stopped", {
  skip_without_sshd()
  at <- local_login()
  expect_identical(format(file.mode(file.path(at$batch$directory, "key"))), "600")
  cl <- note_processes(dial_cluster(at$head))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_identical(parLapply(cl, 1:20, function(x) x^2), lapply(1:20, function(x) x^2))
  large <- as.numeric(seq_len(5e5))
  expect_identical(clusterCall(cl, function(x) sum(x), large), rep(list(sum(large)), 4L))
  states <- internal("awaitStates")(at$batch)
  expect_identical(unique(states$state), "RUNNING")
  expect_identical(nrow(states), 2L)
  # The jobs' own words come from there, too.
  expect_type(internal("jobLog")(at$batch, at$batch$jobs$job), "character")
  stopCluster(cl)
  expect_true(internal("stopJobs")(at$batch))
  internal("closeGateway")(at$host, 20)
  expect_login_gone(at)
})

test_that("makeRustCluster() drives a cluster behind a login node and leaves nothing there", {
  skip_without_sshd()
  stub <- local_stub_engine("slurm")
  # The commands of the engine are in the PATH of the login node.
  ssh <- local_sshd(config = paste0("SetEnv PATH=", Sys.getenv("PATH")))
  launcher <- login_launcher(stub)
  cl <- local_cluster(launcher, rshcmd = ssh$rshcmd)
  expect_length(cl, 4L)
  expect_identical(parSapply(cl, 1:50, function(x) x * 2), 1:50 * 2)
  link <- cl[[1L]]$handle$logins[[1L]]$link
  traces <- c(link$local, link$remote, cl[[1L]]$handle$batches[[1L]]$directory)
  expect_true(all(file.exists(traces)))
  stopCluster(cl)
  expect_identical(stub$jobs(), character())
  expect_identical(traces[file.exists(traces)], character())
  # A start that fails leaves nothing, either.
  stub$set("refuse", "invalid partition specified")
  expect_error(makeRustCluster(launcher, rshcmd = ssh$rshcmd), "invalid partition", class = "rustcluster_start_failed")
  expect_error(makeRustCluster(launcher, rshcmd = ssh$rshcmd, rshopts = c("-o", "Port=1")), "127.0.0.2.*no sshd",
               class = "rustcluster_start_failed")
  expect_identical(list.files(file.path(stub$home, "shared")), character())
})

test_that("all hosts are lost with the gateway, and no job is left", {
  skip_without_sshd()
  at <- local_login()
  cl <- note_processes(dial_cluster(at$head))
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  expect_length(clusterCall(cl, Sys.getpid), 4L)
  tools::pskill(at$gateway, tools::SIGKILL)
  suppressWarnings(expect_error(clusterCall(cl, Sys.getpid), class = "rustcluster_error"))
  # The streams of agents may end before the session of the gateway does.
  wait_until(function() !is.null(internal("linkProblem")(at$host$link)))
  expect_match(internal("linkProblem")(at$host$link), "127.0.0.2")
  expect_login_gone(at)
})

test_that("the hosts of a lost login node say why, and the cluster can be stopped", {
  skip_without_sshd()
  stub <- local_stub_engine("slurm")
  ssh <- local_sshd(config = paste0("SetEnv PATH=", Sys.getenv("PATH")))
  cl <- local_cluster(list(list(host = "localhost", ncore = 1), login_launcher(stub)), rshcmd = ssh$rshcmd)
  expect_length(clusterCall(cl, Sys.getpid), 5L)
  link <- cl[[1L]]$handle$logins[[1L]]$link
  tools::pskill(as.integer(readLines(file.path(link$remote, "gateway"))), tools::SIGKILL)
  lost <- function() {
    suppressWarnings(suppressMessages(rustcluster:::showEvents(cl[[1L]]$handle)))
    sum(clusterHosts(cl)$state == "lost") == 2L
  }
  expect_true(wait_until(lost))
  expect_match(clusterHosts(cl)$problem[2:3], "login node .*127.0.0.2")
  # Nothing is left of the jobs there, and the other host works.
  wait_until(function() !length(stub$jobs()))
  expect_identical(stub$jobs(), character())
  expect_identical(suppressWarnings(clusterLapply(cl, 1:4, identity)), as.list(1:4))
  suppressWarnings(stopCluster(cl))
  expect_false(any(file.exists(c(link$local, link$remote))))
})

test_that("a job that follows another goes through the same login node, and is cancelled with it", {
  skip_without_sshd()
  stub <- local_stub_engine("slurm")
  local_fast_queries()
  ssh <- local_sshd(config = paste0("SetEnv PATH=", Sys.getenv("PATH")))
  cl <- local_cluster(login_launcher(stub, nodes = 1, cores = 1), rshcmd = ssh$rshcmd, retries = 0)
  ended <- FALSE
  end <- function(i, value) {
    if (ended) return()
    ended <<- TRUE
    stub$end("900000100_none", "TIMEOUT")
  }
  values <- suppressMessages(suppressWarnings(clusterLapply(cl, 1:20, function(i) {
    Sys.sleep(0.05)
    i
  }, .onResult = end)))
  expect_identical(values, as.list(1:20))
  expect_identical(stub$jobs(), "900000101_none")
  # Without a guard, the gateway cancels it.
  handle <- cl[[1L]]$handle
  expect_length(handle$batches, 2L)
  for (batch in handle$batches) internal("background_kill")(batch$guard)
  link <- handle$logins[[1L]]$link
  internal("background_kill")(link$master)
  wait_until(function() !length(stub$jobs()))
  expect_identical(stub$jobs(), character())
  suppressWarnings(stopCluster(cl))
  wait_until(function() !any(file.exists(c(link$local, link$remote))))
  expect_false(any(file.exists(c(link$local, link$remote))))
})

# Stops the ssh that holds the connection of a link, as a link that is stuck does.
stop_link <- function(link) {
  pids <- Filter(function(pid) {
    command <- process_command(pid)
    startsWith(command, "ssh") && grepl(paste("-M -S", link$control), command, fixed = TRUE)
  }, all_pids())
  stopifnot(length(pids) == 1L)
  tools::pskill(pids, tools::SIGSTOP)
}

test_that("a job is submitted over a stuck link without waiting, and heartbeats end the link", {
  skip_without_sshd()
  stub <- local_stub_engine("slurm")
  ssh <- local_sshd(config = paste0("SetEnv PATH=", Sys.getenv("PATH")))
  cl <- local_cluster(
    list(list(host = "localhost", ncore = 1), login_launcher(stub, nodes = 1, cores = 1)), rshcmd = ssh$rshcmd,
    heartbeat_timeout = 8
  )
  handle <- cl[[1L]]$handle
  link <- handle$logins[[1L]]$link
  stop_link(link)
  batch <- internal("addBatch")(handle, 1L, handle$dial$launchers[[1L]])
  # The link is not lost yet.
  expect_null(internal("linkProblem")(link))
  internal("takeSubmissions")(handle)
  internal("queryJobs")(batch)
  expect_true(batch$submitting)
  # A command that waits is told.
  result <- internal("engineRun")(handle$logins[[1L]], "true")
  expect_identical(result$status, 255L)
  expect_match(result$stderr, "was silent for 8 s")
  warned <- tryCatch(internal("awaitSubmissions")(batch, 60), rustcluster_start_failed = function(e) e)
  expect_match(conditionMessage(warned), "was silent for 8 s")
  expect_identical(suppressWarnings(clusterLapply(cl, 1:4, identity)), as.list(1:4))
  suppressWarnings(stopCluster(cl))
  wait_until(function() !length(stub$jobs()) && !any(file.exists(c(link$local, link$remote))))
  expect_identical(stub$jobs(), character())
  expect_identical(list.files(file.path(stub$home, "shared")), character())
  expect_false(any(file.exists(c(link$local, link$remote))))
})

test_that("the commands of the engine may be in the PATH of login shells only", {
  skip_without_sshd()
  skip_if(!nzchar(Sys.which("bash")), "needs bash")
  # These commands are nowhere else.
  stub <- local_stub_engine("template")
  home <- file.path(stub$home, "login")
  dir.create(home)
  # Words of a profile, and what it reads, are no orders.
  writeLines(c("echo hello", "read -r x", paste0("PATH=$PATH:", stub$home, "/bin")), file.path(home, ".bash_profile"))
  ssh <- local_sshd(config = paste0("SetEnv PATH=/usr/bin:/bin HOME=", home))
  launcher <- batch_launcher(
    "template", stub, 1L, 1L, login = "127.0.0.2", address = "127.0.0.1", rlibs = .libPaths(),
    rscript = file.path(R.home("bin"), "Rscript")
  )
  cl <- local_cluster(launcher, rshcmd = ssh$rshcmd)
  expect_identical(clusterCall(cl, function() 1), list(1))
  expect_match(clusterHosts(cl)$job, "900000100")
  # The guard cancels, and without it the gateway.
  handle <- cl[[1L]]$handle
  guards <- Filter(function(pid) {
    grepl(file.path(handle$batches[[1L]]$directory, "guard.sh"), process_command(pid), fixed = TRUE)
  }, all_pids())
  expect_true(length(guards) > 0L)
  for (pid in guards) tools::pskill(pid, tools::SIGKILL)
  link <- handle$logins[[1L]]$link
  internal("background_kill")(link$master)
  wait_until(function() !length(stub$jobs()))
  expect_identical(stub$jobs(), character())
  suppressWarnings(stopCluster(cl))
  wait_until(function() !any(file.exists(c(link$local, link$remote))))
  expect_identical(list.files(file.path(stub$home, "shared")), character())
})

test_that("a directory that cannot be made is an error that names the login node, and leaves nothing", {
  skip_without_sshd()
  stub <- local_stub_engine("slurm")
  writeLines("no directory", file.path(stub$home, "shared"))
  ssh <- local_sshd(config = paste0("SetEnv PATH=", Sys.getenv("PATH")))
  expect_error(makeRustCluster(login_launcher(stub), rshcmd = ssh$rshcmd), "127.0.0.2.*could not prepare the jobs",
               class = "rustcluster_start_failed")
  unlink(file.path(stub$home, "shared"))
  # A file that cannot be written, after the directory was made.
  host <- internal("openLink")("127.0.0.2", rshcmd = ssh$rshcmd)
  on.exit(internal("closeGateway")(host, 10), add = TRUE, after = FALSE)
  launcher <- login_launcher(stub)
  local_function("writeGuardThere", function(batch) {
    internal("writeJobFile")(batch, file.path(batch$directory, "none", "file"), "text")
  })
  expect_error(internal("submitJobs")(launcher, "id1", host = host), "could not prepare the jobs",
               class = "rustcluster_start_failed")
  expect_identical(list.files(file.path(stub$home, "shared")), character())
})

test_that("how jobs of HTCondor ended is read on the login node", {
  skip_without_sshd()
  at <- local_login("htcondor")
  states <- internal("awaitStates")(at$batch)
  wait_until(function() identical(unique(internal("awaitStates")(at$batch)$state), "RUNNING"))
  number <- as.integer(at$batch$jobs$job)
  writeLines(c(
    sprintf("005 (%d.000.000) 2026-11-29 10:00:05 Job terminated.", number),
    "\t(1) Normal termination (return value 3)", "..."
  ), file.path(at$batch$directory, "events.log"))
  at$stub$end(paste0(number, "_0"), "COMPLETED")
  states <- internal("awaitStates")(at$batch)
  expect_identical(states$state, c("COMPLETED", "RUNNING"))
  expect_identical(states$reason[[1L]], "Normal termination (return value 3)")
  expect_true(internal("stopJobs")(at$batch))
})

test_that("a refused submission says why, and leaves nothing on the login node", {
  skip_without_sshd()
  stub <- local_stub_engine("slurm")
  stub$set("refuse", "invalid partition specified")
  ssh <- local_sshd()
  host <- internal("openLink")("127.0.0.2", rshcmd = ssh$rshcmd, env = c(PATH = Sys.getenv("PATH")))
  on.exit(internal("closeGateway")(host, 10), add = TRUE, after = FALSE)
  launcher <- slurm(nodes = 2, cores = 2, login = "127.0.0.2", dir = file.path(stub$home, "shared"))
  expect_error(internal("submitJobs")(launcher, "id1", host = host), "invalid partition",
               class = "rustcluster_start_failed")
  expect_true(wait_until(function() !file.exists(file.path(stub$home, "shared", "id1"))))
})

test_that("the directory is in the home directory of the login node", {
  skip_without_sshd()
  ssh <- local_sshd()
  host <- internal("openLink")("127.0.0.2", rshcmd = ssh$rshcmd)
  on.exit(internal("closeGateway")(host, 10), add = TRUE, after = FALSE)
  launcher <- slurm(cores = 2, login = "127.0.0.2")
  expect_identical(launcher$dir, "~/.rustcluster")
  expect_identical(internal("jobsDirThere")(launcher, host), file.path(path.expand("~"), ".rustcluster"))
  expect_identical(slurm(cores = 2)$dir, path.expand("~/.rustcluster"))
})

test_that("nothing is left", {
  expect_no_leftovers()
})
