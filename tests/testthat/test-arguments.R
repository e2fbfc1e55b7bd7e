# Wrong arguments are errors that name the argument; right ones of
# makePSOCKcluster are accepted.

watch_processes()

expect_bad_argument <- function(expr, argument) {
  before <- if (dir.exists("/proc")) descendants() else integer()
  error <- caught(expr)
  expect_rust_error(error, "bad_argument")
  expect_identical(error$argument, argument)
  expect_match(conditionMessage(error), argument, fixed = TRUE)
  if (dir.exists("/proc")) expect_identical(setdiff(descendants(), before), integer())
  invisible(error)
}

test_that("an invalid spec is an error that names `spec`", {
  for (spec in list(
    0, 0L, -1, NA, NA_integer_, NaN, Inf, 1e9, 2^31, 0.5, list(), character(), integer(), NULL,
    TRUE, "", NA_character_, c("localhost", NA), c("localhost", ""), "2", quote(x), sum, 2i
  )) {
    expect_bad_argument(makeRustCluster(spec), "spec")
  }
})

test_that("messages of errors about spec", {
  expect_snapshot({
    show_error(makeRustCluster(0))
    show_error(makeRustCluster(-1))
    show_error(makeRustCluster(NA))
    show_error(makeRustCluster(1e9))
    show_error(makeRustCluster(list()))
    show_error(makeRustCluster(character()))
    show_error(makeRustCluster(NULL))
    show_error(makeRustCluster(TRUE))
  })
})

test_that("an unknown argument is an error that names it", {
  error <- caught(makeRustCluster(2, noSuchArgument = 1))
  expect_rust_error(error, "bad_argument")
  expect_match(conditionMessage(error), "noSuchArgument", fixed = TRUE)
  error <- caught(makeRustCluster(2, first = 1, second = 2))
  expect_match(conditionMessage(error), "first", fixed = TRUE)
  expect_match(conditionMessage(error), "second", fixed = TRUE)
  expect_rust_error(caught(makeRustCluster(2, NULL, NULL, "fork", 1L, 99, 98, 97)), "bad_argument")
  expect_snapshot({
    show_error(makeRustCluster(2, noSuchArgument = 1))
    show_error(makeRustCluster(2, first = 1, second = 2))
  })
})

test_that("an unknown argument that is a typing error of a known one gets a hint", {
  hint <- function(...) {
    text <- conditionMessage(caught(makeRustCluster(...)))
    if (grepl("did you mean", text)) sub(".*did you mean (.*)[?]$", "\\1", text) else ""
  }
  expect_identical(hint(2, packagse = "stats"), "`packages`")
  expect_identical(hint(2, package = "stats"), "`packages`")
  expect_identical(hint(workers = 2), "`spec`")
  expect_identical(hint(2, retry = 1), "`retries`")
  expect_identical(hint(2, Timeout = 1), "`timeout`")
  expect_identical(hint(2, outfiel = ""), "`outfile`")
  expect_identical(hint(2, memory = 1e9), "`memory_limit`")
  expect_identical(hint(2, reconnekt = TRUE, nothing = 1), "`reconnect`")
  for (name in c("first", "nothing", "x", "log", "seed", "set", "globals", "rest", "spread", "debug", "verbose")) {
    expect_identical(do.call(hint, structure(list(2, 1), names = c("", name))), "", info = name)
  }
  expect_snapshot({
    show_error(makeRustCluster(2, packagse = "stats"))
    show_error(makeRustCluster(2, packagse = "stats", retry = 1))
  })
})

test_that("an invalid number of workers is named by its host", {
  expect_snapshot({
    show_error(makeRustCluster(c(node1 = 64, node2 = "a")))
    show_error(makeRustCluster(c(node1 = 64, node2 = NA)))
    show_error(makeRustCluster(c(node1 = 0)))
    show_error(makeRustCluster(c(node1 = 1, "b")))
    show_error(makeRustCluster(c(node1 = "64")))
    show_error(makeRustCluster("64"))
    show_error(makeRustCluster(list(list(host = "node1", ncore = "many"))))
    show_error(makeRustCluster(list(list(host = "node1", threads = 0))))
  })
})

