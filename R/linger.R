# Clusters that wait for their head. The head records such a cluster in a file that only its user can read, with the key
# that a head must prove to have. A later session finds the cluster by that record, and connects to its agents.

# The keys of clusters that linger, by id. A handle does not have its key: it may be saved in any file, or be sent to
# workers.
lingerKeys <- new.env(parent = emptyenv())

# The ids of clusters that linger and that this session has. A handle that is garbage-collected leaves its cluster.
openLingers <- new.env(parent = emptyenv())

# Returns what a handle knows of a cluster that lingers: its `id`, `seconds`, the number of heads that it has had before
# (`generation`), and the time when it was `created`.
newLinger <- function(seconds) {
  id <- randomText(8L)
  assign(id, randomText(32L), lingerKeys)
  assign(id, TRUE, openLingers)
  list(id = id, seconds = seconds, generation = 0L, created = Sys.time())
}

# Refuses hosts whose agents a later session could not find again. `before`: the number of launchers of the cluster
# before these. `argument`: what is at fault.
checkLinger <- function(asked, before = 0L, argument = "linger") {
  for (host in asked$hosts) {
    if (!is.null(host$launcher)) {
      badArgument(
        argument, if (argument == "spec") "contains" else "cannot be used with", " host ", sQuote(host$host),
        if (argument == "spec") ", which cannot linger", ": its agent is connected by the stdin and stdout of a ",
        "command, which another session cannot do again; use hosts of ssh, launchers of batch engines such as ",
        "slurm() or jobTemplate(), or allocation(launcher = \"ssh\")"
      )
    }
    if (!is.null(host$dial) && !is.null(asked$launchers[[host$dial - before]]$adaptive)) {
      badArgument(
        argument, if (argument == "spec") "contains" else "cannot be used with", " a launcher with `max`",
        if (argument == "spec") ", which cannot linger", ": its jobs are submitted while this session runs; ",
        "use `nodes`"
      )
    }
  }
}

# Returns how an agent waits for its head. `i`: its index among the hosts of the cluster.
agentLinger <- function(handle, i) {
  linger <- handle$linger
  if (is.null(linger)) return(NULL)
  number <- handle$agents[[i]]$dial
  list(
    seconds = linger$seconds, name = socketName(linger, i), key = lingerKeys[[linger$id]],
    generation = linger$generation,
    # Where an agent that dials back looks for its next head.
    addresses = if (is.null(number)) character() else handle$dial$addresses[[number]],
    port = if (is.null(number)) 0L else as.integer(handle$dial$ports[[number]])
  )
}

# The name of the directory of an agent's socket.
socketName <- function(linger, i) paste0("rustcluster-", linger$id, "-", i)

# Records ------------------------------------------------------------------------------------------

recordFormat <- 1L

# The fields of a handle that its record has.
recordedFields <- c(
  "agents", "hosts", "owner", "report", "made", "alive", "hidden", "settings", "retries", "reconnect", "memoryLimit",
  "timeout", "stopTimeout", "setupLogLimits", "headLogLimit", "bufferLimit", "dial"
)

# The fields of a batch of jobs that the record has.
recordedBatchFields <- c("id", "number", "launcher", "directory", "files", "submissions", "jobs", "orders", "states")


recordDirectory <- function() file.path(tools::R_user_dir("rustcluster", "cache"), "clusters")

recordPath <- function(id) file.path(recordDirectory(), paste0(id, ".rds"))

# Makes the directory of the records, or checks that nobody else can enter it.
makeRecordDirectory <- function() {
  directory <- recordDirectory()
  dir.create(dirname(directory), showWarnings = FALSE, recursive = TRUE)
  dir.create(directory, showWarnings = FALSE, mode = "0700")
  info <- file.info(directory)
  refuse <- function(...) {
    abort("start_failed", "the directory ", sQuote(directory), " of the records of clusters ", ...)
  }
  if (!isTRUE(info$isdir)) refuse("cannot be made; `R_USER_CACHE_DIR` sets another place")
  if (bitwAnd(as.integer(info$mode), 63L) > 0L) {
    if (!isTRUE(suppressWarnings(Sys.chmod(directory, "0700", use_umask = FALSE)))) refuse("is open to other users")
  }
  directory
}

# Writes a file that only the user can read, as a whole.
writeRecord <- function(value, path) {
  part <- tempfile(paste0(basename(path), "-"), dirname(path), fileext = ".part")
  umask <- Sys.umask("077")
  on.exit({
    Sys.umask(umask)
    unlink(part)
  })
  written <- tryCatch({
    saveRDS(value, part)
    file.rename(part, path)
  }, error = identity, warning = identity)
  if (!isTRUE(written)) {
    why <- if (inherits(written, "condition")) conditionMessage(written) else "the file cannot be renamed"
    abort("start_failed", "the record of the cluster cannot be written to ", sQuote(path), ": ", why)
  }
}

# Returns whether a later session has the cluster: this one was lost to the agents.
isTakenOver <- function(handle) {
  record <- readRecord(recordPath(handle$linger$id))
  !is.null(record) && record$linger$generation > handle$linger$generation
}

