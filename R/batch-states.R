# What an engine says of the jobs of a launcher. Its word is text for people: it comes late, or never.

# Returns the states of the jobs as of the last answer of the engine, a data frame with a row for each element of an
# array, or for each job that is no array: `job` (as in the batch), `task` (integer; NA without an array), `state` and
# `reason` (in the engine's words; NA if unknown), `node`. Starts a new query if the last one is older than `every`
# seconds, or with `force`, unless a query is under way. Never waits for the engine.
queryJobs <- function(batch, force = FALSE, every = 5) {
  if (is.null(batch$jobs)) return(emptyStates())
  if (is.null(batch$states)) batch$states <- expectedStates(batch)
  now <- proc.time()[["elapsed"]]
  if (!is.null(batch$query)) {
    # A query without an end would be the last one.
    answer <- tryCatch(answerTo(batch, batch$query), error = function(e) {
      list(status = NA_integer_, err = conditionMessage(e))
    })
    if (!is.null(answer)) {
      batch$problem <- takeAnswer(batch, answer)
      if (is.null(batch$problem)) batch$answered <- batch$queried
      endQuery(batch)
    } else if (now - batch$queried > 60) {
      # The guard was killed with its query.
      endQuery(batch)
    }
  }
  if (is.null(batch$query) && (force || now - batch$queried >= every)) {
    batch$orders <- batch$orders + 1L
    if (tellGuard(batch, "query", batch$orders)) {
      batch$query <- paste0("query-", batch$orders)
      batch$queried <- now
    }
  }
  batch$states
}

# Waits up to `limit` seconds for an answer that was asked for now. Returns the states as of the last answer.
awaitStates <- function(batch, limit = 25) {
  deadline <- proc.time()[["elapsed"]] + limit
  # A query that is under way may have been asked before.
  awaitQuery(batch, deadline)
  queryJobs(batch, force = TRUE)
  awaitQuery(batch, deadline)
  batch$states
}

# Waits until the query that is under way is answered.
awaitQuery <- function(batch, deadline) {
  while (!is.null(batch$query) && proc.time()[["elapsed"]] < deadline) {
    queryJobs(batch, every = Inf)
    Sys.sleep(0.01)
  }
}

# Asks the engines, and waits up to a second for their answers. The last answers do not do if other hosts have `joined`
# by now: their jobs would be shown as waiting.
askEngines <- function(batches, joined) {
  batches <- Filter(function(batch) !isTRUE(batch$submitting), batches)
  for (batch in batches) {
    orders <- batch$orders
    queryJobs(batch, force = !identical(batch$joined, joined))
    if (batch$orders > orders) batch$joined <- joined
  }
  deadline <- proc.time()[["elapsed"]] + 1
  for (batch in batches) awaitQuery(batch, deadline)
}

endQuery <- function(batch) {
  forgetAnswer(batch, batch$query)
  batch$query <- NULL
}

emptyStates <- function() {
  data.frame(job = character(), task = integer(), state = character(), reason = character(), node = character(),
             stringsAsFactors = FALSE)
}

expectedStates <- function(batch) {
  jobs <- batch$jobs
  # HTCondor counts the jobs of a cluster from 0.
  first <- if (batch$launcher$kind == "htcondor") 0L else 1L
  rows <- lapply(seq_len(nrow(jobs)), function(i) {
    task <- if (jobs$array[[i]]) seq_len(jobs$tasks[[i]]) + first - 1L else NA_integer_
    stateRows(jobs$job[[i]], task, NA_character_)
  })
  do.call(rbind, rows)
}

stateRows <- function(job, task, state, reason = NA_character_, node = NA_character_) {
  if (!length(job)) return(emptyStates())
  data.frame(job = job, task = as.integer(task), state = state, reason = reason, node = node, stringsAsFactors = FALSE)
}

# Merges the answer of the engine into the states of a batch. Returns NULL, or why the answer is no answer. A job that
# the engine no longer lists keeps its last words, or is "ENDED".
takeAnswer <- function(batch, answer) {
  kind <- batch$launcher$kind
  if (!isTRUE(answer$status == 0L) && !unknownOnly(kind, answer)) {
    return(paste0(c(answer$err, paste("exit status", answer$status))[[1L]]))
  }
  said <- tryCatch(parseStates(kind, answer$out), error = function(e) e)
  if (inherits(said, "error")) return(conditionMessage(said))
  states <- batch$states
  number <- function(job) sub("^([0-9]+).*$", "\\1", job)
  at <- match(paste(number(states$job), states$task), paste(number(said$job), said$task))
  # Some engines list an array as one job.
  at <- ifelse(is.na(at), match(paste(number(states$job), NA), paste(number(said$job), said$task)), at)
  found <- !is.na(at)
  for (column in c("state", "reason", "node")) states[[column]][found] <- said[[column]][at[found]]
  over <- !found & !is.na(states$state) & !isFinalState(kind, states$state)
  states$state[over] <- "ENDED"
  states$reason[over] <- NA_character_
  batch$states <- states
  NULL
}

