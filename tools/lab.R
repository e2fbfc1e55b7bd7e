# Runs a bench with five hosts in network namespaces of this machine (as root):
#   Rscript tools/lab.R             inst/bench/hosts.R
#   Rscript tools/lab.R head        inst/bench/head.R
#   Rscript tools/lab.R soak ...    inst/bench/soak.R with these arguments; links are cut, too
helpers <- c("helper-oracle.R", "helper-ssh.R", "helper-process.R", "helper-lab.R")
for (file in file.path("tests/testthat", helpers)) source(file)

bench <- function(arguments) {
  lab <- local_lab(5)
  ssh <- paste(lab$rshcmd, collapse = " ")
  # Adds the host to the known hosts.
  for (host in lab$hosts) run(ssh, host, "true")
  ways <- c(paste0("ssh=", ssh), paste0("rlibs=", .libPaths()[[1L]]))
  if (identical(arguments[1L], "soak")) {
    link <- sub("1$", "%d", lab_link(1))
    script <- "inst/bench/soak.R"
    ways <- c(ways, paste0("cut=ip link set ", link, " down"), paste0("mend=ip link set ", link, " up"),
              arguments[-1L])
  } else if (identical(arguments[1L], "head")) {
    script <- "inst/bench/head.R"
    ways <- c(ways, arguments[-1L])
  } else {
    script <- "inst/bench/hosts.R"
    ways <- c(ways, "master=10.99.1.1")
  }
  system2("Rscript", c(script, shQuote(ways), lab$hosts))
}
quit(status = bench(commandArgs(trailingOnly = TRUE)))
