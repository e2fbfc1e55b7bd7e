# startRun(): saves a run in its directory and starts its runner, a detached process. The process itself: runner.R. What
# others see of the run: run.R.
#
# The files of a run, beside those of the store:
#   task.rds             X, FUN and its arguments, exports, and the arguments of clusterLapply()
#   log                  the output of all runners
#   runner/settings.rds  how to start a runner: spec, packages, libraries, working directory
#   runner/lock          locked by the runner while it lives
#   runner/state.rds     what the runner last said of itself
#   runner/cancel-ID     asks the runner with this id in its state to end
#   runner/error.rds     the error with which the last runner ended
#   runner/timeline.rds  when the workers of all runners were busy

#' Start a run in the background that outlives this session
#'
#' A run applies a function to each element of a list, as [clusterLapply()] with `.store`, in a process of its own. The
#' process, the runner, makes its own cluster. It goes on when this session ends in whatever way, when a terminal is
#' closed, or when RStudio Server suspends the session. Results are in the directory as soon as they are computed. If
#' the runner or its machine dies, `resume()` computes what is missing.
#'
#' A script with `startRun()` can simply be run again. The call returns at once if a runner computes the run or all of
#' its elements have a value, and continues it otherwise: it computes what is missing and, unless `.retry_errors` is
#' `FALSE`, what has failed, also if the run is done. A call with another `X` or `FUN` is an error, unless no element
#' has a value yet: the run is then begun anew.
#'
#' @param dir (character) The directory of the run. It is created if it is missing, readable by the user alone, and so
#'   are directories above it, with the usual permissions.
#' @param X,FUN,... As in [clusterLapply()].
#' @param spec The workers, as in [makeRustCluster()]: a number, hosts, or launchers such as [slurm()]. Default: the
#'   usable cores of the machine of the runner.
#' @param packages (character) Packages to attach in all workers.
#' @param export (character) Names of variables to export to the workers, as by [parallel::clusterExport()]. They are
#'   looked up where `startRun()` is called, and saved with the run.
#' @param cluster (list) Further arguments of [makeRustCluster()], by name, such as `list(threads = 4)`. With
#'   `list(linger = 3600)`, the workers wait for the next runner if a runner dies: `resume()` reattaches them. If `spec`
#'   or `cluster` have changed, it ends them instead and makes a cluster as given.
#' @param .seed,.timeout,.retries,.order,.sync,.save,.save_dir As in [clusterLapply()]. `.seed = TRUE` draws the seed
#'   now: a resumed run has the same random numbers.
#' @param .reuse As in [clusterLapply()]: with `"same"`, `X` of a run that continues may have other elements.
#' @param .retry_errors (logical) Whether elements that have failed are computed again whenever the run continues: by
#'   `resume()`, or by this call, made again. At the command line, [runs()] continues a run that is done only with
#'   `resume --failed`. With `FALSE`, failed elements keep their errors.
#' @param .wait (number) Seconds to wait for the runner to begin to compute, at most. If the runner fails in this time,
#'   its error is raised here. Later errors are in the status of the run.
#' @return The run, as [openRun()] returns it.
#'
#' @section The runner:
#' The runner starts in the working directory of this session and with its library paths and its options `mc.cores` and
#' `rustcluster.*`; so do later runners. It has no terminal and ignores SIGHUP. Its output is in the file `log` of the
#' directory. Environment variables are not saved with the run, because they may be secrets: each runner has those of
#' the session, shell or cron job that starts it. For workers, `cluster = list(rscript_envs = )` sets variables, which
#' are saved in a file that the user alone can read. Workers find in their global environment what `export` names, and
#' nothing else of this session.
#'
#' A machine may end the processes of a user when the user logs out (systemd, with `KillUserProcesses=yes`): `loginctl
#' enable-linger` keeps them. A restart of the machine ends them in any case. A line in the crontab continues the run
#' then: see [runs()].
#'
#' @section Errors:
#' `rustcluster_run_differs`: the directory holds the run of another call; field `differs`. A run without any
#' value is replaced, unless it is being computed. `rustcluster_run_locked`: a run that is being computed cannot
#' get other elements (`.reuse = "same"`), or a call of [clusterLapply()] computes it. `rustcluster_run_failed`: the
#' runner could not be started, or has failed while `startRun()` waited; field `parent` is its error, if it is known.
#' `rustcluster_bad_argument`. A warning of class `rustcluster_not_exported` names variables of the global environment
#' that `FUN`, or a function in `export` or `...`, uses and that are not in `export` (field `names`). A warning of class
#' `rustcluster_run_temporary` says that `dir` is below [tempdir()] and will be removed when this session ends.
#' @seealso [openRun()], [listRuns()], [runs()]
#' @examples
#' # Not in tempdir(), which is removed when the session ends.
#' dir <- tempfile("sweep", dirname(tempdir()))
#' scale <- 10
#' run <- startRun(dir, 1:20, function(i) scale * sqrt(i), spec = 2, export = "scale")
#' run$wait()
#' run
#' head(unlist(as.list(run$results())))
#' unlink(dir, recursive = TRUE)
#' @export
startRun <- function(dir, X, FUN, ..., spec = NULL, packages = NULL, export = NULL, cluster = list(),
                     .seed = FALSE, .timeout = Inf, .retries = NULL, .order = NULL, .reuse = c("all", "same"),
                     .retry_errors = TRUE, .sync = 0.1, .save = c("head", "hosts"), .save_dir = NULL, .wait = 10) {
  if (!missing(X)) refuseCluster(X, "X")
  FUN <- theFunction(FUN)
  if (missing(X)) badArgument("X", "is missing")
  refuseUnknown(startRun, "startRun", ...names(), args(FUN))
  refuseForeign(list(...), args(FUN))
  if (!is.vector(X) || is.object(X) || !isPlain(X)) X <- as.list(X)
  plainly <- c(".seed", ".timeout", ".retries", ".order", ".reuse", ".retry_errors", ".sync", ".save", ".wait")
  for (name in plainly) assign(name, plain(get(name)))
  checkStoring(dir, FALSE, .retry_errors, .sync)
  .reuse <- tryCatch(match.arg(.reuse), error = function(e) badArgument(".reuse", "must be \"all\" or \"same\""))
  .save <- tryCatch(match.arg(.save), error = function(e) badArgument(".save", "must be \"head\" or \"hosts\""))
  between(.timeout, ".timeout", "a number of seconds", 0.001, 1e9, infinite = TRUE)
  between(.wait, ".wait", "a number of seconds", 0, 1e6)
  checkSaving(.save, .save_dir, dir)
  .retries <- checkRetries(.retries)
  .order <- checkOrder(.order, length(X))
  .seed <- checkSeed(.seed)
  settings <- runnerSettings(spec, packages, cluster)
  export <- variablesToExport(export, parent.frame())
  code <- codeHashes(FUN, export)
  dir <- runDirectory(dir)
  run <- newRun(dir)
  join <- function() {
    attachToTask(dir, X, code, list(...), .seed, .reuse)
    awaitRunner(run, .wait)
    run
  }
  replaces <- FALSE
  if (isRun(dir)) {
    status <- runStatus(dir, new.env())
    computing <- !status$state %in% finalStates
    computed <- isTRUE(status$done + status$failed > 0)
    if (computing && !computed && isLocked(dir)) {
      # The runner may not have made the store yet.
      return(join())
    }
    if (computing && !isLocked(dir)) {
      writer <- storeLocked(dir)
      if (!is.null(writer)) {
        abort(
          "run_locked", sQuote(dir), " is being computed by a call of clusterLapply()",
          if (!is.null(writer$pid)) whereText(runnerState(dir)),
          "; wait for its end, or interrupt it, and call startRun() again",
          fields = list(pid = writer$pid, host = writer$host, dir = dir)
        )
      }
      # The runner has ended meanwhile.
      status <- runStatus(dir, new.env())
      computing <- !status$state %in% finalStates
    }
    valuable <- computing || isTRUE(status$done > 0) || mayBeOnHosts(dir)
    grows <- if (hasStore(dir) && (computed || valuable)) {
      tryCatch(compareWithRun(dir, X, code, list(...), .seed, .reuse), rustcluster_run_differs = function(e) {
        if (valuable) stop(e)
      })
    } else if (computing) runLocked(dir)
    # Nothing is lost: begin anew.
    replaces <- is.null(grows)
    if (!replaces) {
      if (computing && grows) runLocked(dir)
      if (computing || (status$state == "done" && !grows && !(status$failed && .retry_errors))) return(run)
      .seed <- readRunInfo(dir)$seed
    }
  }
  makeRunDirectory(dir)
  seed <- drawnSeed(.seed)
  task <- list(
    format = 1L, X = X, fun = FUN, arguments = list(...), export = export, code = code,
    options = list(
      .seed = if (is.null(seed)) FALSE else seed, .timeout = .timeout, .retries = .retries, .order = .order,
      .reuse = .reuse, .retry_errors = .retry_errors, .sync = .sync, .save = .save, .save_dir = .save_dir
    )
  )
  warnNotExported(FUN, export, list(...))
  warnTemporary(dir)
  awaitUnlocked(dir)
  if (!startRunner(dir, settings, length(X), task, replaces)) {
    # Another session was faster.
    return(join())
  }
  noteRun(dir)
  awaitRunner(run, .wait)
  run
}

