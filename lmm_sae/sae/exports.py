"""A trained SAE in numpy, and the folders in which any program reads it.

    sae/<layer>/export/sparsify/   cfg.json, sae.safetensors
    sae/<layer>/export/saelens/    cfg.json, sae_weights.safetensors

Beside both stands README.md (`sae.card`), in each probe.safetensors, by which a
reader tells whether he reads it right (`sae.probe`). `load` reads these and the
layouts of `sae.layouts` into a `Sae` that takes and gives numpy; `write` writes
both. The sparsify half keeps the dtype of what it was made from; the SAELens
half is float32, since SAELens computes in the dtype of the file, and other
latents win where activations are rounded.
"""

import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from lmm_sae.sae import (
  checkpoint,
  layouts,
  model,
  probe,
  publish,
  tensors,
  trainer,
)
from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae.foreign import MOST
from lmm_sae.sae.layouts import Source
from lmm_sae.sae.model import Params, SaeConfig, SparseCode
from lmm_sae.sae.trainer import TrainState

_ROWS = 4096  # encoded at a time

_SPECS = trainer.specs().params


@dataclasses.dataclass(frozen=True)
class Sae:
  """A trained SAE in numpy, for rows as the store holds them.

  z = A(relu(W_enc (x - b_dec) + b_enc)), x̂ = W_decᵀ z + b_dec, in float32.
  A keeps the `config.most` largest of a row, and of those what is above theta.

  With a mesh the arrays are jax's and lie on it, latents split over `latent`,
  rows over `data`; what goes in and comes out is numpy all the same.
  """

  config: SaeConfig
  w_enc_MD: np.ndarray
  b_enc_M: np.ndarray
  w_dec_MD: np.ndarray
  b_dec_D: np.ndarray
  theta_M: np.ndarray
  mesh: Mesh | None = None

  def __post_init__(self):
    wide = (self.config.latents, self.config.width)
    for name, shape in (
      ('w_enc_MD', wide),
      ('b_enc_M', wide[:1]),
      ('w_dec_MD', wide),
      ('b_dec_D', wide[1:]),
      ('theta_M', wide[:1]),
    ):
      if getattr(self, name).shape != shape:
        raise ValueError(
          f'SAE: {name} has shape {getattr(self, name).shape}, not {shape}'
        )

  @functools.cached_property
  def params(self) -> Params:
    """The parameters on the default device, or on the mesh."""
    return Params(**{n: jnp.asarray(getattr(self, n)) for n in _FIELDS})

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    """Some latents of a field, as `layouts.Source` reads them."""
    return np.asarray(getattr(self, name)[start:stop])

  def encode(self, x_ND: np.ndarray, /) -> SparseCode:
    """The code of each row, in numpy; any number of rows, any float dtype.

    Raises:
      ValueError: the rows are not D wide, no numbers, or not finite.
    """
    x_ND = _numbers(x_ND)
    if x_ND.ndim != 2 or x_ND.shape[1] != self.config.width:
      raise ValueError(
        f'rows have shape {x_ND.shape}; this SAE reads [N, {self.config.width}]'
      )
    if not np.isfinite(x_ND).all():
      raise ValueError(
        'rows hold NaN or Inf, in float32: nothing fires on them'
      )
    k = self.config.most
    parts = [
      _encode(self.params, part_ND, k=k, mesh=self.mesh)
      for part_ND in _padded(x_ND, self.mesh)
    ]
    vals_NK = np.concatenate(
      [np.zeros((0, k), np.float32)] + [p[0] for p in parts]
    )
    idx_NK = np.concatenate(
      [np.zeros((0, k), np.int32)] + [p[1] for p in parts]
    )
    code = SparseCode(vals_NK[: len(x_ND)], idx_NK[: len(x_ND)])
    if MOST <= k < self.config.latents and self.config.activation != 'topk':
      full = np.count_nonzero(code.vals_NK[:, -1])
      if full:
        logging.log_first_n(
          logging.WARNING,
          '%d of %d rows fire %d latents or more: no more are kept',
          1,
          full,
          len(x_ND),
          k,
        )
    return code

  def decode(self, code: SparseCode, /) -> np.ndarray:
    """The rows x̂ that a code stands for, float32 [N, D]."""
    vals_NK, idx_NK = _numbers(code.vals_NK), np.asarray(code.idx_NK)
    if self.mesh is not None:
      return self._decode(vals_NK, idx_NK)
    x_ND = np.tile(self.b_dec_D, (len(idx_NK), 1))
    for j in np.flatnonzero(vals_NK.any(0)):  # rows seldom fire all they may
      x_ND += vals_NK[:, j, None] * self.w_dec_MD[idx_NK[:, j]]
    return x_ND

  def _decode(self, vals_NK: np.ndarray, idx_NK: np.ndarray) -> np.ndarray:
    parts = [
      np.asarray(_decode(self.params, *part, mesh=self.mesh))
      for part in zip(
        _padded(vals_NK, self.mesh), _padded(idx_NK, self.mesh), strict=True
      )
    ]
    x_ND = np.concatenate(
      [np.zeros((0, self.config.width), np.float32), *parts]
    )
    return x_ND[: len(idx_NK)]


