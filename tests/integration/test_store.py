"""The hidden-state store on a real Mooncake master, its memory in another process."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from tests.integration.store_harness import SAMPLES_PER_PRODUCER, Peer, RunningStore, pattern, running_store, tokens_of
from torchspec.contracts import TensorSpec
from torchspec.store.client import ReplicateConfig
from torchspec.store.errors import MissingObject, SizeMismatch, StoreFull
from torchspec.store.geometry import USABLE_SHARE, SampleGeometry, object_bytes, stored_bytes
from torchspec.store.hidden_state_store import HiddenStateStore

SEGMENT = 32 << 20
MIB = 1 << 20


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStore]:
    with running_store(tmp_path_factory.mktemp("store"), SEGMENT) as running:
        yield running


@pytest.fixture(scope="module")
def client(running: RunningStore) -> Iterator[HiddenStateStore]:
    client = HiddenStateStore(running.endpoint, 24 * MIB, "training.buffer_bytes")
    yield client
    client.close()


@pytest.fixture
def store(client: HiddenStateStore) -> Iterator[HiddenStateStore]:
    """A client on an empty store; checks that the test gave back all of its buffer."""
    yield client
    client._client.remove_all(True)
    assert client._pool._holes == [(0, client._pool.capacity)]


def raw(size: int) -> dict[str, TensorSpec]:
    """One tensor of ``size`` bytes."""
    assert size % 4 == 0
    return {"x": TensorSpec((size // 4,), "int32")}


def put(store: HiddenStateStore, key: str, tensors: dict[str, TensorSpec]) -> int:
    return store.put(key, store.allocate(tensors, timeout=5)).result(timeout=30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32"])
def test_bits_survive_the_round_trip(store: HiddenStateStore, dtype: str) -> None:
    tensors = {"a": TensorSpec((33, 7), dtype), "b": TensorSpec((5,), dtype)}
    buffer = store.allocate(tensors)
    sent = {}
    for suffix, view in buffer.views.items():
        view.view(torch.uint8).random_(0, 256)
        sent[suffix] = view.clone()
    assert store.put("k", buffer).result() == sum(view.nbytes for view in sent.values())

    received = store.get("k", tensors)
    for suffix, view in received.views.items():
        assert view.dtype == getattr(torch, dtype)
        assert tuple(view.shape) == tensors[suffix].shape
        assert torch.equal(view.view(torch.uint8), sent[suffix].view(torch.uint8))
    store.release(received)


def test_several_processes_put_while_threads_get(running: RunningStore, store: HiddenStateStore) -> None:
    producers = [Peer("produce", running.endpoint.to_json(), str(p)) for p in range(2)]
    assert [producer.line() for producer in producers] == ["ready"] * 2
    wrong: list[str] = []

    def read(producer: int) -> None:
        for number in range(SAMPLES_PER_PRODUCER):
            key, tokens = f"p{producer}n{number}", tokens_of(producer, number)
            buffer = store.get(key, SampleGeometry(3, 64, "bfloat16").tensors(tokens), timeout=30)
            for suffix, tensor in pattern(key, tokens).items():
                if not torch.equal(buffer.views[suffix].view(torch.uint8), tensor.view(torch.uint8)):
                    wrong.append(f"{key}_{suffix}")
            store.release(buffer)

    readers = [threading.Thread(target=read, args=(p,)) for p in (0, 1, 0, 1)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [producer.close() for producer in producers] == [0, 0]
    assert wrong == []
    assert running.master.usage().objects == 2 * SAMPLES_PER_PRODUCER * 3


def test_a_missing_object_is_named(store: HiddenStateStore) -> None:
    with pytest.raises(MissingObject, match="e0p7_x"):
        store.get("e0p7", raw(64))
    put(store, "e0p8", {"hs": TensorSpec((4,), "int32")})
    with pytest.raises(MissingObject, match="e0p8_ids"):
        store.get("e0p8", {"hs": TensorSpec((4,), "int32"), "ids": TensorSpec((4,), "int32")})


@pytest.mark.parametrize("expected", [60, 68])
def test_a_wrong_size_is_refused(store: HiddenStateStore, expected: int) -> None:
    put(store, "k", raw(64))
    with pytest.raises(SizeMismatch, match="k_x"):
        store.get("k", raw(expected))


def test_remove_ignores_leases_and_absence(running: RunningStore, store: HiddenStateStore) -> None:
    tensors = SampleGeometry(3, 64, "bfloat16").tensors(10)
    put(store, "k", tensors)
    store.release(store.get("k", tensors))
    assert store._client.remove("k_hs") == -706, "the reader's lease should be fresh"
    assert store.exists("k", tensors)
    store.remove("k", tensors)
    store.remove("k", tensors)
    assert not store.exists("k", tensors)
    assert running.master.usage().allocated_bytes == 0


def test_a_full_store_refuses_and_evicts_nothing(running: RunningStore, store: HiddenStateStore) -> None:
    tensors = raw(MIB)
    for i in range(SEGMENT // MIB):
        put(store, f"k{i}", tensors)
    evicted = running.master.usage().evicted_objects
    for _ in range(3):
        with pytest.raises(StoreFull, match=r"late_x.*store\.segment_bytes"):
            put(store, "late", tensors)
    assert all(store.exists(f"k{i}", tensors) for i in range(SEGMENT // MIB))
    assert running.master.usage().evicted_objects == evicted
    store.remove("k3", tensors)
    put(store, "late", tensors)


def test_unpinned_objects_would_be_evicted(
    running: RunningStore, store: HiddenStateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: without the pin, the same master does evict."""
    monkeypatch.setattr(store, "_replication", ReplicateConfig())
    before = running.master.usage().evicted_objects
    for i in range(SEGMENT // MIB):
        put(store, f"k{i}", raw(MIB))
    for i in range(200):  # the master evicts in the background
        try:
            put(store, f"late{i}", raw(MIB))
        except StoreFull:
            time.sleep(0.02)
    assert running.master.usage().evicted_objects > before


def test_half_a_sample_is_not_kept(running: RunningStore, store: HiddenStateStore) -> None:
    put(store, "filler", raw(16 * MIB))
    tensors = {"small": TensorSpec((256,), "int32"), "large": TensorSpec((20 * MIB // 4,), "int32"), **raw(1024)}
    with pytest.raises(StoreFull, match="half_large"):
        put(store, "half", tensors)
    assert running.master.usage().objects == 1


@pytest.mark.parametrize("size", [4, 5000, 333_332, 1_000_004, 5 * MIB, 5 * MIB + 4, 8 * MIB + 4])
def test_stored_bytes_is_what_the_allocator_takes(running: RunningStore, store: HiddenStateStore, size: int) -> None:
    """As many objects fit as the formula says; the smallest sizes are bounded, not exact."""
    limit = 2000
    buffer = store.allocate(raw(size))
    (view,) = buffer.views.values()
    stored = 0
    while (
        stored < limit and store._client.put_from(f"k{stored}", view.data_ptr(), view.nbytes, store._replication) == 0
    ):
        stored += 1
    fits = SEGMENT // object_bytes(size)
    assert stored == min(fits, limit) if object_bytes(size) > 4096 else stored >= min(fits, limit)
    assert running.master.usage().allocated_bytes == stored * size <= stored * stored_bytes(raw(size))
    store.release(buffer)


def test_the_usable_share_of_the_segment_never_refuses_a_sample(store: HiddenStateStore) -> None:
    """Whatever the lengths, as long as credits are counted in stored_bytes and freed nearly in order."""
    rng = random.Random(3)
    held: deque[tuple[str, dict[str, TensorSpec]]] = deque()
    credits = 0
    for number in range(600):
        tensors = SampleGeometry(3, 128, "bfloat16").tensors(rng.randint(20, 650))
        while credits + stored_bytes(tensors) > USABLE_SHARE * SEGMENT:
            held.rotate(-rng.randint(0, 3))  # steps free nearly, not quite, in order
            key, oldest = held.popleft()
            store.remove(key, oldest)
            credits -= stored_bytes(oldest)
        put(store, f"k{number}", tensors)
        held.append((f"k{number}", tensors))
        credits += stored_bytes(tensors)
    assert len(held) > 10


def test_a_sample_larger_than_the_buffer_names_the_knob_of_who_asks(store: HiddenStateStore) -> None:
    with pytest.raises(ValueError, match=r"raise training\.buffer_bytes$"):
        store.allocate(raw(25 * MIB))
    with pytest.raises(ValueError, match="float64"):
        store.allocate({"x": TensorSpec((4,), "float64")})
    buffer = store.allocate(raw(20 * MIB))
    with pytest.raises(TimeoutError, match=r"raise training\.buffer_bytes$"):
        store.allocate(raw(20 * MIB), timeout=0.05)
    store.release(buffer)


def test_close_finishes_the_puts(running: RunningStore, store: HiddenStateStore) -> None:
    leaving = HiddenStateStore(running.endpoint, 8 * MIB)
    puts = [leaving.put(f"k{i}", leaving.allocate(raw(MIB))) for i in range(8)]
    leaving.close()
    assert all(put.done() and put.result() == MIB for put in puts)
    assert all(store.exists(f"k{i}", raw(4)) for i in range(8))


def test_listens_on_loopback_only_and_leaves_shared_memory_alone(running: RunningStore, tmp_path: Path) -> None:
    node = psutil.Process(running.node.process.pid)
    addresses = [c.laddr.ip for c in running.master_process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert addresses == ["127.0.0.1", "127.0.0.1"]
    # A client's sockets name all interfaces, but are bound to the loopback device: /proc tells only through `ss`,
    # so look at our own.
    store = HiddenStateStore(running.endpoint, MIB)
    assert _devices_of_wildcard_listeners() == {b"lo"}
    store.close()
    for process in (running.master_process(), node):
        assert not [m.path for m in process.memory_maps() if m.path.startswith("/dev/shm/")]


def _devices_of_wildcard_listeners() -> set[bytes]:
    devices = set()
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip in ("0.0.0.0", "::"):
            with socket.socket(fileno=socket.dup(connection.fd)) as duplicate:
                name = duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
                devices.add(name.rstrip(b"\0"))
    return devices
