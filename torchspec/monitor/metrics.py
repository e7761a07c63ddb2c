"""Every metric of a run, defined once: its name, unit, kind, meaning, and where it is measured.

The files of a run (``monitor/snapshot.py``), Prometheus, Ray's metrics, the page and ``docs/metrics.md`` all go by this
list. A metric is read from a :class:`Snapshot` at ``source``; the last part of the source is its name in the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from torchspec.contracts import StepReport
from torchspec.monitor.snapshot import Snapshot

Kind = Literal["counter", "gauge", "histogram"]
Scope = Literal["run", "pools", "worker", "rank", "draft"]
Unit = Literal[
    "", "seconds", "bytes", "tokens", "samples", "steps", "operations", "ratio", "1/s", "tokens/s", "bytes/s"
]

SCOPES: dict[Scope, str] = {
    "run": "the run as a whole",
    "pools": "summed over a pool",
    "worker": "one inference worker (label `worker`)",
    "rank": "one training rank (label `rank`)",
    "draft": "what the draft learns (label `split`: `train` or `heldout`)",
}
PREFIX = "torchspec_"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``name`` is Prometheus' (with :data:`PREFIX`); ``source`` a path into the scope's record."""

    name: str
    scope: Scope
    source: str
    kind: Kind
    unit: Unit
    meaning: str
    measured: str
    """By whom, and where in the code."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of its labels."""
        if self.key == "samples" and self.scope == "run":
            return ("state",)
        if self.scope == "draft":
            return ("split", "position") if self.source in PER_POSITION else ("split",)
        return (self.scope,) if self.scope in ("worker", "rank") else ()

    @property
    def key(self) -> str:
        """Its name in the run's files."""
        return self.source.rpartition(".")[2]


SUMS = {"report.put_histogram": "report.put_seconds", "report.get_histogram": "report.get_seconds"}
"""Histogram to the counter that adds up what it counts."""
PER_POSITION = ("loss_per_position", "accuracy", "full_accuracy")

_CONTROLLER = "controller"
_LEDGER = "controller (ledger)"
_WORKER = "worker (inference/worker.py)"
_PLUGIN = "engine (inference/capture/writer.py)"
_RANK = "rank (training/trainer.py)"
_FETCH = "rank (training/fetch.py)"
_REPORTS = "controller, from reports (monitor/record/telemetry.py)"

