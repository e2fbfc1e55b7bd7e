# allocation(): nodes and cores from the variables of batch engines, and agents that their launchers start.

watch_processes()

# All variables that allocation() reads, and those that srun would.
engine_variables <- c(
  grep("^SLURM", names(Sys.getenv()), value = TRUE), paste0("SLURM_", c(
    "JOB_ID", "JOBID", "JOB_NODELIST", "NODELIST", "JOB_CPUS_PER_NODE", "TASKS_PER_NODE", "CPUS_PER_TASK", "STEP_ID",
    "STEPID", "CPUS_ON_NODE"
  )), "SLURMD_NODENAME", "PBS_NODEFILE", "PBS_JOBID", "PBS_NUM_PPN", "NCPUS", "SGE_ROOT", "JOB_ID", "NSLOTS",
  "PE_HOSTFILE", "LSB_JOBID", "LSB_MCPU_HOSTS", "LSB_DJOB_HOSTFILE", "LSB_HOSTS"
)

# Sets these variables, and no other one of a batch engine, until the calling frame ends.
local_job <- function(..., .frame = parent.frame()) {
  new <- c(...)
  unset <- setdiff(engine_variables, names(new))
  withr::local_envvar(.new = c(structure(rep(NA, length(unset)), names = unset), new), .local_envir = .frame)
}

local_lines <- function(..., .frame = parent.frame()) {
  file <- withr::local_tempfile(.local_envir = .frame)
  writeLines(c(...), file)
  file
}

nodes_of <- function(launcher = allocation()) structure(launcher$cores, names = launcher$nodes)

refused <- function(variable, ...) {
  local_job(...)
  error <- caught(allocation())
  expect_rust_error(error, "no_allocation")
  expect_identical(error$variable, variable)
  conditionMessage(error)
}

test_that("Slurm's lists of nodes are expanded", {
  expand <- function(text) rustcluster:::expandHosts(text, "SLURM_JOB_NODELIST")
  expect_identical(expand("n1"), "n1")
  expect_identical(expand("n1,m2"), c("n1", "m2"))
  expect_identical(expand("n[1-3,07],m1"), c("n1", "n2", "n3", "n07", "m1"))
  expect_identical(expand("n[08-11]"), c("n08", "n09", "n10", "n11"))
  expect_identical(expand("n[098-101]-ib"), c("n098-ib", "n099-ib", "n100-ib", "n101-ib"))
  expect_identical(expand("r[1-2]n[1-2]"), c("r1n1", "r1n2", "r2n1", "r2n2"))
  expect_identical(expand("a.b.c,n[5]"), c("a.b.c", "n5"))
  expect_length(expand("n[1-10000]"), 10000L)
  for (text in c("n[", "n]", "n[1-", "n[1-2", "n[[1]]", "n[a-b]", "n[3-1]", "n[1-999999999]", "n[]", "n1,,n2", ",", "n[1-9999]m[1-9999]")) {
    error <- caught(expand(text))
    expect_rust_error(error, "no_allocation")
    expect_identical(error$variable, "SLURM_JOB_NODELIST")
  }
})

test_that("a job of Slurm has nodes with uneven cores", {
  local_job(SLURM_JOB_ID = "12", SLURM_JOB_NODELIST = "n[1-3],m1", SLURM_JOB_CPUS_PER_NODE = "6,2(x2),16")
  launcher <- allocation()
  expect_identical(nodes_of(launcher), c(n1 = 6L, n2 = 2L, n3 = 2L, m1 = 16L))
  expect_identical(launcher[c("engine", "job")], list(engine = "Slurm", job = "12"))
  expect_identical(launcher$workers, c(6L, 2L, 2L, 16L))
  expect_identical(allocation(threads = 4)$workers, c(1L, 1L, 1L, 4L))
  expect_identical(allocation(workers = 3)$workers, rep(3L, 4))
  expect_identical(allocation(workers = 1:4)$workers, 1:4)
  for (workers in list(0, "a", 1:3, c(1, 2, 3, 0))) {
    error <- caught(allocation(workers = workers))
    expect_rust_error(error, "bad_argument")
    expect_identical(error$argument, "workers")
  }
})

test_that("tasks count if Slurm does not say how many cores there are", {
  local_job(SLURM_JOBID = "12", SLURM_NODELIST = "n[1-3]", SLURM_TASKS_PER_NODE = "3,1(x2)", SLURM_CPUS_PER_TASK = "2")
  expect_identical(nodes_of(), c(n1 = 6L, n2 = 2L, n3 = 2L))
})

