# Runs inst/bench/hosts.R with five hosts in network namespaces of this machine (as root):
#   Rscript tools/lab.R
helpers <- c("helper-ssh.R", "helper-process.R", "helper-lab.R")
for (file in file.path("tests/testthat", helpers)) source(file)

bench <- function() {
  lab <- local_lab(5)
  ssh <- paste(lab$rshcmd, collapse = " ")
  # A host is known from the first connection on.
  for (host in lab$hosts) run(ssh, host, "true")
  libs <- .libPaths()[[1L]]
  system2("Rscript", c(
    "inst/bench/hosts.R", shQuote(paste0("ssh=", ssh)), "master=10.99.1.1",
    shQuote(paste0("rlibs=", libs)), lab$hosts
  ))
}
quit(status = bench())
