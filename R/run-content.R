# What a run is: hashes of its function, of its arguments and of its elements. They are equal in another session for the
# same code and data, in spite of compilation, source references and addresses.

# Functions that look up variables by a name that their first argument has.
lookups <- c("get", "get0", "mget", "exists", "dynGet")

# Functions that make code from text.
parsers <- c("parse", "str2lang", "str2expression", "as.name", "as.symbol")

# Functions that call a function, which may be given as a name, and the place of that argument.
functionPlaces <- c(
  do.call = 1L, match.fun = 1L, Map = 1L, Reduce = 1L, Filter = 1L, Find = 1L, Position = 1L, mapply = 1L,
  Vectorize = 1L, getFunction = 1L, lapply = 2L, sapply = 2L, vapply = 2L, eapply = 2L, rapply = 2L, apply = 3L,
  outer = 3L, tapply = 3L, aggregate = 3L, by = 3L, sweep = 4L
)

# Functions that may be given the global environment without looking up a variable that the code does not show.
globalUsers <- c(
  "assign", "rm", "new.env", "list2env", "eval", "evalq", "local", "identical", "environment<-", "parent.env<-",
  "as.function", "is.null", "delayedAssign", lookups
)

# Functions that look up variables in an environment and in its parents.
environmentUsers <- c(
  lookups, "eval", "evalq", "with", "within", "parent.env", "environment<-", "parent.env<-", "attach", "source",
  "sys.source", "local"
)

# Generic functions whose methods other functions call.
implicitGenerics <- c(
  .S3PrimitiveGenerics, "[", "[[", "$", "[<-", "[[<-", "$<-", "unlist", "cbind", "rbind", "as.vector", "is.unsorted",
  "nchar", "Ops", "Math", "Summary", "Complex", "matrixOps"
)

s4Groups <- c("Arith", "Compare", "Logic", "Ops", "Math", "Math2", "Summary", "Complex", "initialize", "coerce")
s4Users <- c("new", "@", "@<-", "slot", "slot<-", "validObject", "standardGeneric", "callNextMethod", "initialize")

# `dir`: the directory of the run whose hashes are being computed. A variable with its path is not a difference.
# `strings`: texts in the elements and arguments, which may name functions.
hashing <- new.env(parent = emptyenv())

hexOf <- function(hashes) {
  if (!length(hashes)) return(character())
  digits <- matrix(as.character(hashes), 16L)
  do.call(paste0, lapply(1:16, function(i) digits[i, ]))
}

# Evaluates `code`, which may fail for values that are nested very deeply. `argument`: which one has these values.
comparing <- function(code, argument) {
  old <- options(expressions = 50000L)
  on.exit(options(old))
  tryCatch(code, error = function(e) {
    if (inherits(e, "rustcluster_error")) stop(e)
    badArgument(argument, "cannot be compared with a stored run: ", conditionMessage(e))
  })
}

# Returns the hash of a value, as hexadecimal digits.
hashOf <- function(value) hexOf(checked(content_hashes(contentOf(value, seenObjects()), TRUE)))

# Returns the hashes of the elements of a vector, as a raw vector.
elementHashes <- function(X) {
  if (typeof(X) != "list") return(checked(content_hashes(canonicalData(X), FALSE)))
  comparing({
    coded <- if (hasCode(unname(X))) vapply(X, hasCode, NA, USE.NAMES = FALSE) else logical(length(X))
    plain <- X
    plain[coded] <- list(NULL)
    hashes <- checked(content_hashes(canonical(plain), FALSE))
    for (i in which(coded)) {
      hashes[16L * (i - 1L) + 1:16] <- checked(content_hashes(contentOf(X[[i]], seenObjects()), TRUE))
    }
    hashes
  }, "X")
}

codeTypes <- c(
  "closure", "builtin", "special", "environment", "externalptr", "weakref", "bytecode", "promise", "S4", "language"
)