_FIELDS = tuple(field.name for field in dataclasses.fields(Params))


def of(config: SaeConfig, state: TrainState) -> Sae:
  """The SAE of a training state, for rows as the store holds them."""
  params = trainer.export_params(state)
  return Sae(config, **dataclasses.asdict(params))


def _numbers(x: np.ndarray) -> np.ndarray:
  """An array in float32.

  Raises:
    ValueError: it is complex, or holds no numbers.
  """
  x = np.asarray(x)
  if not jnp.issubdtype(x.dtype, np.number) or np.iscomplexobj(x):
    raise ValueError(f'rows are of {x.dtype}; this SAE reads real numbers')
  with np.errstate(over='ignore'):
    return x.astype(np.float32)


@functools.partial(jax.jit, static_argnames=('k', 'mesh'))
def _encode(params, x_ND, *, k, mesh):
  if mesh is None:
    return model.fire(params, model.encode(params, x_ND, k=k))

  def own(params, x_ND):
    axis = mesh_lib.LATENT
    code = model.encode(params, x_ND, k=k, axis=axis)
    first = jax.lax.axis_index(axis) * len(params.b_enc_M)

    def gather(own_NK):
      return jax.lax.all_gather(own_NK, axis, axis=1, tiled=True)

    # In the order that one device gives; ties go to the lower latent.
    _, at_NK = jax.lax.top_k(gather(code.vals_NK), k)
    fired = model.fire(params, code)
    return SparseCode(
      jnp.take_along_axis(gather(fired.vals_NK), at_NK, 1),
      jnp.take_along_axis(gather(fired.idx_NK + first), at_NK, 1),
    )

  return jax.shard_map(
    own,
    mesh=mesh,
    in_specs=(_SPECS, mesh_lib.ROWS),
    out_specs=mesh_lib.ROWS,
    check_vma=False,
  )(params, x_ND)


@functools.partial(jax.jit, static_argnames='mesh')
def _decode(params, vals_NK, idx_NK, *, mesh):
  def own(params, vals_NK, idx_NK):
    axis = mesh_lib.LATENT
    count = len(params.b_enc_M)
    idx_NK = idx_NK - jax.lax.axis_index(axis) * count
    here_NK = (idx_NK >= 0) & (idx_NK < count)
    code = SparseCode(
      jnp.where(here_NK, vals_NK, 0), jnp.where(here_NK, idx_NK, 0)
    )
    return model.decode(params, code, axis=axis)

  return jax.shard_map(
    own,
    mesh=mesh,
    in_specs=(_SPECS, mesh_lib.ROWS, mesh_lib.ROWS),
    out_specs=mesh_lib.ROWS,
    check_vma=False,
  )(params, vals_NK, idx_NK)


