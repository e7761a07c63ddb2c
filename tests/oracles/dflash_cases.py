"""Random DFlash training steps, run both by the product and by the dense oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.oracles.dflash_dense import dense_step
from tests.oracles.eagle3_cases import Result, relative_error
from torchspec.drafts.dflash.model import DFlashDraft, draw_anchors
from torchspec.drafts.dflash.spec import DFlashSpec
from torchspec.drafts.draft import Batch, DraftOptions
from torchspec.target.head import TargetHead
from torchspec.target.shape import TargetShape

THETA, EPS = 1e4, 1e-5


@dataclass(frozen=True)
class Case:
    """Everything that decides a random step."""

    seed: int = 21
    dtype: torch.dtype = torch.float64
    block_size: int = 4
    num_layers: int = 2
    num_anchors: int = 7
    soft: bool = False
    lengths: tuple[int, ...] = (13, 9, 4)
    padding: int = 3
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    hidden: int = 24
    vocab: int = 40
    mask_rate: float = 0.7
    chunk: int = 7


@dataclass
class Step:
    """A case made concrete. The target's final norm is not applied: ``lhs`` is post-norm."""

    case: Case
    draft: DFlashDraft
    target: TargetHead
    batch: Batch


def spec_of(case: Case) -> DFlashSpec:
    shape = TargetShape(
        hidden_size=case.hidden,
        num_heads=case.kv_heads * case.group,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        intermediate_size=2 * case.hidden,
        rms_norm_eps=EPS,
        vocab_size=case.vocab,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    return DFlashSpec(
        target=shape,
        layers=(1, 3),
        num_target_layers=6,
        num_layers=case.num_layers,
        block_size=case.block_size,
        mask_token_id=case.vocab - 1,
        num_anchors=case.num_anchors,
        gamma=2.5,
        loss="soft_ce" if case.soft else "ce",
    )


def build(case: Case) -> Step:
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    draft = DFlashDraft(spec_of(case), DraftOptions(loss_chunk_tokens=case.chunk)).to(case.dtype)
    with torch.no_grad():
        for parameter in draft.parameters():
            scale = 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.copy_(randn(*parameter.shape) * scale + (parameter.dim() == 1))
    head_VH = randn(case.vocab, case.hidden) * case.hidden**-0.5 * 3
    target = TargetHead(randn(case.vocab, case.hidden), head_VH, head_VH[:0], randn(case.hidden), EPS)
    size = len(case.lengths), max(case.lengths) + case.padding
    lengths_B = torch.tensor(case.lengths)
    valid_BS = torch.arange(size[1]) < lengths_B.unsqueeze(1)
    batch = Batch(
        hs_BSA=randn(*size, 2 * case.hidden).requires_grad_(),
        lhs_BSH=randn(*size, case.hidden),
        ids_BS=torch.randint(case.vocab, size, generator=generator, dtype=torch.int32),
        loss_mask_BS=(torch.rand(size, generator=generator) < case.mask_rate) & valid_BS,
        lengths_B=lengths_B,
        seeds_B=torch.randint(2**31, (len(case.lengths),), generator=generator),
    )
    return Step(case, draft, target, batch)


def run_product(step: Step) -> Result:
    output = step.draft(step.batch, step.target)
    output.total.backward()
    sums = {
        "loss": output.loss_K,
        "counted": output.counted_K,
        "supervised": output.supervised_K,
        "correct": output.correct_K,
        "denominator": output.denominator,
    }
    return Result(output.total.detach(), sums, _take_gradients(step))


def run_oracle(step: Step) -> Result:
    case, batch, spec = step.case, step.batch, step.draft.spec
    samples = [
        {
            "hs": batch.hs_BSA[b, :n],
            "last": batch.lhs_BSH[b, :n],
            "ids": batch.ids_BS[b, :n],
            "loss_mask": batch.loss_mask_BS[b, :n],
            "anchors": anchors_of(step, b),
        }
        for b, n in enumerate(batch.lengths_B.tolist())
    ]
    dense = dense_step(
        samples,
        weights=dict(step.draft.named_parameters()),
        embedding=step.target.embedding_VH,
        target_head=step.target.draft_head_DH,
        mask_token=spec.mask_token_id,
        slot_weights=spec.position_weights,
        soft=case.soft,
        layers=case.num_layers,
        heads=case.kv_heads * case.group,
        kv_heads=case.kv_heads,
        theta=THETA,
        eps=EPS,
    )
    if dense.total.requires_grad:  # it does not where nothing is scored
        dense.total.backward()
    for tensor in _inputs(step).values():
        tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    supervised = torch.tensor(dense.supervised, dtype=case.dtype)
    sums = {
        "loss": torch.stack(dense.loss).detach(),
        "counted": supervised,
        "supervised": supervised,
        "correct": torch.tensor(dense.correct, dtype=case.dtype),
        "denominator": (supervised * torch.tensor(spec.position_weights, dtype=case.dtype)).sum(),
    }
    return Result(dense.total.detach(), sums, _take_gradients(step))


def anchors_of(step: Step, sample: int) -> list[int]:
    """The product's own draw: what an anchor must be has tests of its own."""
    batch, spec = step.batch, step.draft.spec
    mask_S, seed = batch.loss_mask_BS[sample], int(batch.seeds_B[sample])
    return draw_anchors(mask_S, seed, spec.block_size, spec.num_anchors).tolist()


def _inputs(step: Step) -> dict[str, Any]:
    return {**dict(step.draft.named_parameters()), "hs": step.batch.hs_BSA}


def _take_gradients(step: Step) -> dict[str, Tensor]:
    tensors = _inputs(step)
    gradients = {name: tensor.grad.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.grad = None
    return gradients


__all__ = ["Case", "Step", "build", "relative_error", "run_oracle", "run_product"]
