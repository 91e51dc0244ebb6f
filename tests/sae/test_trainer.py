import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae import model, trainer
from lmm_sae.sae.options import learning_rate
from tests.sae import small
from tests.sae.small import CONFIG, TRAIN, D, K, M

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


def numpy_tree(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def numpy_step(state, x_ND, options):
  """The parameters after one step from zero moments, in plain float64."""
  p = numpy_tree(state.params)
  x = np.asarray(x_ND, np.float64) * float(state.scale)
  dead_M = np.asarray(state.idle_M) > CONFIG.dead_after
  variance = np.square(x - x.mean(0)).sum()
  z_all = np.maximum((x - p.b_dec_D) @ p.w_enc_MD.T + p.b_enc_M, 0)

  def top(z, k):
    z = z.copy()
    np.put_along_axis(z, np.argsort(-z, 1, kind='stable')[:, k:], 0, 1)
    return z

  w_enc, b_enc = np.zeros((M, D)), np.zeros(M)
  w_dec, b_dec = np.zeros((M, D)), np.zeros(D)
  z = top(z_all, K)
  error = x - z @ p.w_dec_MD - p.b_dec_D
  z_wide = top(z_all, 4 * K)
  slip = x - z_wide @ p.w_dec_MD - p.b_dec_D
  terms = [
    (z, -2 * error / variance, True),
    (z_wide, -2 * options.multi_topk * slip / variance, True),
  ]
  z_aux = top(np.where(dead_M, z_all, 0), CONFIG.k_aux)
  slip = error - z_aux @ p.w_dec_MD
  terms.append((z_aux, -2 * options.auxk * slip / variance, False))
  for z, dy, main in terms:
    dz = np.where(z > 0, dy @ p.w_dec_MD.T, 0)
    w_dec += z.T @ dy
    w_enc += dz.T @ (x - p.b_dec_D)
    b_enc += dz.sum(0)
    if main:
      b_dec += dy.sum(0) - dz.sum(0) @ p.w_enc_MD
  w_dec -= (w_dec * p.w_dec_MD).sum(1, keepdims=True) * p.w_dec_MD
  grads = model.Params(w_enc, b_enc, w_dec, b_dec, np.zeros(M))
  norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
  shrink = min(1, options.clip / norm)
  lr = options.lr / options.warmup

  def adam(p, g):
    g = g * shrink
    return p - lr * g / (np.abs(g) + 1e-8)

  p = jax.tree.map(adam, p, grads)
  unit = p.w_dec_MD / np.linalg.norm(p.w_dec_MD, axis=1, keepdims=True)
  return p.replace(w_dec_MD=unit), norm


@pytest.mark.parametrize('clip', [1e-3, 1e3])
@pytest.mark.parametrize('dead', [0, 2, 5])
def test_one_step_equals_a_float64_oracle(dead, clip):
  options = dataclasses.replace(FULL, clip=clip)
  idle_M = np.where(np.arange(M) < dead, 10_000, 0).astype(np.int32)
  state, step = begin(options, idle_M=idle_M)
  x_ND = small.rows(N, seed=3)
  want, norm = numpy_step(state, x_ND, options)
  state, metrics = step(state, jnp.asarray(x_ND))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-4)
  # Adam's first step is ± lr where |g| is far above its eps of 1e-8, so the
  # tolerance is a hundredth of lr = 2.5e-3.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2.5e-5),
    state.params,
    want,
  )
  np.testing.assert_allclose(metrics['dead'], dead / M, rtol=1e-6)


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
    for seed in range(120):
      state, _ = step(state, small.rows(N, seed))
    return int(np.sum(np.asarray(state.idle_M)[:4] < 500))

  assert fired(auxk=0.5) >= 3
  assert fired(auxk=0.0) == 0


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


def test_an_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="token kind 'word'"):
    dataclasses.replace(TRAIN, kinds=('base', 'word'))
