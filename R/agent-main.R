# What an agent runs, and how agents and workers are started. None of this is called in the head.

# The expression that starts an agent or a separate worker. The package is looked for first where
# the head has it: it may be in a library that a fresh R does not know of.
startExpression <- function(role) {
  paste0(
    "loadNamespace('rustcluster',lib.loc=c(Sys.getenv('RUSTCLUSTER_LIB'),.libPaths()))$",
    role, "()"
  )
}

agentMain <- function() {
  config <- checked(agent_greet(packageVersionText(), rVersionText(), R.version$platform, tempdir()))
  # This is about the agent, and not about what its workers start.
  Sys.unsetenv(c("RUSTCLUSTER_LIB", "RUSTCLUSTER_ENDS_WITH_HEAD", "RUSTCLUSTER_HANDOVER"))
  after <- union(config$after, intersect(perProcess, config$packages))
  if (config$forks && startedUnsafe()) {
    agent_spawn()
    config$forks <- FALSE
  }
  if (config$forks) {
    # Each fork seeds its own generator, as a fresh process does: none is left here.
    found <- loadBeforeFork(config$packages, after)
    if (is.character(found)) {
      agent_fail(found)
      return(invisible())
    }
    if (length(found)) return(restartAgent(c(after, names(found))))
    # At its end every R process that has loaded parallel loads tools, too: once is enough.
    loadNamespace("tools")
    readCompiler()
    # Each fork finds the folder gone and makes one of its own: see serveTasks().
    unlink(tempdir(), recursive = TRUE)
    # What is here by now counts as old for the forks' collections, which then do not write to it:
    # a young collection does that, in a tenth of the time of a full one.
    gc(full = FALSE)
  }
  forked <- checked(agent_run())
  if (forked) {
    # Of its own before anything asks for it. Whatever ends this process while it loads packages, the agent
    # knows what is to be removed.
    tempdir(check = TRUE)
    if (length(after)) checked(worker_ready(tempdir(), FALSE))
    failure <- loadAfterFork(config$packages, after)
    if (!is.null(failure)) stop(failure)
    serveTasks()
  }
}

# Packages have made what belongs to one process: this one ends like any R session, with its exit
# finalizers, and begins again as an agent that leaves the packages `after` to its workers.
restartAgent <- function(after) {
  checked(agent_restart(commandArgs(), after))
  # What packages have started is nobody's from then on.
  tools::pskill(scan(text = as.character(processState(tempdir())[["started processes"]]), quiet = TRUE))
  quit(save = "no", runLast = FALSE)
}

# R compiles a function when it is called for the second time, or when it loops, and reads its
# compiler for that: some 15 MB, which forks share if their agent has read it already.
readCompiler <- function() {
  as.list(asNamespace("compiler"), all.names = TRUE)
  invisible()
}
