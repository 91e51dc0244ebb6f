"""The settings of `tests.sae.small` as a config file, for whole processes."""

from experiments import base
from tests.sae import small


def get_config():
  """20 steps on the store that `small.write_store` writes."""
  return small.run_config(base.get_config(), train__data_shares=4)
