# clusterLapply(): what it can do beyond parallel's verbs.

skip_on_cran()
watch_processes()

square <- global(function(i) i^2)
squares <- function(n) as.list(seq_len(n)^2)

test_that("clusterLapply() returns the same as lapply()", {
  wrap <- global(function(x, ...) list(x))
  cl <- local_cluster(3)
  for (x in list(
    1:10, c(a = 1, b = 2), letters, list(1, "a", NULL), NULL, list(), character(), c(u = TRUE), 1i * 1:3,
    as.raw(1:3), data.frame(a = 1:3, b = 4:6), factor(c("u", "v")), Sys.Date() + 0:2, matrix(1:4, 2),
    expression(a, b + 1), quote(f(x)), pairlist(a = 1, 2), list2env(list(z = 1)), 1:1e4 / 2
  )) {
    expect_identical(clusterLapply(cl, x, wrap, 7), lapply(x, wrap, 7))
  }
  expect_identical(clusterLapply(cl, 1:9, "sqrt"), lapply(1:9, sqrt))
  expect_identical(clusterLapply(cl[2], 1:9, sum, 1, 2), lapply(1:9, sum, 1, 2))
  expect_identical(clusterLapply(rev(cl), 1:3, `+`, 1L), list(2L, 3L, 4L))
  setDefaultCluster(cl)
  expect_identical(clusterLapply(X = 1:9, FUN = square), squares(9))
  setDefaultCluster(NULL)
  expect_identical(clusterLapply(cl, 1:1e5, square), squares(1e5))
})

test_that("invalid arguments of clusterLapply() are errors", {
  cl <- local_cluster(2)
  bad <- function(argument, ...) {
    error <- caught(clusterLapply(cl, 1:3, sqrt, ...))
    expect_rust_error(error, "bad_argument")
    expect_identical(error$argument, argument)
  }
  for (order in list(1:2, c(1, 1, 2), c(1, NA, 2), c(1.5, 2, 3), "a", 0:2, c(3, 2, -1))) bad(".order", .order = order)
  error <- caught(clusterLapply(cl, 1, sqrt, .order = NA_real_))
  expect_rust_error(error, "bad_argument")
  for (seed in list("a", NA, 1:2, 1.5, 1e10, Inf)) bad(".seed", .seed = seed)
  for (timeout in list(0, -1, NA, "1", NULL, 1:2)) bad(".timeout", .timeout = timeout)
  for (retries in list(-1, NA, "1", 1:2, 1.5)) bad(".retries", .retries = retries)
  for (progress in list(NA, 1, NULL)) bad(".progress", .progress = progress)
  bad(".onResult", .onResult = "print")
  bad(".errors", .errors = "never")
  expect_rust_error(caught(clusterLapply(cl, 1:3, sqrt, .sed = 1)), "bad_argument")
  expect_rust_error(caught(clusterLapply(cl, 1:3, function(x, ...) x, .Seed = 1)), "bad_argument")
  expect_identical(clusterLapply(cl, 1:2, function(x, .by, ...) x * .by, .by = 2, .id = 1), list(2, 4))
  expect_error(clusterLapply(cl, 1:3), "FUN")
  expect_error(clusterLapply(cl, 1:3, "noSuchFunction"), "noSuchFunction")
  expect_identical(clusterLapply(cl[c(1, 1)], 1:3, sqrt), lapply(1:3, sqrt))
  expect_rust_error(caught(clusterLapply(cl[0], 1:3, sqrt)), "bad_argument")
  expect_rust_error(caught(clusterLapply(NULL, 1:3, sqrt)), "bad_argument")
  expect_rust_error(caught(clusterLapply(structure(list(1), class = c("SOCKcluster", "cluster")), 1:3, sqrt)), "bad_argument")
  expect_identical(clusterLapply(cl, 1:9, square), squares(9))
})

draws <- global(function(i, ...) c(stats::rnorm(1), sample.int(1000L, 1L), stats::runif(1)))

