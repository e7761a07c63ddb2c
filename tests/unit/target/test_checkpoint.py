"""What is read of a target before anything starts, and the targets that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, StableLmConfig, ViTConfig

from torchspec.target.checkpoint import TargetCheckpoint


def test_the_real_target(target_path: Path) -> None:
    target = TargetCheckpoint(target_path)
    assert (target.num_layers, target.end_token_ids) == (30, (2,))
    shape = target.shape
    assert (shape.hidden_size, shape.vocab_size, shape.num_heads, shape.num_kv_heads) == (576, 49152, 9, 3)
    assert (shape.head_dim, shape.intermediate_size, shape.rms_norm_eps) == (64, 1536, pytest.approx(1e-5))
    assert target.tokenizer.decode([target.mask_token_id]) == "<empty_output>"  # the last one that no chat holds
    assert 134e6 < target.num_parameters < 136e6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StableLmConfig(), "no rms_norm_eps: it is not a Llama-like model"),
        (ViTConfig(), "no rms_norm_eps, vocab_size, max_position_embeddings: it is not"),
        (Qwen2Config(num_attention_heads=4, num_key_value_heads=3), "not a multiple"),
    ],
)
def test_a_target_that_no_draft_fits_is_refused(tmp_path: Path, config: PretrainedConfig, message: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        _ = TargetCheckpoint(tmp_path).shape


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no \.safetensors weights"):
        _ = TargetCheckpoint(tmp_path).num_parameters
