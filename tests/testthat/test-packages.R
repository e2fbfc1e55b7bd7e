# What packages make of their process when they are loaded is each worker's own, as it is with PSOCK's.
# The packages are made here: each does one such thing.

skip_on_cran()
watch_processes()

# Installed once, into a library of this file's.
made <- new.env()

make_package <- function(name, onload, imports = character(), c = NULL) {
  dir <- file.path(made$source, name)
  dir.create(file.path(dir, "R"), recursive = TRUE)
  writeLines(base::c(
    paste("Package:", name), "Version: 1.0", "Title: A Test", "Description: A test.", "License: GPL-2",
    if (length(imports)) paste("Imports:", paste(imports, collapse = ", "))
  ), file.path(dir, "DESCRIPTION"))
  writeLines(base::c(
    if (length(imports)) sprintf("import(%s)", imports), "export(id)",
    if (!is.null(c)) sprintf("useDynLib(%s, id_)", name)
  ), file.path(dir, "NAMESPACE"))
  code <- base::c(
    "the <- new.env()",
    if (is.null(c)) "id <- function() the$id" else "id <- function() .Call(id_)",
    ".onLoad <- function(libname, pkgname) {", onload, "}"
  )
  writeLines(code, file.path(dir, "R", "code.R"))
  if (!is.null(c)) {
    dir.create(file.path(dir, "src"))
    writeLines(base::c("#define _GNU_SOURCE", "#include <Rinternals.h>", c), file.path(dir, "src", "code.c"))
  }
}

library_of_packages <- function() {
  if (!is.null(made$library)) return(made$library)
  made$source <- tempfile("packages-")
  make_package("pkplain", "cat('x\\n', file = Sys.getenv('PK_LOADS'), append = TRUE); the$id <- 'plain'")
  make_package("pkdraw", "the$id <- stats::runif(1)")
  make_package("pkhide", c(
    "if (!exists('.Random.seed', globalenv())) set.seed(NULL)", "seed <- get('.Random.seed', globalenv())",
    "on.exit(assign('.Random.seed', seed, globalenv()))", "the$id <- sample.int(1e9, 1)"
  ))
  make_package("pkuser", "", imports = "pkdraw")
  make_package("pkpid", "the$id <- Sys.getpid()")
  make_package("pktime", "the$id <- format(Sys.time(), '%H:%M:%OS6')")
  make_package("pkuuid", "the$id <- readLines('/proc/sys/kernel/random/uuid')")
  make_package("pktemp", "the$id <- tempfile(); writeLines('here', the$id); options(pktemp.dir = tempdir())")
  make_package("pkfile", c(
    "the$id <- file.path(Sys.getenv('R_SESSION_TMPDIR'), 'pkfile')", "file.create(the$id)"
  ))
  make_package("pkopen", "the$id <- textConnection('x', local = TRUE)")
  make_package("pkend", c(
    "the$id <- 0", "end <- function(e) cat(Sys.getpid(), '\\n', file = Sys.getenv('PK_ENDS'), append = TRUE)",
    "reg.finalizer(the, end, onexit = TRUE)"
  ))
  if (nzchar(Sys.which("cc")) || nzchar(Sys.which("gcc"))) {
    made$compiled <- TRUE
    make_package("pkseed", "", c = c(
      "#include <time.h>", "#include <unistd.h>", "static double seed;",
      "static __attribute__((constructor)) void plant(void) {",
      "  struct timespec now;", "  clock_gettime(CLOCK_REALTIME, &now);",
      "  seed = now.tv_nsec + 1e9 * getpid();", "}",
      "SEXP id_(void) { return ScalarReal(seed); }"
    ))
    make_package("pkthread", "", c = c(
      "#include <pthread.h>", "#include <unistd.h>", "static volatile int ticks;",
      "static void *tick(void *unused) { for (;;) { ticks++; usleep(1000); } return unused; }",
      "static __attribute__((constructor)) void begin(void) {",
      "  pthread_t thread;", "  pthread_create(&thread, 0, tick, 0);", "}",
      "SEXP id_(void) { int before = ticks; usleep(200000); return ScalarLogical(ticks > before); }"
    ))
  }
  library <- tempfile("library-")
  dir.create(library)
  output <- suppressWarnings(system2(
    file.path(R.home("bin"), "R"), c(
      "CMD", "INSTALL", "--no-docs", "--no-test-load", "--no-byte-compile", "--no-staged-install", "-l",
      shQuote(library), shQuote(list.dirs(made$source, recursive = FALSE))
    ), stdout = TRUE, stderr = TRUE, env = c(
      paste0("R_LIBS=", shQuote(library)), paste0("PK_LOADS=", shQuote(tempfile()))
    )
  ))
  if (!setequal(list.files(library), list.files(made$source))) stop(paste(output, collapse = "\n"))
  made$library <- library
}

