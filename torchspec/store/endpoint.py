"""Where a run's store is: all that a process needs to become a client. Standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from http.client import HTTPConnection

from torchspec.store.errors import StoreUnavailable

_ANSWER_SECONDS = 5.0

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

    def ask(self, path: str) -> str:
        """What the master's HTTP server answers to ``path``; never asked through a proxy.

        Raises:
            StoreUnavailable: no answer, or not a successful one.
        """
        connection = HTTPConnection(self.metrics, timeout=_ANSWER_SECONDS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            text = response.read().decode()
        except OSError as error:
            raise StoreUnavailable(f"the store's master does not answer at {self.metrics}: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise StoreUnavailable(f"the store's master at {self.metrics} answered {response.status} to {path}")
        return text

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StoreEndpoint:
        return cls(**json.loads(text))
