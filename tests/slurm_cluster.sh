#!/usr/bin/env bash
# Runs launch/slurm.sh on a Slurm cluster of two nodes, both this machine, that is made for it
# from Debian's packages and taken down again:
#
#   bash tests/slurm_cluster.sh     a few minutes; needs root
#
# A run of two processes is told to stop as ahead of its time limit, goes on, has a process
# killed, goes on, is cancelled, and is finished by another job.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ${1:-} == --help ]]; then
  sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//p}' "tests/${BASH_SOURCE[0]##*/}"
  exit
fi

skip() {
  echo "skipped: launch/slurm.sh on a real cluster: $*"
  exit
}
node=$(hostname -s)
[[ $(id -u) == 0 ]] || skip "only root can start slurmd"
getent hosts "$node" >/dev/null || skip "the name of this machine, $node, has no address"
command -v slurmctld slurmd munged >/dev/null ||
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >/dev/null 2>&1 ||
  skip "there is no slurmctld, and apt-get does not install it"

source launch/environment.sh
prepare dev
python=$PYTHON
folder=$(mktemp -d)
log=$folder/log
daemons=()
export SLURM_CONF=$folder/slurm.conf

take_down() {
  scancel --user=root --quiet 2>/dev/null || true
  for _ in {1..40}; do
    [[ $(squeue --noheader 2>/dev/null) ]] || break
    sleep 0.5
  done
  ((${#daemons[@]} == 0)) || kill "${daemons[@]}" 2>/dev/null || true
  wait
  rm -rf "$folder"
}
trap take_down EXIT

# --- the cluster ----------------------------------------------------------------------

read -r -a ports < <("$python" -c '
import socket
found = [socket.create_server(("", 0)) for _ in range(3)]
print(*(x.getsockname()[1] for x in found))')
# Two cores a node, of each of which the default is a share of the memory that is too small.
# Devices that every machine has stand for GPUs. A job that is queued again waits until what
# it was allowed with (cred_expire) is no more.
cat >"$SLURM_CONF" <<END
ClusterName=pfjax
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmdParameters=config_overrides
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
JobAcctGatherParams=OverMemoryKill
KillWait=5
ReturnToService=2
GresTypes=gpu
NodeName=$node,$node-second NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$(sort -n <(printf '%s\n' "${ports[@]:1}") | paste -sd,)] CPUs=2 RealMemory=8000 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES State=UP
END
echo "Name=gpu File=/dev/null,/dev/zero" >"$folder/gres.conf"
touch "$folder/cgroup.conf"
mkdir "$folder/state" "$folder/$node" "$folder/$node-second"
(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")

munged --foreground --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" \
  >"$folder/daemons.log" 2>&1 &
daemons+=($!)
until [[ -S $folder/munge.socket ]]; do sleep 0.1; done
for command in slurmctld "slurmd -N $node" "slurmd -N $node-second"; do
  # shellcheck disable=SC2086 # a command and its arguments
  $command -D >>"$folder/daemons.log" 2>&1 &
  daemons+=($!)
done

readonly PATIENCE=300 # seconds, with what hangs

# --- checks ---------------------------------------------------------------------------

failed() {
  echo "FAILED: $*"
  tail -n 40 "$log" "$folder/daemons.log"
  exit 1
}

# Waits until a command succeeds.
wait_for() { # WHAT COMMAND...
  local start=$SECONDS
  until "${@:2}"; do
    ((SECONDS < start + PATIENCE)) || failed "$1"
    sleep 0.5
  done
  echo "ok: $1 ($((SECONDS - start)) s)"
}

idle() { [[ $(sinfo --noheader --format=%D --states=idle 2>/dev/null) == 2 ]]; }
said() { grep -qs -- "$1" "$log"; }
state() { scontrol show job "$1" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
is() { [[ $(state "$1") == "$2" ]]; }
last_step() { sed -n 's/.*"step": \([0-9]*\).*/\1/p' "$folder/run/metrics.jsonl" 2>/dev/null | tail -n 1; }
past() { (($(last_step) + 0 > $1)); }
resumed() { (($(grep -c "continuing .* after step $saved\$" "$log") >= $1)); } # TIMES

variable() { # PROCESS NAME
  { tr '\0' '\n' <"/proc/$1/environ" | sed -n "s/^$2=//p"; } 2>/dev/null
}

# The process of training of one of the two tasks.
task() { # NUMBER
  local pid
  for pid in $(pgrep -f "^$python -m pfjax.train"); do
    if [[ $(variable "$pid" SLURM_CONF) == "$SLURM_CONF" && $(variable "$pid" SLURM_PROCID) == "$1" ]]; then
      echo "$pid"
    fi
  done
}

# The environment of this checkout, which is there.
cat >"$folder/python" <<END
#!/usr/bin/env bash
case "\$1 \${2:-}" in
  '-m venv') mkdir -p "\$3/bin" && cp "\$0" "\$3/bin/python" ;;
  '-m pip') ;;
  *) exec $python "\$@" ;;
esac
END
chmod +x "$folder/python"
export PFJAX_PYTHON=$folder/python PFJAX_VENV=$folder/venv JAX_PLATFORMS=cpu
# It compiles for longer than it computes.
export JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_COMPILATION_CACHE_DIR=${PFJAX_TEST_CACHE:-$ROOT/.pytest_cache/compiled}

submit() { # SETTINGS OF THE RUN...
  sbatch --parsable --nodes=2 --ntasks-per-node=1 --gpus-per-node=2 --output="$log" \
    launch/slurm.sh --config=configs/smoke.py --workdir="$folder/run" \
    --config.optim.schedule=constant --config.match_prompts=0 --config.data.eval= \
    --config.prompts_per_step=4 --config.samples_per_prompt=2 --config.microbatch_size=4 \
    --config.max_new_tokens=8 --config.checkpoint_every=1000000 "$@"
}

wait_for "two nodes are up" idle
job=$(submit --config.num_steps=1000000)
wait_for "a run of two processes trains" past 1
said "of 2, first at $node:" || failed "the address of the first process is in the log"
for number in 0 1; do
  pid=$(task "$number")
  cores=$("$python" -c "import os; print(len(os.sched_getaffinity($pid)))")
  [[ $cores == 2 && $(variable "$pid" SLURM_CPUS_PER_TASK) == 2 ]] || failed "a task has the 2 cores of its node, not $cores"
  [[ $(variable "$pid" CUDA_VISIBLE_DEVICES) == 0,1 ]] || failed "a task sees the 2 GPUs of its node"
done
echo "ok: tasks have the cores, memory and GPUs of their nodes"

scancel --batch --signal=TERM "$job"
wait_for "told ahead of its time limit it saves, and is queued again" said "the run has saved and is queued again"
saved=$(last_step)
wait_for "it goes on from there" resumed 1

kill -KILL "$(task 1)"
wait_for "a task that was killed has it queued again" said "a task died: queued again from the last checkpoint, 1 of 10"
! said "stack trace" || failed "the others end without stacks"
wait_for "it goes on from its last checkpoint" resumed 2
wait_for "and trains" past $((saved + 1))

scancel "$job"
wait_for "a job that was cancelled does not come back" is "$job" CANCELLED

: >"$log"
# It may have saved as it was cancelled.
last=$(($(last_step) + 3))
job=$(submit --config.num_steps="$last")
wait_for "another job finishes the run" is "$job" COMPLETED
[[ $(last_step) == "$last" ]] || failed "the last step is that of the second job"
[[ -f $folder/run/hf/model.safetensors ]] || failed "the policy was written"

job=$(submit --config.alpha=9)
wait_for "a mistake ends the job" is "$job" FAILED
said "error: " || failed "the mistake is said"
! said "queued again" || failed "it is not queued again"
