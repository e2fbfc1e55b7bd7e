watch_processes()

entries <- function(spec) {
  asked <- rustcluster:::specHosts(spec)
  list(
    hosts = vapply(asked$hosts, `[[`, "", "host"), owner = asked$owner, workers = asked$workers
  )
}

test_that("all forms of spec name the same hosts", {
  nodes <- function(spec) {
    asked <- entries(spec)
    rep(asked$hosts[asked$owner], asked$workers)
  }
  want <- c("h1", "h1", "h2", "h3", "h3", "h3")
  expect_identical(nodes(want), want)
  expect_identical(nodes(c(h1 = 2, h2 = 1, h3 = 3)), want)
  machines <- list(
    list(host = "h1", user = "u", ncore = 2), list(host = "h2", user = "u", ncore = 1),
    list(host = "h3", user = "u", ncore = 3)
  )
  expect_identical(nodes(machines), want)
  flat <- unlist(lapply(machines, function(m) {
    rep(list(list(host = m$host, user = m$user)), m$ncore)
  }), recursive = FALSE)
  expect_identical(nodes(flat), want)
  expect_length(entries(flat)$hosts, 3)
  # In the order given, with an agent a host.
  mixed <- c("h2", "h1", "h2")
  expect_identical(nodes(mixed), mixed)
  expect_identical(entries(mixed)$hosts, c("h2", "h1"))
})

test_that("without ncore a host runs a worker for each usable core", {
  expect_identical(entries(list(list(host = "h1"), list(host = "h2", ncore = NA)))$workers,
                   c(NA_integer_, NA_integer_))
  expect_identical(entries(list(host = "h1"))$workers, NA_integer_)
  expect_identical(entries(list(list(host = "h1"), list(host = "h2", ncore = 3)))$workers, c(NA, 3L))
})

test_that("entries with different users or settings have separate agents", {
  asked <- rustcluster:::specHosts(c("u@h1", "h1", "v@h1", "u@h1"))
  expect_identical(asked$owner, c(1L, 2L, 3L, 1L))
  expect_identical(vapply(asked$hosts, function(h) as.character(c(h$user, NA)[[1]]), ""), c("u", NA, "v"))
  asked <- rustcluster:::specHosts(
    list(list(host = "h1", ncore = 1, port = 22), list(host = "h1", ncore = 1))
  )
  expect_length(asked$hosts, 2)
})

test_that("names and addresses of this machine need no ssh", {
  here <- function(...) rustcluster:::specHosts(list(list(ncore = 1, ...)))$hosts[[1]]$local
  expect_true(here(host = "localhost"))
  expect_true(here(host = "127.0.0.1"))
  expect_true(here(host = "::1"))
  expect_true(here(host = Sys.info()[["nodename"]]))
  expect_true(here(host = "localhost", user = Sys.info()[["user"]]))
  expect_false(here(host = "localhost", user = "another"))
  expect_false(here(host = "localhost", port = 22))
  expect_false(here(host = "127.0.0.2"))
  expect_false(here(host = "192.0.2.1"))
  expect_false(here(host = "0.0.0.0"))
})

