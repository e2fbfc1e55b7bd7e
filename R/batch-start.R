# Batch launchers as part of a cluster: the hosts that a launcher stands for, the start of its jobs, and what becomes of
# hosts whose jobs end. The jobs themselves: batch-jobs.R.

#' @export
launcherEntries.rustcluster_batch <- function(launcher) {
  title <- sub("template", "job", launcher$kind, fixed = TRUE)
  lapply(seq_len(launcher$nodes), function(slot) {
    settings <- list(host = paste0(title, "-", slot), batch = launcher, slot = slot)
    settings$rscript <- rscriptOf(launcher)
    if (!is.null(launcher$rlibs)) settings$rlibs <- launcher$rlibs
    list(settings = settings, workers = launcher$cores)
  })
}

# Returns the launchers of batch engines among the entries of `spec`, in their order: each has a slot 1.
batchLaunchers <- function(entries) {
  firsts <- Filter(function(entry) identical(entry$settings$slot, 1L), entries)
  lapply(firsts, function(entry) entry$settings$batch)
}

# Replaces the launcher in entries by its number, `dial`, which tells two equal launchers apart.
numberLaunchers <- function(entries, launchers, before = 0L) {
  number <- before
  lapply(entries, function(entry) {
    if (is.null(entry$settings$batch)) return(entry)
    if (entry$settings$slot == 1L) number <<- number + 1L
    entry$settings$batch <- NULL
    entry$settings$dial <- number
    # Hosts of several launchers would have the same names.
    if (before + length(launchers) > 1L) entry$settings$host <- paste0(entry$settings$host, "-", letterOf(number))
    entry
  })
}

letterOf <- function(number) if (number <= 26L) letters[[number]] else as.character(number)

# Listens for the agents of all launchers and submits their jobs. Adds to `handle$batches`, `handle$logins` and
# `handle$dial`.
startBatches <- function(handle, asked, options, heartbeat_timeout) {
  if (!length(asked$launchers)) return(invisible())
  dial <- handle$dial
  numbers <- length(dial$launchers) + seq_along(asked$launchers)
  keys <- c(launcherKeys[[handle$id]], vapply(asked$launchers, function(launcher) randomText(32L), ""))
  assign(handle$id, keys, launcherKeys)
  dial$launchers <- c(dial$launchers, asked$launchers)
  if (!is.null(handle$linger)) checked(hub_cluster_key(handle$pointer, lingerKeys[[handle$linger$id]]))
  dial$ports <- listenFor(handle, dial$launchers, keys, dial$ports)
  handle$logins[numbers] <- list(engineHost())
  for (number in numbers[areThere(dial$launchers[numbers])]) {
    # From here on stopBatches() closes it.
    handle$logins[[number]] <- openLogin(
      dial$launchers[[number]], function(path) checked(hub_listen_unix(handle$pointer, path), handle),
      options$rshcmd, options$rshopts, timeout = options$setup_timeout, heartbeat_timeout = heartbeat_timeout
    )
    dial$launchers[[number]]$dir <- handle$logins[[number]]$link$dir
    dial$ports[[number]] <- handle$logins[[number]]$link$port
  }
  dial$addresses[numbers] <- lapply(numbers, function(number) {
    dialAddresses(dial$launchers[[number]], handle$logins[[number]])
  })
  dial$scripts <- c(dial$scripts, lapply(numbers, function(number) {
    host <- Find(function(host) identical(host$dial, number), asked$hosts)
    list(env = agentVariables(host), arguments = rscriptArguments(options))
  }))
  handle$dial <- dial
  first <- length(handle$batches) + 1L
  fixed <- vapply(dial$launchers[numbers], function(launcher) is.null(launcher$adaptive), NA)
  for (number in numbers[fixed]) addBatch(handle, number, dial$launchers[[number]])
  new <- setdiff(seq_along(handle$batches), seq_len(first - 1L))
  for (batch in handle$batches[new]) awaitSubmissions(batch, 70)
  for (i in new) handle$batches[[i]]$submitting <- FALSE
  of <- vapply(asked$hosts, function(host) c(host$dial, NA)[[1L]], 0L)
  for (number in numbers[!fixed]) {
    startAdaptive(handle, number, dial$launchers[[number]], handle$base$hosts + which(of == number))
  }
}

