"""SAEs of other programs: read as those programs would compute them."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from lmm_sae.sae import exports, layouts
from lmm_sae.sae.model import SaeConfig
from tests.sae import foreign_files, small
from tests.sae.foreign_files import dense, largest
from tests.sae.small import CONFIG, D, K, M

NAMES = ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D', 'theta_M')
X_ND = small.rows(33)


@pytest.fixture
def sae():
  return small.random_sae()


@pytest.fixture(scope='module')
def jumping():
  """Weights whose thresholds are not 0, for the layouts that have some."""
  config = dataclasses.replace(CONFIG, activation='jumprelu', row_k=M)
  return small.random_sae(config, seed=2)


@pytest.fixture(scope='module')
def learnt(tmp_path_factory, jumping):
  """Folders of dictionary_learning, saved by torch."""
  return foreign_files.learning(tmp_path_factory.mktemp('learnt'), jumping)


def same(one, two, **tolerance):
  for name in NAMES:
    np.testing.assert_allclose(
      getattr(one, name), getattr(two, name), err_msg=name, **tolerance
    )


def codes(sae, z_NM, x_hat_ND=None):
  """Holds an SAE against what another program's formula gives for X_ND."""
  code = sae.encode(X_ND)
  np.testing.assert_allclose(dense(code), z_NM, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(dense(code) != 0, z_NM != 0)
  if x_hat_ND is not None:
    got_ND = sae.decode(code)
    np.testing.assert_allclose(got_ND, x_hat_ND, rtol=1e-4, atol=1e-4)


def edit(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
  'dtype', [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
)
def test_the_published_layout_is_read_in_its_dtype(tmp_path, sae, dtype):
  folder = foreign_files.sparsify(tmp_path / 'model.layers.24', sae, dtype)
  source = layouts.find(folder)
  assert source.config == SaeConfig(layer=24, width=D, latents=M, k=K)
  kept = np.float32 if dtype is np.float64 else dtype
  assert source.dtype == np.dtype(kept)
  rounded = {n: getattr(sae, n).astype(dtype) for n in NAMES}
  back = exports.load(folder)
  for name in NAMES:
    np.testing.assert_array_equal(
      getattr(back, name), rounded[name].astype(np.float32)
    )


def test_a_folder_by_hook_point_is_searched(tmp_path, sae):
  foreign_files.sparsify(tmp_path / 'model.layers.24', sae)
  assert exports.load(tmp_path).config.layer == 24
  foreign_files.sparsify(tmp_path / 'model.layers.8', small.random_sae(seed=3))
  assert exports.load(tmp_path, layer=8).config.layer == 8
  same(exports.load(tmp_path, layer=24), sae, rtol=0)
  with pytest.raises(ValueError, match=r'layers\.24, model\.layers\.8: name'):
    exports.load(tmp_path)
  with pytest.raises(ValueError, match='which reads layer 5'):
    exports.load(tmp_path, layer=5)


@pytest.mark.parametrize(
  ('name', 'layer'),
  [
    ('model.layers.24', 24),
    ('layers.0', 0),
    ('blocks.3.hook_resid_post', 3),
    ('blocks.3.hook_resid_pre', 2),
    ('anything', -1),
  ],
)
def test_the_layer_is_taken_from_the_name(tmp_path, sae, name, layer):
  folder = foreign_files.sparsify(tmp_path / name, sae)
  assert layouts.find(folder).config.layer == layer


@pytest.mark.parametrize(
  'name', ['layers.3.mlp', 'blocks.3.hook_mlp_out', 'blocks.0.hook_resid_pre']
)
def test_what_reads_no_layers_output_is_refused(tmp_path, sae, name):
  folder = foreign_files.sparsify(tmp_path / name, sae)
  with pytest.raises(ValueError, match=f'reads {name}, not the output'):
    layouts.find(folder)


def test_latents_may_be_told_as_a_factor(tmp_path, sae):
  folder = foreign_files.sparsify(tmp_path / 'a', sae, num_latents=0)
  same(exports.load(folder), sae, rtol=0)
  edit(folder / 'cfg.json', expansion_factor=3)
  with pytest.raises(ValueError, match=r'number of latents of 18.*tensors 12'):
    exports.load(folder)


def test_a_file_in_pieces_is_read_through_its_index(tmp_path, sae):
  from safetensors.numpy import load_file, save_file

  folder = foreign_files.sparsify(tmp_path / 'a', sae)
  whole = folder / 'sae.safetensors'
  tensors = load_file(whole)
  whole.unlink()
  places = {}
  for at, (name, tensor) in enumerate(tensors.items()):
    places[name] = f'sae-{at}.safetensors'
    save_file({name: tensor}, folder / places[name])
  index = folder / 'sae.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': places}))
  same(exports.load(folder), sae, rtol=0)
  outside = {**places, 'W_dec': '../a/sae-2.safetensors'}
  index.write_text(json.dumps({'weight_map': outside}))
  with pytest.raises(ValueError, match=r"in '\.\./a/.*which is no file name"):
    exports.load(folder)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path, sae):
  folder = foreign_files.sparsify(tmp_path / 'a', sae)
  (folder / 'sae.safetensors').rename(tmp_path / 'elsewhere')
  (folder / 'sae.safetensors').symlink_to('../elsewhere')
  with pytest.raises(ValueError, match=r'leads to .*elsewhere, out of'):
    exports.load(folder)