# Refuses a call that differs from that of the run. Returns whether its elements differ, as `.reuse = "same"` allows.
# `code`: what codeHashes() returns for the call.
compareWithRun <- function(dir, X, code, arguments, seed, reuse) {
  info <- readRunInfo(dir)
  # Another session is beginning it anew.
  if (is.null(info)) runLocked(dir)
  elements <- readElements(list(dir = dir, info = info))
  ids <- if (is.null(info$ids)) seq_len(info$n) else info$ids
  task <- file.path(dir, "task.rds")
  # The variables of the runner are not those of this session: compare with the session that has started the run.
  if (file.exists(task)) info$functions <- readRDS(task)$code
  compareWith(dir, info, pickHashes(storedHashes(elements), ids), X, code, arguments, seed, reuse)
}

# Refuses a call that differs from that of the runner that lives, which may not have made the store yet.
attachToTask <- function(dir, X, code, arguments, seed, reuse) {
  task <- tryCatch(readRDS(file.path(dir, "task.rds")), error = function(e) NULL, warning = function(w) NULL)
  if (is.null(task)) runLocked(dir)
  info <- list(
    functions = task$code, arguments = argumentHashes(task$arguments),
    seed = if (!isFALSE(task$options$.seed)) task$options$.seed
  )
  if (compareWith(dir, info, elementHashes(task$X), X, code, arguments, seed, reuse)) runLocked(dir)
}

