"""What reaches the store is what transformers computes, layer for layer; and nothing else reaches it.

One fp32 engine with chunks of 128 tokens serves most of this module. Errors are relative to the norm of a token's
state, because token 0 has activations of 24,000 where others have 10.

Shapes: S tokens, F aux layers, H hidden size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.engine_harness import AUX_LAYERS, CHUNK, LiveEngine, live_engine
from tests.integration.store_harness import RunningStore, running_store
from torchspec.inference.source import SourceFailed
from torchspec.store.hidden_state_store import HiddenStateStore

HIDDEN, VOCAB = 576, 49152
SUFFIXES = ("hs", "lhs", "ids")
STORE_BYTES = 48 << 20
LENGTHS = (1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 300, 37, 2 * CHUNK, 64, 411)
FP32_TOLERANCE = 2e-4
"""Relative error of a token's state; kernels sum in different orders. A wrong layer is off by 0.1 and more."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStore]:
    with running_store(tmp_path_factory.mktemp("store"), STORE_BYTES) as running:
        yield running


@pytest.fixture(scope="module")
def engine(store: RunningStore, target_path: Path) -> Iterator[LiveEngine]:
    with live_engine(store.endpoint, target_path) as live:
        yield live


@pytest.fixture(scope="module")
def cached_engine(store: RunningStore, target_path: Path) -> Iterator[LiveEngine]:
    """bf16, and against our advice with a prefix cache."""
    with live_engine(store.endpoint, target_path, dtype="bfloat16", engine_args={"disable_radix_cache": False}) as live:
        yield live


@pytest.fixture(scope="module")
def model(target_path: Path):  # type: ignore[no-untyped-def]
    """Dtype to transformers' model."""
    return cache(lambda dtype: AutoModelForCausalLM.from_pretrained(target_path, dtype=dtype).eval())


