watch_processes()

# Hosts as installOnHosts() hands them to installOn().
hosts_of <- function(ssh, hosts, ...) {
  lapply(hosts, function(host) list(host = host, rshcmd = ssh$rshcmd, local = FALSE, ...))
}

install_on <- function(...) rustcluster:::installOn(...)
installed_package <- function() rustcluster:::installedPackage()

# Starts an sshd whose hosts do not search the libraries of this machine, which may have this build. Debian's R sets
# R_LIBS_SITE in the site's file, whose path is R_ENVIRON.
install_sshd <- function(.frame = parent.frame()) {
  local_sshd(.frame, config = "SetEnv R_ENVIRON=/dev/null R_LIBS_SITE=/nowhere R_LIBS_USER=/nowhere")
}

# A library that does not exist yet, and is removed with the calling frame.
new_library <- function(.frame = parent.frame()) {
  library <- tempfile("it's a library-")
  do.call("on.exit", list(bquote(unlink(.(library), recursive = TRUE)), add = TRUE, after = TRUE), envir = .frame)
  library
}

content_of <- function(library) list.files(library, all.files = TRUE, no.. = TRUE)

# A package that this session could have: a copy of the installed one, which `edit` changes. Hosts find no toolchain for
# it.
edited_package <- function(edit, .frame = parent.frame()) {
  dir <- new_library(.frame)
  dir.create(dir)
  file.copy(installed_package()$path, dir, recursive = TRUE)
  path <- file.path(dir, "rustcluster")
  edit(path)
  writeLines("another build", file.path(path, "source", "build"))
  utils::modifyList(installed_package(), list(path = path, build = "another build", needs_rust = "99.0"))
}

break_library <- function(path) writeLines("no library", file.path(path, "libs", "rustcluster.so"))

# A package of another kind than that of any host.
other_kind <- function(package, needs_rust = package$needs_rust) {
  utils::modifyList(package, list(r = "9.9", needs_rust = needs_rust))
}

# The package with one file of its source edited.
edited_source <- function(file, edit, .frame = parent.frame()) {
  edited_package(function(path) {
    tar <- file.path(path, "source", "rustcluster.tar.gz")
    dir <- tempfile("source-")
    utils::untar(tar, exdir = dir, tar = "internal")
    writeLines(edit(readLines(file.path(dir, file))), file.path(dir, file))
    here <- setwd(dir)
    utils::tar(tar, list.files(recursive = TRUE), compression = "gzip", tar = "internal")
    setwd(here)
    unlink(dir, recursive = TRUE)
  }, .frame)
}

# Makes a folder of its own file system, with these options of mount, until the calling frame ends.
local_mount <- function(options, .frame = parent.frame()) {
  if (Sys.info()[["effective_user"]] != "root") skip("mounts take root")
  dir <- new_library(.frame)
  dir.create(dir)
  status <- system2("mount", c("-t", "tmpfs", "-o", options, "tmpfs", shQuote(dir)), stderr = FALSE)
  if (status != 0L) skip("a tmpfs cannot be mounted")
  do.call("on.exit", list(bquote(system2("umount", shQuote(.(dir)))), add = TRUE, after = FALSE), envir = .frame)
  dir
}

test_that("an invalid argument is an error that names it", {
  expect_bad <- function(argument, ...) {
    error <- caught(installOnHosts(...))
    expect_rust_error(error, "bad_argument")
    expect_identical(error$argument, argument)
  }
  expect_bad("hosts", list())
  expect_bad("hosts", NULL)
  expect_bad("hosts", "-oProxyCommand=x")
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
  expect_identical(report$how, "already there")
})

test_that("a host that cannot be reached or written to is an error with a remedy", {
  skip_without_sshd()
  ssh <- install_sshd()
  error <- caught(installOnHosts(
    list(
      list(host = "no-such-host.invalid", ncore = 3), list(host = "127.0.0.2", ncore = 1),
      list(host = "127.0.0.2", ncore = 2, threads = 2), list(host = "127.0.0.3", rscript = "/no/Rscript")
    ),
    rshcmd = ssh$rshcmd, rlibs = "/proc/nowhere"
  ))
  expect_rust_error(error, "install_failed")
  expect_identical(error$host, c("no-such-host.invalid", "127.0.0.2", "127.0.0.3"))
  expect_match(error$report$problem[[1L]], "cannot be resolved")
  expect_match(
    caught(installOnHosts("127.0.0.2", rshcmd = "no-such-ssh -v"))$report$problem,
    "the command that connects to the host cannot be run on this machine: install ssh, or check `rshcmd` .*no-such-ssh"
  )
  expect_match(error$report$problem[[2L]], "/proc/nowhere cannot be created.*`rlibs`")
  expect_match(error$report$problem[[3L]], "Rscript was not found on the host")
  expect_identical(nrow(error$report), 3L)
})

