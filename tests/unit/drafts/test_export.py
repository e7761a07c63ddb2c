"""The folder that servers load: what is in it, and everything that must keep a folder from being written or read."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

from torchspec.drafts import export as hf
from torchspec.drafts.eagle3.model import Eagle3Draft
from torchspec.drafts.eagle3.spec import NORMS, Eagle3Knobs, Eagle3Spec
from torchspec.drafts.export import export_draft, validate_export
from torchspec.target.checkpoint import TargetCheckpoint

AUX_LAYERS = (1, 3, 4)
DRAFT_IDS = torch.arange(1, 64, 2)
SHAPES = {
    "fc.weight": (32, 96),
    "lm_head.weight": (32, 32),
    "midlayer.hidden_norm.weight": (32,),
    "midlayer.input_layernorm.weight": (32,),
    "midlayer.mlp.down_proj.weight": (32, 48),
    "midlayer.mlp.gate_proj.weight": (48, 32),
    "midlayer.mlp.up_proj.weight": (48, 32),
    "midlayer.post_attention_layernorm.weight": (32,),
    "midlayer.self_attn.k_proj.weight": (32, 64),
    "midlayer.self_attn.o_proj.weight": (32, 64),
    "midlayer.self_attn.q_proj.weight": (64, 64),
    "midlayer.self_attn.v_proj.weight": (32, 64),
    "norm.weight": (32,),
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def make_target(folder: Path, rope: dict | None = None) -> Path:
    LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        rms_norm_eps=1e-4,
        max_position_embeddings=1024,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 12345.0},
        bos_token_id=3,
        eos_token_id=[4, 5],
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return make_target(tmp_path / "target")


def spec_of(target: Path, draft_vocab_size: int = len(DRAFT_IDS)) -> Eagle3Spec:
    return Eagle3Spec.of(Eagle3Knobs(vocab_size=draft_vocab_size), TargetCheckpoint(target), AUX_LAYERS)


def make_state(target: Path, draft_vocab_size: int = len(DRAFT_IDS)) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return Eagle3Draft(spec_of(target, draft_vocab_size)).state_dict()


@pytest.fixture
def folder(target: Path, tmp_path: Path) -> Path:
    return export_draft(spec_of(target), make_state(target), DRAFT_IDS, tmp_path / "draft")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_tensor_of_the_draft_arrives(target: Path, tmp_path: Path, dtype: str) -> None:
    state = make_state(target)
    written = load_file(export_draft(spec_of(target), state, DRAFT_IDS, tmp_path / "draft", dtype) / hf.WEIGHTS)
    assert {name: tuple(t.shape) for name, t in written.items()} == SHAPES | {"d2t": (32,), "t2d": (64,)}
    for name in SHAPES:
        assert torch.equal(written[name], state[name].to(getattr(torch, dtype))), name
    assert torch.equal(written["d2t"] + torch.arange(32), DRAFT_IDS)
    assert written["d2t"].dtype == torch.int64
    assert written["t2d"].tolist() == [i % 2 == 1 for i in range(64)]


def test_the_config_is_the_targets_in_the_words_of_both_servers(folder: Path) -> None:
    config = json.loads((folder / hf.CONFIG).read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is False
    assert config["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # vLLM's numbering

    loaded = AutoConfig.from_pretrained(folder)
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 64,
        "draft_vocab_size": 32,
        "rms_norm_eps": 1e-4,
        "max_position_embeddings": 1024,
        "bos_token_id": 3,
        "eos_token_id": [4, 5],
        "dtype": torch.bfloat16,
    }
    assert {name: getattr(loaded, name) for name in sizes} == sizes
    assert loaded.rope_parameters == {"rope_type": "default", "rope_theta": 12345.0}


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 0.0}, LLAMA3_ROPE], ids=["zero", "llama3"])
def test_rope_is_inherited_whole(tmp_path: Path, rope: dict) -> None:
    target = make_target(tmp_path / "target", rope)
    folder = export_draft(spec_of(target), make_state(target), DRAFT_IDS, tmp_path / "draft")
    assert AutoConfig.from_pretrained(folder).rope_parameters == rope
    config = json.loads((folder / hf.CONFIG).read_text())
    assert config["rope_theta"] == rope["rope_theta"]
    assert config.get("rope_scaling", {}).get("factor") == rope.get("factor")


def test_a_draft_over_the_whole_vocabulary_has_no_mapping(target: Path, tmp_path: Path) -> None:
    folder = export_draft(spec_of(target, 64), make_state(target, 64), torch.arange(64), tmp_path / "draft")
    assert load_file(folder / hf.WEIGHTS).keys() == SHAPES.keys()
    assert validate_export(folder).spec.vocab_size is None


@pytest.mark.parametrize(
    ("knobs", "shapes"),
    [
        ({"fc_norm": True, "norm_output": True}, {f"fc_norm.{i}.weight": (32,) for i in range(3)}),
        ({"norm_before_fc": True}, {"input_norm.weight": (96,)}),
    ],
)
def test_norms_of_eagle_3_1_are_told_to_servers_and_read_back(
    target: Path, tmp_path: Path, knobs: dict[str, bool], shapes: dict[str, tuple[int, ...]]
) -> None:
    spec = replace(spec_of(target), **knobs)
    folder = export_draft(spec, Eagle3Draft(spec).state_dict(), DRAFT_IDS, tmp_path / "draft")
    written = load_file(folder / hf.WEIGHTS)
    assert {name: tuple(t.shape) for name, t in written.items()} == SHAPES | shapes | {"d2t": (32,), "t2d": (64,)}
    config = json.loads((folder / hf.CONFIG).read_text())
    assert {name for name in NORMS if config[name]} == knobs.keys()
    assert validate_export(folder).spec == spec
    assert {f"model.{name}" for name in shapes} < spec.served_as().keys()
    assert spec.parameters() == sum(t.numel() for t in written.values() if t.is_floating_point())
    _edit_config(folder, **dict.fromkeys(knobs, False))
    with pytest.raises(ValueError, match=f"unknown tensors {min(shapes)}"):
        validate_export(folder)


def test_one_norm_before_fc_excludes_the_others(target: Path) -> None:
    with pytest.raises(ValueError, match=r"draft\.fc_norm and draft\.norm_before_fc exclude each other"):
        Eagle3Spec.of(Eagle3Knobs(fc_norm=True, norm_before_fc=True), TargetCheckpoint(target), AUX_LAYERS)


def test_a_single_layer_of_the_target_is_refused_as_sglang_would_not_mix_it(target: Path) -> None:
    with pytest.raises(ValueError, match=r"target\.aux_layers=\[3\] must name two layers or more"):
        Eagle3Spec.of(Eagle3Knobs(), TargetCheckpoint(target), [3])


def test_whoever_may_read_the_config_may_read_the_weights(folder: Path) -> None:
    assert (folder / hf.WEIGHTS).stat().st_mode == (folder / hf.CONFIG).stat().st_mode


def test_validation_tells_what_the_folder_holds(folder: Path) -> None:
    assert validate_export(folder) == hf.DraftExport(folder, spec_of(folder.parent / "target"), "bfloat16")


PUBLISHED_WITHOUT = (
    *("torch_dtype", "head_dim", "rope_parameters", "target_hidden_size", "num_aux_hidden_states", "eagle_config"),
    *("eagle_aux_hidden_state_layer_ids", "bos_token_id", "eos_token_id", "pad_token_id", *NORMS),
)


def test_a_draft_that_others_have_published_is_read(tmp_path: Path) -> None:
    """As SpecForge and the paper's authors write it: less in its config, and an embedding beside the weights."""
    LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=4, vocab_size=64
    ).save_pretrained(tmp_path / "target")
    spec = Eagle3Spec.of(Eagle3Knobs(vocab_size=32), TargetCheckpoint(tmp_path / "target"), None)
    folder = export_draft(spec, Eagle3Draft(spec).state_dict(), DRAFT_IDS, tmp_path / "draft")
    _edit_config(folder, **dict.fromkeys(PUBLISHED_WITHOUT), dtype="bfloat16")
    _edit_weights(folder, lambda t: t.update({"embed_tokens.weight": torch.ones(64, 32, dtype=torch.bfloat16)}))
    (folder / "README.md").touch()
    read = validate_export(folder).spec
    assert read.target == replace(spec.target, bos_token_id=None, eos_token_id=None)
    assert (read.layers, read.vocab_size, read.hf_tensors()) == ((1, 2, 3), 32, spec.hf_tensors())
    assert hf.read_weights(folder).keys() == spec.hf_tensors().keys() | {"d2t", "t2d"}
    _edit_config(folder, num_hidden_layers=2)
    with pytest.raises(ValueError, match="num_hidden_layers is 2; an EAGLE3 draft here has one"):
        validate_export(folder)


