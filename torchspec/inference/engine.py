"""One SGLang engine that answers prompts and captures hidden states, on a CPU or on GPUs.

    answer(key, prompt) ---> sampled tokens, and the states of what was read on the way
    capture(key, text) ----> the states alone

The states of every token that the model has read lie in the store under ``{key}_{hs,lhs,ids}`` then: the last token
of an answer is written and never read. All are requests in the same continuous batch. One is done when the plugin in
SGLang's scheduler process reports that the store has it (``capture.py``), so whoever gets a result may publish it. The
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
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil

from torchspec.inference.capture.protocol import (
    ENVIRONMENT_VARIABLE,
    CaptureConfig,
    Captured,
    Hello,
    capture_rid,
    decode_captured,
)
from torchspec.inference.sglang_process import end_children, end_engine
from torchspec.instruments import Stopwatch
from torchspec.processes.leftovers import remove_shared_memory_leftovers
from torchspec.shards import ShardFormula
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry
from torchspec.store.slot_pool import align
from torchspec.target.layers import resolve_aux_layers

T = TypeVar("T")

_LOOK_SECONDS = 1.0
_HELLO_SECONDS = 10.0
"""The plugin says hello while SGLang starts, so by then it is there or it will never be."""


class EngineError(RuntimeError):
    """A request came to nothing."""


class EngineDied(EngineError):
    """A scheduler process of SGLang ended; the engine is of no more use."""


class CaptureError(EngineError):
    """A prompt's states did not reach the store."""


class NoRoom(CaptureError):
    """The store has no hole large enough now. The prompt is not to blame."""


class NoStore(CaptureError):
    """The store does not answer. The prompt is not to blame."""


class SampleTooLarge(ValueError):
    """A sample that never fits into the plugin's buffer."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What the target wrote: token ids, why it stopped (``stop``, ``length``), and where the states are."""

    token_ids: list[int]
    finish_reason: str
    captured: Captured


