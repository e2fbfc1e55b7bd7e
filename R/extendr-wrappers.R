#' Returns the number of cores that this process may use, by affinity, cgroups and the variables of batch
#' schedulers.
#' @noRd
usable_cores <- function() .Call(wrap__usable_cores)

#' Returns whether an address belongs to an interface of this machine. Of the loopback addresses only the usual
#' one counts, because others may be forwarded to other machines.
#' @noRd
is_own_address <- function(text) .Call(wrap__is_own_address, text)

#' Returns the addresses by which other machines may reach this one.
#' @noRd
own_addresses <- function() .Call(wrap__own_addresses)

#' Takes over stdin and stdout, and receives from the head what to start. Returns a list of the packages to
#' attach, of the packages that are left to the workers, and of whether workers are forked. `tempdir`: the
#' temporary directory of this process.
#' @noRd
agent_greet <- function(package, r_version, platform, tempdir) .Call(wrap__agent_greet, package, r_version, platform, tempdir)

#' Goes on in a child of this process, which ends when the head does, so that the child can outlive the head. To be
#' called before this process has a second thread. Returns the pid of the first process.
#' @noRd
agent_split <- function() .Call(wrap__agent_split)

#' Connects stdin and stdout of this process to the agent that waits on this host in the directory of this name, until
#' either side ends. Returns `NULL`, or the reason why there is no connection.
#' @noRd
agent_relay <- function(name) .Call(wrap__agent_relay, name)

#' Connects this process to the head, as the file at `path` says, and makes that connection its stdin and stdout.
#' Returns `NULL`, or the status with which the process has to end; the reason has been written to stderr. To be
#' called before this process has a second thread.
#' @noRd
agent_dial <- function(path) .Call(wrap__agent_dial, path)

#' Makes this process execute `command` when it ends. The caller then ends R. The new program continues with
#' the same head, and leaves the packages `after` to the workers.
#' @noRd
agent_restart <- function(command, after) .Call(wrap__agent_restart, command, after)

#' Makes the agent start workers as separate R sessions, because this process must not be forked.
#' @noRd
agent_spawn <- function() .Call(wrap__agent_spawn)

#' Returns whether the code in a shared object can read values that differ between processes. Returns `FALSE`
#' if that is unknown.
#' @noRd
code_reads_sources <- function(path) .Call(wrap__code_reads_sources, path)

#' Reports to the head that nothing can be started, and the reason.
#' @noRd
agent_fail <- function(reason) .Call(wrap__agent_fail, reason)

#' Starts the workers and serves them. Returns `TRUE` in a forked worker, and `FALSE` in the agent when the
#' cluster has ended.
#' @noRd
agent_run <- function() .Call(wrap__agent_run)

#' Checks whether the limits of the system allow this number of workers on this machine.
#' @noRd
limits_check <- function(workers) .Call(wrap__limits_check, workers)

#' Starts the log of this session, as `RUSTCLUSTER_LOG` says.
#' @noRd
log_start <- function() .Call(wrap__log_start)

#' Starts the agents of a cluster and returns its handle at once. `hosts`: for each host a list of host,
#' command and env (a named vector; NA removes a variable), or of host and dial, the number of the launcher whose
#' agent dials back (`lingers`: the name of the directory of an agent that has workers and dials to its next head). `buffer_limit`: the bytes of results that the head buffers; further results stay on their
#' hosts.
#' @noRd
hub_start <- function(hosts, package, r_version, platform, buffer_limit) .Call(wrap__hub_start, hosts, package, r_version, platform, buffer_limit)

#' Listens for agents that dial back, on one port between `port_from` and `port_to` (0 for any) at all
#' `addresses`. `keys`: the key of each launcher, in hexadecimal, by the number of the launcher. A later call
#' without addresses only sets the keys. Returns a list with the port.
#' @noRd
hub_listen <- function(handle, addresses, port_from, port_to, keys) .Call(wrap__hub_listen, handle, addresses, port_from, port_to, keys)

#' Sets the key of a cluster that lingers, in hexadecimal: agents use it when they have lost their head. To be called
#' before hub_listen().
#' @noRd
hub_cluster_key <- function(handle, key) .Call(wrap__hub_cluster_key, handle, key)

#' Listens for agents whose connections a gateway passes on to a Unix socket at `path`. hub_listen() sets the keys.
#' @noRd
hub_listen_unix <- function(handle, path) .Call(wrap__hub_listen_unix, handle, path)

#' Returns whether all agents have greeted or failed; waits up to one slice for that.
#' @noRd
hub_greeted <- function(handle) .Call(wrap__hub_greeted, handle)

