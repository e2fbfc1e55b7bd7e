# installOnHosts(): installs the package on other hosts over ssh.

#' Install rustcluster on other hosts
#'
#' Installs this session's build of \pkg{rustcluster} on each host over ssh, on all hosts in parallel. A host that has
#' it already is left as it is. Hosts of this machine's kind get a copy of the installed package in about a second; such
#' a host needs R alone. For each other kind, the package is compiled on one host of that kind, and copied from it to
#' the others. Hosts are of one kind if they have the same processor architecture and system, the same minor version of
#' R (4.2, 4.3), and a C library with which the package loads: a copy is loaded before it replaces an older version, and
#' a host on which it does not load compiles.
#'
#' Compiling takes from half a minute to a few minutes, depending on the cores of the host, which needs 'cargo' and
#' 'rustc'. A host does not need the packages that \pkg{rustcluster} imports from CRAN.
#'
#' A version that is in use can be replaced: clusters that run go on. A worker of `start_method = "spawn"` that is
#' replaced then has the new version.
#'
#' @param hosts Hosts, in any form that [makeRustCluster()] accepts: names, numbers named by hosts, or a list of lists
#'   with `host` and any of `user`, `port`, `rshcmd`, `rshopts`, `rscript`, `rlibs` and `rscript_envs`. Numbers of
#'   workers are ignored. Each host is installed on once. This machine is skipped.
#' @param ... `user`, `rshcmd`, `rshopts`, `rscript`, `rlibs`: for all hosts, as in [makeRustCluster()]. `rlibs` is the
#'   library to install into. Default: the personal library of the user (`R_LIBS_USER`), which is created if it does not
#'   exist, or the library of an older version that R would find first.
#' @param timeout (number) Seconds after which an installation counts as failed; default 3600. The host is left as it
#'   was.
#' @param progress (logical) Whether to print a line for each host when it is done.
#'
#' @return Invisibly, a data frame with a row for each host:
#'   \describe{
#'     \item{host, user}{(character) as in `hosts`; `user` is `NA` without a user.}
#'     \item{version, r_version}{(character) of rustcluster and of R on the host.}
#'     \item{library}{(character) the library that has rustcluster.}
#'     \item{how}{(character) `"already there"`, `"copied"` or `"compiled"`.}
#'     \item{from}{(character) the host that a copy is from; `"localhost"` for this machine.}
#'     \item{seconds}{(numeric) duration of the installation.}
#'     \item{problem}{(character) `NA`.}
#'   }
#' @section Errors:
#' `rustcluster_install_failed`: some hosts failed. The error is raised when all hosts are done. It names the failed
#' hosts, the reasons, and what to do; its field `report` is the data frame, with the reasons in `problem`. A host that
#' failed has the version that it had.
#' `rustcluster_bad_argument`.
#' @seealso [makeRustCluster()], whose `install = TRUE` does the same for the hosts of a cluster.
#' @examples
#' \dontrun{
#' installOnHosts(c("node1", "node2"))
#' cl <- makeRustCluster(c(node1 = 64, node2 = 64))
#' }
#' @export
installOnHosts <- function(hosts, ..., timeout = 3600, progress = interactive()) {
  if (missing(hosts)) badArgument("hosts", "is missing")
  given <- list(...)
  known <- c("user", "rshcmd", "rshopts", "rscript", "rlibs")
  unknown <- setdiff(names(given), known)
  if (length(unknown) || length(given) != sum(nzchar(names(given)))) {
    badArgument(c(unknown, "...")[[1L]], "is not an argument of installOnHosts(), which has ",
                paste0("`", known, "`", collapse = ", "))
  }
  timeout <- plain(timeout)
  if (!is.numeric(timeout) || length(timeout) != 1L || !isTRUE(timeout > 0)) {
    badArgument("timeout", "must be a number of seconds above 0")
  }
  if (!isTRUE(progress) && !isFALSE(progress)) badArgument("progress", "must be TRUE or FALSE")
  for (name in names(given)) {
    value <- given[[name]]
    given[[name]] <- if (name == "user") hostName(value, name) else texts(value, name, if (name == "rscript") 1L)
  }
  hosts <- asArgument("hosts", specHosts(hosts, given))$hosts
  launched <- Filter(function(host) !is.null(host$launcher), hosts)
  if (length(launched)) {
    badArgument(
      "hosts", "contains a launcher (host ", sQuote(launched[[1L]]$host), "); install rustcluster where its command ",
      "runs R, as in the image of a container"
    )
  }
  report <- installOn(unique(connections(hosts)), timeout = timeout, progress = progress)
  refuseFailed(report)
  invisible(report)
}

