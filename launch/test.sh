#!/usr/bin/env bash
# Runs the tests on this machine's CPU, on all cores: bash launch/test.sh [pytest arguments]
# It takes five to nine minutes on two cores, as the tests marked slow are left out; -m slow runs them alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
answer_help "$@"

prepare dev
cd "$ROOT"
# Some tests wait, for a process to end or a page to be drawn: one worker more than cores.
# What tests of a file share is made once, as all of them are one worker's.
exec "$PYTHON" -m pytest -n $(($(getconf _NPROCESSORS_ONLN) + 1)) --dist loadfile --no-loadscope-reorder "$@"
