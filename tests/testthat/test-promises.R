# Calls as promises: the session is woken when one has ended.

watch_processes()

skip_if_not_installed("promises")
skip_if_not_installed("later")

# Runs the event loop until something is there, without looking for it.
run_until <- function(there, most = 20) {
  deadline <- proc.time()[[3L]] + most
  while (!there() && proc.time()[[3L]] < deadline) later::run_now(deadline - proc.time()[[3L]])
  there()
}

then_note <- function(call, seen, name) {
  force(name)
  promises::then(
    promises::as.promise(call),
    function(value) seen[[name]] <- value,
    function(error) seen[[name]] <- error
  )
}

test_that("a warning of a loss that is turned into an error rejects nothing", {
  cl <- local_cluster(2)
  old <- options(warn = 2)
  on.exit(options(old), add = TRUE, after = FALSE)
  seen <- new.env()
  pids <- clusterPids(cl)
  traps <- trap(1)
  call <- clusterSubmit(cl, {
    spring(traps)
    "at last"
  })
  expect_true(wait_until(function() !identical(clusterPids(cl), pids)))
  then_note(call, seen, "lost")
  then_note(clusterSubmit(cl, "other"), seen, "other")
  there <- function() length(ls(seen)) == 2L
  for (i in 1:5) tryCatch(run_until(there), error = function(e) expect_match(conditionMessage(e), "tried again"))
  expect_equal(seen$lost, "at last")
  expect_equal(seen$other, "other")
})

test_that("a promise is fulfilled, or rejected with the error", {
  cl <- local_cluster(2)
  seen <- new.env()
  call <- clusterSubmit(cl, {
    Sys.sleep(0.2)
    6 * 7
  })
  # Not before that is a generic.
  if ("UseMethod" %in% all.names(body(promises::is.promising))) expect_true(promises::is.promising(call))
  then_note(call, seen, "value")
  then_note(clusterSubmit(cl, stop("no")), seen, "error")
  ended <- clusterSubmit(cl, "before")
  ended$value()
  then_note(ended, seen, "before")
  expect_true(run_until(function() length(ls(seen)) == 3L))
  expect_equal(seen$value, 42)
  expect_identical(conditionMessage(seen$error), "no")
  expect_equal(seen$before, "before")
  expect_equal(call$value(), 42)
})

test_that("nobody looks until there is something to look at", {
  cl <- local_cluster(1)
  seen <- new.env()
  looks <- 0L
  looking <- rustcluster:::lookAtCalls
  local_function("lookAtCalls", function(handle) {
    looks <<- looks + 1L
    looking(handle)
  })
  then_note(clusterSubmit(cl, Sys.sleep(1)), seen, "value")
  expect_true(run_until(function() exists("value", seen, inherits = FALSE)))
  expect_lte(looks, 2L)
})

test_that("many more than there are workers, in their order, and other things go on", {
  cl <- local_cluster(2)
  seen <- new.env()
  ticks <- 0
  tick <- function() {
    ticks <<- ticks + 1
    if (length(ls(seen)) < 30L) later::later(tick, 0.02)
  }
  later::later(tick, 0)
  for (i in 1:30) local({
    i <- i
    then_note(clusterSubmit(cl, {
      Sys.sleep(0.03)
      i
    }), seen, format(100 + i))
  })
  expect_true(run_until(function() length(ls(seen)) == 30L))
  expect_equal(unname(unlist(mget(ls(seen), seen))), 1:30)
  expect_gt(ticks, 5)
})

test_that("a promise keeps its call and its cluster", {
  seen <- new.env()
  pid <- local({
    cl <- makeRustCluster(1)
    note_processes(cl)
    then_note(clusterSubmit(cl, {
      Sys.sleep(0.5)
      "kept"
    }), seen, "value")
    clusterPids(cl)
  })
  for (i in 1:3) gc()
  expect_alive(pid)
  expect_true(run_until(function() exists("value", seen, inherits = FALSE)))
  expect_equal(seen$value, "kept")
  for (i in 1:3) gc()
  expect_gone(pid)
})

test_that("losses are dealt with while the session is idle", {
  cl <- local_cluster(2)
  seen <- new.env()
  traps <- trap(1)
  then_note(clusterSubmit(cl, {
    spring(traps)
    "at last"
  }), seen, "again")
  then_note(clusterSubmit(cl, poison(1, 1)), seen, "lost")
  # Warnings in the event loop are nobody's to catch.
  suppressWarnings(run_until(function() length(ls(seen)) == 2L))
  expect_equal(seen$again, "at last")
  expect_rust_error(seen$lost, "task_failed")
  expect_length(seen$lost$losses, 3L)
})

test_that("cancelled and stopped calls are rejected", {
  cl <- makeRustCluster(1)
  note_processes(cl)
  seen <- new.env()
  calls <- lapply(1:2, function(i) clusterSubmit(cl, Sys.sleep(60)))
  then_note(calls[[1L]], seen, "cancelled")
  then_note(calls[[2L]], seen, "stopped")
  calls[[1L]]$cancel()
  parallel::stopCluster(cl)
  expect_true(run_until(function() length(ls(seen)) == 2L))
  expect_rust_error(seen$cancelled, "cancelled")
  expect_rust_error(seen$stopped, "stopped")
})