test_that("an invalid argument is an error that names it", {
  expect_bad_argument(makeRustCluster(2, start_method = "thread"), "start_method")
  expect_bad_argument(makeRustCluster(2, start_method = NA), "start_method")
  expect_bad_argument(makeRustCluster(2, threads = 0), "threads")
  expect_bad_argument(makeRustCluster(2, threads = NA), "threads")
  expect_bad_argument(makeRustCluster(2, threads = "two"), "threads")
  expect_bad_argument(makeRustCluster(2, threads = c(1, 2)), "threads")
  expect_bad_argument(makeRustCluster(2, packages = 1), "packages")
  expect_bad_argument(makeRustCluster(2, packages = NA_character_), "packages")
  expect_bad_argument(makeRustCluster(2, rscript_envs = 1), "rscript_envs")
  expect_bad_argument(makeRustCluster(2, outfile = 1), "outfile")
  expect_bad_argument(makeRustCluster(2, outfile = c("a", "b")), "outfile")
  expect_bad_argument(makeRustCluster(2, outfile = NA_character_), "outfile")
  expect_bad_argument(makeRustCluster(2, setup_timeout = "soon"), "setup_timeout")
  expect_bad_argument(makeRustCluster(2, setup_timeout = -1), "setup_timeout")
  expect_bad_argument(makeRustCluster(2, setup_timeout = NA), "setup_timeout")
  expect_bad_argument(makeRustCluster(2, methods = NA), "methods")
  expect_bad_argument(makeRustCluster(2, methods = "no"), "methods")
  expect_bad_argument(makeRustCluster(2, renice = "very"), "renice")
  expect_bad_argument(makeRustCluster(2, rscript_args = 1), "rscript_args")
  expect_snapshot({
    show_error(makeRustCluster(2, start_method = "thread"))
    show_error(makeRustCluster(2, threads = 0))
    show_error(makeRustCluster(2, packages = 1))
    show_error(makeRustCluster(2, rscript_envs = 1))
    show_error(makeRustCluster(2, outfile = 1))
    show_error(makeRustCluster(2, setup_timeout = "soon"))
  })
})

test_that("an invalid argument about failures and limits is an error that names it", {
  wrong <- list(
    retries = list(-1, NA, NaN, Inf, "two", 1:2, NULL, TRUE, list(1), 1e7),
    timeout = list(0, -1, NA, NaN, -Inf, "soon", 1:2, NULL, 1e10, 1e-9),
    setup_log_limit = list(-1, NA, "much", 1:2, Inf, FALSE),
    stop_timeout = list(-1, NA, "long", 1:2, Inf, FALSE),
    buffer_limit = list(0, 1, -1, NA, "much", c(2^20, 2^20), NULL, Inf),
    reconnect = list(NA, 1, "yes", NULL, c(TRUE, FALSE))
  )
  for (argument in names(wrong)) {
    for (value in wrong[[argument]]) {
      arguments <- c(list(2), setNames(list(value), argument))
      expect_bad_argument(do.call(makeRustCluster, arguments), argument)
    }
  }
  expect_snapshot({
    show_error(makeRustCluster(2, retries = -1))
    show_error(makeRustCluster(2, timeout = 0))
    show_error(makeRustCluster(2, setup_log_limit = -1))
    show_error(makeRustCluster(2, buffer_limit = 1))
    show_error(makeRustCluster(2, reconnect = NA))
  })
})

# Deprecated names of arguments -------------------------------------------------------------------------

renamed <- c(
  patience = "heartbeat_timeout", keep_limit = "setup_log_limit", start = "start_method", onFailure = "on_failure"
)

# The session has not warned of any old name.
forget_deprecations <- function() {
  shown <- rustcluster:::deprecationsShown
  rm(list = ls(shown), envir = shown)
}

# Calls makeRustCluster() with a spec that is refused after all other arguments, so that no cluster is started. Returns
# the warnings and the error.
without_start <- function(...) {
  warnings <- list()
  error <- caught(withCallingHandlers(
    makeRustCluster(list(list(host = "localhost", ncore = 1, bogus = 1)), ...),
    warning = function(w) {
      warnings <<- c(warnings, list(w))
      invokeRestart("muffleWarning")
    }
  ))
  list(warnings = warnings, error = error)
}

