"""A start from a draft that others have made, and an export that cannot be written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from torchspec.drafts.eagle3.model import Eagle3Draft
from torchspec.drafts.eagle3.spec import Eagle3Knobs, Eagle3Spec
from torchspec.drafts.export import export_draft, validate_export
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.training.trainer import Trainer
from torchspec.training.weights import check_start, warm_start

OTHER_IDS, IDS = torch.arange(0, 64, 2), torch.arange(0, 64, 3)


def draft_for(target: Path, **knobs: object) -> Eagle3Draft:
    return Eagle3Draft(Eagle3Spec.of(Eagle3Knobs.model_validate(knobs), TargetCheckpoint(target), None))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4, vocab_size=64
    ).save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def test_a_draft_of_another_shape_is_a_start_where_its_config_gives_that_shape(target: Path, tmp_path: Path) -> None:
    other = draft_for(target, vocab_size=len(OTHER_IDS), num_heads=2, num_kv_heads=1, intermediate_size=96)
    folder = export_draft(other.spec, other.state_dict(), OTHER_IDS, tmp_path / "draft", "float32")
    with pytest.raises(ValueError, match=r"does not fit this draft: .*\(draft\.config=.* gives a draft the shape"):
        check_start(folder, draft_for(target, vocab_size=len(IDS)).spec)
    with pytest.raises(ValueError, match=r"training\.init_from .*another kind: input_norm\.weight on one side only"):
        check_start(folder, draft_for(target, vocab_size=len(IDS), norm_before_fc=True).spec)
    with pytest.raises(ValueError, match=r"training\.init_from: .*nowhere is neither a checkpoint"):
        check_start(tmp_path / "nowhere", other.spec)
    draft = draft_for(target, vocab_size=len(IDS), config=folder)
    check_start(folder, draft.spec)
    head = draft.lm_head.weight.detach().clone()
    warm_start(draft, IDS, folder)
    for name, weight in draft.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(weight, other.state_dict()[name]), name
    assert torch.equal(draft.lm_head.weight[::2], other.lm_head.weight[::3]), "tokens 0, 6, 12 .. both know"
    assert torch.equal(draft.lm_head.weight[1::2], head[1::2])


def test_an_export_that_fails_is_no_fault_of_the_rank(target: Path, tmp_path: Path) -> None:
    draft, folder = draft_for(target, vocab_size=len(IDS)), tmp_path / "export"
    rank = SimpleNamespace(
        config=SimpleNamespace(checkpoint=SimpleNamespace(export_dtype="float32")),
        spec=SimpleNamespace(draft=draft.spec),
        learner=SimpleNamespace(draft_ids=IDS),
    )

    def no_fence() -> None:
        pass

    assert Trainer._export(rank, draft.state_dict(), folder, no_fence) == ""  # type: ignore[arg-type]
    validate_export(folder)
    (folder / "result.json").touch()
    assert "is not an export (it holds result.json)" in Trainer._export(rank, draft.state_dict(), folder, no_fence)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    assert "file" in Trainer._export(rank, draft.state_dict(), tmp_path / "file" / "export", no_fence)  # type: ignore[arg-type]
