// The page: one run at a time (or two compared), asked for every two seconds, drawn where it is seen.

import { get, token } from "./api.js";
import { redrawCharts } from "./chart.js";
import { Compare } from "./compare.js";
import { Control } from "./control.js";
import { h, say } from "./dom.js";
import { Events } from "./events.js";
import { Flow } from "./flow.js";
import { span } from "./format.js";
import { Ledger } from "./ledger.js";
import { Pipeline } from "./pipeline.js";
import { Ranks, Workers } from "./pools.js";
import { Run } from "./run.js";
import { Samples } from "./samples.js";
import { Summary } from "./summary.js";
import { Training } from "./training.js";

const SECOND = 1000;
const WAIT = { live: 2 * SECOND, over: 5 * SECOND, most: 5 * SECOND };
const RANGES = [
  ["5 min", 300],
  ["30 min", 1800],
  ["2 h", 7200],
  ["All", null],
];
/** Phases after which a server that is away stays away. */
const LAST_PHASES = ["stopping", "stopped", "finished", "failed"];
const CURVES_EVERY = 10 * SECOND,
  SAMPLES_EVERY = 5 * SECOND;

const by = (id) => document.getElementById(id);
const views = {
  summary: new Summary(by("summary")),
  pipeline: new Pipeline(by("pipeline")),
  ledger: new Ledger(by("ledger")),
  control: new Control(by("control"), by("control-open"), () => now()),
};
const panels = {
  flow: new Flow(by("panel-flow")),
  training: new Training(by("panel-training")),
  workers: new Workers(by("panel-workers")),
  ranks: new Ranks(by("panel-ranks")),
  events: new Events(by("panel-events")),
  samples: new Samples(by("panel-samples")),
  compare: new Compare(by("panel-compare")),
};

let runs = [];
let shown = 0;
let tab = "flow";
let range = null;
const due = { curves: 0, samples: 0 };

// ---- drawing ----

function draw() {
  const run = runs[shown];
  if (!run) return;
  say(by("run-name"), run.name);
  by("run-name").title = run.folder;
  const phase = run.snapshot ? run.snapshot.status.phase.replaceAll("-", " ") : "no data yet";
  say(by("phase"), run.live || phase === "finished" ? phase : `${phase} · not running`);
  by("phase").dataset.live = run.live;
  document.title = `${run.name} · ${run.verdict.headline} · TorchSpec`;
  for (const view of Object.values(views)) view.update(run);
  if (tab === "compare") panels.compare.update(runs);
  else if (tab !== "samples") panels[tab].update(run);
}

/** What only some tabs show is asked for while they are seen, less often. */
async function loadMore() {
  const run = runs[shown],
    now = performance.now();
  if ((tab === "workers" || tab === "ranks") && now >= due.curves) {
    due.curves = now + CURVES_EVERY;
    const since = (run.snapshot?.point.time ?? 0) - 1800;
    const curves = await get("/api/entities", { run: run.index, since, points: 60 });
    panels.workers.curves = { time: curves.time, rows: curves.workers };
    panels.ranks.curves = { time: curves.time, rows: curves.ranks };
  }
  if (tab === "samples" && now >= due.samples) {
    due.samples = now + SAMPLES_EVERY;
    await panels.samples.refresh(run);
  }
}

// ---- asking ----

let heard = performance.now();
let lost = false;
let locked = false;
let asking = false;
let again = false;
let timer;

async function poll() {
  clearTimeout(timer);
  if (asking) return void (again = true);
  asking = true;
  lost = !(await ask());
  tellConnection(runs[shown]);
  draw();
  timer = setTimeout(poll, again && !lost ? 0 : pause());
  asking = again = false;
}

/** Whether the server has told of the runs. After it was away everything is loaded anew, so nothing is missed. */
async function ask() {
  try {
    if (lost || !runs.length) await load();
    else await Promise.all((tab === "compare" ? runs : [runs[shown]]).map((run) => run.update(seconds())));
    await loadMore();
    heard = performance.now();
    locked = false;
    return true;
  } catch (error) {
    console.info(`no answer: ${error.message}`);
    if (error.locked && !locked && !token()) views.control.open();
    locked = error.locked;
    return false;
  }
}

