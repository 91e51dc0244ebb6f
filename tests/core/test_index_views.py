"""Views, quantiles, seeded samples and merging, against brute force."""

import dataclasses

import numpy as np
import pytest

from lmm_sae.core import index_build, index_merge, index_values
from lmm_sae.core.index import VIEWS, LatentIndex
from lmm_sae.core.tokens import TEXT, Kind
from tests.core.index_world import (
  SAMPLES,
  SHAPE,
  VOCAB,
  M,
  build,
  make_world,
  pooled,
  rounded,
)

CUTS = (0, 3, 5, 8)
DRAWN = 4 * SHAPE.spread


@pytest.fixture(params=[0, 1, 2])
def world(request):
  return make_world(request.param)


def rows_of(world, s, view):
  if view == 'text':
    return world.rows_of(s, *TEXT)
  return world.first_rows_of(s, Kind[view.upper()])


def draw(seed: int, latent: int, key: int) -> float:
  """The number that decides the seeded sample, in plain integers."""
  mask = (1 << 64) - 1
  x = seed & mask
  for part in (latent, key):
    x = ((x ^ (part & mask)) + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
  return ((x >> 11) + 0.5) / 2**53


def chosen(found: list[tuple]) -> list[tuple[float, tuple]]:
  """Of (draw, order, value, ...) the sample: (place, entry), weakest first."""
  drawn = sorted(found, key=lambda one: (-one[0], one[1]))[:DRAWN]
  drawn.sort(key=lambda one: (one[2], one[1]))
  groups = min(SHAPE.spread, len(drawn))
  wanted = []
  for group in range(groups):
    some = [
      (rank, one)
      for rank, one in enumerate(drawn)
      if rank * groups // len(drawn) == group
    ]
    rank, one = max(some, key=lambda pair: pair[1][0])
    wanted.append(((rank + 0.5) / len(drawn), one))
  return wanted


def test_postings_of_every_view_equal_brute_force(world, tmp_path):
  index = build(world, tmp_path, CUTS)
  seen = 0
  for view in VIEWS:
    for latent in range(M):
      wanted = []
      for s in range(SAMPLES):
        acts = world.dense(s)[rows_of(world, s, view), latent]
        if acts.any():
          mean = rounded(np.float32(acts.astype(np.float64).sum() / len(acts)))
          wanted.append((s, mean, acts.max(), (acts > 0).sum()))
      got = list(zip(*index.postings(latent, view), strict=True))
      assert got == wanted, (view, latent)
      seen += sum(count for *_, count in got)
  assert seen > 300
  with pytest.raises(ValueError, match='none of base, tile, text'):
    index.postings(0, 'bos')


def test_quantiles_are_within_their_error_of_the_exact_ones(world, tmp_path):
  index = build(world, tmp_path, CUTS)
  assert index.meta.levels == index_values.LEVELS
  dense = np.concatenate([world.dense(s)[1:] for s in range(SAMPLES)])
  for latent in range(M):
    fired = np.sort(dense[:, latent][dense[:, latent] > 0])
    got = index.stats['quantiles'][latent]
    if not len(fired):
      assert not got.any()
      continue
    ranks = [max(1, int(np.ceil(q * len(fired)))) for q in index.meta.levels]
    np.testing.assert_allclose(
      got, fired[np.array(ranks) - 1], rtol=index_values.ERROR
    )


def test_histograms_hold_the_stated_error_over_all_magnitudes():
  rng = np.random.default_rng(3)
  values = np.exp(rng.uniform(-11, 20, 3001)).astype(np.float32)
  latent = rng.integers(0, 3, len(values)) + 4
  one, two = index_values.Histograms(), index_values.Histograms()
  one.add(latent[:1000], values[:1000])
  two.add(latent[1000:], values[1000:])
  one.put(two.settle().key, two.count)
  got = one.quantiles(4, 3)
  for m in range(3):
    mine = np.sort(values[latent == m + 4])
    ranks = np.ceil(np.array(index_values.LEVELS) * len(mine)).astype(int)
    np.testing.assert_allclose(got[m], mine[ranks - 1], rtol=index_values.ERROR)
  packed = index_values.unpack(index_values.pack(values))
  np.testing.assert_array_equal(packed, rounded(values))
  np.testing.assert_allclose(packed, values, rtol=index_values.ROUNDING)


def test_the_seeded_sample_of_images_equals_brute_force(world, tmp_path):
  index = build(world, tmp_path, CUTS)
  some = 0
  for latent in range(M):
    strength = {s: pooled(world, s)[latent] for s in range(SAMPLES)}
    fires = [s for s in strength if strength[s] > 0]
    found, seen = [], set()
    for s in fires:  # copies have one draw: the first that fires stands
      key = int(world.duplicate_S[s])
      if key not in seen:
        seen.add(key)
        found.append((draw(SHAPE.seed, latent, key), s, strength[s]))
    wanted = chosen(found)
    got = index.spread(latent)
    assert [e.sample for e in got] == [one[1] for _, one in wanted]
    marks = {s: float(rounded(strength[s])) for s in fires}
    for exemplar in got:
      s = exemplar.sample
      assert exemplar.strength == strength[s]
      less = sum(mark < marks[s] for mark in marks.values())
      same = sum(mark == marks[s] for mark in marks.values())
      np.testing.assert_allclose(
        exemplar.quantile, (less + same / 2) / len(fires), rtol=1e-6
      )
      acts = world.dense(s)[:, latent]
      heat = acts[world.first_rows_of(s, Kind.BASE)]
      np.testing.assert_array_equal(exemplar.heat_HW.reshape(-1), heat)
      tiles = acts[world.first_rows_of(s, Kind.TILE)]
      if exemplar.tiles_HW is None:
        assert not len(tiles)
      else:
        np.testing.assert_array_equal(exemplar.tiles_HW.reshape(-1), tiles)
    some += len(got)
    assert all(np.isnan(e.quantile) for e in index.exemplars(latent))
  assert some > M


def test_the_seeded_sample_of_texts_equals_brute_force(
  world, tmp_path, monkeypatch
):
  reach = SHAPE.context
  keys = {}  # what the draws are keyed by: asked of the code, told apart here

  def context_keys(token_T, begin_T, back):
    for at in range(len(token_T)):
      text = tuple(token_T[max(at - back, begin_T[at]) : at + 1].tolist())
      keys.setdefault(text, len(keys) + 100)
    return np.array(
      [
        keys[tuple(token_T[max(at - back, begin_T[at]) : at + 1].tolist())]
        for at in range(len(token_T))
      ]
    )

  monkeypatch.setattr(index_build, 'context_keys', context_keys)
  index = build(world, tmp_path, CUTS)
  for latent in range(M):
    best = {}
    for s in range(SAMPLES):
      rows = world.rows_of(s, *TEXT)
      acts = world.dense(s)[rows, latent]
      tokens = world.tokens[s]['token'][rows].tolist()
      for at in np.flatnonzero(acts):
        key = keys[tuple(tokens[max(0, at - reach) : at + 1])]
        position = int(world.tokens[s]['position'][rows[at]])
        one = (draw(SHAPE.seed, latent, key), (s, position), float(acts[at]))
        low = max(0, at - reach)
        words = [VOCAB[t] for t in tokens[low : at + reach + 1]]
        shown = acts[low : at + reach + 1].tolist()
        if key not in best or one[1] < best[key][1]:
          best[key] = (*one, words, shown, int(at - low))
    wanted = [
      (one[1], one[2], *one[3:], np.float32(place))
      for place, one in chosen(list(best.values()))
    ]
    got = [
      ((e.sample, e.position), e.strength, e.tokens, e.acts, e.at, e.quantile)
      for e in index.text_spread(latent)
    ]
    assert got == wanted, latent


def test_silent_images_fire_nothing_and_are_no_copies(world, tmp_path):
  index = build(world, tmp_path, CUTS)
  rng = np.random.default_rng(0)
  for latent in range(M):
    fires = {
      s
      for s in range(SAMPLES)
      for view in ('base', 'tile')
      if world.dense(s)[rows_of(world, s, view), latent].any()
    }
    lit = {int(world.duplicate_S[s]) for s in fires}
    wanted = {
      int(world.duplicate_S[s]) for s in range(SAMPLES) if s != 4
    } - lit  # 4 has no image
    got = index.silent(latent, 99, rng)
    assert {int(world.duplicate_S[s]) for s in got} == wanted
    assert len(got) == len(wanted)
    assert len(index.silent(latent, 1, rng)) == min(1, len(wanted))


@pytest.mark.parametrize('order', [(0, 1, 2, 3), (3, 1, 2, 0), (2, 3, 0, 1)])
def test_the_order_of_parts_and_what_they_know_leave_no_trace(
  world, tmp_path, order
):
  build(world, tmp_path / 'one', CUTS)
  build(world, tmp_path / 'two', CUTS, order=order)
  files = sorted(p.name for p in (tmp_path / 'one').glob('*.*'))
  assert len(files) > 40
  for name in files:
    one, two = (tmp_path / half / name for half in ('one', 'two'))
    assert one.read_bytes() == two.read_bytes(), name


def test_merging_a_latent_at_a_time_leaves_no_trace(
  world, tmp_path, monkeypatch
):
  build(world, tmp_path / 'one', CUTS)
  monkeypatch.setattr(index_merge, 'MB', 2)
  build(world, tmp_path / 'two', CUTS, memory_mb=1)
  for file in (tmp_path / 'one').glob('*.*'):
    assert file.read_bytes() == (tmp_path / 'two' / file.name).read_bytes()


@pytest.mark.parametrize('view', VIEWS)
def test_a_lost_posting_is_noticed(tmp_path, monkeypatch, view):
  by_latent = index_build.Part._by_latent

  def lose(self, which):
    found = by_latent(self, which)
    if which == view and found['counts'].any():
      latent = int(found['counts'].argmax())
      at = int(found['counts'][:latent].sum())
      found['counts'][latent] -= 1
      for name in ('sample', 'mean', 'max', 'count'):
        found[name] = np.delete(found[name], at)
    return found

  monkeypatch.setattr(index_build.Part, '_by_latent', lose)
  with pytest.raises(RuntimeError, match=f'firings of the {view} view'):
    build(make_world(0), tmp_path, CUTS)
  with pytest.raises(ValueError, match='no finished index'):
    LatentIndex.open(tmp_path)


def test_another_seed_draws_another_sample(tmp_path, monkeypatch):
  world = make_world(1)
  one = build(world, tmp_path / 'one', CUTS)
  other = dataclasses.replace(SHAPE, seed=6)
  monkeypatch.setattr('tests.core.index_world.SHAPE', other)
  two = build(world, tmp_path / 'two', CUTS)
  drawn = [
    [[e.sample for e in index.spread(m)] for m in range(M)]
    for index in (one, two)
  ]
  assert drawn[0] != drawn[1]


def test_the_former_format_is_refused_with_what_to_do(tmp_path):
  build(make_world(0), tmp_path, (0,))
  meta = tmp_path / 'meta.json'
  meta.write_text(
    meta.read_text().replace('"format_version": 2', '"format_version": 1')
  )
  with pytest.raises(ValueError, match=r'format 1; .* delete that folder'):
    LatentIndex.open(tmp_path)
