#' Cores that this process may use: affinity, cgroups and schedulers' variables considered.
#' @noRd
usable_cores <- function() .Call(wrap__usable_cores)

#' Whether it is the address of an interface of this machine. Of the loopback's only the usual one
#' counts: others may be forwarded to other machines.
#' @noRd
is_own_address <- function(text) .Call(wrap__is_own_address, text)

#' Takes over stdin and stdout and learns from the head what to start: a list of the packages to
#' attach, of those that are left to the workers, and whether workers will be forked. `tempdir`: that of
#' this process.
#' @noRd
agent_greet <- function(package, r_version, platform, tempdir) .Call(wrap__agent_greet, package, r_version, platform, tempdir)

#' At its end, which is to follow, this process begins again with `command`, and goes on with the same
#' head. The packages `after` are left to the workers then.
#' @noRd
agent_restart <- function(command, after) .Call(wrap__agent_restart, command, after)

#' Workers will be R sessions of their own: this one cannot be forked.
#' @noRd
agent_spawn <- function() .Call(wrap__agent_spawn)

#' Whether the code in a shared object can read what makes processes differ. `FALSE` if that cannot be
#' told.
#' @noRd
code_reads_sources <- function(path) .Call(wrap__code_reads_sources, path)

#' Tells the head that nothing can be started, and why.
#' @noRd
agent_fail <- function(reason) .Call(wrap__agent_fail, reason)

#' Makes the workers and serves them. Returns `TRUE` in a forked worker, `FALSE` when the cluster
#' is over.
#' @noRd
agent_run <- function() .Call(wrap__agent_run)

#' Checks the system's limits for a number of workers on this machine.
#' @noRd
limits_check <- function(workers) .Call(wrap__limits_check, workers)

#' Logs in this session what `RUSTCLUSTER_LOG` asks for.
#' @noRd
log_start <- function() .Call(wrap__log_start)

#' Starts the agents of a cluster and returns its handle at once. `hosts`: a list with an element
#' for each, each a list of host, command, env (named; NA removes). `buffer_limit`: bytes of results
#' that are buffered here before they are left on their hosts.
#' @noRd
hub_start <- function(hosts, package, r_version, platform, buffer_limit) .Call(wrap__hub_start, hosts, package, r_version, platform, buffer_limit)

#' Whether all agents have greeted or failed; waits a little for that.
#' @noRd
hub_greeted <- function(handle) .Call(wrap__hub_greeted, handle)

#' What is known of each host: a list of vectors with an element for each.
#' @noRd
hub_hosts <- function(handle) .Call(wrap__hub_hosts, handle)

#' Hosts that are lost are to be taken back. What lasts on their workers is held in a file that is
#' made at `path`, up to `max_bytes` bytes. `start_timeout`: seconds that a host may take to start then.
#' @noRd
hub_reconnect <- function(handle, path, max_bytes, start_timeout) .Call(wrap__hub_reconnect, handle, path, max_bytes, start_timeout)

#' Tells each agent what to start. `plans`: a list with an element for each, `NULL` for one that
#' is to end, or a list of ranks, packages, outfile, renice, mode, spawn, heartbeat_timeout (in milliseconds),
#' chunk_cache_bytes, state and memory_limit (in bytes; 0 for no limit), setup (of replaced workers, in milliseconds; 0
#' for none), stop_timeout (in milliseconds), local (on this machine) and xdr. `timeout`: seconds that any task
#' may take.
#' @noRd
hub_go <- function(handle, plans, timeout) .Call(wrap__hub_go, handle, plans, timeout)

#' How far a start has come: the number of workers up, waiting a little for more. `tolerant`: what
#' has failed counts as done, and is not an error.
#' @noRd
hub_progress <- function(handle, tolerant) .Call(wrap__hub_progress, handle, tolerant)

#' Leaves out a host for this reason; 0: all hosts of which no worker has come up, and elsewhere the workers
#' that have not.
#' @noRd
hub_leave_out <- function(handle, agent, reason) .Call(wrap__hub_leave_out, handle, agent, reason)

#' Whether a host is lost and is going to be tried again.
#' @noRd
hub_takes_back <- function(handle, agent) .Call(wrap__hub_takes_back, handle, agent)

