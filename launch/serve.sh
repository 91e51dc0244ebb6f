#!/usr/bin/env bash
# Serves the subject of a run, with its SAEs, over HTTP.
#
#   bash launch/serve.sh CONFIG WORKDIR [--config.section.field=value ...]
#
# Prints `serving on URL`; give other stages --config.server.url=URL. It listens
# on the loopback address; another one needs --config.server.token.
set -euo pipefail
[[ $# -ge 2 ]] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
config=$1 workdir=$2
[[ $config == /* ]] || config=$PWD/$config
[[ $workdir == /* ]] || workdir=$PWD/$workdir
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
exec .venv/bin/lmm-sae serve --config="$config" --workdir="$workdir" "$@"
