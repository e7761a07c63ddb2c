"""The driver's line to the controller, which may be dead, hung, or on its way back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from torchspec.controller.controller import NotBegun
from torchspec.driver.cluster import require_node
from torchspec.driver.supervise import AwakeClock, Pulse, RunFailed, is_final, root_cause
from torchspec.store.errors import StoreUnavailable

_PAUSE_SECONDS = 0.5


class ControllerLost(Exception):
    """The controller died or hangs. Its actor starts anew by itself, and knows nothing."""

    def __init__(self, reason: str, hung: bool = False):
        super().__init__(reason)
        self.hung = hung


class ControllerClient:
    """Calls the controller.

    Args:
        patience: seconds of silence (``recovery.hang_seconds``).
        start: seconds that it may take to start (``recovery.start_seconds``).
    """

    def __init__(self, actor: Any, patience: float, start: float):
        self.actor = actor
        self._patience, self._start = patience, start

    def ask(self, method: str, *args: Any) -> Any:
        """Call ``method`` and wait for its result. Raises ControllerLost: there is none."""
        return self.result(self.send(method, *args))

    def begin(self, go_back_to: Path | None) -> None:
        """Let the actor, which is being started, take up the run. Raises RunFailed: it does not start."""
        ref, deadline = self.send("begin", None, go_back_to), time.monotonic() + self._start
        while not ray.wait([ref], timeout=_PAUSE_SECONDS)[0]:
            require_node()
            if time.monotonic() > deadline:
                raise RunFailed(f"the controller has not started in {self._start:.0f} s")
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            raise RunFailed(f"the controller does not start: {root_cause(error)}") from None

    def send(self, method: str, *args: Any) -> ray.ObjectRef:
        """Call ``method``; :meth:`result` has what comes of it."""
        return getattr(self.actor, method).remote(*args)

    def result(self, ref: ray.ObjectRef) -> Any:
        """Wait for the result of a call, which may wait for a disk, as long as the controller gives signs of life.

        Raises:
            ControllerLost: there is none.
            StoreUnavailable: the controller did not find the store.
            RunFailed: the controller could not do it.
        """
        clock, pulse = AwakeClock(), None
        while not ray.wait([ref], timeout=_PAUSE_SECONDS)[0]:
            pulse = pulse or Pulse(lambda: self.send("ping").future(), self._patience)
            if pulse.hangs(clock.elapsed()):
                raise ControllerLost("hangs", hung=True)
        try:
            return ray.get(ref)
        except ray.exceptions.RayActorError:
            raise ControllerLost("died") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, NotBegun):
                raise ControllerLost("died") from None
            if isinstance(error.cause, StoreUnavailable):
                raise error.cause from None
            raise RunFailed(f"the controller failed: {root_cause(error)}") from None

    def revive(self, lost: ControllerLost, ready: Callable[[], bool], running: Callable[[], int]) -> Iterator[None]:
        """Let the actor, which starts anew by itself, take up the run. Goes on each time it is asked to.

        Args:
            ready: whether all that it needs to begin is there.
            running: inference workers that are at work then.

        Raises:
            RunFailed: it does not come back.
            ControllerLost: it is gone once more.
        """
        if lost.hung:
            ray.kill(self.actor, no_restart=False)
        clock, waited = AwakeClock(), 0.0
        pulse = Pulse(lambda: self.send("ping").future(), self._start)
        while pulse.answer is None or not ready():
            if pulse.hangs(clock.elapsed()):
                raise RunFailed(f"the controller has not started again in {self._start:.0f} s")
            if pulse.error is not None and is_final(pulse.error):
                raise RunFailed(f"the controller does not start again: {root_cause(pulse.error)}")
            yield
        begun = self.send("begin", running())
        while not ray.wait([begun], timeout=0)[0]:
            waited += clock.elapsed()
            if waited > self._start:
                raise ControllerLost("hangs", hung=True)
            yield
        try:
            self.result(begun)
        except StoreUnavailable:  # it went away meanwhile
            raise ControllerLost("lost the store as it began", hung=True) from None
