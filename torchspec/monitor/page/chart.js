// A line chart with its title and a legend that shows the values under the cursor, or else the newest ones.

import uPlot from "./vendor/uplot/uPlot.esm.js";
import { h, say } from "./dom.js";
import { clock, count, moment, span } from "./format.js";

const FONT = '11.5px Inter, system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const all = new Set();

/** A colour of the style sheet, as the theme has it now. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** After a change of theme. */
export function redrawCharts() {
  for (const chart of all) chart.plot?.redraw(false);
}

const AXES = {
  time: {
    values: (_, splits, __, ___, step) => splits.map((t) => (step < 60 ? clock(t) : moment(t, splits.at(-1)))),
    show: (x) => moment(x),
  },
  elapsed: {
    values: (_, splits) => splits.map((x) => span(x).replace(/(?<=[hm])0+[ms]$/, "")),
    show: (x) => `${span(x)} after the start`,
  },
  step: { values: (_, splits) => splits.map(count), show: (x) => `step ${count(x)}` },
};
const SECONDS = [1, 5, 10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800];
const BINARY = Array.from({ length: 50 }, (_, i) => 2 ** i);

/**
 * options: title, note, x ("time" | "elapsed" | "step"), format (of a value), axis (of the axis' values), range
 * ([low, high], each may be null), steps ("binary": of bytes), stacked (shares drawn on top of each other), series: [{label, colour, dash, width,
 * area, hidden (from the legend)}], marks: () => [{time, colour}] drawn as ticks along the top.
 */
export class Chart {
  constructor(parent, options) {
    this.options = { x: "time", axis: options.format, ...options };
    this.legend = h("ul", { class: "legend" });
    this.values = this.options.series.map((series) => {
      const value = h("span", { class: "legend-value" });
      if (!series.hidden) this.legend.append(h("li", {}, swatch(series), h("span", { text: series.label }), value));
      return value;
    });
    this.when = h("span", { class: "chart-when" });
    this.title = h("h3", { text: options.title });
    this.area = h("div", { class: "plot", role: "img", "aria-label": options.title });
    this.empty = h("p", { class: "nothing", text: "no data yet" });
    const note = options.note && h("span", { class: "chart-note", text: options.note });
    const head = h("figcaption", {}, h("div", { class: "chart-head" }, this.title, note, this.when), this.legend);
    this.figure = h("figure", { class: "chart panel" }, head, this.area, this.empty);
    parent.append(this.figure);
    this.area.addEventListener("dblclick", () => (this.zoomed = false));
    new ResizeObserver(() => this.#resize()).observe(this.area);
    all.add(this);
  }

  /** columns: the x values, then those of each series; null where there are none. */
  set(columns) {
    this.columns = columns;
    const drawn = columns[0].length > 1;
    this.area.hidden = !drawn;
    this.empty.hidden = drawn;
    if (!drawn) return;
    this.drawn = this.options.stacked ? stack(columns) : columns;
    if (this.plot) this.plot.setData(this.drawn, !this.zoomed);
    else this.#create();
    this.#tell(this.plot?.cursor.idx);
  }

  remove() {
    this.plot?.destroy();
    this.figure.remove();
    all.delete(this);
  }

  #create() {
    const width = this.area.clientWidth;
    if (width === 0) return; // it lies in a tab that is not shown
    const { x, axis, range, series, marks, stacked, steps } = this.options;
    const grid = { stroke: () => colour("grid"), width: 1 };
    const look = { stroke: () => colour("muted"), font: FONT, ticks: { show: false } };
    const lines = series.map((line, i) => ({
      stroke: () => colour(line.colour),
      width: line.width ?? (stacked ? 1 : 1.75),
      dash: line.dash,
      fill: stacked ? () => colour(line.colour) : line.area ? () => colour(`${line.colour}-area`) : undefined,
      points: { show: false },
      spanGaps: x !== "time",
      alpha: line.faint ? 0.3 : 1,
    }));
    this.plot = new uPlot(
      {
        width,
        height: this.area.clientHeight,
        padding: [10, 10, 0, 0],
        legend: { show: false },
        cursor: {
          sync: { key: x },
          y: false,
          drag: { x: true, y: false },
          points: { size: 7, width: 1.5, fill: () => colour("panel") },
        },
        scales: { x: { time: false }, y: { range: yRange(range) } },
        axes: [
          {
            ...look,
            grid: { show: false },
            values: AXES[x].values,
            space: x === "time" ? 76 : 64,
            incrs: x === "step" ? undefined : SECONDS,
            size: 28,
          },
          {
            ...look,
            grid,
            values: (_, splits) => splits.map(axis),
            space: 26,
            size: widest,
            incrs: steps === "binary" ? BINARY : undefined,
          },
        ],
        series: [{}, ...(stacked ? lines.reverse() : lines)],
        hooks: {
          setCursor: [(plot) => this.#tell(plot.cursor.idx)],
          setSelect: [(plot) => (this.zoomed = plot.select.width > 0)],
          draw: marks ? [(plot) => drawMarks(plot, marks())] : [],
        },
      },
      this.drawn,
      this.area,
    );
  }

  #resize() {
    const { clientWidth: width, clientHeight: height } = this.area;
    if (width === 0) return;
    if (this.plot) this.plot.setSize({ width, height });
    else if (this.drawn) this.#create();
  }

