# clusterCall() whose effect does not last, so that nobody keeps what is sent once all have answered, or which sets a
# variable of this name (`lasts`).
broadcast <- function(cl, fun, ..., lasts = NULL) {
  call <- list(fun = fun, args = list(...), return = TRUE, tag = NULL)
  rustcluster:::callAll(cl, list(type = "EXEC", data = call, tag = NULL), lasts)
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
