# Adaptive launchers (`max`): jobs of one node are submitted while tasks wait, and end when their hosts rest.
#
# All `max` hosts are slots of the cluster from the start. A slot without a job waits, as a host that has not joined.
# The hub's thread gives back hosts that rest (scheduler/give_back.rs), whatever R does. R submits jobs: when a call is
# made, and while it waits for the cluster. A job is not made for a certain slot: its agent gets one that waits.
#
# All jobs of a launcher are submissions of one batch, with one directory, key and guard (batch-jobs.R): the guard runs
# the same submit command each time. What is known of a job is forgotten when the job is over.

# Three failures in a row end the growth. A job that was cancelled before it ran counts a third, since somebody may have
# done that on purpose.
failureWeights <- c(failed = 3L, cancelled = 1L)
maxFailures <- 9L

# The number of ids of jobs that have ended, and are kept for engines that do not say which have.
keptIds <- 100L

# How often the answer to a submission is read again if the session of ssh has failed.
maxUnread <- 5L

# Seconds after which a job is taken to be over that the engine has never listed, although it was asked.
unlistedLimit <- 30

# Seconds after which a submission is taken to be lost that has no answer: its command has a limit of 60 s.
answerLimit <- 70

# Seconds for which a job that has been ordered keeps other launchers from submitting jobs for the same tasks.
coverLimit <- 30

# The arguments of launchers about adaptive clusters, or NULL for a launcher with a fixed number of nodes. `absent`: the
# names of the arguments that the user has not given.
adaptiveOf <- function(given, absent) {
  if (is.null(given[["max"]])) {
    for (name in setdiff(c("min", "idle", "backlog"), absent)) {
      badArgument(name, "needs `max`, the maximum number of nodes")
    }
    return(NULL)
  }
  if (!"nodes" %in% absent && !isUnset(given$nodes)) {
    badArgument("nodes", "cannot be given with `max`; `min` is the number of nodes at the start")
  }
  max <- wholeCount(given$max, "max", "a number of nodes", 1, maxWorkers)
  min <- wholeCount(given$min, "min", "a number of nodes", 0, maxWorkers)
  if (min > max) badArgument("min", "must be at most `max`, ", max)
  between(given$idle, "idle", "a number of seconds", 0.01, 1e9, infinite = TRUE)
  list(
    min = min, max = max, idle = as.double(given$idle),
    backlog = wholeCount(given$backlog, "backlog", "a number of jobs", 1, maxWorkers)
  )
}

# Returns the launcher of single jobs of an adaptive launcher.
singleJob <- function(launcher) {
  launcher$nodes <- 1L
  launcher
}

# Returns whether each of these hosts is a slot of an adaptive launcher that has no job at the start. `launchers`: those
# of the hosts. `before`: the number of launchers of the cluster before these.
isSpare <- function(hosts, launchers, before = 0L) {
  vapply(hosts, function(host) {
    if (is.null(host$dial)) return(FALSE)
    adaptive <- launchers[[host$dial - before]]$adaptive
    !is.null(adaptive) && host$slot > adaptive$min
  }, NA)
}

# Begins with a launcher: makes its batch, and submits the first jobs. `hosts`: the indices of its hosts.
startAdaptive <- function(handle, number, launcher, hosts) {
  adaptive <- launcher$adaptive
  state <- new.env(parent = emptyenv())
  state$number <- number
  state$hosts <- hosts
  state$cores <- launcher$cores
  state$settings <- adaptive
  # A row for each job that may not be over: the number of its submission, the last number of the order to the guard,
  # its id once the engine has accepted it, its name in the form of jobNumber(), when it was ordered and accepted, when
  # its answer must be there, since when a session of ssh has read that, and whether a worker of it has come up.
  state$jobs <- data.frame(
    submission = integer(), last = integer(), job = character(), name = character(), ordered = numeric(),
    due = numeric(), read = numeric(), accepted = numeric(), arrived = logical(), stringsAsFactors = FALSE
  )
  # The names of jobs that have arrived before the answers to their submissions.
  state$early <- character()
  # How often in a row an answer could not be read on a login node, and when to try again.
  state$unread <- 0L
  state$readAgain <- -Inf
  state$submitted <- 0L
  state$failures <- 0L
  # Why no more jobs are submitted, or NULL.
  state$stopped <- NULL
  # The failures while the cluster starts: see leaveOutEnded().
  state$problems <- character()
  # With this number of open calls, the need for jobs has to be looked at again.
  state$reconsider <- 1
  state$batch <- addBatch(handle, number, singleJob(launcher), submit = FALSE)
  state$batch$submitting <- FALSE
  handle$adaptive <- c(handle$adaptive, list(state))
  checked(hub_adapt(handle$pointer, hosts, adaptive$min, adaptive$idle))
  submitMore(state, min(adaptive$min, adaptive$backlog))
}

