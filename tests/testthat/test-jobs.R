# Our verbs, beyond what they have in common with parallel's while all goes well: tasks that cross
# together are lost, interrupted or fail one by one, and the next call is right.

skip_on_cran()
watch_processes()

ours <- function(name) getExportedValue("rustcluster", name)
handing_out <- c("clusterApply", "clusterApplyLB", "clusterMap", "parLapply", "parLapplyLB", "parSapply")

# Calls the verb of this name with each of `x`; what else there is is the same for all.
hand <- function(verb, cl, x, fun, ..., package = "rustcluster") {
  f <- getExportedValue(package, verb)
  if (verb == "clusterMap") f(cl, fun, x, MoreArgs = list(...)) else f(cl, x, fun, ...)
}

# What any call must find after what was done to the cluster before.
expect_right <- function(cl, n = length(cl)) {
  expect_identical(rustcluster::clusterApplyLB(cl, 1:50, identity), as.list(1:50))
  expect_identical(rustcluster::parLapply(cl, 1:50, identity), as.list(1:50))
  expect_identical(rustcluster::clusterCall(cl, identity, "next"), rep(list("next"), n))
  expect_identical(parallel::clusterCall(cl, identity, "next"), rep(list("next"), n))
}

# As on PSOCK, with the text of the error if it is one.
said <- function(expr) tryCatch(expr, error = conditionMessage)

test_that("if one of many short tasks kills every worker, only that task fails", {
  cl <- local_cluster(3)
  x <- 5
  clusterExport(cl, "x", environment())
  for (name in c("clusterApplyLB", "clusterApply", "clusterMap", "parLapplyLB")) {
    got <- with_losses(caught(hand(name, cl, 1:3000, poison, 1500)))
    error <- got$value
    expect_rust_error(error, "task_failed")
    expect_identical(error$index, 1500L, info = name)
    expect_length(error$failures, 1)
    expect_identical(error$results, replace(as.list(1:3000 * 10), 1500, list(NULL)), info = name)
    expect_length(error$losses, 3)
    expect_length(got$losses, 2)
    # The last try was alone.
    expect_identical(error$losses[[3]]$tasks, 1500L)
    expect_identical(error$losses[[3]]$index, 1500L)
    expect_true(all(vapply(error$losses, function(loss) 1500L %in% loss$tasks, NA)))
    expect_identical(clusterEvalQ(cl, x), list(5, 5, 5))
    expect_right(cl)
  }
  note_processes(cl)
})

test_that("long tasks after short ones are spread over all workers", {
  cl <- local_cluster(2)
  long <- global(function(i) {
    if (i > 200) Sys.sleep(0.2)
    Sys.getpid()
  })
  for (name in c("clusterApplyLB", "parLapplyLB", "clusterLapply")) {
    pids <- unlist(hand(name, cl, 1:208, long))
    # They may have come in one unit: one has been begun before the others are taken out of it.
    expect_length(pids, 208)
    expect_gte(min(table(factor(pids[201:208], clusterPids(cl)))), 2)
  }
  # Errors and random numbers are those of their elements, whatever came back.
  x <- as.list(1:300)
  slow <- global(function(i) {
    if (i %% 50 == 0) Sys.sleep(0.05)
    if (i %% 70 == 0) stop("bad ", i)
    i
  })
  error <- caught(hand("clusterApplyLB", cl, x, slow))
  expect_match(conditionMessage(error), "bad 70", fixed = TRUE)
  expect_identical(hand("clusterLapply", cl, 1:300, global(function(i) {
    if (i %% 50 == 0) Sys.sleep(0.05)
    rnorm(1)
  }), .seed = 3), hand("clusterLapply", cl[1], 1:300, global(function(i) rnorm(1)), .seed = 3))
  note_processes(cl)
})

test_that("several tasks that kill every worker, with more and fewer retries", {
  for (retries in c(1, 4)) {
    cl <- local_cluster(2, retries = retries)
    bad <- c(900L, 901L, 1700L)
    got <- with_losses(caught(rustcluster::clusterApplyLB(cl, 1:2000, poison, bad)))
    error <- got$value
    expect_rust_error(error, "task_failed")
    expect_identical(vapply(error$failures, `[[`, 0L, "index"), bad)
    expect_identical(error$results, replace(as.list(1:2000 * 10), bad, list(NULL)))
    expect_identical(
      vapply(error$failures, function(failure) length(failure$losses), 0L), rep(as.integer(retries + 1), 3)
    )
    expect_right(cl)
    stopCluster(cl)
  }
})

