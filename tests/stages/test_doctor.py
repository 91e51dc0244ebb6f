"""stages/doctor.py."""

import hashlib

import pytest

from lmm_sae.core import config as configs
from lmm_sae.core import host
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import doctor


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
  workdir.acts('train').mkdir(parents=True)
  (workdir.acts('train') / 'manifest.jsonl').write_text('{}\n{}\n')
  workdir.sae(2).mkdir(parents=True)
  configs.save(config, workdir)
  found = text(doctor.examine(workdir))
  assert found['capture train'] == '2 groups committed'
  assert found['capture a'] == 'not run'
  assert found['train'] == 'sae is there'
  assert found['report'] == 'not run'


def test_a_broken_framework_answers_with_its_complaint():
  assert doctor.devices('print("cpu")') == 'cpu'
  complaint = doctor.devices('raise ImportError("no driver")')
  assert complaint == 'none: ImportError: no driver'
