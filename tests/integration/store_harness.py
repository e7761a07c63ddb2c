"""A real store for tests, with its memory and its other users in processes of their own.

Run as a script, this file is one of those processes; it says ``ready`` once it is, and ends when its stdin closes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from torchspec.contracts import TensorSpec
from torchspec.store.client import StoreNode
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.store.master import MooncakeMaster

SAMPLES_PER_PRODUCER = 12


class Peer:
    """This file, run with ``arguments`` in a process of its own."""

    def __init__(self, *arguments: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> int:
        """Its exit status, after an orderly end."""
        self.process.communicate()
        return self.process.returncode


@dataclass
class RunningStore:
    master: MooncakeMaster
    node: Peer

    @property
    def endpoint(self) -> StoreEndpoint:
        return self.master.endpoint

    def master_process(self) -> psutil.Process:
        """The mooncake_master itself, not its guard."""
        (child,) = psutil.Process(self.master._process.pid).children()
        return child

    def start_node(self, segment_bytes: int) -> None:
        self.node = Peer("node", self.endpoint.to_json(), str(segment_bytes))
        assert self.node.line() == "ready"


@contextmanager
def running_store(folder: Path, segment_bytes: int) -> Iterator[RunningStore]:
    """A master and one store node; checks that nothing of them stays."""
    master = MooncakeMaster(folder / "mooncake_master.log")
    store = RunningStore(master, None)  # type: ignore[arg-type]
    try:
        store.start_node(segment_bytes)
        started = [store.master_process(), psutil.Process(master._process.pid), psutil.Process(store.node.process.pid)]
        yield store
    finally:
        if store.node is not None and master.alive():
            store.node.close()
        elif store.node is not None:  # an orderly end would wait for the master
            store.node.kill()
        master.stop()
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive


def pattern(key: str, num_tokens: int) -> dict[str, torch.Tensor]:
    """A sample of random bits (NaNs and infinities included) that depends on all of ``key``."""
    generator = torch.Generator().manual_seed(int.from_bytes(key.encode(), "little") % (1 << 62))

    def bits(spec: TensorSpec) -> torch.Tensor:
        dtype = getattr(torch, spec.dtype)
        data = torch.randint(0, 256, (*spec.shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        return data.view(dtype).squeeze(-1)

    return {suffix: bits(spec) for suffix, spec in SampleGeometry(3, 64, "bfloat16").tensors(num_tokens).items()}


def tokens_of(producer: int, number: int) -> int:
    return 17 + 31 * number + 7 * producer


def _produce(endpoint: StoreEndpoint, producer: int) -> None:
    store = HiddenStateStore(endpoint, 1 << 20)  # smaller than what is put: slots are reused while puts run
    puts = []
    for number in range(SAMPLES_PER_PRODUCER):
        key = f"p{producer}n{number}"
        sample = pattern(key, tokens_of(producer, number))
        buffer = store.allocate(
            {s: TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for s, t in sample.items()}, timeout=60
        )
        for suffix, tensor in sample.items():
            buffer.views[suffix].copy_(tensor)
        puts.append(store.put(key, buffer))
    for put in puts:
        put.result(timeout=60)
    store.close()


def main() -> None:
    role, *arguments = sys.argv[1:]
    if role == "node":
        node = StoreNode(StoreEndpoint.from_json(arguments[0]), int(arguments[1]))
        assert node.ping()
        print("ready", flush=True)
        sys.stdin.read()
        node.close()
    elif role == "produce":
        _produce(StoreEndpoint.from_json(arguments[0]), int(arguments[1]))
        print("ready", flush=True)
    elif role == "master":
        master = MooncakeMaster(Path(arguments[0]))
        print(master.endpoint.to_json(), flush=True)
        sys.stdin.read()
        master.stop()


if __name__ == "__main__":
    main()