test_that(".seed: random numbers do not depend on workers, order and worker failures", {
  kind <- RNGkind()
  on.exit(RNGkind(kind[[1L]], kind[[2L]], kind[[3L]]), add = TRUE, after = FALSE)
  # By nextRNGStream(), here.
  set.seed(42, "L'Ecuyer-CMRG", "Inversion", "Rejection")
  want <- list()
  state <- .Random.seed
  for (i in 1:300) {
    assign(".Random.seed", state, globalenv())
    want[[i]] <- draws(i)
    state <- nextRNGStream(state)
  }
  RNGkind(kind[[1L]], kind[[2L]], kind[[3L]])
  cl <- local_cluster(3)
  run <- function(cl, x = 1:300, fun = draws, ...) clusterLapply(cl, x, fun, ..., .seed = 42)
  expect_identical(run(cl), want)
  expect_identical(run(cl[2]), want)
  for (order in list(300:1, sample(300), c(seq(2, 300, 2), seq(1, 299, 2)))) expect_identical(run(cl, .order = order), want)
  expect_identical(run(cl, .timeout = 60), want)
  # Elements that cross alone: long ones, and those that hold what may change, as the function does.
  changing <- eval(quote(local({
    state <- new.env()
    function(i, ...) c(stats::rnorm(1), sample.int(1000L, 1L), stats::runif(1))
  })), globalenv())
  expect_identical(run(cl, rep(list(numeric(2e4)), 9)), want[1:9])
  expect_identical(run(cl, 1:9, changing), want[1:9])
  expect_identical(run(cl, lapply(1:9, function(i) new.env(parent = globalenv())), changing), want[1:9])
  # Errors, which leave their part of the stream.
  failing <- global(function(i) {
    drawn <- c(stats::rnorm(1), sample.int(1000L, 1L), stats::runif(1))
    if (i %% 3 == 0) stop("so") else drawn
  })
  some <- run(cl, fun = failing, .errors = "return")
  expect_identical(some[1:300 %% 3 != 0], want[1:300 %% 3 != 0])
  mortal <- global(function(i, spring, trap, draws) {
    drawn <- draws(i)
    if (i %in% c(50, 200)) spring(trap)
    drawn
  })
  for (part in list(1:3, 1)) {
    got <- with_losses(run(cl[part], 1:300, mortal, spring, trap(2), draws))
    expect_identical(got$value, want)
    expect_length(got$losses, 2)
  }
  note_processes(cl)
  other <- local_cluster(1)
  expect_identical(run(other), want)
})

test_that("seeded elements leave the generator of a worker that has not drawn a number yet", {
  pair <- cluster_pair(2)
  clusterLapply(pair$rust, 1:20, function(i) runif(1), .seed = 1)
  clusterLapply(pair$rust, 1:20, function(i) i, .seed = 1)
  expect_identical(
    clusterCall(pair$rust, function() exists(".Random.seed", globalenv())), list(FALSE, FALSE)
  )
  draw <- function() {
    set.seed(7)
    list(RNGkind(), runif(2), rnorm(2), sample(100, 2))
  }
  expect_identical(clusterCall(pair$rust, draw), clusterCall(pair$psock, draw))
  # With kinds of its own, and no state.
  other <- function() {
    suppressWarnings(RNGkind("Wichmann-Hill", "Box-Muller", "Rounding"))
    rm(".Random.seed", envir = globalenv())
  }
  clusterCall(pair$rust, other)
  clusterCall(pair$psock, other)
  clusterLapply(pair$rust, 1:20, function(i) runif(1), .seed = 1)
  expect_identical(clusterCall(pair$rust, draw), clusterCall(pair$psock, draw))
  for (cl in pair) clusterCall(cl, RNGkind, "default", "default", "default")
})

test_that(".seed leaves the generators of the session and of the workers alone", {
  cl <- local_cluster(2)
  psock <- cluster_pair(2)$psock
  for (kind in c("Mersenne-Twister", "L'Ecuyer-CMRG")) {
    set.seed(5, kind)
    clusterSetRNGStream(cl, 3)
    before <- .Random.seed
    runif(1)
    assign(".Random.seed", before, globalenv())
    drawn <- clusterCall(cl, stats::runif, 1)
    state <- clusterEvalQ(cl, .Random.seed)
    for (x in list(1:100, list(new.env(), new.env()))) {
      clusterLapply(cl, x, function(i) stats::rnorm(2), .seed = 1)
      try(clusterLapply(cl, x, function(i) stop(stats::rnorm(2)), .seed = 1), silent = TRUE)
    }
    expect_identical(.Random.seed, before)
    expect_identical(clusterEvalQ(cl, .Random.seed), state)
    # Also in a worker that takes another's place after that.
    tools::pskill(clusterPids(cl)[[1]], tools::SIGKILL)
    expect_identical(with_losses(clusterEvalQ(cl, .Random.seed))$value, state)
    note_processes(cl)
  }
  RNGkind("default", "default", "default")
  # TRUE takes one number of the session's.
  set.seed(9)
  first <- clusterLapply(cl, 1:5, draws, .seed = TRUE)
  after <- .Random.seed
  second <- clusterLapply(cl, 1:5, draws, .seed = TRUE)
  set.seed(9)
  expect_identical(clusterLapply(cl, 1:5, draws, .seed = TRUE), first)
  expect_identical(.Random.seed, after)
  expect_false(identical(first, second))
  # A session without any has none afterwards, and workers neither.
  rm(".Random.seed", envir = globalenv())
  fresh <- local_cluster(1)
  clusterLapply(fresh, 1:5, draws, .seed = 1)
  clusterLapply(fresh, list(new.env()), local(function(e) stats::runif(1)), .seed = 1)
  expect_false(exists(".Random.seed", globalenv(), inherits = FALSE))
  expect_identical(clusterCall(fresh, exists, ".Random.seed", envir = globalenv()), list(FALSE))
})

