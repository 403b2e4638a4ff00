// Inside: what the first layers make of the last picture, what a place in a map sees, and which pixels decide.

import { heatmap, parseColor } from "./charts.js";
import { best, classify, label, layersOf, listModels, prepare, seen } from "./models.js";
import { Pad } from "./pad.js";
import { bdi, button, card, css, h, number, onTheme, percent, pixels, say, sentence } from "./ui.js";

const PARALLEL = 6; // requests, as many as a browser sends at once
const MOST_PLACES = 200; // of the occlusion map

let page, body, empty, what, tabs, maps, reading, image, overlay, patch, filter, patches, filterBox, occlusion, occlusionText, hideText, covering;
let picture = null;
let layers = [];
let chosen = { layer: 0, map: 0, row: 0, column: 0 };
let hiding = null; // the last occlusion map
let controller = new AbortController();

export const section = {
  title: "Inside",
  styles: true,

  mount(root, given) {
    page = given;
    what = h("p", { class: "lead" });
    empty = h("article", { class: "card" },
      h("p", {}, "Draw something under Try, and come back: this page shows what happens to it inside the network."),
      h("div", { class: "row no-print" },
        button("Draw", () => page.go("try"), { kind: "primary" }),
        button("Show me a 4", () => demo(4).catch((error) => say(sentence(error.message), "error")))));
    tabs = h("div", { class: "row tabs no-print", role: "group", "aria-label": "Layer" });
    maps = h("div", { class: "maps", tabindex: 0, role: "application", "aria-label": "Maps: arrow keys move the place, Page Up and Page Down change the map" });
    reading = h("p", { class: "small", "aria-live": "polite" });
    image = h("canvas", { role: "img", "aria-label": "What the network sees" });
    overlay = h("div", { class: "overlay" });
    patch = h("canvas", { role: "img", "aria-label": "The pixels that this place sees" });
    filter = h("canvas", { role: "img", "aria-label": "The weights of this map's filter" });
    filterBox = h("figure", {}, filter, h("figcaption", {}, "× filter"));
    patches = h("div", { class: "patches" }, h("figure", {}, patch, h("figcaption", {}, "It sees")), filterBox);
    occlusion = h("canvas", { class: "occlusion", role: "application", tabindex: 0, "aria-label": "Occlusion map: arrow keys choose the place" });
    covering = h("div", { class: "overlay", hidden: true });
    occlusionText = h("p", { class: "muted small" });
    hideText = h("p", { class: "small", "aria-live": "polite" });
    body = h("div", { class: "stack" },
      h("div", { class: "inside" },
        h("div", { class: "stack" },
          card("Maps of the first layers", tabs, maps),
          card("What decides", h("div", { class: "decides" }, h("div", { class: "framed" }, occlusion, covering), h("div", { class: "stack" }, occlusionText, hideText)))),
        card("What one value sees", h("div", { class: "framed" }, image, overlay), patches, reading)));
    root.append(h("h2", {}, "From pixels to features"), what, empty, body);
    listen();
    onTheme(() => { if (!root.hidden && picture) draw(); });
  },

  async show(params) {
    if (params.has("demo") && !seen.picture) await demo(Number(params.get("demo")) % 10 || 0);
    else await load();
  },

  hide() {
    controller.abort();
    controller = new AbortController();
  },
};

async function demo(digit) {
  const models = (await listModels()).filter((each) => each.input);
  const model = models.find((each) => each.input.method === "mnist") ?? models[0];
  if (!model) throw new Error("no model that takes images is ready");
  const pad = new Pad(() => {});
  pad.draw(digit);
  const { version, shape, pixels: values } = await prepare(model.name, pad.toFile());
  seen.picture = { model: model.name, input: model.input, labels: model.labels, version, shape, pixels: values };
  await load();
}

async function load() {
  empty.hidden = seen.picture !== null;
  body.hidden = what.hidden = seen.picture === null;
  if (!seen.picture || seen.picture === picture) return;
  picture = seen.picture;
  hiding = null;
  const [channels, height, width] = picture.shape;
  pixels(image, picture.pixels, width, height, channels);
  what.textContent = `${picture.model} version ${picture.version}`;
  await Promise.all([loadLayers(), hide()]);
}

