# Fills in the templates of job scripts. A template is text with keys: `{{ key }}` must have a value,
# `{{ key | default }}` has a default, and a line with `{{ key | }}` is left out if the key has no value.

keyPattern <- "\\{\\{\\s*([A-Za-z_][A-Za-z0-9_.]*)\\s*(\\|([^{}]*))?\\}\\}"

# Returns the lines of a template: those of a file, or of a text with line ends.
templateLines <- function(template, argument = "template") {
  template <- texts(template, argument)
  if (length(template) == 1L && !grepl("\n|\\{\\{", template)) {
    path <- path.expand(template)
    if (!file.exists(path) || dir.exists(path)) {
      badArgument(argument, "must be the text of a template or an existing file; there is no file ", sQuote(template))
    }
    template <- tryCatch(readLines(path, warn = FALSE), error = function(e) {
      badArgument(argument, "could not be read: ", conditionMessage(e))
    }, warning = function(w) badArgument(argument, "could not be read: ", conditionMessage(w)))
    if (!all(isText(template))) badArgument(argument, "is a file that contains no text, ", sQuote(path))
  }
  # A key ends on its line: an empty line would be lost otherwise.
  unlist(lapply(strsplit(template, "\r?\n"), function(lines) if (length(lines)) lines else ""))
}

builtInTemplate <- function(name) {
  readLines(system.file("templates", paste0(name, ".tmpl"), package = "rustcluster"))
}

# Returns the names of all keys of a template.
templateKeys <- function(lines) {
  found <- unlist(regmatches(lines, gregexpr(keyPattern, lines, perl = TRUE)))
  unique(sub(keyPattern, "\\1", found, perl = TRUE))
}

# Checks that a template has only keys of `known`, and that something in it starts the agent.
checkTemplate <- function(lines, known, argument = "template") {
  keys <- templateKeys(lines)
  unknown <- setdiff(keys, known)
  list <- function(names) paste0("`", names, "`", collapse = ", ")
  if (length(unknown)) {
    badArgument(argument, "has unknown keys: ", list(unknown), didYouMean(unknown, known, keysElsewhere),
                "; the known keys are ", list(sort(known)), "; an argument with the name of a key defines that key")
  }
  rest <- gsub(keyPattern, "", lines, perl = TRUE)
  broken <- grep("{{", rest, fixed = TRUE)
  if (length(broken)) {
    badArgument(argument, "has a malformed key in line ", broken[[1L]],
                "; keys are written {{ key }} or {{ key | default }}")
  }
  if (!any(c("command", "script") %in% keys)) {
    badArgument(argument, "must have the key `command` or `script`, which starts the agent of the node")
  }
  invisible(keys)
}

# Keys of other packages' templates, and what this package calls them.
keysElsewhere <- c(
  walltime = "time", partition = "queue", n_jobs = "tasks", ntasks = "tasks", master = "command", auth = "command",
  ncpus = "cores", n_cores = "cores", cpus = "cores", mem = "memory", workdir = "directory", worker = "command"
)

# Returns the lines of a filled-in template. `values`: a named list of character vectors; NULL stands for no value.
fillTemplate <- function(lines, values, argument = "template") {
  unlist(lapply(lines, fillLine, values, argument))
}

fillLine <- function(line, values, argument) {
  found <- gregexpr(keyPattern, line, perl = TRUE)
  keys <- regmatches(line, found)[[1L]]
  if (!length(keys)) return(line)
  filled <- character(length(keys))
  for (i in seq_along(keys)) {
    name <- sub(keyPattern, "\\1", keys[[i]], perl = TRUE)
    value <- values[[name]]
    if (is.null(value) && !grepl("|", keys[[i]], fixed = TRUE)) {
      badArgument(argument, "needs a value for the key `", name, "`: give the argument `", name,
                  "`, or a default in the template, {{ ", name, " | default }}")
    }
    if (is.null(value)) value <- trimws(sub(keyPattern, "\\3", keys[[i]], perl = TRUE))
    if (!any(nzchar(value))) return(NULL)
    filled[[i]] <- paste(value, collapse = "\n")
  }
  regmatches(line, found) <- list(filled)
  strsplit(line, "\n", fixed = TRUE)[[1L]]
}
