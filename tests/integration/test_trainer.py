"""The step loop of one rank, end to end: real store, real Ray, scripted controller."""

from __future__ import annotations

import gzip
import json
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from tests.integration.trainer_harness import (
    AUX_LAYERS,
    GEOMETRY,
    HIDDEN,
    TTT,
    Bench,
    ScriptedController,
    Step,
    make_config,
    put_samples,
    run_script,
    spec_of,
)
from torchspec.contracts import RankId
from torchspec.controller.steps import split_batch
from torchspec.data.masks import unpack_mask
from torchspec.training.fetch import SampleFetcher, StepStream


def test_learns_and_reports(bench: Bench, tmp_path: Path) -> None:
    refs = put_samples(bench.client, [20, 9, 14], prefix="learn")
    heldout = put_samples(bench.client, [12, 30], prefix="learn-heldout", first=50)
    config = make_config(bench.target, tmp_path / "run", evaluation={"heldout": "unused"})
    steps = [Step(refs, evaluate=number in (1, 12)) for number in range(1, 13)]

    outcome = run_script(config, bench.endpoint, steps, heldout=heldout)

    assert outcome.errors == []
    train = [r for r in outcome.reports if r.split == "train"]
    assert [r.step for r in train] == list(range(1, 13))
    assert train[-1].loss < 0.7 * train[0].loss  # the same three samples twelve times over
    for report in train:
        assert report.tokens == 43
        assert len(report.loss_per_position) == len(report.accuracy) == len(report.full_accuracy) == TTT
        weights = [0.8**t for t in range(TTT)]
        assert all(f <= a for f, a in zip(report.full_accuracy, report.accuracy, strict=True))
        assert report.grad_norm > 0
        assert report.compute_seconds > 0
        assert report.loss > max(w * p for w, p in zip(weights, report.loss_per_position, strict=True)) * 0.3
    # warm-up over 20% of 12 steps, then cosine
    assert [r.learning_rate for r in train[:4]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
    evaluations = [r for r in outcome.reports if r.split == "heldout"]
    assert [r.step for r in evaluations] == [1, 12]
    assert all(r.tokens == 42 for r in evaluations)
    assert evaluations[0].loss != evaluations[1].loss
    assert [entry for entry in outcome.log if entry[0] == "heldout"] == [("heldout", 0, ())]  # fetched once


def test_divergence_names_the_step_and_saves_nothing(bench: Bench, tmp_path: Path) -> None:
    refs = put_samples(bench.client, [20, 9], prefix="diverge")
    (bad,) = put_samples(bench.client, [10], prefix="diverge-bad", first=2)
    buffer = bench.client.get(bad.key, bad.tensors)
    buffer.views["hs"][7, 3] = float("nan")
    bench.client.put(bad.key + "-nan", buffer).result(timeout=60)
    nan = replace(bad, key=bad.key + "-nan")
    config = make_config(bench.target, tmp_path / "run")
    steps = [Step(refs, checkpoint=True), Step([*refs, nan], checkpoint=True)]

    outcome = run_script(config, bench.endpoint, steps, world=2)

    assert [type(e).__name__ for e in outcome.errors] == ["TrainingDiverged"] * 2  # both ranks, alike
    assert "step 2" in str(outcome.errors[0])
    assert "optimizer.lr" in str(outcome.errors[0])
    assert sorted(f.name for f in (config.run_dir / "checkpoints").iterdir()) == ["latest", "step_000001"]
    assert not torch.isnan(torch.tensor(outcome.losses)).any()


def start_controller(steps: list[Step], world: int) -> Any:
    return ray.remote(ScriptedController).options(num_cpus=0).remote(steps, world, 1, ())


def test_the_stream_fetches_ahead_pads_and_passes_errors_on(bench: Bench) -> None:
    refs = put_samples(bench.client, [9, 5, 12], prefix="stream")
    huge = replace(refs[0], key="huge", tensors=GEOMETRY.tensors(1 << 20))
    controller = start_controller([Step(refs), Step([huge])], world=1)
    fetcher = SampleFetcher(bench.client, GEOMETRY, 0, 0, pin_memory=False)

    with closing(StepStream(controller, RankId(1, 0), fetcher, 1, prefetch_steps=2, heldout=False)) as stream:
        step = stream.next()
        assert step is not None
        assert stream.heldout() == []
        first, second = step.micro_batches  # 12 and 9 tokens, then 5: longest first
        assert first.ids_BS.shape == (2, 12)
        assert first.lengths_B.tolist() == [12, 9]
        assert not first.hs_BSA[1, 9:].any()
        assert not first.loss_mask_BS[1, 9:].any()
        assert first.loss_mask_BS[0].tolist() == [3 * i >= 12 for i in range(12)]
        buffer = bench.client.get(refs[1].key, refs[1].tensors)
        for tensor, suffix in ((second.hs_BSA, "hs"), (second.lhs_BSH, "lhs"), (second.ids_BS, "ids")):
            assert torch.equal(tensor[0], buffer.views[suffix])
            assert tensor.any()
        bench.client.release(buffer)
        with pytest.raises(ValueError, match=r"training\.buffer_bytes"):
            stream.next()
    ray.kill(controller)


def test_what_one_rank_misses_is_replaced_for_all(bench: Bench) -> None:
    refs = put_samples(bench.client, [20, 9, 14], prefix="lost")
    again = put_samples(bench.client, [20, 9, 14], prefix="again")
    fetcher = SampleFetcher(bench.client, GEOMETRY, 0, 0, pin_memory=False)
    expected = [fetcher.fetch(split_batch(refs, 2, 2)[rank], {})[0] for rank in (0, 1)]
    lost = next(ref for ref in refs if ref in split_batch(refs, 2, 2)[1][0])
    bench.client.remove(lost.key, ("hs",))  # a part of it: the others are still there
    replacement = [new if old is lost else old for old, new in zip(refs, again, strict=True)]
    controller = start_controller([Step(refs, replacement=replacement)], world=2)

    with ExitStack() as stack:
        streams = [
            stack.enter_context(closing(StepStream(controller, RankId(1, r), fetcher, 1, 2, False))) for r in (0, 1)
        ]
        steps = [stream.next() for stream in streams]

    for step, batches in zip(steps, expected, strict=True):
        assert step is not None
        for batch, wanted in zip(step.micro_batches, batches, strict=True):
            assert torch.equal(batch.hs_BSA, wanted.hs_BSA)
            assert torch.equal(batch.ids_BS, wanted.ids_BS)
            assert torch.equal(batch.loss_mask_BS, wanted.loss_mask_BS)
    log, _, _ = ray.get(controller.told.remote())
    assert sorted(log) == [
        ("fetched", 0, 1, ()),
        ("fetched", 0, 1, ()),
        ("fetched", 1, 1, ()),
        ("fetched", 1, 1, (lost.sample,)),
    ]
    ray.kill(controller)


def test_each_rank_says_where_its_time_goes_and_profiles_its_steps(bench: Bench, tmp_path: Path) -> None:
    refs = put_samples(bench.client, [20, 9, 14, 16], prefix="clocked")
    config = make_config(
        bench.target,
        tmp_path / "run",
        training={"dp_size": 2, "micro_batch_size": 1},
        monitor={"profile_steps": [2, 3], "peak_flops": 1e9},
    )
    outcome = run_script(
        config, bench.endpoint, [Step(refs, checkpoint=number == 4) for number in range(1, 6)], world=2
    )
    assert outcome.errors == []
    for rank, report in sorted(outcome.ranks.items()):
        assert (report.rank, report.step, report.steps) == (rank, 5, 5)
        parts = ("wait", "forward", "backward", "reduce", "optimizer", "pause")
        seconds = {part: getattr(report, f"{part}_seconds") for part in parts}
        assert all(value > 0 for value in seconds.values()), seconds
        assert 0.7 * report.seconds < sum(seconds.values()) <= 1.01 * report.seconds, (seconds, report.seconds)
        assert sum(report.get_histogram) == 10, "two samples in each of five steps"
        assert 0 < report.get_seconds < report.seconds and report.peak_flops == 1e9
        with gzip.open(tmp_path / "run" / "profile" / f"rank-{rank}.json.gz") as file:
            names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
        assert any("aten::mm" in name for name in names)
    ranks = outcome.ranks.values()
    assert sum(report.tokens for report in ranks) == 5 * 59
    per_token = 4 * (len(AUX_LAYERS) + 1) * HIDDEN + 4  # float32 states, int32 ids
    assert sum(report.get_bytes for report in ranks) == 5 * 59 * per_token
    draft = spec_of(config)
    scored = [sum(unpack_mask(ref.loss_mask, ref.num_tokens)) for ref in refs]
    expected = sum(draft.flops(ref.num_tokens, n) for ref, n in zip(refs, scored, strict=True))
    assert sum(report.flops for report in ranks) == pytest.approx(5 * expected)
