"""What the driver must know of a target before it starts anything: shapes, vocabulary, tokens that end an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from torchspec.config.schema import TargetConfig
from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.parallel.ulysses import key_value_repeats
from torchspec.shards import ShardFormula
from torchspec.store.geometry import SampleGeometry
from torchspec.target.layers import resolve_aux_layers


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """Read from the target's folder; no weights are loaded."""

    path: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_parameters: int
    aux_layers: tuple[int, ...]
    end_token_ids: tuple[int, ...]
    geometry: SampleGeometry
    draft: Eagle3Spec
    """Of a draft for it that has its whole vocabulary."""


def read_target(config: TargetConfig, sharding: ShardFormula | None = None) -> TargetInfo:
    """Read the shapes of ``target.path``.

    Args:
        sharding: how its samples are split among ranks that share them.

    Raises:
        ValueError: the folder is no checkpoint, ``target.aux_layers`` does not fit it, no draft could be trained
            for such a model, or its heads cannot be split so.
    """
    path = Path(config.path).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(f"target.path {path} is not a Hugging Face checkpoint: it has no config.json")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"target.path {path} has no .safetensors weights")
    model = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code).get_text_config()
    aux_layers = resolve_aux_layers(model.num_hidden_layers, config.aux_layers)
    draft = Eagle3Spec.from_target(model, num_aux=len(aux_layers))
    if sharding is not None:
        key_value_repeats(draft.num_heads, draft.num_kv_heads, sharding.ulysses_size)
    return TargetInfo(
        path=str(path),
        num_layers=model.num_hidden_layers,
        hidden_size=draft.hidden_size,
        vocab_size=draft.vocab_size,
        num_parameters=sum(f.stat().st_size for f in weights) // 2,
        aux_layers=tuple(aux_layers),
        end_token_ids=_end_tokens(path, config.trust_remote_code),
        geometry=SampleGeometry(len(aux_layers), model.hidden_size, config.dtype, sharding),
        draft=draft,
    )


def _end_tokens(path: Path, trust_remote_code: bool) -> tuple[int, ...]:
    ends = {AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code).eos_token_id}
    generation = path / "generation_config.json"
    if generation.is_file():
        ids = json.loads(generation.read_text()).get("eos_token_id")
        ends.update(ids if isinstance(ids, list) else [ids])
    return tuple(sorted(i for i in ends if i is not None))
