# Five machines: see helper-lab.R. What is tried here needs links that can be counted and cut, or
# takes long.
skip_without_lab()
watch_processes()
sendCall <- parallel:::sendCall
recvData <- parallel:::recvData
recvOneResult <- parallel:::recvOneResult

machines <- c(2L, 64L, 64L, 64L, 125L)

test_that("319 workers on five hosts, by the script as it is", {
  lab <- local_lab()
  for (i in 1:5) assign(paste0("node", i - 1L), lab$hosts[[i]])
  user <- Sys.info()[["user"]]
  # What a script has in ~/.ssh/config.
  makeRustCluster <- function(...) over_lab(lab, ..., .frame = parent.frame())

  machineAddresses <- list(
    list(host = node0, user = user, ncore = 2),
    list(host = node1, user = user, ncore = 64),
    list(host = node2, user = user, ncore = 64),
    list(host = node3, user = user, ncore = 64),
    list(host = node4, user = user, ncore = 125)
  )
  spec <- unlist(lapply(machineAddresses, function(m) {
    rep(list(list(host = m$host, user = m$user)), m$ncore)
  }), recursive = FALSE)
  cl <- makeRustCluster(type = "PSOCK", master = node0, spec = spec)
  expect_identical(
    capture.output(print(cl)),
    paste0(
      "socket cluster with 319 nodes on hosts ", paste(sQuote(lab$hosts), collapse = ", ")
    )
  )
  expect_identical(clusterHosts(cl)$up, machines)
  expect_length(unique(unlist(clusterCall(cl, Sys.getpid))), 319)
  expect_equal(parSapply(cl, 1:5000, function(i) i^2), (1:5000)^2)
  names <- vapply(clusterCall(cl, function() Sys.info()[["nodename"]]), identity, "")
  expect_identical(names, rep(paste0("host", 1:5), machines))
  parallel::stopCluster(cl)
  expect_identical(lab_pids(), integer())

  same <- rustcluster::makeRustCluster(
    machineAddresses, rshcmd = lab$rshcmd, rlibs = .libPaths()
  )
  expect_identical(vapply(same, `[[`, "", "host"), vapply(cl, `[[`, "", "host"))
  # Forgotten, and not stopped.
  rm(same)
  invisible(gc())
  expect_true(wait_until(function() !length(lab_pids()), 1 + slack()))
})

test_that("20 MB for 2 x 64 workers are sent over each link once", {
  lab <- local_lab(2)
  cl <- over_lab(lab, setNames(c(64, 64), lab$hosts))
  x <- runif(20e6 / 8)
  here <- environment()
  before <- lab_bytes(1:2)
  clusterExport(cl, "x", here)
  crossed <- lab_bytes(1:2) - before
  expect_lt(crossed[["to"]], 1.1 * 40e6)
  expect_identical(unique(unlist(clusterEvalQ(cl, sum(x)))), sum(x))
})

test_that("a host whose link is cut during a call is lost, and its agent ends", {
  lab <- local_lab(3)
  cl <- over_lab(lab, setNames(c(4, 4, 4), lab$hosts), heartbeat_timeout = 4)
  there <- clusterPids(cl)
  for (node in cl) sendCall(node, function() {
    Sys.sleep(2)
    1
  }, list())
  run("ip link set", lab_link(2), "down")
  got <- lapply(c(1:4, 9:12), function(i) recvData(cl[[i]])$value)
  expect_identical(got, rep(list(1), 8))
  error <- caught(recvData(cl[[5]]))
  expect_rust_error(error, "host_failed")
  expect_identical(error$host, lab$hosts[[2]])
  # It hears nothing of the head either.
  expect_true(wait_until(function() !any(alive(there[5:8])), 4 + 1 + slack()))
  expect_equal(unlist(clusterApply(cl[c(1:4, 9:12)], 1:20, function(i) i)), 1:20)
  expect_match(clusterHosts(cl)$problem[[2]], "nothing was heard")

  # One way only: the head still hears it.
  run("nsenter --net=/run/netns/rclab3 iptables -A INPUT -p tcp -j DROP")
  error <- caught(clusterCall(cl[9:12], Sys.sleep, 100))
  expect_rust_error(error, "host_failed")
  expect_true(wait_until(function() !any(alive(there[9:12])), 4 + 1 + slack()))
  expect_identical(clusterCall(cl[1:4], identity, 1), rep(list(1), 4))
  expect_alive(there[1:4])
  stopCluster(cl)
  expect_gone(there)
})

