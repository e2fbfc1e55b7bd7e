# Clusters whose agents dial back, started by hand as a batch engine starts them.

# The key of launcher 1, in hexadecimal.
dial_key <- strrep("0123456789abcdef", 4)

# Returns a new cluster's handle and port; `hosts` hosts wait for an agent of launcher 1.
dial_head <- function(hosts = 1L, workers = 2L, key = dial_key) {
  package <- asNamespace("rustcluster")
  options <- package$clusterOptions(list())
  defaults <- list(
    rscript_envs = package$variables(NULL), threads = 1L, renice = options$renice, start_method = "fork"
  )
  asked <- package$specHosts(list(list(host = "localhost", ncore = workers)), defaults)
  here <- package$hostLaunch(asked$hosts[[1L]], options)
  asked$hosts <- lapply(seq_len(hosts), function(i) {
    host <- asked$hosts[[1L]]
    host$host <- paste0("slot", i)
    host$local <- FALSE
    host
  })
  asked$owner <- seq_len(hosts)
  asked$workers <- rep(as.integer(workers), hosts)
  launches <- lapply(asked$hosts, function(host) list(host = host$host, dial = 1L, worker = here$worker))
  pointer <- package$checked(package$hub_start(
    launches, package$buildText(), package$rVersionText(), R.version$platform, 2^29
  ))
  handle <- package$newHandle(pointer, asked$hosts)
  handle$retries <- 2
  package$checked(package$hub_policy(pointer, 0, 2, FALSE))
  handle$reconnect <- FALSE
  handle$timeout <- Inf
  handle$stopTimeout <- 5
  port <- package$checked(package$hub_listen(pointer, "127.0.0.1", 0L, 0L, key))$port
  list(handle = handle, asked = asked, launches = launches, here = here, port = port)
}

# Waits for the agents of a head and returns its cluster.
dial_cluster <- function(head, packages = character()) {
  package <- asNamespace("rustcluster")
  deadline <- proc.time()[["elapsed"]] + 60
  deadline <- package$greetHosts(head$handle, head$asked, deadline, 60, FALSE, FALSE, Inf)
  plans <- package$hostPlans(head$handle, head$asked, head$launches, list(
    packages = packages, outfile = "/dev/null", heartbeat_timeout = 20, setup = 60, setup_log_limit = NULL,
    memory = 0, stop_timeout = 5
  ))
  package$checked(package$hub_go(head$handle$pointer, plans, Inf))
  head$handle$alive <- package$awaitStart(head$handle, deadline, 60, FALSE)
  package$newCluster(head$handle, head$handle$alive)
}

# Starts an agent. Returns the paths of its log and of the file with its exit status, which exists once it has ended,
# and of the file with its pid.
dial_agent <- function(head, key = dial_key, address = "127.0.0.1", port = head$port, mode = "0600") {
  dir <- tempfile("dial-")
  dir.create(dir)
  path <- function(name) file.path(dir, name)
  writeLines(c(paste("address", address, port), "launcher 1", paste("key", key)), path("dial"))
  Sys.chmod(path("dial"), mode, use_umask = FALSE)
  command <- sub("agentMain", "dialMain", head$here$command, fixed = TRUE)
  env <- c(head$here$env, RUSTCLUSTER_DIAL = path("dial"))
  script <- paste0(
    "sh -c 'echo $$ >", path("pid"), "; exec \"$@\"' sh env ",
    paste(shQuote(paste0(names(env), "=", env)), collapse = " "), " ", paste(shQuote(command), collapse = " "),
    " >", path("log"), " 2>&1 </dev/null; echo $? >", path("ended"), "; mv ", path("ended"), " ", path("status")
  )
  writeLines(script, path("script"))
  system2("sh", path("script"), wait = FALSE)
  list(log = path("log"), status = path("status"), pid = path("pid"), dial = path("dial"))
}

# Waits for the end of an agent. Returns its status and its log.
dial_ended <- function(agent, timeout = 60) {
  ended <- wait_until(function() file.exists(agent$status), timeout = timeout)
  if (!ended) stop("the agent has not ended: ", paste(readLines(agent$log), collapse = "\n"))
  list(status = as.integer(readLines(agent$status)), log = paste(readLines(agent$log), collapse = "\n"))
}

# Returns the pids of the relays whose memory shows the path of this agent's file.
dial_relays <- function(agent) {
  pids <- list.files("/proc", "^[0-9]+$")
  is_relay <- vapply(pids, function(pid) {
    name <- tryCatch(readLines(file.path("/proc", pid, "comm")), error = function(e) "", warning = function(w) "")
    if (!identical(name, "rustcluster-rly")) return(FALSE)
    env <- tryCatch(readBin(file.path("/proc", pid, "environ"), "raw", 1e5), error = function(e) raw(), warning = function(w) raw())
    grepl(agent$dial, rawToChar(env[env != 0]), fixed = TRUE)
  }, NA)
  as.integer(pids[is_relay])
}
