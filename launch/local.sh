#!/usr/bin/env bash
# Trains on this machine: by default sharpens the toy model (configs/smoke.py).
#
#   bash launch/local.sh [--config=FILE] [--workdir=DIR] [--config.NAME=VALUE ...]
#   bash launch/local.sh --study [--full]   methods compared on worlds with exact answers
#
# Makes a virtual environment first (see environment.sh); quick the second time.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
answer_help "$@"

# A device that is not seen costs days.
say_device() {
  if [[ -z $(accelerator) ]]; then echo 'no accelerator found: CPU' >&2; fi
}

if [[ ${1:-} == --study ]]; then
  prepare study
  say_device
  PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" -m examples.study "--out=$ROOT/runs/study" "${@:2}"
fi
has_config='' has_workdir=''
for arg in "$@"; do
  case $arg in
    --config | --config=*) has_config=yes ;;
    --workdir | --workdir=*) has_workdir=yes ;;
  esac
done
[[ $has_workdir ]] || set -- "--workdir=$ROOT/runs/$(date +%Y%m%d-%H%M%S)-$$" "$@"
[[ $has_config ]] || set -- "--config=$ROOT/configs/smoke.py" "$@"
# shellcheck disable=SC2119  # no extras
prepare
say_device
exec "$PYTHON" -m pfjax.train "$@"
