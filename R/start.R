# From launched agents to a cluster: they greet, are told what to start, and start it.

newHandle <- function(pointer, agents) {
  handle <- new.env(parent = emptyenv())
  handle$pointer <- pointer
  # Of each agent, the settings of its host; of each rank, the name of its host and the place of
  # its agent.
  handle$agents <- agents
  handle$hosts <- character()
  handle$owner <- integer()
  handle$report <- NULL
  # Ranks that have not been stopped.
  handle$alive <- integer()
  handle$stopped <- FALSE
  # The job under way, the numbers of the frames of its sends and of its verb, the name of the cluster
  # for that frame itself, and how many jobs there have been: see parallel-methods.R.
  handle$job <- noJob
  handle$frames <- 0L
  handle$depth <- 0L
  handle$id <- basename(tempfile("cluster"))
  handle$jobs <- noJob
  # How often a task of the job under way is tried again, if not as the cluster says, and whether a loss ends
  # that job.
  handle$policy <- NULL
  handle$partial <- list()
  # Whether what the job under way sends lasts on the workers (parallel-methods.R), and the losses of each of
  # its tasks (task-failures.R).
  handle$lasts <- NULL
  handle$losses <- list()
  # Of each agent, the bytes of what lasts on its workers that it keeps.
  handle$stateLimit <- numeric()
  # The same of the head, for hosts that are to be taken back.
  handle$spoolLimit <- 0
  # Seconds that an idle worker may take to end.
  handle$stopTimeout <- 0
  # Conditions that the user is still to be told of (events.R).
  handle$untold <- list()
  # By what the hub's thread names the cluster (promises.R).
  awaited$count <- awaited$count + 1
  handle$number <- awaited$count
  assign(as.character(handle$number), handle$id, awaited)
  assign(handle$id, new.env(parent = emptyenv()), openCalls)
  reg.finalizer(handle, forgetCluster)
  handle
}

# What is known of a cluster outside of its handle goes with that.
forgetCluster <- function(handle) {
  suppressWarnings({
    rm(list = as.character(handle$number), envir = awaited)
    rm(list = handle$id, envir = openCalls)
    rm(list = handle$id, envir = openFrames)
  })
}

# Ends what was started of a cluster that does not come to be.
abandon <- function(handle) {
  hub_stop(handle$pointer)
  while (identical(hub_closed(handle$pointer), FALSE)) Sys.sleep(0)
}

# Waits for the agents' greetings and fills in the report. Returns until when workers may come up.
greetHosts <- function(handle, asked, deadline, timeout, tolerant, progress) {
  workers <- vapply(seq_along(asked$hosts), function(i) sum(asked$workers[asked$owner == i]), 0L)
  shown <- logical(length(workers))
  repeat {
    done <- checked(hub_greeted(handle$pointer))
    late <- proc.time()[["elapsed"]] > deadline
    if (progress || done || late) {
      report <- hostReport(handle, workers)
      known <- !is.na(report$r_version) | !is.na(report$problem)
      if (progress) for (i in which(known & !shown)) showHost(report, i)
      shown <- known
    }
    if (done || late) break
    Sys.sleep(0)
  }
  report$problem[!known] <- paste0(
    "no response within ", timeout, " seconds: check the host or increase `setup_timeout`"
  )
  all <- is.na(report$workers)
  report$workers[all] <- report$cores[all]
  report$problem <- ifelse(
    is.na(report$problem), tooLittleMemory(handle$agents, report), report$problem
  )
  handle$report <- report
  failed <- which(!is.na(report$problem))
  if (length(failed)) hostsFailed(handle, failed, tolerant, anyNA(report$problem))
  other <- is.na(report$problem) & !report$r_version %in% rVersionText()
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
  # A host that has used up the time is not to cost the others theirs.
  if (late && !done) deadline + timeout else deadline
}

# Bytes that a worker takes at least, as measured by inst/bench: a fork, and a process of its own.
leastMemory <- c(fork = 2e6, spawn = 37e6)

tooLittleMemory <- function(agents, report) {
  least <- leastMemory[vapply(agents, `[[`, "", "start")] * report$workers
  short <- !is.na(report$available) & report$available > 0 & report$available < least
  ifelse(short, sprintf(
    "too little memory for %d workers: %.1f GB needed at least, %.1f GB available; ask for fewer",
    report$workers, least / 1e9, report$available / 1e9
  ), NA_character_)
}

# `left`: whether there are any others.
hostsFailed <- function(handle, failed, tolerant, left) {
  report <- handle$report
  message <- failedHosts(report, failed)
  fields <- list(host = report$host[failed], report = report)
  if (!left || !tolerant) {
    abort("start_failed", "the cluster could not be started: ", message, fields = fields)
  }
  warning(do.call(rustclusterCondition, c(
    list("host_left_out", paste0("the cluster goes on without some hosts or workers: ", message)),
    fields, type = "warning"
  )))
}

