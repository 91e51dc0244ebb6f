"""Scores each explanation against the images, beside two baselines.

Writes scores.jsonl, for each explained latent:

  right      1 where the explanation names the latent's concept; of latents with
             at least 80% of their firings on objects and F1 > .2 on half A.
             shuffled: the share of the other latents' texts that name it
  iou_exact  the exact mask of what the label names, against the patches that
             the explainer saw lit; mean over the strongest images
  iou        the model server's mask of the label, against the same
  iou_paper  the same against the paper's mask (arXiv 2411.14982): all that
             fires, upsampled bilinearly, which dilates it
  clip       100 * cos(label, whole image)

with the baselines `random` (the label and the latent's own activations on
random images) and `shuffled` (another latent's label on these images). Latents
of the dictionaries that were explained beside the SAE are scored alike.

Where score.judge_url names a chat server, its model is asked, of score.judged
latents, and never told what fired:

  detection  whether the label is in a picture that fires, or in a silent one
  fuzzing    whether it is what a dimmed picture leaves bright, rightly or not
  intruder   which of several dimmed pictures is another latent's

each of contexts, too, for latents that fire on text alone (detection_text, and
so on). The first two are balanced accuracies, chance 1/2, the third is an
accuracy, chance 1 in explain.exemplars. `random` would say no more than that:
silent pictures are random ones, on which a label is right by chance. A second
judge gives `consistency`, the share of answers on which the two agree.
judgements.jsonl has every answer; judges.json how each judge fared on questions
whose answers are known, and how far two agree. An answer that could not be had
is counted there and in no accuracy; one that says neither yes nor no is wrong.

Run it again and what is missing is scored.
"""

import dataclasses
import functools
from collections.abc import Sequence

from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import (
  concepts,
  explaining,
  grounded,
  judged,
  judging,
  records,
  stats,
)
from lmm_sae.core import trials as trials_lib
from lmm_sae.core.chat import ChatClient
from lmm_sae.core.grounded import Bench, short
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.records import Explanation, Score
from lmm_sae.core.remote import SubjectClient
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import dictionaries
from lmm_sae.sae.baseview import BaseView

FILE = 'scores.jsonl'
JUDGEMENTS = 'judgements.jsonl'
JUDGES = 'judges.json'


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  """The section `score` of the config; its fields are explained there."""

  images: int
  random: int
  box_threshold: float
  grounder: str
  grounder_path: str
  clip_path: str
  judge_url: str
  judge_model: str
  judge_key: str
  second_url: str
  second_model: str
  second_key: str
  judged: int
  cases: int
  fuzz: str
  concurrency: int
  bootstrap: int

  def __post_init__(self):
    for name in ('images', 'random', 'concurrency', 'bootstrap'):
      if getattr(self, name) < 1:
        raise ValueError(f'score.{name} must be at least 1')
    if self.cases < 2:
      raise ValueError(
        f'score.cases {self.cases} must be at least 2: one true, one false'
      )
    if self.judged < 0:
      raise ValueError(f'score.judged {self.judged} must be 0 (all) or more')
    if self.fuzz not in trials_lib.FUZZ:
      raise ValueError(f'score.fuzz {self.fuzz!r} is none of {trials_lib.FUZZ}')
    if self.judge_url and not self.judge_model:
      raise ValueError('score.judge_url is given without score.judge_model')
    if self.second_model and not self.judge_url:
      raise ValueError('score.second_model needs a first: score.judge_url')
    if self.second_model and self.second_model == self.judge_model:
      raise ValueError(
        f'score.second_model {self.second_model!r} is the first judge: two '
        'judges need two names'
      )


@dataclasses.dataclass(frozen=True)
class Chats:
  """What the clients of judges are made with, as in the section `explain`."""

  max_tokens: int
  timeout_s: float
  retries: int

  def open(
    self, role: str, url: str, model: str, key: str, workdir: Workdir
  ) -> ChatClient:
    return ChatClient(
      url,
      model,
      role=role,
      api_key=key,
      cache=workdir.file('cache') / 'chat',
      usage=workdir.file('usage.json'),
      **dataclasses.asdict(self),
    )


