"""What a made-up run has beside its SAE: dictionaries, judges, their scores."""

import json
import shutil

import numpy as np

from lmm_sae.core import records
from lmm_sae.core.records import DICTIONARIES, Explanation, Score
from lmm_sae.core.workdir import Workdir

TASKS = {'detection': 0.5, 'fuzzing': 0.5, 'intruder': 0.2}


def add(workdir: Workdir, layer: int, every: int = 3) -> None:
  """Explains and scores `every` third latent of dictionaries that fire as the
  SAE does, and has two judges score all."""
  rng = np.random.default_rng(7)
  path = workdir.file('explanations.jsonl')
  own = records.read(Explanation, path)
  scores = records.read(Score, workdir.file('scores.jsonl'))
  with (
    records.Appender(path) as said,
    records.Appender(workdir.file('scores.jsonl')) as scored,
  ):
    for name in DICTIONARIES:
      for split in 'ab':
        shutil.copytree(
          workdir.index(layer, split), workdir.index(layer, split, name)
        )
      for one in own:
        if one.latent % every == 0:
          said.add(
            records.to_json(one) | {'dictionary': name, 'category': 'object'}
          )
      for one in scores:
        if one.latent % every == 0 and not one.baseline:
          value = one.value * rng.uniform(0.3, 0.6)
          line = {'dictionary': name, 'value': round(value, 4)}
          scored.add(records.to_json(one) | line)
    for one in own:
      if one.outcome != 'explained' or one.latent % 2:
        continue
      about = layer, one.latent
      for task, chance in TASKS.items():
        for baseline, least in (('', chance), ('shuffled', chance - 0.2)):
          value = round(float(rng.uniform(least, 1)), 3)
          scored.add(Score(*about, task, baseline, value, 8, one.explainer))
      value = round(float(rng.uniform(0.7, 1)), 3)
      scored.add(Score(*about, 'consistency', '', value, 20, one.explainer))
  _judges(workdir)
  table = json.loads(workdir.file('concepts.json').read_text())
  beside = {'dictionaries': {'neurons': {str(layer): table[str(layer)]}}}
  records.write_json(workdir.file('concepts.json'), table | beside)


def _judges(workdir: Workdir) -> None:
  """judges.json: the first judge guesses at intruders."""
  good = {'value': 0.875, 'n': 32, 'ci': [0.75, 0.97], 'lines': 8}
  poor = {'value': 0.25, 'n': 8, 'ci': [0.0, 0.5], 'lines': 8}
  tasks = {
    task: {
      'chance': chance,
      'calibration': good if task != 'intruder' else poor,
      'trusted': task != 'intruder',
      'asked': 184,
      'failed': 2,
      'unread': 5,
    }
    for task, chance in TASKS.items()
  }
  alike = {'value': 0.9, 'n': 40, 'ci': [0.8, 0.97], 'kappa': 0.78}
  records.write_json(
    workdir.file('judges.json'),
    {
      'format_version': 1,
      'first': 'base',
      'second': 'small',
      'judges': {'base': tasks, 'small': tasks},
      'agreement': dict.fromkeys(TASKS, alike),
    },
  )
