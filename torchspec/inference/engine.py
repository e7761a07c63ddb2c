"""The live source: an SGLang engine that answers prompts and captures hidden states, on a CPU or on GPUs.

    answer(key, prompt) ---> sampled tokens, and the states of what was read on the way
    capture(key, text) ----> the states alone

The states of every token that the model has read lie in the store under ``{key}_{hs,lhs,ids}`` then: the last token
of an answer is written and never read. All are requests in the same continuous batch. One is done when the plugin in
SGLang's scheduler process reports that the store has it (``capture/``), so whoever gets a result may publish it. The
engine never has more sample bytes under way than the plugin's buffer holds.

A :class:`TargetEngine` on a CPU sets ``OMP_NUM_THREADS`` of its process, which SGLang's child processes inherit.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from torchspec.contracts import Answer, Lease, SampleRef, SampleTiming
from torchspec.data.masks import pack_mask
from torchspec.inference.capture.protocol import CaptureConfig, Captured, capture_rid, decode_captured
from torchspec.inference.sglang_process import (
    EngineSpec,
    await_hello,
    end_engine,
    ignore_sigquit,
    killed_by,
    start_capturing_engine,
)
from torchspec.inference.source import Produced, SourceFailed
from torchspec.instruments import Stopwatch
from torchspec.knobs import found
from torchspec.processes.janitor import is_stopped
from torchspec.processes.leftovers import remove_shared_memory_leftovers
from torchspec.shards import ShardFormula
from torchspec.store.geometry import SampleGeometry
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.shape import check_layers

T = TypeVar("T")
Sampling = Mapping[str, Any]

CAPTURES_WHILE_ANSWERING = 2
"""SGLang prefers prefill to decode: without this bound, samples that only need a prefill would starve the answers that
the front of the order waits for."""

_LOOK_SECONDS = 1.0
_END_SECONDS = 5.0
"""What a process has to end after its sockets are closed."""
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that no process sends itself for what it was given; the kernel's for a broken program are others."""


class EngineDied(RuntimeError):
    """A process of SGLang ended or hangs; the engine is of no more use."""


class EngineKilled(EngineDied):
    """Somebody outside has ended or stopped a process of SGLang, which says nothing about what it was working on."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What the target wrote: token ids, why it stopped (``stop``, ``length``), and where the states are."""

    token_ids: list[int]
    finish_reason: str
    captured: Captured


