// Models of the server, how they see an image, and inferences: what the sections share.

import { getJson, request } from "./api.js";
import { fromBase64 } from "./ui.js";

export const listModels = () => getJson("/web/api/models");

// What was last drawn or shown, as the network sees it: { model, version, shape, pixels, labels }. Null before that.
export const seen = { picture: null };

const path = (model, verb) => `/web/api/models/${encodeURIComponent(model)}/${verb}`;

// Returns what the network sees of an image file: { version, shape, pixels }.
export async function prepare(model, file, signal) {
  const answer = await (await request(path(model, "prepare"), { method: "POST", body: file, signal })).json();
  return { ...answer, pixels: fromBase64(answer.pixels) };
}

export const save = async (model, file, label) =>
  (await request(`${path(model, "save")}?${new URLSearchParams({ label })}`, { method: "POST", body: file })).json();

// Returns what the first layers make of pixels.
export async function layersOf(model, pixels, signal) {
  const answer = await (await request(path(model, "layers"), { method: "POST", body: pixels, signal })).json();
  const values = (part) => part && { ...part, data: fromBase64(part.data) };
  return answer.layers.map((layer) => ({ ...layer, maps: values(layer.maps), filters: values(layer.filters) }));
}

// Returns { version, rows }: probabilities of the classes for each of the images in `pixels`, one after the other.
// The bytes travel as they are, behind a head in JSON (the protocol's binary extension).
export async function classify(model, input, pixels, signal) {
  const numRows = pixels.length / input.shape.reduce((a, b) => a * b);
  const shape = input.max_batch_size ? [numRows, ...input.shape] : input.shape;
  const head = new TextEncoder().encode(JSON.stringify({
    inputs: [{ name: input.name, datatype: "UINT8", shape, parameters: { binary_data_size: pixels.length } }],
    outputs: [{ name: "probabilities" }],
  }));
  const body = new Uint8Array(head.length + pixels.length);
  body.set(head);
  body.set(pixels, head.length);
  const answer = await (await request(`/v2/models/${encodeURIComponent(model)}/infer`, {
    method: "POST",
    headers: { "content-type": "application/octet-stream", "inference-header-content-length": String(head.length) },
    body,
    signal,
  })).json();
  const { data } = answer.outputs[0];
  const size = data.length / numRows;
  return {
    version: answer.model_version,
    rows: Array.from({ length: numRows }, (_, i) => data.slice(i * size, (i + 1) * size)),
  };
}

export const label = (labels, index) => labels[index] ?? String(index);

// Returns the indices of the largest probabilities, largest first.
export const best = (probabilities, number) =>
  probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]).slice(0, number);

// Calls an asynchronous function whenever asked, one call at a time: of requests in between, the last counts.
export function latest(action) {
  let running = null;
  let next = null;
  async function run() {
    while (next) {
      const given = next;
      next = null;
      await action(...given);
    }
    running = null;
  }
  return (...values) => {
    next = values;
    running ??= run();
    return running;
  };
}
