"""What runs on this machine and what does not, and why; what a store is worth.

lmm-sae doctor [--config=FILE --workdir=DIR]

Looks through the stores of the workdir, too: every shard and its checksums,
unless --config.doctor.checksums=False. With --config.doctor.drop=True exactly
the damaged groups are dropped, which the next `lmm-sae capture` makes again.

Nothing heavy is imported here: versions come from the packages' metadata, and
what devices there are is asked of jax and torch in processes of their own.
"""

import dataclasses
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

from ml_collections import ConfigDict

from lmm_sae.core import host, store_check
from lmm_sae.core.places import Place
from lmm_sae.core.sources import SPLITS
from lmm_sae.core.store_commits import Commits
from lmm_sae.core.workdir import Workdir

ASK_S = 120.0  # seconds that jax or torch may take to name its devices
MODELS = ('small', 'base', 'clip')
DIGEST = re.compile(r'\b[0-9a-f]{64}\b')

NEEDS = {  # what the stages need beyond the core
  'train evaluate': ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain'),
  'index score attribute': ('jax',),
  'capture': ('torch', 'transformers'),
  'serve': ('torch', 'transformers', 'fastapi', 'uvicorn'),
  'all': ('jax', 'torch', 'transformers', 'accelerate', 'fastapi', 'uvicorn'),
}

KERNELS = (
  'from lmm_sae.kernels import native, ops; why = native.why_not(); '
  'print(ops.backend_name("auto") + (f"; native: {why}" if why else ""))'
)

DEVICES = {
  'jax': 'import jax; print(", ".join(map(str, jax.devices())))',
  'torch': (
    'import torch; n = torch.cuda.device_count(); print(", ".join('
    'torch.cuda.get_device_name(i) for i in range(n)) or "cpu")'
  ),
}

OUTPUTS = {  # what stands in a workdir once a stage has begun to write
  'train': 'sae',
  'evaluate': 'evaluation.json',
  'index': 'index',
  'explain': 'explanations.jsonl',
  'score': 'scores.jsonl',
  'steer': 'steering.jsonl',
  'attribute': 'attributions.jsonl',
  'report': 'report/index.html',
}


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
  """The section `doctor` of the config; its fields are explained there."""

  checksums: bool
  drop: bool


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the examination; `wrong` if it stops something."""

  what: str
  text: str
  wrong: bool = False


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Prints the findings.

  Raises:
    ValueError: something is wrong; what is merely absent is not.
  """
  opts = DoctorConfig(**config.doctor)
  wrong = []
  for finding in (*examine(workdir), *stores(workdir, opts)):
    mark = '!' if finding.wrong else ' '
    print(f'{mark} {finding.what:<22} {finding.text}', flush=True)
    if finding.wrong and finding.what.strip() not in wrong:
      wrong.append(finding.what.strip())
  if wrong:
    raise ValueError(f'something is wrong with: {", ".join(wrong)}')


def examine(workdir: Workdir) -> list[Finding]:
  """Everything there is to say, from the machine up to the workdir."""
  versions = host.versions()
  return [
    *_machine(workdir),
    *_packages(versions),
    *[
      Finding(f'{name} devices', devices(code))
      for name, code in DEVICES.items()
      if versions[name]
    ],
    *([Finding('kernels', devices(KERNELS))] if versions['jax'] else []),
    *[weights(host.weights() / name) for name in MODELS],
    *_workdir(workdir),
  ]


def stores(workdir: Workdir, opts: DoctorConfig) -> Iterator[Finding]:
  """What is found in the store of each split that has one."""
  for split in SPLITS:
    place = workdir.acts(split)
    what = f'store {split}'
    try:
      if not (place / 'meta.json').exists():
        continue
      report = store_check.check(place, opts.checksums)
    except ValueError as error:
      yield Finding(what, str(error), wrong=True)
      continue
    yield Finding(
      what,
      f'{report.committed} of {report.groups} groups committed, {report.rows} '
      f'rows, {report.bytes / 1e9:.3g} GB, at {place}',
    )
    for note in report.notes:
      yield Finding('', f'{note} (harmless)')
    mending = opts.drop and report.damage
    for each in report.damage:
      whose = '' if each.group is None else f'group {each.group}: '
      text = f'{whose}{each.file}: {each.text}'
      yield Finding(what, text, wrong=not mending)
    if mending:
      store_check.drop(place, report)
      groups = ', '.join(map(str, report.damaged)) or 'none'
      yield Finding(
        what, f'dropped groups {groups}: run `lmm-sae capture` again'
      )
    elif report.damage:
      yield Finding(
        what,
        f'{len(report.damaged)} groups are damaged: '
        'with --config.doctor.drop=True they are dropped; then run `lmm-sae '
        'capture` again',
        wrong=True,
      )


