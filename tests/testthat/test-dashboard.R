# clusterDashboard() and clusterTop(): the page's server, from this process and, while R is busy, from another one.

skip_on_cran()
watch_processes()

# Asks for a path below the address. Returns the status, the headers and the body. A function of base R alone, which
# other processes run, too. `host`: the Host header.
http_get <- function(address, path = "", host = NULL, method = "GET") {
  parts <- regmatches(address, regexec("^http://([^/]*):([0-9]+)(/.*)$", address))[[1L]]
  connection <- socketConnection(parts[[2L]], as.integer(parts[[3L]]), open = "r+b", blocking = TRUE, timeout = 60)
  on.exit(close(connection), add = TRUE, after = FALSE)
  if (is.null(host)) host <- paste0(parts[[2L]], ":", parts[[3L]])
  target <- if (startsWith(path, "/")) path else paste0(parts[[4L]], path)
  request <- c(paste(method, target, "HTTP/1.1"), if (nzchar(host)) paste("Host:", host), "", "")
  writeBin(charToRaw(paste(request, collapse = "\r\n")), connection)
  lines <- readLines(connection, warn = FALSE, encoding = "UTF-8")
  end <- match("", lines)
  list(
    status = as.integer(substr(lines[[1L]], 10, 12)), headers = lines[seq_len(end)][-1L],
    body = paste(lines[-seq_len(end)], collapse = "\n")
  )
}

figures_of <- function(address, query = "") http_get(address, paste0("figures?", query))$body

# The whole number of this name in the figures, at its first place.
figure <- function(body, name) as.numeric(sub(paste0(".*?\"", name, "\":([0-9.]+).*"), "\\1", body, perl = TRUE))

is_listening <- function(address) {
  parts <- regmatches(address, regexec("^http://([^/]*):([0-9]+)/", address))[[1L]]
  connection <- tryCatch(
    suppressWarnings(socketConnection(parts[[2L]], as.integer(parts[[3L]]), open = "r+b", timeout = 5)),
    error = function(e) NULL
  )
  if (is.null(connection)) return(FALSE)
  close(connection)
  TRUE
}

test_that("the address is random, works on this machine only, and stays the same", {
  cl <- local_cluster(2)
  address <- expect_visible(clusterDashboard(cl, browse = FALSE))
  expect_match(address, "^http://127[.]0[.]0[.]1:[0-9]+/[0-9a-f]{32}/$")
  expect_identical(clusterDashboard(cl[1], browse = FALSE), address)
  other <- local_cluster(1)
  expect_false(basename(clusterDashboard(other, browse = FALSE)) == basename(address))
  page <- http_get(address)
  expect_identical(page$status, 200L)
  expect_match(page$body, "<title>rustcluster</title>", fixed = TRUE)
  expect_match(page$headers, "^Content-Security-Policy: default-src 'none'; script-src 'nonce-[0-9a-f]+'", all = FALSE)
  # The page refers to nothing outside.
  expect_false(grepl("(src|href)=\"(http|//|/)", page$body))
  expect_false(grepl("innerHTML|insertAdjacentHTML|document.write|eval\\(", page$body))
})

test_that("requests without the token, or for another host, are refused", {
  cl <- local_cluster(1)
  address <- clusterDashboard(cl, browse = FALSE)
  for (path in c("/", "/figures", "/00000000000000000000000000000000/", "/favicon.ico")) {
    expect_identical(http_get(address, path)$status, 403L)
  }
  for (host in c("evil.example", "evil.example:80", "10.1.2.3", "")) {
    expect_identical(http_get(address, host = host)$status, 403L)
    expect_identical(http_get(address, "figures", host = host)$status, 403L)
  }
  for (host in c("localhost", "127.0.0.1:8080", "[::1]")) expect_identical(http_get(address, host = host)$status, 200L)
  expect_identical(http_get(address, "other")$status, 404L)
  expect_identical(http_get(address, method = "POST")$status, 405L)
  expect_identical(http_get(address, method = "HEAD")[c("status", "body")], list(status = 200L, body = ""))
  expect_match(http_get(address, "/")$body, "clusterDashboard", fixed = TRUE)
})

test_that("figures are live while R is busy", {
  cl <- local_cluster(2)
  address <- clusterDashboard(cl, browse = FALSE)
  child <- start_child({
    repeat {
      body <- http_get(address, "figures?first=0&step=100&rank=1")$body
      if (grepl("\"done\":[1-9][0-9]*,\"failed\":0,\"seconds\":[0-9.]+,\"ended\":false", body)) break
      Sys.sleep(0.02)
    }
    say("body", body)
  }, list(http_get = http_get, address = address), attach = FALSE)
  file <- tempfile()
  # The call goes on until the child has seen it.
  work <- function(i, file) if (!file.exists(file)) Sys.sleep(0.02)
  clusterLapply(cl, 1:1000, work, file, .onResult = function(i, x) {
    if (!is.null(child_said(child, "body"))) file.create(file)
  })
  body <- child_wait_for(child, "body")
  expect_match(body, "\"states\":\"[bi]{2}\"")
  expect_match(body, "\"noun\":\"element\",\"tasks\":1000,", fixed = TRUE)
  expect_match(body, "\"lanes\":\\[\"[0-8t]+\",\"[0-8t]+\"\\]")
  expect_match(body, "\"worker\":{\"rank\":1,\"host\":0,\"state\":\"", fixed = TRUE)
  expect_match(body, paste0("\"pid\":", clusterPids(cl)[[1L]]), fixed = TRUE)
  body <- figures_of(address)
  expect_match(body, "\"done\":1000,\"failed\":0,\"seconds\":[0-9.]+,\"ended\":true")
  expect_no_match(body, "\"lanes\"")
})

