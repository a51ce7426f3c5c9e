#!/usr/bin/env bash
# Trains on a Google Cloud TPU, from nothing to a finished run.
#
#   bash launch/tpu.sh COMMAND [options] [arguments of pfjax.train]
#
#   create   asks for the TPU and waits until it is there
#   setup    ships the current commit and makes its environment on every worker
#   run      starts pfjax.train on all workers; it goes on without this machine
#   logs     the log of a worker; --follow keeps printing
#   status   the TPU, and what runs on each worker
#   stop     asks the run to save and end, and waits until it has; end a waiting `up`
#            first, which would begin again
#   delete   gives the TPU back
#   up       all of this: creates, sets up, runs, begins again after preemption,
#            and deletes the TPU when the run has ended
#
# Options, or the variables in brackets:
#   --name=NAME           of the TPU [PFJAX_TPU_NAME; pfjax]
#   --project=ID          [PFJAX_PROJECT; that of gcloud]
#   --zone=ZONE           [PFJAX_ZONE; that of gcloud]
#   --type=TYPE           v5litepod-16, v5p-128, v6e-16 [PFJAX_TYPE; v5litepod-16]
#   --runtime=VERSION     [PFJAX_RUNTIME; the one that fits the type]
#   --provisioning=MODEL  on-demand, spot, flex-start, reservation [PFJAX_PROVISIONING; on-demand]
#   --reservation=NAME    with reservation; any by default [PFJAX_RESERVATION]
#   --max-run=DURATION    with flex-start, at most 7d [PFJAX_MAX_RUN; 1d]
#   --deadline=SECONDS    to wait for a TPU [PFJAX_DEADLINE; 7200]
#   --poll=SECONDS        between looks [PFJAX_POLL; 20]
#   --restarts=N          of `up`, after preemptions or interruptions [PFJAX_RESTARTS; 50]
#   --worker=N            of `logs` [0]
#   --follow              of `logs`
#   --keep                `up` leaves the TPU in place at the end
#   --dry-run             prints the gcloud commands and runs none
#   --help
#
# Example, on spot TPUs:
#   bash launch/tpu.sh up --zone=us-west4-a --type=v5litepod-16 --provisioning=spot \
#     --config=configs/qwen2_5_math_1_5b.py --workdir=gs://bucket/runs/math
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# What pfjax.train ends with when it was told to stop, has saved, and can go on.
readonly INTERRUPTED=75
# What this script ends with when a wait was too long.
readonly TIMED_OUT=124

say() {
  # Nothing has happened in a dry run. A terminal that is gone is no reason to stop: the
  # TPU may have to be given back.
  [[ ${dry_run:-} ]] || printf '%s\n' "$*" >&2 || true
}
fail() {
  printf 'error: %s\n' "$*" >&2 || true
  exit 1
}
help() { sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

command=${1:-}
case $command in
  create | setup | run | logs | status | stop | delete | up) shift ;;
  --help | -h | help) help && exit ;;
  '') help >&2 && exit 2 ;;
  *) fail "no command '$command'; see bash launch/tpu.sh --help" ;;
esac

name=${PFJAX_TPU_NAME:-pfjax} project=${PFJAX_PROJECT:-} zone=${PFJAX_ZONE:-}
type=${PFJAX_TYPE:-v5litepod-16} runtime=${PFJAX_RUNTIME:-}
provisioning=${PFJAX_PROVISIONING:-on-demand} reservation=${PFJAX_RESERVATION:-}
max_run=${PFJAX_MAX_RUN:-1d} deadline=${PFJAX_DEADLINE:-7200} poll=${PFJAX_POLL:-20}
restarts=${PFJAX_RESTARTS:-50} worker=0 follow='' keep='' dry_run='' config='' workdir='' train=()

while (($#)); do
  # Both --name=value and --name value.
  case $1 in
    --name | --project | --zone | --type | --runtime | --provisioning | --reservation | \
      --max-run | --deadline | --poll | --restarts | --worker | --config | --workdir)
      (($# > 1)) || fail "$1 needs a value"
      set -- "$1=$2" "${@:3}"
      ;;
  esac
  value=${1#*=}
  case $1 in
    --name=*) name=$value ;;
    --project=*) project=$value ;;
    --zone=*) zone=$value ;;
    --type=*) type=$value ;;
    --runtime=*) runtime=$value ;;
    --provisioning=*) provisioning=$value ;;
    --reservation=*) reservation=$value ;;
    --max-run=*) max_run=$value ;;
    --deadline=*) deadline=$value ;;
    --poll=*) poll=$value ;;
    --restarts=*) restarts=$value ;;
    --worker=*) worker=$value ;;
    --follow) follow=yes ;;
    --keep) keep=yes ;;
    --dry-run) dry_run=yes ;;
    --help | -h) help && exit ;;
    --config=*) config=$value train+=("$1") ;;
    --workdir=*) workdir=$value train+=("$1") ;;
    --config.*) train+=("$1") ;;
    *) fail "unknown option $1; see bash launch/tpu.sh --help" ;;
  esac
  shift
