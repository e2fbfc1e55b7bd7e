# Five machines on this one: a network namespace for each, with a link, a host name and an sshd of its own, with
# sshd's default settings. Host i is 10.99.i.2. `lab_link(i)` is the interface at the near end of its link,
# which can be counted, slowed down and cut.

skip_without_lab <- function() {
  skip_unless_long()
  skip_without_sshd()
  if (Sys.info()[["effective_user"]] != "root") skip("network namespaces take root")
  if (!nzchar(Sys.which("ip"))) skip("there is no ip")
}

lab_link <- function(i) paste0("rclab", i)
lab_host <- function(i) paste0("10.99.", i, ".2")

run <- function(...) {
  status <- system(paste(...))
  if (status != 0L) stop("failed: ", paste(...))
}

# Returns `rshcmd` and the addresses of the hosts. The lab ends with the calling frame.
local_lab <- function(n = 5, .frame = parent.frame()) {
  # A run that was killed may have left a lab.
  end_lab(n)
  # The sshds run for other users, which read the files in this folder.
  dir <- tempfile("rclab-", dirname(tempdir()))
  dir.create(dir, mode = "0755")
  path <- function(name) file.path(dir, name)
  do.call("on.exit", list(bquote({
    end_lab(.(n))
    unlink(.(dir), recursive = TRUE)
  }), add = TRUE, after = TRUE), envir = .frame)
  for (key in c("host_key", "key")) {
    system2("ssh-keygen", c("-q", "-t", "ed25519", "-N", "''", "-f", path(key)))
  }
  file.copy(path("key.pub"), path("authorized_keys"))
  writeLines(c(
    "Port 22", paste("HostKey", path("host_key")),
    paste("AuthorizedKeysFile", path("authorized_keys")),
    "StrictModes no", "UsePAM no", "PermitRootLogin yes", "PasswordAuthentication no"
  ), path("sshd_config"))
  writeLines(c(
    "Host *", paste(" IdentityFile", path("key")), " IdentitiesOnly yes",
    paste(" UserKnownHostsFile", path("known_hosts")), " StrictHostKeyChecking accept-new",
    " LogLevel ERROR"
  ), path("ssh_config"))
  dir.create("/run/sshd", FALSE)
  for (i in seq_len(n)) {
    space <- paste0("rclab", i)
    run("ip netns add", space)
    run("ip link add", lab_link(i), "type veth peer name eth0 netns", space)
    run("ip addr add", paste0("10.99.", i, ".1/24"), "dev", lab_link(i))
    run("ip link set", lab_link(i), "up")
    run("ip -n", space, "addr add", paste0(lab_host(i), "/24"), "dev eth0")
    run("ip -n", space, "link set eth0 up")
    run("ip -n", space, "link set lo up")
    # PSOCK workers have to reach all addresses of this machine.
    run("ip -n", space, "route add default via", paste0("10.99.", i, ".1"))
    # `ip netns exec` would hide the cgroups.
    run(
      "nsenter --net=/run/netns/", space, " unshare --uts sh -c 'hostname host", i, "; ",
      sshd_path(), " -f ", path("sshd_config"), " -o PidFile=", path(paste0("pid", i)), " -E ",
      path(paste0("log", i)), "'", sep = ""
    )
  }
  for (i in seq_len(n)) wait_until(function() file.exists(path(paste0("pid", i))))
  list(
    rshcmd = c("ssh", "-F", path("ssh_config")), hosts = vapply(seq_len(n), lab_host, ""), dir = dir
  )
}

end_lab <- function(n) {
  for (i in seq_len(n)) {
    space <- paste0("rclab", i)
    if (!file.exists(file.path("/run/netns", space))) next
    # Kill the sshd, its sessions, and their leftovers.
    system(paste("ip netns pids", space, "| xargs -r kill -9"))
    system(paste("ip netns del", space))
    system(paste("ip link del", lab_link(i), "2>/dev/null"))
  }
}

# Returns the processes of all hosts except the sshds.
lab_pids <- function(n = 5) {
  pids <- unlist(lapply(seq_len(n), function(i) {
    as.integer(system(paste0("ip netns pids rclab", i), intern = TRUE))
  }))
  name <- vapply(pids, function(pid) {
    file <- sprintf("/proc/%d/comm", pid)
    tryCatch(suppressWarnings(readLines(file)), error = function(e) "")
  }, "")
  pids[!name %in% c("", "sshd")]
}

# Returns the bytes that were sent to the hosts, and received from them.
lab_bytes <- function(hosts) {
  read <- function(i, name) {
    as.numeric(readLines(file.path("/sys/class/net", lab_link(i), "statistics", name)))
  }
  c(to = sum(vapply(hosts, read, 0, "tx_bytes")), from = sum(vapply(hosts, read, 0, "rx_bytes")))
}

over_lab <- function(lab, spec, ..., .frame = parent.frame()) {
  local_cluster(spec, rshcmd = lab$rshcmd, rlibs = .libPaths(), ..., .frame = .frame)
}
