"""The scenes as a data source: items whose truth is known exactly."""

import numpy as np
from PIL import Image

from lmm_sae.core.sources import Item, Loaded
from lmm_sae.scenes import questions, render

# first words of the seeds; batches.WEIGHTS_SEED, the models' own, is another
SPLITS = {'train': 101, 'a': 102, 'b': 103}


def sample(split: str, seed: int, number: int) -> Item:
  """A scene of a split, in a conversation of one question and its answer.

  It follows from the arguments alone. `turns` are all the questions that the
  scene allows; `concepts` names what holds of each region.
  """
  rng = np.random.default_rng([SPLITS[split], seed, number])
  scene = render.sample(rng)
  turns = questions.scene_turns(scene, rng)
  asked = turns[0]
  concepts = {'0': [questions.BACKGROUND]}
  for i, thing in enumerate(scene.objects):
    concepts[str(i + 1)] = list(thing.concepts)
  return Item(
    source=f'scene/{split}/{seed}/{number}',
    images=(Loaded(Image.fromarray(scene.pixels_HW3)),),
    conversation=(('user', asked.question), ('assistant', asked.answer)),
    turns=tuple(turns),
    regions_HW=scene.regions_HW,
    concepts=concepts,
  )
