"""SGLang plugin that carries the hidden states of a request from the scheduler process to the store.

It serves the engines of a run, and servers that a user starts by hand (``standalone/``).

    TpModelWorker.forward_batch_generation ---- hook ----> CaptureRows       (one batch, of prefill or of decode)
                                                 |  copy_to_host: rows -> slot of a registered host buffer
                                                 |  consume: request finished? -> CaptureWriter (thread): check, put
                                                 v
                               reply of the request is streamed only now, or held until the store has the states

SGLang already computes the states (``enable_return_aux_hidden_states``) and already has a path for outputs that ride
along with a batch (``managers/auxiliary_output.py``): it calls ``copy_to_host`` on the stream that copies results, in
both of its event loops, and ``consume`` before it replies. One hook attaches our rows to that path. The prompt fills
its slot chunk by chunk, the answer row by row while it is written; no token is computed twice.

The states are those of every token that the model has *read*: the prompt and the answer but for its last token. What
that one would have taught, its own prediction, is in the state before it.

A request is only ever handed on whole: rows must start where the previous ones ended, so a prefix that came out of a
cache, a retraction in the middle, or an abort can never yield a sample with rows missing.

Shapes: T tokens of a batch, S tokens read by a request, F aux layers, H hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchspec.inference.capture.protocol import (
    ENVIRONMENT_VARIABLE,
    CaptureConfig,
    Hello,
    Message,
    Parent,
    captured_key,
    captured_sharding,
    encode_failed,
)
from torchspec.inference.capture.writer import CaptureWriter
from torchspec.inference.standalone import hooks as standalone_hooks
from torchspec.inference.standalone.config import SWITCH
from torchspec.store.geometry import SampleGeometry
from torchspec.store.hidden_state_store import Slot

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.managers.utils import GenerationBatchResult

_WORKER = "sglang.srt.managers.tp_worker.TpModelWorker"
_PATIENCE_SECONDS = 5.0
"""As many requests as run have room in the buffer, so a slot only waits for puts under way, or for fragmentation."""

_capture: Capture | None = None


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``; idle unless a parent process or a user asks for captures."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if ENVIRONMENT_VARIABLE in os.environ:
        HookRegistry.register(f"{_WORKER}.__init__", _start_for_parent, HookType.AFTER)
    elif SWITCH in os.environ:
        standalone_hooks.register(start)
    else:
        return
    HookRegistry.register(f"{_WORKER}.forward_batch_generation", _attach, HookType.AFTER)


def _start_for_parent(_result: None, worker: TpModelWorker, *_args: Any, **_kwargs: Any) -> None:
    """Connect to store and parent, and say hello."""
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_rank != 0:
        return
    config = CaptureConfig.from_json(os.environ[ENVIRONMENT_VARIABLE])
    parent = Parent(config.socket)
    writer = CaptureWriter(config.endpoint, config.buffer_bytes)
    hello = start(worker, writer, parent.expect)
    parent.say({"type": "hello", **asdict(hello)})


def start(worker: TpModelWorker, writer: CaptureWriter, expect: Expect) -> Hello:
    """Capture in this process from here on. Every tensor-parallel rank has all states; the first one captures."""
    global _capture
    from sglang.srt.runtime_context import get_exec

    if not hasattr(type(worker).forward_batch_generation, "__wrapped__"):
        raise RuntimeError(f"SGLang did not apply the capture hook to {_WORKER}.forward_batch_generation")
    model, dtype = worker.model_runner.model_config, str(worker.model_runner.dtype).removeprefix("torch.")
    aux_layers = list(get_exec().features.return_aux_hidden_state_layer_ids)
    _capture = Capture(writer, SampleGeometry(len(aux_layers), model.hidden_size, dtype), expect)
    return Hello(tuple(aux_layers), model.num_hidden_layers, model.hidden_size, dtype)


def _attach(
    result: GenerationBatchResult, _worker: TpModelWorker, batch: ScheduleBatch | None = None, *_: Any, **__: Any
) -> None:
    """After a forward pass: if it computed rows of captured requests, let them ride along with its result."""
    if _capture is None or batch is None:
        return
    pieces = _find_pieces(batch)
    if pieces:
        from sglang.srt.managers.auxiliary_output import append_auxiliary_output

        output = result.logits_output
        aux, last = output.hidden_states, output.last_hidden_states
        if aux.is_cuda:  # a CUDA graph's next replay overwrites its outputs, maybe before they are copied
            aux, last = aux.clone(), last.clone()
        rows = CaptureRows(_capture, pieces, aux, last)
        output.auxiliary_device_output = append_auxiliary_output(output.auxiliary_device_output, rows)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``offset .. offset + length`` of a batch are tokens ``start .. start + length`` of a captured request."""

    req: Req
    key: str
    offset: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


