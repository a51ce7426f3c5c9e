#!/usr/bin/env bash
# Compiles the recipes' programs for NVIDIA GPUs on this machine, which needs none of them:
# bash launch/gpu_compile.sh [pytest arguments]
# Of what a GPU needs only the compiler is installed, some 600 MB, beside the environment;
# where it cannot be had the tests are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
answer_help "$@"

prepare dev
cd "$ROOT"
jax=$("$PYTHON" -c 'from importlib.metadata import version; print(version("jax"))')
compiler=$VENV/gpu-compiler-$jax
if [[ ! -d $compiler && $(accelerator) != cuda* ]]; then
  printf 'installing %s\n' "$compiler" >&2
  new=$(mktemp -d "$compiler.XXXX")
  if "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-deps --target "$new" \
    "jax-cuda13-plugin==$jax" "jax-cuda13-pjrt==$jax" \
    'nvidia-cuda-nvcc>=13,<14' 'nvidia-nvvm>=13,<14' 'nvidia-cudnn-cu13>=9,<10'; then
    mv "$new" "$compiler"
  else
    rm -rf "$new"
  fi
fi
PYTHONPATH=$compiler exec "$PYTHON" -m pytest -n 0 -rs -m gpu_compile tests/gpu_compile_test.py "$@"
