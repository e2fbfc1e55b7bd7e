# Futures on our clusters; multisession is the oracle.

watch_processes()
skip_if_not_installed("future")

local_plan <- function(..., .frame = parent.frame()) {
  old <- future::plan(...)
  do.call("on.exit", list(bquote(future::plan(.(old))), add = TRUE, after = FALSE), envir = .frame)
}

# The same on multisession and on ours.
expect_same_future <- function(fun) {
  future::plan(future::multisession, workers = 2)
  want <- outcome(quote(fun()), NULL, list(fun = fun))
  cl <- note_processes(makeRustCluster(2))
  on.exit({
    future::plan(future::sequential)
    stop_quietly(cl)
  }, add = TRUE, after = FALSE)
  future::plan(cluster_rust, workers = cl)
  got <- outcome(quote(fun()), NULL, list(fun = fun))
  expect_identical(got, want)
  invisible(got$result)
}

test_that("values, errors, output and conditions are those of multisession", {
  y <- 5
  expect_same_future(function() {
    add <- function(x) x + y
    fs <- lapply(1:5, function(i) future::future(add(i)))
    future::value(fs)
  })
  expect_same_future(function() future::value(future::future({
    cat("out\n")
    message("told")
    warning("warned")
    3
  })))
  expect_same_future(function() tryCatch(
    future::value(future::future(stop("100%s wrong"))), error = function(e) list(class(e), conditionMessage(e))
  ))
  # The call that an error shows.
  for (expr in expression(stop("no"), {x <- 1; stop("no")}, log("a"), (function() stop("no"))(), nosuch + 1)) {
    expect_same_future(function() {
      error <- tryCatch(future::value(future::future(expr, substitute = FALSE)), error = identity)
      deparse(conditionCall(error))[[1L]]
    })
  }
  expect_same_future(function() {
    set.seed(1)
    future::value(lapply(1:3, function(i) future::future(rnorm(2), seed = TRUE)))
  })
  expect_same_future(function() future::value(future::future(toTitleCase("a b"), packages = "tools")))
  expect_same_future(function() future::value(future::future(class(future::plan())[1:2])))
  # The message has the worker's pid in it.
  kind <- expect_same_future(function() tryCatch(
    future::value(future::future(1, packages = "notThere")), error = function(e) class(e)
  ))
  expect_true("error" %in% kind$value)
})

test_that("conditions are recorded and muffled on the worker as by future's cluster backend", {
  noted <- function(text, ...) structure(class = c(..., "condition"), list(message = text, call = NULL))
  signal <- function(cond) {
    if (inherits(cond, "message")) message(cond) else if (inherits(cond, "warning")) warning(cond) else signalCondition(cond)
  }
  cases <- list(
    # Nothing of what is recorded is seen by anybody else there, such as by `warn`.
    warn = function() future::value(future::future({
      options(warn = 2)
      as.integer("a")
      1
    })),
    kinds = function() lapply(
      list(
        NULL, character(), "message", "warning", structure("condition", exclude = "message"),
        structure("condition", exclude = "warning")
      ),
      function(conditions) tryCatch(future::value(future::future({
        message("told")
        warning("warned")
        1
      }, conditions = conditions)), error = conditionMessage)
    ),
    muffled = function() future::value(future::future(withRestarts({
      signal(noted("own", "own"))
      "not muffled"
    }, muffleOwn = function() "muffled"))),
    # What is relayed at once is relayed once, and ends nothing there.
    now = function() lapply(list("message", "warning", NULL), function(class) future::value(future::future({
      signal(noted("now\n", "immediateCondition", class))
      warning("later")
      2
    }))),
    wrong = function() future::value(future::future({
      signal(noted("now", "immediateCondition"))
      stop("wrong")
    })),
    twice = function() {
      f <- future::future({
        signal(noted("now", "immediateCondition"))
        warning("warned")
        3
      })
      list(future::value(f), future::value(f))
    },
    off = function() {
      old <- options(future.psock.relay.immediate = FALSE)
      on.exit(options(old), add = TRUE, after = FALSE)
      future::value(future::future({
        signal(noted("now", "immediateCondition"))
        4
      }))
    }
  )
  if (requireNamespace("lifecycle", quietly = TRUE)) {
    # By its name it would have to be in Suggests.
    deprecate <- getExportedValue("lifecycle", "deprecate_warn")
    cases$deprecated <- function() future::value(future::future({
      deprecate("1.0.0", "old()", always = TRUE)
      5
    }))
  }
  all <- function() lapply(cases, function(case) {
    seen <- outcome(quote(case()), NULL, list(case = case))
    # Before 1.40 this has in it how conditions are relayed.
    seen$result$call <- NULL
    seen
  })
  on.exit(future::plan(future::sequential), add = TRUE, after = FALSE)
  future::plan(future::cluster, workers = 2)
  want <- all()
  future::plan(cluster_rust, workers = local_cluster(2))
  got <- all()
  for (name in names(cases)) expect_identical(got[[name]], want[[name]], info = name)
  # From 1.40 on, future lets `warn` turn warnings into errors.
  if (utils::packageVersion("future") < "1.40") expect_identical(got$warn$result$value, 1)
  expect_length(got$deprecated$warnings, if (is.null(cases$deprecated)) 0L else 1L)
  # An error cannot be relayed and gone on from.
  error <- caught(future::value(future::future(stop(noted("now", "own", "immediateCondition", "error")))))
  expect_s3_class(error, "FutureError")
  expect_s3_class(error$parent, "own")
})