test_that("elements of chunks count while a page is open", {
  cl <- local_cluster(2)
  address <- clusterDashboard(cl, browse = FALSE)
  child <- start_child({
    done <- "\"noun\":\"element\",\"tasks\":400,\"done\":[1-9][0-9]*,\"failed\":0,\"seconds\":[0-9.]+,\"ended\":false"
    repeat {
      body <- http_get(address, "figures")$body
      say("watches")
      if (grepl(done, body)) break
      Sys.sleep(0.05)
    }
    say("body", body)
  }, list(http_get = http_get, address = address), attach = FALSE)
  said <- file.path(child$dir, "said")
  child_wait_for(child, "watches")
  # Each chunk goes on until the child has seen it.
  work <- function(i, said) {
    if (any(startsWith(readLines(said, warn = FALSE), "body"))) return(i)
    Sys.sleep(0.05)
    i
  }
  environment(work) <- globalenv()
  long <- function(i, said) {
    while (i %% 200 == 0 && !any(startsWith(readLines(said, warn = FALSE), "body"))) Sys.sleep(0.05)
    work(i, said)
  }
  environment(long) <- list2env(list(work = work), parent = globalenv())
  expect_identical(parallel::parLapply(cl, 1:400, long, said), as.list(1:400))
  child_wait_for(child, "body")
  expect_match(figures_of(address), "\"noun\":\"element\",\"tasks\":400,\"done\":400,")
  # What cannot be counted is a chunk.
  expect_identical(parRapply(cl, matrix(1:6, 3), sum), c(5L, 7L, 9L))
  expect_match(figures_of(address), "\"noun\":\"task\",\"tasks\":2,\"done\":2,")
})

test_that("a worker failure is shown at once, with its output", {
  cl <- local_cluster(2)
  address <- clusterDashboard(cl, browse = FALSE)
  child <- start_child({
    say("ready")
    # The answer comes with the failure.
    say("body", http_get(address, "figures?wait=30000&seen=0")$body)
  }, list(http_get = http_get, address = address), attach = FALSE)
  child_wait_for(child, "ready")
  trap <- trap()
  die <- global(function(i, trap, dir) {
    if (i == 1) {
      while (!file.exists(file.path(dir, "go"))) Sys.sleep(0.01)
      if (file.exists(trap) && file.remove(trap)) {
        message("the last </script> words")
        tools::pskill(Sys.getpid(), tools::SIGKILL)
        Sys.sleep(60)
      }
    }
    # The call goes on until the failure has been shown.
    while (i == 2 && !any(startsWith(tryCatch(readLines(file.path(dir, "said")), error = function(e) ""), "body"))) {
      Sys.sleep(0.01)
    }
    i
  })
  file.create(file.path(child$dir, "go"))
  got <- with_losses(clusterLapply(cl, 1:2, die, trap, child$dir))
  expect_identical(got$value, list(1L, 2L))
  expect_length(got$losses, 1L)
  body <- child_wait_for(child, "body")
  expect_match(body, "\"kind\":\"worker\"", fixed = TRUE)
  expect_match(body, "was killed by signal 9 (SIGKILL)", fixed = TRUE)
  expect_match(body, "the last \\u003c/script> words", fixed = TRUE)
  expect_match(body, "\"ended\":false", fixed = TRUE)
  # A page gets each failure once.
  changes <- figure(body, "changes")
  expect_match(figures_of(address, paste0("seen=", changes)), "\"failures\":[]", fixed = TRUE)
})

test_that("equal errors are one failure, and count in the call", {
  cl <- local_cluster(2)
  address <- clusterDashboard(cl, browse = FALSE)
  clusterLapply(cl, 1:40, function(i) if (i %% 2) stop("no \"convergence\"") else i, .errors = "return")
  body <- figures_of(address)
  expect_match(body, "\"done\":40,\"failed\":20,", fixed = TRUE)
  expect_match(body, "\"counts\":{\"error\":20,", fixed = TRUE)
  expect_match(body, "\"count\":20,\"rank\":[12],\"host\":null,\"text\":\"[^}]*no \\\\\"convergence\\\\\"")
  suppressWarnings(clusterLapply(cl, 1:3, function(i) if (i == 2) Sys.sleep(60), .timeout = 0.2, .errors = "return"))
  body <- figures_of(address)
  expect_match(body, "\"done\":3,\"failed\":1,", fixed = TRUE)
  expect_match(body, "\"kind\":\"timeout\"", fixed = TRUE)
})

test_that("stored results, exports and calls that wait are shown", {
  cl <- local_cluster(1)
  address <- clusterDashboard(cl, browse = FALSE)
  vector <- numeric(1e5)
  short <- 1
  clusterExport(cl, c("vector", "short"), environment())
  parallel::clusterSetRNGStream(cl, 1)
  body <- figures_of(address)
  bytes <- as.numeric(sub(".*\\[\"vector\",([0-9]+)\\].*", "\\1", body))
  expect_gt(bytes, 8e5)
  expect_lt(bytes, 8.1e5)
  expect_match(body, "[\"short\",", fixed = TRUE)
  expect_no_match(body, ".Random.seed", fixed = TRUE)
  expect_no_match(figures_of(address, paste0("exports=", figure(body, "exportChanges"))), "\"exports\":", fixed = TRUE)

  dir <- tempfile("run-")
  on.exit(unlink(dir, recursive = TRUE), add = TRUE, after = FALSE)
  f <- global(function(i) if (i > 6) stop("later") else i)
  clusterLapply(cl, 1:8, f, .store = dir, .errors = "return")
  expect_match(figures_of(address), "\"elements\":8,\"before\":0,\"waiting\":0,\"trouble\":null", fixed = TRUE)
  clusterLapply(cl, 1:8, f, .store = dir, .errors = "return")
  body <- figures_of(address)
  expect_match(body, "\"tasks\":2,\"done\":2,\"failed\":2,", fixed = TRUE)
  expect_match(body, "\"elements\":8,\"before\":6,\"waiting\":0,\"trouble\":null", fixed = TRUE)
  expect_match(body, basename(dir), fixed = TRUE)

  file <- tempfile()
  calls <- lapply(1:3, function(i) clusterSubmit(cl, while (!file.exists(file)) Sys.sleep(0.01), file = file))
  expect_true(wait_until(function() grepl("\"calls\":[2,1]", figures_of(address), fixed = TRUE)))
  file.create(file)
  for (call in calls) call$value()
  expect_match(figures_of(address), "\"calls\":[0,0]", fixed = TRUE)
})

