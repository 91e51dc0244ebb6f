"""The index stage on the toy run, whose activations are known by hand."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from lmm_sae.core import concepts, masks
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.store import ActivationStore
from lmm_sae.sae import dictionaries, exports, index_plan
from lmm_sae.sae.baseview import BaseView
from lmm_sae.stages import index as stage
from tests import toy


@pytest.fixture
def config(config):
  config.lmm.layers = (toy.LAYER,)
  config.index.exemplars = 3
  config.index.rows = 100  # two samples at a time
  return config


def tree(path) -> dict[str, bytes]:
  return {
    str(file.relative_to(path)): file.read_bytes()
    for file in sorted(path.rglob('*'))
    if file.is_file()
  }


def test_latents_fire_where_they_were_made_to(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  stage.run(config, workdir)
  for split, first in (('a', 0), ('b', 12)):
    index = LatentIndex.open(workdir.index(toy.LAYER, split))
    things = [toy.boxes(first + s) for s in range(12)]
    area = [
      sum((b.r1 - b.r0) * (b.c1 - b.c0) for b in boxes if b.colour == toy.RED)
      for boxes in things
    ]
    samples, mean, most, count = index.postings(0)
    np.testing.assert_array_equal(samples, np.flatnonzero(area))
    np.testing.assert_array_equal(count, [a for a in area if a])
    np.testing.assert_array_equal(mean, [2.0 * a / 16 for a in area if a])
    assert set(most.tolist()) == {2.0}
    best = index.exemplars(0)
    assert len(best) == 3
    assert best[0].sample == int(np.argmax(area))
    box = next(b for b in things[best[0].sample] if b.colour == toy.RED)
    lit_HW = masks.lit(best[0].heat_HW, 2.0, 0.25)
    wanted_HW = np.zeros(toy.GRID, bool)
    wanted_HW[box.r0 : box.r1, box.c0 : box.c1] = True
    np.testing.assert_array_equal(lit_HW, wanted_HW)
    np.testing.assert_array_equal(best[0].tiles_HW, best[0].heat_HW)

    assert np.flatnonzero(index.stats['dead']).tolist() == [6]
    assert np.flatnonzero(index.stats['always_on']).tolist() == [4]
    (text,) = index.texts(3)  # the same words everywhere: shown once
    assert ''.join(text.tokens) == 'USER: is the red? yes'
    assert text.tokens[text.at] == ' red'
    assert text.acts[text.at] == text.strength == 3.0
    assert not index.exemplars(3)


def test_concepts_are_what_the_latents_were_made_for(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  stage.run(config, workdir)
  rows = concepts.load(workdir, toy.LAYER)
  assert [row.concept for row in rows[:3]] == ['red', 'blue', 'background']
  assert [row.concept for row in rows[5:]] == ['striped', '']
  assert [row.latent for row in rows if row.clean] == [0, 1, 5]
  assert [row.objects for row in rows[:3]] == [1, 1, 0]
  table = json.loads(workdir.file('concepts.json').read_text())
  assert table['counted'] == ['blue', 'red', 'striped']
  assert concepts.neurons(workdir, toy.LAYER) == 3  # here they are the latents


def test_running_again_changes_nothing(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  stage.run(config, workdir)
  before = tree(tmp_path / 'index')
  stage.run(config, workdir)
  assert tree(tmp_path / 'index') == before
  assert not list((tmp_path / 'index').rglob('parts'))


def test_other_settings_are_refused(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  stage.run(config, workdir)
  config.index.exemplars = 4
  with pytest.raises(ValueError, match='delete that folder'):
    stage.run(config, workdir)


def test_an_sae_with_another_k_is_refused(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  stage.run(config, workdir)
  sae = exports.load(workdir.export(toy.LAYER))
  fewer = dataclasses.replace(sae.config, k=sae.config.k - 1)
  exports.write(
    dataclasses.replace(sae, config=fewer), workdir.export(toy.LAYER)
  )
  with pytest.raises(ValueError, match='a row instead of'):
    stage.run(config, workdir)


def test_missing_input_names_the_stage_to_run(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  config.lmm.layers = (3,)
  with pytest.raises(ValueError, match='lmm-sae train'):
    stage.run(config, workdir)
  config.lmm.layers = (toy.LAYER,)
  config.index.splits = ('c',)
  with pytest.raises(ValueError, match='lmm-sae capture'):
    stage.run(config, workdir)


def test_copies_of_an_image_are_one_exemplar(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  images = workdir.acts('a') / 'images'
  (images / '000003.png').write((images / '000000.png').read())
  stage.run(config, workdir)
  index = LatentIndex.open(workdir.index(toy.LAYER, 'a'))
  assert index.duplicate_S.tolist() == [0, 1, 2, 0, *range(4, 12)]
  for latent in range(toy.M):
    assert not {0, 3} <= {e.sample for e in index.exemplars(latent)}


KILLED = """
  import os, signal
  from experiments import base
  from lmm_sae.core import index_build, index_tables
  from lmm_sae.core.workdir import Workdir
  from lmm_sae.sae import index_plan
  from lmm_sae.stages import index as stage

  def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

  index_plan.PART_SAMPLES = 3
  save = index_build.Part.save
  def save_and_count(self, path):
    save(self, path)
    if path.name == {part!r}:
      kill()
  if {part!r} == 'merge':
    index_tables.Writer.texts = kill
  else:
    index_build.Part.save = save_and_count
  config = base.get_config()
  config.lmm.layers = (2,)
  config.index.exemplars = 3
  config.index.rows = 100
  stage.run(config, Workdir.of({root!r}))
