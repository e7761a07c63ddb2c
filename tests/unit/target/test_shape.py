"""Which layers a target has, and what its draft has by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    LlamaConfig,
    MiniMaxM2Config,
    PretrainedConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.shape import TargetShape, check_layers, early_middle_late

LONG = {"rope_type": "dynamic", "rope_theta": 7e4, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        (LlamaConfig(rope_parameters=LLAMA3), LLAMA3),
        (LlamaConfig(rope_parameters=LONG), {"rope_type": "default", "rope_theta": 7e4}),
        (Glm4Config(), {"rope_type": "default", "rope_theta": 1e4}),  # half of each head
        (Qwen3NextConfig(), {"rope_type": "default", "rope_theta": 1e4}),  # a quarter
        (Gemma3TextConfig(), {"rope_type": "default", "rope_theta": 1e6}),  # 1e4 where attention slides
    ],
)
def test_a_draft_has_a_rotary_embedding_that_servers_know(
    tmp_path: Path, config: PretrainedConfig, rope: dict[str, Any]
) -> None:
    config.save_pretrained(tmp_path)
    assert TargetCheckpoint(tmp_path).shape.rope_parameters == rope


@pytest.mark.parametrize(
    ("config", "heads", "wide"),
    [
        (DeepseekV3Config(), (56, 8, 128), 18432),  # of 128 heads that share one latent vector
        (GptOssConfig(), (64, 8, 64), 8704),  # of 2880, one expert's
        (MiniMaxM2Config(), (48, 8, 128), 9216),  # of 1536, one expert's
        (Qwen3_5MoeTextConfig(), (16, 2, 256), 6144),  # of none
        (Qwen3MoeConfig(), (32, 4, 64), 6144),  # the dense layers' own
    ],
)
def test_a_draft_of_experts_and_latent_attention_is_a_dense_llama_layer(
    tmp_path: Path, config: PretrainedConfig, heads: tuple[int, int, int], wide: int
) -> None:
    config.save_pretrained(tmp_path)
    shape = TargetCheckpoint(tmp_path).shape
    assert ((shape.num_heads, shape.num_kv_heads, shape.head_dim), shape.intermediate_size) == (heads, wide)


OLD: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "rms_norm_eps": 1e-6,
    "vocab_size": 50,
    "max_position_embeddings": 2048,
}


def test_a_config_of_any_age_is_read() -> None:
    shape = TargetShape.from_config(OLD)
    assert (shape.num_kv_heads, shape.head_dim, shape.eos_token_id) == (4, 16, None)
    assert shape.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    scaled = TargetShape.from_config(
        OLD | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": None}
    )
    assert scaled.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0} and scaled.head_dim == 16
    assert TargetShape.from_config(shape.hf_config()) == shape
    with pytest.raises(KeyError, match="rms_norm_eps"):
        TargetShape.from_config({name: value for name, value in OLD.items() if name != "rms_norm_eps"})
    with pytest.raises(ValueError, match="rope_type among default, linear, llama3, yarn"):
        TargetShape.from_config(OLD | {"rope_parameters": LONG})
    with pytest.raises(ValueError, match="rotate a share of each head only"):
        TargetShape.from_config(OLD | {"rope_parameters": {"partial_rotary_factor": 0.5}})


def test_layers_are_bounds_checked() -> None:
    assert check_layers(30, [0, 28]) == (0, 28)
    for wrong in ([], [29], [-1, 3], [3, 2], [2, 2]):
        with pytest.raises(ValueError, match=r"aux_layers.*from 0 to 28"):
            check_layers(30, wrong)


@pytest.mark.parametrize(
    ("layers", "inputs"), [(30, (2, 15, 27)), (32, (2, 16, 29)), (36, (2, 18, 33)), (7, (2, 3, 4))]
)
def test_default_layers_are_the_outputs_just_before(layers: int, inputs: tuple[int, ...]) -> None:
    assert early_middle_late(layers) == tuple(layer - 1 for layer in inputs)


def test_too_few_layers_have_no_default() -> None:
    with pytest.raises(ValueError, match="aux_layers has no default for a target of 6 layers"):
        early_middle_late(6)
