"""The report's page as a person meets it, in headless Chromium.

LMM_SAE_REPORT names the index.html of a run to be tried as well; see
launch/check_report.sh.
"""

import json
import os
import pathlib

import pytest

from lmm_sae.stages import report
from tests.stages import fake_run
from tests.stages.chromium import Chromium

pytestmark = pytest.mark.browser

VIEWS = (
  '#/',
  '#/latents',
  '#/latents?as=table',
  '#/steering',
  '#/causes',
  '#/feelings',
  '#/mistakes',
)
# Names, alternatives, order of headings, ids: what a screen reader needs.
AUDIT = """(() => {
  const seen = (e) => e.checkVisibility();
  const bad = [];
  const name = (e) => (e.getAttribute('aria-label') || e.innerText ||
    [...(e.labels || [])].map((l) => l.innerText).join(' ')).trim();
  const controls = 'a, button, input, select, summary';
  for (const e of document.querySelectorAll(controls))
    if (seen(e) && !e.closest('[aria-hidden]') && !name(e))
      bad.push('no name: ' + e.outerHTML.slice(0, 90));
  for (const e of document.querySelectorAll('img'))
    if (!e.hasAttribute('alt')) bad.push('no alt: ' + e.src);
  const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
  for (const id of ids)
    if (ids.filter((one) => one === id).length > 1) bad.push('twice: ' + id);
  for (const e of document.querySelectorAll('[aria-labelledby]'))
    for (const id of e.getAttribute('aria-labelledby').split(' '))
      if (!ids.includes(id)) bad.push('no such label: ' + id);
  let level = 0;
  for (const e of document.querySelectorAll('main :is(h1,h2,h3,h4)')) {
    if (!seen(e)) continue;
    const now = Number(e.tagName[1]);
    if (now > level + 1) bad.push(`h${level} then h${now}: ${e.innerText}`);
    level = now;
  }
  const tops = [...document.querySelectorAll('h1')].filter(seen);
  if (tops.length !== 1) bad.push(`${tops.length} visible h1`);
  return bad;
})()"""
# Text against what stands behind it: WCAG 2.2 AA.
CONTRAST = """(() => {
  const known = new Map();
  const parse = (c) => {
    if (!known.has(c)) known.set(c, paint(c));
    return known.get(c);
  };
  const paint = (c) => {
    const p = document.createElement('canvas').getContext('2d');
    p.fillStyle = c; p.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = p.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map((i) =>
    top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = (c) => {
    const [r, g, b] = c.map((v) => {
      v /= 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    const stack = [];
    for (; e; e = e.parentElement) stack.push(parse(
      getComputedStyle(e).backgroundColor));
    return stack.reduceRight((under, top) => over(top, under),
      [255, 255, 255, 1]);
  };
  const bad = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility() ||
      e.closest('script, svg, .only-spoken, .skip')) continue;
    const style = getComputedStyle(e);
    const back = behind(e);
    const a = light(over(parse(style.color), back)), b = light(back);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.6 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5))
      bad.add(`${ratio.toFixed(2)} ${e.className} ${e.innerText}`);
  }
  return [...bad].slice(0, 8);
})()"""


@pytest.fixture(scope='module')
def fake(tmp_path_factory):
  config, workdir = fake_run.make(tmp_path_factory.mktemp('run'), 64, 24)
  report.run(config, workdir)
  return (workdir.file('report') / 'index.html').as_uri()


@pytest.fixture(
  scope='module',
  params=['fake', *(['run'] if os.environ.get('LMM_SAE_REPORT') else [])],
)
def url(request, fake):
  if request.param == 'fake':
    return fake
  return pathlib.Path(os.environ['LMM_SAE_REPORT']).absolute().as_uri()


@pytest.fixture(scope='module')
def browser():
  with Chromium() as chromium:
    yield chromium


