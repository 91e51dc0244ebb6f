"""Captures that are killed at any moment, and captures that are shared."""

import functools
import subprocess
import sys

import pytest
from absl import logging

from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import capture
from tests import conftest
from tests.lmm import tiny_llava
from tests.stages import capture_killed, captures


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  folder = tmp_path_factory.mktemp('capture')
  model = tiny_llava.make(folder / 'tiny')
  config = captures.config_of(model, captures.make_data(folder))
  config.capture.mix = True
  config.capture.keep = ('all', 'bos', 'tile:0.5')
  config.capture.store = 'int8'
  return config.lock()


@pytest.fixture(scope='module')
def whole(settings, tmp_path_factory):
  """A capture in one go: the content of every file."""
  workdir = Workdir.of(tmp_path_factory.mktemp('whole'))
  capture.run(settings, workdir)
  return captures.digest(workdir)


@pytest.fixture(scope='module')
def begun(settings, tmp_path_factory):
  """A folder of captures that are not finished; see `capture_killed`."""
  folder = tmp_path_factory.mktemp('begun')
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'tests.stages.capture_killed'),
      *(settings.to_json(), str(folder)),
    ],
    cwd=conftest.ROOT,
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return folder


@pytest.mark.parametrize('moment', capture_killed.MOMENTS)
def test_a_killed_capture_resumes_byte_for_byte(settings, whole, begun, moment):
  workdir = Workdir.of(begun / moment)
  assert captures.digest(workdir) != whole
  capture.run(settings, workdir)
  assert captures.digest(workdir) == whole


def test_shares_at_once_and_later_end_in_the_same_bytes(
  settings, whole, begun, caplog
):
  workdir = Workdir.of(begun / 'shared')
  for name in ('train', 'a', 'b'):
    store = ActivationStore.open(workdir.acts(name), partial=True)
    wanted = {at for at in range(store.layout.groups) if at % 3 < 2}
    assert store.committed() == wanted
  last = settings.copy_and_resolve_references()
  last.capture.share = '2/3'
  capture.run(last, workdir)
  assert captures.digest(workdir) == whole


def test_two_commands_at_once_end_in_the_same_bytes(whole, begun):
  assert captures.digest(Workdir.of(begun / 'twice')) == whole


def test_a_share_says_what_others_owe(settings, tmp_path, caplog):
  logging.get_absl_logger().addHandler(caplog.handler)
  logging.set_verbosity(logging.INFO)
  try:
    first = settings.copy_and_resolve_references()
    first.capture.share = '0/2'
    capture.run(first, Workdir.of(tmp_path))
  finally:
    logging.get_absl_logger().removeHandler(caplog.handler)
  assert "share='0/2'" in caplog.text
  assert 'others still owe: 1 of train' in caplog.text


def test_a_process_that_is_killed_is_replaced(
  settings, whole, tmp_path, monkeypatch
):
  (tmp_path / 'died').mkdir()
  dies = functools.partial(
    capture_killed.die_in_turn,
    str(tmp_path / 'died'),
    [('before-commit', capture_killed.kill)],
  )
  monkeypatch.setattr(capture, 'make_group', dies)
  both = settings.copy_and_resolve_references()
  both.capture.processes = 2
  workdir = Workdir.of(tmp_path / 'run')
  capture.run(both, workdir)
  assert list((tmp_path / 'died').iterdir())
  assert captures.digest(workdir) == whole