#' Returns the known facts of all hosts: a list of vectors with an element for each host.
#' @noRd
hub_hosts <- function(handle) .Call(wrap__hub_hosts, handle)

#' Keeps the set-up log in a file at `path`, up to `max_bytes` bytes, so that hosts can join after the start.
#' `start_timeout`: the number of seconds that such a host may take. `reconnects`: whether lost hosts are
#' reconnected, too.
#' @noRd
hub_keep_setup_log <- function(handle, path, max_bytes, start_timeout, reconnects) .Call(wrap__hub_keep_setup_log, handle, path, max_bytes, start_timeout, reconnects)

#' Returns the ranks of the workers whose hosts have not joined yet, and still may. With `wait`, waits up to one
#' slice until a worker joins.
#' @noRd
hub_awaited <- function(handle, wait) .Call(wrap__hub_awaited, handle, wait)

#' Sends each agent its plan. `plans`: for each agent `NULL`, which stops it, or a list of ranks, packages,
#' outfile, renice, mode, spawn, heartbeat_timeout (in milliseconds), chunk_cache_bytes, setup_log_bytes and
#' memory_limit (in bytes; 0 for no limit), setup (the time limit of a replacement's start, in milliseconds; 0
#' for none), stop_timeout (in milliseconds), local (whether the host is this machine) and xdr. `timeout`: the
#' time limit of a task in seconds.
#' @noRd
hub_go <- function(handle, plans, timeout) .Call(wrap__hub_go, handle, plans, timeout)

#' Launches the agents of further hosts. `hosts`: as for hub_start(). From now on hub_greeted(), hub_progress() and
#' hub_leave_out() with agent 0 are about these hosts.
#' @noRd
hub_add_hosts <- function(handle, hosts) .Call(wrap__hub_add_hosts, handle, hosts)

#' Sends each agent of the hosts that were added its plan, as hub_go() does. The ranks of the workers follow those of
#' the cluster.
#' @noRd
hub_go_more <- function(handle, plans) .Call(wrap__hub_go_more, handle, plans)

#' The hosts that were added are part of the cluster: what happens to them from now on is reported.
#' @noRd
hub_added <- function(handle) .Call(wrap__hub_added, handle)

#' Returns whether the agents of all hosts after the first `count` have ended; waits up to one slice for that.
#' @noRd
hub_are_over <- function(handle, count) .Call(wrap__hub_are_over, handle, count)

#' Returns the number of workers that are ready; waits up to one slice for more. `tolerant`: whether failed
#' hosts and workers count as done, instead of being an error.
#' @noRd
hub_progress <- function(handle, tolerant) .Call(wrap__hub_progress, handle, tolerant)

#' Makes the numbers of tasks of this head differ from those of the heads that the cluster has had, of which there are
#' `generation`. To be called before hub_go().
#' @noRd
hub_follow <- function(handle, generation) .Call(wrap__hub_follow, handle, generation)

#' Writes what the next head needs to know of lost hosts: the numbers of those that miss a set-up call, because they are
#' lost, to the file `missed`, and the random number states of all workers to the file `seeds`.
#' @noRd
hub_record <- function(handle, missed, seeds) .Call(wrap__hub_record, handle, missed, seeds)

#' Writes the random number state `seed`, with which a worker is to begin that has not joined yet, to the file of
#' hub_record().
#' @noRd
hub_record_first_seed <- function(handle, rank, seed) .Call(wrap__hub_record_first_seed, handle, rank, seed)

#' Takes the random number states of workers of lost hosts from the file `path`. To be called after hub_go().
#' @noRd
hub_take_seeds <- function(handle, path) .Call(wrap__hub_take_seeds, handle, path)

#' Fills the set-up log from the logs of the agents, which have had another head. Returns whether that is done; waits up
#' to one slice for it. `begin`: whether to begin it. `end`: whether to give it up.
#' @noRd
hub_take_over <- function(handle, begin, end) .Call(wrap__hub_take_over, handle, begin, end)

#' Disconnects from the agents, which wait for another head.
#' @noRd
hub_leave <- function(handle) .Call(wrap__hub_leave, handle)

#' Leaves out a host, for this reason. With agent 0, leaves out all hosts without a ready worker and, on the
#' other hosts, the workers that are not ready.
#' @noRd
hub_leave_out <- function(handle, agent, reason) .Call(wrap__hub_leave_out, handle, agent, reason)

#' Gives up a host that waits for a batch job, for this reason. Nothing happens if its agent has joined meanwhile.
#' `quiet`: whether the caller reports it.
#' @noRd
hub_give_up_host <- function(handle, agent, reason, quiet) .Call(wrap__hub_give_up_host, handle, agent, reason, quiet)

