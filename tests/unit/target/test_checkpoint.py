"""What the driver reads of a target before anything starts, and the targets it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GlmConfig, PretrainedConfig, Qwen2Config, StableLmConfig

from torchspec.config.schema import TargetConfig
from torchspec.target.checkpoint import read_target


def write_target(folder: Path, config: PretrainedConfig) -> TargetConfig:
    config.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return TargetConfig(path=str(folder), dtype="float32")


def test_the_shapes_of_the_real_target(target_path: Path) -> None:
    target = read_target(TargetConfig(path=str(target_path), dtype="float32"))
    assert (target.num_layers, target.hidden_size, target.vocab_size) == (30, 576, 49152)
    draft = target.draft
    assert (draft.num_heads, draft.num_kv_heads, draft.head_dim, draft.intermediate_size) == (9, 3, 64, 1536)
    assert (target.aux_layers, target.end_token_ids) == ((1, 14, 26), (2,))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GlmConfig(), r"partial_rotary_factor=0\.5"),
        (StableLmConfig(), "no rms_norm_eps: it is not a Llama-like model"),
        (Qwen2Config(num_attention_heads=4, num_key_value_heads=3), "not a multiple"),
    ],
)
def test_a_target_that_no_draft_fits_is_refused_at_once(tmp_path: Path, config: PretrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_target(write_target(tmp_path, config))
