# Code that depends on the internals of parallel, which R may change. Each dependency has a test in
# tests/testthat/test-parallel-internals.R.
#
# parallel's verbs send task by task, through sendCall(), postNode() and the generic sendData(). At the first send the
# frame of the verb contains the whole job. The method of sendData() finds that frame, runs the whole job as the verb of
# this package does, and returns from that frame with the results. Nothing in parallel's namespace is changed. A verb
# whose code is unknown goes on task by task.

# Functions of parallel, by their names, and `gets`, by which clusterExport() assigns a variable on a worker.
# `namespace`: the namespace of parallel. `known`: for each verb, whether its code is known.
parallels <- new.env(parent = emptyenv())

# Called when the package is loaded.
findParallels <- function() {
  names <- c("clusterCall", "clusterSetRNGStream", "staticClusterApply", "dynamicClusterApply", "clusterApplyLB",
             "parLapplyLB", "checkForRemoteErrors", "defaultCluster", "stopNode")
  namespace <- asNamespace("parallel")
  for (name in names) assign(name, get(name, namespace), parallels)
  parallels$gets <- get("gets", environment(parallel::clusterExport))
  parallels$namespace <- namespace
  known <- lapply(names(verbCode), function(name) isWrittenAs(parallels[[name]], verbCode[[name]]))
  parallels$known <- c(stats::setNames(known, names(verbCode)), clusterSetRNGStream = FALSE)
}

