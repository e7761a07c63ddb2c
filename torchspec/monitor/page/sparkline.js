// A small curve without axes.

import { s } from "./dom.js";

/** Draw means of the values into an SVG of 100 x 24. */
export function sparkline(svg, values) {
  const known = values.filter((value) => value !== null);
  const points = [];
  const cells = Math.min(50, known.length);
  for (let i = 0; i < cells; i++) {
    const part = known.slice(Math.floor((i * known.length) / cells), Math.floor(((i + 1) * known.length) / cells));
    points.push(part.reduce((a, b) => a + b) / part.length);
  }
  if (points.length < 2) return svg.replaceChildren();
  const low = Math.min(...points),
    high = Math.max(...points);
  const at = (value, i) =>
    `${((100 * i) / (cells - 1)).toFixed(1)},${(22 - (high > low ? (20 * (value - low)) / (high - low) : 10)).toFixed(1)}`;
  const line = points.map(at).join(" ");
  if (svg.dataset.line === line) return;
  svg.dataset.line = line;
  svg.replaceChildren(
    s("polygon", { points: `0,24 ${line} 100,24`, class: "spark-area" }),
    s("polyline", { points: line, class: "spark-line", "vector-effect": "non-scaling-stroke" }),
  );
}
