# All tasks of one call of a verb, handed over together: Rust gives them out and collects the answers,
# and comes back here now and then for interrupts, and when it is to be decided what becomes of a task
# whose worker was lost.

# The places of a cluster's nodes among its workers. NULL for what our verbs leave to parallel's: what
# is no cluster of ours, nodes of several, and nodes that are there twice, whose tasks have an order
# among them.
nativeRanks <- function(cl) {
  # Ours that were beside others have this class alone.
  if (!inherits(cl, "cluster") || !length(cl)) return(NULL)
  ranks <- cluster_ranks(cl)
  if (typeof(ranks) == "integer" && (length(ranks) == 1L || !anyDuplicated.default(ranks))) ranks
}

# Runs the tasks. `elements`: a vector, or a function of a task's number. Returns a list of `values`, the
# list of results, and `failed`, the numbers of those that are errors.
#   common: arguments that all tasks have.
#   round: the tasks go round the nodes, and do not go to whoever is free.
#   shares: what tasks that are sent together share. "nothing": none sees what another has changed in
#     place. "all": `fun` and `common`, as the elements of a chunk do in parallel. "function": `fun` alone,
#     if it was made in another function.
#   spread: an element is a list of arguments, and not the first one.
#   lossEnds: a worker that is lost ends the job with an error.
#   each: is called with the numbers of tasks that have been answered, and all results so far; FALSE
#     ends the job.
#   what: what errors call one of them.
runJob <- function(cl, ranks, n, fun, common, elements, round = FALSE, shares = "nothing", spread = FALSE,
                   seed = NULL, order = NULL, retries = handle$retries, timeout = Inf, lossEnds = retries == 0,
                   each = NULL, progress = wantsProgress(), what = "task") {
  handle <- cl[[1L]][["handle"]]
  refuseIfBusy(handle, sys.nframe())
  job <- handle$jobs <- handle$jobs + 1
  done <- FALSE
  on.exit(if (!done) closeJob(handle, job))
  # One that took too long, or that is lost and not tried again, is known by its message.
  singly <- is.finite(handle$timeout) || is.finite(timeout) || (retries == 0 && !lossEnds)
  settings <- list(
    round = round, shares = shares, spread = spread, seed = seed,
    seeded = if (!is.null(seed)) list(runSeeded, list()), nothing = if (is.finite(timeout)) list(list, list()),
    order = order, singly = singly, timeout = timeout, at_once = !singly && is.null(each) && !progress
  )
  repeat {
    begun <- job_begin(handle$pointer, job, ranks, n, list(fun, common), elements, settings)
    if (!isFromStale(begun, handle)) break
  }
  if (typeof(begun) == "list") {
    done <- TRUE
    return(list(values = begun[[1L]], failed = begun[[2L]]))
  }
  continueJob(handle, job, sys.nframe(), 0L, NULL)
  if (is.character(begun)) handleFailed(begun, handle)
  checked(begun)
  shown <- if (progress) showProgress(function() job_progress(handle$pointer)[2:3], n, what)
  repeat {
    unread <- answersRead(handle, repeat {
      step <- job_step(handle$pointer)
      if (isTRUE(step)) break
      switch(typeof(step),
        character = {
          if (!"task" %in% names(step)) handleFailed(step, handle)
          unitEnded(step, handle, retries, timeout, lossEnds, what)
        },
        pairlist = unwound(step)
      )
      showEvents(handle)
      if (!is.null(shown)) shown()
      if (!is.null(each)) {
        results <- job_results(handle$pointer)
        if (length(results[[3L]]) && isFALSE(each(results[[3L]], results[[1L]]))) break
      }
      Sys.sleep(0)
    })
    if (!inherits(unread, "rustcluster_unread")) break
    unitUnread(unread, handle)
  }
  results <- job_results(handle$pointer)
  if (!is.null(shown)) shown()
  if (!is.null(each) && isTRUE(step) && length(results[[3L]])) each(results[[3L]], results[[1L]])
  list(values = results[[1L]], failed = results[[2L]])
}

# The same for a verb that leaves it to the cluster which node has which task: a node that is there twice
# counts once, and the nodes may be of several clusters.
#   retries: NULL for those of the cluster.
#   returns: a worker that is lost never ends the job.
runFree <- function(cl, n, fun, common, elements, shares = "nothing", seed = NULL, order = NULL, retries = NULL,
                    timeout = Inf, returns = FALSE, each = NULL, progress = wantsProgress(), what = "task") {
  parts <- clustersOf(cl)
  if (length(parts) > 1L) {
    return(runOver(cl, n, fun, common, elements, seed, order, retries, returns, each, progress, what))
  }
  if (is.null(retries)) retries <- parts[[1L]]$handle$retries
  runJob(
    cl, unique(parts[[1L]]$ranks), n, fun, common, elements, shares = shares, seed = seed, order = order,
    retries = retries, timeout = timeout, lossEnds = retries == 0 && !returns, each = each, progress = progress,
    what = what
  )
}