#' Why each worker is gone: a list of failures, `NULL` for those that are not gone.
#' @noRd
hub_terminations <- function(handle) .Call(wrap__hub_terminations, handle)

#' Stops these nodes; with the last ones the cluster.
#' @noRd
hub_stop_nodes <- function(handle, ranks) .Call(wrap__hub_stop_nodes, handle, ranks)

#' Whether the processes of these nodes, which have been stopped, have ended; waits a little for that.
#' @noRd
hub_ended <- function(handle, ranks) .Call(wrap__hub_ended, handle, ranks)

#' Stops the cluster.
#' @noRd
hub_stop <- function(handle) .Call(wrap__hub_stop, handle)

#' Whether nothing is left of a stopped cluster; waits a little for that.
#' @noRd
hub_closed <- function(handle) .Call(wrap__hub_closed, handle)

#' The pid of each worker, NA for those that are gone.
#' @noRd
hub_pids <- function(handle) .Call(wrap__hub_pids, handle)

#' The pid of each agent.
#' @noRd
hub_agent_pids <- function(handle) .Call(wrap__hub_agent_pids, handle)

#' Sends a message to a node. `setup_call`: `NULL`, or that what it does there lasts, and the name of what
#' it sets there (`""`: of nothing in particular).
#' @noRd
hub_send <- function(handle, rank, job, message, setup_call) .Call(wrap__hub_send, handle, rank, job, message, setup_call)

#' Sends the same message to nodes, in this order, and waits a little for their answers. Returns a list of
#' their values: the job is closed then, no code of R's has run, and no interrupt has been heeded. `NULL`, and nothing
#' has been done: the nodes are of several clusters, or some are there twice. `TRUE`: hub_called() tells what is there.
#' @noRd
hub_call <- function(handle, nodes, job, message, setup_call) .Call(wrap__hub_call, handle, nodes, job, message, setup_call)

#' What hub_call() has had of answers: a list of their values; of which nodes these are there; and what came that is no
#' answer, as hub_receive_any() returns it, or `NULL`.
#' @noRd
hub_called <- function(handle) .Call(wrap__hub_called, handle)

#' Nobody wants to know any more what became of a task that was lost.
#' @noRd
hub_forget <- function(handle, task) .Call(wrap__hub_forget, handle, task)

#' The message of a task that ended without an answer. `last`: it is not asked for again.
#' @noRd
hub_message <- function(handle, task, last) .Call(wrap__hub_message, handle, task, last)

#' The answer of a node to the oldest message sent to it. `TRUE`: it is there, and to be taken with
#' hub_read(). `NULL`: not yet, or R is to note a loss first.
#' @noRd
hub_receive <- function(handle, rank) .Call(wrap__hub_receive, handle, rank)

#' The number of the task whose answer is being read or could not be read, and the place of its node.
#' `NULL`: there is none.
#' @noRd
hub_reading <- function(handle) .Call(wrap__hub_reading, handle)

#' The answer that hub_receive() or hub_receive_any() has told of.
#' @noRd
hub_read <- function(handle) .Call(wrap__hub_read, handle)

#' The next answer of any of these nodes: a list of its place among them and the answer. `TRUE`: as with
#' hub_receive().
#' @noRd
hub_receive_any <- function(handle, nodes) .Call(wrap__hub_receive_any, handle, nodes)

#' As hub_receive_any(), without waiting, for nodes that may be of several clusters: those of this one
#' have these ranks, and these places in the list of nodes. Of equal ranks the first place counts.
#' @noRd
hub_poll <- function(handle, ranks, node_indices) .Call(wrap__hub_poll, handle, ranks, node_indices)

#' Sleeps a little, or until hub_poll() may find something in one of these clusters.
#' @noRd
hubs_wait <- function(handles) .Call(wrap__hubs_wait, handles)

#' The rank of each of these nodes, if they are all of one cluster.
#' @noRd
cluster_ranks <- function(nodes) .Call(wrap__cluster_ranks, nodes)

#' Cancels what is left of a job. Returns what there is to be shown.
#' @noRd
hub_close_job <- function(handle, job) .Call(wrap__hub_close_job, handle, job)

#' Begins to listen for a connection that shows when an answer has arrived. The port to connect to on the loopback
#' address, and the bytes that are to be written there first. `NULL`: the system has no port left.
#' @noRd
hub_readiness_listen <- function(handle) .Call(wrap__hub_readiness_listen, handle)

