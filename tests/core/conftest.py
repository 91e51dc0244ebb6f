import pytest

from lmm_sae.core.places import Place
from tests.core import store_cases


@pytest.fixture(scope='session')
def whole(tmp_path_factory):
  path = tmp_path_factory.mktemp('whole') / 'train'
  store_cases.finish(path)
  return path


@pytest.fixture(params=['local', 's3'])
def place(request, tmp_path) -> Place:
  if request.param == 'local':
    return Place.of(tmp_path / 'store')
  return Place.of(request.getfixturevalue('s3'))
