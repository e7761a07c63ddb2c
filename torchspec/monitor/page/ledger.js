// The ledger: every sample of the run in one bar, from committed to untouched.

import { h, reconcile, s, say } from "./dom.js";
import { count } from "./format.js";

const STATES = ["committed", "trained", "assigned", "stored", "leased", "pending", "rejected"];

export class Ledger {
  constructor(parent) {
    this.parts = STATES.map((state) => s("rect", { class: `state state-${state}`, height: 10 }));
    const bar = s(
      "svg",
      {
        class: "ledger-bar",
        role: "img",
        preserveAspectRatio: "none",
        viewBox: "0 0 1000 10",
        "aria-label": "Samples by state",
      },
      ...this.parts,
    );
    this.legend = h("ul", { class: "legend" });
    parent.append(bar, this.legend);
  }

  update({ snapshot }) {
    const samples = snapshot?.status.samples ?? {};
    const total = STATES.reduce((sum, state) => sum + (samples[state] ?? 0), 0);
    let x = 0;
    STATES.forEach((state, i) => {
      const width = total ? (1000 * (samples[state] ?? 0)) / total : 0;
      this.parts[i].setAttribute("x", x);
      this.parts[i].setAttribute("width", width);
      x += width;
    });
    const shown = STATES.filter((state) => samples[state]);
    const items = reconcile(this.legend, shown, (state) =>
      h(
        "li",
        {},
        h("span", { class: `key state-${state}`, "aria-hidden": "true" }),
        h("span", { text: state }),
        h("span", { class: "legend-value" }),
      ),
    );
    items.forEach((item, i) => say(item.lastChild, count(samples[shown[i]])));
  }
}
