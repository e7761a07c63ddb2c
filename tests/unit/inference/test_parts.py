"""The parts of inference that need no engine: aux layers, chain kernels, seeded sampling, checks, leftovers."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest
import torch

from torchspec.inference.capture.protocol import capture_rid, captured_key, captured_sharding
from torchspec.inference.capture.writer import find_fault
from torchspec.inference.cpu import kernels as sgl_kernel_cpu
from torchspec.inference.cpu.backend import sample_with_seeds
from torchspec.processes.leftovers import SHARED_MEMORY, remove_shared_memory_leftovers
from torchspec.shards import ShardFormula
from torchspec.target.layers import default_aux_layers, resolve_aux_layers


@pytest.mark.parametrize(("layers", "inputs"), [(30, (2, 15, 27)), (61, (2, 30, 58)), (7, (2, 3, 4))])
def test_default_aux_layers_are_the_outputs_just_before(layers: int, inputs: tuple[int, ...]) -> None:
    assert default_aux_layers(layers) == tuple(layer - 1 for layer in inputs)


def test_aux_layers_are_bounds_checked() -> None:
    assert resolve_aux_layers(30, [0, 29]) == (0, 29)
    for wrong in ([], [30], [-1, 3], [3, 2], [2, 2]):
        with pytest.raises(ValueError, match=r"aux_layers.*from 0 to 29"):
            resolve_aux_layers(30, wrong)
    for few in (1, 6):
        with pytest.raises(ValueError, match="aux_layers"):
            resolve_aux_layers(few)
    assert len(set(resolve_aux_layers(7))) == 3


def test_no_capture_request_id_is_another_ones_prefix() -> None:
    assert captured_key(capture_rid("e0p1a0")) == "e0p1a0"
    assert captured_sharding(capture_rid("e0p1a0")) is None
    formula = ShardFormula(3, 2, "zigzag", 7)
    split = capture_rid("run/1/e0p1a0", formula)
    assert (captured_key(split), captured_sharding(split)) == ("run/1/e0p1a0", formula)
    assert split.endswith(":") and not split.startswith(capture_rid("run/1/e0p1a", formula))
    assert captured_key("answer:e0p1a0:") is None
    assert not capture_rid("e0p10").startswith(capture_rid("e0p1"))


def test_bad_states_are_found_wherever_they_are() -> None:
    hs, lhs = torch.randn(5, 3 * 8).bfloat16(), torch.randn(5, 8).bfloat16()
    assert find_fault(hs, lhs) is None
    for value in (float("nan"), float("inf")):
        bad = hs.clone()
        bad[3, 2 * 8 + 5] = value
        assert find_fault(bad, lhs) == "aux state 2 of token 3 is not finite"
    bad = hs.clone()
    bad[4, 8:16] = 0
    assert find_fault(bad, lhs) == "aux state 1 of token 4 is all zero"
    assert find_fault(hs, torch.zeros(5, 8)) == "last state 0 of token 0 is all zero"


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


def test_seeded_sampling_follows_the_distribution_and_the_seed() -> None:
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draws = 4000
    seeds, positions = torch.arange(draws), torch.arange(draws) % 7
    logprobs = probs.log().expand(draws, -1)
    tokens = sample_with_seeds(logprobs, seeds, positions)
    shares = torch.bincount(tokens[:, 0], minlength=4) / draws
    assert shares[1] == 0
    assert (shares - probs).abs().max() < 4 * (0.25 / draws) ** 0.5
    shuffled = torch.randperm(draws)
    assert sample_with_seeds(logprobs, seeds[shuffled], positions[shuffled]).equal(tokens[shuffled])
    assert not sample_with_seeds(logprobs, seeds, positions + 1).equal(tokens)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_only_unmapped_files_made_since_are_removed() -> None:
    before = time.time() - 1
    mapped, orphan, other = (SHARED_MEMORY / f"{name}_torchspec_test" for name in ("sgl_shm_a", "sgl_shm_b", "mine"))
    try:
        for path in (mapped, orphan, other):
            path.write_bytes(b"x" * mmap.PAGESIZE)
        with mapped.open("r+b") as file, mmap.mmap(file.fileno(), 0):
            assert orphan.name not in remove_shared_memory_leftovers(time.time() + 60)
            removed = remove_shared_memory_leftovers(before)
            assert orphan.name in removed and mapped.name not in removed
            assert mapped.exists() and other.exists() and not orphan.exists()
        assert mapped.name in remove_shared_memory_leftovers(before)
    finally:
        for path in (mapped, orphan, other):
            Path(path).unlink(missing_ok=True)
