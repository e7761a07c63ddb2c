// What the draft learns, by step: on training batches and on held-out samples.

import { Chart } from "./chart.js";
import { h } from "./dom.js";
import { fixed, rate, scientific, short } from "./format.js";
import { smooth } from "./smooth.js";

export class Training {
  constructor(parent) {
    this.grid = h("div", { class: "charts" });
    parent.append(this.grid);
    const curves = (label) => [
      { label, colour: "training", faint: true, width: 1, hidden: true },
      { label, colour: "training", width: 2 },
      { label: "held out", colour: "draft", dash: [6, 3], width: 2 },
    ];
    this.accept = new Chart(this.grid, {
      x: "step",
      title: "Accept length",
      note: "simulated, tokens a verification",
      format: fixed(2),
      range: [null, null],
      series: curves("train"),
    });
    this.loss = new Chart(this.grid, {
      x: "step",
      title: "Loss",
      format: fixed(3),
      axis: short,
      range: [null, null],
      series: curves("train"),
    });
    this.rate = new Chart(this.grid, {
      x: "step",
      title: "Learning rate",
      format: scientific,
      series: [{ label: "learning rate", colour: "training" }],
    });
    this.norm = new Chart(this.grid, {
      x: "step",
      title: "Gradient norm",
      note: "before clipping",
      format: rate,
      series: [
        { label: "norm", colour: "training", faint: true, width: 1, hidden: true },
        { label: "norm", colour: "training", width: 2 },
      ],
    });
  }

  update({ steps: { train, heldout } }) {
    const positions = train.full_accuracy?.length ?? 0;
    if (positions && this.positions !== positions) this.#positions(positions);
    const both = (name) => {
      const [xs, ys, others] = join(train.step, train[name] ?? [], heldout.step, heldout[name] ?? []);
      return [xs, ys, smooth(xs, ys), others];
    };
    this.accept.set(both("accept_length"));
    this.loss.set(both("loss"));
    this.rate.set([train.step, train.learning_rate ?? []]);
    this.norm.set([train.step, train.grad_norm ?? [], smooth(train.step, train.grad_norm ?? [])]);
    this.accuracies?.[0].set([train.step, ...train.full_accuracy.map((values) => smooth(train.step, values))]);
    this.accuracies?.[1].set([heldout.step, ...heldout.full_accuracy]);
  }

  /** The charts of accuracies need to know how many positions there are. */
  #positions(count) {
    this.positions = count;
    this.accuracies?.forEach((chart) => chart.remove());
    const series = Array.from({ length: count }, (_, i) => ({
      label: `${i + 1}`,
      colour: `position-${Math.min(i, 6)}`,
    }));
    const axis = (value) => `${Math.round(100 * value)}%`;
    const format = (value) => (value === null ? "–" : `${fixed(1)(100 * value)}%`);
    this.accuracies = ["train", "held out"].map(
      (note) => new Chart(this.grid, { x: "step", title: "Accuracy by position", note, format, axis, series }),
    );
    this.loss.figure.after(...this.accuracies.map((chart) => chart.figure));
  }
}

/** Two curves over one axis of steps, as charts want them. */
export function join(xs, ys, otherXs, otherYs) {
  const first = new Map(xs.map((x, i) => [x, ys[i]]));
  const second = new Map(otherXs.map((x, i) => [x, otherYs[i]]));
  const all = [...new Set([...xs, ...otherXs])].sort((a, b) => a - b);
  return [all, all.map((x) => first.get(x) ?? null), all.map((x) => second.get(x) ?? null)];
}
