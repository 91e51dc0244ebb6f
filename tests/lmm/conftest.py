"""One tiny LLaVA-NeXT of random weights for all tests of this folder."""

import numpy as np
import pytest
import torch
from PIL import Image

from lmm_sae.lmm.llava import Subject
from lmm_sae.lmm.sae import Sae
from tests.lmm import tiny_llava


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory):
  """Folder of the tiny model."""
  return tiny_llava.make(tmp_path_factory.mktemp('lmm') / 'tiny')


@pytest.fixture(scope='session')
def subject(model_folder) -> Subject:
  return Subject.load(model_folder, threads=1)


@pytest.fixture(scope='session')
def images() -> list[Image.Image]:
  """Two images of different sizes."""
  rng = np.random.default_rng(1)
  return [
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    for size in ((40, 30), (30, 56))
  ]


@pytest.fixture(scope='session')
def sae() -> Sae:
  """Random, M=40 latents of which k=5 fire, for the tiny model's width."""
  return random_sae(40, tiny_llava.WIDTH, 5)


def random_sae(latents: int, width: int, k: int, seed: int = 0) -> Sae:
  """An SAE of random weights whose latents fire on the tiny model's rows."""
  draw = torch.Generator().manual_seed(seed)

  def normal(*shape):
    return torch.randn(*shape, generator=draw)

  return Sae(
    w_enc_MD=normal(latents, width) / 4,
    b_enc_M=normal(latents) / 4,
    w_dec_MD=normal(latents, width) / 2,
    b_dec_D=normal(width) / 4,
    k=k,
  )
