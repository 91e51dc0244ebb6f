"""Groups of samples, run through the subject: the work of the capture stage.

A group depends on nothing but the data, the model and the settings, so any
process may make it, and make it again.
"""

import dataclasses
import io
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from absl import logging
from PIL import Image

from lmm_sae.core import choice, records
from lmm_sae.core.choice import Choice
from lmm_sae.core.prefetch import prefetch
from lmm_sae.core.records import Picture
from lmm_sae.core.sources import IMAGE, Item, Split
from lmm_sae.core.tokens import TokenMap
from lmm_sae.core.workers import StoppedError
from lmm_sae.lmm.llava import Subject

AHEAD = 3  # batches made ready while the model runs
# Pictures of a group that wait for their batch, decoded; those beyond are read
# a second time.
WAITING_BYTES = 2**30

Save = Callable[[str, bytes], None]  # keeps a file of that name


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """The rows of some samples, as `ActivationStore.write_group` takes them.

  Attributes:
    layers: {layer: bfloat16 [N, D]}, in their final order.
    tokens: the fields of the store's token arrays, of the same rows.
    samples: those that could be read; `start` and `stop` count from the first
      row, or are -1 where the rows are mixed.
    rejects: {source, reason} of the others.
    seen: tokens of the sequences, whether stored or not.
  """

  layers: dict[int, np.ndarray]
  tokens: dict[str, np.ndarray]
  samples: list[records.Sample]
  rejects: list[dict[str, str]]
  seen: int


@dataclasses.dataclass(frozen=True, eq=False)
class Ready:
  """A sample ready for the model.

  Attributes:
    row: of the source. record: `start` and `stop` are still to come.
    keep_N: positions that are stored.
    images: emptied once the model has them.
    waits: whether `images` holds them; else they are read again.
  """

  row: int
  record: records.Sample
  tokens: TokenMap
  keep_N: np.ndarray
  images: list[Image.Image]
  waits: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _Batch:
  """Samples of a group that go through the model together."""

  places: list[int]  # in the group's list of samples
  inputs: Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Capturer:
  """Makes the rows of one split.

  Attributes:
    layers: decoder layers whose output is kept.
    choice: which tokens are; seed: of their draw, and of mixing.
    mix: whether the rows are mixed, or stand in the order of the samples.
    template: chat, or raw: the turns alone.
    save: keeps images that no file outside holds, and the truth; None: neither
      is kept.
    batch: samples a forward; max_tokens: a longer sample is rejected.
    turn: held while the model runs, so that one group is in it at a time.
  """

  subject: Subject
  split: Split
  layers: tuple[int, ...]
  choice: Choice
  seed: int
  mix: bool
  template: str
  save: Save | None
  batch: int
  max_tokens: int
  turn: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  def rows(
    self,
    samples: Sequence[int],
    stopped: Callable[[], bool] = lambda: False,
  ) -> Rows:
    """The rows of these samples of the split.

    Images are read, and the first batches made ready, before it waits for its
    turn; the rows are allocated after.

    Args:
      samples: places in `split.rows`, ascending.
      stopped: asked before each forward.

    Raises:
      ValueError: the rows are not finite in the model's dtype.
      StoppedError: `stopped` said so.
    """
    ready, rejects = self.read(samples, stopped)
    batches = prefetch(self._batches(ready), AHEAD)
    first = list(itertools.islice(batches, 1))  # starts the thread
    with self.turn:
      starts = np.cumsum([0, *(len(each.keep_N) for each in ready)])
      sample_N = np.repeat(
        np.array([each.record.sample for each in ready], np.int32),
        np.diff(starts),
      )
      position_N = _joined([each.keep_N for each in ready], np.int32)
      order_N = place_N = np.arange(len(sample_N))
      if self.mix:
        order_N = choice.mixed(self.seed, self.split.name, sample_N, position_N)
        place_N = np.argsort(order_N)
      layers = {
        layer: np.empty((len(sample_N), self.subject.width), ml_dtypes.bfloat16)
        for layer in self.layers
      }
      for batch in itertools.chain(first, batches):
        if stopped():
          raise StoppedError
        keep = [ready[place].keep_N for place in batch.places]
        found = self.subject.rows(batch.inputs, self.layers, keep)
        for place, rows in zip(batch.places, found, strict=True):
          into = place_N[starts[place] : starts[place + 1]]
          for layer, rows_ND in rows.items():
            # As integers: numpy copies bfloat16 one number at a time.
            layers[layer].view(np.int16)[into] = rows_ND.view(np.int16)
    return Rows(
      layers,
      {
        'sample': sample_N[order_N],
        'position': position_N[order_N],
        **_fields(ready, order_N),
      },
      [
        dataclasses.replace(
          each.record,
          start=-1 if self.mix else int(starts[at]),
          stop=-1 if self.mix else int(starts[at + 1]),
        )
        for at, each in enumerate(ready)
      ],
      rejects,
      sum(len(each.tokens.token_T) for each in ready),
    )

  def _batches(self, ready: Sequence[Ready]) -> Iterator[_Batch]:
    """Samples of like length together, so that little is padding."""
    lengths = [len(each.tokens.token_T) for each in ready]
    order = sorted(range(len(ready)), key=lengths.__getitem__)
    order = [place for place in order if len(ready[place].keep_N)]
    for at in range(0, len(order), self.batch):
      places = order[at : at + self.batch]
      members = [ready[place] for place in places]
      images = [
        each.images if each.waits else _images(self.split.source[each.row])
        for each in members
      ]
      yield _Batch(
        places, self.subject.batch([each.tokens for each in members], images)
      )
      for each in members:
        each.images.clear()

  # Reading.

  def read(
    self, samples: Sequence[int], stopped: Callable[[], bool]
  ) -> tuple[list[Ready], list[dict[str, str]]]:
    """The samples, in order, and those that cannot be captured."""
    ready, rejects, waiting = [], [], 0
    for sample in samples:
      if stopped():
        raise StoppedError
      row = self.split.rows[sample]
      try:
        item = self.split.source[row]
        size = sum(3 * i.width * i.height for i in _images(item))
        fits = waiting + size <= WAITING_BYTES
        ready.append(self._ready(item, sample, row, fits))
        waiting += size if fits else 0
      except ValueError as error:  # the reason why this row cannot be had
        name = self.split.source.name(row)
        logging.debug('capture: %s is rejected: %s', name, error)
        rejects.append({'source': name, 'reason': str(error)})
    return ready, rejects

  def _ready(self, item: Item, sample: int, row: int, waits: bool) -> Ready:
    images = _images(item)
    if not item.conversation:
      prompt = self.subject.bare(IMAGE * len(images))
    elif self.template == 'raw':
      prompt = self.subject.raw(item.conversation, len(images))
    else:
      prompt = self.subject.conversation(item.conversation, len(images))
    tokens = self.subject.encode(prompt, images)
    count = len(tokens.token_T)
    limit = min(self.max_tokens, self.subject.max_tokens)
    if count > limit:
      raise ValueError(
        f'{count} tokens, and at most {limit} are taken: see capture.max_tokens'
      )
    pictures = [Picture(each.path, *each.image.size) for each in item.images]
    truth = None
    if self.save is not None:
      pictures, truth = _keep(self.save, item, sample)
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
      start=-1,
      stop=-1,
      truth=truth,
      tokens=count,
      grid=tokens.grid,
      more=tuple(pictures[1:]),
    )
    keep_N = self.choice.keep(self.seed, self.split.name, sample, tokens.kind_T)
    return Ready(row, record, tokens, keep_N, images if waits else [], waits)


