# The command that starts a host's agent, and what is added to its environment.

hostLaunch <- function(host, options) {
  arguments <- c(
    # A full collection of garbage in a worker writes to all of its heap, which it then has for its own,
    # and R grows its heap at the start by this much before it collects anything: two thirds of
    # the default keep it from growing beyond what there is to hold, and a worker takes 28 MB then, not 42.
    "--min-nsize=200k",
    # The same as for a PSOCK worker.
    if (options$methods) "--default-packages=datasets,utils,grDevices,graphics,stats,methods",
    options$rscript_args
  )
  env <- c(
    if (length(host$rlibs)) c(R_LIBS = paste(host$rlibs, collapse = ":")),
    threadVariables(host$threads), logVariables(), host$rscript_envs
  )
  here <- host$here
  # Here an agent loads the package from where this session has it; elsewhere it knows best itself.
  library <- if (here) dirname(getNamespaceInfo("rustcluster", "path"))
  rscript <- if (!is.null(host[["rscript"]])) host[["rscript"]] else if (here) options$rscript_here else "Rscript"
  command <- function(role) c(rscript, arguments, "-e", startExpression(role))
  env <- c(if (here) c(RUSTCLUSTER_LIB = library), env)
  env <- env[!duplicated(names(env), fromLast = TRUE)]
  # A separate worker is a child of the agent, which has dropped this variable by then.
  worker <- c(if (here) c("env", paste0("RUSTCLUSTER_LIB=", library)), command("workerMain"))
  launch <- if (here) {
    list(command = command("agentMain"), env = env)
  } else {
    list(command = sshCommand(host, remoteScript(command("agentMain"), env)), env = character())
  }
  c(list(host = host$host, worker = worker), launch)
}

# The script that the remote sh runs. `env`: NA removes a variable.
remoteScript <- function(command, env) {
  # Whatever ssh or the login shell may have set: this is another machine's.
  gone <- c("R_HOME", names(env)[is.na(env)])
  set <- env[!is.na(env)]
  paste0(
    "unset ", paste(gone, collapse = " "), "; exec ",
    if (length(set)) paste0("env ", paste(shQuote(paste0(names(set), "=", set)), collapse = " "), " "),
    paste(shQuote(command), collapse = " ")
  )
}

# What ssh hands to the login shell: that is sh's work only if the user has sh. A text in single
# quotes without quotes, backslashes before quotes, exclamation marks or line ends is the same to sh,
# bash, zsh, fish and csh; so all other characters of the script travel as octal numbers.
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
  # parallel's form, a command line.
  if (length(ssh) == 1L && !file.exists(ssh)) ssh <- scan(text = ssh, what = "", quiet = TRUE)
  c(
    ssh, host$rshopts,
    # What comes first counts: the user's options come before these, and these before the files.
    "-o", "BatchMode=yes", "-o", "ConnectTimeout=15",
    "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4",
    # Nothing of this session is lent to the host, and the stream carries bytes.
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
    badArgument(argument, "must be a named vector, or names of variables")
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
