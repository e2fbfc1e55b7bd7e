# A cluster is a list of nodes; a node is one process.

skip_on_cran()
watch_processes()

quoted <- function(code) {
  # The quotes of sQuote() are an option, which testthat turns off.
  old <- options(useFancyQuotes = TRUE)
  on.exit(options(old), add = TRUE, after = FALSE)
  utils::capture.output(code)
}

test_that("an index of a node out of range is an error", {
  cl <- local_cluster(2)
  for (i in list(1:3, 3, c(TRUE, FALSE, TRUE), NA)) {
    expect_rust_error(caught(cl[i]), "bad_argument")
  }
  expect_length(cl[0], 0)
  expect_length(cl[-1], 1)
  expect_length(cl[c(TRUE, FALSE)], 1)
  expect_s3_class(cl[2:1], c("RustCluster", "cluster"), exact = TRUE)
})

test_that("a cluster prints as a socket cluster does", {
  pair <- cluster_pair()
  expect_equal(quoted(print(pair$rust)), quoted(print(pair$psock)))
  skip_if_not(l10n_info()$`UTF-8`, "the quotes need UTF-8")
  expect_identical(quoted(print(pair$rust)), "socket cluster with 4 nodes on host \u2018localhost\u2019")
  expect_identical(quoted(print(pair$rust[1:2])), "socket cluster with 2 nodes on host \u2018localhost\u2019")
  quoted(value <- withVisible(print(pair$rust)))
  expect_false(value$visible)
  expect_identical(class(value$value), class(pair$rust))
})

test_that("a node prints as parallel's node does, with its pid", {
  pair <- cluster_pair()
  expect_equal(
    gsub("[0-9]+", "<pid>", quoted(print(pair$rust[[1]]))),
    gsub("[0-9]+", "<pid>", quoted(print(pair$psock[[1]])))
  )
  for (i in 1:4) {
    pid <- clusterCall(pair$rust[i], Sys.getpid)[[1L]]
    expect_match(quoted(print(pair$rust[[i]])), sprintf("with pid %d$", pid))
  }
})

test_that("classes, host and rank", {
  cl <- cluster_pair()$rust
  expect_identical(class(cl), c("RustCluster", "cluster"))
  expect_identical(class(cl[[2]]), "RustNode")
  expect_length(cl, 4L)
  expect_equal(vapply(cl, function(node) node$host, ""), rep("localhost", 4))
  expect_equal(vapply(cl, function(node) as.integer(node$rank), 1L), 1:4)
  expect_identical(class(cl[2:3]), class(cl))
  expect_identical(class(rev(cl)), class(cl))
  expect_identical(class(cl[-1]), class(cl))
  expect_equal(vapply(cl[c(3, 1)], function(node) as.integer(node$rank), 1L), c(3L, 1L))
  expect_length(cl[integer()], 0L)
  expect_identical(cl[[2]]$host, "localhost")
  expect_null(cl[[2]]$noSuchField)
})

test_that("clusterPids() returns the pids of the workers, for any part of a cluster", {
  cl <- cluster_pair()$rust
  pids <- clusterPids(cl)
  expect_type(pids, "integer")
  expect_length(pids, 4L)
  expect_false(anyDuplicated(pids) > 0L)
  expect_equal(as.integer(pids), unlist(clusterCall(cl, Sys.getpid)))
  expect_equal(as.integer(clusterPids(cl[c(3, 1)])), as.integer(pids[c(3, 1)]))
  expect_equal(as.integer(clusterPids(rev(cl))), as.integer(rev(pids)))
  expect_equal(as.integer(clusterPids(cl[2])), as.integer(pids[2]))
})

