"""Where samples come from: LLaVA-format files, folders of images, the hub.

A source is a sequence. Reading a row gives an `Item`, or raises ValueError with
the reason: that row is rejected, and no other row moves. An OSError is no fault
of the row, but of a disk or a network: the run stops, and can be gone on with.

Every process opens its own: a source follows from its DataConfig, and its rows
are the same in each.

  source = sources.open_source(DataConfig(source='llava', path='data.json'))
  item = source[7]
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lmm_sae.core import hub_data
from lmm_sae.core.image_folder import ImageFolder
from lmm_sae.core.items import IMAGE as IMAGE
from lmm_sae.core.items import Item as Item
from lmm_sae.core.llava_file import LlavaFile
from lmm_sae.core.row_images import Loaded as Loaded

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


class Source(Protocol):
  """A sequence of items of which any may be unreadable.

  Attributes:
    blocks: the first rows of the runs of rows that are cheap to read together,
      ascending from 0; None: any order is as good.
    content: differs where the rows do, as far as can be told without reading
      them all, and not with where they lie: a store that is half made of other
      data must not be gone on with.
  """

  @property
  def blocks(self) -> Sequence[int] | None: ...

  @property
  def content(self) -> str: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Item:
    """The item.

    Raises:
      ValueError: why this row is none.
      OSError: it cannot be reached now.
    """

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
    source = hub_data.open_data(
      config.path,
      config.subset,
      config.split,
      config.stream,
      config.image_root,
    )
  else:
    raise ValueError(f'data.source {config.source} is read from no file')
  if not len(source):
    raise ValueError(f'data.path {config.path} holds no samples')
  return source


def split(source: Source, config: DataConfig) -> dict[str, list[int]]:
  """Which rows of a source are in train, a and b: seeded, and disjoint.

  Rows are shuffled in whole blocks, each ascending. With `data.limit` rows come
  from as few blocks as hold so many. A block longer than 1/64 of the data is
  cut, so that few blocks mix well, too. Each row taken is in one split.

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
  longest = max(1, count // PIECES)
  pieces = [
    np.arange(at, min(at + longest, stop))
    for start, stop in taken
    for at in range(start, stop, longest)
  ]
  mixed = [pieces[at] for at in rng.permutation(len(pieces))]
  return np.concatenate([np.empty(0, np.int64), *mixed])
