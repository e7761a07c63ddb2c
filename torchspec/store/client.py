"""How a process of ours joins the store: to look up and remove objects, or to hold the memory they lie in. No torch.

Whatever talks to the master raises :class:`StoreUnavailable` where that does not answer.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterable

from mooncake.store import MooncakeDistributedStore, ReplicateConfig

from torchspec.network import confine
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import MissingObject, StoreUnavailable, error_for

_PROBE_SECONDS = 5.0


class StoreClient:
    """A client that looks for objects and removes them; :class:`HiddenStateStore` also moves them. Thread-safe."""

    def __init__(self, endpoint: StoreEndpoint):
        self._endpoint, self._client = endpoint, connect(endpoint)

    def names(self) -> set[str]:
        """Of all objects in the store. The master looks at all of them: not for every moment."""
        return set(self._endpoint.ask("/get_all_keys").split())

    def remove(self, key: str, suffixes: Iterable[str]) -> None:
        """Free ``{key}_{suffix}``, whether or not a reader's lease on it has ended. What is not there is fine."""
        self.remove_objects(object_names(key, suffixes))

    def remove_objects(self, names: list[str]) -> None:
        """Free objects by name, as :meth:`remove` does."""
        for name, code in zip(names, self._client.batch_remove(names, True), strict=True):
            error = error_for(code, "remove", name)
            if code < 0 and not isinstance(error, MissingObject):
                raise error

    def remove_all(self, prefix: str) -> None:
        """Free every object whose name starts with ``prefix``. The master looks at all names: not for every day."""
        code = self._client.remove_by_regex(f"^{re.escape(prefix)}", True)
        if code < 0:
            raise error_for(code, "remove", f"{prefix}*")

    def exists(self, key: str, suffixes: Iterable[str]) -> bool:
        """Whether all of ``{key}_{suffix}`` are stored."""
        names = object_names(key, suffixes)
        results = self._client.batch_is_exist(names)
        for name, result in zip(names, results, strict=True):
            if result < 0:
                raise error_for(result, "look-up", name)
        return all(results)

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


class StoreNode:
    """Contributes ``segment_bytes`` of this process's memory until closed. Meant to be run as a Ray actor.

    Workers and trainers are pure clients, so that one of them may die without taking stored samples along. The segment
    is anonymous memory (nothing in ``/dev/shm``) and its pages are touched when objects arrive, not before.
    """

    def __init__(self, endpoint: StoreEndpoint, segment_bytes: int):
        self._client = connect(endpoint, segment_bytes)

    def ping(self) -> bool:
        """Whether the master answers; never false."""
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


def object_names(key: str, suffixes: Iterable[str]) -> list[str]:
    """Of a sample's objects, one a tensor."""
    return [f"{key}_{suffix}" for suffix in suffixes]


def connect(endpoint: StoreEndpoint, segment_bytes: int = 0) -> MooncakeDistributedStore:
    """A connected client that contributes ``segment_bytes`` of memory to the store."""
    towards_master = _probe(endpoint.master)  # setup would try for much longer, and holds the GIL meanwhile
    address = endpoint.local_hostname or towards_master
    client = MooncakeDistributedStore()
    before = set(os.listdir("/proc/self/fd"))
    code = client.setup(address, endpoint.metadata, segment_bytes, 0, endpoint.protocol, "", endpoint.master)
    if code != 0:
        raise StoreUnavailable(f"the store's master at {endpoint.master} refused this client (Mooncake {code})")
    # a client listens for handshakes and for data, always on all interfaces (0.3.13), whatever address it advertises
    confine(set(os.listdir("/proc/self/fd")) - before, socket.gethostbyname(address))
    return client


def pinned() -> ReplicateConfig:
    """Put objects so that the master never evicts them; a put that finds no room fails instead."""
    config = ReplicateConfig()
    config.with_hard_pin = True
    return config


def _probe(master: str) -> str:
    """This process's address in the master's network."""
    host, port = master.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise StoreUnavailable(f"the store's master does not answer at {master}: {error}") from error