test_that("an argument is accepted by its old name, with a deprecation warning once a session", {
  forget_deprecations()
  for (old in names(renamed)) {
    value <- list(patience = 10, keep_limit = NULL, start = "spawn", onFailure = "warn")[old]
    first <- do.call(without_start, value)
    expect_identical(first$error$argument, "spec")
    expect_length(first$warnings, 1L)
    warning <- first$warnings[[1L]]
    expect_s3_class(warning, c("rustcluster_deprecated", "rustcluster_warning", "deprecatedWarning"), exact = FALSE)
    expect_identical(warning[c("old", "new", "package")], list(old = old, new = renamed[[old]], package = "rustcluster"))
    again <- do.call(without_start, value)
    expect_identical(again$error$argument, "spec")
    expect_length(again$warnings, 0L)
  }
  forget_deprecations()
  all <- without_start(patience = 10, keep_limit = 1e6, start = "fork", onFailure = "error")
  expect_identical(vapply(all$warnings, `[[`, "", "old"), names(renamed))
  expect_snapshot({
    forget_deprecations()
    for (warning in without_start(patience = 10, keep_limit = 1e6, start = "fork", onFailure = "error")$warnings) {
      cat(conditionMessage(warning), "\n")
    }
  })
})

test_that("a value that is given by an old name is checked, and the error names the new one", {
  suppressWarnings({
    expect_bad_argument(makeRustCluster(2, patience = 0), "heartbeat_timeout")
    expect_bad_argument(makeRustCluster(2, patience = NULL), "heartbeat_timeout")
    expect_bad_argument(makeRustCluster(2, keep_limit = -1), "setup_log_limit")
    expect_bad_argument(makeRustCluster(2, start = "thread"), "start_method")
    expect_bad_argument(makeRustCluster(2, onFailure = "maybe"), "on_failure")
    expect_bad_argument(makeRustCluster(list(list(host = "localhost", start = "thread"))), "spec[[1]]$start_method")
  })
})

test_that("an argument that is given by both of its names is an error that names both", {
  for (old in names(renamed)) {
    new <- renamed[[old]]
    for (arguments in list(c(old, new), c(new, old), c(old, old))) {
      error <- caught(do.call(makeRustCluster, c(list(2), structure(list("x", "x"), names = arguments))))
      expect_rust_error(error, "bad_argument")
      expect_identical(error$argument, new)
      expect_match(conditionMessage(error), paste0("`", old, "`"), fixed = TRUE)
      expect_match(conditionMessage(error), paste0("`", new, "`"), fixed = TRUE)
    }
  }
  both <- list(host = "localhost", start = "fork", start_method = "fork")
  expect_bad_argument(makeRustCluster(list(both)), "spec[[1]]$start_method")
  expect_snapshot({
    show_error(makeRustCluster(2, patience = 10, heartbeat_timeout = 10))
    show_error(makeRustCluster(list(both)))
  })
})

test_that("arguments after spec and type are named in full, by their new and by their old names", {
  for (name in c("heartbeat", "pat", "setup_log", "keep", "on_fail", "onF", "start_m", "star", "startMethod")) {
    result <- do.call(without_start, structure(list(1), names = name))
    expect_identical(result$error$argument, name)
    expect_match(conditionMessage(result$error), "unknown argument", fixed = TRUE)
    expect_length(result$warnings, 0L)
  }
  expect_identical(without_start("RUST", "fork")$error$argument, "...")
  partial <- list(host = "localhost", sta = "spawn")
  expect_bad_argument(makeRustCluster(list(partial)), "spec")
})

test_that("where warnings are errors, a deprecated argument is an error in each call, and nothing is started", {
  forget_deprecations()
  old <- options(warn = 2)
  on.exit(options(old), add = TRUE, after = FALSE)
  before <- if (dir.exists("/proc")) descendants() else integer()
  for (call in 1:2) expect_error(makeRustCluster(2, patience = 10), "`patience` is deprecated", fixed = TRUE)
  if (dir.exists("/proc")) expect_identical(setdiff(descendants(), before), integer())
  options(old)
  expect_length(without_start(patience = 10)$warnings, 1L)
  expect_length(without_start(patience = 10)$warnings, 0L)
})

