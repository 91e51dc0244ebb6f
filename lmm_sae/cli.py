"""The command line: one config, one workdir, one verb per stage.

lmm-sae STAGE --config=FILE --workdir=DIR [--config.section.field=value]
"""

import contextlib
import dataclasses
import difflib
import importlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

import lmm_sae
from lmm_sae.core import config as configs
from lmm_sae.core import host, wording
from lmm_sae.core.workdir import Workdir

USAGE = """\
lmm-sae STAGE --config=FILE --workdir=DIR [--config.section.field=value]
lmm-sae inspect PATH [--stats] [--json] [--against=PATH]

  --config     a file with get_config(), or the config.json of a workdir
  --workdir    folder of the run; running a stage again goes on where it was
  --verbosity  1: more is logged, and an error shows its traceback; -1: less
  --dry_run    show the resolved config and stop; of capture: what it lacks
               here, what it would take, and whether it fits
  --norecord   leave config.json as it is
  --help       with a stage: its fields, their values and what they mean"""


@dataclasses.dataclass(frozen=True)
class Stage:
  """What `--help` says of a stage, and how it treats the workdir.

  Attributes:
    does: one line for people.
    sections: sections of the config that it reads.
    writes: whether it writes the workdir; those that do not need no config.json
      of their own and leave it alone.
    needs: whether --workdir must be given.
    undone: config.json is as it was before where the stage fails: what it
      refuses leaves no trace.
    takes: its field that a word after its name is the value of; '' for none.
      Those in SHORT go without `config.` and section there, too: --stats is
      --config.inspect.stats=true.
  """

  does: str
  sections: tuple[str, ...]
  writes: bool = True
  needs: bool = True
  undone: bool = False
  takes: str = ''


STAGES = {
  'all': Stage('run the stages below in order, with the servers', ()),
  'capture': Stage(
    "store the subject's residual stream, token by token",
    ('lmm', 'data', 'capture'),
  ),
  'train': Stage('fit an SAE to the stored rows', ('sae', 'train', 'hosts')),
  'index': Stage(
    'find the images and tokens that fire each latent', ('index',)
  ),
  'evaluate': Stage(
    'say how good the SAE is, by token kind',
    ('evaluate', 'server'),
    undone=True,
  ),
  'explain': Stage(
    'ask a larger LMM what the exemplars of a latent share', ('explain',)
  ),
  'score': Stage(
    'ground each explanation in the images again', ('score', 'server')
  ),
  'steer': Stage('edit latents while the subject answers', ('steer', 'server')),
  'attribute': Stage(
    'find the latents that caused an answer', ('attribute', 'server')
  ),
  'report': Stage('put all of it on one page', ('report',)),
  'label': Stage(
    'let people rate the labels, and measure how far they agree',
    ('label', 'server'),
    False,
  ),
  'serve': Stage(
    'serve the subject and its judges over HTTP', ('lmm', 'server'), False
  ),
  'inspect': Stage(
    'show what a checkpoint, an SAE, a store or a workdir holds',
    ('inspect',),
    False,
    False,
    takes='path',
  ),
  'convert': Stage(
    'read and write other SAE layouts', ('convert',), undone=True
  ),
  'plan': Stage(
    'reckon disk, memory and hours before a run',
    ('lmm', 'data', 'capture', 'sae', 'train', 'plan'),
    False,
    False,
  ),
  'doctor': Stage('say what runs on this machine, and why', (), False, False),
}
DEFAULT_WORKDIR = 'runs/demo'
SHORT = {'stats': False, 'json': False, 'against': True}  # field: has a value
TOP = ('seed', 'acts')  # fields that every stage may read


def main(argv: list[str] | None = None) -> int:
  """Runs one command; the exit code is 0, 2 with a message, or 130."""
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    return _run(argv)
  except KeyboardInterrupt:
    print('stopped; the same command goes on from here', file=sys.stderr)
    return 130
  except (ValueError, NotImplementedError, OSError, ImportError) as error:
    if '--verbosity=1' in argv:
      traceback.print_exc()
    print(f'lmm-sae: {wording.of(error)}', file=sys.stderr)
    return 2


