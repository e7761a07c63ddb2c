"""Writes and checks the Hugging Face folder of an EAGLE3 draft, the one that SGLang and vLLM serve.

The folder holds ``config.json`` and ``model.safetensors`` and nothing else. SGLang's loader *silently ignores*
tensors whose names it does not know, and serves a half-loaded draft that is merely never right; so what goes in is an
allow-list, and every name, shape, dtype and value is checked both when the folder is written and when it is read.

Both servers load the same folder although they number layers differently. With ``k`` the 0-based target layer whose
*output* feeds the draft:

- SGLang 0.5.23 reads ``eagle_config.eagle_aux_hidden_state_layer_ids`` and adds one itself: it wants ``k``.
- vLLM 0.32 reads the top-level ``eagle_aux_hidden_state_layer_ids`` first and takes it as it is: it wants ``k + 1``.

A draft over the target's whole vocabulary has no ``d2t`` and ``t2d``: SGLang needs none, and vLLM refuses them.

Shapes: H hidden size (draft and target), F aux layers, Q query heads times head_dim, K key heads times head_dim,
M MLP width, V target vocabulary, D draft vocabulary (``Vd`` in the papers).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.target.layers import resolve_aux_layers

ARCHITECTURE = "LlamaForCausalLMEagle3"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

Spec = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class DraftExport:
    """A checked folder: what a server or an evaluation must know of it."""

    folder: Path
    hidden_size: int
    vocab_size: int
    """Of the target."""
    draft_vocab_size: int
    aux_layers: tuple[int, ...]
    """0-based target layers whose outputs feed the draft."""
    dtype: str


def export_draft(
    state_dict: Mapping[str, Tensor],
    target_path: str | Path,
    draft_ids: Tensor,
    aux_layers: Sequence[int],
    folder: str | Path,
    dtype: str = "bfloat16",
) -> Path:
    """Write ``folder``, atomically; an older export there is replaced.

    Args:
        state_dict: exactly the draft's trained tensors, under their exported names, in any float dtype. The frozen
            embedding is not among them: servers take the target's.
        target_path: the target's checkpoint; the draft's heads, RoPE and token ids are those of its config.
        draft_ids: [D] int64, the draft vocabulary as increasing target ids.
        aux_layers: 0-based target layers whose outputs feed the draft.
        dtype: ``bfloat16``, ``float16`` or ``float32``.

    Raises:
        ValueError: a tensor is missing, unknown, of the wrong shape, not finite (in ``dtype``) or all zero; or
            ``folder`` holds something else than an export.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    target = read_target(target_path)
    shape = Eagle3Spec.from_target(target, draft_vocab_size=draft_ids.numel(), num_aux=len(aux_layers))
    config = draft_config(target, shape, resolve_aux_layers(target.num_hidden_layers, aux_layers), dtype)
    tensors = {name: value.detach().to("cpu", DTYPES[dtype]).contiguous() for name, value in state_dict.items()}
    tensors |= _vocabulary_tensors(draft_ids, target.vocab_size)
    check_tensors(tensors, config)
    return _publish(Path(folder), config, tensors)


