"""When the driver gives an inference pool up, and when it goes on starting workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from torchspec.config.load import parse_config
from torchspec.contracts import WorkerReport
from torchspec.driver.supervise import RunFailed
from torchspec.driver.workers import Workers


class Pool:
    """A pool of one worker, whose actors and controller are played by this object."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        stub = SimpleNamespace(get=self._died, kill=lambda _: None, exceptions=ray.exceptions, ObjectRef=object)
        monkeypatch.setattr("torchspec.driver.workers.ray", stub)
        monkeypatch.setattr("torchspec.driver.workers.actor_pulse", lambda *_: SimpleNamespace())
        self.made, self.leases, self.started = 0, 0, 0
        config = parse_config({"target": {"path": "x"}})
        self.workers = Workers(self, self, config, SimpleNamespace(message=lambda _: None))
        self.workers.resize(1)

    def dies(self, leases: int, made: int = 0) -> None:
        """The worker dies while it holds so many leases, after it has made so many samples."""
        self.leases, self.made = leases, made
        (future,) = self.workers.futures
        self.workers.ended(future)

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
            return SimpleNamespace(workers=[WorkerReport(f"worker-{self.started}", samples=self.made)])
        return self.leases if method == "worker_lost" else None

    def send(self, method: str, *args: Any) -> None:
        pass

    def _died(self, future: object) -> None:
        raise ray.exceptions.RayActorError


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    return Pool(monkeypatch)


def test_an_engine_that_does_not_even_start_ends_the_run(pool: Pool) -> None:
    pool.dies(leases=0)
    with pytest.raises(RunFailed, match="worker-2 cannot work"):
        pool.dies(leases=0)


@pytest.mark.parametrize("deaths", [(8, 8, 1), (8, 8, 1, 1), (8, 0, 8, 1)], ids=str)
def test_a_prompt_that_kills_engines_is_found_by_trying(pool: Pool, deaths: Sequence[int]) -> None:
    """The first that a pool of one engine is given: it dies until the prompt, alone, is rejected."""
    for leases in deaths:
        pool.dies(leases)
    assert pool.started == len(deaths) + 1


def test_engines_that_die_of_any_work_end_the_run(pool: Pool) -> None:
    for _ in range(5):
        pool.dies(leases=8)
    with pytest.raises(RunFailed, match="worker-6 cannot work"):
        pool.dies(leases=8)


def test_a_sample_that_was_made_forgives_all(pool: Pool) -> None:
    for _ in range(20):
        pool.dies(leases=0)
        pool.dies(leases=8, made=1)
