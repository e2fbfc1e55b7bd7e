# PSOCK is the oracle: with a cluster of this package, a verb of parallel, and the verb of this package with the
# same name, must return what the verb of parallel returns with a PSOCK cluster of the same size.

# Call the verbs by their plain names, as in a script.
suppressPackageStartupMessages(library(rustcluster))

# Removes srcrefs: code in a test file refers to the whole file, which would be most of a message to a worker.
strip_srcref <- function(x) {
  if (is.call(x)) {
    attributes(x) <- NULL
    if (identical(x[[1L]], as.name("function")) && length(x) > 3L) {
      x <- x[1:3]
    }
    for (i in seq_along(x)) {
      # A missing argument, as in x[, 1], cannot be stored in a variable.
      if (!identical(x[[i]], quote(expr = )) && !is.null(x[[i]])) x[[i]] <- strip_srcref(x[[i]])
    }
  }
  x
}

clusters <- new.env(parent = emptyenv())

# Returns the pair of clusters of this file. It is started on demand and kept, because starting PSOCK workers
# takes most of the time of these tests.
cluster_pair <- function(n = 4L) {
  key <- as.character(n)
  if (is.null(clusters[[key]])) {
    # In this order, both clusters see the same environment variables.
    psock <- parallel::makePSOCKcluster(n)
    rust <- tryCatch(makeRustCluster(n), error = function(e) {
      parallel::stopCluster(psock)
      stop(e)
    })
    clusters[[key]] <- list(psock = psock, rust = note_processes(rust))
    # The verbs of this package get another cluster, because a call may leave state on its nodes.
    clusters[[key]]$ours <- note_processes(makeRustCluster(n))
  }
  clusters[[key]]
}

# Called at the end of a file that used the pair.
stop_cluster_pairs <- function() {
  for (key in ls(clusters)) {
    lapply(clusters[[key]], stop_quietly)
    rm(list = key, envir = clusters)
  }
  invisible()
}

# Returns the verbs that both packages have, as functions of this package.
verbs_of <- function(package) {
  names <- intersect(getNamespaceExports("rustcluster"), getNamespaceExports("parallel"))
  mget(names, asNamespace(package))
}

# Returns everything observable of a call: its value and its visibility, or its error; its warnings, messages
# and output.
outcome <- function(expr, cl, values = list()) {
  # Evaluate below the global environment, as in a function of a user's script.
  env <- list2env(c(list(cl = cl), values), parent = globalenv())
  seen <- list(warnings = list(), messages = list())
  # From R 4.5 on, a class says whether compiled code was run, which R decides.
  condition <- function(e) {
    list(class = setdiff(class(e), c("evalError", "getvarError")), message = conditionMessage(e))
  }
  seen$output <- utils::capture.output(
    result <- withCallingHandlers(
      tryCatch(withVisible(eval(expr, env)), error = function(e) {
        c(condition(e), call = paste(deparse(conditionCall(e)), collapse = "\n"))
      }),
      warning = function(w) {
        seen$warnings <<- c(seen$warnings, list(condition(w)))
        tryInvokeRestart("muffleWarning")
      },
      message = function(m) {
        seen$messages <<- c(seen$messages, list(condition(m)))
        tryInvokeRestart("muffleMessage")
      }
    )
  )
  c(list(result = result), seen)
}

describe_outcome <- function(x) {
  paste(utils::capture.output(utils::str(x, give.attr = TRUE, list.len = 20)), collapse = "\n")
}

# Evaluates the call with `cl` bound to a PSOCK cluster, to a cluster of this package, and to another of these
# with the verbs of this package, and compares the outcomes. Values in `...` are bound beside `cl`. Returns the
# outcome of this package, so that a test can check that it compared the intended case.
expect_same_as_psock <- function(expr, ..., n = 4L) {
  expr <- strip_srcref(substitute(expr))
  values <- list(...)
  pair <- cluster_pair(n)
  want <- outcome(expr, pair$psock, c(values, verbs_of("parallel")))
  for (whose in c("ours", "rust")) {
    got <- outcome(expr, pair[[whose]], c(values, verbs_of(if (whose == "ours") "rustcluster" else "parallel")))
    same <- identical(got, want)
    expect(same, if (!same) {
      paste0(
        paste(deparse(expr), collapse = "\n"), " differs\nPSOCK:\n", describe_outcome(want),
        "\n", whose, ":\n", describe_outcome(got)
      )
    } else "")
  }
  invisible(got)
}

# Does the same for a call that must succeed: guards against two equal typing errors.
expect_same_value <- function(expr, ..., n = 4L) {
  call <- match.call()
  call[[1L]] <- quote(expect_same_as_psock)
  got <- eval(call, parent.frame())
  expect(
    !is.null(got$result$visible) || is.null(got$result$message),
    paste("both failed:", got$result$message)
  )
  invisible(got$result$value)
}

# Does the same for a call that must fail.
expect_same_error <- function(expr, ..., n = 4L) {
  call <- match.call()
  call[[1L]] <- quote(expect_same_as_psock)
  got <- eval(call, parent.frame())
  expect("error" %in% got$result$class, "no error was raised")
  invisible(got$result)
}

# Returns the condition that the expression raises, or NULL.
caught <- function(expr) {
  tryCatch({
    expr
    NULL
  }, error = identity)
}

# Prints an error as snapshots contain it, for any version of testthat.
show_error <- function(expr) {
  error <- caught(expr)
  cat(class(error)[[1L]], ": ", conditionMessage(error), "\n", sep = "")
}

# Fails unless the condition has the class of the package, and all classes above.
expect_rust_error <- function(cnd, what) {
  expect(
    inherits(cnd, "condition"),
    "no condition was raised"
  )
  expect_s3_class(cnd, paste0("rustcluster_", what))
  expect_s3_class(cnd, "rustcluster_error")
  expect_s3_class(cnd, "error")
  invisible(cnd)
}
