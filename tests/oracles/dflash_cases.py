"""Random DFlash training steps, run both by the product and by the dense oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.oracles import eagle3_cases
from tests.oracles.dflash_dense import dense_step
from tests.oracles.eagle3_cases import (
    EPS,
    THETA,
    Random,
    Result,
    batch_of,
    oracle_gradients,
    randomise,
    samples_of,
    shape_of,
)
from torchspec.drafts.dflash.model import DFlashDraft, draw_anchors
from torchspec.drafts.dflash.spec import DFlashSpec
from torchspec.drafts.draft import Batch, DraftOptions
from torchspec.target.head import TargetHead


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
    return DFlashSpec(
        target=shape_of(case),
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
    random = Random(case.seed, case.dtype)
    draft = DFlashDraft(spec_of(case), DraftOptions(loss_chunk_tokens=case.chunk)).to(case.dtype)
    randomise(draft, random)
    head_VH = random(case.vocab, case.hidden) * case.hidden**-0.5 * 3
    target = TargetHead(random(case.vocab, case.hidden), head_VH, head_VH[:0], random(case.hidden), EPS)
    return Step(case, draft, target, batch_of(case, 2, random))


def run_product(step: Step) -> Result:
    return eagle3_cases.run_product(step, "denominator")


def run_oracle(step: Step) -> Result:
    case, spec = step.case, step.draft.spec
    dense = dense_step(
        [sample | {"anchors": anchors_of(step, b)} for b, sample in enumerate(samples_of(step))],
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
    supervised = torch.tensor(dense.supervised, dtype=case.dtype)
    sums = {
        "loss": torch.stack(dense.loss).detach(),
        "counted": supervised,
        "supervised": supervised,
        "correct": torch.tensor(dense.correct, dtype=case.dtype),
        "denominator": (supervised * torch.tensor(spec.position_weights, dtype=case.dtype)).sum(),
    }
    return Result(dense.total.detach(), sums, oracle_gradients(step, dense.total))


def anchors_of(step: Step, sample: int) -> list[int]:
    """The product's own draw: what an anchor must be has tests of its own."""
    batch, spec = step.batch, step.draft.spec
    mask_S, seed = batch.loss_mask_BS[sample], int(batch.seeds_B[sample])
    return draw_anchors(mask_S, seed, spec.block_size, spec.num_anchors).tolist()
