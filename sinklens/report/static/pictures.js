// Patches of pictures: one cursor per group of maps, moved by pointer or arrow keys; the pager; maps flipped in place.
const cellNumber = (value, unit) => (Number.isNaN(value) ? "no value" : withUnit(value, unit));

function patchText(fig, page, places, at) {
  const grid = page.grids[at.grid];
  const cell = at.row * grid.shape[1] + at.col;
  const position = grid.positions[cell];
  const size = grid.shape[0] * grid.shape[1];
  const words = [`${places.length > 1 ? `tile ${places.indexOf(at.grid)}, ` : ""}row ${at.row}, column ${at.col}`];
  words.push(position < 0 ? "no token" : `token ${position}`);
  if (position >= 0) fig.quantities.forEach((q, i) => words.push(`${q.title} ${cellNumber(grid.values[i * size + cell], q.unit)}`));
  if (grid.classes[cell] >= 0) words.push(fig.classes[grid.classes[cell]]);
  return words.join(" · ");
}

function cellAt(page, places, x, y) {
  for (const place of places) {
    const { box: [left, top, right, bottom], shape: [rows, cols] } = page.grids[place];
    const col = Math.floor(((x - left) / (right - left)) * cols);
    const row = Math.floor(((y - top) / (bottom - top)) * rows);
    if (row >= 0 && row < rows && col >= 0 && col < cols) return { grid: place, row, col };
  }
  return null;
}

function cellSize(grid) {
  const [left, top, right, bottom] = grid.box;
  return { width: (right - left) / grid.shape[1], height: (bottom - top) / grid.shape[0] };
}

// One step in a direction: the next cell of the grid, else the cell of another tile that lies there.
function stepped(page, places, at, down, right) {
  const grid = page.grids[at.grid];
  const [row, col] = [at.row + down, at.col + right];
  if (row >= 0 && row < grid.shape[0] && col >= 0 && col < grid.shape[1]) return { ...at, row, col };
  const { width, height } = cellSize(grid);
  const middle = { x: grid.box[0] + (at.col + 0.5) * width, y: grid.box[1] + (at.row + 0.5) * height };
  return cellAt(page, places, middle.x + right * 0.51 * width, middle.y + down * 0.51 * height)
    || cellAt(page, places, middle.x + right * width, middle.y + down * height) || at;
}

// The next cell of the first class, in reading order, round and round.
function nextSink(page, places, at, way) {
  const all = places.flatMap((grid) => Array.from(page.grids[grid].classes, (kind, cell) => ({ grid, cell, kind })));
  const cols = (grid) => page.grids[grid].shape[1];
  let start = all.findIndex((one) => at && one.grid === at.grid && one.cell === at.row * cols(at.grid) + at.col);
  if (start < 0) start = way > 0 ? -1 : 0;
  for (let i = 1; i <= all.length; i += 1) {
    const one = all[(((start + way * i) % all.length) + all.length) % all.length];
    if (one.kind === 0) return { grid: one.grid, row: Math.floor(one.cell / cols(one.grid)), col: one.cell % cols(one.grid) };
  }
  return at;
}

function frameCell(svg, page, at) {
  const [left, top, scale] = svg.dataset.frame.split(" ").map(Number);
  const grid = page.grids[at.grid];
  const { width, height } = cellSize(grid);
  const shape = {
    x: 1 + (grid.box[0] + at.col * width - left) * scale - 1,
    y: 1 + (grid.box[1] + at.row * height - top) * scale - 1,
    width: width * scale + 2,
    height: height * scale + 2,
  };
  for (const name of ["cursor-halo", "cursor"]) {
    let mark = $(`.${name}`, svg);
    if (!mark) {
      mark = document.createElementNS(NS, "rect");
      mark.setAttribute("class", name);
      svg.append(mark);
    }
    for (const [key, value] of Object.entries(shape)) mark.setAttribute(key, value.toFixed(2));
  }
}

function showTip(album, event, text) {
  let tip = $(".tip", album);
  if (!tip) {
    tip = document.createElement("div");
    tip.className = "tip";
    tip.setAttribute("aria-hidden", "true");
    album.append(tip);
  }
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const frame = album.getBoundingClientRect();
  const x = Math.min(event.clientX - frame.left + 14, frame.width - Math.min(300, tip.offsetWidth) - 4);
  tip.style.left = `${Math.max(0, x)}px`;
  tip.style.top = `${event.clientY - frame.top + 18}px`;
}

