"""The embedded default: the packaged 3 M LLaVA-NeXT on rendered scenes.

bash launch/demo.sh
"""

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
  """2 cores, a few minutes."""
  config = base.get_config()
  config.data.train = 1200
  config.capture.max_tokens = 512
  config.capture.group = 64  # fills one shard, and both cores evenly
  config.train.lr = 3e-3  # the paper's rule is for 10 times the steps and more
  # of 6: above it, questions have read the picture, and edits come too late
  config.lmm.layers = (1,)
  config.sae.latents = 256
  config.sae.k = 5
  config.train.steps = 800
  config.train.pool_blocks = 64  # 2 samples a block
  config.train.data_shares = 1  # one process
  config.sae.dead_after = 50_000  # of some 1.6 million rows seen
  config.sae.aux = 32
  config.index.dictionaries = ('untrained', 'neurons')
  config.explain.dictionaries = ('untrained', 'neurons')
  config.explain.dictionary_limit = 40
  config.score.judge_model = 'base'  # the explainers' servers, which `all`
  config.score.second_model = 'small'  # starts, judge
  config.score.judged = 16
  config.score.cases = 4
  config.score.fuzz = 'visible'  # a turn that the packaged models know
  config.steer.candidates = 3
  config.steer.doses = (1.0, 2.0, 4.0, 8.0)
  config.attribute.samples = 40
  config.attribute.mistakes = 16
  return config