test_that("a host may be written with its user and port in any argument", {
  want <- list(
    "node1:2222" = list(host = "node1", port = 2222L), "u@node1" = list(host = "node1", user = "u"),
    "u@node1:2222" = list(host = "node1", user = "u", port = 2222L), "ssh://node1" = list(host = "node1"),
    "ssh://u@node1:2222" = list(host = "node1", user = "u", port = 2222L), "SSH://node1:22/" = list(host = "node1", port = 22L),
    "[::1]" = list(host = "::1"), "[::1]:22" = list(host = "::1", port = 22L), "::1" = list(host = "::1"),
    "u@[2001:db8::7]:22" = list(host = "2001:db8::7", user = "u", port = 22L),
    "u@2001:db8::7" = list(host = "2001:db8::7", user = "u"), "ssh://[fe80::1%eth0]:22" = list(host = "fe80::1%eth0", port = 22L),
    "1:2:3:4:5:6:7:8" = list(host = "1:2:3:4:5:6:7:8"), "::ffff:192.0.2.1" = list(host = "::ffff:192.0.2.1"),
    "192.0.2.1:22" = list(host = "192.0.2.1", port = 22L), "a@b@node1" = list(host = "node1", user = "a@b")
  )
  for (text in names(want)) {
    numbers <- structure(2, names = text)
    for (spec in list(text, numbers, list(text), list(list(host = text)), list(list(host = text, ncore = 2)))) {
      host <- rustcluster:::specHosts(spec)$hosts[[1]]
      expect_identical(host[names(host) %in% c("host", "user", "port")][names(want[[text]])], want[[text]])
      expect_identical(setdiff(names(host), c(names(want[[text]]), "local")), character())
    }
    # What it is written as is understood again.
    written <- rustcluster:::writtenHost(want[[text]])
    expect_identical(rustcluster:::specHosts(written)$hosts[[1]][names(want[[text]])], want[[text]])
  }
  # Where both name it, they agree.
  host <- rustcluster:::specHosts(list(list(host = "u@node1:22", user = "u", port = 22)))$hosts[[1]]
  expect_identical(host[c("host", "user", "port")], list(host = "node1", user = "u", port = 22L))
  expect_identical(caught(rustcluster:::specHosts(list(list(host = "node1:22", port = 23))))$argument, "spec[[1]]$host")
  expect_identical(caught(rustcluster:::specHosts(list(list(host = "u@node1", user = "v"))))$argument, "spec[[1]]$host")
  # A port makes an agent of its own.
  expect_length(rustcluster:::specHosts(c("node1:22", "node1:23", "node1:22"))$hosts, 2)
})

test_that("an invalid host name is refused before anything is started", {
  wrong <- c(
    "node1:", "node1:0", "node1:65536", "node1:ssh", "node1:-1", "node1:99999999999", "node1:22:33", ":22", "u@", "@node1",
    "u@:22", "ssh://", "ssh:///", "http://node1", "ssh://u:secret@node1", "u:secret@node1", "[node1]:22", "[::1", "::1]:22",
    "[::1]22", "[::1]:", "[::1]:x", "[]", "ssh://node1/path", "node1/path", "a::b::c", "dead:beef:22",
    "1:2:3:4:5:6:7:8:9", "12345::", ":::", "node$x", "node;x", "node1|x", "`x`", "ssh://-oProxyCommand=x", "u@-x", "-x@node1"
  )
  for (text in wrong) {
    for (call in expression(
      makeRustCluster(text), makeRustCluster(structure(2, names = text)), makeRustCluster(list(text)),
      makeRustCluster(list(list(host = text))), installOnHosts(text), installOnHosts(list(list(host = text)))
    )) {
      error <- caught(eval(call))
      expect_rust_error(error, "bad_argument")
      expect_match(error$argument, if (identical(call[[1L]], quote(installOnHosts))) "^hosts" else "^spec")
    }
  }
  expect_snapshot({
    show_error(makeRustCluster("node1:ssh"))
    show_error(makeRustCluster("node1:22:33"))
    show_error(makeRustCluster("http://node1"))
    show_error(makeRustCluster("u:secret@node1"))
    show_error(makeRustCluster("[::1]22"))
    show_error(makeRustCluster("node1/path"))
    show_error(makeRustCluster(list(list(host = "node1:22", port = 23))))
  })
})

test_that("ssh uses the port that is written with a host", {
  skip_without_sshd()
  ssh <- local_sshd()
  config <- file.path(ssh$dir, "ssh_config")
  port <- sub(" Port ", "", grep("^ Port", readLines(config), value = TRUE))
  # No port but that of the spec.
  writeLines(grep("^ Port", readLines(config), value = TRUE, invert = TRUE), config)
  me <- Sys.info()[["user"]]
  spec <- c(paste0("127.0.0.2:", port), sprintf("ssh://%s@127.0.0.3:%s", me, port), paste0("[::1]:", port))
  # sshd listens on IPv4 alone.
  cl <- over_ssh(ssh, spec[1:2])
  expect_identical(clusterApply(cl, 1:2, identity), list(1L, 2L))
  expect_identical(clusterHosts(cl)$host, c("127.0.0.2", "127.0.0.3"))
  error <- caught(over_ssh(ssh, spec[3]))
  expect_rust_error(error, "start_failed")
  expect_match(conditionMessage(error), "::1")
  # parallelly's functions go the same way.
  skip_if_not(requireNamespace("parallelly", quietly = TRUE) && exists("killNode", asNamespace("parallelly")))
  expect_identical(parallelly::isLocalhostNode(cl), c(FALSE, FALSE))
  pid <- clusterPids(cl)[[1]]
  expect_identical(parallelly::killNode(cl[[1]], tools::SIGKILL), TRUE)
  expect_gone(pid)
  expect_identical(suppressWarnings(clusterCall(cl, identity, 1)), list(1, 1))
})

