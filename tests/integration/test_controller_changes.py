"""The controller while the run around it changes: sizes, generations of ranks, its own death, a store that was away."""

from __future__ import annotations

import asyncio
import random
import shutil
from dataclasses import replace

import pytest

from tests.integration.controller_harness import (
    drive,
    make,
    member,
    put_sample,
    rank,
    samples,
    save,
    seeded_batches,
    start,
    stored,
    worker,
)
from tests.journal import trained_batches
from torchspec.config.load import load_config
from torchspec.contracts import SampleId, WorkerReport
from torchspec.controller.steps import GroupEnded
from torchspec.controller.verify import verify_run
from torchspec.files import read_lines
from torchspec.shards import ShardFormula


def events(run_dir) -> list[str]:
    return [record["event"] for record in read_lines(run_dir / "ledger.jsonl")]


def journal(run_dir) -> dict[int, set[SampleId]]:
    assert verify_run(run_dir).violations == ()
    return {step: set(batch) for step, batch in trained_batches(run_dir / "ledger.jsonl").items()}


async def steps(controller, client, count: int, tell: bool = True) -> list:
    """Let rank 0 make ``count`` steps, each with a checkpoint where it says so; the samples of all of them."""
    me, refs = member(0, controller.buffer.generation), []
    for _ in range(count):
        batch = await controller.next_batch(me, controller._group._next_step[0])
        refs += [ref for micro in batch.micro_batches for ref in micro]
        assert await controller.fetched(me, batch.step, 0, []) is None
        await controller.step_done(me, batch.step, None)
        if batch.checkpoint:
            await save(controller, me, batch.step, tell)
    return refs


def test_a_lost_rank_costs_the_steps_since_the_checkpoint_and_no_batch_changes(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, heldout=2, training={"dp_size": 2}))
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(3)))
        for number in range(2):
            await controller.heldout_batches(member(number), 1)
        assert all(await asyncio.gather(*(controller.heldout_fetched(member(n), 1, 0, []) for n in range(2))))
        for step in (1, 2, 3):
            for number in range(2):
                assert (await controller.next_batch(member(number), step)).step == step
            await asyncio.gather(*(controller.fetched(member(n), step, 0, []) for n in range(2)))
            await asyncio.gather(*(controller.step_done(member(n), step, None) for n in range(2)))
            if step == 2:
                await save(controller, member(0), step)
        await controller.next_batch(member(0), 4)  # rank 1 dies here
        waiting = [asyncio.create_task(controller.fetched(member(0), 4, 0, []))]
        await asyncio.sleep(0)
        plan = await controller.open_group()
        assert (plan.generation, plan.training.dp_size, plan.resume.name) == (2, 2, "step_000002")
        with pytest.raises(GroupEnded):
            await waiting[0]
        with pytest.raises(GroupEnded):
            await controller.step_done(member(1), 4, None)
        for number in range(2):  # captured once more for the new ranks
            assert await controller.heldout_batches(member(number, 2), 1)
        assert all(await asyncio.gather(*(controller.heldout_fetched(member(n, 2), 1, 0, []) for n in range(2))))
        seen: dict = {}
        await asyncio.gather(*(rank(controller, client, n, seen) for n in range(2)))
        assert sorted(seen) == [3, 4, 5]
        await controller.finish()
        await pool
        assert controller.buffer.credits.used == 0

    asyncio.run(scenario())
    assert journal(tmp_path) == seeded_batches()
    assert events(tmp_path).count("resumed") == 1


def test_a_checkpoint_that_nobody_was_told_of_counts(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path))
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(3)))
        await steps(controller, client, 2, tell=False)  # saved, and dead before it could say so
        plan = await controller.open_group()
        assert plan.resume.name == "step_000002" and controller.buffer.ledger.committed_step == 2
        seen: dict = {}
        await rank(controller, client, 0, seen)
        assert sorted(seen) == [3, 4, 5]
        await controller.finish()
        await pool

    asyncio.run(scenario())
    assert journal(tmp_path) == seeded_batches()
    assert "resumed" not in events(tmp_path)