# On nodes of several clusters: one message a task, and each cluster has a job of its own.
runOver <- function(cl, n, fun, common, elements, seed, order, retries, returns, each, progress, what) {
  cl <- distinctNodes(cl)
  frame <- sys.nframe()
  for (part in clustersOf(cl)) {
    handle <- part$handle
    refuseIfBusy(handle, frame)
    job <- openJob(handle, frame, 0L, NULL)
    do.call(on.exit, list(as.call(list(closeJob, handle, job)), TRUE), envir = environment())
    most <- if (is.null(retries)) handle$retries else retries
    handle$policy <- list(retries = most, lossEnds = most == 0 && !returns)
  }
  values <- vector("list", n)
  failed <- logical(n)
  sent <- done <- 0L
  send <- function(place) {
    sent <<- sent + 1L
    i <- if (is.null(order)) sent else order[[sent]]
    args <- c(list(elements[[i]]), common)
    data <- list(fun = fun, args = args, return = TRUE, tag = i)
    if (!is.null(seed)) data[c("fun", "args")] <- list(runSeeded, list(fun, args, seed(i)))
    node <- cl[[place]]
    sendTask(node$handle, node$rank, list(type = "EXEC", data = data, tag = NULL))
  }
  shown <- if (progress) showProgress(function() c(done, sent - done), n, what)
  for (place in seq_len(min(n, length(cl)))) send(place)
  while (done < n) {
    got <- receiveOfAny(cl, readWithConditions)
    done <- done + 1L
    if (sent < n) send(got$node)
    answer <- got$value
    i <- answer$tag
    values[i] <- list(ofElement(answer$value, what))
    failed[[i]] <- isFALSE(answer$success)
    if (!is.null(shown)) shown()
    if (!is.null(each) && isFALSE(each(i, values))) break
  }
  list(values = values, failed = which(failed))
}

# What has become of a task, which is called an element.
ofElement <- function(value, what) {
  if (!inherits(value, "rustcluster_failure")) return(value)
  condition <- attr(value, "condition")
  condition$message <- sub("^task ", paste0(what, " "), condition$message)
  failureValue(condition)
}

# Tasks that were together have ended without an answer.
unitEnded <- function(failure, handle, retries, timeout, lossEnds, what) {
  number <- as.numeric(failure[["task"]])
  tasks <- job_tasks(handle$pointer, number)
  failure <- c(failure, tasks = spanText(tasks, what))
  again <- integer()
  warn <- NULL
  if (failure[["kind"]] == "timeout") {
    if (is.finite(timeout)) failure <- c(failure, limit = timeout)
    condition <- failureCondition(failure, handle)
    values <- lapply(tasks, function(task) failureValue(condition))
  } else {
    loss <- failureCondition(c(failure, again = if (lossEnds) FALSE), handle)
    loss$tasks <- tasks
    # Which of several has ended it is not known.
    if (length(tasks) > 1L) loss$index <- NULL
    if (inherits(loss, "rustcluster_stopped") || lossEnds) {
      showEvents(handle, except = loss)
      stop(loss)
    }
    keys <- paste0("element", tasks)
    for (key in keys) handle$losses[[key]] <- c(handle$losses[[key]], list(loss))
    lost <- lengths(handle$losses[keys])
    again <- tasks[lost <= retries]
    logAttempt(failure, max(lost), length(again) > 0L)
    # One of them may end every worker, and others are not to be given up for it: each is tried again alone.
    values <- Map(
      function(task, key) failureValue(quarantined(task, handle$losses[[key]], what)),
      tasks[lost > retries], keys[lost > retries]
    )
    # That a host is lost, or a worker for good, is an event of its own.
    if (isTRUE(loss$replaced)) {
      # Those that are given up have an error of their own.
      if (length(again)) failure[["tasks"]] <- spanText(again, what)
      warn <- failureCondition(c(failure, again = length(again) > 0L), handle, "warning")
    }
  }
  checked(job_settle(handle$pointer, number, again, unname(values)), handle)
  # The tasks are safe before the warning, which may be turned into a jump.
  if (!is.null(warn)) warning(warn)
}

# The answer of tasks that were together cannot be read. Which of several is to blame is not known: each is
# tried again alone.
unitUnread <- function(unread, handle) {
  tasks <- job_tasks(handle$pointer, unread$task)
  several <- length(tasks) > 1L
  values <- if (several) list() else list(failureValue(notRead(unread, tasks)))
  checked(job_settle(handle$pointer, unread$task, if (several) tasks else integer(), values), handle)
}

# In a worker, for what crosses in a message of parallel's, which has no place for a seed.
runSeeded <- function(fun, args, seed) {
  before <- get0(".Random.seed", globalenv(), inherits = FALSE)
  on.exit(
    if (is.null(before)) {
      rm(list = intersect(".Random.seed", ls(globalenv(), all.names = TRUE)), envir = globalenv())
    } else {
      assign(".Random.seed", before, globalenv())
    }
  )
  assign(".Random.seed", seed, globalenv())
  do.call(fun, args, quote = TRUE)
}

# "task 3" or "tasks 3 to 9".
spanText <- function(tasks, what) {
  if (length(tasks) == 1L) return(paste(what, tasks))
  if (identical(tasks, seq(tasks[[1L]], length.out = length(tasks)))) {
    return(paste0(what, "s ", tasks[[1L]], " to ", tasks[[length(tasks)]]))
  }
  text <- toString(utils::head(tasks, 5L))
  paste0(what, "s ", text, if (length(tasks) > 5L) " and others")
}

# Raises what went wrong with any of the tasks, as parallel does, or returns the results. `chunks`:
# each stands for so many tasks of parallel's as these numbers say.
checkedResults <- function(job, chunks = NULL) {
  val <- job$values
  if (!length(job$failed)) return(val)
  first <- val[[job$failed[[1L]]]]
  if (inherits(first, "rustcluster_failure")) raiseTaskFailure(first, val)
  failed <- job$failed
  if (!is.null(chunks)) failed <- failed[!duplicated(chunks[failed])]
  val <- val[failed]
  checkForRemoteErrors <- parallels$checkForRemoteErrors
  checkForRemoteErrors(val)
}