test_that("an invalid element of a spec is an error that names it", {
  for (spec in list(
    list(list(ncore = 2)), list(list(host = "")), list(list(host = NA)), "-oProxyCommand=x",
    "a b", "u@", "@h", c(h1 = 0), c(h1 = NA_real_), list(list(host = "h", bogus = 1)),
    list(list(host = "h", ncore = 0)), list(list(host = "h", port = 1e6)),
    list(list(host = "h", user = "-l")), list(list(host = "h", rshcmd = 1)), list(1, 2)
  )) {
    error <- caught(makeRustCluster(spec))
    expect_rust_error(error, "bad_argument")
    expect_match(error$argument, "^spec")
  }
  expect_match(conditionMessage(caught(makeRustCluster(list(list(host = "h", bogus = 1))))), "bogus")
  expect_rust_error(caught(makeRustCluster(2, on_failure = "maybe")), "bad_argument")
  expect_rust_error(caught(makeRustCluster(2, progress = NA)), "bad_argument")
})

test_that("a command arrives unchanged through all login shells", {
  odd <- "a b'c\"d$e`f\\g!h;i|j&k\tl\nm%n*?[]{}~#<>()\u00e9"
  script <- rustcluster:::remoteScript(c("printf", "%s", odd), c(HERE = odd, GONE = NA))
  line <- rustcluster:::loginShellCommand(script)
  for (shell in c("sh", "bash", "dash", "zsh", "fish", "csh", "tcsh", "ksh")) {
    if (!nzchar(Sys.which(shell))) next
    out <- tempfile()
    system2(Sys.which(shell), c("-c", shQuote(line)), stdout = out)
    expect_identical(readBin(out, "raw", 1e4), charToRaw(enc2utf8(odd)))
  }
})

test_that("hosts over ssh form one cluster", {
  skip_without_sshd()
  ssh <- local_sshd()
  cl <- over_ssh(ssh, c("127.0.0.2" = 2, "127.0.0.3" = 1, localhost = 1))
  expect_output(
    print(cl), "socket cluster with 4 nodes on hosts .127.0.0.2., .127.0.0.3., .localhost."
  )
  hosts <- clusterHosts(cl)
  expect_identical(hosts$workers, c(2L, 1L, 1L))
  expect_identical(hosts$up, c(2L, 1L, 1L))
  expect_true(all(is.na(hosts$problem)))
  expect_identical(hosts$r_version, rep(as.character(getRversion()), 3))
  expect_length(unique(agentPids(cl)), 3)
  x <- 5
  clusterExport(cl, "x", environment())
  expect_equal(parSapply(cl, 1:20, function(i) i + x), 1:20 + 5)
  came <- unlist(clusterEvalQ(cl, nzchar(Sys.getenv("SSH_CONNECTION"))))
  expect_identical(came, c(TRUE, TRUE, TRUE, FALSE))
  big <- clusterApply(cl, 1:4, function(i) rep(i, 1e6))
  expect_identical(vapply(big, sum, 0), 1:4 * 1e6)
  stopCluster(cl)
  expect_gone(leftovers$pids)
})