# Returns whether a value is NULL or a vector without attributes that is no list. is.atomic(NULL) is FALSE since R 4.4.
isPlainVector <- function(x) is.null(x) || (is.atomic(x) && is.null(attributes(x)))

# Returns whether a value contains something whose serialization depends on more than its content. Not recursive,
# because values may be nested deeply.
hasCode <- function(x) {
  if (isPlainVector(x)) return(FALSE)
  level <- list(x)
  while (length(level)) {
    level <- level[!vapply(level, isPlainVector, NA)]
    types <- vapply(level, typeof, "")
    if (any(types %in% codeTypes)) return(TRUE)
    nested <- types %in% c("list", "expression", "pairlist")
    # A symbol that stands for a missing argument cannot be the value of a variable.
    inside <- lapply(level[nested], function(part) as.list(unclass(part)))
    more <- lapply(level[types != "symbol"], attributes)
    level <- c(unlist(unname(inside), recursive = FALSE), unlist(unname(more), recursive = FALSE))
    level <- unname(level)
  }
  FALSE
}

# Attributes that are not part of the content of data.
ignoredAttributes <- c("srcref", "srcfile", "wholeSrcref", ".internal.selfref", "index")

# Returns data that has no code, in the same form for all values that are identical().
canonical <- function(x) {
  type <- typeof(x)
  more <- attributes(x)
  if (is.null(more)) {
    if (type != "list") return(canonicalData(x))
    return(canonicalParts(x))
  }
  if (type %in% c("pairlist", "symbol")) return(x)
  plain <- x
  attributes(plain) <- NULL
  plain <- if (type %in% c("list", "expression")) canonicalParts(plain) else canonicalData(plain)
  ignored <- c("srcref", "srcfile", "wholeSrcref", if ("data.table" %in% more$class) ignoredAttributes)
  more <- more[!names(more) %in% ignored]
  if (length(more)) attributes(plain) <- lapply(more[order(names(more), method = "radix")], canonical)
  plain
}

canonicalParts <- function(x) {
  if (!length(x)) return(x)
  types <- vapply(x, typeof, "")
  todo <- !vapply(x, isPlainVector, NA)
  todo <- todo | types %in% c("double", "character", "complex")
  # Fast path for single values, of which few have another form.
  single <- todo & lengths(x, use.names = FALSE) == 1L & types %in% c("double", "character")
  single[single] <- vapply(x[single], function(part) is.null(attributes(part)), NA)
  numbers <- which(single & types == "double")
  values <- unlist(x[numbers], use.names = FALSE)
  todo[numbers[!is.na(values) & values != 0]] <- FALSE
  texts <- which(single & types == "character")
  values <- as.character(unlist(x[texts], use.names = FALSE))
  todo[texts[Encoding(values) == Encoding(inUtf8(values))]] <- FALSE
  for (i in which(todo)) x[[i]] <- canonical(x[[i]])
  x
}

# As canonical(), for vectors without attributes (of which names are kept).
canonicalData <- function(x) {
  switch(typeof(x),
    character = inUtf8(x),
    double = {
      x <- x + 0
      if (anyNA(x)) {
        nan <- is.nan(x)
        x[nan] <- NaN
        x[is.na(x) & !nan] <- NA_real_
      }
      x
    },
    complex = x + 0,
    x
  )
}

# Returns strings in UTF-8, marked as such. In the C locale, R does not know that it reads UTF-8.
inUtf8 <- function(x) {
  kinds <- Encoding(x)
  if (all(kinds == "UTF-8" | kinds == "bytes")) return(x)
  locale <- l10n_info()
  if (!locale$`Latin-1` && (locale$`UTF-8` || !locale$MBCS)) {
    guessed <- kinds == "unknown" & !is.na(x) & validUTF8(x)
    Encoding(x[guessed]) <- "UTF-8"
    kinds <- Encoding(x)
  }
  translated <- kinds == "latin1"
  x[translated] <- enc2utf8(x[translated])
  x
}

