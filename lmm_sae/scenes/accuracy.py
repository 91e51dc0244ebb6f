"""Held-out exact match of a small LLaVA-NeXT by question type.

    python -m lmm_sae.scenes.accuracy --model=DIR [--scenes=400]

An answer is right where every token of it, the end included, is the greedy one
given the true tokens before it; since a first wrong token already counts as
wrong, this equals exact match of a greedy generation.
"""

import argparse
import collections
import pathlib
import sys

import numpy as np
import torch
import transformers

from lmm_sae.scenes import batches, losses, model

HELDOUT = 20_241_123  # first word of the seeds of these scenes, nobody else's


def exact_match(
  folder: pathlib.Path, scenes: int
) -> dict[str, tuple[float, int]]:
  """{question type: (share right, number asked)} on held-out scenes.

  `visible` is asked of dimmed scenes at 64 and 128 px, `common five` and
  `intruder five` of five pictures, the text types of no picture. A question
  that was drawn twice of the same pictures counts once.
  """
  loaded = transformers.LlavaNextForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, local_files_only=True
  ).eval()
  right: dict[str, list[float]] = collections.defaultdict(list)
  for number, (batch, suffix) in enumerate(_plan(scenes)):
    made = batch(np.random.default_rng([HELDOUT, number]))
    with torch.no_grad():
      seen = losses.features(loaded, made) if made.images else None
      hits = losses.right_by_turn(losses.answers(loaded, seen, made)).tolist()
    once = {turn: i for i, turn in enumerate(_turns(made))}
    types = made.types()
    for i in once.values():
      right[f'{types[i]}{suffix}'].append(hits[i])
  return {
    name: (float(np.mean(hits)), len(hits))
    for name, hits in sorted(right.items())
  }


def _turns(made: batches.Batch):
  """(item, ids of question and answer) of each turn, over all groups."""
  for group in made.groups:
    for item, rows in enumerate(group.ids):
      for row in rows:
        yield item, tuple(row[row != model.PAD].tolist())


def _plan(scenes: int):
  """(batch of a generator, suffix of its type names) one after the other."""
  for _ in range(scenes // 8):
    yield lambda rng: batches.single(rng, 8, 4, 10, True), ''
  for _ in range(scenes // 16):
    yield lambda rng: batches.masked(rng, 8, 4), ''
    yield lambda rng: batches.masked(rng, 8, 1), ''
  for _ in range(scenes // 4):
    yield lambda rng: batches.common(rng, 4, 5), ' five'
  for _ in range(scenes // 40):
    yield lambda rng: batches.text(rng, 36, 6), ''


def table(found: dict[str, tuple[float, int]]) -> str:
  """A Markdown table, with the mean over the types."""
  lines = ['| question type | exact match | n |', '|---|---|---|']
  lines += [
    f'| {name} | {share:.3f} | {n} |' for name, (share, n) in found.items()
  ]
  mean = np.mean([share for share, _ in found.values()])
  lines.append(f'| mean over types | {mean:.3f} | |')
  return '\n'.join(lines) + '\n'


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', type=pathlib.Path, required=True)
  parser.add_argument('--scenes', type=int, default=400)
  args = parser.parse_args()
  torch.set_num_threads(1)
  sys.stdout.write(table(exact_match(args.model, args.scenes)))


if __name__ == '__main__':
  main()
