// The token that opens the page, scaling the inference pool and stopping the run.

import { get, post, setToken, token } from "./api.js";
import { h, say } from "./dom.js";

export class Control {
  /** `retry` is called when somebody has said the token. */
  constructor(dialog, opener, retry) {
    this.dialog = dialog;
    this.retry = retry;
    this.workers = h("input", {
      type: "number",
      id: "workers",
      min: 1,
      max: 4096,
      step: 1,
      required: true,
      inputmode: "numeric",
    });
    this.secret = h("input", { type: "password", id: "token", autocomplete: "off", spellcheck: "false" });
    this.said = h("p", { class: "said", role: "status" });
    this.stop = h("button", { type: "button", class: "button danger", on: { click: () => this.#stop() } });
    this.unlocked = h("p", { class: "chart-note" });
    const close = h("button", { type: "button", class: "button", text: "Close", on: { click: () => dialog.close() } });
    this.auto = h("button", {
      type: "button",
      class: "button",
      text: "Auto",
      on: { click: () => this.#scale("auto") },
    });
    this.sizing = h("p", { class: "chart-note" });
    const scale = h(
      "form",
      {
        on: {
          submit: (event) => {
            event.preventDefault();
            this.#scale(Number(this.workers.value));
          },
        },
      },
      h("label", { for: "workers", text: "Inference workers" }),
      h("div", { class: "row" }, this.workers, h("button", { class: "button primary", text: "Scale" }), this.auto),
      this.sizing,
      h("p", {
        class: "chart-note",
        text: "New workers take a while to load the target; those taken away finish what they have first.",
      }),
    );
    const unlock = h(
      "form",
      { on: { submit: (event) => this.#unlock(event) } },
      h("label", { for: "token", text: "Token" }),
      h("div", { class: "row" }, this.secret, h("button", { class: "button", text: "Use" })),
      this.unlocked,
    );
    this.parts = h(
      "div",
      { class: "control-parts", hidden: true },
      scale,
      h(
        "div",
        {},
        h("p", { class: "label", text: "Stop the run" }),
        this.stop,
        h("p", {
          class: "chart-note",
          text: "It ends its step, saves a checkpoint and cleans up; torchspec resume goes on from there.",
        }),
      ),
    );
    this.over = h("p", { hidden: true, text: "This run is not running: there is nothing to control." });
    dialog.append(
      h("header", {}, h("h2", { id: "control-title", text: "Control" }), close),
      this.parts,
      this.over,
      unlock,
      this.said,
    );
    opener.addEventListener("click", () => this.open());
  }

  update(run) {
    this.run = run;
    this.parts.hidden = !run.live;
    this.over.hidden = run.live;
  }

  /** Before anything of a run is known, it only asks for the token. */
  open() {
    this.#arm(false);
    this.#state();
    say(this.said, "");
    this.dialog.showModal();
    if (!this.run) return this.secret.focus();
    this.workers.value = this.run.snapshot?.point.workers || 1;
    this.#size(this.run.config.inference);
    this.#reread();
  }

  /** Says who decides on the number of workers, a person or the run. */
  #size({ workers = 1, min_workers: least = 1, max_workers: most = 4 } = {}) {
    const auto = workers === "auto";
    this.auto.setAttribute("aria-pressed", auto);
    const text = auto
      ? `Sized automatically, ${least} to ${most} as training needs them; a number fixes it.`
      : `Fixed at ${workers}; Auto holds ${least} to ${most}, as training needs them.`;
    say(this.sizing, text);
  }

  /** The pool's size may have been decided on anew, by another page or a terminal. */
  async #reread() {
    const about = await get("/api/run", { run: this.run.index }).catch(() => this.run);
    this.#size((this.run.config = about.config).inference);
  }

  #state() {
    say(
      this.unlocked,
      token()
        ? "A token is known in this tab."
        : "A run is for who has its token. Open the page by the address that the run has printed on a terminal, or paste the token: it is in the file ui_token in the run's folder.",
    );
  }

  #unlock(event) {
    event.preventDefault();
    setToken(this.secret.value.trim());
    this.secret.value = "";
    this.#state();
    if (!this.run) this.dialog.close();
    this.retry();
  }

  async #scale(workers) {
    await this.#send("/api/scale", { workers });
    await this.#reread();
  }

  /** Asks once more before it stops anything. */
  async #stop() {
    if (!this.armed) return this.#arm(true);
    this.#arm(false);
    await this.#send("/api/stop", {});
  }

  #arm(on) {
    this.armed = on;
    say(this.stop, on ? "Really stop?" : "Stop");
  }

  async #send(path, body) {
    this.said.dataset.level = "idle";
    say(this.said, "…");
    try {
      say(this.said, await post(path, this.run.index, body));
      this.said.dataset.level = "good";
    } catch (error) {
      say(this.said, error.message);
      this.said.dataset.level = "bad";
    }
  }
}
