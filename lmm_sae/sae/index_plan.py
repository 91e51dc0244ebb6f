"""Plans the parts of an index: whose they are, and what fits in memory."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Sequence

import jax
from absl import logging

from lmm_sae.core import index_build, records
from lmm_sae.core.index import FORMAT_VERSION
from lmm_sae.core.places import Place
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import dictionaries, exports, share
from lmm_sae.sae import mesh as mesh_lib

PART_SAMPLES = 256  # of a part: so much is lost when work is broken off
CHUNK_BYTES = 300  # a firing, while a chunk is added
COPIES = 3  # of what a part holds, while it is sorted
ENCODE_BYTES = 16  # a row and latent, while rows are encoded on a CPU
ENCODE_ROWS = 4096  # at a time at most, as `exports.Sae` does
MB = 1 << 20


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  """The section `index` of the config; its fields are explained there."""

  splits: tuple[str, ...]
  rows: int
  exemplars: int
  text_exemplars: int
  context: int
  threshold: float
  always_on: float
  spread: int = 10
  seed: int = 0
  memory_mb: int = 2048
  processes: int = 0
  share: str = ''
  dictionaries: tuple[str, ...] = ()
  latent: int = -1
  sample: int = -1

  def __post_init__(self):
    if self.rows < 1:
      raise ValueError(f'index.rows is {self.rows}; it must be at least 1')
    if not 0 < self.always_on <= 1:
      raise ValueError(
        f'index.always_on is {self.always_on}; it is a share: above 0, up to 1'
      )
    if self.memory_mb < 1 or self.processes < 0:
      raise ValueError(
        f'index.memory_mb is {self.memory_mb} and index.processes '
        f'{self.processes}; they must be at least 1 and 0'
      )
    unknown = [d for d in self.dictionaries if d not in records.DICTIONARIES]
    if unknown:
      raise ValueError(
        f'index.dictionaries holds {unknown[0]!r}; there are '
        f'{", ".join(records.DICTIONARIES)}'
      )
    self.turn()

  def turn(self) -> tuple[int, int]:
    """(i, n): this command makes parts i, i + n, ...

    Raises:
      ValueError: `share` is no i/n with 0 <= i < n.
    """
    if not self.share:
      return 0, 1
    found = re.fullmatch(r'(\d+)/(\d+)', self.share)
    if not found or int(found[1]) >= int(found[2]):
      raise ValueError(
        f'index.share is {self.share!r}; of n commands they are 0/n to '
        'n-1/n, as 0/2 and 1/2'
      )
    return int(found[1]), int(found[2])

  def settings(self) -> dict:
    """What decides the index, whoever makes it and in whatever memory."""
    names = ('exemplars', 'text_exemplars', 'context', 'threshold',
             'always_on', 'spread', 'seed')  # fmt: skip
    return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Job:
  """One index to build; it travels to other processes.

  Attributes:
    path: of the index; acts: of the split's store.
    dictionary: '' is the SAE; seed: of an untrained one.
  """

  path: pathlib.Path
  acts: Place
  workdir: Workdir
  layer: int
  dictionary: str
  opts: IndexConfig
  seed: int = 0

  def sae(self) -> exports.Sae:
    """The SAE, its rows shared by all devices of this process."""
    devices = jax.local_devices()
    mesh = mesh_lib.make(0, found=devices) if len(devices) > 1 else None
    return dictionaries.load(
      self.workdir, self.layer, self.dictionary, self.seed, mesh
    )

  def part(self, at: int) -> pathlib.Path:
    return self.path / 'parts' / f'{at:08d}'

  def shape(self, store: ActivationStore, latents: int) -> index_build.Shape:
    return index_build.Shape(
      latents=latents,
      grid=store.meta.grid,
      exemplars=self.opts.exemplars,
      texts=self.opts.text_exemplars,
      context=self.opts.context,
      threshold=self.opts.threshold,
      spread=self.opts.spread,
      seed=self.opts.seed,
    )


def source(store: ActivationStore, opts: IndexConfig, sae: exports.Sae) -> str:
  """What an index is made of, as a short text; equal text, equal index."""
  rest = hashlib.blake2b(digest_size=6)
  meta = records.to_json(store.meta) | {
    'samples': len(store.samples()),
    'rows': store.num_rows,
    'index': opts.settings() | {'format': FORMAT_VERSION},
  }
  rest.update(json.dumps(meta, sort_keys=True).encode())
  return f'sae {share.firing(sae)}, store and settings {rest.hexdigest()}'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What all who make parts of one index keep to.

  The same rows are encoded together whoever does it: the last bit of a sum may
  depend on that.

  Attributes:
    begins: at which of the samples each part begins.
    rows: added to a part at a time, about; encoded: at a time.
  """

  source: str
  begins: tuple[int, ...]
  rows: int
  encoded: int


