"""An exported P-EAGLE draft in the one server that knows it, vLLM, and in SGLang, which must not mistake it."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.vllm_accept import VENV, measure
from tests.integration.draft_harness import ANSWER_TOKENS, NUM_PROMPTS, Target, learnt_by_heart
from tests.oracles.peagle_speculation import Draft
from tests.oracles.speculation import right_drafts
from torchspec.drafts.export import read_spec
from torchspec.evaluation.prompts import EvaluationPrompt
from torchspec.evaluation.serving import Job, ServingError, serve

DRAFT_TOKENS = 4
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(target: Target, prompts: list[EvaluationPrompt], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learnt_by_heart(
        target,
        prompts,
        tmp_path_factory.mktemp("export") / "draft",
        "peagle",
        steps=60,
        lr=1e-3,
        num_layers=2,
        num_positions=DRAFT_TOKENS,
        position_decay=1.0,
        fc_norm=True,
    )


@pytest.mark.skipif(not (VENV / ".complete").exists(), reason="benchmarks/vllm_accept.py has made no environment")
def test_every_position_is_accepted_in_vllm_as_often_as_simulated(
    exported: Path, target: Target, prompts: list[EvaluationPrompt]
) -> None:
    result = measure(
        argparse.Namespace(
            draft=exported,
            target=target.path,
            prompts="builtin:heldout",
            limit=NUM_PROMPTS,
            tokens=DRAFT_TOKENS,
            max_tokens=ANSWER_TOKENS,
            dtype="float32",
            venv=VENV,
        )
    )
    draft = Draft.load(exported, target.model)
    assert (result["rounds"], result["accepted"]) == simulated(draft, target, exported, prompts, result["outputs"])
    rounds, accepted = simulated(draft, target, exported, prompts[:-1], result["outputs"][:-1])  # the learnt ones
    assert 1 + sum(accepted) / rounds > 4
    other = replace(draft, weights=draft.weights | {"mask_hidden": -draft.weights["mask_hidden"]})
    assert result["accepted"] != simulated(other, target, exported, prompts, result["outputs"])[1]


def simulated(
    draft: Draft, target: Target, folder: Path, prompts: list[EvaluationPrompt], outputs: list[list[int]]
) -> tuple[int, list[int]]:
    """Rounds, and those in which each position was right; every answer must be transformers' own."""
    histogram = torch.zeros(DRAFT_TOKENS + 1, dtype=torch.int64)
    for prompt, output in zip(prompts, outputs, strict=True):
        asked = torch.tensor(prompt.input_ids)
        text = target.go_on(asked, len(output) + DRAFT_TOKENS)
        assert text[len(asked) : len(text) - DRAFT_TOKENS].tolist() == output, "not the answer of transformers"
        states, _ = target.states(text, read_spec(folder).layers)
        with torch.no_grad():
            histogram += torch.tensor(right_drafts(draft, states, text, len(asked), len(output), DRAFT_TOKENS))
    return int(histogram.sum()), [int(histogram[k:].sum()) for k in range(1, DRAFT_TOKENS + 1)]


def test_sglang_refuses_the_folder(exported: Path, target: Target, prompts: list[EvaluationPrompt]) -> None:
    speculation = {
        "speculative_algorithm": "EAGLE3",
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
    }
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["Eagle3LlamaForCausalLM"]
    job = Job(str(target.path), [list(prompts[0].input_ids)], 4, "float32", "cpu", 1, 1, str(exported), speculation)
    with pytest.raises(ServingError, match="Eagle3LlamaForCausalLM"):
        serve(job)
