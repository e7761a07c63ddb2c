"""Which addresses processes of a run use, and who may reach what they listen on. Standard library and psutil only.

A run has one network: the one in which the store's master, or the training ranks' meeting point, has its address. On
one machine that is loopback.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Iterable

import psutil

LOOPBACK = "127.0.0.1"

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF of linux/filter.h
_LOAD_BYTE, _LOAD_WORD, _SHIFT_RIGHT, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x20, 0x74, 0x15, 0x06


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, is this machine talking to itself."""
    return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback


def address_towards(host: str) -> str:
    """This machine's address on the way to ``host``, as ``host`` sees it. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def free_port(host: str = LOOPBACK) -> int:
    """A TCP port that was free a moment ago. Another process can take it, so callers try again."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free_port(host: str, port: int, knob: str) -> None:
    """Refuse a port that the user asked for and that cannot be had.

    Raises:
        ValueError: ``host:port`` is in use, or ``host`` is not an address of this machine.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free to a server
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"{knob}={port} cannot be used on {host} ({error.strerror}); choose another port, or leave {knob} out "
                "to get a free one"
            ) from error


def meeting_point(host: str) -> tuple[str, int]:
    """This machine's address on the way to ``host``, and a port that is free on it."""
    address = address_towards(host)
    return address, free_port(address)


def interface_of(address: str) -> str:
    """The name of the network interface that has ``address``."""
    return next(
        name for name, entries in psutil.net_if_addrs().items() for entry in entries if entry.address == address
    )


def accept_only_to(listener: socket.socket, address: str) -> None:
    """Let ``listener``, which is bound to all interfaces, see only what is sent to ``address``.

    Packets to any other address of this machine are dropped before a connection could come about, as if nobody
    listened. For listeners of libraries that cannot be told what to bind; no privilege is needed.
    """
    if is_loopback(address):  # a socket bound to the loopback device gets no packet from any other
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        return
    wanted = int(ipaddress.IPv4Address(address))
    program = [  # (code, jump if true, jump if false, operand)
        (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
        (_SHIFT_RIGHT, 0, 0, 4),
        (_JUMP_IF_EQUAL, 0, 3, 4),  # IP version 4
        (_LOAD_WORD, 0, 0, _NETWORK_HEADER + 16),
        (_JUMP_IF_EQUAL, 0, 1, wanted),  # its destination
        (_RETURN, 0, 0, 0xFFFFFFFF),
        (_RETURN, 0, 0, 0),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code)))


def confine(fds: Iterable[str], address: str) -> None:
    """Let the listening sockets among ``fds`` that are bound to all interfaces accept what is sent to ``address`` only.

    Args:
        fds: names in ``/proc/self/fd``.
    """
    for fd in fds:
        try:
            if not stat.S_ISSOCK(os.fstat(int(fd)).st_mode):
                continue
            duplicate = socket.socket(fileno=os.dup(int(fd)))
        except OSError:  # closed meanwhile
            continue
        with duplicate:
            if (
                duplicate.family in (socket.AF_INET, socket.AF_INET6)
                and duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                and ipaddress.ip_address(duplicate.getsockname()[0]).is_unspecified
            ):
                accept_only_to(duplicate, address)
