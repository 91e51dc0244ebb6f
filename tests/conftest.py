"""The environment of every test: 8 CPU devices, no accelerator, no network.

What jax and OpenMP read from the environment must stand there before they are
imported, so this file sets it and imports neither.
"""

import logging
import os
import pathlib
import uuid

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


@pytest.fixture(scope='session')
def s3_server():
  """The address of an S3 server on loopback, with the bucket `acts`."""
  import boto3
  from moto.server import ThreadedMotoServer

  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  server = ThreadedMotoServer('127.0.0.1', port=0, verbose=False)
  server.start()
  url = 'http://{}:{}'.format(*server.get_host_and_port())
  client = boto3.client(
    's3',
    endpoint_url=url,
    region_name='us-east-1',
    aws_access_key_id='key',
    aws_secret_access_key='secret',
  )
  client.create_bucket(Bucket='acts')
  yield url
  server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch) -> str:
  """A prefix of a bucket on that server, which the environment names."""
  monkeypatch.setenv('AWS_ENDPOINT_URL', s3_server)
  monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'key')
  monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'secret')
  for name in ('AWS_ENDPOINT_URL_S3', 'AWS_PROFILE', 'AWS_SESSION_TOKEN'):
    monkeypatch.delenv(name, raising=False)
  return f's3://acts/{uuid.uuid4().hex}'


@pytest.fixture
def root() -> pathlib.Path:
  """The folder that holds lmm_sae, experiments and launch."""
  return ROOT


@pytest.fixture
def config():
  """A fresh copy of the plain defaults, to be changed by the test."""
  from experiments import base

  return base.get_config()
