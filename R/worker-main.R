# The main function of workers. The head calls only the functions that return versions.

workerMain <- function() {
  Sys.unsetenv("RUSTCLUSTER_LIB")
  config <- checked(worker_connect())
  # Report the temporary directory to the agent, which removes it if this process dies.
  checked(worker_ready(tempdir(), FALSE))
  failure <- attachPackages(config$packages)
  if (!is.null(failure)) stop(failure)
  serveTasks()
}

packageVersionText <- function() {
  as.character(getNamespaceVersion("rustcluster"))
}

# Returns the version and the build, by which head and agent know that they are made from the same source.
buildText <- function() {
  paste0(packageVersionText(), if (!is.na(loaded$build)) paste0(" build ", substr(loaded$build, 1L, 8L)))
}

rVersionText <- function() {
  as.character(getRversion())
}

# Returns NULL, or an error message.
attachPackages <- function(packages) {
  for (package in packages) {
    failed <- tryCatch(
      {
        # The line that this package prints when it is attached is for users.
        quietly <- if (identical(package, "rustcluster")) suppressPackageStartupMessages else identity
        quietly(library(package, character.only = TRUE))
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
  # An error or interrupt that a task does not catch ends the task, and nothing else. The handlers are made once, and
  # not for each task.
  while (caught(
    tryCatch(serveReporting(), interrupt = function(e) answerFailure(e, "the task was interrupted", TRUE)),
    failed = function(e) answerFailure(e, withMemoryLimit(conditionMessage(e)))
  )) NULL
}

# Returns the value of the expression, or the value of `failed` for its error. A jump to R's top level, which would end
# the worker, is turned into such an error.
caught <- function(expr, failed) {
  signaled <- NULL
  withRestarts(
    withCallingHandlers(tryCatch(expr, error = failed), condition = function(c) signaled <<- c),
    abort = function() failed(aborted(signaled))
  )
}

# Returns the error for a jump to top level. `signaled`: the last condition that was not caught.
aborted <- function(signaled) {
  # Nothing here may fail, whatever the message of the condition is: an error would end the worker.
  text <- if (!is.null(signaled)) tryCatch(conditionMessage(signaled), error = function(e) NULL)
  # R prints the message of the condition before it jumps.
  says <- function() grepl(text, geterrmessage(), fixed = TRUE, useBytes = TRUE)
  stopped <- is.character(text) && length(text) == 1L && isTRUE(tryCatch(says(), error = function(e) FALSE))
  # Reset geterrmessage() for the next condition.
  try(stop("-"), silent = TRUE)
  how <- if (stopped) {
    paste0(
      "stop() was called with a condition that is not an error, of class ", sQuote(class(signaled)[[1L]]), ": ", text
    )
  } else {
    "the task jumped to R's top level, as invokeRestart(\"abort\") does"
  }
  rustclusterCondition("aborted", how, parent = if (stopped) signaled)
}

# The messages of R's errors for failed allocations.
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

# Adds `memory_limit` to the message of an error for a failed allocation.
withMemoryLimit <- function(text) {
  limit <- worker_memory_limit()
  if (limit == 0 || length(text) != 1L || is.na(text)) return(text)
  # R's messages are in the language of the session.
  beginnings <- sub("[%(].*", "", c(noMemory, gettext(noMemory, domain = "R")))
  if (!any(startsWith(text, beginnings[nzchar(beginnings)]))) return(text)
  size <- if (limit < 1e9) sprintf("%.4g MB", limit / 1e6) else sprintf("%.4g GB", limit / 1e9)
  paste0(text, " (this worker's memory_limit is ", size, ")")
}

# Returns a condition that is small enough to be sent. Removes its call if that contains the arguments themselves, as
# calls by do.call() do. A condition that is still large is reduced to its message.
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

# A progressor that a task calls signals a condition, which no task of a cluster of parallel could show.
serveReporting <- function() withCallingHandlers(serveUntilJump(), progression = reportProgression)

# Returns FALSE when the worker is to end.
serveUntilJump <- function() {
  checked(worker_serve())
  FALSE
}

# Sends an error as the result of the task: an error or interrupt of its code, a message that could not be unserialized,
# or a value that could not be serialized. Without a task or without an agent, the error ends the worker.
answerFailure <- function(e, text, interrupted = FALSE) {
  value <- structure(text, class = c("snow-try-error", "try-error"), condition = sendable(e, text))
  failure <- worker_fail(value, interrupted)
  if (isFailure(failure)) stop(e)
  checked(failure)
  TRUE
}

# Tells the head of an error that the task catches and returns, so that pages show it. A method of conditionMessage()
# is not called: it may have any effect. Nothing that fails here is an error of the task.
tellError <- function(e) {
  message <- tryCatch(.subset2(e, "message"), error = function(e) NULL)
  worker_raised(message)
  NULL
}
