// Runs as they train: from the training service's jobs, or from run folders (`python -m trainer watch RUN… --web`).

import { events, getJson, postJson } from "./api.js";
import { lineChart } from "./charts.js";
import { badge, bdi, button, card, choice, duration, fromBase64, h, number, percent, pixels, say, sentence, slider, tell, toggle } from "./ui.js";

const MAX_SHOWN = 8; // as many as there are colours
const MAX_STREAMS = 2; // a browser opens six connections to a server, for all of its windows together
const TURN_MS = 2000; // of streams, where more runs are chosen
const MOST_TURNS = 3; // of streams that no run waits for: other windows may wait for their connections
const LIST_EVERY_MS = 4000;
const DRAW_EVERY_MS = 200;
const FINAL = new Set(["SUCCEEDED", "FAILED", "CANCELLED", "LOST"]);
const KINDS = { SUCCEEDED: "good", FAILED: "bad", LOST: "bad", CANCELLED: "warn", SAVING: "warn" };

const runs = new Map(); // by number: { job, row, lines: Map, after: number of the last event, stream, turn, isDone }
const chosen = new Map(); // by number: the colour, 1 to 8
const charts = {};
const parts = {};
const stale = new Set(); // runs whose rows are not up to date
let api = "/v1/jobs";
let canChange = true;
let timer = 0;
let turns = 0;
let heldTurns = 0;
let numTurns = 0;
let listed = "";
let wanted = []; // numbers in the address
let stopped = new AbortController();
let drawing = 0;
let hasChosen = false;

export const section = {
  title: "Learn",
  styles: true,
  mount(root, page) {
    api = page.options.api ?? api;
    canChange = page.options.can_change ?? true;
    build(root);
  },
  async show(params) {
    stopped = new AbortController();
    timer = setInterval(look, LIST_EVERY_MS);
    turns = setInterval(takeTurns, TURN_MS);
    if (params.has("run")) wanted = params.getAll("run").map(Number);
    await look();
  },
  hide() {
    stopped.abort();
    clearInterval(timer);
    clearInterval(turns);
    for (const run of runs.values()) close(run);
  },
};

function build(root) {
  charts.loss = lineChart({ label: "Loss by step", x: "step", y: "loss", log: true });
  charts.accuracy = lineChart({ label: "Accuracy by step", x: "step", y: "accuracy, %", yMax: 100 });
  charts.speed = lineChart({ label: "Images a second by step", x: "step", height: 160, yMin: 0 });
  parts.validation = toggle("Show validation", true, draw);
  parts.runs = h("tbody");
  parts.none = h("p", { class: "muted", hidden: true }, "No runs yet. ", h("code", {}, "convoy jobs submit mnist"), " begins one.");
  parts.trouble = h("p", { class: "error trouble", role: "status" });
  parts.more = h("p", { class: "muted small" });
  parts.which = choice("Run", [], loadMistakes);
  parts.epoch = slider("Epoch", { min: 1, max: 1, value: 1 }, drawMistakes);
  parts.gallery = h("ul", { class: "mistakes" });
  parts.galleryNote = h("p", { class: "muted small" });
  parts.galleryCard = card("The surest mistakes in validation",
    h("div", { class: "row end" }, parts.which.root, parts.epoch.root), parts.gallery, parts.galleryNote);
  root.classList.add("learn");
  root.append(
    h("h2", {}, "Learn"),
    h("p", { class: "lead" }, "Runs while they train, over each other. A test accuracy appears when a run is finished: "
      + "whoever looks at it earlier begins to choose by it (page 57 of the lecture)."),
    card("Runs", parts.trouble, parts.none, h("div", { class: "scroll long", tabindex: 0, role: "group", "aria-label": "Runs" },
      h("table", { class: "runs" }, h("thead", {}, h("tr", {}, ["Show", "Run", "State", "Progress", "Validation", "Test", ""]
        .map((head) => h("th", { scope: "col" }, head)))), parts.runs)), parts.more),
    h("div", { class: "grid halves" },
      card("Loss", charts.loss.root, parts.validation.root),
      card("Accuracy", charts.accuracy.root, h("p", { class: "muted small" }, "Colours as in the table. Solid: training; dashed: validation.")),
      wide(card("Images a second", charts.speed.root)),
      wide(parts.galleryCard)));
}