test_that("clusterLapplyAsync() is a promise of a list", {
  cl <- local_cluster(2)
  seen <- new.env()
  then_note(clusterLapplyAsync(cl, c(a = 1, b = 2), function(x) x^2), seen, "list")
  then_note(clusterLapplyAsync(cl, 1:4, function(x) if (x == 2) stop("two") else x), seen, "error")
  then_note(clusterLapplyAsync(cl, list(), identity), seen, "empty")
  expect_true(run_until(function() length(ls(seen)) == 3L))
  expect_identical(seen$list, list(a = 1, b = 4))
  expect_rust_error(seen$error, "element_failed")
  expect_identical(seen$error$index, 2L)
  expect_identical(seen$empty, list())
})

test_that("a loop of its own is woken, too", {
  cl <- local_cluster(1)
  seen <- new.env()
  loop <- later::create_loop()
  later::with_loop(loop, then_note(clusterSubmit(cl, {
    Sys.sleep(0.2)
    1
  }), seen, "value"))
  for (i in 1:20) {
    if (exists("value", seen, inherits = FALSE)) break
    later::run_now(1, loop = loop)
  }
  expect_equal(seen$value, 1)
})

test_that("results larger than what is buffered come", {
  cl <- local_cluster(2, buffer_limit = 2^20)
  seen <- new.env()
  held <- lapply(1:2, function(i) clusterSubmit(cl, numeric(1e6)))
  for (i in 1:4) then_note(clusterSubmit(cl, numeric(1e6)), seen, as.character(i))
  held[[1L]]$value()
  held[[2L]]$value()
  expect_true(run_until(function() length(ls(seen)) == 4L))
})

# A client of a Shiny app: as much of its protocol, and of websockets, as is needed.
web_socket <- function(port) {
  con <- NULL
  wait_until(function() {
    con <<- tryCatch(
      suppressWarnings(socketConnection("127.0.0.1", port, open = "r+b", blocking = FALSE, timeout = 5)),
      error = function(e) NULL
    )
    !is.null(con)
  })
  writeBin(charToRaw(paste0(
    "GET /websocket/ HTTP/1.1\r\nHost: 127.0.0.1:", port, "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
  )), con)
  list2env(list(con = con, got = raw()), parent = emptyenv())
}

web_send <- function(socket, text) {
  body <- charToRaw(text)
  length <- if (length(body) < 126L) as.raw(128L + length(body)) else {
    c(as.raw(128L + 126L), as.raw(length(body) %/% 256L), as.raw(length(body) %% 256L))
  }
  # Masked with zeros, that is, as it is.
  writeBin(c(as.raw(0x81), length, raw(4L), body), socket$con)
}

# All that has come, as text: frames' headers are between it.
web_got <- function(socket) {
  socket$got <- c(socket$got, readBin(socket$con, "raw", 65536L))
  rawToChar(socket$got[socket$got >= as.raw(32L) & socket$got < as.raw(127L)])
}

test_that("a Shiny app answers while a call is at work", {
  skip_unless_long()
  skip_if_not_installed("shiny")
  skip_if_not_installed("httpuv")
  flag <- tempfile()
  child <- start_child({
    cl <- makeRustCluster(1)
    server <- function(input, output, session) {
      result <- shiny::reactiveVal("none yet")
      shiny::observeEvent(input$go, {
        call <- clusterSubmit(cl, {
          while (!file.exists(flag)) Sys.sleep(0.01)
          "all done"
        }, flag = flag)
        promises::then(promises::as.promise(call), function(value) result(value))
        NULL
      })
      shiny::observeEvent(input$stop, shiny::stopApp())
      output$quick <- shiny::renderText(paste("answer", input$n))
      output$slow <- shiny::renderText(paste("result:", result()))
    }
    ui <- shiny::fluidPage(shiny::textOutput("quick"), shiny::textOutput("slow"))
    say("pids", clusterPids(cl), agentPids(cl))
    say("port", port)
    shiny::runApp(shiny::shinyApp(ui, server), port = port, launch.browser = FALSE)
  }, list(flag = flag, port = port <- httpuv::randomPort()))
  child_wait_for(child, "port")
  note_pids(child_pids(child, "pids"))
  socket <- web_socket(port)
  on.exit(close(socket$con), add = TRUE)
  saw <- function(text) wait_until(function() grepl(text, web_got(socket), fixed = TRUE), 20)
  expect_true(saw("101"))
  web_send(socket, paste0(
    '{"method":"init","data":{"n":1,"go":0,".clientdata_output_quick_hidden":false,',
    '".clientdata_output_slow_hidden":false}}'
  ))
  expect_true(saw("answer 1"))
  expect_true(saw("result: none yet"))
  web_send(socket, '{"method":"update","data":{"go":1}}')
  for (n in 2:6) {
    web_send(socket, sprintf('{"method":"update","data":{"n":%d}}', n))
    expect_true(saw(paste("answer", n)))
  }
  expect_false(grepl("all done", web_got(socket), fixed = TRUE))
  file.create(flag)
  expect_true(saw("result: all done"))
  web_send(socket, '{"method":"update","data":{"stop":1}}')
  expect_child_ends_well(child)
})

test_that("nothing is left", {
  expect_no_leftovers()
})
