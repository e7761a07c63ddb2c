"""Pure-torch stand-in for the CPU build of ``sgl_kernel``, which PyPI does not have.

On a CPU, SGLang imports a handful of functions from ``sgl_kernel`` while it is itself imported, and calls them to
allocate KV slots and to verify draft tokens. :func:`activate` is an entry point of the group
``sglang.srt.platforms``: the only code of ours that SGLang runs before those imports, in each of its processes. It
puts this module in place of the missing package and names no platform, so SGLang goes on as it would without it.
Where a real ``sgl_kernel`` is installed, or the engine is not a CPU one, nothing happens.

Speculation is a chain here (``topk = 1``), which turns SGLang's tree kernels into a few vectorised lines.

Shapes: B requests, N draft tokens per request (the root included), K accepted tokens at most per request.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from typing import NoReturn

import torch
from torch import Tensor

_QLEN_ONLY = 1
"""``TreeMaskMode.QLEN_ONLY``: the mask covers the draft tokens only, not the prefix."""


def activate() -> None:
    """Stand in for ``sgl_kernel`` if this is a CPU engine and there is no real one."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" and importlib.util.find_spec("sgl_kernel") is None:
        sys.modules["sgl_kernel"] = sys.modules[__name__]


def assign_req_to_token_pool_cpu(
    rows_B: Tensor, req_to_token: Tensor, start_B: Tensor, end_B: Tensor, slots: Tensor, _pool_len: int
) -> None:
    """Write consecutive pieces of ``slots`` to ``req_to_token[row, start:end]``."""
    taken = 0
    for row, start, end in zip(rows_B.tolist(), start_B.tolist(), end_B.tolist(), strict=True):
        req_to_token[row, start:end] = slots[taken : taken + end - start]
        taken += end - start


def assign_extend_cache_locs_cpu(
    rows_B: Tensor, req_to_token: Tensor, start_B: Tensor, end_B: Tensor, out: Tensor, _pool_len: int
) -> None:
    """The inverse: pack ``req_to_token[row, start:end]`` of all requests into ``out``."""
    filled = 0
    for row, start, end in zip(rows_B.tolist(), start_B.tolist(), end_B.tolist(), strict=True):
        out[filled : filled + end - start] = req_to_token[row, start:end]
        filled += end - start


def assign_draft_cache_locs_contiguous_cpu(
    rows_B: Tensor, req_to_token: Tensor, start_B: Tensor, out: Tensor, pool_len: int, topk: int, steps: int
) -> None:
    """Pack ``topk * steps`` slots per request, from ``start`` on, into ``out``."""
    assign_extend_cache_locs_cpu(rows_B, req_to_token, start_B, start_B + topk * steps, out, pool_len)


def fill_bonus_tokens_cpu(accepted_BK: Tensor, accept_lens_B: Tensor, bonus_B: Tensor, stride: int) -> None:
    """The last accepted token of each request; ``accept_lens`` counts it."""
    last_B = accept_lens_B.long() - 1 + stride * torch.arange(accept_lens_B.numel())
    bonus_B.copy_(accepted_BK.reshape(-1)[last_B])


def fill_accept_out_cache_loc_cpu(accept_index_BK: Tensor, slots: Tensor, out: Tensor) -> None:
    """Pack the slots of the accepted tokens (index -1 marks none)."""
    index = accept_index_BK[accept_index_BK > -1].long()
    out[: index.numel()] = slots[index]


def build_tree_kernel_efficient_cpu(
    _parents: Tensor,
    _selected: Tensor,
    seq_lens_B: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index_BN: Tensor,
    retrieve_next_BN: Tensor,
    _retrieve_sibling_BN: Tensor,
    topk: int,
    _depth: int,
    num_tokens: int,
    mask_mode: int,
) -> None:
    """Positions, causal mask and links of a chain: token ``i`` follows token ``i - 1``, nobody has siblings."""
    if topk != 1 or mask_mode != _QLEN_ONLY:
        raise NotImplementedError("speculation on a CPU engine needs speculative_eagle_topk=1")
    batch, chain_N = seq_lens_B.numel(), torch.arange(num_tokens)
    causal_NN = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    tree_mask.view(-1)[: batch * num_tokens**2].view(batch, num_tokens, num_tokens).copy_(causal_NN)
    positions.view(batch, num_tokens).copy_(seq_lens_B[:, None] + chain_N)
    retrieve_index_BN.copy_(torch.arange(batch)[:, None] * num_tokens + chain_N)
    retrieve_next_BN[:, :-1] = chain_N[1:]


def verify_tree_greedy_cpu(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Accept the longest prefix of each chain that the target would have written itself.

    ``candidates`` and ``target_predict`` are [B, N], ``accept_index`` is [B, K], ``predicts`` is [B * N]. Column 0 of
    ``candidates`` is the token already emitted; the target's word after the last accepted token comes for free.
    """
    right = candidates[:, 1:] == target_predict[:, :-1]
    accepted_B = right[:, : accept_index.shape[1] - 1].long().cumprod(-1).sum(-1)
    accept_token_num.copy_(accepted_B)
    kept = torch.arange(accept_index.shape[1]) <= accepted_B[:, None]
    index = retrive_index[:, : accept_index.shape[1]]
    accept_index[kept] = index[kept].to(accept_index.dtype)
    predicts[index[kept].long()] = target_predict[:, : accept_index.shape[1]][kept].to(predicts.dtype)


def copy_all_layer_kv_cache_cpu(pointers: Tensor, row_bytes: Tensor, targets: Tensor, sources: Tensor) -> None:
    """Move KV rows within each layer's buffer, given by its address; all are read before the first is written."""
    for address, size in zip(pointers.tolist(), row_bytes.tolist(), strict=True):
        rows = [ctypes.string_at(address + source * size, size) for source in sources.tolist()]
        for target, row in zip(targets.tolist(), rows, strict=True):
            ctypes.memmove(address + target * size, row, size)


def rotate_input_ids_cpu(*_args: object) -> NoReturn:
    """Imported by SGLang, called for multi-layer MTP drafts only."""
    raise NotImplementedError("multi-layer MTP drafts do not run on a CPU engine")
