# What the system does not allow is said before anything is started. Limits are lowered in child
# sessions, by their shell.

skip_on_cran()
skip_unless_proc()
watch_processes()

expect_limits_error <- function(child, what) {
  # The last that it says.
  child_wait_for(child, "small")
  expect_match(child_said(child, "class"), "rustcluster_limits rustcluster_error", fixed = TRUE)
  expect_match(child_said(child, "message"), what, fixed = TRUE)
  numbers <- as.numeric(strsplit(child_said(child, "numbers"), " ")[[1L]])
  expect_length(numbers, 2L)
  expect_gt(numbers[[1L]], numbers[[2L]])
  expect_match(child_said(child, "message"), child_said(child, "needed"), fixed = TRUE)
  # Nothing was started, and the session goes on.
  expect_equal(child_said(child, "children"), "0")
  expect_equal(child_said(child, "small"), "1 2")
  expect_child_ends_well(child)
}

test_that("too few open files", {
  child <- start_child({
    error <- tryCatch(makeRustCluster(1000), error = identity)
    say("class", paste(class(error), collapse = " "))
    say("message", gsub("\n", " ", conditionMessage(error)))
    say("numbers", error$needed, error$available)
    say("needed", format(error$needed, scientific = FALSE))
    parents <- vapply(list.files("/proc", "^[0-9]+$", full.names = TRUE), function(dir) {
      stat <- tryCatch(readLines(file.path(dir, "stat")), error = function(e) "", warning = function(w) "")
      sub("^.*\\) . ([0-9]+) .*", "\\1", stat[1L])
    }, "")
    say("children", sum(parents == Sys.getpid()))
    cl <- makeRustCluster(2)
    say("small", paste(unlist(clusterApply(cl, 1:2, identity)), collapse = " "))
    stopCluster(cl)
  }, prelude = "ulimit -n 256")
  expect_limits_error(child, "open files")
})

test_that("the limit of open files is raised to what is allowed", {
  skip_if(system("test $(ulimit -Hn) = unlimited || test $(ulimit -Hn) -ge 4096") != 0L)
  child <- start_child({
    cl <- makeRustCluster(200)
    say("sum", sum(unlist(clusterApply(cl, 1:200, identity))))
    stopCluster(cl)
  }, prelude = "ulimit -Sn 128")
  expect_equal(child_wait_for(child, "sum"), "20100")
  expect_child_ends_well(child)
})

test_that("too few processes", {
  # root is not held to this limit.
  skip_if(Sys.info()[["effective_user"]] != "root" || !nzchar(Sys.which("setpriv")))
  # Where this package is, another user may not be let in.
  library <- tempfile("library-", tmpdir = "/tmp")
  dir.create(library)
  on.exit(unlink(library, recursive = TRUE), add = TRUE, after = FALSE)
  file.copy(system.file(package = "rustcluster"), library, recursive = TRUE)
  child <- start_child({
    error <- tryCatch(makeRustCluster(1000), error = identity)
    say("class", paste(class(error), collapse = " "))
    say("message", gsub("\n", " ", conditionMessage(error)))
    say("numbers", error$needed, error$available)
    say("needed", format(error$needed, scientific = FALSE))
    parents <- vapply(list.files("/proc", "^[0-9]+$", full.names = TRUE), function(dir) {
      stat <- tryCatch(readLines(file.path(dir, "stat")), error = function(e) "", warning = function(w) "")
      sub("^.*\\) . ([0-9]+) .*", "\\1", stat[1L])
    }, "")
    say("children", sum(parents == Sys.getpid()))
    cl <- makeRustCluster(2)
    say("small", paste(unlist(clusterApply(cl, 1:2, identity)), collapse = " "))
    stopCluster(cl)
  }, prefix = "exec setpriv --reuid=65534 --regid=65534 --clear-groups prlimit --nproc=200:200",
  public = TRUE, env = c("HOME=/tmp", paste0("R_LIBS=", library)))
  expect_limits_error(child, "processes")
})