METRICS: tuple[Metric, ...] = (
    # ---- the run ----
    Metric("step", "run", "point.step", "gauge", "steps", "Optimizer steps made", _LEDGER),
    Metric("total_steps", "run", "status.total_steps", "gauge", "steps", "Steps of the whole run", _LEDGER),
    Metric("eta_seconds", "run", "status.eta_seconds", "gauge", "seconds",
           "Time left at the current rate", _CONTROLLER),
    Metric("uptime_seconds", "run", "status.uptime_seconds", "gauge", "seconds",
           "Since the controller started", _CONTROLLER),
    Metric("samples", "run", "point.samples", "gauge", "samples", "Samples in each state of the ledger", _LEDGER),
    Metric("queue_depth", "run", "point.queue_depth", "gauge", "samples",
           "Samples stored and in order, ready for the next steps", _LEDGER),
    Metric("store_bytes", "run", "point.store_bytes", "gauge", "bytes", "Samples that lie in the store", _LEDGER),
    Metric("store_capacity_bytes", "run", "point.store_capacity_bytes", "gauge", "bytes",
           "What samples may fill of the store: all credits", "controller (credits)"),
    Metric("credit_bytes", "run", "point.credit_bytes", "gauge", "bytes",
           "Credits in use: samples in the store, and the upper bound of those in the making", "controller (credits)"),
    Metric("credit_blocked_seconds", "run", "point.credit_blocked_seconds", "counter", "seconds",
           "During which a worker was refused a lease because the store has no credits left", "controller (lease)"),
    Metric("window_blocked_seconds", "run", "point.window_blocked_seconds", "counter", "seconds",
           "During which a worker was refused a lease because the reorder window is full", "controller (lease)"),
    Metric("retries", "run", "point.retries", "counter", "samples",
           "Leases that came to nothing and are tried again", _CONTROLLER),
    Metric("lost_objects", "run", "point.lost_objects", "counter", "samples",
           "Stored samples that a rank did not find, and that are captured again", _CONTROLLER),
    Metric("worker_losses", "run", "point.worker_losses", "counter", "",
           "Workers that died or hung", _CONTROLLER),
    Metric("trainer_losses", "run", "point.trainer_losses", "counter", "",
           "Restarts of the training ranks", _CONTROLLER),
    Metric("faults", "run", "point.faults", "gauge", "",
           "Losses of workers, ranks, store or controller since the run began, restarts included", _CONTROLLER),
    # ---- both pools ----
    Metric("workers", "pools", "point.workers", "gauge", "", "Inference workers, those that start included", _REPORTS),
    Metric("workers_waiting", "pools", "point.workers_waiting", "gauge", "",
           "Workers that hold no lease", _REPORTS),
    Metric("ranks", "pools", "point.ranks", "gauge", "", "Training ranks", _REPORTS),
    Metric("ranks_waiting", "pools", "point.ranks_waiting", "gauge", "", "Ranks that wait for samples", _REPORTS),
    Metric("captured_samples", "pools", "point.captured_samples", "counter", "samples",
           "Samples put by all workers", _CONTROLLER),
    Metric("captured_tokens", "pools", "point.captured_tokens", "counter", "tokens", "Their tokens", _CONTROLLER),
    Metric("answer_tokens", "pools", "point.answer_tokens", "counter", "tokens",
           "Tokens that the target wrote", _WORKER),
    Metric("trained_samples", "pools", "point.trained_samples", "counter", "samples", "Samples trained", _CONTROLLER),
    Metric("trained_tokens", "pools", "point.trained_tokens", "counter", "tokens", "Their tokens", _CONTROLLER),
    Metric("put_bytes", "pools", "point.put_bytes", "counter", "bytes", "Put into the store", _PLUGIN),
    Metric("put_seconds", "pools", "point.put_seconds", "counter", "seconds", "Of all puts; they overlap", _PLUGIN),
    Metric("get_bytes", "pools", "point.get_bytes", "counter", "bytes", "Read from the store by all ranks", _FETCH),
    Metric("get_seconds", "pools", "point.get_seconds", "counter", "seconds",
           "Of all gets; one at a time on each rank", _FETCH),
    Metric("inference_seconds", "pools", "point.worker_seconds", "counter", "seconds",
           "Since each worker began", _WORKER),
    Metric("inference_busy_seconds", "pools", "point.worker_busy_seconds", "counter", "seconds",
           "Holding a lease; the rest of `worker_seconds` was spent waiting for one", _WORKER),
    Metric("inference_engine_seconds", "pools", "point.worker_engine_seconds", "counter", "seconds",
           "With a request in the engine; the rest of the busy time was spent on puts alone", _WORKER),
    Metric("training_seconds", "pools", "point.rank_seconds", "counter", "seconds", "Since each rank joined", _RANK),
    Metric("training_wait_seconds", "pools", "point.rank_wait_seconds", "counter", "seconds",
           "Ranks waiting for the next step's samples", _RANK),
    Metric("training_forward_seconds", "pools", "point.rank_forward_seconds", "counter", "seconds",
           "Forward passes", _RANK),
    Metric("training_backward_seconds", "pools", "point.rank_backward_seconds", "counter", "seconds",
           "Backward passes, with the reduction of gradients where weights are sharded", _RANK),
    Metric("training_reduce_seconds", "pools", "point.rank_reduce_seconds", "counter", "seconds",
           "Adding up over ranks and clipping; who is ahead waits for the others here", _RANK),
    Metric("training_optimizer_seconds", "pools", "point.rank_optimizer_seconds", "counter", "seconds",
           "Optimizer", _RANK),
    Metric("training_pause_seconds", "pools", "point.rank_pause_seconds", "counter", "seconds",
           "Held-out evaluations, checkpoints and exports", _RANK),
    # ---- each worker ----
    Metric("worker_samples", "worker", "report.samples", "counter", "samples", "Samples it has put", _WORKER),
    Metric("worker_tokens", "worker", "report.tokens", "counter", "tokens", "Their tokens", _WORKER),
    Metric("worker_answer_tokens", "worker", "report.answer_tokens", "counter", "tokens",
           "Tokens that its target wrote", _WORKER),
    Metric("worker_put_bytes", "worker", "report.put_bytes", "counter", "bytes", "Put into the store", _PLUGIN),
    Metric("worker_put_seconds", "worker", "report.put_seconds", "counter", "seconds", "Of all its puts", _PLUGIN),
    Metric("worker_busy_seconds", "worker", "report.busy_seconds", "counter", "seconds",
           "Holding a lease", _WORKER),
    Metric("worker_engine_seconds", "worker", "report.engine_seconds", "counter", "seconds",
           "With a request in its engine", _WORKER),
    Metric("worker_seconds", "worker", "report.seconds", "counter", "seconds",
           "Since it began to ask for leases", _WORKER),
    Metric("worker_failures", "worker", "report.failures", "counter", "samples",
           "Leases that came to nothing", _WORKER),
    Metric("worker_leases", "worker", "report.leases", "gauge", "samples", "In hand now", _WORKER),
    Metric("worker_put_latency_seconds", "worker", "report.put_histogram", "histogram", "seconds",
           "Of one put: all objects of a sample", _PLUGIN),
    Metric("worker_samples_per_s", "worker", "samples_per_s", "gauge", "1/s", "Over the last half minute", _REPORTS),
    Metric("worker_tokens_per_s", "worker", "tokens_per_s", "gauge", "tokens/s", "Over the last half minute", _REPORTS),
    Metric("worker_put_bytes_per_s", "worker", "put_bytes_per_s", "gauge", "bytes/s",
           "Bandwidth of its puts while one was under way", _REPORTS),
    Metric("worker_put_p50_seconds", "worker", "put_p50_seconds", "gauge", "seconds",
           "Median latency of a put", _REPORTS),
    Metric("worker_put_p99_seconds", "worker", "put_p99_seconds", "gauge", "seconds", "99th percentile", _REPORTS),
    Metric("worker_wait_ratio", "worker", "wait_share", "gauge", "ratio",
           "Share of the time without a lease", _REPORTS),
    # ---- each rank ----
    Metric("rank_step", "rank", "report.step", "gauge", "steps", "The last step it has made", _RANK),
    Metric("rank_steps", "rank", "report.steps", "counter", "steps", "Steps since it joined", _RANK),
    Metric("rank_tokens", "rank", "report.tokens", "counter", "tokens", "Tokens of its samples", _RANK),
    Metric("rank_seconds", "rank", "report.seconds", "counter", "seconds", "Since it joined", _RANK),
    Metric("rank_wait_seconds", "rank", "report.wait_seconds", "counter", "seconds", "Waiting for samples", _RANK),
    Metric("rank_forward_seconds", "rank", "report.forward_seconds", "counter", "seconds", "Forward passes", _RANK),
    Metric("rank_backward_seconds", "rank", "report.backward_seconds", "counter", "seconds", "Backward passes", _RANK),
    Metric("rank_reduce_seconds", "rank", "report.reduce_seconds", "counter", "seconds",
           "Adding up over ranks and clipping", _RANK),
    Metric("rank_optimizer_seconds", "rank", "report.optimizer_seconds", "counter", "seconds", "Optimizer", _RANK),
    Metric("rank_pause_seconds", "rank", "report.pause_seconds", "counter", "seconds",
           "Evaluations, checkpoints", _RANK),
    Metric("rank_get_seconds", "rank", "report.get_seconds", "counter", "seconds",
           "Fetching from the store, in the background", _FETCH),
    Metric("rank_get_bytes", "rank", "report.get_bytes", "counter", "bytes", "Read from the store", _FETCH),
    Metric("rank_get_latency_seconds", "rank", "report.get_histogram", "histogram", "seconds",
           "Of one get: what the rank reads of a sample", _FETCH),
    Metric("rank_queue_depth", "rank", "report.fetched_steps", "gauge", "steps",
           "Steps fetched and waiting for the step loop", _FETCH),
    Metric("rank_flops", "rank", "report.flops", "counter", "operations",
           "Floating-point operations of the draft, forward and backward", "rank (training/learner.py)"),
    Metric("rank_peak_flops", "rank", "report.peak_flops", "gauge", "operations",
           "A second, of its device; left out where it is not known", "rank (training/learner.py)"),
    Metric("rank_tokens_per_s", "rank", "tokens_per_s", "gauge", "tokens/s", "Over the last half minute", _REPORTS),
    Metric("rank_step_seconds", "rank", "step_seconds", "gauge", "seconds",
           "Mean time of a step, waits included", _REPORTS),
    Metric("rank_wait_ratio", "rank", "wait_share", "gauge", "ratio",
           "Share of the time waiting for samples", _REPORTS),
    Metric("rank_forward_ratio", "rank", "forward_share", "gauge", "ratio", "Share in forward passes", _REPORTS),
    Metric("rank_backward_ratio", "rank", "backward_share", "gauge", "ratio", "Share in backward passes", _REPORTS),
    Metric("rank_reduce_ratio", "rank", "reduce_share", "gauge", "ratio", "Share in reductions over ranks", _REPORTS),
    Metric("rank_optimizer_ratio", "rank", "optimizer_share", "gauge", "ratio", "Share in the optimizer", _REPORTS),
    Metric("rank_pause_ratio", "rank", "pause_share", "gauge", "ratio",
           "Share in evaluations and checkpoints", _REPORTS),
    Metric("rank_get_bytes_per_s", "rank", "get_bytes_per_s", "gauge", "bytes/s",
           "Bandwidth of its gets while one was under way", _REPORTS),
    Metric("rank_get_p50_seconds", "rank", "get_p50_seconds", "gauge", "seconds", "Median latency of a get", _REPORTS),
    Metric("rank_get_p99_seconds", "rank", "get_p99_seconds", "gauge", "seconds", "99th percentile", _REPORTS),
    Metric("rank_mfu_ratio", "rank", "mfu", "gauge", "ratio",
           "Model FLOPs utilisation of the whole time; left out where the device's peak is not known", _REPORTS),
    # ---- the draft ----
    Metric("loss", "draft", "loss", "gauge", "", "Loss, positions weighted as they are trained", _RANK),
    Metric("position_loss", "draft", "loss_per_position", "gauge", "", "Loss of each drafted position", _RANK),
    Metric("accuracy_ratio", "draft", "accuracy", "gauge", "ratio",
           "Right first choices where the target's lies in the draft's vocabulary", _RANK),
    Metric("full_accuracy_ratio", "draft", "full_accuracy", "gauge", "ratio",
           "The same, other targets counted as misses", _RANK),
    Metric("accept_length", "draft", "accept_length", "gauge", "tokens",
           "Simulated: what a chain of drafted tokens would yield", _RANK),
    Metric("learning_rate", "draft", "learning_rate", "gauge", "", "Learning rate", _RANK),
    Metric("grad_norm", "draft", "grad_norm", "gauge", "", "Gradient norm before clipping", _RANK),
    Metric("measured_accept_length", "run", "measured_accept_length", "gauge", "tokens",
           "Accept length in a real server, where `torchspec eval` has measured it", "evaluation/evaluate.py"),
)  # fmt: skip

