// The frame: navigation by the address's #hash, sections that are loaded when first shown, and the field for a token.

import { getJson, hasToken, onAccess, setToken } from "./api.js";
import { button, field, h, say, sentence } from "./ui.js";

const main = document.getElementById("main");
const loaded = new Map(); // by name: { section, root, isMounted }
let settings = { sections: [], options: {} };
let current = null; // of `loaded`, and shown
let isShown = false;
let params = new URLSearchParams(); // of the address: a section gets them once

async function start() {
  try {
    settings = await getJson("/web/page.json");
  } catch (error) {
    main.append(h("p", { class: "card error" }, `The page cannot be loaded: ${error.message}.`));
    return;
  }
  document.title = settings.title;
  document.getElementById("title").textContent = settings.title;
  document.getElementById("version").textContent = `Convoy ${settings.version}`;
  await Promise.all(settings.sections.map(load));
  document.getElementById("sections").append(
    ...settings.sections.filter((name) => loaded.has(name)).map((name) =>
      h("a", { href: `#${name}`, dataset: { section: name } }, loaded.get(name).section.title)));
  addAccess();
  addEventListener("hashchange", () => navigate(true));
  document.addEventListener("visibilitychange", () => (document.hidden ? hide() : show()));
  addEventListener("pagehide", hide);
  addEventListener("pageshow", show);
  await navigate(false);
}

async function load(name) {
  try {
    const { section } = await import(`./${name}.js`);
    if (section.styles) await addStyles(name);
    loaded.set(name, { name, section, root: null });
  } catch (error) {
    console.error(error);
    say(`The section ${name} cannot be loaded`, "error");
  }
}

const addStyles = (name) =>
  new Promise((resolve) => {
    document.head.append(h("link", { rel: "stylesheet", href: `/web/${name}.css`, onload: resolve, onerror: resolve }));
  });

const parseHash = () => {
  const [name, query] = location.hash.slice(1).split("?");
  return { name, params: new URLSearchParams(query) };
};

async function navigate(isMove) {
  const { name, params: given } = parseHash();
  if (name === "main" && current) return; // the link that skips to the content
  params = given;
  const next = loaded.get(name) ?? loaded.get(settings.sections.find((other) => loaded.has(other)));
  if (!next) return;
  if (next !== current) {
    hide();
    if (current?.root) current.root.hidden = true;
    current = next;
    delete document.documentElement.dataset.ready;
    for (const link of document.querySelectorAll("nav a")) {
      if (link.dataset.section === next.name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (isMove) scrollTo(0, 0);
  } else {
    hide();
  }
  if (!next.root) {
    next.root = h("section", { "aria-label": next.section.title });
    main.append(next.root);
    await guarded(next, () => next.section.mount(next.root, {
      options: settings.options[next.name] ?? {},
      sections: settings.sections,
      go: (other, values = {}) => {
        const query = new URLSearchParams(values).toString();
        location.hash = query ? `${other}?${query}` : other;
      },
    }));
  }
  if (current !== next) return; // the user has moved on meanwhile
  next.root.hidden = false;
  document.title = `${next.section.title} · ${settings.title}`;
  await show();
  document.documentElement.dataset.ready = next.name;
}

async function show() {
  if (isShown || document.hidden || !current?.root) return;
  isShown = true;
  await guarded(current, async () => {
    await current.section.show?.(params);
    params = new URLSearchParams();
  });
}

function hide() {
  if (!isShown) return;
  isShown = false;
  current.section.hide?.();
}

async function guarded(entry, action) {
  try {
    await action();
    entry.failure?.remove();
  } catch (error) {
    if (error.name === "AbortError") return; // the user has moved on meanwhile
    entry.failure?.remove();
    if (error.status === undefined) console.error(error);
    entry.failure = h("article", { class: "card" },
      h("p", { class: "error" }, `This section cannot be shown: ${error.message}.`),
      h("div", { class: "row" }, button("Try again", () => { hide(); show(); })));
    entry.root.append(entry.failure);
  }
}

// The token's field: shown on request, and when the server asks for a token.
function addAccess() {
  const input = h("input", { type: "password", autocomplete: "off", name: "token", spellcheck: "false" });
  const why = h("p", { class: "muted small" });
  const accept = (text) => { setToken(text); input.value = ""; dialog.close(); hide(); show(); };
  const dialog = h("dialog", { class: "access", "aria-label": "Token" },
    h("form", { class: "stack", onsubmit: (event) => { event.preventDefault(); accept(input.value); } },
      h("h3", {}, "Token"),
      why,
      field("Token of this server", input),
      h("p", { class: "muted small" }, "It stays in this tab's memory and is sent as a header; a reload forgets it."),
      h("div", { class: "row" },
        h("button", { class: "primary" }, "Use"),
        button("Forget", () => accept("")),
        button("Cancel", () => dialog.close(), { kind: "quiet" }))));
  const open = button("Token", () => { why.textContent = ""; dialog.showModal(); }, { kind: "small" });
  open.hidden = true; // a server without tokens asks for none
  document.getElementById("access").append(open, dialog);
  onAccess((error) => {
    open.hidden = false;
    open.textContent = hasToken() ? "Token set" : "Token";
    if (!error || dialog.open) return;
    why.textContent = sentence(error.message);
    dialog.showModal();
  });
}

start();
