"""Records every collective that a process issues, in the forward and in the backward, by whatever module.

It listens where all of them pass, at the dispatcher's c10d operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Call(NamedTuple):
    """One collective, as this rank issued it."""

    op: str
    group: tuple[int, ...]
    """Its global ranks."""
    tensors: tuple[tuple[tuple[int, ...], str], ...]
    """Shape and dtype of each tensor."""


class Recorder(TorchDispatchMode):
    """``calls`` holds the collectives issued inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and (call := _call(func, args, kwargs or {})):
            self.calls.append(call)
        return func(*args, **(kwargs or {}))


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Call | None:
    """None for an operator that waits rather than talks."""
    leaves = tree_leaves((args, kwargs))
    tensors = tuple((tuple(x.shape), str(x.dtype)) for x in leaves if isinstance(x, Tensor))
    if func.namespace == "c10d":
        boxes = [x for x in leaves if isinstance(x, torch.ScriptObject) and "ProcessGroup" in x._type().name()]
        group = dist.ProcessGroup.unbox(boxes[0])
    elif "group_name" in (names := [argument.name for argument in func._schema.arguments]):
        group = dist.distributed_c10d._resolve_process_group(
            {**dict(zip(names, args, strict=False)), **kwargs}["group_name"]
        )
    else:
        return None
    return Call(func.overloadpacket.__name__, tuple(dist.get_process_group_ranks(group)), tensors)


def first_difference(calls: dict[int, list[Call]]) -> str | None:
    """Where the calls of some ranks (by global rank) do not fit together; None where they do.

    Members of a group must issue the same calls in it, in the same order; and all ranks the same operators on groups
    of the same size overall, or two groups could wait for each other.
    """
    groups = sorted({call.group for own in calls.values() for call in own})
    for group in groups:
        within = {rank: [c for c in own if c.group == group] for rank, own in calls.items() if rank in group}
        if difference := _difference(within, f"in the group {group}"):
            return difference
    outline = {rank: [Call(c.op, (len(c.group),), ()) for c in own] for rank, own in calls.items()}
    return _difference(outline, "in the order of groups")


def _difference(calls: dict[int, list[Call]], where: str) -> str | None:
    (first, expected), *others = calls.items()
    for rank, own in others:
        for number in range(max(len(own), len(expected))):
            pair = [x[number] if number < len(x) else None for x in (expected, own)]
            if pair[0] != pair[1]:
                return f"call {number} {where}: rank {first} issues {pair[0]}, rank {rank} {pair[1]}"
    return None
