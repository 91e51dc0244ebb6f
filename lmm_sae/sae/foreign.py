"""What the settings of other programs' SAEs mean: one reader a layout.

Each takes (settings, tensors by name, folder, root) and gives a `Plan`, or says
what of it this program does not do.
"""

import dataclasses
import math
import pathlib
import re
from typing import Any

from lmm_sae.sae import model, tensors
from lmm_sae.sae.tensors import Tensor

Settings = dict[str, Any]

FORMAT_VERSION = 1

SPARSIFY = 'sae.safetensors'
SAELENS = 'sae_weights.safetensors'
LEARNING = 'ae.pt'
SETTINGS = {SPARSIFY: 'cfg.json', SAELENS: 'cfg.json', LEARNING: 'config.json'}

# Latents that may fire on one row where a layout has thresholds and no bound.
MOST = 1024

_SCALER = 'activation_scaler.json'  # of a SAELens training checkpoint


@dataclasses.dataclass
class Plan:
  """What a layout says of an SAE, before it is checked against its tensors.

  Attributes:
    names: those of w_enc_MD, b_enc_M, w_dec_MD, b_dec_D and theta_M; the last
      is '' where there is none, and may be one number for all latents.
    across: matrices that stand there the other way round.
    config: fields of SaeConfig besides width and latents.
    sides: (D, M) that the settings claim; None where they are silent.
    dtype: name of the dtype that they claim; ''.
    gain: tensor that z is multiplied with before it is decoded; ''.
    centred: b_dec is subtracted from x.
    by_norm: z is multiplied with the norm of the decoder row before A, and
      divided by it before it is decoded.
    scale: that x is multiplied with.
    spare: other tensors that need not be read.
  """

  names: list[str]
  across: tuple[str, ...]
  config: dict[str, Any]
  sides: tuple[int | None, int | None]
  dtype: str = ''
  gain: str = ''
  centred: bool = True
  by_norm: bool = False
  scale: float = 1.0
  spare: tuple[str, ...] = ()


def sparsify(cfg: Settings, found, folder: pathlib.Path, root) -> Plan:
  """The layout of EleutherAI's sparsify, and of our exports."""
  _version(cfg, folder)
  kind = cfg.get('activation') or 'topk'
  _plain(cfg, kind, folder, ('skip_connection', 'transcode', 'signed'))
  width = _count(cfg, 'd_in', folder, None)
  latents = _count(cfg, 'num_latents', folder, None, least=0)
  if latents == 0:  # sparsify: d_in times the factor
    factor = _count(cfg, 'expansion_factor', folder)
    latents = None if width is None else width * factor
  names = ['encoder.weight', 'encoder.bias', 'W_dec', 'b_dec']
  return Plan(
    [*names, '' if kind == 'topk' else 'threshold'],
    (),
    _config(cfg, kind, folder, _layer(cfg, folder)),
    (width, latents),
  )


def saelens(cfg: Settings, found, folder: pathlib.Path, root) -> Plan:
  """The layout of SAELens, and of our exports."""
  _version(cfg, folder)
  said = cfg.get('architecture', 'standard')
  kind = cfg.get('activation') or said  # ours says how a JumpReLU was trained
  old = cfg.get('activation_fn', cfg.get('activation_fn_str'))
  if said == 'standard' and old == 'topk':  # before version 6
    kind = 'topk'
    cfg = {**(_table(cfg, 'activation_fn_kwargs', folder)), **cfg}
  _plain(cfg, kind, folder, ())
  scale = _normalised(cfg, folder, root)
  if cfg.get('reshape_activations', 'none') not in ('none', None):
    raise ValueError(
      f'{folder}: reshape_activations is {cfg["reshape_activations"]!r}: it '
      'reads the heads of an attention layer, not the residual stream'
    )
  hook = _table(cfg, 'metadata', folder).get('hook_name', cfg.get('hook_name'))
  theta = '' if kind == 'topk' else 'threshold'
  if 'threshold' not in found and 'topk_threshold' in found:
    theta = 'topk_threshold' if theta else ''
  gain, spare = _gain(cfg, found, folder)
  if kind == 'topk':
    spare += ('topk_threshold',)
  return Plan(
    ['W_enc', 'b_enc', 'W_dec', 'b_dec', theta],
    ('w_enc_MD',),
    _config(cfg, kind, folder, _layer(cfg, folder, hook)),
    (_count(cfg, 'd_in', folder, None), _count(cfg, 'd_sae', folder, None)),
    dtype=_dtype(cfg, folder),
    gain=gain,
    centred=_flag(cfg, 'apply_b_dec_to_input', folder, True),
    by_norm=_flag(cfg, 'rescale_acts_by_decoder_norm', folder, False),
    scale=scale,
    spare=spare,
  )


