#!/usr/bin/env bash
# Style and tests, as every change must pass them.
#
#   bash launch/test.sh [pytest arguments]
#   bash launch/test.sh -m slow     tests of minutes rather than seconds
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest "$@"
