// Elements, numbers and data. Text always becomes a text node: nothing that
// comes from the run is ever parsed as HTML.

const SVG = 'http://www.w3.org/2000/svg';

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'style') node.style.cssText = value;
    else node.setAttribute(name, value === true ? '' : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child.nodeType ? child : String(child));
  }
  return node;
}

const h = (tag, props, ...children) =>
  fill(document.createElement(tag), props, children);
const s = (tag, props, ...children) =>
  fill(document.createElementNS(SVG, tag), props, children);
/** Puts the nodes, however nested, in the place of what a view showed. */
function show(view, ...nodes) {
  view.replaceChildren();
  fill(view, null, nodes);
}

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

const known = (value) => value !== null && value !== undefined;

const fmt = {
  int: (value) => value.toLocaleString('en-US'),
  num(value, digits = 2) {
    if (!known(value)) return '–';
    if (Number.isInteger(value) && Math.abs(value) >= 10) return fmt.int(value);
    const size = Math.abs(value);
    if (size !== 0 && size < 0.1) return value.toFixed(3);
    return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : digits);
  },
  /** Three digits that count: for activations, whose scale is any. */
  sig: (value) => (known(value) ? String(Number(value.toPrecision(3))) : '–'),
  percent(value) {
    if (!known(value)) return '–';
    const share = value * 100;
    if (share === 0) return '0%';
    if (share < 0.1) return '<0.1%';
    return `${share.toFixed(share < 10 ? 1 : 0)}%`;
  },
  ci: (ci, digits = 2) =>
    ci ? `${fmt.num(ci[0], digits)} to ${fmt.num(ci[1], digits)}` : '',
  words(name) {
    const text = String(name).replace(/_/g, ' ').trim();
    const short = { iou: 'IoU', clip: 'CLIP', fvu: 'FVU', sae: 'SAE', n: 'n' };
    const said = text.replace(/\b(iou|clip|fvu|sae)\b/gi, (w) =>
      short[w.toLowerCase()]);
    return said.charAt(0).toUpperCase() + said.slice(1);
  },
};

// Data beside the page: a page opened from disk cannot fetch, but it can run a
// script; each file calls lmmSae.put(key, value).
const store = {
  waiting: new Map(),
  values: new Map(),
  load(key, file) {
    if (store.values.has(key)) return Promise.resolve(store.values.get(key));
    if (store.waiting.has(key)) return store.waiting.get(key);
    const promise = new Promise((resolve, reject) => {
      const node = h('script', { src: `data/${file}` });
      node.onload = () => resolve(store.values.get(key));
      node.onerror = () => {
        store.waiting.delete(key);
        reject(new Error(`data/${file} is missing beside this page`));
      };
      document.head.append(node);
    });
    store.waiting.set(key, promise);
    return promise;
  },
};
window.lmmSae = { put: (key, value) => store.values.set(key, value) };

const run = JSON.parse($('#run').textContent);
const pad = (n) => String(n).padStart(4, '0');
const layerOf = (layer) => run.layers.find((one) => one.layer === layer);
const loadLayer = (layer) =>
  store.load(`layer/${layer}`, `layer_${layer}.js`);
const loadThumbs = (layer, row) => {
  const at = Math.floor(row / layerOf(layer).thumbs);
  return store.load(`thumbs/${layer}/${at}`, `${layer}/thumbs_${pad(at)}.js`);
};
const loadDetail = (layer, row) => {
  const at = Math.floor(row / layerOf(layer).chunk);
  return store.load(`latents/${layer}/${at}`, `${layer}/latents_${pad(at)}.js`);
};
const loadSamples = () => store.load('samples', 'samples.js');

const latentHref = (layer, latent) => `#/latent/${layer}/${latent}`;

/** A badge for what became of a latent. */
const outcomeBadge = (outcome) =>
  h('span', { class: 'badge' }, h('i', { class: `is-${outcome}` }),
    run.outcomes[outcome] || fmt.words(outcome));

/** Says that a stage was not run, instead of an empty place. */
const notRun = (why) => h('p', { class: 'not-run' }, `Not run: ${why}`);

/** The text with every whole-word hit of `word` marked. */
function marked(text, word) {
  if (!word) return [text];
  const safe = word.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
  return text.split(new RegExp(`\\b(${safe})\\b`, 'i')).map((part, i) =>
    i % 2 ? h('mark', null, part) : part);
}

/** A few keys of a toggle, one of them pressed. */
function toggle(label, options, value, choose) {
  const box = h('div', { class: 'toggle', role: 'group', 'aria-label': label });
  for (const [key, name] of options) {
    box.append(h('button', {
      type: 'button',
      'aria-pressed': String(key === value),
      onclick(event) {
        for (const one of box.children) {
          one.setAttribute('aria-pressed', String(one === event.target));
        }
        choose(key);
      },
    }, name));
  }
  return box;
}

/** Shows the items a few at a time, with a button for the rest. */
function paged(list, items, make, step = 24) {
  let shown = 0;
  const button = h('button', { type: 'button' }, 'Show more');
  const rest = h('div', { class: 'more' }, button);
  const grow = () => {
    list.append(...items.slice(shown, shown + step).map(make));
    shown += step;
    rest.hidden = shown >= items.length;
  };
  button.addEventListener('click', grow);
  grow();
  return [list, rest];
}
