"""The controller against a real Mooncake store, with workers and ranks that behave badly in every way they can."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from tests.integration.controller_harness import (
    GEOMETRY,
    batch_is_saved,
    drive,
    make,
    member,
    put_sample,
    rank,
    samples,
    save,
    seeded_batches,
    start,
    worker,
)
from tests.journal import trained_batches
from torchspec.contracts import HELDOUT_EPOCH, SampleId, WorkerReport
from torchspec.controller.verify import EpochCount, verify_run
from torchspec.data.masks import unpack_mask
from torchspec.files import read_lines


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (3, 1), (2, 2)])
def test_batches_are_the_seeded_order_whoever_works(endpoint, client, tmp_path, workers, ranks):
    controller = make(endpoint, tmp_path, training={"dp_size": ranks})
    seen = asyncio.run(drive(controller, client, workers, ranks, seed=workers))
    assert samples(seen) == seeded_batches()
    assert {s: set(b) for s, b in trained_batches(tmp_path / "ledger.jsonl").items()} == samples(seen)
    verdict = verify_run(tmp_path)
    assert verdict.violations == () and verdict.steps == 5 and sum(e.trained for e in verdict.epochs) == 20
    assert controller.buffer.credits.used == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(a["id"] for a in answers) == sorted(f"p{i}" for i in range(10))


def test_objects_are_gone_from_the_store_after_their_step(endpoint, client, tmp_path):
    controller = make(endpoint, tmp_path)
    seen = asyncio.run(drive(controller, client, 1, 1))
    assert not any(client.exists(r.key, r.tensors) for refs in seen.values() for r in refs)


def test_the_journal_is_on_the_disk_before_a_checkpoint_has_its_ledger(endpoint, client, tmp_path, monkeypatch):
    """A machine that ends suddenly after a checkpoint leaves a journal that knows the checkpoint's step."""
    synced: dict[str, str] = {}
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced[path.name] = path.read_text() if path.is_file() else ""

    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, training={"dp_size": 2}))
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(1)))
        for number in (0, 1):
            assert (await controller.next_batch(member(number), 1)).step == 1
        await asyncio.gather(*(controller.fetched(member(number), 1, 0, []) for number in (0, 1)))
        await controller.step_done(member(0), 1, None)
        snapshot = asyncio.create_task(controller.ledger_snapshot(member(0), 1))
        await asyncio.sleep(0.05)
        assert not snapshot.done(), "the journal does not have the step yet"
        await controller.step_done(member(1), 1, None)
        assert json.loads(await snapshot)["step"] == 1
        (tmp_path / "kept.jsonl").write_text(synced["ledger.jsonl"])
        pool.cancel()
        await controller.finish()

    monkeypatch.setattr(os, "fsync", record)
    asyncio.run(scenario())
    assert list(trained_batches(tmp_path / "kept.jsonl")) == [1]


def test_credits_bound_what_is_leased(endpoint, client, tmp_path):
    """With room for one batch and a bit, the run still ends, and never holds more than its credits."""

    async def scenario() -> None:
        size = GEOMETRY.stored_bytes(9)
        controller = await start(make(endpoint, tmp_path, credit_bytes=5 * size))
        leases = await controller.lease("w0", 100, WorkerReport("w0"))
        assert len(leases) == 5 and controller.buffer.credits.used == 5 * size
        assert await controller.worker_lost("w0", True) == 5
        await drive(controller, client, 2, 1)
        assert controller.buffer.credits.used == 0

    asyncio.run(scenario())


def test_a_dead_workers_leases_are_given_to_others_and_its_late_puts_are_thrown_away(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path))
        stale = await controller.lease("dead", 3, WorkerReport("dead"))
        assert await controller.worker_lost("dead", True) == 3
        assert await controller.lease("dead", 3, WorkerReport("dead")) == []
        late, answer = await asyncio.to_thread(put_sample, client, stale[0])
        await controller.publish("dead", late, answer)
        assert not client.exists(late.key, late.tensors)
        seen = await drive(controller, client, 1, 1)
        assert sum(len(refs) for refs in seen.values()) == 20

    asyncio.run(scenario())


def test_a_lost_object_is_captured_again_for_the_same_step(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, training={"dp_size": 2}))
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(1)))
        first = await controller.next_batch(member(0), 1)
        refs = [ref for micro in first.micro_batches for ref in micro]
        victim = refs[0]
        client.remove(victim.key, victim.tensors)
        seen: dict = {}

        async def rank_zero() -> None:
            replacement = await controller.fetched(member(0), 1, 0, [victim.sample])
            again = [ref for micro in replacement.micro_batches for ref in micro]
            assert {r.sample for r in again} == {r.sample for r in refs}
            renewed = next(r for r in again if r.sample == victim.sample)
            assert renewed.key != victim.key and client.exists(renewed.key, renewed.tensors)
            assert await controller.fetched(member(0), 1, 1, []) is None
            await controller.step_done(member(0), 1, None)
            await rank(controller, client, 0, seen)

        await asyncio.gather(rank_zero(), rank(controller, client, 1, seen))
        await controller.finish()
        await pool
        assert len(trained_batches(tmp_path / "ledger.jsonl")) == 5

    asyncio.run(scenario())