test_that("messages of futures are not output of their workers", {
  child <- start_child({
    cl <- makeRustCluster(1, outfile = "")
    future::plan(cluster_rust, workers = cl)
    future::value(future::future({
      message("told by the future")
      cat("printed by the future\n")
      system("echo printed by the worker")
      1
    }))
    parallel::stopCluster(cl)
  })
  expect_child_ends_well(child)
  out <- unlist(lapply(file.path(child$dir, c("out", "err")), readLines))
  expect_length(grep("told by the future", out), 1L)
  expect_length(grep("printed by the future", out), 1L)
  expect_length(grep("printed by the worker", out), 1L)
})

test_that("creating waits only when all workers are busy, and resolved() never", {
  cl <- local_cluster(2)
  local_plan(cluster_rust, workers = cl)
  expect_equal(future::nbrOfWorkers(), 2L)
  expect_equal(future::nbrOfFreeWorkers(), 2L)
  flag <- tempfile()
  fs <- lapply(1:2, function(i) future::future({
    while (!file.exists(flag)) Sys.sleep(0.01)
    i
  }))
  expect_equal(future::nbrOfFreeWorkers(), 0L)
  expect_false(any(future::resolved(fs)))
  file.create(flag)
  third <- future::future("third")
  expect_equal(future::value(third), "third")
  expect_equal(future::value(fs), list(1L, 2L))
  expect_true(all(future::resolved(fs)))
  expect_equal(future::nbrOfFreeWorkers(), 2L)
  # Nothing is left, and what was exported stays.
  clusterExport(cl, "flag", environment())
  leftover <- 1
  future::value(future::future(leftover))
  expect_equal(unlist(clusterCall(cl, exists, "leftover")), c(FALSE, FALSE))
  expect_equal(unlist(clusterCall(cl, exists, "flag")), c(TRUE, TRUE))
})

test_that("resolved() starts a lazy future when a worker is free, and never waits", {
  cl <- local_cluster(1)
  local_plan(cluster_rust, workers = cl)
  flag <- tempfile()
  busy <- future::future(while (!file.exists(flag)) Sys.sleep(0.01))
  lazy <- lapply(1:2, function(i) future::future(i, lazy = TRUE))
  expect_false(any(future::resolved(lazy)))
  expect_false(any(future::resolved(lazy)))
  expect_equal(vapply(lazy, function(f) f$state, ""), c("created", "created"))
  file.create(flag)
  expect_true(wait_until(function() all(future::resolved(lazy))))
  expect_equal(future::value(lazy), list(1L, 2L))
  expect_null(future::value(busy))
  # Those that have ended are found so by whoever needs a worker.
  lazy <- future::future(3, lazy = TRUE)
  future::resolved(lazy)
  expect_equal(future::value(future::future(4)), 4)
  expect_equal(lazy$state, "finished")
})

test_that("option future.wait.timeout limits the waiting for a worker", {
  cl <- local_cluster(1)
  old <- options(future.wait.timeout = 0.2)
  on.exit(options(old), add = TRUE, after = FALSE)
  local_plan(cluster_rust, workers = cl)
  flag <- tempfile()
  busy <- future::future(while (!file.exists(flag)) Sys.sleep(0.01))
  error <- caught(future::future(1))
  expect_s3_class(error, "FutureError")
  expect_match(conditionMessage(error), "TIMEOUT: All 1 cluster nodes are still occupied after 0[.][0-9]+ secs")
  file.create(flag)
  expect_null(future::value(busy))
})

