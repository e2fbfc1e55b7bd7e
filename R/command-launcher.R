# commandLauncher(): a host that any command line starts.

#' Start a host by a command
#'
#' A launcher: a host whose agent is started by a command of yours. The command runs its last arguments elsewhere, as
#' in a container, a pod or a namespace, and its stdin and stdout are the connection to the agent. No port is opened
#' and no ssh is needed.
#'
#' The command must pass stdin and stdout on unchanged: `docker run`, `podman run` and `kubectl exec` need `-i`, and
#' none may allocate a terminal (`-t`). R and the same version of \pkg{rustcluster} must be installed where the command runs
#' them. `kubectl exec` needs `--` before the command.
#'
#' The agent ends when its stdin ends. If the command has not ended by then, it is killed with its process group.
#'
#' @param command (character) A program and its arguments, or one text that is divided into words. The agent's command
#'   is appended as the arguments `sh`, `-c` and a script. No shell reads `command`. An element `"{{ command }}"` is the
#'   place of the agent's command, if that is not the end; within a longer text, such as
#'   `c("su", "u", "-c", "exec {{ command }}")`, the agent's command is quoted for a shell.
#' @param workers (integer) The number of workers. Default: the cores that the agent may use.
#' @param host (character) The name of the host in messages and in `cl[[i]]$host`. Default: the last word of `command`
#'   that is neither an option nor a number, such as the image.
#' @param rscript (character) The `Rscript` command where the agent runs.
#' @param rlibs,rscript_envs,threads,renice,start_method Settings of the host, as in [makeRustCluster()]. Default: the
#'   arguments of [makeRustCluster()].
#' @param x A launcher.
#' @param ... Ignored.
#'
#' @return A launcher, for `spec` of [makeRustCluster()], also in a list together with other hosts and launchers. Equal
#'   launchers share an agent. To start several containers, give each its own `host`. `print()` shows the
#'   command line that starts the agent.
#' @section Errors:
#' `rustcluster_bad_argument`. [makeRustCluster()] raises `rustcluster_start_failed` if the command fails.
#' @seealso [allocation()] for the nodes of a batch job
#' @examples
#' commandLauncher(c("docker", "run", "-i", "--rm", "image"), workers = 4)
#' commandLauncher("kubectl exec -i pod --", rscript = "/opt/R/bin/Rscript")
#' \dontrun{
#' cl <- makeRustCluster(list(
#'   list(host = "node1", ncore = 8),
#'   commandLauncher(c("podman", "run", "-i", "--rm", "image"))
#' ))
#' }
#' @export
commandLauncher <- function(command, workers = NA, host = NULL, rscript = "Rscript", rlibs = NULL, rscript_envs = NULL,
                            threads = NULL, renice = NULL, start_method = NULL) {
  if (missing(command)) badArgument("command", "is missing")
  command <- commandLine(command, "command")
  workers <- if (isUnset(plain(workers))) NA_integer_ else count(workers, "workers", maxWorkers)
  host <- if (isUnset(host)) shownHost(command) else hostName(host, "host")
  settings <- launcherSettings(list(
    rscript = rscript, rlibs = rlibs, rscript_envs = rscript_envs, threads = threads, renice = renice,
    start_method = start_method
  ))
  structure(
    list(command = command, workers = workers, host = host, settings = settings),
    class = c("rustcluster_command", "rustcluster_launcher")
  )
}

# Returns the name of a host whose command line names no other: its last plain word.
shownHost <- function(command) {
  words <- grep(commandPlace, command, value = TRUE, invert = TRUE)
  named <- grep("^[A-Za-z/.][^[:space:][:cntrl:]=]*$", words, value = TRUE)
  word <- basename(c(words[[1L]], named)[[length(named) + 1L]])
  if (grepl("^-|[[:space:][:cntrl:]]", word) || !nzchar(word)) "command" else word
}

#' @export
launcherEntries.rustcluster_command <- function(launcher) {
  settings <- c(
    list(host = launcher$host), launcher$settings, list(launcher = stdioLauncher(launcher$command))
  )
  list(list(settings = settings, workers = launcher$workers))
}

#' @rdname commandLauncher
#' @export
print.rustcluster_command <- function(x, ...) {
  cat("launcher of a host by a command\n")
  printCommands(x)
  invisible(x)
}
