import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_sae.core.tokens import Kind, kinds
from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae import model, trainer
from lmm_sae.sae.options import learning_rate
from tests.sae import small
from tests.sae.small import CONFIG, TRAIN, K, M

N = 16
# Every term of the loss; one set of options for all, since it compiles once.
FULL = dataclasses.replace(
  TRAIN, steps=150, auxk=0.5, multi_topk=0.25, clip=1e3
)


def begin(options=FULL, config=CONFIG, devices=1, latent=1, **changes):
  """(state, step), with fields of the state changed."""
  mesh = mesh_lib.make(devices, latent)
  shardings = mesh_lib.sharding(mesh, trainer.specs())
  state = trainer.start(
    config, small.rows(200), 0, normalise=options.normalise
  ).replace(**changes)
  step = trainer.make_step(config, options, mesh)
  return jax.device_put(state, shardings), step


@pytest.mark.parametrize('dead', [0, 2, 8])
@pytest.mark.parametrize('mesh', [(8, 1), (2, 2), (8, 4), (6, 6)])
def test_many_devices_equal_one(mesh, dead):
  """Whatever they share: rows, latents or both. More than k_aux may be dead."""
  idle_M = np.where(np.arange(M) % 8 < dead, 10_000, 0).astype(np.int32)
  config = dataclasses.replace(CONFIG, aux=4)
  results = []
  for devices, latent in ((1, 1), mesh):
    state, step = begin(
      config=config, devices=devices, latent=latent, idle_M=idle_M
    )
    for seed in range(3):
      state, metrics = step(state, small.rows(N, seed))
    results.append(jax.device_get((state, metrics)))
  (one, one_metrics), (many, many_metrics) = results
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    (one.params, one_metrics),
    (many.params, many_metrics),
  )
  np.testing.assert_array_equal(one.idle_M, many.idle_M)


def test_pieces_add_up_to_the_whole_batch():
  idle_M = np.where(np.arange(M) < 2, 10_000, 0).astype(np.int32)
  results = []
  for pieces, devices in ((1, 1), (4, 1), (2, 2)):
    options = dataclasses.replace(FULL, accumulate=pieces)
    state, step = begin(options, devices=devices, idle_M=idle_M)
    for seed in range(3):
      state, metrics = step(state, small.rows(N, seed))
    results.append(jax.device_get((state.params, metrics, state.idle_M)))
  for other in results[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      results[0],
      other,
    )


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_batch_that_is_not_finite_changes_nothing(bad):
  state, step = begin()
  state, _ = step(state, small.rows(N, 0))
  before = jax.device_get(state)
  x_ND = small.rows(N, 1)
  x_ND[3, 2] = bad
  state, metrics = step(state, x_ND)
  assert metrics['skipped'] == 1
  after = jax.device_get(state)
  assert after.step == before.step + 1
  jax.tree.map(
    np.testing.assert_array_equal,
    (after.params, after.opt_state, after.idle_M),
    (before.params, before.opt_state, before.idle_M),
  )
  state, metrics = step(state, small.rows(N, 2))
  assert metrics['skipped'] == 1
  assert np.isfinite(metrics['fvu'])


def test_training_lowers_the_fvu_and_keeps_decoder_rows_at_unit_norm():
  state, step = begin()
  fvu = []
  for seed in range(150):
    state, metrics = step(state, small.rows(N, seed))
    fvu.append(float(metrics['fvu']))
  assert np.mean(fvu[-10:]) < 0.5 * np.mean(fvu[:10])
  np.testing.assert_allclose(
    np.linalg.norm(state.params.w_dec_MD, axis=1), 1, rtol=1e-6
  )


def test_auxk_wakes_planted_dead_latents():
  def fired(auxk):
    state, step = begin(dataclasses.replace(FULL, auxk=auxk, multi_topk=0.0))
    # The first four answer so weakly that they are never among the k.
    planted_M = np.arange(M) < 4
    params = state.params.replace(
      w_enc_MD=jnp.where(planted_M[:, None], 1e-3, 1) * state.params.w_enc_MD,
      b_enc_M=jnp.where(planted_M, 1e-3, 1.0),
    )
    idle_M = jnp.where(planted_M, 10_000, 0).astype(jnp.int32)
    state = state.replace(params=params, idle_M=idle_M)
    dead = []
    for seed in range(120):
      state, metrics = step(state, small.rows(N, seed))
      dead.append(round(float(metrics['dead']) * M))
    assert dead[0] == 4
    return int(np.sum(np.asarray(state.idle_M)[:4] < 500)), dead[-1]

  awake, dead = fired(auxk=0.5)
  assert awake >= 3
  assert dead <= 1
  awake, dead = fired(auxk=0.0)
  assert awake == 0
  assert dead >= 4


