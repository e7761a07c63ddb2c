"""Floating-point operations of an EAGLE3 step, and what a device could do in a second.

Model FLOPs utilisation (MFU, PaLM, arXiv 2204.02311) counts what the model needs and not what an implementation spends:
no recomputation, no padding, of the draft's own rows only those that are scored.
"""

from __future__ import annotations

import torch

from torchspec.drafts.eagle3.model import Batch
from torchspec.drafts.eagle3.spec import Eagle3Spec

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "B200": 2250e12,
}
"""Dense bfloat16 operations a second by a part of the device's name, from NVIDIA's data sheets; first match counts."""


def draft_flops(draft: Eagle3Spec, tokens: int, scored: int, ttt_length: int) -> float:
    """Operations of forward and backward on one sample; a multiply-add counts as two.

    S tokens, N of them scored, T TTT steps; H hidden, Q and K widths of queries and of keys, I of the MLP, D and V
    vocabularies of draft and target:

        once            fc: S * (aux * H) * H      block-0 keys and values: S * 2H * 2K
        in each step    q, o: N * (2H * Q + Q * H)     MLP: N * 3 * H * I     head: N * H * D
                        block-0 attention: 2 * Q * N * (S - N / 2)    (scored rows are the last ones)
        later steps     their own keys and values: N * 2H * 2K
        teacher         N * H * V, forward only

    Trained matrices cost three times their forward (gradients of inputs and of weights).
    """
    hidden, queries, keys = draft.hidden_size, draft.num_heads * draft.head_dim, draft.num_kv_heads * draft.head_dim
    once = tokens * (draft.num_aux * hidden * hidden + 4 * hidden * keys)
    step = scored * (3 * hidden * queries + 3 * hidden * draft.intermediate_size + hidden * draft.draft_vocab_size)
    attention = 2 * queries * scored * (tokens - scored / 2)
    later = (ttt_length - 1) * scored * 4 * hidden * keys
    teacher = scored * hidden * draft.vocab_size
    return 2.0 * (3 * (once + ttt_length * (step + attention) + later) + teacher)


def batch_flops(draft: Eagle3Spec, batch: Batch, ttt_length: int) -> float:
    """Of a micro-batch's samples, whoever shares them."""
    scored = batch.loss_mask_BS.sum(1).tolist()
    lengths = batch.lengths_B.tolist()
    return sum(draft_flops(draft, tokens, n, ttt_length) for tokens, n in zip(lengths, scored, strict=True))


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Operations a second that ``device`` is sold with; None where that is not known (CPUs, other dtypes)."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
