"""The background half of the capture plugin: check a finished request's states, put them, tell the parent process.

Nothing here runs on the scheduler's thread but the hand-over, so neither the store nor the parent can slow the engine's
compute down.

Shapes: S tokens, F aux layers, H hidden size.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from torchspec.contracts import TensorSpec
from torchspec.inference.capture_protocol import CaptureConfig, Captured, encode_captured
from torchspec.store.errors import StoreFull
from torchspec.store.hidden_state_store import HiddenStateStore, SampleBuffer
from torchspec.store.usp import put_usp_shards


class CaptureWriter:
    """Owns the store client and the socket of one scheduler process."""

    def __init__(self, config: CaptureConfig):
        self.store = HiddenStateStore(config.endpoint, config.buffer_bytes)
        self._sharding = config.sharding
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(config.socket)
        self._speaking = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="capture-writer")

    def write(self, key: str, buffer: SampleBuffer, token_ids: list[int]) -> None:
        """Store the first ``len(token_ids)`` rows of a buffer in the background. It is the writer's from here on."""
        self._thread.submit(self._write, key, buffer.head(len(token_ids)), token_ids)

    def fail(self, key: str, reason: str, no_room: bool = False) -> None:
        """Report that there will be no sample under ``key``; ``no_room`` if only the store's memory is to blame."""
        self.say({"type": "failed", "key": key, "reason": reason, "no_room": no_room})

    def say(self, message: dict[str, object]) -> None:
        """Send one message to the parent process."""
        with self._speaking:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _write(self, key: str, buffer: SampleBuffer, token_ids: list[int]) -> None:
        views = buffer.views
        reason = find_fault(views["hs"], views["lhs"])
        if reason is not None:
            self.store.release(buffer)
            self.fail(key, reason)
            return
        views["ids"].copy_(torch.tensor(token_ids, dtype=torch.int32))
        specs = {
            suffix: TensorSpec(tuple(view.shape), str(view.dtype).removeprefix("torch."))
            for suffix, view in views.items()
        }
        started = time.perf_counter()
        if self._sharding is None:
            put = self.store.put(key, buffer)
        else:
            put = put_usp_shards(self.store, key, buffer, self._sharding)
        put.add_done_callback(lambda put: self._report(key, specs, started, put))

    def _report(self, key: str, specs: dict[str, TensorSpec], started: float, put: Future[int]) -> None:
        error = put.exception()
        if error is not None:
            self.fail(key, str(error), no_room=isinstance(error, StoreFull))
        else:
            seconds = time.perf_counter() - started
            self.say(encode_captured(key, Captured(specs, put.result(), seconds, self._sharding)))


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
