# R embedded in another program, as in RStudio: in Python with rpy2, and as a kernel of Jupyter.

skip_on_cran()
watch_processes()

in_rpy2 <- function(...) {
  skip_unless_python("rpy2.robjects")
  code <- tempfile(fileext = ".R")
  writeLines(c(...), code)
  run_python(c("import rpy2.robjects as ro", sprintf("ro.r('source(\"%s\", echo = FALSE)')", code)))
}

test_that("the tests of verbs pass in rpy2", {
  result <- tempfile()
  ran <- in_rpy2(
    "library(testthat)",
    "suppressPackageStartupMessages(library(rustcluster))",
    "Sys.setenv(NOT_CRAN = 'true', RUSTCLUSTER_LONG_TESTS = '')",
    "results <- list()",
    "for (file in c('verbs', 'foreach', 'restored-session')) {",
    sprintf("  path <- file.path('%s', paste0('test-', file, '.R'))", normalizePath(".")),
    "  run <- test_file(path, reporter = 'silent', load_package = 'none', stop_on_failure = FALSE)",
    "  results <- c(results, list(as.data.frame(run)))",
    "}",
    "results <- do.call(rbind, lapply(results, `[`, c('file', 'test', 'passed', 'failed', 'error')))",
    "bad <- results$failed > 0 | results$error",
    sprintf("writeLines(c(sum(results$passed) > 100, results$test[bad]), '%s')", result)
  )
  expect_identical(ran$status, 0L)
  expect_true(file.exists(result), info = paste(ran$output, collapse = "\n"))
  expect_identical(if (file.exists(result)) readLines(result), "TRUE")
})

test_that("output of workers and a progress bar reach the console of rpy2", {
  ran <- in_rpy2(
    "suppressPackageStartupMessages(library(rustcluster))",
    "options(cli.progress_show_after = 0, cli.dynamic = FALSE)",
    "cl <- makeRustCluster(2, outfile = '', progress = FALSE)",
    "cat('pids', clusterPids(cl), agentPids(cl), '\\n')",
    "invisible(clusterLapply(cl, 1:4, function(i) {",
    "  cat('this is', i, '\\n')",
    "  Sys.sleep(0.3)",
    "}, .progress = TRUE))",
    "stopCluster(cl)"
  )
  expect_identical(ran$status, 0L)
  output <- paste(ran$output, collapse = "\n")
  for (i in 1:4) expect_match(output, paste0("\\[localhost [12]\\] this is ", i))
  expect_match(output, "4/4 tasks|4 tasks in")
  pids <- regmatches(output, regexpr("pids [0-9 ]+", output))
  expect_gone(as.integer(strsplit(trimws(sub("pids ", "", pids)), " ")[[1L]]))
})

test_that("output, progress and interrupts in Jupyter are the same as in a terminal", {
  skip_unless_proc()
  skip_unless_python("jupyter_client")
  skip_if_not_installed("IRkernel")
  dir <- tempfile("jupyter-")
  spec <- file.path(dir, "kernels", "ir")
  dir.create(spec, recursive = TRUE)
  writeLines(sprintf(
    '{"argv": ["%s", "--slave", "-e", "IRkernel::main()", "--args", "{connection_file}"], "display_name": "R", "language": "R"}',
    file.path(R.home("bin"), "R")
  ), file.path(spec, "kernel.json"))
  ran <- run_python(env = paste0("JUPYTER_PATH=", dir), lines = c(
    "import os, queue, time",
    "from jupyter_client import KernelManager",
    sprintf("dir = '%s'", dir),
    "manager = KernelManager(kernel_name='ir')",
    "manager.start_kernel()",
    "client = manager.client()",
    "client.start_channels()",
    "client.wait_for_ready(timeout=60)",
    "def run(name, code, interrupt_at=None):",
    "    sent = client.execute(code)",
    "    deadline = time.time() + 90",
    "    text = ''",
    "    while time.time() < deadline:",
    "        if interrupt_at and all(os.path.exists(os.path.join(dir, f)) for f in interrupt_at):",
    "            manager.interrupt_kernel()",
    "            interrupt_at = None",
    "        try:",
    "            message = client.get_iopub_msg(timeout=0.2)",
    "        except queue.Empty:",
    "            continue",
    "        if message['parent_header'].get('msg_id') != sent:",
    "            continue",
    "        kind, content = message['msg_type'], message['content']",
    "        if kind == 'stream': text += content['text']",
    "        if kind == 'error': text += 'ERROR ' + ' '.join(content['traceback'])",
    "        if kind == 'status' and content['execution_state'] == 'idle': break",
    "    else:",
    "        text += ' TIMED OUT'",
    "    for line in text.splitlines() or ['']: print(name + ': ' + line)",
    "try:",
    "    run('start', '''suppressPackageStartupMessages(library(rustcluster))",
    "options(cli.progress_show_after = 0, cli.dynamic = FALSE)",
    "cl <- makeRustCluster(2, outfile = '', progress = FALSE)''')",
    "    run('pids', 'cat(clusterPids(cl), agentPids(cl))')",
    "    run('output', '''invisible(clusterLapply(cl, 1:4, function(i) {",
    "  cat('this is', i, '\\\\n')",
    "  Sys.sleep(0.3)",
    "}, .progress = TRUE))''')",
    "    run('interrupt', '''x <- parLapply(cl, 1:2, function(i, dir) {",
    "  file.create(file.path(dir, paste0('begun', i)))",
    "  Sys.sleep(600)",
    "}, '%s')''' % dir, ['begun1', 'begun2'])",
    "    run('after', 'cat(unlist(parLapply(cl, 1:6, sqrt)) == sqrt(1:6))')",
    "    run('stop', 'stopCluster(cl)')",
    "finally:",
    "    manager.shutdown_kernel()"
  ))
  expect_identical(ran$status, 0L, info = paste(ran$output, collapse = "\n"))
  said <- function(name) sub("^[a-z]+: ", "", grep(paste0("^", name, ": "), ran$output, value = TRUE))
  expect_false(any(grepl("TIMED OUT", ran$output)))
  output <- paste(said("output"), collapse = "\n")
  for (i in 1:4) expect_match(output, paste0("\\[localhost [12]\\] this is ", i))
  expect_match(output, "4/4 tasks|4 tasks in")
  expect_identical(said("after"), paste(rep("TRUE", 6), collapse = " "))
  expect_gone(as.integer(strsplit(said("pids"), " ")[[1L]]))
})

test_that("no process is left", {
  expect_no_leftovers()
})
