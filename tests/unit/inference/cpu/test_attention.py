"""A CPU engine's batched attention against softmaxes written out one query at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch import Tensor

from torchspec.inference.cpu.attention import BatchedAttention

HEADS, KV_HEADS, SIZE, SLOTS, COLUMNS = 6, 2, 8, 400, 48


class Pool:
    """Key and value rows of one layer, full of what no request has written."""

    def __init__(self) -> None:
        self.keys, self.values = (100 * torch.randn(SLOTS, KV_HEADS, SIZE, dtype=torch.float64) for _ in range(2))

    def set_kv_buffer(self, _layer: object, place: KVWriteLoc, k: Tensor, v: Tensor) -> None:
        self.keys[place.loc], self.values[place.loc] = k, v

    def get_key_buffer(self, _layer: int) -> Tensor:
        return self.keys

    def get_value_buffer(self, _layer: int) -> Tensor:
        return self.values


def expected(q_QHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, both_ways: bool) -> Tensor:
    """One request: its Q queries stand at the end of its L keys."""
    queries, length = len(q_QHD), len(k_LKD)
    out_QHD = torch.empty_like(q_QHD)
    for query in range(queries):
        seen = length if both_ways else length - queries + query + 1
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            weights = (k_LKD[:seen, kv] @ q_QHD[query, head] * SIZE**-0.5).softmax(0)
            out_QHD[query, head] = weights @ v_LKD[:seen, kv]
    return out_QHD


@pytest.mark.parametrize("both_ways", [False, True], ids=["verification", "draft block"])
@pytest.mark.parametrize("contexts", [[7], [0], [3, 9, 1], [5, 11, 2, 7, 3, 3, 12, 1, 8, 6]], ids=len)
@pytest.mark.parametrize("block", [1, 4, 16, 20])
def test_blocks_over_their_contexts(contexts: list[int], block: int, both_ways: bool) -> None:
    torch.manual_seed(len(contexts) + block)
    requests = len(contexts)
    pool, table = Pool(), torch.randint(SLOTS, (requests, COLUMNS))
    rows = torch.randperm(requests)  # requests lie in the table in another order than in the batch
    free = iter(torch.randperm(SLOTS).tolist())
    keys, values = [], []
    for row, context in zip(rows.tolist(), contexts, strict=True):
        table[row, : context + block] = torch.tensor([next(free) for _ in range(context + block)])
        k, v = (torch.randn(context + block, KV_HEADS, SIZE, dtype=torch.float64) for _ in range(2))
        pool.keys[table[row, :context]], pool.values[table[row, :context]] = k[:context], v[:context]
        keys.append(k)
        values.append(v)
    attention = BatchedAttention(
        SimpleNamespace(
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table.int()), token_to_kv_pool=pool
        )
    )
    layer = SimpleNamespace(
        layer_id=0,
        tp_q_head_num=HEADS,
        tp_k_head_num=KV_HEADS,
        qk_head_dim=SIZE,
        v_head_dim=SIZE,
        scaling=SIZE**-0.5,
        sliding_window_size=-1,
        is_cross_attention=False,
        attn_type=AttentionType.ENCODER_ONLY if both_ways else AttentionType.DECODER,
    )
    batch = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        seq_lens=torch.tensor(contexts),
        req_pool_indices=rows,
        spec_info=SimpleNamespace(draft_token_num=block),
        out_cache_loc=torch.cat([table[r, c : c + block] for r, c in zip(rows.tolist(), contexts, strict=True)]),
    )
    q = torch.randn(requests, block, HEADS, SIZE, dtype=torch.float64)
    new_k, new_v = (torch.cat([part[-block:] for part in parts]) for parts in (keys, values))
    attention.init_forward_metadata(batch)
    out = attention.forward_extend(q.flatten(0, 1).flatten(1), new_k, new_v, layer, batch)
    for got, *request in zip(out.view(requests, block, HEADS, SIZE), q, keys, values, strict=True):
        torch.testing.assert_close(got, expected(*request, both_ways), rtol=1e-12, atol=1e-12)
