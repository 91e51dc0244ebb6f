"""What it costs to store rows as int8 with a scale a row, instead of bfloat16.

    python -m benchmarks.int8_cost [--config=experiments/tiny.py] --out=FILE

Captures the same samples as both, trains an SAE on each with the same settings
and seed, and prints, by token kind, as FVU on a half that neither saw:

  rounding        of the rows as int8 gives them back, of the rows of bfloat16
  SAE, bfloat16   of the SAE that was trained on bfloat16
  SAE, int8       of the SAE that was trained on int8

Both SAEs read the rows of bfloat16. `rounding` is what int8 adds to a row;
whether training minds is what the last two say.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks import machine, worker
from lmm_sae.core import evaluation, tokens
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import Kind

ROOT = pathlib.Path(__file__).parents[1]
SPLIT = 'b'
READ_ROWS = 2**15
DTYPES = ('bfloat16', 'int8')


def main() -> None:
  args = _arguments()
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    found = {
      **machine.facts(),
      'versions': worker.versions(),
      **compare(pathlib.Path(folder), args.config, args.overrides),
    }
  print(table(found))
  machine.save(found, args.out)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', default=str(ROOT / 'experiments/tiny.py'))
  parser.add_argument('--folder', help='where the two runs are made')
  parser.add_argument('--out', type=pathlib.Path, help='a JSON')
  parser.add_argument(
    'overrides', nargs='*', help='--config.section.field=value, after --'
  )
  return parser.parse_args()


def compare(folder: pathlib.Path, config: str, overrides: list[str]) -> dict:
  """Both runs, and the figures of each layer."""
  for dtype in DTYPES:
    run = [f'--workdir={folder / dtype}', f'--config={config}', *overrides]
    run.append(f'--config.capture.store={dtype}')
    stage('capture', *run)
    stage('train', *run)
  other = f'{folder}/int8/sae/{{layer}}/export'
  stage(
    *('evaluate', f'--workdir={folder / "bfloat16"}'),
    f'--config={folder / "bfloat16" / "config.json"}',
    *(f'--config.evaluate.split={SPLIT}', '--config.evaluate.rows=0'),
    f"--config.evaluate.others=('{other}',)",
  )
  stores = {
    dtype: ActivationStore.open(folder / dtype / 'acts' / SPLIT)
    for dtype in DTYPES
  }
  said = json.loads((folder / 'bfloat16' / evaluation.FILE).read_text())
  layers = {}
  for layer in stores['int8'].meta.layers:
    exact, rounded = said['compared'][str(layer)]['saes']
    lost = rounding(*stores.values(), layer)
    layers[str(layer)] = {
      kind: {
        'rows': figures['rows'],
        'rounding': lost[kind],
        'sae_bfloat16': figures['fvu'],
        'sae_int8': rounded['kinds'][kind]['fvu'],
      }
      for kind, figures in exact['kinds'].items()
      if kind in lost and figures['fvu'] is not None
    }
  bytes_ = {
    dtype: sum(
      file.stat().st_size
      for file in (folder / dtype / 'acts').rglob('*')
      if file.is_file() and 'images' not in file.parts
    )
    for dtype in DTYPES
  }
  return {
    'settings': {
      'config': pathlib.Path(config).name,
      'overrides': overrides,
      'split': SPLIT,
    },
    'store_bytes': bytes_,
    'layers': layers,
  }


def stage(name: str, *words: str) -> None:
  """Runs a stage.

  Raises:
    RuntimeError: it failed.
  """
  done = subprocess.run(
    [sys.executable, '-m', 'lmm_sae', name, *words],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=sys.stderr,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f'{name} ended with {done.returncode}: see above')


def rounding(
  exact: ActivationStore, rounded: ActivationStore, layer: int
) -> dict[str, float]:
  """{kind, or image, text, all: FVU} of one store's rows as another's.

  Raises:
    ValueError: the stores do not hold the same tokens in the same order.
  """
  if exact.ranges != rounded.ranges:
    raise ValueError('the two stores do not hold the same rows')
  error, square, sums, counts = (
    np.zeros(len(Kind)),
    np.zeros(len(Kind)),
    np.zeros((len(Kind), exact.meta.width)),
    np.zeros(len(Kind)),
  )
  for start, stop in exact.ranges:
    for at in range(start, stop, READ_ROWS):
      end = min(at + READ_ROWS, stop)
      ours, theirs = exact.tokens(at, end), rounded.tokens(at, end)
      for name in ('sample', 'position'):
        if not np.array_equal(ours[name], theirs[name]):
          raise ValueError('the two stores do not hold the same tokens')
      x_ND = exact.read(layer, at, end).astype(np.float64)
      off_ND = x_ND - rounded.read(layer, at, end).astype(np.float64)
      for kind in Kind:
        of_N = ours['kind'] == kind
        error[kind] += (off_ND[of_N] ** 2).sum()
        square[kind] += (x_ND[of_N] ** 2).sum()
        sums[kind] += x_ND[of_N].sum(0)
        counts[kind] += of_N.sum()
  found = {}
  for name in evaluation.ORDER:
    of = list(tokens.kinds(name))
    if counts[of].sum():
      mean_D = sums[of].sum(0) / counts[of].sum()
      spread = square[of].sum() - counts[of].sum() * (mean_D @ mean_D)
      if spread:  # of one row there is none
        found[name] = float(error[of].sum() / spread)
  return found


def table(found: dict) -> str:
  """In words, a line a kind."""
  sizes = found['store_bytes']
  lines = [
    f'stores: {sizes["bfloat16"] / 1e6:.1f} MB bfloat16, '
    f'{sizes["int8"] / 1e6:.1f} MB int8'
  ]
  for layer, kinds in found['layers'].items():
    lines.append(
      f'layer {layer:<6}{"rows":>9}{"rounding":>12}{"SAE, bfloat16":>15}'
      f'{"SAE, int8":>11}'
    )
    lines += [
      f'  {name:<10}{one["rows"]:>9,}{one["rounding"]:>12.2e}'
      f'{one["sae_bfloat16"]:>15.4f}{one["sae_int8"]:>11.4f}'
      for name, one in kinds.items()
    ]
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
