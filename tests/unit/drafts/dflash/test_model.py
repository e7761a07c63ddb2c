"""The whole DFlash step against the dense oracle: loss, sums, and the gradient of every parameter and of the input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.autograd_memory import LargestTensor
from tests.mutation import Mutation
from tests.oracles.dflash_cases import Case, Step, build, run_oracle, run_product
from tests.oracles.eagle3_cases import worst_error
from torchspec.drafts.dflash import model as dflash

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

cases = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    block_size=st.integers(2, 7),
    num_layers=st.integers(1, 3),
    num_anchors=st.integers(1, 7),
    soft=st.booleans(),
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=3).map(tuple),
    padding=st.integers(0, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 16]),
    mask_rate=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    chunk=st.integers(1, 50),
)


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=25, derandomize=True, deadline=None, phases=[Phase.generate])
@given(case=cases, tile=st.sampled_from([0, 1, 4, 100]))
def test_equals_dense_oracle(dtype: torch.dtype, case: Case, tile: int) -> None:
    step = build(replace(case, dtype=dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dflash, "TILE", tile)
        assert worst_error(run_product(step), run_oracle(step)) <= TOLERANCE[dtype]


def test_embeddings_come_as_the_targets_own_layers_get_them() -> None:
    step = build(Case())
    scaled = replace(step.target, embedding_scale=2.5)
    expected = replace(step, target=replace(step.target, embedding_VH=2.5 * step.target.embedding_VH))
    found = run_product(replace(step, target=scaled))
    step.draft.zero_grad()
    assert worst_error(found, run_oracle(expected)) <= 1e-12


@pytest.mark.parametrize("soft", [False, True])
def test_cases_are_not_trivial(soft: bool) -> None:
    """The default case has slots of every kind, and gradients everywhere: zeros cannot pass."""
    step = build(Case(soft=soft))
    result = run_oracle(step)
    supervised, correct = (result.sums[name].sum() for name in ("supervised", "correct"))
    assert len(plan(step).anchor_N) * step.draft.spec.positions > supervised > correct > 0
    assert all(gradient.abs().max() > 1e-3 for gradient in result.gradients.values())


ATTENTION, DRAFT, PLAN = dflash.BlockAttention, dflash.DFlashDraft, dflash.Blocks
MUTATIONS: dict[str, tuple[Any, str, str, str]] = {
    "zero attention": (ATTENTION, "forward", "return o_NXKE", "return o_NXKE * 0"),
    "causal blocks": (ATTENTION, "forward", "v_NWKE, causal=False", "v_NWKE, causal=True"),
    "no output in the context's backward": (
        ATTENTION, "backward", "q_NXKE, o_NXKE, lse_NXK\n", "q_NXKE, o_NXKE * 0, lse_NXK\n"),
    "no output in the block's backward": (
        ATTENTION, "backward", "o_NXKE, lse_NXK, False", "o_NXKE * 0, lse_NXK, False"),
    "context without gradient": (ATTENTION, "backward", "+= dk.sum(0)", "+= 0"),
    "the anchor's own state seen": (dflash, "tiles_of", "slice(row, row + first)", "slice(row, row + first + 1)"),
    "common context left out": (dflash, "tiles_of", "if first > 0", "if first > 10**6"),
    "rest of the context left out": (dflash, "tiles_of", "if last > first", "if last > first + 10**6"),
    "heads mixed up": (dflash.Attention, "forward", "blocks.size)).transpose(2, 3)", "blocks.size))"),
    "keys not normed": (dflash.Attention, "_keys_values", "self.k_norm(k)", "k + 0 * self.k_norm(k)"),
    "context normed in each layer": (
        dflash.DecoderLayer, "forward", ", context_CH, blocks", ", self.input_layernorm(context_CH), blocks"),
    "no residual around attention": (dflash.DecoderLayer, "forward", "x_RH = x_RH + ", "x_RH = "),
    "the known token in the wrong slot": (DRAFT, "_residual", "ids_NW[:, 0]", "ids_NW[:, 1]"),
    "positions of the block shifted": (DRAFT, "_rotations", "positions[:slots]", "positions[1 : slots + 1]"),
    "positions of the context dropped": (DRAFT, "_rotations", "x[blocks.context_C]", "x[blocks.context_C * 0]"),
    "guesses shifted": (PLAN, "plan", "+ position_M + 1", "+ position_M"),
    "samples run into each other": (PLAN, "plan", "+ step_k < length", "+ step_k < 10**6"),
    "the loss mask ignored": (PLAN, "plan", " & loss_mask_BS.flatten()[flat_Nk]", ""),
    "unweighted denominator": (DRAFT, "forward", "new_tensor(spec.position_weights)", "new_tensor(1.0)"),
    "what the target thought of the next token": (DRAFT, "_teacher", "token_flat_P - 1", "token_flat_P"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake, written into the product's own source, breaks the comparison with the oracle."""
    mutation = Mutation(*MUTATIONS[name])
    step = build(Case(padding=0, soft=mutation.function == "_teacher"))
    expected = run_oracle(step)
    assert worst_error(run_product(step), expected) <= 1e-12
    monkeypatch.setattr(mutation.owner, mutation.function, mutation.written())
    assert worst_error(run_product(step), expected) > 1e-4


