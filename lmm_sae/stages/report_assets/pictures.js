// Heat maps: `ROWSxCOLS:` and runs, a number for so many cold patches, a letter
// for a warm one, from a, faint, to z, the peak. A capital is lit for the
// explainer or, in a map of prices, counts against the answer.

const LEVELS = 26;
const AGAINST = [70, 130, 235];
const RAMP = [
  [0, 60, 16, 104, 0.4],
  [0.25, 150, 38, 103, 0.55],
  [0.5, 221, 81, 58, 0.62],
  [0.75, 252, 165, 10, 0.68],
  [1, 252, 245, 150, 0.74],
];

function decodeHeat(text) {
  const [shape, runs] = text.split(':');
  const [rows, cols] = shape.split('x').map(Number);
  const levels = new Uint8Array(rows * cols);
  const capital = new Uint8Array(rows * cols);
  let at = 0;
  for (const token of runs.match(/\d+|[a-zA-Z]/g) || []) {
    const code = token.charCodeAt(0);
    if (code < 58) {
      at += Number(token);
      continue;
    }
    capital[at] = code < 97 ? 1 : 0;
    levels[at++] = code % 32;
  }
  return { rows, cols, levels, capital };
}

function rampColour(share) {
  let i = 1;
  while (i < RAMP.length - 1 && share > RAMP[i][0]) i++;
  const [low, high] = [RAMP[i - 1], RAMP[i]];
  const t = (share - low[0]) / (high[0] - low[0]);
  return low.slice(1).map((v, k) => v + t * (high[k + 1] - v));
}

// The paper's mask interpolates the binary map bilinearly and keeps what is
// above zero, which dilates it; the exact one repeats each patch.
function litMask(heat, style) {
  const { rows, cols, capital } = heat;
  if (style !== 'paper') {
    return { rows, cols, on: (y, x) => capital[y * cols + x] };
  }
  const fine = 8;
  const near = (at, size) => {
    const place = (at + 0.5) / fine - 0.5;
    const low = Math.floor(place);
    const both = place === low ? [low] : [low, low + 1];
    return both.map((v) => Math.min(Math.max(v, 0), size - 1));
  };
  const on = (y, x) => near(y, rows).some((r) =>
    near(x, cols).some((c) => capital[r * cols + c]));
  return { rows: rows * fine, cols: cols * fine, on };
}

function paint(canvas, text, mode) {
  const heat = decodeHeat(text);
  const mask = mode === 'masked' ? litMask(heat, run.style) : heat;
  canvas.width = mask.cols;
  canvas.height = mask.rows;
  const context = canvas.getContext('2d');
  const pixels = context.createImageData(mask.cols, mask.rows);
  for (let y = 0, i = 0; y < mask.rows; y++) {
    for (let x = 0; x < mask.cols; x++, i += 4) {
      if (mode === 'masked') {
        pixels.data[i + 3] = mask.on(y, x) ? 0 : 224; // 12% of the brightness
        continue;
      }
      const place = y * heat.cols + x;
      const share = heat.levels[place] / LEVELS;
      if (!share) continue;
      const [r, g, b, a] = mode === 'priced' && heat.capital[place]
        ? [...AGAINST, 0.75 * share] : rampColour(share);
      pixels.data.set([r, g, b, a * 255], i);
    }
  }
  context.putImageData(pixels, 0, 0);
}

/** The picture of a sample: {name, alt}, or null where none was kept. */
function pictureOf(samples, split, sample) {
  const one = (samples[split] || {})[sample];
  return one ? { src: `img/${one[0]}`, alt: one[1] } : null;
}

/**
 * An image with its heat map.
 *
 * @param {string} mode `masked` (as the explainer saw it), `heat`, `priced`
 *   (what spoke for an answer, and in blue against it) or `plain`.
 */
function picture(samples, split, sample, heat, mode, spoken = true) {
  const one = pictureOf(samples, split, sample);
  if (!one) {
    return h('span', { class: 'pic', role: 'img',
      'aria-label': `Sample ${sample} has no picture` });
  }
  const said = { masked: ', dimmed where the latent is silent',
    heat: ', with its heat map', plain: '',
    priced: ', with what spoke for the answer' };
  const box = h('span', { class: `pic ${heat ? mode : 'plain'}` },
    h('img', { src: one.src, loading: 'lazy', decoding: 'async',
      alt: spoken ? one.alt + (heat ? said[mode] : '') : '' }));
  if (heat && mode !== 'plain') {
    const canvas = h('canvas', { 'aria-hidden': 'true' });
    paint(canvas, heat, mode);
    box.append(canvas);
  }
  return box;
}
