"""The driver's half of the inference pool: starts workers, drains them, replaces those that die or hang."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray

from torchspec.config.schema import Config
from torchspec.driver.actors import ActorFactory
from torchspec.driver.console import View
from torchspec.driver.controller_client import ControllerClient
from torchspec.driver.supervise import Pulse, RunFailed, actor_pulse, root_cause

MAX_FRUITLESS_STARTS = 2
"""An inference pool in which so many workers die in a row, before they were given any work, will never work."""
DEATHS_A_TRY = 2
"""So many times ``controller.max_attempts`` workers may die in a row with leases while nobody makes a sample: it may be
the work that kills them, and which sample it is turns out by trying."""


@dataclass
class Worker:
    name: str
    actor: Any
    pulse: Pulse
    draining: bool = False
    verdict: str = ""
    """Why it was killed."""


class Workers:
    """The actors of the pool. A worker that dies loses nothing: the controller gives its leases to others."""

    def __init__(self, actors: ActorFactory, controller: ControllerClient, config: Config, view: View):
        self._actors, self._controller, self._view = actors, controller, view
        self._recovery, self._max_deaths = config.recovery, DEATHS_A_TRY * config.controller.max_attempts
        self._workers: dict[ray.ObjectRef, Worker] = {}
        self._wanted = 0
        self._fruitless: Counter[str] = Counter()
        """Deaths since somebody has made a sample: of workers ``without`` and ``with`` leases."""

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def futures(self) -> list[ray.ObjectRef]:
        return list(self._workers)

    def resize(self, wanted: int) -> None:
        """Come to have ``wanted`` workers: start some, or let the youngest finish what they have and end."""
        self._wanted = wanted
        staying = [worker for worker in self._workers.values() if not worker.draining]
        for _ in range(wanted - len(staying)):
            self._start()
        for worker in staying[wanted:]:
            worker.draining = True
            self._controller.ask("drain", worker.name)
            self._view.message(f"{worker.name} finishes what it has, then ends")

    def reconnect(self) -> None:
        """Tell a controller that knows nothing."""
        for worker in self._workers.values():
            if worker.pulse.answer is None:  # it is loading its model, and says nothing yet
                self._controller.send("worker_started", worker.name)
            if worker.draining:
                self._controller.ask("drain", worker.name)

    def ended(self, ref: ray.ObjectRef) -> None:
        """The worker of a future has ended. Raises RunFailed: none of them gets anything done."""
        worker = self._workers[ref]
        log = self._actors.log_path(worker.name)
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            reason = worker.verdict or root_cause(error)
            self._count_death(worker)
            if self._fruitless["without"] >= MAX_FRUITLESS_STARTS or self._fruitless["with"] >= self._max_deaths:
                raise RunFailed(f"{worker.name} cannot work: {reason} (log: {log})") from None
            replaced = "" if worker.draining else "; starting another"
            self._view.message(f"{worker.name} died ({reason}; log: {log}){replaced}")
        else:
            self._controller.ask("worker_left", worker.name)
            if worker.draining:
                self._view.message(f"{worker.name} has ended")
        ray.kill(worker.actor)
        del self._workers[ref]
        self.resize(self._wanted)

    def _count_death(self, worker: Worker) -> None:
        made = {report.worker: report.samples for report in self._controller.ask("status").workers}
        leases = self._controller.ask("worker_lost", worker.name)
        if any(made.get(other.name, 0) for other in self._workers.values()):
            self._fruitless.clear()
        elif not worker.draining:
            self._fruitless["with" if leases else "without"] += 1

    def check(self, elapsed: float) -> None:
        """Kill those that hang: their futures end."""
        for worker in self._workers.values():
            if not worker.verdict and worker.pulse.hangs(elapsed):
                worker.verdict = "it gave no sign of life"
                ray.kill(worker.actor)

    def _start(self) -> None:
        name, actor = self._actors.worker(self._controller.actor, self._wanted)
        self._controller.send("worker_started", name)
        self._workers[actor.run.remote()] = Worker(name, actor, actor_pulse(actor, self._recovery))