  /** The legend's values: at the cursor, else the newest that are known. */
  #tell(index) {
    const { x, series, format } = this.options;
    const [xs, ...ys] = this.columns;
    const at = (values) => (Number.isInteger(index) ? values[index] : (values.findLast((v) => v !== null) ?? null));
    const texts = ys.map((values) => format(at(values)));
    texts.forEach((text, i) => say(this.values[i], text));
    say(this.when, Number.isInteger(index) ? AXES[x].show(xs[index]) : "");
    const spoken = series.map((line, i) => (line.hidden ? null : `${line.label} ${texts[i]}`)).filter(Boolean);
    if (!Number.isInteger(index)) this.area.setAttribute("aria-label", `${this.options.title}: ${spoken.join(", ")}`);
  }
}

/** A piece of the line as it is drawn, so that a legend does not go by colour alone. */
function swatch(series) {
  const piece = h("span", { class: `swatch${series.dash ? " dashed" : ""}`, "aria-hidden": "true" });
  piece.style.color = `var(--${series.colour})`;
  return piece;
}

/** Sums, the last series lowest: each is drawn over the one above it. */
function stack([xs, ...series]) {
  let sums = xs.map(() => 0);
  const layers = series.map(
    (values) => (sums = sums.map((sum, i) => (values[i] === null || sum === null ? null : sum + values[i]))),
  );
  return [xs, ...layers.reverse()];
}

function yRange(wanted = [0, null]) {
  return (_, low, high) => {
    if (low === null) return [wanted[0] ?? 0, wanted[1] ?? 1];
    const pad = 0.08 * (high - (wanted[0] ?? low)) || 0.1 * Math.abs(high) || 1;
    return [wanted[0] ?? low - pad, wanted[1] ?? high + pad];
  };
}

/** Room for the longest value of an axis. */
function widest(plot, values) {
  if (!values) return 40;
  plot.ctx.save();
  plot.ctx.font = FONT;
  const width = Math.max(...values.map((value) => plot.ctx.measureText(value ?? "").width));
  plot.ctx.restore();
  return Math.ceil(width) + 16;
}

function drawMarks(plot, marks) {
  const { ctx, bbox } = plot;
  const size = 4 * devicePixelRatio;
  ctx.save();
  for (const mark of marks) {
    const x = plot.valToPos(mark.time, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.fillStyle = ctx.strokeStyle = colour(mark.colour);
    ctx.globalAlpha = 0.45;
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.globalAlpha = 1;
    ctx.beginPath();
    ctx.moveTo(x - size, bbox.top - size);
    ctx.lineTo(x + size, bbox.top - size);
    ctx.lineTo(x, bbox.top + size);
    ctx.fill();
  }
  ctx.restore();
}
