// Tables of the two pools, one row for each worker and each rank.

import { bandwidth, bytes, count, duration, percent, rate, span } from "./format.js";
import { Table } from "./table.js";

/** Whether a worker is no more: it died, or was taken away on purpose. */
export const hasLeft = ({ doing }) => doing === "gone" || doing === "ended";

/** What a worker that is no more does not have. */
const LEFT = {
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

/** A small curve of the last half hour, from `curves`: a time for each row, and values by row and name. */
const curve = (pool, spark) => ({
  name: "half an hour",
  spark,
  values: (row) => [pool.curves.time, pool.curves.rows[pool.table.key(row)]?.tokens_per_s ?? [], 0],
});
const NO_CURVES = { time: [], rows: {} };

export class Workers {
  constructor(parent) {
    this.curves = NO_CURVES;
    this.table = new Table(parent, {
      caption: "Inference workers",
      scope: "worker",
      key: (row) => row.name,
      last: (row) => row.doing === "ended",
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
        curve(this, "inference"),
        column("waiting", "wait_share", percent),
        column("leases", "leases", count),
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
      ...(hasLeft(worker) && LEFT),
    }));
    this.table.set(rows, meaning);
  }
}

/** Of the ranks that share samples, the first counts their tokens. */
const sharing = ({ leader }) => (leader === undefined ? "" : `shares rank ${leader}'s samples`);

export class Ranks {
  constructor(parent) {
    this.curves = NO_CURVES;
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
        { ...column("tokens/s", "tokens_per_s", rate), title: sharing },
        curve(this, "training"),
        column("step", "step_seconds", duration),
        column("wait", "wait_share", percent),
        column("forward", "forward_share", percent),
        column("backward", "backward_share", percent),
        column("reduce", "reduce_share", percent),
        column("optimizer", "optimizer_share", percent),
        column("pause", "pause_share", percent),
        column("queue", "fetched_steps", count),
        column("get", "get_bytes_per_s", bandwidth),
        column("get p50", "get_p50_seconds", duration),
        column("get p99", "get_p99_seconds", duration),
        column("MFU", "mfu", percent),
        column("read", "get_bytes", bytes),
      ],
    });
  }

  update({ snapshot, meaning }) {
    const size = snapshot?.status.sp_size ?? 1;
    const rows = (snapshot?.ranks ?? []).map((rank) => {
      const leader = rank.rank - (rank.rank % size);
      return { ...rank.report, ...rank, ...(leader !== rank.rank && { leader, tokens_per_s: null }) };
    });
    this.table.set(rows, meaning);
  }
}
