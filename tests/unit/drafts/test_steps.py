"""What holds for a training step of every kind of draft, however it is cut, padded, recomputed or rounded."""

from __future__ import annotations

from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles import dflash_cases, eagle3_cases, peagle_cases
from tests.oracles.eagle3_cases import relative_error, worst_error
from torchspec.drafts.draft import DraftOptions

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
KINDS = {
    "eagle3": (eagle3_cases, {}),
    "eagle3.1": (eagle3_cases, {"fc_norm": True, "norm_output": True}),
    "dflash": (dflash_cases, {}),
    "dflash, soft": (dflash_cases, {"soft": True}),
    "peagle": (peagle_cases, {"fc_norm": True, "seed": 8}),
}
every_kind = pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)
with_a_teacher = pytest.mark.parametrize(
    ("kind", "options"), [pytest.param(*case, id=name) for name, case in KINDS.items() if name != "dflash"]
)


@every_kind
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_chunk_size_does_not_matter(kind: ModuleType, options: dict[str, Any], chunk: int, dtype: torch.dtype) -> None:
    step = kind.build(kind.Case(dtype=dtype, **options))
    expected = kind.run_product(step)
    step.draft.options = DraftOptions(loss_chunk_tokens=chunk)
    assert worst_error(kind.run_product(step), expected) <= TOLERANCE[dtype]


@every_kind
def test_padding_does_not_matter(kind: ModuleType, options: dict[str, Any]) -> None:
    """Contents and amount of the right padding change nothing, and padded rows get no gradient."""
    step = kind.build(kind.Case(**options | {"padding": 0}))
    expected = kind.run_product(step)
    padded = kind.build(kind.Case(**options | {"padding": 6}))
    for name in ("hs_BSA", "lhs_BSH", "ids_BS", "loss_mask_BS"):
        padded_tensor, tensor = getattr(padded.batch, name), getattr(step.batch, name)
        with torch.no_grad():
            padded_tensor[:, : tensor.shape[1]] = tensor
            if name == "hs_BSA":
                padded_tensor[:, tensor.shape[1] :] = 1e3
    padded.draft, padded.target = step.draft, step.target
    padded.batch = replace(padded.batch, seeds_B=step.batch.seeds_B)
    actual = kind.run_product(padded)
    hs_gradient = actual.gradients.pop("hs")
    assert hs_gradient[0].abs().sum() > 0
    for row, length in zip(hs_gradient, step.case.lengths, strict=True):
        assert row[length - 1 :].abs().max() == 0
    expected.gradients.pop("hs")
    assert worst_error(actual, expected) <= 1e-12


@every_kind
@pytest.mark.parametrize("lengths", [(1,), (8,), (5, 3)])
def test_without_loss_tokens_every_parameter_is_reached(
    kind: ModuleType, options: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    step = kind.build(kind.Case(**options, lengths=lengths, mask_rate=0.0))
    result = kind.run_product(step)  # raises where a gradient is None
    assert result.total == 0
    assert all(gradient.abs().max() == 0 for gradient in result.gradients.values())
    assert all(sums.abs().sum() == 0 for sums in result.sums.values())


@every_kind
def test_activation_checkpointing_changes_nothing(kind: ModuleType, options: dict[str, Any]) -> None:
    step = kind.build(kind.Case(**options))
    expected = kind.run_product(step)
    step.draft.options = DraftOptions(loss_chunk_tokens=step.case.chunk, recompute=True)
    assert worst_error(kind.run_product(step), expected) == 0


@every_kind
def test_micro_batches_add_up(kind: ModuleType, options: dict[str, Any]) -> None:
    """Un-normalised sums: one batch equals the sum of its samples, whatever their number of loss tokens."""
    step = kind.build(kind.Case(**options))
    whole, batch = kind.run_product(step), step.batch
    total, gradient = torch.zeros_like(whole.total), torch.zeros_like(whole.gradients["fc.weight"])
    tensors = {f.name: x for f in fields(batch) if isinstance(x := getattr(batch, f.name), Tensor)}
    for b in range(len(step.case.lengths)):
        step.batch = replace(batch, **{name: x[b : b + 1].detach() for name, x in tensors.items()})
        step.batch.hs_BSA.requires_grad_()
        part = kind.run_product(step)
        total += part.total
        gradient += part.gradients["fc.weight"]
    assert relative_error(total, whole.total) <= 1e-12
    assert relative_error(gradient, whole.gradients["fc.weight"]) <= 1e-12


@with_a_teacher
def test_pre_norm_states_are_normed_once(kind: ModuleType, options: dict[str, Any]) -> None:
    step = kind.build(kind.Case(**options))
    raw_BSH = step.batch.lhs_BSH
    scale = (raw_BSH.pow(2).mean(-1, keepdim=True) + step.target.norm_eps).rsqrt()
    step.batch = replace(step.batch, lhs_BSH=raw_BSH * scale * step.target.norm_H)
    expected = kind.run_product(step)
    step.batch = replace(step.batch, lhs_BSH=raw_BSH, norm_state="pre_norm")
    assert worst_error(kind.run_product(step), expected) <= 1e-12


@every_kind
def test_evaluation_equals_training_and_keeps_no_graph(kind: ModuleType, options: dict[str, Any]) -> None:
    step = kind.build(kind.Case(**options))
    expected = kind.run_product(step)
    with torch.no_grad():
        output = step.draft(step.batch, step.target)
    assert not output.total.requires_grad
    assert relative_error(output.total, expected.total) <= 1e-12


@every_kind
def test_bf16_autocast_is_close_and_sums_in_fp32(kind: ModuleType, options: dict[str, Any]) -> None:
    many = {"num_anchors": 30} if kind is dflash_cases else {}
    step = kind.build(kind.Case(**options, **many, dtype=torch.float32, lengths=(40, 30), hidden=48))
    expected = kind.run_product(step)
    with torch.autocast("cpu", torch.bfloat16):
        actual = kind.run_product(step)
    assert actual.total.dtype == torch.float32
    # one rounding can move a teacher's first choice in or out of the vocabulary: compare the mean, not the sum
    means = [result.sums["loss"] / result.sums["counted"] for result in (actual, expected)]
    assert relative_error(*means) <= 0.02
    for name, gradient in expected.gradients.items():
        cosine = torch.cosine_similarity(actual.gradients[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.98, name
