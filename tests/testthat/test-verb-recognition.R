# parallel's own names on our clusters: the whole job is run at the first send, from wherever the verb is called, and
# gives what PSOCK gives. What is not recognised goes task by task, with the same answers.

skip_on_cran()
watch_processes()

parallels_own <- verbs_of("parallel")

# The value of the call, and how many verbs of parallel were run as a whole.
counting <- function(expr) {
  count <- 0L
  original <- get("returnFrom", asNamespace("rustcluster"))
  local_function("returnFrom", function(frame, value) {
    force(value)
    count <<- count + 1L
    original(frame, value)
  })
  value <- force(expr)
  list(value = value, count = count)
}

# Each is called with `cl` and parallel's verbs in its environment. The names say how many verbs run as a whole.
ways <- alist(
  "1" = clusterCall(cl, sum, 1, 2),
  "1" = clusterEvalQ(cl, 1 + 1),
  "1" = clusterApply(cl, 1:9, sqrt),
  "1" = clusterApplyLB(cl, 1:9, sqrt),
  "1" = clusterMap(cl, `+`, 1:9, 9:1),
  "1" = clusterMap(cl, `+`, 1:9, 9:1, .scheduling = "dynamic"),
  "1" = parLapply(cl, 1:9, sqrt),
  "1" = parLapplyLB(cl, 1:9, sqrt),
  "1" = parLapplyLB(cl, c(a = 1, b = 2, c = 3, d = 4, e = 5, f = 6), function(x, y) x + y, y = 2),
  "1" = parLapplyLB(cl, 1:9, sqrt, chunk.size = 2),
  "1" = parSapplyLB(cl, letters, toupper),
  "1" = parSapply(cl, letters, toupper),
  "1" = parApply(cl, matrix(1:12, 3), 1, sum),
  "1" = parRapply(cl, matrix(1:12, 3), sum),
  "1" = parCapply(cl, matrix(1:12, 3), sum),
  # From all kinds of places.
  "1" = do.call(clusterApply, list(cl, 1:9, sqrt)),
  "1" = do.call("parLapply", list(cl, 1:9, quote(sqrt))),
  "3" = Reduce(function(x, i) sum(unlist(clusterApply(cl, x + 1:3, sqrt))), 1:3, 0),
  "1" = tryCatch(clusterApplyLB(cl, 1:9, sqrt), error = identity, finally = NULL),
  "1" = withCallingHandlers(clusterApply(cl, 1:9, sqrt), warning = function(w) NULL, error = function(e) NULL),
  "1" = suppressWarnings(suppressMessages(clusterApply(cl, 1:9, sqrt))),
  "2" = withCallingHandlers({
    warning("a")
    clusterApply(cl, 1:9, sqrt)
  }, warning = function(w) {
    print(unlist(clusterCall(cl, function() 3)))
    invokeRestart("muffleWarning")
  }),
  "1" = local({
    makeActiveBinding("now", function() unlist(parLapply(cl, 1:9, sqrt)), environment())
    now
  }),
  "1" = local(clusterApply(cl, 1:9, sqrt)),
  "4" = (function(n) if (n == 0) 0 else sum(unlist(clusterApply(cl, 1:n, sqrt))) + Recall(n - 1))(4),
  "1" = (function(...) clusterApply(...))(cl, 1:9, sqrt),
  "1" = eval(quote(clusterCall(cl, sum, 1))),
  "1" = evalq(clusterCall(cl, sum, 1), list2env(list(cl = cl))),
  "1" = Map(function(f) f(cl, 1:3, sqrt), list(clusterApply))[[1]],
  "2" = sapply(1:2, function(i) sum(unlist(clusterApplyLB(cl, 1:9, sqrt)))),
  "1" = methods::new("NamesRC")$run(cl),
  "1" = namesS4(cl),
  "1" = vapply(list(cl), function(cl) sum(unlist(clusterApply(cl, 1:9, sqrt))), 0),
  "2" = {
    delayedAssign("later", clusterApply(cl, 1:9, sqrt))
    list(later, clusterCall(cl, function() 1))
  },
  "1" = {
    on_exit <- function() {
      on.exit(value <<- clusterApply(cl, 1:9, sqrt), add = TRUE, after = FALSE)
      NULL
    }
    value <- NULL
    on_exit()
    value
  },
  # Nested: an argument of a verb is the result of another.
  "2" = clusterApply(cl, parLapply(cl, 1:9, sqrt), function(x) x + 1),
  "2" = clusterApply(cl, 1:9, function(x, y) x + y, y = sum(unlist(clusterApply(cl, 1:3, sqrt)))),
  "2" = clusterCall(cl, sum, unlist(clusterCall(cl, function() 1))),
  "2" = parLapplyLB(cl, 1:9, function(x, y) x + y, y = clusterCall(cl, function() 2)[[1]]),
  "2" = clusterMap(cl, `+`, 1:9, unlist(clusterMap(cl, `+`, 1:9, 1))),
  # Parts of a cluster.
  "1" = clusterApply(rev(cl), 1:9, sqrt),
  "1" = clusterApply(cl[2:3], 1:9, sqrt),
  "1" = clusterApplyLB(cl[1], 1:3, sqrt),
  "1" = parLapplyLB(cl[c(4, 1)], 1:9, sqrt),
  # Nodes that are there twice, of which the order of tasks is known.
  "1" = clusterCall(cl[1], sum, 1),
  "0" = clusterCall(cl[c(1, 1, 2)], sum, 1),
  "0" = clusterApply(cl[c(1, 1, 2)], 1:9, sqrt),
  "0" = clusterApply(cl, list(), sqrt),
  # A function that gives the arguments may have a state: it is called in the order of the tasks.
  "0" = parallel:::staticClusterApply(cl, sum, 9, function(i) list(i, 1)),
  "0" = parallel:::dynamicClusterApply(cl, sum, 9L, function(i) list(i, 1)),
  # So may elements of a class of its own; R's classes have none.
  "1" = clusterApply(cl, data.frame(a = 1:2, b = 3:4, c = 5:6), sum),
  "1" = clusterApply(cl, as.Date("2024-01-01") + 0:8, format),
  "1" = clusterMap(cl, list, factor(letters[1:6]), as.POSIXct(1:6, origin = "1970-01-01", tz = "UTC")),
  # Results that return() must not evaluate.
  "1" = clusterCall(cl, function() quote(stop("evaluated"))),
  "1" = clusterApply(cl, 1:3, function(i) as.name("nowhere")),
  # An error.
  "0" = tryCatch(clusterApply(cl, 1:9, function(i) if (i == 3) stop("three")), error = conditionMessage),
  "0" = tryCatch(parLapplyLB(cl, 1:9, function(i) if (i > 3) stop("many")), error = conditionMessage),
  "0" = tryCatch(clusterCall(cl, stop, "all"), error = conditionMessage),
  "0" = try(clusterApply(cl, 1:9, sqrt, stop("argument")), silent = TRUE),
  "0" = tryCatch(clusterApply(cl, 1:9, nosuch), error = conditionCall),
  "0" = tryCatch(clusterApply(cl, 1:9, sqrt, nosuch), error = conditionCall),
  "0" = tryCatch(clusterApplyLB(cl, 1:9, sqrt, nosuch), error = conditionCall),
  "0" = tryCatch(parLapplyLB(cl, 1:9, nosuch), error = conditionCall),
  "0" = tryCatch(parLapplyLB(cl, 1:9, sqrt, nosuch), error = conditionCall),
  "0" = tryCatch(clusterCall(cl, nosuch), error = conditionCall),
  "0" = tryCatch(clusterCall(cl, sum, nosuch), error = conditionCall),
  "0" = tryCatch(clusterCall(cl[1], nosuch), error = conditionCall),
  "0" = tryCatch(clusterApply(cl, 1:9), error = identity),
  "0" = tryCatch(clusterApplyLB(cl, 1:9), error = identity),
  "0" = tryCatch(parLapplyLB(cl, 1:9), error = identity),
  "0" = tryCatch(clusterCall(cl), error = identity)
)

