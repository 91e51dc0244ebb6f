"""The result records, and how they stand in JSON-lines files.

Every record is a frozen dataclass; a line of a file is its `asdict`, one JSON
object. A reader that meets a torn last line (a run was killed while it wrote)
drops that line: the stage writes it again.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

R = TypeVar('R')

FORMAT_VERSION = 1

UNITS = ('absolute', 'peak')
MODES = ('clamp', 'add', 'scale', 'ablate')
WHENS = ('prompt', 'generated', 'both')


@dataclasses.dataclass(frozen=True)
class Edit:
  """One change to one latent, the same in configs, on the wire and in files.

  Attributes:
    latent: index of the latent, 0 <= latent < M.
    value: what it is set to (clamp), what is added to it (add), what it is
      multiplied by (scale); ignored by ablate.
    unit: `absolute`, or `peak`: value counts in the latent's peak activation.
    mode: clamp (the paper's: the PRE-activation is set before TopK), add,
      scale or ablate.
    where: tokens that are edited: `all`, `text`, `image`, the name of a token
      kind (see `tokens.Kind`), lower case, or `span:WORDS`, the tokens of those
      words wherever they stand in the prompt. BOS is never edited.
    when: `prompt` (the paper's), `generated` or `both`.
    keep_error: False: the reconstruction REPLACES the residual at the edited
      tokens (the paper's); True: what the SAE misses is added back.
  """

  latent: int
  value: float = 0.0
  unit: str = 'absolute'
  mode: str = 'clamp'
  where: str = 'all'
  when: str = 'prompt'
  keep_error: bool = False

  def __post_init__(self):
    if self.latent < 0:
      raise ValueError(f'edit: latent {self.latent} is negative')
    if not math.isfinite(self.value):
      raise ValueError(f'edit: value {self.value} is not a finite number')
    for field, allowed in (('unit', UNITS), ('mode', MODES), ('when', WHENS)):
      if getattr(self, field) not in allowed:
        raise ValueError(
          f'edit: {field} {getattr(self, field)!r} is none of {allowed}'
        )


@dataclasses.dataclass(frozen=True)
class Turn:
  """One question put to the subject and the answer that is right.

  Attributes:
    type: kind of question (`colour`, `emotion`, ...); '' where unknown.
    question: the user's words, without the image placeholder.
    answer: the right answer; '' where unknown.
    target: the concept that the answer names, where there is one.
  """

  type: str
  question: str
  answer: str
  target: str = ''


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image of a sample: its file, named as in `Sample`, and its pixels."""

  file: str
  width: int
  height: int


@dataclasses.dataclass(frozen=True)
class Sample:
  """One captured sample: a conversation, its images, and where its rows are.

  Attributes:
    sample: index within its split; the key of rows, exemplars and results.
    group: the commit group that holds it.
    source: id in the data source, for people.
    image: path of the first image, relative to acts/<split>/ or absolute; ''
      where the sample has none or it is not kept.
    width, height: of that image, in pixels; 0 without image.
    prompt: the text that was tokenised, chat template applied.
    turns: questions that may be asked of this image.
    start, stop: rows of the store, in order of position; both -1 where the
      rows of a group are mixed.
    truth: where known, {'regions': path of an 8-bit PNG of region ids,
      'concepts': {region id as str: [concept, ...]}}; region '0' is background.
    tokens: length of the whole sequence, of which some may not be stored.
    grid: (rows, cols) of the first image's base view; (0, 0) without image.
    more: the images after the first.
  """

  sample: int
  group: int
  source: str
  image: str
  width: int
  height: int
  prompt: str
  turns: tuple[Turn, ...]
  start: int
  stop: int
  truth: dict[str, Any] | None = None
  tokens: int = 0
  grid: tuple[int, int] = (0, 0)
  more: tuple[Picture, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, 'grid', tuple(self.grid))  # JSON has lists


@dataclasses.dataclass(frozen=True)
class Exemplar:
  """A sample that fires a latent, and its mean activation on the base view."""

  sample: int
  strength: float


# What is explained beside the SAE, as baselines: the same SAE as it was before
# its first step, and the residual stream's own neurons, both signs of each.
DICTIONARIES = ('untrained', 'neurons')


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What an explainer said of one latent.

  Attributes:
    outcome: `explained`, `no_pattern` (the explainer sees none), `failed` (an
      answer could not be had: text and label are what was had before it),
      `dead` (never fires on an image), `always_on`.
    text: the explainer's answer; label: the refiner's short form; category: one
      of the Network Dissection kinds.
    explainer: name of the model that answered.
    dictionary: whose latent it is: '' the SAE's, else one of `DICTIONARIES`.
  """

  layer: int
  latent: int
  exemplars: tuple[Exemplar, ...]
  outcome: str
  text: str
  label: str
  category: str
  explainer: str
  dictionary: str = ''


@dataclasses.dataclass(frozen=True)
class Score:
  """One score of one latent's explanation.

  Attributes:
    scorer: `iou`, `iou_exact`, `clip`, ...
    baseline: '' for the explanation itself, else `random` (random images) or
      `shuffled` (another latent's label on these images).
    value: mean over n images.
    dictionary: as in `Explanation`.
  """

  layer: int
  latent: int
  scorer: str
  baseline: str
  value: float
  n: int
  explainer: str = ''
  dictionary: str = ''


@dataclasses.dataclass(frozen=True)
class Steering:
  """One steered answer beside its controls.

  Attributes:
    study: which study asked (`colour`, `emotion`, `text`, ...).
    half: `a` where doses are chosen, `b` where figures are taken.
    control: '' for the chosen latent, `random` for a random live latent.
    sample: of acts/<half>, or -1 where the prompt has no image.
    target: what the edited answer should contain.
    text_plain: no SAE; text_sae: the SAE without edit; text_edited: with it.
  """

  layer: int
  edits: tuple[Edit, ...]
  control: str
  sample: int
  prompt: str
  text_plain: str
  text_sae: str
  text_edited: str
  study: str = ''
  half: str = ''
  target: str = ''


@dataclasses.dataclass(frozen=True)
class Effect:
  """What one latent did to logit(answer) - logit(baseline).

  Attributes:
    effect: the first-order price, summed over the tokens.
    exact: the margin with the latent minus the margin without, by real
      ablation; None where it was not run.
    kinds: the same price by token kind.
    concept: the latent's concept or label, where one is known.
    always_on: whether it fires on nearly everything.
  """

  latent: int
  effect: float
  exact: float | None
  kinds: dict[str, float] | None = None
  concept: str = ''
  always_on: bool = False


@dataclasses.dataclass(frozen=True)
class Attribution:
  """Which latents caused one answer, largest effect first.

  Attributes:
    answer, baseline: the two words whose logits are compared.
    target: the true concept asked for, where known.
    correct: whether the subject's answer was the true one, where known.
    heat: the price of all latents together by patch of the base view, rows of
      columns; () without image.
    words: (token, the same price) for each token of the question.
  """

  layer: int
  sample: int
  answer: str
  baseline: str
  latents: tuple[Effect, ...]
  prompt: str = ''
  text: str = ''
  target: str = ''
  correct: bool | None = None
  heat: tuple[tuple[float, ...], ...] = ()
  words: tuple[tuple[str, float], ...] = ()


def to_json(record: Any) -> dict[str, Any]:
  """The record as a dict of JSON types.

  As `dataclasses.asdict` has it, which copies every leaf and takes four times
  as long: a third of a millisecond of each sample that is captured.
  """
  return {name: _plain(value) for name, value in vars(record).items()}


def _plain(value: Any) -> Any:
  if isinstance(value, str | int | float):
    return value
  if isinstance(value, tuple | list):
    return type(value)(_plain(each) for each in value)
  if isinstance(value, dict):
    return {key: _plain(each) for key, each in value.items()}
  return to_json(value) if dataclasses.is_dataclass(value) else value


_NESTED = {
  (Sample, 'turns'): Turn,
  (Sample, 'more'): Picture,
  (Explanation, 'exemplars'): Exemplar,
  (Steering, 'edits'): Edit,
  (Attribution, 'latents'): Effect,
}


def from_json(kind: type[R], line: dict[str, Any]) -> R:
  """The record of type `kind` from its dict; unknown fields are an error."""
  fields = dict(line)
  for (owner, name), inner in _NESTED.items():
    if owner is kind and name in fields:
      fields[name] = tuple(inner(**item) for item in fields[name])
  return kind(**fields)


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The JSON objects of a file, [] where there is none; a torn end is dropped.

  Raises:
    ValueError: a line other than the last is not JSON.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  lines = path.read_bytes().split(b'\n')
  whole, torn = lines[:-1], lines[-1]
  del torn  # '' after a complete line, else the part a kill left behind
  try:
    return [json.loads(line) for line in whole if line]
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} has a line that is not JSON: {error}') from error


def read(kind: type[R], path: str | os.PathLike) -> list[R]:
  """All records of a JSON-lines file, in order.

  Raises:
    ValueError: a line is none; the message names the file.
  """
  try:
    return [from_json(kind, line) for line in read_lines(path)]
  except TypeError as error:
    raise ValueError(
      f'{path} has a line that is no {kind.__name__}: {error}'
    ) from error


class Appender:
  """Appends records to a JSON-lines file, each flushed; mends a torn end first.

  Use as a context manager. What stood in the file when it was opened is in
  `existing`, as dicts, so that a stage knows what is done.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self.existing = read_lines(self.path)
    if self.path.exists():
      data = self.path.read_bytes()
      keep = data.rfind(b'\n') + 1
      if keep != len(data):
        with self.path.open('r+b') as file:
          file.truncate(keep)
    self._file = self.path.open('ab')

  def add(self, record: Any) -> None:
    line = record if isinstance(record, dict) else to_json(record)
    text = json.dumps(line, ensure_ascii=False, allow_nan=False)
    self._file.write(text.encode() + b'\n')
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> 'Appender':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def write_lines(
  path: str | os.PathLike, lines: Sequence[dict[str, Any]]
) -> None:
  """Replaces a JSON-lines file as a whole."""
  path = pathlib.Path(path)
  part = path.with_name(path.name + '.part')
  part.unlink(missing_ok=True)
  with Appender(part) as file:
    for line in lines:
      file.add(line)
  part.replace(path)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a JSON file as a whole or not at all.

  Raises:
    OSError: it cannot be written; its `filename` says which one.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
  try:
    part.write_text(text + '\n')
  except OSError as error:  # that of a full disk names no file
    raise OSError(error.errno, error.strerror, str(part)) from error
  part.replace(path)
