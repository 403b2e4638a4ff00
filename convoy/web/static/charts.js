// Charts as SVG, whose colours are CSS variables: dark, light and print come without work.

import { css, h, number, svg } from "./ui.js";

const LEFT = 64; // for numbers such as 10,000 beside the name of the axis
const RIGHT = 12;
const TOP = 10;
const BOTTOM = 38;

// Lines, points and bands over numbers. Returns { root, set(series) }.
export function lineChart(options) {
  const { label, x = "", y = "", height = 240, legend = true } = options;
  const chart = frame(label, legend);
  let series = [];
  let scales = null;

  function draw() {
    const width = chart.width();
    scales = makeScales(series, options, width, height);
    chart.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    chart.svg.setAttribute("height", height);
    chart.svg.replaceChildren(
      axes(scales, width, height, x, y),
      ...series.map((one, i) => drawSeries(one, scales, i)),
      svg("line", { class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden" }));
    chart.setLegend(series);
    chart.describe(series.map((one) => `${one.name}: ${number(lastOf(one.y))}`).join(", "));
  }

  chart.svg.addEventListener("pointermove", (event) => {
    if (!scales || !series.length) return;
    const at = scales.x.invert(event.clientX - chart.svg.getBoundingClientRect().left);
    const found = series.filter((one) => one.x.length).map((one) => [one, nearest(one.x, at)]);
    if (!found.length) return;
    const place = found[0][0].x[found[0][1]];
    const cursor = chart.svg.querySelector(".cursor");
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, scales.x(place));
    cursor.setAttribute("visibility", "visible");
    chart.reading.textContent = `${x} ${number(place)}: `
      + found.map(([one, i]) => `${one.name} ${number(one.y[i])}`).join(", ");
  });
  chart.svg.addEventListener("pointerleave", () => {
    chart.svg.querySelector(".cursor")?.setAttribute("visibility", "hidden");
    chart.reading.textContent = "";
  });
  chart.onResize(draw);
  return { root: chart.root, set(next) { series = next; draw(); } };
}

// Bars with their values. Returns { root, set(bars) }.
export function barChart(options) {
  const { label, x = "", y = "", height = 220, horizontal = false, format = number, max = null } = options;
  const chart = frame(label, false);
  let bars = [];

  function draw() {
    const width = chart.width();
    const most = max ?? (Math.max(...bars.map((bar) => bar.value), 0) || 1);
    const tall = horizontal ? 24 * bars.length + 4 : height;
    chart.svg.setAttribute("viewBox", `0 0 ${width} ${tall}`);
    chart.svg.setAttribute("height", tall);
    chart.svg.replaceChildren(horizontal ? lying(bars, width, most, format) : standing(bars, width, height, most, x, y, format));
    chart.describe(bars.map((bar) => `${bar.name}: ${format(bar.value)}`).join(", "));
  }

  chart.onResize(draw);
  return { root: chart.root, set(next) { bars = next; draw(); } };
}

function lying(bars, width, most, format) {
  const left = Math.min(0.4 * width, 16 + 7.2 * Math.max(1, ...bars.map((bar) => Math.min(bar.name.length, 24))));
  const room = width - left - 62;
  return svg("g", {}, bars.map((bar, i) => {
    const long = Math.max(1, (room * bar.value) / most);
    const kind = `c${bar.color ?? 1}`;
    return svg("g", {},
      svg("text", { x: left - 8, y: 24 * i + 16, "text-anchor": "end", class: bar.strong ? "value" : "" }, shortened(bar.name, 24)),
      svg("rect", { x: left, y: 24 * i + 3, width: long, height: 18, rx: 3, class: kind, fill: "currentColor", opacity: bar.strong === false ? 0.45 : 1 }),
      svg("text", { x: left + long + 6, y: 24 * i + 16, class: "value" }, format(bar.value)));
  }));
}

function standing(bars, width, height, most, x, y, format) {
  const step = (width - LEFT - RIGHT) / Math.max(1, bars.length);
  const room = height - TOP - BOTTOM - 14;
  const every = Math.ceil(Math.max(1, ...bars.map((bar) => 8 * bar.name.length)) / step);
  return svg("g", {},
    svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: height - BOTTOM, y2: height - BOTTOM }),
    bars.map((bar, i) => {
      const high = (room * bar.value) / most;
      const middle = LEFT + step * (i + 0.5);
      return svg("g", {},
        svg("rect", { x: LEFT + step * i + 0.1 * step, y: height - BOTTOM - high, width: 0.8 * step, height: high, rx: Math.min(3, step / 6), class: `c${bar.color ?? 1}`, fill: "currentColor" },
          svg("title", {}, `${bar.name}: ${format(bar.value)}`)),
        i % every === 0 && svg("text", { x: middle, y: height - BOTTOM + 16, "text-anchor": "middle" }, bar.name),
        bar.value > 0 && step > 26 && svg("text", { x: middle, y: height - BOTTOM - high - 4, "text-anchor": "middle", class: "value" }, format(bar.value)));
    }),
    titles(width, height, x, y));
}