# What the calls of `ways` use besides.
local_callers <- function(.frame = parent.frame()) {
  suppressMessages({
    methods::setRefClass("NamesRC", methods = list(
      run = function(cl) parallel::clusterApply(cl, 1:9, sqrt)
    ), where = globalenv())
    methods::setGeneric("namesS4", function(cl) standardGeneric("namesS4"), where = globalenv())
    methods::setMethod("namesS4", "ANY", function(cl) parallel::clusterApplyLB(cl, 1:9, sqrt), where = globalenv())
  })
  do.call("on.exit", list(quote({
    methods::removeGeneric("namesS4", where = globalenv())
    methods::removeClass("NamesRC", where = globalenv())
  }), add = TRUE, after = FALSE), envir = .frame)
}

test_that("parallel's own names run whole jobs, from wherever they are called", {
  local_callers()
  pair <- cluster_pair()
  for (way in seq_along(ways)) {
    expr <- strip_srcref(ways[[way]])
    want <- outcome(expr, pair$psock, parallels_own)
    got <- counting(outcome(expr, pair$rust, parallels_own))
    text <- paste(deparse(expr), collapse = "\n")
    expect_identical(got$value, want, info = text)
    expect_identical(got$count, as.integer(names(ways)[[way]]), info = text)
  }
})

