"""Writes one checkpoint with as many processes as the environment names.

python -m tests.stages.save_together WORKDIR
"""

import pathlib
import sys

import jax
import numpy as np

from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import hosts, mesh, trainer
from lmm_sae.sae.checkpoint import Checkpoints, Note
from lmm_sae.sae.hosts import HostsConfig
from tests.sae import small
from tests.sae.small import CONFIG, LAYER

STEP, FVU = 5, 0.25
SETTINGS = {'sae': dict(vars(CONFIG)), 'seed': 0}


def main(root: str) -> None:
  """Saves the state before the first step, latents over two devices each."""
  with hosts.joined(HostsConfig('auto', 60, 60)):
    grid = mesh.make(0, latent=2)
    state = trainer.start(CONFIG, small.rows(50), 0, normalise=True)
    state = mesh.put(state, mesh.sharding(grid, trainer.specs()))
    places_S2 = np.array([[2, 7], [1, 30]], np.int32)
    places_S2 = mesh.put(places_S2, mesh.sharding(grid, mesh.WHOLE))
    with Checkpoints(Workdir.of(root).sae(LAYER), keep=1) as checkpoints:
      checkpoints.save(state, Note(STEP, SETTINGS, FVU), places_S2)
      checkpoints.wait()
    jax.block_until_ready(state)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]).as_posix())