test_that("a host of this machine's kind gets a copy, once, and can be used", {
  skip_without_sshd()
  ssh <- install_sshd()
  library <- new_library()
  install <- function() installOnHosts("127.0.0.2", rshcmd = ssh$rshcmd, rlibs = library, progress = TRUE)
  expect_message(report <- install(), "copied from this machine")
  expect_identical(report[c("how", "from")], data.frame(how = "copied", from = "localhost"))
  expect_identical(report$problem, NA_character_)
  expect_identical(report$library, normalizePath(library))
  expect_identical(content_of(library), "rustcluster")
  path <- installed_package()$path
  files <- list.files(path, recursive = TRUE, all.files = TRUE)
  copies <- file.path(library, "rustcluster", files)
  expect_identical(unname(tools::md5sum(copies)), unname(tools::md5sum(file.path(path, files))))
  expect_identical(file.mode(copies), file.mode(file.path(path, files)))
  expect_message(again <- install(), "already there")
  expect_identical(again[c("how", "from")], data.frame(how = "already there", from = NA_character_))
  # A library elsewhere that R searches will do.
  elsewhere <- installOnHosts("127.0.0.2", rshcmd = ssh$rshcmd, rlibs = c(new_library(), library))
  expect_identical(elsewhere[c("how", "library")], data.frame(how = "already there", library = normalizePath(library)))

  cl <- local_cluster(c("127.0.0.2" = 1), rshcmd = ssh$rshcmd, rlibs = library, packages = "stats4")
  where <- clusterCall(cl, function() dirname(getNamespaceInfo("rustcluster", "path")))
  expect_identical(where, list(normalizePath(library)))
  # R alone is sufficient on a host.
  known <- c(rownames(installed.packages(.Library, priority = "base")), "rustcluster")
  expect_identical(setdiff(clusterCall(cl, loadedNamespaces)[[1L]], known), character())
  # Its workers go on when another version takes its place.
  file.rename(file.path(library, "rustcluster"), file.path(library, "old"))
  unlink(file.path(library, "old"), recursive = TRUE)
  expect_identical(parSapply(cl, 1:3, function(i) sqrt(i)), sqrt(1:3))
  expect_identical(clusterEvalQ(cl, tryCatch(stop("x"), error = conditionMessage)), list("x"))
})

test_that("a package is not replaced before the new one loads, and a host without a toolchain is an error", {
  skip_without_sshd()
  ssh <- install_sshd()
  library <- new_library()
  hosts <- hosts_of(ssh, "127.0.0.2", rlibs = library)
  expect_identical(install_on(hosts)$how, "copied")
  report <- install_on(hosts, package = edited_package(break_library))
  expect_match(report$problem, "a copy does not load there.*rustcluster.so")
  expect_match(report$problem, "cargo and rustc, version 99.0 or newer")
  expect_identical(install_on(hosts)$how, "already there")
  expect_identical(content_of(library), "rustcluster")
  # Another build of the same version is not this one.
  expect_identical(install_on(hosts, package = edited_package(identity))$how, "copied")
  expect_identical(install_on(hosts, "check")$how, "missing")
})

test_that("a package that is cut off is replaced, and one whose files cannot be read is no error of R's", {
  skip_without_sshd()
  ssh <- install_sshd()
  library <- new_library()
  hosts <- hosts_of(ssh, "127.0.0.2", rlibs = library)
  expect_identical(install_on(hosts)$how, "copied")
  for (file in c("DESCRIPTION", "libs/rustcluster.so", "R/rustcluster.rdb", "source/build", "source/sizes")) {
    path <- file.path(library, "rustcluster", file)
    bytes <- readBin(path, "raw", file.size(path))
    for (kept in c(0, length(bytes) %/% 2)) {
      writeBin(utils::head(bytes, kept), path)
      report <- install_on(hosts)
      expect_identical(report[c("how", "problem")], data.frame(how = "copied", problem = NA_character_))
    }
  }
  expect_identical(install_on(hosts)$how, "already there")
})

