"""What a JSON says of where its figures come from."""

import json
import os
import pathlib
import platform
import time

WIDE = ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16')  # what speed hangs on


def facts() -> dict:
  """Date, processor, and the cores that this process may use."""
  return {
    'date': time.strftime('%Y-%m-%d'),
    'machine': {'processor': processor(), 'cores': cores()},
  }


def save(found: dict, path: pathlib.Path | None) -> None:
  """Writes what was found as a JSON, if it is to be written."""
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + '\n')


def cores() -> int:
  if hasattr(os, 'sched_getaffinity'):  # not on macOS
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def processor() -> str:
  """Its name, and what makes it fast or slow."""
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    return platform.processor()
  lines = dict(x.split(':', 1) for x in text.splitlines() if ':' in x)
  names = {name.strip(): value.strip() for name, value in lines.items()}
  flags = names.get('flags', '').split()
  family = f'family {names.get("cpu family")} model {names.get("model")}'
  wide = ' '.join(f for f in WIDE if f in flags)
  return f'{names.get("model name")}, {family}, {wide}'
