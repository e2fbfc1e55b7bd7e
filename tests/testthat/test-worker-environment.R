# What a task finds around it on a worker is what it finds on a PSOCK worker.

skip_on_cran()
watch_processes()

test_that("global environment, search path and loaded packages", {
  expect_same_value(clusterEvalQ(cl, ls(.GlobalEnv, all.names = TRUE)))
  expect_same_value(clusterEvalQ(cl, search()))
  expect_same_value(clusterEvalQ(cl, environmentName(parent.env(globalenv()))))
  # Loaded but not attached is the package itself and what it needs; and tools, which every R
  # process that has parallel loads at its end, and which workers have from their agent.
  pair <- cluster_pair()
  theirs <- clusterEvalQ(pair$psock[1], loadedNamespaces())[[1L]]
  ours <- clusterEvalQ(pair$rust[1], loadedNamespaces())[[1L]]
  expect_setequal(setdiff(ours, c(theirs, "tools")), "rustcluster")
  expect_setequal(setdiff(theirs, ours), character())
})

test_that("options", {
  # Each exception with its reason.
  differ <- c(
    # Set by parallel from MC_CORES, one of the documented thread settings.
    "mc.cores",
    # Documented: loading a package takes its options along.
    grep("^rustcluster", names(options()), value = TRUE)
  )
  pair <- cluster_pair()
  theirs <- clusterCall(pair$psock[1], options)[[1L]]
  ours <- clusterCall(pair$rust[1], options)[[1L]]
  keep <- function(x) x[setdiff(names(x), differ)]
  expect_setequal(names(keep(ours)), names(keep(theirs)))
  for (name in intersect(names(keep(ours)), names(keep(theirs)))) {
    # Functions among the options are equal but for their environments.
    same <- isTRUE(all.equal(ours[[name]], theirs[[name]], check.environment = FALSE))
    expect(same, paste0(
      "option ", name, " is ", paste(deparse(ours[[name]]), collapse = " "),
      ", PSOCK's is ", paste(deparse(theirs[[name]]), collapse = " ")
    ))
  }
})

test_that("the session is not interactive, in the same folder and locale", {
  expect_same_value(clusterCall(cl, interactive))
  expect_same_value(clusterCall(cl, getwd))
  expect_same_value(clusterCall(cl, Sys.getlocale))
  expect_same_value(clusterCall(cl, Sys.timezone))
  expect_same_value(clusterCall(cl, .libPaths))
  expect_same_value(clusterCall(cl, R.home))
  expect_same_value(clusterEvalQ(cl, R.version.string))
  expect_same_value(clusterCall(cl, l10n_info))
  expect_same_value(clusterCall(cl, capabilities, "fifo"))
  expect_same_value(clusterCall(cl, RNGkind))
  expect_same_value(clusterCall(cl, Sys.umask))
  expect_same_value(clusterEvalQ(cl, class(try(stop("a"), silent = TRUE))))
  expect_same_value(clusterEvalQ(cl, getOption("warn")))
  expect_same_value(clusterEvalQ(cl, is.null(grDevices::dev.list())))
})

test_that("the frames above a task are those of PSOCK", {
  # sys.call() and parent.frame() of a task reach the user through error texts.
  expect_same_value(clusterCall(cl, function() deparse(sys.call())))
  expect_same_value(clusterCall(cl, function() environmentName(parent.frame())))
  expect_same_value(clusterCall(cl, function() environmentName(topenv())))
  expect_same_error(clusterCall(cl, function() base::stop("with a call")))
  expect_same_error(clusterCall(cl, function() match.arg("a", "b")))
})

