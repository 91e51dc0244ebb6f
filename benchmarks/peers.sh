#!/usr/bin/env bash
# Makes an environment of its own for each peer, under benchmarks/.envs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

torch=$(grep '^torch==' ../constraints.txt)
make() {
  [[ -f .envs/$1/done ]] && return
  "${PYTHON:-python3}" -m venv --clear ".envs/$1"
  ".envs/$1/bin/python" -m pip install --quiet "$torch"
  ".envs/$1/bin/python" -m pip install --quiet "$torch" "$2"
  touch ".envs/$1/done"
}
make sparsify eai-sparsify==1.3.3
make sae_lens sae-lens==6.54.12
make dictionary_learning dictionary-learning==0.1.0
# It asks for torchvision, whose build for CUDA breaks transformers beside a CPU
# build of torch; nothing that is timed needs it.
.envs/dictionary_learning/bin/python -m pip uninstall --quiet --yes torchvision
