# runs(): runs at the command line.

#' Runs at the command line
#'
#' For cron, ssh and shells: `Rscript -e 'rustcluster::runs()' COMMAND DIR`.
#'
#' \describe{
#'   \item{`list`}{Print the runs that [listRuns()] returns. This is the default.}
#'   \item{`status DIR`}{Print the run. The exit status is 1 if the run failed, was cancelled or is interrupted, or if
#'     elements failed.}
#'   \item{`wait DIR [SECONDS]`}{Wait until nobody computes the run, at most this long, and print it. The exit status is
#'     1 unless all elements have a value.}
#'   \item{`cancel DIR`}{End the runner, on whatever machine it is.}
#'   \item{`resume [--cancelled] [--failed] DIR`}{Start a runner for what is missing and what has failed (the latter not
#'     if the run was started with `.retry_errors = FALSE`). Does nothing if the run is being computed or is done, so
#'     that cron can call it at any time: a run is done if each element has a value or an error. With `--failed`, the
#'     failed elements of a run that is done are computed again. Continues a cancelled run only with `--cancelled`.}
#'   \item{`errors DIR`}{Print the errors of failed elements. The exit status is 1 if there are any.}
#'   \item{`log DIR [LINES]`}{Print the end of the log, by default 20 lines.}
#' }
#'
#' `--help` prints the commands. The exit status is 2 after a wrong command, and 1 after any error, whose message is
#' printed on standard error.
#'
#' @section cron:
#' With a line like this in the crontab, a run continues after a restart of the machine:
#'
#' `@@reboot R_LIBS=/home/me/R/library /usr/bin/Rscript -e 'rustcluster::runs()' resume /data/sweep`
#'
#' cron has neither the `PATH` nor the variables of a session, and starts in the home directory: give the path of
#' Rscript and the absolute path of the run, and in `R_LIBS` the library that contains this package, unless R finds it
#' without. cron takes a `%` for the end of the line, unless there is a backslash before it. This prints the line for a
#' run:
#'
#' ```
#' line <- paste0("R_LIBS=", shQuote(paste(.libPaths(), collapse = ":")), " ",
#'   shQuote(file.path(R.home("bin"), "Rscript")), " -e 'rustcluster::runs()' resume ", shQuote(run$dir))
#' cat("@@reboot ", gsub("%", "\\%", line, fixed = TRUE), "\n", sep = "")
#' ```
#'
#' @param args (character) The command and its arguments. Default: those of the command line.
#' @return The list of runs, invisibly, in an interactive session. Any other session ends.
#' @seealso [startRun()], [openRun()]
#' @examples
#' if (interactive()) runs()
#' @export
runs <- function(args = commandArgs(trailingOnly = TRUE)) {
  if (interactive() && missing(args)) {
    list <- listRuns()
    print(list)
    return(invisible(list))
  }
  status <- tryCatch(runCommand(args), error = function(e) {
    cat("error: ", conditionMessage(e), "\n", sep = "", file = stderr())
    1L
  })
  if (interactive()) return(invisible(status))
  quit(save = "no", status = status, runLast = FALSE)
}

# Runs a command. Returns the exit status.
runCommand <- function(args) {
  cancelled <- "--cancelled" %in% args
  failed <- "--failed" %in% args
  args <- setdiff(args, c("--cancelled", "--failed"))
  command <- if (length(args)) args[[1L]] else "list"
  if (command == "list" && length(args) <= 1L) {
    print(listRuns())
    return(0L)
  }
  usage <- c(
    "usage: Rscript -e 'rustcluster::runs()' list | status DIR | wait DIR [SECONDS] | cancel DIR |",
    "       resume [--cancelled] [--failed] DIR | errors DIR | log DIR [LINES]"
  )
  if (command == "help" || any(c("--help", "-h") %in% args)) {
    writeLines(usage)
    return(0L)
  }
  optional <- command %in% c("wait", "log") && length(args) == 3L
  number <- if (optional) suppressWarnings(as.numeric(args[[3L]]))
  known <- c("list", "status", "wait", "cancel", "resume", "errors", "log")
  flags <- c(if (cancelled) "--cancelled", if (failed) "--failed")
  unknown <- grep("^-", args[-1L], value = TRUE)
  wrong <- if (!command %in% known) {
    paste0("unknown command ", sQuote(command), didYouMean(command, known))
  } else if (length(flags) && command != "resume") {
    paste(flags[[1L]], "is only for `resume`")
  } else if (length(args) == 1L) {
    paste0("`", command, "` needs the directory of a run")
  } else if (command == "list" || length(args) > 2L && !optional) {
    paste0("too many arguments: ", sQuote(if (length(unknown)) unknown[[1L]] else args[[length(args)]]))
  } else if (isTRUE(is.na(number))) {
    paste0(sQuote(args[[3L]]), " is not a number of ", if (command == "wait") "seconds" else "lines")
  }
  if (length(wrong)) {
    cat(paste0("error: ", wrong), usage, sep = "\n", file = stderr())
    return(2L)
  }
  run <- openRun(args[[2L]])
  print <- function(x) base::print(x, command = TRUE)
  switch(command,
    status = {
      print(run)
      exitStatus(run, running = TRUE)
    },
    wait = {
      run$wait(if (is.null(number)) Inf else number, progress = FALSE)
      print(run)
      exitStatus(run, running = FALSE)
    },
    cancel = {
      state <- run$status()$state
      ended <- run$cancel()
      if (state %in% setdiff(finalStates, "interrupted")) cat("nothing to cancel: the run is ", state, "\n", sep = "")
      if (!ended) cat("the runner was told to end, but has not ended yet\n")
      print(run)
      as.integer(!ended)
    },
    resume = resumeCommand(run, cancelled, failed, print),
    errors = {
      errors <- run$errors()
      if (nrow(errors)) print(errors)
      as.integer(nrow(errors) > 0L)
    },
    log = {
      writeLines(run$log(if (is.null(number)) 20 else number))
      0L
    }
  )
}

# Starts a runner, if there is something to do for it, and says what was done. Returns the exit status.
resumeCommand <- function(run, cancelled, failed, print) {
  status <- run$status()
  if (status$state == "cancelled" && !cancelled) {
    cat("the run was cancelled: `resume --cancelled DIR` continues it\n")
    return(0L)
  }
  # Also a run of clusterLapply() is done, or is being computed.
  due <- status$state %in% finalStates && (status$state != "done" || (failed && status$failed))
  started <- due && run$resume()
  cat(
    if (started) "a runner was started" else paste0(
      "nothing was started: ",
      if (!status$state %in% finalStates || (due && status$state != "done")) {
        "the run is being computed"
      } else if (!status$failed) {
        "all elements have a value"
      } else if (failed) {
        "the run has `.retry_errors = FALSE`, and failed elements keep their errors"
      } else {
        "all elements have a value or an error; `resume --failed DIR` computes failed elements again"
      }
    ), "\n", sep = ""
  )
  print(run)
  0L
}

# Returns 0 if all elements have a value, or may still get one. `running`: whether a run that is being computed is well.
exitStatus <- function(run, running) {
  status <- run$status()
  well <- status$state == "done" || (running && !status$state %in% finalStates)
  as.integer(!well || status$failed > 0)
}
