"""The model card of an exported SAE: README.md beside sparsify/ and saelens/.

    (folder / 'README.md').write_text(card.text(sae, step=step))

The pieces of Python in it are run, each by the library it is for, in
`launch/check_parity.sh`; `code` gives them one by one.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Protocol

from lmm_sae.sae.model import SaeConfig

LICENSE = 'unknown'  # as the hub says it; whose SAE it is decides

_TRAINED = {  # settings of training that the card names
  'rows': 'rows a step',
  'lr': 'peak learning rate',
  'warmup': 'steps of warm-up',
  'auxk': 'weight of AuxK',
  'multi_topk': 'weight of multi-TopK',
  'clip': 'clipped to a gradient norm of',
  'compute': 'products in',
  'kinds': 'token kinds trained on',
}


_FIGURES = {  # of evaluation.json, in the card's order
  'rows': 'rows',
  'fvu': 'FVU',
  'l0': 'L0',
  'dead': 'dead',
  'cosine': 'cosine',
}


class Configured(Protocol):
  """An SAE, read or yet to be read: `exports.Sae`, `layouts.Source`."""

  config: SaeConfig


_OURS = """
import numpy as np
from lmm_sae.sae import checkpoint

sae = checkpoint.load('.')
code = sae.encode(np.asarray(x))  # vals_NK, idx_NK
x_hat = sae.decode(code)
"""

_SAE_LENS = """
from sae_lens import SAE

sae = SAE.load_from_disk('saelens')
z = sae.encode(x)
x_hat = sae.decode(z)
"""

_SPARSIFY = """
from sparsify import SparseCoder

sae = SparseCoder.load_from_disk('sparsify').float()
code = sae.encode(x)  # top_acts, top_indices
x_hat = sae.decode(code.top_acts, code.top_indices)
"""

_TOPK = """
import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from safetensors.torch import load_file

arrays = load_file('saelens/sae_weights.safetensors')
sae = AutoEncoderTopK({width}, {latents}, k={k})
sae.encoder.weight.data = arrays['W_enc'].T
sae.encoder.bias.data = arrays['b_enc']
sae.decoder.weight.data = arrays['W_dec'].T
sae.b_dec.data = arrays['b_dec']
z = sae.encode(x)
x_hat = sae.decode(z)
"""

_JUMP = """
from dictionary_learning.dictionary import JumpReluAutoEncoder
from safetensors.torch import load_file

