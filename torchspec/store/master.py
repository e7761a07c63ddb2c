"""Mooncake's master as a supervised child: it knows which objects exist and hands out the nodes' memory.

It binds the given address only, runs without Mooncake's metadata server, ends with the process that started it, and
never evicts: all our objects are hard-pinned (``hidden_state_store.py``), so a full store refuses a put instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mooncake
import psutil

from torchspec.network import LOOPBACK, free_port, require_free_port
from torchspec.processes.child import ChildProcess
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import StoreUnavailable

_START_ATTEMPTS = 3
"""A free port may be taken between looking and binding; the master then exits at once."""
_START_SECONDS = 30.0

_FLAGS = {
    "enable_metric_reporting": "false",  # the periodic log line; /metrics stays
    "allow_evict_soft_pinned_objects": "false",
    # A lease that ends during a read fails it. Ours end with the removal (by force), so a long one costs nothing.
    "default_kv_lease_ttl": "60s",
    # Room of a put whose process died comes back after this; a live put that stalls is cut off sooner.
    "put_start_discard_timeout_sec": "30",
    "put_start_release_timeout_sec": "60",
    # Seconds without a heartbeat until a node's memory is written off. A busy machine can delay one for long.
    "client_ttl": "30",
}


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


class MooncakeMaster:
    """Starts on construction and is ready when the constructor returns.

    Args:
        host: Address to bind, and under which clients find it.
        port: Port for clients; default: a free one.
        protocol: Handed on to the clients.

    Raises:
        ValueError: ``port`` cannot be had (names ``store.master_port``).
        StoreUnavailable: the master does not come up (quotes its log).
    """

    def __init__(self, log_path: Path, host: str = LOOPBACK, port: int | None = None, protocol: str = "tcp"):
        def find_addresses() -> StoreEndpoint:
            if port is not None:
                require_free_port(host, port, "store.master_port")
            return StoreEndpoint(f"{host}:{port or free_port(host)}", f"{host}:{free_port(host)}", protocol=protocol)

        self._log_path = log_path
        self._start(find_addresses)

    def restart(self) -> None:
        """End the process, if it has not ended by itself, and start another at the same addresses.

        It knows nothing of what was stored. Nodes and clients find it by themselves.

        Raises:
            StoreUnavailable: it does not come up (quotes its log).
        """
        self._process.stop()
        self._start(lambda: self.endpoint)

    def alive(self) -> bool:
        return self._process.alive()

    def stop(self) -> None:
        self._process.stop()

    def usage(self) -> StoreUsage:
        """How full the store is, as the master counts; never asked through a proxy.

        Raises:
            StoreUnavailable: no answer, or not a successful one.
        """
        lines = self.endpoint.ask("/metrics").splitlines()
        metrics = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return StoreUsage(
            allocated_bytes=int(metrics["master_allocated_bytes"]),
            capacity_bytes=int(metrics["master_total_capacity_bytes"]),
            objects=int(metrics["master_key_count"]),
            evicted_objects=int(metrics["master_evicted_key_count"]),
        )

    def _start(self, find_addresses: Callable[[], StoreEndpoint]) -> None:
        for _ in range(_START_ATTEMPTS):
            self.endpoint = find_addresses()
            self._process = ChildProcess(_command(self.endpoint), self._log_path)
            if self._becomes_ready():
                return
            self._process.stop()
        log_end = self._process.log_tail()
        raise StoreUnavailable(f"the store's master does not start; {self._log_path} ends with\n{log_end}")

    def _becomes_ready(self) -> bool:
        """Whether the child itself came to listen on both ports.

        Its ``/health`` says ready before the port for clients is bound, and whoever took a port may answer too.
        """
        wanted = {int(address.rsplit(":", 1)[1]) for address in (self.endpoint.master, self.endpoint.metrics)}
        deadline = time.monotonic() + _START_SECONDS
        while self._process.alive() and time.monotonic() < deadline:
            if wanted <= _ports_of_children(self._process.pid):
                return True
            time.sleep(0.02)
        return False


def _ports_of_children(pid: int) -> set[int]:
    try:
        sockets = [s for child in psutil.Process(pid).children() for s in child.net_connections("tcp")]
    except psutil.NoSuchProcess:  # it ended while we looked
        return set()
    return {s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN}


def _command(endpoint: StoreEndpoint) -> list[str]:
    host, rpc_port = endpoint.master.rsplit(":", 1)
    _, metrics_port = endpoint.metrics.rsplit(":", 1)
    addresses = {"rpc_address": host, "rpc_port": rpc_port, "metrics_host": host, "metrics_port": metrics_port}
    binary = Path(mooncake.__file__).with_name("mooncake_master")
    return [str(binary), *(f"--{name}={value}" for name, value in (addresses | _FLAGS).items())]
