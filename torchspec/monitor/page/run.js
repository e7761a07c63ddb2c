// What is known of one run: loaded once, then kept up to date by one small request every two seconds.

import { get } from "./api.js";
import { windowMean } from "./smooth.js";

const POINTS = 1200;
const RECENT = 30;

export class Run {
  constructor(index) {
    this.index = index;
    this.range = null;
    this.name = "";
    this.live = false;
    this.config = {};
    this.meaning = new Map();
    this.snapshot = this.verdict = this.health = null;
    this.history = { time: [] };
    this.steps = { train: empty(), heldout: empty() };
    this.events = [];
  }

  /** Everything anew: at first, and after the server was away. History: see `update`. */
  async load(range) {
    this.range = range;
    const about = await get("/api/run", { run: this.index });
    this.name = about.name;
    this.folder = about.folder;
    this.config = about.config;
    this.meaning = new Map(about.metrics.map((metric) => [`${metric.scope}.${metric.key}`, metric.meaning]));
    this.#take(about);
    await Promise.all([this.#loadHistory(), this.#loadSteps(), this.#loadEvents()]);
  }

  /** In as many points as a chart can show. */
  async #loadHistory() {
    const end = this.snapshot?.point.time ?? 0;
    const since = this.range === null ? null : end - this.range;
    this.history = await get("/api/history", { run: this.index, since, points: POINTS });
  }

  async #loadSteps() {
    this.steps = await get("/api/steps", { run: this.index, points: POINTS });
  }

  async #loadEvents() {
    this.events = (await get("/api/events", { run: this.index })).events;
  }

  /** What is new since the last call; the history is of the last `range` seconds (null: of the whole run). */
  async update(range) {
    const since = {
      history: this.history.time.at(-1) ?? 0,
      events: this.events.at(-1)?.time ?? 0,
      steps: Math.max(this.steps.train.time.at(-1) ?? 0, this.steps.heldout.time.at(-1) ?? 0),
    };
    const fresh = await get("/api/update", { run: this.index, ...since });
    this.#take(fresh);
    append(this.history, fresh.history);
    const splits = ["train", "heldout"];
    const again = splits.some((split) => fresh.steps[split].step[0] <= this.steps[split].step.at(-1));
    if (again) await this.#loadSteps(); // steps that were undone have been made again
    else for (const split of splits) append(this.steps[split], fresh.steps[split]);
    this.events.push(...fresh.events);
    if (range !== null) dropBefore(this.history, (this.history.time.at(-1) ?? 0) - range);
    if (range !== this.range || this.history.time.length > 2 * POINTS) {
      this.range = range;
      await this.#loadHistory();
    }
    if (this.steps.train.time.length > 2 * POINTS) await this.#loadSteps();
  }

  /** Mean of a column of the history over the last half minute. */
  recent(name) {
    return windowMean(this.history.time, this.history[name] ?? [], RECENT).at(-1) ?? null;
  }

  #take({ live, snapshot, verdict, health }) {
    Object.assign(this, { live, snapshot, verdict, health });
  }
}

function empty() {
  return { time: [], step: [] };
}

/** Add rows to columns; a column may itself hold a column for each position. */
function append(columns, more) {
  if (!more?.time?.length) return;
  const before = columns.time.length;
  for (const [name, values] of Object.entries(more)) {
    if (values.length && Array.isArray(values[0])) {
      columns[name] ??= [];
      values.forEach((part, i) => (columns[name][i] ??= Array(before).fill(null)).push(...part));
    } else {
      (columns[name] ??= Array(before).fill(null)).push(...values);
    }
  }
}

function dropBefore(columns, time) {
  const first = columns.time.findIndex((t) => t >= time);
  if (first > 0) for (const values of Object.values(columns)) values.splice(0, first);
}
