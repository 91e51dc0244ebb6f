"""A small demo, killed again and again: the same files come out."""

import hashlib
import itertools
import json
import pathlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest

FLAGS = {
  'data.train': 192,
  'data.half': 96,
  'sae.latents': 128,
  'sae.dead_after': 10_000,
  'train.steps': 120,
  'train.save_every': 40,
  'steer.candidates': 1,
  'steer.cases_a': 2,
  'steer.cases_b': 6,
  'attribute.samples': 8,
  'attribute.mistakes': 4,
  'score.bootstrap': 50,
}
# Wall times, token counts and the commit are of a run, not of its results.
OF_A_RUN = {'seconds.json', 'usage.json', 'runs.jsonl', 'metrics.jsonl'}
OWN = {'summary.json': 'seconds', 'config.json': 'commit'}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
  root, tmp_path
):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  assert _start(root, whole).wait() == 0
  draw = random.Random(0)
  for attempt in itertools.count():
    process = _start(root, killed)
    try:
      code = process.wait(draw.uniform(8, 24) + attempt)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      continue
    assert code == 0, f'attempt {attempt}'
    break
  assert attempt > 2
  first, second = _files(whole), _files(killed)
  assert first.keys() == second.keys()
  assert [name for name in first if first[name] != second[name]] == []
  assert len(first) > 20


def _start(root: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
  flags = [f'--config.{name}={value}' for name, value in FLAGS.items()]
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'lmm_sae', 'all'),
      *('--config=experiments/tiny.py', f'--workdir={workdir}', *flags),
    ],
    cwd=root,
  )


def _files(workdir: pathlib.Path) -> dict[str, object]:
  """Every result of a run, by its place in the workdir, as it compares."""
  found: dict[str, object] = {}
  for path in sorted(workdir.rglob('*')):
    name = str(path.relative_to(workdir))
    top = pathlib.Path(name).parts[0]
    if not path.is_file() or top in {'cache', 'logs', *OF_A_RUN}:
      continue
    if top == 'report' or re.match(r'sae/\d+/\d+/', name):
      continue  # the report shows times; orbax draws its files' names
    if name in OWN:
      found[name] = json.loads(path.read_text()) | {OWN[name]: None}
    elif path.suffix == '.npy':
      found[name] = np.load(path).tobytes()
    else:
      found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
  return found