#' Returns whether a host is lost and will be reconnected.
#' @noRd
hub_reconnects <- function(handle, agent) .Call(wrap__hub_reconnects, handle, agent)

#' Returns why each worker has terminated: a list of failures, with `NULL` for workers that run.
#' @noRd
hub_terminations <- function(handle) .Call(wrap__hub_terminations, handle)

#' Stops these nodes. The cluster is stopped with its last node.
#' @noRd
hub_stop_nodes <- function(handle, ranks) .Call(wrap__hub_stop_nodes, handle, ranks)

#' Drains these nodes: they get no new tasks, and are stopped when they have none left.
#' @noRd
hub_drain <- function(handle, ranks) .Call(wrap__hub_drain, handle, ranks)

#' Removes these nodes at once. Other nodes run their tasks.
#' @noRd
hub_remove <- function(handle, ranks) .Call(wrap__hub_remove, handle, ranks)

#' Returns whether the processes of these nodes, which have been stopped, have ended; waits up to one slice for
#' that.
#' @noRd
hub_ended <- function(handle, ranks) .Call(wrap__hub_ended, handle, ranks)

#' Stops the cluster.
#' @noRd
hub_stop <- function(handle) .Call(wrap__hub_stop, handle)

#' Returns whether nothing is left of a stopped cluster; waits up to one slice for that.
#' @noRd
hub_closed <- function(handle) .Call(wrap__hub_closed, handle)

#' Returns the pid of each worker; NA for workers that have terminated.
#' @noRd
hub_pids <- function(handle) .Call(wrap__hub_pids, handle)

#' Returns the pid of each agent.
#' @noRd
hub_agent_pids <- function(handle) .Call(wrap__hub_agent_pids, handle)

#' Sends a message to a node. `setup_call`: the name of the variable that a set-up call sets (`""`: no
#' particular variable), or `NULL` for any other call. Returns `NULL`, or `TRUE` if the node has not joined yet
#' and the set-up call was only logged.
#' @noRd
hub_send <- function(handle, rank, job, message, setup_call) .Call(wrap__hub_send, handle, rank, job, message, setup_call)

#' Sends the same message to nodes, in this order, and waits up to one slice for their answers. Returns the
#' list of their values: the job is then closed, no R code has run, and no interrupt was handled. Returns
#' `NULL`, without having done anything, if the nodes are of several clusters or contain a node twice. Returns
#' `TRUE` if hub_called() has the answers that have arrived.
#' @noRd
hub_call <- function(handle, nodes, job, message, setup_call) .Call(wrap__hub_call, handle, nodes, job, message, setup_call)

#' Returns the answers that hub_call() has received: the list of their values, for each node whether its value
#' is there, and the last result if it was no answer, as hub_receive_any() returns it, or `NULL`.
#' @noRd
hub_called <- function(handle) .Call(wrap__hub_called, handle)

#' Removes a task after a worker failure whose result is no longer needed.
#' @noRd
hub_forget <- function(handle, task) .Call(wrap__hub_forget, handle, task)

#' Returns the message of a task that ended without an answer. `last`: whether this is the last request for it.
#' @noRd
hub_message <- function(handle, task, last) .Call(wrap__hub_message, handle, task, last)

#' Returns the answer of a node to the oldest outstanding message. Returns `TRUE` if the answer has arrived and
#' hub_read() takes it, and `NULL` if it has not arrived or R has to acknowledge a worker failure first.
#' @noRd
hub_receive <- function(handle, rank) .Call(wrap__hub_receive, handle, rank)

#' Returns the number of the task whose answer is being read or could not be read, and the index of its node.
#' Returns `NULL` if there is no such task.
#' @noRd
hub_reading <- function(handle) .Call(wrap__hub_reading, handle)

#' Returns the answer for which hub_receive() or hub_receive_any() has returned `TRUE`.
#' @noRd
hub_read <- function(handle) .Call(wrap__hub_read, handle)

#' Returns the next answer of any of these nodes: a list of the index of the node and of the answer. `TRUE` and
#' `NULL` have the same meanings as for hub_receive().
#' @noRd
hub_receive_any <- function(handle, nodes) .Call(wrap__hub_receive_any, handle, nodes)

#' Does the same as hub_receive_any(), without waiting, for nodes that may be of several clusters. `ranks` and
#' `node_indices` belong to the nodes of this cluster. If a rank occurs twice, its first index counts.
#' @noRd
hub_poll <- function(handle, ranks, node_indices) .Call(wrap__hub_poll, handle, ranks, node_indices)

