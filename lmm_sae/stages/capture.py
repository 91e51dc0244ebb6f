"""Runs the subject once and stores its residual stream, token by token.

lmm-sae capture --config=experiments/tiny.py --workdir=runs/demo

Writes acts/train, acts/a and acts/b (`core.store`). The unit of work, of commit
and of resume is a group of samples: run again after a kill, the same command
ends in the same bytes.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from lmm_sae.core import progress, records, sources
from lmm_sae.core.prefetch import prefetch
from lmm_sae.core.sources import SPLITS, DataConfig, Item, Source
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.tokens import TokenMap
from lmm_sae.core.workdir import Workdir
from lmm_sae.lmm import folders

AHEAD = 3  # batches made ready while the model runs


@dataclasses.dataclass(frozen=True)
class CaptureConfig:
  """The `capture` section of a config: see experiments/base.py."""

  batch: int
  group: int
  max_tokens: int
  shard_rows: int
  chunk_rows: int

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value < 1:
        raise ValueError(f'capture.{name} is {value}; it must be at least 1')

  @property
  def group_rows(self) -> int:
    """Rows that a group may need, in whole shards."""
    shards = math.ceil(self.group * self.max_tokens / self.shard_rows)
    return shards * self.shard_rows


@dataclasses.dataclass(frozen=True)
class SubjectConfig:
  """The `lmm` section of a config: see experiments/base.py."""

  path: str
  layers: tuple[int, ...]
  device: str
  dtype: str
  threads: int

  def __post_init__(self):
    if not self.layers or len(set(self.layers)) != len(self.layers):
      raise ValueError(
        f'lmm.layers is {self.layers}: name each layer once, and at least one'
      )


@dataclasses.dataclass(frozen=True)
class Split:
  """The rows of a source that one split takes; row i is its sample i."""

  name: str
  source: Source
  rows: Sequence[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Ready:
  """A sample ready for the model; `start` and `stop` are still to come."""

  sample: records.Sample
  tokens: TokenMap
  image: Image.Image | None


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
  """Samples of one group that go through the model together."""

  places: list[int]  # in the group's list of samples
  inputs: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """The end of a group: all its batches have come."""

  group: int
  ready: list[Ready]
  rejects: list[dict[str, str]]


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Captures what is not captured yet of every split."""
  lmm = SubjectConfig(**{**config.lmm, 'layers': tuple(config.lmm.layers)})
  data = DataConfig(**config.data)
  opts = CaptureConfig(**config.capture)
  settings = {
    'lmm': {'dtype': lmm.dtype},
    'data': dataclasses.asdict(data),
    'capture': dataclasses.asdict(opts),
  }
  if _done(workdir, lmm, settings):
    logging.info('capture: %s is complete', workdir.acts_root)
    return
  splits = open_splits(data)
  subject = _load(lmm)
  if data.source in ('scenes', 'llava'):
    subject.chat('hello')  # without a chat template no row can be read
  for split in splits:
    meta = StoreMeta(
      split=split.name,
      model=subject.name,
      fingerprint=subject.fingerprint,
      layers=lmm.layers,
      layer_paths={str(at): subject.layer_path(at) for at in lmm.layers},
      width=subject.width,
      grid=subject.grid,
      image_backend=subject.image_backend,
      config=settings,
    )
    store = ActivationStore.create(
      workdir.acts(split.name),
      meta,
      groups=math.ceil(len(split.rows) / opts.group),
      group_rows=opts.group_rows,
      shard_rows=opts.shard_rows,
      chunk_rows=opts.chunk_rows,
    )
    if not (store.path / 'vocab.json').exists():
      records.write_json(store.path / 'vocab.json', subject.vocab())
    capture(store, split, subject, opts)
    _check_not_empty(store)


def open_splits(data: DataConfig) -> list[Split]:
  """The three splits of the data that a config names."""
  if data.source == 'scenes':
    return [_scenes(name, data) for name in SPLITS]
  source = sources.open_source(data)
  parts = sources.split(len(source), data)
  return [Split(name, source, parts[name]) for name in SPLITS]