test_that("a library with any letters is used, and one that R cannot search is an error", {
  skip_without_sshd()
  ssh <- install_sshd()
  dir <- new_library()
  named <- file.path(dir, "\u00fcn\u00ef \"x\" $HOME 100%v ~!;&")
  for (locale in c("C", "C.UTF-8")) {
    unlink(named, recursive = TRUE)
    hosts <- hosts_of(ssh, "127.0.0.2", rlibs = named, rscript_envs = c(LC_ALL = locale))
    expect_identical(install_on(hosts)$how, "copied")
    expect_identical(content_of(named), "rustcluster")
  }
  for (name in c("a[b]", "a*", "a?", "a:b", "a\\b")) {
    report <- install_on(hosts_of(ssh, "127.0.0.2", rlibs = file.path(dir, name)))
    expect_match(report$problem, "R cannot find a library whose path contains.*`rlibs`")
  }
  expect_length(content_of(dir), 1L)
})

test_that("an agent of another build is refused", {
  skip_without_sshd()
  ssh <- install_sshd()
  library <- new_library()
  hosts <- hosts_of(ssh, "127.0.0.2", rlibs = library)
  expect_identical(install_on(hosts, package = edited_package(identity))$how, "copied")
  error <- caught(makeRustCluster(c("127.0.0.2" = 1), rshcmd = ssh$rshcmd, rlibs = library))
  expect_rust_error(error, "start_failed")
  expect_match(conditionMessage(error), "install the same build of rustcluster on the host.*install = TRUE")
  expect_match(conditionMessage(error), paste("build", substr(installed_package()$build, 1L, 8L)))
})

test_that("hosts of a kind without a toolchain are named in one message", {
  skip_without_sshd()
  ssh <- install_sshd()
  report <- install_on(
    hosts_of(ssh, c("127.0.0.2", "127.0.0.3"), rlibs = new_library()), package = other_kind(installed_package(), "99.0")
  )
  expected <- paste0("no host of its kind [(]R ", installed_package()$r, ", .*apt-get install.*binary[.]sh")
  expect_match(report$problem, expected)
  expect_match(rustcluster:::failedHosts(report, 1:2), "hosts .127.0.0.2. and .127.0.0.3.: no host")
  expect_identical(report$how, rep(NA_character_, 2))
})

test_that("the error of a failed compilation contains the end of its output", {
  skip_without_sshd()
  ssh <- install_sshd()
  package <- edited_source("configure", function(lines) c("#!/bin/sh", "echo this is 100% wrong", "exit 3"))
  package <- other_kind(package, "1.0")
  library <- new_library()
  expect_message(
    report <- install_on(hosts_of(ssh, "127.0.0.2", rlibs = library), progress = TRUE, package = package),
    "R CMD INSTALL ended with status 1"
  )
  expect_match(report$problem, "configuration failed")
  expect_identical(content_of(library), character())
})

test_that("a full disk and a read-only library are errors that say so", {
  skip_without_sshd()
  ssh <- install_sshd()
  small <- local_mount("size=6m")
  fixed <- local_mount("size=1m,ro")
  hosts <- c(hosts_of(ssh, "127.0.0.2", rlibs = small), hosts_of(ssh, "127.0.0.3", rlibs = fixed),
             hosts_of(ssh, "127.0.0.4", rscript_envs = c(TMPDIR = "/proc"), rlibs = new_library()))
  # A home that is not writable, in which R has never had a library.
  hosts <- c(hosts, hosts_of(ssh, "127.0.0.5", rlibs = file.path(fixed, "R", "library", "4.2")))
  problems <- install_on(hosts)$problem
  expect_match(problems[[4L]], "cannot be created .*Read-only file system.*`rlibs`")
  expect_match(problems[[1L]], "the disk of .*library.* is full [(]no space left on device")
  expect_no_match(problems[[1L]], "LOCK")
  expect_identical(content_of(small), character())
  expect_match(problems[[2L]], "cannot be written to: give another one as `rlibs`")
  expect_match(problems[[3L]], "temporary directory|TMPDIR")
})