# Returns whether the jobs of launchers are submitted on login nodes.
areThere <- function(launchers) vapply(launchers, function(launcher) !is.null(launcher$login), NA)

# The keys of the launchers of clusters, by `handle$id`, and there by their numbers. A handle does not have them.
launcherKeys <- new.env(parent = emptyenv())

# Returns the ports on which the head listens for the agents of each launcher: 0 for those with a login node, whose
# agents come through a gateway. Launchers with the same `port` and addresses share one. `ports`: those of the first
# launchers, which are known.
listenFor <- function(handle, launchers, keys, ports = integer()) {
  there <- areThere(launchers)
  # Without addresses the hub only learns the keys.
  if (length(ports) || all(there)) checked(hub_listen(handle$pointer, character(), 0L, 0L, keys), handle)
  at <- lapply(launchers, function(launcher) {
    if (!is.null(launcher$login)) return(NULL)
    list(addresses = listenAddresses(launcher), port = launcher$port)
  })
  new <- setdiff(seq_along(at), seq_along(ports))
  ports[new] <- 0L
  for (number in setdiff(new, which(there))) {
    same <- Position(function(other) identical(other, at[[number]]), at)
    ports[[number]] <- if (same < number) {
      ports[[same]]
    } else {
      port <- at[[number]]$port
      checked(hub_listen(handle$pointer, at[[number]]$addresses, port[[1L]], port[[2L]], keys), handle)$port
    }
  }
  ports
}

# Returns the addresses at which the head listens for the agents of a launcher.
listenAddresses <- function(launcher) {
  own <- length(launcher$address) && all(vapply(launcher$address, is_own_address, NA))
  if (own) launcher$address else if (listensAtVersion6()) "::" else "0.0.0.0"
}

# Submits jobs of a launcher, and does not wait for the engine. Without `submit`, only makes everything ready.
addBatch <- function(handle, number, launcher, submit = TRUE) {
  dial <- handle$dial
  host <- handle$logins[[number]]
  key <- c(
    sprintf("address %s %d", dial$addresses[[number]], dial$ports[[number]]),
    paste("key", launcherKeys[[handle$id]][[number]]), paste("launcher", number)
  )
  batch <- prepareJobs(launcher, randomText(6L), dial$scripts[[number]]$env, dial$scripts[[number]]$arguments, host)
  batch$number <- number
  batch$submitting <- TRUE
  # From here on abandon() and stopCluster() end it.
  handle$batches <- c(handle$batches, list(batch))
  startWithKey(batch, key)
  if (submit) sendSubmissions(batch)
  batch
}

# Returns the addresses that agents of a launcher try, in turn. `host`: where the commands of its engine run.
dialAddresses <- function(launcher, host) {
  if (is.null(host$link)) headAddresses(launcher) else host$link$addresses
}

headAddresses <- function(launcher) {
  if (length(launcher$address)) return(launcher$address)
  addresses <- own_addresses()
  version6 <- grepl(":", addresses, fixed = TRUE)
  if (listensAtVersion6()) unique(c(addresses, "::1")) else unique(c(addresses[!version6], "127.0.0.1"))
}

# Returns whether the head listens for IPv6, because this machine has no other address.
listensAtVersion6 <- function() {
  addresses <- own_addresses()
  length(addresses) > 0L && all(grepl(":", addresses, fixed = TRUE))
}

