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
#   up       all of this: checks what can be checked, creates, sets up, runs, begins again
#            after preemption, and deletes the TPU when the run has ended
#
# Options, or the variables in brackets:
#   --name=NAME           of the TPU [PFJAX_TPU_NAME; pfjax]
#   --project=ID          [PFJAX_PROJECT; that of gcloud]
#   --zone=ZONE           [PFJAX_ZONE; that of gcloud]
#   --type=TYPE           v5litepod-16, v5p-128, v6e-16 [PFJAX_TYPE; v5litepod-16]; TPU7x and
#                         later are not served by the Cloud TPU API: see launch/gke.yaml
#   --runtime=VERSION     [PFJAX_RUNTIME; the one that fits the type]
#   --provisioning=MODEL  on-demand, spot, flex-start, reservation, or calendar for a future
#                         reservation in calendar mode [PFJAX_PROVISIONING; on-demand]
#   --reservation=NAME    needed with calendar; with reservation, any if left out
#                         [PFJAX_RESERVATION]
#   --max-run=DURATION    with flex-start, 12h or 1d12h, at most 7d [PFJAX_MAX_RUN; 1d]
#   --network=NAME        [PFJAX_NETWORK; default]
#   --subnetwork=NAME     [PFJAX_SUBNETWORK]
#   --service-account=EMAIL  whom the workers act as [PFJAX_SERVICE_ACCOUNT; Compute Engine's]
#   --internal-ip         the workers have no external addresses: they need Cloud NAT to
#                         install anything, and this machine has to be in their network
#   --tunnel-through-iap  reaches them by Identity-Aware Proxy instead, from anywhere
#   --env=NAME[=VALUE]    sets a variable on the workers (`setup`, `up`; repeatable); without
#                         VALUE it is taken from here, and never shows in a process list
#   --extras=NAME,...     of setup.py to install on the workers (`setup`, `up`), such as wandb
#                         [PFJAX_EXTRAS]
#   --deadline=SECONDS    to wait for a TPU [PFJAX_DEADLINE; 7200]
#   --poll=SECONDS        between looks [PFJAX_POLL; 20]
#   --restarts=N          of `up`, after preemptions or interruptions [PFJAX_RESTARTS; 50]
#   --max-hours=N         that one `up` may hold a TPU in total; the run then saves and ends
#                         [PFJAX_MAX_HOURS; 168]
#   --hold=SECONDS        how long `up` keeps a TPU whose set-up has failed [PFJAX_HOLD; 1800]
#   --worker=N            of `logs` [0]
#   --follow              of `logs`
#   --keep                `up` leaves the TPU in place at the end
#   --dry-run             prints the gcloud commands and runs none
#   --help
#
# Example, on spot TPUs:
#   bash launch/tpu.sh up --zone=us-west4-a --type=v5litepod-16 --provisioning=spot \
#     --env=HF_TOKEN --config=configs/qwen2_5_math_1_5b.py --workdir=gs://BUCKET/runs/math
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$(dirname "${BASH_SOURCE[0]}")/tpu/checks.sh"
source "$(dirname "${BASH_SOURCE[0]}")/tpu/up.sh"

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