test_that("print() tells lost hosts and dead workers from stopped ones", {
  skip_unless_proc()
  cl <- local_cluster(list(list(host = "localhost", ncore = 2), list(host = "localhost", ncore = 2, renice = 1)))
  shown <- function(cl) sub(".* on host 'localhost'", "", format(cl))
  withr::local_options(useFancyQuotes = FALSE)
  expect_identical(shown(cl), "")
  stopCluster(cl[1])
  tools::pskill(agentPids(cl)[[2L]], tools::SIGKILL)
  expect_true(wait_until(function() {
    try(suppressWarnings(clusterCall(cl[3], identity, 1)), silent = TRUE)
    all(is.na(clusterPids(cl[3:4])))
  }))
  expect_identical(shown(cl), ", node 1 stopped, nodes 3 to 4 lost with host 'localhost'")
  expect_identical(shown(cl[c(4, 2)]), ", node 1 lost with host 'localhost'")
  expect_identical(shown(cl[2]), "")
  # A worker that cannot be restored.
  other <- local_cluster(2)
  file <- tempfile()
  clusterCall(other, function(file) if (file.exists(file)) quit(status = 3), file)
  file.create(file)
  tools::pskill(clusterPids(other)[[2L]], tools::SIGKILL)
  expect_true(wait_until(function() {
    try(suppressWarnings(clusterCall(other[1], identity, 1)), silent = TRUE)
    is.na(clusterPids(other)[[2L]])
  }))
  expect_identical(shown(other), ", node 2 whose worker has died")
})

test_that("one agent for the host, none of the workers", {
  skip_unless_proc()
  cl <- cluster_pair()$rust
  agent <- agentPids(cl)
  expect_length(agent, 1L)
  expect_alive(agent)
  expect_false(agent %in% clusterPids(cl))
  expect_false(Sys.getpid() %in% c(agent, clusterPids(cl)))
  # Workers of start_method = "fork" are the agent's children.
  expect_equal(unique(vapply(clusterPids(cl), proc_parent, 1L)), as.integer(agent))
  # And the agent is ours.
  expect_true(agent %in% descendants())
})

test_that("variables of a node stay on that node", {
  expect_same_value({
    value <- "only in the second"
    clusterExport(cl[2], "value", envir = environment())
    clusterCall(cl, exists, "value")
  })
  expect_same_value(clusterCall(rev(cl), exists, "value"))
  expect_same_value(clusterCall(cl[-1], exists, "value"))
  expect_same_value(clusterCall(cl[c(3, 2)], exists, "value"))
  expect_same_value(parSapply(cl[c(4, 2)], 1:6, function(i) exists("value")))
  expect_same_value(clusterCall(cl[2], get, "value"))
  expect_same_value(clusterEvalQ(cl[2], rm(value)))
  expect_same_value({
    clusterApply(cl, 1:4, function(i) assign("rank", i, envir = .GlobalEnv))
    list(
      unlist(clusterEvalQ(rev(cl), rank)), unlist(clusterEvalQ(cl[-1], rank)),
      unlist(clusterEvalQ(cl[c(3, 1)], rank)), unlist(clusterEvalQ(cl[c(TRUE, FALSE)], rank))
    )
  })
  expect_same_value(clusterEvalQ(cl, rm(rank)))
})

test_that("a node named twice answers twice", {
  pids <- clusterPids(cluster_pair()$rust)
  got <- clusterCall(cluster_pair()$rust[c(2, 2, 1)], Sys.getpid)
  expect_equal(unlist(got), as.integer(pids[c(2, 2, 1)]))
})

test_that("print(), format(), str() and summary() of clusters and nodes", {
  cl <- cluster_pair()$rust
  shown <- list(
    format = utils::capture.output(print(format(cl))),
    format_node = utils::capture.output(print(format(cl[[1]]))),
    str = utils::capture.output(utils::str(cl)),
    str_node = utils::capture.output(utils::str(cl[[1]])),
    summary = utils::capture.output(print(summary(cl))),
    summary_node = utils::capture.output(print(summary(cl[[1]])))
  )
  for (what in names(shown)) {
    text <- paste(shown[[what]], collapse = "\n")
    expect_no_match <- function(pattern) {
      expect(!grepl(pattern, text), paste0(what, " shows ", pattern, ":\n", text))
    }
    expect_no_match("0x[0-9a-f]{4,}")
    expect_no_match("externalptr|<pointer")
    expect_lte(length(shown[[what]]), 40L)
  }
  mask <- function(x) gsub("[0-9]{3,}", "<pid>", x)
  expect_snapshot(utils::str(cl), transform = mask)
  expect_snapshot(utils::str(cl[[1]]), transform = mask)
  expect_snapshot(summary(cl)[c("host", "workers")], transform = mask)
  expect_snapshot(format(cl), transform = mask)
  expect_snapshot(print(cl), transform = mask)
  expect_snapshot(print(cl[[1]]), transform = mask)
})