# Functions that a child says the results of: exports, answers, a worker that is replaced, both ways of
# making workers. To be run where the system gives less than usual.
use_clusters <- function(say) {
  big <- as.numeric(1:1e6) + 0.5
  for (start in c("fork", "spawn")) {
    cl <- makeRustCluster(2, start_method = start)
    clusterExport(cl, "big", environment())
    sums <- clusterCall(cl, function() sum(big))
    answers <- clusterCall(cl, function() list(big, letters))
    elements <- clusterApplyLB(cl, 1:6, function(i, values) sum(values) * i, values = big)
    tools::pskill(clusterPids(cl)[[1L]], tools::SIGKILL)
    restored <- suppressWarnings(clusterCall(cl, function() sum(big)))
    pids <- c(agentPids(cl), clusterPids(cl))
    stopCluster(cl)
    say(
      start, identical(sums, list(sum(big), sum(big))), identical(answers, rep(list(list(big, letters)), 2)),
      identical(elements, lapply(1:6, function(i) sum(big) * i)), identical(restored, sums),
      # A signal of 0 finds only what exists.
      !any(vapply(pids, tools::pskill, NA, 0L))
    )
  }
}
environment(use_clusters) <- globalenv()

expect_clusters_work <- function(child) {
  expect_child_ends_well(child)
  for (start in c("fork", "spawn")) expect_equal(child_said(child, start), "TRUE TRUE TRUE TRUE TRUE")
}

test_that("a limit of file sizes loses no host and no result", {
  child <- start_child({
    use_clusters(say)
    # The agent's own writes: a worker prints more than fits into the file.
    outfile <- file.path(dir, "outfile")
    cl <- makeRustCluster(2, outfile = outfile, retries = 0)
    clusterCall(cl, function() for (i in 1:20000) cat(strrep("x", 99), "\n"))
    say("printed", file.size(outfile) >= 1e6, all(clusterCall(cl, identity, 1) == 1))
    # What a worker writes itself ends it, as it does any R process.
    error <- tryCatch(clusterCall(cl[1], function(file) {
      writeBin(raw(4e6), file)
    }, file.path(dir, "large")), error = identity)
    say("signal", class(error)[[1L]], error$signal)
    stopCluster(cl)
    # The head's own file.
    cl <- makeRustCluster(2, reconnect = TRUE)
    kinds <- character()
    withCallingHandlers(
      {
        for (name in letters[1:5]) {
          assign(name, runif(1e5))
          clusterExport(cl, name)
        }
        clusterCall(cl, function() 1)
      },
      warning = function(w) {
        kinds <<- c(kinds, class(w)[[1L]])
        invokeRestart("muffleWarning")
      }
    )
    say("spool", unique(kinds), identical(clusterCall(cl, function() e), list(e, e)))
    stopCluster(cl)
  }, values = list(use_clusters = use_clusters), prelude = "ulimit -f 2048")
  expect_clusters_work(child)
  expect_equal(child_said(child, "printed"), "TRUE TRUE")
  # SIGXFSZ is another number on some systems.
  expect_match(child_said(child, "signal"), "^rustcluster_worker_lost (25|31)$")
  expect_equal(child_said(child, "spool"), "rustcluster_state_not_kept TRUE")
})

# A program that runs a command in which memfd_create() and pidfd_open() fail with an error of this number.
refusing <- function() {
  dir <- tempfile("refusing-")
  dir.create(dir)
  source <- file.path(dir, "refusing.c")
  writeLines(c(
    "#include <errno.h>",
    "#include <linux/filter.h>",
    "#include <linux/seccomp.h>",
    "#include <stddef.h>",
    "#include <stdlib.h>",
    "#include <sys/prctl.h>",
    "#include <sys/syscall.h>",
    "#include <unistd.h>",
    "int main(int argc, char **argv) {",
    "  unsigned error = argc > 2 ? (unsigned) atoi(argv[1]) : 0;",
    "  struct sock_filter rules[] = {",
    "    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),",
    "    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_memfd_create, 1, 0),",
    "    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_pidfd_open, 0, 1),",
    "    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),",
    "    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),",
    "  };",
    "  struct sock_fprog program = {sizeof rules / sizeof *rules, rules};",
    "  if (argc < 3 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||",
    "      prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return 99;",
    "  execvp(argv[2], argv + 2);",
    "  return 98;",
    "}"
  ), source)
  program <- file.path(dir, "refusing")
  made <- suppressWarnings(system2("cc", c("-o", shQuote(program), shQuote(source)), stdout = FALSE, stderr = FALSE))
  skip_if(made != 0L || system2(program, c("1", "true")) != 0L, "needs a C compiler and seccomp")
  program
}

