# Packages that take a cluster give with one of ours what they give with PSOCK.

skip_on_cran()
watch_processes()

# The results of `run`, called with a PSOCK cluster and with one of ours, in the same state.
expect_same_client <- function(run) {
  pair <- cluster_pair(2L)
  results <- lapply(pair[c("psock", "ours")], function(cl) {
    parallel::clusterSetRNGStream(cl, 7)
    set.seed(1)
    run(cl)
  })
  expect_false(is.null(results$ours))
  expect_equal(results$ours, results$psock)
  invisible(results$ours)
}

test_that("pbapply", {
  skip_if_not_installed("pbapply")
  before <- pbapply::pboptions(type = "none")
  on.exit(pbapply::pboptions(before), add = TRUE, after = FALSE)
  expect_same_client(function(cl) list(
    pbapply::pblapply(1:10, function(i) i^2, cl = cl),
    pbapply::pbsapply(c(a = 1, b = 2, c = 3), function(i) stats::rnorm(1, i), cl = cl),
    pbapply::pbreplicate(4, stats::runif(1), cl = cl),
    pbapply::pbapply(matrix(1:6, 2), 1, sum, cl = cl)
  ))
  expect_same_client(function(cl) caught(pbapply::pblapply(1:3, function(i) stop("no ", i), cl = cl))$message)
  pbapply::pboptions(type = "txt")
  expect_output(pbapply::pblapply(1:4, sqrt, cl = cluster_pair(2L)$ours), "100%")
})

test_that("boot", {
  skip_unless_long()
  skip_if_not_installed("boot")
  ratio <- function(d, w) sum(d$x * w) / sum(d$u * w)
  city <- data.frame(u = c(138, 93, 61, 179, 48), x = c(143, 104, 69, 260, 75))
  got <- expect_same_client(function(cl) {
    boot::boot(city, ratio, R = 99, stype = "w", parallel = "snow", ncpus = 2, cl = cl)[c("t0", "t", "R")]
  })
  expect_equal(nrow(got$t), 99)
  simulate <- function(data, mle) data[sample.int(nrow(data), replace = TRUE), ]
  expect_same_client(function(cl) {
    boot::boot(city, function(d) mean(d$x), R = 50, sim = "parametric", ran.gen = simulate,
               parallel = "snow", ncpus = 2, cl = cl)$t
  })
})

test_that("lme4", {
  skip_unless_long()
  skip_if_not_installed("lme4")
  model <- lme4::lmer(Reaction ~ Days + (1 | Subject), lme4::sleepstudy)
  got <- expect_same_client(function(cl) {
    parallel::clusterEvalQ(cl, library(lme4))
    lme4::bootMer(model, lme4::fixef, nsim = 8, seed = 3, parallel = "snow", ncpus = 2, cl = cl)$t
  })
  expect_equal(dim(got), c(8, 2))
  expect_same_client(function(cl) {
    profiled <- as.data.frame(stats::profile(model, which = 1:2, parallel = "snow", ncpus = 2, cl = cl))
    # It knows its frames, in which the cluster is.
    lapply(seq_along(profiled), function(j) as.vector(profiled[[j]]))
  })
})

test_that("pbkrtest", {
  skip_unless_long()
  skip_if_not_installed("pbkrtest")
  large <- lme4::lmer(Reaction ~ Days + (1 | Subject), lme4::sleepstudy, REML = FALSE)
  small <- lme4::lmer(Reaction ~ 1 + (1 | Subject), lme4::sleepstudy, REML = FALSE)
  expect_same_client(function(cl) {
    as.numeric(pbkrtest::PBrefdist(large, small, nsim = 8, seed = 5, cl = cl))
  })
})

test_that("caret, with doParallel and with registerDoRustCluster()", {
  skip_unless_long()
  for (package in c("caret", "doParallel")) skip_if_not_installed(package)
  on.exit(foreach::registerDoSEQ(), add = TRUE, after = FALSE)
  # Its models are found where it is attached.
  suppressPackageStartupMessages(library(caret))
  pair <- cluster_pair(2L)
  train <- function() {
    set.seed(4)
    fit <- caret::train(
      Species ~ ., datasets::iris, method = "knn", tuneGrid = data.frame(k = c(3, 5, 9)),
      trControl = caret::trainControl(method = "repeatedcv", number = 4, repeats = 2)
    )
    list(fit$results, fit$resample, fit$bestTune)
  }
  doParallel::registerDoParallel(pair$psock)
  want <- train()
  doParallel::registerDoParallel(pair$rust)
  expect_equal(train(), want)
  registerDoRustCluster(pair$ours)
  expect_equal(train(), want)
})

test_that("mgcv", {
  skip_unless_long()
  skip_if_not_installed("mgcv")
  set.seed(2)
  data <- data.frame(x = stats::runif(2000), z = stats::runif(2000))
  data$y <- sin(6 * data$x) + data$z^2 + stats::rnorm(2000, sd = 0.1)
  # It knows s() by name.
  s <- mgcv::s
  got <- expect_same_client(function(cl) {
    fit <- mgcv::bam(y ~ s(x) + s(z, k = 5), data = data, cluster = cl, chunk.size = 300)
    list(stats::coef(fit), fit$sp, stats::predict(fit, data[1:5, ], cluster = cl))
  })
  expect_length(got[[1]], 14)
})

