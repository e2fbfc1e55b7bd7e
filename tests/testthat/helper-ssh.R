# An sshd of this test, on a free port, with keys of its own. Its hosts are addresses of the loopback: 127.0.0.2
# to 127.0.0.9 count as other machines.

sshd_path <- function() {
  found <- Sys.which("sshd")
  if (nzchar(found)) found[[1L]] else if (file.exists("/usr/sbin/sshd")) "/usr/sbin/sshd" else ""
}

skip_without_sshd <- function() {
  skip_on_cran()
  if (!nzchar(sshd_path())) skip("there is no sshd")
  if (Sys.info()[["sysname"]] != "Linux") skip("only Linux has all of 127.0.0.0/8")
}

# Sessions of tests that run at the same time look in other places, whatever their seeds are.
ports <- new.env(parent = emptyenv())
ports$last <- Sys.getpid() * 97L

free_port <- function() {
  for (i in 1:50) {
    ports$last <- ports$last + 1L
    port <- 20000L + as.integer(ports$last %% 12000L)
    socket <- tryCatch(serverSocket(port), error = function(e) NULL)
    if (!is.null(socket)) {
      close(socket)
      return(port)
    }
  }
  stop("no free port found")
}

# Returns `rshcmd` and the folder. The sshd ends with the calling frame. `config`: further lines of its configuration.
local_sshd <- function(.frame = parent.frame(), config = character()) {
  dir <- tempfile("sshd-")
  dir.create(dir, mode = "0700")
  path <- function(name) file.path(dir, name)
  for (key in c("host_key", "key")) {
    system2("ssh-keygen", c("-q", "-t", "ed25519", "-N", "''", "-f", path(key)))
  }
  file.copy(path("key.pub"), path("authorized_keys"))
  port <- free_port()
  writeLines(c(
    paste("Port", port), "ListenAddress 0.0.0.0", paste("HostKey", path("host_key")),
    paste("AuthorizedKeysFile", path("authorized_keys")), paste("PidFile", path("pid")),
    "StrictModes no", "UsePAM no", "PermitRootLogin yes", "PasswordAuthentication no", config
  ), path("sshd_config"))
  writeLines(c(
    "Host *", paste(" Port", port), paste(" IdentityFile", path("key")), " IdentitiesOnly yes",
    paste(" UserKnownHostsFile", path("known_hosts")), " StrictHostKeyChecking accept-new",
    " LogLevel ERROR"
  ), path("ssh_config"))
  if (Sys.info()[["effective_user"]] == "root") dir.create("/run/sshd", FALSE)
  status <- system2(sshd_path(), c("-f", path("sshd_config"), "-E", path("log")))
  if (status != 0L) skip(paste("sshd did not start:", paste(readLines(path("log")), collapse = "; ")))
  wait_until(function() isTRUE(file.size(path("pid")) > 0))
  pid <- as.integer(readLines(path("pid")))
  do.call("on.exit", list(bquote({
    tools::pskill(.(pid))
    unlink(.(dir), recursive = TRUE)
  }), add = TRUE, after = TRUE), envir = .frame)
  list(rshcmd = c("ssh", "-F", path("ssh_config")), dir = dir, pid = pid)
}

# Returns a cluster over that sshd, whose hosts find the package in the library of this session.
over_ssh <- function(ssh, spec, ..., .frame = parent.frame()) {
  local_cluster(spec, rshcmd = ssh$rshcmd, rlibs = .libPaths(), ..., .frame = .frame)
}
