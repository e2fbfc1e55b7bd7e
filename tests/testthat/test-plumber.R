# Endpoints of package plumber that use a cluster, and those that return promises of its calls.

skip_on_cran()
skip_unless_long()
for (package in c("plumber", "promises", "later", "httpuv")) skip_if_not_installed(package)
watch_processes()

test_that("endpoints compute on a cluster, and serve others while a promise waits", {
  skip_unless_proc()
  gate <- tempfile()
  server <- start_child({
    suppressPackageStartupMessages(library(plumber))
    cl <- makeRustCluster(2)
    say("pids", paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
    promised <- promises::as.promise
    then <- promises::then
    endpoints <- list(
      sum = function(n) sum(unlist(parLapply(cl, seq_len(as.integer(n)), function(i) i^2))),
      call = function() promised(clusterSubmit(cl, 6 * 7)),
      itself = function() clusterSubmit(cl, 6 * 7),
      calls = function() promised(clusterLapplyAsync(cl, 1:3, function(i) i^2)),
      then = function() then(promised(clusterSubmit(cl, 20)), function(x) x + 1),
      fails = function() promised(clusterSubmit(cl, stop("broken"))),
      dies = function() promised(clusterSubmit(cl, tools::pskill(Sys.getpid(), 9))),
      waits = function() {
        promised(clusterSubmit(cl, {
          file.create(paste0(gate, "-began"))
          while (!file.exists(gate)) Sys.sleep(0.02)
          "waited"
        }))
      },
      fast = function() "fast",
      end = function() {
        stopCluster(cl)
        later::later(function() quit("no"), 0.3)
        "ended"
      }
    )
    router <- pr()
    for (name in names(endpoints)) router <- pr_get(router, paste0("/", name), endpoints[[name]])
    # Errors are texts.
    router <- pr_set_error(router, function(req, res, err) {
      res$status <- 500L
      list(error = conditionMessage(err))
    })
    port <- httpuv::randomPort()
    say("port", port)
    pr_run(router, "127.0.0.1", port, docs = FALSE, quiet = TRUE)
  }, values = list(gate = gate))
  address <- paste0("http://127.0.0.1:", child_wait_for(server, "port"), "/")
  pids <- note_pids(child_pids(server, "pids"))
  ask <- function(path) tryCatch(readLines(paste0(address, path), warn = FALSE), error = function(e) NULL)
  expect_true(wait_until(function() !is.null(suppressWarnings(ask("fast")))))
  expect_identical(ask("sum?n=4"), "[30]")
  expect_identical(ask("call"), "[42]")
  # Earlier versions of promises have no generic for this.
  if ("UseMethod" %in% all.names(body(promises::is.promising))) expect_identical(ask("itself"), "[42]")
  expect_identical(ask("calls"), "[[1],[4],[9]]")
  expect_identical(ask("then"), "[21]")

  # The answer of another process, also that of an error.
  answer <- function(path, .frame = parent.frame()) {
    start_child({
      say("answer", rawToChar(curl::curl_fetch_memory(url)$content))
    }, values = list(url = paste0(address, path)), .frame = .frame)
  }
  if (requireNamespace("curl", quietly = TRUE)) {
    for (path in c("fails", "dies")) {
      client <- answer(path)
      expect_child_ends_well(client)
      expect_match(child_said(client, "answer"), if (path == "fails") "broken" else "the worker died on all 3 attempts")
    }
    waits <- answer("waits")
    expect_true(wait_until(function() file.exists(paste0(gate, "-began"))))
    expect_identical(ask("fast"), "[\"fast\"]")
    expect_identical(ask("call"), "[42]")
    expect_null(child_said(waits, "answer"))
    file.create(gate)
    expect_identical(child_wait_for(waits, "answer"), "[\"waited\"]")
    expect_child_ends_well(waits)
  }
  expect_identical(ask("end"), "[\"ended\"]")
  expect_child_ends_well(server)
  expect_gone(pids)
})

test_that("no process is left", {
  expect_no_leftovers()
})
