"""DFlash in numbers: its knobs and layers, its mask token, its folder, what servers are told, what a step costs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast

from tests.autograd_memory import kept_by_a_forward
from tests.oracles.dflash_cases import Case, build, spec_of
from torchspec.config.load import parse_config
from torchspec.config.schema import TrainingConfig
from torchspec.drafts.dflash.model import DFlashDraft
from torchspec.drafts.dflash.spec import DFlashKnobs, DFlashSpec, default_layers
from torchspec.drafts.draft import DraftOptions
from torchspec.drafts.export import CONFIG, DraftExport, export_draft, validate_export
from torchspec.drafts.spec import Work
from torchspec.target.checkpoint import TargetCheckpoint

WORDS = ["<s>", "</s>", "a", "b", "c"]


def make_target(folder: Path, special: tuple[str, ...] = (), vocab_size: int | None = None, **roles: Any) -> Path:
    """A target of 12 layers whose tokenizer knows ``WORDS`` and the special tokens; by default all rows have one."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", **roles)
    tokenizer.chat_template = "{{ messages }}<|turn|>"
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(WORDS) + len(special) if vocab_size is None else vocab_size,
        rms_norm_eps=1e-4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
        bos_token_id=0,
        eos_token_id=1,
    ).save_pretrained(folder)
    return folder


def draft_for(folder: Path, layers: list[int] | None = None, **knobs: Any) -> DFlashSpec:
    return DFlashSpec.of(DFlashKnobs(**knobs), TargetCheckpoint(folder), layers)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return make_target(tmp_path / "target", vocab_size=10)


@pytest.mark.parametrize(
    ("layers", "features", "expected"),
    [
        (36, 5, [1, 9, 17, 25, 33]),
        (32, 5, [1, 8, 15, 22, 29]),
        (30, 5, [1, 8, 14, 20, 27]),
        (30, 3, [1, 14, 27]),
        (28, 1, [14]),
        (4, 1, [2]),
        (5, 2, [1, 2]),
    ],
)
def test_layers_are_spread_evenly(layers: int, features: int, expected: list[int]) -> None:
    assert default_layers(layers, features) == expected
    assert expected[-1] <= layers - 2


@pytest.mark.parametrize(("layers", "features"), [(6, 5), (4, 2), (3, 3), (1, 1)])
def test_too_few_layers_have_no_default(layers: int, features: int) -> None:
    with pytest.raises(
        ValueError, match=f"draft.num_features={features} has no default layers in a target of {layers}"
    ):
        default_layers(layers, features)


def test_the_draft_is_derived_from_the_target(target_path: Path) -> None:
    spec = draft_for(target_path)
    assert (spec.target.hidden_size, spec.target.num_heads, spec.target.head_dim) == (576, 9, 64)
    assert (spec.layers, spec.num_target_layers, spec.num_layers) == ((1, 8, 14, 20, 27), 30, 5)
    assert (spec.block_size, spec.positions, spec.draft_tokens, spec.vocab_size, spec.halo) == (16, 15, 15, None, None)
    assert spec.target.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert spec.mask_token_id == 16, "<empty_output>: the last special token that no chat holds"
    assert draft_for(target_path, [3, 9]).layers == (3, 9)
    assert draft_for(target_path, num_features=2, num_layers=1).layers == (1, 27)


def test_the_mask_token_is_one_that_no_text_holds(tmp_path: Path) -> None:
    spare = ("<|turn|>", "<|reserved_1|>", "<|x|>")
    turn, reserved, x = range(len(WORDS), len(WORDS) + 3)
    masked = make_target(tmp_path / "masked", (*spare, "[M]"), mask_token="[M]", vocab_size=20)
    assert draft_for(masked).mask_token_id == x + 1, "the tokenizer's own"
    assert draft_for(make_target(tmp_path / "servers", (*spare, "<|MASK|>"))).mask_token_id == x + 1
    assert draft_for(make_target(tmp_path / "rows", spare, vocab_size=20)).mask_token_id == x + 1, (
        "a row without a token"
    )
    assert draft_for(make_target(tmp_path / "reserved", spare)).mask_token_id == reserved
    assert draft_for(make_target(tmp_path / "special", ("<|x|>", "<|turn|>"))).mask_token_id == turn
    assert draft_for(make_target(tmp_path / "none", ("<|turn|>",)), mask_token_id=2).mask_token_id == 2
    assert draft_for(masked, mask_token_id=2).mask_token_id == 2


