"""The model card of an export."""

import dataclasses
import re

import pytest
from huggingface_hub import ModelCard

from lmm_sae.sae import card
from lmm_sae.sae.model import SaeConfig
from tests.sae import small

CONFIG = SaeConfig(7, 6, 12, 3)
SETTINGS = {
  'sae': dataclasses.asdict(CONFIG),
  'train': {'rows': 2048, 'lr': 0.003, 'kinds': ['all'], 'pool_blocks': 64},
  'seed': 5,
  'acts': {'rows': 419198, 'model': 'llava-hf/some_model'},
}
ROW = {'fvu': 0.0237175, 'l0': 3.0, 'dead': None, 'rows': 128000, 'firing': {}}


def make(config=CONFIG, **more) -> str:
  return card.text(small.random_sae(config), **more)


def test_the_hub_reads_its_head():
  data = ModelCard(make(settings=SETTINGS)).data
  assert data.library_name == 'lmm_sae'
  assert data.license == 'unknown'
  assert data.base_model == 'llava-hf/some_model'
  assert {'sparse-autoencoder', 'saelens'} <= set(data.tags)
  plain = SETTINGS | {'acts': {'rows': 1, 'model': 'small'}}
  assert ModelCard(make(settings=plain)).data.base_model is None


def test_it_says_what_is_known_and_leaves_out_the_rest():
  text = make(settings=SETTINGS, step=800)
  for line in (
    '| layer | 7 |',
    '| k | 3 |',
    '| optimiser steps | 800 |',
    '| rows a step | 2048 |',
    '| peak learning rate | 0.003 |',
    '| rows captured | 419198 |',
    '| seed | 5 |',
    '| token kinds trained on | all |',
  ):
    assert line in text
  assert 'pool_blocks' not in text
  assert 'imported from' not in text
  text = make(dataclasses.replace(CONFIG, layer=-1), source='owner/name')
  assert '| layer | not recorded |' in text
  assert '| imported from | owner/name |' in text
  assert 'optimiser steps' not in text


def test_figures_are_those_of_the_evaluation():
  text = make(figures={'all': ROW, 'base': ROW | {'fvu': None}, 'loop': {}})
  assert '| tokens | rows | FVU | L0 | dead |' in text
  assert '| all | 128000 | 0.02372 | 3 |  |' in text
  assert '| base | 128000 |  | 3 |  |' in text
  assert '| loop' not in text
  assert 'How good' not in make()


@pytest.mark.parametrize('activation', ['topk', 'batchtopk', 'jumprelu'])
def test_its_code_is_for_the_libraries_that_can_read_it(activation):
  config = dataclasses.replace(CONFIG, activation=activation)
  sae = small.random_sae(config)
  blocks = re.findall(r'```python\n(.*?)\n```', card.text(sae), re.DOTALL)
  *blocks, lines = blocks
  assert blocks == [block.strip() for block in card.code(sae).values()]
  assert lines.splitlines() == list(card.from_hub(sae).values())
  for block in blocks:
    compile(block, 'card', 'exec')
  assert ('sparsify' in card.code(sae)) == (activation == 'topk')


def test_no_name_breaks_out_of_the_card():
  nasty = 'x |\n\n# Title\n---\n<script> `y` [a](b)'
  text = make(source=nasty, settings={'acts': {'rows': 1, 'model': nasty}})
  assert '\n# Title' not in text
  assert text.count('\n---\n') == 1
  assert '<script>' not in text.replace('\\<script\\>', '')