test_that("messages to a node are answered in the order they were sent", {
  expect_same_value({
    for (k in 1:2) for (i in 1:4) parallel:::sendCall(cl[[i]], identity, list(c(k, i)))
    list(lapply(cl, parallel:::recvResult), lapply(cl, parallel:::recvResult))
  })
  # Many at once in one node, state and all.
  expect_same_value({
    clusterEvalQ(cl[3], count <- 0)
    for (k in 1:50) {
      parallel:::sendCall(cl[[3]], function() count <<- count + 1, list(), tag = k)
    }
    got <- lapply(1:50, function(k) parallel:::recvData(cl[[3]]))
    list(sapply(got, `[[`, "tag"), lengths(lapply(got, `[[`, "value")), clusterEvalQ(cl[3], rm(count)))
  })
  # An error is its text, and nothing else.
  expect_same_value({
    for (i in 1:2) parallel:::sendCall(cl[[i]], function() stop("no"), list(), tag = 1)
    list(parallel:::recvResult(cl[[1]]), parallel:::recvOneResult(cl))
  })
  # Answers of one node do not wait for another node.
  expect_same_value({
    parallel:::sendCall(cl[[1]], function() {
      Sys.sleep(0.4)
      "slow"
    }, list())
    parallel:::sendCall(cl[[2]], function() "fast", list())
    c(parallel:::recvResult(cl[[2]]), parallel:::recvResult(cl[[1]]))
  })
})

test_that("recvOneResult() returns the first answer, with the index of its node", {
  # Each answers when it is let go.
  expect_same_value({
    gate <- tempfile(sprintf("gate-%d-", 1:4))
    for (i in 1:4) parallel:::sendCall(cl[[i]], function(gate, value) {
      while (!file.exists(gate)) Sys.sleep(0.005)
      value
    }, list(gate[i], i), tag = i)
    lapply(c(2, 4, 3, 1), function(i) {
      file.create(gate[i])
      parallel:::recvOneResult(cl)
    })
  })
  # The place is that in the part that was asked, not the rank.
  expect_same_value({
    part <- cl[c(4, 2)]
    parallel:::sendCall(part[[2]], identity, list("of node 2"), tag = "t")
    parallel:::recvOneResult(part)
  })
  # Of a part only, although another node has answered earlier.
  expect_same_value({
    gate <- tempfile("gate-")
    parallel:::sendCall(cl[[1]], function(gate) {
      file.create(gate)
      "first"
    }, list(gate))
    parallel:::sendCall(cl[[3]], function(gate) {
      while (!file.exists(gate)) Sys.sleep(0.005)
      "third"
    }, list(gate))
    list(parallel:::recvOneResult(cl[3:4]), parallel:::recvOneResult(cl))
  })
})

test_that("recvOneResult starves no node", {
  cl <- cluster_pair()$rust
  # All nodes have answers waiting, which are received in the order of their arrival: the first of each node comes
  # before the second of any, whatever the number of those that wait.
  before <- clusterStatus(cl)$done
  done <- function(n) expect_true(wait_until(function() all(clusterStatus(cl)$done == before + n)))
  for (i in 1:4) parallel:::sendCall(cl[[i]], identity, list(1))
  done(1L)
  for (k in 2:20) for (i in 1:4) parallel:::sendCall(cl[[i]], identity, list(k))
  done(20L)
  nodes <- integer()
  for (k in 1:80) {
    got <- parallel:::recvOneResult(cl)
    nodes <- c(nodes, got$node)
  }
  expect_equal(as.integer(table(factor(nodes, 1:4))), rep(20L, 4))
  expect_equal(sort(nodes[1:4]), 1:4)
})

test_that("fast nodes do most of the work of clusterApplyLB", {
  cl <- cluster_pair()$rust
  dir <- tempfile("tasks-")
  dir.create(dir)
  on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
  # The first ends when all others have, whatever that takes.
  who <- unlist(clusterApplyLB(cl, 1:40, function(i, dir) {
    if (i == 1L) {
      limit <- Sys.time() + 60
      while (length(dir(dir)) < 39L && Sys.time() < limit) Sys.sleep(0.01)
    } else {
      file.create(file.path(dir, i))
    }
    Sys.getpid()
  }, dir))
  expect_equal(sum(who == clusterPids(cl)[[1L]]), 1L)
  expect_setequal(unique(who), clusterPids(cl))
})

