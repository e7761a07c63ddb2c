"""Stand-ins for SGLang's kernels: trees of drafts that are chains, and KV slots."""

from __future__ import annotations

import torch

from torchspec.inference.cpu import kernels as sgl_kernel_cpu


def test_chain_is_verified_up_to_the_first_wrong_token() -> None:
    batch, tokens = 4, 4
    candidates = torch.tensor([[5, 1, 2, 3], [5, 1, 2, 9], [5, 9, 2, 3], [5, 1, 9, 3]])
    target = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    index = torch.zeros(batch, tokens, dtype=torch.long)
    following = torch.full((batch, tokens), -1)
    mask = torch.zeros(batch * tokens * tokens, dtype=torch.bool)
    positions = torch.zeros(batch * tokens, dtype=torch.long)
    lengths = torch.tensor([7, 0, 3, 11])
    sgl_kernel_cpu.build_tree_kernel_efficient_cpu(
        None, None, lengths, mask, positions, index, following, None, 1, 3, tokens, 1
    )
    assert positions.view(batch, tokens).tolist() == [[n, n + 1, n + 2, n + 3] for n in (7, 0, 3, 11)]
    assert following.tolist() == [[1, 2, 3, -1]] * batch
    assert mask.view(batch, tokens, tokens).equal(torch.ones(tokens, tokens).tril().bool().expand(batch, -1, -1))

    predicts = torch.full((batch * tokens,), -1, dtype=torch.int32)
    accepted = torch.full((batch, tokens), -1, dtype=torch.int32)
    counts = torch.zeros(batch, dtype=torch.int32)
    sgl_kernel_cpu.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accepted,
        accept_token_num=counts,
        candidates=candidates,
        retrive_index=index,
        retrive_next_token=following,
        retrive_next_sibling=following,
        target_predict=target,
    )
    assert counts.tolist() == [3, 2, 0, 1]
    assert accepted.tolist() == [[0, 1, 2, 3], [4, 5, 6, -1], [8, -1, -1, -1], [12, 13, -1, -1]]
    assert [predicts[row[row >= 0].long()].tolist() for row in accepted] == [[1, 2, 3, 4], [1, 2, 3], [1], [1, 2]]


def test_kv_slots_go_where_the_requests_are() -> None:
    table, rows = torch.zeros(3, 6, dtype=torch.int32), torch.tensor([2, 0])
    slots = torch.tensor([11, 12, 13, 21, 22])
    sgl_kernel_cpu.assign_req_to_token_pool_cpu(rows, table, torch.tensor([1, 4]), torch.tensor([4, 6]), slots, 6)
    assert table.tolist() == [[0, 0, 0, 0, 21, 22], [0] * 6, [0, 11, 12, 13, 0, 0]]
    out = torch.zeros(4, dtype=torch.long)
    sgl_kernel_cpu.assign_draft_cache_locs_contiguous_cpu(rows, table, torch.tensor([2, 4]), out, 6, 1, 2)
    assert out.tolist() == [12, 13, 21, 22]
    bonus = torch.zeros(2, dtype=torch.long)
    sgl_kernel_cpu.fill_bonus_tokens_cpu(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 1]), bonus, 3)
    assert bonus.tolist() == [7, 8]
    kept = torch.zeros(3, dtype=torch.long)
    sgl_kernel_cpu.fill_accept_out_cache_loc_cpu(torch.tensor([[0, 1], [3, -1]]), slots, kept)
    assert kept.tolist() == [11, 12, 21]
    layers = [torch.arange(8.0).view(4, 2), torch.arange(10.0, 18.0).view(4, 2)]
    pointers, sizes = torch.tensor([layer.data_ptr() for layer in layers]), torch.tensor([8, 8])
    sgl_kernel_cpu.copy_all_layer_kv_cache_cpu(pointers, sizes, torch.tensor([0, 1]), torch.tensor([1, 3]))
    assert layers[0].tolist() == [[2, 3], [6, 7], [4, 5], [6, 7]]
    assert layers[1].tolist() == [[12, 13], [16, 17], [14, 15], [16, 17]]