def capture(
  store: ActivationStore, split: Split, subject: Any, opts: CaptureConfig
) -> None:
  """Captures the groups of one split that the store lacks."""
  missing = [
    group
    for group in range(store.layout.groups)
    if group not in store.committed()
  ]
  work = _work(store, split, subject, opts, missing)
  what = f'capture {split.name}: groups'
  with contextlib.closing(prefetch(work, AHEAD)) as steps:
    for _ in progress.track(missing, what=what):
      rows: dict[int, dict[int, np.ndarray]] = {}  # {place: {layer: [T, D]}}
      for step in steps:
        if isinstance(step, Group):
          _commit(store, step, rows)
          break
        found = subject.rows(step.inputs, store.meta.layers)
        rows |= dict(zip(step.places, found, strict=True))


def _work(store, split, subject, opts, groups) -> Iterator[Batch | Group]:
  """The batches of each group, shortest samples first, then its end."""
  for group in groups:
    ready, rejects = _read_group(store, split, subject, opts, group)
    order = sorted(
      range(len(ready)), key=lambda at: len(ready[at].tokens.token_T)
    )
    for at in range(0, len(order), opts.batch):
      places = order[at : at + opts.batch]
      members = [ready[place] for place in places]
      images = [[each.image] if each.image else [] for each in members]
      inputs = subject.batch([each.tokens for each in members], images)
      yield Batch(places, inputs)
    yield Group(group, ready, rejects)


def _read_group(store, split, subject, opts, group):
  """(samples made ready, rejects) of one group, in order."""
  ready, rejects = [], []
  first = group * opts.group
  for sample in range(first, min(first + opts.group, len(split.rows))):
    row = split.rows[sample]
    try:
      item = split.source[row]
      ready.append(_prepare(store, split.name, subject, opts, item, sample))
    except ValueError as error:  # the reason why this row is none
      name = split.source.name(row)
      logging.debug('capture: %s rejected: %s', name, error)
      rejects.append({'source': name, 'reason': str(error)})
  return ready, rejects


def _prepare(store, split, subject, opts, item: Item, sample: int) -> Ready:
  """One item as tokens; ValueError says why it cannot be captured."""
  if item.conversation:
    prompt = subject.conversation(item.conversation, item.image is not None)
  else:
    prompt = subject.bare()
  tokens = subject.encode(prompt, [item.image] if item.image else [])
  limit = min(opts.max_tokens, subject.max_tokens)
  if len(tokens.token_T) > limit:
    raise ValueError(
      f'{len(tokens.token_T)} tokens, where at most {limit} are read '
      '(capture.max_tokens)'
    )
  image, truth = '', None
  if item.image is not None and split != 'train':
    image, truth = _keep(store.path, item, sample)
  elif item.image_path:
    image = item.image_path
  width, height = item.image.size if item.image else (0, 0)
  record = records.Sample(
    sample=sample,
    group=-1,
    source=item.source,
    image=image,
    width=width,
    height=height,
    prompt=str(prompt),
    turns=item.turns,
    start=0,
    stop=0,
    truth=truth,
  )
  return Ready(record, tokens, item.image)


def _keep(path: pathlib.Path, item: Item, sample: int):
  """Keeps what no file outside holds: (name of the image, truth)."""
  name, truth = item.image_path, None
  folder = path / 'images'
  folder.mkdir(exist_ok=True)
  if not name:
    name = f'images/{sample:06d}.png'
    item.image.save(path / name, compress_level=1)
  if item.regions_HW is not None:
    regions = f'images/{sample:06d}.regions.png'
    Image.fromarray(item.regions_HW).save(path / regions, compress_level=1)
    truth = {'regions': regions, 'concepts': item.concepts}
  return name, truth


