"""Addresses of a run's network, and listeners that answer to one of them only."""

from __future__ import annotations

import socket

import psutil
import pytest

from tests.exposed import can_connect, open_files, open_sockets, other_addresses
from torchspec.network import (
    LOOPBACK,
    accept_only_to,
    address_towards,
    free_port,
    interface_of,
    require_free_port,
)


def other_address() -> str:
    """An IPv4 address of this machine that is not loopback."""
    return next((address for address in other_addresses() if ":" not in address), None) or pytest.skip(
        "this machine has no address but loopback"
    )


def test_who_talks_to_this_machine_does_so_from_the_same_address():
    assert address_towards(LOOPBACK) == address_towards("localhost") == LOOPBACK
    address = other_address()
    assert address_towards(address) == address
    assert interface_of(LOOPBACK) == "lo" != interface_of(address)


@pytest.mark.parametrize("wanted", ["loopback", "other"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "dual-stack"])
def test_a_listener_on_all_interfaces_answers_to_one_address_only(wanted, family):
    addresses = {"loopback": LOOPBACK, "other": other_address()}
    host = "" if family == socket.AF_INET else "::"
    with socket.create_server((host, 0), family=family, dualstack_ipv6=family == socket.AF_INET6) as listener:
        port = listener.getsockname()[1]
        assert all(can_connect(address, port) for address in addresses.values())
        accept_only_to(listener, addresses[wanted])
        answers = {name for name, address in addresses.items() if can_connect(address, port)}
        assert answers == {wanted}
        connection = socket.create_connection((addresses[wanted], port))
        while True:  # the earlier ones are waiting, too
            accepted, peer = listener.accept()
            if peer[1] == connection.getsockname()[1]:
                break
        accepted.sendall(b"data")
        assert connection.recv(4) == b"data"
        connection.close()
        accepted.close()


def test_a_port_that_is_taken_cannot_be_had():
    port = free_port()
    require_free_port("127.0.0.1", port, "store.master_port")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ValueError, match=rf"store\.master_port={port}.*in use"):
            require_free_port("127.0.0.1", port, "store.master_port")
    with pytest.raises(ValueError, match=r"203\.0\.113\.7"):
        require_free_port("203.0.113.7", port, "store.master_port")


def test_what_others_could_get_at_is_found(tmp_path):
    """Or the tests that find nothing would always pass."""
    other_address()
    assert open_sockets(psutil.Process()) == set()
    with (
        socket.create_server(("", 0)) as everywhere,
        socket.create_server((LOOPBACK, 0)),
        socket.create_server(("::1", 0), family=socket.AF_INET6),
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as dual,
        socket.create_server(("", 0)) as confined,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        accept_only_to(confined, LOOPBACK)
        datagrams.bind(("", 0))
        ports = {s.getsockname()[1] for s in (everywhere, dual, datagrams)}
        assert {int(line.split()[-1]) for line in open_sockets(psutil.Process())} == ports
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir(mode=0o700)
    other.mkdir()
    with (run / "a").open("w"), (other / "b").open("w"), (tmp_path / "c").open("w"):
        found = {line.split()[-1] for line in open_files(psutil.Process(), tmp_path)}
        assert {path for path in found if path.startswith(str(tmp_path))} == {str(other / "b")}