done
[[ $name && $name != -* ]] || fail "--name=$name: must be the name of a TPU"
case $provisioning in
  on-demand | spot | flex-start | reservation) ;;
  *) fail "--provisioning=$provisioning: must be on-demand, spot, flex-start or reservation" ;;
esac
for number in deadline poll restarts worker; do
  [[ ${!number} =~ ^(0|[1-9][0-9]*)$ ]] || fail "--$number=${!number}: must be a whole number"
done
if [[ -z $runtime ]]; then
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "--type=$type: no runtime known for it; name one: --runtime=VERSION" ;;
  esac
fi
if [[ $command == run || $command == up ]]; then
  [[ $config ]] || fail "$command needs --config=FILE, as pfjax.train does"
  [[ $workdir == gs://* ]] ||
    fail "$command needs --workdir=gs://BUCKET/PATH: what is on a TPU goes with it"
fi
if [[ $command == setup || $command == up ]]; then
  commit=$(git -C "$ROOT" rev-parse --short=12 HEAD 2>/dev/null) ||
    fail "$ROOT is no git checkout: only a commit can be shipped"
fi
# Never empty, which older versions of bash take for an error.
where=(--quiet ${project:+"--project=$project"} ${zone:+"--zone=$zone"})

# --- gcloud ---------------------------------------------------------------------------

cloud() {
  if [[ $dry_run ]]; then
    { printf 'gcloud' && printf ' %q' "$@" && echo; } >&3
  else
    gcloud "$@"
  fi
}

queued() { # VERB [argument ...]
  cloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"
}

# A command on workers; its words reach the shell there as they are.
on_workers() { # WORKERS word ...
  cloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" \
    "--command=$(printf '%q ' "${@:2}")"
}

# ACTIVE, WAITING_FOR_RESOURCES, ..., ABSENT; fails when it cannot be told.
state() { # WHAT A DRY RUN TAKES IT FOR
  local out
  if [[ $dry_run ]]; then
    queued describe '--format=value(state.state)'
    echo "$1"
  elif out=$(queued describe '--format=value(state.state)' 2>&1); then
    # gcloud may add notices of its own.
    grep -E '^[A-Z_]+$' <<<"$out" | tail -n 1
  elif [[ $out == *NOT_FOUND* || $out == *"was not found"* ]]; then
    echo ABSENT
  else
    say "$out"
    return 1
  fi
}

ending() {
  printf 'gcloud compute tpus queued-resources delete %q' "$name"
  printf ' %q' --force "${where[@]}"
}

told=''
costs() { # WHAT IS SO
  told=yes
  say "$name $1 and COSTS MONEY until: $(ending)"
}

# --- commands -------------------------------------------------------------------------

# What this call has asked for, and so has to give back if it fails.
created=''

ask() {
  local verb=(compute) args said status=0
  args=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime")
  case $provisioning in
    spot) args+=(--spot) ;;
    flex-start)
      verb=(alpha compute)
      args+=(--provisioning-model=flex-start "--max-run-duration=$max_run")
      ;;
    reservation)
      if [[ $reservation ]]; then
        verb=(alpha compute)
        args+=(--provisioning-model=reservation-bound "--reservation=$reservation")
      else
        args+=(--reserved)
      fi
      ;;
  esac
  # It is not made after the deadline either, when nobody may be here to use it.
  args+=("--valid-until-duration=${deadline}s")
  created=yes
  said=$(cloud "${verb[@]}" tpus queued-resources create "$name" "${where[@]}" "${args[@]}" 2>&1) ||
    status=$?
  [[ -z $said ]] || say "$said"
  ((status)) || return 0
  case $said in
    *ALREADY_EXISTS* | *"already exists"*)
      created=''
      say "$name was made by somebody else meanwhile: using it"
      ;;
    *[Qq]uota* | *RESOURCE_EXHAUSTED*)
      fail "no quota for $type ($provisioning) in ${zone:-the zone of gcloud}; another --zone, --type or --provisioning, or ask for more: https://console.cloud.google.com/iam-admin/quotas"
      ;;
    *) fail "gcloud could not create $name (above)" ;;
  esac
}