def learning(cfg: Settings, found, folder: pathlib.Path, root) -> Plan:
  """The layout of dictionary_learning: config.json has a table `trainer`."""
  said = _table(cfg, 'trainer', folder)
  kind = said.get('dict_class')
  place = str(said.get('submodule_name'))[:80]
  io = _table(cfg, 'buffer', folder).get('io')
  if re.search('mlp|attn|attention', place) or io not in (None, 'out'):
    raise ValueError(
      f'{folder} reads {place!r} ({_short(io)}), not the output of a decoder '
      'layer'
    )
  layer = _count(said, 'layer', folder, None, least=0)
  claims = (
    _count(said, 'activation_dim', folder, None),
    _count(said, 'dict_size', folder, None),
  )
  linear = ['encoder.weight', 'encoder.bias', 'decoder.weight', 'b_dec']
  apart = ['W_enc', 'b_enc', 'W_dec', 'b_dec', 'threshold']
  spare = ('k', 'threshold', 'group_sizes')
  if kind == 'JumpReluAutoEncoder':
    config = _config({}, 'jumprelu', folder, layer)
    # As version 0.1.0: f = relu(pre) where pre > theta; x is not centred.
    return Plan(apart, ('w_enc_MD',), config, claims, centred=False)
  said = said | {'k': _held(said, found, folder)}
  if kind == 'AutoEncoderTopK':
    config = _config(said, 'topk', folder, layer)
    return Plan([*linear, ''], ('w_dec_MD',), config, claims, spare=spare)
  if kind == 'BatchTopKSAE':
    config = _config(said, 'batchtopk', folder, layer)
    names = [*linear, 'threshold']
    return Plan(names, ('w_dec_MD',), config, claims, spare=spare)
  if kind == 'MatryoshkaBatchTopKSAE':
    config = _config(said, 'batchtopk', folder, layer)
    return Plan(apart, ('w_enc_MD',), config, claims, spare=spare)
  raise ValueError(
    f'{folder}: dict_class is {_short(kind)}; read are AutoEncoderTopK, '
    'BatchTopKSAE, MatryoshkaBatchTopKSAE and JumpReluAutoEncoder'
  )


READERS = {SPARSIFY: sparsify, SAELENS: saelens, LEARNING: learning}


def hooked(name: str) -> tuple[int | None, str]:
  """(decoder layer whose output is meant, what is meant instead) of a hook.

  `model.layers.24` and `blocks.24.hook_resid_post` are (24, ''); what comes
  into a layer came out of the one before; `layers.24.mlp` is (None, itself).
  """
  if found := re.fullmatch(r'(?:.*\.)?layers\.(\d{1,4})', name):
    return int(found[1]), ''
  if found := re.fullmatch(r'blocks\.(\d{1,4})\.hook_resid_(pre|post)', name):
    layer = int(found[1]) - (found[2] == 'pre')
    return (layer, '') if layer >= 0 else (None, name)
  if re.match(r'(?:.*\.)?(?:layers|blocks)\.\d+\.', name):
    return None, name
  return None, ''


def _version(cfg: Settings, folder) -> None:
  version = cfg.get('format_version', FORMAT_VERSION)
  if version != FORMAT_VERSION:
    raise ValueError(
      f'{folder} has format_version {_short(version)}; this program reads '
      f'{FORMAT_VERSION}'
    )


def _plain(cfg: Settings, kind: Any, folder, refused: tuple[str, ...]) -> None:
  if kind not in model.ACTIVATIONS:
    raise ValueError(
      f'{folder} holds a {_short(kind)} SAE; read are those of '
      f'{", ".join(model.ACTIVATIONS)}'
    )
  if more := [key for key in refused if cfg.get(key)]:
    raise ValueError(
      f'{folder} sets {", ".join(more)}: it computes more than a plain SAE, '
      'and is not read'
    )


def _config(cfg: Settings, kind: str, folder, layer: int | None) -> Settings:
  """Fields of SaeConfig: how many fire, and what else ours note."""
  config = {
    'layer': -1 if layer is None else layer,
    'activation': kind,
    'dead_after': _count(cfg, 'dead_after', folder, 10_000_000),
    'prefixes': tuple(_counts(cfg, 'prefixes', folder)),
  }
  if kind == 'topk':
    return config | {'k': _count(cfg, 'k', folder)}
  if 'mean_k' in cfg:  # ours: k is how many may fire on one row
    row_k = _count(cfg, 'k', folder)
    return config | {'k': _count(cfg, 'mean_k', folder), 'row_k': row_k}
  # Thresholds alone decide there: `layouts` bounds a row by the latents.
  mean = cfg.get('k')
  if mean is not None and (type(mean) not in (int, float) or not mean > 0):
    raise ValueError(f'{folder}: k is {_short(mean)}; it must be above 0')
  return config | {
    'k': None if mean is None else math.ceil(mean),
    'row_k': None,
  }


