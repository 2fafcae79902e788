const COLOURS = ["#2b5bd7", "#d9480f", "#1a7f3c", "#9c36b5", "#c2255c", "#0b7285", "#8a6d00", "#495057"];
const colourOf = (number) => COLOURS[number % COLOURS.length];
const HEIGHT = 230;
let content = data;
// What the reader has chosen; it outlives a refresh. view: [first, last] step shown, null for the whole run.
const chosen = { view: null, hidden: new Set(), smooth: true, veil: true, recipe: "", find: "" };
const charts = {}; // metric -> { plot, raw: [[...] of every run], steps }
const shown = {}; // section -> JSON of what it shows

const number = (value) =>
  value === null || value === undefined ? "-" : Math.abs(value) >= 1e5 ? value.toExponential(3) : String(Number(value.toPrecision(4)));
const percent = (value) => (value === null || value === undefined ? "-" : `${(100 * value).toFixed(1)}%`);

function table(parent, heads, rows, className) {
  const one = make(make(parent, "div", "wide"), "table", className);
  const line = make(one, "tr");
  for (const head of heads) make(line, "th", "", head);
  for (const cells of rows) {
    const row = make(one, "tr");
    cells.forEach((cell, place) => make(row, place ? "td" : "th", "", cell));
  }
  return one;
}

// --- curves ---

function stepsOf(metric) {
  const all = new Set(content.runs.flatMap((run) => (run.curves[metric] ? run.curves[metric].steps : [])));
  return [...all].sort((a, b) => a - b);
}

function wholeRun() {
  const all = content.runs.flatMap((run) => Object.values(run.curves).flatMap((curve) => [curve.steps[0], curve.steps.at(-1)]));
  if (!all.length) return [0, 1];
  const [first, last] = [Math.min(...all), Math.max(...all)];
  return first === last ? [first - 1, last + 1] : [first, last];
}

// Mean over a centred window of a twentieth of the points, as in the pictures of training.report.
function runningMean(values) {
  const places = values.flatMap((value, place) => (value === null ? [] : [place]));
  const half = Math.max(1, Math.floor(places.length / 40));
  const smooth = new Array(values.length).fill(null);
  places.forEach((place, i) => {
    const window = places.slice(Math.max(0, i - half), i + half + 1);
    smooth[place] = window.reduce((sum, other) => sum + values[other], 0) / window.length;
  });
  return smooth;
}

function chartData(chart) {
  const steps = stepsOf(chart.name);
  const place = new Map(steps.map((step, i) => [step, i]));
  const raw = content.runs.map((run) => {
    const values = new Array(steps.length).fill(null);
    const curve = run.curves[chart.name];
    if (curve) curve.steps.forEach((step, i) => (values[place.get(step)] = curve.values[i]));
    return values;
  });
  return { steps, raw, columns: [steps, ...raw.flatMap((values) => (chart.is_rare ? [values] : [values, runningMean(values)]))] };
}

function seriesOf(chart) {
  return content.runs.flatMap((run, place) => {
    const line = { label: run.name, stroke: colourOf(place), spanGaps: true, value: (_, value) => number(value) };
    if (chart.is_rare) return [{ ...line, width: 2, dash: [6, 4], points: { show: true, size: 6 } }];
    const mean = { ...line, width: 2, class: "mean", points: { show: false } };
    return [{ ...line, width: 1, points: { show: false } }, mean];
  });
}

// Which series are drawn: hidden runs are not, and what is smoothed stands faint behind its mean.
function dress(chart) {
  const { plot } = charts[chart.name];
  const each = chart.is_rare ? 1 : 2;
  plot.batch(() => {
    content.runs.forEach((run, place) => {
      const isShown = !chosen.hidden.has(run.name);
      for (let i = 0; i < each; i++) {
        const series = 1 + each * place + i;
        plot.series[series].alpha = each === 2 && i === 0 && chosen.smooth ? 0.3 : 1;
        plot.setSeries(series, { show: isShown && (i === 0 || chosen.smooth) }, false);
      }
    });
  });
  plot.redraw(true);
}

