"""What is read of a target before anything starts, and the targets that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from transformers import GlmConfig, LlamaConfig, PretrainedConfig, Qwen2Config, StableLmConfig, ViTConfig

from benchmarks.families import FAMILIES, HIDDEN, LAYERS, make_checkpoint
from torchspec.target import checkpoint
from torchspec.target.checkpoint import TargetCheckpoint, find_checkpoint


def test_the_real_target(target_path: Path) -> None:
    target = TargetCheckpoint(target_path)
    assert (target.num_layers, target.end_token_ids) == (30, (2,))
    shape = target.shape
    assert (shape.hidden_size, shape.vocab_size, shape.num_heads, shape.num_kv_heads) == (576, 49152, 9, 3)
    assert (shape.head_dim, shape.intermediate_size, shape.rms_norm_eps) == (64, 1536, pytest.approx(1e-5))
    assert target.tokenizer.decode([target.mask_token_id]) == "<empty_output>"  # the last one that no chat holds
    assert 134e6 < target.num_parameters < 136e6
    assert target.facts() == {
        "architecture": "LlamaForCausalLM",
        "layers": "30 of 576 features",
        "vocabulary": "49,152 tokens; an answer ends with 2 (<|im_end|>)",
        "context": "8,192 tokens",
        "head": "tied to the embedding",
        "weights": "0.25 GiB, quantisation: none",
    }


def test_end_tokens_are_those_of_the_config_and_the_tokenizer_too(target_path: Path, tmp_path: Path) -> None:
    shutil.copytree(target_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    assert TargetCheckpoint(tmp_path).end_token_ids == (0, 2, 7, 9)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_shape(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    target = TargetCheckpoint(tmp_path)
    assert (target.num_layers, target.shape.hidden_size, target.shape.vocab_size) == (LAYERS, HIDDEN, 49152)
    assert set(target.shape.rope_parameters) <= {
        "rope_type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "mscale",
        "mscale_all_dim",
    }


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        (GlmConfig(), {"rope_type": "default", "rope_theta": 10000.0}),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 5e4, "factor": 2.0}),
            {"rope_type": "default", "rope_theta": 5e4},
        ),
    ],
    ids=["a share of each head", "by the sequence's length"],
)
def test_a_draft_gets_a_rotary_embedding_that_servers_have(
    config: PretrainedConfig, rope: dict[str, Any], tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    assert TargetCheckpoint(tmp_path).shape.rope_parameters == rope


@pytest.mark.parametrize(
    ("family", "prefix", "head", "scales"),
    [
        ("Qwen2", "model.", "model.embed_tokens.weight", (1.0, 1.0, None, 0.0)),
        ("Granite", "model.", "lm_head.weight", (1 / 8, 12.0, None, 0.0)),
        ("Gemma 2", "model.", "model.embed_tokens.weight", (1.0, HIDDEN**0.5, 30.0, 1.0)),
        ("Qwen3-VL", "model.language_model.", "lm_head.weight", (1.0, 1.0, None, 0.0)),
        ("Llama 4", "language_model.model.", "language_model.lm_head.weight", (1.0, 1.0, None, 0.0)),
    ],
)
def test_the_pieces_of_a_family_are_found(
    family: str,
    prefix: str,
    head: str,
    scales: tuple[float, float, float | None, float],
    target_path: Path,
    tmp_path: Path,
) -> None:
    make_checkpoint(family, tmp_path, target_path)
    target = TargetCheckpoint(tmp_path)
    assert (target.weights.embedding, target.weights.norm) == (f"{prefix}embed_tokens.weight", f"{prefix}norm.weight")
    assert target.head == head
    assert (target.logit_scale, target.embedding_scale, target.logit_cap, target.norm_offset) == scales


def test_a_head_that_is_neither_tied_nor_there_is_named(target_path: Path, tmp_path: Path) -> None:
    shutil.copytree(target_path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"target\.path: .* has no lm_head\.weight, and its config does not tie"):
        _ = TargetCheckpoint(tmp_path).head


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no \.safetensors weights"):
        _ = TargetCheckpoint(tmp_path).num_parameters


def test_code_that_is_not_trusted_is_not_run(tmp_path: Path) -> None:
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.StrangeConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "strange.py").write_text(
        "from transformers import LlamaConfig\nclass StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
    )
    with pytest.raises(ValueError, match=r"target\.path: .* set target\.trust_remote_code=true"):
        _ = TargetCheckpoint(tmp_path).config
    assert TargetCheckpoint(tmp_path, trust_remote_code=True).config.model_type == "strange"


def test_a_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or "/copy")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("owner/model") == Path("/copy")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    for local in ("owner/model", "./absent/model", "/absent", "a/b/c"):
        assert find_checkpoint(local) == Path(local)
    assert asked == ["owner/model"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.LocalEntryNotFoundError("no network"), "cannot be reached from here, and its cache has no copy"),
        (errors.HFValidationError("a name\nmore"), "gives: a name$"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_line(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=rf"target\.path: owner/absent is neither .*{reason}"):
        find_checkpoint("owner/absent")
    assert checkpoint.HUB_NAME.fullmatch("Qwen/Qwen3-8B")
