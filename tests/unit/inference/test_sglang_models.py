"""The list of targets agrees with SGLang's sources, and what is not on it is refused by name."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks.families import FAMILIES
from torchspec.inference.sglang_models import CAPTURING, SHIFTING, WITHOUT_DFLASH, check_served, check_target
from torchspec.target.checkpoint import TargetCheckpoint

TARGETS = ("ForCausalLM", "ForConditionalGeneration")
DRAFTS = re.compile(r".*Assistant|MindSpore|TorchNative|Cosmos3|Qwen3Omni|InternS|Qwen4Exp|Llama(Embedding|Seq|Reward)")
"""Drafts of SGLang's own, and models that this list does not vouch for."""


def classes() -> Iterator[tuple[str, list[str], bool, bool, bool]]:
    """Of all classes in SGLang's models: name, bases, whether it can capture, shifts layers, and can serve DFlash."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations is not None
    for path in Path(spec.submodule_search_locations[0], "srt", "models").rglob("*.py"):
        for text in re.split(r"^class ", path.read_text(), flags=re.MULTILINE)[1:]:
            name, *bases = re.findall(r"\w+", text.partition(":")[0])
            captures = "    def set_eagle3_layers_to_capture" in text
            yield name, bases, captures, captures and "layer_ids[0] == 1" in text, "set_dflash_layers_to" in text


def test_the_list_is_sglangs_own() -> None:
    found = list(classes())
    capturing = {name for name, _, captures, _, _ in found if captures}
    serving = {name for name, *_, serves in found if serves}
    for _ in range(3):  # generations
        capturing |= {name for name, bases, *_ in found if capturing & set(bases)}
        serving |= {name for name, bases, *_ in found if serving & set(bases)}
    assert {name for name in capturing if name.endswith(TARGETS) and not DRAFTS.match(name)} == CAPTURING
    assert CAPTURING - serving == WITHOUT_DFLASH
    assert {name for name, *_, shifts, _ in found if shifts} <= {name for name in CAPTURING if SHIFTING.match(name)}


@pytest.mark.parametrize("family", ["Mixtral", "Granite", "Gemma 2", "OLMo-2", "GLM-4", "Mistral 3"])
def test_what_sglang_cannot_capture_is_refused_by_name(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    config.architectures = [f"{family.replace(' ', '')}ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"SGLang 0\.5\.23 hands out no hidden states of {config.architectures[0]}"):
        check_target(TargetCheckpoint(tmp_path), (1, 3, 5), on_gpu=True)


def test_layers_that_sglang_would_shift_are_refused(tmp_path: Path) -> None:
    config = FAMILIES["DeepSeek-V3"]()
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(tmp_path)
    check_target(TargetCheckpoint(tmp_path), (1, 3, 5), on_gpu=True)
    with pytest.raises(ValueError, match=r"target\.aux_layers=\[2, 4, 6\] must begin with 1 for DeepseekV3ForCausalLM"):
        check_target(TargetCheckpoint(tmp_path), (2, 4, 6), on_gpu=True)


@pytest.mark.parametrize(
    ("family", "architecture", "message"),
    [
        ("gpt-oss", "GptOssForCausalLM", "GptOssForCausalLM needs a GPU: its attention with sinks"),
        ("DeepSeek-V3", "DeepseekV3ForCausalLM", "DeepseekV3ForCausalLM needs a GPU: its latent"),
        ("Qwen3-Next", "Qwen3NextForCausalLM", "Qwen3NextForCausalLM needs a GPU: its linear attention has no backend"),
        ("Llama 4", "Llama4ForConditionalGeneration", "Llama4ForConditionalGeneration needs a GPU: its experts have"),
        ("Gemma 3", "Gemma3ForCausalLM", "Gemma3ForCausalLM without the residual stream"),
    ],
)
def test_what_sglang_cannot_do_on_a_cpu_or_does_wrongly_is_refused(
    family: str, architecture: str, message: str, tmp_path: Path
) -> None:
    config = FAMILIES[family]()
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_target(TargetCheckpoint(tmp_path), (1, 3, 5), on_gpu=False)


@pytest.mark.parametrize(("family", "served"), [("Qwen2", False), ("Qwen3", True)])
def test_what_sglang_does_not_serve_with_a_dflash_draft_is_said(family: str, served: bool, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(tmp_path)
    target = TargetCheckpoint(tmp_path)
    check_served(target, "EAGLE3")
    refused = pytest.raises(ValueError, match=r"SGLang 0\.5\.23 serves no DFlash drafts for Qwen2ForCausalLM")
    with nullcontext() if served else refused:
        check_served(target, "DFLASH")