def _images(item: Item) -> list[Image.Image]:
  return [each.image for each in item.images]


def _joined(arrays: Sequence[np.ndarray], dtype: Any, *columns: int):
  return np.concatenate([np.empty((0, *columns), dtype), *arrays]).astype(dtype)


def _fields(
  ready: Sequence[Ready], order_N: np.ndarray
) -> dict[str, np.ndarray]:
  """What the token maps say of the stored rows, in their final order."""
  maps = [(each.tokens, each.keep_N) for each in ready]
  fields = {
    'token': _joined([m.token_T[at] for m, at in maps], np.int32),
    'kind': _joined([m.kind_T[at] for m, at in maps], np.uint8),
    'image': _joined([m.image_T[at] for m, at in maps], np.int16),
    'row': _joined([m.row_T[at] for m, at in maps], np.int16),
    'col': _joined([m.col_T[at] for m, at in maps], np.int16),
    'box': _joined([np.rint(m.box_T4[at]) for m, at in maps], np.int16, 4),
  }
  return {name: field[order_N] for name, field in fields.items()}


def _keep(
  save: Save, item: Item, sample: int
) -> tuple[list[Picture], dict[str, Any] | None]:
  """Keeps what no file outside holds: (the images, truth)."""
  pictures, truth = [], None
  for number, each in enumerate(item.images):
    name = each.path
    if not name:
      name = f'images/{sample:06d}{f".{number}" if number else ""}.png'
      save(name, _png(each.image))
    pictures.append(Picture(name, *each.image.size))
  if item.regions_HW is not None:
    regions = f'images/{sample:06d}.regions.png'
    save(regions, _png(Image.fromarray(item.regions_HW)))
    truth = {'regions': regions, 'concepts': item.concepts}
  return pictures, truth


def _png(image: Image.Image) -> bytes:
  file = io.BytesIO()
  image.save(file, 'png', compress_level=1)
  return file.getvalue()
