// A station of the pipeline: a box with its figures, and below them a gauge, squares, columns or a curve.

import { reconcile, s, say } from "./dom.js";
import { canvas, sparkline } from "./sparkline.js";

const PAD = 13;
const UNITS_PER_ROW = 16;

export class Station {
  constructor(name, title, { x, y }, width, height) {
    this.name = name;
    this.width = width;
    const low = height < 140;
    this.value = s("tspan", { class: "station-value" });
    this.unit = s("tspan", { class: "station-unit", dx: 6 });
    this.figure = s("text", { x: PAD, y: low ? 60 : 66 }, this.value, this.unit);
    this.text = s("text", { x: PAD, y: low ? 80 : 90, class: "station-text" });
    this.extra = s("g", { transform: `translate(${PAD},${low ? 92 : 106})` });
    this.tag = s("g", { class: "station-tag" });
    this.element = s(
      "g",
      { class: `station station-${name}`, transform: `translate(${x},${y})` },
      s("rect", { class: "station-box", width, height, rx: 10 }),
      s("text", { x: PAD, y: 28, class: "station-title", text: title }),
      this.figure,
      this.text,
      this.extra,
      this.tag,
    );
  }

  set(view, limits) {
    say(this.value, view.value);
    say(this.unit, view.unit);
    say(this.text, view.text);
    const room = this.width - 2 * PAD;
    fit(this.figure, room);
    fit(this.text, room);
    this.element.classList.toggle("limit", limits);
    if (limits && !this.tag.firstChild) this.tag.append(...bottleneckTag(this.width));
    if (!limits) this.tag.replaceChildren();
    if (view.gauge) drawGauge(this.extra, room, view.gauge);
    if (view.units) drawUnits(this.extra, room, view.units);
    if (view.bars) drawBars(this.extra, room, view.bars);
    if (view.curve) drawCurve(this.extra, room, view.curve);
  }
}

/** Draws letters closer where a text is too long. */
function fit(text, room) {
  text.removeAttribute("textLength");
  if (text.getComputedTextLength() <= room) return;
  text.setAttribute("textLength", room);
  text.setAttribute("lengthAdjust", "spacingAndGlyphs");
}

function bottleneckTag(width) {
  const w = 92;
  return [
    s("rect", { x: width - w - 10, y: -11, width: w, height: 22, rx: 11 }),
    s("text", { x: width - w / 2 - 10, y: 4, "text-anchor": "middle", text: "▲ bottleneck" }),
  ];
}

/** A bar: what is used, over what is reserved. */
function drawGauge(group, room, { used, reserved = 0 }) {
  if (!group.firstChild)
    for (const part of ["base", "reserved", "used"])
      group.append(s("rect", { class: `gauge-${part}`, y: 6, height: 10, rx: 5 }));
  const shares = [1, reserved, used];
  [...group.children].forEach((bar, i) =>
    bar.setAttribute("width", shares[i] > 0 ? Math.max(3, Math.min(1, shares[i]) * room) : 0),
  );
}

/** A square for each worker or rank, coloured and marked by what it does. */
function drawUnits(group, room, units) {
  const perRow = units.length > UNITS_PER_ROW ? Math.ceil(units.length / 2) : Math.max(units.length, 8);
  const pitch = Math.min(16, room / perRow);
  const size = Math.max(2, pitch - (pitch > 8 ? 4 : 1.2));
  const cells = reconcile(
    group,
    units.map((unit) => unit.key),
    () => s("rect", { rx: Math.min(3, size / 4) }),
  );
  cells.forEach((cell, i) => {
    cell.setAttribute("x", (i % perRow) * pitch);
    cell.setAttribute("y", Math.floor(i / perRow) * pitch + (units.length > UNITS_PER_ROW ? 0 : 5));
    cell.setAttribute("width", size);
    cell.setAttribute("height", size);
    cell.setAttribute("class", `unit unit-${units[i].state}`);
  });
}

/** A column for each rank: steps that are fetched and wait for it. */
function drawBars(group, room, bars) {
  const pitch = Math.min(14, room / Math.max(8, bars.length));
  const width = Math.max(2, pitch - (pitch > 6 ? 5 : 1));
  const columns = reconcile(
    group,
    bars.map((bar) => bar.key),
    () =>
      s("g", {}, s("rect", { class: "gauge-base", y: 2, height: 20, rx: 2 }), s("rect", { class: "queue-bar", rx: 2 })),
  );
  columns.forEach((column, i) => {
    const [base, filled] = column.children;
    const height = 20 * bars[i].height;
    for (const bar of [base, filled]) bar.setAttribute("x", i * pitch);
    for (const bar of [base, filled]) bar.setAttribute("width", width);
    filled.setAttribute("y", 22 - height);
    filled.setAttribute("height", height);
  });
}

function drawCurve(group, room, [xs, values]) {
  if (!group.firstChild) group.append(canvas("station-curve", { width: room, height: 24 }));
  sparkline(group.firstChild, xs, values);
}
