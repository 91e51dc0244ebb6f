"""The words sent to explainer, refiner and judges: files, in our own words.

The small packaged models are trained on exactly these files, so a changed word
means new weights. `{name}` in a file is filled in by `fill`.
"""

import functools
import importlib.resources
import re

MARKER = 'CONCEPT:'
NONE = 'none'


@functools.cache
def load(name: str) -> str:
  """The prompt of that name: explain, explain_text, refine, category, detect,
  intruder, picture or visible."""
  folder = importlib.resources.files('lmm_sae.core') / 'prompts'
  return (folder / f'{name}.txt').read_text(encoding='utf-8').strip()


def fill(name: str, **values: object) -> str:
  """The prompt with each `{key}` replaced; text in values is taken literally.

  Raises:
    ValueError: the values are not exactly those that the prompt asks for.
  """
  text = load(name)
  wanted = set(re.findall(r'{(\w+)}', text))
  if wanted != set(values):
    raise ValueError(
      f'prompt {name} takes {sorted(wanted)}, got {sorted(values)}'
    )
  return re.sub(r'{(\w+)}', lambda match: str(values[match[1]]), text)


def parse(answer: str) -> tuple[str, str]:
  """(outcome, text) of an explainer's answer.

  What follows the last marker is the explanation; an answer without marker is
  taken whole. `none`, or nothing, is the outcome `no_pattern`. What a model
  thinks aloud, in <think> tags, is no part of its answer.
  """
  text = _MARKER.split(_aloud(answer))[-1].strip(' \t\n*.')
  if not text or _NOTHING.match(text):
    return 'no_pattern', ''
  return 'explained', text


def marked(answer: str) -> bool:
  """Whether the answer came to its point."""
  return _MARKER.search(_aloud(answer)) is not None


def _aloud(answer: str) -> str:
  return re.sub(r'<think>.*?(</think>|\Z)', '', answer, flags=re.DOTALL)


# Models write the marker in bold, or small, and give reasons after `none`.
_MARKER = re.compile(r'concept\s*(?:\*\*)?\s*:', re.IGNORECASE)
_NOTHING = re.compile(
  r'[\W_]*(?:none\b|(?:there is )?'
  r'(?:nothing(?:\W*\Z| in common\b)|no (?:\w+ )?(?:pattern|concept)\b))',
  re.IGNORECASE,
)
