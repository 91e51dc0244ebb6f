"""inspect: shows what a workdir holds.

Prints every store, checkpoint and export with shapes, dtypes, sizes and the
settings that it was made with, and the result files with their lines.
"""

import json
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint, exports
from lmm_sae.sae.checkpoint import Checkpoints


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Prints the tree."""
  del config  # what is shown is what stands on disk
  print('\n'.join(show(workdir)))


def show(workdir: Workdir) -> Iterator[str]:
  """The lines that are printed.

  Raises:
    ValueError: there is no such folder.
  """
  if not workdir.root.is_dir():
    raise ValueError(f'{workdir.root} does not exist: name a workdir')
  yield f'{workdir.root}  {size(workdir.root)}'
  if workdir.acts_root.is_dir():
    for path in sorted(workdir.acts_root.iterdir()):
      if (path / 'meta.json').exists():
        yield from _store(path)
  folders = (workdir.root / 'sae').glob('*')
  for path in sorted(folders, key=lambda path: path.name):
    yield from _sae(path)
  for path in sorted((workdir.root / 'index').glob('*/*')):
    yield f'index/{path.parent.name}/{path.name}  {size(path)}'
  for path in sorted(workdir.root.glob('*.json*')):
    lines = path.read_bytes().count(b'\n')
    what = f'{lines} lines, ' if path.suffix == '.jsonl' else ''
    yield f'{path.name}  {what}{size(path)}'


def _store(path: pathlib.Path) -> Iterator[str]:
  store = ActivationStore.open(path, partial=True)
  meta = store.meta
  yield f'acts/{path.name}  {size(path)}'
  yield f'  model {meta.model}, layers {meta.layers}, width {meta.width}'
  groups = f'{len(store.committed())} of {store.layout.groups} groups'
  yield f'  {groups}, {len(store.samples())} samples, {store.num_rows} rows'


def _sae(path: pathlib.Path) -> Iterator[str]:
  steps = checkpoint.steps(path)
  for step in steps:
    yield f'sae/{path.name}/{step}  {size(path / str(step))}'
  if steps:
    with Checkpoints(path) as checkpoints:
      note = checkpoints.note(steps[-1])
    yield f'  settings of {steps[-1]}:'
    for name, value in note.settings.items():
      yield f'    {name} {json.dumps(value)}'
    for name, array in checkpoint.shapes(path, steps[-1]).items():
      yield f'  {name}  {list(array.shape)} {array.dtype}'
  export = path / 'export'
  if export.is_dir():
    sae = exports.load(export)
    yield f'sae/{path.name}/export  {size(export)}'
    yield (
      f'  {sae.config.width} -> {sae.config.latents} latents, '
      f'k {sae.config.k}, {sae.config.activation}, float32'
    )


def size(path: pathlib.Path) -> str:
  """Bytes of a file or a folder, for people."""
  files = [path] if path.is_file() else path.rglob('*')
  count = float(sum(file.stat().st_size for file in files if file.is_file()))
  for unit in ('B', 'kB', 'MB', 'GB'):
    if count < 1000:
      return f'{count:.3g} {unit}'
    count /= 1000
  return f'{count:.3g} TB'
