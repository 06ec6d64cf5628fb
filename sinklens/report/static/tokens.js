// The token viewer: complete prompts on demand, what a token is, and search.
const store = run.tokens;
const sinkPositions = new Set(
  (((run.document.findings || {})["primary-sinks"] || {}).rows || []).map((row) => row.position).filter(Number.isInteger),
);
const opened_ = new Map();

function words(place) {
  if (!opened_.has(place)) {
    const packed = store && store.items[place];
    opened_.set(place, packed ? unpack(packed, Uint32Array) : null);
  }
  return opened_.get(place);
}

function complete(holder) {
  const all = words(holder.dataset.prompt);
  if (!all || holder.childElementCount === all.length) return;
  const made = [];
  for (let i = holder.childElementCount; i < all.length; i += 1) {
    const piece = document.createElement("bdi");
    piece.textContent = store.words[all[i]][1];
    if (sinkPositions.has(i)) piece.className = "sink";
    made.push(piece);
  }
  holder.append(...made);
  const rest = $(".rest", holder.parentElement);
  if (rest) rest.remove();
}

for (const holder of $$(".tokens")) {
  holder.parentElement.addEventListener("toggle", () => complete(holder));
  holder.addEventListener("pointerover", (event) => {
    const piece = event.target.closest("bdi");
    const all = words(holder.dataset.prompt);
    if (!piece || !all) return;
    const position = Array.prototype.indexOf.call(holder.children, piece);
    const id = store.words[all[position]][0];
    $("#token-readout").textContent = `position ${position}${id >= 0 ? `, id ${id}` : ""}`;
  });
}

const find = $("#find");
let hits = [];
let hit = -1;

function search() {
  const wanted = find.value;
  for (const piece of $$(".tokens .hit")) piece.classList.remove("hit", "now");
  hits = [];
  hit = -1;
  if (wanted && store) {
    const lower = wanted.toLowerCase();
    const matching = new Set(store.words.flatMap(([, text], i) => (text.toLowerCase().includes(lower) ? [i] : [])));
    for (const place of Object.keys(store.items)) {
      words(place).forEach((word, position) => { if (matching.has(word)) hits.push([place, position]); });
    }
  }
  const many = hits.length === 1 ? "1 token" : `${whole(hits.length)} tokens`;
  $("#found").textContent = wanted ? many : "";
}

function nextHit() {
  if (!hits.length) return;
  const before = $(".tokens .now");
  if (before) before.classList.remove("now");
  hit = (hit + 1) % hits.length;
  const [place, position] = hits[hit];
  const holder = $(`.tokens[data-prompt="${place}"]`);
  reveal(holder);
  complete(holder);
  for (const [p, i] of hits) if (p === place) holder.children[i].classList.add("hit");
  holder.children[position].classList.add("now");
  holder.children[position].scrollIntoView({ block: "center" });
  $("#found").textContent = `${whole(hit + 1)} of ${whole(hits.length)}`;
}

if (find) {
  find.addEventListener("input", search);
  find.addEventListener("keydown", (event) => { if (event.key === "Enter") nextHit(); });
  $("#find-next").addEventListener("click", nextHit);
}
