#!/usr/bin/env bash
# What has to be measured on a GPU or a TPU, in one command: the tests of the kernels on
# the device itself, then rollouts and updates of Qwen2.5-1.5B's shapes, as JSON lines.
#
#   bash launch/benchmark.sh [FILE]    appends the lines to FILE (default: prints them)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
answer_help "$@"

prepare dev
cd "$ROOT"
platform=$("$PYTHON" -c 'import jax; print(jax.default_backend())')
[[ $platform != cpu ]] || fail "JAX finds no GPU or TPU here"
PFJAX_TEST_PLATFORM=${platform/gpu/cuda} "$PYTHON" -m pytest \
  -m "" tests/model/attention_test.py tests/model/decode_attention_test.py >&2
{
  "$PYTHON" tests/benchmarks/train_benchmark.py --case=qwen2_5_1_5b
  "$PYTHON" tests/benchmarks/train_benchmark.py --case=qwen2_5_1_5b --remat=attention
  "$PYTHON" tests/benchmarks/rollout_benchmark.py --case=qwen2_5_1_5b
} | tee -a "${1:-/dev/null}"
