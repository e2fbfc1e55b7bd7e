# Jobs of a launcher with `login`: their files and their guard are on the login node. Files are written and read in ssh
# sessions over the connection of the gateway.

isThere <- function(batch) !is.null(batch$host$link)

# Connects to the login node of a launcher and starts the gateway there. `listen`: a function that makes the hub listen
# on the socket at a path. Returns the engine host there; its `link` has `addresses` and `port` for agents, and the
# launcher's `dir` as a path from the root.
openLogin <- function(launcher, listen, rshcmd = NULL, rshopts = NULL, env = character(), timeout = 60,
                      heartbeat_timeout = 20, ports = launcher$port) {
  host <- openLink(launcher$login, rshcmd, rshopts, env, timeout, heartbeat_timeout)
  opened <- FALSE
  on.exit(if (!opened) closeGateway(host, 0))
  host$link$dir <- jobsDirThere(launcher, host)
  listen(host$link$socket)
  startGateway(host, cancelThere(host$link), ports = ports, rscript = launcher$rscript, rlibs = launcher$rlibs,
               timeout = timeout)
  host$link$addresses <- if (is.null(launcher$address)) addressesThere(host) else launcher$address
  opened <- TRUE
  host
}

# Returns the path of the script by which the gateway cancels the jobs of all batches.
cancelThere <- function(link) file.path(link$remote, "cancel.sh")

# Returns the names and addresses of the login node, as nodes of the cluster may know them.
addressesThere <- function(host) {
  script <- "hostname -f 2> /dev/null; hostname; hostname -I 2> /dev/null | tr ' ' '\\n'"
  found <- textLines(engineRun(host, c("sh", "-c", script), timeout = 20)$stdout)
  unique(found[grepl("^[A-Za-z0-9.:_-]+$", found) & found != "localhost"])
}

# Returns the directory of a launcher as a path from the root.
jobsDirThere <- function(launcher, host) {
  if (is.null(host$link) || !startsWith(launcher$dir, "~")) return(launcher$dir)
  home <- engineRun(host, c("sh", "-c", "cd && pwd -P"), timeout = 20)
  engineChecked(host, home, "find the home directory")
  sub("^~", sub("\n$", "", home$stdout), launcher$dir)
}

# Writes a file of a batch; on a login node, the guard does it when it starts.
writeJobFile <- function(batch, path, lines, mode = "0600") {
  if (!isThere(batch)) return(writePrivate(path, lines, mode))
  batch$unwritten[[path]] <- list(text = paste0(lines, "\n", collapse = ""), mode = mode)
  invisible()
}

# Starts the guard of a batch there. The session of the first guard makes the directory and writes the files before: a
# link that is stuck keeps nobody waiting here. It leaves nothing if that fails. The directory of jobs that another
# session has submitted is there.
startGuardThere <- function(batch) {
  files <- batch$unwritten
  dir <- shQuote(batch$directory)
  script <- if (length(files)) writeFilesScript(lapply(files, `[[`, "text"), vapply(files, `[[`, "", "mode"))
  before <- if (length(files) && isTRUE(batch$isOld)) {
    c(paste("[ -d", dir, "] || exit 1"), script)
  } else if (length(files)) c(
    paste("umask 077; mkdir -p", shQuote(dirname(batch$directory)), "&& mkdir", dir, "|| exit 1"),
    paste0("remove() { rm -rf ", dir, "; }"), "trap remove EXIT", "trap 'remove; exit 1' TERM HUP INT",
    script, "trap - EXIT"
  )
  batch$guard <- engineGuard(batch$host, guardArguments(batch)[-1L], before, enginePrograms(batch$launcher))
  batch$unwritten <- list()
  invisible()
}

# Returns the programs of an engine that a guard needs in its PATH.
enginePrograms <- function(launcher) {
  switch(launcher$kind,
    slurm = "sbatch", htcondor = "condor_submit", lsf = "bsub", gridEngine = , pbs = "qsub",
    # The first word of a command line may be a variable or an assignment: then the shell knows best.
    grep("^[A-Za-z0-9_.+-]+$", sub("^ *([^ ]*).*$", "\\1", c(launcher$submit, launcher$cancel, launcher$status)),
         value = TRUE)
  )
}

# Raises an error if the connection to the login node of a batch is lost.
checkLinkThere <- function(batch, what) {
  problem <- linkProblem(batch$host$link)
  if (!is.null(problem)) engineChecked(batch$host, engineResult(255L, stderr = problem), what)
}

# Raises an error if the session of a guard has ended before the guard began.
checkGuardThere <- function(batch) {
  checkLinkThere(batch, "submit the jobs")
  report <- background_report(batch$guard)
  # These are the guard's own.
  if (!report$status %in% c(0L, 2L)) {
    engineChecked(batch$host, engineResult(report$status, stderr = bytesText(report$stderr)),
                  paste("prepare the jobs in", batch$directory))
  }
}

