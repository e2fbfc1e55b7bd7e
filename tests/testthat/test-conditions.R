# The registry of condition classes, and the texts of those that Rust reports.

test_that("the registry contains exactly the condition classes that the code raises", {
  registry <- rustcluster:::conditionClasses
  expect_named(registry, c("error", "warning", "message"))
  namespace <- asNamespace("rustcluster")
  functions <- Filter(is.function, mget(ls(namespace, all.names = TRUE), namespace))
  # The kind is the first argument.
  made <- function(x) {
    if (!is.call(x)) return(NULL)
    kind <- if (length(x) > 1L && is.character(x[[2L]])) x[[2L]]
    own <- if (is.name(x[[1L]]) && as.character(x[[1L]]) %in% c("rustclusterCondition", "abort")) kind
    c(own, unlist(lapply(as.list(x), made)))
  }
  kinds <- unique(unlist(lapply(functions, function(f) made(body(f)))))
  expect_true(all(kinds %in% unlist(lapply(registry, names))))
  # Those of Rust, for which there are texts.
  texts <- body(rustcluster:::failureCondition)
  switches <- Filter(function(x) is.call(x) && identical(x[[1L]], quote(`<-`)) && identical(x[[2L]], quote(message)),
                     as.list(texts))
  of_rust <- setdiff(names(switches[[1L]][[3L]]), "")
  expect_true(all(of_rust %in% unlist(lapply(registry, names))))
  # Of a class that is made with a variable for its name, there is nothing to be found here.
  expect_setequal(setdiff(unlist(lapply(registry, names)), c(kinds, of_rust)), "agent_failed")
  expect_error(rustcluster:::rustclusterCondition("unheard_of", "text"), "conditionClasses")
})

test_that("the help page lists every condition class", {
  lines <- rustcluster:::conditionsHelp()
  for (class in unlist(lapply(rustcluster:::conditionClasses, names))) {
    expect_true(any(grepl(paste0("`rustcluster_", class, "`"), lines, fixed = TRUE)))
  }
})

test_that("messages of failures", {
  cl <- local_cluster(2, timeout = 60)
  handle <- cl[[1L]][["handle"]]
  said <- function(kind, ..., type = "error") {
    failure <- do.call(rustcluster:::rustFailure, c(list(kind = kind), ...))
    cat(conditionMessage(rustcluster:::failureCondition(failure, handle, type)), "\n")
  }
  worker <- list(rank = 2L, pid = 4711L, setbacks = 1L, restoring = FALSE, stalled = 0, oom = FALSE, retry = 0)
  expect_snapshot({
    said("worker_lost", worker, reason = "was ended by signal 9", signal = 9L, replaced = TRUE)
    task <- c(worker, reason = "exited with status 1", task = 7, index = 3L)
    said("worker_lost", task, replaced = TRUE, again = TRUE)
    said("worker_lost", task, replaced = FALSE, again = FALSE)
    said("worker_lost", task, replaced = TRUE, again = FALSE)
    said("worker_lost", task, tasks = "elements 3 to 5", replaced = TRUE, again = TRUE)
    said("worker_replaced", rank = 2L, pid = 4711L, reason = "its task had exceeded its time limit", type = "warning")
    said("left_behind", agent = 1L, rank = 2L, pid = 4711L, command = "sleep 60", type = "warning")
    said("worker_back", rank = 2L, type = "message")
    said("host_back", agent = 1L, type = "message")
    said("state_not_kept", type = "warning")
    said("timeout", rank = 1L, index = 3L, limit = 2)
    said("timeout", rank = 1L, tasks = "elements 3 to 5")
    said("stopped")
    said("stopped", rank = 2L)
    said("restored")
    said("forked")
    said("busy")
    said("no_task")
    said("limits", what = "file descriptors", needed = 5000, available = 1024, reason = "increase `ulimit -n`")
    said("bad_argument", argument = "spec", reason = "is wrong")
  })
})

test_that("a failure has typed fields, and nothing else is taken for one", {
  cl <- local_cluster(1)
  failure <- rustcluster:::hub_send(cl[[1L]]$handle$pointer, 7L, 0, list(), NULL)
  expect_true(rustcluster:::isFailure(failure))
  expect_identical(failure[["kind"]], "bad_argument")
  expect_identical(failure[["argument"]], "node")
  expect_false(rustcluster:::isFailure(list(kind = "stopped")))
  expect_false(rustcluster:::isFailure("stopped"))
  expect_false(rustcluster:::isFailure(factor("stopped")))
})

test_that("the fields of a loss have the types that are documented", {
  cl <- local_cluster(1, retries = 0)
  pid <- clusterPids(cl)
  loss <- caught(clusterCall(cl, function() {
    tools::pskill(Sys.getpid(), 9)
    Sys.sleep(30)
  }))
  expect_s3_class(loss, "rustcluster_worker_lost")
  expect_identical(loss[c("rank", "pid", "signal", "index")], list(rank = 1L, pid = pid, signal = 9L, index = 1L))
  expect_identical(loss[c("oom", "replaced")], list(oom = FALSE, replaced = TRUE))
  expect_type(loss$memory_available, "double")
  expect_identical(loss$stderr, "")
  expect_false(any(c("status", "retry", "setbacks", "task", "kind") %in% names(loss)))
})
