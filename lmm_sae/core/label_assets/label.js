// The page of `lmm-sae label`: one case at a time. All text from the server is
// set as text, never as markup.
'use strict';

const at = (id) => document.getElementById(id);
let rater = new URLSearchParams(location.search).get('rater') || '';
let open = null; // the case on the page
let busy = false;

async function post(path, body = {}) {
  const headers = { 'Content-Type': 'application/json' };
  const token = decodeURIComponent(location.hash.slice(1));
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(`/api/${path}`, {
    method: 'POST',
    headers,
    body: JSON.stringify({ rater, ...body }),
  });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

// One request at a time: a key held down answers once.
async function ask(path, body, then) {
  if (busy) return;
  busy = true;
  try {
    then(await post(path, body));
    at('message').textContent = '';
  } catch (error) {
    at('message').textContent = `${error.message}. Nothing is lost: try again.`;
  }
  busy = false;
}

function marked(item, text) {
  for (const [i, part] of text.split(/<<|>>(?!>)/).entries()) {
    const node = document.createElement(i % 2 ? 'mark' : 'span');
    node.textContent = part;
    item.append(node);
  }
}

function draw(found) {
  if (found.raters) return choose(found.raters);
  open = found;
  rater = found.rater;
  at('names').hidden = true;
  at('case').hidden = Boolean(found.done);
  at('done').hidden = !found.done;
  at('progress').textContent = `${found.number} of ${found.total}`;
  at('bar').max = found.total;
  at('bar').value = found.number;
  if (found.done) return at('back').focus();
  const texts = found.texts.length > 0;
  at('question').textContent = texts
    ? 'What do the marked words have in common?'
    : 'What do the bright regions have in common?';
  at('heat').hidden = texts;
  heat(false);
  at('texts').replaceChildren(...found.texts.map((text) => {
    const item = document.createElement('li');
    marked(item, text);
    return item;
  }));
  at('own').value = '';
  at('rate').hidden = true;
  at('words').hidden = false;
  if (found.label !== undefined) reveal(found);
  else at('own').focus();
}

function choose(names) {
  at('names').hidden = false;
  at('raters').replaceChildren(...names.map((name) => {
    const button = document.createElement('button');
    button.textContent = name;
    button.addEventListener('click', () => { rater = name; ask('case', {}, draw); });
    return button;
  }));
}

function reveal(found) {
  at('words').hidden = true;
  at('rate').hidden = false;
  at('label').textContent = found.label;
  at('said').textContent = found.own ? `You said: ${found.own}` : '';
  at('label').focus();
}

function heat(on) {
  at('heat').setAttribute('aria-pressed', String(on));
  at('images').replaceChildren(...open.images.map((one, i) => {
    const image = document.createElement('img');
    image.src = on ? one.heat : one.seen;
    image.alt = `exemplar ${i + 1}${on ? ', with its heat map' : ''}`;
    return image;
  }));
}

const isRating = () => open && !open.done && !at('rate').hidden;
const answer = (value) =>
  isRating() && ask('answer', { number: open.number, answer: value }, draw);
const undo = () => open && ask('undo', {}, draw);
const toggle = () =>
  open && !open.done && heat(at('heat').getAttribute('aria-pressed') !== 'true');

at('words').addEventListener('submit', (event) => {
  event.preventDefault();
  ask('label', { number: open.number, own: at('own').value }, reveal);
});
for (const button of document.querySelectorAll('[data-answer]')) {
  button.addEventListener('click', () => answer(button.dataset.answer));
}
at('heat').addEventListener('click', toggle);
at('undo').addEventListener('click', undo);
at('back').addEventListener('click', undo);
document.addEventListener('keydown', (event) => {
  const typing = event.target.tagName === 'INPUT';
  if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const keys = { 1: 'fits', 2: 'partly', 3: 'no' };
  if (keys[event.key]) answer(keys[event.key]);
  else if (event.key === 'z') undo();
  else if (event.key === 'h') toggle();
});
ask('case', {}, draw);
