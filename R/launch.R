# Returns the command that starts the agent of a host, and the variables that are added to its environment.

hostLaunch <- function(host, options) {
  arguments <- rscriptArguments(options)
  # The agent of a batch job dials back. Its script has set its environment.
  if (!is.null(host$dial)) {
    library <- dirname(getNamespaceInfo("rustcluster", "path"))
    command <- c(host[["rscript"]], arguments, "-e", startExpression("workerMain"))
    worker <- c("env", paste0("RUSTCLUSTER_LIB=", library), command)
    return(list(host = host$host, worker = worker, dial = host$dial))
  }
  env <- c(
    if (length(host$rlibs)) c(R_LIBS = paste(host$rlibs, collapse = ":")), agentVariables(host),
    if (isTRUE(options$linger)) c(RUSTCLUSTER_LINGER = "1")
  )
  local <- host$local
  # On this machine an agent loads the package from the library of this session, on other hosts from its own.
  library <- if (local) dirname(getNamespaceInfo("rustcluster", "path"))
  rscript <- if (!is.null(host[["rscript"]])) host[["rscript"]] else if (local) options$rscript_local else "Rscript"
  command <- function(role) c(rscript, arguments, "-e", startExpression(role))
  env <- c(if (local) c(RUSTCLUSTER_LIB = library), env)
  env <- env[!duplicated(names(env), fromLast = TRUE)]
  # Set the variable again for a separate worker: the agent, its parent, has removed it.
  worker <- c(if (local) c("env", paste0("RUSTCLUSTER_LIB=", library)), command("workerMain"))
  launch <- if (local) {
    list(command = command("agentMain"), env = env)
  } else {
    list(command = onHost(host, remoteScript(command("agentMain"), env)), env = launcherVariables(host$launcher))
  }
  c(list(host = host$host, worker = worker), launch)
}

# Returns the variables of the environment of an agent, besides those that find it.
agentVariables <- function(host) c(threadVariables(host$threads), logVariables(), host$rscript_envs)

# Returns the command that runs a script in sh on another host.
onHost <- function(host, script) {
  if (is.null(host$launcher)) sshCommand(host, script) else launcherCommand(host$launcher, script)
}

# Returns the arguments of Rscript for an agent or a separate worker.
rscriptArguments <- function(options) {
  c(
    # R grows its heap by this much at the start before it collects garbage. A full collection in a worker writes to its
    # whole heap, whose pages are then no longer shared. Two thirds of the default keep the heap small: a worker takes
    # 28 MB instead of 42.
    "--min-nsize=200k",
    # These are the default packages of a PSOCK worker.
    if (options$methods) "--default-packages=datasets,utils,grDevices,graphics,stats,methods",
    options$rscript_args
  )
}

# Returns the script that sh runs on the host. `env`: NA removes a variable.
remoteScript <- function(command, env) {
  # ssh or the login shell may have set R_HOME to the value of another machine. QRSH_COMMAND, in which Grid Engine
  # passes the command on, has bytes that are no text: R's Sys.getenv() fails.
  unsetNames <- c("R_HOME", "QRSH_COMMAND", names(env)[is.na(env)])
  set <- env[!is.na(env)]
  paste0(
    "unset ", paste(unsetNames, collapse = " "), "; exec ",
    if (length(set)) paste0("env ", paste(shQuote(paste0(names(set), "=", set)), collapse = " "), " "),
    paste(shQuote(command), collapse = " ")
  )
}

# Returns the command that ssh passes to the login shell of the user, which runs the script in sh. sh, bash, zsh, fish
# and csh read text in single quotes in the same way if it contains no quotes, backslashes before quotes, exclamation
# marks or line ends. All such characters of the script are therefore written as octal numbers.
loginShellCommand <- function(script) {
  bytes <- as.integer(charToRaw(enc2utf8(script)))
  plain <- bytes %in% utf8ToInt("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./,:=@+- ")
  encoded <- character(length(bytes))
  encoded[plain] <- strsplit(intToUtf8(bytes[plain]), "")[[1L]]
  encoded[!plain] <- sprintf("\\0%03o", bytes[!plain])
  sprintf("exec sh -c 'eval \"$(printf %%b \"%s\")\"'", paste(encoded, collapse = ""))
}

sshCommand <- function(host, script) {
  ssh <- if (is.null(host$rshcmd)) "ssh" else host$rshcmd
  # In parallel, this is a command line.
  if (length(ssh) == 1L && !file.exists(ssh)) ssh <- scan(text = ssh, what = "", quiet = TRUE)
  c(
    ssh, host$rshopts,
    # ssh uses the first value of an option: the user's options precede these, and these precede configuration files.
    "-o", "BatchMode=yes", "-o", "ConnectTimeout=15",
    "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4",
    # No terminal, no X11 and no agent forwarding: the stream carries bytes.
    "-T", "-x", "-a",
    if (!is.null(host$port)) c("-p", host$port), if (!is.null(host$user)) c("-l", host$user),
    host$host, loginShellCommand(script)
  )
}

threadVariables <- function(threads) {
  names <- c("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
             "VECLIB_MAXIMUM_THREADS", "R_DATATABLE_NUM_THREADS", "RCPP_PARALLEL_NUM_THREADS", "MC_CORES")
  structure(rep(as.character(threads), length(names)), names = names)
}

variables <- function(envs, argument = "rscript_envs") {
  envs <- plain(envs)
  if (is.null(envs)) return(character())
  if (!is.character(envs) && !(is.atomic(envs) && !is.null(names(envs)))) {
    badArgument(argument, "must be a named vector, or a character vector of variable names")
  }
  values <- structure(as.character(envs), names = names(envs))
  if (!all(is.na(values) | isText(values))) badArgument(argument, "contains text of an unknown encoding")
  if (is.null(names(values))) names(values) <- rep("", length(values))
  if (!all(isText(names(values)))) badArgument(argument, "contains an invalid environment variable name")
  passed <- !nzchar(names(values))
  names(values)[passed] <- values[passed]
  values[passed] <- Sys.getenv(values[passed], unset = NA)
  if (anyNA(names(values)) || !all(grepl("^[A-Za-z_][A-Za-z0-9_.]*$", names(values)))) {
    badArgument(argument, "contains an invalid environment variable name")
  }
  values
}
