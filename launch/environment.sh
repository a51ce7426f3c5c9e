# shellcheck shell=bash
# Sourced by the scripts beside it: makes the virtual environment of this checkout.
#
#   answer_help argument ...   prints the comment at the top of the script, if asked, and ends
#   prepare [extra ...]        installs the project, once per setup.py; sets PYTHON
#
# PFJAX_VENV    where the environment is (default .venv in the checkout)
# PFJAX_PYTHON  the interpreter that makes it (default: python3 if it is 3.11 or newer, else the
#               newest of python3.13 to python3.11)
# PFJAX_EXTRAS  extras of setup.py to install besides: wandb,gguf

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${PFJAX_VENV:-$ROOT/.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV # scripts change the folder

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Before anything is installed.
answer_help() { # argument ...
  local arg
  for arg in "$@"; do
    [[ $arg == --help || $arg == -h ]] || continue
    sed -n '2,/^[^#]/{/^[^#]/d;/^# shellcheck/d;s/^# \{0,1\}//p;}' "$0"
    exit
  done
}

is_supported() { # python
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate
  if [[ -n ${PFJAX_PYTHON:-} ]]; then
    is_supported "$PFJAX_PYTHON" ||
      fail "PFJAX_PYTHON=$PFJAX_PYTHON is no Python 3.11 or newer; name another, or leave it out"
    command -v "$PFJAX_PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if is_supported "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  if command -v python3 >/dev/null; then
    fail "Python 3.11 or newer is needed; found only $(python3 --version 2>&1). Install one, or name it: PFJAX_PYTHON=/path/to/python3.12"
  fi
  fail "no Python found. Install Python 3.11 or newer, or name it: PFJAX_PYTHON=/path/to/python3.12"
}

# The build of JAX that fits this machine: cuda13, cuda12, tpu, or nothing for CPU.
accelerator() {
  local driver capability
  if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) &&
    [[ $driver =~ ^[0-9]+ ]]; then
    driver=${BASH_REMATCH[0]}
    # CUDA 13 needs driver 580, and knows no GPU before Turing: V100, P100.
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | head -n 1) || true
    if ((driver >= 580)) && [[ ! $capability =~ ^([0-6]\.|7\.[0-4]) ]]; then echo cuda13; else echo cuda12; fi
  elif has_tpu; then
    echo tpu
  fi
}

# By the PCI bus, as JAX looks for them: TPUs since v5e are handed out by vfio and have no
# /dev/accel*. The network cards and disks of Google's machines are of the same vendor.
has_tpu() {
  local root=${PFJAX_DEVICES_ROOT:-} folder kind
  [[ -z ${TPU_ACCELERATOR_TYPE:-} ]] || return 0
  ! compgen -G "$root/dev/accel[0-9]*" >/dev/null || return 0
  for folder in "$root"/sys/bus/pci/devices/*; do
    [[ -f $folder/vendor && $(<"$folder/vendor") == 0x1ae0 ]] || continue
    kind=$(cat "$folder/class" 2>/dev/null || true)
    case $kind in
      0x01* | 0x02*) ;; # storage, network
      *) return 0 ;;
    esac
  done
  return 1
}

is_ready() { # stamp
  [[ -x $PYTHON && -f $VENV/.pfjax-ready && $(<"$VENV/.pfjax-ready") == "$1" ]]
}

prepare() {
  local extras stamp python log free pins=()
  extras=$(printf '%s\n' "$@" "${PFJAX_EXTRAS:-}" "$(accelerator)" | sed '/^$/d' | paste -sd, -)
  # New when the dependencies, the extras, or the place of the checkout change.
  stamp=$(cat "$ROOT/setup.py" "$ROOT/launch/constraints.txt" - <<<"$extras $ROOT" | cksum)
  PYTHON=$VENV/bin/python
  # Without an accelerator JAX need not look for one: its TPU library, which the tests
  # compile with, complains at length.
  if [[ -z $(accelerator) ]]; then export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}; fi
  if is_ready "$stamp"; then return; fi
  python=$(find_python) || exit 1
  mkdir -p "$VENV" 2>/dev/null || fail "cannot write $VENV; choose another place: PFJAX_VENV=/path"
  # Of several that start at once one makes it, and the others wait. A file system may not
  # know locks.
  if command -v flock >/dev/null; then
    exec 9>"$VENV/.pfjax-lock"
    flock 9 || true
    if is_ready "$stamp"; then
      exec 9>&-
      return
    fi
  fi
  free=$(df -Pk "$VENV" | awk 'NR == 2 {print int($4 / 1048576)}')
  ((free >= 4)) || fail "$VENV has $free GiB of free disk; the environment needs 4. Choose another place: PFJAX_VENV=/path"
  log=$VENV/install.log
  printf 'making %s with %s%s (a few minutes the first time)\n' "$VENV" "$("$python" --version)" "${extras:+, extras $extras}" >&2
  if ! "$python" -m venv "$VENV" >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    fail "could not make a virtual environment; on Debian: apt-get install python3-venv"
  fi
  # With this Python the same versions everywhere: on all workers of a pod, next month too.
  if [[ $("$python" --version) == "Python 3.11."* ]]; then pins=(--constraint "$ROOT/launch/constraints.txt"); fi
  if ! "$PYTHON" -m pip install --disable-pip-version-check ${pins[@]+"${pins[@]}"} -e "$ROOT${extras:+[$extras]}" >>"$log" 2>&1; then
    tail -n 15 "$log" >&2
    if grep -qE 'No space left' "$log"; then fail "the disk is full (whole log: $log)"; fi
    if grep -qE 'NewConnectionError|Failed to establish|Name or service not known|Temporary failure|ConnectTimeout' "$log"; then
      fail "the package index cannot be reached: no network? (whole log: $log)"
    fi
    fail "installing the project failed (whole log: $log)"
  fi
  printf '%s\n' "$stamp" >"$VENV/.pfjax-ready"
  exec 9>&-
}

# Run by itself it has nothing to do but this.
[[ ${BASH_SOURCE[0]} != "$0" ]] || answer_help --help