#' Takes the connection that has been opened and has written the token. Whether there is one.
#' @noRd
hub_readiness_accept <- function(handle) .Call(wrap__hub_readiness_accept, handle)

#' From now on the connection can be read while the next answer of this worker is there. If its task was lost, the
#' policy says first what becomes of that. `NULL`: there is no connection.
#' @noRd
hub_readiness_point <- function(handle, rank) .Call(wrap__hub_readiness_point, handle, rank)

#' What there is to be shown: a list of failures, in the order in which they came, or `NULL`.
#' @noRd
hub_events <- function(handle) .Call(wrap__hub_events, handle)

#' The number of a call that is still to be sent.
#' @noRd
call_number <- function(handle) .Call(wrap__call_number, handle)

#' Sends the call of this number to whichever of these workers is free first. `what`: what warnings call it.
#' @noRd
call_submit <- function(handle, ranks, task, what, message) .Call(wrap__call_submit, handle, ranks, task, what, message)

#' The answer to a call: `NULL` if it has not ended, or was lost and is retried. It is told until the call is
#' forgotten.
#' @noRd
call_take <- function(handle, task) .Call(wrap__call_take, handle, task)

#' What a call has told before its end, since this was last asked: a list of raw vectors.
#' @noRd
call_progress_events <- function(handle, task) .Call(wrap__call_progress_events, handle, task)

#' Where a call is: the rank of its worker, 0 if it waits for one, `NA` if it has ended.
#' @noRd
call_location <- function(handle, task) .Call(wrap__call_location, handle, task)

#' Nobody wants to know any more what comes of a call: if it has not ended, it is cancelled.
#' @noRd
call_forget <- function(handle, task) .Call(wrap__call_forget, handle, task)

#' Nobody has the object of a call any more: if it has not ended, it is cancelled. For finalizers, which R
#' may run while another function here is at work.
#' @noRd
call_drop <- function(handle, task) .Call(wrap__call_drop, handle, task)

#' R is to be woken when this call has ended: see [`calls_wake`].
#' @noRd
call_notify <- function(handle, task) .Call(wrap__call_notify, handle, task)

#' Waits a little for the end of this call, or for something else that is to be done.
#' @noRd
call_wait <- function(handle, task) .Call(wrap__call_wait, handle, task)

#' The numbers of the calls about which there is something to do: those that are watched and have
#' ended, and those that were lost.
#' @noRd
calls_to_check <- function(handle) .Call(wrap__calls_to_check, handle)

#' From now on, callsWoken(number) is called in these loops of package 'later' when there is something
#' to do about a call.
#' @noRd
calls_wake <- function(handle, number, loops) .Call(wrap__calls_wake, handle, number, loops)

#' How often tasks are retried, and whether the first loss is an error: those of this job, or, if that is 0, all that
#' have no policy of their own.
#' @noRd
hub_policy <- function(handle, job, retries, raises) .Call(wrap__hub_policy, handle, job, retries, raises)

#' The losses that were dealt with and that R has not noted: a list of failures, or `NULL`.
#' @noRd
hub_losses <- function(handle) .Call(wrap__hub_losses, handle)

#' R has noted so many of the losses that hub_losses() has told.
#' @noRd
hub_losses_noted <- function(handle, count) .Call(wrap__hub_losses_noted, handle, count)

#' Begins a job. `ranks`: of the nodes, from 1. `common`: a list of the function and a list of arguments
#' that all tasks have. `elements`: a vector without a class, or a function of an element's number.
#' `settings`: a list of `round` (tasks go round the nodes, and not to whoever is free), `shares` (what
#' tasks that are sent together share: `"nothing"`; `"all"`, as in a chunk of parallel's; `"function"`, if
#' that has an environment of its own), `spread` (an element is a list of arguments), `seed` (a function
#' that gives each element's seed, or `NULL`), `seeded` (see [`Values`]),
#' `order` (of the elements, or `NULL`), `singly` (no two tasks cross together), `timeout` (of a task,
#' in seconds), `retries` and `raises` (see [`Policy`]), `noun` (what warnings call a task), `at_once` (if there
#' are no more tasks than nodes, a first step is taken at once).
#' Returns what job_results() does if the job has ended with that, and is closed; otherwise `NULL`.
#' @noRd
job_begin <- function(handle, job, ranks, count, common, elements, settings) .Call(wrap__job_begin, handle, job, ranks, count, common, elements, settings)

