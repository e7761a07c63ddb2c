"""Options that must not change what is computed: activation checkpointing, compilation, and its absence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integration.trainer_harness import DRAFT_IDS, HIDDEN, TTT, VOCAB, make_config, make_target, spec_of
from torchspec.drafts.draft import Batch, Draft
from torchspec.target.head import TargetHead
from torchspec.training.learner import build_draft, compile_or_stay_eager

CPU = torch.device("cpu")
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


def build(target: Path, **training: Any) -> tuple[Draft, TargetHead]:
    config = make_config(target, target / "run", training={"loss_chunk_tokens": 16, **training})
    return build_draft(config, spec_of(config), torch.from_numpy(DRAFT_IDS), None, CPU)


def gradients(draft: Draft, head: TargetHead) -> Gradients:
    """Of two micro-batches of different shapes."""
    for length in (12, 19):
        generator = torch.Generator().manual_seed(length)
        batch = Batch(
            torch.randn(2, length, 3 * HIDDEN, generator=generator),
            torch.randn(2, length, HIDDEN, generator=generator),
            torch.randint(VOCAB, (2, length), generator=generator),
            torch.rand(2, length, generator=generator) > 0.3,
            torch.tensor([length, length]),
            torch.zeros(2),
        )
        draft(batch, head).total.backward()
    return {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def eager(target: Path) -> Gradients:
    grads = gradients(*build(target))
    assert all(g.any() for g in grads.values())
    return grads


def test_activation_checkpointing_gives_the_same_gradients(target: Path, eager: Gradients) -> None:
    draft, head = build(target, activation_checkpointing=True)
    assert draft.options.recompute
    torch.testing.assert_close(gradients(draft, head), eager, rtol=0, atol=0)


def test_compiled_gives_the_same_gradients(target: Path, eager: Gradients) -> None:
    draft, head = build(target)
    before = set(draft.state_dict())
    compile_or_stay_eager(draft, CPU)
    torch.testing.assert_close(gradients(draft, head), eager, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= TTT  # it did compile
    assert set(draft.state_dict()) == before  # names in checkpoints do not change


def test_without_a_compiler_it_warns_and_stays_eager(
    target: Path, eager: Gradients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled earlier may help out
    draft, head = build(target)
    with caplog.at_level(logging.WARNING):
        compile_or_stay_eager(draft, CPU)
    assert "training.compile" in caplog.text
    torch.testing.assert_close(gradients(draft, head), eager, rtol=0, atol=0)
