"""How full the store is, as its master counts. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from http.client import HTTPConnection

from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import StoreUnavailable

_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Counters of the master."""

    allocated_bytes: int
    """Bytes of all objects, those being put included, without what the allocator rounds up."""
    capacity_bytes: int
    """Bytes of all mounted segments."""
    objects: int
    evicted_objects: int
    """Stays zero: objects are pinned."""


def read_usage(endpoint: StoreEndpoint) -> StoreUsage:
    """Ask the master; never through a proxy.

    Raises:
        StoreUnavailable: no answer, or not a successful one.
    """
    address = endpoint.metrics
    connection = HTTPConnection(address, timeout=_TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        lines = response.read().decode().splitlines()
    except OSError as error:
        raise StoreUnavailable(f"the store's master does not answer at {address}: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise StoreUnavailable(f"the store's master at {address} answered {response.status} to /metrics")
    metrics = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return StoreUsage(
        allocated_bytes=int(metrics["master_allocated_bytes"]),
        capacity_bytes=int(metrics["master_total_capacity_bytes"]),
        objects=int(metrics["master_key_count"]),
        evicted_objects=int(metrics["master_evicted_key_count"]),
    )
