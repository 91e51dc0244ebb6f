"""A small store, in the ways it may come about."""

import dataclasses
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np

from lmm_sae.core import places, records
from lmm_sae.core.places import Place
from lmm_sae.core.store import ActivationStore, StoreMeta

META = StoreMeta(
  split='train',
  model='toy',
  fingerprint='f00',
  layers=(1, 4),
  layer_paths={'1': 'model.layers.1', '4': 'model.layers.4'},
  width=6,
  grid=(2, 3),
  image_backend='pil',
  config={'data': {'seed': 3}},
)
SIZES = {'groups': 5, 'group_rows': 24, 'shard_rows': 12, 'chunk_rows': 4}


def create(path, meta=META):
  """As capture opens one for writing."""
  made = ActivationStore.create(path, meta, **SIZES)
  if not (made.path / 'vocab.json').exists():
    places.write_json(made.path / 'vocab.json', ['a', 'é'])
  return made


def group(index, lengths=(7, 6), rejects=0, seed=0):
  """Arguments of write_group for samples of the given lengths."""
  rng = np.random.default_rng([seed, index])
  count = sum(lengths)
  layers = {
    layer: rng.normal(size=(count, 6)).astype(ml_dtypes.bfloat16)
    for layer in (1, 4)
  }
  ids = [10 * index + at for at in range(len(lengths))]
  tokens = {
    'sample': np.repeat(ids, lengths).astype(np.int32),
    'position': np.concatenate([np.arange(n) for n in lengths] or [[]]),
    'token': rng.integers(0, 500, count),
    'kind': rng.integers(0, 7, count),
    'row': rng.integers(-1, 9, count),
    'col': rng.integers(-1, 9, count),
    'image': rng.integers(-1, 3, count),
    'box': rng.integers(0, 128, (count, 4)),
  }
  stops = np.cumsum(lengths)
  samples = [
    records.Sample(
      sample=i,
      group=-1,
      source=f'row {i}',
      image='',
      width=0,
      height=0,
      prompt='é <image>',
      turns=(records.Turn('colour', 'which?', 'red', 'red'),),
      start=int(stop - n),
      stop=int(stop),
    )
    for i, n, stop in zip(ids, lengths, stops, strict=True)
  ]
  bad = [{'source': f'bad {i}', 'reason': 'torn'} for i in range(rejects)]
  return {
    'group': index,
    'layers': layers,
    'tokens': tokens,
    'samples': samples,
    'rejects': bad,
  }


GROUPS = [
  group(0),
  group(1, (5,), rejects=2),
  group(2, ()),
  group(3, (24,)),
  group(4, (1, 2, 3), rejects=1),
]


def digest(path):
  """{relative path: sha256} of every file of a store, hidden ones too."""
  place = Place.of(path)
  if place.local:
    files = [x for x in pathlib.Path(place).rglob('*') if x.is_file()]
    read = {str(x.relative_to(place)): x.read_bytes() for x in files}
  else:
    read = {name: (place / name).read() for name in place.list()}
  return {name: hashlib.sha256(x).hexdigest() for name, x in read.items()}


def finish(path, meta=META):
  """What a process does that finds the store as another left it."""
  made = create(path, meta)
  for each in GROUPS:
    made.write_group(**each)
  made.seal()
  return made


def mixed(each):
  """A group as a mixed store takes it."""
  samples = [dataclasses.replace(s, start=-1, stop=-1) for s in each['samples']]
  return {**each, 'samples': samples}


def python(script: str, *words: str) -> subprocess.Popen:
  """A process that runs a script, which may import this module."""
  root = pathlib.Path(__file__).parents[2]
  return subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(script), *words],
    cwd=root,
    env={**os.environ, 'PYTHONPATH': str(root)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def killed(path, calls: int) -> None:
  """Writes the store in a process that is killed before its n-th change."""
  script = f"""
    import os, signal, sys
    from lmm_sae.core import places
    from tests.core import store_cases
    left = {calls}
    def counted(method):
      def inner(*args):
        global left
        left -= 1
        if left == 0:
          os.kill(os.getpid(), signal.SIGKILL)
        return method(*args)
      return inner
    for name in ('write', 'delete_below'):
      setattr(places.Place, name, counted(getattr(places.Place, name)))
    store_cases.finish(sys.argv[1])
  """
  process = python(script, str(path))
  _, errors = process.communicate()
  assert process.returncode == -signal.SIGKILL, errors
