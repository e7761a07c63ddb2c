// Two runs side by side: the same figures in a table, and their curves over each other.

import { Chart } from "./chart.js";
import { h, reconcile, say } from "./dom.js";
import { bytes, count, fixed, percent, rate, span } from "./format.js";
import { mean, smooth, windowMean } from "./smooth.js";
import { join } from "./training.js";

const average = (name) => (run) => mean(run.history.time, run.history[name]);
const ROWS = [
  ["Step", (run) => run.snapshot?.point.step, count],
  ["Accept length, train", (run) => run.snapshot?.status.last_step?.accept_length, fixed(3)],
  ["Accept length, held out", (run) => run.snapshot?.status.last_heldout?.accept_length, fixed(3)],
  ["Loss, train", (run) => run.snapshot?.status.last_step?.loss, fixed(3)],
  ["Loss, held out", (run) => run.snapshot?.status.last_heldout?.loss, fixed(3)],
  ["Samples trained a second, mean", average("training_samples_per_s"), rate],
  ["Ranks waiting, mean", average("rank_wait_share"), percent],
  ["Workers waiting, mean", average("worker_wait_share"), percent],
  ["Inference workers", (run) => run.snapshot?.point.workers, count],
  ["Training ranks", (run) => run.snapshot?.point.ranks, count],
  ["Faults", (run) => run.snapshot?.point.faults, count],
  ["Store capacity", (run) => run.snapshot?.point.store_capacity_bytes, bytes],
  ["Time", (run) => (run.history.time.length ? run.history.time.at(-1) - run.history.time[0] : null), span],
];

export class Compare {
  constructor(parent) {
    this.heads = [0, 1].map(() => h("th", { scope: "col", class: "numeric" }));
    this.cells = ROWS.map(() => [0, 1].map(() => h("td", { class: "numeric" })));
    const rows = ROWS.map(([title], i) => h("tr", {}, h("th", { scope: "row", text: title }), ...this.cells[i]));
    const table = h(
      "table",
      {},
      h("caption", { class: "hidden", text: "Both runs" }),
      h("thead", {}, h("tr", {}, h("td"), ...this.heads)),
      h("tbody", {}, ...rows),
    );
    this.charts = h("div", { class: "charts" });
    parent.append(
      h("div", { class: "table-scroll panel", tabindex: 0, role: "region", "aria-label": "Both runs" }, table),
      this.charts,
    );
  }

  #create([first, second]) {
    const series = [
      { label: first.name, colour: "inference", width: 2 },
      { label: second.name, colour: "draft", dash: [6, 3], width: 2 },
    ];
    const chart = (title, note, x, format, range = [null, null]) =>
      new Chart(this.charts, { title, note, x, format, range, series });
    this.accept = chart("Accept length", "train, smoothed", "step", fixed(2));
    this.loss = chart("Loss", "train, smoothed", "step", fixed(3));
    this.heldout = chart("Accept length", "held out", "step", fixed(2));
    this.throughput = chart("Throughput", "samples trained a second", "elapsed", rate, [0, null]);
  }

  update(runs) {
    if (!this.accept) this.#create(runs);
    runs.forEach((run, r) => {
      say(this.heads[r], run.name);
      ROWS.forEach(([, read, show], i) => say(this.cells[i][r], show(read(run))));
    });
    const [a, b] = runs;
    const both = (split, name, change) =>
      join(
        a.steps[split].step,
        change(a.steps[split].step, a.steps[split][name] ?? []),
        b.steps[split].step,
        change(b.steps[split].step, b.steps[split][name] ?? []),
      );
    this.accept.set(both("train", "accept_length", smooth));
    this.loss.set(both("train", "loss", smooth));
    this.heldout.set(both("heldout", "accept_length", (_, values) => values));
    const elapsed = (run) => run.history.time.map((time) => Math.round(time - run.history.time[0]));
    const speed = (run) => windowMean(run.history.time, run.history.training_samples_per_s ?? []);
    this.throughput.set(join(elapsed(a), speed(a), elapsed(b), speed(b)));
  }
}