test_that(".timeout: only elements that exceed it are ended", {
  cl <- local_cluster(2)
  pids <- clusterPids(cl)
  late <- global(function(i, bad, how) {
    if (i %in% bad) {
      repeat switch(how, R = sum(1:10), sleep = Sys.sleep(60), deaf = {
        tryCatch(Sys.sleep(60), interrupt = function(e) NULL)
      })
    }
    i
  })
  for (how in c("R", "sleep", "deaf")) {
    # Those that come after one that does not heed the interrupt have their time, too.
    suppressWarnings(
      got <- clusterLapply(cl, 1:60, late, c(7, 8, 41), how, .timeout = 0.4, .errors = "return"),
      classes = "rustcluster_worker_replaced"
    )
    expect_identical(got[-c(7, 8, 41)], as.list((1:60)[-c(7, 8, 41)]), info = how)
    for (i in c(7L, 8L, 41L)) {
      expect_s3_class(got[[i]], "try-error")
      condition <- attr(got[[i]], "condition")
      expect_rust_error(condition, "timeout")
      expect_identical(condition$index, i)
      expect_match(conditionMessage(condition), "exceeded its time limit of 0.4 s (`.timeout`)", fixed = TRUE)
    }
    if (how != "deaf") expect_identical(clusterPids(cl), pids)
  }
  suppressWarnings(
    error <- caught(clusterLapply(cl, 1:9, late, 4, "sleep", .timeout = 0.4)), classes = "rustcluster_worker_replaced"
  )
  expect_rust_error(error, "timeout")
  expect_identical(error$index, 4L)
  expect_identical(error$results, replace(as.list(1:9), 4, list(NULL)))
  # A worker that is lost is restored, which is not the element's time.
  suppressWarnings(clusterEvalQ(cl, Sys.sleep(0.6)), classes = "rustcluster_worker_replaced")
  mortal <- global(function(i, spring, trap) {
    if (i == 3) spring(trap)
    i
  })
  got <- with_losses(clusterLapply(cl, 1:9, mortal, spring, trap(), .timeout = 0.5))
  expect_identical(got$value, as.list(1:9))
  expect_length(got$losses, 1)
  expect_gone(setdiff(pids, clusterPids(cl)))
  note_processes(cl)
})

test_that(".timeout: the time of an interrupted call does not count", {
  cl <- local_cluster(1)
  mark <- tempfile()
  system(sprintf("(while [ ! -e %s ]; do sleep 0.01; done; kill -INT %d) &", mark, Sys.getpid()))
  deaf <- global(function(i, mark) {
    file.create(mark)
    repeat tryCatch(Sys.sleep(60), interrupt = function(e) NULL)
  })
  got <- tryCatch(clusterLapply(cl, 1, deaf, mark), interrupt = function(e) "interrupted")
  expect_identical(got, "interrupted")
  expect_warning(
    expect_identical(clusterLapply(cl, 1:3, square, .timeout = 0.3), squares(3)), class = "rustcluster_worker_replaced"
  )
  note_processes(cl)
})

test_that("nor does an element wait for a worker that does not heed its interrupt while others are free", {
  cl <- local_cluster(2)
  pids <- clusterPids(cl)
  who <- global(function(i) {
    if (i == 1) repeat tryCatch(Sys.sleep(60), interrupt = function(e) NULL)
    Sys.sleep(0.1)
    Sys.getpid()
  })
  got <- clusterLapply(cl, 1:9, who, .timeout = 0.4, .errors = "return")
  expect_rust_error(attr(got[[1]], "condition"), "timeout")
  expect_identical(got[-1], rep(list(pids[[2]]), 8))
  expect_warning(clusterCall(cl, identity, 1), class = "rustcluster_worker_replaced")
  note_processes(cl)
})

