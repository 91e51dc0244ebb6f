"""What an SAE is held against: dictionaries that nobody trained.

    ''         the trained export itself
    untrained  the SAE before its first step: the encoder that its seed draws,
               as many latents, as many of them a row
    neurons    the residual stream's own channels: 2D latents, of which the
               first D fire where a channel is above its mean, the others where
               it is below; as many a row as the SAE has

Both read rows against the mean of those that training starts from (which moves
b_dec on to their geometric median: a mean, summed in order, is the same to the
bit on every machine that makes a part of an index). They are made in memory,
again whenever asked for, alike for one seed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmm_sae.core.records import DICTIONARIES
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import data, exports, layouts, model
from lmm_sae.sae.exports import Sae
from lmm_sae.sae.model import SaeConfig

START_ROWS = 2**14  # rows whose mean is b_dec, as many as training starts from
BLOCK_ROWS = 256  # rows of one read
THETA_ROWS = 4096  # rows by which a threshold is set


def load(
  workdir: Workdir,
  layer: int,
  dictionary: str,
  seed: int,
  mesh: Mesh | None = None,
) -> Sae:
  """The SAE of a layer, or what is held against it.

  Args:
    workdir: with the layer's export, and acts/train unless it is that itself.
    layer: decoder layer.
    dictionary: '' or one of `records.DICTIONARIES`.
    seed: of the run; that of the encoder that training started with.
    mesh: as of `exports.load`.

  Raises:
    ValueError: there is no such dictionary, or what it is made of is missing.
  """
  if dictionary and dictionary not in DICTIONARIES:
    raise ValueError(
      f'{dictionary!r} is no dictionary; {", ".join(DICTIONARIES)} are'
    )
  export = workdir.require(workdir.export(layer), 'train')
  if not dictionary:
    return exports.load(export, mesh=mesh)
  acts = workdir.require(workdir.acts('train'), 'capture')
  config = layouts.find(export).config
  rows = data.Rows(ActivationStore.open(acts), layer, ('all',), BLOCK_ROWS)
  rows_ND = rows.sample(START_ROWS, seed).astype(np.float32)
  if dictionary == 'untrained':
    sae = untrained(config, rows_ND, seed)
  else:
    sae = neurons(config, rows_ND)
  return sae if mesh is None else exports.take(exports.source(sae), mesh)


def untrained(config: SaeConfig, rows_ND: np.ndarray, seed: int) -> Sae:
  """The SAE of that config with the encoder that training starts with.

  Where its latents fire above a threshold, all have the one above which as many
  fire on these rows as were asked for: k a row, on average.
  """
  drawn = model.init(config, _mean(rows_ND), jax.random.key(seed))
  sae = Sae(
    config,
    **{
      field.name: np.asarray(getattr(drawn, field.name))
      for field in dataclasses.fields(drawn)
    },
  )
  if config.activation == 'topk':
    return sae
  some_ND = jnp.asarray(rows_ND[:THETA_ROWS])
  vals_NK, _ = model.encode(drawn, some_ND, k=config.most)
  highest = np.sort(np.asarray(vals_NK), axis=None)[::-1]
  theta = float(highest[min(config.k * len(some_ND), highest.size - 1)])
  # in four digits, since the last ones of a product are a machine's own
  theta_M = np.full(config.latents, f'{theta:.3e}', np.float32)
  return dataclasses.replace(sae, theta_M=theta_M)


def neurons(config: SaeConfig, rows_ND: np.ndarray) -> Sae:
  """Each channel above its mean, then each below it, in the units of a row."""
  width = config.width
  both_MD = np.concatenate([np.eye(width), -np.eye(width)]).astype(np.float32)
  return Sae(
    SaeConfig(
      layer=config.layer,
      width=width,
      latents=2 * width,
      k=min(config.k, 2 * width),
    ),
    w_enc_MD=both_MD,
    b_enc_M=np.zeros(2 * width, np.float32),
    w_dec_MD=both_MD,
    b_dec_D=_mean(rows_ND),
    theta_M=np.zeros(2 * width, np.float32),
  )


def _mean(rows_ND: np.ndarray) -> np.ndarray:
  return rows_ND.mean(0, dtype=np.float64).astype(np.float32)
