// Steering, causes, feelings, mistakes.

function editWords(one) {
  const dose = one.mode === 'ablate' ? 'ablated'
    : `${one.mode} ${+one.dose.toFixed(2)}${one.unit === 'peak' ? '× peak' : ''}`;
  return `${dose}, ${one.where} tokens`;
}

function steeringCase(one, samples) {
  const image = pictureOf(samples, one.split, one.sample);
  const control = one.control ? ` (${one.control} latent)` : '';
  const answer = (name, text) => h('div', null, h('dt', null, name),
    h('dd', null, text ? marked(text, one.target) :
      h('span', { class: 'soft' }, 'nothing')));
  return h('li', { class: image ? null : 'no-picture' },
    image && picture(samples, one.split, one.sample, null, 'plain'),
    h('div', null,
      h('p', { class: 'prompt' }, one.prompt),
      h('p', { class: 'small soft' },
        one.latents.map((latent, i) => [i ? ', ' : '',
          h('a', { href: latentHref(one.layer, latent) }, `#${latent}`)]),
        `${control} ${editWords(one)}`,
        one.target && `, towards “${one.target}”`),
      h('dl', { class: 'answers' }, answer('Plain', one.plain),
        answer('SAE, no edit', one.sae), answer('Edited', one.edited))));
}

const rateText = (figure) => figure && known(figure.value)
  ? [h('b', null, fmt.percent(figure.value)),
    figure.ci && h('span', { class: 'soft small' },
      ` ${fmt.percent(figure.ci[0])} to ${fmt.percent(figure.ci[1])}`)]
  : '–';

function flipTable(study) {
  const row = (one, kind) => h('tr', { class: kind },
    h('th', { scope: 'row' }, one.target || 'All'),
    h('td', null, known(one.latent)
      ? h('a', { href: latentHref(study.layer, one.latent) }, `#${one.latent}`)
      : ''),
    h('td', { class: 'num' }, rateText(one.figure)),
    h('td', { class: 'num' }, rateText(one.random)),
    h('td', { class: 'num right' }, one.figure ? fmt.int(one.figure.n) : '–'));
  return h('div', { class: 'panel scroll', tabindex: '0', role: 'region',
    'aria-label': `Flip rates, ${study.name}` },
  h('table', null,
    h('thead', null, h('tr', null,
      ['Target', 'Latent', 'Flipped on B', 'Random latent'].map((name) =>
        h('th', { scope: 'col' }, name)),
      h('th', { scope: 'col', class: 'right' }, 'n'))),
    h('tbody', null, study.rows.map((one) => row(one, null)),
      study.total && row(study.total, 'total'))));
}

function studyCases(study, samples) {
  const targets = [...new Set(study.cases.map((one) => one.target))];
  const box = h('div');
  const state = { target: '', control: 'chosen' };
  const draw = () => {
    const some = study.cases.filter((one) =>
      (!state.target || one.target === state.target) &&
      (state.control === 'all' || !one.control === (state.control === 'chosen')));
    box.replaceChildren(h('div', { class: 'panel' }, some.length
      ? paged(h('ul', { class: 'cases' }), some,
        (one) => steeringCase(one, samples), 8)
      : h('p', { class: 'empty' }, 'No such case.')));
  };
  draw();
  return [
    h('div', { class: 'tools-row', style: 'margin-top: 1.1rem' },
      targets.length > 1 && h('label', { class: 'field' }, 'Target',
        h('select', { onchange(event) {
          state.target = event.target.value;
          draw();
        } }, h('option', { value: '' }, 'all'), targets.map((target) =>
          h('option', { value: target }, target)))),
      study.cases.some((one) => one.control) && toggle('Which latents',
        [['chosen', 'Chosen latents'], ['random', 'Random latents']],
        state.control, (control) => { state.control = control; draw(); })),
    box];
}

async function showSteering(view) {
  const data = await store.load('steering', 'steering.js');
  const samples = await loadSamples();
  show(view,
    h('h1', { tabindex: '-1' }, 'Steering'),
    h('p', { class: 'lead' }, 'A latent is set to a value while the subject ' +
      'reads, and the subject answers. Doses are chosen on half A; what is ' +
      'claimed is counted on half B, beside random live latents at the same ' +
      'dose and place.'),
    ...(data.studies.length ? [] : [notRun('there is no steering.jsonl yet; ' +
      'lmm-sae steer writes it.')]),
    ...data.studies.map((study) => h('section', { class: 'section' },
      h('h2', null, `${fmt.words(study.name)}` +
        (run.layers.length > 1 ? `, layer ${study.layer}` : '')),
      study.how && h('p', null, study.how),
      (study.curves.length > 0 || study.rows.length > 0) &&
        h('div', { class: 'study' },
          study.curves.length > 0 && h('div', { class: 'panel pad' },
            h('h3', null, 'Dose and effect, half A'),
            h('p', { class: 'small soft' }, 'Thin lines: one target each.' +
              (known(study.chosen)
                ? ` Dotted: the dose that was fixed, ${study.chosen}×.` : '')),
            h('div', { style: 'margin-top: .8rem' }, doseCurves(study)),
            doseTable(study)),
          study.rows.length > 0 && flipTable(study)),
      studyCases(study, samples))));
  return 'Steering';
}

