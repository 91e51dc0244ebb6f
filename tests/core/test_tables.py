"""Tables by fate, category and kind, against a count by hand."""

import collections

import numpy as np
import pytest

from lmm_sae.core import records, tables
from lmm_sae.core.findings import FATES, Findings
from lmm_sae.core.records import DICTIONARIES, Explanation, Score
from tests.stages import fake_run

LATENTS, SAMPLES = 40, 10


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """(findings, tables, workdir) of a made-up run."""
  root = tmp_path_factory.mktemp('run')
  _, workdir = fake_run.make(root, LATENTS, SAMPLES)
  findings = Findings.of(workdir, fake_run.LAYER, 'b')
  return findings, tables.of([findings], workdir), workdir


def test_each_latent_of_each_dictionary_meets_one_fate(made):
  _, found, _ = made
  mine = found[str(fake_run.LAYER)]
  assert list(mine) == ['sae', *DICTIONARIES]
  for table in mine.values():
    assert list(table['fates']) == list(FATES)
    assert sum(table['fates'].values()) == table['latents'] == LATENTS
    by_kind = [row['latents'] for row in table['by_kind'].values()]
    assert sum(by_kind) == LATENTS
    by_category = [row['latents'] for row in table['by_category'].values()]
    assert sum(by_category) == table['fates']['explained']


def test_latents_of_a_dictionary_are_not_those_of_the_sae(made):
  findings, found, workdir = made
  lines = records.read(Explanation, workdir.file('explanations.jsonl'))
  for name in ('', *DICTIONARIES):
    asked = collections.Counter(
      one.outcome
      for one in lines
      if (one.dictionary, one.explainer) == (name, 'base')
    )
    fates = found[str(fake_run.LAYER)][name or 'sae']['fates']
    assert fates['explained'] == asked['explained'] > 0
    assert fates['not_asked'] == 0 if not name else fates['not_asked'] > 0
  assert not any(one.dictionary for one in findings.explained[0])


def test_groups_are_counted_and_averaged(made):
  findings, found, workdir = made
  table = found[str(fake_run.LAYER)]['sae']
  scores = records.read(Score, workdir.file('scores.jsonl'))

  def values(latents, scorer):
    return [
      one.value
      for one in scores
      if (one.scorer, one.baseline, one.explainer, one.dictionary)
      == (scorer, '', 'base', '')
      and one.latent in latents
    ]

  stats = findings.index.stats
  kinds = [name for name in tables.KINDS if name != 'bos']
  most = np.argmax([stats[f'fired_{kind}'] for kind in kinds], axis=0)
  for kind, row in table['by_kind'].items():
    if kind == tables.NEVER:
      mine = [m for m in range(LATENTS) if stats['rows_fired'][m] == 0]
      assert mine
    else:
      mine = [
        m
        for m in range(LATENTS)
        if kinds[most[m]] == kind and stats['rows_fired'][m]
      ]
    assert row['latents'] == len(mine)
    for name, scorer in (('iou', 'iou_exact'), ('right', 'right')):
      own = values(mine, scorer)
      assert row[name]['n'] == len(own)
      if own:
        assert row[name]['value'] == pytest.approx(np.mean(own))
      else:
        assert row[name]['reason']
  colour = [
    m
    for m in range(LATENTS)
    if findings.fate(m) == 'explained' and findings.main(m).category == 'colour'
  ]
  assert table['by_category']['colour']['latents'] == len(colour) > 0
  detection = table['by_category']['colour']['detection']
  assert detection['value'] == pytest.approx(
    np.mean(values(colour, 'detection'))
  )