# Two workers that have the packages attached, ours and PSOCK's.
with_packages <- function(packages, ..., envs = NULL, .frame = parent.frame()) {
  rlibs <- c(library_of_packages(), .libPaths())
  local_cluster(2, packages = packages, rlibs = rlibs, rscript_envs = envs, ..., .frame = .frame)
}

psock_with_packages <- function(packages, .frame = parent.frame()) {
  cl <- parallel::makePSOCKcluster(2)
  do.call("on.exit", list(bquote(parallel::stopCluster(.(cl))), add = TRUE, after = FALSE), envir = .frame)
  parallel::clusterCall(cl, global(function(packages, library) {
    .libPaths(c(library, .libPaths()))
    for (package in packages) suppressPackageStartupMessages(library(package, character.only = TRUE))
  }), packages, library_of_packages())
  cl
}

id_of <- global(function(package) getExportedValue(package, "id")())
ids <- function(cl, package) unlist(clusterCall(cl, id_of, package))

with_ids <- c("pkdraw", "pkhide", "pkpid", "pktime", "pkuuid", "pktemp")

test_that("random numbers and names that packages draw at load differ between workers", {
  skip_unless_proc()
  psock <- psock_with_packages(with_ids)
  for (cl in list(psock, with_packages(with_ids), with_packages(with_ids, start_method = "spawn"))) {
    for (package in with_ids) expect_length(unique(ids(cl, package)), 2L)
    expect_identical(ids(cl, "pkpid"), unlist(clusterCall(cl, Sys.getpid)))
    here <- clusterEvalQ(cl, c(dirname(pktemp::id()), getOption("pktemp.dir"), readLines(pktemp::id())))
    expect_identical(here, lapply(clusterCall(cl, tempdir), function(dir) c(dir, dir, "here")))
  }
})

test_that("a package that must not be forked is detected, also as an import of another one", {
  skip_unless_proc()
  for (package in c("pkuser", "pkhide", "pkfile", "pkopen")) {
    cl <- with_packages(package)
    if (package == "pkfile") {
      expect_identical(ids(cl, "pkfile"), file.path(unlist(clusterCall(cl, tempdir)), "pkfile"))
      expect_identical(unlist(clusterCall(cl, global(function() file.exists(pkfile::id())))), c(TRUE, TRUE))
    } else if (package == "pkopen") {
      expect_identical(clusterCall(cl, global(function() readLines(pkopen::id()))), list("x", "x"))
    } else {
      expect_length(unique(ids(cl, if (package == "pkuser") "pkdraw" else package)), 2L)
    }
    parallel::stopCluster(cl)
  }
})

test_that("compiled code that seeds itself, or starts a thread, at load does so in each worker", {
  skip_unless_proc()
  library_of_packages()
  skip_if_not(isTRUE(made$compiled), "there is no compiler")
  packages <- c("pkseed", "pkthread")
  for (cl in list(psock_with_packages(packages), with_packages(packages))) {
    expect_length(unique(ids(cl, "pkseed")), 2L)
    expect_identical(ids(cl, "pkthread"), c(TRUE, TRUE))
  }
  expect_identical(threads_of(agentPids(cl)), 1L)
})

test_that("packages without process state are loaded once, and all are attached in order", {
  loads <- tempfile()
  packages <- c("stats4", "pkdraw", "pkplain", "splines")
  cl <- with_packages(packages, envs = c(PK_LOADS = loads))
  # By the agent, again when it has found pkdraw out, and not by workers.
  expect_length(readLines(loads), 2L)
  unlink(loads)
  plain <- with_packages("pkplain", envs = c(PK_LOADS = loads))
  expect_length(readLines(loads), 1L)
  expect_identical(ids(plain, "pkplain"), c("plain", "plain"))
  Sys.setenv(PK_LOADS = loads)
  on.exit(Sys.unsetenv("PK_LOADS"), add = TRUE, after = FALSE)
  psock <- psock_with_packages(packages)
  expect_identical(clusterCall(cl, search), clusterCall(psock, search))
  seeded <- global(function() exists(".Random.seed", globalenv(), inherits = FALSE))
  expect_identical(clusterCall(plain, seeded), list(FALSE, FALSE))
  expect_identical(clusterCall(cl, seeded), clusterCall(psock, seeded))
})

