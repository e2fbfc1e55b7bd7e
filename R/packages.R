# Where the packages of a cluster are loaded: by the agent, once, before it forks, or by each worker,
# after the fork. None of this is called in the head.
#
# A fork has all that a package made of its process while it was loaded: a seed, a number drawn, a path
# in tempdir(), an open file. The agent watches each namespace while it loads. If one does what must
# differ between processes, the agent starts anew without it, and its workers load it instead.

# Packages that are never loaded by the agent. The agent would find them out itself, at the price of a
# restart.
perProcess <- c(
  "callr", "credentials", "curl", "dqrng", "ff", "gert", "hdf5r", "later", "magick", "rgl", "snow", "terra"
)

# Packages whose code can read the clock, the process id or random bytes, and that were seen to do so for
# what is called later, or to make anew what belongs to another process.
perCall <- c(
  "Amelia", "clock", "future", "ggrepel", "igraph", "lwgeom", "nloptr", "progressr", "ps", "ranger",
  "RcppArmadillo", "RPostgreSQL", "RSQLite", "s2", "sass", "Seurat", "sys", "testthat", "timeDate", "uuid",
  "vroom", "zip"
)

# Packages that make something of their process that can be made anew in a worker, in less time than
# loading them takes.
renewals <- list(
  # Its handler of forks leaves one thread to the child.
  data.table = function() getExportedValue("data.table", "setDTthreads")(NULL),
  # Its timer is a thread, which CLI_NO_THREAD has kept out of the agent.
  cli = function() {
    cli <- asNamespace("cli")
    .Call(cli$clic_start_thread, cli, cli$clienv$tick_time, cli$clienv$speed_time)
  }
)

# Attaches the packages that may be forked, and loads those that cannot be attached yet, for one before
# them is left to the workers. `after`: those that are known to be for the workers. Returns these and
# those that were found out, by what they did; a failure is a character vector.
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

# NULL, or what went wrong.
loadFailure <- function(expr, package, how = "attached") {
  tryCatch({
    expr
    NULL
  }, error = function(e) paste0("package ", sQuote(package), " could not be ", how, ": ", conditionMessage(e)))
}

# Watches what namespaces do while they are loaded.
watchLoading <- function() {
  # The namespaces that are being loaded, the innermost last; of each, those that it asks for; and of
  # those that must not be forked, what they did.
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
  # R's generator tells of its draws, also where its state is put back after that. Many packages have it
  # write its state without a draw.
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
  # What has changed since the last look is of this namespace.
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
    replaced[[name]] <- telling(name, watched[[name]], function(what) note(innermost(), what))
  }
  replaced$reg.finalizer <- telling(
    "reg.finalizer", "registered an exit finalizer", function(what) note(innermost(), what), quote(onexit)
  )
  replaced$file <- telling(
    "file", "read random bytes", function(what) note(innermost(), what),
    quote(is.character(description) && any(grepl("^(/dev/u?random|/proc/sys/kernel/random)", description)))
  )
  originals <- mget(names(replaced), baseenv())
  Map(setBase, names(replaced), replaced)
  list(
    within = within,
    end = function() {
      # Packages may have kept one of these functions.
      looking <<- TRUE
      Map(setBase, names(originals), originals)
      rm(list = intersect(".Random.seed", ls(globalenv(), all.names = TRUE)), envir = globalenv())
    },
    # Those of the packages that are, or ask for, a namespace that was found out, with what that did.
    culprits = function(packages) {
      reasons <- lapply(packages, function(package) {
        reached <- package
        while (length(more <- setdiff(unlist(asks[reached]), reached))) reached <- c(reached, more)
        # Of those that are always left to workers nothing need be seen.
        bad <- intersect(reached, c(names(found), intersect(perProcess, loadedNamespaces())))
        vapply(bad, function(name) paste(c(name, found[[name]]), collapse = ": "), "")
      })
      names(reasons) <- packages
      reasons[lengths(reasons) > 0L]
    }
  )
}

# A function of base's that tells of its calls, or of those for which `when` holds, and is what it was
# otherwise.
telling <- function(name, what, tell, when = TRUE) {
  original <- get(name, baseenv())
  body(original) <- call("{", call("if", call("isTRUE", when), call("(tell)", what)), body(original))
  environment(original) <- list2env(list("(tell)" = tell), parent = baseenv())
  original
}

setBase <- function(name, value) {
  base <- baseenv()
  get("unlockBinding", base)(name, base)
  assign(name, value, base)
  lockBinding(name, base)
}

# What a fork takes along of this process, besides memory; named by what is said of its changes.
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

# Whether the compiled code of a namespace can read random bytes, the clock or the process id, from which
# generators are seeded.
readsSources <- function(namespace) {
  libraries <- list.files(
    file.path(getNamespaceInfo(namespace, "path"), "libs"), "[.]so$", recursive = TRUE, full.names = TRUE
  )
  any(vapply(libraries, code_reads_sources, NA))
}

# In a forked worker: what the agent has left to it.
loadAfterFork <- function(packages, after) {
  for (name in intersect(names(renewals), loadedNamespaces())) {
    # Another version may have it elsewhere: the worker is no worse than a plain fork then.
    try(suppressWarnings(renewals[[name]]()), silent = TRUE)
  }
  renewPort()
  # Those that are attached stay where they are.
  if (length(after)) attachPackages(packages)
}

# The port of clusters that this worker makes: parallel draws it when it is loaded.
renewPort <- function() {
  if (!is.na(suppressWarnings(as.integer(Sys.getenv("R_PARALLEL_PORT"))))) return()
  port <- get("defaultClusterOptions", asNamespace("parallel"))$port
  get("setDefaultClusterOptions", asNamespace("parallel"))(port = 11000L + (port - 11000L + Sys.getpid()) %% 1000L)
}

# Whether what this session did when it started, as a user's profile has it, must not be forked: workers
# are R sessions of their own then.
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
