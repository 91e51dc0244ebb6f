"""The work that contenders share: rows, first parameters, and the FVU."""

import pathlib

import numpy as np

HELD = 4096  # rows that no one trains on
CHUNK = 512  # of them at a time, in float64 over all latents


def activations(
  rng: np.random.Generator, rows: int, width: int, /
) -> np.ndarray:
  """Rows that an SAE can explain: a few of 4 D directions, a mean, noise."""
  directions = rng.normal(size=(4 * width, width)).astype(np.float32)
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  mean = rng.normal(size=width).astype(np.float32)
  x = np.empty((rows, width), np.float32)
  for start in range(0, rows, 4096):
    part = x[start : start + 4096]
    z = np.zeros((len(part), 4 * width), np.float32)
    each = min(24, 4 * width)
    at = (4 * width * rng.random((len(part), each)) ** 2).astype(int)
    np.put_along_axis(z, at, rng.exponential(size=at.shape), 1)
    noise = rng.normal(size=part.shape) * 0.02
    part[:] = z @ directions + mean + noise
  return x


def write(
  folder: pathlib.Path,
  seed: int,
  *,
  rows: int,
  blocks: int,
  width: int,
  latents: int,
) -> np.ndarray:
  """Writes the rows and the first parameters; returns the rows held out.

  rows.bin has `blocks` batches of `rows` rows in float32; one .npy a parameter.
  """
  rng = np.random.default_rng(seed)
  x = activations(rng, blocks * rows + HELD, width)
  held, x = x[-HELD:].copy(), x[:-HELD]
  x.tofile(folder / 'rows.bin')
  w_enc = rng.random((latents, width), np.float32)
  w_enc = (2 * w_enc - 1) * np.float32(width**-0.5)
  norm = np.linalg.norm(w_enc, axis=1, keepdims=True)
  for name, one in (
    ('w_enc', w_enc),
    ('b_enc', np.zeros(latents, np.float32)),
    ('w_dec', w_enc / norm),
    ('b_dec', x.mean(0)),
  ):
    np.save(folder / f'{name}.npy', one)
  return held


def fvu(params, x: np.ndarray, k: int, /) -> float:
  """Of rows that were held out, in float64."""
  w_enc, b_enc, w_dec, b_dec = (
    params[name].astype(float) for name in ('w_enc', 'b_enc', 'w_dec', 'b_dec')
  )
  x = x.astype(float)
  squares = 0.0
  for start in range(0, len(x), CHUNK):
    part = x[start : start + CHUNK]
    z = np.maximum((part - b_dec) @ w_enc.T + b_enc, 0)
    at = np.argpartition(-z, k - 1, axis=1)[:, :k]
    error = part - b_dec
    for one in at.T:  # a product over all latents would take as long as z
      error -= z[np.arange(len(z)), one, None] * w_dec[one]
    squares += (error**2).sum()
  return float(squares / ((x - x.mean(0)) ** 2).sum())
