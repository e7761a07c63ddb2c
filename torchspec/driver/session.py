"""A running run, seen from the driver: watches everybody, and knows what to do when one ends."""

from __future__ import annotations

from typing import Any, Protocol

import ray

from torchspec.contracts import RunStatus
from torchspec.driver.actors import ActorFactory
from torchspec.driver.interrupts import Interrupts
from torchspec.driver.prepare import Prepared
from torchspec.store.master import MooncakeMaster

WATCH_SECONDS = 0.5
"""How often the view is refreshed; deaths of actors are noticed at once."""
MAX_FRUITLESS_STARTS = 2
"""An inference pool whose workers die so many times in a row without a single sample will never work."""


class RunFailed(Exception):
    """The run cannot go on; the message says why and what to do."""


class View(Protocol):
    """What a run tells a person."""

    def status(self, status: RunStatus) -> None: ...
    def message(self, text: str) -> None: ...


class Session:
    """The futures of a run's actors. Starts the inference workers at once, and the trainers when there is a vocabulary.

    An inference worker that dies is replaced and loses nothing. Training ranks form one process group, so the loss of
    one ends the run, which then resumes from its last checkpoint.
    """

    def __init__(
        self,
        prepared: Prepared,
        actors: ActorFactory,
        controller: Any,
        store_node: Any,
        master: MooncakeMaster,
        trackers: Any,
        view: View,
        interrupts: Interrupts,
    ):
        self.prepared, self.actors, self.view = prepared, actors, view
        self.controller, self.store_node, self.master = controller, store_node, master
        self.trackers, self.interrupts = trackers, interrupts
        self.workers: dict[ray.ObjectRef, tuple[str, Any]] = {}
        self.trainers: dict[ray.ObjectRef, int] = {}
        self.stopping = False
        self._samples_at_start: dict[str, int] = {}
        self._fruitless = 0
        self._messages_seen: list[str] = []
        for _ in range(prepared.config.inference.workers):
            self._start_worker()

    def watch(self) -> bool:
        """Until training has ended; returns whether it was stopped early."""
        vocabulary = self.controller.draft_vocab.remote()
        trainers_done = 0
        while True:
            waiting = [*self.workers, *self.trainers, *([vocabulary] if vocabulary is not None else [])]
            done, _ = ray.wait(waiting, timeout=WATCH_SECONDS) if waiting else ([], [])
            for ref in done:
                if ref == vocabulary:
                    self._start_trainers(ray.get(ref))
                    vocabulary = None
                elif ref in self.workers:
                    self._worker_ended(ref)
                else:
                    self._trainer_ended(ref)
                    trainers_done += 1
            self._look()
            if trainers_done and not self.trainers:
                return self.stopping
            if self.stopping and vocabulary is not None:
                return True  # nothing has been trained yet

    def _start_worker(self) -> None:
        name, actor = self.actors.worker(self.controller)
        self._samples_at_start[name] = 0
        self.workers[actor.run.remote()] = (name, actor)

    def _start_trainers(self, vocabulary: Any) -> None:
        self.view.message(
            f"draft vocabulary: {len(vocabulary)} of {vocabulary.vocab_size} tokens, {vocabulary.coverage:.1%} of what "
            "was counted; starting the trainer"
        )
        for rank, actor in enumerate(self.actors.trainers(vocabulary)):
            self.trainers[actor.run.remote(self.controller)] = rank

    def _worker_ended(self, ref: ray.ObjectRef) -> None:
        name, actor = self.workers.pop(ref)
        try:
            ray.get(ref)
            return  # it was told that it is no longer needed
        except ray.exceptions.RayError as error:
            reason = _root_cause(error)
        reports = {w.worker: w.samples for w in ray.get(self.controller.status.remote()).workers}
        self._fruitless = 0 if reports.get(name, 0) else self._fruitless + 1
        ray.kill(actor)
        ray.get(self.controller.worker_lost.remote(name))
        if self._fruitless >= MAX_FRUITLESS_STARTS:
            raise RunFailed(f"{name} cannot work: {reason} (log: {self.actors.log_path(name)})")
        self.view.message(f"{name} died ({reason}; log: {self.actors.log_path(name)}); starting another")
        self._start_worker()

    def _trainer_ended(self, ref: ray.ObjectRef) -> None:
        rank = self.trainers.pop(ref)
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            where = self.actors.log_path(f"trainer-{rank}")
            raise RunFailed(
                f"trainer rank {rank} failed: {_root_cause(error)} (log: {where}); "
                f"continue with: torchspec resume {self.prepared.run_dir}"
            ) from None

    def _look(self) -> None:
        """Refresh the view, pass on messages and a pending interrupt, check the store's master."""
        if self.interrupts.count and not self.stopping:
            self.stopping = True
            ray.get(self.controller.request_stop.remote("interrupted"))
        if not self.master.alive():
            raise RunFailed(
                f"the store's master died (log: {self.prepared.run_dir}/logs/mooncake_master.log); "
                f"continue with: torchspec resume {self.prepared.run_dir}"
            )
        try:
            status: RunStatus = ray.get(self.controller.status.remote())
        except ray.exceptions.RayError as error:
            raise RunFailed(
                f"the controller failed: {_root_cause(error)}; continue with: torchspec resume {self.prepared.run_dir}"
            ) from None
        self.stopping = self.stopping or status.phase == "stopping"
        for text in new_messages(self._messages_seen, status.messages):
            self.view.message(text)
        self._messages_seen = list(status.messages)
        self.view.status(status)
        self.trackers.log(status, ray.get(self.controller.steps_since.remote(self.trackers.steps_seen)))


def new_messages(seen: list[str], now: tuple[str, ...]) -> list[str]:
    """What ``now``, a sliding window of recent messages, has after ``seen``, the same window earlier."""
    for overlap in range(min(len(seen), len(now)), -1, -1):
        if seen[len(seen) - overlap :] == list(now[:overlap]):
            return list(now[overlap:])
    raise AssertionError("an overlap of nothing always fits")


def _root_cause(error: ray.exceptions.RayError) -> str:
    """One line for a person: the remote exception itself, or how its process ended."""
    cause = getattr(error, "cause", None)
    if cause is None:
        return "its process ended" if isinstance(error, ray.exceptions.ActorDiedError) else type(error).__name__
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:400]
