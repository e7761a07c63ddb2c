// The pipeline as it is: six stations, the rates between them, and the one that limits the others.

import { reconcile, s, say } from "./dom.js";
import { sparkline } from "./sparkline.js";
import { bandwidth, bytes, count, fixed, percent, plural, rate } from "./format.js";

const STATIONS = ["prompts", "inference", "store", "queues", "training", "draft"];
const TITLES = {
  prompts: "Prompts",
  inference: "Inference pool",
  store: "Store",
  queues: "Queues",
  training: "Training ranks",
  draft: "Draft",
};
const HEIGHT = 148,
  GAP_DOWN = 58,
  ROW_GAP = 64,
  TOP = 12;
const PAD = 13;
const UNITS_PER_ROW = 16;

export class Pipeline {
  constructor(parent) {
    this.parent = parent;
    this.svg = s("svg", { role: "img", class: "pipeline-svg" });
    parent.append(this.svg);
    new ResizeObserver(() => this.#layout()).observe(parent);
  }

  /** Six in a row, two rows of three, or one below the other, as there is room. */
  #layout() {
    const width = this.parent.clientWidth;
    if (width === 0 || width === this.width) return;
    this.width = width;
    const columns = width >= 1000 ? 6 : width >= 600 ? 3 : 1;
    const gap = columns === 6 ? Math.min(92, Math.max(68, 0.06 * width)) : 84;
    const box = columns === 1 ? width - 2 : (width - 2 - gap * (columns - 1)) / columns;
    const down = columns === 1 ? GAP_DOWN : ROW_GAP;
    const height = columns === 1 ? 112 : HEIGHT;
    const places = STATIONS.map((_, i) => ({
      x: 1 + (i % columns) * (box + gap),
      y: TOP + Math.floor(i / columns) * (height + down),
    }));
    const rows = 6 / columns;
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", TOP + rows * height + (rows - 1) * down + 2);
    this.stations = STATIONS.map((name, i) => new Station(name, places[i], box, height));
    this.edges = places.slice(1).map((to, i) => new Edge(places[i], to, box, height));
    this.svg.replaceChildren(arrowHead(), ...this.edges.map((e) => e.element), ...this.stations.map((t) => t.element));
    if (this.run) this.update(this.run);
  }

  update(run) {
    this.run = run;
    if (!this.stations || !run.snapshot) return;
    const limit = { inference: "inference", training: "training", store: "store" }[run.verdict?.side] ?? null;
    const views = describe(run);
    for (const station of this.stations) station.set(views[station.name], station.name === limit);
    const running = run.live && run.snapshot.status.phase === "training";
    this.edges.forEach((edge, i) => edge.set(views.edges[i], running));
    const spoken = STATIONS.map(
      (name) => `${TITLES[name]}: ${views[name].value} ${views[name].unit}, ${views[name].text}`,
    );
    this.svg.setAttribute("aria-label", `${spoken.join("; ")}${limit ? `; the bottleneck is: ${TITLES[limit]}` : ""}`);
  }
}

