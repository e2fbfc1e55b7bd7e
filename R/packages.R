# Decides where the packages of a cluster are loaded: by the agent, once, before it forks, or by each worker, after the
# fork. The head calls none of these functions.
#
# A fork inherits the state that a package creates at load: a seed, a random number, a path in tempdir(), an open file.
# The agent observes each namespace while it loads. If a namespace creates state that must differ between processes, the
# agent restarts without it, and its workers load the package instead.

# Packages that the agent never loads. The agent would detect them itself, at the cost of a restart.
perProcess <- c(
  "callr", "credentials", "curl", "dqrng", "ff", "gert", "hdf5r", "later", "magick", "rgl", "snow", "terra"
)

# Packages whose code can read the clock, the process id or random bytes, but that do so only in later calls, or renew
# state that belongs to another process. Tests have shown that.
perCall <- c(
  "Amelia", "clock", "future", "ggrepel", "igraph", "lwgeom", "nloptr", "progressr", "ps", "ranger",
  "RcppArmadillo", "RPostgreSQL", "RSQLite", "s2", "sass", "Seurat", "sys", "testthat", "timeDate", "uuid",
  "vroom", "zip"
)

# Packages whose process state can be renewed in a worker, in less time than loading them takes.
renewals <- list(
  # data.table's fork handler limits the child to one thread.
  data.table = function() getExportedValue("data.table", "setDTthreads")(NULL),
  # cli's timer is a thread, which CLI_NO_THREAD prevents in the agent.
  cli = function() {
    cli <- asNamespace("cli")
    .Call(cli$clic_start_thread, cli, cli$clienv$tick_time, cli$clienv$speed_time)
  }
)

# Attaches the packages that may be forked. Loads packages that cannot be attached yet because an earlier one is left to
# the workers. `after`: packages that are known to be left to the workers. Returns the packages that were detected, with
# the reasons, or a character vector for a failure.
loadBeforeFork <- function(packages, after) {
  if (is.na(Sys.getenv("CLI_NO_THREAD", NA))) {
    Sys.setenv(CLI_NO_THREAD = "true")
    on.exit(Sys.unsetenv("CLI_NO_THREAD"))
  }
  for (package in intersect(packages, after)) {
    failure <- loadFailure(find.package(package), package)
    if (!is.null(failure)) return(failure)
  }
  watch <- watchLoading()
  on.exit(watch$end(), add = TRUE)
  for (package in setdiff(packages, after)) {
    failure <- watch$within(package, {
      if (any(after %in% packages[seq_len(match(package, packages))])) {
        loadFailure(loadNamespace(package), package, "loaded")
      } else {
        attachPackages(package)
      }
    })
    if (!is.null(failure)) return(failure)
  }
  watch$culprits(packages)
}

# Returns NULL, or an error message.
loadFailure <- function(expr, package, how = "attached") {
  tryCatch({
    expr
    NULL
  }, error = function(e) paste0("package ", sQuote(package), " could not be ", how, ": ", conditionMessage(e)))
}

# Observes what namespaces do while they are loaded.
watchLoading <- function() {
  # The namespaces that are being loaded, the innermost last (`stack`); the imports of each (`asks`); and for those that
  # must not be forked, what they did (`found`).
  stack <- character()
  asks <- list()
  found <- list()
  looking <- FALSE
  note <- function(namespace, what) {
    if (looking) return()
    if (length(namespace) && !namespace %in% c(basePackages(), perCall, names(renewals))) {
      found[[namespace]] <<- union(found[[namespace]], what)
    }
  }
  innermost <- function() stack[length(stack)]
  # Detect draws by an active binding, also where the seed is restored afterwards. Many packages make R write its seed
  # without a draw.
  set.seed(NULL)
  state <- get(".Random.seed", globalenv())
  watchSeed <- function() {
    if (exists(".Random.seed", globalenv(), inherits = FALSE)) {
      if (bindingIsActive(as.name(".Random.seed"), globalenv())) return()
      rm(".Random.seed", envir = globalenv())
    }
    makeActiveBinding(".Random.seed", function(value) {
      if (!missing(value) && !identical(value, state)) {
        note(innermost(), "drew random numbers")
        state <<- value
      }
      state
    }, globalenv())
  }
  directory <- tempdir()
  last <- processState(directory)
  # Attributes changes since the last call to this namespace.
  look <- function(namespace) {
    looking <<- TRUE
    watchSeed()
    now <- processState(directory)
    looking <<- FALSE
    for (what in names(now)) if (!identical(now[[what]], last[[what]])) note(namespace, what)
    last <<- now
  }
  ask <- function(name) {
    if (length(stack) && !name %in% asks[[innermost()]]) asks[[innermost()]] <<- c(asks[[innermost()]], name)
  }
  within <- function(name, expr) {
    ask(name)
    look(innermost())
    stack <<- c(stack, name)
    on.exit({
      look(name)
      stack <<- stack[-length(stack)]
    })
    expr
  }
  loadNamespace <- base::loadNamespace
  replaced <- list(
    loadNamespace = function(package, ...) {
      name <- as.character(package)[[1L]]
      if (isNamespaceLoaded(name)) {
        ask(name)
        return(loadNamespace(package, ...))
      }
      value <- within(name, loadNamespace(package, ...))
      if (readsSources(name)) note(name, "can seed itself in its compiled code")
      value
    }
  )
  watched <- list(
    tempdir = "asked for the temporary directory", tempfile = "asked for the name of a temporary file",
    Sys.getpid = "asked for the process id", Sys.time = "asked for the time", date = "asked for the time",
    system = "started processes"
  )
  for (name in names(watched)) {
    replaced[[name]] <- reporting(name, watched[[name]], function(what) note(innermost(), what))
  }
  replaced$reg.finalizer <- reporting(
    "reg.finalizer", "registered an exit finalizer", function(what) note(innermost(), what), quote(onexit)
  )
  replaced$file <- reporting(
    "file", "read random bytes", function(what) note(innermost(), what),
    quote(is.character(description) && any(grepl("^(/dev/u?random|/proc/sys/kernel/random)", description)))
  )
  originals <- mget(names(replaced), baseenv())
  Map(setBase, names(replaced), replaced)
  list(
    within = within,
    end = function() {
      # Packages may still call one of the replaced functions.
      looking <<- TRUE
      Map(setBase, names(originals), originals)
      rm(list = intersect(".Random.seed", ls(globalenv(), all.names = TRUE)), envir = globalenv())
    },
    # Returns the packages that are or import a detected namespace, with the reasons.
    culprits = function(packages) {
      reasons <- lapply(packages, function(package) {
        reached <- package
        while (length(more <- setdiff(unlist(asks[reached]), reached))) reached <- c(reached, more)
        # Packages that are always left to workers need no reason.
        bad <- intersect(reached, c(names(found), intersect(perProcess, loadedNamespaces())))
        vapply(bad, function(name) paste(c(name, found[[name]]), collapse = ": "), "")
      })
      names(reasons) <- packages
      reasons[lengths(reasons) > 0L]
    }
  )
}

