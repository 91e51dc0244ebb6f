"""The golden probe: rows, and what an SAE makes of them, kept beside it.

`probe.safetensors` stands beside every export: x_ND, the code (idx_NK, vals_NK)
and x_hat_ND. Whoever reads the SAE can ask whether he gets the same: the same
latents, each within TOLERANCE of its row's largest activation, and x̂ within
TOLERANCE of its row's largest entry. The figures are reckoned in float64 from
the weights as they are stored, so that no reader's rounding is in them, and the
rows are those, of three times as many, whose code is farthest from a tie.
"""

import os
import pathlib

import numpy as np

from lmm_sae.sae import tensors
from lmm_sae.sae.model import SparseCode

NAME = 'probe.safetensors'
TOLERANCE = 1e-4

_ROWS = 8
_DRAWN = 24
_MIXED = 4  # latents that a row is made of
_AXES = {'x_ND': 2, 'idx_NK': 2, 'vals_NK': 2, 'x_hat_ND': 2}


def make(sae, seed: int = 0) -> dict[str, np.ndarray]:
  """The probe of an SAE (`exports.Sae` or `layouts.Source`).

  Returns:
    x_ND float32, idx_NK int32, vals_NK float32 and x_hat_ND float32, N = 8.
  """
  x_CD = _rows(sae, np.random.default_rng(seed))
  code, margin_C = encode(sae, x_CD)
  best_N = np.sort(np.argsort(-margin_C, kind='stable')[:_ROWS])
  code = SparseCode(code.vals_NK[best_N], code.idx_NK[best_N])
  return {
    'x_ND': x_CD[best_N],
    'idx_NK': code.idx_NK.astype(np.int32),
    'vals_NK': code.vals_NK.astype(np.float32),
    'x_hat_ND': decode(sae, code).astype(np.float32),
  }


def write(path: pathlib.Path, probe: dict[str, np.ndarray]) -> None:
  """Writes `probe.safetensors` into a folder."""
  shapes = {name: (array.dtype, array.shape) for name, array in probe.items()}
  with tensors.Writer(path / NAME, shapes) as file:
    for name, array in probe.items():
      file.rows(name, 0, array)


def verify(sae, path: str | os.PathLike) -> str:
  """'' where the SAE does what the probe of a folder says, else what differs.

  Args:
    sae: an `exports.Sae` or a `layouts.Source`.
    path: the folder that holds the probe.

  Raises:
    ValueError: the probe is missing or damaged.
  """
  path = pathlib.Path(path)
  found = tensors.find(path / NAME, path)
  if set(found) != set(_AXES):
    raise ValueError(f'{path / NAME} holds {sorted(found)}')
  width, most = sae.config.width, sae.config.most
  rows = found['x_ND'].shape[0] if found['x_ND'].shape else 0
  for name, tensor in found.items():
    shape = (rows, width if name.endswith('D') else most)
    if tensor.shape != shape or not 0 < rows <= 4096:
      return f'{name} of the probe has shape {tensor.shape}, not {shape}'
    if (tensor.dtype.kind == 'i') != (name == 'idx_NK'):
      return f'{name} of the probe is of {tensor.dtype}'
  said = {name: tensor.read() for name, tensor in found.items()}
  x_ND = said['x_ND'].astype(np.float32)
  if not np.isfinite(x_ND).all():
    return 'x_ND of the probe is not finite'
  code, _ = encode(sae, x_ND)
  return _differ(SparseCode(said['vals_NK'], said['idx_NK']), code) or _apart(
    said['x_hat_ND'], decode(sae, code)
  )


def _differ(said: SparseCode, code: SparseCode) -> str:
  """What the first latent does that is not as it is said."""
  for row, (vals_K, idx_K) in enumerate(zip(*said, strict=True)):
    want = _fired(vals_K, idx_K)
    have = _fired(code.vals_NK[row], code.idx_NK[row])
    near = TOLERANCE * max([0.0, *want.values(), *have.values()])
    for latent in sorted({*want, *have}):
      one, two = want.get(latent, 0.0), have.get(latent, 0.0)
      if not abs(one - two) <= near:
        return (
          f'on row {row} latent {latent} fires with {one:.6g} in the probe '
          f'and with {two:.6g} as read (tolerance {near:.2g})'
        )
  return ''


def _fired(vals_K: np.ndarray, idx_K: np.ndarray) -> dict[int, float]:
  return {
    int(latent): float(value)
    for latent, value in zip(idx_K, vals_K, strict=True)
    if value != 0
  }