# Ends jobs of a cluster and, with the last of them, the connections to login nodes. An engine that does not answer
# keeps nobody waiting for long: the guards go on.
stopBatches <- function(handle, batches = handle$batches) {
  ended <- vapply(batches, `[[`, "", "id")
  handle$batches <- Filter(function(batch) !batch$id %in% ended, handle$batches)
  handle$adaptive <- Filter(function(state) !state$batch$id %in% ended, handle$adaptive)
  if (!length(handle$batches)) {
    logins <- Filter(function(host) !is.null(host$link), handle$logins)
    handle$logins <- lapply(handle$logins, function(host) engineHost())
    on.exit(for (host in logins) closeGateway(host, 15))
  }
  # All guards begin before the first is waited for.
  for (batch in batches) {
    if (is.null(batch$guard)) next
    endLinger(batch)
    releaseGuard(batch)
  }
  for (batch in batches) discardJobs(batch)
}

# Gives hosts of batch jobs the names of their nodes, if the cluster can be used.
nameStarted <- function(handle) {
  known <- if (length(handle$batches) && !isTRUE(handle$stopped)) hub_hosts(handle$pointer)
  if (!is.null(known) && !isFailure(known)) nameNodes(handle, known)
}

# Gives hosts the names of their nodes, once their agents have joined.
# `known`: what the hub knows of the hosts.
nameNodes <- function(handle, known) {
  nodes <- known$node
  changed <- FALSE
  for (i in which(!is.na(nodes))) {
    if (is.null(handle$agents[[i]]$dial) || identical(handle$agents[[i]]$host, nodes[[i]])) next
    changed <- TRUE
    handle$agents[[i]]$host <- nodes[[i]]
    handle$agents[[i]]$named <- TRUE
    if (!is.null(handle$report)) handle$report$host[[i]] <- nodes[[i]]
    handle$hosts[handle$owner == i] <- nodes[[i]]
  }
  # The start of a cluster is recorded at its end.
  if (changed && length(handle$made)) recordChange(handle)
}

# Returns what the engine says of the job of each host, a data frame with `job` and `state`, with a row for each host of
# the cluster: NA for other hosts; `over`: no job will come for a host that waits, as the engine said at `answered`. A
# host that waits is shown with a job that has not started.
jobsOfHosts <- function(handle, known = checked(hub_hosts(handle$pointer))) {
  count <- length(handle$agents)
  shown <- data.frame(job = rep(NA_character_, count), state = rep(NA_character_, count), stringsAsFactors = FALSE)
  shown$over <- FALSE
  shown$answered <- Inf
  dials <- vapply(handle$agents, function(agent) c(agent$dial, NA)[[1L]], 0L)
  for (number in unique(dials[!is.na(dials)])) {
    jobs <- jobsOfLauncher(handle, number)
    if (!nrow(jobs)) next
    hosts <- which(dials == number)
    joined <- hosts[known$awaited[hosts] != 1 & !is.na(known$job[hosts])]
    at <- match(jobNumber(known$job[joined]), jobs$name)
    shown[joined, c("job", "state")] <- jobs[at, c("id", "text")]
    rest <- jobs[!seq_len(nrow(jobs)) %in% at, ]
    # The jobs of hosts that were given back are about to end.
    for (state in handle$adaptive) {
      if (state$number == number) rest <- rest[rest$name %in% state$jobs$name[!state$jobs$arrived], ]
    }
    # Jobs that may still come go to the hosts that wait, and after them those that ended last.
    turn <- seq_len(nrow(rest))
    rest <- rest[order(rest$over, ifelse(rest$over, -turn, turn)), ]
    # The engine of a template does not tell agents which jobs they are.
    waiting <- c(joined[is.na(at)], setdiff(hosts, joined))
    n <- min(length(waiting), nrow(rest))
    shown[utils::head(waiting, n), c("job", "state", "over")] <- utils::head(rest[c("id", "text", "over")], n)
    # Without a job that may come, a host waits in vain, unless a job is being submitted.
    submitting <- any(vapply(handle$batches, function(batch) batch$number == number && isTRUE(batch$submitting), NA))
    shown$over[utils::tail(waiting, length(waiting) - n)] <- !submitting
    shown$answered[waiting] <- min(jobs$answered)
  }
  # Hosts of adaptive launchers may always get another job.
  shown$over[areAdaptive(handle)] <- FALSE
  shown
}

