// The grid of latents: search, filters, order, cards or a table, drawn lazily.

const SORTS = {
  iou: ['IoU', 'iou'],
  clip: ['CLIP score', 'clip'],
  f1: ['F1 of its concept', 'f1'],
  rate: ['Share of images it fires on', 'rate'],
  peak: ['Peak activation', 'peak'],
  label: ['Label', 'label'],
  latent: ['Latent number', 'latent'],
};
const STEP = 48;

const grid = { data: null, rows: [], shown: 0, state: {}, drawn: '' };

function gridState(query) {
  const layer = Number(query.get('layer') ?? run.layers[0].layer);
  return {
    layer: layerOf(layer) ? layer : run.layers[0].layer,
    q: query.get('q') || '',
    sort: query.get('sort') || '',
    order: query.get('order') || '',
    as: query.get('as') || 'cards',
    outcome: query.get('outcome') || '',
    category: query.get('category') || '',
    concept: query.get('concept') || '',
    flag: query.get('flag') || '',
  };
}

function gridHref(state) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    const plain = name === 'as' ? 'cards' :
      name === 'layer' ? run.layers[0].layer : '';
    if (value !== plain) query.set(name, value);
  }
  const text = query.toString();
  return `#/latents${text ? `?${text}` : ''}`;
}

/** Sorts that this run has values for. */
const gridSorts = () => Object.keys(SORTS).filter((name) =>
  grid.data.fields[SORTS[name][1]].some((v) => known(v) && v !== ''));

const gridSort = () => {
  const sorts = gridSorts();
  return sorts.includes(grid.state.sort) ? grid.state.sort : sorts[0];
};

const gridOrder = () => grid.state.order ||
  (['label', 'latent'].includes(gridSort()) ? 'asc' : 'desc');

function gridMatch() {
  const { fields } = grid.data;
  const { q, outcome, category, concept, flag } = grid.state;
  const words = q.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [];
  for (let i = 0; i < fields.latent.length; i++) {
    if (outcome && fields.outcome[i] !== outcome) continue;
    if (category && fields.category[i] !== category) continue;
    if (concept && fields.concept[i] !== concept) continue;
    if (flag && !fields.flags[i].includes(flag)) continue;
    if (words.length) {
      const text = `${fields.label[i]} ${fields.text[i]} ${fields.concept[i]} ` +
        `${fields.category[i]} #${fields.latent[i]}`;
      const low = text.toLowerCase();
      if (!words.every((word) => low.includes(word))) continue;
    }
    rows.push(i);
  }
  const column = fields[SORTS[gridSort()][1]];
  const sign = gridOrder() === 'asc' ? 1 : -1;
  const missing = (v) => !known(v) || v === '';
  return rows.sort((a, b) => {
    const [x, y] = [column[a], column[b]];
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
    const by = typeof x === 'string' ? x.localeCompare(y, 'en') : x - y;
    return sign * by || a - b;
  });
}

/** The label as a node: what the explainer called it, or that it did not. */
function labelOf(fields, i) {
  if (fields.label[i]) return fields.label[i];
  return h('span', { class: 'unnamed' },
    run.outcomes[fields.outcome[i]] || 'No label');
}

/** The dimmed exemplars of a row, put in when they come into sight. */
function fillThumbs(node, layer, row, mode = 'masked') {
  node.dataset.row = row;
  node.fillThumbs = async () => {
    const [samples, thumbs] = await Promise.all([
      loadSamples(), loadThumbs(layer, row)]);
    const latent = store.values.get(`layer/${layer}`).fields.latent[row];
    const list = thumbs[latent] || [];
    node.replaceChildren(...(list.tokens
      ? [h('div', { class: 'words' }, shaded(list))]
      : list.length ? list.map(([sample, heat]) =>
        picture(samples, run.split, sample, heat, mode, false))
        : [h('span', { class: 'none' }, 'Nothing fires it')]));
  };
  sight.observe(node);
  return node;
}

const sight = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    sight.unobserve(entry.target);
    entry.target.fillThumbs();
  }
}, { rootMargin: '400px' });

function scoresOf(fields, i) {
  const list = [];
  const add = (name, value, base) => {
    if (!known(value)) return;
    list.push(h('div', null, h('dt', null, `${name} `), h('dd', null,
      h('b', null, fmt.num(value)),
      known(base) && h('span', { class: 'soft' }, ` vs ${fmt.num(base)}`))));
  };
  add('IoU', fields.iou[i], fields.iou_base[i]);
  add('CLIP', fields.clip[i], fields.clip_base[i]);
  list.push(h('div', null, h('dt', null, 'fires on '),
    h('dd', null, fields.rate[i]
      ? [h('b', null, fmt.percent(fields.rate[i])), ' of images']
      : 'no image')));
  return list;
}