def plan(step: Step) -> dflash.Blocks:
    batch, spec = step.batch, step.draft.spec
    return dflash.Blocks.plan(batch.loss_mask_BS, batch.seeds_B, spec.block_size, spec.num_anchors)


def anchors(mask: list[int], seed: int = 0, block_size: int = 4, limit: int = 100) -> list[int]:
    return dflash.draw_anchors(torch.tensor(mask, dtype=torch.bool), seed, block_size, limit).tolist()


def test_anchors_are_loss_tokens_with_another_behind_them() -> None:
    assert anchors([0, 0, 1, 1, 1, 1]) == [2, 3, 4], "short tails are used, the last token has nothing to guess"
    assert anchors([1, 0, 0, 1, 0, 0, 0, 1]) == [0], "token 3 reaches 6 and nothing to guess there"
    assert anchors([1, 0, 0, 1, 0, 0, 0, 1], block_size=5) == [0, 3]
    assert anchors([0, 1, 1], block_size=64) == [1]
    assert anchors([0, 0, 1]) == anchors([1]) == anchors([0, 0]) == []


def test_anchors_follow_from_the_seed_alone() -> None:
    mask = [0] * 20 + [1] * 200
    first, again, other = (anchors(mask, seed, limit=30) for seed in (7, 7, 8))
    assert first == again != other
    assert len(set(first)) == 30 and first == sorted(first) and min(first) >= 20 and max(first) < 219
    assert anchors(mask, 7, limit=199) == anchors(mask, 8, limit=1000) == list(range(20, 219))
    often = torch.zeros(220)
    for seed in range(400):
        often[anchors(mask, seed, limit=30)] += 1
    assert (often[20:219] > 30).all() and (often[20:219] < 90).all(), "each about 60 times"


def test_the_blocks_of_a_sample_do_not_depend_on_its_batch() -> None:
    step = build(Case(lengths=(30, 25, 20)))
    whole = plan(step)
    batch, length = step.batch, step.batch.ids_BS.shape[1]
    for b in range(3):
        step.batch = replace(batch, loss_mask_BS=batch.loss_mask_BS[b : b + 1], seeds_B=batch.seeds_B[b : b + 1])
        assert torch.equal(plan(step).anchor_N, whole.anchor_N[whole.anchor_flat_N // length == b])


def test_samples_without_anchors_count_nothing() -> None:
    step = build(Case())
    mask_BS = step.batch.loss_mask_BS.clone()
    mask_BS[1] = False
    step.batch = replace(step.batch, loss_mask_BS=mask_BS)
    assert worst_error(run_product(step), run_oracle(step)) <= 1e-12


def test_the_targets_pieces_get_no_gradient() -> None:
    step = build(Case())
    output = step.draft(step.batch, step.target)
    assert not any(x.requires_grad for x in (step.target.embedding_VH, step.target.draft_head_DH))
    assert output.total.requires_grad


def test_memory_is_linear_in_the_length() -> None:
    """Nothing of size S x S or R x S: the largest tensor is one of the input, or a causal tile's queries."""
    length, heads, width, slots, blocks = 3000, 1, 8, 4, 200
    step = build(Case(lengths=(length,), num_anchors=blocks, kv_heads=heads, group=1, hidden=8, vocab=10, padding=0))
    with LargestTensor() as largest:
        step.draft(step.batch, step.target).total.backward()
    states, tile = length * 2 * 8, heads * width * slots * (dflash.TILE + 1)
    assert states <= largest.numel <= max(states, tile) < blocks * slots * length / 10


def test_a_misfit_is_named() -> None:
    step = build(Case())
    with pytest.raises(ValueError, match="aux states are 47 wide; 2 layers of 24 make 48"):
        step.draft(replace(step.batch, hs_BSA=step.batch.hs_BSA[..., :-1]), step.target)


def test_parameters_are_those_of_the_export() -> None:
    draft = build(Case(num_layers=3)).draft
    shapes = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    assert shapes == draft.spec.hf_tensors()
    assert draft.spec.parameters() == sum(tensor.numel() for tensor in draft.parameters())
    assert draft.units() == list(draft.layers) and len(draft.units()) == 3
