#' Make a cluster of R workers
#'
#' A drop-in for [parallel::makeCluster()] and [parallel::makePSOCKcluster()]. All functions of \pkg{parallel} that
#' take a cluster work on the result. The cluster uses no R connections, neither in this session nor on the workers.
#' The number of workers is therefore limited by memory and not by R's table of 128 connections.
#'
#' Each host has an agent, an R process that forks the workers. [rustcluster_lifetime] explains how the processes
#' start and end, and [rustcluster_faults] what happens when some of them fail.
#'
#' @param spec The number of workers, and their hosts. The nodes of the cluster are in the order of `spec`. Entries with
#'   the same host and settings share an agent.
#'   * (number) Workers on this machine; a fraction is dropped, as in \pkg{parallel}. Default: the cores that this
#'     session may use according to CPU affinity, cgroups, and the environment variables of Slurm, PBS, SGE, LSF
#'     and others (the rules of `parallelly::availableCores()`), or option `mc.cores` if that is smaller.
#'   * (named number) Workers on each of the named hosts.
#'   * (character) A host for each worker.
#'   * (list) A list for each host, with `host` and any of `user`, `ncore` (number of workers; missing or `NA`: the
#'     usable cores of the host), `port` (of the host's sshd), `rscript`, `rlibs`, `rshcmd`, `rshopts`,
#'     `rscript_envs`, `threads`, `renice`, `start_method`. If no element has `ncore` and some elements are equal, each
#'     element stands for one worker, as in \pkg{parallel}.
#'
#'   * (launcher) The nodes of jobs of a batch engine: [slurm()], [htcondor()], [gridEngine()], [pbs()], [lsf()], or
#'     [jobTemplate()] for any other engine. Or the hosts of [commandLauncher()], which any command line starts, or of
#'     [allocation()], the nodes of the batch job that this session runs in. A list may have launchers beside other
#'     hosts, each of them a list with `host`.
#'
#'   A host may be written with a user and the port of its sshd: `"user@host"`, `"host:2222"`, `"[::1]:2222"`,
#'   `"ssh://user@host:2222"`. An IPv6 address without a port needs no brackets.
#'
#'   `"localhost"` and the names and addresses of this machine are used without ssh, unless `spec` asks for another
#'   user, a port or an ssh command.
#' @param type (character) Any cluster type of [parallel::makeCluster()], such as `"PSOCK"`. The type selects nothing;
#'   the argument makes calls of `makeCluster()` work without changes: see section Cluster type. Another value is
#'   an error.
#' @param ... Any argument of [parallel::makePSOCKcluster()] but `manual = TRUE`, by name. These arguments have the
#'   meaning that they have in \pkg{parallel}:
#'   * `outfile`: a file to which the output of the workers is appended. Default: `"/dev/null"`. With `""` or `NULL`,
#'     this session prints the output line by line, after the host and the rank of the worker. Control characters
#'     are not escaped.
#'   * `rscript`: the `Rscript` command. Default on other hosts: the `Rscript` in the PATH of the host.
#'   * `rscript_args`, `homogeneous`, `methods`, `rlibs`, `user`.
#'   * `renice`: added to the niceness of the workers.
#'   * `setup_timeout`: seconds that the start may take; default 120. The limit also applies to each step in which a
#'     failed worker is replaced: see [rustcluster_faults].
#'   * `rshcmd`: a command line, or a character vector of a command and its arguments; default `"ssh"`.
#'   * `rshopts`: further arguments of `rshcmd`.
#'
#'   `port`, `master`, `useXDR`, `setup_strategy` and the other arguments of `makePSOCKcluster()` are accepted and
#'   ignored. Defaults that were set with `setDefaultClusterOptions()` of \pkg{parallel} apply. `patience`,
#'   `keep_limit`, `start` and `onFailure` are deprecated names of `heartbeat_timeout`, `setup_log_limit`,
#'   `start_method` and `on_failure`. Any other argument is an error.
#' @param packages (character) Packages to attach in all workers. The agent loads the packages once, before it forks the
#'   workers, which takes less time and memory than loading them in each worker. A package that creates state of its
#'   process at load is loaded by each worker: see section Packages of [rustcluster_lifetime].
#' @param rscript_envs (character) Environment variables of the workers. A named vector holds values, where `NA` removes
#'   a variable. A vector without names lists variables of this session to copy. Jobs of batch engines read them from a
#'   file that the user alone can read, before R starts; names there may have letters, digits and `_` only.
#' @param start_method (character) `"fork"`: the agent forks each worker, which takes milliseconds. `"spawn"`: the
#'   agent starts each worker as a separate R process, as for a PSOCK cluster.
#' @param threads (integer) The number of threads that BLAS, OpenMP and `mc.cores` may use in each worker; default 1.
#'   The number is set in the environment before R starts: `OMP_NUM_THREADS`, `OPENBLAS_NUM_THREADS`,
#'   `MKL_NUM_THREADS`, `BLIS_NUM_THREADS`, `VECLIB_MAXIMUM_THREADS`, `R_DATATABLE_NUM_THREADS`,
#'   `RCPP_PARALLEL_NUM_THREADS`, `MC_CORES`.
#' @param memory_limit (number) Memory (bytes) that each worker may allocate, including about 60 MB for R and its
#'   packages; at least 100e6. Default: `Inf`, no limit. A task that exceeds the limit ends with R's error ("cannot
#'   allocate vector of size ..."), which mentions the limit, and the worker goes on. Code that cannot handle a failed
#'   allocation ends the worker: R itself is an example when it needs memory for small objects. Allocated memory counts
#'   whether it is used or not. The limit needs Linux (`RLIMIT_DATA`). It also applies to each process that a worker
#'   starts.
#' @param on_failure (character) What to do if a host cannot be started. `"error"`: raise an error and leave nothing
#'   running anywhere. `"warn"`: raise a warning of class `rustcluster_host_left_out` and use the other hosts. If some
#'   workers of a host do not start, the cluster uses the others. A host that exceeds `setup_timeout` does not shorten
#'   the time of the other hosts.
#' @param heartbeat_timeout (number) Seconds without a message after which this session treats another host as lost,
#'   and the agent of that host treats this session as lost; default 20. Both sides send heartbeats four times in that
#'   time, however busy the workers are.
#' @param retries (integer) How often a task is retried after its worker, host or connection has failed; at least 0;
#'   default 2. With `0`, the first failure is an error at once. See [rustcluster_faults].
#' @param timeout (number) Time limit (seconds) of a task, measured from when its worker has the complete message; at
#'   least 0.001; default `Inf`. A task that exceeds the limit is interrupted, and an error of class
#'   `rustcluster_timeout` replaces its result. A worker that does not respond to the interrupt within 2 s is killed and
#'   replaced: C code and `system()` do not respond. `timeout` of `makePSOCKcluster()` limits something else: how long
#'   R waits for a connection.
#'   A task of `parLapply()` and the functions that use it is a chunk of elements: the limit is that of the whole
#'   chunk. `.timeout` of [clusterLapply()] limits each element.
#' @param reconnect (logical) Whether to reconnect lost hosts. The session tries again after 1 s, 2 s, 4 s and so on, up
#'   to every 30 s, until `stopCluster()`. When the host is back, the state of its workers is restored (the state of
#'   their random numbers, if those are L'Ecuyer-CMRG streams), and its nodes are usable again; a message says so. A
#'   call in which the last host is lost does not wait for it.
#' @param buffer_limit (number) Memory (bytes) for results in this session. Beyond the limit, large results stay on
#'   their hosts until they are needed. At least 1 MiB; default 512 MiB.
#' @param setup_log_limit (number) Memory (bytes) that each agent may use for the set-up log, from which replaced
#'   workers are restored. This session keeps a log of its own for hosts that join or return and for workers that
#'   [addWorkers()] adds: a file without a name in the temporary directory, which contains the messages of
#'   `clusterExport()`, `clusterEvalQ()` and `clusterCall()` once each, up to the same limit or 1 GiB. Agents on other
#'   hosts may use as much again to cache data that several workers need. Default: an eighth of the memory that is
#'   available on the host, at least 16 MiB and at most 1 GiB. See [rustcluster_faults].
#' @param stop_timeout (number) Seconds that `stopCluster()` waits for an idle worker to end, at least 0; default 5. In
#'   that time the worker runs its exit handlers (`.Last()`, `reg.finalizer(onexit = TRUE)`). A worker that takes longer
#'   is killed, and a warning of class `rustcluster_stop_timeout` names it.
#' @param wait How long to wait for hosts: `"all"`, the default, until all workers are ready; `"first"`, until the first
#'   is; or a number of workers; `0` does not wait. Hosts that have not started by then join the cluster later, and a
#'   message says so. `setup_timeout` limits the wait. With a `wait` other than `"all"`, the number of workers of each
#'   host must be known (`ncore`). See section Hosts that join later. Of a launcher with `max` ([slurm()]), only the
#'   first `min` nodes are waited for.
#' @param linger (number) Seconds for which the cluster waits for another session if this session ends without
#'   `stopCluster()`, or the connection to its hosts is lost; at most 1e7. Default: 0, the cluster ends with its
#'   session. Hosts must be this machine, hosts of ssh, or launchers of batch engines without `max`: an agent that is
#'   connected by the stdin and stdout of a command ([commandLauncher()]) could not be found again.
#'   See [reattachCluster()], and section Clusters that wait of [rustcluster_lifetime].
#' @param install (logical) Whether to install this build of \pkg{rustcluster} first, as [installOnHosts()] does, on
#'   hosts of ssh that do not have it. An interactive session asks before it installs. The time of the installation does
#'   not count as `setup_timeout`. Not for launchers: install the package in the image of a container, or on the login
#'   node of a batch engine, in a library that the nodes see.
#' @param progress (logical) Whether to print a line for each host when it has started.
#'
#' @return An object of class `c("RustCluster", "cluster")`: a list of nodes of class `"RustNode"`. Each node is a list
#'   with `host` (character), `rank` (integer, from 1) and a handle, and stands for one worker. Subsets such as
#'   `cl[1:2]` are clusters, too.
#'
#' @section Hosts that join later:
#' With `wait = "first"`, a number, or `0`, `length(cl)` counts all workers that `spec` asks for. Functions that give a
#' task to any idle worker, such as `parLapplyLB()`, `clusterApplyLB()`, [clusterLapply()], foreach, futures and
#' [clusterSubmit()], begin with the workers that are ready. Workers that join take part in the call that is running.
#' `clusterExport()` and `clusterSetRNGStream()` do not wait either: a worker that joins gets the cluster's exports, the
#' effects of its set-up calls and its own stream of random numbers before its first task. Functions that give each node
#' its own task, such as `clusterCall()`, `clusterEvalQ()`, `clusterApply()` and `parLapply()`, wait for all nodes of
#' the cluster that they are called with; `packages` attaches packages without waiting, and a part of the cluster can be
#' used at once: `clusterAlive(cl)`.
#'
#' [clusterStatus()] and [clusterHosts()] show workers and hosts that have not joined yet as `"waiting"`. A host that
#' fails to start, or to join within `setup_timeout`, is reported by a warning of class `rustcluster_host_failed`, and
#' the cluster goes on without it.
#'
#' @section Several clusters:
#' `c(cl1, cl2)` is a cluster with the nodes of both, in that order. All functions work on it, and those of
#' \pkg{parallel} as on a PSOCK cluster with as many nodes. They send one message for each task. The `retries` and
#' `timeout` of each cluster apply to its own tasks, and a failed task is retried on its own cluster.
#' [clusterSubmit()] sends a call to the cluster that has the most idle workers when the call is made.
#' `stopCluster()` stops these workers, each in its own cluster.
#' `plan(cluster_rust)` of \pkg{future} accepts the nodes of a single cluster only.
#'
#' `c(cl, psock)` joins nodes of this package and nodes of a PSOCK cluster. The functions of \pkg{parallel} work on
#' the result. All other functions of this package raise an error that names the nodes of the PSOCK cluster.
#'
#' @section Cluster type:
#' In R 4.5 and newer, `parallel::makeCluster(spec, type = "RUST", ...)` calls `makeRustCluster(spec, ...)`. The type is
#' registered when this package is loaded.
#' `parallel::registerClusterType("RUSTDEFAULT", makeRustCluster, make.default = TRUE)` makes this type the default of
#' `makeCluster()`. Older versions of R cannot register types: their error is "unknown cluster type".
#'
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_not_yet`, `rustcluster_limits`, `rustcluster_start_failed` and
#' `rustcluster_install_failed` (`install`). Nothing is left running after these errors. [rustcluster_conditions] lists
#' the errors of later calls.
#'
#' @seealso [rustcluster_log] for a log of what happens inside; [rustcluster_faults] for failures, retries, reconnection
#'   and timeouts; [rustcluster_lifetime] for start, packages, stopping and detached processes; [clusterHosts()],
#'   [clusterPids()],
#'   [clusterAlive()], [installOnHosts()]
#' @examples
#' library(parallel)
#' cl <- makeRustCluster(2)
#' print(cl)
#' parSapply(cl, 1:4, function(i) i^2)
#' stopCluster(cl)
#' @export
makeRustCluster <- function(spec = usableCores(), type = "RUST", ..., packages = NULL,
                            rscript_envs = NULL, start_method = c("fork", "spawn"), threads = 1L,
                            memory_limit = Inf, on_failure = c("error", "warn"), heartbeat_timeout = 20,
                            retries = 2, timeout = Inf, reconnect = FALSE,
                            buffer_limit = 512 * 2^20, setup_log_limit = NULL, stop_timeout = 5, wait = "all",
                            linger = 0, install = FALSE, progress = interactive()) {
  own <- setdiff(names(formals()), c("spec", "type", "..."))
  # library() takes a name without quotes.
  written <- substitute(packages)
  tryCatch(packages, error = function(e) {
    if (!is.symbol(written) || !identical(nameNotFound(conditionMessage(e)), as.character(written))) stop(e)
    badArgument("packages", "must be a character vector of package names: put `", as.character(written), "` in quotes")
  })
  given <- useNewNames(list(...), names(match.call(expand.dots = FALSE)))
  for (name in intersect(own, names(given))) {
    assign(name, given[[name]])
    given <- given[names(given) != name]
  }
  for (name in own) assign(name, plain(get(name)))
  checkType(plain(type))
  options <- clusterOptions(given)
  # makePSOCKcluster() calls this argument `names`.
  if (!is.null(options$names)) spec <- options$names
  if (!is.null(packages) && !(is.character(packages) && all(isText(packages)) && all(nzchar(packages)))) {
    badArgument("packages", "must be a character vector of package names")
  }
  tolerant <- tryCatch(match.arg(on_failure), error = function(e) {
    badArgument("on_failure", "must be \"error\" or \"warn\"")
  }) == "warn"
  between(heartbeat_timeout, "heartbeat_timeout", "a number of seconds", 1, 1e6)
  between(retries, "retries", "a whole number", 0, 1e6)
  if (retries != round(retries)) badArgument("retries", "must be a whole number")
  between(timeout, "timeout", "a number of seconds", 0.001, 1e9, infinite = TRUE)
  between(buffer_limit, "buffer_limit", "a number of bytes", 2^20, 1e15)
  if (!is.null(setup_log_limit)) between(setup_log_limit, "setup_log_limit", "a number of bytes", 0, 1e15)
  between(stop_timeout, "stop_timeout", "a number of seconds", 0, 1e6)
  between(linger, "linger", "a number of seconds", 0, 1e7)
  for (name in c("progress", "reconnect", "install")) {
    if (!isTRUE(get(name)) && !isFALSE(get(name))) badArgument(name, "must be TRUE or FALSE")
  }
  memory <- memoryLimit(memory_limit)
  checked(log_start())
  defaults <- c(
    list(
      rscript_envs = variables(rscript_envs), threads = count(threads, "threads", 4096),
      renice = options$renice, start_method = startMethod(start_method)
    ),
    options[intersect(c("rscript", "rlibs", "user", "rshcmd", "rshopts"), names(options))]
  )
  asked <- specHosts(spec, defaults)
  local <- vapply(asked$hosts, `[[`, NA, "local")
  short <- limits_check(sum(asked$workers[local[asked$owner]], na.rm = TRUE))
  if (!is.null(short)) raiseFailure(short)

  if (linger > 0) {
    checkLinger(asked)
    makeRecordDirectory()
    options$linger <- TRUE
  }
  needed <- neededWorkers(wait, asked$workers, isSpare(asked$hosts, asked$launchers)[asked$owner])

  if (install) {
    asked$problems <- installMissing(asked$hosts, options$setup_timeout, progress, tolerant, is.infinite(needed))
  }

  launches <- lapply(asked$hosts, hostLaunch, options)
  pointer <- checked(hub_start(
    launches, buildText(), rVersionText(), R.version$platform, buffer_limit
  ))
  handle <- newHandle(pointer, asked$hosts)
  if (linger > 0) handle$linger <- newLinger(linger)
  handle$bufferLimit <- buffer_limit
  handle$retries <- retries
  checked(hub_policy(pointer, noJob, retries, retries == 0))
  handle$reconnect <- reconnect
  handle$memoryLimit <- memory_limit
  handle$timeout <- timeout
  handle$stopTimeout <- stop_timeout
  deadline <- proc.time()[["elapsed"]] + options$setup_timeout
  started <- FALSE
  on.exit(if (!started) abandon(handle))
  # Workers that are added later need the set-up log, too.
  limit <- if (is.null(setup_log_limit)) 2^30 else setup_log_limit
  checked(hub_keep_setup_log(pointer, tempfile("rustcluster-"), limit, options$setup_timeout, reconnect))
  handle$headLogLimit <- limit
  handle$settings <- list(
    options = options, defaults = defaults, tolerant = tolerant, progress = progress, packages = as.character(packages),
    outfile = options$outfile, heartbeat_timeout = heartbeat_timeout, setup = options$setup_timeout,
    setup_log_limit = setup_log_limit, memory = memory, stop_timeout = stop_timeout, install = install
  )
  startBatches(handle, asked, options, heartbeat_timeout)
  deadline <- greetHosts(handle, asked, deadline, options$setup_timeout, tolerant, progress, needed)
  plans <- hostPlans(handle, asked, launches, handle$settings)
  saveRecord(handle)
  startRecords(handle)
  checked(hub_go(handle$pointer, plans, timeout))
  handle$alive <- awaitStart(handle, deadline, options$setup_timeout, tolerant)
  awaitWorkers(handle, min(needed, length(handle$alive)), deadline, options$setup_timeout)
  started <- TRUE
  handle$made <- handle$alive
  saveRecord(handle)
  lingerBatches(handle)
  newCluster(handle, handle$alive)
}
