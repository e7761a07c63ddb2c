"""The whole P-EAGLE step against the dense oracle, against a server's view of one round, and against EAGLE3."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.mutation import Mutation
from tests.oracles import eagle3_cases
from tests.oracles.eagle3_cases import EPS, THETA, relative_error, worst_error
from tests.oracles.peagle_cases import Case, build, run_oracle, run_product
from tests.oracles.peagle_dense import served_logits
from torchspec.drafts.chain_draft import ChainDraft
from torchspec.drafts.draft import Batch, DraftOptions
from torchspec.drafts.peagle.model import PEagleDraft
from torchspec.drafts.peagle.spec import PEagleKnobs, PEagleSpec
from torchspec.nn import chain_attention, chain_rows, decoder, sequences
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.head import load_target_head

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
NORMED = Case(seed=8, fc_norm=True, padding=0)

cases = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    ttt_length=st.integers(2, 7),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4).map(tuple),
    padding=st.integers(0, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8, 16]),
    draft_vocab=st.integers(2, 50),
    mask_rate=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    chunk=st.integers(1, 90),
    fc_norm=st.booleans(),
    num_layers=st.integers(1, 3),
    mask_token=st.integers(0, 49),
)


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=25, derandomize=True, deadline=None, phases=[Phase.generate])
@given(case=cases)
def test_equals_dense_oracle(dtype: torch.dtype, case: Case) -> None:
    step = build(replace(case, dtype=dtype))
    assert worst_error(run_product(step), run_oracle(step)) <= TOLERANCE[dtype]


def test_cases_are_not_trivial() -> None:
    """They have positions of every kind, and gradients everywhere: zeros cannot pass."""
    result = run_oracle(build(NORMED))
    supervised, counted, correct = (result.sums[name].sum() for name in ("supervised", "counted", "correct"))
    assert supervised > counted > correct > 0
    assert all(gradient.abs().max() > 1e-3 for gradient in result.gradients.values())


def guesses(step: eagle3_cases.Step) -> Tensor:
    """[K, R, Vd] logits of the active rows."""
    hidden: list[Tensor] = []
    handle = step.draft.norm.register_forward_hook(lambda *args: hidden.append(args[-1]))
    with torch.no_grad():
        step.draft(step.batch, step.target)
    handle.remove()
    return hidden[0] @ step.draft.lm_head.weight.T


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_server_sees_the_same(num_layers: int) -> None:
    """Each active row by itself: what is known so far and the masks behind it, one sequence under a causal mask."""
    step = build(replace(NORMED, num_layers=num_layers))
    case, batch = step.case, step.batch
    logits_KRV = guesses(step)
    rows = chain_rows.ChainRows.plan(batch.loss_mask_BS, case.ttt_length).active_flat_R.tolist()
    assert len(rows) > 10
    for row, flat in enumerate(rows):
        sample, anchor = divmod(flat, batch.loss_mask_BS.shape[1])
        with torch.no_grad():
            served_KV = served_logits(
                dict(step.draft.named_parameters()),
                step.target.embedding_VH,
                case.mask_token,
                batch.hs_BSA[sample, : anchor + 1],
                batch.ids_BS[sample, : anchor + 2],
                case.ttt_length,
                case.kv_heads * case.group,
                case.kv_heads,
                THETA,
                EPS,
            )
        torch.testing.assert_close(logits_KRV[:, row], served_KV, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_positions", [2, 5])
def test_with_one_layer_the_first_position_is_eagle3s(num_positions: int) -> None:
    step = build(Case(num_layers=1, ttt_length=num_positions))
    other = eagle3_cases.build(eagle3_cases.Case(ttt_length=1))
    weights = {name.replace("layers.0", "midlayer"): x for name, x in step.draft.state_dict().items()}
    weights.pop("mask_hidden")
    other.draft.load_state_dict(weights)
    other = replace(other, batch=step.batch, target=step.target)
    ours, theirs = run_product(step), run_product(other)
    for name, expected in theirs.sums.items():
        assert relative_error(ours.sums[name][:1], expected) <= 1e-12
    assert theirs.sums["loss"] > 0


DRAFT, PLAN, CHAIN = PEagleDraft, chain_rows.ChainRows, chain_attention.ChainAttention
CHAINS = "keys[:k], values[:k]"
MUTATIONS: dict[str, tuple[Any, str, str, str]] = {
    "zero attention": (CHAIN, "forward", "return o_RQE.to(q_RQE.dtype)", "return q_RQE * 0"),
    "rows after the anchor seen": (chain_attention.PaddedKernel, "attend", "v_BSKE)", "v_BSKE, False)"),
    "another row's chain seen": (DRAFT, "_positions", CHAINS, "[x.roll(1, 0) for x in keys[:k]], values[:k]"),
    "own earlier positions unseen": (DRAFT, "_positions", CHAINS, "keys[k - 1 : k], values[k - 1 : k]"),
    "angle of the anchor": (DRAFT, "_rotations", "rows.active_angle_R + k", "rows.active_angle_R + 0 * k"),
    "a token of the text for the mask": (DRAFT, "_residual", "ids.new_full((1,), self.spec.mask_token_id)", "ids[:1]"),
    "own token, not the next": (DRAFT, "_residual", "rows.context_flat_C + 1", "rows.context_flat_C"),
    "mask state not normed": (DRAFT, "_residual", "self._mixed(self.mask_hidden", "self.fc(self.mask_hidden"),
    "deeper layers' input not normed": (
        DRAFT, "_residual", "layer.input_layernorm(residual)", "residual + 0 * layer.input_layernorm(residual)"),
    "rows mixed up": (DRAFT, "_positions", "residuals[0][rows_R]", "residuals[0][rows_R.flip(0)]"),
    "lower layers do not attend": (
        sequences.WholeSequences, "among_context", "self.rows.context_flat_C", "self.rows.context_flat_C.flip(0)"),
    "no residual around attention": (decoder.DecoderLayer, "forward", "residual_RH = residual_RH + ", "residual_RH = "),
    "students shifted": (PLAN, "of_windows", "1 + torch.arange", "0 + torch.arange"),
    "samples run into each other": (PLAN, "of_windows", "unsqueeze(1) % length >=", "unsqueeze(1) >="),
    "all positions weigh the same": (ChainDraft, "scored", "self.spec.position_weights", "[1.0] * self.spec.positions"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake, written into the product's own source, breaks the comparison with the oracle."""
    mutation = Mutation(*MUTATIONS[name])
    step = build(NORMED)
    expected = run_oracle(step)
    assert worst_error(run_product(step), expected) <= 1e-12
    monkeypatch.setattr(mutation.owner, mutation.function, mutation.written())
    assert worst_error(run_product(step), expected) > 1e-4


