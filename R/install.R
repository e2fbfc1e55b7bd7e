# installOnHosts(): sends the source of the package to other hosts over ssh and installs it there.

#' Install rustcluster on other hosts
#'
#' Sends the source of the running version of \pkg{rustcluster} to each host over ssh and installs it there, on all
#' hosts in parallel. A host needs R and a Rust toolchain ('cargo' and 'rustc'). Compiling takes from half a minute to a
#' few minutes, depending on the cores of the host.
#'
#' @param hosts Hosts, in any form that [makeRustCluster()] accepts: names, numbers named by hosts, or a list of lists
#'   with `host` and any of `user`, `port`, `rshcmd`, `rshopts`, `rscript` and `rlibs`. Numbers of workers are ignored.
#'   Each host is installed on once. This machine is skipped.
#' @param ... `user`, `rshcmd`, `rshopts`, `rscript`, `rlibs`: for all hosts, as in [makeRustCluster()]. `rlibs` is the
#'   library to install into. Default: the personal library of the user (`R_LIBS_USER`), which is created if it does not
#'   exist.
#' @param timeout (number) Seconds after which an installation counts as failed; default 3600. The installation on the
#'   host may still finish after that.
#' @param progress (logical) Whether to print a line for each host when it is done.
#'
#' @return Invisibly, a data frame with a row for each host:
#'   \describe{
#'     \item{host, user}{(character) as in `hosts`; `user` is `NA` without a user.}
#'     \item{version, r_version}{(character) of rustcluster and of R on the host.}
#'     \item{library}{(character) the library that rustcluster was installed into.}
#'     \item{seconds}{(numeric) duration of the installation.}
#'     \item{problem}{(character) `NA`.}
#'   }
#' @section Errors:
#' `rustcluster_install_failed`: some hosts failed. The error is raised when all hosts are done. It names the failed
#' hosts, the reasons, and what to do; its field `report` is the data frame, with the reasons in `problem`.
#' `rustcluster_bad_argument`.
#' @seealso [makeRustCluster()]
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
  # Ignore the settings of workers: entries that differ in them alone are the same host.
  hosts <- lapply(specHosts(hosts, given)$hosts, function(host) {
    if (!is.null(host$launcher)) {
      badArgument(
        "hosts", "contains a launcher (host ", sQuote(host$host), "); install rustcluster where its command runs R, ",
        "as in the image of a container"
      )
    }
    host[intersect(c("host", "user", "port", "local", known), names(host))]
  })
  hosts <- unique(hosts)
  source <- system.file("source", "rustcluster.tar.gz", package = "rustcluster")
  if (!nzchar(source)) {
    abort("install_failed", "this installation of rustcluster lacks its source; install it with ",
          "`R CMD INSTALL` in this session's library and try again")
  }
  report <- sendSource(hosts, source, timeout, progress)
  failed <- which(!is.na(report$problem))
  if (length(failed)) {
    abort("install_failed", "rustcluster could not be installed: ", failedHosts(report, failed),
          fields = list(host = report$host[failed], report = report))
  }
  invisible(report)
}

# Returns the sh script that runs on the host: it unpacks stdin and runs the host's R.
hostInstallation <- function(host) {
  rscript <- if (is.null(host[["rscript"]])) "Rscript" else host[["rscript"]]
  paste0(
    "unset R_HOME; d=`mktemp -d` || exit 1; trap 'rm -rf \"$d\"' EXIT; cd \"$d\" && tar xzf - && ",
    paste(shQuote(c(rscript, "tools/on-host.R", host$rlibs[1L])), collapse = " ")
  )
}

# Runs one ssh for each host, all in parallel. Each writes its exit status to a file when it ends.
sendSource <- function(hosts, source, timeout, progress) {
  dir <- tempfile("install-")
  dir.create(dir)
  path <- function(i, name) file.path(dir, paste0(i, ".", name))
  on.exit({
    for (i in which(!done)) tools::pskill(as.integer(readText(path(i, "pid"))))
    unlink(dir, recursive = TRUE)
  })
  began <- proc.time()[["elapsed"]]
  report <- data.frame(
    host = vapply(hosts, `[[`, "", "host"),
    user = vapply(hosts, function(host) c(host[["user"]], NA_character_)[[1L]], ""),
    version = NA_character_, r_version = NA_character_, library = NA_character_,
    seconds = NA_real_, problem = NA_character_, stringsAsFactors = FALSE
  )
  local <- vapply(hosts, `[[`, NA, "local")
  report$version[local] <- packageVersionText()
  report$r_version[local] <- rVersionText()
  report$library[local] <- dirname(getNamespaceInfo("rustcluster", "path"))
  report$seconds[local] <- 0
  done <- local
  for (i in which(!local)) {
    command <- paste(shQuote(sshCommand(hosts[[i]], hostInstallation(hosts[[i]]))), collapse = " ")
    file <- function(name) shQuote(path(i, name))
    script <- paste0(
      "(sh -c ", shQuote(paste0("echo $$ > ", file("pid"), "; exec ", command)),
      " < ", shQuote(source), " > ", file("out"), " 2> ", file("err"),
      "; echo $? > ", file("new"), "; mv ", file("new"), " ", file("status"), ") 2> /dev/null &"
    )
    system(script)
  }
  while (!all(done)) {
    late <- proc.time()[["elapsed"]] - began > timeout
    for (i in which(!done)) {
      if (!late && !file.exists(path(i, "status"))) next
      done[[i]] <- file.exists(path(i, "status"))
      report$seconds[[i]] <- proc.time()[["elapsed"]] - began
      report[i, ] <- installed(report[i, ], hosts[[i]], if (done[[i]]) readText(path(i, "status")),
                               readText(path(i, "out")), readText(path(i, "err")))
      if (progress) showInstalled(report[i, ])
    }
    if (late) break
    Sys.sleep(0.1)
  }
  report
}

readText <- function(file) {
  if (!file.exists(file)) return("")
  paste(readLines(file, warn = FALSE), collapse = "\n")
}

# Adds the result of a host to its row. `status`: the exit status; NULL if the installation has not ended.
installed <- function(row, host, status, out, err) {
  parts <- strsplit(out, "<rustcluster installed 1>\n", fixed = TRUE)[[1L]]
  if (length(parts) < 2L) {
    reason <- if (is.null(status)) {
      "the installation did not finish within `timeout`"
    } else {
      paste("the installation ended with status", status)
    }
    row$problem <- hostProblem(host, reason, err, out, suppressWarnings(as.integer(c(status, NA)[[1L]])))
    return(row)
  }
  text <- textConnection(parts[[2L]])
  on.exit(close(text))
  fields <- read.dcf(text, keep.white = "log")[1L, ]
  row$version <- fields[["version"]]
  row$r_version <- fields[["r_version"]]
  row$library <- fields[["library"]]
  if (nzchar(fields[["problem"]])) {
    log <- gsub("(^|\n)[[:space:]]*[|]", "\\1", fields[["log"]])
    row$problem <- paste0(fields[["problem"]], tailText("its output", log))
  }
  row
}

showInstalled <- function(row) {
  if (is.na(row$problem)) {
    showDone(sprintf(
      "%s: rustcluster %s in %s, %.0f s", row$host, row$version, row$library, row$seconds
    ))
  } else {
    showProblem(row)
  }
}
