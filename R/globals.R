# Finds the variables that an expression needs in another process. Package globals finds the same ones, in seven times
# the time for each call, and each host would need it and codetools.

# Returns a list of `variables` and `globals`, by name, and of `packages`. `given`: names that are not searched.
variablesOf <- function(expr, envir, given) {
  found <- new.env(parent = emptyenv())
  found$variables <- list()
  found$globals <- list()
  found$packages <- character()
  found$seen <- list()
  findVariables(setdiff(namesIn(expr), given), envir, found, TRUE)
  as.list(found)[c("variables", "globals", "packages")]
}

# `ours`: whether variables below the global environment have to be sent. Those of a function are part of its
# environment, which is sent with the function.
findVariables <- function(names, envir, found, ours) {
  for (name in names) {
    where <- envir
    while (!identical(where, emptyenv()) && !exists(name, where, inherits = FALSE)) where <- parent.env(where)
    if (any(vapply(list(emptyenv(), baseenv(), .BaseNamespaceEnv), identical, NA, where))) next
    global <- identical(where, globalenv())
    attached <- attr(where, "name")
    if (!global && is.character(attached) && startsWith(attached, "package:")) {
      addPackage(sub("^package:", "", attached), found)
      next
    }
    # Skip missing arguments.
    value <- tryCatch(list(get(name, where, inherits = FALSE)), error = function(e) NULL)
    if (is.null(value) || identical(value[[1L]], quote(expr = )) || name == "...") next
    if (global) {
      if (name %in% names(found$globals)) next
      found$globals[name] <- value
    } else if (ours) {
      found$variables[name] <- value
    }
    findInFunction(value[[1L]], found)
  }
}

# Finds the global variables that a function uses.
findInFunction <- function(fun, found) {
  if (typeof(fun) != "closure" || isNamespace(topenv(environment(fun)))) return()
  for (seen in found$seen) if (identical(seen, fun)) return()
  found$seen <- c(found$seen, list(fun))
  names <- setdiff(namesIn(list(formals(fun), body(fun))), names(formals(fun)))
  findVariables(names, environment(fun), found, FALSE)
}

addPackage <- function(package, found) {
  default <- c("methods", "datasets", "utils", "grDevices", "graphics", "stats", "rustcluster")
  if (!package %in% default) found$packages <- union(found$packages, package)
}

# Returns the names that code may look up.
namesIn <- function(code) {
  if (is.symbol(code)) {
    name <- as.character(code)
    return(if (nzchar(name)) name)
  }
  if (is.call(code)) {
    fun <- code[[1L]]
    if (is.symbol(fun)) {
      name <- as.character(fun)
      if (name %in% c("::", ":::", "quote")) return(NULL)
      if (name %in% c("$", "@")) code <- code[1:2]
      if (name == "function") {
        names <- namesIn(list(code[[2L]], code[[3L]]))
        return(setdiff(names, names(code[[2L]])))
      }
    }
  } else if (!is.list(code) && !is.pairlist(code) && !is.expression(code)) {
    return(NULL)
  }
  # Missing arguments, as in x[, 1], are symbols, too.
  unique(unlist(lapply(as.list(code), namesIn)))
}