def test_a_poison_prompt_is_rejected_by_name_and_its_batch_filled_with_the_next(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, prompts=6, training={"epochs": 1}))
        poison = controller.buffer.ledger.sample_at(1)

        async def picky() -> None:
            while leases := await controller.lease("w0", 2, WorkerReport("w0")):
                for lease in leases:
                    if lease.sample == poison:
                        await controller.fail("w0", lease.sample, lease.key, "engine choked", "retry")
                    else:
                        await controller.publish("w0", *await asyncio.to_thread(put_sample, client, lease))

        seen: dict = {}
        pool = asyncio.create_task(picky())
        await rank(controller, client, 0, seen)
        await controller.finish()
        await pool
        assert [len(refs) for _, refs in sorted(seen.items())] == [4, 1]
        rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
        assert [r["id"] for r in rejected] == [f"p{poison.prompt} (epoch 0)"]
        assert "engine choked" in rejected[0]["reason"]
        verdict = verify_run(tmp_path)
        assert verdict.violations == () and verdict.epochs == (EpochCount(0, 6, 5, 5, 1),)

    asyncio.run(scenario())


def test_heldout_samples_come_first_and_never_enter_a_batch(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, heldout=3))
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(5)))
        micro_batches = await controller.heldout_batches(member(0), 1)
        assert sorted(r.sample for m in micro_batches for r in m) == [SampleId(HELDOUT_EPOCH, i) for i in range(3)]
        assert await controller.heldout_fetched(member(0), 1, 0, [])
        seen: dict = {}
        await rank(controller, client, 0, seen)
        await controller.finish()
        await pool
        assert all(r.sample.epoch >= 0 for refs in seen.values() for r in refs)
        assert controller.buffer.credits.used == 0

    asyncio.run(scenario())


def test_held_out_samples_come_in_windows_where_the_store_does_not_hold_them_all(endpoint, client, tmp_path):
    """Nine of them, and a batch of four, in a store of six and a half: two at a time, on two ranks."""

    async def take(controller, number: int, lost: set[SampleId]) -> list[SampleId]:
        taken: list[SampleId] = []
        part, attempts = 1, itertools.count()
        while micro_batches := await controller.heldout_batches(member(number), part):
            window = [ref.sample for micro in micro_batches for ref in micro]
            missing = [sample for sample in window if sample not in lost and sample.prompt == 4]
            lost.update(missing)
            if await controller.heldout_fetched(member(number), part, next(attempts), missing):
                taken += window
                part += 1
        assert micro_batches == ()
        return taken

    async def scenario() -> None:
        room = GEOMETRY.stored_bytes(9) * 13 // 2
        spec = {"heldout": 9, "credit_bytes": room, "training": {"dp_size": 2, "epochs": 1}}
        controller = await start(make(endpoint, tmp_path, **spec))
        pool = [asyncio.create_task(worker(controller, client, f"w{i}", random.Random(i))) for i in range(2)]
        lost: set[SampleId] = set()
        taken = await asyncio.gather(take(controller, 0, lost), take(controller, 1, lost))
        assert sorted(taken[0] + taken[1]) == [SampleId(HELDOUT_EPOCH, i) for i in range(9)] and lost
        assert controller.buffer.heldout.trained_step == 5
        seen: dict = {}
        await asyncio.gather(*(rank(controller, client, i, seen) for i in range(2)))
        assert samples(seen) == seeded_batches(epochs=1)
        await controller.finish()
        await asyncio.gather(*pool)

    asyncio.run(scenario())


