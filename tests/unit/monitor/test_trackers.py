"""TensorBoard: what is logged is what TensorBoard reads back, also after a resume."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.reports import REPORT
from torchspec.config.load import parse_config, save_config
from torchspec.config.schema import MonitorConfig
from torchspec.contracts import RunStatus, StepReport
from torchspec.monitor import trackers as trackers_package
from torchspec.monitor.trackers import Trackers, check_trackers, open_trackers


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
    trackers = open_trackers(MonitorConfig(), tmp_path, print)
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
        trackers = open_trackers(MonitorConfig(), tmp_path, print)
        for i, loss in enumerate(losses):
            trackers.log(status(first + i), [replace(REPORT, step=first + i, loss=loss)])
        trackers.close()
    assert read(tmp_path)["train/loss"] == [(1, 9.0), (2, 8.0), (3, 5.0), (4, 4.0)]


def test_switched_off_it_writes_nothing_and_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from torchspec.config.schema import MonitorConfig\n"
        "from torchspec.monitor.trackers import open_trackers\n"
        "open_trackers(MonitorConfig(trackers=[]), Path(sys.argv[1]), print).close()\n"
        "print('tensorboard' in sys.modules)\n"
        "open_trackers(MonitorConfig(), Path(sys.argv[1]), print).close()\n"
        "print('tensorboard' in sys.modules, 'torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout.split("\n")[:2] == ["False", "True False"], run.stderr


def test_reports_are_counted_without_any_tracker() -> None:
    trackers = Trackers({}, print)
    trackers.log(status(1), [REPORT, REPORT])
    assert trackers.steps_seen == 2


class Broken:
    """A service that goes away after its first report."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def step(self, report: StepReport) -> None:
        if self.told:
            raise ConnectionError("no route to host")
        self.told.append(report)

    def status(self, status: RunStatus) -> None:
        self.told.append(status)

    def close(self) -> None:
        self.told.append("closed")


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on() -> None:
    warnings: list[str] = []
    broken, healthy = Broken(), Broken()
    healthy.step = healthy.told.append  # type: ignore[method-assign]
    trackers = Trackers({"broken": lambda: broken, "healthy": lambda: healthy}, warnings.append)
    for step in (1, 2, 3):
        trackers.log(status(step), [replace(REPORT, step=step)])
    trackers.close()
    assert len(broken.told) == 2 and len(healthy.told) == 7 and healthy.told[-1] == "closed"
    assert warnings == ["the tracker broken failed and is left out from here on: ConnectionError: no route to host"]
    assert trackers.steps_seen == 3


def test_one_that_does_not_open_is_left_out() -> None:
    warnings: list[str] = []

    def opening() -> Broken:
        raise ConnectionError("no such host")

    trackers = Trackers({"far": opening}, warnings.append)
    trackers.log(status(1), [REPORT])
    trackers.close()
    assert warnings == ["the tracker far failed and is left out from here on: ConnectionError: no such host"]


def test_one_that_hangs_holds_up_neither_the_run_nor_its_end_nor_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers_package, "MOST_WAITING", 3)
    monkeypatch.setattr(trackers_package, "CLOSE_SECONDS", 0.2)
    warnings: list[str] = []
    never, healthy = threading.Event(), Broken()
    hanging, healthy.step = Broken(), healthy.told.append  # type: ignore[method-assign]
    hanging.step = lambda report: never.wait()  # type: ignore[assignment, method-assign]
    trackers = Trackers({"hanging": lambda: hanging, "healthy": lambda: healthy}, warnings.append)
    started = time.monotonic()
    for step in range(1, 11):
        trackers.log(status(step), [replace(REPORT, step=step)])
        while len(healthy.told) < 2 * step:
            time.sleep(0.001)
    trackers.close()
    assert time.monotonic() - started < 10 and healthy.told[-1] == "closed" and len(healthy.told) == 21
    assert warnings[0] == "the tracker hanging does not keep up: it misses steps until it does"
    assert warnings[1].startswith("the tracker hanging has not taken all that it was told")
    assert re.fullmatch("the tracker hanging has missed [67] reports of steps", warnings[2]) and len(warnings) == 3


def test_a_tracker_without_its_package_is_refused_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(ValueError, match=rf"monitor\.trackers names {name}.*pip install 'torchspec\[{name}\]'"):
            check_trackers(MonitorConfig(trackers=[name]))
    check_trackers(MonitorConfig(trackers=[]))


def run_folder(folder: Path) -> Path:
    save_config(parse_config({"target": {"path": "unused"}}), folder / "config.yaml")
    return folder


def wandb_rows(path: Path) -> list[dict]:
    """The history in a log of W&B: a LevelDB log of protobuf records after seven bytes, small enough to be whole."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, rows = path.read_bytes(), 7, []
    while position + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, position + 4)
        assert kind == 1, "a record of several blocks"
        record = Record()
        record.ParseFromString(data[position + 7 : position + 7 + length])
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        rows += [items] if items else []
        position += 7 + length
    return rows


def test_wandb_gets_every_figure_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra torchspec[wandb] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    warnings: list[str] = []
    monkeypatch.setattr(trackers_package, "CLOSE_SECONDS", 120)
    for first in (1, 2):  # the second is a resume, which goes back one step
        trackers = open_trackers(MonitorConfig(trackers=["wandb"]), run_folder(tmp_path), warnings.append)
        trackers.log(status(first), [replace(REPORT, step=first)])
        trackers.log(status(first + 1), [replace(REPORT, step=first + 1, loss=2.5)])
        trackers.close()
    logs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert warnings == [] and len(logs) == 2 and len({log.name for log in logs}) == 1, "one W&B run"
    deadline = time.monotonic() + 30  # it is another process that writes it, which lags behind a little
    while len(rows := wandb_rows(logs[1])) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(2, 3.5), (3, 2.5)]
    assert any(row.get("pools/queue_depth") == 7 for row in rows)


def test_mlflow_gets_every_figure_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra torchspec[mlflow] is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    warnings: list[str] = []
    config = MonitorConfig(trackers=["mlflow"], project="drafts")
    monkeypatch.setattr(trackers_package, "CLOSE_SECONDS", 120)
    for first in (1, 3):  # the second is a resume
        trackers = open_trackers(config, run_folder(tmp_path), warnings.append)
        trackers.log(status(first), [replace(REPORT, step=first, loss=float(first))])
        trackers.close()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("drafts").experiment_id])
    assert warnings == [] and run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 1.0), (3, 3.0)]
    assert run.data.metrics["pools/queue_depth"] == 7
