watch_processes()

# Hosts as installOnHosts() hands them to sendSource().
hosts_of <- function(ssh, hosts, ...) {
  lapply(hosts, function(host) list(host = host, rshcmd = ssh$rshcmd, local = FALSE, ...))
}

# The package's source with one file edited.
edited_source <- function(file, edit) {
  source <- system.file("source", "rustcluster.tar.gz", package = "rustcluster")
  dir <- tempfile("source-")
  utils::untar(source, exdir = dir, tar = "internal")
  path <- file.path(dir, file)
  writeLines(edit(readLines(path)), path)
  made <- tempfile("source-", fileext = ".tar.gz")
  here <- setwd(dir)
  on.exit({
    setwd(here)
    unlink(dir, recursive = TRUE)
  }, add = TRUE, after = FALSE)
  utils::tar(made, list.files(recursive = TRUE), compression = "gzip", tar = "internal")
  made
}

test_that("an invalid argument is an error that names it", {
  expect_bad <- function(argument, ...) {
    error <- caught(installOnHosts(...))
    expect_rust_error(error, "bad_argument")
    expect_identical(error$argument, argument)
  }
  expect_bad("spec", list())
  expect_bad("spec", "-oProxyCommand=x")
  expect_bad("usr", "h1", usr = "me")
  expect_bad("...", "h1", "me")
  expect_bad("rlibs", "h1", rlibs = character())
  expect_bad("timeout", "h1", timeout = 0)
  expect_bad("progress", "h1", progress = 1)
})

test_that("this machine is skipped", {
  report <- installOnHosts(c("localhost", "localhost"))
  expect_identical(nrow(report), 1L)
  expect_identical(report$problem, NA_character_)
  expect_identical(report$version, as.character(utils::packageVersion("rustcluster")))
})

test_that("a host that cannot be reached or written to is an error with a remedy", {
  skip_without_sshd()
  ssh <- local_sshd()
  error <- caught(installOnHosts(
    list(
      list(host = "no-such-host.invalid", ncore = 3), list(host = "127.0.0.2", ncore = 1),
      list(host = "127.0.0.2", ncore = 2, threads = 2)
    ),
    rshcmd = ssh$rshcmd, rlibs = "/proc/nowhere"
  ))
  expect_rust_error(error, "install_failed")
  expect_identical(error$host, c("no-such-host.invalid", "127.0.0.2"))
  expect_match(conditionMessage(error), "cannot be resolved")
  expect_match(conditionMessage(error), "`rlibs`")
  expect_identical(nrow(error$report), 2L)
})

test_that("a missing or old toolchain is an error with a remedy", {
  skip_without_sshd()
  ssh <- local_sshd()
  source <- edited_source("DESCRIPTION", function(lines) sub("rustc \\(>= [0-9.]+", "rustc (>= 99.0", lines))
  library <- tempfile("it's a library-")
  on.exit(unlink(c(library, source), recursive = TRUE), add = TRUE, after = FALSE)
  report <- rustcluster:::sendSource(
    hosts_of(ssh, c("127.0.0.2", "127.0.0.3"), rlibs = library), source, 600, FALSE
  )
  expect_match(report$problem, "cargo and rustc, version 99.0 or newer, are missing there")
  expect_match(report$problem, "apt-get install")
  expect_identical(basename(report$library), rep(basename(library), 2))
})

test_that("the error of a failed installation contains the end of its output", {
  skip_without_sshd()
  ssh <- local_sshd()
  source <- edited_source("configure", function(lines) c("#!/bin/sh", "echo this is 100% wrong", "exit 3"))
  library <- tempfile("library-")
  on.exit(unlink(c(library, source), recursive = TRUE), add = TRUE, after = FALSE)
  expect_message(
    report <- rustcluster:::sendSource(hosts_of(ssh, "127.0.0.2", rlibs = library), source, 600, TRUE),
    "R CMD INSTALL ended with status 1"
  )
  expect_match(report$problem, "configuration failed")
})

test_that("an installation that exceeds `timeout` is an error", {
  skip_without_sshd()
  ssh <- local_sshd()
  slow <- file.path(ssh$dir, "slow")
  writeLines(c("#!/bin/sh", "sleep 100"), slow)
  Sys.chmod(slow, "0755")
  source <- system.file("source", "rustcluster.tar.gz", package = "rustcluster")
  report <- rustcluster:::sendSource(hosts_of(ssh, "127.0.0.2", rscript = slow), source, 1, FALSE)
  expect_match(report$problem, "timeout")
})

test_that("a host on which it was installed can be used", {
  skip_unless_long()
  skip_without_sshd()
  ssh <- local_sshd()
  library <- tempfile("library-")
  on.exit(unlink(library, recursive = TRUE), add = TRUE, after = FALSE)
  report <- installOnHosts("127.0.0.2", rshcmd = ssh$rshcmd, rlibs = library)
  expect_identical(report$problem, NA_character_)
  expect_identical(report$library, normalizePath(library))
  cl <- local_cluster(c("127.0.0.2" = 2), rshcmd = ssh$rshcmd, rlibs = library)
  where <- clusterCall(cl, function() dirname(getNamespaceInfo("rustcluster", "path")))
  expect_identical(where, rep(list(normalizePath(library)), 2))
})

test_that("no process is left", {
  expect_no_leftovers()
})