# Returns the state of the launcher of a host, or NULL for a host of no adaptive launcher.
adaptiveStateOf <- function(handle, i) {
  for (state in handle$adaptive) if (i %in% state$hosts) return(state)
  NULL
}

# Whether each host of the cluster has an adaptive launcher.
areAdaptive <- function(handle) {
  seq_along(handle$agents) %in% unlist(lapply(handle$adaptive, function(state) state$hosts))
}

# Orders the submission of further jobs, and does not wait for the engine.
submitMore <- function(state, count) {
  if (count < 1L) return(invisible())
  new <- state$submitted + seq_len(count)
  batch <- state$batch
  now <- proc.time()[["elapsed"]]
  # The guard submits the jobs of an order one after the other.
  state$jobs <- rbind(state$jobs, data.frame(
    submission = new, last = new[[count]], job = NA_character_, name = NA_character_, ordered = now,
    due = now + answerLimit * seq_len(count), read = NA_real_, accepted = NA_real_, arrived = FALSE,
    stringsAsFactors = FALSE
  ))
  state$submitted <- state$submitted + count
  if (!tellGuard(batch, "submit", new[[1L]], new[[count]])) {
    state$jobs <- state$jobs[!state$jobs$submission %in% new, ]
    adaptiveFailed(state, "the guard of the jobs could not be started")
  }
  invisible()
}

# Counts a failure.
adaptiveFailed <- function(state, problem, cancelled = FALSE) {
  state$failures <- state$failures + failureWeights[[if (cancelled) "cancelled" else "failed"]]
  state$problems <- utils::tail(c(state$problems, problem), maxFailures)
  if (state$failures >= maxFailures && is.null(state$stopped)) state$stopped <- problem
}

# Reads the answers to submissions.
takeAccepted <- function(state) {
  batch <- state$batch
  waiting <- state$jobs[is.na(state$jobs$job), ]
  if (isThere(batch)) {
    # Each answer takes a session of ssh, of which there are not many. The guard submits one after the other.
    waiting <- waiting[!duplicated(waiting$last), ]
    if (proc.time()[["elapsed"]] < state$readAgain) return(invisible())
  }
  for (submission in waiting$submission) {
    name <- paste0("submit-", submission)
    # It may answer just before it ends.
    over <- isTRUE(guardEnded(batch, 0))
    answer <- answerTo(batch, name)
    lost <- is.null(answer) && !over && isAnswerLost(state, submission)
    if (is.null(answer) && !over && !lost) next
    if (isThere(batch) && isTRUE(answer$status == 255L) && state$unread < maxUnread) {
      # The session of ssh has failed, and the job may have been accepted.
      batch$reading[[name]] <- NULL
      state$unread <- state$unread + 1L
      state$readAgain <- proc.time()[["elapsed"]] + 1
      return(invisible())
    }
    state$unread <- 0L
    row <- match(submission, state$jobs$submission)
    if (is.na(row)) next
    id <- submittedId(batch, name, answer)
    problem <- if (lost) {
      "its answer is missing"
    } else if (is.null(answer)) {
      "the process that submits jobs has ended"
    } else {
      submissionProblem(answer, id)
    }
    if (!is.null(problem)) {
      output <- paste(c(answer$out, answer$err), collapse = "\n")
      text <- paste0(
        engines[[batch$launcher$kind]]$title, " did not accept a job: `", batch$submissions$command[[1L]], "` failed (",
        problem, ")", tailText("output of the command", output)
      )
      # The guard has not gone on with the rest of its order, which would fail for the same reason.
      dropped <- is.na(state$jobs$job) & state$jobs$submission >= submission & state$jobs$last == state$jobs$last[[row]]
      # It may have gone on after an answer that it could not write. A job without an answer may be there.
      if (lost) dropped <- state$jobs$submission == submission
      came <- lost && (state$jobs$arrived[[row]] || length(state$early))
      if (came && !state$jobs$arrived[[row]]) state$early <- state$early[-1L]
      for (n in state$jobs$submission[dropped]) forgetAnswer(batch, paste0("submit-", n))
      state$jobs <- state$jobs[!dropped, ]
      if (!came) adaptiveFailed(state, text)
      next
    }
    array <- batch$submissions$array[[1L]]
    job <- data.frame(job = id, tasks = 1L, array = array, stringsAsFactors = FALSE)
    expected <- expectedStates(list(jobs = job, launcher = batch$launcher))
    task <- expected$task[[1L]]
    state$jobs$job[[row]] <- id
    state$jobs$name[[row]] <- jobNumber(paste0(id, "/", if (is.na(task)) "" else task))
    state$jobs$accepted[[row]] <- proc.time()[["elapsed"]]
    if (state$jobs$name[[row]] %in% state$early) state$jobs$arrived[[row]] <- TRUE
    batch$jobs <- rbind(batch$jobs, job)
    batch$states <- rbind(batch$states, expected)
  }
  # Without unanswered submissions, these are names of jobs that were forgotten.
  state$early <- if (anyNA(state$jobs$name)) setdiff(state$early, state$jobs$name) else character()
}

