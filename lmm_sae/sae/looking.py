"""What a folder holds, without a config, a model or a read of its arrays.

    look = looking.look('runs/mine/sae/2/1500')
    look.facts       what there is to say, as JSON; see `FACTS`
    look.parameters  the arrays of the SAE by the names of `model.Params`

Checkpoints of ours and of others (orbax), exported SAEs and activation stores.
"""

import collections
import dataclasses
import datetime
import os
import pathlib
import re
from typing import Any

import numpy as np

from lmm_sae.core import grid, store_meta
from lmm_sae.core.places import Place
from lmm_sae.core.store import ActivationStore
from lmm_sae.sae import (
  checkpoint,
  foreign,
  layouts,
  orbax_files,
  pickles,
  said,
  stored,
  tensors,
)
from lmm_sae.sae import parameters as parameters_lib
from lmm_sae.sae.parameters import Parameter
from lmm_sae.sae.stored import Array
from lmm_sae.sae.tensors import Tensor

FORMAT_VERSION = 1  # of the facts

FACTS = """\
format_version  of this object; keys are added without a new one
kind            checkpoint, export, store, workdir
path, bytes     of what is described, on disk
writer          lmm_sae or other; `format`: the version of our format, or null
step, fvu       null where nothing says; `steps`: of the checkpoints beside it
settings        of the run (checkpoint), cfg.json (export), meta.json (store)
layout          of an export's tensors; `layouts`: {layout: bytes} of all here
sae             {layer, width, latents, k, activation, dead_after}, where said
metadata        whatever else other programs wrote as JSON, by item
position        where the rows go on: {pool, row} for each share of the data
processes       that wrote a checkpoint; `saved`: when, UTC
arrays          {name, item, shape, dtype, bytes, stored_bytes, chunks,
                sharding}; sharding is {mesh: {axis: devices}, spec: [axis,
                axes or null a dimension]}, {device}, {type}, or null
scalars         {name: value} of arrays without axes; values: of other leaves
groups, ...     of a store: groups, those committed, samples, rejects, rows,
                kinds {name: rows}; mixed; dtype of the rows; rounding, of an
                int8 store: {layer: FVU of its rows}, else null
parts, ...      of a workdir: see `stages.inspect.of_workdir`
warnings        what is odd, and yet no damage
stats, against  see `figures.of`, `differences.between`"""

LAYOUTS = {
  foreign.SPARSIFY: 'sparsify',
  foreign.SAELENS: 'saelens',
  foreign.LEARNING: 'dictionary_learning',
}
SCALARS = 200  # arrays without axes that are read


@dataclasses.dataclass(frozen=True)
class Look:
  """What was found.

  Attributes:
    path: of it.
    facts: see `FACTS`.
    arrays: every array, unread.
    parameters: those of the SAE, if it is one that is recognised.
    store: the activation store, if it is one.
  """

  path: pathlib.Path | Place
  facts: dict[str, Any]
  arrays: list[Array]
  parameters: dict[str, Parameter] = dataclasses.field(default_factory=dict)
  store: ActivationStore | None = None

  @property
  def idle_M(self) -> np.ndarray | None:
    """Rows since each latent fired, of a checkpoint that counts them."""
    found = [x for x in self.arrays if x.name.split('.')[-1] == 'idle_M']
    return found[0].read() if found else None

  @property
  def dead_after(self) -> int | None:
    """Rows without firing that make a latent dead."""
    after = said.sae(self.facts['settings'] or {}).get('dead_after')
    return after if isinstance(after, int) else None


def look(path: str | os.PathLike | Place) -> Look:
  """Looks at a checkpoint, the last of several, an export or a store.

  Raises:
    ValueError: there is nothing there, nothing that is known, or it is damaged,
      or of a format that this program does not read.
    OSError: it may not be read.
  """
  found = kind(path)
  if found == 'store':
    return of_store(Place.of(path))
  path = pathlib.Path(path).absolute()
  if found == 'checkpoint':
    return of_checkpoint(path)
  if found == 'checkpoints':
    return of_checkpoint(list(orbax_files.steps(path).values())[-1])
  if found == 'export':
    return of_export(path)
  raise ValueError(
    f'{path} holds several things, or none that is known: name one checkpoint '
    '(an orbax folder), SAE (cfg.json beside *.safetensors) or activation store'
  )


def kind(path: str | os.PathLike | Place) -> str:
  """checkpoint, checkpoints (a folder of them), export, store, or ''.

  Raises:
    ValueError: there is no such folder; OSError: it may not be read.
  """
  if re.match(r'\w+://', str(path)):
    if (Place.of(str(path)) / 'meta.json').exists():
      return 'store'
    raise ValueError(f'{path} holds no store; all else is in local folders')
  path = pathlib.Path(path).absolute()
  try:
    names = set(os.listdir(path))
  except FileNotFoundError as error:
    raise ValueError(f'{path} does not exist') from error
  except NotADirectoryError as error:
    raise ValueError(f'{path} is a file: name the folder it is in') from error
  if {'meta.json', *grid.TOKENS} <= names:
    return 'store'
  if orbax_files.TORN in path.name or orbax_files.holds(path):
    return 'checkpoint'
  if _layouts(path, below=False):
    return 'export'
  if orbax_files.steps(path):
    return 'checkpoints'
  return 'export' if _layouts(path) else ''