test_that("a list with an entry for each worker, and all arguments of makePSOCKcluster()", {
  skip_without_sshd()
  ssh <- local_sshd()
  user <- Sys.info()[["user"]]
  machines <- list(
    list(host = "127.0.0.2", user = user, ncore = 2), list(host = "127.0.0.3", user = user, ncore = 3)
  )
  spec <- unlist(lapply(machines, function(m) {
    rep(list(list(host = m$host, user = m$user)), m$ncore)
  }), recursive = FALSE)
  cl <- over_ssh(ssh, spec, type = "PSOCK", master = "127.0.0.1")
  expect_output(print(cl), "socket cluster with 5 nodes on hosts .127.0.0.2., .127.0.0.3.")
  expect_identical(nrow(clusterHosts(cl)), 2L)
  same <- over_ssh(ssh, machines)
  expect_identical(vapply(same, `[[`, "", "host"), vapply(cl, `[[`, "", "host"))
})

test_that("a host that cannot be started is an error with a remedy, and no process of other hosts is left", {
  skip_without_sshd()
  ssh <- local_sshd()
  start <- function(host, ...) {
    caught(over_ssh(ssh, list(list(host = "127.0.0.2", ncore = 1), c(list(ncore = 1), host)), ...))
  }
  expect_problem <- function(host, text) {
    error <- start(host)
    expect_rust_error(error, "start_failed")
    expect_identical(error$host, host$host)
    expect_match(conditionMessage(error), text)
    expect_match(conditionMessage(error), host$host, fixed = TRUE)
  }
  expect_problem(list(host = "no-such-host.invalid"), "cannot be resolved")
  expect_problem(list(host = "127.0.0.4", port = free_port()), "no sshd listens")
  # A library of the whole machine is one of every host of this test.
  if (!any(file.exists(file.path(c(.Library, .Library.site), "rustcluster")))) {
    expect_problem(list(host = "127.0.0.4", rlibs = "/nowhere"), "not installed on the host")
  }
  expect_problem(list(host = "127.0.0.4", rscript = "/no/Rscript"), "Rscript was not found")
  expect_problem(list(host = "127.0.0.5", rshopts = c(
    "-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile=/dev/null"
  )), "host key is unknown")
  expect_problem(list(host = "127.0.0.4", rshopts = c(
    "-o", "IdentityFile=/nowhere", "-o", "IdentityAgent=none", "-F", "none",
    "-o", paste0("Port=", sub(".* ", "", readLines(file.path(ssh$dir, "ssh_config"))[[2]])),
    "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"
  )), "accepts none of your keys")
  expect_no_leftovers()
})

test_that("with on_failure = \"warn\" the other hosts are used", {
  skip_without_sshd()
  ssh <- local_sshd()
  expect_warning(
    cl <- over_ssh(ssh, c("127.0.0.2", "no-such-host.invalid", "127.0.0.2"), on_failure = "warn"),
    class = "rustcluster_host_left_out"
  )
  expect_length(cl, 2)
  expect_equal(unlist(clusterApply(cl, 1:4, function(i) i)), 1:4)
  hosts <- clusterHosts(cl)
  expect_identical(hosts$up, c(2L, 0L))
  expect_match(hosts$problem[[2]], "resolved")
  expect_rust_error(
    caught(over_ssh(ssh, "no-such-host.invalid", on_failure = "warn")), "start_failed"
  )
})

test_that("a killed ssh loses its host only", {
  skip_without_sshd()
  ssh <- local_sshd()
  cl <- over_ssh(ssh, c("127.0.0.2" = 2, "127.0.0.3" = 1))
  there <- clusterPids(cl)
  clients <- Filter(
    function(pid) grepl("127.0.0.2", process_command(pid), fixed = TRUE),
    setdiff(descendants(), leftovers$before)
  )
  tools::pskill(clients[[1]], tools::SIGKILL)
  error <- caught(clusterCall(cl[1:2], Sys.sleep, 100))
  expect_rust_error(error, "host_failed")
  expect_identical(error$host, "127.0.0.2")
  expect_identical(clusterCall(cl[3], identity, 3), list(3))
  expect_gone(there[1:2])
  expect_match(clusterHosts(cl)$problem[[1]], "killed")
  expect_silent(stopCluster(cl))
  expect_gone(there)
})

