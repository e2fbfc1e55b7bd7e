# Installs the package on a host, for installOnHosts(), which evaluates this file and rust.R there. The host may have
# any version of R, and no other program but sh and cat.
#
# `input`: a connection to what is sent. `order`: its first object, a list of `task` ("check": say only whether the
# package is there; "copy" the built package; "compile" the source), the package's `version`, `build`, `r` (its minor
# version of R) and `system`, and the oldest versions that do: `needs_r`, `needs_rust`. The second object in `input`
# contains the files of the package, or those of its folder "source". The argument of the script: the library; without
# it, the one that R on this host installs into.

# Reasons of failures are found in messages.
Sys.setenv(LANGUAGE = "en")
invisible(Sys.setlocale("LC_MESSAGES", "C"))

minor_version <- function(version) sub("^([0-9]+[.][0-9]+).*", "\\1", version)
r_version <- as.character(getRversion())
system_name <- paste0(R.version$arch, "-", R.version$os)

c_library <- function() {
  run <- function(command) {
    tryCatch(suppressWarnings(system(paste(command, "2>&1"), intern = TRUE)), error = function(e) "")
  }
  if (!grepl("musl", R.version$os)) return(c(run("getconf GNU_LIBC_VERSION"), "")[[1]])
  version <- sub("^Version ", "", grep("^Version ", run("ldd"), value = TRUE))
  paste(c("musl", version), collapse = " ")
}

# Writes the answer, behind all that a profile may have printed.
answer <- function(...) {
  out <- pipe("cat", "wb")
  writeBin(charToRaw("\n<rustcluster installed 2>\n"), out)
  out <- gzcon(out, level = 1)
  serialize(list(r_version = r_version, ...), out, version = 2)
  close(out)
  quit(save = "no", status = 0, runLast = FALSE)
}

# Ends the installation. `kind`: "problem", or "unfit" for a package that does not load on this host.
give_up <- function(..., kind = "problem", log = character()) {
  stop(structure(list(message = paste0(...), call = NULL, log = log), class = c(kind, "error", "condition")))
}

# Returns whether an operation on files has worked. Attribute "why": the system's reason.
tried <- function(operation) {
  why <- character()
  ok <- withCallingHandlers(
    tryCatch(is.null(operation) || TRUE, error = function(e) FALSE),
    warning = function(w) {
      why <<- sub(".*(reason ['\u2018]|: )(.*[^'\u2019])['\u2019]?$", "\\2", conditionMessage(w))
      invokeRestart("muffleWarning")
    }
  )
  structure(ok && !length(why), why = c(why, "no reason was given")[[1]])
}

# Removes files and folders. Their names are no patterns.
delete <- function(paths) unlink(paths, recursive = TRUE, expand = FALSE)

# Returns the library in which a path is.
library_of <- function(path) sub("/00LOCK-rustcluster.*", "", path)

full <- function(path) {
  give_up("the disk of ", library_of(path), " is full (no space left on device, or a quota): free space ",
          "there, or give another library as `rlibs`")
}

# Fails for an operation in a library.
check_written <- function(ok, path, what = "cannot be written to") {
  if (ok) return(invisible())
  why <- attr(ok, "why")
  # R has no better words for a failed write.
  if (grepl("No space left|quota|problem writing to connection", why)) full(path)
  give_up(library_of(path), " ", what, " (", why, "): give another library as `rlibs`")
}

# Returns the lines of a file; of one that cannot be read, none.
read_lines <- function(file, ...) {
  tryCatch(suppressWarnings(readLines(file, ..., warn = FALSE)), error = function(e) character())
}

# Returns whether a library has this build of the package, built for this R. NULL: it has none.
has_build <- function(library) {
  path <- file.path(library, "rustcluster")
  description <- file.path(path, "DESCRIPTION")
  if (!file.exists(description)) return(NULL)
  # A power failure may have left empty files.
  fields <- tryCatch(read.dcf(description, c("Version", "Built"))[1, ], error = function(e) c(NA, NA))
  build <- read_lines(file.path(path, "source", "build"), 1)
  identical(fields[[1]], order$version) && identical(build, order$build) &&
    identical(minor_version(sub("^R ", "", fields[[2]])), minor_version(r_version)) && is_whole(path)
}

# Records the sizes of the files of a package that has been written.
write_sizes <- function(path, files) {
  sizes <- file.path(path, "source", "sizes")
  paths <- setdiff(names(files$content), "source/sizes")
  lines <- paste(lengths(files$content[paths]), paths)
  check_written(tried(writeLines(lines, sizes, useBytes = TRUE)), path)
  if (file.size(sizes) != sum(nchar(lines, "bytes") + 1)) full(path)
}

