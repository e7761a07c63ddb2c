// The log of faults, scaling and checkpoints, newest first, filtered by kind.

import { h, reconcile, say } from "./dom.js";
import { clock, count, moment } from "./format.js";

const GROUPS = {
  fault: {
    title: "Faults",
    sign: "✕",
    kinds: [
      ...["failed", "worker_lost", "sample_failed", "sample_lost", "trainer_lost", "store_lost", "controller_lost"],
      ...["export_failed", "trouble"],
    ],
  },
  rejected: { title: "Rejections", sign: "⊘", kinds: ["rejected"] },
  scaling: { title: "Scaling", sign: "⇅", kinds: ["scaled", "worker_started", "worker_ready", "worker_left", "trainer_started"] },
  checkpoint: { title: "Checkpoints", sign: "✓", kinds: ["checkpoint", "evaluated"] },
  run: { title: "Run", sign: "●", kinds: ["resumed", "stopping", "finished", "note"] },
};
const SHOWN = 500;

/** The group that an event's kind belongs to. */
export function groupOf(kind) {
  return Object.keys(GROUPS).find((name) => GROUPS[name].kinds.includes(kind)) ?? "run";
}

export class Events {
  constructor(parent) {
    this.off = new Set();
    const filters = h("fieldset", { class: "filters" }, h("legend", { class: "hidden", text: "Kinds shown" }));
    this.counts = {};
    for (const [name, { title, sign }] of Object.entries(GROUPS)) {
      const box = h("input", {
        type: "checkbox",
        checked: true,
        on: { change: () => this.#toggle(name, box.checked) },
      });
      this.counts[name] = h("span", { class: "filter-count" });
      filters.append(
        h(
          "label",
          { class: `filter event-${name}` },
          box,
          h("span", { class: "event-sign", "aria-hidden": "true", text: sign }),
          title,
          this.counts[name],
        ),
      );
    }
    this.list = h("ol", { class: "events panel", "aria-label": "Events, newest first" });
    this.nothing = h("p", { class: "nothing", text: "no events of these kinds" });
    parent.append(filters, this.list, this.nothing);
  }

  update({ events }) {
    this.events = events;
    for (const name of Object.keys(GROUPS))
      say(this.counts[name], count(events.filter((e) => groupOf(e.kind) === name).length));
    const shown = events
      .filter((e) => !this.off.has(groupOf(e.kind)))
      .slice(-SHOWN)
      .reverse();
    const byKey = new Map(shown.map((event) => [`${event.time} ${event.kind} ${event.message}`, event]));
    reconcile(this.list, [...byKey.keys()], (key) => row(byKey.get(key)));
    this.list.hidden = shown.length === 0;
    this.nothing.hidden = shown.length > 0;
  }

  #toggle(name, on) {
    if (on) this.off.delete(name);
    else this.off.add(name);
    this.update(this);
  }
}

function row({ time, kind, message }) {
  const group = groupOf(kind);
  return h(
    "li",
    { class: `event event-${group}` },
    h("span", { class: "event-sign", "aria-hidden": "true", text: GROUPS[group].sign }),
    h("time", { datetime: new Date(1000 * time).toISOString(), title: moment(time), text: clock(time) }),
    h("span", { class: "event-kind", text: kind.replaceAll("_", " ") }),
    h("span", { class: "event-message", text: message }),
  );
}
