"""Makes a small workdir that looks like a run, without a model.

Everything goes through the real writers (store, index, records), on rendered
scenes: latent c stands for concept c, the others for places, words or nothing.
To look at the page:

    python -m tests.stages.fake_run DIR [LATENTS] [SAMPLES]
"""

import json
import pathlib
import sys

import numpy as np
from PIL import Image

from experiments import base
from lmm_sae.core import concepts, index_build, index_merge, records
from lmm_sae.core.index import IndexMeta, LatentIndex
from lmm_sae.core.records import (
  Attribution,
  Edit,
  Effect,
  Exemplar,
  Explanation,
  Sample,
  Score,
  Steering,
  Turn,
)
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.tokens import Kind
from lmm_sae.core.workdir import Workdir
from lmm_sae.scenes import render
from tests.stages import fake_baselines

LAYER, K, GRID, TILES = 2, 8, 8, 16
CONCEPTS = ('background', *render.CONCEPTS)
WORDS = (
  'user',
  ':',
  ' ',
  'what',
  ' colour',
  ' is',
  ' the',
  ' face',
  ' feels',
  ' red',
  ' happy',
  ' star',
  '?',
  ' assistant',
  '<b>&amp;</b>',
  '\n',
)
NASTY = '<img src=x onerror="alert(1)"> & "striped" things'
DOSES = (1.0, 2.0, 4.0, 8.0)
ALWAYS, TEXT, DEAD = -3, -2, -1  # latents, counted from the end


def make(root: pathlib.Path, latents: int = 64, samples: int = 24):
  """Writes the run and returns (config, workdir)."""
  rng = np.random.default_rng(0)
  config = base.get_config()
  config.index.exemplars = 6
  workdir = Workdir.of(root)
  for split, seed in (('train', 1), ('a', 2), ('b', 3)):
    _capture(workdir, split, seed, latents, samples)
  index = LatentIndex.open(workdir.index(LAYER, 'b'))
  _explain(workdir, index, rng)
  fake_baselines.add(workdir, LAYER)
  _steer(workdir, rng, samples)
  _attribute(workdir, rng, samples, latents)
  table = {
    kind: {'fvu': round(0.02 + 0.03 * i, 3), 'l0': K - 0.2 * i, 'dead': 0.03,
           'cosine': 0.98, 'shrinkage': 0.97, 'rows': 1000 * (i + 1),
           'firing': {'edges': [-1, 0], 'latents': [latents], 'never': 0}}
    for i, kind in enumerate(('base', 'tile', 'image', 'question', 'all'))
  }  # fmt: skip
  records.write_json(
    workdir.file('evaluation.json'),
    {
      'format_version': 2,
      str(LAYER): table,
      'loss': {
        str(LAYER): {
          'reason': '',
          'kinds': {
            kind: {
              'kl': {'sae': 0.25},
              'ce_recovered': {'zero': {'value': value, 'n': 9, 'ci': None}},
            }
            for kind, value in (
              ('base', None),
              ('question', 0.5),
              ('all', 0.75),
            )
          },
        }
      },
    },
  )
  records.write_json(
    workdir.file('seconds.json'),
    {'capture': 38.2, 'train': 61.5, 'index': 9.1, 'explain': 44.0},
  )
  records.write_json(
    workdir.file('config.json'),
    {
      'format_version': 1,
      'commit': '0123456789abcdef',
      'versions': {'numpy': '2.0', 'jax': '0.7'},
      'config': json.loads(config.to_json_best_effort()),
    },
  )
  return config, workdir


def _capture(workdir, split, seed, latents, samples):
  """A store of scenes, and the index of activations made up from the truth."""
  rng = np.random.default_rng(seed)
  store = ActivationStore.create(
    workdir.acts(split),
    StoreMeta(split, 'small', 'none', (LAYER,), {str(LAYER): 'model.layers.2'},
              6, (GRID, GRID), 'pil'),
    groups=1, group_rows=512 * samples, shard_rows=512, chunk_rows=256,
  )  # fmt: skip
  if store.complete:
    return
  folder = pathlib.Path(workdir.acts(split))
  (folder / 'images').mkdir()
  (folder / 'vocab.json').write_text(json.dumps(WORDS))
  shape = index_build.Shape(latents, (GRID, GRID), 6, 4, 8, 1e-5)
  part = index_build.Part(shape, np.arange(samples))
  lines, tokens, start = [], [], 0
  for s in range(samples):
    scene = render.sample(rng)
    names = f'images/{s:06d}.png', f'images/{s:06d}.regions.png'
    for name, pixels in zip(
      names, (scene.pixels_HW3, scene.regions_HW), strict=True
    ):
      Image.fromarray(pixels).save(folder / name)
    some = _tokens(rng, s)
    acts_TM = _acts(rng, scene, some, latents)
    idx = np.argsort(-acts_TM, axis=1)[:, :K]
    part.add(some, np.take_along_axis(acts_TM, idx, axis=1), idx)
    tokens.append(some)
    lines.append(_sample(s, names, scene, start, start + len(some['kind'])))
    start += len(some['kind'])
  merged = {
    name: np.concatenate([some[name] for some in tokens]) for name in tokens[0]
  }
  rows_ND = rng.standard_normal((start, 6)).astype(np.float32)
  store.write_group(0, {LAYER: rows_ND}, merged, lines, [])
  path = workdir.index(LAYER, split)
  part.save(path / 'parts' / '0.npz')
  meta = IndexMeta(LAYER, split, latents, K, samples, 0, (GRID, GRID), 0, 0,
                   1e-5, 0.5, 'fake')  # fmt: skip
  index_merge.merge(
    path, [path / 'parts' / '0.npz'], meta, (6, 4), np.arange(samples), WORDS
  )


