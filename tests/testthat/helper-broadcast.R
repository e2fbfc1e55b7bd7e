# clusterCall() that is no set-up call, so that the message is dropped once all nodes have answered. `setup_key`: makes
# it a set-up call that sets the variable of this name.
broadcast <- function(cl, fun, ..., setup_key = NULL) {
  call <- list(fun = fun, args = list(...), return = TRUE, tag = NULL)
  rustcluster:::callAll(cl, list(type = "EXEC", data = call, tag = NULL), setup_key)
}

broadcast_export <- function(cl, name, value) {
  broadcast(cl, rustcluster:::parallels$gets, name, value, setup_key = name)
}

# Returns for each process how many pieces of shared memory it has open, and how many it has mapped.
shared_memory <- function(pids) {
  of <- function(pid) {
    targets <- Sys.readlink(list.files(sprintf("/proc/%d/fd", pid), full.names = TRUE))
    maps <- readLines(sprintf("/proc/%d/maps", pid))
    c(open = sum(grepl("memfd:rustcluster", targets)), mapped = sum(grepl("memfd:rustcluster", maps)))
  }
  vapply(pids, of, c(open = 0L, mapped = 0L))
}

# Returns whether, after garbage collections, no worker has shared memory open, nor more than `max` pieces mapped.
only_mapped <- function(cl, max) {
  # From R 4.6 on, a mapping ends in the second collection.
  broadcast(cl, gc)
  broadcast(cl, gc)
  wait_until(function() {
    now <- shared_memory(clusterPids(cl))
    all(now["open", ] == 0L) && all(now["mapped", ] <= max)
  }, timeout = 10)
}
