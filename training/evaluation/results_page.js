const chosen = { row: data.rows[0], benchmark: "", subset: "", kind: "", verdict: "misses" };

const percent = (value) => (value === null ? "-" : (100 * value).toFixed(1));
const verdictOf = (given) =>
  given.error ? "failed" : given.score === null ? "unscored" : given.score === 1 ? "hit" : given.score > 0 ? "part" : "miss";
const isMiss = (given) => given.score !== 1 && given.score !== null;

function showHead() {
  make(document.body, "h1", "", data.title);
  const facts = make(document.body, "p", "facts");
  for (const text of data.facts) make(facts, "span", "", text);
  const table = make(make(document.body, "div", "wide"), "table", "cells");
  const head = make(table, "tr");
  make(head, "th", "", "score % (kept blocks %)");
  for (const benchmark of data.benchmarks) make(head, "th", "", benchmark);
  for (const row of data.rows) {
    const line = make(table, "tr");
    make(line, "th", "", row);
    for (const benchmark of data.benchmarks) {
      const cell = data.cells.find((one) => one.row === row && one.benchmark === benchmark);
      const place = make(line, "td");
      if (!cell) continue;
      const button = make(place, "button", "cell", `${percent(cell.score)} (${percent(cell.retain_ratio)})`);
      button.title = `${cell.num} records, ${cell.num_failed} failed`;
      button.dataset.row = row;
      button.dataset.benchmark = benchmark;
      button.addEventListener("click", () => choose({ row, benchmark, subset: "" }));
    }
  }
}

function choose(change) {
  Object.assign(chosen, change);
  show();
}

function addFilter(bar, name, title, options) {
  const label = make(bar, "label", "", title + " ");
  const select = make(label, "select");
  select.id = name;
  for (const [value, text] of options) make(select, "option", "", text).value = value;
  select.addEventListener("change", () => choose({ [name]: select.value }));
}

function showFilters() {
  const bar = make(document.body, "div", "bar");
  const all = (key) => [...new Set(data.records.map((record) => record[key]).filter(Boolean))].sort();
  const any = (key) => [["", "all"], ...all(key).map((name) => [name, name])];
  addFilter(bar, "row", "answers of", data.rows.map((row) => [row, row]));
  addFilter(bar, "benchmark", "benchmark", any("benchmark"));
  addFilter(bar, "subset", "subset", any("subset"));
  addFilter(bar, "kind", "kind", any("kind"));
  addFilter(bar, "verdict", "show", [["misses", "misses"], ["hits", "hits"], ["", "misses, then others"]]);
  make(bar, "span", "count").id = "count";
  make(document.body, "main").id = "records";
}

function show() {
  for (const [name, value] of Object.entries(chosen)) document.getElementById(name).value = value;
  for (const button of document.querySelectorAll("button.cell")) {
    const isThis = button.dataset.row === chosen.row && button.dataset.benchmark === chosen.benchmark;
    button.classList.toggle("chosen", isThis);
  }
  const fits = data.records.filter((record) => {
    const given = record.given[chosen.row];
    if (!given) return false;
    if (["benchmark", "subset", "kind"].some((key) => chosen[key] && record[key] !== chosen[key])) return false;
    return chosen.verdict === "" || isMiss(given) === (chosen.verdict === "misses");
  });
  const misses = fits.filter((record) => isMiss(record.given[chosen.row]));
  const others = fits.filter((record) => !isMiss(record.given[chosen.row]));
  document.getElementById("count").textContent = `${fits.length} of ${data.records.length} records on this page`;
  const main = document.getElementById("records");
  main.replaceChildren();
  for (const record of [...misses, ...others]) showRecord(main, record, record.given[chosen.row]);
}

function showRecord(main, record, given) {
  const card = make(main, "article", verdictOf(given));
  const pictures = make(card, "div", "pictures");
  record.pictures.forEach((picture, number) => {
    showAnswered(pictures, picture, (given.masks || [])[number], number === record.place_on ? [record, given] : null);
  });
  if (record.no_picture) make(pictures, "p", "note", record.no_picture);
  if (!record.no_picture && record.num_pictures > record.pictures.length) {
    make(pictures, "p", "note", `${record.pictures.length} of ${record.num_pictures} images shown`);
  }
  const text = make(card, "div", "text");
  const parts = given.score !== null && given.score > 0 && given.score < 1 ? ` ${given.score.toFixed(2)}` : "";
  make(text, "p", "verdict", verdictOf(given) + parts);
  make(text, "p", "name", [record.id, record.source_id].filter(Boolean).join(" · "));
  const groups = [record.benchmark, record.subset, record.kind].filter(Boolean);
  const kept = given.full ? `${given.kept} of ${given.full} blocks kept` : "";
  make(text, "p", "groups", [...new Set(groups), kept].filter(Boolean).join(" · "));
  const list = make(text, "dl");
  const add = (name, value) => {
    if (!value) return;
    make(list, "dt", "", name);
    make(list, "dd", "", value);
  };
  add("question", record.question);
  add("asked for", record.asked_for);
  add("answer", given.error ? "" : given.text || "(empty)");
  add("read as", given.point ? `(${given.point.map((side) => side.toFixed(0)).join(", ")}) px` : given.problem);
  add("failed", given.error);
  add("image", record.files.join("\n"));
  if (record.system) {
    const more = make(text, "details");
    make(more, "summary", "", "system prompt");
    make(more, "pre", "", record.system);
  }
}

function showAnswered(parent, picture, mask, places) {
  const over = showPicture(parent, picture, mask);
  if (!places) return;
  const [record, given] = places;
  const [width, height] = picture.size;
  const line = Math.max(width, height) / 300;
  if (record.box) {
    const [x1, y1, x2, y2] = record.box;
    draw(over, "rect", "box", { x: x1, y: y1, width: x2 - x1, height: y2 - y1, "stroke-width": line });
  }
  if (record.polygon.length) draw(over, "polygon", "box", { points: record.polygon.join(" "), "stroke-width": line });
  if (given.point) {
    const x = Math.min(Math.max(given.point[0], 0), width); // outside the picture: at its rim
    const y = Math.min(Math.max(given.point[1], 0), height);
    draw(over, "circle", "point", { cx: x, cy: y, r: 3 * line, "stroke-width": line });
  }
}

showHead();
showFilters();
show();