test_that("a silent host is lost, and its agent detects that the head is lost", {
  skip_without_sshd()
  ssh <- local_sshd()
  cl <- over_ssh(ssh, c("127.0.0.2" = 2, "127.0.0.3" = 1), heartbeat_timeout = 2)
  there <- clusterPids(cl)
  agent <- agentPids(cl)[[1]]
  client <- Filter(
    function(pid) grepl("127.0.0.2", process_command(pid), fixed = TRUE),
    setdiff(descendants(), leftovers$before)
  )[[1]]
  # The way is cut, and no end of any stream tells it.
  tools::pskill(client, tools::SIGSTOP)
  error <- caught(clusterCall(cl[1], Sys.sleep, 100))
  expect_rust_error(error, "host_failed")
  expect_match(conditionMessage(error), "nothing was heard")
  expect_gone(c(agent, there[1:2]))
  expect_identical(clusterCall(cl[3], identity, 3), list(3))
  # Not lost: busy, and then idle, for longer than that.
  expect_identical(clusterCall(cl[3], function() {
    Sys.sleep(4)
    4
  }), list(4))
  Sys.sleep(4)
  expect_identical(clusterCall(cl[3], identity, 5), list(5))
})

test_that("the agents of a silent head end", {
  skip_without_sshd()
  ssh <- local_sshd()
  cl <- over_ssh(ssh, c("127.0.0.2" = 1), heartbeat_timeout = 2)
  there <- c(clusterPids(cl), agentPids(cl))
  tools::pskill(there[[2]], tools::SIGSTOP)
  Sys.sleep(1)
  tools::pskill(there[[2]], tools::SIGCONT)
  expect_identical(clusterCall(cl, identity, 1), list(1))
  client <- Filter(
    function(pid) grepl("127.0.0.2", process_command(pid), fixed = TRUE),
    setdiff(descendants(), leftovers$before)
  )[[1]]
  tools::pskill(client, tools::SIGSTOP)
  wait_until(function() !any(alive(there)), timeout = 2 + slack())
  expect_gone(there)
})

# The ssh processes of a host, and the bytes that they have read: from us, and from the host.
clients_of <- function(host) {
  Filter(
    function(pid) grepl(host, process_command(pid), fixed = TRUE),
    setdiff(descendants(), leftovers$before)
  )
}
bytes_read <- function(pid) {
  io <- readLines(sprintf("/proc/%d/io", pid))
  as.numeric(sub("rchar: ", "", grep("^rchar", io, value = TRUE)))
}

test_that("data for many workers of a host is sent to the host once", {
  skip_without_sshd()
  ssh <- local_sshd()
  cl <- over_ssh(ssh, c("127.0.0.2" = 8, localhost = 1))
  client <- clients_of("127.0.0.2")[[1]]
  crossed <- function(expr) {
    before <- bytes_read(client)
    force(expr)
    bytes_read(client) - before
  }
  x <- runif(250000)
  here <- environment()
  expect_lt(crossed(clusterExport(cl, "x", here)), 1.2 * 2e6)
  expect_identical(unique(clusterEvalQ(cl, x)), list(x))
  # Again the same, and the same within something else.
  expect_lt(crossed(clusterExport(cl, "x", here)), 0.1 * 2e6)
  add <- function(i, x) i + x[[i]]
  environment(add) <- globalenv()
  expect_lt(crossed(r <- parLapply(cl, 1:90, add, x)), 0.3 * 2e6)
  expect_equal(unlist(r), 1:90 + x[1:90])
  # Changed in place.
  x[[1]] <- 0
  clusterExport(cl, "x", here)
  expect_identical(unique(clusterEvalQ(cl, x)), list(x))
  # More than once an equal message, of which one part changes.
  e <- new.env()
  for (i in 1:3) {
    e$x <- x + i
    expect_identical(unique(clusterCall(cl, function(e) e$x[[2]], e)), list(x[[2]] + i))
  }
})