test_that("a lost host is shown, with the output of its agent's command", {
  skip_unless_proc()
  start <- function(name) commandLauncher(paste0("env NAME=", name), workers = 1, host = name, rlibs = .libPaths())
  cl <- local_cluster(list(start("alder"), start("birch")))
  address <- clusterDashboard(cl, browse = FALSE)
  expect_match(figures_of(address), "\"name\":\"birch\",\"state\":\"up\"", fixed = TRUE)
  tools::pskill(proc_parent(clusterPids(cl)[[2L]]), tools::SIGKILL)
  expect_true(wait_until(function() grepl("\"name\":\"birch\",\"state\":\"lost\"", figures_of(address), fixed = TRUE)))
  body <- figures_of(address)
  expect_match(body, "\"states\":\"il\"", fixed = TRUE)
  expect_match(body, "\"kind\":\"host\"", fixed = TRUE)
  expect_match(body, "killed by signal 9", fixed = TRUE)
  expect_warning(clusterApply(cl[1], 1, identity), class = "rustcluster_host_failed")
})

test_that("two pages are told that the cluster has been stopped, and nothing is left", {
  skip_unless_proc()
  resources <- function() c(open_fds(), threads_of())
  # A stopped cluster keeps files until it is garbage: those of earlier tests are closed now, and the others counted.
  gc()
  before <- resources()
  without_pages <- local_cluster(2)
  stopCluster(without_pages)
  kept <- resources() - before
  before <- resources()
  cl <- local_cluster(2)
  address <- clusterDashboard(cl, browse = FALSE)
  children <- list()
  for (i in 1:2) {
    children[[i]] <- start_child({
      first <- http_get(address, "figures")
      say("ready", first$status)
      repeat {
        body <- http_get(address, "figures?wait=30000")$body
        if (grepl("\"stopped\":true", body, fixed = TRUE)) break
      }
      say("body", body)
    }, list(http_get = http_get, address = address), attach = FALSE)
  }
  for (child in children) expect_identical(child_wait_for(child, "ready"), "200")
  expect_true(rustcluster:::hub_watched(cl[[1L]]$handle$pointer))
  stopCluster(cl)
  for (child in children) {
    expect_match(child_wait_for(child, "body"), "\"states\":\"oo\"", fixed = TRUE)
    expect_child_ends_well(child)
  }
  expect_true(wait_until(function() !is_listening(address)))
  expect_error(clusterDashboard(cl, browse = FALSE), class = "rustcluster_stopped")
  expect_error(clusterTop(cl), class = "rustcluster_stopped")
  expect_true(wait_until(function() all(resources() <= before + kept)))
})

test_that("a page is told that the session has ended and the workers wait", {
  skip_unless_proc()
  records <- local_records()
  go <- tempfile()
  child <- start_child({
    cl <- makeRustCluster(2, linger = 60)
    say("id", clusterId(cl))
    say("address", clusterDashboard(cl, browse = FALSE))
    while (!file.exists(go)) Sys.sleep(0.05)
  }, list(go = go), env = records$env)
  address <- child_wait_for(child, "address")
  expect_match(http_get(address, "figures")$body, "\"lingers\":true,\"left\":false", fixed = TRUE)
  file.create(go)
  repeat {
    body <- http_get(address, "figures?wait=30000")$body
    if (grepl("\"stopped\":true", body, fixed = TRUE)) break
  }
  expect_match(body, "\"lingers\":true,\"left\":true", fixed = TRUE)
  child_wait_end(child)
  killCluster(child_said(child, "id"))
})

test_that("without a page nothing is open and nobody watches", {
  skip_unless_proc()
  cl <- local_cluster(1)
  fds <- open_fds()
  pointer <- cl[[1L]]$handle$pointer
  expect_false(rustcluster:::hub_watched(pointer))
  address <- clusterDashboard(cl, browse = FALSE)
  expect_true(wait_until(function() open_fds() == fds + 1L))
  # The address alone is no page.
  expect_false(rustcluster:::hub_watched(pointer))
  figures_of(address)
  expect_true(rustcluster:::hub_watched(pointer))
})

test_that("an address that other machines reach is a warning, and the page moves there", {
  cl <- local_cluster(1)
  first <- clusterDashboard(cl, browse = FALSE)
  expect_warning(
    address <- clusterDashboard(cl, browse = FALSE, host = "0.0.0.0"), class = "rustcluster_dashboard_exposed"
  )
  expect_match(address, Sys.info()[["nodename"]], fixed = TRUE)
  local <- sub("//[^/]*:", "//127.0.0.1:", address)
  expect_identical(http_get(local)$status, 200L)
  expect_identical(http_get(local, host = "10.1.2.3:80")$status, 200L)
  expect_identical(http_get(local, host = Sys.info()[["nodename"]])$status, 200L)
  expect_identical(http_get(local, host = "evil.example")$status, 403L)
  expect_true(wait_until(function() !is_listening(first)))
  # It is a warning once.
  expect_silent(expect_identical(clusterDashboard(cl, browse = FALSE, host = "0.0.0.0"), address))
  expect_silent(clusterDashboard(cl, browse = FALSE, host = "localhost"))
})

