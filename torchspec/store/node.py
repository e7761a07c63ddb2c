"""The process that holds the store's memory.

Workers and trainers are pure clients, so that one of them may die without taking stored samples along. The segment is
anonymous memory (nothing in ``/dev/shm``) and its pages are touched when objects arrive, not before.
"""

from __future__ import annotations

import threading

from torchspec.store.client import connect
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import error_for


class StoreNode:
    """Contributes ``segment_bytes`` of this process's memory until closed. Meant to be run as a Ray actor."""

    def __init__(self, endpoint: StoreEndpoint, segment_bytes: int):
        self._client = connect(endpoint, segment_bytes)

    def ping(self) -> bool:
        """True.

        Raises:
            StoreUnavailable: the master does not answer.
        """
        code = self._client.is_exist("ping")
        if code < 0:
            raise error_for(code, "ping", "the store")
        return True

    def hold(self) -> None:
        """Never returns: the end of this call is the end of the node."""
        threading.Event().wait()

    def close(self) -> None:
        """Withdraw the memory; the objects in it are gone."""
        self._client.close()
