"""A group of real rank processes that meets once and then runs one function after the other.

Processes come from a fork server that has imported everything already, so a group of eight starts in a second or two.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from torchspec.network import free_port
from torchspec.parallel.mesh import join_ranks

HOST = "127.0.0.1"
PATIENCE = 120.0
"""Seconds after which a call counts as hung."""


class Ranks:
    """Handle on the processes. ``call(f, *args)`` runs ``f(rank, *args)`` in all; ``f`` is a module's function."""

    def __init__(self, pipes: list[Connection]):
        self._pipes = pipes

    @property
    def size(self) -> int:
        return len(self._pipes)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results, by rank.

        Raises:
            RuntimeError: a rank raised or did not come back; the group is of no use afterwards.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        outcomes = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(PATIENCE):
                raise RuntimeError(f"rank {rank} hangs")
            error, result = pipe.recv()
            if error:
                raise RuntimeError(f"rank {rank}:\n{error}")
            outcomes.append(result)
        return outcomes

    def dismiss(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)


@contextmanager
def running_ranks(size: int) -> Iterator[Ranks]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.parallel.steps"])
    port = free_port(HOST)
    pairs = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_serve, args=(rank, size, port, pairs[rank][1]), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    ranks = Ranks([ours for ours, _ in pairs])
    try:
        yield ranks
    finally:
        ranks.dismiss()
        for process in processes:
            process.join(5)
            process.kill()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    join_ranks(rank, size, HOST, port, torch.device("cpu"), stuck_seconds=600.0)
    dist.barrier()
    while (request := pipe.recv()) is not None:
        function, args = request
        try:
            pipe.send(("", function(rank, *args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