function wide(made) {
  made.classList.add("wide");
  return made;
}

// Asks for the runs. A server that does not answer is asked again; one that wants a token, when there is one.
async function look() {
  try {
    await list();
    tell(parts.trouble, "");
  } catch (error) {
    if (error.name === "AbortError") return;
    const isRefused = error.status === 401 || error.status === 403;
    if (isRefused) clearInterval(timer);
    tell(parts.trouble, sentence(isRefused ? error.message : `${error.message}; trying again`));
  }
}

async function list() {
  const found = await getJson(`${api}?limit=50`, { signal: stopped.signal });
  for (const job of found.jobs) {
    const run = runs.get(job.id) ?? { lines: new Map(), after: 0, stream: null, turn: 0, isDone: false };
    if (run.isDone && !FINAL.has(job.state)) { // somebody has continued it
      run.isDone = false;
      run.after = 0;
      run.lines.clear();
    }
    run.job = job;
    runs.set(job.id, run);
  }
  const ids = new Set(found.jobs.map((job) => job.id));
  for (const [id, run] of runs) {
    if (ids.has(id) || (found.next_before && chosen.has(id))) continue; // an older one than the newest 50
    close(run);
    chosen.delete(id);
    runs.delete(id);
  }
  parts.more.textContent = found.next_before ? "The newest 50 runs." : "";
  if (!hasChosen && runs.size) {
    hasChosen = true;
    const newest = [...runs.values()].map((run) => run.job).sort((a, b) => b.id - a.id);
    const active = newest.filter((job) => !FINAL.has(job.state));
    const first = wanted.length ? newest.filter((job) => wanted.includes(job.id)) : active.length ? active : newest;
    for (const job of first.slice(0, 4).reverse()) choose(job.id, true);
  }
  follow();
  const text = JSON.stringify(found);
  if (text === listed) return;
  listed = text;
  drawTable();
  draw();
}

function choose(id, isChosen) {
  if (!isChosen) {
    chosen.delete(id);
  } else if (chosen.size >= MAX_SHOWN) {
    say(`At most ${MAX_SHOWN} runs over each other`, "error");
  } else {
    const used = new Set(chosen.values());
    chosen.set(id, [1, 2, 3, 4, 5, 6, 7, 8].find((color) => !used.has(color)));
  }
}

// Opens streams of the chosen runs, first of those that have waited longest.
function follow() {
  for (const [id, run] of runs) if (!chosen.has(id)) close(run);
  const open = [...runs.values()].filter((run) => run.stream).length;
  for (const run of waiting().slice(0, Math.max(0, MAX_STREAMS - open))) stream(run);
}

function waiting() {
  const without = [...chosen.keys()].map((id) => runs.get(id)).filter((run) => run && !run.stream && !run.isDone);
  return without.sort((a, b) => a.turn - b.turn);
}

function takeTurns() {
  if (!waiting().length && ++heldTurns < MOST_TURNS) return;
  heldTurns = 0;
  for (const run of runs.values()) close(run);
  follow();
}

function close(run) {
  run.stream?.abort();
  run.stream = null;
}

function stream(run) {
  const control = new AbortController();
  run.stream = control;
  run.turn = ++numTurns;
  events(`${api}/${run.job.id}/events?after=${run.after}`, {
    signal: control.signal,
    onEvent(name, data) {
      if (control.signal.aborted) return;
      if (name === "progress") {
        if (data.number <= run.after) run.lines.clear(); // the run goes on from a checkpoint, and its lines begin anew
        run.lines.set(`${data.line.kind} ${data.line.step}`, data.line);
        if (data.line.kind === "epoch" && Number(parts.which.value) === run.job.id) loadMistakes();
      } else if (name === "state") {
        run.job.state = data.state;
        run.job.reason = data.reason;
        run.isDone = FINAL.has(data.state);
      }
      run.after = data.number;
      soon(run);
    },
    onState(text) {
      if (text !== "live" && run.isDone) {
        close(run);
        follow();
      } else if (text !== "live" && text !== "ended") {
        tell(parts.trouble, `${nameOf(run.job)}: ${text}; trying again.`);
      }
    },
  }).catch((error) => say(error.message, "error"));
}

