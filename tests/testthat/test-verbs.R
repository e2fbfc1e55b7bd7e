# Every verb of parallel, called as parallel's, gives what it gives with PSOCK.

skip_on_cran()
watch_processes()

test_that("clusterCall", {
  expect_same_value(clusterCall(cl, function() 42))
  expect_same_value(clusterCall(cl, sum, 1, 2, 3))
  expect_same_value(clusterCall(cl, paste, "a", "b", sep = "-"))
  expect_same_value(clusterCall(cl, function(x, ...) list(x, ...), 1:3, y = "z", NULL))
  expect_same_value(clusterCall(cl, "sum", 1:4))
  expect_same_value(clusterCall(cl[1], identity, 1L))
  expect_same_value(clusterCall(cl, function(...) nargs()))
  # Arguments arrive as values: calls and symbols are not evaluated again.
  expect_same_value(clusterCall(cl, identity, quote(stop("evaluated"))))
  expect_same_value(clusterCall(cl, identity, as.name("nowhere")))
})

test_that("clusterEvalQ", {
  expect_same_value(clusterEvalQ(cl, 1 + 1))
  expect_same_value(clusterEvalQ(cl, {
    here <- 1:3
    sum(here)
  }))
  expect_same_value(clusterEvalQ(cl, exists("here", envir = .GlobalEnv)))
  expect_same_value(clusterEvalQ(cl, rm(here)))
  expect_same_value(clusterEvalQ(cl, library(stats4)))
  expect_same_value(clusterEvalQ(cl, environmentName(environment())))
  expect_same_value(clusterEvalQ(cl, detach("package:stats4")))
  expect_same_error(clusterCall(cl, library, "notInstalledAnywhere", character.only = TRUE))
})

test_that("clusterApply", {
  expect_same_value(clusterApply(cl, 1:10, function(i) i^2))
  expect_same_value(clusterApply(cl, 1:2, function(i) i))
  expect_same_value(clusterApply(cl, list(a = 1, b = "x"), identity))
  expect_same_value(clusterApply(cl, c(x = 1, y = 2), identity))
  expect_same_value(clusterApply(cl, letters, toupper))
  expect_same_value(clusterApply(cl, 1:5, function(i, p) i + p, p = 100))
  expect_same_value(clusterApply(cl, data.frame(a = 1:3, b = 4:6), sum))
  expect_same_value(clusterApply(cl, NULL, identity))
  expect_same_value(clusterApply(cl, list(), identity))
})

test_that("tasks of clusterApply go to the nodes in turn", {
  got <- expect_same_value({
    clusterApply(cl, seq_along(cl), function(i) assign("me", i, envir = .GlobalEnv))
    unlist(clusterApply(cl, 1:11, function(i) get("me", envir = .GlobalEnv)))
  })
  expect_equal(got, rep(1:4, length.out = 11))
  expect_same_value(clusterEvalQ(cl, rm(me)))
})

test_that("clusterApplyLB", {
  expect_same_value(clusterApplyLB(cl, 1:20, function(i) i^2))
  expect_same_value(clusterApplyLB(cl, 1:2, identity))
  expect_same_value(clusterApplyLB(cl, list(a = 1, b = 2, c = 3), identity))
  expect_same_value(clusterApplyLB(cl, 1:5, function(i, p) i + p, p = 100))
  expect_same_value(clusterApplyLB(cl, list(), identity))
  expect_same_value(clusterApplyLB(cl, 1:200, identity))
  # Answers come back in an order of their own; the values do not.
  expect_same_value(clusterApplyLB(cl, c(4, 1, 3, 0, 2, 0, 1), function(i) {
    Sys.sleep(i / 50)
    i
  }))
})

