"""inspect: shows what a checkpoint, an SAE, a store or a workdir holds.

    lmm-sae inspect PATH              or --config.inspect.path=PATH
    lmm-sae inspect --workdir=DIR     everything in it, in short
    lmm-sae inspect PATH --stats      norms, dead latents, neighbours
    lmm-sae inspect PATH --against=OLD
    lmm-sae inspect PATH --json

PATH is any orbax checkpoint, ours or not, or the last of a folder of them, an
SAE in safetensors or an activation store. Neither a config nor the model is
needed. Arrays are not read, unless for --stats and --against.

What --json prints is what the table is made from: see `looking.FACTS`,
`figures.of`, `differences.between`; NaN and Inf are null.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

from ml_collections import ConfigDict

from lmm_sae.core.places import Place
from lmm_sae.core.sources import SPLITS
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import (
  differences,
  figures,
  looking,
  orbax_files,
  stored,
  tables,
)


@dataclasses.dataclass(frozen=True)
class InspectConfig:
  """The section `inspect` of the config; every field is explained there."""

  path: str
  stats: bool
  against: str
  json: bool


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Prints what was found.

  Raises:
    ValueError: nothing that is known was found, or something that is damaged;
      of a workdir, what is whole is printed first.
  """
  opts = InspectConfig(**config.inspect)
  path = opts.path or str(workdir.root)
  if looking.is_workdir(path):
    if opts.stats or opts.against:
      raise ValueError(
        f'{path} is a workdir: for stats and against name one checkpoint, such '
        f'as {path}/sae/LAYER/STEP, or one export'
      )
    acts = None if opts.path else workdir.acts_root
    facts = of_workdir(pathlib.Path(path).absolute(), acts)
  else:
    facts = of_one(path, opts)
  if opts.json:
    print(json.dumps(plain(facts), indent=1, allow_nan=False))
  else:
    print('\n'.join(tables.lines(facts)))
  if facts.get('damaged'):
    raise ValueError('; '.join(facts['damaged']))


def of_one(path: str, opts: InspectConfig) -> dict[str, Any]:
  """The facts of one checkpoint, SAE or store, with what is asked for."""
  look = looking.look(path)
  old = looking.look(opts.against) if opts.against else None
  if old is not None and 'store' in (look.facts['kind'], old.facts['kind']):
    raise ValueError(
      f'{path} and {opts.against}: only checkpoints and SAEs are compared'
    )
  facts = look.facts
  if opts.stats:
    by = figures.of if look.store is None else figures.of_store
    facts = facts | {'stats': by(look)}
  if old is not None:
    facts = facts | {'against': differences.between(look, old)}
  return facts


def of_workdir(path: pathlib.Path, acts: Place | None = None) -> dict[str, Any]:
  """The facts of all that stands in a workdir.

  `parts` are those of its stores, checkpoints and exports, `files` {name:
  {bytes, lines}} of its JSON files and indexes; `damaged` says what could not
  be looked at, and why.
  """
  found = _stores(acts or Place.of(path / 'acts'))
  for layer in sorted(path.glob('sae/*/')):
    found += orbax_files.steps(layer).values()
    found += [layer / 'export'] * (layer / 'export').is_dir()
  parts, damaged = [], []
  for folder in found:
    try:
      if looking.kind(folder):
        parts.append(looking.look(folder).facts)
    except (ValueError, FileNotFoundError) as error:
      damaged.append(str(error))
  files = {}
  for file in (*sorted(path.glob('index/*/*')), *sorted(path.glob('*.json*'))):
    lines = file.suffix == '.jsonl'
    files[str(file.relative_to(path))] = {
      'bytes': stored.disk(file),
      'lines': file.read_bytes().count(b'\n') if lines else None,
    }
  return {
    'format_version': looking.FORMAT_VERSION,
    'kind': 'workdir',
    'path': str(path),
    'bytes': stored.disk(path),
    'parts': parts,
    'files': files,
    'damaged': damaged,
  }


def _stores(acts: Place) -> list[Place | pathlib.Path]:
  """The stores of a run; in a bucket there are no folders to be listed."""
  if acts.local:
    return sorted(pathlib.Path(acts).glob('*/'))
  found = [acts / split for split in SPLITS]
  return [place for place in found if (place / 'meta.json').exists()]


def plain(value: Any) -> Any:
  """The value with null for what JSON has no number for."""
  if isinstance(value, dict):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if isinstance(value, bytes | complex):
    return str(value)
  return value
