"""Where samples come from: LLaVA-format files, folders of images, the hub.

A source is a sequence. Reading a row gives an `Item`, or raises ValueError with
the reason: that row is rejected, and no other row moves.

  source = sources.open_source(DataConfig(source='llava', path='data.json'))
  item = source[7]
"""

import dataclasses
import io
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lmm_sae.core import images
from lmm_sae.core.records import Turn

IMAGE = '<image>'  # an image's place in a turn
ROLES = {
  'human': 'user',
  'user': 'user',
  'gpt': 'assistant',
  'assistant': 'assistant',
}
SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
SPLITS = ('train', 'a', 'b')
SOURCES = ('scenes', 'llava', 'images', 'hub')
TEMPLATES = ('chat', 'raw')
PIECES = 64  # of which no block is longer than one, so that all stay mixed


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The `data` section of a config: see experiments/base.py.

  Raises:
    ValueError: a field has no meaning, or none with this source.
  """

  source: str = 'scenes'
  path: str = ''
  image_root: str = ''
  subset: str = ''
  split: str = 'train'
  stream: bool = False
  template: str = 'chat'
  limit: int = 0
  seed: int = 0
  heldout: float = 0.25
  train: int = 2400
  half: int = 500

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      wanted = (int, float) if field.type is float else field.type
      is_flag = isinstance(value, bool) and field.type is not bool
      if not isinstance(value, wanted) or is_flag:
        raise ValueError(
          f'data.{field.name} is {value!r}; it must be of type '
          f'{field.type.__name__}'
        )
    for name, allowed in (('source', SOURCES), ('template', TEMPLATES)):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'data.{name} {getattr(self, name)!r} is none of {", ".join(allowed)}'
        )
    for name, least in (('limit', 0), ('seed', 0), ('train', 1), ('half', 1)):
      if getattr(self, name) < least:
        raise ValueError(
          f'data.{name} is {getattr(self, name)}; it must be at least {least}'
        )
    if not 0 < self.heldout < 1:
      raise ValueError(
        f'data.heldout is {self.heldout}; it must lie between 0 and 1'
      )
    if self.stream and self.source != 'hub':
      raise ValueError(
        f'data.stream is for data.source=hub; {self.source} is not streamed'
      )
    if self.subset and self.source != 'hub':
      raise ValueError(
        f'data.subset {self.subset!r} is for data.source=hub; {self.source} '
        'has no subsets'
      )
    if self.image_root and self.source not in ('llava', 'hub'):
      raise ValueError(
        f'data.image_root {self.image_root!r} is for data.source=llava or hub; '
        f'{self.source} has no paths in its rows'
      )


@dataclasses.dataclass(frozen=True)
class Loaded:
  """An image, RGB and upright, and its file; '' where no file holds it."""

  image: Image.Image
  path: str = ''


@dataclasses.dataclass(frozen=True)
class Item:
  """One sample before it is captured.

  Attributes:
    source: id in the data, for people.
    images: in the order in which the conversation names them.
    conversation: (role, text) turns, role user or assistant; `<image>` may
      stand in a text. (): the image alone, without chat template.
    turns: questions that may be asked of this image.
    regions_HW: uint8 region ids of the only image's pixels, 0 is background.
    concepts: {region id as str: concepts that hold of it}.
  """

  source: str
  images: tuple[Loaded, ...]
  conversation: tuple[tuple[str, str], ...]
  turns: tuple[Turn, ...] = ()
  regions_HW: np.ndarray | None = None
  concepts: dict[str, list[str]] | None = None


class Source(Protocol):
  """A sequence of items of which any may be unreadable.

  Attributes:
    blocks: the first rows of the runs of rows that are cheap to read together,
      ascending from 0; None: any order is as good.
  """

  @property
  def blocks(self) -> Sequence[int] | None: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Item:
    """The item; ValueError says why it cannot be had."""

  def name(self, index: int) -> str:
    """What to call that row where it cannot be read."""


@dataclasses.dataclass(frozen=True)
class Split:
  """The rows of a source that one split takes; rows[i] is its sample i."""

  name: str
  source: Source
  rows: Sequence[int]


def open_source(config: DataConfig) -> Source:
  """The source that a config names; scenes are not one of them.

  Raises:
    ValueError: there is no such source, or it holds nothing.
  """
  if config.source == 'llava':
    source = LlavaFile(config.path, config.image_root)
  elif config.source == 'images':
    source = ImageFolder(config.path)
  elif config.source == 'hub':
    source = HubDataset(config.path)
  else:
    raise ValueError(f'data.source {config.source} is read from no file')
  if not len(source):
    raise ValueError(f'data.path {config.path} holds no samples')
  return source


def split(source: Source, config: DataConfig) -> dict[str, list[int]]:
  """Which rows of a source are in train, a and b: seeded, and disjoint.

  Rows are shuffled in whole blocks, each ascending. With `data.limit` rows come
  from as few blocks as hold so many. A block longer than 1/64 of what is taken
  is cut, so that few blocks mix well, too. Each row taken is in one split.

  Raises:
    ValueError: there are too few for a row in each.
  """
  order = _order(len(source), source.blocks, config)
  if len(order) < len(SPLITS):
    raise ValueError(
      f'{len(order)} samples: at least 3 are needed, one for each of train, a '
      'and b; raise data.limit or give more data'
    )
  held = round(len(order) * config.heldout)
  half = min(max(1, held // 2), (len(order) - 1) // 2)
  parts = np.split(order, [len(order) - 2 * half, len(order) - half])
  return {name: part.tolist() for name, part in zip(SPLITS, parts, strict=True)}


def _order(
  count: int, blocks: Sequence[int] | None, config: DataConfig
) -> np.ndarray:
  """The rows that are taken, mixed; int64 [min(count, limit)]."""
  rng = np.random.default_rng(config.seed)
  limit = min(count, config.limit or count)
  if blocks is None:
    return rng.permutation(count)[:limit]
  starts_B = np.asarray(blocks, np.int64)
  stops_B = np.append(starts_B[1:], count)
  taken, left = [], limit
  for at in rng.permutation(len(starts_B)):
    start, stop = int(starts_B[at]), int(min(stops_B[at], starts_B[at] + left))
    taken.append((start, stop))
    left -= stop - start
    if not left:
      break
  longest = max(1, limit // PIECES)
  pieces = [
    np.arange(at, min(at + longest, stop))
    for start, stop in taken
    for at in range(start, stop, longest)
  ]
  mixed = [pieces[at] for at in rng.permutation(len(pieces))]
  return np.concatenate([np.empty(0, np.int64), *mixed])


class LlavaFile:
  """A JSON list, or JSON lines, in LLaVA's format.

  Each row is {id, conversations: [{from: human | gpt, value}], image}; image,
  relative to `image_root` (or to the file), may be missing.
  """

  blocks = None

  def __init__(self, path: str, image_root: str = ''):
    file = pathlib.Path(path).expanduser().absolute()
    if not path or not file.is_file():
      raise ValueError(
        f'data.path {path!r} is no file: give a JSON or JSONL file in LLaVA '
        'format'
      )
    root = pathlib.Path(image_root).expanduser() if image_root else file.parent
    if not root.is_dir():
      raise ValueError(f'data.image_root {image_root!r} is no folder')
    self._root = root.absolute()
    data = file.read_bytes()
    self._rows: Sequence[Any]  # dicts, or lines still to be parsed
    if data.lstrip()[:1] == b'[':
      self._rows = _whole(file, data)
    else:
      self._rows = [line for line in data.split(b'\n') if line.strip()]

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Item:
    row = self._rows[index]
    if isinstance(row, bytes):
      try:
        row = json.loads(row)
      except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'not JSON: {error}') from error
    return item(row, str(index), self._root)

  def name(self, index: int) -> str:
    return f'row {index}'


class ImageFolder:
  """Every image below a folder, in order of name, each with a bare prompt."""

  blocks = None

  def __init__(self, path: str):
    root = pathlib.Path(path).expanduser().absolute()
    if not path or not root.is_dir():
      raise ValueError(f'data.path {path!r} is no folder of images')
    self._root = root
    self._files = sorted(
      file
      for file in root.rglob('*')
      if file.suffix.lower() in SUFFIXES and file.is_file()
    )

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Item:
    file = self._files[index]
    loaded = Loaded(images.load(file), str(file))
    return Item(self.name(index), (loaded,), ())

  def name(self, index: int) -> str:
    return str(self._files[index].relative_to(self._root))


class HubDataset:
  """The train split of a data set of the hub, or of a local parquet folder.

  A data set without a `conversations` column is taken as images with a bare
  prompt.
  """

  blocks = None

  def __init__(self, path: str):
    try:
      import datasets
    except ImportError as error:
      raise ValueError(
        'data.source=hub needs the package `datasets`: '
        "pip install 'lmm_sae[data]'"
      ) from error
    try:
      rows = datasets.load_dataset(path, split='train')
    except (OSError, ValueError) as error:  # what `datasets` raises
      raise ValueError(f'data.path {path!r} cannot be had: {error}') from error
    self._bare = 'conversations' not in rows.column_names
    if 'image' in rows.column_names:  # bytes: a broken one stops no other
      rows = rows.cast_column('image', datasets.Image(decode=False))
    self._rows = rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Item:
    row = self._rows[index]
    if self._bare:
      loaded = _images(row.get('image'), pathlib.Path())
      if not loaded:
        raise ValueError('it has neither conversations nor an image')
      return Item(str(row.get('id', index)), loaded, ())
    return item(row, str(index), pathlib.Path())

  def name(self, index: int) -> str:
    return f'row {index}'


def item(row: Any, name: str, root: pathlib.Path) -> Item:
  """The item of one row in LLaVA's format.

  Raises:
    ValueError: why it is none.
  """
  if not isinstance(row, Mapping):
    raise ValueError(f'a row must be an object, not {type(row).__name__}')
  conversation = _conversation(row.get('conversations'))
  loaded = _images(row.get('image'), root)
  places = sum(text.count(IMAGE) for _, text in conversation)
  if places > len(loaded):
    raise ValueError(f'{places} {IMAGE} for {len(loaded)} images')
  pairs = itertools.pairwise(conversation)
  turns = tuple(
    Turn('', asked.replace(IMAGE, '').strip(), answered.strip())
    for (asker, asked), (answerer, answered) in pairs
    if (asker, answerer) == ('user', 'assistant')
  )
  return Item(str(row.get('id', name)), loaded, conversation, turns)


def _conversation(turns: Any) -> tuple[tuple[str, str], ...]:
  if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
    raise ValueError('it has no conversations')
  found = []
  for turn in turns:
    if not isinstance(turn, Mapping) or not isinstance(turn.get('value'), str):
      raise ValueError('a turn of its conversations has no value')
    if turn.get('from') not in ROLES:
      raise ValueError(
        f'role {turn.get("from")!r} is none of {", ".join(ROLES)}'
      )
    found.append((ROLES[turn['from']], turn['value']))
  return tuple(found)


def _images(value: Any, root: pathlib.Path) -> tuple[Loaded, ...]:
  """The images of an `image` field: a path, bytes, or a list of one."""
  if isinstance(value, list):
    if len(value) > 1:
      raise ValueError(f'it has {len(value)} images; one can be captured')
    value = value[0] if value else None
  if value is None or value == '':
    return ()
  if isinstance(value, str):
    return (Loaded(images.load(root / value), str(root / value)),)
  if isinstance(value, Mapping) and value.get('bytes'):
    return (Loaded(images.load(io.BytesIO(value['bytes']))),)
  if isinstance(value, Mapping) and value.get('path'):
    return (Loaded(images.load(value['path']), str(value['path'])),)
  raise ValueError(f'its image is a {type(value).__name__}, not a path')


def _whole(file: pathlib.Path, data: bytes) -> list[Any]:
  try:
    return json.loads(data)
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f'data.path {file} is not JSON: {error}') from error
