"""An SAE of the published size imported by `lmm-sae convert`, and its peak.

`python -m tests.stages.big_import FOLDER`; see launch/check_memory.sh.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from lmm_sae.sae import tensors

LATENTS, WIDTH, K = 131_072, 4096, 256
BOUND = 1.3
LAYER = 24


def make(folder: pathlib.Path, latents: int, width: int, k: int) -> None:
  """A file of the sparsify layout, written piece by piece."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  wide = (latents, width)
  shapes = {
    'encoder.weight': (np.float32, wide),
    'encoder.bias': (np.float32, wide[:1]),
    'W_dec': (np.float32, wide),
    'b_dec': (np.float32, wide[1:]),
  }
  with tensors.Writer(folder / 'sae.safetensors', shapes) as file:
    for start, stop in tensors.pieces(latents, width):
      rows = rng.standard_normal((stop - start, width), np.float32)
      rows /= np.linalg.norm(rows, axis=1, keepdims=True)
      file.rows('encoder.weight', start, rows)
      file.rows('W_dec', start, rows)
      file.rows('encoder.bias', start, -0.1 * rng.random(stop - start))
    file.rows('b_dec', 0, rng.standard_normal(width))
  cfg = {'expansion_factor': 32, 'num_latents': latents, 'k': k, 'd_in': width}
  (folder / 'cfg.json').write_text(json.dumps(cfg))


# The stage in a process of its own, which says its peak when it ends.
CODE = """
import sys
from lmm_sae import cli
code = cli.main(sys.argv[1:])
status = open('/proc/self/status').read()
print('VmHWM', status.split('VmHWM:')[1].split()[0])
sys.exit(code)
"""


def peak(source: pathlib.Path, workdir: pathlib.Path) -> int:
  """Bytes of the peak of `lmm-sae convert` with that source.

  Raises:
    subprocess.CalledProcessError: it failed.
  """
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      CODE,
      'convert',
      '--config=experiments/base.py',
      f'--workdir={workdir}',
      f'--config.convert.source={source}',
      f'--config.lmm.layers=({LAYER},)',
    ],
    check=True,
    text=True,
    stdout=subprocess.PIPE,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  return 1024 * int(done.stdout.split('VmHWM')[1])


def main() -> int:
  with tempfile.TemporaryDirectory(dir=sys.argv[1]) as root:
    root = pathlib.Path(root)
    source = root / f'model.layers.{LAYER}'
    make(source, LATENTS, WIDTH, K)
    start = time.monotonic()
    got = peak(source, root / 'run')
    took = time.monotonic() - start
  one = 4 * LATENTS * WIDTH
  sys.stdout.write(
    f'imported in {took:.0f} s; peak {got / 1e9:.3f} GB, {got / one:.3f} of a '
    f'tensor of {one / 1e9:.3f} GB; the bound is {BOUND}\n'
  )
  return 0 if got < BOUND * one else 1


if __name__ == '__main__':
  sys.exit(main())
