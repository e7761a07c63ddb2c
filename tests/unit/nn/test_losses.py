"""The fused projections and cross-entropy: exact, unaffected by chunking, and small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.autograd_memory import LargestTensor
from torchspec.nn.losses import HardTeacher, LossSums, SoftTeacher, Students, Teacher, fused_cross_entropy

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
WEIGHTS = (1.0, 0.8, 0.64)
N, K, H, D, V = 150, len(WEIGHTS), 16, 40, 100


class Problem:
    """Each of N teachers has up to K students, which lie in any order among rows that are not scored."""

    def __init__(self, dtype: torch.dtype = torch.float64, scale: float = 1.0):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        teacher_M, position_M = (torch.rand(N, K, generator=generator) < 0.7).nonzero().unbind(1)
        self.hidden_RH = randn(N * K, H).requires_grad_()
        self.head_DH = randn(D, H).requires_grad_()
        self.students = Students(torch.randperm(N * K, generator=generator)[: len(teacher_M)], teacher_M, position_M)
        self.soft = SoftTeacher(randn(N, H), randn(D, H), randn(V - D, H))
        self.token_N = torch.randint(D, (N,), generator=generator)
        self.teacher: Teacher = self.soft

    def with_full_vocabulary(self) -> Problem:
        """The draft's vocabulary is the target's: every position counts."""
        self.teacher = self.soft = self.soft._replace(rest_head_XH=self.soft.rest_head_XH[:0])
        return self

    def with_true_tokens(self) -> Problem:
        self.teacher = HardTeacher(self.token_N, D)
        return self

    def fused(self, chunk: int = 64) -> LossSums:
        return fused_cross_entropy(self.hidden_RH, self.head_DH, self.teacher, self.students, WEIGHTS, chunk)

    def dense(self) -> LossSums:
        """Everything at once, and torch's own gradients."""
        row_M, teacher_M, position_M = self.students
        if self.teacher is self.soft:
            hidden_NH, draft_head_DH, rest_head_XH, _ = self.soft
            draft_ND, rest_NX = hidden_NH @ draft_head_DH.T, hidden_NH @ rest_head_XH.T
            p_ND, counted_N = draft_ND.softmax(-1), torch.cat((rest_NX, draft_ND), 1).argmax(-1) >= len(rest_head_XH)
        else:
            p_ND, counted_N = torch.eye(D)[self.token_N], torch.ones(N, dtype=torch.bool)
        logits_MD = self.hidden_RH[row_M] @ self.head_DH.T
        loss_M = -(p_ND[teacher_M] * logits_MD.log_softmax(-1)).sum(-1) * counted_N[teacher_M]
        correct_M = (logits_MD.argmax(-1) == p_ND.argmax(-1)[teacher_M]) & counted_N[teacher_M]
        figures = loss_M, counted_N[teacher_M], torch.ones_like(loss_M), correct_M
        sums = [torch.stack([x[position_M == k].sum() for k in range(K)]).to(loss_M.dtype) for x in figures]
        return LossSums((sums[0] * torch.tensor(WEIGHTS, dtype=loss_M.dtype)).sum(), *sums)

    def gradients(self, sums: LossSums) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sums.total, (self.hidden_RH, self.head_DH))


def assert_same(actual: Any, expected: Any, tolerance: float) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert want.abs().max() > 0
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", [1, 7, 64, N, 4 * N])
def test_equals_the_dense_loss(chunk: int, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    actual, expected = problem.fused(chunk), problem.dense()
    assert 0 < expected.correct_K.sum() < expected.counted_K.sum() < expected.supervised_K.sum()
    assert_same(actual, expected, TOLERANCE[dtype])
    assert_same(problem.gradients(actual), problem.gradients(expected), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunk", [1, 7, 4 * N])
def test_true_tokens_equal_the_dense_loss(chunk: int, dtype: torch.dtype) -> None:
    problem = Problem(dtype).with_true_tokens()
    actual, expected = problem.fused(chunk), problem.dense()
    assert 0 < expected.correct_K.sum() < expected.counted_K.sum() == expected.supervised_K.sum()
    assert_same(actual, expected, TOLERANCE[dtype])
    assert_same(problem.gradients(actual), problem.gradients(expected), TOLERANCE[dtype])


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 10 * N])
def test_chunks_keep_the_students_of_a_teacher_together(chunk: int) -> None:
    students = Problem().students
    stop = 0
    for block, teachers in students.chunks(chunk):
        inside = students.teacher_M[block]
        assert block.start == stop and chunk <= len(inside) + (block.stop == len(students.row_M)) * chunk
        assert len(inside) < chunk + K
        assert (int(inside[0]), int(inside[-1]) + 1) == (teachers.start, teachers.stop)
        assert ((students.teacher_M >= teachers.start) & (students.teacher_M < teachers.stop)).sum() == len(inside)
        stop = block.stop
    assert stop == len(students.row_M)


def test_a_frozen_head_gets_no_gradient() -> None:
    problem = Problem()
    expected, _ = problem.gradients(problem.fused())
    problem.head_DH.requires_grad_(False)
    sums = problem.fused()
    assert_same(torch.autograd.grad(sums.total, problem.hidden_RH), (expected,), 1e-12)


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
    assert torch.equal(sums.counted_K, problem.students.position_M.bincount().double())


def test_no_students_give_a_zero_loss_with_gradients() -> None:
    problem = Problem()
    problem.students = Students(*(x[:0] for x in problem.students))
    sums = problem.fused()
    dhidden_RH, dhead_DH = problem.gradients(sums)
    assert sums.total == 0
    assert (dhidden_RH.shape, dhidden_RH.abs().max()) == ((N * K, H), 0)
    assert (dhead_DH.shape, dhead_DH.abs().max()) == ((D, H), 0)


def test_autocast_multiplies_in_bf16_and_sums_in_fp32() -> None:
    problem = Problem(torch.float32).with_full_vocabulary()  # else a rounding could change who counts
    expected = problem.fused()
    with torch.autocast("cpu", torch.bfloat16):
        actual = problem.fused()
    assert all(x.dtype == torch.float32 for x in actual)
    assert_same([actual.loss_K, *problem.gradients(actual)], [expected.loss_K, *problem.gradients(expected)], 0.05)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("with_grad", [True, False])
def test_no_tensor_is_larger_than_one_chunk_of_logits(with_grad: bool, hard: bool) -> None:
    """Nothing of size N x V or M x D: the largest tensor is one chunk's logits, or as large as an input."""
    problem = Problem().with_true_tokens() if hard else Problem()
    chunk = 8
    with torch.set_grad_enabled(with_grad), LargestTensor() as largest:
        problem.fused(chunk)
    allowed = max((chunk + K) * V, D * H, problem.hidden_RH.numel())
    assert 0 < largest.numel <= allowed < min(N * V, len(problem.students.row_M) * D)


def test_without_grad_mode_no_gradient_is_made() -> None:
    problem = Problem()
    with torch.no_grad():
        sums = problem.fused()
    assert not sums.total.requires_grad
    assert_same(sums, problem.dense(), 1e-12)