# The functions and environments that contentOf() has found, by their addresses, with their numbers. `parents`: whether
# the parents of environments count. `formulas`: the formulas that it is in.
seenObjects <- function() {
  seen <- new.env(parent = emptyenv())
  seen$formulas <- list()
  seen$count <- 0L
  seen$parents <- isTRUE(hashing$parents)
  seen
}

# Returns whether a value is a cluster of this package or of parallel, or one of its nodes. On which workers a run is
# computed is not a difference.
isClusterObject <- function(x) {
  isOne <- function(x) {
    isNode(x) || inherits(x, c("SOCKnode", "SOCK0node", "forknode", "MPInode"))
  }
  isOne(x) || inherits(x, c("RustCluster", "SOCKcluster")) ||
    inherits(x, "cluster") && is.list(x) && length(x) > 0L && all(vapply(unclass(x), isOne, NA))
}

# Returns plain data that is equal for equal contents.
contentOf <- function(x, seen) {
  if (is.object(x)) {
    if (isClusterObject(x)) return("cluster")
    if (inherits(x, "connection")) return("connection")
    # Each session makes another one, and what it shows is not part of a result.
    if (inherits(x, "progressor")) return("progressor")
  }
  if (!hasCode(x)) {
    return(if (!is.null(hashing$dir) && identical(x, hashing$dir)) "directory of the run" else canonical(x))
  }
  type <- typeof(x)
  if (type == "environment" && isEnvironmentOfPackage(x)) return(environmentName(x))
  more <- attributes(x)
  more <- more[!names(more) %in% c(ignoredAttributes[1:4], if (inherits(x, "data.table")) "index")]
  if (length(more)) more <- more[order(names(more), method = "radix")]
  isFormula <- type == "language" && is.environment(more$.Environment)
  formulaEnvironment <- more$.Environment
  if (isFormula) more$.Environment <- NULL
  moreContent <- function() if (length(more)) lapply(more, contentOf, seen)
  # The environment of an S4 generic has what its calls have found. Its methods are objects of their own.
  isGeneric <- type == "closure" && isS4(x) && inherits(x, "standardGeneric")
  if (isGeneric) more <- more[names(more) %in% c("generic", "package", "signature", "valueClass")]
  key <- objectKey(x)
  if (!is.null(key)) {
    # A copy of a function may have other attributes.
    if (!is.null(seen[[key]])) {
      return(list(paste("object", seen[[key]]$number), if (type == "closure") moreContent()))
    }
    seen$count <- seen$count + 1L
    # An object that is kept keeps its address.
    seen[[key]] <- list(number = seen$count, object = x)
  }
  if (isFormula) {
    # A formula may use the variable that has it.
    within <- Position(function(formula) identical(formula, x), seen$formulas)
    if (!is.na(within)) return(paste("formula", within))
    seen$formulas <- c(seen$formulas, list(x))
    on.exit(seen$formulas <- utils::head(seen$formulas, -1L))
  }
  content <- switch(type,
    closure = list(codeOf(x), if (!isGeneric) lapply(variablesUsed(x), contentOf, seen)),
    environment = environmentContent(x, seen),
    # Attributes are below.
    list = , expression = , pairlist = unname(lapply(as.list(unclass(x)), contentOf, seen)),
    language = list(
      withoutSource(x), if (isFormula) lapply(variablesUsedBy(x, formulaEnvironment), contentOf, seen)
    ),
    builtin = , special = deparse(x)
  )
  list(type, content, moreContent())
}

# Returns whether an environment is the global one, or one that a package or R has made.
isEnvironmentOfPackage <- function(x) {
  isNamespace(x) || identical(x, globalenv()) || identical(x, baseenv()) || identical(x, emptyenv()) ||
    grepl("^(package|imports):", environmentName(x))
}