test_that("clusterMap", {
  expect_same_value(clusterMap(cl, function(x, y) x + y, 1:6, 6:1))
  expect_same_value(clusterMap(cl, function(x, y) x + y, c(a = 1, b = 2, c = 3), 1))
  expect_same_value(clusterMap(cl, function(x, y) paste(x, y), letters[1:5], 1:5))
  expect_same_value(clusterMap(cl, function(x, y) paste(x, y), letters[1:5], 1:5, USE.NAMES = FALSE))
  expect_same_value(clusterMap(cl, rep, 1:4, 4:1))
  expect_same_value(clusterMap(cl, rep, x = 1:4, MoreArgs = list(times = 2)))
  expect_same_value(clusterMap(cl, function(x, y) x * y, 1:6, 1:2, SIMPLIFY = TRUE))
  expect_same_value(clusterMap(cl, function(x, y) c(x, y), 1:3, 4:6, SIMPLIFY = TRUE))
  expect_same_value(clusterMap(cl, function(x) diag(x, 2), 1:3, SIMPLIFY = "array"))
  expect_same_value(clusterMap(cl, function(x, y) x + y, 1:6, 1:3, RECYCLE = FALSE))
  expect_same_value(clusterMap(cl, function(x, y) x + y, 1:9, 9:1, .scheduling = "dynamic"))
  expect_same_value(
    clusterMap(cl, function(x, y) x + y, 1:9, 9:1, .scheduling = "dynamic", SIMPLIFY = TRUE)
  )
  expect_same_value(clusterMap(cl, function(x, y) x + y, numeric(), numeric()))
  expect_same_error(clusterMap(cl, function(x, y) x + y, 1:3, numeric()))
  expect_same_error(clusterMap(cl, function() 1))
  expect_same_error(clusterMap(cl, function(x) x, 1:3, .scheduling = "other"))
})

test_that("clusterExport", {
  local <- function() {
    first <- 1:3
    second <- "b"
    environment()
  }
  expect_same_value({
    clusterExport(cl, c("first", "second"), envir = from)
    list(
      clusterEvalQ(cl, first), clusterEvalQ(cl, second),
      clusterEvalQ(cl, rm(first, second))
    )
  }, from = local())
  expect_same_value(clusterExport(cl, character()))
  expect_same_error(clusterExport(cl, "noSuchVariable"))
  # Nothing was sent, so that the next call is not answered by something else.
  expect_same_value(clusterCall(cl, function() "next"))
  # The default is the global environment.
  assign("exportedFromGlobal", 7, envir = globalenv())
  on.exit(rm("exportedFromGlobal", envir = globalenv()), add = TRUE, after = FALSE)
  expect_same_value({
    clusterExport(cl, "exportedFromGlobal")
    clusterEvalQ(cl, list(exportedFromGlobal, rm(exportedFromGlobal)))
  })
})

test_that("clusterSplit", {
  expect_same_value(clusterSplit(cl, 1:10))
  expect_same_value(clusterSplit(cl, 1:3))
  expect_same_value(clusterSplit(cl, letters))
  expect_same_value(clusterSplit(cl, integer()))
})

test_that("random numbers after clusterSetRNGStream are those of PSOCK", {
  kind <- RNGkind()
  on.exit(RNGkind(kind[[1L]], kind[[2L]], kind[[3L]]), add = TRUE, after = FALSE)
  expect_same_value({
    clusterSetRNGStream(cl, 123)
    clusterEvalQ(cl, rnorm(3))
  })
  # The streams stay in the workers, and go on.
  expect_same_value(clusterCall(cl, runif, 2))
  expect_same_value(parSapply(cl, 1:12, function(i) rnorm(1)))
  expect_same_value(clusterApply(cl, 1:9, function(i) sample.int(1000L, 2L)))
  expect_same_value(clusterEvalQ(cl, .Random.seed))
  expect_same_value(clusterEvalQ(cl, RNGkind()))
  expect_same_value({
    set.seed(9, "L'Ecuyer-CMRG")
    clusterSetRNGStream(cl)
    clusterEvalQ(cl, rexp(2))
  })
  # Reversed and part clusters get streams by position.
  expect_same_value({
    clusterSetRNGStream(cl[c(3, 1)], 5)
    clusterCall(cl[c(1, 3)], rnorm, 1)
  })
})