#' Waits up to one slice, or until hub_poll() may find an answer in one of these clusters.
#' @noRd
hubs_wait <- function(handles) .Call(wrap__hubs_wait, handles)

#' Returns the rank of each of these nodes, if all are nodes of one cluster.
#' @noRd
cluster_ranks <- function(nodes) .Call(wrap__cluster_ranks, nodes)

#' Cancels the rest of a job. Returns the events that R has to show.
#' @noRd
hub_close_job <- function(handle, job) .Call(wrap__hub_close_job, handle, job)

#' Starts to listen for a connection that shows when an answer has arrived. Returns the port on the loopback
#' address to connect to, and the token, which the connection has to send first. Returns `NULL` if the system
#' has no free port.
#' @noRd
hub_readiness_listen <- function(handle) .Call(wrap__hub_readiness_listen, handle)

#' Accepts the connection that has been opened and has sent the token. Returns whether there is one.
#' @noRd
hub_readiness_accept <- function(handle) .Call(wrap__hub_readiness_accept, handle)

#' Makes the connection readable from now on while the next answer of this worker has arrived. If the task had
#' a worker failure, the retry policy is applied first. Returns `NULL` if there is no connection.
#' @noRd
hub_readiness_point <- function(handle, rank) .Call(wrap__hub_readiness_point, handle, rank)

#' Returns the events that R has to show, in the order in which they happened, as a list of failures, or
#' `NULL`.
#' @noRd
hub_events <- function(handle) .Call(wrap__hub_events, handle)

#' Returns the progress events of tasks that have arrived since the last call, as a list of raw vectors. They
#' are recorded from the first call on.
#' @noRd
hub_take_progress <- function(handle) .Call(wrap__hub_take_progress, handle)

#' Returns the number of a call that has not been sent yet. `keep`: whether agents keep its answer for the next head if
#' this one disconnects.
#' @noRd
call_number <- function(handle, keep) .Call(wrap__call_number, handle, keep)

#' Sends the call with this number to the first of these workers that is idle. `what`: the name of the call in
#' warnings.
#' @noRd
call_submit <- function(handle, ranks, task, what, message) .Call(wrap__call_submit, handle, ranks, task, what, message)

#' Returns the answer to a call: `NULL` if the call has not ended, or is being retried after a worker failure.
#' The same answer is returned until the call is forgotten.
#' @noRd
call_take <- function(handle, task) .Call(wrap__call_take, handle, task)

#' Returns the answers that agents have kept while they had no head, in the order in which they ended: a list of the
#' agents, the numbers of the answers, and the times (seconds since 1970). `NULL`: the agents have not all responded yet;
#' waits up to one slice for that. `ask`: whether to ask them.
#' @noRd
kept_list <- function(handle, ask) .Call(wrap__kept_list, handle, ask)

#' Returns an answer of kept_list(), `FALSE` if it is not there any more, or `NULL` if it has not arrived yet; waits up to
#' one slice for that. `ask`: whether to ask for it.
#' @noRd
kept_read <- function(handle, agent, number, ask) .Call(wrap__kept_read, handle, agent, number, ask)

#' Drops an answer of kept_list(), which has been read.
#' @noRd
kept_drop <- function(handle, agent, number) .Call(wrap__kept_drop, handle, agent, number)

#' Returns the progress events of a call that have arrived since this function was last called, as a list of
#' raw vectors.
#' @noRd
call_progress_events <- function(handle, task) .Call(wrap__call_progress_events, handle, task)

#' Returns the rank of the worker that runs a call; 0 if the call waits for a worker, `NA` if it has ended.
#' @noRd
call_location <- function(handle, task) .Call(wrap__call_location, handle, task)

#' Removes a call whose result is no longer needed. A call that has not ended is cancelled.
#' @noRd
call_forget <- function(handle, task) .Call(wrap__call_forget, handle, task)

#' Removes a call whose object was garbage-collected. A call that has not ended is cancelled. This function is
#' for finalizers, which R may run while another function of this package is running.
#' @noRd
call_drop <- function(handle, task) .Call(wrap__call_drop, handle, task)

#' Requests that R is woken when this call has ended: see [`calls_wake`].
#' @noRd
call_notify <- function(handle, task) .Call(wrap__call_notify, handle, task)

#' Waits up to one slice for the end of this call, or for another event that R has to handle.
#' @noRd
call_wait <- function(handle, task) .Call(wrap__call_wait, handle, task)

#' Returns the numbers of the calls that R has to handle: calls that have ended and for which R is to be woken,
#' and calls whose worker has failed.
#' @noRd
calls_to_check <- function(handle) .Call(wrap__calls_to_check, handle)