# Returns the hosts without the settings of workers: entries that differ in them alone are the same host.
connections <- function(hosts) {
  settings <- c("host", "user", "port", "local", "rshcmd", "rshopts", "rscript", "rlibs", "rscript_envs")
  lapply(hosts, function(host) host[intersect(settings, names(host))])
}

refuseFailed <- function(report) {
  failed <- which(!is.na(report$problem))
  if (length(failed)) {
    abort("install_failed", "rustcluster could not be installed: ", failedHosts(report, failed),
          fields = list(host = report$host[failed], report = report))
  }
}

# What is sent ------------------------------------------------------------------------------------------

# Returns the hash of the code of an installed package, which tools/source.R has written, or NA.
readBuild <- function(path) {
  file <- file.path(path, "source", "build")
  if (file.exists(file)) readLines(file, 1L) else NA_character_
}

# The build that this session has loaded (`build`).
loaded <- new.env(parent = emptyenv())

# Returns the package of this session: its `path`, `version`, `build`, kind (`r`, `system`), and what a host `needs`.
installedPackage <- function() {
  path <- getNamespaceInfo("rustcluster", "path")
  build <- readBuild(path)
  if (is.na(build)) {
    abort("install_failed", "this installation of rustcluster lacks its source; install it with ",
          "`R CMD INSTALL` in this session's library and try again")
  }
  fields <- read.dcf(file.path(path, "DESCRIPTION"), c("Version", "Built", "Depends", "SystemRequirements"))[1L, ]
  if (!identical(build, loaded$build)) {
    abort("install_failed", "another build of rustcluster has been installed on this machine: restart this R session")
  }
  number <- function(before, text) sub(paste0(".*", before, "([0-9][0-9.]*).*"), "\\1", text)
  list(
    path = path, version = fields[["Version"]], build = build,
    r = number("^R ", sub("[.][0-9]+;.*", "", fields[["Built"]])), system = paste0(R.version$arch, "-", R.version$os),
    needs_r = number("R \\(>=\\s*", fields[["Depends"]]),
    needs_rust = number("rustc\\s*\\(>=\\s*", fields[["SystemRequirements"]])
  )
}

# Returns the files of a folder of the package, as tools/on-host.R writes them.
readFiles <- function(path, folder = NULL) {
  names <- list.files(path, recursive = TRUE, all.files = TRUE)
  if (!is.null(folder)) names <- names[startsWith(names, paste0(folder, "/"))]
  files <- file.path(path, names)
  content <- lapply(files, function(file) readBin(file, "raw", file.size(file)))
  list(mode = as.integer(file.mode(files)), content = structure(content, names = names))
}

# Writes what a host reads from its stdin.
writeOrder <- function(file, package, task, files = NULL) {
  source <- function(name) readLines(file.path(package$path, "source", name), encoding = "UTF-8")
  order <- c(list(task = task, script = c(source("rust.R"), source("on-host.R"))), package[names(package) != "path"])
  con <- gzfile(file, "wb", compression = 1)
  on.exit(close(con))
  # Any version of R reads this format.
  for (object in list(order, files)) serialize(object, con, version = 2L)
}

# Returns the script that runs on the host.
hostInstallation <- function(host) {
  rscript <- if (is.null(host[["rscript"]])) "Rscript" else host[["rscript"]]
  code <- "input<-gzcon(file('stdin','rb'));order<-unserialize(input);eval(parse(text=order$script,encoding='UTF-8'))"
  env <- c(
    if (length(host$rlibs)) c(R_LIBS = paste(host$rlibs, collapse = ":")), host$rscript_envs,
    # Without its default packages and its compiler, R takes a third of the time.
    R_DEFAULT_PACKAGES = "NULL", R_ENABLE_JIT = "0"
  )
  remoteScript(c(rscript, "-e", code, host$rlibs[1L]), env)
}

# Sessions on hosts -------------------------------------------------------------------------------------

# An installation on several hosts is an environment, with the `report`, the folder of its files (`dir`), and for each
# host its `stage`: the task of its ssh session, "unfit" if it waits for a package of its kind, or "done". `kinds`: what
# the host has answered then. `built`: the packages that there are of each kind, `tried` those that the host was sent.