test_that("parLapply and parLapplyLB", {
  expect_same_value(parLapply(cl, 1:10, function(i) i^2))
  expect_same_value(parLapply(cl, 1:2, sqrt))
  expect_same_value(parLapply(cl, list(a = 1, b = "x", c = NULL), identity))
  expect_same_value(parLapply(cl, c(x = 1, y = 2, z = 3, u = 4, v = 5), sqrt))
  expect_same_value(parLapply(cl, 1:10, function(i, p) i + p, p = 1))
  expect_same_value(parLapply(cl, 1:10, function(i) i, chunk.size = 2))
  expect_same_value(parLapply(cl, split(mtcars, mtcars$cyl), function(d) coef(lm(mpg ~ wt, d))))
  expect_same_value(parLapply(cl, list(), identity))
  expect_same_value(parLapply(cl, NULL, identity))
  expect_same_value(parLapply(cl, character(), identity))
  expect_same_value(parLapplyLB(cl, 1:10, function(i) i^2))
  expect_same_value(parLapplyLB(cl, 1:30, function(i) i, chunk.size = 4))
  expect_same_value(parLapplyLB(cl, c(x = 1, y = 2, z = 3), sqrt))
  expect_same_value(parLapplyLB(cl, list(), identity))
})

test_that("chunks are those of parallel", {
  set.seed(1)
  for (nx in c(0:40, 99:101, 1000, 2001, sample(1e5, 20))) {
    for (ncl in c(0:45, 100, 320, sample(2000, 5))) {
      ours <- rustcluster:::cutIndices(nx, ncl)
      if (!identical(ours, parallel::splitIndices(nx, ncl))) fail(sprintf("%d by %d", nx, ncl))
    }
  }
  succeed()
})

test_that("parSapply and parSapplyLB", {
  expect_same_value(parSapply(cl, 1:10, function(i) i^2))
  expect_same_value(parSapply(cl, letters, toupper))
  expect_same_value(parSapply(cl, letters, toupper, USE.NAMES = FALSE))
  expect_same_value(parSapply(cl, 1:5, function(i) c(i, i^2)))
  expect_same_value(parSapply(cl, 1:5, function(i) c(i, i^2), simplify = FALSE))
  expect_same_value(parSapply(cl, 1:3, function(i) diag(i, 2), simplify = "array"))
  expect_same_value(parSapply(cl, 1:5, seq_len))
  expect_same_value(parSapply(cl, c(a = 1, b = 2), sqrt))
  expect_same_value(parSapply(cl, character(), nchar))
  expect_same_value(parSapplyLB(cl, 1:10, function(i) i^2))
  expect_same_value(parSapplyLB(cl, letters, toupper))
  expect_same_value(parSapplyLB(cl, 1:10, function(i, p) i^p, p = 3, chunk.size = 3))
})

test_that("parApply, parRapply and parCapply", {
  m <- matrix(1:20, 4, dimnames = list(letters[1:4], LETTERS[1:5]))
  expect_same_value(parApply(cl, m, 1, sum), m = m)
  expect_same_value(parApply(cl, m, 2, range), m = m)
  expect_same_value(parApply(cl, m, c(1, 2), function(x) x + 1L), m = m)
  expect_same_value(parApply(cl, array(1:24, c(2, 3, 4)), 3, sum))
  expect_same_value(parApply(cl, m, 1, function(x, p) x * p, p = 2), m = m)
  expect_same_value(parRapply(cl, m, sum), m = m)
  expect_same_value(parRapply(cl, m, function(x) x), m = m)
  expect_same_value(parCapply(cl, m, sum), m = m)
  expect_same_value(parCapply(cl, m, range), m = m)
  expect_same_value(parRapply(cl, m, function(x, p) sum(x) * p, 3), m = m)
})

