"""All that a run found out about the latents of one dictionary, by latent.

findings = Findings.of(workdir, layer=2, split='b')
findings.fate(17), findings.main(17), findings.scored(17, 'base')
"""

import dataclasses
import functools
from collections.abc import Sequence

from lmm_sae.core import concepts, records, tokens
from lmm_sae.core.concepts import Concept
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.records import Attribution, Explanation, Score, Steering
from lmm_sae.core.workdir import Workdir

# What may become of a latent, in the order of the page.
FATES = {
  'explained': 'Explained',
  'no_pattern': 'No pattern seen',
  'failed': 'Failed',
  'not_asked': 'Not asked about',
  'always_on': 'Always on',
  'tiles_only': 'Fires on tiles only',
  'text_only': 'Fires on text only',
  'dead': 'Dead',
}

FLAGS = {
  'right': 'Names its concept',
  'wrong': 'Misses its concept',
  'clean': 'Clean concept',
  'always_on': 'Always on',
  'words': 'Words only',
  'steered': 'Steered',
  'cause': 'Cause of an answer',
}


@dataclasses.dataclass(frozen=True)
class Findings:
  """One layer of a run: its SAE, or a dictionary beside it.

  Attributes:
    dictionary: '' is the SAE, else one of `records.DICTIONARIES`; those are
      neither steered nor attributed.
    split: half whose exemplars are shown; index: of that half.
    explainers: the models that were asked, the first one's answers are shown
      on the cards.
    explained, scores, steered, caused: the records that name a latent; of
      `caused` each with the latent's rank, 1 for the largest effect.
    concepts: latent -> its concept, where truth is known.
  """

  layer: int
  split: str
  index: LatentIndex
  explainers: tuple[str, ...]
  explained: dict[int, list[Explanation]]
  scores: dict[int, list[Score]]
  steering: list[Steering]
  attributions: list[Attribution]
  concepts: dict[int, Concept]
  dictionary: str = ''

  @classmethod
  def of(
    cls, workdir: Workdir, layer: int, split: str, dictionary: str = ''
  ) -> 'Findings':
    """Reads what the stages wrote; a stage that was not run left nothing.

    Raises:
      ValueError: there is no index.
    """

    def read(kind, name):
      lines = records.read(kind, workdir.file(name))
      return [one for one in lines if one.layer == layer]

    def read_own(kind, name):
      return [one for one in read(kind, name) if one.dictionary == dictionary]

    explained = read_own(Explanation, 'explanations.jsonl')
    return cls(
      layer=layer,
      split=split,
      index=LatentIndex.open(
        workdir.require(workdir.index(layer, split, dictionary), 'index')
      ),
      explainers=tuple(dict.fromkeys(one.explainer for one in explained)),
      explained=_by_latent(explained),
      scores=_by_latent(read_own(Score, 'scores.jsonl')),
      steering=[] if dictionary else read(Steering, 'steering.jsonl'),
      attributions=(
        [] if dictionary else read(Attribution, 'attributions.jsonl')
      ),
      concepts={
        one.latent: one for one in concepts.load(workdir, layer, dictionary)
      },
      dictionary=dictionary,
    )

  def main(self, latent: int) -> Explanation | None:
    """The first explainer's answer."""
    for one in self.explained.get(latent, []):
      if one.explainer == self.explainers[0]:
        return one
    return None

  def fate(self, latent: int) -> str:
    """What became of a latent: one of FATES."""
    stats, said = self.index.stats, self.main(latent)
    if said is not None and said.outcome != 'dead':
      return said.outcome
    if stats['dead'][latent]:
      return 'dead'
    if stats['images_fired'][latent]:
      return 'always_on' if stats['always_on'][latent] else 'not_asked'
    return 'tiles_only' if stats['peak_image'][latent] > 0 else 'text_only'

  def kind(self, latent: int) -> str:
    """The kind of token that a latent fires on most often; '' of none."""
    counts = {kind: fired[latent] for kind, fired in self._fired.items()}
    most = max(counts, key=counts.get)
    return most if counts[most] else ''

  @functools.cached_property
  def _fired(self) -> dict[str, list[int]]:
    kinds = [kind.name.lower() for kind in tokens.kinds('all')]
    stats = self.index.stats
    return {kind: stats[f'fired_{kind}'].tolist() for kind in kinds}

  def right(self, latent: int, explainer: str) -> bool | None:
    """Whether an explainer named the concept; None where that is not scored."""
    scored = self.scored(latent, explainer).get('right', {})
    return bool(scored[''].value) if '' in scored else None

  def stands_for(self, latent: int) -> Concept | None:
    """The latent's concept, if it stands for one: F1 > .2 on half A."""
    truth = self.concepts.get(latent)
    if truth is None or not truth.concept or truth.f1_a <= concepts.MIN_F1:
      return None
    return truth

  @functools.cached_property
  def scorers(self) -> tuple[str, ...]:
    """The scorers of this layer, by name."""
    return tuple(
      sorted({s.scorer for all_ in self.scores.values() for s in all_})
    )

  @property
  def iou_scorer(self) -> str:
    """The IoU that the cards show: on exact masks where they are known."""
    for name in ('iou_exact', 'iou', 'iou_paper'):
      if name in self.scorers:
        return name
    return ''

  def scored(self, latent: int, explainer: str) -> dict[str, dict[str, Score]]:
    """{scorer: {baseline: score}} of one explainer's answer on a latent."""
    table: dict[str, dict[str, Score]] = {}
    for one in self.scores.get(latent, []):
      if one.explainer in ('', explainer):
        table.setdefault(one.scorer, {})[one.baseline] = one
    return table

  @functools.cached_property
  def steered(self) -> dict[int, list[Steering]]:
    """The steered answers of each latent that was edited."""
    table: dict[int, list[Steering]] = {}
    for one in self.steering:
      for edit in one.edits:
        table.setdefault(edit.latent, []).append(one)
    return table

  @functools.cached_property
  def caused(self) -> dict[int, list[tuple[Attribution, int]]]:
    """The answers that each latent helped to cause, with its rank there."""
    table: dict[int, list[tuple[Attribution, int]]] = {}
    for answer in self.attributions:
      for i, effect in enumerate(answer.latents):
        table.setdefault(effect.latent, []).append((answer, i + 1))
    return table

  def flags(self, latent: int) -> list[str]:
    """Those of FLAGS that hold of a latent."""
    right = self.right(latent, self.explainers[0]) if self.explainers else None
    truth = self.concepts.get(latent)
    chosen = any(not one.control for one in self.steered.get(latent, []))
    held = {
      'right': right is True,
      'wrong': right is False,
      'clean': truth is not None and truth.clean,
      'always_on': bool(self.index.stats['always_on'][latent]),
      'words': bool(
        self.index.stats['peak_image'][latent] == 0
        and not self.index.stats['dead'][latent]
      ),
      'steered': chosen,
      'cause': latent in self.caused,
    }
    return [name for name in FLAGS if held[name]]

  def shown(self, limit: int) -> list[int]:
    """The latents that get a page, in order.

    All of them; under a limit (0: none) the explained ones first, then those
    that fire on most images.
    """
    latents = range(self.index.num_latents)
    if not limit or limit >= len(latents):
      return list(latents)
    fired = self.index.stats['images_fired']
    order = sorted(
      latents, key=lambda m: (self.fate(m) != 'explained', -fired[m], m)
    )
    return sorted(order[:limit])


def _by_latent(lines: Sequence) -> dict[int, list]:
  table: dict[int, list] = {}
  for one in lines:
    table.setdefault(one.latent, []).append(one)
  return table