#' From now on, these event loops of package 'later' call callsWoken(number) when R has to handle a call.
#' @noRd
calls_wake <- function(handle, number, loops) .Call(wrap__calls_wake, handle, number, loops)

#' Serves the dashboard at this address of this machine. `port`: 0 for any free port. `names`: further names in the
#' `Host` header under which the page may be asked for. Returns a list of the port, the token and whether the address is
#' a loopback address.
#' @noRd
hub_dashboard_open <- function(handle, host, port, names) .Call(wrap__hub_dashboard_open, handle, host, port, names)

#' Allows requests for the dashboard under another name of the host.
#' @noRd
hub_dashboard_allow <- function(handle, name) .Call(wrap__hub_dashboard_allow, handle, name)

#' Serves no dashboard any more.
#' @noRd
hub_dashboard_close <- function(handle) .Call(wrap__hub_dashboard_close, handle)

#' Returns whether a page is open, so that R has to report what only R knows.
#' @noRd
hub_watched <- function(handle) .Call(wrap__hub_watched, handle)

#' Sets what R knows of batch jobs: the indices of their hosts, from 1, their ids and their states.
#' @noRd
hub_batch_jobs <- function(handle, hosts, ids, states) .Call(wrap__hub_batch_jobs, handle, hosts, ids, states)

#' Returns the figures of the dashboard: a list of vectors and lists.
#' @noRd
hub_figures <- function(handle) .Call(wrap__hub_figures, handle)

#' Sets how often tasks are retried, and whether the first worker failure is an error, for this job or, if
#' `job` is 0, for all tasks without another policy.
#' @noRd
hub_policy <- function(handle, job, retries, raises) .Call(wrap__hub_policy, handle, job, retries, raises)

#' Returns the worker failures that were handled and that R has not acknowledged, as a list of failures, or
#' `NULL`.
#' @noRd
hub_losses <- function(handle) .Call(wrap__hub_losses, handle)

#' Acknowledges the first `count` worker failures of hub_losses().
#' @noRd
hub_losses_acknowledge <- function(handle, count) .Call(wrap__hub_losses_acknowledge, handle, count)

#' Sets the number of elements of chunks that are finished, for pages.
#' @noRd
job_count_elements <- function(handle, finished) .Call(wrap__job_count_elements, handle, finished)

#' Starts a job. `ranks`: the ranks of the nodes, from 1. `common`: a list of the function and of a list of
#' arguments that all tasks have. `elements`: a vector without a class, or a function of the index of an
#' element.
#'
#' `settings` is a list of:
#' * `round`: whether tasks are assigned to the nodes in turn, and not to the next idle worker.
#' * `reuse`: the objects that are reused by all tasks of a batch: `"nothing"`; `"all"`, as in a chunk of parallel; or
#'   `"function"`, if that has an environment of its own.
#' * `spread`: whether an element is a list of arguments.
#' * `seed`: a function that returns the seed of an element by its index, or `NULL`.
#' * `seeded`: see [`Values`].
#' * `order`: the order of the elements, or `NULL`.
#' * `singly`: whether each task is sent alone.
#' * `timeout`: the time limit of a task in seconds.
#' * `retries`, `raises`: see [`Policy`].
#' * `noun`: the name of a task in warnings.
#' * `part`, `parts`: what an element of a chunk is called, and the number of all, if they are counted
#'   (job_count_elements()).
#' * `store`, `ids`, `keep`: see storing() of store.rs.
#' * `total`: the number of results, if it is not that of the tasks; `order` then has the index of each task.
#' * `at_once`: whether to run the first step at once, if there are no more tasks than nodes.
#'
#' Returns the value of job_results() if that step has ended the job, which is then closed, and otherwise
#' `NULL`.
#' @noRd
job_begin <- function(handle, job, ranks, count, common, elements, settings) .Call(wrap__job_begin, handle, job, ranks, count, common, elements, settings)

#' Sends tasks and takes answers, for up to one slice. Returns `TRUE` if all results have arrived, `NULL` if
#' not, or a failure. A failure with `elements` that is a worker failure ends the job. Any other is returned
#' again until job_set_result() has set the result of its elements.
#' @noRd
job_step <- function(handle) .Call(wrap__job_step, handle)

#' Sets the result of the elements of the last failure of job_step(), which is not returned again.
#' @noRd
job_set_result <- function(handle, value) .Call(wrap__job_set_result, handle, value)

#' Returns the indices of the elements of an outstanding message, from 1.
#' @noRd
job_tasks <- function(handle, task) .Call(wrap__job_tasks, handle, task)

