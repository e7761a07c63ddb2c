"""The controller against a real Mooncake store, with workers and ranks that behave badly in every way they can."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import numpy as np
import pytest

from torchspec.config.load import parse_config
from torchspec.contracts import HELDOUT_EPOCH, Answer, Lease, SampleId, SampleRef, WorkerReport, pack_mask, unpack_mask
from torchspec.controller.controller import Controller, ControllerSpec
from torchspec.controller.journal import trained_batches
from torchspec.controller.verify import EpochCount, verify_run
from torchspec.data.order import epoch_order
from torchspec.data.prompt_set import PromptSet
from torchspec.store.geometry import SampleGeometry
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.store.master import MooncakeMaster
from torchspec.store.node import StoreNode

GEOMETRY = SampleGeometry(num_aux=3, hidden_size=8, dtype="float32")
VOCAB = 64


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    master = MooncakeMaster(tmp_path_factory.mktemp("store") / "master.log")
    node = StoreNode(master.endpoint, 64 << 20)
    yield master.endpoint
    node.close()
    master.stop()


@pytest.fixture
def client(endpoint):
    store = HiddenStateStore(endpoint, 8 << 20)
    yield store
    store.close()


def prompt_set(count: int, name: str = "p") -> PromptSet:
    """Unanswered prompts of three tokens, with room for six."""
    return PromptSet(
        ids=[f"{name}{i}" for i in range(count)],
        token_ids=np.array([[1, 2, 3 + i % 50] for i in range(count)], dtype=np.int32).reshape(-1),
        offsets=np.arange(count + 1) * 3,
        packed_masks=np.zeros(0, dtype=np.uint8),
        room=np.full(count, 6, dtype=np.int32),
        rejected=[],
        content_hash=name,
    )


def make(endpoint, run_dir: Path, **options) -> Controller:
    return Controller(make_spec(endpoint, run_dir, **options))


def make_spec(
    endpoint, run_dir: Path, prompts: int = 10, heldout: int = 0, name: str = "", **overrides
) -> ControllerSpec:
    tree = {
        "run": {"name": name or f"r{random.getrandbits(32):x}", "seed": 3},
        "target": {"path": "unused"},
        "training": {"batch_size": 4, "epochs": 2, "micro_batch_size": 2, **overrides.pop("training", {})},
        "controller": {"reorder_window": 8, "max_attempts": 3, **overrides.pop("controller", {})},
        "draft": {"vocab_size": 16, "vocab_prompts": 4},
        "checkpoint": {"every_steps": 2},
        "evaluation": {
            "heldout": "unused" if heldout else None,
            "every_steps": 2,
            **overrides.pop("evaluation", {}),
        },
    }
    return ControllerSpec(
        config=parse_config(tree),
        train=prompt_set(prompts),
        heldout=prompt_set(heldout, "h") if heldout else None,
        geometry=GEOMETRY,
        vocab_size=VOCAB,
        end_token_ids=(0,),
        endpoint=endpoint,
        run_dir=run_dir,
        **{"credit_bytes": 1 << 20, **overrides},
    )


def put_sample(client: HiddenStateStore, lease: Lease) -> tuple[SampleRef, Answer | None]:
    """What a worker does, with an answer that is a function of the prompt."""
    ids = np.frombuffer(lease.input_ids, dtype="<i4")
    answer = None
    if lease.max_new_tokens:
        written = tuple(int(i) for i in (ids[-1] + np.arange(1, 5)) % VOCAB)
        answer = Answer(lease.sample.prompt, written, "text", "stop")
        mask = pack_mask([0] * len(ids) + [1] * (len(written) - 1))
        ids = np.concatenate([ids, written[:-1]])
    else:
        mask = lease.loss_mask
    tensors = GEOMETRY.tensors(len(ids))
    buffer = client.allocate(tensors)
    for view in buffer.views.values():
        view.fill_(1)
    size = client.put(lease.key, buffer).result()
    return SampleRef(lease.sample, lease.key, len(ids), mask, tensors, size, "post_norm"), answer


async def worker(controller: Controller, client: HiddenStateStore, name: str, chance: random.Random) -> None:
    """Completes its leases out of order and fails some of them once."""
    failed: set[SampleId] = set()
    while leases := await controller.lease(name, 3, WorkerReport(name)):
        chance.shuffle(leases)
        for lease in leases:
            if chance.random() < 0.2 and lease.sample not in failed:
                failed.add(lease.sample)
                await controller.fail(name, lease.sample, lease.key, "unlucky", "retry")
                continue
            ref, answer = await asyncio.to_thread(put_sample, client, lease)
            await controller.publish(name, ref, answer)


async def rank(controller: Controller, client: HiddenStateStore, number: int, seen: dict) -> None:
    """Fetches for real; reports what is missing; keeps every step's samples."""
    while (batch := await controller.next_batch(number)) is not None:
        while batch is not None:
            current = batch
            refs = [ref for micro in batch.micro_batches for ref in micro]
            missing = [r.sample for r in refs if not await asyncio.to_thread(client.exists, r.key, r.tensors)]
            batch = await controller.fetched(number, batch.step, missing)
        seen.setdefault(current.step, []).extend(refs)
        await controller.step_done(number, current.step, None)
        if current.checkpoint and number == 0:
            await controller.ledger_snapshot(current.step)
            await controller.committed(current.step, f"step_{current.step}", False)


