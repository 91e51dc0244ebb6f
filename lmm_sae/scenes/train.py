"""Makes one of the two small LLaVA-NeXTs from nothing, on two CPU cores.

    python -m lmm_sae.scenes.train --size=small --out=DIR

Stage A teaches the ViT what each patch shows; stage B trains everything end to
end on packed questions, the patch loss kept, and leaves `trunk.pt`. Stage C
goes on gently, mostly with several pictures: `small` as it is, `base` grown to
twice its size without a change of what it computes; `--parent=DIR/trunk.pt` of
a small spares it the first two stages. Seeded; killed at any moment, a run goes
on from its last checkpoint, with the batches it would have seen.
`python -m lmm_sae.scenes.clip` then makes the CLIP judge on the base's trunk.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import time

import numpy as np
import torch
from absl import logging
from torch import Tensor
from torch.nn import functional as F

from lmm_sae.scenes import batches, losses, model, team
from lmm_sae.scenes.batches import Batch
from lmm_sae.scenes.muon import Muon
from lmm_sae.scenes.team import Team

# page faults of fresh temporaries cost a fifth of a step: keep freed memory
MALLOC = {
  'MALLOC_MMAP_THRESHOLD_': '8000000000',
  'MALLOC_TRIM_THRESHOLD_': '16000000000',
  'MALLOC_TOP_PAD_': '500000000',
}
DENSE = 1.0  # weight of the patch loss after stage A
PICTURES = 450  # step of stage B from which several pictures are shown
TILED = 750  # from which pictures have tiles
SETS = 2000  # from which most are several pictures
GAZE = 1.0  # weight of telling heads where to look
TRUNK = 'trunk.pt'
VISION = 0.25  # the ViT's share of the learning rate after stage A


# (step, share of the peak rate): warm-up, plateau, decay.
KNOTS = {
  'a': ((0, 0.0), (100, 1.0), (300, 1.0), (1301, 0.0)),
  'b': (
    *((0, 0.0), (100, 1.0), (1100, 1.0)),
    *((2400, 0.1), (2430, 0.4), (2700, 0.4), (2841, 0.0)),
  ),
  'c': ((0, 0.0), (40, 1.0), (100, 1.0), (301, 0.0)),
}
STEPS = {stage: knots[-1][0] - 1 for stage, knots in KNOTS.items()}
RATES = {'a': (7e-3, 2e-3), 'b': (3e-3, 1e-3), 'c': (8e-4, 2.7e-4)}


def positions(side: int, width: int) -> Tensor:
  """Sine-cosine positions of a side x side grid, [1 + side^2, width]."""
  omega = 1 / 100 ** (torch.arange(width // 4) / (width / 4))
  grid = torch.arange(side).float()
  wave = torch.cat(
    [(grid[:, None] * omega).sin(), (grid[:, None] * omega).cos()], 1
  )
  rows = wave[:, None].expand(side, side, -1)
  columns = wave[None].expand(side, side, -1)
  flat = torch.cat([rows, columns], 2).reshape(side * side, -1)
  return torch.cat(
    [torch.zeros(1, width), F.pad(flat, (0, width - flat.shape[1]))]
  )


class Trainee:
  """The model, its dense heads, its optimiser and how far it has come."""

  def __init__(
    self,
    seed: int,
    team: Team = Team(),  # noqa: B008, frozen
    size: str = 'small',
  ):
    torch.manual_seed(seed)
    self.seed, self.team, self.size = seed, team, size
    self.model = model.make_model('small')
    width = model.SIZES['small'].vision_width
    total = sum(len(classes) for classes in batches.HEADS.values())
    self.heads = torch.nn.Linear(width, total)
    self.norm = torch.nn.LayerNorm(width)
    with torch.no_grad():
      table = self.tower.embeddings.position_embedding.weight
      table.copy_(positions(model.CELLS, width))
    self.stage, self.step = 'a', 0
    self._optimise()

  @property
  def tower(self):
    return self.model.model.vision_tower

  @property
  def steps(self) -> int:
    return STEPS[self.stage]

  def named(self) -> dict[str, Tensor]:
    params = dict(self.model.named_parameters())
    for name, p in self.heads.named_parameters():
      params[f'heads.{name}'] = p
    for name, p in self.norm.named_parameters():
      params[f'heads.norm.{name}'] = p
    return params

  def guesses(self, features_BPD: Tensor) -> Tensor:
    """Logits of all patch heads side by side, for `losses.dense`."""
    return self.heads(self.norm(features_BPD))

  def _optimise(self) -> None:
    slow = 1.0 if self.stage == 'a' else VISION
    self.optimiser = Muon(
      self.named(), lambda name: slow if 'vision' in name else 1.0, self.team
    )

  def advance(self) -> None:
    """To the next stage: the optimiser starts anew, and a base grows for C."""
    self.stage, self.step = chr(ord(self.stage) + 1), 0
    if self.stage == 'c' and self.size == 'base':
      torch.manual_seed(self.seed)
      self.model = model.grow(self.model)
    self._optimise()

  def save(self, path: pathlib.Path) -> None:
    part = path.with_suffix('.part')
    state = {
      'stage': self.stage,
      'step': self.step,
      'size': self.size,
      'seed': self.seed,
      'workers': self.team.size,
      'params': {k: v.detach() for k, v in self.named().items()},
      'optimiser': self.optimiser.state(),
    }
    torch.save(state, part)
    part.replace(path)

  def load(self, path: pathlib.Path) -> None:
    state = torch.load(path, weights_only=True)
    if state['seed'] != self.seed:
      raise ValueError(
        f'{path} was made with seed {state["seed"]}, not {self.seed}: give '
        'another --out'
      )
    if state['workers'] != self.team.size:
      raise ValueError(
        f'{path} was made with --workers={state["workers"]}: give the same'
      )
    self.stage, self.step = state['stage'], state['step']
    if self.stage == 'c':
      if state['size'] != self.size:
        raise ValueError(f'{path} is a {state["size"]}: give another --out')
      self.model = model.make_model(self.size)
    with torch.no_grad():
      for name, p in self.named().items():
        p.copy_(state['params'][name])
    self._optimise()
    self.optimiser.load(state['optimiser'])


def make_batch(t: Trainee) -> tuple[str, Batch]:
  """The batch of this stage and step: what it is called, and itself.

  Members of a team share its kind and shape, for they wait for one another,
  and draw what is in it each for themselves.
  """
  words = [batches.WEIGHTS_SEED, t.seed, ord(t.stage), t.step]
  kind = np.random.default_rng(words)
  rng = np.random.default_rng([*words, 1 + t.team.rank])
  if t.stage == 'a':
    return 'patches', batches.patches(rng, 15)
  past = t.step if t.stage == 'b' else math.inf
  if t.step % (15 if past < PICTURES else 8) == 5:
    return 'text', batches.text(rng, 24, 4 if past < PICTURES else 8)
  draw = kind.random()
  sets = 0.33 if past < SETS else 0.6
  if past > PICTURES and draw < sets:
    images = int(kind.choice((2, 3, 4, 5), p=(0.1, 0.15, 0.15, 0.6)))
    return 'common', batches.common(rng, 15 // images, images)
  tiles = 0 if past < TILED else 1
  if tiles and kind.random() < 0.55:
    tiles = 4
  items = 5 if tiles == 4 else 6
  if draw < sets + 0.12:
    return f'masked {tiles}', batches.masked(rng, items, tiles)
  describe = bool(kind.random() < 0.6)
  return f'single {tiles}', batches.single(rng, items, tiles, 12, describe)


def rate(t: Trainee) -> float:
  """Share of the peak rate, linear between the stage's KNOTS."""
  steps, shares = zip(*KNOTS[t.stage], strict=True)
  return float(np.interp(t.step + 1, steps, shares))


