# The start of a cluster: launched agents greet, get a plan of their workers, and start them.

# `handle`: one that is used again.
newHandle <- function(pointer, agents, handle = new.env(parent = emptyenv())) {
  if (is.null(handle)) handle <- new.env(parent = emptyenv())
  handle$pointer <- pointer
  # The settings of the host of each agent (`agents`); for each rank, the name of its host (`hosts`) and the index of
  # its agent (`owner`).
  handle$agents <- agents
  handle$hosts <- character()
  handle$owner <- integer()
  handle$report <- NULL
  # The numbers of hosts and workers before the last start: of the cluster, or of workers that are added to it. Hosts
  # that could not be added are never shown (`hidden`).
  handle$base <- list(hosts = 0L, workers = 0L)
  handle$hidden <- integer()
  # The ranks of the cluster that makeRustCluster() has returned, and its settings; an environment with the last stream
  # of random numbers (`last`) that clusterSetRNGStream() has given to a worker. See add-workers.R.
  handle$made <- integer()
  handle$settings <- NULL
  handle$streams <- NULL
  # How the cluster waits for its head, if it does (linger.R).
  handle$linger <- NULL
  handle$session <- session
  handle$bufferLimit <- 0
  # Ranks that have not been stopped.
  handle$alive <- integer()
  handle$stopped <- FALSE
  # The dashboard, if it is open, and when R last reported batch jobs to it (dashboard.R).
  handle$dashboard <- NULL
  handle$reported <- -Inf
  # Jobs of batch engines (batch-start.R): those of each submission (`batches`); keys, ports and launchers (`dial`);
  # when they were last tended; for each host, since when it waits for a job, the number of new jobs in a row, the tasks
  # that it had done then, and the id of the batch that is being submitted for it.
  handle$batches <- list()
  handle$dial <- NULL
  # For each launcher, where the commands of its engine run (engine-host.R).
  handle$logins <- list()
  handle$tended <- -Inf
  handle$waitsSince <- numeric()
  handle$renewals <- integer()
  handle$tasksDone <- numeric()
  handle$renewing <- character()
  # The states of adaptive launchers (adaptive.R), and the ranks that a verb waits for.
  handle$adaptive <- list()
  handle$bound <- integer()
  # Whether hosts may still join.
  handle$awaits <- FALSE
  # The open job; the numbers of the frames that send its tasks (`frames`) and of its verb (`depth`); the key of the
  # cluster in tables outside of the handle (`id`); the number of the last job (`jobs`). See parallel-methods.R.
  handle$job <- noJob
  handle$frames <- 0L
  handle$depth <- 0L
  handle$id <- basename(tempfile("cluster"))
  handle$jobs <- noJob
  handle$incompleteOutput <- list()
  # The key of the set-up calls of the open job, or NULL for other calls (parallel-methods.R).
  handle$setupKey <- NULL
  # The nodes whose set-up call of the open job was only logged, because they have not joined yet, and whose answers
  # have not been received.
  handle$onlyLogged <- NULL
  # The limit of the set-up log of each agent, in bytes.
  handle$setupLogLimits <- numeric()
  # The limit of the set-up log of the head, in bytes. Lost hosts are restored from that log.
  handle$headLogLimit <- 0
  # Seconds that an idle worker may take to end after stopCluster().
  handle$stopTimeout <- 0
  # Warnings and messages that have not been raised yet (events.R).
  handle$pending <- list()
  # Whether to receive what tasks report while they run, and the number of elements of chunks that they have reported as
  # finished (progress.R).
  handle$receivesReports <- FALSE
  handle$elements <- 0
  # The number by which the hub's thread names the cluster (promises.R).
  awaited$count <- awaited$count + 1
  handle$number <- awaited$count
  assign(as.character(handle$number), handle$id, awaited)
  assign(handle$id, new.env(parent = emptyenv()), openCalls)
  reg.finalizer(handle, forgetCluster)
  handle
}

# Removes all data of a cluster that is not in its handle.
forgetCluster <- function(handle) {
  suppressWarnings({
    rm(list = as.character(handle$number), envir = awaited)
    rm(list = handle$id, envir = openCalls)
    rm(list = handle$id, envir = openFrames)
    rm(list = handle$id, envir = launcherKeys)
    if (!is.null(handle$linger)) rm(list = handle$linger$id, envir = openLingers)
  })
}

# Stops all processes of a cluster whose start has failed.
abandon <- function(handle) {
  on.exit({
    removeRecord(handle)
    stopBatches(handle)
  })
  hub_stop(handle$pointer)
  while (identical(hub_closed(handle$pointer), FALSE)) raiseInterrupt()
}