"""


@pytest.mark.parametrize('part', ['00000003', 'merge'])
def test_killed_and_resumed_is_as_uninterrupted(
  config, tmp_path, root, monkeypatch, part
):
  workdir = toy.make_workdir(tmp_path / 'killed')
  script = textwrap.dedent(KILLED).format(part=part, root=str(workdir.root))
  done = subprocess.run(
    [sys.executable, '-c', script],
    cwd=root,
    env=os.environ | {'PYTHONPATH': str(root)},
    check=False,
  )
  assert done.returncode == -signal.SIGKILL
  monkeypatch.setattr(index_plan, 'PART_SAMPLES', 3)
  stage.run(config, workdir)
  other = toy.make_workdir(tmp_path / 'whole')
  stage.run(config, other)
  assert tree(workdir.root / 'index') == tree(other.root / 'index')


def test_an_empty_split_is_refused(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  store = ActivationStore.open(workdir.acts('a'))
  store.samples = list
  job = index_plan.Job(
    workdir.index(toy.LAYER, 'a'),
    workdir.acts('a'),
    workdir,
    toy.LAYER,
    '',
    index_plan.IndexConfig(**config.index),
  )
  with pytest.raises(ValueError, match='nothing to index'):
    stage.build(job, store, exports.load(workdir.export(toy.LAYER)))


def test_images_with_grids_of_their_own_are_refused(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  file = workdir.acts('a') / 'meta.json'
  file.write(json.dumps(json.loads(file.read()) | {'grid': [0, 0]}).encode())
  store = ActivationStore.open(workdir.acts('a'))
  sae = exports.load(workdir.export(toy.LAYER))
  for use in (
    lambda: stage.run(config, workdir),
    lambda: BaseView(store, toy.LAYER, sae),
  ):
    with pytest.raises(
      ValueError, match='grid of patches depends on the image'
    ):
      use()


def test_dictionaries_beside_the_sae_are_indexed_as_it_is(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  toy.make_store(workdir.acts('train'), 'train', range(24, 36))
  config.index.dictionaries = ('untrained', 'neurons')
  stage.run(config, workdir)
  stores = {s: ActivationStore.open(workdir.acts(s)) for s in ('a', 'b')}
  for name in ('', 'untrained', 'neurons'):
    sae = dictionaries.load(workdir, toy.LAYER, name, config.seed)
    for split, store in stores.items():
      index = LatentIndex.open(workdir.index(toy.LAYER, split, name))
      assert index.num_latents == sae.config.latents
      fired_M = np.zeros(index.num_latents, int)
      for sample in store.samples():
        start, stop = store.span(sample)
        kind_N = store.tokens(start, stop, ('kind',))['kind']
        code = sae.encode(store.read(toy.LAYER, start, stop)[kind_N != 0])
        some = code.idx_NK[code.vals_NK > index.meta.threshold]
        fired_M += np.bincount(some, minlength=len(fired_M))
      np.testing.assert_array_equal(index.stats['rows_fired'], fired_M)
  rows = concepts.load(workdir, toy.LAYER, 'neurons')
  assert len(rows) == 2 * toy.D
  assert rows[0].concept == 'red'  # the toy's channels are its latents
  assert len(concepts.load(workdir, toy.LAYER, 'untrained')) == toy.M
  before = tree(tmp_path / 'index')
  stage.run(config, workdir)
  assert tree(tmp_path / 'index') == before
