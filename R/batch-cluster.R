# Batch jobs as hosts of a cluster: from the launchers in `spec` to agents that have dialled back, and the end of the
# jobs.

isBatch <- function(host) inherits(host$launcher, "rustcluster_batch")

# Returns the entries of a launcher in `spec`: one for each node. The name of a host is known when its agent greets.
#' @exportS3Method
launcherEntries.rustcluster_batch <- function(launcher) {
  settings <- list(launcher = launcher)
  settings$rscript <- launcher$rscript
  settings$rlibs <- launcher$rlibs
  lapply(seq_len(launcher$nodes), function(slot) list(settings = c(settings, slot = slot), workers = launcher$cores))
}

# Gives each node of a launcher a name, "slurm-3", and the number of its launcher in `spec` (`group`).
numberBatchHosts <- function(entries) {
  group <- 0L
  counts <- integer()
  lapply(entries, function(entry) {
    if (!isBatch(entry$settings)) return(entry)
    kind <- entry$settings$launcher$kind
    if (entry$settings$slot == 1L) group <<- group + 1L
    counts[[kind]] <<- if (is.na(counts[kind])) 1L else counts[[kind]] + 1L
    entry$settings$group <- group
    entry$settings$host <- paste0(kind, "-", counts[[kind]])
    entry
  })
}

# Returns what the hub needs of the node of a launcher: see hostLaunch().
batchLaunch <- function(host, options) {
  worker <- c(
    "env", paste0("RUSTCLUSTER_LIB=", dirname(getNamespaceInfo("rustcluster", "path"))),
    batchRscript(host), rscriptArguments(options), "-e", startExpression("workerMain")
  )
  list(host = host$host, worker = worker, dial = host$group)
}

batchRscript <- function(host) {
  launcher <- host$launcher
  launcher$rscript <- host[["rscript"]]
  rscriptOf(launcher)
}

# Listens for agents, and submits the jobs of all launchers of a cluster.
startBatchJobs <- function(handle, hosts, options, heartbeat_timeout) {
  groups <- vapply(hosts, function(host) if (isBatch(host)) host$group else 0L, 0L)
  count <- max(groups, 0L)
  if (!count) return(invisible())
  first <- lapply(seq_len(count), function(group) hosts[[match(group, groups)]])
  launchers <- lapply(first, `[[`, "launcher")
  keys <- vapply(launchers, function(launcher) randomText(32L), "")
  # Agents of a launcher with a login node come through its gateway: nothing listens here for them.
  there <- vapply(launchers, function(launcher) !is.null(launcher$login), NA)
  ports <- if (all(there)) c(0L, 0L) else portsOf(launchers[!there])
  own <- lapply(launchers[!there], function(launcher) {
    if (is.null(launcher$address)) own_addresses() else launcher$address
  })
  at <- if (all(there)) character() else listenAt(own)
  port <- checked(hub_listen(handle$pointer, at, ports[[1L]], ports[[2L]], keys))$port
  id <- randomText(6L)
  for (group in seq_len(count)) {
    host <- first[[group]]
    launcher <- launchers[[group]]
    launcher$rscript <- host[["rscript"]]
    launcher$rlibs <- host$rlibs
    batchId <- paste0(id, if (count > 1L) paste0("-", group))
    if (there[[group]]) {
      engine <- openLogin(
        launcher, batchId, function(path) checked(hub_listen_unix(handle$pointer, path)),
        options$rshcmd, options$rshopts, timeout = options$setup_timeout, heartbeat_timeout = heartbeat_timeout
      )
      handle$logins <- c(handle$logins, list(engine))
      addresses <- paste(engine$link$addresses, engine$link$port)
    } else {
      engine <- engineHost()
      addresses <- paste(if (is.null(launcher$address)) own_addresses() else launcher$address, port)
    }
    key <- c(paste("address", addresses), paste("key", keys[[group]]), paste("launcher", group))
    batch <- submitJobs(
      launcher, batchId, key = key,
      env = c(threadVariables(host$threads), logVariables(), host$rscript_envs), arguments = rscriptArguments(options),
      host = engine
    )
    batch$hosts <- which(groups == group)
    handle$batches <- c(handle$batches, list(batch))
  }
}

# All launchers of a cluster share one port.
portsOf <- function(launchers) {
  ports <- unique(lapply(launchers, `[[`, "port"))
  ports <- ports[vapply(ports, function(port) port[[2L]] > 0L, NA)]
  if (length(ports) > 1L) badArgument("port", "must be the same for all launchers of a cluster")
  if (length(ports)) ports[[1L]] else c(0L, 0L)
}