# Returns whether a submission without an answer will have none: the disk may have been full, or its process was killed.
isAnswerLost <- function(state, submission) {
  row <- match(submission, state$jobs$submission)
  now <- proc.time()[["elapsed"]]
  if (is.na(row) || now < state$jobs$due[[row]]) return(FALSE)
  if (!isThere(state$batch)) return(TRUE)
  # R may not have waited for the cluster meanwhile: the session of ssh that reads the answer needs its time.
  if (is.na(state$jobs$read[[row]])) state$jobs$read[[row]] <- now
  now >= state$jobs$read[[row]] + answerLimit
}

# Returns the number of jobs that have been ordered and have not arrived.
comingJobs <- function(state) {
  waits <- !state$jobs$arrived
  sum(waits) - min(length(state$early), sum(waits & is.na(state$jobs$name)))
}

# Marks the jobs of which a worker has come up. A template does not tell agents which jobs they are.
takeArrivals <- function(handle) {
  arrivals <- checked(hub_job_arrivals(handle$pointer))
  for (at in seq_along(arrivals$agent)) {
    state <- adaptiveStateOf(handle, arrivals$agent[[at]])
    if (is.null(state)) next
    name <- arrivals$job[[at]]
    row <- if (!isJobName(name)) which(!state$jobs$arrived)[1L] else match(jobNumber(name), state$jobs$name)
    if (!is.na(row)) {
      state$jobs$arrived[[row]] <- TRUE
    } else if (isJobName(name) && anyNA(state$jobs$name)) {
      # The engine may have started the job before its submit command has ended.
      state$early <- union(state$early, jobNumber(name))
    }
    state$failures <- 0L
  }
}

# Returns whether an agent knows its job: engines number them.
isJobName <- function(name) grepl("[0-9]", name)

# Forgets the jobs that are over, and counts those that have ended before a worker came up.
forgetEnded <- function(handle, state, known) {
  batch <- state$batch
  jobs <- state$jobs
  up <- state$hosts[known$linked[state$hosts] == 1]
  named <- isJobName(known$job[up])
  names <- jobNumber(known$job[up][named])
  # As long as all jobs are there, the engine need not be asked.
  there <- jobs$name %in% names
  # The name of a lost answer may have stood for another job.
  working <- up[named][known$awaited[up[named]] == 0]
  jobs$arrived[jobs$name %in% jobNumber(known$job[working])] <- TRUE
  state$jobs <- jobs
  asked <- !is.na(jobs$job) & !there
  anonymous <- sum(!named)
  if (!any(asked) || sum(asked & jobs$arrived) <= anonymous && all(jobs$arrived[asked])) return(invisible())
  template <- batch$launcher$kind == "template"
  states <- queryJobs(batch)
  # A job may have arrived before the engine was asked.
  takeArrivals(handle)
  jobs <- state$jobs
  at <- match(jobs$job, states$job)
  text <- states$state[at]
  over <- !is.na(at) & isFinalState(batch$launcher$kind, text)
  listed <- !template || !is.null(batch$launcher$status)
  unlisted <- listed & !is.na(at) & is.na(text) & !there & c(batch$answered, -Inf)[[1L]] > jobs$accepted + unlistedLimit
  over <- over | unlisted
  if (template) {
    up <- state$hosts[checked(hub_hosts(handle$pointer))$linked[state$hosts] == 1]
    # Without words for the end of a job, only the connections say how many are over. Some ids are kept for the end of
    # the cluster: it is not known which ones these are.
    gone <- sum(jobs$arrived) - length(up) - keptIds
    over <- over | (jobs$arrived & cumsum(jobs$arrived) <= gone)
    # Jobs that are over and those that are there cannot be told apart by name.
    wrong <- which(over & !jobs$arrived)
    right <- which(!over & jobs$arrived)
    n <- min(length(wrong), max(0L, length(right) - length(up)))
    jobs$arrived[c(utils::head(wrong, n), utils::head(right, n))] <- rep(c(TRUE, FALSE), each = n)
    state$jobs <- jobs
  }
  # The engine is late, or an agent outlives its job.
  over <- over & !there & !is.na(jobs$job)
  for (row in which(over & !jobs$arrived)) {
    shown <- if (!is.na(text[[row]])) paste0(" (", stateText(text[[row]], states$reason[[at[[row]]]]), ")")
    task <- states$task[[at[[row]]]]
    adaptiveFailed(state, paste0(
      "job ", jobs$job[[row]], " ended before its agent had connected and its workers had started", shown,
      tailText("end of its log", jobLog(batch, jobs$job[[row]], task))
    ), cancelled = grepl("^(CANCELLED|REMOVED)", text[[row]]))
  }
  for (row in which(over)) forgetJob(batch, jobs$job[[row]], jobs$submission[[row]])
  state$jobs <- jobs[!over, ]
}