test_that("setDefaultCluster makes cl = NULL work", {
  on.exit(setDefaultCluster(NULL), add = TRUE, after = FALSE)
  expect_same_value({
    setDefaultCluster(cl)
    list(
      clusterCall(NULL, sum, 1, 2), clusterEvalQ(expr = 1 + 1),
      parLapply(X = 1:5, fun = sqrt), parSapply(X = 1:5, FUN = sqrt),
      clusterApply(x = 1:3, fun = identity), clusterApplyLB(x = 1:9, fun = identity),
      clusterMap(fun = function(x, y) x + y, x = 1:3, y = 1:3), clusterSplit(seq = 1:9)
    )
  })
  setDefaultCluster(NULL)
  expect_same_error(clusterCall(NULL, sum, 1))
})

test_that("results of all kinds arrive unchanged", {
  expect_same_value(parLapply(cl, 1:5, function(i) NULL))
  expect_same_value(clusterApply(cl, 1:5, function(i) if (i %% 2L) i))
  expect_same_value(clusterApplyLB(cl, 1:5, function(i) if (i %% 2L) i))
  expect_same_value(clusterCall(cl, function() invisible(7)))
  expect_same_value(clusterCall(cl, function() list(a = NULL, b = list())))
  expect_same_value(clusterCall(cl, function() mtcars))
  expect_same_value(clusterCall(cl, function() factor(c("u", "v"))))
  expect_same_value(clusterCall(cl, function() as.POSIXct(0, origin = "1970-01-01", tz = "UTC")))
  expect_same_value(clusterCall(cl, function() c(NA, NaN, Inf, -Inf, -0)))
  expect_same_value(clusterCall(cl, function() c(1+2i, NA)))
  expect_same_value(clusterCall(cl, function() as.raw(0:255)))
  expect_same_value(clusterCall(cl, function() quote(a + b)))
  expect_same_value(clusterCall(cl, function() y ~ x + z)[[1]][[2]])
  expect_same_value(clusterCall(cl, function() c("a\u00e9", NA, "", "\u4e2d")))
  expect_same_value(clusterCall(cl, function() 1:1000000))
  # A value that looks like parallel's own messages is a value.
  expect_same_value(clusterCall(cl, function() list(type = "DONE", value = 1, success = FALSE, tag = 3)))
  expect_same_value(clusterCall(cl, identity, list(type = "DONE")))
  expect_same_value(clusterCall(cl, function() try(log(-1), silent = TRUE)))
  # Bytes are kept, encodings too.
  latin1 <- "caf\xe9"
  Encoding(latin1) <- "latin1"
  got <- expect_same_value(clusterCall(cl, identity, x), x = latin1)
  expect_equal(Encoding(got[[1L]]), "latin1")
})

test_that("functions, environments, S4 objects and external pointers", {
  make <- function(k) function(x) x * k
  environment(make) <- globalenv()
  expect_same_value(clusterCall(cl, f, 7), f = make(6))
  expect_same_value(sapply(clusterCall(cl, function(k) function(x) x * k, 6), function(f) f(7)))
  expect_same_value(clusterCall(cl, identity, sum))
  expect_same_value(clusterCall(cl, identity, globalenv()))
  expect_same_value(clusterCall(cl, identity, baseenv()))
  expect_same_value(clusterCall(cl, identity, asNamespace("stats")))
  expect_same_value({
    e <- new.env()
    e$a <- 1:3
    e$self <- e
    back <- clusterCall(cl, identity, e)[[2]]
    list(back$a, identical(back$self, back), identical(back, e))
  })
  # S4: the class is known to the workers only through the object.
  methods::setClass("OracleTestS4", slots = c(a = "numeric"), where = globalenv())
  on.exit(methods::removeClass("OracleTestS4", where = globalenv()), add = TRUE, after = FALSE)
  s4 <- methods::new("OracleTestS4", a = 1)
  got <- expect_same_value(clusterCall(cl, identity, x), x = s4)
  expect_true(isVirtualClass("OracleTestS4") || isS4(got[[1L]]))
  expect_same_value(clusterCall(cl, function(x) x@a, x), x = s4)
  expect_same_value(clusterCall(cl, function() methods::getClass("numeric")@className))
  # An external pointer arrives as a null pointer, as with PSOCK.
  expect_same_value(sapply(
    clusterCall(cl, function(x) utils::capture.output(print(x)), p), identity
  ), p = methods::new("externalptr"))
  expect_same_value(sapply(clusterCall(cl, function() methods::new("externalptr")), typeof))
})

