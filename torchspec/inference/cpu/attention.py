"""Attention of a CPU engine: batched decode, and the forward modes of draft chains and draft blocks.

SGLang's ``torch_native`` backend knows prefill and decode, and calls SDPA once a request and layer. This subclass adds
what speculation with ``topk = 1`` needs, and runs requests that ask equally many queries (decode, verification, drafts:
a few each) as one SDPA a layer, over their keys and values padded to a common length. Which KV slots those are is the
same in every layer, so it is worked out once a forward pass. Results equal the stock backend's.

A DFlash draft is run in the mode of a verification, too, but its layers look both ways (``ENCODER_ONLY``): at the
whole context and at the whole block.

Shapes: B requests of a group, Q new tokens of each, L key positions (padded), K KV heads, G query heads per KV head,
D head size, T tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

_GROUP = 8
"""Requests that share one SDPA. More save little, pad more, and no longer fit into a core's cache."""

_FEW_QUERIES = 16
"""New tokens of a request up to which it is batched: decode and drafts. Prefills are worth an SDPA each."""


@dataclass(frozen=True, slots=True)
class Group:
    """Requests that are attended together."""

    rows: Tensor
    """[B * Q] their rows in the batch of tokens."""
    slots_BL: Tensor
    causal_B1QL: Tensor | None
    """True where a query may look back; ``None`` for plain causal attention of a single request."""
    seen_B1QL: Tensor
    """True wherever its request has a key: where a query may look that looks both ways."""


class BatchedAttention(TorchNativeAttnBackend):
    """Replaces :class:`TorchNativeAttnBackend` on a CPU.

    Args:
        draft_step: For the ``i``-th step of a draft chain: how many draft tokens lie in the KV cache beyond
            ``seq_lens``, this step's included.
    """

    def __init__(self, model_runner: ModelRunner, draft_step: int = 0):
        super().__init__(model_runner)
        self._draft_step = draft_step
        self._groups: list[Group] = []

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        seen, new = self._lengths(forward_batch)
        table = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices]
        starts = torch.tensor([0, *new]).cumsum(0)
        self._groups = [_plan(members, table, seen, new, starts) for members in _partition(seen, new)]

    def forward_extend(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(super().forward_extend, *args, **kwargs)

    def forward_decode(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(super().forward_decode, *args, **kwargs)

    def _lengths(self, forward_batch: ForwardBatch) -> tuple[list[int], list[int]]:
        """Key positions and new tokens of each request."""
        mode, seq_lens = forward_batch.forward_mode, forward_batch.seq_lens.tolist()
        if mode.is_target_verify():
            new = [forward_batch.spec_info.draft_token_num] * len(seq_lens)
            return [length + n for length, n in zip(seq_lens, new, strict=True)], new
        if mode.is_decode():
            return [length + self._draft_step for length in seq_lens], [1] * len(seq_lens)
        return seq_lens, forward_batch.extend_seq_lens.tolist()

    def _forward(
        self,
        stock: Callable[..., Tensor],
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> Tensor:
        """Self-attention without a window; the ``stock`` backend knows the rest."""
        windowed = layer.sliding_window_size is not None and layer.sliding_window_size > -1
        if layer.is_cross_attention or windowed:
            return stock(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache and k is not None:
            place = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, place, k, v)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        q_TKGD = q.reshape(q.shape[0], layer.tp_k_head_num, -1, layer.qk_head_dim)
        out_TKGD = q.new_empty(*q_TKGD.shape[:3], layer.v_head_dim)
        for group in self._groups:
            batch, length = group.slots_BL.shape
            slots = group.slots_BL.view(-1)
            k_BKLD = keys.index_select(0, slots).view(batch, length, *keys.shape[1:]).transpose(1, 2).to(q.dtype)
            v_BKLD = values.index_select(0, slots).view(batch, length, *values.shape[1:]).transpose(1, 2).to(q.dtype)
            mask = group.seen_B1QL if layer.attn_type == AttentionType.ENCODER_ONLY else group.causal_B1QL
            out_TKGD[group.rows] = _attend(q_TKGD[group.rows], k_BKLD, v_BKLD, mask, layer.scaling)
        return out_TKGD.view(q.shape[0], -1)


class DraftChain:
    """One attention backend for each draft token after the first."""

    def __init__(self, runner: ModelRunner, num_steps: int):
        self.attn_backends = [BatchedAttention(runner, draft_step=step) for step in range(1, num_steps)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


def _partition(seen: list[int], new: list[int]) -> list[list[int]]:
    """Requests to be attended together: as many new tokens, and about as many keys."""
    if len(set(new)) > 1 or new[0] > _FEW_QUERIES:
        return [[request] for request in range(len(seen))]
    by_length = sorted(range(len(seen)), key=seen.__getitem__)
    return [by_length[i : i + _GROUP] for i in range(0, len(by_length), _GROUP)]


def _plan(members: list[int], table: Tensor, seen: list[int], new: list[int], starts: Tensor) -> Group:
    queries, seen_B = new[members[0]], torch.tensor([seen[m] for m in members])
    length = int(seen_B.max())
    rows = (starts[members][:, None] + torch.arange(queries)).view(-1)
    # Padded columns hold stale slots of the table: valid to read, never looked at.
    slots_BL, columns_L = table[members, :length].long(), torch.arange(length)
    seen_B1QL = (columns_L < seen_B[:, None, None, None]).expand(-1, -1, queries, -1)
    if len(members) == 1 and queries in (1, length):
        return Group(rows, slots_BL, None, seen_B1QL)
    last_B1Q1 = (seen_B - queries)[:, None, None, None] + torch.arange(queries)[:, None]
    return Group(rows, slots_BL, columns_L <= last_B1Q1, seen_B1QL)


def _attend(q_RKGD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_B1QL: Tensor | None, scale: float) -> Tensor:
    """Attention of R = B * Q queries; returns [R, K, G, Dv].

    The G heads that share keys become further queries of one head when requests are batched, so that nothing is
    repeated; a single request, which may have thousands of queries, leaves that to SDPA.
    """
    batch, heads, groups = k_BKLD.shape[0], k_BKLD.shape[1], q_RKGD.shape[2]
    q_BQKGD = q_RKGD.view(batch, -1, *q_RKGD.shape[1:])
    queries = q_BQKGD.shape[1]
    if batch == 1 and queries > 1:
        q_BHQD, causal = q_BQKGD.flatten(2, 3).transpose(1, 2), mask_B1QL is None
        out_BHQD = scaled_dot_product_attention(
            q_BHQD, k_BKLD, v_BKLD, attn_mask=mask_B1QL, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
        return out_BHQD.transpose(1, 2).reshape(batch * queries, heads, groups, -1)
    q_BKXD = q_BQKGD.permute(0, 2, 3, 1, 4).reshape(batch, heads, groups * queries, -1)
    mask_B1XL = None if mask_B1QL is None else mask_B1QL.repeat(1, 1, groups, 1)
    out_BKXD = scaled_dot_product_attention(q_BKXD, k_BKLD, v_BKLD, attn_mask=mask_B1XL, scale=scale)
    out_BQKGD = out_BKXD.view(batch, heads, groups, queries, -1).permute(0, 3, 1, 2, 4)
    return out_BQKGD.reshape(batch * queries, heads, groups, -1)