forgetJob <- function(batch, job, submission) {
  batch$jobs <- batch$jobs[batch$jobs$job != job, ]
  batch$states <- batch$states[batch$states$job != job, ]
  forgetAnswer(batch, paste0("submit-", submission))
  if (isThere(batch)) return(invisible())
  unlink(file.path(batch$directory, logsOf(list.files(batch$directory), job)))
}

# Submits the jobs that are needed. `bound`: the ranks that a verb waits for.
tendAdaptive <- function(handle, known, bound = integer()) {
  # With an interrupt in between, a job could be taken to be coming that was never submitted.
  if (length(handle$adaptive)) suspendInterrupts(tendLaunchers(handle, known, bound))
}

tendLaunchers <- function(handle, known, bound) {
  for (state in handle$adaptive) takeAccepted(state)
  takeArrivals(handle)
  preferred <- integer()
  covered <- 0
  for (state in handle$adaptive) {
    forgetEnded(handle, state, known)
    hosts <- state$hosts
    # A slot is gone if all of its workers have been removed, or if it has been given up. While the cluster starts,
    # slots have no workers.
    starts <- !hosts %in% handle$owner
    usable <- if (all(starts)) is.na(known$reason[hosts]) else known$awaited[hosts] == 1
    usable <- usable & (starts | hosts %in% handle$owner[handle$alive])
    free <- hosts[usable & known$linked[hosts] == 0]
    joining <- sum(known$awaited[hosts] == 1 & known$linked[hosts] == 1)
    up <- sum(known$awaited[hosts] == 0 & known$linked[hosts] == 1)
    coming <- comingJobs(state)
    if (!is.null(state$stopped)) {
      stopGrowth(handle, state, if (coming == 0L) free else integer())
      next
    }
    demand <- checked(hub_demand(handle$pointer, hosts), handle)
    # New jobs of one launcher suffice for tasks that those of another could run, too. Old ones may wait for ever.
    tasks <- max(0, demand$tasks - covered)
    needed <- intersect(free, handle$owner[bound])
    preferred <- c(preferred, needed)
    wanted <- max(
      min(ceiling(tasks / state$cores), sum(demand$hosts & hosts %in% free)),
      length(needed), state$settings$min - up - joining
    )
    room <- length(free) - max(0L, coming - joining)
    count <- min(wanted - coming, room, state$settings$backlog - coming)
    submitMore(state, count)
    coming <- coming + max(count, 0)
    young <- sum(!state$jobs$arrived & proc.time()[["elapsed"]] < state$jobs$ordered + coverLimit)
    covered <- covered + min(coming, young) * state$cores
    spare <- coming * state$cores - tasks
    full <- coming >= state$settings$backlog || room <= count
    state$reconsider <- if (full) Inf else length(recordsOf(handle)) + max(1, spare + 1)
  }
  checked(hub_prefer(handle$pointer, preferred))
}

# No more jobs are submitted: says so once, and gives up the slots that will have no job.
stopGrowth <- function(handle, state, free) {
  if (!identical(state$settings$idle, Inf)) {
    state$settings$idle <- Inf
    # What is given back could not come again.
    checked(hub_adapt(handle$pointer, state$hosts, state$settings$min, Inf))
    title <- engines[[state$batch$launcher$kind]]$title
    handle$pending <- c(handle$pending, list(rustclusterCondition(
      "growth_stopped", paste0(
        "no more jobs are submitted to ", title, ", because several in a row have failed; the last failure: ",
        state$stopped
      ),
      launcher = state$number, reason = state$stopped, type = "warning"
    )))
  }
  reason <- paste0("no more jobs are submitted for it: ", state$stopped)
  for (i in free) giveUpHost(handle, i, reason, quiet = TRUE)
}

# Called when a call has been made: submits jobs if those that are coming do not suffice.
callMade <- function(handle) {
  if (!length(handle$adaptive)) return(invisible())
  open <- length(recordsOf(handle))
  if (any(vapply(handle$adaptive, function(state) open >= state$reconsider, NA))) tendBatches(handle, now = TRUE)
}

# Keeps nodes for a verb that waits for them. The end of its job ends that, and releaseNodes().
holdNodes <- function(handle, ranks) {
  if (length(handle$adaptive)) checked(hub_hold(handle$pointer, ranks), handle)
}

releaseNodes <- function(handle) {
  if (length(handle$adaptive)) checked(hub_hold(handle$pointer, integer()))
}
