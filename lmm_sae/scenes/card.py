"""Writes a packaged model's card: licence, recipe, hash, measured accuracy.

    python -m lmm_sae.scenes.card --model=lmm_sae/scenes/weights/small

`lmm-sae doctor` holds the weights against the hash in the card.
"""

import argparse
import hashlib
import pathlib
import subprocess

import torch

from lmm_sae.scenes import accuracy

_HEAD = """---
license: apache-2.0
library_name: transformers
tags: [llava-next, interpretability, synthetic]
---

# {name}

{what}

| | |
|---|---|
| licence | Apache-2.0; no weights or data of others went into it |
| made by | `python -m lmm_sae.scenes.{recipe}` |
| recipe at commit | `{commit}` |
| seed | {seed} |
| parameters | {parameters:,} |
| sha256 of model.safetensors | `{digest}` |

{note}
"""
_WHAT = {
  'small': (
    'The subject of the embedded default: a LLaVA-NeXT trained from nothing on '
    'rendered scenes of coloured shapes, faces and letters.'
  ),
  'base': (
    'The explainer of the embedded default: grown from `small` to about twice '
    'its size, and trained on.'
  ),
  'clip': (
    'The judge of the embedded default: a CLIPModel on the frozen vision trunk '
    'of `base`, so it sees much as `small` does; trust exact masks first. '
    '`judge.json` says how a patch is compared with a text.'
  ),
}
_RECIPES = {
  'small': 'train --size=small',
  'base': 'train --size=base',
  'clip': 'clip',
}


def write(
  folder: pathlib.Path, seed: int, commit: str, scenes: int, note: str
) -> None:
  """Writes FOLDER/README.md; an LMM's accuracy is measured first."""
  weights = folder / 'model.safetensors'
  name = folder.name
  text = _HEAD.format(
    name=name,
    what=_WHAT[name],
    recipe=_RECIPES[name],
    commit=commit,
    seed=seed,
    parameters=_parameters(weights),
    digest=hashlib.sha256(weights.read_bytes()).hexdigest(),
    note=note,
  )
  if name != 'clip':
    found = accuracy.exact_match(folder, scenes)
    text += (
      f'\n## Held-out exact match\n\n`python -m lmm_sae.scenes.accuracy '
      f'--model=lmm_sae/scenes/weights/{name} --scenes={scenes}`\n\n'
    ) + accuracy.table(found)
  (folder / 'README.md').write_text(text, encoding='utf-8')


def _parameters(weights: pathlib.Path) -> int:
  from safetensors import safe_open

  with safe_open(weights, 'numpy') as file:
    shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
  return sum(int(torch.Size(shape).numel()) for shape in shapes)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', type=pathlib.Path, required=True)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--scenes', type=int, default=400)
  parser.add_argument('--note', default='')
  parser.add_argument('--commit', default='')
  args = parser.parse_args()
  torch.set_num_threads(1)
  head = ['git', 'rev-parse', '--short=12', 'HEAD']
  commit = args.commit or subprocess.check_output(head, text=True).strip()
  write(args.model, args.seed, commit, args.scenes, args.note)


if __name__ == '__main__':
  main()
