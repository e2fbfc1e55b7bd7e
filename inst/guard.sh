# Keeps the jobs of one launcher of a cluster. It runs the engine's commands for the head, and when the head has stopped
# the cluster or has died, it cancels all jobs and removes the directory of the cluster.
#
# sh guard.sh DIRECTORY KIND NAME USER-COMMANDS...
#   KIND: slurm, htcondor, gridEngine, pbs, lsf or template
#   NAME: the name of the jobs
#   the last argument, on a login node: the directory of the gateway, whose name tells the sessions of heads apart
#   for template: PATTERN (a regular expression for the id in the output of a submit command; empty for the first number
#   that stands alone), CANCEL and STATUS (commands, in which "$@" stands for ids)
#
# It reads lines from stdin: "submit FROM TO" runs the files submit-FROM to submit-TO in the directory, "query N" asks
# for the states of all jobs, "cancel N ID..." cancels some. Each writes files with the extensions .out and .err, and at
# last .rc, which holds the exit status; submit writes .id before. At the end of stdin, and at SIGTERM, the jobs end.
#
# "linger N" changes that: the jobs end N seconds after the end of stdin, unless another head has started another guard
# in the directory by then; this guard then ends and leaves the jobs to that one. "linger 0" undoes it.
# All of it is in functions, since sh reads a script while it runs and the file may be replaced.

# Runs a command with a limit of some seconds.
limited() {
  seconds=$1
  shift
  if command -v timeout >/dev/null 2>&1; then
    timeout -k 5 "$seconds" "$@"
  else
    "$@"
  fi
}

# Writes the exit status of a command, which tells the head that its output is complete.
finished() {
  echo "$2" >"$dir/$1.tmp" && mv -f "$dir/$1.tmp" "$dir/$1.rc"
}

# Reads the output of a submit command and prints the id of the job.
job_id() {
  case $kind in
    slurm) sed -n 's/^\([0-9][0-9]*\)$/\1/p; s/^\([0-9][0-9]*\);.*$/\1/p' ;;
    htcondor) sed -n 's/^\([0-9][0-9]*\)\.[0-9][0-9]* - .*$/\1/p' ;;
    gridEngine) sed -n 's/^\([0-9][0-9]*\)$/\1/p; s/^\([0-9][0-9]*\)\.[0-9].*$/\1/p' ;;
    pbs) sed -n 's/^\([0-9][0-9]*\(\[\]\)\{0,1\}\(\.[A-Za-z0-9._-]*\)\{0,1\}\)$/\1/p' ;;
    lsf) sed -n 's/^Job <\([0-9][0-9]*\)> .*$/\1/p' ;;
    template)
      if [ -n "$pattern" ]; then
        grep -oE -e "$pattern"
      else
        # Digits within a path or a name are no id.
        grep -oE '(^|[^[:alnum:]/_-])[0-9]+($|[^[:alnum:]/_-])' | grep -oE '[0-9]+'
      fi
      ;;
  esac | head -n 1
}

submit() {
  n=$1
  while [ "$n" -le "$2" ]; do
    file=$dir/submit-$n
    # All jobs of an adaptive launcher have the same command.
    [ -e "$file" ] || file=$dir/submit-1
    limited 60 sh "$file" >"$dir/submit-$n.out" 2>"$dir/submit-$n.err"
    rc=$?
    job_id <"$dir/submit-$n.out" >"$dir/submit-$n.id"
    finished "submit-$n" "$rc"
    # The rest would fail for the same reason.
    [ "$rc" = 0 ] || break
    n=$((n + 1))
  done
}

# Prints the states of all jobs in the form of the engine. The arguments are ids.
states() {
  case $kind in
    slurm) limited 20 squeue -h -r -t all -u "$user" --name="$name" -o '%F|%K|%T|%r|%N' ;;
    htcondor)
      limited 20 condor_q -constraint "JobBatchName == \"$name\"" \
        -af:t ClusterId ProcId JobStatus RemoteHost HoldReason LastRejMatchReason || return
      # How jobs ended that have left the queue, in two lines each: 005 is the end of a job, 009 that it was removed.
      [ ! -e "$dir/events.log" ] || limited 20 awk \
        '/^0(05|09) \(/ { print "event " $0; if ((getline line) > 0) print "event " line }' "$dir/events.log"
      ;;
    gridEngine)
      limited 20 qstat -u "$user" -g d || return
      for id in "$@"; do
        limited 20 qstat -j "$id" 2>/dev/null |
          sed -n "s/^error reason *\([0-9]*\): */error $id \1 /p"
      done
      ;;
    pbs)
      limited 20 qstat -x -t -f "$@" 2>/dev/null || limited 20 qstat -t -f "$@" 2>/dev/null ||
        limited 20 qstat -f "$@"
      ;;
    lsf)
      limited 20 bjobs -a -noheader -J "$name" \
        -o "jobid jobindex stat exec_host exit_reason pend_reason delimiter='|'"
      ;;
    template) [ -z "$status" ] || eval "limited 20 $status" ;;
  esac
}

