"""The embedded default: the packaged 3 M LLaVA-NeXT on rendered scenes.

bash launch/demo.sh
"""

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
  """2 cores, a few minutes."""
  config = base.get_config()
  config.capture.max_tokens = 512
  return config