# Installs on all hosts that do not have this build. Task "check" only finds out which do. Returns the report.
installOn <- function(hosts, task = "copy", timeout = 3600, progress = FALSE, package = installedPackage()) {
  state <- newInstallation(hosts, package)
  on.exit({
    for (i in which(state$running)) tools::pskill(as.integer(readText(sessionFile(state, i, "pid"))))
    unlink(state$dir, recursive = TRUE)
  })
  file <- file.path(state$dir, task)
  writeOrder(file, package, task, if (task == "copy") readFiles(package$path))
  state$built <- list(list(file = file, kind = kindName(package), from = "localhost"))
  for (i in which(state$stage != "done")) startSession(state, i, task, file, 1L)
  shown <- state$stage == "done"
  repeat {
    for (i in which(state$running)) if (file.exists(sessionFile(state, i, "status"))) endSession(state, i)
    for (kind in unique(stats::na.omit(kindNames(state)))) serveKind(state, kind)
    late <- proc.time()[["elapsed"]] - state$began > timeout
    if (late) for (i in which(state$stage != "done")) tooLate(state, i)
    if (progress) for (i in which(state$stage == "done" & !shown)) showInstalled(state$report[i, ])
    shown <- state$stage == "done"
    if (all(shown)) break
    Sys.sleep(0.02)
  }
  state$report
}

newInstallation <- function(hosts, package) {
  state <- new.env(parent = emptyenv())
  n <- length(hosts)
  local <- vapply(hosts, `[[`, NA, "local")
  state$hosts <- hosts
  state$package <- package
  state$dir <- tempfile("install-")
  dir.create(state$dir)
  state$began <- proc.time()[["elapsed"]]
  state$stage <- ifelse(local, "done", "new")
  state$running <- logical(n)
  state$sessions <- integer(n)
  state$kinds <- vector("list", n)
  state$tried <- vector("list", n)
  own <- function(value, other = NA_character_) ifelse(local, value, other)
  state$report <- data.frame(
    host = vapply(hosts, `[[`, "", "host"),
    user = vapply(hosts, function(host) c(host[["user"]], NA_character_)[[1L]], ""),
    version = own(package$version), r_version = own(rVersionText()), library = own(dirname(package$path)),
    how = own("already there"), from = NA_character_, seconds = own(0, NA_real_), problem = NA_character_,
    stringsAsFactors = FALSE
  )
  state
}

sessionFile <- function(state, i, name) file.path(state$dir, paste(i, state$sessions[[i]], name, sep = "."))

# Starts an ssh that reads the file `input`, and writes its exit status to a file when it ends. `built`: the number of
# the package that is sent.
startSession <- function(state, i, task, input, built = NULL) {
  state$stage[[i]] <- task
  state$running[[i]] <- TRUE
  state$sessions[[i]] <- state$sessions[[i]] + 1L
  state$tried[[i]] <- c(state$tried[[i]], built)
  command <- paste(shQuote(sshCommand(state$hosts[[i]], hostInstallation(state$hosts[[i]]))), collapse = " ")
  file <- function(name) shQuote(sessionFile(state, i, name))
  system(paste0(
    "(sh -c ", shQuote(paste0("echo $$ > ", file("pid"), "; exec ", command)),
    " < ", shQuote(input), " > ", file("out"), " 2> ", file("err"),
    "; echo $? > ", file("new"), "; mv ", file("new"), " ", file("status"), ") 2> /dev/null &"
  ))
}

readText <- function(file) {
  if (!file.exists(file)) return("")
  paste(readLines(file, warn = FALSE, skipNul = TRUE), collapse = "\n")
}

# Returns the answer of tools/on-host.R, or NULL.
readInstallation <- function(file) {
  bytes <- readBin(file, "raw", file.size(file))
  marker <- charToRaw("\n<rustcluster installed 2>\n")
  at <- grepRaw(marker, bytes, fixed = TRUE)
  if (!length(at)) return(NULL)
  con <- gzcon(rawConnection(utils::tail(bytes, length(bytes) - at - length(marker) + 1L)))
  on.exit(close(con))
  tryCatch(unserialize(con), error = function(e) NULL)
}

