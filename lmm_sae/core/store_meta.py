"""What a store says of itself in meta.json."""

import dataclasses
import json
from typing import Any

from lmm_sae.core import places, store_rows
from lmm_sae.core.grid import Layout
from lmm_sae.core.places import Place
from lmm_sae.core.store_commits import parse

FORMAT_VERSION = 2
FILE = 'meta.json'
AGAIN = 'delete that folder and capture again'


@dataclasses.dataclass(frozen=True)
class StoreMeta:
  """What a store holds; two stores with equal meta hold equal rows.

  Attributes:
    split: train, a or b.
    model: name of the subject.
    fingerprint: of the subject's configuration and weights.
    layers: hooked decoder layers, 0-based; layer_paths: where each was found in
      the model, by layer as str.
    width: D.
    grid: (rows, cols) of the base view's patches; (0, 0) where it depends on
      the image.
    image_backend: which image processor made the pixels.
    config: the fields of the run that decide what is stored.
    mixed: whether the rows of a group are in no order; else they stand sample
      after sample, by position.
    dtype: how rows are kept: bfloat16, or int8 with a scale a row.
  """

  split: str
  model: str
  fingerprint: str
  layers: tuple[int, ...]
  layer_paths: dict[str, str]
  width: int
  grid: tuple[int, int]
  image_backend: str
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  mixed: bool = False
  dtype: str = 'bfloat16'

  def __post_init__(self):
    if self.dtype not in store_rows.DTYPES:
      raise ValueError(
        f'capture.store is {self.dtype!r}; it is one of {store_rows.DTYPES}'
      )


def claim(path: Place, meta: StoreMeta, layout: Layout) -> None:
  """Writes the meta of the store at a place; the same may stand there.

  Raises:
    ValueError: another stands there.
  """
  wanted = {
    'format_version': FORMAT_VERSION,
    **dataclasses.asdict(meta),
    **dataclasses.asdict(layout),
  }
  wanted = json.loads(json.dumps(wanted))
  if _read(path) is None:
    places.write_json(path / FILE, wanted)
  found = _read(path)  # another process may have come between
  if found != wanted:
    raise ValueError(
      f'{path} was captured with other settings ('
      f'{"; ".join(_differences(found, wanted))}): use another workdir, '
      'or delete that folder to capture again'
    )


def read(path: Place) -> tuple[StoreMeta, Layout]:
  """The meta and the layout of the store at a place.

  Raises:
    ValueError: there is none, or it is of another format.
  """
  found = _read(path)
  if found is None:
    (path / FILE).check_bucket()
    raise ValueError(f'no activations at {path}: run `lmm-sae capture` first')
  layout, fields = (
    {field.name: found[field.name] for field in dataclasses.fields(kind)}
    for kind in (Layout, StoreMeta)
  )
  fields['layers'] = tuple(fields['layers'])
  fields['grid'] = tuple(fields['grid'])
  return StoreMeta(**fields), Layout(**layout)


def _read(path: Place) -> dict[str, Any] | None:
  data = (path / FILE).read_if_there()
  if data is None:
    return None
  found = parse(data, path / FILE, ('format_version',), AGAIN)
  version = found.get('format_version')
  if version != FORMAT_VERSION:
    raise ValueError(
      f'{path} has format_version {version}; this program reads '
      f'{FORMAT_VERSION}: capture again in another workdir'
    )
  fields = (*dataclasses.fields(StoreMeta), *dataclasses.fields(Layout))
  return parse(data, path / FILE, [field.name for field in fields], AGAIN)


def _differences(found: Any, wanted: Any, name: str = '') -> list[str]:
  """The fields in which two metas differ, as `name: found, now wanted`."""
  if not (isinstance(found, dict) and isinstance(wanted, dict)):
    return [] if found == wanted else [f'{name}: {found!r}, now {wanted!r}']
  names = sorted(found.keys() | wanted.keys())
  return [
    text
    for key in names
    for text in _differences(
      found.get(key), wanted.get(key), f'{name}.{key}' if name else key
    )
  ]