# Records the cluster as it is now.
saveRecord <- function(handle) {
  if (is.null(handle$linger) || isTakenOver(handle)) return(invisible())
  makeRecordDirectory()
  writeRecord(list(
    format = recordFormat, package = packageVersionText(), linger = handle$linger,
    key = lingerKeys[[handle$linger$id]], head = thisProcess(), streams = handle$streams$last,
    launcherKeys = launcherKeys[[handle$id]],
    batches = lapply(handle$batches, function(batch) {
      mget(recordedBatchFields, envir = batch, ifnotfound = list(NULL))
    }),
    handle = mget(recordedFields, envir = handle, ifnotfound = list(NULL))
  ), recordPath(handle$linger$id))
}

# Records a change of the cluster, and lets its jobs linger. A failure is a warning: the cluster itself can be used.
recordChange <- function(handle) {
  tryCatch({
    saveRecord(handle)
    lingerBatches(handle)
  }, error = function(e) {
    condition <- rustclusterCondition("not_recorded", conditionMessage(e), type = "warning")
    handle$pending <- c(handle$pending, list(condition))
  })
  invisible()
}

# Lets the jobs of the cluster outlive this session, once another session could find them.
lingerBatches <- function(handle) {
  if (is.null(handle$linger)) return(invisible())
  for (batch in handle$batches) {
    if (is.null(batch$linger) && !isTRUE(batch$submitting)) lingerJobs(batch, handle$linger$seconds)
  }
}

# What the hub records ----------------------------------------------------------------------------

# A session goes on without a host that it has lost, whose agent waits for the next session. From the first set-up call
# on that the other hosts get, the workers of that agent have old variables. The hub records the numbers of such hosts,
# and the random number states of all workers, since the workers of a lost host may be made anew.

# A file of the session of this generation: "missed" or "seeds".
hubFile <- function(linger, what) {
  sub("[.]rds$", paste0("-", linger$generation, ".", what), recordPath(linger$id))
}

# Lets the hub write its records from now on.
startRecords <- function(handle) {
  if (is.null(handle$linger)) return(invisible())
  checked(hub_record(handle$pointer, hubFile(handle$linger, "missed"), hubFile(handle$linger, "seeds")), handle)
}

# Records the first random number states of those of these workers that have not joined yet.
recordFirstSeeds <- function(handle, ranks, seeds) {
  if (is.null(handle$linger)) return(invisible())
  for (i in seq_along(ranks)) checked(hub_record_first_seed(handle$pointer, ranks[[i]], seeds[[i]]), handle)
}

# Returns for each host whether the session before has recorded that it missed a set-up call.
hostsThatMissed <- function(record) {
  path <- hubFile(record$linger, "missed")
  # A file that cannot be read is an error: nobody knows which hosts can be used.
  numbers <- if (file.exists(path)) as.integer(readLines(path)) else integer()
  seq_along(record$handle$agents) %in% numbers
}

# Begins the file of random number states of a session with that of the session before. A crash of the machine may have
# left earlier states there, from which numbers would be drawn twice.
inheritSeeds <- function(linger, record) {
  path <- hubFile(linger, "seeds")
  before <- hubFile(record$linger, "seeds")
  unlink(path)
  if (!file.exists(before) || !identical(record$head$boot, thisMachine()$boot)) return(invisible())
  if (!file.copy(before, path)) abort("start_failed", "the file ", sQuote(before), " cannot be copied")
}

# Gives the workers of lost hosts the random number states that the session before has recorded.
takeSeeds <- function(handle) {
  path <- hubFile(handle$linger, "seeds")
  if (file.exists(path)) checked(hub_take_seeds(handle$pointer, path), handle)
}

removeRecord <- function(handle) {
  if (is.null(handle$linger)) return(invisible())
  if (!isTakenOver(handle)) deleteRecord(recordPath(handle$linger$id))
  suppressWarnings(rm(list = handle$linger$id, envir = lingerKeys))
}

# Returns what identifies a process: its pid may be used again.
thisProcess <- function(pid = Sys.getpid()) c(list(pid = pid, started = startOfProcess(pid)), thisMachine())

# Returns what identifies this machine: its `name` and `id`, which are not always unique, and its `boot` and namespace
# of pids (`pids`), in which a pid means something.
thisMachine <- function() {
  line <- function(path) c(tryCatch(suppressWarnings(readLines(path, 1L)), error = function(e) ""), "")[[1L]]
  list(
    machine = Sys.info()[["nodename"]], id = line("/etc/machine-id"), boot = line("/proc/sys/kernel/random/boot_id"),
    pids = Sys.readlink("/proc/self/ns/pid")
  )
}

# Returns when a process was started, as a text; NA if there is none, or only its parent has not heard of its end yet.
startOfProcess <- function(pid) {
  line <- tryCatch(
    suppressWarnings(readLines(sprintf("/proc/%d/stat", as.integer(pid)), 1L)), error = function(e) character()
  )
  if (!length(line)) return(NA_character_)
  # The name of the process may contain blanks and parentheses.
  fields <- strsplit(sub("^.*[)] ", "", line), " ", fixed = TRUE)[[1L]]
  if (fields[[1L]] %in% c("Z", "X", "x")) NA_character_ else fields[[20L]]
}

