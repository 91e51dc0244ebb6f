"""Groups of samples, run through the subject: the work of the capture stage.

A group depends on nothing but the data, the model and the settings, so any
process may make it, and make it again.
"""

import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from absl import logging
from PIL import Image

from lmm_sae.core import records
from lmm_sae.core.places import Place
from lmm_sae.core.prefetch import prefetch
from lmm_sae.core.records import Picture
from lmm_sae.core.sources import Item, Split
from lmm_sae.core.tokens import TokenMap
from lmm_sae.lmm.llava import Subject

AHEAD = 3  # batches made ready while the model runs


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """One group, as `ActivationStore.write_group` takes it."""

  group: int
  layers: dict[int, np.ndarray]
  tokens: dict[str, np.ndarray]
  samples: list[records.Sample]
  rejects: list[dict[str, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Ready:
  """A sample ready for the model; `start` and `stop` are still to come."""

  sample: records.Sample
  tokens: TokenMap
  images: list[Image.Image]


@dataclasses.dataclass(frozen=True, eq=False)
class _Batch:
  """Samples of a group that go through the model together."""

  places: list[int]  # in the group's list of samples
  inputs: Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class _End:
  """All batches of a group have come."""

  group: int
  ready: list[_Ready]
  rejects: list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Capturer:
  """Makes the groups of one split.

  Attributes:
    layers: decoder layers whose output is kept.
    folder: acts/<split>, where images are kept that no file outside holds;
      None keeps none, and no truth.
    batch: samples a forward; group: samples a group; max_tokens: a longer
      sample is rejected.
  """

  subject: Subject
  split: Split
  layers: tuple[int, ...]
  folder: Place | None
  batch: int
  group: int
  max_tokens: int

  def groups(self, groups: Iterable[int]) -> Iterator[Rows]:
    """These groups, in this order; what comes next is read meanwhile."""
    found: dict[int, dict[int, np.ndarray]] = {}  # {place: {layer: [T, D]}}
    for step in prefetch(self._steps(groups), AHEAD):
      if isinstance(step, _End):
        yield self._rows(step, found)
        found = {}
      else:
        rows = self.subject.rows(step.inputs, self.layers)
        found |= dict(zip(step.places, rows, strict=True))

  def _steps(self, groups: Iterable[int]) -> Iterator[_Batch | _End]:
    for group in groups:
      ready, rejects = self._read(group)
      lengths = [len(each.tokens.token_T) for each in ready]
      order = sorted(range(len(ready)), key=lengths.__getitem__)
      for at in range(0, len(order), self.batch):
        places = order[at : at + self.batch]
        members = [ready[place] for place in places]
        inputs = self.subject.batch(
          [each.tokens for each in members], [each.images for each in members]
        )
        yield _Batch(places, inputs)
      yield _End(group, ready, rejects)

  def _read(self, group: int) -> tuple[list[_Ready], list[dict[str, str]]]:
    """The group's samples, in order, and those that cannot be captured."""
    ready, rejects = [], []
    first = group * self.group
    last = min(first + self.group, len(self.split.rows))
    for sample in range(first, last):
      row = self.split.rows[sample]
      try:
        ready.append(self._ready(self.split.source[row], sample))
      except ValueError as error:  # the reason why this row cannot be had
        name = self.split.source.name(row)
        logging.debug('capture: %s is rejected: %s', name, error)
        rejects.append({'source': name, 'reason': str(error)})
    return ready, rejects

  def _ready(self, item: Item, sample: int) -> _Ready:
    images = [each.image for each in item.images]
    if item.conversation:
      prompt = self.subject.conversation(item.conversation, len(images))
    else:
      prompt = self.subject.bare()
    tokens = self.subject.encode(prompt, images)
    limit = min(self.max_tokens, self.subject.max_tokens)
    if len(tokens.token_T) > limit:
      raise ValueError(
        f'{len(tokens.token_T)} tokens, and at most {limit} are taken: '
        'see capture.max_tokens'
      )
    truth, pictures = (
      None,
      [Picture(each.path, *each.image.size) for each in item.images],
    )
    if self.folder is not None:
      pictures, truth = _keep(self.folder, item, sample)
    first = pictures[0] if pictures else Picture('', 0, 0)
    record = records.Sample(
      sample=sample,
      group=-1,
      source=item.source,
      image=first.file,
      width=first.width,
      height=first.height,
      prompt=str(prompt),
      turns=item.turns,
      start=0,
      stop=0,
      truth=truth,
      tokens=len(tokens.token_T),
      grid=tokens.grid,
      more=tuple(pictures[1:]),
    )
    return _Ready(record, tokens, images)

  def _rows(
    self, end: _End, found: Mapping[int, Mapping[int, np.ndarray]]
  ) -> Rows:
    maps = [each.tokens for each in end.ready]
    lengths = [len(each.token_T) for each in maps]
    stops = np.cumsum(lengths, dtype=np.int64).tolist()
    samples = [
      dataclasses.replace(each.sample, start=stop - length, stop=stop)
      for each, length, stop in zip(end.ready, lengths, stops, strict=True)
    ]

    def joined(arrays: list[np.ndarray], *columns: int) -> np.ndarray:
      return np.concatenate([np.empty((0, *columns), np.int32), *arrays])

    ids = np.array([each.sample for each in samples], np.int32)
    tokens = {
      'sample': np.repeat(ids, lengths),
      'position': joined([np.arange(length) for length in lengths]),
      'token': joined([each.token_T for each in maps]),
      'kind': joined([each.kind_T for each in maps]),
      'image': joined([each.image_T for each in maps]),
      'row': joined([each.row_T for each in maps]),
      'col': joined([each.col_T for each in maps]),
      'box': joined([np.rint(each.box_T4) for each in maps], 4),
    }
    places = range(len(samples))
    layers = {
      layer: np.concatenate([found[at][layer] for at in places])
      if samples
      else np.empty((0, self.subject.width), np.float32)
      for layer in self.layers
    }
    return Rows(end.group, layers, tokens, samples, end.rejects)


def _keep(
  folder: Place, item: Item, sample: int
) -> tuple[list[Picture], dict[str, Any] | None]:
  """Keeps what no file outside holds: (the images, truth)."""
  pictures, truth = [], None
  for number, each in enumerate(item.images):
    name = each.path
    if not name:
      name = f'images/{sample:06d}{f".{number}" if number else ""}.png'
      (folder / name).write(_png(each.image))
    pictures.append(Picture(name, *each.image.size))
  if item.regions_HW is not None:
    regions = f'images/{sample:06d}.regions.png'
    (folder / regions).write(_png(Image.fromarray(item.regions_HW)))
    truth = {'regions': regions, 'concepts': item.concepts}
  return pictures, truth


def _png(image: Image.Image) -> bytes:
  file = io.BytesIO()
  image.save(file, 'PNG', compress_level=1)
  return file.getvalue()
