"""The driver's half of the inference pool: starts workers, drains them, replaces those that die or hang.

A worker that dies is replaced at once, the next ones in its place after longer and longer pauses, until one makes a
sample. A place in which that never happens is given up; with the last place ends the run.

Only an engine that fails by itself may have died of a prompt. What somebody outside has done says nothing about the
work in hand: a signal, a node that is lost, the driver's own verdict of silence. A SIGKILL is taken for that, though
the kernel's OOM killer sends it, too: it takes who is largest, not who asked last. An engine that a prompt makes too
large each time is no endless loop either: its place is given up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from torchspec.config.schema import Config
from torchspec.driver.actors import ActorFactory
from torchspec.driver.console import View
from torchspec.driver.controller_client import ControllerClient
from torchspec.driver.supervise import Pulse, RunFailed, actor_pulse, is_final, root_cause
from torchspec.inference.engine import EngineKilled

MAX_FRUITLESS_STARTS = 2
"""In a pool that has not made a sample yet, an engine that fails so often as it starts will never work."""
DEATHS_A_TRY = 2
"""So many times ``controller.max_attempts`` workers may die in a row in one place: it may be the work that kills them,
and which sample it is turns out by trying."""
LONGEST_PAUSE_SECONDS = 60.0


@dataclass
class Worker:
    name: str
    actor: Any
    run: ray.ObjectRef
    """Its end."""
    pulse: Pulse
    verdict: str = ""
    """Why it was killed."""


@dataclass
class Slot:
    """A place in the pool: who has it, and how it went for those before."""

    worker: Worker | None = None
    draining: bool = False
    deaths: int = 0
    """In a row, without a sample in between."""
    failed_starts: int = 0
    """Of these, engines that failed by themselves before they were ready."""
    pause: float = 0.0
    """Seconds until the next worker starts."""

    def count_death(self, failed_start: bool, made: bool) -> None:
        """Of a worker that has ``made`` samples or not."""
        if made:
            self.deaths = self.failed_starts = 0
        self.deaths += 1
        self.failed_starts += failed_start
        self.pause = 0.0 if self.deaths == 1 else min(2.0 ** (self.deaths - 1), LONGEST_PAUSE_SECONDS)


class Workers:
    """The actors of the pool. A worker that dies loses nothing: the controller gives its leases to others."""

    def __init__(self, actors: ActorFactory, controller: ControllerClient, config: Config, view: View):
        self._actors, self._controller, self._view = actors, controller, view
        self._recovery, self._max_deaths = config.recovery, DEATHS_A_TRY * config.controller.max_attempts
        self._slots: list[Slot] = []
        self._wanted = 0
        self._proven = False
        """Somebody has made a sample."""

    def __len__(self) -> int:
        return len(self._at_work)

    @property
    def _at_work(self) -> list[Worker]:
        return [slot.worker for slot in self._slots if slot.worker is not None]

    @property
    def futures(self) -> list[ray.ObjectRef]:
        return [worker.run for worker in self._at_work]

    def resize(self, wanted: int) -> None:
        """Come to have ``wanted`` workers: start some, or let the youngest finish what they have and end."""
        self._wanted = wanted
        staying = [slot for slot in self._slots if not slot.draining]
        for _ in range(wanted - len(staying)):
            self._slots.append(Slot())
            self._start(self._slots[-1])
        for slot in staying[wanted:]:
            if slot.worker is None:
                self._slots.remove(slot)
                continue
            slot.draining = True
            self._controller.ask("drain", slot.worker.name)
            self._view.message(f"{slot.worker.name} finishes what it has, then ends")

    def reconnect(self) -> None:
        """Tell a controller that knows nothing."""
        for slot in self._slots:
            if slot.worker is not None and slot.worker.pulse.answer is None:  # it loads its model, and says nothing yet
                self._controller.send("worker_started", slot.worker.name)
            if slot.worker is not None and slot.draining:
                self._controller.ask("drain", slot.worker.name)

    def ended(self, ref: ray.ObjectRef) -> None:
        """The worker of a future has ended. Raises RunFailed: none of them gets anything done."""
        slot = next(slot for slot in self._slots if slot.worker is not None and slot.worker.run == ref)
        worker = slot.worker
        assert worker is not None
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            self._died(slot, worker, error)
        else:
            self._controller.ask("worker_left", worker.name)
            if slot.draining:
                self._view.message(f"{worker.name} has ended")
        ray.kill(worker.actor)
        slot.worker = None
        if slot.draining:
            self._slots.remove(slot)
        elif slot in self._slots and not slot.pause:
            self._start(slot)

    def check(self, elapsed: float) -> None:
        """Kill those that hang: their futures end. Start those whose pause is over."""
        for slot in self._slots:
            worker = slot.worker
            if worker is not None and not worker.verdict and worker.pulse.hangs(elapsed):
                worker.verdict = "it gave no sign of life"
                ray.kill(worker.actor)
            elif worker is None:
                slot.pause -= elapsed
                if slot.pause <= 0:
                    self._start(slot)

    def _died(self, slot: Slot, worker: Worker, error: ray.exceptions.RayError) -> None:
        """Raises RunFailed: it was the last place in the pool, and it is hopeless."""
        log, reason = self._actors.log_path(worker.name), worker.verdict or root_cause(error)
        made = {report.worker: report.samples for report in self._controller.ask("status").workers}
        self._proven = self._proven or any(made.values())
        slot.count_death(is_final(error), made.get(worker.name, 0) > 0)
        tries = self._max_deaths if self._proven else MAX_FRUITLESS_STARTS
        hopeless, text = "", f"{worker.name} died ({reason}; log: {log})"
        if slot.draining:
            self._view.message(text)
        elif slot.deaths < self._max_deaths and slot.failed_starts < tries:
            self._view.message(f"{text}; starting another" + (f" in {slot.pause:.0f} s" if slot.pause else ""))
        else:
            hopeless = f"{worker.name} cannot work: {reason} (log: {log})"
            self._slots.remove(slot)
            if all(other.draining for other in self._slots):
                raise RunFailed(hopeless)
            self._view.message(f"{hopeless}; going on without it")
        self._controller.ask("worker_lost", worker.name, not worker.verdict and _by_itself(error), hopeless)

    def _start(self, slot: Slot) -> None:
        name, actor = self._actors.worker(self._controller.actor, self._wanted)
        self._controller.send("worker_started", name)
        pulse = actor_pulse(actor, self._recovery.hang_seconds, self._recovery.start_seconds)
        slot.worker, slot.pause = Worker(name, actor, actor.run.remote(), pulse), 0.0


def _by_itself(error: ray.exceptions.RayError) -> bool:
    """Whether a worker has died of an exception of its own, so that its work may be to blame."""
    return isinstance(error, ray.exceptions.RayTaskError) and not isinstance(error.cause, EngineKilled)
