# The log of what happens inside: which variables carry its settings to other hosts, and the help page.

#' Log what happens inside
#'
#' For finding out why something hangs, is slow or fails. With the environment variable `RUSTCLUSTER_LOG`, this
#' session, the agents and the workers of clusters that are made from then on each write a log file. It is off by
#' default.
#'
#' `Sys.setenv(RUSTCLUSTER_LOG = "debug")` before [makeRustCluster()] is enough. The value is a level, or several
#' directives with commas between them, each a part of the package, `=` and a level. Levels are `error`, `warn`,
#' `info`, `debug`, `trace` and `off`. Parts are the modules of the Rust code, below `rustcluster::head`,
#' `rustcluster::agent`, `rustcluster::worker` and `rustcluster::platform`:
#' \tabular{ll}{
#'   `"info"` \tab starts and ends of processes, failures, attempts at tasks that failed \cr
#'   `"debug"` \tab and the steps of each task: submitted, sent, received, answered, cancelled \cr
#'   `"trace"` \tab and each frame and each grant of credit \cr
#'   `"rustcluster::head=trace"` \tab all of this session, nothing of agents and workers \cr
#'   `"info,rustcluster::agent=debug"` \tab more of the agents than of the others \cr
#'   `"rustcluster::worker"` \tab all of the workers
#' }
#' Each call of [makeRustCluster()] reads the variables again; without `RUSTCLUSTER_LOG`, it ends the log of this
#' session. Agents get the variables from this session, also on other hosts. The argument `rscript_envs` can set others
#' for them, or unset them (`NA`).
#'
#' @section Files:
#' `RUSTCLUSTER_LOG_DIR` is the directory on each host, an absolute path; a missing directory is created. Default: that
#' of temporary files, `TMPDIR` or `/tmp`. Each process has a file of its own, which only its user can read:
#' `rustcluster-HOST-head-PID.log`, `rustcluster-HOST-agent-PID.log`, `rustcluster-HOST-workerRANK-PID.log`.
#' [clusterDump()] names those of this session and of the agents. Their size is not limited, and nothing removes them:
#' at level `debug`, a task, or a batch of short tasks, takes about 1 kB in all files together.
#'
#' Nothing is ever logged on standard output, which is an agent's connection, or standard error, whose end
#' belongs to error messages.
#'
#' A line has the time (UTC), the level, the process, the part, and what happened, with fields. Fields `task` and
#' `rank` are the same in all files of a cluster, so that `grep -w task=17` follows a task; `attempt` counts from 1.
#' Short tasks that are sent as a batch share a number. Clusters of one session share its file, and number their tasks
#' each from 1.
#' ```
#' 2026-01-31T12:00:00.123456Z DEBUG head@pi[71] rustcluster::head::scheduler: task submitted task=17 rank=3 job=2
#' 2026-01-31T12:00:00.125310Z DEBUG worker 3@n1[99] rustcluster::worker::channel: task received task=17 bytes=312
#' ```
#'
#' What tasks, results, environment variables and files contain, and what workers print, is never logged.
#' The names of hosts are.
#'
#' @section Errors:
#' `rustcluster_bad_argument`, which names the variable, if this session cannot use one of the two. An agent or a
#' worker that cannot write its file goes on without one and says so on its standard error; [clusterDump()] shows
#' agents without a file.
#' @seealso [clusterDump()]
#' @examples
#' Sys.setenv(RUSTCLUSTER_LOG = "debug", RUSTCLUSTER_LOG_DIR = tempfile("log"))
#' cl <- makeRustCluster(1)
#' parallel::clusterApply(cl, 1, sqrt)
#' parallel::stopCluster(cl)
#' files <- dir(Sys.getenv("RUSTCLUSTER_LOG_DIR"), full.names = TRUE)
#' files
#' tail(readLines(grep("head", files, value = TRUE)))
#' Sys.unsetenv(c("RUSTCLUSTER_LOG", "RUSTCLUSTER_LOG_DIR"))
#' @name rustcluster_log
NULL

# Returns the environment variables with which agents log as this session does.
logVariables <- function() {
  values <- Sys.getenv(c("RUSTCLUSTER_LOG", "RUSTCLUSTER_LOG_DIR"))
  values[nzchar(values)]
}
