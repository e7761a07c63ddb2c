// A small curve without axes.

import { s } from "./dom.js";

const CELLS = 50;

/** Draw values into an SVG of 100 x 24, as means of equal stretches of xs: rows lie closer where they are newer. */
export function sparkline(svg, xs, values) {
  const points = means(xs, values);
  if (points.length < 2) return svg.replaceChildren();
  const heights = points.map(([, value]) => value);
  const low = Math.min(...heights),
    high = Math.max(...heights);
  const at = ([x, value]) =>
    `${(100 * x).toFixed(1)},${(22 - (high > low ? (20 * (value - low)) / (high - low) : 10)).toFixed(1)}`;
  const line = points.map(at).join(" ");
  if (svg.dataset.line === line) return;
  svg.dataset.line = line;
  svg.replaceChildren(
    s("polygon", { points: `0,24 ${line} 100,24`, class: "spark-area" }),
    s("polyline", { points: line, class: "spark-line", "vector-effect": "non-scaling-stroke" }),
  );
}

/** [place from 0 to 1, mean] of each stretch that holds a value. */
function means(xs, values) {
  const known = values.map((value, i) => [xs[i], value]).filter(([, value]) => value !== null);
  if (known.length < 2) return [];
  const cells = Math.min(CELLS, known.length);
  const start = known[0][0],
    length = known[known.length - 1][0] - start || 1;
  const sums = Array.from({ length: cells }, () => [0, 0]);
  for (const [x, value] of known) {
    const cell = sums[Math.min(cells - 1, Math.floor((cells * (x - start)) / length))];
    cell[0] += value;
    cell[1] += 1;
  }
  return sums.map(([sum, count], i) => [i / (cells - 1), sum / count]).filter(([, mean]) => !Number.isNaN(mean));
}
