#!/usr/bin/env bash
# The tests marked `tpu`, on a host that has one:
#
#   bash launch/check_tpu.sh        in a checkout whose .venv has the extra `tpu`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -x .venv/bin/python ]] || {
  echo 'check_tpu: no .venv: make one and pip install -e ".[tpu,test]"' >&2
  exit 1
}
.venv/bin/python -c 'import jax, sys; sys.exit(jax.default_backend() != "tpu")' ||
  { echo 'check_tpu: jax finds no TPU here' >&2; exit 1; }
LMM_SAE_TEST_PLATFORM=tpu .venv/bin/python -m pytest -m tpu "$@"