# Returns whether the files of a package have the sizes that they were written with: after a power failure, or on a disk
# that was full, some may be cut off. Nothing is known of a package that R CMD INSTALL has written.
is_whole <- function(path) {
  sizes <- file.path(path, "source", "sizes")
  if (!file.exists(sizes)) return(TRUE)
  lines <- read_lines(sizes)
  now <- file.size(file.path(path, sub("^[0-9]+ ", "", lines)))
  length(lines) > 0 && identical(as.numeric(sub(" .*", "", lines)), now)
}

# Returns the library to install into: an agent must find the package there before any other.
choose_library <- function(given, paths = .libPaths()) {
  if (length(given)) return(path.expand(given[[1]]))
  user <- strsplit(Sys.getenv("R_LIBS_USER"), .Platform$path.sep, fixed = TRUE)[[1]]
  user <- path.expand(c(setdiff(user, "NULL"), paths)[[1]])
  at <- match(normalizePath(user, mustWork = FALSE), normalizePath(paths))
  # R has not found a personal library that does not exist yet, and will search it after the libraries of R_LIBS.
  first <- strsplit(Sys.getenv("R_LIBS"), .Platform$path.sep, fixed = TRUE)[[1]]
  earlier <- if (is.na(at)) first else paths[seq_len(at)]
  hides <- Filter(function(library) !is.null(has_build(library)), earlier)
  if (length(hides)) hides[[1]] else user
}

# Creates a directory and those above it. The recursive dir.create() does not say why one above it cannot be created.
make_directories <- function(path) {
  if (dir.exists(path)) return(TRUE)
  if (!make_directories(dirname(path))) return(FALSE)
  dir.create(path, FALSE) || dir.exists(path) || dir.create(path)
}

make_library <- function(library) {
  # R takes these characters in R_LIBS for wildcards or separators.
  if (grepl("[][*?:\\\\]", library)) {
    give_up("R cannot find a library whose path contains any of [ ] * ? : \\ (", library,
            "): give another one as `rlibs`")
  }
  if (!dir.exists(library)) {
    made <- tried(make_directories(library))
    # Another installation may have been faster.
    if (!dir.exists(library)) check_written(made, paste("the library", library), "cannot be created")
  }
  if (file.access(library, 2) != 0) {
    give_up("the library ", library, " cannot be written to: give another one as `rlibs`")
  }
  normalizePath(library)
}

# The lock ----------------------------------------------------------------------------------------------

# The folder 00LOCK-rustcluster in the library is the lock, as for R CMD INSTALL. It contains what is being installed
# (`new`), the package that is being replaced (`old`), and the process that holds the lock (`owner`).

# Returns what tells this process from all others: the machine, its start, the namespace of pids, pid, and start time.
process_id <- function(pid = Sys.getpid()) {
  read <- function(file) c(read_lines(file, 1), "")[[1]]
  started <- strsplit(sub(".*[)] ", "", read(file.path("/proc", pid, "stat"))), " ", fixed = TRUE)[[1]][20]
  c(Sys.info()[["nodename"]], read("/proc/sys/kernel/random/boot_id"), Sys.readlink("/proc/self/ns/pid"), pid, started)
}

read_owner <- function(lock) {
  owner <- read_lines(file.path(lock, "owner"))
  if (length(owner) == 5) owner
}

# Returns whether it is certain that the process that holds a lock has ended. Those of other users may be hidden.
has_ended <- function(owner, lock) {
  now <- process_id(owner[[4]])
  if (owner[[1]] != now[[1]]) return(FALSE)
  own <- identical(file.info(lock)$uid, file.info(tempdir())$uid)
  owner[[2]] != now[[2]] || (own && owner[[3]] == now[[3]] && !identical(owner[[5]], now[[5]]))
}

own_lock <- function(lock) {
  # A reader must not see half of the file.
  owner <- file.path(lock, "owner")
  check_written(tried(writeLines(process_id(), paste0(owner, ".new"))), lock)
  if (file.size(paste0(owner, ".new")) == 0) full(lock)
  check_written(tried(file.rename(paste0(owner, ".new"), owner)), lock)
}