def _padded(x_ND: np.ndarray, mesh: Mesh | None) -> Iterator[np.ndarray]:
  """Pieces of at most 4096 rows; the last padded to a power of two.

  So few shapes are compiled, whatever comes. On a mesh each has a multiple of
  the devices that share the rows.
  """
  share = 1 if mesh is None else mesh.shape[mesh_lib.DATA]
  for start in range(0, len(x_ND), _ROWS):
    part_ND = x_ND[start : start + _ROWS]
    rows = 1 << (len(part_ND) - 1).bit_length()
    rows = -(-rows // share) * share
    yield np.pad(part_ND, ((0, rows - len(part_ND)), (0, 0)))


def load(
  path: str | os.PathLike,
  layer: int | None = None,
  mesh: Mesh | None = None,
) -> Sae:
  """The SAE of an export, of a workdir's sae/<layer>, or of another program.

  Its probe is verified where it has one; the log says where not.

  Args:
    path: what `layouts.find` reads.
    layer: the decoder layer that it reads, whatever the folder says; None: as
      it says.
    mesh: of `sae.mesh.make`: each device's latents are read straight onto it.

  Raises:
    ValueError: there is none, it is damaged or contradicts itself or its probe,
      or computes what this program does not.
  """
  if checkpoint.steps(path) and not (pathlib.Path(path) / 'export').exists():
    raise ValueError(
      f'{path} holds no SAE export: run `lmm-sae train` to its end'
    )
  found = layouts.find(path, layer)
  check(found)
  return take(found, mesh)


def source(sae: Sae) -> Source:
  """An SAE in memory as one that is read piece by piece."""
  b_dec_D = np.asarray(sae.b_dec_D)
  return Source(sae.config, b_dec_D, sae.read, np.dtype(np.float32))


def check(found: Source) -> None:
  """Verifies the probe of a folder, and says where it has none.

  Raises:
    ValueError: the SAE does not do what its probe says.
  """
  if found.folder is None:  # a checkpoint of ours, as training left it
    return
  if not (found.folder / probe.NAME).exists():
    logging.info('%s has no %s to verify', found.folder, probe.NAME)
    return
  if differs := probe.verify(found, found.folder):
    raise ValueError(
      f'{found.folder} does not do what its {probe.NAME} says: {differs}'
    )


def take(found: Source, mesh: Mesh | None = None) -> Sae:
  """The SAE of a source: its latents are read, piece by piece.

  Raises:
    ValueError: weights are not finite, or the mesh cannot share the latents.
  """
  config = found.config
  rows = {'b_dec_D': found.b_dec_D}
  shapes = {
    'w_enc_MD': (config.latents, config.width),
    'b_enc_M': (config.latents,),
    'w_dec_MD': (config.latents, config.width),
    'theta_M': (config.latents,),
  }
  if mesh is None:
    for name, shape in shapes.items():
      rows[name] = np.empty(shape, np.float32)
      for start, stop in tensors.pieces(config.latents, config.width):
        rows[name][start:stop] = found.read(name, start, stop)
    return Sae(config, **rows)
  shares = mesh.shape[mesh_lib.LATENT]
  if config.latents % shares:
    raise ValueError(
      f'{config.latents} latents cannot be split over {shares} devices'
    )
  sharding = mesh_lib.sharding(mesh, mesh_lib.LATENTS)
  for name, shape in shapes.items():
    shards = []
    for device, at in sharding.addressable_devices_indices_map(shape).items():
      # One at a time: make_array_from_callback holds all of them on the host.
      part = found.read(name, *at[0].indices(config.latents)[:2])
      shards.append(jax.device_put(part, device).block_until_ready())
      del part
    rows[name] = jax.make_array_from_single_device_arrays(
      shape, sharding, shards
    )
  whole = mesh_lib.sharding(mesh, mesh_lib.WHOLE)
  rows['b_dec_D'] = mesh_lib.put(found.b_dec_D, whole)
  return Sae(config, **rows, mesh=mesh)


def write(
  sae: Sae | Source,
  path: str | os.PathLike,
  *,
  step: int = 0,
  origin: str = '',
  settings: Mapping[str, Any] | None = None,
  figures: Mapping[str, Any] | None = None,
) -> None:
  """Writes both layouts under `path`, whole or not at all.

  What stood there before stays until the new one is whole.

  Args:
    sae: to write; of a `Source`, a few latents are held at a time.
    path: the folder of the export.
    step: of the training.
    origin: where it comes from, for its card.
    settings: those of the run, as a checkpoint has them, for the card.
    figures: the layer's of evaluation.json, for the card.
  """
  path = pathlib.Path(path)
  whole = source(sae) if isinstance(sae, Sae) else sae
  part = path.with_name(path.name + '.part')
  before = path.with_name(path.name + '.old')
  if before.exists() and not path.exists():  # killed between the two renames
    before.rename(path)
  shutil.rmtree(part, ignore_errors=True)
  new = [folder for folder in path.parents if not folder.exists()]
  try:
    publish.fill(
      whole, part, step, source=origin, settings=settings, figures=figures
    )
    shutil.rmtree(before, ignore_errors=True)
    if path.exists():
      path.rename(before)
    try:
      part.rename(path)
    except OSError:
      if before.exists():
        before.rename(path)
      raise
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    for folder in new:
      if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
    raise
  shutil.rmtree(before, ignore_errors=True)
