# What a worker runs. None of this is called in the head.

workerMain <- function() {
  Sys.unsetenv("RUSTCLUSTER_LIB")
  config <- checked(worker_connect())
  # Whatever ends this process from here on, the agent knows what is to be removed.
  checked(worker_ready(tempdir(), FALSE))
  failure <- attachPackages(config$packages)
  if (!is.null(failure)) stop(failure)
  serveTasks()
}

packageVersionText <- function() {
  as.character(getNamespaceVersion("rustcluster"))
}

rVersionText <- function() {
  as.character(getRversion())
}

# NULL, or what went wrong.
attachPackages <- function(packages) {
  for (package in packages) {
    failed <- tryCatch(
      {
        library(package, character.only = TRUE)
        NULL
      },
      error = conditionMessage
    )
    if (!is.null(failed)) {
      return(paste0("package ", sQuote(package), " could not be attached: ", failed))
    }
  }
  NULL
}

serveTasks <- function() {
  checked(worker_ready(tempdir(check = TRUE), TRUE))
  # What a task does not catch itself ends it, and nothing else. The handlers are made once and not
  # for each task.
  while (caught(
    tryCatch(serveUntilJump(), interrupt = function(e) answerFailure(e, "the task was interrupted", TRUE)),
    failed = function(e) answerFailure(e, withMemoryLimit(conditionMessage(e)))
  )) NULL
}

# The value of the expression, or of `failed` of the error that ended it. A jump to R's top level, which
# would end the worker, is such an error.
caught <- function(expr, failed) {
  signaled <- NULL
  withRestarts(
    withCallingHandlers(tryCatch(expr, error = failed), condition = function(c) signaled <<- c),
    abort = function() failed(aborted(signaled))
  )
}

# `signaled`: the last condition that nobody has caught.
aborted <- function(signaled) {
  # Text of any kind, and nothing of this may fail: the jump would end the worker.
  text <- if (!is.null(signaled)) tryCatch(conditionMessage(signaled), error = function(e) NULL)
  # What R says before it jumps because of it.
  says <- function() grepl(text, geterrmessage(), fixed = TRUE, useBytes = TRUE)
  stopped <- is.character(text) && length(text) == 1L && isTRUE(tryCatch(says(), error = function(e) FALSE))
  # It has been said: the next one may be another.
  try(stop("-"), silent = TRUE)
  how <- if (stopped) {
    paste0(
      "stop() was called with a condition that is no error, of class ", sQuote(class(signaled)[[1L]]), ": ", text
    )
  } else {
    "the task was ended by a jump to R's top level, as invokeRestart(\"abort\") makes it"
  }
  rustclusterCondition("aborted", how, parent = if (stopped) signaled)
}

# How R's errors begin that say that there is no more memory.
noMemory <- c(
  "cannot allocate vector of size %0.1f Gb", "cannot allocate vector of size %0.1f Mb",
  "cannot allocate vector of size %0.f Kb", "cannot allocate memory block of size %0.1f Tb",
  "cannot allocate memory block of size %0.1f Gb", "cannot allocate memory block of size %0.1f Mb",
  "cannot allocate memory block of size %0.f Kb", "vector memory exhausted (limit reached?)",
  "cons memory exhausted (limit reached?)", "'Calloc' could not allocate memory (%.0f of %u bytes)",
  "'R_Calloc' could not allocate memory (%.0f of %u bytes)",
  "'Realloc' could not re-allocate memory (%.0f bytes)",
  "'R_Realloc' could not re-allocate memory (%.0f bytes)"
)

# An error's text, which says so if it comes from this worker's limit.
withMemoryLimit <- function(text) {
  limit <- worker_memory_limit()
  if (limit == 0 || length(text) != 1L || is.na(text)) return(text)
  # R's messages are in the language of the session.
  beginnings <- sub("[%(].*", "", c(noMemory, gettext(noMemory, domain = "R")))
  if (!any(startsWith(text, beginnings[nzchar(beginnings)]))) return(text)
  size <- if (limit < 1e9) sprintf("%.4g MB", limit / 1e6) else sprintf("%.4g GB", limit / 1e9)
  paste0(text, " (this worker's memory_limit is ", size, ")")
}

# A condition without a call that holds the arguments themselves, as ours do. One that is large all the
# same is left with its text.
sendable <- function(e, text) {
  small <- tryCatch(
    {
      call <- conditionCall(e)
      if (is.call(call) && !is.symbol(call[[1L]])) e["call"] <- list(NULL)
      utils::object.size(e) < 1e5
    },
    error = function(e) FALSE
  )
  if (small) e else simpleError(text)
}

# FALSE at the end.
serveUntilJump <- function() {
  checked(worker_serve())
  FALSE
}

# An error or an interrupt of the task's, or an error outside of its code: the message could not be
# read, or the value could not be serialized. Without a task, or anybody to tell, it is our own end.
answerFailure <- function(e, text, interrupted = FALSE) {
  value <- structure(text, class = c("snow-try-error", "try-error"), condition = sendable(e, text))
  failure <- worker_fail(value, interrupted)
  if (isFailure(failure)) stop(e)
  checked(failure)
  TRUE
}
