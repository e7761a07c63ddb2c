"""Signs of life, and how often a part is restarted."""

from __future__ import annotations

import json
from concurrent.futures import Future
from contextlib import ExitStack

import pytest

from torchspec.config.load import parse_config
from torchspec.driver.cluster import start_cluster
from torchspec.driver.console import new_messages
from torchspec.driver.plan import Plan, ThreadPlan
from torchspec.driver.run import _lock
from torchspec.driver.supervise import LONGEST_TURN, AwakeClock, Pulse, Restarts, RunFailed
from torchspec.run_folder import is_live, this_process


class Patient:
    """Answers when told to."""

    def __init__(self) -> None:
        self.questions: list[Future[str]] = []

    def ask(self) -> Future[str]:
        self.questions.append(Future())
        return self.questions[-1]

    def answer(self) -> None:
        self.questions[-1].set_result(f"answer {len(self.questions)}")


def test_silence_is_counted_from_the_last_answer():
    patient = Patient()
    pulse = Pulse(patient.ask, patience=3.0)
    assert not pulse.hangs(2.0)
    patient.answer()
    assert not pulse.hangs(2.0) and pulse.answer == "answer 1"
    assert not pulse.hangs(2.0)
    assert pulse.hangs(1.0)
    assert len(patient.questions) == 2


def test_an_error_is_no_sign_of_life():
    patient = Patient()
    pulse = Pulse(patient.ask, patience=3.0)
    for _ in range(3):
        patient.questions[-1].set_exception(OSError("refused"))
        last = pulse.hangs(1.0)
    assert last


def test_who_starts_has_longer():
    patient = Patient()
    pulse = Pulse(patient.ask, patience=3.0, first=100.0)
    assert not pulse.hangs(99.0)
    patient.answer()
    assert not pulse.hangs(0.0)
    assert pulse.hangs(3.0)


def test_time_asleep_makes_nobody_hang(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("torchspec.driver.supervise.time.monotonic", lambda: now[0])
    clock = AwakeClock()
    now[0] = 0.5
    assert clock.elapsed() == 0.5
    now[0] = 1200.0
    assert clock.elapsed() == LONGEST_TURN


def test_restarts_without_a_new_step_are_bounded():
    restarts = Restarts(2)
    for step in (5, 9, 9, 12, 10):
        restarts.count(step, "rank 0 died")
    with pytest.raises(RunFailed, match=r"rank 0 died; 2 restarts \(recovery\.max_restarts\)"):
        restarts.count(12, "rank 0 died")


def test_messages_of_a_sliding_window():
    assert new_messages([], ("a", "b")) == ["a", "b"]
    assert new_messages(["a", "b"], ("b", "c")) == ["c"]
    assert new_messages(["a", "b"], ("c",)) == ["c"]


def test_a_ray_that_does_not_start_is_said_in_one_line(monkeypatch, tmp_path):
    def slow(**_options):
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr("ray.init", slow)
    config, threads = parse_config({"target": {"path": "unused"}}), ThreadPlan(1, 1)
    plan = Plan((), threads, 2, 0, 0, 0, 0, 0, 0, 0, ())
    expected = pytest.raises(RunFailed, match=r"Ray did not start .* cores\): .* timed out during startup\.$")
    with expected, start_cluster(config, plan, tmp_path):
        pass


def test_a_run_has_one_driver(tmp_path):
    with ExitStack() as first, ExitStack() as second:
        _lock(tmp_path / "run", first)
        with pytest.raises(ValueError, match="is running already; see it with: torchspec status"):
            _lock(tmp_path / "run", second)
        first.close()
        _lock(tmp_path / "run", second)


def test_a_run_is_not_live_because_its_drivers_number_is_taken_again(tmp_path):
    for changes, live in (({}, True), ({"started": 1}, False), ({"pid": 2**22 + 1}, False), ({"host": "other"}, True)):
        (tmp_path / "handle.json").write_text(json.dumps(this_process() | changes))
        assert is_live(tmp_path) == live