test_that("the processes of a killed worker, agent or ssh end with it", {
  lab <- local_lab(3)
  cl <- over_lab(lab, setNames(c(4, 4, 4), lab$hosts))
  there <- clusterPids(cl)
  agents <- agentPids(cl)
  clients <- vapply(lab$hosts, function(host) {
    found <- Filter(
      function(pid) grepl(host, process_command(pid), fixed = TRUE),
      setdiff(descendants(), leftovers$before)
    )
    found[[1]]
  }, 0L)
  # Another takes its place, as soon as its agent has seen to it.
  tools::pskill(there[[1]], tools::SIGKILL)
  expect_warning(
    wait_until(function() !identical(clusterCall(cl[1], Sys.getpid)[[1]], there[[1]])),
    class = "rustcluster_worker_lost"
  )
  tools::pskill(agents[[2]], tools::SIGKILL)
  error <- caught(clusterCall(cl[5], Sys.sleep, 100))
  expect_rust_error(error, "host_failed")
  expect_gone(there[5:8])
  tools::pskill(clients[[3]], tools::SIGKILL)
  error <- caught(clusterCall(cl[9], Sys.sleep, 100))
  expect_rust_error(error, "host_failed")
  expect_gone(there[9:12])
  expect_identical(clusterCall(cl[1:4], identity, 1), rep(list(1), 4))
  note_pids(clusterPids(cl[1]))
  stopCluster(cl)
  expect_gone(c(there, agents))
  expect_identical(lab_pids(3), integer())
})

test_that("a slow link is shared fairly, and does not count as dead", {
  lab <- local_lab(1)
  run("tc qdisc add dev", lab_link(1), "root tbf rate 10mbit burst 32kbit latency 400ms")
  run("ip netns exec rclab1 tc qdisc add dev eth0 root tbf rate 10mbit burst 32kbit latency 400ms")
  cl <- over_lab(lab, setNames(64, lab$hosts), heartbeat_timeout = 3)
  x <- runif(8e6 / 8)
  here <- environment()
  before <- lab_bytes(1)
  # More than six seconds, on the way of which nothing else is heard.
  clusterExport(cl, "x", here)
  expect_lt((lab_bytes(1) - before)[["to"]], 1.2 * 8e6)
  expect_identical(unique(unlist(clusterEvalQ(cl, sum(x)))), sum(x))
  sendCall(cl[[1]], function() x, list())
  sendCall(cl[[2]], function() 2, list())
  expect_identical(recvOneResult(cl)$node, 2L)
  expect_identical(recvOneResult(cl)$value, x)
})

test_that("a link with a high round-trip time works", {
  lab <- local_lab(2)
  # Each way 25 ms, between ssh and sshd.
  relay <- file.path(lab$dir, "relay.pl")
  writeLines(c(
    "use strict; use IO::Socket::INET; use Time::HiRes 'time';",
    "my $there = IO::Socket::INET->new(PeerAddr => $ARGV[0], PeerPort => $ARGV[1]) or die;",
    "my @way = ([\\*STDIN, $there, []], [$there, \\*STDOUT, []]);",
    "my $open = 2;",
    "while ($open) {",
    "  my ($in, $next) = ('', undef);",
    "  for (@way) {",
    "    vec($in, fileno($_->[0]), 1) = 1 unless $_->[3];",
    "    my $at = $_->[2][0] && $_->[2][0][0];",
    "    $next = $at if $at && (!defined $next || $at < $next);",
    "  }",
    "  my $wait = defined $next ? ($next > time ? $next - time : 0) : undef;",
    "  select($in, undef, undef, $wait);",
    "  for (@way) {",
    "    if (!$_->[3] && vec($in, fileno($_->[0]), 1)) {",
    "      my $n = sysread($_->[0], my $bytes, 65536);",
    "      $_->[3] = 1 unless $n;",
    "      push @{$_->[2]}, [time + 0.025, $n ? $bytes : undef];",
    "    }",
    "    while (@{$_->[2]} && $_->[2][0][0] <= time) {",
    "      my $bytes = (shift @{$_->[2]})->[1];",
    "      exit unless defined $bytes;",
    "      my $at = 0;",
    "      while ($at < length $bytes) {",
    "        my $n = syswrite($_->[1], $bytes, length($bytes) - $at, $at);",
    "        exit unless $n;",
    "        $at += $n;",
    "      }",
    "    }",
    "  }",
    "}"
  ), relay)
  far <- c("-o", paste0("ProxyCommand=perl ", relay, " %h %p"))
  cl <- over_lab(lab, setNames(c(32, 32), lab$hosts), rshopts = far)
  trip <- function() {
    began <- proc.time()[["elapsed"]]
    clusterCall(cl[1], identity, 1)
    proc.time()[["elapsed"]] - began
  }
  trips <- replicate(10, trip())
  expect_gte(min(trips), 0.049)
  expect_equal(parSapply(cl, 1:1000, function(i) i^2), (1:1000)^2)
  x <- runif(1e6)
  here <- environment()
  clusterExport(cl, "x", here)
  expect_identical(unique(unlist(clusterEvalQ(cl, sum(x)))), sum(x))
  expect_identical(clusterCall(cl[c(1, 64)], function() x), list(x, x))
  stopCluster(cl)
  expect_true(wait_until(function() !length(lab_pids(2)), 1 + slack()))
})