test_that("a task is called as do.call(fun, args, quote = TRUE) calls it", {
  # By name, and what is no closure.
  expect_same_value(clusterCall(cl, "sum", 1, 2))
  expect_same_value(clusterCall(cl, sum, 1, NA, na.rm = TRUE))
  expect_same_value(clusterCall(cl, `if`, TRUE, "yes", "no"))
  expect_same_value(clusterCall(cl, quote, quote(a + b)))
  # Arguments are values: symbols and calls are not evaluated again.
  expect_same_value(clusterCall(cl, class, quote(no_such_variable)))
  expect_same_value(clusterCall(cl, function(x) substitute(x), quote(f(1))))
  expect_same_value(clusterCall(cl, function(...) names(list(...)), a = 1, 2, b = NULL))
  expect_same_value(clusterCall(cl, function(x, y) c(missing(x), missing(y)), y = 1))
  expect_same_value(clusterCall(cl, function(x) deparse(match.call()), 1:3))
  expect_same_value(clusterCall(cl, function(x) deparse(sys.call()), 1:3))
  expect_same_error(clusterCall(cl, 5, 1))
  expect_same_error(clusterCall(cl, "no_such_function"))
  expect_same_error(clusterCall(cl, quote(sum), 1))
})

test_that("assignments of a task in its caller's frame are gone after the task", {
  expect_same_value(clusterCall(cl, assign, "left_behind", 1))
  expect_same_value(clusterCall(cl, exists, "left_behind"))
  expect_same_value(clusterCall(cl, function() identical(parent.frame(), globalenv())))
  expect_same_value(clusterCall(cl, function() environmentName(parent.env(parent.frame()))))
})

test_that("all ways to end a task", {
  expect_same_value(clusterCall(cl, function() invisible(3)))
  expect_same_value(clusterCall(cl, function() callCC(function(k) k("out"))))
  expect_same_value(clusterCall(cl, function() withRestarts(invokeRestart("mine", 4), mine = identity)))
  expect_same_value(clusterCall(cl, function() {
    warning("not an error")
    signalCondition(simpleCondition("neither"))
  }))
  expect_same_error(clusterCall(cl, function() stop(structure(
    list(message = "of a class", call = NULL), class = c("custom", "error", "condition")
  ))))
  expect_same_error(clusterCall(cl, function() {
    f <- function(n) f(n + 1)
    options(expressions = 200)
    on.exit(options(expressions = 5000), add = TRUE, after = FALSE)
    f(1)
  }))
  # An error of this package's in a task is the task's and not the worker's.
  expect_same_error(clusterCall(cl, function() stop(structure(
    list(message = "looks like ours", call = NULL),
    class = c("rustcluster_worker_lost", "rustcluster_error", "error", "condition")
  ))))
  expect_same_value(clusterCall(cl, identity, "the next"))
})

test_that("environment variables", {
  differ <- c(
    # One thread a worker unless asked otherwise: documented.
    "^MC_CORES$", "_NUM_THREADS$", "_THREAD_LIMIT$", "_MAXIMUM_THREADS$",
    # Each R session sets its own.
    "^R_SESSION_TMPDIR$",
    # Ours, documented.
    "^RUSTCLUSTER_",
    # The shell that starts a PSOCK worker leaves these.
    "^_$", "^SHLVL$", "^PWD$", "^OLDPWD$"
  )
  pair <- cluster_pair()
  # c(): without the class, whose print and compare methods get in the way.
  theirs <- unclass(clusterCall(pair$psock[1], Sys.getenv)[[1L]])
  ours <- unclass(clusterCall(pair$rust[1], Sys.getenv)[[1L]])
  keep <- function(x) x[!grepl(paste(differ, collapse = "|"), names(x))]
  theirs <- keep(theirs)
  ours <- keep(ours)
  expect_setequal(names(ours), names(theirs))
  both <- intersect(names(ours), names(theirs))
  expect_equal(ours[both], theirs[both])
})

test_that("a variable set in the head before the start is there, one set after is not", {
  Sys.setenv(RC_TEST_BEFORE = "a b'c\"d")
  on.exit(Sys.unsetenv(c("RC_TEST_BEFORE", "RC_TEST_AFTER")), add = TRUE, after = FALSE)
  cl <- local_cluster(2)
  Sys.setenv(RC_TEST_AFTER = "1")
  expect_equal(clusterCall(cl, Sys.getenv, "RC_TEST_BEFORE"), rep(list("a b'c\"d"), 2))
  expect_equal(clusterCall(cl, Sys.getenv, "RC_TEST_AFTER"), rep(list(""), 2))
})

