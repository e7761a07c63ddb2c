// Tables of the two pools, one row for each worker and each rank.

import { bandwidth, bytes, count, duration, percent, rate, span } from "./format.js";
import { Table } from "./table.js";

/** What a worker that is no more does not have. */
const GONE = {
  samples_per_s: null,
  tokens_per_s: null,
  wait_share: null,
  leases: null,
  put_bytes_per_s: null,
  put_p50_seconds: null,
  put_p99_seconds: null,
  age: null,
};
const RANK_STATES = { training: "working", paused: "starting", waiting: "waiting" };

export class Workers {
  constructor(parent) {
    this.curves = {};
    const column = (name, title, read, show) => ({
      name,
      title,
      value: read,
      show: (row) => show(read(row)),
      numeric: true,
    });
    this.table = new Table(parent, {
      caption: "Inference workers",
      key: (row) => row.name,
      sort: { name: "worker", down: false },
      columns: [
        { name: "worker", value: (row) => row.name, show: (row) => row.name },
        {
          name: "state",
          value: (row) => row.doing,
          show: (row) => row.doing,
          badge: (row) => `badge badge-${row.doing}`,
        },
        column("samples/s", "Samples put a second, over the last half minute", (row) => row.samples_per_s, rate),
        column("tokens/s", "Tokens captured a second, over the last half minute", (row) => row.tokens_per_s, rate),
        { name: "half an hour", spark: "inference", values: (row) => this.curves[row.name]?.tokens_per_s ?? [] },
        column("waiting", "Share of the time without a lease", (row) => row.wait_share, percent),
        column("in hand", "Leases in hand now", (row) => row.leases, count),
        column("put", "Bandwidth of its puts while one was under way", (row) => row.put_bytes_per_s, bandwidth),
        column("put p50", "Median latency of a put", (row) => row.put_p50_seconds, duration),
        column("put p99", "99th percentile of a put", (row) => row.put_p99_seconds, duration),
        column("samples", "Samples it has put", (row) => row.report.samples, count),
        column("tokens", "Tokens of these samples", (row) => row.report.tokens, count),
        column("failures", "Leases that came to nothing", (row) => row.report.failures, count),
        column("age", "Since it was started", (row) => row.age, span),
        column("heard", "Since it was last heard of", (row) => row.silence, span),
      ],
    });
  }

  update({ snapshot }) {
    const now = snapshot?.point.time;
    const row = (worker) => ({
      ...worker,
      leases: worker.report.leases,
      age: now - worker.since,
      silence: now - worker.heard,
    });
    this.table.set(
      (snapshot?.workers ?? []).map((worker) => (worker.doing === "gone" ? { ...row(worker), ...GONE } : row(worker))),
    );
  }
}

export class Ranks {
  constructor(parent) {
    this.curves = {};
    const column = (name, title, read, show) => ({
      name,
      title,
      value: read,
      show: (row) => show(read(row)),
      numeric: true,
    });
    const share = (name, title, part) => column(name, title, (row) => row[`${part}_share`], percent);
    this.table = new Table(parent, {
      caption: "Training ranks",
      key: (row) => String(row.rank),
      sort: { name: "rank", down: false },
      columns: [
        { name: "rank", value: (row) => row.rank, show: (row) => String(row.rank) },
        {
          name: "state",
          value: (row) => row.report.doing,
          show: (row) => row.report.doing,
          badge: (row) => `badge badge-${RANK_STATES[row.report.doing]}`,
        },
        column("tokens/s", "Tokens trained a second, over the last half minute", (row) => row.tokens_per_s, rate),
        { name: "half an hour", spark: "training", values: (row) => this.curves[row.rank]?.tokens_per_s ?? [] },
        column("step", "Mean time of a step, waits included", (row) => row.step_seconds, duration),
        share("wait", "Share of the time waiting for samples", "wait"),
        share("forward", "Share of the time in forward passes", "forward"),
        share("backward", "Share of the time in backward passes", "backward"),
        share("reduce", "Share of the time in reductions over the ranks", "reduce"),
        share("optimizer", "Share of the time in the optimizer", "optimizer"),
        share("paused", "Share of the time in evaluations and checkpoints", "pause"),
        column("queue", "Steps fetched and waiting for the step loop", (row) => row.report.queue_depth, count),
        column("get", "Bandwidth of its gets while one was under way", (row) => row.get_bytes_per_s, bandwidth),
        column("get p50", "Median latency of a get", (row) => row.get_p50_seconds, duration),
        column("get p99", "99th percentile of a get", (row) => row.get_p99_seconds, duration),
        column(
          "MFU",
          "Model FLOPs utilisation, waits included; unknown where the device's peak is",
          (row) => row.mfu,
          percent,
        ),
        column("read", "Read from the store since it joined", (row) => row.report.get_bytes, bytes),
      ],
    });
  }

  update({ snapshot }) {
    this.table.set(snapshot?.ranks ?? []);
  }
}