# Whether a failed query says only that the engine no longer knows the jobs.
unknownOnly <- function(kind, answer) {
  switch(kind,
    pbs = isTRUE(answer$status %in% c(153L, 35L)),
    lsf = any(grepl("not found|No .*job found", c(answer$out, answer$err))),
    FALSE
  )
}

# Returns whether a state is the end of a job.
isFinalState <- function(kind, state) {
  final <- switch(kind,
    slurm = c("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
              "TIMEOUT", "REVOKED"),
    htcondor = c("REMOVED", "COMPLETED"),
    pbs = c("C", "F", "X"),
    lsf = c("DONE", "EXIT", "ZOMBI"),
    character()
  )
  state %in% c(final, "ENDED")
}

# Returns whether a state is, in the words of any engine, that of a job that runs.
isRunningState <- function(state) state %in% c("RUNNING", "RUN", "R", "r", "hr")

# Returns the words of an engine as they are shown: "PENDING (Resources)".
stateText <- function(state, reason = NA_character_) {
  ifelse(is.na(state), NA_character_, ifelse(is.na(reason), state, paste0(state, " (", reason, ")")))
}

# Returns the states in the output of the engine, a data frame as of queryJobs().
parseStates <- function(kind, lines) {
  lines <- lines[nzchar(trimws(lines))]
  switch(kind,
    slurm = parseSlurm(lines), htcondor = parseCondor(lines), gridEngine = parseGridEngine(lines),
    pbs = parsePbs(lines), lsf = parseLsf(lines), template = parseWords(lines)
  )
}

# Returns the fields of lines as a matrix of `count` columns. Values that stand for nothing are NA.
fieldsOf <- function(lines, separator, count, nothing) {
  parts <- lapply(strsplit(lines, separator, fixed = TRUE), function(part) {
    # A reason may contain the separator.
    rest <- paste(part[-seq_len(count - 1L)], collapse = separator)
    if (length(part) > count) part <- c(part[seq_len(count - 1L)], rest)
    length(part) <- count
    part
  })
  fields <- matrix(trimws(as.character(unlist(parts))), ncol = count, byrow = TRUE)
  fields[fields %in% c("", nothing)] <- NA_character_
  fields
}

parseSlurm <- function(lines) {
  fields <- fieldsOf(lines, "|", 5L, c("N/A", "None", "(null)"))
  stateRows(fields[, 1L], suppressWarnings(as.integer(fields[, 2L])), fields[, 3L], fields[, 4L], fields[, 5L])
}

condorStates <- c("IDLE", "RUNNING", "REMOVED", "COMPLETED", "HELD", "TRANSFERRING_OUTPUT", "SUSPENDED")

parseCondor <- function(lines) {
  events <- startsWith(lines, "event ")
  fields <- fieldsOf(lines[!events], "\t", 6L, "undefined")
  state <- condorStates[suppressWarnings(as.integer(fields[, 3L]))]
  reason <- ifelse(state %in% "HELD", fields[, 5L], ifelse(state %in% "IDLE", fields[, 6L], NA_character_))
  said <- stateRows(
    fields[, 1L], suppressWarnings(as.integer(fields[, 2L])), state, reason, sub("^.*@", "", fields[, 4L])
  )
  withEvents(said, sub("^event ", "", lines[events]))
}

# Adds the jobs that have left the queue of HTCondor. `lines`: what its event log says of their ends.
withEvents <- function(said, lines) {
  at <- grep("^0(05|09) [(][0-9]+[.][0-9]+[.]", lines)
  if (!length(at)) return(said)
  head <- lines[at]
  nextLine <- trimws(c(lines, "")[at + 1L])
  aborted <- startsWith(head, "009")
  ended <- stateRows(
    as.character(as.numeric(sub("^[0-9]+ [(]([0-9]+)[.].*$", "\\1", head))),
    suppressWarnings(as.integer(sub("^[0-9]+ [(][0-9]+[.]([0-9]+)[.].*$", "\\1", head))),
    ifelse(aborted, "REMOVED", "COMPLETED"),
    ifelse(nzchar(nextLine), sub("^[(][01][)] ", "", nextLine), NA_character_)
  )
  ended <- ended[!duplicated(ended[c("job", "task")], fromLast = TRUE), ]
  rbind(said, ended[!paste(ended$job, ended$task) %in% paste(said$job, said$task), ])
}

