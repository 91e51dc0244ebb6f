"""SAEs as other programs keep them, read a few latents at a time.

    sparsify             cfg.json, sae.safetensors
    SAELens              cfg.json, sae_weights.safetensors
    dictionary_learning  config.json, ae.pt

`find` reads no more than settings and headers, checks one against the other,
and gives a `Source`, which reads latents when it is asked. What another program
does beyond this one's formula is folded into the weights where that is exact,
and refused with the reason where it is not.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from lmm_sae.sae import foreign, pickles, tensors
from lmm_sae.sae.foreign import LEARNING, SAELENS, SETTINGS, SPARSIFY, Plan
from lmm_sae.sae.model import SaeConfig
from lmm_sae.sae.tensors import Tensor

_FLOATS = [np.dtype(x) for x in (np.float64, np.float32, np.float16)]
_FLOATS.append(np.dtype(ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class Source:
  """An SAE of which latents are read when they are asked for.

  Attributes:
    config: of the SAE.
    b_dec_D: float32.
    read: (name, start, stop) to the float32 rows start..stop of `w_enc_MD`,
      `b_enc_M`, `w_dec_MD` or `theta_M`; a ValueError where they are not
      finite.
    dtype: that a copy keeps: that of the files, float32 where weights were
      folded.
    layout: a key of foreign.SETTINGS, or '' for one in memory.
    cfg: its settings as they stand there.
    folder: where it stands.
  """

  config: SaeConfig
  b_dec_D: np.ndarray
  read: Callable[[str, int, int], np.ndarray]
  dtype: np.dtype
  layout: str = ''
  cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
  folder: pathlib.Path | None = None


def find(path: str | os.PathLike, layer: int | None = None) -> Source:
  """The SAE of a folder, of a file in one, or of an export or hook point in it.

  Args:
    path: it, or a folder with `sparsify`, `export/sparsify`, or one folder a
      hook point, such as `model.layers.24`.
    layer: the decoder layer that it reads, whatever the folder says; None: as
      it says, else -1.

  Raises:
    ValueError: there is none, it is damaged, its settings contradict its
      tensors, or it does what cannot be folded.
  """
  path = pathlib.Path(path)
  folder, name = locate(path, layer)
  root = path if path.is_dir() else path.parent
  cfg = tensors.read_json(folder / SETTINGS[name], root)
  where = folder / name
  found = (pickles if name == LEARNING else tensors).find(where, root)
  plan = foreign.READERS[name](cfg, found, folder, root)
  if layer is not None:
    plan.config['layer'] = layer
  return _checked(plan, found, cfg, folder, name)


def locate(path: pathlib.Path, layer: int | None) -> tuple[pathlib.Path, str]:
  """The folder of the SAE that is meant, and the name of its tensor file.

  Raises:
    ValueError: there is none, or more than one.
  """
  if path.name in SETTINGS and path.is_file():
    return path.parent, path.name
  for folder in (path, path / 'sparsify', path / 'export' / 'sparsify'):
    if name := layout(folder):
      return folder, name
  inside = hooks(path)
  meant = {
    folder: name
    for folder, name in inside.items()
    if layer is None or foreign.hooked(folder.name)[0] in (None, layer)
  }
  if len(meant) == 1:
    return next(iter(meant.items()))
  if inside:
    which = ', '.join(folder.name for folder in inside)
    said = 'name one' if layer is None else f'which reads layer {layer}?'
    raise ValueError(f'{path} holds the SAEs {which}: {said}')
  raise ValueError(
    f'{path} holds no SAE (cfg.json beside {SPARSIFY} or {SAELENS}, or '
    f'config.json beside {LEARNING}): check the path'
  )


def hooks(path: pathlib.Path) -> dict[pathlib.Path, str]:
  """{folder: tensor file} of the SAEs in a folder, one a hook point."""
  if not path.is_dir():
    return {}
  return {
    folder: name
    for folder in sorted(path.iterdir())
    if folder.is_dir() and (name := layout(folder))
  }


def layout(folder: pathlib.Path) -> str:
  """The tensor file of a folder that holds an SAE; '' for another."""
  for name, settings in SETTINGS.items():
    places = (folder / name, folder / (name + tensors.INDEX))
    if (folder / settings).is_file() and any(map(os.path.lexists, places)):
      return name
  return ''


def _checked(
  plan: Plan, found: dict[str, Any], cfg: dict[str, Any], folder, layout: str
) -> Source:
  """The source, its plan checked against the tensors."""
  known = [name for name in (*plan.names, plan.gain) if name]
  if missing := [name for name in known if name not in found]:
    raise ValueError(f'{folder} lacks {", ".join(missing)}')
  if more := sorted(set(found) - {*known, *plan.spare}):
    raise ValueError(
      f'{folder} has the tensors {", ".join(more)[:200]}: what they do to an '
      'SAE is not known here'
    )
  fields = ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D', 'theta_M')
  held = dict(zip(fields, plan.names, strict=True))
  parts: dict[str, Tensor] = {}
  for field, name in (*held.items(), ('gain', plan.gain)):
    if not name:
      continue
    tensor = found[name]
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
      said = tensor.dtype if isinstance(tensor, Tensor) else type(tensor)
      raise ValueError(f'{folder}: {name} is of {said}, which is no float')
    parts[field] = tensor.T if field in plan.across else tensor
  _sides(plan, parts, folder)
  latents, width = parts['w_enc_MD'].shape
  dtypes = {tensor.dtype for tensor in parts.values()}
  big = parts['w_enc_MD'].dtype
  if plan.dtype and plan.dtype != big.name:
    raise ValueError(
      f'{folder}: the settings say {plan.dtype}, but the tensors are of '
      f'{big.name}'
    )
  fields = foreign.bounded(plan.config, latents)
  try:
    config = SaeConfig(width=width, latents=latents, **fields)
  except ValueError as error:
    raise ValueError(f'{folder}: {str(error)[:200]}') from error
  folded = not plan.centred or plan.by_norm or plan.gain or plan.scale != 1.0
  whole = len(dtypes) == 1 and not folded and big.itemsize <= 4
  return Source(
    config,
    _finite(parts['b_dec_D'], 0, width, held['b_dec_D'], folder)
    / np.float32(plan.scale),
    _reader(plan, parts, held, folder),
    big if whole else np.dtype(np.float32),
    layout,
    cfg,
    folder,
  )


def _sides(plan: Plan, parts: dict[str, Tensor], folder) -> None:
  """Refuses shapes that do not agree with one another or the settings."""
  shape = parts['w_enc_MD'].shape
  if len(shape) != 2 or not math.prod(shape):
    raise ValueError(f'{folder}: w_enc_MD has shape {shape}, not [M, D]')
  latents, width = shape
  wanted = {
    'b_enc_M': (latents,),
    'w_dec_MD': shape,
    'b_dec_D': (width,),
    'theta_M': (latents,),
    'gain': (latents,),
  }
  for field, want in wanted.items():
    got = parts[field].shape if field in parts else want
    if got != want and not (field == 'theta_M' and got in ((), (1,))):
      raise ValueError(
        f'{folder}: {field} has shape {got}, not {want}, as the encoder of '
        f'{latents} latents and width {width} wants it'
      )
  for what, claimed, got in zip(
    ('width', 'number of latents'), plan.sides, (width, latents), strict=True
  ):
    if claimed is not None and claimed != got:
      raise ValueError(
        f'{folder}: the settings say a {what} of {claimed}, the tensors {got}'
      )


def _finite(tensor: Tensor, start: int, stop: int, name, folder) -> np.ndarray:
  """Rows of a tensor in float32, copied as little as can be.

  Raises:
    ValueError: some are not finite.
  """
  with np.errstate(over='ignore', invalid='ignore'):
    rows = tensor.read(start, stop).astype(np.float32, copy=False)
  # One pass without an array of booleans: a sum is finite unless an item is
  # not, or it overflows, which the second look tells.
  with np.errstate(over='ignore', invalid='ignore'):
    total = rows.sum(dtype=np.float64)
  if not np.isfinite(total) and not np.isfinite(rows).all():
    bad = np.argwhere(~np.isfinite(rows))[0]
    at = [int(bad[0]) + start, *map(int, bad[1:])]
    raise ValueError(
      f'{folder}: {name} is {rows[tuple(bad)]} at {at}, in float32: its '
      'weights are not finite'
    )
  return rows


def _reader(plan: Plan, parts, held: dict[str, str], folder):
  """`Source.read` of a plan: what is read is folded."""
  b_dec_D = parts['b_dec_D']
  single = 'theta_M' in parts and parts['theta_M'].shape in ((), (1,))

  def raw(field: str, start: int, stop: int) -> np.ndarray:
    name = held.get(field, plan.gain)
    return _finite(parts[field], start, stop, name, folder)

  def norm(start: int, stop: int) -> np.ndarray:
    rows_MD = raw('w_dec_MD', start, stop)
    square_M = np.einsum('md,md->m', rows_MD, rows_MD, dtype=np.float64)
    return np.sqrt(square_M).astype(np.float32)

  def read(field: str, start: int, stop: int) -> np.ndarray:
    if field == 'theta_M' and field not in parts:
      return np.zeros(stop - start, np.float32)
    if field == 'theta_M' and single:
      with np.errstate(over='ignore'):
        one = np.float32(parts[field].read().reshape(()))
      if not np.isfinite(one):
        raise ValueError(f'{folder}: {held[field]} is {one}')
      return np.full(stop - start, one)
    rows = raw(field, start, stop)
    if field == 'b_enc_M' and not plan.centred:
      # W x + b = W (x - b_dec) + (b + W b_dec)
      rows_MD = raw('w_enc_MD', start, stop)
      at_D = _finite(b_dec_D, 0, None, held['b_dec_D'], folder)
      rows = rows + np.einsum('md,d->m', rows_MD, at_D, dtype=np.float64)
      rows = rows.astype(np.float32)
    side = (slice(None), None)[: rows.ndim]
    if field == 'w_enc_MD' and plan.scale != 1.0:
      rows = rows * np.float32(plan.scale)
    if field == 'w_dec_MD':
      if plan.scale != 1.0:
        rows = rows / np.float32(plan.scale)
      if plan.gain:
        rows = rows * raw('gain', start, stop)[side]
      if plan.by_norm:
        norm_M = norm(start, stop)
        rows = rows / np.where(norm_M > 0, norm_M, 1)[side]
    elif plan.by_norm and field != 'theta_M':
      rows = rows * norm(start, stop)[side]
    return rows

  return read
