"""Groups of samples, run through the subject: the work of the capture stage.

A group depends on nothing but the data, the model and the settings, so any
process may make it, and make it again.
"""

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch

from lmm_sae.core import choice, records
from lmm_sae.core.prefetch import prefetch
from lmm_sae.core.workers import StoppedError
from lmm_sae.lmm.reading import Reader, Ready, pictures

AHEAD = 3  # batches made ready while the model runs


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
class _Batch:
  """Samples of a group that go through the model together."""

  places: list[int]  # in the group's list of samples
  keep: list[np.ndarray]  # positions whose rows are wanted
  inputs: Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class _Order:
  """Where the rows of a group stand.

  Attributes:
    sample_N, position_N: of each row, in the final order.
    order_N: row i is the row order_N[i] of those in the order of the samples;
      place_N: its inverse.
    starts: first row of each sample in the order of the samples, and the end.
  """

  sample_N: np.ndarray
  position_N: np.ndarray
  order_N: np.ndarray
  place_N: np.ndarray
  starts: list[int]

  @classmethod
  def of(
    cls, ready: Sequence[Ready], seed: int, split: str, mix: bool
  ) -> '_Order':
    counts = [len(each.keep_N) for each in ready]
    samples = np.array([each.record.sample for each in ready], np.int32)
    sample_N = np.repeat(samples, counts)
    position_N = _joined([each.keep_N for each in ready], np.int32)
    order_N = np.arange(len(sample_N))
    if mix:
      order_N = choice.mixed(seed, split, sample_N, position_N)
    return cls(
      sample_N[order_N],
      position_N[order_N],
      order_N,
      np.argsort(order_N),
      [0, *itertools.accumulate(counts)],
    )

  def of_sample(self, place: int) -> np.ndarray:
    """Where the rows of a sample stand, in order of position."""
    return self.place_N[self.starts[place] : self.starts[place + 1]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capturer(Reader):
  """Makes the rows of one split.

  Attributes:
    layers: decoder layers whose output is kept.
    mix: whether the rows are mixed, or stand in the order of the samples.
    batch: samples a forward.
    turn: held while the model runs, so that one group is in it at a time.
  """

  layers: tuple[int, ...]
  mix: bool
  batch: int
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
      RefusedError: the source cannot be reached.
      StoppedError: `stopped` said so.
    """
    ready, rejects = self.read(samples, stopped)
    order = _Order.of(ready, self.seed, self.split.name, self.mix)
    with contextlib.closing(prefetch(self._batches(ready), AHEAD)) as batches:
      first = list(itertools.islice(batches, 1))  # starts the thread
      with self.turn:
        layers = self._run(itertools.chain(first, batches), order, stopped)
    starts = [-1 if self.mix else start for start in order.starts]
    return Rows(
      layers,
      {
        'sample': order.sample_N,
        'position': order.position_N,
        **_fields(ready, order.order_N),
      },
      [
        dataclasses.replace(each.record, start=start, stop=stop)
        for each, (start, stop) in zip(
          ready, itertools.pairwise(starts), strict=True
        )
      ],
      rejects,
      sum(len(each.tokens.token_T) for each in ready),
    )

  def _run(
    self,
    batches: Iterable[_Batch],
    order: '_Order',
    stopped: Callable[[], bool],
  ) -> dict[int, np.ndarray]:
    """{layer: [N, D]}, each row put where it is to stand as it comes."""
    shape = (len(order.order_N), self.subject.width)
    layers = {layer: np.empty(shape, np.int16) for layer in self.layers}
    for batch in batches:
      if stopped():
        raise StoppedError
      found = self.subject.rows(batch.inputs, self.layers, batch.keep)
      for place, rows in zip(batch.places, found, strict=True):
        for layer, rows_ND in rows.items():
          # As integers: numpy copies bfloat16 one number at a time.
          layers[layer][order.of_sample(place)] = rows_ND.view(np.int16)
    return {at: x_ND.view(ml_dtypes.bfloat16) for at, x_ND in layers.items()}

  def _batches(self, ready: Sequence[Ready]) -> Iterator[_Batch]:
    """Samples of like length together, so that little is padding."""
    lengths = [len(each.tokens.token_T) for each in ready]
    order = sorted(range(len(ready)), key=lengths.__getitem__)
    order = [place for place in order if len(ready[place].keep_N)]
    for at in range(0, len(order), self.batch):
      places = order[at : at + self.batch]
      members = [ready[place] for place in places]
      images = [
        each.images if each.waits else pictures(self.split.source[each.row])
        for each in members
      ]
      yield _Batch(
        places,
        [each.keep_N for each in members],
        self.subject.batch([each.tokens for each in members], images),
      )
      for each in members:
        each.images.clear()


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
