"""Counts what models were asked, what they answered, and what it cost.

Each answer, and each failure, is a line of cache/usage.jsonl before anything is
made of it, so a run that is killed has counted what it paid, and the one that
goes on counts nothing twice. usage.json is the sum:

  {"format_version": 2, "ledger_bytes": lines of the ledger that it holds,
   "used": {role: {model: {"requests", "cached", "failed", "prompt_tokens",
                           "completion_tokens", "faults": {kind: attempts},
                           "prices": [in, out], "cost"}}}}

`requests` were answered, `cached` were answered before, `failed` were given up
for that run; `faults` are single attempts, of which a request has several. Cost
is tokens by the prices of 10^6 tokens that the latest run was told, for answers
that could not be used, too.
"""

import json
import os
import pathlib
import threading
import time
from typing import Any

from lmm_sae.core import records

FORMAT_VERSION = 2
SAVE_EVERY_S = 2.0  # between two sums of the ledger

_SUMMING = threading.Lock()  # roles of one process share the file


class Usage:
  """What one role's model has used; may be shared by threads.

  Args:
    path: usage.json; None: nothing is counted.
    role: what the model was asked for, as `chat.FIELDS` has it.
    prices: of 10^6 tokens of prompts and of answers; zeros leave those of an
      earlier run.
  """

  def __init__(
    self,
    path: pathlib.Path | None,
    role: str,
    model: str,
    prices: tuple[float, float] = (0.0, 0.0),
  ):
    self._path, self._role, self._model = path, role, model
    self._prices = prices
    self._lock = threading.Lock()
    self._cached = 0
    self._saved_at = time.monotonic()
    if path is None:
      return
    read(path)  # another format is refused before anything is paid
    self._ledger = path.parent / 'cache' / 'usage.jsonl'
    self._ledger.parent.mkdir(parents=True, exist_ok=True)
    self._file = os.open(self._ledger, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    size = os.fstat(self._file).st_size
    if size and os.pread(self._file, 1, size - 1) != b'\n':
      os.write(self._file, b'\n')  # a torn line, of a full disk, ends here

  def cached(self) -> None:
    """Counts an answer that was had before; it costs nothing, nor a line."""
    with self._lock:
      self._cached += 1

  def add(self, **counts: int | str) -> None:
    """Counts on; `fault='timeout'` counts one fault of that kind."""
    if self._path is None:
      return
    with self._lock:
      self._write(counts)
      if time.monotonic() - self._saved_at > SAVE_EVERY_S:
        self._save()

  def close(self) -> None:
    """Sums up, and counts no further."""
    if self._path is None:
      return
    with self._lock:
      self._save()
      os.close(self._file)

  def _write(self, counts: dict[str, int | str]) -> None:
    line = {'role': self._role, 'model': self._model, **counts}
    # one write to the end of the file: no two threads or processes mix
    os.write(self._file, json.dumps(line).encode() + b'\n')

  def _save(self) -> None:
    self._saved_at = time.monotonic()
    if self._cached:
      self._write({'cached': self._cached})
      self._cached = 0
    with _SUMMING:
      self._sum()

  def _sum(self) -> None:
    total = read(self._path)
    _add(total, self._ledger)
    if not total['used']:
      return
    mine = total['used'].get(self._role, {}).get(self._model)
    if mine is not None and any(self._prices):
      mine['prices'] = list(self._prices)
    for models in total['used'].values():
      for entry in models.values():
        price_in, price_out = entry.get('prices', (0.0, 0.0))
        entry['cost'] = round(
          1e-6
          * (
            entry.get('prompt_tokens', 0) * price_in
            + entry.get('completion_tokens', 0) * price_out
          ),
          9,
        )
    part = self._path.with_name(f'{self._path.name}.{os.getpid()}')
    records.write_json(part, total)
    part.replace(self._path)


def read(path: pathlib.Path) -> dict[str, Any]:
  """The sums of a usage.json, empty where there is none.

  Raises:
    ValueError: its format is another one.
  """
  if not path.exists():
    return {'format_version': FORMAT_VERSION, 'ledger_bytes': 0, 'used': {}}
  total = json.loads(path.read_text())
  version = total.get('format_version', 1)
  if version != FORMAT_VERSION:
    raise ValueError(
      f'{path} has format {version}, this version counts in '
      f'{FORMAT_VERSION}: move it away, and counting starts anew'
    )
  return total


def _add(total: dict[str, Any], ledger: pathlib.Path) -> None:
  """Adds the ledger's lines after `ledger_bytes`."""
  if ledger.stat().st_size < total['ledger_bytes']:
    total['ledger_bytes'] = 0  # the cache was removed, and begun again
  with ledger.open('rb') as file:
    file.seek(total['ledger_bytes'])
    for raw in file:
      if not raw.endswith(b'\n'):
        break  # another process is writing it
      total['ledger_bytes'] += len(raw)
      try:
        line = json.loads(raw)
      except json.JSONDecodeError:
        continue  # torn, see `Usage`
      models = total['used'].setdefault(line.pop('role'), {})
      entry = models.setdefault(line.pop('model'), {})
      if 'fault' in line:
        faults = entry.setdefault('faults', {})
        kind = line.pop('fault')
        faults[kind] = faults.get(kind, 0) + 1
      for name, count in line.items():
        entry[name] = entry.get(name, 0) + count
