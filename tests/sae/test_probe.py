"""The golden probe: what it holds, what it catches."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmm_sae.sae import exports, layouts, probe, tensors
from tests.sae import foreign_files, small
from tests.sae.small import CONFIG, D, K, M

CONFIGS = {
  'topk': CONFIG,
  'one': dataclasses.replace(CONFIG, k=1),
  'all': dataclasses.replace(CONFIG, k=M),
  'batchtopk': dataclasses.replace(CONFIG, activation='batchtopk', row_k=7),
  'jumprelu': dataclasses.replace(CONFIG, activation='jumprelu', row_k=9),
}


@pytest.fixture(params=CONFIGS)
def sae(request):
  return small.random_sae(CONFIGS[request.param])


def test_a_probe_is_what_the_sae_makes_of_its_rows(sae):
  golden = probe.make(sae)
  rows = len(golden['x_ND'])
  assert {name: a.shape for name, a in golden.items()} == {
    'x_ND': (rows, D),
    'idx_NK': (rows, sae.config.most),
    'vals_NK': (rows, sae.config.most),
    'x_hat_ND': (rows, D),
  }
  assert np.count_nonzero(golden['vals_NK']) >= rows
  code = sae.encode(golden['x_ND'])
  fired_NK = golden['vals_NK'] > 0
  np.testing.assert_array_equal(code.vals_NK > 0, fired_NK)
  np.testing.assert_array_equal(
    code.idx_NK[fired_NK], golden['idx_NK'][fired_NK]
  )
  np.testing.assert_allclose(code.vals_NK, golden['vals_NK'], rtol=1e-5)
  np.testing.assert_allclose(
    sae.decode(code), golden['x_hat_ND'], rtol=1e-4, atol=1e-5
  )


def test_a_probe_is_the_same_however_the_latents_come(sae, monkeypatch):
  whole = probe.make(sae, seed=3)
  monkeypatch.setattr(
    tensors,
    'pieces',
    lambda rows, width: ((at, min(at + 5, rows)) for at in range(0, rows, 5)),
  )
  for name, array in probe.make(sae, seed=3).items():
    np.testing.assert_allclose(array, whole[name], rtol=1e-6, err_msg=name)


def test_every_export_has_a_probe_that_holds(tmp_path, sae):
  exports.write(sae, tmp_path / 'export')
  assert (tmp_path / 'export' / 'README.md').exists()
  for layout in ('sparsify', 'saelens'):
    folder = tmp_path / 'export' / layout
    assert probe.verify(sae, folder) == ''
    assert probe.verify(exports.load(folder), folder) == ''


@pytest.mark.parametrize(
  ('name', 'at'),
  [('encoder.weight', 3), ('encoder.bias', 3), ('W_dec', 3), ('b_dec', 2)],
)
def test_an_import_with_other_weights_is_refused(tmp_path, name, at):
  sae = small.random_sae()
  golden = probe.make(sae)
  fires = golden['idx_NK'][golden['vals_NK'] > 0]
  exports.write(sae, tmp_path)
  path = tmp_path / 'sparsify' / 'sae.safetensors'
  tensors = load_file(path)
  tensors[name][int(fires[0]) if at == 3 else at] += 0.01
  save_file(tensors, path)
  with pytest.raises(ValueError, match=r'probe\.safetensors says: .*row \d'):
    exports.load(tmp_path)


def test_an_import_with_another_k_is_refused(tmp_path):
  exports.write(small.random_sae(), tmp_path)
  path = tmp_path / 'sparsify' / 'cfg.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'k': K + 1}))
  with pytest.raises(ValueError, match=r'shape \(8, 3\), not \(8, 4\)'):
    exports.load(tmp_path)


def test_a_small_change_below_the_tolerance_passes(tmp_path):
  sae = small.random_sae()
  exports.write(sae, tmp_path)
  near = dataclasses.replace(sae, b_dec_D=sae.b_dec_D + np.float32(1e-6))
  assert probe.verify(near, tmp_path / 'sparsify') == ''


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'x_ND': np.full((8, D), np.nan, np.float32)}, 'not finite'),
    ({'x_ND': np.zeros((8, D + 1), np.float32)}, 'x_ND of the probe has shape'),
    ({'idx_NK': np.zeros((8, K), np.float32)}, 'idx_NK of the probe is of'),
    ({'idx_NK': np.full((8, K), -5, np.int32)}, 'latent -5 fires'),
    ({'vals_NK': np.full((8, K), np.nan, np.float32)}, 'with nan in the probe'),
    ({'x_hat_ND': np.full((8, D), np.nan, np.float32)}, 'row 0 is nan at 0'),
  ],
)
def test_a_probe_that_is_no_probe_does_not_hold(tmp_path, fields, says):
  sae = small.random_sae()
  save_file(probe.make(sae) | fields, tmp_path / probe.NAME)
  assert says in probe.verify(sae, tmp_path)


def test_a_probe_with_other_tensors_is_refused(tmp_path):
  sae = small.random_sae()
  save_file({'x': np.zeros(3)}, tmp_path / probe.NAME)
  with pytest.raises(ValueError, match=r"holds \['x'\]"):
    probe.verify(sae, tmp_path)


def test_weights_that_overflow_are_not_imported(tmp_path):
  sae = small.random_sae()
  huge_MD = np.full_like(sae.w_dec_MD, 3e38)
  sae = dataclasses.replace(sae, w_dec_MD=huge_MD)
  found = layouts.find(foreign_files.sparsify(tmp_path / 'a', sae))
  with pytest.raises(ValueError, match='is not finite in float32'):
    exports.write(found, tmp_path / 'new' / 'export')
  assert not (tmp_path / 'new').exists()


def test_an_import_without_a_probe_says_so(tmp_path, caplog):
  folder = foreign_files.sparsify(tmp_path / 'a', small.random_sae())
  with caplog.at_level('INFO', logger='absl'):
    exports.load(folder)
  assert f'{folder} has no probe.safetensors to verify' in caplog.text


def test_the_rows_chosen_are_far_from_a_tie():
  config = dataclasses.replace(CONFIG, latents=4000, k=40)
  sae = small.random_sae(config)
  x_ND = probe.make(sae)['x_ND']
  _, margin_N = probe.encode(sae, x_ND)
  _, drawn_C = probe.encode(sae, probe._rows(sae, np.random.default_rng(0)))
  assert len(drawn_C) == 3 * len(x_ND)
  assert np.median(drawn_C) < margin_N.min()
