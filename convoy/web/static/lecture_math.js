// Least squares, polynomials and SGD, as in the package's trainer/studies.

// The function that the points are drawn from, on [0, 1].
export const trueFunction = (x) => 0.5 + Math.cos(7 * x) * (1 - 0.6 * x) * 0.9;

export const polynomial = (coefficients, x) => coefficients.reduceRight((sum, coefficient) => sum * x + coefficient, 0);

export const meanSquare = (x, y, coefficients) =>
  x.reduce((sum, value, i) => sum + (polynomial(coefficients, value) - y[i]) ** 2, 0) / x.length;

// Returns the coefficients of least squares, by Householder's QR of the Vandermonde matrix.
export function fitPolynomial(x, y, degree) {
  const width = degree + 1;
  const rows = x.map((value, i) => [...Array.from({ length: width }, (_, d) => value ** d), y[i]]);
  for (let k = 0; k < width; k++) {
    const size = Math.hypot(...rows.slice(k).map((row) => row[k]));
    if (size === 0) continue;
    const alpha = rows[k][k] > 0 ? -size : size;
    const v = rows.map((row, i) => (i < k ? 0 : row[k]));
    v[k] -= alpha;
    const norm = v.reduce((sum, value) => sum + value * value, 0);
    for (let j = k; j <= width; j++) {
      const factor = (2 * v.reduce((sum, value, i) => sum + value * rows[i][j], 0)) / norm;
      for (let i = k; i < rows.length; i++) rows[i][j] -= factor * v[i];
    }
  }
  const coefficients = new Array(width).fill(0);
  for (let k = width - 1; k >= 0; k--) {
    let value = rows[k][width];
    for (let j = k + 1; j < width; j++) value -= rows[k][j] * coefficients[j];
    coefficients[k] = value / rows[k][k];
  }
  return coefficients;
}

export function fitLine(x, y) {
  const [intercept, slope] = fitPolynomial(x, y, 1);
  return { slope, intercept };
}

// Normally distributed numbers (Box and Muller).
export const normals = (count) =>
  Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()));

// Yields the line after each step of SGD, which starts from zero. Ages and pressures are standardised, as in the study.
export function* sgdSteps(x, y, { rate, batch, numEpochs, isFalling }) {
  const [ofX, ofY] = [spread(x), spread(y)];
  let [slope, level] = [0, 0];
  for (let epoch = 0; epoch < numEpochs; epoch++) {
    const order = shuffled(x.length);
    const factor = isFalling ? 1 - epoch / numEpochs : 1;
    for (let start = 0; start < order.length; start += batch) {
      const chosen = order.slice(start, start + batch);
      let [forSlope, forLevel] = [0, 0];
      for (const i of chosen) {
        const place = (x[i] - ofX.mean) / ofX.deviation;
        const error = slope * place + level - (y[i] - ofY.mean) / ofY.deviation;
        forSlope += (2 * error * place) / chosen.length;
        forLevel += (2 * error) / chosen.length;
      }
      slope -= rate * factor * forSlope;
      level -= rate * factor * forLevel;
      const real = (slope * ofY.deviation) / ofX.deviation;
      yield { slope: real, intercept: ofY.mean + level * ofY.deviation - real * ofX.mean };
    }
  }
}

function spread(values) {
  const mean = values.reduce((a, b) => a + b) / values.length;
  const deviation = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1));
  return { mean, deviation };
}

function shuffled(count) {
  const order = Array.from({ length: count }, (_, i) => i);
  for (let i = count - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}
