"""Serves the subject, its SAEs and its judges over HTTP, until it is stopped.

  lmm-sae serve --config=experiments/tiny.py --workdir=DIR

prints `serving on http://HOST:PORT` once it is up. The SAEs are those that
`train` has exported for lmm.layers; without any it serves the plain subject.
`core.remote.SubjectClient` talks to it.
"""

import dataclasses

from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import host
from lmm_sae.core.workdir import Workdir
from lmm_sae.lmm import folders, judges, serve
from lmm_sae.lmm import sae as saes
from lmm_sae.lmm.llava import Subject
from lmm_sae.lmm.service import Service


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
  """What serve reads of config.score."""

  grounder: str
  grounder_path: str
  clip_path: str


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Serves until SIGINT or SIGTERM.

  Raises:
    ValueError: the model, an SAE or a judge cannot be loaded, the model cannot
      be served, or the address needs a token.
    OSError: the port is taken.
  """
  lmm, opts = config.lmm, serve.ServerConfig(**config.server)
  folders.check_served(folders.resolve(lmm.path))
  layers, device = tuple(lmm.layers), lmm.device
  judge = JudgeConfig(
    config.score.grounder, config.score.grounder_path, config.score.clip_path
  )
  with serve.bind(opts) as sock:  # before the model: it may take minutes
    subject = Subject.load(lmm.path, device, lmm.dtype, lmm.threads)
    device = str(subject.device)
    service = Service(
      subject, _saes(workdir, layers, subject), *_judges(judge, device)
    )
    serve.run(service, sock, opts, _announce)


def _saes(workdir: Workdir, layers, subject: Subject) -> dict[int, saes.Sae]:
  """The exported SAEs of the layers, each on its layer's device."""
  found = {}
  for layer in layers:
    device = next(subject.layer(layer).parameters()).device
    path = workdir.export(layer) / 'sparsify'
    if path.is_dir():
      found[layer] = saes.load(path, str(device))
    else:
      logging.warning(
        'no SAE of layer %d at %s: served without; `lmm-sae train` makes it',
        layer,
        path,
      )
  return found


def _judges(config: JudgeConfig, device: str):
  """CLIP, and the grounders by name, the configured one first."""
  folder = config.clip_path or host.weights() / 'clip'
  if not config.clip_path and not folder.is_dir():
    logging.warning('no packaged CLIP at %s: served without judges', folder)
    clip = None
  else:
    clip = judges.Clip(folder, device)
  found = {}
  if clip is not None or config.grounder != 'clip' or config.grounder_path:
    found[config.grounder] = judges.grounder(
      config.grounder, config.grounder_path, clip, device
    )
  if clip is not None:
    found.setdefault('clip', clip)
  return clip, found


def _announce(url: str) -> None:
  print(f'serving on {url}', flush=True)