# Takes the lock of a process that has ended. Returns FALSE if another process has done so.
take_over <- function(lock, owner) {
  heir <- file.path(lock, paste0("after-", owner[[4]]))
  if (!dir.create(heir, showWarnings = FALSE)) return(FALSE)
  if (!identical(read_owner(lock), owner)) {
    delete(heir)
    return(FALSE)
  }
  own_lock(lock)
  delete(heir)
  package <- file.path(dirname(lock), "rustcluster")
  old <- file.path(lock, "old")
  if (!file.exists(package) && file.exists(old)) file.rename(old, package)
  delete(file.path(lock, c("old", "new")))
  TRUE
}

# Takes the lock of a library, as soon as no other installation has it. Returns its path.
take_lock <- function(library) {
  lock <- file.path(library, "00LOCK-rustcluster")
  began <- Sys.time()
  repeat {
    made <- tried(dir.create(lock) || stop())
    if (made) {
      done <- FALSE
      on.exit(if (!done) delete(lock))
      own_lock(lock)
      done <- TRUE
      return(lock)
    }
    if (!dir.exists(lock)) check_written(made, paste("the library", library))
    owner <- read_owner(lock)
    if (!is.null(owner) && has_ended(owner, lock) && take_over(lock, owner)) return(lock)
    # installOnHosts() holds the lock for seconds, R CMD INSTALL while it compiles. Clocks of other machines may differ.
    since <- function(time) as.numeric(difftime(Sys.time(), time, units = "secs"))
    waited <- if (is.null(owner)) max(since(began), since(file.info(lock)$mtime), na.rm = TRUE) / 10 else since(began)
    if (waited > 60) {
      give_up("another installation of rustcluster has not ended", if (!is.null(owner)) paste0(" (process ", owner[[4]],
              " on ", owner[[1]], ")"), ": wait for it, or, if there is none, remove ", lock)
    }
    Sys.sleep(0.1)
  }
}

# Files -------------------------------------------------------------------------------------------------

# Returns the files of a folder: a list of `mode` and, by path, `content`.
read_files <- function(dir) {
  paths <- list.files(dir, recursive = TRUE, all.files = TRUE)
  full <- file.path(dir, paths)
  content <- lapply(full, function(path) readBin(path, "raw", file.size(path)))
  list(mode = as.integer(file.mode(full)), content = structure(content, names = paths))
}

write_files <- function(files, dir) {
  paths <- file.path(dir, names(files$content))
  for (parent in unique(dirname(paths))) check_written(tried(dir.create(parent, FALSE, recursive = TRUE)), dir)
  for (i in seq_along(paths)) {
    content <- files$content[[i]]
    check_written(tried({
      con <- file(paths[[i]], "wb")
      tryCatch(writeBin(content, con), finally = close(con))
    }), dir)
    # R does not notice that a disk is full.
    if (!identical(as.numeric(file.size(paths[[i]])), as.numeric(length(content)))) full(dir)
    Sys.chmod(paths[[i]], structure(files$mode[[i]], class = "octmode"))
  }
}

# Loads the package of a library as an agent does, and calls its native code.
test_load <- function(library) {
  out <- tempfile()
  on.exit(unlink(out))
  code <- "invisible(loadNamespace('rustcluster',lib.loc=Sys.getenv('RUSTCLUSTER_LIB'))$usable_cores());cat('it loads')"
  # R cannot run a command that contains a path with letters that the locale does not have.
  Sys.setenv(RUSTCLUSTER_LIB = library, R_LIBS = paste(.libPaths(), collapse = ":"))
  suppressWarnings(system2(
    file.path(R.home("bin"), "Rscript"), c("--vanilla", "-e", shQuote(code)), stdout = out, stderr = out, timeout = 120
  ))
  log <- readLines(out, warn = FALSE)
  if (any(grepl("it loads", log, fixed = TRUE))) return(invisible())
  give_up("rustcluster does not load there", kind = "unfit", log = log)
}

# Puts a built package into the library. An older one stays in its place until the new one has been loaded. Returns what
# was done.
place <- function(files, library, how) {
  # The connection may be slow: read all before other installations have to wait.
  force(files)
  lock <- take_lock(library)
  on.exit({
    delete(file.path(lock, c("new", "old")))
    # A network file system keeps open files: the next installation removes them, and the lock.
    if (!any(file.exists(file.path(lock, c("new", "old"))))) delete(lock)
  })
  # Another installation may have come first.
  if (isTRUE(has_build(library))) return("already there")
  new <- file.path(lock, "new", "rustcluster")
  write_files(files, new)
  write_sizes(new, files)
  test_load(dirname(new))
  # If the connection has been cut, as after `timeout`, this is an error, and the host is left as it was.
  cat(".")
  package <- file.path(library, "rustcluster")
  old <- file.path(lock, "old")
  if (file.exists(package)) {
    check_written(tried(file.rename(package, old)), package, "cannot be replaced")
  }
  moved <- tried(file.rename(new, package))
  if (!moved && file.exists(old)) file.rename(old, package)
  check_written(moved, package, "cannot be created")
  how
}

