"""A cluster of several Ray nodes on one machine: roles, room, what nodes must have in common, code that is shipped."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster as RayNodes
from ray.util.placement_group import remove_placement_group

from tests.integration.controller_harness import drive, make_spec
from torchspec.config.load import parse_config, save_config
from torchspec.config.schema import ClusterConfig
from torchspec.controller.controller import Controller
from torchspec.controller.verify import verify_run
from torchspec.driver.cluster import Cluster, namespace, pack_code, start_cluster
from torchspec.driver.nodes import check_nodes, differences, look
from torchspec.driver.placement import Placement, check_capacity, check_pools, nodes_of, nodes_within
from torchspec.driver.plan import Plan, ThreadPlan
from torchspec.driver.scale import checked_change
from torchspec.inference.sglang_patch import our_edits
from torchspec.network import LOOPBACK
from torchspec.run_folder import RunFolder
from torchspec.store.client import StoreNode
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.store.master import MooncakeMaster

ROLES = ClusterConfig(inference_resource="torchspec_inference", training_resource="torchspec_training")
PLAN = Plan({}, (), ThreadPlan(1, 1), 2, 0, 0, 0, 0, 0, "", 0, 0, ())


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs, where the driver is, two nodes for inference, one for training."""
    ray_command = Path(sys.executable).with_name("ray")
    subprocess.run([ray_command, "get-auth-token", "--generate"], check=True, capture_output=True)
    head = {"num_cpus": 0, "object_store_memory": 80 << 20}
    nodes = RayNodes(initialize_head=True, head_node_args=head)
    for role in ("inference", "inference", "training"):
        nodes.add_node(num_cpus=2, resources={f"torchspec_{role}": 1}, object_store_memory=80 << 20)
    tree = {"target": {"path": "unused"}, "cluster": {"address": nodes.address, "nodes": 4, **ROLES.model_dump()}}
    tree["cluster"] |= {"address": nodes.address, "nodes": 4}
    with tempfile.TemporaryDirectory() as folder, start_cluster(parse_config(tree), PLAN, Path(folder)) as joined:
        yield joined
    nodes.shutdown()


@ray.remote
class Where:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def places(options: list[dict], **more: object) -> list[str]:
    actors = [Where.options(**option, **more).remote() for option in options]
    found = ray.get([actor.node.remote() for actor in actors], timeout=60)
    for actor in actors:
        ray.kill(actor)
    return found


def ids(cluster: Cluster, role: str) -> set[str]:
    return {node.id for node in nodes_of(cluster.nodes, role)}


def test_a_cluster_of_one_machine_is_on_loopback(cluster):
    assert len(cluster.nodes) == 4 and cluster.host == LOOPBACK and not cluster.spans_machines
    slots = Placement(cluster, ROLES).ranks(2, 1, 0)
    address, port = ray.get(slots.meeting)
    assert address == LOOPBACK and port > 0
    assert set(places(slots.places, num_cpus=1)) == ids(cluster, "torchspec_training")


def test_every_role_has_its_nodes(cluster):
    placement = Placement(cluster, ROLES)
    assert set(places([placement.worker()] * 4, num_cpus=1)) == ids(cluster, "torchspec_inference")
    assert places([placement.beside_the_driver()] * 2, num_cpus=0) == [cluster.node_id] * 2
    assert cluster.node_id not in ids(cluster, "torchspec_inference") | ids(cluster, "torchspec_training")


def test_ranks_of_several_machines_are_placed_together_and_meet_at_the_address_of_rank_0(cluster):
    spanning = replace(cluster, host=next(iter(cluster.nodes)).address)
    placement = Placement(spanning, ROLES)
    for count in (2, 1, 2):  # another generation takes the place of the one before
        slots = placement.ranks(count, 1, 0)
        address, port = ray.get(slots.meeting, timeout=60)
        assert address == spanning.host and port > 0 and len(slots.places) == count
        assert set(places(slots.places, num_cpus=1)) == ids(cluster, "torchspec_training")
    remove_placement_group(placement._ranks)


def test_ranks_that_have_no_room_wait_for_it(cluster):
    spanning = replace(cluster, host=cluster.nodes[0].address)
    placement, other = Placement(spanning, ROLES), Placement(spanning, ROLES)
    slots = placement.ranks(3, 1, 0)
    assert ray.wait([slots.meeting], timeout=2)[0] == []
    assert "3 training ranks (training.dp_size" in slots.wanted
    ray.get(placement.ranks(2, 1, 0).meeting, timeout=60)
    wanted = other.ranks(1, 1, 0).meeting
    assert ray.wait([wanted], timeout=2)[0] == []
    ray.get(placement.ranks(1, 1, 0).meeting, timeout=60)
    ray.get(wanted, timeout=60)  # the second CPU was given back
    for used in (placement, other):
        remove_placement_group(used._ranks)