const FIRST = 8; // latents shown of an answer before the rest is asked for

/** The strongest latents of an answer; the others behind a summary. */
function effectList(latents, layer) {
  const rest = latents.slice(FIRST);
  const scale = latents.slice(0, FIRST);
  return [effectBars(scale, layer, scale), rest.length > 0 &&
    h('details', { class: 'numbers' },
      h('summary', null, `${rest.length} more`),
      effectBars(rest, layer, scale))];
}

function effectBars(latents, layer, scale) {
  const top = Math.max(...scale.flatMap((one) =>
    [Math.abs(one.effect), Math.abs(one.exact || 0)]), 1e-9);
  const place = (value) => 50 + 50 * value / top;
  return h('div', { class: 'effects' }, latents.map((one) => {
    const [from, to] = [50, place(one.effect)].sort((a, b) => a - b);
    return h('div', { class: 'effect' },
      h('span', null, h('a', { href: latentHref(layer, one.latent) },
        one.name || `#${one.latent}`)),
      h('span', { class: 'track', 'aria-hidden': 'true' },
        h('i', { class: one.effect < 0 ? 'against' : null,
          style: `left: ${from.toFixed(1)}%; width: ${(to - from).toFixed(1)}%` }),
        known(one.exact) && h('b', { style:
          `left: calc(${place(one.exact).toFixed(1)}% - 1px)` })),
      h('span', { class: 'num' }, fmt.num(one.effect),
        known(one.exact) && h('span', { class: 'only-spoken' },
          `, by ablation ${fmt.num(one.exact)}`)));
  }));
}

/** Words with how much each spoke for the answer. */
function heatWords(words) {
  const top = Math.max(...words.map(([, value]) => Math.abs(value)), 1e-9);
  return h('p', { class: 'small heat-words' }, words.map(([word, value]) =>
    h('mark', { class: value < 0 ? 'against' : null, title: fmt.num(value, 3),
      style: `--heat: ${(0.75 * Math.abs(value) / top).toFixed(2)}` }, word)));
}

function causeCase(one, samples) {
  const image = pictureOf(samples, one.split, one.sample);
  return h('li', { class: image ? null : 'no-picture' },
    image && h('div', { class: 'pair' },
      picture(samples, one.split, one.sample, null, 'plain'),
      one.heat && picture(samples, one.split, one.sample, one.heat, 'priced')),
    h('div', null,
      h('p', { class: 'prompt' }, one.prompt || 'Prompt not kept'),
      h('p', null, one.text && h('span', null, `“${one.text}” `),
        known(one.correct) && h('span', { class: 'badge' },
          one.correct ? 'right' : one.target
            ? `wrong, it is ${one.target}` : 'wrong')),
      h('p', { class: 'small soft' },
        `“${one.answer}” rather than “${one.baseline}”`),
      one.words.length > 0 && heatWords(one.words),
      effectList(one.latents, one.layer)));
}

async function showCauses(view) {
  const data = await store.load('causes', 'causes.js');
  const samples = await loadSamples();
  const box = h('div');
  const draw = (which) => {
    const some = data.cases.filter((one) => which === 'all' ||
      one.correct === (which === 'right'));
    box.replaceChildren(h('div', { class: 'panel' }, some.length
      ? paged(h('ul', { class: 'cases' }), some,
        (one) => causeCase(one, samples), 10)
      : h('p', { class: 'empty' }, 'No such answer.')));
  };
  if (data.cases.length) draw('all');
  show(view,
    h('h1', { tabindex: '-1' }, 'Causes of answers'),
    h('p', { class: 'lead' }, 'One forward and one backward pass price every ' +
      'latent at once for the answer against its runner-up; the top ones are ' +
      'then ablated for real.'),
    data.cases.length > 0 && h('ul', { class: 'keys', style:
      'margin-top: 1rem' },
    h('li', { class: 'keys-item' }, h('i', { class: 'swatch for' }),
      'speaks for the answer'),
    h('li', { class: 'keys-item' }, h('i', { class: 'swatch against' }),
      'speaks against it'),
    h('li', { class: 'keys-item' }, h('i', { class: 'swatch tick' }),
      'what ablating the latent took away')),
    ...(data.cases.length ? [
      h('div', { class: 'tools-row', style: 'margin-top: 1.5rem' },
        data.cases.some((one) => one.correct === false) &&
        toggle('Which answers', [['all', 'All answers'], ['right', 'Right'],
          ['wrong', 'Wrong']], 'all', draw)), box]
      : [notRun('there is no attributions.jsonl yet; lmm-sae attribute ' +
        'writes it.')]));
  return 'Causes of answers';
}