test_that("an argument of the verb without its dot is an error that names the right one", {
  cl <- local_cluster(1)
  square <- function(x) x^2
  for (name in c("progress", "seed", "timeout", "retries", "order", "onResult", "onresult", "errors")) {
    error <- caught(do.call(clusterLapply, c(list(cl, 1:2, square), structure(list(1), names = name))))
    expect_rust_error(error, "bad_argument")
    expect_identical(error$argument, name)
    meant <- if (name == "onresult") "onResult" else name
    expect_match(conditionMessage(error), paste0("did you mean `.", meant, "`"), fixed = TRUE)
  }
  expect_match(conditionMessage(caught(clusterLapply(cl, 1:2, square, .timeoutt = 1))), "did you mean `.timeout`?", fixed = TRUE)
  error <- caught(clusterLapplyAsync(cl, 1:2, square, seed = 1))
  expect_match(conditionMessage(error), "did you mean `.seed`, the argument of clusterLapplyAsync()", fixed = TRUE)
  # A function that takes it, by its name, the beginning of its name or in dots, gets it.
  expect_identical(clusterLapply(cl, 1, function(x, timeout) timeout, timeout = 7), list(7))
  expect_identical(clusterLapply(cl, 1, function(x, seeds) seeds, seed = 7), list(7))
  expect_identical(clusterLapply(cl, 1, function(x, ...) list(...), timeout = 7), list(list(timeout = 7)))
  expect_no_warning(expect_identical(clusterLapply(cl, list(1:3), `[`, seed = 2), lapply(list(1:3), `[`, seed = 2)))
  # An argument that belongs to neither has R's own error.
  expect_match(conditionMessage(caught(clusterLapply(cl, 1, square, other = 1))), "unused argument")
})

test_that("the shorter of `.timeout` and the cluster's counts", {
  cl <- local_cluster(1, timeout = 0.3)
  error <- caught(clusterLapply(cl, c(0, 60), Sys.sleep, .timeout = 50))
  expect_rust_error(error, "timeout")
  expect_match(conditionMessage(error), "element 2 exceeded its time limit of 0.3 s (`timeout` of the cluster)", fixed = TRUE)
  error <- caught(clusterLapply(cl, c(0, 60), Sys.sleep, .timeout = 0.1))
  expect_match(conditionMessage(error), "element 2 exceeded its time limit of 0.1 s (`.timeout`)", fixed = TRUE)
  note_processes(cl)
})

test_that(".retries", {
  cl <- local_cluster(2)
  for (retries in c(0, 1, 3)) {
    got <- with_losses(caught(clusterLapply(cl, 1:400, poison, 222, .retries = retries)))
    if (retries == 0) {
      expect_rust_error(got$value, "worker_lost")
      expect_true(222L %in% got$value$tasks)
    }
    if (retries > 0) {
      expect_rust_error(got$value, "task_failed")
      expect_identical(got$value$index, 222L)
      expect_length(got$value$losses, retries + 1)
      expect_length(got$losses, retries)
      expect_identical(got$value$results, replace(as.list(1:400 * 10), 222, list(NULL)))
    }
    expect_identical(clusterLapply(cl, 1:9, square), squares(9))
  }
  note_processes(cl)
})