# Waits for the greetings of the agents and fills in the report: until as many workers as are `needed` can start.
# Returns the deadline for the start of the workers.
greetHosts <- function(handle, asked, deadline, timeout, tolerant, progress, needed) {
  workers <- vapply(seq_along(asked$hosts), function(i) sum(asked$workers[asked$owner == i]), 0L)
  shown <- logical(length(workers))
  new <- handle$base$hosts + seq_along(workers)
  spare <- isSpare(asked$hosts, asked$launchers, length(handle$dial$launchers) - length(asked$launchers))
  repeat {
    done <- checked(hub_greeted(handle$pointer))
    if (length(handle$batches)) {
      hosts <- checked(hub_hosts(handle$pointer))
      nameNodes(handle, hosts)
      leaveOutEnded(handle, hosts)
    }
    late <- proc.time()[["elapsed"]] > deadline
    if (progress || done || late || is.finite(needed)) {
      report <- hostReport(handle, workers, new)
      left <- !is.na(report$problem) & !is.na(asked$problems)
      report$problem[left] <- asked$problems[left]
      known <- !is.na(report$r_version) | !is.na(report$problem)
      # The installation has shown its problems.
      if (progress) for (i in which(known & !shown & !left)) showHost(report, i)
      shown <- known
    }
    if (done || late || (any(spare) && all(known[!spare]))) break
    if (is.finite(needed) && sum(workers[known & is.na(report$problem)]) >= needed) break
    raiseInterrupt()
  }
  if (late) for (i in which(!known & !spare)) report$problem[[i]] <- waitProblem(handle, new[[i]], timeout)
  all <- is.na(report$workers)
  report$workers[all] <- report$cores[all]
  report$problem <- ifelse(
    is.na(report$problem), tooLittleMemory(handle$agents[new], report), report$problem
  )
  setReport(handle, report)
  failed <- new[!is.na(report$problem)]
  if (length(failed)) hostsFailed(handle, failed, tolerant, anyNA(report$problem))
  other <- is.na(report$problem) & known & !report$r_version %in% rVersionText()
  if (any(other)) {
    warning(rustclusterCondition(
      "versions", paste0(
        paste0("R ", report$r_version[other], " on host ", sQuote(report$host[other]),
               collapse = ", "),
        ", and R ", rVersionText(), " here: results may differ"
      ),
      host = report$host[other], type = "warning"
    ))
  }
  # A late host does not shorten the time of the others.
  if (late && !done) deadline + timeout else deadline
}

# Sets the report of the hosts that are being started.
setReport <- function(handle, report) {
  handle$report <- rbind(handle$report[seq_len(handle$base$hosts), ], report)
}

# The minimum memory (bytes) of a worker, by start method, as measured by inst/bench.
minMemory <- c(fork = 2e6, spawn = 37e6)

tooLittleMemory <- function(agents, report) {
  needed <- minMemory[vapply(agents, `[[`, "", "start_method")] * report$workers
  short <- !is.na(report$available) & report$available > 0 & report$available < needed
  ifelse(short, sprintf(
    "not enough memory for %d workers: at least %.1f GB needed, %.1f GB available; ask for fewer",
    report$workers, needed / 1e9, report$available / 1e9
  ), NA_character_)
}

# Raises or warns of failed hosts. `left`: whether other hosts or workers have started.
hostsFailed <- function(handle, failed, tolerant, left) {
  report <- handle$report
  message <- failedHosts(report, failed)
  hosts <- report$host[failed]
  if (!left || !tolerant) {
    what <- if (handle$base$hosts) "the workers could not be added: " else "the cluster could not be started: "
    abort("start_failed", what, message, fields = list(host = hosts, report = report))
  }
  what <- if (handle$base$hosts) "not all workers were added: " else {
    "the cluster was created without some hosts or workers: "
  }
  warning(rustclusterCondition("host_left_out", paste0(what, message), host = hosts, report = report, type = "warning"))
}