// ---- Parts of charts ----

function frame(label, hasLegend) {
  const picture = svg("svg", { role: "img", "aria-label": label });
  const text = h("p", { class: "sr-only" });
  const names = h("ul", { class: "legend" });
  const reading = h("div", { class: "reading", "aria-hidden": "true" });
  const root = h("div", { class: "chart" }, picture, text, hasLegend && names, hasLegend && reading);
  return {
    root,
    svg: picture,
    reading,
    width: () => Math.max(220, Math.round(root.clientWidth || 480)),
    describe: (values) => { text.textContent = values; },
    setLegend: (series) => {
      if (hasLegend) names.replaceChildren(...series.map((one, i) => h("li", {}, h("i", { class: `c${one.color ?? 1 + (i % 8)}${one.dashed ? " dashed" : ""}${one.line === false ? " dots" : ""}` }), one.name)));
    },
    onResize: (draw) => {
      let width = 0;
      new ResizeObserver(() => {
        if (Math.abs(root.clientWidth - width) < 1) return;
        width = root.clientWidth;
        if (width) requestAnimationFrame(draw);
      }).observe(root);
    },
  };
}

function makeScales(series, options, width, height) {
  const xs = series.flatMap((one) => one.x).filter(Number.isFinite);
  const ys = series.flatMap((one) => [...one.y, ...(one.band ? [...one.band.lo, ...one.band.hi] : [])]).filter(Number.isFinite);
  const inner = [TOP, height - BOTTOM];
  return {
    x: makeScale(xs, options.xMin, options.xMax, LEFT, width - RIGHT, options.xLog),
    y: makeScale(ys, options.yMin, options.yMax, inner[1], inner[0], options.log, 0.04),
  };
}

function makeScale(values, min, max, from, to, isLog, margin = 0) {
  const usable = isLog ? values.filter((value) => value > 0) : values;
  let low = min ?? (usable.length ? usable.reduce((a, b) => Math.min(a, b)) : isLog ? 0.1 : 0);
  let high = max ?? (usable.length ? usable.reduce((a, b) => Math.max(a, b)) : 1);
  if (low === high) [low, high] = isLog ? [low / 2, high * 2] : low === min ? [low, low + 1] : [low - 0.5, high + 0.5];
  const forward = isLog ? (value) => Math.log10(Math.max(value, low / 1e6)) : (value) => value;
  let [first, last] = [forward(low), forward(high)];
  const extra = margin * (last - first);
  if (min === undefined) first -= extra;
  if (max === undefined) last += extra;
  const scale = (value) => from + ((forward(value) - first) / (last - first)) * (to - from);
  scale.invert = (place) => {
    const value = first + ((place - from) / (to - from)) * (last - first);
    return isLog ? 10 ** value : value;
  };
  scale.ticks = isLog ? logTicks(first, last) : linearTicks(first, last, Math.abs(to - from) / 60, usable.every(Number.isInteger) ? 1 : 0);
  return scale;
}

