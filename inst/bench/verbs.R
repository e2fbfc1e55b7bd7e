# Checks whether each of parallel's verbs returns the right answer on a cluster of any size. The expected
# answers are computed here, because a PSOCK cluster cannot have 1,000 workers.

# Returns a function as in a script. A function that was made in a verb's frame would be sent with that frame,
# and so with the cluster, to every worker: with 1,000 workers, a list of 1,000 nodes would be sent a thousand
# times.
global <- function(f) {
  environment(f) <- globalenv()
  f
}

verbs <- list(
  clusterCall = function(cl) {
    sums <- parallel::clusterCall(cl, global(function(a, b) a + b), 1, b = 2)
    same(sums, rep(list(3), length(cl)))
  },
  clusterEvalQ = function(cl) {
    same(parallel::clusterEvalQ(cl, 6 * 7), rep(list(42), length(cl)))
  },
  clusterApply = function(cl) {
    x <- seq_len(2L * length(cl) + 3L)
    same(parallel::clusterApply(cl, x, global(function(i) i^2)), lapply(x, function(i) i^2))
  },
  clusterApplyLB = function(cl) {
    x <- seq_len(2L * length(cl) + 3L)
    same(parallel::clusterApplyLB(cl, x, global(function(i) -i)), lapply(x, function(i) -i))
  },
  clusterMap = function(cl) {
    x <- stats::setNames(1:50, paste0("n", 1:50))
    same(parallel::clusterMap(cl, global(function(a, b, k) a * b + k), x, 50:1,
                              MoreArgs = list(k = 1)),
         Map(function(a, b) a * b + 1, x, 50:1))
  },
  clusterExport = function(cl) {
    here <- new.env()
    here$bench_value <- c(a = 1, b = NA)
    parallel::clusterExport(cl, "bench_value", here)
    answers <- parallel::clusterEvalQ(cl, {
      value <- bench_value
      rm(bench_value, envir = globalenv())
      value
    })
    same(answers, rep(list(here$bench_value), length(cl)))
  },
  clusterSplit = function(cl) {
    x <- seq_len(3L * length(cl) + 1L)
    parts <- parallel::clusterSplit(cl, x)
    same(parts, lapply(parallel::splitIndices(length(x), length(cl)), function(i) x[i]))
  },
  clusterSetRNGStream = function(cl) {
    parallel::clusterSetRNGStream(cl, 42L)
    answers <- parallel::clusterEvalQ(cl, stats::runif(2))
    same(answers, streams(length(cl), 42L))
  },
  parLapply = function(cl) {
    x <- stats::setNames(as.list(1:2500), paste0("n", 1:2500))
    same(parallel::parLapply(cl, x, sqrt), lapply(x, sqrt))
  },
  parLapplyLB = function(cl) {
    x <- as.list(1:2500)
    same(parallel::parLapplyLB(cl, x, sqrt), lapply(x, sqrt))
  },
  parSapply = function(cl) {
    x <- sprintf("w%04d", 1:1500)
    same(parallel::parSapply(cl, x, nchar), sapply(x, nchar))
  },
  parSapplyLB = function(cl) {
    both <- global(function(i) c(i, -i))
    same(parallel::parSapplyLB(cl, 1:1500, both), sapply(1:1500, both))
  },
  parApply = function(cl) {
    m <- matrix(as.numeric(1:6000), 1500L, dimnames = list(NULL, letters[1:4]))
    same(parallel::parApply(cl, m, 1L, rev), apply(m, 1L, rev))
  },
  parRapply = function(cl) {
    m <- matrix(as.numeric(1:6000), 1500L)
    same(unname(parallel::parRapply(cl, m, sum)), rowSums(m))
  },
  parCapply = function(cl) {
    m <- matrix(as.numeric(1:6000), 4L)
    same(unname(parallel::parCapply(cl, m, sum)), colSums(m))
  },
  `an error` = function(cl) {
    message <- tryCatch({
      parallel::clusterCall(cl, global(function() stop("100% wrong")))
      "no error"
    }, error = conditionMessage)
    same(message, if (length(cl) == 1L) "one node produced an error: 100% wrong"
                  else sprintf("%d nodes produced errors; first error: 100%% wrong", length(cl)))
  },
  subsets = function(cl) {
    pids <- unlist(parallel::clusterCall(cl, Sys.getpid))
    last <- cl[length(cl)]
    same(unlist(parallel::clusterCall(rev(cl), Sys.getpid)), rev(pids)) &&
      same(unlist(parallel::clusterCall(last, Sys.getpid)), pids[length(pids)])
  },
  setDefaultCluster = function(cl) {
    parallel::setDefaultCluster(cl)
    on.exit(parallel::setDefaultCluster(NULL))
    same(parallel::parLapply(X = 1:10, fun = sqrt), lapply(1:10, sqrt))
  }
)

same <- function(answer, expected) isTRUE(all.equal(answer, expected, tolerance = 0))

# Returns the first two numbers of each of n streams, as clusterSetRNGStream() sets them.
streams <- function(n, seed) {
  before <- RNGkind()
  on.exit(RNGkind(before[1L], before[2L], before[3L]))
  old <- globalenv()$.Random.seed
  on.exit(if (is.null(old)) rm(.Random.seed, envir = globalenv())
          else assign(".Random.seed", old, globalenv()), add = TRUE)
  RNGkind("L'Ecuyer-CMRG")
  set.seed(seed)
  state <- globalenv()$.Random.seed
  answers <- vector("list", n)
  for (i in seq_len(n)) {
    assign(".Random.seed", state, globalenv())
    answers[[i]] <- stats::runif(2)
    state <- parallel::nextRNGStream(state)
  }
  answers
}

# Returns the verbs with a wrong answer, or without an answer for two minutes, and what went wrong.
wrong_verbs <- function(cl) {
  on.exit(setTimeLimit())
  wrong <- lapply(verbs, function(verb) {
    setTimeLimit(elapsed = 120)
    tryCatch(if (isTRUE(verb(cl))) NULL else "another answer", error = conditionMessage)
  })
  Filter(Negate(is.null), wrong)
}
