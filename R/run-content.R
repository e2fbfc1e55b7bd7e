# What a run is: hashes of its function, of its arguments and of its elements. They are equal in another session for the
# same code and data, in spite of compilation, source references and addresses.

# Functions whose arguments may name variables that the code does not show, and the number of arguments from which on
# they look elsewhere.
dynamicLookups <- c(get = 2L, get0 = 2L, mget = 2L, exists = 2L, eval = 2L, environment = 1L)

# `dir`: the directory of the run whose hashes are being computed. A variable with its path is not a difference.
hashing <- new.env(parent = emptyenv())

hexOf <- function(hashes) {
  if (!length(hashes)) return(character())
  digits <- matrix(as.character(hashes), 16L)
  do.call(paste0, lapply(1:16, function(i) digits[i, ]))
}

# Returns the hash of a value, as hexadecimal digits.
hashOf <- function(value) hexOf(checked(content_hashes(contentOf(value, seenObjects()), TRUE)))

# Returns the hashes of the elements of a vector, as a raw vector.
elementHashes <- function(X) {
  hashes <- checked(content_hashes(X, FALSE))
  if (typeof(X) != "list") return(hashes)
  for (i in which(vapply(X, hasCode, NA, USE.NAMES = FALSE))) {
    hashes[16L * (i - 1L) + 1:16] <- checked(content_hashes(contentOf(X[[i]], seenObjects()), TRUE))
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

# The functions and environments that contentOf() has found, by their addresses, with their numbers.
seenObjects <- function() {
  seen <- new.env(parent = emptyenv())
  seen$count <- 0L
  seen
}

# Returns plain data that is equal for equal contents.
contentOf <- function(x, seen) {
  if (inherits(x, "cluster")) return("cluster")
  if (!hasCode(x)) {
    return(if (!is.null(hashing$dir) && identical(x, hashing$dir)) "directory of the run" else x)
  }
  type <- typeof(x)
  if (type == "environment" && nzchar(environmentName(x))) return(environmentName(x))
  key <- objectKey(x)
  if (!is.null(key)) {
    if (!is.null(seen[[key]])) return(paste("object", seen[[key]]$number))
    seen$count <- seen$count + 1L
    # An object that is kept keeps its address.
    seen[[key]] <- list(number = seen$count, object = x)
  }
  content <- switch(type,
    closure = list(codeOf(x), lapply(variablesUsed(x), contentOf, seen)),
    environment = lapply(variablesIn(x), contentOf, seen),
    # Attributes are below.
    list = , expression = , pairlist = unname(lapply(as.list(x), contentOf, seen)),
    language = withoutSource(x),
    builtin = , special = deparse(x)
  )
  more <- attributes(x)
  more <- more[!names(more) %in% c("srcref", "srcfile", "wholeSrcref")]
  list(type, content, if (length(more)) lapply(more, contentOf, seen))
}

# Returns a text that is different for different environments and functions, or NULL for other objects.
objectKey <- function(x) {
  switch(typeof(x),
    environment = paste("environment", object_address(x)),
    # Copies of a function are the same one.
    closure = paste(
      "function", object_address(environment(x)), hexOf(checked(content_hashes(codeOf(x), TRUE)))
    )
  )
}

# Returns these variables of an environment, in the order of their names. A variable that cannot be computed is NULL.
variablesIn <- function(envir, names = ls(envir, all.names = TRUE, sorted = FALSE)) {
  names <- sort(setdiff(unique(names), c("...", ".Random.seed")), method = "radix")
  stats::setNames(lapply(names, function(name) {
    if (bindingIsActive(name, envir)) return(activeBindingFunction(name, envir))
    tryCatch(get(name, envir, inherits = FALSE), error = function(e) NULL)
  }), names)
}

withoutSource <- function(code) {
  if (is.call(code)) {
    attributes(code) <- NULL
    if (identical(code[[1L]], quote(`function`)) && length(code) > 3L) code <- code[1:3]
  } else if (!is.pairlist(code)) {
    return(code)
  }
  for (i in seq_along(code)) {
    # Do not name the part, which may be a missing argument. NULL would be removed.
    if (is.call(code[[i]]) || is.pairlist(code[[i]]) && !is.null(code[[i]])) code[[i]] <- withoutSource(code[[i]])
  }
  code
}

# Returns the formals and the body of a closure.
codeOf <- function(fun) list(withoutSource(formals(fun)), withoutSource(body(fun)))

# Returns the values of the variables that a function may use, by name: those of the functions that enclose it, and
# those of the global environment, which are usually exported. Variables of packages do not count.
variablesUsed <- function(fun) {
  used <- freeNames(call("function", formals(fun), body(fun)))
  strings <- stringsIn(list(formals(fun), body(fun)))
  dynamic <- length(used$dynamic) > 0L
  looksUp <- any(names(dynamicLookups) %in% c(used$functions, used$variables))
  envir <- environment(fun)
  found <- list()
  # Attached packages are below the global environment.
  while (!identical(envir, emptyenv()) && !isNamespace(envir) && !identical(envir, baseenv())) {
    global <- identical(envir, globalenv())
    if (dynamic && !global) {
      here <- variablesIn(envir)
    } else {
      there <- function(names, mode) names[vapply(names, exists, NA, envir = envir, mode = mode, inherits = FALSE)]
      here <- variablesIn(envir, c(
        there(c(used$variables, if (looksUp) strings), "any"), there(c(used$functions, strings), "function")
      ))
    }
    found <- c(found, here[!names(here) %in% names(found)])
    if (global) break
    envir <- parent.env(envir)
  }
  if (length(found)) found[order(names(found), method = "radix")] else found
}

# Returns the names that code looks up outside of itself, as `variables` and as `functions`, which are only called.
# A name that the code has assigned before is not one of them. `dynamic`: functions that look up other names.
freeNames <- function(code) {
  found <- lapply(list(variables = 0, functions = 0, dynamic = 0), function(i) new.env(parent = emptyenv()))
  walkCode(code, character(), found)
  lapply(found, ls, all.names = TRUE)
}

# Notes the names in `code` that are not `bound`. Returns the names that are bound when the code has been evaluated.
walkCode <- function(code, bound, found) {
  if (is.symbol(code)) {
    name <- as.character(code)
    if (nzchar(name) && !name %in% bound) assign(name, TRUE, found$variables)
    if (name %in% setdiff(names(dynamicLookups), "environment")) assign(name, TRUE, found$dynamic)
    return(bound)
  }
  if (!is.call(code)) {
    # An argument may be missing.
    if (is.pairlist(code) || is.expression(code)) for (i in seq_along(code)) walkCode(code[[i]], bound, found)
    return(bound)
  }
  head <- code[[1L]]
  if (!is.symbol(head)) {
    for (i in seq_along(code)) walkCode(code[[i]], bound, found)
    return(bound)
  }
  name <- as.character(head)
  if (name %in% c("::", ":::")) return(bound)
  # Quoted code may be evaluated.
  if (name == "quote") {
    if (length(code) > 1L) walkCode(code[[2L]], bound, found)
    return(bound)
  }
  if (!name %in% bound) assign(name, TRUE, found$functions)
  if (looksElsewhere(code, name)) assign(name, TRUE, found$dynamic)
  arguments <- function(from = 2L) {
    for (i in seq_along(code)[-seq_len(from - 1L)]) walkCode(code[[i]], bound, found)
    bound
  }
  inTurn <- function(parts) {
    for (i in parts) bound <<- walkCode(code[[i]], bound, found)
    bound
  }
  n <- length(code)
  if (name %in% c("{", "(")) return(inTurn(seq_len(n)[-1L]))
  if (name == "function") {
    inside <- c(bound, names(code[[2L]]))
    walkCode(code[[2L]], inside, found)
    walkCode(code[[3L]], inside, found)
    return(bound)
  }
  if (name %in% c("<-", "=") && n == 3L) {
    bound <- walkCode(code[[3L]], bound, found)
    target <- code[[2L]]
    if (is.call(target)) walkCode(target, bound, found)
    while (is.call(target) && length(target) > 1L) target <- target[[2L]]
    return(unique(c(bound, as.character(target))))
  }
  if (name == "for" && n == 4L) {
    walkCode(code[[3L]], bound, found)
    bound <- unique(c(bound, as.character(code[[2L]])))
    walkCode(code[[4L]], bound, found)
    return(bound)
  }
  if (name %in% c("if", "while") && n >= 3L) {
    bound <- walkCode(code[[2L]], bound, found)
    return(arguments(3L))
  }
  if (name %in% c("$", "@") && n == 3L) {
    walkCode(code[[2L]], bound, found)
    return(bound)
  }
  arguments()
}

# Returns whether a call looks up names, in its own environment, that it computes.
looksElsewhere <- function(code, name) {
  if (!name %in% names(dynamicLookups)) return(FALSE)
  given <- length(code) - 1L
  if (given >= dynamicLookups[[name]]) return(FALSE)
  given == 0L || !is.character(code[[2L]]) && !(is.call(code[[2L]]) && identical(code[[2L]][[1L]], quote(quote)))
}

# Returns the strings in code, which may name functions, as in sapply(x, "f").
stringsIn <- function(code) {
  if (is.character(code)) return(code[nzchar(code) & !is.na(code) & nchar(code, "bytes") < 256L])
  if (!is.call(code) && !is.pairlist(code) && !is.list(code)) return(NULL)
  unique(unlist(lapply(as.list(code), function(part) if (!missing(part)) stringsIn(part))))
}

# Returns the hashes of the parts of a function, named by what they are. `what`: what messages call the function.
functionHashes <- function(fun, what = "`FUN`") {
  if (typeof(fun) != "closure") return(stats::setNames(hashOf(fun), what))
  found <- variablesUsed(fun)
  # A function that calls itself is not one of its variables.
  found <- found[!vapply(found, identical, NA, fun)]
  parts <- c(codeOf(fun), found)
  labels <- c(
    paste("the arguments of", what), paste("the body of", what), sprintf("`%s`, which %s uses", names(found), what)
  )
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
