"""The benchmark of the index and the check of its size, at tiny shapes."""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import index, index_rivals, index_size
from benchmarks.codes import Codes
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.tokens import Kind

CODES = Codes(latents=40, k=3, drawn=4, side=4, tiles=0, text=5)
SAMPLES = 7
ARGS = argparse.Namespace(
  samples=SAMPLES, rows=60, part_samples=3, memory_mb=64, turns=1, only=''
)


@pytest.fixture(scope='module')
def job(tmp_path_factory):
  folder = tmp_path_factory.mktemp('codes')
  index.write(CODES, SAMPLES, folder / 'codes')
  return {
    **vars(CODES),
    'tokens': CODES.tokens,
    'samples': SAMPLES,
    'vocab': 4096,
    'codes': str(folder / 'codes'),
    'rows': 60,
    'part_samples': 3,
    'memory_mb': 64,
  }


@pytest.fixture(scope='module')
def mean_SM():
  """The pooled mean by brute force."""
  mean_SM = np.zeros((SAMPLES, CODES.latents))
  for sample in range(SAMPLES):
    tokens, vals_NK, idx_NK = CODES.sample(sample)
    base = tokens['kind'] == Kind.BASE
    np.add.at(mean_SM[sample], idx_NK[base], vals_NK[base] / base.sum())
  return mean_SM


def test_codes_are_k_different_latents_and_the_same_each_time():
  tokens, vals_NK, idx_NK = CODES.samples(2, 4)
  assert (vals_NK > 0).all()
  assert (np.diff(np.sort(idx_NK, axis=1), axis=1) > 0).all()
  assert idx_NK.max() < CODES.latents
  assert tokens['sample'].tolist() == [2] * CODES.tokens + [3] * CODES.tokens
  np.testing.assert_array_equal(vals_NK[CODES.tokens :], CODES.sample(3)[1])


def test_ours_and_the_tuned_rival_pool_alike(job, mean_SM, tmp_path):
  from safetensors.numpy import load_file

  for name in ('ours', 'tuned'):
    (tmp_path / name).mkdir()
    index_rivals.WAYS[name]()(job, tmp_path / name)
  made = LatentIndex.open(tmp_path / 'ours')
  rival = load_file(tmp_path / 'tuned' / 'index.safetensors')
  for latent in range(CODES.latents):
    fires = np.flatnonzero(mean_SM[:, latent])
    sample_S, found_S, *_ = made.postings(latent)
    assert sample_S.tolist() == fires.tolist()
    np.testing.assert_allclose(found_S, mean_SM[fires, latent], rtol=1 / 256)
    start, stop = rival['offset'][latent : latent + 2]
    assert sorted(rival['image'][start:stop]) == fires.tolist()


def test_the_papers_method_finds_the_strongest_images(job, mean_SM, tmp_path):
  index_rivals.paper()(job, tmp_path)
  best = json.loads((tmp_path / 'best.json').read_text())
  assert sorted(map(int, best)) == np.flatnonzero(mean_SM.any(0)).tolist()
  for latent, pairs in best.items():
    want = np.sort(mean_SM[:, int(latent)])[::-1][:5]
    found = [value for _, value in pairs]
    np.testing.assert_allclose(found, want[want > 0], rtol=1e-5)


@pytest.mark.slow
def test_a_run_tells_of_every_way(tmp_path):
  run = index.compare(CODES, ARGS, tmp_path)
  assert list(run['results']) == ['ours', *index.RIVALS]
  for way in run['results'].values():
    assert way['tokens_per_s'] > 0
    assert way['peak_mb'] >= way['start_mb'] > 0
    assert way['disk_mb'] > 0
  assert 'ours is' in index.table(run)


WORDS = (
  *('--images=30', '--latents=512', '--k=16', '--side=12', '--tiles=14'),
  *('--part_samples=5', '--memory_mb=64', '--rows=400'),
)


def size(folder: pathlib.Path) -> list[str]:
  module = 'benchmarks.index_size'
  return [sys.executable, '-m', module, *WORDS, f'--folder={folder}']


@pytest.mark.slow
def test_a_killed_check_goes_on_and_ends_with_the_same_index(root, tmp_path):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  keep = {'cwd': root, 'env': os.environ | {'PYTHONPATH': str(root)}}
  keep |= {'stdout': subprocess.PIPE, 'text': True}
  subprocess.run(size(whole), **keep)
  first = subprocess.Popen(size(killed), **keep)
  while not (killed / 'parts' / f'{5:08d}').is_dir():
    assert first.poll() is None, 'it ended before it was killed'
    time.sleep(0.001)
  os.kill(first.pid, signal.SIGKILL)
  first.communicate()
  assert not (killed / 'meta.json').exists()
  again = subprocess.run(size(killed), **keep)
  told = json.loads(again.stdout)
  assert 2 <= told['parts_found'] < 6
  assert told['images_added'] == 30 - 5 * told['parts_found']
  for file in whole.rglob('*.npy'):
    there = killed / file.relative_to(whole)
    assert there.read_bytes() == file.read_bytes(), file.name


def test_other_codes_are_no_more_work_for_a_folder(tmp_path):
  args = argparse.Namespace(images=5)
  index_size._same(CODES, args, tmp_path)
  other = Codes(latents=41, k=3)
  with pytest.raises(ValueError, match='give another --folder'):
    index_size._same(other, args, tmp_path)


def test_each_bound_that_is_broken_is_told():
  args = argparse.Namespace(memory_mb=100, images=10)
  ms = {'open_ms': 20, 'latent_ms': {'most': 31}, 'sample_ms': {'most': 1}}
  found = {
    'start_mb': 50,
    'peak_mb': 151,
    'whole': {'with_parts_gb': 101},
    'answers': {'cold': ms, 'warm': ms | {'open_ms': 19}},
  }
  told = index_size.bounds(found, args)
  assert len(told) == 3
  found |= {'peak_mb': 150, 'whole': {'with_parts_gb': 99}}
  assert len(index_size.bounds(found, args)) == 1


def test_the_whole_is_what_stands_and_what_further_parts_would_take():
  args = argparse.Namespace(images=index_size.IMAGES // 2, part_samples=23_342)
  found = {'index_bytes': 3e9, 'parts_bytes': [9e9, 7e9, 1e9], 'peak_mb': 5}
  told = index_size.whole(found, args)
  assert told['index_gb'] == 6
  assert told['with_parts_gb'] == 6 + 17 + 9  # one more, as large as any
