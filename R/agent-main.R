# The main function of agents, and how agents and workers are started. The head calls startExpression() only.

# Returns the expression that starts an agent or a separate worker. It looks for the package first in the library of the
# head, which may be unknown to a fresh R.
startExpression <- function(role) {
  paste0(
    "loadNamespace('rustcluster',lib.loc=c(Sys.getenv('RUSTCLUSTER_LIB'),.libPaths()))$",
    role, "()"
  )
}

# The main function of an agent that is started by a batch engine: it connects to the head as the file says whose path
# is in RUSTCLUSTER_DIAL. An agent that has restarted itself is connected already.
dialMain <- function() {
  if (!nzchar(Sys.getenv("RUSTCLUSTER_HANDOVER"))) {
    status <- agent_dial(Sys.getenv("RUSTCLUSTER_DIAL"))
    if (!is.null(status)) quit(save = "no", status = status, runLast = FALSE)
  }
  Sys.unsetenv("RUSTCLUSTER_DIAL")
  agentMain()
}

agentMain <- function() {
  # An agent that may outlive its head goes on in a child of this process. One that has restarted itself has done so.
  if (nzchar(Sys.getenv("RUSTCLUSTER_LINGER")) && !nzchar(Sys.getenv("RUSTCLUSTER_HANDOVER"))) {
    Sys.setenv(RUSTCLUSTER_LINGER = checked(agent_split()))
  }
  config <- checked(agent_greet(buildText(), rVersionText(), R.version$platform, tempdir()))
  # These variables are for the agent, and not for processes that its workers start.
  Sys.unsetenv(c(
    "RUSTCLUSTER_LIB", "RUSTCLUSTER_ENDS_WITH_HEAD", "RUSTCLUSTER_HANDOVER", "RUSTCLUSTER_LINGER", "RUSTCLUSTER_JOB",
    "RUSTCLUSTER_JOB_END"
  ))
  after <- union(config$after, intersect(perProcess, config$packages))
  if (config$forks && startedUnsafe()) {
    agent_spawn()
    config$forks <- FALSE
  }
  if (config$forks) {
    # The agent has no random seed afterwards: each fork seeds its own generator, as a fresh process does.
    found <- loadBeforeFork(config$packages, after)
    if (is.character(found)) {
      agent_fail(found)
      return(invisible())
    }
    if (length(found)) return(restartAgent(c(after, names(found))))
    # An R process that has loaded parallel loads tools when it ends: load tools once for all forks.
    loadNamespace("tools")
    readCompiler()
    # Each fork creates its own temporary directory: see serveTasks().
    unlink(tempdir(), recursive = TRUE)
    # Make all objects old: garbage collections of the forks then do not write to the shared pages. A young collection
    # suffices, in a tenth of the time of a full one.
    gc(full = FALSE)
  }
  forked <- checked(agent_run())
  if (forked) {
    # Create the temporary directory before packages ask for it, and report it to the agent, which removes it if this
    # process dies while it loads packages.
    tempdir(check = TRUE)
    if (length(after)) checked(worker_ready(tempdir(), FALSE))
    failure <- loadAfterFork(config$packages, after)
    if (!is.null(failure)) stop(failure)
    serveTasks()
  }
}

# Restarts the agent, after packages have created state that belongs to one process. The process ends like any R
# session, with its exit finalizers. The new agent leaves the packages `after` to its workers.
restartAgent <- function(after) {
  checked(agent_restart(commandArgs(), after))
  # Kill the processes that packages have started, which would be orphans.
  tools::pskill(scan(text = as.character(processState(tempdir())[["started processes"]]), quiet = TRUE))
  quit(save = "no", runLast = FALSE)
}

# Loads R's compiler, which R needs when a function is called for the second time, or loops. It takes some 15 MB, which
# forks share if their agent has loaded it.
readCompiler <- function() {
  as.list(asNamespace("compiler"), all.names = TRUE)
  invisible()
}