def test_capacity_is_checked_by_role(cluster):
    check_capacity(cluster.nodes, "cluster.inference_resource", "torchspec_inference", 4, 1, 0)
    check_capacity(cluster.nodes, "cluster.inference_resource", None, 6, 1, 0)
    with pytest.raises(ValueError, match=r"5 actors of 1 CPUs.*room for 4"):
        check_capacity(cluster.nodes, "cluster.inference_resource", "torchspec_inference", 5, 1, 0)
    with pytest.raises(ValueError, match=r"2 actors of 2 CPUs.*room for 1"):
        check_capacity(cluster.nodes, "cluster.training_resource", "torchspec_training", 2, 2, 0)
    with pytest.raises(ValueError, match="no node of the cluster offers the resource cooking"):
        check_capacity(cluster.nodes, "cluster.training_resource", "cooking", 1, 1, 0)
    with pytest.raises(ValueError, match="1 GPUs"):
        check_capacity(cluster.nodes, "cluster.training_resource", "torchspec_training", 1, 1, 1)


def test_both_pools_must_fit_together(cluster):
    def check(workers: int, ranks: int, **roles: str) -> None:
        tree = {"target": {"path": "unused"}, "cluster": roles, "inference": {"workers": workers}}
        check_pools(cluster.nodes, parse_config(tree | {"training": {"dp_size": ranks}}), ThreadPlan(1, 1), False)

    check(4, 2, **ROLES.model_dump(include={"inference_resource", "training_resource"}))
    check(4, 2)
    with pytest.raises(ValueError, match=r"5 inference workers and 2 training ranks need 7 CPUs together.* have 6"):
        check(5, 2)
    with pytest.raises(ValueError, match=r"3 actors .* do not fit on the nodes of cluster\.training_resource"):
        check(1, 3, training_resource="torchspec_training")


def test_a_size_that_the_cluster_has_no_room_for_is_refused(cluster, tmp_path, target_path):
    tree = {
        "target": {"path": str(target_path), "dtype": "bfloat16"},
        "inference": {"buffer_bytes": 1 << 30},
        "store": {"segment_bytes": 8 << 30},
        "cluster": {"address": cluster.address, "nodes": 4},
    }
    save_config(parse_config(tree), tmp_path / "config.yaml")
    handle = tmp_path / "handle.json"
    handle.write_text(json.dumps({"machine": None}))
    assert checked_change(tmp_path, "3").workers == 3
    with pytest.raises(ValueError, match=r"77 actors .* do not fit"):
        checked_change(tmp_path, "77")
    with pytest.raises(ValueError, match=r"6 inference workers and 4 training ranks need 10 CPUs"):
        checked_change(tmp_path, "6", dp=4)
    handle.write_text(json.dumps({"machine": "10.9.8.7"}))
    with pytest.raises(ValueError, match="no node of the cluster that the run can use"):
        checked_change(tmp_path, "3")


def test_a_run_on_loopback_stays_on_its_machine_when_others_join(cluster):
    """Its store could not be reached from there."""
    machine = cluster.nodes[0].address
    (rank,) = Placement(cluster, ROLES).ranks(1, 1, 0).places
    for options in (Placement(cluster, ROLES).worker(), rank):
        assert options["resources"].keys() > {f"node:{machine}"}
        assert places([options], num_cpus=0)[0] in {node.id for node in cluster.nodes}
    other = replace(cluster.nodes[0], id="other", address="10.9.8.7")
    assert nodes_within([*cluster.nodes, other], cluster.only_machine) == list(cluster.nodes)
    spanning = replace(cluster, host=machine)
    assert spanning.only_machine is None and Placement(spanning, ROLES).worker()["resources"].keys() == {
        "torchspec_inference"
    }


def test_nodes_that_have_what_the_driver_has_are_accepted(cluster, tmp_path, target_path):
    check_nodes(cluster.nodes, tmp_path, target_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"target\.path .*absent") as error:
        check_nodes(cluster.nodes[1:3], tmp_path, tmp_path / "absent")
    assert len(str(error.value).splitlines()) == 2 and all(n.address in str(error.value) for n in cluster.nodes[1:3])


