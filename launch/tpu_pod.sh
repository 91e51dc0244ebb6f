#!/usr/bin/env bash
# One stage on a TPU VM, through gcloud's ssh. Set the VM up first:
#
#   NAME=my-tpu ZONE=us-central2-b bash launch/tpu_pod.sh setup
#   NAME=my-tpu ZONE=us-central2-b bash launch/tpu_pod.sh STAGE CONFIG WORKDIR ...
#
# `setup` copies the commit that is checked out and installs the extra `tpu`.
# WORKDIR is a folder of the VM; on a slice of several hosts, one they share.
set -euo pipefail
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ -n ${NAME:-} && -n ${ZONE:-} && $# -ge 1 ]] || usage
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tpu=(gcloud compute tpus tpu-vm)
everywhere=(--zone="$ZONE" --worker=all)

if [[ $1 == setup ]]; then
  archive=$(mktemp --suffix=.tar.gz)
  trap 'rm -f "$archive"' EXIT
  git archive --format=tar.gz --output="$archive" HEAD
  "${tpu[@]}" scp "$archive" "$NAME:lmm_sae.tar.gz" "${everywhere[@]}"
  "${tpu[@]}" ssh "$NAME" "${everywhere[@]}" --command='
    set -e
    mkdir -p lmm_sae && tar -xzf lmm_sae.tar.gz -C lmm_sae && cd lmm_sae
    python3 -m venv .venv
    .venv/bin/pip install --quiet -c constraints.txt -e ".[tpu]"
    .venv/bin/python -c "import jax; print(jax.devices())"'
else
  [[ $# -ge 3 ]] || usage
  stage=$1 config=$2 workdir=$3
  shift 3
  printf -v words ' %q' "$stage" --config="$config" --workdir="$workdir" "$@"
  "${tpu[@]}" ssh "$NAME" "${everywhere[@]}" \
    --command="cd lmm_sae && .venv/bin/lmm-sae$words"
fi
