// Results of studies: figures beside their baselines, whatever else they hold.

const FIGURE_NAMES = {
  top: 'The strongest latent behind the answer stands for its emotion',
  top5: 'One of the five strongest does',
  mended: 'Wrong answers that become right',
  broken: 'Right answers that become wrong',
};

const isObject = (value) => value !== null && typeof value === 'object' &&
  !Array.isArray(value);
const isFigure = (value) => isObject(value) && 'value' in value;

function figureRow(name, figure, base, plots) {
  const title = h('th', { scope: 'row' }, FIGURE_NAMES[name] || fmt.words(name));
  const { value } = figure;
  if (!known(value)) {
    return h('tr', null, title,
      h('td', { class: 'soft', colspan: '5' }, figure.reason || 'not run'));
  }
  const share = typeof value === 'number' && value >= 0 && value <= 1;
  const points = [{ value, ci: figure.ci, mark: 'dot' }];
  if (base && known(base.value)) {
    points.push({ value: base.value, ci: base.ci, mark: 'circle' });
  }
  return h('tr', null, title,
    h('td', { class: 'num' }, h('b', null,
      typeof value === 'number' ? fmt.num(value) : String(value))),
    h('td', { class: 'num soft nowrap' }, fmt.ci(figure.ci)),
    h('td', { class: 'num soft' }, known(figure.n) ? fmt.int(figure.n) : ''),
    h('td', { class: 'num nowrap' }, base && [fmt.num(base.value),
      base.ci && h('span', { class: 'soft' }, ` (${fmt.ci(base.ci)})`)]),
    plots && h('td', { class: 'wide' }, share &&
      intervalPlot({ domain: [0, 1], points })));
}

/** Figures as a table; `x_random` stands as the baseline of `x`. */
function figureTable(entries, label, plots = true) {
  const table = Object.fromEntries(entries);
  const own = entries.filter(([name]) => !(name.endsWith('_random') &&
    name.slice(0, -7) in table));
  const based = own.some(([name]) => `${name}_random` in table);
  return h('div', { class: 'panel scroll', tabindex: '0', role: 'region',
    'aria-label': label },
  h('table', null,
    h('thead', null, h('tr', null, ['Figure', 'Value', '95% interval', 'n',
      based ? 'Random latents' : '', plots && ''].map((name) =>
      name !== false && h('th', { scope: 'col' }, name)))),
    h('tbody', null, own.map(([name, one]) =>
      figureRow(name, one, table[`${name}_random`], plots)))));
}

function cellOf(name, value, layer) {
  if (!known(value)) return '–';
  if (isFigure(value)) {
    return [fmt.num(value.value), value.ci &&
      h('span', { class: 'soft small' }, ` ${fmt.ci(value.ci)}`)];
  }
  if (name === 'latent' && Number.isInteger(value)) {
    return h('a', { href: latentHref(layer, value) }, `#${value}`);
  }
  if (typeof value === 'boolean') return value ? 'yes' : 'no';
  if (typeof value === 'number') return fmt.num(value);
  if (Array.isArray(value)) return value.map((one) =>
    isObject(one) ? JSON.stringify(one) : cellOf(name, one, layer))
    .flatMap((one, i) => (i ? [', ', one] : [one]));
  return isObject(value) ? JSON.stringify(value) : String(value);
}

/** Objects of like fields, as a table; a `sample` becomes its picture. */
function objectTable(list, label, samples, layer) {
  const names = [...new Set(list.flatMap((one) => Object.keys(one)))];
  const split = (one) => one.split || one.half || run.split;
  const body = h('tbody');
  const [rows, rest] = paged(body, list, (one) => h('tr', null,
    names.map((name) => h('td', null,
      name === 'sample' && pictureOf(samples, split(one), one.sample)
        ? h('span', { class: 'thumb' },
          picture(samples, split(one), one.sample, null, 'plain'))
        : cellOf(name, one[name], layer)))), 20);
  return h('div', { class: 'panel' },
    h('div', { class: 'scroll', tabindex: '0', role: 'region',
      'aria-label': label },
    h('table', null, h('thead', null, h('tr', null, names.map((name) =>
      h('th', { scope: 'col' }, fmt.words(name))))), rows)), rest);
}

function generic(value, title, samples, layer, depth = 2) {
  if (Array.isArray(value)) {
    if (value.length && value.every(isObject)) {
      return [objectTable(value, title, samples, layer)];
    }
    return value.length ? [h('p', null, cellOf('', value, layer))] : [];
  }
  if (!isObject(value)) return [h('p', null, cellOf('', value, layer))];
  const entries = Object.entries(value).filter(([name]) =>
    name !== 'format_version');
  const nodes = [];
  const figures = entries.filter(([, one]) => isFigure(one));
  const plain = entries.filter(([, one]) => !isObject(one) &&
    !(Array.isArray(one) && one.some(isObject)));
  const texts = plain.filter(([, one]) => typeof one === 'string' &&
    one.length > 60);
  const small = plain.filter((entry) => !texts.includes(entry));
  for (const [, text] of texts) nodes.push(h('p', { class: 'soft' }, text));
  if (small.length) {
    nodes.push(h('dl', { class: 'facts' }, small.map(([name, one]) =>
      h('div', null, h('dt', null, fmt.words(name)),
        h('dd', null, cellOf(name, one, layer))))));
  }
  if (figures.length) nodes.push(figureTable(figures, title));
  const inner = entries.filter(([, one]) => !isFigure(one) &&
    (isObject(one) || (Array.isArray(one) && one.some(isObject))));
  for (const [name, one] of inner) {
    nodes.push(h('section', { class: 'generic-part' },
      h(`h${Math.min(depth, 4)}`, null, fmt.words(name)),
      h('div', { class: 'generic' },
        generic(one, fmt.words(name), samples, layer, depth + 1))));
  }
  return nodes;
}

