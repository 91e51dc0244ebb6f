// Views by the part of the address after #, so that Back works from disk.

const VIEWS = {
  overview: () => null,
  latents: (view, parts, query) => showGrid(query),
  latent: (view, parts) =>
    showLatent(view, Number(parts[0]), Number(parts[1])),
  steering: (view) => showSteering(view),
  causes: (view) => showCauses(view),
  feelings: (view) => showResults(view, 'eq', feelings, 'Feelings',
    'Do latents that stand for an emotion cause what the subject says about ' +
    'feelings? What it says when they are clamped stands under Steering.',
    'there is no eq.json yet; lmm-sae attribute writes it.'),
  mistakes: (view) => showResults(view, 'mistakes', mistakes, 'Mistakes',
    'Can wrong answers be mended by ablating what caused them, without ' +
    'breaking the right ones?',
    'there is no mistakes.json yet; lmm-sae attribute writes it.'),
};

const places = new Map(); // view -> how far down it was left
let current = 'overview';

function parseHash() {
  const text = location.hash || '#/';
  if (!text.startsWith('#/')) return null; // an anchor, not a view
  const [path, query] = text.slice(2).split('?');
  const [name, ...parts] = path.split('/');
  const view = name || 'overview';
  return { view: view in VIEWS ? view : 'overview', parts,
    query: new URLSearchParams(query || '') };
}

async function route(first) {
  const to = parseHash();
  if (!to) {
    document.body.dataset.shown = location.hash;
    return;
  }
  const [asked] = location.hash.split('?');
  places.set(current, window.scrollY);
  const view = $(`#view-${to.view}`);
  view.setAttribute('aria-busy', 'true');
  let title = null;
  try {
    title = await VIEWS[to.view](view, to.parts, to.query);
  } catch (error) {
    show(view, h('h1', { tabindex: '-1' }, 'This part is missing'),
      h('p', { class: 'lead' }, `${error.message}. Keep index.html, data and ` +
        'img in one folder.'));
    throw error;
  } finally {
    view.removeAttribute('aria-busy');
  }
  if (location.hash.split('?')[0] !== asked) return; // moved on meanwhile
  for (const one of $$('.view')) one.hidden = one !== view;
  const tab = to.view === 'latent' ? 'latents' : to.view;
  for (const link of $$('.top nav a')) {
    if (link.dataset.view === tab) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  const [bar, now] = [$('.top ul'), $('.top a[aria-current]')];
  bar.scrollLeft = now.offsetLeft - (bar.clientWidth - now.offsetWidth) / 2;
  const heading = $('h1', view);
  if (!view.id.endsWith('overview')) {
    document.title = `${title || heading.textContent} · ${run.title}`;
  } else document.title = run.title;
  const back = to.view === 'latents' && current === 'latent';
  current = to.view;
  document.body.dataset.shown = location.hash || '#/';
  if (first) return;
  heading.focus({ preventScroll: true });
  window.scrollTo(0, back ? places.get('latents') || 0 : 0);
}

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === '/' && !typing) {
    event.preventDefault();
    if (current !== 'latents') {
      location.hash = grid.drawn || '#/latents';
      setTimeout(() => $('#q').focus(), 60);
    } else $('#q').focus();
  }
  if (current !== 'latent' || typing) return;
  if (event.target.closest('.scroll, .toggle')) return;
  const step = { ArrowLeft: 'prev', ArrowRight: 'next', Escape: 'up' }[event.key];
  const link = step && $(`#view-latent [data-step="${step}"]`);
  if (link) link.click();
}

/** The strongest exemplar of some latents, beside the title; for the mouse. */
async function showArt({ layer, first }) {
  const { fields } = await loadLayer(layer);
  const samples = await loadSamples();
  const tiles = await Promise.all(first.map(async (row) => {
    const latent = fields.latent[row];
    const [best] = (await loadThumbs(layer, row))[latent];
    return h('a', { href: latentHref(layer, latent), tabindex: '-1',
      title: fields.label[row] },
    picture(samples, run.split, best[0], best[1], 'heat', false));
  }));
  $('.hero-art').append(...tiles.slice(0, tiles.length - tiles.length % 4));
}

async function showFirst() {
  for (const list of $$('[data-first]')) {
    const layer = Number(list.dataset.first);
    await loadLayer(layer);
    list.append(...layerOf(layer).first.slice(0, 8).map((row) =>
      card(layer, row)));
  }
  showArt(run.layers[0]);
}

for (const node of $$('[data-plot]')) {
  node.append(intervalPlot(JSON.parse(node.dataset.plot)));
}
$('.skip').addEventListener('click', (event) => {
  event.preventDefault();
  $('#main').focus();
});
startGrid();
addEventListener('hashchange', () => route(false));
addEventListener('keydown', onKey);
if ('scrollRestoration' in history) history.scrollRestoration = 'manual';
showFirst();
route(true);
