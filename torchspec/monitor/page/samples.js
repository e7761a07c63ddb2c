// The sample inspector: what the target read and wrote, which tokens are trained on, and what happened when.

import { get } from "./api.js";
import { h } from "./dom.js";
import { bytes, clock, count, duration, plural, span } from "./format.js";
import { Table } from "./table.js";

const SHOWN = 300;
const SAYS = {
  leased: "leased to a worker",
  computing: "in the engine",
  computed: "computed",
  putting: "put begins",
  stored: "in the store",
  assigned: "assigned to a step",
  fetched: "fetched by its ranks",
  trained: "trained",
  freed: "freed",
  failed: "failed",
  lost: "lost",
};

export class Samples {
  constructor(parent) {
    this.list = h("div", { class: "sample-list" });
    this.detail = h(
      "article",
      { class: "sample panel", "aria-live": "polite" },
      h("p", {
        class: "nothing",
        text: "Choose a sample to see its text, its loss mask and its way through the system.",
      }),
    );
    parent.append(h("div", { class: "samples" }, this.list, this.detail));
    const column = (name, read, show) => ({ name, value: read, show: (row) => show(read(row)), numeric: true });
    this.table = new Table(this.list, {
      caption: "Samples, newest first",
      key: (row) => row.sample,
      sort: { name: "freed", down: true },
      onSelect: (sample) => this.select(sample),
      columns: [
        { name: "sample", value: (row) => row.sample, show: (row) => row.sample },
        { name: "freed", value: (row) => row.time, show: (row) => clock(row.time), numeric: true },
        column("step", (row) => row.step, count),
        column("tokens", (row) => row.tokens, count),
        column("tries", (row) => row.attempts, count),
        { name: "worker", value: (row) => row.worker, show: (row) => row.worker },
      ],
    });
  }

  /** Reads the list anew; it is only asked for while it is seen. */
  async refresh(run) {
    this.run = run;
    this.table.set((await get("/api/samples", { run: run.index })).samples.slice(0, SHOWN));
    const sample = this.table.selected ?? this.table.rows[0]?.sample;
    if (!this.drawn && sample) await this.select(sample);
  }

  async select(sample) {
    this.table.selected = sample;
    this.table.set(this.table.rows);
    this.drawn = false;
    this.detail.setAttribute("aria-busy", "true");
    try {
      const record = await get(`/api/sample/${encodeURIComponent(sample)}`, { run: this.run.index });
      if (this.table.selected !== sample) return; // another has been chosen meanwhile
      this.detail.replaceChildren(...draw(record));
      this.drawn = true;
    } catch (error) {
      this.detail.replaceChildren(h("p", { class: "nothing", text: `This sample cannot be shown: ${error.message}` }));
    }
    this.detail.removeAttribute("aria-busy");
  }
}

function draw(record) {
  const trained = record.mask.reduce((a, b) => a + b, 0);
  const shown = record.mask.length < record.tokens ? `the first ${count(record.mask.length)} of ` : "";
  const facts = [
    ["conversation", record.id],
    ["worker", record.worker],
    ["step", count(record.step)],
    ["size", bytes(record.num_bytes)],
    ["attempts", count(record.attempts)],
  ];
  return [
    h(
      "header",
      {},
      h("h3", { text: record.sample }),
      h(
        "dl",
        { class: "facts" },
        ...facts.map(([name, value]) => h("div", {}, h("dt", { text: name }), h("dd", { text: value }))),
      ),
    ),
    ...(record.prompt_tokens === null ? [] : conversation(record)),
    h("h4", { text: "Tokens and loss mask" }),
    h(
      "p",
      { class: "chart-note", text: `${shown}${plural(record.tokens, "token")}, the loss is on ${count(trained)} of them: ` },
      h("span", { class: "token counted", text: "trained on" }),
      " ",
      h("span", { class: "token", text: "only read" }),
    ),
    h("p", { class: "tokens" }, ...tokens(record)),
    h("h4", { text: "Its way through the system" }),
    timeline(record.timeline),
  ];
}

/** What the target was given and what it answered. Special tokens mark where turns begin and end. */
function conversation({ pieces, special, prompt_tokens: end }) {
  const texts = pieces.map((piece, i) => (special[i] ? h("span", { class: "special", text: piece }) : piece));
  const part = (title, shown) =>
    shown.length ? [h("h4", { text: title }), h("p", { class: "prose" }, ...shown)] : [];
  return [...part("Prompt", texts.slice(0, end)), ...part("Answer", texts.slice(end))];
}

/** Neighbouring tokens with the same mask lie in one run, so that the boundary between them is easy to see. */
function tokens({ pieces, mask }) {
  return pieces.map((piece, i) =>
    h(
      "span",
      { class: mask[i] ? "token counted" : "token", title: `token ${i}${mask[i] ? ", trained on" : ""}` },
      visible(piece),
    ),
  );
}

const visible = (piece) => piece.replaceAll("\n", "⏎\n") || "∅";

function timeline(moments) {
  const start = moments[0][1],
    total = Math.max(1e-9, moments.at(-1)[1] - start);
  return h(
    "ol",
    { class: "timeline" },
    ...moments.map(([name, time, detail], i) => {
      const next = moments[i + 1]?.[1] ?? time;
      const bar = h("span", { class: "timeline-bar" });
      bar.style.marginLeft = `${(100 * (time - start)) / total}%`;
      bar.style.width = `${(100 * (next - time)) / total}%`;
      const length = i + 1 < moments.length ? duration(next - time) : "";
      return h(
        "li",
        { class: `moment-${name}` },
        h("span", { class: "timeline-time", text: i ? `+${duration(time - start)}` : clock(time) }),
        h("span", { class: "timeline-name", text: detail ? `${SAYS[name]}: ${detail}` : SAYS[name] }),
        h("span", { class: "timeline-track", "aria-hidden": "true" }, bar),
        h("span", { class: "timeline-length", text: length }),
      );
    }),
  );
}
