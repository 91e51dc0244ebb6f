"""Who may import whom, read off the source and off sys.modules.

The rules are those of CONTRIBUTING.md. An import inside a function counts like
any other: what a process holds is what matters.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'lmm_sae'

JAX = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain'}
TORCH = {'torch', 'transformers', 'accelerate', 'torchvision'}
SERVE = {'fastapi', 'uvicorn', 'starlette'}

# What each part may import of the parts of lmm_sae, besides itself.
MAY = {
  '': {'core', 'stages'},  # cli, lazily
  'core': set(),
  'kernels': set(),
  'sae': {'kernels', 'core'},
  'lmm': {'core'},
  'scenes': {'core'},
  'stages': {'core'},
}
NUMERIC = {'sae', 'kernels'}
STAGES_MAY = {
  'train': NUMERIC,
  'evaluate': NUMERIC,
  'index': NUMERIC,
  'score': NUMERIC,
  'attribute': NUMERIC,
  'inspect': NUMERIC,
  'convert': NUMERIC,
  'plan': NUMERIC,
  'doctor': NUMERIC,
  'capture': {'lmm', 'scenes'},
  'serve': {'lmm'},
}
# What each part must not import of others' packages.
MUST_NOT = {
  '': JAX | TORCH | SERVE,
  'core': JAX | TORCH | SERVE,
  'kernels': TORCH | SERVE | {'lmm_sae.core'},
  'sae': TORCH | SERVE,
  'lmm': JAX,
  'scenes': JAX | SERVE,
}
SERVERS = ('capture', 'serve')

FILES = sorted(
  path for path in PACKAGE.rglob('*.py') if 'weights' not in path.parts
)


def part(path: pathlib.Path) -> str:
  """core, sae, ... of a file; '' for those at the top."""
  folders = path.relative_to(PACKAGE).parts[:-1]
  return folders[0] if folders else ''


def imports(path: pathlib.Path) -> set[str]:
  """The dotted names that a file imports, wherever it does."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: a relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def ours(names: set[str]) -> set[str]:
  """core, sae, ... among imported names."""
  split = [name.split('.') for name in names]
  parts = {words[1] for words in split if words[0] == 'lmm_sae' and words[1:]}
  return parts & set(MAY)


def tops(names: set[str]) -> set[str]:
  return {name.split('.')[0] for name in names}


def ids(path: pathlib.Path) -> str:
  return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize('path', FILES, ids=ids)
def test_a_file_imports_only_the_parts_it_may(path):
  home = part(path)
  may = MAY[home] | {home}
  if home == 'stages':
    may = MAY[home] | STAGES_MAY.get(path.stem, set())
  found = ours(imports(path))
  assert found <= may, f'{ids(path)} imports {found - may}'


@pytest.mark.parametrize('path', FILES, ids=ids)
def test_a_file_imports_no_framework_of_the_other_side(path):
  home = part(path)
  if home == 'stages':
    must_not = JAX if path.stem in SERVERS else TORCH | SERVE
  else:
    must_not = MUST_NOT[home]
  found = tops(imports(path)) & must_not
  assert not found, f'{ids(path)} imports {found}'


def test_nobody_imports_a_stage():
  for path in FILES:
    assert 'stages' not in ours(imports(path)), path


def test_experiments_are_imported_by_nobody():
  for path in FILES:
    assert 'experiments' not in tops(imports(path)), path


def test_the_package_itself_imports_nothing():
  assert not imports(PACKAGE / '__init__.py')


def modules_after(code: str) -> set[str]:
  """The top names in sys.modules after a fresh process ran the code."""
  done = subprocess.run(
    [sys.executable, '-c', f'{code}\nimport sys\nprint(*sys.modules)'],
    capture_output=True,
    text=True,
    check=True,
    cwd=PACKAGE.parent,
  )
  return {name.split('.')[0] for name in done.stdout.split()}


def names_of(folder: str) -> list[str]:
  return [
    '.'.join(('lmm_sae', *path.relative_to(PACKAGE).with_suffix('').parts))
    for path in FILES
    if part(path) == folder and path.stem != '__init__'
  ]


def test_the_core_loads_neither_jax_nor_torch():
  code = f'import {", ".join(names_of("core"))}, lmm_sae.cli'
  assert not modules_after(code) & (JAX | TORCH | SERVE)


def test_the_sae_loads_no_torch():
  names = names_of('kernels') + names_of('sae')
  assert names
  assert not modules_after(f'import {", ".join(names)}') & TORCH


def test_a_server_loads_no_jax():
  names = names_of('lmm') + [
    name for name in names_of('stages') if name.split('.')[-1] in SERVERS
  ]
  assert not modules_after(f'import {", ".join(names)}') & JAX


def test_the_other_stages_load_no_torch():
  names = [
    name for name in names_of('stages') if name.split('.')[-1] not in SERVERS
  ]
  assert not modules_after(f'import {", ".join(names)}') & TORCH