# Takes in what a session has answered.
endSession <- function(state, i) {
  task <- state$stage[[i]]
  state$running[[i]] <- FALSE
  answer <- readInstallation(sessionFile(state, i, "out"))
  if (is.null(answer)) {
    status <- readText(sessionFile(state, i, "status"))
    read <- function(name) readText(sessionFile(state, i, name))
    reason <- paste("the installation ended with status", status)
    program <- sshCommand(state$hosts[[i]], "")[[1L]]
    if (status %in% c("126", "127") && !nzchar(Sys.which(program))) {
      reason <- paste("the installation could not be started:", program, "was not found or is not executable")
    }
    if (status == "0") {
      # R writes its code to a temporary file first, and does not notice if nothing was written.
      reason <- paste0(
        "R ran no code there: the disk of its temporary directory (TMPDIR, or /tmp) is full or not writable, or ",
        "`rshcmd` or `rscript` is wrong"
      )
      status <- NA
    }
    return(endInstallation(state, i, list(), hostProblem(
      state$hosts[[i]], reason, read("err"), read("out"), suppressWarnings(as.integer(status))
    )))
  }
  if (is.null(answer$problem)) {
    if (answer$how == "copied") answer$from <- state$built[[max(state$tried[[i]])]]$from
    if (!is.null(answer$package)) addBuilt(state, i, answer$package)
    return(endInstallation(state, i, answer))
  }
  state$report$r_version[[i]] <- answer$r_version
  text <- paste0(answer$problem, tailText("its output", paste(answer$log, collapse = "\n")))
  if (isTRUE(answer$unfit)) {
    state$kinds[[i]] <- answer
    state$stage[[i]] <- "unfit"
  } else if (task == "compile") {
    # A copy from another host of the kind may come.
    state$kinds[[i]]$compiles <- FALSE
    state$kinds[[i]]$failure <- text
    state$stage[[i]] <- "unfit"
  } else {
    endInstallation(state, i, answer, text)
  }
}

# Fills in the row of a host.
endInstallation <- function(state, i, answer, problem = NA_character_) {
  for (name in intersect(names(answer), c("version", "r_version", "library", "how", "from"))) {
    state$report[[name]][[i]] <- answer[[name]]
  }
  state$report$problem[[i]] <- problem
  state$report$seconds[[i]] <- round(proc.time()[["elapsed"]] - state$began, 2)
  state$stage[[i]] <- "done"
}

tooLate <- function(state, i) {
  running <- state$running[[i]]
  problem <- "the installation did not finish within `timeout`"
  if (state$stage[[i]] == "check") problem <- "no response within `setup_timeout` to whether rustcluster is installed"
  if (!running) problem <- paste(problem, "(no package for its kind was built)")
  read <- function(name) if (running) readText(sessionFile(state, i, name)) else ""
  # A host prints dots while it compiles.
  endInstallation(state, i, list(), hostProblem(state$hosts[[i]], problem, read("err"), sub("[.]*$", "", read("out"))))
}

# Kinds of hosts ----------------------------------------------------------------------------------------

kindName <- function(of) paste0("R ", of$r, ", ", of$system)

# Returns the names of the kinds of the hosts that this machine's package does not fit; NA for the others.
kindNames <- function(state) {
  vapply(state$kinds, function(kind) if (is.null(kind)) NA_character_ else kindName(kind), "")
}

addBuilt <- function(state, i, package) {
  file <- file.path(state$dir, paste0("built.", i))
  kind <- state$kinds[[i]][c("r", "system")]
  writeOrder(file, utils::modifyList(state$package, kind), "copy", package)
  built <- list(file = file, kind = kindName(state$kinds[[i]]), from = state$hosts[[i]]$host)
  state$built <- c(state$built, list(built))
}

# Finds the next thing to do for the hosts of a kind that wait: sends a package that another of them has compiled, or
# has one compile.
serveKind <- function(state, kind) {
  members <- which(kindNames(state) == kind)
  of <- which(vapply(state$built, `[[`, "", "kind") == kind)
  for (i in members[state$stage[members] == "unfit"]) {
    new <- setdiff(of, state$tried[[i]])
    if (length(new)) startSession(state, i, "copy", state$built[[max(new)]]$file, max(new))
  }
  waiting <- members[state$stage[members] == "unfit"]
  if (!length(waiting) || any(state$stage[members] == "compile")) return(invisible())
  able <- waiting[vapply(state$kinds[waiting], `[[`, NA, "compiles")]
  if (length(able)) {
    # What is built with the oldest C library loads with the others.
    libc <- vapply(state$kinds[able], function(kind) c(gsub("[^0-9.]", "", kind$libc), "")[[1L]], "")
    i <- able[order(numeric_version(ifelse(nzchar(libc), libc, "0")))[[1L]]]
    file <- file.path(state$dir, "compile")
    if (!file.exists(file)) writeOrder(file, state$package, "compile", readFiles(state$package$path, "source"))
    startSession(state, i, "compile", file)
  } else if (!any(state$stage == "copy" & (is.na(kindNames(state)) | seq_along(state$stage) %in% members))) {
    # No host that could compile for these is still to answer.
    for (i in waiting) endInstallation(state, i, list(), unfitProblem(state, state$kinds[[i]]))
  }
}

