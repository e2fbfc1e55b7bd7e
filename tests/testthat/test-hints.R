# Hints for tasks that use variables, functions and packages that only the session has. The errors are parallel's.

watch_processes()

# Returns the messages and the error of a call that is evaluated in the global environment, in a session that has had no
# hints.
hinted <- function(expr) {
  shown <- rustcluster:::hintsShown
  rm(list = ls(shown), envir = shown)
  hints <- list()
  error <- withCallingHandlers(
    tryCatch({
      force(expr)
      NULL
    }, error = identity),
    message = function(m) {
      hints <<- c(hints, list(m))
      invokeRestart("muffleMessage")
    }
  )
  list(text = sub("\n$", "", vapply(hints, conditionMessage, "")), hints = hints, error = error)
}

test_that("names are read from R's errors", {
  name <- rustcluster:::nameNotFound
  message_of <- function(expr) tryCatch(expr, error = conditionMessage)
  expect_identical(name(message_of(nosuch_variable)), "nosuch_variable")
  expect_identical(name(message_of(nosuch_function())), "nosuch_function")
  expect_identical(name(message_of(get("nosuch", mode = "function"))), "nosuch")
  for (text in list("object not found", "", NA_character_, NULL, c("a", "b"), 1, "object '' not found")) {
    expect_null(name(text))
  }
  expect_null(name(paste0("object '", strrep("x", 1e5), "' not found")))
})

test_that("names are read from errors in the language of the session", {
  code <- paste(
    "said <- function(expr) tryCatch(expr, error = conditionMessage)",
    "name <- rustcluster:::nameNotFound",
    "said <- c(said(nosuch), said(nosuch()), said(get('nosuch', mode = 'function')))",
    "cat(length(unique(c(said, 'object \\'nosuch\\' not found'))), vapply(said, name, ''))",
    sep = "; "
  )
  for (language in c("de", "fr", "ja")) {
    out <- system2(
      file.path(R.home("bin"), "Rscript"), c("--vanilla", "-e", shQuote(code)), stdout = TRUE,
      env = paste0(c("LANGUAGE=", "LC_ALL="), c(language, "C.UTF-8"))
    )
    expect_match(out, "^[34] nosuch nosuch nosuch$")
  }
})

test_that("a variable that was not exported is named, once a session", {
  skip_on_cran()
  cl <- local_cluster(2)
  assign("only_here", 5, globalenv())
  on.exit(rm("only_here", envir = globalenv()), add = TRUE, after = FALSE)
  advice <- paste(
    "`only_here` exists in this session, and workers have only what was exported to them:",
    "clusterExport(cl, \"only_here\")"
  )
  uses <- function(i) only_here + i
  environment(uses) <- globalenv()
  for (verb in list(parLapply, parallel::parLapply, parLapplyLB, clusterApply, clusterApplyLB, parallel::clusterMap)) {
    seen <- if (identical(verb, parallel::clusterMap)) hinted(verb(cl, uses, 1:4)) else hinted(verb(cl, 1:4, uses))
    expect_identical(seen$text, advice)
    expect_identical(class(seen$hints[[1L]])[[1L]], "rustcluster_hint")
    expect_identical(seen$hints[[1L]]$name, "only_here")
    expect_match(conditionMessage(seen$error), "first error: object 'only_here' not found$")
  }
  seen <- hinted(clusterEvalQ(cl, only_here))
  expect_identical(seen$text, advice)
  expect_no_message(try(clusterEvalQ(cl, only_here), silent = TRUE))
  # An error of this package contains the hint.
  seen <- hinted(clusterLapply(cl, 1:2, uses))
  expect_length(seen$hints, 0L)
  expect_identical(
    conditionMessage(seen$error), paste0("element 1 failed: object 'only_here' not found\n(and 1 other)\n", advice)
  )
  expect_length(hinted(clusterApply(cl, 1:2, function(i) nosuch_function(i)))$hints, 0L)
  clusterExport(cl, "only_here", globalenv())
  expect_identical(hinted(expect_identical(parLapply(cl, 1:2, uses), list(6, 7))), hinted(NULL))
})

test_that("a package that only the session has attached is named", {
  skip_on_cran()
  cl <- local_cluster(1)
  attached <- "package:stats4" %in% search()
  suppressPackageStartupMessages(library(stats4))
  on.exit(if (!attached) detach("package:stats4"), add = TRUE, after = FALSE)
  fits <- function(i) mle(i)
  environment(fits) <- globalenv()
  expect_match(
    hinted(clusterApply(cl, 1, fits))$text,
    "^`mle` is in package .stats4., which is .*: clusterEvalQ.cl, library.stats4.., or makeRustCluster.packages = "
  )
})

test_that("clusterExport() of a local variable names `envir`", {
  skip_on_cran()
  cl <- local_cluster(1)
  exports <- function() {
    local_variable <- 2
    clusterExport(cl, "local_variable")
  }
  seen <- hinted(exports())
  expect_match(seen$text, "clusterExport(cl, \"local_variable\", envir = environment())", fixed = TRUE)
  theirs <- tryCatch(parallel::clusterExport(cl, "local_variable"), error = identity)
  expect_identical(conditionMessage(seen$error), conditionMessage(theirs))
  expect_identical(conditionCall(seen$error), conditionCall(theirs))
  expect_length(hinted(clusterExport(cl, "nosuch_variable"))$hints, 0L)
})

test_that("names without quotes, clusters of the session and arguments of clusterLapply() are explained", {
  skip_on_cran()
  cl <- local_cluster(1)
  y <- 3
  seen <- hinted(clusterExport(cl, y))
  expect_match(seen$text, "clusterExport() takes names in quotes", fixed = TRUE)
  theirs <- tryCatch(parallel::clusterExport(cl, y), error = identity)
  expect_identical(conditionMessage(seen$error), conditionMessage(theirs))

  assign("outer_cl", cl, globalenv())
  on.exit(rm("outer_cl", envir = globalenv()), add = TRUE, after = FALSE)
  inner <- global(function(i) parallel::parLapply(outer_cl, 1:2, sqrt))
  seen <- hinted(parallel::parLapply(cl, 1:2, inner))
  expect_match(seen$text, "`outer_cl` is a cluster of this session, which workers cannot use", fixed = TRUE)

  seen <- hinted(parLapply(cl, 1:2, function(i) i, .seed = 1))
  expect_identical(seen$text, "`.seed` is an argument of clusterLapply()")
  expect_match(conditionMessage(seen$error), "unused argument", fixed = TRUE)
  expect_length(hinted(parLapply(cl, 1:2, function(i) i, .other = 1))$hints, 0L)
})

test_that("swapped and misplaced arguments are named", {
  expect_snapshot({
    show_error(makeRustCluster(2, 4))
    show_error(makeRustCluster(2, seed = 1, export = "x", pkgs = "stats4"))
    show_error(makeRustCluster(2, packages = nosuchpackage))
  })
  skip_on_cran()
  cl <- local_cluster(1)
  expect_snapshot({
    show_error(clusterLapply(1:4, cl, sqrt))
    show_error(clusterLapplyAsync(1:4, cl, sqrt))
    show_error(clusterLapply(cl, sqrt, 1:4))
  })
})
