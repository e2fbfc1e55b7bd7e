# Every text that users read is pinned by a snapshot: here the errors about arguments, what to do about hosts, and
# what is printed. The texts of failures that Rust reports are in test-conditions.R.

watch_processes()

# The string constants of a message, with "<>" for what is computed.
pieces <- function(args) {
  piece <- function(x) {
    if (is.character(x)) return(x)
    if (is.call(x) && as.character(x[[1L]])[[1L]] %in% c("paste0", "paste")) return(pieces(as.list(x)[-1L]))
    if (is.call(x) && identical(x[[1L]], quote(`if`))) {
      return(paste0("{", paste(vapply(as.list(x)[-(1:2)], piece, ""), collapse = "|"), "}"))
    }
    "<>"
  }
  gsub("(<>)+", "<>", paste(unlist(lapply(unname(args), piece)), collapse = ""))
}

test_that("errors about arguments", {
  namespace <- asNamespace("rustcluster")
  texts <- function(x) {
    if (!is.call(x)) return(if (is.pairlist(x)) unlist(lapply(x, texts)))
    raises <- is.name(x[[1L]]) && as.character(x[[1L]]) %in% c("badArgument", "abort", "refuse")
    args <- as.list(x)[-1L]
    # The first one is the argument, or the class, except of refuse().
    first <- if (raises && !identical(x[[1L]], quote(refuse))) paste0(pieces(args[1L]), ": ")
    if (!is.null(first)) args <- args[-1L]
    own <- if (raises) paste0(first, pieces(args[!names2(args) %in% c("fields", "collapse")]))
    c(own, unlist(lapply(as.list(x), function(part) if (!missing(part)) texts(part))))
  }
  names2 <- function(x) if (is.null(names(x))) rep("", length(x)) else names(x)
  functions <- Filter(is.function, mget(ls(namespace, all.names = TRUE), namespace))
  functions <- functions[!names(functions) %in% c("badArgument", "abort")]
  found <- unlist(lapply(functions, function(f) texts(body(f))))
  expect_gt(length(found), 80L)
  expect_snapshot(cat(sort(unique(unname(found)), method = "radix"), sep = "\n"))
})

test_that("hosts with equal problems are one line of an error", {
  report <- data.frame(host = paste0("slurm-", 1:6), problem = c(
    paste0("no agent has connected within 8 s: its job 17_", 1:4, " is PENDING (Resources)"), "other", "other"
  ))
  text <- gsub("[\u2018\u2019]", "'", rustcluster:::failedHosts(report, 1:6))
  expect_identical(strsplit(text, "\n")[[1L]], c(
    "6 hosts failed",
    paste0("hosts 'slurm-1', 'slurm-2' and 2 others: no agent has connected within 8 s: its job 17_1 (and 3 others) ",
           "is PENDING (Resources)"),
    "hosts 'slurm-5' and 'slurm-6': other"
  ))
  # The names of the hosts are no difference.
  unknown <- data.frame(host = paste0("node", 1:5))
  unknown$problem <- paste0("ssh: Could not resolve hostname ", unknown$host)
  text <- gsub("[\u2018\u2019]", "'", rustcluster:::failedHosts(unknown, 1:5))
  expect_identical(text, paste0(
    "5 hosts failed\nhosts 'node1', 'node2', 'node3', 'node4' and 'node5': ssh: Could not resolve hostname node1"
  ))
  # All hosts are named before R cuts the message.
  many <- data.frame(host = paste0("node", 1:9), problem = strrep(1:9, 200))
  expect_match(rustcluster:::failedHosts(many, 1:9), "^9 hosts failed: node1, .*node9 [(]options[(]warning[.]length")
})

test_that("a hint after several lines of output is a line of its own", {
  handle <- list(agents = list(list(host = "n1", dial = 1L)), owner = 1L)
  lost <- function(reason) {
    conditionMessage(rustcluster:::failureCondition(list(
      kind = "worker_lost", rank = 1L, pid = 0L, reason = reason, replaced = FALSE, retry = 0, setbacks = 0L,
      restoring = FALSE, stalled = 0, index = 1L
    ), handle))
  }
  expect_match(lost("failed"), "failed; it is not replaced: ", fixed = TRUE)
  expect_match(lost("failed:\n  output"), "output\nit is not replaced: ", fixed = TRUE)
})

test_that("what to do about a host that failed", {
  problem <- function(stderr = "", status = NA, reason = "the agent's process ended", ..., stdout = "") {
    host <- list(host = "h1", user = "u", local = FALSE, ...)
    cat(rustcluster:::hostProblem(host, reason, stderr, stdout, status), "\n\n", sep = "")
  }
  here <- function(...) {
    cat(rustcluster:::hostProblem(list(host = "localhost", local = TRUE), ...), "\n\n", sep = "")
  }
  expect_snapshot({
    problem("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", 255L)
    problem("Host key verification failed.", 255L)
    problem("ssh: Could not resolve hostname h1: Name or service not known", 255L, port = 2222L)
    problem("ssh: connect to host h1 port 22: Connection refused", 255L)
    problem("ssh: connect to host h1 port 22: No route to host", 255L)
    problem("u@h1: Permission denied (publickey,password).", 255L)
    problem("sh: 1: exec: /x/Rscript: Permission denied", 126L, rscript = "/x/Rscript")
    problem("sh: 1: exec: Rscript: not found", 127L)
    problem("Error: there is no package called 'rustcluster'", 1L, port = 2222L)
    problem("", 0L)
    problem("", 0L, rscript = "/bin/true")
    problem("", 0L, rshcmd = c("/bin/true", "x"))
    problem("", 0L, rshcmd = "/bin/echo", stdout = "-o BatchMode=yes h1")
    problem("", 0L, stdout = "a shell's greeting")
    problem("Fatal error: cannot create 'R_TempDir'", 2L)
    problem(reason = "it cannot talk to rustcluster 0.0.9")
    problem(reason = "the agent could not be started: No such file or directory")
    problem("last\nwords", 3L, stdout = "said before")
    here("the agent could not be started: Permission denied", "", "")
    here("it cannot talk to rustcluster 0.0.9", "", "")
  })
})