query() {
  # shellcheck disable=SC2046 # One word for each id.
  states $(ids) >"$dir/$1.out" 2>"$dir/$1.err"
  finished "$1" $?
}

cancel_ids() {
  [ $# -gt 0 ] || return 0
  case $kind in
    slurm) limited 20 scancel "$@" ;;
    htcondor) limited 20 condor_rm "$@" ;;
    gridEngine | pbs) limited 20 qdel "$@" ;;
    lsf) limited 20 bkill "$@" ;;
    template) eval "limited 20 $cancel" ;;
  esac
}

# Cancels the jobs whose ids are unknown, since their submit command was killed or its output is not understood.
cancel_name() {
  case $kind in
    slurm) limited 20 scancel -u "$user" --name="$name" ;;
    htcondor) limited 20 condor_rm -constraint "JobBatchName == \"$name\"" ;;
    gridEngine) limited 20 qdel "$name" ;;
    pbs)
      command -v qselect >/dev/null 2>&1 || return 127
      for id in $(limited 20 qselect -N "$name"); do limited 20 qdel "$id"; done
      ;;
    lsf) limited 20 bkill -J "$name" 0 ;;
    template) ;;
  esac
}

# Prints what is left of the jobs. Fails if the engine does not say. A job that is already being ended does not count:
# that takes long if its node is lost.
left() {
  case $kind in
    slurm)
      out=$(limited 20 squeue -h -u "$user" --name="$name" -o '%i %t') || return 1
      printf '%s\n' "$out" | sed '/ CG$/d; /^$/d'
      ;;
    htcondor)
      out=$(limited 20 condor_q -constraint "JobBatchName == \"$name\"" -af ClusterId JobStatus) || return 1
      printf '%s\n' "$out" | sed '/ [34]$/d; /^$/d'
      ;;
    gridEngine)
      out=$(limited 20 qstat -u "$user") || return 1
      for id in "$@"; do
        printf '%s\n' "$out" | awk -v id="$id" '$1 == id && $5 !~ /d/'
      done
      ;;
    pbs)
      for id in "$@"; do
        out=$(limited 20 qstat "$id" 2>/dev/null)
        case $? in
          0) printf '%s\n' "$out" | awk 'NR > 2 && $5 !~ /^[CEFX]$/' ;;
          # Unknown, and finished.
          153 | 35) ;;
          *) return 1 ;;
        esac
      done
      ;;
    lsf)
      out=$(limited 20 bjobs -noheader -J "$name" -o 'jobid stat' 2>&1)
      rc=$?
      case $out in
        *"not found"* | *"No unfinished job"*) ;;
        *)
          [ "$rc" = 0 ] || return 1
          printf '%s\n' "$out"
          ;;
      esac
      ;;
    template) ;;
  esac
}

ids() {
  cat "$dir"/submit-*.id 2>/dev/null
}

# Whether the shell has found none of the submit commands.
none_submitted() {
  for out in "$dir"/submit-*.out; do
    [ "$(cat "${out%.out}.rc" 2>/dev/null)" = 127 ] || return 1
  done
  [ -z "$(ids)" ]
}

