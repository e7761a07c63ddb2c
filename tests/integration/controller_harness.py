"""A controller in this process, with workers and ranks that follow a script, on a real store."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np

from torchspec.config.load import parse_config
from torchspec.contracts import Answer, Lease, RankId, SampleId, SampleRef, WorkerReport
from torchspec.controller.controller import Controller
from torchspec.controller.spec import ControllerSpec
from torchspec.data.masks import pack_mask
from torchspec.data.order import epoch_order
from torchspec.data.prompt_set import PromptSet
from torchspec.run_folder import RunFolder
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry, shard_tensors
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.training.checkpoint import point

GEOMETRY = SampleGeometry(num_aux=3, hidden_size=8, dtype="float32")
VOCAB = 64


def prompt_set(count: int, name: str = "p") -> PromptSet:
    """Unanswered prompts of three tokens, with room for six."""
    return PromptSet(
        ids=[f"{name}{i}" for i in range(count)],
        token_ids=np.array([[1, 2, 3 + i % 50] for i in range(count)], dtype=np.int32).reshape(-1),
        offsets=np.arange(count + 1) * 3,
        packed_masks=np.zeros(0, dtype=np.uint8),
        max_answer_tokens=np.full(count, 6, dtype=np.int32),
        rejected=[],
        content_hash=name,
    )


def make(endpoint: StoreEndpoint, run_dir: Path, **options: Any) -> Controller:
    return Controller(make_spec(endpoint, run_dir, **options))


def make_spec(
    endpoint: StoreEndpoint, run_dir: Path, prompts: int = 10, heldout: int = 0, name: str = "", **overrides: Any
) -> ControllerSpec:
    tree = {
        "run": {"name": name or f"r{random.getrandbits(32):x}", "seed": 3},
        "target": {"path": "unused"},
        "training": {"batch_size": 4, "epochs": 2, "micro_batch_size": 2, **overrides.pop("training", {})},
        "controller": {"reorder_window": 8, "max_attempts": 3, **overrides.pop("controller", {})},
        "data": {"vocab_prompts": 4, **overrides.pop("data", {})},
        "checkpoint": {"every_steps": 2},
        "evaluation": {
            "heldout": "unused" if heldout else None,
            "every_steps": 2,
            **overrides.pop("evaluation", {}),
        },
        "monitor": overrides.pop("monitor", {}),
    }
    return ControllerSpec(
        config=parse_config(tree),
        train=prompt_set(prompts),
        heldout=prompt_set(heldout, "h") if heldout else None,
        halo=7,
        vocab_size=VOCAB,
        target_fingerprint="target",
        end_token_ids=(0,),
        endpoint=endpoint,
        run_dir=run_dir,
        **{"credit_bytes": 1 << 20, "geometry": GEOMETRY, "draft_vocab_size": 16, **overrides},
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
    put = client.put(lease.key, buffer, lease.sharding)
    ref = SampleRef(lease.sample, lease.key, len(ids), mask, tensors, put.result(), "post_norm", lease.sharding)
    return ref, answer


async def start(controller: Controller, running: int | None = None) -> Controller:
    """With its first group of ranks."""
    await controller.begin(running)
    await controller.open_group()
    return controller


def member(number: int, generation: int = 1) -> RankId:
    return RankId(generation, number)


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


def stored(client: HiddenStateStore, ref: SampleRef) -> bool:
    names = ref.tensors if ref.sharding is None else shard_tensors(ref.tensors, ref.sharding, ref.num_tokens, 0)
    return client.exists(ref.key, names)


async def rank(controller: Controller, client: HiddenStateStore, number: int, seen: dict) -> None:
    """Fetches for real; reports what is missing; keeps every step's samples."""
    status = await controller.status()
    me = member(number, status.generation)
    here = isinstance(controller, Controller)  # and not an actor that does the same
    steps = itertools.count(controller._group._next_step[number] if here else status.step + 1)
    while (batch := await controller.next_batch(me, next(steps))) is not None:
        attempts = itertools.count()
        while batch is not None:
            current = batch
            refs = [ref for micro in batch.micro_batches for ref in micro]
            missing = [r.sample for r in refs if not await asyncio.to_thread(stored, client, r)]
            batch = await controller.fetched(me, batch.step, next(attempts), missing)
        seen.setdefault(current.step, []).extend(refs)
        await controller.step_done(me, current.step, None)
        if current.checkpoint and number == 0:
            await save(controller, me, current.step)


async def save(controller: Controller, me: RankId, step: int, tell: bool = True) -> None:
    """What a checkpoint is to the controller."""
    folder = controller._folder.checkpoint(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ledger.json").write_text(await controller.ledger_snapshot(me, step))
    point(folder.parent, "latest", folder)
    if tell:
        await controller.committed(me, step, str(folder), False, "")


def batch_is_saved(run_dir: Path, step: int) -> bool:
    return RunFolder(run_dir).checkpoint(step).exists()


async def drive(controller: Controller, client: HiddenStateStore, workers: int, ranks: int, seed: int = 0) -> dict:
    seen: dict[int, list[SampleRef]] = {}
    await controller.begin(None)
    if not (await controller.status()).generation:
        await controller.open_group()
    pool = [asyncio.create_task(worker(controller, client, f"w{i}", random.Random(seed + i))) for i in range(workers)]
    vocab = await controller.draft_vocab()
    assert len(vocab) == 16 and 0 in vocab.target_ids
    await asyncio.gather(*(rank(controller, client, i, seen) for i in range(ranks)))
    await controller.finish()
    await asyncio.gather(*pool)
    return seen


def seeded_batches(prompts: int = 10, epochs: int = 2) -> dict[int, set[SampleId]]:
    """Step to what it trains, whatever happens."""
    line = [SampleId(e, int(p)) for e in range(epochs) for p in epoch_order(3, e, prompts)]
    return {i + 1: set(line[4 * i : 4 * i + 4]) for i in range(-(-len(line) // 4))}


def samples(seen: dict[int, list[SampleRef]]) -> dict[int, set[SampleId]]:
    return {step: {r.sample for r in refs} for step, refs in seen.items()}
