"""Writes one checkpoint with as many processes as the environment names.

python -m tests.stages.save_together WORKDIR
"""

import dataclasses
import sys

import jax
import numpy as np

from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import hosts, mesh, trainer
from lmm_sae.sae.checkpoint import Checkpoints, Note
from lmm_sae.sae.hosts import HostsConfig
from lmm_sae.sae.trainer import TrainState
from tests.sae import small

STEP, FVU = 5, 0.25
# Each process writes more than a node of OCDBT takes in: into a file.
CONFIG = dataclasses.replace(small.CONFIG, width=70, latents=48)
SETTINGS = {'sae': dict(vars(CONFIG)), 'seed': 0}


def state() -> TrainState:
  """What is saved."""
  rows_ND = np.random.default_rng(0).normal(size=(50, CONFIG.width))
  return trainer.start(CONFIG, rows_ND, 0, normalise=True)


def main(root: str) -> None:
  """Saves a state, latents over two devices, of which a process has one."""
  with hosts.joined(HostsConfig('auto', 60, 60)):
    grid = mesh.make(0, latent=2)
    laid = mesh.put(state(), mesh.sharding(grid, trainer.specs()))
    places_S2 = np.array([[2, 7], [1, 30]], np.int32)
    places_S2 = mesh.put(places_S2, mesh.sharding(grid, mesh.WHOLE))
    folder = Workdir.of(root).sae(CONFIG.layer)
    with Checkpoints(folder, keep=1) as checkpoints:
      checkpoints.save(laid, Note(STEP, SETTINGS, FVU), places_S2)
      checkpoints.wait()
    jax.block_until_ready(laid)


if __name__ == '__main__':
  main(sys.argv[1])
