"""What one sample is, and how a row of a data set becomes one.

A row is any of

  {conversations: [{from, value}], image}       LLaVA's
  {messages: [{role, content}], image}          chats; content a text or parts
  {text, image}                                 a text that no template wraps

`image` and `images` hold a path, {bytes} or {path}, or a list of such. A row
that is none of these is a ValueError with the reason, and nothing else.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmm_sae.core.records import Turn
from lmm_sae.core.row_images import Loaded, kind_of, load

IMAGE = '<image>'  # an image's place in a turn
ROLES = {
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
  'system': 'system',
}
COLUMNS = ('id', 'conversations', 'messages', 'text', 'image', 'images')
MAX_CHARS = 1_000_000  # of a conversation, before anything is tokenised
MAX_NAME = 1000  # characters kept of an id


@dataclasses.dataclass(frozen=True)
class Item:
  """One sample before it is captured.

  Attributes:
    source: id in the data, for people.
    images: in the order in which the conversation names them.
    conversation: (role, text) turns, role user, assistant or system; `<image>`
      stands in the texts, once for each image. (): the images alone, without
      chat template.
    turns: questions that may be asked of these images.
    regions_HW: uint8 region ids of the only image's pixels, 0 is background.
    concepts: {region id as str: concepts that hold of it}.
    raw: the one turn is a text that no chat template wraps, whatever
      `data.template` says.
  """

  source: str
  images: tuple[Loaded, ...]
  conversation: tuple[tuple[str, str], ...]
  turns: tuple[Turn, ...] = ()
  regions_HW: np.ndarray | None = None
  concepts: dict[str, list[str]] | None = None
  raw: bool = False


def item(row: Any, name: str, root: pathlib.Path | None) -> Item:
  """The item of one row.

  Args:
    row: as JSON or Arrow give it.
    name: what it is called where it has no id.
    root: folder that paths are relative to and must stay in; None: the data
      name no files.

  Raises:
    ValueError: why it is none.
  """
  if not isinstance(row, Mapping):
    raise ValueError(f'a row must be an object, not {kind_of(row)}')
  conversation, values, raw = _conversation(row, _images(row))
  conversation = _placed(conversation, len(values))
  return Item(
    source=identity(row, name),
    images=load(values, root),
    conversation=conversation,
    turns=() if raw else _turns(conversation),
    raw=raw,
  )


def bare(row: Mapping[str, Any], name: str, root: pathlib.Path | None) -> Item:
  """The item of a row that has images and no words.

  Raises:
    ValueError: it has no image, or one cannot be read.
  """
  values = _images(row)
  if not values:
    raise ValueError('it has neither conversations nor an image')
  return Item(identity(row, name), load(values, root), ())


def identity(row: Mapping[str, Any], name: str) -> str:
  """The row's id, for people; `name` where it has none that can be shown."""
  value = row.get('id')
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    return name
  shown = str(value)[:MAX_NAME]
  return shown.encode('utf-8', 'backslashreplace').decode() or name


def _images(row: Mapping[str, Any]) -> list[Any]:
  """The values of a row's `image` or `images`, still to be loaded."""
  found = {}
  for name in ('image', 'images'):
    value = row.get(name)
    values = value if isinstance(value, list | tuple) else [value]
    if values in ([None], ['']):
      continue
    if values:
      found[name] = list(values)
  if len(found) > 1:
    raise ValueError('it has both image and images: one of them must be empty')
  return next(iter(found.values()), [])


def _conversation(
  row: Mapping[str, Any], values: list[Any]
) -> tuple[list[tuple[str, str]], list[Any], bool]:
  """(turns, the values of their images in order, whether they are raw)."""
  turns, raw = row.get('conversations'), False
  if turns is not None:
    found = [_turn(turn, 'from', 'value') for turn in _listed(turns)]
  elif row.get('messages') is not None:
    parts = _Parts(values)
    found = [
      _turn(turn, 'role', 'content', parts) for turn in _listed(row['messages'])
    ]
    values = parts.finished()
  elif row.get('text') is not None:
    found, raw = [('user', _text(row['text'], 'its text'))], True
  else:
    raise ValueError('it has no conversations, messages or text')
  _check(found)
  return found, values, raw


def _listed(turns: Any) -> list[Any]:
  """The turns, each an object; a table of columns is turned on its side."""
  if isinstance(turns, Mapping) and turns:
    columns = list(turns.values())
    if not all(isinstance(column, list) for column in columns):
      raise ValueError('it has no conversations: they are no list')
    if len({len(column) for column in columns}) != 1:
      raise ValueError('the columns of its conversations differ in length')
    turns = [
      dict(zip(turns, cells, strict=True))
      for cells in zip(*columns, strict=True)
    ]
  if not isinstance(turns, list | tuple) or not turns:
    raise ValueError('it has no conversations: they are empty, or no list')
  return list(turns)


