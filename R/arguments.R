# Checks and normalizes arguments.

# Works as match.fun(), for argument `FUN` of the calling function.
theFunction <- function(FUN, envir = parent.frame(2L)) {
  if (missing(FUN)) badArgument("FUN", "is missing")
  if (is.function(FUN)) return(FUN)
  name <- plain(FUN)
  if (!is.symbol(name) && !(is.character(name) && length(name) == 1L)) name <- eval.parent(substitute(substitute(FUN)))
  if (!is.symbol(name) && !is.character(name)) {
    swapped <- is.function(tryCatch(eval.parent(quote(X)), error = function(e) NULL))
    badArgument(
      "FUN", "must be a function, or the name of one", if (swapped) "; `X` is a function, and the order is `cl, X, FUN`"
    )
  }
  tryCatch(get(as.character(name), envir = envir, mode = "function"), error = function(e) {
    badArgument("FUN", "must be a function, or the name of one: ", conditionMessage(e))
  })
}

# Refuses a cluster in place of `X`, and something else in place of `cl`.
refuseSwapped <- function(cl, X) {
  if (!inherits(cl, "cluster") && inherits(X, "cluster")) {
    badArgument("cl", "is not a cluster, and `X` is one; the order is `cl, X, FUN`")
  }
}

# Removes the class of an argument, because methods of the class may do anything. Classes whose values are not plain
# numbers or texts are kept.
plain <- function(x) {
  own <- is.object(x) && !isS4(x) && !inherits(x, c("factor", "Date", "POSIXt", "difftime", "RustCluster", "cluster"))
  if (own && typeof(x) %in% c("list", "character", "double", "integer", "logical")) unclass(x) else x
}

# Returns for each element whether it is valid text: neither NA nor bytes of an unknown encoding.
isText <- function(x) !is.na(x) & Encoding(x) != "bytes" & validEnc(x)

# Checks a number of workers or threads, or a port.
count <- function(value, argument, max) {
  value <- plain(value)
  if (!is.numeric(value) || length(value) != 1L || is.na(value) || value < 1) {
    # `argument` may be a setting of a host, as in `spec[[1]]$threads`.
    what <- switch(sub(".*[$]", "", argument), threads = "a number of threads", port = "a port", "a number of workers")
    text <- if (is.character(value) && length(value) == 1L && isText(value)) paste0(", not ", dQuote(value, FALSE))
    badArgument(argument, "must be ", what, ", at least 1", text)
  }
  if (value > max) badArgument(argument, "must be at most ", shownNumber(max))
  as.integer(value)
}

# R itself needs this many bytes.
minMemoryLimit <- 100e6

# Returns the limit in bytes; 0 for no limit.
memoryLimit <- function(value) {
  if (!is.numeric(value) || length(value) != 1L || is.na(value)) {
    badArgument("memory_limit", "must be a number of bytes, or Inf")
  }
  if (value < minMemoryLimit) {
    badArgument(
      "memory_limit", "must be at least ", minMemoryLimit / 1e6, " MB (", minMemoryLimit / 1e6,
      "e6), which a worker needs for R itself"
    )
  }
  # A limit beyond the memory of any machine is no limit.
  if (value > 2^53) 0 else as.numeric(value)
}

# Renamed arguments of makeRustCluster() and settings of a host in its `spec`, by their old names.
renamedArguments <- c(
  patience = "heartbeat_timeout", keep_limit = "setup_log_limit", start = "start_method", onFailure = "on_failure"
)

# Returns the named list `given` with new names instead of old ones. `present`: the names of the arguments that were
# given besides. `argument`: returns what error messages call the argument with a new name.
useNewNames <- function(given, present = names(given), argument = identity) {
  for (old in intersect(names(given), names(renamedArguments))) {
    new <- renamedArguments[[old]]
    if (new %in% present || sum(names(given) == old) > 1L) {
      badArgument(argument(new), "is given twice: `", old, "` is its old name; use `", new, "` alone")
    }
    names(given)[names(given) == old] <- new
    warnDeprecated(old, new)
  }
  given
}

# The old names that this session has warned of.
deprecationsShown <- new.env(parent = emptyenv())

