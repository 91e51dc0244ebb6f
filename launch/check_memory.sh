#!/usr/bin/env bash
# An SAE of the published size, imported within 1.3 times the memory of one of
# its two matrices:
#
#   bash launch/check_memory.sh [FOLDER]     in a checkout that has a .venv
#
# makes a file of 131,072 x 4096 in float32 (4.3 GB) under FOLDER (/tmp), imports
# it with `lmm-sae convert`, which writes 8.6 GB, reads the import's probe, and
# removes all of it. Prints the peak of the importing process (VmHWM) and ends 0
# only if it is below 1.3 x 2.147 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || {
  echo 'check_memory: no .venv: run launch/setup.sh first' >&2
  exit 1
}
"$python" -m tests.stages.big_import "${1:-/tmp}"
