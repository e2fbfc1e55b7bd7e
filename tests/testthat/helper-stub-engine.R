# A stand-in for batch engines: their commands as small scripts in a directory on the PATH. A submitted job is a real
# process, which runs the script of the job with the variables of the engine. Jobs have numbers from 900000100.

# Puts the commands on the PATH until the calling frame ends, and then kills what is left of the jobs. Returns a list of
# functions: `set(name, value)` of a switch, `jobs()` (the ids that are neither ended nor cancelled), `log()` (the
# commands that were run), `pids()` of the processes of jobs. The switches:
#   delay: seconds before jobs start; refuse: the text with which submit commands fail; pending: the reason for which
#   no job starts; only_log: whether jobs are not run at all; hang: seconds for which each command hangs;
#   no_query: whether queries fail; no_cancel: the number of cancel commands that fail
local_stub_engine <- function(kind, .frame = parent.frame()) {
  skip_on_cran()
  skip_unless_proc()
  home <- tempfile("engine-")
  bin <- file.path(home, "bin")
  dir.create(bin, recursive = TRUE)
  dir.create(file.path(home, "jobs"))
  dir.create(file.path(home, "switch"))
  writeLines(stub_library, file.path(home, "library.sh"))
  commands <- stub_commands[[kind]]
  for (name in names(commands)) {
    path <- file.path(bin, name)
    writeLines(c("#!/bin/sh", paste0("home='", home, "'"), paste0("kind=", kind), paste0("command=", name),
                 ". \"$home/library.sh\"", commands[[name]]), path)
    Sys.chmod(path, "0755")
  }
  old <- Sys.getenv("PATH")
  Sys.setenv(PATH = paste0(bin, ":", old))
  state <- function(id) readLines(file.path(home, "jobs", id, "state"))
  pids <- function() {
    files <- Sys.glob(file.path(home, "jobs", "*", "pid"))
    as.integer(unlist(lapply(files, readLines)))
  }
  do.call("on.exit", list(bquote({
    Sys.setenv(PATH = .(old))
    kill_groups(.(pids)())
    unlink(.(home), recursive = TRUE)
  }), add = TRUE, after = TRUE), envir = .frame)
  list(
    home = home, pids = pids,
    set = function(name, value) {
      path <- file.path(home, "switch", name)
      if (is.null(value)) unlink(path) else writeLines(as.character(value), path)
    },
    log = function() {
      path <- file.path(home, "log")
      if (file.exists(path)) readLines(path) else character()
    },
    jobs = function() {
      ids <- list.files(file.path(home, "jobs"))
      ids <- ids[file.exists(file.path(home, "jobs", ids, "state"))]
      ids[vapply(ids, state, "") %in% c("PENDING", "RUNNING")]
    },
    # Kills a job and starts it again under its number, as engines do.
    requeue = function(id) {
      dir <- file.path(home, "jobs", id)
      writeLines("PENDING", file.path(dir, "state.new"))
      file.rename(file.path(dir, "state.new"), file.path(dir, "state"))
      kill_groups(as.integer(readLines(file.path(dir, "pid"))))
      code <- sprintf(
        "sleep 0.5; cd '%s'; echo RUNNING >state; export SLURM_JOB_ID=%s; exec setsid sh -c 'echo $$ >pid; exec ./script'",
        dir, sub("_.*$", "", id)
      )
      system2("sh", c("-c", shQuote(code)), stdout = FALSE, stderr = FALSE, wait = FALSE)
    },
    # Ends a job as the engine does it, with a state of the engine.
    end = function(id, state, signal = "KILL") {
      dir <- file.path(home, "jobs", id)
      writeLines(state, file.path(dir, "state.new"))
      file.rename(file.path(dir, "state.new"), file.path(dir, "state"))
      kill_groups(as.integer(readLines(file.path(dir, "pid"))), signal)
    }
  )
}