environmentContent <- function(x, seen) {
  if (inherits(x, "R6ClassGenerator")) {
    parts <- c("classname", "public_fields", "public_methods", "private_fields", "private_methods", "active")
    parts <- mget(parts, x, ifnotfound = list(NULL))
    return(lapply(c(parts, list(parent = tryCatch(x$get_inherit(), error = function(e) NULL))), contentOf, seen))
  }
  parent <- parent.env(x)
  chained <- seen$parents && !isEnvironmentOfPackage(parent)
  variables <- variablesIn(x)
  # R6 makes this function, for each object.
  if (exists(".__enclos_env__", x, inherits = FALSE)) variables$clone <- NULL
  c(lapply(variables, contentOf, seen), if (chained) list(contentOf(parent, seen)))
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
  names <- sort(setdiff(unique(names), ".Random.seed"), method = "radix")
  stats::setNames(lapply(names, function(name) {
    if (name == "...") {
      return(tryCatch(eval(quote(list(...)), envir), error = function(e) eval(quote(substitute(list(...))), envir)))
    }
    if (bindingIsActive(name, envir)) return(activeBindingFunction(name, envir))
    tryCatch(get(name, envir, inherits = FALSE), error = function(e) NULL)
  }), names)
}

withoutSource <- function(code) {
  if (is.character(code)) return(inUtf8(code))
  if (is.call(code)) {
    attributes(code) <- NULL
    if (identical(code[[1L]], quote(`function`)) && length(code) > 3L) code <- code[1:3]
  } else if (!is.pairlist(code)) {
    return(code)
  }
  for (i in seq_along(code)) {
    # Do not name the part, which may be a missing argument. NULL would be removed.
    if (is.character(code[[i]]) || is.call(code[[i]]) || is.pairlist(code[[i]]) && !is.null(code[[i]])) {
      code[[i]] <- withoutSource(code[[i]])
    }
  }
  code
}

# Returns the formals and the body of a closure.
codeOf <- function(fun) list(withoutSource(formals(fun)), withoutSource(body(fun)))

# Returns the values of the variables that a function may use, by name: those of the functions that enclose it, and
# those of the global environment, which are usually exported. Variables of packages do not count.
variablesUsed <- function(fun) variablesUsedBy(call("function", formals(fun), body(fun)), environment(fun))

# As variablesUsed(), for code that is evaluated in `envir`.
variablesUsedBy <- function(code, envir) {
  used <- freeNames(code)
  strings <- stringsIn(code)
  looksUp <- length(used$lookups) > 0L
  callsNames <- any(c(used$functions, used$variables, used$qualified) %in% names(functionPlaces))
  if (callsNames) strings <- c(strings, hashing$strings)
  found <- list()
  add <- function(strings) {
    at <- envir
    # Attached packages are below the global environment.
    while (!identical(at, emptyenv()) && !isNamespace(at) && !identical(at, baseenv())) {
      here <- variablesIn(at, usedIn(at, used, strings, looksUp))
      # A variable does not hide a function that is called.
      hidden <- vapply(names(here), function(name) {
        name %in% names(found) && (is.function(found[[name]]) || !is.function(here[[name]]))
      }, NA)
      found <<- c(here[!hidden & names(here) %in% names(found)], found)
      found <<- c(found, here[!hidden & !names(here) %in% names(found)])
      if (identical(at, globalenv())) break
      at <- parent.env(at)
    }
  }
  add(strings)
  if (callsNames) {
    values <- found[vapply(found, function(value) is.character(value) && length(value) <= 1000L, NA)]
    more <- setdiff(unlist(values, use.names = FALSE), c(strings, NA, ""))
    if (length(more)) {
      found <- list()
      add(c(strings, more))
    }
  }
  if (length(found)) found[order(names(found), method = "radix")] else found
}