def train_step(t: Trainee) -> dict[str, float]:
  """One optimiser step; what it measured, by name."""
  name, batch = make_batch(t)
  measured: dict[str, float] = {}
  loss, seen = torch.zeros(()), None
  if batch.images:
    seen = losses.features(t.model, batch)
    dense, right = losses.dense(t.guesses(seen), batch)
    loss = loss + dense * (1.0 if t.stage == 'a' else DENSE)
    measured['dense'] = float(dense.detach())
    measured |= {f'patch {head}': value for head, value in right.items()}
  if batch.groups:
    said = losses.answers(t.model, seen, batch)
    spoken = losses.spoken(said)
    loss = loss + spoken + GAZE * said.gaze
    measured[f'loss {name}'] = float(spoken.detach())
    if batch.images:
      measured[f'gaze {name}'] = float(said.gaze.detach())
    right = losses.right_by_turn(said)
    types = batch.types()
    for type_ in set(types):
      mine = torch.tensor([x == type_ for x in types])
      measured[f'{name.split()[0]} {type_}'] = float(right[mine].float().mean())
  (loss / t.team.size).backward()
  t.team.sum([p.grad for p in t.named().values() if p.grad is not None])
  t.optimiser.step(*(peak * rate(t) for peak in RATES[t.stage]))
  t.step += 1
  return measured


