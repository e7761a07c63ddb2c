// Charts over time: how fast both pools are, what lies between them, and where the ranks' time goes.

import { Chart } from "./chart.js";
import { h } from "./dom.js";
import { bytes, count, percent, rate, short } from "./format.js";
import { groupOf } from "./events.js";
import { windowMean } from "./smooth.js";

const PARTS = [
  ["rank_forward_share", "forward", "training"],
  ["rank_backward_share", "backward", "training-2"],
  ["rank_reduce_share", "reduce", "training-3"],
  ["rank_optimizer_share", "optimizer", "training-4"],
  ["rank_pause_share", "pause", "idle"],
  ["rank_wait_share", "wait", "wait"],
];
const MARKED = { fault: "bad", scaling: "inference" };

export class Flow {
  constructor(parent) {
    const grid = h("div", { class: "charts" });
    parent.append(grid);
    const marks = () => this.marks;
    this.marks = [];
    this.throughput = new Chart(grid, {
      title: "Throughput",
      note: "samples/s",
      format: rate,
      axis: short,
      marks,
      series: [
        { label: "training", colour: "training", area: true, width: 2 },
        { label: "inference", colour: "inference", dash: [6, 3] },
      ],
    });
    this.shares = new Chart(grid, {
      title: "Where the ranks' time goes",
      note: "pause: evaluations and checkpoints",
      format: percent,
      range: [0, 1],
      stacked: true,
      series: PARTS.map(([, label, colour]) => ({ label, colour })),
    });
    this.queue = new Chart(grid, {
      title: "Queue",
      note: "samples ready for the next steps",
      format: rate,
      axis: count,
      series: [
        { label: "ready", colour: "queue", faint: true, width: 1, hidden: true },
        { label: "mean", colour: "queue", area: true },
      ],
    });
    this.store = new Chart(grid, {
      title: "Store",
      format: bytes,
      steps: "binary",
      series: [
        { label: "in the store", colour: "store", area: true },
        { label: "reserved by credits", colour: "store", dash: [3, 3], width: 1.25 },
        { label: "capacity", colour: "muted", dash: [8, 4], width: 1 },
      ],
    });
    this.idle = new Chart(grid, {
      title: "Time without work",
      note: "share of the pool's time",
      format: percent,
      range: [0, 1],
      series: [
        { label: "ranks without samples", colour: "training", area: true, width: 2 },
        { label: "workers without a lease", colour: "inference", dash: [6, 3] },
      ],
    });
    this.bandwidth = new Chart(grid, {
      title: "Through the store",
      note: "a second",
      format: bytes,
      steps: "binary",
      series: [
        { label: "got", colour: "training", area: true, width: 2 },
        { label: "put", colour: "inference", dash: [6, 3] },
      ],
    });
  }

  update({ history, events }) {
    const { time } = history;
    const raw = (name) => history[name] ?? time.map(() => null);
    const means = (...names) => [time, ...names.map((name) => windowMean(time, raw(name)))];
    this.marks = events
      .filter((event) => MARKED[groupOf(event.kind)])
      .map((event) => ({ time: event.time, colour: MARKED[groupOf(event.kind)] }));
    this.throughput.set(means("training_samples_per_s", "inference_samples_per_s"));
    this.shares.set(means(...PARTS.map(([name]) => name)));
    this.queue.set([time, raw("queue_depth"), windowMean(time, raw("queue_depth"))]);
    this.store.set([...means("store_bytes", "credit_bytes"), raw("store_capacity_bytes")]);
    this.idle.set(means("rank_wait_share", "worker_wait_share"));
    this.bandwidth.set(means("get_bytes_per_s", "put_bytes_per_s"));
  }
}
