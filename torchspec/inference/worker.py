"""One inference worker: pulls leases, has its source turn them into samples, publishes what the store holds.

    controller --lease--> [prompt] --source--> store --publish--> controller

The worker keeps ``max_concurrency`` samples in its source, the target's engine. It asks for more as soon as one is done
and never waits for a whole batch. It keeps no state that anybody would miss: when it dies, its leases are given to
another worker, and what it has published lies in the store. While the controller is away it goes on with what it has;
the next one throws away what it did not ask for.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray

from torchspec.contracts import Lease, WorkerReport
from torchspec.inference.engine import TargetEngine
from torchspec.inference.sglang_process import EngineSpec
from torchspec.inference.source import Produced, SampleSource, SourceFailed
from torchspec.insist import insist
from torchspec.instruments import Stopwatch, observe
from torchspec.knobs import found


class InferenceWorker:
    """A Ray actor class around one :class:`SampleSource`. ``name`` is unique in the run."""

    def __init__(self, name: str, controller: Any, engine: EngineSpec):
        self._name, self._controller, self._config = name, controller, engine.config
        self._counts = WorkerReport(name)
        self._alive, self._busy = Stopwatch(), Stopwatch()
        self._held: set[str] = set()
        self._source: SampleSource = TargetEngine(engine)

    async def run(self) -> None:
        """Work until the controller has no more leases for this worker, then stop the source.

        Raises:
            Exception: the source is gone; the controller takes the open leases back.
        """
        samples: set[asyncio.Task[None]] = set()
        reporting = asyncio.create_task(self._report_regularly())
        try:
            with self._alive:
                await self._work(samples)
        finally:
            for task in (reporting, *samples):
                task.cancel()
            self._source.stop()

    async def _work(self, samples: set[asyncio.Task[None]]) -> None:
        most, more = found(self._config.inference.max_concurrency), True
        asking: asyncio.Task[list[Lease]] | None = None
        while more or samples:
            if more and asking is None and len(samples) < most:
                asking = asyncio.create_task(self._lease(most - len(samples)))
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
        except (ray.exceptions.ActorUnavailableError, ray.exceptions.ActorDiedError):
            leases = await insist(self._controller.lease, self._name, count, self._report(), tuple(self._held))
        self._held.update(lease.key for lease in leases)
        return leases

    async def _report_regularly(self) -> None:
        """How it is doing, besides what it says when it asks for leases."""
        pause = self._config.monitor.history_seconds
        while pause:
            with suppress(ray.exceptions.RayError):  # a controller that is away will be back, or ends the run
                await self._controller.worker_report.remote(self._report())
            await asyncio.sleep(pause)

    async def _serve(self, lease: Lease) -> None:
        """Turn one lease into a published sample, or into a failure with a reason."""
        with self._busy:
            try:
                produced = await self._source.produce(lease)
                self._count_sample(produced)
                await insist(self._controller.publish, self._name, produced.ref, produced.answer, produced.timing)
            except SourceFailed as error:
                self._counts = replace(self._counts, failures=self._counts.failures + 1)
                await insist(self._controller.fail, self._name, lease.sample, lease.key, str(error), error.kind)
            finally:
                self._held.discard(lease.key)

    def _count_sample(self, produced: Produced) -> None:
        ref, answer, put_seconds = produced.ref, produced.answer, produced.timing.put_seconds
        counts = self._counts
        self._counts = replace(
            counts,
            samples=counts.samples + 1,
            tokens=counts.tokens + ref.num_tokens,
            answer_tokens=counts.answer_tokens + (len(answer.token_ids) if answer else 0),
            put_bytes=counts.put_bytes + ref.num_bytes,
            put_seconds=counts.put_seconds + put_seconds,
            put_histogram=observe(counts.put_histogram, put_seconds),
        )

    def _report(self) -> WorkerReport:
        return replace(
            self._counts,
            seconds=self._alive.seconds,
            busy_seconds=self._busy.seconds,
            engine_seconds=self._source.computing.seconds,
            leases=self._busy.count,
        )
