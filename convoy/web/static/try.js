// Try: draw or show something, and see what a model makes of it, stroke by stroke.

import { best, classify, label, latest, listModels, prepare, save, seen } from "./models.js";
import { Pad } from "./pad.js";
import { bdi, button, card, choice, code, h, number, percent, pixels, say, sentence } from "./ui.js";

const MAX_BARS = 10;

let models = [];
let model = null;
let options = {};
let pad, picker, answers, headline, facts, sight, sightText, calls, saving, video, camera, stream, spoken, labels, drawing;
let file = null; // what was last sent: a PNG of the sheet, or the user's own file
let controller = new AbortController();

export const section = {
  title: "Try",
  styles: true,

  mount(root, page) {
    options = page.options;
    picker = choice("Model", [], (name) => choose(name));
    pad = new Pad((isDone) => { file = null; isDone ? finish() : ask(); });
    headline = h("p", { class: "headline" });
    facts = h("p", { class: "muted small facts" });
    answers = h("ol", { class: "answers" });
    sight = h("canvas", { class: "sight", role: "img", "aria-label": "What the network sees", width: 1, height: 1 });
    sightText = h("p", { class: "muted small" });
    spoken = h("p", { class: "sr-only", "aria-live": "polite" });
    video = h("video", { class: "pad", hidden: true, muted: true, playsinline: true, "aria-label": "Camera" });
    calls = h("div", { class: "stack" });
    saving = h("div", { class: "stack no-print" });
    root.append(
      h("div", { class: "row end" }, h("h2", { class: "grow" }, "Draw, and watch it decide"), picker.root),
      h("div", { class: "try" },
        h("article", { class: "card sheet" }, pad.canvas, video, controls()),
        card("What it says", headline, answers, facts, spoken),
        h("article", { class: "card" }, h("h3", {}, "What the network sees"), sight, sightText, saving)),
      h("details", { class: "card no-print" }, h("summary", {}, "Ask it from your own code"), calls));
    listenForFiles(root);
  },

  async show(params) {
    models = (await listModels()).filter((each) => each.input);
    picker.set(models.map((each) => [each.name, each.name]));
    if (!models.length) {
      headline.textContent = "No model that takes images is ready.";
      return;
    }
    const wanted = params.get("model") ?? model?.name;
    choose(models.some((each) => each.name === wanted) ? wanted : models[0].name);
    if (params.has("demo")) {
      pad.draw(Number(params.get("demo")) % 10 || 0);
      await ask();
    }
  },

  hide() {
    controller.abort();
    controller = new AbortController();
    stopCamera();
  },
};

function controls() {
  const input = h("input", {
    type: "file", accept: "image/png,image/jpeg,image/webp", hidden: true, "aria-label": "Picture",
    onchange: () => { if (input.files[0]) open(input.files); input.value = ""; },
  });
  camera = button("Camera", () => (stream ? takePicture() : startCamera()));
  drawing = h("p", { class: "muted small" });
  return h("div", { class: "stack no-print" },
    h("div", { class: "row" },
      button("Clear", () => { stopCamera(); pad.clear(); pad.canvas.focus(); }),
      button("Undo", () => pad.undo()),
      button("Picture…", () => input.click()), camera, input),
    drawing);
}

function choose(name) {
  model = models.find((each) => each.name === name);
  picker.value = name;
  drawing.textContent = model.input.method === "mnist"
    ? "Draw a digit. Or drop, paste or photograph one."
    : "Drop, paste or photograph a picture. Or draw one.";
  labels = null;
  describeCalls();
  offerSaving();
  pad.isEmpty && !file ? blank() : ask();
}

function finish() {
  ask();
  announce = true;
}

let announce = false;