# As compareWithRun(). `info`: hashes of the run, and its seed. `before`: the hashes of its elements.
compareWith <- function(dir, info, before, X, code, arguments, seed, reuse) {
  hashes <- elementHashes(X)
  same <- identical(before, hashes)
  now <- list(functions = code, arguments = argumentHashes(arguments), seed = seed)
  refuseOther(dir, info, now, if (!same && reuse == "all") changedElements(before, hashes))
  !same
}

hasStore <- function(dir) file.exists(file.path(dir, "run.rds"))

# Returns whether hosts may have results of a run that the store does not have yet: the probe stays until they have been
# fetched.
mayBeOnHosts <- function(dir) file.exists(file.path(dir, "probe"))

# Refuses an argument that `FUN` does not take: it is a typing error, or the cluster that clusterLapply() needs. `fun`:
# a function with the arguments of `FUN`, or NULL if these are unknown.
refuseForeign <- function(given, fun) {
  known <- names(formals(fun))
  open <- is.null(fun) || "..." %in% known
  for (i in seq_along(given)) {
    name <- names2(given)[[i]]
    # R takes the beginning of a name for the name.
    if (nzchar(name) && any(startsWith(known, name))) next
    refuseCluster(given[[i]], if (nzchar(name)) name else "...")
    if (open || !nzchar(name)) next
    hint <- didYouMean(name, setdiff(names(formals(startRun)), "..."))
    if (name == "cl") hint <- "; startRun() makes its own cluster: use `spec`"
    badArgument(name, "is neither an argument of startRun() nor of `FUN`", hint)
  }
}