def devices(code: str) -> str:
  """What a Python process prints; the end of its complaint if it fails."""
  try:
    done = subprocess.run(
      [sys.executable, '-c', code],
      capture_output=True,
      text=True,
      timeout=ASK_S,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return f'no answer in {ASK_S:g} s'
  if done.returncode:
    return 'none: ' + (done.stderr.strip().splitlines() or ['no message'])[-1]
  return done.stdout.strip()


def weights(folder: pathlib.Path) -> Finding:
  """Whether a packaged model is there, as its card's sha256 says."""
  what = f'model {folder.name}'
  if not (folder / 'config.json').is_file():
    return Finding(what, f'absent: nothing in {folder}')
  card = folder / 'README.md'
  digests = DIGEST.findall(card.read_text()) if card.is_file() else []
  if not digests:
    return Finding(what, 'present, unchecked: its card has no sha256')
  files = sorted(folder.glob('*.safetensors'))
  for file in files:
    if hashlib.sha256(file.read_bytes()).hexdigest() not in digests:
      return Finding(what, f'{file.name} is not what its card says', wrong=True)
  if not files:
    return Finding(what, 'its weights are missing', wrong=True)
  return Finding(what, f'present, {len(files)} weight files as shipped')


def _machine(workdir: Workdir) -> list[Finding]:
  there = workdir.root
  while not there.is_dir():
    there = there.parent
  disk = shutil.disk_usage(there)
  gib = 2**30
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / gib
  return [
    Finding('python', f'{platform.python_version()}, {sys.executable}'),
    Finding('machine', f'{platform.system()} {platform.machine()}'),
    Finding('cores and memory', f'{host.cores()} cores, {memory:.1f} GiB'),
    Finding(
      'disk',
      f'{disk.free / gib:.1f} GiB free at {there}',
      wrong=disk.free < gib // 4,
    ),
    Finding('lmm_sae', f'commit {host.commit() or "unknown"}'),
  ]


def _packages(versions: dict[str, str]) -> list[Finding]:
  findings = [
    Finding(name, version or 'absent') for name, version in versions.items()
  ]
  for stages, names in NEEDS.items():
    absent = [name for name in names if not versions[name]]
    text = f'cannot: {", ".join(absent)} absent' if absent else 'can run'
    findings.append(Finding(stages, text))
  vision = host.versions(('torchvision',))['torchvision']
  if vision and versions['torch'].endswith('+cpu'):
    findings.append(
      Finding(
        'torchvision',
        f'{vision} beside torch {versions["torch"]} can break every import of '
        'transformers: pip uninstall torchvision',
        wrong='+cpu' not in vision,
      )
    )
  return findings


def _workdir(workdir: Workdir) -> list[Finding]:
  if not workdir.file('config.json').is_file():
    return [Finding('workdir', f'{workdir.root}: nothing was run here')]
  findings = [Finding('workdir', str(workdir.root))]
  for split in SPLITS:
    findings.append(_captured(f'  capture {split}', workdir.acts(split)))
  for stage, name in OUTPUTS.items():
    path = workdir.file(name)
    text = f'{name} is there' if path.exists() else 'not run'
    findings.append(Finding(f'  {stage}', text))
  return findings


def _captured(what: str, place: Place) -> Finding:
  try:
    done = len(Commits(place, torn=[]).groups())
  except ValueError as error:  # no network, no such bucket
    return Finding(what, str(error), wrong=True)
  return Finding(what, f'{done} groups committed' if done else 'not run')