def test_another_size_trains_the_same_batches_in_the_new_layout(endpoint, client, tmp_path):
    """DP 1, then SP 2, then DP 2: what is stored in the old layout is captured again, what is formed is trained."""

    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, controller={"prefetch_steps": 1}))
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(4)))
        await steps(controller, client, 1)
        while controller.buffer.ledger.ready() < 4:  # one step is formed, the samples of the next are stored
            await asyncio.sleep(0.01)
        old = [r.ref for r in controller.buffer.ledger.records.values() if r.state == "stored"]
        await controller.scale_training({"attention_backend": "usp", "sp_ulysses_size": 2})
        formula = ShardFormula(2, 1, "zigzag", 7)
        assert controller.buffer.geometry.sharding == formula
        seen: dict = {}
        await rank(controller, client, 0, seen)  # ends by itself, after what was formed
        assert seen and all(ref.sharding is None for refs in seen.values() for ref in refs)
        assert not await controller.training_over()
        last = max(seen)
        if last % 2:
            await save(controller, member(0), last)
        plan = await controller.open_group()
        assert plan.resume.name == f"step_{last:06d}" and plan.training.world_size == 2
        for number in range(2):
            assert (await controller.next_batch(member(number, 2), last + 1)).step == last + 1
        refs = [ref for micro in controller._group._batches[last + 1][0].micro_batches for ref in micro]
        assert all(ref.sharding == formula and stored(client, ref) for ref in refs)
        for _ in range(500):
            if not any(stored(client, ref) for ref in old):
                break
            await asyncio.sleep(0.01)
        assert not any(stored(client, ref) for ref in old)
        await controller.scale_training({"dp_size": 2, "attention_backend": "flash", "sp_ulysses_size": 1})
        await controller.open_group()
        seen = {}
        await asyncio.gather(*(rank(controller, client, n, seen) for n in range(2)))
        await controller.finish()
        await pool
        assert controller.buffer.credits.used == 0

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert journal(tmp_path) == seeded_batches()
    training = load_config(tmp_path / "config.yaml").training
    assert (training.dp_size, training.attention_backend, training.sp_size) == (2, "flash", 1)


def test_a_size_that_cannot_be_changes_nothing(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path))
        with pytest.raises(ValueError, match=r"training\.batch_size \(4\) is smaller than training\.dp_size \(5\)"):
            await controller.scale_training({"dp_size": 5})
        assert controller.config.training.dp_size == 1 and not (tmp_path / "config.yaml").exists()
        assert not controller._group.closing
        await controller.finish()

    asyncio.run(scenario())


def test_workers_come_and_go(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path))
        assert await controller.wanted(None) == 1
        waiting = asyncio.create_task(controller.wanted(1))
        leases = await controller.lease("w0", 2, WorkerReport("w0"))
        await controller.scale_inference(3)
        assert await waiting == 3
        assert load_config(tmp_path / "config.yaml").inference.workers == 3
        await controller.drain("w0")
        assert await controller.lease("w0", 2, WorkerReport("w0")) == []
        for lease in leases:  # what it has, it finishes
            await controller.publish("w0", *await asyncio.to_thread(put_sample, client, lease))
        await controller.worker_left("w0")
        status = await controller.status()
        assert (status.workers_wanted, status.workers, status.samples["stored"]) == (3, (), 2)
        await controller.finish()

    asyncio.run(scenario())


