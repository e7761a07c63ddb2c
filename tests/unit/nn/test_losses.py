"""The fused projection + soft cross-entropy: exact, unaffected by chunking, and small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchspec.nn.losses import LossSums, Teacher, fused_soft_cross_entropy

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
WEIGHTS = (1.0, 0.8, 0.64)
N, H, D, V = 150, 16, 40, 100


class Problem:
    def __init__(self, dtype: torch.dtype = torch.float64, scale: float = 1.0):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        self.hidden_TNH = randn(len(WEIGHTS), N, H).requires_grad_()
        self.head_DH = randn(D, H).requires_grad_()
        self.teacher = Teacher(randn(N, H), randn(D, H), randn(V - D, H))
        self.scored_TN = torch.rand(len(WEIGHTS), N, generator=generator) < 0.9

    def with_full_vocabulary(self) -> Problem:
        """The draft's vocabulary is the target's: every position counts."""
        self.teacher = self.teacher._replace(rest_head_XH=self.teacher.rest_head_XH[:0])
        return self

    def fused(self, chunk: int = 64) -> LossSums:
        return fused_soft_cross_entropy(self.hidden_TNH, self.head_DH, self.teacher, self.scored_TN, WEIGHTS, chunk)

    def dense(self) -> LossSums:
        """Everything at once, and torch's own gradients."""
        hidden_NH, draft_head_DH, rest_head_XH = self.teacher
        draft_ND, rest_NX = hidden_NH @ draft_head_DH.T, hidden_NH @ rest_head_XH.T
        p_ND = draft_ND.softmax(-1)
        counted_TN = self.scored_TN & (torch.cat((rest_NX, draft_ND), 1).argmax(-1) >= V - D)
        logits_TND = self.hidden_TNH @ self.head_DH.T
        loss_TN = -(p_ND * logits_TND.log_softmax(-1)).sum(-1) * counted_TN
        correct_TN = (logits_TND.argmax(-1) == p_ND.argmax(-1)) & counted_TN
        loss_T = loss_TN.sum(1)
        total = (loss_T * torch.tensor(WEIGHTS, dtype=loss_T.dtype)).sum()
        return LossSums(total, loss_T, counted_TN.sum(1).to(loss_T.dtype), correct_TN.sum(1).to(loss_T.dtype))

    def gradients(self, sums: LossSums) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sums.total, (self.hidden_TNH, self.head_DH))


def assert_same(actual: Any, expected: Any, tolerance: float) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert want.abs().max() > 0
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", [1, 7, 64, N, 4 * N])
def test_equals_the_dense_loss(chunk: int, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    actual, expected = problem.fused(chunk), problem.dense()
    assert 0 < expected.correct_T.sum() < expected.counted_T.sum() < problem.scored_TN.sum()
    assert_same(actual, expected, TOLERANCE[dtype])
    assert_same(problem.gradients(actual), problem.gradients(expected), TOLERANCE[dtype])


def test_huge_logits_stay_finite() -> None:
    problem = Problem(torch.float32, scale=30.0)
    sums = problem.fused()
    assert sums.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in problem.gradients(sums))
    assert_same(sums, problem.dense(), 1e-5)


def test_gradient_is_scaled_by_what_comes_from_above() -> None:
    problem = Problem()
    expected = [3 * gradient for gradient in problem.gradients(problem.fused())]
    tripled = problem.fused()._replace(total=3 * problem.fused().total)
    assert_same(problem.gradients(tripled), expected, 1e-12)


def test_full_vocabulary_counts_every_position() -> None:
    problem = Problem().with_full_vocabulary()
    sums = problem.fused()
    assert torch.equal(sums.counted_T, problem.scored_TN.sum(1).double())


def test_no_teachers_give_a_zero_loss_with_gradients() -> None:
    problem = Problem()
    problem.hidden_TNH = problem.hidden_TNH.detach()[:, :0].requires_grad_()
    problem.teacher = problem.teacher._replace(hidden_NH=problem.teacher.hidden_NH[:0])
    problem.scored_TN = problem.scored_TN[:, :0]
    sums = problem.fused()
    dhidden_TNH, dhead_DH = problem.gradients(sums)
    assert sums.total == 0
    assert dhidden_TNH.shape == (len(WEIGHTS), 0, H)
    assert dhead_DH.shape == (D, H)
    assert dhead_DH.abs().max() == 0


def test_autocast_multiplies_in_bf16_and_sums_in_fp32() -> None:
    problem = Problem(torch.float32).with_full_vocabulary()  # else a rounding could change who counts
    expected = problem.fused()
    with torch.autocast("cpu", torch.bfloat16):
        actual = problem.fused()
    assert all(x.dtype == torch.float32 for x in actual)
    assert_same([actual.loss_T, *problem.gradients(actual)], [expected.loss_T, *problem.gradients(expected)], 0.05)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation had."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("with_grad", [True, False])
def test_no_tensor_is_larger_than_one_chunk_of_logits(with_grad: bool) -> None:
    """Nothing of size N x V or T x N x D: the largest tensor is one chunk's logits, or as large as an input."""
    problem = Problem()
    chunk = 8
    with torch.set_grad_enabled(with_grad), LargestTensor() as largest:
        problem.fused(chunk)
    allowed = max(chunk * V, D * H, problem.hidden_TNH.numel())
    assert 0 < largest.numel <= allowed < min(N * V, len(WEIGHTS) * N * D)


def test_without_grad_mode_no_gradient_is_made() -> None:
    problem = Problem()
    with torch.no_grad():
        sums = problem.fused()
    assert not sums.total.requires_grad
    assert_same(sums, problem.dense(), 1e-12)
