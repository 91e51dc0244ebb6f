"""The activation store: rows of the residual stream, typed, committed, resumed.

Under acts/<split>/, in a local folder or a bucket (`core.places`), stand zarr3
arrays on one grid of rows (one of width D for each hooked layer, with int8 also
a scale for each row, and one for each token field), and beside them

  meta.json       what was captured, and the shape of the grid
  groups/<g>.json what commits group g: its manifest line, samples and rejects
  samples.jsonl   `records.Sample`, one a line, once the store is sealed
  rejects.jsonl   {source, reason, group}: what could not be read
  manifest.jsonl  one line for each committed group
  vocab.json      the string of every token id
  images/         pictures and region maps that no file outside holds

Group g owns the rows [g * group_rows, (g + 1) * group_rows): whole shards, and
rows that it leaves unwritten cost nothing. Any process may write any group, and
write it again: shards are replaced as a whole, and the commit, which comes
last, is one object (`core.store_commits`). A store that many processes wrote,
killed and started again, is byte for byte the store of one uninterrupted run
once `seal` has gathered its commits.
"""

import bisect
import collections
import functools
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lmm_sae.core import (
  grid,
  images,
  records,
  store_meta,
  store_rows,
  store_write,
)
from lmm_sae.core.grid import TOKENS, Layout
from lmm_sae.core.places import Place
from lmm_sae.core.store_arrays import Arrays
from lmm_sae.core.store_commits import Commits
from lmm_sae.core.store_meta import StoreMeta

AHEAD = 8  # spans that are read at a time


