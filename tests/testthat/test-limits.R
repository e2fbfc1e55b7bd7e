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
  on.exit(unlink(library, recursive = TRUE))
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

test_that("nothing is left", {
  expect_no_leftovers()
})