# Everybody on this machine can list arguments, and nobody the variables of others: starts
# anew with the values of --env in the place where they are read from below.
hide_values() {
  local args=() hidden=''
  while (($#)); do
    if [[ $1 == --env ]] && (($# > 1)); then set -- "--env=$2" "${@:3}"; fi
    if [[ $1 =~ ^--env=([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]]; then
      export "PFJAX_ENV_${BASH_REMATCH[1]}=${BASH_REMATCH[2]}"
      set -- "--env=${BASH_REMATCH[1]}" "${@:2}"
      hidden=yes
    fi
    args+=("$1")
    shift
  done
  [[ ! $hidden ]] || exec bash "${BASH_SOURCE[0]}" "${args[@]}"
}
hide_values "$@"

command=${1:-}
answer_help "$@"
case $command in
  create | setup | run | logs | status | stop | delete | up) shift ;;
  help) answer_help --help ;;
  '') (answer_help --help) >&2 && exit 2 ;;
  *) fail "no command '$command'; see bash launch/tpu.sh --help" ;;
esac

name=${PFJAX_TPU_NAME:-pfjax} project=${PFJAX_PROJECT:-} zone=${PFJAX_ZONE:-}
type=${PFJAX_TYPE:-v5litepod-16} runtime=${PFJAX_RUNTIME:-}
provisioning=${PFJAX_PROVISIONING:-on-demand} reservation=${PFJAX_RESERVATION:-}
max_run=${PFJAX_MAX_RUN:-1d} deadline=${PFJAX_DEADLINE:-7200} poll=${PFJAX_POLL:-20}
network=${PFJAX_NETWORK:-} subnetwork=${PFJAX_SUBNETWORK:-}
service_account=${PFJAX_SERVICE_ACCOUNT:-} internal_ip='' tunnel=''
restarts=${PFJAX_RESTARTS:-50} max_hours=${PFJAX_MAX_HOURS:-168} hold=${PFJAX_HOLD:-1800}
worker=0 follow='' keep='' dry_run='' config='' workdir='' train=()
# Of the workers: names, and lines NAME=VALUE as a shell reads them.
variables=() extras=${PFJAX_EXTRAS:-} assignments='' hf_token='' hf_endpoint=''

while (($#)); do
  # Both --name=value and --name value.
  case $1 in
    --name | --project | --zone | --type | --runtime | --provisioning | --reservation | \
      --max-run | --network | --subnetwork | --service-account | --env | --extras | \
      --deadline | --poll | --restarts | --max-hours | --hold | --worker | --config | --workdir)
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
    --network=*) network=$value ;;
    --subnetwork=*) subnetwork=$value ;;
    --service-account=*) service_account=$value ;;
    --internal-ip) internal_ip=yes ;;
    --tunnel-through-iap) tunnel=yes ;;
    --env=*) variables+=("$value") ;;
    --extras=*) extras=$value ;;
    --deadline=*) deadline=$value ;;
    --poll=*) poll=$value ;;
    --restarts=*) restarts=$value ;;
    --max-hours=*) max_hours=$value ;;
    --hold=*) hold=$value ;;
    --worker=*) worker=$value ;;
    --follow) follow=yes ;;
    --keep) keep=yes ;;
    --dry-run) dry_run=yes ;;
    --config=*) config=$value train+=("$1") ;;
    --workdir=*) workdir=$value train+=("$1") ;;
    --config.*) train+=("$1") ;;
    *) fail "unknown option $1; see bash launch/tpu.sh --help" ;;
  esac
  shift
done

add_variable() { # NAME
  local value
  # Whatever came after a = is not repeated.
  [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "--env=${1%%=*}: must be NAME or NAME=VALUE"
  (export "$1=x") 2>/dev/null || fail "--env=$1: belongs to the shell, and cannot be set"
  value=$(printenv "PFJAX_ENV_$1") || value=$(printenv "$1") ||
    fail "--env=$1: is not set here; export it, or --env=$1=VALUE"
  unset "PFJAX_ENV_$1"
  assignments+=$(printf '%s=%q' "$1" "$value")$'\n'
  case $1 in
    HF_TOKEN) hf_token=$value ;;
    HF_ENDPOINT) hf_endpoint=$value ;;
  esac
}

seconds() { # DURATION
  local left=$1 sum=0
  while [[ $left =~ ^([0-9]+)([dhms])(.*)$ ]]; do
    left=${BASH_REMATCH[3]}
    case ${BASH_REMATCH[2]} in
      d) ((sum += 86400 * 10#${BASH_REMATCH[1]})) ;;
      h) ((sum += 3600 * 10#${BASH_REMATCH[1]})) ;;
      m) ((sum += 60 * 10#${BASH_REMATCH[1]})) ;;
      s) ((sum += 10#${BASH_REMATCH[1]})) ;;
    esac
  done
  [[ ! $left ]] && echo "$sum"
}

[[ ! $reservation || $provisioning =~ ^(reservation|calendar)$ ]] ||
  fail "--reservation=$reservation needs --provisioning=reservation or calendar"
[[ $name && $name != -* ]] || fail "--name=$name: must be the name of a TPU"
case $provisioning in
  on-demand | spot | reservation) ;;
  calendar) [[ $reservation ]] || fail "--provisioning=calendar needs --reservation=NAME" ;;
  flex-start)
    if ! max_run_s=$(seconds "$max_run") || ((max_run_s == 0 || max_run_s > 7 * 86400)); then
      fail "--max-run=$max_run: must be a duration such as 12h or 1d12h, at most 7d"
    fi
    ;;
  *) fail "--provisioning=$provisioning: must be on-demand, spot, flex-start, reservation or calendar" ;;
esac
for number in deadline poll restarts max_hours hold worker; do
  [[ ${!number} =~ ^(0|[1-9][0-9]*)$ ]] || fail "--${number/_/-}=${!number}: must be a whole number"