# Returns "running" or "ended"; "elsewhere" for a process whose pid says nothing here.
stateOfProcess <- function(process) {
  here <- thisMachine()
  if (identical(process[c("boot", "pids")], here[c("boot", "pids")])) {
    started <- startOfProcess(process$pid)
    return(if (!is.na(started) && identical(started, process$started)) "running" else "ended")
  }
  # This machine has been started again.
  same <- identical(process[c("machine", "id")], here[c("machine", "id")])
  if (same && !identical(process$boot, here$boot)) "ended" else "elsewhere"
}

# Returns a record, or NULL if there is none that this version can read.
readRecord <- function(path) {
  record <- tryCatch(suppressWarnings(readRDS(path)), error = function(e) NULL)
  if (is.list(record) && identical(record$format, recordFormat) && isRecord(record, basename(path))) record
}

# Whether a list has what a record needs. Anybody may have put the file there.
isRecord <- function(record, name) {
  number <- function(x) is.numeric(x) && length(x) == 1L && !is.na(x)
  text <- function(x) is.character(x) && length(x) == 1L && !is.na(x)
  linger <- record$linger
  fields <- record$handle
  is.list(linger) && identical(paste0(linger$id, ".rds"), name) && number(linger$seconds) &&
    number(linger$generation) && inherits(linger$created, "POSIXct") && length(linger$created) == 1L &&
    text(record$key) && is.list(record$head) && number(record$head$pid) && is.list(fields) &&
    length(fields$agents) > 0L && is.numeric(fields$owner) && is.list(fields$settings)
}

# Beyond its time, for how long the record of a cluster is kept that has agents on other hosts, and how long that of a
# cluster that another machine has made, in seconds. Their agents may have missed the end of their head for a while.
recordGrace <- 120
foreignGrace <- 365 * 86400

# Returns the records, by id. Removes those of clusters that are over.
allRecords <- function() {
  paths <- list.files(recordDirectory(), "^[0-9a-f]{16}[.]rds$", full.names = TRUE)
  records <- Filter(Negate(is.null), lapply(paths, checkedRecord))
  names(records) <- vapply(records, function(record) record$linger$id, "")
  records
}

theRecordOf <- function(id) checkedRecord(recordPath(id))

# Returns a record with the `state` of its head and the time when it ended (`lost`), or NULL if the cluster is over.
checkedRecord <- function(path) {
  record <- readRecord(path)
  if (is.null(record)) return(NULL)
  record$state <- stateOfProcess(record$head)
  if (record$state == "running") return(record)
  if (record$state == "elsewhere") {
    # Only the machine that made the cluster knows whether it is over.
    age <- as.double(difftime(Sys.time(), file.info(path)$mtime, units = "secs"))
    if (!isTRUE(age > record$linger$seconds + foreignGrace)) return(record)
    deleteRecord(path)
    return(NULL)
  }
  used <- record$handle$owner[alive(record$handle)]
  local <- vapply(record$handle$agents[used], function(host) isTRUE(host$local), NA)
  jobs <- jobDirectoriesHere(record)
  directories <- c(socketDirectories(record$linger, unique(used[local])), jobs)
  # An agent that waits has its directory, however slow it is, and none survives a restart of the machine. The directory
  # of jobs is there as long as their guard waits.
  same <- identical(record$head$boot, thisMachine()$boot)
  there <- dir.exists(directories) & same
  submitted <- same & vapply(record$handle$agents[used], function(host) isHere(record, host), NA)
  if (all(local | submitted) && !any(there)) {
    deleteRecord(path)
    return(NULL)
  }
  record$lost <- lostAt(record, path, directories[there])
  if (any(there) || timeLeft(record) > 0) return(record)
  if (timeLeft(record) < -recordGrace) {
    deleteRecord(path)
    # Without a restart of this machine, the guards have removed them.
    if (!same) unlink(jobs[file.exists(file.path(jobs, "jobs-of"))], recursive = TRUE)
  }
  NULL
}

# Whether a host has a job that was submitted on this machine.
isHere <- function(record, host) {
  launchers <- record$handle$dial$launchers
  number <- host$dial
  is.numeric(number) && number >= 1 && number <= length(launchers) && is.null(launchers[[number]]$login)
}

# Returns the directories of the jobs that were submitted on this machine.
jobDirectoriesHere <- function(record) {
  here <- Filter(function(batch) is.null(batch$launcher$login), record$batches)
  vapply(here, function(batch) as.character(batch$directory), "")
}

# Where agents of this machine have their sockets.
socketDirectories <- function(linger, i) {
  usual <- file.path("/tmp", socketName(linger, i))
  other <- file.path(Sys.getenv("TMPDIR", "/tmp"), basename(usual))
  ifelse(dir.exists(usual), usual, other)
}