def test_differences_are_named(tmp_path, target_path):
    here = look(tmp_path, target_path, our_edits())
    assert list(differences(here, here, tmp_path, target_path)) == []
    assert here.versions["sglang"] == "0.5.23" and "missing" not in here.versions.values()
    there = replace(
        here,
        python="3.10",
        versions=here.versions | {"sglang": "0.5.20"},
        sglang_patch="sglang is not patched",
        sees_run=False,
        sees_target=False,
    )
    told = list(differences(there, here, tmp_path, target_path))
    for words in ("Python is 3.10", "sglang is 0.5.20, here it is 0.5.23", "not patched", "run.dir", "target.path"):
        assert any(words in line for line in told), words
    assert len(told) == 5


def test_code_that_is_shipped_brings_our_plugins_along(tmp_path):
    """In an interpreter that finds nothing but what was packed and the other packages."""
    code, about = map(Path, pack_code(tmp_path / "code"))
    assert code.parent == about.parent
    check = (
        "import importlib.metadata as m, torchspec;"
        "found = [e.name for g in ('platforms', 'plugins') for e in m.entry_points(group=f'sglang.srt.{g}')];"
        "print(torchspec.__file__, *found)"
    )
    environment = os.environ | {"PYTHONPATH": str(code.parent)}
    command = [sys.executable, "-c", check]
    out = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert out.split()[0] == str(code / "__init__.py")
    assert {"torchspec_capture", "torchspec_cpu", "torchspec_sgl_kernel"} == set(out.split()[1:])


def test_shipped_code_is_what_nodes_run(cluster):
    """A node that has no other, that is: what the driver's own path leads to comes first, where it exists."""
    shipped = ray.remote(lambda: [path for path in sys.path if "py_modules_files" in path and Path(path).is_dir()])
    place = Placement(cluster, ROLES).worker()
    paths = [Path(path) for path in ray.get(shipped.options(num_cpus=1, **place).remote())]
    ours = [path for path in paths if (path / "torchspec" / "driver" / "cluster.py").exists()]
    assert ours, paths


class OverRay:
    """A controller actor with the methods of a controller."""

    def __init__(self, actor, run_dir: Path):
        self.actor, self._folder = actor, RunFolder(run_dir)

    def __getattr__(self, name: str):
        return getattr(self.actor, name).remote


def test_two_runs_of_one_name_go_on_beside_each_other_and_share_nothing(cluster, tmp_path):
    """The same actors' names, the same prompts, in two folders: each trains its own samples, under keys of its own."""
    stores, clients, controllers = [], [], []
    for folder in ("a", "b"):
        run_dir = tmp_path / folder / "run"
        master = MooncakeMaster(run_dir / "logs" / "master.log")
        stores.append((StoreNode(master.endpoint, 64 << 20), master))
        clients.append(HiddenStateStore(master.endpoint, 8 << 20))
        options = {"name": "controller", "namespace": namespace(run_dir), "num_cpus": 0, "max_concurrency": 100}
        place = Placement(cluster, ROLES).beside_the_driver()
        spec = make_spec(master.endpoint, run_dir, name="run")
        controllers.append(ray.remote(Controller).options(**options, **place).remote(spec))
    for folder, controller in zip("ab", controllers, strict=True):
        assert ray.get_actor("controller", namespace(tmp_path / folder / "run")) == controller

    async def both() -> list[dict]:
        folders = (tmp_path / folder / "run" for folder in "ab")
        runs = zip(map(OverRay, controllers, folders), clients, strict=True)
        return await asyncio.gather(*(drive(controller, client, 2, 1) for controller, client in runs))

    seen = asyncio.run(both())
    refs = [[ref for step in steps.values() for ref in step] for steps in seen]
    assert {ref.sample for ref in refs[0]} == {ref.sample for ref in refs[1]}
    assert {ref.key for ref in refs[0]}.isdisjoint(ref.key for ref in refs[1])
    for folder, client, (node, master) in zip("ab", clients, stores, strict=True):
        verdict = verify_run(tmp_path / folder / "run")
        assert verdict.violations == () and sum(epoch.trained for epoch in verdict.epochs) == 20
        assert master.usage().objects == 0
        client.close()
        node.close()
        master.stop()
    for controller in controllers:
        ray.kill(controller)


def test_runs_of_the_same_name_in_other_folders_do_not_share_a_namespace(tmp_path):
    names = {namespace(tmp_path / "a" / "run"), namespace(tmp_path / "b" / "run")}
    assert len(names) == 2 and all(name.startswith("torchspec-run-") for name in names)
    assert namespace(tmp_path / "a" / "run") in names
