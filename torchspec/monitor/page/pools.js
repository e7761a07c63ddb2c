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

/** A column of figures; `key` names the metric, whose meaning becomes the column's title. */
const column = (name, key, show) => ({
  name,
  key,
  value: (row) => row[key],
  show: (row) => show(row[key]),
  numeric: true,
});

export class Workers {
  constructor(parent) {
    this.curves = {};
    this.table = new Table(parent, {
      caption: "Inference workers",
      scope: "worker",
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
        column("samples/s", "samples_per_s", rate),
        column("tokens/s", "tokens_per_s", rate),
        { name: "half an hour", spark: "inference", values: (row) => this.curves[row.name]?.tokens_per_s ?? [] },
        column("waiting", "wait_share", percent),
        column("in hand", "leases", count),
        column("put", "put_bytes_per_s", bandwidth),
        column("put p50", "put_p50_seconds", duration),
        column("put p99", "put_p99_seconds", duration),
        column("samples", "samples", count),
        column("tokens", "tokens", count),
        column("failures", "failures", count),
        column("age", "age", span),
        column("heard", "silence", (seconds) => `${span(seconds)} ago`),
      ],
    });
  }

  update({ snapshot, meaning }) {
    const now = snapshot?.point.time;
    const rows = (snapshot?.workers ?? []).map((worker) => ({
      ...worker.report,
      ...worker,
      age: now - worker.since,
      silence: now - worker.heard,
      ...(worker.doing === "gone" && GONE),
    }));
    this.table.set(rows, meaning);
  }
}

export class Ranks {
  constructor(parent) {
    this.curves = {};
    this.table = new Table(parent, {
      caption: "Training ranks",
      scope: "rank",
      key: (row) => String(row.rank),
      sort: { name: "rank", down: false },
      columns: [
        { name: "rank", value: (row) => row.rank, show: (row) => String(row.rank) },
        {
          name: "state",
          value: (row) => row.doing,
          show: (row) => row.doing,
          badge: (row) => `badge badge-${RANK_STATES[row.doing]}`,
        },
        column("tokens/s", "tokens_per_s", rate),
        { name: "half an hour", spark: "training", values: (row) => this.curves[row.rank]?.tokens_per_s ?? [] },
        column("step", "step_seconds", duration),
        column("wait", "wait_share", percent),
        column("forward", "forward_share", percent),
        column("backward", "backward_share", percent),
        column("reduce", "reduce_share", percent),
        column("optimizer", "optimizer_share", percent),
        column("pause", "pause_share", percent),
        column("queue", "queue_depth", count),
        column("get", "get_bytes_per_s", bandwidth),
        column("get p50", "get_p50_seconds", duration),
        column("get p99", "get_p99_seconds", duration),
        column("MFU", "mfu", percent),
        column("read", "get_bytes", bytes),
      ],
    });
  }

  update({ snapshot, meaning }) {
    this.table.set(
      (snapshot?.ranks ?? []).map((rank) => ({ ...rank.report, ...rank })),
      meaning,
    );
  }
}
