// The lecture's experiments that a browser can do, each with its page and the command that reproduces it in full.

import { barChart, lineChart } from "./charts.js";
import { data } from "./lecture_data.js";
import { fitLine, fitPolynomial, meanSquare, normals, polynomial, sgdSteps, trueFunction } from "./lecture_math.js";
import { button, card, code, h, number, slider, table, toggle } from "./ui.js";

const FRAME_MS = 40;
const MOST = 1000; // mean square error that the figure of degrees draws
let running = new Set(); // the timers of animations

export const section = {
  title: "Lecture",
  styles: true,
  mount(root) {
    root.classList.add("lecture");
    root.append(
      h("h2", {}, "Lecture"),
      h("p", { class: "lead" }, "François Fleuret, Deep Learning in PyTorch, part 1 (AMLD, EPFL, 10 February 2018). What you move here "
        + "is computed in your browser; the command below each figure repeats it in full."),
      h("div", { class: "grid halves" }, regression(), polynomials(), seeds(), networks()),
      others());
  },
  hide() {
    for (const pause of [...running]) pause();
  },
};

const figure = (pages, title, ...children) => {
  const made = card(null, h("h3", {}, title, h("span", { class: "page" }, pages)), ...children);
  made.classList.add("experiment");
  return made;
};

const command = (text) => code(`convoy study ${text}`);

// What lies outside a chart is not drawn.
const inside = (value, low, high) => (value >= low && value <= high ? value : NaN);

// A button that starts and pauses; `step` returns whether there is more to show.
function animation(text, step) {
  let timer = null;
  const pause = () => {
    clearInterval(timer);
    timer = null;
    running.delete(pause);
    play.textContent = text;
  };
  const play = button(text, () => {
    if (timer) return pause();
    running.add(pause);
    play.textContent = "Pause";
    timer = setInterval(() => { if (!step()) pause(); }, FRAME_MS);
  }, { kind: "primary" });
  return { play, pause };
}

// ---- Page 7 ----

function regression() {
  const { ages, pressures } = data.people;
  const best = fitLine(ages, pressures);
  const chart = lineChart({ label: "Systolic blood pressure by age", x: "age, years", y: "mmHg", xMin: 10, xMax: 80, yMin: 60, yMax: 240 });
  const path = lineChart({ label: "Slope after each step of SGD", x: "step", y: "mmHg a year", height: 150, yMin: 0, legend: false });
  const note = h("p", { class: "muted small", "aria-live": "polite" });
  const numEpochs = 60;
  let steps, slopes, line, isDone;

  const restart = () => {
    steps = sgdSteps(ages, pressures, { rate: 10 ** rate.value, batch: batch.value, numEpochs, isFalling: falling.value });
    slopes = [];
    line = { slope: 0, intercept: 0 };
    isDone = false;
    draw();
  };
  const draw = () => {
    const ends = [10, 80];
    const at = (one) => ends.map((age) => inside(one.slope * age + one.intercept, 60, 240));
    chart.set([
      { name: "people (generated)", color: 8, x: ages, y: pressures, points: true, line: false },
      { name: "least squares", color: 2, x: ends, y: at(best), dashed: true },
      { name: "SGD", color: 1, x: slopes.length ? ends : [], y: slopes.length ? at(line) : [] }]);
    const every = Math.ceil(slopes.length / 300);
    const shown = slopes.map((slope, i) => [i + 1, slope]).filter((_, i) => i % every === 0 || i === slopes.length - 1);
    path.set([
      { name: "SGD", color: 1, x: shown.map(([i]) => i), y: shown.map(([, slope]) => slope) },
      { name: "least squares", color: 2, dashed: true, x: [0, Math.max(60, slopes.length)], y: [best.slope, best.slope] }]);
    note.textContent = !slopes.length ? `Least squares: ${best.slope.toFixed(3)} mmHg a year.`
      : !Number.isFinite(line.slope) || Math.abs(line.slope) > 1e3 ? `SGD diverges at step ${slopes.length}: the learning rate is too large.`
        : `Step ${slopes.length}: SGD ${line.slope.toFixed(3)}, least squares ${best.slope.toFixed(3)} mmHg a year.`;
  };
  const advance = (count) => {
    for (let i = 0; i < count && !isDone; i++) {
      const next = steps.next();
      isDone = next.done || Math.abs(next.value.slope) > 1e3 || !Number.isFinite(next.value.slope);
      if (next.done) break;
      line = next.value;
      slopes.push(line.slope);
    }
    draw();
    return !isDone;
  };
  const changed = () => { moving.pause(); restart(); };
  const rate = slider("Learning rate", { min: -3, max: 0.3, step: 0.05, value: -1.3, format: (x) => number(10 ** x) }, changed);
  const batch = slider("Batch", { min: 1, max: 60, value: 10 }, changed);
  const falling = toggle("Let the learning rate fall to zero", true, changed);
  const moving = animation("Play", () => advance(slopes.length < 60 ? 1 : 3));
  restart();
  return figure("page 7", "A line, by SGD",
    h("p", {}, "Blood pressure by age, on generated data. A batch of people pulls the line at each step."),
    chart.root, rate.root, batch.root, falling.root,
    h("div", { class: "row no-print" }, moving.play, button("One step", () => { moving.pause(); advance(1); }), button("Start again", changed)),
    path.root, note, command("regression"));
}

