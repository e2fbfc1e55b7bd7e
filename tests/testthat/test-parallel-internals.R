# What rustcluster relies on that R does not promise to keep. A test that fails here names what a new version of R
# has changed, and what that costs until R/parallel-internals.R knows it.

parallels <- asNamespace("parallel")

# Fails with the reason unless the condition holds.
expect_relied_on <- function(holds, ...) {
  expect(isTRUE(holds), paste0("R ", getRversion(), " has changed ", ..., ": see R/parallel-internals.R"))
}

test_that("the functions of parallel that are called or compared exist", {
  for (name in c("clusterCall", "clusterSetRNGStream", "staticClusterApply", "dynamicClusterApply", "clusterApplyLB",
                 "parLapplyLB", "checkForRemoteErrors", "defaultCluster", "stopNode", "splitList", "sendCall",
                 "postNode", "recvResult", "recvOneResult")) {
    expect_relied_on(is.function(get0(name, parallels, inherits = FALSE)), "parallel's ", name, "(), which is missing")
  }
})

test_that("the code of parallel's verbs is known, so that their jobs are run as a whole", {
  for (name in names(rustcluster:::verbCode)) {
    fun <- get0(name, parallels, inherits = FALSE)
    expect_relied_on(
      rustcluster:::isWrittenAs(fun, rustcluster:::verbCode[[name]]), "how parallel's ", name, "() is written, so that ",
      "it goes task by task on our clusters, which is slow"
    )
    expect_relied_on(rustcluster:::parallels$known[[name]], name, "()")
  }
  # Anything else is not taken for them.
  other <- parallels$staticClusterApply
  body(other)[[3L]] <- quote(p <- 1L + length(cl))
  expect_false(rustcluster:::isWrittenAs(other, rustcluster:::verbCode$staticClusterApply))
})

test_that("a verb sends through sendCall(), postNode() and sendData()", {
  functions <- list()
  method <- function(node, data) {
    functions <<- lapply(seq_len(sys.nframe()), sys.function)
    stop("seen")
  }
  registerS3method("sendData", "SeenNode", method, envir = parallels)
  cl <- structure(list(structure(list(rank = 1L), class = "SeenNode")), class = "cluster")
  above <- list(parallels$sendCall, parallels$postNode, parallels$sendData, method)
  for (verb in c("clusterCall", "clusterSetRNGStream", "clusterApply", "clusterApplyLB")) {
    try(switch(verb,
      clusterCall = parallel::clusterCall(cl, identity, 1),
      clusterSetRNGStream = parallel::clusterSetRNGStream(cl, 1),
      clusterApply = parallel::clusterApply(cl, 1, identity),
      clusterApplyLB = parallel::clusterApplyLB(cl, 1, identity)
    ), silent = TRUE)
    n <- length(functions)
    relies <- paste0("what parallel's ", verb, "() calls to send a task")
    expect_relied_on(n > 4L && identical(functions[n - 3:0], above), relies)
    distance <- if (verb == "clusterApplyLB") 5L else 4L
    sender <- switch(verb, clusterApply = "staticClusterApply", clusterApplyLB = "dynamicClusterApply", verb)
    expect_relied_on(identical(functions[[n - distance]], parallels[[sender]]), relies)
  }
})

test_that("parLapplyLB() calls clusterApplyLB() through do.call(), and that dynamicClusterApply()", {
  functions <- list()
  registerS3method("sendData", "SeenNode", function(node, data) {
    functions <<- lapply(seq_len(sys.nframe()), sys.function)
    stop("seen")
  }, envir = parallels)
  cl <- structure(list(structure(list(rank = 1L), class = "SeenNode")), class = "cluster")
  try(parallel::parLapplyLB(cl, 1:3, identity), silent = TRUE)
  at <- length(functions) - 5L
  callers <- unname(mget(c("dynamicClusterApply", "clusterApplyLB", "parLapplyLB"), parallels))
  expect_relied_on(
    identical(functions[at - c(0L, 1L, 3L)], callers),
    "how parLapplyLB() calls dynamicClusterApply(), so that it has no batches of its own choice"
  )
})

test_that("the functions that give a task's arguments are those that are known", {
  of_apply <- quote(c(list(x[[i]]), list(...)))
  of_map <- quote(c(lapply(args, function(x) x[[i]]), MoreArgs))
  made_by <- function(verb) {
    made <- Filter(function(call) is.call(call) && identical(call[[1L]], quote(`<-`)) && identical(call[[2L]], quote(argfun)),
                   as.list(body(parallels[[verb]])))
    made[[1L]][[3L]][[3L]]
  }
  known <- list(clusterApply = of_apply, clusterApplyLB = of_apply, clusterMap = of_map)
  for (verb in names(known)) {
    expect_relied_on(
      identical(strip_srcref(made_by(verb)), strip_srcref(known[[verb]])), "argfun() of ", verb, "(), so that common arguments are sent ",
      "with each task"
    )
  }
})

test_that("all errors meet in checkForRemoteErrors(), whose results are `val`", {
  expect_relied_on(identical(names(formals(parallels$checkForRemoteErrors)), "val"), "the argument of checkForRemoteErrors()")
  failure <- structure("text", class = c("snow-try-error", "try-error"))
  error <- caught(parallels$checkForRemoteErrors(list(1, failure)))
  expect_relied_on(identical(conditionMessage(error), "one node produced an error: text"), "the text of its errors")
})

test_that("other objects that are looked up in parallel's namespace exist", {
  expect_relied_on(is.function(environment(parallel::clusterExport)$gets), "how clusterExport() assigns a variable")
  expect_relied_on(isFALSE(parallels$.snowTimingData$running()), "snow's timing hooks")
  expect_relied_on(is.environment(parallels$defaultClusterOptions), "the default options of clusters")
  expect_relied_on(is.function(parallels$setDefaultClusterOptions), "setDefaultClusterOptions()")
})

test_that("return() called in a frame returns from its function, whatever is on the way", {
  outer <- function(x) {
    on.exit(left <<- c(left, "outer"), add = TRUE, after = FALSE)
    inner <- function() {
      on.exit(left <<- c(left, "inner"), add = TRUE, after = FALSE)
      tryCatch(rustcluster:::returnFrom(frame, list(1, quote(a + b))), error = identity, finally = left <<- c(left, "finally"))
      "not reached"
    }
    frame <- environment()
    lapply(1, function(i) suppressWarnings(inner()))
    "not reached"
  }
  for (fun in list(outer, compiler::cmpfun(outer))) {
    left <- character()
    expect_relied_on(identical(fun(1), list(1, quote(a + b))), "what return() does that is evaluated in a frame")
    expect_identical(left, c("finally", "inner", "outer"))
  }
})
