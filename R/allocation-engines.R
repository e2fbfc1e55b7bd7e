# Which nodes a batch engine has given to the job of this session, and how many cores on each, from the engine's
# variables.

# Returns a list of `engine`, `job` (its number, or NA), `nodes` (names), `cores` (of the job on each node) and `own`
# (whether this session runs on the node and may use the job's cores there).
allocatedNodes <- function() {
  for (engine in names(engineReaders)) {
    found <- engineReaders[[engine]]()
    if (is.null(found)) next
    cores <- rowsum(as.integer(found$cores), found$nodes, reorder = FALSE)
    nodes <- rownames(cores)
    for (node in nodes) {
      if (!grepl("^[A-Za-z0-9][A-Za-z0-9._:-]*$", node)) unreadable(found$variable, "has an invalid node name")
    }
    own <- if (is.null(found$own)) vapply(nodes, isThisMachine, NA, USE.NAMES = FALSE) else nodes %in% found$own
    return(list(engine = engine, job = found$job, nodes = nodes, cores = as.integer(cores), own = own))
  }
  abort(
    "no_allocation", "this session runs in no batch job of Slurm, PBS, Grid Engine or LSF: call allocation() in a ",
    "script that is submitted to the engine (by sbatch, qsub or bsub), or name the hosts in `spec`"
  )
}

