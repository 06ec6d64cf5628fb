// Thresholds of a finding moved in the page: the analyzer's rule once more, on what it read, and its sentence. Numbers are
// compared in the precision in which the analyzer compares them; tests hold every sentence equal to the analyzer's.
const KINDS = { u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array, f8: Float64Array };

// Digits of |x| without rounding, and where the point stands in them.
function expansion(x) {
  const [digits, exponent] = Math.abs(x).toExponential(100).split("e");
  return { digits: digits.replace(".", ""), point: Number(exponent) + 1 };
}

// The first digits, rounded; exact halves go to the even digit, as in the analyzer's language.
function rounded(digits, count) {
  const kept = count > 0 ? digits.slice(0, count) : "0";
  const rest = count > 0 ? digits.slice(count) : "0".repeat(-count) + digits;
  const half = "5".padEnd(rest.length, "0");
  const up = rest > half || (rest === half && Number(kept.at(-1)) % 2 === 1);
  return up ? String(BigInt(kept) + 1n).padStart(kept.length, "0") : kept;
}

function fixed(x, decimals) {
  const { digits, point } = expansion(x);
  const all = rounded(digits, point + decimals).padStart(decimals + 1, "0");
  const text = decimals ? `${all.slice(0, -decimals)}.${all.slice(-decimals)}` : all;
  return x < 0 ? `-${text}` : text;
}

function general(x, count) {
  if (x === 0) return "0";
  if (!Number.isFinite(x)) return x > 0 ? "inf" : x < 0 ? "-inf" : "nan";
  const { digits, point } = expansion(x);
  let kept = rounded(digits, count);
  const exponent = point - 1 + (kept.length - count);
  kept = kept.slice(0, count);
  const cut = (text) => (text.includes(".") ? text.replace(/\.?0*$/, "") : text);
  let text;
  if (exponent < -4 || exponent >= count) {
    const power = String(Math.abs(exponent)).padStart(2, "0");
    text = `${cut(`${kept[0]}.${kept.slice(1)}`)}e${exponent < 0 ? "-" : "+"}${power}`;
  } else if (exponent < 0) text = cut(`0.${"0".repeat(-exponent - 1)}${kept}`);
  else text = cut(`${kept.slice(0, exponent + 1)}.${kept.slice(exponent + 1)}`);
  return x < 0 ? `-${text}` : text;
}

// The sum in numpy's order: eight at a time, halves of more than 128.
function pairwise(values, from = 0, count = values.length) {
  if (count < 8) {
    let sum = 0;
    for (let i = 0; i < count; i += 1) sum += values[from + i];
    return sum;
  }
  if (count <= 128) {
    const parts = Array.from({ length: 8 }, (_, i) => values[from + i]);
    let i = 8;
    for (; i < count - (count % 8); i += 8) for (let j = 0; j < 8; j += 1) parts[j] += values[from + i + j];
    let sum = parts[0] + parts[1] + (parts[2] + parts[3]) + (parts[4] + parts[5] + (parts[6] + parts[7]));
    for (; i < count; i += 1) sum += values[from + i];
    return sum;
  }
  let half = Math.floor(count / 2);
  half -= half % 8;
  return pairwise(values, from, half) + pairwise(values, from + half, count - half);
}

const meanOf = (values) => pairwise(values) / values.length;
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
const layersOf = (first, last) => (first === last ? `layer ${first}` : `layers ${first} to ${last}`);

function percentileOf(values, percent) {
  const sorted = Float64Array.from(values).sort();
  const place = (sorted.length - 1) * (percent / 100);
  const low = Math.floor(place);
  const [a, b, part] = [sorted[low], sorted[Math.min(low + 1, sorted.length - 1)], place - low];
  return part < 0.5 ? a + (b - a) * part : b - (b - a) * (1 - part);
}