@pytest.mark.parametrize(
    ("knobs", "layers", "message"),
    [
        ({}, None, r"draft\.mask_token_id: .* no mask token, no embedding row without a token and no special token"),
        ({"mask_token_id": 6}, None, r"draft\.mask_token_id=6 must be below the target's 6 tokens"),
        ({"mask_token_id": 5}, [1, 11], r"target\.aux_layers=\[1, 11\] must be .* from 0 to 10 .* last one's"),
        ({"mask_token_id": 5}, [5, 1], r"target\.aux_layers=\[5, 1\] must be increasing"),
        ({"mask_token_id": 5, "num_features": 11}, None, r"draft\.num_features=11 has no default layers"),
    ],
)
def test_impossible_drafts_are_refused_in_one_line(
    tmp_path: Path, knobs: dict[str, Any], layers: list[int] | None, message: str
) -> None:
    folder = make_target(tmp_path, ("<|turn|>",))
    with pytest.raises(ValueError, match=message) as refusal:
        draft_for(folder, layers, **knobs)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"kind": "dflash", "ttt_length": 3},
            "unknown key draft.ttt_length: it is one of kind eagle3, draft.kind is dflash",
        ),
        ({"block_size": 8}, "unknown key draft.block_size: it is one of kind dflash, draft.kind is eagle3"),
        ({"kind": "dflesh"}, r"draft.kind: 'dflesh' does not fit; valid: eagle3 \| dflash"),
        ({"kind": "dflash", "block_size": 1}, "draft.block_size: 1 does not fit"),
        ({"kind": "dflash", "loss": "mse"}, "draft.loss: 'mse' does not fit"),
    ],
)
def test_knobs_of_other_kinds_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({"target": {"path": "x"}, "draft": section})


def test_samples_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match=r"training\.attention_backend=usp: ranks cannot share the samples"):
        TrainingConfig(attention_backend="usp", sp_ring_size=2).shard_formula(spec_of(Case()).halo)


def test_a_block_fits_into_an_answer() -> None:
    spec = replace(spec_of(Case()), block_size=8)
    spec.check_answers(8)
    with pytest.raises(
        ValueError, match=r"draft\.block_size \(8\) is longer than any answer \(answer\.max_tokens is 7\)"
    ):
        spec.check_answers(7)


@pytest.mark.parametrize(("block_size", "gamma"), [(16, 7), (10, 5), (8, 4), (2, 1)])
def test_early_slots_weigh_more(block_size: int, gamma: int) -> None:
    weights = replace(spec_of(Case()), block_size=block_size, gamma=None).position_weights
    assert weights == [math.exp(-(k - 1) / gamma) for k in range(1, block_size)]
    assert replace(spec_of(Case()), gamma=2.0).position_weights[2] == math.exp(-1)


def test_the_folder_is_what_servers_read(target: Path, tmp_path: Path) -> None:
    spec = draft_for(target, [2, 5, 9], num_layers=2, block_size=8)
    torch.manual_seed(0)
    state = DFlashDraft(spec).state_dict()
    folder = export_draft(spec, state, torch.arange(10), tmp_path / "draft")
    written = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == spec.hf_tensors()
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert written.keys() >= {"fc.weight", "hidden_norm.weight", "norm.weight", "layers.1.self_attn.k_norm.weight"}
    assert len(written) == 3 + 2 * 11

    config = json.loads((folder / CONFIG).read_text())
    assert config["architectures"] == ["DFlashDraftModel"] and config["model_type"] == "qwen3"
    assert config["dflash_config"] == {"target_layer_ids": [2, 5, 9], "mask_token_id": 5}
    assert (config["block_size"], config["num_target_layers"], config["tie_word_embeddings"]) == (8, 12, False)
    assert not config.keys() & {"is_causal", "sliding_window", "use_sliding_window", "draft_vocab_size"}
    loaded = AutoConfig.from_pretrained(folder)
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 10,
        "rms_norm_eps": 1e-4,
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
        "attention_bias": False,
        "layer_types": ["full_attention"] * 2,
        "sliding_window": None,
        "dtype": torch.bfloat16,
    }
    assert {name: getattr(loaded, name) for name in sizes} == sizes
    assert loaded.rope_parameters == {"rope_type": "default", "rope_theta": 12345.0}
    assert validate_export(folder) == DraftExport(folder, spec, "bfloat16")


def test_a_checkpoint_keeps_all_of_it(target: Path) -> None:
    spec = draft_for(target, [2, 5], num_layers=3, block_size=8, num_anchors=9, gamma=3, loss="soft_ce")
    spec = replace(spec, export_yarn_factor=2.0)
    assert TypeAdapter(DFlashSpec).validate_python(json.loads(json.dumps(asdict(spec)))) == spec