test_that("retries = 0: the first worker failure is an error that names its tasks", {
  cl <- local_cluster(2, retries = 0)
  got <- with_losses(caught(rustcluster::clusterApplyLB(cl, 1:2000, poison, 1000)))
  expect_rust_error(got$value, "worker_lost")
  expect_length(got$losses, 0)
  expect_true(1000L %in% got$value$tasks)
  if (length(got$value$tasks) > 1L) expect_null(got$value$index)
  expect_right(cl)
  note_processes(cl)
})

# Takes half a millisecond, so that several cross together and one is sent ahead.
draw <- global(function(i, spring, trap, at) {
  drawn <- stats::rnorm(1)
  began <- Sys.time()
  while (Sys.time() - began < 5e-4) NULL
  if (i == at) spring(trap)
  c(drawn, stats::runif(1))
})

test_that("random numbers are PSOCK's, with a worker killed among many short tasks", {
  pair <- cluster_pair(3)
  for (name in c("clusterApply", "clusterMap", "parLapply")) {
    clusterSetRNGStream(pair$psock, 42)
    want <- hand(name, pair$psock, 1:900, draw, spring, "none", 400, package = "parallel")
    after <- clusterCall(pair$psock, stats::runif, 1)
    clusterSetRNGStream(pair$ours, 42)
    got <- with_losses(hand(name, pair$ours, 1:900, draw, spring, trap(), 400))
    expect_identical(got$value, want, info = name)
    expect_length(got$losses, 1)
    expect_identical(clusterCall(pair$ours, stats::runif, 1), after, info = name)
    note_processes(pair$ours)
  }
})

test_that("a whole host is killed among many short tasks", {
  ssh <- local_sshd()
  # Kills the agent of whichever host has it.
  mortal <- global(function(i, mark) {
    drawn <- stats::rnorm(1)
    if (i == 500 && !file.exists(mark)) {
      file.create(mark)
      stat <- sub("^.*\\) ", "", readLines("/proc/self/stat", n = 1L))
      tools::pskill(as.integer(strsplit(stat, " ", fixed = TRUE)[[1L]][[2L]]), tools::SIGKILL)
      Sys.sleep(60)
    }
    list(i, x, drawn)
  })
  psock <- cluster_pair(3)$psock
  x <- "exported"
  clusterExport(psock, "x", environment())
  clusterSetRNGStream(psock, 7)
  want <- parallel::clusterApply(psock, 1:1000, mortal, tempdir())
  for (name in c("clusterApply", "clusterApplyLB", "parLapplyLB")) {
    cl <- over_ssh(ssh, c("127.0.0.2" = 2, "127.0.0.3" = 1))
    clusterExport(cl, "x", environment())
    clusterSetRNGStream(cl, 7)
    told <- list()
    got <- withCallingHandlers(ours(name)(cl, 1:1000, mortal, tempfile()), warning = function(w) {
      told <<- c(told, list(w))
      invokeRestart("muffleWarning")
    })
    part <- if (name == "clusterApply") 1:3 else 1:2
    expect_identical(lapply(got, `[`, part), lapply(want, `[`, part), info = name)
    expect_true(any(vapply(told, inherits, NA, "rustcluster_host_failed")))
    expect_rust_error(caught(ours(name)(cl, 1:9, identity)), "host_failed")
    expect_right(clusterAlive(cl))
    stopCluster(cl)
  }
})