# Warns once a session for each old name. Handlers of R's own .Deprecated() handle this warning, too.
warnDeprecated <- function(old, new) {
  if (exists(old, deprecationsShown, inherits = FALSE)) return(invisible())
  text <- paste0("argument `", old, "` is deprecated; use `", new, "` instead")
  warning <- rustclusterCondition("deprecated", text, old = old, new = new, package = "rustcluster", type = "warning")
  class(warning) <- append(class(warning), "deprecatedWarning", 2L)
  base::warning(warning)
  # Not reached if the warning is an error: each call is then refused.
  assign(old, TRUE, deprecationsShown)
}

# Arguments of parallel's clusters that have a meaning for this package.
meaningful <- c("outfile", "rscript", "rscript_args", "homogeneous", "methods", "renice", "rlibs",
                "setup_timeout", "names", "manual", "user", "rshcmd", "rshopts")
# Arguments of parallel's and snow's clusters that are ignored.
meaningless <- c("port", "master", "useXDR", "setup_strategy", "type", "rprog", "rhome",
                 "scriptdir", "snowlib", "useRscript", "host")

# Arguments that other functions have for what is an argument of makeRustCluster().
argumentsElsewhere <- c(
  workers = "spec", nodes = "spec", hosts = "spec", cores = "spec", n = "spec", ncores = "spec", nworkers = "spec",
  retry = "retries", env = "rscript_envs", envs = "rscript_envs", library = "packages", libraries = "packages",
  pkgs = "packages", memory = "memory_limit"
)

# Returns the end of an error message about arguments that makeRustCluster() does not have because other functions do
# what they ask for.
doneElsewhere <- function(unknown) {
  seeds <- "random numbers, clusterSetRNGStream(cl, seed) or clusterLapply(.seed = seed)"
  exports <- "variables, clusterExport(cl, names)"
  functions <- c(seed = seeds, iseed = seeds, export = exports, exports = exports, varlist = exports, globals = exports)
  found <- unique(functions[intersect(unknown, names(functions))])
  if (length(found)) paste0("; use, for ", paste(found, collapse = ", and for "))
}

# Returns the end of an error message about unknown names: the known names that they probably stand for. `synonyms`:
# known names, named by other words for them. A name that is not similar to any other gets no hint.
didYouMean <- function(unknown, known, synonyms = NULL) {
  meant <- lapply(tolower(unknown), function(name) {
    if (name %in% names(synonyms)) return(synonyms[[name]])
    candidates <- unique(known)
    distance <- drop(utils::adist(name, candidates, ignore.case = TRUE))
    # Two changes are one transposition, as in `packagse`. A short name is similar to too many others.
    near <- distance <= min(2, (nchar(name) - 1) %/% 3)
    begins <- nchar(name) >= 4L & startsWith(tolower(candidates), name)
    if (any(near)) candidates[near][[which.min(distance[near])]] else if (sum(begins) == 1L) candidates[begins]
  })
  meant <- unique(unlist(meant))
  if (length(meant)) paste0("; did you mean ", paste0("`", meant, "`", collapse = ", "), "?")
}

