# clusterDashboard() and clusterTop() of a run: the cluster is in the runner, which is asked by files in a directory
# that it makes for questions. Only the user can write there.

isRunObject <- function(x) inherits(x, "rustcluster_run")

# Returns the directory for questions to the runner with this state. Each runner has another one: a question to one that
# has died is not answered by the next.
askedDirectory <- function(dir, state) runnerFile(dir, paste(c("asked", state$id), collapse = "-"))

# Asks the runner, on any machine that sees the directory of the run, and returns its answer, or raises its error.
# `question`: a list of `what`, and of what that needs: see answerQuestion().
askRunner <- function(run, question, timeout = 30) {
  failed <- function(...) {
    abort("dashboard_failed", "the runner of ", sQuote(run$dir), ..., fields = list(dir = run$dir))
  }
  asked <- askedDirectory(run$dir, computingState(run))
  name <- basename(tempfile(paste0(thisHost(), "-", Sys.getpid(), "-")))
  file <- function(end) file.path(asked, paste0(name, ".", end))
  on.exit(unlink(file(c("new", "question", "answer"))))
  deadline <- proc.time()[["elapsed"]] + timeout
  await <- function(file) {
    while (!file.exists(file)) {
      if (askedDirectory(run$dir, computingState(run)) != asked) failed(" was replaced by another one: try again")
      if (proc.time()[["elapsed"]] > deadline) {
        failed(
          " has not answered within ", timeout, " s: its cluster may be starting or ending; try again later, and see ",
          "log() of the run"
        )
      }
      Sys.sleep(0.02)
    }
  }
  await(asked)
  tried <- function(expr, what) {
    cannot <- function(e) failed(what, ": ", conditionMessage(e))
    tryCatch(expr, error = cannot, warning = cannot)
  }
  tried(
    {
      saveRDS(question, file("new"))
      file.rename(file("new"), file("question"))
    },
    " cannot be asked, because its directory cannot be written"
  )
  await(file("answer"))
  answer <- tried(readRDS(file("answer")), "'s answer cannot be read; is its disk full?")
  if (inherits(answer, "error")) stop(answer)
  answer
}

# Returns the state of the runner that computes a run, or raises an error if none does.
computingState <- function(run) {
  state <- runnerState(run$dir)
  if (state$state %in% finalStates) {
    abort("stopped", "the run in ", sQuote(run$dir), " is ", state$state, ", and has no cluster any more",
          fields = list(dir = run$dir))
  }
  if (isTRUE(state$session)) {
    badArgument("cl", "is a run that a call of clusterLapply() computes", whereText(state), ": give its cluster there")
  }
  state
}

# Answers all questions to this runner.
answerQuestions <- function(cl) {
  files <- list.files(askedDirectory(runner$dir, runner$state), "[.]question$", full.names = TRUE)
  for (file in files) {
    # Reading a pipe would never end.
    info <- file.info(file, extra_cols = FALSE)
    answer <- if (isTRUE(info$size > 0) && isFALSE(info$isdir)) {
      tryCatch(answerQuestion(readRDS(file), clusterHandle(cl)), error = function(e) e)
    }
    unlink(file, recursive = TRUE)
    if (is.null(answer)) next
    name <- sub("[.]question$", "", file)
    tryCatch(
      {
        saveRDS(answer, paste0(name, ".new"))
        file.rename(paste0(name, ".new"), paste0(name, ".answer"))
      },
      error = function(e) say("a question could not be answered: ", conditionMessage(e))
    )
  }
}

answerQuestion <- function(question, handle) {
  switch(
    question$what,
    figures = topFigures(handle),
    dashboard = {
      warned <- NULL
      shown <- withCallingHandlers(
        pageOf(handle, question$host, question$port),
        rustcluster_dashboard_exposed = function(w) {
          warned <<- w
          invokeRestart("muffleWarning")
        }
      )
      list(shown = shown, warned = warned)
    },
    allow = allowPage(handle, question$name)
  )
}