test_that("errors about a chunk name its elements", {
  cl <- local_cluster(2, timeout = 0.5)
  stuck <- global(function(i) if (i[[1L]] == 7) Sys.sleep(60) else i[[1L]])
  x <- matrix(1:20, 10)
  chunks <- alist(
    "elements 6 to 10 exceeded" = parLapply(cl, 1:10, stuck), "elements 6 to 10 exceeded" = parSapply(cl, 1:10, stuck),
    "elements 7 to 8 exceeded" = parLapply(cl, 1:10, stuck, chunk.size = 2),
    "element 7 exceeded" = parLapplyLB(cl, 1:10, stuck), "elements 6 to 7 exceeded" = parLapplyLB(cl, 1:10, stuck, chunk.size = 3),
    "elements 6 to 10 exceeded" = parApply(cl, x, 1, stuck), "rows 6 to 10 exceeded" = parRapply(cl, x, stuck),
    "column 2 exceeded" = parCapply(cl, x + (x == 11) * -4, stuck),
    # No chunks of parLapply().
    "task 2 exceeded" = clusterApply(cl, list(1:3, 7:9), lapply, stuck), "task 7 exceeded" = clusterMap(cl, stuck, 1:10)
  )
  for (package in c("rustcluster", "parallel")) {
    verbs <- verbs_of(package)
    # Each worker that is ended takes a while to be replaced.
    few <- package == "parallel" && !long_tests()
    for (i in if (few) c(1, 4, 9) else seq_along(chunks)) {
      error <- caught(eval(chunks[[i]], verbs))
      expect_rust_error(error, "timeout")
      expect_match(conditionMessage(error), paste0("^", names(chunks)[[i]]), label = paste(package, deparse(chunks[[i]])))
      # What the limit and the results are of.
      several <- grepl("^(elements|rows)", names(chunks)[[i]])
      expect_identical(grepl("the time limit applies to the whole chunk", conditionMessage(error)), several)
      by_chunk <- !startsWith(names(chunks)[[i]], "task") && length(error$results) < 10L
      expect_identical(
        grepl("as `results`, by chunk: ", conditionMessage(error), fixed = TRUE), by_chunk,
        label = paste(package, deparse(chunks[[i]]))
      )
    }
  }
  # A verb in an argument of another one.
  other <- local_cluster(2, timeout = 0.5)
  nested <- quote(parLapply(cl, {
    clusterApply(other, list(1:3, 7:9), stuck)
    1:2
  }, identity))
  expect_match(conditionMessage(caught(eval(nested))), "^task 2 exceeded")
  # A failure, and its retries.
  cl <- local_cluster(2, retries = 1)
  got <- with_losses(caught(parLapply(cl, 1:4, global(function(i) if (i == 3) quit("no") else i))))
  expect_match(conditionMessage(got$value), "^elements 3 to 4 failed: the worker died on all 2 attempts")
  expect_match(conditionMessage(got$losses[[1]]), "elements 3 to 4 are retried$")
})

test_that("idle workers run the tasks of a lost host", {
  cl <- local_cluster(list(list(host = "localhost", ncore = 2), list(host = "localhost", ncore = 1, threads = 2)))
  agent <- global(function() {
    stat <- sub("^.*\\) ", "", readLines("/proc/self/stat", n = 1L))
    as.integer(strsplit(stat, " ", fixed = TRUE)[[1L]][[2L]])
  })
  last <- global(function(i, mark, agent) {
    if (i == 100 && !file.exists(mark)) {
      file.create(mark)
      # All else is done by then.
      Sys.sleep(0.5)
      tools::pskill(agent(), tools::SIGKILL)
      Sys.sleep(60)
    }
    i
  })
  got <- suppressWarnings(
    rustcluster::clusterApplyLB(cl, 1:100, last, tempfile(), agent), classes = "rustcluster_host_failed"
  )
  expect_identical(got, as.list(1:100))
})

test_that("`timeout` of the cluster applies to each task", {
  cl <- local_cluster(2, timeout = 0.5)
  late <- global(function(i, bad, deaf) {
    if (i %in% bad) repeat if (deaf) tryCatch(Sys.sleep(60), interrupt = function(e) NULL) else Sys.sleep(60)
    i
  })
  pids <- clusterPids(cl)
  for (deaf in c(FALSE, TRUE)) {
    suppressWarnings({
      error <- caught(rustcluster::clusterApplyLB(cl, 1:200, late, c(20L, 100L), deaf))
      expect_rust_error(error, "timeout")
      expect_identical(vapply(error$failures, `[[`, 0L, "index"), c(20L, 100L))
      expect_identical(error$results, replace(as.list(1:200), c(20, 100), list(NULL)))
      expect_right(cl)
    }, classes = "rustcluster_worker_replaced")
    if (!deaf) expect_identical(clusterPids(cl), pids)
  }
  note_processes(cl)
  expect_gone(setdiff(pids, clusterPids(cl)))
})

