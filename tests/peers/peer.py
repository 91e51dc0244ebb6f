"""What another SAE library does, in that library's own environment.

    benchmarks/.envs/LIBRARY/bin/python tests/peers/peer.py save LIBRARY FOLDER
    benchmarks/.envs/LIBRARY/bin/python tests/peers/peer.py run LIBRARY FOLDER

`save` makes each of the library's cases a folder with the SAE as the library
itself writes it (FOLDER/CASE/sae) and what the library says of some rows
(FOLDER/CASE/said.npz: x_ND, z_NM, x_hat_ND). `run` goes to each folder below
FOLDER that has a LIBRARY.py, runs that piece of Python there with rows `x` from
rows.npy, and writes what it made of them to LIBRARY.npz, or LIBRARY.error.

Nothing of lmm_sae is imported here: the libraries need torch.
"""

import json
import os
import pathlib
import sys
import traceback

import numpy as np
import torch

N, D, M, K = 37, 24, 100, 5


def random(*shape: int, seed: int) -> torch.Tensor:
  """Normal numbers, the same in every environment."""
  rng = np.random.default_rng(seed)
  return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def fill(w_enc_MD, b_enc_M, w_dec_MD, b_dec_D, *, norms=False, sparse=False):
  """Draws the arrays of an SAE in place.

  Args:
    norms: decoder rows of norms .3 to 3, else of norm 1.
    sparse: biases so low that fewer than k latents are positive on many rows.
  """
  latents, width = w_enc_MD.shape
  w_dec = random(latents, width, seed=1)
  w_dec /= w_dec.norm(dim=1, keepdim=True)
  if norms:
    w_dec *= torch.linspace(0.3, 3, latents)[:, None]
  w_enc_MD.copy_(random(latents, width, seed=2) / width**0.5)
  b_enc_M.copy_(random(latents, seed=3) * 0.3 - (2.0 if sparse else 0.0))
  w_dec_MD.copy_(w_dec)
  b_dec_D.copy_(random(width, seed=4))


def sparsify_cases():
  """Yields (name, save, encode, decode) of eai-sparsify."""
  from sparsify import SparseCoder, SparseCoderConfig

  sized = {'num_latents': M, 'k': K}
  for name, cfg, filled, dtype in (
    ('topk', sized, {}, torch.float32),
    ('norms', sized | {'normalize_decoder': False}, {'norms': True},
     torch.float32),
    ('sparse', sized, {'sparse': True}, torch.float32),
    ('k1', sized | {'k': 1}, {}, torch.float32),
    ('expansion', {'expansion_factor': 4, 'k': K}, {}, torch.float32),
    ('bfloat16', sized, {'norms': True}, torch.bfloat16),
    ('float16', sized, {}, torch.float16),
  ):  # fmt: skip
    sae = SparseCoder(D, SparseCoderConfig(**cfg))
    fill(sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec, **filled)
    sae = sae.to(dtype)

    def save(path, sae=sae):
      sae.save_to_disk(path)
      return SparseCoder.load_from_disk(path).float()

    def encode(sae, x):
      code = sae.encode(x)
      z = torch.zeros(len(x), sae.num_latents)
      return z.scatter_(1, code.top_indices, code.top_acts)

    def decode(sae, x):
      code = sae.encode(x)
      return sae.decode(code.top_acts, code.top_indices)

    yield name, save, encode, decode


def sae_lens_cases():
  """Yields (name, save, encode, decode) of sae-lens."""
  from sae_lens import SAE
  from sae_lens.saes import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
  )

  topk = TopKSAE, TopKSAEConfig, {'k': K}
  jump = JumpReLUSAE, JumpReLUSAEConfig, {}
  batch = BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {'k': 4.5}
  nested = (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    {'k': 4.5, 'matryoshka_widths': [30, M]},
  )
  norms, own, plain = {'norms': True}, 'save_model', 'save_inference_model'
  outside = {'apply_b_dec_to_input': False}
  for name, (kind, config, base), more, filled, how in (
    ('topk', topk, {}, {}, own),
    ('topk_norms', topk, {}, norms, own),
    ('topk_sparse', topk, {}, {'sparse': True}, own),
    ('topk_rescaled', topk, {'rescale_acts_by_decoder_norm': True}, norms, own),
    ('topk_outside', topk, outside, norms, own),
    ('topk_bfloat16', topk, {'dtype': 'bfloat16'}, norms, own),
    ('topk_trained', (TopKTrainingSAE, TopKTrainingSAEConfig, {'k': K}), {},
     norms, plain),
    ('jumprelu', jump, {}, {}, own),
    ('jumprelu_outside', jump, outside, norms, own),
    ('jumprelu_dense', jump, {}, norms, own),
    ('jumprelu_bfloat16', jump, {'dtype': 'bfloat16'}, {}, own),
    ('jumprelu_trained', (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {}),
     {}, norms, plain),
    ('batchtopk', batch, {}, norms, plain),
    ('batchtopk_plain', batch, {'rescale_acts_by_decoder_norm': False}, norms,
     plain),
    ('matryoshka', nested, {}, norms, plain),
    ('topk_training', (TopKTrainingSAE, TopKTrainingSAEConfig, {'k': K}), {},
     norms, own),
    ('batchtopk_training', batch, {}, norms, own),
  ):  # fmt: skip
    sae = kind(config(d_in=D, d_sae=M, **base, **more))
    w_enc_MD, w_dec_MD = torch.empty(M, D), torch.empty(M, D)
    b_enc_M, b_dec_D = torch.empty(M), torch.empty(D)
    fill(w_enc_MD, b_enc_M, w_dec_MD, b_dec_D, **filled)
    sae.W_enc.copy_(w_enc_MD.T)
    sae.b_enc.copy_(b_enc_M)
    sae.W_dec.copy_(w_dec_MD)
    sae.b_dec.copy_(b_dec_D)
    if hasattr(sae, 'threshold'):
      low = 0.01 if name == 'jumprelu_dense' else 0.8
      sae.threshold.copy_(torch.linspace(low, 2 * low, M))
    if hasattr(sae, 'topk_threshold'):
      sae.topk_threshold.fill_(1.9)

    def save(path, sae=sae, how=how, name=name):
      getattr(sae, how)(path)
      if name.endswith('_training'):  # what it does once training is over
        path = path.with_name('after')
        sae.save_inference_model(path)
      return SAE.load_from_disk(path, dtype='float32')

    yield (
      name,
      save,
      lambda sae, x: sae.encode(x),
      lambda sae, x: sae.decode(sae.encode(x)),
    )