const figuresOf = (value) =>
  Object.entries(value).filter(([, one]) => isFigure(one));

/** What is left of a study once the known parts have been shown. */
function leftOver(value, shown, samples, layer) {
  const rest = Object.fromEntries(Object.entries(value).filter(([name, one]) =>
    !shown.includes(name) && !isFigure(one)));
  return Object.keys(rest).length
    ? h('div', { class: 'generic' }, generic(rest, 'More', samples, layer, 3))
    : null;
}

/** Shares by the number of ablated latents, beside random ones. */
function ablationPanel(study) {
  const points = (table) => Object.entries(table || {})
    .filter(([, one]) => known(one.value))
    .map(([n, one]) => [Number(n), one.value, one.n])
    .sort((a, b) => a[0] - b[0]);
  const curve = { name: 'ablation', doses: points(study.ablated).map((p) => p[0]),
    curves: [], mean: points(study.ablated), control: points(study.random),
    axis: 'strongest latents ablated', tick: '', names: ['strongest', 'random'],
    about: 'Share of answers that change, by number of ablated latents' };
  if (!curve.doses.length) return null;
  const entries = Object.entries(study.ablated).flatMap(([n, one]) => {
    const name = n === '1' ? '1 latent' : `${n} latents`;
    const random = (study.random || {})[n];
    return random ? [[name, one], [`${name}_random`, random]] : [[name, one]];
  });
  return h('section', { class: 'section' },
    h('h2', null, 'How many latents must go before the answer changes'),
    h('p', null, 'An emotion stands in several latents at once, so one ' +
      'ablated latent often changes nothing.'),
    h('div', { class: 'study' },
      h('div', { class: 'panel pad' }, doseCurves(curve)),
      figureTable(entries, 'Answers that change, by number of latents',
        false)));
}

function resultCase(one, samples, layer, answers) {
  const image = pictureOf(samples, 'b', one.sample);
  const latents = one.latents || [];
  return h('li', { class: image ? null : 'no-picture' },
    image && picture(samples, 'b', one.sample, null, 'plain'),
    h('div', null, h('p', { class: 'prompt' }, one.prompt),
      latents.length > 0 && h('p', { class: 'small soft' }, 'latents ',
        latents.map((latent, i) => [i ? ', ' : '',
          h('a', { href: latentHref(layer, latent) }, `#${latent}`)])),
      h('dl', { class: 'answers' }, answers.map(([name, text]) =>
        h('div', null, h('dt', null, name), h('dd', null,
          text || h('span', { class: 'soft' }, 'nothing')))))));
}

const resultCases = (title, cases, samples, layer, answers) =>
  cases && cases.length > 0 && h('section', { class: 'section' },
    h('h2', null, title), h('div', { class: 'panel' },
      paged(h('ul', { class: 'cases' }), cases,
        (one) => resultCase(one, samples, layer, answers(one)), 10)));

function feelings(study, samples, layer) {
  return [
    h('section', { class: 'section' }, h('h2', null, 'Which latents cause it'),
      figureTable(figuresOf(study), 'Which latents cause it')),
    study.ablated && ablationPanel(study),
    resultCases('The answers, and what is left of them', study.cases, samples,
      layer, (one) => [['Plain', one.text],
        ...Object.entries(one.ablated || {}).map(([n, text]) =>
          [`Without the ${n === '1' ? 'first' : `first ${n}`}`, text])]),
    leftOver(study, ['ablated', 'random', 'cases'], samples, layer),
  ];
}

function mistakes(study, samples, layer) {
  const { rule } = study;
  const told = !rule ? null : rule.latents === 0
    ? 'No rule gained right answers on half A, so nothing is ablated.'
    : 'The rule, fitted on half A: where the answer leads the runner-up by at ' +
      `most ${fmt.num(rule.margin)}, ablate the ${rule.latents} latents that ` +
      'pushed it most, and ask again. It does not know the truth.';
  return [
    h('section', { class: 'section' }, h('h2', null, 'Mended and broken'),
      told && h('p', null, told),
      figureTable(figuresOf(study), 'Mended and broken'),
      study.accuracy && h('p', { class: 'small soft', style: 'margin-top: 1rem' },
        'Right without any edit: ', Object.entries(study.accuracy).map(
          ([half, share]) => `${fmt.percent(share)} of ` +
            `${fmt.int((study.asked || {})[half] || 0)} on half ${half}`)
          .join(', '), '.')),
    resultCases('Answers that changed, and those that stayed wrong', study.cases,
      samples, layer, (one) => [['Right', one.right], ['Plain', one.text],
        ['By the rule', one.edited]]),
    leftOver(study, ['rule', 'accuracy', 'asked', 'cases'], samples, layer),
  ];
}

/** A page of study results: {layer: study}, a study or {reason}. */
async function showResults(view, key, make, title, lead, missing) {
  const data = await store.load(key, `${key}.js`);
  const samples = await loadSamples();
  const parts = data === null ? [notRun(missing)] :
    Object.entries(data).flatMap(([layer, study]) => [
      run.layers.length > 1 && h('h2', { class: 'section' }, `Layer ${layer}`),
      study.reason ? notRun(`${study.reason}.`) :
        make(study, samples, Number(layer))]);
  show(view, h('h1', { tabindex: '-1' }, title),
    h('p', { class: 'lead' }, lead),
    parts);
  return title;
}