test_that("it does not matter whether code is compiled", {
  old <- compiler::enableJIT(0)
  on.exit(compiler::enableJIT(old), add = TRUE, after = FALSE)
  cl <- cluster_pair()$rust
  plain <- function(cl, n) {
    values <- list()
    for (i in 1:2) values[[i]] <- parallel::clusterApplyLB(cl, 1:n, function(x) x * 10)
    values
  }
  for (fun in list(plain, compiler::cmpfun(plain))) {
    got <- counting(fun(cl, 7))
    expect_identical(got$value, rep(list(as.list(1:7 * 10)), 2))
    expect_identical(got$count, 2L)
  }
})

test_that("methods of S4 that have been made of parallel's functions run whole jobs, too", {
  cl <- cluster_pair()$rust
  where <- new.env(parent = globalenv())
  for (name in c("clusterCall", "clusterApply")) {
    generic <- paste0(name, "S4")
    fun <- parallels_own[[name]]
    call <- bquote(standardGeneric(.(generic)))
    methods::setGeneric(generic, as.function(c(formals(fun), call), envir = where), where = where)
    methods::setMethod(generic, "ANY", fun, where = where)
  }
  got <- counting(list(where$clusterCallS4(cl, sum, 1, 2), where$clusterApplyS4(cl, 1:5, sqrt)))
  expect_identical(got$value, list(rep(list(3), 4), lapply(1:5, sqrt)))
  expect_identical(got$count, 2L)
})

test_that("tasks run on the same nodes as with parallel", {
  expect_same_value({
    clusterApply(cl, seq_along(cl), function(i) assign("me", i, envir = .GlobalEnv))
    list(
      unlist(clusterApply(cl, 1:11, function(i) me)), unlist(clusterMap(cl, function(i) me, 1:9)),
      unlist(parLapply(cl, 1:11, function(i) me)), unlist(parLapply(cl, 1:20, function(i) me, chunk.size = 3)),
      unlist(clusterApply(cl[c(3, 1)], 1:5, function(i) me)), parSapply(rev(cl), 1:7, function(i) me),
      # No more tasks than nodes: each has one.
      unlist(clusterApplyLB(cl, 1:4, function(i) me)), unlist(clusterApplyLB(cl, 1:3, function(i) me)),
      unlist(clusterMap(cl, function(i) me, 1:4, .scheduling = "dynamic"))
    )
  })
})

# Vectors whose elements draw a random number, and whose first element is an error.
local_elements <- function(.frame = parent.frame()) {
  methods <- list(
    `[[.NamesDrawing` = function(x, i) c(unclass(x)[[i]], stats::runif(1)),
    `[[.NamesBad` = function(x, i) if (i == 1) stop("no first") else unclass(x)[[i]]
  )
  for (name in names(methods)) assign(name, methods[[name]], globalenv())
  do.call("on.exit", list(bquote(rm(list = .(names(methods)), envir = globalenv())), add = TRUE, after = FALSE), envir = .frame)
}