#' Handles an answer that cannot be read. `value`: the result of the element, if the message has only one;
#' several elements are retried.
#' @noRd
job_unreadable <- function(handle, task, value) .Call(wrap__job_unreadable, handle, task, value)

#' Returns a list of the results, of the indices of those that are errors, and of the indices of those that are
#' new since the last call.
#' @noRd
job_results <- function(handle) .Call(wrap__job_results, handle)

#' Returns a list of the hosts, from 1, that could not save results, and of the reasons.
#' @noRd
job_unsaved <- function(handle) .Call(wrap__job_unsaved, handle)

#' Returns the progress of the job: the numbers of tasks, of finished tasks, and of busy workers.
#' @noRd
job_progress <- function(handle) .Call(wrap__job_progress, handle)

#' Returns the current status of all workers: a list of vectors with an element for each worker.
#' @noRd
hub_status <- function(handle) .Call(wrap__hub_status, handle)

#' Returns the bytes that were sent to each host, and received from it.
#' @noRd
hub_bytes <- function(handle) .Call(wrap__hub_bytes, handle)

#' Requests the memory use of workers from the hosts of these workers. Returns the number of the request.
#' @noRd
hub_ask_usage <- function(handle, ranks) .Call(wrap__hub_ask_usage, handle, ranks)

#' Returns the answer to a request for memory use: a list of the resident bytes of each worker, and of its
#' proportional set size. Returns `NULL` if answers are missing; waits up to `max_wait` seconds for them.
#' `anyway`: whether to return an incomplete answer instead of `NULL`.
#' @noRd
hub_usage <- function(handle, question, max_wait, anyway) .Call(wrap__hub_usage, handle, question, max_wait, anyway)

#' Returns the timeline of some workers: a list of vectors with an element for each interval, and `now`.
#' @noRd
hub_timeline <- function(handle, ranks) .Call(wrap__hub_timeline, handle, ranks)

#' Opens the run with this id. `elements`: the number of its elements. `owner`: the text of the lock, or `""` to
#' read only. Returns an external pointer.
#' @noRd
store_open <- function(dir, run, elements, owner) .Call(wrap__store_open, dir, run, elements, owner)

#' Returns the process that writes to the run: a list of `pid` and `host`, or `NULL`.
#' @noRd
store_owner <- function(dir) .Call(wrap__store_owner, dir)

#' Reads what has been written since. `elements`: the number of elements. `checks`: whether to check results that may
#' not be durable.
#' @noRd
store_refresh <- function(store, elements, checks) .Call(wrap__store_refresh, store, elements, checks)

#' Returns the state of each element: 0 without a result, 1 with a result, 2 with an error.
#' @noRd
store_states <- function(store) .Call(wrap__store_states, store)

#' Returns the numbers of elements with a result and with an error.
#' @noRd
store_counts <- function(store) .Call(wrap__store_counts, store)

#' Returns the indices of the elements that have no result (`missing`) or an error (`failed`). `ids`: the number of each
#' element in the run, or `NULL` if these are the first `count` numbers.
#' @noRd
store_which <- function(store, ids, count, missing, failed) .Call(wrap__store_which, store, ids, count, missing, failed)

#' Returns whether two vectors of numbers have the same type and the same bits. Does not expand compact vectors.
#' @noRd
same_numbers <- function(a, b) .Call(wrap__same_numbers, a, b)

#' Returns a list of the result of an element and of whether it is an error, or `NULL` without a result.
#' @noRd
store_read <- function(store, element) .Call(wrap__store_read, store, element)

#' Returns a list of the list of the results of these elements, `NULL` where there is none, and of the indices of
#' results that are damaged, which the run then forgets. `elements`: integers from 1, or `NULL` for all.
#' @noRd
store_values <- function(store, elements) .Call(wrap__store_values, store, elements)

#' Starts to write results. `interval`: the least time in seconds between two calls of `fdatasync()`. `waits`: whether
#' to try again while results cannot be written.
#' @noRd
store_write <- function(store, r_version, interval, waits) .Call(wrap__store_write, store, r_version, interval, waits)

#' Forgets the results of these elements that are damaged.
#' @noRd
store_check <- function(store, elements) .Call(wrap__store_check, store, elements)

#' Stores the result of an element. `failed`: whether it is an error.
#' @noRd
store_put <- function(store, element, value, failed) .Call(wrap__store_put, store, element, value, failed)

#' Waits for up to one slice until all results are durable. Returns whether they are.
#' @noRd
store_flush <- function(store) .Call(wrap__store_flush, store)