# Returns the plan of each agent: what it starts. NULL for an agent that is not used.
hostPlans <- function(handle, asked, launches, settings) {
  base <- handle$base
  new <- base$hosts + seq_along(launches)
  report <- handle$report[new, ]
  usable <- is.na(report$problem)
  workers <- asked$workers
  all <- is.na(workers)
  workers[all] <- report$cores[asked$owner[all]]
  kept <- usable[asked$owner]
  owner <- rep(asked$owner[kept], workers[kept])
  handle$owner <- c(handle$owner, base$hosts + owner)
  # Agents of batch engines have named their nodes.
  handle$hosts <- c(handle$hosts, vapply(handle$agents[new], `[[`, "", "host")[owner])
  limits <- vapply(report$available, setupLogBytes, 0, settings$setup_log_limit)
  handle$setupLogLimits[new] <- limits
  xdr <- otherByteOrder(handle)[new]
  lapply(seq_along(launches), function(i) {
    if (!usable[[i]]) return(NULL)
    agentPlan(handle, settings, new[[i]], base$workers + which(owner == i), launches[[i]]$worker, xdr[[i]])
  })
}

# Returns the plan of the agent with this index. `spawn`: the command that starts a separate worker. `xdr`: whether the
# host has another byte order.
agentPlan <- function(handle, settings, i, ranks, spawn, xdr) {
  host <- handle$agents[[i]]
  list(
    ranks = ranks, packages = settings$packages, outfile = settings$outfile, renice = host$renice,
    mode = host$start_method, spawn = spawn,
    # On this machine the end of the stream is detected at once, without heartbeats.
    heartbeat_timeout = if (host$local) 0L else as.integer(1000 * settings$heartbeat_timeout),
    # A cache of chunks saves no network traffic on this machine.
    chunk_cache_bytes = if (host$local) 0 else handle$setupLogLimits[[i]],
    setup_log_bytes = handle$setupLogLimits[[i]],
    setup = milliseconds(settings$setup),
    memory_limit = settings$memory,
    stop_timeout = ceiling(1000 * settings$stop_timeout),
    local = host$local,
    xdr = xdr,
    linger = agentLinger(handle, i)
  )
}

# Returns 0 for no limit.
milliseconds <- function(seconds) if (is.finite(seconds)) ceiling(1000 * seconds) else 0

# Returns for each host whether its byte order differs from that of this session, so that both use XDR.
otherByteOrder <- function(handle) {
  bigEndian <- checked(hub_hosts(handle$pointer))$big_endian == 1
  # A host that joins later must have the byte order of this session.
  !is.na(bigEndian) & bigEndian != (.Platform$endian == "big")
}

# Returns the limit of the set-up log of an agent and of its cache of chunks, in bytes.
setupLogBytes <- function(available, asked) {
  if (!is.null(asked)) return(asked)
  if (is.na(available) || available <= 0) return(64 * 2^20)
  min(max(available / 8, 16 * 2^20), 2^30)
}

# Waits for the workers of the cluster, or for those that are added to it. Returns the ranks of those that have started.
awaitStart <- function(handle, deadline, timeout, tolerant) {
  late <- paste0("not ready within ", timeout, " s; check the host or increase `setup_timeout`")
  base <- handle$base
  repeat {
    up <- checked(hub_progress(handle$pointer, tolerant), handle)
    awaited <- checked(hub_awaited(handle$pointer, FALSE), handle)
    # Workers that are added have not joined before they have the set-up log.
    if (up >= length(handle$hosts) - if (base$workers) 0L else length(awaited)) break
    if (proc.time()[["elapsed"]] > deadline) {
      # Leave out workers that have not started; the others stay.
      if (tolerant) checked(hub_leave_out(handle$pointer, 0L, late)) else startedLate(handle, up, timeout)
    }
    raiseInterrupt()
  }
  new <- setdiff(seq_along(handle$agents), seq_len(base$hosts))
  before <- handle$report[new, ]
  report <- hostReport(handle, before$workers, new)
  report$problem <- ifelse(is.na(before$problem), report$problem, before$problem)
  terminations <- checked(hub_terminations(handle$pointer), handle)
  # These have not failed.
  terminations[awaited] <- list(NULL)
  noteAwaited(handle, awaited)
  for (i in which(is.na(report$problem))) {
    report$problem[[i]] <- workersProblem(terminations, which(handle$owner == new[[i]]), late)
  }
  setReport(handle, report)
  failed <- new[!is.na(report$problem) & is.na(before$problem)]
  ranks <- setdiff(which(lengths(terminations) == 0L), seq_len(base$workers))
  # An agent without workers is stopped now and is not reconnected.
  for (i in setdiff(failed, handle$owner[ranks])) {
    checked(hub_leave_out(handle$pointer, i, handle$report$problem[[i]]))
  }
  if (length(failed)) hostsFailed(handle, failed, tolerant, length(ranks) > 0L)
  ranks
}

# Records whether hosts may still join. `awaited`: the ranks of workers whose hosts have not joined yet.
noteAwaited <- function(handle, awaited) {
  # Jobs of batch engines may end, and come again.
  handle$awaits <- length(awaited) > 0L || length(handle$batches) > 0L
}

