"""The environment of every test: 8 CPU devices, no accelerator, no network.

What jax and OpenMP read from the environment must stand there before they are
imported, so this file sets it and imports neither.
"""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

os.environ['JAX_PLATFORMS'] = os.environ.get('LMM_SAE_TEST_PLATFORM', 'cpu')
os.environ['XLA_FLAGS'] = ' '.join(
  (
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    # Most of the suite's JAX time is compilation: this halves it.
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
  )
).strip()
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')


@pytest.fixture
def root() -> pathlib.Path:
  """The folder that holds lmm_sae, experiments and launch."""
  return ROOT


@pytest.fixture
def config():
  """A fresh copy of the plain defaults, to be changed by the test."""
  from experiments import base

  return base.get_config()