# Until the calling frame ends, clusters ask the engine for the states of jobs after half a second instead of five, which
# the stub answers as well.
local_fast_queries <- function(.frame = parent.frame()) {
  query <- get("queryJobs", asNamespace("rustcluster"))
  formals(query)$every <- 0.5
  local_function("queryJobs", query, .frame)
}

# Returns a launcher for a stub engine.
batch_launcher <- function(kind, stub, nodes = 2L, cores = 2L, ...) {
  given <- list(nodes = nodes, cores = cores, dir = file.path(stub$home, "shared"), ...)
  if (!is.null(given[["max"]])) given$nodes <- NULL
  if (kind == "template") {
    given <- c(given, list(
      template = paste(
        "#!/bin/sh", "#SBATCH --job-name={{ job_name }}", "#SBATCH --array={{ tasks }}",
        "#SBATCH --output={{ log_file }}", "{{ environment }}", "exec {{ command }}", sep = "\n"
      ),
      submit = "mysub", cancel = "mydel {{ jobs }}", status = "mystat {{ jobs }}"
    ))
  }
  do.call(if (kind == "template") "jobTemplate" else kind, given)
}

# Signals process groups, which tools::pskill() does not.
kill_groups <- function(pids, signal = "KILL") {
  if (length(pids)) suppressWarnings(system2("kill", c("-s", signal, "--", paste0("-", pids)), stderr = FALSE))
}

# Each element of an array is a directory JOB_TASK with the files state, name, task, reason and pid.
stub_library <- c(
  "echo \"$command $*\" >>\"$home/log\"",
  # Replaces the state of the element in $job: a reader sees the old one or the new one.
  "put() { echo \"$1\" >\"$job/state.$$\"; mv -f \"$job/state.$$\" \"$job/state\"; }",
  "switch() { cat \"$home/switch/$1\" 2>/dev/null; }",
  "is_set() { [ -e \"$home/switch/$1\" ]; }",
  "is_set hang && sleep \"$(switch hang)\"",
  # Takes the next job number.
  "next_id() {",
  "  until mkdir \"$home/lock\" 2>/dev/null; do sleep 0.01; done",
  "  id=$(cat \"$home/last\" 2>/dev/null || echo 900000099); id=$((id + 1)); echo \"$id\" >\"$home/last\"",
  "  rmdir \"$home/lock\"",
  "}",
  "refuse() { if is_set refuse; then switch refuse >&2; exit 1; fi; }",
  # start SCRIPT NAME LOG FIRST LAST: LAST is "none" for a job that is no array. `environment` is a function that sets
  # the variables of a task.
  "start() {",
  "  next_id",
  "  if [ \"$5\" = none ]; then tasks=none; else tasks=$(seq \"$4\" \"$5\"); fi",
  "  for task in $tasks; do",
  "    job=$home/jobs/${id}_$task; mkdir \"$job\"",
  "    echo \"$2\" >\"$job/name\"; cp \"$1\" \"$job/script\"; chmod +x \"$job/script\"",
  "    switch pending >\"$job/reason\"; put PENDING",
  "    is_set pending && continue",
  "    is_set only_log && continue",
  "    environment",
  "    (",
  "      is_set delay && sleep \"$(switch delay)\"",
  "      [ \"$(cat \"$job/state\")\" = PENDING ] || exit 0",
  "      log=$(echo \"$3\" | sed \"s/%A/$id/; s/%j/$id/; s/%J/$id/; s/%[aI]/$task/\" |",
  "        sed \"s/[$]JOB_ID/$id/; s/[$]TASK_ID/$task/; s/[$](Cluster)/$id/; s/[$](Process)/$task/\")",
  "      put RUNNING",
  "      # It may be cancelled at any point.",
  "      [ ! -e \"$job/cancelled\" ] || { put CANCELLED; exit 0; }",
  "      setsid sh -c 'echo $$ >\"$1/pid\"; grep -q RUNNING \"$1/state\" || exit 0; shift; exec \"$@\"' \\",
  "        sh \"$job\" \"$job/script\" $script_args \\",
  "        >>\"${log:-/dev/null}\" 2>&1",
  "      rc=$?",
  "      [ \"$(cat \"$job/state\")\" = RUNNING ] || exit 0",
  "      if [ $rc = 0 ]; then put COMPLETED; else put FAILED; fi",
  "    ) </dev/null >/dev/null 2>&1 &",
  "  done",
  "}",
  # Cancels the elements whose directories are the arguments.
  "cancel() {",
  "  if is_set no_cancel && [ \"$(switch no_cancel)\" -gt 0 ]; then",
  "    echo $(($(switch no_cancel) - 1)) >\"$home/switch/no_cancel\"; echo 'no answer' >&2; exit 1",
  "  fi",
  "  for job in \"$@\"; do",
  "    [ -d \"$job\" ] || continue",
  "    case $(cat \"$job/state\") in PENDING | RUNNING) ;; *) continue ;; esac",
  "    : >\"$job/cancelled\"; put CANCELLED",
  "    [ -s \"$job/pid\" ] && kill -TERM \"$(cat \"$job/pid\")\" 2>/dev/null",
  "  done",
  "}",
  # Prints the directories of the elements of a job, an element, or a name.
  "of_id() { case $1 in *_*) echo \"$home/jobs/$1\" ;; *) echo \"$home/jobs/$1\"_* ;; esac; }",
  "of_name() { grep -lx -e \"$1\" \"$home\"/jobs/*/name 2>/dev/null | sed 's|/name$||'; }",
  "fail_query() { if is_set no_query; then echo 'Unable to contact the controller' >&2; exit 1; fi; }",
  "value() { sed -n \"s/^$2//p\" \"$1\" | tail -n 1; }"
)