#' Returns why results cannot be written at present, or `""`.
#' @noRd
store_trouble <- function(store) .Call(wrap__store_trouble, store)

#' Ends writing, once all results are durable or cannot be written, and releases the lock.
#' @noRd
store_close <- function(store) .Call(wrap__store_close, store)

#' Renames a file durably.
#' @noRd
replace_durably <- function(from, to) .Call(wrap__replace_durably, from, to)

#' Returns the folder of this host with this name for saved results.
#' @noRd
saved_folder <- function(host_dir, name) .Call(wrap__saved_folder, host_dir, name)

#' Returns the numbers of the elements in a file of records; none if it is no file of this run.
#' @noRd
file_elements <- function(path, run) .Call(wrap__file_elements, path, run)

#' Writes a file: it has either its old content or these bytes. `durable`: whether also after a crash of the machine.
#' @noRd
write_durably <- function(bytes, path, durable) .Call(wrap__write_durably, bytes, path, durable)

#' Returns whether this is the pointer of a store that is open in this session.
#' @noRd
store_is_open <- function(store) .Call(wrap__store_is_open, store)

#' Waits for up to one slice until more results may be stored. Returns whether they may.
#' @noRd
store_room <- function(store) .Call(wrap__store_room, store)

#' Returns the address of an object.
#' @noRd
object_address <- function(object) .Call(wrap__object_address, object)

#' Returns hashes of 16 bytes each (XXH3, 128 bits), as one raw vector: of each element of a vector without a class, or
#' of the value if `whole` is `TRUE`. Equal values have equal hashes, also in other versions of R.
#' @noRd
content_hashes <- function(values, whole) .Call(wrap__content_hashes, values, whole)

#' Requests the state of all agents. Returns the number of the request.
#' @noRd
hub_ask_dump <- function(handle) .Call(wrap__hub_ask_dump, handle)

#' Returns the answers of the agents to a request, and the state of the head. Returns `NULL` if answers are
#' missing; waits up to `max` seconds for them. `anyway`: whether to return an incomplete state instead of
#' `NULL`. The value is a list with the cluster (a named character vector), the hosts and the workers (lists of
#' such vectors), the agents (for each a list of such vectors, named by the ranks of the workers; 0 is the
#' agent itself), and the last events (a list of vectors).
#' @noRd
hub_dump <- function(handle, question, max, anyway) .Call(wrap__hub_dump, handle, question, max, anyway)

#' Gives back the hosts `agents` of a launcher, all but `min` of them, after `idle` seconds in which their workers have
#' nothing to do; `Inf`: never.
#' @noRd
hub_adapt <- function(handle, agents, min, idle) .Call(wrap__hub_adapt, handle, agents, min, idle)

#' Gives agents that connect from now on to these hosts first.
#' @noRd
hub_prefer <- function(handle, agents) .Call(wrap__hub_prefer, handle, agents)

#' Keeps these nodes, although they have nothing to do, for a verb that is about to send them tasks, until
#' hub_close_job(). Without ranks, ends that.
#' @noRd
hub_hold <- function(handle, ranks) .Call(wrap__hub_hold, handle, ranks)

#' Returns what waits for workers of the hosts `agents`: a list of `tasks`, the number of waiting tasks and calls that
#' may run on some of them, without those for which workers are there or are starting, and `hosts`, whether any of these
#' may run on each.
#' @noRd
hub_demand <- function(handle, agents) .Call(wrap__hub_demand, handle, agents)

#' Returns the jobs of adaptive launchers of which a worker has come up since the last call: a list of `agent` and
#' `job`, the engine's name for it or NA.
#' @noRd
hub_job_arrivals <- function(handle) .Call(wrap__hub_job_arrivals, handle)

#' Starts a process in the background and returns its handle, or a text that says why it cannot be started.
#' `env`: a named vector; NA removes a variable. `input`: raw bytes for its stdin, which stays open if
#' `open_input`. `heartbeat`: seconds between empty lines on its stdin, or 0. `max_silence`: seconds without
#' output, after its first, after which it is killed, or 0. `kill_on_drop`: whether it is killed when the handle is collected;
#' otherwise its stdin ends, and it gets SIGTERM when this process ends.
#' @noRd
background_start <- function(command, env, input, open_input, heartbeat, max_silence, kill_on_drop) .Call(wrap__background_start, command, env, input, open_input, heartbeat, max_silence, kill_on_drop)

#' Waits for the end of a background process, or with `or_output` for more on its stdout, at most `wait` seconds
#' or one slice. Returns whether it has ended.
#' @noRd
background_wait <- function(handle, wait, or_output) .Call(wrap__background_wait, handle, wait, or_output)

