"""One inference worker: pulls leases, has the target answer and prefill them, publishes what the store holds.

    controller --lease--> [prompt] --answer, capturing--> store --publish--> controller

The worker keeps ``max_concurrency`` samples in its engine's continuous batch. It asks for more as soon as one is done
and never waits for a whole batch. It keeps no state that anybody would miss: when it dies, its leases are given to
another worker, and what it has published lies in the store. While the controller is away it goes on with what it has;
the next one throws away what it did not ask for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from transformers import AutoTokenizer

from torchspec.config.schema import AnswerConfig, InferenceConfig
from torchspec.contracts import Answer, FailureKind, Lease, SampleRef, SampleTiming, WorkerReport
from torchspec.data.masks import pack_mask
from torchspec.inference.capture.protocol import Captured
from torchspec.inference.engine import (
    EngineConfig,
    EngineDied,
    EngineError,
    NoRoom,
    NoStore,
    SampleTooLarge,
    TargetEngine,
)
from torchspec.instruments import Stopwatch, observe
from torchspec.store.endpoint import StoreEndpoint

CAPTURES_WHILE_ANSWERING = 2
"""SGLang prefers prefill to decode: without this bound, samples that only need a prefill would starve the answers that
the front of the line waits for."""

_CONTROLLER_PAUSE_SECONDS = 0.5


class Unanswerable(Exception):
    """The target has nothing to say to a prompt; asking again would not help."""


class InferenceWorker:
    """A Ray actor class around one :class:`TargetEngine`.

    Args:
        name: This worker, unique in the run.
        controller: Handle of the controller actor.
        engine: The engine to start.
        endpoint: The run's store.
        inference: Concurrency and buffer size.
        answer: How the target answers.
        report_seconds: How often it tells the controller how it is doing, besides asking for leases; 0: never.
    """

    def __init__(
        self,
        name: str,
        controller: Any,
        engine: EngineConfig,
        endpoint: StoreEndpoint,
        inference: InferenceConfig,
        answer: AnswerConfig,
        report_seconds: float = 0.0,
    ):
        self._name, self._controller, self._answer = name, controller, answer
        self._max_concurrency = inference.max_concurrency
        self._tokenizer = AutoTokenizer.from_pretrained(engine.model_path, trust_remote_code=engine.trust_remote_code)
        self._counts, self._report_seconds = WorkerReport(name), report_seconds
        self._alive, self._busy = Stopwatch(), Stopwatch()
        self._answering = self._capturing = 0
        self._turn = asyncio.Condition()
        self._in_hand: set[str] = set()
        assert inference.buffer_bytes is not None, "resolved before the run starts"
        self._engine = TargetEngine(engine, endpoint, inference.buffer_bytes)

    async def run(self) -> None:
        """Work until the controller has no more leases for this worker, then stop the engine.

        Raises:
            EngineDied: the engine is gone; the controller takes the open leases back.
        """
        samples: set[asyncio.Task[None]] = set()
        reporting = asyncio.create_task(self._report_regularly())
        try:
            with self._alive:
                await self._work(samples)
        finally:
            for task in (reporting, *samples):
                task.cancel()
            self._engine.stop()

    async def _work(self, samples: set[asyncio.Task[None]]) -> None:
        asking: asyncio.Task[list[Lease]] | None = None
        more = True
        while more or samples:
            if more and asking is None and len(samples) < self._max_concurrency:
                asking = asyncio.create_task(self._lease(self._max_concurrency - len(samples)))
            waiting = samples | ({asking} if asking is not None else set())
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in samples if task.done()]:
                samples.remove(task)
                task.result()
            if asking is not None and asking.done():
                leases = asking.result()
                samples.update(asyncio.create_task(self._serve(lease)) for lease in leases)
                more, asking = bool(leases), None

    async def ping(self) -> bool:
        """A sign of life."""
        return True

    async def _lease(self, count: int) -> list[Lease]:
        """Up to ``count`` leases. If an answer is lost on its way, what it held is lost, too, and must go back."""
        try:
            leases: list[Lease] = await self._controller.lease.remote(self._name, count, self._report())
        except ray.exceptions.ActorUnavailableError:
            leases = await self._insist("lease", count, self._report(), tuple(self._in_hand))
        self._in_hand.update(lease.key for lease in leases)
        return leases

    async def _report_regularly(self) -> None:
        while self._report_seconds:
            with suppress(ray.exceptions.RayError):  # a controller that is away will be back, or ends the run
                await self._controller.worker_report.remote(self._report())
            await asyncio.sleep(self._report_seconds)

    async def _serve(self, lease: Lease) -> None:
        """Turn one lease into a published sample, or into a failure with a reason."""
        with self._busy:
            await self._serve_one(lease)

    async def _serve_one(self, lease: Lease) -> None:
        try:
            ref, answer, timing = await self._produce(lease)
            await self._insist("publish", ref, answer, timing)
        except EngineDied:
            raise
        except (EngineError, SampleTooLarge, Unanswerable) as error:
            self._count(failures=1)
            await self._insist("fail", lease.sample, lease.key, str(error), _kind(error))
        finally:
            self._in_hand.discard(lease.key)

    async def _insist(self, method: str, *args: Any) -> Any:
        """Call the controller, again and again while it is being restarted.

        Raises:
            RayActorError: there is no controller any more.
        """
        while True:
            try:
                return await getattr(self._controller, method).remote(self._name, *args)
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(_CONTROLLER_PAUSE_SECONDS)

    async def _produce(self, lease: Lease) -> tuple[SampleRef, Answer | None, SampleTiming]:
        started = time.perf_counter()
        input_ids, loss_mask, answer = np.frombuffer(lease.input_ids, "<i4").tolist(), lease.loss_mask, None
        if lease.max_new_tokens > 0:
            answer, captured = await self._ask(lease, input_ids)
            read = len(answer.token_ids) - 1
            loss_mask = pack_mask([False] * len(input_ids) + [True] * read)
        else:
            read = 0
            async with self._capture_turn():
                captured = await self._engine.capture(lease.key, input_ids, lease.sharding)
        num_tokens = len(input_ids) + read
        self._count(
            samples=1,
            tokens=num_tokens,
            answer_tokens=len(answer.token_ids) if answer else 0,
            put_bytes=captured.num_bytes,
            put_seconds=captured.put_seconds,
        )
        histogram = observe(self._counts.put_histogram, captured.put_seconds)
        self._counts = replace(self._counts, put_histogram=histogram)
        waited = time.perf_counter() - started - captured.compute_seconds - captured.hold_seconds - captured.put_seconds
        timing = SampleTiming(max(0.0, waited), captured.compute_seconds, captured.hold_seconds, captured.put_seconds)
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
        return ref, answer, timing

    async def _ask(self, lease: Lease, input_ids: list[int]) -> tuple[Answer, Captured]:
        """The target's answer, with the token that ends the turn if it came to one, and its states."""
        self._answering += 1
        try:
            answered = await self._engine.answer(
                lease.key,
                input_ids,
                lease.max_new_tokens,
                self._answer.temperature,
                self._answer.top_p,
                lease.seed,
                lease.sharding,
            )
        finally:
            self._answering -= 1
            async with self._turn:
                self._turn.notify_all()
        token_ids = answered.token_ids
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        if not text.strip():
            raise Unanswerable(f"the target's answer is empty ({len(token_ids)} tokens, {answered.finish_reason})")
        return Answer(lease.sample.prompt, tuple(token_ids), text, answered.finish_reason), answered.captured

    @asynccontextmanager
    async def _capture_turn(self) -> AsyncIterator[None]:
        """Wait while as many captures are under way as answers can bear."""
        async with self._turn:
            await self._turn.wait_for(lambda: not self._answering or self._capturing < CAPTURES_WHILE_ANSWERING)
            self._capturing += 1
        try:
            yield
        finally:
            async with self._turn:
                self._capturing -= 1
                self._turn.notify_all()

    def _count(self, **more: float) -> None:
        current = self._counts
        self._counts = replace(current, **{name: getattr(current, name) + value for name, value in more.items()})

    def _report(self) -> WorkerReport:
        return replace(
            self._counts,
            seconds=self._alive.seconds,
            busy_seconds=self._busy.seconds,
            engine_seconds=self._engine.computing.seconds,
            leases=self._busy.count,
        )


def _kind(error: Exception) -> FailureKind:
    """Who is to blame, and so what the controller does about it."""
    if isinstance(error, Unanswerable | SampleTooLarge):
        return "final"
    if isinstance(error, NoStore):
        return "no_store"
    return "no_room" if isinstance(error, NoRoom) else "retry"
