"""The background half of the capture plugin: check a finished request's states and put them.

Nothing here runs on the scheduler's thread but the hand-over, so the store cannot slow the engine's compute down.

Shapes: S tokens, F aux layers, H hidden size.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from torchspec.contracts import FailureKind, TensorSpec
from torchspec.inference.capture.protocol import Captured, Message, encode_captured, encode_failed
from torchspec.shards import ShardFormula
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.errors import StoreError, StoreFull, StoreUnavailable
from torchspec.store.hidden_state_store import HiddenStateStore, Slot

_THREADS = 2
"""One checks a sample while the other waits for a put."""
_KINDS: dict[type[StoreError], FailureKind] = {StoreFull: "no_room", StoreUnavailable: "no_store"}
"""Failures of a put that are not held against the sample."""


class CaptureWriter:
    """Owns the store client of one scheduler process."""

    buffer_knob = "inference.buffer_bytes"

    def __init__(self, endpoint: StoreEndpoint, buffer_bytes: int):
        self.store = HiddenStateStore(endpoint, buffer_bytes, self.buffer_knob)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="capture-writer")

    def write(self, key: str, buffer: Slot, token_ids: list[int], sharding: ShardFormula | None) -> Future[Message]:
        """Store the first ``len(token_ids)`` rows of a buffer in the background, whole or in shards.

        The buffer is the writer's from here on. Returns the future of the message that says what came of it.
        """
        return self._threads.submit(self._write, key, buffer.head(len(token_ids)), token_ids, sharding)

    def _write(self, key: str, buffer: Slot, token_ids: list[int], sharding: ShardFormula | None) -> Message:
        views = buffer.views
        fault = find_fault(views["hs"], views["lhs"])
        if fault is not None:
            self.store.release(buffer)
            return encode_failed(key, fault)
        views["ids"].copy_(torch.tensor(token_ids, dtype=torch.int32))
        specs = {
            suffix: TensorSpec(tuple(view.shape), str(view.dtype).removeprefix("torch."))
            for suffix, view in views.items()
        }
        started = time.perf_counter()
        try:
            num_bytes = self.store.put(key, buffer, sharding).result()
        except StoreError as error:
            return encode_failed(key, str(error), _KINDS.get(type(error), "retry"))
        return encode_captured(key, Captured(specs, num_bytes, time.perf_counter() - started, sharding))


def find_fault(hs: Tensor, lhs: Tensor) -> str | None:
    """Why the states ``hs`` [S, F*H] and ``lhs`` [S, H] cannot be trained on, or ``None`` if they can.

    Every token must have finite, non-zero states in every layer: hybrid models and broken kernels give zeros where
    nobody looks.
    """
    size, hidden = lhs.shape
    for name, states_SFH in (("aux", hs.view(size, -1, hidden)), ("last", lhs.view(size, 1, hidden))):
        peak_SF = torch.linalg.vector_norm(states_SFH, ord=torch.inf, dim=-1)
        for fault, bad_SF in (("not finite", ~peak_SF.isfinite()), ("all zero", peak_SF == 0)):
            if bad_SF.any():
                token, layer = bad_SF.nonzero()[0].tolist()
                return f"{name} state {layer} of token {token} is {fault}"
    return None
