"""Which node each actor of a run goes to, and where the training ranks meet.

    driver's node        store master (the driver's child), controller, store node
    inference_resource   inference workers
    training_resource    training ranks, packed: neighbours in number are Ulysses ranks, which exchange the most

A role is a custom resource that a node offers (``ray start --resources='{"torchspec_inference": 1}'``); an actor takes
a sliver of it, so what bounds their number is CPUs and GPUs. Without a role any node will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from torchspec.config.schema import ClusterConfig, Config
from torchspec.driver.cluster import Cluster, Node
from torchspec.driver.plan import ThreadPlan
from torchspec.network import LOOPBACK, free_port, meeting_point

SLIVER = 0.001

Options = dict[str, Any]
"""Of a Ray actor."""


@dataclass(frozen=True)
class RankSlots:
    """What a generation of training ranks has asked the cluster for."""

    meeting: ray.ObjectRef
    """Comes with rank 0's address and a port that is free there, once there is a slot for every rank."""
    places: list[Options]
    """Of each rank's actor."""
    wanted: str
    """In words."""


class Placement:
    """Options of actors on ``cluster``."""

    def __init__(self, cluster: Cluster, config: ClusterConfig):
        self._cluster, self._config = cluster, config
        self._ranks: PlacementGroup | None = None

    def beside_the_driver(self) -> Options:
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(self._cluster.node_id, soft=False)}

    def worker(self) -> Options:
        return {"resources": self._resources(self._config.inference_resource)}

    def ranks(self, count: int, cpus: int, gpus: int) -> RankSlots:
        """Ask for slots for ``count`` training ranks. Those of the ranks before are given back."""
        role = self._resources(self._config.training_resource)
        wanted = (
            f"{count} training ranks (training.dp_size x sp_ulysses_size x sp_ring_size) of {cpus} CPUs and {gpus} GPUs"
        )
        if not self._cluster.spans_machines:
            return RankSlots(ray.put((LOOPBACK, free_port())), [{"resources": role}] * count, wanted)
        if self._ranks is not None:
            remove_placement_group(self._ranks)
        bundle = {"CPU": cpus, "GPU": gpus, **role}
        self._ranks = placement_group([{name: amount for name, amount in bundle.items() if amount}] * count)
        places = [PlacementGroupSchedulingStrategy(self._ranks, number) for number in range(count)]
        find = ray.remote(meeting_point).options(num_cpus=0, scheduling_strategy=places[0])
        return RankSlots(find.remote(self._cluster.host), [{"scheduling_strategy": place} for place in places], wanted)

    def _resources(self, role: str | None) -> dict[str, float]:
        """A sliver of the role's, and of this machine's own if the run must stay on it when others join the cluster."""
        machine = self._cluster.only_machine
        names = (role, None if machine is None else f"node:{machine}")
        return {name: SLIVER for name in names if name is not None}


def check_pools(nodes: Sequence[Node], config: Config, threads: ThreadPlan, on_gpu: bool) -> list[Node]:
    """The nodes that the pools may go to. Raises ValueError: what does not fit where, even if nothing else runs."""
    roles, inference, training = config.cluster, config.inference.most_workers, config.training.world_size
    engine_gpus, rank_gpus = (config.inference.tp_size, 1) if on_gpu else (0, 0)
    knob = "cluster.inference_resource"
    check_capacity(nodes, knob, roles.inference_resource, inference, threads.inference, engine_gpus)
    check_capacity(nodes, "cluster.training_resource", roles.training_resource, training, threads.training, rank_gpus)
    used = {n.id: n for role in (roles.inference_resource, roles.training_resource) for n in nodes_of(nodes, role)}
    for name, needed in (
        ("CPU", inference * threads.inference + training * threads.training),
        ("GPU", inference * engine_gpus + training * rank_gpus),
    ):
        there = sum(int(node.resources.get(name, 0)) for node in used.values())
        if needed > there:
            raise ValueError(
                f"{inference} inference workers and {training} training ranks need {needed} {name}s together; the "
                f"cluster's nodes for them have {there}"
            )
    return list(used.values())


def nodes_within(nodes: Sequence[Node], machine: str | None) -> list[Node]:
    """Those on the machine with that address; None: all of them."""
    return [node for node in nodes if machine in (None, node.address)]


def nodes_of(nodes: Sequence[Node], role: str | None) -> list[Node]:
    """Nodes that actors of a role may go to: those with a CPU and, if it has a name, the role's resource."""
    return [n for n in nodes if n.resources.get("CPU", 0) >= 1 and (role is None or role in n.resources)]


def check_capacity(nodes: Sequence[Node], knob: str, role: str | None, count: int, cpus: int, gpus: int) -> None:
    """Raises ValueError: ``count`` actors of a role do not fit on its nodes, even if nothing else runs there."""
    nodes = nodes_of(nodes, role)
    if not nodes and role is None:
        raise ValueError("no node of the cluster that the run can use has a CPU for it")
    if not nodes:
        raise ValueError(
            f"no node of the cluster offers the resource {role} of {knob}: start Ray there with "
            f"--resources='{{\"{role}\": 1}}'"
        )
    capacity = sum(_capacity(node, cpus, gpus) for node in nodes)
    if capacity < count:
        where = ", ".join(sorted({node.address for node in nodes}))
        raise ValueError(
            f"{count} actors of {cpus} CPUs and {gpus} GPUs each do not fit on the nodes of {knob} ({where}): there is "
            f"room for {capacity}"
        )


def _capacity(node: Node, cpus: int, gpus: int) -> int:
    actors = int(node.resources["CPU"] // cpus)
    return min(actors, int(node.resources.get("GPU", 0) // gpus)) if gpus else actors
