# A stand-in for ssh starts the agent of a host once the file of its name is there, so that a test decides when a host
# joins. Returns the command (`ssh`), and functions that let hosts start (`open`) or fail with a text (`fail`).
gates <- function(.frame = parent.frame()) {
  dir <- tempfile("gates-")
  dir.create(dir)
  # ssh's arguments are options, the host, and the command.
  ssh <- file.path(dir, "ssh")
  writeLines(c(
    "#!/bin/bash", "host=${@: -2:1} command=${@: -1}",
    sprintf("while [ ! -e '%s'/\"$host\" ]; do [ -e '%s/ssh' ] || exit 1; sleep 0.02; done", dir, dir),
    sprintf("[ -s '%s'/\"$host\" ] && { cat '%s'/\"$host\" >&2; exit 255; }", dir, dir),
    "exec sh -c \"$command\""
  ), ssh)
  Sys.chmod(ssh, "755")
  do.call("on.exit", list(bquote(unlink(.(dir), recursive = TRUE)), add = TRUE, after = FALSE), envir = .frame)
  list(ssh = ssh, open = function(...) for (host in c(...)) file.create(file.path(dir, host)),
       fail = function(host, text) writeLines(text, file.path(dir, host)))
}