def _sample(s, names, scene, start, stop):
  truth = {'0': ['background']} | {
    str(i + 1): list(thing.concepts) for i, thing in enumerate(scene.objects)
  }
  thing = scene.objects[0]
  question = f'what colour is the {thing.noun}?'
  turns = (Turn('colour', question, thing.colour, thing.colour),)
  truth = {'regions': names[1], 'concepts': truth}
  return Sample(
    s, 0, f'{s}', names[0], 128, 128, 'user: ...', turns, start, stop, truth
  )


def _tokens(rng, s):
  kinds = [Kind.BOS, Kind.TEMPLATE, Kind.TEMPLATE]
  places = [(-1, -1)] * 3
  for kind, side in ((Kind.BASE, GRID), (Kind.TILE, TILES)):
    kinds += [kind] * side**2
    places += [(r, c) for r in range(side) for c in range(side)]
  tail = [Kind.NEWLINE] * TILES + [Kind.QUESTION] * 8 + [Kind.ANSWER] * 3
  kinds += tail
  row, col = np.array(places + [(-1, -1)] * len(tail)).T
  count = len(kinds)
  return {
    'sample': np.full(count, s, np.int32),
    'position': np.arange(count, dtype=np.int32),
    'token': rng.integers(0, len(WORDS), count, np.int32),
    'kind': np.array(kinds, np.uint8),
    'row': row.astype(np.int16),
    'col': col.astype(np.int16),
    'image': np.where(row < 0, -1, 0),
    'box': np.zeros((count, 4), np.int16),
  }


def _acts(rng, scene, tokens, latents):
  """Latent m fires where the object of concept m is, or in a place, or ..."""
  kind = tokens['kind']
  acts_TM = np.zeros((len(kind), latents), np.float32)
  image = np.isin(kind, (Kind.BASE, Kind.TILE))
  for m in range(latents + ALWAYS):
    name = CONCEPTS[m % len(CONCEPTS)]
    gain = rng.uniform(0.6, 1.4)
    for which, side in ((Kind.BASE, GRID), (Kind.TILE, TILES)):
      cover = scene.coverage(side)
      hits = [name in thing.concepts for thing in scene.objects]
      there = cover[hits].sum(0) if any(hits) else np.zeros((side, side))
      if name == 'background':
        there = (cover.sum(0) < 0.05) * 0.3
      noise = rng.uniform(0.7, 1, there.shape)
      acts_TM[kind == which, m] = (gain * there * noise).ravel()
  words = np.isin(kind, (Kind.QUESTION, Kind.ANSWER))
  acts_TM[words, TEXT] = rng.uniform(0.2, 2, words.sum())
  acts_TM[words] += (rng.random((words.sum(), latents)) < 0.03) * np.float32(
    0.4
  )
  acts_TM[image, ALWAYS] = 2 + rng.uniform(0, 0.1, image.sum())
  acts_TM[:, DEAD] = 0
  return acts_TM.astype(np.float32)


