"""python -m lmm_sae STAGE --config=FILE --workdir=DIR"""

import sys

from lmm_sae import cli

if __name__ == '__main__':
  sys.exit(cli.main())