def test_a_dead_controller_goes_on_from_the_newest_checkpoint_with_the_newest_sizes(endpoint, client, tmp_path):
    """What the first one still held is gone from the store, and what its workers still publish is thrown away."""

    async def first() -> tuple[list, list]:
        controller = await start(make(endpoint, tmp_path))
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(3)))
        await steps(controller, client, 3)
        pool.cancel()
        await controller.scale_inference(2)
        await controller.scale_training({"dp_size": 2})
        leases = await controller.lease("w1", 2, WorkerReport("w1"))
        old = [r.ref for r in controller.buffer.ledger.records.values() if r.ref and r.state in ("stored", "assigned")]
        assert old and leases and all(stored(client, ref) for ref in old)
        return leases, old

    async def second(name: str, leases: list, old: list) -> dict:
        controller = make(endpoint, tmp_path, name=name)
        early = asyncio.create_task(controller.lease("w2", 1, WorkerReport("w2")))
        await asyncio.sleep(0)
        await controller.begin(1)
        assert not any(stored(client, ref) for ref in old)
        late, answer = await asyncio.to_thread(put_sample, client, leases[0])
        await controller.publish("w1", late, answer)
        assert not stored(client, late)
        (lease,) = await early
        prefixes = {one.key.rpartition("/")[0] for one in (lease, *leases)}
        assert len(prefixes) == 2 and all(prefix.startswith(f"{name}/") for prefix in prefixes)
        plan = await controller.open_group()
        assert plan.training.dp_size == 2 and plan.resume.name == "step_000002"
        assert controller.pool.wanted == 2
        assert await controller.worker_lost("w2", True) == 1
        return await drive(controller, client, 2, 2)

    async def both() -> dict:
        leases, old = await first()
        return await second(leases[0].key.split("/")[0], leases, old)

    seen = asyncio.run(both())
    assert sorted(seen) == [3, 4, 5]
    assert journal(tmp_path) == seeded_batches()


def test_a_store_that_was_away_is_held_against_nobody(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, controller={"max_attempts": 2}))
        leases = await controller.lease("w0", 8, WorkerReport("w0"))
        for lease in leases[:4]:
            await controller.publish("w0", *await asyncio.to_thread(put_sample, client, lease))
        batch = await controller.next_batch(member(0), 1)  # formed before, fetched after
        refs = [ref for micro in batch.micro_batches for ref in micro]
        await controller.publish("w0", *await asyncio.to_thread(put_sample, client, leases[4]))
        await controller.store_away()
        waiting = asyncio.create_task(controller.lease("w1", 8, WorkerReport("w1")))
        for lease, kind in zip(leases[5:], ("no_store", "no_room", "no_store"), strict=True):
            await controller.fail("w0", lease.sample, lease.key, "the store is away", kind)
        for ref in refs:
            client.remove(ref.key, ref.tensors)
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await controller.store_back()
        again = await waiting
        assert {lease.sample for lease in again} == {lease.sample for lease in leases[4:]}
        assert not controller.buffer.ledger.rejected
        for lease in again:
            await controller.publish("w1", *await asyncio.to_thread(put_sample, client, lease))
        seen: dict = {}
        pool = asyncio.create_task(worker(controller, client, "w2", random.Random(8)))
        replacement = await controller.fetched(member(0), 1, 0, [ref.sample for ref in refs])
        assert {r.sample for m in replacement.micro_batches for r in m} == {ref.sample for ref in refs}
        assert await controller.fetched(member(0), 1, 1, []) is None
        await controller.step_done(member(0), 1, None)
        await rank(controller, client, 0, seen)
        await controller.finish()
        await pool

    asyncio.run(scenario())
    assert journal(tmp_path) == seeded_batches()


