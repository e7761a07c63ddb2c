"""The store's processes, kept alive: the master, and the node that holds the memory.

A master that is started again at its old addresses is found by everybody: nodes mount their memory anew and clients
connect anew, within a few seconds (Mooncake 0.3.13). It knows nothing of what was stored, so a repair, whatever it was
for, always leaves an empty store: one way to go instead of several that differ by what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from torchspec.config.schema import RecoveryConfig
from torchspec.driver.supervise import Pulse, RunFailed, actor_pulse
from torchspec.store.errors import StoreUnavailable
from torchspec.store.master import MooncakeMaster

_PAUSE_SECONDS = 0.2


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
        self._start()

    def fault(self, elapsed: float) -> str | None:
        """What is wrong with the store, ``elapsed`` seconds after the last look."""
        if not self._master.alive():
            return "the store's master died"
        if self._master_pulse.hangs(elapsed):
            return "the store's master hangs"
        if self._node_gone():
            return "the store's node died"
        if self._node_pulse.hangs(elapsed):
            return "the store's node hangs"
        return None

    def repair(self) -> None:
        """Start the master again, and the node if it is gone; returns when the store has its memory, and nothing in it.

        Raises:
            RunFailed: it does not get there.
        """
        lost_node = self._node_gone() or self._node_pulse.hangs(0.0)
        try:
            self._master.restart()
        except StoreUnavailable as error:
            raise RunFailed(f"the store's master cannot be started again: {error}") from None
        if lost_node:
            ray.kill(self._node)
            self._start()
        else:
            self._watch()
        deadline = time.monotonic() + self._recovery.start_seconds
        while self._capacity() < self._segment_bytes:
            if self._node_gone():
                self._start()
            if time.monotonic() > deadline:
                raise RunFailed(f"the store has not come back in {self._recovery.start_seconds:.0f} s")
            time.sleep(_PAUSE_SECONDS)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        """Start a node."""
        self._node = self._start_node()
        self._life = self._node.hold.remote()
        self._watch()

    def _watch(self) -> None:
        """Count silence from now on."""
        patience = self._recovery.hang_seconds
        self._master_pulse = Pulse(lambda: self._thread.submit(self._master.usage), patience)
        self._node_pulse = actor_pulse(self._node, self._recovery)

    def _node_gone(self) -> bool:
        return bool(ray.wait([self._life], timeout=0)[0])

    def _capacity(self) -> int:
        try:
            return self._master.usage().capacity_bytes
        except StoreUnavailable:
            return 0