def dictionary_learning_cases():
  """Yields (name, save, encode, decode) of dictionary-learning.

  Saved as its `training.trainSAE` does: ae.pt beside config.json.
  """
  from dictionary_learning.dictionary import JumpReluAutoEncoder
  from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
  from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKSAE,
  )
  from dictionary_learning.trainers.top_k import AutoEncoderTopK
  from dictionary_learning.utils import load_dictionary

  for name, sae, trainer, filled, threshold in (
    ('topk', AutoEncoderTopK(D, M, K), 'TopKTrainer', {}, 0.7),
    ('topk_norms', AutoEncoderTopK(D, M, K), 'TopKTrainer', {'norms': True},
     -1.0),
    ('topk_sparse', AutoEncoderTopK(D, M, K), 'TopKTrainer', {'sparse': True},
     -1.0),
    ('batchtopk', BatchTopKSAE(D, M, K), 'BatchTopKTrainer', {}, 1.4),
    ('batchtopk_unset', BatchTopKSAE(D, M, K), 'BatchTopKTrainer', {}, -1.0),
    ('matryoshka', MatryoshkaBatchTopKSAE(D, M, K, [30, 70]),
     'MatryoshkaBatchTopKTrainer', {'norms': True}, 1.4),
    ('jumprelu', JumpReluAutoEncoder(D, M), 'JumpReluTrainer', {'norms': True},
     1.2),
  ):  # fmt: skip
    if hasattr(sae, 'encoder'):
      w_enc, b_enc = sae.encoder.weight.data, sae.encoder.bias.data
      w_dec = sae.decoder.weight.data.T
    else:
      w_enc, b_enc, w_dec = sae.W_enc.data.T, sae.b_enc.data, sae.W_dec.data
    fill(w_enc, b_enc, w_dec, sae.b_dec.data, **filled)
    sae.threshold.data.fill_(threshold)
    config = {
      'trainer': {
        'trainer_class': trainer,
        'dict_class': type(sae).__name__,
        'activation_dim': D,
        'dict_size': M,
        'k': K,
        'layer': 3,
        'lm_name': 'nobody/nothing',
      }
    }
    if name == 'jumprelu':
      del config['trainer']['k']

    def save(path, sae=sae, config=config):
      path.mkdir(parents=True)
      torch.save(sae.state_dict(), path / 'ae.pt')
      (path / 'config.json').write_text(json.dumps(config))
      back, _ = load_dictionary(str(path), 'cpu')
      return back

    yield (
      name,
      save,
      lambda sae, x: sae.encode(x),
      lambda sae, x: sae.decode(sae.encode(x)),
    )


CASES = {
  'sparsify': sparsify_cases,
  'sae_lens': sae_lens_cases,
  'dictionary_learning': dictionary_learning_cases,
}


def save(library: str, root: pathlib.Path) -> None:
  """Saves every case of a library, and what it says of rows."""
  x = random(N, D, seed=5) * 1.5
  for name, write, encode, decode in CASES[library]():
    folder = root / name
    folder.mkdir(parents=True)
    sae = write(folder / 'sae')
    np.savez(
      folder / 'said.npz',
      x_ND=x.numpy(),
      z_NM=encode(sae, x).numpy(),
      x_hat_ND=decode(sae, x).numpy(),
    )


def run(library: str, root: pathlib.Path) -> None:
  """Runs each LIBRARY.py; it reads `x` and makes `x_hat` and `z` or `code`."""
  for script in sorted(root.rglob(f'{library}.py')):
    os.chdir(script.parent)
    names = {'x': torch.from_numpy(np.load('rows.npy'))}
    try:
      exec(compile(script.read_text(), str(script), 'exec'), names)
    except Exception:  # noqa: BLE001 - what it is is for the test to judge
      script.with_suffix('.error').write_text(traceback.format_exc())
      continue
    if 'z' not in names:
      names['z'] = torch.zeros(len(names['x']), names['sae'].num_latents)
      code = names['code']
      names['z'].scatter_(1, code.top_indices, code.top_acts)
    said = {'z_NM': names['z'].numpy(), 'x_hat_ND': names['x_hat'].numpy()}
    np.savez(script.with_suffix('.npz'), **said)


if __name__ == '__main__':
  torch.set_grad_enabled(False)
  torch.set_num_threads(1)
  {'save': save, 'run': run}[sys.argv[1]](
    sys.argv[2], pathlib.Path(sys.argv[3]).absolute()
  )