# As in a package, whose functions carry no source along.
strip_function <- function(fun) {
  body(fun) <- strip_srcref(body(fun))
  environment(fun) <- globalenv()
  utils::removeSource(fun)
}

test_that("elements of a chunk may have values of class \"try-error\"", {
  expect_same_value(parLapplyLB(cl, 1:9, function(i) try(stop("said ", i), silent = TRUE)))
  expect_same_value(parSapplyLB(cl, 1:9, function(i) structure("e", class = c("snow-try-error", "try-error"))))
  # More bytes than are sent as they are.
  expect_same_value(parLapplyLB(cl, 1:3, function(i) structure(list(numeric(1e5), globalenv()), class = "try-error")))
  expect_same_error(parLapplyLB(cl, 1:9, function(i) if (i == 4) stop("four") else try(stop("said"), silent = TRUE)))
  expect_same_error(clusterApplyLB(cl, 1:9, function(i) try(stop("said"), silent = TRUE)))
  values <- clusterLapply(cluster_pair()$rust, 1:3, function(i) try(stop("said"), silent = TRUE))
  expect_identical(vapply(values, class, ""), rep("try-error", 3L))
})

test_that("a function of parLapplyLB() is called as lapply() calls it", {
  expect_same_value(parLapplyLB(cl, 1:9, function(x, ...) {
    list(substitute(x), match.call(), sys.call(), nargs(), sort(ls(parent.frame())))
  }, 5, a = quote(b)))
  expect_same_value(parLapplyLB(cl, 1:9, function(x, F, i) x + F + i, F = 2, i = 3))
  for (fun in c("quote", "substitute", "missing", "return", "if")) {
    expect_same_error(parLapplyLB(cl, 1:9, get(fun, baseenv())), fun = fun)
  }
})

test_that("arguments are evaluated in the order in which parallel does", {
  # Order shows in random numbers and in which error is raised.
  local_elements()
  expect_same_value({
    set.seed(1)
    list(
      clusterApply(cl, structure(1:11, class = "NamesDrawing"), list, stats::runif(1)),
      clusterApplyLB(cl, structure(1:9, class = "NamesDrawing"), list, stats::runif(1)),
      clusterMap(cl, list, 1:11, structure(1:11, class = "NamesDrawing"), MoreArgs = list(stats::runif(1))),
      clusterMap(cl, list, structure(1:9, class = "NamesDrawing"), MoreArgs = 1:2, .scheduling = "dynamic")
    )
  })
  expect_same_error(clusterApply(cl, structure(1:9, class = "NamesBad"), list, stop("argument")))
  expect_same_error(clusterMap(cl, list, structure(1:9, class = "NamesBad"), MoreArgs = stop("argument")))
  expect_same_error(clusterMap(cl, list, 1:9, MoreArgs = stop("argument")))
  expect_same_error(clusterMap(cl, list, 1:9, MoreArgs = nosuch, .scheduling = "dynamic"))
})

test_that("`MoreArgs` may be anything that c() puts behind a list", {
  for (more in list(1:2, c(a = 1), pairlist(a = 1), mtcars[1:2], expression(a), as.POSIXlt("2024-01-01", "UTC"), package_version("1.2.3"))) {
    expect_same_as_psock(clusterMap(cl, list, 1:5, MoreArgs = more), more = more)
  }
})

test_that("a function for arguments that looks like parallel's is called if it is made elsewhere", {
  given <- function(cl, x, fun, ...) {
    local(parallel:::staticClusterApply(cl, fun, length(x), function(i) c(list(x[[i]]), list(...))))
  }
  mapped <- function(cl, args, fun, MoreArgs) {
    local(parallel:::dynamicClusterApply(cl, fun, 3L, function(i) c(lapply(args, function(x) x[[i]]), MoreArgs)))
  }
  backwards <- function(cl, x, fun, ...) {
    parallel:::staticClusterApply(cl, fun, 5L, function(k, i = 6L - k) c(list(x[[i]]), list(...)))
  }
  expect_same_value(given(cl, 1:5, list, 7), given = strip_function(given))
  expect_same_value(mapped(cl, list(1:3, 3:1), list, list(9)), mapped = strip_function(mapped))
  expect_same_value(backwards(cl, 1:5, list, 7), backwards = strip_function(backwards))
})