def _find_pieces(batch: ScheduleBatch) -> list[Piece]:
    if batch.forward_mode.is_extend():
        starts, lengths = batch.prefix_lens, batch.extend_lens
    elif batch.forward_mode.is_decode():
        starts, lengths = (batch.seq_lens_cpu - 1).tolist(), [1] * len(batch.reqs)
    else:
        return []
    pieces, offset = [], 0
    for req, start, length in zip(batch.reqs, starts, lengths, strict=True):
        key = captured_key(req.rid)
        if key is not None:
            pieces.append(Piece(req, key, offset, start, length))
        offset += length
    return pieces


@dataclass(slots=True)
class PendingRequest:
    """A request whose first ``filled`` rows lie in its slot. Without a slot it has failed and waits to be forgotten."""

    req: Req
    buffer: Slot | None
    filled: int = 0


Expect = Callable[[str, Future[Message]], None]
"""Takes the key of a request and the future of what came of it."""


class Capture:
    """The requests that are being computed, and the writer that takes the finished ones."""

    def __init__(self, writer: CaptureWriter, geometry: SampleGeometry, expect: Expect):
        self._writer, self._geometry, self._expect = writer, geometry, expect
        self._pending: dict[str, PendingRequest] = {}

    def fill(self, piece: Piece, aux: Tensor, last: Tensor) -> None:
        """Copy ``aux`` [length, F*H] and ``last`` [length, H] into the request's slot."""
        self._forget_finished()
        if piece.key not in self._pending:
            if piece.req.finished():  # SGLang was one step ahead of a request that has ended
                return
            self._pending[piece.key] = PendingRequest(piece.req, self._allocate(piece))
        pending = self._pending[piece.key]
        if pending.buffer is None:
            return
        if piece.start not in (0, pending.filled):  # 0: started over after a retraction
            self._fail(piece.key, f"rows {pending.filled}..{piece.start} were never computed (prefix cache?)")
            return
        for name, rows in (("hs", aux), ("lhs", last)):
            pending.buffer.views[name][piece.start : piece.end].copy_(rows, non_blocking=True)
        pending.filled = piece.end

    def complete(self, piece: Piece) -> None:
        """The batch of ``piece`` has been processed; hand its request on if it is finished."""
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        pending, req = self._pending.get(piece.key), piece.req
        if pending is None or pending.buffer is None or not req.finished():
            return
        read = [*req.origin_input_ids, *req.output_ids[: req.finished_len][:-1]]
        if pending.filled >= len(read) and not isinstance(req.finished_reason, FINISH_ABORT):
            del self._pending[piece.key]
            sharding = captured_sharding(req.rid)
            self._expect(piece.key, self._writer.write(piece.key, pending.buffer, read, sharding))

    def _allocate(self, piece: Piece) -> Slot | None:
        """A slot for as many tokens as the request can come to."""
        longest = len(piece.req.origin_input_ids) + piece.req.sampling_params.max_new_tokens
        try:
            return self._writer.store.allocate(self._geometry.tensors(longest), timeout=_PATIENCE_SECONDS)
        except (TimeoutError, ValueError) as error:
            self._report_failure(piece.key, str(error))
            return None

    def _fail(self, key: str, reason: str) -> None:
        pending = self._pending[key]
        assert pending.buffer is not None
        self._writer.store.release(pending.buffer)
        pending.buffer = None
        self._report_failure(key, reason)

    def _report_failure(self, key: str, reason: str) -> None:
        outcome: Future[Message] = Future()
        outcome.set_result(encode_failed(key, reason))
        self._expect(key, outcome)

    def _forget_finished(self) -> None:
        """Drop requests that ended unfinished: aborted by the client, or failed above."""
        for key in [key for key, pending in self._pending.items() if pending.req.finished()]:
            buffer = self._pending.pop(key).buffer
            if buffer is not None:
                self._writer.store.release(buffer)


@dataclass(frozen=True, slots=True)
class CaptureRows:
    """The captured rows of one batch, in SGLang's ``DeviceAuxiliaryOutput`` and ``HostAuxiliaryOutput`` protocols."""

    capture: Capture
    pieces: list[Piece]
    aux: Tensor
    """[T, F*H]"""
    last: Tensor
    """[T, H], after the final norm."""

    def copy_to_host(self, _copy_tensor: Callable[[Tensor], Tensor]) -> CaptureRows:
        """Copy each request's rows straight to its slot; SGLang waits for this stream before :meth:`consume`."""
        for tensor in (self.aux, self.last):
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream())
        for piece in self.pieces:
            rows = slice(piece.offset, piece.offset + piece.length)
            self.capture.fill(piece, self.aux[rows], self.last[rows])
        return self

    def consume(self, _batch: ScheduleBatch, _commits: Sequence[object]) -> None:
        """Sampled tokens are committed, the replies are not sent yet."""
        for piece in self.pieces:
            self.capture.complete(piece)