# Returns the names of the variables of an environment that code may use.
usedIn <- function(envir, used, strings, looksUp) {
  all <- ls(envir, all.names = TRUE, sorted = FALSE)
  if (length(used$dynamic)) return(all)
  isFunction <- function(names) {
    names[vapply(names, function(name) {
      tryCatch(exists(name, envir, mode = "function", inherits = FALSE), error = function(e) FALSE)
    }, NA)]
  }
  s4 <- grep("^[.]__[CT]__", all, value = TRUE)
  rest <- setdiff(all, s4)
  called <- c(used$functions, used$variables, used$qualified)
  names <- c(
    intersect(all, c(used$variables, if (looksUp) strings)),
    if (length(used$calls)) isFunction(rest) else isFunction(intersect(all, c(used$functions, strings))),
    isFunction(methodsAmong(rest, c(called, strings, implicitGenerics)))
  )
  if (length(s4)) {
    generics <- sub(":.*", "", sub("^[.]__T__", "", s4[startsWith(s4, ".__T__")]))
    values <- intersect(all, c(names, called))
    isUsed <- any(called %in% s4Users) || any(generics %in% c(called, s4Groups)) ||
      any(vapply(values, function(name) tryCatch(isS4(get(name, envir)), error = function(e) FALSE), NA))
    if (isUsed) names <- c(names, s4)
  }
  names
}

# Returns those names that are names of S3 methods for one of these generic functions.
methodsAmong <- function(names, generics) {
  names <- names[grepl(".[.].", names)]
  names[vapply(names, function(name) {
    ends <- gregexpr(".", name, fixed = TRUE)[[1L]]
    any(substring(name, 1L, ends - 1L) %in% generics)
  }, NA)]
}

# Returns the names that code looks up outside of itself: `variables`, `functions`, which are called, and `qualified`,
# called with their package. A variable that the code has assigned before is not one of them. `lookups`: functions that
# look up names that the code shows. `dynamic` and `calls`: functions that look up variables and functions by names that
# the code does not show.
freeNames <- function(code) {
  kinds <- c("variables", "functions", "qualified", "lookups", "dynamic", "calls", "closures", "called")
  found <- sapply(kinds, function(i) new.env(parent = emptyenv()), simplify = FALSE)
  walkCode(code, character(), found)
  found <- lapply(found, ls, all.names = TRUE)
  found$calls <- c(found$calls, setdiff(found$called, found$closures))
  found
}

note <- function(name, kind) if (nzchar(name)) assign(name, TRUE, kind)

