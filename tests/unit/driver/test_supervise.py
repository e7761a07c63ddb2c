"""Signs of life, and how often a part is restarted."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from torchspec.driver.supervise import LONGEST_TURN, AwakeClock, Pulse, Restarts, RunFailed


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