# Returns the time when the agents lost their head, as nearly as it can be known. The agents of this machine and the
# guards of jobs have noted it. The head has ended when a session sees that for the first time, or before.
lostAt <- function(record, path, directories) {
  noted <- file.info(file.path(directories, "lost"))$mtime
  if (!all(is.na(noted))) return(max(noted, na.rm = TRUE))
  beside <- seenPath(path)
  seen <- tryCatch(suppressWarnings(readRDS(beside)), error = function(e) NULL)
  if (is.list(seen) && identical(seen$head, record$head) && inherits(seen$time, "POSIXct")) return(seen$time)
  now <- Sys.time()
  tryCatch(writeRecord(list(head = record$head, time = now), beside), error = identity)
  now
}

# The file that says when a session has first seen that the head of a cluster has ended.
seenPath <- function(path) sub("[.]rds$", ".seen", path)

deleteRecord <- function(path) {
  unlink(c(path, seenPath(path), Sys.glob(sub("[.]rds$", "-*", path))))
}

# Returns for how long the agents wait for a head at most, in seconds.
timeLeft <- function(record) {
  if (is.null(record$lost)) return(NA_real_)
  record$linger$seconds - as.double(difftime(Sys.time(), record$lost, units = "secs"))
}

# Returns why a copy of a cluster cannot be used, as part of a sentence.
lingerFate <- function(id) {
  record <- theRecordOf(id)
  if (is.null(record)) return(" that has been stopped, or whose `linger` time is over")
  if (record$state == "elsewhere") return(" that a session uses, or has used, on another machine")
  if (record$state != "running") return(" that waits for its session: its first use connects it")
  if (isThisProcess(record$head)) return(" that is a copy of one that this session uses")
  " that another session uses"
}

isThisProcess <- function(process) {
  identical(process$pid, Sys.getpid()) && stateOfProcess(process) == "running"
}

# Whether a handle is a copy of that of a cluster that another session has stopped, or that has waited in vain.
lingersNoMore <- function(handle) {
  if (is.null(handle$linger) || identical(handle$session, session) || isTRUE(handle$stopped)) return(FALSE)
  pids <- hub_pids(handle$pointer)
  isFailure(pids) && identical(pids[["kind"]], "restored") && is.null(theRecordOf(handle$linger$id))
}

# Functions for users ------------------------------------------------------------------------------

#' Clusters that wait for their session
#'
#' A cluster that was made with `linger` survives the end of its session: see section Clusters that wait of
#' [rustcluster_lifetime]. `reattachCluster()` connects a new session of the same user to it.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one.
#' @param id (character) The id of a cluster, as `clusterId()` and `listClusters()` return it.
#' @param progress (logical) Whether to print a line for each host that has been connected.
#' @return `clusterId()`: (character) the id of the cluster; `NA` for a cluster without `linger`.
#'
#'   `listClusters()`: a data frame with a row for each cluster of this user that was made with `linger` and may still
#'   exist: `id`, `created`, `hosts` (number of hosts), `workers` (number of workers), `state` (`"in use"` if the
#'   session that uses the cluster runs, `"lingering"` if it has ended, `"elsewhere"` if its last session was on another
#'   machine with the same home directory, which alone can tell), `left` (seconds until the agents end, at most; `NA`
#'   unless the cluster lingers). The time counts from when the agents of this machine lost their session. For a
#'   cluster of other hosts only, it counts from when `listClusters()` or another function here first saw that the
#'   session had ended.
#'
#'   `reattachCluster()`: the cluster, with all its nodes, in the order in which they were made. The workers are the
#'   same processes, with their variables, attached packages and random numbers. Nodes that were lost in the meantime
#'   are reported by warnings, as in a running cluster.
#'
#'   `killCluster()`: `NULL`, invisibly, once the cluster has ended.
#' @section Errors:
#' `rustcluster_bad_argument`; `rustcluster_no_cluster` if there is no such cluster any more; `rustcluster_in_use` if
#' another session is connected to the cluster.
#' @seealso [makeRustCluster()]
#' @examples
#' cl <- makeRustCluster(1, linger = 60)
#' clusterId(cl)
#' listClusters()
#' parallel::stopCluster(cl)
#' @export
clusterId <- function(cl) {
  handle <- clusterHandle(cl)
  if (is.null(handle$linger)) NA_character_ else handle$linger$id
}

#' @rdname clusterId
#' @export
listClusters <- function() {
  records <- allRecords()
  value <- function(of, type) vapply(unname(records), of, type)
  rows <- data.frame(
    id = as.character(names(records)),
    created = as.POSIXct(value(function(record) as.double(record$linger$created), 0), origin = "1970-01-01"),
    hosts = value(function(record) length(unique(record$handle$owner[record$handle$alive])), 0L),
    workers = value(function(record) length(record$handle$alive), 0L),
    state = value(function(record) {
      switch(record$state, running = "in use", ended = "lingering", record$state)
    }, ""),
    left = value(function(record) max(timeLeft(record), 0), 0), stringsAsFactors = FALSE
  )
  rows <- rows[order(rows$created), ]
  rownames(rows) <- NULL
  rows
}

