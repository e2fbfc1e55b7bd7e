# The scripts of the jobs of a launcher, and the commands that submit them.

# The keys of templates that have values.
templateValueNames <- c(
  "nodes", "cores", "memory", "time", "queue", "account", "gpus", "constraint", "extra", "setup", "command",
  "environment", "script", "job_name", "tasks", "directory", "log_file", "shell", "shell_path", "signal", "pe", "chunk",
  "single_name"
)

# Returns how the nodes of a launcher are submitted: as an "array", as "one" job of all nodes, or "each" by itself.
jobMode <- function(launcher) {
  keys <- templateKeys(launcher$lines)
  switch(launcher$kind,
    slurm = if (launcher$array) "array" else if (is.null(launcher$adaptive)) "one" else "each",
    htcondor = "array",
    template = if ("tasks" %in% keys) "array" else if ("nodes" %in% keys && is.null(launcher$adaptive)) {
      "one"
    } else {
      "each"
    },
    if (launcher$array) "array" else "each"
  )
}

jobDirectoryOf <- function(launcher, id) paste0(launcher$dir, "/", id)
jobNameOf <- function(launcher, id) paste0(launcher$name, "-", id)
keyFileOf <- function(launcher, id) paste0(jobDirectoryOf(launcher, id), "/key")
variablesFileOf <- function(launcher, id) paste0(jobDirectoryOf(launcher, id), "/variables")

# Returns a list of `files`, named by their paths, each a character vector of lines, and of `submissions`, a data frame
# with a row for each submit command: `command` (a line of shell), `file`, `tasks` (the number of nodes), `array`
# (logical). `id`: the number of the jobs' cluster. `arguments`: of Rscript.
jobScripts <- function(launcher, id, arguments = rscriptArguments(list(methods = TRUE))) {
  mode <- jobMode(launcher)
  if (mode == "array" && launcher$nodes > 1L && !any(c("tasks", "nodes") %in% templateKeys(launcher$lines))) {
    badArgument("template", "must have the key `tasks`, the range of the array, or `array` must be FALSE")
  }
  sizes <- switch(mode, array = arraySizes(launcher), one = launcher$nodes, each = rep(1L, launcher$nodes))
  directory <- jobDirectoryOf(launcher, id)
  suffix <- if (launcher$kind == "htcondor") ".sub" else ".sh"
  kinds <- unique(sizes)
  paths <- paste0(directory, "/job", c("", if (length(kinds) > 1L) paste0("-", seq_along(kinds)[-1L])), suffix)
  texts <- lapply(kinds, function(size) {
    fillTemplate(launcher$lines, jobValues(launcher, id, size, mode, arguments))
  })
  files <- structure(texts, names = paths)
  if ("script" %in% templateKeys(launcher$lines)) {
    values <- jobValues(launcher, id, sizes[[1L]], mode, arguments)
    lines <- c(
      "#!{{ shell }}", if (launcher$kind == "htcondor") condorPrologue(),
      "{{ setup | }}", "{{ environment }}", "exec {{ command }}"
    )
    files[[values$script]] <- fillTemplate(lines, values)
  }
  file <- paths[match(sizes, kinds)]
  list(files = files, submissions = data.frame(
    command = vapply(file, submitCommand, "", launcher = launcher, directory = directory, USE.NAMES = FALSE),
    file = file, tasks = sizes,
    array = mode == "array" & (sizes > 1L | launcher$kind %in% c("htcondor", "template")),
    stringsAsFactors = FALSE
  ))
}

arraySizes <- function(launcher) {
  limit <- if (is.null(launcher$max_array)) launcher$nodes else launcher$max_array
  whole <- launcher$nodes %/% limit
  rest <- launcher$nodes %% limit
  c(rep(limit, whole), if (rest > 0L) rest)
}

# HTCondor sets neither PATH nor HOME, and streams stdout and stderr to files of their own.
condorPrologue <- function() {
  c("exec 2>&1", "PATH=${PATH:-/usr/local/bin:/usr/bin:/bin}", paste0("HOME=${HOME:-", shQuote(path.expand("~")), "}"),
    "export PATH HOME")
}