# Returns the jobs that have not started and are not needed without these workers: a list of `batch`, `job` and `task`,
# as for cancelJobs(). A job of several nodes is needed for the others, and an adaptive launcher keeps its jobs.
waitingJobs <- function(handle, ranks) {
  if (!length(handle$batches)) return(list())
  known <- checked(hub_hosts(handle$pointer))
  hosts <- setdiff(handle$owner[ranks], handle$owner[setdiff(handle$alive, ranks)])
  hosts <- hosts[known$awaited[hosts] == 1 & !areAdaptive(handle)[hosts]]
  if (!length(hosts)) return(list())
  ids <- jobsOfHosts(handle, known)[hosts, ]
  ids <- ids$job[!ids$over]
  found <- lapply(handle$batches, function(batch) {
    states <- batch$states
    if (is.null(states)) return(NULL)
    single <- batch$jobs$array | batch$jobs$tasks == 1L
    at <- which(taskId(batch$launcher$kind, states$job, states$task) %in% ids &
                  states$job %in% batch$jobs$job[single])
    if (length(at)) list(batch = batch, job = states$job[at], task = states$task[at])
  })
  Filter(length, found)
}

# Returns all jobs of a launcher, with a row for each node: `name` as agents say it, `id` in the engine's form, `text`
# of the state, `over`: whether it has ended, `answered`: when the query was made that the engine answered last.
jobsOfLauncher <- function(handle, number) {
  batches <- Filter(function(batch) batch$number == number && !isTRUE(batch$submitting), handle$batches)
  rows <- lapply(batches, function(batch) {
    states <- queryJobs(batch)
    if (is.null(batch$jobs) || !nrow(states)) return(NULL)
    kind <- batch$launcher$kind
    # A job of several nodes has a row for each.
    tasks <- batch$jobs$tasks[match(states$job, batch$jobs$job)]
    array <- batch$jobs$array[match(states$job, batch$jobs$job)]
    states <- states[rep(seq_len(nrow(states)), ifelse(array %in% TRUE, 1L, tasks)), ]
    data.frame(
      name = jobNumber(paste0(states$job, "/", ifelse(is.na(states$task), "", states$task))),
      id = taskId(kind, states$job, states$task), text = stateText(states$state, states$reason),
      over = isFinalState(kind, states$state), answered = c(batch$answered, -Inf)[[1L]],
      stringsAsFactors = FALSE
    )
  })
  rows <- do.call(rbind, rows)
  if (is.null(rows)) data.frame(name = character()) else rows
}

# Returns the name of a job as its number and its index in an array: engines write the number in several ways.
jobNumber <- function(name) {
  if (!length(name)) return(character())
  task <- sub("^.*/", "", name)
  paste0(sub("^([0-9]*).*$", "\\1", name), "/", ifelse(grepl("^[0-9]+$", task), task, ""))
}

# Called while R waits: asks the engines for the states of jobs, and gives up hosts whose jobs have ended before their
# agents joined, and submits the jobs that adaptive launchers need. Does nothing most of the time. `bound`: the ranks
# that a verb waits for. `now`: do it in any case.
tendBatches <- function(handle, bound = handle$bound, now = FALSE) {
  if (!length(handle$batches) || isTRUE(handle$stopped)) return(invisible())
  time <- proc.time()[["elapsed"]]
  if (!now && time - handle$tended < if (length(handle$adaptive)) 0.1 else 0.5) return(invisible())
  handle$tended <- time
  known <- checked(hub_hosts(handle$pointer))
  nameNodes(handle, known)
  handle$waitsSince[known$awaited != 1] <- NA
  # A job that follows another may have joined already.
  takeSubmissions(handle)
  if (!any(known$awaited == 1)) return(invisible())
  lost <- loginProblems(handle)
  for (i in which(known$awaited == 1 & !is.na(lost))) giveUpHost(handle, i, lost[[i]])
  tendAdaptive(handle, known, bound)
  takeSubmissions(handle)
  waits <- known$awaited == 1 & !areAdaptive(handle)
  if (!any(waits)) return(invisible())
  shown <- jobsOfHosts(handle, known)
  dials <- !vapply(handle$agents, function(agent) is.null(agent$dial), NA)
  for (i in which(shown$over & dials & waits & is.na(lost))) {
    # A new job is being submitted for it, which may take a while.
    if (!is.na(handle$renewing[i])) next
    if (isOver(handle, i, shown)) endHost(handle, i, shown, known)
  }
}