# A user with this login shell, which prints whatever it reads first, until the calling frame ends.
shell_user <- function(shell, dir, .frame = parent.frame()) {
  user <- paste0("rclab", basename(shell))
  home <- file.path(dir, user)
  run("useradd -m -d", home, "-s", shell, user)
  do.call("on.exit", list(bquote(
    system(paste("userdel -r -f", .(user), "2>/dev/null"))
  ), add = TRUE, after = FALSE), envir = .frame)
  run("usermod -p '*'", user)
  noise <- c("echo 'Welcome, 100% of you!'", "echo oops 1>&2")
  rc <- c(".bashrc", ".bash_profile", ".profile", ".zshenv", ".zshrc", ".tcshrc", ".cshrc")
  for (file in rc) {
    writeLines(if (grepl("csh", file)) noise[[1]] else noise, file.path(home, file))
  }
  dir.create(file.path(home, ".config/fish"), recursive = TRUE)
  writeLines(noise, file.path(home, ".config/fish/config.fish"))
  run("chown -R", user, home)
  user
}

test_that("login shells of all kinds and their output do not disturb the start", {
  shells <- Filter(nzchar, Sys.which(c("bash", "dash", "zsh", "fish", "tcsh")))
  lab <- local_lab(1)
  value <- "it's \"a\" $HOME `b` \\ ! % c"
  for (shell in shells) {
    user <- shell_user(shell, lab$dir)
    cl <- over_lab(
      lab, list(list(host = lab$hosts, user = user, ncore = 2)), rscript_envs = c(RC_LAB = value)
    )
    seen <- clusterCall(cl, function() c(Sys.info()[["user"]], Sys.getenv("RC_LAB")))
    expect_identical(seen, rep(list(c(user, value)), 2))
    stopCluster(cl)
    expect_true(wait_until(function() !length(lab_pids(1)), 1 + slack()))
  }
})

test_that("320 results of 50 MB arrive complete at a head with a buffer of 512 MiB", {
  lab <- local_lab()
  cl <- over_lab(lab, setNames(rep(64, 5), lab$hosts))
  make <- function(i) {
    x <- numeric(50e6 / 8)
    x[c(1, length(x))] <- i
    x
  }
  environment(make) <- globalenv()
  resident <- function() {
    status <- readLines("/proc/self/status")
    1024 * as.numeric(gsub("[^0-9]", "", grep("^VmRSS", status, value = TRUE)))
  }
  invisible(gc())
  before <- resident()
  most <- 0
  for (i in seq_along(cl)) sendCall(cl[[i]], make, list(i))
  # Some in the order of ranks, backwards, the others as they come.
  seen <- logical(length(cl))
  take <- function(i, x) {
    stopifnot(length(x) == 50e6 / 8, x[[1]] == i, x[[length(x)]] == i, !seen[[i]])
    seen[[i]] <<- TRUE
  }
  for (i in 320:281) take(i, recvData(cl[[i]])$value)
  for (k in 1:280) {
    one <- recvOneResult(cl)
    take(one$node, one$value)
    if (k %% 10 == 0) {
      rm(one)
      invisible(gc())
      most <- max(most, resident() - before)
    }
  }
  expect_true(all(seen))
  # The limit, the one result beyond it that is completed for want of any, and one in R's hands.
  expect_lt(most, 512 * 2^20 + 3 * 50e6)
  # The memory goes back to the system.
  expect_lt(resident() - before, 150e6)
})

test_that("no process is left", {
  expect_no_leftovers()
})
