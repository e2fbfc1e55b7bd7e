# Hints for the commonest error of tasks: a worker has no variable or function of this name, and the session has one.
# The errors of parallel's verbs have parallel's texts, so that the hint is a message before the error.

# The names that this session has got hints for.
hintsShown <- new.env(parent = emptyenv())

# The messages of R's errors for names that do not exist.
notFound <- c("object '%s' not found", "could not find function \"%s\"", "object '%s' of mode 'function' was not found")

# Returns the name that does not exist according to this message of R, in English or in the session's language, or NULL.
nameNotFound <- function(text) {
  if (!is.character(text) || length(text) != 1L || !isText(text)) return(NULL)
  translated <- gettext(
    c(notFound[1:2], "object '%s' of mode '%s' was not found"), domain = "R"
  )
  translated[[3L]] <- sub("%s(?!.*%s)", "function", translated[[3L]], perl = TRUE)
  # The longest text is the last: in German, the first one begins and ends as it does.
  for (pattern in rev(unique(c(notFound, translated)))) {
    ends <- strsplit(pattern, "%s", fixed = TRUE)[[1L]]
    if (length(ends) != 2L || !startsWith(text, ends[[1L]]) || !endsWith(text, ends[[2L]])) next
    name <- substr(text, nchar(ends[[1L]]) + 1L, nchar(text) - nchar(ends[[2L]]))
    if (nzchar(name) && nchar(name) < 200L) return(name)
  }
}

# Returns a list of a hint (`text`) for an error of a task with this message, and of the `name` it is about, or NULL if
# the session does not have what the worker lacks.
hintFor <- function(message) {
  misplaced <- misplacedArgument(message)
  if (!is.null(misplaced)) {
    return(list(name = misplaced, text = paste0("`", misplaced, "` is an argument of clusterLapply()")))
  }
  name <- nameNotFound(message)
  if (is.null(name)) return(NULL)
  if (inherits(get0(name, globalenv(), inherits = FALSE), "cluster")) {
    return(list(name = name, text = paste0(
      "`", name, "` is a cluster of this session, which workers cannot use: call lapply() in the task, or make one ",
      "call for all inner elements"
    )))
  }
  if (exists(name, globalenv(), inherits = FALSE)) {
    return(list(name = name, text = paste0(
      "`", name, "` exists in this session, and workers have only what was exported to them: clusterExport(cl, ",
      dQuote(name, FALSE), ")"
    )))
  }
  package <- attachedWith(name)
  if (is.null(package)) return(NULL)
  list(name = name, text = paste0(
    "`", name, "` is in package ", sQuote(package), ", which is attached in this session and not on the workers: ",
    "clusterEvalQ(cl, library(", package, ")), or makeRustCluster(packages = ", dQuote(package, FALSE), ")"
  ))
}

# Returns the argument of clusterLapply() that another function was given according to this message of R, or NULL.
misplacedArgument <- function(message) {
  if (!is.character(message) || length(message) != 1L || !isText(message)) return(NULL)
  given <- regmatches(message, regexec("unused arguments? [(]([.][[:alpha:]_]+) = ", message))[[1L]]
  if (length(given) && given[[2L]] %in% names(formals(clusterLapply))) given[[2L]]
}

# Returns the attached package that has this name, if workers do not attach it by themselves, or NULL.
attachedWith <- function(name) {
  always <- c("methods", "datasets", "utils", "grDevices", "graphics", "stats", "base")
  packages <- sub("^package:", "", grep("^package:", search(), value = TRUE))
  for (package in setdiff(packages, always)) {
    if (exists(name, as.environment(paste0("package:", package)), inherits = FALSE)) return(package)
  }
}

# Gives the hint for the first of these results of failed tasks, once a session for each name.
hintAt <- function(results) {
  failed <- Find(function(result) inherits(result, "try-error"), results)
  if (is.null(failed)) return(invisible())
  showHint(hintFor(c(unclass(failed))))
}

showHint <- function(hint) {
  if (is.null(hint) || exists(hint$name, hintsShown, inherits = FALSE)) return(invisible())
  assign(hint$name, TRUE, hintsShown)
  message(rustclusterCondition("hint", paste0(hint$text, "\n"), name = hint$name, type = "message"))
}

# Replaces get() in clusterExport(), which looks for a variable in the global environment unless it is told otherwise:
# gives a hint for a variable of the function that calls clusterExport().
getExported <- function(name, envir) {
  get <- base::get
  if (!is.character(name)) {
    showHint(list(name = "varlist", text = "clusterExport() takes names in quotes: clusterExport(cl, \"x\")"))
  }
  found <- isTRUE(tryCatch(exists(name, envir = envir), error = function(e) TRUE))
  if (!found && identical(envir, globalenv())) {
    exports <- parent.frame()
    depth <- Position(function(frame) identical(frame, exports), sys.frames())
    caller <- if (!is.na(depth)) sys.frame(sys.parents()[[depth]])
    if (!is.null(caller) && exists(name, caller)) {
      showHint(list(name = name, text = paste0(
        "`", name, "` is a variable of a function, and clusterExport() looks in the global environment: ",
        "clusterExport(cl, ", dQuote(name, FALSE), ", envir = environment())"
      )))
    }
  }
  get(name, envir = envir)
}
