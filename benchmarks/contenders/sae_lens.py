"""SAELens: its TopKTrainingSAE under its SAETrainer.

shipped  dense activations; sparse  `use_sparse_activations`
"""

import numpy as np
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer


class Contender:
  def __init__(self, job, variant, init):
    config = TopKTrainingSAEConfig(
      d_in=job['width'],
      d_sae=job['latents'],
      k=job['k'],
      use_sparse_activations=variant == 'sparse',
      apply_b_dec_to_input=True,
    )
    self.sae = TopKTrainingSAE(config)
    options = SAETrainerConfig(
      total_training_samples=10**12,
      train_batch_size_samples=job['rows'],
      lr_end=job['lr'],
      lr=job['lr'],
    )
    self.trainer = SAETrainer(options, self.sae, iter(()))
    with torch.no_grad():
      self.sae.W_enc.copy_(torch.from_numpy(init['w_enc'].T))
      self.sae.b_enc.copy_(torch.from_numpy(init['b_enc']))
      self.sae.W_dec.copy_(torch.from_numpy(init['w_dec']))
      self.sae.b_dec.copy_(torch.from_numpy(init['b_dec']))

  def step(self, x_ND: np.ndarray) -> None:
    self.trainer._train_step(self.sae, torch.from_numpy(x_ND))
    self.trainer.n_training_steps += 1

  def wait(self) -> None:
    pass

  def params(self) -> dict[str, np.ndarray]:
    w_dec = self.sae.W_dec.detach().numpy()
    norm_M = np.linalg.norm(w_dec, axis=1)
    return {  # it selects by, and decodes with, rows of unit norm
      'w_enc': self.sae.W_enc.detach().numpy().T * norm_M[:, None],
      'b_enc': self.sae.b_enc.detach().numpy() * norm_M,
      'w_dec': w_dec / norm_M[:, None],
      'b_dec': self.sae.b_dec.detach().numpy(),
    }