test_that("no R connection is used, on head or workers", {
  before <- showConnections(all = TRUE)
  cl <- local_cluster(3)
  expect_identical(showConnections(all = TRUE), before)
  counts <- clusterEvalQ(cl, nrow(showConnections(all = TRUE)))
  expect_equal(counts, rep(list(3L), 3))
  expect_equal(clusterEvalQ(cl, sink.number()), rep(list(0L), 3))
  expect_equal(clusterEvalQ(cl, sink.number("message")), rep(list(2L), 3))
  parLapply(cl, 1:10, function(i) numeric(1e5))
  expect_identical(showConnections(all = TRUE), before)
  stopCluster(cl)
  expect_identical(showConnections(all = TRUE), before)
})

test_that("a worker can use connections, sinks, subprocesses and graphics as any R", {
  expect_same_value(clusterCall(cl, function() {
    con <- textConnection("a\nb")
    on.exit(close(con), add = TRUE, after = FALSE)
    readLines(con)
  }))
  expect_same_value(clusterCall(cl, function() utils::capture.output(print(1:3))))
  expect_same_value(clusterCall(cl, function() system("echo out", intern = TRUE)))
  expect_same_value(clusterCall(cl, function() system("exit 3")))
  expect_same_value(clusterCall(cl, function() {
    file <- tempfile(fileext = ".pdf")
    grDevices::pdf(file)
    plot(1:3)
    grDevices::dev.off()
    file.size(file) > 0
  }))
  # Reading standard input gives its end, not the cluster's own bytes.
  expect_same_value(clusterCall(cl, function() readLines(file("stdin"))))
  expect_same_value(clusterCall(cl, function() readline("? ")))
  expect_same_value(clusterCall(cl, function() system("cat", intern = TRUE)))
  # parallel's own fork within a worker, which must not end the worker.
  expect_same_value(clusterCall(cl, function() parallel::mclapply(1:3, sqrt, mc.cores = 2)))
  expect_same_value(clusterCall(cl, function() "still here"))
})

test_that("each worker has a temporary folder of its own, gone at the end", {
  cl <- local_cluster(3)
  dirs <- unlist(clusterCall(cl, tempdir))
  expect_false(anyDuplicated(dirs) > 0L)
  expect_false(tempdir() %in% dirs)
  expect_true(all(dir.exists(dirs)))
  files <- unlist(clusterCall(cl, function() {
    file <- tempfile()
    writeLines("x", file)
    file
  }))
  expect_equal(dirname(files), dirs)
  expect_false(anyDuplicated(basename(files)) > 0L)
  expect_equal(clusterCall(cl, function() dir.exists(Sys.getenv("R_SESSION_TMPDIR"))), rep(list(TRUE), 3))
  expect_equal(unlist(clusterCall(cl, Sys.getenv, "R_SESSION_TMPDIR")), dirs)
  stopCluster(cl)
  expect_true(wait_until(function() !any(dir.exists(dirs)), 1 + slack()))
})

test_that("each worker draws random numbers of its own", {
  cl <- local_cluster(4)
  expect_equal(clusterEvalQ(cl, exists(".Random.seed", .GlobalEnv)), rep(list(FALSE), 4))
  draws <- unlist(clusterCall(cl, stats::runif, 1))
  expect_false(anyDuplicated(draws) > 0L)
  other <- local_cluster(4)
  expect_length(intersect(draws, unlist(clusterCall(other, stats::runif, 1))), 0L)
})

test_that("the head's random numbers are not touched", {
  set.seed(1)
  before <- .Random.seed
  cl <- local_cluster(2)
  clusterCall(cl, stats::rnorm, 1)
  stopCluster(cl)
  expect_identical(.Random.seed, before)
  rm(".Random.seed", envir = globalenv())
  cl <- local_cluster(2)
  clusterCall(cl, stats::rnorm, 1)
  expect_false(exists(".Random.seed", globalenv(), inherits = FALSE))
})

