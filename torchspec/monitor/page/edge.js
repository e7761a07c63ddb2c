// An arrow between two stations of the pipeline, with the rate at which samples go along.

import { s, say } from "./dom.js";

export class Edge {
  constructor(from, to, width, height) {
    const level = from.y === to.y;
    const below = from.x === to.x;
    const start = level
      ? { x: from.x + width + 3, y: from.y + height / 2 }
      : { x: from.x + width / 2, y: from.y + height + 3 };
    const end = level ? { x: to.x - 5, y: to.y + height / 2 } : { x: to.x + width / 2, y: to.y - 5 };
    const half = (start.y + end.y) / 2;
    const path =
      level || below
        ? `M${start.x},${start.y} L${end.x},${end.y}`
        : `M${start.x},${start.y} V${half} H${end.x} V${end.y}`;
    const middle = { x: (start.x + end.x) / 2, y: half };
    const side = below ? { x: middle.x + 16, anchor: "start" } : { x: middle.x, anchor: "middle" };
    const label = (y, name) => s("text", { x: side.x, y: middle.y + y, class: name, "text-anchor": side.anchor });
    this.line = s("path", { d: path, class: "edge", "marker-end": "url(#arrow)" });
    this.value = label(below ? -4 : -9, "edge-value");
    this.text = label(below ? 12 : 18, "edge-text");
    this.more = below
      ? s("text", { x: middle.x - 16, y: middle.y + 4, class: "edge-text", "text-anchor": "end" })
      : label(33, "edge-text");
    this.element = s("g", {}, this.line, this.value, this.text, this.more);
  }

  set({ value, text, more = "" }, running) {
    say(this.value, value);
    say(this.text, text);
    say(this.more, more);
    this.line.classList.toggle("moving", running && value !== "0" && value !== "–");
  }
}

export function arrowHead() {
  const head = s("path", { d: "M0,0.5 L7,4 L0,7.5 z", class: "arrow" });
  return s(
    "defs",
    {},
    s(
      "marker",
      {
        id: "arrow",
        viewBox: "0 0 8 8",
        refX: 5,
        refY: 4,
        markerWidth: 8,
        markerHeight: 8,
        markerUnits: "userSpaceOnUse",
        orient: "auto",
      },
      head,
    ),
  );
}
