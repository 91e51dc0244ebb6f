#!/usr/bin/env bash
# Makes .venv at the root of the checkout: pinned dependencies, CPU torch.
#
#   bash launch/setup.sh            PYTHON=python3.12 chooses the interpreter
#
# Run again, it starts at once; it works anew where the pins have changed.
# On Linux a plain package index serves torch with CUDA, some gigabytes of it:
# PIP_EXTRA_INDEX_URL may name an index with the CPU build, which pip prefers
# where both have the pinned version.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=sae,serve,data,ray,test
python=${PYTHON:-python3}
stamp=.venv/lmm_sae.stamp

fail() {
  printf 'setup: %s\n' "$1" >&2
  exit 1
}

command -v "$python" > /dev/null || fail "no $python: install Python 3.11"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version) is too old: 3.11 or newer, PYTHON=... names it"

wanted=$("$python" - setup.cfg pyproject.toml constraints.txt \
  launch/setup.sh << 'END'
import hashlib, pathlib, sys
parts = [sys.version, *(pathlib.Path(p).read_text() for p in sys.argv[1:])]
print(hashlib.sha256('\0'.join([*parts, str(pathlib.Path.cwd())]).encode())
      .hexdigest())
END
)
if [[ -x .venv/bin/lmm-sae && -f $stamp && $(< "$stamp") == "$wanted" ]]; then
  exit 0
fi

echo 'setup: making .venv, once; this takes a few minutes' >&2
version() { "$1" -c 'import sys; print(sys.version)'; }
if [[ ! -x .venv/bin/python ||
  $(version .venv/bin/python) != "$(version "$python")" ]]; then
  "$python" -m venv --clear .venv ||
    fail 'cannot make .venv (on Debian: apt-get install python3-venv)'
fi

pip() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt "$@" ||
    fail "pip could not install $*: see above, then run this again"
}

# torch first and alone: nothing that follows may choose another build of it.
torch=$(grep '^torch==' constraints.txt)
pip "$torch"
pip --editable ".[$extras]"

echo "$wanted" > "$stamp"
echo 'setup: done' >&2
