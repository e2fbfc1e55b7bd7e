# Compares workers that have packages attached by `packages =` with those of a PSOCK cluster, one package after
# the other: state that must differ between processes, paths in deleted temporary directories, threads,
# connections, children.
#
#   Rscript tools/packages.R OUT.csv [start] package ...
#
# `start`: "fork" (default) or "spawn". Packages that are not installed are left out.

# Returns the state of a worker. The function is sent as it is, so that it may refer to nothing in this file.
survey <- function(package) {
  hash <- function(x) digest::digest(x, "xxhash64")
  seen <- new.env()
  plain <- function(x, depth = 0L) {
    if (depth > 6L) return(NULL)
    if (is.function(x)) {
      env <- environment(x)
      return(if (is.environment(env)) plain(env, depth))
    }
    if (is.environment(x)) {
      if (isNamespace(x) || identical(x, globalenv()) || identical(x, baseenv())) return(NULL)
      if (!is.null(attr(x, "name")) || !is.null(seen[[format.default(x)]])) return(NULL)
      assign(format.default(x), TRUE, seen)
      names <- sort(ls(x, all.names = TRUE))
      return(sapply(names, function(n) plain(tryCatch(get(n, x), error = function(e) NULL), depth + 1L),
                    simplify = FALSE))
    }
    if (typeof(x) == "list") return(lapply(unclass(x), plain, depth + 1L))
    if (is.atomic(x)) return(as.vector(x))
    NULL
  }
  before <- c("base", "compiler", "tools", "parallel", "rustcluster", "digest",
              "utils", "stats", "graphics", "grDevices", "methods", "datasets")
  namespaces <- setdiff(loadedNamespaces(), before)
  values <- list()
  for (name in namespaces) {
    env <- asNamespace(name)
    for (variable in setdiff(ls(env, all.names = TRUE), c(".__NAMESPACE__.", ".__S3MethodsTable__.", ".packageName"))) {
      if (startsWith(variable, ".__")) next
      values[[paste0(name, "::", variable)]] <- plain(tryCatch(get(variable, env), error = function(e) NULL))
    }
  }
  for (name in names(options())) values[[paste0("option ", name)]] <- plain(getOption(name))
  own <- c("R_SESSION_TMPDIR", "RUSTCLUSTER_LIB", "R_TESTS")
  for (name in setdiff(names(Sys.getenv()), own)) values[[paste0("variable ", name)]] <- Sys.getenv(name)
  paths <- lapply(values, function(x) {
    text <- unlist(rapply(list(x), as.character, classes = "character", how = "unlist"))
    found <- regmatches(text, regexpr("/[^ ]*/Rtmp[A-Za-z0-9]+", text))
    unique(found)
  })
  paths <- paths[lengths(paths) > 0L]
  dead <- names(paths)[!vapply(paths, function(p) all(startsWith(p, tempdir())), NA)]
  hashes <- vapply(values, hash, "")
  draws <- if ("dqrng" %in% namespaces) dqrng::dqrunif(1)
  list(
    namespaces = namespaces, hashes = hashes, dead = dead, draws = draws,
    seed = exists(".Random.seed", globalenv()),
    tasks = length(list.files("/proc/self/task")),
    connections = nrow(showConnections()),
    files = sort(list.files(tempdir(), all.files = TRUE, no.. = TRUE)),
    children = length(scan(sprintf("/proc/self/task/%d/children", Sys.getpid()), 0L, quiet = TRUE)),
    fds = sort(sub("[0-9]+", "N", vapply(list.files("/proc/self/fd", full.names = TRUE), Sys.readlink, ""))),
    threads = c(
      data.table = if ("data.table" %in% namespaces) data.table::getDTthreads(),
      RcppParallel = if ("RcppParallel" %in% namespaces) RcppParallel::defaultNumThreads()
    ),
    search = search()
  )
}

try_one <- function(package, start) {
  told <- character()
  attached <- function(cl) parallel::clusterCall(cl, survey, package)
  psock <- parallel::makePSOCKcluster(2, rscript_envs = NULL)
  on.exit(parallel::stopCluster(psock))
  parallel::clusterCall(psock, function(package) {
    suppressPackageStartupMessages(library(package, character.only = TRUE))
    NULL
  }, package)
  want <- attached(psock)
  began <- proc.time()[[3L]]
  ours <- withCallingHandlers(
    rustcluster::makeRustCluster(2, packages = package, start_method = start, threads = 2),
    condition = function(c) {
      if (inherits(c, "rustcluster_condition") || inherits(c, "warning")) told <<- c(told, conditionMessage(c))
      if (inherits(c, "warning")) invokeRestart("muffleWarning")
    }
  )
  seconds <- proc.time()[[3L]] - began
  on.exit(parallel::stopCluster(ours), add = TRUE)
  agent <- length(list.files(sprintf("/proc/%d/task", rustcluster:::agentPids(ours))))
  got <- attached(ours)
  names <- intersect(names(want[[1L]]$hashes), names(got[[1L]]$hashes))
  differ <- function(two) names[two[[1L]]$hashes[names] != two[[2L]]$hashes[names]]
  extra <- function(what) paste(setdiff(unlist(got[[1L]][[what]]), unlist(want[[1L]][[what]])), collapse = " ")
  count <- function(what) {
    if (got[[1L]][[what]] != want[[1L]][[what]]) paste(want[[1L]][[what]], "->", got[[1L]][[what]]) else ""
  }
  data.frame(
    package = package, start = start, seconds = round(seconds, 2),
    shared = paste(setdiff(differ(want), differ(got)), collapse = " "),
    same_draw = !is.null(got[[1L]]$draws) && identical(got[[1L]]$draws, got[[2L]]$draws),
    dead = paste(got[[1L]]$dead, collapse = " "), agent_tasks = agent,
    tasks = count("tasks"), connections = count("connections"), children = count("children"),
    seed = if (got[[1L]]$seed != want[[1L]]$seed) got[[1L]]$seed else "",
    files = paste(setdiff(want[[1L]]$files, got[[1L]]$files), collapse = " "),
    psock_tasks = want[[1L]]$tasks, psock_differ = paste(differ(want), collapse = " "),
    threads = paste(names(got[[1L]]$threads), unlist(got[[1L]]$threads), collapse = " "),
    fds = paste(length(got[[1L]]$fds) - length(want[[1L]]$fds)),
    search = identical(setdiff(got[[1L]]$search, "package:rustcluster"), want[[1L]]$search),
    told = paste(told, collapse = " | ")
  )
}

arguments <- commandArgs(trailingOnly = TRUE)
out <- arguments[[1L]]
start <- intersect(arguments, c("fork", "spawn"))
if (!length(start)) start <- "fork"
packages <- setdiff(arguments[-1L], c("fork", "spawn"))
packages <- packages[nzchar(lapply(packages, function(p) system.file(package = p)))]
results <- NULL
for (package in packages) {
  row <- tryCatch(try_one(package, start), error = function(e) {
    message(package, ": ", conditionMessage(e))
    NULL
  })
  results <- rbind(results, row)
  utils::write.csv(results, out, row.names = FALSE)
}