def draft(
  made_of: str,
  spans: Sequence[tuple[int, int]],
  latents: int,
  k: int,
  opts: IndexConfig,
) -> Plan:
  """A plan that fits in memory: a quarter for a chunk, as much to encode it.

  Raises:
    ValueError: the largest sample does not fit.
  """
  free = _free(latents, opts.memory_mb) // 4
  rows = min(opts.rows, free // (k * CHUNK_BYTES))
  least = max(stop - start for start, stop in spans)
  if free // (k * CHUNK_BYTES) < least or free < latents * ENCODE_BYTES:
    needs = 4 * max(least * k * CHUNK_BYTES, latents * ENCODE_BYTES)
    needs += latents * index_build.LATENT_BYTES
    raise ValueError(
      f'index.memory_mb is {opts.memory_mb}, but a sample of {least} tokens '
      f'with {k} of {latents} latents each needs {needs // MB + 1}: set it to '
      'that at least'
    )
  encoded = ENCODE_ROWS
  if jax.default_backend() == 'cpu':  # elsewhere it is the device's memory
    fit = free // (latents * ENCODE_BYTES)
    encoded = min(encoded, 1 << (fit.bit_length() - 1))
  begins = tuple(range(0, len(spans), PART_SAMPLES))
  return Plan(made_of, begins, rows, encoded)


def _free(latents: int, memory_mb: int) -> int:
  return max(memory_mb * MB - latents * index_build.LATENT_BYTES, 0)


def held(latents: int, memory_mb: int) -> int:
  """Bytes that a part may hold before it writes them: half of the memory."""
  return _free(latents, memory_mb) // 2 // COPIES


def agree(job: Job, own: Plan) -> Plan:
  """The plan of whoever came first; one's own if no one did.

  Raises:
    ValueError: parts of something else stand there.
  """
  note = job.path / 'parts' / 'plan.json'
  if not note.exists():
    mine = note.with_name(f'plan.{os.getpid()}.json')
    records.write_json(mine, records.to_json(own))
    try:
      os.link(mine, note)  # unlike a renamed one it replaces none
    except FileExistsError:
      logging.info('index: another command has planned %s', job.path)
    mine.unlink()
  found = json.loads(note.read_text())
  found = Plan(**found | {'begins': tuple(found['begins'])})
  if found.source != own.source:
    raise ValueError(
      f'{job.path} was made of other activations, another SAE or other '
      f'settings ({found.source}, now {own.source}): delete that folder to '
      'make it again'
    )
  if found.rows > own.rows or found.encoded > own.encoded:
    logging.warning(
      'index: %s was planned with more memory than index.memory_mb=%d: delete '
      'its folder parts to keep within that',
      job.path,
      job.opts.memory_mb,
    )
  return found


def chunks(
  spans: Sequence[tuple[int, int]], rows: int, edges: Collection[int] = ()
) -> Iterator[tuple[int, int]]:
  """(start, stop) of runs of whole, adjoining samples, about `rows` long.

  None goes over an edge, where another group of the store begins.
  """
  start = stop = spans[0][0]
  for first, last in spans:
    full = stop > start and last - start > rows
    if first != stop or full or first in edges:
      if stop > start:
        yield start, stop
      start = first
    stop = last
  if stop > start:
    yield start, stop
