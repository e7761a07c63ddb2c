"""Samples in and out of the Mooncake store, without a copy on our side.

    capture -> allocate -> views (registered host memory) -> put --batch_put_from_multi_buffers--> store node
    trainer <- views (registered host memory)             <- get <--batch_get_into-- store node

A sample is a few objects ``{key}_{suffix}``; one call moves them all. Each process registers *one* buffer and hands
out slots of it. Objects are hard-pinned, so the master never evicts them: a full store makes a put fail. Mooncake
releases the GIL in every call made here except connecting and closing, so puts on the executor's threads do not hold
up the caller.

Keys must be unique for each attempt: Mooncake answers a put on an existing key with success and keeps the old bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import torch

from torchspec.contracts import TensorSpec
from torchspec.shards import ShardFormula
from torchspec.store.client import StoreClient, object_names, pinned
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import SizeMismatch, error_for
from torchspec.store.geometry import shard_pieces
from torchspec.store.slot_pool import SlotPool, align

_PUT_THREADS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A slot of registered memory. The views die with :meth:`HiddenStateStore.release` or with the end of a put."""

    views: dict[str, torch.Tensor]
    """Suffix to a CPU tensor in the slot."""
    offset: int

    def head(self, rows: int) -> Slot:
        """The same slot, of which only the first ``rows`` of each tensor are meant."""
        return Slot({suffix: view[:rows] for suffix, view in self.views.items()}, self.offset)


class HiddenStateStore(StoreClient):
    """A client that puts and gets samples. Thread-safe.

    Args:
        buffer_bytes: Size of the registered host buffer; bounds what is in flight between this process and the store.
        knob: What a user calls that size, for messages.
    """

    def __init__(self, endpoint: StoreEndpoint, buffer_bytes: int, knob: str = "buffer_bytes"):
        super().__init__(endpoint)
        self._knob = knob
        self._buffer = torch.empty(buffer_bytes, dtype=torch.uint8)  # pages are touched when used
        self._pool = SlotPool(buffer_bytes)
        code = self._client.register_buffer(self._buffer.data_ptr(), buffer_bytes)
        if code != 0:
            raise error_for(code, "registration", f"a host buffer of {buffer_bytes} bytes")
        self._replication = pinned()
        self._executor = ThreadPoolExecutor(_PUT_THREADS, thread_name_prefix="store-put")

    def allocate(self, tensors: Mapping[str, TensorSpec], timeout: float | None = None) -> Slot:
        """A slot with a view for each tensor, contents undefined. Waits for room.

        Raises:
            ValueError: it can never fit, or a dtype is not one that the store carries.
            TimeoutError: no room within ``timeout`` seconds.
        """
        *starts, end = accumulate((align(spec.num_bytes) for spec in tensors.values()), initial=0)
        if end > self._pool.capacity:
            raise ValueError(
                f"a sample of {end} bytes never fits into a host buffer of {self._pool.capacity}: raise {self._knob}"
            )
        try:
            offset = self._pool.allocate(end, timeout)
        except TimeoutError as error:
            raise TimeoutError(
                f"no room for {end} bytes in a host buffer of {self._pool.capacity} within {timeout} s: raise "
                f"{self._knob}"
            ) from error
        views = {
            suffix: self._buffer[offset + start : offset + start + spec.num_bytes]
            .view(getattr(torch, spec.dtype))
            .view(spec.shape)
            for (suffix, spec), start in zip(tensors.items(), starts, strict=True)
        }
        return Slot(views, offset)

    def release(self, buffer: Slot) -> None:
        """Give the slot back; its views must not be used any more."""
        self._pool.release(buffer.offset)

    def put(self, key: str, buffer: Slot, sharding: ShardFormula | None = None) -> Future[int]:
        """Store a sample in the background, all of its objects or none, and release the buffer.

        Args:
            sharding: how to split it among ranks. The store reads the segments where they are: no rank's shard is put
                together in memory first.

        Returns:
            Future of the bytes stored. It raises StoreFull or StoreUnavailable.
        """
        pieces: Mapping[str, Sequence[torch.Tensor]] = {suffix: (view,) for suffix, view in buffer.views.items()}
        if sharding is not None:
            pieces = shard_pieces(buffer.views, sharding)
        return self._executor.submit(self._put, key, buffer, pieces)

    def get(self, key: str, tensors: Mapping[str, TensorSpec], timeout: float | None = None) -> Slot:
        """Read ``{key}_{suffix}`` into a new buffer, which the caller releases. ``timeout``: as in :meth:`allocate`.

        Raises:
            MissingObject: one of the tensors is not there.
            SizeMismatch: one of them is larger or smaller than its spec says.
            StoreUnavailable: the master or the store node does not answer.
        """
        buffer = self.allocate(tensors, timeout)
        try:
            names, sizes = object_names(key, tensors), [view.nbytes for view in buffer.views.values()]
            pointers = [view.data_ptr() for view in buffer.views.values()]
            results = self._client.batch_get_into(names, pointers, sizes)
            for name, size, result in zip(names, sizes, results, strict=True):
                if result < 0:
                    raise error_for(result, "get", name)
                if result != size:
                    raise SizeMismatch(f"get of {name}: {result} bytes are stored, its shape says {size}")
        except BaseException:
            self.release(buffer)
            raise
        return buffer

    def close(self) -> None:
        """Finish the puts under way and disconnect. Views of this store's buffers must not be used any more."""
        self._executor.shutdown()
        self._client.unregister_buffer(self._buffer.data_ptr())
        super().close()

    def _put(self, key: str, buffer: Slot, pieces: Mapping[str, Sequence[torch.Tensor]]) -> int:
        try:
            names, sizes = object_names(key, pieces), [[part.nbytes for part in parts] for parts in pieces.values()]
            pointers = [[part.data_ptr() for part in parts] for parts in pieces.values()]
            codes = self._client.batch_put_from_multi_buffers(names, pointers, sizes, self._replication)
            for name, code in zip(names, codes, strict=True):
                if code < 0:
                    # Half a sample is of no use. Should this fail too, the first error is the one to tell.
                    self._client.batch_remove(names, True)
                    raise error_for(code, "put", name)
            return sum(map(sum, sizes))
        finally:
            self.release(buffer)
