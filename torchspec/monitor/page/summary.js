// The answers of the first ten seconds: which side is slow, is it healthy, how fast, how good, when is it finished.

import { h, say } from "./dom.js";
import { count, fixed, moment, rate, span } from "./format.js";
import { windowMean } from "./smooth.js";
import { canvas, sparkline } from "./sparkline.js";

const SIGNS = { good: "✓", warning: "!", bad: "✕", idle: "–" };

export class Summary {
  constructor(parent) {
    this.headline = h("p", { class: "verdict-headline" });
    this.text = h("p", { class: "verdict-text" });
    this.advice = h("ul", { class: "advice" });
    this.verdict = h(
      "div",
      { class: "verdict panel" },
      h("h2", { text: "Bottleneck" }),
      this.headline,
      this.text,
      this.advice,
    );
    this.health = new Tile("Health");
    this.speed = new Tile("Speed", "training");
    this.quality = new Tile("Draft quality", "draft");
    this.left = new Tile("Time left");
    this.bar = h("progress", { max: 1, value: 0, "aria-label": "Steps made" });
    this.left.element.append(this.bar);
    parent.append(this.verdict, ...[this.health, this.speed, this.quality, this.left].map((tile) => tile.element));
  }

  update(run) {
    const { snapshot, verdict, health } = run;
    this.verdict.dataset.side = verdict.side ?? "none";
    say(this.headline, capital(verdict.headline));
    const doubt = verdict.confidence === "low" ? " (Something has just changed: look again in a minute.)" : "";
    say(this.text, capital(verdict.text) + doubt);
    if (this.advice.textContent !== verdict.advice.join(""))
      this.advice.replaceChildren(...verdict.advice.map((text) => h("li", {}, ...withCommand(text))));
    this.health.element.dataset.level = health.level;
    this.health.set(health.headline, health.text, "", SIGNS[health.level]);
    if (!snapshot) return [this.speed, this.quality, this.left].forEach((tile) => tile.set("–", ""));
    this.#speed(snapshot.status, run.history);
    this.#quality(snapshot, run.steps);
    this.#left(snapshot.status, run);
  }

  #speed(status, history) {
    const tokens = `${rate(status.training_tokens_per_s)} tokens/s trained`;
    const inference = `${rate(status.inference_samples_per_s)} samples/s captured`;
    this.speed.set(rate(status.training_samples_per_s), `${tokens}\n${inference}`, "samples/s");
    const speed = windowMean(history.time, history.training_samples_per_s ?? []);
    this.speed.spark(history.time, speed, 0);
  }

  #quality({ status, measured_accept_length: measured }, steps) {
    const report = status.last_heldout ?? status.last_step;
    if (!report) return this.quality.set("–", "no step yet");
    const where = status.last_heldout ? "simulated, held-out samples" : "simulated, training batches";
    const first = `first position right ${fixed(0)(100 * report.full_accuracy[0])}%`;
    this.quality.set(
      fixed(2)(report.accept_length),
      `${measured ? `${fixed(2)(measured)} measured in a server` : where}\n${first}`,
      "accept length",
    );
    const curve = steps.heldout.time.length > 5 ? steps.heldout : steps.train;
    this.quality.spark(curve.step, curve.accept_length);
  }

  #left(status, run) {
    const made = status.total_steps ? status.step / status.total_steps : 0;
    this.bar.value = made;
    const steps = `step ${count(status.step)} of ${count(status.total_steps)}\nepoch ${Math.min(status.epoch + 1, status.epochs)} of ${status.epochs}`;
    const over = !run.live || ["finished", "stopped", "failed"].includes(status.phase);
    if (over) {
      const ended = run.history.time.at(-1);
      this.left.set(status.phase === "finished" ? "Done" : "Ended", steps, ended ? `at ${moment(ended)}` : "");
    } else if (status.eta_seconds === null) this.left.set("–", steps);
    else
      this.left.set(
        span(status.eta_seconds),
        steps,
        `until ${moment(run.snapshot.point.time + status.eta_seconds, run.snapshot.point.time)}`,
      );
  }
}

/** A small card: a question's label, the figure, its unit and a line or two. */
class Tile {
  constructor(label, name = "") {
    this.sign = h("span", { class: "sign", "aria-hidden": "true" });
    this.value = h("span", { class: "tile-value" });
    this.unit = h("span", { class: "tile-unit" });
    this.text = h("p", { class: "tile-text" });
    this.line = name && canvas(`spark spark-${name}`);
    const figure = h("p", { class: "tile-figure" }, this.sign, this.value, this.unit);
    this.element = h("div", { class: "tile panel" }, h("h2", { text: label }), figure, this.text, this.line);
  }

  set(value, text, unit = "", sign = "") {
    say(this.sign, sign);
    say(this.value, value);
    say(this.unit, unit);
    say(this.text, text);
  }

  spark(xs, values = [], floor) {
    sparkline(this.line, xs, values, floor);
  }
}

/** A command at the end of a text stays in one piece. */
const withCommand = (text) =>
  text.split(/(?=torchspec )/).map((part, i) => (i ? h("span", { class: "command", text: part }) : part));
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