async def drive(controller: Controller, client: HiddenStateStore, workers: int, ranks: int, seed: int = 0) -> dict:
    seen: dict[int, list[SampleRef]] = {}
    pool = [asyncio.create_task(worker(controller, client, f"w{i}", random.Random(seed + i))) for i in range(workers)]
    vocab = await controller.draft_vocab()
    assert len(vocab) == 16 and 0 in vocab.target_ids
    await asyncio.gather(*(rank(controller, client, i, seen) for i in range(ranks)))
    await controller.finish()
    await asyncio.gather(*pool)
    return seen


def samples(seen: dict[int, list[SampleRef]]) -> dict[int, set[SampleId]]:
    return {step: {r.sample for r in refs} for step, refs in seen.items()}


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (3, 1), (2, 2)])
def test_batches_are_the_seeded_order_whoever_works(endpoint, client, tmp_path, workers, ranks):
    controller = make(endpoint, tmp_path, training={"dp_size": ranks})
    seen = asyncio.run(drive(controller, client, workers, ranks, seed=workers))
    line = [SampleId(e, int(p)) for e in range(2) for p in epoch_order(3, e, 10)]
    assert samples(seen) == {i + 1: set(line[4 * i : 4 * i + 4]) for i in range(5)}
    assert {s: set(b) for s, b in trained_batches(tmp_path / "ledger.jsonl").items()} == samples(seen)
    verdict = verify_run(tmp_path)
    assert verdict.violations == () and verdict.steps == 5 and sum(e.trained for e in verdict.epochs) == 20
    assert controller.credits.used == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sorted(a["id"] for a in answers) == sorted(f"p{i}" for i in range(10))


def test_objects_are_gone_from_the_store_after_their_step(endpoint, client, tmp_path):
    controller = make(endpoint, tmp_path)
    seen = asyncio.run(drive(controller, client, 1, 1))
    assert not any(client.exists(r.key, r.tensors) for refs in seen.values() for r in refs)


def test_credits_bound_what_is_leased(endpoint, client, tmp_path):
    """With room for one batch and a bit, the run still ends, and never holds more than its credits."""

    async def scenario() -> None:
        size = GEOMETRY.stored_bytes(9)
        controller = make(endpoint, tmp_path, credit_bytes=5 * size)
        leases = await controller.lease("w0", 100, WorkerReport("w0"))
        assert len(leases) == 5 and controller.credits.used == 5 * size
        assert await controller.worker_lost("w0") == 5
        await drive(controller, client, 2, 1)
        assert controller.credits.used == 0

    asyncio.run(scenario())


def test_a_dead_workers_leases_are_given_to_others_and_its_late_puts_are_thrown_away(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = make(endpoint, tmp_path)
        stale = await controller.lease("dead", 3, WorkerReport("dead"))
        assert await controller.worker_lost("dead") == 3
        assert await controller.lease("dead", 3, WorkerReport("dead")) == []
        late, answer = await asyncio.to_thread(put_sample, client, stale[0])
        await controller.publish("dead", late, answer)
        assert not client.exists(late.key, late.tensors)
        seen = await drive(controller, client, 1, 1)
        assert sum(len(refs) for refs in seen.values()) == 20

    asyncio.run(scenario())


def test_a_lost_object_is_captured_again_for_the_same_step(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = make(endpoint, tmp_path, training={"dp_size": 2})
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(1)))
        first = await controller.next_batch(0)
        refs = [ref for micro in first.micro_batches for ref in micro]
        victim = refs[0]
        client.remove(victim.key, victim.tensors)
        seen: dict = {}

        async def rank_zero() -> None:
            replacement = await controller.fetched(0, 1, [victim.sample])
            again = [ref for micro in replacement.micro_batches for ref in micro]
            assert {r.sample for r in again} == {r.sample for r in refs}
            renewed = next(r for r in again if r.sample == victim.sample)
            assert renewed.key != victim.key and client.exists(renewed.key, renewed.tensors)
            assert await controller.fetched(0, 1, []) is None
            await controller.step_done(0, 1, None)
            await rank(controller, client, 0, seen)

        await asyncio.gather(rank_zero(), rank(controller, client, 1, seen))
        await controller.finish()
        await pool
        assert len(trained_batches(tmp_path / "ledger.jsonl")) == 5

    asyncio.run(scenario())


