// Inline SVG: a dot with its interval beside its baselines, and dose curves.

const at = (value, [low, high]) =>
  `${(100 * Math.min(Math.max((value - low) / (high - low), 0), 1)).toFixed(2)}%`;

const SHAPES = {
  diamond: 'M-5 0 0-5 5 0 0 5z',
  square: 'M-4-4h8v8h-8z',
  triangle: 'M0-5 5 4H-5z',
};

const end = (value) =>
  Number.isInteger(value) ? fmt.int(value) : fmt.num(value, 1);

/**
 * A line from one end of the domain to the other, with dots on it.
 *
 * @param plot {domain, points: [{value, ci, mark}]}; mark `dot` is the run,
 *   `circle` and those of SHAPES are baselines. The numbers stand beside it as text.
 */
function intervalPlot(plot) {
  const y = 9;
  const node = s('svg', { class: 'plot', 'aria-hidden': 'true' },
    s('line', { class: 'axis', x1: '0', x2: '100%', y1: y, y2: y }),
    s('text', { class: 'end', x: '0', y: y + 16 }, end(plot.domain[0])),
    s('text', { class: 'end', x: '100%', y: y + 16, 'text-anchor': 'end' },
      end(plot.domain[1])));
  const order = [...plot.points].reverse(); // the run's dot on top
  for (const { value, ci, mark } of order) {
    if (!ci) continue;
    node.append(s('line', { class: mark === 'dot' ? 'ci-line' : 'ci-base',
      x1: at(ci[0], plot.domain), x2: at(ci[1], plot.domain), y1: y, y2: y }));
  }
  for (const { value, mark } of order) {
    const x = at(value, plot.domain);
    if (SHAPES[mark]) {
      const holder = s('svg', { x, y, overflow: 'visible' });
      holder.append(s('path', { class: 'dot-base', d: SHAPES[mark] }));
      node.append(holder);
    } else {
      node.append(s('circle', { cx: x, cy: y, r: mark === 'dot' ? 6 : 4.5,
        class: mark === 'dot' ? 'dot' : 'dot-base' }));
    }
  }
  return node;
}

/**
 * Share of answers that name the target, against the dose.
 *
 * @param study {doses, curves: [{target, points}], mean, control, chosen}; a
 *   point is [dose, share, n]. Other words: {about, axis, tick, names}.
 */
function doseCurves(study) {
  const [width, height] = [520, 270];
  const [left, right, top, bottom] = [50, 112, 12, 46];
  const doses = study.doses;
  const [low, high] = [Math.min(...doses), Math.max(...doses)];
  const x = (dose) => left + (width - left - right) *
    (high > low ? (dose - low) / (high - low) : 0.5);
  const y = (share) => top + (height - top - bottom) * (1 - share);
  const line = (points) => points.map(([dose, share], i) =>
    `${i ? 'L' : 'M'}${x(dose).toFixed(1)} ${y(share).toFixed(1)}`).join('');
  const title = study.about ||
    `Share of answers that name the target, by dose, ${study.name}`;
  const node = s('svg', { class: 'curve', viewBox: `0 0 ${width} ${height}`,
    role: 'img', 'aria-label': `${title}. The numbers are in the table below.` });
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    node.append(
      s('line', { class: 'grid', x1: left, x2: width - right, y1: y(share),
        y2: y(share) }),
      s('text', { class: 'tick', x: left - 8, y: y(share) + 4,
        'text-anchor': 'end' }, `${share * 100}%`));
  }
  for (const dose of doses) {
    node.append(s('text', { class: 'tick', x: x(dose), y: height - bottom + 20,
      'text-anchor': 'middle' }, `${dose}${study.tick ?? '×'}`));
  }
  node.append(s('text', { class: 'tick', x: (left + width - right) / 2,
    y: height - 4, 'text-anchor': 'middle' }, study.axis || `dose, in ${study.unit}`));
  if (known(study.chosen)) {
    node.append(s('line', { class: 'chosen', x1: x(study.chosen),
      x2: x(study.chosen), y1: top, y2: height - bottom }));
  }
  for (const { target, points } of study.curves) {
    node.append(s('path', { d: line(points) }, s('title', null, target)));
  }
  const ends = [];
  const [first, second] = study.names || ['mean', 'random latent'];
  for (const [name, points, kind] of [[first, study.mean, 'mean'],
    [second, study.control, 'control']]) {
    if (!points || !points.length) continue;
    node.append(s('path', { class: kind, d: line(points) }));
    const [, share] = points[points.length - 1];
    ends.push([name, y(share) + 4]);
  }
  if (ends.length === 2 && Math.abs(ends[0][1] - ends[1][1]) < 15) {
    ends[1][1] = ends[0][1] + 15;
  }
  for (const [name, where] of ends) {
    node.append(s('text', { class: 'name', x: width - right + 9, y: where },
      name));
  }
  return node;
}

/** The numbers behind dose curves, for whoever prefers them. */
function doseTable(study) {
  const cells = (points) => study.doses.map((dose) => {
    const point = points.find(([one]) => one === dose);
    return h('td', { class: 'right' }, point ? fmt.percent(point[1]) : '–');
  });
  const rows = [...study.curves.map((curve) => [curve.target, curve.points])];
  if (study.mean) rows.push(['mean', study.mean]);
  if (study.control && study.control.length) {
    rows.push(['random latent', study.control]);
  }
  return h('details', { class: 'numbers' },
    h('summary', null, 'The numbers'),
    h('div', { class: 'scroll', tabindex: '0', role: 'region',
      'aria-label': `Dose table, ${study.name}` },
    h('table', null,
      h('thead', null, h('tr', null, h('th', { scope: 'col' }, 'Target'),
        study.doses.map((dose) =>
          h('th', { scope: 'col', class: 'right' }, `${dose}×`)))),
      h('tbody', null, rows.map(([name, points]) => h('tr', null,
        h('th', { scope: 'row' }, name), cells(points)))))));
}
