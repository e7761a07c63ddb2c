"""TensorBoard: what is logged is what TensorBoard reads back, also after a resume."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchspec.config.schema import MonitorConfig
from torchspec.contracts import RunStatus, StepReport
from torchspec.monitor.trackers import Trackers, open_trackers

REPORT = StepReport(
    step=1,
    loss=3.5,
    loss_per_position=(3.0, 4.0),
    accuracy=(0.5, 0.25),
    full_accuracy=(0.4, 0.2),
    accept_length=1.48,
    learning_rate=1e-3,
    grad_norm=0.5,
    tokens=640,
    loss_tokens=300,
    wait_seconds=0.25,
    fetch_seconds=0.125,
    compute_seconds=2.0,
    optimizer_seconds=0.0625,
)


def status(step: int, queue: int = 7) -> RunStatus:
    return RunStatus(
        run="r",
        phase="training",
        step=step,
        total_steps=10,
        epoch=0,
        epochs=1,
        samples={"rejected": 2},
        store_bytes=1 << 20,
        store_capacity=1 << 30,
        credit_bytes=2 << 20,
        queue_depth=queue,
        workers=(),
        last_step=None,
        last_heldout=None,
        inference_tokens_per_s=1000.0,
        inference_samples_per_s=4.0,
        training_tokens_per_s=500.0,
        training_samples_per_s=2.0,
        eta_seconds=None,
        uptime_seconds=9.0,
    )


def read(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_back_every_figure(tmp_path: Path) -> None:
    trackers = open_trackers(MonitorConfig(), tmp_path)
    heldout = replace(REPORT, step=2, loss=3.25, accept_length=1.5, split="heldout")
    trackers.log(status(1), [REPORT])
    trackers.log(status(1, queue=99), [])
    trackers.log(status(2, queue=8), [replace(REPORT, step=2, loss=2.5), heldout])
    assert trackers.steps_seen == 3
    trackers.close()
    scalars = read(tmp_path)
    assert scalars["train/loss"] == [(1, 3.5), (2, 2.5)]
    assert scalars["heldout/loss"] == [(2, 3.25)]
    assert scalars["heldout/accept_length"] == [(2, 1.5)]
    assert scalars["train_position/accuracy_1"][0] == (1, pytest.approx(0.4))
    assert scalars["train_position/loss_2"][0] == (1, 4.0)
    assert scalars["optimizer/learning_rate"][0] == (1, pytest.approx(1e-3))
    assert scalars["step/compute_seconds"] == [(1, 2.0), (2, 2.0)]
    assert scalars["pools/queue_depth"] == [(1, 7.0), (2, 8.0)], "a status without a new step is not logged"
    assert scalars["pools/inference_tokens_per_s"][0] == (1, 1000.0)
    assert scalars["store/bytes"][0] == (1, float(1 << 20))
    assert not any(tag.startswith(("optimizer/", "step/")) and len(v) > 2 for tag, v in scalars.items())


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    for first, losses in ((1, [9.0, 8.0, 7.0, 6.0]), (3, [5.0, 4.0])):
        trackers = open_trackers(MonitorConfig(), tmp_path)
        for i, loss in enumerate(losses):
            trackers.log(status(first + i), [replace(REPORT, step=first + i, loss=loss)])
        trackers.close()
    assert read(tmp_path)["train/loss"] == [(1, 9.0), (2, 8.0), (3, 5.0), (4, 4.0)]


def test_switched_off_it_writes_nothing_and_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from torchspec.config.schema import MonitorConfig\n"
        "from torchspec.monitor.trackers import open_trackers\n"
        "open_trackers(MonitorConfig(tensorboard=False), Path(sys.argv[1])).close()\n"
        "print('tensorboard' in sys.modules)\n"
        "open_trackers(MonitorConfig(), Path(sys.argv[1])).close()\n"
        "print('tensorboard' in sys.modules, 'torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout.split("\n")[:2] == ["False", "True False"], run.stderr


def test_reports_are_counted_without_any_tracker() -> None:
    trackers = Trackers([])
    trackers.log(status(1), [REPORT, REPORT])
    assert trackers.steps_seen == 2