def test_the_links_of_a_download_cache_are_followed(tmp_path, sae):
  cache = tmp_path / 'models--some--sae'
  folder = foreign_files.sparsify(cache / 'snapshots/abc/model.layers.2', sae)
  (cache / 'blobs').mkdir()
  for name in ('cfg.json', 'sae.safetensors'):
    (folder / name).rename(cache / 'blobs' / name)
    (folder / name).symlink_to(f'../../../blobs/{name}')
  same(exports.load(folder.parent), sae, rtol=0)


def test_saelens_topk_is_read(tmp_path, sae):
  back = exports.load(foreign_files.saelens(tmp_path / 'a', sae))
  same(back, sae, rtol=0)
  assert (back.config.layer, back.config.k, back.config.most) == (3, K, K)


def test_saelens_before_version_6_says_topk_elsewhere(tmp_path, sae):
  folder = foreign_files.saelens(
    tmp_path / 'a',
    sae,
    architecture='standard',
    activation_fn_str='topk',
    activation_fn_kwargs={'k': 2},
    k=None,
    hook_name='blocks.9.hook_resid_post',
    metadata=None,
  )
  edit(folder / 'cfg.json')
  cfg = json.loads((folder / 'cfg.json').read_text())
  del cfg['k']
  (folder / 'cfg.json').write_text(json.dumps(cfg))
  config = layouts.find(folder).config
  assert (config.layer, config.k, config.activation) == (9, 2, 'topk')


def test_an_input_that_is_not_centred_is_folded_into_the_bias(tmp_path, sae):
  folder = foreign_files.saelens(
    tmp_path / 'a', sae, apply_b_dec_to_input=False
  )
  z_NM = np.maximum(X_ND @ sae.w_enc_MD.T + sae.b_enc_M, 0)
  z_NM = largest(z_NM, K)
  codes(exports.load(folder), z_NM, z_NM @ sae.w_dec_MD + sae.b_dec_D)
  assert layouts.find(folder).dtype == np.float32


def test_activations_rescaled_by_the_decoder_are_folded(tmp_path, sae):
  folder = foreign_files.saelens(
    tmp_path / 'a', sae, rescale_acts_by_decoder_norm=True
  )
  norm_M = np.linalg.norm(sae.w_dec_MD, axis=1)
  pre_NM = (X_ND - sae.b_dec_D) @ sae.w_enc_MD.T + sae.b_enc_M
  z_NM = largest(np.maximum(pre_NM * norm_M, 0), K)
  back = exports.load(folder)
  codes(back, z_NM, (z_NM / norm_M) @ sae.w_dec_MD + sae.b_dec_D)
  np.testing.assert_allclose(np.linalg.norm(back.w_dec_MD, axis=1), 1, 1e-6)


def test_a_factor_of_the_input_is_folded(tmp_path, sae):
  folder = foreign_files.saelens(
    tmp_path / 'a', sae, normalize_activations='expected_average_only_in'
  )
  with pytest.raises(ValueError, match='the factor is not in the folder'):
    exports.load(folder)
  text = json.dumps({'scaling_factor': 0.3})
  (folder / 'activation_scaler.json').write_text(text)
  pre_NM = (0.3 * X_ND - sae.b_dec_D) @ sae.w_enc_MD.T + sae.b_enc_M
  z_NM = largest(np.maximum(pre_NM, 0), K)
  x_hat_ND = (z_NM @ sae.w_dec_MD + sae.b_dec_D) / 0.3
  codes(exports.load(folder), z_NM, x_hat_ND)


