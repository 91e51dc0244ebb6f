#!/usr/bin/env bash
# The subject under an older transformers, as GPU hosts have it: capture must
# give what that version's own models and image processors give.
#
#   bash launch/check_transformers.sh [pytest arguments]
#   TRANSFORMERS=4.57.6             chooses the version
#
# The first run makes an environment under benchmarks/.envs (1.4 GB); the check
# itself takes a minute. On Linux a plain package index serves torch with CUDA:
# see launch/setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${TRANSFORMERS:-4.57.6}
home=benchmarks/.envs/transformers-$version
if [[ ! -f $home/done ]]; then
  "${PYTHON:-python3}" -m venv --clear "$home"
  pip() { "$home/bin/python" -m pip install --quiet "$@"; }
  # What transformers chooses for itself is left to it.
  grep -vE '^(transformers|tokenizers|huggingface_hub|hf-xet|typer)=' \
    constraints.txt > "$home/constraints.txt"
  torch=$(grep '^torch==' constraints.txt)
  pip "$torch"
  pip --constraint "$home/constraints.txt" "$torch" "transformers==$version" \
    absl-py accelerate bitsandbytes httpx hypothesis jinja2 ml_collections ml_dtypes numpy \
    openai pillow pydantic pytest pytest-timeout safetensors tensorstore tqdm
  touch "$home/done"
fi
"$home/bin/python" -c 'import transformers as t; print("transformers", t.__version__)'
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$home/bin/python" -m pytest \
  -p no:cacheprovider tests/lmm/test_families.py tests/lmm/test_boxes.py \
  tests/lmm/test_prompt.py tests/lmm/test_templates.py tests/lmm/test_llava.py \
  tests/lmm/test_loading.py tests/lmm/test_devices.py -m 'not slow' "$@"
