# Random calls and random kills of workers, checked against a plain list: the state and the random numbers
# that each worker would have if none had ever been killed. One seed is one sequence of calls and of kills,
# though not of their moments; a failure names it, and RUSTCLUSTER_SEED runs it alone.

watch_processes()

model_seed <- function(default) {
  seed <- Sys.getenv("RUSTCLUSTER_SEED")
  if (nzchar(seed)) as.integer(seed) else default
}

# What is checked of a worker, and of what the model holds for it. Not the values themselves, since answers
# of many megabytes are not what takes the time here.
fingerprint <- global(function(values) {
  lapply(values, function(x) c(length(x), sum(x), x[[1L]], x[[length(x)]]))
})

observe <- global(function(i, names, fingerprint) {
  there <- mget(names, globalenv(), ifnotfound = list(NULL))
  list(fingerprint(there[lengths(there) > 0L]), get0(".Random.seed", globalenv(), inherits = FALSE))
})

# The model of one worker: its variables, and the state of its random number generator.
model_draw <- function(worker, n) {
  assign(".Random.seed", worker$seed, globalenv())
  drawn <- runif(n)
  list(drawn = drawn, seed = get(".Random.seed", globalenv()))
}

# Kills workers from another process, after a while. `again`: also those that take their places, while they
# are being restored. Numbers that are of other processes by now are let be.
kill_later <- function(pids, agents, after, again) {
  children <- sprintf("$(cat %s 2>/dev/null)", children_files(agents))
  kill <- function(when) sprintf("for p in %s; do case ' %s ' in %s esac; done", children, when[[1L]], when[[2L]])
  those <- kill(c(paste(pids, collapse = " "), "*\" $p \"*) kill -9 $p;;"))
  if (again) {
    known <- unlist(lapply(agents, function(agent) scan(children_files(agent), 0L, quiet = TRUE)))
    others <- kill(c(paste(known, collapse = " "), "*\" $p \"*) ;; *) kill -9 $p;;"))
    those <- paste(those, "sleep 0.02", others, sep = "; ")
  }
  # There until it is done.
  mark <- tempfile("kill-")
  file.create(mark)
  system(sprintf("(sleep %.3f; %s; rm -f %s) 2>/dev/null", after, those, mark), wait = FALSE)
  mark
}

# Where the kernel tells the children of these.
children_files <- function(pids) paste(sprintf("/proc/%1$d/task/%1$d/children", pids), collapse = " ")

# Runs until so many workers have been killed. Returns what differs from the model, if anything does.
run_model <- function(kills, agents, start, seed) {
  old <- get0(".Random.seed", globalenv(), inherits = FALSE)
  on.exit({
    setTimeLimit()
    rm(list = intersect(c(model_names, ".Random.seed"), ls(globalenv(), all.names = TRUE)), envir = globalenv())
    if (!is.null(old)) assign(".Random.seed", old, globalenv())
  }, add = TRUE, after = FALSE)
  # Neither the model's generator nor those of the tests.
  set.seed(seed, kind = "Mersenne-Twister")
  choices <- get(".Random.seed", globalenv())
  chosen <- function(expr) {
    assign(".Random.seed", choices, globalenv())
    value <- expr
    choices <<- get(".Random.seed", globalenv())
    value
  }
  killed <- 0
  while (killed < kills) {
    # What lasts is done again after each kill, so that it has to be bounded.
    most <- min(40, kills - killed)
    outcome <- run_one_model(most, agents, start, chosen)
    if (is.character(outcome)) {
      return(sprintf("%s (seed %d, %d agents, %s, after %d kills)", outcome, seed, agents, start, killed))
    }
    killed <- killed + outcome
  }
  NULL
}

model_names <- c("a", "b", "c", "count")

