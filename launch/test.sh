#!/usr/bin/env bash
# Runs the tests on this machine's CPU, on all cores: bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare dev
cd "$ROOT"
exec "$PYTHON" -m pytest -n auto "$@"
