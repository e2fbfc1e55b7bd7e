# Jobs: all tasks of one call of a verb. Rust sends the tasks and collects the answers. It returns to R regularly for
# interrupts, with errors, and for the results of tasks that have failed.

# Returns the ranks of a cluster's nodes. Returns NULL if the verb has to be parallel's: for clusters of other packages,
# nodes of several clusters, and duplicate nodes, whose tasks run in order.
nativeRanks <- function(cl) {
  # Nodes of this package that were joined with others have class "cluster" only.
  if (!inherits(cl, "cluster") || !length(cl)) return(NULL)
  ranks <- cluster_ranks(cl)
  if (typeof(ranks) == "integer" && (length(ranks) == 1L || !anyDuplicated.default(ranks))) ranks
}

# Runs the tasks. `elements`: a vector, or a function of a task's index. Returns a list of `values`, the list of
# results, and `failed`, the indices of results that are errors.
#   common: the arguments that are the same for all tasks.
#   round: whether tasks are assigned to nodes in turn, and not to the next idle worker.
#   reuse: the objects that all tasks of a batch use. "nothing": each task gets objects of its own, so that no task sees
#     changes in place by another. "all": `fun` and `common`, as the elements of a chunk do in parallel. "function":
#     `fun` only, if it was made in another function.
#   spread: whether an element is a list of arguments, and not the first argument.
#   raises: whether a worker failure ends the job with an error.
#   onResults: a function of the indices of newly finished tasks, of all results so far and of the indices of those
#     that are errors. It ends the job by returning FALSE.
#   what: what error messages call a task.
#   store: where results are stored, or NULL (run-store.R). Only the tasks in `order` are run then.
runJob <- function(cl, ranks, n, fun, common, elements, round = FALSE, reuse = "nothing", spread = FALSE,
                   seed = NULL, order = NULL, retries = handle$retries, timeout = Inf, raises = retries == 0,
                   onResults = NULL, progress = wantedProgress(), what = "task", store = NULL) {
  handle <- cl[[1L]][["handle"]]
  if (!is.null(handle$linger)) revive(handle)
  refuseIfBusy(handle, sys.nframe())
  if (round) {
    # The other nodes get no task.
    if (n < length(ranks)) ranks <- ranks[seq_len(n)]
    awaitNodes(handle, ranks)
  }
  job <- handle$jobs <- handle$jobs + 1
  done <- FALSE
  on.exit(if (!done) closeJob(handle, job))
  shows <- progress != "nobody"
  chunks <- if (identical(fun, lapply) && (shows || isTRUE(hub_watched(handle$pointer)))) chunksOfJob()
  if (!is.null(chunks) || isNamespaceLoaded("progressr")) receiveReports(handle)
  # Send tasks one by one if a failure must be attributed to one task: with a timeout, or without retries.
  singly <- is.finite(handle$timeout) || is.finite(timeout) || (retries == 0 && !raises)
  settings <- list(
    round = round, reuse = reuse, spread = spread, seed = seed,
    seeded = if (!is.null(seed)) list(runSeeded, list()),
    order = order, singly = singly, timeout = timeout, retries = as.double(retries), raises = raises,
    noun = what,
    part = chunks$what, parts = as.double(sum(chunks$sizes)),
    at_once = !singly && is.null(onResults) && !shows && is.null(chunks) && is.null(store)
  )
  waitsOnHosts <- !is.null(store$save) && !savesForHead(store)
  if (!is.null(store)) {
    settings <- c(settings, list(
      store = store$pointer, ids = store$info$ids, keep = store$keep, total = as.double(n), save = store$save
    ))
    n <- length(order)
  }
  repeat {
    sent <- if (is.null(chunks)) fun else lapplyReporting
    begun <- job_begin(handle$pointer, job, ranks, n, list(sent, common), elements, settings)
    if (!isFromStale(begun, handle)) break
  }
  if (typeof(begun) == "list" && !isFailure(begun)) {
    done <- TRUE
    return(list(values = begun[[1L]], failed = begun[[2L]]))
  }
  continueJob(handle, job, sys.nframe(), 0L, NULL)
  if (isFailure(begun)) handleFailed(begun, handle)
  checked(begun)
  finished <- function() job_progress(handle$pointer)[2:3]
  counted <- if (is.null(chunks)) finished else elementsProgress(handle, chunks$sizes, finished)
  shown <- if (shows) {
    if (is.null(chunks)) showProgress(finished, n, what, progress)
    else showProgress(counted, sum(chunks$sizes), chunks$what, progress)
  }
  repeat {
    unread <- answersRead(handle, repeat {
      step <- job_step(handle$pointer)
      if (isTRUE(step)) break
      if (isFailure(step)) {
        if (step[["kind"]] == "run_write_failed") checkedStore(step, store$dir)
        if (is.null(step[["elements"]])) handleFailed(step, handle)
        tasksFailed(step, handle, timeout, what)
      } else if (!is.null(step)) {
        unwound(step)
      }
      showEvents(handle)
      if (!is.null(chunks)) job_count_elements(handle$pointer, counted()[[1L]])
      if (!is.null(shown)) shown()
      if (waitsOnHosts) showTrouble(store)
      if (!is.null(onResults)) {
        results <- job_results(handle$pointer)
        if (length(results[[3L]]) && isFALSE(onResults(results[[3L]], results[[1L]], results[[2L]]))) break
      }
      raiseInterrupt()
    })
    if (!inherits(unread, "rustcluster_unread")) break
    batchUnread(unread, handle)
  }
  if (waitsOnHosts) {
    showTrouble(store)
    showUnsaved(job_unsaved(handle$pointer), handle)
  }
  results <- job_results(handle$pointer)
  if (handle$receivesReports) showEvents(handle)
  if (!is.null(shown)) shown()
  if (!is.null(onResults) && isTRUE(step) && length(results[[3L]])) {
    onResults(results[[3L]], results[[1L]], results[[2L]])
  }
  list(values = results[[1L]], failed = results[[2L]])
}

