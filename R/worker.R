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
    # At its end every R process that has loaded parallel loads tools, too: once is enough.
    loadNamespace("tools")
    # Each fork finds the folder gone and makes one of its own: see serveTasks().
    unlink(tempdir(), recursive = TRUE)
    gc()
  }
  forked <- checked(agent_run())
  if (forked) serveTasks()
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
  # The message that is being worked on.
  state <- new.env(parent = emptyenv())
  # What a task does not catch itself ends it, and nothing else. The handlers are made once and not
  # for each task.
  while (tryCatch(
    serveUntilJump(state),
    interrupt = function(e) answerFailure(state, "the task was interrupted"),
    error = function(e) answerFailure(state, conditionMessage(e), e)
  )) NULL
}

serveUntilJump <- function(state) {
  while (serveTask(state)) NULL
  FALSE
}

# parallel's workCommand(), from the message to the answer. FALSE at the end.
serveTask <- function(state) {
  state$message <- NULL
  message <- worker_next()
  if (is.null(message)) return(FALSE)
  if (typeof(message) != "list") checked(message)
  state$message <- message
  if (message$type == "DONE") return(FALSE)
  success <- TRUE
  handler <- function(e) {
    success <<- FALSE
    structure(conditionMessage(e), class = c("snow-try-error", "try-error"))
  }
  t1 <- proc.time()
  value <- tryCatch(do.call(message$data$fun, message$data$args, quote = TRUE), error = handler)
  t2 <- proc.time()
  sent <- worker_send(list(
    type = "VALUE", value = value, success = success, time = t2 - t1, tag = message$data$tag
  ))
  if (!is.null(sent)) checked(sent)
  TRUE
}

# An interrupt, or an error outside of the task's own code: the message could not be read, or the
# value could not be serialized. Without a channel there is nobody to tell.
answerFailure <- function(state, text, e = NULL) {
  if (inherits(e, "rustcluster_error")) stop(e)
  checked(worker_send(list(
    type = "VALUE", value = structure(text, class = c("snow-try-error", "try-error")),
    success = FALSE, time = structure(numeric(5), class = "proc_time"), tag = state$message$data$tag
  )))
  TRUE
}