test_that("a large result does not delay a small one of the same host", {
  skip_without_sshd()
  ssh <- local_sshd()
  cl <- over_ssh(ssh, c("127.0.0.2" = 2))
  send <- function(node, fun) sendCall(node, fun, list())
  sendCall <- parallel:::sendCall
  clusterEvalQ(cl, x <- numeric(1e7))
  send(cl[[1]], function() x)
  send(cl[[2]], function() 1)
  first <- parallel:::recvOneResult(cl)
  expect_identical(first$node, 2L)
  second <- parallel:::recvOneResult(cl)
  expect_identical(second$node, 1L)
  expect_length(second$value, 1e7)
})

test_that("output of workers on other hosts is printed, or appended to a file there", {
  skip_without_sshd()
  ssh <- local_sshd()
  say <- function() {
    cat("one\ntwo\n")
    message("100%s")
    Sys.getpid()
  }
  environment(say) <- globalenv()
  cl <- over_ssh(ssh, c("127.0.0.2" = 1, "127.0.0.3" = 1), outfile = "")
  shown <- character()
  pids <- list()
  wait_until(function() {
    shown <<- c(shown, capture.output({
      if (!length(pids)) pids <<- clusterCall(cl, say) else clusterCall(cl, identity, 1)
    }))
    length(shown) >= 6L
  })
  expect_setequal(shown, c(
    paste0("[127.0.0.2 1] ", c("one", "two", "100%s")),
    paste0("[127.0.0.3 2] ", c("one", "two", "100%s"))
  ))
  stopCluster(cl)

  file <- tempfile("it's 100% ", fileext = ".log")
  on.exit(unlink(file), add = TRUE, after = FALSE)
  writeLines("before", file)
  cl <- over_ssh(ssh, c("127.0.0.2" = 1), outfile = file)
  clusterCall(cl, say)
  expect_true(wait_until(function() length(readLines(file)) == 4L))
  expect_identical(readLines(file), c("before", "one", "two", "100%s"))
})

test_that("a host with another version of R is a warning", {
  skip_without_sshd()
  ssh <- local_sshd()
  # What a profile there does: R itself then says that it is another version.
  other <- file.path(ssh$dir, "Rscript")
  writeLines(c(
    "#!/bin/sh",
    "cat > \"$0.profile\" <<'END'",
    "unlockBinding(\"R.version\", baseenv())",
    "R.version$major <- \"3\"; R.version$minor <- \"9.9\"",
    "assign(\"R.version\", R.version, baseenv())",
    "END",
    "R_PROFILE_USER=\"$0.profile\" exec Rscript \"$@\""
  ), other)
  Sys.chmod(other, "0755")
  expect_warning(
    cl <- over_ssh(ssh, list(
      list(host = "127.0.0.2", ncore = 1, rscript = other), list(host = "127.0.0.3", ncore = 1)
    )),
    "R 3.9.9 on host .127.0.0.2.",
    class = "rustcluster_versions"
  )
  expect_identical(clusterHosts(cl)$r_version, c("3.9.9", as.character(getRversion())))
  expect_identical(clusterCall(cl, identity, 1), list(1, 1))
})

test_that("messages for a host of another byte order are in XDR", {
  local_function("otherByteOrder", function(handle) TRUE)
  cl <- local_cluster(2)
  values <- list(
    NULL, 1L, NA, c(a = 1.5, b = NaN, c = NA), "\u00fc", 1:1e5, quote(a + b), mtcars,
    as.raw(0:255), 1i, globalenv(), function(x) x + 1
  )
  for (value in values) {
    expect_equal(clusterCall(cl, identity, value), list(value, value), ignore_function_env = TRUE)
  }
  x <- runif(1e5)
  clusterExport(cl, "x", environment())
  expect_identical(clusterEvalQ(cl, x), list(x, x))
  expect_equal(parSapply(cl, 1:10, function(i) i^2), (1:10)^2)
  expect_error(clusterCall(cl, stop, "so"), "so")
  # Nor does what is held of its workers' state depend on it.
  mark <- tempfile()
  expect_warning(
    got <- clusterApply(cl, 1:2, function(i, mark) {
      if (i == 1 && !file.exists(mark) && file.create(mark)) quit("no")
      sum(x)
    }, mark),
    class = "rustcluster_worker_lost"
  )
  expect_identical(got, list(sum(x), sum(x)))
})

test_that("no process is left", {
  expect_no_leftovers()
})
