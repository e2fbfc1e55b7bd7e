# clusterDashboard(): a page in the browser that the hub's thread serves. The page is
# src/rust/core/src/head/dashboard/page.html. top.R shows the same figures as text.

#' A page in the browser with what a cluster or a run is doing
#'
#' Opens a page that shows, live, whether all is well, how far the running call is and how long it still takes,
#' what each worker is doing and has done over time, the hosts, memory and data sent, calls that wait, stored
#' results (`.store` of [clusterLapply()]), batch jobs, exports with their sizes, and failures with the last output
#' of the worker: errors of tasks, time limits, and failures of workers and hosts. An error appears when the task raises
#' it, before this session receives it. The page is live while this session is busy: a thread of the cluster serves it,
#' not R.
#'
#' Errors that a package catches on the worker and returns as values do not appear: those of BiocParallel, of doParallel
#' and of `plan(cluster)`. Those of `%dopar%` with [registerDoRustCluster()] and of [cluster_rust()] do.
#'
#' The page needs no network and no package. It can be used with the keyboard, and has a dark and a light form. Any
#' number of pages can be open at once. While no page is open, nothing is collected for it, and nothing runs.
#'
#' The address contains a random token, and works only until the cluster is stopped or its session ends. A page that is
#' left open then shows that, with the last figures, and whether the workers wait for the next session (`linger` of
#' [makeRustCluster()]). By default, only programs on this machine can connect, and
#' only those that know the token see anything. From another machine, forward the port:
#' `ssh -L 8787:127.0.0.1:PORT user@@this-machine`, and replace the port in the address by 8787. In RStudio Server, the
#' page opens in the viewer, through RStudio's own connection.
#'
#' `parLapply()` and `parSapply()` send chunks of elements. They count elements if a page is open when they begin, which
#' takes about 1 microsecond an element, and chunks if none is.
#'
#' Memory of workers is measured every 10 to 60 seconds while a page is open, because measuring takes their hosts some
#' 0.3 ms for each worker.
#'
#' @param cl A cluster made by [makeRustCluster()], or a part of one: the page shows the whole cluster. Or a run that is
#'   being computed on this machine, as [startRun()] and [openRun()] return it: the page shows the cluster of its
#'   runner.
#' @param browse (logical) Whether to show the page in the viewer of the front end, or else in the browser
#'   ([utils::browseURL()]). `FALSE`: only return its address.
#' @param host (character) The address or name of this machine at which the page can be reached. With an address that
#'   other machines reach, such as `"0.0.0.0"`, everybody who learns the token sees the page, and the connection is not
#'   encrypted: there is a warning.
#' @param port (integer) The port; default: any free one.
#' @return The address of the page (character), invisibly if `browse` is `TRUE`. Calling the function again returns the
#'   same address, unless `host` or `port` is another one: the page then moves, and its old address does not work any
#'   more.
#' @section Errors:
#' `rustcluster_bad_argument`, `rustcluster_forked`, `rustcluster_restored`; `rustcluster_stopped`, also for a run that
#' has ended; `rustcluster_dashboard_failed`: the port is not free, the address is none of this machine's, or the runner
#' of a run does not answer. Warning: `rustcluster_dashboard_exposed`.
#' @seealso [clusterTop()] for the same in a terminal, [clusterStatus()], [clusterTimeline()]
#' @examples
#' cl <- makeRustCluster(2)
#' address <- clusterDashboard(cl, browse = FALSE)
#' parallel::stopCluster(cl)
#' @export
clusterDashboard <- function(cl, browse = interactive(), host = "127.0.0.1", port = 0) {
  handle <- if (!isRunObject(cl)) clusterHandle(cl)
  if (!isTRUE(browse) && !isFALSE(browse)) badArgument("browse", "must be TRUE or FALSE")
  host <- plain(host)
  if (!is.character(host) || length(host) != 1L || !isTRUE(grepl("^[]A-Za-z0-9_.:[-]+$", host))) {
    badArgument("host", "must be one address or name of this machine")
  }
  port <- plain(port)
  between(port, "port", "a port, or 0 for any free one", 0, 65535)
  if (port != round(port)) badArgument("port", "must be a whole number")
  if (is.null(handle)) {
    shown <- pageOfRun(cl, host, port)
    allow <- function(name) askRunner(cl, list(what = "allow", name = name))
  } else {
    if (isTRUE(handle$stopped)) raiseFailure(rustFailure("stopped"), handle)
    shown <- pageOf(handle, host, port)
    allow <- function(name) allowPage(handle, name)
  }
  address <- throughProxy(shown$local, allow)
  if (!browse) return(address)
  showPage(shown$local, address)
  invisible(address)
}