test_that("a function whose environment contains the cluster works", {
  # As in a script's function: the closure's frame holds `cl`.
  user <- eval(strip_srcref(quote(function(cl, p) {
    unlist(parLapply(cl, 1:6, function(i) i + p))
  })), globalenv())
  expect_equal(expect_same_value(user(cl, 10), user = user), 11:16)
  # And when it is the cluster itself that is sent.
  expect_same_value(clusterCall(cl, length, cl))
})

test_that("one failing node: the error is parallel's", {
  got <- expect_same_error(clusterApply(cl, 1:4, function(i) if (i == 3) stop("three") else i))
  expect_match(got$message, "one node produced an error: three", fixed = TRUE)
  expect_same_error(parLapply(cl, 1:8, function(i) if (i == 5) stop("five") else i))
  expect_same_error(clusterApplyLB(cl, 1:9, function(i) if (i == 9) stop("nine") else i))
  expect_same_error(clusterMap(cl, function(i) if (i == 2) stop("two"), 1:4, .scheduling = "dynamic"))
  expect_same_error(parSapply(cl, 1:4, function(i) if (i == 1) log("a")))
  expect_same_error(clusterCall(cl[2], function() stop()))
})

test_that("several failing nodes: counted, the first one's text", {
  got <- expect_same_error(clusterCall(cl, function() stop("all")))
  expect_match(got$message, "4 nodes produced errors; first error: all", fixed = TRUE)
  expect_same_error(clusterApply(cl, 1:6, function(i) if (i %% 2L) stop("odd ", i) else i))
  expect_same_error(clusterEvalQ(cl, noSuchFunction()))
  expect_same_error(clusterEvalQ(cl, noSuchVariable))
  expect_same_error(clusterCall(cl, "noSuchFunctionByName"))
  expect_same_error(clusterCall(cl, function() signalCondition(structure(
    class = c("mine", "error", "condition"), list(message = "of my own", call = NULL)
  ))))
  expect_same_error(clusterCall(cl, function() rlang_like <- stop(structure(
    class = c("mine", "error", "condition"), list(message = "of my own", call = NULL)
  ))))
  expect_same_error(clusterCall(cl, function() {
    f <- function(n) f(n + 1)
    f(1)
  }))
  # A clean call after all of these.
  expect_same_value(clusterCall(cl, function() "fine"))
})

test_that("errors with unusual texts", {
  expect_same_error(clusterCall(cl, function() stop("")))
  expect_same_error(clusterCall(cl, function() stop("two\nlines\n")))
  expect_same_error(clusterCall(cl, function() stop("50%s of %d%% \\ %n")))
  expect_same_error(clusterCall(cl, function() stop("\u00e9\u4e2d\U1F600")))
  expect_same_error(clusterCall(cl, function() stop(strrep("long ", 5000))))
})

test_that("warnings and output of a worker do not reach the head", {
  got <- expect_same_value(clusterCall(cl, function() {
    warning("on the worker")
    1
  }))
  expect_equal(got, rep(list(1), 4))
  expect_same_value(parSapply(cl, 1:5, function(i) as.integer("x")))
  expect_same_value(clusterCall(cl, function() {
    message("to nobody")
    print("to nobody")
    cat("to nobody")
    2
  }))
  # Turned into errors on the worker, they are errors.
  expect_same_error(clusterCall(cl, function() {
    old <- options(warn = 2)
    on.exit(options(old), add = TRUE, after = FALSE)
    warning("now an error")
  }))
})

