# Where the commands of a batch engine run: on this machine, or on a login node over the one ssh connection of a gateway
# (gateway.R). The functions here are the same for both. An engine host is a list with the class
# "rustcluster_engine_host"; `link` is the state of the connection, or NULL for this machine.

engineHost <- function(env = character(), link = NULL) {
  structure(list(env = env, link = link), class = "rustcluster_engine_host")
}

# Seconds that a command may take, if nothing else is said.
engineTimeout <- 60

# Runs a command (a program and its arguments) and waits for its end. `input`: text or raw bytes for its stdin. Returns
# a list of status (NA after a signal), stdout, stderr and timed_out. A command that cannot be run has the status 127.
engineRun <- function(host, command, input = NULL, timeout = engineTimeout) {
  aside <- engineRunAside(host, command, input, timeout)
  # An interrupt ends the command.
  on.exit(engineAsideEnd(aside))
  repeat {
    result <- engineAsideResult(aside)
    if (!is.null(result)) return(result)
    raiseInterrupt()
    background_wait(aside$process, 0.1, FALSE)
  }
}

# Starts a command and returns at once. The result is that of engineRun(): see engineAsideResult().
engineRunAside <- function(host, command, input = NULL, timeout = engineTimeout) {
  aside <- new.env(parent = emptyenv())
  aside$began <- proc.time()[["elapsed"]]
  # On a login node, coreutils' timeout ends the command at its limit, and this session the ssh that waits for it later.
  aside$timeout <- timeout + if (is.null(host$link)) 0 else 10
  aside$limit <- timeout
  aside$link <- host$link
  aside$result <- NULL
  if (!is.null(host$link) && !is.null(problem <- linkProblem(host$link))) {
    aside$result <- engineResult(255L, stderr = problem)
    return(aside)
  }
  full <- if (is.null(host$link)) command else sessionCommand(host$link, remoteCommand(command, host$env, timeout))
  env <- if (is.null(host$link)) host$env else character()
  aside$process <- background_start(full, env, engineInput(input), FALSE, 0, 0, TRUE)
  if (is.character(aside$process)) {
    aside$result <- engineResult(127L, stderr = paste0("cannot run ", full[[1L]], ": ", aside$process))
  }
  aside
}

# Returns the result of a command that was started aside, or NULL while it runs. A command ends with the connection to
# its login node, which heartbeats notice long before the time limit of the command.
engineAsideResult <- function(aside) {
  if (!is.null(aside$result)) return(aside$result)
  ended <- background_wait(aside$process, 0, FALSE)
  report <- if (ended) background_report(aside$process)
  # ssh's own status is 255.
  problem <- if (!is.null(aside$link) && (!ended || report$status %in% 255L)) linkProblem(aside$link)
  if (!is.null(problem)) {
    engineAsideEnd(aside)
    aside$result <- engineResult(255L, stderr = problem)
    return(aside$result)
  }
  late <- proc.time()[["elapsed"]] - aside$began > aside$timeout
  if (!ended && !late) return(NULL)
  if (!ended) background_kill(aside$process)
  report <- background_report(aside$process)
  status <- if (ended) report$status else NA_integer_
  # timeout's own status is 124, and 137 if it had to kill the command.
  slow <- proc.time()[["elapsed"]] - aside$began >= aside$limit
  aside$result <- engineResult(
    status, bytesText(report$stdout), bytesText(report$stderr), late || (slow && status %in% c(124L, 137L))
  )
  aside$process <- NULL
  aside$result
}

# Ends a command that is still running.
engineAsideEnd <- function(aside) {
  if (is.null(aside$result)) {
    background_kill(aside$process)
    aside$result <- engineResult(NA_integer_)
    aside$process <- NULL
  }
  invisible()
}

engineResult <- function(status, stdout = "", stderr = "", timed_out = FALSE) {
  list(status = as.integer(status), stdout = stdout, stderr = stderr, timed_out = timed_out)
}

engineInput <- function(input) {
  if (is.null(input)) return(raw())
  if (is.raw(input)) return(input)
  charToRaw(paste0(enc2utf8(input), collapse = "\n"))
}

# Returns bytes as text, without zeros.
bytesText <- function(bytes) {
  text <- rawToChar(bytes[bytes != 0L])
  if (validUTF8(text)) Encoding(text) <- "UTF-8" else Encoding(text) <- "bytes"
  text
}

# Returns lines of sh that write text files: `texts` by their paths, with `modes`. Each appears with its whole content.
# The lines exit with status 1 if a file cannot be written.
writeFilesScript <- function(texts, modes) {
  mark <- paste0("end-", randomText(8L))
  parts <- Map(function(path, text, mode) {
    text <- paste0(enc2utf8(text), collapse = "\n")
    path <- shQuote(path)
    c(
      paste0("cat > ", path, ".new << '", mark, "' && chmod ", mode, " ", path, ".new && mv -f ", path, ".new ", path,
             " || exit 1"),
      sub("\n$", "", text), mark
    )
  }, names(texts), texts, modes)
  c("umask 077", unlist(parts, use.names = FALSE))
}

