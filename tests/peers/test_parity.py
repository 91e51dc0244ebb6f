"""SAEs cross over to other libraries and back, and say the same of rows.

The libraries run in environments of their own (benchmarks/peers.sh), each in
one process that saves its cases and one that loads ours. Codes are compared
latent by latent: the same ones fire, with the same values to 1e-5.

    bash launch/check_parity.sh
"""

import functools
import pathlib
import subprocess

import numpy as np
import pytest

from experiments import base
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import card, exports
from lmm_sae.sae.exports import Sae
from lmm_sae.sae.model import SaeConfig, SparseCode
from lmm_sae.stages import convert, train
from tests.sae import small

pytestmark = pytest.mark.peers

HERE = pathlib.Path(__file__).parent
ENVS = HERE.parents[1] / 'benchmarks' / '.envs'
WITHIN = {'rtol': 1e-5, 'atol': 1e-5}
N, D, M, K = 37, 24, 100, 5

SAVED = {
  'sparsify': (
    'topk', 'norms', 'sparse', 'k1', 'expansion', 'bfloat16', 'float16',
  ),
  'sae_lens': (
    'topk', 'topk_norms', 'topk_sparse', 'topk_rescaled', 'topk_outside',
    'topk_bfloat16', 'topk_trained', 'jumprelu', 'jumprelu_outside',
    'jumprelu_dense', 'jumprelu_bfloat16', 'jumprelu_trained', 'batchtopk',
    'batchtopk_plain', 'matryoshka', 'topk_training', 'batchtopk_training',
  ),
  'dictionary_learning': (
    'topk', 'topk_norms', 'topk_sparse', 'batchtopk', 'batchtopk_unset',
    'matryoshka', 'jumprelu',
  ),
}  # fmt: skip
CASES = [(library, case) for library in SAVED for case in SAVED[library]]
OURS = (
  'topk', 'norms', 'sparse', 'k1', 'all', 'trained', 'batchtopk', 'jumprelu',
)  # fmt: skip


def peer(verb: str, library: str, folder: pathlib.Path) -> None:
  """Lets a library work in its own environment."""
  python = ENVS / library / 'bin' / 'python'
  assert python.exists(), f'{python} is missing: bash launch/check_parity.sh'
  command = [python, HERE / 'peer.py', verb, library, folder]
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=280, check=False
  )
  assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A function from a library and a case to the folder it was saved into."""

  @functools.cache
  def save(library: str) -> pathlib.Path:
    folder = tmp_path_factory.mktemp(library)
    peer('save', library, folder)
    assert {path.name for path in folder.iterdir()} == set(SAVED[library])
    return folder

  return lambda library, case: save(library) / case


def dense(code: SparseCode, latents: int) -> np.ndarray:
  """The code with every latent in its place, float32 [N, M]."""
  z_NM = np.zeros((len(code.idx_NK), latents), np.float32)
  np.put_along_axis(z_NM, code.idx_NK, code.vals_NK, axis=1)
  return z_NM


def both(sae: Sae, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(z_NM, x_hat_ND), what an SAE of ours says of rows."""
  code = sae.encode(x_ND)
  return dense(code, sae.config.latents), sae.decode(code)


def check(z_NM, x_hat_ND, said) -> None:
  """Asserts that two programs say the same of rows, and say something."""
  fires_NM = said['z_NM'] != 0
  assert fires_NM.any()
  np.testing.assert_array_equal(z_NM != 0, fires_NM)
  np.testing.assert_allclose(z_NM, said['z_NM'], **WITHIN)
  np.testing.assert_allclose(x_hat_ND, said['x_hat_ND'], **WITHIN)


@pytest.mark.parametrize(('library', 'case'), CASES)
def test_what_a_library_saves_says_the_same_here(saved, library, case):
  folder = saved(library, case)
  said = np.load(folder / 'said.npz')
  sae = exports.load(folder / 'sae', layer=3)
  check(*both(sae, said['x_ND']), said)


@pytest.mark.parametrize(('library', 'case'), CASES)
def test_an_import_goes_out_again_as_it_came(saved, tmp_path, library, case):
  folder = saved(library, case)
  said = np.load(folder / 'said.npz')
  exports.write(exports.load(folder / 'sae', layer=3), tmp_path / 'out')
  for layout in ('saelens', 'sparsify'):
    sae = exports.load(tmp_path / 'out' / layout)
    check(*both(sae, said['x_ND']), said)


