"""The score stage on the toy run, with a judge that sees colours."""

import numpy as np
import pytest

from lmm_sae.core import grounded, records
from lmm_sae.core.records import Explanation, Score
from lmm_sae.stages import index
from lmm_sae.stages import score as stage
from tests import toy

LABELS = {0: 'a red thing', 1: 'blue', 2: 'background', 3: 'the word red'}


class Judge:
  """Finds red and blue pixels; CLIP says 30 where there are some, else 10."""

  def __init__(self, *_):
    self.requests = []

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def ground(self, images, phrases, box_threshold):
    self.requests.append(list(zip(map(id, images), phrases, strict=True)))
    return [self._see(i, p) for i, p in zip(images, phrases, strict=True)]

  def clip(self, images, texts):
    seen = [self._see(i, t).any() for i, t in zip(images, texts, strict=True)]
    return np.where(seen, 30.0, 10.0).astype(np.float32)

  def _see(self, image, phrase):
    pixels = np.asarray(image).astype(int)
    if 'red' in phrase:
      return pixels[..., 0] > pixels[..., 2] + 50
    if 'blue' in phrase:
      return pixels[..., 2] > pixels[..., 0] + 50
    return np.zeros(pixels.shape[:2], bool)


@pytest.fixture
def config(config):
  config.lmm.layers = (toy.LAYER,)
  config.server.url = 'http://127.0.0.1:1'
  config.score.images = 3
  config.score.random = 4
  config.score.bootstrap = 10
  return config


@pytest.fixture
def judge(monkeypatch):
  judge = Judge()
  monkeypatch.setattr(stage, 'SubjectClient', lambda *_: judge)
  return judge


def explain(workdir, labels=LABELS, explainer='eye') -> None:
  with records.Appender(workdir.file('explanations.jsonl')) as file:
    for latent in range(toy.M):
      label = labels.get(latent, '')
      outcome = 'explained' if label else 'no_pattern'
      file.add(
        Explanation(
          *(toy.LAYER, latent, (), outcome, label, label, '', explainer)
        )
      )


@pytest.fixture
def workdir(config, tmp_path, judge):
  workdir = toy.make_workdir(tmp_path)
  index.run(config, workdir)
  explain(workdir)
  return workdir


def scores(workdir) -> dict[tuple, Score]:
  lines = records.read(Score, workdir.file('scores.jsonl'))
  table = {(s.explainer, s.latent, s.scorer, s.baseline): s for s in lines}
  assert len(table) == len(lines)
  return table


def test_right_is_of_latents_on_objects(config, workdir):
  stage.run(config, workdir)
  table = scores(workdir)
  found = {key[1:]: s.value for key, s in table.items() if s.scorer == 'right'}
  assert found == {
    (0, 'right', ''): 1,
    (0, 'right', 'shuffled'): 0,
    (1, 'right', ''): 1,
    (1, 'right', 'shuffled'): 0,
    (5, 'right', ''): 0,  # it has no explanation
    (5, 'right', 'shuffled'): 0,
  }


def test_a_true_label_beats_both_baselines(config, workdir):
  stage.run(config, workdir)
  table = scores(workdir)
  for latent in (0, 1):
    assert table['eye', latent, 'iou_exact', ''].value == 1
    # the stripes are white: the judge misses half of a striped box
    assert 0.5 <= table['eye', latent, 'iou', ''].value <= 1
    paper = table['eye', latent, 'iou_paper', '']
    assert 0 < paper.value < table['eye', latent, 'iou', ''].value
    assert table['eye', latent, 'clip', ''].value == 30
    for scorer in ('iou_exact', 'iou', 'iou_paper', 'clip'):
      itself = table['eye', latent, scorer, '']
      assert itself.n == 3
      for baseline in ('random', 'shuffled'):
        other = table['eye', latent, scorer, baseline]
        if (latent, scorer) != (1, 'iou_paper'):  # faint red counts there
          assert other.value < itself.value
        assert other.n == (4 if baseline == 'random' else 3)
  assert not any(key[1] in (3, 4, 6) for key in table)  # no label, no image


def test_random_images_are_masked_by_the_latent_itself(config, workdir):
  """All images are drawn, so the baseline is the mean over those with red."""
  config.score.random = 50
  stage.run(config, workdir)
  things = [toy.boxes(12 + s) for s in range(12)]
  red = [any(b.colour == toy.RED for b in boxes) for boxes in things]
  found = scores(workdir)['eye', 0, 'iou_exact', 'random']
  assert (found.value, found.n) == (pytest.approx(np.mean(red)), 12)


def test_equal_pairs_are_asked_once(config, workdir, judge):
  stage.run(config, workdir)
  explain(workdir, explainer='twin')
  (request,) = judge.requests
  assert len(request) == len(set(request))
  before = workdir.file('scores.jsonl').read_bytes()
  stage.run(config, workdir)
  assert len(judge.requests) == 2  # the twin's
  after = workdir.file('scores.jsonl').read_bytes()
  assert after == before + before.replace(b'"eye"', b'"twin"')


@pytest.mark.parametrize('line', [0, 5, 7, 20])
def test_broken_off_and_resumed_is_as_uninterrupted(
  config, workdir, line, monkeypatch
):
  monkeypatch.setattr(grounded, 'BLOCK', 2)
  stage.run(config, workdir)
  path = workdir.file('scores.jsonl')
  whole = path.read_bytes()
  lines = whole.splitlines(keepends=True)
  assert len(lines) > 30
  path.write_bytes(b''.join(lines[:line]) + lines[line][:9])
  stage.run(config, workdir)
  assert path.read_bytes() == whole


def test_it_runs_where_no_truth_is_known(config, tmp_path, judge):
  workdir = toy.make_workdir(tmp_path, truth=False)
  index.run(config, workdir)
  explain(workdir)
  stage.run(config, workdir)
  assert not workdir.file('concepts.json').exists()
  assert {s.scorer for s in scores(workdir).values()} == {
    'iou',
    'iou_paper',
    'clip',
  }


def test_one_explanation_has_no_shuffled_baseline(config, tmp_path, judge):
  workdir = toy.make_workdir(tmp_path, truth=False)
  index.run(config, workdir)
  explain(workdir, {0: 'red'})
  stage.run(config, workdir)
  assert {s.baseline for s in scores(workdir).values()} == {'', 'random'}


def test_the_other_label_is_never_a_latents_own():
  others = grounded.others(range(40), 0, toy.LAYER)
  assert sorted(others.values()) == list(range(40))
  assert all(other != m for m, other in others.items())


def test_what_was_explained_from_text_is_not_sought_in_images(
  config, workdir, monkeypatch
):
  latents = {latent for _, latent, scorer, _ in scored(config, workdir)}
  (first, *rest) = sorted(latents)
  workdir.file('scores.jsonl').unlink()
  from_text = grounded.explaining.from_text
  monkeypatch.setattr(
    grounded.explaining,
    'from_text',
    lambda index, m: m == first or from_text(index, m),
  )
  assert {key[1] for key in scored(config, workdir)} == set(rest)


def scored(config, workdir) -> list[tuple]:
  """Keys of the scores that are taken of images."""
  stage.run(config, workdir)
  return [key for key in scores(workdir) if key[2] in ('iou', 'clip')]


def test_missing_input_says_what_to_do(config, workdir):
  config.server.url = ''
  with pytest.raises(ValueError, match='lmm-sae serve'):
    stage.run(config, workdir)
  config.server.url = 'http://127.0.0.1:1'
  workdir.file('explanations.jsonl').unlink()
  with pytest.raises(ValueError, match='lmm-sae explain'):
    stage.run(config, workdir)
