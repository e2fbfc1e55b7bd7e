# What launchers have in common whose command's stdin and stdout is the stream to an agent: commandLauncher() and
# allocation(). They need no port. A launcher is a list of class "rustcluster_launcher" and of a class of its own. Each
# host of a cluster that a launcher starts has, as its setting `launcher`, a list of class "rustcluster_stdio":
#   * `command`: the command line, with a place for the agent's command (commandPlace).
#   * `env`: variables of the command; NA removes a variable.

isLauncher <- function(x) inherits(x, "rustcluster_launcher")

# Returns the entries of `spec` that a launcher stands for: lists of `settings` and `workers`.
launcherEntries <- function(launcher) UseMethod("launcherEntries")

# The place of the agent's command in a command line.
commandPlace <- "[{][{] *command *[}][}]"

# Checks a command line: words, or one text that is divided into words. Returns the words with a place for the agent's
# command.
commandLine <- function(command, argument) {
  command <- texts(command, argument)
  if (length(command) == 1L && !file.exists(command)) {
    # scan() would take braces and blanks between them for several words.
    text <- gsub(commandPlace, "{{command}}", command)
    command <- tryCatch(scan(text = text, what = "", quiet = TRUE), error = function(e) character())
    if (!length(command)) badArgument(argument, "must be a command line")
  }
  places <- lengths(regmatches(command, gregexpr(commandPlace, command)))
  if (sum(places) > 1L) badArgument(argument, "must have at most one {{ command }}")
  if (places[[1L]]) badArgument(argument, "must begin with a program, and not with {{ command }}")
  if (!any(places)) command <- c(command, "{{ command }}")
  unname(command)
}

stdioLauncher <- function(command, env = character()) {
  structure(list(command = command, env = env), class = "rustcluster_stdio")
}

# Returns the command of a launcher that runs a script in sh. Its arguments arrive as they are: an element that is the
# place alone becomes three arguments. Within a text for a shell the three are quoted.
launcherCommand <- function(launcher, script) {
  run <- c("sh", "-c", script)
  quoted <- paste(c("sh", "-c", shQuote(script)), collapse = " ")
  unlist(lapply(launcher$command, function(word) {
    if (grepl(paste0("^", commandPlace, "$"), word)) return(run)
    at <- regexpr(commandPlace, word)
    if (at < 0L) return(word)
    # The script is text and not a pattern: sub() would read its backslashes.
    paste0(substr(word, 1L, at - 1L), quoted, substring(word, at + attr(at, "match.length")))
  }))
}

launcherVariables <- function(launcher) if (is.null(launcher)) character() else launcher$env

# Returns what messages call the program that a launcher runs on this machine.
launcherProgram <- function(launcher) sQuote(basename(launcher$command[[1L]]))

# Returns what to do if the command of a launcher has ended before its agent greeted, or NULL: see commandRemedy().
launcherRemedy <- function(host, reason, stderr, stdout, status) {
  if (isBatch(host)) return(NULL)
  program <- launcherProgram(host$launcher)
  rscript <- host[["rscript"]]
  if (is.null(rscript)) rscript <- "Rscript"
  if (startsWith(reason, "the agent could not be started: ")) {
    return(paste0("the program ", program, " cannot be run on this machine: install it, or correct the command"))
  }
  # A program that starts another one ends with these statuses, as a shell does, and so does the sh that it runs.
  named <- grepl(rscript, paste0(stderr, stdout), fixed = TRUE)
  if (status %in% 126L) {
    if (!named) return(paste0(program, " could not execute the program that it was to run: check the command"))
    return(paste0("Rscript cannot be executed where ", program, " runs it (", rscript, "): check `rscript`"))
  }
  if (status %in% 127L) {
    if (!named) return(paste0(program, " did not find the program that it was to run: check the command"))
    return(paste0(
      "Rscript was not found where ", program, " runs it (", rscript, "): install R there, or set its path by `rscript`"
    ))
  }
  if (status %in% 1L && grepl("no package called .rustcluster", stderr)) {
    return(paste0(
      "rustcluster is not installed where ", program, " runs R: install it there, as in the image of a container, or ",
      "set its library by `rlibs`"
    ))
  }
  if (status %in% 0L) {
    silent <- !nzchar(paste0(stderr, stdout))
    return(paste0(
      "the command ", program, " ended without starting an agent", if (silent) " and printed nothing",
      ": it must run its last arguments and pass its stdin and stdout on (`docker run` and `kubectl exec` need -i)"
    ))
  }
}

# Checks settings that a launcher gives to its hosts. NULL and NA stand for the default.
launcherSettings <- function(settings) {
  settings <- settings[!vapply(settings, isUnset, NA)]
  for (name in names(settings)) settings[[name]] <- settingChecks[[name]](plain(settings[[name]]), name)
  settings
}

# Returns a command as one could type it.
typedCommand <- function(command) {
  plain <- grepl("^[A-Za-z0-9_./,:=@%+-]+$", command)
  # shQuote() quotes all elements in the way that one of them needs.
  command[!plain] <- vapply(command[!plain], shQuote, "")
  paste(command, collapse = " ")
}

# Prints the hosts of a launcher, with the commands that makeRustCluster() runs for them without other arguments.
# `max`: the maximum number of hosts.
printCommands <- function(launcher, max = 3L) {
  defaults <- list(rscript_envs = character(), threads = 1L, renice = 0L, start_method = "fork")
  hosts <- specHosts(launcher, defaults)
  options <- clusterOptions(list())
  n <- length(hosts$hosts)
  for (i in seq_len(min(n, max))) {
    host <- hosts$hosts[[i]]
    workers <- hosts$workers[hosts$owner == i]
    cat(
      host$host, ": ", if (anyNA(workers)) "a worker for each usable core" else spanWorkers(sum(workers)),
      if (host$local) ", on this machine", "\n  ", typedCommand(hostLaunch(host, options)$command), "\n", sep = ""
    )
  }
  if (n > max) cat("and ", n - max, " more\n", sep = "")
}

spanWorkers <- function(n) paste0(n, ngettext(n, " worker", " workers"))
