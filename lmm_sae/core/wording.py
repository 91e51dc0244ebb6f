"""How an error is told to whoever runs a command."""

import errno

EXTRAS = {  # the extra that brings a package which the core does not need
  'jax': 'sae',
  'flax': 'sae',
  'optax': 'sae',
  'orbax': 'sae',
  'grain': 'sae',
  'torch': 'torch',
  'transformers': 'torch',
  'accelerate': 'torch',
  'bitsandbytes': 'int8',
  'fastapi': 'serve',
  'uvicorn': 'serve',
  'huggingface_hub': 'hub',
  'ray': 'ray',
  'datasets': 'data',
  'tensorboardX': 'tb',
  'wandb': 'wandb',
}


class UsageError(ValueError):
  """The command line itself is wrong."""


def of(error: Exception) -> str:
  """What went wrong and what to do, in one or two lines."""
  text = str(error)
  if isinstance(error, UsageError):
    return f'{text}\n(lmm-sae --help shows how it is used)'
  code = error.errno if isinstance(error, OSError) else None
  if code in (errno.ENOSPC, errno.EDQUOT) or 'No space left' in text:
    return (
      f'disk full: {text}\nFree some space and run the same command: what is '
      'committed is kept'
    )
  if code == errno.EADDRINUSE:
    return f'port taken: {text}\nChoose another with --config.server.port'
  if isinstance(error, ConnectionError):
    return f'cannot reach a server: {text}'
  if isinstance(error, ModuleNotFoundError) and error.name:
    package = error.name.partition('.')[0]
    if package in EXTRAS:
      return f'{text}: pip install "lmm_sae[{EXTRAS[package]}]"'
  return text or type(error).__name__