test_that("arguments are evaluated as often as parallel does", {
  counted <- function(cl) {
    seen <- character()
    note <- function(what, value) {
      seen <<- c(seen, what)
      value
    }
    parallel::clusterApply(note("cl", cl), note("x", 1:9), note("fun", function(x, y) x), note("y", 2))
    parallel::parLapplyLB(note("cl", cl), note("x", 1:9), note("fun", function(x, y) x), note("y", 2))
    parallel::clusterCall(note("cl", cl), note("fun", sum), note("y", 2))
    parallel::clusterMap(note("cl", cl), note("fun", `+`), note("x", 1:3), note("y", 2))
    seen
  }
  pair <- cluster_pair()
  expect_identical(counted(pair$rust), counted(pair$psock))
})

test_that("warnings, errors and jumps out of a verb leave the cluster as it was", {
  cl <- cluster_pair()$rust
  for (i in 1:3) {
    expect_identical(withRestarts(parallel::clusterApply(cl, 1:3, sqrt, invokeRestart("out")), out = function() "out"), "out")
    expect_identical(callCC(function(k) parallel::clusterMap(cl, identity, k("out"))), "out")
    expect_error(parallel::clusterApply(cl, 1:9, function(i) stop("no")), "9 nodes produced errors; first error: no")
    expect_identical(parallel::clusterCall(cl, identity, i), rep(list(i), 4))
  }
  old <- options(warn = 2)
  on.exit(options(old), add = TRUE, after = FALSE)
  expect_identical(parallel::clusterApply(cl, 1:2, function(i) as.integer("a")), list(NA_integer_, NA_integer_))
  setTimeLimit(elapsed = 1, transient = TRUE)
  expect_error(parallel::clusterApplyLB(cl, rep(0.2, 200), Sys.sleep), "time limit")
  setTimeLimit()
  expect_identical(parallel::clusterCall(cl, identity, 4), rep(list(4), 4))
})

test_that("a finalizer that runs in the middle of a verb takes none of its answers", {
  cl <- local_cluster(3)
  inner <- list()
  # The finalizer runs at the first collection after this.
  arm <- function() {
    reg.finalizer(new.env(), function(e) {
      value <- tryCatch(unlist(clusterCall(cl, identity, 2)), rustcluster_busy = function(e) "busy")
      inner[[length(inner) + 1L]] <<- value
    })
    NULL
  }
  on.exit(gctorture2(0), add = TRUE, after = FALSE)
  outer <- list(
    function() identical(clusterCall(cl, identity, c(1, 5)), rep(list(c(1, 5)), 3L)),
    function() identical(clusterCall(cl, identity, factor("a")), rep(list(factor("a")), 3L)),
    function() identical(clusterApply(cl, 1:3, factor), lapply(1:3, factor)),
    function() identical(parallel::clusterCall(cl, identity, list(1, "a")), rep(list(list(1, "a")), 3L)),
    function() identical(clusterApply(cl, c(4, 5, 6), identity), list(4, 5, 6)),
    function() identical(parallel::parLapply(cl, 1:6, identity), as.list(1:6))
  )
  for (step in seq(1L, 401L, by = 4L)) {
    for (call in outer) {
      arm()
      gctorture2(step + 2000L, step)
      right <- call()
      gctorture2(0)
      expect_true(right)
    }
  }
  gc()
  expect_length(inner, 101L * length(outer))
  refused <- vapply(inner, identical, NA, "busy")
  expect_true(all(refused | vapply(inner, identical, NA, c(2, 2, 2))))
  expect_true(any(refused))
})

