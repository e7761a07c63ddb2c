"""The teacher of every family says what transformers' own model says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.families import make_checkpoint
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.head import load_target_head

PROMPT = torch.tensor([[5, 17, 4093, 198, 7, 31]])


@pytest.mark.parametrize(
    "family", ["Qwen2", "Gemma 2", "Gemma 3", "Granite", "GLM-4", "Qwen3-VL", "Mistral 3", "Llama 4"]
)
@torch.inference_mode()
def test_teacher_equals_transformers(family: str, target_path: Path, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path, target_path)
    with torch.no_grad():  # as made, all norms are alike, and logits too small for a soft cap to show
        for name, parameter in model.named_parameters():
            if name.endswith("model.norm.weight") or name.endswith("language_model.norm.weight"):
                parameter.copy_(torch.linspace(1.0, 9.0, len(parameter)))
    model.save_pretrained(tmp_path)
    before_norm: list[torch.Tensor] = []
    norm = next(
        m
        for name, m in model.named_modules()
        if name.split(".")[-2:] in (["model", "norm"], ["language_model", "norm"])
    )
    norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    output = model(PROMPT, output_hidden_states=True)
    expected_NV = output.logits[0].softmax(-1)
    head = load_target_head(TargetCheckpoint(tmp_path), torch.float32, "cpu")
    for states, norm_state in ((output.hidden_states[-1], "post_norm"), (before_norm[0], "pre_norm")):
        targets = head.teacher(states[0], norm_state).chunk(slice(None), torch.float32)  # type: ignore[arg-type]
        found_NV = targets.probabilities(torch.arange(PROMPT.shape[1]))
        torch.testing.assert_close(found_NV, expected_NV, rtol=1e-3, atol=1e-7)
        assert torch.equal(targets.choice_n, expected_NV.argmax(-1))


def test_the_cap_changes_the_distribution_over_a_draft_vocabulary_and_not_who_counts(
    target_path: Path, tmp_path: Path
) -> None:
    make_checkpoint("Gemma 2", tmp_path, target_path)
    ids_D = torch.arange(0, 49152, 3)
    head = load_target_head(TargetCheckpoint(tmp_path), torch.float32, "cpu", ids_D)
    states_NH = 40 * torch.randn(64, head.norm_H.shape[0], generator=torch.Generator().manual_seed(0))
    targets = head.teacher(states_NH, "post_norm").chunk(slice(None), torch.float32)
    logits_NV = states_NH @ head.embedding_VH.t()
    capped_ND = 30 * torch.tanh(logits_NV[:, ids_D] / 30)
    torch.testing.assert_close(targets.probabilities(torch.arange(64)), capped_ND.softmax(-1), rtol=1e-3, atol=1e-7)
    assert torch.equal(targets.counted_n, logits_NV.argmax(-1) % 3 == 0)
    assert targets.counted_n.any() and not targets.counted_n.all()