test_that("installations at the same time take turns, and the lock of a dead one is taken over", {
  skip_without_sshd()
  ssh <- install_sshd()
  library <- new_library()
  hosts <- hosts_of(ssh, paste0("127.0.0.", 2:4), rlibs = library)
  at_once <- function() {
    report <- install_on(hosts)
    expect_identical(report$problem, rep(NA_character_, 3))
    expect_setequal(report$how, c("copied", "already there"))
    expect_identical(sum(report$how == "copied"), 1L)
    expect_identical(content_of(library), "rustcluster")
  }
  at_once()
  # One that died after it had moved the older version away.
  lock <- file.path(library, "00LOCK-rustcluster")
  dir.create(file.path(lock, "new"), recursive = TRUE)
  file.rename(file.path(library, "rustcluster"), file.path(lock, "old"))
  dead <- system2("sh", c("-c", shQuote("echo $$")), stdout = TRUE)
  boot <- readLines("/proc/sys/kernel/random/boot_id")
  writeLines(c(Sys.info()[["nodename"]], boot, Sys.readlink("/proc/self/ns/pid"), dead, "1"), file.path(lock, "owner"))
  writeLines("another", file.path(lock, "old", "source", "build"))
  at_once()
  # One that died when the new version was in its place.
  dir.create(file.path(lock, "old"), recursive = TRUE)
  writeLines(c(Sys.info()[["nodename"]], boot, Sys.readlink("/proc/self/ns/pid"), dead, "1"), file.path(lock, "owner"))
  expect_identical(install_on(hosts[1L])$how, "already there")
  expect_identical(content_of(library), "rustcluster")
  # One that nothing is known of, and that is too old to wait for.
  dir.create(lock)
  Sys.setFileTime(lock, Sys.time() - 3600)
  problem <- install_on(hosts[1L], package = edited_package(identity))$problem
  expect_match(problem, "has not ended.*remove .*00LOCK-rustcluster")
  expect_identical(install_on(hosts[1L])$how, "already there")
})

test_that("an installation that exceeds `timeout` is an error", {
  skip_without_sshd()
  ssh <- install_sshd()
  slow <- file.path(ssh$dir, "slow")
  writeLines(c("#!/bin/sh", "sleep 100"), slow)
  Sys.chmod(slow, "0755")
  report <- install_on(hosts_of(ssh, "127.0.0.2", rscript = slow), timeout = 1)
  expect_match(report$problem, "timeout")
})

test_that("an installation that is cut off while the package is tested leaves the host as it was", {
  skip_without_sshd()
  if (system("unshare -m true", ignore.stderr = TRUE) != 0L) skip("mounts take root")
  ssh <- install_sshd()
  library <- new_library()
  path <- function(name) file.path(ssh$dir, name)
  # In the test of the package, Rscript is a script that waits.
  file.copy(file.path(R.home("bin"), "Rscript"), path("Rscript"))
  run <- paste("exec", path("Rscript"), "\"$@\"")
  writeLines(c(
    "#!/bin/sh", paste("echo >", path("tests")), paste("while [ ! -e", path("go"), "]; do sleep .1; done"), run
  ), path("waits"))
  mount <- paste("mount --bind", path("waits"), file.path(R.home("bin"), "Rscript"))
  writeLines(c("#!/bin/sh", paste0("exec unshare -m sh -c '", mount, "; ", run, "' sh \"$@\"")), path("start"))
  Sys.chmod(path(c("waits", "start")), "0755")
  report <- install_on(hosts_of(ssh, "127.0.0.2", rlibs = library, rscript = path("start")), timeout = 8)
  expect_match(report$problem, "timeout")
  expect_identical(file.exists(path("tests")), TRUE)
  file.create(path("go"))
  expect_identical(wait_until(function() !length(content_of(library))), TRUE)
})

test_that("a start with `install = TRUE` installs what is missing", {
  skip_without_sshd()
  ssh <- install_sshd()
  library <- new_library()
  spec <- list(list(host = "127.0.0.2", ncore = 1), list(host = "localhost", ncore = 1))
  start <- function(..., spec = spec) makeRustCluster(spec, rshcmd = ssh$rshcmd, rlibs = library, ...)
  error <- caught(start(spec = spec[1L]))
  expect_rust_error(error, "start_failed")
  expect_match(conditionMessage(error), "installOnHosts(\"127.0.0.2\")`, start with `install = TRUE`", fixed = TRUE)
  cl <- local_cluster(spec, rshcmd = ssh$rshcmd, rlibs = library, install = TRUE)
  expect_identical(unlist(clusterCall(cl, function() 17)), c(17, 17))
  expect_identical(content_of(library), "rustcluster")
  other <- new_library()
  cl <- addWorkers(cl, list(list(host = "127.0.0.3", ncore = 1, rlibs = other)))
  expect_identical(content_of(other), "rustcluster")
  expect_length(cl, 3L)

  wrong <- list(list(host = "127.0.0.2", ncore = 1, rlibs = "/proc/nowhere"), list(host = "localhost", ncore = 1))
  error <- caught(makeRustCluster(wrong, rshcmd = ssh$rshcmd, install = TRUE))
  expect_rust_error(error, "install_failed")
  expect_identical(error$host, "127.0.0.2")
  warned <- list()
  cl <- withCallingHandlers(
    local_cluster(wrong, rshcmd = ssh$rshcmd, install = TRUE, on_failure = "warn"),
    warning = function(w) {
      warned[[length(warned) + 1L]] <<- w
      invokeRestart("muffleWarning")
    }
  )
  expect_length(cl, 1L)
  expect_length(warned, 1L)
  expect_identical(warned[[1L]]$host, "127.0.0.2")
  expect_match(conditionMessage(warned[[1L]]), "rustcluster could not be installed: .*/proc/nowhere cannot be created")
  expect_match(clusterHosts(cl)$problem[[1L]], "/proc/nowhere cannot be created")
  # A start that does not wait for all hosts tells it, too.
  expect_warning(
    cl <- local_cluster(wrong, rshcmd = ssh$rshcmd, install = TRUE, on_failure = "warn", wait = 1),
    "/proc/nowhere cannot be created", class = "rustcluster_host_left_out"
  )
  expect_identical(suppressWarnings(clusterCall(cl[2], function() 17)), list(17))
})