test_that("interrupts at random moments, with large and small elements", {
  small <- eval(quote(function(...) "stale"), globalenv())
  calls <- list(
    quote(rustcluster::clusterApply(cl, 1:500, small)),
    quote(rustcluster::clusterApplyLB(cl, 1:5000, small)),
    quote(rustcluster::parLapply(cl, 1:50, small)),
    quote(rustcluster::parLapplyLB(cl, 1:5000, small)),
    quote(rustcluster::clusterMap(cl, small, 1:70, 1:70)),
    quote(rustcluster::clusterMap(cl, small, 1:70, 1:70, .scheduling = "dynamic")),
    quote(rustcluster::clusterCall(cl, small)),
    quote(rustcluster::clusterApplyLB(cl, large, small)),
    quote(rustcluster::clusterApply(cl, large, identity)),
    quote(rustcluster::clusterApplyLB(cl, mixed, identity)),
    quote(rustcluster::clusterApplyLB(cl, 1:9, Sys.sleep)),
    quote(rustcluster::clusterApplyLB(cl, counted, small)),
    quote(clusterLapply(cl, 1:500, small, .seed = 1)),
    quote(clusterLapply(cl, mixed, small, .timeout = 60, .onResult = function(i, value) NULL))
  )
  large <- rep(list(numeric(2e5)), 6)
  mixed <- rep(list(1, numeric(3e5), "a", function(x) large), 3)
  counted <- structure(as.list(1:300), class = "counted")
  registerS3method("[[", "counted", function(x, i) unclass(x)[[i]] + 0, environment())
  set.seed(as.integer(Sys.getpid()))
  for (round in seq_len(if (long_tests()) 1000 else 60)) {
    if (round %% 100 == 1) {
      if (round > 1) stopCluster(cl)
      cl <- local_cluster(3)
      before <- clusterPids(cl)
    }
    call <- calls[[sample.int(length(calls), 1L)]]
    what <- paste0("round ", round, ": ", paste(deparse(call), collapse = " "))
    felt <- until_interrupted(eval(call), stats::runif(1, 0, 0.05))
    got <- rustcluster::clusterApplyLB(cl, round + 1:40, identity)
    more <- rustcluster::clusterApply(cl, round + 1:4, identity)
    last <- rustcluster::clusterCall(cl, identity, what)
    right <- felt && identical(got, as.list(round + 1:40)) && identical(more, as.list(round + 1:4)) &&
      identical(last, rep(list(what), 3)) && identical(clusterPids(cl), before)
    if (!right) break
  }
  expect(right, what)
  note_processes(cl)
})

test_that("setTimeLimit() ends each verb", {
  cl <- local_cluster(3)
  limited <- function(expr) {
    on.exit(setTimeLimit(), add = TRUE, after = FALSE)
    tryCatch(
      {
        setTimeLimit(elapsed = 0.3, transient = TRUE)
        expr
      },
      error = function(e) if (grepl("time limit", conditionMessage(e))) "too late" else stop(e)
    )
  }
  for (name in handing_out) {
    expect_identical(limited(hand(name, cl, 1:9, function(i) Sys.sleep(60))), "too late", info = name)
    expect_identical(limited(repeat ours("clusterApplyLB")(cl, 1:1000, identity)), "too late")
    expect_right(cl)
  }
})

test_that("workers that do not respond to the interrupt are replaced with their state", {
  cl <- local_cluster(2)
  x <- "exported"
  clusterExport(cl, "x", environment())
  before <- clusterPids(cl)
  mark <- tempfile()
  deaf <- global(function(i, mark) {
    if (i == 40) {
      file.create(mark)
      repeat tryCatch(Sys.sleep(60), interrupt = function(e) NULL)
    }
    i
  })
  # As soon as it is there.
  system(sprintf("(while [ ! -e %s ]; do sleep 0.01; done; kill -INT %d) &", mark, Sys.getpid()))
  got <- tryCatch(rustcluster::clusterApplyLB(cl, 1:100, deaf, mark), interrupt = function(e) "interrupted")
  expect_identical(got, "interrupted")
  expect_warning(
    got <- rustcluster::clusterApply(cl, 1:4, function(i) c(i, x)), class = "rustcluster_worker_replaced"
  )
  expect_identical(got, lapply(1:4, function(i) c(i, x)))
  expect_identical(sum(clusterPids(cl) == before), 1L)
  expect_gone(setdiff(before, clusterPids(cl)))
  note_processes(cl)
})