test_that("only the session that made a future may read its value", {
  cl <- local_cluster(1)
  local_plan(cluster_rust, workers = cl)
  flag <- tempfile()
  f <- future::future(while (!file.exists(flag)) Sys.sleep(0.01))
  file <- tempfile()
  on.exit(unlink(file), add = TRUE, after = FALSE)
  saveRDS(f, file)
  child <- start_child({
    f <- readRDS(file)
    say(class(tryCatch(future::value(f), error = identity))[[1L]])
    say(class(tryCatch(future::resolved(f), error = identity))[[1L]])
  }, list(file = file))
  expect_child_ends_well(child)
  expect_equal(child_lines(child), c("FutureError", "FutureError"))
  file.create(flag)
  expect_null(future::value(f))
  # A value that is there may be had anywhere.
  g <- future::future(5)
  expect_equal(future::value(g), 5)
  expect_equal(future::value(future::future(future::value(g))), 5)
})

test_that("immediate conditions are relayed while the future runs", {
  cl <- local_cluster(1)
  local_plan(cluster_rust, workers = cl)
  flag <- tempfile()
  seen <- 0
  withCallingHandlers({
    f <- future::future({
      withRestarts(
        signalCondition(structure(class = c("note", "immediateCondition", "condition"), list(message = "now", call = NULL))),
        muffleNote = function() NULL
      )
      while (!file.exists(flag)) Sys.sleep(0.01)
      "done"
    })
    expect_true(wait_until(function() {
      future::resolved(f)
      seen > 0
    }))
    expect_false(future::resolved(f))
    file.create(flag)
    expect_equal(future::value(f), "done")
  }, note = function(c) seen <<- seen + 1)
  expect_equal(seen, 1)
})

test_that("progressr's bars are updated while futures run", {
  skip_if_not_installed("progressr")
  cl <- local_cluster(2)
  local_plan(cluster_rust, workers = cl)
  steps <- 0
  flag <- tempfile()
  counting <- function(...) {
    progressr::make_progression_handler("counting", reporter = list(
      update = function(config, state, progression, ...) steps <<- max(steps, state$step)
    ), intrusiveness = 0, enable = TRUE, ...)
  }
  early <- value <- NULL
  progressr::with_progress({
    p <- progressr::progressor(6)
    f <- future::future({
      for (i in 1:3) p()
      while (!file.exists(flag)) Sys.sleep(0.01)
      for (i in 1:3) p()
      "done"
    })
    early <- wait_until(function() {
      future::resolved(f)
      steps >= 3
    })
    file.create(flag)
    value <- future::value(f)
  }, handlers = counting(), enable = TRUE, interval = 0, delay_stdout = FALSE)
  expect_true(early)
  expect_equal(value, "done")
  expect_gte(steps, 5)
})

test_that("a future whose worker failed is an error with the reason", {
  cl <- local_cluster(1, retries = 0)
  local_plan(cluster_rust, workers = cl)
  f <- future::future(tools::pskill(Sys.getpid(), 9))
  error <- suppressWarnings(caught(future::value(f)))
  expect_s3_class(error, "FutureError")
  expect_match(conditionMessage(error), "pid [0-9]+\\) was killed by signal 9 \\(SIGKILL\\)")
  expect_rust_error(error$parent, "worker_lost")
  expect_equal(future::value(future::future(1)), 1)
})

test_that("a plan may create its own cluster", {
  local_plan(cluster_rust, workers = 2)
  expect_equal(future::nbrOfWorkers(), 2L)
  pids <- future::value(lapply(1:2, function(i) future::future(Sys.getpid())))
  note_pids(unlist(pids))
  future::plan(future::sequential)
  expect_gone(unlist(pids))
})