async function loadLayers() {
  try {
    layers = await layersOf(picture.model, picture.pixels, controller.signal);
  } catch (error) {
    if (error.name === "AbortError") { picture = null; return; }
    layers = [];
    overlay.hidden = patches.hidden = true;
    reading.textContent = "";
    tabs.replaceChildren();
    maps.replaceChildren(h("p", { class: "muted" }, sentence(error.message)));
    return;
  }
  tabs.replaceChildren(...layers.map((layer, i) => {
    const [, height, width] = layer.maps.shape;
    const tab = button(`${i + 1} ${words(layer.operation)}`, () => choose({ layer: i }), { kind: "small" });
    tab.append(h("span", { class: "muted" }, ` ${layer.num_maps} × ${height}×${width}`));
    return tab;
  }));
  overlay.hidden = patches.hidden = false;
  what.textContent += ". Point at a map, or move with the arrow keys, to see which pixels a value depends on.";
  choose({ layer: 0, map: strongest(layers[0]) }, true);
}

const words = (operation) => ({ Conv: "convolution", MaxPool: "max-pooling", AveragePool: "average pooling", Relu: "ReLU" })[operation] ?? operation;

const valueAt = (part, i) => part.low + (part.data[i] / 255) * (part.high - part.low);

function mapValues(layer, map) {
  const [, height, width] = layer.maps.shape;
  return Array.from({ length: height * width }, (_, i) => valueAt(layer.maps, map * height * width + i));
}

// Returns the map with the largest value.
function strongest(layer) {
  const [, height, width] = layer.maps.shape;
  return Math.floor(layer.maps.data.indexOf(255) / (height * width));
}

function choose(change, isNew = false) {
  const layerChanges = isNew || (change.layer !== undefined && change.layer !== chosen.layer);
  chosen = { ...chosen, ...change };
  const layer = layers[chosen.layer];
  const [count, height, width] = layer.maps.shape;
  if (layerChanges) {
    if (change.map === undefined) chosen.map = strongest(layer);
    const values = mapValues(layer, chosen.map);
    const top = values.indexOf(Math.max(...values));
    [chosen.row, chosen.column] = [Math.floor(top / width), top % width];
  }
  chosen.map = Math.min(count - 1, Math.max(0, chosen.map));
  chosen.row = Math.min(height - 1, Math.max(0, chosen.row));
  chosen.column = Math.min(width - 1, Math.max(0, chosen.column));
  if (layerChanges) drawMaps();
  drawPlace();
}

function draw() {
  if (layers.length) { drawMaps(); drawPlace(); }
  if (hiding) drawOcclusion();
}

function drawMaps() {
  const layer = layers[chosen.layer];
  const [count, height, width] = layer.maps.shape;
  const limit = Math.max(Math.abs(layer.maps.low), Math.abs(layer.maps.high));
  maps.replaceChildren(...Array.from({ length: count }, (_, map) => {
    const canvas = h("canvas", { dataset: { map } });
    heatmap(canvas, mapValues(layer, map), width, height, { diverging: true, min: -limit, max: limit });
    return h("div", { class: "map" }, canvas, h("i"));
  }));
  [...tabs.children].forEach((tab, i) => tab.setAttribute("aria-pressed", String(i === chosen.layer)));
}

function drawPlace() {
  const layer = layers[chosen.layer];
  const [, height, width] = layer.maps.shape;
  const { map, row, column } = chosen;
  [...maps.children].forEach((child, i) => child.classList.toggle("chosen", i === map));
  const mark = maps.children[map].querySelector("i");
  place(mark, column / width, row / height, 1 / width, 1 / height);
  const [, imageHeight, imageWidth] = picture.shape;
  const top = layer.start[0] + layer.stride[0] * row;
  const left = layer.start[1] + layer.stride[1] * column;
  const [down, across] = layer.size;
  const [y0, x0] = [Math.max(0, top), Math.max(0, left)];
  const [y1, x1] = [Math.min(imageHeight, top + down), Math.min(imageWidth, left + across)];
  place(overlay, x0 / imageWidth, y0 / imageHeight, (x1 - x0) / imageWidth, (y1 - y0) / imageHeight);
  drawPatch(top, left, down, across);
  filterBox.hidden = !layer.filters;
  if (layer.filters) {
    const [, channels, rows, columns] = layer.filters.shape;
    const size = channels * rows * columns;
    const weights = Array.from({ length: rows * columns }, (_, i) => {
      let sum = 0;
      for (let c = 0; c < channels; c++) sum += valueAt(layer.filters, map * size + c * rows * columns + i);
      return sum;
    });
    heatmap(filter, weights, columns, rows, { diverging: true });
  }
  const value = valueAt(layer.maps, (map * height + row) * width + column);
  reading.textContent = `Map ${map + 1} of ${layer.num_maps}, row ${row + 1}, column ${column + 1}: ${number(Number(value.toPrecision(3)))}. `
    + `It sees ${down} × ${across} pixels: rows ${y0 + 1} to ${y1}, columns ${x0 + 1} to ${x1}.`;
}