test_that("old names have the effect of the new ones", {
  skip_on_cran()
  settings <- function(cl) {
    handle <- cl[[1L]][["handle"]]
    list(method = handle$agents[[1L]]$start_method, limit = handle$setupLogLimits)
  }
  suppressWarnings({
    cl <- local_cluster(2, start = "spawn", keep_limit = 5e6, patience = 10, onFailure = "warn")
    expect_identical(settings(cl), list(method = "spawn", limit = 5e6))
    expect_identical(clusterCall(cl, function() "up"), list("up", "up"))
    # The number of workers that are left out shows that a failed host is no error.
    bad <- list(host = "127.0.0.1", ncore = 1, rscript = "/no/such/Rscript")
    cl <- local_cluster(list(list(host = "localhost", ncore = 2, start = "spawn"), bad), onFailure = "warn")
    expect_length(cl, 2L)
    expect_identical(settings(cl)$method, "spawn")
  })
})

bytes <- function() {
  text <- "h\xffst"
  Encoding(text) <- "bytes"
  text
}

# Of a class that has methods for what a check may ask, and these fail.
hostile <- function(x) {
  never <- function(...) stop("a method of the argument's class was called")
  for (generic in c("length", "is.na", "[[", "format", "as.character", "Ops")) {
    registerS3method(generic, "hostile", never, environment())
  }
  structure(x, class = "hostile")
}

# Values that hardly any argument takes. `but`: the names of those that this one does.
wrong_values <- function(...) {
  values <- list(
    none = NULL, na = NA, text_na = NA_character_, number_na = NA_real_, nan = NaN, inf = Inf, true = TRUE,
    zero = 0, minus = -1, half = 0.5, many = 1e300, numbers = c(1, 2), no_numbers = numeric(), no_texts = character(),
    no_flags = logical(), text = "x", texts = c("a", "b"), empty = "", list = list(1), no_list = list(), fun = sum,
    name = quote(x), call = quote(f(x)), environment = new.env(), formula = y ~ x, complex = 1i, raw = as.raw(1),
    bytes = bytes(), invalid = "h\xffst", date = Sys.Date(), factor = factor("a"),
    time = as.difftime(1, units = "secs"), frame = data.frame(a = 1), matrix = matrix(1:4, 2),
    expression = expression(a), hostile_number = hostile(-5), hostile_text = hostile("-x y"), hostile_list = hostile(list(2))
  )
  values[setdiff(names(values), c(...))]
}

expect_all_bad <- function(call, argument, values) {
  for (name in names(values)) {
    error <- caught(call(values[[name]]))
    is_bad <- inherits(error, "rustcluster_bad_argument") && identical(error$argument, argument)
    expect(is_bad, if (is_bad) "" else {
      paste0("`", argument, "`, ", name, ": ", if (is.null(error)) "accepted" else {
        paste(class(error)[[1L]], conditionMessage(error))
      })
    })
  }
}