@pytest.fixture
def opened(browser, url):
  """Opens a view; afterwards nothing may have gone wrong or gone out."""
  pages = []

  def open_(route='#/', **size):
    page = browser.page(url + route, **size)
    pages.append(page)
    page.wait('document.body.dataset.shown')
    return page

  yield open_
  for page in pages:
    assert page.errors == []
    assert [
      request
      for request in page.requests
      if not request.startswith(('file:', 'data:'))
    ] == []
    page.__exit__()


def open_first(page):
  page.click('#results .card h3 a')
  page.wait("document.querySelector('#view-latent h1')?.offsetParent")


def every_view(page):
  """Goes from view to view, and at last to a latent's page."""
  for route in VIEWS:
    page.run(f'location.hash = {json.dumps(route)}')
    page.wait(f'document.body.dataset.shown === {json.dumps(route)}')
    yield route
  page.run("location.hash = '#/latents?outcome=explained'")
  page.wait("document.querySelector('#results .card h3 a')?.offsetParent")
  open_first(page)
  yield 'latent'


def cards(page):
  return page.texts('#results .card h3')


def count(page):
  return int(page.text('#count').split()[0].replace(',', ''))


def column(page, title):
  """The numbers of a column of the table; what is missing is left out."""
  titles = page.texts('#results thead th')
  at = next(i for i, text in enumerate(titles) if text.startswith(title))
  cells = page.texts(f'#results tbody tr > :nth-child({at + 1})')
  return [
    float(cell.split()[0].strip('#%<').replace(',', ''))
    for cell in cells
    if cell[:1] not in ('–', '')
  ]


def test_the_overview_shows_figures_pictures_and_fates(opened):
  page = opened()
  assert len(page.texts('.figures h3')) >= 8
  page.run("document.querySelector('[data-first]').scrollIntoView()")
  page.wait("document.querySelectorAll('[data-first] .pic canvas').length > 4")
  assert page.run('document.querySelectorAll("[data-plot] svg").length') >= 1
  assert page.texts('.legend .count')


def test_search_narrows_the_grid(opened):
  page = opened('#/latents')
  whole = count(page)
  word = next(label for label in cards(page) if label.isalpha())
  page.click('#q')
  page.run("document.querySelector('#q').focus()")
  page.type(word)
  page.wait("/of [0-9]/.test(document.querySelector('#count').innerText)")
  assert 0 < count(page) < whole
  for card in page.texts('#results .card'):
    assert word.lower() in card.lower() or '#' in card
  page.click('#clear')
  assert count(page) == whole


def test_a_search_without_result_says_so(opened):
  page = opened('#/latents?q=zzzzz')
  assert count(page) == 0
  assert 'No latent matches' in page.text('#results')


def test_filters_narrow_and_combine(opened):
  page = opened('#/latents')
  whole = count(page)
  page.run("document.querySelector('.filters').open = true")
  page.click('[data-chip="outcome"][data-value="explained"]')
  explained = count(page)
  assert explained < whole
  chip = '[data-chip="outcome"][data-value="explained"]'
  assert (
    page.run(f"document.querySelector('{chip}').getAttribute('aria-pressed')")
    == 'true'
  )
  page.click('[data-chip="category"]')
  assert count(page) <= explained
  page.click('#clear')
  assert count(page) == whole


def test_the_grid_sorts_by_every_score(opened):
  page = opened('#/latents?as=table')
  for title in ('IoU', 'Fires on', 'Peak', 'Latent'):
    sort = {
      'IoU': 'iou', 'Fires on': 'rate', 'Peak': 'peak', 'Latent': 'latent',
    }[title]  # fmt: skip
    head = f'#results button[data-sort="{sort}"]'
    order = f"document.querySelector('{head}').closest('th').ariaSort"
    for _ in range(2):
      page.click(head)
      values = column(page, title)
      falls = page.run(order) == 'descending'
      assert values == sorted(values, reverse=falls)
      assert len(values) > 5
  assert page.run("document.querySelectorAll('th[aria-sort=none]').length") > 2


