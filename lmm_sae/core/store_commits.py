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

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lmm_sae.core import places
from lmm_sae.core.places import Place

Line = dict[str, Any]
NAME = re.compile(r'\d+\.json')
FILES = ('samples', 'rejects', 'manifest')  # in the order they are sealed


class Commits:
  """The committed groups of the store at a place."""

  def __init__(self, path: Place):
    self._path = path
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

  def lines(self) -> dict[int, Line]:
    """The manifest line of each committed group, in order."""
    unread = [group for group, line in self._loose.items() if line is None]
    for group, commit in self._commits(unread):
      self._loose[group] = commit['manifest']
    return dict(sorted({**self._loose, **self._sealed}.items()))

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
    """Gathers all commits into the three files, and removes groups/."""
    self.refresh()
    if self._loose:
      self.lines()  # a group that another sealer took is in `_sealed` now
    if self._loose:
      self._write(self.lines(), self.samples(), self.rejects())
      self.refresh()
    (self._path / 'groups').delete_below()

  def drop(self, groups: Iterable[int]) -> None:
    """Uncommits groups; their rows are left to who asks."""
    gone = set(groups)
    lines = {at: line for at, line in self.lines().items() if at not in gone}
    sealed = self._sealed.keys() & gone
    samples, rejects = self.samples(), self.rejects()
    places.delete_all(self._object(group) for group in sorted(gone))
    if sealed:
      kept = {at: lines[at] for at in self._sealed if at not in gone}
      self._write(
        kept,
        [line for line in samples if line['group'] in kept],
        [line for line in rejects if line['group'] in kept],
        FILES[::-1],
      )
    self.refresh()

  # Inside.

  def _object(self, group: int) -> Place:
    return self._path / 'groups' / f'{group:06d}.json'

  def _read_sealed(self) -> None:
    self._sealed = {
      line['group']: line for line in read_lines(self._path / 'manifest.jsonl')
    }

  def _commits(self, groups: list[int]) -> Iterable[tuple[int, Line]]:
    """The commit objects of groups; those that were sealed meanwhile leave."""
    data = places.read_all(self._object(group) for group in groups)
    for group, text in zip(groups, data, strict=True):
      if text is not None:
        yield group, parse(text, self._object(group))
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
      line
      for line in read_lines(self._path / f'{name}.jsonl')
      if line['group'] in self._sealed
    ]
    return sorted(found, key=lambda line: line['group'])

  def _write(
    self,
    lines: Mapping[int, Line],
    samples: Iterable[Line],
    rejects: Iterable[Line],
    order: tuple[str, ...] = FILES,
  ) -> None:
    ready = {
      'manifest': [lines[group] for group in sorted(lines)],
      'samples': samples,
      'rejects': rejects,
    }
    for name in order:
      text = ''.join(f'{_dumps(line)}\n' for line in ready[name])
      (self._path / f'{name}.jsonl').write(text.encode())


def read_lines(place: Place) -> list[Line]:
  """The objects of a JSON-lines file, [] where there is none.

  Raises:
    ValueError: a line is no JSON.
  """
  data = place.read_if_there() or b''
  return [parse(line, place) for line in data.split(b'\n') if line]


def parse(text: bytes, place: Place) -> Line:
  """A JSON object.

  Raises:
    ValueError: it is none; the message names the file.
  """
  try:
    return json.loads(text)
  except ValueError as error:
    raise ValueError(
      f'{place} is damaged, {error}: run `lmm-sae doctor --workdir=... '
      '--config.doctor.drop=True`, then capture again'
    ) from error


def _dumps(line: Any) -> str:
  return json.dumps(line, ensure_ascii=False, allow_nan=False)


def _array(lines: Iterable[Line]) -> str:
  texts = [_dumps(line) for line in lines]
  return '[\n' + ',\n'.join(texts) + '\n]' if texts else '[]'