test_that("this session's node needs no launcher, unless it is a step with fewer cores", {
  own <- function(...) {
    local_job(SLURM_JOB_ID = "1", SLURM_JOB_NODELIST = "n[1-2]", SLURM_JOB_CPUS_PER_NODE = "8(x2)", ...)
    allocation()$own
  }
  expect_identical(own(), c(FALSE, FALSE))
  expect_identical(own(SLURMD_NODENAME = "n2"), c(FALSE, TRUE))
  expect_identical(own(SLURMD_NODENAME = "n1", SLURM_STEP_ID = "0", SLURM_CPUS_ON_NODE = "8"), c(TRUE, FALSE))
  expect_identical(own(SLURMD_NODENAME = "n1", SLURM_STEP_ID = "0", SLURM_CPUS_ON_NODE = "2"), c(FALSE, FALSE))
  # A step on a node of another job.
  expect_identical(own(SLURMD_NODENAME = "n9", SLURM_STEP_ID = "0"), c(FALSE, FALSE))
})

test_that("a job of PBS has nodes with cores", {
  torque <- local_lines("a", "a", "b", "b", "b")
  local_job(PBS_NODEFILE = torque, PBS_JOBID = "7.server")
  launcher <- allocation()
  expect_identical(nodes_of(launcher), c(a = 2L, b = 3L))
  expect_identical(launcher[c("engine", "job")], list(engine = "PBS", job = "7.server"))
  local_job(PBS_NODEFILE = local_lines("a", "b"), PBS_NUM_PPN = "4")
  expect_identical(nodes_of(), c(a = 4L, b = 4L))
  local_job(PBS_NODEFILE = local_lines("b", "b", "a", "a"), NCPUS = "16")
  expect_identical(nodes_of(), c(b = 16L, a = 16L))
  # NCPUS is of the first node alone.
  local_job(PBS_NODEFILE = local_lines("a", "a", "b"), NCPUS = "16")
  expect_identical(nodes_of(), c(a = 2L, b = 1L))
})

test_that("a job of Grid Engine has nodes with slots", {
  local_job(PE_HOSTFILE = local_lines("a.x 4 all.q@a.x UNDEFINED", "b.x 2 all.q@b.x <NULL>", "a.x 1 long.q@a.x UNDEFINED"), JOB_ID = "5")
  launcher <- allocation()
  expect_identical(nodes_of(launcher), c(a.x = 5L, b.x = 2L))
  expect_identical(launcher[c("engine", "job")], list(engine = "Grid Engine", job = "5"))
  # Without a parallel environment.
  local_job(SGE_ROOT = "/opt/sge", JOB_ID = "5", NSLOTS = "3")
  launcher <- allocation()
  expect_identical(unname(nodes_of(launcher)), 3L)
  expect_true(launcher$own)
})

test_that("a job of LSF has nodes with slots", {
  want <- c(a = 4L, b = 1L, c = 2L)
  local_job(LSB_JOBID = "9", LSB_MCPU_HOSTS = "a 4 b 1 c 2 ")
  expect_identical(nodes_of(), want)
  expect_identical(allocation()$engine, "LSF")
  local_job(LSB_JOBID = "9", LSB_DJOB_HOSTFILE = local_lines("a", "a", "a", "a", "b", "c", "c"))
  expect_identical(nodes_of(), want)
  local_job(LSB_JOBID = "9", LSB_HOSTS = "a a a a b c c")
  expect_identical(nodes_of(), want)
})

test_that("Slurm counts first if variables of several engines are set", {
  file <- local_lines("p")
  slurm <- c(SLURM_JOB_ID = "1", SLURM_JOB_NODELIST = "s", SLURM_JOB_CPUS_PER_NODE = "1")
  pbs <- c(PBS_NODEFILE = file)
  sge <- c(PE_HOSTFILE = local_lines("g 1 q x"))
  lsf <- c(LSB_JOBID = "9", LSB_MCPU_HOSTS = "l 1")
  local_job(c(slurm, pbs, sge, lsf))
  expect_identical(nodes_of(), c(s = 1L))
  local_job(c(pbs, sge, lsf))
  expect_identical(nodes_of(), c(p = 1L))
  local_job(c(sge, lsf))
  expect_identical(nodes_of(), c(g = 1L))
  local_job(lsf)
  expect_identical(nodes_of(), c(l = 1L))
})

