"""Random EAGLE3 training steps, run both by the product and by the dense oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.oracles.eagle3_dense import DenseResult, dense_step
from torchspec.drafts.draft import Batch, Draft, DraftOptions
from torchspec.drafts.eagle3.model import Eagle3Draft
from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.drafts.shape import DraftKnobs, draft_shape
from torchspec.target.head import TargetHead
from torchspec.target.shape import TargetShape

THETA, EPS = 1e4, 1e-5


@dataclass(frozen=True)
class Case:
    """Everything that decides a random step."""

    seed: int = 3
    dtype: torch.dtype = torch.float64
    ttt_length: int = 4
    lengths: tuple[int, ...] = (13, 9, 4)
    padding: int = 3
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    hidden: int = 24
    vocab: int = 50
    draft_vocab: int = 30
    mask_rate: float = 0.6
    chunk: int = 7
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False


@dataclass
class Step:
    """A case made concrete. The target's final norm is not applied: ``lhs`` is post-norm."""

    case: Case
    draft: Draft
    target: TargetHead
    target_head_VH: Tensor
    draft_ids_D: Tensor
    batch: Batch


@dataclass
class Result:
    total: Tensor
    sums: dict[str, Tensor]
    """Per TTT step: loss, counted, supervised, correct."""
    gradients: dict[str, Tensor]
    """By parameter name, and ``hs`` for the input."""


def shape_of(case: Any) -> TargetShape:
    """Of the draft of a case of any kind: heads, widths and rotary embedding are its own, and not its target's."""
    target = TargetShape(
        hidden_size=case.hidden,
        num_heads=1,
        num_kv_heads=1,
        head_dim=6,
        intermediate_size=case.hidden,
        rms_norm_eps=EPS,
        vocab_size=case.vocab,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "linear", "rope_theta": 5 * THETA, "factor": 2.0},
    )
    own = DraftKnobs.model_construct(  # servers want a larger MLP
        kind="any",
        num_heads=case.kv_heads * case.group,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        intermediate_size=2 * case.hidden,
        rope=THETA,
    )
    return draft_shape(own, {}, target)


def batch_of(case: Any, layers: int, random: Random) -> Batch:
    """Of a case of any kind, whose draft reads so many of the target's layers."""
    size = len(case.lengths), max(case.lengths) + case.padding
    lengths_B = torch.tensor(case.lengths)
    valid_BS = torch.arange(size[1]) < lengths_B.unsqueeze(1)
    return Batch(
        hs_BSA=random(*size, layers * case.hidden).requires_grad_(),
        lhs_BSH=random(*size, case.hidden),
        ids_BS=torch.randint(case.vocab, size, generator=random.generator, dtype=torch.int32),
        loss_mask_BS=(torch.rand(size, generator=random.generator) < case.mask_rate) & valid_BS,
        lengths_B=lengths_B,
        seeds_B=torch.randint(2**31, (len(case.lengths),), generator=random.generator),
    )