def _run(argv: list[str]) -> int:
  overrides, rest = _split(argv)
  names = [word for word in rest if not word.startswith('-')]
  if {'-h', '--help', '--helpfull'} & set(rest):
    with _piped():
      return _help(names[0] if names else '', rest)
  if not argv or names == ['help']:
    with _piped():
      return _help('', [])
  if '--version' in rest:
    print(lmm_sae.__version__)
    return 0
  short, rest = _short(names, rest)
  values = _flags(rest)
  name, stage = _stage(values.positional)
  overrides += [f'--config.{name}.{word}' for word in short]
  if stage.takes and values.positional[1:]:
    overrides.append(f'--config.{name}.{stage.takes}={values.positional[1]}')
  forecast = values.dry_run and name == 'capture'
  if not values.workdir and stage.needs and not forecast:
    raise wording.UsageError(f'{name}: --workdir=DIR is missing')
  if re.match(r'\w+://', values.workdir):
    raise NotImplementedError(
      f'--workdir={values.workdir}: a run is written to a local folder'
    )
  logging.use_absl_handler()
  flags.FLAGS.mark_as_parsed()
  logging.set_verbosity(values.verbosity)
  config = resolve(_config_file(name, values.config), overrides)
  without = 'DIR' if forecast else DEFAULT_WORKDIR
  workdir = Workdir.of(values.workdir or without, config.acts)
  if stage.needs:
    configs.prepare(config, workdir)
  if forecast:
    _threads(name, config)
    stage_module = importlib.import_module(f'lmm_sae.stages.{name}')
    stage_module.dry_run(config, workdir)
    return 0
  if values.dry_run:
    print(f'{name} in {workdir.root}, with')
    _show(config, tuple(config))
    return 0
  # Only of a stage without sockets: what they are told would end it, too.
  piped = _piped() if name == 'inspect' else contextlib.nullcontext()
  with piped, _recorded(config, workdir, stage, values.record):
    _threads(name, config)
    importlib.import_module(f'lmm_sae.stages.{name}').run(config, workdir)
  return 0


@contextlib.contextmanager
def _piped() -> Iterator[None]:
  """Ends quietly where the reader is gone: `| head` is no error."""
  here = threading.current_thread() is threading.main_thread()
  if not hasattr(signal, 'SIGPIPE') or not here:
    yield
    return
  before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  try:
    yield
    sys.stdout.flush()
  finally:
    signal.signal(signal.SIGPIPE, before)


@contextlib.contextmanager
def _recorded(
  config: ConfigDict, workdir: Workdir, stage: Stage, record: bool
) -> Iterator[None]:
  """Runs a stage in a workdir that says what ran, where it writes one."""
  if not stage.writes:
    yield
    return
  file = workdir.file(configs.FILE)
  before = file.read_bytes() if file.exists() else None
  new = [at for at in (workdir.root, *workdir.root.parents) if not at.exists()]
  workdir.root.mkdir(parents=True, exist_ok=True)
  if record and host.first():
    configs.save(config, workdir)
  try:
    yield
  except (ValueError, NotImplementedError, OSError, ImportError):
    if stage.undone:
      if before is None:
        file.unlink(missing_ok=True)
      else:
        file.write_bytes(before)
      for folder in new:
        if not any(folder.iterdir()):
          folder.rmdir()
    raise


def resolve(path: str, overrides: list[str]) -> ConfigDict:
  """The config of a file with `--config.section.field=value` applied.

  Raises:
    ValueError: no such file or field, or a value of another type.
  """
  config = configs.load(path)
  known = configs.flat(config)
  for word in overrides:
    field = re.sub(r'^--?(no)?config\.|=.*$', '', word, flags=re.DOTALL)
    if field not in known:
      raise wording.UsageError(configs.unknown(field, known))
  # A bare number of latents is a count, not the one latent of that number.
  overrides = [
    re.sub(r'^--?config\.explain\.latents=(\d+)$', _COUNT, word)
    for word in overrides
  ]
  values = flags.FlagValues()
  argv = ['lmm-sae', *overrides]
  config_flags.DEFINE_config_dict(
    'config', config, flag_values=values, sys_argv=argv
  )
  try:
    values(argv)
  except (flags.Error, TypeError) as error:
    raise wording.UsageError(str(error)) from error
  return values.config


_COUNT = r'--config.explain.limit=\1'


@dataclasses.dataclass(frozen=True)
class _Values:
  """The flags that are not fields of the config."""

  config: str
  workdir: str
  verbosity: int
  dry_run: bool
  record: bool
  positional: list[str]