def test_a_step_whose_sample_is_lost_after_a_stop_is_still_made(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, heldout=1))
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(9)))
        (held,) = [ref for micro in await controller.heldout_batches(member(0), 1) for ref in micro]
        batch = await controller.next_batch(member(0), 1)
        await controller.request_stop("test")
        samples_before = controller.buffer.ledger.counts()["pending"]
        assert not await controller.heldout_fetched(member(0), 1, 0, [held.sample])
        assert await controller.heldout_batches(member(0), 1)
        assert await controller.heldout_fetched(member(0), 1, 1, [])
        lost = batch.micro_batches[0][0]
        client.remove(lost.key, lost.tensors)
        replacement = await controller.fetched(member(0), batch.step, 0, [lost.sample])
        assert all(stored(client, ref) for micro in replacement.micro_batches for ref in micro)
        assert await controller.fetched(member(0), batch.step, 1, []) is None
        await controller.step_done(member(0), batch.step, None)
        assert controller.buffer.ledger.counts()["pending"] == samples_before  # and no new sample was begun
        await controller.finish()
        await pool

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_poison_prompt_is_rejected_and_its_neighbours_are_not(endpoint, client, tmp_path):
    """A sample kills every worker that holds it, with whatever that worker holds besides."""

    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, prompts=6, training={"epochs": 1}))
        poison = controller.buffer.ledger.sample_at(2)
        deaths: list[int] = []

        async def mortal(name: str) -> bool:
            while leases := await controller.lease(name, 4, WorkerReport(name)):
                if any(lease.sample == poison for lease in leases):
                    deaths.append(len(leases))
                    await controller.worker_lost(name, True)
                    return True
                for lease in leases:
                    await controller.publish(name, *await asyncio.to_thread(put_sample, client, lease))
            return False

        async def pool() -> None:
            number = 0
            while await mortal(f"w{number}"):
                number += 1

        working, seen = asyncio.create_task(pool()), {}
        await rank(controller, client, 0, seen)
        await controller.finish()
        await working
        assert deaths == [4, 4, 1]
        assert [r.sample for r in controller.buffer.ledger.rejected.values()] == [poison]
        assert sum(map(len, samples(seen).values())) == 5
        assert controller.buffer.credits.used == 0

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_leases_whose_answer_was_lost_go_back(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path))
        kept, lost = await controller.lease("w0", 2, WorkerReport("w0"))
        (again,) = await controller.lease("w0", 1, WorkerReport("w0"), held=(kept.key,))
        assert again.sample == lost.sample and again.key != lost.key
        ref, answer = await asyncio.to_thread(put_sample, client, kept)
        await controller.publish("w0", ref, answer)
        await controller.publish("w0", ref, answer)  # said twice, because the first reply was lost
        assert stored(client, ref) and controller.buffer.ledger.counts()["stored"] == 1
        await controller.finish()

    asyncio.run(scenario())


def test_after_a_rewind_the_front_of_the_line_gets_room_from_behind(endpoint, client, tmp_path):
    """The store has room for six samples, and holds six later ones when the first four must be captured again."""

    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path, credit_bytes=6 * 3 * 4096, controller={"reorder_window": 12}))
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(3)))
        await steps(controller, client, 1)
        while controller.buffer.ledger.counts()["stored"] + controller.buffer.ledger.counts()["assigned"] < 6:
            await asyncio.sleep(0.01)
        await controller.open_group()
        assert controller.buffer.ledger.trained_step == 0
        seen: dict = {}
        await rank(controller, client, 0, seen)
        await controller.finish()
        await pool
        assert samples(seen) == seeded_batches()
        assert controller.buffer.credits.used == 0

    asyncio.run(asyncio.wait_for(scenario(), 60))
    shutil.rmtree(tmp_path / "checkpoints")


def test_a_put_that_ends_after_its_lease_was_given_to_another_leaves_the_store(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = await start(make(endpoint, tmp_path))
        leases = await controller.lease("w0", 3, WorkerReport("w0"))
        kept, _ = await asyncio.to_thread(put_sample, client, leases[0])
        await controller.publish("w0", kept, None)
        under_way, _ = await asyncio.to_thread(put_sample, client, leases[1])
        late = replace(leases[2], key=f"{leases[2].key}0")
        late, _ = await asyncio.to_thread(put_sample, client, late)
        for _ in range(2):
            assert stored(client, late), "it may just have been on its way"
            await controller.buffer.sweep()
        assert not stored(client, late) and stored(client, kept) and stored(client, under_way)
        assert controller.observer.messages[-1] == "removed 3 objects from the store that belonged to no sample"

    asyncio.run(scenario())
