// A small curve without axes.

import { s } from "./dom.js";

const CELLS = 50;

/** What a curve is drawn into. Whoever looks at it has the figure beside it. */
export const canvas = (classes, box = {}) =>
  s("svg", { class: classes, viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true", ...box });

/**
 * Draw values into a canvas, as means of equal stretches of xs: rows lie closer where they are newer.
 * Its lower edge is `floor`, or the least value.
 */
export function sparkline(svg, xs, values, floor = Infinity) {
  const points = means(xs, values);
  if (points.length < 2) return svg.replaceChildren();
  const heights = points.map(([, value]) => value);
  const low = Math.min(floor, ...heights),
    high = Math.max(...heights);
  const at = ([x, value]) =>
    `${(100 * x).toFixed(1)},${(22 - (high > low ? (20 * (value - low)) / (high - low) : 10)).toFixed(1)}`;
  const line = points.map(at).join(" ");
  const [first, last] = [points[0], points.at(-1)].map(([x]) => (100 * x).toFixed(1));
  if (svg.dataset.line === line) return;
  svg.dataset.line = line;
  svg.replaceChildren(
    s("polygon", { points: `${first},24 ${line} ${last},24`, class: "spark-area" }),
    s("polyline", { points: line, class: "spark-line", "vector-effect": "non-scaling-stroke" }),
  );
}

/** [place from 0 to 1, mean] of each stretch that holds a value. */
function means(xs, values) {
  const cells = Math.min(CELLS, xs.length);
  const length = xs.at(-1) - xs[0] || 1;
  const sums = Array.from({ length: cells }, () => [0, 0]);
  values.forEach((value, i) => {
    if (value === null) return;
    const cell = sums[Math.min(cells - 1, Math.floor((cells * (xs[i] - xs[0])) / length))];
    cell[0] += value;
    cell[1] += 1;
  });
  return sums.map(([sum, count], i) => [i / (cells - 1), sum / count]).filter(([, mean]) => !Number.isNaN(mean));
}
