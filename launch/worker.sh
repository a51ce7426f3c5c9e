#!/usr/bin/env bash
# What launch/tpu.sh has each worker of a TPU do.
#
#   bash launch/worker.sh setup [WORKDIR]            makes the environment
#   bash launch/worker.sh run [pfjax.train's ...]    starts training, unless it runs
#   bash launch/worker.sh logs [--follow]
#   bash launch/worker.sh status                     running, ended STATUS, or lost
#   bash launch/worker.sh stop                       asks it to save and end; waits
#
# PFJAX_STATE   where the log and the exit status are kept (default ~/pfjax-run)
# PFJAX_VENV    the environment (default ~/pfjax-venv)
# PFJAX_PYTHON  the interpreter that makes it (default: 3.11, or else any newer one)
# PFJAX_EXTRAS  extras of setup.py to install besides
#
# These, and what else training shall have, are read from ~/pfjax-env if that is there.
set -euo pipefail
# The one that setup.py has exact versions for.
readonly PYTHON_VERSION=3.11
# In the environment alone, where other users do not see them.
if [[ -f $HOME/pfjax-env ]]; then
  set -a
  # shellcheck source=/dev/null
  source "$HOME/pfjax-env"
  set +a
fi
STATE=${PFJAX_STATE:-$HOME/pfjax-run}
export PFJAX_VENV=${PFJAX_VENV:-$HOME/pfjax-venv}
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
answer_help "$@"
host=$(hostname)
# tpu.sh sets up nothing else, whatever this machine shows of it.
accelerator() { echo tpu; }

# By the name of what has that process id: after a reboot it may be something else.
is_running() {
  [[ ! -f $STATE/exit && -f $STATE/pid ]] && grep -qs supervise "/proc/$(<"$STATE/pid")/cmdline"
}

setup() { # [WORKDIR]
  check_writable "${1:-}"
  choose_python
  # shellcheck disable=SC2119  # no more extras than those of PFJAX_EXTRAS
  prepare
  "$PYTHON" -c 'import jax, sys; print("python", sys.version.split()[0], "jax", jax.__version__)'
}

# What writes there is the service account of the TPU, which only the TPU can try.
check_writable() { # WORKDIR
  local probe=$1/logs/.$host said
  [[ $1 == gs://* ]] && command -v gcloud >/dev/null || return 0
  said=$({ gcloud storage cp --quiet - "$probe" <<<"$host" && gcloud storage rm --quiet "$probe"; } 2>&1) || {
    printf '%s\n' "$said" >&2
    fail "$host cannot write to $1 (above): give the service account of the TPU (default: that of Compute Engine) roles/storage.objectUser on the bucket"
  }
}

# TPU images come with an older Python than jax needs, or with one that packages may not be
# installed into; one program more, on a machine that is thrown away, does it no harm.
choose_python() {
  [[ -z ${PFJAX_PYTHON:-} ]] || return 0
  PATH=$HOME/.local/bin:$PATH
  if command -v "python$PYTHON_VERSION" >/dev/null; then
    PFJAX_PYTHON=python$PYTHON_VERSION
  elif ! PFJAX_PYTHON=$(python_by_uv); then
    # Ends this if there is none.
    PFJAX_PYTHON=$(PFJAX_PYTHON='' find_python)
    echo "$host: no Python $PYTHON_VERSION can be had (above); taking $("$PFJAX_PYTHON" --version)" >&2
  fi
  export PFJAX_PYTHON
}

python_by_uv() {
  command -v uv >/dev/null ||
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv >&2 || return
  uv python install --quiet "$PYTHON_VERSION" >&2 && uv python find "$PYTHON_VERSION"
}

run() {
  if is_running; then
    echo "$host: runs already"
    return
  fi
  # shellcheck disable=SC2119
  prepare
  # Not by the link: set-up of another commit would change the code under the run.
  cd -P "$ROOT"
  mkdir -p "$STATE"
  rm -f "$STATE"/{pid,train,exit}
  # In a session of its own: it outlives the connection that started it.
  setsid nohup bash launch/worker.sh supervise "$PYTHON" -m pfjax.train "$@" </dev/null >/dev/null 2>&1 &
  for _ in {1..100}; do
    if [[ -f $STATE/train ]]; then
      echo "$host: started"
      return
    fi
    sleep 0.1
  done
  fail "$host: training did not start"
}

# Trains; the exit status is written last, when the log is where it has to be.
supervise() {
  local arg workdir='' train status=0
  for arg in "$@"; do
    [[ $arg != --workdir=* ]] || workdir=${arg#*=}
  done
  echo "$$" >"$STATE/pid"
  "$@" >>"$STATE/log" 2>&1 &
  train=$!
  echo "$train" >"$STATE/train"
  forward_notice "$train" &
  keep_log "$workdir" &
  wait "$train" || status=$?
  # With all that was started here, the two above included.
  trap '' TERM
  kill -TERM -- "-$$" 2>/dev/null || true
  copy_log "$workdir"
  echo "$status" >"$STATE/exit"
}

# The notice of a preemption comes half a minute ahead; told so, the run saves.
forward_notice() { # PROCESS
  until [[ $(curl --silent --fail --header 'Metadata-Flavor: Google' \
    'http://metadata.google.internal/computeMetadata/v1/instance/preempted?wait_for_change=true') == TRUE ]]; do
    sleep 5
  done
  kill -TERM "$1"
}

keep_log() { # WORKDIR
  while sleep 60; do copy_log "$1"; done
}

copy_log() { # WORKDIR
  [[ $1 == gs://* ]] || return 0
  timeout 60 gcloud storage cp --quiet "$STATE/log" "$1/logs/$host.log" || true
}

logs() {
  if [[ ! -f $STATE/log ]]; then
    echo "$host: nothing was started" >&2
    return 1
  fi
  if [[ ${1:-} == --follow ]] && is_running; then
    # Ends with the run.
    tail -n 100 --pid="$(<"$STATE/pid")" -F "$STATE/log"
  else
    tail -n 100 "$STATE/log"
  fi
}

status() {
  if [[ -f $STATE/exit ]]; then
    echo "$host: ended $(<"$STATE/exit")"
  elif is_running; then
    echo "$host: running"
  elif [[ -f $STATE/exit ]]; then
    # Between the two looks.
    echo "$host: ended $(<"$STATE/exit")"
  elif [[ -f $STATE/pid ]]; then
    # With the machine, which was restarted.
    echo "$host: lost"
  else
    echo "$host: nothing was started"
  fi
}

stop() {
  if ! is_running; then
    echo "$host: nothing runs"
    return
  fi
  echo "$host: waiting at most 10 minutes for it to save and end"
  kill -TERM "$(<"$STATE/train")" 2>/dev/null || true
  for _ in {1..3000}; do
    is_running || break
    sleep 0.2
  done
  status
  ! is_running
}

case ${1:-} in
  setup | run | logs | status | stop | supervise) "$@" ;;
  *)
    echo "error: no command '${1:-}'; see bash launch/worker.sh --help" >&2
    exit 1
    ;;
esac
