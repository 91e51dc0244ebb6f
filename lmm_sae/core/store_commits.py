"""What is committed to an activation store, and how it becomes so.

A group is committed by one object, written last and in one step:

  groups/<group>.json   {manifest: its line, samples: [...], rejects: [...]}

so that many processes may commit to one store, in any order. `seal` gathers
them, in order of group, into

  samples.jsonl, rejects.jsonl, manifest.jsonl   (in this order)

and removes groups/. A reader takes the union; what stands in both is the same.
A line of samples.jsonl or rejects.jsonl whose group manifest.jsonl does not
list does not exist.
"""

import contextlib
import heapq
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lmm_sae.core import places
from lmm_sae.core.places import Place

Line = dict[str, Any]
MEND = (
  'run `lmm-sae doctor --workdir=... --config.doctor.drop=True`, then capture '
  'again'
)
NAME = re.compile(r'\d+\.json')
KEYS = {  # what must be there
  'manifest': {
    'group': int,
    'start': int,
    'stop': int,
    'samples': int,
    'rejects': int,
    'kinds': dict,
    'bytes': dict,
  },
  'samples': {'group': int, 'sample': int},
  'rejects': {'group': int, 'source': str, 'reason': str},
  'commit': {'manifest': dict, 'samples': list, 'rejects': list},
}
FILES = ('samples', 'rejects', 'manifest')


class _SealedError(Exception):
  """Another process has sealed what was to be sealed."""


class Commits:
  """The committed groups of the store at a place.

  Args:
    path: of the store.
    torn: where to note what is damaged, as (file, why), and go on without it;
      None: it is an error.
  """

  def __init__(self, path: Place, torn: list[tuple[Place, str]] | None = None):
    self._path = path
    self._torn = torn
    self._sealed: dict[int, Line] = {}  # by manifest.jsonl
    self._loose: dict[int, Line | None] = {}  # by groups/; None: not read yet
    self.refresh()

  def refresh(self) -> None:
    """Looks again at what is committed.

    What a sealer removes from groups/ stands in manifest.jsonl before.
    """
    names = (self._path / 'groups').list()
    found = [int(name[:-5]) for name in names if NAME.fullmatch(name)]
    self._read_sealed()
    self._loose = {
      group: self._loose.get(group)
      for group in found
      if group not in self._sealed
    }

  def groups(self) -> set[int]:
    """The committed groups."""
    return self._sealed.keys() | self._loose.keys()

  def sealed(self) -> set[int]:
    """Those that manifest.jsonl lists."""
    return set(self._sealed)

  def lines(self) -> dict[int, Line]:
    """The manifest line of each committed group, in order."""
    unread = [group for group, line in self._loose.items() if line is None]
    for group, commit in self._commits(unread):
      self._loose[group] = commit['manifest']
    found = {**self._loose, **self._sealed}
    return {at: line for at, line in sorted(found.items()) if line is not None}

  def samples(self) -> list[Line]:
    return self._gather('samples')

  def rejects(self) -> list[Line]:
    return self._gather('rejects')

  def add(
    self, line: Line, samples: Iterable[Line], rejects: Iterable[Line]
  ) -> None:
    """Commits a group; one that was sealed meanwhile stays as it is."""
    group = line['group']
    self._read_sealed()
    if group not in self._sealed:
      parts = {
        'manifest': _dumps(line),
        'samples': _array(samples),
        'rejects': _array(rejects),
      }
      text = ',\n'.join(f'"{name}": {part}' for name, part in parts.items())
      self._object(group).write(f'{{{text}}}\n'.encode())
      self._loose[group] = line

  def seal(self) -> None:
    """Gathers all commits into the three files, and removes groups/.

    Of samples and rejects, those of a few groups are in memory at a time.
    """
    self.refresh()
    if self._loose:
      with contextlib.suppress(_SealedError):  # another process did the rest
        self._write('samples', self._in_order('samples'))
        self._write('rejects', self._in_order('rejects'))
        self._write('manifest', self.lines().values())
      self.refresh()
    (self._path / 'groups').delete_below()

  def drop(self, groups: Iterable[int]) -> None:
    """Uncommits groups, and leaves out what is torn; rows are left to others.

    What uncommits comes first, so that a drop may be killed and done again.
    """
    gone = set(groups)
    lines = {at: line for at, line in self.lines().items() if at not in gone}
    sealed = self._sealed.keys() & gone
    samples, rejects = self.samples(), self.rejects()
    places.delete_all(self._object(group) for group in sorted(gone))
    sealed_files = {self._path / f'{name}.jsonl' for name in FILES}
    if sealed or sealed_files & {place for place, _ in self._torn or ()}:
      kept = {at: line for at, line in lines.items() if at in self._sealed}
      self._write('manifest', kept.values())
      for name, found in (('rejects', rejects), ('samples', samples)):
        self._write(name, [line for line in found if line['group'] in kept])
    self.refresh()

  # Inside.

  def _object(self, group: int) -> Place:
    return self._path / 'groups' / f'{group:06d}.json'

  def _read_sealed(self) -> None:
    self._sealed = {line['group']: line for line in self._read('manifest')}

  def _read(self, name: str) -> list[Line]:
    """The lines of one of the three files, [] where there is none."""
    place = self._path / f'{name}.jsonl'
    data = place.read_if_there() or b''
    texts = (text for text in data.split(b'\n') if text)
    return self._parsed(texts, place, name)

  def _parsed(
    self, texts: Iterable[bytes], place: Place, kind: str
  ) -> list[Line]:
    found = []
    for text in texts:
      try:
        line = parse(text, place)
        if not _fits(line, kind):
          raise ValueError(f'{place} is damaged, a line is none: {MEND}')
        found.append(line)
      except ValueError as error:
        if self._torn is None:
          raise
        self._torn.append((place, str(error.__cause__ or 'a line is none')))
    return found

  def _commits(self, groups: list[int]) -> Iterable[tuple[int, Line]]:
    """The commit objects of groups; those that were sealed meanwhile leave."""
    data = places.read_all(self._object(group) for group in groups)
    for group, text in zip(groups, data, strict=True):
      if text is not None:
        for commit in self._parsed([text], self._object(group), 'commit'):
          yield group, commit
        continue
      self._read_sealed()
      if group not in self._sealed:
        raise ValueError(
          f'{self._object(group)} was removed by another process: run the '
          'same again'
        )
      self._loose.pop(group, None)

  def _gather(self, name: str) -> list[Line]:
    """The samples or the rejects of all committed groups, by group."""
    found = [
      line
      for _, commit in self._commits(sorted(self._loose))
      for line in commit[name]
    ]  # first, since what was sealed meanwhile is in the file by now
    found += [
      line for line in self._read(name) if line['group'] in self._sealed
    ]
    return sorted(found, key=_group)

  def _in_order(self, name: str) -> Iterator[Line]:
    """The samples or the rejects of all committed groups, to be sealed.

    Raises:
      _SealedError: at the end, if another process has sealed meanwhile.
    """
    wanted = sorted(self._loose)
    loose = (
      line for _, commit in self._commits(wanted) for line in commit[name]
    )
    sealed = [
      line for line in self._read(name) if line['group'] in self._sealed
    ]
    yield from heapq.merge(sorted(sealed, key=_group), loose, key=_group)
    if len(self._loose) < len(wanted):
      raise _SealedError

  def _write(self, name: str, lines: Iterable[Line]) -> None:
    """Writes one of the three files."""
    texts = (f'{_dumps(line)}\n'.encode() for line in lines)
    (self._path / f'{name}.jsonl').write(texts)