test_that("elements are extracted once, and an error in that ends the call", {
  cl <- local_cluster(2)
  asked <- 0
  registerS3method("[[", "asked", function(x, i) {
    asked <<- asked + 1
    value <- unclass(x)[[i]]
    if (identical(value, "bad")) stop("element ", i)
    value
  }, environment())
  for (kind in list(1, "a", numeric(3e4), new.env(parent = globalenv()))) {
    x <- structure(rep(list(1, kind), 15), class = "asked")
    asked <- 0
    got <- rustcluster::clusterApplyLB(cl, x, length)
    expect_identical(got, rep(list(1L, length(kind)), 15))
    expect_identical(asked, 30)
    asked <- 0
    rustcluster::clusterApply(cl, x, class)
    expect_identical(asked, 30)
  }
  # Also if they are lost with their worker.
  work <- global(function(i, spring, trap) {
    if (i == 15) spring(trap)
    i
  })
  x <- structure(as.list(1:30), class = "asked")
  asked <- 0
  got <- with_losses(rustcluster::clusterApplyLB(cl, x, work, spring, trap()))
  expect_identical(got$value, as.list(1:30))
  expect_length(got$losses, 1)
  expect_identical(asked, 30)
  note_processes(cl)
  stale <- global(function(i) "stale")
  for (at in c(1, 7, 400)) {
    x <- structure(replace(as.list(1:500), at, "bad"), class = "asked")
    for (name in c("clusterApply", "clusterApplyLB")) {
      expect_error(ours(name)(cl, x, stale), paste0("^element ", at, "$"))
      expect_right(cl)
    }
  }
})

test_that("warnings of worker failures may be turned into errors, and a handler may not use the cluster", {
  cl <- local_cluster(2)
  work <- global(function(i, spring, trap) {
    if (i == 150) spring(trap)
    i
  })
  for (name in c("clusterApply", "clusterApplyLB", "parLapply")) {
    old <- options(warn = 2)
    expect_error(ours(name)(cl, 1:300, work, spring, trap()), "converted from warning")
    options(old)
    expect_right(cl)
    expect_s3_class(
      tryCatch(ours(name)(cl, 1:300, work, spring, trap()), warning = identity), "rustcluster_worker_lost"
    )
    expect_right(cl)
    inner <- list()
    got <- withCallingHandlers(ours(name)(cl, 1:300, work, spring, trap()), warning = function(w) {
      inner <<- list(
        caught(rustcluster::clusterCall(cl, identity, 1)), caught(parallel::clusterApply(cl, 1:2, identity)),
        caught(rustcluster::clusterApplyLB(cl, 1:2, identity)), caught(clusterLapply(cl, 1:2, identity))
      )
      invokeRestart("muffleWarning")
    })
    expect_identical(got, as.list(1:300))
    for (error in inner) expect_rust_error(error, "busy")
    expect_right(cl)
  }
  # From the middle of handing out.
  registerS3method("[[", "nested", function(x, i) {
    if (i == 60) inner <<- caught(parallel::clusterCall(cl, identity, i))
    i
  }, environment())
  got <- rustcluster::clusterApplyLB(cl, structure(as.list(1:99), class = "nested"), identity)
  expect_rust_error(inner, "busy")
  expect_equal(got, as.list(1:99))
  expect_right(cl)
  note_processes(cl)
})

test_that("the cluster, or a part of it, is stopped during a call", {
  cl <- local_cluster(3)
  registerS3method("[[", "stopping", function(x, i) {
    if (i == 6) stopCluster(part)
    i
  }, environment())
  x <- structure(as.list(1:9), class = "stopping")
  part <- cl[2]
  gone <- clusterPids(part)
  expect_rust_error(caught(rustcluster::clusterApplyLB(cl, x, function(i) {
    Sys.sleep(0.05)
    i
  })), "stopped")
  expect_gone(gone)
  expect_right(cl[-2])
  part <- cl
  pids <- clusterPids(cl[-2])
  expect_rust_error(caught(rustcluster::clusterApply(cl[-2], x, identity)), "stopped")
  expect_gone(pids)
  expect_rust_error(caught(rustcluster::clusterApply(cl, 1:3, identity)), "stopped")
})

