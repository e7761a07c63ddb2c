"""Sizes are found from samples and machine, and those that cannot work are all named at once, with what would."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.driver.test_memory import TARGET
from torchspec.config.load import parse_config, with_values
from torchspec.config.schema import Config
from torchspec.driver import sizes
from torchspec.driver.sizes import check_sizes, find_sizes
from torchspec.store.geometry import USABLE_SHARE, SampleGeometry

GEOMETRY = SampleGeometry(num_aux=3, hidden_size=4096, dtype="bfloat16")
SAMPLE, SLOT = GEOMETRY.stored_bytes(1000), GEOMETRY.slot_bytes(1000)
GIB = 1 << 30


def config_of(**sections: dict[str, Any]) -> Config:
    data = {"max_seq_length": 1000, **sections.pop("data", {})}
    return parse_config({"target": {"path": "x"}, "data": data, **sections})


def found(config: Config, memory: int, monkeypatch: pytest.MonkeyPatch, on_gpu: bool = False) -> dict[str, int]:
    monkeypatch.setattr(sizes, "usable_memory", lambda: memory)
    monkeypatch.setattr(sizes, "device_memory", lambda device: memory)
    return find_sizes(config, TARGET, GEOMETRY, on_gpu)


def complaints(config: Config, monkeypatch: pytest.MonkeyPatch, target: Any = TARGET, **values: Any) -> list[str]:
    resolved = with_values(config, found(config, 32 * GIB, monkeypatch))
    try:
        check_sizes(with_values(resolved, values), target, GEOMETRY)
    except ValueError as error:
        return str(error).splitlines()
    return []


def test_the_store_has_room_for_the_window_as_far_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(controller={"reorder_window": 128})
    segments = [found(config, n * GIB, monkeypatch)["store.segment_bytes"] for n in (1, 16, 1024)]
    assert segments[:2] == [GIB, 4 * GIB]
    assert segments[2] * USABLE_SHARE == pytest.approx(128 * SAMPLE)
    large = config_of(training={"batch_size": 64}, evaluation={"heldout": "x"})
    least = found(large, 4 * GIB, monkeypatch)["store.segment_bytes"]
    assert least > GIB and int(least * USABLE_SHARE) // SAMPLE == 65, (
        "a batch and one held-out sample, whatever it takes"
    )


def test_engines_have_room_for_the_samples_that_they_work_on(monkeypatch: pytest.MonkeyPatch) -> None:
    small = found(config_of(), 64 * GIB, monkeypatch)
    assert small["inference.max_concurrency"] == 32 and small["inference.buffer_bytes"] == 34 * SAMPLE
    assert small["inference.max_total_tokens"] == 1 << 15 and small["inference.chunked_prefill_size"] == 2048
    few = found(config_of(inference={"max_concurrency": 3}), 64 * GIB, monkeypatch)
    assert few["inference.max_total_tokens"] == 4096 >= 3 * 1007 and few["inference.buffer_bytes"] == 5 * SAMPLE
    long = found(config_of(data={"max_seq_length": 100_000}), 64 * GIB, monkeypatch)
    assert long["inference.max_total_tokens"] == 100_007
    assert long["inference.buffer_bytes"] == max(4 * GIB, 2 * GEOMETRY.slot_bytes(100_000))
    many = found(config_of(inference={"workers": 64}), 64 * GIB, monkeypatch)
    assert many["inference.max_concurrency"] == 4, "its share of the window of 256"


def test_on_a_gpu_sglang_chooses_its_pool_and_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    open_ones = found(config_of(), 80 * GIB, monkeypatch, on_gpu=True)
    assert "inference.max_total_tokens" not in open_ones and "inference.chunked_prefill_size" not in open_ones
    assert open_ones["inference.max_concurrency"] == 128


def test_the_logits_take_a_small_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    target = replace(TARGET, vocab_size=150_000)
    monkeypatch.setattr(sizes, "usable_memory", lambda: 64 * GIB)
    chunks = []
    for memory in (1, 8, 64):
        monkeypatch.setattr(sizes, "device_memory", lambda device, memory=memory: memory * GIB)
        chunks.append(find_sizes(config_of(), target, GEOMETRY, False)["training.loss_chunk_tokens"])
    assert chunks == [64, 256, 1024]


def test_what_is_said_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"store.segment_bytes": GIB, "training.loss_chunk_tokens": 77}
    assert not found(with_values(config_of(), given), 64 * GIB, monkeypatch).keys() & given.keys()


@pytest.mark.parametrize("length", [8, 1000, 4089])
@pytest.mark.parametrize("ranks", [1, 4])
def test_what_is_found_works(length: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"attention_backend": "usp", "sp_ring_size": ranks} if ranks > 1 else {}
    config = config_of(data={"max_seq_length": length}, training=training, evaluation={"heldout": "x"})
    sharded = replace(GEOMETRY, sharding=config.training.shard_formula(7))
    monkeypatch.setattr(sizes, "usable_memory", lambda: GIB)
    resolved = with_values(config, find_sizes(config, TARGET, sharded, False))
    check_sizes(resolved, TARGET, sharded)


def test_all_that_is_too_small_is_named_with_the_least_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "store.segment_bytes": 100 << 20,
        "inference.buffer_bytes": 1 << 20,
        "training.buffer_bytes": 1 << 20,
        "inference.max_total_tokens": 1006,
        "draft.window": 999,
    }
    config = config_of(evaluation={"heldout": "x"})
    lines = complaints(config, monkeypatch, **small)
    assert {line.split()[0] for line in lines} == set(small)
    least = {line.split()[0]: line.rpartition("at least ")[2].split()[0].rstrip(",") for line in lines}
    assert complaints(config, monkeypatch, **least) == []
    assert (least["inference.max_total_tokens"], least["draft.window"]) == ("1007", "1000")
    assert least["training.buffer_bytes"] == f"{math.ceil(2 * SLOT / 2**20)}MiB"


def test_a_sample_must_fit_the_targets_context(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(data={"max_seq_length": 4090})
    (line,) = complaints(config, monkeypatch)
    assert line == (
        "data.max_seq_length (4090) is too long for a target with a context of 4096 tokens (max_position_embeddings): "
        "at most 4089"
    )
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert complaints(config, monkeypatch, replace(TARGET, rope_parameters=rope)) == []
    rope |= {"rope_type": "yarn", "original_max_position_embeddings": 2048}
    assert complaints(config, monkeypatch, replace(TARGET, rope_parameters=rope)) == [line]
    own = {"inference.engine_args": {"context_length": 5000}}
    assert complaints(config, monkeypatch, **own) == []
