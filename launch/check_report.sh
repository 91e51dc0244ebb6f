#!/usr/bin/env bash
# The report's page in headless Chromium: search, sort, open a latent, keyboard
# alone, phones, no console errors, nothing fetched.
#
#   bash launch/check_report.sh [WORKDIR] [--screenshot=FILE.png]
#
# Without WORKDIR a small made-up run is checked, with it that run's report too.
# --screenshot saves a picture of the page, 1280 x 1000.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
workdir='' picture=''
for word in "$@"; do
  case $word in
    --screenshot=*) picture=${word#*=} ;;
    -*) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    *) workdir=$word ;;
  esac
done
[[ -z $workdir || $workdir == /* ]] || workdir=$PWD/$workdir
[[ -z $picture || $picture == /* ]] || picture=$PWD/$picture
cd "$root"
[[ -x .venv/bin/python ]] || bash launch/setup.sh

browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if ! browser > /dev/null; then
  install='apt-get update && apt-get install -y --no-install-recommends chromium fonts-dejavu-core'
  if [[ $(id -u) == 0 ]] && command -v apt-get > /dev/null; then
    echo "check_report: no Chromium; installing it from the system's packages"
    bash -c "$install"
  else
    echo "check_report: no Chromium. On Debian, as root: $install" >&2
    exit 1
  fi
fi

if [[ -n $workdir ]]; then
  page=$workdir/report/index.html
  [[ -f $page ]] || { echo "check_report: $page is missing: run \`lmm-sae report\` first" >&2; exit 2; }
  export LMM_SAE_REPORT=$page
fi
.venv/bin/python -m pytest -q -m browser tests/stages/test_report_browser.py

if [[ -n $picture ]]; then
  if [[ -z $workdir ]]; then
    made=$(mktemp -d)
    trap 'rm -rf "$made"' EXIT
    .venv/bin/python -m tests.stages.fake_run "$made" 128 48 > /dev/null
    page=$made/report/index.html
  fi
  .venv/bin/python -m tests.stages.chromium "$page" "$picture" 1280 1000
  echo "check_report: $picture"
fi
