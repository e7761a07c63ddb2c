"""Tiny random checkpoints of the families of models that people train drafts for.

Each is made by transformers' own classes, so its tensors have the names, its config the form and its layers the order
of the real ones; only the sizes are small. The tokenizer is the quickstart target's, so its prompts can be answered.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
LAYERS, HIDDEN = 8, 128
SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.1,  # at the usual 0.02 a layer this small hardly changes what passes it
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 512}
MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 6, 6]}
VISION: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "depth": 2}


def config(kind: str, **fields: Any) -> PreTrainedConfig:
    """``kind`` is the name of transformers' class without its ``Config``."""
    return getattr(transformers, f"{kind}Config")(**SIZES | fields)


def nested(kind: str, text: str, vision: dict[str, Any], **fields: Any) -> PreTrainedConfig:
    """A vision-language model around the language model of class ``text``."""
    tower = config(text, **fields).to_dict()
    return getattr(transformers, f"{kind}Config")(text_config=tower, vision_config=VISION | vision)


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Llama 3": lambda: config("Llama", rope_parameters=LLAMA3),
    "Mistral": lambda: config("Mistral", sliding_window=None),
    "Qwen2": lambda: config("Qwen2", tie_word_embeddings=True),
    "Qwen3": lambda: config("Qwen3"),
    "Qwen3-MoE": lambda: config("Qwen3Moe", num_experts=4, **EXPERTS),
    "Mixtral": lambda: config("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "gpt-oss": lambda: config(
        "GptOss", num_local_experts=4, num_experts_per_tok=2, sliding_window=128, rope_parameters=YARN
    ),
    "Phi-3": lambda: config("Phi3", sliding_window=None),
    "OLMo-2": lambda: config("Olmo2"),
    "Granite": lambda: config("Granite", logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.22),
    "GLM-4": lambda: config("Glm4"),
    "GLM-4.5-MoE": lambda: config(
        "Glm4Moe", n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, **EXPERTS
    ),
    "Gemma 2": lambda: config("Gemma2", query_pre_attn_scalar=32, sliding_window=512),
    "Gemma 3": lambda: config("Gemma3Text", query_pre_attn_scalar=32, sliding_window=512),
    "DeepSeek-V3": lambda: config(
        "DeepseekV3",
        num_key_value_heads=4,
        head_dim=16,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        moe_layer_freq=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        **EXPERTS,
    ),
    "Qwen3-Next": lambda: config(
        "Qwen3Next",
        num_experts=4,
        full_attention_interval=4,
        shared_expert_intermediate_size=64,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        **EXPERTS,
    ),
    "Qwen2.5-VL": lambda: nested(
        "Qwen2_5_VL", "Qwen2", {"out_hidden_size": HIDDEN, "num_heads": 2}, rope_parameters=MROPE
    ),
    "Qwen3-VL": lambda: nested(
        "Qwen3VL", "Qwen3", {"out_hidden_size": HIDDEN, "num_heads": 2, "deepstack_visual_indexes": [0, 1]}
    ),
    "Mistral 3": lambda: nested("Mistral3", "Mistral", {"num_attention_heads": 2, "head_dim": 32}),
    "Llama 4": lambda: nested(
        "Llama4", "Llama4Text", {"num_attention_heads": 2}, num_local_experts=4, intermediate_size_mlp=256
    ),
}


def make_checkpoint(family: str, folder: Path, tokenizer: Path) -> PreTrainedModel:
    """Write the family's checkpoint to ``folder``, with the tokenizer of another one; the same weights each time."""
    made = FAMILIES[family]()
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if made.sub_configs else AutoModelForCausalLM
    model = auto.from_config(made, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder)
    tree = json.loads((folder / "config.json").read_text())
    assert tree["architectures"] == [type(model).__name__]
    if made.model_type == "qwen3_next":  # released ones have it, SGLang reads it, transformers no longer writes it
        (folder / "config.json").write_text(json.dumps(tree | {"full_attention_interval": 4}, indent=2))
    return model