def _fits(line: Line, kind: str) -> bool:
  """Whether a line has the keys of its kind, of their types."""
  if not all(isinstance(line.get(k), of) for k, of in KEYS[kind].items()):
    return False
  if kind == 'manifest':
    counts = [line['kinds'].values()]
    for sizes in line['bytes'].values():
      if not isinstance(sizes, list):
        return False
      counts.append(sizes)
    return all(isinstance(count, int) for some in counts for count in some)
  if kind == 'commit':
    return _fits(line['manifest'], 'manifest') and all(
      isinstance(each, dict) and _fits(each, name)
      for name in ('samples', 'rejects')
      for each in line[name]
    )
  return True


def parse(
  text: bytes, place: Place, keys: Iterable[str] = (), mend: str = MEND
) -> Line:
  """A JSON object that has these keys; `mend` says what to do else.

  Raises:
    ValueError: it is none; the message names the file.
  """
  try:
    found = json.loads(text)
    if not isinstance(found, dict) or not set(keys) <= found.keys():
      raise ValueError(f'no object with {", ".join(keys)}')
  except ValueError as error:
    raise ValueError(f'{place} is damaged, {error}: {mend}') from error
  return found


def _group(line: Line) -> int:
  return line['group']


def _dumps(line: Any) -> str:
  return json.dumps(line, ensure_ascii=False, allow_nan=False)


def _array(lines: Iterable[Line]) -> str:
  texts = [_dumps(line) for line in lines]
  return '[\n' + ',\n'.join(texts) + '\n]' if texts else '[]'