create() {
  local now before='' begin=$SECONDS asked=''
  while true; do
    if [[ $asked ]]; then
      now=$(state ACTIVE) || now='(unknown)'
    else
      now=$(state ABSENT) || fail "gcloud does not say whether $name exists (above)"
    fi
    if [[ $asked && $now != ACTIVE ]] && ((SECONDS - begin >= deadline)); then
      say "error: $name is still $now after $deadline s (--deadline)"
      exit "$TIMED_OUT"
    fi
    case $now in
      ACTIVE)
        say "$name is there, after $((SECONDS - begin)) s"
        return
        ;;
      SUSPENDED | SUSPENDING | DELETING)
        # Spot TPUs may be taken away while this waits, too.
        say "$name is $now: deleting it, to ask again"
        delete
        asked='' before=''
        continue
        ;;
      FAILED | ABSENT)
        if [[ $asked ]]; then
          queued describe >&2 || true
          fail "$name is $now: it will not come"
        fi
        [[ $now == ABSENT ]] || delete
        ask
        asked=yes
        continue
        ;;
    esac
    asked=yes
    if [[ $now != "$before" ]]; then
      case $now in
        WAITING_FOR_RESOURCES | ACCEPTED) say "waiting for $name: in the queue for $type ($provisioning)" ;;
        *) say "waiting for $name: $now" ;;
      esac
      before=$now
    fi
    sleep "$poll"
  done
}

# In a shell of its own, which removes what it wrote however it ends.
setup() (
  local folder archive
  [[ -z $(git -C "$ROOT" status --porcelain) ]] ||
    say "note: what is not committed is not shipped; the workers get $commit"
  folder=$(mktemp -d) || exit
  # After a dry run it stays, for who runs the commands by hand.
  trap '[[ $dry_run ]] || rm -r "$folder"' EXIT
  archive=$folder/pfjax-$commit.tar.gz
  git -C "$ROOT" archive --prefix="pfjax-$commit/" -o "$archive" HEAD ||
    fail "could not pack $commit (above)"
  say "setting up $commit on every worker of $name (some minutes the first time)"
  cloud compute tpus tpu-vm scp "$archive" "$name:" "${where[@]}" --worker=all ||
    fail "could not copy the code to the workers (above)"
  # The script that goes on with it is in the archive.
  on_workers all bash -c "set -e; tar -xzf pfjax-$commit.tar.gz; ln -sfn pfjax-$commit pfjax-current; bash pfjax-current/launch/worker.sh setup" ||
    fail "the environment could not be made on every worker (above)"
)

run() {
  on_workers all bash pfjax-current/launch/worker.sh run "${train[@]}" --multihost ||
    fail "the run could not be started on every worker (above)"
}

logs() {
  on_workers "$worker" bash pfjax-current/launch/worker.sh logs ${follow:+--follow} ||
    fail "no log came from worker $worker (above)"
}

status() {
  local now
  now=$(state ACTIVE) || fail "gcloud does not say what $name is (above)"
  [[ $dry_run ]] || echo "$name: $now"
  [[ $now == ACTIVE ]] || return 0
  on_workers all bash pfjax-current/launch/worker.sh status ||
    fail "not every worker answered (above)"
}

stop() {
  on_workers all bash pfjax-current/launch/worker.sh stop ||
    fail "not every worker could be stopped (above)"
}

delete() {
  local now before='' said='' accepted='' begin=$SECONDS
  while true; do
    if [[ ! $accepted ]] && said=$(queued delete --force 2>&1); then accepted=yes; fi
    now=$(state ABSENT) || now='(unknown)'
    case $now in
      ABSENT)
        created=''
        say "$name is gone"
        return
        ;;
      # In the middle of something it cannot be deleted yet; later it can.
      CREATING | PROVISIONING | SUSPENDING | DELETING | '(unknown)') ;;
      *)
        [[ $accepted ]] || {
          say "$said"
          costs "could not be deleted (above): it is STILL $now"
          exit 1
        }
        ;;
    esac
    [[ $now == "$before" ]] || say "waiting until $name is gone: $now"
    before=$now
    if ((SECONDS - begin >= 900)); then
      [[ -z $said ]] || say "$said"
      costs "is still $now after 900 s"
      exit "$TIMED_OUT"
    fi
    sleep "$poll"
  done
}

# --- up -------------------------------------------------------------------------------