# Writes the guard's script there, and the scripts by which the gateway cancels the jobs: one for each batch, and one
# that runs those of all batches at once.
writeGuardThere <- function(batch) {
  lines <- readLines(system.file("guard.sh", package = "rustcluster"))
  writeJobFile(batch, file.path(batch$directory, "guard.sh"), lines)
  # Without orders, a guard ends the jobs at once.
  cancel <- paste("exec", paste(shQuote(guardArguments(batch)), collapse = " "), "< /dev/null")
  env <- paste0(exportEnv(batch$host$env), loginPath(enginePrograms(batch$launcher)))
  writeJobFile(batch, file.path(batch$directory, "cancel.sh"), c(if (nzchar(env)) env, cancel))
  link <- batch$host$link
  writeJobFile(batch, file.path(link$remote, paste0("batch-", batch$id)), batch$directory)
  writeJobFile(batch, cancelThere(link), c(
    paste0("for file in ", link$remote, "/batch-*; do"), "  d=`cat \"$file\"`",
    # A guard that waits for another head outlives the gateway. Another head may have taken the jobs over.
    "  if [ -e \"$d/linger\" ]; then",
    paste0("    if [ \"`cat \"$d/guard\"`\" = ", basename(link$remote), " ]; then"),
    "      (sh \"$d/cancel.sh\" > /dev/null 2>&1 &)", "    fi",
    "  elif [ -e \"$d/cancel.sh\" ]; then sh \"$d/cancel.sh\" & fi", "done", "wait"
  ))
}

removeJobsDir <- function(batch) {
  if (!isThere(batch)) return(unlink(batch$directory, recursive = TRUE))
  # Without a guard there has been no directory.
  if (length(batch$unwritten)) return(invisible())
  # The connection may be what has failed: then the master's session and the gateway have cleaned up.
  engineRun(batch$host, c("rm", "-rf", "--", batch$directory), timeout = 20)
  invisible()
}

# On a login node, a directory is taken to be there as long as the connection is.
jobsDirExists <- function(batch) {
  if (isThere(batch)) is.null(linkProblem(batch$host$link)) else dir.exists(batch$directory)
}

sendGuard <- function(batch, text) {
  if (isThere(batch)) background_send(batch$guard, text) else guard_send(batch$guard, text)
}

guardEnded <- function(batch, max) {
  if (isThere(batch)) background_wait(batch$guard, max, FALSE) else guard_ended(batch$guard, max)
}

releaseGuard <- function(batch) {
  if (isThere(batch)) background_end_input(batch$guard) else checked(guard_release(batch$guard))
}

# Waits there, aside, until the answer to an order is complete, and returns it, or NULL if it is not there yet. The
# directory may not be there yet, and no answer comes once it has been removed.
answerThere <- function(batch, name) {
  if (is.null(batch$reading[[name]])) {
    script <- paste0(
      "d=; i=0; while [ ! -e \"$1/$2.rc\" ] && [ $i -lt 700 ]; do ",
      "if [ -d \"$1\" ]; then d=1; elif [ \"$d\" ]; then exit 1; fi; sleep 0.1; i=$((i+1)); done; ",
      "cd \"$1\" || exit 1; ",
      "for e in rc out err id; do echo \"part $e `cat \"$2.$e\" 2> /dev/null | wc -l`\"; ",
      "cat \"$2.$e\" 2> /dev/null | sed '$a\\'; done"
    )
    batch$reading[[name]] <- engineRunAside(
      batch$host, c("sh", "-c", script, "sh", batch$directory, name), timeout = 80
    )
  }
  result <- engineAsideResult(batch$reading[[name]])
  if (is.null(result)) return(NULL)
  lines <- textLines(result$stdout)
  start <- match(paste("part", c("rc", "out", "err", "id")), sub(" [0-9]+$", "", lines))
  part <- function(i) {
    if (anyNA(start)) return(character())
    end <- c(start, length(lines) + 1L)[[i + 1L]]
    lines[seq_len(end - start[[i]] - 1L) + start[[i]]]
  }
  status <- suppressWarnings(as.integer(c(part(1L), NA)[[1L]]))
  # The session itself has failed: nothing is known.
  if (is.na(status) && !result$status %in% 0L) batch$reading[[name]] <- NULL
  if (is.na(status) && result$status %in% 255L) status <- 255L
  if (is.na(status)) return(NULL)
  list(status = status, out = part(2L), err = if (status == 255L) textLines(result$stderr) else part(3L), id = part(4L))
}

forgetThere <- function(batch, name) {
  if (!is.null(batch$reading[[name]])) engineAsideEnd(batch$reading[[name]])
  batch$reading[[name]] <- NULL
  # Nobody waits for this.
  files <- paste0(batch$directory, "/", name, c(".rc", ".out", ".err", ".id"))
  batch$forgetting <- engineRunAside(batch$host, c("rm", "-f", files), timeout = 20)
  invisible()
}

filesThere <- function(batch) textLines(engineRun(batch$host, c("ls", batch$directory), timeout = 20)$stdout)

textLines <- function(text) {
  printable(strsplit(text, "\n", fixed = TRUE)[[1L]])
}
