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

test_that("a warning of a worker failure that is turned into an error rejects no promise", {
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
  for (i in 1:5) tryCatch(run_until(there), error = function(e) expect_match(conditionMessage(e), "is retried"))
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

# Shiny notes there where an error comes from, and does not get over errors that come from nowhere.
test_that("an error is raised in a handler", {
  cl <- local_cluster(1)
  seen <- new.env()
  raised <- character()
  domain <- promises::new_promise_domain(wrapOnFulfilled = function(handler) {
    force(handler)
    function(...) withCallingHandlers(handler(...), error = function(e) raised <<- c(raised, conditionMessage(e)))
  })
  promises::with_promise_domain(domain, {
    then_note(clusterSubmit(cl, stop("one")), seen, "one")
    then_note(clusterLapplyAsync(cl, 1, function(x) stop("two")), seen, "two")
  })
  expect_true(run_until(function() length(ls(seen)) == 2L))
  expect_setequal(raised, c("one", conditionMessage(seen$two)))
})

test_that("the session does not poll for promises", {
  cl <- local_cluster(1)
  seen <- new.env()
  looks <- 0L
  looking <- rustcluster:::checkCalls
  local_function("checkCalls", function(handle) {
    looks <<- looks + 1L
    looking(handle)
  })
  then_note(clusterSubmit(cl, Sys.sleep(1)), seen, "value")
  expect_true(run_until(function() exists("value", seen, inherits = FALSE)))
  expect_lte(looks, 2L)
})

test_that("more promises than workers are fulfilled in order, while other callbacks run", {
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

test_that("worker failures are handled while the session is idle", {
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

test_that("an interrupt while promises are fulfilled loses no promise", {
  cl <- local_cluster(2)
  for (k in 1:5) {
    n <- 0
    settled <- lapply(1:500, function(i) promises::as.promise(clusterSubmit(cl, i, i = i)))
    for (promise in settled) promises::then(promise, function(value) n <<- n + 1)
    states <- function() vapply(settled, function(promise) attr(promise, "promise_impl")$status(), "")
    end <- Sys.time() + 30
    run <- function() while ((n < 500 || !later::loop_empty()) && Sys.time() < end) later::run_now(0.1)
    # It is felt in a callback, where package later takes it, or between two.
    interrupt_after(0.02 * k)
    tryCatch(
      {
        run()
        Sys.sleep(0.5)
      },
      interrupt = function(e) NULL,
      # Package later raises an error without a message if the interrupt jumps over its own frame.
      `Rcpp::exception` = function(e) expect_equal(conditionMessage(e), "")
    )
    expect_true(run_until(function() all(states() == "fulfilled") && later::loop_empty()))
    # Package promises never repeats a handler, so the one in which the interrupt was felt is lost.
    expect_true(n %in% c(499, 500))
    values <- numeric()
    for (promise in settled) promises::then(promise, function(value) values <<- c(values, value))
    expect_true(run_until(function() length(values) == 500L))
    expect_identical(values, as.numeric(1:500))
  }
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

test_that("a private event loop of later is woken", {
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

test_that("results larger than `buffer_limit` fulfil promises", {
  cl <- local_cluster(2, buffer_limit = 2^20)
  seen <- new.env()
  held <- lapply(1:2, function(i) clusterSubmit(cl, numeric(1e6)))
  for (i in 1:4) then_note(clusterSubmit(cl, numeric(1e6)), seen, as.character(i))
  held[[1L]]$value()
  held[[2L]]$value()
  expect_true(run_until(function() length(ls(seen)) == 4L))
  # Callbacks that are still in the event loop hold results, whose shared memory later tests would find.
  while (!later::loop_empty()) later::run_now()
  rm(seen, held)
  gc()
  gc()
  expect_equal(shared_memory(Sys.getpid())[["mapped", 1L]], 0L)
})

test_that("a Shiny app responds in browsers while calls run", {
  skip_unless_proc()
  skip_unless_python("selenium")
  skip_if_not_installed("shiny")
  programs <- Sys.which(c("chromium", "chromedriver"))
  skip_if_not(all(nzchar(programs)), "there is no Chromium: programs chromium and chromedriver")
  child <- start_child({
    cl <- makeRustCluster(2)
    # Calls are at work until the browsers' script makes this file.
    wait_for <- function(file) while (!file.exists(file)) Sys.sleep(0.01)
    clusterExport(cl, "wait_for")
    ui <- shiny::fluidPage(
      lapply(c("count", "go", "cancel", "list", "fail"), function(id) shiny::actionButton(id, id)),
      lapply(c("counted", "result", "squares", "failed"), shiny::textOutput)
    )
    server <- function(input, output, session) {
      session$onSessionEnded(shiny::stopApp)
      output$counted <- shiny::renderText(paste("count:", input$count))
      # The session goes on: its outputs take what the call gives when that is there.
      result <- shiny::reactiveVal("none yet")
      call <- NULL
      shiny::observeEvent(input$go, {
        call <<- clusterSubmit(cl, {
          wait_for(file)
          "all done"
        }, file = file.path(dir, paste0("go", input$go)))
        result("at work")
        promises::then(promises::as.promise(call), result, function(error) result(class(error)[[1L]]))
        NULL
      })
      shiny::observeEvent(input$cancel, call$cancel())
      output$result <- shiny::renderText(result())
      # Outputs that are promises, for which Shiny has this session wait, and no other.
      output$squares <- shiny::renderText({
        shiny::req(input$list)
        squares <- clusterLapplyAsync(cl, 1:3, function(i, file) {
          wait_for(file)
          i^2
        }, file = file.path(dir, "list"))
        promises::then(squares, function(values) paste(unlist(values), collapse = " "))
      })
      output$failed <- shiny::renderText({
        shiny::req(input$fail)
        promises::as.promise(clusterSubmit(cl, stop("no such thing")))
      })
    }
    say("pids", paste(c(clusterPids(cl), agentPids(cl)), collapse = " "))
    shiny::runApp(shiny::shinyApp(ui, server), launch.browser = function(url) say("url", url))
  })
  url <- child_wait_for(child, "url")
  note_pids(child_pids(child, "pids"))
  home <- tempfile("browsers-")
  dir.create(home)
  on.exit(unlink(home, recursive = TRUE), add = TRUE, after = FALSE)
  ran <- run_python(env = c(paste0(c("HOME=", "TMPDIR="), home), "no_proxy=localhost,127.0.0.1"), lines = c(
    sprintf("%s = '%s'", c("url", "dir", "home", "chromium", "chromedriver"), c(url, child$dir, home, programs)),
    "from selenium import webdriver",
    "from selenium.webdriver.chrome.service import Service",
    "from selenium.webdriver.support.ui import WebDriverWait",
    "",
    "def browser(name):",
    "    options = webdriver.ChromeOptions()",
    "    options.binary_location = chromium",
    "    # Root has no sandbox. By the pipe Chromium sees the end of its driver, and ends, too.",
    "    for flag in ('headless', 'no-sandbox', 'disable-gpu', 'disable-component-update',",
    "                 'remote-debugging-pipe', f'user-data-dir={home}/{name}'):",
    "        options.add_argument('--' + flag)",
    "    return webdriver.Chrome(service=Service(chromedriver), options=options)",
    "",
    "def text(page, css): return page.find_element('css selector', css).text",
    "def click(page, button): page.find_element('id', button).click()",
    "def shows(page, css, what):",
    "    WebDriverWait(page, 60).until(lambda page: text(page, css) == what, f'{css} does not become: {what}')",
    "def counts(page):",
    "    n = int(text(page, '#counted').split()[1])",
    "    click(page, 'count')",
    "    shows(page, '#counted', f'count: {n + 1}')",
    "def let_go(file): open(f'{dir}/{file}', 'w').close()",
    "",
    "with browser('one') as one, browser('two') as two:",
    "    for page in one, two:",
    "        page.get(url)",
    "        shows(page, '#counted', 'count: 0')",
    "        shows(page, '#result', 'none yet')",
    "    # A call of one's: both go on.",
    "    click(one, 'go')",
    "    shows(one, '#result', 'at work')",
    "    for page in one, two, one, two: counts(page)",
    "    # An output of two's that is a promise: one goes on.",
    "    click(two, 'list')",
    "    shows(two, '#squares.recalculating', '')",
    "    counts(one)",
    "    counts(one)",
    "    assert text(two, '#squares') == ''",
    "    let_go('list')",
    "    shows(two, '#squares', '1 4 9')",
    "    for page in one, two: counts(page)",
    "    assert text(one, '#result') == 'at work'",
    "    let_go('go1')",
    "    shows(one, '#result', 'all done')",
    "    # Errors.",
    "    click(two, 'fail')",
    "    shows(two, '#failed.shiny-output-error', 'no such thing')",
    "    counts(two)",
    "    # One that is cancelled, and one after it.",
    "    click(one, 'go')",
    "    shows(one, '#result', 'at work')",
    "    click(one, 'cancel')",
    "    shows(one, '#result', 'rustcluster_cancelled')",
    "    let_go('go3')",
    "    click(one, 'go')",
    "    shows(one, '#result', 'all done')",
    "    counts(one)"
  ))
  expect(ran$status == 0L, paste(c(ran$output, child_report(child)), collapse = "\n"))
  # Its processes name the folder, or have it in their environment.
  knows <- function(pid) any(grepl(home, c(process_command(pid), process_command(pid, "environ")), fixed = TRUE))
  expect_gone(Filter(knows, all_pids()))
  expect_child_ends_well(child)
})

test_that("no process is left", {
  expect_no_leftovers()
})