/** A run that was at its end is over, and its driver, which served this page, is gone. */
function tellConnection(run) {
  const over = lost && !locked && LAST_PHASES.includes(run?.snapshot?.status.phase);
  by("connection").hidden = !lost;
  by("connection").classList.toggle("over", over);
  document.body.classList.toggle("stale", lost && !over);
  if (locked) {
    say(by("connection"), "This page is for who has the run's token: it goes into Control.");
  } else if (over) {
    run.live = false;
    say(by("connection"), `The run has ended; torchspec ui ${run.folder} shows it.`);
  } else if (lost) {
    const away = span((performance.now() - heard) / 1000);
    say(by("connection"), `Connection lost, retrying (${away}). What is shown is from before.`);
  }
}

function pause() {
  if (lost) return Math.min(WAIT.most, SECOND + (performance.now() - heard) / 4);
  return runs[shown].live ? WAIT.live : WAIT.over;
}

async function load() {
  const known = await get("/api/runs");
  const fresh = known.length === runs.length ? runs : known.map(({ index }) => new Run(index));
  await Promise.all(fresh.map((run) => run.load(seconds())));
  if (fresh === runs) return;
  runs = fresh;
  shown = Math.min(Number(new URLSearchParams(location.search).get("run")) || 0, runs.length - 1);
  switcher();
}

/** Of the history that is shown; runs are compared over all of their time. */
function seconds() {
  return tab === "compare" ? null : range;
}

function now() {
  due.curves = due.samples = 0;
  return poll();
}

// ---- choosing: run, tab, range, theme ----

function switcher() {
  const bar = by("run-switch");
  bar.hidden = by("tab-compare").hidden = runs.length < 2;
  const names = runs.map((run) => run.name);
  segments(bar, names, shown, (i) => {
    shown = i;
    now();
  });
}

/** Buttons of which one is pressed; they stay as they are when another is chosen, and so does the focus. */
function segments(bar, texts, pressed, choose) {
  const press = (at) => buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === at));
  const buttons = texts.map((text, i) => {
    const click = () => {
      press(i);
      choose(i);
    };
    return h("button", { type: "button", text, on: { click } });
  });
  press(pressed);
  bar.replaceChildren(...buttons);
}

const tabs = [...by("tabs").children];

function choose(button, focus = false) {
  tab = button.id.replace("tab-", "");
  for (const other of tabs) {
    const on = other === button;
    other.setAttribute("aria-selected", on);
    other.tabIndex = on ? 0 : -1;
    by(other.getAttribute("aria-controls")).hidden = !on;
  }
  by("range").hidden = tab !== "flow";
  if (focus) button.focus();
  draw();
  if (runs.length) now();
}

tabs.forEach((button) => button.addEventListener("click", () => choose(button)));
by("tabs").addEventListener("keydown", (event) => {
  const seen = tabs.filter((button) => !button.hidden),
    at = seen.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: seen.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  choose(seen[(to + seen.length) % seen.length], true);
});

const dark = matchMedia("(prefers-color-scheme: dark)");

function theme(wanted) {
  const now = wanted ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = now;
  by("theme").replaceChildren(now === "dark" ? "☀" : "☾", h("span", { text: now === "dark" ? " Light" : " Dark" }));
  by("theme").onclick = () => {
    localStorage.setItem("torchspec-theme", now === "dark" ? "light" : "dark");
    theme(localStorage.getItem("torchspec-theme"));
  };
  redrawCharts();
}

dark.addEventListener("change", () => theme(localStorage.getItem("torchspec-theme")));
document.addEventListener("visibilitychange", () => document.hidden || now());
theme(localStorage.getItem("torchspec-theme"));
const texts = RANGES.map(([text]) => text);
segments(by("range"), texts, texts.length - 1, (i) => {
  range = RANGES[i][1];
  now();
});
choose(tabs[0]);
poll();
