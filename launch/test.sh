#!/usr/bin/env bash
# Runs the tests on this machine's CPU, on all cores: bash launch/test.sh [pytest arguments]
# The tests marked slow are left out; -m slow runs them, and them alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare dev
cd "$ROOT"
exec "$PYTHON" -m pytest -n auto --dist worksteal "$@"