def test_a_poison_prompt_is_rejected_by_name_and_its_batch_filled_with_the_next(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = make(endpoint, tmp_path, prompts=6, training={"epochs": 1})
        poison = controller.ledger.sample_at(1)

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
        controller = make(endpoint, tmp_path, heldout=3)
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(5)))
        micro_batches = await controller.heldout_batches(0)
        assert sorted(r.sample for m in micro_batches for r in m) == [SampleId(HELDOUT_EPOCH, i) for i in range(3)]
        assert await controller.heldout_fetched(0, [])
        seen: dict = {}
        await rank(controller, client, 0, seen)
        await controller.finish()
        await pool
        assert all(r.sample.epoch >= 0 for refs in seen.values() for r in refs)
        assert controller.credits.used == 0

    asyncio.run(scenario())


def test_a_stop_gives_held_out_batches_to_all_ranks_or_to_none(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = make(endpoint, tmp_path, heldout=2, training={"dp_size": 2})
        leases = await controller.lease("w0", 2, WorkerReport("w0"))
        waiting = asyncio.create_task(controller.heldout_batches(0))
        await controller.publish("w0", *await asyncio.to_thread(put_sample, client, leases[0]))
        await controller.request_stop("test")
        assert await waiting == ()
        await controller.publish("w0", *await asyncio.to_thread(put_sample, client, leases[1]))
        assert await controller.heldout_batches(1) == ()

    asyncio.run(scenario())


def test_every_scheduled_checkpoint_is_evaluated(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = make(endpoint, tmp_path, heldout=1, evaluation={"every_steps": 3})
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(7)))
        flags = {}
        while (batch := await controller.next_batch(0)) is not None:
            flags[batch.step] = batch.checkpoint, batch.evaluate
            assert await controller.fetched(0, batch.step, []) is None
            await controller.step_done(0, batch.step, None)
        scheduled, evaluated = (True, True), (False, True)
        assert flags == {1: (False, False), 2: scheduled, 3: evaluated, 4: scheduled, 5: scheduled}
        await controller.finish()
        await pool

    asyncio.run(scenario())


def test_a_stop_ends_all_ranks_at_the_same_step_and_a_resume_goes_on_from_there(endpoint, client, tmp_path):
    async def first_half() -> tuple[str, dict]:
        controller = make(endpoint, tmp_path)
        seen: dict = {}
        pool = asyncio.create_task(worker(controller, client, "w0", random.Random(2)))
        await controller.draft_vocab()
        batch = await controller.next_batch(0)
        await controller.fetched(0, batch.step, [])
        await controller.request_stop("test")
        seen[batch.step] = [r for m in batch.micro_batches for r in m]
        await controller.step_done(0, batch.step, None)
        await rank(controller, client, 0, seen)
        last = max(seen)
        snapshot = await controller.ledger_snapshot(last)
        await controller.committed(last, "somewhere", False)
        await controller.finish()
        await pool
        return snapshot, seen

    snapshot, before = asyncio.run(first_half())
    assert max(before) <= 2

    async def second_half() -> dict:
        controller = make(endpoint, tmp_path, resumed=True, ledger_snapshot=snapshot)
        return await drive(controller, client, 2, 1)

    after = asyncio.run(second_half())
    together = samples(before) | samples(after)
    line = [SampleId(e, int(p)) for e in range(2) for p in epoch_order(3, e, 10)]
    assert set(before).isdisjoint(after)
    assert together == {i + 1: set(line[4 * i : 4 * i + 4]) for i in range(5)}
    verdict = verify_run(tmp_path)
    assert verdict.violations == () and (verdict.steps, verdict.resumes) == (5, 1)


def test_answers_are_written_once_and_later_epochs_only_prefill(endpoint, client, tmp_path):
    async def scenario() -> None:
        controller = make(endpoint, tmp_path, prompts=4)
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