def _rename(state: dict[str, Tensor]) -> None:
    state["midlayer.mlp.up.weight"] = state.pop("midlayer.mlp.up_proj.weight")


def _drop(state: dict[str, Tensor]) -> None:
    del state["norm.weight"]


def _transpose(state: dict[str, Tensor]) -> None:
    state["fc.weight"] = state["fc.weight"].T


def _not_a_number(state: dict[str, Tensor]) -> None:
    state["midlayer.self_attn.v_proj.weight"][3, 5] = torch.nan


def _nothing(state: dict[str, Tensor]) -> None:
    state["midlayer.hidden_norm.weight"].zero_()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_rename, "unknown.*midlayer.mlp.up.weight"),
        (_drop, "missing.*norm.weight"),
        (_transpose, r"fc.weight.*\[96, 32\].*\[32, 96\]"),
        (_not_a_number, "v_proj.weight.*NaN"),
        (_nothing, "hidden_norm.weight.*zeros"),
    ],
)
def test_a_bad_state_is_refused_and_the_older_export_stays(folder: Path, target: Path, spoil, named: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    state = make_state(target)
    spoil(state)
    with pytest.raises(ValueError, match=named):
        export_draft(spec_of(target), state, DRAFT_IDS, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_values_too_large_for_the_dtype_are_refused(target: Path, tmp_path: Path) -> None:
    state = make_state(target)
    state["lm_head.weight"][0, 0] = 1e6
    export_draft(spec_of(target), state, DRAFT_IDS, tmp_path / "draft", "bfloat16")
    with pytest.raises(ValueError, match=r"lm_head\.weight.*infinities"):
        export_draft(spec_of(target), state, DRAFT_IDS, tmp_path / "draft", "float16")


@pytest.mark.parametrize("ids", [DRAFT_IDS.flip(0), DRAFT_IDS + 1, DRAFT_IDS - 2, DRAFT_IDS.clamp(min=5)])
def test_draft_ids_must_increase_within_the_vocabulary(target: Path, tmp_path: Path, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="draft_ids must be increasing token ids from 0 to 63"):
        export_draft(spec_of(target), make_state(target), ids, tmp_path / "draft")


def test_settings_are_checked(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype='int8' must be one of bfloat16, float16, float32"):
        export_draft(spec_of(target), make_state(target), DRAFT_IDS, tmp_path / "draft", "int8")
    with pytest.raises(ValueError, match="aux_layers"):
        Eagle3Spec.of(Eagle3Knobs(), TargetCheckpoint(target), (1, 3, 8))


def test_an_older_export_is_replaced_and_nothing_else(folder: Path, target: Path) -> None:
    state = make_state(target)
    state["norm.weight"] *= 2
    export_draft(spec_of(target), state, DRAFT_IDS, folder)
    assert load_file(folder / hf.WEIGHTS)["norm.weight"].eq(2).all()
    assert {path.name for path in folder.parent.iterdir()} == {"target", "draft"}

    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not an export.*notes\.txt"):
        export_draft(spec_of(target), state, DRAFT_IDS, folder)
    with pytest.raises(ValueError, match="target is not an exported draft"):
        export_draft(spec_of(target), state, DRAFT_IDS, target)
    assert (target / "config.json").exists()


def test_a_full_disk_leaves_the_older_export(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_draft(spec_of(target), make_state(target), DRAFT_IDS, folder)
    assert {path.name for path in folder.parent.iterdir()} == {"target", "draft"}
    validate_export(folder)


def test_who_was_given_up_replaces_no_export(folder: Path, target: Path) -> None:
    before = (folder / hf.WEIGHTS).read_bytes()
    state = make_state(target)
    state["norm.weight"] *= 2

    def fence() -> None:
        raise LookupError("another generation has taken over")

    with pytest.raises(LookupError):
        export_draft(spec_of(target), state, DRAFT_IDS, folder, fence=fence)
    assert (folder / hf.WEIGHTS).read_bytes() == before
    assert {path.name for path in folder.parent.iterdir()} == {"target", "draft"}


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / hf.CONFIG).read_text())
    (folder / hf.CONFIG).write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))


