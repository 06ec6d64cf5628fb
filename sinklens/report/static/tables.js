// Thresholds on table rows, downloads, and copy buttons.
for (const filter of $$(".filter:not(.thresholds, .epsilon)")) {
  const table = $$(".table").find((t) => t.dataset.table === filter.dataset.for);
  const [value, ratio] = $$("input", filter);
  const rows = table ? $$("tr[data-value]", table) : [];

  const apply = () => {
    let shown = 0;
    for (const row of rows) {
      const passes = Number(row.dataset.value) > (Number(value.value) || 0) && Number(row.dataset.ratio) >= (Number(ratio.value) || 0);
      row.hidden = !passes;
      shown += passes ? 1 : 0;
    }
    const changed = value.value !== value.defaultValue || ratio.value !== ratio.defaultValue;
    const lower = Number(value.value) < Number(value.defaultValue) || Number(ratio.value) < Number(ratio.defaultValue);
    $("output", filter).textContent =
      (changed ? `${shown} of ${rows.length} rows pass.` : "") +
      (lower ? " Rows below the run's own thresholds were not recorded." : "");
  };
  for (const input of [value, ratio]) input.addEventListener("input", apply);
  $(".reset", filter).addEventListener("click", () => {
    for (const input of [value, ratio]) input.value = input.defaultValue;
    apply();
  });
}

function csvField(value) {
  if (value === null || value === undefined) return "";
  let text = typeof value === "object" ? JSON.stringify(value) : String(value);
  if (typeof value === "string" && value.length > 1 && "=+-@\t\r".includes(value[0])) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv(keys, rows) {
  return [keys, ...rows].map((row) => row.map(csvField).join(",")).join("\r\n") + "\r\n";
}

// What a table shows: a finding, or, on a page of several runs, the numbers of all findings.
const shownIn = (name) => (run.document.findings ? run.document.findings[name] : { rows: run.document.summaries });

function findingCsv(name) {
  const { rows } = shownIn(name);
  const keys = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  return csv(keys, rows.map((row) => keys.map((key) => row[key])));
}

function figureCsv(id) {
  const fig = figure(id);
  if (fig.kind === "table") return csv(fig.columns, fig.rows);
  if (fig.kind === "pictures") return picturesCsv(fig);
  if (fig.kind === "lines") {
    const rows = fig.series.flatMap((s) => Array.from(s.x, (x, i) => [s.name, x, Number.isNaN(s.y[i]) ? null : s.y[i]]));
    return csv(["series", ...fig.labels], rows);
  }
  const columns = fig.shape[1];
  const rows = Array.from(fig.values, (v, i) => [Math.floor(i / columns), i % columns, Number.isNaN(v) ? null : v]);
  return csv([...fig.labels, fig.unit], rows);
}

for (const button of $$("[data-csv]")) {
  const name = button.dataset.csv;
  button.addEventListener("click", () => save(`${name}.csv`, "text/csv", findingCsv(name)));
}
for (const button of $$("[data-values]")) {
  const id = button.dataset.values;
  if (!run.figures[id]) button.remove();
  else button.addEventListener("click", () => save(`${id}.csv`, "text/csv", figureCsv(id)));
}
for (const button of $$("[data-json]")) {
  const name = button.dataset.json;
  const data = name ? shownIn(name) : run.document;
  button.addEventListener("click", () => save(`${name || button.dataset.file || "summary"}.json`, "application/json", JSON.stringify(data, null, 1)));
}

function selectText(node) {
  const range = document.createRange();
  range.selectNodeContents(node);
  const selection = getSelection();
  selection.removeAllRanges();
  selection.addRange(range);
}

for (const button of $$("[data-copy]")) {
  const label = button.textContent;
  const answer = (text) => {
    button.textContent = text;
    setTimeout(() => { button.textContent = label; }, 1800);
  };
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      answer("Copied");
    } catch {
      selectText(source);
      answer(document.execCommand("copy") ? "Copied" : "Selected: press Ctrl+C");
    }
  });
}