# Ends all jobs and removes the directory, and nothing else.
end_jobs() {
  trap '' TERM HUP INT
  # Until a submit command has ended, its job is unknown.
  for pid in $submissions; do wait "$pid"; done
  # The directory may have been removed, or this guard may have replaced another.
  if [ -n "$submitted" ] || [ -e "$dir/submitted" ]; then
    limit=$(($(date +%s) + 60))
    pause=0.1
    while :; do
      # shellcheck disable=SC2046 # One word for each id.
      cancel_ids $(ids) >/dev/null 2>&1
      done=$?
      cancel_name >/dev/null 2>&1
      # The commands of the engine are not on this machine.
      [ "$?" = 127 ] && none_submitted && break
      # shellcheck disable=SC2046
      if rest=$(left $(ids) 2>/dev/null) && [ -z "$rest" ]; then
        # Of a template, only the exit status of its cancel command is known.
        [ "$kind" = template ] && [ "$done" != 0 ] || break
      fi
      [ "$(date +%s)" -lt "$limit" ] || break
      sleep "$pause" 2>/dev/null || sleep 1
      [ "$pause" = 0.1 ] && pause=0.5 || pause=2
    done
  fi
  # A log that a job still writes keeps a directory of NFS from being removed at once.
  for pause in 1 1 2 4 8; do
    rm -rf "$dir" 2>/dev/null
    [ -e "$dir" ] || break
    sleep "$pause"
  done
  exit 0
}

# The number of seconds for which the jobs outlive their head; empty if they do not. The file may be missing on a full
# disk: this guard remembers its own order.
lingers() {
  [ -z "$lingering" ] || { echo "$lingering"; return; }
  sed -n 's/^\([0-9][0-9]*\)$/\1/p' "$dir/linger" 2>/dev/null
}

# Makes this guard the one of the directory: a guard before it that waits for another head ends.
take_over() {
  { echo "$me" >"$dir/guard.$$" && mv -f "$dir/guard.$$" "$dir/guard"; } 2>/dev/null
}

linger() {
  lingering=
  if [ "$1" -gt 0 ]; then
    lingering=$1
    take_over
    # The head is there. A guard that is started later reads the time.
    rm -f "$dir/lost"
    { echo "$1" >"$dir/linger.$$" && mv -f "$dir/linger.$$" "$dir/linger"; } 2>/dev/null
  else
    rm -f "$dir/linger"
  fi
}

# The head has gone.
lost() {
  trap '' TERM HUP INT
  time=$(lingers)
  [ -n "$time" ] || end_jobs
  # A head that has tried in vain to take the cluster over does not prolong its time.
  [ -s "$dir/lost" ] || { date +%s >"$dir/lost"; } 2>/dev/null
  since=$(cat "$dir/lost" 2>/dev/null)
  limit=$((${since:-$(date +%s)} + time + 1))
  noted=
  [ ! -e "$dir/lost" ] || noted=1
  while [ "$(date +%s)" -le "$limit" ]; do
    sleep 0.5 2>/dev/null || sleep 1
    [ -d "$dir" ] || exit 0
    now=$(cat "$dir/guard" 2>/dev/null)
    [ -z "$now" ] || [ "$now" = "$me" ] || exit 0
    # The guard of the next head removes the file. On a full disk it has no mark.
    [ -z "$noted" ] || [ -e "$dir/lost" ] || exit 0
  done
  end_jobs
}

main() {
  dir=$1
  kind=$2
  name=$3
  pattern=$4
  cancel=$5
  status=$6
  # Only a directory that was made for these jobs is ever removed.
  case $dir in
    *[!A-Za-z0-9_./+@=,-]* | *..* | *//* | */) exit 2 ;;
    /*/*) ;;
    *) exit 2 ;;
  esac
  case $name in
    ?*-"${dir##*/}") ;;
    *) exit 2 ;;
  esac
  if [ -L "$dir" ] || [ ! -d "$dir" ] || [ ! -f "$dir/jobs-of" ]; then exit 2; fi
  [ "$(cat "$dir/jobs-of")" = "$name" ] || exit 2
  user=$(id -un)
  umask 077
  cd / || exit 2
  submissions=
  submitted=
  lingering=
  me=${7##*/}
  [ -n "$me" ] || me="$(uname -n) $$ $(date +%s)"
  [ -z "$(lingers)" ] || take_over
  trap lost TERM HUP INT
  while read -r order n rest; do
    case $order in
      submit)
        submitted=1
        # In a subshell, since a redirection that fails would end this one.
        (: >"$dir/submitted") 2>/dev/null
        submit "$n" "$rest" &
        submissions="$submissions $!"
        ;;
      query) query "query-$n" & ;;
      linger) linger "$n" ;;
      cancel)
        {
          # shellcheck disable=SC2086 # One word for each id.
          cancel_ids $rest >"$dir/cancel-$n.out" 2>"$dir/cancel-$n.err"
          finished "cancel-$n" $?
        } &
        ;;
    esac
  done
  lost
}

main "$@"
exit