refuseCluster <- function(value, argument) {
  if (!inherits(value, "cluster")) return(invisible())
  badArgument(
    argument, if (argument == "...") "contains" else "is", " a cluster; startRun() makes its own cluster: use `spec`"
  )
}

# Warns of a directory that is removed at the end of this session.
warnTemporary <- function(dir) {
  inside <- startsWith(paste0(dir, "/"), paste0(normalizePath(tempdir()), "/"))
  if (inside) warning(rustclusterCondition(
    "run_temporary", paste0(
      sQuote(dir), " is below tempdir(): this session removes it when it ends, and that ends the run; use a directory ",
      "that stays"
    ),
    type = "warning", dir = dir
  ))
}

# Returns those of these names that a function finds in the global environment.
inGlobal <- function(FUN, names) {
  envir <- environment(FUN)
  while (!is.null(envir) && !identical(envir, globalenv())) {
    if (identical(envir, emptyenv()) || isNamespace(envir)) return(character())
    names <- names[!vapply(names, exists, NA, envir = envir, inherits = FALSE)]
    envir <- parent.env(envir)
  }
  if (is.null(envir)) character() else names[vapply(names, exists, NA, envir = envir, inherits = FALSE)]
}

# Warns of variables of the global environment that `FUN`, or a function that is sent with it, uses and that do not
# exist in the workers. `exported`: the exported variables, by name. `arguments`: those of `FUN`.
warnNotExported <- function(FUN, exported, arguments) {
  others <- c(exported, arguments)
  labels <- ifelse(nzchar(names2(others)), paste0("`", names2(others), "`"), "a function in `...`")
  missing <- lapply(c(list(FUN), others), globalsNeeded, names(exported))
  used <- lengths(missing) > 0L
  if (!any(used)) return(invisible())
  listed <- function(names) paste0("`", sort(names), "`", collapse = ", ")
  names <- sort(unique(unlist(missing)))
  warning(rustclusterCondition(
    "not_exported", paste0(
      paste(c("`FUN`", labels)[used], "uses", vapply(missing[used], listed, ""), collapse = ", and "),
      " of the global environment, which the workers do not have; name ", ngettext(length(names), "it", "them"),
      " in `export`"
    ),
    type = "warning", names = names
  ))
}

# Returns the names of the variables of the global environment, but for those that are exported, that a function uses,
# or a function that it finds in its own environment, which is sent with it.
globalsNeeded <- function(FUN, exported) {
  if (typeof(FUN) != "closure") return(character())
  todo <- list(FUN)
  seen <- list()
  found <- character()
  while (length(todo)) {
    fun <- todo[[1L]]
    todo <- todo[-1L]
    if (any(vapply(seen, identical, NA, fun))) next
    seen <- c(seen, list(fun))
    used <- freeNames(call("function", formals(fun), body(fun)))
    globals <- inGlobal(fun, setdiff(c(used$variables, used$functions), exported))
    # A function is looked up among functions.
    calls <- setdiff(globals, used$variables)
    others <- calls[!vapply(calls, exists, NA, envir = globalenv(), mode = "function", inherits = FALSE)]
    found <- union(found, setdiff(globals, others))
    todo <- c(todo, Filter(function(value) typeof(value) == "closure", localVariables(fun, unlist(used))))
  }
  found
}

# Returns the values of those of these variables that a function finds below the global environment.
localVariables <- function(fun, names) {
  envir <- environment(fun)
  found <- list()
  while (!is.null(envir) && !identical(envir, globalenv())) {
    if (identical(envir, emptyenv()) || isNamespace(envir)) return(list())
    found <- c(found, variablesIn(envir, intersect(ls(envir, all.names = TRUE), setdiff(names, names(found)))))
    envir <- parent.env(envir)
  }
  found
}

# Returns the hashes of the parts of a function and of the exported variables. Other global variables do not exist in
# the workers.
codeHashes <- function(FUN, export) {
  hashes <- functionHashes(FUN)
  globals <- sprintf("`%s`, which `FUN` uses", inGlobal(FUN, ls(globalenv(), all.names = TRUE)))
  c(
    hashes[!names(hashes) %in% globals],
    stats::setNames(vapply(export, hashOf, "", USE.NAMES = FALSE), sprintf("the exported `%s`", names(export)))
  )
}