test_that("vegan", {
  skip_unless_long()
  skip_if_not_installed("vegan")
  utils::data("dune", "dune.env", package = "vegan", envir = environment())
  got <- expect_same_client(function(cl) {
    as.data.frame(vegan::adonis2(dune ~ Management, dune.env, permutations = 59, parallel = cl))
  })
  expect_equal(nrow(got), 3)
  expect_same_client(function(cl) {
    vegan::permutest(vegan::rda(dune ~ A1, dune.env), permutations = 59, parallel = cl)$F.perm
  })
})

test_that("metafor", {
  skip_unless_long()
  skip_if_not_installed("metafor")
  fit <- metafor::rma(yi = c(0.1, 0.5, -0.2, 0.7, 0.3, 1.1), vi = c(0.05, 0.1, 0.04, 0.2, 0.1, 0.15))
  got <- expect_same_client(function(cl) {
    stats::profile(fit, steps = 6, parallel = "snow", ncpus = 2, cl = cl, plot = FALSE, progbar = FALSE)[c("tau2", "ll")]
  })
  expect_length(got$ll, 6)
})

test_that("DEoptim, with a cluster and with foreach", {
  skip_unless_long()
  skip_if_not_installed("DEoptim")
  rosenbrock <- function(x) 100 * (x[[2]] - x[[1]]^2)^2 + (1 - x[[1]])^2
  minimum <- function(...) {
    set.seed(9)
    control <- DEoptim::DEoptim.control(itermax = 5, NP = 20, trace = FALSE, ...)
    DEoptim::DEoptim(rosenbrock, c(-2, -2), c(2, 2), control)$optim[c("bestmem", "bestval", "nfeval")]
  }
  want <- expect_same_client(function(cl) minimum(cluster = cl))
  skip_if_not_installed("foreach")
  registerDoRustCluster(cluster_pair(2L)$ours)
  on.exit(foreach::registerDoSEQ(), add = TRUE, after = FALSE)
  expect_equal(minimum(parallelType = "foreach"), want)
})

test_that("parallelly, with a cluster and with nodes beside those of its own clusters", {
  skip_unless_long()
  skip_unless_proc()
  skip_if_not_installed("parallelly")
  cl <- local_cluster(2)
  theirs <- parallelly::makeClusterPSOCK(1, autoStop = TRUE)
  both <- list(c(cl, theirs), c(theirs, cl), parallelly::as.cluster(c(cl, theirs)))
  for (nodes in both) {
    expect_s3_class(nodes, "cluster", exact = TRUE)
    expect_identical(parallelly::isLocalhostNode(nodes), rep(TRUE, 3))
    expect_identical(clusterApplyLB(nodes, 1:9, identity), as.list(1:9))
    expect_output(print(nodes), "node of a socket cluster on host")
  }
  expect_identical(parallelly::as.cluster(cl)[1:2], cl)
  # Nodes have no R connection.
  expect_null(cl[[1]]$con)
  expect_error(parallelly::isConnectionValid(cl[[1]]$con), "connection")
  expect_identical(clusterApply(local_cluster(parallelly::availableWorkers()[1]), 1, identity), list(1))
  # Workers are processes of their own, with all functions of parallelly.
  seen <- clusterEvalQ(cl, list(parallelly::isForkedChild(), parallelly::supportsMulticore()))
  expect_identical(seen, parallel::clusterEvalQ(theirs, list(parallelly::isForkedChild(), TRUE))[c(1, 1)])
  skip_if_not(exists("killNode", asNamespace("parallelly")), "this parallelly has fewer functions")
  expect_identical(parallelly::isNodeAlive(both[[1]]), rep(TRUE, 3))
  pid <- clusterPids(cl)[[1]]
  expect_identical(parallelly::killNode(cl[1]), TRUE)
  expect_gone(pid)
  expect_warning(clusterCall(cl, identity, 1), "is being replaced")
  expect_identical(parallelly::isNodeAlive(cl), c(TRUE, TRUE))
  stopCluster(cl)
  expect_identical(parallelly::isNodeAlive(cl), c(FALSE, FALSE))
  expect_identical(parallelly::killNode(cl), c(FALSE, FALSE))
})

test_that("a node of a stopped worker is replaced by cloneNode() of parallelly", {
  skip_unless_long()
  skip_unless_proc()
  # Earlier versions of parallelly have no such function.
  clone <- function(cl) structure(lapply(cl, rustcluster:::cloneNode.RustNode), class = class(cl))
  if (requireNamespace("parallelly", quietly = TRUE)) {
    clone <- get0("cloneNode", asNamespace("parallelly"), inherits = FALSE, ifnotfound = clone)
  }
  cl <- local_cluster(2)
  x <- 5
  clusterExport(cl, "x", environment())
  stopCluster(cl[2])
  cl[2] <- clone(cl[2])
  note_processes(cl)
  expect_false(anyNA(clusterPids(cl)))
  expect_identical(clusterEvalQ(cl, x), list(5, 5))
  expect_identical(parSapply(cl, 1:6, function(i) i * 2), (1:6) * 2)
  pids <- c(clusterPids(cl), agentPids(cl))
  stopCluster(cl)
  expect_gone(pids)
  expect_rust_error(caught(clone(cl)), "stopped")
  launched <- local_cluster(commandLauncher("env"))
  expect_rust_error(caught(clone(launched)), "bad_argument")
})

test_that("no process is left", {
  stop_cluster_pairs()
  expect_no_leftovers()
})