Labels = dict[str, str]


def read(metric: Metric, snapshot: Snapshot) -> Iterator[tuple[Labels, Any]]:
    """Labels and value of each of its series; nothing where it is not known. A histogram comes with its sum."""
    for labels, record in _records(metric.scope, snapshot):
        value = attrgetter(metric.source)(record)
        if value is None:
            continue
        if metric.kind == "histogram":
            yield labels, (value, attrgetter(SUMS[metric.source])(record))
        elif isinstance(value, dict):
            yield from ((labels | {"state": state}, count) for state, count in value.items())
        elif metric.source in PER_POSITION:
            yield from ((labels | {"position": str(i)}, v) for i, v in enumerate(value, start=1))
        else:
            yield labels, value


def _records(scope: Scope, snapshot: Snapshot) -> Iterator[tuple[Labels, Any]]:
    if scope in ("run", "pools"):
        yield {}, snapshot
    elif scope == "worker":
        yield from (({"worker": w.name}, w) for w in snapshot.workers if w.alive)
    elif scope == "rank":
        yield from (({"rank": str(r.rank)}, r) for r in snapshot.ranks)
    else:
        reports: tuple[StepReport | None, ...] = (snapshot.status.last_step, snapshot.status.last_heldout)
        for report in reports:
            if report is not None:
                yield {"split": report.split}, report


def documentation() -> str:
    """``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Generated from `torchspec/monitor/metrics.py`: `python -m torchspec.monitor.metrics > docs/metrics.md`.",
        "",
        f"Prometheus' names begin with `{PREFIX}`; those of counters end with `_total`. The name in the run's files "
        "(`metrics/latest.json`, `history.jsonl`, `metrics.jsonl`) is the key. Every series has a label `run`.",
        f"Beside them: `{PREFIX}live` (1 while the run is running) and `{PREFIX}snapshot_time_seconds`.",
    ]
    for scope, title in SCOPES.items():
        lines += [
            "",
            f"## {title[0].upper()}{title[1:]}",
            "",
            "| Prometheus | key | kind | unit | meaning | measured by |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for m in METRICS:
            if m.scope == scope:
                name = f"`{prometheus_name(m)}`"
                lines.append(f"| {name} | `{m.key}` | {m.kind} | {m.unit or '-'} | {m.meaning} | {m.measured} |")
    return "\n".join(lines) + "\n"


def prometheus_name(metric: Metric) -> str:
    """As it is scraped."""
    return f"{PREFIX}{metric.name}" + ("_total" if metric.kind == "counter" else "")


if __name__ == "__main__":
    print(documentation(), end="")