# Each returns NULL outside of a job of its engine, or a list of `job`, `variable` (the one with the nodes), `nodes` and
# `cores` (as long; a node may have several), and `own`, the node of this session, if a variable names it.
engineReaders <- list(
  Slurm = function() {
    variable <- firstSet(c("SLURM_JOB_NODELIST", "SLURM_NODELIST"))
    if (is.null(variable) || is.null(firstSet(c("SLURM_JOB_ID", "SLURM_JOBID")))) return(NULL)
    nodes <- expandHosts(Sys.getenv(variable), variable)
    counted <- firstSet(c("SLURM_JOB_CPUS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if (is.null(counted)) unreadable("SLURM_JOB_CPUS_PER_NODE", "is not set")
    cores <- expandCounts(Sys.getenv(counted), counted)
    if (length(cores) != length(nodes)) {
      unreadable(counted, "has ", length(cores), " counts for the ", length(nodes), " nodes in ", variable)
    }
    each <- wholeNumber("SLURM_CPUS_PER_TASK")
    if (counted == "SLURM_TASKS_PER_NODE" && !is.na(each)) cores <- cores * each
    own <- Sys.getenv("SLURMD_NODENAME")
    # A job step may have fewer cores than the job. The script of a job is no step.
    step <- Sys.getenv("SLURM_STEP_ID", Sys.getenv("SLURM_STEPID"))
    narrow <- nzchar(step) && !isTRUE(wholeNumber("SLURM_CPUS_ON_NODE") >= cores[match(own, nodes)])
    list(
      job = Sys.getenv(firstSet(c("SLURM_JOB_ID", "SLURM_JOBID"))), variable = variable, nodes = nodes, cores = cores,
      own = if (narrow) "" else own
    )
  },
  PBS = function() {
    if (!nzchar(Sys.getenv("PBS_NODEFILE"))) return(NULL)
    lines <- scan(text = listedNodes("PBS_NODEFILE"), what = "", quiet = TRUE, quote = "")
    lines <- factor(lines, unique(lines))
    cores <- tabulate(lines)
    # Torque lists a node once a core, and OpenPBS once a process (mpiprocs), of which NCPUS may be more.
    each <- c(wholeNumber("PBS_NUM_PPN"), wholeNumber("NCPUS"))
    even <- length(unique(cores)) == 1L
    if (even && !all(is.na(each))) cores <- pmax(cores, each[!is.na(each)][[1L]])
    list(job = Sys.getenv("PBS_JOBID", NA), variable = "PBS_NODEFILE", nodes = levels(lines), cores = cores)
  },
  "Grid Engine" = function() {
    if (!nzchar(Sys.getenv("PE_HOSTFILE"))) {
      # A job without a parallel environment has one node.
      if (!nzchar(Sys.getenv("SGE_ROOT")) || !nzchar(Sys.getenv("JOB_ID"))) return(NULL)
      slots <- wholeNumber("NSLOTS")
      own <- Sys.info()[["nodename"]]
      cores <- if (is.na(slots)) 1L else slots
      return(list(job = Sys.getenv("JOB_ID"), variable = "HOSTNAME", nodes = own, cores = cores, own = own))
    }
    rows <- strsplit(trimws(listedNodes("PE_HOSTFILE")), "[[:space:]]+")
    ok <- lengths(rows) >= 2L & vapply(rows, function(row) grepl("^[1-9][0-9]{0,5}$", c(row, "", "")[[2L]]), NA)
    if (!all(ok)) unreadable("PE_HOSTFILE", "names a file with a line without node and slots")
    list(
      job = Sys.getenv("JOB_ID", NA), variable = "PE_HOSTFILE", nodes = vapply(rows, `[[`, "", 1L),
      cores = as.integer(vapply(rows, `[[`, "", 2L))
    )
  },
  LSF = function() {
    if (!nzchar(Sys.getenv("LSB_JOBID"))) return(NULL)
    variable <- firstSet(c("LSB_MCPU_HOSTS", "LSB_DJOB_HOSTFILE", "LSB_HOSTS"))
    if (is.null(variable)) unreadable("LSB_MCPU_HOSTS", "is not set")
    text <- if (variable == "LSB_DJOB_HOSTFILE") listedNodes(variable) else Sys.getenv(variable)
    words <- scan(text = text, what = "", quiet = TRUE, quote = "")
    if (variable == "LSB_MCPU_HOSTS") {
      odd <- seq_along(words) %% 2L == 1L
      if (length(words) %% 2L || !all(grepl("^[1-9][0-9]{0,5}$", words[!odd]))) {
        unreadable(variable, "is no list of nodes and numbers: ", sQuote(text))
      }
      return(list(
        job = Sys.getenv("LSB_JOBID"), variable = variable, nodes = words[odd], cores = as.integer(words[!odd])
      ))
    }
    list(job = Sys.getenv("LSB_JOBID"), variable = variable, nodes = words, cores = rep(1L, length(words)))
  }
)

# Returns the first of these variables that is set and not empty, or NULL.
firstSet <- function(names) {
  set <- names[nzchar(Sys.getenv(names))]
  if (length(set)) set[[1L]]
}

unreadable <- function(variable, ...) {
  abort(
    "no_allocation", "the nodes of this job cannot be read: the variable ", variable, " ", ...,
    "; name the hosts in `spec`", fields = list(variable = variable)
  )
}

# Returns the value of a variable that is a whole number above 0, or NA.
wholeNumber <- function(variable) {
  text <- trimws(Sys.getenv(variable))
  if (grepl("^[1-9][0-9]{0,5}$", text)) as.integer(text) else NA_integer_
}

# Returns the lines of the file that a variable names.
listedNodes <- function(variable) {
  file <- Sys.getenv(variable)
  lines <- tryCatch(suppressWarnings(readLines(file, warn = FALSE)), error = function(e) {
    unreadable(variable, "names a file that cannot be read: ", sQuote(file))
  })
  lines <- lines[nzchar(trimws(lines))]
  if (!length(lines)) unreadable(variable, "names an empty file: ", sQuote(file))
  lines
}

# Returns whether a node's name is one of this machine. Engines use short names and full ones.
isThisMachine <- function(node) {
  short <- function(name) tolower(sub("[.].*", "", name))
  isLocal(node) || (!grepl("^[0-9.]+$", node) && short(node) == short(Sys.info()[["nodename"]]))
}

# Expands Slurm's list of hosts: "n[1-3,07],m1" are n1, n2, n3, n07 and m1. A range keeps the zeros of its first number.
expandHosts <- function(text, variable) {
  refuse <- function() unreadable(variable, "is no list of nodes: ", sQuote(text))
  # Commas in brackets belong to a range.
  letters <- strsplit(text, "")[[1L]]
  depth <- cumsum(letters == "[") - cumsum(letters == "]")
  if (!all(depth %in% 0:1) || depth[[length(depth)]] != 0L) refuse()
  letters[letters == "," & depth == 0L] <- "\n"
  names <- strsplit(paste(letters, collapse = ""), "\n", fixed = TRUE)[[1L]]
  unlist(lapply(names, function(name) {
    if (!nzchar(name)) refuse()
    # Text and ranges alternate.
    parts <- regmatches(name, gregexpr("\\[[^]]*\\]|[^][]+", name))[[1L]]
    expanded <- ""
    for (part in parts) {
      values <- if (startsWith(part, "[")) expandRanges(substr(part, 2L, nchar(part) - 1L), refuse) else part
      if (!length(values) || length(expanded) * length(values) > maxWorkers) refuse()
      expanded <- paste0(rep(expanded, each = length(values)), values)
    }
    expanded
  }))
}

# Expands ranges: "1-3,07" are 1, 2, 3 and 07.
expandRanges <- function(text, refuse) {
  unlist(lapply(strsplit(text, ",", fixed = TRUE)[[1L]], function(range) {
    if (!grepl("^[0-9]{1,9}(-[0-9]{1,9})?$", range)) refuse()
    ends <- strsplit(range, "-", fixed = TRUE)[[1L]]
    if (length(ends) == 1L) return(range)
    numbers <- as.integer(ends)
    if (numbers[[2L]] < numbers[[1L]] || numbers[[2L]] - numbers[[1L]] >= maxWorkers) refuse()
    sprintf("%0*d", nchar(ends[[1L]]), seq(numbers[[1L]], numbers[[2L]]))
  }))
}

# Expands Slurm's list of counts: "6,2(x2)" are 6, 2 and 2.
expandCounts <- function(text, variable) {
  parts <- strsplit(gsub("[[:space:]]", "", text), ",", fixed = TRUE)[[1L]]
  pattern <- "^([1-9][0-9]{0,5})([(]x([1-9][0-9]{0,5})[)])?$"
  if (!length(parts) || !all(grepl(pattern, parts))) unreadable(variable, "is no list of counts: ", sQuote(text))
  times <- sub(pattern, "\\3", parts)
  rep(as.integer(sub(pattern, "\\1", parts)), ifelse(nzchar(times), suppressWarnings(as.integer(times)), 1L))
}
