"""A running run, seen from the driver: watches everybody, and knows what to do when one ends, dies or hangs.

who                what happens                                                   what it costs
inference worker   its leases go to others, another is started                    what it was working on
trainer rank       the group starts anew from the last checkpoint (trainers.py)   the steps since
controller         it starts anew from the last checkpoint, and so does the group the steps since
store              it starts anew, empty (store.py)                               what was stored is captured again
driver             the janitor ends the rest; ``torchspec resume``                the steps since

A repair that has to wait for somebody does so from one look to the next: meanwhile all others are watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ray

from torchspec.contracts import RunStatus
from torchspec.driver.actors import ActorFactory
from torchspec.driver.cluster import require_node
from torchspec.driver.console import Interrupts, View, new_messages
from torchspec.driver.controller_client import ControllerClient, ControllerLost
from torchspec.driver.prepare import Prepared
from torchspec.driver.store import StoreSupervisor
from torchspec.driver.supervise import AwakeClock, Pulse, Restarts
from torchspec.driver.trainers import RankLost, Trainers
from torchspec.driver.workers import Workers

WATCH_SECONDS = 0.5
"""How often the view is refreshed and everybody is asked for a sign of life; deaths of actors are noticed at once."""


class Session:
    """The futures of a run's actors. Starts the inference workers at once, and the trainers when there is a vocabulary.

    Whatever goes wrong comes here as an exception out of :meth:`_turn`, and is repaired between two turns.
    """

    def __init__(
        self,
        prepared: Prepared,
        actors: ActorFactory,
        controller: ControllerClient,
        store: StoreSupervisor,
        trackers: Any,
        view: View,
        interrupts: Interrupts,
    ):
        recovery = prepared.config.recovery
        self.controller, self.store, self.trackers, self.view = controller, store, trackers, view
        self.interrupts, self.stopping = interrupts, False
        self.workers = Workers(actors, controller, prepared.config, view)
        self.trainers = Trainers(actors, controller, recovery, view)
        self._patience = recovery.hang_seconds
        self._restarts = Restarts(recovery.max_restarts)
        self._clock = AwakeClock()
        self._revival: Iterator[None] | None = None
        """While the controller is away."""
        self._messages_seen: list[str] = []
        self._status: RunStatus | None = None
        self._vocabulary: ray.ObjectRef | None
        self._wanted: ray.ObjectRef
        self._pulse: Pulse
        self._store_away: bool
        """As the controller knows."""
        self._listen()
        self.workers.resize(prepared.config.inference.first_workers)

    def run(self) -> tuple[RunStatus, bool]:
        """Until training has ended: the last status, and whether it was stopped. Raises RunFailed: it cannot go on."""
        repair: Callable[[], None] | None = None
        while True:
            try:
                if repair is not None:
                    repair()
                    repair = None
                if self._turn():
                    status = self.controller.ask("status")
                    self.controller.ask("finish")
                    return status, status.phase == "stopping"  # who stops a run may be quicker than our view of it
            except RankLost as lost:
                repair = partial(self._restart_trainers, str(lost))
            except ControllerLost as lost:
                repair = partial(self._restart_controller, lost)

    def _turn(self) -> bool:
        """One look at everybody; whether training has ended."""
        if self._revival is not None:
            self._await_controller(self._revival)
            return False
        if self.stopping and not self.trainers.at_work:  # all that counts is in the last checkpoint
            return True
        polls = [ref for ref in (self._vocabulary, self._wanted) if ref is not None]
        futures = [*polls, *self.workers.futures, *self.trainers.futures]
        done, _ = ray.wait(futures, timeout=WATCH_SECONDS)
        for ref in done:
            if ref == self._vocabulary:
                self._start_training()
            elif ref == self._wanted:
                wanted = self.controller.result(ref)
                self._wanted = self.controller.send("wanted", wanted)
                self.workers.resize(wanted)
            elif ref in self.workers.futures:
                self.workers.ended(ref)
            elif self.trainers.done(ref):
                if self.controller.ask("training_over"):
                    return True
                self.trainers.start()
        self._check(self._clock.elapsed())
        self._show()
        return False

    def _start_training(self) -> None:
        vocabulary = self.controller.result(self._vocabulary)
        self._vocabulary = None
        if self.trainers.vocabulary is None:
            self.view.message(
                f"draft vocabulary: {len(vocabulary)} of {vocabulary.vocab_size} tokens, {vocabulary.coverage:.1%} of "
                "what was counted"
            )
        self.trainers.vocabulary = vocabulary
        self.trainers.start()

    def _await_controller(self, revival: Iterator[None]) -> None:
        """One look at everybody but the ranks, of whom there are none then, while the controller is away."""
        elapsed = self._clock.elapsed()
        require_node()
        self._watch_store(elapsed)
        self.workers.check(elapsed)
        self.stopping = self.interrupts.heard() or self.stopping
        if next(revival, self) is not self:
            time.sleep(WATCH_SECONDS)
            return
        self._revival, self._messages_seen, self.trackers.steps_seen = None, [], 0
        self._listen()
        self.workers.reconnect()
        if self.stopping:
            self.controller.ask("request_stop", "it was asked for before the controller had started again")

    def _check(self, elapsed: float) -> None:
        """Look for those that are silent, and for a wish to stop."""
        require_node()
        if self._pulse.hangs(elapsed):
            raise ControllerLost("hangs", hung=True)
        self._watch_store(elapsed)
        if bool(self.store.fault) != self._store_away:
            self.controller.ask("store_away" if self.store.fault else "store_back")
            self._store_away = bool(self.store.fault)
        self.workers.check(elapsed)
        if self.interrupts.heard() and not self.stopping:
            self.stopping = True
            self.controller.ask("request_stop", "interrupted")
        self.trainers.check(elapsed)

    def _watch_store(self, elapsed: float) -> None:
        before = self.store.fault
        self.store.check(elapsed)
        if self.store.fault and not before:
            self.view.message(f"{self.store.fault}; starting it again")

    def _show(self) -> None:
        """Refresh the view with the controller's last answer."""
        status: RunStatus | None = self._pulse.answer
        if status is None or status is self._status:
            return
        self._status = status
        self.stopping = self.stopping or status.phase == "stopping"
        if not self.stopping:
            self.trainers.follow(status)
        for text in new_messages(self._messages_seen, status.messages):
            self.view.message(text)
        self._messages_seen = list(status.messages)
        self.view.status(status)
        self.trackers.log(status, self.controller.ask("steps_since", self.trackers.steps_seen))

    def _restart_trainers(self, reason: str) -> None:
        self.trainers.kill()
        self._restarts.count(self._step(), reason)
        self.view.message(f"{reason}; the group starts again from the last checkpoint")
        self.trainers.start()

    def _restart_controller(self, lost: ControllerLost) -> None:
        self.trainers.kill()
        self._restarts.count(self._step(), f"the controller {lost}")
        self.view.message(f"the controller {lost}; it starts again from the last checkpoint")
        self._revival = self.controller.revive(lost, lambda: not self.store.fault, lambda: len(self.workers))

    def _listen(self) -> None:
        """Ask the controller what it may take a while to answer."""
        self._vocabulary = self.controller.send("draft_vocab")
        self._wanted = self.controller.send("wanted", None)
        self._pulse = Pulse(lambda: self.controller.send("status").future(), self._patience)
        self._store_away = False  # so it takes the store to be there

    def _step(self) -> int:
        return 0 if self._status is None else self._status.step
