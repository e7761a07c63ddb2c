"""The Ray cluster of a run: an existing one by address, or one on this machine that ends with the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from torchspec.config.schema import Config
from torchspec.driver.plan import Plan

OBJECT_STORE_BYTES = 128 << 20
"""Only metadata goes through Ray; the tensors go through Mooncake."""


def namespace(run_name: str) -> str:
    """Actors of a run live here, so that several runs share a cluster without touching each other."""
    return f"torchspec-{run_name}"


def node_is_alive() -> bool:
    """Whether Ray still runs on the node that this process is connected to. Without it, nothing gets anywhere."""
    here = ray.get_runtime_context().get_node_id()
    return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == here)


@contextmanager
def start_cluster(config: Config, plan: Plan, temp_dir: Path) -> Iterator[str]:
    """Connect to ``cluster.address``, or start Ray here; yields the address others can connect to.

    Raises:
        ValueError: no cluster answers at ``cluster.address``.
    """
    common = {"namespace": namespace(config.run.name), "log_to_driver": False, "logging_level": logging.WARNING}
    if config.cluster.address is not None:
        try:
            ray.init(address=config.cluster.address, **common)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise ValueError(
                f"cluster.address {config.cluster.address}: {' '.join(str(error).split())[:200]} (a cluster without a "
                "token is joined with RAY_AUTH_MODE=disabled)"
            ) from None
    else:
        ray.init(
            address="local",
            num_cpus=plan.cores,
            include_dashboard=config.cluster.dashboard,
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(temp_dir / "ray"),
            **common,
        )
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # the driver tells of deaths itself, in one line
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