def test_idle_counts_rows_and_stops_before_it_overflows():
  state, step = begin(idle_M=np.full(M, trainer.NEVER, np.int32))
  x_ND = np.tile(small.rows(2), (N // 2, 1))
  code = model.encode(state.params, x_ND * state.scale, k=K)
  fired = set(np.asarray(code.idx_NK)[np.asarray(code.vals_NK) > 0].tolist())
  assert 0 < len(fired) < M
  state, _ = step(state, x_ND)
  for latent, idle in enumerate(np.asarray(state.idle_M)):
    assert idle == (0 if latent in fired else trainer.NEVER)
  state, _ = step(begin()[0], x_ND)
  assert set(np.asarray(state.idle_M).tolist()) == {0, N}


def test_the_learning_rate_warms_up_stays_and_falls_to_nothing():
  options = dataclasses.replace(
    TRAIN, steps=100, warmup=10, decay_from=0.6, lr=2.0
  )
  lr = [
    float(learning_rate(jnp.asarray(at), options=options, latents=M))
    for at in range(101)
  ]
  np.testing.assert_allclose(lr[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
  np.testing.assert_allclose(lr[10:61], 2.0, rtol=1e-6)
  np.testing.assert_allclose(lr[80], 1.0, rtol=1e-6)
  np.testing.assert_allclose(lr[99], 0.05, rtol=1e-5)
  assert lr[100] == 0


def test_a_learning_rate_of_zero_means_the_papers_rule():
  options = dataclasses.replace(TRAIN, lr=0.0)
  assert options.peak_lr(2**14) == pytest.approx(2e-4)
  assert options.peak_lr(2**17) == pytest.approx(7.07e-5, rel=1e-3)


def test_exports_are_in_the_units_of_the_store():
  state, step = begin()
  for seed in range(5):
    state, _ = step(state, small.rows(N, seed))
  assert abs(float(state.scale) - 1) > 0.1
  params = trainer.export_params(state)
  x_ND = jnp.asarray(small.rows(N, 9))
  raw = model.decode(params, model.encode(params, x_ND, k=K))
  scaled_ND = x_ND * state.scale
  inner = model.decode(state.params, model.encode(state.params, scaled_ND, k=K))
  np.testing.assert_allclose(raw, inner / state.scale, rtol=1e-4, atol=1e-5)


def test_normalised_training_does_not_depend_on_the_unit_of_the_rows():
  fvu = []
  for unit in (1.0, 64.0):
    state = trainer.start(CONFIG, unit * small.rows(200), 0, normalise=True)
    step = trainer.make_step(CONFIG, FULL, mesh_lib.make(1))
    for seed in range(5):
      state, metrics = step(state, unit * small.rows(N, seed))
    fvu.append(float(metrics['fvu']))
  np.testing.assert_allclose(fvu[0], fvu[1], rtol=1e-4)


def test_shapes_are_those_of_a_start():
  state = trainer.start(CONFIG, small.rows(50), 0, normalise=True)
  like = trainer.shapes(CONFIG)
  assert jax.tree.structure(state) == jax.tree.structure(like)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_rows_that_devices_cannot_share_are_refused():
  options = dataclasses.replace(TRAIN, rows=12)
  with pytest.raises(ValueError, match=r'train\.rows is 12.*multiple of 8'):
    trainer.make_step(CONFIG, options, mesh_lib.make(8))


def test_more_devices_than_there_are_is_refused():
  with pytest.raises(ValueError, match=r'train\.devices is 9'):
    mesh_lib.make(9)


def test_no_device_count_means_all():
  assert mesh_lib.make(0).shape == {'data': 8, 'latent': 1}


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('steps', 0),
    ('rows', 0),
    ('lr', -1.0),
    ('clip', 0.0),
    ('decay_from', 1.5),
    ('backend', 'abacus'),
    ('kinds', ()),
  ],
)
def test_a_train_config_out_of_bounds_is_refused(field, value):
  with pytest.raises(ValueError, match=rf'train\.{field}'):
    dataclasses.replace(TRAIN, **{field: value})


def test_bos_and_padding_are_not_trained_on_by_default(config):
  trained = {kind for name in config.train.kinds for kind in kinds(name)}
  assert trained == set(Kind) - {Kind.BOS, Kind.PADDING}


def test_an_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="token kind 'word'"):
    dataclasses.replace(TRAIN, kinds=('base', 'word'))