#' @rdname clusterId
#' @export
reattachCluster <- function(id, progress = interactive()) {
  if (!isTRUE(progress) && !isFALSE(progress)) badArgument("progress", "must be TRUE or FALSE")
  handle <- takeUp(theRecord(id), progress = progress)
  cl <- newCluster(handle, handle$alive)
  raisePending(handle)
  cl
}

#' @rdname clusterId
#' @export
killCluster <- function(id) {
  record <- theRecord(id)
  handle <- tryCatch(suppressWarnings(takeUp(record, end = TRUE)), rustcluster_no_cluster = function(e) {
    # Jobs that have waited in the queue have been cancelled.
    if (!length(record$batches)) stop(e)
    deleteRecord(recordPath(record$linger$id))
  })
  if (!is.environment(handle)) return(invisible())
  handle$pending <- list()
  stopCluster.RustCluster(newCluster(handle, handle$alive))
  invisible()
}

#' Results of calls that a session has not waited for
#'
#' A cluster that was made with `linger` completes the tasks that it has begun when its session ends, and keeps the
#' results of calls of [clusterSubmit()]. `keptResults()` takes them after [reattachCluster()]. Calls that had not begun
#' are lost, and so are those whose results the session had received or was receiving when it ended.
#'
#' An agent keeps results in memory up to `setup_log_limit` of [makeRustCluster()], and beyond that in its private
#' directory in `/tmp`. They are dropped when they have been taken, or when the cluster ends.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one: the results of all of its workers are returned.
#' @return A list with an element for each call that has ended, in the order in which they ended by the clocks of
#'   their hosts. Each is a list of `label` (character; the beginning of the expression), `ended` (POSIXct), and either
#'   `value` or `error` (a condition). Calls that have not ended yet are in a later result of `keptResults()`.
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_busy`, `rustcluster_stopped`, `rustcluster_forked`, `rustcluster_restored`.
#' @seealso [reattachCluster()], [clusterSubmit()]
#' @examples
#' cl <- makeRustCluster(1, linger = 60)
#' # In a session that has reattached the cluster:
#' keptResults(cl)
#' parallel::stopCluster(cl)
#' @export
keptResults <- function(cl) {
  handle <- clusterHandle(cl)
  if (isTRUE(handle$stopped)) raiseFailure(rustFailure("stopped"), handle)
  refuseIfBusy(handle, sys.nframe())
  listed <- checked(kept_list(handle$pointer, TRUE), handle)
  while (is.null(listed)) {
    raiseInterrupt()
    listed <- checked(kept_list(handle$pointer, FALSE), handle)
  }
  results <- lapply(seq_along(listed$number), function(i) keptResult(handle, listed, i))
  Filter(Negate(is.null), results)
}

# Takes a result from its agent. NULL: it is not there any more.
keptResult <- function(handle, listed, i) {
  agent <- listed$agent[[i]]
  number <- listed$number[[i]]
  answer <- kept_read(handle$pointer, agent, number, TRUE)
  while (is.null(answer)) {
    raiseInterrupt()
    answer <- kept_read(handle$pointer, agent, number, FALSE)
  }
  if (isFALSE(answer)) return(NULL)
  # The value may need a package that is missing here.
  if (typeof(answer) == "pairlist") {
    answer <- tryCatch(unwound(answer), error = function(e) {
      list(value = structure(list(error = e), class = "rustcluster_raised"))
    })
  }
  checked(answer, handle)
  checked(kept_drop(handle$pointer, agent, number), handle)
  value <- answer$value
  label <- if (is.null(answer$tag)) NA_character_ else answer$tag
  result <- list(label = label, ended = as.POSIXct(listed$ended[[i]], origin = "1970-01-01"))
  if (inherits(value, "rustcluster_raised")) return(c(result, list(error = value$error)))
  if (isTRUE(answer$success)) return(c(result, list(value = value$value)))
  c(result, list(error = rustclusterCondition("call_failed", as.character(unclass(value)))))
}

# Returns the record of a cluster that a user has named.
theRecord <- function(id) {
  if (missing(id)) badArgument("id", "is missing; listClusters() shows the clusters that wait")
  id <- plain(id)
  if (is.character(id) && !length(id)) badArgument("id", "is empty; listClusters() shows the clusters that wait")
  if (identical(is.na(id), TRUE)) badArgument("id", "is NA, as that of a cluster that was made without `linger`")
  if (!is.character(id) || length(id) != 1L || !isTRUE(grepl("^[0-9a-f]{16}$", id))) {
    badArgument("id", "must be the id of one cluster, as listClusters() has it")
  }
  record <- theRecordOf(id)
  if (is.null(record)) noCluster(id)
  record
}

noCluster <- function(id, ...) {
  abort(
    "no_cluster", "there is no cluster ", id, " that waits for a session", ...,
    ownLine(paste0(...)), "listClusters() shows those that do", fields = list(id = id)
  )
}

# Reattaching --------------------------------------------------------------------------------------

# Returns how to reach an agent that waits, as hub_start() needs it, and how to start another.
# `missed`: whether its workers have missed a set-up call: that agent is ended.
waitingLaunch <- function(host, settings, linger, i, missed) {
  launch <- c(hostLaunch(host, settings$options), list(missed = missed))
  if (!is.null(host$dial)) return(c(launch, list(lingers = socketName(linger, i))))
  relay <- relayLaunch(host, settings$options, socketName(linger, i))
  launch$waiting <- c(list(name = socketName(linger, i), key = lingerKeys[[linger$id]]), relay)
  launch$local <- host$local
  launch
}

# Returns the command that connects to an agent on another host.
relayLaunch <- function(host, options, name) {
  if (host$local) return(list(command = character(), env = character()))
  env <- c(if (length(host$rlibs)) c(R_LIBS = paste(host$rlibs, collapse = ":")), agentVariables(host),
           RUSTCLUSTER_RELAY = name)
  env <- env[!duplicated(names(env), fromLast = TRUE)]
  rscript <- if (is.null(host[["rscript"]])) "Rscript" else host[["rscript"]]
  script <- remoteScript(c(rscript, rscriptArguments(options), "-e", startExpression("relayMain")), env)
  list(command = onHost(host, script), env = character())
}

# The main function of a relay.
relayMain <- function() {
  problem <- agent_relay(Sys.getenv("RUSTCLUSTER_RELAY"))
  if (is.character(problem)) message("rustcluster: ", problem)
  quit(save = "no", status = if (is.character(problem)) 1L else 0L, runLast = FALSE)
}

# Connects this session to the agents of a recorded cluster, and returns the handle. `handle`: that of a restored
# cluster, which is used again. `end`: whether to end the jobs if no agent is there.
takeUp <- function(record, handle = NULL, progress = FALSE, end = FALSE) {
  linger <- record$linger
  fields <- record$handle
  settings <- fields$settings
  if (!identical(record$package, packageVersionText())) {
    abort(
      "start_failed", "cluster ", linger$id, " was made by version ", record$package, " of rustcluster, and this is ",
      "version ", packageVersionText(), "; connect to it with the same version"
    )
  }
  dials <- !vapply(fields$agents, function(host) is.null(host$dial), NA)
  used <- seq_along(fields$agents) %in% fields$owner[alive(fields)]
  # Agents that dial back look for a head at ports that a head has.
  mine <- isThisProcess(record$head) && !exists(linger$id, openLingers, inherits = FALSE)
  if (any(dials & used) && record$state == "running" && !mine) inUse(record)
  # Its guard would end the jobs of a session that it cannot see.
  if (any(dials & used) && record$state == "elsewhere") {
    abort(
      "in_use", "cluster ", linger$id, " was last used on ", sQuote(record$head$machine), "; only that machine can ",
      "tell whether its session has ended: reattach the cluster there", fields = list(id = linger$id)
    )
  }
  assign(linger$id, record$key, lingerKeys)
  missed <- hostsThatMissed(record)
  launches <- lapply(seq_along(fields$agents), function(i) {
    waitingLaunch(fields$agents[[i]], settings, linger, i, missed[[i]])
  })
  pointer <- checked(hub_start(
    launches, buildText(), rVersionText(), R.version$platform, fields$bufferLimit
  ))
  for (i in which(!used)) checked(hub_leave_out(pointer, i, "it is not used"))
  attached <- FALSE
  jobs <- list(batches = list(), logins = list())
  on.exit(if (!attached) {
    leaveHub(pointer)
    leaveJobs(jobs, over)
  })
  over <- FALSE
  linger$generation <- linger$generation + 1L
  checked(hub_follow(pointer, linger$generation))
  checked(hub_policy(pointer, noJob, fields$retries, fields$retries == 0))
  checked(hub_keep_setup_log(pointer, tempfile("rustcluster-"), fields$headLogLimit, settings$setup, fields$reconnect))
  deadline <- proc.time()[["elapsed"]] + settings$setup
  if (any(dials & used)) {
    checked(hub_cluster_key(pointer, record$key))
    fields$dial$ports <- listenAgain(pointer, record)
    # What is begun here has to be ended by leaveJobs(), also after an error.
    jobs <- openJobsAgain(pointer, record, function(now) jobs <<- now)
    fields$dial$addresses <- lapply(seq_along(fields$dial$launchers), function(number) {
      dialAddresses(fields$dial$launchers[[number]], jobs$logins[[number]])
    })
  }
  awaitAgents(pointer, record, dials & used, end)
  hosts <- checked(hub_hosts(pointer))
  there <- is.na(hosts$reason) & !is.na(hosts$r_version)
  if (any(hosts$in_use %in% 1)) inUse(record)
  if (!any(there & used)) {
    over <- end
    # A host that cannot be reached now may be reached later, and an agent that is slow may answer later. Nobody
    # listens: ENOENT or ECONNREFUSED.
    none <- "^(no agent of the cluster waits on this machine): .*[(]os error (2|111)[)]$"
    gone <- grepl(none, hosts$reason)
    if (all(gone[used]) && stateOfProcess(record$head) != "elsewhere") deleteRecord(recordPath(linger$id))
    reason <- ifelse(is.na(hosts$reason), "its agent does not answer", sub(none, "\\1", hosts$reason))
    stderr <- sub("[[:space:]]+$", "", hosts$stderr)
    reason <- paste0(reason, ifelse(is.na(stderr) | !nzchar(stderr), "", paste0(": ", stderr)))
    noCluster(linger$id, ":", paste0("\n", fields$report$host[used], ": ", reason[used], collapse = ""))
  }

  handle <- newHandle(pointer, fields$agents, handle)
  for (name in recordedFields) assign(name, fields[[name]], handle)
  handle$linger <- linger
  handle$alive <- alive(fields)
  handle$made <- if (length(fields$made)) fields$made else handle$alive
  handle$batches <- jobs$batches
  handle$logins <- jobs$logins
  assign(handle$id, record$launcherKeys, launcherKeys)
  if (!is.null(record$streams)) {
    handle$streams <- new.env(parent = emptyenv())
    handle$streams$last <- record$streams
  }
  assign(linger$id, TRUE, openLingers)
  inheritSeeds(linger, record)
  startRecords(handle)
  # Before the agents belong to this session: if it ends here, the next one does not use its numbers again.
  saveRecord(handle)
  checked(hub_go(pointer, waitingPlans(handle), handle$timeout))
  takeSeeds(handle)
  attached <- TRUE
  repeat {
    up <- checked(hub_progress(pointer, TRUE), handle)
    if (up >= length(handle$hosts) || proc.time()[["elapsed"]] > deadline) break
    raiseInterrupt()
  }
  # Workers that are added later, and those of lost hosts, need the set-up calls of the sessions before.
  begin <- TRUE
  while (!checked(hub_take_over(pointer, begin, proc.time()[["elapsed"]] > deadline), handle)) {
    begin <- FALSE
    raiseInterrupt()
  }
  if (any(dials & used)) {
    # From here on agents of jobs that have waited in the queue are heard, too.
    checked(hub_listen(pointer, character(), 0L, 0L, as.character(record$launcherKeys)), handle)
    noteAwaited(handle, checked(hub_awaited(pointer, FALSE), handle))
    nameStarted(handle)
    # Their guards count the time from the end of this session.
    for (batch in handle$batches) lingerJobs(batch, linger$seconds)
  }
  if (progress) for (i in which(used & there)) showDone(paste0(fields$report$host[[i]], ": connected"))
  # The engine says whether jobs that have not connected will.
  for (i in which(used & !there & (!dials | missed & !is.na(hosts$reason)))) {
    failure <- list(
      kind = "host_failed", agent = i,
      reason = if (is.na(hosts$reason[[i]])) "no response from its agent" else hosts$reason[[i]]
    )
    handle$pending <- c(handle$pending, list(failureCondition(failure, handle, "warning")))
  }
  handle
}

# Raises the error that another session, or another object, has the cluster.
inUse <- function(record) {
  abort(
    "in_use", "cluster ", record$linger$id, " is connected to ",
    if (isThisProcess(record$head)) {
      "this session; use the cluster that was made or reattached, or stop it with stopCluster()"
    } else {
      "another session; this one can reattach or end it when that session has ended"
    },
    fields = list(id = record$linger$id)
  )
}

# Waits until the agents have greeted, or will not: those of `dials`, which dial this session again and again, have less
# time. `end`: whether the cluster is to end. The engine ends the jobs of agents that are not there by then.
awaitAgents <- function(pointer, record, dials, end) {
  began <- proc.time()[["elapsed"]]
  # Hosts whose nodes have names have had an agent. Others may have, or have waited in the queue.
  named <- vapply(record$handle$agents, function(host) isTRUE(host$named), NA)
  limits <- redialPatience(record$handle$settings$heartbeat_timeout)
  patience <- ifelse(dials, ifelse(named & !end, limits[[1L]], limits[[2L]]), Inf)
  while (!checked(hub_greeted(pointer))) {
    waited <- proc.time()[["elapsed"]] - began
    if (waited > record$handle$settings$setup) break
    hosts <- checked(hub_hosts(pointer))
    missing <- is.na(hosts$reason) & is.na(hosts$r_version)
    if (!any(missing & waited < patience)) break
    raiseInterrupt()
  }
}

# Returns for how many seconds the agents of jobs are waited for: those that have been connected, and others. An agent
# dials every second or so, but one whose link is dead has to notice that by the silence of the head.
redialPatience <- function(heartbeat_timeout) c(max(15, heartbeat_timeout + 5), 4)

# Listens on the ports on which the agents of launchers look for a session, for these agents alone. Returns the ports.
listenAgain <- function(pointer, record) {
  dial <- record$handle$dial
  direct <- which(!areThere(dial$launchers))
  for (port in unique(dial$ports[direct])) {
    launcher <- dial$launchers[[direct[dial$ports[direct] == port][[1L]]]]
    tryCatch(
      checked(hub_listen(pointer, listenAddresses(launcher), port, port, character())),
      rustcluster_start_failed = function(e) {
        abort(
          "start_failed", "cluster ", record$linger$id, " cannot be taken over, because its agents look for a session ",
          "at port ", port, " of this machine: ", conditionMessage(e), "; a process that holds the port must end first",
          fields = list(id = record$linger$id, port = port)
        )
      }
    )
  }
  dial$ports
}

# Connects to the login nodes of a recorded cluster, and starts guards, to which those of the session before leave its
# jobs. Returns a list of `batches` and `logins`; `note` gets it whenever it has changed.
openJobsAgain <- function(pointer, record, note) {
  dial <- record$handle$dial
  settings <- record$handle$settings
  jobs <- list(batches = list(), logins = rep(list(engineHost()), length(dial$launchers)))
  # Without addresses, the hub only learns the key.
  checked(hub_listen(pointer, character(), 0L, 0L, character()))
  for (number in which(areThere(dial$launchers))) {
    jobs$logins[[number]] <- openLoginAgain(pointer, dial$launchers[[number]], dial$ports[[number]], settings)
    note(jobs)
  }
  for (saved in record$batches) {
    batch <- batchAgain(saved, jobs$logins[[saved$number]], record$linger$seconds)
    if (!isThere(batch) && !dir.exists(batch$directory)) next
    if (isThere(batch)) writeGuardThere(batch)
    jobs$batches <- c(jobs$batches, list(batch))
    note(jobs)
    startGuard(batch)
  }
  jobs
}

# Starts a gateway at the port of the one before, which ends with its session: after a while, if the link is dead.
openLoginAgain <- function(pointer, launcher, port, settings) {
  deadline <- proc.time()[["elapsed"]] + settings$heartbeat_timeout + 10
  repeat {
    host <- tryCatch(
      openLogin(
        launcher, function(path) checked(hub_listen_unix(pointer, path)), settings$options$rshcmd,
        settings$options$rshopts, timeout = settings$setup, heartbeat_timeout = settings$heartbeat_timeout, ports = port
      ),
      rustcluster_start_failed = identity
    )
    if (!inherits(host, "error")) return(host)
    held <- grepl("cannot listen on", conditionMessage(host), fixed = TRUE)
    if (!held || proc.time()[["elapsed"]] > deadline) stop(host)
    raiseInterrupt()
    Sys.sleep(0.5)
  }
}

# Returns a batch of jobs from its record.
batchAgain <- function(saved, host, seconds) {
  batch <- list2env(saved, envir = new.env(parent = emptyenv()))
  batch$host <- host
  batch$reading <- list()
  batch$unwritten <- list()
  batch$variables <- character()
  batch$guard <- NULL
  batch$query <- NULL
  batch$queried <- -Inf
  batch$submitting <- FALSE
  batch$linger <- seconds
  # Its directory is there, with files of another session.
  batch$isOld <- TRUE
  batch
}

# Leaves jobs to their guards, which wait for another session, or ends the jobs.
leaveJobs <- function(jobs, end) {
  for (batch in jobs$batches) {
    if (is.null(batch$guard)) next
    if (end) endLinger(batch)
    releaseGuard(batch)
  }
  if (end) for (batch in jobs$batches) stopJobs(batch)
  for (host in jobs$logins) if (!is.null(host$link)) closeGateway(host, 15)
}

# The mark of handles of this session. A copy of a handle has another object.
session <- new.env(parent = emptyenv())

# Connects a restored cluster to this session, if its agents wait for one. Otherwise the cluster cannot be used.
revive <- function(handle) {
  if (is.null(handle$linger) || identical(handle$session, session) || isTRUE(handle$stopped)) return(invisible())
  pids <- hub_pids(handle$pointer)
  if (!isFailure(pids) || !identical(pids[["kind"]], "restored")) return(invisible())
  record <- theRecordOf(handle$linger$id)
  if (is.null(record)) return(invisible())
  takeUp(record, handle)
  message(rustclusterCondition(
    "reattached", paste0(
      "cluster ", handle$linger$id, " of the saved session was connected again, with ", length(handle$alive),
      ngettext(length(handle$alive), " worker\n", " workers\n")
    ),
    id = handle$linger$id, type = "message"
  ))
  raisePending(handle)
}

# Returns the ranks that have not been stopped.
alive <- function(fields) if (length(fields$alive)) fields$alive else seq_along(fields$hosts)

# Disconnects from the agents, without waiting for anything.
leaveHub <- function(pointer) {
  hub_leave(pointer)
  while (identical(hub_closed(pointer), FALSE)) raiseInterrupt()
}

# Returns the plans of agents that have workers: what hub_go() needs to know of them.
waitingPlans <- function(handle) {
  settings <- handle$settings
  xdr <- otherByteOrder(handle)
  lapply(seq_along(handle$agents), function(i) {
    host <- handle$agents[[i]]
    ranks <- which(handle$owner == i)
    if (!length(ranks)) return(NULL)
    agentPlan(handle, settings, i, ranks, hostLaunch(host, settings$options)$worker, xdr[[i]])
  })
}