def _edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / hf.WEIGHTS)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / hf.WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: _edit_weights(f, _rename), "unknown.*midlayer.mlp.up.weight"),
        (lambda f: _edit_weights(f, _drop), "missing.*norm.weight"),
        (lambda f: _edit_weights(f, lambda t: t.pop("t2d")), "missing.*t2d"),
        (lambda f: _edit_weights(f, lambda t: t.update(fc=torch.ones(2))), "unknown.*fc"),
        (lambda f: _edit_weights(f, lambda t: t["d2t"].add_(1)), "different draft vocabularies"),
        (
            lambda f: _edit_weights(f, lambda t: t.update({"norm.weight": t["norm.weight"].float()})),
            "norm.weight.*float32",
        ),
        (lambda f: (f / hf.WEIGHTS).write_bytes((f / hf.WEIGHTS).read_bytes()[:500]), "cannot be read"),
        (lambda f: (f / hf.WEIGHTS).unlink(), "not an exported draft.*model.safetensors"),
        (lambda f: (f / hf.CONFIG).write_text("{"), "not JSON"),
        (lambda f: _edit_config(f, architectures=["LlamaForCausalLM"]), "not an exported draft: its architectures are"),
        (lambda f: _edit_config(f, draft_vocab_size=None), "lacks 'draft_vocab_size'"),
        (lambda f: _edit_config(f, intermediate_size=64), "gate_proj.weight"),
    ],
)
def test_a_spoiled_folder_is_refused_by_name(folder: Path, spoil, named: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=named):
        validate_export(folder)
