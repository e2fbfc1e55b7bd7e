# Parses the `spec` of makeRustCluster() into one entry for each agent.

hostSettings <- c("host", "user", "ncore", "port", "rscript", "rlibs", "rshcmd", "rshopts",
                  "rscript_envs", "threads", "renice", "start_method")

# Returns a list of `hosts`, each a list of settings with an agent of its own; in the order of `spec`, `owner` (the
# index of the host of an entry) and `workers` (NA for all usable cores); `launchers`, those of batch engines; and
# `problems`, why hosts cannot be used: NA until more is known (installMissing()). The setting `local` is TRUE for a
# host that needs no ssh: it is this machine, and `spec` sets neither another user nor a port or an ssh command.
# `before`: the number of launchers that the cluster has already.
specHosts <- function(spec, defaults = list(), before = 0L) {
  entries <- specEntries(spec)
  launchers <- batchLaunchers(entries)
  entries <- numberLaunchers(entries, launchers, before)
  workers <- vapply(entries, `[[`, 0L, "workers")
  if (sum(workers, na.rm = TRUE) > maxWorkers) {
    badArgument("spec", "must ask for at most ", format(maxWorkers, scientific = FALSE), " workers")
  }
  local <- list()
  hosts <- lapply(entries, function(entry) {
    settings <- entry$settings
    connection <- settings[intersect(names(settings), c("port", "rshcmd", "rshopts"))]
    launched <- !is.null(settings$launcher) || !is.null(settings$dial)
    other <- setdiff(names(defaults), c(names(settings), if (launched) c("user", "rshcmd", "rshopts")))
    settings <- c(settings, defaults[other])
    if (launched) return(c(settings, local = FALSE))
    # A launcher knows that this machine is a node of its allocation, under whatever name.
    if (isTRUE(settings$local)) return(settings)
    if (is.null(local[[settings$host]])) local[[settings$host]] <<- isLocal(settings$host)
    own <- is.null(settings$user) || settings$user == Sys.info()[["user"]]
    c(settings, local = own && !length(connection) && local[[settings$host]])
  })
  keys <- vapply(hosts, function(host) {
    paste(deparse(host[order(names(host))]), collapse = "")
  }, "")
  list(
    hosts = hosts[!duplicated(keys)], owner = match(keys, unique(keys)), workers = workers, launchers = launchers,
    problems = rep(NA_character_, length(unique(keys)))
  )
}

# The maximum number of workers. A larger number is a mistake.
maxWorkers <- 100000

specEntries <- function(spec) {
  if (isLauncher(spec)) return(launcherEntries(spec))
  spec <- plain(spec)
  if (is.numeric(spec) && length(spec) && !is.null(names(spec))) {
    return(Map(function(host, workers) namedEntry(host, count(workers, ofHost(host), maxWorkers)),
               names(spec), spec, USE.NAMES = FALSE))
  }
  # makePSOCKcluster() uses the first of several numbers.
  if (is.numeric(spec) && length(spec)) {
    workers <- count(spec[[1L]], "spec", maxWorkers)
    return(list(namedEntry("localhost", workers)))
  }
  if (is.character(spec) && length(spec)) {
    # A number beside a text becomes a text: only the text is wrong.
    numbers <- isText(spec)
    numbers[numbers] <- grepl("^[0-9.]+$", spec[numbers])
    wrong <- if (!is.null(names(spec)) && any(numbers)) which(!numbers)
    if (length(wrong)) {
      host <- names(spec)[[wrong[[1L]]]]
      namedEntry(host, count(spec[[wrong[[1L]]]], ofHost(host), maxWorkers))
    }
    if (any(grepl("^[0-9]+$", spec[isText(spec)]))) {
      badArgument("spec", "contains a number in quotes, which would be the name of a host; remove the quotes")
    }
    return(lapply(unname(spec), namedEntry, workers = 1L))
  }
  if (is.list(spec) && length(spec)) {
    if ("host" %in% names(spec)) {
      if (any(vapply(spec, isLauncher, NA))) {
        badArgument("spec", "has a launcher beside `host`; a list with launchers has a list for each host, such as ",
                    "list(slurm(cores = 2), list(host = \"x\"))")
      }
      spec <- list(spec)
    }
    launched <- vapply(spec, isLauncher, NA)
    entries <- lapply(seq_along(spec), function(i) if (launched[[i]]) spec[[i]] else listEntry(spec[[i]], i))
    hosts <- entries[!launched]
    counted <- vapply(hosts, function(entry) "ncore" %in% names(entry), NA)
    # In parallel, each entry is a worker.
    flat <- !any(counted) && anyDuplicated(hosts) > 0L
    return(do.call(c, lapply(unname(entries), function(entry) {
      if (isLauncher(entry)) return(launcherEntries(entry))
      workers <- if (flat) 1L else if (is.null(entry$ncore)) NA_integer_ else entry$ncore
      entry$ncore <- NULL
      list(list(settings = entry, workers = workers))
    })))
  }
  badArgument(
    "spec", "must be a number of workers, host names, numbers of workers named by their hosts, ",
    "a list of hosts, or a launcher"
  )
}