test_that("a viewer is preferred to the browser", {
  cl <- local_cluster(1)
  shown <- list()
  note <- function(by) function(url, ...) shown[[by]] <<- url
  before <- options(viewer = note("viewer"), browser = note("browser"))
  on.exit(options(before), add = TRUE, after = FALSE)
  address <- expect_invisible(clusterDashboard(cl, browse = TRUE))
  expect_identical(shown, list(viewer = address))
  options(viewer = NULL)
  expect_message(clusterDashboard(cl, browse = TRUE), address, fixed = TRUE)
  expect_identical(shown, list(viewer = address, browser = address))
  # A session over ssh may have none of them.
  options(browser = "")
  expect_message(
    expect_message(clusterDashboard(cl, browse = TRUE), address, fixed = TRUE), "browser could not be started"
  )
  options(viewer = function(url) stop("no display"))
  expect_message(expect_identical(clusterDashboard(cl, browse = TRUE), address), paste0(address, ".*no display"))
})

test_that("bad arguments are named", {
  cl <- local_cluster(1)
  bad <- function(...) tryCatch(clusterDashboard(...), rustcluster_bad_argument = function(e) e$argument)
  expect_identical(bad(1), "cl")
  expect_identical(bad(cl, browse = NA), "browse")
  for (host in list(1, c("a", "b"), NA_character_, "", "a b", "http://x/")) {
    expect_identical(bad(cl, browse = FALSE, host = host), "host")
  }
  for (port in list("80", -1, 1.5, 65536, NA, NULL)) expect_identical(bad(cl, browse = FALSE, port = port), "port")
  # Of a network for documentation.
  failure <- expect_error(
    clusterDashboard(cl, browse = FALSE, host = "192.0.2.1"), class = "rustcluster_dashboard_failed"
  )
  expect_identical(failure$host, "192.0.2.1")
  port <- as.integer(sub(".*:([0-9]+)/.*", "\\1", clusterDashboard(cl, browse = FALSE)))
  other <- local_cluster(1)
  failure <- expect_error(clusterDashboard(other, browse = FALSE, port = port), class = "rustcluster_dashboard_failed")
  expect_identical(failure$port, port)
  bad <- function(...) tryCatch(clusterTop(...), rustcluster_bad_argument = function(e) e$argument)
  expect_identical(bad("cl"), "cl")
  for (interval in list(0, "1", NA, c(1, 2))) expect_identical(bad(cl, interval), "interval")
})

test_that("clusterTop() prints the figures once where there is no terminal", {
  cl <- local_cluster(2)
  text <- function(cl) paste(cli::ansi_strip(capture.output(expect_invisible(clusterTop(cl)))), collapse = "\n")
  expect_match(text(cl), "all is well, 0 of 2 workers busy\nnothing has run yet\n", fixed = TRUE)
  clusterLapply(cl, 1:10, function(i) if (i == 3) stop("no\nconvergence") else i, .errors = "return")
  trap <- trap()
  with_losses(clusterLapply(cl, 1:4, function(i, trap) spring(trap), trap))
  text <- text(cl)
  expect_match(text, "4 of 4 elements (100 %), ", fixed = TRUE)
  expect_match(text, "done in [0-9.]+ s")
  expect_match(text, "workers: 0 busy, ", fixed = TRUE)
  expect_match(text, "last call: [", fixed = TRUE)
  expect_match(text, "error, worker [12], [^\n]* ago: [^\n]*no convergence")
  expect_match(text, "worker, worker [12], [^\n]* ago: was killed by signal 9")
})

test_that("a task that exceeds its time limit is shown with the output of its worker", {
  cl <- local_cluster(2)
  clusterLapply(cl, 1:2, function(i) {
    cat("iteration", 16 + i, "\n")
    Sys.sleep(60)
  }, .timeout = 1, .errors = "return")
  failures <- rustcluster:::topFigures(cl[[1L]][["handle"]])$failures
  expect_identical(vapply(failures, `[[`, "", "kind"), c("timeout", "timeout"))
  expect_setequal(vapply(failures, `[[`, "", "output"), c("iteration 17", "iteration 18"))
  expect_match(capture.output(clusterTop(cl)), "    iteration 1[78]", all = FALSE)
})

test_that("errors are shown when they are raised, with what their tasks have printed", {
  cl <- local_cluster(2)
  failures <- function() rustcluster:::topFigures(cl[[1L]][["handle"]])$failures
  found <- function(text) Filter(function(failure) failure$text == text, failures())
  shown <- function(text, count = 1) {
    expect_identical(
      lapply(found(text), `[`, c("kind", "output", "count")),
      list(list(kind = "error", output = paste("before", text), count = count))
    )
  }
  fail <- global(function(i, text) {
    cat("before", text)
    stop(text)
  })
  expect_error(parLapply(cl, 1, fail, "parLapply"), "parLapply")
  shown("parLapply")
  expect_error(clusterCall(cl, fail, 1, "clusterCall"), "clusterCall")
  shown("clusterCall", 2)
  expect_error(clusterEvalQ(cl, {
    cat("before clusterEvalQ")
    stop("clusterEvalQ")
  }))
  shown("clusterEvalQ", 2)
  clusterLapply(cl, 1:40, fail, "clusterLapply", .errors = "return")
  shown("clusterLapply", 40)
  # Nobody asks for the values of these.
  call <- clusterSubmit(cl, fail(1, "clusterSubmit"), fail = fail)
  job <- clusterLapplyAsync(cl, 1:3, fail, "clusterLapplyAsync")
  wait_until(function() length(found("clusterSubmit")) && length(found("clusterLapplyAsync")))
  expect_error(call$value(), "clusterSubmit")
  expect_error(job$value(), "clusterLapplyAsync")
  shown("clusterSubmit")
  shown("clusterLapplyAsync", 3)
  # parallel takes the value of try() for an error, too.
  expect_error(clusterApply(cl, 1, function(i) try(stop("returned"), silent = TRUE)))
  expect_identical(vapply(found("Error in try(stop(\"returned\"), silent = TRUE) : returned"), `[[`, 0, "count"), 1)
})