// ---- Pages 46 to 51 ----

function polynomials() {
  const grid = Array.from({ length: 201 }, (_, i) => i / 200);
  let points = { x: data.points.x, z: data.points.z };
  const chart = lineChart({ label: "Points, true function and fitted polynomial", yMin: -1, yMax: 2, xMin: 0, xMax: 1 });
  const errors = lineChart({ label: "Mean square error by degree", x: "degree", y: "mean square error", log: true, height: 200, yMin: 1e-3, yMax: MOST, xMin: 0, xMax: 9 });
  const note = h("p", { "aria-live": "polite" });

  const draw = () => {
    const y = points.x.map((x, i) => trueFunction(x) + noise.value * points.z[i]);
    const fits = Array.from({ length: 10 }, (_, d) => fitPolynomial(points.x, y, d));
    const train = fits.map((fit) => meanSquare(points.x, y, fit));
    // On new points: the distance to the true function, plus the noise that no polynomial can foresee.
    const test = fits.map((fit) => meanSquare(grid, grid.map(trueFunction), fit) + noise.value ** 2);
    chart.set([
      { name: "true function", color: 8, dashed: true, x: grid, y: grid.map(trueFunction) },
      { name: `degree ${degree.value}`, color: 2, x: grid, y: grid.map((x) => inside(polynomial(fits[degree.value], x), -1, 2)) },
      { name: "points", color: 1, x: points.x, y: y.map((value) => inside(value, -1, 2)), points: true, line: false }]);
    const degrees = fits.map((_, d) => d);
    const clamp = (values) => values.map((value) => Math.max(1e-3, Math.min(MOST, value)));
    errors.set([
      { name: "on the points", color: 1, x: degrees, y: clamp(train), points: true },
      { name: "on new points", color: 2, x: degrees, y: clamp(test), points: true },
      { name: "chosen", color: 8, dashed: true, x: [degree.value, degree.value], y: [1e-3, MOST] }]);
    const best = test.indexOf(Math.min(...test));
    const verdict = degree.value < best ? "Under-fitting: a higher degree is better on new points."
      : degree.value > best ? "Over-fitting: better on the points, worse on new ones." : "The best degree for new points.";
    note.textContent = `Degree ${degree.value}: ${number(train[degree.value])} on the points, ${number(test[degree.value])} on new points. ${verdict}`;
  };
  const degree = slider("Degree", { min: 0, max: 9, value: 3 }, () => draw());
  const noise = slider("Noise", { min: 0, max: 0.5, step: 0.01, value: 0.15, format: (x) => x.toFixed(2) }, () => draw());
  const renew = (next) => { points = next; draw(); };
  draw();
  return figure("pages 46 to 51", "Capacity: polynomials",
    h("p", {}, "Polynomials of degree 0 to 9, fitted to 14 points by least squares."),
    chart.root, degree.root, noise.root,
    h("div", { class: "row no-print" },
      button("New points", () => renew({ x: Array.from({ length: 14 }, Math.random), z: normals(14) })),
      button("The study's points", () => renew({ x: data.points.x, z: data.points.z }), { kind: "quiet" })),
    errors.root, note, command("capacity"));
}

// ---- Page 53 ----