def test_a_gain_of_activations_is_folded_into_the_decoder(tmp_path, sae):
  gain_M = np.linspace(0.5, 2, M, dtype=np.float32)
  more = {'scaling_factor': gain_M}
  folder = foreign_files.saelens(
    tmp_path / 'a', sae, more=more, finetuning_scaling_factor=True
  )
  back = exports.load(folder)
  np.testing.assert_allclose(
    back.w_dec_MD, sae.w_dec_MD * gain_M[:, None], rtol=1e-6
  )
  edit(folder / 'cfg.json', finetuning_scaling_factor=False)
  with pytest.raises(ValueError, match='is it to be applied'):
    exports.load(folder)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'normalize_activations': 'layer_norm'}, 'divided by its own deviation'),
    ({'normalize_activations': 'constant_norm_rescale'}, 'its own length'),
    ({'normalize_activations': 7}, 'is 7: it is not known'),
    ({'reshape_activations': 'hook_z'}, 'heads of an attention layer'),
    ({'architecture': 'gated'}, "holds a 'gated' SAE"),
    ({'architecture': 'standard'}, "holds a 'standard' SAE"),
    ({'dtype': 'bfloat16'}, 'say bfloat16, but the tensors are of float32'),
    ({'d_in': 7}, 'a width of 7, the tensors 6'),
    ({'d_sae': 13}, 'number of latents of 13, the tensors 12'),
    ({'k': 13}, r'sae\.k is 13'),
    ({'k': '3'}, "k is '3'"),
    ({'k': None}, 'lacks k'),
    ({'apply_b_dec_to_input': 1}, 'is 1, not true or false'),
    ({'metadata': [1]}, r'metadata is \[1\], no table'),
    ({'metadata': {'hook_name': 'blocks.2.hook_mlp_out'}}, 'hook_mlp_out'),
  ],
)
def test_what_saelens_does_beyond_the_formula_is_refused(
  tmp_path, sae, fields, message
):
  folder = foreign_files.saelens(tmp_path / 'a', sae, **fields)
  with pytest.raises(ValueError, match=message):
    exports.load(folder)


def test_saelens_jumprelu_needs_no_k(tmp_path, jumping):
  folder = foreign_files.saelens(
    tmp_path / 'a',
    jumping,
    more={'threshold': jumping.theta_M},
    architecture='jumprelu',
    apply_b_dec_to_input=False,
    k=None,
  )
  pre_NM = X_ND @ jumping.w_enc_MD.T + jumping.b_enc_M
  z_NM = np.maximum(pre_NM, 0) * (pre_NM > jumping.theta_M)
  back = exports.load(folder)
  assert back.config.most == M
  codes(back, z_NM, z_NM @ jumping.w_dec_MD + jumping.b_dec_D)


def test_saelens_batchtopk_in_training_has_one_threshold(tmp_path, jumping):
  norm_M = np.linalg.norm(jumping.w_dec_MD, axis=1)
  folder = foreign_files.saelens(
    tmp_path / 'a',
    jumping,
    more={'topk_threshold': np.array(0.75)},
    architecture='batchtopk',
    rescale_acts_by_decoder_norm=True,
    k=2.5,
  )
  pre_NM = (X_ND - jumping.b_dec_D) @ jumping.w_enc_MD.T + jumping.b_enc_M
  pre_NM *= norm_M
  back = exports.load(folder)
  assert (back.config.k, back.config.activation) == (3, 'batchtopk')
  codes(back, np.maximum(pre_NM, 0) * (pre_NM > 0.75))


@pytest.mark.parametrize('kind', ['topk', 'across', 'half'])
def test_dictionary_learnings_topk_is_read(learnt, jumping, kind):
  back = exports.load(learnt / kind)
  assert back.config == SaeConfig(layer=7, width=D, latents=M, k=3)
  want = jumping
  if kind == 'half':
    halves = {
      name: getattr(jumping, name).astype(ml_dtypes.bfloat16) for name in NAMES
    }
    want = dataclasses.replace(
      jumping, **{n: h.astype(np.float32) for n, h in halves.items()}
    )
    assert layouts.find(learnt / kind).dtype == ml_dtypes.bfloat16
  want = dataclasses.replace(want, theta_M=np.zeros(M, np.float32))
  same(back, want, rtol=0)


@pytest.mark.parametrize('kind', ['batch', 'matryoshka'])
def test_dictionary_learnings_batchtopk_is_read(learnt, jumping, kind):
  pre_NM = (X_ND - jumping.b_dec_D) @ jumping.w_enc_MD.T + jumping.b_enc_M
  z_NM = np.maximum(pre_NM, 0) * (pre_NM > 0.75)
  back = exports.load(learnt / kind)
  assert (back.config.k, back.config.layer) == (3, 7)
  codes(back, z_NM, z_NM @ jumping.w_dec_MD + jumping.b_dec_D)


def test_dictionary_learnings_jumprelu_is_read(learnt, jumping):
  pre_NM = X_ND @ jumping.w_enc_MD.T + jumping.b_enc_M
  f_NM = np.maximum(pre_NM * (pre_NM > jumping.theta_M), 0)
  x_hat_ND = f_NM @ jumping.w_dec_MD + jumping.b_dec_D
  codes(exports.load(learnt / 'jump'), f_NM, x_hat_ND)