test_that("errors of loops and futures are shown and counted", {
  skip_if_not_installed("foreach")
  skip_if_not_installed("future")
  cl <- local_cluster(2)
  registerDoRustCluster(cl)
  withr::defer(foreach::registerDoSEQ())
  `%dopar%` <- foreach::`%dopar%`
  values <- foreach::foreach(i = 1:4, .errorhandling = "pass") %dopar% if (i > 1) stop("in the loop") else i
  expect_s3_class(values[[2L]], "error")
  figures <- rustcluster:::topFigures(cl[[1L]][["handle"]])
  expect_identical(figures$counts[[1L]], 3)
  expect_identical(figures$job$failed, 3)
  future::plan(cluster_rust, workers = cl)
  withr::defer(future::plan("sequential"))
  expect_error(future::value(future::future(stop("in the future"))), "in the future")
  texts <- vapply(rustcluster:::topFigures(cl[[1L]][["handle"]])$failures, `[[`, "", "text")
  expect_identical(texts, c("in the loop", "in the future"))
})

test_that("any error is shown and counted, and telling it changes nothing", {
  cl <- local_cluster(1)
  registerDoRustCluster(cl)
  on.exit(foreach::registerDoSEQ(), add = TRUE, after = FALSE)
  `%dopar%` <- foreach::`%dopar%`
  handle <- cl[[1L]][["handle"]]
  raise <- global(function(i, e) stop(e))
  # Returns what is shown of an error, by each way to raise it, and how often it was counted.
  shown <- function(e) {
    before <- rustcluster:::topFigures(handle)$counts[[1L]]
    try(clusterSubmit(cl, stop(e))$value(), silent = TRUE)
    try(clusterLapplyAsync(cl, 1, raise, e)$value(), silent = TRUE)
    try(foreach::foreach(i = 1, .errorhandling = "pass") %dopar% stop(e), silent = TRUE)
    expect_identical(rustcluster:::topFigures(handle)$job$failed, 1)
    clusterLapply(cl, 1, raise, e, .errors = "return")
    expect_identical(rustcluster:::topFigures(handle)$job$failed, 1)
    figures <- rustcluster:::topFigures(handle)
    expect_identical(figures$counts[[1L]] - before, 4)
    utils::tail(figures$failures, 1L)[[1L]]$text
  }
  condition <- function(message, class = NULL) {
    structure(class = c(class, "error", "condition"), list(message = message, call = NULL))
  }
  expect_identical(shown(simpleError("no")), "no")
  # Not the memory around it.
  expect_lte(nchar(shown(simpleError("\xa0")), "bytes"), 3L)
  expect_lte(nchar(shown(simpleError("\x80\xa0")), "bytes"), 6L)
  expect_identical(shown(simpleError("caf\xe9")), "caf\ufffd")
  latin1 <- "caf\xe9"
  Encoding(latin1) <- "latin1"
  expect_identical(shown(simpleError(latin1)), "caf\u00e9")
  expect_identical(nchar(shown(simpleError(strrep("x", 1e6)))), 1000L)
  for (message in list(NA_character_, c("a", "b"), 42, NULL, "")) shown(condition(message))

  # A method of the condition is not called for the page.
  clusterEvalQ(cl, {
    conditionMessage.rng <- function(c) paste("drawn", stats::runif(1))
    NULL
  })
  draws <- clusterCall(cl, function() {
    set.seed(1)
    draws <- stats::runif(2)
    set.seed(1)
    draws
  })[[1L]]
  try(clusterSubmit(cl, stop(drawing), drawing = condition("message", "rng"))$value(), silent = TRUE)
  # stop() has drawn the first.
  expect_identical(clusterCall(cl, function() stats::runif(1))[[1L]], draws[[2L]])
  # The empty symbol is a value.
  expect_identical(clusterSubmit(cl, quote(expr = ))$value(), quote(expr = ))
})

test_that("interrupts from elsewhere and returned errors are failures", {
  cl <- local_cluster(1)
  failed <- function(run) {
    before <- rustcluster:::topFigures(cl[[1L]][["handle"]])$counts[[1L]]
    run
    figures <- rustcluster:::topFigures(cl[[1L]][["handle"]])
    c(figures$counts[[1L]] - before, figures$job$failed)
  }
  interrupted <- function(i) {
    if (i == 2) {
      tools::pskill(Sys.getpid(), tools::SIGINT)
      Sys.sleep(60)
    }
    i
  }
  expect_identical(failed(clusterLapply(cl, 1:4, interrupted, .errors = "return")), c(1, 1))
  inner <- function(i) structure("inner", class = c("snow-try-error", "try-error"))
  expect_identical(failed(try(clusterApply(cl, 1:2, inner), silent = TRUE)), c(2, 2))
  # The head has interrupted this task.
  call <- clusterSubmit(cl, Sys.sleep(60))
  wait_until(function() call$status() == "running")
  expect_identical(failed({
    call$cancel()
    clusterLapply(cl, 1, identity)
  }), c(0, 0))
})