def is_workdir(path: str | os.PathLike) -> bool:
  """Whether a folder is one that stages write, not a thing in it.

  Raises:
    ValueError, OSError: see `kind`.
  """
  if kind(path):
    return False
  path = pathlib.Path(path)
  if any(path.glob('acts/*/meta.json')):
    return True
  if any(folder.name.isdigit() for folder in path.glob('sae/*')):
    return True
  file = path / 'config.json'  # models have one, too
  return file.is_file() and 'config' in stored.read_json(file)


def of_checkpoint(path: pathlib.Path) -> Look:
  """Looks at an orbax checkpoint, ours or another program's."""
  folder = orbax_files.read(path)
  note = folder.note
  custom = dict(note.get('custom_metadata') or {})
  version, settings = None, None
  names = {f'{x.item}.{x.name}' for x in folder.arrays}
  places = f'{checkpoint.DATA}.{checkpoint.PLACES}'
  ours = {'format_version', 'settings'} <= set(custom)
  if ours:
    version = custom.pop('format_version')
    checkpoint.check_version(path, version, checkpoint.FORMAT_VERSION)
    settings = custom.pop('settings')
    if not (
      isinstance(settings, dict) and isinstance(settings.get('sae'), dict)
    ):
      raise stored.damaged(path, 'its settings are none')
    _strict(folder)
  elif places in names:
    raise stored.damaged(path, 'it lacks its settings')
  metrics = [note.get('metrics'), folder.documents.get('metrics')]
  fvu = [x['fvu'] for x in metrics if isinstance(x, dict) and 'fvu' in x]
  scalars = [x for x in folder.arrays if not x.shape][:SCALARS]
  values = {_full(x): x.read().item() for x in scalars}
  position = [
    {'pool': pool, 'row': row}
    for x in folder.arrays
    if f'{x.item}.{x.name}' == places
    for pool, row in x.read().tolist()
  ]
  scale = values.get(f'{checkpoint.STATE}.scale', values.get('scale', 1.0))
  if not (ours and np.isfinite(scale) and scale > 0):
    scale = 1.0
  parameters = parameters_lib.found(folder.arrays, scale)
  siblings = orbax_files.steps(path.parent)
  numbers = [step for step, other in siblings.items() if other == path]
  facts = _facts('checkpoint', path) | {
    'writer': 'lmm_sae' if ours else 'other',
    'format': version,
    'step': numbers[0]
    if numbers
    else values.get('state.step', values.get('step')),
    'steps': list(siblings) if numbers else [],
    'fvu': said.number(*fvu[-1:]),
    'saved': _time(note.get('commit_timestamp_nsecs')),
    'processes': folder.processes,
    'settings': settings,
    'sae': said.sae(settings or {}),
    'metadata': ({'custom': custom} if custom else {}) | folder.documents,
    'position': position,
    'arrays': [x.facts() for x in folder.arrays],
    'scalars': values,
    'values': folder.values,
    'warnings': folder.warnings,
  }
  return Look(path, facts, folder.arrays, parameters)


def _strict(folder: orbax_files.Folder) -> None:
  """Refuses one of ours that lacks what ours have and others may lack."""
  lacks = {x.item for x in folder.arrays if x.sharding is None}
  if lacks:
    raise stored.damaged(folder.path, f'{min(lacks)}/_sharding is missing')
  if folder.processes is None:
    raise stored.damaged(folder.path, 'array_metadatas is missing')


def of_export(path: pathlib.Path) -> Look:
  """Looks at an SAE in a layout of another program; of both, at sparsify's."""
  found = _layouts(path)
  if len(found) > 1 and not {x.name for x in found} <= {'sparsify', 'saelens'}:
    names = ', '.join(folder.name for folder in found)
    raise ValueError(f'{path} holds several SAEs: name one of {names}')
  folder, files = next(iter(found.items()))
  name = files[0].name
  settings = folder / foreign.SETTINGS.get(name, 'cfg.json')
  cfg = tensors.read_json(settings, folder)
  version = cfg.get('format_version')
  if version is not None:
    checkpoint.check_version(folder, version, foreign.FORMAT_VERSION)
  arrays = [
    stored.of_tensor(key, tensor)
    for file in files
    for key, tensor in _tensors(file).items()
    if isinstance(tensor, Tensor)
  ]
  parameters = parameters_lib.found(arrays)
  facts = _facts('export', folder) | {
    'writer': 'other' if version is None else 'lmm_sae',
    'format': version,
    'layout': LAYOUTS.get(name, 'unknown'),
    'layouts': {
      LAYOUTS.get(files[0].name, folder.name): stored.disk(folder)
      for folder, files in found.items()
    },
    'step': cfg.get('step'),
    'fvu': said.number(said.measured(folder).get('fvu')),
    'settings': cfg,
    'sae': said.sae(cfg),
    'arrays': [x.facts() for x in arrays],
    'warnings': _contradictions(said.sae(cfg), parameters),
  }
  return Look(folder, facts, arrays, parameters)


