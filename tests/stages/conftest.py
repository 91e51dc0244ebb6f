"""What the tests of training in processes of their own share."""

import pathlib

import pytest

from tests.sae import small


@pytest.fixture(scope='module')
def acts(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp('acts')
  small.write_store(path / 'train')
  return path


@pytest.fixture(scope='module')
def cache(tmp_path_factory) -> pathlib.Path:
  """Compiled programs, which the runs of this module share."""
  return tmp_path_factory.mktemp('cache')
