# A session that was saved, ended and restored in a new process, as RStudio does with one that it suspends.

skip_on_cran()
watch_processes()

test_that("a cluster in a restored session is an error with the reason and a remedy", {
  skip_unless_proc()
  workspace <- tempfile(fileext = ".RData")
  first <- start_child({
    cl <- makeRustCluster(2)
    half <- cl[2]
    stopped <- makeRustCluster(1)
    stopCluster(stopped)
    say(paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
    save.image(workspace)
  }, values = list(workspace = workspace))
  expect_child_ends_well(first)
  expect_gone(as.integer(strsplit(child_lines(first)[[1]], " ")[[1]]))

  second <- start_child({
    # Which has one of its own.
    here <- dir
    load(workspace)
    dir <- here
    tell <- function(name, expr) {
      error <- tryCatch({
        expr
        NULL
      }, error = identity)
      if (is.null(error)) return(say(name, "no error"))
      say(name, class(error)[[1]], grepl("create a new one with makeRustCluster", conditionMessage(error)))
    }
    tell("clusterCall", clusterCall(cl, identity, 1))
    tell("theirs", parallel::clusterCall(cl, identity, 1))
    tell("clusterEvalQ", clusterEvalQ(cl, 1))
    tell("clusterExport", clusterExport(cl, "workspace"))
    tell("clusterApply", clusterApply(half, 1:3, sqrt))
    tell("clusterApplyLB", clusterApplyLB(cl, 1:3, sqrt))
    tell("clusterMap", clusterMap(cl, sqrt, 1:3))
    tell("parLapply", parLapply(cl, 1:3, sqrt))
    tell("parLapplyLB", parLapplyLB(cl, 1:3, sqrt))
    tell("parSapply", parallel::parSapply(cl, 1:3, sqrt))
    tell("clusterLapply", clusterLapply(cl, 1:3, sqrt))
    tell("clusterSetRNGStream", clusterSetRNGStream(cl, 1))
    tell("clusterHosts", clusterHosts(cl))
    tell("clusterPids", clusterPids(cl))
    tell("agentPids", agentPids(cl))
    tell("clusterAlive", clusterAlive(cl))
    tell("summary", summary(cl))
    tell("stopCluster", stopCluster(cl))
    tell("stopCluster of a part", stopCluster(half))
    tell("registerDoRustCluster", registerDoRustCluster(cl))
    show <- function(x) writeLines(x, file.path(dir, "shown"))
    show(c(
      capture.output(print(cl)), capture.output(print(cl[[1]])), capture.output(str(cl)),
      capture.output(str(cl[[2]])), format(half), capture.output(print(stopped)), capture.output(str(list(cl = cl)))
    ))
    cl <- makeRustCluster(2)
    say("new", sum(unlist(clusterCall(cl, identity, 1))))
    stopCluster(cl)
  }, values = list(workspace = workspace))
  expect_child_ends_well(second)
  said <- child_lines(second)
  expect_length(said, 21)
  expect_match(said[1:20], "rustcluster_restored TRUE$")
  expect_identical(said[[21]], "new 2")
  shown <- child_read(second, "shown")
  expect_match(shown[[1]], "^socket cluster with 2 nodes on host .localhost. that was saved and loaded")
  expect_identical(shown[[2]], "Create a new one with makeRustCluster()")
  expect_match(shown[3:6], "saved and loaded")
  expect_match(shown[[7]], "that has been stopped$")
  expect_match(shown[[9]], "saved and loaded")
})

test_that("no process is left", {
  expect_no_leftovers()
})
