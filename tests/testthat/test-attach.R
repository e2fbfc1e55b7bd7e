# What library(rustcluster) prints, in sessions of their own. Masked functions are reported by R, whose rules these
# tests rely on.

skip_on_cran()

line <- paste0(
  "rustcluster ", utils::packageVersion("rustcluster"),
  " adds makeRustCluster() to parallel: see ?rustcluster, demo(\"rustcluster\")"
)

# Returns the output of an R session without packages other than base, stats, utils and methods.
session <- function(...) {
  file <- tempfile(fileext = ".R")
  on.exit(unlink(file), add = TRUE, after = FALSE)
  writeLines(c(...), file)
  env <- c(
    paste0("R_LIBS=", shQuote(paste(.libPaths(), collapse = ":"))),
    "R_DEFAULT_PACKAGES=stats,utils,methods", "LC_ALL=C", "LANGUAGE=en"
  )
  suppressWarnings(system2(
    file.path(R.home("bin"), "Rscript"), c("--vanilla", shQuote(file)), stdout = TRUE, stderr = TRUE, env = env,
    timeout = 120
  ))
}

# The functions that R reports as masked, by place.
masked <- function(output) {
  sub("^The following objects? (is|are) masked (.*):$", "\\2", grep("masked", output, value = TRUE))
}

test_that("one line is printed instead of a list of masked functions", {
  expect_identical(session("library(parallel)", "library(rustcluster)"), line)
  expect_identical(session("library(rustcluster)"), c("Loading required package: parallel", line))
  expect_identical(session("suppressPackageStartupMessages(library(rustcluster))"), character())
  expect_identical(session("library(parallel)", "library(rustcluster, include.only = \"makeRustCluster\")"), line)
  twice <- c("library(rustcluster)", "detach(\"package:rustcluster\")", "library(rustcluster)")
  expect_identical(session("library(parallel)", twice, "library(rustcluster)"), c(line, line))
})

test_that("nothing is printed if the package is loaded and not attached", {
  expect_identical(session("invisible(loadNamespace(\"rustcluster\"))", "invisible(rustcluster::parLapply)"), character())
})

test_that("nothing is printed by workers that attach the package", {
  printed <- session(
    "cl <- rustcluster::makeRustCluster(2, packages = \"rustcluster\", outfile = \"\")", "parallel::stopCluster(cl)",
    "cl <- rustcluster::makeRustCluster(1, packages = \"rustcluster\", outfile = \"\", start_method = \"spawn\")",
    "cat(\"attached\", \"package:rustcluster\" %in% parallel::clusterCall(cl, search)[[1]], \"\\n\")",
    "parallel::stopCluster(cl)"
  )
  expect_identical(printed, "attached TRUE ")
})

test_that("functions with the same names elsewhere are reported", {
  own <- session("clusterTop <- function() 1", "library(parallel)", "library(rustcluster)")
  expect_true(line %in% own)
  expect_identical(masked(own), c("_by_ '.GlobalEnv'", "from 'package:parallel'"))
  expect_true("    clusterTop" %in% own)
  data <- session("runs <- 3", "library(parallel)", "library(rustcluster)")
  expect_identical(data, line)
  quiet <- session("clusterTop <- function() 1", "library(parallel)",
                   "library(rustcluster, warn.conflicts = FALSE)")
  expect_identical(quiet, line)
  skip_if_not_installed("snow")
  snow <- session("suppressPackageStartupMessages({ library(snow); library(parallel) })", "library(rustcluster)")
  expect_identical(masked(snow), c("from 'package:parallel'", "from 'package:snow'"))
})

test_that("policies about conflicts are respected", {
  strict <- "options(conflicts.policy = \"strict\")"
  shows <- "cat(exists(\"clusterTop\"), \"\\n\")"
  refused <- session(strict, "library(rustcluster)", shows)
  expect_match(refused, "^Error.*: Conflicts attaching package 'rustcluster'", all = FALSE)
  rule <- "conflictRules(\"rustcluster\", mask.ok = list(parallel = TRUE))"
  expect_identical(session(strict, rule, "library(parallel)", "library(rustcluster)", shows), c(line, "TRUE "))
  lists <- session("options(conflicts.policy = \"depends.ok\")", "library(rustcluster)", shows)
  expect_identical(masked(lists), "from 'package:parallel'")
  expect_true("TRUE " %in% lists)
})
