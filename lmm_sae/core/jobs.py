"""What a capture is told, checked once; it travels to every process.

What decides the rows of a store (`Job.settings`) is written into it and
compared when the command runs again. How they are made, by how many processes,
with Ray or in an array of jobs, may be another each time.
"""

import dataclasses
import json
import math
import os
import re
from typing import Any

from lmm_sae.core.choice import Choice
from lmm_sae.core.sources import DataConfig
from lmm_sae.core.workdir import Workdir

Task = tuple[str, int]  # (split, group)

STORES = ('bfloat16', 'int8')
WORKERS = ('local', 'ray')
DEPTH = 2  # groups in one process: one is written or read while one is run


@dataclasses.dataclass(frozen=True)
class SubjectConfig:
  """The `lmm` section of a config: see experiments/base.py."""

  path: str
  layers: tuple[int, ...]
  device: str
  dtype: str
  threads: int

  def __post_init__(self):
    object.__setattr__(self, 'layers', tuple(self.layers))
    if any(type(layer) is not int for layer in self.layers):
      raise ValueError(
        f'lmm.layers is {self.layers}: give whole numbers, such as (8, 16)'
      )
    if not self.layers or len(set(self.layers)) != len(self.layers):
      raise ValueError(
        f'lmm.layers is {self.layers}: name each layer once, and at least one'
      )
    if self.threads < 0:
      raise ValueError(f'lmm.threads is {self.threads}; it must be at least 0')


@dataclasses.dataclass(frozen=True)
class CaptureConfig:
  """The `capture` section of a config: see experiments/base.py."""

  batch: int
  group: int
  max_tokens: int
  shard_rows: int
  chunk_rows: int
  mix: bool
  keep: tuple[str, ...]
  keep_halves: tuple[str, ...]
  store: str
  workers: str
  processes: int
  share: str
  ray_address: str
  ray_gpus: float
  ray_cpus: float

  def __post_init__(self):
    for name in ('keep', 'keep_halves'):
      entries = getattr(self, name)
      entries = (entries,) if isinstance(entries, str) else tuple(entries)
      object.__setattr__(self, name, entries)
      Choice.parse(entries, f'capture.{name}')
    for name in ('batch', 'group', 'max_tokens', 'shard_rows', 'chunk_rows'):
      _at_least(name, getattr(self, name), 1)
    for name in ('processes', 'ray_gpus', 'ray_cpus'):
      _at_least(name, getattr(self, name), 0)
    for name, allowed in (('store', STORES), ('workers', WORKERS)):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'capture.{name} {getattr(self, name)!r} is none of '
          f'{", ".join(allowed)}'
        )
    if self.ray_cpus == self.ray_gpus == 0:
      raise ValueError(
        'capture.ray_cpus and capture.ray_gpus are both 0: a Ray worker must '
        'take something'
      )
    _ = self.part  # ValueError if there is none

  @property
  def part(self) -> tuple[int, int]:
    """(i, n): of each split this command makes the groups i, i + n, ..."""
    if not self.share:
      return 0, 1
    found = re.fullmatch(r'(\d+)/(\d+)', self.share)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not i < n:
      raise ValueError(
        f'capture.share {self.share!r} is no i/n with 0 <= i < n, such as 0/16'
      )
    return i, n

  def choice(self, split: str) -> Choice:
    """Which tokens of a split are stored."""
    if split == 'train':
      return Choice.parse(self.keep, 'capture.keep')
    return Choice.parse(self.keep_halves, 'capture.keep_halves')

  def mixed(self, split: str) -> bool:
    """Whether the rows of a group of that split are mixed."""
    return self.mix and split == 'train'

  @property
  def group_rows(self) -> int:
    """Rows that a group may need, in whole shards."""
    shards = math.ceil(self.group * self.max_tokens / self.shard_rows)
    return shards * self.shard_rows

  def buffer_bytes(self, width: int, layers: int) -> int:
    """Of the rows of the groups in one process, were every sample as long as
    may be: two bytes a number, the group that is made and the one written."""
    return DEPTH * self.group * self.max_tokens * width * layers * 2


# Of the `capture` section, what does not decide the rows.
FREE = (
  *('shard_rows', 'chunk_rows'),  # the store compares them itself
  *('workers', 'processes', 'share', 'ray_address', 'ray_gpus', 'ray_cpus'),
)


@dataclasses.dataclass(frozen=True)
class Job:
  """All that a process needs to make any group."""

  lmm: SubjectConfig
  data: DataConfig
  capture: CaptureConfig
  workdir: Workdir

  @property
  def settings(self) -> dict[str, Any]:
    """The fields that decide what is stored, as JSON has them.

    The batch is one of them: padding to the longest sample of another batch
    changes the last bits of sums.
    """
    fields = {
      'lmm': {'dtype': self.lmm.dtype},
      'data': dataclasses.asdict(self.data),
      'capture': {
        name: value
        for name, value in dataclasses.asdict(self.capture).items()
        if name not in FREE
      },
    }
    return json.loads(json.dumps(fields))

  def groups(self, samples: int) -> int:
    """How many groups so many samples of a split are."""
    return math.ceil(samples / self.capture.group)

  def tasks(self, split: str, samples: int) -> list[Task]:
    """The groups of a split that this command is to make."""
    i, n = self.capture.part
    return [(split, group) for group in range(i, self.groups(samples), n)]


def memory() -> int:
  """Bytes of memory of this machine."""
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def _at_least(name: str, value: float, bound: int) -> None:
  if isinstance(value, bool) or not bound <= value < math.inf:
    raise ValueError(f'capture.{name} is {value}; it must be at least {bound}')
