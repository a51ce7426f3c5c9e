#!/usr/bin/env bash
# Trains on GPU nodes under Slurm. From the checkout, on a file system all nodes share:
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/qwen2_5_math_1_5b.py --workdir=/shared/runs/math
#
# Other arguments go to pfjax.train. Options of sbatch before the script override its defaults
# of 8 GPUs and 8 tasks per node; for 4: --ntasks-per-node=4 --gpus-per-node=4. It takes whole nodes,
# whose cores the tasks share evenly (--cpus-per-task=N for fewer) and whose memory is theirs.
#
# Two minutes before its time limit (--time) a run saves, is queued again, and goes on. So does
# one of which a task died (out of memory, lost its GPU), at most 10 times; one that ended by
# a mistake (status 1 or 2) stays ended.
#
# One task per GPU: jax.distributed.initialize() takes the number of a task on its node for
# the one GPU it may use. Tasks see all GPUs of their node (no --gpus-per-task), which that
# numbering counts on. With --ntasks-per-node=1 a task has all of them, so that
# --config.mesh.rollout can set some apart.
#SBATCH --job-name=pfjax
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
readonly RESTARTS=10 # after deaths of tasks; the help says it too

if [[ ${1:-} == --help ]]; then
  sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit
fi
has_config='' has_workdir=''
for arg in "$@"; do
  case $arg in
    --config | --config=*) has_config=yes ;;
    --workdir | --workdir=*) has_workdir=yes ;;
  esac
done
error=''
[[ $has_workdir ]] || error='--workdir=DIR is needed, on a file system all nodes share'
[[ $has_config ]] || error='--config=FILE is needed, as pfjax.train does'
[[ ${SLURM_JOB_ID:-} ]] || error='start it with sbatch; see bash launch/slurm.sh --help'
[[ -z $error ]] || {
  echo "error: $error" >&2
  exit 1
}

# Slurm runs a copy of this file; the checkout is where sbatch was called.
cd "$SLURM_SUBMIT_DIR"
[[ -f launch/environment.sh ]] || {
  echo "error: $PWD is not the checkout; call sbatch there" >&2
  exit 1
}
source launch/environment.sh
# On the first node, for all.
# shellcheck disable=SC2119  # no extras
prepare

# The smallest number of a list of Slurm's, or with -r the largest: 8(x2),4 is twice 8, and 4.
extreme() { # LIST [-r]
  tr ',' '\n' <<<"$1" | sed 's/(.*//' | sort -n "${@:2}" | head -n 1
}

# srun does not take over --cpus-per-task, and without it gives a task one core.
cpus=$(($(extreme "$SLURM_JOB_CPUS_PER_NODE") / $(extreme "$SLURM_TASKS_PER_NODE" -r)))
cpus=${SLURM_CPUS_PER_TASK:-$((cpus > 0 ? cpus : 1))}

if [[ $(extreme "$SLURM_TASKS_PER_NODE" -r) == 1 && ${SLURM_GPUS_ON_NODE:-} ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# Around each task, as srun tells of all of them the highest status only: who has died (USR1)
# or failed (USR2) says so to this shell. Its own standard error is closed to what bash says
# of a process that was killed. A signal to the step is for training; its shell only waits.
# shellcheck disable=SC2016 # expanded in the task
readonly TASK='
trap : TERM INT
exec 3>&2 2>/dev/null
"$@" 2>&3 3>&- && exit
status=$?
case $status in
  75) exit 75 ;;
  1 | 2) notice=USR2 ;;
  *) notice=USR1 ;;
esac
echo "task $SLURM_PROCID on $SLURMD_NODENAME ended with status $status" >&3
scancel --batch --signal="$notice" "$SLURM_JOB_ID"
exit "$status"'

signalled='' ended='' ending=''
trap 'signalled=yes ended=${ended:-died}' USR1
trap 'signalled=yes ended=${ended:-failed}' USR2
# Only this shell is told of the time limit. Through scancel the tasks are, and srun is not.
trap 'signalled=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
# A task that ends first must not have the others killed while they save.
srun --quiet --kill-on-bad-exit=0 --cpus-per-task="$cpus" \
  bash -c "$TASK" task "$PYTHON" -m pfjax.train "$@" --multihost &
tasks=$!
while true; do
  # A signal ends the wait, but not the tasks. One that comes as they end can cost their
  # status; it is then none of those below, and the task that has ended has said its own.
  signalled='' status=0
  wait "$tasks" || status=$?
  [[ $signalled ]] || break
  # The others would wait a minute for the one that ended, then end with stacks of C++. They
  # get some seconds, to say why it ended. To srun a signal is an order to end them.
  if [[ $ended && -z $ending ]]; then
    { sleep 5 && kill -TERM "$tasks"; } 2>/dev/null &
    ending=$!
  fi
done
trap '' TERM USR1 USR2

case $ended:$status in
  :75) ;; # told to stop, has saved
  :0) exit ;;
  :[12] | failed:*) exit 1 ;;
  *) ended=died ;;
esac
# A job that somebody has cancelled must not come back.
job=$(scontrol show job "$SLURM_JOB_ID")
[[ $job == *JobState=RUNNING* ]] || exit "$status"
if [[ -z $ended ]]; then
  echo "the run has saved and is queued again" >&2
else
  # Slurm counts how often a job was queued again; how often for this, the job's comment says.
  comment=$(sed -n 's/^ *Comment=\(.*[^ ]\) *$/\1/p' <<<"$job") deaths=0
  if [[ $comment =~ ^(.*)'task deaths: '([0-9]+)$ ]]; then
    comment=${BASH_REMATCH[1]} deaths=${BASH_REMATCH[2]}
  fi
  ((deaths < RESTARTS)) || fail "a task died, after $RESTARTS restarts; the same sbatch goes on from the last checkpoint"
  comment="${comment:+${comment% } }task deaths: $((deaths + 1))"
  scontrol update JobId="$SLURM_JOB_ID" Comment="$comment" ||
    fail "a task died, and how often cannot be counted"
  echo "a task died: queued again from the last checkpoint, $((deaths + 1)) of $RESTARTS" >&2
fi
scontrol requeue "$SLURM_JOB_ID"
exit "$status"