# Returns the last bytes of a file as text; "" if there is no such file.
engineReadTail <- function(host, path, bytes = 10000, timeout = engineTimeout) {
  command <- c("tail", "-c", format(bytes, scientific = FALSE), "--", path)
  result <- engineRun(host, command, timeout = timeout)
  if (result$status %in% 0L) result$stdout else ""
}

# Starts the guard of a cluster's jobs: sh runs the script at the path `script`, which may have arguments. Its stdin
# ends when this session ends, when the connection is lost, or by engineGuardRelease(). `before`: lines of sh that run
# first, on a login node; they may exit. `programs`: the commands that the guard runs. Waits for nothing.
engineGuard <- function(host, script, before = character(), programs = character()) {
  link <- host$link
  input <- raw()
  if (is.null(link)) {
    command <- c("sh", script)
  } else {
    # The gateway ends the guard by its pid if the link is dead. Its command names the directory of the gateway.
    mark <- paste0("end-", randomText(8L))
    # Nobody sees what is read from stdin. The lines run only if all have arrived; `read` takes no byte of what follows.
    read <- paste0(
      "s=; while IFS= read -r l && [ \"$l\" != ", mark, " ]; do s=\"$s$l\n\"; done; ",
      "[ \"$l\" = ", mark, " ] || exit 1; eval \"$s\"; "
    )
    command <- sessionCommand(link, paste0(
      "echo $$ >> ", link$remote, "/pids; ", exportEnv(host$env), loginPath(programs), if (length(before)) read,
      "exec sh ", paste(shQuote(script), collapse = " "), " ", link$remote
    ))
    if (length(before)) input <- engineInput(c(before, mark, ""))
  }
  env <- if (is.null(link)) host$env else character()
  guard <- background_start(command, env, input, TRUE, 0, 0, FALSE)
  if (is.character(guard)) abort("start_failed", "the guard of the jobs cannot be started: ", guard)
  if (!is.null(link)) {
    link$guards <- c(link$guards, list(guard))
    if (!is.null(link$gateway)) background_on_end(link$gateway, guard, FALSE)
  }
  guard
}

# Ends the stdin of a guard, which then cancels all jobs, and waits for its end. Returns whether it has ended.
engineGuardRelease <- function(guard, timeout = engineTimeout) {
  background_end_input(guard)
  awaitBackground(guard, timeout)
}

engineGuardAlive <- function(guard) !isTRUE(background_wait(guard, 0, FALSE))

# Waits for the end of a background process. Returns whether it has ended.
awaitBackground <- function(process, timeout) {
  deadline <- proc.time()[["elapsed"]] + timeout
  repeat {
    if (isTRUE(background_wait(process, 0.1, FALSE))) return(TRUE)
    if (proc.time()[["elapsed"]] > deadline) return(FALSE)
    raiseInterrupt()
  }
}

# Raises an error if a command for files of the cluster has failed.
engineChecked <- function(host, result, what) {
  if (result$status %in% 0L) return(invisible(result))
  link <- host$link
  name <- if (is.null(link)) "this machine" else paste("login node", sQuote(link$host$host))
  reason <- if (result$timed_out) {
    "it took too long; see whether its file system responds"
  } else if (result$status %in% 255L && !is.null(link)) {
    remedy <- sessionRemedy(link, result$stderr)
    if (is.null(remedy)) "the ssh session failed" else remedy
  } else if (is.na(result$status)) {
    "the command was killed"
  } else {
    paste("the command exited with status", result$status)
  }
  abort(
    "start_failed", name, " could not ", what, ": ", reason, tailText("its stderr", result$stderr),
    fields = list(host = if (is.null(link)) "localhost" else link$host$host, stderr = result$stderr)
  )
}

# Returns lines of sh that set variables. NA removes a variable.
exportEnv <- function(env) {
  if (!length(env)) return("")
  set <- !is.na(env)
  paste0(c(
    sprintf("export %s=%s; ", names(env)[set], shQuote(env[set])), sprintf("unset %s; ", names(env)[!set])
  ), collapse = "")
}

# Returns a line of sh for a login node that makes programs known. The shell of a session is no login shell: a program
# that is not in its PATH may be in that of the user's profile.
loginPath <- function(programs) {
  programs <- programs[nzchar(programs) & !grepl("/", programs, fixed = TRUE)]
  if (!length(programs)) return("")
  paste0(
    "{ ", paste("command -v", shQuote(programs), "> /dev/null 2>&1", collapse = " && "), "; } || ",
    "{ p=`bash -lc 'echo \"$PATH\"' 2> /dev/null < /dev/null | tail -n 1`; PATH=$PATH${p:+:$p}; export PATH; }; "
  )
}

# Returns a script that runs a command on the login node.
remoteCommand <- function(command, env, timeout) {
  paste0(
    exportEnv(env), loginPath(command[[1L]]),
    "if command -v timeout > /dev/null 2>&1; then exec timeout -k 5 ", format(timeout, scientific = FALSE), " ",
    paste(shQuote(command), collapse = " "), "; else exec ", paste(shQuote(command), collapse = " "), "; fi"
  )
}
