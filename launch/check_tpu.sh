#!/usr/bin/env bash
# Every TPU kernel and the paper's training step, compiled for chips that need
# not be here:
#
#   bash launch/check_tpu.sh        in a checkout that has a .venv (setup.sh)
#
# prints a line for each kernel on a v4, a v5e and a v5p, then what the step
# takes on 64 chips of a v5p. The compiler (0.7 GB) is put into a folder of its
# own if it is missing: where it can be imported, jax looks for TPUs first. On a
# host that has a TPU, the tests marked `tpu` run as well.
# Ends 0 only if everything compiled.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
[[ -x $python ]] || {
  echo 'check_tpu: no .venv: run launch/setup.sh first' >&2
  exit 1
}
if ! "$python" -c 'import libtpu' 2> /dev/null; then
  compiler=.venv/tpu-plan
  [[ -d $compiler/libtpu ]] ||
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
      --target "$compiler" "$(grep -o 'libtpu==[0-9.]*' setup.cfg)" ||
    { echo 'check_tpu: pip could not install libtpu' >&2; exit 1; }
  export PYTHONPATH=$PWD/$compiler JAX_PLATFORMS=cpu
fi

"$python" -m pytest -m tpu_compile -v --timeout 1800 "$@"

time "$python" -m lmm_sae plan --config=experiments/llava_next_8b.py \
  --config.plan.topology=v5p:4x4x4

finds='import jax, sys; sys.exit(jax.default_backend() != "tpu")'
if "$python" -c "$finds" 2> /dev/null; then
  LMM_SAE_TEST_PLATFORM=tpu "$python" -m pytest -m tpu
else
  echo 'check_tpu: no TPU here: the tests marked tpu did not run'
fi