#' Gives tasks out and takes answers, for some time. Returns TRUE once all are there, and `NULL`
#' before, or a failure. One with `elements` ends the job, if it is a loss; otherwise it is told until job_made() has
#' the result of these.
#' @noRd
job_step <- function(handle) .Call(wrap__job_step, handle)

#' The result of the elements of which the last failure of job_step() was, to be told no more.
#' @noRd
job_made <- function(handle, value) .Call(wrap__job_made, handle, value)

#' The elements of a message that is out, from 1.
#' @noRd
job_tasks <- function(handle, task) .Call(wrap__job_tasks, handle, task)

#' The answer to a message cannot be read. `value`: the result of its element, if it has only one; several are tried
#' again.
#' @noRd
job_unreadable <- function(handle, task, value) .Call(wrap__job_unreadable, handle, task, value)

#' What has come of the job: a list of its results, the numbers of those that are errors, and of those
#' that are new since this was last asked.
#' @noRd
job_results <- function(handle) .Call(wrap__job_results, handle)

#' How far the job is: tasks, those that have ended, and workers that are busy.
#' @noRd
job_progress <- function(handle) .Call(wrap__job_progress, handle)

#' All workers as they are now: a list of vectors with an element for each.
#' @noRd
hub_status <- function(handle) .Call(wrap__hub_status, handle)

#' The bytes that went to each host, and that came from it.
#' @noRd
hub_bytes <- function(handle) .Call(wrap__hub_bytes, handle)

#' Asks the hosts of these workers what memory their workers take. Returns the number of the question.
#' @noRd
hub_ask_usage <- function(handle, ranks) .Call(wrap__hub_ask_usage, handle, ranks)

#' The answer to that: a list of the bytes resident and of those that are its part of what is shared,
#' of each worker. `NULL`: not yet; waits up to `max_wait` seconds for it. `anyway`: what is known by then.
#' @noRd
hub_usage <- function(handle, question, max_wait, anyway) .Call(wrap__hub_usage, handle, question, max_wait, anyway)

#' What some workers have been at: a list of vectors with an element for each interval, and `now`.
#' @noRd
hub_timeline <- function(handle, ranks) .Call(wrap__hub_timeline, handle, ranks)

#' Asks all agents for their state. Returns the number of the question.
#' @noRd
hub_ask_dump <- function(handle) .Call(wrap__hub_ask_dump, handle)

#' The answers to that, and what is known here. `NULL`: not yet; waits up to `max` seconds for it. `anyway`:
#' what is known by then. A list: of the cluster (a character vector with names), of hosts and of workers (lists of
#' such), of agents (a list of such for each, named by the worker's rank, 0 for the agent itself), and the
#' last events (a list of vectors).
#' @noRd
hub_dump <- function(handle, question, max, anyway) .Call(wrap__hub_dump, handle, question, max, anyway)

#' In a separate process: takes the channel from stdin and returns the packages to attach.
#' @noRd
worker_connect <- function() .Call(wrap__worker_connect)

#' Tells the agent this worker's temporary directory, and whether it can take tasks.
#' @noRd
worker_ready <- function(tempdir, ready) .Call(wrap__worker_ready, tempdir, ready)

#' Serves tasks until there will be no more, which gives `NULL`, or R jumps. SIGINT reaches R while
#' a task runs and at no other time.
#' @noRd
worker_serve <- function() .Call(wrap__worker_serve)

#' Answers the task that R jumped out of with this error. `interrupted`: by an interrupt, so that what
#' else came with it is not begun.
#' @noRd
worker_fail <- function(value, interrupted) .Call(wrap__worker_fail, value, interrupted)

#' In a worker, tells the head something about the task under way before that has ended. Returns whether
#' there is one.
#' @noRd
worker_report <- function(bytes) .Call(wrap__worker_report, bytes)

#' The bytes of memory that this worker may have; 0 if there is no limit.
#' @noRd
worker_memory_limit <- function() .Call(wrap__worker_memory_limit)