def _turn(
  turn: Any, who: str, what: str, parts: '_Parts | None' = None
) -> tuple[str, str]:
  if not isinstance(turn, Mapping):
    raise ValueError(
      f'a turn of its conversations is {kind_of(turn)}, no object'
    )
  role, value = turn.get(who), turn.get(what)
  if not isinstance(role, str) or role not in ROLES:
    raise ValueError(f'role {ascii(role)[:80]} is none of {", ".join(ROLES)}')
  if parts is not None and isinstance(value, list | tuple):
    return ROLES[role], parts.text(value)
  return ROLES[role], _text(value, f'a turn of role {role}')


def _text(value: Any, what: str) -> str:
  if not isinstance(value, str):
    raise ValueError(f'{what} has no value: it is {kind_of(value)}, no text')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{what} is no Unicode text: {error.reason}') from error
  return value


def _check(turns: Sequence[tuple[str, str]]) -> None:
  """Refuses a conversation that no template could take."""
  if sum(len(text) for _, text in turns) > MAX_CHARS:
    raise ValueError(f'its text is longer than {MAX_CHARS} characters')
  for at, (role, text) in enumerate(turns):
    if not text.strip():
      raise ValueError(
        f'turn {at} of its conversation, of the {role}, is empty'
      )
  speakers = [role for role, _ in turns if role != 'system']
  if speakers[:1] != ['user']:
    first = speakers[0] if speakers else 'nobody'
    raise ValueError(f'{first} speaks first in its conversation, not the user')


def _placed(
  turns: list[tuple[str, str]], count: int
) -> tuple[tuple[str, str], ...]:
  """The turns, with a place for each image in front of the first question."""
  places = sum(text.count(IMAGE) for _, text in turns)
  if places > count or 0 < places < count:
    raise ValueError(f'{places} {IMAGE} for {count} images')
  if count and not places:
    at = [role for role, _ in turns].index('user')
    turns = [*turns]
    turns[at] = ('user', f'{IMAGE}\n' * count + turns[at][1])
  return tuple(turns)


def _turns(conversation: Sequence[tuple[str, str]]) -> tuple[Turn, ...]:
  """The questions that have words, each with the answer that follows it."""
  pairs = (
    (asked.replace(IMAGE, '').strip(), answered.strip())
    for (asker, asked), (answerer, answered) in itertools.pairwise(conversation)
    if (asker, answerer) == ('user', 'assistant')
  )
  return tuple(
    Turn('', question, answer) for question, answer in pairs if question
  )


class _Parts:
  """The parts of messages, and the images that they stand for, in order.

  A part {type: image} has its own picture, or the row's picture `index`, or the
  row's next one.
  """

  def __init__(self, row_images: list[Any]):
    self._row = row_images
    self._next = 0
    self._named: set[int] = set()
    self._values: list[Any] = []

  def text(self, parts: Sequence[Any]) -> str:
    """The text of a turn's parts, `<image>` for each image."""
    found = []
    for part in parts:
      if isinstance(part, str):
        found.append(_text(part, 'a part'))
        continue
      kind = part.get('type') if isinstance(part, Mapping) else None
      if kind == 'text':
        found.append(_text(part.get('text'), 'a part of type text'))
      elif kind in ('image', 'image_url'):
        self._values.append(self._image(part))
        found.append(f'{IMAGE}\n')
      else:
        raise ValueError(
          f'a part of type {ascii(kind)[:80]} is neither text nor image'
        )
    return ''.join(found).removesuffix('\n')

  def finished(self) -> list[Any]:
    """The images in the order of their places."""
    if not self._values:
      return self._row  # none is named: `_placed` finds their places
    left = len(self._row) - len(self._named)
    if left:
      raise ValueError(f'{left} of its {len(self._row)} images are not named')
    return self._values

  def _image(self, part: Mapping[str, Any]) -> Any:
    own = [
      part[key]
      for key in ('image', 'image_url', 'url', 'path', 'bytes')
      if part.get(key) is not None
    ]
    if own:
      value = own[0]
      if isinstance(value, Mapping) and value.get('url') is not None:
        return value['url']
      return {'bytes': value} if isinstance(value, bytes) else value
    index = part.get('index')
    if isinstance(index, bool) or not isinstance(index, int | None):
      raise ValueError(f'index {ascii(index)[:80]} of a part is no number')
    at = self._next if index is None else index
    if not 0 <= at < len(self._row):
      raise ValueError(
        f'a part names image {at} of the {len(self._row)} images of its row'
      )
    self._next = at + 1
    self._named.add(at)
    return self._row[at]