# Runs the tasks of a verb that does not assign tasks to nodes: a duplicate node counts once, and the nodes may be of
# several clusters.
#   retries: NULL for the retries of the cluster.
#   returns: whether a worker failure never ends the job.
runFree <- function(cl, n, fun, common, elements, reuse = "nothing", seed = NULL, order = NULL, retries = NULL,
                    timeout = Inf, returns = FALSE, onResults = NULL, progress = wantedProgress(), what = "task",
                    store = NULL) {
  parts <- clustersOf(cl)
  if (length(parts) > 1L) {
    return(runOver(cl, n, fun, common, elements, seed, order, retries, returns, onResults, progress, what, store))
  }
  if (is.null(retries)) retries <- parts[[1L]]$handle$retries
  runJob(
    cl, unique(parts[[1L]]$ranks), n, fun, common, elements, reuse = reuse, seed = seed, order = order,
    retries = retries, timeout = timeout, raises = retries == 0 && !returns, onResults = onResults, progress = progress,
    what = what, store = store
  )
}

# Runs tasks on nodes of several clusters: one message for each task, and a job of its own in each cluster.
runOver <- function(cl, n, fun, common, elements, seed, order, retries, returns, onResults, progress, what, store) {
  cl <- distinctNodes(cl)
  # Nodes that get no task may have tasks of others, whose answers are not of this job.
  cl <- cl[seq_len(max(1L, min(n, length(cl))))]
  frame <- sys.nframe()
  for (part in clustersOf(cl)) {
    handle <- part$handle
    refuseIfBusy(handle, frame)
    if (isNamespaceLoaded("progressr")) receiveReports(handle)
    job <- openJob(handle, frame, 0L, NULL)
    do.call(on.exit, list(as.call(list(closeJob, handle, job)), TRUE), envir = environment())
    maxRetries <- if (is.null(retries)) handle$retries else retries
    checked(hub_policy(handle$pointer, job, maxRetries, maxRetries == 0 && !returns), handle)
  }
  values <- vector("list", n)
  failed <- logical(n)
  if (!is.null(store)) n <- length(order)
  sent <- done <- 0L
  send <- function(index) {
    sent <<- sent + 1L
    i <- if (is.null(order)) sent else order[[sent]]
    args <- c(list(elements[[i]]), common)
    data <- list(fun = fun, args = args, return = TRUE, tag = i)
    if (!is.null(seed)) data[c("fun", "args")] <- list(runSeeded, list(fun, args, seed(i)))
    node <- cl[[index]]
    sendTask(node$handle, node$rank, list(type = "EXEC", data = data, tag = NULL))
  }
  shown <- if (progress != "nobody") showProgress(function() c(done, sent - done), n, what, progress)
  for (index in seq_len(min(n, length(cl)))) send(index)
  while (done < n) {
    got <- receiveOfAny(cl, readWithConditions)
    done <- done + 1L
    if (sent < n) send(got$node)
    answer <- got$value
    i <- answer$tag
    failed[[i]] <- isFALSE(answer$success)
    values[i] <- list(if (failed[[i]]) ofElement(answer$value, what) else answer$value)
    if (!is.null(shown)) shown()
    if (!is.null(store)) {
      checkedStore(store_put(store$pointer, storeId(store, i), values[[i]], failed[[i]]), store$dir)
      while (!checkedStore(store_room(store$pointer), store$dir)) raiseInterrupt()
      if (!is.null(onResults) || done == n) flushStore(store)
    }
    if (!is.null(onResults) && isFALSE(onResults(i, values, which(failed)))) break
    if (!is.null(store) && store$keep != "always") values[i] <- list(NULL)
  }
  list(values = values, failed = which(failed))
}