function showAll() {
  const [min, max] = chosen.view || wholeRun();
  for (const { plot } of Object.values(charts)) plot.setScale("x", { min, max });
  document.getElementById("whole").disabled = chosen.view === null;
}

function zoomTo(view) {
  chosen.view = view;
  showAll();
}

function rangeOf(_, min, max) {
  if (min === null) return [0, 1];
  const room = min === max ? Math.abs(min) / 10 || 1 : (max - min) / 20;
  return [min >= 0 ? Math.max(0, min - room) : min - room, max + room];  // an accuracy has no room below 0
}

function makeChart(parent, chart) {
  const box = make(parent, "div", "chart");
  box.dataset.metric = chart.name;
  make(box, "h3", "", chart.words);
  const found = chartData(chart);
  const each = chart.is_rare ? 1 : 2;
  const axis = { stroke: "#5a6272", grid: { stroke: "#e3e6ec", width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  const options = {
    width: Math.max(320, Math.min(720, parent.clientWidth / 2 - 30)),
    height: HEIGHT,
    scales: { x: { time: false, range: (_, min, max) => [min, max] }, y: { range: rangeOf } },
    axes: [{ ...axis, incrs: [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5, 6, 7].map((power) => n * 10 ** power)).sort((a, b) => a - b) }, { ...axis, size: 62, values: (_, ticks) => ticks.map(number) }],
    cursor: { y: false, sync: { key: "steps", scales: ["x", null], setSeries: false }, drag: { x: true, y: false, setScale: false }, bind: { dblclick: () => () => zoomTo(null) } },
    legend: { live: true },
    series: [{ label: "step" }, ...seriesOf(chart)],
    hooks: {
      setSelect: [
        (plot) => {
          if (plot.select.width < 5) return;
          zoomTo([plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")]);
          plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        },
      ],
      setSeries: [(_, series, change) => series && change.show !== undefined && showRun(content.runs[Math.floor((series - 1) / each)].name, change.show)],
    },
  };
  charts[chart.name] = { ...found, plot: new uPlot(options, found.columns, box) };
}

function showRun(name, isShown) {
  if (isShown) chosen.hidden.delete(name);
  else chosen.hidden.add(name);
  for (const box of document.querySelectorAll("input.run")) box.checked = !chosen.hidden.has(box.dataset.run);
  content.charts.forEach(dress);
}

function showCurves(section) {
  const outline = JSON.stringify([content.charts, content.runs.map((run) => run.name), content.missing]);
  if (shown.curves !== outline) {
    shown.curves = outline;
    for (const name of Object.keys(charts)) delete charts[name];
    section.replaceChildren();
    make(section, "h2", "", "Curves");
    make(section, "p", "note", "Drag to zoom into all charts, double-click for the whole run; click a name to hide or show it.");
    const bar = make(section, "div", "bar");
    content.runs.forEach((run, place) => {
      const label = make(bar, "label");
      const box = make(label, "input", "run");
      box.type = "checkbox";
      box.dataset.run = run.name;
      box.checked = !chosen.hidden.has(run.name);
      box.addEventListener("change", () => showRun(run.name, box.checked));
      make(label, "span", "swatch").style.background = colourOf(place);
      make(label, "span", "", run.name);
    });
    const label = make(bar, "label");
    const smooth = make(label, "input");
    smooth.type = "checkbox";
    smooth.id = "smooth";
    smooth.checked = chosen.smooth;
    smooth.addEventListener("change", () => {
      chosen.smooth = smooth.checked;
      content.charts.forEach(dress);
    });
    make(label, "span", "", "running mean");
    const whole = make(bar, "button", "", "whole run");
    whole.id = "whole";
    whole.addEventListener("click", () => zoomTo(null));
    const main = make(section, "div", "charts");
    for (const chart of content.charts.filter((one) => one.is_first)) makeChart(main, chart);
    const others = content.charts.filter((one) => !one.is_first);
    if (others.length) {
      const more = make(section, "details");
      make(more, "summary", "", `${others.length} more`);
      const rest = make(more, "div", "charts");
      for (const chart of others) makeChart(rest, chart);
    }
    if (content.missing.length) make(section, "p", "note", `Not recorded by any of these runs: ${content.missing.join(", ")}.`);
  } else {
    for (const chart of content.charts) {
      const found = chartData(chart);
      Object.assign(charts[chart.name], found);
      charts[chart.name].plot.setData(found.columns, false);
    }
  }
  content.charts.forEach(dress);
  showAll();
}

// --- tables ---

function showSummary(section) {
  make(section, "h2", "", "Runs");
  const words = [...new Set(content.runs.flatMap((run) => Object.keys(run.summary)))];
  const rows = words.map((word) => [word, ...content.runs.map((run) => number(run.summary[word]))]);
  table(section, ["", ...content.runs.map((run) => run.name)], [["folder", ...content.runs.map((run) => run.folder)], ...rows], "figures");
  for (const run of content.runs.filter((one) => one.note)) make(section, "p", "note", `${run.name}: ${run.note}`);
}

function showRecipes(section) {
  make(section, "h2", "", "Recipes");
  const { rows } = content.recipes;
  if (!rows.length) return make(section, "p", "note", "None of these folders holds a config.yaml.");
  const views = [["differences", "differs"], ["set by the recipe", "is_set"], ["everything", ""]];
  const usable = views.filter(([, key]) => key !== "differs" || content.runs.length > 1);
  if (!chosen.recipe) chosen.recipe = usable[0][0];
  const bar = make(section, "div", "bar");
  const select = make(make(bar, "label", "", "show "), "select");
  select.id = "recipe";
  for (const [name] of usable) make(select, "option", "", name).value = name;
  select.value = chosen.recipe;
  const find = make(make(bar, "label", "", "find "), "input");
  find.id = "find";
  find.type = "search";
  find.value = chosen.find;
  const place = make(section, "div");
  const fill = () => {
    [chosen.recipe, chosen.find] = [select.value, find.value];
    const key = views.find(([name]) => name === chosen.recipe)[1];
    const fits = rows.filter((row) => (!key || row[key]) && row.key.includes(find.value));
    place.replaceChildren();
    if (!fits.length) return make(place, "p", "note", "no such setting");
    const one = table(place, ["setting", "default", ...content.runs.map((run) => run.name)], fits.map((row) => [row.key, row.default ?? "-", ...row.values.map((value) => value ?? "-")]), "recipe");
    [...one.rows].slice(1).forEach((line, i) => {
      line.classList.toggle("differs", fits[i].differs);
      [...line.cells].slice(2).forEach((cell, run) => cell.classList.toggle("set", fits[i].values[run] !== fits[i].default));
    });
  };
  select.addEventListener("change", fill);
  find.addEventListener("input", fill);
  fill();
}

function showSamples(section) {
  make(section, "h2", "", "Sample records");
  make(section, "p", "note", "As the model is given them. Marked text is trained on.");
  const label = make(make(section, "div", "bar"), "label");
  const veil = make(label, "input");
  veil.type = "checkbox";
  veil.id = "veil";
  veil.checked = chosen.veil;
  make(label, "span", "", "omitted blocks veiled");
  const mark = () => section.classList.toggle("veiled", (chosen.veil = veil.checked));
  veil.addEventListener("change", mark);
  mark();
  for (const group of content.samples) {
    make(section, "h3", "", group.runs.join(", "));
    if (group.note) make(section, "p", "note", group.note);
    for (const record of group.records) {
      const card = make(section, "article");
      const pictures = make(card, "div", "pictures");
      record.pictures.forEach((picture) => {
        showPicture(pictures, picture, picture.mask);
        make(pictures, "p", "note", picture.words);
      });
      const text = make(card, "div", "text");
      make(text, "p", "name", record.name);
      if (record.note) make(text, "p", "note", record.note);
      const tokens = make(text, "pre", "tokens");
      for (const [kind, words] of record.tokens) make(tokens, "span", kind, words);
    }
  }
}

function showEvaluations(section) {
  make(section, "h2", "", "Evaluations");
  if (!content.evaluations.length && !content.answers.length) make(section, "p", "note", "None yet: `python -m training.evaluate RUN`.");
  if (content.evaluations.length) {
    const rows = content.evaluations.map((one) => [`${one.run}: ${one.name}`, ...[one.accuracy, one.retain_ratio].map(percent), number(one.num), number(one.num_failed), number(one.num_unparsed), one.strategy]);
    table(section, ["", "accuracy", "blocks kept", "records", "failed", "not read", "pruning"], rows, "figures");
    for (const one of content.evaluations.filter((evaluation) => evaluation.sheet)) {
      const more = make(section, "details", "sheet");
      more.open = true;
      make(more, "summary", "", `${one.run}: ${one.name}`);
      showPicture(more, one.sheet, null);
    }
  }
  for (const one of content.answers) {
    make(section, "h3", "", `${one.run}: answers while training, ${one.name}`);
    if (one.sheet) showPicture(make(section, "div", "sheet"), one.sheet, null);
    make(section, "p", "note", `${one.answers.length} of ${one.num}, misses first`);
    table(section, ["record", "score", "answer", ""], one.answers.map((answer) => [answer.id, number(answer.score), answer.text, answer.problem]), "texts");
  }
}

function showQuarantine(section) {
  make(section, "h2", "", "Quarantine");
  if (!content.quarantine.length) make(section, "p", "note", "No record was left out.");
  for (const one of content.quarantine) {
    const reasons = Object.entries(one.reasons).map(([reason, count]) => `${count} ${reason}`);
    make(section, "h3", "", `${one.run}: ${one.file}`);
    make(section, "p", "note", `${one.num} left out: ${reasons.join(", ")}` + (one.entries.length < one.num ? `; the first ${one.entries.length}:` : ""));
    table(section, ["record", "reason", "what is wrong", "file"], one.entries.map((entry) => [entry.record, entry.reason, entry.detail, entry.file]), "texts");
  }
}

// --- the page ---

const SECTIONS = [
  ["runs", "Runs", showSummary, () => content.runs.map(({ name, folder, summary, note }) => ({ name, folder, summary, note }))],
  ["curves", "Curves", showCurves, null],
  ["recipes", "Recipes", showRecipes, () => [content.recipes, content.runs.map((run) => run.name)]],
  ["samples", "Sample records", showSamples, () => content.samples],
  ["evaluations", "Evaluations", showEvaluations, () => [content.evaluations, content.answers]],
  ["quarantine", "Quarantine", showQuarantine, () => content.quarantine],
];

function show() {
  for (const [name, , render, part] of SECTIONS) {
    const section = document.getElementById(name);
    if (!part) {
      render(section);
      continue;
    }
    const text = JSON.stringify(part());
    if (shown[name] === text) continue;
    shown[name] = text;
    section.replaceChildren();
    render(section);
  }
}

function start() {
  make(document.body, "h1", "", content.title);
  make(document.body, "p", "note").id = "state";
  const bar = make(document.body, "nav");
  for (const [name, title] of SECTIONS) {
    const button = make(bar, "button", "", title);
    button.addEventListener("click", () => document.getElementById(name).scrollIntoView());
    make(document.body, "section").id = name;
  }
  show();
  if (!content.refresh_seconds) return;
  let version = "";
  const say = (text) => (document.getElementById("state").textContent = text);
  const refresh = async () => {
    try {
      const answer = await fetch(location.href, { cache: "no-store", headers: version ? { "If-None-Match": version } : {} });
      if (answer.status === 200) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        content = JSON.parse(page.getElementById("data").textContent);
        version = answer.headers.get("ETag");
        show();
      }
      say(answer.ok || answer.status === 304 ? `live; last asked at ${new Date().toLocaleTimeString()}` : `the server answers ${answer.status}`);
    } catch {
      say("the server does not answer any more; this is what it showed last");
    }
    setTimeout(refresh, 1000 * content.refresh_seconds);
  };
  refresh();
}

start();
