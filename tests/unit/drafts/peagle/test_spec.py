"""P-EAGLE in numbers: its knobs, its mask token, its folder, who serves it, what a step costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from tests.autograd_memory import kept_by_a_forward
from tests.oracles.peagle_cases import Case, build
from torchspec.drafts.draft import DraftOptions
from torchspec.drafts.export import CONFIG, WEIGHTS, export_draft, read_spec, validate_export
from torchspec.drafts.peagle.model import PEagleDraft
from torchspec.drafts.peagle.spec import PEagleKnobs, PEagleSpec
from torchspec.drafts.spec import Work
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.shape import TargetShape

SHAPES = {
    "mask_hidden": (1, 1, 72),
    "fc_norm.0.weight": (24,),
    "fc_norm.1.weight": (24,),
    "fc_norm.2.weight": (24,),
    "fc.weight": (24, 72),
    "layers.0.hidden_norm.weight": (24,),
    "layers.0.input_layernorm.weight": (24,),
    "layers.0.post_attention_layernorm.weight": (24,),
    "layers.0.self_attn.q_proj.weight": (32, 48),
    "layers.0.self_attn.k_proj.weight": (16, 48),
    "layers.0.self_attn.v_proj.weight": (16, 48),
    "layers.0.self_attn.o_proj.weight": (24, 32),
    "layers.0.mlp.gate_proj.weight": (48, 24),
    "layers.0.mlp.up_proj.weight": (48, 24),
    "layers.0.mlp.down_proj.weight": (24, 48),
    "layers.1.input_layernorm.weight": (24,),
    "layers.1.post_attention_layernorm.weight": (24,),
    "layers.1.self_attn.q_proj.weight": (32, 24),
    "layers.1.self_attn.k_proj.weight": (16, 24),
    "layers.1.self_attn.v_proj.weight": (16, 24),
    "layers.1.self_attn.o_proj.weight": (24, 32),
    "layers.1.mlp.gate_proj.weight": (48, 24),
    "layers.1.mlp.up_proj.weight": (48, 24),
    "layers.1.mlp.down_proj.weight": (24, 48),
    "norm.weight": (24,),
    "lm_head.weight": (30, 24),
}


def spec_of(case: Case) -> PEagleSpec:
    return build(case).draft.spec


def test_a_draft_is_derived_from_its_target(target_path: Path) -> None:
    target = TargetCheckpoint(target_path)
    spec = PEagleSpec.of(PEagleKnobs(vocab_size=8192), target, None)
    assert (spec.layers, spec.num_layers, spec.positions, spec.draft_tokens) == ((1, 14, 26), 4, 8, 8)
    assert (spec.vocab_size, spec.halo, spec.mask_token_id) == (8192, None, target.mask_token_id)
    assert spec.position_weights == pytest.approx([0.8**k for k in range(8)])
    assert PEagleSpec.of(PEagleKnobs(mask_token_id=5), target, (2, 3)).layers == (2, 3)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"vocab_size": 50_000}, r"draft\.vocab_size=50000 must be from 1 to 49152"),
        ({"mask_token_id": 49152}, r"draft\.mask_token_id=49152 must be below the target's 49152 tokens"),
        ({"init": "target", "num_layers": 31}, r"draft\.num_layers=31 must be at most the target's 30"),
    ],
)
def test_impossible_drafts_are_refused(target_path: Path, knobs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PEagleSpec.of(PEagleKnobs(**knobs), TargetCheckpoint(target_path), None)


def test_the_folder_is_in_vllms_words_and_reads_back(tmp_path: Path) -> None:
    step = build(Case(fc_norm=True))
    spec, weights = step.draft.spec, step.draft.state_dict()
    folder = export_draft(spec, weights, step.draft_ids_D, tmp_path / "draft", "float32")
    written = load_file(folder / WEIGHTS)
    assert {name: tuple(x.shape) for name, x in written.items()} == SHAPES | {"d2t": (30,), "t2d": (50,)}
    assert all(torch.equal(written[name], weights[name].float()) for name in SHAPES)
    assert spec.parameters() == sum(x.numel() for x in step.draft.parameters())
    config = json.loads((folder / CONFIG).read_text())
    told = {
        "architectures": ["Eagle3LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "ptd_token_id": 7,
        "eagle_aux_hidden_state_layer_ids": [2, 3, 4],  # by their inputs
        "num_aux_hidden_states": 3,
        "fc_norm": True,
        "draft_vocab_size": 30,
    }
    assert {name: config[name] for name in told} == told
    assert validate_export(folder).spec == spec


def test_a_spoiled_folder_is_refused_by_name(tmp_path: Path) -> None:
    step = build(Case())
    spec, weights = step.draft.spec, step.draft.state_dict()
    with pytest.raises(ValueError, match="missing tensors mask_hidden"):
        export_draft(spec, {n: x for n, x in weights.items() if n != "mask_hidden"}, step.draft_ids_D, tmp_path / "a")
    folder = export_draft(spec, weights, step.draft_ids_D, tmp_path / "draft", "float32")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({name: x for name, x in config.items() if name != "ptd_token_id"}))
    with pytest.raises(ValueError, match="lacks 'ptd_token_id'"):
        read_spec(folder)


def test_sglang_is_not_asked_to_serve_it() -> None:
    with pytest.raises(ValueError, match=r"SGLang cannot serve a P-EAGLE draft; vLLM can .*parallel_drafting"):
        spec_of(Case()).server_args(3)


def test_flops_are_those_that_are_computed() -> None:
    """Against torch's count of matrix products, in which attention on a CPU is missing, a small share here, and the
    head's gradient, which is added in place."""
    case = Case(lengths=(60,), hidden=200, vocab=1000, draft_vocab=700, mask_rate=1.0, padding=0, num_layers=3)
    step = build(case)
    with FlopCounterMode(display=False) as counter:
        step.draft(step.batch, step.target).total.backward()
    uncounted = 2 * case.ttt_length * 60 * 200 * 700
    assert counter.get_total_flops() + uncounted == pytest.approx(step.draft.spec.flops(60, 60), rel=0.06)


