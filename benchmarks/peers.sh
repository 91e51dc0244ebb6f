#!/usr/bin/env bash
# Makes an environment of its own for each peer, under benchmarks/.envs; with
# names, for those alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

torch=$(grep '^torch==' ../constraints.txt)
wanted=" $* "
make() {
  [[ $wanted == "  " || $wanted == *" $1 "* ]] || return 0
  [[ -f .envs/$1/done ]] && return
  "${PYTHON:-python3}" -m venv --clear ".envs/$1"
  local pip=(".envs/$1/bin/python" -m pip install --quiet)
  if [[ $1 != neuronpedia ]]; then
    "${pip[@]}" "$torch"
    "${pip[@]}" "$torch" "$2"
  else
    "${pip[@]}" "$2"
  fi
  # It asks for torchvision, whose build for CUDA breaks transformers beside a
  # CPU build of torch; nothing that is timed needs it.
  if [[ $1 == dictionary_learning ]]; then
    ".envs/$1/bin/python" -m pip uninstall --quiet --yes torchvision
  fi
  touch ".envs/$1/done"
}
make sparsify eai-sparsify==1.3.3
make sae_lens sae-lens==6.54.12
make dictionary_learning dictionary-learning==0.1.0
make neuronpedia neuronpedia==1.2.1  # no SAEs: its site's client
