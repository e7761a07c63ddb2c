"""Two 'hosts' on one machine: network namespaces with a cable between them, and real Ray nodes in both.

Each host has its own loopback, its address on the cable, and an address in another network on the same cable, in which
nothing of a run may be reached. Files are shared, as on a cluster's file system.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import psutil
import pytest

RAY_START = Path(__file__).parents[2] / "configs" / "launch" / "ray_start.sh"
INTERFACE = "cable"


class Host:
    """A network namespace."""

    def __init__(self, name: str, number: int):
        self.name = name
        self.address, self.other_address = f"10.77.0.{number}", f"10.78.0.{number}"

    def command(self, *command: str | Path) -> list[str]:
        """``command``, to be run on this host."""
        return ["ip", "netns", "exec", self.name, *map(str, command)]

    def run(self, *command: str | Path, **environment: str) -> str:
        done = subprocess.run(self.command(*command), env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def received_bytes(self) -> int:
        return int(self.run("cat", f"/sys/class/net/{INTERFACE}/statistics/rx_bytes"))

    def listeners(self) -> Iterator[tuple[IPv4Address | IPv6Address, int, int, str]]:
        """Address and port of each listening TCP socket, id and command line of the first process that holds it.

        A process that ends meanwhile listens no more: the first workers that Ray keeps ready do so.
        """
        for line in self.run("ss", "-H", "-l", "-t", "-n", "-p").splitlines():
            text, port = line.split()[3].rsplit(":", 1)
            text = text.partition("%")[0].strip("[]")  # %: the device that it is bound to
            address = ip_address("::" if text == "*" else text)
            mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
            for pid in map(int, re.findall(r"pid=(\d+)", line)[:1]):
                with suppress(psutil.NoSuchProcess):
                    yield mapped or address, int(port), pid, " ".join(psutil.Process(pid).cmdline()).strip()

    def unplug(self, seconds: float) -> None:
        """Nothing comes through the cable for a while."""
        _ip("-n", self.name, "link", "set", INTERFACE, "down")
        time.sleep(seconds)
        _ip("-n", self.name, "link", "set", INTERFACE, "up")

    def reaches(self, address: str, port: int) -> bool:
        code = f"import socket; socket.create_connection(({address!r}, {port}), timeout=1)"
        return subprocess.run(self.command(sys.executable, "-c", code), capture_output=True).returncode == 0


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Skips the test where namespaces cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    mark = os.getpid() % 10000
    hosts = Host(f"ts{mark}a", 1), Host(f"ts{mark}b", 2)
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        _ip("link", "add", f"ts{mark}a", "type", "veth", "peer", "name", f"ts{mark}b")
    except (OSError, subprocess.CalledProcessError) as error:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)
        pytest.skip(f"network namespaces are not permitted here: {error}")
    try:
        for host in hosts:
            _ip("link", "set", host.name, "netns", host.name, "name", INTERFACE)
            for command in (
                ("addr", "add", f"{host.address}/24", "dev", INTERFACE),
                ("addr", "add", f"{host.other_address}/24", "dev", INTERFACE),
                ("link", "set", INTERFACE, "up"),
                ("link", "set", "lo", "up"),
            ):
                _ip("-n", host.name, *command)
        yield hosts
    finally:
        for host in hosts:
            _ip("netns", "del", host.name)


@contextmanager
def ray_on(host: Host, temp_dir: Path, *arguments: str, roles: str, token: str) -> Iterator[None]:
    """A Ray node, started with the launcher for hosts; it and its processes end with the context."""
    environment = {
        "TORCHSPEC_INTERFACE": INTERFACE,
        "TORCHSPEC_ROLES": roles,
        "RAY_AUTH_TOKEN": token,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with (temp_dir / f"ray-{host.name}.log").open("w") as log:
        process = subprocess.Popen(
            host.command(RAY_START, *arguments, "--block", "--num-cpus=4", "--object-store-memory=100000000"),
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)
