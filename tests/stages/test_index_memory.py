"""What an index holds in memory as the work grows tenfold."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

MEMORY_MB = 48

# A process of its own: ru_maxrss is the most that it ever held.
GROWS = """
  import json, pathlib, resource, sys
  import ml_dtypes
  import numpy as np
  from experiments import base
  from lmm_sae.core import index_build, records
  from lmm_sae.core.index import LatentIndex
  from lmm_sae.core.store import ActivationStore, StoreMeta
  from lmm_sae.core.tokens import Kind
  from lmm_sae.core.workdir import Workdir
  from lmm_sae.sae import exports, index_plan, model
  from lmm_sae.stages import index as stage

  SIDE, TILES, TEXT, D, M, K, GROUP = 12, 18, 9, 8, 3072, 24, 6

  def make_store(path, samples):
    meta = StoreMeta(
      split='b', model='toy', fingerprint='f', layers=(2,),
      layer_paths={'2': 'layers.2'}, width=D, grid=(SIDE, SIDE),
      image_backend='pil',
    )
    places = [(Kind.BOS, -1, -1)]
    places += [(Kind.BASE, r, c) for r in range(SIDE) for c in range(SIDE)]
    places += [(Kind.TILE, r, c) for r in range(TILES) for c in range(TILES)]
    places += [(Kind.QUESTION, -1, -1)] * TEXT
    kind, row, col = np.array(places).T
    count = len(places)
    rows = count * GROUP
    store = ActivationStore.create(
      path, meta, samples // GROUP, rows, rows, count)
    records.write_json(path / 'vocab.json', [str(i) for i in range(97)])
    rng = np.random.default_rng(0)
    for g in range(samples // GROUP):
      x_ND = rng.standard_normal((rows, D)).astype(ml_dtypes.bfloat16)
      tokens = {
        'sample': np.repeat(np.arange(GROUP) + g * GROUP, count),
        'position': np.tile(np.arange(count), GROUP),
        'token': rng.integers(0, 97, rows),
        'kind': np.tile(kind, GROUP),
        'row': np.tile(row, GROUP),
        'col': np.tile(col, GROUP),
        'image': np.zeros(rows),
        'box': np.zeros((rows, 4)),
      }
      lines = [
        records.Sample(
          sample=g * GROUP + i, group=g, source='', image='', width=0,
          height=0, prompt='', turns=(), start=i * count,
          stop=(i + 1) * count, truth=None,
        )
        for i in range(GROUP)
      ]
      store.write_group(g, {2: x_ND}, tokens, lines, [])

  def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

  root, samples, memory_mb = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  workdir = Workdir.of(root)
  make_store(workdir.acts('b'), samples)
  rng = np.random.default_rng(1)
  w_MD = rng.standard_normal((M, D)).astype(np.float32)
  sae = exports.Sae(
    model.SaeConfig(layer=2, width=D, latents=M, k=K), w_MD,
    np.zeros(M, np.float32), w_MD, np.zeros(D, np.float32),
    np.zeros(M, np.float32))
  exports.write(sae, workdir.export(2))
  sae.encode(np.zeros((4096, D), np.float32))  # what XLA takes is not ours
  config = base.get_config()
  config.lmm.layers = (2,)
  config.index.splits = ('b',)
  config.index.memory_mb = memory_mb
  config.index.processes = 1
  merge, peaks = stage.index_merge.merge, [peak_mb()]
  def measured(*args):
    peaks.append(peak_mb())
    return merge(*args)
  stage.index_merge.merge = measured
  index_plan.PART_SAMPLES = 48
  runs = []
  write = index_build.Part._write_run
  index_build.Part._write_run = lambda *args: (write(*args), runs.append(0))
  stage.run(config, workdir)
  index = LatentIndex.open(workdir.index(2, 'b'))
  print(json.dumps({
    'peaks': [*peaks, peak_mb()], 'runs': len(runs),
    'firings': index.meta.firings,
  }))
"""


def grow(root, path, samples: int) -> dict:
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      textwrap.dedent(GROWS),
      str(path),
      str(samples),
      str(MEMORY_MB),
    ],
    cwd=root,
    env=os.environ | {'PYTHONPATH': str(root), 'XLA_FLAGS': ''},
    check=True,
    stdout=subprocess.PIPE,
  )
  return json.loads(done.stdout)


@pytest.mark.slow
def test_memory_stays_under_its_bound_as_the_work_grows_tenfold(root, tmp_path):
  few = grow(root, tmp_path / 'few', 24)
  many = grow(root, tmp_path / 'many', 240)
  assert many['firings'] > 9 * few['firings']
  assert many['runs'] > 5  # what a part holds went to disk in between
  # Its postings and maps alone take more.
  assert many['firings'] * 24 > (MEMORY_MB << 20)
  for found in (few, many):
    before, _, after = found['peaks']
    assert after - before < MEMORY_MB, found
