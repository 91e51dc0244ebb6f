"""The benchmarks of ours, at tiny shapes, so that they cannot break unseen."""

import argparse
import json
import math
import pathlib
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from benchmarks import kernels, machine, plot, train_step, work
from lmm_sae.kernels import cost, native

SIZES = {'rows': 24, 'width': 10, 'latents': 40}
ARGS = argparse.Namespace(
  turns=2, steps=2, seed=0, alone=False, rows=24, k=3, lr=1e-2
)
OURS = ('ours native', 'ours xla')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of ours with each backend that can run here."""
  names = [n for n in OURS if n != 'ours native' or not native.why_not()]
  job = {**SIZES, 'k': 3, 'lr': 1e-2}
  folder = tmp_path_factory.mktemp('run')
  return train_step.compare(job, names, folder, ARGS), folder


def test_ours_learns_and_every_backend_ends_at_the_same_fvu(run):
  (found, folder) = run
  first = {
    name: np.load(folder / f'{name}.npy')
    for name in ('w_enc', 'b_enc', 'w_dec', 'b_dec')
  }
  rng = np.random.default_rng(ARGS.seed)
  blocks = train_step.WARM + ARGS.turns * ARGS.steps
  x_ND = work.activations(rng, blocks * 24 + work.HELD, 10)
  before = work.fvu(first, x_ND[-work.HELD :], 3)
  fvus = [one['fvu'] for one in found['results'].values()]
  assert max(fvus) - min(fvus) < 1e-4
  assert max(fvus) < before - 0.01


def test_a_result_says_how_fast_how_large_and_what_it_ran_on(run):
  found = json.loads(json.dumps(run[0]))
  assert found['settings'] == {
    **SIZES,
    'k': 3,
    'lr': 1e-2,
    'seed': 0,
    'turns': 2,
    'steps': 2,
    'alone': False,
    'tokens': 24 * 7,
  }
  for one in found['results'].values():
    low, high = one['ms_quartiles']
    assert 0 < low <= one['ms_a_step'] <= high
    assert math.isclose(one['tokens_per_s'], 24e3 / one['ms_a_step'])
    assert 0 < one['start_mb'] <= one['made_mb'] <= one['peak_mb']
    assert {'python', 'numpy', 'jax'} <= set(one['versions'])


def test_the_table_has_a_line_a_contender(run):
  lines = train_step.table(run[0]['results']).splitlines()
  assert [line[:27].strip() for line in lines[1:]] == list(run[0]['results'])


def test_a_contender_that_ends_is_told_by_its_name(tmp_path):
  job = tmp_path / 'job.json'
  job.write_text('{}')  # it has no parameters to start from
  one = train_step.Contender('ours xla', job)
  with pytest.raises(RuntimeError, match='ours xla ended'):
    one.ask('steps', 0, 1)
  one.process.wait()


def test_what_is_not_known_or_not_installed_is_refused(monkeypatch, tmp_path):
  with pytest.raises(SystemExit, match='--only names their own; it may name'):
    train_step._require(['ours xla', 'their own'])
  monkeypatch.setattr(train_step, 'HERE', tmp_path)
  with pytest.raises(SystemExit, match=r'no environment for sae_lens: run'):
    train_step._require(['ours xla', 'sae_lens'])


def test_every_contender_is_there_under_its_name():
  for name, one in (train_step.CONTENDERS | train_step.MORE).items():
    environment, module, variant, variables = one
    path = train_step.HERE / 'contenders' / f'{module}.py'
    assert 'class Contender' in path.read_text(), name
    assert variant
    assert environment in ('', 'sparsify', 'sae_lens', 'dictionary_learning')
    assert ('JAX_PLATFORMS' in variables) == (not environment)


def test_the_fvu_is_that_of_the_k_largest_latents_by_hand():
  params = {
    'w_enc': np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
    'b_enc': np.array([0.0, 0.0, -9.0]),
    'w_dec': np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]),
    'b_dec': np.zeros(2),
  }
  x_ND = np.array([[3.0, 1.0], [1.0, 4.0]])
  # Each row keeps its larger coordinate: 1² + 1² of 2 · (1² + 1.5²) is lost.
  assert math.isclose(work.fvu(params, x_ND, 1), 2 / 6.5)
  assert work.fvu(params, x_ND, 2) == 0


def test_a_sweep_is_drawn_with_its_four_panels(tmp_path):
  runs = [
    {
      'settings': {**size, 'rows': rows, 'k': k},
      'results': {
        'ours': {'tokens_per_s': 10.0 * rows},
        'a < b': {'tokens_per_s': 900.0 / k},
      },
    }
    for size in train_step.SIZES
    for rows, k in ((24, 3), (96, 3), (24, 5))
  ]
  panels = train_step.panels(runs, ARGS)
  assert [panel.title for panel in panels] == [
    'D=256, M=8192, k=3',
    'D=256, M=8192, rows=24',
    'D=512, M=16384, k=3',
    'D=512, M=16384, rows=24',
  ]
  assert panels[0].lines['ours'] == [(24, 240.0), (96, 960.0)]
  assert panels[1].lines['a < b'] == [(3, 300.0), (5, 180.0)]
  plot.write(tmp_path / 'sweep.svg', panels)
  root = ET.parse(tmp_path / 'sweep.svg').getroot()
  lines = root.findall('{http://www.w3.org/2000/svg}polyline')
  words = [x.text for x in root.iter('{http://www.w3.org/2000/svg}text')]
  assert len(lines) == 8
  assert {'ours', 'a < b', *(panel.title for panel in panels)} <= set(words)


def test_the_processor_and_its_cores_are_named():
  facts = machine.facts()
  assert facts['machine']['processor'].strip(' ,')
  assert facts['machine']['cores'] >= 1


@pytest.mark.parametrize('name', kernels.KERNELS)
def test_every_kernel_is_checked_and_timed(name):
  shape = cost.Shape(14, 12, 70, 3, 'float32')
  device = cost.Device(
    'here', 'cpu', {'float32': 1e9, 'vector': 1e9}, 1e9, memory=0
  )
  found = kernels._measure(name, kernels.Work(shape, 1), device, turns=2)
  assert 'cpu' in found
  for who, one in found.items():
    assert 'error' not in one, (who, one)
    assert math.isclose(one['fraction'], one['roofline_ms'] / one['ms'])


def test_a_kernel_that_is_wrong_is_told_and_not_timed(monkeypatch):
  w = kernels.Work(cost.Shape(14, 12, 70, 3, 'float32'), 1)
  forms, arguments, price = kernels.KERNELS['spmm']
  wrong = {'wrong': lambda v, i, w_MD: forms(w)['cpu'](v, i + 1, w_MD)}
  monkeypatch.setitem(
    kernels.KERNELS, 'spmm', (lambda w: wrong, arguments, price)
  )
  device = cost.Device('here', 'cpu', {'vector': 1e9}, 1e9, memory=0)
  found = kernels._measure('spmm', w, device, turns=1)
  assert list(found['wrong']) == ['error']


def test_the_kernels_are_written_as_json(monkeypatch, tmp_path, capsys):
  out = tmp_path / 'new' / 'kernels.json'
  monkeypatch.setattr(
    sys,
    'argv',
    [
      'kernels',
      '--shapes=14x12x70x3',
      '--turns=1',
      '--size=64',
      f'--out={out}',
    ],
  )
  kernels.main()
  found = json.loads(pathlib.Path(out).read_text())
  assert set(found['runs'][0]['kernels']) == set(kernels.KERNELS)
  assert found['peaks']['bytes_per_s'] > 0
  assert {'date', 'machine', 'versions', 'settings'} <= set(found)
  assert 'spmm_t 14x12x70x3' in capsys.readouterr().out