test_that("any invalid value of an argument of makeRustCluster() is a classed error that names the argument", {
  before <- if (dir.exists("/proc")) descendants() else integer()
  texts <- c("text", "texts", "empty", "no_texts", "none")
  takes <- list(
    packages = c(texts[-3], "none"), rscript_envs = c(texts[-3], "none", "no_list"), start_method = c("texts", "none"),
    threads = c("half", "true", "many"), memory_limit = c("inf", "many"), on_failure = "none",
    heartbeat_timeout = character(), retries = "zero", timeout = c("inf", "half"), reconnect = "true",
    buffer_limit = character(), setup_log_limit = c("zero", "half", "none"),
    progress = "true", install = "true", outfile = c("text", "empty", "none"), rscript = "text", rscript_args = texts,
    type = character(),
    homogeneous = "true", methods = "true", manual = "true", renice = c("na", "text_na", "number_na", "nan", "zero", "minus", "half", "none"),
    rlibs = texts, setup_timeout = c("inf", "many", "half"), user = texts[-2], rshcmd = texts, rshopts = texts
  )
  for (argument in names(takes)) {
    call <- function(value) {
      arguments <- list(2)
      arguments[argument] <- list(value)
      # What is not refused is refused here: no cluster is to be started.
      do.call(makeRustCluster, c(list(list(list(host = "localhost", ncore = 1, bogus = 1))), arguments[argument]), quote = TRUE)
    }
    values <- wrong_values(takes[[argument]], if (argument %in% c("user", "rshcmd", "rshopts")) c(
      "na", "text_na", "number_na", "nan", "no_numbers", "no_flags", "no_list"
    ))
    if (argument == "renice") values$hostile_number <- hostile(99)
    if (argument == "rlibs") values <- values[setdiff(names(values), "hostile_text")]
    if (argument %in% c("packages", "rscript_args", "rshcmd", "rshopts", "outfile", "rscript")) {
      values <- values[setdiff(names(values), "hostile_text")]
    }
    expect_all_bad(call, argument, values)
  }
  takes <- list(
    host = "text", user = "text", ncore = c("half", "true"), port = c("half", "true"), rscript = "text",
    rlibs = c("text", "texts"), rshcmd = c("text", "texts"), rshopts = c("text", "texts"),
    rscript_envs = c("text", "texts", "no_texts", "no_list"), threads = c("half", "true"),
    renice = c("zero", "minus", "half"), start_method = character()
  )
  for (setting in names(takes)) {
    call <- function(value) {
      entry <- list(host = "localhost", ncore = 1, port = 1)
      entry[setting] <- list(value)
      rustcluster:::specHosts(list(entry))
    }
    # Not made: the default counts.
    unset <- if (setting != "host") c("none", "na", "text_na", "number_na", "nan")
    values <- wrong_values(takes[[setting]], unset, "hostile_list")
    if (setting == "renice") values <- values[setdiff(names(values), "hostile_number")]
    if (setting %in% c("rscript", "rlibs", "rshcmd", "rshopts")) values <- values[setdiff(names(values), "hostile_text")]
    argument <- if (setting == "host") c("spec", "spec[[1]]$host") else paste0("spec[[1]]$", setting)
    for (name in names(values)) {
      error <- caught(call(values[[name]]))
      is_bad <- inherits(error, "rustcluster_bad_argument") && error$argument %in% argument
      expect(is_bad, paste0(setting, ", ", name, ": ", if (is.null(error)) "accepted" else conditionMessage(error)))
    }
  }
  call <- function(value) rustcluster:::specHosts(value)
  expect_all_bad(call, "spec", wrong_values("half", "numbers", "matrix", "text", "texts", "hostile_number")[-1])
  for (name in list(bytes(), "h\xffst", "", NA)) expect_bad_argument(makeRustCluster(structure(2, names = name)), "spec")
  for (name in list(bytes(), "1a", "a b")) {
    expect_bad_argument(makeRustCluster(2, rscript_envs = structure("v", names = name)), "rscript_envs")
  }
  if (dir.exists("/proc")) expect_identical(setdiff(descendants(), before), integer())
})