@pytest.mark.parametrize(
  ('table', 'field', 'value'),
  [
    ('trainer', 'submodule_name', 'mlp_out_layer_7'),
    ('trainer', 'submodule_name', 'attention_out_layer_7'),
    ('buffer', 'io', 'in'),
    ('buffer', 'io', ['in']),
  ],
)
def test_a_dictionary_of_another_place_is_refused(
  tmp_path, learnt, table, field, value
):
  folder = tmp_path / 'copy'
  shutil.copytree(learnt / 'topk', folder)
  cfg = json.loads((folder / 'config.json').read_text())
  cfg.setdefault(table, {})[field] = value
  (folder / 'config.json').write_text(json.dumps(cfg))
  with pytest.raises(ValueError, match='not the output of a decoder layer'):
    layouts.find(folder)


@pytest.mark.parametrize('kind', ['half', 'across', 'jump', 'batch'])
def test_a_copy_of_a_dictionary_does_the_same(tmp_path, learnt, kind):
  source = layouts.find(learnt / kind)
  exports.write(source, tmp_path / 'copy', origin='theirs')
  want = exports.load(learnt / kind)
  for layout in ('sparsify', 'saelens'):
    got = exports.load(tmp_path / 'copy' / layout)
    same(got, want, rtol=0)
    assert got.config == want.config
  cfg = json.loads((tmp_path / 'copy/sparsify/cfg.json').read_text())
  assert cfg['source_cfg']['trainer']['dict_size'] == M
  stored = np.dtype(ml_dtypes.bfloat16 if kind == 'half' else np.float32)
  assert layouts.find(tmp_path / 'copy').dtype == stored


@pytest.mark.parametrize(
  ('kind', 'message'),
  [
    ('contradicts', 'k is 4 in the settings, 3 as a tensor'),
    ('gated', "dict_class is 'GatedAutoEncoder'"),
    ('strided', 'save it with .contiguous'),
    ('whole_object', 'nothing of it was run'),
    ('old_file', 'is no zip'),
  ],
)
def test_a_dictionary_that_cannot_be_read_is_refused(learnt, kind, message):
  with pytest.raises(ValueError, match=message):
    exports.load(learnt / kind)


@pytest.mark.parametrize('name', ['w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D'])
@pytest.mark.parametrize('bad', [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, sae, name, bad):
  array = getattr(sae, name)
  array[-1] = bad
  folder = foreign_files.sparsify(tmp_path / 'a', sae)
  with pytest.raises(ValueError, match=f'{bad} at .*not finite'):
    exports.load(folder)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'d_in': 5}, 'a width of 5, the tensors 6'),
    ({'num_latents': 11}, 'number of latents of 11, the tensors 12'),
    ({'k': 0}, 'k is 0; it must be'),
    ({'k': 1 << 70}, 'k is 11805'),
    ({'k': True}, 'k is True'),
    ({'k': [3]}, r'k is \[3\]'),
    ({'layer': 1.5}, r'layer is 1\.5'),
    ({'transcode': True}, 'sets transcode'),
    ({'signed': True}, 'sets signed'),
    ({'activation': ['topk']}, 'holds a'),
    ({'prefixes': 'abc'}, "prefixes is 'abc'"),
    ({'prefixes': [5, 2]}, '/a: .*must ascend'),
    ({'k': 13}, r'/a: sae\.k is 13; it must be in 1\.\.12'),
  ],
)
def test_settings_that_contradict_the_tensors_are_refused(
  tmp_path, sae, fields, message
):
  folder = foreign_files.sparsify(tmp_path / 'a', sae, **fields)
  with pytest.raises(ValueError, match=message):
    exports.load(folder)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (b'{"k": 3, "k": 4}', "key 'k' stands there twice"),
    (b'\xff\xfe{}', "can't decode|no JSON"),
    (b'{"k": NaN}', 'NaN is no number'),
    (b'[' * 100_000, 'nested too deeply|no JSON'),
    (b'[3]', 'holds no JSON object'),
    (b'{"k": 3', 'no JSON that is read'),
    (b'', 'no JSON that is read'),
    (b'{"a": "' + b'x' * (5 << 20) + b'"}', 'at most'),
  ],
)
def test_settings_that_are_no_plain_json_are_refused(
  tmp_path, sae, text, message
):
  folder = foreign_files.sparsify(tmp_path / 'a', sae)
  (folder / 'cfg.json').write_bytes(text)
  with pytest.raises(ValueError, match=message):
    exports.load(folder)


def test_tensors_that_are_not_known_are_refused(tmp_path, sae):
  more = {'W_skip': np.zeros((D, D), np.float32)}
  folder = foreign_files.saelens(tmp_path / 'a', sae, more=more)
  with pytest.raises(ValueError, match='W_skip: what they do'):
    exports.load(folder)
