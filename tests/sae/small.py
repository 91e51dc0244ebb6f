"""Small stores and settings for the tests of the SAE half."""

import dataclasses

import ml_dtypes
import numpy as np

from lmm_sae.core import places
from lmm_sae.core.records import Sample
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.tokens import Kind
from lmm_sae.sae.exports import Sae
from lmm_sae.sae.model import SaeConfig
from lmm_sae.sae.options import TrainConfig

LAYER, D, M, K = 4, 6, 12, 3
SAMPLE = (
  Kind.BOS,
  Kind.TEMPLATE,
  Kind.BASE,
  Kind.BASE,
  Kind.BASE,
  Kind.TILE,
  Kind.TILE,
  Kind.NEWLINE,
  Kind.QUESTION,
  Kind.ANSWER,
)

CONFIG = SaeConfig(layer=LAYER, width=D, latents=M, k=K, dead_after=400)
TRAIN = TrainConfig(
  steps=20,
  rows=16,
  lr=0.01,
  warmup=4,
  decay_from=0.5,
  clip=1.0,
  accumulate=1,
  max_skipped=1,
  auxk=1 / 32,
  multi_topk=0.0,
  sparsity=1.0,
  k_from=0,
  k_steps=0,
  compute='float32',
  init='',
  kinds=('all',),
  normalise=True,
  backend='auto',
  devices=1,
  latent_shards=1,
  save_every=5,
  keep=2,
  keep_best=0,
  block_rows=8,
  pool_blocks=4,
  data_shares=2,
)


def random_sae(config: SaeConfig = CONFIG, seed: int = 0) -> Sae:
  """An SAE that was never trained; with thresholds unless it is TopK."""
  rng = np.random.default_rng(seed)
  wide = config.latents, config.width
  weights = [
    rng.normal(size=shape).astype(np.float32)
    for shape in (wide, wide[:1], wide, wide[1:])
  ]
  theta_M = rng.uniform(0.5, 2.5, wide[:1]).astype(np.float32)
  if config.activation == 'topk':
    theta_M[:] = 0
  return Sae(config, *weights, theta_M)


def rows(count: int, seed: int = 0) -> np.ndarray:
  """Sparse sums of 9 directions about a mean, float32 [N, 6]."""
  rng = np.random.default_rng(5)
  directions = rng.normal(size=(9, D))
  mean_D = rng.normal(size=D) * 2
  rng = np.random.default_rng(seed)
  on = rng.random((count, 9)) < 0.25
  z = on * rng.exponential(size=on.shape)
  x_ND = z @ directions + mean_D + 0.05 * rng.normal(size=(count, D))
  return x_ND.astype(np.float32)


def write_store(
  path,
  samples: int = 40,
  seed: int = 0,
  bos: float = 1.0,
  layers: tuple[int, ...] = (LAYER,),
) -> ActivationStore:
  """A store of 10-row samples, 16 to a group; BOS rows `bos` times as long.

  Each layer has rows of its own.
  """
  meta = StoreMeta(
    split=path.name,
    model='toy',
    fingerprint='f00',
    layers=layers,
    layer_paths={str(at): f'model.layers.{at}' for at in layers},
    width=D,
    grid=(1, 3),
    image_backend='pil',
  )
  groups = -(-samples // 16)
  store = ActivationStore.create(path, meta, groups, 192, 64, 8)
  places.write_json(store.path / 'vocab.json', ['a'])
  length = len(SAMPLE)
  for group in range(groups):
    ids = np.arange(group * 16, min(group * 16 + 16, samples))
    count = len(ids) * length
    kind_N = np.tile(SAMPLE, len(ids)).astype(np.uint8)
    residuals = {}
    for layer in layers:
      x_ND = rows(count, seed + group + 100 * (layer - LAYER))
      x_ND[kind_N == Kind.BOS] *= bos
      residuals[layer] = x_ND.astype(ml_dtypes.bfloat16)
    fields = {
      'sample': np.repeat(ids, length),
      'position': np.tile(np.arange(length), len(ids)),
      'token': np.zeros(count),
      'kind': kind_N,
      'row': np.full(count, -1),
      'col': np.full(count, -1),
      'image': np.zeros(count),
      'box': np.zeros((count, 4)),
    }
    parts = [
      Sample(
        sample=int(sample),
        group=-1,
        source=str(sample),
        image='',
        width=0,
        height=0,
        prompt='',
        turns=(),
        start=at * length,
        stop=(at + 1) * length,
      )
      for at, sample in enumerate(ids)
    ]
    store.write_group(group, residuals, fields, parts, [])
  return store


def run_config(config, **changes):
  """The plain config, made as small as the stores of this module."""
  config.lmm.layers = (LAYER,)
  config.sae.latents, config.sae.k = M, K
  config.sae.dead_after = CONFIG.dead_after
  config.train.update(dataclasses.asdict(TRAIN))
  for field, value in changes.items():
    section, name = field.split('__')
    config[section][name] = value
  return config
