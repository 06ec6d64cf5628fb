// From a cell of a map to its head, to the tokens of a prompt, to the prompt. The address holds all of it: #L17H3P0T5.
const headView = $("#head-view");
const strips = new Map();
const picked = { open: false, prompt: -1, token: -1 };
const LONGEST = 2000;

function strip(place) {
  const raw = run.heads && run.heads.items[place];
  if (raw && !strips.has(place)) {
    const positions = unpack(raw.positions, Uint32Array);
    strips.set(place, { positions, received: unpack(raw.received, Float32Array), at: new Map(Array.from(positions, (p, i) => [p, i])) });
  }
  return strips.get(place);
}

const hasHeads = () => Boolean(headView && run.heads && run.heads.places.length);

function headValue(position) {
  const { received, positions, at } = strip(picked.prompt);
  if (!at.has(position)) return NaN;
  return received[(cursor.layer * run.heads.shape[1] + cursor.head) * positions.length + at.get(position)];
}

function address() {
  const cell = `#L${cursor.layer}H${cursor.head}`;
  if (!picked.open) return cell;
  return `${cell}P${picked.prompt}${picked.token >= 0 ? `T${picked.token}` : ""}`;
}

function remember() {
  history.replaceState(null, "", address());
}

const tokenText = (position) => {
  const all = store && words(String(picked.prompt));
  return all ? store.words[all[position]][1] : String(position);
};

function shownPositions() {
  const { positions } = strip(picked.prompt);
  const length = run.heads.lengths[picked.prompt];
  return length <= LONGEST ? Array.from({ length }, (_, i) => i) : Array.from(positions);
}

function drawStrip() {
  const holder = $(".strip", headView);
  let before = -1;
  const made = shownPositions().flatMap((position) => {
    const node = document.createElement("span");
    const value = headValue(position);
    node.dataset.position = position;
    node.className = Number.isNaN(value) ? "token unknown" : "token";
    const piece = document.createElement("bdi");
    piece.textContent = tokenText(position);
    const bar = document.createElement("i");
    bar.style.height = `${Number.isNaN(value) ? 0 : (28 * value).toFixed(2)}px`;
    node.append(bar, piece);
    const gap = position > before + 1 ? [document.createTextNode(" … ")] : [];
    before = position;
    return [...gap, node];
  });
  holder.replaceChildren(...made);
}

function drawFacts() {
  $(".title", headView).textContent = `Layer ${cursor.layer}, head ${cursor.head}`;
  const facts = new Map();
  for (const svg of $$("svg.heat[data-linked]")) {
    const fig = figure(svg.dataset.fig);
    if (!fig || cursor.layer >= fig.shape[0] || cursor.head >= fig.shape[1]) continue;
    const title = $("h2, h3", svg.closest("figure"));
    const value = fig.values[cursor.layer * fig.shape[1] + cursor.head];
    facts.set(title ? title.textContent : fig.labels.join(" by "), Number.isNaN(value) ? "no value" : withUnit(value, fig.unit));
  }
  const pairs = Array.from(facts, ([name, value]) => {
    const pair = document.createElement("div");
    for (const [tag, text] of [["dt", name], ["dd", value]]) {
      const part = document.createElement(tag);
      part.textContent = text;
      pair.append(part);
    }
    return pair;
  });
  $(".of-head", headView).replaceChildren(...pairs);
}

function pickToken(position, keep = true) {
  picked.token = position;
  for (const node of $$(".strip .now", headView)) node.classList.remove("now");
  const node = position >= 0 && $(`.strip [data-position="${position}"]`, headView);
  const output = $("output", headView);
  if (node) {
    node.classList.add("now");
    node.scrollIntoView({ block: "nearest", inline: "nearest" });
    const value = headValue(position);
    const known = Number.isNaN(value) ? "not among the positions kept" : `receives ${number(value)} of this head's attention`;
    output.textContent = `Position ${position}, ${tokenText(position)}: ${known}.`;
  } else output.textContent = "Point at a token, or press Tab and the arrow keys.";
  $(".to-prompt", headView).hidden = !node || !store || !$(`.tokens[data-prompt="${picked.prompt}"]`);
  if (keep) remember();
}

function showHead(prompt, token = -1, keep = true) {
  if (!hasHeads() || cursor.layer < 0) return false;
  const inside = cursor.layer < run.heads.shape[0] && cursor.head < run.heads.shape[1];
  if (!inside) return false;
  picked.open = true;
  picked.prompt = run.heads.places.includes(prompt) ? prompt : run.heads.places[0];
  headView.hidden = false;
  $("select", headView).value = String(picked.prompt);
  drawFacts();
  drawStrip();
  pickToken(token < run.heads.lengths[picked.prompt] ? token : -1, keep);
  return true;
}

function openHead() {
  if (showHead(picked.prompt, picked.token)) headView.scrollIntoView({ block: "nearest" });
}

function closeHead() {
  if (!picked.open) return;
  picked.open = false;
  headView.hidden = true;
  remember();
}

// Tokens from the most attended on, round and round.
function nextStrongest() {
  const { positions } = strip(picked.prompt);
  const order = Array.from(positions).filter((p) => !Number.isNaN(headValue(p))).sort((a, b) => headValue(b) - headValue(a) || a - b);
  if (order.length) pickToken(order[(order.indexOf(picked.token) + 1) % order.length]);
}

function toPrompt() {
  const holder = $(`.tokens[data-prompt="${picked.prompt}"]`);
  if (!holder || picked.token < 0) return;
  reveal(holder);
  complete(holder);
  for (const node of $$(".tokens .now")) node.classList.remove("now");
  holder.children[picked.token].classList.add("now");
  holder.children[picked.token].scrollIntoView({ block: "center" });
}

if (hasHeads()) {
  const choice = $("select", headView);
  for (const place of run.heads.places) {
    const option = document.createElement("option");
    option.value = place;
    option.textContent = run.heads.names[place];
    choice.append(option);
  }
  choice.addEventListener("change", () => showHead(Number(choice.value)));
  $(".close", headView).addEventListener("click", closeHead);
  $(".strongest", headView).addEventListener("click", nextStrongest);
  $(".to-prompt", headView).addEventListener("click", (event) => { event.preventDefault(); toPrompt(); });
  const holder = $(".strip", headView);
  const pointed = (event) => event.target.closest("[data-position]");
  holder.addEventListener("click", (event) => { if (pointed(event)) pickToken(Number(pointed(event).dataset.position)); });
  holder.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const all = $$("[data-position]", holder).map((node) => Number(node.dataset.position));
    const at = all.indexOf(picked.token);
    const other = (way) => {
      const { places } = run.heads;
      showHead(places[(places.indexOf(picked.prompt) + way + places.length) % places.length]);
    };
    const moves = {
      ArrowRight: () => pickToken(all[Math.min(at + 1, all.length - 1)]),
      ArrowLeft: () => pickToken(all[Math.max(at - 1, 0)]),
      Home: () => pickToken(all[0]),
      End: () => pickToken(all.at(-1)),
      s: nextStrongest,
      PageDown: () => other(1),
      PageUp: () => other(-1),
      Enter: toPrompt,
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    moves[event.key]();
  });
}