# Returns what error messages call the number of workers of a host.
ofHost <- function(host) paste0("spec[", dQuote(host, FALSE), "]")

namedEntry <- function(text, workers) {
  list(settings = hostAddress(text, "spec"), workers = workers)
}

# Parses the address of a host in one of the forms of ssh and scp: host, user@host, host:port, [address]:port,
# ssh://user@host:port. An IPv6 address without a port needs no brackets. Returns a list of `host` and, if they are
# given, `user` and `port`.
hostAddress <- function(text, argument) {
  text <- hostName(text, argument)
  refuse <- function(...) badArgument(argument, "has an invalid host, ", sQuote(text), ": ", ...)
  rest <- text
  if (grepl("://", rest, fixed = TRUE)) {
    if (!grepl("^ssh://", rest, ignore.case = TRUE)) refuse("the only supported scheme is ssh://")
    rest <- sub("/$", "", substring(rest, 7L))
  }
  user <- if (grepl("@", rest, fixed = TRUE)) sub("@[^@]*$", "", rest)
  rest <- sub("^.*@", "", rest)
  if (!is.null(user) && grepl(":", user, fixed = TRUE)) {
    # Hide the password: error messages end up in logs.
    text <- paste0(sub(":.*", "", user), ":...@", rest)
    refuse("a password cannot be given; set up a key with `ssh-copy-id`")
  }
  bracketed <- startsWith(rest, "[")
  if (bracketed && !grepl("^\\[[^][]+\\](:|$)", rest)) {
    refuse("the brackets do not match; write [address] or [address]:port")
  }
  colons <- nchar(gsub("[^:]", "", rest))
  if (bracketed) {
    host <- sub("^\\[(.*)\\].*", "\\1", rest)
    port <- if (grepl("]:", rest, fixed = TRUE)) sub("^.*\\]:", "", rest)
  } else {
    # An IPv6 address has at least two colons.
    host <- if (colons == 1L) sub(":.*", "", rest) else rest
    port <- if (colons == 1L) sub(".*:", "", rest)
  }
  if (!nzchar(host)) refuse("the name is empty")
  if ((bracketed || colons > 1L) && !isIPv6(host)) {
    refuse(sQuote(host), " is not an IPv6 address; write host:port, or [address]:port")
  }
  # The characters that ssh refuses in the name of a host, and those of paths.
  if (grepl("[]['`\"$\\\\;&<>|(){}/,#?]", host)) refuse("the name of a host contains an invalid character")
  c(
    list(host = hostName(host, argument)), if (!is.null(user)) list(user = hostName(user, argument)),
    if (!is.null(port)) list(port = portNumber(port, refuse))
  )
}

# NULL and NA stand for the default.
isUnset <- function(value) is.null(value) || (is.atomic(value) && length(value) == 1L && is.na(value))

portNumber <- function(port, refuse) {
  number <- if (grepl("^[0-9]{1,9}$", port)) as.integer(port) else 0L
  if (number < 1L || number > 65535L) refuse("the port must be a number from 1 to 65535")
  number
}

# An IPv6 address has groups of up to four hexadecimal digits. "::" stands for one or more groups of zeros. The last two
# groups may be an IPv4 address. A zone may follow.
isIPv6 <- function(text) {
  address <- sub("%[A-Za-z0-9_.-]+$", "", text)
  address <- sub(":([0-9]{1,3}[.]){3}[0-9]{1,3}$", ":0:0", address)
  if (!grepl("^[0-9A-Fa-f:]+$", address) || grepl(":::|::.*::|^:[^:]|[^:]:$", address)) return(FALSE)
  groups <- strsplit(address, ":", fixed = TRUE)[[1L]]
  groups <- groups[nzchar(groups)]
  all(nchar(groups) <= 4L) && if (grepl("::", address, fixed = TRUE)) length(groups) < 8L else length(groups) == 8L
}

