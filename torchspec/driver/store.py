"""The store's processes, kept alive: the master, and the node that holds the memory.

A master that is started again at its old addresses is found by everybody: nodes mount their memory anew and clients
connect anew, within a few seconds (Mooncake 0.3.13). It knows nothing of what was stored, so a repair, whatever it was
for, always leaves an empty store: one way to go instead of several that differ by what is left. What breaks during a
repair begins it anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray

from torchspec.config.schema import RecoveryConfig
from torchspec.driver.supervise import Pulse, RunFailed, actor_pulse
from torchspec.store.errors import StoreUnavailable
from torchspec.store.master import MooncakeMaster

RETURN_SECONDS = 60.0
"""What a node that was there before has to find a master that was started again."""


class StoreSupervisor:
    """See the module's docstring.

    Args:
        start_node: starts a store node actor.
        segment_bytes: what a node contributes.
    """

    def __init__(
        self, master: MooncakeMaster, start_node: Callable[[], Any], segment_bytes: int, recovery: RecoveryConfig
    ):
        self._master, self._start_node = master, start_node
        self._segment_bytes, self._recovery = segment_bytes, recovery
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ask-master")
        self.fault = ""
        """What is wrong with the store; empty: nothing, it is there."""
        self._restart: Future[None] | None = None
        self._deadline = 0.0
        self._start()

    def check(self, elapsed: float) -> None:
        """Look at both, ``elapsed`` seconds after the last look; begin a repair, or go on with it.

        The store is there again once it has its memory, and nothing in it.

        Raises:
            RunFailed: it does not get there.
        """
        if self.fault and time.monotonic() > self._deadline:
            raise RunFailed(f"{self.fault}, and it has not come back in {self._recovery.start_seconds:.0f} s")
        if self._restart is not None:
            if not self._restart.done():
                return
            self._end_restart(self._restart)
        fault = self._find_fault(elapsed)
        if fault is not None:
            if not self.fault:
                self.fault, self._deadline = fault, time.monotonic() + self._recovery.start_seconds
            self._restart = self._thread.submit(self._master.restart)
        elif self.fault and self._capacity() >= self._segment_bytes:
            self.fault = ""

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _find_fault(self, elapsed: float) -> str | None:
        if not self._master.alive():
            return "the store's master died"
        if self._master_pulse.hangs(elapsed):
            return "the store's master hangs"
        if self._node_gone():
            return "the store's node died"
        if self._node_pulse.hangs(elapsed):
            return "the store's node hangs"
        return None

    def _end_restart(self, restart: Future[None]) -> None:
        """There is another master: start a node, too, if it is gone, and count silence from now on."""
        self._restart = None
        try:
            restart.result()
        except StoreUnavailable as error:
            raise RunFailed(f"the store's master cannot be started again: {error}") from None
        if self._node_gone() or self._node_pulse.hangs(0.0):
            ray.kill(self._node)
            self._start()
        else:
            self._watch(RETURN_SECONDS)

    def _start(self) -> None:
        """Start a node."""
        self._node = self._start_node()
        self._life = self._node.hold.remote()
        self._watch(self._recovery.start_seconds)

    def _watch(self, first: float) -> None:
        """Count silence from now on; the node has ``first`` seconds until its first sign of life."""
        patience = self._recovery.hang_seconds
        self._master_pulse = Pulse(lambda: self._thread.submit(self._master.usage), patience)
        self._node_pulse = actor_pulse(self._node, patience, first)

    def _node_gone(self) -> bool:
        return bool(ray.wait([self._life], timeout=0)[0])

    def _capacity(self) -> int:
        """As the master that is there now has said last."""
        usage = self._master_pulse.answer
        return 0 if usage is None else usage.capacity_bytes
