"""The activation store: rows of the residual stream, typed, committed, resumed.

Under acts/<split>/ stand zarr3 arrays on one grid of rows (one of width D for
each hooked layer, one for each token field), and beside them

  meta.json       what was captured, and the shape of the grid
  samples.jsonl   `records.Sample`, one a line
  rejects.jsonl   {source, reason, group}: what could not be read
  manifest.jsonl  one line for each committed group; it comes last
  vocab.json      the string of every token id
  images/         pictures and region maps that no file outside holds

Group g owns the rows [g * group_rows, (g + 1) * group_rows): whole shards, so
it has one writer, and rows that it leaves unwritten cost nothing. What the
manifest does not list does not exist. Opening for writing cuts the JSON-lines
files to what the manifest knows, and a group that is written again replaces its
shards as a whole: a store that was killed and resumed is byte for byte the
store of an uninterrupted run.
"""

import bisect
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from PIL import Image

from lmm_sae.core import grid, images, records
from lmm_sae.core.grid import TOKENS, Layout
from lmm_sae.core.tokens import Kind

FORMAT_VERSION = 1


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
    grid: (rows, cols) of the base view's patches.
    image_backend: which image processor made the pixels.
    config: the fields of the run that decide what is stored.
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


class ActivationStore:
  """Rows of one split; make it with `create` or `open`."""

  def __init__(
    self, path: pathlib.Path, meta: StoreMeta, layout: Layout, writes: bool
  ):
    self.path = path
    self.meta = meta
    self.layout = layout
    self._writes = writes
    if writes:
      _cut(path / 'manifest.jsonl', _whole_lines(path / 'manifest.jsonl'))
    self._manifest: dict[int, dict[str, Any]] = {}
    self._ranges: list[tuple[int, int]] = []
    self._note(records.read_lines(path / 'manifest.jsonl'))
    if writes:
      for name in ('samples', 'rejects'):
        _cut(path / f'{name}.jsonl', self._end(name))
    self._arrays: dict[str, ts.TensorStore] = {}

  @classmethod
  def create(
    cls,
    path: str | os.PathLike,
    meta: StoreMeta,
    groups: int,
    group_rows: int,
    shard_rows: int,
    chunk_rows: int,
  ) -> 'ActivationStore':
    """A store open for writing; the one at `path` if it has this meta.

    Raises:
      ValueError: the store at `path` holds something else, or the sizes do not
        divide one another.
    """
    path = pathlib.Path(path)
    layout = Layout(groups, group_rows, shard_rows, chunk_rows)
    wanted = {
      'format_version': FORMAT_VERSION,
      **dataclasses.asdict(meta),
      **dataclasses.asdict(layout),
    }
    wanted = json.loads(json.dumps(wanted))
    if (path / 'meta.json').exists():
      found = _read_meta(path)
      if found != wanted:
        raise ValueError(
          f'{path} was captured with other settings ('
          f'{"; ".join(_differences(found, wanted))}): use another workdir, '
          'or delete that folder to capture again'
        )
    else:
      records.write_json(path / 'meta.json', wanted)
    return cls(path, meta, layout, writes=True)

  @classmethod
  def open(
    cls, path: str | os.PathLike, partial: bool = False
  ) -> 'ActivationStore':
    """A store open for reading.

    Raises:
      ValueError: there is none, its format is unknown, or, unless `partial`, it
        is not complete.
    """
    path = pathlib.Path(path)
    if not (path / 'meta.json').exists():
      raise ValueError(f'no activations at {path}: run `lmm-sae capture` first')
    found = _read_meta(path)
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

  def committed(self) -> set[int]:
    """The groups that are in the store."""
    return set(self._manifest)

  @property
  def complete(self) -> bool:
    """Whether every group is committed."""
    return len(self._manifest) == self.layout.groups

  @property
  def manifest(self) -> list[dict[str, Any]]:
    """A dict for each committed group, in order of rows.

    Keys: group, start and stop (rows), samples and rejects (counts),
    samples_end and rejects_end (bytes of those files), kinds (rows by kind).
    """
    return [self._manifest[group] for group in sorted(self._manifest)]

  @property
  def ranges(self) -> list[tuple[int, int]]:
    """(start, stop) of the committed rows, in order; empty groups left out."""
    return list(self._ranges)

  @property
  def num_rows(self) -> int:
    return sum(stop - start for start, stop in self._ranges)

  @functools.cached_property
  def _samples(self) -> dict[int, records.Sample]:
    lines = self._lines('samples')
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
    return self._lines('rejects')

  # Reading.

  def read(self, layer: int, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a layer, bfloat16 [N, D].

    Raises:
      ValueError: the layer was not captured, or a row is not committed.
    """
    if layer not in self.meta.layers:
      raise ValueError(
        f'layer {layer} is not in {self.path}, which holds {self.meta.layers}: '
        'set lmm.layers and capture again'
      )
    self._check(start, stop)
    return self._array(f'layer_{layer}')[start:stop].read().result()

  def tokens(
    self, start: int, stop: int, names: Sequence[str] = tuple(TOKENS)
  ) -> dict[str, np.ndarray]:
    """Token fields of rows [start, stop): {name: [N] or, for box, [N, 4]}."""
    self._check(start, stop)
    futures = {name: self._array(name)[start:stop].read() for name in names}
    return {name: future.result() for name, future in futures.items()}

  @functools.cached_property
  def vocab(self) -> list[str]:
    """The string of every token id."""
    return json.loads((self.path / 'vocab.json').read_text())

  def image(self, sample: int) -> Image.Image:
    """The sample's image as the subject saw it: RGB, upright.

    Raises:
      ValueError: it has none, or none was kept.
    """
    name = self.sample(sample).image
    if not name:
      raise ValueError(f'{self.path} keeps no image of sample {sample}')
    return images.load(self.path / name)  # an absolute name wins

  def regions(self, sample: int) -> np.ndarray:
    """The region id of every pixel, uint8 [H, W]; 0 is background.

    Raises:
      ValueError: the truth of that sample is not known.
    """
    truth = self.sample(sample).truth
    if truth is None or 'regions' not in truth:
      raise ValueError(f'{self.path} knows no regions of sample {sample}')
    with Image.open(self.path / truth['regions']) as image:
      return np.array(image)

  # Writing.

  def write_group(
    self,
    group: int,
    layers: Mapping[int, np.ndarray],
    tokens: Mapping[str, np.ndarray],
    samples: Iterable[records.Sample],
    rejects: Iterable[Mapping[str, Any]],
  ) -> None:
    """Writes and commits a group: arrays, then samples, then its manifest line.

    Args:
      group: 0 <= group < groups, not committed yet.
      layers: {layer: [N, D]} of all layers, N <= group_rows.
      tokens: every field of `TOKENS`; `sample` holds the samples' indices.
      samples: with `start` and `stop` counted from the group's FIRST row; the
        store makes them absolute.
      rejects: {source, reason}.
    """
    if not self._writes:
      raise ValueError(f'{self.path} is open for reading')
    if not 0 <= group < self.layout.groups or group in self._manifest:
      raise ValueError(f'group {group} of {self.path} is not open for writing')
    arrays = {f'layer_{layer}': layers[layer] for layer in self.meta.layers}
    arrays |= {name: tokens[name] for name in TOKENS}
    count = len(tokens['sample'])
    self._check_shapes(arrays, count)
    base = group * self.layout.group_rows
    self._write_rows(group, arrays, base, count)

    samples = [
      dataclasses.replace(
        sample, group=group, start=base + sample.start, stop=base + sample.stop
      )
      for sample in samples
    ]
    rejects = [{**reject, 'group': group} for reject in rejects]
    kinds = np.bincount(tokens['kind'], minlength=len(Kind))
    line = {
      'group': group,
      'start': base,
      'stop': base + count,
      'samples': len(samples),
      'rejects': len(rejects),
      'samples_end': self._append('samples', map(records.to_json, samples)),
      'rejects_end': self._append('rejects', rejects),
      'kinds': {
        kind.name.lower(): int(kinds[kind]) for kind in Kind if kinds[kind]
      },
    }
    self._append('manifest', [line])
    self._note([line])
    self.__dict__.pop('_samples', None)  # read again when asked for

  def _write_rows(self, group, arrays, base, count):
    with ts.Transaction() as transaction:  # each shard is written once, whole
      for name, rows in arrays.items():
        array = self._array(name)
        for key in grid.shard_keys(name, self.layout, group):
          del array.kvstore[key]  # what a killed run may have left
        if count:
          rows = rows.astype(array.dtype.numpy_dtype, copy=False)
          array.with_transaction(transaction)[base : base + count] = rows

  def _check_shapes(self, arrays, count):
    if count > self.layout.group_rows:
      raise ValueError(
        f'{count} rows do not fit a group of {self.layout.group_rows}'
      )
    for name, rows in arrays.items():
      _, columns = grid.field(name, self.meta.width)
      shape = (count, columns) if columns else (count,)
      if rows.shape != shape:
        raise ValueError(f'{name} has shape {rows.shape}, not {shape}')

  def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> int:
    """Appends JSON lines and returns where the file ends, in bytes."""
    with (self.path / f'{name}.jsonl').open('ab') as file:
      for line in lines:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        file.write(text.encode() + b'\n')
      file.flush()
      os.fsync(file.fileno())
      return file.tell()

  # Inside.

  def _end(self, name: str) -> int:
    return max(
      (line[f'{name}_end'] for line in self._manifest.values()), default=0
    )

  def _lines(self, name: str) -> list[dict[str, Any]]:
    path = self.path / f'{name}.jsonl'
    if not path.exists():
      return []
    data = path.read_bytes()[: self._end(name)]
    return [json.loads(line) for line in data.split(b'\n') if line]

  def _note(self, lines: Iterable[dict[str, Any]]) -> None:
    self._manifest |= {line['group']: line for line in lines}
    pairs = [(line['start'], line['stop']) for line in self.manifest]
    self._ranges = [(start, stop) for start, stop in pairs if stop > start]

  def _check(self, start: int, stop: int) -> None:
    at = bisect.bisect_right(self._ranges, (start, float('inf'))) - 1
    if at < 0 or not start <= stop <= self._ranges[at][1]:
      raise ValueError(
        f'rows [{start}, {stop}) of {self.path} are not inside one committed '
        'range: read within `ranges`'
      )

  def _array(self, name: str) -> ts.TensorStore:
    if name not in self._arrays:
      self._arrays[name] = grid.open_array(
        self.path, name, self.meta.width, self.layout, self._writes
      )
    return self._arrays[name]


def _read_meta(path: pathlib.Path) -> dict[str, Any]:
  found = json.loads((path / 'meta.json').read_text())
  version = found.get('format_version')
  if version != FORMAT_VERSION:
    raise ValueError(
      f'{path} has format_version {version}; this program reads '
      f'{FORMAT_VERSION}'
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


def _whole_lines(path: pathlib.Path) -> int:
  return path.read_bytes().rfind(b'\n') + 1 if path.exists() else 0


def _cut(path: pathlib.Path, size: int) -> None:
  """Cuts a file to `size` bytes, which must be there; makes an empty one."""
  path.touch()
  found = path.stat().st_size
  if found < size:
    raise ValueError(
      f'{path} has {found} bytes where its manifest counts {size}: the store '
      'is damaged; delete the folder and capture again'
    )
  if found > size:
    os.truncate(path, size)
