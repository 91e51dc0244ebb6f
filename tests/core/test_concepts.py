import pytest

from lmm_sae.core import concepts, records
from lmm_sae.core.workdir import Workdir


@pytest.mark.parametrize(
  ('text', 'concept', 'expected'),
  [
    ('a Red square', 'red', True),
    ('red squares, both', 'square', True),
    ('two crosses', 'cross', True),
    ('bored', 'red', False),
    ('the letter T.', 'T', True),
    ("I don't know", 'T', False),
    ('', 'red', False),
  ],
)
def test_a_concept_is_said_as_a_word(text, concept, expected):
  assert concepts.says(text, concept) is expected


def test_a_run_without_truth_has_no_concepts(tmp_path):
  workdir = Workdir.of(tmp_path)
  assert concepts.load(workdir, 2) == []
  assert concepts.neurons(workdir, 2) is None


def test_only_latents_above_the_least_f1_stand_for_something(tmp_path):
  row = {
    'latent': 4,
    'concept': 'red',
    'threshold': 0.5,
    'f1_a': 0.5,
    'f1_b': 0.4,
    'precision_b': 0.9,
    'objects': 1.0,
    'peak': 2.0,
    'clean': False,
  }
  workdir = Workdir.of(tmp_path)
  weak = row | {'latent': 5, 'f1_a': 0.2}
  records.write_json(
    workdir.file('concepts.json'), {'2': [row, weak], 'neurons': {'2': 3}}
  )
  table = concepts.load(workdir, 2)
  assert [one.latent for one in table] == [4, 5]
  assert concepts.names(table) == {4: 'red'}
  assert concepts.neurons(workdir, 2) == 3
  assert concepts.load(workdir, 3) == []