test_that("each worker leads a process group, apart from the head's and the agent's", {
  skip_unless_proc()
  cl <- local_cluster(3)
  groups <- vapply(clusterPids(cl), proc_group, 1L)
  expect_equal(groups, as.integer(clusterPids(cl)))
  agent <- proc_group(agentPids(cl))
  expect_false(agent %in% groups)
  expect_false(agent == proc_group(Sys.getpid()))
  # What a task starts is in the worker's group, and so ends with the worker.
  sleeper <- as.integer(clusterCall(cl[2], function() system("sleep 300 >/dev/null 2>&1 & echo $!", intern = TRUE))[[1L]])
  expect_equal(proc_group(sleeper), groups[[2L]])
  note_pids(sleeper)
  stopCluster(cl)
  expect_gone(sleeper)
})

test_that("threads: one a worker unless asked", {
  names <- c("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MC_CORES")
  expect_equal(
    clusterCall(cluster_pair()$rust[1], function(n) unname(Sys.getenv(n)), names)[[1L]],
    rep("1", 4)
  )
  cl <- local_cluster(2, threads = 2)
  expect_equal(
    clusterCall(cl, function(n) unname(Sys.getenv(n)), names),
    rep(list(rep("2", 4)), 2)
  )
  expect_equal(clusterEvalQ(cl, {
    loadNamespace("parallel")
    getOption("mc.cores")
  }), rep(list(2L), 2))
})

test_that("rscript_envs: set, unset, and kept as they are", {
  Sys.setenv(RC_TEST_KEPT = "kept", RC_TEST_GONE = "x")
  on.exit(Sys.unsetenv(c("RC_TEST_KEPT", "RC_TEST_GONE")), add = TRUE, after = FALSE)
  cl <- local_cluster(2, rscript_envs = c(RC_TEST_SET = "it's \"quoted\" $HOME %d", RC_TEST_GONE = NA))
  got <- clusterCall(cl, function() {
    unname(Sys.getenv(c("RC_TEST_SET", "RC_TEST_KEPT", "RC_TEST_GONE"), unset = "unset"))
  })
  expect_equal(got, rep(list(c("it's \"quoted\" $HOME %d", "kept", "unset")), 2))
  # The head's own environment is not touched.
  expect_equal(Sys.getenv("RC_TEST_SET", "unset"), "unset")
})

test_that("`packages` are attached in every worker before the first task", {
  cl <- local_cluster(2, packages = c("splines", "stats4"))
  expect_equal(
    clusterEvalQ(cl, all(c("package:splines", "package:stats4") %in% search())),
    list(TRUE, TRUE)
  )
  expect_equal(clusterCall(cl, function() dim(bs(1:10, df = 4))), rep(list(c(10L, 4L)), 2))
  # One that is not there stops the start, and is named.
  error <- caught(makeRustCluster(2, packages = "notInstalledAnywhere"))
  expect_s3_class(error, "rustcluster_error")
  expect_match(conditionMessage(error), "notInstalledAnywhere")
})

test_that("methods = FALSE", {
  cl <- local_cluster(1, methods = FALSE)
  psock <- parallel::makePSOCKcluster(1, methods = FALSE)
  on.exit(stopCluster(psock), add = TRUE, after = FALSE)
  expect_identical(clusterEvalQ(cl, search()), clusterEvalQ(psock, search()))
})

test_that("renice", {
  skip_unless_proc()
  own <- proc_nice(Sys.getpid())
  cl <- local_cluster(2, renice = 7)
  expect_equal(vapply(clusterPids(cl), proc_nice, 1L), rep(own + 7L, 2))
  expect_equal(proc_nice(Sys.getpid()), own)
})

test_that("rscript_args reach R", {
  cl <- local_cluster(1, rscript_args = "--max-ppsize=60000")
  psock <- parallel::makePSOCKcluster(1, rscript_args = "--max-ppsize=60000")
  on.exit(stopCluster(psock), add = TRUE, after = FALSE)
  has <- function(cl) clusterEvalQ(cl, any(commandArgs() == "--max-ppsize=60000"))
  expect_equal(has(cl), has(psock))
})

