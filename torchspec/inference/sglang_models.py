"""Which targets SGLang can capture: found out before anything starts, without importing it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torchspec.inference.sglang_patch import SUPPORTED_VERSION
from torchspec.target.checkpoint import TargetCheckpoint

CAPTURING = frozenset(
    """
    ApertusForCausalLM BailingMoEForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM DeepseekV2ForCausalLM
    DeepseekV32ForCausalLM DeepseekV3ForCausalLM ExaoneMoEForCausalLM ExaoneMoeForCausalLM Gemma3ForCausalLM
    Gemma3ForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration
    Gemma4UnifiedForConditionalGeneration Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
    Glm5NextForConditionalGeneration GlmMoeDsaForCausalLM GptOssForCausalLM IQuestCoderForCausalLM
    InternLM3ForCausalLM KimiK25ForConditionalGeneration Llama4ForCausalLM Llama4ForConditionalGeneration
    LlamaForCausalLM LongcatFlashForCausalLM MellumForCausalLM MiniMaxM2ForCausalLM MiniMaxM3SparseForCausalLM
    MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM MistralForCausalLM MistralLarge3ForCausalLM
    Phi3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM
    Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
    Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
    SarvamMoEForCausalLM TeleFLMForCausalLM
    """.split()  # noqa: SIM905 (as a list, it would fill the page)
)
"""Models whose layers SGLang 0.5.23 hands out: its classes with ``set_eagle3_layers_to_capture``."""
SHIFTING = re.compile("Deepseek|GlmMoeDsa|Glm4MoeLite|KimiK25|MistralLarge3")
"""Those that hand out one layer earlier, unless the first layer asked for is 1."""
WITHOUT_RESIDUAL = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
"""Those that hand out what a layer adds, without what it is added to."""
NOT_ON_A_CPU = {
    re.compile("GptOss"): "attention with sinks has",
    re.compile("Deepseek|GlmMoeDsa|Glm4MoeLite|KimiK25|LongcatFlash|MistralLarge3"): "latent attention has",
    re.compile("Glm5Next|Qwen3Next|Qwen3_5"): "linear attention has",
    re.compile("Llama4"): "experts have",
}
"""Those with a part that has no backend for the CPUs of TorchSpec."""
WITHOUT_DFLASH = frozenset(
    """
    ApertusForCausalLM BailingMoEForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM ExaoneMoEForCausalLM
    ExaoneMoeForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Glm4MoeForCausalLM
    Llama4ForConditionalGeneration LongcatFlashForCausalLM MiniMaxM2ForCausalLM MiniMaxM3SparseForCausalLM
    Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen2_5_VLForConditionalGeneration SarvamMoEForCausalLM
    """.split()  # noqa: SIM905
)
"""Those that SGLang can capture, but not serve with a DFlash draft: without ``set_dflash_layers_to_capture``."""


def check_target(target: TargetCheckpoint, layers: Sequence[int], on_gpu: bool) -> None:
    """Refuse a target that SGLang could not capture ``layers`` of.

    Raises:
        ValueError: names the architecture, and what is missing.
    """
    name = target.architecture
    if name not in CAPTURING:
        raise ValueError(
            f"target.path: SGLang {SUPPORTED_VERSION} hands out no hidden states of {name} (its class has no "
            "set_eagle3_layers_to_capture), so no draft can be trained for it"
        )
    if name in WITHOUT_RESIDUAL:
        raise ValueError(
            f"target.path: SGLang {SUPPORTED_VERSION} hands out hidden states of {name} without the residual stream, "
            "which a draft needs"
        )
    for names, part in NOT_ON_A_CPU.items():
        if not on_gpu and names.match(name):
            raise ValueError(f"target.path: {name} needs a GPU: its {part} no backend for CPUs")
    if SHIFTING.match(name) and layers[0] != 1:
        raise ValueError(
            f"target.aux_layers={list(layers)} must begin with 1 for {name}: SGLang {SUPPORTED_VERSION} would take "
            "each of them for the layer before"
        )


def check_served(target: TargetCheckpoint, algorithm: str) -> None:
    """Raises ValueError: SGLang does not serve ``target`` with drafts of its speculative ``algorithm``."""
    if algorithm == "DFLASH" and target.architecture in WITHOUT_DFLASH:
        raise ValueError(f"SGLang {SUPPORTED_VERSION} serves no DFlash drafts for {target.architecture}")