stub_commands <- list(
  slurm = list(
    sbatch = c(
      "refuse; for script in \"$@\"; do :; done",
      "environment() {",
      "  export SLURM_JOB_ID=$id SLURM_JOB_NUM_NODES=1 SLURMD_NODENAME=stub",
      "  [ \"$task\" = none ] || export SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$task",
      "}",
      "range=$(value \"$script\" '#SBATCH --array='); last=${range#*-}",
      "name=$(value \"$script\" '#SBATCH --job-name='); log=$(value \"$script\" '#SBATCH --output=')",
      "start \"$script\" \"$name\" \"$log\" 1 \"${last:-none}\"",
      "echo \"$id\""
    ),
    squeue = c(
      "fail_query; name=; all=; format=",
      "while [ $# -gt 0 ]; do",
      "  case $1 in --name=*) name=${1#--name=} ;; -t) all=1; shift ;; -u) shift ;; -o) format=$2; shift ;; esac",
      "  shift",
      "done",
      "for job in $(of_name \"$name\"); do",
      "  state=$(cat \"$job/state\"); id=${job##*/}; task=${id#*_}; [ \"$task\" = none ] && task=N/A",
      "  reason=$(cat \"$job/reason\"); node=stub; [ \"$state\" = PENDING ] && node=",
      "  case $state in PENDING | RUNNING) ;; *) [ -n \"$all\" ] || continue ;; esac",
      "  case $format in",
      "    *%t*) echo \"$id $(echo \"$state\" | cut -c 1)\" ;;",
      "    *) echo \"${id%_*}|$task|$state|${reason:-None}|$node\" ;;",
      "  esac",
      "done"
    ),
    scancel = c(
      "for word in \"$@\"; do",
      "  case $word in --name=*) cancel $(of_name \"${word#--name=}\") ;; [0-9]*) cancel $(of_id \"$word\") ;; esac",
      "done"
    )
  ),
  htcondor = list(
    condor_submit = c(
      "refuse; for file in \"$@\"; do :; done",
      "script=$(value \"$file\" 'executable = '); count=$(value \"$file\" 'queue ')",
      "environment() { script_args=\"$id $task\"; export BATCH_SYSTEM=HTCondor; unset HOME; }",
      "start \"$script\" \"$(value \"$file\" 'batch_name = ')\" \"$(value \"$file\" 'output = ')\" 0 $((count - 1))",
      "echo \"$id.0 - $id.$((count - 1))\""
    ),
    condor_q = c(
      "fail_query; name=$(echo \"$2\" | sed 's/.*\"\\(.*\\)\"/\\1/')",
      "for job in $(of_name \"$name\"); do",
      "  id=${job##*/}; reason=$(cat \"$job/reason\")",
      "  case $(cat \"$job/state\") in",
      "    PENDING) n=1; host=undefined ;; RUNNING) n=2; host=slot1@stub ;; *) continue ;;",
      "  esac",
      "  if [ \"$3\" = -af ]; then echo \"${id%_*} $n\"; continue; fi",
      "  printf '%s\\t%s\\t%s\\t%s\\tundefined\\t%s\\n' \"${id%_*}\" \"${id#*_}\" $n $host \"${reason:-undefined}\"",
      "done"
    ),
    condor_rm = c(
      "if [ \"$1\" = -constraint ]; then cancel $(of_name \"$(echo \"$2\" | sed 's/.*\"\\(.*\\)\"/\\1/')\"); exit; fi",
      "for id in \"$@\"; do cancel $(of_id \"$(echo \"$id\" | tr . _)\"); done"
    )
  ),
  gridEngine = list(
    qsub = c(
      "refuse; for script in \"$@\"; do :; done",
      "environment() { export JOB_ID=$id SGE_TASK_ID=$task; [ \"$task\" = none ] && SGE_TASK_ID=undefined; }",
      "range=$(value \"$script\" '#[$] -t '); last=${range#*-}",
      "start \"$script\" \"$(value \"$script\" '#[$] -N ')\" \"$(value \"$script\" '#[$] -o ')\" 1 \"${last:-none}\"",
      "if [ -n \"$last\" ]; then echo \"$id.1-$last:1\"; else echo \"$id\"; fi"
    ),
    qstat = c(
      "fail_query; [ \"$1\" = -j ] && exit 1",
      "echo 'job-ID  prior   name       user         state submit/start at     queue    slots ja-task-ID'; echo ------",
      "for job in \"$home\"/jobs/*; do",
      "  id=${job##*/}; task=${id#*_}; [ \"$task\" = none ] && task=",
      "  case $(cat \"$job/state\") in PENDING) s=qw; queue= ;; RUNNING) s=r; queue=all.q@stub ;; *) continue ;; esac",
      "  echo \"${id%_*} 0.5 $(cut -c 1-10 \"$job/name\") me $s 11/29/2026 10:00:00 $queue 1 $task\"",
      "done"
    ),
    qdel = c(
      "for id in \"$@\"; do",
      "  case $id in [0-9]*) cancel $(of_id \"$(echo \"$id\" | tr . _)\") ;; *) cancel $(of_name \"$id\") ;; esac",
      "done"
    )
  ),
  pbs = list(
    qsub = c(
      "refuse; for script in \"$@\"; do :; done",
      "environment() {",
      "  export PBS_JOBID=$id.stub",
      "  [ \"$task\" = none ] || export PBS_JOBID=\"$id[$task].stub\" PBS_ARRAY_INDEX=$task",
      "}",
      "range=$(value \"$script\" '#PBS -J '); last=${range#*-}",
      "start \"$script\" \"$(value \"$script\" '#PBS -N ')\" '' 1 \"${last:-none}\"",
      "if [ -n \"$last\" ]; then echo \"$id[].stub\"; else echo \"$id.stub\"; fi"
    ),
    qstat = c(
      "fail_query; full=; [ \"$1\" = -x ] && full=1; status=153",
      "[ -n \"$full\" ] || { echo 'Job id Name User Time Use S Queue'; echo -----; }",
      "for id in \"$@\"; do",
      "  number=$(echo \"$id\" | sed -n 's/^\\([0-9]*\\).*/\\1/p'); [ -n \"$number\" ] || continue",
      "  for job in $(of_id \"$number\"); do",
      "    [ -d \"$job\" ] || continue",
      "    task=${job##*_}; reason=$(cat \"$job/reason\"); element=\"[$task]\"; [ \"$task\" = none ] && element=",
      "    case $(cat \"$job/state\") in PENDING) s=Q ;; RUNNING) s=R ;; *) s=F ;; esac",
      "    if [ -n \"$full\" ]; then",
      "      status=0; echo \"Job Id: $number$element.stub\"; echo \"    job_state = $s\"",
      "      [ -z \"$reason\" ] || echo \"    comment = $reason\"; [ $s = Q ] || echo '    exec_host = stub/0'",
      "    elif [ $s != F ]; then status=0; echo \"$number$element.stub name me 0 $s queue\"; fi",
      "  done",
      "done; exit $status"
    ),
    qdel = c(
      "for id in \"$@\"; do",
      "  cancel $(of_id \"$(echo \"$id\" | sed 's/[.].*//; s/\\[\\]//; s/\\[\\(.*\\)\\]/_\\1/')\")",
      "done"
    ),
    qselect = "of_name \"$2\" | sed 's|.*/||; s/_.*/[].stub/' | sort -u"
  ),
  lsf = list(
    bsub = c(
      "refuse; script=$home/stdin.$$; cat >\"$script\"",
      "environment() { export LSB_JOBID=$id LSB_JOBINDEX=$task; [ \"$task\" = none ] && LSB_JOBINDEX=0; }",
      "name=$(value \"$script\" '#BSUB -J ' | tr -d '\"'); range=${name#*\\[}; last=none",
      "[ \"$range\" = \"$name\" ] || { last=${range#*-}; last=${last%\\]}; }",
      "start \"$script\" \"${name%%\\[*}\" \"$(value \"$script\" '#BSUB -o ')\" 1 \"$last\"",
      "echo \"Job <$id> is submitted to default queue <normal>.\""
    ),
    bjobs = c(
      "fail_query; all=; name=; format=",
      "while [ $# -gt 0 ]; do case $1 in -a) all=1 ;; -J) name=$2; shift ;; -o) format=$2; shift ;; esac; shift; done",
      "found=",
      "for job in $(of_name \"$name\"); do",
      "  id=${job##*/}; task=${id#*_}; [ \"$task\" = none ] && task=0; reason=$(cat \"$job/reason\"); host=stub",
      "  case $(cat \"$job/state\") in",
      "    PENDING) s=PEND; host=- ;; RUNNING) s=RUN ;; COMPLETED) s=DONE ;; *) s=EXIT; ;;",
      "  esac",
      "  case $s in PEND | RUN) ;; *) [ -n \"$all\" ] || continue ;; esac",
      "  found=1",
      "  case $format in",
      "    *delimiter*) echo \"${id%_*}|$task|$s|$host|-|${reason:--}\" ;; *) echo \"${id%_*} $s\" ;;",
      "  esac",
      "done",
      "[ -n \"$found\" ] || { echo \"Job <$name> is not found\" >&2; exit 255; }"
    ),
    bkill = c(
      "if [ \"$1\" = -J ]; then cancel $(of_name \"$2\"); exit; fi",
      "for id in \"$@\"; do cancel $(of_id \"$(echo \"$id\" | sed 's/\\[\\(.*\\)\\]/_\\1/')\"); done"
    )
  )
)
# Commands of an engine that this package does not know.
stub_commands$template <- list(
  mysub = stub_commands$slurm$sbatch,
  mydel = stub_commands$slurm$scancel,
  mystat = c(
    "fail_query; for id in \"$@\"; do for job in $(of_id \"$id\"); do",
    "  echo \"${job##*/} $(cat \"$job/state\") $(cat \"$job/reason\")\"; done; done"
  )
)