test_that("a plan that created its own cluster can be restored", {
  on.exit(future::plan(future::sequential), add = TRUE, after = FALSE)
  answer <- function() future::value(future::future(42))
  future::plan(cluster_rust, workers = 2)
  old <- future::plan(future::sequential)
  for (i in 1:2) {
    future::plan(old)
    expect_equal(c(future::nbrOfWorkers(), future::nbrOfFreeWorkers()), c(2, 2))
    expect_equal(answer(), 42)
    old <- future::plan(future::sequential)
  }
  # As in a workspace that is restored.
  file <- tempfile()
  saveRDS(old, file)
  child <- start_child({
    future::plan(readRDS(file))
    say(future::value(future::future(43)))
    future::plan(future::sequential)
  }, list(file = file))
  expect_child_ends_well(child)
  unlink(file)
  expect_equal(child_lines(child), "43")
  # Beside others, one of which has a cluster of its own, too.
  future::plan(old)
  other <- future::plan(cluster_rust, workers = 1)
  expect_equal(c(future::nbrOfWorkers(), answer()), c(1, 42))
  other <- future::plan(other)
  expect_equal(c(future::nbrOfWorkers(), answer()), c(2, 42))
  future::plan(other)
  expect_equal(c(future::nbrOfWorkers(), answer()), c(1, 42))
  # To look at one that was set aside makes no cluster, and stops none.
  pid <- future::value(future::future(Sys.getpid()))
  capture.output(print(old))
  expect_equal(future::nbrOfWorkers(old[[1L]]), 2)
  expect_equal(future::value(future::future(Sys.getpid())), pid)
  future::plan("reset")
  expect_gone(pid)
  future::plan(old)
  lazy <- future::future(7, lazy = TRUE)
  old <- future::plan(future::sequential)
  future::plan(old)
  expect_equal(future::value(lazy), 7)
})

test_that("plans may be temporary", {
  skip_if_not(any(startsWith(utils::methods(class = "FutureStrategyList"), "with.")), "future has no with() for plans")
  on.exit(future::plan(future::sequential), add = TRUE, after = FALSE)
  answer <- function() c(future::nbrOfWorkers(), future::value(future::future(42)))
  future::plan(cluster_rust, workers = 2)
  expect_equal(with(future::plan(future::sequential), answer()), c(1, 42))
  expect_equal(answer(), c(2, 42))
  expect_equal(with(future::plan(cluster_rust, workers = 1), answer()), c(1, 42))
  expect_equal(answer(), c(2, 42))
  inside <- function() {
    with(future::plan(cluster_rust, workers = 1), local = TRUE)
    answer()
  }
  expect_equal(inside(), c(1, 42))
  expect_equal(answer(), c(2, 42))
})

test_that("plans may be nested, tweaked and named", {
  on.exit(future::plan(future::sequential), add = TRUE, after = FALSE)
  two <- future::tweak(cluster_rust, workers = 2)
  future::plan(list(two, two))
  nested <- future::future({
    pids <- unlist(future::value(lapply(1:2, function(i) future::future({
      Sys.sleep(0.2)
      Sys.getpid()
    }))))
    c(length(unique(pids)), Sys.getpid() %in% pids, future::nbrOfWorkers())
  })
  expect_equal(future::value(nested), c(2, 0, 2))
  old <- future::plan(future::sequential)
  future::plan(old)
  expect_equal(future::value(future::future(future::value(future::future(9)))), 9)
  future::plan("cluster_rust", workers = 1)
  expect_equal(c(future::nbrOfWorkers(), future::value(future::future(8))), c(1, 8))
  future::plan(future::sequential)
  # As future does itself at its start.
  child <- start_child({
    options(mc.cores = 2)
    say(inherits(future::plan(), "cluster_rust"), future::nbrOfWorkers(), future::value(future::future(5)))
    future::plan(future::sequential)
  }, env = "R_FUTURE_PLAN=rustcluster::cluster_rust")
  expect_child_ends_well(child)
  expect_equal(child_lines(child), "TRUE 2 5")
})

test_that("an invalid `workers` is an error of the plan", {
  on.exit(future::plan(future::sequential), add = TRUE, after = FALSE)
  wrong <- list(structure(list(), class = c("SOCKcluster", "cluster")), "a b", -1, list(1), c(1, 2), numeric(), NA, TRUE,
    structure(list(), class = c("RustCluster", "cluster")))
  for (workers in wrong) {
    error <- caught(future::plan(cluster_rust, workers = workers))
    expect_rust_error(error, "bad_argument")
    expect_identical(error$argument, "workers")
    expect_match(conditionMessage(error), "^`workers` ")
    expect_no_match(conditionMessage(error), "spec", fixed = TRUE)
  }
})