test_that("everything works without memfd_create() and pidfds", {
  program <- refusing()
  # EPERM, as of containers, and ENOSYS, as of old systems.
  for (error in c(1L, 38L)) {
    child <- start_child({
      use_clusters(say)
      cl <- makeRustCluster(2)
      x <- numeric(1e6)
      clusterExport(cl, "x")
      mapped <- clusterCall(cl, function() any(grepl("memfd", readLines("/proc/self/maps"))))
      say("mapped", paste(mapped, collapse = " "))
      # A fork of this session keeps the stream of the agent open.
      fork <- parallel::mcparallel(Sys.sleep(30))
      say("sleeper", fork$pid)
      say("pids", paste(c(agentPids(cl), clusterPids(cl)), collapse = " "))
      Sys.sleep(60)
    }, values = list(use_clusters = use_clusters), prefix = paste(
      "exec env --default-signal=INT", shQuote(program), error
    ))
    child_wait_for(child, "pids")
    for (start in c("fork", "spawn")) expect_equal(child_said(child, start), "TRUE TRUE TRUE TRUE TRUE")
    expect_equal(child_said(child, "mapped"), "FALSE FALSE")
    pids <- child_pids(child, "pids")
    expect_alive(pids)
    tools::pskill(child$pid, tools::SIGKILL)
    expect_gone(pids)
    tools::pskill(child_pids(child, "sleeper"), tools::SIGKILL)
  }
})

# What runs a command in a mount namespace of its own, after `mount` there.
in_namespace <- function(mount) {
  able <- suppressWarnings(system2("unshare", c("--mount", "true"), stdout = FALSE, stderr = FALSE))
  skip_if(able != 0L, "needs mount namespaces")
  paste("exec env --default-signal=INT unshare --mount sh -c", shQuote(paste(mount, "&& exec \"$@\"")), "sh")
}

test_that("everything works without /proc", {
  child <- start_child(
    use_clusters(say), values = list(use_clusters = use_clusters), prefix = in_namespace("mount -t tmpfs none /proc")
  )
  expect_clusters_work(child)
})

# Keeps so many mapped vectors on each of two workers, and says how many of them are mapped, then how many
# other mappings there are.
keep_vectors <- function(say, n) {
  mapped <- function() sum(grepl("memfd:rustcluster", readLines("/proc/self/maps")))
  environment(mapped) <- globalenv()
  cl <- suppressWarnings(makeRustCluster(2))
  clusterExport(cl, "mapped", environment())
  clusterEvalQ(cl, kept <- list())
  keep <- function(x) {
    kept[[length(kept) + 1L]] <<- x
    NULL
  }
  environment(keep) <- globalenv()
  for (i in seq_len(n)) suppressWarnings(clusterCall(cl, keep, rep(as.numeric(i), 8200)))
  say("mapped", paste(clusterCall(cl, function() mapped()), collapse = " "))
  right <- function() length(kept) > 0L && all(vapply(seq_along(kept), function(i) all(kept[[i]] == i), NA))
  environment(right) <- globalenv()
  say("right", paste(clusterCall(cl, right), collapse = " "), length(clusterCall(cl, function() numeric(1e6))[[1L]]))
  # Once they are gone, others are mapped.
  clusterEvalQ(cl, {
    kept <- list()
    gc()
  })
  suppressWarnings(clusterCall(cl, keep, rep(1, 8200)))
  say("later", paste(clusterCall(cl, function() mapped()), collapse = " "))
  stopCluster(cl)
}
environment(keep_vectors) <- globalenv()

