#!/usr/bin/env bash
# An index of the paper's size at one tenth, from synthetic codes:
#
#   bash launch/check_index.sh [FOLDER] [--tiles=48] [--memory_mb=2048] ...
#
# streams the codes of 4,668 images (576 base tokens and text, k=256, M=131,072)
# into an index under FOLDER (runs/index_size). Broken off, it goes on when it is
# run again. Prints memory, disk, the whole's disk by arithmetic, and the time
# to answer; ends 0 only if all are within their bounds (python -m
# benchmarks.index_size --help). The folder stays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=runs/index_size
if [[ $# -gt 0 && $1 != -* ]]; then
  folder=$1
  shift
fi
python=${PYTHON:-.venv/bin/python}
command -v "$python" > /dev/null || {
  echo 'check_index: no .venv: run launch/setup.sh first' >&2
  exit 1
}
exec "$python" -m benchmarks.index_size --folder="$folder" "$@"
