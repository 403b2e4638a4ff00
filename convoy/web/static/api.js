// Requests to the server. A token lives in this module's memory alone: not in an address, a cookie or a storage.

let token = "";
const listeners = new Set();

export function setToken(text) {
  token = text.trim().replace(/[^!-~]/g, "?"); // no token has other characters, and no header takes them
  for (const listener of listeners) listener();
}

export const hasToken = () => token !== "";

// Calls a function when the token changes or the server asks for one.
export function onAccess(listener) {
  listeners.add(listener);
}

// Returns the response, or throws an Error with the server's message and `status`.
export async function request(path, init = {}) {
  const headers = new Headers(init.headers);
  if (token) headers.set("authorization", `Bearer ${token}`);
  let response;
  try {
    response = await fetch(path, { ...init, headers, credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Object.assign(new Error("the server does not answer"), { status: 0 });
  }
  if (response.ok) return response;
  const error = new Error(await messageOf(response));
  error.status = response.status;
  if (response.status === 401 || response.status === 403) for (const listener of listeners) listener(error);
  throw error;
}

async function messageOf(response) {
  if (response.status === 401) return token ? "the server does not accept this token" : "the server asks for a token";
  try {
    return String((await response.json()).error);
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

export const getJson = async (path, init = {}) => (await request(path, init)).json();

export const postJson = async (path, value, init = {}) =>
  (await request(path, {
    ...init,
    method: "POST",
    headers: { "content-type": "application/json", ...init.headers },
    body: JSON.stringify(value),
  })).json();

// Follows server-sent events until `signal` is aborted, and connects again after a pause.
// EventSource cannot send a token as a header, so this reads the stream by fetch.
export async function events(path, { onEvent, onState = () => {}, signal }) {
  let pause = 1000;
  let lastId = "";
  while (!signal.aborted) {
    try {
      const headers = { accept: "text/event-stream", ...(lastId && { "last-event-id": lastId }) };
      const response = await request(path, { signal, headers });
      onState("live");
      for await (const event of parse(response.body)) {
        pause = 1000;
        if (event.id) lastId = event.id;
        if (event.data) onEvent(event.name, JSON.parse(event.data));
      }
      onState("ended");
    } catch (error) {
      if (signal.aborted) return;
      onState(error instanceof TypeError ? "the connection broke" : error.message);
      if (error.status === 401 || error.status === 403) return; // until there is another token
    }
    await sleep(pause, signal);
    pause = Math.min(2 * pause, 15000);
  }
}

async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r\n", "\n");
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) yield parseEvent(text.slice(0, end));
  }
}

function parseEvent(block) {
  const event = { name: "message", data: "", id: "" };
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    const [field, value] = [line.slice(0, colon), line.slice(colon + 1).replace(/^ /, "")];
    if (field === "event") event.name = value;
    else if (field === "data") event.data += (event.data && "\n") + value;
    else if (field === "id") event.id = value;
  }
  return event;
}

const sleep = (milliseconds, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