test_that("an interrupt ends a verb, and the next verb works", {
  cl <- local_cluster(2)
  verbs <- alist(
    parallel::clusterApply(cl, rep(0.05, 200), Sys.sleep), parallel::clusterApplyLB(cl, rep(0.05, 200), Sys.sleep),
    parallel::clusterCall(cl, Sys.sleep, 20), parallel::parLapplyLB(cl, rep(0.05, 200), Sys.sleep)
  )
  for (verb in verbs) {
    expect_lt(interrupted(eval(verb), 0.5), 5 + slack())
    expect_identical(unlist(parallel::clusterApplyLB(cl, 1:9, function(i) -i)), -(1:9))
  }
})

test_that("worker failures are retried and reported as with the verbs of this package", {
  cl <- local_cluster(3)
  verbs <- alist(
    parallel::clusterApply(cl, 1:30, work, trap), parallel::clusterApplyLB(cl, 1:30, work, trap),
    parallel::parLapplyLB(cl, 1:30, work, trap), parallel::clusterMap(cl, work, 1:30, MoreArgs = list(trap))
  )
  work <- global(function(i, trap) {
    if (i == 17 && suppressWarnings(file.remove(trap))) {
      tools::pskill(Sys.getpid(), tools::SIGKILL)
      Sys.sleep(60)
    }
    i * 10
  })
  for (verb in verbs) {
    trap <- trap()
    got <- with_losses(eval(verb))
    expect_identical(got$value, as.list(1:30 * 10), info = deparse(verb))
    expect_length(got$losses, 1)
  }
  error <- suppressWarnings(caught(parallel::clusterApplyLB(cl, 1:9, poison, 5)))
  expect_rust_error(error, "task_failed")
  expect_identical(error$results[-5], as.list(1:9 * 10)[-5])
})

test_that("progress is shown", {
  cl <- cluster_pair()$rust
  old <- options(rustcluster.progress = TRUE)
  on.exit(options(old), add = TRUE, after = FALSE)
  shown <- 0L
  local_function("showProgress", function(...) function() shown <<- shown + 1L)
  parallel::clusterApplyLB(cl, 1:9, identity)
  expect_gt(shown, 0L)
})

test_that("exports and common arguments are held once for each host", {
  skip_unless_proc()
  skip_unless_memory_limits()
  cl <- local_cluster(8)
  parallel::clusterCall(cl, gc)
  pids <- clusterPids(cl)
  skip_unless_smaps(pids[[1L]])
  x <- stats::runif(6.25e6)
  before <- memory_of(pids, "^Pss:")
  parallel::clusterExport(cl, "x", environment())
  got <- parallel::clusterApply(cl, 1:8, global(function(i, y) sum(x) + sum(y) + i), x)
  expect_equal(unlist(got), 1:8 + 2 * sum(x))
  expect_lt(sum(memory_of(pids, "^Pss:") - before), 200)
})