test_that("outfile: the workers' output is appended to a file", {
  file <- tempfile()
  writeLines("was here", file)
  cl <- local_cluster(2, outfile = file)
  # One after the other: what R prints comes in pieces, and those of two may come in turns.
  for (i in 1:2) clusterApply(cl[i], i, function(i) {
    cat("cat from", i, "\n")
    print(paste("print from", i))
    message("message from ", i)
    i
  })
  stopCluster(cl)
  found <- function(pattern) sum(grepl(pattern, readLines(file, warn = FALSE)))
  expect_true(wait_until(function() found("message from") >= 2, 5))
  expect_equal(found("^was here$"), 1)
  expect_equal(found("cat from [12]"), 2)
  expect_equal(found("print from [12]"), 2)
  expect_equal(found("message from [12]"), 2)
})

test_that("outfile: lines of several workers do not interleave, and the last needs no end", {
  file <- tempfile()
  cl <- local_cluster(3, outfile = file)
  parLapply(cl, 1:3, function(i) {
    for (k in 1:200) {
      cat("begin ")
      flush(stdout())
      cat(i, k, "")
      flush(stdout())
      cat("end\n")
    }
    cat("last", i)
  })
  stopCluster(cl)
  lines <- readLines(file, warn = FALSE)
  expect_identical(sum(grepl("^(last [123])*begin [123] [0-9]+ end$", lines)), 600L)
  expect_equal(lengths(regmatches(paste(lines, collapse = ""), gregexpr("last [123]", paste(lines, collapse = "")))), 3)
})

test_that("outfile: a file that cannot be created is an error that names file and host", {
  file <- file.path(tempfile("none"), "out")
  error <- caught(makeRustCluster(2, outfile = file))
  expect_rust_error(error, "start_failed")
  expect_identical(error$host, "localhost")
  expect_match(conditionMessage(error), file, fixed = TRUE)
  expect_match(conditionMessage(error), "`outfile`", fixed = TRUE)
  expect_match(conditionMessage(error), "No such file")
})

test_that("outfile = \"\": the head prints the output of workers", {
  child <- start_child({
    cl <- makeRustCluster(2, outfile = "")
    invisible(clusterApply(cl, 1:2, function(i) {
      cat("cat from", i, "\n")
      message("message from ", i)
    }))
    Sys.sleep(0.3)
    stopCluster(cl)
  })
  expect_child_ends_well(child)
  both <- c(child_read(child, "out"), child_read(child, "err"))
  expect_equal(sum(grepl("cat from [12]", both)), 2)
  expect_equal(sum(grepl("message from [12]", both)), 2)
})

test_that("outfile: by default the workers are silent", {
  child <- start_child({
    cl <- makeRustCluster(2)
    invisible(clusterCall(cl, function() {
      cat("should not be seen\n")
      message("should not be seen")
      system("echo should not be seen; echo should not be seen >&2")
    }))
    stopCluster(cl)
  })
  expect_child_ends_well(child)
  expect_equal(child_read(child, "out"), character())
  expect_equal(child_read(child, "err"), character())
})

test_that("a large output without a reader does not stop a worker", {
  cl <- local_cluster(2)
  got <- clusterCall(cl, function() {
    for (i in 1:3000) cat(strrep("x", 100), "\n")
    system("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2")
    "done"
  })
  expect_equal(got, list("done", "done"))
})

