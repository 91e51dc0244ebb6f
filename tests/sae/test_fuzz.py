"""Mutated files of every layout: refused with a reason, or read; never worse.

The default suite mutates each layout 150 times, `-m slow` 2,000 times.
"""

import json
import pathlib
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmm_sae.sae import exports, layouts
from tests.sae import foreign_files, small

LAYOUTS = ('sparsify', 'saelens', 'index', 'learning', 'jump', 'probe')
QUIET = {
  'database': None,
  'deadline': 5000,  # a hang would be found here
  'suppress_health_check': [HealthCheck.function_scoped_fixture],
}


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> dict[str, dict[str, bytes]]:
  """{layout: {file: bytes}} of folders that are read as they are."""
  root = tmp_path_factory.mktemp('whole')
  sae = small.random_sae()
  foreign_files.learning(root, sae)
  exports.write(sae, root / 'export')
  foreign_files.sparsify(root / 'index', sae)
  held = (root / 'index' / 'sae.safetensors').rename(
    root / 'index' / 'a.safetensors'
  )
  names = ('encoder.weight', 'encoder.bias', 'W_dec', 'b_dec')
  text = json.dumps({'weight_map': dict.fromkeys(names, held.name)})
  (root / 'index' / 'sae.safetensors.index.json').write_text(text)
  folders = {
    'sparsify': foreign_files.sparsify(root / 'model.layers.4', sae),
    'saelens': foreign_files.saelens(root / 'sl', sae),
    'index': root / 'index',
    'learning': root / 'topk',
    'jump': root / 'jump',
    'probe': root / 'export' / 'sparsify',
  }
  for folder in folders.values():
    exports.load(folder)
  return {
    layout: {file.name: file.read_bytes() for file in folder.iterdir()}
    for layout, folder in folders.items()
  }


VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-(1 << 70), 1 << 70),
  st.floats(),
  st.text(max_size=9),
  st.lists(st.integers(-3, 20), max_size=3),
  st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def within(value, path=()):
  """The paths to everything in a JSON value."""
  yield path
  if isinstance(value, dict | list):
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
      yield from within(value[key], (*path, key))


def with_json(data, text: bytes) -> bytes:
  """A JSON text in which one value is gone or another one."""
  try:
    value = json.loads(text)
  except ValueError:  # it was changed before
    return text
  path = data.draw(st.sampled_from(list(within(value))))
  new = data.draw(VALUES)
  if not path:
    return json.dumps(new).encode()
  at = value
  for key in path[:-1]:
    at = at[key]
  if data.draw(st.booleans()):
    at[path[-1]] = new
  else:
    del at[path[-1]]
  return json.dumps(value).encode()


def with_header(data, held: bytes) -> bytes:
  """A safetensors file of which the header is changed as JSON."""
  count = int.from_bytes(held[:8], 'little')
  text = with_json(data, held[8 : 8 + count])
  return len(text).to_bytes(8, 'little') + text + held[8 + count :]


def mutated(data, name: str, held: bytes) -> bytes:
  """A file with bytes flipped, cut, doubled, or its JSON changed."""
  how = ['flip', 'cut', 'double', 'write']
  if name.endswith('.json'):
    how += ['json', 'json', 'json']
  if name.endswith('.safetensors') and len(held) > 8:
    how += ['header', 'header', 'header']
  kind = data.draw(st.sampled_from(how))
  if kind == 'json':
    return with_json(data, held)
  if kind == 'header':
    return with_header(data, held)
  # Half of the places are in the first 600 bytes, where headers are.
  end = data.draw(st.sampled_from([len(held), min(600, len(held))]))
  at = data.draw(st.integers(0, max(end - 1, 0)))
  if kind == 'cut':
    return held[:at]
  if kind == 'double':
    more = data.draw(st.integers(1, 80))
    return held[: at + more] + held[at:]
  if kind == 'flip':
    bit = 1 << data.draw(st.integers(0, 7))
    return (
      held[:at] + bytes(b ^ bit for b in held[at : at + 1]) + held[at + 1 :]
    )
  new = data.draw(st.binary(min_size=1, max_size=9))
  return held[:at] + new + held[at + len(new) :]


def survives(folder: pathlib.Path, files: dict[str, bytes], data) -> None:
  """One mutation: it is read to a whole SAE, or refused with a reason."""
  files = dict(files)
  for _ in range(data.draw(st.integers(1, 3))):
    name = data.draw(st.sampled_from(sorted(set(files) - {'README.md'})))
    files[name] = mutated(data, name, files[name])
  for name, held in files.items():
    (folder / name).write_bytes(held)
  refused, sae = '', None
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      source = layouts.find(folder)
      exports.check(source)
      sae = exports.take(source)
  except (ValueError, NotImplementedError, OSError) as error:
    refused = str(error)
  if sae is None:
    assert str(folder) in refused or 'sae.' in refused, refused
    return
  for name in ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D', 'theta_M'):
    assert np.isfinite(getattr(sae, name)).all()


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_mutated_file_is_refused_or_read(tmp_path, whole, layout):
  @settings(max_examples=150, derandomize=True, **QUIET)
  @given(st.data())
  def run(data):
    survives(tmp_path, whole[layout], data)

  run()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_2000_mutated_files_are_refused_or_read(tmp_path, whole, layout):
  @settings(max_examples=2000, **QUIET)
  @given(st.data())
  def run(data):
    survives(tmp_path, whole[layout], data)

  run()
