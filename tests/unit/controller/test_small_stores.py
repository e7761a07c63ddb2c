"""Runs in stores of a few samples, whose workers, ranks and controllers die by chance: every one of them ends.

Held-out windows, answers that are counted first, suspects, samples that wait for room and steps that are formed all
want the same few bytes. Whoever waits for them must never wait for somebody who waits for him.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.controller_harness import VOCAB, make_spec, save
from torchspec.contracts import Answer, Lease, MicroBatches, RankId, SampleId, SampleRef, WorkerReport
from torchspec.controller import objects, upkeep
from torchspec.controller.controller import Controller
from torchspec.controller.spec import ControllerSpec
from torchspec.controller.steps import GroupPlan
from torchspec.controller.verify import verify_run
from torchspec.data.masks import pack_mask
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry

GEOMETRY = SampleGeometry(num_aux=3, hidden_size=128, dtype="float32")
LONGEST = 9
SECONDS = 60.0
"""That a run may take; on an idle machine it takes a tenth of one."""
FAULTS = {"worker": 6, "failure": 8, "rank": 3, "object": 4, "controller": 2, "store": 2, "stop": 1}
"""Of each kind, most in a run."""


class Store:
    """Keys of what is in it."""

    keys: set[str]

    def __init__(self, endpoint: StoreEndpoint):
        pass

    def remove(self, key: str, suffixes: Iterable[str]) -> None:
        Store.keys.discard(key)

    def remove_all(self, prefix: str) -> None:
        Store.keys = {key for key in Store.keys if not key.startswith(prefix)}

    def close(self) -> None:
        pass


class Killed(Exception):
    pass


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in (tasks := list(tasks)):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Worker:
    """As ``inference/worker.py``: one call for leases open, and its samples under way beside it."""

    def __init__(self, run: Run, name: str, most: int):
        self.run, self.name, self.most = run, name, most
        self.held: dict[str, Lease] = {}
        self.task = asyncio.create_task(self.work())

    async def work(self, held: tuple[str, ...] | None = None) -> None:
        samples = {asyncio.create_task(self.serve(lease)) for lease in self.held.values()}
        asking: asyncio.Task[list[Lease]] | None = None
        more = True
        try:
            while samples or more:
                if more and asking is None and len(samples) < self.most:
                    count = self.most - len(samples)
                    report = WorkerReport(self.name)
                    asking = asyncio.create_task(self.run.controller.lease(self.name, count, report, held))
                    held = None
                await asyncio.wait({*samples, *([asking] if asking else [])}, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in samples if task.done()]:
                    samples.remove(task)
                    task.result()
                if asking is not None and asking.done():
                    leases = asking.result()
                    self.held |= {lease.key: lease for lease in leases}
                    samples |= {asyncio.create_task(self.serve(lease)) for lease in leases}
                    more, asking = bool(leases), None
        finally:
            await end([*samples, *([asking] if asking else [])])

    async def serve(self, lease: Lease) -> None:
        run, kind = self.run, ""
        await run.pause()
        if lease.sample == run.poison or run.strikes("worker", 0.05):
            raise Killed
        if run.strikes("failure", 0.1):
            kind = run.chance.choice(["retry", "retry", "no_room", "no_room", "final"])
        if kind:
            await run.controller.fail(self.name, lease.sample, lease.key, "by chance", kind)  # type: ignore[arg-type]
        else:
            Store.keys.add(lease.key)
            await run.pause()
            await run.controller.publish(self.name, *made_of(lease))
        self.held.pop(lease.key, None)


def made_of(lease: Lease) -> tuple[SampleRef, Answer | None]:
    """What the target would answer, as long as the prompt says."""
    ids, mask, answer = np.frombuffer(lease.input_ids, dtype="<i4"), lease.loss_mask, None
    if lease.max_new_tokens:
        count = 1 + int(ids[-1]) % lease.max_new_tokens
        answer = Answer(
            lease.sample.prompt, tuple(int(i) for i in (ids[-1] + np.arange(count)) % VOCAB), "text", "stop"
        )
        mask = pack_mask([0] * len(ids) + [1] * (count - 1))
        ids = np.concatenate([ids, answer.token_ids[:-1]])
    tensors = GEOMETRY.tensors(len(ids))
    return SampleRef(lease.sample, lease.key, len(ids), mask, tensors, 1, "post_norm", lease.sharding), answer


class Run:
    """A run and its driver. Of each kind of fault there are a few, so that it can end."""

    def __init__(self, seed: int, run_dir: Path):
        chance = self.chance = random.Random(seed)
        prompts, heldout = chance.randint(1, 10), chance.choice([0, 0, 1, 2, 5])
        room = chance.randint(1 + (heldout > 0), 8)
        batch = chance.randint(1, room - (heldout > 0))
        counted = chance.randint(1, prompts)
        training = {"batch_size": batch, "epochs": chance.randint(1, 3), "dp_size": chance.randint(1, min(2, batch))}
        size = GEOMETRY.stored_bytes(LONGEST)
        self.spec: ControllerSpec = make_spec(
            StoreEndpoint("unused", metrics=""),
            run_dir,
            name=f"small-{seed}",
            prompts=prompts,
            heldout=heldout,
            training=training,
            controller={
                "reorder_window": max(batch, counted) + chance.randint(0, 6),
                "max_attempts": chance.randint(2, 3),
                "prefetch_steps": chance.randint(1, 3),
            },
            data={"vocab_prompts": counted},
            monitor={"history_seconds": 0.0},
            credit_bytes=room * size + chance.randrange(size),
            geometry=GEOMETRY,
            draft_vocab_size=chance.choice([16, None]),
        )
        self.faults = {kind: chance.randint(0, most) for kind, most in FAULTS.items()}
        self.poison = SampleId(0, chance.randrange(prompts)) if chance.random() < 0.2 else None
        self.workers: dict[str, Worker] = {}
        self.named = 0
        self.ranks: list[asyncio.Task[None]] = []
        self.saved_step = 0

    def strikes(self, kind: str, likely: float) -> bool:
        struck = self.faults[kind] > 0 and self.chance.random() < likely
        self.faults[kind] -= struck
        return struck

    async def pause(self) -> None:
        for _ in range(self.chance.randrange(4)):
            await asyncio.sleep(0)

    # ---- the driver ----

    async def whole(self) -> None:
        while not await self.until_over():
            pass

    async def until_over(self) -> bool:
        """From a start or a resume to its end; False: it was stopped."""
        await self.start_controller(None)
        for _ in range(self.chance.randint(1, 3)):
            self.start_worker()
        while True:
            early = self.chance.random() < 0.3  # no driver does so, but the controller lets one
            plan = await self.controller.open_group() if early else None
            if not await self.watched(self.controller.draft_vocab()):
                continue
            self.start_ranks(plan or await self.controller.open_group())
            if not await self.watched(asyncio.gather(*self.ranks)):
                continue
            if await self.controller.training_over():
                break
        stopped = self.controller._stopping
        await self.controller.finish()
        await asyncio.gather(*(worker.task for worker in self.workers.values()))
        self.workers.clear()
        assert not self.controller.buffer.credits.used or stopped
        return not stopped

    async def watched(self, what: Coroutine[Any, Any, Any] | asyncio.Future[Any]) -> bool:
        """Whether it came to its end; False: something was lost, and it is to be done again."""
        task = asyncio.ensure_future(what)
        try:
            while True:
                pool = {worker.task: name for name, worker in self.workers.items()}
                await asyncio.wait({task, *pool}, timeout=0.02, return_when=asyncio.FIRST_COMPLETED)
                for done in [done for done in pool if done.done()]:
                    await self.worker_ended(pool[done])
                if task.done():
                    try:
                        task.result()
                    except Killed:
                        await self.end_ranks()
                        return False
                    return True
                if self.strikes("controller", 0.2):
                    await self.end_ranks()
                    await self.start_controller(len(self.workers))
                    return False
                if self.strikes("store", 0.2):
                    await self.controller.store_away()
                    await self.pause()
                    Store.keys.clear()
                    await self.controller.store_back()
                if self.strikes("stop", 0.1):
                    await self.controller.request_stop("by chance")
                    if not self.ranks:
                        return True
        finally:
            task.cancel()

    async def start_controller(self, running: int | None) -> None:
        if running is not None:
            self.controller._upkeep.end()
            await self.controller.observer.files.written()
            await end([worker.task for worker in self.workers.values()])  # with what the dead one had in hand
        self.controller = Controller(self.spec)
        await self.controller.begin()
        for worker in self.workers.values():
            worker.task = asyncio.create_task(worker.work(tuple(worker.held)))

    def start_worker(self) -> None:
        name = f"w{self.named}"
        self.named += 1
        self.workers[name] = Worker(self, name, self.chance.randint(1, 4))

    async def worker_ended(self, name: str) -> None:
        worker = self.workers.pop(name)
        try:
            worker.task.result()
        except Killed:
            await self.controller.worker_lost(name, True)
            self.start_worker()
        else:
            await self.controller.worker_left(name)

    def start_ranks(self, plan: GroupPlan) -> None:
        step = 0 if plan.resume is None else int(plan.resume.name.removeprefix("step_"))
        self.saved_step = step
        numbers = range(plan.training.world_size)
        self.ranks = [asyncio.create_task(self.rank(RankId(plan.generation, n), step)) for n in numbers]

    async def end_ranks(self) -> None:
        await end(self.ranks)
        self.ranks = []

    # ---- a rank ----

    async def rank(self, me: RankId, step: int) -> None:
        """As ``training/trainer.py``: held-out samples, then steps, fetched ahead of those that are made."""
        ahead: asyncio.Queue[Any] = asyncio.Queue(max(1, self.spec.config.controller.prefetch_steps - 1))
        fetching = asyncio.create_task(self.fetch(me, step, ahead))
        try:
            while (batch := await self.either(ahead.get(), fetching)) is not None:
                assert batch.step == step + 1
                step = batch.step
                await self.pause()
                if self.strikes("rank", 0.05):
                    raise Killed
                await self.controller.step_done(me, step, None)
                if batch.checkpoint and me.rank == 0:
                    await self.save(me, step)
            if step > self.saved_step and me.rank == 0:
                await self.save(me, step)
        finally:
            await end([fetching])

    async def either(self, wanted: Coroutine[Any, Any, Any], other: asyncio.Task[None]) -> Any:
        task = asyncio.ensure_future(wanted)
        await asyncio.wait({task, other}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and other.exception() is not None:
            task.cancel()
            other.result()
        return await task

    async def fetch(self, me: RankId, step: int, ahead: asyncio.Queue[Any]) -> None:
        if self.spec.heldout is not None:
            part, attempt = 1, 0
            refs: MicroBatches | None
            while refs := await self.controller.heldout_batches(me, part):
                whole = await self.controller.heldout_fetched(me, part, attempt, self.missing(refs))
                part, attempt = (part + 1, 0) if whole else (part, attempt + 1)
        while (batch := await self.controller.next_batch(me, step + 1)) is not None:
            step, again, attempt = batch.step, batch, 0
            while again is not None:
                batch = again
                await self.pause()
                again = await self.controller.fetched(me, batch.step, attempt, self.missing(batch.micro_batches))
                attempt += 1
            await ahead.put(batch)
        await ahead.put(None)

    def missing(self, refs: MicroBatches) -> list[SampleId]:
        keys = {ref.key: ref.sample for micro in refs for ref in micro}
        if keys and self.strikes("object", 0.1):
            Store.keys.discard(self.chance.choice(list(keys)))
        return [sample for key, sample in keys.items() if key not in Store.keys]

    async def save(self, me: RankId, step: int) -> None:
        tell = not self.strikes("rank", 0.1)
        await save(self.controller, me, step, tell)
        if not tell:
            raise Killed
        self.saved_step = step


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "StoreClient", Store)
    monkeypatch.setattr(objects, "_WORKER_ENDS_SECONDS", 0.05)
    monkeypatch.setattr(upkeep, "AUTOSCALE_SECONDS", 0.05)


@pytest.mark.parametrize("seed", range(30))
def test_every_run_ends_and_is_proven(seed: int, tmp_path: Path) -> None:
    async def play() -> None:
        Store.keys, run = set(), Run(seed, tmp_path)
        try:
            async with asyncio.timeout(SECONDS):
                await run.whole()
        except TimeoutError:
            buffer = run.controller.buffer
            pytest.fail(f"it stands still: {buffer.ledger.counts()}, {buffer.credits}")

    asyncio.run(play())
    proof = verify_run(tmp_path)
    assert proof.violations == () and proof.finished