def _flags(rest: list[str]) -> _Values:
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  for name in ('config', 'workdir'):
    flags.DEFINE_string(name, '', '', flag_values=values)
  flags.DEFINE_integer('verbosity', 0, '', flag_values=values)
  flags.DEFINE_bool('dry_run', False, '', flag_values=values)
  flags.DEFINE_bool('record', True, '', flag_values=values)
  try:
    positional = values(['lmm-sae', *rest])[1:]
  except flags.Error as error:
    raise wording.UsageError(str(error)) from error
  return _Values(
    values.config,
    values.workdir,
    values.verbosity,
    values.dry_run,
    values.record,
    positional,
  )


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
  """The overrides of config fields, and the other words."""
  overrides, rest = [], []
  words = iter(argv)
  for word in words:
    if not re.match(r'--?(no)?config\.', word):
      rest.append(word)
    elif '=' in word or re.match(r'--?noconfig\.', word):
      overrides.append(word)
    else:
      value = next(words, '')
      if not value or value.startswith('--'):
        raise wording.UsageError(f'{word} has no value: write {word}=VALUE')
      overrides.append(f'{word}={value}')
  return overrides, rest


def _short(names: list[str], rest: list[str]) -> tuple[list[str], list[str]]:
  """Fields that are given without section, as `field=value`; other words."""
  if not any(STAGES[name].takes for name in names if name in STAGES):
    return [], rest
  short, left = [], []
  words = iter(rest)
  for word in words:
    field, equals, value = word.lstrip('-').partition('=')
    if not word.startswith('--') or field not in SHORT:
      left.append(word)
      continue
    if not equals:
      value = next(words, '') if SHORT[field] else 'true'
    if not value or value.startswith('--'):
      raise wording.UsageError(f'{word} has no value: write {word}=VALUE')
    short.append(f'{field}={value}')
  return short, left


def _stage(positional: list[str]) -> tuple[str, Stage]:
  if not positional:
    raise wording.UsageError(f'which stage? One of {", ".join(STAGES)}')
  name, *more = positional
  if name not in STAGES:
    near = difflib.get_close_matches(name, STAGES, n=1)
    hint = f'did you mean {near[0]}?' if near else f'one of {", ".join(STAGES)}'
    raise wording.UsageError(f'unknown stage {name!r}: {hint}')
  if more := more[bool(STAGES[name].takes) :]:
    raise wording.UsageError(
      f'one stage at a time: what is {" ".join(more)!r}?'
    )
  return name, STAGES[name]


def _config_file(name: str, path: str) -> str:
  if path:
    return path
  base = configs.base_file()
  if STAGES[name].needs or base is None:
    raise wording.UsageError(f'{name}: --config=FILE is missing')
  return str(base)


def _threads(name: str, config: ConfigDict) -> None:
  """Says how many threads OpenMP takes, before torch is imported."""
  if name in ('capture', 'serve'):
    threads = config.lmm.threads or host.cores()
    os.environ.setdefault('OMP_NUM_THREADS', str(threads))
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')


def _help(name: str, rest: list[str]) -> int:
  if not name:
    print(f'{USAGE}\n\nStages:')
    for key, stage in STAGES.items():
      print(f'  {key:<10} {stage.does}')
    return 0
  _, stage = _stage([name])
  print(f'lmm-sae {name}: {stage.does}\n\n{USAGE}')
  given = [word.partition('=')[2] for word in rest if '--config=' in word]
  base = configs.base_file(given[0] if given else None)
  if base is None:
    print('\nWith --config=FILE its fields are shown too.')
    return 0
  config = configs.load(given[0] if given else base)
  sections = stage.sections
  if name == 'all':
    sections = tuple(config)
  elif name != 'doctor':
    sections += TOP
  print(f'\nFields, with their values in {given[0] if given else base}:')
  _show(config, sections, configs.comments(base))
  return 0


def _show(
  config: ConfigDict,
  sections: tuple[str, ...],
  comments: dict[str, str] | None = None,
) -> None:
  """Prints the fields of some sections, in base.py's order where known."""
  fields = configs.flat(config)
  order = {field: place for place, field in enumerate(comments or fields)}
  for field in sorted(fields, key=lambda name: order.get(name, len(order))):
    if field.partition('.')[0] not in sections:
      continue
    value = (
      '***' if field in configs.SECRET and fields[field] else fields[field]
    )
    print(f'  --config.{field}={value!r}')
    if comments:
      print(f'      {comments.get(field, "")}')
