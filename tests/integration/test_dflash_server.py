"""An exported DFlash draft in the real SGLang server: all of it is loaded, and it is right where it should be."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.integration.draft_harness import (
    NUM_PROMPTS,
    Target,
    accept_length,
    learnt_by_heart,
    require_as_simulated,
    served_with,
)
from tests.oracles.dflash_speculation import Draft, right_drafts
from torchspec.data.tokenize import ChatTokenizer
from torchspec.drafts.export import WEIGHTS, read_spec
from torchspec.evaluation.prompts import EvaluationPrompt, load_prompts
from torchspec.evaluation.serving import Reply, ServingError

BLOCK = 6
LEARNT, MANY = 16, 80
OWN_SHAPE = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 32, "intermediate_size": 1600, "rope": 3e4}
"""Not the target's, which has 9 and 3 heads of 64, an MLP of 1536 and a theta of 1e5."""


@pytest.fixture(scope="module")
def exported(target: Target, prompts: list[EvaluationPrompt], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learnt_by_heart(
        target,
        prompts,
        tmp_path_factory.mktemp("export") / "draft",
        "dflash",
        steps=90,
        lr=2e-3,
        block_size=BLOCK,
        num_layers=2,
        num_features=3,
        num_anchors=6,
        gamma=100.0,
        **OWN_SHAPE,
    )


@pytest.fixture(scope="module")
def replies(exported: Path, target: Target, prompts: list[EvaluationPrompt]) -> list[Reply]:
    return served_with(exported, target, prompts, BLOCK - 1)


def test_whole_blocks_are_right_where_the_draft_was_trained(replies: list[Reply]) -> None:
    assert accept_length(replies[:-1]) > 3.5
    assert sum(reply.histogram[-1] for reply in replies if len(reply.histogram) == BLOCK) >= NUM_PROMPTS


def test_every_answer_and_verify_step_is_as_simulated(
    exported: Path, target: Target, prompts: list[EvaluationPrompt], replies: list[Reply]
) -> None:
    draft, layers = Draft.load(exported, target.model), read_spec(exported).layers
    require = partial(
        require_as_simulated, layers=layers, drafted=BLOCK - 1, target=target, prompts=prompts, replies=replies
    )
    require(partial(right_drafts, draft, size=BLOCK))
    mask = draft.config["dflash_config"] | {"mask_token_id": 0}
    with pytest.raises(AssertionError, match="other drafts are right"):
        require(partial(right_drafts, replace(draft, config=draft.config | {"dflash_config": mask}), size=BLOCK))


@pytest.mark.slow
def test_a_renamed_tensor_is_noticed_in_the_server(
    exported: Path, target: Target, prompts: list[EvaluationPrompt], tmp_path: Path
) -> None:
    spoiled = Path(shutil.copytree(exported, tmp_path / "draft"))
    tensors = load_file(spoiled / WEIGHTS)
    tensors["layers.1.self_attn.q.weight"] = tensors.pop("layers.1.self_attn.q_proj.weight")
    save_file(tensors, spoiled / WEIGHTS)
    with pytest.raises(ServingError, match=r"did not load all of .*layers\.1\.self_attn\.qkv_proj\.weight differ"):
        served_with(spoiled, target, prompts, BLOCK - 1)


@pytest.mark.slow
def test_sixteen_answers_by_heart_and_eighty_that_are_the_same_without_a_draft(
    target: Target, target_path: Path, tmp_path: Path
) -> None:
    block, prompts = 8, load_prompts("builtin:heldout", ChatTokenizer(target_path), tmp_path, MANY)
    known = {"block_size": block, "num_layers": 2, "num_features": 3, "num_anchors": 6, "gamma": 100.0}
    draft = learnt_by_heart(target, prompts[: LEARNT + 1], tmp_path / "draft", "dflash", steps=160, lr=2e-3, **known)
    drafted = served_with(draft, target, prompts, block - 1)
    plain = served_with(None, target, prompts)
    assert [reply.output_ids for reply in drafted] == [reply.output_ids for reply in plain]
    assert accept_length(drafted[:LEARNT]) > 1 + 5