function metaOf(fields, i) {
  const parts = [`#${fields.latent[i]}`];
  if (fields.category[i]) parts.push(fields.category[i]);
  if (fields.concept[i]) {
    parts.push(`${fields.concept[i]}, F1 ${fmt.num(fields.f1[i])}`);
  }
  return parts.join(' · ');
}

const flagBadges = (fields, i, only) => fields.flags[i]
  .filter((flag) => !only || only.includes(flag))
  .map((flag) => h('span', { class: 'badge' }, run.flags[flag] || flag));

function card(layer, i) {
  const { fields } = store.values.get(`layer/${layer}`);
  const badges = flagBadges(fields, i,
    ['wrong', 'always_on', 'words', 'steered']);
  if (fields.label[i] && fields.outcome[i] !== 'explained') {
    badges.unshift(outcomeBadge(fields.outcome[i]));
  }
  return h('li', null, h('article', { class: 'card' },
    fillThumbs(h('div', { class: 'mosaic', 'aria-hidden': 'true' }), layer, i),
    h('div', { class: 'card-body' },
      h('h3', null, h('a', { href: latentHref(layer, fields.latent[i]) },
        labelOf(fields, i))),
      h('p', { class: 'meta' }, metaOf(fields, i)),
      badges.length > 0 && h('div', { class: 'badges' }, badges),
      h('dl', { class: 'scores' }, scoresOf(fields, i)))));
}

const versus = (value, base) => [fmt.num(value), known(base) &&
  h('span', { class: 'soft small' }, ` vs ${fmt.num(base)}`)];

const COLUMNS = [
  ['Latent', 'latent', (f, i) => `#${f.latent[i]}`],
  ['Exemplars', '', null],
  ['Label', 'label', null],
  ['Category', '', (f, i) => f.category[i]],
  ['Concept', '', (f, i) => f.concept[i]],
  ['IoU', 'iou', (f, i) => versus(f.iou[i], f.iou_base[i])],
  ['CLIP', 'clip', (f, i) => versus(f.clip[i], f.clip_base[i])],
  ['F1', 'f1', (f, i) => fmt.num(f.f1[i])],
  ['Fires on', 'rate', (f, i) => fmt.percent(f.rate[i])],
  ['Peak', 'peak', (f, i) => fmt.sig(f.peak[i])],
];

function tableHead() {
  return h('thead', null, h('tr', null, COLUMNS.map(([name, sort]) => {
    if (!sort || !gridSorts().includes(sort)) {
      return h('th', { scope: 'col' }, name);
    }
    const now = gridSort() === sort;
    const order = gridOrder() === 'asc' ? 'ascending' : 'descending';
    return h('th', { scope: 'col', 'aria-sort': now ? order : 'none' },
      h('button', { type: 'button', class: 'sort', 'data-sort': sort,
        onclick() {
          const flip = gridOrder() === 'asc' ? 'desc' : 'asc';
          gridChange({ sort, order: now ? flip : '' });
          const again = $(`#results button[data-sort="${sort}"]`);
          if (again) again.focus();
        } }, name));
  })));
}

function tableRow(layer, i) {
  const { fields } = grid.data;
  return h('tr', null, COLUMNS.map(([name, , cell]) => {
    if (name === 'Exemplars') {
      return h('td', null, fillThumbs(
        h('div', { class: 'pics', 'aria-hidden': 'true' }), layer, i));
    }
    if (name === 'Label') {
      return h('th', { scope: 'row', class: 'words' },
        h('a', { href: latentHref(layer, fields.latent[i]) },
          labelOf(fields, i)));
    }
    return h('td', { class: 'num' }, cell(fields, i));
  }));
}

function gridGrow() {
  const { layer, as } = grid.state;
  const part = grid.rows.slice(grid.shown, grid.shown + STEP);
  const make = as === 'table' ? tableRow : card;
  $('#results [data-list]').append(...part.map((i) => make(layer, i)));
  grid.shown += part.length;
  $('#more').hidden = grid.shown >= grid.rows.length;
}

function chips(name, legend, values, names) {
  const { fields } = grid.data;
  const counts = new Map();
  for (const value of fields[name === 'flag' ? 'flags' : name]) {
    for (const one of [value].flat()) counts.set(one, (counts.get(one) || 0) + 1);
  }
  const some = values.filter((value) => counts.get(value));
  if (!some.length) return null;
  return h('fieldset', { class: 'chips' }, h('legend', null, legend),
    some.map((value) => {
      const on = grid.state[name] === value;
      return h('button', { type: 'button', class: 'chip', 'data-chip': name,
        'data-value': value, 'aria-pressed': String(on),
        onclick() {
          gridChange({ [name]: on ? '' : value });
          $(`[data-chip="${name}"][data-value="${CSS.escape(value)}"]`).focus();
        } }, names(value), h('span', { class: 'num' },
        fmt.int(counts.get(value))));
    }));
}