# Returns the addresses to listen at: those that agents are told, if all are of this machine, and otherwise all.
listenAt <- function(addresses) {
  told <- unique(unlist(addresses))
  if (all(vapply(told, is_own_address, NA))) return(told)
  # A socket of IPv6 accepts IPv4, too.
  if (any(grepl(":", own_addresses(), fixed = TRUE))) "::" else "0.0.0.0"
}

# Looks at the jobs of a cluster: gives up hosts whose jobs have ended before their agents greeted. `giveUp`: called with
# the index of a host and the reason. The engine is asked now and then, and never waited for.
checkBatchJobs <- function(handle, giveUp) {
  for (batch in handle$batches) {
    waiting <- waitingHosts(handle, batch)
    if (!length(waiting)) next
    states <- queryJobs(batch)
    free <- unmatchedJobs(handle, batch, states)
    ended <- free[isFinalState(batch$launcher$kind, states$state[free])]
    # Each job that has not ended may still become one of the hosts.
    count <- min(length(ended), max(0L, length(waiting) - (length(free) - length(ended))))
    for (k in seq_len(count)) giveUp(waiting[[k]], jobProblem(batch, states, ended[[k]]))
  }
}

# Before the start of workers, the problem of a host is noted for its report.
noteJobProblem <- function(handle) function(host, reason) handle$jobProblems[as.character(host)] <- reason

# Afterwards, the cluster goes on without the host.
giveUpHost <- function(handle) function(host, reason) checked(hub_give_up_host(handle$pointer, host, reason), handle)

# Returns the hosts of a batch whose agents have not greeted, and which are not given up.
waitingHosts <- function(handle, batch) {
  known <- checked(hub_hosts(handle$pointer), handle)
  hosts <- batch$hosts[is.na(known$r_version[batch$hosts]) & is.na(known$reason[batch$hosts])]
  setdiff(hosts, as.integer(names(handle$jobProblems)))
}

# Returns the rows of `states` whose agents are not known to have greeted.
unmatchedJobs <- function(handle, batch, states) {
  greeted <- checked(hub_hosts(handle$pointer), handle)$job[batch$hosts]
  greeted <- greeted[!is.na(greeted)]
  number <- sub("^([0-9]+).*$", "\\1", greeted)
  task <- suppressWarnings(as.integer(sub("^.*_", "", greeted)))
  free <- which(!paste(sub("^([0-9]+).*$", "\\1", states$job), states$task) %in% paste(number, task))
  # A job of several nodes has as many agents.
  if (!any(batch$jobs$array) && nrow(batch$jobs) < length(batch$hosts)) free <- seq_len(nrow(states))
  free
}

# Returns why the agent of a job has not greeted, as far as the engine and the log of the job say.
jobProblem <- function(batch, states, i) {
  job <- states$job[[i]]
  task <- states$task[[i]]
  words <- stateText(states$state[[i]], states$reason[[i]])
  paste0(
    "job ", if (is.na(task)) job else taskId(batch$launcher$kind, job, task),
    if (is.na(words)) " has not started its agent" else paste0(" is in state ", words),
    if (!is.null(batch$problem)) paste0("; the engine does not answer: ", batch$problem),
    tailText("log of the job", jobLog(batch, job, task))
  )
}

# Returns the problem of each host that waits for its job, or NA: what makeRustCluster() says when it waits no longer.
waitingProblems <- function(handle, timeout) {
  problems <- rep(NA_character_, length(handle$agents))
  for (batch in handle$batches) {
    states <- awaitStates(batch, 5)
    waiting <- waitingHosts(handle, batch)
    free <- unmatchedJobs(handle, batch, states)
    for (k in seq_along(waiting)) {
      i <- free[min(k, length(free))]
      problems[[waiting[[k]]]] <- paste0(
        "no agent within ", timeout, " s; increase `setup_timeout`, or do not wait for all workers (`wait`): ",
        if (length(i) && !is.na(i)) jobProblem(batch, states, i)
      )
    }
  }
  problems
}

# Calls hosts by the names of their nodes, once their agents have greeted.
nameBatchHosts <- function(handle, nodes) {
  for (batch in handle$batches) for (i in batch$hosts) {
    if (!is.na(nodes[[i]]) && !identical(handle$agents[[i]]$host, nodes[[i]])) {
      handle$agents[[i]]$host <- nodes[[i]]
      handle$hosts[handle$owner == i] <- nodes[[i]]
    }
  }
}

# Ends the jobs of a cluster. `limit`: seconds after which the guards go on alone.
endBatchJobs <- function(handle, limit = 15) {
  for (batch in handle$batches) stopJobs(batch, limit)
  handle$batches <- list()
  for (engine in handle$logins) closeGateway(engine, limit)
  handle$logins <- list()
}
