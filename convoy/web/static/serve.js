// Serve: versions and their states, figures of the last minutes, and batches as they are made.

import { events, postJson } from "./api.js";
import { barChart, lineChart } from "./charts.js";
import { classify, listModels } from "./models.js";
import { age, badge, button, card, choice, css, h, milliseconds, number, percent, say, sentence, table, tell } from "./ui.js";

const SECONDS = 60; // of the charts
const MAX_BATCHES = 240;
const WINDOW_S = 10; // of the figures
const LOAD = 600; // requests of the button

let models = [];
let bounds = [];
let history = []; // of { time, figures by "model/version" }
let batches = [];
let leftOut = 0;
let colors = new Map();
let controller = null;
let needsPaint = false;
let pointed = null; // a batch, counted from the newest
let state, trouble, list, figures, rates, latencies, sizes, queue, strip, stripText, loadPicker, workers;

export const section = {
  title: "Serve",
  styles: true,

  mount(root, page) {
    workers = page.options.workers ?? 1;
    state = h("span", { class: "badge", role: "status" }, "connecting");
    trouble = h("span", { class: "muted small" });
    list = h("div", { class: "stack" });
    figures = h("div", { class: "tiles" });
    rates = lineChart({ label: "Images a second", x: "seconds ago", y: "images / s", xMin: -SECONDS, xMax: 0, yMin: 0, height: 210 });
    latencies = lineChart({ label: "Latency", x: "seconds ago", y: "ms", xMin: -SECONDS, xMax: 0, yMin: 0, height: 210 });
    queue = lineChart({ label: "Queue", x: "seconds ago", y: "requests", xMin: -SECONDS, xMax: 0, yMin: 0, height: 210 });
    sizes = barChart({ label: "Batches by size, since the start", x: "images in a batch", y: "batches", height: 210 });
    strip = h("canvas", { class: "strip", role: "application", tabindex: 0, "aria-label": "Batches as they are made: arrow keys choose one" });
    stripText = h("p", { class: "muted small", "aria-live": "polite" });
    loadPicker = choice("Model", []);
    root.append(
      h("div", { class: "row" }, h("h2", {}, "What the server does now"), state, trouble),
      workers > 1 ? h("p", { class: "lead" }, `Figures and batches are of one of ${workers} processes; /metrics has the sums of all.`) : "",
      figures,
      card("Batches as they are made", strip, stripText,
        h("div", { class: "row end no-print" }, loadPicker.root, button(`Send ${LOAD} requests`, sendLoad))),
      h("div", { class: "grid two" },
        card("Throughput", rates.root), card("Latency", latencies.root),
        card("Queue", queue.root), card("Batch sizes", sizes.root)),
      list);
    const choose = (fromRight) => { pointed = fromRight; describeBatch(); };
    strip.addEventListener("pointermove", (event) => choose(Math.floor((strip.getBoundingClientRect().right - event.clientX) / COLUMN)));
    for (const end of ["pointerleave", "blur"]) strip.addEventListener(end, () => choose(null));
    strip.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: 1, ArrowRight: -1 }[event.key];
      if (!move) return;
      event.preventDefault();
      choose(pointed === null ? 0 : Math.max(0, Math.min(numVisible() - 1, pointed + move)));
    });
    new ResizeObserver(() => repaint()).observe(strip);
  },

  show() {
    controller = new AbortController();
    drawFigures();
    events("/web/api/events", { onEvent, onState, signal: controller.signal }); // tells of the models first
  },

  hide() {
    controller?.abort();
  },
};

function onState(text) {
  const isLive = text === "live";
  state.textContent = isLive ? "live" : "not connected";
  state.className = `badge ${isLive ? "good" : "warn"}`;
  trouble.textContent = isLive ? "" : text === "ended" ? "The server has ended." : sentence(text);
}

function onEvent(name, value) {
  if (name === "hello") bounds = value.latency_bounds_s;
  else if (name === "models") refresh();
  else if (name === "batches") addBatches(value);
  else if (name === "figures") addFigures(value);
}