test_that("future.apply and furrr work with cluster_rust", {
  cl <- local_cluster(2)
  local_plan(cluster_rust, workers = cl)
  if (requireNamespace("future.apply", quietly = TRUE)) {
    expect_equal(future.apply::future_lapply(1:7, function(i) i^2), lapply(1:7, function(i) i^2))
    a <- future.apply::future_sapply(1:4, function(i) rnorm(1), future.seed = 42)
    future::plan(future::sequential)
    expect_identical(a, future.apply::future_sapply(1:4, function(i) rnorm(1), future.seed = 42))
    future::plan(cluster_rust, workers = cl)
  }
  if (requireNamespace("furrr", quietly = TRUE)) {
    expect_equal(furrr::future_map_dbl(1:5, function(i) i * 2), 1:5 * 2)
  }
})

test_that("loops of doFuture return the same as with multisession, also after a worker failure", {
  skip_if_not_installed("foreach")
  skip_if_not_installed("doFuture")
  foreach <- foreach::foreach
  `%dopar%` <- foreach::`%dopar%`
  `%:%` <- foreach::`%:%`
  # Called by its name, it would have to be in Suggests, and Debian does not have it.
  getExportedValue("doFuture", "registerDoFuture")()
  on.exit(foreach::registerDoSEQ(), add = TRUE, after = FALSE)
  y <- 5
  expect_same_future(function() {
    add <- function(x) x + y
    foreach(i = 1:7, .combine = c) %dopar% add(i)
  })
  expect_same_future(function() foreach(i = 1:3, .combine = rbind) %:% foreach(j = 1:2, .combine = c) %dopar% (10 * i + j))
  expect_same_future(function() foreach(x = c("a b", "c d"), .packages = "tools") %dopar% toTitleCase(x))
  expect_same_future(function() foreach(i = 1:4) %dopar% {
    cat("out", i, "\n")
    warning("warned ", i)
    if (i == 3) stop("wrong")
    i
  })
  expect_same_future(function() foreach(i = 1:4, .combine = c, .errorhandling = "remove") %dopar% {
    if (i == 3) stop("wrong")
    i
  })
  if (requireNamespace("doRNG", quietly = TRUE)) {
    `%dorng%` <- doRNG::`%dorng%`
    expect_same_future(function() {
      RNGkind("default", "default", "default")
      foreach(i = 1:4, .options.RNG = 1) %dorng% stats::runif(2)
    })
  }
  cl <- local_cluster(2)
  local_plan(cluster_rust, workers = cl)
  flag <- tempfile()
  expect_warning(
    squares <- foreach(i = 1:6, .combine = c) %dopar% {
      if (i == 5 && dir.create(flag, showWarnings = FALSE)) tools::pskill(Sys.getpid(), 9)
      i^2
    },
    "killed by signal 9 \\(SIGKILL\\); it is being replaced, and the call is retried"
  )
  expect_equal(squares, (1:6)^2)
})

test_that("future's own cluster plan works with all or some nodes of a cluster", {
  cl <- local_cluster(3)
  pids <- unlist(clusterCall(cl, Sys.getpid))
  old <- future::plan()
  on.exit(future::plan(old), add = TRUE, after = FALSE)
  for (nodes in list(1:3, 1:2, 3L, 2:1)) {
    future::plan(future::cluster, workers = cl[nodes])
    expect_equal(future::nbrOfWorkers(), length(nodes))
    fs <- lapply(1:5, function(i) future::future(list(i^2, Sys.getpid())))
    expect_silent(values <- future::value(fs))
    expect_equal(lapply(values, `[[`, 1), as.list((1:5)^2))
    expect_setequal(vapply(values, `[[`, 0L, 2), pids[nodes])
    expect_equal(future::nbrOfFreeWorkers(), length(nodes))
  }
  # What future has made of it leaves the cluster itself as it was.
  expect_equal(unlist(clusterCall(cl, Sys.getpid)), pids)
})