test_that("large arguments and results", {
  big <- seq_len(2.5e6) + 0L
  expect_same_value(clusterCall(cl, length, x), x = big)
  expect_same_value(clusterCall(cl[1:2], function() seq_len(2.5e6) + 0))
  expect_same_value(clusterCall(cl[1:2], identity, x), x = big)
  expect_same_value(clusterApply(cl, c(1e3, 1e6, 1, 3e6), function(n) numeric(n)))
  expect_same_value(clusterCall(cl, nchar, strrep("x", 5e6)))
})

test_that("more tasks than nodes, fewer, and one node", {
  for (n in c(1L, 3L, 4L, 5L, 17L, 100L)) {
    expect_same_value(parLapply(cl, seq_len(k), function(i) -i), k = n)
    expect_same_value(clusterApply(cl, seq_len(k), function(i) -i), k = n)
    expect_same_value(clusterApplyLB(cl, seq_len(k), function(i) -i), k = n)
    expect_same_value(parSapplyLB(cl, seq_len(k), function(i) -i), k = n)
  }
  expect_same_value(parLapply(cl[1], 1:5, sqrt))
  expect_same_value(clusterApplyLB(cl[2], 1:5, sqrt))
})

test_that("tags come back with the answer they were given to", {
  expect_same_value({
    tags <- list(1L, "two", list(3), NULL)
    for (i in 1:4) parallel:::sendCall(cl[[i]], identity, list(i), tag = tags[[i]])
    answers <- lapply(cl, parallel:::recvData)
    lapply(answers, `[`, c("type", "value", "success", "tag"))
  })
  got <- expect_same_value({
    for (i in 1:4) parallel:::sendCall(cl[[i]], identity, list(i * 10), tag = letters[i])
    answers <- lapply(1:4, function(i) parallel:::recvOneResult(cl))
    answers[order(sapply(answers, `[[`, "node"))]
  })
  expect_equal(sapply(got, `[[`, "tag"), letters[1:4])
  expect_equal(sapply(got, `[[`, "node"), 1:4)
})

test_that("an answer says how long it took, as proc.time does", {
  expect_same_value({
    parallel:::sendCall(cl[[1]], Sys.sleep, list(0.2))
    time <- parallel:::recvData(cl[[1]])$time
    list(class(time), names(time), time[["elapsed"]] >= 0.19)
  })
})

test_that("results are visible or invisible as with PSOCK", {
  expect_same_value(clusterSetRNGStream(cl, 1))
  expect_same_value(clusterExport(cl, character()))
  expect_same_value(clusterEvalQ(cl, invisible(1)))
})

test_that("wrong use raises parallel's own errors", {
  expect_same_error(parLapply(cl, 1:3, "noSuchFunctionByName"))
  expect_same_error(clusterApply(cl, 1:3))
  expect_same_error(clusterCall(1:3, sum))
  expect_same_error(parApply(cl, 1:3, 1, sum))
})

test_that("snow's timing hooks get rank and times", {
  # What snow.time() would install: parallel keeps the hooks, not the verb.
  ns <- asNamespace("parallel")
  old <- get(".snowTimingData", ns)
  seen <- list(send = NULL, recv = NULL)
  hooks <- list(
    running = function() TRUE,
    enterSend = function(rank, start, end) seen$send <<- c(seen$send, rank),
    enterRecv = function(rank, start, end, time) seen$recv <<- rbind(seen$recv, c(rank, time))
  )
  set <- function(value) {
    unlockBinding(".snowTimingData", ns)
    assign(".snowTimingData", value, envir = ns)
    lockBinding(".snowTimingData", ns)
  }
  cl <- cluster_pair()$rust
  set(hooks)
  on.exit(set(old), add = TRUE, after = FALSE)
  parallel::clusterCall(cl, Sys.sleep, 0.05)
  set(old)
  expect_equal(seen$send, 1:4)
  expect_equal(seen$recv[, 1], 1:4)
  expect_true(all(seen$recv[, 2] >= 0.04))
})

test_that("no process is left", {
  stop_cluster_pairs()
  expect_no_leftovers()
})