test_that("stopping a part leaves the others as they are", {
  skip_unless_proc()
  cl <- local_cluster(4)
  agent <- agentPids(cl)
  pids <- clusterPids(cl)
  clusterApply(cl, 1:4, function(i) assign("mine", i, envir = .GlobalEnv))
  stopCluster(cl[2])
  expect_gone(pids[[2]])
  expect_alive(pids[-2])
  expect_alive(agent)
  expect_equal(unlist(clusterEvalQ(cl[-2], mine)), c(1, 3, 4))
  expect_equal(unlist(parLapply(cl[c(1, 4)], 1:5, function(i) i + 1)), 2:6)
  expect_rust_error(caught(clusterCall(cl[2], identity, 1)), "stopped")
  expect_rust_error(caught(clusterCall(cl, identity, 1)), "stopped")
  # What the failed call had sent to others does not come as an answer now.
  expect_equal(clusterCall(cl[-2], identity, "right"), rep(list("right"), 3))
  stopCluster(cl[c(1, 3)])
  expect_gone(pids[c(1, 3)])
  expect_equal(clusterEvalQ(cl[4], mine), list(4L))
  stopCluster(cl)
  expect_gone(c(pids, agent))
})

test_that("a cluster says which of its nodes have been stopped", {
  cl <- local_cluster(3)
  stopCluster(cl[2])
  expect_match(format(cl), "with 3 nodes on host .localhost., node 2 stopped$")
  expect_match(format(cl[c(1, 3)]), "with 2 nodes on host .localhost.$")
  expect_match(format(cl[2]), "that has been stopped$")
  other <- local_cluster(1)
  stopCluster(cl[1])
  expect_match(format(c(other, cl)), "with 4 nodes on host .localhost., nodes 2 to 3 stopped$")
  stopCluster(cl)
  expect_match(format(cl), "that has been stopped$")
  expect_match(format(c(other, cl)), ", nodes 2 to 4 of a cluster that has been stopped$")
})

test_that("clusterAlive() is the part whose workers are alive", {
  cl <- local_cluster(4)
  pids <- clusterPids(cl)
  expect_identical(clusterAlive(cl), cl)
  stopCluster(cl[2])
  rest <- clusterAlive(cl)
  expect_s3_class(rest, c("RustCluster", "cluster"), exact = TRUE)
  expect_identical(unlist(clusterCall(rest, Sys.getpid)), pids[-2])
  expect_identical(clusterPids(clusterAlive(rev(cl))), rev(pids[-2]))
  expect_identical(clusterPids(clusterAlive(cl[c(3, 2, 3, 1)])), pids[c(3, 3, 1)])
  expect_identical(clusterAlive(rest), rest)
  none <- clusterAlive(cl[2])
  expect_s3_class(none, c("RustCluster", "cluster"), exact = TRUE)
  expect_length(none, 0L)
  expect_identical(clusterAlive(none), none)
  refused <- "`cl` has no nodes; create a new cluster with makeRustCluster()"
  for (call in list(
    quote(clusterLapply(none, 1, identity)), quote(parLapply(none, 1, identity)), quote(clusterApply(none, 1, identity)),
    quote(parLapplyLB(none, 1, identity)), quote(parSapply(none, 1, identity)), quote(clusterMap(none, identity, 1)),
    quote(clusterApplyLB(none, 1, identity)), quote(parRapply(none, diag(2), sum)), quote(clusterEvalQ(none, 1)),
    quote(parApply(none, diag(2), 1, sum)), quote(clusterCall(none, identity, 1)),
    quote(parCapply(none, diag(2), sum)),
    quote(clusterExport(none, "refused", environment())), quote(parSapplyLB(none, 1, identity))
  )) {
    # testthat may have attached parallel after this package.
    call[[1L]] <- call("::", quote(rustcluster), call[[1L]])
    error <- caught(eval(call))
    expect_rust_error(error, "bad_argument")
    expect_identical(conditionMessage(error), refused, info = deparse(call[[1L]]))
  }
  expect_output(print(none), "^socket cluster without nodes$")
  stopCluster(cl)
  expect_length(clusterAlive(cl), 0L)
})