# The code of the verbs that are run as a whole: their arguments, and all names in their bodies, in order. It is the
# same from R 4.2 to 4.6. A verb with other code is not run as a whole.
verbCode <- list(
  clusterCall = list(
    arguments = "cl fun ...",
    names = "{ <- cl defaultCluster cl for i seq_along cl sendCall [[ cl i fun list ... checkForRemoteErrors lapply
             cl recvResult"
  ),
  staticClusterApply = list(
    arguments = "cl fun n argfun",
    names = "{ <- cl defaultCluster cl <- p length cl if && > n p { <- val vector n <- start while <= start n {
             <- end min n - + start p <- jobs + - end start for i : jobs sendCall [[ cl i fun argfun - + start i
             <- [ val : start end lapply [ cl : jobs recvResult <- start + start jobs checkForRemoteErrors val"
  ),
  dynamicClusterApply = list(
    arguments = "cl fun n argfun",
    names = "{ <- cl defaultCluster cl <- p length cl if && > n p { <- submit function sendCall [[ cl node fun
             argfun job job for i : min n p submit i i <- val vector n for i : n { <- d recvOneResult cl <- j + i
             min n p if <= j n submit $ d node j <- [ val $ d tag list $ d value checkForRemoteErrors val"
  ),
  parLapplyLB = list(
    arguments = "cl X fun ... chunk.size",
    names = "{ <- cl defaultCluster cl <- nchunks dynamicNChunks length X length cl chunk.size do.call c
             clusterApplyLB cl splitList X nchunks lapply fun ..."
  )
)

isWrittenAs <- function(fun, code) {
  words <- function(text) strsplit(text, "[[:space:]]+")[[1L]]
  identical(names(formals(fun)), words(code$arguments)) && identical(all.names(body(fun)), words(code$names))
}

# Returns the verb that sends, for a method of sendData() whose frame has this number: a list of the number of the
# verb's frame (`depth`), its `name`, and whether it is a verb of parallel (`own`), and not of snow or BiocParallel.
# Returns NULL for other code, which receives answers in its own way. Between a verb and the method are sendCall(),
# postNode() and the generic. sys.function() copies a function, so that it is called as rarely as possible.
sendingVerb <- function(frames) {
  if (frames < 5L) return(NULL)
  # Check the most frequent and cheapest case first.
  if (identical(sys.function(frames - 4L), parallels$clusterCall)) {
    return(list(depth = frames - 4L, name = "clusterCall", own = TRUE))
  }
  verb <- verbAt(frames - 4L, c("staticClusterApply", "clusterSetRNGStream", "clusterCall"))
  # dynamicClusterApply() sends from a function of its own.
  if (is.null(verb) && frames > 5L) verb <- verbAt(frames - 5L, "dynamicClusterApply")
  if (!is.null(verb)) return(verb)
  loop <- biocParallelLoop(frames)
  if (!is.null(loop)) list(depth = loop, name = ".bploop_impl", own = FALSE)
}

verbAt <- function(depth, names) {
  fun <- sys.function(depth)
  home <- environment(fun)
  own <- identical(home, parallels$namespace)
  if (!own && !(isNamespaceLoaded("snow") && identical(home, asNamespace("snow")))) return(NULL)
  is_theirs <- if (own) isParallels else isSnows
  for (name in names) if (is_theirs(fun, name)) return(list(depth = depth, name = name, own = own))
  NULL
}

# Returns whether this is parallel's function of this name, also as the default method of an S4 generic.
isParallels <- function(fun, name) {
  theirs <- parallels[[name]]
  if (identical(fun, theirs)) return(TRUE)
  is.function(fun) && identical(environment(fun), parallels$namespace) &&
    identical(formals(fun), formals(theirs)) && identical(body(fun), body(theirs))
}

isSnows <- function(fun, name) isNamespaceLoaded("snow") && identical(fun, asNamespace("snow")[[name]])

# Returns the results that a calling checkForRemoteErrors() checks, or NULL without such a caller.
resultsChecked <- function() {
  for (depth in rev(seq_len(sys.nframe()))) {
    fun <- sys.function(depth)
    if (isParallels(fun, "checkForRemoteErrors") || isSnows(fun, "checkForRemoteErrors")) return(sys.frame(depth)$val)
  }
  NULL
}

# Returns what the tasks of the job consist of that is being run, if a task is a chunk: `what` a part is called, and the
# `sizes` of all chunks. Returns NULL for other jobs. parSapply() and parApply() call parLapply().
chunksOfJob <- function() {
  depth <- sys.nframe()
  while (depth > 0L && !identical(sys.function(depth), runJob)) depth <- depth - 1L
  job <- if (depth) sys.frame(depth)
  if (is.null(job) || !is.list(job$elements)) return(NULL)
  # The tasks of another verb in an argument or in a handler are no chunks: these call lapply() or apply().
  if (!identical(job$fun, lapply) && !identical(job$fun, apply)) return(NULL)
  chunks <- job$elements
  part <- partOfChunks(depth - 1L)
  if (is.null(part)) return(NULL)
  size <- switch(part, row = nrow, column = ncol, length)
  list(what = part, sizes = vapply(chunks, size, 0L, USE.NAMES = FALSE))
}

# Returns what a part of a chunk is called, if one of the frames up to this number is of a verb whose tasks are chunks.
partOfChunks <- function(depth) {
  part <- c(parLapply = "element", parLapplyLB = "element", parRapply = "row", parCapply = "column")
  for (above in rev(seq_len(depth))) {
    fun <- sys.function(above)
    for (verb in names(part)) {
      # Also our copy of the function.
      theirs <- get(verb, parallels$namespace)
      if (!identical(formals(fun), formals(theirs)) || !identical(body(fun), body(theirs))) next
      return(part[[verb]])
    }
  }
}

# Returns whether this is the function by which clusterExport() of parallel or snow assigns a variable on a worker.
isGets <- function(fun) {
  identical(fun, parallels$gets) ||
    (isNamespaceLoaded("snow") && identical(fun, get("gets", environment(asNamespace("snow")$clusterExport))))
}

# Runs the whole job of a verb that is about to send its first task, and returns from the verb with the results, or
# raises the errors of the verb. If the verb has to go on by itself, this function does nothing and returns. `message`:
# the message of the first task. The verb has made it, so that all arguments have been evaluated as in parallel.
runWhole <- function(verb, message) {
  frame <- sys.frame(verb$depth)
  if (!isWhole(verb, frame)) return()
  cl <- frame$cl
  if (verb$name == "clusterCall") {
    values <- callAll(cl, message)
    if (!is.null(values)) returnFrom(frame, values)
    return()
  }
  ranks <- nativeRanks(cl)
  if (is.null(ranks)) return()
  round <- verb$name == "staticClusterApply"
  task <- message$data
  chunking <- if (!round) chunkingFrame(verb$depth, task$args)
  if (!is.null(chunking)) {
    # The arguments are a chunk, the function, and further arguments of the function.
    returnFrom(chunking, applyFree(cl, ranks, chunking$X, task$args[[2L]], task$args[-(1:2)]))
  }
  tasks <- tasksOf(frame$argfun, frame$n, task$args)
  if (!is.null(tasks)) returnFrom(frame, runTasks(cl, ranks, task$fun, frame$n, tasks, round))
}

# Returns whether the job of the verb in this frame can be run as a whole: its code is known, no task has been sent, and
# snow's timing hooks, which parallel calls for each message, are off.
isWhole <- function(verb, frame) {
  verb$own && parallels$known[[verb$name]] && frame$i == 1L &&
    switch(verb$name,
      clusterCall = TRUE,
      staticClusterApply = frame$start == 1L && isCount(frame$n),
      dynamicClusterApply = is.null(frame$val) && isCount(frame$n)
    ) &&
    !isTRUE(parallels$namespace$.snowTimingData$running())
}

isCount <- function(n) is.numeric(n) && length(n) == 1L && isTRUE(n <= .Machine$integer.max & n == trunc(n))

# Returns the frame of the parLapplyLB() that calls the dynamicClusterApply() in frame `depth` through do.call() and
# clusterApplyLB(), if the job may choose batches of elements. Returns NULL otherwise. `args`: the arguments of the
# first task.
chunkingFrame <- function(depth, args) {
  if (depth < 4L || length(args) < 2L || !parallels$known$parLapplyLB) return(NULL)
  if (!isParallels(sys.function(depth - 1L), "clusterApplyLB")) return(NULL)
  if (!isParallels(sys.function(depth - 3L), "parLapplyLB")) return(NULL)
  frame <- sys.frame(depth - 3L)
  if (is.null(frame$chunk.size) && isFree(frame$X, args[[2L]])) frame
}

# Returns from the function of this frame with a value. Exit handlers of all frames above it are run.
returnFrom <- function(frame, value) do.call("return", list(value), envir = frame)

# Returns the parts of the tasks of a staticClusterApply() or dynamicClusterApply(), for runJob(): their `elements`, the
# arguments that are the same for all (`common`), and whether an element is a list of arguments (`spread`). `argfun`
# returns all arguments of a task by its index. `first` are the arguments of the first task, which are not computed
# again. Returns NULL if `argfun` is unknown, or if elements are extracted by a method that may have state and must be
# called in the order of the tasks.
tasksOf <- function(argfun, n, first) {
  if (typeof(first) != "list" || !is.function(argfun)) return(NULL)
  made <- environment(argfun)
  if (isMadeAs(argfun, quote(c(list(x[[i]]), list(...))), c("x", "..."))) {
    x <- made$x
    if (hasElementsOfItsOwn(x, made)) return(NULL)
    is_vector <- !is.object(x) && isPlain(x) && length(x) == n
    elements <- if (is_vector) x else function(i) if (i == 1) first[[1L]] else x[[i]]
    list(elements = elements, common = first[-1L], spread = FALSE)
  } else if (isMadeAs(argfun, quote(c(lapply(args, function(x) x[[i]]), MoreArgs)), c("args", "MoreArgs"))) {
    args <- made$args
    for (x in args) if (hasElementsOfItsOwn(x, made)) return(NULL)
    own <- seq_along(args)
    elements <- function(i) if (i == 1) first[own] else lapply(args, function(x) x[[i]])
    list(elements = elements, common = first[-own], spread = TRUE)
  }
}

# Returns whether `argfun` is a function of an index with this body, made in an environment with these variables.
isMadeAs <- function(argfun, body, variables) {
  identical(body(argfun), body) && identical(names(formals(argfun)), "i") &&
    all(variables %in% names(environment(argfun)))
}

# Returns whether an object has a `[[` method of another package.
hasElementsOfItsOwn <- function(x, envir) {
  if (!is.object(x)) return(FALSE)
  own <- function(class) {
    method <- utils::getS3method("[[", class, optional = TRUE, envir = envir)
    !is.null(method) && !identical(environment(method), baseenv()) && !identical(environment(method), .BaseNamespaceEnv)
  }
  isS4(x) || any(vapply(class(x), own, NA))
}

# Assigns the verbs when the package is loaded. They are copies of the functions of the running R, which divide
# arguments and combine results, but call functions of this package to run tasks.
findVerbs <- function(namespace = topenv()) {
  theirs <- environment(parallel::clusterApply)
  below <- new.env(parent = theirs)
  below$clusterCall <- callNodes
  below$staticClusterApply <- handsOut("staticClusterApply", round = TRUE)
  below$dynamicClusterApply <- handsOut("dynamicClusterApply", round = FALSE)
  below$gets <- parallels$gets
  below$get <- getExported
  below$defaultCluster <- usableCluster
  below$splitIndices <- cutIndices
  below$splitList <- rebound("splitList", below)
  names <- c("clusterApply", "clusterApplyLB", "clusterEvalQ", "clusterExport", "clusterMap", "parLapply",
             "parLapplyLB", "parSapply", "parSapplyLB", "parApply", "parRapply", "parCapply")
  for (name in names) {
    verb <- rebound(name, below)
    assign(name, verb, below)
    assign(name, verb, namespace)
  }
  assign("clusterCall", callNodes, namespace)
  # parallel's parLapplyLB() divides elements into chunks before it knows how long they take.
  parallels$chunked <- below$parLapplyLB
  free <- freeElements
  formals(free) <- formals(parallels$chunked)
  below$parLapplyLB <- free
  assign("parLapplyLB", free, namespace)
}

# Returns a copy of parallel's function of this name, which finds functions in `below` before those of parallel.
rebound <- function(name, below) {
  theirs <- get(name, parent.env(below))
  environment(theirs) <- below
  theirs
}