const ask = latest(async () => {
  if (!model) return;
  if (pad.isEmpty && !file) { blank(); return; }
  const asked = model;
  const began = performance.now();
  try {
    const sent = file ?? pad.toFile();
    const prepared = await prepare(asked.name, sent, controller.signal);
    const [channels, height, width] = prepared.shape;
    const answer = await classify(asked.name, asked.input, prepared.pixels, controller.signal);
    const ended = performance.now();
    performance.measure("answer", { start: began, end: ended });
    if (asked !== model || (pad.isEmpty && !file)) return;
    pixels(sight, prepared.pixels, width, height, channels);
    sightText.textContent = `${width} × ${height} pixels${channels === 3 ? " in colour" : ""}, `
      + (asked.input.method === "mnist" ? "cut out, fitted and centred as MNIST's were" : "fitted and cropped as in the training");
    seen.picture = { model: asked.name, input: asked.input, labels: asked.labels, version: answer.version, shape: prepared.shape, pixels: prepared.pixels };
    showAnswer(answer, ended - began);
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  }
});

function showAnswer(answer, ms) {
  const [probabilities] = answer.rows;
  const order = best(probabilities, 3);
  if (!order.every((index) => labels?.has(index))) buildBars(probabilities);
  for (const [index, bar] of labels) {
    const value = probabilities[index];
    bar.row.dataset.rank = order.indexOf(index) + 1;
    bar.fill.style.width = `${100 * value}%`;
    bar.text.textContent = percent(value);
  }
  const winner = label(model.labels, order[0]);
  headline.replaceChildren(h("strong", { class: winner.length > 12 && "long" }, winner), h("span", { class: "muted share" }, percent(probabilities[order[0]])));
  const first = order.flatMap((i, rank) => [rank ? ", " : "Top 3: ", bdi(label(model.labels, i)), ` (${percent(probabilities[i])})`]);
  facts.replaceChildren(...first, ` · ${model.name} version ${answer.version} · ${ms.toFixed(1)} ms`);
  if (announce) {
    spoken.textContent = `${winner}, ${percent(probabilities[order[0]], 0)}`;
    announce = false;
  }
}

// A model of few classes has a bar for each, in their order; another one those of the likeliest, until others are.
function buildBars(probabilities) {
  const indices = probabilities.length <= MAX_BARS ? probabilities.map((_, i) => i) : best(probabilities, MAX_BARS);
  labels = new Map(indices.map((index) => {
    const fill = h("i");
    const text = h("span", { class: "value" });
    const row = h("li", {}, h("span", { class: "name", title: label(model.labels, index) }, label(model.labels, index)), h("span", { class: "bar" }, fill), text);
    return [index, { row, fill, text }];
  }));
  answers.replaceChildren(...[...labels.values()].map((bar) => bar.row));
}

function blank() {
  headline.replaceChildren(h("span", { class: "muted" }, model?.input.method === "mnist" ? "Draw a digit" : "Show it a picture"));
  facts.textContent = model ? `${model.name} version ${model.serving} knows ${model.labels.length || "some"} classes.` : "";
  answers.replaceChildren();
  labels = null;
  sight.width = sight.height = 1;
  sight.classList.add("pixels");
  sightText.textContent = "Nothing yet.";
}

function fail(error) {
  headline.replaceChildren(h("span", { class: "error small" }, sentence(error.message)));
  answers.replaceChildren();
  labels = null;
  facts.textContent = "";
}

// ---- Pictures ----

// Shows the first of some files, and asks the model about it. What cannot be shown leaves everything as it is.
async function open(files) {
  stopCamera();
  const [given] = files;
  const megabytes = (bytes) => `${number(bytes / 1e6)} MB`;
  if (given.size > options.max_bytes) {
    say(`${given.name} has ${megabytes(given.size)}; this server takes at most ${megabytes(options.max_bytes)}`, "error");
    return;
  }
  try {
    pad.show(await createImageBitmap(given));
  } catch {
    say(`The browser cannot read ${given.name || "this file"}: JPEG, PNG and WebP work`, "error");
    return;
  }
  if (files.length > 1) say(`One at a time: this is ${given.name}, the first of ${files.length} files`);
  file = given;
  labels = null;
  announce = true;
  ask();
}