function massive({ arrays: a, facts, words }, { absolute, relative }) {
  const [floor, times] = [Math.fround(absolute), Math.fround(relative)];
  const hits = new Map();
  for (let i = 0; i < a.value.length; i += 1) {
    const size = Math.abs(a.value[i]);
    const least = Math.fround(times * a.median[i]);
    if (!(size > floor && (facts.strict ? size > least : size >= least))) continue;
    const key = `${a.layer[i]} ${a.position[i]} ${a.dim[i]}`;
    if (!hits.has(key)) hits.set(key, []);
    hits.get(key).push(i);
  }
  const holders = (position) => a.length.reduce((n, length) => n + (length > position ? 1 : 0), 0);
  const rows = [];
  for (const at of hits.values()) {
    const [i] = at;
    if (at.length < Math.max(1, facts.min_prompts * holders(a.position[i]))) continue;
    const value = meanOf(at.map((j) => a.value[j]));
    const ratio = meanOf(at.map((j) => Math.fround(Math.abs(a.value[j]) / a.median[j])));
    rows.push({ layer: a.layer[i], position: a.position[i], dim: a.dim[i], value, ratio, word: words[a.word[i]] });
  }
  if (!rows.length) return { found: false, count: "no row", text: facts.otherwise };
  rows.sort((x, y) => Math.abs(y.value) - Math.abs(x.value) || x.layer - y.layer || x.position - y.position || x.dim - y.dim);
  const [top] = rows;
  const same = rows.filter((row) => row.position === top.position && row.dim === top.dim);
  const dims = [...new Set(rows.map((row) => row.dim))].sort((x, y) => x - y);
  const layers = rows.map((row) => row.layer);
  const listed = dims.slice(0, 6).join(", ") + (dims.length > 6 ? ", ..." : "");
  const text = `${plural(dims.length, "massive dim")} (${listed}) in ${layersOf(Math.min(...layers), Math.max(...layers))}; `
    + `the largest is ${general(top.value, 4)} on position ${top.position} (${top.word}), ${fixed(top.ratio, 0)} times the `
    + `median, written at layer ${Math.min(...same.map((row) => row.layer))}.`;
  return { found: true, count: plural(rows.length, "row"), text };
}

function superExperts({ arrays: a, facts, words }, { percentile, fraction }) {
  const sizes = Array.from(a.size);
  const largest = sizes.reduce((x, y) => Math.max(x, y), -Infinity);
  const cut = facts.code ? Math.floor(largest / 10) : fraction * largest;
  const floor = facts.floor * percentileOf(sizes, 50);
  const many = sizes.length >= facts.least;
  const beyond = many || facts.code ? percentileOf(sizes, percentile) : -Infinity;
  const order = sizes.map((_, i) => i).sort((x, y) => sizes[y] - sizes[x] || a.layer[x] - a.layer[y] || a.expert[x] - a.expert[y]);
  const chosen = order.filter((i) => sizes[i] > cut && sizes[i] >= floor && sizes[i] > beyond && (!(facts.formation || !many) || a.spike[i]));
  if (!chosen.length) return { found: false, count: "no row", text: facts.otherwise };
  const name = (i) => (a.kind[i] === 0 ? `L${a.layer[i]}E${a.expert[i]}` : `L${a.layer[i]} ${facts.kinds[a.kind[i]]}`);
  const listed = chosen.slice(0, 6).map((i) => `${name(i)} (${general(sizes[i], 4)})`).join(", ");
  const more = chosen.length > 6 ? ` and ${chosen.length - 6} more` : "";
  const key = chosen.filter((i) => a.kind[i] === 0).map((i) => `${a.layer[i]} ${a.expert[i]}`).sort().join();
  const effect = facts.effects.find(([pairs]) => pairs.map((pair) => pair.join(" ")).sort().join() === key);
  const [top] = chosen;
  const text = `${plural(chosen.length, "Super Expert")} among ${facts.seen} routed experts: ${listed}${more}; `
    + `${chosen.length === 1 ? "it" : "the strongest"} writes dim ${a.dim[top]} on position ${a.position[top]} `
    + `(${words[a.word[top]]}).${effect ? effect[chosen.length === 1 ? 1 : 2] : ""}${facts.carrier}`;
  return { found: true, count: plural(chosen.length, "row"), text };
}

function visualSinks({ arrays: a, facts }, { tau }) {
  const cut = tau <= Math.sqrt(facts.hidden) ? tau : Math.sqrt(facts.energy * facts.hidden);
  const limit = Math.fround(cut);
  const tokens = a.prompt.length;
  const layers = a.phi.length / tokens;
  const is = (layer, token) => {
    const value = a.phi[layer * tokens + token];
    return (facts.code ? value > limit : value >= limit) && !(facts.code && layer < 2);
  };
  const counts = Array.from({ length: layers }, (_, layer) => {
    let n = 0;
    for (let token = 0; token < tokens; token += 1) if (is(layer, token)) n += 1;
    return n;
  });
  let sinks = 0;
  for (let token = 0; token < tokens; token += 1) if (counts.some((_, layer) => is(layer, token))) sinks += 1;
  const most = counts.indexOf(Math.max(...counts));
  const pictures = plural(facts.pictures, "picture");
  const per = counts[most] / facts.pictures;
  const count = plural(sinks, "row");
  if (!sinks) {
    const text = `No visual sink: none of the ${tokens} visual tokens of ${pictures} reaches φ = ${general(cut, 3)} in any `
      + `layer; the largest is ${general(facts.largest, 3)} (layer ${facts.largest_layer}). ${facts.where}`;
    return { found: false, count: "no row", text };
  }
  if (facts.by_chance >= facts.beyond) {
    const text = `No visual sink beyond chance: ${general(per, 3)} per picture in layer ${most} have a φ of at least `
      + `${general(cut, 3)}, but the largest is ${general(facts.largest, 3)}, and of as many normal random states of this `
      + `width ${general(facts.by_chance, 2)} would have that. ${facts.where}`;
    return { found: false, count, text };
  }
  const held = a.received.length ? heldBy(a, tokens, most, is) : null;
  const attention = held === null ? "" : ` and hold ${fixed(100 * held, 1)} % of the attention on the pictures`;
  const known = counts.map((n, layer) => (n ? layer : -1)).filter((layer) => layer >= 0);
  const text = `${plural(sinks, "visual sink")} in ${pictures} (${layersOf(known[0], known.at(-1))}); most in layer ${most}, `
    + `where ${general(per, 3)} per picture are ${general((100 * counts[most]) / tokens, 2)} % of the visual `
    + `tokens${attention}. ${facts.where}`;
  return { found: true, count, text };
}