function linearTicks(low, high, most, least) {
  const rough = Math.max((high - low) / Math.max(2, most), least); // between whole numbers, such as steps, is nothing
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const factors = high - low > 2.5 ? [1] : high - low > 1 ? [1, 3] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const factor of factors) {
      const at = power + Math.log10(factor);
      if (at >= low - 1e-9 && at <= high + 1e-9) ticks.push(Number((factor * 10 ** power).toPrecision(6)));
    }
  }
  return ticks;
}

function axes(scales, width, height, x, y) {
  const base = height - BOTTOM;
  return svg("g", {},
    scales.y.ticks.map((tick) => [
      svg("line", { class: "grid-line", x1: LEFT, x2: width - RIGHT, y1: scales.y(tick), y2: scales.y(tick) }),
      svg("text", { x: LEFT - 8, y: scales.y(tick) + 4, "text-anchor": "end" }, tickText(tick)),
    ]),
    scales.x.ticks.map((tick) => [
      svg("line", { class: "axis", x1: scales.x(tick), x2: scales.x(tick), y1: base, y2: base + 4 }),
      svg("text", { x: scales.x(tick), y: base + 17, "text-anchor": "middle" }, tickText(tick)),
    ]),
    svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: base, y2: base }),
    titles(width, height, x, y));
}

const tickText = (tick) => (Math.abs(tick) >= 10000 ? `${number(tick / 1000)}k` : number(tick));

const titles = (width, height, x, y) => [
  x && svg("text", { x: (LEFT + width - RIGHT) / 2, y: height - 4, "text-anchor": "middle" }, x),
  y && svg("text", { x: 12, y: (TOP + height - BOTTOM) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(TOP + height - BOTTOM) / 2})` }, y),
];

function drawSeries(one, scales, i) {
  const kind = `c${one.color ?? 1 + (i % 8)}`;
  const group = svg("g", { class: kind });
  const places = one.x.map((value, i) => [scales.x(value), scales.y(one.y[i]), Number.isFinite(one.y[i])]);
  if (one.band) {
    const up = one.x.map((value, i) => `${scales.x(value)},${scales.y(one.band.hi[i])}`);
    const down = one.x.map((value, i) => `${scales.x(value)},${scales.y(one.band.lo[i])}`).reverse();
    group.append(svg("polygon", { class: "band", fill: "currentColor", points: [...up, ...down].join(" ") }));
  }
  if (one.line !== false) {
    let path = "";
    let isDown = false;
    for (const [x, y, isThere] of places) {
      if (isThere) path += `${isDown ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`;
      isDown = isThere;
    }
    group.append(svg("path", { class: "curve", stroke: "currentColor", d: path, "stroke-dasharray": one.dashed ? "6 5" : null }));
  }
  if (one.points) {
    const dots = places.filter(([, , isThere]) => isThere);
    group.append(...dots.map(([x, y]) => svg("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: 3.5, fill: "currentColor" })));
  }
  return group;
}

function nearest(values, at) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (Math.abs(values[i] - at) < Math.abs(values[best] - at)) best = i;
  return best;
}

const lastOf = (values) => values[values.length - 1];

const shortened = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

// ---- Heat maps ----

// Draws values [height, width] onto a canvas, from the page's background to its accent; `diverging` has two colours.
export function heatmap(canvas, values, width, height, { min = null, max = null, diverging = false } = {}) {
  const most = max ?? values.reduce((a, b) => Math.max(a, b), -Infinity);
  const least = min ?? values.reduce((a, b) => Math.min(a, b), Infinity);
  const size = diverging ? Math.max(Math.abs(most), Math.abs(least)) || 1 : most - least || 1;
  const [paper, ink, other] = [css("--surface"), css("--series-1"), css("--series-2")].map(parseColor);
  canvas.width = width;
  canvas.height = height;
  canvas.classList.add("pixels");
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const part = Math.max(-1, Math.min(1, (diverging ? values[i] : values[i] - least) / size));
    const target = part < 0 ? other : ink;
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = paper[c] + Math.abs(part) * (target[c] - paper[c]);
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

export function parseColor(text) {
  const digits = text.replace("#", "");
  const full = digits.length === 3 ? [...digits].map((digit) => digit + digit).join("") : digits;
  return [0, 2, 4].map((start) => parseInt(full.slice(start, start + 2), 16));
}
