"""Between words and tokens: where answers part, and what tokens say."""

from collections.abc import Callable

import torch

from lmm_sae.core.tokens import TokenMap
from lmm_sae.lmm.llava import Subject


def end_tokens(subject: Subject) -> set[int]:
  """The tokens that end an answer."""
  ends = subject.model.generation_config.eos_token_id
  if ends is None:
    ends = subject.tokenizer.eos_token_id
  return set(ends) if isinstance(ends, list | tuple) else {ends}


def pieces(tokenizer, token_map: TokenMap) -> list[str]:
  """The text of each token; '' for the image's and for half a character."""
  ids: list[int] = []
  texts, before = [], ''
  image = token_map.where('image')
  for token, is_image in zip(token_map.token_T.tolist(), image, strict=True):
    if is_image:
      texts.append('')
      continue
    ids.append(token)
    text = tokenizer.decode(ids)
    texts.append(text[len(before) :])
    before = text
  return texts


def contrast(
  subject: Subject,
  text: str,
  words: tuple[str, str],
  likely: Callable[[], torch.Tensor],
) -> tuple[list[int], tuple[int, int]]:
  """Where two answers to a prompt part: (tokens they share, the two next ones).

  An answer is tokenised as it would follow the prompt, with or without a space
  before it, whichever the model finds likelier. What ends first is followed by
  the end token, so `red` against `reddish` parts too.

  Args:
    text: the prompt, chat template applied.
    words: the answer and the other one.
    likely: gives the logits [V] of the prompt's next token.

  Raises:
    ValueError: the answers are empty or the same.
  """
  if not all(word.strip() for word in words) or words[0] == words[1]:
    raise ValueError(
      f'answer {words[0]!r} and baseline {words[1]!r} do not part'
    )
  pairs = [tuple(_continuation(subject.tokenizer, text, w) for w in words)]
  if not any(word[0].isspace() for word in words):
    pairs.append(
      tuple(_continuation(subject.tokenizer, text, ' ' + w) for w in words)
    )
    firsts = [{ids[0] for ids in pair} for pair in pairs]
    if firsts[0] != firsts[1]:
      p_V = likely().softmax(0)
      mass = [sum(float(p_V[i]) for i in first) for first in firsts]
      pairs = pairs[int(mass[1] > mass[0]) :]
  end = min(end_tokens(subject))
  left, right = ([*ids, end] for ids in pairs[0])
  same = 0
  while same < min(len(left), len(right)) and left[same] == right[same]:
    same += 1
  if same == min(len(left), len(right)):
    raise ValueError(
      f'answer {words[0]!r} and baseline {words[1]!r} are the same tokens'
    )
  return left[:same], (left[same], right[same])


def _continuation(tokenizer, text: str, word: str) -> list[int]:
  """The tokens of `word` after `text`."""
  before = tokenizer(text, add_special_tokens=False)['input_ids']
  whole = tokenizer(text + word, add_special_tokens=False)['input_ids']
  if whole[: len(before)] == before and len(whole) > len(before):
    return whole[len(before) :]
  return tokenizer(word, add_special_tokens=False)['input_ids']
