"""Configs: loading one, finding what is wrong with it, keeping what ran.

A config is a Python file whose `get_config()` returns a ConfigDict, or the
config.json of a workdir: `--config=runs/demo/config.json` runs the same again.
"""

import ast
import difflib
import importlib.util
import io
import json
import os
import pathlib
import re
import socket
import sys
import tokenize
from typing import Any

from ml_collections import ConfigDict

from lmm_sae.core import host, records
from lmm_sae.core.workdir import Workdir

FORMAT_VERSION = 1
FILE = 'config.json'
PART = re.compile(r'config\.json\..*part')  # of one that is being written
SECRET = (  # never written to disk
  'explain.api_key',
  'explain.refine_key',
  'explain.category_key',
  'score.judge_key',
  'score.second_key',
  'server.token',
)

# What must not change once an output of the workdir stands. Each stage checks
# its own settings more closely; this names the commonest mistake early.
FIXED = {
  'acts': (
    (
      *('lmm.path', 'lmm.layers', 'lmm.dtype', 'data.'),
      *('capture.batch', 'capture.group', 'capture.max_tokens'),
      *('capture.mix', 'capture.keep', 'capture.store'),  # and keep_halves
      *('capture.shard_rows', 'capture.chunk_rows'),
    ),
    'capture',
  ),
  'sae': (('seed', 'acts', 'lmm.layers', 'sae.'), 'train'),
  'sae/*/*[0-9]': (('train.',), 'train'),  # checkpoints
  'explanations.jsonl': (
    (
      *('explain.split', 'explain.exemplars', 'explain.pixels'),
      *('explain.mask', 'explain.threshold'),  # score and report, too
    ),
    'explain',
  ),
}
# What a training that goes on may be told anew: the SAE comes out the same.
FREE = (
  *('train.backend', 'train.devices', 'train.latent_shards'),
  *('train.accumulate', 'train.save_every', 'train.keep', 'train.keep_best'),
  'train.max_skipped',
)

# What a command does once: config.json, given again, must not do it again.
ONCE = {
  'capture.share': '',
  'convert.source': '',
  'convert.pickles': False,
  'convert.upload': '',
  'convert.to': '',
}


def load(path: str | pathlib.Path) -> ConfigDict:
  """The locked config of a file.

  Raises:
    ValueError: no such file, one that cannot be run, or an unknown field.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_file():
    raise ValueError(f'the config {path} does not exist')
  config = _from_json(path) if path.suffix == '.json' else _from_python(path)
  base = base_file(path)
  if base is not None and base != path:
    whole = _from_python(base)
    known = flat(whole)
    for field in flat(config):
      if field not in known:
        raise ValueError(f'{path}: {unknown(field, known)}')
    if path.suffix == '.json':  # of a version that had fewer fields
      _fill(config, whole)
  return config.lock()


def _fill(config: ConfigDict, whole: ConfigDict) -> None:
  """Gives the fields that it lacks the values of another config."""
  for key, value in whole.items():
    if key not in config:
      config[key] = value
    elif isinstance(value, ConfigDict) and isinstance(config[key], ConfigDict):
      _fill(config[key], value)


def flat(config: ConfigDict, prefix: str = '') -> dict[str, Any]:
  """The config's fields by their dotted names."""
  fields = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      fields |= flat(value, f'{prefix}{key}.')
    else:
      fields[prefix + key] = value
  return fields


def unknown(field: str, known: dict[str, Any] | list[str]) -> str:
  """What to say of a field that does not exist."""
  near = difflib.get_close_matches(field, known, n=3, cutoff=0.6)
  last = field.rpartition('.')[2]
  near += [name for name in known if name.rpartition('.')[2] == last]
  near = list(dict.fromkeys(near))[:3]
  hint = f'did you mean {" or ".join(near)}?' if near else 'see --help'
  return f'unknown field {field!r}: {hint}'


def base_file(path: str | pathlib.Path | None = None) -> pathlib.Path | None:
  """experiments/base.py: beside the config, else in the checkout, else None."""
  folders = [host.root() / 'experiments']
  if path is not None:
    folders.insert(0, pathlib.Path(path).absolute().parent)
  for folder in folders:
    if (folder / 'base.py').is_file():
      return folder / 'base.py'
  return None


def comments(path: pathlib.Path) -> dict[str, str]:
  """The comment of each field of a base.py, by dotted name.

  A field's comment stands on its line, and goes on in the lines below that
  hold nothing else.
  """
  source = path.read_text()
  fields = {}  # line on which a field ends -> its dotted name
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call) and _last_name(node.func) == 'ConfigDict':
      _field_lines(node.args[0], '', fields)
  found, current = {}, ''
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      line = token.start[0]
      alone = not token.line[: token.start[1]].strip()
      current = current if alone else fields.get(line, '')
      if current:
        words = token.string.lstrip('#').strip()
        found[current] = f'{found.get(current, "")} {words}'.strip()
    elif token.type not in (tokenize.NL, tokenize.NEWLINE):
      current = ''
  return found


