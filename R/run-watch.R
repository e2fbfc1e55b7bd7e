# clusterDashboard() and clusterTop() of a run: the cluster is in the runner, which is asked by files in its directory.
# That directory is private to the user.

isRunObject <- function(x) inherits(x, "rustcluster_run")

askedFile <- function(dir, names) runnerFile(dir, file.path("asked", names))

# Asks the runner, on any machine that sees the directory of the run, and returns its answer, or raises its error.
# `question`: a list of `what`, and of what that needs: see answerQuestion().
askRunner <- function(run, question, timeout = 30) {
  refuseEnded(run)
  dir.create(runnerFile(run$dir, "asked"), FALSE, mode = "0700")
  name <- basename(tempfile(paste0(thisHost(), "-", Sys.getpid(), "-")))
  file <- function(end) askedFile(run$dir, paste0(name, ".", end))
  on.exit(unlink(file(c("new", "question", "answer"))))
  saveRDS(question, file("new"))
  file.rename(file("new"), file("question"))
  deadline <- proc.time()[["elapsed"]] + timeout
  while (!file.exists(file("answer"))) {
    refuseEnded(run)
    if (proc.time()[["elapsed"]] > deadline) {
      abort(
        "dashboard_failed", "the runner of ", sQuote(run$dir), " has not answered within ", timeout, " s",
        if (runnerState(run$dir)$state == "starting") ": its cluster starts; try again later, and see log() of the run",
        fields = list(dir = run$dir)
      )
    }
    Sys.sleep(0.02)
  }
  answer <- readRDS(file("answer"))
  if (inherits(answer, "error")) stop(answer)
  answer
}

# Raises an error unless a runner computes the run.
refuseEnded <- function(run) {
  state <- runnerState(run$dir)
  if (state$state %in% finalStates) {
    abort("stopped", "the run in ", sQuote(run$dir), " is ", state$state, ", and has no cluster any more",
          fields = list(dir = run$dir))
  }
  if (!isLocked(run$dir)) {
    badArgument("cl", "is a run that a call of clusterLapply() computes", whereText(state), ": give its cluster there")
  }
}

# Answers all questions to this runner.
answerQuestions <- function(cl) {
  for (file in list.files(runnerFile(runner$dir, "asked"), "[.]question$", full.names = TRUE)) {
    answer <- tryCatch(answerQuestion(readRDS(file), clusterHandle(cl)), error = function(e) e)
    unlink(file, recursive = TRUE)
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
