"""How much of Mooncake's own bandwidth our store passes on.

All clients live in this process, and the memory in another. All move the same three tensors of a sample: *raw* with one
``put_from`` or ``get_into`` for each, *batch* with one ``batch_put_from`` or ``batch_get_into``, *ours* through
HiddenStateStore (allocation, executor and release included). They take turns sample by sample, so that whatever else
the machine does hits all of them. The ratios are medians of the rounds' ratios.

    python benchmarks/store_bandwidth.py [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from torchspec.contracts import TensorSpec
from torchspec.store.client import StoreNode, connect, pinned
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.store.master import MooncakeMaster

SEGMENT_BYTES = 1 << 30
RESULTS = Path(__file__).parent / "results" / "store_bandwidth.json"
SAMPLES = {"0.8 MB": (174, 3, 576), "8 MB": (1740, 3, 576), "64 MB": (1960, 3, 4096)}
"""Name to (tokens, aux layers, hidden size), bf16."""


class Raw:
    """``put_from`` and ``get_into``, tensor by tensor."""

    def __init__(self, endpoint: StoreEndpoint, tensors: dict[str, TensorSpec]):
        self.client = connect(endpoint)
        self.config = pinned()
        self.buffers = {s: torch.empty(t.num_bytes, dtype=torch.uint8).random_(0, 256) for s, t in tensors.items()}
        for buffer in self.buffers.values():
            self.client.register_buffer(buffer.data_ptr(), buffer.nbytes)

    def put(self, key: str) -> None:
        for suffix, buffer in self.buffers.items():
            assert self.client.put_from(f"{key}_{suffix}", buffer.data_ptr(), buffer.nbytes, self.config) == 0

    def get(self, key: str) -> None:
        for suffix, buffer in self.buffers.items():
            assert self.client.get_into(f"{key}_{suffix}", buffer.data_ptr(), buffer.nbytes) == buffer.nbytes

    def arguments(self, key: str) -> tuple[list[str], list[int], list[int]]:
        buffers = self.buffers.values()
        return [f"{key}_{s}" for s in self.buffers], [b.data_ptr() for b in buffers], [b.nbytes for b in buffers]

    def remove(self, key: str) -> None:
        self.client.batch_remove(self.arguments(key)[0], True)

    def close(self) -> None:
        for buffer in self.buffers.values():
            self.client.unregister_buffer(buffer.data_ptr())
        self.client.close()


class Batch(Raw):
    """``batch_put_from`` and ``batch_get_into``, the three tensors in one call."""

    def put(self, key: str) -> None:
        assert not any(self.client.batch_put_from(*self.arguments(key), self.config))

    def get(self, key: str) -> None:
        names, pointers, sizes = self.arguments(key)
        assert self.client.batch_get_into(names, pointers, sizes) == sizes


class Ours:
    """The same through HiddenStateStore, as a capture and a trainer use it."""

    def __init__(self, endpoint: StoreEndpoint, tensors: dict[str, TensorSpec]):
        self.store = HiddenStateStore(endpoint, sum(spec.num_bytes for spec in tensors.values()) + 4096)
        self.tensors = tensors

    def put(self, key: str) -> None:
        self.store.put(key, self.store.allocate(self.tensors)).result()

    def get(self, key: str) -> None:
        self.store.release(self.store.get(key, self.tensors))

    def remove(self, key: str) -> None:
        self.store.remove(key, self.tensors)

    def close(self) -> None:
        self.store.close()


def one_round(clients: dict[str, Raw | Ours], number: int, repeats: int) -> dict[str, float]:
    """Mean seconds of a sample for each client and direction."""
    seconds: dict[str, float] = defaultdict(float)
    for what in ("put", "get"):
        for i in range(repeats):
            for who in random.sample(list(clients), len(clients)):
                call = getattr(clients[who], what)
                start = time.perf_counter()
                call(f"{who}{number}n{i}")
                seconds[f"{who}_{what}"] += (time.perf_counter() - start) / repeats
    for who, client in clients.items():
        for i in range(repeats):
            client.remove(f"{who}{number}n{i}")
    return seconds


def measure(endpoint: StoreEndpoint, shape: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Median GB/s of each client and the medians of the paired ratios, for puts and gets."""
    num_tokens, num_aux, hidden_size = shape
    tensors = SampleGeometry(num_aux, hidden_size, "bfloat16").tensors(num_tokens)
    size = sum(spec.num_bytes for spec in tensors.values())
    clients: dict[str, Raw | Ours] = {
        "raw": Raw(endpoint, tensors),
        "batch": Batch(endpoint, tensors),
        "ours": Ours(endpoint, tensors),
    }
    repeats = max(2, (64 << 20) // size)
    results = [one_round(clients, number, repeats) for number in range(rounds + 1)][1:]  # the first touches the memory
    for client in clients.values():
        client.close()
    row = {f"{name}_gb_per_s": size / statistics.median(r[name] for r in results) / 1e9 for name in results[0]}
    for who, what in product(("raw", "batch"), ("put", "get")):
        row[f"{what}_ours_to_{who}"] = statistics.median(r[f"{who}_{what}"] / r[f"ours_{what}"] for r in results)
    return {"bytes": size, **row}


def show(rows: dict[str, dict[str, float]]) -> None:
    table = Table(title="Store bandwidth, GB/s (median)")
    for column in ("sample", "", "raw", "batch", "ours", "ours/raw", "ours/batch"):
        table.add_column(column, justify="right")
    for (name, row), what in product(rows.items(), ("put", "get")):
        bandwidths = [f"{row[f'{who}_{what}_gb_per_s']:.2f}" for who in ("raw", "batch", "ours")]
        table.add_row(name, what, *bandwidths, *(f"{row[f'{what}_ours_to_{who}']:.0%}" for who in ("raw", "batch")))
    Console().print(table)


def hold_memory(endpoint: StoreEndpoint) -> None:
    """The store node's process: this file, started with ``--node``. Ends when its stdin closes."""
    node = StoreNode(endpoint, SEGMENT_BYTES)
    print("ready", flush=True)
    sys.stdin.read()
    node.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--node", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.node:
        hold_memory(StoreEndpoint.from_json(arguments.node))
        return
    with tempfile.TemporaryDirectory() as folder:
        master = MooncakeMaster(Path(folder) / "mooncake_master.log")
        command = [sys.executable, __file__, "--node", master.endpoint.to_json()]
        node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert node.stdout is not None
        node.stdout.readline()
        rows = {name: measure(master.endpoint, shape, arguments.rounds) for name, shape in SAMPLES.items()}
        node.communicate()
        master.stop()
    show(rows)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"cpus": os.cpu_count(), "rounds": arguments.rounds, "samples": rows}, indent=2))


if __name__ == "__main__":
    main()