test_that("clusterTop() shows the calls that run, and not the one before them", {
  cl <- local_cluster(2)
  gate <- tempfile("gate-")
  on.exit(unlink(gate), add = TRUE, after = FALSE)
  clusterLapply(cl, 1:10, identity)
  job <- clusterLapplyAsync(cl, 1:5, function(i, gate) while (!file.exists(gate)) Sys.sleep(0.01), gate)
  text <- cli::ansi_strip(capture.output(clusterTop(cl)))
  expect_match(text, "^[1-5] calls? running", all = FALSE)
  expect_no_match(text, "10 elements")
  file.create(gate)
  job$value()
  expect_match(cli::ansi_strip(capture.output(clusterTop(cl))), "last call: .* 10 of 10 elements", all = FALSE)
})

test_that("a run shows the cluster of its runner", {
  dir <- tempfile("run-", dirname(tempdir()))
  gate <- tempfile("gate-")
  on.exit({
    try(openRun(dir)$cancel(), silent = TRUE)
    unlink(c(dir, gate), recursive = TRUE)
  }, add = TRUE, after = FALSE)
  run <- startRun(dir, 1:4, function(i) {
    while (!file.exists(gate)) Sys.sleep(0.02)
    i
  }, spec = 2, .wait = 0)
  # The question waits until the cluster is there.
  address <- expect_visible(clusterDashboard(run, browse = FALSE))
  expect_identical(clusterDashboard(openRun(dir), browse = FALSE), address)
  expect_true(wait_until(function() grepl("\"states\":\"bb\"", figures_of(address), fixed = TRUE)))
  body <- figures_of(address)
  expect_match(body, "\"noun\":\"element\",\"tasks\":4,\"done\":0,", fixed = TRUE)
  expect_match(body, basename(dir), fixed = TRUE)
  expect_match(capture.output(clusterTop(run)), "2 of 2 workers busy", all = FALSE)
  expect_warning(
    moved <- clusterDashboard(run, browse = FALSE, host = "0.0.0.0"), class = "rustcluster_dashboard_exposed"
  )
  expect_true(is_listening(sub("//[^:]*:", "//127.0.0.1:", moved)))
  taken <- free_port()
  listener <- serverSocket(taken)
  on.exit(close(listener), add = TRUE, after = FALSE)
  expect_error(
    clusterDashboard(run, browse = FALSE, port = taken), paste("port", taken), class = "rustcluster_dashboard_failed"
  )
  asked <- list.files(file.path(dir, "runner"), "^asked-", full.names = TRUE)
  expect_length(asked, 1L)
  expect_identical(list.files(asked), character())
  # What is no question does not disturb the run.
  system2("mkfifo", shQuote(file.path(asked, "pipe.question")))
  dir.create(file.path(asked, "directory.question"))
  writeLines("x", file.path(asked, "text.question"))
  saveRDS(1, file.path(asked, "number.question"))
  expect_identical(clusterDashboard(run, browse = FALSE, host = "0.0.0.0"), moved)
  expect_true(wait_until(function() !length(list.files(asked, "question$"))))
  expect_identical(file.mode(file.path(dir, "runner")), as.octmode("700"))
  file.create(gate)
  expect_identical(run$wait(60), "done")
  for (call in expression(clusterDashboard(run, browse = FALSE), clusterTop(run))) {
    error <- caught(eval(call))
    expect_rust_error(error, "stopped")
    expect_match(conditionMessage(error), "is done, and has no cluster any more", fixed = TRUE)
  }
  expect_false(is_listening(sub("//[^:]*:", "//127.0.0.1:", moved)))
  expect_false(dir.exists(asked))
  expect_identical(as.list(run$results()), as.list(1:4))

  cl <- local_cluster(1)
  other <- tempfile("run-")
  errors <- list()
  clusterLapply(cl, 1:2, identity, .store = other, .onResult = function(i, x) {
    errors[[i]] <<- caught(clusterDashboard(openRun(other), browse = FALSE))
  })
  expect_rust_error(errors[[1L]], "bad_argument")
  expect_match(conditionMessage(errors[[1L]]), "is a run that a call of clusterLapply() computes", fixed = TRUE)
})

test_that("clusterTop() of a run that ends says so", {
  asked <- 0
  ask <- function() {
    asked <<- asked + 1
    if (asked > 2) rustcluster:::abort("stopped", "the run is done")
    figures
  }
  cl <- local_cluster(1)
  figures <- rustcluster:::topFigures(cl[[1L]][["handle"]])
  local_function("keyPressed", function() FALSE)
  capture.output(lines <- rustcluster:::refreshTop(ask, 0.1))
  expect_identical(utils::tail(lines, 1L), "the run is done")
})

test_that("text of workers cannot move the cursor of the terminal", {
  cl <- local_cluster(1)
  clusterLapply(cl, 1, function(i) stop("red \033[31m and \033]0;title\a"), .errors = "return")
  text <- capture.output(clusterTop(cl))
  expect_match(text, "red \\x1b[31m and \\x1b]0;title\\x07", fixed = TRUE, all = FALSE)
})

test_that("a fork of this session does not keep the port", {
  skip_unless_proc()
  cl <- local_cluster(1)
  address <- clusterDashboard(cl, browse = FALSE)
  job <- parallel::mcparallel(Sys.sleep(60))
  on.exit({
    tools::pskill(job$pid, tools::SIGKILL)
    suppressWarnings(parallel::mccollect(job))
  }, add = TRUE, after = FALSE)
  stopCluster(cl)
  expect_true(wait_until(function() !is_listening(address)))
})

# ---- a browser ---------------------------------------------------------------------