test_that("an interactive session asks before it installs", {
  skip_without_sshd()
  ssh <- install_sshd()
  library <- new_library()
  script <- c(
    deparse(bquote(spec <- list(host = "127.0.0.2", ncore = 1, rshcmd = .(ssh$rshcmd), rlibs = .(library)))),
    deparse(bquote(loadNamespace("rustcluster", .(dirname(installed_package()$path))))),
    "start <- function() rustcluster::makeRustCluster(spec, install = TRUE, progress = FALSE)",
    "tryCatch(start(), rustcluster_install_failed = function(e) cat(\"error:\", conditionMessage(e), \"\\n\"))", "n",
    "cl <- start()", "y", "length(cl)", "parallel::stopCluster(cl)"
  )
  file <- tempfile(fileext = ".R")
  on.exit(unlink(file), add = TRUE, after = FALSE)
  writeLines(script, file)
  arguments <- c("--vanilla", "--interactive", "--no-readline")
  out <- system2(file.path(R.home("bin"), "R"), arguments, stdin = file, stdout = TRUE, stderr = TRUE)
  text <- paste(out, collapse = "\n")
  expect_match(text, "Install rustcluster [0-9.]+ on host .127.0.0.2.. [(]y/n[)] n")
  expect_match(text, "error: rustcluster was not installed on host .127.0.0.2.: answer")
  expect_match(text, "> length(cl)\n[1] 1", fixed = TRUE)
  expect_identical(content_of(library), "rustcluster")
})

test_that("one host of a kind compiles, and the others get a copy of its package", {
  skip_unless_long()
  skip_without_sshd()
  ssh <- install_sshd()
  libraries <- c(new_library(), new_library())
  hosts <- c(hosts_of(ssh, "127.0.0.2", rlibs = libraries[1L]), hosts_of(ssh, "127.0.0.3", rlibs = libraries[2L]))
  report <- install_on(hosts, package = other_kind(installed_package()))
  expect_identical(report$problem, c(NA_character_, NA_character_))
  expect_setequal(report$how, c("compiled", "copied"))
  expect_identical(report$from[report$how == "copied"], report$host[report$how == "compiled"])
  # A host that has compiled the source of this session has its build.
  expect_identical(install_on(hosts)$how, rep("already there", 2))
  for (library in libraries) {
    cl <- local_cluster(c("127.0.0.2" = 2), rshcmd = ssh$rshcmd, rlibs = library)
    where <- clusterCall(cl, function() dirname(getNamespaceInfo("rustcluster", "path")))
    expect_identical(where, rep(list(normalizePath(library)), 2))
  }
})

test_that("nothing is left of a compilation that is cut off", {
  skip_unless_long()
  skip_without_sshd()
  ssh <- install_sshd()
  library <- new_library()
  # R itself cannot compile in a folder with a quote in its name.
  temporary <- tempfile("temporary-")
  on.exit(unlink(temporary, recursive = TRUE), add = TRUE, after = FALSE)
  dir.create(temporary)
  hosts <- hosts_of(ssh, "127.0.0.2", rlibs = library, rscript_envs = c(TMPDIR = temporary))
  report <- install_on(hosts, package = other_kind(installed_package()), timeout = 10)
  expect_match(report$problem, "did not finish within `timeout`")
  expect_identical(wait_until(function() !length(content_of(temporary))), TRUE)
  expect_identical(content_of(library), character())
})

test_that("no process is left", {
  expect_no_leftovers()
})
