"""Mistakes, written into the product's own source, that the checks of this folder must notice."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torchspec.models import attention, ttt_rows
from torchspec.parallel import ring, shards, ulysses, usp

MUTATIONS: dict[str, tuple[Any, str, str, str]] = {
    "zeros": (attention.TTTAttention, "forward", "return o_RQE.to(q_RQE.dtype)", "return q_RQE * 0"),
    "no halo": (shards.ShardFormula, "_segment", "stop + self.ttt_length", "stop"),
}  # fmt: skip


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Run with one of :data:`MUTATIONS`."""
    if name is None:
        yield
        return
    owner, function, old, new = MUTATIONS[name]
    original = inspect.getattr_static(owner, function)
    setattr(owner, function, rewritten(owner, function, old, new))
    try:
        yield
    finally:
        setattr(owner, function, original)


def rewritten(owner: Any, function: str, old: str, new: str) -> Callable:
    """A function or method of ``owner`` with one expression of its source replaced."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, function)))
    assert source.count(old) == 1, f"{old!r} is not there once"
    namespace = dict(vars(inspect.getmodule(owner)))
    exec("from __future__ import annotations\n" + source.replace(old, new), namespace)
    return namespace[function]