@pytest.mark.parametrize("spoil", ["kind", "tensor"])
def test_a_spoiled_folder_is_refused(target: Path, tmp_path: Path, spoil: str) -> None:
    spec = draft_for(target, num_layers=1)
    state = DFlashDraft(spec).state_dict()
    if spoil == "tensor":
        state["layers.0.self_attn.q_norm.weight"] = state["layers.0.self_attn.q_norm.weight"][1:]
        with pytest.raises(
            ValueError, match=r"q_norm\.weight is torch.bfloat16 \[15\], expected torch.bfloat16 \[16\]"
        ):
            export_draft(spec, state, torch.arange(10), tmp_path / "draft")
        return
    folder = export_draft(spec, state, torch.arange(10), tmp_path / "draft")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"architectures": ["LlamaForCausalLMEagle3"]}))
    with pytest.raises(ValueError, match="lacks 'draft_vocab_size'"):
        validate_export(folder)


def test_yarn_comes_in_at_the_export(target: Path) -> None:
    spec = draft_for(target, export_yarn_factor=4)
    assert spec.target.rope_parameters["rope_type"] == "default"
    config = spec.hf_config("float32")
    rope = {
        "rope_type": "yarn",
        "rope_theta": 12345.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    assert config["rope_parameters"] == rope and config["max_position_embeddings"] == 4096
    assert config["rope_theta"] == 12345.0 and config["rope_scaling"]["factor"] == 4.0
    with pytest.raises(ValueError, match=r"draft\.export_yarn_factor=2\.0: .*rope_type yarn"):
        replace(spec, target=replace(spec.target, rope_parameters=rope), export_yarn_factor=2.0)


def test_what_a_server_is_told() -> None:
    spec = replace(spec_of(Case()), block_size=8)
    assert spec.server_args(7) == {"speculative_algorithm": "DFLASH", "speculative_num_draft_tokens": 8}
    assert spec.server_args(1)["speculative_num_draft_tokens"] == 2
    for wrong in (0, 8):
        with pytest.raises(ValueError, match=f"num_draft_tokens={wrong} must be from 1 to 7: .*draft.block_size=8"):
            spec.server_args(wrong)


def test_every_tensor_has_its_place_in_a_server() -> None:
    spec = spec_of(Case(num_layers=2))
    served = spec.served_as()
    assert sorted(name for parts in served.values() for name in parts) == sorted(spec.hf_tensors())
    attention, mlp = "layers.1.self_attn", "layers.1.mlp"
    assert served[f"{attention}.qkv_proj.weight"] == tuple(f"{attention}.{x}_proj.weight" for x in "qkv")
    assert served[f"{mlp}.gate_up_proj.weight"] == (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
    assert served["norm.weight"] == ("norm.weight",)


@pytest.mark.parametrize("soft", [False, True])
def test_flops_are_those_that_are_computed(soft: bool) -> None:
    """Against torch's count of matrix products, in which attention on a CPU is missing: a small share here."""
    step = build(Case(lengths=(60,), num_anchors=100, hidden=200, vocab=1000, mask_rate=1.0, soft=soft, padding=0))
    with FlopCounterMode(display=False) as counter:
        step.draft(step.batch, step.target).total.backward()
    assert counter.get_total_flops() == pytest.approx(step.draft.spec.flops(60, 60), rel=0.06)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layers", "anchors", "tokens"), [(1, 40, 400), (3, 300, 200)])
def test_activations_are_what_a_forward_keeps(
    layers: int, anchors: int, tokens: int, dtype: str, recompute: bool
) -> None:
    spec = spec_of(Case(num_layers=layers, num_anchors=anchors, hidden=96, head_dim=16, block_size=8, vocab=300))
    work = Work(2, tokens, None, True, dtype, recompute, 64)
    draft = DFlashDraft(spec, DraftOptions(work.loss_chunk_tokens, recompute))

    def expected(num_layers: int, recompute: bool) -> int:
        figures = replace(spec, num_layers=num_layers).rank_bytes(work._replace(recompute=recompute))
        return figures.activations + figures.keys_values

    one_layer = expected(2, recompute=False) - expected(1, recompute=False) if recompute else 0
    kept = one_layer + kept_by_a_forward(
        draft, dtype, work.samples, tokens
    )  # a recomputed layer is there in the backward alone
    assert 0.98 * kept < expected(layers, recompute) < 1.1 * kept


def test_larger_chunks_and_vocabularies_take_more() -> None:
    spec = replace(spec_of(Case()), num_anchors=500)
    small, large, soft = (
        each.rank_bytes(Work(1, 800, None, True, "float32", False, chunk)).temporaries
        for each, chunk in (
            (spec, 1024),
            (replace(spec, target=replace(spec.target, vocab_size=50_000)), 1024),
            (replace(spec, target=replace(spec.target, vocab_size=50_000), loss="soft_ce"), 1024),
        )
    )
    assert large == 1024 * 50_000 * 4 > small and soft == 2 * large