Group = tuple[Bench, list[Explanation]]  # one explainer's, of one dictionary


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Appends to scores.jsonl what it lacks."""
  opts = ScoreConfig(**config.score)
  if not config.server.url:
    raise ValueError(
      'server.url is empty: start `lmm-sae serve` and give its URL, or run '
      '`lmm-sae all`, which starts one'
    )
  explain = config.explain
  chats = Chats(explain.max_tokens, explain.timeout_s, explain.retries)
  style = trials_lib.Style(
    cases=opts.cases,
    pictures=explain.exemplars,
    fuzz=opts.fuzz,
    pixels=explain.pixels,
    mask=explain.mask,
  )
  plan = judged.Plan(style, opts.judged, explain.exemplars)
  explained = records.read(
    Explanation, workdir.require(workdir.file('explanations.jsonl'), 'explain')
  )
  layers = tuple(config.lmm.layers)
  server = config.server
  groups: list[Group] = []
  with SubjectClient(server.url, server.token, server.timeout_s) as client:
    for layer in layers:
      mine = [e for e in explained if e.layer == layer]
      for dictionary in sorted({e.dictionary for e in mine}):
        bench = _bench(config, opts, workdir, layer, dictionary, client)
        some = [e for e in mine if e.dictionary == dictionary]
        for name in dict.fromkeys(e.explainer for e in some):
          groups.append((bench, [e for e in some if e.explainer == name]))
          table = concepts.load(workdir, layer, dictionary)
          with records.Appender(workdir.file(FILE)) as file:
            _append(file, right(table, groups[-1][1]))
            grounded.grounded(*groups[-1], file)
  if opts.judge_url and groups:
    judge(opts, plan, chats, groups, config.seed, layers, workdir)
  _log(workdir, opts, config.seed)


def _bench(config, opts, workdir, layer, dictionary, client) -> Bench:
  """What one dictionary of one layer is scored with."""
  split = config.explain.split
  index = workdir.index(layer, split, dictionary)
  workdir.require(index / 'meta.json', 'index')
  sae = dictionaries.load(workdir, layer, dictionary, config.seed)
  return Bench(
    grounded.Settings(opts.images, opts.random, opts.box_threshold),
    config.seed,
    config.explain.threshold,
    LatentIndex.open(index),
    BaseView(ActivationStore.open(workdir.acts(split)), layer, sae),
    client,
  )


# Explanations against concepts.


def right(
  table: Sequence[concepts.Concept], explained: Sequence[Explanation]
) -> list[Score]:
  """Whether explanations name the concept of their latents; see the module.

  An explanation that was not had does not name it.
  """
  by_latent = {e.latent: e for e in explained}
  chosen = concepts.of_objects(table, by_latent)
  texts = [by_latent[row.latent].text for row in chosen]
  lines = []
  for i, row in enumerate(chosen):
    says = [concepts.says(text, row.concept) for text in texts]
    one = by_latent[row.latent]
    made = functools.partial(
      Score,
      one.layer,
      one.latent,
      'right',
      n=1,
      explainer=one.explainer,
      dictionary=one.dictionary,
    )
    lines.append(made(baseline='', value=float(says[i])))
    if len(says) > 1:
      others = (sum(says) - says[i]) / (len(says) - 1)
      lines.append(made(baseline='shuffled', value=short(others)))
  return lines


# Explanations before judges.


def judge(
  opts: ScoreConfig,
  plan: judged.Plan,
  chats: Chats,
  groups: Sequence[Group],
  seed: int,
  layers: Sequence[int],
  workdir: Workdir,
) -> None:
  """Has the judges answer, and writes what they said.

  The first is asked about every label and its shuffled baseline, the second
  about the SAE's labels; each about true ones, too.

  Raises:
    ConnectionError: a judge is gone; what it said is kept.
  """
  first = explaining.short_name(opts.judge_model)
  second = explaining.short_name(opts.second_model) if opts.second_model else ''
  lines: list[judging.Judgement] = []
  roles = [('judge', opts.judge_url, opts.judge_model, opts.judge_key)]
  if second:
    same = opts.second_url in ('', opts.judge_url)  # no other is sent the key
    key = opts.second_key or (opts.judge_key if same else '')
    url = opts.second_url or opts.judge_url
    roles.append(('second', url, opts.second_model, key))
  for role, url, model, key in roles:
    name = explaining.short_name(model)
    with chats.open(role, url, model, key, workdir) as chat:
      wanted = functools.partial(
        judging.answers, chat, threads=opts.concurrency
      )
      mine: list[judging.Judgement] = []
      for bench, explained in groups:
        if name == first or not explained[0].dictionary:
          about = judged.trials(bench, explained, plan, name, name == first)
          mine += wanted(about)
      tasks = {line.scorer for line in mine}
      if tasks & set(judging.PICTURE_TASKS):
        mine += wanted(judged.calibration(groups[0][0], plan, name))
      if tasks & set(judging.TEXT_TASKS):
        mine += wanted(judged.text_calibration(groups[0][0], plan, name))
    lines += mine
  judged.replace(
    workdir.file(JUDGEMENTS),
    [records.to_json(line) for line in lines],
    (*layers, -1),
  )
  found = judged.scores(lines, first, second)
  judged.replace(
    workdir.file(FILE), [records.to_json(line) for line in found], layers
  )
  table = judging.summary(lines, first, second, seed, opts.bootstrap)
  records.write_json(
    workdir.file(JUDGES), {'format_version': records.FORMAT_VERSION, **table}
  )
  _log_judges(table)


def _log_judges(table: dict) -> None:
  """Logs how far a judge is to be trusted, task by task."""
  for name, tasks in table['judges'].items():
    for task, told in tasks.items():
      known = told['calibration']
      fared = 'is not known where answers are'
      if known['value'] is not None:
        fared = (
          'is right of {:.3f} [{:.3f}, {:.3f}] of {} known answers'.format(
            known['value'], *known['ci'], known['n']
          )
        )
      told_n = told['asked'], told['failed'], told['unread']
      logging.log(
        logging.INFO if told['trusted'] else logging.WARNING,
        'score: judge %s, %s: %s, chance %.3f%s; of %d asked %d failed, '
        '%d unread',
        *(name, task, fared, told['chance']),
        '' if told['trusted'] else ': trust it not',
        *told_n,
      )
  for task, one in table['agreement'].items():
    logging.info(
      'score: judges agree on %s: %.3f [%.3f, %.3f] of %d, kappa %s',
      *(task, one['value'], *one['ci'], one['n']),
      '-' if one['kappa'] is None else f'{one["kappa"]:.3f}',
    )


def _append(file: records.Appender, scores: Sequence[Score]) -> None:
  """Adds the scores that the file lacks."""
  done = {grounded.key(line) for line in file.existing}
  for score in scores:
    if grounded.key(records.to_json(score)) not in done:
      file.add(score)


def _log(workdir: Workdir, opts: ScoreConfig, seed: int) -> None:
  """Logs the mean of every score and its 95% interval."""
  groups: dict[tuple, list[float]] = {}
  for line in records.read(Score, workdir.file(FILE)):
    key = (
      *(line.layer, line.dictionary, line.explainer),
      *(line.scorer, line.baseline),
    )
    groups.setdefault(key, []).append(line.value)
  for (layer, dictionary, *about), values in groups.items():
    explainer, scorer, baseline = about
    mean, low, high = stats.mean_ci(values, seed, opts.bootstrap)
    logging.info(
      'score: layer %d %s by %s: %s %s %.3f [%.3f, %.3f] of %d latents',
      *(layer, dictionary or 'sae', explainer, scorer, baseline or 'itself'),
      *(mean, low, high, len(values)),
    )