test_that("any invalid value of an argument of other functions is a classed error that names the argument", {
  skip_on_cran()
  cl <- local_cluster(2)
  texts <- c("text", "texts")
  of <- function(fun, argument, takes, ..., named = argument) {
    call <- function(value) {
      arguments <- list(...)
      arguments[argument] <- list(value)
      do.call(fun, arguments, quote = TRUE)
    }
    expect_all_bad(call, named, wrong_values(takes))
  }
  for (fun in list(clusterPids, agentPids, clusterAlive, clusterHosts, clusterStatus, clusterTimeline)) of(fun, "cl", character())
  for (fun in list(clusterLapply, clusterLapplyAsync)) {
    of(fun, "cl", character(), X = 1:2, FUN = sqrt)
    of(fun, "FUN", "fun", cl = cl, X = 1:2)
    of(fun, ".seed", c("true", "zero", "minus", "none", "hostile_number"), cl = cl, X = 1:2, FUN = sqrt)
  }
  of(clusterLapply, ".progress", "true", cl = cl, X = 1:2, FUN = sqrt)
  of(clusterLapply, ".timeout", c("inf", "half"), cl = cl, X = 1:2, FUN = sqrt)
  of(clusterLapply, ".retries", c("zero", "none"), cl = cl, X = 1:2, FUN = sqrt)
  of(clusterLapply, ".order", c("numbers", "none"), cl = cl, X = 1:2, FUN = sqrt)
  of(clusterLapply, ".onResult", c("fun", "none"), cl = cl, X = 1:2, FUN = sqrt)
  of(clusterLapply, ".errors", "none", cl = cl, X = 1:2, FUN = sqrt)
  of(clusterSubmit, "cl", character(), expr = 1)
  of(clusterSubmit, ".packages", c("none", "no_texts", texts, "hostile_text"), cl = cl, expr = 1)
  of(clusterSubmit, ".envir", "environment", cl = cl, expr = 1)
  of(clusterStatus, "memory", "true", cl = cl)
  of(clusterStatus, "timeout", c("zero", "half"), cl = cl)
  of(installOnHosts, "hosts", c(texts, "half", "numbers", "matrix", "hostile_number"))
  of(installOnHosts, "user", "text", hosts = "localhost")
  of(installOnHosts, "rscript", c("text", "hostile_text"), hosts = "localhost")
  for (argument in c("rshcmd", "rshopts", "rlibs")) {
    of(installOnHosts, argument, c(texts, "hostile_text"), hosts = "localhost")
  }
  of(installOnHosts, "timeout", c("half", "inf", "many"), hosts = "localhost")
  of(installOnHosts, "progress", "true", hosts = "localhost")
  of(print, "n", c("zero", "half", "inf", "many"), clusterStatus(cl))
  for (fun in list(clusterPids, agentPids, clusterAlive, clusterHosts, clusterStatus, clusterTimeline)) {
    expect_bad_argument(fun(), "cl")
  }
  for (fun in list(clusterLapply, clusterLapplyAsync)) {
    expect_bad_argument(fun(cl, FUN = sqrt), "X")
    expect_bad_argument(fun(cl, 1:2), "FUN")
  }
  expect_bad_argument(installOnHosts(), "hosts")
  # What names a function is looked for where the caller is, as by match.fun().
  twice <- function(x) 2 * x
  expect_identical(clusterLapply(cl, 1:2, "twice"), list(2, 4))
  expect_identical(clusterLapply(cl, 1:2, twice), list(2, 4))
  c <- 1
  expect_identical(clusterLapply(cl, 1:2, c), list(1L, 2L))
  for (i in list(as.raw(1), list(1), sum, quote(x))) expect_bad_argument(cl[i], "i")
})

test_that("an rscript that does not exist or is not Rscript is an error with the reason", {
  skip_on_cran()
  error <- caught(makeRustCluster(2, rscript = "/no/such/Rscript"))
  expect_s3_class(error, "rustcluster_error")
  expect_match(conditionMessage(error), "/no/such/Rscript", fixed = TRUE)
  # Ends at once, and its own words are in the message.
  failing <- tempfile()
  writeLines(c("#!/bin/sh", "echo 'licence has expired: 100%s' >&2", "exit 3"), failing)
  Sys.chmod(failing, "755")
  error <- caught(makeRustCluster(2, rscript = failing))
  expect_s3_class(error, "rustcluster_error")
  expect_match(conditionMessage(error), "licence has expired: 100%s", fixed = TRUE)
  # Says nothing for ever: setup_timeout ends it, and it is not left behind.
  silent <- tempfile()
  mark <- tempfile()
  writeLines(c("#!/bin/sh", sprintf("echo $$ >%s", mark), "exec sleep 300"), silent)
  Sys.chmod(silent, "755")
  error <- caught(makeRustCluster(2, rscript = silent, setup_timeout = 1))
  expect_s3_class(error, "rustcluster_error")
  if (dir.exists("/proc")) expect_gone(as.integer(readLines(mark)))
  # Talks, but not our language.
  chatty <- tempfile()
  writeLines(c("#!/bin/sh", "head -c 200000 /dev/urandom; sleep 300"), chatty)
  Sys.chmod(chatty, "755")
  error <- caught(makeRustCluster(2, rscript = chatty, setup_timeout = 2))
  expect_s3_class(error, "rustcluster_error")
})

