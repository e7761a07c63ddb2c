"""Where a run's store is: all that a process needs to become a client. Standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

P2P_HANDSHAKE = "P2PHANDSHAKE"
"""Mooncake's word for "clients tell each other where their memory is", which needs no metadata server.

The metadata server built into the master binds all interfaces, whatever address it is given (0.3.13), and is one more
thing to lose; so runs do without it.
"""


@dataclass(frozen=True, slots=True)
class StoreEndpoint:
    """Addresses are ``host:port``."""

    master: str
    metrics: str
    """HTTP server of the master, with Prometheus' ``/metrics``."""
    metadata: str = P2P_HANDSHAKE
    protocol: str = "tcp"
    """Transport of the tensors: ``tcp`` or ``rdma``."""
    local_hostname: str | None = None
    """Address under which other processes reach the process that connects. Default: the one it has in the master's
    network."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StoreEndpoint:
        return cls(**json.loads(text))
