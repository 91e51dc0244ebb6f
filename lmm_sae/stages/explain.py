"""Asks a larger LMM what the exemplars of each latent have in common.

Each latent's strongest images, dimmed where it is silent, or its contexts in
text, go in one message to an OpenAI-compatible server; an answer of more than
five words is shortened to a label, and the label sorted into a category, by the
same model or by models, and servers, of their own. Appends explanations.jsonl,
one line a latent; run it again and only what is missing or failed is asked:
every single answer is kept (cache/chat). Run it with another explain.model and
a second explainer stands beside the first. What it cost stands in usage.json.

Where an answer fails, the outcome is `failed`, and what was had before it
stands in the line: an explanation without label, or a label without category.
"""

import collections
import concurrent.futures
import contextlib
import pathlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import progress, records
from lmm_sae.core.chat import ChatClient
from lmm_sae.core.explaining import Chats, ExplainConfig, Explainer
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir

FILE = 'explanations.jsonl'
AHEAD = 4  # latents begun a thread before the first of them must be done

T = TypeVar('T')
U = TypeVar('U')


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Explains what is not explained yet, of every hooked layer: the SAE's
  latents, then those drawn of each of explain.dictionaries."""
  opts = ExplainConfig(**config.explain)
  acts = workdir.require(workdir.acts(opts.split), 'capture')
  with clients(opts, workdir) as chats:
    for layer in config.lmm.layers:
      for dictionary in ('', *dict.fromkeys(opts.dictionaries)):
        index = workdir.index(layer, opts.split, dictionary)
        explainer = Explainer(
          opts,
          config.seed,
          layer,
          dictionary,
          LatentIndex.open(workdir.require(index, _index(dictionary))),
          ActivationStore.open(acts),
          chats,
        )
        explain(explainer, workdir.file(FILE))


@contextlib.contextmanager
def clients(opts: ExplainConfig, workdir: Workdir) -> Iterator[Chats]:
  """The clients of the three models; no server is sent another one's key."""
  with contextlib.ExitStack() as stack:

    def client(
      role: str, url: str, model: str, key: str, prices: tuple[float, ...]
    ) -> ChatClient:
      ours = not url or url == opts.base_url
      asked = opts.model or 'base'
      same = not model or model == asked
      return stack.enter_context(
        ChatClient(
          url or opts.base_url,
          model or asked,
          role=role,
          api_key=key or (opts.api_key if ours else ''),
          cache=workdir.file('cache') / 'chat',
          usage=workdir.file('usage.json'),
          prices=prices
          or ((opts.price_in, opts.price_out) if same else (0.0, 0.0)),
          max_tokens=opts.max_tokens,
          timeout_s=opts.timeout_s,
          retries=opts.retries,
        )
      )

    yield Chats(
      client('explainer', '', '', '', ()),
      client(
        'refiner',
        opts.refine_url,
        opts.refine_model,
        opts.refine_key,
        opts.refine_prices,
      ),
      client(
        'category',
        opts.category_url,
        opts.category_model,
        opts.category_key,
        opts.category_prices,
      ),
    )


def _index(dictionary: str) -> str:
  if not dictionary:
    return 'index'
  return f"index --config.index.dictionaries='({dictionary!r},)'"


def explain(explainer: 'Explainer', path: pathlib.Path) -> None:
  """Appends to the file what it lacks of one layer by one explainer.

  Failed lines are taken out and asked again. Lines stand in order of latent, so
  a file does not tell whether its run was broken off.
  """
  _drop_failed(path, explainer)
  fates: collections.Counter[str] = collections.Counter()
  try:
    with records.Appender(path) as file:
      done = {
        line['latent']
        for line in file.existing
        if _whose(line) == _asker(explainer)
      }
      todo = [m for m in explainer.chosen() if m not in done]
      answers = _in_order(
        explainer.explain, todo, explainer.opts.concurrency, explainer.stop
      )
      what = f'explain {_what(explainer)}: latents'
      with contextlib.closing(answers):
        for explanation in progress.track(answers, len(todo), what):
          file.add(explanation)
          fates[explanation.outcome] += 1
  except ValueError:  # no such model: its failures are no explainer's
    _drop_failed(path, explainer)
    raise
  _sort(path)
  logging.info(
    'explain: %s by %s: %s, %d were done before',
    _what(explainer),
    explainer.name,
    ', '.join(f'{n} {outcome}' for outcome, n in sorted(fates.items())) or '0',
    len(done),
  )


def _in_order(
  function: Callable[[T], U],
  items: Iterable[T],
  threads: int,
  stop: Callable[[], None],
) -> Generator[U, None, None]:
  """function(item) for each item, in order, on threads; at an error, or where
  it is left early, `stop` tells those under way that they need not go on."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    ahead: collections.deque[concurrent.futures.Future[U]] = collections.deque()
    try:
      for item in items:
        ahead.append(pool.submit(function, item))
        if len(ahead) >= threads * AHEAD:
          yield ahead[0].result()
          ahead.popleft()
      while ahead:
        yield ahead[0].result()
        ahead.popleft()
    finally:
      if ahead:
        stop()
      for future in ahead:
        future.cancel()


def _asker(explainer: Explainer) -> tuple[str, int, str]:
  return explainer.name, explainer.layer, explainer.dictionary


def _whose(line: dict[str, Any]) -> tuple[str, int, str]:
  return line['explainer'], line['layer'], line.get('dictionary', '')


def _what(explainer: Explainer) -> str:
  return f'layer {explainer.layer} {explainer.dictionary}'.strip()


def _drop_failed(path: pathlib.Path, explainer: Explainer) -> None:
  lines = records.read_lines(path)
  kept = [
    line
    for line in lines
    if line['outcome'] != 'failed' or _whose(line) != _asker(explainer)
  ]
  if len(kept) < len(lines):
    records.write_lines(path, kept)


def _sort(path: pathlib.Path) -> None:
  """Puts the lines in order: explainers as they came, layers, dictionaries
  (the SAE first), latents."""
  lines = records.read_lines(path)
  came = {
    name: i
    for i, name in enumerate(dict.fromkeys(line['explainer'] for line in lines))
  }
  dictionaries = ('', *records.DICTIONARIES)

  def rank(line: dict[str, Any]) -> tuple[int, ...]:
    name, layer, dictionary = _whose(line)
    place = dictionaries.index(dictionary)
    return came[name], layer, place, line['latent']

  ranked = sorted(lines, key=rank)
  if ranked != lines:
    records.write_lines(path, ranked)
