"""The C++ kernels: exact whatever comes, on machines of every kind."""

import os
import platform
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from lmm_sae.kernels import native

pytestmark = pytest.mark.skipif(
  bool(native.why_not()), reason=f'not here: {native.why_not()}'
)
screens = pytest.mark.parametrize(
  'screen',
  [False, *([True] if not native.why_not() and native.screens() else [])],
)


def oracle(x_ND, w_MD, b_M, k):
  """The k largest of relu(x wᵀ + b) in float64, and what they were taken of."""
  z_NM = np.maximum(x_ND.astype(float) @ w_MD.T.astype(float) + b_M, 0)
  return -np.sort(-z_NM, 1)[:, :k], z_NM


def check(x_ND, w_MD, b_M, k, screen):
  """What was selected is the k largest, up to rounding of the values."""
  vals_NK, idx_NK = map(
    np.asarray, native.encode(x_ND, w_MD, b_M, k=k, screen=screen)
  )
  want_NK, z_NM = oracle(x_ND, w_MD, b_M, k)
  size = np.abs(x_ND).sum(1).max() * np.abs(w_MD).max()
  size += np.abs(b_M[np.isfinite(b_M)]).max(initial=0)
  near = 1e-6 * size
  np.testing.assert_allclose(vals_NK, want_NK, rtol=1e-5, atol=near)
  got_NK = np.take_along_axis(z_NM, idx_NK, 1)
  np.testing.assert_allclose(got_NK, want_NK, rtol=1e-5, atol=near)
  assert (np.diff(vals_NK, axis=1) <= 0).all()
  assert all(len(set(row)) == k for row in idx_NK.tolist())
  return vals_NK, idx_NK


@screens
@pytest.mark.parametrize(
  ('rows', 'width', 'latents', 'k'),
  [
    (1, 1, 1, 1),
    (7, 5, 9, 3),
    (97, 300, 513, 513),
    (200, 520, 2000, 7),
    (1300, 16, 40, 1),
    (530, 20, 600, 300),  # rows for every thread; below, latents for each
    (6, 20, 600, 300),
    (2, 700, 70, 64),
  ],
)
def test_the_selection_is_exact(rows, width, latents, k, screen):
  rng = np.random.default_rng(rows)
  x_ND = rng.normal(size=(rows, width)).astype('f')
  w_MD = rng.normal(size=(latents, width)).astype('f')
  b_M = rng.normal(size=latents).astype('f')
  check(x_ND, w_MD, b_M, k, screen)
  check(x_ND, w_MD, b_M * 1e5, k, screen)
  check(x_ND, w_MD * np.exp(b_M * 4)[:, None], b_M, k, screen)
  check(x_ND * 1e-3, w_MD, b_M - 1, k, screen)


@screens
def test_candidates_may_be_all_latents(screen):
  """Latents that the screen cannot tell apart are all kept, and told apart."""
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(40, 64)).astype('f')
  one_D = rng.normal(size=64).astype('f')
  w_MD = one_D + 1e-5 * rng.normal(size=(5000, 64)).astype('f')
  b_M = np.full(5000, 100, 'f')
  vals_NK, idx_NK = check(x_ND, w_MD, b_M, 20, screen)
  assert (vals_NK > 0).all()
  assert len(np.unique(idx_NK)) > 200


@screens
def test_ties_and_zeros_go_to_the_lowest_indices(screen):
  x_ND, w_MD = np.ones((3, 8), 'f'), np.zeros((900, 8), 'f')
  w_MD[[5, 300, 700, 800]] = 1
  b_M = np.full(900, -0.5, 'f')
  b_M[300] = -np.inf
  vals_NK, idx_NK = native.encode(x_ND, w_MD, b_M, k=2, screen=screen)
  np.testing.assert_array_equal(idx_NK, [[5, 700]] * 3)
  vals_NK, idx_NK = native.encode(x_ND, w_MD, b_M, k=7, screen=screen)
  np.testing.assert_array_equal(idx_NK, [[5, 700, 800, 0, 1, 2, 3]] * 3)
  np.testing.assert_array_equal(vals_NK, [[7.5] * 3 + [0] * 4] * 3)


