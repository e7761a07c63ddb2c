"""Random P-EAGLE training steps, run both by the product and by the dense oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.oracles import eagle3_cases
from tests.oracles.eagle3_cases import EPS, THETA, Result, Step, run_product
from tests.oracles.eagle3_dense import DenseResult
from tests.oracles.peagle_dense import dense_sample
from torchspec.drafts.draft import DraftOptions
from torchspec.drafts.peagle.model import PEagleDraft
from torchspec.drafts.peagle.spec import PEagleSpec

__all__ = ["Case", "build", "run_oracle", "run_product"]


@dataclass(frozen=True)
class Case(eagle3_cases.Case):
    """An EAGLE3 case, whose TTT steps are the positions, and what P-EAGLE has besides."""

    num_layers: int = 2
    mask_token: int = 7


def build(case: Case) -> Step:
    step = eagle3_cases.build(replace(case, fc_norm=False))
    spec = PEagleSpec(
        step.draft.spec.target,
        layers=(1, 2, 3),
        draft_vocab_size=case.draft_vocab,
        mask_token_id=case.mask_token,
        num_layers=case.num_layers,
        num_positions=case.ttt_length,
        fc_norm=case.fc_norm,
    )
    draft = PEagleDraft(spec, DraftOptions(loss_chunk_tokens=case.chunk)).to(case.dtype)
    eagle3_cases.randomise(draft, eagle3_cases.Random(case.seed, case.dtype))
    return replace(step, case=case, draft=draft)


def run_oracle(step: Step) -> Result:
    case = step.case
    common = {
        "weights": dict(step.draft.named_parameters()),
        "embedding": step.target.embedding_VH,
        "target_head": step.target_head_VH,
        "draft_ids": step.draft_ids_D,
        "mask_token": case.mask_token,
        "position_weights": [0.8**k for k in range(case.ttt_length)],
        "heads": case.kv_heads * case.group,
        "kv_heads": case.kv_heads,
        "theta": THETA,
        "eps": EPS,
    }
    parts = [dense_sample(**sample, **common) for sample in eagle3_cases.samples_of(step)]
    return eagle3_cases.result_of(step, DenseResult.sum(parts))
