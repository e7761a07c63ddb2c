"""Sampling with seeds."""

from __future__ import annotations

import torch

from torchspec.inference.cpu.backend import sample_with_seeds


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