/** What each station and edge shows. */
function describe(run) {
  const { snapshot } = run;
  const { status, point } = snapshot;
  const samples = Object.values(status.samples).reduce((a, b) => a + b, 0);
  const alive = snapshot.workers.filter((worker) => worker.doing !== "gone");
  const mean = (list, read) => (list.length ? list.reduce((sum, item) => sum + read(item), 0) / list.length : null);
  const draft = status.last_heldout ?? status.last_step;
  const steps = point.step && status.last_step ? status.training_samples_per_s / batchSize(snapshot) : null;
  const capacity = point.store_capacity_bytes || 1;
  const puts = {
    value: rate(status.inference_samples_per_s),
    text: "samples/s",
    more: bandwidth(run.recent("put_bytes_per_s")),
  };
  const gets = {
    value: rate(status.training_samples_per_s),
    text: "samples/s",
    more: bandwidth(run.recent("get_bytes_per_s")),
  };
  const pending = status.samples.pending ?? 0;
  return {
    prompts: {
      value: count(pending),
      unit: "pending",
      text: `of ${count(samples)} samples`,
      gauge: { used: samples ? 1 - pending / samples : 0 },
    },
    inference: {
      value: rate(status.inference_tokens_per_s),
      unit: "tokens/s",
      text: `${plural(alive.length, "worker")}, waiting ${percent(mean(alive, (w) => w.wait_share))}`,
      units: snapshot.workers
        .filter((w) => w.doing !== "gone" || point.time - w.heard < 60)
        .map((w) => ({ key: w.name, state: w.doing })),
    },
    store: {
      value: bytes(point.store_bytes),
      unit: "",
      text: `${percent(point.store_bytes / capacity)} full, ${percent(point.credit_bytes / capacity)} reserved`,
      gauge: { used: point.store_bytes / capacity, reserved: point.credit_bytes / capacity },
    },
    queues: {
      value: count(point.queue_depth),
      unit: "samples",
      text: "ready, in order",
      bars: snapshot.ranks.map((r) => ({ key: String(r.rank), height: Math.min(1, r.report.queue_depth / 4) })),
    },
    training: {
      value: rate(status.training_tokens_per_s),
      unit: "tokens/s",
      text: `${plural(snapshot.ranks.length, "rank")}, waiting ${percent(mean(snapshot.ranks, (r) => r.wait_share))}`,
      units: snapshot.ranks.map((r) => ({
        key: String(r.rank),
        state: { training: "working", paused: "starting" }[r.report.doing] ?? r.report.doing,
      })),
    },
    draft: {
      value: fixed(2)(draft?.accept_length),
      unit: "accept length",
      text: `${count(status.samples.committed ?? 0)} committed`,
      curve: (run.steps.heldout.time.length > 5 ? run.steps.heldout : run.steps.train).accept_length,
    },
    edges: [
      { value: puts.value, text: "samples/s" },
      puts,
      { ...gets, more: "" },
      gets,
      { value: rate(steps), text: "steps/s" },
    ],
  };
}

function batchSize({ status }) {
  const trained = (status.samples.trained ?? 0) + (status.samples.committed ?? 0);
  return status.step ? Math.max(1, trained / status.step) : 1;
}

class Station {
  constructor(name, { x, y }, width, height) {
    this.name = name;
    this.width = width;
    const low = height < 140;
    this.value = s("tspan", { class: "station-value" });
    this.unit = s("tspan", { class: "station-unit", dx: 6 });
    this.text = s("text", { x: PAD, y: low ? 80 : 90, class: "station-text" });
    this.extra = s("g", { transform: `translate(${PAD},${low ? 92 : 106})` });
    this.tag = s("g", { class: "station-tag" });
    this.element = s(
      "g",
      { class: `station station-${name}`, transform: `translate(${x},${y})` },
      s("rect", { class: "station-box", width, height, rx: 10 }),
      s("text", { x: PAD, y: 28, class: "station-title", text: TITLES[name] }),
      s("text", { x: PAD, y: low ? 60 : 66 }, this.value, this.unit),
      this.text,
      this.extra,
      this.tag,
    );
  }

  set(view, limits) {
    say(this.value, view.value);
    say(this.unit, view.unit);
    say(this.text, view.text);
    this.element.classList.toggle("limit", limits);
    if (limits && !this.tag.firstChild) this.tag.append(...bottleneckTag(this.width));
    if (!limits) this.tag.replaceChildren();
    const room = this.width - 2 * PAD;
    if (view.gauge) drawGauge(this.extra, room, view.gauge);
    if (view.units) drawUnits(this.extra, room, view.units);
    if (view.bars) drawBars(this.extra, room, view.bars);
    if (view.curve) drawCurve(this.extra, room, view.curve);
  }
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

function drawCurve(group, room, values) {
  if (!group.firstChild) {
    const box = { width: room, height: 24, y: 0, viewBox: "0 0 100 24", preserveAspectRatio: "none" };
    group.append(s("svg", { ...box, class: "station-curve" }));
  }
  sparkline(group.firstChild, values);
}

class Edge {
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

function arrowHead() {
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