#' Returns what is known of a background process: pid, status (`NULL` while it runs, `NA` after a signal), signal,
#' stdout and stderr (raw), truncated, silent.
#' @noRd
background_report <- function(handle) .Call(wrap__background_report, handle)

#' Sends a line to a background process whose stdin is open. Returns whether it can still read it.
#' @noRd
background_send <- function(handle, line) .Call(wrap__background_send, handle, line)

#' Ends the stdin of a background process.
#' @noRd
background_end_input <- function(handle) .Call(wrap__background_end_input, handle)

#' Kills a background process and its process group.
#' @noRd
background_kill <- function(handle) .Call(wrap__background_kill, handle)

#' Ends the stdin of `other`, or with `kill` kills it, once the process behind `handle` has ended. If that was
#' killed for its silence, `other` is killed.
#' @noRd
background_on_end <- function(handle, other, kill) .Call(wrap__background_on_end, handle, other, kill)

#' Starts a process that outlives this session, in a session of its own. It locks the file `lock` until it ends,
#' appends its output to the file `log`, and renames the files `from` to `to` once it has the lock. Returns its pid,
#' `NULL` if another process has the lock, or a text that says why the process cannot be started. `env`: a named
#' vector; NA removes a variable.
#' @noRd
detached_start <- function(command, env, directory, lock, log, from, to) .Call(wrap__detached_start, command, env, directory, lock, log, from, to)

#' Keeps the lock with which this detached process was started. Returns `NULL`, or a text that says why there is no
#' lock.
#' @noRd
detached_keep_lock <- function() .Call(wrap__detached_keep_lock)

#' Returns whether any process has this lock, or a text that says why that is unknown.
#' @noRd
detached_is_locked <- function(lock) .Call(wrap__detached_is_locked, lock)

#' Waits until the content of a file, or the entries of a directory, would survive a crash of the machine. Returns
#' `NULL`, or a text that says why that failed.
#' @noRd
file_sync <- function(path) .Call(wrap__file_sync, path)

#' Starts a guard in a session of its own. It ends the jobs when it is released, or when this process ends.
#' @noRd
guard_start <- function(command) .Call(wrap__guard_start, command)

#' Returns the process id of a guard.
#' @noRd
guard_pid <- function(guard) .Call(wrap__guard_pid, guard)

#' Sends a line to a guard. Returns whether the guard is there to read it.
#' @noRd
guard_send <- function(guard, line) .Call(wrap__guard_send, guard, line)

#' Tells a guard to end the jobs.
#' @noRd
guard_release <- function(guard) .Call(wrap__guard_release, guard)

#' Returns whether a guard has ended; waits up to `max` seconds for that, and not longer than one slice.
#' @noRd
guard_ended <- function(guard, max) .Call(wrap__guard_ended, guard, max)

#' In a separate process, takes the channel from stdin and returns the packages to attach.
#' @noRd
worker_connect <- function() .Call(wrap__worker_connect)

#' Reports the temporary directory of this worker to the agent, and whether the worker can take tasks.
#' @noRd
worker_ready <- function(tempdir, ready) .Call(wrap__worker_ready, tempdir, ready)

#' Serves tasks. Returns `NULL` when no more tasks will come, or the token if R jumps. SIGINT reaches R only
#' while a task runs.
#' @noRd
worker_serve <- function() .Call(wrap__worker_serve)

#' Answers the task out of which R has jumped with this error. `interrupted`: whether an interrupt was the
#' reason. The remaining tasks of its batch are then not started.
#' @noRd
worker_fail <- function(value, interrupted) .Call(wrap__worker_fail, value, interrupted)

#' In a worker, tells the head of an error that the current task has raised and whose answer is a value. `message`: a
#' string, or any other value if the error has none. Returns whether there is a channel to the head.
#' @noRd
worker_raised <- function(message) .Call(wrap__worker_raised, message)

#' In a worker, sends a progress event of the current task to the head. Returns whether there is a current
#' task.
#' @noRd
worker_report <- function(bytes) .Call(wrap__worker_report, bytes)

#' Returns the memory limit of this worker in bytes; 0 for no limit.
#' @noRd
worker_memory_limit <- function() .Call(wrap__worker_memory_limit)

#' Serves as a gateway until the head has closed stdin or is silent. Returns why it has ended. `cancel`: the path
#' of a script, or "". `address`: an IP address. `ports`: the first and the last port of a range.
#' @noRd
gateway_run <- function(socket, address, ports, heartbeat_timeout, max_connections, cancel, directory) .Call(wrap__gateway_run, socket, address, ports, heartbeat_timeout, max_connections, cancel, directory)

