#!/usr/bin/env bash
# Trains on GPU nodes under Slurm. From the checkout, on a file system all nodes share:
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/qwen2_5_math_1_5b.py --workdir=/shared/runs/math
#
# Other arguments go to pfjax.train, options of sbatch before the script override those
# below: for 4 GPUs a node, --ntasks-per-node=4 --gpus-per-node=4. A run that is stopped
# ahead of its time limit saves, is queued again, and goes on.
#
# One task a GPU: jax.distributed.initialize() takes the number of a task on its node for
# the one GPU it may use, so a task a node would leave the others idle. Tasks see all GPUs
# of their node (no --gpus-per-task), which that numbering counts on.
#SBATCH --job-name=pfjax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

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

# Only this shell is told of the time limit. srun takes a signal to itself for an order to
# end the tasks; through scancel they get it, and this shell does not.
told=''
trap 'told=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
# A task that ends first must not have the others killed while they save.
srun --kill-on-bad-exit=0 "$PYTHON" -m pfjax.train "$@" --multihost &
while true; do
  # A signal ends the wait, but not the tasks.
  told='' status=0
  wait "$!" || status=$?
  [[ $told ]] || break
done
trap '' TERM

# 75: told to stop, has saved. A job that somebody has cancelled must not come back.
if ((status == 75)) && [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
  echo "the run has saved and is queued again" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
