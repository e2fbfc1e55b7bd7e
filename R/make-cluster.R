#' Make a cluster of R workers
#'
#' A drop-in for [parallel::makeCluster()] and [parallel::makePSOCKcluster()].
#' All functions of \pkg{parallel} that take a cluster work on the result. It
#' uses no R connection, neither here nor on its workers, so their number is
#' bound by memory and not by R's table of 128 connections.
#'
#' On each host an agent, one R process, forks the workers. [rustcluster_lifetime] says how the processes
#' start and end, [rustcluster_faults] what happens when some of them fail.
#'
#' @param spec How many workers, and where. Nodes are in the order given; equal
#'   hosts share an agent.
#'   * (number) workers on this machine. Default: the cores that this session may
#'     use, by affinity, cgroups, and the variables of Slurm, PBS, SGE, LSF and
#'     others (as `parallelly::availableCores()` counts them), or option
#'     `mc.cores` if that is less.
#'   * (number, with names) workers on each of the hosts named.
#'   * (character) a host for each worker.
#'   * (list) a list for each host, with `host` and any of `user`, `ncore` (how
#'     many workers; missing or `NA`: the cores that may be used there), `port`
#'     (of its sshd), `rscript`, `rlibs`, `rshcmd`, `rshopts`, `rscript_envs`,
#'     `threads`, `renice`, `start`. If no element has `ncore` and some are
#'     equal, each stands for one worker, as in \pkg{parallel}.
#'
#'   Wherever a host is named, it may be written with its user and the port of its sshd: `"user@host"`,
#'   `"host:2222"`, `"[::1]:2222"`, `"ssh://user@host:2222"`. An IPv6 address without a port needs no brackets.
#'
#'   `"localhost"`, and this machine's name and addresses, are reached without
#'   ssh, unless another user, a port or an ssh of its own is asked for.
#' @param type (character) Accepted, so that calls of
#'   [parallel::makeCluster()] work as they are, and not used. See section Cluster type.
#' @param ... Any argument of [parallel::makePSOCKcluster()], by name. With the
#'   meaning that they have there: `outfile` (default `"/dev/null"`; `""` shows
#'   the workers' output here, a line at a time and as it is, control characters included,
#'   after their host and rank; a file is appended to), `rscript`, `rscript_args`, `homogeneous`, `methods`,
#'   `renice` (added to the workers' niceness), `rlibs`, `setup_timeout` (in
#'   seconds; default 120; also for each step in which a lost worker is replaced,
#'   see [rustcluster_faults]), `user`, `rshcmd` (a command line, or a character
#'   vector of a command and its arguments; default `"ssh"`), `rshopts` (further
#'   arguments). Without any meaning here, and accepted for the sake of old code:
#'   `port`, `master`, `useXDR`, `setup_strategy` and others. On other
#'   hosts the `Rscript` of their PATH is run, unless `rscript` says otherwise.
#'   Defaults set with \pkg{parallel}'s
#'   `setDefaultClusterOptions()` count. Any other argument is an
#'   error.
#' @param packages (character) Packages to attach in all workers. The agent
#'   loads them once, before it forks, which takes less time and memory than
#'   loading them in each worker. Each worker loads those that make state of
#'   their process at load. See section Packages of [rustcluster_lifetime].
#' @param rscript_envs (character) Environment variables of the workers: with
#'   names, their values, `NA` to unset one; without names, the variables of
#'   this session to pass on.
#' @param start (character) `"fork"` makes each worker by forking the agent,
#'   which takes milliseconds. `"spawn"` starts a separate R process for each,
#'   as a PSOCK cluster does.
#' @param threads (integer) Threads that the BLAS, OpenMP and `mc.cores` may use
#'   in each worker; default 1. Set in the environment before R starts:
#'   `OMP_NUM_THREADS`, `OPENBLAS_NUM_THREADS`, `MKL_NUM_THREADS`,
#'   `BLIS_NUM_THREADS`, `VECLIB_MAXIMUM_THREADS`, `R_DATATABLE_NUM_THREADS`,
#'   `RCPP_PARALLEL_NUM_THREADS`, `MC_CORES`.
#' @param memory_limit (number) Bytes of memory that each worker may have for its
#'   own, R and its packages included (some 60 MB); at least 100e6, default `Inf`:
#'   as many as there are. A task that wants more ends with R's error ("cannot
#'   allocate vector of size ..."), which says that it is this limit, and the
#'   worker goes on. Code that cannot cope with that, as R itself when it is out
#'   of its smallest pieces, ends the worker. What counts is what was allocated,
#'   used or not. On Linux only (`RLIMIT_DATA`), and of
#'   each process that a worker starts, too.
#' @param onFailure (character) What follows if a host cannot be started:
#'   `"error"`, with nothing left running anywhere, or `"warn"`: a warning of
#'   class `rustcluster_host_left_out`, and the cluster goes on with the others. Of a
#'   host some of whose workers do not start, the others are used. A host that is late
#'   (`setup_timeout`) does not shorten the time of the others.
#' @param patience (number) Seconds of silence after which this session takes
#'   another host for lost, and its agent this session; default 20. An agent says
#'   that it is there four times in that time, however busy its workers are.
#' @param retries (integer) How often a task is tried again that was lost with its
#'   worker, host or link, at least 0; default 2. See [rustcluster_faults]. `0`: a loss is
#'   an error at once.
#' @param timeout (number) Seconds that a task may take, from when its worker has
#'   all of its message, at least 0.001; default `Inf`. A task that takes longer is
#'   interrupted, and an error of class `rustcluster_timeout` takes the place of its
#'   result. If its worker does not heed that for 2 s, as C code and `system()` do
#'   not, that is killed and replaced.
#' @param reconnect (logical) Whether a lost host is tried again, after 1 s, 2 s,
#'   4 s and so on up to every 30 s, until `stopCluster()`. When it is back, its
#'   workers are brought to the state they had (of random numbers, if they are
#'   L'Ecuyer-CMRG streams), and its nodes are usable again; a message says so. A
#'   call in which the last host is lost does not wait for it.
#' @param buffer_limit (number) Bytes of results that this session holds before it
#'   leaves large ones on their hosts until they are asked for, at least 1 MiB;
#'   default 512 MiB.
#' @param keep_limit (number) Bytes that an agent keeps of what lasts on its
#'   workers, to restore those that it replaces (and, on other hosts, as much again
#'   of what may be sent to another worker). Default: an eighth of the memory that
#'   is available there, from 16 MiB to 1 GiB. See [rustcluster_faults].
#' @param stop_timeout (number) Seconds that `stopCluster()` waits for an idle worker
#'   to end, at least 0; default 5. In that time the worker runs its exit handlers
#'   (`.Last()`, `reg.finalizer(onexit = TRUE)`). A worker that takes longer is killed,
#'   and a warning of class `rustcluster_stop_timeout` names it.
#' @param progress (logical) Whether to show a line for each host as it comes up.
#'
#' @return An object of class `c("RustCluster", "cluster")`: a list of nodes of
#'   class `"RustNode"`, each a list with `host` (character), `rank` (integer,
#'   from 1) and a handle. A node stands for one process until that ends. Subsets,
#'   as `cl[1:2]`, are clusters too.
#'
#' @section Several clusters:
#' `c(cl1, cl2)` is a cluster with the nodes of both, in that order. All verbs work on it, those of
#' \pkg{parallel} as on a PSOCK cluster with as many nodes. They send one message for each task, and it is
#' each cluster's own `retries` and `timeout` that count. A lost task is tried again on its own cluster.
#' [clusterSubmit()] gives a call to the cluster that has the most idle workers when the call is made.
#' `stopCluster()` ends those workers, each in its own cluster.
#' `plan(cluster_rust)` of \pkg{future} takes one cluster alone.
#'
#' `c(cl, psock)` joins nodes of ours and of a PSOCK cluster. The functions of \pkg{parallel} work on the
#' result. All other functions of this package refuse it by name.
#'
#' @section Cluster type:
#' In R 4.5 and newer, `parallel::makeCluster(spec, type = "RUST", ...)` is
#' `makeRustCluster(spec, ...)`, once this package is loaded, which registers the type.
#' `parallel::registerClusterType("RUSTDEFAULT", makeRustCluster, make.default = TRUE)` makes it what
#' `makeCluster()` makes where no `type` is given. Older versions of R have no register, and say
#' "unknown cluster type".
#'
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_not_yet`, `rustcluster_limits` and
#' `rustcluster_start_failed`, before anything is started or with nothing left
#' of it; later those listed in [rustcluster_conditions].
#'
#' @seealso [rustcluster_log] for a log of what happens inside, [rustcluster_faults] for failures, retries, reconnection and timeouts; [rustcluster_lifetime]
#'   for start, packages, ends and processes left behind; [clusterHosts()], [clusterPids()],
#'   [clusterAlive()], [installOnHosts()]
#' @examples
#' library(parallel)
#' cl <- makeRustCluster(2)
#' print(cl)
#' parSapply(cl, 1:4, function(i) i^2)
#' stopCluster(cl)
#' @export
makeRustCluster <- function(spec = usableCores(), type = "RUST", ..., packages = NULL,
                            rscript_envs = NULL, start = c("fork", "spawn"), threads = 1L,
                            memory_limit = Inf, onFailure = c("error", "warn"), patience = 20,
                            retries = 2, timeout = Inf, reconnect = FALSE,
                            buffer_limit = 512 * 2^20, keep_limit = NULL, stop_timeout = 5,
                            progress = interactive()) {
  for (name in setdiff(names(formals()), c("spec", "type", "..."))) assign(name, plain(get(name)))
  options <- clusterOptions(list(...))
  # The name that makePSOCKcluster() has for it.
  if (!is.null(options$names)) spec <- options$names
  if (!is.null(packages) && !(is.character(packages) && all(isText(packages)) && all(nzchar(packages)))) {
    badArgument("packages", "must be a character vector of packages' names")
  }
  tolerant <- tryCatch(match.arg(onFailure), error = function(e) {
    badArgument("onFailure", "must be \"error\" or \"warn\"")
  }) == "warn"
  between(patience, "patience", "of seconds", 1, 1e6)
  between(retries, "retries", "", 0, 1e6)
  if (retries != round(retries)) badArgument("retries", "must be a whole number")
  if (!identical(timeout, Inf)) between(timeout, "timeout", "of seconds", 0.001, 1e9)
  between(buffer_limit, "buffer_limit", "of bytes", 2^20, 1e15)
  if (!is.null(keep_limit)) between(keep_limit, "keep_limit", "of bytes", 0, 1e15)
  between(stop_timeout, "stop_timeout", "of seconds", 0, 1e6)
  for (name in c("progress", "reconnect")) {
    if (!isTRUE(get(name)) && !isFALSE(get(name))) badArgument(name, "must be TRUE or FALSE")
  }
  memory <- memoryLimit(memory_limit)
  checked(log_start())
  defaults <- c(
    list(
      rscript_envs = variables(rscript_envs), threads = count(threads, "threads", 4096),
      renice = options$renice, start = startMode(start)
    ),
    options[intersect(c("rscript", "rlibs", "user", "rshcmd", "rshopts"), names(options))]
  )
  asked <- specHosts(spec, defaults)
  here <- vapply(asked$hosts, `[[`, NA, "here")
  short <- limits_check(sum(asked$workers[here[asked$owner]], na.rm = TRUE))
  if (!is.null(short)) raiseFailure(short)

  launches <- lapply(asked$hosts, hostLaunch, options)
  pointer <- checked(hub_start(
    launches, packageVersionText(), rVersionText(), R.version$platform, buffer_limit
  ))
  handle <- newHandle(pointer, asked$hosts)
  handle$retries <- retries
  handle$reconnect <- reconnect
  handle$memoryLimit <- memory_limit
  handle$timeout <- timeout
  handle$stopTimeout <- stop_timeout
  deadline <- proc.time()[["elapsed"]] + options$setup_timeout
  started <- FALSE
  on.exit(if (!started) abandon(handle))
  if (reconnect) {
    most <- if (is.null(keep_limit)) 2^30 else keep_limit
    checked(hub_reconnect(pointer, tempfile("rustcluster-"), most, options$setup_timeout))
    handle$spoolLimit <- most
  }
  deadline <- greetHosts(handle, asked, deadline, options$setup_timeout, tolerant, progress)
  plans <- hostPlans(handle, asked, launches, list(
    packages = as.character(packages), outfile = options$outfile, patience = patience,
    timeout = timeout, setup = options$setup_timeout, keep = keep_limit, memory = memory,
    stop_timeout = stop_timeout
  ))
  checked(hub_go(handle$pointer, plans))
  handle$alive <- awaitStart(handle, deadline, options$setup_timeout, tolerant)
  started <- TRUE
  newCluster(handle, handle$alive)
}