# Returns the absolute path of the directory of a run.
runDirectory <- function(dir) {
  path <- path.expand(checkPath(plain(dir), "dir"))
  if (file.exists(path)) return(normalizePath(path))
  # The directory of a new run does not exist yet, nor need the one that contains it.
  path <- sub("(.)/+$", "\\1", path)
  above <- dirname(path)
  below <- basename(path)
  while (!file.exists(above)) {
    below <- file.path(basename(above), below)
    above <- dirname(above)
  }
  if (!dir.exists(above)) badArgument("dir", "cannot be created, because ", sQuote(above), " is a file")
  file.path(normalizePath(above), below)
}

# Returns the variables by name.
variablesToExport <- function(export, envir) {
  export <- plain(export)
  if (!length(export)) return(list())
  if (!is.character(export) || !all(isText(export)) || !all(nzchar(export))) {
    badArgument("export", "must be a character vector of names of variables")
  }
  missing <- export[!vapply(export, exists, NA, envir = envir)]
  if (length(missing)) badArgument("export", "names a variable that does not exist: ", sQuote(missing[[1L]]))
  mget(export, envir, inherits = TRUE)
}

# Returns how to start the runner from any session. `spec`: NULL for the usable cores of the machine of the runner.
runnerSettings <- function(spec, packages, cluster) {
  if (inherits(spec, "cluster")) {
    badArgument("spec", "is a cluster, and must say which workers to start, such as 4 or c(node1 = 64): ",
                "the runner makes its own cluster")
  }
  if (!is.null(spec)) specEntries(spec)
  if (!is.list(cluster) || is.object(cluster) || (length(cluster) && !all(nzchar(names2(cluster))))) {
    badArgument("cluster", "must be a list of arguments of makeRustCluster(), by name")
  }
  given <- intersect(names(cluster), c("spec", "packages"))
  if (length(given)) badArgument("cluster", "contains `", given[[1L]], "`, which is an argument of its own")
  # Argument `names` of makePSOCKcluster() is another name for `spec`. The runner prints no hosts.
  known <- setdiff(c(names(formals(makeRustCluster)), meaningful), "...")
  unknown <- setdiff(names(cluster), c(known, meaningless, names(renamedArguments)))
  if (length(unknown)) {
    hint <- didYouMean(unknown[[1L]], known)
    badArgument("cluster", "contains `", unknown[[1L]], "`, which is no argument of makeRustCluster()", hint)
  }
  packages <- plain(packages)
  if (!is.null(packages) && !(is.character(packages) && all(isText(packages)) && all(nzchar(packages)))) {
    badArgument("packages", "must be a character vector of package names")
  }
  own <- grep("^(rustcluster[.]|mc[.]cores$)", names(options()), value = TRUE)
  list(
    spec = spec, packages = packages, cluster = cluster, directory = getwd(), libraries = .libPaths(),
    options = options()[own]
  )
}

names2 <- function(x) if (is.null(names(x))) rep("", length(x)) else names(x)

# Removes what is left of a run without any value. Only the runner that takes its place calls this: it
# has the lock. The locks stay.
removeOldRun <- function(dir) {
  if (hasStore(dir)) {
    # The lock of the store keeps calls of clusterLapply() away.
    store <- openStore(dir, write = TRUE)
    on.exit(closeStore(store))
    # Another runner has computed something in the meantime: clusterLapply() says what differs.
    if (storeCounts(store)[["done"]] > 0) return(invisible())
  }
  # In this order: no description of a run is without its elements.
  for (name in c("results", "run.rds", "elements.rds", "damaged", "probe", "session")) {
    unlink(file.path(dir, name), recursive = TRUE)
  }
  unlink(runnerFile(dir, "timeline.rds"))
  # The output of this process is appended to the same file.
  file.create(file.path(dir, "log"), showWarnings = FALSE)
  invisible()
}

