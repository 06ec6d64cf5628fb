// Theme, keys, help and addresses such as #L17H3.
const root = document.documentElement;
root.classList.add("scripted");

const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);

function remembered(value) {
  try {
    if (value) localStorage.setItem("sinklens-theme", value);
    return localStorage.getItem("sinklens-theme");
  } catch {
    return null; // pages opened from a file may have no storage
  }
}

function turn() {
  root.dataset.theme = dark() ? "light" : "dark";
  remembered(root.dataset.theme);
}

if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
$("#theme").addEventListener("click", turn);

const help = $("#help");
if (help) {
  $("#open-help").addEventListener("click", () => help.showModal());
  $("#close-help").addEventListener("click", () => help.close());
}

const keys = {
  j: () => moveTo(cursor.layer + 1, Math.max(cursor.head, 0)),
  k: () => moveTo(cursor.layer - 1, Math.max(cursor.head, 0)),
  l: () => moveTo(Math.max(cursor.layer, 0), cursor.head + 1),
  h: () => moveTo(Math.max(cursor.layer, 0), cursor.head - 1),
  Enter: openHead,
  Escape: closeHead,
  t: turn,
  "?": () => { if (help) help.showModal(); },
  "/": () => { if (find) { $("#prompts").scrollIntoView(); find.focus(); } },
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, [contenteditable]");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || (help && help.open) || !keys[event.key]) return;
  if (event.key === "Enter" && (cursor.layer < 0 || event.target.closest("a, button, summary"))) return;
  event.preventDefault();
  keys[event.key]();
});

function follow() {
  const cell = /^#L(\d+)H(\d+)(?:P(\d+)(?:T(\d+))?)?$/.exec(location.hash);
  if (cell) {
    const [layer, head, prompt, token] = cell.slice(1).map((part) => (part === undefined ? -1 : Number(part)));
    moveTo(layer, head, false);
    if (prompt >= 0 && showHead(prompt, token, false)) headView.scrollIntoView({ block: "nearest" });
    else if ($("#map")) $("#map").scrollIntoView({ block: "nearest" });
    return;
  }
  let target = null;
  try {
    target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  } catch {
    return; // not an address of ours
  }
  if (target) reveal(target);
}

addEventListener("hashchange", follow);
follow();
