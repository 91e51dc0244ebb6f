"""The folder of an export: both layouts, their settings, probe and card.

It is filled in one pass over the latents, of which a few are held at a time.
"""

import pathlib
from typing import Any

import numpy as np

from lmm_sae.core import records
from lmm_sae.sae import card, probe, tensors
from lmm_sae.sae.foreign import FORMAT_VERSION, SAELENS, SPARSIFY
from lmm_sae.sae.layouts import Source

SAELENS_VERSION = '6.54.12'  # whose layout `saelens` is


def fill(sae: Source, part: pathlib.Path, step: int, **known: Any) -> None:
  """The two layouts, in one pass over the latents, and what stands beside.

  `known` is what `card.text` is told beside the step.
  """
  config = sae.config
  one, two = part / 'sparsify', part / 'saelens'
  one.mkdir(parents=True)
  two.mkdir()
  wide, long = (config.latents, config.width), (config.latents,)
  jumps = config.activation != 'topk'
  theta = {'threshold': long} if jumps else {}
  shapes = {
    'encoder.weight': wide,
    'encoder.bias': long,
    'W_dec': wide,
    'b_dec': wide[1:],
    **theta,
  }
  across = {'W_enc': wide[::-1], 'b_enc': long}
  across |= {name: shapes[name] for name in ('W_dec', 'b_dec', *theta)}
  kept = {name: (sae.dtype, shape) for name, shape in shapes.items()}
  single = {name: (np.float32, shape) for name, shape in across.items()}
  with (
    tensors.Writer(one / SPARSIFY, kept) as sparsify,
    tensors.Writer(two / SAELENS, single) as saelens,
  ):
    for start, stop in tensors.pieces(config.latents, config.width):
      rows = sae.read('w_enc_MD', start, stop)
      sparsify.rows('encoder.weight', start, rows)
      saelens.columns('W_enc', start, rows)
      rows = sae.read('b_enc_M', start, stop)
      sparsify.rows('encoder.bias', start, rows)
      saelens.rows('b_enc', start, rows)
      for name, field in (('W_dec', 'w_dec_MD'), ('threshold', 'theta_M')):
        if name in shapes:
          rows = sae.read(field, start, stop)
          sparsify.rows(name, start, rows)
          saelens.rows(name, start, rows)
    sparsify.rows('b_dec', 0, sae.b_dec_D)
    saelens.rows('b_dec', 0, sae.b_dec_D)
  records.write_json(one / 'cfg.json', sparsify_cfg(sae, step))
  records.write_json(two / 'cfg.json', saelens_cfg(sae))
  with np.errstate(over='ignore', invalid='ignore'):
    golden = probe.make(sae)
  finite = all(np.isfinite(array).all() for array in golden.values())
  if sae.folder is not None and not finite:  # another program's
    raise ValueError(
      f'{sae.folder}: what its weights give is not finite in float32: they are '
      'too large'
    )
  for folder in (one, two):
    probe.write(folder, golden)
  (part / 'README.md').write_text(card.text(sae, step=step, **known))


def sparsify_cfg(source: Source, step: int) -> dict:
  """cfg.json of the sparsify layout; what another program set is kept."""
  config = source.config
  given = source.cfg
  if source.layout != SPARSIFY:
    given = {'source_cfg': given} if given else {}
  return {
    'expansion_factor': config.latents // config.width,
    'normalize_decoder': True,
    'multi_topk': False,
    'skip_connection': False,
    'transcode': False,
    'dead_after': config.dead_after,
    'step': step,
    **given,
    'format_version': FORMAT_VERSION,
    'activation': config.activation,
    'd_in': config.width,
    'num_latents': config.latents,
    'k': config.most,
    'mean_k': config.k,
    'prefixes': list(config.prefixes),
    'layer': config.layer,
  }


def saelens_cfg(source: Source) -> dict:
  """cfg.json of the SAELens layout; what another program set is kept."""
  config = source.config
  given = source.cfg
  if source.layout != SAELENS:
    given = {'source_cfg': given} if given else {}
  if given.get('finetuning_scaling_factor'):
    given = given | {'finetuning_scaling_factor': False}  # it is folded
  hooks = {}
  if config.layer >= 0:
    hooks = {
      'hf_hook_name': f'model.layers.{config.layer}',
      'hook_name': f'blocks.{config.layer}.hook_resid_post',
    }
  return {
    'device': 'cpu',
    'reshape_activations': 'none',
    **given,
    'architecture': 'topk' if config.activation == 'topk' else 'jumprelu',
    'd_in': config.width,
    'd_sae': config.latents,
    'k': config.most,
    'mean_k': config.k,
    'activation': config.activation,
    'prefixes': list(config.prefixes),
    'dtype': 'float32',
    'apply_b_dec_to_input': True,
    'rescale_acts_by_decoder_norm': False,
    'normalize_activations': 'none',
    'format_version': FORMAT_VERSION,
    'layer': config.layer,
    'metadata': {
      **(given.get('metadata') or {}),
      'sae_lens_version': SAELENS_VERSION,
      **hooks,
    },
  }