# Returns a function of base that calls `report` before it runs, if `when` is TRUE.
reporting <- function(name, what, report, when = TRUE) {
  original <- get(name, baseenv())
  body(original) <- call("{", call("if", call("isTRUE", when), call("(report)", what)), body(original))
  environment(original) <- list2env(list("(report)" = report), parent = baseenv())
  original
}

setBase <- function(name, value) {
  base <- baseenv()
  get("unlockBinding", base)(name, base)
  assign(name, value, base)
  lockBinding(name, base)
}

# Returns the state of this process that a fork inherits, besides memory. Names are the texts for changes.
processState <- function(directory) {
  self <- "/proc/self"
  children <- sprintf("/proc/self/task/%s/children", list.files(file.path(self, "task")))
  list(
    "started threads" = length(list.files(file.path(self, "task"))),
    "opened connections" = getAllConnections(),
    "opened files or sockets" = length(list.files(file.path(self, "fd"))),
    "started processes" = unlist(lapply(children[file.exists(children)], readLines, warn = FALSE)),
    "made files in the temporary directory" = list.files(directory, all.files = TRUE, no.. = TRUE)
  )
}

# Returns whether the compiled code of a namespace can read random bytes, the clock or the process id, which seed
# generators.
readsSources <- function(namespace) {
  libraries <- list.files(
    file.path(getNamespaceInfo(namespace, "path"), "libs"), "[.]so$", recursive = TRUE, full.names = TRUE
  )
  any(vapply(libraries, code_reads_sources, NA))
}

# Runs in a forked worker: loads the packages that the agent has left to it.
loadAfterFork <- function(packages, after) {
  for (name in intersect(names(renewals), loadedNamespaces())) {
    # Another version of the package may lack this function: the worker is then a plain fork.
    try(suppressWarnings(renewals[[name]]()), silent = TRUE)
  }
  renewPort()
  # Packages that are attached already keep their positions.
  if (length(after)) attachPackages(packages)
}

# Changes the default port of clusters that this worker makes, which parallel draws at load.
renewPort <- function() {
  if (!is.na(suppressWarnings(as.integer(Sys.getenv("R_PARALLEL_PORT"))))) return()
  port <- get("defaultClusterOptions", asNamespace("parallel"))$port
  get("setDefaultClusterOptions", asNamespace("parallel"))(port = 11000L + (port - 11000L + Sys.getpid()) %% 1000L)
}

# Returns whether the startup of this session, for example a user's profile, has created state that must not be forked.
# Workers are then separate R processes.
startedUnsafe <- function() {
  loaded <- setdiff(loadedNamespaces(), c(basePackages(), perCall, names(renewals)))
  texts <- unlist(rapply(
    c(options(), as.list(Sys.getenv()[names(Sys.getenv()) != "R_SESSION_TMPDIR"]), as.list(globalenv())),
    identity, classes = "character", how = "unlist"
  ))
  any(loaded %in% perProcess) || any(vapply(loaded, readsSources, NA)) ||
    any(grepl(tempdir(), texts, fixed = TRUE, useBytes = TRUE)) ||
    length(list.files(tempdir(), all.files = TRUE, no.. = TRUE)) > 0L ||
    length(getAllConnections()) > 3L
}

basePackages <- function() {
  c("base", "compiler", "datasets", "graphics", "grDevices", "grid", "methods", "parallel", "splines",
    "stats", "stats4", "tcltk", "tools", "utils", "rustcluster")
}