test_that("outside of a job, and with unreadable variables, an error says so", {
  expect_match(refused(NULL), "runs in no batch job of Slurm, PBS, Grid Engine or LSF: call allocation\\(\\) in a script that is submitted")
  slurm <- function(...) c(SLURM_JOB_ID = "1", ...)
  expect_match(refused("SLURM_JOB_NODELIST", slurm(SLURM_JOB_NODELIST = "n[1")), "is no list of nodes: .n\\[1.; name the hosts in `spec`")
  expect_match(refused("SLURM_JOB_NODELIST", slurm(SLURM_JOB_NODELIST = "-x", SLURM_JOB_CPUS_PER_NODE = "1")), "invalid node name")
  expect_match(refused("SLURM_JOB_CPUS_PER_NODE", slurm(SLURM_JOB_NODELIST = "n1")), "is not set")
  counts <- function(text) refused("SLURM_JOB_CPUS_PER_NODE", slurm(SLURM_JOB_NODELIST = "n[1-2]", SLURM_JOB_CPUS_PER_NODE = text))
  expect_match(counts("2(x3)"), "has 3 counts for the 2 nodes in SLURM_JOB_NODELIST")
  for (text in c("x", "2(x", "2(x0)", "-1", "0(x2)", "2;2", "1e9(x2)")) expect_match(counts(text), "is no list of counts")
  expect_match(refused("PBS_NODEFILE", PBS_NODEFILE = "/nowhere"), "cannot be read: ./nowhere.")
  expect_match(refused("PBS_NODEFILE", PBS_NODEFILE = local_lines("", " ")), "empty file")
  expect_match(refused("PE_HOSTFILE", PE_HOSTFILE = local_lines("a 1 q x", "b")), "a line without node and slots")
  expect_match(refused("PE_HOSTFILE", PE_HOSTFILE = local_lines("a many q x")), "a line without node and slots")
  expect_match(refused("LSB_MCPU_HOSTS", LSB_JOBID = "1", LSB_MCPU_HOSTS = "a 1 b"), "no list of nodes and numbers")
  expect_match(refused("LSB_MCPU_HOSTS", LSB_JOBID = "1"), "is not set")
})

test_that("each engine's launcher gets the agent's command", {
  commands <- function(launcher) {
    lapply(rustcluster:::specHosts(launcher)$hosts, function(host) {
      if (!is.null(host$launcher)) rustcluster:::launcherCommand(host$launcher, "SCRIPT")
    })
  }
  run <- c("sh", "-c", "SCRIPT")
  local_job(PE_HOSTFILE = local_lines("a 4 q x", "b 2 q x"))
  expect_identical(commands(allocation()), list(c("qrsh", "-inherit", "-noshell", "-V", "a", run), c("qrsh", "-inherit", "-noshell", "-V", "b", run)))
  expect_identical(commands(allocation(launcher = "mpirun -host {{ host }} {{ command }} x"))[[2L]], c("mpirun", "-host", "b", run, "x"))
  expect_identical(commands(allocation(launcher = c("on", "{{host}}")))[[1L]], c("on", "a", run))
  # By ssh they are hosts as any others.
  expect_identical(commands(allocation(launcher = "ssh")), list(NULL, NULL))
  local_job(LSB_JOBID = "1", LSB_MCPU_HOSTS = "a 1")
  expect_identical(commands(allocation())[[1L]], c("blaunch", "-z", "a", "-no-shell", run))
  local_job(PBS_NODEFILE = local_lines("a"))
  host <- rustcluster:::specHosts(allocation())$hosts[[1L]]
  expect_false(host$local)
  expect_null(host$launcher)
  for (launcher in list(1, character(), "on a", c("on", NA), "{{ host }} x {{ command }} {{ command }}")) {
    error <- caught(allocation(launcher = launcher))
    expect_rust_error(error, "bad_argument")
    expect_identical(error$argument, "launcher")
  }
})