// On the whole page: a browser leaves it for a file that is dropped beside the section.
function listenForFiles(root) {
  const isElsewhere = (event) => root.hidden || event.target.closest?.("dialog");
  document.addEventListener("dragover", (event) => {
    if (isElsewhere(event)) return;
    event.preventDefault();
    pad.canvas.classList.add("over");
  });
  document.addEventListener("dragleave", () => pad.canvas.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    if (isElsewhere(event)) return;
    event.preventDefault();
    pad.canvas.classList.remove("over");
    if (event.dataTransfer.files.length) open(event.dataTransfer.files);
    else say("Drop the file of an image", "error");
  });
  document.addEventListener("paste", (event) => {
    if (isElsewhere(event)) return;
    event.preventDefault();
    if (event.clipboardData.files.length) open(event.clipboardData.files);
    else say("The clipboard holds no image", "error");
  });
}

const NO_CAMERA = {
  NotAllowedError: "The browser does not let this page use the camera",
  NotFoundError: "This device has no camera",
};

async function startCamera() {
  const { signal } = controller;
  camera.disabled = true; // while the browser asks its user
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    say(isSecureContext ? NO_CAMERA[error.name] ?? `The camera does not work: ${error.message}` : "A camera needs https", "error");
    return;
  } finally {
    camera.disabled = false;
  }
  if (signal.aborted) { stopCamera(); return; } // the user has left the section meanwhile
  video.srcObject = stream;
  video.hidden = false;
  pad.canvas.hidden = true;
  await video.play();
  camera.textContent = "Take";
}

async function takePicture() {
  const shot = await createImageBitmap(video);
  const canvas = new OffscreenCanvas(shot.width, shot.height);
  canvas.getContext("2d").drawImage(shot, 0, 0);
  await open([await canvas.convertToBlob({ type: "image/jpeg" })]);
}

function stopCamera() {
  if (!stream) return;
  for (const track of stream.getTracks()) track.stop();
  stream = null;
  video.hidden = true;
  pad.canvas.hidden = false;
  camera.textContent = "Camera";
}

// ---- Code and corrections ----

function describeCalls() {
  const name = encodeURIComponent(model.name).replaceAll("'", "%27"); // which would end the shell's quotes
  const url = `${location.origin}/v2/models/${name}/classify?top_k=3`;
  calls.replaceChildren(
    h("p", { class: "muted small" }, "With a file of yours, or with ", button("digit.png", download, { kind: "small" }), ", which is what you see above."),
    h("h3", {}, "curl"),
    code(`curl -F file=@digit.png '${url}'`, "Copy as curl"),
    h("h3", {}, "Python"),
    code([
      "import json",
      "from urllib.request import Request, urlopen",
      "",
      'with open("digit.png", "rb") as file:',
      `    request = Request("${url}", file.read(), {"Content-Type": "image/png"})`,
      "with urlopen(request) as response:",
      '    print(json.load(response)["images"][0]["predictions"])',
    ].join("\n"), "Copy as Python"),
    h("p", { class: "muted small" }, "A server with tokens also needs the header ", h("code", {}, "Authorization: Bearer TOKEN"), "."));
}

async function download() {
  const url = URL.createObjectURL(file ?? pad.toFile());
  h("a", { href: url, download: "digit.png" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function offerSaving() {
  if (!options.saves || !model.labels.length) {
    saving.replaceChildren();
    return;
  }
  const picked = choice("Wrong? It is", [["", "…"], ...model.labels.map((each) => [each, each])]);
  saving.replaceChildren(
    h("div", { class: "row end" }, picked.root, button("Save", async () => {
      if (pad.isEmpty && !file) { say("There is nothing to save"); return; }
      if (!picked.value) { say("Choose what it is"); return; }
      try {
        const saved = await save(model.name, file ?? pad.toFile(), picked.value);
        say(`Saved as ${options.saves}/${saved.file}: ${saved.num_images} ${saved.num_images === 1 ? "image" : "images"} so far`);
        picked.value = "";
      } catch (error) {
        say(sentence(error.message), "error");
      }
    })),
    h("p", { class: "muted small" }, "To train from what is saved: ", h("code", {}, `convoy train ${options.saves}${model.input.method === "mnist" ? " --no-mirror" : ""}`)));
}