@screens
def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(screen):
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(30, 24)).astype('f')
  w_MD = rng.normal(size=(700, 24)).astype('f')
  b_M = rng.normal(size=700).astype('f')
  want = native.encode(x_ND, w_MD, b_M, k=5, screen=screen)
  for bad in (np.nan, np.inf, 1e25):
    spoiled_ND = x_ND.copy()
    spoiled_ND[11, 3] = bad
    got = native.encode(spoiled_ND, w_MD, b_M, k=5, screen=screen)
    others_N = np.arange(30) != 11
    for one, two in zip(got, want, strict=True):
      np.testing.assert_allclose(
        np.asarray(one)[others_N], np.asarray(two)[others_N], rtol=1e-5
      )
  w_MD[[600, 650], 2] = np.nan
  vals_NK, idx_NK = native.encode(x_ND, w_MD, b_M, k=5, screen=screen)
  np.testing.assert_array_equal(idx_NK[:, :2], [[600, 650]] * 30)
  np.testing.assert_array_equal(np.isnan(vals_NK).sum(1), 2)


def test_a_code_too_large_names_the_flag():
  code = np.broadcast_to(np.float32(0), (2**25, 64))
  i_NK = np.broadcast_to(np.int32(0), code.shape)
  x_ND = np.broadcast_to(np.float32(0), (2**25, 3))
  with pytest.raises(NotImplementedError, match=r'train\.accumulate'):
    native.spmm_t(code, i_NK, x_ND, latents=4)


def test_another_device_than_a_cpu_names_the_flag(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  with pytest.raises(NotImplementedError, match=r'train\.backend=auto'):
    native.project(np.ones((4, 3), 'f'), np.ones((4, 3), 'f'))


def test_an_index_outside_is_refused():
  w_MD = np.ones((4, 3), 'f')
  for index in (4, -1):
    i_NK = np.array([[0, index]], 'int32')
    with pytest.raises(Exception, match='not in'):
      jax.block_until_ready(native.spmm(np.ones((1, 2), 'f'), i_NK, w_MD))


THREADS = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])
import numpy as np
from lmm_sae.kernels import native
rng = np.random.default_rng(0)
x = rng.normal(size=(999, 40)).astype('f')
w = rng.normal(size=(1024, 40)).astype('f')
v, i = native.encode(x, w, np.zeros(1024, 'f'), k=9)
out = v, i, native.spmm(v, i, w), native.spmm_t(v, i, x, latents=1024)
np.savez(sys.argv[2], *map(np.asarray, out))
"""


def test_a_result_does_not_depend_on_the_number_of_threads(tmp_path):
  found = []
  for threads in ('1', '2'):
    path = tmp_path / f'{threads}.npz'
    subprocess.run([sys.executable, '-c', THREADS, threads, path], check=True)
    found.append(np.load(path))
  for name in found[0].files:
    np.testing.assert_array_equal(found[0][name], found[1][name])


def test_without_a_compiler_the_reason_is_told(monkeypatch):
  monkeypatch.setenv('CXX', 'no-such-compiler -x')
  with pytest.raises(RuntimeError, match='no-such-compiler'):
    native.build()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(native, 'FLAGS', ('-no-such-flag',))
  with pytest.raises(RuntimeError, match='no-such-flag'):
    native.build()
  assert [p for p in tmp_path.rglob('*') if p.is_file()] == []


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='names x86 flags')
@pytest.mark.parametrize('flags', [['-msse2'], ['-mavx2', '-mfma']])
def test_the_source_compiles_for_lesser_processors(flags):
  compiler = shlex.split(os.environ.get('CXX', 'c++'))
  kept = [flag for flag in native.FLAGS if flag != '-march=native']
  include = ['-isystem', jax.ffi.include_dir()]
  subprocess.run(
    [*compiler, *kept, *flags, *include, '-fsyntax-only', str(native.SOURCE)],
    check=True,
  )