done
case $type in
  v5litepod-*) fitting=v2-alpha-tpuv5-lite ;;
  v5p-*) fitting=v2-alpha-tpuv5 ;;
  v6e-*) fitting=v2-alpha-tpuv6e ;;
  v[234]-*) fitting=tpu-ubuntu2204-base ;;
  v5e-*) fail "--type=$type: is called v5litepod-${type#v5e-}" ;;
  tpu[7-9]* | v[7-9]*) fail "--type=$type: the Cloud TPU API does not serve TPU7x and later; use GKE (launch/gke.yaml)" ;;
  *) fitting='' ;;
esac
runtime=${runtime:-$fitting}
[[ $runtime ]] || fail "--type=$type: no runtime known for it; name one: --runtime=VERSION"
if [[ $command == run || $command == up ]]; then
  [[ $config ]] || fail "$command needs --config=FILE, as pfjax.train does"
  [[ $workdir == gs://* ]] ||
    fail "$command needs --workdir=gs://BUCKET/PATH: what is on a TPU goes with it"
fi
if [[ $command == setup || $command == up ]]; then
  commit=$(git -C "$ROOT" rev-parse --short=12 HEAD 2>/dev/null) ||
    fail "$ROOT is no git checkout: only a commit can be shipped"
  if [[ $extras ]]; then export PFJAX_EXTRAS=$extras && variables+=(PFJAX_EXTRAS); fi
  for variable in ${variables[@]+"${variables[@]}"}; do add_variable "$variable"; done
elif ((${#variables[@]})) || [[ $extras != "${PFJAX_EXTRAS:-}" ]]; then
  fail "$command takes no --env and no --extras; setup and up do"
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

tpu_vm() { # VERB argument ...
  local verb=(compute) how=("${where[@]}")
  if [[ $tunnel ]]; then
    verb=(alpha compute)
    how+=(--tunnel-through-iap)
  elif [[ $internal_ip ]]; then
    how+=(--internal-ip)
  fi
  cloud "${verb[@]}" tpus tpu-vm "$@" "${how[@]}"
}

# A command on workers; its words reach the shell there as they are.
on_workers() { # WORKERS word ...
  tpu_vm ssh "$name" "--worker=$1" "--command=$(printf '%q ' "${@:2}")"
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
  local verb=(compute) args said own_zone status=0
  args=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime")
  case $provisioning in
    spot) args+=(--spot) ;;
    flex-start)
      verb=(alpha compute)
      args+=(--provisioning-model=flex-start "--max-run-duration=$max_run")
      ;;
    reservation | calendar)
      if [[ $reservation ]]; then
        verb=(alpha compute)
        args+=("--reservation=$reservation")
      else
        args+=(--reserved)
        # gcloud looks for one in the zone of its arguments, not in that of its settings.
        own_zone=${zone:-$(cloud config get-value compute/zone 2>/dev/null || true)}
        [[ $zone || ! $own_zone ]] || args+=("--zone=$own_zone")
      fi
      [[ $provisioning != calendar ]] || args+=(--provisioning-model=reservation-bound)
      ;;
  esac
  args+=(${network:+"--network=$network"} ${subnetwork:+"--subnetwork=$subnetwork"}
    ${service_account:+"--service-account=$service_account"} ${internal_ip:+--internal-ips})
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
  # A dry run leaves its files behind, so without the values.
  (umask 077 && sed "${dry_run:+s/=.*/=***/}" <<<"$assignments" >"$folder/pfjax-env") ||
    fail "could not write $folder/pfjax-env (above)"
  say "setting up $commit on every worker of $name (some minutes the first time)"
  tpu_vm scp "$archive" "$folder/pfjax-env" "$name:" --worker=all ||
    fail "could not copy the code to the workers (above)"
  # The script that goes on with it is in the archive.
  on_workers all bash -c "set -e; chmod 600 pfjax-env; tar -xzf pfjax-$commit.tar.gz; ln -sfn pfjax-$commit pfjax-current; bash pfjax-current/launch/worker.sh setup$(printf ' %q' "$workdir")" ||
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
  if [[ $detached || $held ]]; then
    # Only a person who wants it gone deletes it.
    created=''
    [[ ! $detached ]] || say "what runs on $name goes on without this; the same command watches it again"
    [[ ! $held ]] || say "$name is kept; the same command goes on with it"
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
case $command in
  create | setup | up) check ;;
  *) choose_agent ;;
esac
$command
case $command in
  create) costs "is ready" ;;
  run) costs "runs on" ;;
  stop) costs "is still there" ;;
esac