test_that("functions with state and shared environments behave as with PSOCK", {
  counter <- eval(quote(function() {
    n <- 0
    function(i, ...) {
      n <<- n + 1
      c(i, n)
    }
  }), globalenv())
  for (name in c("clusterApply", "clusterApplyLB", "parLapply", "parSapply")) {
    expect_same_value(verb(cl, 1:40, f), f = counter(), verb = ours(name))
  }
  # The function and its argument have an environment in common, in the worker too.
  shared <- eval(quote(function(k) {
    n <- 0
    here <- environment()
    list(f = function(e, ...) {
      e$n <- e$n + 1
      n
    }, x = rep(list(here), k))
  }), globalenv())(7)
  expect_same_value(clusterApply(cl, s$x, s$f), s = shared)
  expect_same_value(clusterApplyLB(cl, s$x, s$f), s = shared)
  expect_same_value(clusterMap(cl, s$f, s$x), s = shared)
  expect_same_value(clusterApply(cl, 1:7, function(i, e, f) f(e), s$x[[1]], s$f), s = shared)
})

test_that("elements and results of all kinds", {
  latin1 <- "caf\xe9"
  Encoding(latin1) <- "latin1"
  bytes <- "\xff\xfe"
  Encoding(bytes) <- "bytes"
  methods::setClass("JobsTestS4", slots = c(a = "numeric"), where = globalenv())
  on.exit(methods::removeClass("JobsTestS4", where = globalenv()), add = TRUE, after = FALSE)
  elements <- list(
    NULL, NA, list(a = 1, b = list("x", NULL)), c(a = 1, b = 2), factor(c("u", "v")), as.Date("2026-01-01"),
    as.POSIXct(0, origin = "1970-01-01", tz = "UTC"), mtcars, sum, `if`, function(x) x + 1, globalenv(),
    asNamespace("stats"), 1:10, 1:1e6, seq(2, 20, 2), as.raw(0:255), c(1+2i, NA), strrep("x", 1e5), numeric(1e4),
    character(), NULL, quote(a + b), as.name("a"), y ~ x, expression(a, 1), pairlist(a = 1), latin1, bytes,
    c("\u4e2d", NA, ""), matrix(1:4, 2), array(1:8, c(2, 2, 2)), methods::new("JobsTestS4", a = 1), NA_character_,
    NaN, -0, .Machine$integer.max, structure(1, class = "other"), structure(list(1), names = "\u00e9")
  )
  # A formula's environment is a copy.
  environment(elements[[25]]) <- globalenv()
  # Of the global environment: others take all elements along, for each task.
  look <- global(function(x) list(x, class(x), typeof(x)))
  elements[[11]] <- strip_srcref(eval(quote(function(x) x + 1), globalenv()))
  for (name in c("clusterApply", "clusterApplyLB", "parLapply", "parLapplyLB")) {
    expect_same_value(verb(cl, x, f), x = elements, f = look, verb = ours(name))
  }
  expect_same_value(clusterMap(cl, list, x, rev(x)), x = elements)
  expect_same_value(clusterApplyLB(cl, c(x, "\u4e2d", y, NA), f), x = latin1, y = bytes, f = global(function(x) c(x, Encoding(x))))
  expect_same_value(clusterApply(cl, list(p, 1, p), typeof), p = methods::new("externalptr"))
  expect_same_value(sapply(clusterApply(cl, list(u, 1, u), identity), typeof), u = new.env())
  # In the order of the tasks, whatever their sizes.
  sizes <- sample(rep(c(0, 1, 1e3, 1e6), c(100, 100, 50, 2)))
  expect_same_value(lengths(clusterApplyLB(cl, sizes, numeric)), sizes = sizes)
  expect_same_value(clusterApplyLB(cl, x, length), x = c(lapply(sizes, numeric), list(numeric(1.3e6), 1)))
  cl <- cluster_pair()$ours
  expect_identical(rustcluster::clusterApplyLB(cl, 1:1e5, identity), as.list(1:1e5))
  expect_identical(rustcluster::parLapplyLB(cl, 1:1e5 / 2, identity), as.list(1:1e5 / 2))
  expect_identical(rustcluster::clusterApply(cl, 1:2e4, identity), as.list(1:2e4))
})

