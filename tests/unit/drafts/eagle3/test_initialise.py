"""Deriving a draft from a target: sizes, rotary embedding, and the few tensors that are read from its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from torchspec.drafts.draft import Batch, DraftOptions
from torchspec.drafts.eagle3.model import Eagle3Draft
from torchspec.drafts.eagle3.spec import Eagle3Knobs, Eagle3Spec
from torchspec.nn.rope import rotary_table
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.head import load_target_head
from torchspec.target.shape import TargetShape

V, H = 20, 8
EXPORTED = """
fc.weight lm_head.weight midlayer.hidden_norm.weight midlayer.input_layernorm.weight
midlayer.mlp.down_proj.weight midlayer.mlp.gate_proj.weight midlayer.mlp.up_proj.weight
midlayer.post_attention_layernorm.weight midlayer.self_attn.k_proj.weight midlayer.self_attn.o_proj.weight
midlayer.self_attn.q_proj.weight midlayer.self_attn.v_proj.weight norm.weight
"""


def checkpoint_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(V, H, generator=generator),
        "model.norm.weight": torch.randn(H, generator=generator),
        "lm_head.weight": torch.randn(V, H, generator=generator),
    }


def write_checkpoint(folder: Path, tied: bool = False, sharded: bool = False, without: str = "") -> Path:
    tensors = {name: tensor for name, tensor in checkpoint_tensors().items() if name != without}
    if tied:
        tensors.pop("lm_head.weight")
    sizes = {"hidden_size": H, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": V}
    LlamaConfig(rms_norm_eps=1e-6, tie_word_embeddings=tied, **sizes).save_pretrained(folder)
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i:05d}.safetensors" for i, name in enumerate(tensors)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    layers = {"model.layers.0.mlp.up_proj.weight": "a-shard-that-is-not-there.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files | layers}))
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_only_the_pieces_it_needs(tmp_path: Path, tied: bool, sharded: bool) -> None:
    draft_ids_D = torch.tensor([1, 4, 5, 19])
    head = load_target_head(
        TargetCheckpoint(write_checkpoint(tmp_path, tied, sharded)), torch.float32, "cpu", draft_ids_D
    )
    tensors = checkpoint_tensors()
    full_VH = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(head.embedding_VH, tensors["model.embed_tokens.weight"])
    assert torch.equal(head.draft_head_DH, full_VH[draft_ids_D])
    assert torch.equal(head.rest_head_XH, full_VH[[i for i in range(V) if i not in draft_ids_D]])
    assert torch.equal(head.norm_H, tensors["model.norm.weight"])
    assert head.norm_eps == 1e-6


def test_without_draft_ids_the_whole_vocabulary_is_the_drafts(tmp_path: Path) -> None:
    head = load_target_head(TargetCheckpoint(write_checkpoint(tmp_path)), torch.bfloat16, "cpu")
    assert head.draft_head_DH.shape == (V, H)
    assert head.rest_head_XH.shape == (0, H)
    assert head.embedding_VH.dtype == torch.bfloat16


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, sharded: bool, name: str) -> None:
    folder = write_checkpoint(tmp_path, sharded=sharded, without=name)
    with pytest.raises(ValueError, match=rf"target\.path: .*{name}"):
        load_target_head(TargetCheckpoint(folder), torch.float32, "cpu")


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"target\.path: .* it has no config\.json"):
        TargetCheckpoint(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        load_target_head(TargetCheckpoint(tmp_path), torch.float32, "cpu")


def test_teacher_equals_the_real_target(target_path: Path) -> None:
    """Pre-norm and post-norm states of SmolLM2 both give the logits that transformers computes."""
    model = AutoModelForCausalLM.from_pretrained(target_path, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    model.model.norm.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    with torch.no_grad():
        logits_NV = model(torch.tensor([[1, 4093, 198, 2683, 314, 260, 3575]])).logits[0]
    draft_ids_D = torch.arange(3, 49152, 7)
    target = load_target_head(TargetCheckpoint(target_path), torch.float32, "cpu", draft_ids_D)
    expected_ND = logits_NV[:, draft_ids_D].softmax(-1)
    counted_N = torch.isin(logits_NV.argmax(-1), draft_ids_D)
    for state, norm_state in zip(seen, ("pre_norm", "post_norm"), strict=True):
        targets = target.teacher(state[0], norm_state).chunk(slice(0, 7), torch.float32)
        torch.testing.assert_close(targets.probabilities(torch.arange(7)), expected_ND, rtol=1e-3, atol=1e-5)
        assert torch.equal(targets.choice_n, expected_ND.argmax(-1))
        assert torch.equal(targets.counted_n, counted_N)
    with pytest.raises(ValueError, match="norm_state='normed' must be"):
        target.teacher(seen[0], "normed")  # type: ignore[arg-type]


def spec_for(folder: Path, config: PretrainedConfig | None = None, **knobs: Any) -> Eagle3Spec:
    if config is not None:
        config.save_pretrained(folder)
    return Eagle3Spec.of(Eagle3Knobs(**knobs), TargetCheckpoint(folder), None)


def test_the_draft_is_derived_from_the_target(target_path: Path, tmp_path: Path) -> None:
    spec = spec_for(target_path, vocab_size=8192)
    target = spec.target
    assert (target.hidden_size, target.num_heads, target.num_kv_heads, target.head_dim) == (576, 9, 3, 64)
    assert (target.intermediate_size, target.vocab_size, spec.draft_vocab_size) == (1536, 49152, 8192)
    assert (spec.layers, spec.vocab_size, spec.halo) == ((1, 14, 26), 8192, 7)
    assert target.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    wide = spec_for(tmp_path, Qwen3Config(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=128))
    assert wide.target.head_dim == 128
    assert wide.vocab_size is None and wide.draft_vocab_size == wide.target.vocab_size


@pytest.mark.parametrize(
    ("change", "knobs", "message"),
    [
        ({}, {"vocab_size": 50_000}, "draft.vocab_size=50000"),
        ({"num_key_value_heads": 2}, {}, "not a multiple of num_kv_heads=2"),
    ],
)
def test_impossible_drafts_are_refused(
    change: dict[str, Any], knobs: dict[str, Any], message: str, target_path: Path, tmp_path: Path
) -> None:
    fields = json.loads((target_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=message):
        spec_for(tmp_path, **knobs)


def test_parameter_names_are_those_of_the_export(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, LlamaConfig(hidden_size=16, num_attention_heads=2, intermediate_size=8), vocab_size=10)
    shapes = {name: tuple(tensor.shape) for name, tensor in Eagle3Draft(spec).state_dict().items()}
    assert shapes == spec.hf_tensors()
    assert sorted(shapes) == EXPORTED.split()
    assert spec.parameters() == sum(tensor.numel() for tensor in Eagle3Draft(spec).parameters())


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def test_target_init_is_the_targets_last_layer(target_path: Path) -> None:
    """Fed with the input of the target's last layer as the deepest aux state, the draft's hidden states are its own."""
    model = AutoModelForCausalLM.from_pretrained(target_path, dtype=torch.float32).eval()
    seen: dict[str, Tensor] = {}
    last = model.model.layers[-1]
    last.register_forward_pre_hook(lambda _, args: seen.update(deepest=args[0]))
    ids_BS = torch.tensor([[1, 4093, 198, 2683, 314, 260, 3575, 282, 4649]])
    with torch.no_grad():
        logits_SV = model(ids_BS).logits[0]
    draft_ids_D = torch.arange(0, 49152, 5)
    spec = spec_for(target_path, vocab_size=len(draft_ids_D), ttt_length=1, init="target")
    head = load_target_head(TargetCheckpoint(target_path), torch.float32, "cpu", draft_ids_D)
    draft = spec.build(head, TargetCheckpoint(target_path), DraftOptions())
    logits: list[Tensor] = []
    draft.norm.register_forward_hook(lambda _, args, output: logits.append(output[0] @ draft.lm_head.weight.T))
    deepest_BSH = seen["deepest"]
    batch = Batch(
        hs_BSA=torch.cat((torch.randn_like(deepest_BSH), torch.randn_like(deepest_BSH), deepest_BSH), dim=-1),
        lhs_BSH=torch.zeros_like(deepest_BSH),
        ids_BS=ids_BS,
        loss_mask_BS=torch.ones_like(ids_BS, dtype=torch.bool),
        lengths_B=torch.tensor([ids_BS.shape[1]]),
        seeds_B=torch.zeros(1),
    )
    draft(batch, head)
    torch.testing.assert_close(logits[0], logits_SV[:-1, draft_ids_D], rtol=1e-3, atol=1e-3)


def test_default_init_takes_the_output_rows_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    draft = Eagle3Draft(spec_for(folder, vocab_size=4))
    before = {name: parameter.clone() for name, parameter in draft.named_parameters()}
    head = load_target_head(TargetCheckpoint(folder), torch.float32, "cpu", torch.tensor([1, 4, 5, 19]))
    draft.initialise(head, TargetCheckpoint(folder))
    changed = {name for name, parameter in draft.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"lm_head.weight"}
    assert torch.equal(draft.lm_head.weight, head.draft_head_DH)


@pytest.mark.parametrize("rope_type", ROPES)
def test_rotary_table_equals_transformers(rope_type: str) -> None:
    llama = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": rope_type, "rope_theta": 5e4, **ROPES[rope_type]},
    )
    target = TargetShape(32, 2, 2, 16, 8, 1e-6, V, 256, llama.rope_parameters)
    table = rotary_table(target, torch.arange(100), torch.float32)
    expected = LlamaRotaryEmbedding(llama)(torch.zeros(1), torch.arange(100).unsqueeze(0))
    for got, want in zip(table, expected, strict=True):
        torch.testing.assert_close(got, want[0], rtol=0, atol=2e-5)
