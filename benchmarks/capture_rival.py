"""What `benchmarks.capture` holds beside the capture stage: the model alone.

One process of it: the image processor and the forward, stopped after the last
hooked layer, over the samples of whole groups in the batches that capture makes
of them. Images are decoded, and texts tokenised, before it begins; nothing is
kept. An empty file is left for each group that is done.

  plain     one after the other, transformers' model as it is
  tuned     what ours does for speed: image processing in a thread of its own,
            no layers of the ViT that nobody reads, no mask where padding is at
            the end, freed memory kept for the next arrays
"""

import contextlib
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator

import torch

from lmm_sae import cli
from lmm_sae.core import host
from lmm_sae.core.jobs import CaptureConfig, SubjectConfig
from lmm_sae.core.prefetch import prefetch
from lmm_sae.core.sources import DataConfig
from lmm_sae.lmm import loading
from lmm_sae.lmm.llava import Subject
from lmm_sae.stages import capture

AHEAD = 3  # batches whose pixels are made before they are asked for
TEXT = ('input_ids', 'attention_mask')


class _EnoughError(Exception):
  """The last hooked layer has run."""


def main() -> None:
  job = json.loads(sys.argv[1])
  config = cli.resolve(job['config'], job['overrides'])
  lmm = SubjectConfig(**config.lmm)
  options = CaptureConfig(**config.capture)
  subject = Subject.load(lmm.path, lmm.device, lmm.dtype, lmm.threads)
  work = list(groups(job, subject, options, DataConfig(**config.data)))
  model, tuned = subject.model, job['way'] == 'tuned'
  if tuned:
    host.keep_freed_memory()
  else:  # with the layers that Subject leaves out
    model, _, _ = loading.load(subject.folder, lmm.device, lmm.dtype)
    model = model.eval().requires_grad_(False)
  modules = [model.get_submodule(subject.layer_path(at)) for at in lmm.layers]
  todo = zip(
    itertools.count(job['index'], job['processes']),
    itertools.cycle(work),
    strict=False,
  )
  ready = batches(todo, subject)
  if tuned:
    ready = prefetch(ready, AHEAD)
  done = pathlib.Path(job['folder']) / 'groups'
  done.mkdir(parents=True, exist_ok=True)
  found = []
  with torch.no_grad():
    for group, last, inputs in ready:
      if tuned:
        del inputs['attention_mask']
      found.append(forward(model, modules, inputs))
      if last:
        (done / f'{group}.json').touch()
        found = []


def groups(
  job: dict, subject: Subject, options: CaptureConfig, data: DataConfig
) -> Iterator[list[tuple[dict, list]]]:
  """The batches of some groups: (inputs of the texts, images) of each."""
  (split,) = (s for s in capture.open_splits(data) if s.name == 'train')
  for group in range(job['index'], job['distinct'], job['processes']):
    start = group * options.group
    items = [split.source[at] for at in split.rows[start:][: options.group]]
    images = [[one.image for one in item.images] for item in items]
    maps = [
      subject.encode(subject.conversation(item.conversation, len(one)), one)
      for item, one in zip(items, images, strict=True)
    ]
    order = sorted(range(len(maps)), key=lambda at: len(maps[at].token_T))
    found = []
    for at in range(0, len(order), options.batch):
      places = order[at : at + options.batch]
      inputs = subject.batch(
        [maps[place] for place in places], [images[place] for place in places]
      )
      texts = {name: inputs[name] for name in TEXT}
      found.append((texts, [one for place in places for one in images[place]]))
    yield found


def batches(todo, subject: Subject) -> Iterator[tuple[int, bool, dict]]:
  """(group, whether it ends there, inputs) of batch after batch."""
  for group, work in todo:
    for at, (texts, images) in enumerate(work):
      pixels = subject.pixels(images, return_tensors='pt')
      yield group, at == len(work) - 1, {**texts, **pixels}


def forward(model, modules: list, inputs: dict) -> list[torch.Tensor]:
  """The output [B, T, D] of each hooked layer."""
  found = []

  def hook(module, args, output) -> None:
    del args
    found.append(output[0] if isinstance(output, tuple) else output)
    if module is modules[-1]:
      raise _EnoughError

  handles = [module.register_forward_hook(hook) for module in modules]
  with contextlib.suppress(_EnoughError):
    model.model(**inputs, use_cache=False)
  for handle in handles:
    handle.remove()
  return found


if __name__ == '__main__':
  main()