test_that("mapped vectors use at most a quarter of the allowed mappings, and others are copied", {
  limit <- tempfile("max-map-count-")
  writeLines("80", limit)
  on.exit(unlink(limit), add = TRUE, after = FALSE)
  child <- start_child(
    keep_vectors(say, 50), values = list(keep_vectors = keep_vectors),
    prefix = in_namespace(paste("mount --bind", limit, "/proc/sys/vm/max_map_count"))
  )
  expect_child_ends_well(child)
  expect_equal(child_said(child, "mapped"), "20 20")
  expect_equal(child_said(child, "right"), "TRUE TRUE 1000000")
  expect_equal(child_said(child, "later"), "1 1")
})

test_that("more large vectors than a process may have mappings can be kept", {
  # For about 2 minutes, and 8 GB.
  skip_unless_long()
  child <- start_child(keep_vectors(say, 70000), values = list(keep_vectors = keep_vectors))
  expect_child_ends_well(child, 600)
  expect_equal(child_said(child, "right"), "TRUE TRUE 1000000")
  expect_equal(child_said(child, "later"), "1 1")
})

test_that("a limit of address space is an error that names it, before the start or later, and the session goes on", {
  skip_if(!nzchar(Sys.which("prlimit")), "needs prlimit")
  child <- start_child({
    # So many bytes more than this session has; NA: as many as it wants.
    limit <- function(more) {
      size <- sub("^VmSize:\\s*(\\d+) kB$", "\\1", grep("^VmSize", readLines("/proc/self/status"), value = TRUE))
      most <- if (is.na(more)) "unlimited" else sprintf("%.0f", 1024 * as.numeric(size) + more)
      system2("prlimit", c(paste0("--as=", most, ":"), "--pid", Sys.getpid()))
    }
    limit(20e6)
    error <- tryCatch(makeRustCluster(2), error = identity)
    say("class", class(error)[[1L]])
    say("message", conditionMessage(error))
    kinds <- character()
    for (more in c(35e6, 45e6, 60e6, 90e6)) {
      limit(NA)
      gc()
      limit(more)
      cl <- tryCatch(makeRustCluster(2), error = identity)
      if (inherits(cl, "error")) {
        kinds <- c(kinds, class(cl)[[1L]])
        next
      }
      # Many pieces, for which R and this package take memory by turns.
      got <- tryCatch(clusterCall(cl, function() as.list(as.numeric(1:1e6))), error = identity)
      kinds <- c(kinds, if (inherits(got, "rustcluster_error")) class(got)[[1L]] else "of R")
      if (inherits(got, "rustcluster_host_failed")) say("lost", conditionMessage(got))
      stopCluster(cl)
      rm(got)
    }
    say("kinds", paste(unique(kinds), collapse = " "))
    limit(NA)
    cl <- makeRustCluster(2)
    say("later", paste(clusterCall(cl, function() length(as.list(1:1e5))), collapse = " "))
    stopCluster(cl)
  })
  expect_child_ends_well(child)
  expect_equal(child_said(child, "class"), "rustcluster_limits")
  expect_match(child_said(child, "message"), "not enough MB of address space", fixed = TRUE)
  expect_match(child_said(child, "message"), "ulimit -v", fixed = TRUE)
  kinds <- strsplit(child_said(child, "kinds"), " (?!R)", perl = TRUE)[[1L]]
  expect_true(all(kinds %in% c("rustcluster_limits", "rustcluster_host_failed", "rustcluster_start_failed", "rustcluster_protocol", "of R")))
  if ("rustcluster_host_failed" %in% kinds) expect_match(child_said(child, "lost"), "ulimit -v", fixed = TRUE)
  expect_equal(child_said(child, "later"), "100000 100000")
})

test_that("no process is left", {
  expect_no_leftovers()
})
