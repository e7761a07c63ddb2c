"""Scaling and clipping of gradients in one rank (several ranks: tests/integration/test_fsdp.py)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchspec.config.schema import OptimizerConfig
from torchspec.training.optimizer import build_optimizer, scale_and_clip


def parameters_with_gradients() -> list[nn.Parameter]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (5,), (2, 2)]]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    return parameters


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_equals_dividing_first_and_torch_clipping_after(max_norm: float) -> None:
    ours, reference = parameters_with_gradients(), parameters_with_gradients()
    for parameter in reference[:2]:
        assert parameter.grad is not None
        parameter.grad /= 7.0
    expected = nn.utils.clip_grad_norm_(reference, max_norm)

    norm = scale_and_clip(ours, torch.tensor(1 / 7.0), max_norm, group=None)

    assert expected > 0.01
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_no_gradients_at_all_is_a_norm_of_zero() -> None:
    assert scale_and_clip([nn.Parameter(torch.ones(2))], torch.tensor(1.0), 1.0, group=None).item() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_norm(bad: float) -> None:
    parameters = parameters_with_gradients()
    assert parameters[1].grad is not None
    parameters[1].grad[2] = bad
    assert not scale_and_clip(parameters, torch.tensor(1.0), 1.0, group=None).isfinite()


def test_optimizer_takes_trainable_masters_only_and_follows_the_config() -> None:
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    weight = nn.Parameter(torch.ones(3))
    config = OptimizerConfig(lr=0.1, betas=(0.0, 0.0), eps=1e-12, weight_decay=0.5)
    optimizer = build_optimizer([frozen, weight], config)
    weight.grad = torch.tensor([1.0, -2.0, 4.0])
    optimizer.step()
    assert frozen.tolist() == [1.0, 1.0, 1.0]
    # decoupled decay first, then a step of lr against the gradient's sign
    torch.testing.assert_close(weight.detach(), torch.tensor([0.85, 1.05, 0.85]))


def test_masters_below_float32_are_refused() -> None:
    with pytest.raises(AssertionError, match="float32"):
        build_optimizer([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], OptimizerConfig())
