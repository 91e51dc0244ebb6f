"""The index against brute force over dense activations."""

import dataclasses

import numpy as np
import pytest

from lmm_sae.core import index_build, index_merge
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.tokens import IMAGE, TEXT, Kind
from tests.core.index_world import (
  GRID,
  META,
  SAMPLES,
  SHAPE,
  VOCAB,
  M,
  build,
  make_world,
  pooled,
  rounded,
)


@pytest.fixture(params=[0, 1, 2])
def world(request):
  return make_world(request.param)


def test_postings_equal_brute_force(world, tmp_path):
  index = build(world, tmp_path, (0, 5, 8))
  for latent in range(M):
    wanted = []
    for s in range(SAMPLES):
      acts = world.dense(s)[world.first_rows_of(s, Kind.BASE), latent]
      if acts.any():
        mean = rounded(pooled(world, s)[latent])
        wanted.append((s, mean, acts.max(), (acts > 0).sum()))
    got = list(zip(*index.postings(latent), strict=True))
    np.testing.assert_array_equal(
      np.array(got).reshape(-1, 4), np.array(wanted).reshape(-1, 4)
    )
  for s in range(SAMPLES):
    latents, mean = index.sample(s)
    np.testing.assert_array_equal(latents, np.flatnonzero(pooled(world, s)))
    np.testing.assert_array_equal(mean, rounded(pooled(world, s)[latents]))


def test_exemplars_equal_brute_force(world, tmp_path):
  index = build(world, tmp_path, (0, 5, 8))
  for latent in range(M):
    strength = {s: pooled(world, s)[latent] for s in range(SAMPLES)}
    ranked = sorted(
      (s for s in strength if strength[s] > 0), key=lambda s: (-strength[s], s)
    )
    wanted, seen = [], set()
    for s in ranked:
      if world.duplicate_S[s] not in seen:
        seen.add(world.duplicate_S[s])
        wanted.append(s)
    got = index.exemplars(latent)
    assert [e.sample for e in got] == wanted[: SHAPE.exemplars]
    for exemplar in got:
      s = exemplar.sample
      assert exemplar.strength == strength[s]
      acts = world.dense(s)[:, latent]
      heat = acts[world.first_rows_of(s, Kind.BASE)].reshape(GRID)
      np.testing.assert_array_equal(exemplar.heat_HW, heat)
      tiles = acts[world.first_rows_of(s, Kind.TILE)]
      if s % 3 == 0:
        assert exemplar.tiles_HW is None
      else:
        grid = [(4, 3), (2, 6)][s % 3 - 1]
        np.testing.assert_array_equal(exemplar.tiles_HW, tiles.reshape(grid))


def test_text_exemplars_equal_brute_force(world, tmp_path):
  index = build(world, tmp_path, (0, 5, 8))
  for latent in range(M):
    found = []
    for s in range(SAMPLES):
      rows = world.rows_of(s, *TEXT)
      acts = world.dense(s)[rows, latent]
      tokens = world.tokens[s]['token'][rows]
      for at in np.flatnonzero(acts):
        low, high = max(0, at - 2), at + 3
        found.append(
          (
            -acts[at],
            s,
            int(world.tokens[s]['position'][rows[at]]),
            [VOCAB[t] for t in tokens[low:high]],
            acts[low:high].tolist(),
            int(at - low),
          )
        )
    wanted, seen = [], set()
    for one in sorted(found, key=lambda one: one[:3]):
      before = tuple(one[3][: one[5] + 1])
      if before not in seen:
        seen.add(before)
        wanted.append(one)
    got = [
      (-e.strength, e.sample, e.position, e.tokens, e.acts, e.at)
      for e in index.texts(latent)
    ]
    assert got == wanted[: SHAPE.texts]


