"""The whole EAGLE3 step against the dense oracle: loss, sums, and the gradient of every parameter and of the input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.mutation import Mutation
from tests.oracles.eagle3_cases import Case, build, relative_error, run_oracle, run_product, worst_error
from torchspec.drafts.draft import DraftOptions
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_chunk_size_does_not_matter(chunk: int, dtype: torch.dtype) -> None:
    step = build(Case(dtype=dtype))
    expected = run_product(step)
    step.draft.options = DraftOptions(loss_chunk_tokens=chunk)
    assert worst_error(run_product(step), expected) <= TOLERANCE[dtype]


def test_padding_does_not_matter() -> None:
    """Contents and amount of the right padding change nothing, and padded rows get no gradient."""
    step = build(Case(padding=0))
    expected = run_product(step)
    padded = build(Case(padding=6))
    for name in ("hs_BSA", "lhs_BSH", "ids_BS", "loss_mask_BS"):
        padded_tensor, tensor = getattr(padded.batch, name), getattr(step.batch, name)
        with torch.no_grad():
            padded_tensor[:, : tensor.shape[1]] = tensor
            if name == "hs_BSA":
                padded_tensor[:, tensor.shape[1] :] = 1e3
    padded.draft, padded.target = step.draft, step.target
    actual = run_product(padded)
    hs_gradient = actual.gradients.pop("hs")
    for row, length in zip(hs_gradient, step.case.lengths, strict=True):
        assert row[: length - 1].abs().sum() > 0
        assert row[length - 1 :].abs().max() == 0
    expected.gradients.pop("hs")
    assert worst_error(actual, expected) <= 1e-12


@pytest.mark.parametrize("lengths", [(1,), (8,), (5, 3)])
def test_without_loss_tokens_every_parameter_is_reached(lengths: tuple[int, ...]) -> None:
    step = build(Case(lengths=lengths, mask_rate=0.0))
    result = run_product(step)  # raises where a gradient is None
    assert result.total == 0
    assert all(gradient.abs().max() == 0 for gradient in result.gradients.values())
    assert all(sums.tolist() == [0.0] * step.case.ttt_length for sums in result.sums.values())


@pytest.mark.parametrize("case", [Case(), NORMED])
def test_activation_checkpointing_changes_nothing(case: Case) -> None:
    step = build(case)
    expected = run_product(step)
    step.draft.options = DraftOptions(loss_chunk_tokens=step.case.chunk, recompute=True)
    assert worst_error(run_product(step), expected) == 0


def test_micro_batches_add_up() -> None:
    """Un-normalised sums: one batch equals the sum of its samples, whatever their number of loss tokens."""
    step = build(Case())
    whole = run_product(step)
    total = torch.zeros_like(whole.total)
    gradient = torch.zeros_like(whole.gradients["fc.weight"])
    batch = step.batch
    for b in range(len(step.case.lengths)):
        step.batch = replace(
            batch,
            hs_BSA=batch.hs_BSA[b : b + 1].detach().requires_grad_(),
            lhs_BSH=batch.lhs_BSH[b : b + 1],
            ids_BS=batch.ids_BS[b : b + 1],
            loss_mask_BS=batch.loss_mask_BS[b : b + 1],
        )
        part = run_product(step)
        total += part.total
        gradient += part.gradients["fc.weight"]
    assert relative_error(total, whole.total) <= 1e-12
    assert relative_error(gradient, whole.gradients["fc.weight"]) <= 1e-12


def test_pre_norm_states_are_normed_once() -> None:
    step = build(Case())
    raw_BSH = step.batch.lhs_BSH
    scale = (raw_BSH.pow(2).mean(-1, keepdim=True) + step.target.norm_eps).rsqrt()
    step.batch = replace(step.batch, lhs_BSH=raw_BSH * scale * step.target.norm_H)
    expected = run_product(step)
    step.batch = replace(step.batch, lhs_BSH=raw_BSH, norm_state="pre_norm")
    assert worst_error(run_product(step), expected) <= 1e-12


def test_evaluation_equals_training_and_keeps_no_graph() -> None:
    step = build(Case())
    expected = run_product(step)
    with torch.no_grad():
        output = step.draft(step.batch, step.target)
    assert not output.total.requires_grad
    assert relative_error(output.total, expected.total) <= 1e-12


def test_bf16_autocast_is_close_and_sums_in_fp32() -> None:
    step = build(Case(dtype=torch.float32, lengths=(40, 30), hidden=48))
    expected = run_product(step)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_product(step)
    assert actual.total.dtype == torch.float32
    # one rounding can move a teacher's first choice in or out of the vocabulary: compare the mean, not the sum
    means = [result.sums["loss"] / result.sums["counted"] for result in (actual, expected)]
    assert relative_error(*means) <= 0.01
    for name, gradient in expected.gradients.items():
        cosine = torch.cosine_similarity(actual.gradients[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.98, name


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
