// Values under the pointer, and one cursor that all layer-by-head maps share.
const NS = "http://www.w3.org/2000/svg";
const cursor = { layer: -1, head: -1 };

function box(svg) {
  const [x, y, width, height] = svg.dataset.plot.split(" ").map(Number);
  return { x, y, width, height };
}

function inside(svg, event) {
  const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const plot = box(svg);
  const x = (place.x - plot.x) / plot.width;
  const y = (place.y - plot.y) / plot.height;
  return x >= 0 && x < 1 && y >= 0 && y < 1 ? { x, y } : null;
}

function outputs(svg) {
  const holder = svg.closest("figure");
  return holder ? $$("output.readout", holder) : [];
}

function say(svg, text) {
  for (const output of outputs(svg)) output.textContent = text;
}

function cellText(fig, row, column) {
  const value = fig.values[row * fig.shape[1] + column];
  const shown = Number.isNaN(value) ? "no value" : withUnit(value, fig.unit);
  return `${fig.labels[0]} ${row}, ${fig.labels[1]} ${column}: ${shown}`;
}

function ring(svg, row, column) {
  const fig = figure(svg.dataset.fig);
  let mark = $(".cursor", svg);
  if (!mark) {
    mark = document.createElementNS(NS, "rect");
    mark.setAttribute("class", "cursor");
    svg.append(mark);
  }
  const plot = box(svg);
  const width = plot.width / fig.shape[1];
  const height = plot.height / fig.shape[0];
  const size = { x: plot.x + column * width - 1, y: plot.y + row * height - 1, width: width + 2, height: height + 2 };
  for (const [name, value] of Object.entries(size)) mark.setAttribute(name, value.toFixed(2));
}

function moveTo(layer, head, keep = true) {
  const maps = $$("svg.heat[data-linked]").filter((svg) => figure(svg.dataset.fig));
  if (!maps.length) return;
  const [layers, heads] = figure(maps[0].dataset.fig).shape;
  cursor.layer = Math.min(Math.max(layer, 0), layers - 1);
  cursor.head = Math.min(Math.max(head, 0), heads - 1);
  for (const svg of maps) {
    const fig = figure(svg.dataset.fig);
    if (cursor.layer >= fig.shape[0] || cursor.head >= fig.shape[1]) continue;
    ring(svg, cursor.layer, cursor.head);
    say(svg, cellText(fig, cursor.layer, cursor.head));
  }
  if (picked.open) showHead(picked.prompt, picked.token, false);
  if (keep) remember();
}

function watchMap(svg) {
  const fig = figure(svg.dataset.fig);
  if (!fig) return;
  const at = (event) => {
    const place = inside(svg, event);
    return place && { row: Math.floor(place.y * fig.shape[0]), column: Math.floor(place.x * fig.shape[1]) };
  };
  svg.addEventListener("pointermove", (event) => {
    const cell = at(event);
    if (!cell) return;
    say(svg, cellText(fig, cell.row, cell.column));
    ring(svg, cell.row, cell.column);
  });
  svg.addEventListener("pointerleave", () => {
    if (svg.dataset.linked && cursor.layer >= 0) moveTo(cursor.layer, cursor.head, false);
  });
  svg.addEventListener("click", (event) => {
    const cell = at(event);
    if (cell && svg.dataset.linked) {
      moveTo(cell.row, cell.column);
      openHead();
    }
  });
}

function nearest(xs, x) {
  let best = -1;
  for (let i = 0; i < xs.length; i += 1) if (best < 0 || Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
  return best;
}

function watchCurves(svg) {
  const fig = figure(svg.dataset.fig);
  if (!fig || fig.kind !== "lines") return;
  const [low, high] = svg.dataset.x.split(" ").map(Number);
  const line = document.createElementNS(NS, "path");
  line.setAttribute("class", "cross");
  svg.append(line);
  svg.addEventListener("pointermove", (event) => {
    const place = inside(svg, event);
    if (!place) return;
    const wanted = low + place.x * (high - low);
    const all = fig.series.map((s) => ({ s, i: nearest(s.x, wanted) })).filter(({ i }) => i >= 0);
    if (!all.length) return;
    const x = all[0].s.x[all[0].i];
    const plot = box(svg);
    const px = plot.x + (plot.width * (x - low)) / (high - low || 1);
    line.setAttribute("d", `M${px.toFixed(1)} ${plot.y}v${plot.height}`);
    const values = all.map(({ s, i }) => `${s.name ? `${s.name} ` : ""}${number(s.y[i])}`);
    say(svg, `${fig.labels[0]} ${Number.isInteger(x) ? x : number(x)}: ${values.join(" · ")}`);
  });
  svg.addEventListener("pointerleave", () => line.removeAttribute("d"));
}

function paint(svg, fig) {
  const plot = box(svg);
  const [rows, columns] = fig.shape;
  const [low, high] = fig.limits;
  const commands = Array.from({ length: LEVELS }, () => []);
  for (let y = 0; y < rows; y += 1) {
    for (let x = 0; x < columns; x += 1) {
      const value = fig.values[y * columns + x];
      if (Number.isNaN(value)) continue;
      const level = Math.floor(((value - low) / (high - low)) * LEVELS);
      commands[Math.min(Math.max(level, 0), LEVELS - 1)].push(`M${x} ${y}h1v1h-1z`);
    }
  }
  const cells = $(".cells", svg);
  cells.setAttribute("transform", `translate(${plot.x} ${plot.y}) scale(${plot.width / columns} ${plot.height / rows})`);
  cells.setAttribute("shape-rendering", "crispEdges");
  cells.replaceChildren(
    ...commands.flatMap((parts, level) => {
      if (!parts.length) return [];
      const path = document.createElementNS(NS, "path");
      path.setAttribute("class", `q${level}`);
      path.setAttribute("d", parts.join(""));
      return [path];
    }),
  );
}

for (const svg of $$("svg.heat")) watchMap(svg);
for (const svg of $$("svg.curves")) watchCurves(svg);