# Notes the names in `code` that are not `bound`. Returns the names that are bound when the code has been evaluated.
walkCode <- function(code, bound, found) {
  if (is.symbol(code)) {
    name <- as.character(code)
    if (grepl("^[.][.][0-9]+$", name)) name <- "..."
    if (!name %in% bound) note(name, found$variables)
    if (name %in% c(lookups, parsers)) note(name, found$dynamic)
    if (name %in% c("do.call", "match.fun")) note(name, found$calls)
    if (name == ".GlobalEnv") note(name, found$dynamic)
    return(bound)
  }
  if (is.character(code)) {
    walkBraces(code, bound, found)
    return(bound)
  }
  if (!is.call(code)) {
    # An argument may be missing.
    if (is.pairlist(code) || is.expression(code)) for (i in seq_along(code)) walkCode(code[[i]], bound, found)
    return(bound)
  }
  head <- code[[1L]]
  qualified <- is.call(head) && length(head) == 3L && as.character(head[[1L]])[[1L]] %in% c("::", ":::")
  if (!is.symbol(head) && !qualified) {
    if (is.character(head)) note(head, found$functions)
    for (i in seq_along(code)) walkCode(code[[i]], bound, found)
    return(bound)
  }
  name <- as.character(if (qualified) head[[3L]] else head)
  if (name %in% c("::", ":::")) return(bound)
  # Quoted code may be evaluated.
  if (name == "quote") {
    if (length(code) > 1L) walkCode(code[[2L]], bound, found)
    return(bound)
  }
  # A variable that is no function does not hide a function.
  note(name, if (qualified) found$qualified else found$functions)
  if (name %in% c("...length", "...elt", "...names") && !"..." %in% bound) note("...", found$variables)
  walkLookup(code, name, bound, found)
  n <- length(code)
  from <- seq_len(n)[-1L]
  # The global environment is an argument, of which functions like assign() read nothing.
  if (name %in% globalUsers) from <- from[!vapply(from, function(i) isGlobal(code[[i]]), NA)]
  arguments <- function(from) {
    for (i in from) walkCode(code[[i]], bound, found)
    bound
  }
  inTurn <- function(parts) {
    for (i in parts) bound <<- walkCode(code[[i]], bound, found)
    bound
  }
  if (name %in% c("{", "(")) return(inTurn(from))
  if (name == "function") {
    inside <- c(bound, names(code[[2L]]))
    walkCode(code[[2L]], inside, found)
    walkCode(code[[3L]], inside, found)
    return(bound)
  }
  if (name %in% c("<-", "=", "<<-") && n == 3L) {
    target <- code[[2L]]
    value <- code[[3L]]
    if (is.symbol(target) && is.call(value) && identical(value[[1L]], quote(`function`))) {
      note(as.character(target), found$closures)
    }
    # environment(f) <- globalenv()
    if (!(is.call(target) && identical(target[[1L]], quote(environment)) && isGlobal(value))) {
      bound <- walkCode(value, bound, found)
    }
    if (is.call(target) || name == "<<-") walkCode(target, bound, found)
    while (is.call(target) && length(target) > 1L) {
      if (is.symbol(target[[1L]])) note(paste0(as.character(target[[1L]]), "<-"), found$functions)
      target <- target[[2L]]
    }
    return(if (name == "<<-") bound else unique(c(bound, as.character(target))))
  }
  if (name == "for" && n == 4L) {
    walkCode(code[[3L]], bound, found)
    bound <- unique(c(bound, as.character(code[[2L]])))
    walkCode(code[[4L]], bound, found)
    return(bound)
  }
  if (name %in% c("if", "while") && n >= 3L) {
    bound <- walkCode(code[[2L]], bound, found)
    return(arguments(from[-1L]))
  }
  if (name %in% c("$", "@", "[[") && n == 3L) {
    key <- code[[3L]]
    if (isGlobal(code[[2L]]) && (name != "[[" || is.character(key))) {
      note(as.character(key)[[1L]], found$variables)
      return(bound)
    }
    if (name != "[[") from <- 2L
  }
  arguments(from)
}

isGlobal <- function(code) identical(code, quote(globalenv())) || identical(code, quote(.GlobalEnv))

# Notes the names in the code that is in braces in strings, as package glue evaluates them.
walkBraces <- function(strings, bound, found) {
  for (text in strings[grepl("{", strings, fixed = TRUE, useBytes = TRUE)]) {
    parts <- regmatches(text, gregexpr("[{][^{}]+[}]", text, perl = TRUE, useBytes = TRUE))[[1L]]
    for (part in parts) walkText(substr(part, 2L, nchar(part) - 1L), bound, found)
  }
}

walkText <- function(text, bound, found) {
  parsed <- tryCatch(parse(text = text, keep.source = FALSE), error = function(e) NULL)
  for (part in as.list(parsed)) walkCode(part, bound, found)
}

