"""An inference worker as a Ray actor: from leases to samples in the store, with a reason for each one that failed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoTokenizer

from tests.integration.engine_harness import AUX_LAYERS
from tests.integration.store_harness import RunningStore
from torchspec.config.schema import Config
from torchspec.contracts import Lease, SampleId
from torchspec.data.masks import pack_mask, unpack_mask
from torchspec.inference.sglang_process import EngineSpec
from torchspec.inference.worker import InferenceWorker
from torchspec.shards import ShardFormula
from torchspec.store.geometry import shard_tensors
from torchspec.store.hidden_state_store import HiddenStateStore

BUFFER_BYTES = 4 << 20
CONVERSATION = list(range(1000, 1050))
FORMULA = ShardFormula(1, 2, "contiguous", 3)


@ray.remote
class Desk:
    """Hands out leases a few at a time and notes what comes back."""

    def __init__(self, leases: list[Lease]):
        self._leases, self._most = leases, 0
        self._open: set[str] = set()
        self.published: dict[str, tuple[Any, Any]] = {}
        self.failed: dict[str, tuple[str, str]] = {}
        self.timings: list[Any] = []

    async def lease(self, worker: str, max_count: int, report: Any) -> list[Lease]:
        given, self._leases = self._leases[: min(max_count, 2)], self._leases[min(max_count, 2) :]
        self._open |= {lease.key for lease in given}
        self._most = max(self._most, len(self._open))
        while not given and self._open:  # a long poll
            await asyncio.sleep(0.05)
        return given

    async def publish(self, worker: str, ref: Any, answer: Any, timing: Any) -> None:
        self._open.remove(ref.key)
        self.published[ref.key] = ref, answer
        self.timings.append(timing)

    async def fail(self, worker: str, sample: SampleId, key: str, reason: str, kind: str) -> None:
        self._open.remove(key)
        self.failed[key] = reason, kind

    async def outcome(self) -> tuple[dict, dict, int, list]:
        return self.published, self.failed, self._most, self.timings


def lease(key: str, row: int, input_ids: list[int], max_new_tokens: int) -> Lease:
    mask = b"" if max_new_tokens else pack_mask([i % 2 for i in range(len(input_ids))])
    packed = np.asarray(input_ids, "<i4").tobytes()
    return Lease(SampleId(0, row), key, packed, mask, max_new_tokens, seed=row, credit_bytes=1 << 20)


@pytest.fixture(scope="module")
def prompts(target_path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    questions = ["What is the capital of France?", "Name three colours.", "What is two plus two?"]
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in questions
    ]


@pytest.fixture(scope="module")
def outcome(store: RunningStore, target_path: Path, prompts: list[list[int]]) -> Iterator[tuple[dict, dict, int, Any]]:
    leases = [lease(f"ask{i}", i, prompt, 40) for i, prompt in enumerate(prompts)]
    leases += [lease(f"read{i}", 10 + i, CONVERSATION[i:], 0) for i in range(3)]
    leases += [replace(lease("split", 15, CONVERSATION, 0), sharding=FORMULA)]
    leases += [lease("large", 20, [7] * 2000, 0)]
    sections = {
        "target": {"path": str(target_path), "dtype": "bfloat16"},
        "inference": {"max_total_tokens": 4096, "max_concurrency": 4, "buffer_bytes": BUFFER_BYTES},
        "monitor": {"history_seconds": 0},
    }
    engine = EngineSpec(Config.model_validate(sections), store.endpoint, AUX_LAYERS)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        desk = Desk.remote(leases)  # type: ignore[attr-defined]
        worker = ray.remote(InferenceWorker).remote("w0", desk, engine)
        ray.get(worker.run.remote())
        report = ray.get(worker.__ray_call__.remote(lambda self: self._report()))
        published, failed, most, timings = ray.get(desk.outcome.remote())
        yield published, failed, most, (report, timings)
    finally:
        ray.shutdown()


def test_answers_are_captured_with_a_mask_on_the_answer(outcome, prompts, target_path, store) -> None:  # type: ignore[no-untyped-def]
    published, _, _, _ = outcome
    client = HiddenStateStore(store.endpoint, 16 << 20)
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    for i, prompt in enumerate(prompts):
        ref, answer = published[f"ask{i}"]
        read = prompt + list(answer.token_ids[:-1])
        length = len(read)
        assert ref.sample == SampleId(0, i) == SampleId(0, answer.prompt)
        assert ref.num_tokens == length and ref.norm_state == "post_norm" and ref.sharding is None
        assert unpack_mask(ref.loss_mask, length) == [False] * len(prompt) + [True] * (length - len(prompt))
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert (answer.finish_reason == "stop") == (answer.token_ids[-1] == tokenizer.eos_token_id)
        buffer = client.get(ref.key, ref.tensors)
        assert buffer.views["ids"].tolist() == read
        assert buffer.views["hs"].shape == (length, 3 * 576) and buffer.views["hs"].float().norm(dim=-1).min() > 0
        client.release(buffer)
    client.close()
    assert "Paris" in published["ask0"][1].text


def test_whole_conversations_are_only_prefilled(outcome) -> None:  # type: ignore[no-untyped-def]
    published, _, _, _ = outcome
    for i in range(3):
        ref, answer = published[f"read{i}"]
        assert answer is None and ref.num_tokens == len(CONVERSATION) - i
        assert unpack_mask(ref.loss_mask, ref.num_tokens) == [bool(j % 2) for j in range(ref.num_tokens)]


def test_a_lease_says_how_its_sample_is_split(outcome, store) -> None:  # type: ignore[no-untyped-def]
    """Another one of the same text, leased at the same time, is stored whole."""
    published, _, _, _ = outcome
    (split, _), (whole, _) = published["split"], published["read0"]
    assert (split.sharding, whole.sharding) == (FORMULA, None) and split.tensors == whole.tensors
    client = HiddenStateStore(store.endpoint, 16 << 20)
    wanted = client.get(whole.key, whole.tensors).views["hs"]
    parts = [
        client.get(split.key, shard_tensors(split.tensors, FORMULA, split.num_tokens, rank)).views[f"usp{rank}_hs"]
        for rank in range(FORMULA.size)
    ]
    assert not client.exists(split.key, whole.tensors)
    together, wanted = torch.cat(parts).float(), wanted.float()
    assert (together - wanted).norm() < 0.05 * wanted.norm()  # bfloat16, and other neighbours in the batch
    client.close()


def test_what_cannot_be_served_fails_with_a_reason(outcome) -> None:  # type: ignore[no-untyped-def]
    _, failed, _, _ = outcome
    assert failed.keys() == {"large"}
    reason, kind = failed["large"]
    assert "inference.buffer_bytes" in reason and kind == "final"


def test_the_worker_keeps_several_samples_in_flight_and_counts_them(outcome) -> None:  # type: ignore[no-untyped-def]
    published, _, most, (report, timings) = outcome
    assert most == 4
    tokens = [ref.num_tokens for ref, _ in published.values()]
    assert (report.samples, report.tokens) == (7, sum(tokens))
    assert report.answer_tokens == sum(len(answer.token_ids) for _, answer in published.values() if answer)
    assert report.put_bytes == sum(ref.num_bytes for ref, _ in published.values())
    assert report.put_seconds == pytest.approx(sum(t.put_seconds for t in timings)) and report.put_seconds > 0
    assert sum(report.put_histogram) == 7 and report.failures == 1 and report.leases == 0
    assert 0 < report.engine_seconds <= report.busy_seconds <= report.seconds
    assert all(min(t.queue_seconds, t.hold_seconds) >= 0 and t.compute_seconds > 0 for t in timings)
    assert max(t.compute_seconds for t in timings) <= report.engine_seconds