@dataclass(frozen=True)
class EngineConfig:
    """What SGLang's engine is started with."""

    model_path: str
    aux_layers: tuple[int, ...]
    """Layers whose outputs are captured (``aux_layers.py``)."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: str = "bfloat16"
    threads: int = 1
    """OpenMP threads of the scheduler process on a CPU."""
    tp_size: int = 1
    chunked_prefill_size: int = 2048
    """Tokens of one prefill chunk."""
    max_total_tokens: int = 32768
    """KV-cache pool in tokens."""
    max_running_requests: int = 32
    mem_fraction_static: float | None = None
    """Default: SGLang's on a GPU; on a CPU a half, which leaves room for whatever else starts at the same time."""
    trust_remote_code: bool = False
    hang_seconds: float = 15.0
    """An engine one of whose processes has been stopped for so long is taken for dead."""
    stuck_seconds: float = 600.0
    """One step of the scheduler that takes longer is stuck, and ends the engine."""
    extra_args: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of ``sglang.Engine``; they win over the ones above."""

    def engine_args(self) -> dict[str, Any]:
        """Keyword arguments of ``sglang.Engine``."""
        args = {
            "model_path": self.model_path,
            "device": self.device,
            "dtype": self.dtype,
            "tp_size": self.tp_size,
            "chunked_prefill_size": self.chunked_prefill_size,
            "max_total_tokens": self.max_total_tokens,
            "max_running_requests": self.max_running_requests,
            "mem_fraction_static": self.mem_fraction_static,
            "trust_remote_code": self.trust_remote_code,
            "disable_radix_cache": True,  # a cached prefix has no hidden states
            "enable_return_aux_hidden_states": True,
            "speculative_algorithm": "EAGLE3",  # names the capture convention; no draft is loaded
            "return_aux_hidden_state_layer_ids": list(self.aux_layers),
            "watchdog_timeout": self.stuck_seconds,
            "sleep_on_idle": True,  # the scheduler would spin on a core that others need
            "log_level": "error",
            "custom_sigquit_handler": signal.SIG_IGN,  # a dying child must not take this process along
        }
        if self.device == "cpu":
            args |= {
                "attention_backend": "torch_native",
                "sampling_backend": "pytorch",
                "disable_cuda_graph": True,
                "mem_fraction_static": self.mem_fraction_static or 0.5,
            }
        return args | dict(self.extra_args)


class TargetEngine:
    """Start an engine and its capture plugin; blocks until the model is loaded.

    The constructor belongs on a process's main thread, the other methods on one event loop.

    Args:
        config: The engine.
        endpoint: The store that captures go to.
        buffer_bytes: Registered host memory of the plugin; bounds the bytes of samples under way.

    Raises:
        EngineError: SGLang did not start, or the capture plugin did not load.
    """

    def __init__(self, config: EngineConfig, endpoint: StoreEndpoint, buffer_bytes: int):
        self._config = config
        self._started = time.time()
        self._folder = Path(tempfile.mkdtemp(prefix="torchspec-"))
        self._engine: Any = None
        try:
            capture = CaptureConfig(str(self._folder / "capture"), endpoint, buffer_bytes)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(capture.socket)
                listener.listen(1)
                self._engine = _start_sglang(config, capture)
                self._socket, hello = _await_hello(listener)
            resolve_aux_layers(hello.num_layers, config.aux_layers)
        except BaseException:
            self._shut_down()
            raise
        self._geometry = SampleGeometry(len(hello.aux_layers), hello.hidden_size, hello.dtype)
        self._room = _Budget(buffer_bytes)
        self.computing = Stopwatch()
        """Runs while SGLang has a request."""
        self._captures: dict[str, asyncio.Future[Captured]] = {}
        self._death: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def answer(
        self,
        key: str,
        input_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        sharding: ShardFormula | None = None,
    ) -> Answered:
        """Let the target continue ``input_ids``, and store the states of all tokens but the last under ``key``.

        Args:
            key: unique.
            sharding: how to split the sample among the ranks that share it; None: store it whole.

        Raises:
            SampleTooLarge: the longest possible sample does not fit into the plugin's buffer.
            CaptureError: the states are bad, or the store did not take them.
            EngineError: SGLang gave the request up.
            EngineDied: the engine is gone.
        """
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "sampling_seed": seed,
        }
        tensors = self._geometry.tensors(len(input_ids) + max_new_tokens)
        size = sum(align(spec.num_bytes) for spec in tensors.values())
        async with self._room.taken(size):
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
        return (await self.answer(key, input_ids, 1, 0.0, 1.0, 0, sharding)).captured

    def stop(self) -> None:
        """End the engine's processes and remove what they leave behind.

        Await your captures first: one that is under way is lost.
        """
        for task in self._tasks:
            task.cancel()
        self._socket.close()
        self._shut_down()

    async def _generate(self, rid: str, input_ids: Sequence[int], sampling: dict[str, Any]) -> dict[str, Any]:
        self._watch()
        try:
            reply = await self._or_death(
                self._engine.async_generate(input_ids=list(input_ids), sampling_params=sampling, rid=rid)
            )
        except asyncio.CancelledError:
            self._engine.tokenizer_manager.abort_request(rid)
            raise
        except ValueError as error:  # SGLang's word for a request that it cannot serve
            raise EngineError(str(error)) from error
        reason = reply["meta_info"]["finish_reason"]
        if reason["type"] == "abort":
            raise EngineError(f"SGLang aborted the request: {reason['message']}")
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
        _ignore_sigquit()
        pids = self._engine.get_all_child_pids()
        for pid in pids:
            descriptor = os.pidfd_open(pid)
            loop.add_reader(descriptor, self._on_death, pid, descriptor)
        self._tasks = [loop.create_task(self._listen()), loop.create_task(self._watch_for_stops(pids))]

    async def _watch_for_stops(self, pids: Sequence[int]) -> None:
        """A process that somebody has stopped (SIGSTOP) does not end, and would be waited for without end."""
        processes = [psutil.Process(pid) for pid in pids]
        looks = 0
        while looks < self._config.hang_seconds / _LOOK_SECONDS:
            await asyncio.sleep(_LOOK_SECONDS)
            looks = looks + 1 if any(_is_stopped(process) for process in processes) else 0
        self._declare_dead(f"an SGLang process has been stopped for {self._config.hang_seconds:.0f} s")

    def _on_death(self, pid: int, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        self._declare_dead(f"SGLang process {pid} ended")

    def _declare_dead(self, reason: str) -> None:
        assert self._death is not None
        if not self._death.done():
            self._death.set_exception(EngineDied(reason))
            self._death.exception()  # retrieved: nobody may be waiting

    async def _or_death(self, work: Awaitable[T]) -> T:
        """The result of ``work``, or :class:`EngineDied` as soon as that is known."""
        assert self._death is not None
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._death), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.done():
            return task.result()
        task.cancel()
        self._death.result()  # raises
        raise AssertionError

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
                kind = NoRoom if message["no_room"] else NoStore if message["no_store"] else CaptureError
                future.set_exception(kind(message["reason"]))
        self._declare_dead("SGLang's scheduler process ended: the capture plugin closed its socket")

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
            SampleTooLarge: there will never be as many.
        """
        if size > self._capacity:
            raise SampleTooLarge(f"a sample of {size} bytes does not fit into inference.buffer_bytes={self._capacity}")
        async with self._turn, self._freed:
            await self._freed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            async with self._freed:
                self._free += size
                self._freed.notify_all()


def _start_sglang(config: EngineConfig, capture: CaptureConfig) -> Any:
    """Start ``sglang.Engine`` with an environment that its child processes inherit."""
    os.environ[ENVIRONMENT_VARIABLE] = capture.to_json()
    if config.device == "cpu":
        os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(config.threads)}
    from torchspec.inference.token_engine import TokenEngine  # SGLang reads the environment

    others = psutil.Process().children()
    try:
        return TokenEngine(**config.engine_args())
    except BaseException as error:
        end_children(but=others)
        if isinstance(error, RuntimeError):
            raise EngineError(f"SGLang did not start: {error}") from error
        raise
    finally:
        del os.environ[ENVIRONMENT_VARIABLE]  # or the next engine of this process would capture, too


def _await_hello(listener: socket.socket) -> tuple[socket.socket, Hello]:
    """The plugin's connection and its first message."""
    listener.settimeout(_HELLO_SECONDS)
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        raise EngineError(
            "the capture plugin did not load in SGLang's scheduler: is torchspec installed (pip install -e .) in this "
            "environment, and does SGLANG_PLUGINS, if set, name torchspec_capture?"
        ) from None
    with connection.makefile("rb") as lines:
        message = json.loads(lines.readline())
    assert message.pop("type") == "hello"
    connection.setblocking(False)
    return connection, Hello(**message)


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _ignore_sigquit() -> None:
    """SGLang kills its whole parent process on SIGQUIT, which its children send; we see them end by ourselves."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)