# Returns the result of a task, whose error calls it an element.
ofElement <- function(value, what) {
  if (!inherits(value, "rustcluster_failure")) return(value)
  condition <- attr(value, "condition")
  condition$message <- sub("^task ", paste0(what, " "), condition$message)
  failureValue(condition)
}

# Makes the result of tasks that have failed without an answer, or raises the worker failure that ends the job.
tasksFailed <- function(failure, handle, timeout, what) {
  condition <- switch(failure[["kind"]],
    timeout = {
      failure$limit <- min(timeout, handle$timeout)
      failureCondition(withTasks(failure, what), handle)
    },
    task_failed = quarantined(failure[["index"]], lapply(failure[["losses"]], lossOfTasks, handle, what), what),
    {
      loss <- lossOfTasks(failure, handle, what)
      showEvents(handle, except = loss)
      stop(loss)
    }
  )
  checked(job_set_result(handle$pointer, failureValue(condition)), handle)
}

# Returns a worker failure as a condition, with the tasks of the batch that was lost.
lossOfTasks <- function(failure, handle, what) {
  loss <- failureCondition(withTasks(failure, what), handle)
  loss$tasks <- failure[["elements"]]
  # It is unknown which task of a batch has killed the worker.
  if (length(loss$tasks) > 1L) loss$index <- NULL
  loss
}

# Returns a failure of tasks of a job with the text that names them.
withTasks <- function(failure, what = failure[["noun"]]) {
  if (!is.null(failure[["elements"]])) failure$tasks <- spanText(failure[["elements"]], what)
  failure
}

# Handles an answer of a batch that cannot be read. It is unknown which task has caused that: each is retried alone.
batchUnread <- function(unread, handle) {
  tasks <- job_tasks(handle$pointer, unread$task)
  value <- if (length(tasks) == 1L) failureValue(notRead(unread, tasks))
  checked(job_unreadable(handle$pointer, unread$task, value), handle)
}

# Runs a task with a seed in a worker, because messages of parallel cannot contain a seed.
runSeeded <- function(fun, args, seed) {
  before <- get0(".Random.seed", globalenv(), inherits = FALSE)
  kind <- if (is.null(before)) RNGkind()
  on.exit(
    if (is.null(before)) {
      # Without a state, R keeps the kind of the generator elsewhere.
      suppressWarnings(RNGkind(kind[[1L]], kind[[2L]], kind[[3L]]))
      rm(list = intersect(".Random.seed", ls(globalenv(), all.names = TRUE)), envir = globalenv())
    } else {
      assign(".Random.seed", before, globalenv())
    }
  )
  assign(".Random.seed", seed, globalenv())
  do.call(fun, args, quote = TRUE)
}

# Returns a text such as "task 3" or "tasks 3 to 9". A task that is a chunk of elements is named by these.
spanText <- function(tasks, what) {
  chunks <- if (identical(what, "task")) chunksOfJob()
  if (!is.null(chunks)) {
    sizes <- chunks$sizes
    elements <- sequence(sizes[tasks], cumsum(sizes)[tasks] - sizes[tasks] + 1L)
    # A chunk may be empty.
    return(if (length(elements)) spanText(elements, chunks$what) else spanText(tasks, "chunk"))
  }
  if (length(tasks) == 1L) return(paste(what, tasks))
  if (identical(tasks, seq(tasks[[1L]], length.out = length(tasks)))) {
    return(paste0(what, "s ", tasks[[1L]], " to ", tasks[[length(tasks)]]))
  }
  text <- toString(utils::head(tasks, 5L))
  paste0(what, "s ", text, if (length(tasks) > 5L) " and others")
}

# Raises the error of a failed task, as parallel does, or returns the results. `chunks`: the chunk of each task in
# parallel, which counts failed chunks.
checkedResults <- function(job, chunks = NULL) {
  val <- job$values
  if (!length(job$failed)) return(val)
  first <- val[[job$failed[[1L]]]]
  if (inherits(first, "rustcluster_failure")) {
    # `chunks` is for a job whose tasks are elements.
    raiseTaskFailure(first, val, byChunk = is.null(chunks) && !is.null(partOfChunks(sys.nframe())))
  }
  failed <- job$failed
  if (!is.null(chunks)) failed <- failed[!duplicated(chunks[failed])]
  val <- val[failed]
  hintAt(val)
  checkForRemoteErrors <- parallels$checkForRemoteErrors
  checkForRemoteErrors(val)
}