def _explain(workdir, index, rng):
  table = []
  with (
    records.Appender(workdir.file('explanations.jsonl')) as said,
    records.Appender(workdir.file('scores.jsonl')) as scored,
  ):
    for explainer in ('base', 'small'):
      for m in range(index.num_latents):
        name = CONCEPTS[m % len(CONCEPTS)]
        exemplars = tuple(
          Exemplar(one.sample, one.strength) for one in index.exemplars(m)[:5]
        )
        outcome, text = 'explained', f'{name} things'
        if not exemplars:
          outcome, text = 'dead', ''
        elif index.stats['always_on'][m]:
          outcome, text = 'always_on', ''
        elif m % 11 == 7:
          outcome, text = 'no_pattern', ''
        elif m == 2:
          text = NASTY
        elif rng.random() < (0.15 if explainer == 'base' else 0.4):
          text = f'{CONCEPTS[int(rng.integers(len(CONCEPTS)))]} things'
        label = text.removesuffix(' things')
        said.add(
          Explanation(LAYER, m, exemplars, outcome, text, label,
                      'colour' if m % 27 < 9 else 'object' if text else '',
                      explainer)
        )  # fmt: skip
        if outcome != 'explained':
          continue
        right = name in text
        for baseline, value in (('', float(right)), ('shuffled', 0.05)):
          scored.add(Score(LAYER, m, 'right', baseline, value, 1, explainer))
        for scorer, top in (('iou_exact', 0.7), ('iou', 0.6), ('clip', 28.0)):
          for baseline, share in (('', 1.0 if right else 0.3), ('random', 0.1),
                                  ('shuffled', 0.2)):  # fmt: skip
            share = share if scorer != 'clip' else 0.6 + 0.4 * share
            value = float(top * share * rng.uniform(0.7, 1.1))
            n = len(exemplars)
            scored.add(Score(LAYER, m, scorer, baseline, value, n, explainer))
  for m in range(index.num_latents):
    name = CONCEPTS[m % len(CONCEPTS)]
    good = float(rng.uniform(0.4, 0.95))
    objects = 0.1 if name == 'background' else 0.9
    row = concepts.Concept(m, name, 0.2, good, good - 0.05, good, objects, 1.0,
                           good > 0.8)  # fmt: skip
    table.append(records.to_json(row))
  records.write_json(
    workdir.file('concepts.json'),
    {str(LAYER): table, 'neurons': {'2': 3}, 'counted': CONCEPTS[1:]},
  )


def _steer(workdir, rng, samples):
  with records.Appender(workdir.file('steering.jsonl')) as out:
    for study, targets in (
      ('colour', ('red', 'green', 'blue')),
      ('emotion', render.EMOTIONS),
    ):
      for target in targets:
        m = CONCEPTS.index(target)
        for half, doses in (('a', DOSES), ('b', (4.0,))):
          for case in range(4):
            for dose in doses:
              for control in ('', 'random') if half == 'b' else ('',):
                edit = Edit(5 if control else m, dose, 'peak', where='image')
                flips = not control and rng.random() < dose / 4.5
                out.add(
                  Steering(
                    LAYER, (edit,), control, case % samples,
                    f'what is the {study}?', 'it is grey', 'it is grey',
                    f'it is {target}' if flips else 'it is grey', study, half,
                    target,
                  )
                )  # fmt: skip
    edit = Edit(1, 8.0, 'peak')
    out.add(Steering(LAYER, (edit,), '', -1, 'What is your feeling right now?',
                     'calm', 'calm', 'red, very red', 'text', 'b'))  # fmt: skip


def _attribute(workdir, rng, samples, latents):
  with records.Appender(workdir.file('attributions.jsonl')) as out:
    for s in range(min(8, samples)):
      effects = []
      for m in rng.permutation(latents - 3)[:6].tolist():
        effect = float(rng.normal())
        effects.append(
          Effect(m, effect, effect * float(rng.uniform(0.7, 1.1)),
                 {'base': effect}, CONCEPTS[m % len(CONCEPTS)])
        )  # fmt: skip
      effects.sort(key=lambda one: -abs(one.effect))
      out.add(
        Attribution(LAYER, s, 'happy', 'sad', tuple(effects),
                    'how does the face feel?', 'happy', 'happy', s % 4 > 0,
                    rng.normal(size=(GRID, GRID)).round(3).tolist(),
                    [('how', -0.1), (' does', 0.3), (' it', 0), (' feel', 1.5)])
      )  # fmt: skip
  figure = {'value': 0.75, 'n': 8, 'ci': [0.41, 0.93]}
  low = {'value': 0.05, 'n': 8, 'ci': [0.0, 0.2]}
  none = {'value': None, 'n': 0, 'ci': None, 'reason': 'no answer was right'}
  eq = {
    'top': figure, 'top5': {'value': 1.0, 'n': 8, 'ci': [0.68, 1.0]},
    'ablated': {'1': low, '2': figure, '10': figure},
    'random': {'1': low, '2': low, '10': low},
    'cases': [{'sample': 1, 'prompt': 'how does the face feel?',
               'text': 'happy', 'latents': [3, 4],
               'ablated': {'1': 'happy', '2': 'sad', '10': '<i>none</i>'}}],
  }  # fmt: skip
  mistakes = {
    'rule': {'latents': 2, 'margin': 0.8}, 'asked': {'a': 96, 'b': 96},
    'accuracy': {'a': 0.9, 'b': 0.91}, 'mended': figure, 'broken': low,
    'mended_random': low, 'broken_random': none,
    'cases': [{'sample': 2, 'prompt': 'which letter is there?', 'right': 'H',
               'text': 'L', 'edited': 'H', 'latents': [5]}],
  }  # fmt: skip
  for name, value in (('eq', eq), ('mistakes', mistakes)):
    records.write_json(
      workdir.file(f'{name}.json'),
      {'format_version': records.FORMAT_VERSION, str(LAYER): value},
    )


if __name__ == '__main__':
  from lmm_sae.stages import report

  report.run(*make(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])))