# A verb with random arguments, as a list of the call `expr` and of `values` for it. Which node a task goes to, and what
# random numbers it draws there, shows in results where parallel says which node that is.
random_call <- function() {
  one <- function(...) sample(list(...), 1L)[[1L]]
  n <- one(0L, 1L, 2L, 3L, 4L, 5L, 9L, 40L, 300L)
  x <- one(
    seq_len(n), stats::runif(n), as.list(seq_len(n)), stats::setNames(seq_len(n), sprintf("n%d", seq_len(n))),
    as.character(seq_len(n)), seq_len(n) %% 3L == 1L, factor(rep("u", n)), as.Date("2024-01-01") + seq_len(n),
    lapply(seq_len(n), function(i) if (i %% 2L) NULL else i), complex(n, 1, 2)
  )
  nodes <- one(quote(cl), quote(cl), quote(rev(cl)), quote(cl[2:4]), quote(cl[1]), quote(cl[c(2, 2, 1)]))
  bad <- if (stats::runif(1) < 0.25) sample.int(max(n, 1L), one(1L, 2L), TRUE) else integer()
  drawing <- stats::runif(1) < 0.3
  y <- one(1, NULL, letters, stats::runif(2e4), quote(a + b), list(1, "b"), mtcars)
  fun <- one(
    function(v, ...) list(v, ...), function(v, ...) length(v), function(v, ...) invisible(NULL),
    function(v, ...) warning("not told"), function(v, ...) c(a = 1, b = 2), function(v, ...) nargs()
  )
  fixed <- function(v, ...) {
    if (as.character(unlist(v))[1L] %in% bad) stop("bad ", as.character(unlist(v))[1L])
    value <- fun(v, ...)
    if (drawing) list(value, stats::runif(1), RNGkind()) else value
  }
  environment(fun) <- globalenv()
  environment(fixed) <- list2env(list(fun = fun, bad = as.character(bad), drawing = drawing), parent = globalenv())
  # Where it is open which node has a task, so are its random numbers.
  free <- fixed
  environment(free) <- list2env(list(fun = fun, bad = as.character(bad), drawing = FALSE), parent = globalenv())
  size <- one(NULL, 1L, 2L, 7L)
  m <- matrix(seq_len(max(n, 2L) * 2L), 2L)
  verb <- one(
    quote(clusterCall(NODES, f, x, y)), quote(clusterApply(NODES, x, f, y)), quote(clusterApply(NODES, x, f, named = y)),
    quote(clusterApplyLB(NODES, x, g, y)), quote(clusterMap(NODES, f, x, MoreArgs = list(y))), quote(clusterMap(NODES, f, x, 1:2)),
    quote(clusterMap(NODES, g, x, .scheduling = "dynamic", SIMPLIFY = TRUE)), quote(parLapply(NODES, x, f, y, chunk.size = size)),
    quote(parLapplyLB(NODES, x, g, y, chunk.size = size)), quote(parSapply(NODES, x, f, chunk.size = size)),
    quote(parSapplyLB(NODES, x, g, chunk.size = size)), quote(parApply(NODES, m, 2, g)), quote(parRapply(NODES, m, g)),
    quote(parCapply(NODES, m, f)), quote(clusterEvalQ(NODES, list(runif(1), RNGkind()))),
    quote({
      clusterExport(NODES, "y", environment())
      clusterEvalQ(NODES, y)
    }),
    quote({
      clusterSetRNGStream(NODES, 7)
      clusterCall(NODES, runif, 2)
    })
  )
  verb <- do.call(substitute, list(verb, list(NODES = nodes)))
  # A generator of the same kind, in the same state, on all nodes of all clusters.
  seeded <- bquote({
    clusterCall(cl, function(kind, seed) {
      RNGkind(kind)
      set.seed(seed)
    }, .(one("Mersenne-Twister", "L'Ecuyer-CMRG", "Wichmann-Hill", "Knuth-TAOCP-2002")), .(sample.int(1000L, 1L)))
    .(verb)
  })
  list(expr = seeded, values = list(x = x, y = y, f = strip_function(fixed), g = strip_function(free), m = m, size = size))
}

strip_function <- function(fun) {
  attr(fun, "srcref") <- NULL
  body(fun) <- strip_srcref(body(fun))
  env <- environment(fun)
  if (!identical(env, globalenv())) {
    env$fun <- strip_function(env$fun)
    environment(fun) <- env
  }
  fun
}

test_that("random calls return the same as with PSOCK", {
  n <- if (long_tests()) 600 else 60
  seed <- as.integer(Sys.getenv("RUSTCLUSTER_SEED", "1"))
  kind <- RNGkind()
  on.exit(do.call(RNGkind, as.list(kind)), add = TRUE, after = FALSE)
  for (i in seq_len(n)) {
    set.seed(seed * 1e4 + i, "Mersenne-Twister", "Inversion", "Rejection")
    call <- random_call()
    want <- outcome(call$expr, cluster_pair()$psock, c(call$values, parallels_own))
    for (whose in c("rust", "ours")) {
      verbs <- if (whose == "rust") parallels_own else verbs_of("rustcluster")
      got <- outcome(call$expr, cluster_pair()[[whose]], c(call$values, verbs))
      expect(identical(got, want), paste0(
        "call ", i, " of seed ", seed, " differs (", whose, "): ", paste(deparse(call$expr), collapse = "\n"), "\nPSOCK:\n",
        describe_outcome(want), "\ngot:\n", describe_outcome(got)
      ))
    }
  }
})

test_that("no process is left", {
  stop_cluster_pairs()
  expect_no_leftovers()
})
