// Epsilon of the primary sinks: one value for the whole page, with a handle on the first screen, one in the section and one at
// the map of the rate. The run was judged at every value, so what is shown here was said there.
function watchEpsilon(name, raw) {
  const { facts } = raw;
  const at = unpacked(raw.arrays);
  const handles = $$(".epsilon").filter((node) => node.dataset.for === name);
  const section = handles.map((node) => node.closest(".part")).find(Boolean);
  if (!section) return;
  const slider = sliders.get(`${section.id}--${facts.figure}`);
  const linked = slider && slider.fig.thresholds.length === at.epsilon.length && slider.fig.thresholds.every((x, i) => x === at.epsilon[i]);
  const inputs = [...handles.map((node) => $("input", node)), ...(linked ? [slider.input] : [])];
  const resets = [...handles.map((node) => $(".reset", node)), ...(linked ? [slider.reset] : [])];
  const tiles = facts.tiles.map((label) => $$(".tile").find((tile) => {
    const link = $(".name a", tile);
    return link && link.hash === `#${section.id}` && link.textContent === label;
  }));
  const untrusted = document.body.classList.contains("untrusted");
  const said = (key, i) => facts.texts[at[key][i]];

  const show = (index) => {
    const own = index === facts.own;
    const epsilon = `ε = ${general(at.epsilon[index], 6)}`;
    const run = `this run: ${general(at.epsilon[facts.own], 6)}`;
    if (linked) slider.show(index);
    for (const input of inputs) {
      input.value = index;
      input.setAttribute("aria-valuetext", epsilon);
    }
    for (const node of handles) $("output", node).textContent = own ? run : `${epsilon} (${run})`;
    const lead = $(".lead", section);
    lead.textContent = said("verdict", index);
    lead.classList.toggle("moved", !own);
    tellNotes(section, said("notes", index));
    tiles.forEach((tile, i) => {
      if (!tile) return;
      const place = index * facts.tiles.length + i;
      tellTile(tile, facts.texts[at.tile_value[place]], facts.texts[at.tile_note[place]], untrusted);
      tile.classList.toggle("moved", !own);
    });
    if (untrusted) return;
    mainVerdict.base = own ? null : said("main", index);
    tellMain();
    tellStatus(said("status", index), said("rule", index), own ? "" : `shown at ${epsilon}, ${run}`);
  };
  for (const input of inputs) input.addEventListener("input", () => show(Number(input.value)));
  for (const button of resets) button.addEventListener("click", () => show(facts.own));
  for (const input of inputs) input.setAttribute("aria-valuetext", `ε = ${general(at.epsilon[facts.own], 6)}`);
}

// The verdict's sign, words, class and rule; the mark says that the page no longer shows the run's own threshold.
function tellStatus(status, rule, mark) {
  const box = $("section.verdict");
  for (const known of ["sink", "no-sink"]) box.classList.toggle(known, known === status);
  box.classList.toggle("moved", Boolean(mark));
  const sign = $(".sign svg", box);
  const full = $(".sign-full", sign);
  if (full && status !== "sink") full.remove();
  if (!full && status === "sink") {
    const circle = document.createElementNS(NS, "circle");
    for (const [key, value] of Object.entries({ cx: 20, cy: 20, r: 9, class: "sign-full" })) circle.setAttribute(key, value);
    sign.append(circle);
  }
  const kind = $(".kind", box);
  kind.textContent = run.headlines[status] || status;
  if (mark) {
    const shown = document.createElement("span");
    shown.className = "elsewhere";
    shown.textContent = mark;
    kind.append(" ", shown);
  }
  $(".says", box).title = `Rule ${rule}`;
  const worded = $("#trust > .caption code");
  if (worded) worded.textContent = rule;
}

function tellTile(tile, value, note, untrusted) {
  const letters = Array.from(value.split(/\s+/).filter(Boolean).join(" "));
  const text = letters.length <= 40 ? letters.join("") : `${letters.slice(0, 39).join("").trimEnd()}…`;
  $(".value bdi", tile).textContent = text;
  $(".value", tile).classList.toggle("long", Array.from(text).length > 12);
  $(".note", tile).textContent = untrusted ? `Not trustworthy${note ? ": " : "."}${note}` : note;
}

function tellNotes(section, joined) {
  let list = $(":scope > .notes", section);
  if (!list) {
    if (!joined) return;
    list = document.createElement("ul");
    list.className = "notes";
    $(":scope > .epsilon", section).after(list);
  }
  list.replaceChildren(...joined.split("\n").filter(Boolean).map((note) => {
    const item = document.createElement("li");
    item.textContent = note;
    return item;
  }));
  list.hidden = !joined;
}

for (const [name, raw] of Object.entries(run.adjustable || {})) if (raw.rule === "primary-sinks") watchEpsilon(name, raw);