@pytest.mark.parametrize("dies", [False, True])
def test_a_vocabulary_is_counted_over_more_than_the_store_holds(endpoint, client, tmp_path, dies):
    """Forty answers first, in a store of six samples; what makes room is prefilled again in the order of steps."""

    async def scenario() -> None:
        room = GEOMETRY.stored_bytes(9) * 13 // 2
        wide = {"controller": {"reorder_window": 50}, "data": {"vocab_prompts": 40}, "training": {"epochs": 1}}
        spec = {"prompts": 48, "heldout": 3, "name": f"counts-{dies}", "credit_bytes": room, **wide}
        controller = await start(make(endpoint, tmp_path, **spec))
        if dies:
            doomed = asyncio.create_task(worker(controller, client, "w0", random.Random(7)))
            while len(list(read_lines(tmp_path / "answers.jsonl"))) < 25:
                assert controller.counts.vocab is None
                await asyncio.sleep(0.01)
            doomed.cancel()
            controller = await start(make(endpoint, tmp_path, **spec))
        pool = [asyncio.create_task(worker(controller, client, f"w{i + 1}", random.Random(i))) for i in range(2)]
        async with asyncio.timeout(60):
            await controller.draft_vocab()
            assert len(list(read_lines(tmp_path / "answers.jsonl"))) >= 40
            assert controller.buffer.ledger.trained_step == 0
            me, parts = member(0, controller.buffer.generation), itertools.count(1)
            while micro_batches := await controller.heldout_batches(me, part := next(parts)):
                assert await controller.heldout_fetched(me, part, 0, [])
            assert micro_batches == ()
            seen: dict = {}
            await rank(controller, client, 0, seen)
        await controller.finish()
        await asyncio.gather(*pool)
        assert samples(seen) == seeded_batches(prompts=48, epochs=1)
        verdict = verify_run(tmp_path)
        assert verdict.proven and verdict.finished
        answered = [line["id"] for line in read_lines(tmp_path / "answers.jsonl")]
        assert len(answered) == len(set(answered)) == 48, "nothing is answered twice"

    asyncio.run(scenario())


def test_a_stop_gives_held_out_batches_to_all_ranks_or_to_none(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, heldout=2, training={"dp_size": 2}))
        leases = await controller.lease("w0", 2, WorkerReport("w0"))
        waiting = asyncio.create_task(controller.heldout_batches(member(0), 1))
        await controller.publish("w0", *await asyncio.to_thread(put_sample, client, leases[0]))
        await controller.request_stop("test")
        assert await waiting is None
        await controller.publish("w0", *await asyncio.to_thread(put_sample, client, leases[1]))
        assert await controller.heldout_batches(member(1), 1) is None

    asyncio.run(scenario())


def test_every_scheduled_checkpoint_is_evaluated(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, heldout=1, evaluation={"every_steps": 3}))
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(7)))
        flags = {}
        while (batch := await controller.next_batch(member(0), len(flags) + 1)) is not None:
            flags[batch.step] = batch.checkpoint, batch.evaluate
            assert await controller.fetched(member(0), batch.step, 0, []) is None
            await controller.step_done(member(0), batch.step, None)
        scheduled, evaluated = (True, True), (False, True)
        assert flags == {1: (False, False), 2: scheduled, 3: evaluated, 4: scheduled, 5: scheduled}
        await controller.finish()
        await pool

    asyncio.run(scenario())


def test_a_stop_ends_all_ranks_at_the_same_step_and_a_resume_goes_on_from_there(endpoint, client, tmp_path):
    async def first_half() -> dict:
        controller = await start(make(endpoint, tmp_path))
        seen: dict = {}
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(2)))
        await controller.draft_vocab()
        batch = await controller.next_batch(member(0), 1)
        await controller.fetched(member(0), batch.step, 0, [])
        await controller.request_stop("test")
        seen[batch.step] = [r for m in batch.micro_batches for r in m]
        await controller.step_done(member(0), batch.step, None)
        await rank(controller, client, 0, seen)
        last = max(seen)
        if not batch_is_saved(tmp_path, last):
            await save(controller, member(0), last)
        assert await controller.training_over()
        await controller.finish()
        await pool
        return seen

    before = asyncio.run(first_half())
    assert max(before) <= 2

    async def second_half() -> dict:
        return await drive(await start(make(endpoint, tmp_path)), client, 2, 1)

    after = asyncio.run(second_half())
    together = samples(before) | samples(after)
    assert set(before).isdisjoint(after)
    assert together == seeded_batches()
    verdict = verify_run(tmp_path)
    assert verdict.violations == () and (verdict.steps, verdict.resumes) == (5, 1)


def test_answers_are_written_once_and_later_epochs_only_prefill(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, prompts=4))
        leases = []
        while len(leases) < 8:
            for lease in await controller.lease("w0", 1, WorkerReport("w0")):
                leases.append(lease)
                await controller.publish("w0", *await asyncio.to_thread(put_sample, client, lease))
        assert [lease.max_new_tokens > 0 for lease in leases] == [True] * 4 + [False] * 4
        for lease in leases[4:]:
            ids = np.frombuffer(lease.input_ids, dtype="<i4")
            assert len(ids) == 6  # of the four tokens of the answer, the last is never read
            assert unpack_mask(lease.loss_mask, 6) == [False] * 3 + [True] * 3
        await controller.finish()

    asyncio.run(scenario())
