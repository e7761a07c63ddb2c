"""A draft of its own shape: knobs, another draft's config, and YaRN at the export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from torchspec.drafts.eagle3.spec import Eagle3Knobs, Eagle3Spec
from torchspec.drafts.registry import KINDS
from torchspec.drafts.spec import DraftSpec
from torchspec.target.checkpoint import TargetCheckpoint

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 1024,
}
OWN: dict[str, Any] = {"num_heads": 6, "num_kv_heads": 3, "head_dim": 10, "intermediate_size": 96, "rope": 5e4}
SPECFORGE = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 5], "use_aux_hidden_state": True},
    "hidden_size": 32,
    "intermediate_size": 80,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "vocab_size": 64,
    "draft_vocab_size": 24,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 32.0, "original_max_position_embeddings": 128}


@pytest.fixture
def target(tmp_path: Path) -> TargetCheckpoint:
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "target")
    return TargetCheckpoint(tmp_path / "target")


def draft_for(target: TargetCheckpoint, kind: str = "eagle3", **knobs: Any) -> DraftSpec:
    more = {"eagle3": {}, "dflash": {"num_features": 2}, "peagle": {}}[kind]
    masked = {} if kind == "eagle3" else {"mask_token_id": 5}
    return KINDS[kind].of(KINDS[kind].Knobs(kind=kind, **more, **masked, **knobs), target, None)


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_has_the_heads_and_widths_that_are_asked_for(target: TargetCheckpoint, kind: str) -> None:
    spec = draft_for(target, kind, **OWN)
    config = spec.hf_config("float32")
    told = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "intermediate_size": 96}
    assert {name: config[name] for name in told} == told
    assert (config["hidden_size"], config["vocab_size"], config["rope_theta"]) == (32, 64, 5e4)
    inputs = 32 if kind == "dflash" else 64
    name = {"eagle3": "midlayer", "dflash": "layers.0", "peagle": "layers.0"}[kind]
    tensors = spec.hf_tensors()
    assert tensors[f"{name}.self_attn.q_proj.weight"] == (60, inputs)
    assert tensors[f"{name}.self_attn.v_proj.weight"] == (30, inputs)
    assert tensors[f"{name}.mlp.down_proj.weight"] == (32, 96)
    assert "6 heads (3 key/value) of 10, MLP 96, all 64 tokens, RoPE default (theta 50,000)" in spec.describe()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_heads": 5}, r"draft\.num_heads=5 is not a multiple of num_kv_heads=2"),
        ({"export_yarn_length": 99}, r"draft\.export_yarn_length=99 says what draft\.export_yarn_factor stretches"),
        (
            {"export_yarn_factor": 4, "export_yarn_length": 128},
            r"draft\.export_yarn_factor=4 times draft\.export_yarn_length=128 must reach the target's context of 1024: "
            "raise the factor to 8",
        ),
        ({"rope": YARN, "export_yarn_factor": 2}, r"draft\.export_yarn_factor=2\.0: .*rope_type yarn"),
    ],
)
def test_impossible_shapes_are_refused(target: TargetCheckpoint, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draft_for(target, **knobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"head_dim": 7}, "multiple of 2"),
        ({"intermediate_size": 1000}, "multiple of 32"),
        ({"rope": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' must be one of default, linear"),
        ({"rope": {"rope_type": "yarn", "factor": 2.0}}, "rope_type yarn needs original_max_position_embeddings, too"),
    ],
)
def test_impossible_knobs_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Eagle3Knobs(**knobs)


def test_a_rotary_embedding_of_its_own_needs_no_theta(target: TargetCheckpoint) -> None:
    rope = {name: value for name, value in YARN.items() if name != "rope_theta"}
    assert draft_for(target, rope=rope).target.rope_parameters == YARN


@pytest.mark.parametrize("as_file", [False, True])
def test_another_drafts_config_decides_what_no_knob_does(
    target: TargetCheckpoint, tmp_path: Path, as_file: bool
) -> None:
    folder = write(tmp_path / "draft", SPECFORGE)
    spec = draft_for(target, config=folder / "config.json" if as_file else folder)
    shape = spec.target
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.intermediate_size) == (8, 4, 4, 80)
    assert (shape.rms_norm_eps, shape.rope_parameters["rope_theta"], shape.max_position_embeddings) == (1e-5, 1e6, 1024)
    assert (spec.layers, spec.vocab_size) == ((0, 2, 5), 24)
    own = draft_for(target, config=folder, vocab_size="all", **OWN)
    assert (own.target.num_heads, own.target.head_dim, own.vocab_size) == (6, 10, None)
    left_out = write(tmp_path / "less", {k: v for k, v in SPECFORGE.items() if k != "eagle_config"})
    assert draft_for(target, config=left_out).layers == (1, 3, 4)
    exported = write(tmp_path / "ours", own.hf_config("float32"))
    assert draft_for(target, config=exported) == own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, r"draft\.config is for another target: its hidden_size is 64, the target's 32"),
        ({"vocab_size": 128}, "its vocab_size is 128, the target's 64"),
        ({"num_hidden_layers": 2}, r"draft\.config: num_hidden_layers is 2 there, and 1 of the draft asked for"),
        ({"architectures": ["GptOssForCausalLMEagle3"]}, r"architectures is \['GptOssForCausalLMEagle3'\] there"),
        ({"fc_norm": True}, "fc_norm is True there, and False of the draft asked for"),
        ({"intermediate_size": None}, r"draft\.config lacks 'intermediate_size'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"draft\.config: rope_parameters=.*rope_type among"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(
    target: TargetCheckpoint, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draft_for(target, config=write(tmp_path / "draft", SPECFORGE | change))


def test_what_is_no_config_is_named(target: TargetCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"draft\.config: .*nowhere is no draft's config\.json"):
        draft_for(target, config=tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"draft\.config: .*config\.json is no draft's config\.json"):
        draft_for(target, config=tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_yarn_comes_in_at_the_export(target: TargetCheckpoint, tmp_path: Path, kind: str) -> None:
    spec = draft_for(target, kind, export_yarn_factor=32, export_yarn_length=128)
    assert spec.target.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}, "as it is trained"
    served = AutoConfig.from_pretrained(write(tmp_path / "draft", spec.hf_config("float32")))
    assert served.rope_parameters == YARN and served.max_position_embeddings == 4096
    assert draft_for(target, kind, export_yarn_factor=4).exported_shape.max_position_embeddings == 4 * 1024
    kept = json.loads(json.dumps(asdict(spec)))
    assert TypeAdapter(KINDS[kind]).validate_python(kept) == spec, "a checkpoint knows it"


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_is_for_servers_alone(target: TargetCheckpoint, tmp_path: Path, kind: str) -> None:
    plain, spec = draft_for(target, kind), draft_for(target, kind, window=512)
    assert (spec.parameters(), spec.flops(8, 4)) == (plain.parameters(), plain.flops(8, 4)), "as it is trained"
    assert "looks back at 512 tokens" in spec.describe() and "looks back" not in plain.describe()
    config, before = spec.hf_config("float32"), plain.hf_config("float32")
    assert KINDS[kind].from_config(config).window == 512 and KINDS[kind].from_config(before).window is None
    served = AutoConfig.from_pretrained(write(tmp_path / "draft", config))
    if kind == "dflash":  # a layer that slides is causal in SGLang, and a block is not
        assert {*served.layer_types} == {"full_attention"}
    else:
        assert {*served.layer_types} == {"sliding_attention"} and served.sliding_window == 512
    if kind != "peagle":
        assert spec.server_args(3)["speculative_draft_window_size"] == 512
        assert "speculative_draft_window_size" not in plain.server_args(3)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Qwen2Config(**SIZES), "self_attn.k_proj.bias, self_attn.q_proj.bias, self_attn.v_proj.bias"),
        (Qwen3Config(**SIZES, head_dim=8), "self_attn.k_norm.weight, self_attn.q_norm.weight"),
    ],
)
@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_a_layer_that_a_draft_has_no_place_for_is_no_start(
    tmp_path: Path, config: PretrainedConfig, named: str, kind: str
) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    target = TargetCheckpoint(tmp_path)
    layer = 7 if kind == "eagle3" else 4
    with pytest.raises(
        ValueError, match=rf"draft\.init=target: layer {layer} of the target .*it has {named}; use draft"
    ):
        draft_for(target, kind, init="target")
    assert draft_for(target, kind).layers == (1, 3, 4), "all else can be trained"


def test_a_start_needs_whole_numbers_and_the_targets_heads(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    whole = TargetCheckpoint(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors.index.json").exists()
    assert isinstance(draft_for(whole, init="target"), Eagle3Spec)
    with pytest.raises(
        ValueError, match=r"it has mlp\.down_proj\.weight of \[32, 48\] instead of \[32, 96\], .* and 3 more; use"
    ):
        draft_for(whole, init="target", **OWN)
    model.model.layers[7].mlp.up_proj.weight.data = model.model.layers[7].mlp.up_proj.weight.to(torch.float8_e4m3fn)
    model.save_pretrained(tmp_path / "coded")
    with pytest.raises(ValueError, match=r"it has mlp\.up_proj\.weight as F8_E4M3; use draft\.init=default"):
        draft_for(TargetCheckpoint(tmp_path / "coded"), init="target")
