"""Each metric is defined once, is in every view, and is scraped as it is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.simulation.pipeline import Simulation
from tests.simulation.simulated_run import SCENARIOS, SimulatedRun
from torchspec.contracts import RankReport, StepReport, WorkerReport
from torchspec.monitor.metrics import METRICS, PREFIX, documentation, prometheus_name, read
from torchspec.monitor.prometheus import exposition
from torchspec.monitor.snapshot import HistoryPoint, RankState, Snapshot, WorkerState, read_latest

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"
NOT_A_NUMBER = {
    HistoryPoint: {"time", "phase"},
    WorkerState: {"name", "doing", "since", "heard", "report"},
    WorkerReport: {"worker"},
    RankState: {"rank", "heard", "report"},
    RankReport: {"rank", "doing"},
    StepReport: {
        "step",
        "split",
        "tokens",
        "loss_tokens",
        "wait_seconds",
        "fetch_seconds",
        "compute_seconds",
        "optimizer_seconds",
    },
}
"""Fields that are no metric; the step's times are those of rank 0, which all ranks report by themselves."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics") / "run"
    run = SimulatedRun(folder, Simulation(SCENARIOS["balanced"]))
    run.follow(100)
    run.kill_worker(1)
    run.follow(200)
    return folder


@pytest.fixture(scope="module")
def snapshot(folder: Path) -> Snapshot:
    latest = read_latest(folder)
    assert latest is not None
    return latest


def test_every_number_is_a_metric_and_every_metric_a_number() -> None:
    keys = [metric.key for metric in METRICS]
    wanted = [f.name for kind, others in NOT_A_NUMBER.items() for f in fields(kind) if f.name not in others]
    extra = {"total_steps", "eta_seconds", "uptime_seconds", "measured_accept_length"}
    assert sorted(keys) == sorted([*wanted, *extra])
    names = [prometheus_name(metric) for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"torchspec_[a-z][a-z0-9_]*", name) for name in names)
    assert all(metric.meaning and metric.measured for metric in METRICS)


def test_the_documentation_is_current() -> None:
    assert DOCS.read_text() == documentation(), "python -m torchspec.monitor.metrics > docs/metrics.md"
    for metric in METRICS:
        assert f"`{prometheus_name(metric)}` | `{metric.key}`" in documentation()


def test_prometheus_gets_every_metric_with_its_value(snapshot: Snapshot) -> None:
    families = {f.name: f for f in text_string_to_metric_families(exposition("run", snapshot, live=True).decode())}
    for metric in METRICS:
        family = families[PREFIX + metric.name]
        assert family.type == metric.kind
        if metric.kind == "histogram":
            continue
        scraped = {tuple(sorted(s.labels.items())): s.value for s in family.samples}
        expected = {tuple(sorted({"run": "run", **labels}.items())): value for labels, value in read(metric, snapshot)}
        assert scraped == pytest.approx(expected)
        optional = {"measured_accept_length"}
        assert scraped or metric.name in optional, f"{metric.name} has no series"
    assert families["torchspec_live"].samples[0].value == 1


def test_the_scraped_values_are_the_runs(snapshot: Snapshot) -> None:
    text = exposition("run", snapshot, live=False).decode()
    assert f'torchspec_step{{run="run"}} {float(snapshot.status.step)}' in text
    assert f'torchspec_samples{{run="run",state="pending"}} {float(snapshot.point.samples["pending"])}' in text
    report = next(w.report for w in snapshot.workers if w.name == "worker-3")
    assert f'torchspec_worker_samples_total{{run="run",worker="worker-3"}} {float(report.samples)}' in text
    assert 'worker="worker-1"' not in text, "it is gone"
    assert 'torchspec_position_loss{position="5",run="run",split="train"}' in text


def test_latencies_are_histograms(snapshot: Snapshot) -> None:
    families = {f.name: f for f in text_string_to_metric_families(exposition("run", snapshot, live=True).decode())}
    samples = families["torchspec_rank_get_latency_seconds"].samples
    report = snapshot.ranks[0].report
    mine = [s for s in samples if s.labels["rank"] == "0"]
    buckets = [s.value for s in mine if s.name.endswith("_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == sum(report.get_histogram) > 0
    assert next(s.value for s in mine if s.name.endswith("_sum")) == pytest.approx(report.get_seconds)


def test_before_the_first_snapshot_there_is_only_whether_it_lives() -> None:
    text = exposition("run", None, live=True).decode()
    assert 'torchspec_live{run="run"} 1.0' in text and "torchspec_step" not in text


def test_numbers_are_plausible(snapshot: Snapshot) -> None:
    point = snapshot.point
    assert sum(point.samples.values()) == SCENARIOS["balanced"].samples
    rank = snapshot.ranks[0]
    shares = [getattr(rank, f"{p}_share") for p in ("wait", "forward", "backward", "reduce", "optimizer", "pause")]
    assert sum(shares) == pytest.approx(1, abs=0.1), "the parts make up the time"
    assert rank.mfu == pytest.approx(rank.report.flops / (rank.report.seconds * 2e13), rel=0.3)
    worker = snapshot.workers[0]
    assert worker.put_bytes_per_s == pytest.approx((4 << 20) / 0.01, rel=0.1)
    assert worker.put_p50_seconds == pytest.approx(0.01, rel=0.5)