def _apart(said_ND: np.ndarray, x_hat_ND: np.ndarray) -> str:
  near_N1 = TOLERANCE * np.abs(x_hat_ND).max(1, keepdims=True)
  gap_ND = np.abs(said_ND - x_hat_ND)
  wrong = np.argwhere(~(gap_ND <= near_N1 + 1e-30))
  if not len(wrong):
    return ''
  row, at = wrong[0]
  return (
    f'the reconstruction of row {row} is {said_ND[row, at]:.6g} at {at} in the '
    f'probe and {x_hat_ND[row, at]:.6g} as read'
  )


def encode(sae, x_ND: np.ndarray, /) -> tuple[SparseCode, np.ndarray]:
  """The code of each row in float64, a piece of the latents at a time.

  Returns:
    the code, and how far each row is from another one: the least distance of an
    activation from its threshold and from the first that did not get in, as a
    share of the row's largest [N].
  """
  config = sae.config
  keep = min(config.most + 1, config.latents)
  x_ND = x_ND.astype(np.float64) - sae.b_dec_D
  best_NK = np.zeros((len(x_ND), 0))
  idx_NK = np.zeros((len(x_ND), 0), np.int64)
  theta = []
  from_theta_N = np.full(len(x_ND), np.inf)
  for start, stop in tensors.pieces(config.latents, config.width):
    w_MD = sae.read('w_enc_MD', start, stop).astype(np.float64)
    z_NM = x_ND @ w_MD.T + sae.read('b_enc_M', start, stop)
    theta.append(sae.read('theta_M', start, stop))
    if config.activation != 'topk':
      far_N = np.abs(z_NM - theta[-1]).min(1)
      from_theta_N = np.minimum(from_theta_N, far_N)
    best_NK = np.concatenate([best_NK, np.maximum(z_NM, 0)], 1)
    here_NM = np.broadcast_to(np.arange(start, stop), z_NM.shape)
    idx_NK = np.concatenate([idx_NK, here_NM], 1)
    order_NK = np.argsort(-best_NK, 1, kind='stable')[:, :keep]
    best_NK = np.take_along_axis(best_NK, order_NK, 1)
    idx_NK = np.take_along_axis(idx_NK, order_NK, 1)
  margin_N = from_theta_N
  if keep > config.most:
    gap_N = best_NK[:, -2] - best_NK[:, -1]
    margin_N = np.minimum(margin_N, np.where(best_NK[:, -2] > 0, gap_N, np.inf))
  largest_N = np.maximum(best_NK[:, 0], 1e-30)
  vals_NK, idx_NK = best_NK[:, : config.most], idx_NK[:, : config.most]
  above_NK = vals_NK > np.concatenate(theta)[idx_NK]
  code = SparseCode(np.where(above_NK, vals_NK, 0), idx_NK)
  return code, margin_N / largest_N


def decode(sae, code: SparseCode, /) -> np.ndarray:
  """The rows x̂ in float64, a piece of the latents at a time."""
  config = sae.config
  x_ND = np.tile(sae.b_dec_D.astype(np.float64), (len(code.idx_NK), 1))
  for start, stop in tensors.pieces(config.latents, config.width):
    here_NK = (code.idx_NK >= start) & (code.idx_NK < stop)
    here_NK &= code.vals_NK != 0
    if here_NK.any():
      w_MD = sae.read('w_dec_MD', start, stop)
      for row, here_K in enumerate(here_NK):
        rows_KD = w_MD[code.idx_NK[row, here_K] - start].astype(np.float64)
        x_ND[row] += code.vals_NK[row, here_K] @ rows_KD
  return x_ND


def _rows(sae, rng: np.random.Generator) -> np.ndarray:
  """Rows that fire some latents: sums of decoder rows about b_dec, float32."""
  config = sae.config
  mixed = min(_MIXED, config.latents)
  x_CD = np.tile(sae.b_dec_D.astype(np.float64), (_DRAWN, 1))
  for x_D in x_CD:
    for latent in rng.choice(config.latents, mixed, replace=False).tolist():
      w_enc_D, b_enc, w_dec_D, theta = (
        sae.read(name, latent, latent + 1)[0].astype(np.float64)
        for name in ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'theta_M')
      )
      along = float(w_enc_D @ w_dec_D)
      least = 0.05 * np.linalg.norm(w_enc_D) * np.linalg.norm(w_dec_D)
      wanted = (1 + rng.random()) * (1 + 2 * (abs(b_enc) + abs(theta)))
      x_D += w_dec_D * (wanted / along if along > least > 0 else 1.0)
  return x_CD.astype(np.float32)
