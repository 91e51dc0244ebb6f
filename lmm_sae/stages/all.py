"""Every stage in order, each a process, with the servers that they need.

lmm-sae all --config=experiments/tiny.py --workdir=DIR

Where the truth is known, steering and attribution read no explanation and run
beside the stages that make and score them; on a CPU, subject and explainer have
half the cores each.
Where server.url is empty, `lmm-sae serve` is started once there is an SAE to
serve; where explain.base_url is empty, `transformers serve` is started for each
explainer and the explain stage runs once with each. While score.judge_url is
empty, too, those of them that score.judge_model and score.second_model name
judge: they are stopped once scores are there. The servers load while earlier
stages work, log to WORKDIR/logs, and never outlive this process.
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

from lmm_sae.core import concepts, host, records, servers, summary
from lmm_sae.core import config as configs
from lmm_sae.core.workdir import Workdir

FIRST = ('capture', 'train')
MIDDLE = ('index',)  # while the servers load
LANES = (('evaluate', 'explain', 'score'), ('steer', 'attribute'))  # at once
LAST = ('report',)
KEYS = tuple(
  x for x in configs.SECRET if x.endswith('_key') and x != 'explain.api_key'
)  # that one is in the environment
ORDER = (*FIRST, *MIDDLE, *LANES[0], *LANES[1], *LAST)
TICK_S = 0.5  # how often running stages are looked at, and timed


@dataclasses.dataclass(frozen=True)
class AllConfig:
  """What decides which servers are started.

  Attributes:
    device: where the subject runs; an explainer of the user's runs there too.
    threads: of the subject on a CPU, and of an explainer beside it.
    server_url, server_token: of a running subject server; '' starts one.
    explain_url: of a running explainer; '' starts those named in `explainers`.
    explainers: packaged sizes or model folders; each explains every latent.
    api_key: of the explainer at explain_url.
    judges: those of `explainers` that judge, at most two.
    keys: of further servers of the user's, by the field that holds them.

  Raises:
    ValueError: a judge is to be one of the explainers, and is none.
  """

  device: str
  threads: int
  server_url: str
  server_token: str
  explain_url: str
  explainers: tuple[str, ...]
  api_key: str
  judges: tuple[str, ...]
  keys: dict[str, str]

  def __post_init__(self):
    for name in self.judges:
      if name not in self.explainers:
        raise ValueError(
          f'score.judge_model and score.second_model: {name!r} is none of the '
          f'explainers that are started, {self.explainers}: name one of them, '
          'or give score.judge_url'
        )

  @classmethod
  def of(cls, config: ConfigDict) -> 'AllConfig':
    names = (config.explain.model or 'base', *config.explain.others)
    ours = not (config.explain.base_url or config.score.judge_url)
    judges = (config.score.judge_model, config.score.second_model)
    return cls(
      device=config.lmm.device,
      threads=config.lmm.threads or max(1, host.cores() // 2),
      server_url=config.server.url,
      server_token=config.server.token,
      explain_url=config.explain.base_url,
      explainers=() if config.explain.base_url else tuple(dict.fromkeys(names)),
      api_key=config.explain.api_key,
      judges=tuple(name for name in judges if name) if ours else (),
      keys={name: key for name in KEYS if (key := configs.flat(config)[name])},
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
  subject, explainers = None, {}

  def lane(*stages: str) -> Iterator[None]:
    for stage in stages:
      for flags in _flags(stage, opts, subject, explainers):
        yield from _stage(stage, flags, workdir, seconds)
      if stage == ('score' if opts.judges else 'explain'):
        for server in explainers.values():
          server.stop()

  with _signals_raise(), contextlib.ExitStack() as stack:
    _side_by_side(lane(*FIRST))
    if not opts.server_url:
      subject = stack.enter_context(_subject(opts, workdir))
    for name, folder in zip(opts.explainers, folders, strict=True):
      server = servers.explainer(
        folder, workdir.file('logs'), opts.device, opts.threads
      )
      explainers[name] = stack.enter_context(server)
    _side_by_side(lane(*MIDDLE))
    known = workdir.file(concepts.FILE).exists()
    lanes = LANES if known else (LANES[0] + LANES[1],)  # they read the labels
    _side_by_side(*(lane(*stages) for stages in lanes))
    stack.close()
    _side_by_side(lane(*LAST))
  logging.info('done: %s', workdir.file('report') / 'index.html')


def _side_by_side(*lanes: Iterator[None]) -> None:
  """Runs lanes of stages at once; if one fails, the others are ended."""
  with contextlib.ExitStack() as stack:
    under_way = [stack.enter_context(contextlib.closing(x)) for x in lanes]
    while under_way:
      under_way = [x for x in under_way if next(x, 'ended') != 'ended']


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
    self._told = time.monotonic()

  def add(self, stage: str, seconds: float) -> None:
    """Counts the stage on, and the run as a whole."""
    now = time.monotonic()
    for name, more in ((stage, seconds), (summary.WALL, now - self._told)):
      self.by_stage[name] = self.by_stage.get(name, 0.0) + more
    self._told = now
    rounded = {name: round(t, 2) for name, t in self.by_stage.items()}
    records.write_json(self.path, rounded)


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
  flags = ['--config.server.port=0', f'--config.lmm.threads={opts.threads}']
  if opts.server_token:  # config.json keeps no secrets
    flags.append(f'--config.server.token={opts.server_token}')
  return servers.Server(
    'subject', command('serve', workdir, flags), workdir.file('logs')
  )


def _flags(
  stage: str,
  opts: AllConfig,
  subject: servers.Server | None,
  explainers: dict[str, servers.Server],
) -> list[list[str]]:
  """The flags of each run of a stage; waits for the servers that they name."""
  flags = []
  if stage in ('evaluate', 'score', 'steer', 'attribute'):
    if subject is not None:
      flags.append(f'--config.server.url={subject.wait()}')
    if opts.server_token:
      flags.append(f'--config.server.token={opts.server_token}')
  flags += [
    f'--config.{name}={key}'
    for name, key in opts.keys.items()
    if name.startswith(f'{stage}.')
  ]
  if stage == 'score':
    for role, name in zip(('judge', 'second'), opts.judges, strict=False):
      server = explainers[name]
      flags.append(f'--config.score.{role}_url={server.wait()}/v1')
      flags.append(f'--config.score.{role}_model={server.model}')
  if stage != 'explain' or not explainers:
    return [flags]
  return [
    [
      *flags,
      f'--config.explain.base_url={server.wait()}/v1',
      f'--config.explain.model={server.model}',
    ]
    for server in explainers.values()
  ]


def _stage(
  stage: str, flags: list[str], workdir: Workdir, seconds: Seconds
) -> Iterator[None]:
  """Runs one stage as a process; yields while it works.

  Raises:
    ChildProcessError: it failed.
  """
  secret = tuple(f'--config.{name}=' for name in configs.SECRET)
  told = [flag for flag in flags if not flag.startswith(secret)]
  logging.info('%s', ' '.join([stage, *told]))
  begin = time.monotonic()
  with servers.child(command(stage, workdir, flags)) as process:
    code = None
    while code is None:
      with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(TICK_S)
      now = time.monotonic()
      seconds.add(stage, now - begin)
      begin = now
      yield
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