def _commit(store, end: Group, rows) -> None:
  """Writes a group whose samples have all been through the model."""
  maps = [each.tokens for each in end.ready]
  lengths = [len(each.token_T) for each in maps]
  stops = np.cumsum(lengths, dtype=np.int64)
  samples = [
    dataclasses.replace(each.sample, start=int(stop) - n, stop=int(stop))
    for each, n, stop in zip(end.ready, lengths, stops, strict=True)
  ]

  def joined(arrays: list[np.ndarray], *columns: int) -> np.ndarray:
    return np.concatenate([*arrays, np.empty((0, *columns), np.int32)])

  tokens = {
    'sample': np.repeat([each.sample for each in samples], lengths),
    'position': joined([np.arange(n) for n in lengths]),
    'token': joined([each.token_T for each in maps]),
    'kind': joined([each.kind_T for each in maps]).astype(np.uint8),
    'row': joined([each.row_T for each in maps]),
    'col': joined([each.col_T for each in maps]),
    'box': joined([np.rint(each.box_T4) for each in maps], 4),
  }
  width = store.meta.width
  layers = {
    layer: np.concatenate([rows[at][layer] for at in range(len(samples))])
    if samples
    else np.empty((0, width), np.float32)
    for layer in store.meta.layers
  }
  store.write_group(end.group, layers, tokens, samples, end.rejects)


def _done(workdir: Workdir, lmm: SubjectConfig, settings) -> bool:
  """Whether all splits stand, of this model; nothing is loaded to find out."""
  stores = []
  for name in SPLITS:
    if not (workdir.acts(name) / 'meta.json').exists():
      return False
    stores.append(ActivationStore.open(workdir.acts(name), partial=True))
  fingerprint = folders.fingerprint(folders.resolve(lmm.path))
  done = all(
    store.complete
    and store.meta.fingerprint == fingerprint
    and store.meta.layers == lmm.layers
    and store.meta.config == settings
    for store in stores
  )
  for store in stores if done else ():
    _check_not_empty(store)
  return done


def _check_not_empty(store: ActivationStore) -> None:
  rejects = store.rejects()
  if rejects:
    logging.warning(
      'capture: %s: %d samples rejected, see rejects.jsonl; the first: %s: %s',
      store.path,
      len(rejects),
      rejects[0]['source'],
      rejects[0]['reason'],
    )
  if not store.num_rows:
    raise ValueError(
      f'no sample of {store.path} could be read; the first, '
      f'{rejects[0]["source"]}: {rejects[0]["reason"]}'
    )


def _load(lmm: SubjectConfig):
  """The subject; torch is imported here and not before."""
  from lmm_sae.lmm.llava import Subject

  subject = Subject.load(lmm.path, lmm.device, lmm.dtype, lmm.threads)
  for layer in lmm.layers:
    subject.layer(layer)  # is it there?
  return subject


class _Scenes:
  """The scenes of one split, made one after the other, as a source."""

  def __init__(self, split: str, seed: int, count: int):
    self._args = (split, seed, count)
    self._count = count
    self._next = 0
    self._items = iter(())

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> Item:
    from lmm_sae.scenes import data

    if index != self._next or index == 0:
      self._items = itertools.islice(data.samples(*self._args), index, None)
    self._next = index + 1
    scene = next(self._items)
    return Item(
      source=scene.source,
      image=scene.image,
      image_path='',
      conversation=tuple(scene.conversation),
      turns=tuple(scene.turns),
      regions_HW=scene.regions_HW,
      concepts=scene.concepts,
    )

  def name(self, index: int) -> str:
    return f'scene {index}'


def _scenes(name: str, data: DataConfig) -> Split:
  field = 'train' if name == 'train' else 'half'
  count = dataclasses.asdict(data)[field]
  if count < 1:
    raise ValueError(f'data.{field} is {count}; it must be at least 1')
  count = min(count, data.limit or count)
  return Split(name, _Scenes(name, data.seed, count), range(count))