test_that(".order and .onResult: each element once, in that order with one worker", {
  cl <- local_cluster(3)
  x <- stats::setNames(1:500, paste0("n", 1:500))
  order <- sample(500)
  for (part in list(1:3, 1)) {
    seen <- integer()
    values <- list()
    got <- clusterLapply(cl[part], x, square, .order = order, .onResult = function(i, value) {
      seen <<- c(seen, i)
      values <<- c(values, list(value))
    })
    expect_identical(got, lapply(x, square))
    expect_identical(sort(seen), 1:500)
    expect_identical(values, unname(got)[seen])
    if (length(part) == 1L) expect_identical(seen, order)
  }
  # NULL is a result, an error is one too if it is asked for, and what comes after a loss.
  seen <- integer()
  kinds <- character()
  got <- with_losses(clusterLapply(cl, 1:300, global(function(i, poison) {
    if (i == 5) stop("five")
    if (i %% 2) NULL else poison(i, 100)
  }), poison, .errors = "return", .onResult = function(i, value) {
    seen <<- c(seen, i)
    kinds[[i]] <<- class(value)[[1L]]
  }))$value
  expect_identical(sort(seen), 1:300)
  expect_identical(which(!kinds %in% c("NULL", "numeric")), c(5L, 100L))
  expect_identical(as.vector(got[[5]]), "five")
  # As soon as it is known: the last one waits for what is done here.
  mark <- tempfile()
  wait <- global(function(i, mark) {
    if (i == 2) while (!file.exists(mark)) Sys.sleep(0.01)
    i
  })
  got <- clusterLapply(cl, 1:3, wait, mark, .onResult = function(i, value) if (i == 1) file.create(mark))
  expect_identical(got, list(1L, 2L, 3L))
  note_processes(cl)
})

test_that(".onResult may raise errors, use the cluster and stop it", {
  cl <- local_cluster(2)
  expect_error(clusterLapply(cl, 1:300, square, .onResult = function(i, value) if (i == 50) stop("mine")), "mine")
  expect_identical(clusterLapply(cl, 1:300, square), squares(300))
  got <- withRestarts(
    clusterLapply(cl, 1:300, square, .onResult = function(i, value) if (i == 50) invokeRestart("out", "jumped")),
    out = identity
  )
  expect_identical(got, "jumped")
  inner <- list()
  got <- clusterLapply(cl, 1:300, square, .onResult = function(i, value) {
    if (i == 50) {
      inner <<- list(
        caught(rustcluster::clusterCall(cl, identity, 1)), caught(parallel::parLapply(cl, 1:2, identity)),
        caught(clusterLapply(cl, 1:2, identity)), caught(clusterExport(cl, "inner", environment()))
      )
    }
  })
  for (error in inner) expect_rust_error(error, "busy")
  expect_identical(got, squares(300))
  expect_identical(rustcluster::clusterCall(cl, identity, 1), list(1, 1))
  # Of results that are here already, nothing is lost with the cluster.
  pids <- clusterPids(cl)
  slow <- global(function(i) {
    Sys.sleep(0.05)
    i
  })
  expect_rust_error(
    caught(clusterLapply(cl, 1:50, slow, .onResult = function(i, value) if (i == 5) stopCluster(cl))), "stopped"
  )
  expect_gone(pids)
  cl <- local_cluster(2)
  pids <- clusterPids(cl)
  expect_rust_error(
    caught(clusterLapply(cl, 1:50, slow, .onResult = function(i, value) if (i == 5) stopCluster(cl[1]))), "stopped"
  )
  expect_gone(pids[[1]])
  expect_identical(clusterLapply(cl[2], 1:9, square), squares(9))
})

test_that(".onResult gets an error only with .errors = \"return\"", {
  cl <- local_cluster(2)
  fails <- global(function(i) if (i == 2) stop("the error") else i)
  for (errors in c("finish", "stop", "return")) {
    got <- list()
    note <- function(i, value) got[[as.character(i)]] <<- value
    result <- caught(clusterLapply(cl, 1:4, fails, .errors = errors, .onResult = note))
    if (errors == "return") {
      expect_null(result)
      expect_s3_class(got[["2"]], "try-error")
      expect_length(got, 4)
    } else {
      expect_match(conditionMessage(result), "element 2 failed: the error", fixed = TRUE)
      expect_identical(unlist(got), unlist(sapply(names(got), as.integer)))
      expect_null(got[["2"]])
    }
  }
})