class TargetEngine:
    """A :class:`SampleSource`: an engine and its capture plugin. Blocks until the model is loaded.

    The constructor belongs on a process's main thread, the other methods on one event loop.

    Args:
        spec: The engine. Its ``inference.buffer_bytes`` bound the bytes of samples under way.

    Raises:
        EngineError: SGLang did not start, or the capture plugin did not load.
    """

    def __init__(self, spec: EngineSpec):
        self._config, target, buffer_bytes = spec.config, spec.config.target, found(spec.config.inference.buffer_bytes)
        self._target = TargetCheckpoint(Path(target.path), target.trust_remote_code)
        self._started = time.time()
        self._folder = Path(tempfile.mkdtemp(prefix="torchspec-"))
        self._engine: Any = None
        try:
            capture = CaptureConfig(str(self._folder / "capture"), spec.endpoint, buffer_bytes)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(capture.socket)
                listener.listen(1)
                self._engine = start_capturing_engine(spec, capture)
                self._socket, hello = await_hello(listener)
            check_layers(hello.num_layers, spec.aux_layers)
        except BaseException:
            self._shut_down()
            raise
        self._geometry = SampleGeometry(len(hello.aux_layers), hello.hidden_size, hello.dtype)
        self._budget, self._turns = _Budget(buffer_bytes), _Turns()
        self.computing = Stopwatch()
        """Runs while SGLang has a request."""
        self._captures: dict[str, asyncio.Future[Captured]] = {}
        self._death: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def produce(self, lease: Lease) -> Produced:
        """Have the target answer the lease's prompt, or read its text, in turn. See :class:`SampleSource`.

        Raises:
            SourceFailed: there is no sample.
            EngineDied: the engine is gone.
        """
        started = time.perf_counter()
        input_ids, loss_mask = np.frombuffer(lease.input_ids, "<i4").tolist(), lease.loss_mask
        num_tokens, answer = len(input_ids), None
        if lease.max_new_tokens > 0:
            async with self._turns.taken("answers"):
                answer, captured = await self._answer_lease(lease, input_ids)
            read = len(answer.token_ids) - 1
            loss_mask = pack_mask([False] * num_tokens + [True] * read)
            num_tokens += read
        else:
            async with self._turns.taken("captures"):
                captured = await self.capture(lease.key, input_ids, lease.sharding)
        worked = captured.compute_seconds, captured.hold_seconds, captured.put_seconds
        queued = max(0.0, time.perf_counter() - started - sum(worked))
        ref = SampleRef(
            sample=lease.sample,
            key=lease.key,
            num_tokens=num_tokens,
            loss_mask=loss_mask,
            tensors=captured.tensors,
            num_bytes=captured.num_bytes,
            norm_state="post_norm",  # SGLang's last_hidden_states
            sharding=captured.sharding,
        )
        return Produced(ref, answer, SampleTiming(queued, *worked))

    async def answer(
        self, key: str, input_ids: Sequence[int], sampling: Sampling, sharding: ShardFormula | None = None
    ) -> Answered:
        """Let the target continue ``input_ids``, and store the states of all tokens but the last under ``key``.

        Args:
            key: unique.
            sampling: SGLang's ``sampling_params``, ``max_new_tokens`` among them.
            sharding: how to split the sample among the ranks that share it; None: store it whole.

        Raises:
            SourceFailed: the longest possible sample does not fit into the plugin's buffer, SGLang gave the request
                up, the states are bad, or the store did not take them.
            EngineDied: the engine is gone.
        """
        async with self._budget.taken(self._geometry.slot_bytes(len(input_ids) + sampling["max_new_tokens"])):
            stored = self._captures[key] = asyncio.get_running_loop().create_future()
            started = time.perf_counter()
            try:
                with self.computing:
                    reply = await self._generate(capture_rid(key, sharding), input_ids, sampling)
                computed = time.perf_counter()
                captured = await self._or_death(stored)
            finally:
                del self._captures[key]
        held = time.perf_counter() - computed - captured.put_seconds
        captured = replace(captured, compute_seconds=computed - started, hold_seconds=max(0.0, held))
        return Answered(list(reply["output_ids"]), reply["meta_info"]["finish_reason"]["type"], captured)

    async def capture(self, key: str, input_ids: Sequence[int], sharding: ShardFormula | None = None) -> Captured:
        """Store the states of ``input_ids`` under ``key``. See :meth:`answer`."""
        return (await self.answer(key, input_ids, {"max_new_tokens": 1, "temperature": 0.0}, sharding)).captured

    def stop(self) -> None:
        """End the engine's processes and remove what they leave behind. A request that is under way is lost."""
        for task in self._tasks:
            task.cancel()
        self._socket.close()
        self._shut_down()

    async def _answer_lease(self, lease: Lease, input_ids: list[int]) -> tuple[Answer, Captured]:
        """The target's answer, with the token that ends the turn if it came to one, and its states."""
        sampling = {
            "max_new_tokens": lease.max_new_tokens,
            "temperature": self._config.answer.temperature,
            "top_p": self._config.answer.top_p,
            "sampling_seed": lease.seed,
            "stop_token_ids": list(self._target.end_token_ids),  # the tokenizer's, which SGLang has not, among them
        }
        answered = await self.answer(lease.key, input_ids, sampling, lease.sharding)
        ids, reason = answered.token_ids, answered.finish_reason
        text = self._target.tokenizer.decode(ids, skip_special_tokens=True)
        if not text.strip():
            raise SourceFailed("final", f"the target's answer is empty ({len(ids)} tokens, {reason})")
        return Answer(lease.sample.prompt, tuple(ids), text, reason), answered.captured

    async def _generate(self, rid: str, input_ids: Sequence[int], sampling: Sampling) -> dict[str, Any]:
        self._watch()
        request = self._engine.async_generate(input_ids=list(input_ids), sampling_params=dict(sampling), rid=rid)
        try:
            reply = await self._or_death(request)
        except asyncio.CancelledError:
            self._engine.tokenizer_manager.abort_request(rid)
            raise
        except ValueError as error:  # SGLang's word for a request that it cannot serve
            raise SourceFailed("retry", str(error)) from error
        reason = reply["meta_info"]["finish_reason"]
        if reason["type"] == "abort":
            raise SourceFailed("retry", f"SGLang aborted the request: {reason['message']}")
        return reply

    def _watch(self) -> None:
        """On the first call, follow the plugin's messages and the child processes from this event loop."""
        if self._death is not None:
            return
        loop = asyncio.get_running_loop()
        self._death = loop.create_future()
        tokenizer_manager = self._engine.tokenizer_manager
        tokenizer_manager.auto_create_handle_loop()  # sets signal handlers, too
        tokenizer_manager._subprocess_watchdog.stop()  # would send us SIGQUIT
        ignore_sigquit()
        pids = self._engine.get_all_child_pids()
        for pid in pids:
            descriptor = os.pidfd_open(pid)
            loop.add_reader(descriptor, self._on_death, pid, descriptor)
        self._tasks = [loop.create_task(self._listen()), loop.create_task(self._watch_for_stops(pids))]

    async def _watch_for_stops(self, pids: Sequence[int]) -> None:
        """A process that somebody has stopped (SIGSTOP) does not end, and would be waited for without end."""
        looks, hang_seconds = 0, self._config.recovery.hang_seconds
        while looks < hang_seconds / _LOOK_SECONDS:
            await asyncio.sleep(_LOOK_SECONDS)
            looks = looks + 1 if any(map(is_stopped, pids)) else 0
        self._declare_dead(EngineKilled(f"an SGLang process has been stopped for {hang_seconds:.0f} s"))

    def _on_death(self, pid: int, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        killer = killed_by(descriptor)
        os.close(descriptor)
        if killer in _FROM_OUTSIDE:
            self._declare_dead(EngineKilled(f"SGLang process {pid} ended by {killer.name}"))
        else:
            self._declare_dead(EngineDied(f"SGLang process {pid} ended"))

    def _declare_dead(self, death: EngineDied) -> None:
        assert self._death is not None
        if not self._death.done():
            self._death.set_exception(death)
            self._death.exception()  # retrieved: nobody may be waiting

    async def _or_death(self, work: Awaitable[T]) -> T:
        """The result of ``work``, or :class:`EngineDied` as soon as that is known."""
        assert self._death is not None
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._death), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._death.result()  # raises
            return task.result()
        finally:
            task.cancel()  # does nothing to one that is done

    async def _listen(self) -> None:
        """Resolve captures as the plugin reports them."""
        reader, _writer = await asyncio.open_unix_connection(sock=self._socket)
        while line := await reader.readline():
            message = json.loads(line)
            future = self._captures.get(message["key"])
            if future is None or future.done():  # its caller has gone away
                continue
            if message["stored"]:
                future.set_result(decode_captured(message))
            else:
                future.set_exception(SourceFailed(message["kind"], message["reason"]))
        await asyncio.sleep(_END_SECONDS)  # how it has ended is known as soon as it has
        self._declare_dead(EngineDied("SGLang's scheduler process closed the capture plugin's socket"))

    def _shut_down(self) -> None:
        if self._engine is not None:
            end_engine(self._engine)
        shutil.rmtree(self._folder)
        remove_shared_memory_leftovers(self._started)


class _Budget:
    """Bytes that may be under way; waiters are served in order."""

    def __init__(self, capacity: int):
        self._capacity = self._free = capacity
        self._freed = asyncio.Condition()
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[None]:
        """Hold ``size`` bytes, once they are free.

        Raises:
            SourceFailed: there will never be as many.
        """
        if size > self._capacity:
            reason = f"a sample of {size} bytes does not fit into inference.buffer_bytes={self._capacity}"
            raise SourceFailed("final", reason)
        async with self._turn, self._freed:
            await self._freed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            async with self._freed:
                self._free += size
                self._freed.notify_all()


class _Turns:
    """Answers go at once; while any is under way, only so many captures do."""

    def __init__(self) -> None:
        self._under_way = {"answers": 0, "captures": 0}
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, kind: Literal["answers", "captures"]) -> AsyncIterator[None]:
        """Hold the turn of one of ``kind``, once it has come."""
        count = self._under_way
        async with self._changed:
            if kind == "captures":
                await self._changed.wait_for(lambda: not count["answers"] or count[kind] < CAPTURES_WHILE_ANSWERING)
            count[kind] += 1
        try:
            yield
        finally:
            async with self._changed:
                count[kind] -= 1
                self._changed.notify_all()
