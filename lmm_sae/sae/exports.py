"""SAEs that any program reads, and those of other programs.

    sae/<layer>/export/sparsify/   cfg.json, sae.safetensors
    sae/<layer>/export/saelens/    cfg.json, sae_weights.safetensors

`load` reads either layout into a `Sae` that takes and gives numpy; `write`
writes both.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from lmm_sae.core import records
from lmm_sae.sae import checkpoint, model, trainer
from lmm_sae.sae.model import Params, SaeConfig, SparseCode
from lmm_sae.sae.trainer import TrainState

FORMAT_VERSION = 1
SAELENS_VERSION = '6.54.12'  # whose layout `saelens` is

_SPARSIFY = 'sae.safetensors'
_SAELENS = 'sae_weights.safetensors'
_ROWS = 4096  # encoded at a time


@dataclasses.dataclass(frozen=True)
class Sae:
  """A trained SAE in numpy, for rows as the store holds them.

  z = A(relu(W_enc (x - b_dec) + b_enc)), x̂ = W_decᵀ z + b_dec, in float32.
  A keeps the `config.most` largest of a row, and of those what is above theta.
  """

  config: SaeConfig
  w_enc_MD: np.ndarray
  b_enc_M: np.ndarray
  w_dec_MD: np.ndarray
  b_dec_D: np.ndarray
  theta_M: np.ndarray

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
    """The parameters on the default device."""
    names = [field.name for field in dataclasses.fields(Params)]
    return Params(**{n: jnp.asarray(getattr(self, n)) for n in names})

  def encode(self, x_ND: np.ndarray, /) -> SparseCode:
    """The code of each row, in numpy; any number of rows, any float dtype.

    Raises:
      ValueError: the rows are not D wide.
    """
    if x_ND.ndim != 2 or x_ND.shape[1] != self.config.width:
      raise ValueError(
        f'rows have shape {x_ND.shape}; this SAE reads [N, {self.config.width}]'
      )
    k = self.config.most
    parts = [
      _encode(self.params, part_ND, k=k)
      for part_ND in _padded(x_ND.astype(np.float32))
    ]
    vals_NK = np.concatenate(
      [np.zeros((0, k), np.float32)] + [p[0] for p in parts]
    )
    idx_NK = np.concatenate(
      [np.zeros((0, k), np.int32)] + [p[1] for p in parts]
    )
    return SparseCode(vals_NK[: len(x_ND)], idx_NK[: len(x_ND)])

  def decode(self, code: SparseCode, /) -> np.ndarray:
    """The rows x̂ that a code stands for, float32 [N, D]."""
    x_ND = np.tile(self.b_dec_D, (len(code.idx_NK), 1))
    for j in range(code.idx_NK.shape[1]):
      x_ND += code.vals_NK[:, j, None] * self.w_dec_MD[code.idx_NK[:, j]]
    return x_ND


def of(config: SaeConfig, state: TrainState) -> Sae:
  """The SAE of a training state, for rows as the store holds them."""
  params = trainer.export_params(state)
  return Sae(config, **dataclasses.asdict(params))


@functools.partial(jax.jit, static_argnames='k')
def _encode(params, x_ND, *, k):
  return model.fire(params, model.encode(params, x_ND, k=k))


def _padded(x_ND: np.ndarray):
  """Pieces of at most 4096 rows; the last padded to a power of two.

  So few shapes are compiled, whatever comes.
  """
  for start in range(0, len(x_ND), _ROWS):
    part_ND = x_ND[start : start + _ROWS]
    rows = 1 << (len(part_ND) - 1).bit_length()
    yield np.pad(part_ND, ((0, rows - len(part_ND)), (0, 0)))


def write(sae: Sae, path: str | os.PathLike, *, step: int = 0) -> None:
  """Writes both layouts under `path`, whole or not at all."""
  path = pathlib.Path(path)
  part = path.with_name(path.name + '.part')
  shutil.rmtree(part, ignore_errors=True)
  config = sae.config
  cfg = {
    'format_version': FORMAT_VERSION,
    'activation': config.activation,
    'd_in': config.width,
    'num_latents': config.latents,
    'expansion_factor': config.latents // config.width,
    'k': config.most,
    'mean_k': config.k,
    'prefixes': list(config.prefixes),
    'normalize_decoder': True,
    'multi_topk': False,
    'skip_connection': False,
    'transcode': False,
    'layer': config.layer,
    'dead_after': config.dead_after,
    'step': step,
  }
  tensors = {
    'encoder.weight': sae.w_enc_MD,
    'encoder.bias': sae.b_enc_M,
    'W_dec': sae.w_dec_MD,
    'b_dec': sae.b_dec_D,
  }
  jumps = config.activation != 'topk'
  if jumps:
    tensors['threshold'] = sae.theta_M
  _write(part / 'sparsify', cfg, _SPARSIFY, tensors)
  cfg = {
    'architecture': 'jumprelu' if jumps else 'topk',
    'd_in': config.width,
    'd_sae': config.latents,
    'k': config.most,
    'mean_k': config.k,
    'activation': config.activation,
    'prefixes': list(config.prefixes),
    'dtype': 'float32',
    'device': 'cpu',
    'apply_b_dec_to_input': True,
    'rescale_acts_by_decoder_norm': False,
    'normalize_activations': 'none',
    'reshape_activations': 'none',
    'format_version': FORMAT_VERSION,
    'layer': config.layer,
    'metadata': {
      'sae_lens_version': SAELENS_VERSION,
      'hf_hook_name': f'model.layers.{config.layer}',
      'hook_name': f'blocks.{config.layer}.hook_resid_post',
    },
  }
  tensors = {
    'W_enc': sae.w_enc_MD.T,
    'b_enc': sae.b_enc_M,
    'W_dec': sae.w_dec_MD,
    'b_dec': sae.b_dec_D,
  }
  if jumps:
    tensors['threshold'] = sae.theta_M
  _write(part / 'saelens', cfg, _SAELENS, tensors)
  shutil.rmtree(path, ignore_errors=True)
  part.rename(path)


def _write(path, cfg, name, tensors):
  path.mkdir(parents=True)
  tensors = {key: np.ascontiguousarray(t) for key, t in tensors.items()}
  save_file(tensors, path / name)
  records.write_json(path / 'cfg.json', cfg)


def load(path: str | os.PathLike, layer: int | None = None) -> Sae:
  """The SAE of an export, of a workdir's sae/<layer>, or of another program.

  Args:
    path: a folder in the sparsify or the SAELens layout, or one that holds such
      a folder as `sparsify` or `export/sparsify`.
    layer: the decoder layer that it reads, where the folder does not say.

  Raises:
    ValueError: there is none, or it is not a TopK SAE that this program reads.
  """
  path = pathlib.Path(path)
  for folder in (path, path / 'sparsify', path / 'export' / 'sparsify'):
    cfg_file = folder / 'cfg.json'
    if cfg_file.exists() and (folder / _SPARSIFY).exists():
      return _read(folder, _SPARSIFY, layer)
    if cfg_file.exists() and (folder / _SAELENS).exists():
      return _read(folder, _SAELENS, layer)
  hint = (
    'run `lmm-sae train` to its end'
    if checkpoint.steps(path)
    else 'check the path'
  )
  raise ValueError(
    f'{path} holds no SAE (cfg.json beside {_SPARSIFY} or {_SAELENS}): {hint}'
  )


def _read(folder: pathlib.Path, name: str, layer: int | None) -> Sae:
  cfg = json.loads((folder / 'cfg.json').read_text())
  checkpoint.check_version(
    folder, cfg.get('format_version', FORMAT_VERSION), FORMAT_VERSION
  )
  kind = cfg.get('activation', cfg.get('architecture', 'topk'))
  unread = [key for key in ('skip_connection', 'transcode') if cfg.get(key)]
  if cfg.get('normalize_activations', 'none') != 'none':
    unread.append('normalize_activations')
  if cfg.get('rescale_acts_by_decoder_norm'):
    unread.append('rescale_acts_by_decoder_norm')
  if not cfg.get('apply_b_dec_to_input', True):
    unread.append('apply_b_dec_to_input=false')
  if kind not in model.ACTIVATIONS or unread:
    raise ValueError(
      f'{folder} holds a {kind} SAE {unread or ""}: only plain ones are read, '
      f'of {", ".join(model.ACTIVATIONS)}'
    )
  tensors = load_file(folder / name)
  wanted = ['encoder.weight', 'encoder.bias', 'W_dec', 'b_dec']
  if name == _SAELENS:
    wanted[:2] = ['W_enc', 'b_enc']
  if kind != 'topk':
    wanted.append('threshold')
  missing = [key for key in wanted if key not in tensors]
  if missing or 'k' not in cfg:
    raise ValueError(f'{folder} lacks {", ".join(missing) or "k in cfg.json"}')
  w_enc, b_enc, w_dec, b_dec, *theta = (
    tensors[key].astype(np.float32) for key in wanted
  )
  w_enc_MD = np.ascontiguousarray(w_enc.T) if name == _SAELENS else w_enc
  config = SaeConfig(
    layer=cfg.get('layer', -1) if layer is None else layer,
    width=w_enc_MD.shape[1],
    latents=w_enc_MD.shape[0],
    k=cfg['k'] if kind == 'topk' else cfg.get('mean_k', cfg['k']),
    dead_after=cfg.get('dead_after', 10_000_000),
    activation=kind,
    row_k=0 if kind == 'topk' else cfg['k'],
    prefixes=tuple(cfg.get('prefixes', ())),
  )
  theta_M = theta[0] if theta else np.zeros_like(b_enc)
  return Sae(config, w_enc_MD, b_enc, w_dec, b_dec, theta_M)