unfitProblem <- function(state, kind) {
  if (!is.null(kind$failure)) return(kind$failure)
  paste0(
    "no host of its kind (", kindName(kind), if (nzchar(kind$libc)) paste0(", ", kind$libc),
    ") has cargo and rustc, version ", state$package$needs_rust, " or newer",
    if (length(kind$seen)) paste0(" (found ", paste(kind$seen, collapse = "; "), ")"),
    ": install them on one of these hosts, with `sudo apt-get install rustc-web cargo-web` (Debian, Ubuntu), ",
    "`sudo dnf install rust cargo` (Fedora), or rustup, from https://rustup.rs; or install a binary package that ",
    "tools/binary.sh has made on such a machine",
    if (length(kind$log)) {
      paste0("\na copy does not load there", tailText("its output", paste(kind$log, collapse = "\n")))
    }
  )
}

showInstalled <- function(row) {
  if (!is.na(row$problem)) return(showProblem(row))
  from <- if (!is.na(row$from)) paste(" from", if (row$from == "localhost") "this machine" else row$from)
  showDone(sprintf(
    "%s: rustcluster %s %s%s in %s, %.1f s", row$host, row$version, row$how, if (is.null(from)) "" else from,
    row$library, row$seconds
  ))
}

# Installing before a start -----------------------------------------------------------------------------

# Installs on those hosts of ssh that do not have this build, for `install = TRUE`. Asks first in an interactive
# session. With `tolerant`, the start goes on with the other hosts. If it `waits` for all hosts, it tells what the
# problem of a host is. Returns these problems for all hosts, NA for none.
installMissing <- function(hosts, timeout, progress, tolerant, waits) {
  problems <- rep(NA_character_, length(hosts))
  reached <- which(vapply(hosts, function(host) !host$local && is.null(host$launcher) && is.null(host$dial), NA))
  if (!length(reached)) return(problems)
  reachedBy <- connections(hosts[reached])
  targets <- unique(reachedBy)
  report <- installOn(targets, "check", timeout)
  # The start would fail for the same reasons.
  if (!tolerant) refuseFailed(report)
  missing <- which(report$how %in% "missing")
  if (!length(missing)) return(problems)
  if (interactive()) askToInstall(report[missing, ])
  report <- installOn(targets[missing], progress = progress)
  if (!tolerant) refuseFailed(report)
  failed <- which(!is.na(report$problem))
  if (!length(failed)) return(problems)
  # A start that does not wait for all hosts may end before it knows of these.
  if (!waits) {
    warning(rustclusterCondition(
      "host_left_out", paste0("rustcluster could not be installed: ", failedHosts(report, failed)),
      host = report$host[failed], report = report, type = "warning"
    ))
    return(problems)
  }
  report$problem[failed] <- paste0("rustcluster could not be installed: ", report$problem[failed])
  problems[reached] <- report$problem[match(reachedBy, targets[missing])]
  problems
}

# Asks whether to install on the hosts of a report. Any answer but yes is an error: it may be the next line of a script.
askToInstall <- function(report) {
  hosts <- paste0("host", if (nrow(report) > 1L) "s", " ", paste(sQuote(report$host), collapse = ", "))
  text <- readline(paste0("Install rustcluster ", packageVersionText(), " on ", hosts, "? (y/n) "))
  if (tolower(trimws(text)) %in% c("y", "yes")) return(invisible())
  abort(
    "install_failed", "rustcluster was not installed on ", hosts, ": answer \"y\", or install it there in another ",
    "way, such as `installOnHosts()`, and leave out `install = TRUE`",
    fields = list(host = report$host, report = report)
  )
}
