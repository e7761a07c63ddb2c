"""When the driver gives a place in the inference pool up, when the run, and whom it blames for a death."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from torchspec.config.load import parse_config
from torchspec.contracts import WorkerReport
from torchspec.driver.supervise import RunFailed
from torchspec.driver.workers import LONGEST_PAUSE_SECONDS, MAX_FRUITLESS_STARTS, Workers
from torchspec.inference.engine import EngineDied, EngineKilled


def failed(cause: Exception) -> ray.exceptions.RayError:
    """A call that has raised ``cause``."""
    return ray.exceptions.RayTaskError("run", "", cause)


CRASHED = failed(EngineDied("SGLang process 7 ended"))
KILLED = failed(EngineKilled("SGLang process 7 ended by SIGKILL"))
GONE = ray.exceptions.ActorDiedError()
NOT_STARTED = ray.exceptions.ActorDiedError(
    ray.exceptions.RayTaskError("__init__", "Traceback\nValueError: no such model", ValueError())
)


class Pool:
    """The actors and the controller of a pool are played by this object."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        stub = SimpleNamespace(get=self._died, kill=lambda _: None, exceptions=ray.exceptions, ObjectRef=object)
        monkeypatch.setattr("torchspec.driver.workers.ray", stub)
        monkeypatch.setattr("torchspec.driver.workers.actor_pulse", lambda *_: SimpleNamespace(hangs=self._hangs))
        self.made: dict[str, int] = {}
        self.started = 0
        self.silent = False
        self.lost: list[tuple[str, bool, str]] = []
        self.told: list[str] = []
        config = parse_config({"target": {"path": "x"}})
        self.workers = Workers(self, self, config, SimpleNamespace(message=self.told.append))

    def dies(self, error: ray.exceptions.RayError, made: int = 0, place: int = 0) -> None:
        """The worker in a place dies after it has made so many samples; the next in its place starts."""
        worker = self.workers._slots[place].worker
        assert worker is not None
        self.made = {worker.name: made}
        self._error = error
        self.workers.ended(worker.run)

    def pause(self, place: int = 0) -> float:
        """Wait until the next worker starts in a place; the seconds."""
        seconds = self.workers._slots[place].pause
        self.workers.check(seconds)
        assert self.workers._slots[place].worker is not None
        return seconds

    def _hangs(self, elapsed: float) -> bool:
        return self.silent

    # ---- the factory of actors ----

    actor = None

    def worker(self, controller: Any, pool: int) -> tuple[str, Any]:
        self.started += 1
        return f"worker-{self.started}", SimpleNamespace(run=SimpleNamespace(remote=object))

    def log_path(self, name: str) -> Path:
        return Path(name)

    # ---- the line to the controller ----

    def ask(self, method: str, *args: Any) -> Any:
        if method == "status":
            return SimpleNamespace(workers=[WorkerReport(name, samples=made) for name, made in self.made.items()])
        if method == "worker_lost":
            self.lost.append(args)
        return None

    def send(self, method: str, *args: Any) -> None:
        pass

    def _died(self, future: object) -> None:
        raise self._error


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Pool]:
    def make(workers: int) -> Pool:
        pool = Pool(monkeypatch)
        pool.workers.resize(workers)
        return pool

    return make


def test_an_engine_that_does_not_even_start_ends_the_run_and_says_why(pool: Callable[[int], Pool]) -> None:
    one = pool(1)
    one.dies(NOT_STARTED)
    with pytest.raises(RunFailed, match="worker-2 cannot work: ValueError: no such model"):
        one.dies(NOT_STARTED)


@pytest.mark.parametrize("deaths", [3, 4], ids=str)
def test_a_prompt_that_kills_engines_is_found_by_trying(pool: Callable[[int], Pool], deaths: int) -> None:
    """The first that a pool of one engine is given: it dies until the prompt, alone, is rejected."""
    one = pool(1)
    for _ in range(deaths):
        one.dies(CRASHED)
        one.pause() if len(one.workers) == 0 else None
    assert one.started == deaths + 1 and [crashed for _, crashed, _ in one.lost] == [True] * deaths


def test_engines_that_die_of_any_work_end_the_run(pool: Callable[[int], Pool]) -> None:
    one = pool(1)
    pauses = []
    for _ in range(5):
        one.dies(CRASHED)
        pauses.append(one.pause() if len(one.workers) == 0 else 0.0)
    assert pauses == [0, 2, 4, 8, 16]
    with pytest.raises(RunFailed, match="worker-6 cannot work"):
        one.dies(CRASHED)


def test_a_sample_that_was_made_forgives_what_was_before(pool: Callable[[int], Pool]) -> None:
    one = pool(1)
    for _ in range(20):
        one.dies(CRASHED, made=1)
        assert len(one.workers) == 1, "another is started at once"
        one.dies(KILLED)
        assert one.pause() == 2.0


def test_a_place_in_which_no_engine_starts_is_given_up_beside_a_healthy_one(pool: Callable[[int], Pool]) -> None:
    """It used to be started anew for ever, without a pause."""
    two = pool(2)
    two.dies(CRASHED, made=5)
    starts, waited = 0, 0.0
    while len(two.workers._slots) == 2:
        starts += 1
        two.dies(NOT_STARTED, place=1)
        if len(two.workers._slots) == 2 and len(two.workers) == 1:
            waited += two.pause(1)
    assert starts == 6 > MAX_FRUITLESS_STARTS and waited == 2 + 4 + 8 + 16
    assert [name for name, _, hopeless in two.lost if hopeless] == [two.lost[-1][0]]
    assert "no such model" in two.lost[-1][2] and two.told[-1].endswith("going on without it")
    two.workers.resize(1)
    assert len(two.workers) == 1


def test_pauses_do_not_grow_for_ever(pool: Callable[[int], Pool]) -> None:
    one = pool(1)
    one.workers._max_deaths = 20
    for _ in range(12):
        one.dies(KILLED)
        one.pause() if len(one.workers) == 0 else None
    one.dies(KILLED)
    assert one.pause() == LONGEST_PAUSE_SECONDS


@pytest.mark.parametrize("error", [KILLED, GONE], ids=["engine", "worker"])
def test_a_death_by_somebody_outside_is_held_against_no_sample(
    pool: Callable[[int], Pool], error: ray.exceptions.RayError
) -> None:
    one = pool(1)
    one.dies(error)
    assert [crashed for _, crashed, _ in one.lost] == [False]


def test_neither_is_silence(pool: Callable[[int], Pool]) -> None:
    one = pool(1)
    one.silent = True
    one.workers.check(1.0)
    one.dies(CRASHED)
    assert one.lost == [("worker-1", False, "")] and "it gave no sign of life" in one.told[-1]


def test_a_pool_that_shrinks_waits_for_no_place_that_is_empty(pool: Callable[[int], Pool]) -> None:
    two = pool(2)
    for _ in range(2):
        two.dies(KILLED, place=1)
    assert len(two.workers) == 1
    two.workers.resize(1)
    two.workers.check(100.0)
    assert two.started == 3 and len(two.workers) == 1