sae = JumpReluAutoEncoder({width}, {latents})
sae.load_state_dict(load_file('saelens/sae_weights.safetensors'))
sae.apply_b_dec_to_input = True
z = sae.encode(x)
x_hat = sae.decode(z)
"""

_RULES = {
  'topk': 'The {k} latents that fire most on a row are its code.',
  'batchtopk': (
    'A latent fires above its threshold; about {k} do on a row, {most} at most.'
  ),
  'jumprelu': (
    'A latent fires above its threshold; about {k} do on a row, {most} at most.'
  ),
}


def text(
  sae: Configured,
  *,
  step: int = 0,
  source: str = '',
  settings: Mapping[str, Any] | None = None,
  figures: Mapping[str, Any] | None = None,
) -> str:
  """The card, Markdown under a YAML head.

  Args:
    sae: what was exported.
    step: optimiser steps it was trained for; 0 where it is not known.
    source: where it was imported from, of an SAE that was not trained here.
    settings: of the run that trained it, as its checkpoint has them.
    figures: its tables of evaluation.json, {kind: {figure: value}}.
  """
  settings = settings or {}
  config = sae.config
  model = settings.get('acts', {}).get('model', '')
  of = f' of {_plain(model)}' if model else ''
  where = (
    f'the output of decoder layer {config.layer} (counted from 0)'
    if config.layer >= 0
    else 'a layer that is not recorded'
  )
  rule = _RULES[config.activation].format(k=config.k, most=config.most)
  parts = [
    _head(model),
    f'# A sparse autoencoder{of}',
    (
      f'It reads the residual stream: {where}, {config.width} wide, and has '
      f'{config.latents} latents. {rule}'
    ),
    '    z = A(relu(W_enc (x - b_dec) + b_enc))      x_hat = W_decᵀ z + b_dec',
    (
      'It takes rows as the model makes them: nothing is to be normalised. '
      '`probe.safetensors` in each folder has rows and what this SAE makes of '
      'them, for a reader to tell whether he reads it right.'
    ),
    _table(('', ''), _made(config, step, source, settings)),
  ]
  if figures:
    parts.append('## How good it is')
    parts.append(_figures(figures))
  parts.append('## How to load it')
  parts.append('In a copy of this folder, with `x` of shape `[rows, width]`:')
  for title, block in code(sae).items():
    parts.append(f'{title}:\n\n```python\n{block.strip()}\n```')
  lines = '\n'.join(from_hub(sae).values())
  parts.append(f'Or from the hub, as `owner/name`:\n\n```python\n{lines}\n```')
  if config.activation != 'topk':
    parts.append(
      'sparsify knows no thresholds: it refuses `sparsify/`, which is for '
      f'programs that do. Only lmm_sae cuts a row at {config.most} latents.'
    )
  return '\n\n'.join(parts) + '\n'


def code(sae: Configured) -> dict[str, str]:
  """{library: Python that loads it}; reads `x`, makes `x_hat` and a code."""
  config = sae.config
  sizes = {'width': config.width, 'latents': config.latents, 'k': config.k}
  found = {'lmm_sae': _OURS, 'SAELens': _SAE_LENS}
  if config.activation == 'topk':
    found['sparsify'] = _SPARSIFY
  more = _TOPK if config.activation == 'topk' else _JUMP
  return found | {'dictionary_learning': more.format(**sizes)}


def from_hub(sae: Configured) -> dict[str, str]:
  """{library: the line that loads it from a repository owner/name}."""
  found = {
    'lmm_sae': "sae = checkpoint.load('owner/name')",
    'SAELens': "sae = SAE.from_pretrained('owner/name', 'saelens')",
    'sparsify': "sae = SparseCoder.load_from_hub('owner/name', 'sparsify')",
  }
  return {name: found[name] for name in code(sae) if name in found}


def _head(model: str) -> str:
  """The hub's metadata."""
  lines = [
    '---',
    f'license: {LICENSE}',
    'library_name: lmm_sae',
    'tags:',
    '- sparse-autoencoder',
    '- interpretability',
    '- saelens',
    '- sparsify',
  ]
  # The hub refuses a base model that is not a repository of its own.
  local = pathlib.Path(model).exists()
  if re.fullmatch(r'[\w.-]+/[\w.-]+', model) and not local:
    lines.append(f'base_model: {model}')
  return '\n'.join([*lines, '---'])


def _made(config, step, source, settings) -> list[tuple[str, str]]:
  """(name, value) of what is known of how it came about."""
  rows = [
    ('layer', config.layer if config.layer >= 0 else 'not recorded'),
    ('width', config.width),
    ('latents', config.latents),
    ('activation', config.activation),
    ('k', config.k),
  ]
  if config.prefixes:
    rows.append(('Matryoshka prefixes', config.prefixes))
  if source:
    rows.append(('imported from', source))
  if step:
    rows.append(('optimiser steps', step))
  trained = settings.get('train', {})
  rows += [(_TRAINED[n], trained[n]) for n in _TRAINED if n in trained]
  if captured := settings.get('acts', {}).get('rows'):
    rows.append(('rows captured', captured))
  if 'seed' in settings:
    rows.append(('seed', settings['seed']))
  return [(name, _plain(value)) for name, value in rows]


def _figures(figures: Mapping[str, Any]) -> str:
  """A row for each token kind."""
  kinds = {
    kind: row
    for kind, row in figures.items()
    if isinstance(row, Mapping) and 'fvu' in row
  }
  names = [n for n in _FIGURES if any(n in row for row in kinds.values())]
  return _table(
    ('tokens', *(_FIGURES[name] for name in names)),
    [
      (_plain(kind), *(_number(row.get(name)) for name in names))
      for kind, row in kinds.items()
    ],
  )


def _table(head, rows) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _number(value: Any) -> str:
  if value is None:
    return ''
  return str(value) if isinstance(value, int) else f'{value:.4g}'


def _plain(value: Any) -> str:
  """A value on one line of a table, so that no name can break out of it."""
  if isinstance(value, list | tuple):
    return ', '.join(map(_plain, value))
  text = value if isinstance(value, str) else json.dumps(value)
  return re.sub(r'([\\`*_|<>\[\]])', r'\\\1', ' '.join(text.split()))