# Returns the number of workers that makeRustCluster() waits for: Inf for all. `spare`: which of the entries of `spec`
# are nodes that adaptive launchers do not submit at the start.
neededWorkers <- function(wait, workers, spare) {
  wait <- plain(wait)
  all <- identical(wait, "all")
  if (all && !any(spare)) return(Inf)
  first <- identical(wait, "first")
  if (!all && !first && (!isCount(wait) || wait < 0)) {
    badArgument("wait", "must be \"all\", \"first\", or a number of workers, at least 0")
  }
  if (anyNA(workers)) {
    if (all) badArgument("spec", "needs the number of workers of each host (`ncore`) beside an adaptive launcher")
    badArgument("wait", "needs the number of workers of each host: set `ncore` in `spec`, or use wait = \"all\"")
  }
  most <- sum(workers[!spare])
  needed <- if (all) most else if (first) min(1, most) else wait
  if (needed > most) {
    what <- if (any(spare)) "without the nodes that are submitted only when tasks wait" else "of `spec`"
    badArgument("wait", "must be at most ", most, ", the number of workers ", what)
  }
  as.double(needed)
}

# Waits until this many workers are ready, while hosts may still join.
awaitWorkers <- function(handle, needed, deadline, timeout) {
  repeat {
    up <- sum(!is.na(newPids(handle)))
    if (up >= needed || !handle$awaits) break
    if (proc.time()[["elapsed"]] > deadline) startedLate(handle, up, timeout)
    awaitArrival(handle)
  }
}

# Waits for up to one slice until a host joins. Returns the ranks of the workers whose hosts have not joined yet.
awaitArrival <- function(handle) {
  awaited <- checked(hub_awaited(handle$pointer, TRUE), handle)
  noteAwaited(handle, awaited)
  showEvents(handle)
  raiseInterrupt()
  awaited
}

# Waits until the hosts of these workers have joined, or will not join.
awaitNodes <- function(handle, ranks) {
  if (!handle$awaits) return(invisible())
  # From here on these nodes are not given back.
  holdNodes(handle, ranks)
  handle$bound <- ranks
  there <- FALSE
  on.exit({
    handle$bound <- integer()
    if (!there && handle$job == noJob) releaseNodes(handle)
  })
  awaited <- checked(hub_awaited(handle$pointer, FALSE), handle)
  if (length(handle$adaptive) && any(ranks %in% awaited)) tendBatches(handle, now = TRUE)
  while (any(ranks %in% awaited)) awaited <- awaitArrival(handle)
  noteAwaited(handle, awaited)
  there <- TRUE
}

# Returns the pids of the workers that are being started, or NA.
newPids <- function(handle) {
  pids <- checked(hub_pids(handle$pointer), handle)
  pids[seq_along(pids) > handle$base$workers]
}

startedLate <- function(handle, up, timeout) {
  new <- seq_along(handle$hosts) > handle$base$workers
  late <- unique(handle$hosts[new][is.na(newPids(handle))])
  abort(
    "start_failed", "only ", up, " of ", sum(new), " workers were ready after ", timeout,
    " s; some workers are missing on host", if (length(late) > 1L) "s", " ", paste(sQuote(late), collapse = ", "),
    ": increase `setup_timeout`, check the hosts, or ask for fewer workers",
    fields = list(host = late)
  )
}

# Returns the problem of the first failed worker among these ranks of a host, or NA if no worker failed.
workersProblem <- function(terminations, ranks, late) {
  failures <- terminations[ranks]
  failed <- which(lengths(failures) > 0L)
  if (!length(failed)) return(NA_character_)
  failure <- failures[[failed[[1L]]]]
  why <- switch(failure[["kind"]],
    worker_lost = paste0(
      failure[["reason"]], if (!is.null(failure[["signal"]])) signalName(failure[["signal"]]),
      " before it was ready", tailText("last output of the worker", failure[["stderr"]])
    ),
    stopped = paste("was", late),
    failure[["reason"]]
  )
  up <- length(ranks) - length(failed)
  paste0(
    if (up) paste0("only ", up, " of ", length(ranks), " workers started") else "no worker started",
    ": worker ", ranks[[failed[[1L]]]], " ", why
  )
}

newCluster <- function(handle, ranks) {
  nodes <- lapply(ranks, function(rank) {
    structure(list(host = handle$hosts[[rank]], rank = rank, handle = handle), class = "RustNode")
  })
  structure(nodes, class = c("RustCluster", "cluster"))
}