def our_sae(name: str) -> Sae:
  """An SAE of a case that was never trained, as odd as the case asks for."""
  rng = np.random.default_rng(0)
  k = {'k1': 1, 'all': M}.get(name, K)
  activation = name if name in ('batchtopk', 'jumprelu') else 'topk'
  w_dec_MD = rng.standard_normal((M, D))
  w_dec_MD /= np.linalg.norm(w_dec_MD, axis=1, keepdims=True)
  if name == 'norms':
    w_dec_MD *= np.linspace(0.3, 3, M)[:, None]
  arrays = (
    rng.standard_normal((M, D)) / D**0.5,
    rng.standard_normal(M) * 0.3 - 2.0 * (name == 'sparse'),
    w_dec_MD,
    rng.standard_normal(D),
    rng.uniform(2.5, 4.5, M) * (activation != 'topk'),
  )
  config = SaeConfig(3, D, M, k, activation=activation)
  return Sae(config, *(array.astype(np.float32) for array in arrays))


def trained(folder: pathlib.Path) -> Sae:
  """An SAE out of the trainer."""
  config = base.get_config()
  workdir = Workdir.of(folder)
  small.write_store(workdir.acts('train'))
  train.run(small.run_config(config, train__steps=30), workdir)
  convert.run(config, workdir)
  return exports.load(workdir.export(small.LAYER))


@pytest.fixture(scope='module')
def sent(tmp_path_factory):
  """Our exports with rows and the Python of their cards, run by each library.

  Returns the folder, and {case: SAE}.
  """
  root = tmp_path_factory.mktemp('sent')
  saes = {name: our_sae(name) for name in OURS if name != 'trained'}
  saes['trained'] = trained(tmp_path_factory.mktemp('run'))
  for name, sae in saes.items():
    rng = np.random.default_rng(1)
    x_ND = rng.standard_normal((N, sae.config.width)).astype(np.float32) * 1.5
    send(sae, root / name, x_ND)
  for library in SAVED:
    peer('run', library, root)
  return root, saes


def send(sae: Sae, folder: pathlib.Path, x_ND: np.ndarray) -> None:
  """Exports an SAE beside rows and the Python of its card."""
  exports.write(sae, folder, step=7)
  np.save(folder / 'rows.npy', x_ND)
  blocks = card.code(sae)
  # It must refuse: what its card gives for a TopK SAE is tried all the same.
  blocks.setdefault('sparsify', card.code(our_sae('topk'))['sparsify'])
  for title, block in blocks.items():
    library = {'SAELens': 'sae_lens'}.get(title, title)
    (folder / f'{library}.py').write_text(block)


@pytest.mark.parametrize('case', OURS)
@pytest.mark.parametrize('library', SAVED)
def test_what_we_export_says_the_same_there(sent, library, case):
  root, saes = sent
  sae = saes[case]
  want = both(sae, np.load(root / case / 'rows.npy'))
  arrived(sae, root / case, library, *want)


def arrived(sae: Sae, folder: pathlib.Path, library: str, *want) -> None:
  """Asserts that a library says (z_NM, x_hat_ND) of an export, or refuses."""
  error = folder / f'{library}.error'
  if library == 'sparsify' and sae.config.activation != 'topk':
    assert 'Expected one of' in error.read_text()  # thresholds are not dropped
    return
  assert not error.exists(), error.read_text()
  check(*want, np.load(folder / f'{library}.npz'))


@pytest.fixture(scope='module')
def crossed(saved, tmp_path_factory):
  """What each library saved, exported by us and run by each library."""
  root = tmp_path_factory.mktemp('crossed')
  saes = {}
  for library, case in CASES:
    folder = saved(library, case)
    sae = exports.load(folder / 'sae', layer=3)
    send(sae, root / library / case, np.load(folder / 'said.npz')['x_ND'])
    saes[library, case] = sae
  for library in SAVED:
    peer('run', library, root)
  return root, saes


@pytest.mark.parametrize('target', SAVED)
@pytest.mark.parametrize(('library', 'case'), CASES)
def test_what_one_library_saves_another_loads(
  saved, crossed, library, case, target
):
  root, saes = crossed
  said = np.load(saved(library, case) / 'said.npz')
  folder = root / library / case
  arrived(saes[library, case], folder, target, said['z_NM'], said['x_hat_ND'])


@pytest.mark.parametrize('case', OURS)
def test_the_card_has_what_was_run_and_ours_runs(sent, monkeypatch, case):
  root, saes = sent
  sae = saes[case]
  for block in card.code(sae).values():
    assert block.strip() in card.text(sae)
  monkeypatch.chdir(root / case)
  names = {'x': np.load('rows.npy')}
  exec((root / case / 'lmm_sae.py').read_text(), names)
  want = sae.encode(names['x'])
  np.testing.assert_array_equal(names['code'].idx_NK, want.idx_NK)
  np.testing.assert_array_equal(names['x_hat'], sae.decode(want))
