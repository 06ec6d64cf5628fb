// The threshold slider: the rate is recounted from the counts per threshold, exactly as the run would have done.
const sliders = new Map();
for (const slider of $$(".slider")) {
  const fig = figure(slider.dataset.fig);
  const input = $("input", slider);
  const holder = slider.closest("figure");
  if (!fig || !input) continue;

  const show = (index) => {
    const own = index === Number(input.defaultValue);
    input.setAttribute("aria-valuetext", brief(fig.thresholds[index]));
    fig.values = rates(fig, index);
    $(".at", slider).textContent = `At threshold ${brief(fig.thresholds[index])} the rate is ${percent(overall(fig, index))} %.`;
    $("output", slider).textContent = own ? "this run" : brief(fig.thresholds[index]);
    const map = $("svg.heat", holder);
    paint(map, fig);
    const means = $(".means", map);
    if (means) means.style.display = own ? "" : "none";
    if (cursor.layer >= 0) moveTo(cursor.layer, cursor.head, false);
    const curve = $("svg.curves", holder);
    if (curve) moveMark(curve, fig.thresholds[index]);
  };
  input.setAttribute("aria-valuetext", brief(fig.thresholds[Number(input.value)]));
  sliders.set(slider.dataset.fig, { fig, input, show, reset: $(".reset", slider) });
  input.addEventListener("input", () => show(Number(input.value)));
  $(".reset", slider).addEventListener("click", () => {
    input.value = input.defaultValue;
    show(Number(input.defaultValue));
  });
}

function moveMark(curve, x) {
  const [low, high] = curve.dataset.x.split(" ").map(Number);
  const plot = box(curve);
  let line = $(".cross", curve);
  if (!line) {
    line = document.createElementNS(NS, "path");
    line.setAttribute("class", "cross");
    curve.append(line);
  }
  line.setAttribute("d", `M${(plot.x + (plot.width * (x - low)) / (high - low || 1)).toFixed(1)} ${plot.y}v${plot.height}`);
}