test_that("errors and warnings of a start", {
  handle <- new.env()
  handle$report <- data.frame(host = c("h1", "h2"), problem = c("the host cannot be reached", NA))
  raised <- function(expr) {
    condition <- tryCatch(expr, condition = identity)
    cat(class(condition)[[1L]], ": ", conditionMessage(condition), "\n", sep = "")
  }
  agents <- list(list(start_method = "spawn"), list(start_method = "fork"))
  report <- data.frame(workers = c(100, 100), available = c(1e9, 1e9))
  gone <- list(c(kind = "worker_lost", reason = "was ended by signal 9", signal = "9", stderr = "words"), NULL)
  expect_snapshot({
    raised(rustcluster:::hostsFailed(handle, 1L, FALSE, TRUE))
    raised(rustcluster:::hostsFailed(handle, 1L, TRUE, TRUE))
    raised(rustcluster:::hostsFailed(handle, 1L, TRUE, FALSE))
    cat(rustcluster:::tooLittleMemory(agents, report), sep = "\n")
    cat(rustcluster:::workersProblem(gone, 1:2, "late"), "\n")
    cat(rustcluster:::workersProblem(list(c(kind = "stopped")), 1L, "not ready within 1 s"), "\n")
  })
})

test_that("errors of tasks and warnings at the end", {
  said <- function(condition) cat(class(condition)[[1L]], ": ", conditionMessage(condition), "\n", sep = "")
  handle <- new.env()
  handle$owner <- c(1L, 1L, 2L)
  handle$hosts <- c("h1", "h1", "h2")
  handle$stopTimeout <- 5
  late <- lapply(1:3, function(rank) list(kind = "stop_timeout", rank = rank))
  loss <- simpleCondition("worker 1 on host 'h1' exited with status 3")
  unread <- simpleCondition("no package called 'nosuch'")
  expect_snapshot({
    for (warning in rustcluster:::slowToEnd(late, handle)) said(warning)
    said(rustcluster:::quarantined(3L, list(loss, loss)))
    said(rustcluster:::quarantined(3L, list(loss), "element"))
    said(rustcluster:::callLost("the call", list(loss)))
    said(rustcluster:::elementFailed("no", 3L, vector("list", 4L)))
    said(rustcluster:::elementFailed("no", 3:5, vector("list", 3L)))
    said(rustcluster:::notRead(unread))
    said(rustcluster:::aborted(NULL))
  })
})

test_that("what is printed of clusters, nodes and calls", {
  skip_on_cran()
  mask <- function(x) gsub("[0-9]+[.][0-9] s", "<time> s", gsub("pid [0-9]+", "pid <pid>", x))
  cl <- local_cluster(2)
  other <- local_cluster(1)
  restored <- unserialize(serialize(cl, NULL))
  call <- clusterSubmit(cl, 6 * 7)
  call$value()
  failed <- clusterSubmit(cl, stop("no"))
  try(failed$value(), silent = TRUE)
  cancelled <- clusterSubmit(cl, Sys.sleep(60))
  cancelled$cancel()
  elements <- clusterLapplyAsync(cl, 1:4, sqrt)
  elements$value()
  expect_snapshot(transform = mask, {
    print(cl)
    print(cl[[1]])
    print(c(cl, other))
    print(restored)
    print(restored[[1]])
    print(call)
    print(failed)
    print(cancelled)
    print(elements)
  })
  running <- clusterSubmit(cl, Sys.sleep(60))
  expect_true(wait_until(function() running$status() == "running"))
  expect_snapshot(print(running), transform = function(x) sub("worker [12]", "worker <rank>", mask(x)))
  stopCluster(other)
  expect_snapshot(transform = mask, {
    print(other)
    print(other[[1]])
    print(c(cl, other))
  })
})

test_that("what is printed of hosts", {
  hosts <- data.frame(
    host = c("node1", "node2"), user = c(NA, "u"), workers = c(2L, 64L), up = c(2L, 0L), memory = c(7.6e9, NA),
    available = c(512e6, NA), problem = c(NA, "the host cannot be reached")
  )
  rows <- data.frame(
    host = c("node1", "node2"), workers = c(2L, 64L), busy = c(1L, 0L), done = c(1234567, 0), seconds = c(61, 7300),
    memory = c(7.6e9, NA), bytes_in = c(1e3, 1e6), bytes_out = c(1e9, 0), losses = 0:1
  )
  expect_snapshot({
    print(structure(hosts, class = c("rustcluster_hosts", "data.frame")))
    print(structure(rows, class = c("rustcluster_summary", "data.frame")))
  })
})

test_that("no process is left", {
  skip_unless_proc()
  expect_no_leftovers()
})