test_that("resolved() of future's own cluster plan neither waits nor warns", {
  cl <- local_cluster(2)
  before <- nrow(showConnections())
  local_plan(future::cluster, workers = cl)
  marks <- tempfile("mark")
  on.exit(unlink(marks), add = TRUE, after = FALSE)
  wait <- function() while (!file.exists(marks)) Sys.sleep(0.01)
  held <- future::future(wait())
  other <- future::future("there")
  resolved <- function(f) {
    deadline <- Sys.time() + 30
    while (!future::resolved(f) && Sys.time() < deadline) {}
    future::resolved(f)
  }
  expect_silent({
    expect_true(resolved(other))
    expect_false(future::resolved(held))
  })
  # One connection for all nodes, and a new one if that has been closed.
  expect_identical(nrow(showConnections()), before + 1L)
  for (row in rownames(showConnections())) {
    connection <- getConnection(as.integer(row))
    if (grepl("^->127.0.0.1:", summary(connection)$description)) close(connection)
  }
  expect_false(future::resolved(held))
  file.create(marks)
  expect_true(resolved(held))
  expect_identical(future::value(other), "there")
  # A result beyond `buffer_limit`, and one whose worker has failed.
  small <- local_cluster(1, buffer_limit = 2^20, retries = 0)
  local_plan(future::cluster, workers = small)
  large <- future::future(numeric(1e6))
  expect_true(resolved(large))
  expect_length(future::value(large), 1e6)
  lost <- future::future(tools::pskill(Sys.getpid(), 9))
  # Later versions raise the error in value() alone.
  expect_s3_class(suppressWarnings(caught(if (resolved(lost)) future::value(lost))), "FutureError")
  expect_equal(future::value(future::future(6 * 7)), 42)
  parallel::stopCluster(small)
  parallel::stopCluster(cl)
  expect_identical(nrow(showConnections()), before)
})

test_that("an interrupt at the end of a future leaves resolved() of future's own cluster plan right", {
  cl <- local_cluster(1, retries = 1)
  local_plan(future::cluster, workers = cl)
  for (k in 1:5) {
    f <- future::future(k)
    while (!future::resolved(f)) {}
    f <- future::future(k)
    Sys.sleep(0.2)
    tryCatch(
      {
        suspendInterrupts({
          tools::pskill(Sys.getpid(), tools::SIGINT)
          future::value(f)
        })
        Sys.sleep(1)
      },
      interrupt = function(e) NULL
    )
    expect_identical(future::value(f), k)
  }
  # A lost future is retried without making resolved() wait for it.
  marks <- tempfile("mark")
  on.exit(unlink(marks), add = TRUE, after = FALSE)
  f <- future::future({
    while (!file.exists(marks)) Sys.sleep(0.01)
    7
  })
  expect_false(future::resolved(f))
  before <- clusterPids(cl)
  tools::pskill(before, tools::SIGKILL)
  expect_true(wait_until(function() !anyNA(clusterPids(cl)) && !identical(clusterPids(cl), before)))
  expect_false(future::resolved(f))
  file.create(marks)
  deadline <- Sys.time() + 30
  while (!suppressWarnings(future::resolved(f)) && Sys.time() < deadline) {}
  expect_identical(suppressWarnings(future::value(f)), 7)
})

test_that("the error of a future that a verb on its node has cancelled says why", {
  cl <- local_cluster(1)
  local_plan(future::cluster, workers = cl)
  f <- future::future(Sys.sleep(60))
  expect_identical(clusterCall(cl, identity, 1), list(1))
  error <- caught(future::value(f))
  expect_s3_class(error, "FutureError")
  # Later versions of future replace the text by their own.
  if (!inherits(error, "FutureInterruptError")) {
    expect_match(conditionMessage(error), "a call of a function such as parLapply\\(\\) cancels tasks")
  }
  expect_identical(future::value(future::future(2)), 2)
})

test_that("resolved() of future's own cluster plan waits without a free connection", {
  cl <- local_cluster(1)
  local_plan(future::cluster, workers = cl)
  open <- list()
  on.exit(for (connection in open) close(connection), add = TRUE, after = FALSE)
  repeat {
    connection <- tryCatch(textConnection("x"), error = function(e) NULL)
    if (is.null(connection)) break
    open <- c(open, list(connection))
  }
  for (left in 0:1) {
    if (left) {
      # Future itself needs the last one.
      close(open[[length(open)]])
      open <- open[-length(open)]
    }
    f <- future::future(1, stdout = left == 1)
    suppressWarnings(expect_true(future::resolved(f)))
    expect_identical(future::value(f), 1)
  }
})

test_that("no process is left", {
  future::plan(future::sequential)
  expect_no_leftovers()
})