run_one_model <- function(kills, agents, start, chosen) {
  hosts <- lapply(seq_len(agents), function(threads) {
    list(host = "localhost", ncore = if (agents == 1L) 4L else 2L, threads = threads, start_method = start)
  })
  # With a limit of memory, answers go through the agent instead of shared memory.
  limit <- chosen(if (runif(1) < 0.3) 4e9 else Inf)
  cl <- makeRustCluster(hosts, retries = 100, memory_limit = limit)
  on.exit(stop_quietly(cl), add = TRUE, after = FALSE)
  n <- length(cl)
  clusterEvalQ(cl, count <- 0)
  clusterSetRNGStream(cl, 1)
  streams <- function(seed) {
    RNGkind("L'Ecuyer-CMRG")
    set.seed(seed)
    state <- get(".Random.seed", globalenv())
    Reduce(function(s, i) parallel::nextRNGStream(s), seq_len(n - 1L), state, accumulate = TRUE)
  }
  model <- lapply(streams(1), function(seed) list(vars = list(count = 0), seed = seed))
  killed <- 0
  mark <- tempfile("kill-")
  last <- "the start"
  call <- function(expr) {
    # A call that hangs is an error, too.
    setTimeLimit(elapsed = 120, transient = TRUE)
    on.exit(setTimeLimit(), add = TRUE, after = FALSE)
    with_losses(expr)$value
  }
  failure <- tryCatch({
    while (killed < kills) {
      plan <- chosen(list(
        what = sample(c("export", "assign", "count", "draw", "task", "streams"), 1L, prob = c(1, 3, 2, 1, 1, 1)),
        # Of 8 bytes: 0.25 to 4 MB. From 2 MB on answers go through shared memory.
        length = sample(c(32000L, 130000L, 270000L, 500000L), 1L),
        value = sample.int(1e6L, 1L), name = sample(c("a", "b", "c"), 1L),
        nodes = if (runif(1) < 0.7) seq_len(n) else sort(sample.int(n, sample.int(n, 1L))),
        victims = if (runif(1) < 0.6) sample.int(n, sample(c(1L, sample.int(n, 1L), n), 1L)),
        after = sample(c(0, 0, 0.001, 0.005, 0.02, 0.05), 1L), again = runif(1) < 0.2
      ))
      last <- plan$what
      # A worker that is killed while it starts, three times in a row, is lost for some time.
      if (!wait_until(function() !file.exists(mark), 30)) stop("workers are not being killed")
      call(clusterApply(cl, seq_len(n), identity))
      pids <- clusterPids(cl)[plan$victims]
      if (length(pids)) {
        mark <- kill_later(pids, agentPids(cl), plan$after, plan$again)
        if (plan$after == 0) wait_until(function() !any(alive(pids)), 5)
      }
      nodes <- cl[plan$nodes]
      value <- plan$value + as.numeric(seq_len(plan$length))
      set <- function(name, value) {
        for (i in plan$nodes) model[[i]]$vars[[name]] <<- value
      }
      draw <- function(got, n) {
        for (k in seq_along(plan$nodes)) {
          want <- model_draw(model[[plan$nodes[[k]]]], n)
          model[[plan$nodes[[k]]]]$seed <<- want$seed
          if (!identical(got[[k]], want$drawn)) stop("other random numbers")
        }
      }
      switch(plan$what,
        export = {
          assign(plan$name, value, globalenv())
          call(clusterExport(nodes, plan$name))
          set(plan$name, value)
        },
        assign = {
          got <- call(clusterCall(nodes, function(name, from, n) {
            value <- from + as.numeric(seq_len(n))
            assign(name, value, globalenv())
            value
          }, plan$name, plan$value, plan$length))
          if (!all(vapply(got, identical, NA, value))) stop("another value")
          set(plan$name, value)
        },
        count = {
          # To be done as often as it was asked for.
          got <- call(clusterEvalQ(nodes, {
            count <- count + 1
            numeric(3e5) + count
          }))
          for (k in seq_along(plan$nodes)) {
            i <- plan$nodes[[k]]
            model[[i]]$vars$count <- model[[i]]$vars$count + 1
            if (got[[k]][[3e5]] != model[[i]]$vars$count) stop("another count")
          }
        },
        draw = draw(call(clusterEvalQ(nodes, runif(5))), 5),
        task = draw(call(clusterApply(nodes, plan$nodes, function(i) runif(7))), 7),
        streams = {
          call(clusterSetRNGStream(nodes, plan$value))
          fresh <- streams(plan$value)
          for (k in seq_along(plan$nodes)) model[[plan$nodes[[k]]]]$seed <- fresh[[k]]
        }
      )
      seen <- call(clusterApply(cl, seq_len(n), observe, model_names, fingerprint))
      for (i in seq_len(n)) {
        vars <- model[[i]]$vars
        if (!identical(seen[[i]][[1L]], fingerprint(vars[intersect(model_names, names(vars))]))) {
          stop("worker ", i, " has another state")
        }
        if (!identical(seen[[i]][[2L]], model[[i]]$seed)) stop("worker ", i, " has other random numbers")
      }
      killed <- sum(clusterStatus(cl, memory = FALSE)$losses)
    }
    NULL
  }, error = function(e) paste0(conditionMessage(e), " at ", last))
  if (is.null(failure)) killed else failure
}

for (start in c("fork", "spawn")) for (agents in 1:3) {
  test_that(paste("random kills of workers, of", agents, "agents, start_method =", start), {
    skip_unless_proc()
    kills <- if (long_tests()) 500 else if (start == "fork") 8 else if (agents == 2) 3 else skip("long")
    seed <- model_seed(if (long_tests()) 1000L * agents else agents)
    message("seed ", seed)
    expect_null(run_model(kills, agents, start, seed))
  })
}
