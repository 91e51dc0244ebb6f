"""Every stage in order, each a process, with the servers that they need.

lmm-sae all --config=experiments/tiny.py --workdir=DIR

Where server.url is empty, `lmm-sae serve` is started once there is an SAE to
serve; where explain.base_url is empty, `transformers serve` is started for each
explainer and the explain stage runs once with each. The servers load while
earlier stages work, log to WORKDIR/logs, and never outlive this process.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import host, records, servers
from lmm_sae.core.workdir import Workdir

ORDER = (
  'capture',
  'train',
  'evaluate',
  'index',
  'explain',
  'score',
  'steer',
  'attribute',
  'report',
)
TICK_S = 5.0  # how often the time of a stage under way is written


@dataclasses.dataclass(frozen=True)
class AllConfig:
  """What decides which servers are started.

  Attributes:
    device: where the subject runs; an explainer of the user's runs there too.
    server_url, server_token: of a running subject server; '' starts one.
    explain_url: of a running explainer; '' starts those named in `explainers`.
    explainers: packaged sizes or model folders; the first one also serves the
      score stage.
    api_key: of the explainer at explain_url.
  """

  device: str
  server_url: str
  server_token: str
  explain_url: str
  explainers: tuple[str, ...]
  api_key: str

  @classmethod
  def of(cls, config: ConfigDict) -> 'AllConfig':
    names = (config.explain.model or 'base', *config.explain.others)
    return cls(
      device=config.lmm.device,
      server_url=config.server.url,
      server_token=config.server.token,
      explain_url=config.explain.base_url,
      explainers=() if config.explain.base_url else tuple(dict.fromkeys(names)),
      api_key=config.explain.api_key,
    )


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Runs the stages of ORDER; stops at the first that fails.

  Raises:
    ChildProcessError: a stage or a server failed; the message says which.
    ValueError: an explainer's folder does not exist.
  """
  opts = AllConfig.of(config)
  folders = [explainer_folder(name) for name in opts.explainers]
  if opts.api_key:
    os.environ['OPENAI_API_KEY'] = opts.api_key
  seconds = Seconds(workdir.file('seconds.json'))
  with _signals_raise(), contextlib.ExitStack() as stack:
    subject, explainers = None, []
    for stage in ORDER:
      if stage == 'evaluate':  # there is an SAE now: load while others work
        if not opts.server_url:
          subject = stack.enter_context(_subject(opts, workdir))
        for folder in folders:
          server = servers.explainer(folder, workdir.file('logs'), opts.device)
          explainers.append(stack.enter_context(server))
      for flags in _flags(stage, opts, subject, explainers):
        _run_stage(stage, flags, workdir, seconds)
      if stage == 'explain':
        for server in explainers[1:]:
          server.stop()
      if stage == 'score' and explainers:
        explainers[0].stop()
  logging.info('done: %s', workdir.file('report') / 'index.html')


def explainer_folder(name: str) -> pathlib.Path:
  """The folder of an explainer: a packaged size, or a path.

  Raises:
    ValueError: there is no model.
  """
  tried = [host.weights() / name, pathlib.Path(name).absolute()]
  for folder in tried:
    if (folder / 'config.json').is_file():
      return folder
  raise ValueError(
    f'no model {name!r} in {tried[0].parent} nor in {tried[1]}: while '
    'explain.base_url is empty, explain.model and explain.others name packaged '
    'models (small, base) or folders'
  )


class Seconds:
  """Wall seconds by stage in a JSON file, added up over resumed runs."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.by_stage = json.loads(path.read_text()) if path.exists() else {}

  def add(self, stage: str, seconds: float) -> None:
    total = self.by_stage.get(stage, 0.0) + seconds
    records.write_json(self.path, self.by_stage | {stage: round(total, 2)})
    self.by_stage[stage] = total


def command(stage: str, workdir: Workdir, flags: list[str]) -> list[str]:
  """What runs one stage with the config of the workdir."""
  return [
    *(sys.executable, '-m', 'lmm_sae', stage),
    f'--config={workdir.file("config.json")}',
    f'--workdir={workdir.root}',
    f'--verbosity={logging.get_verbosity()}',
    '--norecord',
    *flags,
  ]


def _subject(opts: AllConfig, workdir: Workdir) -> servers.Server:
  flags = ['--config.server.port=0']
  if opts.server_token:  # config.json keeps no secrets
    flags.append(f'--config.server.token={opts.server_token}')
  return servers.Server(
    'subject', command('serve', workdir, flags), workdir.file('logs')
  )


def _flags(
  stage: str,
  opts: AllConfig,
  subject: servers.Server | None,
  explainers: list[servers.Server],
) -> list[list[str]]:
  """The flags of each run of a stage; waits for the servers that they name."""
  flags = []
  if stage in ('score', 'steer', 'attribute'):
    if subject is not None:
      flags.append(f'--config.server.url={subject.wait()}')
    if opts.server_token:
      flags.append(f'--config.server.token={opts.server_token}')
  if stage not in ('explain', 'score') or not explainers:
    return [flags]
  return [
    [
      *flags,
      f'--config.explain.base_url={server.wait()}/v1',
      f'--config.explain.model={server.model}',
    ]
    for server in (explainers if stage == 'explain' else explainers[:1])
  ]


def _run_stage(
  stage: str, flags: list[str], workdir: Workdir, seconds: Seconds
) -> None:
  logging.info('%s', ' '.join([stage, *flags]))
  begin = time.monotonic()
  with servers.child(command(stage, workdir, flags)) as process:
    code = None
    while code is None:
      with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(TICK_S)
      now = time.monotonic()
      seconds.add(stage, now - begin)
      begin = now
  if code == 0:
    return
  why = f'exit code {code}' if code > 0 else signal.Signals(-code).name
  raise ChildProcessError(
    f'stage {stage} failed ({why}): what it said stands above, the servers '
    f'log to {workdir.file("logs")}. The same command goes on from there.'
  )


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
  """SIGTERM and SIGHUP leave by an exception, so that servers are stopped."""

  def leave(number, _):
    raise SystemExit(128 + number)

  before = {
    number: signal.signal(number, leave)
    for number in (signal.SIGTERM, signal.SIGHUP)
  }
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