parseGridEngine <- function(lines) {
  errors <- regmatches(lines, regexec("^error ([0-9]+) ([0-9]+) (.*)$", lines))
  errors <- Filter(length, errors)
  rows <- strsplit(trimws(grep("^ *[0-9]+ ", lines, value = TRUE)), "[[:space:]]+")
  rows <- lapply(rows[lengths(rows) >= 8L], function(row) {
    # A job that waits has no queue.
    queue <- if (grepl("@", row[[8L]], fixed = TRUE)) row[[8L]] else NA_character_
    rest <- row[-seq_len(if (is.na(queue)) 8L else 9L)]
    task <- if (length(rest)) suppressWarnings(as.integer(rest[[1L]])) else NA_integer_
    reason <- NA_character_
    if (grepl("E", row[[5L]], fixed = TRUE)) {
      mine <- Filter(function(error) error[[2L]] == row[[1L]], errors)
      ofTask <- Filter(function(error) identical(suppressWarnings(as.integer(error[[3L]])), task), mine)
      mine <- c(ofTask, mine)
      if (length(mine)) reason <- mine[[1L]][[4L]]
    }
    stateRows(row[[1L]], task, row[[5L]], reason, sub("^.*@", "", queue))
  })
  if (length(rows)) do.call(rbind, rows) else emptyStates()
}

parsePbs <- function(lines) {
  starts <- grep("^Job Id:", lines)
  if (!length(starts)) return(emptyStates())
  blocks <- split(lines[starts[[1L]]:length(lines)], findInterval(starts[[1L]]:length(lines), starts))
  rows <- lapply(blocks, function(block) {
    # A long value goes on in lines that begin with a tab. Some versions indent all lines by tabs.
    text <- gsub("\n\t(?![A-Za-z_.]+ = )", "", paste(block, collapse = "\n"), perl = TRUE)
    block <- strsplit(text, "\n", fixed = TRUE)[[1L]]
    value <- function(name) {
      found <- grep(paste0("^[ \t]*", name, " = "), block, value = TRUE)
      if (length(found)) sub("^[^=]*= ", "", found[[1L]]) else NA_character_
    }
    id <- trimws(sub("^Job Id:", "", block[[1L]]))
    element <- regmatches(id, regexec("^([0-9]+)(?:\\[([0-9]+)\\]|-([0-9]+))?", id, perl = TRUE))[[1L]]
    task <- suppressWarnings(as.integer(c(element[3:4][nzchar(element[3:4])], NA)[[1L]]))
    stateRows(sub("\\[[0-9]+\\]", "[]", id), task, value("job_state"), value("comment"),
              sub("[/:+].*$", "", value("exec_host")))
  })
  rows <- do.call(rbind, rows)
  rownames(rows) <- NULL
  rows
}

parseLsf <- function(lines) {
  fields <- fieldsOf(grep("|", lines, fixed = TRUE, value = TRUE), "|", 6L, "-")
  reason <- ifelse(is.na(fields[, 5L]), fields[, 6L], fields[, 5L])
  task <- suppressWarnings(as.integer(fields[, 2L]))
  task[task %in% 0L] <- NA_integer_
  stateRows(fields[, 1L], task, fields[, 3L], reason, sub(":.*$", "", sub("^[0-9]+[*]", "", fields[, 4L])))
}

# The output of a `status` command: an id, a state and perhaps a reason. An element of an array is ID_TASK, ID.TASK or
# ID[TASK].
parseWords <- function(lines) {
  parts <- regmatches(lines, regexec("^ *([^ ]*[0-9]+[^ ]*) +([^ ]+) *(.*)$", lines))
  parts <- Filter(length, parts)
  rows <- lapply(parts, function(part) {
    element <- regmatches(part[[2L]], regexec("^([0-9]+)[_.[]([0-9]+)\\]?$", part[[2L]]))[[1L]]
    job <- if (length(element)) element[[2L]] else part[[2L]]
    task <- if (length(element)) suppressWarnings(as.integer(element[[3L]])) else NA_integer_
    stateRows(job, task, part[[3L]], if (nzchar(part[[4L]])) part[[4L]] else NA_character_)
  })
  if (length(rows)) do.call(rbind, rows) else emptyStates()
}