# Runs a script of Selenium with functions to open the page. Returns its output; fails with it.
in_browser <- function(address, lines, values = character()) {
  skip_unless_proc()
  skip_unless_python("selenium")
  programs <- Sys.which(c("chromium", "chromedriver"))
  skip_if_not(all(nzchar(programs)), "there is no Chromium: programs chromium and chromedriver")
  home <- tempfile("browsers-")
  dir.create(home)
  on.exit(unlink(home, recursive = TRUE), add = TRUE, after = FALSE)
  ran <- run_python(env = c(paste0(c("HOME=", "TMPDIR="), home), "no_proxy=localhost,127.0.0.1"), lines = c(
    sprintf("%s = '%s'", c("url", "home", "chromium", "chromedriver"), c(address, home, programs)),
    sprintf("%s = '%s'", names(values), values),
    "import time, os",
    "from selenium import webdriver",
    "from selenium.webdriver.chrome.service import Service",
    "from selenium.webdriver.common.keys import Keys",
    "from selenium.webdriver.support.ui import WebDriverWait",
    "",
    "def browser(name, scheme='light'):",
    "    options = webdriver.ChromeOptions()",
    "    options.binary_location = chromium",
    "    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})",
    "    # Root has no sandbox. By the pipe Chromium sees the end of its driver, and ends, too.",
    "    for flag in ('headless', 'no-sandbox', 'disable-gpu', 'disable-component-update', 'window-size=1280,1000',",
    "                 'remote-debugging-pipe', f'user-data-dir={home}/{name}'):",
    "        options.add_argument('--' + flag)",
    "    page = webdriver.Chrome(service=Service(chromedriver), options=options)",
    "    feature = {'name': 'prefers-color-scheme', 'value': scheme}",
    "    page.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [feature]})",
    "    page.get(url)",
    "    return page",
    "",
    "def text(page, id): return page.execute_script('return document.getElementById(arguments[0]).textContent', id)",
    "def shows(page, id, what):",
    "    WebDriverWait(page, 60).until(lambda page: what in text(page, id), f'{id} does not become: {what}')",
    "def colour(page): return page.execute_script('return getComputedStyle(document.body).backgroundColor')",
    "# What the timeline shows in this many pixels at the right, as the colours that occur there.",
    "def colours(page, width=190): return page.execute_script('''",
    "    const canvas = document.getElementById('lanes'), context = canvas.getContext('2d');",
    "    const from = Math.max(0, canvas.width - 10 - arguments[0]);",
    "    const data = context.getImageData(from, 0, arguments[0], canvas.height).data, found = new Set();",
    "    for (let at = 0; at < data.length; at += 4) found.add(data.slice(at, at + 3).join());",
    "    return [...found];''', width)",
    "def has(page, colour):",
    "    WebDriverWait(page, 20).until(lambda page: colour in colours(page), f'{colour} does not appear')",
    "# Waits until the timeline shows this time.",
    "def shown_in(page, seconds):",
    "    WebDriverWait(page, 60).until(lambda page: page.execute_script('return lanesSpan') == seconds)",
    "def no_complaints(page):",
    "    complaints = [line for line in page.get_log('browser') if line['level'] != 'INFO'",
    "                  and 'willReadFrequently' not in line['message']]  # That is of colours().",
    "    assert not complaints, complaints",
    "",
    lines
  ))
  expect_identical(ran$status, 0L, info = paste(ran$output, collapse = "\n"))
  ran$output
}

busy_colour <- "'0,114,178'"