test_that("the cluster lives as long as any of its nodes is referenced", {
  skip_unless_proc()
  keep <- local({
    cl <- note_processes(makeRustCluster(3))
    cl[[2]]
  })
  gc()
  gc()
  parallel:::sendCall(keep, Sys.getpid, list())
  pid <- parallel:::recvResult(keep)
  expect_alive(pid)
  expect_true(pid %in% leftovers$pids)
  rm(keep)
  gc()
  gc()
  expect_gone(pid)
})

test_that("two clusters do not affect each other", {
  a <- local_cluster(2)
  b <- local_cluster(3)
  expect_length(intersect(clusterPids(a), clusterPids(b)), 0L)
  for (i in 1:2) parallel:::sendCall(a[[i]], identity, list(paste("a", i)))
  for (i in 1:3) parallel:::sendCall(b[[i]], identity, list(paste("b", i)))
  expect_equal(lapply(b, parallel:::recvResult), list("b 1", "b 2", "b 3"))
  expect_equal(lapply(a, parallel:::recvResult), list("a 1", "a 2"))
  stopCluster(a)
  expect_equal(clusterCall(b, identity, 1), rep(list(1), 3))
})

skip_without_types <- function() skip_if(getRversion() < "4.5", "R has no register of cluster types")

test_that("R's register of cluster types knows RUST, where R has one", {
  skip_without_types()
  cl <- note_processes(parallel::makeCluster(2, type = "RUST"))
  expect_s3_class(cl, "RustCluster")
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
  stopCluster(cl)
})

test_that("makeCluster() passes spec and arguments on", {
  skip_without_types()
  cl <- note_processes(parallel::makeCluster(
    rep("localhost", 3), "RUST", packages = "splines", rscript_envs = c(GIVEN = "1"), retries = 0
  ))
  expect_equal(
    clusterEvalQ(cl, c("package:splines" %in% search(), Sys.getenv("GIVEN"))), rep(list(c("TRUE", "1")), 3)
  )
  stopCluster(cl)
  expect_rust_error(caught(parallel::makeCluster(0, type = "RUST")), "bad_argument")
  error <- caught(parallel::makeCluster(2, type = "RUST", noSuchArgument = 1))
  expect_rust_error(error, "bad_argument")
})

test_that("makeCluster() may make it by default", {
  skip_without_types()
  old <- get("defaultClusterOptions", asNamespace("parallel"))$type
  on.exit(parallel:::setDefaultClusterOptions(type = old), add = TRUE, after = FALSE)
  # By name: R before 4.5 has no such function, and looks for it when this is checked.
  register <- get("registerClusterType", asNamespace("parallel"))
  register("RUSTDEFAULT", makeRustCluster, make.default = TRUE)
  cl <- note_processes(parallel::makeCluster(2))
  expect_s3_class(cl, "RustCluster")
  expect_equal(parallel::parSapply(cl, 1:3, identity), 1:3)
  stopCluster(cl)
})

test_that("a package that is loaded again is registered again, without a warning", {
  skip_without_types()
  child <- start_child({
    options(warn = 2)
    unloadNamespace("rustcluster")
    loadNamespace("rustcluster")
    cl <- parallel::makeCluster(1, type = "RUST")
    say("pid", unlist(parallel::clusterCall(cl, Sys.getpid)))
    parallel::stopCluster(cl)
  })
  note_pids(as.integer(child_wait_for(child, "pid")))
  expect_child_ends_well(child)
})

test_that("a cluster that a task takes along is small, also in the middle of a verb", {
  cl <- local_cluster(2)
  sizes <- integer()
  x <- structure(list(numeric(1e6), numeric(1e6)), class = "watched")
  registerS3method("[[", "watched", function(x, i) {
    sizes <<- c(sizes, length(serialize(cl, NULL)))
    unclass(x)[[i]]
  }, environment())
  expect_equal(clusterApply(cl, x, length), list(1e6, 1e6))
  expect_lt(max(sizes), 50e3)
})

test_that("no process is left", {
  stop_cluster_pairs()
  expect_no_leftovers()
})
