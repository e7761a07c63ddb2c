"""Whether every node of a cluster can run what it will be asked to: looked at there, before anything starts.

It needs no more than Ray, so that a node on which torch is missing can say so.
"""

from __future__ import annotations

import platform
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from torchspec.inference.sglang_patch import FileEdit, PatchError, check_patched, our_edits

if TYPE_CHECKING:
    from torchspec.driver.cluster import Node

ANSWER_SECONDS = 180.0
"""Until a node has set up our code and answered."""

PACKAGES = {
    "torchspec": ("torchspec",),
    "ray": ("ray",),
    "torch": ("torch",),
    "sglang": ("sglang",),
    "mooncake": ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda"),
    "transformers": ("transformers",),
}
"""What must be the same everywhere, and the names under which it is installed."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node says about itself."""

    python: str
    versions: dict[str, str]
    """Of :data:`PACKAGES`; ``missing`` where one is not there."""
    sglang_patch: str
    """What is wrong with it, if anything."""
    sees_run: bool
    """Whether it sees a file that the driver has just written into the run's folder."""
    sees_target: bool


def check_nodes(nodes: Sequence[Node], run_dir: Path, target: Path) -> None:
    """Raises ValueError: a line for each thing in which a node falls short of this process, with the node's address."""
    token = run_dir / f".seen-{secrets.token_hex(8)}"
    token.touch()
    try:
        here = look(token, target, our_edits())
        asked = [(node, _ask(node, token, target)) for node in nodes]
        wrong = [f"node {node.address}: {line}" for node, ref in asked for line in _judge(ref, here, token, target)]
    finally:
        token.unlink()
    if wrong:
        raise ValueError("\n".join(wrong))


def look(token: Path, target: Path, edits: list[FileEdit]) -> NodeFacts:
    """Runs on the node, which need not have the repository, and so is told SGLang's ``edits``."""
    return NodeFacts(
        python=".".join(platform.python_version_tuple()[:2]),
        versions={name: _version(distributions) for name, distributions in PACKAGES.items()},
        sglang_patch=_sglang_patch(edits),
        sees_run=token.exists(),
        sees_target=(target / "config.json").is_file(),
    )


def differences(there: NodeFacts, here: NodeFacts, run_dir: Path, target: Path) -> Iterator[str]:
    """What keeps a node from working with this process, and what to do about it."""
    if there.python != here.python:
        yield f"Python is {there.python}, here it is {here.python}"
    for name, version_here in here.versions.items():
        if there.versions[name] != version_here:
            yield f"{name} is {there.versions[name]}, here it is {version_here}: install the same there"
    if there.sglang_patch:
        yield there.sglang_patch
    if not there.sees_run:
        yield f"it does not see the run's folder {run_dir}: put run.dir on a file system that all nodes mount"
    if not there.sees_target:
        yield f"it does not see target.path {target}: put it on a file system that all nodes mount, or copy it there"


def _ask(node: Node, token: Path, target: Path) -> ray.ObjectRef:
    place = NodeAffinitySchedulingStrategy(node.id, soft=False)
    there = ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=place)
    return there.remote(token, target, our_edits())


def _judge(answer: ray.ObjectRef, here: NodeFacts, token: Path, target: Path) -> list[str]:
    try:
        there = ray.get(answer, timeout=ANSWER_SECONDS)
    except ray.exceptions.GetTimeoutError:
        return [f"it did not answer in {ANSWER_SECONDS:.0f} s"]
    except ray.exceptions.RayError as error:
        return [f"it cannot run our code: {' '.join(str(error).split())[-300:]}"]
    return list(differences(there, here, token.parent, target))


def _version(distributions: Sequence[str]) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "missing"


def _sglang_patch(edits: list[FileEdit]) -> str:
    try:
        check_patched(edits)
    except PatchError as error:
        return str(error)
    return ""