# Notes that a call looks up names that the code does not show.
walkLookup <- function(code, name, bound, found) {
  n <- length(code)
  named <- names(code)
  if (is.null(named)) named <- rep("", n)
  # Do not name the argument, which may be missing.
  argument <- function(names, place) {
    at <- which(named %in% names)
    if (length(at)) return(at[[1L]])
    at <- which(named == "")[-1L]
    if (length(at) >= place) at[[place]] else NA_integer_
  }
  shows <- function(at) {
    is.character(code[[at]]) || is.call(code[[at]]) && identical(code[[at]][[1L]], quote(quote))
  }
  if (name %in% lookups) {
    at <- argument("x", 1L)
    if (!is.na(at) && shows(at)) {
      note(name, found$lookups)
    } else if (is.na(match("inherits", named)) || !identical(code[["inherits"]], FALSE)) {
      note(name, found$dynamic)
    }
  }
  if (name == "eval" && n <= 2L && (n == 1L || !shows(2L))) {
    at <- if (n == 2L) code[[2L]]
    if (!isShownText(at)) note(name, found$dynamic)
  }
  if (name %in% parsers) {
    at <- argument(if (name == "parse") "text" else c("s", "text", "x"), if (name == "parse") 3L else 1L)
    if (!is.na(at) && is.character(code[[at]])) {
      for (text in code[[at]]) walkText(text, bound, found)
    } else {
      note(name, found$dynamic)
    }
  }
  if (name == "environment" && n == 1L) note(name, found$dynamic)
  if (name == "globalenv" && n == 1L) note(name, found$dynamic)
  if (name %in% names(functionPlaces)) {
    at <- argument(c("FUN", "f", "what"), functionPlaces[[name]])
    if (!is.na(at)) {
      if (is.symbol(code[[at]])) {
        # The name may be the text that an argument has.
        if (as.character(code[[at]]) %in% bound) note(as.character(code[[at]]), found$called)
      } else if (is.call(code[[at]])) {
        made <- code[[at]][[1L]]
        if (!is.symbol(made) || !as.character(made) %in% c("function", "::", ":::", "match.fun", "Vectorize")) {
          note(name, found$calls)
        }
      }
    }
  }
}

# Returns whether a call is parse() of a text that the code shows.
isShownText <- function(code) {
  is.call(code) && is.symbol(code[[1L]]) && as.character(code[[1L]]) %in% parsers &&
    any(vapply(as.list(code)[-1L], is.character, NA))
}

# Returns the strings in code, which may name functions, as in sapply(x, "f").
stringsIn <- function(code) {
  if (is.character(code)) return(code[nzchar(code) & !is.na(code) & nchar(code, "bytes") < 256L])
  if (!is.call(code) && !is.pairlist(code) && !is.list(code)) return(NULL)
  unique(unlist(lapply(as.list(unclass(code)), function(part) if (!missing(part)) stringsIn(part))))
}

# Returns the texts in elements and arguments that may name functions.
textsIn <- function(values) {
  if (is.character(values)) return(unique(as.vector(values)))
  if (!is.list(values)) return(NULL)
  texts <- vapply(values, function(value) is.character(value) && length(value) <= 1000L, NA)
  unique(unlist(values[texts], use.names = FALSE))
}

# Returns the hashes of the parts of a function, named by what they are. `what`: what messages call the function.
functionHashes <- function(fun, what = "`FUN`") {
  if (typeof(fun) != "closure") return(stats::setNames(hashOf(fun), what))
  comparing({
    found <- variablesUsed(fun)
    # A function that calls itself is not one of its variables.
    found <- found[!vapply(found, identical, NA, fun)]
    hashing$parents <- any(vapply(c(list(fun), found), looksInEnvironments, NA))
    on.exit(hashing$parents <- NULL)
    more <- attributes(fun)
    more <- more[!names(more) %in% ignoredAttributes]
    parts <- c(codeOf(fun), if (length(more)) list(more), found)

    labels <- c(
      paste("the arguments of", what), paste("the body of", what), if (length(more)) paste("the attributes of", what),
      sprintf("`%s`, which %s uses", names(found), what)
    )
    vapply(stats::setNames(parts, labels), hashOf, "")
  }, "FUN")
}

# Returns whether a function looks up variables in environments and in their parents.
looksInEnvironments <- function(fun) {
  if (typeof(fun) != "closure") return(FALSE)
  any(all.names(body(fun)) %in% environmentUsers)
}

# Returns the hashes of the arguments of `FUN`.
argumentHashes <- function(common) {
  names <- names2(common)
  places <- sprintf("argument %d in `...`", seq_along(common))
  labels <- ifelse(nzchar(names), sprintf("the argument `%s`", names), places)
  comparing(vapply(stats::setNames(common, labels), hashOf, ""), "...")
}
