// The page of one latent.

const look = { mode: 'heat', view: 'base' };

function scoreLines(scores) {
  return h('div', { class: 'scored' }, scores.map((score) => {
    const high = Math.max(score.top, score.value, ...score.bases.map((b) => b.value));
    const markOf = (name) =>
      name.startsWith('random') ? 'diamond' : 'circle';
    return h('div', { class: 'line' },
      h('span', null, `${score.name} `, h('b', { class: 'num' },
        fmt.num(score.value)), h('span', { class: 'soft' }, ` n ${score.n}`)),
      h('div', null,
        intervalPlot({ domain: [0, high], points: [
          { value: score.value, ci: null, mark: 'dot' },
          ...score.bases.map((base) => ({ value: base.value, ci: null,
            mark: markOf(base.name) }))] }),
        score.bases.length > 0 && h('p', { class: 'small soft num' },
          score.bases.map((base) =>
            `${base.name} ${fmt.num(base.value)} (n ${base.n})`).join(' · '))));
  }));
}

function saidBy(explanations) {
  if (!explanations.length) return notRun('no explainer was asked.');
  return h('ul', { class: 'said panel' }, explanations.map((one) =>
    h('li', null,
      h('div', { class: 'badges' },
        h('span', { class: 'small soft' }, one.explainer || 'explainer'),
        outcomeBadge(one.outcome),
        one.category && h('span', { class: 'badge' }, one.category),
        known(one.right) && h('span', { class: 'badge' },
          one.right ? 'names the true concept' : 'misses the true concept')),
      h('blockquote', null, one.text || h('span', { class: 'soft' },
        run.outcomes[one.outcome] || 'nothing said')),
      one.label && one.label !== one.text && h('p', { class: 'small soft' },
        `label: ${one.label}`),
      one.scores.length > 0 && scoreLines(one.scores))));
}

function exemplarList(detail, samples) {
  const list = h('ul', { class: 'exemplars' });
  const draw = () => list.replaceChildren(...detail.exemplars.map((one, i) => {
    const heat = look.view === 'tiles' && one.t ? one.t : one.h;
    const info = pictureOf(samples, run.split, one.s);
    return h('li', null, h('figure', null,
      picture(samples, run.split, one.s, heat, look.mode),
      h('figcaption', null, h('b', null, fmt.sig(one.x)),
        ` mean, ${run.split} ${one.s}`,
        info && info.alt.includes(':') &&
          [h('br'), info.alt.slice(info.alt.indexOf(':') + 2)],
        one.e ? [h('br'), 'shown masked to the explainer'] : null)));
  }));
  const tiles = detail.exemplars.some((one) => one.t);
  const tools = h('div', { class: 'tools-row' },
    toggle('How pictures are drawn', [['heat', 'Heat map'],
      ['masked', 'Masked'], ['plain', 'Original']], look.mode,
    (mode) => { look.mode = mode; draw(); }),
    tiles && toggle('Which tokens', [['base', 'Base view'], ['tiles', 'Tiles']],
      look.view, (view) => { look.view = view; draw(); }),
    h('span', { class: 'ramp' }, 'faint', h('i', { 'aria-hidden': 'true' }),
      `peak ${fmt.sig(detail.stats.peak_image)}`));
  draw();
  return detail.exemplars.length
    ? [tools, list]
    : [h('p', { class: 'not-run' }, 'This latent fires on no image.')];
}

/** A stretch of text, each token shaded by how much it fires the latent. */
function shaded({ tokens, acts, at }) {
  const top = Math.max(...acts, 1e-9);
  const shown = (token) => token.replace(/\n/g, '⏎');
  return h('p', { class: 'said-text' }, tokens.map((token, i) => {
    if (!(acts[i] > 0)) return shown(token);
    return h('mark', { class: i === at ? 'peak' : null, title: fmt.sig(acts[i]),
      style: `--heat: ${(0.12 + 0.68 * acts[i] / top).toFixed(2)}` },
    shown(token));
  }));
}

function contexts(texts) {
  if (!texts.length) {
    return h('p', { class: 'not-run' }, 'This latent fires on no text token.');
  }
  return h('ul', { class: 'contexts panel' }, texts.map((one) => h('li', null,
    h('span', { class: 'num small soft' }, fmt.sig(one.x)), shaded(one))));
}