test_that("errors among many short tasks, and results that cannot be sent", {
  expect_same_error(clusterApplyLB(cl, 1:500, function(i) if (i == 333) stop("here") else i))
  expect_same_error(clusterApply(cl, 1:500, function(i) if (i %% 50 == 0) stop("at ", i) else i))
  expect_same_error(parLapplyLB(cl, 1:500, function(i) if (i %% 50 == 0) stop("at ", i) else i))
  expect_same_error(clusterApplyLB(cl, 1:5, function(i) try(stop("a value"), silent = TRUE)))
  expect_same_value(clusterApplyLB(cl, 1:5, function(i) list(try(stop("a value"), silent = TRUE))))
  cl <- local_cluster(2)
  # Too deep for R's serialization.
  deep <- global(function(i) {
    l <- list()
    if (i == 20) for (k in 1:1e5) l <- list(l) else l <- i
    l
  })
  for (n in c(20, 40)) {
    error <- caught(rustcluster::clusterApplyLB(cl, seq_len(n), deep))
    expect_match(conditionMessage(error), "one node produced an error: .*(stack|nested)")
    expect_right(cl)
  }
  # An interrupt of its own making is the task's error, and the others are done.
  own <- global(function(i) {
    if (i == 150) tools::pskill(Sys.getpid(), tools::SIGINT)
    for (k in 1:1000) k
    i
  })
  expect_match(said(rustcluster::clusterApplyLB(cl, 1:300, own)), "one node produced an error: .*interrupted")
  expect_right(cl)
  # Ends R as quit() does.
  error <- with_losses(caught(rustcluster::clusterApplyLB(cl, 1:300, global(function(i) if (i == 99) quit("no") else i))))
  expect_rust_error(error$value, "task_failed")
  expect_identical(error$value$index, 99L)
  expect_identical(error$value$results, replace(as.list(1:300), 99, list(NULL)))
  expect_right(cl)
  # Prints, cleans up too much, loses what it was given.
  messy <- global(function(i) {
    print(i)
    message(i)
    if (i == 7) {
      detach("package:stats")
      closeAllConnections()
      rm(list = ls(globalenv()), envir = globalenv())
      gc()
    }
    i
  })
  expect_identical(rustcluster::clusterApplyLB(cl, 1:99, messy), as.list(1:99))
  expect_right(cl)
  note_processes(cl)
})

test_that("functions by name, primitive and generic ones", {
  expect_same_value(clusterApply(cl, 1:3, "sqrt"))
  expect_same_value(clusterApplyLB(cl, 1:3, sqrt))
  expect_same_value(parLapplyLB(cl, 1:30, "sqrt"))
  expect_same_value(clusterApply(cl, 1:3, methods::show))
  expect_same_value(clusterMap(cl, `+`, 1:9, 1))
  # Known to the workers alone.
  expect_same_value({
    clusterEvalQ(cl, onlyThere <- function(i) i + 0.5)
    list(
      clusterApplyLB(cl, 1:9, "onlyThere"), parLapply(cl, 1:9, "onlyThere"), parLapplyLB(cl, 1:9, "onlyThere"),
      clusterCall(cl, "onlyThere", 1), clusterEvalQ(cl, rm(onlyThere))
    )
  })
  pair <- cluster_pair()
  for (name in c(handing_out, "clusterCall")) {
    for (args in list(
      quote(f(cl)), quote(f(cl, 1:3)), quote(f(cl, 1:3, "noSuchFunction")), quote(f(cl, 1:3, 5)),
      quote(f(cl, 1:3, NULL)), quote(f(cl, 1:3, sum, stop("an argument"))), quote(f(cl, 1:3, sum, , 2)),
      quote(f(cl, quote(a + b), class)), quote(f(cl, sum, sum)), quote(f(cl, as.name("x"), sum)),
      quote(f(5, 1:3, sum)), quote(f(cl[c(1, 1)], 1:6, sqrt)),
      quote(f(cl[3:2], 1:6, sqrt)), quote(f(rev(cl), 1:6, sqrt)), quote(f(cl, 1:3, sum, na.rm = TRUE, 7)),
      quote(f(cl, numeric(), sum)), quote(f(cl, NULL, sum)), quote(f(cl, c(a = 1, b = 2), sum))
    )) {
      of <- function(package, cl) said(eval(args, list(f = getExportedValue(package, name), cl = cl)))
      expect_identical(of("rustcluster", pair$ours), of("parallel", pair$psock), info = paste(name, deparse(args)))
    }
  }
})

