#!/usr/bin/env bash
# SAEs against the libraries that they come from and go to: eai-sparsify,
# sae-lens and dictionary-learning each save SAEs that are read here, and load
# what is written here, and both must say the same of rows; Neuronpedia's client
# reads an export of a run.
#
#   bash launch/check_parity.sh [pytest arguments]
#
# The first run makes an environment for each (benchmarks/peers.sh, 5.5 GB); the
# check itself takes a minute on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ -x .venv/bin/python ]] || bash launch/setup.sh
bash benchmarks/peers.sh
HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -m peers tests/peers "$@"
