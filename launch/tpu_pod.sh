#!/usr/bin/env bash
# One stage on the hosts of a TPU slice, through gcloud's ssh. Set them up first:
#
#   NAME=my-tpu ZONE=us-central2-b bash launch/tpu_pod.sh setup
#   NAME=my-tpu ZONE=us-central2-b bash launch/tpu_pod.sh STAGE CONFIG WORKDIR ...
#   NAME=my-tpu ZONE=us-central2-b bash launch/tpu_pod.sh stop
#
# `setup` copies the commit that is checked out and installs the extra `tpu`.
# CONFIG is a file of the checkout. `train` runs on every host of the slice,
# whose chips all share the work; WORKDIR must then be one folder of all hosts
# (Filestore or another NFS, mounted at the same place). Every other stage runs
# on host 0. Ctrl-C ends ssh but not what it started: `stop` does.
set -euo pipefail
usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ -n ${NAME:-} && -n ${ZONE:-} && $# -ge 1 ]] || usage
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tpu=(gcloud compute tpus tpu-vm)
everywhere=(--zone="$ZONE" --worker=all)

case $1 in
  setup)
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
    ;;
  stop)
    "${tpu[@]}" ssh "$NAME" "${everywhere[@]}" --command='pkill -x lmm-sae || true'
    ;;
  *)
    [[ $# -ge 3 ]] || usage
    stage=$1
    words=("$stage" --config="$2" --workdir="$3")
    hosts=(--zone="$ZONE" --worker=0)
    shift 3
    if [[ $stage == train ]]; then
      hosts=("${everywhere[@]}")
      words+=(--config.hosts.cluster=tpu --config.train.devices=0)
    fi
    printf -v words ' %q' "${words[@]}" "$@"
    # Each host asks which it is: the first alone writes WORKDIR/config.json.
    "${tpu[@]}" ssh "$NAME" "${hosts[@]}" --command="
      set -e
      cd lmm_sae
      number=computeMetadata/v1/instance/attributes/agent-worker-number
      worker=\$(curl -sf -H 'Metadata-Flavor: Google' \
        http://metadata.google.internal/\$number)
      record=--record
      if [ \"\$worker\" != 0 ]; then record=--norecord; fi
      exec .venv/bin/lmm-sae$words \$record"
    ;;
esac