const keyOf = (each) => `${each.model}/${each.version}`;

function colorOf(key) {
  if (!colors.has(key)) colors.set(key, 1 + (colors.size % 8));
  return colors.get(key);
}

// ---- Models ----

async function refresh() {
  try {
    models = await listModels();
  } catch (error) {
    if (error.status) say(sentence(error.message), "error"); // else the state tells that the server is away
    return;
  }
  loadPicker.set(models.filter((model) => model.input).map((model) => [model.name, model.name]));
  list.replaceChildren(...models.map(describeModel));
  if (!models.length) list.append(h("p", { class: "card" }, "The repository holds no model. ", h("code", {}, "convoy train"), " exports one."));
}

function describeModel(model) {
  const actions = h("div", { class: "row no-print" });
  if (model.serving && model.before) actions.append(button(`Roll back to version ${model.before}`, () => change(model, "rollback", { version: model.serving }), { kind: "danger" }));
  if (model.pinned) actions.append(button("Unpin", () => change(model, "unpin", {})));
  const rows = model.versions.toReversed().map((version) => [
    h("strong", {}, String(version.version)),
    h("div", { class: "stack tight" },
      h("div", {}, version.version === model.serving ? badge("serves", "good") : badge(version.state.toLowerCase(), stateKind(version))),
      version.reason && h("p", { class: version.state === "UNAVAILABLE" && isRefused(version) ? "error small" : "muted small" }, version.reason)),
    accuracy(version),
    version.exported ? h("time", { class: "nowrap", datetime: version.exported, title: version.exported }, age(version.exported)) : "–",
    h("span", { class: "nowrap" }, [version.recipe, version.dataset].filter(Boolean).join(" on ") || "–"),
    version.version === model.serving ? "" : button("Promote", () => change(model, "promote", { version: version.version }), { kind: "small no-print", label: `Promote version ${version.version} of ${model.name}` }),
  ]);
  return h("article", { class: "card" },
    h("div", { class: "row" }, h("h3", {}, model.name), model.choice && h("span", { class: "muted small" }, model.choice)),
    table(["Version", "State", "Accuracy as served", "Exported", "From", ""], rows), actions);
}

const isRefused = (version) => version.reason && !/not loaded|selects other versions/.test(version.reason);

const stateKind = (version) => ({ READY: "good", LOADING: "warn", UNLOADING: "warn" })[version.state] ?? (isRefused(version) ? "bad" : "");

function accuracy(version) {
  if (version.accuracy === null || version.accuracy === undefined) return "–";
  const [low, high] = version.interval ?? [];
  const title = low === undefined ? null : `95 % interval ${percent(low)} to ${percent(high)}, ${number(version.num_images)} validation images`;
  return h("span", { title }, percent(version.accuracy, 2), low !== undefined && h("div", { class: "muted small" }, `${(100 * low).toFixed(1)} to ${percent(high)}`));
}

async function change(model, verb, parameters) {
  try {
    await postJson(`/v2/repository/models/${encodeURIComponent(model.name)}/${verb}`, { parameters });
    say(`${model.name}: ${verb} is done`);
  } catch (error) {
    if (error.status !== 401 && error.status !== 403) say(sentence(error.message), "error");
  }
  refresh();
}

// ---- Figures ----

function addFigures(values) {
  const now = performance.now() / 1000;
  history.push({ time: now, figures: new Map(values.map((each) => [keyOf(each), each])) });
  while (history.length > 2 && now - history[0].time > SECONDS + WINDOW_S) history.shift();
  drawFigures();
}

// Returns what changed between two moments: rates and the latencies' quantiles. Null if the version was loaded between.
function between(key, from, to) {
  const [a, b] = [from.figures.get(key), to.figures.get(key)];
  if (!a || !b || b.success < a.success) return null;
  const seconds = b.time - a.time;
  const counts = b.latencies.map((count, i) => count - a.latencies[i]);
  return {
    requests: (b.success - a.success) / seconds,
    images: (b.rows - a.rows) / seconds,
    mean: b.batches > a.batches ? (b.rows - a.rows) / (b.batches - a.batches) : null,
    failed: sum(Object.values(b.failures)) - sum(Object.values(a.failures)),
    median: quantile(counts, 0.5),
    slow: quantile(counts, 0.95),
    now: b,
  };
}