test_that("a replacement has its own process state and the exports", {
  cl <- with_packages(c("pkplain", "pkdraw"), envs = c(PK_LOADS = "/dev/null"))
  clusterEvalQ(cl, kept <- 5)
  before <- ids(cl, "pkdraw")
  pid <- clusterPids(cl)[[1L]]
  tools::pskill(pid, tools::SIGKILL)
  expect_gone(pid)
  after <- with_losses(ids(cl, "pkdraw"))$value
  expect_length(unique(c(before, after)), 3L)
  expect_identical(unlist(clusterEvalQ(cl, kept)), c(5, 5))
})

test_that("exit finalizers run when a worker quits, and no directory is left", {
  ends <- tempfile()
  tmp <- tempfile("tmp-")
  dir.create(tmp)
  cl <- with_packages(c("pkend", "pktemp"), envs = c(PK_ENDS = ends, TMPDIR = tmp), retries = 0)
  pids <- clusterPids(cl)
  agent <- agentPids(cl)
  # Each by itself: how long stopCluster() waits for finalizers is another matter.
  for (i in 1:2) expect_rust_error(caught(clusterEvalQ(cl[i], quit("no"))), "worker_lost")
  expect_gone(pids)
  expect_true(all(pids %in% scan(ends, quiet = TRUE)))
  note_processes(cl)
  parallel::stopCluster(cl)
  expect_gone(agent)
  expect_identical(list.files(tmp), character())
})

test_that("a missing package that workers have to load is an error that names it", {
  error <- caught(makeRustCluster(2, packages = "dqrng", rscript_envs = c(R_LIBS_SITE = "-"), rlibs = "-"))
  skip_if(is.null(error), "dqrng is in R's own library")
  expect_rust_error(error, "start_failed")
  expect_match(conditionMessage(error), "dqrng")
})

test_that("a profile with process state runs in each worker", {
  profile <- tempfile()
  writeLines("options(pk.file = tempfile())", profile)
  cl <- local_cluster(2, rscript_envs = c(R_PROFILE_USER = profile))
  dirs <- clusterEvalQ(cl, c(dirname(getOption("pk.file")), tempdir()))
  for (dir in dirs) expect_identical(dir[[1L]], dir[[2L]])
})

test_that("clusters that workers make use different ports", {
  cl <- local_cluster(3)
  ports <- clusterCall(cl, global(function() get("defaultClusterOptions", asNamespace("parallel"))$port))
  expect_length(unique(unlist(ports)), 3L)
  inner <- global(function(i) {
    cl <- parallel::makePSOCKcluster(1)
    on.exit(parallel::stopCluster(cl), add = TRUE, after = FALSE)
    unlist(parallel::clusterApply(cl, i, sqrt))
  })
  expect_identical(unlist(clusterApply(cl, c(1, 4, 9), inner)), c(1, 2, 3))
})

test_that("data.table has as many threads as are asked for", {
  skip_if_not_installed("data.table")
  threads <- global(function() data.table::getDTthreads())
  for (n in 1:2) {
    cl <- local_cluster(2, packages = "data.table", threads = n)
    late <- local_cluster(2, threads = n)
    expect_identical(clusterCall(cl, threads), clusterCall(late, threads))
  }
})

test_that("RcppParallel uses `threads`", {
  cl <- local_cluster(1, threads = 3)
  expect_identical(clusterEvalQ(cl, Sys.getenv("RCPP_PARALLEL_NUM_THREADS")), list("3"))
})

test_that("dqrng draws other numbers in each worker", {
  skip_if_not_installed("dqrng")
  cl <- local_cluster(3, packages = "dqrng")
  expect_length(unique(unlist(clusterCall(cl, global(function() dqrng::dqrunif(1))))), 3L)
})

test_that("ff has its files in each worker's temporary directory", {
  skip_if_not_installed("ff")
  cl <- local_cluster(2, packages = "ff")
  sums <- clusterCall(cl, global(function() sum(ff::ff(1:10)[])))
  expect_identical(sums, list(55L, 55L))
  expect_identical(clusterEvalQ(cl, dirname(getOption("fftempdir"))), clusterCall(cl, tempdir))
})

test_that("cli's timer runs in each worker, and not in the agent", {
  skip_if_not_installed("cli")
  skip_unless_proc()
  cl <- local_cluster(2, packages = "cli")
  expect_identical(threads_of(agentPids(cl)), 1L)
  late <- local_cluster(2)
  count <- global(function() {
    loadNamespace("cli")
    length(list.files("/proc/self/task"))
  })
  expect_identical(clusterCall(cl, count), clusterCall(late, count))
})

test_that("no process is left", {
  expect_no_leftovers()
})