def test_a_latent_opens_and_back_restores_the_grid(opened):
  page = opened('#/latents?sort=rate')
  before = cards(page)
  page.run('window.scrollTo(0, 500)')
  open_first(page)
  assert page.text('#view-latent h1').strip('“”') == before[0]
  assert page.run('window.scrollY') == 0
  assert page.run('document.activeElement.tagName') == 'H1'
  assert before[0].lower() in page.run('document.title').lower()
  headings = page.texts('#view-latent h2')
  for words in ('Images', 'explainers', 'Text', 'editing', 'Answers'):
    assert any(words in heading for heading in headings)
  assert page.texts('#view-latent figcaption')
  page.run('history.back()')
  page.wait("document.querySelector('#results')?.offsetParent")
  assert cards(page) == before
  page.wait('window.scrollY === 500')


def test_a_latent_is_shown_masked_as_the_explainer_saw_it(opened):
  page = opened('#/latents?outcome=explained&sort=iou')
  open_first(page)
  page.wait("document.querySelector('#view-latent .pic.heat canvas')")
  page.run(
    "[...document.querySelectorAll('#view-latent .toggle button')]"
    ".find((b) => b.innerText === 'Masked').click()"
  )
  page.wait("document.querySelector('#view-latent .pic.masked canvas')")
  alphas = page.run(
    "(() => { const c = document.querySelector('#view-latent .masked canvas');"
    " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
    ' return [...d].filter((_, i) => i % 4 === 3); })()'
  )
  assert set(alphas) == {0, 224}  # lit, or dimmed to 12%


def test_the_keyboard_alone_is_enough(opened):
  page = opened()
  page.press('Tab')
  assert page.run('document.activeElement.className') == 'skip'
  page.press('Enter')
  assert page.run('document.activeElement.id') == 'main'
  page.press('/')
  page.wait("document.activeElement.id === 'q'")
  assert page.run('location.hash').startswith('#/latents')
  page.type('e')
  page.wait("location.hash.includes('q=e')")  # the cards are drawn anew
  for _ in range(200):
    page.press('Tab')
    if page.run("Boolean(document.activeElement.closest('.card'))"):
      break
  assert page.run("document.activeElement.matches('.card h3 a')")
  page.press('Enter')
  page.wait("document.querySelector('#view-latent h1')?.offsetParent")
  eyebrow = "document.querySelector('#view-latent .eyebrow').innerText"
  first = page.run(eyebrow)
  page.press('ArrowRight')
  page.wait(f'{eyebrow} !== {json.dumps(first)}')
  page.press('ArrowLeft')
  page.wait(f'{eyebrow} === {json.dumps(first)}')
  page.press('Escape')
  page.wait("document.querySelector('#results')?.offsetParent")


@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_every_view_can_be_read_by_all(opened, dark):
  page = opened(dark=dark)
  for route in every_view(page):
    assert (route, page.run(AUDIT)) == (route, [])
    assert (route, page.run(CONTRAST)) == (route, [])


def test_a_phone_needs_no_sideways_scrolling(opened):
  page = opened(width=360, height=740)
  for route in every_view(page):
    width = page.run('document.documentElement.scrollWidth')
    assert (route, width) == (route, 360)
    assert (route, page.run(AUDIT)) == (route, [])


def test_a_latent_that_is_not_there_says_so(opened):
  page = opened('#/latent/2/99999999')
  assert page.text('#view-latent h1') == 'No such latent'


def test_an_anchor_is_no_view(opened):
  page = opened('#main')
  assert page.run(
    "document.querySelector('#view-overview').offsetParent !== null"
  )


def test_words_of_a_model_are_shown_as_words(browser, fake):
  with browser.page(f'{fake}#/latent/2/2') as page:
    page.wait('document.body.dataset.shown')
    assert fake_run.NASTY in page.text('#view-latent')
    assert not page.run("document.querySelector('img[src=x]')")
    assert '<b>&amp;</b>' in ' '.join(page.texts('.contexts'))
    assert page.errors == []


def test_only_what_is_in_sight_is_loaded(browser, fake):
  with browser.page(fake) as page:
    page.wait('document.body.dataset.shown')
    assert not [one for one in page.requests if 'latents_' in one]