const sum = (values) => values.reduce((a, b) => a + b, 0);

// Returns a quantile of a histogram, in seconds, as Prometheus's histogram_quantile does; null without observations.
function quantile(counts, part) {
  const target = part * sum(counts);
  if (!target) return null;
  let before = 0;
  for (let i = 0; i < counts.length; i++) {
    if (before + counts[i] >= target) {
      const low = i ? bounds[i - 1] : 0;
      return i < bounds.length ? low + ((bounds[i] - low) * (target - before)) / counts[i] : low;
    }
    before += counts[i];
  }
  return bounds.at(-1);
}

function drawFigures() {
  const last = history.at(-1);
  const keys = last ? [...last.figures.keys()] : [];
  figures.replaceChildren(...keys.map((key) => describeFigures(key, last)));
  if (!last) return;
  const series = keys.map((key) => seriesOf(key, last));
  const pick = (value, suffix = "") => series.map((one) => ({ name: one.key + suffix, color: one.color, x: one.x, y: one.moments.map(value) }));
  rates.set(pick((m) => m.images));
  latencies.set([
    ...pick((m) => (m.median === null ? NaN : 1000 * m.median), " median"),
    ...pick((m) => (m.slow === null ? NaN : 1000 * m.slow), " 95 %").map((one) => ({ ...one, dashed: true })),
  ]);
  queue.set(pick((m) => m.now.queued));
  const counts = new Map();
  for (const each of last.figures.values()) {
    for (const [rows, count] of Object.entries(each.batch_sizes)) {
      const power = Math.ceil(Math.log2(Number(rows)));
      counts.set(power, (counts.get(power) ?? 0) + count);
    }
  }
  const largest = Math.max(3, ...counts.keys());
  sizes.set(Array.from({ length: largest + 1 }, (_, power) => ({
    name: power < 2 ? String(2 ** power) : `${2 ** (power - 1) + 1}–${2 ** power}`,
    value: counts.get(power) ?? 0,
  })));
}

function seriesOf(key, last) {
  const [x, moments] = [[], []];
  for (let i = 1; i < history.length; i++) {
    const moment = between(key, history[i - 1], history[i]);
    if (!moment) continue;
    x.push(history[i].time - last.time);
    moments.push(moment);
  }
  return { key: key.replace("/", " version "), color: colorOf(key), x, moments };
}

function describeFigures(key, last) {
  const first = history.find((each) => last.time - each.time <= WINDOW_S + 0.5) ?? last;
  const recent = first === last ? null : between(key, first, last);
  const { queued, queued_rows: rows, running, failures } = last.figures.get(key);
  const failed = sum(Object.values(failures));
  const tile = (value, text) => h("div", {}, h("div", { class: "big" }, value), h("div", { class: "muted small" }, text));
  return h("article", { class: "card" },
    h("h3", {}, h("span", { class: `dot c${colorOf(key)}`, "aria-hidden": "true" }), key.replace("/", " version ")),
    h("div", { class: "figures" },
      tile(recent ? number(Math.round(recent.requests * 10) / 10) : "–", "requests a second"),
      tile(recent?.median != null ? milliseconds(recent.median) : "–", "median latency"),
      tile(recent?.slow != null ? milliseconds(recent.slow) : "–", "95 % are answered within"),
      tile(number(queued), rows === queued ? `waiting, ${running} running` : `waiting (${rows} images), ${running} running`),
      tile(recent?.mean != null ? number(Math.round(recent.mean * 10) / 10) : "–", "images a batch"),
      tile(number(failed), "failed since the start")));
}

// ---- Batches ----