clusterOptions <- function(given) {
  names <- names(given)
  if (length(given) && (is.null(names) || !all(nzchar(names)))) {
    badArgument("...", "all further arguments must be named")
  }
  unknown <- setdiff(names, c(meaningful, meaningless))
  if (length(unknown)) {
    known <- c(setdiff(names(formals(makeRustCluster)), "..."), meaningful)
    abort(
      "bad_argument", "unknown argument", if (length(unknown) > 1L) "s", " ",
      paste0("`", unknown, "`", collapse = ", "), doneElsewhere(unknown),
      didYouMean(unknown, known, argumentsElsewhere),
      fields = list(argument = unknown)
    )
  }
  # The defaults that setDefaultClusterOptions() has set.
  defaults <- as.list(get0("defaultClusterOptions", asNamespace("parallel")))
  # An argument that is NULL removes the default.
  options <- defaults[intersect(meaningful, names(defaults))]
  options[names(given)] <- NULL
  # In parallel, NULL means that the output is not redirected, and that there are no arguments.
  if ("outfile" %in% names) given["outfile"] <- list(c(given$outfile, if (is.null(given$outfile)) ""))
  if ("rscript_args" %in% names && is.null(given$rscript_args)) given$rscript_args <- character()
  options <- c(options, lapply(Filter(Negate(is.null), given), plain))

  text <- function(name) is.character(options[[name]]) && length(options[[name]]) == 1L &&
    isText(options[[name]])
  if (!text("outfile")) badArgument("outfile", "must be one file name, or \"\" to print in this session")
  if (!text("rscript") || !nzchar(options[["rscript"]])) {
    badArgument("rscript", "must be one command")
  }
  if (!is.character(options$rscript_args) || !all(isText(options$rscript_args))) {
    badArgument("rscript_args", "must be a character vector")
  }
  for (name in c("homogeneous", "methods", "manual")) {
    if (!isTRUE(options[[name]]) && !isFALSE(options[[name]])) {
      badArgument(name, "must be TRUE or FALSE")
    }
  }
  if (options$manual) {
    abort("not_yet", "`manual = TRUE` is not supported yet", fields = list(argument = "manual"))
  }
  renice <- options$renice
  if (!is.atomic(renice) || length(renice) != 1L || !(is.na(renice) || is.numeric(renice) && abs(renice) <= 40)) {
    badArgument("renice", "must be one number from -40 to 40, or NA")
  }
  options$renice <- if (is.na(renice)) 0L else as.integer(renice)
  timeout <- options$setup_timeout
  if (!is.numeric(timeout) || length(timeout) != 1L || is.na(timeout) || timeout <= 0) {
    badArgument("setup_timeout", "must be a number of seconds above 0")
  }
  for (name in intersect(c("user", "rshcmd", "rshopts"), names(options))) {
    value <- options[[name]]
    nothing <- is.vector(value) && !length(value)
    unset <- isUnset(value) || nothing || identical(value, "")
    options[[name]] <- if (!unset) if (name == "user") hostName(value, name) else texts(value, name)
  }
  # Defaults of parallel are left to the configuration of ssh.
  if (identical(options$user, Sys.info()[["user"]]) && is.null(given[["user"]])) options$user <- NULL
  if (identical(options$rshcmd, "ssh")) options$rshcmd <- NULL
  # parallel's default is "".
  if (!is.null(options$rlibs) && !(is.character(options$rlibs) && all(isText(options$rlibs)))) {
    badArgument("rlibs", "must be a character vector of library paths")
  }
  if (!any(nzchar(options$rlibs))) options$rlibs <- NULL
  options$rscript_local <- if (options$homogeneous) options[["rscript"]] else "Rscript"
  if (is.null(given[["rscript"]])) options$rscript <- NULL
  options
}

# Checks a number in a range. `what`: what the argument is, such as "a number of seconds". `infinite`: whether Inf,
# which stands for no limit, is valid, too.
between <- function(value, argument, what, min, max, infinite = FALSE) {
  value <- plain(value)
  if (infinite && identical(value, Inf)) return(invisible())
  if (!is.numeric(value) || length(value) != 1L || !isTRUE(value >= min)) {
    badArgument(argument, "must be ", what, ", at least ", shownNumber(min), if (infinite) ", or Inf")
  }
  if (value > max) badArgument(argument, "must be at most ", shownNumber(max), if (infinite) ", or Inf")
}

# Returns a limit as error messages show it.
shownNumber <- function(number) {
  if (number == 2^20) "1 MiB (2^20)" else format(number, scientific = number > 1e6, digits = 15L)
}

# Checks `type`, which selects nothing here: all types of makeCluster() are accepted.
checkType <- function(type) {
  if (is.numeric(type)) {
    badArgument("type", "is the second argument; hosts with their numbers of workers are one: c(node1 = 8, node2 = 8)")
  }
  if (!is.character(type) || length(type) != 1L || !type %in% clusterTypes) {
    badArgument("type", "must be a cluster type of makeCluster(): ", paste0("\"", clusterTypes, "\"", collapse = ", "))
  }
}

clusterTypes <- c("PSOCK", "FORK", "SOCK", "MPI", "RUST")

# Returns what was given instead of a valid argument, as the end of an error message.
notThis <- function(value) {
  paste0(", not ", if (is.null(value)) "NULL" else paste0("an object of class ", dQuote(class(value)[[1L]], FALSE)))
}

usableCores <- function() {
  cores <- usable_cores()
  option <- suppressWarnings(as.integer(getOption("mc.cores", NA_integer_)))
  if (length(option) == 1L && !is.na(option) && option >= 1L) cores <- min(cores, option)
  cores
}
