# What agents and workers run. None of this is called in the head.

# The expression that starts an agent or a separate worker. The package is looked for first where
# the head has it: it may be in a library that a fresh R does not know of.
startExpression <- function(role) {
  paste0(
    "loadNamespace('rustcluster',lib.loc=c(Sys.getenv('RUSTCLUSTER_LIB'),.libPaths()))$",
    role, "()"
  )
}

agentMain <- function() {
  Sys.unsetenv("RUSTCLUSTER_LIB")
  config <- checked(agent_greet(packageVersionText(), rVersionText()))
  if (config$forks) {
    failure <- attachPackages(config$packages)
    if (!is.null(failure)) {
      agent_fail(failure)
      return(invisible())
    }
    # Each fork seeds its own generator, as a fresh process does.
    rm(list = intersect(".Random.seed", ls(globalenv(), all.names = TRUE)), envir = globalenv())
    gc()
  }
  forked <- checked(agent_run())
  if (forked) {
    worker_forget_tempdir()
    serveTasks()
  }
}

workerMain <- function() {
  Sys.unsetenv("RUSTCLUSTER_LIB")
  config <- checked(worker_connect())
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
  checked(worker_ready(tempdir(check = TRUE)))
  state <- new.env(parent = emptyenv())
  # An interrupt that the task does not catch ends it, and nothing else.
  while (tryCatch(serveUntilInterrupt(state), interrupt = function(e) answerInterrupt(state))) NULL
}

serveUntilInterrupt <- function(state) {
  while (serveTask(state)) NULL
  FALSE
}

answerInterrupt <- function(state) {
  if (!is.null(state$message)) {
    value <- structure("the task was interrupted", class = c("snow-try-error", "try-error"))
    answer(state$message, value, FALSE, proc.time() - state$begun)
    state$message <- NULL
  }
  TRUE
}

# parallel's workCommand(), from the message to the answer. FALSE at the end.
serveTask <- function(state) {
  message <- worker_next()
  if (is.null(message)) return(FALSE)
  message <- switch(typeof(message),
    list = message,
    pairlist = tryCatch(unwound(message), error = unreadTask),
    checked(message)
  )
  if (message$type == "DONE") return(FALSE)
  state$begun <- proc.time()
  state$message <- message
  success <- TRUE
  handler <- function(e) {
    success <<- FALSE
    structure(conditionMessage(e), class = c("snow-try-error", "try-error"))
  }
  t1 <- proc.time()
  value <- tryCatch(do.call(message$data$fun, message$data$args, quote = TRUE), error = handler)
  t2 <- proc.time()
  answer(message, value, success, t2 - t1)
  state$message <- NULL
  TRUE
}

# A message that could not be read is answered with the error of reading it.
unreadTask <- function(e) {
  list(type = "EXEC", data = list(fun = stop, args = list(e)))
}

answer <- function(message, value, success, time) {
  answer <- list(type = "VALUE", value = value, success = success, time = time,
                 tag = message$data$tag)
  failed <- tryCatch(checked(worker_send(answer)), error = identity)
  if (inherits(failed, "error") && !inherits(failed, "rustcluster_error")) {
    # The value cannot be serialized.
    answer$value <- structure(conditionMessage(failed), class = c("snow-try-error", "try-error"))
    answer$success <- FALSE
    checked(worker_send(answer))
  }
}
