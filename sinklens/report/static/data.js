// The embedded data and how numbers read. `numbers.py` has the same rules; a test holds the two together.
const run = JSON.parse(document.querySelector('script[type="application/json"]').textContent);
const $ = (selector, inside = document) => inside.querySelector(selector);
const $$ = (selector, inside = document) => Array.from(inside.querySelectorAll(selector));
const LEVELS = 64;

function unpack(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Kind(bytes.buffer);
}

const figures = new Map();
function figure(id) {
  if (!figures.has(id)) {
    const raw = run.figures[id];
    figures.set(id, raw ? opened(raw) : null);
  }
  return figures.get(id);
}

function opened(raw) {
  if (raw.kind === "table") return raw;
  if (raw.kind === "pictures") return { ...raw, pages: raw.pages.map((page) => ({ ...page, grids: page.grids.map(openedGrid) })) };
  if (raw.kind === "heatmap") return { ...raw, values: unpack(raw.values, Float32Array) };
  if (raw.kind === "lines") {
    const series = raw.series.map((s) => ({ name: s.name, x: unpack(s.x, Float64Array), y: unpack(s.y, Float64Array) }));
    return { ...raw, series };
  }
  const samples = {
    ...raw,
    thresholds: unpack(raw.thresholds, Float64Array),
    above: unpack(raw.above, raw.wide ? Uint32Array : Uint16Array),
    valid: unpack(raw.valid, Uint32Array),
  };
  samples.index = samples.thresholds.indexOf(raw.own);
  samples.values = rates(samples, samples.index);
  return samples;
}

function openedGrid(grid) {
  return {
    ...grid,
    positions: unpack(grid.positions, Int32Array),
    values: unpack(grid.values, Float32Array),
    classes: unpack(grid.classes, Int8Array),
  };
}

function rates(samples, index) {
  const n = samples.valid.length;
  return Float32Array.from(samples.valid, (valid, i) => (valid ? (100 * samples.above[index * n + i]) / valid : NaN));
}

function overall(samples, index) {
  const n = samples.valid.length;
  let above = 0;
  let valid = 0;
  for (let i = 0; i < n; i += 1) {
    above += samples.above[index * n + i];
    valid += samples.valid[i];
  }
  return valid ? (100 * above) / valid : NaN;
}

const superscript = (n) => String(n).replace(/[-0-9]/g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);

function whole(value) {
  const size = String(Math.abs(value));
  const grouped = Math.abs(value) >= 10000 ? size.replace(/\B(?=(\d{3})+$)/g, "\u202f") : size;
  return (value < 0 ? "\u2212" : "") + grouped;
}

function number(value, digits = 3) {
  if (Number.isNaN(value)) return "n/a";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "\u2212∞";
  if (value === 0) return "0";
  const sign = value < 0 ? "\u2212" : "";
  const size = Math.abs(value);
  const [mantissa, power] = size.toExponential(digits - 1).split("e");
  const exponent = Number(power);
  if (exponent < -4 || exponent >= 7) return `${sign}${mantissa} × 10${superscript(exponent)}`;
  if (exponent >= digits - 1) return sign + whole(Math.round(size));
  return sign + size.toFixed(digits - 1 - exponent);
}

function brief(value) {
  const [mantissa, power] = number(value).split(" × ");
  const cut = mantissa.includes(".") ? mantissa.replace(/\.?0+$/, "") : mantissa;
  return power === undefined ? cut : `${cut} × ${power}`;
}

function percent(value) {
  if (!Number.isFinite(value)) return number(value);
  if (value === 0 || value === 100) return String(value);
  for (const decimals of [1, 2, 3]) {
    const text = value.toFixed(decimals);
    if (Number(text) !== 0 && Number(text) !== 100) return text.replace("-", "\u2212");
  }
  return value > 50 ? "> 99.999" : "< 0.001";
}

const withUnit = (value, unit) => (unit.startsWith("%") ? `${percent(value)} ${unit}` : `${number(value)} ${unit}`.trim());

function reveal(node) {
  for (let at = node; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
}

function save(name, kind, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