# Removes what earlier runners and sessions that were killed have left. Only the runner calls this.
removeStale <- function(dir) {
  files <- list.files(runnerFile(dir, ""))
  cancels <- setdiff(grep("^cancel", files, value = TRUE), basename(cancelFile(dir, runner$state)))
  new <- grep("[.][0-9]+[.]new$", files, value = TRUE)
  # Another session may be about to start a runner.
  old <- difftime(Sys.time(), file.mtime(runnerFile(dir, new)), units = "secs") > 3600
  unlink(runnerFile(dir, c(cancels, new[old %in% TRUE], "error.rds")))
  unlink(runnerFile(dir, grep("^asked", files, value = TRUE)), recursive = TRUE)
  # clusterLapply() refuses a directory with other files than its own.
  unlink(list.files(dir, "^task[.]rds[.].*new$", full.names = TRUE))
}

# Returns the file that asks the runner with this state to end. Each runner has another one: what is asked of one does
# not end the next, and is not lost when the next one starts.
cancelFile <- function(dir, state) runnerFile(dir, paste(c("cancel", state$id), collapse = "-"))

# Creates the directory of a run, if it does not exist.
makeRunDirectory <- function(dir) {
  if (file.exists(dir) && !dir.exists(dir)) badArgument("dir", "is a file, and must be a directory")
  others <- setdiff(list.files(dir, all.files = TRUE, no.. = TRUE), ownFiles)
  # A session that saved them may be at work, or was killed.
  others <- grep("^(task|run|elements)[.]rds([.][0-9]+)?[.]new$", others, value = TRUE, invert = TRUE)
  if (!isRun(dir) && length(others)) {
    badArgument("dir", "is a directory with other files than those of a run; use a new or an empty one: ", sQuote(dir))
  }
  # The files may contain secrets, such as `rscript_envs` of `cluster`.
  dir.create(dirname(dir), showWarnings = FALSE, recursive = TRUE)
  dir.create(dir, showWarnings = FALSE, mode = "0700")
  dir.create(file.path(dir, "runner"), showWarnings = FALSE, mode = "0700")
  if (!dir.exists(file.path(dir, "runner")) || file.access(file.path(dir, "runner"), 2L) != 0L) {
    badArgument("dir", "cannot be written: ", sQuote(dir))
  }
}

# Returns whether a directory holds a run.
isRun <- function(dir) any(file.exists(file.path(dir, c("run.rds", "task.rds"))))

runnerFile <- function(dir, name) file.path(dir, "runner", name)

# Returns whether a runner lives, on any machine that sees the directory.
isLocked <- function(dir) {
  locked <- detached_is_locked(runnerFile(dir, "lock"))
  if (is.character(locked)) {
    abort("run_failed", "the lock of the runner of ", sQuote(dir), " cannot be read: ", locked,
          fields = list(dir = dir))
  }
  locked
}

runLocked <- function(dir) {
  state <- runnerState(dir)
  abort(
    "run_locked", sQuote(dir), " is being computed", whereText(state), "; see openRun(dir)",
    fields = list(pid = state$pid, host = state$host, dir = dir)
  )
}

# Returns where a runner runs, as part of a message.
whereText <- function(state) {
  if (is.null(state$pid) || is.na(state$pid)) return("")
  paste0(" by process ", state$pid, " on ", state$host)
}

# Saves a value durably in a new file of a runner, which the user alone can read. Returns its path. `to`: the file that
# it is to replace.
saveNew <- function(value, dir, to) {
  new <- runnerFile(dir, paste0(basename(to), ".", Sys.getpid(), ".new"))
  mask <- Sys.umask("077")
  on.exit(Sys.umask(mask))
  problem <- tryCatch(
    {
      # The data is read about as often as it is written.
      saveRDS(value, new, compress = FALSE)
      file_sync(new)
    },
    error = conditionMessage, warning = conditionMessage
  )
  if (is.null(problem)) return(new)
  unlink(new)
  abort("run_write_failed", "cannot write ", sQuote(to), ": ", problem, fields = list(dir = dir))
}

# Returns whether a runner with these settings makes the same cluster as the last one, but for its packages.
startsAlike <- function(dir, settings) {
  parts <- c("spec", "cluster")
  tryCatch(
    identical(hashOf(readRDS(runnerFile(dir, "settings.rds"))[parts]), hashOf(settings[parts])),
    error = function(e) FALSE, warning = function(w) FALSE
  )
}