def test_statistics_equal_brute_force(world, tmp_path):
  index = build(world, tmp_path, (0, 5, 8))
  everything = [Kind(k) for k in range(Kind.PADDING)]
  dense = {
    kind: np.concatenate(
      [world.dense(s)[world.rows_of(s, kind)] for s in range(SAMPLES)]
    )
    for kind in everything
  }
  meant = np.concatenate([dense[k] for k in everything if k != Kind.BOS])
  stats = index.stats
  for kind in everything:
    name = f'fired_{kind.name.lower()}'
    np.testing.assert_array_equal(stats[name], (dense[kind] > 0).sum(0))
  np.testing.assert_array_equal(stats['rows_fired'], (meant > 0).sum(0))
  np.testing.assert_array_equal(stats['peak'], meant.max(0))
  np.testing.assert_array_equal(stats['peak_base'], dense[Kind.BASE].max(0))
  image = np.concatenate([dense[kind] for kind in IMAGE])
  np.testing.assert_array_equal(stats['peak_image'], image.max(0))
  fires = np.maximum((meant > 0).sum(0), 1)
  np.testing.assert_allclose(stats['mean'], meant.sum(0) / fires, rtol=1e-6)
  np.testing.assert_array_equal(stats['dead'], (meant > 0).sum(0) == 0)
  assert stats['dead'][M - 1]
  for latent in range(M):
    by_sample = [
      world.dense(s)[1:, latent].any() for s in range(SAMPLES)
    ]  # the first row is BOS
    assert stats['samples_fired'][latent] == sum(by_sample)
    assert stats['images_fired'][latent] == len(index.postings(latent)[0])
  meta = index.meta
  assert (meta.images, meta.samples) == (SAMPLES - 1, SAMPLES)
  assert meta.rows == sum(map(len, world.vals))
  assert meta.firings == (meant > 0).sum() + (dense[Kind.BOS] > 0).sum()


def test_parts_and_chunks_leave_no_trace(world, tmp_path):
  build(world, tmp_path / 'one', (0,), chunk=SAMPLES)
  build(world, tmp_path / 'four', (0, 3, 6, 9), chunk=1)
  files = sorted(p.name for p in (tmp_path / 'one').glob('*.*'))
  assert len(files) > 20
  for name in files:
    if name == 'stats.npz':
      continue  # sums of floats in another order
    one, four = (tmp_path / half / name for half in ('one', 'four'))
    assert one.read_bytes() == four.read_bytes(), name


def test_always_on_needs_most_images_about_equally(tmp_path):
  """Latent 0 fires alike on all images, 1 on all but mostly one, 2 on half."""
  count = 40
  part = index_build.Part(SHAPE, np.arange(count))
  for s in range(count):
    cells = [(r, c) for r in range(2) for c in range(3)]
    tokens = {
      'sample': np.full(6, s),
      'position': np.arange(6),
      'token': np.zeros(6, int),
      'kind': np.full(6, Kind.BASE),
      'image': np.zeros(6, int),
      'row': np.array([r for r, _ in cells]),
      'col': np.array([c for _, c in cells]),
    }
    values = np.array([1.0, 1e3 if s == 5 else 1e-3, float(s % 2)])
    part.add(tokens, np.tile(values, (6, 1)), np.tile([0, 1, 2], (6, 1)))
  part.save(tmp_path / 'part.npz')
  meta = dataclasses.replace(META, samples=count)
  index_merge.merge(
    tmp_path, [tmp_path / 'part.npz'], meta, (4, 3), np.arange(count), VOCAB
  )
  index = LatentIndex.open(tmp_path)
  np.testing.assert_array_equal(index.stats['images_fired'][:3], (40, 40, 20))
  assert np.flatnonzero(index.stats['always_on']).tolist() == [0]


def test_an_index_of_nothing_that_fires_can_be_read(tmp_path):
  world = make_world(0)
  world.vals = [np.zeros_like(vals) for vals in world.vals]
  index = build(world, tmp_path, (0, 5))
  assert index.stats['dead'].all()
  assert index.exemplars(3) == index.texts(3) == []
  assert len(index.postings(0)[0]) == len(index.sample(2)[0]) == 0


def test_an_unfinished_index_and_a_wrong_latent_are_refused(tmp_path):
  with pytest.raises(ValueError, match='no finished index'):
    LatentIndex.open(tmp_path)
  index = build(make_world(0), tmp_path, (0,))
  with pytest.raises(ValueError, match='latent 12 is not in this index'):
    index.postings(M)
  meta = tmp_path / 'meta.json'
  meta.write_text(
    meta.read_text().replace('"format_version": 2', '"format_version": 9')
  )
  with pytest.raises(ValueError, match='format 9'):
    LatentIndex.open(tmp_path)