test_that("all arguments of makePSOCKcluster() are accepted", {
  skip_on_cran()
  cl <- local_cluster(
    2,
    port = 11234, setup_timeout = 60, timeout = 3600, setup_strategy = "parallel",
    master = "localhost", homogeneous = TRUE, type = "PSOCK", outfile = "/dev/null",
    rscript = file.path(R.home("bin"), "Rscript"), rscript_args = character(),
    user = NULL, rshcmd = "ssh", manual = FALSE, methods = TRUE, renice = NA_integer_,
    rhome = R.home(), rlibs = "", scriptdir = "", rprog = "R", snowlib = .libPaths()[1],
    useRscript = TRUE, useXDR = FALSE
  )
  expect_equal(clusterCall(cl, identity, 1), list(1, 1))
  # All of those that this R knows, with R's own defaults.
  options <- as.list(get("defaultClusterOptions", asNamespace("parallel")))
  stopCluster(cl)
  cl <- do.call(local_cluster, c(list(2), options, list(.frame = environment())))
  expect_equal(clusterCall(cl, identity, 2), list(2, 2))
})

test_that("NULL for outfile and rscript_args has parallel's meaning: output is shown, and no arguments", {
  skip_on_cran()
  # The output of workers of PSOCK goes to the terminal, and so does that of ours.
  script <- function(make) sprintf(
    "cl <- %s(1, outfile = NULL, rscript_args = NULL); x <- parallel::clusterCall(cl, cat, 'told\\n'); parallel::stopCluster(cl)",
    make
  )
  said <- function(make) {
    lines <- suppressWarnings(system2(
      file.path(R.home("bin"), "Rscript"), c("-e", shQuote(script(make))), stdout = TRUE, stderr = TRUE
    ))
    sum(endsWith(lines, "told"))
  }
  expect_identical(said("parallel::makePSOCKcluster"), 1L)
  expect_identical(said("rustcluster::makeRustCluster"), 1L)
})

test_that("a type that makeCluster() does not know is an error, as there", {
  expect_error(parallel::makeCluster(1, type = "blah"))
  error <- expect_bad_argument(makeRustCluster(1, type = "blah"), "type")
  expect_match(conditionMessage(error), "\"PSOCK\"", fixed = TRUE)
  for (type in c("PSOCK", "FORK", "SOCK", "MPI", "RUST")) {
    error <- caught(makeRustCluster(list(list(host = "localhost", bogus = 1)), type = type))
    expect_identical(error$argument, "spec")
  }
})

test_that("all forms of spec are accepted", {
  skip_on_cran()
  expect_length(local_cluster(1), 1L)
  expect_length(local_cluster(2L), 2L)
  # As with PSOCK: the first of several numbers, and the whole part of it.
  expect_length(local_cluster(c(2, 3)), 2L)
  expect_length(local_cluster(2.9), 2L)
  expect_length(local_cluster("localhost"), 1L)
  expect_length(local_cluster(rep("localhost", 3)), 3L)
  expect_length(local_cluster(spec = 2), 2L)
  expect_length(local_cluster(2, type = "RUST"), 2L)
})

test_that("the default number of workers is the number of usable cores", {
  skip_on_cran()
  skip_if(parallel::detectCores() > 64L)
  cl <- local_cluster()
  expect_gte(length(cl), 1L)
  expect_lte(length(cl), parallel::detectCores())
  skip_if_not(requireNamespace("parallelly", quietly = TRUE))
  expect_length(cl, as.integer(parallelly::availableCores()))
})

test_that("clusterPids() and agentPids() refuse other clusters", {
  for (x in list(NULL, 1, list(), structure(list(), class = c("SOCKcluster", "cluster")))) {
    expect_rust_error(caught(clusterPids(x)), "bad_argument")
    expect_rust_error(caught(agentPids(x)), "bad_argument")
  }
})

test_that("no process is left", {
  skip_unless_proc()
  expect_no_leftovers()
})
