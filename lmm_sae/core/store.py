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
import dataclasses
import functools
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts
from PIL import Image

from lmm_sae.core import grid, images, places, records, store_rows
from lmm_sae.core.grid import TOKENS, Layout
from lmm_sae.core.places import Place
from lmm_sae.core.store_commits import Commits, parse
from lmm_sae.core.tokens import Kind

FORMAT_VERSION = 2
DAMAGE = re.compile(
  r'DATA_LOSS|FAILED_PRECONDITION|OUT_OF_RANGE|is missing|byte range'
)
SHARDS = 2  # that are encoded and written at a time
MEND = (
  'run `lmm-sae doctor --workdir=... --config.doctor.drop=True`, then capture '
  'again'
)


@dataclasses.dataclass(frozen=True)
class StoreMeta:
  """What a store holds; two stores with equal meta hold equal rows.

  Attributes:
    split: train, a or b.
    model: name of the subject.
    fingerprint: of the subject's configuration and weights.
    layers: hooked decoder layers, 0-based; layer_paths: where each was found in
      the model, by layer as str.
    width: D.
    grid: (rows, cols) of the base view's patches; (0, 0) where it depends on
      the image.
    image_backend: which image processor made the pixels.
    config: the fields of the run that decide what is stored.
    mixed: whether the rows of a group are in no order; else they stand sample
      after sample, by position.
    dtype: how rows are kept: bfloat16, or int8 with a scale a row.
  """

  split: str
  model: str
  fingerprint: str
  layers: tuple[int, ...]
  layer_paths: dict[str, str]
  width: int
  grid: tuple[int, int]
  image_backend: str
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  mixed: bool = False
  dtype: str = 'bfloat16'

  def __post_init__(self):
    if self.dtype not in store_rows.DTYPES:
      raise ValueError(
        f'capture.store is {self.dtype!r}; it is one of {store_rows.DTYPES}'
      )