class Random:
    """Normal numbers of a case's dtype: the same ones for every dtype."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)


def build(case: Case) -> Step:
    random = Random(case.seed, case.dtype)
    spec = Eagle3Spec(
        shape_of(case),
        layers=(1, 2, 3),
        draft_vocab_size=case.draft_vocab,
        ttt_length=case.ttt_length,
        norm_before_fc=case.norm_before_fc,
        fc_norm=case.fc_norm,
        norm_output=case.norm_output,
    )
    draft = Eagle3Draft(spec, DraftOptions(loss_chunk_tokens=case.chunk)).to(case.dtype)
    randomise(draft, random)
    draft_ids_D = torch.randperm(case.vocab, generator=random.generator)[: case.draft_vocab].sort().values
    rest_V = torch.ones(case.vocab, dtype=torch.bool)
    rest_V[draft_ids_D] = False
    head_VH = random(case.vocab, case.hidden) * case.hidden**-0.5 * 3
    embedding_VH = random(case.vocab, case.hidden)
    target = TargetHead(embedding_VH, head_VH[draft_ids_D], head_VH[rest_V], random(case.hidden), EPS)
    return Step(case, draft, target, head_VH, draft_ids_D, batch_of(case, 3, random))


@torch.no_grad()
def randomise(draft: Draft, random: Random) -> None:
    """Weights of norms around one, rows of matrices of about length one."""
    for parameter in draft.parameters():
        scale = 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
        parameter.copy_(random(*parameter.shape) * scale + (parameter.dim() == 1))


def run_product(step: Any, *others: str) -> Result:
    """A step of any kind; ``others`` are sums that only its kind has."""
    output = step.draft(step.batch, step.target)
    output.total.backward()
    sums = {name: getattr(output, f"{name}_K") for name in ("loss", "counted", "supervised", "correct")}
    sums |= {name: getattr(output, name) for name in others}
    return Result(output.total.detach(), sums, _take_gradients(step))


def run_oracle(step: Step) -> Result:
    case = step.case
    dense = dense_step(
        samples_of(step),
        weights=dict(step.draft.named_parameters()),
        embedding=step.target.embedding_VH,
        target_head=step.target_head_VH,
        draft_ids=step.draft_ids_D,
        step_weights=step.draft.spec.position_weights,
        heads=case.kv_heads * case.group,
        kv_heads=case.kv_heads,
        theta=THETA,
        eps=EPS,
        norm_output=case.norm_output,
    )
    return result_of(step, dense)


def samples_of(step: Any) -> list[dict[str, Any]]:
    """The batch without its padding."""
    batch = step.batch
    return [
        {"aux": batch.hs_BSA[b, :n], "last": batch.lhs_BSH[b, :n], "ids": batch.ids_BS[b, :n], "loss_mask": mask[:n]}
        for b, (n, mask) in enumerate(zip(batch.lengths_B.tolist(), batch.loss_mask_BS, strict=True))
    ]


def result_of(step: Step, dense: DenseResult) -> Result:
    """The oracle's sums, and its gradients."""
    counts = {name: getattr(dense, name) for name in ("counted", "supervised", "correct")}
    sums = {name: torch.tensor(count, dtype=step.case.dtype) for name, count in counts.items()}
    sums["loss"] = torch.stack(dense.loss).detach()
    return Result(dense.total.detach(), sums, oracle_gradients(step, dense.total))


def oracle_gradients(step: Any, total: Tensor) -> dict[str, Tensor]:
    """Of the total of a step of any kind."""
    if total.requires_grad:  # it does not where nothing is counted
        total.backward()
    for tensor in _inputs(step).values():
        tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return _take_gradients(step)


def _inputs(step: Any) -> dict[str, Tensor]:
    return {**dict(step.draft.named_parameters()), "hs": step.batch.hs_BSA}


def _take_gradients(step: Any) -> dict[str, Tensor]:
    tensors = _inputs(step)
    gradients = {name: tensor.grad.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    return gradients


def relative_error(actual: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Largest difference over ``scale``, by default the largest expected value.

    Infinite where zero was expected and not met.
    """
    difference = (actual - expected).abs().max().item()
    scale = expected.abs().max().item() if scale is None else scale
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))


def worst_error(actual: Result, expected: Result) -> float:
    """Over the loss, every sum and every gradient.

    A gradient that vanishes, as that of a query with a single key, comes out as rounding noise: those below 1e-5 of the
    largest are measured against the largest.
    """
    errors = [relative_error(actual.total, expected.total)]
    errors += [relative_error(actual.sums[name], sums) for name, sums in expected.sums.items()]
    sizes = {name: gradient.abs().max().item() for name, gradient in expected.gradients.items()}
    largest = max(sizes.values())
    for name, size in sizes.items():
        scale = size if size > 1e-5 * largest else largest
        errors.append(relative_error(actual.gradients[name], expected.gradients[name], scale))
    return max(errors)