test_that("start_method = \"spawn\": separate R processes, the same answers", {
  skip_unless_proc()
  cl <- local_cluster(2, start_method = "spawn")
  pids <- clusterPids(cl)
  expect_length(unique(pids), 2L)
  expect_equal(unlist(clusterCall(cl, Sys.getpid)), as.integer(pids))
  expect_equal(parLapply(cl, 1:5, function(i) i^2), lapply(1:5, function(i) i^2))
  expect_equal(unlist(clusterApplyLB(cl, 1:50, identity)), 1:50)
  psock <- parallel::makePSOCKcluster(2)
  on.exit(stopCluster(psock), add = TRUE, after = FALSE)
  both <- function(expr) {
    expr <- strip_srcref(substitute(expr))
    expect_identical(eval(expr, list(cl = cl)), eval(expr, list(cl = psock)))
  }
  both(clusterEvalQ(cl, search()))
  both(clusterEvalQ(cl, ls(.GlobalEnv, all.names = TRUE)))
  both(clusterCall(cl, getwd))
  both(clusterCall(cl, interactive))
  both({
    clusterSetRNGStream(cl, 7)
    clusterCall(cl, stats::rnorm, 2)
  })
  expect_length(unique(unlist(clusterCall(cl, tempdir))), 2L)
  expect_equal(vapply(pids, proc_group, 1L), as.integer(pids))
  expect_equal(clusterEvalQ(cl, nrow(showConnections(all = TRUE))), list(3L, 3L))
  error <- caught(clusterCall(cl, function() stop("in spawned")))
  expect_match(conditionMessage(error), "2 nodes produced errors; first error: in spawned", fixed = TRUE)
  agents <- agentPids(cl)
  stopCluster(cl)
  expect_gone(c(pids, agents))
})

test_that("start_method = \"spawn\": packages, variables and threads", {
  cl <- local_cluster(
    2, start_method = "spawn", packages = "splines", threads = 2, rscript_envs = c(RC_TEST_SET = "x y")
  )
  expect_equal(clusterEvalQ(cl, "package:splines" %in% search()), list(TRUE, TRUE))
  expect_equal(clusterCall(cl, Sys.getenv, "RC_TEST_SET"), list("x y", "x y"))
  expect_equal(clusterCall(cl, Sys.getenv, "OMP_NUM_THREADS"), list("2", "2"))
})

test_that("a jump to the top level is the task's error, and its worker goes on", {
  cl <- local_cluster(2, retries = 0)
  pids <- clusterPids(cl)
  custom <- global(function(i) {
    if (i == 2) stop(structure(class = c("custom", "condition"), list(message = "no error", call = quote(f(x)))))
    i
  })
  leave <- global(function(i) if (i == 2) invokeRestart("abort") else i)
  # Whatever is said before.
  odd <- global(function(i) {
    if (i != 2) return(i)
    for (text in list(NA_character_, rawToChar(as.raw(c(0xff, 0xfe, 0x41))))) {
      signalCondition(structure(class = c("custom", "condition"), list(message = text, call = NULL)))
    }
    invokeRestart("abort")
  })
  fates <- list(
    list(custom, "not an error, of class .custom.: no error"), list(leave, "top level"), list(odd, "top level")
  )
  for (fate in fates) {
    error <- caught(parLapply(cl, 1:4, fate[[1]]))
    expect_match(conditionMessage(error), paste0("^one node produced an error: .*", fate[[2]]))
    error <- caught(clusterCall(cl, fate[[1]], 2))
    expect_match(conditionMessage(error), paste0("^2 nodes produced errors.*", fate[[2]]))
    got <- clusterLapply(cl, 1:100, fate[[1]], .errors = "return")
    expect_identical(got[-2], as.list((1:100)[-2]))
    expect_rust_error(attr(got[[2]], "condition"), "aborted")
    call <- caught(clusterSubmit(cl, f(2), f = fate[[1]])$value())
    expect_rust_error(call, "aborted")
    expect_match(conditionMessage(call), fate[[2]])
    error <- caught(clusterLapplyAsync(cl, 1:100, fate[[1]])$value())
    expect_identical(error$indices, 2L)
    expect_rust_error(error$parent, "aborted")
    expect_identical(inherits(error$parent$parent, "custom"), identical(fate, fates[[1]]))
  }
  expect_identical(clusterPids(cl), pids)
})

test_that("no process is left", {
  stop_cluster_pairs()
  expect_no_leftovers()
})
