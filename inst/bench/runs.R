# Measures clusterLapply() with `.store`.
#
#   Rscript runs.R [n=1000000] [workers=2] [large=32] [megabytes=10] [folder=directory]
#
# n: the number of trivial elements; large: the number of workers that return results of `megabytes` MB; folder: where
# the runs are written, and where dd writes. Ratios are those of the goals: time with `.store` to time without, bytes of
# the directory to bytes of the serialized results, and rate of large results, which the workers have computed before,
# to the rate of `dd conv=fsync`.

here <- sub("^--file=", "", grep("^--file=", commandArgs(), value = TRUE))
here <- if (length(here)) dirname(here[1L]) else system.file("bench", package = "rustcluster")
source(file.path(here, "helpers.R"))

suppressPackageStartupMessages({
  library(parallel)
  library(rustcluster)
})

n <- as.integer(option("n", "1000000"))
workers <- as.integer(option("workers", "2"))
large <- as.integer(option("large", "32"))
megabytes <- as.numeric(option("megabytes", "10"))
folder <- tempfile("runs-", option("folder", tempdir()))
dir.create(folder)
on.exit(unlink(folder, recursive = TRUE))

seconds <- function(expr) {
  gc()
  began <- proc.time()[[3L]]
  force(expr)
  proc.time()[[3L]] - began
}

directory_bytes <- function(dir) sum(file.size(list.files(dir, full.names = TRUE, recursive = TRUE)))

show <- function(what, text, ratio = NULL, met = NULL) {
  cat(sprintf("  %-52s %s%s%s\n", what, text, if (is.null(ratio)) "" else sprintf("   ratio %.2f", ratio),
              if (is.null(met)) "" else if (met) "   goal met" else "   GOAL NOT MET"))
}

run_small <- function() {
  cat(n, " trivial elements, ", workers, " workers\n", sep = "")
  cl <- makeRustCluster(workers)
  on.exit(stopCluster(cl))
  trivial <- function(x) x + 0.5
  environment(trivial) <- globalenv()
  x <- seq_len(n)
  clusterLapply(cl, seq_len(1000L), trivial)
  without <- with <- numeric()
  for (i in 1:3) {
    without[[i]] <- seconds(plain <- clusterLapply(cl, x, trivial))
    dir <- file.path(folder, paste0("small", i))
    with[[i]] <- seconds(stored <- clusterLapply(cl, x, trivial, .store = dir))
    stopifnot(identical(stored, plain))
  }
  rm(stored)
  ratio <- min(with) / min(without)
  show("with .store, without", sprintf("%.2f s, %.2f s", min(with), min(without)), ratio, ratio <= 1.5)
  lazy <- seconds(clusterLapply(cl, x, trivial, .store = file.path(folder, "lazy"), .collect = FALSE))
  show("with .store, .collect = FALSE", sprintf("%.2f s", lazy), lazy / min(without), lazy / min(without) <= 1.5)
  bytes <- length(serialize(plain, NULL))
  ratio <- directory_bytes(dir) / bytes
  show("bytes of the directory, of the results", sprintf("%.0f, %.0f", directory_bytes(dir), bytes), ratio, ratio <= 2)
  # In a fresh process, whose memory is that of the resumed call.
  script <- file.path(folder, "resume.R")
  writeLines(c(
    "suppressPackageStartupMessages({ library(parallel); library(rustcluster) })",
    sprintf("n <- %d; dir <- %s; cl <- makeRustCluster(1)", n, deparse(dir)),
    "memory <- function(what) {",
    "  as.numeric(gsub('[^0-9]', '', grep(what, readLines('/proc/self/status'), value = TRUE))) / 1024",
    "}",
    "trivial <- function(x) x + 0.5",
    "began <- proc.time()[[3L]]",
    "view <- clusterLapply(cl, seq_len(n), trivial, .store = dir, .collect = FALSE)",
    "last <- view[[n]]",
    "took <- proc.time()[[3L]] - began",
    "stopifnot(last == n + 0.5)",
    "peak <- memory('^VmHWM')",
    "sum <- 0",
    "for (i in seq(1L, n, length.out = 1000L)) sum <- sum + view[[i]]",
    "cat(took, peak, memory('^VmHWM'), memory('^VmRSS'), '\\n')",
    "stopCluster(cl)"
  ), script)
  got <- system2(file.path(R.home("bin"), "Rscript"), script, stdout = TRUE)
  got <- as.numeric(strsplit(trimws(got[[length(got)]]), " +")[[1L]])
  show("resume until the view is used", sprintf("%.2f s", got[[1L]]), got[[1L]] / 2, got[[1L]] <= 2)
  show("memory (VmHWM) of the head, at the view's first use", sprintf("%.0f MB", got[[2L]]), got[[2L]] / 100,
       got[[2L]] <= 100)
  show("memory (VmHWM, VmRSS) after 1000 reads", sprintf("%.0f MB, %.0f MB", got[[3L]], got[[4L]]))
}

run_large <- function() {
  cat(megabytes, " MB from each of ", large, " workers\n", sep = "")
  cl <- makeRustCluster(large)
  on.exit(stopCluster(cl))
  # dd computes nothing: the workers have their results before they are asked for them.
  clusterCall(cl, function(n) {
    assign("result", Sys.getpid() + numeric(n), globalenv())
    NULL
  }, megabytes * 1e6 / 8)
  make <- function(i) result
  environment(make) <- globalenv()
  total <- megabytes * large
  dd <- function(i) {
    file <- file.path(folder, "dd")
    took <- seconds(system2("dd", c(
      "if=/dev/zero", paste0("of=", file), "bs=1000000", paste0("count=", total), "conv=fsync"
    ), stderr = FALSE))
    unlink(file)
    total / took
  }
  store <- function(i) {
    dir <- file.path(folder, paste0("large", i))
    took <- seconds(clusterLapply(cl, seq_len(large), make, .store = dir, .collect = FALSE))
    unlink(dir, recursive = TRUE)
    total / took
  }
  clusterCall(cl, function() NULL)
  plain <- total / seconds(clusterLapply(cl, seq_len(large), make))
  rates <- vapply(1:3, function(i) c(dd(i), store(i)), c(dd = 0, store = 0))
  best <- apply(rates, 1L, max)
  ratio <- best[["store"]] / best[["dd"]]
  text <- sprintf("%.0f MB/s, %.0f MB/s", best[["store"]], best[["dd"]])
  show("rate stored, of dd conv=fsync", text, ratio, ratio >= 0.7)
  show("rate without .store", sprintf("%.0f MB/s", plain))
}

run_small()
run_large()
unlink(folder, recursive = TRUE)