# Returns the values of the keys of a template for a job of `size` nodes, or for an array of as many jobs.
jobValues <- function(launcher, id, size, mode, arguments) {
  engine <- engines[[launcher$kind]]
  directory <- jobDirectoryOf(launcher, id)
  name <- jobNameOf(launcher, id)
  isArray <- mode == "array" && (size > 1L || launcher$kind == "template")
  form <- function(value, part, convert) {
    if (is.null(value)) NULL else if (is.null(value[[part]])) value$text else convert(value[[part]])
  }
  memory <- form(launcher$memory, "mib", engine$memory)
  seconds <- launcher$time$seconds
  login <- length(launcher$setup) > 0L
  one <- mode == "one" && launcher$kind == "slurm"
  log <- engine$log[[if (isArray) 2L else 1L]]
  values <- list(
    nodes = if (mode == "one" || launcher$kind == "htcondor") size else 1L,
    cores = launcher$cores, memory = memory,
    time = form(launcher$time, "seconds", engine$time),
    queue = launcher$queue, account = launcher$account, gpus = launcher$gpus, constraint = launcher$constraint,
    extra = c(if (one) "#SBATCH --no-kill", launcher$extra), setup = launcher$setup,
    command = agentCommand(launcher, size, one, arguments),
    environment = agentEnvironment(launcher, id),
    script = paste0(directory, "/agent.sh"), job_name = name,
    tasks = if (isArray) paste0("1-", size), directory = directory,
    log_file = paste0(directory, "/", log),
    shell = if (login) "/bin/bash -l" else "/bin/sh", shell_path = if (login) "/bin/bash" else "/bin/sh",
    # The batch shell of a job of one node has become the agent; with srun the steps are the agents.
    signal = if (!is.null(launcher$time)) {
      before <- if (is.null(seconds)) 60 else max(1, min(60, seconds %/% 4))
      paste0(if (!one) "B:", "USR1@", before)
    },
    pe = if (launcher$cores > 1L) launcher$pe,
    chunk = if (launcher$kind == "pbs") pbsChunk(launcher, memory),
    single_name = if (!isArray) name
  )
  values <- values[lengths(values) > 0L]
  values[names(launcher$values)] <- launcher$values
  lapply(values, as.character)
}

pbsChunk <- function(launcher, memory) {
  if (launcher$dialect == "torque") return(paste0(
    "1:ppn=", launcher$cores, if (!is.null(launcher$gpus)) paste0(":gpus=", launcher$gpus),
    if (!is.null(launcher$constraint)) paste0(":", launcher$constraint)
  ))
  paste0(
    "1:ncpus=", launcher$cores, if (!is.null(memory)) paste0(":mem=", memory),
    if (!is.null(launcher$gpus)) paste0(":ngpus=", launcher$gpus),
    if (!is.null(launcher$constraint)) paste0(":", launcher$constraint)
  )
}

# Returns the command that is the agent: a script has to `exec` it, since engines send their signals to the process of
# the script alone.
agentCommand <- function(launcher, size, one, arguments) {
  command <- paste(shQuote(c(rscriptOf(launcher), arguments, "-e", startExpression("dialMain"))), collapse = " ")
  if (!one) return(command)
  # One agent on each node. Without these options the end of one agent would end the others.
  paste(
    paste0("srun --nodes=", size), paste0("--ntasks=", size), "--ntasks-per-node=1",
    paste0("--cpus-per-task=", launcher$cores), "--no-kill --kill-on-bad-exit=0 --wait=0", command
  )
}

rscriptOf <- function(launcher) {
  here <- is.null(launcher$login) && is.null(launcher$setup)
  if (!is.null(launcher$rscript)) launcher$rscript else if (here) ownRscript() else "Rscript"
}

ownRscript <- function() file.path(R.home("bin"), "Rscript")