class ActivationStore:
  """Rows of one split; make it with `create` or `open`."""

  def __init__(
    self, path: Place, meta: StoreMeta, layout: Layout, writes: bool
  ):
    self.path = path
    self.meta = meta
    self.layout = layout
    self.fields = grid.fields(meta.layers, meta.width, meta.dtype)
    self._writes = writes
    self._commits = Commits(path)
    self._arrays: dict[str, ts.TensorStore] = {}

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
    wanted = {
      'format_version': FORMAT_VERSION,
      **dataclasses.asdict(meta),
      **dataclasses.asdict(layout),
    }
    wanted = json.loads(json.dumps(wanted))
    found = _read_meta(path)
    if found is None:
      places.write_json(path / 'meta.json', wanted)
    elif found != wanted:
      raise ValueError(
        f'{path} was captured with other settings ('
        f'{"; ".join(_differences(found, wanted))}): use another workdir, '
        'or delete that folder to capture again'
      )
    store = cls(path, meta, layout, writes=True)
    for name, field in store.fields.items():
      grid.open_array(path / name, *field, layout, create=True)
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
    found = _read_meta(path)
    if found is None:
      raise ValueError(f'no activations at {path}: run `lmm-sae capture` first')
    layout = Layout(
      **{field.name: found[field.name] for field in dataclasses.fields(Layout)}
    )
    fields = {f.name: found[f.name] for f in dataclasses.fields(StoreMeta)}
    fields['layers'] = tuple(fields['layers'])
    fields['grid'] = tuple(fields['grid'])
    store = cls(path, StoreMeta(**fields), layout, writes=False)
    if not (partial or store.complete):
      raise ValueError(
        f'{path} is not complete ({len(store.committed())} of {layout.groups} '
        'groups): run `lmm-sae capture` again, it does the rest'
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
    if self.meta.dtype == 'bfloat16':
      return None
    found = [line['rounding'][str(layer)] for line in self.manifest]
    variance = sum(each['variance'] for each in found)
    return sum(each['error'] for each in found) / variance if variance else 0.0

  # Reading.

  def read(self, layer: int, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a layer, bfloat16 [N, D].

    Raises:
      ValueError: the layer was not captured, a row is not committed, or a shard
        is missing or damaged; the message names its file.
    """
    if layer not in self.meta.layers:
      raise ValueError(
        f'layer {layer} is not in {self.path}, which holds {self.meta.layers}: '
        'set lmm.layers and capture again'
      )
    self._check(start, stop)
    if self.meta.dtype == 'bfloat16':
      return self._read([f'layer_{layer}'], start, stop)[0]
    codes_ND, scale_N = self._read(
      [f'layer_{layer}', f'scale_{layer}'], start, stop
    )
    return store_rows.from_int8(codes_ND, scale_N)

  def tokens(
    self, start: int, stop: int, names: Sequence[str] = tuple(TOKENS)
  ) -> dict[str, np.ndarray]:
    """Token fields of rows [start, stop): {name: [N] or, for box, [N, 4]}.

    Raises:
      ValueError: as in `read`.
    """
    self._check(start, stop)
    return dict(zip(names, self._read(names, start, stop), strict=True))

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
    arrays = {f'layer_{layer}': layers[layer] for layer in self.meta.layers}
    arrays |= {name: tokens[name] for name in TOKENS}
    count = len(tokens['sample'])
    self._check_shapes(arrays, count)
    base = group * self.layout.group_rows
    samples = [self._placed(sample, group, count) for sample in samples]
    rejects = [{**reject, 'group': group} for reject in rejects]
    kinds = np.bincount(tokens['kind'], minlength=len(Kind))
    sizes, rounding = self._write_rows(group, arrays, count)
    line = {
      'group': group,
      'start': base,
      'stop': base + count,
      'samples': len(samples),
      'rejects': len(rejects),
      'kinds': {
        kind.name.lower(): int(kinds[kind]) for kind in Kind if kinds[kind]
      },
      'bytes': sizes,
    }
    if self.meta.dtype == 'int8':
      line['rounding'] = rounding
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

  def _write_rows(self, group, arrays, count):
    """({array: bytes of each shard}, {layer: error and variance})."""
    bos_N = arrays['kind'] == Kind.BOS
    tasks = [
      (name, shard, slice(start, stop))
      for shard, start, stop in self.layout.spans(group, count)
      for name in arrays
    ]

    def write(task) -> tuple[dict[str, int], store_rows.Spread]:
      name, shard, at = task
      return self._write_shard(name, shard, arrays[name][at], ~bos_N[at])

    sizes = {name: [] for name in self.fields}
    spreads = {str(layer): store_rows.Spread() for layer in self.meta.layers}
    with ThreadPoolExecutor(SHARDS) as pool:
      for (name, _, _), (size, spread) in zip(
        tasks, pool.map(write, tasks), strict=True
      ):
        for each in size:
          sizes[each].append(size[each])
        if spread is not None:
          spreads[name.removeprefix('layer_')].add(spread)
    self._delete_rest(group, count)
    return sizes, {layer: each.sums() for layer, each in spreads.items()}

  def _write_shard(self, name, shard, rows, kept_N):
    """({array: bytes of its file}, what int8 costs)."""
    if name not in self._layers:
      return {name: self._write_file(name, shard, rows)}, None
    if self.meta.dtype == 'bfloat16':
      rows = store_rows.bfloat16(rows)
      return {name: self._write_file(name, shard, rows)}, None
    codes_ND, scale_N = store_rows.to_int8(rows)
    spread = store_rows.Spread.of(rows, codes_ND, scale_N, kept_N)
    scale = name.replace('layer', 'scale')
    return {
      name: self._write_file(name, shard, codes_ND),
      scale: self._write_file(scale, shard, scale_N),
    }, spread

  def _write_file(self, name: str, shard: int, rows: np.ndarray) -> int:
    dtype, columns = self.fields[name]
    data = grid.encode(rows, dtype, columns, self.layout)
    (self.path / grid.shard_key(name, columns, shard)).write(data)
    return len(data)

  def _delete_rest(self, group: int, count: int) -> None:
    """Removes what an earlier capture left past a group's rows."""
    places.delete_all(
      self.path / key for key in self.shard_files(group, count, beyond=True)
    )

  def shard_files(
    self, group: int, count: int, beyond: bool = False
  ) -> list[str]:
    """The files of the shards that hold a group's first `count` rows.

    With `beyond`, of the group's other shards.
    """
    first = group * self.layout.group_rows // self.layout.shard_rows
    used = first + -(-count // self.layout.shard_rows)
    last = first + self.layout.group_rows // self.layout.shard_rows
    shards = range(used, last) if beyond else range(first, used)
    return [
      grid.shard_key(name, columns, shard)
      for shard in shards
      for name, (_, columns) in self.fields.items()
    ]

  def _placed(self, sample, group: int, count: int) -> records.Sample:
    """The sample with its group, its rows counted from the store's first."""
    span = (sample.start, sample.stop)
    if self.meta.mixed:
      if span != (-1, -1):
        raise ValueError(
          f'sample {sample.sample} has rows {span} in a mixed store, where '
          'both are -1'
        )
      return dataclasses.replace(sample, group=group)
    if not 0 <= span[0] <= span[1] <= count:
      raise ValueError(
        f'sample {sample.sample} has rows {span} of a group of {count}'
      )
    base = group * self.layout.group_rows
    return dataclasses.replace(
      sample, group=group, start=base + span[0], stop=base + span[1]
    )

  def _check_writes(self) -> None:
    if not self._writes:
      raise ValueError(f'{self.path} is open for reading')

  def _check_shapes(self, arrays, count):
    if count > self.layout.group_rows:
      raise ValueError(
        f'{count} rows do not fit a group of {self.layout.group_rows}'
      )
    for name, rows in arrays.items():
      _, columns = self.fields[name]
      shape = (count, columns) if columns else (count,)
      if rows.shape != shape:
        raise ValueError(f'{name} has shape {rows.shape}, not {shape}')

  def _check(self, start: int, stop: int) -> None:
    at = bisect.bisect_right(self.ranges, (start, float('inf'))) - 1
    if at < 0 or not start <= stop <= self.ranges[at][1]:
      raise ValueError(
        f'rows [{start}, {stop}) of {self.path} are not inside one committed '
        'range: read within `ranges`'
      )

  def _read(self, names, start: int, stop: int) -> list[np.ndarray]:
    futures = [self._array(name)[start:stop].read() for name in names]
    found = []
    for name, future in zip(names, futures, strict=True):
      try:
        found.append(future.result())
      except ValueError as error:
        raise self._damaged(name, start, stop, error) from error
    return found

  def _damaged(self, name, start, stop, error) -> ValueError:
    """What is wrong with the rows of an array that could not be read."""
    if not DAMAGE.search(str(error)):
      return places.explained(error, self.path / name)
    rows, (_, columns) = self.layout.shard_rows, self.fields[name]
    for shard in range(start // rows, -(-stop // rows)):
      first, last = max(start, shard * rows), min(stop, (shard + 1) * rows)
      try:
        self._array(name)[first:last].read().result()
      except ValueError as again:
        place = self.path / grid.shard_key(name, columns, shard)
        what = (
          'missing'
          if not place.exists()
          else ('damaged (' + str(again).rsplit(': ', 1)[-1][:120] + ')')
        )
        return ValueError(f'{place} is {what}: {MEND}')
    return places.explained(error, self.path / name)

  def _array(self, name: str) -> ts.TensorStore:
    if name not in self._arrays:
      self._arrays[name] = grid.open_array(
        self.path / name, *self.fields[name], self.layout
      )
    return self._arrays[name]

  @property
  def _layers(self) -> set[str]:
    return {f'layer_{layer}' for layer in self.meta.layers}

  def _forget(self) -> None:
    """Of what is committed, reads again when asked."""
    for name in ('manifest', 'ranges', '_samples'):
      self.__dict__.pop(name, None)


def _read_meta(path: Place) -> dict[str, Any] | None:
  data = (path / 'meta.json').read_if_there()
  if data is None:
    return None
  found = parse(data, path / 'meta.json')
  version = found.get('format_version')
  if version != FORMAT_VERSION:
    raise ValueError(
      f'{path} has format_version {version}; this program reads '
      f'{FORMAT_VERSION}: capture again in another workdir'
    )
  return found


def _differences(found: Any, wanted: Any, name: str = '') -> list[str]:
  """The fields in which two metas differ, as `name: found, now wanted`."""
  if not (isinstance(found, dict) and isinstance(wanted, dict)):
    return [] if found == wanted else [f'{name}: {found!r}, now {wanted!r}']
  names = sorted(found.keys() | wanted.keys())
  return [
    text
    for key in names
    for text in _differences(
      found.get(key), wanted.get(key), f'{name}.{key}' if name else key
    )
  ]
