"""How a process of ours joins the store."""

from __future__ import annotations

import os
import socket

from mooncake.store import MooncakeDistributedStore, ReplicateConfig

from torchspec.network import confine
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import StoreUnavailable

_PROBE_SECONDS = 5.0


def connect(endpoint: StoreEndpoint, segment_bytes: int = 0) -> MooncakeDistributedStore:
    """A connected client that contributes ``segment_bytes`` of memory to the store.

    Raises:
        StoreUnavailable: the master does not answer or refuses.
    """
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
    """This process's address in the master's network.

    Raises:
        StoreUnavailable: the master does not answer.
    """
    host, port = master.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise StoreUnavailable(f"the store's master does not answer at {master}: {error}") from error