function gridTools() {
  const { fields } = grid.data;
  const { state } = grid;
  const only = (column) => [...new Set(column)].filter(Boolean).sort();
  if (document.activeElement !== $('#q')) $('#q').value = state.q;
  $('#sort').replaceChildren(...gridSorts().map((name) =>
    h('option', { value: name, selected: name === gridSort() }, SORTS[name][0])));
  for (const button of $$('[data-order]')) {
    button.setAttribute('aria-pressed',
      String(button.dataset.order === gridOrder()));
  }
  for (const button of $$('[data-as]')) {
    button.setAttribute('aria-pressed', String(button.dataset.as === state.as));
  }
  const layers = run.layers.map(({ layer }) => String(layer));
  $('#filters').replaceChildren(...[
    layers.length > 1 && h('fieldset', { class: 'chips' },
      h('legend', null, 'Layer'), layers.map((layer) => h('button', {
        type: 'button', class: 'chip',
        'aria-pressed': String(state.layer === Number(layer)),
        onclick: () => { location.hash = gridHref({ ...state,
          layer: Number(layer) }); } }, layer))),
    chips('outcome', 'Outcome', Object.keys(run.outcomes),
      (value) => run.outcomes[value]),
    chips('category', 'Category', only(fields.category), (value) => value),
    chips('concept', 'Concept', only(fields.concept), (value) => value),
    chips('flag', 'Only', Object.keys(run.flags), (value) => run.flags[value]),
  ].filter(Boolean));
}

function gridDraw() {
  const { state } = grid;
  grid.rows = gridMatch();
  grid.shown = 0;
  grid.drawn = gridHref(state);
  gridTools();
  const total = grid.data.fields.latent.length;
  const some = grid.rows.length;
  $('#count').textContent = some === total
    ? `${fmt.int(total)} latents of layer ${state.layer}`
    : `${fmt.int(some)} of ${fmt.int(total)} latents of layer ${state.layer}`;
  $('#clear').hidden = !(state.q || state.outcome || state.category ||
    state.concept || state.flag);
  const results = $('#results');
  if (!some) {
    results.replaceChildren(h('p', { class: 'empty panel' },
      'No latent matches. Try fewer words, or clear the filters.'));
    $('#more').hidden = true;
  } else if (state.as === 'table') {
    results.replaceChildren(h('div', { class: 'panel scroll', tabindex: '0',
      role: 'region', 'aria-label': 'Latents' },
    h('table', { class: 'latents-table' }, tableHead(),
      h('tbody', { 'data-list': '' }))));
    gridGrow();
  } else {
    results.replaceChildren(h('ul', { class: 'cards', 'data-list': '' }));
    gridGrow();
  }
  const tab = $('.top a[data-view="latents"]');
  tab.setAttribute('href', grid.drawn);
}

/** Changes the state from a control: the address follows, no new history. */
function gridChange(change) {
  Object.assign(grid.state, change);
  history.replaceState(null, '', gridHref(grid.state));
  gridDraw();
}

async function showGrid(query) {
  const state = gridState(query);
  grid.data = await loadLayer(state.layer);
  if (grid.drawn === gridHref(state)) return; // back: as it was left
  grid.state = state;
  gridDraw();
  $('.filters').open = Boolean(state.outcome || state.category ||
    state.concept || state.flag) || window.innerWidth >= 900;
}

function startGrid() {
  let timer = 0;
  $('.tools').addEventListener('submit', (event) => event.preventDefault());
  $('#q').addEventListener('input', (event) => {
    clearTimeout(timer);
    const q = event.target.value;
    timer = setTimeout(() => gridChange({ q }), 90);
  });
  $('#sort').addEventListener('change', (event) =>
    gridChange({ sort: event.target.value, order: '' }));
  for (const button of $$('[data-order]')) {
    button.addEventListener('click', () =>
      gridChange({ order: button.dataset.order }));
  }
  for (const button of $$('[data-as]')) {
    button.addEventListener('click', () => gridChange({ as: button.dataset.as }));
  }
  $('#clear').addEventListener('click', () => {
    $('#q').value = '';
    gridChange({ q: '', outcome: '', category: '', concept: '', flag: '' });
    $('#q').focus();
  });
  $('#more button').addEventListener('click', gridGrow);
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting) && grid.data &&
      !$('#more').hidden) gridGrow();
  }, { rootMargin: '600px' }).observe($('#more'));
}
