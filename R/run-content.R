# What a run is: hashes of its function, of its arguments and of its elements. They are equal in another session for the
# same code and data, in spite of compilation, source references and addresses.

# Functions whose arguments may name variables that the code does not show.
dynamicLookups <- c(
  "get", "get0", "mget", "exists", "eval", "evalq", "eval.parent", "parse", "str2lang", "str2expression", "environment",
  "parent.frame", "sys.function", "sys.call", "as.list.environment", "list2env", "local", "with", "substitute", "source"
)

hexOf <- function(hashes) {
  if (!length(hashes)) return(character())
  apply(matrix(as.character(hashes), 16L), 2L, paste, collapse = "")
}

# Returns the hash of a value, as hexadecimal digits.
hashOf <- function(value) hexOf(checked(content_hashes(contentOf(value), TRUE)))

# Returns the hashes of the elements of a vector, as a raw vector.
elementHashes <- function(X) {
  hashes <- checked(content_hashes(X, FALSE))
  if (typeof(X) != "list") return(hashes)
  for (i in which(vapply(X, hasCode, NA))) {
    hashes[16L * (i - 1L) + 1:16] <- checked(content_hashes(contentOf(X[[i]]), TRUE))
  }
  hashes
}

codeTypes <- c(
  "closure", "builtin", "special", "environment", "externalptr", "weakref", "bytecode", "promise", "S4", "language"
)

# Returns whether a value contains something whose serialization depends on more than its content.
hasCode <- function(x) {
  type <- typeof(x)
  if (type %in% codeTypes) return(TRUE)
  if (type %in% c("list", "expression", "pairlist") && any(vapply(x, hasCode, NA))) return(TRUE)
  more <- attributes(x)
  !is.null(more) && any(vapply(more, hasCode, NA))
}

# Returns plain data that is equal for equal contents. `seen`: the environments above this value.
contentOf <- function(x, seen = list()) {
  if (inherits(x, "cluster")) return("cluster")
  if (!hasCode(x)) return(x)
  type <- typeof(x)
  more <- attributes(x)
  more <- more[!names(more) %in% c("srcref", "srcfile", "wholeSrcref")]
  rest <- if (length(more)) lapply(more, contentOf, seen)
  content <- switch(type,
    closure = {
      code <- codeOf(x)
      found <- variablesUsed(code, environment(x))
      list(code, lapply(found, contentOf, c(seen, list(environment(x)))))
    },
    environment = {
      for (i in seq_along(seen)) if (identical(seen[[i]], x)) return(paste("environment", i))
      name <- environmentName(x)
      if (nzchar(name)) name else lapply(variablesIn(x), contentOf, c(seen, list(x)))
    },
    list = , expression = , pairlist = lapply(as.list(x), contentOf, seen),
    language = withoutSource(x),
    builtin = , special = deparse(x),
    type
  )
  list(type, content, rest)
}

# Returns the variables of an environment, in the order of their names. A variable that cannot be computed is NULL.
variablesIn <- function(envir) {
  names <- sort(ls(envir, all.names = TRUE, sorted = FALSE), method = "radix")
  names <- names[names != "..."]
  stats::setNames(lapply(names, function(name) {
    tryCatch(get(name, envir, inherits = FALSE), error = function(e) NULL)
  }), names)
}

withoutSource <- function(code) {
  if (is.call(code)) {
    attributes(code) <- NULL
    if (identical(code[[1L]], quote(`function`)) && length(code) > 3L) code <- code[1:3]
    for (i in seq_along(code)) {
      part <- code[[i]]
      # Skip missing arguments, and NULL, which would remove the part.
      if (is.call(part) || is.pairlist(part) && !is.null(part)) code[[i]] <- withoutSource(part)
    }
  } else if (is.pairlist(code)) {
    for (i in seq_along(code)) if (is.call(code[[i]])) code[[i]] <- withoutSource(code[[i]])
  }
  code
}

# Returns the formals and the body of a closure.
codeOf <- function(fun) list(withoutSource(formals(fun)), withoutSource(body(fun)))

# Returns the values of the variables that code may use, by name: those of the functions that enclose it, and those of
# the global environment, which are usually exported. Variables of packages do not count.
variablesUsed <- function(code, envir) {
  names <- unique(c(namesIn(code), stringsIn(code)))
  dynamic <- any(names %in% dynamicLookups)
  found <- list()
  # Attached packages are below the global environment.
  while (!identical(envir, emptyenv()) && !isNamespace(envir) && !identical(envir, baseenv())) {
    global <- identical(envir, globalenv())
    here <- if (dynamic && !global) variablesIn(envir) else {
      wanted <- names[vapply(names, exists, NA, envir = envir, inherits = FALSE)]
      lapply(stats::setNames(nm = wanted), function(name) {
        tryCatch(get(name, envir, inherits = FALSE), error = function(e) NULL)
      })
    }
    here <- here[!names(here) %in% c(names(found), ".Random.seed", "...")]
    found <- c(found, here)
    if (global) break
    envir <- parent.env(envir)
  }
  if (length(found)) found[order(names(found), method = "radix")] else found
}

# Returns the strings in code, which may name functions, as in sapply(x, "f").
stringsIn <- function(code) {
  if (is.character(code)) return(code[nzchar(code) & !is.na(code) & nchar(code, "bytes") < 256L])
  if (!is.call(code) && !is.pairlist(code) && !is.list(code)) return(NULL)
  unique(unlist(lapply(as.list(code), function(part) if (!missing(part)) stringsIn(part))))
}

# Returns the hashes of the parts of a function, named by what they are.
functionHashes <- function(fun) {
  if (typeof(fun) != "closure") return(c("`FUN`" = hashOf(fun)))
  found <- variablesUsed(codeOf(fun), environment(fun))
  # A function that calls itself is not one of its variables.
  found <- found[!vapply(found, identical, NA, fun)]
  parts <- c(list(formals(fun), body(fun)), found)
  labels <- c("the arguments of `FUN`", "the body of `FUN`", sprintf("`%s`, which `FUN` uses", names(found)))
  parts[[1L]] <- withoutSource(parts[[1L]])
  vapply(stats::setNames(parts, labels), hashOf, "")
}

# Returns the hashes of the arguments of `FUN`.
argumentHashes <- function(common) {
  names <- names(common)
  if (is.null(names)) names <- rep("", length(common))
  places <- sprintf("argument %d in `...`", seq_along(common))
  labels <- ifelse(nzchar(names), sprintf("the argument `%s`", names), places)
  vapply(stats::setNames(common, labels), hashOf, "")
}
