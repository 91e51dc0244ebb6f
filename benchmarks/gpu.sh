#!/usr/bin/env bash
# Checks the GPU kernels, times them beside their rivals, and writes one JSON.
#
#   bash benchmarks/gpu.sh [--out=FILE]     on a machine with an NVIDIA GPU
#   bash benchmarks/gpu.sh --tiny           proves the script on any CPU
#
# Needs numpy, jax (0.10 or 0.11) and torch in $PYTHON; installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