def _tensors(file: pathlib.Path) -> dict[str, Any]:
  """What a file holds, its tensors unread; nothing in it is run."""
  find = pickles.find if file.suffix == '.pt' else tensors.find
  return find(file, file.parent)


def _layouts(path: pathlib.Path, below: bool = True) -> dict:
  """{folder: its tensor files} of the SAEs here, or one below."""
  for folders in (
    [path],
    [path / name for name in ('sparsify', 'saelens')],
    [x for x in sorted(path.iterdir()) if x.is_dir()] if below else [],
  ):
    found = {folder: _files(folder) for folder in folders}
    found = {folder: files for folder, files in found.items() if files}
    if found:
      return found
  return {}


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The tensor files of a folder with an SAE; [] where there is none."""
  if name := layouts.layout(folder):
    return [folder / name]
  return sorted(folder.glob('*.safetensors')) * (folder / 'cfg.json').is_file()


def _contradictions(claims, parameters) -> list[str]:
  """Where the settings say another shape than the tensors have."""
  if 'w_dec_MD' not in parameters:
    return ['its tensors are not those of an SAE that is known here']
  shape = dict(
    zip(('latents', 'width'), parameters['w_dec_MD'].shape, strict=True)
  )
  return [
    f'the settings say {key} {claims[key]}, the tensors have {found}'
    for key, found in shape.items()
    if claims.get(key, found) != found
  ]


def of_store(path: Place) -> Look:
  """Looks at an activation store, finished or not."""
  try:
    store = ActivationStore.open(path, partial=True)
    samples = len(store.samples())
    kinds = collections.Counter()
    for line in store.manifest:
      kinds.update({str(name): int(n) for name, n in line['kinds'].items()})
    rounding = None
    if store.meta.dtype == 'int8':
      rounding = {str(at): store.rounding(at) for at in store.meta.layers}
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    if 'format_version' in str(error):
      raise
    raise ValueError(f'the store {path} is damaged: {error}') from error
  meta, layout = store.meta, store.layout
  rows = layout.groups * layout.group_rows
  arrays = []
  for name, (dtype, columns) in store.arrays.fields.items():
    shape = (rows, columns) if columns else (rows,)
    chunks = (layout.chunk_rows, columns)[: len(shape)]
    size = _bytes(store, name)
    lazily = _lazily(path / name, dtype, columns, layout)
    arrays.append(Array(name, shape, dtype, size, lazily, '', chunks))
  facts = {
    'format_version': FORMAT_VERSION,
    'kind': 'store',
    'path': str(path),
    'bytes': _bytes(store),
    'writer': 'lmm_sae',
    'format': store_meta.FORMAT_VERSION,
    'settings': dataclasses.asdict(meta),
    'groups': layout.groups,
    'committed': len(store.committed()),
    'samples': samples,
    'rejects': len(store.rejects()),
    'rows': store.num_rows,
    'kinds': dict(kinds),
    'arrays': [x.facts() for x in arrays],
    'mixed': meta.mixed,
    'dtype': meta.dtype,
    'rounding': rounding,
    'warnings': [] if store.complete else ['it is not complete'],
  }
  return Look(path, facts, arrays, store=store)


def _lazily(place, dtype, columns, layout):
  return lambda: grid.open_array(place, dtype, columns, layout)


def _bytes(store: ActivationStore, name: str = '') -> int:
  """Bytes on disk of an array, or of all; in a bucket, of committed shards."""
  if store.path.local:
    return stored.disk(store.path / name if name else store.path)
  sizes = [line['bytes'] for line in store.manifest]
  names = [name] if name else [*store.arrays.fields]
  return sum(sum(each[name]) for each in sizes for name in names)


def _facts(what: str, path: pathlib.Path) -> dict[str, Any]:
  return {
    'format_version': FORMAT_VERSION,
    'kind': what,
    'path': str(path),
    'bytes': stored.disk(path),
  }


def _full(array: Array) -> str:
  return f'{array.item}.{array.name}' if array.item else array.name


def _time(nanoseconds: int | None) -> str | None:
  if not isinstance(nanoseconds, int) or not 0 < nanoseconds < 2**63:
    return None
  at = datetime.datetime.fromtimestamp(nanoseconds / 1e9, datetime.UTC)
  return at.isoformat(timespec='seconds')
