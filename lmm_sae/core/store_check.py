"""What is wrong with an activation store, and how it is made whole again.

A store is damaged by groups: what is wrong with one does not touch the others,
and a group that is dropped is one that capture makes again.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes  # noqa: F401 - makes numpy know bfloat16 by name
import numpy as np

from lmm_sae.core import grid, places, progress, records, store_meta
from lmm_sae.core.places import Place
from lmm_sae.core.store_arrays import Arrays, DamagedShard
from lmm_sae.core.store_commits import NAME, Commits
from lmm_sae.core.tokens import Kind

AT_ONCE = 16  # files that are looked at together
PIECE_BYTES = 2**25  # of an array that are read at a time
ORIGIN = ('sample', 'position', 'kind')


@dataclasses.dataclass(frozen=True)
class Damage:
  """One thing that is wrong.

  Attributes:
    file: where.
    text: what.
    group: that is damaged; None: no group of its own.
  """

  file: Place
  text: str
  group: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
  """What was found at a place.

  Attributes:
    groups, committed: how many there are to be, and are.
    rows: of the committed groups; bytes: of their shards.
    damage: what is wrong; notes: what is odd, and harmless.
  """

  groups: int
  committed: int
  rows: int
  bytes: int
  damage: tuple[Damage, ...]
  notes: tuple[str, ...]

  @property
  def damaged(self) -> list[int]:
    """The groups that are damaged."""
    return sorted({d.group for d in self.damage if d.group is not None})


def check(path: Place, checksums: bool) -> Report:
  """Looks through the store at a place.

  Args:
    path: of the store.
    checksums: read every chunk, and what rows say of themselves; else the
      presence and size of files.

  Raises:
    ValueError: its meta.json cannot be read, is of another format, or the place
      cannot be looked at.
  """
  return _Check(path).run(checksums)


def drop(path: Place, report: Report) -> None:
  """Uncommits exactly the damaged groups, then deletes their shards.

  Metadata of arrays that is damaged is written anew, and a damaged vocabulary
  deleted, which capture writes again. It may be killed, and done again after
  another `check`.
  """
  found = _Check(path)
  found.commits.drop(report.damaged)
  for group in report.damaged:
    found.arrays.delete(group)
  bad = {damage.file for damage in report.damage}
  arrays = [path / name / 'zarr.json' for name in found.arrays.fields]
  places.delete_all(bad.intersection([*arrays, path / 'vocab.json']))
  found.arrays.make()


class _Check:
  """One examination of one store."""

  def __init__(self, path: Place):
    self.path = path
    self.meta, self.layout = store_meta.read(path)
    fields = grid.fields(self.meta.layers, self.meta.width, self.meta.dtype)
    self.arrays = Arrays(path, fields, self.layout)
    self.torn: list[tuple[Place, str]] = []
    self.commits = Commits(path, self.torn)
    self.lines = self.commits.lines()

  def run(self, checksums: bool) -> Report:
    found = list(self._records())
    readable = []
    for name, field in self.arrays.fields.items():
      try:
        grid.open_array(self.path / name, *field, self.layout)
        readable.append(name)
      except ValueError as error:
        found.append(Damage(self.path / name / 'zarr.json', str(error)))
    found += self._sizes()
    if checksums:
      whole = {damage.file for damage in found}
      found += self._contents(readable, whole)
    found += [*self._vocab(), *self._images()]
    rows = sum(line['stop'] - line['start'] for line in self.lines.values())
    sizes = sum(sum(map(sum, x['bytes'].values())) for x in self.lines.values())
    return Report(
      groups=self.layout.groups,
      committed=len(self.lines),
      rows=rows,
      bytes=sizes,
      damage=tuple(found),
      notes=tuple(self._notes()),
    )

  # What is committed.

  def _records(self) -> Iterator[Damage]:
    """What manifest lines, samples and rejects say against one another."""
    by_group = {
      'samples': _by_group(self.commits.samples()),
      'rejects': _by_group(self.commits.rejects()),
    }
    for place, text in dict(self.torn).items():
      group = int(place.name[:-5]) if NAME.fullmatch(place.name) else None
      yield Damage(place, text, group)
    self.samples: dict[int, list[records.Sample]] = {}
    seen: dict[int, int] = {}
    for group, line in self.lines.items():
      for name, lines in by_group.items():
        count = len(lines.get(group, ()))
        if count != line[name]:
          yield Damage(
            self.path / f'{name}.jsonl',
            f'{count} {name} of group {group}, its manifest counts '
            f'{line[name]}',
            group,
          )
      file = self.path / 'samples.jsonl'
      try:
        self.samples[group] = [
          records.from_json(records.Sample, each)
          for each in by_group['samples'].get(group, ())
        ]
      except TypeError as error:
        yield Damage(file, f'a line is no sample: {error}', group)
        continue
      for sample in self.samples[group]:
        other = seen.setdefault(sample.sample, group)
        if other != group:
          text = f'sample {sample.sample} is in group {other}, too'
          yield Damage(file, text, group)
      yield from self._spans(group, line)

  def _spans(self, group: int, line: dict[str, Any]) -> Iterator[Damage]:
    """Whether a group's rows are where its line and its samples say."""
    layout, count = self.layout, line['stop'] - line['start']
    file = self.path / 'manifest.jsonl'
    fits = 0 <= group < layout.groups and 0 <= count <= layout.group_rows
    if not fits or line['start'] != group * layout.group_rows:
      text = f'rows {line["start"]} to {line["stop"]} are not those of a group'
      yield Damage(file, text, group)
    shards = len(layout.spans(group, max(count, 0)))
    if any(
      len(line['bytes'].get(name, ())) != shards for name in self.arrays.fields
    ):
      yield Damage(file, f'the shards of group {group} are not counted', group)
    if sum(line['kinds'].values()) != count:
      yield Damage(file, f'the kinds of group {group} do not add up', group)
    if not self.meta.mixed:
      at = line['start']
      for sample in self.samples[group]:
        if sample.start != at or sample.stop < at:
          text = (
            f'sample {sample.sample} begins at row {sample.start}, not {at}'
          )
          yield Damage(self.path / 'samples.jsonl', text, group)
          return
        at = sample.stop
      if at != line['stop']:
        text = f'samples of group {group} end at row {at}, not {line["stop"]}'
        yield Damage(self.path / 'samples.jsonl', text, group)

  # Files.

  def _shards(self) -> Iterator[tuple[int, str, int, int, int, int]]:
    """(group, array, shard, rows from and to, bytes) of each there must be."""
    for group, line in self.lines.items():
      spans = self.layout.spans(group, line['stop'] - line['start'])
      for at, (shard, start, stop) in enumerate(spans):
        for name in self.arrays.fields:
          sizes = line['bytes'].get(name, ())
          if at < len(sizes):
            base = line['start']
            yield group, name, shard, base + start, base + stop, sizes[at]

  def _sizes(self) -> Iterator[Damage]:
    """Shards that are missing, or have another size."""
    todo = list(self._shards())
    files = [self.arrays.file(name, shard) for _, name, shard, *_ in todo]
    with ThreadPoolExecutor(AT_ONCE) as pool:
      held = pool.map(Place.holds, files, [size for *_, size in todo])
      for (group, *_, size), file, good in zip(
        todo,
        files,
        progress.track(held, len(todo), self._what('files')),
        strict=True,
      ):
        if not good:
          text = f'not the {size} bytes it had' if file.exists() else 'missing'
          yield Damage(file, text, group)

  def _contents(
    self, readable: Iterable[str], known: set[Place]
  ) -> Iterator[Damage]:
    """Shards whose chunks cannot be read; rows that contradict the samples."""
    readable = set(readable)
    todo = [
      each
      for each in self._shards()
      if each[1] in readable and self.arrays.file(*each[1:3]) not in known
    ]
    origin: dict[int, dict[str, list[np.ndarray]]] = {}
    for group, name, shard, start, stop, _ in progress.track(
      todo, what=self._what('shards read through')
    ):
      parts, text = self._read(name, start, stop)
      if text:
        yield Damage(self.arrays.file(name, shard), text, group)
      elif name in ORIGIN:
        origin.setdefault(group, {}).setdefault(name, []).append(
          np.concatenate(parts)
        )
    for group, found in origin.items():
      shards = len(self.layout.spans(group, self._count(group)))
      if [len(found.get(name, ())) for name in ORIGIN] == [shards] * 3:
        fields = {name: np.concatenate(found[name]) for name in ORIGIN}
        yield from self._rows(group, **fields)

  def _read(
    self, name: str, start: int, stop: int
  ) -> tuple[list[np.ndarray], str]:
    """The rows of one shard, of `ORIGIN` alone, and what is wrong with it."""
    dtype, columns = self.arrays.fields[name]
    row = max(columns, 1) * np.dtype(dtype).itemsize
    chunk = self.layout.chunk_rows
    step = max(PIECE_BYTES // (row * chunk), 1) * chunk
    parts = []
    for at in range(start, stop, step):
      try:
        (rows,) = self.arrays.begin([name], at, min(at + step, stop))()
      except DamagedShard as error:
        return [], error.why
      if name in ORIGIN:
        parts.append(rows)
    return parts, ''

  def _rows(
    self,
    group: int,
    sample: np.ndarray,
    position: np.ndarray,
    kind: np.ndarray,
  ) -> Iterator[Damage]:
    """Whether rows are of the group's samples, each token at most once."""
    file = self.arrays.file('sample', self.layout.spans(group, 1)[0][0])
    samples = {each.sample: each for each in self.samples.get(group, ())}
    foreign = set(np.unique(sample).tolist()) - samples.keys()
    if foreign:
      text = f'rows of sample {min(foreign)}, which group {group} does not have'
      yield Damage(file, text, group)
      return
    pairs = np.unique(np.stack([sample, position]), axis=1)
    if pairs.shape[1] != len(sample):
      yield Damage(file, 'a token of a sample stands there twice', group)
    longest = np.array([samples[at].tokens for at in sample.tolist()])
    if (position < 0).any() or (longest * (position >= longest)).any():
      yield Damage(file, 'a position is none of its sample', group)
    counts = np.bincount(kind, minlength=len(Kind))
    said = self.lines[group]['kinds']
    if len(counts) > len(Kind) or any(
      counts[each] != said.get(each.name.lower(), 0) for each in Kind
    ):
      yield Damage(file, 'the kinds of its rows are others', group)
    if not self.meta.mixed:
      base = self.lines[group]['start']
      wanted = np.repeat(
        np.array([*samples], np.int64),
        [each.stop - each.start for each in samples.values()],
      )
      in_order = (
        np.array_equal(sample, wanted)
        and ((np.diff(position) > 0) | (np.diff(sample) != 0)).all()
      )
      if not in_order:
        text = f'rows from {base} on are not in the order of their samples'
        yield Damage(file, text, group)

  def _vocab(self) -> Iterator[Damage]:
    """Whether the strings of the tokens are there, as rows are."""
    file = self.path / 'vocab.json'
    data = file.read_if_there()
    if data is None:
      if self.lines:
        yield Damage(file, 'missing')
      return
    try:
      vocab = json.loads(data)
    except ValueError as error:
      yield Damage(file, f'damaged ({error})')
      return
    if not isinstance(vocab, list) or not all(
      isinstance(word, str) for word in vocab
    ):
      yield Damage(file, 'no list of strings')

  def _images(self) -> Iterator[Damage]:
    """Pictures and region maps that the store keeps, and that are gone."""
    kept = None
    for group, samples in self.samples.items():
      for sample in samples:
        names = [sample.image, *(picture.file for picture in sample.more)]
        if sample.truth:
          names.append(sample.truth.get('regions', ''))
        for name in names:
          if not name or name.startswith('/') or '://' in name:
            continue
          if kept is None:
            kept = {f'images/{x}' for x in (self.path / 'images').list()}
          if name not in kept:
            yield Damage(self.path / name, 'missing', group)

  def _notes(self) -> Iterator[str]:
    """What is odd and harmless."""
    there = {
      int(name[:-5])
      for name in (self.path / 'groups').list()
      if NAME.fullmatch(name)
    }
    sealed = self.commits.sealed() & there
    if sealed:
      yield (
        f'groups/ holds {len(sealed)} commits that are sealed; the next seal '
        'removes them'
      )
    mine = {shard for _, name, shard, *_ in self._shards() if name == 'sample'}
    shards = {
      int(name.split('/')[1])
      for name in (self.path / 'sample').list()
      if name.startswith('c/')
    }
    if shards - mine:
      yield (
        f'{len(shards - mine)} shards of no committed group; capture writes '
        'over them'
      )

  def _what(self, what: str) -> str:
    return f'doctor: {self.path.name}: {what}'

  def _count(self, group: int) -> int:
    return self.lines[group]['stop'] - self.lines[group]['start']


def _by_group(lines: Iterable[dict[str, Any]]) -> dict[int, list]:
  found: dict[int, list] = {}
  for line in lines:
    found.setdefault(line['group'], []).append(line)
  return found