def test_target_init_is_the_targets_last_layers(target_path: Path) -> None:
    """Three layers, fed with what enters the target's last three as the deepest aux state, end in its own states."""
    model = AutoModelForCausalLM.from_pretrained(target_path, dtype=torch.float32).eval()
    ids_BS = torch.tensor([[1, 4093, 198, 2683, 314, 260, 3575, 282, 4649]])
    with torch.no_grad():
        output = model(ids_BS, output_hidden_states=True)
    draft_ids_D, target = torch.arange(0, 49152, 5), TargetCheckpoint(target_path)
    knobs = PEagleKnobs(vocab_size=len(draft_ids_D), num_layers=3, num_positions=2, init="target")
    head = load_target_head(target, torch.float32, "cpu", draft_ids_D)
    draft = PEagleSpec.of(knobs, target, None).build(head, target, DraftOptions())
    batch = Batch(
        hs_BSA=torch.cat([output.hidden_states[k + 1] for k in (1, 14, 26)], dim=-1),
        lhs_BSH=output.hidden_states[-1],
        ids_BS=ids_BS,
        loss_mask_BS=torch.ones_like(ids_BS, dtype=torch.bool),
        lengths_B=torch.tensor([ids_BS.shape[1]]),
        seeds_B=torch.zeros(1),
    )
    step = eagle3_cases.Step(eagle3_cases.Case(), draft, head, head.draft_head_DH, draft_ids_D, batch)
    torch.testing.assert_close(guesses(step)[0], output.logits[0, :-1, draft_ids_D], rtol=1e-3, atol=2e-3)