test_that(".errors", {
  cl <- local_cluster(2)
  begun <- tempfile()
  dir.create(begun)
  work <- global(function(i, begun, bad) {
    file.create(file.path(begun, i))
    if (i %in% bad) stop("at ", i)
    Sys.sleep(0.02)
    i
  })
  error <- caught(clusterLapply(cl, 1:40, work, begun, c(3, 9)))
  expect_rust_error(error, "element_failed")
  expect_match(conditionMessage(error), "element 3 failed: at 3\n(and 1 other)", fixed = TRUE)
  expect_identical(error$indices, c(3L, 9L))
  expect_identical(error$results[-c(3, 9)], as.list(1:40)[-c(3, 9)])
  expect_length(list.files(begun), 40)
  unlink(file.path(begun, list.files(begun)))
  error <- caught(clusterLapply(cl, 1:400, work, begun, 3, .errors = "stop"))
  expect_match(conditionMessage(error), "element 3 failed: at 3", fixed = TRUE)
  expect_lt(length(list.files(begun)), 100)
  got <- clusterLapply(cl, stats::setNames(1:40, 41:80), work, begun, c(3, 9), .errors = "return")
  expect_named(got, as.character(41:80))
  expect_identical(unname(got[-c(3, 9)]), as.list((1:40)[-c(3, 9)]))
  for (i in c(3, 9)) {
    expect_s3_class(got[[i]], "try-error")
    expect_identical(as.character(got[[i]]), paste("at", i))
    expect_identical(attr(got[[i]], "condition"), simpleError(paste("at", i)))
  }
  # With the condition as it was raised, if it is not a large one.
  raise <- global(function(i) stop(structure(class = c("mine", "error", "condition"), list(
    message = "m", call = quote(f(x)), data = raw(10^i)
  ))))
  got <- clusterLapply(cl, c(1, 6), raise, .errors = "return")
  expect_identical(attr(got[[1]], "condition"), caught(raise(1)))
  expect_identical(attr(got[[2]], "condition"), simpleError("m"))
  expect_identical(caught(clusterLapply(cl, 1, raise))$parent, caught(raise(1)))
  # One that is lost, or late, is an error like others.
  suppressWarnings(classes = "rustcluster_worker_lost", {
    expect_rust_error(caught(clusterLapply(cl, 1:400, poison, 30, .errors = "stop")), "task_failed")
    got <- clusterLapply(cl, 1:400, poison, 30, .errors = "return")
  })
  expect_identical(got[-30], as.list((1:400)[-30] * 10))
  expect_rust_error(attr(got[[30]], "condition"), "task_failed")
  expect_match(as.character(got[[30]]), "element 30 failed", fixed = TRUE)
  # One that is not to be tried again fails alone, if others are to go on.
  suppressWarnings(classes = "rustcluster_worker_lost", {
    got <- clusterLapply(cl, 1:400, poison, 30, .errors = "return", .retries = 0)
  })
  expect_identical(got[-30], as.list((1:400)[-30] * 10))
  expect_match(as.character(got[[30]]), "element 30 failed: the worker died on the only attempt", fixed = TRUE)
  # Nor does a bar that is full by then end the call.
  fates <- list(
    global(function(i) if (i == 2) quit(status = 9) else i), global(function(i) if (i == 2) Sys.sleep(60) else i)
  )
  for (fate in fates) {
    suppressWarnings(classes = "rustcluster_worker_lost", suppressMessages(
      got <- clusterLapply(cl, 1:2, fate, .errors = "return", .retries = 0, .timeout = 1, .progress = TRUE)
    ))
    expect_identical(got[[1]], 1L)
    expect_s3_class(got[[2]], "rustcluster_failure")
  }
  expect_rust_error(
    error <- caught(clusterLapply(cl, c(0, 60, 0), Sys.sleep, .timeout = 0.3, .errors = "stop")), "timeout"
  )
  expect_match(conditionMessage(error), "element 2 exceeded its time limit of 0.3 s", fixed = TRUE)
  got <- with_losses(caught(clusterLapply(cl, 1:2, poison, 2, .retries = 0)))
  expect_match(conditionMessage(got$value), "SIGKILL")
  got <- with_losses(clusterLapply(cl, 1:2, poison, 2, .retries = 0, .errors = "return"))
  expect_length(got$losses, 0)
  expect_identical(clusterLapply(cl, 1:9, square), squares(9))
  note_processes(cl)
})

test_that("values of the classes of failures are values", {
  cl <- local_cluster(2)
  classes <- list(
    c("snow-try-error", "try-error"), "rustcluster_failure", c("rustcluster_failure", "snow-try-error", "try-error"),
    "rustcluster_rust_failure"
  )
  for (nodes in list(cl, c(cl, local_cluster(1)))) {
    for (class in classes) {
      value <- structure("boo", class = class)
      seen <- integer()
      got <- clusterLapply(nodes, 1:6, function(i, value) if (i == 1) value else i, value, .errors = "stop",
                           .onResult = function(i, result) seen <<- c(seen, i))
      expect_identical(got, c(list(value), as.list(2:6)))
      expect_setequal(seen, 1:6)
    }
  }
})

test_that("no process is left", {
  stop_cluster_pairs()
  expect_no_leftovers()
})