function statPanel(detail) {
  const { stats, truth } = detail;
  const pair = (name, value) => h('div', null, h('dt', null, name),
    h('dd', null, value));
  const top = Math.max(...stats.kinds.map(([, n, all]) => n / all), 1e-9);
  return [
    h('dl', { class: 'stats' },
      pair('Fires on images', fmt.percent(stats.images_share)),
      pair('Fires on tokens', fmt.percent(stats.rows_share)),
      pair('Peak', fmt.sig(stats.peak)),
      pair('Mean when firing', fmt.sig(stats.mean)),
      truth && pair('Best concept', truth.concept || '–'),
      truth && pair('F1, A then B',
        `${fmt.num(truth.f1_a)}, ${fmt.num(truth.f1_b)}`),
      truth && pair('Precision on B', fmt.num(truth.precision_b)),
      truth && pair('Firings on objects', fmt.percent(truth.objects))),
    h('h3', { class: 'small soft', style: 'margin-bottom: .5rem' },
      'Share of each kind of token that fires it'),
    h('div', { class: 'kinds' }, stats.kinds.map(([name, n, all]) => [
      h('span', null, fmt.words(name)),
      h('span', { class: 'meter', 'aria-hidden': 'true' },
        h('span', { style: `width: ${(100 * n / all / top).toFixed(1)}%` })),
      h('span', { class: 'num' }, fmt.percent(n / all))])),
  ];
}

function latentCrumbs(layer, row) {
  const { fields } = store.values.get(`layer/${layer}`);
  const rows = grid.rows.includes(row) && grid.state.layer === layer
    ? grid.rows : fields.latent.map((_, i) => i);
  const at = rows.indexOf(row);
  const link = (i, text, key) => i === undefined ? null :
    h('a', { href: latentHref(layer, fields.latent[i]), 'data-step': key }, text);
  return h('nav', { class: 'crumbs', 'aria-label': 'Latents' },
    h('a', { href: grid.drawn || '#/latents', 'data-step': 'up' },
      '← All latents'),
    h('span', null, link(rows[at - 1], 'Previous', 'prev'),
      link(rows[at + 1], 'Next', 'next')));
}

async function showLatent(view, layer, latent) {
  const asked = location.hash;
  const data = layerOf(layer) ? await loadLayer(layer) : null;
  const row = data ? data.fields.latent.indexOf(latent) : -1;
  if (row < 0) {
    show(view, h('h1', { tabindex: '-1' }, 'No such latent'),
      h('p', { class: 'lead' }, 'It is not in this report. ',
        h('a', { href: '#/latents' }, 'See all latents'), '.'));
    return 'No such latent';
  }
  const { fields } = data;
  const [samples, details] = await Promise.all([
    loadSamples(), loadDetail(layer, row)]);
  if (location.hash !== asked) return null; // a later one is being shown
  const detail = details[latent];
  const name = fields.label[row] || run.outcomes[fields.outcome[row]];
  const part = (title, ...nodes) => h('section', { class: 'section' },
    h('h2', null, title), ...nodes);
  show(view,
    latentCrumbs(layer, row),
    h('p', { class: 'eyebrow' }, `Latent ${latent} of layer ${layer}`),
    h('h1', { tabindex: '-1' }, fields.label[row]
      ? `“${fields.label[row]}”` : name),
    h('div', { class: 'title-row badges' }, outcomeBadge(fields.outcome[row]),
      fields.category[row] && h('span', { class: 'badge' }, fields.category[row]),
      flagBadges(fields, row)),
    part('Images that fire it most', ...exemplarList(detail, samples)),
    h('div', { class: 'columns section' },
      h('section', null, h('h2', null, 'What the explainers say'),
        saidBy(detail.explanations)),
      h('section', null, h('h2', null, 'Where it fires'),
        h('div', { class: 'panel pad' }, statPanel(detail)))),
    part('Text that fires it most', contexts(detail.texts)),
    part('What editing it does', detail.steering.length
      ? h('ul', { class: 'cases panel' }, detail.steering.map((one) =>
        steeringCase(one, samples)))
      : notRun('this latent was not steered.')),
    part('Answers it helped to cause', detail.effects.length
      ? h('ul', { class: 'cases panel' }, detail.effects.map((one) =>
        effectCase(one, samples)))
      : h('p', { class: 'not-run' },
        'It is among the top latents of no attributed answer.')));
  return `${name}, latent ${latent}`;
}

function effectCase(one, samples) {
  const image = pictureOf(samples, one.split, one.sample);
  return h('li', { class: image ? null : 'no-picture' },
    image && picture(samples, one.split, one.sample, null, 'plain'),
    h('div', null, h('p', { class: 'prompt' }, one.prompt || 'Prompt not kept'),
      h('p', null, `${one.answer} rather than ${one.baseline}: `,
        h('b', { class: 'num' }, fmt.num(one.effect)),
        known(one.exact) && ` (by ablation ${fmt.num(one.exact)})`,
        h('span', { class: 'soft' }, `, rank ${one.rank}`))));
}
