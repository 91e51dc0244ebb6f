"""stages/doctor.py."""

import hashlib

import pytest

from lmm_sae.core import config as configs
from lmm_sae.core import host
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import doctor
from tests.sae import small


@pytest.fixture(autouse=True)
def no_devices(monkeypatch, tmp_path):
  """No jax or torch is started, and the packaged models are not read."""
  monkeypatch.setattr(doctor, 'DEVICES', {})
  monkeypatch.setattr(host, 'weights', lambda: tmp_path / 'weights')


def shipped(folder, content: bytes, digest: str = ''):
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text('{}')
  (folder / 'model.safetensors').write_bytes(content)
  digest = digest or hashlib.sha256(content).hexdigest()
  (folder / 'README.md').write_text(f'| sha256 | {digest} |\n')


def text(findings) -> dict[str, str]:
  return {finding.what.strip(): finding.text for finding in findings}


def test_what_is_absent_is_said_and_is_no_failure(
  capsys, config, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    host, 'versions', lambda packages=host.PACKAGES: dict.fromkeys(packages, '')
  )
  doctor.run(config, Workdir.of(tmp_path / 'run'))
  out = capsys.readouterr().out
  assert 'cannot: torch, transformers absent' in out
  assert 'nothing was run here' in out


def test_changed_weights_are_wrong(capsys, config, tmp_path):
  shipped(tmp_path / 'weights' / 'small', b'as trained')
  shipped(tmp_path / 'weights' / 'base', b'changed', '0' * 64)
  with pytest.raises(ValueError, match='model base'):
    doctor.run(config, Workdir.of(tmp_path / 'run'))
  out = capsys.readouterr().out
  assert 'present, 1 weight files as shipped' in out
  assert 'not what its card says' in out


def test_a_workdir_shows_what_has_run(config, tmp_path):
  workdir = Workdir.of(tmp_path / 'run')
  small.write_store(workdir.acts('train'), samples=20)
  workdir.sae(2).mkdir(parents=True)
  configs.save(config, workdir)
  found = text(doctor.examine(workdir))
  assert found['capture train'] == '2 groups committed'
  assert found['capture a'] == 'not run'
  assert found['train'] == 'sae is there'
  assert found['report'] == 'not run'


def test_a_damaged_store_is_named_and_dropped(
  capsys, config, tmp_path, s3, monkeypatch
):
  monkeypatch.setattr(doctor, 'examine', lambda _: [])
  for acts in (str(tmp_path / 'acts'), s3):
    workdir = Workdir.of(tmp_path / 'run', acts)
    store = small.write_store(workdir.acts('a'))
    small.write_store(workdir.acts('b'), samples=3)
    for name in ('layer_4/c/3/0', 'box/c/6/0'):
      (store.path / name).write((store.path / name).read()[1:])
    config.doctor.drop = False
    for checksums in (True, False):
      config.doctor.checksums = checksums
      with pytest.raises(ValueError, match=r'wrong with: store a$'):
        doctor.run(config, workdir)
      out = capsys.readouterr().out
      assert f'group 1: {store.path}/layer_4/c/3/0' in out
      assert f'group 2: {store.path}/box/c/6/0' in out
      assert '2 groups are damaged' in out
      assert '3 of 3 groups committed, 400 rows' in out
      assert '1 of 1 groups committed, 30 rows' in out
    config.doctor.drop = True
    doctor.run(config, workdir)
    out = capsys.readouterr().out
    assert 'dropped groups 1, 2: run `lmm-sae capture` again' in out
    store.refresh()
    assert store.committed() == {0}
    small.write_store(workdir.acts('a'))
    doctor.run(config, workdir)
    assert '3 of 3 groups committed, 400 rows' in capsys.readouterr().out


def test_a_store_that_cannot_be_reached_is_wrong(
  capsys, config, tmp_path, s3, monkeypatch
):
  monkeypatch.setattr(doctor, 'KERNELS', 'print("none")')
  workdir = Workdir.of(tmp_path / 'run', 's3://nowhere/acts')
  configs.save(config, workdir)
  with pytest.raises(ValueError, match=r'wrong with: capture train'):
    doctor.run(config, workdir)
  assert 'the bucket s3://nowhere does not exist' in capsys.readouterr().out


def test_a_broken_framework_answers_with_its_complaint():
  assert doctor.devices('print("cpu")') == 'cpu'
  complaint = doctor.devices('raise ImportError("no driver")')
  assert complaint == 'none: ImportError: no driver'
