# Clusters in documents of knitr and rmarkdown: made in one chunk and used in others, with and without knitr's cache.

skip_on_cran()
skip_unless_long()
skip_if_not_installed("knitr")
watch_processes()

# Returns the document with the output of these chunks, each a character vector with its header first.
knitted <- function(..., dir = tempfile(), envir = new.env(parent = globalenv())) {
  dir.create(dir, showWarnings = FALSE)
  chunks <- lapply(list(...), function(chunk) c(paste0("```{r ", chunk[[1]], "}"), chunk[-1], "```", ""))
  writeLines(unlist(chunks), file.path(dir, "doc.Rmd"))
  old <- setwd(dir)
  on.exit(setwd(old), add = TRUE, after = FALSE)
  output <- knitr::knit("doc.Rmd", quiet = TRUE, envir = envir)
  readLines(output)
}

test_that("chunks share a cluster, and the document has the output of its workers", {
  envir <- new.env(parent = globalenv())
  doc <- knitted(
    c("make", "cl <- makeRustCluster(2, outfile = \"\")", "cl"),
    c("use", "x <- 3", "clusterExport(cl, \"x\", environment())",
      "unlist(parLapply(cl, 1:3, function(i) { cat(\"says\", i, \"\\n\"); i * x }))"),
    c("call", "clusterSubmit(cl, x + 100)$value()"),
    c("progress", "options(rustcluster.progress = TRUE)", "unlist(clusterLapply(cl, 1:5, sqrt))",
      "options(rustcluster.progress = FALSE)"),
    c("failed, error = TRUE", "clusterApply(cl, 1:3, function(i) if (i == 2) stop(\"two\") else i)",
      "clusterLapply(cl, 1:3, function(i) if (i == 2) stop(\"two\") else i)"),
    c("lost, error = TRUE, warning = FALSE",
      "clusterApply(cl, 1:3, function(i) if (i == 2) tools::pskill(Sys.getpid(), 9) else i)"),
    c("end", "stopCluster(cl)", "cl"),
    envir = envir
  )
  out <- grep("^## ", doc, value = TRUE)
  expect_true("## socket cluster with 2 nodes on host 'localhost'" %in% out)
  expect_setequal(sub("^.*(says .) *$", "\\1", grep("says", out, value = TRUE)), paste("says", 1:3))
  expect_true(all(c("## [1] 3 6 9", "## [1] 103") %in% out))
  expect_true("## [1] 1.000000 1.414214 1.732051 2.000000 2.236068" %in% out)
  expect_length(grep("ETA|elements in", doc), 0)
  expect_length(grep("two$", grep("Error", out, value = TRUE)), 2)
  expect_match(out, "Error: task 2 failed: the worker died on all 3 attempts:", all = FALSE)
  expect_identical(utils::tail(out, 1), "## socket cluster with 2 nodes on host 'localhost' that has been stopped")
})

test_that("knitr's cache keeps results, and a cluster in it is an error with a remedy", {
  dir <- tempfile()
  ran <- file.path(dir, "ran")
  dir.create(dir)
  chunks <- list(
    c("lib", "cl <- makeRustCluster(2)"),
    c("first, cache = TRUE", sprintf("file.create(tempfile(tmpdir = \"%s\", pattern = \"ran\"))", dir),
      "x <- clusterApply(cl, 1:3, function(i) i * 2)"),
    c("second, cache = TRUE, dependson = \"first\"", "y <- unlist(parLapply(cl, x, sqrt))"),
    c("show", "sum(y^2)", "sum(unlist(clusterApply(cl, x, identity)))"),
    c("made, cache = TRUE", "cached <- makeRustCluster(1)"),
    c("used, error = TRUE", "clusterCall(cached, identity, 1)[[1]]"),
    c("end", "stopCluster(cl)")
  )
  first <- do.call(knitted, c(chunks, dir = dir))
  expect_identical(sum(first == "## [1] 12"), 2L)
  expect_true("## [1] 1" %in% first)
  again <- do.call(knitted, c(chunks, dir = dir))
  expect_identical(sum(again == "## [1] 12"), 2L)
  expect_length(list.files(dir, "^ran"), 1)
  expect_match(again, "Error: this cluster was saved and loaded.*create a new one with makeRustCluster", all = FALSE)
})

test_that("a cluster that lingers in knitr's cache is connected again in the next session", {
  skip_unless_proc()
  cache <- tempfile()
  dir.create(cache)
  home <- tempfile()
  dir.create(home)
  writeLines(c(
    "```{r lib}", "suppressPackageStartupMessages(library(rustcluster))", "```",
    "```{r make, cache = TRUE}", "cl <- makeRustCluster(2, linger = 60)", "x <- 7", "clusterExport(cl, \"x\")", "```",
    "```{r use}", "pids <- clusterPids(cl)", "x <- sum(unlist(clusterEvalQ(cl, x)))", "```"
  ), file.path(cache, "doc.Rmd"))
  run <- function(ends) {
    child <- start_child({
      setwd(cache)
      suppressMessages(knitr::knit("doc.Rmd", quiet = TRUE))
      say("pids", paste(pids, collapse = " "))
      say("agents", paste(agentPids(cl), collapse = " "))
      say("value", x)
      if (ends) stopCluster(cl)
    }, values = list(cache = cache, ends = ends), env = paste0("R_USER_CACHE_DIR=", home))
    pids <- child_wait_for(child, "agents")
    note_pids(c(child_pids(child, "pids"), child_pids(child, "agents")))
    expect_child_ends_well(child)
    list(pids = child_pids(child, "pids"), value = child_said(child, "value"))
  }
  first <- run(FALSE)
  expect_alive(first$pids)
  second <- run(TRUE)
  expect_identical(second, first)
  expect_identical(first$value, "14")
  expect_gone(first$pids)
})

test_that("rmarkdown renders a document with a cluster, of which nothing is left", {
  skip_if_not_installed("rmarkdown")
  skip_if_not(rmarkdown::pandoc_available())
  skip_unless_proc()
  child <- start_child({
    setwd(dir)
    writeLines(c(
      "---", "title: a", "output: html_document", "---", "```{r}", "library(rustcluster)", "cl <- makeRustCluster(2)",
      "```", "```{r}", "cat(\"sum\", sum(unlist(parLapply(cl, 1:4, sqrt))))", "```"
    ), "doc.Rmd")
    file <- rmarkdown::render("doc.Rmd", rmarkdown::html_document(theme = NULL, highlight = NULL), quiet = TRUE)
    say("pids", paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
    say("shown", sum(grepl("sum 6.146", readLines(file), fixed = TRUE)))
  })
  child_wait_for(child, "pids")
  note_pids(child_pids(child, "pids"))
  expect_child_ends_well(child)
  expect_identical(child_said(child, "shown"), "1")
  expect_gone(child_pids(child, "pids"))
})

test_that("no process is left", {
  expect_no_leftovers()
})
