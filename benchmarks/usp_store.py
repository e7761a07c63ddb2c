"""The store's part of benchmarks/usp.py: what a rank reads of a sample, from a real Mooncake store."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from torchspec.contracts import SampleId, SampleRef
from torchspec.data.masks import pack_mask
from torchspec.shards import ShardFormula
from torchspec.store.client import StoreNode
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.store.master import MooncakeMaster
from torchspec.training.fetch import SampleFetcher


def hold_memory(endpoint: StoreEndpoint, segment_bytes: int, pipe: Connection) -> None:
    """The store node's process."""
    node = StoreNode(endpoint, segment_bytes)
    pipe.send("ready")
    pipe.recv()
    node.close()


@contextmanager
def running_store(segment_bytes: int) -> Iterator[StoreEndpoint]:
    with tempfile.TemporaryDirectory() as folder:
        master = MooncakeMaster(Path(folder) / "mooncake_master.log")
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        node = context.Process(target=hold_memory, args=(master.endpoint, segment_bytes, theirs), daemon=True)
        node.start()
        theirs.close()
        ours.recv()
        try:
            yield master.endpoint
        finally:
            ours.send("end")
            node.join(30)
            master.stop()


def stored_rows(num_tokens: int, degrees: Sequence[int], ttt_length: int) -> list[dict]:
    """Bytes and time of a rank's read, for whole samples and for shards, with the states of a SmolLM2-135M."""
    geometry = SampleGeometry(3, 576, "bfloat16")
    whole_bytes = geometry.stored_bytes(num_tokens)
    rows: list[dict] = []
    with running_store((64 << 20) + 4 * whole_bytes) as endpoint:
        store = HiddenStateStore(endpoint, 2 * whole_bytes)
        for degree in (1, *degrees):
            for layout in ("contiguous", "zigzag") if degree > 1 else ("whole",):
                sharding = ShardFormula(1, degree, layout, ttt_length) if degree > 1 else None
                sharded = replace(geometry, sharding=sharding)
                ref = store_sample(store, sharded, f"{layout}{degree}", num_tokens)
                read, seconds = zip(*(fetch(store, sharded, rank, ref) for rank in range(degree)), strict=True)
                store.remove(ref.key, sharded.suffixes)
                share = max(read) / (rows[0]["bytes"] if rows else max(read))
                row = {"degree": degree, "layout": layout, "bytes": max(read), "share": share, "seconds": max(seconds)}
                rows.append(row)
        store.close()
    return rows


def store_sample(store: HiddenStateStore, geometry: SampleGeometry, key: str, tokens: int) -> SampleRef:
    tensors = geometry.tensors(tokens)
    buffer = store.allocate(tensors)
    for view in buffer.views.values():
        view.zero_()
    sharding = geometry.sharding
    put = store.put(key, buffer, sharding)
    packed = pack_mask([True] * tokens)
    return SampleRef(SampleId(0, 0), key, tokens, packed, tensors, put.result(), "post_norm", sharding)


def fetch(store: HiddenStateStore, geometry: SampleGeometry, rank: int, ref: SampleRef) -> tuple[int, float]:
    """Bytes of one read, and seconds of the fastest of three."""
    seconds = []
    for _ in range(3):
        fetcher = SampleFetcher(store, geometry, rank, pin_memory=False)
        started = time.perf_counter()
        _, missing = fetcher.fetch(((ref,),), {})
        seconds.append(time.perf_counter() - started)
        assert not missing
    return fetcher.bytes_read, min(seconds)
