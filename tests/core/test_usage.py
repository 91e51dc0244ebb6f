"""Counts of what models used, over runs that end well or are killed."""

import json
import os
import subprocess
import sys
import threading

import pytest

from lmm_sae.core import usage
from lmm_sae.core.usage import Usage


def used(path) -> dict:
  return json.loads(path.read_text())['used']


def test_counts_add_up_by_role_and_model_over_runs(tmp_path):
  path = tmp_path / 'usage.json'
  for _ in range(2):
    big, small = (
      Usage(path, 'explainer', 'big'),
      Usage(path, 'refiner', 'small'),
    )
    big.add(requests=1, prompt_tokens=100, completion_tokens=10)
    big.add(fault='500')
    big.add(fault='timeout', prompt_tokens=5)
    small.add(requests=1, prompt_tokens=7)
    small.cached()
    big.close()
    small.close()
  assert used(path) == {
    'explainer': {
      'big': {
        'requests': 2,
        'prompt_tokens': 210,
        'completion_tokens': 20,
        'faults': {'500': 2, 'timeout': 2},
        'cost': 0.0,
      }
    },
    'refiner': {
      'small': {'requests': 2, 'prompt_tokens': 14, 'cached': 2, 'cost': 0.0}
    },
  }


def test_cost_is_tokens_by_price_and_earlier_tokens_have_it_too(tmp_path):
  path = tmp_path / 'usage.json'
  free, priced = Usage(path, 'judge', 'x'), Usage(path, 'judge', 'x', (2, 30))
  free.add(requests=1, prompt_tokens=1000, completion_tokens=100)
  free.close()
  assert used(path)['judge']['x']['cost'] == 0
  priced.add(requests=1, prompt_tokens=1000)
  priced.close()
  assert used(path)['judge']['x']['cost'] == pytest.approx(0.004 + 0.003)
  later = Usage(path, 'judge', 'x')  # who names no price leaves the one known
  later.add(requests=1, prompt_tokens=500)
  later.close()
  assert used(path)['judge']['x']['cost'] == pytest.approx(0.005 + 0.003)


def test_a_killed_run_has_counted_all_that_it_paid(tmp_path, root):
  path = tmp_path / 'usage.json'
  code = (
    'import os, pathlib, signal, sys\n'
    'from lmm_sae.core.usage import Usage\n'
    'one = Usage(pathlib.Path(sys.argv[1]), "explainer", "x")\n'
    'for _ in range(5): one.add(requests=1, prompt_tokens=3)\n'
    'os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  for _ in range(3):
    subprocess.run(
      [sys.executable, '-c', code, str(path)],
      cwd=root,
      env=os.environ | {'PYTHONPATH': str(root)},
      check=False,
    )
  assert not path.exists()
  Usage(path, 'refiner', 'y').close()
  assert used(path)['explainer']['x']['requests'] == 15
  Usage(path, 'refiner', 'y').close()
  assert used(path)['explainer']['x']['prompt_tokens'] == 45


def test_a_torn_line_of_the_ledger_counts_nothing(tmp_path):
  path = tmp_path / 'usage.json'
  one = Usage(path, 'explainer', 'x')
  one.add(requests=1)
  one.close()
  with (tmp_path / 'cache' / 'usage.jsonl').open('ab') as file:
    file.write(b'{"role": "expl')
  again = Usage(path, 'explainer', 'x')
  again.add(requests=1)
  again.close()
  assert used(path)['explainer']['x']['requests'] == 2


@pytest.mark.parametrize('gone', ['usage.json', 'cache/usage.jsonl'])
def test_either_file_may_be_removed(tmp_path, gone):
  path = tmp_path / 'usage.json'
  for count in (3, 1):
    one = Usage(path, 'explainer', 'x')
    for _ in range(count):
      one.add(requests=1)
    one.close()
    if count == 3:
      (tmp_path / gone).unlink()
  assert used(path)['explainer']['x']['requests'] == 4


def test_threads_of_several_roles_lose_no_count(tmp_path, monkeypatch):
  monkeypatch.setattr(usage, 'SAVE_EVERY_S', 0.0)
  path = tmp_path / 'usage.json'
  roles = [Usage(path, role, 'x') for role in ('explainer', 'refiner')]

  def count(one):
    for _ in range(50):
      one.add(requests=1)

  threads = [threading.Thread(target=count, args=(r,)) for r in roles * 2]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for one in roles:
    one.close()
  assert [used(path)[r]['x']['requests'] for r in used(path)] == [100, 100]


def test_counts_of_another_format_are_refused(tmp_path):
  path = tmp_path / 'usage.json'
  path.write_text('{"base": {"requests": 3}}')
  with pytest.raises(ValueError, match='move it away'):
    Usage(path, 'explainer', 'x')
