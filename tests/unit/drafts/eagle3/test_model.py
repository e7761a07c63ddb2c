"""The whole EAGLE3 step against the dense oracle: loss, sums, and the gradient of every parameter and of the input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.mutation import Mutation
from tests.oracles.eagle3_cases import Case, build, run_oracle, run_product, worst_error
from torchspec.drafts.eagle3.model import Eagle3Draft
from torchspec.nn import chain_attention, chain_rows, decoder, flash, layers, losses

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

cases = st.builds(
    Case,
    seed=st.integers(0, 2**31),
    ttt_length=st.integers(1, 7),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4).map(tuple),
    padding=st.integers(0, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8, 16]),
    draft_vocab=st.integers(2, 50),
    mask_rate=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    chunk=st.integers(1, 90),
    fc_norm=st.booleans(),
    norm_before_fc=st.booleans(),
    norm_output=st.booleans(),
).filter(lambda case: not (case.fc_norm and case.norm_before_fc))

NORMED = Case(fc_norm=True, norm_output=True)
"""EAGLE-3.1."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=25, derandomize=True, deadline=None, phases=[Phase.generate])
@given(case=cases)
def test_equals_dense_oracle(dtype: torch.dtype, case: Case) -> None:
    step = build(replace(case, dtype=dtype))
    assert worst_error(run_product(step), run_oracle(step)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("case", [Case(), NORMED, Case(norm_before_fc=True)])
def test_cases_are_not_trivial(case: Case) -> None:
    """The cases have positions of every kind, and gradients everywhere: zeros cannot pass."""
    result = run_oracle(build(case))
    supervised, counted, correct = (result.sums[name].sum() for name in ("supervised", "counted", "correct"))
    assert supervised > counted > correct > 0
    assert all(gradient.abs().max() > 1e-3 for gradient in result.gradients.values())


DRAFT, PLAN, TEACHER, LOSS = Eagle3Draft, chain_rows.ChainRows, losses.SoftTeacher, losses.FusedCrossEntropy
CHAIN = chain_attention.ChainAttention
MUTATIONS: dict[str, tuple[Any, str, str, str]] = {
    "zero attention": (CHAIN, "forward", "return o_RQE.to(q_RQE.dtype)", "return q_RQE * 0"),
    "diagonal values left out": (chain_attention, "merge_diagonal", "o.addcmul_(", "(o * 0).addcmul_("),
    "no output in block 0's backward": (CHAIN, "backward", "o_low_RQE, lse_RQ", "o_low_RQE * 0, lse_RQ"),
    "no gradient through the softmax": (chain_attention, "merge_diagonal_backward", "- delta", "- 0 * delta"),
    "heads mixed up": (flash, "_heads_first", "x.repeat_interleave(repeats, dim=2)", "x.repeat(1, 1, repeats, 1)"),
    "rotary offset dropped": (DRAFT, "_unroll", "rows.active_angle_R + t", "rows.active_angle_R"),
    "one token for all steps": (DRAFT, "_unroll", "rows.active_flat_R + 1 + t", "rows.active_flat_R + 1"),
    "no residual around attention": (decoder.DecoderLayer, "forward", "residual_RH = residual_RH + ", "residual_RH = "),
    "mask of the predicted token": (PLAN, "of_windows", "loss_mask_BS.clone()", "loss_mask_BS.roll(-1, 1)"),
    "mask of the aux state's token": (PLAN, "of_windows", "loss_mask_BS.clone()", "loss_mask_BS.roll(1, 1)"),
    "students shifted": (PLAN, "of_windows", "1 + torch.arange", "0 + torch.arange"),
    "samples run into each other": (PLAN, "of_windows", "unsqueeze(1) % length >=", "unsqueeze(1) >="),
    "out-of-vocabulary targets counted": (TEACHER, "chunk", "best_n >=", "float('inf') >="),
    "teacher not normalised": (TEACHER, "chunk", "p.sum(-1, keepdim=True)", "p.sum(-1, keepdim=True).add(1)"),
    "head gradient unweighted": (LOSS, "forward", "(hidden_mH * weight_m1)", "(hidden_mH)"),
}  # fmt: skip
NORM_MUTATIONS: dict[str, tuple[Any, str, str, str]] = {
    "aux norms swapped": (layers.PartNorms, "forward", "zip(self,", "zip(reversed(self),"),
    "aux states not normed": (DRAFT, "_unroll", "self.fc(self", "self.fc(aux_CA + 0 * self"),
    "pre-norm state fed back": (
        DRAFT, "_unroll", "residual_RH = self.norm(residual_RH)", "residuals.append(self.norm(residual_RH)); continue"),
    "normed twice": (DRAFT, "forward", "if not self.spec.norm_output", "if True"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MUTATIONS, *NORM_MUTATIONS])
def test_mutations_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake, written into the product's own source, breaks the comparison with the oracle."""
    mutation = Mutation(*(MUTATIONS | NORM_MUTATIONS)[name])
    case = NORMED if name in NORM_MUTATIONS else Case()
    step = build(replace(case, padding=0))  # so that a sample's last row lies next to another's first
    expected = run_oracle(step)
    assert worst_error(run_product(step), expected) <= 1e-12
    monkeypatch.setattr(mutation.owner, mutation.function, mutation.written())
    assert worst_error(run_product(step), expected) > 1e-4


@pytest.mark.parametrize("change", ["vocabulary", "aux width"])
def test_misfits_are_named(change: str) -> None:
    step = build(Case())
    batch, target = step.batch, step.target
    if change == "vocabulary":
        target = replace(target, draft_head_DH=target.draft_head_DH[:-1])
    else:
        batch = replace(batch, hs_BSA=batch.hs_BSA[..., :-1])
    message = {"vocabulary": "draft.vocab_size", "aux width": "aux states"}[change]
    with pytest.raises(ValueError, match=message):
        step.draft(batch, target)
