# The same call on all nodes through hub_broadcast(), as a verb would do it: its job is open for as
# long as this runs. `lasts`: the name of what it sets, "" or NULL.
broadcast <- function(cl, fun, ..., lasts = NULL) {
  package <- asNamespace("rustcluster")
  handle <- cl[[1L]][["handle"]]
  ranks <- vapply(cl, function(node) as.integer(node[["rank"]]), 0L)
  handle$jobs <- handle$jobs + 1
  job <- handle$job <- handle$jobs
  handle$frames <- sys.nframe() + 5L
  handle$depth <- sys.nframe()
  assign(handle$id, sys.frame(sys.nframe()), package$openFrames)
  on.exit(package$closeJob(handle, job))
  call <- list(fun = fun, args = list(...), return = TRUE, tag = NULL)
  sent <- package$hub_broadcast(
    handle$pointer, ranks, job, list(type = "EXEC", data = call, tag = NULL), lasts
  )
  if (typeof(sent) == "character") package$handleFailed(sent, handle)
  if (!is.null(sent)) package$unwound(sent)
  lapply(cl, parallel:::recvResult)
}

broadcast_export <- function(cl, name, value) {
  broadcast(cl, rustcluster:::parallels$gets, name, value, lasts = name)
}

# Of a process: how many pieces of shared memory it has open, and mapped.
shared_memory <- function(pids) {
  of <- function(pid) {
    targets <- Sys.readlink(list.files(sprintf("/proc/%d/fd", pid), full.names = TRUE))
    maps <- readLines(sprintf("/proc/%d/maps", pid))
    c(open = sum(grepl("memfd:rustcluster", targets)), mapped = sum(grepl("memfd:rustcluster", maps)))
  }
  vapply(pids, of, c(open = 0L, mapped = 0L))
}

# Whether no worker has shared memory open, nor more of it mapped than `most` values once those that it
# does not use any more have been collected.
only_mapped <- function(cl, most) {
  # From R 4.6 on it takes two collections.
  broadcast(cl, gc)
  broadcast(cl, gc)
  wait_until(function() {
    now <- shared_memory(clusterPids(cl))
    all(now["open", ] == 0L) && all(now["mapped", ] <= most)
  }, timeout = 10)
}
