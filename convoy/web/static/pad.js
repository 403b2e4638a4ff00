// A sheet to draw on: by mouse, pen, finger or keyboard. Strokes are lists of points in the sheet's own units, 0 to 1.

import { fromBase64, h } from "./ui.js";

const SIDE = 280;
const PEN = 0.075; // of the sheet's width
const STEP = 0.03; // of an arrow key
const PAPER = "#ffffff";
const INK = "#16181d";

// Lines of digits, so that the page can draw one by itself.
const ARC = (x, y, across, down, from, to) =>
  Array.from({ length: 25 }, (_, i) => {
    const angle = ((from + ((to - from) * i) / 24) * Math.PI) / 180;
    return [x + across * Math.cos(angle), y + down * Math.sin(angle)];
  });
const DIGITS = [
  [ARC(0.5, 0.5, 0.24, 0.34, -90, 275)],
  [[[0.38, 0.28], [0.54, 0.16], [0.5, 0.84]]],
  [[...ARC(0.49, 0.35, 0.23, 0.19, -160, 30), [0.52, 0.62], [0.26, 0.83], [0.76, 0.81]]],
  [[...ARC(0.46, 0.33, 0.21, 0.17, -150, 85), ...ARC(0.46, 0.67, 0.25, 0.18, -90, 150)]],
  [[[0.5, 0.16], [0.22, 0.58], [0.78, 0.56]], [[0.6, 0.36], [0.57, 0.86]]],
  [[[0.74, 0.18], [0.37, 0.17], [0.32, 0.45], ...ARC(0.47, 0.63, 0.24, 0.21, -120, 140)]],
  [[[0.61, 0.15], [0.38, 0.4], ...ARC(0.48, 0.64, 0.21, 0.2, 190, 540)]],
  [[[0.26, 0.19], [0.75, 0.17], [0.56, 0.5], [0.44, 0.85]]],
  [[...ARC(0.5, 0.33, 0.18, 0.17, 90, 450), ...ARC(0.5, 0.67, 0.22, 0.18, -90, 270)]],
  [[...ARC(0.48, 0.36, 0.2, 0.2, 10, -345), [0.68, 0.5], [0.6, 0.86]]],
];

export class Pad {
  // `onchange(isDone)` is called while a line grows, with false, and after each stroke, with true.
  constructor(onchange) {
    this.onchange = onchange;
    this.strokes = [];
    this.stroke = null; // that the pointer draws: what is taken away meanwhile stays away
    this.cursor = null; // of the keyboard: { x, y, isDown }
    this.image = null; // a picture in place of strokes: ImageBitmap
    this.canvas = h("canvas", {
      class: "pad", width: SIDE, height: SIDE, tabindex: 0, role: "application",
      "aria-label": "Sheet to draw on. Arrow keys move the pen, the space bar puts it down or lifts it, Backspace undoes, Delete clears.",
    });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.listen();
    this.paint();
  }

  get isEmpty() { return !this.strokes.length && !this.image; }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !event.isPrimary || this.image) return;
      event.preventDefault();
      canvas.focus({ preventScroll: true });
      canvas.setPointerCapture(event.pointerId);
      this.cursor = null;
      this.stroke = [this.place(event)];
      this.strokes.push(this.stroke);
      this.changed(false);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.stroke || !event.isPrimary) return;
      const events = event.getCoalescedEvents?.() ?? [];
      for (const each of events.length ? events : [event]) this.stroke.push(this.place(each));
      this.changed(false);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, (event) => {
        if (!this.stroke || !event.isPrimary) return;
        this.stroke = null;
        this.changed(true);
      });
    }
    canvas.addEventListener("keydown", (event) => this.press(event));
    canvas.addEventListener("blur", () => { this.cursor = null; this.paint(); });
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || this.image) return;
    const [dx, dy] = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] }[event.key] ?? [0, 0];
    const cursor = (this.cursor ??= { x: 0.5, y: 0.25, isDown: false });
    if (dx || dy) {
      cursor.x = Math.min(0.97, Math.max(0.03, cursor.x + dx));
      cursor.y = Math.min(0.97, Math.max(0.03, cursor.y + dy));
      if (cursor.isDown) this.strokes.at(-1).push([cursor.x, cursor.y]);
    } else if (event.key === " " || event.key === "Enter") {
      cursor.isDown = !cursor.isDown;
      if (cursor.isDown) this.strokes.push([[cursor.x, cursor.y]]);
    } else if (event.key === "Backspace") {
      this.undo();
    } else if (event.key === "Delete") {
      this.clear();
    } else {
      return;
    }
    event.preventDefault();
    this.changed(!cursor.isDown);
  }

  undo() {
    this.strokes.pop();
    this.image = null;
    if (this.cursor) this.cursor.isDown = false;
    this.changed(true);
  }

  clear() {
    this.strokes = [];
    this.image = null;
    if (this.cursor) this.cursor.isDown = false;
    this.changed(true);
  }

  draw(digit) {
    this.image = null;
    this.strokes = DIGITS[digit].map((stroke) => [...stroke]);
    this.changed(true);
  }

  // Shows a picture in place of strokes.
  show(bitmap) {
    this.strokes = [];
    this.image = bitmap;
    this.paint();
  }

  changed(isDone) {
    this.paint();
    this.onchange(isDone);
  }

  paint() {
    this.paintOn(this.context);
    if (this.cursor) {
      const { x, y, isDown } = this.cursor;
      this.context.beginPath();
      this.context.arc(x * SIDE, y * SIDE, 0.6 * PEN * SIDE, 0, 2 * Math.PI);
      this.context.strokeStyle = isDown ? "#c2500a" : "#1f5fd6";
      this.context.lineWidth = 3;
      this.context.stroke();
    }
  }

  paintOn(context) {
    context.fillStyle = PAPER;
    context.fillRect(0, 0, SIDE, SIDE);
    if (this.image) {
      const scale = Math.min(SIDE / this.image.width, SIDE / this.image.height);
      const [width, height] = [scale * this.image.width, scale * this.image.height];
      context.drawImage(this.image, (SIDE - width) / 2, (SIDE - height) / 2, width, height);
    }
    context.strokeStyle = INK;
    context.lineWidth = PEN * SIDE;
    context.lineCap = context.lineJoin = "round";
    for (const stroke of this.strokes) {
      context.beginPath();
      context.moveTo(stroke[0][0] * SIDE, stroke[0][1] * SIDE);
      for (const [x, y] of stroke.length > 1 ? stroke : [stroke[0], stroke[0]]) context.lineTo(x * SIDE, y * SIDE);
      context.stroke();
    }
  }

  // Returns the strokes as a PNG file, without the keyboard's pen.
  toFile() {
    this.paintOn(this.context);
    const [, text] = this.canvas.toDataURL("image/png").split(","); // at once; toBlob waits until the browser is idle
    if (this.cursor) this.paint();
    return new Blob([fromBase64(text)], { type: "image/png" });
  }
}