function soon(run) {
  if (run) stale.add(run);
  drawing ||= setTimeout(() => {
    drawing = 0;
    if (isPressed()) soon();
    else drawRows();
    draw();
  }, DRAW_EVERY_MS);
}

// ---- The table ----

const nameOf = (job) => job.name ?? (job.spec.run_folder.split("/").filter(Boolean).pop() || `job ${job.id}`);

// A run folder does not tell whether somebody has cancelled its run.
const stateOf = (job) => (job.state === "CANCELLED" && !canChange ? "stopped" : job.state.toLowerCase());

const linesOf = (run, kind) => [...run.lines.values()].filter((line) => line.kind === kind).sort((a, b) => a.step - b.step);

const newest = (run, kind, name) => linesOf(run, kind).map((line) => line[name]).filter(Number.isFinite).pop();

function drawTable() {
  if (isPressed()) { setTimeout(drawTable, DRAW_EVERY_MS); return; }
  parts.none.hidden = runs.size > 0;
  const ordered = [...runs.values()].sort((a, b) => b.job.id - a.job.id);
  keepingFocus(() => parts.runs.replaceChildren(...ordered.map((run) => (run.row = row(run)))));
  stale.clear();
  const items = [...chosen.keys()].filter((id) => runs.has(id)).map((id) => [id, nameOf(runs.get(id).job)]);
  const before = parts.which.value;
  parts.which.set(items);
  if (parts.which.value && parts.which.value !== before) loadMistakes();
  parts.galleryCard.hidden = !items.length;
}

function drawRows() {
  keepingFocus(() => {
    for (const run of stale) {
      const before = run.row;
      before?.replaceWith(run.row = row(run));
    }
  });
  stale.clear();
}

const isPressed = () => parts.runs.matches(":active"); // a button that is being pressed stays where it is