test_that("the page shows 8 workers, a failure and the end, in both colour schemes", {
  skip_unless_long()
  child <- start_child({
    cl <- makeRustCluster(8)
    say("pids", paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
    say("url", clusterDashboard(cl, browse = FALSE))
    f <- function(i, dir) {
      if (i == 20) stop("no <b>convergence</b>")
      if (i > 40) while (!file.exists(file.path(dir, "go"))) Sys.sleep(0.02)
      Sys.sleep(0.2)
    }
    clusterLapply(cl, 1:60, f, dir, .errors = "return")
    while (!file.exists(file.path(dir, "stop"))) Sys.sleep(0.05)
    stopCluster(cl)
    say("stopped")
    Sys.sleep(60)
  })
  url <- child_wait_for(child, "url")
  note_pids(child_pids(child, "pids"))
  in_browser(url, values = c(dir = child$dir), lines = c(
    "with browser('one') as one, browser('two', 'dark') as two:",
    "    for page in one, two:",
    "        shows(page, 'jobText', 'of 60 elements')",
    "        shows(page, 'status', '1 element of this call failed')",
    "        shows(page, 'failureList', 'no <b>convergence</b>')",
    "        assert not page.find_elements('css selector', '#failureList b')",
    "        shows(page, 'hosts', 'localhost')",
    "    assert colour(one) != colour(two), colour(one)",
    "    has(two, '86,180,233')",
    paste0("    has(one, ", busy_colour, ")"),
    "    # Keys: Tab reaches the controls, arrows select workers.",
    "    reached = set()",
    "    for _ in range(20):",
    "        one.switch_to.active_element.send_keys(Keys.TAB)",
    "        reached.add(one.execute_script('return document.activeElement.id || document.activeElement.textContent'))",
    "    assert {'5 min', 'pause', 'scroller'} <= reached, reached",
    "    scroller = one.find_element('id', 'scroller')",
    "    for _ in range(3): scroller.send_keys(Keys.ARROW_DOWN)",
    "    shows(one, 'worker', 'worker 3 on localhost: busy for')",
    "    scroller.send_keys(Keys.END)",
    "    shows(one, 'worker', 'worker 8 on localhost')",
    "    scroller.send_keys(Keys.ESCAPE)",
    "    assert one.find_element('id', 'lanesHelp').is_displayed()",
    "    for button in one.find_elements('css selector', '#spans button'):",
    "        button.send_keys(Keys.ENTER)",
    "        assert button.get_attribute('aria-pressed') == 'true'",
    "        shown_in(one, int(button.get_attribute('value')))",
    "        assert one.execute_script('return lanes.every((lane) => /[1-8]/.test(lane))')",
    "    open(f'{dir}/go', 'w').close()",
    "    for page in one, two: shows(page, 'jobLeft', 'done in')",
    "    shows(one, 'jobText', '60 of 60 elements · 100 %')",
    "    open(f'{dir}/stop', 'w').close()",
    "    for page in one, two: shows(page, 'status', 'The cluster has been stopped')",
    "    time.sleep(3)",
    "    for page in one, two:",
    "        assert 'has been stopped' in text(page, 'status')",
    "        no_complaints(page)"
  ))
  child_wait_for(child, "stopped")
})

test_that("the page says what runs after a call, that it is paused, and keeps its timeline", {
  skip_unless_long()
  child <- start_child({
    cl <- makeRustCluster(2)
    say("pids", paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
    say("url", clusterDashboard(cl, browse = FALSE))
    clusterLapply(cl, 1:4, identity)
    go <- file.path(dir, "go")
    calls <- lapply(1:3, function(i) clusterSubmit(cl, while (!file.exists(go)) Sys.sleep(0.02), go = go))
    for (call in calls) call$value()
    while (!file.exists(file.path(dir, "stop"))) Sys.sleep(0.05)
    stopCluster(cl)
    say("stopped")
    Sys.sleep(60)
  })
  url <- child_wait_for(child, "url")
  note_pids(child_pids(child, "pids"))
  in_browser(url, values = c(dir = child$dir), lines = c(
    "def press(page, name): page.execute_script('''",
    "    [...document.querySelectorAll('button')].find((one) => one.textContent === arguments[0]).click();",
    "    window.dispatchEvent(new Event('resize'));  // It draws.''', name)",
    "def displayed(page, id): return page.find_element('id', id).is_displayed()",
    "def busy(page): return '0,114,178' in colours(page, 2000)",
    "with browser('one') as one, browser('two') as two:",
    "    for page in one, two:",
    "        shows(page, 'jobText', '2 calls running, 1 waiting')",
    "        assert not displayed(page, 'track') and not text(page, 'jobRate'), text(page, 'job')",
    "        WebDriverWait(page, 60).until(busy)",
    "    # The timeline is kept until that of the chosen time comes.",
    "    press(one, 'All')",
    "    assert busy(one)",
    "    shown_in(one, 0)",
    "    press(two, 'Pause')",
    "    open(f'{dir}/go', 'w').close()",
    "    shows(one, 'jobText', '4 of 4 elements · 100 %')",
    "    assert displayed(one, 'track') and 'last call' in text(one, 'jobRate'), text(one, 'job')",
    "    open(f'{dir}/stop', 'w').close()",
    "    shows(one, 'status', 'The cluster has been stopped')",
    "    press(one, '5 min')",
    "    assert busy(one)",
    "    assert text(two, 'status').startswith('❚❚ Paused: '), text(two, 'status')",
    "    assert 'All is well, 2 of 2 workers busy' in text(two, 'notes'), text(two, 'notes')",
    "    assert two.title == 'Paused – rustcluster', two.title",
    "    assert '2 calls running' in text(two, 'jobText'), text(two, 'jobText')",
    "    for page in one, two: no_complaints(page)",
    "    press(two, 'Go on')",
    "    shows(two, 'status', 'The R session has ended, or the cluster has been stopped')",
    "    press(two, '5 min')",
    "    assert busy(two)"
  ))
  child_wait_for(child, "stopped")
})

test_that("the page shows 320 workers and a lost host, and survives the end of R", {
  skip_unless_long()
  child <- start_child({
    start <- function(name) commandLauncher(paste0("env NAME=", name), workers = 160, host = name, rlibs = .libPaths())
    cl <- makeRustCluster(list(start("alder"), start("birch")))
    say("pids", paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
    say("url", clusterDashboard(cl, browse = FALSE))
    suppressWarnings(clusterLapply(cl, 1:1e5, function(i, dir) {
      if (!file.exists(file.path(dir, "go"))) Sys.sleep(0.3)
    }, dir))
    say("done")
    while (!file.exists(file.path(dir, "stop"))) Sys.sleep(0.05)
    tools::pskill(Sys.getpid(), tools::SIGKILL)
  })
  url <- child_wait_for(child, "url")
  pids <- child_pids(child, "pids")
  note_pids(pids)
  agent <- proc_parent(pids[[161L]])
  in_browser(url, values = c(dir = child$dir, agent = agent), lines = c(
    "with browser('one') as one:",
    "    shows(one, 'tiles', '320 of 320')",
    "    shows(one, 'status', 'All is well')",
    paste0("    has(one, ", busy_colour, ")"),
    "    os.kill(int(agent), 9)",
    "    shows(one, 'status', 'Host birch is lost')",
    "    shows(one, 'hosts', 'lost')",
    "    shows(one, 'tiles', '160 of 320 not up')",
    "    has(one, '213,94,0')",
    "    open(f'{dir}/go', 'w').close()",
    "    shows(one, 'jobLeft', 'done in')",
    "    no_complaints(one)",
    "    open(f'{dir}/stop', 'w').close()",
    "    shows(one, 'status', 'The R session has ended, or the cluster has been stopped')",
    "    shows(one, 'jobText', '100,000 of 100,000 elements')"
  ))
  expect_gone(pids, within = 5)
})