test_that("parts, orders, other clusters and no cluster", {
  pair <- cluster_pair()
  pids <- as.integer(clusterPids(pair$ours))
  at <- function(cl) unlist(rustcluster::clusterApply(cl, seq_along(cl), function(i) Sys.getpid()))
  expect_identical(at(pair$ours[2:3]), pids[2:3])
  expect_identical(at(rev(pair$ours)), rev(pids))
  expect_identical(at(pair$ours[c(1, 1)]), pids[c(1, 1)])
  for (name in handing_out) {
    expect_identical(
      hand(name, pair$psock, 1:9, sqrt), hand(name, pair$psock, 1:9, sqrt, package = "parallel")
    )
  }
  setDefaultCluster(pair$ours)
  got <- list(rustcluster::parLapply(X = 1:9, fun = sqrt), rustcluster::clusterApplyLB(NULL, 1:9, sqrt), rustcluster::clusterCall(NULL, sqrt, 4)[[1]])
  setDefaultCluster(NULL)
  expect_identical(got, list(lapply(1:9, sqrt), lapply(1:9, sqrt), 2))
  cl <- local_cluster(2)
  in_fork <- parallel::mclapply(1:2, function(i) {
    lapply(list(
      quote(rustcluster::parLapply(cl, 1:3, sqrt)), quote(rustcluster::clusterApplyLB(cl, 1:3, sqrt)),
      quote(rustcluster::clusterCall(cl, sqrt, 1)), quote(clusterLapply(cl, 1:3, sqrt))
    ), function(call) class(caught(eval(call)))[[1]])
  }, mc.cores = 2)
  expect_identical(unlist(in_fork), rep("rustcluster_forked", 8))
  file <- tempfile()
  saveRDS(cl, file)
  saved <- readRDS(file)
  expect_rust_error(caught(rustcluster::parLapply(saved, 1:3, sqrt)), "restored")
  expect_rust_error(caught(rustcluster::clusterCall(saved, sqrt, 1)), "restored")
  expect_right(cl)
  stopCluster(cl)
  for (name in handing_out[-3]) expect_rust_error(caught(ours(name)(cl, 1:3, sqrt)), "stopped")
})

test_that("garbage collections at any moment, in the session and in the workers", {
  cl <- local_cluster(2)
  elements <- list(1, "a", NULL, list(a = 1), factor("u"), numeric(2e4), sum)
  envs <- lapply(1:3, function(i) list2env(list(i = i), parent = globalenv()))
  of_env <- eval(quote(local({
    k <- 0
    function(e) e$i + k
  })), globalenv())
  work <- function() {
    list(
      rustcluster::clusterApplyLB(cl, 1:6, identity), rustcluster::clusterApply(cl, elements, identity),
      rustcluster::clusterMap(cl, sum, 1:3, 3:1), clusterLapply(cl, envs, of_env, .seed = 1),
      lengths(clusterLapply(cl, 1:4, function(i) if (i == 3) stop("three") else i, .errors = "return"))
    )
  }
  want <- list(
    as.list(1:6), elements, as.list(rep(4L, 3)), as.list(c(1, 2, 3)), rep(1L, 4)
  )
  expect_identical(work(), want)
  clusterCall(cl, gctorture2, if (long_tests()) 1 else 100)
  got <- work()
  clusterCall(cl, gctorture2, 0)
  expect_identical(got, want)
  old <- gctorture2(if (long_tests()) 1 else 1000)
  got <- tryCatch(work(), finally = gctorture2(old))
  expect_identical(got, want)
})

test_that("many calls leave no memory and no descriptor", {
  skip_unless_proc()
  cl <- local_cluster(2)
  call <- function(i) {
    rustcluster::parLapplyLB(cl, rep(100, 50), numeric)
    rustcluster::clusterApply(cl, 1:4, identity)
    said(rustcluster::clusterApplyLB(cl, 1:5, stop))
    clusterLapply(cl, 1:20, sqrt, .seed = 1, .timeout = 60, .onResult = function(i, value) NULL)
  }
  memory <- function() {
    gc()
    line <- grep("^VmRSS", readLines("/proc/self/status"), value = TRUE)
    as.numeric(gsub("[^0-9]", "", line)) / 1024
  }
  count <- if (long_tests()) 1000 else 50
  for (i in seq_len(count)) call(i)
  held <- memory()
  before <- c(open_fds(), threads_of(), nrow(showConnections()))
  for (i in seq_len(count)) call(i)
  expect_lt(memory() - held, 10)
  expect_true(all(c(open_fds(), threads_of(), nrow(showConnections())) <= before))
  # Nor is what the last one had.
  freed <- FALSE
  local({
    e <- new.env()
    reg.finalizer(e, function(e) freed <<- TRUE)
    rustcluster::clusterApplyLB(cl, list(e, 1), function(e, more) 1, e)
  })
  gc()
  expect_true(freed)
})

test_that("no process is left", {
  stop_cluster_pairs()
  expect_no_leftovers()
})