// Part of the attention on visual tokens that the sinks of a layer receive, mean over prompts that have any.
function heldBy(a, tokens, layer, is) {
  const parts = [];
  let from = 0;
  while (from < tokens) {
    let to = from;
    while (to < tokens && a.prompt[to] === a.prompt[from]) to += 1;
    const all = Array.from({ length: to - from }, (_, i) => from + i);
    const sum = (places) => pairwise(places.map((token) => a.received[layer * tokens + token]));
    const total = sum(all);
    if (total > 0) parts.push(sum(all.filter((token) => is(layer, token))) / total);
    from = to;
  }
  return parts.length ? meanOf(parts) : null;
}

const RULES = { "massive-activations": massive, "super-experts": superExperts, "visual-sinks": visualSinks };

// The run's main sentence, put together from what every moved threshold says.
const mainVerdict = { nodes: $$(".says .sentence, #trust > .lead"), base: null, told: new Map() };
mainVerdict.own = mainVerdict.nodes.length ? mainVerdict.nodes[0].textContent : "";

function tellMain() {
  if (document.body.classList.contains("untrusted")) return;
  let text = mainVerdict.base === null ? mainVerdict.own : mainVerdict.base;
  for (const { lead, result, headline } of mainVerdict.told.values()) {
    if (text.includes(lead)) text = text.replace(lead, () => result.text);
    else if (result.found && headline) text = `${text} ${result.text}`;
  }
  for (const node of mainVerdict.nodes) node.textContent = text;
  for (const node of mainVerdict.nodes) if (node.matches(".sentence")) node.classList.toggle("long", Array.from(text).length > 200);
}

const unpacked = (arrays) =>
  Object.fromEntries(Object.entries(arrays).map(([key, { kind, data }]) => [key, unpack(data, KINDS[kind])]));

function watchThresholds(form) {
  const name = form.dataset.for;
  const raw = (run.adjustable || {})[name];
  if (!raw || !RULES[raw.rule]) return;
  const arrays = unpacked(raw.arrays);
  const inputs = $$("input", form);
  const section = form.closest("section");
  const lead = $(".lead", section);
  const line = $$(".first .lines li").find((item) => item.dataset.finding === name);
  const own = { lead: lead.textContent, line: line && line.lastChild.textContent };

  const show = () => {
    const changed = inputs.some((input) => input.value !== input.defaultValue);
    const bad = inputs.find((input) => input.value === "" || !input.validity.valid);
    const result = changed && !bad ? RULES[raw.rule]({ ...raw, arrays }, Object.fromEntries(inputs.map((i) => [i.name, Number(i.value)]))) : null;
    const text = result ? result.text : own.lead;
    lead.textContent = text;
    if (line) line.lastChild.textContent = result ? ` ${text}` : own.line;
    mainVerdict.told.delete(name);
    if (result) mainVerdict.told.set(name, { lead: own.lead, result, headline: raw.headline });
    tellMain();
    for (const node of [lead, line]) if (node) node.classList.toggle("moved", Boolean(result));
    const limits = bad ? `From ${brief(Number(bad.min))}${bad.max ? ` to ${brief(Number(bad.max))}` : " on"}.` : "";
    $("output", form).textContent = bad ? limits : result ? `${result.count} at these thresholds; table and figures show the run's own.` : "";
  };
  for (const input of inputs) input.addEventListener("input", show);
  $(".reset", form).addEventListener("click", () => {
    for (const input of inputs) input.value = input.defaultValue;
    show();
  });
}

for (const form of $$(".thresholds")) watchThresholds(form);