# Takes the ids of jobs whose submission has ended. A submission that failed is a warning.
takeSubmissions <- function(handle) {
  for (batch in handle$batches) {
    if (!isTRUE(batch$submitting)) next
    names <- paste0("submit-", seq_len(nrow(batch$submissions)))
    failed <- FALSE
    for (name in names) {
      answer <- answerTo(batch, name)
      if (is.null(answer)) break
      failed <- failed || !isTRUE(answer$status == 0L)
      if (failed) break
    }
    if (is.null(answer) && !isTRUE(guardEnded(batch, 0))) next
    batch$submitting <- FALSE
    tryCatch({
      awaitSubmissions(batch, 1)
      recordChange(handle)
    }, rustcluster_start_failed = function(e) {
      handle$renewals[handle$renewing %in% batch$id] <- maxRenewals
      warning(rustclusterCondition("host_failed", conditionMessage(e), host = NULL, type = "warning"))
    })
    handle$renewing[handle$renewing %in% batch$id] <- NA
  }
}

# The number of new jobs in a row for a host, without a task that has ended in between.
maxRenewals <- 3L

# Returns whether the engine has said, after host `i` began to wait, that no job will come for it.
isOver <- function(handle, i, shown) {
  since <- handle$waitsSince[i]
  if (is.na(since)) {
    handle$waitsSince[i] <- since <- proc.time()[["elapsed"]]
  }
  # The engine may list a job that comes again under its number as ended for a moment.
  shown$answered[[i]] > since + 1
}

# Ends the waiting of a host whose job has ended: with a new job, if the old one had not been cancelled and there is
# work, and otherwise for good.
endHost <- function(handle, i, shown, known) {
  job <- paste0("its job ", shown$job[[i]], " ")
  state <- stateInBrackets(shown$state[[i]])
  dial <- handle$agents[[i]]$dial
  if (known$jobs_lost[[i]] == 0) return(giveUpHost(handle, i, neverConnected(handle, i, shown)))
  # A job that was cancelled by hand is told to end, too.
  planned <- grepl("^(time limit|warning)", known$draining[[i]]) ||
    grepl("^(TIMEOUT|PREEMPTED|NODE_FAIL|BOOT_FAIL|DEADLINE)", shown$state[[i]])
  done <- finishedTasks(handle, i)
  if (!identical(done, handle$tasksDone[i])) handle$renewals[i] <- 0L
  if (!planned || isTRUE(handle$renewals[i] >= maxRenewals)) {
    return(giveUpHost(handle, i, paste0(job, "has ended", state)))
  }
  if (handle$job == noJob && !length(recordsOf(handle))) return(invisible())
  handle$tasksDone[i] <- done
  handle$renewals[i] <- c(handle$renewals[i], 0L)[[1L]] + 1L
  launcher <- handle$dial$launchers[[dial]]
  launcher$nodes <- 1L
  batch <- tryCatch(addBatch(handle, dial, launcher), rustcluster_error = function(e) e)
  if (inherits(batch, "error")) return(giveUpHost(handle, i, conditionMessage(batch)))
  handle$renewing[i] <- batch$id
  message(rustclusterCondition(
    "job_renewed", paste0("host ", sQuote(handle$agents[[i]]$host), ": ", job, "has ended", state,
                          "; another has been submitted\n"),
    host = handle$agents[[i]]$host, type = "message"
  ))
}

