# Help pages about clusters that are not about one function.

#' Failures of workers, hosts and tasks
#'
#' What a cluster made by [makeRustCluster()] does when a worker, a host or a link fails, and when a
#' task takes too long. Agents replace failed workers, and their tasks are retried.
#'
#' @section Replaced workers:
#' The agent of a host replaces a failed worker at once and restores the state of the old worker in the
#' new one. The agent repeats what `clusterExport()`, `clusterEvalQ()`, `clusterCall()` and
#' `clusterSetRNGStream()` did on the worker, in the same order and with the values that were sent then.
#' The random numbers continue where the last completed task left them. A repeated call also repeats its
#' side effects outside of the worker, such as writing a file, and many calls take their time. What
#' other tasks left in the worker is not restored, and neither is the effect of an interrupted call.
#'
#' A worker is replaced only if its complete state has been logged. When the log needs more than
#' `setup_log_limit`, a warning (`rustcluster_state_not_kept`) says that failed workers of that host will not
#' be replaced from then on.
#'
#' A worker is lost for the time being if it ends three times in a row while it is restored, or if its
#' start or restore makes no progress for `setup_timeout` (for a repeated call: beyond twice the time
#' that the call took at first). An error or a warning (`rustcluster_worker_lost`) says so and gives the
#' reason, and `clusterPids()` is `NA` for the node. The agent tries again after 1 s, 2 s, 4 s and so
#' on, up to every 30 s. When the worker is back, with all of its logged state, a message
#' (`rustcluster_worker_back`) says so, and the node is usable again.
#'
#' @section Retries:
#' The task of a failed worker is retried on the replacement, before all other tasks that wait for that
#' worker, and with the same random numbers as at first. A warning (`rustcluster_worker_lost`) reports
#' each worker failure after which a task is retried; `options(warn = 2)` turns that warning into an
#' error, which ends the call.
#'
#' If the host is lost, or the worker is not replaced, another worker that the same call uses gets the
#' task, with the random numbers of the lost worker if those are L'Ecuyer-CMRG streams. `clusterCall()`
#' and other verbs that address each node are bound to their nodes, and fail.
#'
#' A task is attempted at most `retries + 1` times; with `retries = 0`, the first failure is an error
#' at once. The other tasks go on, and at the end of the call an error of class `rustcluster_task_failed` is raised,
#' whose message lists all worker failures of the task. Its fields are
#' \describe{
#'   \item{`index`}{(integer) which of the tasks that were sent; for [parallel::parLapply()] and similar
#'     functions, which chunk of the elements.}
#'   \item{`losses`}{(list) a condition for each worker failure.}
#'   \item{`results`}{(list) the results of all tasks: `NULL` for a task without a result, and the text
#'     of the error, of class `"try-error"`, for a task that ended with an error of R code.}
#'   \item{`failures`}{(list) all errors of this kind.}
#' }
#' `rustcluster_timeout` has these fields, too. If an earlier task failed with an error of its own,
#' \pkg{parallel} raises that error instead.
#'
#' Errors of R code are results, and are never retried. Neither is a jump to R's top level, which ends a
#' PSOCK worker: `stop()` with a condition that is no error, or `invokeRestart("abort")`.
#'
#' @section Timeouts:
#' `timeout` is the time that a task may take, measured from when its worker has the complete message. A
#' task that takes longer is interrupted, and an error of class `rustcluster_timeout` takes the place of
#' its result. A worker that does not respond to the interrupt within 2 s is killed and replaced: C code
#' and `system()` do not respond. The next call on that worker waits for its replacement, and a warning
#' (`rustcluster_worker_replaced`) names the worker and the reason.
#'
#' A task of [parallel::parLapply()] and the functions that use it is a chunk of elements. The limit is
#' that of the whole chunk, and the error names its elements. `.timeout` of [clusterLapply()] limits each element.
#'
#' @section Lost hosts and reconnection:
#' A host is lost when its agent or its link fails, or when the host is silent for `heartbeat_timeout` seconds.
#' Its agent applies the same limit to the session. An agent sends a heartbeat four times in `heartbeat_timeout`
#' seconds, however busy its workers are.
#'
#' Later calls on the nodes of a lost host fail with `rustcluster_host_failed` until the host is back.
#' [clusterAlive()] returns the cluster without those nodes. A host whose workers fail again and again
#' is left out, with a warning: at least ten failures, and four times as many as the host has workers,
#' without a completed task in between.
#'
#' With `reconnect = TRUE` the session tries a lost host again after 1 s, 2 s, 4 s and so on, up to
#' every 30 s, until `stopCluster()`. When the host is back, the state of its workers is restored (the
#' state of their random numbers, if those are L'Ecuyer-CMRG streams), and its nodes are usable again; a
#' message (`rustcluster_host_back`) says so. A call in which the last host is lost does not wait for
#' it.
#'
#' @section Conditions:
#' [rustcluster_conditions] lists the classes of all errors, warnings and messages, and their fields.
#'
#' @seealso [makeRustCluster()] for the arguments, [rustcluster_lifetime] for how clusters start and
#'   end, [clusterAlive()], [clusterStatus()], `vignette("faults")` for worked examples.
#' @name rustcluster_faults
NULL

