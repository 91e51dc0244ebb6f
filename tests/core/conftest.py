import uuid

import pytest

from lmm_sae.core.places import Place
from tests.core import fake_gcs, store_cases


@pytest.fixture(scope='session')
def whole(tmp_path_factory):
  path = tmp_path_factory.mktemp('whole') / 'train'
  store_cases.finish(path)
  return path


@pytest.fixture(scope='session')
def gcs():
  """A server of Google Cloud Storage, which the environment names."""
  with fake_gcs.serve():
    yield


@pytest.fixture
def gs(gcs) -> str:
  """A prefix of a bucket on that server."""
  return f'gs://{fake_gcs.BUCKET}/{uuid.uuid4().hex}'


@pytest.fixture(params=['local', 's3', 'gs'])
def place(request, tmp_path) -> Place:
  if request.param == 'local':
    return Place.of(tmp_path / 'store')
  return Place.of(request.getfixturevalue(request.param))
