// The pipeline as it is: six stations, the rates between them, and the one that limits the others.

import { s } from "./dom.js";
import { Edge, arrowHead } from "./edge.js";
import { bandwidth, brief, bytes, count, fixed, percent, plural, rate } from "./format.js";
import { hasLeft } from "./pools.js";
import { Station } from "./station.js";

const STATIONS = ["prompts", "inference", "store", "queues", "training", "draft"];
const TITLES = {
  prompts: "Prompts",
  inference: "Inference pool",
  store: "Store",
  queues: "Queues",
  training: "Training ranks",
  draft: "Draft",
};
const TOP = 12;

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
    const columns = width >= 1200 ? 6 : width >= 600 ? 3 : 1;
    const gap = columns === 6 ? 72 : 84;
    const box = columns === 1 ? width - 2 : (width - 2 - gap * (columns - 1)) / columns;
    const down = columns === 1 ? 58 : 64;
    const height = columns === 1 ? 122 : 148;
    const places = STATIONS.map((_, i) => ({
      x: 1 + (i % columns) * (box + gap),
      y: TOP + Math.floor(i / columns) * (height + down),
    }));
    const rows = 6 / columns;
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", TOP + rows * height + (rows - 1) * down + 2);
    this.stations = STATIONS.map((name, i) => new Station(name, TITLES[name], places[i], box, height));
    this.edges = places.slice(1).map((to, i) => new Edge(places[i], to, box, height));
    this.svg.replaceChildren(arrowHead(), ...this.edges.map((e) => e.element), ...this.stations.map((t) => t.element));
    if (this.run) this.update(this.run);
  }

  update(run) {
    this.run = run;
    if (!this.stations || !run.snapshot) return;
    const limit = STATIONS.find((name) => name === run.verdict.side); // none where they are balanced
    const views = describe(run);
    for (const station of this.stations) station.set(views[station.name], station.name === limit);
    const running = run.live && run.snapshot.status.phase === "training";
    this.edges.forEach((edge, i) => edge.set(views.edges[i], running));
    const spoken = STATIONS.map(
      (name) => `${TITLES[name]}: ${`${views[name].value} ${views[name].unit}`.trim()}, ${views[name].text}`,
    );
    this.svg.setAttribute("aria-label", `${spoken.join("; ")}${limit ? `; the bottleneck is: ${TITLES[limit]}` : ""}`);
  }
}

const large = (value) => (value >= 99_999.5 ? brief(value) : rate(value));

/** What each station and edge shows. */
function describe(run) {
  const { snapshot } = run;
  const { status, point } = snapshot;
  const samples = Object.values(status.samples).reduce((a, b) => a + b, 0);
  const alive = snapshot.workers.filter((worker) => !hasLeft(worker));
  const mean = (list, read) => (list.length ? list.reduce((sum, item) => sum + read(item), 0) / list.length : null);
  const draft = status.last_heldout ?? status.last_step;
  const steps = point.step && status.last_step ? status.training_samples_per_s / batchSize(snapshot) : null;
  const capacity = point.store_capacity_bytes || 1;
  const captured = { value: rate(status.inference_samples_per_s), text: "samples/s" };
  const trained = { value: rate(status.training_samples_per_s), text: "samples/s" };
  const curve = run.steps.heldout.time.length > 5 ? run.steps.heldout : run.steps.train;
  const ahead = Math.max(1, (run.config.controller?.prefetch_steps ?? 2) - 1); // the step in training is one of them
  const pending = status.samples.pending ?? 0;
  return {
    prompts: {
      value: brief(pending),
      unit: "pending",
      text: `of ${count(samples)} samples`,
      gauge: { used: samples ? 1 - pending / samples : 0 },
    },
    inference: {
      value: large(status.inference_tokens_per_s),
      unit: "tokens/s",
      text: `${plural(alive.length, "worker")}, waiting ${percent(mean(alive.filter((w) => w.doing !== "starting"), (w) => w.wait_share))}`,
      units: snapshot.workers
        .filter((w) => !hasLeft(w) || point.time - w.heard < 60)
        .sort((a, b) => (a.doing === "ended") - (b.doing === "ended"))
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
      bars: snapshot.ranks.map((r) => ({ key: String(r.rank), height: Math.min(1, r.report.fetched_steps / ahead) })),
    },
    training: {
      value: large(status.training_tokens_per_s),
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
      curve: [curve.step, curve.accept_length ?? []],
    },
    edges: [
      captured,
      { ...captured, more: bandwidth(run.recent("put_bytes_per_s")) },
      trained,
      { ...trained, more: bandwidth(run.recent("get_bytes_per_s")) },
      { value: rate(steps), text: "steps/s" },
    ],
  };
}

function batchSize({ status }) {
  const trained = (status.samples.trained ?? 0) + (status.samples.committed ?? 0);
  return status.step ? Math.max(1, trained / status.step) : 1;
}