# Compiling ---------------------------------------------------------------------------------------------

# Compiles the source in a temporary folder. Returns the files of the package.
compile <- function(source) {
  dir <- tempfile("build-")
  dir.create(dir)
  on.exit(unlink(dir, recursive = TRUE))
  path <- function(...) file.path(dir, ...)
  write_files(source, path("sent"))
  utils::untar(path("sent", "source", "rustcluster.tar.gz"), exdir = path("rustcluster"), tar = "internal")
  # R CMD INSTALL demands all packages that are imported. Agents load none of those that are not part of R.
  for (name in c("library", "tmp")) dir.create(path(name))
  dir.create(path("stubs", "cli"), recursive = TRUE)
  writeLines(c("Package: cli", "Version: 99.0"), path("stubs", "cli", "DESCRIPTION"))
  command <- paste(
    paste0("TMPDIR=", shQuote(path("tmp"))),
    paste0("R_LIBS=", shQuote(paste(c(path("stubs"), .libPaths()), collapse = ":"))),
    shQuote(file.path(R.home("bin"), "R")), "CMD INSTALL --no-test-load -l",
    shQuote(path("library")), shQuote(path("rustcluster"))
  )
  # This process does without default packages and compiler.
  Sys.unsetenv(c("R_DEFAULT_PACKAGES", "R_ENABLE_JIT"))
  # If the connection is cut, the printf fails, and the compiler is stopped.
  script <- paste0(
    "cd ", shQuote(dir), " || exit 1; trap '' PIPE; s=`command -v setsid`; ",
    "$s sh -c ", shQuote(paste0(command, "; echo $? > status.new; mv status.new status")), " > log 2>&1 < /dev/null & ",
    "until [ -f status ]; do sleep 1; printf . || { kill -s KILL -- -$! || kill -s KILL $!; exit 1; }; done"
  )
  system2("sh", c("-c", shQuote(script)), stderr = FALSE)
  status <- if (file.exists(path("status"))) readLines(path("status"), 1) else "unknown"
  if (status != "0") {
    log <- if (file.exists(path("log"))) readLines(path("log"), warn = FALSE)
    give_up("R CMD INSTALL ended with status ", status, log = utils::tail(log, 20))
  }
  files <- read_files(path("library", "rustcluster"))
  built <- !startsWith(names(files$content), "source/")
  list(mode = c(files$mode[built], source$mode), content = c(files$content[built], source$content))
}

# All ---------------------------------------------------------------------------------------------------

install <- function(given) {
  if (getRversion() < order$needs_r) {
    give_up("R ", r_version, " there is too old: rustcluster needs R ", order$needs_r, " or newer")
  }
  if (.Platform$OS.type != "unix" || Sys.info()[["sysname"]] != "Linux") give_up("it does not run Linux")
  libraries <- unique(c(if (length(given)) path.expand(given[[1]]), .libPaths()))
  found <- Filter(function(library) !is.null(has_build(library)), libraries)
  if (length(found) && has_build(found[[1]])) {
    # One that died when it was nearly done has left its lock.
    lock <- file.path(found[[1]], "00LOCK-rustcluster")
    owner <- read_owner(lock)
    if (!is.null(owner) && has_ended(owner, lock) && take_over(lock, owner)) delete(lock)
    answer(how = "already there", library = normalizePath(found[[1]]), version = order$version)
  }
  if (order$task == "check") answer(how = "missing")
  fits <- minor_version(r_version) == order$r && system_name == order$system
  if (order$task == "copy" && !fits) give_up(kind = "unfit")
  library <- make_library(choose_library(given))
  package <- NULL
  if (order$task == "copy") {
    how <- place(unserialize(input), library, "copied")
  } else {
    package <- compile(unserialize(input))
    how <- place(package, library, "compiled")
  }
  answer(how = how, library = library, version = order$version, package = package)
}

tryCatch(install(commandArgs(trailingOnly = TRUE)), error = function(e) {
  unfit <- inherits(e, "unfit") && order$task == "copy"
  rust <- if (unfit) find_rust(order$needs_rust)
  answer(
    problem = conditionMessage(e), log = e$log, unfit = unfit, compiles = length(rust) > 0,
    seen = attr(rust, "seen"), r = minor_version(r_version), system = system_name, libc = if (unfit) c_library()
  )
})
