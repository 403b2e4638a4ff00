// Elements, components and formats. Text always becomes a text node: nothing that a user or a file says becomes HTML.

const SVG = "http://www.w3.org/2000/svg";

// Returns an element: `h("p", { class: "muted", onclick: f }, "text", child)`.
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "value" && "value" in element) element.value = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const card = (title, ...children) => h("article", { class: "card" }, title && h("h3", {}, title), ...children);

export const button = (text, onclick, { kind = "", label = null } = {}) =>
  h("button", { type: "button", class: kind, onclick, "aria-label": label }, text);

export const field = (label, control) => h("label", { class: "field" }, h("span", {}, label), control);

let numbered = 0;
export const uniqueId = (name) => `${name}-${++numbered}`;

// A <select>. `items` are [value, text] pairs.
export function choice(label, items, onchange = () => {}) {
  const select = h("select", { onchange: () => onchange(select.value) });
  let shown = "";
  const set = (pairs) => {
    if (JSON.stringify(pairs) === shown) return; // new options would close an open list
    shown = JSON.stringify(pairs);
    const before = select.value;
    select.replaceChildren(...pairs.map(([value, text]) => h("option", { value }, text)));
    if (pairs.some(([value]) => String(value) === before)) select.value = before;
  };
  set(items);
  return {
    root: field(label, select),
    select,
    set,
    get value() { return select.value; },
    set value(value) { select.value = value; },
  };
}

export function slider(label, { min, max, step = 1, value, format = String }, oninput = () => {}) {
  const id = uniqueId("slider");
  const output = h("output", { for: id }, format(value));
  const input = h("input", { id, type: "range", min, max, step });
  input.value = value;
  const show = () => {
    output.textContent = format(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => { show(); oninput(Number(input.value)); });
  show();
  return {
    root: h("div", { class: "slider" }, h("label", { for: id }, label), input, output),
    input,
    get value() { return Number(input.value); },
    set(number) { input.value = number; show(); },
  };
}

export function toggle(label, checked, onchange = () => {}) {
  const input = h("input", { type: "checkbox", onchange: () => onchange(input.checked) });
  input.checked = checked;
  return { root: h("label", { class: "toggle" }, input, label), get value() { return input.checked; } };
}

export const table = (heads, rows) =>
  h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": heads.filter(Boolean).join(", ") },
    h("table", {},
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell)))))));

// A name beside other text, which keeps its order if the name is written from right to left.
export const bdi = (text) => h("bdi", {}, text);

export const badge = (text, kind = "") => h("span", { class: `badge ${kind}` }, text);

// A <pre> with a button that copies its text.
export function code(text, label = "Copy") {
  const pre = h("pre", { tabindex: 0 }, text);
  return h("div", { class: "code" }, pre, button(label, () => copy(pre.textContent), { kind: "small no-print" }));
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied");
  } catch {
    say("The browser does not let this page copy: select the text and press Ctrl-C", "error");
  }
}

// Changes a text of a live region. The same text once more would be read aloud once more.
export function tell(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Shows a message for a few seconds; a screen reader reads it.
export function say(text, kind = "info") {
  const message = h("p", { class: kind }, text);
  const messages = document.getElementById("messages");
  messages.append(message);
  while (messages.childElementCount > 3) messages.firstChild.remove();
  setTimeout(() => message.remove(), kind === "error" ? 9000 : 3500);
}

// Draws uint8 pixels [channels, height, width] onto a canvas, one pixel of it for each.
export function pixels(canvas, data, width, height, channels = 1) {
  canvas.width = width;
  canvas.height = height;
  canvas.classList.add("pixels");
  const image = new ImageData(width, height);
  const plane = width * height;
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = data[(channels === 1 ? 0 : c * plane) + i];
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// What a server says of an error begins without a capital.
export const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;

export const fromBase64 = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

// ---- Formats ----

export function number(x) {
  if (x === null || x === undefined || !Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  if (Number.isInteger(x) || size >= 1000) return Math.round(x).toLocaleString("en");
  if (size !== 0 && size < 0.001) return x.toExponential(1);
  return String(Number(x.toPrecision(3)));
}

export const percent = (x, digits = 1) => (x === null || x === undefined ? "–" : `${(100 * x).toFixed(digits)} %`);

export function milliseconds(seconds) {
  const ms = 1000 * seconds;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms).toLocaleString("en")} ms`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 1) return milliseconds(seconds);
  if (seconds < 90) return `${Number(seconds.toPrecision(3))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.round(minutes / 60);
  return hours < 48 ? `${hours} h` : `${Math.round(hours / 24)} days`;
}

export function age(isoTime) {
  const seconds = (Date.now() - Date.parse(isoTime)) / 1000;
  if (!Number.isFinite(seconds)) return "–";
  return seconds < 1 ? "now" : `${duration(Math.floor(seconds))} ago`;
}

// ---- Theme ----

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export const onTheme = (listener) =>
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => listener());
