"""Explaining against servers that fail at random: nothing lost or invented."""

import collections
import json

import numpy as np
import pytest
from PIL import Image

from lmm_sae.core import records, turns
from lmm_sae.core.explaining import CATEGORIES, ExplainConfig, Explainer
from lmm_sae.core.index import ImageExemplar, TextExemplar
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import explain as stage
from tests.chaos_chat import TOKENS, Chaos
from tests.fake_chat import text_of

LATENTS, IMAGES, LAYER = 120, 40, 3


class Meta:
  threshold = 1e-5


class ManyLatents:
  """An index of latents that fire on one picture or two, or on words."""

  num_latents, meta = LATENTS, Meta()

  def __init__(self):
    pictured = np.arange(LATENTS) % 3 == 0
    none = np.zeros(LATENTS, int)
    self.stats = {
      'always_on': none.astype(bool),
      'dead': none.astype(bool),
      'images_fired': pictured.astype(int),
      'peak_base': pictured.astype(float),
      'fired_base': pictured.astype(int),
      **{f'fired_{kind}': none for kind in ('template', 'question', 'answer')},
    }

  def exemplars(self, latent: int) -> list[ImageExemplar]:
    if latent % 3:
      return []
    heat_HW = np.zeros((4, 5), np.float32)
    heat_HW[latent % 4, latent % 5] = 1.0
    return [
      ImageExemplar((latent + i) % IMAGES, 0.1, heat_HW, None)
      for i in range(1 + latent % 2)
    ]

  def texts(self, latent: int) -> list[TextExemplar]:
    if latent % 3 == 0:
      return []
    words = [f'word{latent}', ' and', f' more{latent % 7}']
    return [TextExemplar(1, 0, 2.0, words, [2.0, 0.0, 0.3], 0)]


class Store:
  def image(self, sample: int) -> Image.Image:
    rng = np.random.default_rng(sample)
    return Image.fromarray(rng.integers(0, 255, (8, 10, 3), np.uint8))


def answer(request: dict, digest: str) -> str:
  """An answer that names the request; every ninth sees no pattern."""
  text, number = text_of(request), int(digest[:6], 16)
  if text.startswith('Shorten'):
    return f'label of {digest[:16]}'
  if text.startswith('Which kind'):
    return f'{CATEGORIES[number % len(CATEGORIES)]}, I say ({digest[:16]})'
  if number % 9 == 0:
    return 'CONCEPT: none'
  return f'CONCEPT: what all the bright regions of {digest[:16]} show'


def run(config, urls: str, workdir: Workdir, **more) -> list[dict]:
  config.explain.base_url = urls
  config.explain.model = 'eye'
  config.explain.concurrency = 8
  config.explain.retries = 2
  config.explain.timeout_s = 1.0
  config.explain.update(more)
  opts = ExplainConfig(**config.explain)
  with stage.clients(opts, workdir) as chats:
    explainer = Explainer(opts, 0, LAYER, '', ManyLatents(), Store(), chats)
    stage.explain(explainer, workdir.file(stage.FILE))
  return records.read_lines(workdir.file(stage.FILE))


@pytest.mark.parametrize(
  'seed', [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 5))]
)
def test_nothing_is_lost_or_invented_and_each_failure_is_counted(
  config, tmp_path, monkeypatch, seed
):
  monkeypatch.setattr(turns, 'GONE_S', 0.1)  # all of them stall now and then
  calm = Chaos(answer, seed, calm=True)
  with calm.serve(1) as urls:
    wanted = run(config, urls, Workdir.of(tmp_path / 'calm'))
  outcomes = collections.Counter(line['outcome'] for line in wanted)
  assert outcomes['explained'] > 100
  assert outcomes['no_pattern'] > 5
  assert {line['category'] for line in wanted} == {'', *CATEGORIES}
  chaos, workdir = Chaos(answer, seed), Workdir.of(tmp_path / 'chaos')
  failed = []
  with chaos.serve(3) as urls:
    for _ in range(20):
      lines = run(config, urls, workdir)
      failed.append(sum(line['outcome'] == 'failed' for line in lines))
      for line, right in zip(lines, wanted, strict=True):
        if line['outcome'] != 'failed':
          assert line == right
          continue
        for part in ('text', 'label', 'category'):  # what was had is right
          assert line[part] in ('', right[part])
      if not failed[-1]:
        break
  assert failed[0] > 0
  assert failed[-1] == 0
  files = [
    Workdir.of(tmp_path / name).file(stage.FILE).read_bytes()
    for name in ('calm', 'chaos')
  ]
  assert files[0] == files[1]
  # The same bytes went to whichever server, and what was answered was not
  # asked again.
  assert {digest for _, digest, _ in chaos.sent} == set(calm.texts)
  assert {url for url, _, _ in chaos.sent} == {0, 1, 2}
  assert len(chaos.sent) > 400
  kept = {
    path.stem: json.loads(path.read_text())
    for path in workdir.file('cache').glob('chat/*/*.json')
  }
  assert {key: one['text'] for key, one in kept.items()} == calm.texts
  used = json.loads(workdir.file('usage.json').read_text())['used']
  faults, counts = collections.Counter(), collections.Counter()
  for role in used:
    faults.update(used[role]['eye'].pop('faults', {}))
    counts.update(used[role]['eye'])
  assert dict(faults) == chaos.faults()
  assert counts['requests'] == len(calm.texts)
  paid = sum(
    done in ('good', 'plain', 'twice', 'poison')
    or done in ('broken off', 'no choices', 'no text', 'surrogate')
    for _, _, done in chaos.sent
  )
  assert counts['prompt_tokens'] == TOKENS[0] * paid
  assert counts['completion_tokens'] == TOKENS[1] * paid