function keepingFocus(change) {
  const focused = document.activeElement?.dataset?.action;
  change();
  if (focused) parts.runs.querySelector(`[data-action="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

function row(run) {
  const { job } = run;
  const color = chosen.get(job.id);
  const box = h("input", { type: "checkbox", "aria-label": `Show ${nameOf(job)}`, dataset: { action: `show ${job.id}` },
    onchange: (event) => { hasChosen = true; choose(job.id, event.target.checked); follow(); drawTable(); draw(); } });
  box.checked = color !== undefined;
  const validation = newest(run, "epoch", "val_accuracy") ?? job.figures?.val_accuracy;
  const test = job.state === "SUCCEEDED" ? newest(run, "result", "test_accuracy") ?? job.figures?.test_accuracy : undefined;
  return h("tr", {},
    h("td", {}, h("span", { class: `choose c${color ?? 0}` }, box, color && h("i", { class: "swatch" }))),
    h("td", {}, nameOf(job), job.spec.arguments.length > 0 && h("div", { class: "muted small mono" }, job.spec.arguments.join(" "))),
    h("td", {}, badge(stateOf(job), KINDS[job.state] ?? ""), job.reason && h("div", { class: "muted small" }, job.reason)),
    h("td", {}, progress(run)),
    h("td", {}, percent(validation, 2)),
    h("td", {}, percent(test, 2)),
    h("td", { class: "no-print" }, canChange && actions(job)));
}

function progress(run) {
  const lines = [...run.lines.values()];
  const step = Math.max(run.job.step ?? 0, ...lines.map((line) => line.step));
  const epoch = Math.max(run.job.epoch ?? 0, ...lines.filter((line) => line.kind === "epoch").map((line) => line.epoch));
  const numSteps = lines.map((line) => line.num_steps).filter(Boolean).pop() ?? run.job.num_steps ?? run.job.figures?.num_steps;
  const shown = run.job.num_epochs ? `epoch ${epoch} of ${run.job.num_epochs}` : epoch ? `epoch ${epoch}` : "";
  const text = [shown || `step ${number(step)}`, FINAL.has(run.job.state) ? "" : left(run, step, numSteps)].filter(Boolean).join(", ");
  return [numSteps > 0 && h("progress", { max: numSteps, value: step, "aria-label": text }), h("div", { class: "small muted" }, text)];
}

function left(run, step, numSteps) {
  const timed = [...run.lines.values()].filter((line) => Number.isFinite(line.time)).sort((a, b) => a.step - b.step);
  if (!numSteps || timed.length < 2) return "";
  const [first, last] = [timed[0], timed[timed.length - 1]];
  if (last.step <= first.step || step >= numSteps) return "";
  return `${duration(Math.round(((last.time - first.time) / (last.step - first.step)) * (numSteps - step)))} left`;
}

function actions(job) {
  const act = (verb, text) => button(text, async (event) => {
    event.target.disabled = true;
    try {
      const changed = await postJson(`${api}/${job.id}/${verb}`, {});
      say(`${nameOf(job)}: ${changed.state.toLowerCase()}`);
      await list();
    } catch (error) {
      say(error.message, "error");
    } finally {
      event.target.disabled = false;
    }
  }, { kind: verb === "cancel" ? "small danger" : "small", label: `${text} ${nameOf(job)}` });
  if (!FINAL.has(job.state)) return act("cancel", job.state === "SAVING" ? "End now" : "Cancel");
  return job.state === "SUCCEEDED" ? null : act("retry", "Resume");
}

// ---- Curves ----

function draw() {
  const isDashed = parts.validation.value;
  const make = (stepName, trainName, valName, factor) => [...chosen].flatMap(([id, color]) => {
    const run = runs.get(id);
    if (!run) return [];
    const epochs = linesOf(run, "epoch");
    const steps = linesOf(run, "step");
    const training = steps.length ? [steps, stepName] : [epochs, trainName];
    const series = [curve(`${nameOf(run.job)}, training`, color, ...training, factor)];
    if (isDashed) series.push({ ...curve(`${nameOf(run.job)}, validation`, color, epochs, valName, factor), dashed: true, points: true });
    return series.filter((one) => one.x.length);
  });
  charts.loss.set(make("loss", "train_loss", "val_loss", 1));
  charts.accuracy.set(make("accuracy", "train_accuracy", "val_accuracy", 100));
  charts.speed.set([...chosen].filter(([id]) => runs.has(id)).map(([id, color]) =>
    curve(nameOf(runs.get(id).job), color, linesOf(runs.get(id), "step"), "images_per_second", 1)).filter((one) => one.x.length));
}

function curve(name, color, lines, figure, factor) {
  const there = lines.filter((line) => Number.isFinite(line[figure]));
  return { name, color, x: there.map((line) => line.step), y: there.map((line) => factor * line[figure]), points: there.length < 3 };
}

// ---- Mistakes ----

let kept = [];

async function loadMistakes() {
  const id = parts.which.value;
  if (!id) return;
  const isAtEnd = !kept.length || parts.epoch.value === kept.length;
  let found = [];
  try {
    found = (await getJson(`${api}/${id}/mistakes`, { signal: stopped.signal })).epochs;
  } catch (error) {
    if (error.name !== "AbortError" && error.status !== 404) say(error.message, "error");
  }
  if (id !== parts.which.value) return; // the user has chosen another run meanwhile
  kept = found;
  parts.epoch.input.max = Math.max(1, kept.length);
  parts.epoch.set(isAtEnd ? kept.length : Math.min(parts.epoch.value, kept.length));
  drawMistakes();
}

function drawMistakes() {
  const shown = kept[parts.epoch.value - 1];
  parts.epoch.root.hidden = kept.length < 2;
  const isOver = FINAL.has(runs.get(Number(parts.which.value))?.job.state);
  parts.galleryNote.textContent = !shown ? isOver ? "This run has kept none." : "None yet: they come with each epoch's validation."
    : `After epoch ${shown.epoch}: label → answer, and how sure the network is. These are validation images.`;
  parts.gallery.replaceChildren(...(shown?.mistakes ?? []).map((one) => {
    const canvas = h("canvas", { role: "img", "aria-label": `${one.label}, taken for ${one.predicted}` });
    pixels(canvas, fromBase64(one.pixels), one.width, one.height, one.channels);
    return h("li", {}, canvas, h("span", {}, bdi(one.label), " → ", bdi(one.predicted)), h("span", { class: "muted" }, percent(one.confidence, 0)));
  }));
}
