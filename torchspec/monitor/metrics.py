"""Every metric of a run, defined once: its name, unit, kind, meaning, and where it is measured.

The files of a run (``monitor/snapshot.py``), Prometheus, Ray's metrics, the page and ``docs/metrics.md`` all go by this
list. A metric is read from a :class:`Snapshot` at ``source``; the last part of the source is its name in the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

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

    scope: Scope
    name: str
    source: str
    kind: Kind
    unit: Unit
    meaning: str
    measured: str
    """By whom, and where in the code."""

    @property
    def labels(self) -> tuple[str, ...]:
        if self.source == "point.samples":
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

_DEFINED: dict[Scope, tuple[tuple[str, str, Kind, Unit, str, str], ...]] = {
    # name, source, kind, unit, meaning, measured
    "run": (
        ("step", "point.step", "gauge", "steps", "Optimizer steps made", _LEDGER),
        ("total_steps", "status.total_steps", "gauge", "steps", "Steps of the whole run", _LEDGER),
        ("eta_seconds", "status.eta_seconds", "gauge", "seconds", "Time left at the current rate", _CONTROLLER),
        ("uptime_seconds", "status.uptime_seconds", "gauge", "seconds", "Since the controller started", _CONTROLLER),
        ("samples", "point.samples", "gauge", "samples", "Samples in each state of the ledger", _LEDGER),
        ("queue_depth", "point.queue_depth", "gauge", "samples",
         "Samples stored and in order, ready for the next steps", _LEDGER),
        ("store_bytes", "point.store_bytes", "gauge", "bytes", "Samples that lie in the store", _LEDGER),
        ("store_capacity_bytes", "point.store_capacity_bytes", "gauge", "bytes",
         "What samples may fill of the store: all credits", "controller (credits)"),
        ("credit_bytes", "point.credit_bytes", "gauge", "bytes",
         "Credits in use: samples in the store, and the upper bound of those in the making", "controller (credits)"),
        ("credit_blocked_seconds", "point.credit_blocked_seconds", "counter", "seconds",
         "During which a worker was refused a lease because the store has no credits left", "controller (lease)"),
        ("window_blocked_seconds", "point.window_blocked_seconds", "counter", "seconds",
         "During which a worker was refused a lease because the reorder window is full", "controller (lease)"),
        ("retries", "point.retries", "counter", "samples",
         "Leases that came to nothing and are tried again", _CONTROLLER),
        ("lost_objects", "point.lost_objects", "counter", "samples",
         "Stored samples that a rank did not find, and that are captured again", _CONTROLLER),
        ("worker_losses", "point.worker_losses", "counter", "", "Workers that died or hung", _CONTROLLER),
        ("trainer_losses", "point.trainer_losses", "counter", "", "Restarts of the training ranks", _CONTROLLER),
        ("faults", "point.faults", "gauge", "",
         "Losses of workers, ranks, store or controller since the run began, restarts included", _CONTROLLER),
        ("measured_accept_length", "measured_accept_length", "gauge", "tokens",
         "Accept length in a real server, where `torchspec eval` has measured it", "evaluation/evaluate.py"),
    ),
    "pools": (
        ("workers", "point.workers", "gauge", "", "Inference workers, those that start included", _REPORTS),
        ("workers_waiting", "point.workers_waiting", "gauge", "", "Workers that hold no lease", _REPORTS),
        ("ranks", "point.ranks", "gauge", "", "Training ranks", _REPORTS),
        ("ranks_waiting", "point.ranks_waiting", "gauge", "", "Ranks that wait for samples", _REPORTS),
        ("captured_samples", "point.captured_samples", "counter", "samples", "Samples put by all workers", _CONTROLLER),
        ("captured_tokens", "point.captured_tokens", "counter", "tokens", "Their tokens", _CONTROLLER),
        ("answer_tokens", "point.answer_tokens", "counter", "tokens", "Tokens that the target wrote", _WORKER),
        ("trained_samples", "point.trained_samples", "counter", "samples", "Samples trained", _CONTROLLER),
        ("trained_tokens", "point.trained_tokens", "counter", "tokens", "Their tokens", _CONTROLLER),
        ("put_bytes", "point.put_bytes", "counter", "bytes", "Put into the store", _PLUGIN),
        ("put_seconds", "point.put_seconds", "counter", "seconds", "Of all puts; they overlap", _PLUGIN),
        ("get_bytes", "point.get_bytes", "counter", "bytes", "Read from the store by all ranks", _FETCH),
        ("get_seconds", "point.get_seconds", "counter", "seconds", "Of all gets; one at a time on each rank", _FETCH),
        ("inference_seconds", "point.worker_seconds", "counter", "seconds", "Since each worker began", _WORKER),
        ("inference_busy_seconds", "point.worker_busy_seconds", "counter", "seconds",
         "Holding a lease; the rest of `worker_seconds` was spent waiting for one", _WORKER),
        ("inference_engine_seconds", "point.worker_engine_seconds", "counter", "seconds",
         "With a request in the engine; the rest of the busy time was spent on puts alone", _WORKER),
        ("training_seconds", "point.rank_seconds", "counter", "seconds", "Since each rank joined", _RANK),
        ("training_wait_seconds", "point.rank_wait_seconds", "counter", "seconds",
         "Ranks waiting for the next step's samples", _RANK),
        ("training_forward_seconds", "point.rank_forward_seconds", "counter", "seconds", "Forward passes", _RANK),
        ("training_backward_seconds", "point.rank_backward_seconds", "counter", "seconds",
         "Backward passes, with the reduction of gradients where weights are sharded", _RANK),
        ("training_reduce_seconds", "point.rank_reduce_seconds", "counter", "seconds",
         "Adding up over ranks and clipping; who is ahead waits for the others here", _RANK),
        ("training_optimizer_seconds", "point.rank_optimizer_seconds", "counter", "seconds", "Optimizer", _RANK),
        ("training_pause_seconds", "point.rank_pause_seconds", "counter", "seconds",
         "Held-out evaluations, checkpoints and exports", _RANK),
    ),
    "worker": (
        ("worker_samples", "report.samples", "counter", "samples", "Samples it has put", _WORKER),
        ("worker_tokens", "report.tokens", "counter", "tokens", "Their tokens", _WORKER),
        ("worker_answer_tokens", "report.answer_tokens", "counter", "tokens", "Tokens that its target wrote", _WORKER),
        ("worker_put_bytes", "report.put_bytes", "counter", "bytes", "Put into the store", _PLUGIN),
        ("worker_put_seconds", "report.put_seconds", "counter", "seconds", "Of all its puts", _PLUGIN),
        ("worker_busy_seconds", "report.busy_seconds", "counter", "seconds", "Holding a lease", _WORKER),
        ("worker_engine_seconds", "report.engine_seconds", "counter", "seconds",
         "With a request in its engine", _WORKER),
        ("worker_seconds", "report.seconds", "counter", "seconds", "Since it began to ask for leases", _WORKER),
        ("worker_failures", "report.failures", "counter", "samples", "Leases that came to nothing", _WORKER),
        ("worker_leases", "report.leases", "gauge", "samples", "In hand now", _WORKER),
        ("worker_put_latency_seconds", "report.put_histogram", "histogram", "seconds",
         "Of one put: all objects of a sample", _PLUGIN),
        ("worker_samples_per_s", "samples_per_s", "gauge", "1/s", "Over the last half minute", _REPORTS),
        ("worker_tokens_per_s", "tokens_per_s", "gauge", "tokens/s", "Over the last half minute", _REPORTS),
        ("worker_put_bytes_per_s", "put_bytes_per_s", "gauge", "bytes/s",
         "Bandwidth of its puts while one was under way", _REPORTS),
        ("worker_put_p50_seconds", "put_p50_seconds", "gauge", "seconds", "Median latency of a put", _REPORTS),
        ("worker_put_p99_seconds", "put_p99_seconds", "gauge", "seconds", "99th percentile", _REPORTS),
        ("worker_wait_ratio", "wait_share", "gauge", "ratio", "Share of the time without a lease", _REPORTS),
    ),
    "rank": (
        ("rank_step", "report.step", "gauge", "steps", "The last step it has made", _RANK),
        ("rank_steps", "report.steps", "counter", "steps", "Steps since it joined", _RANK),
        ("rank_tokens", "report.tokens", "counter", "tokens", "Tokens of its samples", _RANK),
        ("rank_seconds", "report.seconds", "counter", "seconds", "Since it joined", _RANK),
        ("rank_wait_seconds", "report.wait_seconds", "counter", "seconds", "Waiting for samples", _RANK),
        ("rank_forward_seconds", "report.forward_seconds", "counter", "seconds", "Forward passes", _RANK),
        ("rank_backward_seconds", "report.backward_seconds", "counter", "seconds", "Backward passes", _RANK),
        ("rank_reduce_seconds", "report.reduce_seconds", "counter", "seconds",
         "Adding up over ranks and clipping", _RANK),
        ("rank_optimizer_seconds", "report.optimizer_seconds", "counter", "seconds", "Optimizer", _RANK),
        ("rank_pause_seconds", "report.pause_seconds", "counter", "seconds", "Evaluations, checkpoints", _RANK),
        ("rank_get_seconds", "report.get_seconds", "counter", "seconds",
         "Fetching from the store, in the background", _FETCH),
        ("rank_get_bytes", "report.get_bytes", "counter", "bytes", "Read from the store", _FETCH),
        ("rank_get_latency_seconds", "report.get_histogram", "histogram", "seconds",
         "Of one get: what the rank reads of a sample", _FETCH),
        ("rank_queue_depth", "report.fetched_steps", "gauge", "steps",
         "Steps fetched and waiting for the step loop", _FETCH),
        ("rank_flops", "report.flops", "counter", "operations",
         "Floating-point operations of the draft, forward and backward", "rank (training/learner.py)"),
        ("rank_peak_flops", "report.peak_flops", "gauge", "operations",
         "A second, of its device; left out where it is not known", "rank (training/learner.py)"),
        ("rank_tokens_per_s", "tokens_per_s", "gauge", "tokens/s", "Over the last half minute", _REPORTS),
        ("rank_step_seconds", "step_seconds", "gauge", "seconds", "Mean time of a step, waits included", _REPORTS),
        ("rank_wait_ratio", "wait_share", "gauge", "ratio", "Share of the time waiting for samples", _REPORTS),
        ("rank_forward_ratio", "forward_share", "gauge", "ratio", "Share in forward passes", _REPORTS),
        ("rank_backward_ratio", "backward_share", "gauge", "ratio", "Share in backward passes", _REPORTS),
        ("rank_reduce_ratio", "reduce_share", "gauge", "ratio", "Share in reductions over ranks", _REPORTS),
        ("rank_optimizer_ratio", "optimizer_share", "gauge", "ratio", "Share in the optimizer", _REPORTS),
        ("rank_pause_ratio", "pause_share", "gauge", "ratio", "Share in evaluations and checkpoints", _REPORTS),
        ("rank_get_bytes_per_s", "get_bytes_per_s", "gauge", "bytes/s",
         "Bandwidth of its gets while one was under way", _REPORTS),
        ("rank_get_p50_seconds", "get_p50_seconds", "gauge", "seconds", "Median latency of a get", _REPORTS),
        ("rank_get_p99_seconds", "get_p99_seconds", "gauge", "seconds", "99th percentile", _REPORTS),
        ("rank_mfu_ratio", "mfu", "gauge", "ratio",
         "Model FLOPs utilisation of the whole time; left out where the device's peak is not known", _REPORTS),
    ),
    "draft": (
        ("loss", "loss", "gauge", "", "Loss, positions weighted as they are trained", _RANK),
        ("position_loss", "loss_per_position", "gauge", "", "Loss of each drafted position", _RANK),
        ("accuracy_ratio", "accuracy", "gauge", "ratio",
         "Right first choices where the target's lies in the draft's vocabulary", _RANK),
        ("full_accuracy_ratio", "full_accuracy", "gauge", "ratio", "The same, other targets counted as misses", _RANK),
        ("accept_length", "accept_length", "gauge", "tokens",
         "Simulated: what a chain of drafted tokens would yield", _RANK),
        ("learning_rate", "learning_rate", "gauge", "", "Learning rate", _RANK),
        ("grad_norm", "grad_norm", "gauge", "", "Gradient norm before clipping", _RANK),
    ),
}  # fmt: skip
METRICS = tuple(Metric(scope, *row) for scope, rows in _DEFINED.items() for row in rows)

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
        for report in (snapshot.status.last_step, snapshot.status.last_heldout):
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
            "|---|---|---|---|---|---|",
        ]
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