function seeds() {
  const width = 0.05;
  const low = width * Math.floor(Math.min(...data.seeds) / width + 1e-9);
  const bins = Array.from({ length: 1 + Math.floor((Math.max(...data.seeds) - low) / width + 1e-9) }, (_, i) => low + i * width);
  const count = (errors) => bins.map((start) => errors.filter((error) => error >= start - 1e-9 && error < start + width - 1e-9).length);
  const chart = barChart({ label: "Runs by test error", x: "test error, % (a bar: from its number up to the next)", y: "runs", max: Math.max(...count(data.seeds)) });
  const summary = h("div", { "aria-live": "polite" });
  let shown = data.seeds.length;

  const draw = () => {
    const errors = data.seeds.slice(0, shown);
    const counts = count(errors);
    chart.set(bins.map((start, i) => ({ name: start.toFixed(2), value: counts[i] })));
    const sorted = [...errors].sort((a, b) => a - b);
    const middle = sorted.length / 2;
    const median = sorted.length % 2 ? sorted[Math.floor(middle)] : (sorted[middle - 1] + sorted[middle]) / 2;
    const row = (name, ...values) => [name, ...values.map((value) => (Number.isFinite(value) ? value.toFixed(2) : "–"))];
    const { worst, best } = data.lectureSeeds;
    summary.replaceChildren(table(["test error, %", "worst", "median", "best"], [
      row(`${shown} runs here`, sorted[sorted.length - 1], median, sorted[0]),
      row("the lecture's 100", worst, data.lectureSeeds.median, best)]));
    return shown < data.seeds.length;
  };
  let wait = 0;
  const moving = animation("Fill it", () => {
    wait = (wait + 1) % 3;
    if (wait) return true;
    shown = shown === data.seeds.length ? 0 : shown + 1;
    return draw();
  });
  draw();
  return figure("page 53", "One recipe, many seeds",
    h("p", {}, "The same training with other random weights and another order of the images. Whoever shows the best seed alone cheats (page 57)."),
    chart.root,
    h("div", { class: "row no-print" }, moving.play, button("Empty it", () => { moving.pause(); shown = 0; draw(); })),
    summary, command("seeds --recipe mnist --runs 100"));
}

// ---- Pages 46 to 51, with networks ----

function networks() {
  const { widths, train, test } = data.networks;
  const chart = lineChart({ label: "Errors of networks by width", x: "hidden units", y: "error, %", xLog: true, yMin: 0, yMax: 80 });
  const note = h("p", { "aria-live": "polite" });
  const draw = () => {
    const i = chosen.value;
    chart.set([
      { name: "on what was taught", color: 1, x: widths, y: train, points: true },
      { name: "on new images", color: 2, x: widths, y: test, points: true },
      { name: "chosen", color: 8, dashed: true, x: [widths[i], widths[i]], y: [0, 80] }]);
    note.textContent = `${widths[i]} hidden ${widths[i] === 1 ? "unit" : "units"}: ${train[i].toFixed(1)} % on what was taught, ${test[i].toFixed(1)} % on new images.`
      + (train[i] === 0 ? " It knows the wrong labels by heart, and is no worse on new images for it." : "");
  };
  const chosen = slider("Hidden units", { min: 0, max: widths.length - 1, value: 4, format: (i) => String(widths[i]) }, draw);
  draw();
  return figure("pages 46 to 51", "Capacity: networks",
    h("p", {}, "Networks of one hidden layer on 500 images of MNIST, of which 15 % have a random label. Means of three networks, computed once by the command."),
    chart.root, chosen.root, note, command("capacity"));
}

// ---- The rest ----

function others() {
  const rows = [
    ["9–12", "A perceptron finds a line where there is one; T and C told apart by shared weights", "convoy study perceptron"],
    ["17", "The chain rule on a graph of operators, by hand and by autograd", "convoy study chain-rule"],
    ["21, 37", "Accuracy, multiply-adds and time of the families of networks", "convoy study zoo"],
    ["35–36", "The price of a FLOP: the lecture's card and this machine", "convoy study flops"],
    ["39", "The lecture's calls then and now; one network in several frameworks", "convoy study frameworks"],
    ["41–42", "The MNIST script as printed, whose loop never runs", "python examples/mnist_2018.py"],
    ["41–42", "The same training as it is written today", "python examples/mnist_today.py"],
    ["48", "The function fit_polynomial whole, with its loops and without", "python examples/fit_polynomial.py"],
    ["54–57", "A search that cannot use the test set", "convoy study sweep --grid lr_scale=0.5,1,2"],
  ];
  return card("More to run", table(["Page", "What", "Command"],
    rows.map(([page, what, text]) => [page, what, h("code", {}, text)])));
}