# Returns lines of shell that set the environment of an agent. RUSTCLUSTER_JOB tells the agent which job of the engine
# it is and which element of an array, and RUSTCLUSTER_JOB_END when its time limit ends it (seconds since 1970). The
# variables of the user may be secrets, and engines show job scripts: those are in a file that the user alone can read.
# The shell reads the file, since R needs some of them when it starts.
agentEnvironment <- function(launcher, id) {
  engine <- engines[[launcher$kind]]
  # The library of this session comes first on nodes that have it.
  library <- if (is.null(launcher$login)) dirname(getNamespaceInfo("rustcluster", "path"))
  env <- c(
    RUSTCLUSTER_DIAL = keyFileOf(launcher, id), if (!is.null(library)) c(RUSTCLUSTER_LIB = library),
    if (length(launcher$rlibs)) c(R_LIBS = paste(launcher$rlibs, collapse = ":"))
  )
  seconds <- launcher$time$seconds
  c(
    # Grid Engine passes commands on in QRSH_COMMAND, with bytes that are no text.
    "unset R_HOME QRSH_COMMAND",
    paste0("export RUSTCLUSTER_JOB=\"", engine$job, "/", engine$task, "\""),
    if (!is.null(seconds)) {
      paste0("export RUSTCLUSTER_JOB_END=\"$(($(date +%s) + ", format(seconds, scientific = FALSE), "))\"")
    },
    paste0("export ", names(env), "=", shQuote(env)), paste(".", shellWord(variablesFileOf(launcher, id)))
  )
}

# Returns the lines of the file with the variables of agents. NA removes a variable.
variablesLines <- function(env) {
  env <- env[!duplicated(names(env), fromLast = TRUE)]
  wrong <- grep("^[A-Za-z_][A-Za-z0-9_]*$", names(env), value = TRUE, invert = TRUE)
  if (length(wrong)) {
    badArgument("rscript_envs", "contains ", sQuote(wrong[[1L]]), ", a name that the shell of a job cannot set; use ",
                "letters, digits and _")
  }
  set <- env[!is.na(env)]
  c(
    paste0("unset ", names(env)[is.na(env)], recycle0 = TRUE),
    # sprintf() limits the length of text.
    paste0("export ", names(set), "=", shQuote(set), recycle0 = TRUE),
    # The status of the last command.
    ":"
  )
}

# Returns a line of shell.
submitCommand <- function(launcher, file, directory) {
  file <- shellWord(file)
  switch(launcher$kind,
    slurm = paste("sbatch --parsable", file),
    htcondor = paste("condor_submit -terse", file),
    gridEngine = paste("qsub -terse", file),
    # The commands of Slurm for users of PBS ignore -o in a script.
    pbs = paste("qsub -j oe -o", shellWord(paste0(directory, "/pbs.out")), file),
    lsf = paste("bsub <", file),
    template = gsub(keyPattern, file, launcher$submit, perl = TRUE)
  )
}

# Quotes text for sh, unless it needs no quotes.
shellWord <- function(text) ifelse(grepl("^[A-Za-z0-9_./+@=,:-]+$", text), text, shQuote(text))

#' @rdname launchers
#' @param x A launcher.
#' @export
print.rustcluster_batch <- function(x, ...) {
  cat(format(x, ...), sep = "\n")
  invisible(x)
}

#' @export
format.rustcluster_batch <- function(x, ...) {
  # The number of the cluster is not known yet.
  adaptive <- x$adaptive
  if (!is.null(adaptive)) x <- singleJob(x)
  made <- jobScripts(x, "ID")
  submissions <- made$submissions
  commands <- unique(submissions$command)
  times <- tabulate(match(submissions$command, commands))
  printable(c(
    paste0("<", engines[[x$kind]]$title, ": ", nodesText(x, adaptive), " with ", x$cores, " worker",
           if (x$cores > 1L) "s", if (x$nodes > 1L || !is.null(adaptive)) " each", adaptiveText(adaptive), ">"),
    paste0("$ ", commands, ifelse(times > 1L, paste0("    # ", times, " times"), "")),
    unlist(lapply(names(made$files), function(path) c("", paste0("-- ", path, " --"), made$files[[path]])))
  ))
}

nodesText <- function(launcher, adaptive) {
  if (!is.null(adaptive)) return(paste0(adaptive$min, " to ", adaptive$max, " nodes"))
  paste0(launcher$nodes, " node", if (launcher$nodes > 1L) "s")
}

adaptiveText <- function(adaptive) {
  if (is.null(adaptive)) return(NULL)
  paste0(
    "; given back ", if (is.finite(adaptive$idle)) paste("after", format(adaptive$idle), "s without work") else "never",
    "; at most ", adaptive$backlog, " waiting job", if (adaptive$backlog > 1L) "s"
  )
}
