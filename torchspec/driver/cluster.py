"""The Ray cluster of a run: an existing one by address, or one on this machine that ends with the run."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]

import torchspec
from torchspec.config.schema import ClusterConfig, Config
from torchspec.driver.plan import Plan
from torchspec.driver.supervise import RunFailed
from torchspec.files import ensure_secret
from torchspec.network import LOOPBACK, free_port, is_loopback

OBJECT_STORE_BYTES = 128 << 20
"""Only metadata goes through Ray; the tensors go through Mooncake."""
POLL_SECONDS = 1.0
"""Between two looks at a cluster that is still starting."""
SYSTEM_CONFIG = {"memory_monitor_refresh_ms": 0}
"""Where memory runs short, Ray's own monitor ends first what it may start again: the controller, which frees nothing.
The kernel ends the largest process."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster: its id and address as Ray knows them, and what it offers."""

    id: str
    address: str
    resources: dict[str, float]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that this process is connected to."""

    address: str
    """Where others connect to it."""
    host: str
    """This machine in the network of the run: loopback if the cluster is this machine."""
    node_id: str
    """Of the node that this process is on."""
    nodes: tuple[Node, ...]

    @property
    def spans_machines(self) -> bool:
        return not is_loopback(self.host)

    @property
    def only_machine(self) -> str | None:
        """The address that Ray knows this machine by, if the run must stay on it: its store is on loopback."""
        return None if self.spans_machines else next(n.address for n in self.nodes if n.id == self.node_id)


def namespace(run_dir: Path) -> str:
    """Actors of a run live here, so that several runs share a cluster without touching each other."""
    return f"torchspec-{run_dir.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"


def require_node() -> None:
    """Raises RunFailed: Ray has died on the node that this process is connected to, so nothing gets anywhere."""
    here = ray.get_runtime_context().get_node_id()
    if all(node.id != here for node in alive_nodes()):
        raise RunFailed("Ray's node of the driver has died")


@contextmanager
def start_cluster(config: Config, plan: Plan, temp_dir: Path) -> Iterator[Cluster]:
    """Connect to ``cluster.address``, or start Ray here.

    Raises:
        ValueError: no cluster answers at ``cluster.address``, or ``store.host`` is no address of this machine.
        RunFailed: Ray does not start here, as on a machine that is busy with other things.
    """
    common = {"namespace": namespace(config.run_dir), "log_to_driver": False, "logging_level": logging.WARNING}
    if config.cluster.address is not None:
        set_auth_mode(os.environ.get("RAY_AUTH_MODE", "token"))
        _join(config.cluster, runtime_env={"py_modules": pack_code(temp_dir / "code")}, **common)
    else:
        options = {"num_cpus": plan.cores, "include_dashboard": config.cluster.dashboard, "dashboard_host": LOOPBACK}
        _start(temp_dir / "ray", _system_config=SYSTEM_CONFIG, **options, **common)
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # the driver tells of deaths itself, in one line
    try:
        yield _look_around(config.store.host)
    finally:
        ray.shutdown()


def set_auth_mode(mode: str) -> None:
    """Have Ray ask for its token (``token``), or not (``disabled``), whatever it found when it was imported."""
    os.environ["RAY_AUTH_MODE"] = mode
    RayConfig.initialize("")


def token_file() -> Path:
    """Where Ray reads its token, if it is not in ``RAY_AUTH_TOKEN``."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def ensure_token() -> None:
    """Close the file with Ray's token, or make it: Ray would make it readable for everybody.

    A token that the user's environment names is the user's own.
    """
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        file = token_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.parent.chmod(0o700)
        ensure_secret(file)


@contextmanager
def loopback_stays() -> Iterator[None]:
    """Ray, imported here or started meanwhile, takes 127.0.0.1 for the machine's address.

    It would put another in its place otherwise, and then listen on all interfaces (2.60): on Linux, this switch alone
    keeps it from that.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
        ray_constants.ENABLE_RAY_CLUSTER = True


def _start(temp_dir: Path, **options: Any) -> None:
    """Start Ray on this machine alone, on loopback and with a token: whoever reaches its ports can have it run code."""
    set_auth_mode("token")
    ensure_token()
    try:
        with loopback_stays():
            ray.init(
                address="local",
                _node_ip_address=LOOPBACK,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(temp_dir),
                **options,
            )
    except Exception as error:  # Ray has no kind of its own for a node that does not start in time
        busy = f"{os.getloadavg()[0]:.0f} processes want to run on {os.cpu_count()} cores"
        raise RunFailed(f"Ray did not start ({busy}): {' '.join(str(error).split())[:200]}") from error


def _join(config: ClusterConfig, **options: Any) -> None:
    """Connect to ``config.address`` and wait for its nodes."""
    deadline = time.monotonic() + config.wait_seconds
    while not ray.is_initialized():
        try:
            ray.init(address=config.address, **options)
        except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            if config.nodes > 1 and time.monotonic() < deadline and isinstance(error, ConnectionError):
                time.sleep(POLL_SECONDS)
                continue
            raise ValueError(
                f"cluster.address {config.address}: {' '.join(str(error).split())[:200]} (a cluster without a token is "
                "joined with RAY_AUTH_MODE=disabled)"
            ) from None
    while (alive := len(alive_nodes())) < config.nodes:
        if time.monotonic() > deadline:
            ray.shutdown()
            raise ValueError(
                f"the cluster has {alive} nodes after cluster.wait_seconds ({config.wait_seconds:.0f} s), "
                f"cluster.nodes asks for {config.nodes}"
            )
        time.sleep(POLL_SECONDS)


def alive_nodes() -> tuple[Node, ...]:
    """Of the cluster that this process is connected to."""
    return tuple(
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]
    )


def pack_code(folder: Path) -> list[str]:
    """Copy this package, and what its installation says of it, to ``folder``; the paths for Ray to ship.

    Every node then runs the driver's code, whatever it has installed, and SGLang finds our plugins there.
    """
    installed = distribution("torchspec")
    code, about = folder / "torchspec", folder / f"torchspec-{installed.version}.dist-info"
    shutil.copytree(Path(torchspec.__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__"))
    about.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (about / name).write_text(installed.read_text(name) or "")
    return [str(code), str(about)]


def _look_around(host: str | None) -> Cluster:
    context = ray.get_runtime_context()
    if host is not None:
        try:
            free_port(host)
        except OSError as error:
            raise ValueError(f"store.host {host} is no address of this machine: {error.strerror}") from None
    nodes = alive_nodes()
    own = next(node for node in nodes if node.id == context.get_node_id()).address
    alone = all(node.address == own for node in nodes)
    return Cluster(
        address=context.gcs_address,
        host=host or (LOOPBACK if alone else own),
        node_id=context.get_node_id(),
        nodes=nodes,
    )