# What the workers say of the run together: running, ended N, lost, or nothing when not
# all can be reached.
run_state() {
  local out
  out=$(on_workers all bash pfjax-current/launch/worker.sh status 2>/dev/null) || return 0
  if [[ $dry_run ]]; then
    echo 'ended 0'
    return
  fi
  # One that was told to stop takes the others with it. 143: told before it could save.
  awk '/: lost$/ {lost = 1}
       /: running$/ {running = 1}
       /: ended [0-9]+$/ {ended = 1
         if ($NF == 75 || $NF == 143) told = 1; else if ($NF != 0) bad = $NF}
       END {if (lost) print "lost"
            else if (bad && !told) print "ended", bad
            else if (running) print "running"
            else if (told) print "ended", 75
            else if (ended) print "ended", 0}' <<<"$out"
}

# Whether the TPU is being taken away: what runs on it notices before its state does.
preempted() {
  local now
  for _ in 1 2 3; do
    sleep "$poll"
    now=$(state ACTIVE) || continue
    if [[ $now != ACTIVE ]]; then
      say "$name is $now: preempted"
      return
    fi
  done
  return 1
}

# Returns when the run has ended well, or 75 when it has to begin again.
watch() {
  local found now silent=0
  while true; do
    found=$(run_state)
    case $found in
      'ended 0') return 0 ;;
      "ended $INTERRUPTED")
        say "the run was interrupted"
        preempted || true
        return "$INTERRUPTED"
        ;;
      ended*)
        ! preempted || return "$INTERRUPTED"
        (worker=0 follow='' && logs) >&2 || true
        fail "the run failed with exit status ${found#ended } (log of worker 0 above, of all in $workdir/logs)"
        ;;
      lost)
        # The others wait for the worker that began anew; a new TPU is simpler.
        say "a worker of $name has lost the run"
        delete
        return "$INTERRUPTED"
        ;;
      running) silent=0 ;;
    esac
    now=$(state ACTIVE) || now='(unknown)'
    case $now in
      ACTIVE)
        # When gcloud cannot be reached either, the workers are not to blame.
        [[ $found ]] || ((++silent))
        ((silent < 10)) || fail "not all workers of $name have answered for $silent looks"
        ;;
      '(unknown)') ;;
      *)
        say "$name is $now: preempted"
        return "$INTERRUPTED"
        ;;
    esac
    sleep "$poll"
  done
}

# Whether a run goes on, or soon will, that does not need this script.
detached=''

up() {
  local attempt status
  for ((attempt = 0; attempt <= restarts; attempt++)); do
    ((attempt == 0)) || say "beginning again, from the last checkpoint ($attempt of at most $restarts)"
    detached=''
    create
    detached=yes
    status=0
    # fail ends only the shell of its own that this is.
    (setup && run) || status=$?
    if ((status)); then
      preempted || fail "could not start the run on $name"
      continue
    fi
    say "running; it goes on if this stops. To look: bash launch/tpu.sh logs$(printf ' %q' "--name=$name" "${where[@]:1}")"
    watch || status=$?
    if ((status == 0)); then
      say "the run has ended"
      created=''
      if [[ $keep ]]; then costs "is kept (--keep)"; else delete; fi
      return
    fi
  done
  fail "the run was interrupted more than $restarts times (--restarts)"
}

# --- what is left behind --------------------------------------------------------------

# Gives back what this call has asked for, unless it has come to its end.
at_exit() {
  local status=$? now
  trap '' INT TERM HUP
  if [[ $dry_run ]] || ((status == 0)); then exit "$status"; fi
  if [[ $created ]]; then
    if [[ $keep ]]; then
      costs "is kept (--keep)"
    elif [[ $(state ABSENT 2>/dev/null) != ABSENT ]]; then
      say "giving $name back"
      # In a shell of its own: its failure is already said, and this status counts.
      (delete) || true
    fi
  elif [[ ! $told && ! $command =~ ^(delete|logs|status)$ ]]; then
    now=$(state ABSENT 2>/dev/null) || now='(unknown)'
    [[ $now == ABSENT ]] || costs "is left as it is ($now)"
  fi
  exit "$status"
}

interrupted() { # STATUS
  if [[ $detached ]]; then
    # Only a person who wants it gone deletes it.
    created=''
    say "what runs on $name goes on without this; the same command watches it again"
  fi
  exit "$1"
}

command -v gcloud >/dev/null || [[ $dry_run ]] ||
  fail "gcloud is not here; see https://cloud.google.com/sdk/docs/install, or --dry-run to look at the commands"
exec 3>&1
# Ctrl-C ends a `| tee` too; writing to it must not end this halfway.
trap '' PIPE
trap at_exit EXIT
trap 'interrupted 130' INT
trap 'interrupted 129' HUP
trap 'interrupted 143' TERM
$command
case $command in
  create) costs "is ready" ;;
  run) costs "runs on" ;;
  stop) costs "is still there" ;;
esac