const place = (element, left, top, width, height) => {
  element.style.left = `${100 * left}%`;
  element.style.top = `${100 * top}%`;
  element.style.width = `${100 * width}%`;
  element.style.height = `${100 * height}%`;
};

function drawPatch(top, left, down, across) {
  const [channels, height, width] = picture.shape;
  const data = new Uint8Array(channels * down * across);
  for (let c = 0; c < channels; c++) {
    for (let y = 0; y < down; y++) {
      for (let x = 0; x < across; x++) {
        const [row, column] = [top + y, left + x];
        if (row < 0 || column < 0 || row >= height || column >= width) continue;
        data[(c * down + y) * across + x] = picture.pixels[(c * height + row) * width + column];
      }
    }
  }
  pixels(patch, data, across, down, channels);
}

function listen() {
  const pointed = (event) => {
    const canvas = event.target.closest?.("canvas[data-map]");
    if (!canvas) return;
    const box = canvas.getBoundingClientRect();
    choose({
      map: Number(canvas.dataset.map),
      row: Math.floor(((event.clientY - box.top) / box.height) * canvas.height),
      column: Math.floor(((event.clientX - box.left) / box.width) * canvas.width),
    });
  };
  maps.addEventListener("pointermove", pointed);
  maps.addEventListener("pointerdown", pointed);
  maps.addEventListener("keydown", (event) => {
    const { map, row, column } = chosen;
    const change = {
      ArrowLeft: { column: column - 1 }, ArrowRight: { column: column + 1 }, ArrowUp: { row: row - 1 }, ArrowDown: { row: row + 1 },
      PageUp: { map: map - 1 }, PageDown: { map: map + 1 },
    }[event.key];
    if (!change || !layers.length) return;
    event.preventDefault();
    choose(change);
  });
  occlusion.addEventListener("pointermove", (event) => {
    const box = occlusion.getBoundingClientRect();
    uncover((event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width);
  });
  occlusion.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
    if (down === undefined || !hiding) return;
    event.preventDefault();
    uncover((hiding.row + down + 0.5) / hiding.rows, (hiding.column + right + 0.5) / hiding.columns);
  });
}

// Tells what hiding the place costs that lies so far down and to the right, in parts of the picture's sides.
function uncover(down, right) {
  if (!hiding) return;
  hiding.row = Math.max(0, Math.min(hiding.rows - 1, Math.floor(down * hiding.rows)));
  hiding.column = Math.max(0, Math.min(hiding.columns - 1, Math.floor(right * hiding.columns)));
  place(covering, hiding.column / hiding.columns, hiding.row / hiding.rows, 1 / hiding.columns, 1 / hiding.rows);
  covering.hidden = false;
  const left = hiding.before - hiding.drops[hiding.row * hiding.columns + hiding.column];
  hideText.replaceChildren("With this place hidden, “", bdi(hiding.name), `” has ${percent(left)} in place of ${percent(hiding.before)}.`);
}

// ---- The occlusion map: the same picture, each time with another place hidden, in batches through the server ----