def bounded(config: Settings, latents: int) -> Settings:
  """The fields with a bound of what may fire on one row, where there is none.

  A layout of thresholds has no such bound: 4 k, of which 1024 are always
  allowed. `Sae.encode` says where a row reached it.
  """
  if config.get('row_k', 0) is not None:
    return config
  k = config['k']
  row_k = min(latents, max(4 * (k or 0), MOST))
  return config | {'k': k or max(row_k // 4, 1), 'row_k': row_k}


def _layer(cfg: Settings, folder: pathlib.Path, hook: Any = None) -> int | None:
  """The layer that the settings, the hook or the folder's name say.

  Raises:
    ValueError: they say that it reads something else.
  """
  if 'layer' in cfg:
    return _count(cfg, 'layer', folder, least=-1)
  for name in (hook, folder.resolve().name):
    if isinstance(name, str):
      layer, other = hooked(name[:200])
      if other:
        raise ValueError(
          f'{folder} reads {other}, not the output of a decoder layer'
        )
      if layer is not None:
        return layer
  return None


def _normalised(cfg: Settings, folder: pathlib.Path, root) -> float:
  """What x is multiplied with before a SAELens SAE reads it."""
  how = cfg.get('normalize_activations') or 'none'
  if how == 'none':
    return 1.0
  if how == 'expected_average_only_in' and (folder / _SCALER).exists():
    scale = tensors.read_json(folder / _SCALER, root).get('scaling_factor')
    if type(scale) not in (int, float) or not 1e-30 < scale < 1e30:
      raise ValueError(f'{folder / _SCALER}: scaling_factor is {_short(scale)}')
    return float(scale)
  why = {
    'expected_average_only_in': f'the factor is not in the folder ({_SCALER}): '
    'fold it with SAELens (fold_activation_norm_scaling_factor) first',
    'constant_norm_rescale': 'each row is divided by its own length, which no '
    'weights can do',
    'layer_norm': 'each row is divided by its own deviation, which no weights '
    'can do',
  }.get(how if isinstance(how, str) else '', 'it is not known here')
  raise ValueError(f'{folder}: normalize_activations is {_short(how)}: {why}')


def _gain(cfg: Settings, found, folder) -> tuple[str, tuple[str, ...]]:
  """(the tensor that SAELens multiplies z with, tensors that do nothing)."""
  names = [
    name
    for name in ('finetuning_scaling_factor', 'scaling_factor')
    if name in found
  ]
  if _flag(cfg, 'finetuning_scaling_factor', folder, False):
    if not names:
      raise ValueError(f'{folder} lacks finetuning_scaling_factor')
    return names[0], tuple(names[1:])
  for name in names:
    if not isinstance(found[name], Tensor) or (found[name].read() != 1).any():
      raise ValueError(
        f'{folder} has {name}, but finetuning_scaling_factor is off: is it to '
        'be applied?'
      )
  return '', tuple(names)


def _dtype(cfg: Settings, folder) -> str:
  said = cfg.get('dtype', '')
  if not isinstance(said, str):
    raise ValueError(f'{folder}: dtype is {_short(said)}')
  return said.removeprefix('torch.')


def _held(said: Settings, found, folder) -> Any:
  """k of the settings, which the tensor `k` may not contradict."""
  tensor = found.get('k')
  if isinstance(tensor, Tensor) and tensor.shape in ((), (1,)):
    k = tensor.read().reshape(()).item()
    if said.get('k', k) != k:
      raise ValueError(
        f'{folder}: k is {_short(said["k"])} in the settings, {k} as a tensor'
      )
    return k
  return said.get('k')


def _count(
  cfg: Settings, key: str, folder, *default: int | None, least: int = 1
) -> Any:
  """A whole number of the settings."""
  value = cfg.get(key)
  if value is None and default:
    return default[0]
  if value is None:
    raise ValueError(f'{folder} lacks {key} in its settings')
  if type(value) is float and value.is_integer():
    value = int(value)
  if type(value) is not int or not least <= value < 1 << 53:
    raise ValueError(
      f'{folder}: {key} is {_short(value)}; it must be a whole number, at '
      f'least {least}'
    )
  return value


def _counts(cfg: Settings, key: str, folder) -> list[int]:
  values = cfg.get(key, [])
  if not isinstance(values, list) or any(type(x) is not int for x in values):
    raise ValueError(f'{folder}: {key} is {_short(values)}')
  return values


def _flag(cfg: Settings, key: str, folder, default: bool) -> bool:
  value = cfg.get(key, default)
  if type(value) is not bool:
    raise ValueError(f'{folder}: {key} is {_short(value)}, not true or false')
  return value


def _table(cfg: Settings, key: str, folder) -> Settings:
  value = cfg.get(key) or {}
  if not isinstance(value, dict):
    raise ValueError(f'{folder}: {key} is {_short(value)}, no table')
  return value


def _short(value: Any) -> str:
  return repr(value)[:80]