# Returns the page of a cluster: a list of `host`, `port` and its address on this machine (`local`).
pageOf <- function(handle, host, port) {
  shown <- handle$dashboard
  if (is.null(shown) || shown$host != host || !port %in% c(0, shown$port)) {
    shown <- openDashboard(handle, host, as.integer(port))
  }
  reportJobs(handle, now = TRUE)
  shown
}

# Returns the page of the cluster of a run, which its runner serves.
pageOfRun <- function(run, host, port) {
  where <- runnerState(run$dir)$host
  if (host %in% c("127.0.0.1", "localhost", "::1", "[::1]") && !is.na(where) && where != thisHost()) {
    badArgument(
      "cl", "is a run on the machine ", sQuote(where), ": call clusterDashboard() there, or give an address of that ",
      "machine as `host`"
    )
  }
  answer <- askRunner(run, list(what = "dashboard", host = host, port = port))
  if (!is.null(answer$warned)) warning(answer$warned)
  answer$shown
}

# Shows the page in the viewer, or else in a browser. A session over ssh may have no browser: the address is printed.
showPage <- function(local, address) {
  viewer <- getOption("viewer")
  # RStudio's viewer finds the way to a local address by itself.
  show <- if (is.function(viewer)) function() viewer(local) else {
    message("The dashboard is at ", address)
    function() utils::browseURL(address)
  }
  tryCatch(show(), error = function(e) {
    what <- if (is.function(viewer)) paste("The dashboard is at", address, "- its viewer") else "The browser"
    message(what, " could not be started: ", conditionMessage(e))
  })
}

# Opens the page of a cluster: see pageOf().
openDashboard <- function(handle, host, port) {
  own <- Sys.info()[["nodename"]]
  opened <- hub_dashboard_open(handle$pointer, host, port, own)
  if (isFailure(opened) && opened[["kind"]] == "dashboard_failed") {
    abort(
      "dashboard_failed", "the dashboard could not be opened at ", host, if (port) paste(" port", port), ": ",
      opened[["reason"]], "; choose another `port` or `host`", fields = list(host = host, port = port)
    )
  }
  opened <- checked(opened, handle)
  name <- if (host %in% c("0.0.0.0", "::", "[::]")) own else host
  if (grepl(":", name, fixed = TRUE) && !startsWith(name, "[")) name <- paste0("[", name, "]")
  local <- paste0("http://", name, ":", opened$port, "/", opened$token, "/")
  shown <- list(host = host, port = opened$port, local = local)
  handle$dashboard <- shown
  if (!opened$loopback) {
    warning(rustclusterCondition(
      "dashboard_exposed", paste0(
        "other machines can reach the dashboard at ", host, ": everybody who learns its address sees what the cluster ",
        "is doing, and the connection is not encrypted; use the default `host` and forward the port by ssh"
      ),
      host = host, port = opened$port, type = "warning"
    ))
  }
  shown
}

# Returns the address at which a browser reaches the page: RStudio Server passes requests on. `allow`: a function that
# allows requests under another name of the host.
throughProxy <- function(address, allow) {
  is_server <- identical(Sys.getenv("RSTUDIO_PROGRAM_MODE"), "server")
  if (!is_server || !requireNamespace("rstudioapi", quietly = TRUE)) return(address)
  translated <- tryCatch(rstudioapi::translateLocalUrl(address, absolute = TRUE), error = function(e) NULL)
  if (!is.character(translated) || length(translated) != 1L || !isTRUE(startsWith(translated, "http"))) return(address)
  # The proxy may pass on the name by which the browser knows it.
  name <- sub("^https?://(\\[[^]]*\\]|[^/:]*).*$", "\\1", translated)
  allow(gsub("[][]", "", name))
  translated
}

allowPage <- function(handle, name) checked(hub_dashboard_allow(handle$pointer, name), handle)

# Tells the hub what the engine says of batch jobs, while a page is open. Never waits for the engine.
reportJobs <- function(handle, now = FALSE) {
  if (!length(handle$batches) || !isTRUE(hub_watched(handle$pointer)) && !now) return(invisible())
  time <- proc.time()[["elapsed"]]
  if (!now && time - handle$reported < 2) return(invisible())
  handle$reported <- time
  for (batch in handle$batches) if (!isTRUE(batch$submitting)) queryJobs(batch)
  jobs <- jobsOfHosts(handle)
  hosts <- which(!is.na(jobs$job))
  states <- ifelse(is.na(jobs$state[hosts]), "unknown", jobs$state[hosts])
  checked(hub_batch_jobs(handle$pointer, hosts, as.character(jobs$job[hosts]), as.character(states)), handle)
  invisible()
}
