"""An exported EAGLE3 draft in the real SGLang server: all of it is loaded, and it is right where it should be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.exposed import watched_processes
from tests.integration.draft_harness import (
    ANSWER_TOKENS,
    CONCURRENCY,
    NUM_PROMPTS,
    Target,
    accept_length,
    learnt_by_heart,
    require_as_simulated,
    served_with,
)
from tests.oracles.speculation import Draft, right_drafts
from torchspec.drafts.export import CONFIG, WEIGHTS, read_spec, validate_export
from torchspec.evaluation.evaluate import run_evaluation
from torchspec.evaluation.prompts import EvaluationPrompt
from torchspec.evaluation.result import EvaluationResult, EvaluationSettings
from torchspec.evaluation.serving import Reply, ServingError

DRAFT_TOKENS = 3
SETTINGS = EvaluationSettings(
    num_draft_tokens=DRAFT_TOKENS,
    max_tokens=ANSWER_TOKENS,
    dtype="float32",
    device="cpu",
    threads=1,
    concurrency=CONCURRENCY,
)
LEARN = partial(learnt_by_heart, kind="eagle3", steps=40, lr=1e-3, ttt_length=DRAFT_TOKENS, step_decay=1.0)


@pytest.fixture(scope="module")
def exported(target: Target, prompts: list[EvaluationPrompt], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LEARN(target, prompts, tmp_path_factory.mktemp("export") / "draft")


@pytest.fixture(scope="module")
def watched(exported: Path, target_path: Path) -> tuple[EvaluationResult, set[str]]:
    """An evaluation, and what others could get at meanwhile."""
    with watched_processes(exported.parent) as found:
        result = run_evaluation(exported, target_path, settings=SETTINGS, limit=NUM_PROMPTS)
    return result, found


@pytest.fixture(scope="module")
def result(watched: tuple[EvaluationResult, set[str]]) -> EvaluationResult:
    return watched[0]


def test_nobody_else_can_reach_its_engines(watched: tuple[EvaluationResult, set[str]]) -> None:
    assert watched[1] == set()


def test_the_draft_is_right_where_it_was_trained(result: EvaluationResult) -> None:
    assert len(result.prompts) == NUM_PROMPTS
    assert accept_length(_replies(result)[:-1]) > 2.5
    assert min(result.overall.position_acceptance) > 0.3
    assert result.overall.verify_steps < result.with_draft.output_tokens / 1.5


def test_speculation_changes_no_answer(result: EvaluationResult) -> None:
    assert result.identical_outputs == NUM_PROMPTS
    assert result.with_draft.output_tokens == result.without_draft.output_tokens > NUM_PROMPTS * 10


def test_every_verify_step_is_as_simulated(
    result: EvaluationResult, exported: Path, target: Target, prompts: list[EvaluationPrompt]
) -> None:
    _require(_simulated(exported, target), exported, target, prompts, _replies(result))


def test_with_the_norms_of_eagle_3_1_too(target: Target, prompts: list[EvaluationPrompt], tmp_path: Path) -> None:
    folder = LEARN(target, prompts, tmp_path / "draft", fc_norm=True, norm_output=True)
    replies, draft = served_with(folder, target, prompts, DRAFT_TOKENS), _simulated(folder, target)
    _require(draft, folder, target, prompts, replies)
    with pytest.raises(AssertionError, match="other drafts are right"):
        _require(replace(draft, norm_output=False), folder, target, prompts, replies)


def test_with_heads_and_widths_of_its_own_too(target: Target, prompts: list[EvaluationPrompt], tmp_path: Path) -> None:
    own = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "intermediate_size": 992, "rope": 3e4}
    folder = LEARN(target, prompts, tmp_path / "draft", **own)
    replies, draft = served_with(folder, target, prompts, DRAFT_TOKENS), _simulated(folder, target)
    assert (draft.heads, draft.theta) == (8, 3e4)
    _require(draft, folder, target, prompts, replies)


def test_as_others_publish_a_draft_it_is_served_alike(
    result: EvaluationResult, exported: Path, target: Target, prompts: list[EvaluationPrompt], tmp_path: Path
) -> None:
    published = Path(shutil.copytree(exported, tmp_path / "draft"))
    config = json.loads((published / CONFIG).read_text())
    for name in ("head_dim", "target_hidden_size", "num_aux_hidden_states", "rope_parameters", "eagle_config"):
        del config[name]
    config["max_position_embeddings"] = 2048
    (published / CONFIG).write_text(json.dumps(config))
    tensors = load_file(published / WEIGHTS)
    embedding = torch.randn(config["vocab_size"], config["hidden_size"])
    save_file(tensors | {"embed_tokens.weight": embedding}, published / WEIGHTS)
    validate_export(published)
    assert served_with(published, target, prompts, DRAFT_TOKENS) == _replies(result)


def _replies(result: EvaluationResult) -> list[Reply]:
    return [Reply(prompt.output_ids, prompt.histogram) for prompt in result.prompts]


def _require(draft: Draft, folder: Path, target: Target, prompts: list[EvaluationPrompt], replies: list[Reply]) -> None:
    simulation = partial(right_drafts, draft, count=DRAFT_TOKENS)
    require_as_simulated(simulation, read_spec(folder).layers, DRAFT_TOKENS, target, prompts, replies)


def _simulated(folder: Path, target: Target) -> Draft:
    config = json.loads((folder / CONFIG).read_text())
    return Draft(
        weights=load_file(folder / WEIGHTS),
        embedding=target.model.get_input_embeddings().weight.detach(),
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
        norm_output=config["norm_output"],
    )


@pytest.mark.slow
def test_a_renamed_tensor_is_noticed_in_the_server(
    exported: Path, target: Target, prompts: list[EvaluationPrompt], tmp_path: Path
) -> None:
    spoiled = Path(shutil.copytree(exported, tmp_path / "draft"))
    tensors = load_file(spoiled / WEIGHTS)
    tensors["midlayer.mlp.down.weight"] = tensors.pop("midlayer.mlp.down_proj.weight")
    save_file(tensors, spoiled / WEIGHTS)
    with pytest.raises(ValueError, match=r"unknown.*midlayer\.mlp\.down\.weight"):
        validate_export(spoiled)
    with pytest.raises(ServingError, match=r"did not load all of .*model\.layers\.0\.mlp\.down_proj\.weight differ"):
        served_with(spoiled, target, prompts, DRAFT_TOKENS)