def _last_name(node: ast.expr) -> str:
  """The last part of a dotted name, '' if the node is no name."""
  if isinstance(node, ast.Attribute):
    return node.attr
  return node.id if isinstance(node, ast.Name) else ''


def prepare(config: ConfigDict, workdir: Workdir) -> None:
  """Refuses what is no workdir, or one that was made with other settings.

  Raises:
    ValueError: with what is wrong and what to do.
  """
  root = workdir.root
  if root.exists() and not root.is_dir():
    raise ValueError(f'workdir {root} is a file: name a folder')
  if not root.is_dir():
    return
  file = workdir.file(FILE)
  if not file.exists():
    # Another process of this run may be writing it.
    if any(not PART.fullmatch(path.name) for path in root.iterdir()):
      raise ValueError(
        f'{root} is not empty and no workdir (it has no {FILE}): '
        'name a new folder'
      )
    return
  before, now = flat(_from_json(file)), flat(config)
  for output, (names, stage) in FIXED.items():
    if not any(root.glob(output)):
      continue
    for field, old in before.items():
      if not field.startswith(names) or field in FREE or field not in now:
        continue
      if _plain(now[field]) != _plain(old):
        raise ValueError(
          f'{root} was made by `{stage}` with {field}={old!r}, now it is '
          f'{now[field]!r}: use another --workdir, or remove '
          f'{root / pathlib.Path(output).parts[0]}'
        )


def save(config: ConfigDict, workdir: Workdir) -> None:
  """Writes config.json: the resolved config, the commit and the versions.

  Secrets and what is done once (ONCE) are left out.
  """
  values = json.loads(config.to_json_best_effort())
  for field in SECRET:
    section, _, name = field.partition('.')
    if section in values and values[section].get(name):
      values[section][name] = ''
  for field, unset in ONCE.items():
    section, _, name = field.partition('.')
    if name in values.get(section, {}):
      values[section][name] = unset
  line = {
    'format_version': FORMAT_VERSION,
    'commit': host.commit(),
    'versions': host.versions(),
    'config': values,
  }
  file = workdir.file(FILE)
  if file.exists() and json.loads(file.read_text()) == line:
    return  # several processes of one run write the same
  # The jobs of an array, on many hosts, write it at once, each a part of its
  # own, whose name the host and the process make.
  part = file.with_name(f'{FILE}.{socket.gethostname()}-{os.getpid()}.part')
  records.write_json(part, line)
  part.replace(file)


def _from_python(path: pathlib.Path) -> ConfigDict:
  # `from experiments import base` must work from wherever the file lies.
  for folder in (str(host.root()), str(path.parents[1])):
    if folder not in sys.path:
      sys.path.insert(0, folder)
  spec = importlib.util.spec_from_file_location('lmm_sae_config', path)
  if spec is None or spec.loader is None:
    raise ValueError(f'the config {path} is neither a .py nor a .json file')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config()
  except (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    SyntaxError,
    TypeError,
  ) as error:
    raise ValueError(f'the config {path} cannot be run: {error}') from error
  if not isinstance(config, ConfigDict):
    raise ValueError(f'{path}: get_config() returned no ConfigDict')
  return config


def _from_json(path: pathlib.Path) -> ConfigDict:
  try:
    line = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  if not isinstance(line, dict) or 'config' not in line:
    raise ValueError(f'{path} is not the {FILE} of a workdir')
  if line.get('format_version') != FORMAT_VERSION:
    raise ValueError(
      f'{path} has format_version {line.get("format_version")}, '
      f'this code reads {FORMAT_VERSION}'
    )
  return ConfigDict(_tuples(line['config']))


def _tuples(value: Any) -> Any:
  """JSON's lists as the tuples that they were."""
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
  return json.loads(json.dumps(value))


def _field_lines(node: ast.expr, prefix: str, fields: dict[int, str]) -> None:
  if not isinstance(node, ast.Dict):
    return
  for key, value in zip(node.keys, node.values, strict=True):
    if not isinstance(key, ast.Constant):
      continue
    if isinstance(value, ast.Dict) and value.keys:
      fields[key.lineno] = prefix + key.value
      _field_lines(value, f'{prefix}{key.value}.', fields)
    else:
      fields[value.end_lineno or key.lineno] = prefix + key.value