@pytest.fixture(scope="module")
def reference(model):  # type: ignore[no-untyped-def]
    """Token ids and dtype to all hidden states [L + 1, S, H] in fp32, the last one after the final norm."""

    @torch.inference_mode()
    def states(input_ids: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        output = model(dtype).model(torch.tensor([input_ids]), output_hidden_states=True)
        return torch.cat(output.hidden_states).float()

    return states


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def row_errors(states: Tensor, expected: Tensor) -> Tensor:
    """Error of each row, relative to the row's norm."""
    return (states - expected).norm(dim=-1) / expected.norm(dim=-1)


def relative_error(states: Tensor, expected: Tensor) -> float:
    """Largest of :func:`row_errors`."""
    return float(row_errors(states, expected).max())


def fetch(client: HiddenStateStore, key: str, captured) -> tuple[Tensor, Tensor, list[int]]:  # type: ignore[no-untyped-def]
    """hs [S, F, H], lhs [S, H] in fp32 and the token ids of a stored sample."""
    buffer = client.get(key, captured.tensors)
    hs, lhs, ids = (buffer.views[suffix].clone() for suffix in SUFFIXES)
    client.release(buffer)
    client.remove(key, SUFFIXES)
    return hs.view(len(ids), len(AUX_LAYERS), HIDDEN).float(), lhs.float(), ids.tolist()


async def capture_all(engine: LiveEngine, prompts: dict[str, list[int]], answers: int = 0):  # type: ignore[no-untyped-def]
    """Capture all prompts at once, while ``answers`` other requests are being answered."""
    busy = [asyncio.create_task(engine.answer(prompt(20, i), 24)) for i in range(answers)]
    captured = await asyncio.gather(*(engine.engine.capture(key, ids) for key, ids in prompts.items()))
    await asyncio.gather(*busy)
    return dict(zip(prompts, captured, strict=True))


def test_states_equal_transformers_in_chunks_and_mixed_batches(engine, client, reference) -> None:  # type: ignore[no-untyped-def]
    prompts = {f"mixed{length}": prompt(length, length) for length in LENGTHS}
    captured = engine.run(capture_all(engine, prompts, answers=3))
    for key, input_ids in prompts.items():
        length, sample = len(input_ids), captured[key]
        assert sample.tensors["hs"].shape == (length, len(AUX_LAYERS) * HIDDEN)
        assert sample.num_bytes == length * ((len(AUX_LAYERS) + 1) * HIDDEN * 4 + 4)
        hs, lhs, ids = fetch(client, key, sample)
        expected = reference(input_ids)
        assert ids == input_ids
        assert relative_error(lhs, expected[-1]) < FP32_TOLERANCE
        for feature, layer in enumerate(AUX_LAYERS):
            assert relative_error(hs[:, feature], expected[layer + 1]) < FP32_TOLERANCE
            for wrong in (layer, layer + 2) if length > 1 else ():  # one layer off; token 0 hardly changes
                assert relative_error(hs[:, feature], expected[wrong]) > 100 * FP32_TOLERANCE


def test_bf16_states_are_as_close_to_fp32_as_transformers_own(cached_engine, client, reference) -> None:  # type: ignore[no-untyped-def]
    """Both libraries round to bf16, each in its own places, so neither is the other's reference. Seen from fp32, an
    average token of ours must be no farther away than transformers' bf16 is, give or take half of that."""
    prompts = {f"bf16-{length}": prompt(length, length) for length in (5, CHUNK + 1, 300)}
    captured = cached_engine.run(capture_all(cached_engine, prompts))
    for key, input_ids in prompts.items():
        assert captured[key].tensors["lhs"].dtype == "bfloat16"
        hs, lhs, _ = fetch(client, key, captured[key])
        exact, rounded = reference(input_ids), reference(input_ids, torch.bfloat16)
        pairs = [(hs[:, feature], layer + 1) for feature, layer in enumerate(AUX_LAYERS)] + [(lhs, -1)]
        for states, layer in pairs:
            spread, ours = row_errors(rounded[layer], exact[layer]), row_errors(states, exact[layer])
            assert 0 < ours.mean() < 1.5 * spread.mean()
            assert ours.max() < 3 * spread.max() < 0.5


def check_answers(answered, prompts, client, reference) -> None:  # type: ignore[no-untyped-def]
    """Of every token but the last, read or written, the store has what transformers computes."""
    for key, sample in answered.items():
        read = prompts[key] + sample.token_ids[:-1]
        hs, lhs, ids = fetch(client, key, sample.captured)
        expected = reference(read)
        assert ids == read
        assert relative_error(lhs, expected[-1]) < FP32_TOLERANCE
        for feature, layer in enumerate(AUX_LAYERS):
            assert relative_error(hs[:, feature], expected[layer + 1]) < FP32_TOLERANCE


async def answer_all(engine: LiveEngine, prompts: dict[str, list[int]], tokens: list[int]):  # type: ignore[no-untyped-def]
    jobs = (engine.answer(ids, most, key=key) for (key, ids), most in zip(prompts.items(), tokens, strict=True))
    return dict(zip(prompts, await asyncio.gather(*jobs), strict=True))


def test_states_of_an_answer_are_captured_while_it_is_written(engine, client, reference, target_path) -> None:  # type: ignore[no-untyped-def]
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    question = [{"role": "user", "content": "Name one colour. Answer with one word."}]
    prompts = {f"answered{length}": prompt(length, length) for length in LENGTHS}
    prompts["ends"] = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    answered = engine.run(answer_all(engine, prompts, [1, 2, 3, 20, 5, 9, 16, 1, 30, 4, 60]))
    assert answered["ends"].finish_reason == "stop"
    assert [len(answered[f"answered{length}"].token_ids) for length in LENGTHS[:3]] == [1, 2, 3]
    check_answers(answered, prompts, client, reference)


@pytest.mark.slow  # an engine of its own
def test_an_answer_that_was_retracted_is_captured_whole(store, target_path, client, reference) -> None:  # type: ignore[no-untyped-def]
    """A KV pool for half of what the answers come to: SGLang takes requests back and prefills them again."""
    hasty = {"schedule_conservativeness": 0.05, "page_size": 1}
    with live_engine(store.endpoint, target_path, max_total_tokens=256, engine_args=hasty) as engine:
        prompts = {f"retracted{i}": prompt(20 + i, i) for i in range(5)}
        answered = engine.run(answer_all(engine, prompts, [80] * 5))
        check_answers(answered, prompts, client, reference)


def test_a_prompt_whose_prefix_came_from_a_cache_is_refused(cached_engine, client) -> None:  # type: ignore[no-untyped-def]
    shared = prompt(200, 42)
    first = cached_engine.run(capture_all(cached_engine, {"whole": shared + prompt(30, 1)}))
    assert len(fetch(client, "whole", first["whole"])[2]) == 230
    with pytest.raises(SourceFailed, match="never computed"):
        cached_engine.run(cached_engine.engine.capture("hit", shared + prompt(30, 2)))
    assert not any(client.exists("hit", [suffix]) for suffix in SUFFIXES)


def test_answers_of_a_batch_equal_transformers_greedy_text(engine, model) -> None:  # type: ignore[no-untyped-def]
    """Requests of different lengths share a decode step; none may look at another's keys or at padding."""
    prompts = [prompt(length, 100 + length) for length in (3, 17, 40, 90, 150, 260, 12, 33, 5, 71)]
    answers = engine.greedy(prompts, 12)
    exact = model(torch.float32)
    for input_ids, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = exact(torch.tensor([input_ids + answer])).logits[0, len(input_ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 1e-3  # a tie at most
        assert len(answer) == 12 or answer[-1] == exact.config.eos_token_id


def test_sampled_answers_depend_on_the_seed_and_not_on_the_batch(engine) -> None:  # type: ignore[no-untyped-def]
    async def sample(seeds: list[int]) -> list[list[int]]:
        answers = (engine.answer(prompt(30, 7), 16, temperature=1.0, seed=seed) for seed in seeds)
        return [answered.token_ids for answered in await asyncio.gather(*answers)]

    together = engine.run(sample([1, 2, 3, 4]))
    assert [engine.run(sample([seed]))[0] for seed in (3, 1)] == [together[2], together[0]]
    assert len({tuple(ids) for ids in together}) == 4


def test_an_aborted_capture_emits_nothing_and_leaks_no_slot(engine, client) -> None:  # type: ignore[no-untyped-def]
    """Each prompt takes a third of the plugin's buffer, so a few leaked slots would block the last captures."""
    length = (16 << 20) // 3 // ((len(AUX_LAYERS) + 1) * HIDDEN * 4 + 4) - 16

    async def abort_some() -> list[str]:
        aborted = []
        for i in range(6):
            task = asyncio.create_task(engine.engine.capture(f"aborted{i}", prompt(length, i)))
            await asyncio.sleep(0.05 + 0.15 * i)
            task.cancel()
            aborted += (
                [f"aborted{i}"]
                if isinstance((await asyncio.gather(task, return_exceptions=True))[0], BaseException)
                else []
            )
        return aborted

    aborted = engine.run(abort_some())
    assert len(aborted) >= 4
    after = {f"after{i}": prompt(length, i) for i in range(4)}
    captured = engine.run(capture_all(engine, after))
    for key, input_ids in after.items():
        assert fetch(client, key, captured[key])[2] == input_ids
    assert not any(client.exists(key, [suffix]) for key in aborted for suffix in SUFFIXES)


def test_a_prompt_that_cannot_be_served_fails_and_the_engine_goes_on(engine, client) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SourceFailed, match=r"inference\.buffer_bytes"):
        engine.run(engine.engine.capture("too-large", prompt(4000, 0)))
    with pytest.raises(SourceFailed, match="temperature"):  # SGLang's own word
        engine.run(engine.answer(prompt(9, 9), 4, temperature=-1.0))
    captured = engine.run(capture_all(engine, {"alive": prompt(9, 9)}))
    assert fetch(client, "alive", captured["alive"])[2] == prompt(9, 9)


def test_a_store_that_is_full_fails_the_capture_with_its_reason(engine, client, store) -> None:  # type: ignore[no-untyped-def]
    count = STORE_BYTES // (400 * (len(AUX_LAYERS) + 1) * HIDDEN * 4) + 2

    async def fill() -> list[BaseException]:
        jobs = [engine.engine.capture(f"fill{i}", prompt(400, i)) for i in range(count)]
        return [r for r in await asyncio.gather(*jobs, return_exceptions=True) if isinstance(r, BaseException)]

    try:
        failures = engine.run(fill())
        assert failures and all(isinstance(failure, SourceFailed) for failure in failures)
        assert any("store" in str(failure) for failure in failures)
    finally:
        for i in range(count):
            client.remove(f"fill{i}", SUFFIXES)
    captured = engine.run(capture_all(engine, {"again": prompt(50, 1)}))
    assert fetch(client, "again", captured["again"])[2] == prompt(50, 1)