def validate_export(folder: str | Path) -> DraftExport:
    """Read a folder back and check all of it.

    Raises:
        ValueError: it is not an export of an EAGLE3 draft, or one that a server would load in part only.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        check_tensors(load_file(folder / WEIGHTS), config)
        return DraftExport(
            folder=folder,
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            draft_vocab_size=config["draft_vocab_size"],
            aux_layers=tuple(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]),
            dtype=config["torch_dtype"],
        )
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} lacks {error}") from None
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder that calls itself an EAGLE3 draft.

    Raises:
        ValueError: it does not.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not an exported draft: it has no {name} (torchspec export writes one)")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from None
    if config.get("architectures") != [ARCHITECTURE]:
        raise ValueError(
            f"{folder} is not an exported EAGLE3 draft: its architectures are {config.get('architectures')}, "
            f"expected [{ARCHITECTURE!r}]"
        )
    return config


def read_target(path: str | Path) -> PretrainedConfig:
    """The text config of the target's checkpoint.

    Raises:
        ValueError: ``path`` is not a checkpoint in Hugging Face format.
    """
    path = Path(path).expanduser()
    if not (path / CONFIG).is_file():
        raise ValueError(f"the target {path} is not a checkpoint in Hugging Face format: it has no {CONFIG}")
    config: PretrainedConfig = AutoConfig.from_pretrained(path)
    return config.get_text_config()


def draft_config(target: PretrainedConfig, shape: Eagle3Spec, aux_layers: Sequence[int], dtype: str) -> dict[str, Any]:
    """``config.json`` of a draft with this shape; token ids are the target's.

    RoPE is written in the form of transformers 5 (``rope_parameters``) and in the older one (``rope_theta``,
    ``rope_scaling``), for servers that read either.
    """
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "torch_dtype": dtype,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "target_hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_parameters": dict(shape.rope_parameters),
        "rope_theta": shape.rope_parameters["rope_theta"],
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_vocab_size,
        "tie_word_embeddings": False,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": target.eos_token_id,
        "pad_token_id": target.pad_token_id,
        "num_aux_hidden_states": len(aux_layers),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(aux_layers), "use_aux_hidden_state": True},
        "eagle_aux_hidden_state_layer_ids": [k + 1 for k in aux_layers],
    }
    if shape.rope_parameters["rope_type"] != "default":
        config["rope_scaling"] = {key: value for key, value in shape.rope_parameters.items() if key != "rope_theta"}
    return config


def expected_tensors(config: Mapping[str, Any]) -> dict[str, Spec]:
    """Name to shape and dtype of every tensor that a folder with this config must hold."""
    H, F = config["hidden_size"], config["num_aux_hidden_states"]
    M, V, D = config["intermediate_size"], config["vocab_size"], config["draft_vocab_size"]
    Q, K = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "fc.weight": (H, F * config["target_hidden_size"]),
        "midlayer.input_layernorm.weight": (H,),
        "midlayer.hidden_norm.weight": (H,),
        "midlayer.post_attention_layernorm.weight": (H,),
        "midlayer.self_attn.q_proj.weight": (Q, 2 * H),
        "midlayer.self_attn.k_proj.weight": (K, 2 * H),
        "midlayer.self_attn.v_proj.weight": (K, 2 * H),
        "midlayer.self_attn.o_proj.weight": (H, Q),
        "midlayer.mlp.gate_proj.weight": (M, H),
        "midlayer.mlp.up_proj.weight": (M, H),
        "midlayer.mlp.down_proj.weight": (H, M),
        "norm.weight": (H,),
        "lm_head.weight": (D, H),
    }
    specs: dict[str, Spec] = {name: (shape, DTYPES[config["torch_dtype"]]) for name, shape in shapes.items()}
    if D < V:
        specs |= {"d2t": ((D,), torch.int64), "t2d": ((V,), torch.bool)}
    return specs


def check_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Check names, shapes, dtypes and values of a whole draft.

    Raises:
        ValueError: naming every tensor at fault.
    """
    specs = expected_tensors(config)
    if unknown := tensors.keys() - specs.keys():
        raise ValueError(f"unknown tensors {_names(unknown)}; a draft holds only {_names(specs)}")
    if missing := specs.keys() - tensors.keys():
        raise ValueError(f"missing tensors {_names(missing)}")
    for name, (shape, dtype) in specs.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
        if tensor.is_floating_point() and not (tensor.isfinite().all() and tensor.any()):
            raise ValueError(f"{name} holds infinities or NaN, or nothing but zeros")
    if "d2t" in specs:
        draft_ids_D = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        if not torch.equal(tensors["t2d"].nonzero().flatten(), draft_ids_D):
            raise ValueError("d2t and t2d name different draft vocabularies")


def _vocabulary_tensors(draft_ids_D: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """``d2t[i] = id_i - i`` and the membership mask ``t2d``; nothing for the target's whole vocabulary."""
    ids_D = draft_ids_D.detach().to("cpu", torch.int64)
    if ids_D.dim() != 1 or ids_D[0] < 0 or ids_D[-1] >= vocab_size or not (ids_D.diff() > 0).all():
        raise ValueError(f"draft_ids must be increasing token ids from 0 to {vocab_size - 1}")
    if len(ids_D) == vocab_size:
        return {}
    t2d_V = torch.zeros(vocab_size, dtype=torch.bool)
    t2d_V[ids_D] = True
    return {"d2t": ids_D - torch.arange(len(ids_D)), "t2d": t2d_V}


def _publish(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write beside ``folder``, then rename into place."""
    _require_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        complete, old = Path(scratch, "new"), Path(scratch, "old")
        complete.mkdir()
        (complete / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, complete / WEIGHTS, metadata={"format": "pt"})
        (complete / WEIGHTS).chmod((complete / CONFIG).stat().st_mode)  # safetensors lets nobody else read it
        if folder.exists():
            os.rename(folder, old)
        os.rename(complete, folder)
    return folder


def _require_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    others = {entry.name for entry in folder.iterdir()} - {CONFIG, WEIGHTS}
    if others:
        raise ValueError(f"{folder} exists and is not an export (it holds {_names(others)}); choose another folder")
    read_config(folder)


def _names(names: Mapping[str, Any] | set[str]) -> str:
    return ", ".join(sorted(names))
