# The registry of condition classes. All conditions are made by rustclusterCondition(), which refuses any other
# class; the help page `?rustcluster_conditions` is made from this list, and a test compares it with the code.
#
# A list by type (error, warning, message) of character vectors: names are classes without the prefix
# "rustcluster_", values say when the condition is raised and which fields it has, in Markdown.
conditionClasses <- list(
  error = c(
    bad_argument = "An argument is invalid. Field `argument`.",
    not_yet = "The feature does not exist in this version.",
    limits = "The system's limits are too low for this many workers. Fields `what`, `needed`, `available`.",
    start_failed = "The cluster could not be started. Nothing is left of it. Fields `host`, and `report` or `stderr`.",
    no_allocation = paste(
      "[allocation()] was called outside of a batch job, or the variables of the batch engine cannot be read. Field",
      "`variable`, if one of them is wrong."
    ),
    install_failed = paste(
      "[installOnHosts()], or `install = TRUE` of [makeRustCluster()], failed on some hosts. Fields `host`, `report`."
    ),
    worker_lost = paste(
      "A worker died, and its task is not retried (`retries = 0`) or no worker can replace it. Fields `host`, `rank`,",
      "`pid`, `signal` or `status`, `stderr`, `memory_available` (bytes), `oom` (logical; whether the out-of-memory",
      "killer probably killed it), `replaced` (logical), `retry` (seconds until the worker is restarted; only if it",
      "will be)."
    ),
    element_failed = paste(
      "The function raised an error for an element of [clusterLapply()]. Fields `index`, `indices`, `results`,",
      "`parent`."
    ),
    aborted = paste(
      "A call or an element jumped to top level, by `stop()` with a condition that is no error (field `parent`) or by",
      "`invokeRestart(\"abort\")`."
    ),
    task_failed = paste(
      "A task's worker died on all attempts. Fields `index`, `losses`, `results`, `failures`: see",
      "[rustcluster_faults]."
    ),
    cancelled = "A call of [clusterSubmit()] was cancelled.",
    call_failed = "The value of a call of [clusterSubmit()] could not be sent, or the call was interrupted.",
    timeout = "A task exceeded `timeout`. Fields `host`, `rank`, `index`, `results`, `failures`.",
    host_failed = "The agent of a host died, or the connection to it was lost. Fields `host`, `rank`.",
    job_ended = paste(
      "The batch job of a worker ended while the worker had a task, and no other worker can run the task. Fields",
      "`host`,",
      "`rank`, `reason`."
    ),
    protocol = paste(
      "A result could not be read: it is damaged, or needs a package or memory that is missing here. Fields `parent`;",
      "from a verb also `results`, `failures`."
    ),
    run_incomplete = paste(
      "Results were requested of a run of which elements are missing. Fields `dir`, `state`, `missing` (their",
      "number)."
    ),
    run_failed = paste(
      "The runner of a run could not be started, or failed at its start. Fields `dir`, `parent` (the runner's error,",
      "if it is known)."
    ),
    no_task = "A result was to be received, but no task is outstanding.",
    dashboard_failed = paste(
      "The dashboard could not be opened at this address (fields `host`, `port`), or the runner of a run does not",
      "answer (field `dir`)."
    ),
    busy = "The cluster is busy with another call from this session.",
    stopped = "The cluster, or this node, has been stopped.",
    forked = "The cluster belongs to the process that this one was forked from.",
    no_cluster = "There is no cluster of this id that waits for a session. Field `id`.",
    in_use = "Another session is connected to the cluster that was to be reattached. Field `id`.",
    restored = "The cluster was saved and loaded. It belongs to another session.",
    run_differs = paste(
      "The directory of `.store` has the results of another call. Fields `dir`, `differs` (character; what differs)."
    ),
    run_locked = "Another process computes the run. Fields `dir`, `pid`, `host`.",
    run_write_failed = "Results cannot be written, for example because the disk is full. Fields `dir`, `reason`.",
    run_unreadable = "A directory has no run, or one that this version cannot read. Field `dir`.",
    run_damaged = "A saved result is damaged. Fields `dir`, `file`.",
    not_computed = "An element of a run has no result yet. Fields `dir`, `index`.",
    agent_failed = paste(
      "An agent cannot go on. It is raised in the agent's own R process; the head reports `rustcluster_host_failed` or",
      "`rustcluster_start_failed`."
    )
  ),
  warning = c(
    worker_lost = paste(
      "A worker died and is being replaced (field `replaced`) or could not be restored (`retry`). Its task, if it had",
      "one, is retried; the failures of a task that is not retried are in its error. Fields as of the error."
    ),
    worker_replaced = paste(
      "A worker ended or did not respond when its task was interrupted, and was restarted. Fields `rank`, `host`,",
      "`pid` (of the process that has ended), `reason` (why the task was interrupted)."
    ),
    host_failed = "A host was lost, or is left out because its workers died again and again. Fields `host`, `reason`.",
    state_not_kept = paste(
      "Exports and set-up calls exceed `setup_log_limit`: lost workers of a host can no longer be replaced (field",
      "`host`), or hosts can no longer join the cluster or be reconnected."
    ),
    not_recorded = paste(
      "A change of a cluster with `linger` could not be recorded: [reattachCluster()] does not know of it."
    ),
    left_behind = "A process that a worker started detached and still runs. Fields `host`, `rank`, `pid`, `command`.",
    stop_timeout = paste(
      "Idle workers did not end within `stop_timeout` seconds of `stopCluster()` and were killed. Fields `rank`",
      "(integer, of all of them), `host`."
    ),
    growth_stopped = paste(
      "No more jobs of an adaptive launcher are submitted, because several in a row have failed. Fields `launcher`",
      "(its number), `reason`."
    ),
    run_damaged = "Saved results are damaged and are computed again. Fields `dir`, `indices`.",
    not_exported = paste(
      "The function of [startRun()], or one that is sent with it, uses variables of the global environment that are",
      "not exported. Field `names`."
    ),
    run_temporary = "The directory of [startRun()] will be removed when this session ends. Field `dir`.",
    run_workers_left = paste(
      "The workers of a cancelled run, which wait for the next runner, could not be ended. Fields `dir`, `id` (of",
      "their cluster)."
    ),
    not_saved = paste(
      "A host could not save results (`.save = \"hosts\"`): its workers send them without. Fields `host`, `reason`."
    ),
    host_left_out = "A host could not be started, and `on_failure = \"warn\"`. Fields `host`, `report`.",
    dashboard_exposed = "Other machines can reach the dashboard. Fields `host`, `port`.",
    deprecated = paste(
      "An argument was given by its old name. It is raised once a session for each argument, and inherits from",
      "`deprecatedWarning`. Fields `old`, `new`."
    ),
    versions = "A host runs another version of R. Field `host`."
  ),
  message = c(
    host_draining = paste(
      "The batch job of a host is about to end: its workers get no new tasks. Fields `host`, `reason`,",
      "`seconds` (until",
      "the end, if they are known)."
    ),
    hint = paste(
      "A worker lacks a variable, function or package that this session has. It is raised once a session for each",
      "name, before the error of a function of parallel. Field `name`."
    ),
    host_back = "A lost host is back.",
    run_waiting = "Results cannot be written at present, and wait on the hosts. Fields `dir`, `reason`.",
    job_renewed = "The job of a host has ended, and another has been submitted. Field `host`.",
    host_joined = "A host that had not started when `makeRustCluster()` returned has joined (`wait`). Field `host`.",
    reattached = "A cluster of a saved session was connected to this session at its first use. Field `id`.",
    run_not_listed = "[listRuns()] will not show a run: its list cannot be written. Field `dir`.",
    worker_back = "A worker that could not be restored at first is back."
  )
)

# The help page's lists, as roxygen2 reads them.
conditionsHelp <- function() {
  describe <- function(type) {
    of_type <- conditionClasses[[type]]
    c("\\describe{", sprintf("  \\item{`rustcluster_%s`}{%s}", names(of_type), of_type), "}")
  }
  c(
    "@section Errors:",
    "Every error inherits from `rustcluster_error`. Its first class is one of", describe("error"),
    "@section Warnings:",
    "Every warning inherits from `rustcluster_warning`. Its first class is one of", describe("warning"),
    "@section Messages:",
    "Every message inherits from `rustcluster_message`. Its first class is one of", describe("message")
  )
}

#' Condition classes
#'
#' Errors, warnings and messages of this package have classes, so that code can handle each kind by itself, as with
#' [tryCatch()] and [withCallingHandlers()]. Their fields are elements of the condition object.
#'
#' @eval conditionsHelp()
#' @examples
#' tryCatch(makeRustCluster(0), rustcluster_bad_argument = function(e) e$argument)
#' @seealso [makeRustCluster()]
#' @name rustcluster_conditions
NULL
