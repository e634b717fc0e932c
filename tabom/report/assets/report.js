"use strict";
// Draws the report from the data packed into the page. All text goes in through textContent, never as markup.

const $ = (id) => document.getElementById(id);
// cividis, the same to every kind of eye, without the ends that vanish on a dark and on a light page
const RAMP = [[49, 67, 109], [109, 110, 115], [167, 157, 115], [234, 212, 74]];
const SVG = "http://www.w3.org/2000/svg";
const SECONDS_PER_REPLAY = 8;

async function unpack() {
  const bytes = Uint8Array.from(atob($("data").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function element(parent, name, text, attributes = {}) {
  const isSvg = parent instanceof SVGElement || name === "svg";
  const made = isSvg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}

function colours(share) {
  const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  const rgb = RAMP[low].map((value, i) => Math.round(value + (place - low) * (RAMP[low + 1][i] - value)));
  const [r, g, b] = rgb.map((value) => (value <= 10 ? value / 3295 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  const isDark = 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.179; // where black and white contrast alike (WCAG)
  return [`rgb(${rgb})`, isDark ? "#fff" : "#000"];
}

const short = (value) => (value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3));
const lastStep = (record) => record.steps.reduce((most, step) => Math.max(most, step), 0) + 1;

// --- one response -------------------------------------------------------------------------------------------------

class Panel {
  constructor(parent, { name, role }, record) {
    this.record = record;
    this.total = lastStep(record);
    const title = element(parent, "h3", null);
    if (role) element(title, "span", null, { class: `dot ${role}`, title: role });
    element(title, "span", name);
    const verdict = { true: "✓ right", false: "✗ wrong", null: "? unverified", unknown: "" }[record.correct];
    if (verdict) element(parent, "p", verdict.endsWith(record.why) ? verdict : `${verdict}: ${record.why}`);
    this.box = element(parent, "div", null, { class: "tokens", tabindex: "0", role: "group", "aria-label": `Response of ${name}` });
    this.tokens = record.tokens.map((text, i) => {
      const token = element(this.box, "span", text || "​", { class: "token masked", "data-index": i });
      element(token, "sub", record.steps[i] < 0 ? "–" : record.steps[i] + 1, { "aria-hidden": "true" });
      return token;
    });
    this.byStep = Array.from({ length: this.total }, () => []);
    record.steps.forEach((step, i) => { if (step >= 0) this.byStep[step].push(i); });
    this.shown = 0;
    if (record.entropy) this.drawEntropy(parent);
  }

  colour(by) {
    const { steps, entropy, probability } = this.record;
    const most = Math.max(...(entropy || [0]), 1e-9);
    const share = {
      step: (i) => steps[i] / Math.max(this.total - 1, 1),
      entropy: (i) => Math.sqrt(entropy[i] / most),
      probability: (i) => probability[i],
    }[by];
    this.tokens.forEach((token, i) => {
      if (steps[i] < 0) return;
      [token.style.backgroundColor, token.style.color] = colours(share(i));
    });
  }

  show(step) { // touches only what changes between the step shown and this one
    const [low, high] = [Math.min(step, this.shown), Math.max(step, this.shown)];
    for (let s = low; s < high; s++) for (const i of this.byStep[s]) this.tokens[i].classList.toggle("masked", step <= s);
    this.shown = step;
    if (this.line) {
      const x = this.x(Math.min(step, this.total) - 0.5);
      this.line.setAttribute("x1", x);
      this.line.setAttribute("x2", x);
    }
  }

  describe(i) {
    const { tokens, steps, entropy, probability, alternatives } = this.record;
    const parts = [`${JSON.stringify(tokens[i])}: ${steps[i] < 0 ? "never unmasked" : `step ${steps[i] + 1} of ${this.total}`}`];
    if (entropy) parts.push(`entropy ${entropy[i].toPrecision(3)} nats`);
    if (probability) parts.push(`probability ${(100 * probability[i]).toFixed(1)} %`);
    const others = ((alternatives || [])[i] || []).map(([text, p]) => `${JSON.stringify(text)} ${(100 * p).toFixed(1)} %`);
    return parts.join(", ") + (others.length ? `\nalso: ${others.join(", ")}` : "");
  }

  drawEntropy(parent) {
    const { steps, entropy, blocks } = this.record;
    const isPair = (i, j) => steps[i] < steps[j] && (!blocks || blocks[i] === blocks[j]);
    const places = steps.flatMap((step, i) => (step >= 0 ? [i] : []));
    const wrong = new Set();
    let pairs = 0;
    let inverted = 0;
    for (const i of places) for (const j of places) if (isPair(i, j)) {
      pairs += 1;
      if (entropy[i] > entropy[j]) { inverted += 1; wrong.add(i).add(j); }
    }
    const most = Math.max(...places.map((i) => entropy[i]), 1e-9);
    const figure = element(parent, "figure", null);
    const width = Math.max(figure.clientWidth, 300);
    const svg = element(figure, "svg", null, { viewBox: `0 0 ${width} 160`, role: "img", "aria-label": `Entropy against step; ${inverted} of ${pairs} pairs out of order` });
    this.x = (step) => 60 + ((width - 70) * (step + 0.5)) / this.total;
    const y = (value) => 135 - 120 * Math.sqrt(value / most);
    element(svg, "path", null, { class: "axis", d: `M60 10V135H${width - 5}` });
    for (const value of [0, most / 4, most]) element(svg, "text", short(value), { x: 56, y: y(value) + 4, "text-anchor": "end" });
    element(svg, "text", "step 1", { x: 60, y: 150 });
    element(svg, "text", String(this.total), { x: width - 10, y: 150, "text-anchor": "end" });
    for (const i of places) {
      const [cx, cy] = [this.x(steps[i]), y(entropy[i])];
      const mark = wrong.has(i)
        ? element(svg, "path", null, { class: "out", d: `M${cx} ${cy - 4}l4 7h-8z` })
        : element(svg, "circle", null, { class: "in", cx, cy, r: 3 });
      element(mark, "title", this.describe(i));
    }
    this.line = element(svg, "line", null, { class: "now", y1: 10, y2: 135 });
    element(figure, "figcaption", `Entropy (nats, root scale) of each token when it was unmasked. Triangles: in a pair out of order (${inverted} of ${pairs}${blocks ? ", inside blocks" : ""}).`);
  }
}

// Marks the tokens that are not in a longest common subsequence of the two responses.
function markDifferences(first, second) {
  const [a, b] = [first.record.tokens, second.record.tokens];
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  let [i, j] = [0, 0];
  const mark = (panel, place) => panel.tokens[place].classList.add("differs");
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { i++; j++; }
    else if (j >= b.length || (i < a.length && table[i + 1][j] >= table[i][j + 1])) mark(first, i++);
    else mark(second, j++);
  }
}

// --- choosing and playing -----------------------------------------------------------------------------------------

class Viewer {
  constructor(sources) {
    this.sources = sources;
    this.panels = [];
    this.step = 0;
    this.timer = null;
    sources.forEach((source, i) => element($("source"), "option", source.name, { value: i }));
    if ($("beside")) {
      element($("beside"), "option", "nothing", { value: "" });
      sources.forEach((source, i) => element($("beside"), "option", source.name, { value: i }));
      const base = sources.findIndex((source) => source.role === "base");
      const what = (source) => source.name.split(" · ").slice(1).join(" · ");
      const tuned = sources.findIndex((source) => source.role === "tuned" && what(source) === what(sources[base]));
      if (tuned >= 0) [$("source").value, $("beside").value] = [base, tuned];
    }
    for (const id of ["source", "verdict", "beside"]) $(id)?.addEventListener("change", () => this.list());
    $("find").addEventListener("input", () => this.list());
    $("record").addEventListener("change", () => this.open());
    $("colour").addEventListener("change", () => this.colour());
    $("numbers").addEventListener("change", () => $("panels").classList.toggle("numbers", $("numbers").checked));
    $("step").addEventListener("input", () => { this.pause(); this.show(Number($("step").value)); });
    $("play").addEventListener("click", () => (this.timer ? this.pause() : this.play()));
    for (const [id, move] of [["first", () => 0], ["back", () => this.step - 1], ["forward", () => this.step + 1], ["last", () => this.total]])
      $(id).addEventListener("click", () => { this.pause(); this.show(move()); });
    document.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["pointerover", "click"]) $("panels").addEventListener(name, (event) => {
      const token = event.target.closest(".token");
      if (token) this.choose(this.panels.find((panel) => panel.box === token.parentElement), Number(token.dataset.index));
    });
    this.list();
  }

  list() {
    const verdict = $("verdict").value;
    const words = $("find").value.toLowerCase();
    const fits = (record) => (verdict === "all" || String(record.correct) === verdict)
      && (!words || (record.prompt + "\n" + record.tokens.join("")).toLowerCase().includes(words));
    if ($("beside")) {
      for (const option of $("beside").options) option.disabled = option.value === $("source").value;
      if ($("beside").selectedOptions[0].disabled) $("beside").value = "";
    }
    const records = this.sources[$("source").value].records;
    const options = records.flatMap((record, i) => {
      if (!fits(record)) return [];
      const mark = { true: "✓ ", false: "✗ ", null: "? ", unknown: "" }[record.correct];
      return [new Option(`${mark}${record.id ? record.id + " " : ""}${record.question.slice(-120).replace(/\s+/g, " ")}`, i)];
    });
    $("record").replaceChildren(...options);
    $("record").selectedIndex = options.length ? 0 : -1;
    this.open();
  }

  open() {
    this.pause();
    $("panels").replaceChildren();
    $("details").textContent = "";
    const source = this.sources[$("source").value];
    const record = source.records[$("record").value];
    this.panels = [];
    $("prompt").textContent = record ? record.prompt : "No response fits.";
    if (record) {
      const shown = [[source, record]];
      const other = this.sources[$("beside")?.value || -1];
      const same = other && (other.records.find((each) => each.prompt === record.prompt && each.id === record.id)
        || other.records.find((each) => each.prompt === record.prompt));
      if (same) shown.push([other, same]);
      const places = shown.map(() => element($("panels"), "div", null)); // all of them first: they share the width
      this.panels = shown.map((each, i) => new Panel(places[i], ...each));
      if (same) markDifferences(...this.panels);
      else if (other) element($("panels"), "p", `${other.name} has no response to this prompt.`);
    }
    this.total = Math.max(0, ...this.panels.map((panel) => panel.total));
    $("step").max = this.total;
    for (const option of $("colour").options)
      option.disabled = option.value !== "step" && !this.panels.every((panel) => panel.record[option.value]);
    if ($("colour").selectedOptions[0].disabled) $("colour").value = "step";
    this.colour();
    this.show(this.total);
  }

  colour() {
    const by = $("colour").value;
    for (const panel of this.panels) panel.colour(by);
    [$("low").textContent, $("high").textContent] = { step: ["first", "last"], entropy: ["certain", "uncertain"], probability: ["0 %", "100 %"] }[by];
  }

  show(step) {
    this.step = Math.min(Math.max(step, 0), this.total);
    for (const panel of this.panels) panel.show(Math.min(this.step, panel.total));
    $("step").value = this.step;
    $("now").textContent = `step ${this.step} of ${this.total}`;
  }

  play() {
    if (this.step >= this.total) this.show(0);
    $("play").textContent = "⏸ Pause";
    $("play").setAttribute("aria-pressed", "true");
    const wait = Math.min(400, Math.max(30, (1000 * SECONDS_PER_REPLAY) / this.total));
    this.timer = setInterval(() => {
      this.show(this.step + 1);
      if (this.step >= this.total) this.pause();
    }, wait);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    $("play").textContent = "▶ Play";
    $("play").setAttribute("aria-pressed", "false");
  }

  choose(panel, index) {
    if (!panel || !panel.tokens[index]) return;
    for (const each of this.panels) for (const token of each.box.querySelectorAll(".chosen")) token.classList.remove("chosen");
    panel.tokens[index].classList.add("chosen");
    this.chosen = [panel, index];
    $("details").textContent = panel.describe(index);
  }

  key(event) {
    if (event.target.closest("select, input, a, [role=region]") || event.ctrlKey || event.altKey || event.metaKey) return;
    const [panel, index] = this.chosen && this.panels.includes(this.chosen[0]) ? this.chosen : [this.panels[0], -1];
    const actions = {
      ArrowLeft: () => this.show(this.step - 1),
      ArrowRight: () => this.show(this.step + 1),
      Home: () => this.show(0),
      End: () => this.show(this.total),
      ",": () => this.choose(panel, Math.max(index - 1, 0)),
      ".": () => this.choose(panel, index + 1),
    };
    if (event.key === " " && event.target.tagName !== "BUTTON") (this.timer ? this.pause() : this.play());
    else if (actions[event.key]) { if (event.key.length > 1) this.pause(); actions[event.key](); }
    else return;
    event.preventDefault();
  }
}

// --- curves of trainings and of rounds ----------------------------------------------------------------------------------------------

const HUES = ["#2b7bba", "#159a6e", "#8c8c8c", "#cc79a7", "#e69f00", "#56b4e9"]; // none is the base's
const DASHES = ["", "6 3", "2 2", "8 3 2 3", "1 4", "10 4"];
const NOT_DRAWN = /^(step|epoch|total_flos|train_.*|.*_runtime|.*_per_second)$/;

function drawCurves(logs, section, unit) {
  const runs = Object.entries(logs);
  const names = [...new Set(runs.flatMap(([, log]) => log.flatMap(Object.keys)))].filter((name) => !NOT_DRAWN.test(name));
  for (const name of names) {
    const series = runs.map(([, log]) => log.filter((entry) => typeof entry[name] === "number").map((entry) => [entry.step, entry[name]]));
    const points = series.flat();
    if (points.length < 2) continue;
    const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
    const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const x = (value) => 64 + (328 * (value - x0)) / (x1 - x0 || 1);
    const y = (value) => 150 - (130 * (value - y0)) / (y1 - y0 || 1);
    const figure = element($(`${section}-curves`), "figure", null);
    element(figure, "figcaption", name);
    const svg = element(figure, "svg", null, { viewBox: "0 0 400 175", role: "img", "aria-label": `${name}, from ${y0.toPrecision(3)} to ${y1.toPrecision(3)}` });
    element(svg, "path", null, { class: "axis", d: "M64 15V150H395" });
    for (const value of [y0, y1]) element(svg, "text", short(value), { x: 60, y: y(value) + 4, "text-anchor": "end" });
    element(svg, "text", `${unit} ${x0}`, { x: 64, y: 168 });
    element(svg, "text", String(x1), { x: 392, y: 168, "text-anchor": "end" });
    series.forEach((line, i) => element(svg, "polyline", null, {
      points: line.map(([a, b]) => `${x(a)},${y(b)}`).join(" "), fill: "none", "stroke-width": 2,
      stroke: HUES[i % HUES.length], "stroke-dasharray": DASHES[i % DASHES.length],
    }));
  }
  runs.forEach(([name], i) => {
    const line = element($(section), "p", null, { class: "legend" });
    const svg = element(line, "svg", null, { viewBox: "0 0 40 10", style: "width:40px" });
    element(svg, "line", null, { x1: 0, x2: 40, y1: 5, y2: 5, "stroke-width": 2, stroke: HUES[i % HUES.length], "stroke-dasharray": DASHES[i % DASHES.length] });
    element(line, "span", name);
  });
}

unpack().then((data) => {
  if ($("panels")) window.viewer = new Viewer(data.sources.filter((source) => source.records.length));
  if ($("training")) drawCurves(data.training, "training", "step");
  if ($("rounds")) drawCurves(data.rounds, "rounds", "round");
  document.body.dataset.ready = "true";
});
