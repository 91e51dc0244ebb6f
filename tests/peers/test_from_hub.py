"""An export in a hub, loaded by other libraries as its card says.

bash launch/check_parity.sh
"""

import pathlib
import subprocess

import numpy as np
import pytest

from lmm_sae.sae import card, exports
from tests.sae import fake_hub, small

pytestmark = pytest.mark.peers

ENVS = pathlib.Path(__file__).parents[2] / 'benchmarks' / '.envs'
IMPORTS = {
  'SAELens': ('sae_lens', 'from sae_lens import SAE'),
  'sparsify': ('sparsify', 'from sparsify import SparseCoder'),
}


@pytest.mark.parametrize('title', IMPORTS)
def test_a_library_loads_a_repository_as_the_card_says(title, tmp_path):
  sae = small.random_sae()
  exports.write(sae, tmp_path / 'export')
  library, line = IMPORTS[title]
  script = f"""{line}
import sys
{card.from_hub(sae)[title]}
import numpy
numpy.save(sys.argv[1], sae.W_dec.detach().numpy())
"""
  python = ENVS / library / 'bin' / 'python'
  assert python.exists(), f'{python} is missing: bash launch/check_parity.sh'
  with fake_hub.serve() as hub:
    hub.put_folder('owner/name', tmp_path / 'export')
    done = subprocess.run(
      [python, '-c', script, tmp_path / 'w_dec.npy'],
      capture_output=True,
      text=True,
      timeout=250,
      check=False,
      env=hub.environment(tmp_path / 'home'),
    )
  assert done.returncode == 0, done.stderr
  np.testing.assert_array_equal(np.load(tmp_path / 'w_dec.npy'), sae.w_dec_MD)