SHAPE = TargetShape(
    hidden_size=96,
    num_heads=12,
    num_kv_heads=4,
    head_dim=16,
    intermediate_size=200,
    rms_norm_eps=1e-5,
    vocab_size=300,
    max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("num_layers", "num_positions", "fc_norm"), [(1, 2, False), (3, 7, True), (4, 3, False)])
def test_activations_are_what_a_forward_keeps(num_layers: int, num_positions: int, fc_norm: bool, dtype: str) -> None:
    spec = PEagleSpec(SHAPE, (1, 2, 3), 200, 7, num_layers, num_positions, fc_norm)
    work = Work(2, 960, None, False, dtype, False, 1024)
    draft = PEagleDraft(spec, DraftOptions(work.loss_chunk_tokens))
    planned, kept = spec.rank_bytes(work), kept_by_a_forward(draft, dtype, work.samples, work.num_tokens)
    assert 0.95 * kept < planned.activations + planned.keys_values < 1.1 * kept


def test_what_makes_a_step_larger() -> None:
    spec = PEagleSpec(SHAPE, (1, 2, 3), 200, 7, 4, 8)
    work = Work(2, 960, None, False, "float32", False, 64)
    plain, wide = spec.rank_bytes(work), replace(spec, draft_vocab_size=4000, target=replace(SHAPE, vocab_size=4000))
    small, large = wide.rank_bytes(work), wide.rank_bytes(work._replace(loss_chunk_tokens=4096))
    assert plain.temporaries <= small.temporaries < large.temporaries and small.activations == large.activations
    assert spec.rank_bytes(work._replace(recompute=True)).activations < 0.5 * plain.activations
    assert replace(spec, num_layers=5).rank_bytes(work).keys_values == 5 / 4 * plain.keys_values