# Returns a host as it is written in `spec`.
writtenHost <- function(host) {
  name <- host$host
  if (grepl(":", name, fixed = TRUE) && !is.null(host$port)) name <- paste0("[", name, "]")
  paste0(
    if (!is.null(host$user)) paste0(host$user, "@"), name, if (!is.null(host$port)) paste0(":", host$port)
  )
}

# Checks a name of a host or user. ssh would take a leading hyphen for an option.
hostName <- function(text, argument) {
  text <- plain(text)
  ok <- is.character(text) && length(text) == 1L && isText(text) && nzchar(text) &&
    !grepl("^-|[[:space:][:cntrl:]]", text)
  if (!ok) badArgument(argument, "must name a host or a user, without spaces or a leading hyphen")
  text
}

# The checks of settings of a host, by name. Each takes the value and the argument that error messages name, and returns
# the value.
settingChecks <- list(
  user = function(x, f) hostName(x, f),
  ncore = function(x, f) count(x, f, maxWorkers),
  port = function(x, f) count(x, f, 65535),
  threads = function(x, f) count(x, f, 4096),
  renice = function(x, f) niceness(x, f),
  rscript = function(x, f) texts(x, f, 1L),
  rlibs = function(x, f) texts(x, f),
  rshcmd = function(x, f) texts(x, f),
  rshopts = function(x, f) texts(x, f),
  rscript_envs = function(x, f) variables(x, f),
  start_method = function(x, f) startMethod(x, f)
)

niceness <- function(value, argument) {
  ok <- is.numeric(value) && length(value) == 1L && isTRUE(abs(value) <= 40)
  if (!ok) badArgument(argument, "must be a number from -40 to 40")
  as.integer(value)
}

listEntry <- function(entry, i) {
  where <- paste0("spec[[", i, "]]")
  entry <- plain(entry)
  if (is.character(entry) && length(entry) == 1L) entry <- namedEntry(entry, 1L)$settings
  if (is.list(entry)) entry <- lapply(entry, plain)
  if (!is.list(entry) || is.null(entry$host)) {
    badArgument("spec", "must have a `host` in each list; element ", i, " has none")
  }
  entry <- useNewNames(entry, argument = function(name) paste0(where, "$", name))
  unknown <- setdiff(names(entry), hostSettings)
  if (length(unknown) || !all(nzchar(names(entry)))) {
    badArgument("spec", "has unknown settings in element ", i, ": ",
                paste0("`", unknown, "`", collapse = ", "), "; the known settings are ",
                paste0("`", hostSettings, "`", collapse = ", "))
  }
  field <- function(name) paste0(where, "$", name)
  address <- hostAddress(entry$host, field("host"))
  for (name in names(address)) {
    other <- entry[[name]]
    if (name != "host" && !isUnset(other) && !isTRUE(all.equal(other, address[[name]], check.attributes = FALSE))) {
      badArgument(field("host"), "has a ", name, " that contradicts `", name, "`; set it once")
    }
    entry[[name]] <- address[[name]]
  }
  # NULL and NA mean that a setting is not set; for ncore they mean all cores.
  asked <- "ncore" %in% names(entry)
  entry <- entry[!vapply(entry, isUnset, NA)]
  for (name in intersect(names(settingChecks), names(entry))) {
    entry[[name]] <- settingChecks[[name]](entry[[name]], field(name))
  }
  if (asked && is.null(entry$ncore)) entry$ncore <- NA_integer_
  entry
}

texts <- function(value, argument, length = NULL) {
  value <- plain(value)
  ok <- is.character(value) && base::length(value) && all(isText(value)) && all(nzchar(value)) &&
    (is.null(length) || base::length(value) == length)
  if (!ok) badArgument(argument, if (is.null(length)) "must be a character vector" else "must be one string")
  value
}

startMethod <- function(value, argument = "start_method") {
  tryCatch(match.arg(value, c("fork", "spawn")), error = function(e) {
    badArgument(argument, "must be \"fork\" or \"spawn\"")
  })
}

# Returns whether a name or an address is of this machine. ssh resolves all other names.
isLocal <- function(host) {
  own <- Sys.info()[["nodename"]]
  tolower(host) %in% tolower(c("localhost", own, sub("[.].*", "", own))) || is_own_address(host)
}