function addBatches({ batches: added, left_out: missed }) {
  batches.push(...added);
  leftOut += missed;
  if (batches.length > MAX_BATCHES) batches.splice(0, batches.length - MAX_BATCHES);
  repaint();
}

function repaint() {
  if (needsPaint) return;
  needsPaint = true;
  requestAnimationFrame(() => { needsPaint = false; paint(); });
}

const COLUMN = 18;

function paint() {
  const scale = devicePixelRatio || 1;
  const [width, height] = [strip.clientWidth, strip.clientHeight];
  if (!width) return;
  strip.width = width * scale;
  strip.height = height * scale;
  const context = strip.getContext("2d");
  context.scale(scale, scale);
  const visible = batches.slice(-Math.floor(width / COLUMN));
  const most = Math.max(4, ...visible.map((batch) => batch.rows));
  const unit = (height - 20) / most;
  context.font = `11px ${css("--font")}`;
  context.textAlign = "center";
  visible.forEach((batch, i) => {
    const x = width - COLUMN * (visible.length - i);
    let y = height - 16;
    context.fillStyle = css(`--series-${colorOf(keyOf(batch))}`);
    for (const [rows] of batch.requests) {
      const tall = Math.max(1, rows * unit);
      context.fillRect(x + 1, y - tall + (tall > 3 ? 1 : 0), COLUMN - 3, tall - (tall > 3 ? 1 : 0));
      y -= tall;
    }
    const listed = sum(batch.requests.map(([rows]) => rows));
    if (listed < batch.rows) {
      context.globalAlpha = 0.4;
      context.fillRect(x + 1, y - (batch.rows - listed) * unit, COLUMN - 3, (batch.rows - listed) * unit);
      context.globalAlpha = 1;
    }
    context.fillStyle = css("--muted");
    context.fillText(String(batch.rows), x + COLUMN / 2 - 0.5, height - 4);
  });
  stripText.dataset.count = batches.length;
  if (pointed === null) describeBatch();
}

const numVisible = () => Math.min(batches.length, Math.floor(strip.clientWidth / COLUMN));

function describeBatch() {
  if (!batches.length) {
    tell(stripText, "No batch since you opened this page: draw something under Try, or send requests.");
    return;
  }
  if (pointed === null || pointed >= numVisible()) {
    tell(stripText, "A column is a batch, a block in it a request, as tall as its images; the newest is on the right."
      + (leftOut ? ` ${number(leftOut)} batches went by undrawn.` : ""));
    return;
  }
  const batch = batches[batches.length - 1 - pointed];
  const waits = batch.requests.map(([, waited]) => waited);
  tell(stripText, `${batch.model} version ${batch.version}: ${counted(batch.rows, "image")} of ${counted(batch.num_requests, "request")}, waiting `
    + `${milliseconds(Math.min(...waits) / 1e6)} to ${milliseconds(Math.max(...waits) / 1e6)}; computed in ${milliseconds(batch.compute_us / 1e6)}; `
    + { full: "closed because it was full.", idle: "closed because an instance was free.", delay: "closed when its delay was over." }[batch.closed]);
}

const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// Sends requests of 1 to 8 random images, six at a time: what one browser can do.
async function sendLoad(event) {
  const model = models.find((each) => each.name === loadPicker.value);
  if (!model) { say("No model that takes images is ready"); return; }
  const { target } = event;
  target.disabled = true;
  const most = Math.min(8, model.input.max_batch_size || 1);
  const size = model.input.shape.reduce((a, b) => a * b);
  let left = LOAD;
  const work = async () => {
    while (left-- > 0 && !controller.signal.aborted) {
      const images = new Uint8Array(size * (1 + Math.floor(Math.random() * most)));
      for (let start = 0; start < images.length; start += 65536) crypto.getRandomValues(images.subarray(start, start + 65536));
      await classify(model.name, model.input, images, controller.signal);
    }
  };
  try {
    await Promise.all(Array.from({ length: 6 }, work));
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, "error");
  }
  target.disabled = false;
}
