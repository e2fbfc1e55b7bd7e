# Measures the memory that the machine of this session needs, with workers on other hosts, over ssh: whether a
# small head (for example a Raspberry Pi) suffices.
#
#   Rscript head.R [ssh="ssh -F file"] [rlibs=folder] [workers=320] host1 host2 ...
#
# For the hosts see hosts.R. In a checkout, `Rscript tools/lab.R head` runs this script with five hosts in
# network namespaces.

here <- sub("^--file=", "", grep("^--file=", commandArgs(), value = TRUE))
here <- if (length(here)) dirname(here[1L]) else system.file("bench", package = "rustcluster")
source(file.path(here, "helpers.R"))

hosts <- positional()
if (!length(hosts)) stop("usage: Rscript head.R [ssh=...] [rlibs=...] [workers=...] host1 host2 ...")
many <- as.integer(option("workers", "320"))

me <- Sys.getpid()
megabytes <- function(x) sprintf("%.0f MB", x)
now <- function(what) {
  gc()
  clients <- as.integer(suppressWarnings(system2("pgrep", c("-P", me, "-x", "ssh"), stdout = TRUE)))
  ssh <- if (length(clients)) sum(pss(clients), na.rm = TRUE) else 0
  cat(sprintf("  %-46s %10s %10s\n", what, megabytes(pss(me)), megabytes(ssh)))
}
# `keeps`: bytes of the result, which belongs to the user.
most <- function(what, code, keeps = 0) {
  gc()
  time <- system.time(grown <- peak_growth(code))[["elapsed"]]
  cat(sprintf("  %-46s %10s of these the result: %s, in %.1f s\n", what, megabytes(grown),
              megabytes(keeps / 2^20), time))
}

describe_machine()
cat("\nPSS                                                     session        ssh\n")
now("R, parallel")
suppressPackageStartupMessages(library(rustcluster))
now("with rustcluster loaded")
most("most it grows by: start", {
  cl <- makeRustCluster(rep(hosts, length.out = many), rshcmd = option("ssh", "ssh"), rlibs = option("rlibs"))
})
now(sprintf("%d workers on %d hosts", many, length(hosts)))
big <- as.numeric(seq_len(50 * 2^20 / 8)) + 0.5
now("with a vector of 50 MB")
most("most it grows by: clusterExport() of 50 MB", clusterExport(cl, "big"))
now("after it")
fetch <- function(i, n) numeric(n) + i
environment(fetch) <- globalenv()
most("most it grows by: gather of 1 MB a worker", {
  all <- clusterApply(cl, seq_len(many), fetch, 2^17)
}, keeps = many * 2^20)
stopifnot(length(all) == many, all[[many]][1L] == many)
now("with these results")
rm(all)
now("without them")
most("most it grows by: 100,000 short tasks", {
  all <- parLapplyLB(cl, seq_len(1e5), function(i) i)
}, keeps = 1e5 * 64)
rm(all)
# The way of gathering that needs most: sums of the results are kept, and not the vectors.
most("most it grows by: 4 MB a worker, summed here", {
  total <- 0
  for (part in split(seq_len(many), ceiling(seq_len(many) / 32))) {
    total <- total + sum(vapply(clusterApply(cl[part], part, fetch, 2^19), sum, 0))
  }
})
now("after all of that")
parallel::stopCluster(cl)
now("after stopCluster()")
