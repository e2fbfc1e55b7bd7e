# The package on other hosts: its source goes there over ssh and is installed there.

#' Install rustcluster on other hosts
#'
#' Sends the source of this very version of \pkg{rustcluster} to each host, over
#' ssh, and installs it there, on all hosts at once. A host needs R and a Rust
#' toolchain ('cargo' and 'rustc'); what compiling takes there depends on its
#' cores: from half a minute to some minutes.
#'
#' @param hosts Hosts, in any form that [makeRustCluster()] takes: names, numbers
#'   named by hosts, or a list of lists with `host` and any of `user`, `port`,
#'   `rshcmd`, `rshopts`, `rscript` and `rlibs`. Numbers of workers do not matter,
#'   and each host is installed on once. This machine is passed over.
#' @param ... `user`, `rshcmd`, `rshopts`, `rscript`, `rlibs`: for all hosts, as in
#'   [makeRustCluster()]. `rlibs` is the library to install into; by default the
#'   user's own (`R_LIBS_USER`), which is made if there is none.
#' @param timeout (number) Seconds after which a host that has not come to an
#'   end is given up; default 3600. What it has begun there may still come to an
#'   end.
#' @param progress (logical) Whether to show a line for each host as it is done.
#'
#' @return Invisibly, a data frame with a row for each host:
#'   \describe{
#'     \item{host, user}{(character) as they were given; `user` is `NA` where none was.}
#'     \item{version, r_version}{(character) of rustcluster and of R there.}
#'     \item{library}{(character) where it was installed.}
#'     \item{seconds}{(numeric) that it took.}
#'     \item{problem}{(character) `NA`.}
#'   }
#' @section Errors:
#' `rustcluster_install_failed`, when all hosts are done and some have failed,
#' names these, why, and what to do; its field `report` is the data frame.
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
  # Numbers of workers, and what workers are started with, make no other host.
  hosts <- lapply(specHosts(hosts, given)$hosts, function(host) {
    host[intersect(c("host", "user", "port", "here", known), names(host))]
  })
  hosts <- unique(hosts)
  source <- system.file("source", "rustcluster.tar.gz", package = "rustcluster")
  if (!nzchar(source)) {
    abort("install_failed", "this rustcluster has been installed without its source: install it ",
          "here with `R CMD INSTALL`, and try again")
  }
  report <- sendSource(hosts, source, timeout, progress)
  failed <- which(!is.na(report$problem))
  if (length(failed)) {
    abort("install_failed", "rustcluster could not be installed: ", failedHosts(report, failed),
          fields = list(host = report$host[failed], report = report))
  }
  invisible(report)
}

# Unpacks what comes on stdin and has the host's R go on. In sh.
hostInstallation <- function(host) {
  rscript <- if (is.null(host[["rscript"]])) "Rscript" else host[["rscript"]]
  paste0(
    "unset R_HOME; d=`mktemp -d` || exit 1; trap 'rm -rf \"$d\"' EXIT; cd \"$d\" && tar xzf - && ",
    paste(shQuote(c(rscript, "tools/on-host.R", host$rlibs[1L])), collapse = " ")
  )
}

# One ssh a host, all at once; each leaves its status in a file when it ends.
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
  here <- vapply(hosts, `[[`, NA, "here")
  report$version[here] <- packageVersionText()
  report$r_version[here] <- rVersionText()
  report$library[here] <- dirname(getNamespaceInfo("rustcluster", "path"))
  report$seconds[here] <- 0
  done <- here
  for (i in which(!here)) {
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

# Adds to a host's row what it said. `status`: NULL if it has not ended.
installed <- function(row, host, status, out, err) {
  parts <- strsplit(out, "<rustcluster installed 1>\n", fixed = TRUE)[[1L]]
  if (length(parts) < 2L) {
    reason <- if (is.null(status)) {
      "no end within the `timeout`"
    } else {
      paste("the installation ended with status", status)
    }
    row$problem <- hostProblem(host, reason, err, out, suppressWarnings(as.integer(c(status, NA)[[1L]])))
    return(row)
  }
  text <- textConnection(parts[[2L]])
  on.exit(close(text))
  said <- read.dcf(text, keep.white = "log")[1L, ]
  row$version <- said[["version"]]
  row$r_version <- said[["r_version"]]
  row$library <- said[["library"]]
  if (nzchar(said[["problem"]])) {
    log <- gsub("(^|\n)[[:space:]]*[|]", "\\1", said[["log"]])
    row$problem <- paste0(said[["problem"]], tailText("its output", log))
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