class ActivationStore:
  """Rows of one split; make it with `create` or `open`."""

  def __init__(
    self, path: Place, meta: StoreMeta, layout: Layout, writes: bool
  ):
    self.path = path
    self.meta = meta
    self.layout = layout
    fields = grid.fields(meta.layers, meta.width, meta.dtype)
    self.arrays = Arrays(path, fields, layout)
    self._writes = writes
    self._commits = Commits(path)

  @classmethod
  def create(
    cls,
    path: str | os.PathLike | Place,
    meta: StoreMeta,
    groups: int,
    group_rows: int,
    shard_rows: int,
    chunk_rows: int,
  ) -> 'ActivationStore':
    """A store open for writing; the one at `path` if it has this meta.

    Many processes may do so at once.

    Raises:
      ValueError: the store at `path` holds something else, the sizes do not
        divide one another, or the place cannot be written.
    """
    path = Place.of(path)
    layout = Layout(groups, group_rows, shard_rows, chunk_rows)
    store_meta.claim(path, meta, layout)
    store = cls(path, meta, layout, writes=True)
    store.arrays.make()
    return store

  @classmethod
  def open(
    cls, path: str | os.PathLike | Place, partial: bool = False
  ) -> 'ActivationStore':
    """A store open for reading.

    Raises:
      ValueError: there is none, its format is unknown, or, unless `partial`, it
        is not complete.
    """
    path = Place.of(path)
    store = cls(path, *store_meta.read(path), writes=False)
    if not (partial or store.complete):
      done, groups = len(store.committed()), store.layout.groups
      raise ValueError(
        f'{path} is not complete ({done} of {groups} groups): run `lmm-sae '
        'capture` again, it does the rest'
      )
    return store

  # What is there.

  def refresh(self) -> None:
    """Looks again at what other processes have committed."""
    self._commits.refresh()
    self._forget()

  def committed(self) -> set[int]:
    """The groups that are in the store."""
    return self._commits.groups()

  @property
  def complete(self) -> bool:
    """Whether every group is committed."""
    return len(self.committed()) == self.layout.groups

  @functools.cached_property
  def manifest(self) -> list[dict[str, Any]]:
    """A dict for each committed group, in order of rows.

    Keys: group, start and stop (rows), samples and rejects (counts), kinds
    (rows by kind), bytes ({array: [bytes of each shard's file]}) and, of an
    int8 store, rounding ({layer: {error, variance}}, see `rounding`).
    """
    return list(self._commits.lines().values())

  @functools.cached_property
  def ranges(self) -> list[tuple[int, int]]:
    """(start, stop) of the committed rows, in order; empty groups left out."""
    pairs = [(line['start'], line['stop']) for line in self.manifest]
    return [(start, stop) for start, stop in pairs if stop > start]

  @property
  def num_rows(self) -> int:
    return sum(stop - start for start, stop in self.ranges)

  @functools.cached_property
  def _samples(self) -> dict[int, records.Sample]:
    lines = self._commits.samples()
    read = [records.from_json(records.Sample, line) for line in lines]
    return {s.sample: s for s in sorted(read, key=lambda s: s.sample)}

  def samples(self) -> list[records.Sample]:
    """All samples, by index; a rejected one leaves a gap in the indices."""
    return list(self._samples.values())

  def sample(self, sample: int) -> records.Sample:
    """The sample of that index.

    Raises:
      KeyError: it was rejected, or there is none.
    """
    return self._samples[sample]

  def rejects(self) -> list[dict[str, Any]]:
    """{source, reason, group} of each row that could not be read."""
    return self._commits.rejects()

  def rounding(self, layer: int) -> float | None:
    """What int8 costs: the FVU of the rows that `read` gives.

    sum of |x - read(x)|^2 over sum of |x - mean|^2, over the rows of all
    committed groups but BOS, the mean being that of each GROUP's own rows: no
    larger than the variance about the mean of the whole store, so the cost is
    not told smaller than it is. None of bfloat16, which is stored as it comes.
    """
    self._check_layer(layer)
    if self.meta.dtype == 'bfloat16':
      return None
    found = [line['rounding'][str(layer)] for line in self.manifest]
    variance = sum(each['variance'] for each in found)
    return sum(each['error'] for each in found) / variance if variance else 0.0

  def span(self, sample: records.Sample) -> tuple[int, int]:
    """(start, stop) of a sample's rows: one for each token, by position.

    Raises:
      ValueError: they are mixed, or some were not kept; the message names the
        field of capture that decides it.
    """
    if self.meta.mixed:
      raise ValueError(
        f'the rows of {self.path} are mixed; here those of a sample must stand '
        'in order: use another split, or set capture.mix=False and capture in '
        'another workdir'
      )
    rows = sample.stop - sample.start
    if rows < sample.tokens:
      train = self.meta.split == 'train'
      field = 'capture.keep' if train else 'capture.keep_halves'
      raise ValueError(
        f'{self.path} holds {rows} of the {sample.tokens} tokens of sample '
        f"{sample.sample}; here all are needed: set {field}=('all', 'bos') and "
        'capture in another workdir'
      )
    return sample.start, sample.stop

  # Reading.

  def read(self, layer: int, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a layer, bfloat16 [N, D].

    Raises:
      ValueError: the layer was not captured, a row is not committed, or a shard
        is missing or damaged; the message names its file.
    """
    (x_ND,) = self.read_many(layer, [(start, stop)])
    return x_ND

  def read_many(
    self, layer: int, spans: Iterable[tuple[int, int]]
  ) -> Iterator[np.ndarray]:
    """The rows of many spans, in order, a few of them read at a time.

    Raises:
      ValueError: as in `read`.
    """
    self._check_layer(layer)
    names = [f'layer_{layer}']
    if self.meta.dtype == 'int8':
      names.append(f'scale_{layer}')
    ahead: collections.deque = collections.deque()
    for start, stop in spans:
      self._check(start, stop)
      ahead.append(self.arrays.begin(names, start, stop))
      if len(ahead) == AHEAD:
        yield _rows(ahead.popleft())
    while ahead:
      yield _rows(ahead.popleft())

  def tokens(
    self, start: int, stop: int, names: Sequence[str] = tuple(TOKENS)
  ) -> dict[str, np.ndarray]:
    """Token fields of rows [start, stop): {name: [N] or, for box, [N, 4]}.

    Raises:
      ValueError: as in `read`.
    """
    self._check(start, stop)
    found = self.arrays.begin(names, start, stop)()
    return dict(zip(names, found, strict=True))

  @functools.cached_property
  def vocab(self) -> list[str]:
    """The string of every token id."""
    return json.loads((self.path / 'vocab.json').read())

  def image(self, sample: int, number: int = 0) -> Image.Image:
    """An image of the sample as the subject saw it: RGB, upright.

    Args:
      sample: its index.
      number: which of its images.

    Raises:
      ValueError: it has none, or none was kept.
    """
    found = self.sample(sample)
    names = [found.image, *(picture.file for picture in found.more)]
    if number >= len(names) or not names[number]:
      which = f'image {number}' if number else 'image'
      raise ValueError(f'{self.path} keeps no {which} of sample {sample}')
    name = names[number]
    if os.path.isabs(name):
      return images.load(name)
    try:
      return images.load(io.BytesIO((self.path / name).read()))
    except ValueError as error:
      raise ValueError(f'{self.path / name}: {error}') from error

  def regions(self, sample: int) -> np.ndarray:
    """The region id of every pixel, uint8 [H, W]; 0 is background.

    Raises:
      ValueError: the truth of that sample is not known.
    """
    truth = self.sample(sample).truth
    if truth is None or 'regions' not in truth:
      raise ValueError(f'{self.path} knows no regions of sample {sample}')
    with Image.open(io.BytesIO((self.path / truth['regions']).read())) as image:
      return np.array(image)

  # Writing.

  def keep(self, name: str, data: bytes) -> None:
    """Writes a file such as images/000012.png into the store."""
    self._check_writes()
    (self.path / name).write(data)

  def write_group(
    self,
    group: int,
    layers: Mapping[int, np.ndarray],
    tokens: Mapping[str, np.ndarray],
    samples: Iterable[records.Sample],
    rejects: Iterable[Mapping[str, Any]],
  ) -> None:
    """Writes a group's shards, one by one, and commits it.

    A group that is committed, by this process or another, stays as it is: it
    would be the same again.

    Args:
      group: 0 <= group < groups.
      layers: {layer: [N, D]} of all layers, N <= group_rows.
      tokens: every field of `TOKENS`; `sample` holds the samples' indices.
      samples: with `start` and `stop` counted from the group's FIRST row; the
        store makes them absolute. Both are -1 in a mixed store.
      rejects: {source, reason}.

    Raises:
      ValueError: shapes or samples do not fit, int8 is asked of NaN or Inf, or
        the place cannot be written.
    """
    self._check_writes()
    if not 0 <= group < self.layout.groups:
      raise ValueError(
        f'group {group} is none of the {self.layout.groups} of {self.path}'
      )
    if group in self.committed():
      return
    values = {f'layer_{layer}': layers[layer] for layer in self.meta.layers}
    values |= {name: tokens[name] for name in TOKENS}
    store_write.check_shapes(self.arrays.fields, values, self.layout.group_rows)
    count = len(values['sample'])
    samples = [
      store_write.placed(sample, self.meta, self.layout, group, count)
      for sample in samples
    ]
    rejects = [{**reject, 'group': group} for reject in rejects]
    line = store_write.write(self.arrays, values, self.meta, self.layout, group)
    line |= {'samples': len(samples), 'rejects': len(rejects)}
    self._commits.add(line, map(records.to_json, samples), rejects)
    self._forget()

  def seal(self) -> None:
    """Gathers the commits of all groups into three files, in order of group.

    Any process may do so, when every group is committed, and again.

    Raises:
      ValueError: a group is not committed.
    """
    self._check_writes()
    self.refresh()
    if not self.complete:
      raise ValueError(
        f'{self.path} has {len(self.committed())} of {self.layout.groups} '
        'groups: it is sealed when all are there'
      )
    self._commits.seal()
    self._forget()

  # Inside.

  def _check_layer(self, layer: int) -> None:
    if layer not in self.meta.layers:
      raise ValueError(
        f'layer {layer} is not in {self.path}, which holds {self.meta.layers}: '
        'set lmm.layers and capture again'
      )

  def _check_writes(self) -> None:
    if not self._writes:
      raise ValueError(f'{self.path} is open for reading')

  def _check(self, start: int, stop: int) -> None:
    at = bisect.bisect_right(self.ranges, (start, float('inf'))) - 1
    if at < 0 or not start <= stop <= self.ranges[at][1]:
      raise ValueError(
        f'rows [{start}, {stop}) of {self.path} are not inside one committed '
        'range: read within `ranges`'
      )

  def _forget(self) -> None:
    """Of what is committed, reads again when asked."""
    for name in ('manifest', 'ranges', '_samples'):
      self.__dict__.pop(name, None)


def _rows(end: Callable[[], list[np.ndarray]]) -> np.ndarray:
  """The rows of a layer, bfloat16 [N, D], from what ends their reading."""
  rows_ND, *scale_N = end()
  return store_rows.from_int8(rows_ND, *scale_N) if scale_N else rows_ND