# Returns for each host why its login node can no longer be used, or NA.
loginProblems <- function(handle) {
  problems <- vapply(handle$logins, function(host) {
    c(if (!is.null(host$link)) linkProblem(host$link), NA_character_)[[1L]]
  }, "")
  vapply(handle$agents, function(agent) if (is.null(agent$dial)) NA_character_ else problems[[agent$dial]], "")
}

# Returns the reason for a host whose job has ended before its agent connected.
neverConnected <- function(handle, i, shown) {
  log <- logOfHost(handle, handle$agents[[i]]$dial, shown$job[[i]])
  paste0(
    "its job ", shown$job[[i]], " ended before its agent had connected", stateInBrackets(shown$state[[i]]),
    tailText("end of its log", log)
  )
}

stateInBrackets <- function(state) if (is.na(state)) "" else paste0(" (", state, ")")

giveUpHost <- function(handle, i, reason, quiet = FALSE) {
  checked(hub_give_up_host(handle$pointer, i, reason, quiet), handle)
}

logOfHost <- function(handle, number, job) {
  for (batch in handle$batches) {
    if (batch$number != number || is.null(batch$states)) next
    at <- match(job, taskId(batch$launcher$kind, batch$states$job, batch$states$task))
    if (!is.na(at)) return(jobLog(batch, batch$states$job[[at]], batch$states$task[[at]]))
  }
  ""
}

# Stops the start of hosts whose jobs have ended before their agents connected.
leaveOutEnded <- function(handle, known) {
  takeSubmissions(handle)
  waits <- is.na(known$r_version) & is.na(known$reason)
  lost <- loginProblems(handle)
  for (i in which(waits & !is.na(lost))) checked(hub_leave_out(handle$pointer, i, lost[[i]]))
  waits <- waits & is.na(lost)
  tendAdaptive(handle, known)
  for (state in handle$adaptive) {
    failed <- utils::head(setdiff(state$hosts[waits[state$hosts]], seq_len(handle$base$hosts)), length(state$problems))
    for (at in seq_along(failed)) checked(hub_leave_out(handle$pointer, failed[[at]], state$problems[[at]]))
    state$problems <- character()
  }
  shown <- jobsOfHosts(handle, known)
  for (i in setdiff(which(waits & shown$over), seq_len(handle$base$hosts))) {
    if (!isOver(handle, i, shown)) next
    checked(hub_leave_out(handle$pointer, i, neverConnected(handle, i, shown)))
  }
}

# Returns why a host has not joined yet.
waitProblem <- function(handle, i, timeout) {
  if (is.null(handle$agents[[i]]$dial)) {
    return(paste0("no response within ", timeout, " s; check the host or increase `setup_timeout`"))
  }
  dial <- handle$agents[[i]]$dial
  launcher <- handle$dial$launchers[[dial]]
  all <- jobsOfHosts(handle)
  shown <- all[i, ]
  state <- sub(" .*$", "", shown$state)
  # More time does not help a job that has ended.
  if (!is.na(shown$job) && (shown$over || isFinalState(launcher$kind, state))) return(neverConnected(handle, i, all))
  log <- if (is.na(shown$job)) "" else logOfHost(handle, dial, shown$job)
  paste0(
    "no agent has connected within ", timeout, " s: ",
    if (is.na(shown$job)) "the engine has not accepted its job yet" else paste0(
      "its job ", shown$job, " is ", if (is.na(shown$state)) "in an unknown state" else shown$state
    ),
    if (isRunningState(state)) {
      paste0(
        "; check that the node can connect to ", if (is.null(launcher$login)) "this machine" else "the login node",
        " (`address`, `port`)", if (nzchar(log)) " and the end of its log" else "; its log is empty"
      )
    } else "; use `wait` to begin with the nodes that are there, or increase `setup_timeout`",
    tailText("end of its log", log)
  )
}

# Returns the number of tasks that the workers of a host have finished.
finishedTasks <- function(handle, i) sum(checked(hub_status(handle$pointer))$done[handle$owner == i])
