#!/usr/bin/env bash
# The whole system on the packaged model, from nothing to a report.
#
#   bash launch/demo.sh [WORKDIR]   runs/demo unless given
#
# Run again, it goes on where it was; once set up it needs no network.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
workdir=${1:-$root/runs/demo}
[[ $workdir == /* ]] || workdir=$PWD/$workdir
cd "$root"

bash launch/setup.sh
export HF_HUB_OFFLINE=1
.venv/bin/lmm-sae all --config=experiments/tiny.py --workdir="$workdir"

report=$workdir/report/index.html
[[ -f $report ]] || { echo "demo: $report was not made" >&2; exit 1; }
echo "The report: $report"