async function hide() {
  const given = picture;
  const { shape, input, labels } = given;
  const [channels, height, width] = shape;
  const size = Math.max(2, Math.round(Math.min(height, width) / 6));
  let step = Math.max(1, Math.floor(Math.min(height, width) / 14));
  while (Math.ceil(height / step) * Math.ceil(width / step) > MOST_PLACES) step++;
  const [rows, columns] = [Math.ceil(height / step), Math.ceil(width / step)];
  const hidden = [];
  const ground = groundOf(given);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      hidden.push(covered(given, Math.round((row + 0.5) * step - size / 2), Math.round((column + 0.5) * step - size / 2), size, ground));
    }
  }
  occlusionText.textContent = `Hiding ${hidden.length} places …`;
  hideText.textContent = "";
  covering.hidden = true;
  const together = Math.max(1, Math.min(input.max_batch_size || 1, 32, Math.floor((4 << 20) / given.pixels.length)));
  const parts = [[given.pixels]];
  for (let i = 0; i < hidden.length; i += together) parts.push(hidden.slice(i, i + together));
  const began = performance.now();
  try {
    const answers = await inParallel(parts.map((part) => () => classify(given.model, input, joined(part), controller.signal)));
    if (given !== picture) return;
    const ms = performance.now() - began;
    const [before] = answers[0].rows;
    const [winner] = best(before, 1);
    const drops = answers.slice(1).flatMap((answer) => answer.rows).map((row) => before[winner] - row[winner]);
    const [most] = best(drops, 1);
    hiding = { rows, columns, drops, before: before[winner], name: label(labels, winner), row: Math.floor(most / columns), column: most % columns };
    occlusionText.replaceChildren("The bluer a place, the more hiding it costs “", bdi(hiding.name), `” (${percent(before[winner])}). `
      + `${hidden.length} images of ${size} × ${size} hidden pixels in ${parts.length - 1} requests, ${Math.round(ms)} ms.`);
    drawOcclusion();
  } catch (error) {
    if (error.name === "AbortError") { picture = null; return; }
    occlusionText.textContent = sentence(error.message);
  }
}

// The middle of the outermost pixels' values, which hides best: black for digits.
function groundOf({ pixels: values, shape: [channels, height, width] }) {
  return Array.from({ length: channels }, (_, c) => {
    const edge = [];
    for (let x = 0; x < width; x++) edge.push(values[c * height * width + x], values[(c * height + height - 1) * width + x]);
    return edge.sort((a, b) => a - b)[edge.length >> 1];
  });
}

function covered({ pixels: values, shape: [channels, height, width] }, top, left, size, ground) {
  const copy = values.slice();
  for (let c = 0; c < channels; c++) {
    for (let y = Math.max(0, top); y < Math.min(height, top + size); y++) {
      const start = (c * height + y) * width;
      copy.fill(ground[c], start + Math.max(0, left), start + Math.min(width, Math.max(0, left + size)));
    }
  }
  return copy;
}

function joined(parts) {
  const all = new Uint8Array(parts.length * parts[0].length);
  parts.forEach((part, i) => all.set(part, i * part.length));
  return all;
}

async function inParallel(tasks) {
  const results = new Array(tasks.length);
  let next = 0;
  const work = async () => {
    while (next < tasks.length) {
      const i = next++;
      results[i] = await tasks[i]();
    }
  };
  await Promise.all(Array.from({ length: PARALLEL }, work));
  return results;
}

function drawOcclusion() {
  const limit = Math.max(0.02, ...hiding.drops.map(Math.abs));
  const [, height, width] = picture.shape;
  const drops = Array.from({ length: height * width }, (_, i) => {
    const row = Math.floor((Math.floor(i / width) / height) * hiding.rows);
    return hiding.drops[row * hiding.columns + Math.floor(((i % width) / width) * hiding.columns)];
  });
  heatmap(occlusion, drops, width, height, { diverging: true, min: -limit, max: limit });
  drawOutline(occlusion, width, height);
}

// Draws the picture itself over the map, faintly, in the colour of text.
function drawOutline(canvas, width, height) {
  const context = canvas.getContext("2d");
  const map = context.getImageData(0, 0, width, height);
  const text = parseColor(css("--text"));
  const [ground] = groundOf(picture);
  for (let i = 0; i < width * height; i++) {
    const strength = (0.4 * Math.abs(picture.pixels[i] - ground)) / 255;
    for (let c = 0; c < 3; c++) map.data[4 * i + c] += strength * (text[c] - map.data[4 * i + c]);
  }
  context.putImageData(map, 0, 0);
}
