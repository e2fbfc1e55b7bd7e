# vignettes/cheatsheet.Rmd: what it names exists, each line of its code runs, and no line is too long for its column.

skip_on_cran()
watch_processes()

sheet <- local({
  file <- c(
    testthat::test_path("../../vignettes/cheatsheet.Rmd"), system.file("doc", "cheatsheet.Rmd", package = "rustcluster")
  )
  file <- file[file.exists(file)]
  if (length(file)) readLines(file[[1L]], encoding = "UTF-8") else character()
})
# The lines of code, and all other lines.
fences <- which(startsWith(sheet, "```"))
inside <- seq_along(sheet) %in% unlist(Map(seq, fences[c(TRUE, FALSE)], fences[c(FALSE, TRUE)]))
code <- sheet[inside & !seq_along(sheet) %in% fences]

exported <- function(name) {
  for (package in c("rustcluster", "parallel")) {
    if (name %in% getNamespaceExports(package)) return(getExportedValue(package, name))
  }
}

test_that("the functions and arguments of the cheat sheet exist", {
  skip_if_not(length(code) > 0, "vignettes are not installed")
  expect_true(all(nchar(code) <= 61L))
  options <- c(names(formals(makeRustCluster)), get("meaningful", asNamespace("rustcluster")))
  check <- function(call) {
    if (!is.call(call)) return()
    if (is.symbol(call[[1L]]) && is.function(fun <- exported(as.character(call[[1L]])))) {
      given <- setdiff(names(as.list(call))[-1L], "")
      known <- if (identical(call[[1L]], quote(makeRustCluster))) options else names(formals(fun))
      expect_true(all(given %in% known), info = paste(deparse(call), collapse = " "))
      expect_no_error(match.call(fun, call))
    }
    for (part in as.list(call)) check(part)
  }
  for (call in parse(text = code, keep.source = FALSE)) check(call)
  named <- unique(unlist(regmatches(sheet, gregexpr("(?<=`)[A-Za-z.]+(?=\\()", sheet, perl = TRUE))))
  missing <- Filter(function(name) !exists(name, mode = "function"), named)
  expect_identical(missing, character())
  vignettes <- unlist(regmatches(sheet, gregexpr("(?<=vignette\\(\")[a-z-]+", sheet, perl = TRUE)))
  expect_true(length(vignettes) > 2)
  sources <- testthat::test_path("../../vignettes")
  if (dir.exists(sources)) expect_true(all(file.exists(file.path(sources, paste0(vignettes, ".Rmd")))))
})

test_that("the code of the cheat sheet runs", {
  skip_if_not(length(code) > 0, "vignettes are not installed")
  old <- c(options(rustcluster.progress = NULL), list(dir = getwd(), data = Sys.getenv("R_USER_DATA_DIR", NA)))
  dir <- tempfile("sheet", dirname(tempdir()))
  dir.create(dir)
  # Other machines and the terminal are left out: these functions check their arguments, and make a small cluster here.
  here <- NULL
  makes <- function(...) {
    list(...)
    if (is.null(here)) here <<- rustcluster::makeRustCluster(2)
    here
  }
  stops <- function(cl) {
    parallel::stopCluster(cl)
    here <<- NULL
  }
  values <- new.env()
  X <- 1:4
  f <- function(i) x + i
  environment(f) <- globalenv()
  assign("x", 1, globalenv())
  list2env(list(
    X = X, f = f, x = 1, makeRustCluster = makes, stopCluster = stops, clusterTop = identity, installOnHosts = identity,
    allocation = function() NULL, reattachCluster = function(id) here,
    startRun = function(..., spec) rustcluster::startRun(..., spec = 2)
  ), values)
  Sys.setenv(R_USER_DATA_DIR = dir)
  grDevices::pdf(NULL)
  on.exit({
    grDevices::dev.off()
    if (!is.null(here)) parallel::stopCluster(here)
    parallel::setDefaultCluster(NULL)
    if (isNamespaceLoaded("future")) future::plan("sequential")
    if (isNamespaceLoaded("foreach")) foreach::registerDoSEQ()
    rm("x", envir = globalenv())
    setwd(old$dir)
    options(rustcluster.progress = old$rustcluster.progress)
    if (is.na(old$data)) Sys.unsetenv("R_USER_DATA_DIR") else Sys.setenv(R_USER_DATA_DIR = old$data)
    unlink(dir, recursive = TRUE)
  }, add = TRUE, after = FALSE)
  setwd(dir)
  needs <- c(registerDoRustCluster = "foreach", future = "future", BiocParallel = "BiocParallel")
  utils::capture.output(type = "output", for (line in parse(text = code, keep.source = FALSE)) {
    package <- needs[intersect(all.names(line), names(needs))]
    if (!all(vapply(package, requireNamespace, NA, quietly = TRUE))) next
    if (is.null(here)) values$cl <- makes()
    tryCatch(suppressMessages(eval(line, values)), error = function(e) {
      fail(paste0(paste(deparse(line), collapse = " "), ": ", conditionMessage(e)))
    })
  })
  expect_identical(values$run$status()$state, "done")
  expect_identical(unlist(values$run$results()), 1 + 1:4)
})
