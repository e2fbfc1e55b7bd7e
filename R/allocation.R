# allocation(): the nodes that a batch engine has given to the job in which this session runs.

#' The nodes of this batch job
#'
#' A launcher, for a session that runs in a batch job: starts one agent on each node that the batch engine has given to
#' the job, with a worker for each core that the job has there. Nodes and cores come from the variables of the engine.
#' The agents are started by the engine's own launcher, whose stdin and stdout is the connection: no port is opened,
#' and the engine accounts for the agents and ends them with the job.
#'
#' | engine | nodes and cores | launcher |
#' |---|---|---|
#' | Slurm | `SLURM_JOB_NODELIST`, `SLURM_JOB_CPUS_PER_NODE` | `srun`, as steps that overlap others |
#' | PBS | `PBS_NODEFILE`, `PBS_NUM_PPN` or `NCPUS` | `ssh`, since those of PBS pass on no stdin |
#' | Grid Engine | `PE_HOSTFILE` | `qrsh -inherit` |
#' | LSF | `LSB_MCPU_HOSTS` or `LSB_DJOB_HOSTFILE` | `blaunch` |
#'
#' If variables of several engines are set, the first engine of this table counts. Of a node that this session runs on,
#' the agent is a child of the session, unless the session runs in a job step with fewer cores than the job has there.
#'
#' The agents use the `Rscript` and the libraries of this session: nodes of a job share these by a file system. If they
#' do not, set `rscript` and `rlibs`.
#'
#' @param workers (integer) The number of workers on each node: one number, or one for each node, in the order in which
#'   `print()` shows the nodes. Default: a worker for each `threads` cores that the job has on the node.
#' @param launcher (character) `"ssh"`, or a command line that starts a program on a node, with `"{{ host }}"` in place
#'   of the node's name: see [commandLauncher()]. Default: the launcher of the engine.
#' @param rscript (character) The `Rscript` command of the nodes. Default: that of this session.
#' @param rlibs (character) Libraries of the workers. Default: those of this session.
#' @param rscript_envs,threads,renice,start_method Settings of the nodes, as in [makeRustCluster()]. Default: the
#'   arguments of [makeRustCluster()].
#' @param x A launcher.
#' @param ... Ignored.
#'
#' @return A launcher, for `spec` of [makeRustCluster()], also in a list together with other hosts and launchers.
#'   `print()` shows the nodes and the command lines.
#' @section Errors:
#' `rustcluster_no_allocation`: this session runs in no batch job, or a variable of the engine cannot be read.
#' `rustcluster_bad_argument`.
#' @seealso [commandLauncher()]
#' @examples
#' \dontrun{
#' # In a script that `sbatch --nodes=4 --ntasks-per-node=1 --cpus-per-task=64` runs:
#' cl <- makeRustCluster(allocation())
#' }
#' @export
allocation <- function(workers = NULL, launcher = NULL, rscript = NULL, rlibs = NULL, rscript_envs = NULL,
                       threads = NULL, renice = NULL, start_method = NULL) {
  settings <- launcherSettings(list(
    rscript = rscript, rlibs = rlibs, rscript_envs = rscript_envs, threads = threads, renice = renice,
    start_method = start_method
  ))
  if (!isUnset(launcher)) launcher <- nodeLauncher(launcher)
  nodes <- allocatedNodes()
  structure(
    c(nodes, list(
      workers = workersOfNodes(workers, nodes$cores, settings$threads),
      launcher = if (isUnset(launcher)) engineLaunchers[[nodes$engine]] else launcher,
      settings = c(settings, nodeDefaults()[setdiff(c("rscript", "rlibs"), names(settings))])
    )),
    class = c("rustcluster_allocation", "rustcluster_launcher")
  )
}

# Returns the settings by which a node uses the same R and the same libraries as this session.
nodeDefaults <- function() {
  list(
    rscript = file.path(R.home("bin"), "Rscript"),
    rlibs = unique(c(dirname(getNamespaceInfo("rustcluster", "path")), .libPaths()))
  )
}

