"""What of a process others could get at: sockets, tried from outside, and files that it writes, by their modes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import takewhile
from pathlib import Path

import psutil

_LOOK_SECONDS = 2.0


def other_addresses() -> list[str]:
    """This machine's addresses that are not loopback, those of its links aside."""
    entries = [entry for interface in psutil.net_if_addrs().values() for entry in interface]
    found = [e.address for e in entries if e.family in (socket.AF_INET, socket.AF_INET6) and "%" not in e.address]
    return [address for address in found if not ip_address(address).is_loopback]


def can_connect(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=0.5).close()
    except OSError:
        return False
    return True


def open_sockets(process: psutil.Process) -> set[str]:
    """TCP and UDP sockets, IPv4 and IPv6, on which others can reach ``process``; none if it has ended.

    A listener on all interfaces may answer on one of them alone: that, only a connection tells.
    """
    try:
        name = process.name()
        waiting = [c for c in process.net_connections("inet") if not c.raddr and c.laddr]
    except psutil.Error:
        return set()
    found = set()
    for connection in waiting:
        address, port = _unmapped(connection.laddr.ip), connection.laddr.port
        listens = connection.status == psutil.CONN_LISTEN
        if address.is_loopback or not (listens or connection.type == socket.SOCK_DGRAM):
            continue
        tried = [str(address)] if not address.is_unspecified else other_addresses()
        if not listens or any(can_connect(one, port) for one in tried):
            found.add(f"{name}: {connection.type.name} {address} {port}")
    return found


def open_files(process: psutil.Process, base: Path) -> set[str]:
    """Files that ``process`` writes and others could read: neither they nor a folder above them is its user's alone.

    What lies in ``base`` itself is the test's own, and ``base`` counts for nobody's.
    """
    found = set()
    try:
        for file in process.open_files():
            path = Path(file.path)
            ours = (path, *takewhile(lambda folder: folder != base, path.parents))
            if file.mode != "r" and path.parent != base and all(part.stat().st_mode & 0o077 for part in ours):
                found.add(f"{process.name()}: {path}")
    except (psutil.Error, FileNotFoundError):
        return set()
    return found


@contextmanager
def watched_processes(base: Path) -> Iterator[set[str]]:
    """What processes that this one starts expose meanwhile; complete at the end.

    Mooncake binds its ports first and is confined then, some milliseconds later: only what two looks have found counts.
    """
    over, found, looks = threading.Event(), set[str](), 0

    def look() -> None:
        nonlocal looks
        before = set[str]()
        while not over.wait(_LOOK_SECONDS):
            family = psutil.Process().children(recursive=True)
            now = {one for process in family for one in open_sockets(process) | open_files(process, base)}
            found.update(now & before)
            before, looks = now, looks + bool(family)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
    assert looks > 2, "nothing has been looked at"


def _unmapped(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