# A srun that checks what it is given, and runs the command as on that node.
local_srun <- function(.frame = parent.frame()) {
  dir <- withr::local_tempdir(.local_envir = .frame)
  writeLines(c(
    "#!/bin/bash", "node=; for name in LABELIO CPU_BIND STDOUTMODE MEM_PER_CPU NTASKS_PER_NODE; do",
    "  name=SLURM_$name; [ -z \"${!name+x}\" ] || { echo \"srun: $name is set\" >&2; exit 90; }", "done",
    "while [ $# -gt 0 ]; do case $1 in",
    "  --nodelist=*) node=${1#*=}; shift;; --cpus-per-task=*) cpus=${1#*=}; shift;;",
    "  --nodes=1|--ntasks=1|--ntasks-per-node=1|--overlap|--mem=0|--unbuffered|--input=all|--output=all|--error=all) shift;;",
    "  --export=ALL|--mpi=none|--kill-on-bad-exit=0) shift;;",
    "  -*) echo \"srun: unrecognized option '$1'\" >&2; exit 91;; *) break;; esac; done",
    "[ -n \"$node\" ] || { echo 'srun: no node' >&2; exit 92; }",
    "[ \"$node\" != down ] || { echo 'srun: error: Unable to create step for job 12: Required node not available (down, drained or reserved)' >&2; exit 1; }",
    "export SLURMD_NODENAME=$node SLURM_CPUS_PER_TASK=$cpus SLURM_STEP_ID=1", "exec \"$@\""
  ), file.path(dir, "srun"))
  Sys.chmod(file.path(dir, "srun"), "0755")
  withr::local_envvar(.new = c(PATH = paste0(dir, ":", Sys.getenv("PATH"))), .local_envir = .frame)
}

test_that("srun starts an agent on each node, and this session's node is a child", {
  skip_on_cran()
  local_srun()
  # Options of srun by variables, as they are in jobs: each would break the stream or the step.
  local_job(
    SLURM_JOB_ID = "12", SLURM_JOB_NODELIST = "n[1-3]", SLURM_JOB_CPUS_PER_NODE = "1,2(x2)", SLURMD_NODENAME = "n1",
    SLURM_LABELIO = "1", SLURM_CPU_BIND = "quiet,mask_cpu:0x1", SLURM_STDOUTMODE = "out", SLURM_MEM_PER_CPU = "100",
    SLURM_NTASKS_PER_NODE = "4"
  )
  cl <- local_cluster(list(allocation(rscript_envs = c(RC_TEST = "x")), list(host = "localhost", ncore = 1)))
  expect_identical(vapply(cl, `[[`, "", "host"), c("n1", "n2", "n2", "n3", "n3", "localhost"))
  where <- clusterCall(cl, function() Sys.getenv(c("SLURMD_NODENAME", "SLURM_STEP_ID", "SLURM_CPUS_PER_TASK"), names = FALSE))
  expect_identical(where, list(
    c("n1", "", ""), c("n2", "1", "2"), c("n2", "1", "2"), c("n3", "1", "2"), c("n3", "1", "2"), c("n1", "", "")
  ))
  expect_identical(clusterCall(cl, Sys.getenv, "RC_TEST"), as.list(c(rep("x", 5), "")))
  local <- vapply(cl, function(node) rustcluster:::isLocalhostNode.RustNode(node), NA)
  expect_identical(local, c(TRUE, FALSE, FALSE, FALSE, FALSE, TRUE))
  elements <- lapply(1:50, function(i) seq_len(i * 100))
  expect_identical(parLapply(cl, elements, sum), lapply(elements, sum))
  expect_identical(clusterHosts(cl)$workers, c(1L, 2L, 2L, 1L))
  # The variables of this session are as before.
  expect_identical(Sys.getenv("SLURM_LABELIO"), "1")
})

test_that("a node whose step cannot be created is named", {
  skip_on_cran()
  local_srun()
  local_job(SLURM_JOB_ID = "12", SLURM_JOB_NODELIST = "n1,down", SLURM_JOB_CPUS_PER_NODE = "1(x2)")
  error <- caught(makeRustCluster(allocation()))
  expect_rust_error(error, "start_failed")
  expect_match(conditionMessage(error), "host .down.: the agent's process exited with status 1.*Required node not available")
  error <- caught(makeRustCluster(allocation(rscript = "/nowhere/Rscript")))
  expect_match(conditionMessage(error), "Rscript was not found where .srun. runs it")
  expect_no_leftovers()
})

test_that("print() shows the nodes and their commands", {
  local_job(SLURM_JOB_ID = "12", SLURM_JOB_NODELIST = "n[1-5]", SLURM_JOB_CPUS_PER_NODE = "8(x5)", SLURMD_NODENAME = "n1")
  launcher <- allocation(workers = c(1, 2, 2, 2, 2))
  shown <- capture.output(value <- withVisible(print(launcher)))
  expect_identical(value, list(value = launcher, visible = FALSE))
  expect_identical(shown[c(1:2, 4, 8)], c(
    "allocation of Slurm, job 12: 5 nodes, 40 cores", "n1: 1 worker, on this machine", "n2: 2 workers", "and 2 more"
  ))
  expect_match(shown[[5L]], "^  srun --nodes=1 .*--nodelist=n2 .*--cpus-per-task=8 .* sh -c ")
})