workersOfNodes <- function(workers, cores, threads) {
  workers <- plain(workers)
  if (isUnset(workers)) return(pmax(1L, cores %/% if (is.null(threads)) 1L else threads))
  if (!is.numeric(workers) || !length(workers) %in% c(1L, length(cores))) {
    badArgument("workers", "must be one number of workers, or one for each of the ", length(cores), " nodes")
  }
  counts <- vapply(unname(workers), count, 0L, "workers", maxWorkers)
  rep(counts, length.out = length(cores))
}

# The place of a node's name in a command line.
nodePlace <- "[{][{] *host *[}][}]"

# Checks the argument `launcher` of allocation().
nodeLauncher <- function(launcher) {
  launcher <- texts(launcher, "launcher")
  if (identical(launcher, "ssh")) return(launcher)
  command <- commandLine(gsub(nodePlace, "{{host}}", launcher), "launcher")
  if (!any(grepl(nodePlace, command))) {
    badArgument("launcher", "must be \"ssh\", or a command line with \"{{ host }}\" in place of the node's name")
  }
  command
}

# The launchers of the engines, as the argument `launcher` of allocation(). "{{ cores }}": the cores of the job on the
# node.
engineLaunchers <- list(
  Slurm = c(
    "srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--nodelist={{ host }}",
    # Steps of several nodes, and of other programs of the job, run at once.
    "--overlap",
    # All cores and all memory that the job has on the node.
    "--cpus-per-task={{ cores }}", "--mem=0",
    # The stream is binary, and each side waits for the other.
    "--unbuffered", "--input=all", "--output=all", "--error=all",
    "--export=ALL", "--mpi=none", "--kill-on-bad-exit=0", "{{ command }}"
  ),
  PBS = "ssh",
  "Grid Engine" = c("qrsh", "-inherit", "-noshell", "-V", "{{ host }}", "{{ command }}"),
  LSF = c("blaunch", "-z", "{{ host }}", "-no-shell", "{{ command }}")
)

# Variables by which sbatch and srun give options to a further srun. Labels of lines would break the stream, files would
# take it away, and a binding to the cores of an outer step would leave workers without cores.
srunVariables <- c(
  "SLURM_LABELIO", "SLURM_STDINMODE", "SLURM_STDOUTMODE", "SLURM_STDERRMODE", "SLURM_UNBUFFEREDIO", "SLURM_PTY_PORT",
  "SLURM_CPU_BIND", "SLURM_CPU_BIND_LIST", "SLURM_CPU_BIND_TYPE", "SLURM_CPU_BIND_VERBOSE", "SLURM_DISTRIBUTION",
  "SLURM_HOSTFILE", "SLURM_EXACT", "SLURM_EXCLUSIVE", "SLURM_MULTI_PROG", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU",
  "SLURM_MEM_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TIMELIMIT", "SLURM_WAIT"
)

#' @export
launcherEntries.rustcluster_allocation <- function(launcher) {
  command <- launcher$launcher
  env <- if (launcher$engine == "Slurm") structure(rep(NA_character_, length(srunVariables)), names = srunVariables)
  lapply(seq_along(launcher$nodes), function(i) {
    node <- launcher$nodes[[i]]
    way <- if (launcher$own[[i]]) {
      list(local = TRUE)
    } else if (!identical(command, "ssh")) {
      words <- gsub("[{][{] *cores *[}][}]", launcher$cores[[i]], gsub(nodePlace, node, command))
      list(launcher = stdioLauncher(words, c(character(), env)))
    }
    list(settings = c(list(host = node), launcher$settings, way), workers = launcher$workers[[i]])
  })
}

#' @rdname allocation
#' @export
print.rustcluster_allocation <- function(x, ...) {
  n <- length(x$nodes)
  cat(
    "allocation of ", x$engine, if (!is.na(x$job)) paste0(", job ", x$job), ": ", n, ngettext(n, " node", " nodes"),
    ", ", sum(x$cores), ngettext(sum(x$cores), " core", " cores"), "\n", sep = ""
  )
  printCommands(x)
  invisible(x)
}