def run(
  team: Team,
  size: str,
  out: pathlib.Path,
  seed: int,
  save_every_s: float,
  parent: pathlib.Path | None = None,
) -> None:
  """Trains to the end of the size's last stage and writes OUT/model.

  Raises:
    ValueError: the parent or the checkpoint is of another seed or unfinished.
  """
  out.mkdir(parents=True, exist_ok=True)
  checkpoint = out / 'checkpoint.pt'
  t = Trainee(seed, team, size)
  if checkpoint.exists():
    t.load(checkpoint)
    logging.info('resumed at stage %s, step %d', t.stage, t.step)
  elif parent:
    t.load(parent)
    if (t.stage, t.step) != ('b', STEPS['b']):
      raise ValueError(f'{parent} is not the trunk.pt of a small')
  saved = logged = time.monotonic()
  begun, first = time.monotonic(), t.step
  mean: dict[str, list[float]] = {}
  while not (t.stage == 'c' and t.step == t.steps):
    if t.step == t.steps:
      if t.stage == 'b' and not team.rank:
        t.save(out / TRUNK)
      t.advance()
      begun, first = time.monotonic(), 0
    for key, value in train_step(t).items():
      mean.setdefault(key, []).append(value)
    now = time.monotonic()
    if team.rank:
      continue
    if now - logged > 30 or t.step == t.steps:
      took = (now - begun) / (t.step - first)
      short = {k: round(float(np.mean(v)), 3) for k, v in sorted(mean.items())}
      line = {'stage': t.stage, 'step': t.step, 'of': t.steps}
      line |= {'s_a_step': round(took, 3), **short}
      line['left_min'] = round((t.steps - t.step) * took / 60, 1)
      with (out / 'log.jsonl').open('a') as file:
        file.write(json.dumps(line) + '\n')
      logging.info('%s', line)
      mean, logged = {}, now
    if now - saved > save_every_s or t.step == t.steps:
      t.save(checkpoint)
      saved = now
  if team.rank:
    return
  processor = model.make_processor(model.make_tokenizer())
  model.save(t.model, processor, out / 'model')
  logging.info('wrote %s', out / 'model')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', choices=tuple(model.SIZES), required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--parent', type=pathlib.Path)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--workers', type=int, default=2)
  parser.add_argument('--save_every_s', type=float, default=60.0)
  args = parser.parse_args()
  if any(os.environ.get(k) != v for k, v in MALLOC.items()):
    argv = [sys.executable, '-m', 'lmm_sae.scenes.train', *sys.argv[1:]]
    os.execve(sys.executable, argv, {**os.environ, **MALLOC})
  logging.set_verbosity(logging.INFO)
  team.start(
    args.workers,
    run,
    args.size,
    args.out,
    args.seed,
    args.save_every_s,
    args.parent,
  )


if __name__ == '__main__':
  main()