# Starts a runner. Returns FALSE if there is one already. `n`: the number of elements. `task`: that of a new run.
# `replaces`: whether it takes the place of a run without any value.
startRunner <- function(dir, settings, n, task = NULL, replaces = FALSE) {
  directory <- settings$directory
  if (!dir.exists(directory)) directory <- dir
  before <- readState(dir)
  replaces <- replaces || isTRUE(before$replaces)
  waiting <- before$cluster
  renews <- !is.null(waiting) && (replaces || isTRUE(before$renews) || !startsAlike(dir, settings))
  if (replaces) before <- NULL
  state <- list(
    id = randomText(8L), replaces = replaces, state = "starting", pid = NA_integer_, host = thisHost(),
    started = Sys.time(), updated = Sys.time(), ended = NULL,
    n = n, before = 0, workers = NA_integer_, busy = NA_integer_, message = NULL,
    attempt = if (is.null(before)) 1L else before$attempt + 1L, cluster = waiting, renews = renews
  )
  # The state comes last: whoever sees that a runner starts sees its task.
  values <- list(settings, task, state)
  to <- c(runnerFile(dir, "settings.rds"), file.path(dir, "task.rds"), runnerFile(dir, "state.rds"))
  to <- to[lengths(values) > 0L]
  values <- values[lengths(values) > 0L]
  new <- character()
  on.exit(unlink(new))
  # The process renames these when it has the lock: of two sessions that start a runner, only one changes anything.
  for (i in seq_along(to)) new <- c(new, saveNew(values[[i]], dir, to[[i]]))
  env <- c(
    RUSTCLUSTER_LIB = dirname(getNamespaceInfo("rustcluster", "path")),
    R_LIBS = paste(settings$libraries, collapse = ":"),
    # Code may take the runner for a session of RStudio, or for the session of a package's tests.
    RSTUDIO = NA, R_TESTS = NA, R_SESSION_TMPDIR = NA
  )
  pid <- detached_start(
    c(file.path(R.home("bin"), "Rscript"), "-e", startExpression("runnerMain"), dir), env, directory,
    runnerFile(dir, "lock"), file.path(dir, "log"), new, to
  )
  if (is.character(pid)) {
    abort("run_failed", "the runner of ", sQuote(dir), " could not be started: ", pid, fields = list(dir = dir))
  }
  if (is.null(pid)) return(FALSE)
  for (directory in c(dir, runnerFile(dir, ""))) file_sync(directory)
  TRUE
}

thisHost <- function() Sys.info()[["nodename"]]

# Waits until the runner has begun to compute, at most `seconds`. If it fails in this time, raises its error.
awaitRunner <- function(run, seconds) {
  deadline <- proc.time()[["elapsed"]] + seconds
  repeat {
    status <- runnerState(run$dir)
    if (status$state != "starting" || proc.time()[["elapsed"]] >= deadline) break
    Sys.sleep(0.02)
  }
  if (status$state == "failed") {
    error <- tryCatch(readRDS(runnerFile(run$dir, "error.rds")), error = function(e) NULL, warning = function(w) NULL)
    abort(
      "run_failed", "the runner of ", sQuote(run$dir), " failed: ", status$message,
      fields = list(dir = run$dir, parent = error)
    )
  }
  if (status$state == "interrupted") {
    abort(
      "run_failed", "the runner of ", sQuote(run$dir), " ended before it began to compute",
      tailText("end of its log", paste(runLog(run$dir, 20L), collapse = "\n")), fields = list(dir = run$dir)
    )
  }
}

# Returns what a runner last said of itself, or NULL if there never was one.
readState <- function(dir) {
  file <- runnerFile(dir, "state.rds")
  if (!file.exists(file)) return(NULL)
  # On NFS, a file may be replaced while it is read.
  again <- function(e) tryCatch(readRDS(file), error = function(e) NULL, warning = function(w) NULL)
  state <- tryCatch(readRDS(file), error = again, warning = again)
  if (is.list(state)) return(state)
  # A crash of the machine may have left an incomplete file.
  list(
    state = "running", pid = NA_integer_, host = NA_character_, started = file.mtime(file), updated = file.mtime(file),
    n = NA_real_, before = 0, workers = NA_integer_, busy = NA_integer_, attempt = 1L
  )
}