function watchPatches(panels) {
  const holder = panels.closest("details.picture");
  const fig = figure(holder.dataset.fig);
  const maps = $$("svg.patches", panels);
  if (!fig || !maps.length) return;
  const page = fig.pages[Number(holder.dataset.page)];
  const places = maps[0].dataset.grids.split(" ").map(Number);
  const album = panels.closest(".album");
  const output = $("output.readout", panels.parentElement);
  let at = null;
  const go = (next) => {
    if (!next) return;
    at = next;
    for (const svg of maps) frameCell(svg, page, at);
    output.textContent = patchText(fig, page, places, at);
  };
  for (const svg of maps) {
    const [left, top, scale] = svg.dataset.frame.split(" ").map(Number);
    svg.addEventListener("pointermove", (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const cell = cellAt(page, places, left + (place.x - 1) / scale, top + (place.y - 1) / scale);
      go(cell);
      showTip(album, event, cell && patchText(fig, page, places, cell));
    });
    svg.addEventListener("pointerleave", (event) => showTip(album, event, ""));
  }
  const first = () => ({ grid: places[0], row: 0, col: 0 });
  const moves = {
    ArrowUp: () => (at ? stepped(page, places, at, -1, 0) : first()),
    ArrowDown: () => (at ? stepped(page, places, at, 1, 0) : first()),
    ArrowLeft: () => (at ? stepped(page, places, at, 0, -1) : first()),
    ArrowRight: () => (at ? stepped(page, places, at, 0, 1) : first()),
    Home: () => ({ ...(at || first()), col: 0 }),
    End: () => ({ ...(at || first()), col: page.grids[(at || first()).grid].shape[1] - 1 }),
    s: () => nextSink(page, places, at, 1),
    S: () => nextSink(page, places, at, -1),
  };
  panels.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (moves[event.key]) go(moves[event.key]());
    else if (event.key === "PageDown" || event.key === "PageUp") turnPage(album, event.key === "PageDown" ? 1 : -1, true);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  panels.addEventListener("focus", () => go(at || first()));
}

function turnPage(album, way, keep = false) {
  const pages = $$("details.picture", album);
  const now = Math.max(0, pages.findIndex((page) => page.open));
  const next = Math.min(Math.max(now + way, 0), pages.length - 1);
  showPage(album, next);
  if (keep) $(".panels[tabindex]", pages[next]).focus();
}

function showPage(album, number) {
  const pages = $$("details.picture", album);
  pages.forEach((page, i) => { page.open = i === number; });
  const where = $(".pager .where", album);
  if (!where) return;
  where.textContent = `Picture ${number + 1} of ${pages.length}`;
  $(".pager .back", album).disabled = number === 0;
  $(".pager .on", album).disabled = number === pages.length - 1;
}

function watchFlip(bar) {
  const buttons = $$("button", bar);
  const panels = $$(".panel[data-flip]", bar.parentElement).filter((panel) => panel.dataset.flip === bar.dataset.flip);
  buttons.forEach((button, chosen) => button.addEventListener("click", () => {
    buttons.forEach((other, i) => other.setAttribute("aria-pressed", String(i === chosen)));
    panels.forEach((panel, i) => { panel.hidden = chosen > 0 && i !== chosen - 1; });
  }));
}

function picturesCsv(fig) {
  const columns = ["prompt", "picture", "view", "grid", "row", "column", "token", "class", ...fig.quantities.map((q) => q.title)];
  const rows = fig.pages.flatMap((page) => page.grids.flatMap((grid, place) => Array.from(grid.positions, (position, cell) => {
    const values = fig.quantities.map((_, i) => grid.values[i * grid.positions.length + cell]);
    const known = [page.prompt, page.picture, grid.view, place, Math.floor(cell / grid.shape[1]), cell % grid.shape[1], position];
    return [...known, fig.classes[grid.classes[cell]] ?? null, ...values.map((value) => (Number.isNaN(value) ? null : value))];
  })));
  return csv(columns, rows);
}

for (const album of $$(".album")) {
  if ($(".pager", album)) {
    showPage(album, 0);
    $(".pager .back", album).addEventListener("click", () => turnPage(album, -1));
    $(".pager .on", album).addEventListener("click", () => turnPage(album, 1));
  }
  for (const panels of $$(".panels[data-group]", album)) watchPatches(panels);
  for (const bar of $$(".flip", album)) watchFlip(bar);
  const strength = $(".strength", album);
  if (strength) strength.addEventListener("input", () => album.style.setProperty("--strength", strength.value / 100));
}
