"""SAEs in the files of other programs, for the tests that read them."""

import json
import pathlib
import subprocess
import sys

import numpy as np
from safetensors.numpy import save_file

from lmm_sae.sae.exports import Sae
from tests.sae.small import D, K, M


def sparsify(folder, sae: Sae, stored=np.float32, **cfg) -> pathlib.Path:
  """The published layout, written by the safetensors library."""
  folder.mkdir(parents=True)
  tensors = {
    'encoder.weight': sae.w_enc_MD,
    'encoder.bias': sae.b_enc_M,
    'W_dec': sae.w_dec_MD,
    'b_dec': sae.b_dec_D,
  }
  put(folder, 'sae.safetensors', tensors, stored)
  cfg = {'expansion_factor': 2, 'num_latents': M, 'k': K, 'd_in': D} | cfg
  (folder / 'cfg.json').write_text(json.dumps(cfg))
  return folder


def saelens(folder, sae: Sae, stored=np.float32, more=None, **cfg):
  """The layout of SAELens."""
  folder.mkdir(parents=True)
  tensors = {
    'W_enc': sae.w_enc_MD.T,
    'b_enc': sae.b_enc_M,
    'W_dec': sae.w_dec_MD,
    'b_dec': sae.b_dec_D,
    **(more or {}),
  }
  put(folder, 'sae_weights.safetensors', tensors, stored)
  cfg = {
    'architecture': 'topk',
    'd_in': D,
    'd_sae': M,
    'k': K,
    'dtype': np.dtype(stored).name,
    'apply_b_dec_to_input': True,
    'normalize_activations': 'none',
    'metadata': {'hook_name': 'blocks.3.hook_resid_post', 'model_name': 'm'},
  } | cfg
  (folder / 'cfg.json').write_text(json.dumps(cfg))
  return folder


def put(folder, name, tensors, dtype) -> None:
  tensors = {
    key: np.ascontiguousarray(array).astype(dtype)
    for key, array in tensors.items()
  }
  save_file(tensors, folder / name)


# What dictionary_learning saves, by torch itself, in a process of its own.
_TORCH = """
import collections, json, pathlib, sys
import numpy as np
import torch

root = pathlib.Path(sys.argv[1])
held = np.load(root / 'sae.npz')
w_enc, b_enc, w_dec, b_dec, theta = (
  torch.from_numpy(held[name])
  for name in ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D', 'theta_M')
)
latents, width = w_enc.shape

def save(name, state, **trainer):
  folder = root / name
  folder.mkdir()
  torch.save(state, folder / 'ae.pt')
  trainer = {
    'activation_dim': width, 'dict_size': latents, 'layer': 7, **trainer
  }
  (folder / 'config.json').write_text(json.dumps({'trainer': trainer}))

class TopK(torch.nn.Module):
  def __init__(self, across, dtype=torch.float32):
    super().__init__()
    self.encoder = torch.nn.Linear(width, latents)
    self.decoder = torch.nn.Linear(latents, width, bias=False)
    self.encoder.weight.data = w_enc.to(dtype)
    self.encoder.bias.data = b_enc.to(dtype)
    turned = w_dec.T if across else w_dec.T.contiguous()
    self.decoder.weight.data = turned.to(dtype)
    self.b_dec = torch.nn.Parameter(b_dec.to(dtype))
    self.register_buffer('k', torch.tensor(3))
    self.register_buffer('threshold', torch.tensor(0.75))

save('topk', TopK(False).state_dict(), dict_class='AutoEncoderTopK', k=3)
save('across', TopK(True).state_dict(), dict_class='AutoEncoderTopK', k=3)
save('half', TopK(False, torch.bfloat16).state_dict(),
     dict_class='AutoEncoderTopK', k=3)
save('batch', TopK(True).state_dict(), dict_class='BatchTopKSAE', k=3)
save('contradicts', TopK(True).state_dict(), dict_class='BatchTopKSAE', k=4)
save('gated', TopK(True).state_dict(), dict_class='GatedAutoEncoder', k=3)
apart = {'W_enc': w_enc.T, 'b_enc': b_enc, 'W_dec': w_dec, 'b_dec': b_dec}
save('jump', {**apart, 'threshold': theta}, dict_class='JumpReluAutoEncoder')
save(
  'matryoshka',
  {**apart, 'threshold': torch.tensor(0.75), 'k': torch.tensor(3),
   'group_sizes': torch.tensor([5, 7])},
  dict_class='MatryoshkaBatchTopKSAE', k=3,
)
save('strided', {**apart, 'threshold': theta, 'W_dec': w_dec[:, ::2]},
     dict_class='JumpReluAutoEncoder')
save('whole_object', TopK(False), dict_class='AutoEncoderTopK', k=3)
folder = root / 'old_file'
folder.mkdir()
torch.save(TopK(False).state_dict(), folder / 'ae.pt',
           _use_new_zipfile_serialization=False)
(folder / 'config.json').write_text((root / 'topk/config.json').read_text())
"""


def learning(root: pathlib.Path, sae: Sae) -> pathlib.Path:
  """Folders as dictionary_learning writes them, one a kind."""
  held = {
    name: getattr(sae, name)
    for name in ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D', 'theta_M')
  }
  np.savez(root / 'sae.npz', **held)
  subprocess.run([sys.executable, '-c', _TORCH, root], check=True)
  return root


def dense(code, latents: int = M) -> np.ndarray:
  """z of a code, [N, M]."""
  z_NM = np.zeros((len(code.idx_NK), latents), np.float32)
  np.put_along_axis(z_NM, code.idx_NK, code.vals_NK, 1)
  return z_NM


def largest(z_NM: np.ndarray, k: int) -> np.ndarray:
  """z with all but the k largest of each row set to 0."""
  order_NM = np.argsort(-z_NM, 1, kind='stable')
  z_NM = z_NM.copy()
  np.put_along_axis(z_NM, order_NM[:, k:], 0, 1)
  return z_NM