#' Start and end of a cluster
#'
#' How the processes of a cluster made by [makeRustCluster()] start, which packages forked workers
#' share, what ends the processes, and which processes outlive them.
#'
#' @section Start:
#' Each host has an agent, an R process that starts the workers: by forking itself, or, with `start_method =
#' "spawn"`, as separate R processes. One byte stream connects the agent with this session. The agent
#' ends with the session, and its workers end with the agent. Workers start with the global environment,
#' search path and options of a PSOCK worker. Each worker has a temporary directory, a random seed and a
#' process group of its own.
#'
#' If a start fails, nothing is left running; with `on_failure = "warn"`, nothing on the hosts that
#' failed.
#'
#' @section Packages:
#' A forked worker inherits what a package created in the agent's process at load. A package of
#' `packages` is therefore loaded by each worker, after the fork, if the package or a namespace that it
#' imports does one of the following at load: it draws random numbers, calls `tempdir()`
#' or `tempfile()`, reads the process id or the time, makes files in the temporary directory, opens connections,
#' files or sockets, starts threads or processes, registers an exit finalizer, or has compiled code that
#' can read the clock, the process id or random bytes. The agent observes the packages while they
#' load to detect this, and then restarts without them. The search path is that of a PSOCK worker in any case.
#' Packages that a user's profile loads are checked in the same way: if one of them must not be forked,
#' the workers of that host are started as with `start_method = "spawn"`.
#'
#' Some packages are known: callr, credentials, curl, dqrng, ff, gert, hdf5r, later, magick, rgl, snow
#' and terra are always loaded by each worker; data.table and cli are loaded once, and each worker renews
#' their threads. The agent may not detect what C code does at load: use `start_method = "spawn"` then.
#' `vignette("packages")` has a table of common packages.
#'
#' @section Ends:
# nolint start: line_length_linter. A row of a table is one line.
#' | what happens | what follows |
#' |---|---|
#' | `stopCluster(cl)`, idle, busy, again, or in the middle of a call | returns when no process is left; idle workers run their exit handlers, and are killed after `stop_timeout` seconds, with a warning; busy workers are interrupted, and killed after 0.6 s; the call fails with `rustcluster_stopped` |
#' | `stopCluster(cl[1:2])` | the same for these workers; the others stay |
#' | the last handle is garbage-collected | as `stopCluster()`, without waiting |
#' | `stopCluster()` in a fork of this session | `rustcluster_forked`; nothing ends |
#' | this session ends: `q()`, an error of a script, SIGTERM, SIGHUP, its terminal closed, SIGKILL | agents and workers end within a second: exit handlers of workers have 0.6 s; with `linger` they wait, see below |
#' | Ctrl-C, a time limit, an error in a handler, in a call | the tasks of the call are interrupted, and the next call works; a worker that does not respond to the interrupt within 2 s is killed and replaced, with a warning |
#' | a worker ends (`quit()`, a signal, out of memory) | the worker is replaced and its task retried: see [rustcluster_faults] |
#' | a worker ignores SIGTERM, or has closed its descriptors | the worker is killed; one that has closed its descriptors counts as failed, as above |
#' | the agent or its ssh is killed, or told to end | its workers end within a second, with all processes that they started; their tasks move to other hosts |
#' | the link breaks, or the host is switched off | each side notices within `heartbeat_timeout` seconds; as above |
#' | a disk is full on the host | tasks that write to the disk fail with an error; `outfile` misses lines |
# nolint end
#'
#' @section Clusters that wait:
#' A cluster that was made with `linger = seconds` does not end with its session. If the session ends without
#' `stopCluster()` in any way (`q()`, the end of a script, a crash, SIGKILL, a session that RStudio Server suspends, a
#' restart of its machine), or if a link breaks, the agents wait for that many seconds. This also holds if the last
#' handle is garbage-collected. Meanwhile:
#'
#' * Workers keep their variables, attached packages and random numbers. Tasks that had begun are completed. Tasks that
#'   had been sent ahead and had not begun are dropped.
#' * [listClusters()] shows the cluster to new sessions of the same user on the same machine, and [reattachCluster()]
#'   connects a session to it. A cluster in a saved workspace reattaches at its first use after
#'   `library(rustcluster)`, with a message. `killCluster()` ends the cluster.
#' * Only one session at a time has the cluster. While a session is connected, no other session is accepted. Agents on
#'   other hosts give up a session that is frozen (SIGSTOP, a suspended laptop) after `heartbeat_timeout` seconds. When
#'   it goes on after another session has taken the cluster over, its calls fail with `rustcluster_host_failed`, also
#'   with `reconnect = TRUE`. Agents on the machine of the session do not give it up as long as its process exists: a
#'   frozen session keeps a local cluster.
#' * An agent ends when nobody has come in time, and at once when it gets SIGTERM. Nothing is left then.
#'
#' The session records the cluster in a file that only the user can read, in
#' `tools::R_user_dir("rustcluster", "cache")`. The file contains the key that a session must prove
#' to have before an agent reads anything else from it.
#' `stopCluster()` removes the file. Agents listen on Unix sockets in directories in `/tmp` that only the user can
#' enter.
#'
#' Hosts that are lost in the meantime are lost hosts of the reattached cluster: see [rustcluster_faults]. A host that
#' is lost while its session goes on may still have an agent that waits. With `reconnect = TRUE` the session starts a
#' new agent there, which ends the old one. Without that, the next session gets the workers of the host back, unless
#' they have missed exports or other set-up calls that other workers have completed: it then ends them, reports the
#' host as lost, and reconnects it if the cluster was made with `reconnect = TRUE`. A call that has failed because the
#' host was lost counts only if its session went on. `stopCluster()` cannot reach the agent of a lost host, which ends
#' by itself after `linger` seconds.
#'
#' When a host comes back that was lost while no session was connected, its workers have the exports and set-up calls
#' that all others have, and the random numbers that the last session knew of each. What was set on them alone is lost.
#' If the machine of the session was restarted meanwhile, their random numbers are unknown and start anew.
#'
#' @section Batch jobs that wait:
#' Agents of batch jobs ([slurm()] and the other launchers) dial the session. When it is gone, they dial the same
#' addresses and ports every second, until a session that has the key of the cluster listens there:
#'
#' * [reattachCluster()] listens on the port of the session before. An error names a port that another process holds.
#'   With `login`, it opens a new connection to the login node, and a gateway there at the same port.
#' * The jobs go on, and are not submitted again. The guard, which cancels the jobs of a session that ends, first waits
#'   `linger` seconds for another session. This begins when [makeRustCluster()] returns: jobs of a session that ends
#'   before are cancelled at once.
#' * Jobs that wait in the queue stay there. Those that start while no session is connected find none and end after a
#'   minute. The others join the reattached cluster as hosts that join late.
#' * [reattachCluster()] waits for agents that have been connected for `heartbeat_timeout` + 5 seconds, at least for
#'   15 s. An agent that comes later is ended with its job. A host whose job has ended is given up as soon as the engine
#'   says so. `stopCluster()`, [killCluster()] and [removeWorkers()] cancel jobs as before.
#' * A host whose connection fails while its session goes on is given up by that session, and its job waits for the next
#'   one: `reattachCluster()` after the end of the session has that host again. The job ends at once if the host misses
#'   exports or other set-up calls, and `scancel` and the like end it at any time.
#' * After a restart of the machine of the session, or if the guard is killed with it, nothing cancels the jobs.
#'   Agents still end after `linger` seconds. A guard that is killed also leaves its directory: `killCluster()` removes
#'   the directory and cancels jobs in the queue, and `reattachCluster()` starts another guard.
#'
#' Adaptive launchers (`max`) cannot wait, since their jobs are submitted while a session runs.
#'
#' @section Detached processes:
#' Child processes of a worker (started by `system()`, `mclapply()` and similar functions) are killed with
#' the worker, and with a killed agent. A process that made itself the leader of another process group,
#' as `setsid` does, keeps running; on Linux a warning of class `rustcluster_left_behind` names the
#' process when its worker has ended. A cluster that a worker made ends with the worker.
#'
#' @seealso [makeRustCluster()] for the arguments, [rustcluster_faults] for failures, [clusterPids()],
#'   `vignette("packages")`, `vignette("faults")`.
#' @name rustcluster_lifetime
NULL