# What each agent is to start; NULL for one that is not wanted.
hostPlans <- function(handle, asked, launches, settings) {
  report <- handle$report
  usable <- is.na(report$problem)
  workers <- asked$workers
  all <- is.na(workers)
  workers[all] <- report$cores[asked$owner[all]]
  kept <- usable[asked$owner]
  owner <- rep(asked$owner[kept], workers[kept])
  handle$owner <- owner
  handle$hosts <- vapply(asked$hosts, `[[`, "", "host")[owner]
  handle$stateLimit <- vapply(report$available, keptBytes, 0, settings$keep)
  xdr <- otherByteOrder(handle)
  lapply(seq_along(launches), function(i) {
    if (!usable[[i]]) return(NULL)
    list(
      ranks = which(owner == i), packages = settings$packages, outfile = settings$outfile,
      renice = asked$hosts[[i]]$renice, mode = asked$hosts[[i]]$start,
      spawn = launches[[i]]$worker,
      # On this machine the end of the stream, or of the process, is known at once.
      patience = if (asked$hosts[[i]]$here) 0L else as.integer(1000 * settings$patience),
      # Nor is there anything to be saved on the way.
      keep = if (asked$hosts[[i]]$here) 0 else handle$stateLimit[[i]],
      state = handle$stateLimit[[i]],
      setup = milliseconds(settings$setup),
      memory_limit = settings$memory,
      stop_timeout = ceiling(1000 * settings$stop_timeout),
      here = asked$hosts[[i]]$here,
      xdr = xdr[[i]]
    )
  })
}

# 0 for any time.
milliseconds <- function(seconds) if (is.finite(seconds)) ceiling(1000 * seconds) else 0

# Of each host, whether it and this session have to meet in the network's byte order.
otherByteOrder <- function(handle) {
  bigEndian <- checked(hub_hosts(handle$pointer))$big_endian == 1
  bigEndian != (.Platform$endian == "big")
}

# How much of what was sent to one worker an agent keeps for the next, and how much of what lasts.
keptBytes <- function(available, asked) {
  if (!is.null(asked)) return(asked)
  if (is.na(available) || available <= 0) return(64 * 2^20)
  min(max(available / 8, 16 * 2^20), 2^30)
}

# The ranks that are up in the end.
awaitStart <- function(handle, deadline, timeout, tolerant) {
  late <- paste0("not up within ", timeout, " seconds: increase `setup_timeout`, or check the host")
  repeat {
    up <- checked(hub_progress(handle$pointer, tolerant), handle)
    if (up == length(handle$hosts)) break
    if (proc.time()[["elapsed"]] > deadline) {
      # Those that have not come up are gone from here on, and the others stay.
      if (tolerant) checked(hub_leave_out(handle$pointer, 0L, late)) else startedLate(handle, up, timeout)
    }
    Sys.sleep(0)
  }
  before <- handle$report
  report <- hostReport(handle, before$workers)
  report$problem <- ifelse(is.na(before$problem), report$problem, before$problem)
  gone <- checked(hub_gone(handle$pointer), handle)
  for (i in which(is.na(report$problem))) report$problem[[i]] <- workersProblem(gone, which(handle$owner == i), late)
  handle$report <- report
  failed <- which(!is.na(report$problem) & is.na(before$problem))
  ranks <- which(lengths(gone) == 0L)
  # An agent without workers is not to be taken back, nor to wait for the end.
  for (i in setdiff(failed, handle$owner[ranks])) checked(hub_leave_out(handle$pointer, i, report$problem[[i]]))
  if (length(failed)) hostsFailed(handle, failed, tolerant, length(ranks) > 0L)
  ranks
}

startedLate <- function(handle, up, timeout) {
  late <- unique(handle$hosts[is.na(checked(hub_pids(handle$pointer), handle))])
  abort(
    "start_failed", "only ", up, " of ", length(handle$hosts), " workers were up after ", timeout,
    " seconds, and not all of host", if (length(late) > 1L) "s", " ", paste(sQuote(late), collapse = ", "),
    ": increase `setup_timeout`, check the hosts, or ask for fewer",
    fields = list(host = late)
  )
}

# What went wrong with the workers of a host that have these ranks: the first of those that are gone stands for
# all. NA if none is.
workersProblem <- function(gone, ranks, late) {
  failures <- gone[ranks]
  failed <- which(lengths(failures) > 0L)
  if (!length(failed)) return(NA_character_)
  failure <- failures[[failed[[1L]]]]
  why <- switch(failure[["kind"]],
    worker_lost = paste0(
      failure[["reason"]], if ("signal" %in% names(failure)) signalName(failure[["signal"]]),
      " before it was ready", tailText("the end of its output", failure[["stderr"]])
    ),
    stopped = paste("was", late),
    failure[["reason"]]
  )
  up <- length(ranks) - length(failed)
  paste0(
    if (up) paste0("only ", up, " of ", length(ranks), " workers came up") else "no worker came up",
    ": worker ", ranks[[failed[[1L]]]], " ", why
  )
}

newCluster <- function(handle, ranks) {
  nodes <- lapply(ranks, function(rank) {
    structure(list(host = handle$hosts[[rank]], rank = rank, handle = handle), class = "RustNode")
  })
  structure(nodes, class = c("RustCluster", "cluster"))
}
